"""The demonstration corpus: real prose and real code out of what every CPython ships, without a download.

    pydoc topics, docstrings, some sources --> OUT/slimpajama/{train,validation}/chunk1/*.jsonl.zst
    the standard library's files           --> OUT/starcoderdata/{python,shell,...}/train-0000i-of-00004.parquet

The files lie and look as the publishers of SlimPajama and StarCoderData lay them out, so that what reads these reads
those. The same Python gives the same bytes. Docstrings are found by parsing; nothing of the library is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

MARKER = "demo.json"
TRAIN_FILES = 4
VALIDATION_SHARE = 0.1
GITHUB_SHARE = 0.05
"""So many of the Python files also stand in the prose as RedPajamaGithub, for the dropping to be real."""

LANGUAGES = {".py": "python", ".sh": "shell", ".fish": "shell", ".csh": "shell", ".ps1": "powershell", ".html": "html"}
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class DemoOptions:
    """Build the demonstration corpus out of what CPython ships (prose and code, no download)."""

    out: str
    """Folder to write into; an earlier demonstration in it is replaced, anything else is left alone."""
    max_code_mb: float = 12.0
    """Code to take at most, in megabytes of text."""
    scale: float = 1.0
    """Share of all documents to take, in (0, 1]; 0.02 makes a miniature for tests."""


class Text(NamedTuple):
    """One document to be: its kind decides in which file it goes, its key where in the order."""

    kind: str
    """The `redpajama_set_name` of prose, the language of code."""
    key: str
    text: str


def run(options: DemoOptions) -> None:
    """Write the corpus and say what it has. Raises ValueError for a scale or size out of range."""
    if not 0 < options.scale <= 1:
        raise ValueError(f"scale {options.scale} is not in (0, 1]; 1 takes all documents")
    if options.max_code_mb <= 0:
        raise ValueError(f"max_code_mb {options.max_code_mb} is not above 0 megabytes; the default is 12")
    out = Path(options.out)
    _make_room(out)
    files = [file for file in _library_files() if _share(file.key, "scale") < options.scale]
    prose = [text for text in _topics() if _share(text.key, "scale") < options.scale]
    prose += _docstrings(file for file in files if file.kind == "python" and not _is_test(file.key))
    prose += [file._replace(kind="RedPajamaGithub") for file in files if _share(file.key, "github") < GITHUB_SHARE]
    code = _limit(files, options.max_code_mb * 1e6)
    _write_slimpajama(out / "slimpajama", prose)
    _write_starcoder(out / "starcoderdata", code)
    (out / MARKER).write_text(
        json.dumps({"python": platform.python_version(), "max_code_mb": options.max_code_mb, "scale": options.scale})
        + "\n"
    )
    for name, texts in (("slimpajama", prose), ("starcoderdata", code)):
        megabytes = sum(len(text.text) for text in texts) / 1e6
        print(f"{out / name}: {len(texts):,} documents, {megabytes:.1f} MB of text")


def _make_room(out: Path) -> None:
    """Take away an earlier demonstration, whose files may have other names; never anybody's real data."""
    folders = [out / name for name in ("slimpajama", "starcoderdata") if (out / name).exists()]
    if folders and not (out / MARKER).is_file():
        raise ValueError(f"{folders[0]} exists and was not made by data-prep demo; give another --out")
    for folder in folders:
        shutil.rmtree(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()  # before the first file, so that a run that was stopped can be repeated


# --- what CPython ships ----------------------------------------------------------------------------------------------


def _topics() -> Iterator[Text]:
    """The language reference as `help()` shows it: some 80 chapters."""
    for name, text in sorted(topics.items()):
        yield Text("RedPajamaBook", f"topics/{name}", text)


def _library_files() -> list[Text]:
    """The files of the standard library that are UTF-8 text in one of LANGUAGES, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix not in LANGUAGES or _SKIPPED_FOLDERS.intersection(parts) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue
        if text:
            found.append(Text(LANGUAGES[path.suffix], "/".join(parts), text))
    return found


def _docstrings(files: Iterator[Text]) -> Iterator[Text]:
    """One document a module: its docstring, then those of its classes and functions under their names."""
    for file in files:
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):  # lib2to3 and test data hold files that are no valid Python 3
            continue
        module = file.key.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        sections = list(_sections(tree, module))
        if sections:
            kind = "RedPajamaStackExchange" if len(sections) > 1 else "RedPajamaWikipedia"
            yield Text(kind, f"docstrings/{module}", "\n\n".join(sections))


def _sections(node: ast.AST, name: str) -> Iterator[str]:
    """The docstring of a module, class or function under its dotted name, then those inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n\n{docstring}"
        for child in node.body:
            yield from _sections(child, f"{name}.{getattr(child, 'name', '')}")


def _is_test(key: str) -> bool:
    return bool(_TEST_FOLDERS.intersection(key.split("/")))


def _limit(files: list[Text], max_bytes: float) -> list[Text]:
    """As many files as fit: the library itself before its tests, and within each a selection spread over everything."""
    taken: list[Text] = []
    size = 0
    for file in sorted(files, key=lambda file: (_is_test(file.key), _share(file.key, "limit"))):
        size += len(file.text.encode())
        if size > max_bytes and taken:
            break
        taken.append(file)
    return sorted(taken)


def _share(key: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the arguments alone: below s for a share s of all keys."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}\0{key}".encode(), digest_size=4).digest(), "little") / 2**32


# --- how the publishers lay it out -----------------------------------------------------------------------------------


def _write_slimpajama(root: Path, texts: list[Text]) -> None:
    """Shuffled as the original is, so that every file has documents of every set."""
    shuffled = sorted(texts, key=lambda text: (_share(text.key, f"shuffle {text.kind}"), text.key))
    held_out = [text for text in shuffled if _share(text.key, f"validation {text.kind}") < VALIDATION_SHARE]
    validation = held_out or shuffled[:1]  # a miniature still has a validation set
    elsewhere = set(validation)
    train = [text for text in shuffled if text not in elsewhere]
    for n in range(TRAIN_FILES):
        _write_jsonl(root / "train" / "chunk1" / f"example_train_{n}.jsonl.zst", train[n::TRAIN_FILES])
    _write_jsonl(root / "validation" / "chunk1" / "example_holdout_0.jsonl.zst", validation)


def _write_jsonl(path: Path, texts: list[Text]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for text in texts:
            record = {"text": text.text, "meta": {"redpajama_set_name": text.kind}}
            stream.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def _write_starcoder(root: Path, texts: list[Text]) -> None:
    """A folder a language; Python in four files, the small ones in one."""
    for language in sorted({text.kind for text in texts}):
        documents = [text for text in texts if text.kind == language]
        count = TRAIN_FILES if len(documents) >= TRAIN_FILES else 1
        (root / language).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            part = documents[n::count]
            table = pa.table(
                {
                    "max_stars_repo_path": [text.key for text in part],
                    "max_stars_repo_name": ["python/cpython"] * len(part),
                    "id": [str(n + i * count) for i in range(len(part))],
                    "content": [text.text for text in part],
                }
            )
            pq.write_table(table, root / language / f"train-{n:05d}-of-{count:05d}.parquet", row_group_size=256)
