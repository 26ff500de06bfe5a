"""The only place that chooses which implementation of an op runs, and that can say why.

choose: explicit override -> platform known -> the platform's gate for (op, dtype) -> the op's `supports()` -> the
board's limits and Triton, and a tile for it -> an earlier failure of this kernel here -> kernel. A choice is made once
per (op, device, dtypes, sizes, override) and kept, so that a call pays a dictionary look-up.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ntops_mla import board as boards
from ntops_mla import findings as found
from ntops_mla import interpreter, tile_table
from ntops_mla import platform as platforms
from ntops_mla.board import Board, Needed
from ntops_mla.devices import capturing
from ntops_mla.findings import Findings
from ntops_mla.kernel import OutOfReach
from ntops_mla.platform import Gate, Platform, dtype_name

BACKENDS = ("auto", "kernel", "reference")

# Distinct (op, device, dtypes, sizes, override) kept; beyond it the table starts anew. Sizes are those that decide
# (heads, head sizes, page size), never lengths, so that a serving process stays far below.
_MAX_DECISIONS = 4096


class Choice(NamedTuple):
    """Which implementation an op runs, and why: `backend` is "kernel" or "reference"."""

    op: str
    platform: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} on {self.platform} ({self.reason})"


class BackendUnavailableError(RuntimeError):
    """An explicit choice that cannot be honoured; the message holds every reason."""


class StrictFallbackError(RuntimeError):
    """Under NTOPS_MLA_STRICT=1: an op would fall back to PyTorch without having been asked to."""


class KernelFallbackWarning(UserWarning):
    """A kernel failed to compile or to fit, or cannot address its arguments, and PyTorch runs in its place."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it is part of the key of every call
class OpSpec:
    """What dispatch needs of an op.

    `key(*args)` -> (dtypes, sizes): hashable, all that a choice may depend on. `supports(platform, dtypes, sizes)` ->
    None or the reason why the kernel cannot take them. `tiles(board, dtypes, sizes)` -> the kernels that a call needs.
    `kernel(board, *args)` launches, None where there is no kernel.
    `through_float32(kernel, board, args)` runs it behind a `float32` gate where casting every argument will not do.
    `look(*args)` raises for bad values in the arguments, for which it waits for the device.
    """

    name: str
    key: Callable[..., tuple[tuple[torch.dtype, ...], tuple]]
    reference: Callable[..., Any]
    supports: Callable[[Platform, tuple, tuple], str | None]
    kernel: Callable[..., Any] | None = None
    through_float32: Callable[..., Any] | None = None
    tiles: Callable[..., list[Needed]] | None = None
    look: Callable[..., None] | None = None


@dataclass(frozen=True)
class Settings:
    """What overrides the choice: backend auto | kernel | reference; strict; a platform's name instead of detection;
    what was found on a board; `check`: the values of tables, lengths, slots and indices are looked at first."""

    backend: str = "auto"
    strict: bool = False
    platform: str | None = None
    findings: Findings | None = None
    check: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        """Read NTOPS_MLA_BACKEND, _STRICT, _CHECK and _GATES; a value not understood, of _TILES too, is a ValueError.

        NTOPS_MLA_PLATFORM is read where devices are recognised (devices.py), so that all ask the same.
        """
        backend = os.environ.get("NTOPS_MLA_BACKEND", "").strip().lower() or "auto"
        if backend not in BACKENDS:
            raise ValueError(f"NTOPS_MLA_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
        strict, check = (_switch(f"NTOPS_MLA_{name}") for name in ("STRICT", "CHECK"))
        tile_table.from_environment()  # said at once, and not only where a board would read it
        return cls(backend, strict, findings=found.from_environment(), check=check)


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


_override: ContextVar[Settings | None] = ContextVar("ntops_mla_settings", default=None)
_environment: Settings | None = None
_decisions: dict[tuple, _Decision] = {}
_failures: dict[tuple, str] = {}
_warned: set[tuple] = set()  # failures that a warning told of
_lock = threading.Lock()


def settings() -> Settings:
    """What is in force: the innermost `use`, else the environment (read at the first call; `reset` reads it again)."""
    global _environment
    override = _override.get()
    if override is not None:
        return override
    if _environment is None:
        _environment = Settings.from_environment()
    return _environment


@contextlib.contextmanager
def use(backend: str | None = None, *, strict: bool | None = None, platform: str | None = None) -> Iterator[None]:
    """Override the choice inside a `with` block: `with ntops_mla.use("reference"): ...`.

    backend: "auto", "kernel" (an op whose kernel cannot run raises BackendUnavailableError) or "reference". strict: a
    fallback that nobody asked for raises. platform: a name or alias instead of detection. None leaves a setting as it
    is.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if strict is not None and not isinstance(strict, bool):
        raise TypeError(f"strict must be True, False or None, got {strict!r}")
    new = settings()
    if backend is not None:
        new = replace(new, backend=backend)
    if strict is not None:
        new = replace(new, strict=strict)
    if platform is not None:
        new = replace(new, platform=platforms.get_platform(platform).name)
    token = _override.set(new)
    try:
        yield
    finally:
        _override.reset(token)


def reset() -> None:
    """Forget every choice and every remembered failure, and read the environment again at the next call."""
    global _environment
    with _lock:
        _environment = None
        _decisions.clear()
        _failures.clear()
        _warned.clear()
        boards.forget()


@contextlib.contextmanager
def record() -> Iterator[dict[str, Choice]]:
    """Collect what runs inside the `with` block, on any thread: op -> the `Choice` of its latest call."""
    ran: dict[str, Choice] = {}
    _recorders.append(ran)
    try:
        yield ran
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not ran]


_recorders: list[dict[str, Choice]] = []


class _Decision(NamedTuple):
    choice: Choice
    run: Callable[..., Any]


def call(op: OpSpec, device: torch.device, args: tuple) -> Any:
    """Run `op` on `args`, by the implementation that `choose` names."""
    decision = _decision(op, device, args)
    if _recorders:
        _note(decision.choice)
    return decision.run(*args)


def chosen(op: OpSpec, device: torch.device, args: tuple) -> Choice:
    """What `call` would run, as it remembers it: for those who ask in every step."""
    return _decision(op, device, args).choice


def _decision(op: OpSpec, device: torch.device, args: tuple) -> _Decision:
    dtypes, sizes = op.key(*args)
    key = (op, device, dtypes, sizes, _override.get() or _environment, platforms.generation)
    decision = _decisions.get(key)
    return _decide(op, device, dtypes, sizes) if decision is None else decision


def _note(choice: Choice) -> None:
    for ran in _recorders:
        ran[choice.op] = choice


def explain(op: OpSpec, device: torch.device, args: tuple, platform: Platform | None = None) -> Choice:
    """The choice for `args`, without running; `platform` pretends that the device belongs to it."""
    dtypes, sizes = op.key(*args)
    if platform is not None:
        # No device: this torch may not know the platform's device type.
        return _choose(op, platforms.Detection(platform, None, "pretended"), dtypes, sizes, settings())[0]
    detection = _detect(device, settings())
    choice = _choose(op, detection, dtypes, sizes, settings(), boards.glance)[0]
    if choice.backend == "kernel" and op.tiles is not None and not (board := boards.glance(detection)).asked:
        choice = choice._replace(
            reason=f"{choice.reason}; Triton {board.triton_version} is not imported yet, and was not asked"
        )
    return choice


def _detect(device: torch.device, now: Settings) -> platforms.Detection:
    if now.platform is not None:
        return platforms.Detection(platforms.get_platform(now.platform), device, "named by use()")
    return platforms.detect(device)


def _choose(
    op: OpSpec,
    detection: platforms.Detection,
    dtypes: tuple,
    sizes: tuple,
    now: Settings,
    look: Callable[[platforms.Detection], Board] | None = None,
) -> tuple[Choice, str | None]:
    """The choice and its gate's mode; `look` in place of `board_of`.

    An explicit "kernel" that cannot be honoured raises with all the reasons.
    """
    name = "unknown" if detection.platform is None else detection.platform.name
    if now.backend == "reference":
        return Choice(op.name, name, "reference", "asked for: backend 'reference'"), "reference"
    reasons, mode = _objections(op, detection, dtypes, sizes, now.findings, look or boards.board_of)
    if not reasons:
        reason = "the platform's kernel" if mode == "native" else "the platform's kernel, inputs cast to float32"
        if detection.device is not None and interpreter.enabled():
            reason += ", in Triton's interpreter"
        return Choice(op.name, name, "kernel", reason), mode
    if now.backend == "kernel":
        raise BackendUnavailableError(
            f"{op.name}: the kernel was asked for (backend 'kernel') and cannot run on {name}: " + "; ".join(reasons)
        )
    choice = Choice(op.name, name, "reference", reasons[0])
    if now.strict and mode != "reference":
        raise StrictFallbackError(f"strict mode: {choice}")
    return choice, mode


def _objections(
    op: OpSpec,
    detection: platforms.Detection,
    dtypes: tuple,
    sizes: tuple,
    findings: Findings | None,
    look: Callable[[platforms.Detection], Board],
) -> tuple[list[str], str | None]:
    """Every reason against the kernel, in the order of the rules, and the mode of the strictest gate met."""
    platform, device = detection.platform, detection.device
    if platform is None:
        return [f"no platform file recognises this device: {detection.reason}"], None
    reasons, interpreted = [], device is not None and interpreter.enabled()
    markers = platform.markers
    if device is not None and not interpreted and device.type not in (markers.device_type, *markers.also_device_types):
        reasons.append(f"tensors on {device.type}, where a kernel for {platform.name} cannot run ({detection.reason})")
    if interpreted and device.type != "cpu":
        reasons.append(f"tensors on {device.type}: Triton's interpreter is for CPU tensors")
    modes = {}
    for dtype in dtypes:
        gate = _gate(op, platform, dtype, interpreted, findings)
        modes[gate.mode] = gate
        if gate.mode == "reference":
            reasons.append(f"gate of {platform.name} for {op.name} in {dtype_name(dtype)}: {gate.reason}")
    mode = next(mode for mode in ("reference", "float32", "native") if mode in modes)
    if op.kernel is None:
        reasons.append(f"no compiled kernel of {op.name} in this version")
    unsupported = op.supports(platform, dtypes, sizes)
    if unsupported is not None:
        reasons.append(unsupported)
    if op.tiles is not None and not reasons:  # looking at the board imports Triton: not where nothing comes of it
        reasons += _limits(op, look(detection), _computed(dtypes, mode), sizes, findings)
    failure = _failures.get(_failure_key(op, detection, dtypes, sizes))
    if failure is not None:
        reasons.append(f"the kernel failed here before: {failure}")
    return reasons, mode


def _gate(op: OpSpec, platform: Platform, dtype: torch.dtype, interpreted: bool, findings: Findings | None) -> Gate:
    """The platform's gate, unless the kernel was found broken."""
    broken = findings and findings.broken(platform.name, op.name, dtype)
    return Gate("reference", broken) if broken else platform.gate(op.name, dtype, interpreted)


def _limits(op: OpSpec, board: Board, dtypes: tuple, sizes: tuple, findings: Findings | None) -> list[str]:
    """What the board cannot do: its Triton, a tile for it, the tile's warps and products."""
    if board.problem is not None:
        return [board.problem]
    reasons = []
    for kernel, tile, products in op.tiles(board, dtypes, sizes):
        if tile is None:
            reasons.append(f"no tile of {kernel} for {', '.join(map(dtype_name, dtypes))} and these sizes on {board}")
            continue
        if board.limits is None:
            continue
        if tile.num_warps > (board.limits.max_warps.value or tile.num_warps):
            reasons.append(
                f"the tile of {kernel} takes {tile.num_warps} warps, {board} at most {board.limits.max_warps.value}"
            )
        least = board.limits.least_product
        if least is None or min(products, default=least.value) >= least.value:
            continue
        here = findings is not None and findings.of_board(board.platform.name, board.device, board.triton_version)
        if not here or not findings.works(op.name, dtypes[0], products):
            other = (
                f" ({findings.path} is of {findings.device}, Triton {findings.triton})" if findings and not here else ""
            )
            reasons.append(
                f"the tile of {kernel} has products of {' x '.join(map(str, products))}, and below {least.value} the "
                f"compiler of {board} may end the process: `python -m ntops_mla doctor --gates FILE` tries it apart, "
                f"and {found.VARIABLE}=FILE then allows it{other}"
            )
    return reasons


def _computed(dtypes: tuple, mode: str) -> tuple:
    """The dtypes that the kernel sees."""
    return (torch.float32,) * len(dtypes) if mode == "float32" else dtypes


def _failure_key(op: OpSpec, detection: platforms.Detection, dtypes: tuple, sizes: tuple) -> tuple:
    """Where a failure counts: the same device, which stands for its architecture."""
    return op.name, detection.platform and detection.platform.name, detection.device, dtypes, sizes


def _decide(op: OpSpec, device: torch.device, dtypes: tuple, sizes: tuple) -> _Decision:
    now = settings()
    detection = _detect(device, now)
    choice, mode = _choose(op, detection, dtypes, sizes, now)
    if choice.backend == "kernel":
        run = _Launch(op, detection, dtypes, sizes, mode)
    else:
        run = op.reference
        failure_key = _failure_key(op, detection, dtypes, sizes)
        if mode != "reference" and failure_key in _failures:  # met under strict mode, which raised instead of warning
            _warn_once(failure_key, _failures[failure_key])
    if now.check and op.look is not None:
        run = partial(_look_first, op.look, run)
    return _remember((op, device, dtypes, sizes, now, platforms.generation), _Decision(choice, run))


def _look_first(look: Callable[..., None], run: Callable[..., Any], *args: Any) -> Any:
    if not capturing(args[0].device):
        look(*args)
    return run(*args)


def _remember(key: tuple, decision: _Decision) -> _Decision:
    with _lock:
        if len(_decisions) >= _MAX_DECISIONS:
            _decisions.clear()
        _decisions[key] = decision
    return decision


class _Launch:
    """A kernel with its gate; a failure to compile or to fit is remembered, warned once, and falls back to PyTorch. One
    of these very arguments is not remembered: other calls of the same sizes are none the worse for it."""

    def __init__(self, op: OpSpec, detection: platforms.Detection, dtypes: tuple, sizes: tuple, mode: str) -> None:
        self._op, self._platform, self._board = op, detection.platform, boards.board_of(detection)
        # Inputs that are float32 already need no casts around the kernel.
        self._native = mode == "native" or all(dtype == torch.float32 for dtype in dtypes)
        self._failure_key = _failure_key(op, detection, dtypes, sizes)

    def __call__(self, *args: Any) -> Any:
        op = self._op
        try:
            if self._native:
                return op.kernel(self._board, *args)
            through = op.through_float32 or _through_float32
            return through(op.kernel, self._board, args)
        except Exception as error:
            if _is_device_error(error):
                raise
            return self._fall_back(error, args)

    def _fall_back(self, error: Exception, args: tuple) -> Any:
        op, name = self._op, self._platform.name
        reason = f"{type(error).__name__}: {boards.first_line(error)}"
        if not isinstance(error, OutOfReach):
            with _lock:
                _failures[self._failure_key] = reason
                _decisions.clear()
        now = settings()
        if now.backend == "kernel":
            raise BackendUnavailableError(
                f"{op.name}: the kernel was asked for and failed on {name}: {reason}"
            ) from error
        if now.strict:
            raise StrictFallbackError(f"strict mode: {op.name}: the kernel failed on {name}: {reason}") from error
        _warn_once(self._failure_key, reason)
        _note(Choice(op.name, name, "reference", f"the kernel failed: {reason}"))
        return op.reference(*args)


def _warn_once(failure_key: tuple, reason: str) -> None:
    with _lock:
        known = (failure_key, reason) in _warned
        _warned.add((failure_key, reason))
    if not known:
        op, platform = failure_key[:2]
        message = f"the kernel of {op} failed on {platform} and PyTorch runs in its place: {reason}"
        warnings.warn(message, KernelFallbackWarning, stacklevel=3)


def _through_float32(kernel: Callable[..., Any], board: Board, args: tuple) -> Any:
    """The `float32` gate of an op that writes to none of its arguments: cast in, run, cast the value back.

    An op's first result is its value; what follows (lse) is float32 by contract.
    """
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype in _NARROW)
    out = kernel(board, *(a.float() if isinstance(a, torch.Tensor) and a.dtype in _NARROW else a for a in args))
    return (out[0].to(dtype), *out[1:]) if isinstance(out, tuple) else out.to(dtype)


_NARROW = (torch.float16, torch.bfloat16)


# What a device reports after the fact: memory faults, asserts, a lost board. Falling back would hide a wrong result.
_DEVICE_ERROR = re.compile(
    r"(?i:illegal (memory access|address|instruction)|device-side assert|launch (failure|timed out)|misaligned address|"
    r"invalid program counter|hardware (exception|stack)|uncorrectable|out of memory|\bmcError)|"
    r"\b(CUDA|MUSA|HIP|MACA|COREX)( runtime)? error\b"
)
# Triton's driver raises these when it loads a kernel: nothing has run yet.
_LOAD_ERROR = re.compile(r"(?i:device kernel image is invalid|no kernel image|no binary for gpu|invalid argument)")
_TRITON_DRIVER_ERROR = re.compile(r"Triton Error \[\w+\]")
_COMPILE_ERRORS = ("CompilationError", "CompileTimeAssertionFailure", "OutOfResources", "PTXASError",
"UnsupportedLanguageConstruct")  # fmt: skip


def _is_device_error(error: Exception) -> bool:
    # torch.AcceleratorError came with 2.8, torch.OutOfMemoryError with 2.5; before, both are RuntimeErrors with the
    # message.
    known = tuple(getattr(torch, name) for name in ("AcceleratorError", "OutOfMemoryError") if hasattr(torch, name))
    if isinstance(error, (MemoryError, *known)):
        return True
    if type(error).__name__ in _COMPILE_ERRORS and type(error).__module__.startswith("triton"):
        return False
    message = str(error)
    if _TRITON_DRIVER_ERROR.search(message):
        return not _LOAD_ERROR.search(message)
    return _DEVICE_ERROR.search(message) is not None
