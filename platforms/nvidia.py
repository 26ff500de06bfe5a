"""NVIDIA GPUs from sm_80 on.

Public Triton's own platform: kernels can be compiled for it without a device. Nothing below was measured on a board by
this project.
"""

from ntops_mla.platform import CILane, Fact, Gate, Limits, Markers, Platform

_CUDA_GUIDE = "NVIDIA CUDA C++ Programming Guide, 'Technical Specifications per Compute Capability'"
_COMPUTES = "the kernel computes in float32 inside"


def _limits(arch: str, capability: tuple[int, int], shared_kib: int) -> Limits:
    return Limits(
        arch=arch,
        min_capability=capability,
        shared_memory=Fact(shared_kib * 1024, f"{_CUDA_GUIDE}: maximum shared memory per thread block, opt-in"),
        max_warps=Fact(32, f"derived: 1024 threads per block ({_CUDA_GUIDE}) / 32 lanes"),
        lanes=Fact(32, _CUDA_GUIDE),
        triton_target=Fact(f"cuda:{10 * capability[0] + capability[1]}", "triton-lang/triton:third_party/nvidia"),
    )


PLATFORM = Platform(
    name="nvidia",
    title="NVIDIA",
    aliases=(),
    # Last of the platforms that show themselves as "cuda": MetaX and Iluvatar set torch.version.cuda as well
    markers=Markers(order=40, device_type="cuda", version_attributes=("cuda",), device_names=("NVIDIA",)),
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
    },
    triton_min=Fact("3.1", "derived: Triton 3.0 was not tried; 3.1 compiles most of the kernels for sm_80 and newer"),
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
        source="InfiniTensor/ci:config.yml and the callers' .github/ci_config.yml",
        notes=(
            Fact("PIP_CONSTRAINT holds torch at the image's version", "InfiniTensor/ci:images/nvidia/Dockerfile"),
            Fact("devices are picked by CUDA_VISIBLE_DEVICES", "InfiniTensor/ci:README.md"),
        ),
    ),
)
