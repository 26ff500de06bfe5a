"""Compiling a kernel for a target without having it, and reading what came out.

No device is asked: Triton compiles for a named target, with the specialisation that its JIT would apply to the
arguments. What is read comes from the compiler's own output: registers and stack from the cubin, instructions from PTX
and ISA.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ntops_mla.kernel import Kernel
from ntops_mla.platform import version_pair

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
# Registers and shared memory of a processor, bytes reserved of the latter per program
_REGISTERS = 65536
_RESERVED = 1024


@dataclass(frozen=True)
class Target:
    """What Triton compiles for; `shared_per_processor` in bytes tells how many programs fit side by side."""

    backend: str
    arch: int | str
    lanes: int
    shared_per_processor: int

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"


TARGETS = {
    str(target): target
    for target in (
        Target("cuda", 80, 32, 164 << 10),
        Target("cuda", 89, 32, 100 << 10),
        Target("cuda", 90, 32, 228 << 10),
        Target("cuda", 100, 32, 228 << 10),
        Target("cuda", 120, 32, 100 << 10),
        Target("hip", "gfx90a", 64, 64 << 10),
        Target("hip", "gfx942", 64, 64 << 10),
    )
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel became on a target. `programs`: how many fit on one processor, None where that is not known.

    `products`: matrix instructions; `asynchronous`: those of them that are (wgmma, tcgen05); `async_copies`: copies
    from global to shared memory beside the arithmetic.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int | None
    products: int
    asynchronous: int
    async_copies: int
    assembly: dict[str, Any]


def compile_for(kernel: Kernel, args: tuple, target: Target) -> Compiled:
    """Compile `kernel` for `target` as its JIT would for `args` (CPU or meta tensors: only their form is read)."""
    _, arguments, _ = kernel.record(*args)
    compiled = _compile(kernel, arguments, target)
    assembly = compiled.asm
    if "cubin" in assembly:
        return _nvidia(compiled, target)
    return _amd(compiled)


def _compile(kernel: Kernel, arguments: tuple, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.function
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **kernel.options}
    signature, constants, aligned = {}, {}, []
    for index, (parameter, value) in enumerate(zip(function.params, arguments, strict=True)):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            aligned.append(index)  # torch allocates at multiples of 16 bytes at least
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(index)
    if version_pair(triton.__version__) >= (3, 3):
        places = {(function.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(function, signature, places, {(i,): [["tt.divisibility", 16]] for i in aligned})
    else:
        types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        source = ASTSource(function, types, constants, _old_attributes(aligned))
    with _linker() if target.backend == "hip" else contextlib.nullcontext():
        return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.lanes), options=options)


@contextlib.contextmanager
def _linker() -> Iterator[None]:
    """Triton before 3.3 links with ROCm's ld.lld, which only a machine with ROCm has. What is linked is never loaded
    here, only its assembly is read: a script that hands the object on will do."""
    name = "TRITON_HIP_LLD_PATH"
    if name in os.environ or os.path.exists("/opt/rocm/llvm/bin/ld.lld"):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, "ld.lld")
        # ld.lld --version; ld.lld -flavor gnu -shared IN -o OUT
        script.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo LLD 17.0.0\ncp "$4" "$6"\n', encoding="utf-8")
        script.chmod(0o755)
        os.environ[name] = str(script)
        try:
            yield
        finally:
            os.environ.pop(name, None)


def _old_attributes(aligned: list[int]) -> Any:
    """Triton 3.1 and 3.2 have a class for them, in two places and with two constructors."""
    try:
        from triton.backends.compiler import AttrsDescriptor
    except ImportError:
        from triton.compiler.compiler import AttrsDescriptor
    if hasattr(AttrsDescriptor, "from_dict"):
        properties = {"tt.divisibility": tuple(aligned), "tt.equal_to": ()}
        return AttrsDescriptor.from_dict({"arg_properties": properties, "cls": "AttrsDescriptor"})
    return AttrsDescriptor(divisible_by_16=tuple(aligned), equal_to_1=())


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _nvidia(compiled: Any, target: Target) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    asynchronous = len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", ptx))
    threads = 32 * compiled.metadata.num_warps
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
    return Compiled(
        registers=registers,
        spill_bytes=stack,
        shared_bytes=shared,
        programs=min(by_registers, target.shared_per_processor // (shared + _RESERVED), 2048 // threads),
        products=asynchronous + len(re.findall(r"\bmma\.sync", ptx)),
        asynchronous=asynchronous,
        async_copies=len(re.findall(r"cp\.async\.c[ga]\.shared|cp\.async\.bulk\.tensor", ptx)),
        assembly=dict(compiled.asm),
    )


def _amd(compiled: Any) -> Compiled:
    isa = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", isa)
        return int(found[1]) if found else 0

    return Compiled(
        registers=count("vgpr_count"),
        # spilled registers are 4 bytes a lane; what is left of the private segment is the compiler's own stack
        spill_bytes=max(
            4 * (count("vgpr_spill_count") + count("sgpr_spill_count")), count("private_segment_fixed_size")
        ),
        shared_bytes=compiled.metadata.shared,
        programs=None,
        products=len(re.findall(r"\bv_mfma", isa)),
        asynchronous=0,
        async_copies=0,
        assembly=dict(compiled.asm),
    )


def least_products(kernel: Kernel, target: Target, dtype: torch.dtype, asynchronous: bool) -> int:
    """Matrix instructions that the loop of an attention kernel must hold: its products by the largest instruction.

    A kernel that compiles to a bare trap has no spills: this is what tells. Exact float32 products use none.
    """
    blocks = kernel.parameters
    if kernel.name in ("mla_decode", "mla_sparse", "mla_decode_fp8", "mla_sparse_fp8"):
        # An fp8 cache has one size of head
        columns = 2 * blocks.get("latent", 512) + blocks.get("rope", 64)
        elements = blocks["block_h"] * blocks["block_n"] * columns
    elif kernel.name == "mla_prefill":
        elements = blocks["block_m"] * blocks["block_n"] * (blocks["qk_width"] + blocks["v_width"])
    else:
        return 0
    if dtype == torch.float32:
        return 0
    if target.backend == "hip":  # 32 x 32 x 8 a wave
        return elements // (32 * 32 * 8 * kernel.num_warps)
    if asynchronous and target.arch == 90:  # 64 x 256 x 16 by four warps
        return elements // (64 * 256 * 16 * (kernel.num_warps // 4))
    if asynchronous:  # 128 x 256 x 16 by the whole program
        return elements // (128 * 256 * 16)
    return elements // (16 * 8 * 16 * kernel.num_warps)
