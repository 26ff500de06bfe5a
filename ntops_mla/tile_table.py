"""Tiles that were timed on a board: the files that `python -m ntops_mla tune` writes, read for the board at hand.

A board prefers them to the tiles of its platform's file. They are read once for each device, from the file that
`NTOPS_MLA_TILES` names and from those shipped in `ntops_mla/tile_tables/`, in this order; nothing is timed or chosen by
time where kernels run. A table counts for the very device and the Triton (major.minor) that it was made with.

The file is JSON: `platform`, `device` (its name), `triton` (its version), `date`, `commit`, and `rows`, a list of
{`kernel`, `blocks`, `num_warps`, `num_stages`, `dtypes`, `when`, `microseconds` (median), `spread` (between the
quartiles), `before` (the platform's tile and its time: `blocks`, `num_warps`, `num_stages`, `microseconds`, `spread`;
null where it does not work there), `load` (what was timed)}. `when` says for which sizes of a call: {name: [least,
greatest]}, null: no end.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ntops_mla.platform import Tile, version_pair

VARIABLE = "NTOPS_MLA_TILES"
FOLDER = pathlib.Path(__file__).parent / "tile_tables"


class Form(NamedTuple):
    """What a kernel's tile consists of, and the sizes of a call that it may depend on."""

    blocks: tuple[str, ...]
    sizes: tuple[str, ...]


KERNELS = {
    "rms_norm": Form((), ("width",)),
    "rope": Form(("block_h",), ("width",)),
    "latent_append": Form((), ("latent",)),
    "latent_append_rope": Form(("block_h",), ("latent",)),
    "latent_append_fp8": Form((), ()),
    "latent_append_fp8_rope": Form(("block_h",), ()),
    "latent_quantize": Form((), ()),
    "latent_dequantize": Form((), ()),
    "mla_decode": Form(("block_h", "block_n", "block_c"), ("rows", "latent", "page_size", "causal")),
    "mla_decode_fp8": Form(("block_h", "block_n", "hardware"), ("rows", "page_size", "causal")),
    "mla_combine": Form((), ("latent",)),
    "mla_sparse": Form(("block_h", "block_n", "block_c"), ("rows", "latent")),
    "mla_sparse_fp8": Form(("block_h", "block_n", "hardware"), ("rows",)),
    "mla_prefill": Form(("block_m", "block_n"), ("width",)),
}
DTYPES = ("bfloat16", "float16", "float32")

_TEXTS = ("platform", "device", "triton", "date", "commit")
_NUMBERS = ("num_warps", "num_stages")
_TIMES = ("microseconds", "spread")
_TIMED = ("blocks", *_NUMBERS, *_TIMES)
_ROW = ("kernel", *_TIMED, "dtypes", "when", "before", "load")


@dataclass(frozen=True)
class Table:
    """One board's timed tiles."""

    platform: str
    device: str
    triton: str
    date: str
    commit: str
    tiles: tuple[Tile, ...]

    def fits(self, platform: str, device: str | None, triton: str) -> bool:
        """Whether it was made on this device, with this Triton."""
        same = (self.platform, self.device) == (platform, device)
        return same and version_pair(self.triton) == version_pair(triton)


def from_environment() -> Table | None:
    """The table that `NTOPS_MLA_TILES` names, None where it names none; ValueError where it is not as it should be."""
    own = os.environ.get(VARIABLE, "").strip()
    return read(own, f"{VARIABLE}={own}") if own else None


def tiles_for(platform: str, device: str | None, triton: str) -> tuple[Tile, ...]:
    """The timed tiles for a device with a Triton, those of `NTOPS_MLA_TILES` first.

    ValueError where a file is not as it should be; a warning where the variable's is another board's.
    """
    tiles: tuple[Tile, ...] = ()
    table = from_environment()
    if table is not None:
        if table.fits(platform, device, triton):
            tiles = table.tiles
        else:
            warnings.warn(
                f"{VARIABLE}={os.environ[VARIABLE]}: made on {table.device} ({table.platform}) with Triton "
                f"{table.triton}; this is {device} ({platform}) with Triton {triton}, and takes other tiles",
                stacklevel=2,
            )
    shipped = (read(path) for path in sorted(FOLDER.glob("*.json")))
    return sum((table.tiles for table in shipped if table.fits(platform, device, triton)), tiles)


def read(path: str | os.PathLike[str], name: str | None = None) -> Table:
    """The table in a file; ValueError names the file, by `name` if given, and the field."""
    name = str(path) if name is None else name
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read: {error}") from error
    try:
        return parse(data)
    except ValueError as error:
        raise ValueError(f"{name}: not a table as `python -m ntops_mla tune` writes it: {error}") from None


def parse(data: Any) -> Table:
    """The table that `data` is; ValueError names the field."""
    fields = _fields(data, "", (*_TEXTS, "rows"))
    for name in _TEXTS:
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise ValueError(f"{name} must be a text, got {fields[name]!r}")
    texts = {name: fields[name] for name in _TEXTS}
    try:
        version_pair(texts["triton"])
    except ValueError:
        raise ValueError(f"triton must be a version, got {texts['triton']!r}") from None
    if not isinstance(fields["rows"], list):
        raise ValueError(f"rows must be a list, got {fields['rows']!r}")
    source = f"timed on {texts['device']}, Triton {texts['triton']}, {texts['date']}"
    return Table(**texts, tiles=tuple(_tile(row, f"rows[{i}]", source) for i, row in enumerate(fields["rows"])))


def _tile(row: Any, at: str, source: str) -> Tile:
    fields = _fields(row, at, _ROW)
    kernel = fields["kernel"]
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(f"{at}.kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    _check_timed(kernel, fields, at)
    if fields["before"] is not None:
        _check_timed(kernel, _fields(fields["before"], f"{at}.before", _TIMED), f"{at}.before")
    dtypes = fields["dtypes"]
    if not isinstance(dtypes, list) or not dtypes or any(dtype not in DTYPES for dtype in dtypes):
        raise ValueError(f"{at}.dtypes must be a list of {', '.join(DTYPES)}, got {dtypes!r}")
    if not isinstance(fields["load"], Mapping):
        raise ValueError(f"{at}.load must be an object, got {fields['load']!r}")
    when = _when(kernel, fields["when"], f"{at}.when")
    numbers = (fields[name] for name in _NUMBERS)
    return Tile(kernel, fields["blocks"], *numbers, source, dtypes=tuple(dtypes), when=when)


def _check_timed(kernel: str, fields: Mapping[str, Any], at: str) -> None:
    """A tile's numbers and its time."""
    blocks = _fields(fields["blocks"], f"{at}.blocks", KERNELS[kernel].blocks)
    powers = {f"blocks.{name}": value for name, value in blocks.items()} | {"num_warps": fields["num_warps"]}
    for name, value in powers.items():
        if not _is_integer(value) or value < 1 or value & (value - 1):
            raise ValueError(f"{at}.{name} must be a power of two, got {value!r}")
    if not _is_integer(fields["num_stages"]) or fields["num_stages"] < 1:
        raise ValueError(f"{at}.num_stages must be a positive integer, got {fields['num_stages']!r}")
    for name in _TIMES:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{at}.{name} must be a number of microseconds, got {value!r}")


def _when(kernel: str, value: Any, at: str) -> dict[str, tuple[int, int | None]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{at} must be an object, got {value!r}")
    allowed, when = KERNELS[kernel].sizes, {}
    for name, ends in value.items():
        if name not in allowed:
            raise ValueError(f"{at}.{name}: the tile of {kernel} may depend on {', '.join(allowed)} alone")
        least, greatest = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
        if not _is_integer(least) or not (greatest is None or (_is_integer(greatest) and least <= greatest)):
            raise ValueError(f"{at}.{name} must be [least, greatest or null], got {ends!r}")
        when[name] = (least, greatest)
    return when


def _fields(value: Any, at: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    """`value`, an object with exactly these fields."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{at or 'the whole'} must be an object, got {value!r}")
    for name in names:
        if name not in value:
            raise ValueError(f"{at}{'.' if at else ''}{name} is missing")
    for name in value:
        if name not in names:
            raise ValueError(f"{at}{'.' if at else ''}{name} is not a field; there are {', '.join(names) or 'none'}")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
