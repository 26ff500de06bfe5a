"""What a problem is: the tensors of a case, the work that is in them, and the comparison with float64 on the CPU.

Where float64 over everything would take minutes, a few requests (and, in prefill, heads) are compared, spread over the
batch; `Check.said` tells which.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch

from bench_rows import counting
from bench_rows.cases import Case
from ntops_mla.testing import DECODE_LSE, Tolerance, assert_close, cos_diff

LATENT, ROPE, NOPE, V = 512, 64, 128, 128
WIDTH = LATENT + ROPE
# FlashMLA's scale: its tests and some peers know no other.
DECODE_SCALE = WIDTH**-0.5
PREFILL_SCALE = (NOPE + ROPE) ** -0.5
EPS = 1e-6
# An op without a softmax; what a peer rounds on its way is allowed for.
ELEMENTS = Tolerance(8e-4, 2.01 / 128, 5e-6)
# FLOP that a comparison may cost on the CPU: some seconds of float64.
CHECK_FLOP = {"device": 4e10, "cpu": 4e9, "quick": 4e8}


class Check(NamedTuple):
    """How far a result is from float64, over what, and what is wrong with it (None: nothing)."""

    max_error: float | None
    cos_diff: float | None
    said: str
    fault: str | None


def chosen(count: int, budget: float, each: float) -> list[int]:
    """Which of `count` things are compared when one costs `each` FLOP: at least one, spread from first to last."""
    many = max(1, min(count, int(budget // max(1, each))))
    return [0] if many == 1 else sorted({round(i * (count - 1) / (many - 1)) for i in range(many)})


def seed_of(case: Case, seed: int) -> int:
    """The same inputs for a case in every run with the same seed, whatever else is timed."""
    return (seed + zlib.crc32(f"{case.kind}/{case.name}".encode())) % (1 << 31)


class Problem:
    """`case`, `work`, tensors; `check(result)` compares a result, or a (result, lse), with float64."""

    work: counting.Work
    tolerance = ELEMENTS
    lse_tolerance = DECODE_LSE

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, budget: float) -> None:
        self.case, self.device, self.dtype, self.budget = case, device, dtype, budget
        self._expected: tuple | None = None

    def small(self, *shape: int) -> torch.Tensor:
        """randn / 10 within +-1, FlashMLA's inputs."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).div_(10).clamp_(-1, 1)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """Float64 result and lse of what is compared, and its name."""
        raise NotImplementedError

    def reset(self) -> None:
        """Put back what a run changes in its inputs: called before each check."""

    def picked(self, out: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The part of a result that is compared."""
        return out, lse

    def check(self, result: object) -> Check:
        """Compare; never raises for a wrong result."""
        if self._expected is None:
            self._expected = self.expected()
        want, want_lse, said = self._expected
        out, lse = result if isinstance(result, tuple) else (result, None)
        out, lse = self.picked(out, lse)
        try:
            assert_close(out, want, self.tolerance, "out")
            if lse is not None and want_lse is not None:
                assert_close(lse, want_lse, self.lse_tolerance, "lse")
            fault = None
        except AssertionError as error:
            fault = str(error)
        out = out.detach().cpu().double()
        if out.shape != want.shape or not torch.isfinite(out).all():
            return Check(None, None, said, fault)
        return Check((out - want).abs().max().item(), cos_diff(out, want), said, fault)
