"""FlashMLA's functions by indices and over its fp8 cache, with the real kernels, and without a wait for the device."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ntops_mla import dispatch, flash_mla, kernel
from ntops_mla.testing import assert_close
from tests import flash_mla_cases as dense
from tests import flash_mla_sparse_cases as cases
from tests.flash_mla_sparse_cases import Scope, SparseCase, SparsePrefillCase


def run(inputs):
    metadata, num_splits = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(
        **inputs.arguments(), tile_scheduler_metadata=metadata, num_splits=num_splits
    )


CASES = (
    SparseCase(2, 2, 9, Scope(40, 24, 7), extra=Scope(20, 10, 2)),
    SparseCase(2, 1, 3, Scope(60, 40, 64, True), extra=Scope(20, 10, 5, True)),
    SparseCase(1, 1, 1, Scope(300, 200, 2), sink=False),
    SparseCase(2, 2, 3, Scope(20, 40, 61), invalid=True),
    SparseCase(3, 1, 3, Scope(20, 12, 16), empty=True),
)


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode(case, fp8):
    inputs = cases.make_inputs(case, fp8)
    with dispatch.record() as ran:
        out, lse = run(inputs)
    assert ran["mla_sparse_fp8" if fp8 else "mla_sparse"].backend == "kernel"
    cases.check(case, out, lse, cases.reference(case, inputs))


@pytest.mark.parametrize(
    "case",
    [SparsePrefillCase(3, 50, 40, 9, True, True), SparsePrefillCase(5, 11, 24, 3), SparsePrefillCase(1, 300, 200, 1)],
    ids=lambda case: case.name,
)
def test_prefill(case):
    inputs = cases.make_prefill_inputs(case)
    with dispatch.record() as ran:
        out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(*inputs)
    assert ran["mla_sparse"].backend == "kernel"
    cases.check_prefill(case, out, max_logits, lse, cases.prefill_reference(case, inputs))


@pytest.mark.parametrize(
    "case",
    [dense.Case(2, 2, 70, 3, True, True), dense.Case(3, 1, 20, 9, True, False, True)],
    ids=lambda case: case.name,
)
def test_dense_over_the_fp8_cache(case):
    as_bytes, plain = cases.to_fp8(dense.make_inputs(case))
    out, lse = flash_mla.flash_mla_with_kvcache(
        *as_bytes, 512, *flash_mla.get_mla_metadata(), causal=case.causal, is_fp8_kvcache=True
    )
    expected = dense.reference(case, plain)
    assert_close(out, expected.out, cases.SPARSE_OUT)
    assert_close(lse, expected.lse, cases.DECODE_LSE)


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a value read, a size that hangs on values, a copy to the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "repeat_interleave", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        assert name not in self.WAITING and not name.startswith(("unique", "_unique")), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]), f"{name} by a mask"
        device = (kwargs or {}).get("device")
        assert not (name == "_to_copy" and device is not None and torch.device(device).type == "cpu"), name
        return function(*args, **(kwargs or {}))


def test_no_call_waits_for_the_device(monkeypatch):
    """All that the host does but the launches themselves."""
    sparse = SparseCase(2, 2, 9, Scope(40, 24, 7, True), extra=Scope(20, 10, 2, True))
    calls = [functools.partial(run, cases.make_inputs(sparse, fp8)) for fp8 in (True, False)]
    prefill = cases.make_prefill_inputs(SparsePrefillCase(3, 50, 40, 9, True, True))
    calls.append(lambda: flash_mla.flash_mla_sparse_fwd(*prefill))
    plain = dense.make_inputs(dense.Case(2, 2, 70, 3, True, True))
    as_bytes, _ = cases.to_fp8(plain)
    for inputs, fp8 in ((plain, False), (as_bytes, True)):
        calls.append(
            lambda inputs=inputs, fp8=fp8: flash_mla.flash_mla_with_kvcache(
                *inputs, 512, *flash_mla.get_mla_metadata(), causal=True, is_fp8_kvcache=fp8
            )
        )
    expected = [("mla_sparse_fp8", "mla_sparse_fp8"), ("mla_sparse", "mla_sparse"), ("mla_sparse",), ("mla_decode",),
                ("mla_decode_fp8",)]  # fmt: skip

    def read(tensor, *args, **kwargs):
        raise AssertionError("a tensor is read")

    for name in ("tolist", "cpu", "numpy", "__array__"):  # of a CPU's tensors they pass no dispatcher
        monkeypatch.setattr(torch.Tensor, name, read)
    for call, names in zip(calls, expected):
        with kernel.capture() as launched, NoWait():
            call()
        assert tuple(made.name for made, _ in launched if made.name != "mla_combine") == names
    ones = torch.ones(3)
    for wait in (
        lambda: ones.sum().item(), lambda: bool(ones[0]), lambda: ones.tolist(), lambda: ones[ones > 0], ones.nonzero,
        ones.unique, lambda: torch.equal(ones, ones), ones.cpu, ones.numpy,
    ):  # fmt: skip
        with pytest.raises(AssertionError), NoWait():
            wait()
