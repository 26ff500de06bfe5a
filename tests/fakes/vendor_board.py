"""A whole process on a board that is not there: torch and Triton show a vendor's, kernels run in Triton's interpreter.

`PYTHONPATH=tests/fakes/site NTOPS_MLA_TEST_BOARD=moore python ...`: every import of torch, of Triton and of the
library's device detection is followed by what makes it look so. The dispatcher is not told that anything is
interpreted: it sees the platform's gates, limits and tiles, Triton's target and its launch options.

Moore is a device of its own, `musa`, made of torch's PrivateUse1 (fake_musa.py). A `cuda` device cannot be made on a
CPU torch: for MetaX and Iluvatar "cuda" in a call means the CPU, and detection is told that CPU tensors lie on cuda:0.
What the boards show follows public reports (platforms/*.py); nothing here was recorded on one.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

LAUNCHES = "NTOPS_MLA_TEST_LAUNCHES"  # a file that gets a line a launch
ABORT = "NTOPS_MLA_TEST_ABORT"  # a kernel whose launch ends the process, as a failed assertion in a compiler does


@dataclasses.dataclass(frozen=True)
class Show:
    """What a board and its software show."""

    platform: str
    name: str
    device_type: str
    capability: tuple[int, int]
    versions: dict[str, str]  # of torch.version
    target: tuple[str, int, int]  # Triton's backend, arch, lanes
    triton: str
    shared_memory: int
    options: tuple[str, ...] = ()  # beyond what every Triton takes
    corex: bool = False


BOARDS = {
    "moore": Show(
        "moore", "MTT S5000", "musa", (3, 1), {"musa": "4.3.0"}, ("musa", 31, 32), "3.2.0", 196608,
    ),
    "moore-s4000": Show(
        "moore", "MTT S4000", "musa", (2, 2), {"musa": "4.3.0"}, ("musa", 22, 128), "3.6.0", 73728,
    ),
    "metax": Show(
        "metax", "MetaX C550", "cuda", (8, 0), {"cuda": "11.6", "maca": "2.31.0.6"}, ("maca", 80, 64), "3.0.0", 65536,
        options=("pipeline", "scenario"),
    ),
    "iluvatar": Show(
        "iluvatar", "Iluvatar BI-V150", "cuda", (7, 1), {"cuda": "10.2"}, ("cuda", 71, 64), "3.1.0", 49152,
        options=("use_sme",), corex=True,
    ),
}  # fmt: skip

# What a test may change while it runs: `fault`, called with (kernel's name, its arguments) before every launch
state = SimpleNamespace(show=None, fault=None, launches=[], torch_cuda_calls=[])


def arrange(name: str) -> None:
    """Let this process become one on the board called `name`, as far as what it will import goes."""
    if name not in BOARDS:
        raise ValueError(f"NTOPS_MLA_TEST_BOARD must be one of {', '.join(BOARDS)}, got {name!r}")
    state.show = BOARDS[name]
    os.environ["TRITON_INTERPRET"] = "1"
    after = {"torch": _torch, "triton": _triton, "ntops_mla.devices": _devices}
    sys.meta_path.insert(0, _After(after))


class _After(importlib.abc.MetaPathFinder):
    """Calls a function with a module once it has been executed."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._actions = actions

    def find_spec(self, name, path=None, target=None):
        if name not in self._actions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self._actions.pop(name, lambda module: None)(module)  # a spec may be asked for and not used

        spec.loader.exec_module = exec_module
        return spec


# torch


def _torch(torch: ModuleType) -> None:
    show = state.show
    for attribute in ("cuda", "musa", "maca", "hip", "xpu"):
        setattr(torch.version, attribute, show.versions.get(attribute))
    if show.corex:
        torch.corex = True
    if show.device_type == "musa":
        import fake_musa

        fake_musa.install(queries())
        _watch_cuda(torch)
        return
    for name, answer in queries().items():
        setattr(torch.cuda, name, answer)
    _watch_cuda(torch)
    import fake_cuda

    fake_cuda.install()


def queries() -> dict[str, Callable]:
    """What a device module answers about the one board."""
    show = state.show
    properties = SimpleNamespace(name=show.name, multi_processor_count=4, shared_memory_per_block=show.shared_memory)
    return {
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: show.name,
        "get_device_capability": lambda device=None: show.capability,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
    }


def _watch_cuda(torch: ModuleType) -> None:
    """Note every call of a function of torch.cuda that comes from this project's own code."""
    root = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
    ours = tuple(
        os.path.join(root, folder) + os.sep for folder in ("ntops_mla", "kernels", "platforms", "scripts", "benchmarks")
    )

    def watched(name, function):
        def call(*args, **kwargs):
            caller = os.path.realpath(sys._getframe(1).f_code.co_filename)
            if caller.startswith(ours):
                state.torch_cuda_calls.append((name, os.path.relpath(caller, root)))
            return function(*args, **kwargs)

        return call

    for name, value in list(vars(torch.cuda).items()):
        if callable(value) and not isinstance(value, type) and not name.startswith("_"):
            setattr(torch.cuda, name, watched(name, value))


def _devices(devices: ModuleType) -> None:
    if state.show.device_type != "cuda":
        return
    import torch

    stock = devices.detect

    def detect(device):
        device = torch.device(device)
        return stock(torch.device("cuda", 0) if device.type == "cpu" else device)

    detect.cache_clear = stock.cache_clear
    devices.detect = detect


# Triton


def _triton(triton: ModuleType) -> None:
    from ntops_mla import interpreter

    show = state.show
    backend, arch, lanes = show.target
    interpreter.install_driver(backend, arch, lanes)
    utils = triton.runtime.driver.active.utils
    told = {**utils.get_device_properties(0), "max_shared_mem": show.shared_memory, "multiprocessor_count": 4}
    utils.get_device_properties = lambda device: dict(told)
    interpreter._repair()
    triton.__version__ = show.triton
    from triton.backends import backends

    backends.clear()
    backends[show.platform] = SimpleNamespace(compiler=_compiler(), driver=None)
    _launch(triton)


def _compiler() -> type:
    """The vendor's compiler, as far as its launch options go."""
    fields = [(name, object, None) for name in state.show.options]
    options = dataclasses.make_dataclass("Options", [("num_warps", int, 4), ("num_stages", int, 1), *fields])

    class Compiler:
        def __init__(self, target):
            self.target = target

        @staticmethod
        def supports_target(target):
            return target.backend == state.show.target[0]

        def parse_options(self, given):
            return options(**{name: value for name, value in given.items() if name in options.__dataclass_fields__})

    return Compiler


_RESERVED = {"num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg", "grid", "warmup"}


def _launch(triton: ModuleType) -> None:
    import torch
    from triton.runtime.interpreter import GridExecutor

    stock = GridExecutor.__call__

    def call(self, *args, **kwargs):
        own = {name: value for name, value in kwargs.items() if name in self.arg_names}
        given = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        name = self.fn.__name__
        launch = {"kernel": name, "options": given, "sqmma": os.environ.get("MUSA_ENABLE_SQMMA")}
        unknown = set(given) - _RESERVED - set(state.show.options)
        if unknown:  # as Triton does
            raise KeyError(f"Keyword argument {unknown.pop()} was specified but unrecognised")
        if os.environ.get(ABORT) == name:
            os.abort()
        if state.fault is not None:
            state.fault(name, args)
        state.launches.append(launch)
        if os.environ.get(LAUNCHES):
            with open(os.environ[LAUNCHES], "a", encoding="utf-8") as file:
                file.write(json.dumps(launch) + "\n")
        return stock(self, *(_host(arg) for arg in args), **{name: _host(value) for name, value in own.items()})

    def _host(value):
        return getattr(value, "host", value) if isinstance(value, torch.Tensor) else value

    GridExecutor.__call__ = call
