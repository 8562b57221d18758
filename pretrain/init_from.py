"""A new run's first weights, where they are another one's: --init_from, for continual pretraining.

check ─> is it there, and of this shape? ── before the shards are read
load  ─> whole? the same tokens? ─> weights into the model, sharded as it is
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.shard import TOKENIZER_DIR
from pretrain import checkpoint, config, data, hf, soundness
from pretrain.going_on import CONSEQUENCES, Say, facts_of_steps, tokenizer_of
from pretrain.model import fill
from pretrain.reading import read_json, read_tokenizer
from pretrain.sections import unlike


def check(settings: config.Config) -> None:
    """Whether --init_from can be taken, as far as that is seen at once; nothing where there is a checkpoint to go on from.

    Raises:
        FileNotFoundError, ValueError: it is not there, is no checkpoint and no Hugging Face folder, or has another shape.
    """
    if settings.init_from is None or settings.resume is not None or checkpoint.committed(Path(settings.run_dir)):
        return
    source = Path(settings.init_from)
    if not source.exists():
        raise FileNotFoundError(f"--init_from {source} is not there")
    if _is_checkpoint(source):
        _check_shape(source, checkpoint.read_state(source)["model"], settings)
        return
    within = source if source.name == "checkpoints" else source / "checkpoints"
    if not (source / "config.json").is_file() and within.is_dir():
        raise ValueError(f"--init_from {source} is no checkpoint; name one of those in {within}")
    _check_shape(source, hf.Weights(source).model.shape(), settings)


def load(settings: config.Config, sources: list[data.Source], model: nn.Module, say: Say) -> None:
    """Take the weights of a Cria checkpoint or of a Hugging Face folder into the model, sharded as it is; called by all ranks.

    Raises:
        FileNotFoundError, ValueError: as `check`; they are not whole, not finite, or of other tokens without
            data.allow_change.
    """
    check(settings)
    source, allowed = Path(str(settings.init_from)), settings.data.allow_change
    if _is_checkpoint(source):
        problem = checkpoint.verify_together(source)
        if problem is not None:
            raise ValueError(f"--init_from {source} is not a whole checkpoint: {problem}")
        state = checkpoint.read_state(source)
        _check_tokens(source, state["data"].get("tokenizer") == tokenizer_of(sources), allowed, say)
        _say_what_it_has_seen(source, state, settings, sources, say)
        checkpoint.load_into(source, model)
        if problem := soundness.problem({name: parameter.data for name, parameter in model.named_parameters()}):
            raise ValueError(f"--init_from {source}: {problem}")
        say(f"the weights are those of {source}, after its step {state['step']}")
        return
    weights, shards = hf.Weights(source), sources[0].train
    if not (source / "tokenizer.json").is_file():
        say(f"{source} has no tokenizer.json: whether its ids mean what the shards' do could not be checked")
    else:
        same = _vocabulary(source) == _vocabulary(shards.directory / TOKENIZER_DIR)
        _check_tokens(source, same, allowed, say)
        if _begins_with_bos(source) and not shards.manifest.prepend_bos:
            say(
                f"{source} was trained with BOS before each text, by its tokenizer, and the shards have none (--prepend_bos)"
            )
    for name, parameter in model.named_parameters():
        weight = weights[name].float()
        if not torch.isfinite(weight).all():
            raise ValueError(f"--init_from {source}: {name} has numbers that are not finite")
        fill(parameter, weight)
    say(f"the weights are those of {source}")


def _say_what_it_has_seen(
    source: Path, state: dict[str, Any], settings: config.Config, sources: list[data.Source], say: Say
) -> None:
    """A new run begins at the start of each source's order, which the same seed makes the same for the same shards."""
    its = facts_of_steps(state["data"], state["step"])
    again = [one.name for one in sources if one.train.manifest.fingerprint in its["manifests"]]
    if not again:
        return
    trained = f"{source} was trained on {' and '.join(again)}"
    if (its["seed"], its["seq_len"]) != (settings.seed, settings.data.seq_len):
        say(f"{trained}, too: this run reads that from the start, in another order")
        return
    say(
        f"{trained} in the order of seed {settings.seed}: this run reads the same sequences again, from the first one on. "
        "Another seed mixes them anew; to go on behind them with another schedule or mixture, begin with "
        f"--resume {source} in place of --init_from"
    )


def _is_checkpoint(source: Path) -> bool:
    return (source / "manifest.json").is_file()


_ROPE = {"rope_theta", "rope_scaling"}
"""What a model that is to see longer texts may be given anew: every weight fits, and has to learn what its positions mean."""


def _check_shape(source: Path, found: dict[str, Any], settings: config.Config) -> None:
    differ = unlike(found, settings.model.shape())
    if not differ or (settings.data.allow_change and differ.keys() <= _ROPE):
        return
    its = ", ".join(f"{key} = {its_value}" for key, (its_value, _) in differ.items())
    ours = ", ".join(f"model.{key} = {value}" for key, (_, value) in differ.items())
    or_else = ", or go on with other positions by --data.allow_change true" if differ.keys() <= _ROPE else ""
    raise ValueError(
        f"--init_from {source} has {its} and the configuration says {ours}: give the model its shape{or_else}"
    )


def _check_tokens(source: Path, same: bool, allowed: bool, say: Say) -> None:
    if same:
        return
    change = (
        f"--init_from {source} was trained with another tokenizer than the shards are of; {CONSEQUENCES['tokenizer']}"
    )
    if not allowed:
        raise ValueError(f"{change}. Prepare the data with its tokenizer, or go on with --data.allow_change true")
    say(f"allowed: {change}")


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id by a folder's tokenizer.json."""
    return read_tokenizer(folder / "tokenizer.json").get_vocab(with_added_tokens=True)


def _begins_with_bos(folder: Path) -> bool:
    """Whether the folder's tokenizer puts BOS before each text of its own accord."""
    file = folder / "tokenizer_config.json"
    bos = read_json(file).get("bos_token") if file.is_file() else None
    bos = bos.get("content") if isinstance(bos, dict) else bos
    return isinstance(bos, str) and read_tokenizer(folder / "tokenizer.json").encode("a").tokens[:1] == [bos]
