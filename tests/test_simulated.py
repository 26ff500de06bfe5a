"""Vendors' boards that are not there, each in a process of its own: see tests/fakes/vendor_board.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.vendor_board import BOARDS

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("board", BOARDS)
def test_simulated(board):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NTOPS_MLA_")}
    environment["NTOPS_MLA_TEST_BOARD"] = board
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "tests" / "fakes" / "site", ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=short", "-q", "-p", "no:cacheprovider", "tests/simulated"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
