"""Tiles timed on the board at hand: what is tried, what is left out and why, and what replaces the platform's tile.

Nothing here runs where kernels are used: `python -m ntops_mla tune` writes a table, which boards read (tile_table.py).
A tile is tried in a process of its own before this one touches it (tuning_trial.py).
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ntops_mla import checkout, child, dispatch, doctor, ops, tile_table
from ntops_mla.board import Board
from ntops_mla.findings import Findings
from ntops_mla.platform import Tile, dtype_name
from ntops_mla.tuning_trial import Case, Clock, Load, launches, timed_call, with_tile
from ntops_mla.version import __version__

DTYPES = doctor.DTYPES
WARMUPS, ROUNDS = 5, 40  # of each candidate

# What a kernel's numbers may be; a candidate keeps near to the platform's tile: a block within a factor of 4, warps
# within a factor of 2, one stage more or less, and no more than two of them other than the platform's.
_ABSORBED = ("mla_decode", "mla_sparse", "mla_decode_fp8", "mla_sparse_fp8")
_BLOCKS = {
    **{kernel: {"block_h": (16, 32, 64), "block_n": (16, 32, 64)} for kernel in _ABSORBED},
    "mla_prefill": {"block_m": (16, 32, 64, 128), "block_n": (16, 32, 64)},
    "rope": {"block_h": (8, 16, 32)},
    "latent_append_rope": {"block_h": (8, 16, 32)},
    "latent_append_fp8_rope": {"block_h": (8, 16, 32)},
}
_WARPS = dict.fromkeys((*_ABSORBED, "mla_prefill"), (4, 8))
_OTHER_WARPS = (1, 2, 4, 8, 16)
_STAGES = dict.fromkeys((*_ABSORBED, "mla_prefill"), (1, 2, 3))
_CHANGED = 2
# float32 values of its accumulators that a thread can hold at most: NVIDIA's limit, and nobody's is known to be lower
_REGISTERS = 255


def cases(dtypes: Iterable[torch.dtype], chosen: Sequence[str] | None = None) -> Iterator[Case]:
    """What is tuned: each kernel of the ops in `chosen` (None: all) at the sizes of the models, in each dtype."""
    for dtype in dtypes:
        for case in _cases(dtype):
            if chosen is None or case.op in chosen:
                yield case


def op_names() -> list[str]:
    """The ops whose kernels have tiles to choose from."""
    return list(dict.fromkeys(case.op for dtype in DTYPES for case in _cases(dtype)))


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for width in (512, 1536, 7168):
        yield Case("rms_norm", "rms_norm", dtype, {"kv_lora_rank": width}, {"width": width})
    for width in (64, 32):
        yield Case("rope", "rope", dtype, {"heads": 128, "rope": width}, {"width": width})
    for sizes in _LATENTS:
        point = {"latent": sizes["kv_lora_rank"]}
        yield Case("latent_append", "latent_append", dtype, sizes, point)
        yield Case("latent_append_rope", "latent_append", dtype, {**sizes, "q_heads": 128}, point)
        for heads, rows in _ROWS:
            point = {"rows": heads, "latent": sizes["kv_lora_rank"], "page_size": 64, "causal": 0}
            yield Case("mla_decode", "mla_decode", dtype, {**sizes, "heads": heads}, point, {"rows": rows})
            point = {"rows": heads, "latent": sizes["kv_lora_rank"]}
            yield Case("mla_sparse", "mla_sparse", dtype, {**sizes, "heads": heads}, point, {"rows": rows})
        point = {"latent": sizes["kv_lora_rank"]}
        yield Case("mla_combine", "mla_decode", dtype, {**sizes, "heads": 128}, point)
    for heads, rows in _ROWS:
        call = {**_LATENTS[0], "heads": heads}
        point = {"rows": heads, "page_size": 64, "causal": 0}
        yield Case("mla_decode_fp8", "mla_decode_fp8", dtype, call, point, {"rows": rows})
        yield Case("mla_sparse_fp8", "mla_sparse_fp8", dtype, call, {"rows": heads}, {"rows": rows})
    for name in ("latent_append_fp8", "latent_quantize", "latent_dequantize"):
        yield Case(name, name, dtype, {}, {})
    yield Case("latent_append_fp8_rope", "latent_append_fp8", dtype, {"q_heads": 128}, {})
    for sizes in ({"nope": 128, "v": 128}, {"nope": 192, "v": 256}):
        width = sizes["nope"] + 64
        yield Case("mla_prefill", "mla_prefill", dtype, {**sizes, "heads": 32}, {"width": width})


# Heads of a call, and the rows that its tile is for
_ROWS = ((16, (1, 16)), (32, (17, 32)), (128, (33, None)))
_LATENTS = ({"kv_lora_rank": 512, "rope": 64}, {"kv_lora_rank": 256, "rope": 32})


# Candidates


@dataclass(frozen=True)
class Plan:
    """What is tried for a case. `own`: the platform's tile, None where it has none or may not run; it comes first in
    `tiles`. `left_out`: candidates and why they are not tried."""

    case: Case
    own: Tile | None
    tiles: tuple[Tile, ...]
    left_out: tuple[tuple[Tile, str], ...] = ()
    problem: str | None = None  # why nothing is tried at all


def plan(board: Board, case: Case, found: Findings | None = None, shared_memory: int | None = None) -> Plan:
    """The candidates of a case on a board. shared_memory: what the driver says, where the platform's file does not."""
    platform, arch = board.platform, board.limits and board.limits.arch
    op = ops.get(case.op).spec
    gate = dispatch._gate(op, platform, case.dtype, False, found)
    if gate.mode != "native":
        return Plan(case, None, (), problem=f"gate of {platform.name}: {gate.mode}: {gate.reason}")
    board = replace(board, tiles=())
    own = board.tile(case.kernel, case.dtype, **case.point)
    # With a Triton that the platform has no tile for, look around the tile for another one.
    centre = own or platform.tile(case.kernel, arch, case.dtype, None, **case.point)
    if centre is None:
        return Plan(case, None, (), problem=f"no tile in platforms/{platform.name}.py to begin with")
    known = board.limits and board.limits.shared_memory.value
    key = op.key(*timed_call(case, Load(), torch.device("meta")))
    tried, left_out, allowed = [], [], None
    for tile in _around(centre):
        is_own = own is not None and tile.blocks == own.blocks and _launch(tile) == _launch(own)
        # The platform's tile is what would run: only dispatch may refuse it.
        why_not = None if is_own else _pointless(board, case, tile, known or shared_memory)
        # What dispatch would not launch is never tried.
        refusals = [why_not] if why_not else dispatch._limits(op, with_tile(board, case, tile), *key, found)
        if refusals:
            left_out.append((tile, refusals[0]))
            continue
        tried.append(tile)
        if is_own:
            allowed = tile
    return Plan(case, allowed, tuple(tried), tuple(left_out))


def _launch(tile: Tile) -> tuple[int, int]:
    return tile.num_warps, tile.num_stages


def _around(centre: Tile) -> Iterator[Tile]:
    """Tiles near `centre`, itself first, then by how many of its numbers they change."""
    kernel = centre.kernel
    values = {
        name: [n for n in _BLOCKS.get(kernel, {}).get(name, ()) if value <= 4 * n and n <= 4 * value]
        for name, value in centre.blocks.items()
    }
    warps, stages = centre.num_warps, centre.num_stages
    values["num_warps"] = [n for n in _WARPS.get(kernel, _OTHER_WARPS) if warps <= 2 * n and n <= 2 * warps]
    values["num_stages"] = [n for n in _STAGES.get(kernel, ()) if abs(n - stages) <= 1]
    base = {**centre.blocks, "num_warps": warps, "num_stages": stages}
    grid = [
        dict(zip(base, numbers))
        for numbers in itertools.product(*(dict.fromkeys([value, *values[name]]) for name, value in base.items()))
    ]
    for changed in range(_CHANGED + 1):
        for numbers in grid:
            if sum(numbers[name] != base[name] for name in base) == changed:
                blocks = {name: numbers[name] for name in centre.blocks}
                yield Tile(kernel, blocks, numbers["num_warps"], numbers["num_stages"], "a candidate of tune")


def _pointless(board: Board, case: Case, tile: Tile, shared_memory: int | None) -> str | None:
    """Why a tile cannot be good, by arithmetic alone; None where it may be."""
    blocks, size = tile.blocks, case.dtype.itemsize
    if case.kernel in _ABSORBED:
        least = board.limits and board.limits.least_product and board.limits.least_product.value
        if blocks["block_h"] > max(16, least or 0, case.point["rows"]):
            return f"{blocks['block_h']} rows, of which the call has {case.point['rows']}"
        sums = blocks["block_h"] * case.call["kv_lora_rank"]
        keys = blocks["block_n"] * (case.call["kv_lora_rank"] + case.call["rope"]) * size
    elif case.kernel == "mla_prefill":
        sums, keys = blocks["block_m"] * case.call["v"], blocks["block_n"] * case.point["width"] * size
    else:
        return None
    threads = tile.num_warps * int((board.limits and board.limits.lanes.value) or 32)
    if sums > _REGISTERS * threads:
        return f"the accumulators are {sums // threads} registers a thread"
    if shared_memory is not None and keys > shared_memory:
        return f"a tile of keys takes {keys} bytes of shared memory, and there are {shared_memory}"
    return None


# Trying and timing


class Times(NamedTuple):
    """Microseconds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return self.high - self.low


@dataclass
class Candidate:
    """A tile that was tried: what came of it, and its times where it worked."""

    tile: Tile
    works: bool
    reason: str
    spills: int | None
    times: Times | None = None


@dataclass
class Result:
    """A case's candidates; `before`: the platform's tile, `best`: what takes its place, None: nothing does."""

    plan: Plan
    candidates: list[Candidate]
    before: Candidate | None
    best: Candidate | None


def tune(
    board: Board,
    device: torch.device,
    one: Plan,
    load: Load,
    timeout: float = doctor.TIMEOUT,
    step: Callable[[], None] = lambda: None,
) -> Result:
    """Try each tile of a plan, then time those that work; `step` is called after each trial."""
    tried = []
    for tile in one.tiles:
        answer = trial(one.case, tile, load, device, timeout)
        candidate = Candidate(tile, answer["works"], answer["reason"], answer.get("spills"))
        if candidate.spills and tile is not one.own:  # the platform's tile is timed, since it is what would run
            candidate.works, candidate.reason = False, f"spills {candidate.spills} registers"
        tried.append(candidate)
        step()
    working = [candidate for candidate in tried if candidate.works]
    before = next((candidate for candidate in working if candidate.tile is one.own), None)
    if not working or working == [before]:  # nothing to compare
        return Result(one, tried, before, None)
    args = timed_call(one.case, load, device)
    works = [_work(with_tile(board, one.case, candidate.tile), one.case, args) for candidate in working]
    for candidate, times in zip(working, take_turns(works, Clock(device))):
        candidate.times = times
    others = [candidate for candidate in working if candidate is not before]
    return Result(one, tried, before, winner(before, others))


def trial(case: Case, tile: Tile, load: Load, device: torch.device, timeout: float) -> dict[str, Any]:
    """What a process of its own says of a tile (`tuning_trial.examine`)."""
    question = {"case": case.data(), "tile": tile_data(tile), "load": load._asdict(), "device": str(device)}
    environment = {name: value for name, value in os.environ.items() if name != tile_table.VARIABLE}
    return child.ask(["tune", "--child", json.dumps(question)], environment, timeout)


def _work(board: Board, case: Case, args: tuple) -> Callable[[], None]:
    made = launches(board, case, args)

    def work() -> None:
        for kernel, given in made:
            kernel(*given)

    return work


def take_turns(works: Sequence[Callable[[], None]], clock: Callable[[Callable[[], None]], float]) -> list[Times]:
    """The times of each piece of work. They take turns, so that a board that warms up or throttles is so to all."""
    for work in works:
        for _ in range(WARMUPS):
            clock(work)
    samples: list[list[float]] = [[] for _ in works]
    for turn in range(ROUNDS):
        for place in range(len(works)):
            index = (turn + place) % len(works)
            samples[index].append(clock(works[index]))
    quartiles = (statistics.quantiles(taken, n=4, method="inclusive") for taken in samples)
    return [Times(median, low, high) for low, median, high in quartiles]


def winner(before: Candidate | None, others: Sequence[Candidate]) -> Candidate | None:
    """The fastest, if it is faster than the platform's tile by more than either of the two spreads."""
    best = min(others, key=lambda candidate: candidate.times.median, default=None)
    if best is None or before is None:  # the platform's tile does not work here: any that does is better
        return best
    gain = before.times.median - best.times.median
    return best if gain > max(before.times.spread, best.times.spread) else None


# The table


def table(board: Board, results: Iterable[Result], load: Load) -> dict[str, Any]:
    """The table of what won, as `tile_table` reads it."""
    return {
        "platform": board.platform.name,
        "device": board.device,
        "triton": board.triton_version,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "rows": [_row(result, load) for result in results if result.best is not None],
    }


def _row(result: Result, load: Load) -> dict[str, Any]:
    case, before = result.plan.case, result.before
    return {
        "kernel": case.kernel,
        **_timed(result.best),
        "dtypes": [dtype_name(case.dtype)],
        "when": {name: list(ends) for name, ends in case.when.items()},
        "before": None if before is None else _timed(before),
        "load": {**case.call, **load._asdict()},
    }


def _timed(candidate: Candidate) -> dict[str, Any]:
    times = candidate.times
    return {
        **tile_data(candidate.tile), "microseconds": round(times.median, 3), "spread": round(times.spread, 3),
    }  # fmt: skip


def tile_data(tile: Tile) -> dict[str, Any]:
    """A tile's numbers, as they are written."""
    return {"blocks": dict(tile.blocks), "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _commit() -> str:
    try:
        return checkout.commit(checkout.root())
    except ValueError:  # installed without the repository
        return f"release {__version__}"


def write(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    """Write a table, whole or not at all."""
    tile_table.parse(data)  # never one that cannot be read back
    checkout.write({path: json.dumps(data, indent=1) + "\n"})
