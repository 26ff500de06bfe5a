"""MetaX C500 and C550 (MACA).

Its torch shows the device type and `torch.version.cuda` of NVIDIA, so it is asked for before NVIDIA is. Some shapes end
the process inside the compiler, so a risky one has to be refused before the launch. Nothing below was tried on a board
by this project.
"""

from ntops_mla.platform import CILane, Fact, Gate, LaunchOption, Limits, Markers, Platform, Tile

_FLAGTREE = "flagos-ai/FlagTree:third_party/metax/backend"
_FLAGGEMS = "flagos-ai/FlagGems:src/flag_gems/runtime/backend/_metax"
_LEAD = "flagos-ai/FlagGems or flagos-ai/FlagGems-vllm, the vendor's own kernels; the exact line was not kept"
_COMPUTES = "the kernel computes in float32 inside"

_HALF = ("bfloat16", "float16")
# Chosen on the nearest public targets, for want of this one: no spills there, and shared memory within the limit.
_STAND_IN = (
    "derived: cross-compiled for gfx90a and gfx942, which have 64 lanes and 64 KB of shared memory too; never run here"
)
_tile = Tile.one_stage(_STAND_IN)


PLATFORM = Platform(
    name="metax",
    title="MetaX",
    aliases=("muxi",),
    markers=Markers(order=20, device_type="cuda", version_attributes=("maca",), device_names=("MetaX", "MXC")),
    limits=(
        Limits(
            arch="C500",
            min_capability=None,  # one architecture so far
            shared_memory=Fact(65536, "InternLM/lmdeploy#3495: 'Required 73728, limit 65536' on an MXC500"),
            max_warps=Fact(8, f"{_FLAGGEMS}/heuristics_config_utils.py: 512 threads per block, 64 lanes"),
            lanes=Fact(64, f"{_FLAGTREE}/driver.py: get_current_target"),
            triton_target=Fact("maca:80", f"{_FLAGTREE}/driver.py: get_current_target"),
            stand_ins=("hip:gfx90a", "hip:gfx942"),
            least_product=Fact(
                32,
                f"{_FLAGGEMS}/ops/bmm.py, ops/addmm.py: M or N below 32 ends the process with an assertion there; "
                "peers ship MLA decode tiles of 16 x 16 and 16 x 32 all the same (flagos-ai/FlagGems-vllm)",
            ),
            notes=(
                Fact(
                    "peers' MLA decode tiles (heads, keys, warps, stages): 16, 32, 8, 2 and 16, 16, 4, 1",
                    "flagos-ai/FlagGems-vllm",
                ),
                Fact(
                    "stages x keys x 576 x 2 bytes, and the queries if staged, must stay within 65536",
                    "derived: InternLM/lmdeploy#3495, 73728 = 2 stages x 32 keys x 576 x 2 bytes",
                ),
            ),
        ),
    ),
    gates={
        "*": {
            "float32": Gate("native", _COMPUTES),
            "float16": Gate("native", _COMPUTES),
            "bfloat16": Gate("native", _COMPUTES),
            "float64": Gate("reference", "no float64 products in kernels on this platform"),
            "*": Gate("reference", "no kernel takes this dtype"),
        },
        "mla_schedule": {"int32": Gate("native", "whole numbers")},
    },
    tiles=(
        _tile("rms_norm", 4, when={"width": (1, 4096)}),
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
        # Products of 16 rows or keys: refused until they were tried on the board (least_product above).
        # 32 rows and 16 keys: the queries and a tile of keys take 55 KB where a compiler puts both into shared memory
        _tile("mla_decode", 4, _HALF, when={"rows": (17, None)}, block_h=32, block_n=16, block_c=512),
        # 32 keys spill scalars in a planned call (Triton 3.9)
        _tile("mla_decode", 4, _HALF, triton=("3.9", None), block_h=16, block_n=16, block_c=512),
        _tile("mla_decode", 4, _HALF, block_h=16, block_n=32, block_c=512),
        _tile("mla_decode", 4, ("float32",), block_h=16, block_n=16, block_c=512),
        # The same rows and keys as mla_decode's: what is dequantised takes the place of the tile that is loaded there
        _tile("mla_decode_fp8", 4, _HALF, when={"rows": (17, None)}, block_h=32, block_n=16, hardware=0),
        _tile("mla_decode_fp8", 4, _HALF, block_h=16, block_n=32, hardware=0),
        _tile("mla_decode_fp8", 4, ("float32",), block_h=16, block_n=16, hardware=0),
        _tile("mla_sparse", 4, _HALF, when={"rows": (17, None)}, block_h=32, block_n=16, block_c=512),
        _tile("mla_sparse", 4, block_h=16, block_n=16, block_c=512),
        # 32 rows spill where pages lie apart from each other
        _tile("mla_sparse_fp8", 4, block_h=16, block_n=16, hardware=0),
        _tile("mla_prefill", 4, _HALF, block_m=32, block_n=32),
        _tile("mla_prefill", 4, ("float32",), block_m=16, block_n=16),
    ),
    triton_min=Fact("3.0", "flagos-ai/FlagGems:src/flag_gems/backends.yaml"),
    known_bad=(
        Fact(
            "cast from bool or an integer to bfloat16 or float16", f"{_FLAGGEMS}/ops/to_copy.py, ops/greater_equal.py"
        ),
        Fact("reductions over axis 0 of a two-dimensional tile", f"{_FLAGGEMS}/ops/linear_backward.py"),
        Fact("float64 products", f"{_FLAGGEMS}/ops/cholesky_solve.py"),
        Fact("kernels that spin while they wait", _LEAD),
        Fact(
            "M or N below 32 in addmm and bmm: an assertion in the compiler ends the process (least_product)",
            f"{_FLAGGEMS}/ops/bmm.py, ops/addmm.py",
        ),
        Fact("dot with M, N or K below 16, on forks of Triton 3.0 and 3.1", "triton-lang/triton 3.1: semantic.dot"),
        Fact("tensor descriptors below Triton 3.3", "triton-lang/triton:python/triton/language/core.py"),
    ),
    launch_options=(
        LaunchOption(
            name="scenario",
            values=("mla",),
            kind="launch",
            kernels=("mla_decode", "mla_decode_fp8", "mla_sparse", "mla_sparse_fp8"),
            source=f"{_LEAD}: a preset of the compiler's own flags, not read by every release",
            passed="mla",
        ),
        LaunchOption(
            name="scenario",
            values=("flashattn-fwd",),
            kind="launch",
            kernels=("mla_prefill",),
            source=f"{_LEAD}: a preset of the compiler's own flags, not read by every release",
            passed="flashattn-fwd",
        ),
        LaunchOption(
            name="pipeline",
            values=("cpasync", "basic"),
            kind="launch",
            kernels=("mla_decode", "mla_decode_fp8", "mla_prefill", "mla_sparse", "mla_sparse_fp8"),
            source=f"{_FLAGTREE}/compiler.py: default basic; cpasync needs 2 stages",
        ),
    ),
    notes=(
        Fact("`import triton` (3.1) raises while MACA_PATH is unset", f"{_FLAGTREE}/driver.py"),
        Fact("torch.version.cuda is set, to '11.6'", "MetaX-MACA's torch; seen in public reports"),
        Fact("the vendor's MLA library: a flash_mla wheel, head size 576", "MetaX-MACA/FlashMLA"),
    ),
    ci=CILane(
        platform="metax",
        runner="Metax",
        image="cr.metax-tech.com/public-library/maca-pytorch:3.2.1.4-torch2.4-py310-ubuntu22.04-amd64",
        docker=("--privileged", "--ulimit=memlock=-1", "--ulimit=stack=67108864"),
        smi="mx-smi",
        source="InfiniTensor/ci:config.yml, ci_resource.py, and the callers' .github/ci_config.yml",
        notes=(
            Fact("PIP_CONSTRAINT holds torch at the image's version", "InfiniTensor/ci:images/metax/Dockerfile"),
            Fact("docker runs --privileged, devices are picked by CUDA_VISIBLE_DEVICES", "InfiniTensor/ci:config.yml"),
        ),
    ),
)
