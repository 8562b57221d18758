"""A configuration's YAML, read so that what it says is what is run, or refused with the file's name and the line.

YAML itself lets the later of two equal keys win without a word, and an alias stand for what no memory holds.
"""

import os
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

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
    yaml.compose(text, Loader=_Composer)
    return jsonargparse.get_loader("yaml")(text)


class _Composer(yaml.SafeLoader):
    """PyYAML's own, but what it would pass over in silence is refused, before anything is built of it."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Any node."""
        line = self.peek_event().start_mark.line + 1
        if len(self.states) > _DEEPEST:
            raise ValueError(f"line {line}: more than {_DEEPEST} lists and sections lie within each other")
        if self.check_event(yaml.AliasEvent) and parent is not None:  # alone, *x is a word of the command line
            raise ValueError(f"line {line}: *{self.peek_event().anchor} is an alias; write out what it stands for")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping, whose keys must differ."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                where = f"lines {lines[name]} and {line}" if line > lines[name] else f"in line {line}"
                raise ValueError(f"{name} stands twice, {where}; leave one of them")
            lines[name] = line
        return node
