"""Checking every row against float64, then timing the rows in turns."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from attention_rows.scenario import Scenario
from ntops_mla.platform import synchronize
from ntops_mla.testing import Float64MLA, cos_diff

# A layer rounds some six times on its way, so that it stands further from float64 than one op does. Root of cos_diff is
# the error in proportion to the value: 0.7 % for bfloat16, whose unit roundoff is 0.4 %.
COS_DIFF = {torch.bfloat16: 5e-5, torch.float16: 1e-6, torch.float32: 1e-10}
# Largest difference in proportion to the largest value of the reference.
MAX_ERROR = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
DECODE_CHECKS = 3  # passes that are compared, each on a cache that the ones before it have grown


class Check(NamedTuple):
    """Worst of a row's passes against float64: largest difference, cos_diff, and whether both are allowed."""

    max_error: float
    cos_diff: float
    passed: bool


TURN = 10  # passes of a row before the next row has its turn


def inputs(scenario: Scenario, passes: int, hidden_size: int, device, dtype) -> list[torch.Tensor]:
    """Hidden states `[T, hidden]` of each pass."""
    return [torch.randn(scenario.tokens, hidden_size, device=device, dtype=dtype) for _ in range(passes)]


def reference(oracle: Float64MLA, scenario: Scenario, histories, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Float64 outputs of the passes."""
    state = [history if len(history.latent) else None for history in histories]
    outs = []
    for x in xs:
        parts = []
        for request, part in enumerate(x.split(scenario.lengths)):
            out, state[request] = oracle(part, state[request])
            parts.append(out)
        outs.append(torch.cat(parts))
    return outs


def check(row, scenario: Scenario, histories, xs: list[torch.Tensor], expected: list[torch.Tensor]) -> Check:
    """Run the passes from the histories on and compare each."""
    row.start(histories, room=len(xs) * max(scenario.lengths))
    worst_error = worst_cos = 0.0
    passed = True
    for x, want in zip(xs, expected):
        out = row.run(x, scenario.lengths).cpu().double()
        if not torch.isfinite(out).all():
            return Check(float("nan"), float("nan"), False)
        error, difference = (out - want).abs().max().item(), cos_diff(out, want)
        worst_error, worst_cos = max(worst_error, error), max(worst_cos, difference)
        limit = MAX_ERROR[x.dtype] * want.abs().max().item()
        passed = passed and error <= limit and difference <= COS_DIFF[x.dtype]
    return Check(worst_error, worst_cos, passed)


def measure(rows, scenario: Scenario, histories, x: torch.Tensor, warmups: int, runs: int, progress) -> list[float]:
    """Average milliseconds per pass of each row.

    The rows take turns of a few passes, so that what else the machine does meets all of them, and each still finds its
    own data in the caches; the average is that of the middle half of the passes, which a disturbed pass does not enter.
    Prefill rewinds after each pass (not timed); decode feeds each row's output back to it. A pass includes its planning
    and ends when the device has finished.
    """
    grows = scenario.name == "decode"
    for row in rows:
        row.start(histories, room=(warmups + runs if grows else 1) * max(scenario.lengths))
    states = [x for _ in rows]
    times: list[list[float]] = [[] for _ in rows]

    def one(i: int) -> float:
        synchronize(x.device)
        begin = time.perf_counter()
        out = rows[i].run(states[i], scenario.lengths)
        synchronize(x.device)
        elapsed = time.perf_counter() - begin
        if grows:
            states[i] = out
        else:
            rows[i].rewind()
        return elapsed * 1e3

    with progress(len(rows) * (warmups + runs)) as bar:
        for i in range(len(rows)):
            for _ in range(warmups):
                one(i)
                bar.update()
        for done in range(0, runs, TURN):
            for i in range(len(rows)):
                for _ in range(min(TURN, runs - done)):
                    times[i].append(one(i))
                    bar.update()
    return [_middle_mean(t) for t in times]


def _middle_mean(values: list[float]) -> float:
    """Mean of the middle half."""
    cut = len(values) // 4
    middle = sorted(values)[cut : len(values) - cut]
    return sum(middle) / len(middle)
