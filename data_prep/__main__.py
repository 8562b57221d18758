"""The command `data-prep`: text to shards.

    data-prep demo | tokenizer | slimpajama | starcoder | text | hf | finish | import | verify | inspect | stats

The command line becomes the options of one command, and its `run` gets them; only the module that is asked for is
imported. What a user can do wrong ends in one line and exit status 2.
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentError
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from data_prep.streams import standard_streams


class Command(NamedTuple):
    """Where a command lives."""

    module: str
    options: str
    help: str
    run: str = "run"
    """The function that does it, "MODULE:FUNCTION" when it lives elsewhere than its options."""


INSTALL = "in Cria's folder `make setup` installs all it needs, in .venv"

_PREPARE = "data_prep.prepare:run"


COMMANDS = {
    "demo": Command("data_prep.demo", "DemoOptions", "a demonstration corpus out of what Python ships"),
    "tokenizer": Command("data_prep.tokenizer_train", "TokenizerOptions", "train a tokenizer of Llama's kind"),
    "slimpajama": Command("data_prep.prepare", "SlimPajamaOptions", "SlimPajama to shards"),
    "starcoder": Command("data_prep.prepare", "StarCoderOptions", "StarCoderData to shards"),
    "text": Command("data_prep.own_data", "TextOptions", "your own jsonl, parquet or text to shards", _PREPARE),
    "hf": Command("data_prep.own_data", "HubOptions", "a dataset of the Hugging Face Hub to shards", _PREPARE),
    "finish": Command("data_prep.prepare", "FinishOptions", "join what the tasks of an array have made", "finish"),
    "import": Command("data_prep.foreign", "ImportOptions", "take token files that others packed, as they are"),
    "verify": Command("data_prep.verify", "VerifyOptions", "re-read a dataset and check everything"),
    "inspect": Command("data_prep.inspect", "InspectOptions", "a sequence as text, with file and line"),
    "stats": Command("data_prep.stats", "StatsOptions", "tokens by subset, document lengths, epochs of a mixture"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    with standard_streams("data-prep"):
        return _run(argv)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: data-prep COMMAND ...   (data-prep COMMAND --help explains it)\n")
        print("\n".join(f"  {name:<11} {command.help}" for name, command in COMMANDS.items()))
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
        command = COMMANDS[argv[0]]
        module = importlib.import_module(command.module)
        options = _parse(argv[0], getattr(module, command.options), argv[1:])
        home, _, function = command.run.rpartition(":")
        getattr(importlib.import_module(home) if home else module, function)(options)
    except (ArgumentError, ValueError, OSError) as error:
        print(f"data-prep: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "data_prep").startswith("data_prep"):
            raise
        print(f"data-prep: error: {error.name} is not installed here; {INSTALL}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data-prep: interrupted; the same command goes on with what is left", file=sys.stderr)
        return 130
    return 0


def _parse(command: str, options: Any, argv: list[str]) -> Any:
    """The options of a command, an instance of the dataclass `options`. Raises ArgumentError."""
    from jsonargparse import ArgumentParser, Namespace, set_parsing_settings  # which no worker should wait for

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"data-prep {command}", description=options.__doc__, exit_on_error=False)
    # A list is given as a shell writes it, --input A B; jsonargparse's own way would be --input [A,B].
    own = {each.name: each for each in fields(options) if each.metadata}
    parser.add_class_arguments(options, as_group=False, skip=set(own))
    for name, each in own.items():
        settings = {"type": str, **each.metadata}
        if settings.pop("positional", False):
            parser.add_argument(name, **settings)
        elif each.default_factory is not MISSING:
            parser.add_argument(f"--{name}", default=each.default_factory(), **settings)
        else:
            parser.add_argument(f"--{name}", required=True, **settings)
    parsed: Namespace = parser.parse_args(argv)
    return options(**parsed.as_dict())


if __name__ == "__main__":
    sys.exit(main())
