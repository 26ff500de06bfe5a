"""flashinfer's wrappers. Source: docs.flashinfer.ai, api/mla.html and api/prefill.html."""

from __future__ import annotations

import importlib

import torch

from bench_rows.cases import PAGE
from bench_rows.peers.base import Peer
from bench_rows.problem import DECODE_SCALE, LATENT, NOPE, PREFILL_SCALE, ROPE, V

_WORKSPACE = 128 << 20


class FlashInfer(Peer):
    """BatchMLAPagedAttentionWrapper for decode, BatchPrefillWithRaggedKVCacheWrapper for prefill."""

    name = "flashinfer"
    module = "flashinfer"
    names = ("mla", "prefill")
    kinds = ("decode", "prefill")
    note = "run() alone; plan() before, as its users do once a step"

    def decode(self, problem):
        flashinfer = importlib.import_module("flashinfer")
        device, batch = problem.device, len(problem.lengths)
        pages = [-(-length // PAGE) for length in problem.lengths]
        bounds = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        indices = torch.cat([row[:count] for row, count in zip(problem.block_table, pages)])
        q_bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * problem.s_q
        wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
            torch.empty(_WORKSPACE, dtype=torch.int8, device=device), backend="auto"
        )
        wrapper.plan(
            q_bounds, bounds, indices, problem.seq_lens, problem.heads, LATENT, ROPE, PAGE, problem.causal,
            DECODE_SCALE, problem.dtype, problem.dtype,
        )  # fmt: skip
        q, cache = problem.q.flatten(0, 1), problem.cache
        args = (q[..., :LATENT], q[..., LATENT:], cache[..., :LATENT], cache[..., LATENT:])
        return lambda: wrapper.run(*args).view(batch, problem.s_q, problem.heads, LATENT)

    def prefill(self, problem):
        flashinfer = importlib.import_module("flashinfer")
        wrapper = flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper(
            torch.empty(_WORKSPACE, dtype=torch.int8, device=problem.device), "NHD"
        )
        wrapper.plan(
            problem.cu_seqlens_q, problem.cu_seqlens_k, problem.heads, problem.heads, NOPE + ROPE, head_dim_vo=V,
            causal=True, sm_scale=PREFILL_SCALE, q_data_type=problem.dtype,
        )  # fmt: skip
        return lambda: wrapper.run(problem.q, problem.k, problem.v)
