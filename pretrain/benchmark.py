"""`pretrain bench`: how fast a configuration trains on the machine it is on, and against what else there is.

    pretrain bench --config FILE [keys]            the step, as the configuration says; also under torchrun
                                 --sweep           which micro-batch, compilation, operations, checkpointing are the best
                                 --peers           the same model through litgpt, transformers, torchtitan ...
                                 --paper           GPU hours for 300B tokens: TinyLlama-1.1B, Pythia-1.0B, MPT-1.3B

Each leaves OUT.json and OUT.md. Rows are saved as they come by --sweep, --paper and, on a GPU, --peers; on a CPU the peers take
turns and are saved at the end. `--compare` an earlier OUT.json ends with status 1 where something got slower.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain import config, processes
from pretrain.cli import OptionsParser, fail
from pretrain.imports import importing

PROG = "pretrain bench"

OF_KINDS = {
    "profile": ("step",),
    "data": ("step", "sweep"),
    "grad_accum_steps": ("step", "sweep"),
    "rows": ("sweep", "peers"),
    "ranks": ("sweep",),
    "scale": ("paper",),
    "peers_python": ("peers", "paper"),
    "budget_s": ("sweep", "peers", "paper"),
}
"""Options that not every kind of benchmark heeds, and those that do."""


class Ended(KeyboardInterrupt):
    """By a signal: all ends as by Ctrl-C, but for the status."""


def main(argv: list[str]) -> int:
    """Time, write the result, compare.

    1: slower than before, or nothing could be timed; 130, 143, 129: ended by Ctrl-C, SIGTERM, SIGHUP.
    """
    parser = _parser()
    args, keys = parser.parse_known_args(argv)
    if args.row is not None:
        processes.die_with_parent()
    try:
        with _as_ctrl_c():
            settings = config.parse(["--config", str(args.config), *keys], PROG)
            _check_and_complete(args, settings)
            return _bench(args, settings, keys)
    except (ValueError, OSError) as error:
        fail(PROG, error)
    except KeyboardInterrupt as error:
        number = error.args[0] if isinstance(error, Ended) else signal.SIGINT
        if os.environ.get("RANK", "0") == "0":
            print(f"{PROG}: interrupted" + f" by {number.name}" * isinstance(error, Ended), file=sys.stderr)
        return 128 + number


@contextmanager
def _as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Ended, once; not in one of several ranks: what it waits for may never return to Python."""
    ends = (signal.SIGTERM, signal.SIGHUP) if os.environ.get("WORLD_SIZE", "1") == "1" else ()
    before = {number: signal.getsignal(number) for number in ends}

    def end(number: int, frame: FrameType | None) -> None:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)  # the end may take a while, and is not to be ended
        raise Ended(signal.Signals(number))

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bench(args: argparse.Namespace, settings: config.Config, keys: list[str]) -> int:
    from pretrain import bench_result  # torch takes seconds: a typing error should not

    earlier = None if args.compare is None else bench_result.Earlier.read(args.compare)
    so_far = bench_result.SoFar(args.out if args.row is None else None, earlier)
    try:
        result = _run(args, settings, keys, so_far)
    except KeyboardInterrupt:
        if so_far.result is not None:
            _show(so_far.result, args.out)
        raise
    if result is None or args.row is not None:  # another rank's; for whoever started this process
        return 0
    _show(result, args.out)
    if earlier is not None:
        lines, lost = bench_result.compare(result, earlier, args.noise_pct, all_asked_for=args.rows is None)
        print("\n".join(lines))
        if lost:
            print(f"SLOWER by more than {args.noise_pct:g}%, or gone: {', '.join(lost)}")
            return 1
    return 0 if any(row["problem"] is None for row in result.rows) else 1


def _show(result: Any, out: Path) -> None:
    """First the table: the disk may be full by now."""
    print(result.markdown(), flush=True)
    result.save(out)
    print(f"{out}.json, {out}.md")


def _parser() -> argparse.ArgumentParser:
    parser = OptionsParser(
        prog=PROG,
        description="Time the real training step of a configuration on this machine.",
        epilog="Any key of the configuration can be set as well: pretrain train --help names them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="The run's configuration (path).")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sweep", action="store_true", help="Try micro-batch, compile, operations, checkpointing.")
    kind.add_argument("--peers", action="store_true", help="The same model through other trainers' code.")
    kind.add_argument("--paper", action="store_true", help="GPU hours for 300B tokens beside TinyLlama's paper.")
    add("--steps", type=int, default=15, help="Timed steps; the figure is their median.")
    add("--warmup", type=int, default=5, help="Steps before the timed ones.")
    add(
        "--grad_accum_steps",
        type=int,
        help="Micro-steps of a step; none: as many as the configuration has on these ranks. --sweep times three of them.",
    )
    add("--data", choices=("random", "real"), default="random", help="Random ids, or the configuration's sources.")
    add("--memory_limit_gib", type=float, help="Play a GPU with so much memory; on a CPU, resident memory (GiB).")
    add("--profile", action="store_true", help="Also OUT.trace.json and the ten most expensive operations.")
    add("--budget_s", type=float, help="Time for all rows together; what is not reached is named (seconds).")
    add("--ranks", type=int, default=1, help="For --sweep: ranks of this machine that each row runs on.")
    add("--rows", help="Only these rows, by the beginning of their names (comma-separated).")
    add(
        "--peers_python", type=Path, action="append", help="For --peers: another environment to find peers in (python)."
    )
    add(
        "--scale",
        type=float,
        default=1.0,
        help="For --paper: size of the models, 1 is the paper's; hours are scaled up.",
    )
    add(
        "--compare", type=Path, help="An earlier OUT.json; status 1 where a row lost more than --noise_pct, or is gone."
    )
    add("--noise_pct", type=float, default=5.0, help="What counts as slower (percent).")
    add("--out", type=Path, help="Where the result goes: OUT.json and OUT.md (path); none: RUN_DIR-bench/KIND.")
    add("--of_micro_steps", type=int, help=argparse.SUPPRESS)  # for a child: Timing.of_micro_steps
    add("--in_turns", action="store_true", help=argparse.SUPPRESS)  # for a child that takes turns with others
    add("--row", type=Path, help=argparse.SUPPRESS)  # for a child: write the bare row there
    return parser


def _check_and_complete(args: argparse.Namespace, settings: config.Config) -> None:
    """Refuse what cannot be timed, and fill in what was not said: args.kind and args.out."""
    at_least = {"steps": 1, "warmup": 1, "grad_accum_steps": 1, "ranks": 1}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    for name in ("memory_limit_gib", "budget_s", "scale"):
        value = getattr(args, name)
        if value is not None and not value > 0:  # nan is not
            raise ValueError(f"--{name} is {value:g}; it must be above 0")
    if not args.noise_pct >= 0:
        raise ValueError(f"--noise_pct is {args.noise_pct:g}; it must be at least 0")
    args.kind = next((kind for kind in ("sweep", "peers", "paper") if getattr(args, kind)), "step")
    for name, kinds in OF_KINDS.items():
        if args.kind not in kinds and getattr(args, name) != _parser().get_default(name):
            there = " or ".join(map(_asked, kinds))
            raise ValueError(f"--{name} is for {there}; {_asked(args.kind)} would not heed it: leave it out")
    if args.compare is None and args.noise_pct != _parser().get_default("noise_pct"):
        raise ValueError("--noise_pct is for --compare, and there is none to heed it: leave it out")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.kind != "step" and world_size > 1:
        raise ValueError(
            f"--{args.kind} starts its own processes, and here are {world_size} ranks; start it without torchrun"
            + (f", with --ranks {world_size}" if args.kind == "sweep" else "")
        )
    if args.compare is not None and not args.compare.is_file():
        raise FileNotFoundError(f"--compare {args.compare} is missing; an earlier result's OUT.json is needed")
    for python in args.peers_python or []:
        if shutil.which(python) is None:
            raise ValueError(
                f"--peers_python {python} is no program; give the Python of an environment that has peers, ENVIRONMENT/bin/python"
            )
    if args.out is None:
        args.out = Path(f"{settings.run_dir}-bench") / args.kind
    if args.out.suffix in (".json", ".md"):
        args.out = args.out.with_suffix("")
    if args.row is None and os.environ.get("RANK", "0") == "0":
        _make_folder(args.out)


def _asked(kind: str) -> str:
    return "the step alone" if kind == "step" else f"--{kind}"


def _make_folder(out: Path) -> None:
    """For the result, before minutes are spent on it. Raises OSError: nothing can be written there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise OSError(f"--out {out}: nothing can be written there: {error}") from error


def _run(args: argparse.Namespace, settings: config.Config, keys: list[str], so_far: Any) -> Any:
    if args.kind == "sweep":
        from pretrain import bench_sweep

        return bench_sweep.sweep(args, settings, keys, so_far)
    if args.kind == "peers":
        from pretrain import bench_peers

        return bench_peers.peers(args, settings, so_far)
    if args.kind == "paper":
        from pretrain import bench_paper

        return bench_paper.paper(args, settings, so_far)
    return _step(args, settings, so_far)


def _step(args: argparse.Namespace, settings: config.Config, so_far: Any) -> Any:
    """The configuration's own step, on all ranks; the result is rank 0's, None on the others."""
    with importing():
        from pretrain import bench_result, bench_step, parallel, ranks

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.grad_accum_steps is not None:
        sequences = settings.train.micro_batch_size * world_size * args.grad_accum_steps
        settings = replace(settings, train=replace(settings.train, global_batch_size=sequences))
    grad_accum_steps = config.grad_accum_steps(settings.train, world_size)
    subject = bench_result.subject(settings, world_size, args.data)
    so_far.check_comparable("step", subject)
    trace = args.out.with_name(f"{args.out.name}.trace.json")
    timing = bench_step.Timing(
        steps=args.steps,
        warmup=args.warmup,
        real_data=args.data == "real",
        memory_limit_gib=args.memory_limit_gib,
        trace=trace if args.profile else None,
        in_turns=args.in_turns,
        of_micro_steps=args.of_micro_steps,
        scratch=None if args.row is None else args.row.parent,
    )
    row = {"name": "cria", **bench_step.measure(settings, timing)}
    first = ranks.rank() == 0
    parallel.leave()
    if not first:
        return None
    if args.row is not None:
        args.row.write_text(json.dumps(row))
    title = (
        f"A training step of {args.config.stem}: {world_size} rank{'s' * (world_size > 1)}, "
        f"{grad_accum_steps} x {settings.train.micro_batch_size} x {settings.data.seq_len} tokens a rank"
    )
    notes = bench_result.notes(args.steps, args.warmup) + bench_result.of_documents(settings, args.data)
    if row.get("planned_mem_gib"):
        peak, planned = row["peak_mem_gib"], row["planned_mem_gib"]
        notes.append(
            f"Tensors at the peak: {peak:.2f} GiB; by the plan {planned:.2f} ({100 * (planned / peak - 1):+.1f}%)."
        )
    return bench_result.Result("step", title, subject, [row], notes)
