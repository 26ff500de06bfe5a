"""Kernels on CPU tensors: Triton's interpreter with what it gets wrong put right, and a driver that needs no device.

`NTOPS_MLA_INTERPRET=1` switches it on for a whole process. Triton decides at its import whether functions are compiled
or interpreted, so the variable has to be set before anything imports Triton; `import ntops_mla` passes it on.

What the interpreter gets wrong, in every version from 3.1 to 3.9, and without a word: products of bfloat16 multiply raw
bits, sums of bfloat16 too, casts to bfloat16 truncate where devices round to even, and casts to float8_e4m3 are off in
3 % of all values. Kernels here compute in float32, so only products and casts come up; the sums are repaired because a
kernel that used them would otherwise pass or fail by accident.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from typing import Any

VARIABLE = "NTOPS_MLA_INTERPRET"


def enabled() -> bool:
    """Whether `NTOPS_MLA_INTERPRET=1`; a value that is neither 0 nor 1 is a ValueError."""
    value = os.environ.get(VARIABLE, "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def announce() -> None:
    """Tell Triton before its import, where the interpreter is wanted."""
    if os.environ.get(VARIABLE, "").strip() == "1" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


@functools.cache
def activate() -> None:
    """Make this process interpret: a driver that needs no device, and the repairs."""
    announce()
    import triton

    # What a decorated function became tells how Triton was imported; its setting can be changed afterwards.
    if type(triton.language.sum).__name__ == "JITFunction":
        raise RuntimeError(
            f"{VARIABLE}=1, but Triton was imported before ntops_mla and compiles; "
            "set TRITON_INTERPRET=1 as well, or import ntops_mla first"
        )
    install_driver()
    _repair()


def install_driver(backend: str = "cuda", arch: int | str = 90, lanes: int = 32) -> None:
    """Make a driver active that answers NineToothed's and Triton's questions without a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {
                "max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": lanes,
                "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
            }  # fmt: skip

    class NoDevice(DriverBase):
        def __init__(self) -> None:  # the base's would build a launcher
            self.utils = Utils()

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(backend, arch, lanes)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            import torch

            return torch.cpu

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("there is no device to time")

    triton.runtime.driver.set_active(NoDevice())


def _repair() -> None:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    types = {
        tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64,
        tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
    }  # fmt: skip
    # numpy has no such types: the interpreter keeps their bits in integers
    as_bits = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
    numpy_bits = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
    torch_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
        bits = np.ascontiguousarray(data).view(numpy_bits[data.dtype.itemsize])
        x = torch.from_numpy(bits.copy()).view(types[source])
        if target is tl.float8e4nv:  # devices saturate
            x = x.float().clamp(-448, 448)
        y = x.to(types[target])
        return y.view(torch_bits[y.element_size()]).numpy().view(interpreter._get_np_dtype(target)).reshape(data.shape)

    def widened(x: handle) -> handle:
        scalar = x.dtype.scalar
        if scalar in as_bits:
            return handle(convert(x.data, scalar, tl.float32), tl.float32)
        if scalar == tl.float16:  # exact products, summed in float32, as tensor cores do
            return handle(x.data.astype(np.float32), tl.float32)
        return x

    stock_cast, stock_binary, stock_dot = builder.cast_impl, builder.binary_op, builder.create_dot

    def cast_impl(self, x, target):
        source, scalar = x.dtype.scalar, target.scalar
        if source not in as_bits and scalar not in as_bits:
            return stock_cast(self, x, target)
        if source in types and scalar in types:
            return handle(convert(x.data, source, scalar), scalar)
        if source in as_bits:  # to an integer
            return stock_cast(self, widened(x), target)
        return handle(convert(stock_cast(self, x, tl.float32).data, tl.float32, scalar), scalar)

    def create_fp_to_fp(self, x, target, rounding_mode=None):
        return handle(convert(x.data, x.dtype.scalar, target.scalar), target.scalar)

    def binary_op(self, left, right, op):
        if tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar) or left.dtype.scalar != right.dtype.scalar:
            return stock_binary(self, left, right, op)
        result = op(widened(left).data, widened(right).data)
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(convert(result.astype(np.float32), tl.float32, tl.bfloat16), tl.bfloat16)

    def create_dot(self, a, b, d, *rest):
        return stock_dot(self, widened(a), widened(b), d, *rest)

    # Triton 3.9 checks integers for overflow, which takes half of its time, and without `debug` drops the outcome.
    options = getattr(interpreter.interpreter_builder, "options", None)
    if getattr(options, "sanitize_overflow", False):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.binary_op = binary_op
    builder.create_dot = create_dot
