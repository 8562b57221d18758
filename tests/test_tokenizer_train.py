"""Training a tokenizer: Llama's kind, the same again, from a bounded sample of all files."""

from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from test_tokenizer import TRICKY, library_texts, small_model  # noqa: F401  small_model: a fixture

from data_prep import tokenizer_train
from data_prep.tokenizer import load


def test_training_makes_llamas_kind_again_and_again(small_model: Path) -> None:  # noqa: F811
    lines = (line for text in library_texts() for line in text.split("\n"))
    assert tokenizer_train.train(lines, 2000) == (small_model / "tokenizer.model").read_bytes()
    tokenizer = load(small_model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_model / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(2000)]
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert processor.pad_id() == -1
    assert "▁▁▁▁" in pieces
    assert not any("\n" in piece for piece in pieces)
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces if piece[0] != "<")
    for text in library_texts() + TRICKY:
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text.replace("▁", " ")


def test_the_sample_is_bounded_and_spread_over_the_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for n in range(4):
        texts = [f"{n}" * 100] * (1 if n == 0 else 50)
        pq.write_table(pa.table({"content": texts}), tmp_path / f"{n}.parquet")
    paths = sorted(tmp_path.iterdir())
    taken = list(tokenizer_train.sample(paths, 3100))
    assert [sum(text[0] == str(n) for text in taken) for n in range(4)] == [1, 10, 10, 10]
    assert len(list(tokenizer_train.sample(paths, 10**9))) == 151


def test_of_many_files_some_are_read_from_everywhere(tmp_path: Path) -> None:
    names = [f"{n % 10}/{n:04d}.{('parquet', 'jsonl.zst')[n % 2]}" for n in range(1000)]
    for name in (*names, "0/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    taken = [str(path.relative_to(tmp_path)) for path in tokenizer_train._files(tmp_path)]
    places = [sorted(names).index(name) for name in taken]
    assert (len(places), places[0]) == (256, 0)
    assert {after - before for before, after in pairwise([*places, 1000])} == {3, 4}
    (tmp_path / "1").rename(tmp_path / "few")
    assert len(tokenizer_train._files(tmp_path / "few")) == 100


def test_training_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nor a folder with one"):
        tokenizer_train.run(tokenizer_train.TokenizerOptions([str(tmp_path)], str(tmp_path), 1000))
    with pytest.raises(ValueError, match="vocab_size 100 is below 300"):
        tokenizer_train.run(tokenizer_train.TokenizerOptions([str(tmp_path)], str(tmp_path), 100))
    with pytest.raises(ValueError, match="smaller --vocab_size"):
        tokenizer_train.train(iter(["too little text"]), 5000)
