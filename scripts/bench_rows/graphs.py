"""A call recorded once and replayed, where the device's torch has graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ntops_mla.devices import device_module, synchronize


def unavailable(device: torch.device) -> str | None:
    """Why nothing can be recorded here, or None."""
    module = device_module(device)
    if _maker(module, device) is None or not hasattr(module, "graph"):
        return f"torch.{device.type} has no graphs"
    return None


def record(device: torch.device, call: Callable[[], object]) -> Callable[[], object]:
    """What replays `call` into the results of its recording and returns them. Inputs are read where they lie."""
    module = device_module(device)
    stream = module.Stream()
    stream.wait_stream(module.current_stream())
    with module.stream(stream):  # compiling and the first choice of an op are no part of a graph
        for _ in range(2):
            call()
    return record_once(device, call)


def record_once(device: torch.device, call: Callable[[], object]) -> Callable[[], object]:
    """The same without a run before: for a call that can be made once, all of whose kernels have run."""
    module = device_module(device)
    synchronize(device)
    graph = _maker(module, device)()
    with module.graph(graph):
        results = call()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def _maker(module, device: torch.device):
    return getattr(module, f"{device.type.upper()}Graph", None)
