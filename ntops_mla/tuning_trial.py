"""What a tile is tried and timed with: a case's calls, one trial in a process of its own, the clock of a device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ntops_mla import doctor, ops
from ntops_mla import kernel as kernels
from ntops_mla import platform as platforms
from ntops_mla.board import Board, board_of, first_line
from ntops_mla.kernel import Kernel
from ntops_mla.platform import Tile, dtype_name

# Written before each measurement, so that no candidate finds its inputs in a cache: larger than any board's L2, and
# long enough that the launch is prepared meanwhile
_FLUSH_BYTES = 256 << 20


class Load(NamedTuple):
    """How much a timed call has to do: requests and cached tokens of each in decode, tokens in all other ops.

    mla_sparse: as many tokens as decode has requests, with as many keys each.
    """

    batch: int = 64
    keys: int = 2048
    tokens: int = 2048


# For the comparison with float64 on the CPU: three ragged requests, more than a tile of rows
_SMALL = Load(batch=3, keys=150, tokens=40)


@dataclass(frozen=True, eq=False)
class Case:
    """One kernel at one point of its sizes, in one dtype. `op` launches it.

    call: sizes of the op's example. point: the sizes that a tile is chosen by, in this call. ranges: where a tile that
    is good at the point is taken beyond it, by size.
    """

    kernel: str
    op: str
    dtype: torch.dtype
    call: Mapping[str, int]
    point: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    @property
    def when(self) -> dict[str, tuple[int, int | None]]:
        """For which sizes a tile that is good here is taken: exactly the point's, but for `ranges`."""
        return {name: tuple(self.ranges.get(name, (value, value))) for name, value in self.point.items()}

    def data(self) -> dict[str, Any]:
        """As plain data, for `from_data`."""
        return {**vars(self), "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Case:
        """The case that `data` was made of."""
        return cls(**{**data, "dtype": getattr(torch, data["dtype"])})

    def __str__(self) -> str:
        sizes = (f"{name} {_range(*ends)}" for name, ends in self.when.items())
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')}, {', '.join(sizes)}"


def _range(least: int, greatest: int | None) -> str:
    if greatest is None:
        return f"from {least}"
    return str(least) if least == greatest else f"{least} to {greatest}"


def arguments(
    case: Case, load: Load, device: torch.device, ragged: bool = False, splits: int | None = None
) -> tuple[Any, ...]:
    """A call of the case's op. ragged: requests of different lengths. splits: of the keys, None: chosen."""
    op = ops.get(case.op)
    lengths = [max(1, load.keys >> i) if ragged else load.keys for i in range(load.batch)]
    if case.op == "mla_decode_fp8":
        args = list(op.example(device, case.dtype, tokens=load.batch, keys=load.keys, **case.call))
        args[4] = torch.tensor(lengths, dtype=torch.int32, device=device)
        return *args[:-2], splits, None
    if case.op in ("mla_sparse", "mla_sparse_fp8"):
        sizes = {"tokens": load.batch, "topk": load.keys, "pages": -(-load.keys * load.batch // 64), **case.call}
        *args, _, _ = op.example(device, case.dtype, **sizes, ragged=ragged)
        if case.op == "mla_sparse":  # an fp8 cache's example is small already
            args = [a * 0.1 if _is_input(a) else a for a in args]
        return *args, splits, True
    if case.op != "mla_decode":
        args = op.example(device, case.dtype, tokens=load.tokens, **case.call)
        # FlashMLA's tolerances are for values around 0.1.
        return tuple(a * 0.1 if _is_input(a) else a for a in args) if case.op == "mla_prefill" else args
    q_nope, q_pe, _, _, _, _, scale, causal, *_ = op.example(device, case.dtype, tokens=load.batch, **case.call)
    page_size, latent = case.point.get("page_size", 64), case.call["kv_lora_rank"]
    pages = -(-load.keys // page_size)
    cache = (
        torch.randn(load.batch * pages, page_size, latent + case.call["rope"], device=device, dtype=case.dtype) * 0.1
    )
    return (
        q_nope * 0.1,
        q_pe * 0.1,
        cache[:, :, :latent],
        cache[:, :, latent:],
        torch.arange(load.batch * pages, dtype=torch.int32, device=device).view(load.batch, pages),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        scale,
        causal,
        splits,
        None,
    )


def _is_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def with_tile(board: Board, case: Case, tile: Tile) -> Board:
    """The board as it would be with a table of this one tile."""
    return replace(board, tiles=(replace(tile, dtypes=(dtype_name(case.dtype),), when=case.when),))


def timed_call(case: Case, load: Load, device: torch.device) -> tuple[Any, ...]:
    """The arguments of the call that is timed."""
    return arguments(case, load, device, splits=8 if case.kernel == "mla_combine" else None)


def launches(board: Board, case: Case, args: tuple[Any, ...]) -> list[tuple[Kernel, tuple]]:
    """(kernel, arguments) of each launch of a call that is timed; all of them have run once.

    mla_decode and mla_sparse are timed with their combine, since their tile decides how many splits there are;
    mla_combine alone.
    """
    with kernels.capture() as made:
        ops.get(case.op).spec.kernel(board, *args)
    for kernel, given in made:
        kernel(*given)
    platforms.synchronize(args[0].device)
    return [(kernel, given) for kernel, given in made if case.kernel != "mla_combine" or kernel.name == "mla_combine"]


def examine(question: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a tile compiles, computes what PyTorch does on the CPU, and runs the timed call; what it spills."""
    case, device, load = Case.from_data(question["case"]), torch.device(question["device"]), Load(**question["load"])
    op, tile = ops.get(case.op), Tile(case.kernel, source="a candidate of tune", **question["tile"])
    board = with_tile(board_of(platforms.detect(device)), case, tile)
    try:
        for splits in (None, 3) if case.op.startswith(("mla_decode", "mla_sparse")) else (None,):
            on_cpu = arguments(case, _SMALL, torch.device("cpu"), ragged=True, splits=splits)
            args = doctor.moved(on_cpu, device)
            doctor.compare(case.op, on_cpu, args, op.spec.kernel(board, *args))
        spills = [_spills(kernel, args) for kernel, args in launches(board, case, timed_call(case, load, device))]
    except Exception as error:  # whatever a vendor's compiler raises is the finding
        return {"works": False, "reason": f"{type(error).__name__}: {first_line(error)}"}
    known = [number for number in spills if number is not None]
    return {"works": True, "reason": "", "spills": sum(known) if known else None}


def _spills(kernel: Kernel, args: tuple) -> int | None:
    """Registers that the compiled kernel spills, None where its Triton does not tell."""
    grid, given, keywords = kernel.record(*args)
    with kernel._variables(args[0].dtype):  # as it was launched, so that Triton finds it in its cache
        try:
            compiled = kernel.function.warmup(*given, grid=grid, **keywords, **kernel.options)
            compiled._init_handles()
            return int(compiled.n_spills)
        except Exception:  # a vendor's Triton names it otherwise, an interpreter compiles nothing
            return None


class Clock:
    """Microseconds that work takes on a device, by events around it, after its L2 was written over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = functools.partial(platforms.device_module(device).Event, enable_timing=True)
        self._flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def __call__(self, work: Callable[[], None]) -> float:
        self._flush.zero_()
        start, end = self._event(), self._event()
        start.record()
        work()
        end.record()
        platforms.synchronize(self._device)
        return 1000 * start.elapsed_time(end)
