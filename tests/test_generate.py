"""Generation: the same text with the cache, without it, and from transformers; whole characters; a fair draw."""

import shutil
from pathlib import Path

import pytest
import torch
from hf_folder import HEADS, TINY, make_model, shape, weights_of, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pretrain import hf
from pretrain.folder import staged
from pretrain.generate import Sampling, TextStream, distribution, generate, main, sample
from pretrain.model import Llama

GREEDY = Sampling(temperature=0)
PROMPT = [1, 5, 300, 17, 42, 299]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def export(folder: Path, model: Llama) -> Path:
    with staged(folder, {}) as staging:
        hf.write(staging, model.config, weights_of(model), write_tokenizer(folder.with_name("tokenizer")))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("export") / "model", make_model(TINY))


# --- the same tokens -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def without_cache(model: Llama, prompt_ids: list[int], new_tokens: int) -> list[int]:
    """The reference: the whole text through the model for every token."""
    ids = list(prompt_ids)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize(("kv_heads", "tied"), HEADS)
def test_greedy_is_the_same_with_and_without_cache_and_in_transformers(
    tmp_path: Path, kv_heads: int, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    export(tmp_path / "model", make_model(shape(kv_heads, tied)))
    model = hf.load_model(tmp_path / "model", torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for prompt in ([1], PROMPT):
        ours = list(generate(model, prompt, 40, (), GREEDY, generator()))
        assert len(set(ours)) > 5, "a text that repeats itself would prove little"
        assert ours == without_cache(model, prompt, 40)
        out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None)
        assert ours == out[0, len(prompt) :].tolist()


def test_generation_in_bfloat16_works_from_a_bfloat16_export(tmp_path: Path) -> None:
    export(tmp_path / "model", make_model(TINY).to(torch.bfloat16))
    model = hf.load_model(tmp_path / "model", torch.device("cpu"))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.model.rope.dtype == torch.float32, "positions are not rounded"
    assert len(list(generate(model, PROMPT, 10, (), GREEDY, generator()))) == 10


def test_a_seed_fixes_the_text_and_another_seed_changes_it() -> None:
    model = make_model(TINY)
    texts = [list(generate(model, PROMPT, 30, (), Sampling(), generator(seed))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


# --- where it ends ---------------------------------------------------------------------------------------------------


def test_it_ends_at_eos_at_the_limit_and_at_the_last_position() -> None:
    model = make_model(TINY)
    whole = list(generate(model, PROMPT, 1000, (), GREEDY, generator()))
    assert len(PROMPT) + len(whole) == TINY.max_position_embeddings
    assert list(generate(model, PROMPT, 7, (), GREEDY, generator())) == whole[:7]
    few = list(generate(model, PROMPT, 60, (), Sampling(top_k=0), generator(), known_ids=5))
    assert set(few) == set(range(5)), "rows of the embedding without a token are never drawn"
    end = whole[9]
    first = whole.index(end)
    assert first > 0
    assert list(generate(model, PROMPT, 1000, (end, 351), GREEDY, generator())) == whole[: first + 1]


def test_prompts_that_cannot_be_are_refused_at_once() -> None:
    model = make_model(TINY)
    with pytest.raises(ValueError, match="the prompt has 96 tokens, and the model 96 positions"):
        generate(model, [1] * 96, 1, (), GREEDY, generator())
    with pytest.raises(ValueError, match="token id 352"):
        generate(model, [1, 352], 1, (), GREEDY, generator())
    assert len(list(generate(model, [1] * 95, 5, (), GREEDY, generator()))) == 1


# --- sampling --------------------------------------------------------------------------------------------------------


LOGITS = torch.randn(352, generator=generator(3)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
def test_the_distribution_is_transformers(temperature: float, top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, LOGITS[None])
    if top_k:
        scores = TopKLogitsWarper(min(top_k, len(LOGITS)))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ids, probabilities = distribution(LOGITS, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(torch.zeros(352).scatter(0, ids, probabilities), scores[0].softmax(0))


def test_draws_follow_the_distribution() -> None:
    settings_, rng = Sampling(1.0, 4, 1.0), generator()
    ids, probabilities = distribution(LOGITS, settings_)
    draws = torch.tensor([sample(LOGITS, settings_, rng) for _ in range(4000)])
    frequencies = torch.stack([(draws == i).float().mean() for i in ids])
    assert frequencies.sum() == 1, "nothing but the four likeliest"
    assert (frequencies - probabilities).abs().max() < 0.03  # 4 standard deviations of 4,000 draws


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    for temperature in (0.0, 1e-30, 1e-300):
        assert sample(LOGITS * 1e4, Sampling(temperature, 0), generator()) == int(LOGITS.argmax())


# --- text ------------------------------------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    """The other family of tokenizers, GPT-2's: every byte is a piece."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module", params=["byte_fallback", "byte_level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "byte_level":
        return byte_level()
    return Tokenizer.from_file(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"))


@given(text=st.text(alphabet=st.sampled_from("a llam cri\n é€ñ漢字🦙👩‍👩‍👧"), max_size=40), cut=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text_and_are_whole_characters(tokenizer: Tokenizer, text: str, cut: int) -> None:
    """Wherever the prompt ends, if it ends between characters."""
    ids = tokenizer.encode(text).ids
    prompt = ids[: min(cut, len(ids))]
    while prompt and tokenizer.decode(prompt).endswith("\ufffd"):
        prompt.pop()
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token_id) for token_id in ids[len(prompt) :]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(ids)
    assert stream.rest() == ""


@given(ids=st.lists(st.integers(3, 258), max_size=30))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_text_do_no_harm_to_what_follows(tokenizer: Tokenizer, ids: list[int]) -> None:
    """An untrained model writes such things."""
    ids = [i % 256 for i in ids] if tokenizer.get_vocab_size() == 256 else ids
    stream = TextStream(tokenizer, [])
    shown = "".join(stream.push(token_id) for token_id in [*ids, *tokenizer.encode("a llama").ids])
    assert shown.endswith("a llama"), "at once, not at the end"
    assert stream.rest() == ""


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦙").ids
    start = len(ids) - 4
    stream = TextStream(tokenizer, ids[:start])
    assert [stream.push(token_id) for token_id in ids[start:]] == ["", "", "", "🦙"]
    stream = TextStream(tokenizer, ids[:start])
    assert [stream.push(token_id) for token_id in ids[start:-1]] == ["", "", ""]
    assert set(stream.rest()) == {"\ufffd"}


# --- the command -----------------------------------------------------------------------------------------------------


def continuation(tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]) -> str:
    stream = TextStream(tokenizer, prompt_ids)
    return "".join(stream.push(token_id) for token_id in new_ids) + stream.rest()


def test_the_command_prints_text_on_stdout_and_reasons_on_stderr(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(folder), "--prompt", "a young", "--max_new_tokens", "12", "--temperature", "0"])
    out, err = capsys.readouterr()
    model = hf.load_model(folder, torch.device("cpu"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode("a young").ids
    new = list(generate(model, prompt, 12, (), GREEDY, generator()))
    assert 2 not in new, "else the text would be shorter"
    assert out == "a young" + continuation(tokenizer, prompt, new) + "\n"
    assert "--max_new_tokens is reached" in err

    main([str(folder), "--max_new_tokens", "500", "--temperature", "0"])
    assert "96 positions are full" in capsys.readouterr().err
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=40)
    shutil.copytree(folder, tmp_path / "left")
    tokenizer.save(str(tmp_path / "left" / "tokenizer.json"))
    main([str(tmp_path / "left"), "--prompt", "a young", "--max_new_tokens", "12", "--temperature", "0"])
    assert capsys.readouterr().out == out, "as a script for fine-tuning leaves it"


def test_an_empty_prompt_starts_from_eos_or_bos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write_tokenizer(tmp_path / "bare", special_ids=False)
    with staged(tmp_path / "model", {}) as staging:
        hf.write(staging, TINY, weights_of(make_model(TINY)), bare)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model")])
    assert "give a --prompt" in capsys.readouterr().err
    file = tmp_path / "model" / "generation_config.json"
    for ids, first in (('"bos_token_id": 1, "eos_token_id": [7, 2]', 7), ('"bos_token_id": 1', 1)):
        file.write_text("{" + ids + "}")
        main([str(tmp_path / "model"), "--max_new_tokens", "3", "--temperature", "0"])
        model = hf.load_model(tmp_path / "model", torch.device("cpu"))
        new = list(generate(model, [first], 3, (2,), GREEDY, generator()))
        tokenizer = Tokenizer.from_file(str(bare / "tokenizer.json"))
        assert capsys.readouterr().out == continuation(tokenizer, [first], new) + "\n"


def test_a_tiny_share_of_the_probability_is_the_likeliest_token() -> None:
    assert sample(LOGITS, Sampling(top_p=1e-320), generator()) == int(LOGITS.argmax())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--top_p", "0"], "top_p is 0"),
        (["--top_k", "-3"], "top_k is -3"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "llama " * 200], "positions; shorten it to at most 95"),
        (["--prompt", "\udcff\udcfe"], "the prompt must be UTF-8"),
        (["--temprature", "1"], "did you mean temperature?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), *arguments])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "has no tokenizer.json; name a folder that `pretrain export` wrote" in capsys.readouterr().err


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_model_that_computes_no_numbers_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    """Its weights are finite where an export checks them; a download may hold others."""
    export(tmp_path / "model", make_model(TINY))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors")
    said = one_line(capsys, str(tmp_path / "model"), "--prompt", "a", "--temperature", temperature)
    assert "logits are not finite" in said


def test_a_tokenizer_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path / "model", make_model(TINY))
    file = tmp_path / "model" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is no tokenizer" in one_line(capsys, str(tmp_path / "model"))
