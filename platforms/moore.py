"""Moore Threads MTT S4000 and S5000 (MUSA).

The one platform here with a device type of its own. Under the vendor's `torchada` shim "cuda" in a program means
"musa", but a tensor's `device.type` stays "musa" and `torch.cuda.is_available()` stays False. Nothing below was tried
on a board by this project.
"""

from ntops_mla.platform import CILane, Fact, Gate, LaunchOption, Limits, Markers, Platform, Tile

_FLAGTREE = "flagos-ai/FlagTree:third_party/mthreads/backend"
_FLAGGEMS = "flagos-ai/FlagGems:src/flag_gems/runtime/backend/_mthreads"
_LEAD = "flagos-ai/FlagGems or flagos-ai/FlagGems-vllm, the vendor's own kernels; the exact line was not kept"
_COMPUTES = "the kernel computes in float32 inside"

_HALF = ("bfloat16", "float16")
# Chosen on the nearest public targets, for want of this one: no spills there, and shared memory within the limit.
_STAND_IN = "derived: cross-compiled for sm_80 (S5000), gfx90a and gfx942 (S4000); never run here"
_tile = Tile.one_stage(_STAND_IN)


PLATFORM = Platform(
    name="moore",
    title="Moore Threads",
    aliases=("mthreads",),
    markers=Markers(
        order=10,
        device_type="musa",
        version_attributes=("musa",),
        device_type_decides=True,
        also_device_types=("cuda",),  # what a program under a shim may call it
    ),
    limits=(
        Limits(
            arch="MTT S4000",
            min_capability=(2, 2),
            shared_memory=Fact(73728, f"{_FLAGTREE}/compiler.py: _max_static_shared_memory_from_arch, 22"),
            max_warps=Fact(8, "derived: 1024 threads per block / 128 lanes"),
            lanes=Fact(128, f"{_FLAGTREE}/driver.py: get_current_target, capability below 3.0"),
            triton_target=Fact("musa:22", f"{_FLAGTREE}/driver.py: get_current_target"),
            stand_ins=("hip:gfx90a", "hip:gfx942"),
            notes=(
                Fact(
                    "num_stages above 1 is ignored below capability 3.1 without descriptors",
                    f"{_FLAGTREE}/compiler.py: make_ttgir pipelines loops from capability 3.1 on",
                ),
            ),
        ),
        Limits(
            arch="MTT S5000",
            min_capability=(3, 1),
            shared_memory=Fact(196608, f"{_FLAGTREE}/compiler.py: _max_static_shared_memory_from_arch, 31"),
            max_warps=Fact(16, f"{_FLAGGEMS}/tune_configs.yaml: the largest num_warps in use"),
            lanes=Fact(32, f"{_FLAGTREE}/driver.py: get_current_target, capability above 2"),
            triton_target=Fact("musa:31", f"{_FLAGTREE}/driver.py: get_current_target"),
            stand_ins=("cuda:80",),
            notes=(Fact("peers' MLA decode tile: 32 heads, 64 keys, 8 warps, 1 stage", "flagos-ai/FlagGems-vllm"),),
        ),
    ),
    gates={
        "*": {
            "float32": Gate("native", _COMPUTES),
            "float16": Gate("native", _COMPUTES),
            "bfloat16": Gate("native", f"{_COMPUTES}; bfloat16 products need capability 2.2, which the S4000 has"),
            "float64": Gate("reference", "no float64 arithmetic inside kernels on this platform"),
            "*": Gate("reference", "no kernel takes this dtype"),
        },
        "mla_schedule": {"int32": Gate("native", "whole numbers")},
    },
    extra_import="torch_musa",  # torch >= 2.5 loads it by itself, through its entry point
    tiles=(
        _tile("rms_norm", 4, when={"width": (1, 4096)}),
        _tile("rms_norm", 16, ("float32",), ("MTT S5000",)),
        _tile("rms_norm", 8),
        _tile("rope", 4, block_h=16),
        _tile("latent_append", 4),
        _tile("latent_append_rope", 4, block_h=16),
        _tile("latent_append_fp8", 4),
        _tile("latent_append_fp8_rope", 4, block_h=16),
        _tile("latent_quantize", 4),
        _tile("latent_dequantize", 4),
        _tile("mla_schedule", 4),
        _tile("mla_combine", 4),
        _tile("mla_decode", 8, _HALF, ("MTT S5000",), {"rows": (17, None)}, block_h=32, block_n=32, block_c=512),
        # 32 rows and 16 keys: the queries and a tile of keys take 55 KB where a compiler puts both into shared memory
        _tile("mla_decode", 4, _HALF, when={"rows": (17, None)}, block_h=32, block_n=16, block_c=512),
        _tile("mla_decode", 4, _HALF, ("MTT S5000",), {"latent": (256, 256)}, block_h=16, block_n=64, block_c=512),
        # Older Tritons spill with 32 keys
        _tile("mla_decode", 4, _HALF, ("MTT S5000",), triton=(None, "3.6"), block_h=16, block_n=16, block_c=512),
        # 32 keys spill scalars in a planned call (Triton 3.9)
        _tile("mla_decode", 4, _HALF, triton=("3.9", None), block_h=16, block_n=16, block_c=512),
        _tile("mla_decode", 4, _HALF, block_h=16, block_n=32, block_c=512),
        _tile("mla_decode", 4, ("float32",), block_h=16, block_n=16, block_c=512),
        _tile("mla_decode_fp8", 8, _HALF, ("MTT S5000",), {"rows": (17, None)}, block_h=32, block_n=32, hardware=0),
        _tile("mla_decode_fp8", 4, _HALF, ("MTT S5000",), block_h=16, block_n=16, hardware=0),
        # The same rows and keys as mla_decode's: what is dequantised takes the place of the tile that is loaded there
        _tile("mla_decode_fp8", 4, _HALF, when={"rows": (17, None)}, block_h=32, block_n=16, hardware=0),
        _tile("mla_decode_fp8", 4, _HALF, block_h=16, block_n=32, hardware=0),
        # Spills with 4 warps and with 8 where each row has keys of its own
        _tile(
            "mla_decode_fp8",
            16,
            ("float32",),
            ("MTT S5000",),
            {"causal": (1, 1)},
            ("3.6", "3.7"),
            block_h=16,
            block_n=16,
            hardware=0,
        ),
        _tile("mla_decode_fp8", 4, ("float32",), block_h=16, block_n=16, hardware=0),
        _tile("mla_sparse", 8, _HALF, ("MTT S5000",), {"rows": (17, None)}, block_h=32, block_n=32, block_c=512),
        _tile("mla_sparse", 4, _HALF, when={"rows": (17, None)}, block_h=32, block_n=16, block_c=512),
        _tile("mla_sparse", 4, _HALF, ("MTT S5000",), block_h=16, block_n=32, block_c=512),
        # One accumulator spills there (Triton 3.9)
        _tile(
            "mla_sparse", 4, ("float32",), ("MTT S5000",), {"latent": (512, 512)}, block_h=16, block_n=16, block_c=256
        ),
        _tile("mla_sparse", 4, block_h=16, block_n=16, block_c=512),
        _tile("mla_sparse_fp8", 8, _HALF, ("MTT S5000",), {"rows": (17, None)}, block_h=32, block_n=32, hardware=0),
        # 32 rows spill where pages lie apart from each other
        _tile("mla_sparse_fp8", 4, block_h=16, block_n=16, hardware=0),
        _tile("mla_prefill", 4, _HALF, block_m=32, block_n=32),
        _tile("mla_prefill", 4, ("float32",), block_m=16, block_n=16),
    ),
    triton_min=Fact("3.1", "flagos-ai/FlagGems:src/flag_gems/backends.yaml"),
    known_bad=(
        Fact("float16 and bfloat16 atomics", f"{_FLAGGEMS}/ops/histc.py"),
        Fact(
            "int64 and float64 arithmetic in kernels (of data; the kernels here use int64 for addresses only)",
            f"{_FLAGGEMS}/ops/index_copy_.py, ops/median.py",
        ),
        Fact("a product of two dtypes, on Triton 3.2", _LEAD),
        Fact("persistent kernels that spin", _LEAD),
        Fact("dot with M, N or K below 16, on forks of Triton 3.0 and 3.1", "triton-lang/triton 3.1: semantic.dot"),
        Fact("tensor descriptors below Triton 3.3", "triton-lang/triton:python/triton/language/core.py"),
    ),
    launch_options=(
        LaunchOption(
            name="MUSA_ENABLE_SQMMA",
            values=("1",),
            kind="environment",
            kernels=("mla_decode", "mla_decode_fp8", "mla_prefill", "mla_sparse", "mla_sparse_fp8"),
            source="flagos-ai/FlagTree:README.md: dot can be faster with it on Triton 3.1; 3.6's does not read it",
            passed="1",
            triton=("3.1", "3.6"),
            dtypes=_HALF,
        ),
    ),
    notes=(
        Fact("`torch.musa.current_stream().musa_stream` is the raw stream", "MooreThreads/torch_musa"),
        Fact(
            "torchada leaves device.type 'musa' and torch.cuda.is_available() False", "MooreThreads/torchada:README.md"
        ),
        Fact(
            "the vendor's MLA library: flash_mla (MT-flashMLA), capability 3.1, pages of 64", "MooreThreads/MT-flashMLA"
        ),
    ),
    ci=CILane(
        platform="moore",
        runner="Moore",
        image="sh-harbor.mthreads.com/mcctest/vllm_musa:20251112",
        docker=("--privileged",),
        smi="mthreads-gmi",
        source="InfiniTensor/ci:config.yml, ci_resource.py, and the callers' .github/ci_config.yml",
        notes=(
            Fact("PIP_CONSTRAINT holds torch at the image's version", "InfiniTensor/ci:images/moore/Dockerfile"),
            Fact(
                "devices are picked by MTHREADS_VISIBLE_DEVICES, docker runs --privileged", "InfiniTensor/ci:config.yml"
            ),
        ),
    ),
)
