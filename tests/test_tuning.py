"""Tiles timed on a board: what is tried, what wins, and the table that a board prefers; boards in tests/simulated."""

import contextlib
import dataclasses
import inspect
import json
import os
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ntops_mla import child, dispatch, ops, tile_table, tuning, tuning_trial
from ntops_mla.__main__ import main
from ntops_mla.board import Board
from ntops_mla.cli import tune
from ntops_mla.findings import Finding, Findings
from ntops_mla.platform import Tile, all_platforms, get_platform
from ntops_mla.tuning import Candidate, Times
from tests.fakes.boards import Machine

ROOT = Path(__file__).resolve().parent.parent
BOARDS = [
    pytest.param(platform, limits, id=f"{platform.name}-{limits.arch}")
    for platform in all_platforms().values()
    for limits in platform.limits
]
DECODE = {
    "kernel": "mla_decode",
    "blocks": {"block_h": 16, "block_n": 64, "block_c": 512},
    "num_warps": 8,
    "num_stages": 1,
    "dtypes": ["bfloat16"],
    "when": {"rows": [1, 16], "latent": [512, 512]},
    "microseconds": 90.5,
    "spread": 1,
    "before": None,
    "load": {"batch": 64},
}
TABLE = {
    "platform": "nvidia",
    "device": "NVIDIA Test",
    "triton": "3.6.0+vendor",
    "date": "2026-01-01",
    "commit": "abc",
    "rows": [DECODE],
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write a table changed by a test, and name it in NTOPS_MLA_TILES; no other tables are there."""
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path / "shipped")

    def write(name="table.json", **changes):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**TABLE, **changes}))
        if "/" not in name:
            monkeypatch.setenv(tile_table.VARIABLE, str(path))
        return path

    return write


def here(platform="nvidia", device="NVIDIA Test", triton="3.6.1"):
    return tile_table.tiles_for(platform, device, triton)


# --- candidates ---


@pytest.mark.parametrize("dtype", tuning.DTYPES, ids=str)
@pytest.mark.parametrize("platform,limits", BOARDS)
def test_candidates_are_within_every_limit(platform, limits, dtype):
    board = Board(platform, limits, (3, 6))
    shared = limits.shared_memory.value
    tried = 0
    for case in tuning.cases([dtype]):
        plan = tuning.plan(board, case)
        gate = platform.gate(case.op, dtype)
        assert (plan.problem is None) == (gate.mode == "native"), plan.problem
        assert len(plan.tiles) <= 40 and len({str(tile) for tile in plan.tiles}) == len(plan.tiles)
        for tile in plan.tiles:
            tried += 1
            assert tile.kernel == case.kernel and set(tile.blocks) == set(tile_table.KERNELS[case.kernel].blocks)
            assert tile.num_warps <= (limits.max_warps.value or 32)
            if case.kernel in ("mla_decode", "mla_prefill"):
                sizes = [tile.blocks[name] for name in tile.blocks if name != "block_c"]
                assert min(sizes) >= (limits.least_product.value if limits.least_product else 16)
            if case.kernel == "mla_decode" and tile is not plan.own and shared:
                width = case.call["kv_lora_rank"] + case.call["rope"]
                assert tile.blocks["block_n"] * width * dtype.itemsize <= shared
        if plan.own is not None:
            own = platform.tile(case.kernel, limits.arch, dtype, (3, 6), **case.point)
            assert plan.own is plan.tiles[0] and tuning.tile_data(plan.own) == tuning.tile_data(own)
        for _, reason in plan.left_out:
            assert reason
    assert tried > 30


def test_reasons_for_what_is_left_out():
    nvidia, metax = get_platform("nvidia"), get_platform("metax")
    board = Board(nvidia, next(one for one in nvidia.limits if one.arch == "sm_90"), (3, 6))
    reasons = {reason for case in tuning.cases([torch.bfloat16]) for _, reason in tuning.plan(board, case).left_out}
    assert "64 rows, of which the call has 16" in reasons and "the accumulators are 256 registers a thread" in reasons
    small = Board(nvidia, next(one for one in nvidia.limits if one.arch == "sm_89"), (3, 6))
    decode = next(case for case in tuning.cases([torch.float32]) if case.kernel == "mla_decode")
    assert any("bytes of shared memory, and there are 101376" in why for _, why in tuning.plan(small, decode).left_out)
    unknown = Board(get_platform("iluvatar"), get_platform("iluvatar").limits[0], (3, 6))
    half = next(case for case in tuning.cases([torch.bfloat16]) if case.kernel == "mla_decode")
    assert not any("shared memory" in why for _, why in tuning.plan(unknown, half).left_out)
    assert any("there are 32768" in why for _, why in tuning.plan(unknown, half, shared_memory=32768).left_out)
    problem = tuning.plan(unknown, decode).problem
    assert problem.startswith("gate of iluvatar: reference: ")
    plan = tuning.plan(Board(metax, metax.limits[0], (3, 0)), half)
    assert plan.own is None and any("may end the process" in why for _, why in plan.left_out)


def test_a_doctors_findings_allow_what_is_refused_until_tried():
    metax = get_platform("metax")
    board = Board(metax, metax.limits[0], (3, 0), device="MetaX C550", triton_version="3.0.0")
    decode = next(case for case in tuning.cases([torch.bfloat16]) if case.kernel == "mla_decode")
    works = {("mla_decode", "bfloat16"): Finding(True, "")}
    found = Findings("metax", "MetaX C550", "3.0.0", "2026-01-01", works)
    plan = tuning.plan(board, decode, found)
    assert plan.own is plan.tiles[0] and plan.own.blocks["block_h"] == 16
    broken = dataclasses.replace(found, kernels={("mla_decode", "bfloat16"): Finding(False, "aborts")})
    assert "aborts" in tuning.plan(board, decode, broken).problem


def test_where_the_platform_has_no_tile_for_a_triton_others_are_tried():
    nvidia = get_platform("nvidia")
    board = Board(nvidia, nvidia.limits[0], (3, 1))
    prefill = next(case for case in tuning.cases([torch.bfloat16]) if case.kernel == "mla_prefill")
    plan = tuning.plan(board, prefill)
    assert board.tile("mla_prefill", torch.bfloat16, width=192) is None
    assert plan.own is None and plan.problem is None and plan.tiles


@pytest.mark.parametrize("name", tile_table.KERNELS)
def test_the_form_of_a_table_is_the_kernels(name):
    """Blocks are what premake takes; the sizes in `when` are those that the op asks a tile for."""
    blocks, sizes = tile_table.KERNELS[name]
    parameters = inspect.signature(import_module(f"ntops_mla.kernels.{name}").premake).parameters
    assert set(blocks) <= set(parameters)
    for platform in all_platforms().values():
        for tile in platform.tiles:
            assert tile.kernel != name or (set(tile.blocks) == set(blocks) and set(tile.when) <= set(sizes))
    asked = {}

    class Asked(Board):
        def tile(self, kernel, dtype, **sizes):
            asked[kernel] = set(sizes)
            return super().tile(kernel, dtype, **sizes)

    board = Asked(get_platform("nvidia"), get_platform("nvidia").limits[0], (3, 6))
    cases = [case for case in tuning.cases([torch.bfloat16]) if case.kernel == name]
    assert cases
    for case in cases:
        assert set(case.point) <= set(sizes)
        op = ops.get(case.op)
        args = tuning_trial.timed_call(case, tuning_trial.Load(), torch.device("meta"))
        op.check(*args)
        op.spec.tiles(board, *op.spec.key(*args))
        assert asked[name] == set(sizes)


def test_a_case_goes_to_a_child_and_back():
    case = next(case for case in tuning.cases([torch.float16]) if case.kernel == "mla_decode")
    back = tuning_trial.Case.from_data(json.loads(json.dumps(case.data())))
    assert vars(back) | {"ranges": None} == vars(case) | {"ranges": None} and back.when == case.when
    assert str(case) == "mla_decode float16, rows 1 to 16, latent 512, page_size 64, causal 0"
    assert [str(case) for case in tuning.cases([torch.float16]) if "rows from 33" in str(case)]


# --- the table ---


def test_a_table_is_preferred_and_the_platform_stands_behind_it(table):
    table()
    (tile,) = tiles = here()
    assert tile.dtypes == ("bfloat16",) and tile.when == {"rows": (1, 16), "latent": (512, 512)}
    assert "NVIDIA Test" in tile.source and "3.6.0" in tile.source and "2026-01-01" in tile.source
    nvidia = get_platform("nvidia")
    plain = Board(nvidia, nvidia.limits[0], (3, 6))
    board = dataclasses.replace(plain, tiles=tiles)
    sizes = {"rows": 16, "latent": 512, "page_size": 64, "causal": 0}
    assert board.tile("mla_decode", torch.bfloat16, **sizes) is tile
    for kernel, dtype, changed in (
        ("mla_decode", torch.float16, {}),
        ("mla_decode", torch.bfloat16, {"rows": 17}),
        ("mla_decode", torch.bfloat16, {"latent": 256}),
    ):
        asked = {**sizes, **changed}
        assert board.tile(kernel, dtype, **asked) is plain.tile(kernel, dtype, **asked) is not None
    assert board.tile("rms_norm", torch.bfloat16, width=512) is plain.tile("rms_norm", torch.bfloat16, width=512)


def test_a_tables_tile_is_within_the_limits_too(table):
    table(rows=[{**DECODE, "num_warps": 64}])
    nvidia, spec = get_platform("nvidia"), ops.get("mla_decode").spec
    board = Board(nvidia, nvidia.limits[0], (3, 6), tiles=here())
    key = spec.key(*ops.get("mla_decode").example(torch.device("meta"), torch.bfloat16))
    assert "64 warps" in dispatch._limits(spec, board, *key, None)[0]


@pytest.mark.parametrize(
    "changed", [{"device": "NVIDIA Other"}, {"triton": "3.7.0"}, {"triton": "4.6.0"}, {"platform": "metax"}]
)
def test_another_boards_table_is_not_used_and_that_is_said_once(table, changed):
    path = table(**changed)
    with pytest.warns(UserWarning, match="takes other tiles") as said:
        assert here() == ()
    assert len(said) == 1 and str(path) in str(said[0].message) and "NVIDIA Test" in str(said[0].message)


def test_the_variables_file_comes_before_the_shipped_ones(table):
    table("shipped/a.json", rows=[{**DECODE, "num_warps": 1}])
    table("shipped/b.json", rows=[{**DECODE, "num_warps": 2}], device="NVIDIA Other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody asked for a shipped one
        assert [tile.num_warps for tile in here()] == [1]
        table(rows=[{**DECODE, "num_warps": 4}])
        assert [tile.num_warps for tile in here()] == [4, 1]


def without(owner, name):
    return {key: value for key, value in owner.items() if key != name}


@pytest.mark.parametrize(
    "data,words",
    [
        ([], "the whole must be an object"),
        (without(TABLE, "device"), "device is missing"),
        ({**TABLE, "device": ""}, "device must be a text"),
        ({**TABLE, "triton": "new"}, "triton must be a version, got 'new'"),
        ({**TABLE, "row": []}, "row is not a field"),
        ({**TABLE, "rows": {}}, "rows must be a list"),
        ({**TABLE, "rows": [1]}, r"rows\[0\] must be an object"),
        ({**TABLE, "rows": [DECODE, without(DECODE, "when")]}, r"rows\[1\].when is missing"),
        ({**TABLE, "rows": [{**DECODE, "kernel": "softmax"}]}, r"rows\[0\].kernel must be one of rms_norm"),
        ({**TABLE, "rows": [{**DECODE, "kernel": []}]}, r"rows\[0\].kernel must be one of"),
        (
            {**TABLE, "rows": [{**DECODE, "blocks": {"block_h": 16, "block_n": 64}}]},
            r"rows\[0\].blocks.block_c is miss",
        ),
        ({**TABLE, "rows": [{**DECODE, "blocks": {**DECODE["blocks"], "block_m": 1}}]}, "block_m is not a field"),
        ({**TABLE, "rows": [{**DECODE, "blocks": {**DECODE["blocks"], "block_n": 48}}]}, "block_n must be a power of"),
        ({**TABLE, "rows": [{**DECODE, "num_warps": 3}]}, r"rows\[0\].num_warps must be a power of two, got 3"),
        ({**TABLE, "rows": [{**DECODE, "num_warps": True}]}, "num_warps must be a power of two"),
        ({**TABLE, "rows": [{**DECODE, "num_stages": 0}]}, "num_stages must be a positive integer"),
        ({**TABLE, "rows": [{**DECODE, "dtypes": "bfloat16"}]}, "dtypes must be a list"),
        ({**TABLE, "rows": [{**DECODE, "dtypes": ["float64"]}]}, "dtypes must be a list of bfloat16"),
        (
            {**TABLE, "rows": [{**DECODE, "when": {"heads": [1, 2]}}]},
            r"rows\[0\].when.heads: the tile of mla_decode may",
        ),
        ({**TABLE, "rows": [{**DECODE, "when": {"rows": [2, 1]}}]}, r"when.rows must be \[least, greatest or null\]"),
        ({**TABLE, "rows": [{**DECODE, "when": {"rows": 16}}]}, "when.rows must be"),
        ({**TABLE, "rows": [{**DECODE, "microseconds": -1}]}, "microseconds must be a number of microseconds"),
        ({**TABLE, "rows": [{**DECODE, "spread": "1"}]}, "spread must be a number"),
        ({**TABLE, "rows": [{**DECODE, "before": {}}]}, r"rows\[0\].before.blocks is missing"),
        ({**TABLE, "rows": [{**DECODE, "load": None}]}, "load must be an object"),
    ],
)
def test_a_bad_table_is_named_with_its_field(tmp_path, monkeypatch, data, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    monkeypatch.setenv(tile_table.VARIABLE, str(path))
    with pytest.raises(ValueError, match=words) as error:
        here()
    assert str(error.value).startswith(f"NTOPS_MLA_TILES={path}: ")


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_table_that_cannot_be_read(tmp_path, monkeypatch, content):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(tile_table.VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"NTOPS_MLA_TILES=.*bad\.json: cannot be read: "):
        here()
    # On a CPU too, which has no use for one
    with pytest.raises(ValueError, match=r"NTOPS_MLA_TILES=.*bad\.json: cannot be read: "):
        dispatch.Settings.from_environment()


def test_shipped_tables_are_as_they_should_be():
    """None yet: no board was measured. The folder is installed with the package all the same."""
    for path in tile_table.FOLDER.glob("*.json"):
        found = tile_table.read(path)
        assert found.platform in all_platforms() and found.tiles
    assert (tile_table.FOLDER / "README.md").is_file()
    assert '"ntops_mla": ["tile_tables/*"]' in (ROOT / "setup.py").read_text(encoding="utf-8")


# --- what wins ---


def candidate(median, spread=0.0, warps=4):
    times = Times(median, median - spread / 2, median + spread / 2)
    return Candidate(Tile("rms_norm", {}, warps, 1, "a test"), True, "", 0, times)


def test_better_by_more_than_the_spread_wins():
    own = candidate(100, 4)
    assert tuning.winner(own, [candidate(95.9), candidate(97)]).times.median == 95.9
    assert tuning.winner(own, [candidate(96)]) is None, "within the platform's own spread"
    assert tuning.winner(own, [candidate(90, 11)]) is None, "within the candidate's spread"
    assert tuning.winner(own, [candidate(101)]) is None
    assert tuning.winner(own, []) is None
    assert tuning.winner(None, [candidate(120), candidate(110, 50)]).times.median == 110
    assert tuning.winner(None, []) is None


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(tuning, "WARMUPS", 2)
    monkeypatch.setattr(tuning, "ROUNDS", 4)
    order, works = [], [lambda: 1, lambda: 2, lambda: 3]

    def clock(work):
        order.append(work())
        return float(10 * work() + len(order))

    times = tuning.take_turns(works, clock)
    assert order[:6] == [1, 1, 2, 2, 3, 3]
    assert order[6:] == [1, 2, 3, 2, 3, 1, 3, 1, 2, 1, 2, 3]
    # The first was the 7th, 12th, 14th and 16th to run
    assert times[0] == Times(23.0, 20.75, 24.5) and times[0].spread == 3.75


def test_the_clock_takes_events_around_the_work_after_the_l2_was_written_over(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 0.25  # milliseconds

    monkeypatch.setattr(torch.cpu, "Event", Event, raising=False)
    monkeypatch.setattr(tuning_trial, "_FLUSH_BYTES", 64)
    clock = tuning_trial.Clock(torch.device("cpu"))
    clock._flush.fill_(1)
    assert clock(lambda: done.append(f"work, {int(clock._flush.sum())} left")) == 250.0
    assert done == ["event", "work, 0 left", "event"]


@pytest.mark.parametrize("spills,told", [(4, 4), (0, 0), (None, None)])
def test_spills_are_read_where_triton_tells(spills, told):
    compiled = SimpleNamespace(_init_handles=lambda: None, n_spills=spills)
    kernel = SimpleNamespace(
        record=lambda *args: ((1,), args, {"num_warps": 4}),
        _variables=lambda dtype: contextlib.nullcontext(),
        function=SimpleNamespace(warmup=lambda *args, grid, num_warps: compiled),
        options={},
    )
    assert tuning_trial._spills(kernel, (torch.ones(1),)) == told


def test_what_spills_is_dropped_unless_it_is_the_platforms(monkeypatch):
    nvidia = get_platform("nvidia")
    board = Board(nvidia, nvidia.limits[0], (3, 6), device="NVIDIA Test", triton_version="3.6.0")
    case = next(tuning.cases([torch.bfloat16]))
    plan = tuning.plan(board, case)
    assert len(plan.tiles) == 3
    answers = iter([{"works": True, "reason": "", "spills": 8}, {"works": True, "reason": "", "spills": 2}])
    monkeypatch.setattr(tuning, "trial", lambda *args: next(answers, {"works": True, "reason": "", "spills": None}))
    monkeypatch.setattr(tuning, "timed_call", lambda *args: ())
    monkeypatch.setattr(tuning, "_work", lambda board, case, args: board.tiles[0].num_warps)
    monkeypatch.setattr(tuning, "Clock", lambda device: lambda warps: float(100 - warps))
    steps = []
    result = tuning.tune(board, torch.device("cpu"), plan, tuning_trial.Load(), step=lambda: steps.append(1))
    assert len(steps) == 3
    assert [one.works for one in result.candidates] == [True, False, True]
    assert result.candidates[1].reason == "spills 2 registers"
    assert result.before is result.candidates[0] and result.best is result.candidates[2]
    data = tuning.table(board, [result], tuning_trial.Load())
    (row,) = data["rows"]
    assert (row["num_warps"], row["microseconds"], row["before"]["microseconds"]) == (8, 92.0, 96.0)
    assert row["when"] == {"width": [512, 512]} and row["load"]["batch"] == 64
    (tile,) = tile_table.parse(json.loads(json.dumps(data))).tiles
    assert tile.num_warps == 8 and tile.when == {"width": (512, 512)}


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    with pytest.raises(ValueError, match=r"rows\[0\].num_warps"):
        tuning.write(path, {**TABLE, "rows": [{**DECODE, "num_warps": 0}]})
    assert list(tmp_path.iterdir()) == []
    tuning.write(path, TABLE)
    assert tile_table.read(path).tiles

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        tuning.write(path, {**TABLE, "rows": []})
    assert list(tmp_path.iterdir()) == [path] and tile_table.read(path).tiles


# --- the command ---


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_on_a_cpu_there_is_nothing_to_tune(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with Machine(monkeypatch):  # one without an accelerator
        assert main(["tune"]) == 1
        assert "nothing to tune on CPU" in capsys.readouterr().out
        assert main(["tune", "--platform", "metax", "--dry-run"]) == 1
        assert "no MetaX device" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_interpreters_times_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("NTOPS_MLA_INTERPRET", "1")
    assert "NTOPS_MLA_INTERPRET=1: an interpreter's times" in refused(capsys)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--op", "softmax"], "invalid choice: 'softmax'"),
        (["--dtype", "float64"], "no kernel takes torch.float64"),
        (["--batch", "0"], "a number above zero is needed"),
        (["--arch", "sm_90"], "argument --arch: with --dry-run and --platform only"),
        (["--arch", "sm_91", "--dry-run", "--platform", "nvidia"], "nvidia has 'sm_80' or 'sm_86'"),
        (["--arch", "BI-V100", "--dry-run", "--platform", "iluvatar"], "iluvatar has 'BI-V100, BI-V150, MR-V100', got"),
        (["--op", "mla_schedule"], "invalid choice: 'mla_schedule'"),
        (["--arch", "x", "--dry-run", "--platform", "cpu"], "cpu has none"),
        (["--output", "/nowhere/x.json"], "argument --output: /nowhere/x.json is not a file in a folder that exists"),
        (["--json", "/"], "argument --json: / is not a file"),
        (["--output", "x.json", "--dry-run"], "argument --output: not with --dry-run"),
        (["--platform", "tpu"], "unknown platform 'tpu'"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_a_dry_run_needs_no_device(tmp_path, capsys):
    path = tmp_path / "plans.json"
    command = ["tune", "--dry-run", "--platform", "mthreads", "--arch", "MTT S4000", "--dtype", "float32"]
    assert main([*command, "--op", "mla_decode", "--op", "rope", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "mla_decode float32, rows from 33, latent 512, page_size 64, causal 0" in said
    assert "    block_h 16, block_n 16, block_c 512, 4 warps, 1 stages, the platform's" in said
    assert "  - " in said and "of shared memory, and there are 73728" in said and "nothing was timed" in said
    cases = json.loads(path.read_text())["cases"]
    assert {row["case"]["kernel"] for row in cases} == {"rope", "mla_decode", "mla_combine"}
    assert all(row["candidates"] and row["problem"] is None for row in cases)


def test_a_table_that_is_there_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nvidia = get_platform("nvidia")
    board = Board(nvidia, nvidia.limits[0], (3, 6), device="NVIDIA A100-SXM4", triton_version="3.6.0")
    assert tune._default(board) == Path("nvidia_a100_sxm4_triton3.6.json")
    tune._default(board).write_text("mine")
    args = SimpleNamespace(output=None)
    with pytest.raises(ValueError, match=r"nvidia_a100_sxm4_triton3\.6\.json is there already"):
        tune._tune(args, board, torch.device("cpu"), None)
    assert tune._default(board).read_text() == "mine"


# --- a process of its own ---


@pytest.mark.parametrize(
    "code,answer",
    [
        ("print('noise'); print(answer({'works': True})); print('more')", {"works": True}),
        ("print('last words'); os.abort()", {"works": False, "reason": "the process was ended by SIGABRT: last words"}),
        ("sys.exit(3)", {"works": False, "reason": "the process ended with status 3"}),
        ("time.sleep(60)", {"works": False, "reason": "no answer within 0.5 seconds"}),
    ],
)
def test_what_a_child_says(tmp_path, monkeypatch, code, answer):
    """A small package in ntops_mla's place: what is asked for is `python -m ntops_mla ...`."""
    package = tmp_path / "ntops_mla"
    package.mkdir()
    head = "import json, os, sys, time\nanswer = lambda data: 'ntops_mla answers: ' + json.dumps(data)\n"
    (package / "__main__.py").write_text(f"{head}sys.stdout.reconfigure(line_buffering=True)\n{code}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    monkeypatch.chdir(tmp_path)
    assert child.ask(["tune"], environment, 0.5 if "sleep" in code else 60) == answer
    assert child.answer({"works": True}) == 'ntops_mla answers: {"works": true}'
