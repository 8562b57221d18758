"""Files that a kill has cut off, another version has written, or a hand has changed: what they hold, or one line that says why
not.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer


def json_mapping(content: bytes | str) -> dict[str, Any]:
    """The JSON object that `content` is. Raises ValueError where it is none."""
    return _mapping(json.loads, content)


def yaml_mapping(content: bytes | str) -> dict[str, Any]:
    """The YAML mapping that `content` is. Raises ValueError where it is none."""
    return _mapping(yaml.safe_load, content)


def _mapping(parse: Callable[[Any], Any], content: bytes | str) -> dict[str, Any]:
    try:
        found = parse(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        raise ValueError(f"it is {type(found).__name__}, not a mapping of names to values")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is not UTF-8, not JSON, nested deeper than Python follows, or something other than an object.
        OSError: it cannot be read.
    """
    try:
        return json_mapping(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON object ({error})") from error


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises:
        ValueError: it describes none.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()  # what a script for fine-tuning has left in the file; transformers leaves it alone, too
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path} is no tokenizer ({error}); export or download it again") from error
