"""What benchmarks/dry_cuda.py says of the ranks' calls of NCCL; the rest of it needs a PyTorch for CUDA."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("dry_cuda", Path(__file__).parents[1] / "benchmarks" / "dry_cuda.py")
assert SPEC is not None
assert SPEC.loader is not None
dry_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dry_cuda)

GATHER, REDUCE = "all_gather in 2: 8 of type 9, op or root 0", "reduce_scatter in 2: 8 of type 7, op or root 0"


@pytest.mark.parametrize(
    ("other", "status", "said"),
    [
        ([GATHER, GATHER, REDUCE], 0, "3 calls of NCCL, the same on 2 ranks\n       2 all_gather in 2\n"),
        ([GATHER, REDUCE, GATHER], 1, f"collective 2: {GATHER!r} on rank 0, {REDUCE!r} on rank 1\n"),
        ([GATHER, GATHER], 1, f"collective 3: {REDUCE!r} on rank 0, None on rank 1\n"),
    ],
)
def test_ranks_that_would_not_have_met_are_told(
    other: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_cuda.compare([[GATHER, GATHER, REDUCE], other]) == status
    assert capsys.readouterr().out.startswith(said)


def test_no_calls_at_all_are_no_success() -> None:
    assert dry_cuda.compare([[], []]) == 1


@pytest.mark.parametrize("own", [[], ["--ranks", "2"], ["--nodes=1", "--ranks", "2"]])
def test_the_programs_options_are_not_ours(own: list[str]) -> None:
    program = ["-m", "pretrain", "bench", "--sweep", "--ranks", "4"]
    assert dry_cuda.split([*own, *program]) == (own, program)
