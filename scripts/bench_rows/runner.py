"""Check every way of a case against float64, then time those that passed, taking turns; a row for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench_rows import modules, problems, tiles, ways
from bench_rows.cases import Case
from bench_rows.peers import PEERS
from bench_rows.problem import Check
from bench_rows.timing import Call, Clock, Spread
from ntops_mla.board import first_line
from ntops_mla.devices import device_module, synchronize

STATUSES = ("timed", "mismatch", "error")
# What a case may hold beside its inputs: copies of peers, parts, results.
_ROOM = {"module": 6.0, "parts": 4.0}


class Options(NamedTuple):
    """What of bench.py's command line a case depends on. only: implementations, None: all."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    size: str
    runs: int
    seconds: float
    only: tuple[str, ...] | None = None
    tiles: bool = False


def run_case(case: Case, options: Options, clock: Clock, ceilings: dict) -> tuple[list[dict], list[dict]]:
    """Rows of a case, and what was left out of it with the reasons."""
    reason = _too_large(case, options.device)
    if reason is not None:
        return [], [_left_out(case, ways.Absent("all", "all", reason))]
    run = {"module": _run_module, "parts": _run_parts}.get(case.kind, _run_op)
    try:
        with torch.inference_mode():
            found = run(case, options, clock)
    except Exception as error:  # of its inputs, say: the other cases still run
        found = [_raised(case, ways.Absent("all", "all", ""), error)]
    rows = [one for one in found if isinstance(one, dict)]
    for row in rows:
        row.update(rates(row, ceilings))
    return rows, [_left_out(case, one) for one in found if isinstance(one, ways.Absent)]


def _left_out(case: Case, absent: ways.Absent) -> dict:
    return {"op": case.kind, "case": case.name, **absent._asdict()}


def rates(row: dict, ceilings: dict) -> dict:
    """What follows from a row's time: TB/s, TFLOP/s, and the share of the ceiling that bounds it."""
    names = ("tb_per_s", "tflop_per_s", "share_of_copy", "share_of_matmul", "bound", "share_of_bound")
    if row["ms"] is None or row["flop"] is None or not row["ms"] > 0:
        return dict.fromkeys(names)
    tb, tflop = row["bytes"] / row["ms"] / 1e9, row["flop"] / row["ms"] / 1e9
    copy, matmul = tb / ceilings["copy_tb_per_s"], tflop / ceilings["matmul_tflop_per_s"]
    return dict(zip(names, (tb, tflop, copy, matmul, "memory" if copy >= matmul else "compute", max(copy, matmul))))


def _too_large(case: Case, device: torch.device) -> str | None:
    """Why a case does not fit into the device's free memory, by its bytes; None where it does, or nobody says."""
    if case.kind not in ("decode", "module", "parts") or device.type == "cpu":
        return None
    if case.kind == "decode":  # varlen: the mean
        tokens = case.params["batch"] * case.params["context"] + case.params.get("longest", 0)
    else:
        tokens = sum(case.params["pasts"])
    needed = tokens * problems.WIDTH * 2 * _ROOM.get(case.kind, 3.0)
    try:
        free = device_module(device).mem_get_info(device)[0]
    except (AttributeError, RuntimeError):
        return None
    return f"about {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free" if needed > 0.9 * free else None


def _row(case: Case, way, check: Check | None, work, timed: Spread | None, status: str, reason: str | None) -> dict:
    """One row of the JSON; numbers that are not finite are null there."""
    finite = lambda x: x if x is not None and math.isfinite(x) else None  # noqa: E731
    return {
        "op": case.kind,
        "case": case.name,
        "groups": list(case.groups),
        "params": {name: _plain(value) for name, value in case.params.items()},
        "implementation": way.implementation,
        "timed": way.timed,
        "backend": way.backend() if hasattr(way, "backend") else None,
        "note": getattr(way, "note", None),
        "tile": getattr(way, "tile", None),
        "part": getattr(way, "part", None),
        "status": status,
        "reason": reason,
        "checked": check and check.said,
        "max_error": finite(check and check.max_error),
        "cos_diff": finite(check and check.cos_diff),
        "flop": work and work.flop,
        "bytes": work and work.bytes,
        "ms": timed and timed.ms,
        "ms_low": timed and timed.low,
        "ms_high": timed and timed.high,
        "runs": timed and timed.runs,
        "peak_bytes": None,
    }


def _plain(value):
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _raised(case: Case, way, error: Exception, check: Check | None = None, work=None) -> dict | ways.Absent:
    """An error row; what did not fit into memory is left out, and no failure of the path."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return ways.Absent(way.implementation, way.timed, _said(error))
    return _row(case, way, check, work, None, "error", _said(error))


def _run_op(case: Case, options: Options, clock: Clock) -> list[dict | ways.Absent]:
    problem = problems.make(case, options.device, options.dtype, options.seed, options.size)
    found, passed = [], []
    for way in _ways_of(problem, options):
        if isinstance(way, ways.Absent):
            found.append(way)
            continue
        if way.tile is not None:  # a tile that does not fit the board is a finding of the sweep, not a failure
            try:
                way.run()
                synchronize(options.device)
            except Exception as error:
                found.append(ways.Absent(way.implementation, way.timed, f"{way.tile}: {_said(error)}"))
                continue
        try:
            problem.reset()
            result = way.run()
            check = problem.check(result if way.read is None else way.read())
        except Exception as error:
            found.append(_raised(case, way, error, work=problem.work))
            continue
        if check.fault is None:
            passed.append((way, check, Call(way.run)))
        else:
            found.append(_row(case, way, check, problem.work, None, "mismatch", check.fault))
    return found + _timed(case, passed, problem.work, options, clock)


def _ways_of(problem, options: Options) -> Iterator[ways.Way | ways.Absent]:
    """Ours, then those of the peers that know this kind of case."""
    wanted = lambda name: options.only is None or name in options.only  # noqa: E731
    found = tiles.sweep(problem) if options.tiles else ways.ours(problem)
    yield from (way for way in found if wanted(way.implementation))
    if options.tiles:
        return
    for peer in PEERS:
        if problem.case.kind not in peer.kinds or not wanted(peer.name):
            continue
        try:
            reason = peer.available(problem)
            run = peer.make(problem) if reason is None else None
        except Exception as error:
            reason = f"preparing its call raised {_said(error)}"
        if reason is not None:
            yield ways.Absent(peer.name, peer.timed, reason)
        else:
            yield ways.Way(peer.name, peer.timed, run, note=peer.note)


def _timed(case: Case, passed: list[tuple], work, options: Options, clock: Clock) -> list[dict | ways.Absent]:
    """Rows of the ways that agree with float64: (way, check, call) each."""
    found = []
    times = clock.measure([call for _, _, call in passed], options.runs, options.seconds)
    for (way, check, call), timed in zip(passed, times):
        if isinstance(timed, Exception):
            found.append(_raised(case, way, timed, check, work))
            continue
        row = _row(case, way, check, work, timed, "timed", None)
        row["peak_bytes"] = clock.peak_bytes(call)
        found.append(row)
    return found


def _run_module(case: Case, options: Options, clock: Clock) -> list[dict | ways.Absent]:
    layer = modules.make(case, options.device, options.dtype, options.seed, options.size)
    found, passed = [], []
    for way in modules.ways(layer, options.only):
        if isinstance(way, ways.Absent):
            found.append(way)
            continue
        try:
            way.start()
            check = layer.check(way.run())
            way.after()
        except Exception as error:
            found.append(_raised(case, way, error, work=layer.work))
            continue
        if check.fault is None:
            passed.append((way, check, Call(way.run, way.after)))
        else:
            found.append(_row(case, way, check, layer.work, None, "mismatch", check.fault))
    return found + _timed(case, passed, layer.work, options, clock)


class _Part(NamedTuple):
    implementation: str
    timed: str
    part: str


def _run_parts(case: Case, options: Options, clock: Clock) -> list[dict | ways.Absent]:
    """Each part of a step by itself, and its products beside them; the check is of all of them together."""
    if options.only is not None and ways.OURS not in options.only:
        return []
    layer = modules.make(case, options.device, options.dtype, options.seed, options.size)
    step = modules.Parts(layer)
    check = layer.check(step.run_all())
    if check.fault is not None:
        whole = _Part(ways.OURS, ways.CALL, "whole step")
        return [_row(case, whole, check, layer.work, None, "mismatch", check.fault)]
    passed = [(_Part(ways.OURS, ways.CALL, part), check, Call(call)) for part, call in step.calls.items()]
    products = _Part("torch", ways.CALL, modules.PRODUCTS)
    check = layer.check(step.products())
    if check.fault is not None:
        return [_row(case, products, check, layer.work, None, "mismatch", check.fault)]
    return _timed(case, [*passed, (products, check, Call(step.products))], None, options, clock)
