"""The command `data-prep`: text to shards.

    data-prep demo | tokenizer | slimpajama | starcoder | finish

The command line becomes the options of one command, and its `run` gets them; only the module that is asked for is
imported. What a user can do wrong ends in one line and exit status 2.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import fields
from typing import Any, NamedTuple

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings


class Command(NamedTuple):
    """Where a command lives."""

    module: str
    options: str
    help: str
    run: str = "run"


COMMANDS = {
    "demo": Command("data_prep.demo", "DemoOptions", "a demonstration corpus out of what Python ships"),
    "tokenizer": Command("data_prep.tokenizer_train", "TokenizerOptions", "train a tokenizer of Llama's kind"),
    "slimpajama": Command("data_prep.prepare", "SlimPajamaOptions", "SlimPajama to shards"),
    "starcoder": Command("data_prep.prepare", "StarCoderOptions", "StarCoderData to shards"),
    "finish": Command("data_prep.prepare", "FinishOptions", "join what the tasks of an array have made", "finish"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: data-prep COMMAND ...   (data-prep COMMAND --help explains it)\n")
        print("\n".join(f"  {name:<11} {command.help}" for name, command in COMMANDS.items()))
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
        command = COMMANDS[argv[0]]
        module = importlib.import_module(command.module)
        getattr(module, command.run)(_parse(argv[0], getattr(module, command.options), argv[1:]))
    except (ArgumentError, ValueError, OSError) as error:
        print(f"data-prep: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data-prep: interrupted; the same command goes on with what is left", file=sys.stderr)
        return 130
    return 0


def _parse(name: str, options: Any, argv: list[str]) -> Any:
    """The options of a command, an instance of the dataclass `options`. Raises ArgumentError."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"data-prep {name}", description=options.__doc__, exit_on_error=False)
    # A list is given as a shell writes it, --input A B; jsonargparse's own way would be --input [A,B].
    lists = {field.name: field.metadata for field in fields(options) if "nargs" in field.metadata}
    parser.add_class_arguments(options, as_group=False, skip=set(lists))
    for field_name, settings in lists.items():
        parser.add_argument(f"--{field_name}", type=str, required=True, **settings)
    parsed: Namespace = parser.parse_args(argv)
    return options(**parsed.as_dict())


if __name__ == "__main__":
    sys.exit(main())
