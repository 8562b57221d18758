"""Liger's Triton kernels on the CPU, through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_ligers_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    """A process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "agreement.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "16 cases agree\n"
