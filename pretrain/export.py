"""pretrain export: from a run's newest checkpoint to a Hugging Face folder.

    RUN_DIR/checkpoints/step-00005000 ── verified ──> weights ── --dtype ──┐
    RUN_DIR/config.yaml, RUN_DIR/tokenizer/ ───────────────────────────────┴─> staged folder ── --check ──> DIR

The folder takes its name only when it has been read back, and, with --check, when transformers agrees with Cria on it.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from data_prep.shard import folder_fingerprint
from pretrain import back, checkpoint, hf
from pretrain.cli import Parser, fail
from pretrain.folder import staged
from pretrain.sections import ModelConfig

Dtype = Literal["float32", "bfloat16", "float16"]

_SAMPLE = "A cria is a young llama: def cria(n): return n * 'ñandú' # 2401.02385\n"
_TOLERANCE = 1e-4


def main(argv: list[str]) -> None:
    """The command `pretrain export`."""
    parser = Parser(prog="pretrain export", description="Write a run's model as a folder that transformers loads.")
    parser.add_argument("run_dir", type=Path, help="Folder of the run (path).")
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder to write; an earlier export is replaced (path)."
    )
    parser.add_argument("--step", type=int | None, default=None, help="Checkpoint to take (steps); none: the newest.")
    parser.add_argument("--dtype", type=Dtype, default="float32", help="Type of the weights; float32 is exact.")
    parser.add_argument(
        "--check", action="store_true", help="Compare logits and tokens with transformers before naming DIR."
    )
    args = parser.parse_args(argv)
    try:
        done = export(args.run_dir, args.out, args.step, getattr(torch, args.dtype), args.check)
    except (ValueError, OSError) as error:
        fail(parser.prog, error)
    print(f"{args.out}: step {done['step']:,}, {done['parameters']:,} parameters as {args.dtype}")
    print(f"  tokenizer of {done['tokenizer_vocab_size']:,} ids, model of {done['vocab_size']:,}")
    if args.check:
        print(f"  transformers agrees: logits differ by at most {done['difference']:.1e}, tokens not at all")


def export(run_dir: Path, out: Path, step: int | None, dtype: torch.dtype, check: bool) -> dict[str, Any]:
    """Export the checkpoint of `step`, or the newest, to `out`; return what a user wants to hear of it.

    Raises:
        FileNotFoundError: no run, no whole checkpoint, or no tokenizer there.
        ValueError: a corrupt checkpoint, one that the run was sent back from, another tokenizer than the run's, weights that
            `dtype` cannot hold, an `out` that is not an export, or, with `check`, a difference from transformers.
    """
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{run_dir} has no config.yaml; name the folder of a run (run_dir in its configuration)"
        )
    source = checkpoint.latest(run_dir, warn=print) if step is None else _checkpoint_of(run_dir, step)
    state = checkpoint.read_state(source)
    if step is None and (sent := back.read(run_dir)) is not None and state.get("back") != sent.start:
        raise ValueError(
            f"{run_dir} was sent back to step {sent.step} and has saved nothing since, so that its newest checkpoint is of what "
            "it left: name the one that is meant with --step"
        )
    model = ModelConfig(**state["model"])
    taken, made_by = state["step"], str(state["data"].get("tokenizer"))
    found = folder_fingerprint(run_dir / "tokenizer")
    if made_by != found:
        raise ValueError(
            f"{run_dir / 'tokenizer'} is not the tokenizer of the run: its fingerprint is {found[:19]} and the checkpoint's "
            f"{made_by[:19]}; copy the tokenizer that lies beside the shards there"
        )
    weights = {name: tensor.to(dtype) for name, tensor in checkpoint.load_weights(source).items()}
    made_of = {"run": run_dir.name, "step": taken, "init_from": state.get("init_from")}
    made_of["branched_from"] = state.get("branched_from")
    with staged(out, {name: value for name, value in made_of.items() if value is not None}) as folder:
        facts = hf.write(folder, model, weights, run_dir / "tokenizer")
        difference = compare_with_transformers(folder) if check else None
    return {
        "step": taken,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "vocab_size": model.vocab_size,
        "tokenizer_vocab_size": facts.vocab_size,
        "difference": difference,
    }


def _checkpoint_of(run_dir: Path, step: int) -> Path:
    kept = dict(reversed(checkpoint.committed(run_dir)))  # of two of one step, as a kill can leave them, the newer
    if step not in kept:
        there = ", ".join(map(str, kept)) or "none"
        raise FileNotFoundError(f"{run_dir} has no checkpoint of step {step}; it keeps: {there}")
    problem = checkpoint.verify(kept[step])
    if problem is not None:
        raise ValueError(f"checkpoint {kept[step]} is corrupt ({problem}); take another with --step")
    return kept[step]


@torch.inference_mode()
def compare_with_transformers(folder: Path) -> float:
    """Load `folder` with transformers and with Cria, both in fp32; return the largest difference of their logits.

    Raises:
        ValueError: without transformers; logits further apart than 1e-4 of the largest, or other tokens for a text.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("--check needs transformers, which is not installed: pip install transformers") from error
    text_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(_SAMPLE).ids
    their_ids = AutoTokenizer.from_pretrained(folder)(_SAMPLE)["input_ids"]
    if text_ids != their_ids:
        raise ValueError(f"AutoTokenizer makes {their_ids} of {_SAMPLE!r}, tokenizer.json {text_ids}")

    model = hf.load_model(folder, torch.device("cpu"), torch.float32)
    V, T = model.config.vocab_size, min(128, model.config.max_position_embeddings)
    spread = torch.arange(T) * 7919 % V  # the text's tokens, then some from all of the vocabulary
    input_ids = torch.cat((torch.tensor(text_ids, dtype=torch.int64), spread))[None, :T]
    ours = model(input_ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder).float()(input_ids).logits
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= _TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"transformers' logits differ by {difference:.1e}, with logits up to {largest:.1e}; please report it"
        )
    return difference
