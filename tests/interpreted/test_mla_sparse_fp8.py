"""mla_sparse_fp8's kernel against float64 over the dequantised cache; the interpreter's tile is 16 heads by 16 keys."""

import dataclasses
import importlib

import pytest
import torch

from ntops_mla import ops
from ntops_mla.ops import _fp8
from ntops_mla.testing import DECODE_LSE, FP8_OUT
from tests.interpreted.numerics import DTYPES, by_kernel
from tests.test_mla_sparse import check_results
from tests.test_mla_sparse_fp8 import sparse_fp8_64, sparse_fp8_inputs
from tests.test_ops import HALF, LSE, SINGLE, name_of

# The function of ops hides its module's name.
OP = importlib.import_module("ntops_mla.ops.mla_sparse_fp8")
TOLERANCES = {torch.float32: (SINGLE, LSE), **{dtype: (FP8_OUT, DECODE_LSE) for dtype in HALF}}


def check(args, num_splits=None):
    results = by_kernel(ops.mla_sparse_fp8, *args, num_splits=num_splits, want_max=True)
    dtype = args[0].dtype
    check_results(results, sparse_fp8_64(*args), dtype, TOLERANCES[dtype])
    return results


@pytest.fixture(params=[0, 1], ids=["bits", "cast"])
def hardware(request, monkeypatch):
    """Both ways in which a code becomes a number."""
    tile = OP._tile

    def chosen(*args):
        found = tile(*args)
        return dataclasses.replace(found, blocks={**found.blocks, "hardware": request.param})

    monkeypatch.setattr(OP, "_tile", chosen)
    OP._made.cache_clear()
    yield request.param
    OP._made.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_every_code_is_the_number_that_pytorch_makes_of_it(scale, dtype, hardware):
    """254 of the 256, bit for bit; the two others are NaN."""
    cache = torch.full((2, 3, _fp8.TOKEN_BYTES), 255, dtype=torch.uint8)
    codes, scales, pe = _fp8.views(cache[1:, 2:])
    codes.copy_(torch.arange(512).remainder(256))
    codes[codes & 127 == 127] = 0
    scales.fill_(scale), pe.zero_()
    exact = (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype).flatten()
    q, indices = torch.zeros(1, 1, 1, 576, dtype=dtype), torch.tensor([[[-1, 5, 6]]], dtype=torch.int32)
    out, _, _ = by_kernel(ops.mla_sparse_fp8, q[..., :512], q[..., 512:], cache, indices, 0.1)
    assert exact.unique().numel() > 200 and torch.equal(out.flatten(), exact)
    codes[0, 0, 300] = 255
    out, lse, _ = by_kernel(ops.mla_sparse_fp8, q[..., :512], q[..., 512:], cache, indices, 0.1)
    assert out[..., 300].isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 64])
def test_heads(heads, dtype):
    check(sparse_fp8_inputs([20, 7, 0, 1], 20, heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 128])
def test_page_sizes(page_size, layout, dtype):
    check(sparse_fp8_inputs([40, 0, 33], 40, page_size=page_size, pages=5, layout=layout, dtype=dtype), num_splits=2)


@pytest.mark.parametrize("layout", ["packed", "apart"])
def test_both_ways(layout, hardware):
    args = sparse_fp8_inputs([37, 0, 5], 40, page_size=16, layout=layout, any_scale=True, dtype=torch.float32)
    check(args, num_splits=2)


@pytest.mark.parametrize(
    "num_splits, dtype", [(n, torch.float32) for n in (None, 1, 2, 3, 40)] + [(n, d) for n in (1, 3) for d in HALF]
)
def test_splits(num_splits, dtype):
    """Lists of 5 tiles, some of them without a key, some past topk_length."""
    lengths = [70, 33, 0, 71, 16, -1]
    check(sparse_fp8_inputs([70, 33, 5, 1, 16, 9], 70, s_q=2, heads=3, lengths=lengths, dtype=dtype), num_splits)


def test_splits_that_are_chosen(launches):
    check(sparse_fp8_inputs([300, 40], 300, heads=2, dtype=torch.bfloat16))
    assert [name for name, _ in launches] == ["mla_sparse_fp8", "mla_combine"]


@pytest.mark.parametrize("codes", [torch.uint8, torch.float8_e4m3fn], ids=name_of)
def test_inputs_stay_and_may_be_strided(codes, launches):
    args = sparse_fp8_inputs([37, 5], 40, s_q=2, strided=True, codes=codes, dtype=torch.bfloat16)
    before = [t.clone() for t in args[:4]]
    check(args, num_splits=1)
    for value, copy in zip(args, before):
        same = (t.contiguous().view(torch.uint8) for t in (value, copy))  # NaN too
        assert torch.equal(*same)
    assert [name for name, _ in launches] == ["mla_sparse_fp8"]


@pytest.mark.parametrize("counts", [[], [0], [0, 0]], ids=str)
@pytest.mark.parametrize("num_splits", [None, 3])
def test_degenerate_batches(counts, num_splits):
    check(sparse_fp8_inputs(counts, 8, dtype=torch.float32), num_splits)


def test_without_heads_pages_or_indices():
    q_nope, q_pe, cache, indices, *rest = sparse_fp8_inputs([0, 0], 8, dtype=torch.float32)
    assert by_kernel(ops.mla_sparse_fp8, q_nope[:, :, :0], q_pe[:, :, :0], cache, indices, *rest)[0].numel() == 0
    check((q_nope, q_pe, cache[:0], indices, *rest))
    check((q_nope, q_pe, cache, indices[..., :0], *rest))


@pytest.mark.parametrize("gap", [0, 16], ids=["flat", "apart"])
def test_a_cache_of_more_than_2_to_the_31_bytes(gap, beyond_int32):
    """Its last slots are used, and some of the first."""
    pages, stride = 2**31 // (64 * _fp8.TOKEN_BYTES) + 3, 64 * _fp8.TOKEN_BYTES + gap
    cache = beyond_int32((pages, 64, _fp8.TOKEN_BYTES), (stride, _fp8.TOKEN_BYTES, 1), torch.uint8)
    used = [pages - 1, 2, pages - 2]
    for page in used:
        _fp8.quantize_into(cache[page], torch.randn(64, 512) / 10, torch.randn(64, 64) / 10)
    q_nope, q_pe = (torch.randn(2, 1, 3, columns).half() for columns in (512, 64))
    places, slots = torch.randint(3, (2, 1, 20)), torch.randint(64, (2, 1, 20))
    indices = (torch.tensor(used)[places] * 64 + slots).int()
    results = by_kernel(ops.mla_sparse_fp8, q_nope, q_pe, cache, indices, 0.04)
    small = by_kernel(ops.mla_sparse_fp8, q_nope, q_pe, cache[used], (places * 64 + slots).int(), 0.04)
    assert all(map(torch.equal, results, small))
    check((q_nope, q_pe, cache[used], (places * 64 + slots).int(), 0.04))
