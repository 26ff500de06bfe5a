"""How a test speaks to the device: arguments go there as they lie, results are compared with float64 on the CPU."""

import os

import pytest
import torch

from ntops_mla import devices, dispatch, interpreter, ops
from ntops_mla.devices import detect
from ntops_mla.testing import assert_close
from tests import test_latent_fp8 as fp8
from tests.interpreted import numerics
from tests.interpreted.numerics import DECODE, DTYPES, PREFILL
from tests.test_mla_decode_fp8 import fp8_inputs
from tests.test_mla_sparse import TOLERANCES as SPARSE
from tests.test_mla_sparse import check_results, sparse_inputs
from tests.test_mla_sparse_fp8 import sparse_fp8_inputs
from tests.test_ops import ROUNDED, append_inputs, cache_of, decode64, decode_inputs, prefill64, prefill_inputs, turns

INTERPRETED = interpreter.enabled()
# On a board that is not there, too, the interpreter computes, though the dispatcher does not know.
SLOW = INTERPRETED or bool(os.environ.get("NTOPS_MLA_TEST_BOARD"))
NAMES = ops.names()
NAN = float("nan")


def pick(device, interpreted):
    """A value for a device, and the one for the interpreter, which takes a second where a device takes 10 us."""
    return interpreted if SLOW else device


def scaled(*lengths):
    """Lengths for a device; in the interpreter an eighth of each, but 0 stays the only 0."""
    return [-(-length // pick(1, 8)) for length in lengths]


def on(device, values):
    """Copies of `values` on `device`, each of the same strides and offset; what shares a storage shares one there."""
    storages = {}

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        key = storage.data_ptr(), value.dtype
        if key not in storages:
            flat = torch.empty(0, dtype=value.dtype)
            flat.set_(storage, 0, (storage.nbytes() // value.element_size(),), (1,))
            storages[key] = flat.to(device, copy=True)
        return storages[key].as_strided(value.shape, value.stride(), value.storage_offset())

    return [moved(value) for value in values]


def run(op, *args, **kwargs):
    """The result of `op`, which its kernel has computed, unless the dtype's gate, or a gates file, says PyTorch."""
    name = op.__name__
    with dispatch.record() as ran:
        result = op(*args, **kwargs)
    platform, found = detect(args[0].device).platform, dispatch.settings().findings
    dtype = next((a for a in args if isinstance(a, torch.dtype)), args[0].dtype)  # latent_dequantize names its result's
    gate = dispatch._gate(ops.get(name).spec, platform, dtype, INTERPRETED, found)
    assert ran[name].backend == ("reference" if gate.mode == "reference" else "kernel"), ran[name]
    return result


def check_rounded(value, expected, name="value"):
    """An element-wise op computes in float32 and rounds once: both errors are allowed for together, in float32 too.

    Half a unit or float32's noise is not enough: near a tie the noise decides, and of millions of elements some are.
    """
    assert_close(value, expected, ROUNDED[value.dtype]._replace(both=True), name)


def check_attention(out, lse, *expected):
    """As in the interpreter, with results that lie on the device."""
    numerics.check_attention(out.cpu(), lse.cpu(), *expected)


def check_decode(device, args, causal=True, num_splits=None):
    """mla_decode of CPU arguments, on the device."""
    out, lse = run(ops.mla_decode, *on(device, args), causal=causal, num_splits=num_splits)
    agree_decode(args, out, lse, causal)
    return out, lse


def agree_decode(args, out, lse, causal=True):
    """out and lse are what float64 makes of `args`, which are on the CPU."""
    expected_out, expected_lse = decode64(*args, causal=causal)
    check_attention(out.transpose(1, 2), lse, expected_out.transpose(1, 2), expected_lse, args[0].dtype, DECODE)


def check_prefill(device, args, causal=True):
    """mla_prefill of CPU arguments, on the device."""
    out, lse = run(ops.mla_prefill, *on(device, args), causal=causal)
    expected_out, expected_lse = prefill64(*args, causal=causal)
    check_attention(out.transpose(0, 1), lse, expected_out.transpose(0, 1), expected_lse, args[0].dtype, PREFILL)
    return out, lse


# Any op alike, for what holds of all of them


def arguments(name, dtype):
    """Odd sizes, strides and lengths, on the CPU."""
    if name == "rms_norm":
        return [torch.randn(37, 519).to(dtype)[:, 3:515], torch.randn(512).to(dtype), 1e-6]
    if name == "rope":
        tokens = pick(37, 5)
        return [torch.randn(tokens, 20, 192).to(dtype)[..., 128:], *turns(tokens, 64)]
    if name == "latent_append":
        args = list(append_inputs(pick(37, 5), 16, dtype, strided=True))
        args[4][2] = -1
        return [*args, 1e-6, torch.randn(len(args[0]), pick(20, 3), 192).to(dtype)[..., 128:]]
    if name == "mla_sparse_fp8":
        topk, heads = pick(300, 70), pick(20, 3)
        sizes = {"s_q": 2, "page_size": 61, "pages": 5, "strided": True, "lengths": [topk, 7, topk, 1]}
        args = sparse_fp8_inputs([topk, 0, 33, 1], topk, heads=heads, layout="apart", dtype=dtype, **sizes)
        return [*args, None, True]
    if name == "mla_sparse":
        topk, heads = pick(300, 70), pick(20, 3)
        sizes = {"s_q": 2, "page_size": 61, "pages": 5, "strided": True, "lengths": [topk, 7, topk, 1]}
        return [*sparse_inputs([topk, 0, 33, 1], topk, heads=heads, dtype=dtype, **sizes), None, True]
    if name == "mla_decode_fp8":
        lengths, heads = scaled(300, 0, 1, 77), pick(20, 3)
        sizes = {"s_q": 2, "page_size": 16, "layout": "apart", "strided": True}
        return [*fp8_inputs(lengths, heads=heads, dtype=dtype, **sizes), True, None]
    if name in fp8.NAMES:
        return fp8.arguments(name, dtype, pick(37, 5), pick(20, 3))
    if name == "mla_schedule":
        return [torch.tensor([5000, 0, 1, 300] * pick(50, 1), dtype=torch.int32), 16, None]
    if name == "mla_decode":
        lengths = scaled(300, 0, 1, 77)
        heads = pick(20, 3)
        return [*decode_inputs(lengths, s_q=2, heads=heads, page_size=16, strided=True, dtype=dtype), True, None]
    lengths = scaled(150, 0, 33), scaled(170, 40, 32)
    return [*prefill_inputs(*lengths, heads=3, strided=True, dtype=dtype), True]


def outcome(name, args):
    """What the op called `name` makes of `args`: its results, or what it has written to."""
    result = run(getattr(ops, name), *args)
    if name in ("latent_append", "latent_append_fp8"):
        return [args[5]] if args[7] is None else [args[5], args[7]]
    if name in fp8.NAMES and result is None:
        return [cache_of(name, args)]
    return [result] if isinstance(result, torch.Tensor) else list(result)


def check_outcome(name, args, results):
    """`results` of the device are what PyTorch makes of `args`, on the CPU, in float64."""
    if name in fp8.NAMES:
        return fp8.check_outcome(name, args, *results)
    if name == "mla_schedule":
        assert torch.equal(results[0].cpu(), ops.mla_schedule.reference(*args[:2], len(results[0]) - len(args[0])))
        return None
    dtype = args[0].dtype
    exact = [a.double() if isinstance(a, torch.Tensor) and a.dtype in DTYPES else a for a in args]
    for index in {"rope": (1, 2), "latent_append": (2, 3)}.get(name, ()):  # cos and sin are float32 in every op
        exact[index] = args[index]
    expected = getattr(ops, name).reference(*exact)
    if name in ("mla_decode", "mla_decode_fp8"):
        wanted, results = (expected[0].transpose(1, 2), expected[1]), (results[0].transpose(1, 2), results[1])
        return check_attention(*results, *wanted, dtype, DECODE)
    if name in ("mla_sparse", "mla_sparse_fp8"):
        return check_results([result.cpu() for result in results], expected, dtype, SPARSE[dtype])
    if name == "mla_prefill":
        wanted, results = (expected[0].transpose(0, 1), expected[1]), (results[0].transpose(0, 1), results[1])
        return check_attention(*results, *wanted, dtype, PREFILL)
    if name == "latent_append":  # NaN where nothing is written
        expected, result = exact[5], results[0].cpu()
        assert torch.equal(result.isnan(), expected.isnan())
        if exact[7] is not None:
            check_rounded(results[1], exact[7], "q_pe")
        return check_rounded(result.nan_to_num(0), expected.nan_to_num(0), name)
    return check_rounded(results[0], expected, name)


# Graphs and streams


def capture(device, function):
    """Record what `function` launches; it returns a list of tensors. In the interpreter it is called again instead."""
    if INTERPRETED:
        results = function()

        def again():
            for kept, new in zip(results, function()):
                kept.copy_(new)

        return devices.Captured(again, results, None)
    if (problem := devices.graph_problem(device)) is not None:
        pytest.skip(problem)
    # Compiling and the first choice of an op are no part of a graph.
    with devices.side_stream(device):
        for _ in range(2):
            function()
    devices.synchronize(device)
    return devices.capture(device, function)
