"""Whether a board is ready, and which kernels work on it: each tried in a process of its own.

A vendor's compiler may end the process, or never return: then the process that tried it is gone, and this one says so.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import inspect
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ntops_mla import child, dispatch, findings, interpreter, ops, testing
from ntops_mla import platform as platforms
from ntops_mla.board import Needed, board_of, first_line
from ntops_mla.ops import _fp8
from ntops_mla.platform import Detection, dtype_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# More than a compiler needs for one kernel, on boards where that is a complaint (a minute and more)
TIMEOUT = 300.0

# Small calls that take every kernel and tile a platform may have for an op: few rows, more than 16, more than 32; short
# pages, more keys than a tile holds, splits that are combined; each size of head
_CALLS: dict[str, tuple[dict[str, int], ...]] = {
    "rms_norm": ({}, {"kv_lora_rank": 7168}),
    "rope": ({"heads": 20}, {"rope": 32}),
    "latent_append": ({}, {"q_heads": 20}, {"kv_lora_rank": 256, "rope": 32}),
    "latent_append_fp8": ({}, {"q_heads": 20}),
    "mla_decode": (
        {"heads": 16, "keys": 150, "num_splits": 3},
        {"heads": 16, "keys": 600, "scheduled": True},
        {"heads": 20, "keys": 70},
        {"heads": 128, "keys": 70},
        {"heads": 16, "keys": 40, "page_size": 16},
        {"heads": 40, "keys": 40, "page_size": 32},
        {"heads": 8, "keys": 70, "s_q": 2},
        {"heads": 16, "keys": 70, "kv_lora_rank": 256, "rope": 32},
    ),
    "mla_decode_fp8": (
        {"heads": 16, "keys": 150, "num_splits": 3},
        {"heads": 16, "keys": 600, "scheduled": True},
        {"heads": 20, "keys": 70},
        {"heads": 128, "keys": 70},
        {"heads": 16, "keys": 40, "page_size": 16},
        {"heads": 8, "keys": 70, "s_q": 2},
    ),
    "mla_sparse": (
        {"heads": 16, "topk": 150, "num_splits": 3, "want_max": True},
        {"heads": 20, "topk": 70, "page_size": 61, "gap": 2},
        {"heads": 128, "topk": 70, "page_size": 1, "pages": 100},
        {"heads": 16, "topk": 70, "kv_lora_rank": 256, "rope": 32},
    ),
    "mla_sparse_fp8": (
        {"heads": 16, "topk": 150, "num_splits": 3, "want_max": True},
        {"heads": 20, "topk": 70, "page_size": 61},
        {"heads": 128, "topk": 70, "page_size": 1, "pages": 100},
    ),
    "mla_prefill": ({"heads": 2, "tokens": 40}, {"heads": 2, "tokens": 40, "nope": 192, "v": 256}),
}
# As FlashMLA's tests have them for two-byte inputs; exact products in float32 lose some 1e-6
_TWO_BYTES = (testing.DECODE_OUT, testing.DECODE_LSE)
# Of a quantised cache as it reads: a rounding of the latent that fell otherwise can move a code by a whole step
_QUANTIZED = testing.Tolerance(2e-5, 1.01 / 8, 5e-6)
_TOLERANCES = {
    torch.bfloat16: _TWO_BYTES,
    torch.float16: _TWO_BYTES,
    torch.float32: (testing.Tolerance(1e-5, 1e-4), testing.Tolerance(1e-5, 1e-5)),
}


def preflight(detection: Detection, timeout: float = TIMEOUT) -> dict[str, Any]:
    """What was detected, Triton and its target, the limits, and a small float32 sum; `problems` are in plain words."""
    answer = _child(["--child", "sum", "--device", str(detection.device)], None, timeout)
    info = platforms.probe(detection.device)
    limits = detection.platform.limits_for(info.capability)
    problems = [] if answer["works"] else [f"a sum of two float32 tensors: {answer['reason']}"]
    if answer.get("problem") and detection.platform.limits:  # a CPU has none, and no kernels
        problems.append(answer["problem"])
    notes, known = [], limits and limits.shared_memory.value
    if known and info.shared_memory and info.shared_memory != known:  # which may be what a block has without asking
        notes.append(
            f"shared memory is {info.shared_memory} bytes here, {known} in platforms/{detection.platform.name}.py"
        )
    return {
        "platform": detection.platform.name,
        "reason": detection.reason,
        "device": str(detection.device),
        "name": info.name or str(detection.device),
        "capability": None if info.capability is None else list(info.capability),
        "limits": limits and limits.arch,
        "triton": answer.get("triton"),
        "triton_target": answer.get("triton_target"),
        "shared_memory": info.shared_memory,
        "notes": notes,
        "problems": problems,
    }


def examine_all(
    detection: Detection,
    board: dict[str, Any],
    names: Iterable[str],
    dtypes: Iterable[torch.dtype],
    timeout: float = TIMEOUT,
) -> Iterator[dict[str, Any]]:
    """One row an op and dtype: op, dtype, works (None: PyTorch runs there anyway), reason, seconds."""
    trial = {
        "platform": board["platform"],
        "device": board["name"],
        "triton": board["triton"] or "none",
        "date": datetime.date.today().isoformat(),
        # Allows what is refused until somebody has tried: this is the trial
        "kernels": [
            {"op": op, "dtype": dtype_name(dtype), "works": True, "reason": ""}
            for op in ops.names()
            for dtype in ops.get(op).dtypes
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "trial.json")
        findings.write(path, trial)
        for op in names:
            for dtype in ops.get(op).tried_in(dtypes):
                gate = detection.platform.gate(op, dtype, interpreter.enabled())
                if gate.mode == "reference":
                    yield {"op": op, "dtype": dtype_name(dtype), "works": None, "reason": gate.reason, "seconds": 0.0}
                    continue
                start = time.monotonic()
                one = ["--child", op, "--dtype", dtype_name(dtype), "--device", str(detection.device)]
                answer = _child(one, path, timeout)
                yield {
                    "op": op,
                    "dtype": dtype_name(dtype),
                    "works": answer["works"],
                    "reason": answer["reason"],
                    "products": answer.get("products", []),
                    "seconds": round(time.monotonic() - start, 1),
                }


def report(board: dict[str, Any], kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` holds, and what `findings` reads as a gates file."""
    return {
        "platform": board["platform"],
        "device": board["name"],
        "triton": board["triton"] or "none",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "interpreted": interpreter.enabled(),
        "preflight": board,
        "kernels": kernels,
    }


# In a process of its own


def _child(arguments: list[str], gates: pathlib.Path | None, timeout: float) -> dict[str, Any]:
    """The answer of `python -m ntops_mla doctor` with `arguments`; what ended it where there is none."""
    settings = {"NTOPS_MLA_BACKEND", "NTOPS_MLA_STRICT", findings.VARIABLE}
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    if gates is not None:
        environment[findings.VARIABLE] = str(gates)
    return child.ask(["doctor", *arguments], environment, timeout)


def add(device: torch.device) -> dict[str, Any]:
    """A sum of two float32 tensors on the device, and what Triton and its driver say there."""
    a, b = torch.randn(1000), torch.randn(1000)
    works = torch.equal((a.to(device) + b.to(device)).cpu(), a + b)
    told: dict[str, Any] = {"works": works, "reason": "" if works else "the result is not the CPU's"}
    try:
        told["triton"] = importlib.import_module("triton").__version__
    except Exception as error:  # whatever a vendor's raises is the finding
        told["triton"] = None
        told["problem"] = f"Triton does not import: {type(error).__name__}: {first_line(error)}"
        return told
    board = board_of(platforms.detect(device))
    return {**told, "triton_target": platforms.probe(device).triton_target, "problem": board.problem}


def examine(op_name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Whether the kernel of an op computes what PyTorch does on the CPU, in a dtype, in every small call."""
    op, products = ops.get(op_name), []
    with contextlib.suppress(Exception):  # `explain` asks a Triton that is imported; why it cannot be, it says itself
        importlib.import_module("triton")
    for said, on_cpu in small_calls(op_name, dtype):
        args = moved(on_cpu, device)
        print(f"{op_name} {said}", file=sys.stderr, flush=True)  # the last words, where the process ends here
        try:
            choice = op.explain(*args)
            if choice.backend == "reference":
                return {"works": None, "reason": choice.reason}
            with dispatch.use("kernel"):
                result = op.function(*args)
            compare(op_name, on_cpu, args, result)
            products += [list(needed.products) for needed in _needed(op, device, args) if needed.products]
        except Exception as error:
            return {"works": False, "reason": said + first_line(error)}
    return {"works": True, "reason": "", "products": products}


def _needed(op: Any, device: torch.device, args: tuple) -> list[Needed]:
    dtypes, sizes = op.spec.key(*args)
    return op.spec.tiles(board_of(platforms.detect(device)), dtypes, sizes) if op.spec.tiles else []


def small_calls(op_name: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """What a small call is, in words, and its arguments, on the CPU."""
    for sizes in _CALLS.get(op_name, ({},)):
        on_cpu = ops.get(op_name).example(torch.device("cpu"), dtype, **sizes)
        if op_name in ("mla_decode", "mla_prefill", "mla_sparse"):  # FlashMLA's tolerances are for values around 0.1
            for base in {id(base): base for base in map(_base, filter(_is_float, on_cpu))}.values():
                base.mul_(0.1)
        said = ", ".join(f"{name} {value}" for name, value in sizes.items())
        yield f"{said}: " if said else "", on_cpu


def moved(values: tuple, device: torch.device) -> tuple:
    """Copies on `device`; a view stays one, of its storage's copy."""
    copies: dict[int, torch.Tensor] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        base = _base(value)
        if id(base) not in copies:
            copies[id(base)] = base.clone().to(device)
        return copies[id(base)].as_strided(value.shape, value.stride(), value.storage_offset())

    return tuple(map(move, values))


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _base(value: torch.Tensor) -> torch.Tensor:
    """The tensor that `value` is a view of."""
    return value if value._base is None else value._base


def _read(value: torch.Tensor) -> torch.Tensor:
    """What a quantised cache holds, in place of its bytes."""
    return _fp8.dequantize(value, torch.float64) if value.dtype == torch.uint8 else value


def compare(op_name: str, on_cpu: tuple, args: tuple, result: Any) -> None:
    """Compare with the reference in float64 on the CPU: results, or the arguments that the op wrote to."""
    op = ops.get(op_name)
    names = inspect.signature(op.function).parameters  # cos and sin are float32 in every op
    exact = (a.double() if _is_float(a) and name not in ("cos", "sin") else a for name, a in zip(names, on_cpu))
    arguments = moved(tuple(exact), torch.device("cpu"))
    expected = op.reference(*arguments)
    if isinstance(expected, torch.Tensor) and not expected.is_floating_point():
        assert torch.equal(result.cpu(), expected), f"{op_name}: not PyTorch's whole numbers"
        return
    # latent_dequantize has no tensor of the dtype, and its name instead
    dtype = next(getattr(a, "dtype", a) for a in args if _is_float(a) or isinstance(a, torch.dtype))
    value, lse = _TOLERANCES[dtype]
    if expected is None:
        pairs = [
            (_read(a), _read(b), _QUANTIZED if a.dtype == torch.uint8 else value)
            for a, b in zip(args, arguments)
            if isinstance(a, torch.Tensor)
        ]
    elif isinstance(expected, torch.Tensor):
        pairs = [(result, expected, value)]
    else:
        pairs = list(zip(result, expected, (value, lse)))
    for got, wanted, tolerance in pairs:
        testing.assert_close(got, wanted, tolerance)
