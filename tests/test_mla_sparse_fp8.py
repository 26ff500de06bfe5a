"""mla_sparse_fp8 on the CPU: its PyTorch reference against float64 over the dequantised cache, and its refusals."""

import re

import pytest
import torch

from ntops_mla import ops
from ntops_mla.ops import _fp8
from ntops_mla.testing import FP8_OUT
from tests.test_mla_decode_fp8 import packed
from tests.test_mla_sparse import TOLERANCES as SPARSE
from tests.test_mla_sparse import check_results, sparse64, sparse_inputs
from tests.test_ops import DTYPES, HALF, META, is_, name_of

TOLERANCES = {dtype: (FP8_OUT if dtype in HALF else out, *rest) for dtype, (out, *rest) in SPARSE.items()}


def sparse_fp8_inputs(counts, topk, *, dtype, any_scale=False, layout="packed", codes=torch.uint8, **kwargs):
    """sparse_inputs over 656 bytes a token."""
    q_nope, q_pe, kv, pe, *rest = sparse_inputs(counts, topk, dtype=dtype, **kwargs)
    return q_nope, q_pe, packed(kv, pe, any_scale, layout, codes), *rest


def sparse_fp8_64(q_nope, q_pe, cache, *rest):
    """sparse64 over the dequantised cache."""
    rows = _fp8.dequantize(cache.view(torch.uint8).flatten(0, 1), torch.float64).unflatten(0, cache.shape[:2])
    return sparse64(q_nope, q_pe, rows[..., : _fp8.LATENT], rows[..., _fp8.LATENT :], *rest)


def check(args, **kwargs):
    results = ops.mla_sparse_fp8(*args, want_max=True, **kwargs)
    check_results(results, sparse_fp8_64(*args), args[0].dtype, TOLERANCES[args[0].dtype])
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 64])
def test_heads(heads, dtype):
    check(sparse_fp8_inputs([40, 7, 0, 1], 40, heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 128])
def test_page_sizes(page_size, dtype):
    check(sparse_fp8_inputs([40, 0, 33], 40, page_size=page_size, pages=5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize("codes", [torch.uint8, torch.float8_e4m3fn], ids=name_of)
def test_layouts(codes, layout, dtype):
    lengths = [40, 9, 0, 41]
    args = sparse_fp8_inputs(
        [40, 7, 0, 3], 40, s_q=2, lengths=lengths, strided=True, layout=layout, codes=codes, dtype=dtype
    )
    check(args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_any_scale(dtype):
    check(sparse_fp8_inputs([40, 7], 40, any_scale=True, dtype=dtype))


def test_max_logits_only_where_they_are_wanted():
    args = sparse_fp8_inputs([40, 7], 40, dtype=torch.float32)
    (out, lse, maxima), with_maxima = ops.mla_sparse_fp8(*args), check(args)
    assert maxima.shape == (0,)
    for value, other in zip((out, lse), with_maxima):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [[], [0], [0, 0]], ids=str)
def test_degenerate_batches(counts):
    check(sparse_fp8_inputs(counts, 8, dtype=torch.float32))


BAD = [
    ("q_nope", lambda t: t[..., :256], ValueError, "512"),
    ("q_pe", lambda t: t[..., :32], ValueError, "64"),
    ("cache", lambda t: t[..., :655], ValueError, "656"),
    ("cache", lambda t: t.float(), TypeError, "float32"),
    ("cache", lambda t: t[:, ::2], ValueError, "adjacent"),
    ("cache", lambda t: t[:, :0], ValueError, "at least 1"),
    ("cache", lambda t: t.to(META), ValueError, "meta"),
    ("indices", lambda t: t.long(), TypeError, "int32"),
    ("indices", lambda t: t[:2], ValueError, "3"),
    ("topk_length", is_(torch.ones(3, dtype=torch.int32)), ValueError, "[B, s_q]"),
    ("softmax_scale", is_("one"), TypeError, "one"),
    ("num_splits", is_(0), ValueError, "0"),
    ("want_max", is_("no"), TypeError, "no"),
]


@pytest.mark.parametrize("argument, change, error, words", BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD])
def test_a_bad_argument_is_named(argument, change, error, words):
    op = ops.get("mla_sparse_fp8")
    args = dict(zip(op._signature.parameters, op.example("cpu", torch.float32, tokens=3, heads=2, page_size=16)))
    args[argument] = change(args[argument])
    for function in (ops.mla_sparse_fp8, ops.mla_sparse_fp8.reference):
        with pytest.raises(error) as caught:
            function(**args)
        assert re.match(rf"mla_sparse_fp8: .*\b{argument}\b", str(caught.value)), str(caught.value)
        assert words in str(caught.value)
