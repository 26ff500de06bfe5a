"""FlashMLA's sparse cases, and its dense ones over the fp8 cache, on the device, all of them.

In the interpreter the same with few heads, few indices and at most two requests, each once.
"""

import pytest
import torch

from ntops_mla import devices, dispatch, flash_mla
from ntops_mla.devices import detect
from ntops_mla.testing import assert_close
from tests import flash_mla_cases as dense
from tests import flash_mla_sparse_cases as cases
from tests.device.on_device import INTERPRETED

pytestmark = pytest.mark.device
SIZES = 40, 24


def name_of(value):
    return getattr(value, "name", str(value))


def shrunk(all_cases):
    """As they are, on a device."""
    if not INTERPRETED:
        return tuple(all_cases)

    def scope(of):
        return None if of is None else of._replace(s_k=SIZES[0], topk=SIZES[1], page_size=min(of.page_size, 7))

    return tuple(
        dict.fromkeys(
            case._replace(
                batch=min(case.batch, 2), heads=min(case.heads, 9), scope=scope(case.scope), extra=scope(case.extra)
            )
            for case in all_cases
        )
    )


def shrunk_prefill(all_cases):
    if not INTERPRETED:
        return tuple(all_cases)
    return tuple(
        dict.fromkeys(
            case._replace(s_q=min(case.s_q, 3), s_kv=SIZES[0], topk=SIZES[1], heads=min(case.heads, 9))
            for case in all_cases
        )
    )


def ran_as_gated(device, ran, op):
    gate = detect(device).platform.gate(op, torch.bfloat16, INTERPRETED)
    assert ran[op].backend == ("reference" if gate.mode == "reference" else "kernel"), ran


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bfloat16"])
@pytest.mark.parametrize("case", shrunk(cases.CASES), ids=name_of)
def test_decode(device, case, fp8):
    inputs = cases.make_inputs(case, fp8, device)
    metadata, num_splits = flash_mla.get_mla_metadata()
    with dispatch.record() as ran:
        out, lse = flash_mla.flash_mla_with_kvcache(
            **inputs.arguments(), tile_scheduler_metadata=metadata, num_splits=num_splits
        )
    ran_as_gated(device, ran, "mla_sparse_fp8" if fp8 else "mla_sparse")
    cases.check(case, out, lse, cases.reference(case, inputs))


@pytest.mark.parametrize("case", shrunk_prefill(cases.PREFILL_CASES), ids=name_of)
def test_prefill(device, case):
    inputs = cases.make_prefill_inputs(case, device)
    with dispatch.record() as ran:
        out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(*inputs)
    ran_as_gated(device, ran, "mla_sparse")
    cases.check_prefill(case, out, max_logits, lse, cases.prefill_reference(case, inputs))


def shrunk_dense(all_cases):
    if not INTERPRETED:
        return tuple(all_cases)
    return tuple(
        dict.fromkeys(
            case._replace(batch=min(case.batch, 2), s_k=min(case.s_k, 20), heads=min(case.heads, 9))
            for case in dense.tenth(all_cases)
        )
    )


@pytest.mark.parametrize("case", shrunk_dense(dense.CASES), ids=name_of)
def test_dense_decode_over_the_fp8_cache(device, case):
    inputs = dense.make_inputs(case)
    as_bytes, plain = cases.to_fp8(inputs)
    inputs = dense.Inputs(*(x.to(device) for x in as_bytes))
    with dispatch.record() as ran:
        out, lse = flash_mla.flash_mla_with_kvcache(
            *inputs, dense.LATENT, *flash_mla.get_mla_metadata(), causal=case.causal, is_fp8_kvcache=True
        )
    ran_as_gated(device, ran, "mla_decode_fp8")
    expected = dense.reference(case, plain)
    assert_close(out, expected.out, cases.SPARSE_OUT, case.name)
    assert_close(lse, expected.lse, cases.DECODE_LSE, case.name)


GRAPHED = cases.SparseCase(2, 2, 9, cases.Scope(40, 24, 7, True), extra=cases.Scope(20, 10, 2, True))


def calls(device):
    """Each function with its inputs on the device."""
    for fp8 in (True, False):
        inputs = cases.make_inputs(GRAPHED, fp8, device)
        metadata = dict(zip(("tile_scheduler_metadata", "num_splits"), flash_mla.get_mla_metadata()))
        given = {**inputs.arguments(), **metadata}
        yield lambda given=given: flash_mla.flash_mla_with_kvcache(**given), given
    prefill = cases.make_prefill_inputs(cases.SparsePrefillCase(3, 50, 40, 9, True, True), device)
    yield lambda: flash_mla.flash_mla_sparse_fwd(*prefill), prefill._asdict()
    plain = dense.make_inputs(dense.Case(2, 2, 70, 3, True, True))
    for inputs, fp8 in ((plain, False), (cases.to_fp8(plain)[0], True)):
        given = dict(zip(dense.Inputs._fields, (x.to(device) for x in inputs)))
        metadata = flash_mla.get_mla_metadata()[0]
        options = {"head_dim_v": 512, "tile_scheduler_metadata": metadata, "causal": True, "is_fp8_kvcache": fp8}
        yield lambda given=given, options=options: flash_mla.flash_mla_with_kvcache(**given, **options), given


def test_no_call_waits_for_the_device(device):
    module = devices.device_module(device)
    if not hasattr(module, "set_sync_debug_mode"):
        pytest.skip(f"torch.{device.type} has no set_sync_debug_mode")
    for call, _ in calls(device):
        call()  # compiles
        devices.synchronize(device)
        module.set_sync_debug_mode("error")
        try:
            call()
        finally:
            module.set_sync_debug_mode("default")


def test_a_graph_follows_other_lengths_and_indices(device):
    if reason := devices.graph_problem(device):
        pytest.skip(reason)
    for call, given in calls(device):
        with devices.side_stream(device):
            call()
        devices.synchronize(device)
        graph = devices.capture(device, call)
        for name, change in (
            ("topk_length", lambda x: x.clamp(max=3)),
            ("extra_topk_length", lambda x: x.clamp(max=2)),
            ("indices", lambda x: x.masked_fill(x == x.amax(), -1)),
            ("cache_seqlens", lambda x: x - 1),
        ):
            if given.get(name) is not None:
                given[name].copy_(change(given[name].clone()))
        graph.replay()
        devices.synchronize(device)
        for mine, theirs in zip(graph.result, call()):
            assert torch.equal(mine, theirs)
