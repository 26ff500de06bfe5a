"""README's support table says what the platforms' files and the evidence say, and claims no more."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from ntops_mla import evidence, support_table
from ntops_mla.platform import Gate, all_platforms, get_platform

ROOT = Path(__file__).resolve().parent.parent
GOOD = {
    "triton": "3.6.0",
    "interpreted": {"rope": {"passed": 3, "failed": 0}},
    "compiled": [{"platform": "nvidia", "op": "rope", "dtype": "bfloat16", "stand_in": False, "problems": []}],
}
TESTS = {"tests": 5, "failures": 0, "errors": 0, "skipped": 1}
RUN = {
    "platform": "nvidia",
    "board": "NVIDIA H200",
    "date": "2026-01-02T03:04:05Z",
    "kernels": [{"op": "rope", "dtype": "bfloat16", "works": True, "reason": ""}],
    "tests": TESTS,
}


def test_the_readme_is_current():
    """A platform's file, or an op's, may come before its rows: those of one that is not shown at all are not missed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {cells(line)[:2] for line in text.splitlines() if line.startswith("| ")}
    new = [line for line in evidence.readme(ROOT).splitlines() if not line.startswith("| ") or cells(line)[:2] in shown]
    assert new == text.splitlines(), "run python -m ntops_mla evidence table"


def cells(line):
    return tuple(cell.strip() for cell in line.strip("|").split("|"))


def cell(found, platform="nvidia", boards=(), runs=()):
    return support_table.cell(get_platform(platform), "rope", torch.bfloat16, found, boards, runs)


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


def test_a_lane_that_ran_on_a_board_is_named_with_its_date():
    assert cell([], runs=[RUN]) == "NVIDIA H200 2026-01-02"
    assert cell([GOOD], runs=[RUN]) == "numerics; compiled 3.6; NVIDIA H200 2026-01-02"
    assert cell([], runs=[{**RUN, "platform": "moore"}]) == "nothing yet"


@pytest.mark.parametrize(
    "change",
    [
        {"kernels": []},
        {"kernels": [{**RUN["kernels"][0], "works": None}]},
        {"kernels": [{**RUN["kernels"][0], "op": "rms_norm"}]},
        {"kernels": [{**RUN["kernels"][0], "dtype": "float16"}]},
        {"tests": None},
        {"tests": {**TESTS, "failures": 1}},
        {"tests": {**TESTS, "errors": 1}},
        {"tests": {**TESTS, "skipped": 5}},
    ],
)
def test_a_lane_claims_no_more_than_it_ran(change):
    assert cell([], runs=[{**RUN, **change}]) == "nothing yet"


def test_a_kernel_that_is_broken_on_a_board_is_said_to_be():
    broken = [{**RUN["kernels"][0], "works": False, "reason": "the process was ended by SIGSEGV"}]
    assert cell([], runs=[{**RUN, "kernels": broken}]) == "broken on NVIDIA H200 2026-01-02"


def test_a_reference_gate_is_pytorch(monkeypatch):
    platform = get_platform("nvidia")
    monkeypatch.setattr(type(platform), "gate", lambda *args: Gate("reference", "this test says so"))
    assert cell([GOOD]) == "PyTorch"


def test_without_a_board_the_table_says_so():
    nothing = "No kernel has been run on hardware yet."
    text = support_table.table([GOOD], [], [])
    assert nothing in text and nothing not in support_table.table([GOOD], [], [RUN])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    titles = {platform.title for platform in all_platforms().values() if platform.limits}
    assert {re.split(r" *\| *", line)[1] for line in rows} == {"platform", *titles}


def test_what_has_changed_since_it_was_tried_is_named(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    kernel = tmp_path / "kernels" / "mla_decode.py"
    kernel.write_text("tried")
    found = [{**GOOD, "sources": support_table.fingerprints(tmp_path)}]
    assert support_table.changed(tmp_path, found) == []
    assert "Changed since" not in support_table.table(found, [], [], [])
    kernel.write_text("changed")
    (tmp_path / "kernels" / "new.py").write_text("which nobody has tried: its own rows say so")
    metax = get_platform("metax")
    fewer = {**all_platforms(), "metax": dataclasses.replace(metax, tiles=metax.tiles[1:])}
    monkeypatch.setattr(support_table, "all_platforms", lambda: fewer)
    since = support_table.changed(tmp_path, found)
    assert since == ["kernels/mla_decode.py", "tiles of metax"]
    said = "Changed since numerics and compilation were tried: kernels/mla_decode.py, tiles of metax."
    assert said in support_table.table(found, [], [], since)


def test_the_table_goes_between_its_marks():
    begin, end = support_table.BEGIN, support_table.END
    assert support_table.written(f"a\n{begin}\nold\n{end}\nb", "new") == f"a\n{begin}\nnew\n{end}\nb"
    with pytest.raises(ValueError, match=r"README\.md: the mark .*end"):
        support_table.written(f"a\n{begin}\nold\n", "new")
