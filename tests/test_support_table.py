"""README's support table says what the platforms' files and the evidence say, and claims no more."""

import re
import subprocess
import sys
from pathlib import Path

import torch

import support_table
from ntops_mla.platform import Gate, get_platform

ROOT = Path(__file__).resolve().parent.parent
GOOD = {
    "triton": "3.6.0",
    "interpreted": {"rope": {"passed": 3, "failed": 0}},
    "compiled": [{"platform": "nvidia", "op": "rope", "dtype": "bfloat16", "stand_in": False, "problems": []}],
}


def test_the_readme_is_current():
    done = subprocess.run([sys.executable, "scripts/support_table.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python scripts/support_table.py"


def cell(found, platform="nvidia", boards=()):
    return support_table.cell(get_platform(platform), "rope", torch.bfloat16, found, list(boards))


def test_a_cell_claims_what_was_found():
    assert cell([GOOD]) == "numerics; compiled 3.6"
    assert cell([GOOD], "metax") == "numerics"
    stand_in = [{**GOOD["compiled"][0], "platform": "metax", "stand_in": True}]
    assert cell([{**GOOD, "compiled": stand_in}], "metax") == "numerics; stand-in 3.6"
    assert cell([]) == "nothing yet"


def test_a_failure_takes_the_claim_back():
    assert cell([{**GOOD, "interpreted": {"rope": {"passed": 3, "failed": 1}}}]) == "compiled 3.6"
    spoiled = [*GOOD["compiled"], {**GOOD["compiled"][0], "problems": ["spills 8 bytes"]}]
    assert cell([{**GOOD, "compiled": spoiled}]) == "numerics"


def test_hardware_is_named_with_its_date():
    tests = {"result": "passed", "date": "2026-01-02"}  # as scripts/gpu_check.sh writes it
    board = {"platform": "nvidia", "board": "NVIDIA H200", "parts": {"tests": tests}}
    assert cell([], boards=[board]) == "NVIDIA H200 2026-01-02"
    assert cell([], boards=[{**board, "parts": {"tests": {**tests, "result": "failed"}}}]) == "nothing yet"
    assert cell([], boards=[{**board, "platform": "moore"}]) == "nothing yet"


def test_a_reference_gate_is_pytorch(monkeypatch):
    platform = get_platform("nvidia")
    monkeypatch.setattr(type(platform), "gate", lambda *args: Gate("reference", "this test says so"))
    assert cell([GOOD]) == "PyTorch"


def test_without_a_board_the_table_says_so():
    assert "No kernel has been run on hardware yet." in support_table.table([GOOD], [])
    rows = [line for line in support_table.table([GOOD], []).splitlines() if line.startswith("| ")]
    assert len({re.split(r" *\| *", line)[1] for line in rows}) == 5  # the head and four platforms
