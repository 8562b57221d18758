"""The command `pretrain`: shards to model.

    pretrain plan | doctor | train | order | verify-resume | bench | report | export | generate

Each command is a module of its own with `main(argv)`; only the one that is asked for is imported.
"""

import importlib
import os
import sys

from pretrain.imports import importing
from pretrain.streams import standard_streams

INSTALL = "in Cria's folder `make setup` installs all it needs, in .venv"

COMMANDS = {
    "plan": ("pretrain.plan", "what a run needs before it starts: memory, days, disk; the fastest setting that fits"),
    "doctor": ("pretrain.doctor", "before the big run: machines, links, files and versions, on all ranks"),
    "train": ("pretrain.train", "train the model that a configuration describes, or go on with it"),
    "order": ("pretrain.order", "which sequences and documents a step is made of; epochs of each source"),
    "verify-resume": ("pretrain.verify_resume", "prove on this machine that a killed run is the same run"),
    "bench": ("pretrain.benchmark", "how fast a configuration trains here, and against what else there is"),
    "report": ("pretrain.report", "pictures and a page of a run, or of several side by side"),
    "export": ("pretrain.export", "a run's model as a Hugging Face folder"),
    "generate": ("pretrain.generate", "text from an exported model"),
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch to a command; returns the process's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    with standard_streams("pretrain", lasting=argv[:1] == ["train"]):
        try:
            return _run(argv)
        except KeyboardInterrupt:  # a run that trains goes on to a save, see `scheduler`
            print("pretrain: interrupted", file=sys.stderr)
            return 130


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: pretrain COMMAND ...   (pretrain COMMAND --help explains it)\n")
        print("\n".join(f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items()))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"pretrain: error: there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        with importing():
            command = importlib.import_module(COMMANDS[argv[0]][0])
    except ModuleNotFoundError as error:
        if (error.name or "pretrain").startswith(("pretrain", "data_prep")):
            raise
        print(f"pretrain: error: {error.name} is not installed here; {INSTALL}", file=sys.stderr)
        return 2
    return command.main(argv[1:]) or 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SystemExit as end:
        if end.code in (2, 69) and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # refused, while others are connected
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)  # at Python's own end gloo's threads may make an abort of it
        raise
