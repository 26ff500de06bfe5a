"""docs/performance.md: made of the runs' files alone, current, and honest about what is not there."""

from __future__ import annotations

import copy
import json
import re

import pytest

import performance_report
from bench_rows import advice, record, report

HEAD = {
    "format": record.FORMAT, "date": "2026-01-02T03:04:05Z", "commit": "abc1234", "board": "Toy T1",
    "platform": "nvidia", "device": "toy:0", "interpreted": False, "simulated": False, "driver": "1.2",
    "versions": {"torch": "2.9", "triton": "3.6"}, "dtype": "bfloat16", "size": "device", "seed": 1, "runs": 50,
    "clock": "events", "load": 0.1, "left_out": [],
    "ceilings": {"copy_tb_per_s": 4.0, "copy_bytes": 1, "matmul_tflop_per_s": 800.0, "matmul_rows": 1},
}  # fmt: skip


def row(op, case, implementation, timed, ms, **changes):
    """A timed row; TB/s and the rest as runner.rates would have them, for 10^9 bytes and 2 * 10^9 FLOP."""
    made = dict.fromkeys(record.FIELDS)
    made.update(
        op=op, case=case, groups=[], params={}, implementation=implementation, timed=timed, status="timed", ms=ms,
        ms_low=0.9 * ms, ms_high=1.1 * ms, runs=50, flop=2 * 10**9, bytes=10**9, tb_per_s=1 / ms, tflop_per_s=2 / ms,
        share_of_copy=0.25 / ms, share_of_matmul=0.0025 / ms, bound="memory", share_of_bound=0.25 / ms, max_error=1e-4,
        cos_diff=1e-6, checked="2 of 128 requests",
    )  # fmt: skip
    made.update(changes)
    return made


OURS = {"backend": "kernel"}
LENGTH = {"groups": ["length"], "params": {"context": 1024}}
BOTH = {"groups": ["length", "batch"], "params": {"context": 1024}}
DECODE = ("decode", "b1-k1024")
ROWS = [
    row(*DECODE, "ntops_mla", "kernel", 0.5, note="splits 8", **LENGTH, **OURS),
    row(*DECODE, "ntops_mla", "kernel + combine", 0.7, **LENGTH, **OURS),
    row(*DECODE, "ntops_mla", "whole call", 1.0, **BOTH, **OURS),
    row(*DECODE, "ntops_mla", "graph replay", 0.8, **LENGTH, **OURS),
    row(*DECODE, "flash_mla", "whole call", 0.4, peak_bytes=2_000_000, **LENGTH),
    row(*DECODE, "ntops_mla", "kernel", 0.45, tile={"block_h": 16, "num_warps": 8}, **OURS),
    row(*DECODE, "ntops_mla", "kernel", 0.9, tile={"block_h": 32, "num_warps": 8}, **OURS),
    row("append", "t128", "ntops_mla", "whole call", 0.01, **OURS),
    row("append", "t128", "unfused", "whole call", 0.04, note="six calls", **OURS),
    row("parts", "r1-decode", "ntops_mla", "whole call", 3.0, part="mla_decode", flop=None, bytes=None, bound=None),
    row("parts", "r1-decode", "ntops_mla", "whole call", 1.0, part="o_proj", flop=None, bytes=None, bound=None),
    row("parts", "r1-decode", "torch", "whole call", 3.2, part="its products alone", flop=None, bytes=None, bound=None),
]


def put(folder, name, rows=ROWS, **head):
    """A run's file."""
    data = {**copy.deepcopy(HEAD), **head, "rows": copy.deepcopy(rows)}
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return data


def made(tmp_path, capsys) -> str:
    """The report of tmp_path/results."""
    flags = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs" / "performance.md")]
    (tmp_path / "results").mkdir(exist_ok=True)
    assert performance_report.main(flags) == 0, capsys.readouterr().err
    assert performance_report.main([*flags, "--check"]) == 0  # the same once more: nothing in it depends on the day
    return (tmp_path / "docs" / "performance.md").read_text()


def part(text: str, title: str) -> str:
    """What stands below a heading, up to the next one."""
    assert f"# {title}\n" in text, title
    return re.split(r"\n#+ ", text.split(f"# {title}\n", 1)[1])[0]


def test_the_report_in_the_repository_is_current(capsys):
    assert performance_report.main(["--check"]) == 0, capsys.readouterr().err


def test_without_results_the_measured_parts_are_empty_and_say_so(tmp_path, capsys):
    text = made(tmp_path, capsys)
    assert part(text, "Accelerators").strip() == report.NO_BOARD
    assert part(text, "CPU").strip() == report.NO_CPU
    assert "## Runs" not in text and "###" not in text
    arithmetic = part(text, "MLA against MHA")
    assert "| DeepSeek-R1 | 128 | 1152 | 81920 | 71.1 |" in arithmetic
    assert "| DeepSeek-V2-Lite | 2176 | 640 | 262144 |" in arithmetic
    assert "| DeepSeek-R1 | 159 | 168 | 170 | 171 | 171 |" in arithmetic


def test_two_boards(tmp_path, capsys):
    results = tmp_path / "results"
    put(results, "toy-t1/bench.json")
    slower = [dict(copy.deepcopy(r), ms=2 * r["ms"]) for r in ROWS[:5]]
    put(results, "toy-t2/bench.json", slower, board="Toy T2", date="2026-05-06T00:00:00Z")
    (results / "toy-t1" / "latency.png").write_bytes(b"png")
    (results / "toy-t1" / "check.json").write_text("{}")  # no file of bench.py
    text = made(tmp_path, capsys)
    assert report.NO_BOARD not in text and report.NO_CPU in text
    assert "| toy-t1/bench.json | Toy T1 | 2026-01-02 | abc1234 | 1.2 | torch 2.9, triton 3.6 |" in text
    assert "| toy-t2/bench.json | Toy T2 | 2026-05-06 |" in text
    first, second = text.split("### Toy T2: toy-t2/bench.json")
    assert "![latency, Toy T1](../results/toy-t1/latency.png)" in first and "![" not in second
    step = part(first, "Where time goes in a step")
    assert "| r1-decode | mla_decode | 3 ms (2.7 ms to 3.3 ms) | 75% |" in step
    assert "| r1-decode | all parts over its products | 1.25 |  |" in step
    assert "#### Where time goes in a step" not in second  # no rows, no section
    line = "| decode b1-k1024 | ntops_mla (kernel) | whole call | 1 ms (900 us to 1.1 ms) | 1 | 2 | 25% memory |"
    assert line in part(first, "Over the length")
    assert "b1-k1024" in part(first, "Over the batch") and "#### Over the heads" not in text
    tiles = part(first, "Over tiles").strip().splitlines()[2:]
    assert [line.split(" | ")[1:] for line in tiles] == [
        ["block_h 16, num_warps 8", "450 us (405 us to 495 us)", "1.00 |"],
        ["block_h 32, num_warps 8", "900 us (810 us to 990 us)", "2.00 |"],
    ]
    assert "| decode | b1-k1024 | flash_mla | whole call | 2 M |" in part(first, "Peak memory")
    assert "| decode | b1-k1024 | ntops_mla (kernel) | 0.0001 | 1e-06 | 2 of 128 requests |" in part(
        first, "Error over the length"
    )
    fusions = part(first, "What each fusion brought")
    assert "| append | t128 | six calls | ntops_mla, whole call | 4.00 |" in fusions
    assert "| decode | b1-k1024 | the call's launches one by one | ntops_mla, graph replay | 1.25 |" in fusions
    assert "| decode | b1-k1024 | splitting: the join of the splits | ntops_mla, kernel | 1.40 |" in fusions
    assert "| decode b1-k1024 | flash_mla | 0.40 |" in part(first, "Beside others")


def test_a_cpus_run_stands_apart(tmp_path, capsys):
    put(tmp_path / "results", "cpu/bench.json", ROWS[2:3], platform="cpu", board="CPU, 2 cores", size="cpu")
    text = made(tmp_path, capsys)
    assert part(text, "Accelerators").strip() == report.NO_BOARD
    assert "no kernel: it says nothing of an accelerator" in part(text, "CPU")
    assert text.index("### CPU, 2 cores: cpu/bench.json") > text.index("## CPU")


@pytest.mark.parametrize(("load", "said"), [(1.6, True), (0.4, False), (None, False)])
def test_a_run_on_a_busy_machine_is_marked(tmp_path, capsys, load, said):
    put(tmp_path / "results", "cpu/bench.json", ROWS[2:3], platform="cpu", board="CPU", load=load, threads=2)
    assert ("Not to be relied on" in made(tmp_path, capsys)) is said


def test_failed_rows_and_missing_peers_are_shown(tmp_path, capsys):
    wrong = {"status": "mismatch", "reason": "3 of 4 | differ", "ms": None}
    failed = {**row("decode", "b9", "ntops_mla", "whole call", 1.0), **wrong}
    absent = {"op": "decode", "case": "b9", "implementation": "flashinfer", "timed": "whole call", "reason": "not here"}
    put(tmp_path / "results", "toy/bench.json", [failed, *ROWS], left_out=[absent, absent])
    text = made(tmp_path, capsys)
    assert "| decode | b9 | ntops_mla | whole call | mismatch | 3 of 4 \\| differ |" in part(text, "Failed")
    assert "| 13, 1 failed |" in text
    assert part(text, "Beside others").count("| flashinfer | decode | not here |") == 1


def test_recommendations_rest_on_figures():
    found = advice.recommendations(ROWS, on_cpu=False)
    assert found[0].startswith("In r1-decode, *mla_decode* takes 75% of the step (3 ms)")
    said = "\n".join(found)
    for words in (
        "flash_mla is 2.50 times as fast in decode b1-k1024",
        "decode b1-k1024 takes 1.25 times as long as its replay",
        "joining makes decode b1-k1024 1.40 times as long (splits 8)",
    ):
        assert words in said
    assert "ceiling" not in said  # its kernel reaches 50 %
    slow = [row("decode", "b2", "ntops_mla", "kernel", 1.0, **OURS)]
    assert "decode b2 reaches 25% of the memory ceiling (kernel)" in "\n".join(advice.recommendations(slow, False))
    by_torch = [{**slow[0], "backend": "reference"}]
    assert "PyTorch ran in place of a kernel in decode" in "\n".join(advice.recommendations(by_torch, on_cpu=False))
    assert advice.recommendations(by_torch, on_cpu=True) == advice.recommendations([], on_cpu=False)
    failed = [{**slow[0], "status": "error", "ms": None}]
    assert advice.recommendations(failed, True)[0].startswith("1 of 1 rows failed")
    many = [row("decode", f"b{i}", "ntops_mla", "kernel", 1.0 + i, **OURS) for i in range(8)]
    assert advice.recommendations(many, False)[-1] == "and 3 more cases of the same kind."


@pytest.mark.parametrize(
    ("head", "says"),
    [({"interpreted": True}, "interpreter"), ({"simulated": True}, "pretended"), ({"seed": "x"}, "seed")],
)
def test_a_run_that_shows_nothing_is_refused_and_the_report_stays(tmp_path, capsys, head, says):
    put(tmp_path / "results", "toy/bench.json", **head)
    output = tmp_path / "performance.md"
    output.write_text("before")
    assert performance_report.main(["--results", str(tmp_path / "results"), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert says in error and "bench.json" in error
    assert output.read_text() == "before"


def test_a_stale_report_is_status_1_and_stays(tmp_path, capsys):
    output = tmp_path / "performance.md"
    output.write_text("before")
    flags = ["--results", str(tmp_path), "--output", str(output), "--check"]
    assert performance_report.main(flags) == 1
    assert "is not current" in capsys.readouterr().err and output.read_text() == "before"


def test_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        performance_report.main(["--help"])
    assert leaving.value.code == 0 and "--check" in capsys.readouterr().out
