"""In a call that names a `cuda` device, the CPU: the most that a CPU torch can be made to believe."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class _OnTheCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:  # a name and no more
            return function(*args, **(kwargs or {}))
        kwargs = {name: _host(value) for name, value in (kwargs or {}).items()}
        return function(*map(_host, args), **kwargs)


def _host(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return "cpu"
    return value


def install() -> None:
    """For the whole life of the process."""
    mode = _OnTheCPU()
    mode.__enter__()
