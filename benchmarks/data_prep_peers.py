"""How others tokenise the same files: the usual way, datatrove and litdata, each as its documentation shows.

    python benchmarks/data_prep_peers.py WAY INPUT TOKENIZER OUT WORKERS

WAY is usual, datatrove or litdata; INPUT a folder of *.jsonl.zst or *.parquet; TOKENIZER a folder with tokenizer.model
and tokenizer.json; OUT an empty folder. Prints the number of tokens as JSON. EOS after each document everywhere.
"""

import io
import json
import sys
from array import array
from collections.abc import Iterator
from functools import cache
from multiprocessing import Pool
from pathlib import Path


def files_of(folder: Path) -> list[Path]:
    """The input files, sorted."""
    return sorted([*folder.rglob("*.jsonl.zst"), *folder.rglob("*.parquet")])


def texts_of(file: Path) -> Iterator[str]:
    """The documents of a file as scripts usually read them."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield from pq.read_table(file, columns=["content"])["content"].to_pylist()
        return
    import zstandard

    with open(file, "rb") as raw:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8"):
            yield json.loads(line)["text"]


@cache
def processor(tokenizer: str):
    """The SentencePiece model, once a process."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=f"{tokenizer}/tokenizer.model")


def usual_file(job: tuple[Path, str, Path]) -> int:
    """One file, one document after the other: json.loads, encode, append to an array."""
    file, tokenizer, target = job
    sp, tokens = processor(tokenizer), array("H")
    for text in texts_of(file):
        tokens.extend(sp.encode(text))
        tokens.append(sp.eos_id())
    target.write_bytes(tokens.tobytes())
    return len(tokens)


def usual(folder: Path, tokenizer: str, out: Path, workers: int) -> int:
    """One process a core, a file at a time."""
    jobs = [(file, tokenizer, out / f"{file.name}.bin") for file in files_of(folder)]
    with Pool(workers) as pool:
        return sum(pool.imap_unordered(usual_file, jobs))


def datatrove(folder: Path, tokenizer: str, out: Path, workers: int) -> int:
    """Its LocalPipelineExecutor, a reader and DocumentTokenizer without the shuffling."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    parquet = files_of(folder)[0].suffix == ".parquet"
    reader = ParquetReader(str(folder), text_key="content") if parquet else JsonlReader(str(folder))
    writer = DocumentTokenizer(
        str(out / "tokens"), f"{tokenizer}/tokenizer.json", eos_token="</s>", shuffle_documents=False
    )
    LocalPipelineExecutor(
        pipeline=[reader, writer], tasks=len(files_of(folder)), workers=workers, logging_dir=str(out / "logs")
    ).run()
    return sum(path.stat().st_size for path in (out / "tokens").glob("*.ds")) // 2


def litdata_file(file: str, tokenizer: str):
    """What litdata's optimize calls for each file: a tensor of ids a document."""
    import torch

    sp = processor(tokenizer)
    for text in texts_of(Path(file)):
        yield torch.tensor([*sp.encode(text), sp.eos_id()], dtype=torch.int32)


def litdata(folder: Path, tokenizer: str, out: Path, workers: int) -> int:
    """Its optimize with the TokensLoader, chunks of 2049 * 8192 tokens, as litgpt prepares SlimPajama."""
    from functools import partial

    from litdata import TokensLoader, optimize

    optimize(
        fn=partial(litdata_file, tokenizer=tokenizer),
        inputs=[str(file) for file in files_of(folder)],
        output_dir=str(out / "chunks"),
        num_workers=workers,
        chunk_size=2049 * 8192,
        item_loader=TokensLoader(block_size=2049),
    )
    index = json.loads((out / "chunks" / "index.json").read_text())
    return sum(chunk["dim"] for chunk in index["chunks"])


if __name__ == "__main__":
    way, folder, tokenizer, out, workers = sys.argv[1:]
    tokens = {"usual": usual, "datatrove": datatrove, "litdata": litdata}[way](
        Path(folder), tokenizer, Path(out), int(workers)
    )
    print(json.dumps({"tokens": tokens}))
