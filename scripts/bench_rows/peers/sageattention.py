"""thu-ml/SageAttention. Source: sageattention/core.py: heads of at most 128 columns, one width for key and value."""

from __future__ import annotations

from bench_rows.peers.base import Peer
from bench_rows.problem import NOPE, ROPE, V


class SageAttention(Peer):
    """Here so that its absence has a reason: MLA's expanded keys are too wide for it, absorbed ones all the more."""

    name = "sageattention"
    module = "sageattention"
    names = ("sageattn",)
    kinds = ("prefill",)

    def unsupported(self, problem):
        return f"sageattn takes heads of at most 128 columns and one width, and these have {NOPE + ROPE} and {V}"
