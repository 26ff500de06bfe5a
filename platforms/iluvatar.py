"""Iluvatar CoreX BI-V100, BI-V150 and MR-V100.

Its torch shows the device type and `torch.version.cuda` of NVIDIA, so it is asked for before NVIDIA is;
`torch.__version__` need not end in "+corex". Device float64 has been seen wrong: compute references on the CPU. Nothing
below was tried on a board by this project.
"""

from ntops_mla.platform import CILane, Fact, Gate, LaunchOption, Limits, Markers, Platform, Tile

_FLAGTREE = "flagos-ai/FlagTree:third_party/iluvatar/backend"
_FLAGGEMS = "flagos-ai/FlagGems:src/flag_gems/runtime/backend/_iluvatar"
_LEAD = "flagos-ai/FlagGems or flagos-ai/FlagGems-vllm, the vendor's own kernels; the exact line was not kept"
_COMPUTES = "the kernel computes in float32 inside"
_WRONG_DOT = Gate("reference", "some full-width float32 products were seen to be wrong on this platform")

_HALF = ("bfloat16", "float16")
# Chosen on the nearest public targets, for want of this one: no spills there, and shared memory within the limit.
_STAND_IN = (
    "derived: cross-compiled for gfx90a and gfx942, which have 64 lanes and 64 KB of shared memory too; never run here"
)
_tile = Tile.one_stage(_STAND_IN)


PLATFORM = Platform(
    name="iluvatar",
    title="Iluvatar CoreX",
    aliases=("tianshu",),
    markers=Markers(order=30, device_type="cuda", torch_attributes=("corex",), device_names=("Iluvatar",)),
    limits=(
        Limits(
            arch="BI-V100, BI-V150, MR-V100",
            min_capability=None,
            shared_memory=Fact(None, "no public source was found: ask the driver"),
            max_warps=Fact(16, f"{_FLAGGEMS}/tune_configs.yaml: the largest num_warps in use"),
            lanes=Fact(64, f"{_FLAGTREE}/driver.py: get_current_target"),
            triton_target=Fact(
                "cuda:70 or cuda:71 (Triton 3.1), corex:71 (Triton 3.6)",
                f"{_FLAGTREE}/driver.py: get_current_target",
            ),
            stand_ins=("hip:gfx90a", "hip:gfx942"),
            notes=(
                Fact("peers' MLA decode tile: 32 heads, 64 keys, 8 warps, 1 stage", "flagos-ai/FlagGems-vllm"),
                Fact("attention is run with 1 stage by peers", f"{_FLAGGEMS}/tune_configs.yaml"),
            ),
        ),
    ),
    gates={
        "*": {
            "float32": Gate("native", _COMPUTES),
            "float16": Gate("native", _COMPUTES),
            "bfloat16": Gate("native", _COMPUTES),
            "float64": Gate(
                "reference", "no float64 products in kernels, and float64 on the device was seen to be wrong"
            ),
            "*": Gate("reference", "no kernel takes this dtype"),
        },
        "mla_schedule": {"int32": Gate("native", "whole numbers")},
        "mla_decode": {"float32": _WRONG_DOT},
        "mla_decode_fp8": {"float32": _WRONG_DOT},
        "mla_prefill": {"float32": _WRONG_DOT},
        "mla_sparse": {"float32": _WRONG_DOT},
        "mla_sparse_fp8": {"float32": _WRONG_DOT},
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
    triton_min=Fact("3.1", "flagos-ai/FlagGems:src/flag_gems/backends.yaml; CoreX 4.2 images hold 2.1, without exp2"),
    known_bad=(
        Fact("gather", f"{_FLAGGEMS}/ops/cholesky_solve.py"),
        Fact("float64 arithmetic", f"{_FLAGGEMS}/ops/linalg_matrix_norm.py"),
        Fact("copies of float64 to the host can be zero without an error", _LEAD),
        Fact("some full-width float32 products", f"{_FLAGGEMS}/ops/cholesky_solve.py"),
        Fact("sums of 512 elements with 8 warps", f"{_FLAGGEMS}/ops/linalg_matrix_norm.py"),
        Fact("num_warps=1 in some shapes of RMSNorm", _LEAD),
        Fact("a float16 or bfloat16 bitcast that is stored", _LEAD),
        Fact("compiling takes long: no wide autotuning", "flagos-ai/FlagGems#4503"),
        Fact("dot with M, N or K below 16, on forks of Triton 3.0 and 3.1", "triton-lang/triton 3.1: semantic.dot"),
        Fact("tensor descriptors below Triton 3.3", "triton-lang/triton:python/triton/language/core.py"),
    ),
    launch_options=(
        LaunchOption(
            name="use_sme",
            values=("1", "0"),
            kind="launch",
            kernels=("mla_decode", "mla_decode_fp8", "mla_prefill", "mla_sparse", "mla_sparse_fp8"),
            source=f"{_FLAGTREE}/compiler.py: default 0; only the MR (71) supports it",
        ),
    ),
    notes=(
        Fact("torch.version.cuda is set, to '10.2'", "seen in public reports"),
        Fact("a mismatched driver: device_count() above 0, is_available() False", "seen in public reports"),
        Fact(
            "the vendor's MLA: ixformer.inference.functions.vllm_paged_attention_mla",
            "Deep-Spark/vllm",
        ),
    ),
    ci=CILane(
        platform="iluvatar",
        runner="iluvatar",
        image="corex:qs_pj20250825",
        pulled=False,
        docker=("--privileged", "--cap-add=ALL", "--pid=host", "--ipc=host"),
        volumes=("/dev:/dev", "/lib/firmware:/lib/firmware", "/usr/src:/usr/src", "/lib/modules:/lib/modules"),
        devices=0,
        smi="ixsmi",
        source="InfiniTensor/ci:config.yml, ci_resource.py, and the callers' .github/ci_config.yml",
        notes=(
            Fact("PIP_CONSTRAINT holds torch at the image's version", "InfiniTensor/ci:images/iluvatar/Dockerfile"),
            Fact("docker runs --privileged --pid=host --ipc=host with /dev mounted", "InfiniTensor/ci:config.yml"),
            Fact("the image is not public, a machine has to be given it first", "InfiniTensor/ci:README.md"),
            Fact(
                "PATH, PYTHONPATH and LD_LIBRARY_PATH need /usr/local/corex",
                "InfiniTensor/ci:images/iluvatar/Dockerfile",
            ),
        ),
    ),
)
