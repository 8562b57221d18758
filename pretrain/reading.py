"""Files of another hand, read whole: what they hold, or one line that names the file."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is not UTF-8, not JSON, nested deeper than Python follows, or something other than an object.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises:
        ValueError: it describes none.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path} is no tokenizer ({error}); export or download it again") from error
