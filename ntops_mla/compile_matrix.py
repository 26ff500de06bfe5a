"""Every kernel with every platform's tiles, compiled for the platform's targets, and held against its limits.

What is compiled is what an op would launch: the op runs on tensors without memory, and its launches are caught. A
target that public Triton does not know (MUSA, MACA, CoreX) is replaced by the nearest one that it does, and the row
says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ntops_mla import kernel as kernels
from ntops_mla import ops
from ntops_mla.board import Board, first_line, too_old
from ntops_mla.cross_compile import TARGETS, Compiled, Target, compile_for, least_products
from ntops_mla.platform import Limits, Platform, all_platforms, dtype_name, version_pair

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Calls that between them meet every tile: `common` always, `rest` with --all. An op not listed: its own example.
_COMMON: dict[str, tuple[dict[str, int], ...]] = {
    "rms_norm": ({"kv_lora_rank": 512}, {"kv_lora_rank": 1536}, {"kv_lora_rank": 7168}),
    "rope": ({"heads": 16}, {"heads": 128}),
    "latent_append": ({}, {"q_heads": 16}),
    "latent_append_fp8": ({}, {"q_heads": 16}),
    "mla_decode": (
        {"heads": 16},
        {"heads": 32},
        {"heads": 128},
        {"heads": 40, "kv_lora_rank": 256, "rope": 32},
        {"heads": 64, "s_q": 2},
    ),
    "mla_decode_fp8": ({"heads": 16}, {"heads": 32}, {"heads": 128}, {"heads": 64, "s_q": 2}),
    "mla_prefill": ({"heads": 16}, {"heads": 16, "nope": 192, "v": 256}),
    "mla_sparse_fp8": ({"heads": 16}, {"heads": 128}),
    "mla_sparse": ({"heads": 16}, {"heads": 32}, {"heads": 128}, {"heads": 40, "kv_lora_rank": 256, "rope": 32}),
}
_REST: dict[str, tuple[dict[str, int], ...]] = {
    "rms_norm": ({"kv_lora_rank": 256}, {"kv_lora_rank": 16384}),
    "rope": ({"heads": 1}, {"heads": 40, "rope": 32}),
    "latent_append": tuple({"page_size": size} for size in (16, 32, 128))
    + (
        {"kv_lora_rank": 256, "rope": 32},
        {"kv_lora_rank": 256, "rope": 32, "q_heads": 40},
        {"page_size": 16, "q_heads": 128},
    ),
    "latent_append_fp8": ({"page_size": 1}, {"page_size": 128}, {"page_size": 1, "q_heads": 128}),
    "latent_quantize": ({"page_size": 1}, {"page_size": 128}),
    "latent_dequantize": ({"page_size": 1}, {"page_size": 128}),
    "mla_decode": tuple(
        {"heads": heads, "page_size": size} for heads, size in itertools.product((16, 32, 128), (16, 32, 128))
    )
    + ({"heads": 8, "s_q": 2}, {"heads": 16, "s_q": 2}, {"heads": 16, "kv_lora_rank": 256, "rope": 32}),
    "mla_decode_fp8": tuple(
        {"heads": heads, "page_size": size} for heads, size in itertools.product((16, 32, 128), (16, 32, 128))
    )
    + ({"heads": 8, "s_q": 2}, {"heads": 16, "s_q": 2}),
    "mla_prefill": (),
    "mla_sparse": ({"heads": 16, "kv_lora_rank": 256, "rope": 32},),
}

# Kernels that write a split's part or the result.
_SPLIT = ("mla_decode", "mla_sparse", "mla_decode_fp8", "mla_sparse_fp8")


@dataclass(frozen=True)
class Case:
    """One op, for one architecture of a platform, on a target that is its own or a stand-in."""

    platform: Platform
    limits: Limits
    target: Target
    stand_in: bool
    op: str
    dtype: torch.dtype
    sizes: dict[str, int]


def cases(platforms: list[Platform], names: list[str], everything: bool = False) -> Iterator[Case]:
    """bfloat16 and the common calls; `everything`: all dtypes and calls."""
    for platform in platforms:
        for limits in platform.limits:
            own = str(limits.triton_target.value) if limits.triton_target else None
            for target in [own] if own in TARGETS else limits.stand_ins:
                for name in names:
                    calls = _COMMON.get(name, ({},)) + (_REST.get(name, ()) if everything else ())
                    dtypes = ops.get(name).tried_in(DTYPES if everything else DTYPES[:1])
                    for dtype, sizes in itertools.product(dtypes, calls):
                        yield Case(platform, limits, TARGETS[target], target != own, name, dtype, sizes)


def compile_case(case: Case) -> list[tuple[dict[str, Any], Compiled | None, str]]:
    """(row, what came out, generated source) of each kernel that the op launches; none without a gate or a tile."""
    import triton

    op = ops.get(case.op)
    args = op.example(torch.device("meta"), case.dtype, tokens=4, **case.sizes)
    version = version_pair(triton.__version__)
    board = Board(case.platform, case.limits, version, processors=128)
    gate = case.platform.gate(case.op, case.dtype)
    key = op.spec.key(*args)
    if too_old(case.platform, case.limits, version) is not None:
        return []
    if gate.mode != "native" or op.spec.supports(case.platform, *key) is not None:
        return []
    if any(needed.tile is None for needed in op.spec.tiles(board, *key)):
        return []
    with kernels.capture() as launches:
        op.spec.kernel(board, *args)
        # The examples are short: one split, written by the kernel itself.
        if case.op in ("mla_decode", "mla_decode_fp8"):
            op.spec.kernel(board, *args[:-2], 4, None)
            op.spec.kernel(board, *args[:-1], torch.empty(12, 4, dtype=torch.int32, device="meta"))
        if case.op == "mla_prefill":
            op.spec.kernel(board, *args[:-2], False, True)
        if case.op in ("mla_sparse", "mla_sparse_fp8"):  # with the largest scores, and with pages apart, too
            op.spec.kernel(board, *args[:-2], 4, True)
            apart = op.example(torch.device("meta"), case.dtype, tokens=4, **case.sizes, gap=1)
            op.spec.kernel(board, *apart[:-2], 1, True)
            op.spec.kernel(board, *apart[:-2], 4, False)
    return [_compile(case, triton.__version__, kernel, arguments) for kernel, arguments in launches]


def _compile(case: Case, triton_version: str, kernel: kernels.Kernel, args: tuple) -> tuple:
    given = dict(zip(kernel.arguments, args, strict=True))
    row = {
        "op": case.op,
        "kernel": kernel.name,
        "platform": case.platform.name,
        "arch": case.limits.arch,
        "target": str(case.target),
        "stand_in": case.stand_in,
        "triton": triton_version,
        "dtype": dtype_name(case.dtype),
        "sizes": case.sizes,
        # a split's part is float32, a result has the inputs' dtype
        "causal": given.get("causal"),
        "split": given["out"].dtype == torch.float32 if kernel.name in _SPLIT else None,
        "flat": given.get("flat"),
        "planned": given.get("planned"),
        "want_max": given.get("want_max"),
        "tile": {**kernel.parameters, "num_warps": kernel.num_warps, "num_stages": kernel.num_stages},
    }
    try:
        compiled = compile_for(kernel, args, case.target)
    except Exception as error:  # whatever a compiler raises is the finding
        problem = f"does not compile: {type(error).__name__}: {first_line(error)[:200]}"
        return {**row, "problems": [problem]}, None, kernel.source
    numbers = {
        name: getattr(compiled, name)
        for name in (
            "registers", "spill_bytes", "shared_bytes", "programs", "products", "asynchronous", "async_copies",
        )
    }  # fmt: skip
    return {**row, **numbers, "problems": _problems(case, kernel, compiled)}, compiled, kernel.source


def _problems(case: Case, kernel: kernels.Kernel, compiled: Compiled) -> list[str]:
    """Why this tile must not be shipped."""
    problems = []
    if compiled.spill_bytes:
        problems.append(f"spills {compiled.spill_bytes} bytes")
    shared, warps = case.limits.shared_memory.value or _smallest_shared_memory(), case.limits.max_warps.value
    if compiled.shared_bytes > shared:
        problems.append(f"{compiled.shared_bytes} bytes of shared memory, the limit is {shared}")
    if warps is not None and kernel.num_warps > warps:
        problems.append(f"{kernel.num_warps} warps, the limit is {warps}")
    least = least_products(kernel, case.target, case.dtype, compiled.asynchronous > 0)
    if compiled.products < least:
        problems.append(f"{compiled.products} matrix instructions where {least} are the least")
    return problems


def _smallest_shared_memory() -> int:
    """Bytes of the board that is known to have least: what is safe where nobody told."""
    known = (limits.shared_memory.value for platform in all_platforms().values() for limits in platform.limits)
    return min(value for value in known if value is not None)
