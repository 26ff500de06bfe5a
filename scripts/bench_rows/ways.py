"""How this library runs a case: its public call, the kernels alone where they run, a replayed graph.

What a way times is one of TIMED. The kernels alone go into buffers that are there; the call allocates its results and
passes the dispatcher.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench_rows import graphs, sparse_ways
from bench_rows.cases import PAGE
from bench_rows.problem import EPS, LATENT, ROPE, Problem
from ntops_mla import ops
from ntops_mla.board import board_of
from ntops_mla.devices import detect
from ntops_mla.ops._attention import merge
from ntops_mla.ops.mla_schedule import decode_schedule
from ntops_mla.platform import Tile

OURS, SCHEDULED = "ntops_mla", "by schedule"
KERNEL, BOTH, CALL, GRAPH = "kernel", "kernel + combine", "whole call", "graph replay"
TIMED = (KERNEL, BOTH, CALL, GRAPH)


class Way(NamedTuple):
    """One path of one case. `run` gives a result, or a (result, lse); `read`, where given, is called for the check in
    its place, after `run`. `backend` says which of ours computes, None for others; asked after a run, since a kernel
    that fails falls back. `tile`: its numbers in a sweep."""

    implementation: str
    timed: str
    run: Callable[[], object]
    read: Callable[[], object] | None = None
    backend: Callable[[], str | None] = lambda: None
    tile: dict | None = None
    note: str | None = None


class Absent(NamedTuple):
    """A way that is not there, and why."""

    implementation: str
    timed: str
    reason: str


def _kernel() -> str:
    return "kernel"


def ours(problem: Problem) -> Iterator[Way | Absent]:
    """Ways of this library and of plain PyTorch's formulas for the ops that have them here."""
    yield from _WAYS[problem.case.kind](problem)


def _with_graph(problem: Problem, way: Way) -> Iterator[Way | Absent]:
    """`way`, and its replay."""
    yield way
    reason = graphs.unavailable(problem.device)
    if reason is None and way.backend() == "reference":
        reason = "PyTorch ran, and only kernels are recorded: some of its forms read lengths on the host"
    if reason is not None:
        yield Absent(way.implementation, GRAPH, reason)
        return
    try:
        replay = graphs.record(problem.device, way.run)
    except Exception as error:
        yield Absent(way.implementation, GRAPH, f"recording raised {type(error).__name__}: {error}")
        return
    yield way._replace(timed=GRAPH, run=replay)


def _decode(problem) -> Iterator[Way | Absent]:
    args = problem.args
    backend = lambda: ops.mla_decode.explain(*args).backend  # noqa: E731
    yield from _with_graph(problem, Way(OURS, CALL, lambda: ops.mla_decode(*args), backend=backend))
    heads, keys = problem.args[0].shape[2], problem.block_table.shape[1] * PAGE
    schedule = decode_schedule(problem.seq_lens, problem.s_q * heads, keys)
    if schedule is None:
        yield Absent(SCHEDULED, CALL, "not wanted: one request, short ones, very many, or PyTorch runs")
    else:
        run = lambda: ops.mla_decode(*args, schedule=schedule)  # noqa: E731
        way = Way(SCHEDULED, CALL, run, backend=backend, note="the schedule made before")
        yield from _with_graph(problem, way)
    choice = ops.mla_decode.explain(*args)
    if choice.backend != "kernel":
        yield Absent(OURS, f"{KERNEL}, {BOTH}", choice.reason)
        return
    if board_of(detect(problem.device)).platform.gate("mla_decode", problem.dtype).mode == "float32":
        yield Absent(OURS, f"{KERNEL}, {BOTH}", "this platform casts to float32 around the kernels")
        return
    yield from kernels(problem)


def kernels(problem, tile: Tile | None = None) -> Iterator[Way]:
    """mla_decode's split kernel alone, and with mla_combine, with the platform's tile or another one."""
    module = importlib.import_module("ntops_mla.ops.mla_decode")  # ops.mla_decode is the op
    board = board_of(detect(problem.device))
    q_nope, q_pe, kv_cache, pe_cache, table, seq_lens, scale, causal = problem.args
    batch, s_q, heads, latent = q_nope.shape
    rows, page = s_q * heads, kv_cache.shape[1]
    causal = causal and s_q > 1
    if tile is None:
        made = module._made(board, q_nope.dtype, latent, q_pe.shape[3], page, rows, causal)
    else:
        made = module.made_of(board, tile, q_nope.dtype, latent, q_pe.shape[3], page)
    splits, least = module.plan(board, made, batch, rows, table.shape[1] * page, None)
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=problem.device)
    lse = torch.empty(batch, heads, s_q, dtype=torch.float32, device=problem.device)
    part, part_lse = module.parts(out, splits)
    inputs = (q_nope, q_pe, kv_cache, pe_cache, table, seq_lens, table, scale, least)

    def both():
        module.launch(made, inputs, causal, False, out, lse, part, part_lse)
        return out, lse

    def alone():
        if splits == 1:
            both()
        else:
            made.attend(*inputs, causal, False, made.block_n, part, part_lse, out.flatten(1, 2))

    numbers = None if tile is None else {**tile.blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    note = f"splits {splits}"
    yield Way(OURS, KERNEL, alone, both, _kernel, numbers, note)
    if splits > 1 and tile is None:
        yield Way(OURS, BOTH, both, None, _kernel, numbers, note)


def _combine(problem) -> Iterator[Way | Absent]:
    yield Way("torch", CALL, lambda: _joined(problem))
    board = board_of(detect(problem.device))
    tile = None if board.problem else board.tile("mla_combine", problem.dtype, latent=LATENT)
    if tile is None:
        # What runs in its place: spans are merged one after the other.
        yield Way(OURS, CALL, lambda: _merged(problem), backend=lambda: "reference")
        yield Absent(OURS, KERNEL, board.problem or f"no tile of mla_combine for {problem.dtype} on {board}")
        return
    kernel = board.make("mla_combine", tile, latent=LATENT)
    block_n = 64
    lists = problem.seq_lens, problem.seq_lens[:, None], 1, False, block_n
    args = (problem.part, problem.part_lse, *lists, problem.out, problem.lse.transpose(1, 2))

    def run():
        kernel(*args)
        return problem.out, problem.lse

    yield Way(OURS, KERNEL, run, backend=_kernel)


def _joined(problem):
    lse = problem.part_lse[:, :, 0]
    total = lse.logsumexp(1)
    weights = (lse - total[:, None]).exp()
    out = torch.einsum("bsh,bshc->bhc", weights, problem.part)
    return out[:, None].to(problem.dtype), total[..., None]


def _merged(problem):
    out, lse = problem.part[:, 0], problem.part_lse[:, 0, 0]
    for i in range(1, problem.splits):
        out, lse = merge(out, lse, problem.part[:, i], problem.part_lse[:, i, 0])
    return out[:, None].to(problem.dtype), lse[..., None]


def _prefill(problem) -> Iterator[Way | Absent]:
    args = problem.args
    backend = lambda: ops.mla_prefill.explain(*args).backend  # noqa: E731
    yield from _with_graph(problem, Way(OURS, CALL, lambda: ops.mla_prefill(*args), backend=backend))


def _append(problem) -> Iterator[Way | Absent]:
    args = problem.args
    backend = lambda: ops.latent_append.explain(*args).backend  # noqa: E731
    fused = Way(OURS, CALL, lambda: ops.latent_append(*args), problem.written, backend)
    yield from _with_graph(problem, fused._replace(note="latents and queries in one launch"))

    def apart():
        ops.latent_append(*args[:-1])
        problem.q_pe.copy_(ops.rope(problem.q_pe, problem.cos, problem.sin))

    def unfused():
        latent = ops.rms_norm(problem.kv_a[:, :LATENT], problem.weight, EPS)
        pe = ops.rope(problem.kv_a[:, None, LATENT:], problem.cos, problem.sin)[:, 0]
        problem.cache.view(-1, LATENT + ROPE).index_copy_(0, problem.slots, torch.cat([latent, pe], -1))
        problem.q_pe.copy_(ops.rope(problem.q_pe, problem.cos, problem.sin))

    yield Way("queries apart", CALL, apart, problem.written, backend, None, "latent_append, rope, copy_")
    note = "rms_norm, rope, cat, index_copy_, rope, copy_"
    yield Way("unfused", CALL, unfused, problem.written, backend, None, note)


def _norm(problem) -> Iterator[Way | Absent]:
    backend = lambda: ops.rms_norm.explain(problem.input, problem.weight, EPS).backend  # noqa: E731
    ours = Way(OURS, CALL, lambda: ops.rms_norm(problem.input, problem.weight, EPS), backend=backend)
    yield from _with_graph(problem, ours)
    yield Way("torch", CALL, lambda: F.rms_norm(problem.input, problem.weight.shape, problem.weight, EPS))


def _rope(problem) -> Iterator[Way | Absent]:
    args = problem.q_pe, problem.cos, problem.sin
    ours = Way(OURS, CALL, lambda: ops.rope(*args), backend=lambda: ops.rope.explain(*args).backend)
    yield from _with_graph(problem, ours)
    yield Way("torch", CALL, lambda: _rotated(*args))


def _query(problem) -> Iterator[Way | Absent]:
    x, norm, weight = problem.input, problem.norm, problem.weight
    backend = lambda: ops.rms_norm.explain(x, norm, EPS).backend  # noqa: E731
    ours = Way(OURS, CALL, lambda: F.linear(ops.rms_norm(x, norm, EPS), weight), backend=backend)
    yield from _with_graph(problem, ours)
    folded = (weight * norm).contiguous()

    def scaled():
        scale = (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
        return F.linear(x, folded).mul_(scale)  # in float32, rounded a second time

    note = "q_a's norm folded: its weight into q_b_proj, its scale onto the product"
    yield from _with_graph(problem, Way("norm folded", CALL, scaled, note=note))


def _indexed(problem) -> Iterator[Way | Absent]:
    run, backend = sparse_ways.call(problem)
    yield from _with_graph(problem, Way(OURS, CALL, run, backend=backend))
    if problem.case.kind != "decode_fp8":
        for name, other in sparse_ways.gathered(problem).items():
            yield Way(name, CALL, other, note="plain PyTorch, the result alone")


def _rotated(x, cos, sin):
    """As a model's own code has it: complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2).to(x.dtype)


_WAYS = {
    "decode": _decode,
    "combine": _combine,
    "prefill": _prefill,
    "append": _append,
    "norm": _norm,
    "rope": _rope,
    "query": _query,
    "decode_fp8": _indexed,
    "sparse": _indexed,
    "sparse_prefill": _indexed,
}
