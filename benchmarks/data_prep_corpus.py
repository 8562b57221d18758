"""Text to time on: prose and code out of what CPython and the installed packages ship, no download, nobody's text kept.

    docstrings and text files of all packages --> WORK/prose/train/chunk1/*.jsonl.zst       SlimPajama's layout
    their Python files                        --> WORK/code/python/train-*.parquet          StarCoderData's layout

There is less prose than code. It is stretched by dealing its paragraphs out anew, into other documents: no document is
there twice, but its words are, which flatters encoders that remember words by a tenth or so. The result names the factor.
"""

import ast
import hashlib
import random
import shutil
import site
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

FILES = 16


def make(work: Path, megabytes: float) -> dict[str, float]:
    """Write both corpora, each of at most `megabytes` of text, unless they are there; gives the bytes of text of each."""
    marker = work / "corpus.json"
    if marker.is_file():
        return orjson.loads(marker.read_bytes())
    files = sorted(_files(), key=lambda path: hashlib.blake2b(str(path).encode()).digest())
    with ProcessPoolExecutor() as pool:
        code, prose = zip(*pool.map(_texts, files, chunksize=64))
    return write(work, _limit(prose, megabytes), _limit(code, megabytes), megabytes)


def write(work: Path, prose: list[str], code: list[str], megabytes: float) -> dict[str, float]:
    """Write the two corpora and the marker."""
    unique = sum(map(len, prose))
    prose = stretch(prose, megabytes)
    sizes = {
        "prose": _write_prose(work / "prose" / "train" / "chunk1", prose),
        "code": _write_code(work / "code" / "python", code),
        "times_each_paragraph_of_prose": round(sum(map(len, prose)) / unique, 1),
    }
    (work / "corpus.json").write_bytes(orjson.dumps(sizes))
    return sizes


def few(work: Path) -> Path:
    """A folder like `work` with a few documents in each corpus and the same tokenizer."""
    folder, texts = work / "few", [f"One of a few documents, number {n}.\n" for n in range(FILES)]
    _write_prose(folder / "prose" / "train" / "chunk1", texts)
    _write_code(folder / "code" / "python", texts)
    shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    return folder


def stretch(texts: list[str], megabytes: float) -> list[str]:
    """`texts`, and more of the same paragraphs in other documents until there are `megabytes` of them."""
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    shuffler, stretched, size = random.Random(0), list(texts), sum(map(len, texts))
    while size < megabytes * 1e6:
        shuffler.shuffle(paragraphs)
        rest = iter(paragraphs)
        for text in texts:
            if size >= megabytes * 1e6:
                break
            stretched.append("\n\n".join(islice(rest, text.count("\n\n") + 1)))
            size += len(stretched[-1])
    shuffler.shuffle(stretched)
    return [text for text in stretched if text]  # data-prep drops empty documents, the usual way does not


def _files() -> Iterator[Path]:
    roots = {Path(sysconfig.get_paths()["stdlib"]), *map(Path, site.getsitepackages())}
    for root in roots:
        for suffix in ("*.py", "*.pyi", "*.md", "*.rst", "*.txt"):
            yield from (path for path in root.rglob(suffix) if path.is_file())


def _texts(path: Path) -> tuple[str, str]:
    """A file's code and its prose."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return "", ""
    if path.suffix not in (".py", ".pyi"):
        return "", text
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return text, ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return text, "\n\n".join(docstring for docstring in found if docstring)


def _limit(texts: tuple[str, ...], megabytes: float) -> list[str]:
    """Each text once, as many as fit."""
    taken, size = [], 0.0
    for text in dict.fromkeys(texts):
        if text and size < megabytes * 1e6:
            taken.append(text)
            size += len(text.encode())
    return taken


def _write_prose(folder: Path, texts: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(FILES):
        lines = (
            orjson.dumps(
                {"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}, option=orjson.OPT_APPEND_NEWLINE
            )
            for text in texts[n::FILES]
        )
        (folder / f"example_train_{n}.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines)))
    return sum(len(text.encode()) for text in texts)


def _write_code(folder: Path, texts: list[str]) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(FILES):
        table = pa.table({"content": texts[n::FILES]})
        pq.write_table(table, folder / f"train-{n:05d}-of-{FILES:05d}.parquet", row_group_size=1000)
    return sum(len(text.encode()) for text in texts)
