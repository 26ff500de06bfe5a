"""A call recorded once and replayed, where the device's torch has graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ntops_mla.devices import capture, graph_problem, side_stream, synchronize


def unavailable(device: torch.device) -> str | None:
    """Why nothing can be recorded here, or None."""
    return f"torch.{device.type} has no graphs" if graph_problem(device) else None


def record(device: torch.device, call: Callable[[], object]) -> Callable[[], object]:
    """What replays `call` into the results of its recording and returns them. Inputs are read where they lie."""
    with side_stream(device):  # compiling and the first choice of an op are no part of a graph
        for _ in range(2):
            call()
    return record_once(device, call)


def record_once(device: torch.device, call: Callable[[], object]) -> Callable[[], object]:
    """The same without a run before: for a call that can be made once, all of whose kernels have run."""
    synchronize(device)
    captured = capture(device, call)

    def replay() -> object:
        captured.replay()
        return captured.result

    return replay
