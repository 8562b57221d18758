"""The validation loss: of which tokens it is, and that those are of the kind that is trained on."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY_MODEL, records, tiny_config, write_config, write_dataset

from data_prep.shard import TokenDataset
from pretrain import config, data, preparation, trainer
from pretrain.sections import DataConfig, SourceConfig


def test_the_first_validation_loss_is_that_of_a_plain_model_over_the_whole_split(
    datasets: Path, tmp_path: Path
) -> None:
    """Seven sequences of the validation split, from its first to near its last: transformers' loss for the first weights."""
    tree = tiny_config(datasets, tmp_path / "run", train={"max_steps": 1}, optim={"warmup_steps": 1})
    run = preparation.prepare(config.load(write_config(tmp_path / "c.yaml", tree)))
    shape = transformers.LlamaConfig(**{**TINY_MODEL, "rms_norm_eps": 1e-5}, tie_word_embeddings=False)
    plain = transformers.LlamaForCausalLM(shape)
    plain.load_state_dict(run.model.module.state_dict())

    def loss(dataset: TokenDataset, sequences: list[int]) -> float:
        tokens = torch.from_numpy(dataset.sequences(sequences, 32))
        with torch.no_grad():
            logits = plain(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    spread = [0, 4, 8, 13, 17, 22, 26]
    expected = {}
    for source in run.sources:
        assert source.validation is not None
        assert source.validation.num_sequences(32) == 31
        expected[source.name] = loss(source.validation, spread)
        for other in (loss(source.validation, list(range(7))), loss(source.train, spread)):
            assert abs(other - expected[source.name]) > 1e-3, "other sequences could not be told from these"
    assert trainer.train(run) == 0
    assert records(tmp_path / "run", "validation")[0]["losses"] == pytest.approx(expected, abs=1e-5)


OF_ANOTHER_KIND = [
    ({"tokenizer": "b"}, "was made with another tokenizer .* than .*train"),
    (
        {"append_eos": False},
        "has prepend_bos=False, append_eos=False, and .*train has prepend_bos=False, append_eos=True",
    ),
    ({"prepend_bos": True}, "has prepend_bos=True, append_eos=True, and .*train has prepend_bos=False"),
]
"""How a dataset is made, and the words of its refusal beside one that is made as usual."""


@pytest.mark.parametrize(("other", "words"), OF_ANOTHER_KIND)
def test_validation_on_tokens_of_another_kind_is_refused(
    datasets: Path, tmp_path: Path, other: dict, words: str
) -> None:
    """Its loss would be of words that the model does not learn, or of documents that begin or end otherwise."""
    train, good = datasets / "a" / "train", datasets / "a" / "validation"
    bad = write_dataset(tmp_path / "validation", 1_000, 10, **other)
    with pytest.raises(ValueError, match=f"{bad} {words}"):
        data.open_sources(DataConfig(32, sources=[SourceConfig("a", str(train), validation=str(bad))]), 320)
    data.open_sources(DataConfig(32, sources=[SourceConfig("a", str(train), validation=str(good))]), 320)
