"""A configuration's YAML, read so that what it says is what is run, or refused with the file's name and the line.

YAML itself lets the later of two equal keys win without a word, and an alias stand for what no memory holds.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DEEPEST = 100
"""Collections within each other; a configuration has five, and what reads a tree calls itself at each."""


class ConfigFile(jsonargparse.ActionConfigFile):
    """`--config FILE`: whatever is wrong with the file as such is said with its name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the file's keys.

        Raises:
            ValueError: no UTF-8, no YAML, no keys, or what `read` refuses.
        """
        try:
            if os.path.isfile(os.path.expanduser(values)):  # else jsonargparse says what is the matter
                _check(values, Path(values).expanduser().read_text(encoding="utf-8"))
            super().__call__(parser, cfg, values, option_string)
        except UnicodeDecodeError as error:
            remedy = "save it as UTF-8, and set PYTHONUTF8=1 where the locale is another"
            raise ValueError(f"{values} cannot be read as text ({error}); {remedy}") from error


def _check(name: str, text: str) -> None:
    try:
        content = read(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(content, dict):
        what = "is empty" if content is None or not text.strip() else f"holds {text.strip()[:60]!r} and no more"
        raise ValueError(f"{name} {what}; it must hold keys, e.g. optim: {{max_lr: 3.0e-4}}")


def read(text: str) -> Any:
    """A file's content, or a value of the command line, as jsonargparse reads YAML.

    Raises:
        ValueError: a key that stands twice, an alias, or more than a hundred collections within each other.
        yaml.YAMLError: no YAML; to jsonargparse a value is then a plain string.
    """
    _refuse(text)
    return jsonargparse.get_loader("yaml")(text)


@dataclass
class _Open:
    """A mapping or a list that is being walked through."""

    name: str
    is_mapping: bool
    lines: dict[str, int] = field(default_factory=dict)
    """Of a mapping: key -> where it stands (line)."""
    key: str | None = None
    """Of a mapping: the key whose value comes next; None: a key comes next."""


def _refuse(text: str) -> None:
    """Walk through the parser's events, before anything is built of them."""
    open_: list[_Open] = []
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            open_.pop()
        elif isinstance(event, yaml.NodeEvent):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) and open_:  # alone, *x is a word of the command line
                raise ValueError(f"line {line}: *{event.anchor} is an alias; write out what it stands for")
            name = _enter(open_[-1], str(getattr(event, "value", line)), line) if open_ else ""
            if isinstance(event, yaml.CollectionStartEvent):
                open_.append(_Open(name, isinstance(event, yaml.MappingStartEvent)))
                if len(open_) > _DEEPEST:
                    raise ValueError(f"line {line}: more than {_DEEPEST} lists and sections lie within each other")


def _enter(inside: _Open, value: str, line: int) -> str:
    """Count a node in the collection that it lies in; returns the node's name, e.g. optim.max_lr."""
    if not inside.is_mapping:
        return inside.name
    if inside.key is not None:
        name, inside.key = inside.key, None
        return name
    name = f"{inside.name}.{value}" if inside.name else value
    if value in inside.lines:
        where = f"lines {inside.lines[value]} and {line}" if line > inside.lines[value] else f"in line {line}"
        raise ValueError(f"{name} stands twice, {where}; leave one of them")
    inside.lines[value], inside.key = line, name
    return name
