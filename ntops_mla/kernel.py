"""A NineToothed kernel made for one tile: generated, tidied, compiled by Triton at its first launch, launched.

A launch through the generated function costs 15 to 40 us of Python: every size and stride is read, passed and bound
again. On platforms where that is known to work, kernels remember, per shapes, strides, dtypes and alignment of their
arguments, the compiled kernel and the finished argument list, and hand only the tensors over.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ntops_mla import interpreter
from ntops_mla.kernel_source import tidy
from ntops_mla.platform import dtype_name, version_pair

# Launches kept per kernel: serving meets a few hundred (batch sizes, table widths); prefill never meets one again, and
# must not grow without end. Beyond it the table starts anew.
_MAX_LAUNCHES = 1024
_lock = threading.RLock()


@functools.cache
def make(
    name: str,
    num_warps: int,
    num_stages: int,
    options: tuple = (),
    environment: tuple = (),
    direct: bool = False,
    **parameters: Any,
) -> Kernel:
    """The kernel of `kernels/<name>.py` with the numbers that its `premake` takes.

    options: further launch options of a platform, as pairs. environment: variables that its compiler reads: name, value
    and the dtypes of the first argument that it is for (none: all).
    direct: hand compiled kernels to the driver past Triton's own launch. Generating takes 50 to 300 ms, so each one is
    made once.
    """
    with _lock:
        return Kernel(name, num_warps, num_stages, dict(options), environment, direct, parameters)


class Kernel:
    """`kernel(*tensors and numbers)` launches; `source` is the Triton source that is compiled."""

    def __init__(
        self,
        name: str,
        num_warps: int,
        num_stages: int,
        options: Mapping[str, Any],
        environment: tuple[tuple[str, str, tuple[str, ...]], ...],
        direct: bool,
        parameters: Mapping[str, Any],
    ) -> None:
        if interpreter.enabled():
            interpreter.activate()
        import ninetoothed
        from ninetoothed.naming import remove_prefixes

        arrangement, application, tensors = importlib.import_module(f"ntops_mla.kernels.{name}").premake(**parameters)
        handle = ninetoothed.make(
            arrangement, application, tensors, kernel_name=name, num_warps=num_warps, num_stages=num_stages
        )
        self.name, self.num_warps, self.num_stages = name, num_warps, num_stages
        self.options, self.parameters, self.environment = dict(options), dict(parameters), environment
        self.arguments = tuple(remove_prefixes(t.name) for t in tensors)  # their names, in order
        # Tensors without any fixed size are lists of lengths and the like; numbers count too.
        loose = tuple(t.name for t in tensors if not any(isinstance(size, int) for size in t.shape))
        self.source = tidy(pathlib.Path(handle._source).read_text(encoding="utf-8"), name, loose)
        self.path = _store(name, self.source)
        module = _load(self.path)
        self.function = getattr(module, name)  # Triton's JITFunction, or its interpreter's
        self._module = module
        self._launch = getattr(module, f"launch_{name}")
        self._launches: dict[tuple, tuple] = {}
        self._direct = direct and not interpreter.enabled() and _takes_whole_lists()

    def __call__(self, *args: Any, key: tuple | None = None) -> None:
        """Launch on the device of the first tensor, on its current stream.

        key: hashable, and as good as the arguments' dtypes, shapes, strides, alignments to 16 bytes and numbers: equal
        keys promise equal ones. An op that knows how its tensors hang together makes a shorter one than `form_of` all.
        """
        if _captured is not None:
            _captured.append((self, args))
            return
        if not self._direct:
            with _on(args[0].device):
                self.plain(*args)
            return
        if key is None:
            key = form_of(*args)
        device = args[0].device
        entry = self._launches.get((device, key))
        with _on(device):
            if entry is None:
                entry = self._prepare(args)
                if len(self._launches) >= _MAX_LAUNCHES:
                    self._launches.clear()
                self._launches[device, key] = entry
            run, grid, function, metadata, template, places, stream = entry
            arguments = template.copy()
            for place, index in places:
                arguments[place] = args[index]
            run(*grid, stream(device.index), function, metadata, None, None, None, *arguments)

    def plain(self, *args: Any) -> None:
        """The generated launch, through Triton's own machinery."""
        grid, arguments, keywords = self.record(*args)
        with self._variables(args[0].dtype):
            self.function[grid](*arguments, **keywords, **self.options)

    def _variables(self, dtype: torch.dtype) -> contextlib.AbstractContextManager:
        if not self.environment:
            return _NOTHING
        name = dtype_name(dtype)
        return _set({key: value for key, value, dtypes in self.environment if not dtypes or name in dtypes})

    def record(self, *args: Any) -> tuple[tuple[int, ...], tuple, dict[str, Any]]:
        """(grid, arguments, keywords) that the generated launch would hand to Triton."""
        recorder = _Recorder()
        with _lock:
            setattr(self._module, self.name, recorder)
            try:
                self._launch(*args)
            finally:
                setattr(self._module, self.name, self.function)
        grid, arguments, keywords = recorder.call
        return tuple(grid({})) if callable(grid) else tuple(grid), arguments, keywords

    def _prepare(self, args: tuple) -> tuple:
        import triton

        # A tensor given twice is two arguments that may differ the next time: each gets an alias of its own.
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        grid, arguments, keywords = self.record(*args)
        with self._variables(args[0].dtype):
            compiled = self.function.warmup(*arguments, grid=grid, **keywords, **self.options)
        if hasattr(compiled, "result"):  # compiled in the background
            compiled = compiled.result()
        compiled._init_handles()
        places = [
            (place, next(index for index, given in enumerate(args) if given is argument))
            for place, argument in enumerate(arguments)
            if isinstance(argument, torch.Tensor)
        ]
        # The template must not keep the caller's tensors alive.
        template = [None if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        stream = triton.runtime.driver.active.get_current_stream
        grid = grid + (1,) * (3 - len(grid))
        return compiled.run, grid, compiled.function, compiled.packed_metadata, template, places, stream


_captured: list[tuple[Kernel, tuple]] | None = None


@contextlib.contextmanager
def capture() -> Iterator[list[tuple[Kernel, tuple]]]:
    """Collect (kernel, arguments) of every launch inside the `with` block in place of launching; not for threads."""
    global _captured
    _captured = launches = []
    try:
        yield launches
    finally:
        _captured = None


def form_of(*args: Any) -> tuple:
    """All of the arguments that a compiled kernel and its launch depend on."""
    return tuple(
        [
            (a.shape, a.stride(), a.dtype, a.data_ptr() & 15) if isinstance(a, torch.Tensor) else (type(a), a)
            for a in args
        ]
    )


class OutOfReach(NotImplementedError):
    """What a kernel cannot address in these very arguments; others of the same sizes it can."""


def within_int32(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """`tensor`, made contiguous where kernels, which count the offsets within `dims` in int32, would overflow."""
    reach = sum((tensor.shape[dim] - 1) * tensor.stride(dim) for dim in dims)
    return tensor if reach < 2**31 else tensor.contiguous()


class _Recorder:
    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.call = (grid, arguments, keywords)

        return launch


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for the compiler alone: other kernels of the process have not asked for them. The user's own win.

    One launch at a time: what another thread has set is not the user's.
    """
    with _lock:
        added = {name: value for name, value in variables.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, whatever the tensors are on: make theirs current."""
    if device.type == "cpu":
        return _NOTHING
    module = getattr(torch, device.type)
    return _NOTHING if module.current_device() == device.index else module.device(device)


def _takes_whole_lists() -> bool:
    """Triton 3.3 and newer take the whole argument list, constants too; before, the convention was another."""
    import triton

    return version_pair(triton.__version__) >= (3, 3)


def _store(name: str, source: str) -> pathlib.Path:
    """Write `source` beside NineToothed's files, whole or not at all: other processes may be reading."""
    from ninetoothed.generation import CACHE_DIR

    path = CACHE_DIR / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:32]}.py"
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=CACHE_DIR, suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(temporary, path)
    return path


def _load(path: pathlib.Path) -> Any:
    module_name = f"ntops_mla_generated.{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
