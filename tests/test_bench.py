"""scripts/bench.py: what is counted, timed, checked, written and left out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

import bench
from bench_rows import counting, graphs, modules, peers, plots, problems, record, runner, table, tiles, timing, ways
from bench_rows.cases import KINDS, Case, cases, config_of, decode_case, prefill_case
from bench_rows.peers import base
from ntops_mla import MLAConfig, devices, flash_mla, ops
from ntops_mla.ops import get
from ntops_mla.platform import get_platform

CPU = torch.device("cpu")
R1, LITE = MLAConfig.deepseek_r1(), MLAConfig.deepseek_v2_lite()
CEILINGS = {"copy_tb_per_s": 4.0, "copy_bytes": 1, "matmul_tflop_per_s": 800.0, "matmul_rows": 1}


def options(**changes) -> runner.Options:
    """Those of a quick run on the CPU."""
    return runner.Options(CPU, torch.bfloat16, 1, "quick", 1, 0.1)._replace(**changes)


def run(case: Case, **changes):
    """Rows and what was left out of one case."""
    return runner.run_case(case, options(**changes), timing.Clock(CPU), CEILINGS)


# --- counting: by hand ---


def test_decode_is_counted_as_flash_mla_counts():
    # the floors of an H200: 790 TFLOP/s and 4.3 TB/s
    work = counting.decode([4096] * 128, 1, 128)
    assert work.flop == 128 * 128 * 4096 * 2176 == 146_028_888_064
    assert work.bytes == 128 * (128 * 1088 * 2 + 4096 * 1152) == 639_631_360
    assert round(work.flop / 790e6) == 185
    assert round(counting.decode([4096] * 128, 1, 16).bytes / 4.3e6) == 141
    # the mean length, not the longest; s_q multiplies queries and not keys
    assert counting.decode([10, 30], 2, 4, element=2) == (2 * 4 * 40 * 2176, 2 * (2 * 2 * 4 * 1088 + 40 * 576))


@pytest.mark.parametrize(
    ("new", "keys", "causal", "expected"),
    [(1, 10, True, 10), (3, 3, True, 6), (3, 5, True, 12), (3, 5, False, 15), (5, 3, True, 6), (0, 4, True, 0)],
)
def test_pairs(new, keys, causal, expected):
    assert counting.pairs(new, keys, causal) == expected
    visible = torch.ones(new, keys, dtype=torch.bool).tril_(keys - new) if causal else torch.ones(new, keys)
    assert int(visible.sum()) == expected


def test_prefill_and_the_smaller_ops():
    work = counting.prefill([(1024, 1024)], 128)
    assert work.flop == 524_800 * 128 * 640 and round(work.flop / 790e6) == 54
    assert work.bytes == 2 * 128 * 1024 * (192 + 128 + 192 + 128)
    two = counting.prefill([(2, 5), (3, 3)], 1)
    assert two == (640 * (9 + 6), 2 * ((2 + 5) * 320 + (3 + 3) * 320))
    assert counting.combine(2, 4) == (2 * 2 * 4 * 512, 2 * (4 * 513 * 4 + 1024 + 4))
    assert counting.append(3) == (3 * (2048 + 192), 2 * (6 * 576 + 512) + 3 * (256 + 8))
    assert counting.append(1, heads=2) == (2048 + 3 * 192, 2 * (2 * (512 + 192) + 512) + 264)
    assert counting.norm(2, 8) == (64, 2 * 5 * 8)
    assert counting.rope(2, 4) == (3 * 2 * 4 * 64, 2 * 64 * (16 + 4))


def test_a_layer():
    assert sum(counting.projections(R1).values()) * 2 == 374_210_560
    a = config_of("a")
    assert sum(counting.projections(a).values()) == 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 2048 * 2048
    matrices = counting.projections(a)
    work = counting.module(a, [1], [9])
    dense = sum(matrices.values()) - matrices["kv_b_proj"]
    assert work.flop == 2 * dense + 2 * 16 * (512 * 256 + 10 * 1088)  # one token stays absorbed
    assert work.bytes == 2 * (sum(matrices.values()) + 2 * 2048 + 11 * 576)
    # no past: expanded, and a high cost of attention changes nothing there
    assert counting.module(a, [4], [0]).flop == 2 * 4 * dense + 2 * 16 * (4 * 512 * 256 + 10 * 320)
    assert counting.module(a, [64], [4096], cost=9).flop < counting.module(a, [64], [4096]).flop * 9


def test_mla_against_mha():
    assert counting.cache_per_token(R1) == (1152, 81920)
    assert counting.cache_per_token(LITE) == (1152, 10240)
    assert counting.crossover(R1, 0) == 2
    past = 32768
    least = counting.crossover(R1, past)
    assert counting.expanded_flop(R1, least, past + least) < counting.absorbed_flop(R1, least, past + least)
    below = least - 1
    assert counting.expanded_flop(R1, below, past + below) >= counting.absorbed_flop(R1, below, past + below)
    assert counting.crossover(R1, 1 << 20) == 171


@pytest.fixture(autouse=True)
def _no_weights_are_kept():
    yield
    modules.forget()


# --- cases ---


def test_cases_of_every_size():
    for size in ("device", "cpu", "quick"):
        found = cases(size)
        assert {case.kind for case in found} == set(KINDS)
        names = Counter((case.kind, case.name) for case in found)
        assert max(names.values()) == 1
    names = {(case.kind, case.name) for case in cases("device")}
    assert {("decode", f"b128-q{q}-k{k}-h128-varlen") for q in (1, 2) for k in (4096, 32768)} <= names
    assert {("module", f"r1-decode-b{b}-k{k}") for b in (1, 128) for k in (1024, 131072)} <= names
    assert {("module", f"{config}-{step}") for config in ("a", "r1") for step in ("prefill", "decode")} <= names
    (shared,) = [case for case in cases("device") if case.kind == "decode" and case.name == "b128-q1-k4096-h128"]
    assert set(shared.groups) == {"batch", "heads"}  # once, for both sweeps
    with pytest.raises(ValueError, match="size"):
        cases("huge")
    with pytest.raises(ValueError, match="kinds"):
        cases("quick", ("training",))


# --- timing ---


def test_spread():
    assert timing.spread([3.0, 1.0, 2.0, 4.0, 100.0]) == (3.0, 2.0, 4.0, 5)
    assert timing.spread([2.5]) == (2.5, 2.5, 2.5, 1)
    with pytest.raises(ValueError, match="values"):
        timing.spread([])


def test_calls_take_turns_and_one_that_raises_leaves_the_rest():
    order = []

    def broken():
        order.append("b")
        if order.count("b") == 2:
            raise RuntimeError("lost")

    calls = [timing.Call(lambda: order.append("a"), lambda: order.append("-")), timing.Call(broken)]
    times = timing.Clock(CPU).measure(calls, 3, 60)
    assert "".join(order) == "a-ba-ba-a-"  # one to warm up, then three; b is gone after its second
    assert times[0].runs == 3 and isinstance(times[1], RuntimeError)
    order.clear()
    assert timing.Clock(CPU).measure(calls[:1], 100, 0)[0].runs == timing.LEAST_RUNS


class Device:
    """A device's module of torch that notes what happens; an event's time is its place in the notes."""

    def __init__(self) -> None:
        self.notes = []

    def Event(self, enable_timing):
        event = types.SimpleNamespace()
        event.record = lambda: (self.notes.append("event"), setattr(event, "at", len(self.notes)))
        event.elapsed_time = lambda end: float(end.at - event.at)
        return event

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=200 << 20)


def test_on_a_device_the_cache_is_flushed_before_each_run_and_events_are_read(monkeypatch):
    module, device = Device(), torch.device("meta")
    monkeypatch.setattr(timing, "device_module", lambda _: module)
    clock = timing.Clock(device)
    assert clock._flush.numel() * 4 == 400 << 20 and "400 MiB" in clock.said
    clock._flush = types.SimpleNamespace(zero_=lambda: module.notes.append("flush"))
    call = timing.Call(lambda: module.notes.append("run"), lambda: module.notes.append("after"))
    (found,) = clock.measure([call], 2, 60)
    assert module.notes == ["flush", "event", "run", "event", "after"] * 3
    assert found == (2.0, 2.0, 2.0, 2)
    assert clock.peak_bytes(call) is None  # this one does not say


def test_a_graph_is_recorded_after_a_run_and_replayed(monkeypatch):
    notes = []

    class Graph:
        def replay(self):
            notes.append("replay")

        def pool(self):
            return None

    class Within:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            notes.append(self.what)

        def __exit__(self, *_):
            pass

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    module = types.SimpleNamespace(
        XPUGraph=Graph,
        graph=lambda graph, pool: Within("record"),
        device=lambda device: contextlib.nullcontext(),
        synchronize=lambda device: None,
        Stream=lambda: stream,
        current_stream=lambda: None,
        stream=lambda s: Within("side"),
    )
    monkeypatch.setattr(devices, "device_module", lambda _: module)
    device = torch.device("xpu", 0)
    assert graphs.unavailable(device) is None
    replay = graphs.record(device, lambda: notes.append("call") or 7)
    assert replay() == 7
    assert notes == ["side", "call", "call", "record", "call", "replay"]
    monkeypatch.undo()
    assert graphs.unavailable(CPU) == "torch.cpu has no graphs"


# --- the whole of it, once ---


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: its status, its output, its JSON."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **_: said.append(" ".join(map(str, args))))
        status = bench.main(["--cpu", "--quick", "--runs", "1", "--seed", "3", "--json", str(file)])
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]
    return status, "\n".join(said), file


def test_every_kind_of_row_is_checked_and_timed(quick):
    status, said, file = quick
    data = record.read(file)
    assert status == 0, said
    assert {row["op"] for row in data["rows"]} == set(KINDS)
    assert {row["status"] for row in data["rows"]} == {"timed"}
    for row in data["rows"]:
        assert set(row) == set(record.FIELDS)
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["checked"]
        if row["op"] != "parts":
            assert row["tb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e9)
            assert row["share_of_bound"] == max(row["share_of_copy"], row["share_of_matmul"])
    implementations = {op: {r["implementation"] for r in data["rows"] if r["op"] == op} for op in KINDS}
    assert implementations["decode"] == implementations["prefill"] == {"ntops_mla", "torch_sdpa"}
    assert implementations["module"] == {"ntops_mla", "torch_loop", "transformers"}
    assert implementations["append"] == {"ntops_mla", "queries apart", "unfused"}
    assert [row["part"] for row in data["rows"] if row["op"] == "parts"] == [*modules.PARTS, modules.PRODUCTS]
    assert {row["backend"] for row in data["rows"] if row["implementation"] == "ntops_mla"} == {"reference", None}


def test_the_head_says_where_it_was_made(quick):
    data = json.loads(quick[2].read_text())
    assert data["platform"] == data["device"] == "cpu" and data["board"].startswith("CPU, ")
    assert data["versions"]["torch"] == torch.__version__ and data["versions"]["python"]
    assert data["seed"] == 3 and data["size"] == "quick" and data["commit"] and data["interpreted"] is False
    assert all(data["ceilings"][name] > 0 for name in record.CEILINGS)


def test_a_missing_peer_is_a_line_that_says_why(quick):
    _, said, file = quick
    absent = {(one["op"], one["implementation"]): one["reason"] for one in json.loads(file.read_text())["left_out"]}
    for peer in peers.PEERS:
        for kind in peer.kinds if not peer.on_cpu else ():
            assert absent[kind, peer.name]
            assert f"{kind}: {peer.name}, {peer.timed}: {absent[kind, peer.name]}" in said
    assert absent["decode", "ntops_mla"] and "no graphs" in absent["norm", "ntops_mla"]


def test_the_output_has_a_table_for_each_op(quick):
    _, said, _ = quick
    for words in (
        *(f"\n{kind}\n" for kind in KINDS),
        "ceilings of this run",
        "times as fast as torch_sdpa",
        "left out",
    ):
        assert words in said


# --- errors ---


def test_a_wrong_row_is_not_timed_and_status_1(monkeypatch, capsys, tmp_path):
    right = get("mla_decode").spec

    def wrong(*args):
        out, lse = right.reference(*args)
        return out * 1.05, lse

    monkeypatch.setattr(get("mla_decode"), "spec", dataclasses.replace(right, reference=wrong))
    file = tmp_path / "bench.json"
    flags = ["--cpu", "--quick", "--runs", "1", "--ops", "decode", "--case", "k128", "--json", str(file)]
    assert bench.main(flags) == 1
    rows = {row["implementation"]: row for row in record.read(file)["rows"]}
    assert rows["ntops_mla"]["status"] == "mismatch" and rows["ntops_mla"]["ms"] is None
    assert "elements differ" in rows["ntops_mla"]["reason"]
    assert rows["torch_sdpa"]["status"] == "timed"
    assert "MISMATCH: decode b2-q2-k128-h16-causal, ntops_mla" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", ["combine", "prefill", "append", "norm", "rope", "query", "decode_fp8", "sparse", "sparse_prefill"]
)
def test_a_wrong_result_of_any_op_is_found(kind):
    case, *_ = cases("quick", (kind,))
    problem = problems.make(case, CPU, torch.bfloat16, 0, "quick")
    way = next(way for way in ways.ours(problem) if isinstance(way, ways.Way))
    problem.reset()
    result = way.run()
    result = way.read() if way.read else result
    assert problem.check(result).fault is None
    out, lse = result if isinstance(result, tuple) else (result, None)
    wrong = out.clone()
    wrong.view(-1)[7] += 0.5
    assert "out" in problem.check(wrong).fault
    assert "NaN" in problem.check(torch.full_like(out, float("nan"))).fault
    assert problem.check(torch.full_like(out, float("nan"))).max_error is None
    if lse is not None:
        assert "lse" in problem.check((out, lse + 0.1)).fault


def test_a_path_that_raises_is_an_error_row(monkeypatch):
    class Broken(base.Peer):
        name, module, kinds, on_cpu = "broken", "torch", ("norm",), True

        def norm(self, problem):
            def fail():
                raise RuntimeError("no kernel image\nmore")

            return fail

    class Unprepared(Broken):
        name = "unprepared"

        def norm(self, problem):
            raise TypeError("plan() got an unexpected keyword")

    monkeypatch.setattr(runner, "PEERS", (Broken(), Unprepared()))
    rows, left_out = run(cases("quick", ("norm",))[0])
    found = {row["implementation"]: row for row in rows}
    assert found["broken"]["status"] == "error" and found["broken"]["reason"] == "RuntimeError: no kernel image"
    assert found["ntops_mla"]["status"] == "timed"
    (absent,) = [one for one in left_out if one["implementation"] == "unprepared"]
    assert "TypeError: plan()" in absent["reason"]


def test_a_kernel_that_fell_back_is_no_kernels_row(monkeypatch):
    """What computes is asked after the run, not before it."""
    asked = []
    explain = lambda *args: types.SimpleNamespace(backend="reference" if asked else "kernel")  # noqa: E731
    right = ops.rope
    fake = type("Op", (), {"explain": staticmethod(explain), "__call__": lambda _, *a: asked.append(1) or right(*a)})()
    monkeypatch.setattr(ways.ops, "rope", fake)
    rows, _ = run(cases("quick", ("rope",))[0], only=("ntops_mla",))
    assert [(row["status"], row["backend"]) for row in rows] == [("timed", "reference")]


def test_what_does_not_fit_into_memory_is_left_out_and_no_error(monkeypatch):
    def fail(problem):
        raise RuntimeError("Toy out of memory. Tried to allocate 9 GiB")

    monkeypatch.setitem(
        ways._WAYS, "norm", lambda problem: iter([ways.Way("ntops_mla", "whole call", lambda: fail(0))])
    )
    rows, left_out = run(cases("quick", ("norm",))[0])
    assert rows == [] and "Tried to allocate" in left_out[0]["reason"]
    monkeypatch.setattr(problems, "make", lambda *args: fail(0))
    rows, left_out = run(cases("quick", ("rope",))[0])
    assert rows == [] and left_out[0]["implementation"] == "all"


def test_inputs_that_cannot_be_made_are_an_error_of_their_case(monkeypatch):
    monkeypatch.setattr(problems, "make", lambda *args: 1 / 0)
    rows, _ = run(cases("quick", ("rope",))[0])
    assert [(row["status"], row["implementation"]) for row in rows] == [("error", "all")]
    assert "ZeroDivisionError" in rows[0]["reason"]


@pytest.mark.parametrize("kind", ["module", "parts"])
def test_a_wrong_layer_is_a_mismatch(monkeypatch, kind):
    right = get("mla_decode").spec
    wrong = lambda *args: tuple(x * 1.1 for x in right.reference(*args))  # noqa: E731
    monkeypatch.setattr(get("mla_decode"), "spec", dataclasses.replace(right, reference=wrong))
    (case,) = [case for case in cases("quick", (kind,)) if case.name.endswith("decode")]
    rows, _ = run(case, only=("ntops_mla",))
    assert [row["status"] for row in rows] == ["mismatch"]
    assert "cos_diff" in rows[0]["reason"] and rows[0]["ms"] is None


def test_a_case_that_does_not_fit_is_left_out(monkeypatch):
    module = types.SimpleNamespace(mem_get_info=lambda device: (1 << 20, 1 << 30))
    monkeypatch.setattr(runner, "device_module", lambda device: module)
    rows, left_out = run(decode_case(8, 1, 4096, 16, True, False, "length"), device=torch.device("meta"))
    assert rows == [] and "GB are needed" in left_out[0]["reason"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nvidia"], "no NVIDIA device"),
        (["--cpu", "--case", "nowhere"], "--case"),
        (["--cpu", "--json", "/nowhere/bench.json"], "--json"),
        (["--cpu", "--plots", "/nowhere"], "--plots"),
        (["--cpu", "--runs", "0"], "--runs"),
        (["--cpu", "--ops", "training"], "--ops"),
    ],
)
def test_what_cannot_be_done_is_status_2(capsys, flags, says):
    if flags == ["--nvidia"] and "cpu" not in str(torch.__version__):
        pytest.skip("this torch may have that device")
    try:
        status = bench.main([*flags, "--quick"])
    except SystemExit as leaving:  # argparse
        status = leaving.code
    assert status == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_INTERPRET", "1")
    assert bench.main(["--cpu", "--quick"]) == 2
    assert "interpreter" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.main(["--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--quick", "--cpu", "--nvidia", "--json", "--plots", "--tiles", "--implementations"):
        assert flag in out


# --- peers: their documented calls, played by this library ---


@pytest.fixture
def played(monkeypatch):
    """Puts a module where a peer's would be, and lets the peer run on a CPU."""
    base.missing.cache_clear()

    def play(peer, content):
        monkeypatch.setitem(sys.modules, peer.module, content)
        monkeypatch.setattr(type(peer), "on_cpu", True)

    yield play
    base.missing.cache_clear()


def peer_of(name: str):
    return next(peer for peer in peers.PEERS if peer.name == name)


DECODE = decode_case(3, 2, 100, 4, True, True, "flashmla")
ONE_ROW = decode_case(3, 1, 100, 4, True, True, "flashmla")
PREFILL = prefill_case(((5, 20), (9, 0)), 2, "scenario")


def agree(peer, case: Case) -> None:
    """The peer's call gives what float64 gives."""
    problem = problems.make(case, CPU, torch.bfloat16, 0, "quick")
    assert peer.available(problem) is None
    assert problem.check(peer.make(problem)()).fault is None


@pytest.mark.parametrize("case", [DECODE, ONE_ROW, PREFILL], ids=["decode", "one row", "prefill"])
def test_torch_sdpa_agrees(case):
    agree(peer_of("torch_sdpa"), case)


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("first_release", [False, True])
def test_flash_mla_is_called_as_documented(played, case, first_release):
    peer, asked = peer_of("flash_mla"), []

    def of_the_first_release(cache_seqlens, heads_per_kv, kv_heads):
        asked.append((heads_per_kv, kv_heads))
        return flash_mla.get_mla_metadata(cache_seqlens, heads_per_kv, kv_heads)

    def now(*args, **kwargs):
        asked.append((args, kwargs))
        return flash_mla.get_mla_metadata()

    content = types.SimpleNamespace(
        get_mla_metadata=of_the_first_release if first_release else now,
        flash_mla_with_kvcache=flash_mla.flash_mla_with_kvcache,
        flash_attn_varlen_func=flash_mla.flash_attn_varlen_func,
    )
    played(peer, content)
    agree(peer, case)
    assert asked == ([] if case is PREFILL else [(2 * 4, 1)] if first_release else [((), {})])


def test_a_flash_mla_without_prefill_says_so(played):
    peer = peer_of("flash_mla")
    played(peer, types.SimpleNamespace(get_mla_metadata=None, flash_mla_with_kvcache=None))
    assert "no flash_attn_varlen_func" in peer.available(problems.make(PREFILL, CPU, torch.bfloat16, 0, "quick"))


def test_flashinfer_is_called_as_documented(played):
    class MLA:
        def __init__(self, float_workspace_buffer, *, backend):
            assert float_workspace_buffer.dtype == torch.int8 and backend == "auto"

        def plan(
            self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size,
            causal, sm_scale, q_data_type, kv_data_type,
        ):  # fmt: skip
            assert (num_heads, head_dim_ckv, head_dim_kpe, page_size) == (4, 512, 64, 64)
            counts = kv_indptr.diff().tolist()
            self.table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
            for row, some in zip(self.table, kv_indices.split(counts)):
                row[: len(some)] = some
            self.rest = kv_len_arr, sm_scale, causal
            self.batch = len(qo_indptr) - 1

        def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
            queries = (q.unflatten(0, (self.batch, -1)) for q in (q_nope, q_pe))
            return ops.mla_decode(*queries, ckv_cache, kpe_cache, self.table, *self.rest)[0].flatten(0, 1)

    class Ragged:
        def __init__(self, float_workspace_buffer, kv_layout):
            assert kv_layout == "NHD"

        def plan(
            self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, causal=False,
            sm_scale=None, q_data_type="float16",
        ):  # fmt: skip
            assert (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo) == (2, 2, 192, 128)
            self.rest = qo_indptr, kv_indptr, sm_scale, causal

        def run(self, q, k, v):
            return ops.mla_prefill(q, k, v, *self.rest)[0]

    peer = peer_of("flashinfer")
    content = types.SimpleNamespace(
        mla=types.SimpleNamespace(BatchMLAPagedAttentionWrapper=MLA),
        prefill=types.SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=Ragged),
    )
    played(peer, content)
    agree(peer, DECODE)
    agree(peer, PREFILL)


@pytest.mark.parametrize(("name", "width"), [("flash_attn", 192), ("flash_attn_3", 128)])
@pytest.mark.parametrize("with_lse", [False, True])
def test_flash_attn_is_called_as_documented(played, name, width, with_lse):
    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert v.shape[-1] == width and (max_seqlen_q, max_seqlen_k) == (9, 25)
        out, lse = ops.mla_prefill.reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return (out, lse) if with_lse and name == "flash_attn_3" else out

    peer = peer_of(name)
    played(peer, types.SimpleNamespace(flash_attn_varlen_func=varlen))
    agree(peer, PREFILL)


def test_flag_gems_is_called_as_documented(played):
    def theirs(q, block_table, blocked_k, max_seqlen_pad, block_size, b, s_q, cache_seqlens, h_q, h_kv, d, dv, causal):
        assert max_seqlen_pad % 256 == 0 and (b, s_q, h_kv, d, dv, causal) == (3, 1, 1, 576, 512, True)
        cache = blocked_k.view(-1, block_size, d)
        args = q[..., :dv], q[..., dv:], cache[..., :dv], cache[..., dv:], block_table, cache_seqlens, d**-0.5
        return ops.mla_decode(*args)[0].view(b, s_q, h_q, dv)

    peer = peer_of("flag_gems")
    played(peer, types.SimpleNamespace(flash_mla=theirs))
    agree(peer, ONE_ROW)
    assert "one query row" in peer.available(problems.make(DECODE, CPU, torch.bfloat16, 0, "quick"))


def test_sageattention_does_not_take_such_heads(played):
    peer = peer_of("sageattention")
    problem = problems.make(PREFILL, CPU, torch.bfloat16, 0, "quick")
    played(peer, types.SimpleNamespace(sageattn=None))
    assert "128 columns" in peer.available(problem)


def test_a_peer_that_does_not_import_or_lacks_a_name(played, monkeypatch):
    peer = peer_of("flag_gems")
    problem = problems.make(ONE_ROW, CPU, torch.bfloat16, 0, "quick")
    played(peer, types.SimpleNamespace())
    assert peer.available(problem) == "flag_gems has no flash_mla"
    base.missing.cache_clear()

    def broken(name):
        raise OSError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr(base.importlib, "import_module", broken)
    assert peer.available(problem) == "flag_gems does not import: OSError: libcuda.so.1: cannot open"


# --- layers ---


def test_a_layers_replay_and_parts_are_the_layer(monkeypatch):
    def record_once(device, call):
        results = call()
        return lambda: results

    monkeypatch.setattr(graphs, "unavailable", lambda device: None)
    monkeypatch.setattr(graphs, "record_once", record_once)
    monkeypatch.setattr(modules, "_reads_lengths", lambda layer: None)
    monkeypatch.setattr(modules.transformers_row, "unavailable", lambda: "not today")
    (case,) = cases("quick", ("parts",))
    rows, left_out = run(dataclasses.replace(case, kind="module"))
    found = {(row["implementation"], row["timed"]): row["status"] for row in rows}
    assert found == {(name, "whole call"): "timed" for name in ("ntops_mla", "torch_loop")} | {
        ("ntops_mla", "graph replay"): "timed"
    }
    assert [one["reason"] for one in left_out] == ["not today"]


# --- the kernels' own ways, in the interpreter, where a process has to begin so ---

INTERPRETED = """
import torch
from bench_rows import problems, tiles, ways
from bench_rows.cases import Case, decode_case
for case in (decode_case(2, 1, 600, 4, True, False, "x"), Case("combine", "c", {"batch": 1, "splits": 2, "heads": 2})):
    problem = problems.make(case, torch.device("cpu"), torch.bfloat16, 0, "quick")
    for way in ways.ours(problem):
        if isinstance(way, ways.Way):
            result = way.run()
            check = problem.check(way.read() if way.read else result)
            print(case.kind, way.implementation, way.timed, way.backend(), way.note, check.fault, sep="|")
tiles.BLOCK_H, tiles.BLOCK_N, tiles.BLOCK_C, tiles.WARPS, tiles.STAGES = (16,), (32,), (256, 512), (4,), (1,)
problem = problems.make(decode_case(1, 1, 100, 2, True, False, "x"), torch.device("cpu"), torch.bfloat16, 0, "quick")
for way in tiles.sweep(problem):
    way.run()
    print("tile", way.timed, way.tile["block_c"], problem.check(way.read()).fault, sep="|")
"""


@pytest.mark.slow
def test_the_kernels_alone_compute_what_the_call_does(tmp_path):
    root = Path(bench.__file__).parents[1]
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{root}:{root / 'scripts'}"}
    environment |= {"NTOPS_MLA_INTERPRET": "1", "NTOPS_MLA_PLATFORM": "nvidia"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = [line.split("|") for line in lines]
    assert all(line[-1] == "None" for line in found), done.stdout
    ran = {tuple(line[:4]) for line in found if line[0] != "tile"}
    timed = {("decode", "ntops_mla", name, "kernel") for name in ("whole call", "kernel", "kernel + combine")}
    assert timed | {("combine", "ntops_mla", "kernel", "kernel")} <= ran
    assert [line[:3] for line in found if line[0] == "tile"] == [["tile", "kernel", "256"], ["tile", "kernel", "512"]]


def test_a_sweep_needs_a_kernel():
    problem = problems.make(ONE_ROW, CPU, torch.bfloat16, 0, "quick")
    (absent,) = tiles.sweep(problem)
    assert isinstance(absent, ways.Absent) and get_platform("cpu").title in absent.reason


# --- what is written ---


def test_rates_and_their_bound():
    row = {"ms": 1.0, "flop": 400 * 10**9, "bytes": 10**9}
    found = runner.rates(row, CEILINGS)
    assert found["tb_per_s"] == 1.0 and found["tflop_per_s"] == 400.0
    assert (found["share_of_copy"], found["share_of_matmul"], found["bound"]) == (0.25, 0.5, "compute")
    assert runner.rates({**row, "bytes": 4 * 10**9}, CEILINGS)["bound"] == "memory"
    assert set(runner.rates({**row, "ms": None}, CEILINGS).values()) == {None}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data.pop("ceilings"), "ceilings: missing"),
        (lambda data: data.update(format=0), "format"),
        (lambda data: data["rows"][0].pop("ms"), "rows[0]: ms: missing"),
        (lambda data: data["rows"][0].update(ms=None), "rows[0]: ms"),
        (lambda data: data["rows"][1].update(bytes="many"), "rows[1]: bytes"),
        (lambda data: data["ceilings"].update(copy_tb_per_s=None), "copy_tb_per_s"),
        (lambda data: data["rows"].append(3), "an object is needed"),
    ],
)
def test_a_file_that_is_no_run_is_refused_by_field(quick, tmp_path, spoil, says):
    data = json.loads(quick[2].read_text())
    spoil(data)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"bench\.json") as refused:
        record.read(file)
    assert says in str(refused.value)


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text("old")
    with pytest.raises(ValueError):
        record.write(file, {"ms": float("nan")})  # JSON has none
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_reasons_are_counted():
    one = {"op": "decode", "implementation": "x", "timed": "whole call", "reason": "not here"}
    assert table.left_out_text([one, one, {**one, "op": "prefill"}]).splitlines() == [
        "  decode: x, whole call: not here (2 cases)",
        "  prefill: x, whole call: not here",
    ]
    assert table.milliseconds(0.01234) == "12.3 us" and table.milliseconds(1234.5) == "1.23e+03 ms"


# --- plots ---


class Figure:
    """Stands where matplotlib.figure.Figure would, on a machine without it."""

    def __init__(self, **_):
        self.drawn = []

    def add_subplot(self, **_):
        return self

    def plot(self, x, y, **_):
        assert len(x) == len(y) > 0
        return (types.SimpleNamespace(get_color=lambda: "black"),)

    def savefig(self, file, **_):
        Path(file).write_bytes(b"\x89PNG")

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_plots_are_written(quick, tmp_path, monkeypatch, capsys):
    if plots.unavailable() is not None:
        monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace())
        monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    assert plots.unavailable() is None
    data = json.loads(quick[2].read_text())
    written = plots.write(data, tmp_path)
    assert [path.name for path in written] == list(plots.NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(plots.NAMES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert plots.write({**data, "rows": []}, tmp_path / "unused") == []


def test_without_matplotlib_plots_are_left_out_and_said_to_be(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench.keep(types.SimpleNamespace(json=None, plots=tmp_path), json.loads(quick[2].read_text()))
    assert "plots are left out: matplotlib cannot be imported" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_speedups_are_of_whole_calls_of_one_case():
    row = {"op": "decode", "case": "x", "status": "timed", "tile": None, "timed": "whole call"}
    rows = [
        {**row, "implementation": "ntops_mla", "ms": 2.0},
        {**row, "implementation": "ntops_mla", "ms": 1.0, "timed": "kernel"},
        {**row, "implementation": "peer", "ms": 5.0},
        {**row, "implementation": "peer", "ms": 5.0, "case": "y"},
    ]
    assert plots.speedups(rows) == [("decode x", "peer", 2.5)]
