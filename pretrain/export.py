"""pretrain export: from a run's checkpoints to Hugging Face folders: the newest, a named one, all, or the mean of some.

    RUN_DIR/checkpoints/step-00005000 ── verified ──> weights ── --dtype ──┐
    RUN_DIR/config.yaml, RUN_DIR/tokenizer/ ───────────────────────────────┴─> staged folder ── --check ──> DIR

The folder takes its name only when it has been read back, and, with --check, when transformers agrees with Cria on it. With
--all each checkpoint has its own, DIR/step-00005000, and those that are there stay as they are.
"""

from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from data_prep.shard import folder_fingerprint
from pretrain import back, checkpoint, hf, snapshot
from pretrain.cli import Parser, fail
from pretrain.folder import MARK, clear, made_of, staged
from pretrain.lock import Lock
from pretrain.reading import read_json
from pretrain.snapshot import Snapshot

Dtype = Literal["float32", "bfloat16", "float16"]

_SAMPLE = "A cria is a young llama: def cria(n): return n * 'ñandú' # 2401.02385\n"
_TOLERANCE = 1e-4


def main(argv: list[str]) -> None:
    """The command `pretrain export`; exit status 1 where --all could not export a checkpoint."""
    parser = Parser(prog="pretrain export", description="Write a run's model as a folder that transformers loads.")
    parser.add_argument("run_dir", type=Path, help="Folder of the run (path).")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Folder to write; an earlier export is replaced. With --all: folder for those of each checkpoint (path).",
    )
    parser.add_argument("--step", type=int | None, default=None, help="Checkpoint to take (steps); none: the newest.")
    parser.add_argument(
        "--all",
        action="store_true",
        help="Export each checkpoint that the run keeps to OUT/step-STEP, but for those that are there already: to be repeated "
        "while the run goes on.",
    )
    parser.add_argument(
        "--average",
        type=list[int | Path] | None,
        default=None,
        help="Checkpoints to take the mean of the weights of, such as '[180000,190000]' (steps), those of other runs, as of "
        "branches, by their paths: '[190000,runs/b/checkpoints/step-00190000]'.",
    )
    parser.add_argument("--dtype", type=Dtype, default="float32", help="Type of the weights; float32 is exact.")
    parser.add_argument(
        "--check", action="store_true", help="Compare logits and tokens with transformers before naming DIR."
    )
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    try:
        if args.all + (args.step is not None) + (args.average is not None) > 1:
            raise ValueError("--step, --all and --average exclude each other: give one of them")
        if args.all:
            failed = export_all(args.run_dir, args.out, dtype, args.check)
        elif args.average is not None:
            _say(args.out, export_mean(args.run_dir, args.out, args.average, dtype, args.check))
        else:
            _say(args.out, export(args.run_dir, args.out, args.step, dtype, args.check))
    except (ValueError, OSError) as error:
        fail(parser.prog, error)
    if args.all and failed:
        fail(parser.prog, f"{len(failed)} not exported, each for the reason above: {', '.join(failed)}", 1)


def _say(out: Path, done: dict[str, Any]) -> None:
    steps = [f"{step:,}" for step in done.get("steps", ())]
    if "runs" in done:
        steps = [f"{step} of {Path(run).name}" for step, run in zip(steps, done["runs"])]
    what = f"mean of steps {', '.join(steps[:-1])} and {steps[-1]}" if steps else f"step {done['step']:,}"
    print(f"{out}: {what}, {done['parameters']:,} parameters as {done['dtype']}")
    print(f"  tokenizer of {done['tokenizer_vocab_size']:,} ids, model of {done['vocab_size']:,}")
    if done["difference"] is not None:
        print(f"  transformers agrees: logits differ by at most {done['difference']:.1e}, tokens not at all")


def export(run_dir: Path, out: Path, step: int | None, dtype: torch.dtype, check: bool) -> dict[str, Any]:
    """Export the checkpoint of `step`, or the newest, to `out`; return what a user wants to hear of it.

    Raises:
        FileNotFoundError: no run, no whole checkpoint, or no tokenizer there.
        ValueError: a corrupt checkpoint, one that the run was sent back from, another tokenizer than the run's, weights that
            `dtype` cannot hold, an `out` that is not an export, or, with `check`, a difference from transformers.
        OSError: what cannot be read or written now; a checkpoint that the run deletes meanwhile (snapshot.Gone).
    """
    _check_run(run_dir)
    if step is not None:
        (source,) = snapshot.named(run_dir, [step])
        return _write(run_dir, out, snapshot.take(source), dtype, check)
    source = checkpoint.latest(run_dir, warn=print)
    if (sent := back.read(run_dir)) is not None and checkpoint.read_state(source).get("back") != sent.start:
        raise ValueError(
            f"{run_dir} was sent back to step {sent.step} and has saved nothing since, so that its newest checkpoint is of what "
            "it left: name the one that is meant with --step"
        )
    return _write(run_dir, out, snapshot.take(source, verified=True), dtype, check)


def export_mean(run_dir: Path, out: Path, which: list[int | Path], dtype: torch.dtype, check: bool) -> dict[str, Any]:
    """Export the mean of the weights of checkpoints, the run's by their steps and others by their paths; returns and raises as
    `export` and `snapshot.mean`.
    """
    _check_run(run_dir)
    folders = snapshot.named(run_dir, which)
    if len({folder.resolve() for folder in folders}) < len(folders) or len(folders) < 2:
        raise ValueError(f"--average is [{', '.join(map(str, which))}]; name at least two checkpoints, and each once")
    return _write(run_dir, out, snapshot.mean(folders), dtype, check)


def export_all(run_dir: Path, out: Path, dtype: torch.dtype, check: bool) -> list[str]:
    """Export each checkpoint that the run keeps to its folder in `out`, where it is not there; a line for each that is written.

    An export that is there is the one of its checkpoint by its mark, and is not read again. It is never replaced: its weights may
    have been evaluated. What a killed one has left is removed. Returns the names of the checkpoints that could not be exported.

    Raises:
        FileNotFoundError: no run there.
        ValueError: `out` is no folder for exports, or holds those of another run or type.
        OSError: another process is writing there (BlockingIOError), or the folders cannot be read or written.
    """
    _check_run(run_dir)
    _check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    written, there, failed = 0, 0, []
    with closing(Lock(out, option="--out")):
        clear(out, "step-*")
        _check_like(run_dir, out, dtype)
        checkpoints = snapshot.kept(run_dir)
        for step, source in checkpoints.items():  # the oldest first: the run deletes it first
            target = out / f"step-{step:08d}"
            try:
                if _is_there(target, step, source):
                    there += 1
                elif _is_left(run_dir, step, source):
                    print(f"{source.name} is passed over: the run was sent back to an earlier step", flush=True)
                else:
                    done = _write(run_dir, target, snapshot.take(source), dtype, check)
                    print(f"{target}: {done['parameters']:,} parameters as {done['dtype']}", flush=True)
                    written += 1
            except snapshot.Gone as gone:
                print(f"{source.name} is passed over: {gone}", flush=True)
            except (ValueError, OSError) as error:
                print(f"{source.name} is NOT exported: {error}", flush=True)
                failed.append(source.name)
    none = "" if checkpoints else f"; {run_dir} has no checkpoint yet"
    print(f"{out}: {written} written, {there} were there{none}")
    return failed


def _check_run(run_dir: Path) -> None:
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{run_dir} has no config.yaml; name the folder of a run (run_dir in its configuration)"
        )


def _check_place(out: Path) -> None:
    """Raise ValueError for a place where step-00005000 would be taken for something else."""
    what = None
    if out.exists() and not out.is_dir():
        what = "a file"
    elif (out / MARK).exists():
        what = "an export itself"
    elif (out / "config.yaml").exists() or out.resolve().name == "checkpoints":
        what = "a run's"
    if what is not None:
        raise ValueError(f"{out} is {what}; name another folder for the exports of all checkpoints")


def _check_like(run_dir: Path, out: Path, dtype: torch.dtype) -> None:
    """Raise ValueError where exports of another run or type are in `out`: they would be taken for ones of this, and compared."""
    run, new = run_dir.resolve().name, str(dtype).removeprefix("torch.")
    for target in sorted(out.glob("step-*")):
        if (mark := made_of(target)) is None:
            continue
        place = Path(mark.get("run_dir", run_dir))
        moved = not (place / "config.yaml").is_file()
        if mark.get("run") != run or not (moved or place.samefile(run_dir)):
            raise ValueError(
                f"{target} is of another run, {place}, and this one is {run_dir.resolve()}; name another --out"
            )
        old = read_json(target / "config.json").get("dtype")
        if old != new:
            raise ValueError(
                f"{target} is {old} and --dtype {new}; name another --out, so that all exports in one folder can be compared"
            )


def _is_there(target: Path, step: int, source: Path) -> bool:
    """Whether a checkpoint's export is there and whole.

    Raises:
        ValueError: one of another checkpoint is.
    """
    mark, its_seal = made_of(target), snapshot.seal(source)
    if mark is None or not its_seal:  # without one it is gone, or corrupt, which is said when it is read
        return False
    if (mark.get("step"), mark.get("checkpoint", its_seal)) == (step, its_seal):
        return True
    raise ValueError(
        f"{target} is of another checkpoint than the one that the run has now; move it away, or name another --out"
    )


def _is_left(run_dir: Path, step: int, source: Path) -> bool:
    """Whether the run was sent back and has left this checkpoint, which is set aside at its next save."""
    sent = back.read(run_dir)
    if sent is None or step <= sent.step:
        return False
    try:
        return checkpoint.read_state(source).get("back") != sent.start
    except (ValueError, OSError):
        return False  # it is named when it is verified


def _write(run_dir: Path, out: Path, taken: Snapshot, dtype: torch.dtype, check: bool) -> dict[str, Any]:
    """Write it to `out`, with the run's tokenizer; what is written takes the place of the weights in `taken`."""
    found = folder_fingerprint(run_dir / "tokenizer")
    if taken.tokenizer != found:
        raise ValueError(
            f"{run_dir / 'tokenizer'} is not the tokenizer of the run: its fingerprint is {found[:19]} and the checkpoint's "
            f"{taken.tokenizer[:19]}; copy the tokenizer that lies beside the shards there"
        )
    for name in list(taken.weights):  # one by one: the memory of one model
        taken.weights[name] = taken.weights[name].to(dtype)
    origin = {name: value for name, value in taken.made_of.items() if value is not None}
    place = run_dir.resolve()
    with staged(out, {"run": place.name, "run_dir": str(place), **origin}) as folder:
        facts = hf.write(folder, taken.model, taken.weights, run_dir / "tokenizer")
        difference = compare_with_transformers(folder) if check else None
    return {
        **origin,
        "parameters": sum(tensor.numel() for tensor in taken.weights.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": taken.model.vocab_size,
        "tokenizer_vocab_size": facts.vocab_size,
        "difference": difference,
    }


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
