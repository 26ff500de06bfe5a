"""FlashMLA's own dense correctness cases on the device, all of them, by `from ntops_mla import flash_mla`.

In the interpreter the same with few heads, short requests and at most two of them, each once.
"""

import pytest
import torch

import ntops_mla
from ntops_mla import dispatch, flash_mla
from ntops_mla.devices import detect
from tests import flash_mla_cases as cases
from tests.device.on_device import INTERPRETED

pytestmark = pytest.mark.device


def name_of(case):
    return case.name


def shrunk(all_cases):
    """As they are, on a device."""
    if not INTERPRETED:
        return tuple(all_cases)
    return tuple(
        dict.fromkeys(
            case._replace(batch=min(case.batch, 2), s_k=min(case.s_k, 20), heads=min(case.heads, 9))
            for case in all_cases
        )
    )


def shrunk_prefill(all_cases):
    if not INTERPRETED:
        return tuple(all_cases)
    return tuple(
        dict.fromkeys(
            case._replace(
                s_q=case.s_q // 512, s_k=case.s_k // 512, heads=4, kv_heads=-(-case.kv_heads * 4 // case.heads)
            )
            for case in all_cases
        )
    )


def check_decode(device, case, dtype):
    inputs = cases.make_inputs(case, device, dtype)
    metadata, num_splits = flash_mla.get_mla_metadata()
    with dispatch.record() as ran:
        out, lse = flash_mla.flash_mla_with_kvcache(*inputs, cases.LATENT, metadata, num_splits, causal=case.causal)
    gate = detect(device).platform.gate("mla_decode", dtype, INTERPRETED)
    assert ran["mla_decode"].backend == ("reference" if gate.mode == "reference" else "kernel"), ran
    assert out.dtype == dtype
    cases.check(case, out, lse, cases.reference(case, inputs))


@pytest.mark.parametrize("case", shrunk(cases.CASES), ids=name_of)
def test_decode(device, case):
    check_decode(device, case, torch.bfloat16)


@pytest.mark.parametrize("case", shrunk(cases.tenth(cases.CASES)), ids=name_of)
def test_decode_of_float16(device, case):
    check_decode(device, case, torch.float16)


@pytest.mark.parametrize("case", shrunk_prefill(cases.PREFILL_CASES), ids=name_of)
def test_prefill(device, case):
    """Heads of 128 columns are PyTorch's: no model with MLA has them."""
    inputs = cases.make_prefill_inputs(case, device, torch.bfloat16)
    with dispatch.record() as ran, ntops_mla.use(strict=case.width != 128):
        out, lse = flash_mla.flash_attn_varlen_func(
            *inputs, softmax_scale=case.softmax_scale, causal=case.causal, is_varlen=case.varlen
        )
    assert ran["mla_prefill"].backend == ("reference" if case.width == 128 else "kernel"), ran
    cases.check_prefill(case, out, lse, cases.prefill_reference(case, inputs))
