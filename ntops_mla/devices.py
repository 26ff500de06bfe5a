"""Which platform a device belongs to, what it can hold, and whether it works.

Nothing here trusts a machine: each look at torch or at a driver is guarded, and what it raised is part of the answer.
Accelerators imitate each other (MetaX and Iluvatar both set `torch.version.cuda`), so platforms are asked in the order
that their markers give.

>>> detect("cpu")
Detection(platform=cpu, device=cpu, reason='a cpu device')
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch

from ntops_mla import platform as registry
from ntops_mla.platform import Markers, Platform, all_platforms, get_platform

OVERRIDE = "NTOPS_MLA_PLATFORM"
# Makers' marks in torch.version, so that an unknown device is described by more than its type
_VERSIONS = ("cuda", "hip", "xpu")


class DeviceNotFoundError(RuntimeError):
    """There is no working device of the platform; the message says what was seen."""


@dataclass(frozen=True)
class Detection:
    """The platform of a device, None when nothing fits, and why."""

    platform: Platform | None
    device: torch.device
    reason: str

    def __repr__(self) -> str:
        name = self.platform.name if self.platform else None
        return f"Detection(platform={name}, device={self.device}, reason={self.reason!r})"


@dataclass(frozen=True)
class DeviceInfo:
    """What the driver says about a device; None: it does not say, and `errors` may tell why."""

    name: str | None = None
    capability: tuple[int, int] | None = None
    shared_memory: int | None = None
    processors: int | None = None
    triton_target: str | None = None
    errors: tuple[str, ...] = field(default=())


class _Probe:
    """Runs looks at the machine, keeps what they raised."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, what: str, look: Callable[[], object]) -> object:
        try:
            return look()
        except ModuleNotFoundError as error:
            self.errors.append(f"{error.name} is not installed")
        except Exception as error:
            self.errors.append(f"{what} raised {_short(error)}")
        return None

    def attribute(self, root: object, name: str, what: str) -> object:
        """`root.name`, dots allowed; None where it is missing."""
        return self(
            what, lambda: functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), root)
        )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def detect(device: torch.device | str) -> Detection:
    """Which platform `device` belongs to, and why.

    `NTOPS_MLA_PLATFORM`, where set, decides; then a `cpu` device is the cpu platform, and the platforms' markers tell
    the others. An unknown name in that variable, or a string that is no device, is a ValueError; nothing else raises.
    """
    return _detect(_as_device(device), os.environ.get(OVERRIDE, "").strip(), registry.generation)


def _as_device(device: torch.device | str) -> torch.device:
    if isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r}: torch knows no such device ({_short(error)})") from error


@functools.lru_cache(maxsize=256)
def _detect(device: torch.device, override: str, generation: int) -> Detection:
    if override:
        try:
            return Detection(get_platform(override), device, f"{OVERRIDE}={override}")
        except ValueError as error:
            raise ValueError(f"{OVERRIDE}={override}: {error}") from None
    if device.type == "cpu":
        return Detection(get_platform("cpu"), device, "a cpu device")
    look = _Probe()
    seen = _Seen(device, look)
    for candidate in sorted(all_platforms().values(), key=lambda p: p.markers.order):
        mark = seen.mark_of(candidate)
        if mark:
            return Detection(candidate, device, "; ".join([mark, *look.errors]))
    return Detection(None, device, "; ".join([f"no platform's markers fit {seen.describe()}", *look.errors]))


detect.cache_clear = _detect.cache_clear  # type: ignore[attr-defined]


class _Seen:
    """What torch shows of one device, each thing looked at when first needed."""

    def __init__(self, device: torch.device, look: _Probe) -> None:
        self.device, self.look = device, look

    @functools.cached_property
    def name(self) -> str:
        return str(_device_name(self.device, self.look) or "")

    def version(self, attribute: str) -> object:
        return self.look.attribute(torch, f"version.{attribute}", f"torch.version.{attribute}")

    def mark_of(self, platform: Platform) -> str | None:
        """The first marker of `platform` that this device bears, in words."""
        markers = platform.markers
        if markers.device_type_decides and self.device.type == markers.device_type:
            return f"device type {self.device.type}"
        if self.device.type not in (markers.device_type, *markers.also_device_types):
            return None
        if not (markers.name_required and self.name):
            mark = self._mark_in_torch(markers)
            if mark is not None:
                return mark
        for part in markers.device_names:
            if part.lower() in self.name.lower():
                return f"device name {self.name!r} has {part!r}"
        return None

    def _mark_in_torch(self, markers: Markers) -> str | None:
        for attribute in markers.version_attributes:
            if value := self.version(attribute):
                return f"torch.version.{attribute} is {str(value)!r}"
        for attribute in markers.torch_attributes:
            if self.look.attribute(torch, attribute, f"torch.{attribute}"):
                return f"torch.{attribute} is there"
        return None

    def describe(self) -> str:
        if self.device.type == "meta":
            return "device type meta (shapes only, no machine)"
        versions = [(attribute, self.version(attribute)) for attribute in _VERSIONS]
        said = [f"torch.version.{attribute} {str(value)!r}" for attribute, value in versions if value]
        return ", ".join([f"device type {self.device.type}", f"name {self.name!r}" if self.name else "no name", *said])


def _device_name(device: torch.device, look: _Probe) -> object:
    if device.type in ("cpu", "meta"):
        return None
    return look("get_device_name", lambda: device_module(device).get_device_name(device))


def probe(device: torch.device | str) -> DeviceInfo:
    """What the driver says about `device`. Never raises, and never imports Triton: asks it only where it is loaded."""
    device, look = _as_device(device), _Probe()
    if device.type in ("cpu", "meta"):
        return DeviceInfo()
    capability = look("get_device_capability", lambda: tuple(device_module(device).get_device_capability(device)))
    properties = look("get_device_properties", lambda: device_module(device).get_device_properties(device))
    shared = look.attribute(properties, "shared_memory_per_block_optin", "shared memory")
    shared = shared or look.attribute(properties, "shared_memory_per_block", "shared memory")
    return DeviceInfo(
        name=_device_name(device, look),
        capability=capability,
        shared_memory=shared,
        processors=look.attribute(properties, "multi_processor_count", "processors"),
        triton_target=look("Triton's driver", _triton_target),
        errors=tuple(look.errors),
    )


def _triton_target() -> str | None:
    if "triton" not in sys.modules:
        return None
    target = sys.modules["triton"].runtime.driver.active.get_current_target()
    return f"{target.backend}:{target.arch}, {target.warp_size} lanes"


@dataclass(frozen=True)
class Presence:
    """Whether a platform has a device here. `device` is one that works, else one that was seen, else None."""

    platform: Platform
    device: torch.device | None
    works: bool
    reason: str


def look_for(name: str) -> Presence:
    """Looks for a device of the platform called `name` that works: a tiny tensor on it can be made and read.

    Availability flags are not asked: a mismatched driver can count devices that do not work, and under a shim
    torch.cuda.is_available() is False on a working board.
    """
    platform, look = get_platform(name), _Probe()
    kind = platform.markers.device_type
    if kind == "cpu":
        return Presence(platform, torch.device("cpu"), True, "a cpu device")
    if platform.extra_import and not hasattr(torch, kind):
        look(f"import {platform.extra_import}", lambda: importlib.import_module(platform.extra_import))
    module = look.attribute(torch, kind, f"torch.{kind}")
    if module is None:
        hint = f" ({'; '.join(look.errors)})" if look.errors else ""
        return Presence(platform, None, False, f"torch has no torch.{kind}{hint}")
    count = look(f"torch.{kind}.device_count()", lambda: int(module.device_count()))
    seen, broken = [f"torch.{kind}.device_count() is {count}"] if count is not None else [], None
    for index in range(count or 0):
        device = look(f"torch.device({kind!r}, {index})", functools.partial(torch.device, kind, index))
        if device is None:
            continue
        found = detect(device)
        if found.platform is not platform:
            owner = found.platform.name if found.platform else "no platform"
            seen.append(f"{device} belongs to {owner} ({found.reason})")
        elif (error := _allocation_error(device)) is None:
            return Presence(platform, device, True, found.reason)
        else:
            broken = broken or device
            seen.append(f"allocating on {device} failed: {error}")
    return Presence(platform, broken, False, _joined(seen, look))


def _joined(seen: list[str], look: _Probe) -> str:
    return " ".join(", but ".join([*seen, *look.errors]).split())


def find_device(name: str) -> torch.device:
    """A device of the platform called `name` that works, else `DeviceNotFoundError`: one line with what was seen."""
    presence = look_for(name)
    if not presence.works:
        raise DeviceNotFoundError(f"no {presence.platform.title} device: {presence.reason}")
    return presence.device


def _allocation_error(device: torch.device) -> str | None:
    """None where a tensor can be made on `device` and read back, else what was raised."""
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        return _short(error)
    return None


def best_device() -> Detection:
    """The first accelerator that works, by marker order; else the CPU, and why. The platform is what `detect` says of
    the device, so that NTOPS_MLA_PLATFORM shows."""
    refused = []
    for platform in sorted(all_platforms().values(), key=lambda p: p.markers.order):
        if platform.markers.device_type == "cpu":
            continue
        presence = look_for(platform.name)
        if presence.works:
            return Detection(presence.platform, presence.device, presence.reason)
        refused.append(f"no {platform.title} device: {presence.reason}")
    found = detect("cpu")
    decided = [found.reason] if os.environ.get(OVERRIDE, "").strip() else []
    return Detection(found.platform, found.device, "; ".join([*decided, "no accelerator works", *refused]))


def device_module(device: torch.device | str) -> ModuleType:
    """torch.cuda, torch.musa, torch.cpu...: the module of this device's type."""
    device = _as_device(device)
    if hasattr(torch, "get_device_module"):  # older vendors' torch has none
        return torch.get_device_module(device)
    return getattr(torch, device.type)


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has done all it was given; nothing to wait for on a CPU."""
    device = _as_device(device)
    if device.type not in ("cpu", "meta"):
        device_module(device).synchronize(device)


def graph_problem(device: torch.device | str) -> str | None:
    """Why work on a device cannot be captured as a graph and replayed, None where it can."""
    device = _as_device(device)
    if device.type in ("cpu", "meta"):
        return f"a {device.type} device has no graphs"
    module = device_module(device)
    missing = [name for name in (_graph_class(device), "graph") if not hasattr(module, name)]
    return f"torch.{device.type} has no {' and no '.join(missing)}" if missing else None


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is captured as a graph, so that nothing can be waited for."""
    if device.type in ("cpu", "meta"):
        return False
    asked = getattr(device_module(device), "is_current_stream_capturing", None)
    return asked is not None and asked()


def capture(device: torch.device | str, function: Callable[[], object], pool: object = None) -> Captured:
    """Capture the work that `function` launches; what compiles, and the first choice of an op, must be behind it."""
    device = _as_device(device)
    module = device_module(device)
    with module.device(device):  # the streams and the graph are those of the current device
        graph = getattr(module, _graph_class(device))()
        with module.graph(graph, pool=pool):
            result = function()
        return Captured(graph.replay, result, graph.pool())


@dataclass(frozen=True)
class Captured:
    """`replay()` does the work again, over what its inputs hold now, into `result`; `pool` is its memory."""

    replay: Callable[[], None]
    result: object
    pool: object


@contextlib.contextmanager
def side_stream(device: torch.device | str) -> Iterator[None]:
    """Work inside goes to a stream of its own, behind what was launched before."""
    device = _as_device(device)
    module = device_module(device)
    # torch.cpu has streams of no effect, and no other device to make current
    with module.device(device) if hasattr(module, "device") else contextlib.nullcontext():
        stream = module.Stream()
        stream.wait_stream(module.current_stream())
        with module.stream(stream):
            yield


def _graph_class(device: torch.device) -> str:
    return f"{device.type.upper()}Graph"
