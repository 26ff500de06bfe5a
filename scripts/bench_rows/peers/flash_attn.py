"""Dao-AILab/flash-attention: the second version (`flash_attn`) and the third (`flash_attn_interface`, Hopper)."""

from __future__ import annotations

import importlib

from bench_rows.peers.base import Peer
from bench_rows.problem import NOPE, PREFILL_SCALE, ROPE, V
from ntops_mla.ops._attention import widen


def _arguments(problem, v) -> tuple:
    return (
        problem.q, problem.k, v, problem.cu_seqlens_q, problem.cu_seqlens_k, max(problem.new), max(problem.keys)
    )  # fmt: skip


class FlashAttention2(Peer):
    """flash_attn_varlen_func, whose heads have one width: values are padded to the keys'."""

    name = "flash_attn"
    module = "flash_attn"
    names = ("flash_attn_varlen_func",)
    kinds = ("prefill",)
    note = f"values padded from {V} to {NOPE + ROPE} columns before, as it takes one width"

    def prefill(self, problem):
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
        args = _arguments(problem, widen(problem.v, NOPE + ROPE))
        return lambda: function(*args, softmax_scale=PREFILL_SCALE, causal=True)[..., :V]


class FlashAttention3(Peer):
    """The same of the third version, which takes 192 and 128 columns."""

    name = "flash_attn_3"
    module = "flash_attn_interface"
    names = ("flash_attn_varlen_func",)
    kinds = ("prefill",)

    def prefill(self, problem):
        function = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
        args = _arguments(problem, problem.v)

        def run():
            out = function(*args, softmax_scale=PREFILL_SCALE, causal=True)
            return out[0] if isinstance(out, tuple) else out  # earlier releases return the lse too

        return run
