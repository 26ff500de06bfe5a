"""deepseek-ai/FlashMLA, and its vendors' forks under the same name. Source: flash_mla/flash_mla_interface.py."""

from __future__ import annotations

import importlib
import inspect

import torch

from bench_rows.peers.base import Peer
from bench_rows.problem import DECODE_SCALE, LATENT, PREFILL_SCALE


class FlashMLA(Peer):
    """flash_mla_with_kvcache for decode, flash_attn_varlen_func (sm_100 only) for prefill."""

    name = "flash_mla"
    module = "flash_mla"
    names = ("get_mla_metadata", "flash_mla_with_kvcache")
    kinds = ("decode", "prefill", "sparse", "sparse_prefill")
    note = "scheduling metadata made before, as its users do once a step"

    def unsupported(self, problem):
        kind = problem.case.kind
        if kind == "sparse" and not problem.fp8:
            return "flash_mla's sparse decode reads fp8 caches alone"
        wanted = {"prefill": "flash_attn_varlen_func", "sparse_prefill": "flash_mla_sparse_fwd"}.get(kind)
        if wanted and not hasattr(importlib.import_module("flash_mla"), wanted):
            return f"this flash_mla has no {wanted}"
        return None

    def sparse(self, problem):
        flash_mla = importlib.import_module("flash_mla")
        batch, s_q, heads, _ = problem.q.shape
        if _takes_no_arguments(flash_mla.get_mla_metadata):
            metadata = flash_mla.get_mla_metadata()
        else:
            lengths = torch.full((batch,), problem.indices.shape[2], dtype=torch.int32, device=problem.device)
            metadata = flash_mla.get_mla_metadata(lengths, s_q * heads, 1, heads, True, problem.indices.shape[2])
        cache = problem.bytes.view(torch.float8_e4m3fn)[:, :, None]
        args = (problem.q, cache, None, None, LATENT, *metadata)
        options = {"softmax_scale": DECODE_SCALE, "is_fp8_kvcache": True, "indices": problem.indices}

        def run():
            out, lse = flash_mla.flash_mla_with_kvcache(*args, **options)
            return out, lse.transpose(1, 2)

        return run

    def sparse_prefill(self, problem):
        function = importlib.import_module("flash_mla").flash_mla_sparse_fwd

        def run():
            out, _, lse = function(*problem.arguments)
            return out[None], lse[None]

        return run

    def decode(self, problem):
        flash_mla = importlib.import_module("flash_mla")
        if _takes_no_arguments(flash_mla.get_mla_metadata):
            metadata = flash_mla.get_mla_metadata()
        else:  # the first releases, which the vendors' forks follow
            metadata = flash_mla.get_mla_metadata(problem.seq_lens, problem.s_q * problem.heads, 1)
        cache = problem.cache[:, :, None]
        args = (problem.q, cache, problem.block_table, problem.seq_lens, LATENT, *metadata)
        options = {"softmax_scale": DECODE_SCALE, "causal": problem.causal}
        return lambda: flash_mla.flash_mla_with_kvcache(*args, **options)

    def prefill(self, problem):
        function = importlib.import_module("flash_mla").flash_attn_varlen_func
        args = (
            problem.q, problem.k, problem.v, problem.cu_seqlens_q, problem.cu_seqlens_k, max(problem.new),
            max(problem.keys),
        )  # fmt: skip
        return lambda: function(*args, softmax_scale=PREFILL_SCALE, causal=True)[0]


def _takes_no_arguments(function) -> bool:
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return all(kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for kind in kinds)
