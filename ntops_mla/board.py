"""The board at hand: a platform with the limits of one device, its processors, and the Triton that is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import re
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ntops_mla import interpreter, tile_table
from ntops_mla.kernel import Kernel, make
from ntops_mla.platform import Detection, LaunchOption, Limits, Platform, Tile, dtype_name, probe, version_pair

# What a kernel that is only asked for its form may assume, and what the interpreter pretends: few, so that it splits.
_PROCESSORS = 4


class Needed(NamedTuple):
    """A kernel that a call launches, its tile (None: the platform has none that fits), the rows and columns of its
    products."""

    kernel: str
    tile: Tile | None
    products: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)  # one for each device: hashed by identity, as part of the key of every call
class Board:
    """`limits` None: of no known architecture; `triton` None: any version. `problem`: why no kernel can run here.

    `options`: those of the platform's launch options that are passed, because this Triton knows them. `device` and
    `triton_version`: the board's name and its Triton's version as they are, for what was found on exactly them.
    `tiles`: those timed on this device (tile_table.py), which come before the platform's. `asked`: Triton was imported,
    and says that it is one for this board.
    """

    platform: Platform
    limits: Limits | None = None
    triton: tuple[int, int] | None = None
    processors: int = _PROCESSORS
    problem: str | None = None
    options: tuple[LaunchOption, ...] = ()
    device: str | None = None
    triton_version: str | None = None
    tiles: tuple[Tile, ...] = ()
    asked: bool = True

    def tile(self, kernel: str, dtype: torch.dtype, **sizes: int) -> Tile | None:
        """The tile to make `kernel` with, None where there is none that fits."""
        arch, name = self.limits and self.limits.arch, dtype_name(dtype)
        timed = (tile for tile in self.tiles if tile.kernel == kernel and tile.fits(arch, name, self.triton, sizes))
        return next(timed, None) or self.platform.tile(kernel, arch, dtype, self.triton, **sizes)

    def make(self, kernel: str, tile: Tile, **parameters: int) -> Kernel:
        """`kernel` with the numbers of `tile`; `parameters` are further ones, and win."""
        passed = [option for option in self.options if kernel in option.kernels]
        launch = tuple((option.name, option.passed) for option in passed if option.kind == "launch")
        environment = tuple(
            (option.name, option.passed, option.dtypes) for option in passed if option.kind == "environment"
        )
        direct = bool(self.platform.direct_launch.value)
        blocks = {**tile.blocks, **parameters}
        return make(kernel, tile.num_warps, tile.num_stages, tile.options + launch, environment, direct, **blocks)

    def __str__(self) -> str:
        parts = [self.platform.title]
        if self.limits is not None:
            parts.append(self.limits.arch)
        if self.triton is not None:
            parts.append("Triton " + ".".join(map(str, self.triton)))
        return ", ".join(parts)


def board_of(detection: Detection) -> Board:
    """The board of a device that is there; a detection without a device pretends one of the platform's."""
    if detection.device is None:
        limits = detection.platform.limits
        return Board(detection.platform, limits[0] if len(limits) == 1 else None)
    return _board(detection.platform, detection.device)


def glance(detection: Detection) -> Board:
    """The board as far as it can be told without importing Triton, which takes a quarter of a second."""
    device = detection.device
    known = device is None or device.type in ("cpu", "meta") or "triton" in sys.modules or interpreter.enabled()
    return (None if known else _unasked(detection.platform, device)) or board_of(detection)


@functools.lru_cache(maxsize=64)
def _unasked(platform: Platform, device: torch.device) -> Board | None:
    version = _installed_triton()
    return version and _described(platform, device, version, asked=False)


def _installed_triton() -> str | None:
    """The version that Triton's own file states: vendors' distributions have other names."""
    try:
        spec = importlib.util.find_spec("triton")
        text = pathlib.Path(spec.origin).read_text(encoding="utf-8")
        version = re.search(r"""^__version__ = ["'](\d+\.\d+\.[^"']+)""", text, re.MULTILINE)
    except (AttributeError, ImportError, OSError, TypeError, ValueError):
        return None
    return version and version[1]


@functools.lru_cache(maxsize=64)
def _board(platform: Platform, device: torch.device) -> Board:
    interpreted = interpreter.enabled()
    kind = device.type
    if kind in ("cpu", "meta") and not interpreted:
        return Board(platform, problem=f"a kernel runs on {kind} tensors only in Triton's interpreter")
    try:
        if interpreted:
            interpreter.activate()
        version = importlib.import_module("triton").__version__
        version_pair(version)
    except Exception as error:  # a vendor's Triton may raise anything, for example where its MACA_PATH is unset
        return Board(platform, problem=f"Triton does not import: {type(error).__name__}: {first_line(error)}")
    if interpreted:  # what an old Triton cannot compile it can still interpret
        return Board(platform)
    return _described(platform, device, version, asked=True)


def _described(platform: Platform, device: torch.device, version: str, asked: bool) -> Board:
    """The board with this version of Triton; only one that was imported can be asked for its target and options."""
    info, triton = probe(device), version_pair(version)
    limits = platform.limits_for(info.capability)
    if limits is None:
        problem = f"no limits are known for capability {info.capability}"
        return Board(platform, triton=triton, problem=problem, asked=asked)
    problem = too_old(platform, limits, triton) or (_stranger(limits) if asked else None)
    options = tuple(known_options(platform, triton)) if asked and not problem else ()
    tiles = () if problem else tile_table.tiles_for(platform.name, info.name, version)
    processors = info.processors or _PROCESSORS
    return Board(platform, limits, triton, processors, problem, options, info.name, version, tiles, asked)


def known_options(platform: Platform, triton: tuple[int, int]) -> list[LaunchOption]:
    """The launch options that `platform` passes and the installed Triton knows: it raises on a keyword it does not."""
    passed = [option for option in platform.launch_options if option.passed is not None and option.knows(triton)]
    if not any(option.kind == "launch" for option in passed):
        return passed
    try:
        from triton.compiler.compiler import make_backend
        from triton.runtime import driver

        keywords = vars(make_backend(driver.active.get_current_target()).parse_options({}))
    except Exception:  # a Triton that cannot be asked launches without them
        keywords = {}
    return [option for option in passed if option.kind == "environment" or option.name in keywords]


def too_old(platform: Platform, limits: Limits, triton: tuple[int, int]) -> str | None:
    """Why this Triton is not enough for an architecture, None where it is."""
    for least in (platform.triton_min, limits.triton_min):
        if least is not None and triton < version_pair(least.value):
            return f"Triton {triton[0]}.{triton[1]} is older than {least.value} ({least.source})"
    return None


def _stranger(limits: Limits) -> str | None:
    """Why the installed Triton is not one for this board: another vendor's finds no driver, or names its own target."""
    try:
        from triton.runtime import driver

        target = driver.active.get_current_target()
    except Exception as error:
        return f"Triton finds no driver for this board: {type(error).__name__}: {first_line(error)}"
    expected = str(limits.triton_target.value) if limits.triton_target else ""
    backends = re.findall(r"(\w+):", expected)
    lanes = limits.lanes.value
    if (backends and target.backend not in backends) or (lanes and target.warp_size != lanes):
        return (
            f"Triton compiles for {target.backend}:{target.arch} with {target.warp_size} lanes, "
            f"and this board's Triton for {expected} with {lanes}"
        )
    return None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"


def forget() -> None:
    """Look at every device anew."""
    _board.cache_clear()
    _unasked.cache_clear()
