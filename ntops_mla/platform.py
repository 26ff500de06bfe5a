"""What a platform is, and which ones there are.

A platform is one file in `platforms/` that defines `PLATFORM`: how its devices are recognised, their limits, what may
run on them in which dtype, its CI lane. The list of platforms is the list of those files, so a new accelerator is a
new file and no other edit. Every number is a `Fact`: it carries its source, because most of them were read, not
measured. Recognising and probing devices is in `devices.py`; its public names can be imported from here as well.

>>> platform = get_platform("mthreads")             # an alias of "moore"
>>> platform.gate("mla_decode", torch.float64).mode
'reference'
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # at run time `__getattr__` below does this
    from ntops_mla.devices import (
        Detection,
        DeviceInfo,
        DeviceNotFoundError,
        Presence,
        best_device,
        detect,
        device_module,
        find_device,
        look_for,
        probe,
        synchronize,
    )

__all__ = [
    "CILane",
    "Detection",
    "DeviceInfo",
    "DeviceNotFoundError",
    "Fact",
    "Gate",
    "LaunchOption",
    "Limits",
    "Markers",
    "Platform",
    "Presence",
    "Tile",
    "all_platforms",
    "best_device",
    "detect",
    "device_module",
    "find_device",
    "get_platform",
    "look_for",
    "probe",
    "register_platform",
    "reset",
    "synchronize",
    "unregister_platform",
]

MODES = ("native", "float32", "reference")


def version_pair(text: str) -> tuple[int, int]:
    """(major, minor) of a version: (3, 6) of "3.6.0+vendor"."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _within(versions: tuple[str | None, str | None], triton: tuple[int, int]) -> bool:
    """Whether a Triton is not older than the first of two versions and older than the second; None: no end."""
    since, before = (version and version_pair(version) for version in versions)
    return (since is None or triton >= since) and (before is None or triton < before)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as platform files name it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Fact:
    """A number or a text, and where it comes from: repository:path, an issue, a vendor's document, "derived: ...".

    `value` None means that nobody told: ask the driver.
    """

    value: int | float | str | None
    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ValueError(f"Fact({self.value!r}): source must say where this comes from, got {self.source!r}")


@dataclass(frozen=True)
class Gate:
    """How an op takes a dtype: "native" (the kernel), "float32" (cast around the kernel), "reference" (PyTorch)."""

    mode: str
    reason: str

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Gate: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise ValueError(f"Gate({self.mode!r}): reason must not be empty")


@dataclass(frozen=True)
class Limits:
    """What one architecture of a platform can hold. `min_capability` None: every capability of the platform.

    `least_product`: a product of fewer rows or columns may end the process inside the compiler, where no exception
    helps: such a tile is refused until `python -m ntops_mla doctor` has seen it work (findings.py).
    """

    arch: str
    min_capability: tuple[int, int] | None
    shared_memory: Fact  # bytes a block can use
    max_warps: Fact  # largest num_warps of a launch
    lanes: Fact  # threads in a warp
    triton_target: Fact | None = None  # "backend:arch", as Triton's driver names it
    # What public Triton compiles for in its place, where the target is not public: nearest in lanes and shared memory
    stand_ins: tuple[str, ...] = ()
    triton_min: Fact | None = None  # where it is newer than the platform's
    least_product: Fact | None = None
    notes: tuple[Fact, ...] = ()

    def __post_init__(self) -> None:
        capability = self.min_capability
        if capability is not None and not (
            isinstance(capability, tuple) and len(capability) == 2 and all(isinstance(part, int) for part in capability)
        ):
            raise ValueError(
                f"Limits({self.arch!r}): min_capability must be (major, minor) or None, got {capability!r}"
            )
        for name in ("shared_memory", "max_warps", "lanes"):
            fact = getattr(self, name)
            if not isinstance(fact, Fact):
                raise TypeError(f"Limits({self.arch!r}): {name} must be a Fact, got {type(fact).__name__}")
            if fact.value is not None and (not isinstance(fact.value, int) or fact.value <= 0):
                raise ValueError(f"Limits({self.arch!r}): {name} must be positive or None, got {fact.value!r}")


@dataclass(frozen=True)
class Markers:
    """How a device of the platform is recognised.

    Platforms are asked by ascending `order`, and the first one with a marker that is there wins. `version_attributes`
    are names in `torch.version`, `torch_attributes` names in `torch` (dots allowed), `device_names` parts of the
    device's name, in any case. `device_type_decides`: no other platform uses this `torch.device` type.
    `also_device_types`: further types under which its boards may appear; there, another of the marks is needed.
    `name_required`: the marks in torch are others' marks as well, and count only where the device's name cannot be had.
    """

    order: int
    device_type: str
    version_attributes: tuple[str, ...] = ()
    torch_attributes: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()
    device_type_decides: bool = False
    also_device_types: tuple[str, ...] = ()
    name_required: bool = False

    def __post_init__(self) -> None:
        for name in ("version_attributes", "torch_attributes", "device_names", "also_device_types"):
            if not isinstance(getattr(self, name), tuple):  # a lone string would be walked letter by letter
                raise TypeError(f"Markers: {name} must be a tuple, got {getattr(self, name)!r}")
        named = self.version_attributes or self.torch_attributes or self.device_names
        if not named and not self.device_type_decides:
            raise ValueError(f"Markers: nothing tells a {self.device_type} device of this platform from another one")


@dataclass(frozen=True)
class Tile:
    """The numbers that a kernel is made with on some boards of a platform, and what shows that they are good.

    `kernel` is a file of kernels/; `blocks` are arguments of its `premake`, `options` further launch options, as pairs.
    The rest says where the tile fits: `arch` names of the platform's limits and `dtypes`, empty: all; `triton`: from
    the first version on and before the second; `when`: for sizes of the call (rows, latent, ...) the least and the
    greatest value, None: no end. A platform's first tile that fits is taken.
    """

    kernel: str
    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    source: str
    arch: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    triton: tuple[str | None, str | None] = (None, None)
    when: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    options: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_warps", "num_stages"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Tile({self.kernel!r}): {name} must be a positive integer, got {value!r}")
        if not self.source.strip():
            raise ValueError(f"Tile({self.kernel!r}): source must say what shows that the tile is good")
        for name in ("arch", "dtypes", "options"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"Tile({self.kernel!r}): {name} must be a tuple, got {getattr(self, name)!r}")
        for name, (low, _) in dict(self.when).items():
            if not isinstance(low, int):
                raise TypeError(f"Tile({self.kernel!r}): when[{name!r}] must begin with an integer, got {low!r}")
        object.__setattr__(self, "blocks", MappingProxyType(dict(self.blocks)))
        object.__setattr__(self, "when", MappingProxyType(dict(self.when)))

    @classmethod
    def one_stage(cls, source: str) -> Callable[..., Tile]:
        """How a platform's file writes tiles without a pipeline, all of one source: the blocks are keywords."""

        def tile(
            kernel: str,
            num_warps: int,
            dtypes: tuple[str, ...] = (),
            arch: tuple[str, ...] = (),
            when: Mapping[str, tuple[int, int | None]] = MappingProxyType({}),
            triton: tuple[str | None, str | None] = (None, None),
            **blocks: int,
        ) -> Tile:
            return cls(kernel, blocks, num_warps, 1, source, arch, dtypes, triton, when)

        return tile

    def fits(self, arch: str | None, dtype: str, triton: tuple[int, int] | None, sizes: Mapping[str, int]) -> bool:
        """Whether the tile is for this architecture, dtype, Triton and call; None: any."""
        return (
            (not self.arch or arch is None or arch in self.arch)
            and (not self.dtypes or dtype in self.dtypes)
            and (triton is None or _within(self.triton, triton))
            and all(
                low <= sizes[name] and (high is None or sizes[name] <= high) for name, (low, high) in self.when.items()
            )
        )


@dataclass(frozen=True)
class LaunchOption:
    """Something a platform's Triton takes beside num_warps and num_stages.

    `kind` is "launch" (a keyword of the launch) or "environment" (a variable that its compiler reads). `values` are
    those known. `passed` is what the kernels in `kernels` are launched with, where that Triton knows the option; None:
    left to Triton. A keyword is known where Triton's own options have it; a variable, which cannot be asked for, where
    Triton is in the range `triton` (from the first version on, before the second). A variable is for inputs of `dtypes`
    alone (empty: all), and one that the user has set stays.
    """

    name: str
    values: tuple[str, ...]
    kind: str
    kernels: tuple[str, ...]
    source: str
    passed: str | None = None
    triton: tuple[str | None, str | None] = (None, None)
    dtypes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("launch", "environment"):
            raise ValueError(f'LaunchOption({self.name!r}): kind must be "launch" or "environment", got {self.kind!r}')
        if not self.source.strip():
            raise ValueError(f"LaunchOption({self.name!r}): source must not be empty")
        if self.passed is not None and self.passed not in self.values:
            raise ValueError(f"LaunchOption({self.name!r}): passed must be one of {self.values}, got {self.passed!r}")

    def knows(self, triton: tuple[int, int]) -> bool:
        """Whether a Triton of this version is in the option's range."""
        return _within(self.triton, triton)


@dataclass(frozen=True)
class CILane:
    """What a workflow needs to run the tests there (ci_matrix.py). `platform` is the name InfiniTensor/ci uses, None:
    not one of its.

    `runner` is the label of the machines, `setup` are shell commands before the tests, `notes` what a person who adds a
    runner should know. `pulled` False: the image is in no registry, so a machine must hold it already. `docker` and
    `volumes` are arguments of `docker run`; `gpu_style` and `devices` are how InfiniTensor/ci hands devices over, and
    how many. `smi` is the vendor's tool that shows the board and its driver's version.
    """

    platform: str | None
    runner: str
    image: str | None
    source: str
    execution_mode: str = "agent_local"
    pulled: bool = True
    docker: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    gpu_style: str = "none"
    devices: int = 1
    smi: str | None = None
    timeout_minutes: int = 60
    setup: tuple[str, ...] = ()
    notes: tuple[Fact, ...] = ()

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError(f"CILane({self.runner!r}): source must not be empty")
        if self.execution_mode not in ("agent_local", "hosted"):
            mode = self.execution_mode
            raise ValueError(f'CILane({self.runner!r}): execution_mode must be "agent_local" or "hosted", got {mode!r}')
        for name in ("docker", "volumes", "setup", "notes"):  # a lone string would be walked letter by letter
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"CILane({self.runner!r}): {name} must be a tuple, got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: a platform exists once, and caches key on it
class Platform:
    """One accelerator family. `gates` maps an op or "*" to a mapping from a dtype's name or "*" to a `Gate`.

    `interpreted_gates`, where given, hold in their place while Triton's interpreter runs the kernels.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    markers: Markers
    limits: tuple[Limits, ...]
    gates: Mapping[str, Mapping[str, Gate]]
    ci: CILane | None
    extra_import: str | None = None  # the module that adds the device type to torch
    triton_min: Fact | None = None
    # How much longer a FLOP of attention takes than one of a projection: absorbed and expanded form are weighed by it.
    attention_flop_cost: Fact = Fact(1, "derived: both at the same rate, as on paper")
    tiles: tuple[Tile, ...] = ()
    # 1: compiled kernels may be handed to the driver past Triton's own launch, which costs more (kernel.py)
    direct_launch: Fact = Fact(0, "not tried: a vendor's Triton may take its arguments otherwise")
    interpreted_gates: Mapping[str, Mapping[str, Gate]] | None = None
    known_bad: tuple[Fact, ...] = ()
    launch_options: tuple[LaunchOption, ...] = ()
    notes: tuple[Fact, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for text in (self.name, *self.aliases):
            if not text or text != text.lower() or not text.replace("_", "").isalnum():
                raise ValueError(f"platform {self.name!r}: names are lower-case letters and digits, got {text!r}")
        if len({self.name, *self.aliases}) != 1 + len(self.aliases):
            raise ValueError(f"platform {self.name!r}: duplicate alias in {self.aliases!r}")
        _instances(self, "markers", (self.markers,), Markers)
        for name, kind in (
            ("limits", Limits), ("tiles", Tile), ("known_bad", Fact), ("notes", Fact), ("launch_options", LaunchOption),
        ):  # fmt: skip
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(
                    f"platform {self.name!r}: {name} must be a tuple, got {type(getattr(self, name)).__name__}"
                )
            _instances(self, name, getattr(self, name), kind)
        capabilities = [limits.min_capability for limits in self.limits]
        if len(set(capabilities)) != len(capabilities):
            raise ValueError(f"platform {self.name!r}: two limits begin at the same capability: {capabilities}")
        for op, row in self.gates.items():
            _instances(self, f"gates[{op!r}]", row.values(), Gate)
        for dtype in {dtype for row in self.gates.values() for dtype in row} - {"*"}:
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"platform {self.name!r}: gates name {dtype!r}, which is no torch dtype")
        known = {limits.arch for limits in self.limits}
        for tile in self.tiles:
            if unknown := set(tile.arch) - known:
                raise ValueError(f"platform {self.name!r}: a tile of {tile.kernel} is for {unknown}, not in its limits")
        for name in ("gates", "interpreted_gates"):
            if getattr(self, name) is not None:
                frozen = {op: MappingProxyType(dict(row)) for op, row in getattr(self, name).items()}
                object.__setattr__(self, name, MappingProxyType(frozen))

    def gate(self, op: str, dtype: torch.dtype, interpreted: bool = False) -> Gate:
        """The gate of `op` in `dtype`: the op's own row first, then the row "*", each by dtype, then by "*"."""
        name = dtype_name(dtype)
        gates = self.interpreted_gates if interpreted and self.interpreted_gates is not None else self.gates
        for row in (gates.get(op, {}), gates.get("*", {})):
            for key in (name, "*"):
                if key in row:
                    return row[key]
        return Gate("reference", f"{self.title}: nothing is known about {op} in {name}")

    def tile(
        self, kernel: str, arch: str | None, dtype: torch.dtype, triton: tuple[int, int] | None, **sizes: int
    ) -> Tile | None:
        """The first tile of `kernel` that fits; arch or triton None: any of them."""
        name = dtype_name(dtype)
        return next((t for t in self.tiles if t.kernel == kernel and t.fits(arch, name, triton, sizes)), None)

    def limits_for(self, capability: tuple[int, int] | None) -> Limits | None:
        """The limits of the newest architecture that is not newer than `capability`; None: ask the driver."""
        known = [
            limits
            for limits in self.limits
            if limits.min_capability is None or (capability is not None and limits.min_capability <= tuple(capability))
        ]
        return max(known, key=lambda limits: limits.min_capability or (-1, -1), default=None)


def _instances(platform: Platform, name: str, values: Iterable[object], kind: type) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"platform {platform.name!r}: {name} needs {kind.__name__}, got {type(value).__name__}")


_found: dict[str, Platform] | None = None  # from the folder, None until asked for
_registered: dict[str, Platform] = {}  # by register_platform
generation = 0  # grows with every change of the list; part of the key of whatever is cached about it


def all_platforms() -> dict[str, Platform]:
    """Every platform by name: the files of `ntops_mla.platforms`, by marker order, then the registered ones."""
    global _found
    if _found is None:
        _found = _discover()
    return {**_found, **_registered}


def get_platform(name: str) -> Platform:
    """The platform called `name`, which may be an alias, in any case."""
    wanted = str(name).strip().lower()
    for platform in all_platforms().values():
        if wanted == platform.name or wanted in platform.aliases:
            return platform
    known = ", ".join(" = ".join((p.name, *p.aliases)) for p in all_platforms().values())
    raise ValueError(f"unknown platform {name!r}; known: {known}")


def register_platform(platform: Platform) -> None:
    """Adds a platform that is not a file here. Its name and aliases must be new."""
    if not isinstance(platform, Platform):
        raise TypeError(f"register_platform: a Platform is needed, got {type(platform).__name__}")
    _check_names([*all_platforms().values(), platform])
    _registered[platform.name] = platform
    _changed()


def unregister_platform(name: str) -> None:
    """Takes back what `register_platform` added."""
    if name not in _registered:
        raise ValueError(f"{name!r} was not registered; registered: {', '.join(_registered) or 'none'}")
    del _registered[name]
    _changed()


def reset() -> None:
    """Forgets what was discovered and detected; registered platforms stay."""
    global _found
    _found = None
    _changed()


def _changed() -> None:
    global generation
    generation += 1


def _discover() -> dict[str, Platform]:
    package = importlib.import_module("ntops_mla.platforms")  # a namespace package: the folder has no __init__.py
    platforms = []
    for module in pkgutil.iter_modules(package.__path__):
        where = f"{getattr(module.module_finder, 'path', package.__name__)}/{module.name}.py"
        try:
            platform = importlib.import_module(f"{package.__name__}.{module.name}").PLATFORM
        except Exception as error:
            raise RuntimeError(f"platform file {where} is broken: {type(error).__name__}: {error}") from error
        if not isinstance(platform, Platform):
            raise RuntimeError(f"platform file {where}: PLATFORM must be a Platform, got {type(platform).__name__}")
        if platform.name != module.name:
            raise RuntimeError(f"platform file {where}: PLATFORM is called {platform.name!r}, not {module.name!r}")
        platforms.append(platform)
    if not platforms:
        raise RuntimeError(f"no platform file in {', '.join(package.__path__) or package.__name__}")
    _check_names(platforms)
    return {platform.name: platform for platform in sorted(platforms, key=lambda p: (p.markers.order, p.name))}


def _check_names(platforms: list[Platform]) -> None:
    owners: dict[str, str] = {}
    for platform in platforms:
        for name in (platform.name, *platform.aliases):
            if name in owners:
                raise ValueError(f"{name!r} names two platforms: {owners[name]} and {platform.name}")
            owners[name] = platform.name


def __getattr__(name: str) -> object:
    # `devices` imports this file, so it can only be asked for afterwards
    if name in __all__:
        return getattr(importlib.import_module("ntops_mla.devices"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
