"""NVIDIA GPUs from sm_80 on.

Public Triton's own platform: kernels can be compiled for it without a device. Nothing below was measured on a board by
this project.
"""

from ntops_mla.platform import CILane, Fact, Gate, Limits, Markers, Platform, Tile

_CUDA_GUIDE = "NVIDIA CUDA C++ Programming Guide, 'Technical Specifications per Compute Capability'"
_COMPUTES = "the kernel computes in float32 inside"


_BLACKWELL = Fact("3.6", "derived: Triton 3.2's compiler aborts for it; 3.3 to 3.5 were not tried")


# Compiled for their nearest in shared memory, whose instructions they have, but for sm_89's fp8
_NEAREST = {"sm_86": ("cuda:89",), "sm_87": ("cuda:80",)}


def _limits(arch: str, capability: tuple[int, int], shared_kib: int) -> Limits:
    return Limits(
        arch=arch,
        min_capability=capability,
        shared_memory=Fact(shared_kib * 1024, f"{_CUDA_GUIDE}: maximum shared memory per thread block, opt-in"),
        max_warps=Fact(32, f"derived: 1024 threads per block ({_CUDA_GUIDE}) / 32 lanes"),
        lanes=Fact(32, _CUDA_GUIDE),
        triton_target=Fact(f"cuda:{10 * capability[0] + capability[1]}", "triton-lang/triton:third_party/nvidia"),
        stand_ins=_NEAREST.get(arch, ()),
        triton_min=_BLACKWELL if capability >= (10, 0) else None,
    )


# What every tile below was chosen by: registers, spills, shared memory and matrix instructions of the compiled code
# (`python -m ntops_mla compile`), with nothing known of its speed.
_COMPILED = "derived: cross-compiled, no spills; not timed"
_HALF = ("bfloat16", "float16")
_SMALL = ("sm_86", "sm_89", "sm_120")  # 99 KiB of shared memory


# Which cast from float8_e4m3fn by an instruction
_CASTS_FP8, _NO_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120"), ("sm_80", "sm_86", "sm_87")

_SINCE = ("3.2", None)
_SPARSE_SINCE = ("3.6", None)  # older ones were not tried; mla_decode_fp8's likewise


def _decode(
    block_h: int, block_n: int, block_c: int, warps: int, stages: int, rows: int, *arch: str, triton=_SINCE, **more
) -> Tile:
    blocks = {"block_h": block_h, "block_n": block_n, "block_c": block_c}
    when = {"rows": (rows, None), **more.pop("when", {})}
    return Tile("mla_decode", blocks, warps, stages, _COMPILED, arch, _HALF, triton, when)


def _sparse(
    block_h: int,
    block_n: int,
    block_c: int,
    warps: int,
    stages: int,
    rows: int,
    *arch: str,
    triton=_SPARSE_SINCE,
    **when,
) -> Tile:
    blocks = {"block_h": block_h, "block_n": block_n, "block_c": block_c}
    return Tile("mla_sparse", blocks, warps, stages, _COMPILED, arch, _HALF, triton, {"rows": (rows, None), **when})


def _prefill(block_m: int, block_n: int, warps: int, stages: int, width: int, *arch: str, triton=_SINCE) -> Tile:
    blocks = {"block_m": block_m, "block_n": block_n}
    when = {"width": (width, width)}
    return Tile("mla_prefill", blocks, warps, stages, _COMPILED, arch, _HALF, triton, when)


def _single(warps: int, width: int, *arch: str, triton=_SINCE) -> Tile:
    """mla_prefill in float32: exact products use no matrix instructions."""
    blocks, when = {"block_m": 16, "block_n": 16}, {"width": (width, width)}
    return Tile("mla_prefill", blocks, warps, 1, _COMPILED, arch, ("float32",), triton, when)


def _single_sparse(warps: int, latent: int, *arch: str, block_c: int = 512, triton=_SPARSE_SINCE) -> Tile:
    """mla_sparse in float32, likewise."""
    blocks, when = {"block_h": 16, "block_n": 16, "block_c": block_c}, {"latent": (latent, latent)}
    return Tile("mla_sparse", blocks, warps, 1, _COMPILED, arch, ("float32",), triton, when)


def _single_decode(warps: int, latent: int, *arch: str) -> Tile:
    """mla_decode in float32, likewise."""
    blocks, when = {"block_h": 16, "block_n": 16, "block_c": 512}, {"latent": (latent, latent)}
    return Tile("mla_decode", blocks, warps, 1, _COMPILED, arch, ("float32",), _SINCE, when)


def _fp8(
    block_h: int, block_n: int, warps: int, stages: int, rows: int, *arch: str, kernel="mla_decode_fp8", **more
) -> tuple[Tile, ...]:
    """Casting by an instruction on the boards that have it, and by bits on the others."""
    tiles = []
    for hardware, able in ((1, _CASTS_FP8), (0, _NO_FP8)):
        of = tuple(name for name in able if not arch or name in arch)
        blocks = {"block_h": block_h, "block_n": block_n, "hardware": hardware}
        fits = {"dtypes": _HALF, "triton": _SPARSE_SINCE, "when": {"rows": (rows, None)}, **more}
        if of:
            tiles.append(Tile(kernel, blocks, warps, stages, _COMPILED, of, **fits))
    return tuple(tiles)


# Triton 3.1 does not pipeline a tile of keys that is read twice, and spills in every tile of the attention kernels:
# they begin with 3.2. 3.3 to 3.5, 3.7 and 3.8 were not tried.
_LATENT_512 = {"latent": (512, 512)}
_PLAIN = {"page_size": (64, None), "causal": (0, 0)}
_DECODE = (
    # 64 rows and 64 keys: async wgmma. Triton 3.9 spills in every tile of 64 rows, 3.6 scheduled in pages of 128.
    _decode(64, 64, 512, 8, 2, 33, "sm_90", triton=("3.2", "3.7"), when={**_LATENT_512, "page_size": (1, 64)}),
    # Spills in short pages, and where each row has keys of its own
    _decode(64, 32, 512, 8, 2, 33, "sm_80", "sm_87", triton=("3.6", "3.7"), when={**_LATENT_512, **_PLAIN}),
    # tcgen05; with two accumulators this tile compiles to a bare trap
    _decode(64, 32, 512, 8, 2, 33, "sm_100", triton=("3.6", "3.7"), when=_LATENT_512),
    # 64 keys spill there
    _decode(32, 32, 512, 4, 2, 17, "sm_90", triton=("3.6", "3.7"), when={"latent": (256, 256)}),
    _decode(32, 64, 512, 8, 2, 17, "sm_80", "sm_87", "sm_90", "sm_100", when={"page_size": (32, None)}),
    _decode(32, 16, 512, 4, 2, 17, *_SMALL, triton=("3.6", None)),
    # 32 keys in three stages spill there
    _decode(16, 64, 512, 4, 2, 1, "sm_100", triton=("3.9", None), when={"latent": (256, 256)}),
    # Three stages keep two tiles of keys in flight, and two programs fit on a processor
    _decode(16, 32, 512, 4, 3, 1, "sm_90", "sm_100"),
    _decode(16, 64, 512, 4, 2, 1, when={"latent": (256, 256)}),
    _decode(16, 32, 512, 4, 2, 1),
    _single_decode(8, 256, "sm_90"),
    _single_decode(4, 256),
    _single_decode(8, 512),
)
_WIDE = ("sm_80", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
_DECODE_FP8 = (
    # Async wgmma; Triton 3.9 spills, and so does 3.6 in float16
    *_fp8(64, 32, 8, 2, 33, "sm_90", dtypes=("bfloat16",), triton=("3.6", "3.7")),
    # Spills where each row has keys of its own, and, in Triton 3.9, in pages of 128
    *_fp8(32, 64, 8, 2, 17, "sm_90", triton=("3.6", "3.7"), when={"rows": (17, None), "causal": (0, 0)}),
    *_fp8(32, 64, 8, 2, 17, "sm_90", when={"rows": (17, None), "causal": (0, 0), "page_size": (1, 64)}),
    *_fp8(32, 32, 8, 2, 17),
    *_fp8(16, 16, 4, 2, 1, *_SMALL),
    # Two programs fit on a processor
    *_fp8(16, 32, 4, 2, 1),
    # Where 8 warps spill
    *_fp8(16, 16, 4, 1, 1, "sm_86", dtypes=("float32",), triton=("3.9", None)),
    *_fp8(16, 16, 4, 1, 1, "sm_90", dtypes=("float32",), triton=("3.6", "3.7")),
    # One stage spills
    *_fp8(16, 16, 8, 2, 1, "sm_80", "sm_87", dtypes=("float32",), triton=("3.6", "3.7")),
    *_fp8(16, 16, 8, 1, 1, dtypes=("float32",)),
    # Addresses for each key: 64 keys spill, and so do 32 with 4 warps
    *_fp8(32, 32, 8, 2, 17, kernel="mla_sparse_fp8"),
    *_fp8(16, 16, 4, 2, 1, kernel="mla_sparse_fp8"),
    *_fp8(16, 16, 4, 1, 1, *_WIDE, kernel="mla_sparse_fp8", dtypes=("float32",)),
    # Triton 3.9 spills there, with 4 warps and with 8
    *_fp8(16, 16, 4, 1, 1, "sm_86", kernel="mla_sparse_fp8", dtypes=("float32",), triton=("3.6", "3.7")),
)
_SPARSE = (
    # Async wgmma. Triton 3.9 spills in every tile of 64 rows, 3.6 with 64 keys, and with one accumulator.
    _sparse(64, 32, 256, 8, 2, 33, "sm_90", triton=("3.6", "3.7"), latent=(512, 512)),
    _sparse(64, 32, 256, 8, 2, 33, "sm_80", "sm_87", triton=("3.9", None), latent=(512, 512)),
    # For few rows too: tiles of 16 spill there
    _sparse(32, 64, 256, 8, 3, 1, "sm_90", triton=("3.9", None), latent=(256, 256)),
    _sparse(32, 32, 256, 8, 2, 17, "sm_120", triton=("3.9", None), latent=(256, 256)),
    _sparse(32, 32, 256, 4, 2, 17, latent=(256, 256)),
    # A thread holds the addresses of its share of the keys: with one accumulator of 512 columns they spill where pages
    # lie apart from each other. Three stages keep two tiles of keys in flight.
    _sparse(32, 64, 256, 8, 3, 17, "sm_90", "sm_100"),
    _sparse(32, 64, 256, 8, 2, 17, "sm_80", "sm_87"),
    _sparse(32, 32, 256, 8, 2, 17, *_SMALL),
    _sparse(16, 32, 512, 4, 3, 1, "sm_90", "sm_100"),
    _sparse(16, 32, 512, 4, 2, 1),
    # One accumulator spills there
    _single_sparse(8, 512, "sm_100", block_c=256, triton=("3.6", "3.7")),
    _single_sparse(8, 512),
    _single_sparse(4, 256),
)
_PREFILL = (
    _prefill(128, 64, 8, 3, 192, "sm_90", "sm_100"),
    _prefill(64, 64, 8, 2, 192),
    _prefill(64, 64, 8, 2, 256, "sm_90", "sm_100"),
    _prefill(64, 64, 8, 2, 256, "sm_80", "sm_87", triton=("3.6", None)),
    _prefill(32, 32, 4, 2, 256),
    _single(8, 256, "sm_90"),
    _single(4, 192, "sm_90", triton=("3.6", None)),
    _single(4, 192, "sm_80", "sm_86", "sm_87", "sm_89", "sm_100", "sm_120"),
    _single(4, 256, "sm_80", "sm_86", "sm_87", "sm_89", "sm_100", "sm_120"),
)

PLATFORM = Platform(
    name="nvidia",
    title="NVIDIA",
    aliases=(),
    # Last of the platforms that show themselves as "cuda", and by its name: MetaX, Iluvatar and whoever else imitates
    # CUDA set torch.version.cuda as well
    markers=Markers(
        order=40,
        device_type="cuda",
        version_attributes=("cuda",),
        # T4, V100, Jetson, and everything under drivers before 465 go without the maker's name
        device_names=("NVIDIA", "GeForce", "Quadro", "Tesla", "A100-SXM", "A100-PCI", "Orin"),
        name_required=True,
    ),
    limits=(
        _limits("sm_80", (8, 0), 163),
        _limits("sm_86", (8, 6), 99),
        _limits("sm_87", (8, 7), 163),
        _limits("sm_89", (8, 9), 99),
        _limits("sm_90", (9, 0), 227),
        _limits("sm_100", (10, 0), 227),
        _limits("sm_120", (12, 0), 99),
    ),
    gates={
        "*": {
            "float32": Gate("native", _COMPUTES),
            "float16": Gate("native", _COMPUTES),
            "bfloat16": Gate("native", _COMPUTES),
            "float64": Gate("reference", "the kernels compute in float32, which is less than float64 promises"),
            "*": Gate("reference", "no kernel takes this dtype"),
        },
        "mla_schedule": {"int32": Gate("native", "whole numbers")},
    },
    direct_launch=Fact(1, "triton-lang/triton:python/triton/compiler/compiler.py CompiledKernel.__getitem__"),
    tiles=(
        Tile("rms_norm", {}, 4, 1, _COMPILED, when={"width": (1, 4095)}),
        Tile("rms_norm", {}, 16, 1, _COMPILED, dtypes=("float32",)),
        Tile("rms_norm", {}, 8, 1, _COMPILED),
        Tile("rope", {"block_h": 16}, 4, 1, _COMPILED),
        Tile("latent_append", {}, 4, 1, _COMPILED),
        Tile("latent_append_rope", {"block_h": 16}, 4, 1, _COMPILED),
        Tile("latent_append_fp8", {}, 4, 1, _COMPILED),
        Tile("latent_append_fp8_rope", {"block_h": 16}, 4, 1, _COMPILED),
        Tile("latent_quantize", {}, 4, 1, _COMPILED),
        Tile("latent_dequantize", {}, 4, 1, _COMPILED),
        Tile("mla_schedule", {}, 4, 1, _COMPILED),
        Tile("mla_combine", {}, 4, 1, _COMPILED),
        *_DECODE,
        *_DECODE_FP8,
        *_SPARSE,
        *_PREFILL,
    ),
    triton_min=Fact("3.1", "derived: 3.0 was not tried; with 3.1 all kernels but attention's compile without spills"),
    known_bad=(
        Fact(
            "Triton 3.1 aborts while compiling a decode tile of 64 heads with 8 warps for sm_90 "
            '("mma -> mma layout conversion")',
            "derived: cross-compiled with Triton 3.1.0, no device",
        ),
        Fact("Triton below 3.3 has no tensor descriptors", "triton-lang/triton:python/triton/language/core.py"),
        Fact("float8_e4m3fn does not compile below sm_89", "derived: cross-compiled with Triton 3.6.0, no device"),
    ),
    ci=CILane(
        platform="nvidia",
        runner="Nvidia",
        image="nvcr.io/nvidia/pytorch:24.10-py3",
        gpu_style="nvidia",
        smi="nvidia-smi",
        source="InfiniTensor/ci:config.yml, ci_resource.py, and the callers' .github/ci_config.yml",
        notes=(
            Fact("PIP_CONSTRAINT holds torch at the image's version", "InfiniTensor/ci:images/nvidia/Dockerfile"),
            Fact("devices are picked by CUDA_VISIBLE_DEVICES", "InfiniTensor/ci:README.md"),
        ),
    ),
)
