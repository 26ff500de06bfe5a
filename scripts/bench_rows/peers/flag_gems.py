"""FlagGems's flash_mla, the other Triton kernel. Source: flagos-ai/FlagGems src/flag_gems/fused/flash_mla.py."""

from __future__ import annotations

import importlib

from bench_rows.cases import PAGE
from bench_rows.peers.base import Peer
from bench_rows.problem import LATENT, WIDTH


class FlagGems(Peer):
    """One query row a request; it scales by 576 ** -0.5, which is the scale of these cases."""

    name = "flag_gems"
    module = "flag_gems"
    names = ("flash_mla",)
    kinds = ("decode",)

    def unsupported(self, problem):
        if problem.s_q != 1:
            return f"flag_gems.flash_mla attends one query row a request, not {problem.s_q}"
        return None

    def decode(self, problem):
        function = importlib.import_module("flag_gems").flash_mla
        longest = -(-max(problem.lengths) // 256) * 256
        args = (
            problem.q, problem.block_table, problem.cache, longest, PAGE, len(problem.lengths), problem.s_q,
            problem.seq_lens, problem.heads, 1, WIDTH, LATENT, True,
        )  # fmt: skip
        return lambda: function(*args)
