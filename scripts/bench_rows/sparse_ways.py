"""How this library runs attention by indices and over the fp8 cache, and plain PyTorch beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench_rows.problem import DECODE_SCALE, LATENT, WIDTH
from ntops_mla import flash_mla, ops


def call(problem) -> tuple[Callable[[], object], Callable[[], str]]:
    """The public call of a case, and which backend it takes."""
    kind, args = problem.case.kind, problem.args
    if kind == "decode_fp8":
        return lambda: ops.mla_decode_fp8(*args), lambda: ops.mla_decode_fp8.explain(*args).backend
    op = ops.mla_sparse_fp8 if problem.fp8 else ops.mla_sparse
    backend = lambda: op.explain(*args).backend  # noqa: E731
    if kind == "sparse":
        return lambda: op(*args)[:2], backend

    def prefill():
        out, _, lse = flash_mla.flash_mla_sparse_fwd(*problem.arguments)
        return out[None], lse[None]

    return prefill, backend


def gathered(problem) -> dict[str, Callable[[], object]]:
    """Plain PyTorch on a CPU: gather, then a batched product, softmax and product, or scaled_dot_product_attention."""
    index = problem.indices.flatten().long()
    shape = (*problem.indices.shape, WIDTH)

    def keys():
        if problem.case.kind == "sparse" and problem.fp8:
            # The rows are gathered as bytes, as the library does: to dequantise the whole cache would be unfair.
            rows = problem.bytes.view(-1, problem.bytes.shape[-1]).index_select(0, index)
            return problem.dequantize(rows).view(shape).flatten(0, 1)
        return problem.cache.view(-1, WIDTH).index_select(0, index).view(shape).flatten(0, 1)

    def bmm():
        k, q = keys(), problem.q.flatten(0, 1)
        weights = (torch.bmm(q, k.transpose(1, 2)) * DECODE_SCALE).softmax(-1)
        return torch.bmm(weights, k[..., :LATENT]).view(*problem.q.shape[:3], LATENT)

    def sdpa():
        k, q = keys()[:, None], problem.q.flatten(0, 1)[:, None]
        out = F.scaled_dot_product_attention(q, k, k, scale=DECODE_SCALE)[:, 0, :, :LATENT]
        return out.reshape(*problem.q.shape[:3], LATENT)

    return {"gather + bmm": bmm, "gather + sdpa": sdpa}
