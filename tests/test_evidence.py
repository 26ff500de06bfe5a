"""`python -m ntops_mla evidence`: a good file is merged, a bad one changes nothing. Vendors' lanes on fake boards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ntops_mla import checkout, evidence, support_table
from ntops_mla.__main__ import main
from ntops_mla.platform import all_platforms, look_for
from tests.fakes import vendor_board

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "tests" / "fakes" / "site"
BOARDS = {show.platform: board for board, show in reversed(vendor_board.BOARDS.items())}  # a platform's first
VENDORS = sorted(name for name, platform in all_platforms().items() if platform.limits)
GOOD = {
    "format": 1,
    "platform": "metax",
    "board": "MetaX C550",
    "driver": "2.14.6",
    "triton_target": "maca:80",
    "versions": {"torch": "2.4.0", "triton": None},
    "date": "2026-01-02T03:04:05Z",
    "commit": "abc1234",
    "simulated": False,
    "interpreted": False,
    "kernels": [{"op": "rope", "dtype": "bfloat16", "works": True, "reason": ""}],
    "tests": {"tests": 5, "failures": 0, "errors": 0, "skipped": 0},
    "attention": {"passed": True, "rows": []},
    "benchmarks": ["benchmarks/metax-c550/launch_overhead.json"],
    "steps": {"preflight": 0},
}
README = f"# A project\n\n{support_table.BEGIN}\nold\n{support_table.END}\n\nthe end\n"


@pytest.fixture
def root(tmp_path):
    """A checkout with a README and nothing else."""
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture
def sent(tmp_path):
    """Lays an evidence file with its figures down, as one unpacks a lane's artifact."""

    def lay(name="sent", **change):
        folder = tmp_path / name
        figures = folder / "benchmarks" / "metax-c550" / "launch_overhead.json"
        figures.parent.mkdir(parents=True)
        figures.write_text('{"us": 1}\n')
        path = folder / "evidence.json"
        path.write_text(json.dumps({**GOOD, **change}))
        return path

    return lay


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_good_file_is_merged(root, sent):
    (path,) = evidence.add([sent()], root)
    assert path == root / "benchmarks" / "results" / "metax-c550" / "evidence.json"
    stored = json.loads(path.read_text())
    assert stored == {**GOOD, "benchmarks": ["launch_overhead.json"]}
    assert (path.parent / "launch_overhead.json").read_text() == '{"us": 1}\n'
    readme = (root / "README.md").read_text()
    assert readme.startswith("# A project\n") and readme.endswith("\n\nthe end\n") and "\nold\n" not in readme
    (row,) = [line for line in readme.splitlines() if line.startswith("| MetaX | `rope`")]
    assert row == "| MetaX | `rope` | MetaX C550 2026-01-02 | nothing yet | nothing yet |"
    before = content(root)
    evidence.add([path], root)  # what is stored can be added again
    assert content(root) == before


def test_several_boards_at_once(root, sent):
    other = sent("other", board="MetaX C500", benchmarks=[])
    paths = evidence.add([sent(), other], root)
    assert [path.parent.name for path in paths] == ["metax-c550", "metax-c500"]
    assert "MetaX C500 2026-01-02; MetaX C550 2026-01-02" in (root / "README.md").read_text()


BAD = {
    "format": [2, None, "1"],
    "platform": ["tpu", None, "muxi", ["metax"]],
    "board": ["", 5],
    "driver": [5],
    "triton_target": [80],
    "versions": [None, {"torch": 2}],
    "date": ["yesterday", "2026-01-02", "2026-13-02T03:04:05Z", "9999-01-02T03:04:05Z", None],
    "commit": ["", None],
    "simulated": [None, "no", 0],
    "interpreted": [None],
    "kernels": [
        None,
        [{"op": "rope", "dtype": "bfloat16", "works": True}],
        [{"op": "rope", "dtype": "bfloat17", "works": True, "reason": ""}],
        [{"op": "rope", "dtype": "bfloat16", "works": "yes", "reason": ""}],
        [{"op": "rope", "dtype": "bfloat16", "works": 1, "reason": ""}],
    ],
    "tests": [[], {"tests": 5}, {**GOOD["tests"], "failures": -1}, {**GOOD["tests"], "failures": True}],
    "attention": [True, {"passed": "yes", "rows": []}, {"passed": True}],
    "benchmarks": [
        None,
        ["launch_overhead.py"],
        ["../launch_overhead.json"],
        ["/tmp/x.json"],
        ["a/x.json", "b/x.json"],
        ["a/check.json"],
        ["evidence.json"],
        ["missing.json"],
    ],
    "steps": [None, {"preflight": "0"}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_field_is_named_and_nothing_written(root, sent, field, value):
    before = content(root)
    with pytest.raises(ValueError, match=rf"evidence\.json: {field}: "):
        evidence.add([sent(**{field: value})], root)
    assert content(root) == before


def test_every_field_is_checked():
    assert set(BAD) == set(GOOD) == set(evidence._FIELDS)


def test_all_that_is_bad_is_named_at_once(root, sent):
    path = sent(commit="", tests=3, colour="red")
    data = json.loads(path.read_text())
    del data["steps"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as raised:
        evidence.add([path], root)
    for said in (
        "steps: missing",
        "colour: no such field",
        "commit: a text is needed, got ''",
        "tests: null or numbers",
    ):
        assert said in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_what_is_no_evidence_at_all(root, tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: (cannot be read|an object is needed)"):
        evidence.add([path], root)
    with pytest.raises(ValueError, match=r"y\.json: cannot be read"):
        evidence.add([tmp_path / "y.json"], root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"simulated": True}, "simulated: it was run on a fake board"),
        ({"interpreted": True}, "interpreted: its kernels ran in Triton's interpreter"),
        ({"platform": "cpu"}, "platform: cpu is no accelerator"),
        ({"board": None}, "board: the lane found no device"),
        ({"kernels": []}, "kernels: empty"),
    ],
)
def test_what_shows_nothing_of_hardware_is_refused(root, sent, change, message):
    before = content(root)
    with pytest.raises(ValueError, match=message):
        evidence.add([sent("good", board="MetaX C500"), sent(**change)], root)  # nor is the good one written
    assert content(root) == before


def test_an_older_run_does_not_take_the_place_of_a_newer_one(root, sent):
    evidence.add([sent()], root)
    before = content(root)
    with pytest.raises(ValueError, match=r"date: 2026-01-01.* is older than 2026-01-02"):
        evidence.add([sent("old", date="2026-01-01T23:59:59Z")], root)
    assert content(root) == before
    evidence.add([sent("new", date="2026-01-03T00:00:00Z")], root)
    assert "MetaX C550 2026-01-03" in (root / "README.md").read_text()


def test_two_runs_of_one_board_are_one_too_many(root, sent):
    with pytest.raises(ValueError, match="MetaX C550 twice"):
        evidence.add([sent(), sent("again")], root)
    assert content(root) == {"README.md": README.encode()}


def test_a_readme_without_marks_is_left_alone(root, sent):
    (root / "README.md").write_text("# A project\n")
    with pytest.raises(ValueError, match=r"README\.md: the mark"):
        evidence.add([sent()], root)
    assert content(root) == {"README.md": b"# A project\n"}


def test_the_command(root, sent, monkeypatch, capsys):
    monkeypatch.setattr(checkout, "root", lambda: root)
    assert main(["evidence", "table", "--check"]) == 1
    assert "evidence table writes it anew" in capsys.readouterr().out
    assert (root / "README.md").read_text() == README
    assert main(["evidence", "table"]) == 0 and main(["evidence", "table", "--check"]) == 0
    assert main(["evidence", "add", str(sent())]) == 0 and main(["evidence", "table", "--check"]) == 0
    assert "metax-c550" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["evidence", "add", str(sent("fake", simulated=True))])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "simulated" in line and line.startswith("python -m ntops_mla evidence: error: ")


# --- what a lane leaves ---

JUNIT = """<?xml version="1.0"?><testsuites><testsuite tests="4" failures="1" errors="0" skipped="1"/></testsuites>"""
MACHINE = {
    "ntops_mla": "0.1.0",
    "ninetoothed": "0.26.0",
    "python": "3.10.12",
    "os": "Linux",
    "torch": {"version": "2.4.0", "maca": "2.31"},
    "triton": {"version": "3.0.0 (triton)", "place": "/x"},
    "platform": {"name": "metax", "reason": ""},
    "device": {"name": "MetaX C550", "triton_target": "maca:80", "driver": "2.14.6"},
}


@pytest.fixture
def lane(tmp_path, monkeypatch):
    """The folder of a lane that ran."""
    monkeypatch.delenv(evidence.SIMULATED, raising=False)
    folder = tmp_path / "lane"
    figures = folder / "benchmarks" / "metax-c550"
    figures.mkdir(parents=True)
    for name in ("launch_overhead", "check"):
        (figures / f"{name}.json").write_text("{}")
    rows = [{**row, "seconds": 1.5} for row in GOOD["kernels"]]  # as the doctor writes them
    (folder / "gates.json").write_text(json.dumps({"kernels": rows}))
    (folder / "test-results.xml").write_text(JUNIT)
    attention = {
        "config": "a",
        "dtype": "bfloat16",
        "warmups": 10,
        "runs": 100,
        "rows": [{"latency_ms": 1.0}],
        "seed": 3,
    }
    (folder / "attention.json").write_text(json.dumps(attention))
    (folder / "steps.txt").write_text("preflight 0\ndoctor 0\ntests 1\nattention 0\n")
    return folder


def test_what_a_lane_left_is_collected(lane):
    found = evidence.collect("metax", lane, MACHINE)
    assert not evidence.problems(found) and evidence.refusal(found) is None
    assert found["board"] == "MetaX C550" and found["driver"] == "2.14.6" and found["triton_target"] == "maca:80"
    assert found["versions"]["torch"] == "2.4.0" and found["versions"]["maca"] == "2.31"
    assert found["kernels"] == GOOD["kernels"]
    assert found["tests"] == {"tests": 4, "failures": 1, "errors": 0, "skipped": 1}
    assert found["attention"]["passed"] is True and found["attention"]["rows"] == [{"latency_ms": 1.0}]
    assert found["benchmarks"] == GOOD["benchmarks"]
    assert found["steps"] == {"preflight": 0, "doctor": 0, "tests": 1, "attention": 0}
    assert MACHINE["torch"]["version"]  # nothing was taken out of what was handed in


def test_a_failed_attention_test_is_no_pass(lane):
    (lane / "steps.txt").write_text("preflight 0\nattention 1\n")
    assert evidence.collect("metax", lane, MACHINE)["attention"]["passed"] is False


def test_an_empty_folder_is_collected_too(tmp_path):
    found = evidence.collect("metax", tmp_path, {**MACHINE, "platform": {"name": "cpu", "reason": ""}})
    assert not evidence.problems(found)
    assert found["board"] is None and "board" in evidence.refusal(found)


@pytest.mark.parametrize("name", ["gates.json", "attention.json", "test-results.xml"])
def test_what_a_step_left_half_written_counts_as_nothing(lane, name):
    (lane / name).write_text("{")
    found = evidence.collect("metax", lane, MACHINE)
    assert not evidence.problems(found)
    assert not found[{"gates.json": "kernels", "attention.json": "attention", "test-results.xml": "tests"}[name]]


def test_a_fake_board_is_called_one(lane, monkeypatch):
    monkeypatch.setenv(evidence.SIMULATED, "metax")
    assert "simulated" in evidence.refusal(evidence.collect("metax", lane, MACHINE))


def test_collect_needs_a_folder(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["evidence", "collect", "--platform", "metax", str(tmp_path / "nothing")])
    assert stopped.value.code == 2 and "argument FOLDER" in capsys.readouterr().err


# --- whole lanes ---


def ci(tmp_path, platform, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "ci.sh"), platform, "--output", str(tmp_path)],
        env={**os.environ, "NTOPS_MLA_DIRECT_PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_lane_without_its_device_fails(tmp_path):
    absent = next(name for name in VENDORS if look_for(name).device is None)
    done = ci(tmp_path, absent)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"no {all_platforms()[absent].title} device" in done.stdout
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert found["steps"] == {"preflight": 1} and found["board"] is None


@pytest.mark.slow
@pytest.mark.parametrize("vendor", BOARDS)
def test_a_vendors_lane_on_its_fake_board(vendor, tmp_path):
    done = ci(tmp_path, vendor, NTOPS_MLA_TEST_BOARD=BOARDS[vendor], PYTHONPATH=str(SITE))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    path = tmp_path / "evidence.json"
    found = json.loads(path.read_text())
    assert found["platform"] == vendor and found["board"] and found["simulated"] is True
    assert not any(found["steps"].values()) and found["attention"]["passed"]
    assert found["tests"]["tests"] > found["tests"]["skipped"] and not found["tests"]["failures"]
    assert any(row["works"] for row in found["kernels"]) and not any(row["works"] is False for row in found["kernels"])
    with pytest.raises(ValueError, match="simulated"):
        evidence.read(path)
