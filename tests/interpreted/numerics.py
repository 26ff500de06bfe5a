"""What the kernels are compared with, interpreted or on a device, and within what."""

import torch

from ntops_mla import dispatch, ops
from ntops_mla.testing import DECODE_LSE, DECODE_OUT, PREFILL_LSE, PREFILL_OUT, Float64MLA, assert_close
from tests.test_mla_sparse import TOLERANCES as SPARSE
from tests.test_mla_sparse import check_results, sparse64
from tests.test_ops import HALF, LSE, SINGLE, decode64, prefill64

DTYPES = (torch.float32, *HALF)
DECODE = {torch.float32: (SINGLE, LSE), **{dtype: (DECODE_OUT, DECODE_LSE) for dtype in HALF}}
PREFILL = {torch.float32: (SINGLE, LSE), **{dtype: (PREFILL_OUT, PREFILL_LSE) for dtype in HALF}}


def by_kernel(op, *args, **kwargs):
    """The result of `op`, which its kernel has computed, in the interpreter."""
    with dispatch.record() as ran:
        result = op(*args, **kwargs)
    choice = ran[op.__name__]
    assert choice.backend == "kernel" and "interpreter" in choice.reason, choice
    return result


def check_decode(args, causal=True, num_splits=None, schedule=None):
    out, lse = by_kernel(ops.mla_decode, *args, causal=causal, num_splits=num_splits, schedule=schedule)
    expected_out, expected_lse = decode64(*args, causal=causal)
    check_attention(out.transpose(1, 2), lse, expected_out.transpose(1, 2), expected_lse, args[0].dtype, DECODE)
    return out, lse


def check_prefill(args, causal=True):
    out, lse = by_kernel(ops.mla_prefill, *args, causal=causal)
    expected_out, expected_lse = prefill64(*args, causal=causal)
    check_attention(out.transpose(0, 1), lse, expected_out.transpose(0, 1), expected_lse, args[0].dtype, PREFILL)
    return out, lse


def check_sparse(args, num_splits=None):
    results = by_kernel(ops.mla_sparse, *args, num_splits=num_splits, want_max=True)
    check_results(results, sparse64(*args), args[0].dtype, SPARSE[args[0].dtype])
    return results


def check_attention(out, lse, expected_out, expected_lse, dtype, tolerances):
    """out has lse's dimensions and the columns; a row without keys is 0 with lse -inf."""
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    blind = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    assert torch.equal(out[blind], torch.zeros_like(out[blind]))
    out_tolerance, lse_tolerance = tolerances[dtype]
    assert_close(out, expected_out, out_tolerance, "out")
    assert_close(lse, expected_lse, lse_tolerance, "lse")


def exactly(mla, steps, inputs):
    """float64's outputs of every request over all steps (request -> new tokens) of `inputs`, a list for each step."""
    reference = Float64MLA(mla.cfg, mla.state_dict())
    whole = {}
    for step, xs in zip(steps, inputs):
        for request, x in zip(step, xs):
            whole.setdefault(request, []).append(x)
    return [reference(torch.cat(whole[request]))[0] for request in sorted(whole)]
