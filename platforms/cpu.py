"""A CPU: PyTorch is the implementation there.

Triton has no CPU target in the releases this project is built on, so no kernel runs on a CPU outside Triton's
interpreter, which is for checking numerics and not for use.
"""

from ntops_mla.platform import CILane, Fact, Gate, Markers, Platform

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
    ci=CILane(
        platform=None,
        runner="ubuntu-latest",
        image=None,
        execution_mode="hosted",
        source="GitHub's hosted runners",
    ),
    attention_flop_cost=Fact(
        6,
        "measured: DeepSeek-R1's prefill on two cores with AMX bfloat16, PyTorch 2.13: about 0.3 TFLOP/s in "
        "scaled_dot_product_attention of 576 columns, 1.8 in F.linear",
    ),
)
