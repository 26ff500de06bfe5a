"""mla_decode_fp8 on the CPU: its PyTorch reference against float64 over the dequantised cache, and its refusals."""

import re

import pytest
import torch

from ntops_mla import ops
from ntops_mla.ops import _fp8
from ntops_mla.testing import FP8_OUT, Tolerance, assert_close
from tests.test_ops import DECODE_TOLERANCES, DTYPES, HALF, META, cut_decode, decode64, decode_inputs, is_, name_of

# float32 and float64 as for mla_decode
TOLERANCES = {dtype: (FP8_OUT if dtype in HALF else out, lse) for dtype, (out, lse) in DECODE_TOLERANCES.items()}


def packed(kv, pe, any_scale=False, layout="packed", codes=torch.uint8):
    """`[pages, page_size, 512 | 64]` as 656 bytes a token, each of them 255 (NaN as code, scale and rope column) where
    pe is NaN.

    any_scale: scales that are no powers of two, each group's its own.
    """
    pages, page_size, _ = kv.shape
    used = ~pe.isnan().any(-1)
    rows = torch.empty(int(used.sum()), _fp8.TOKEN_BYTES, dtype=torch.uint8)
    _fp8.quantize_into(rows, kv[used].float(), pe[used].float())
    if any_scale:
        _fp8.views(rows)[1].mul_(torch.rand(len(rows), _fp8.GROUPS) * 0.3 + 0.7)
    cache = torch.full((pages, page_size, _fp8.TOKEN_BYTES), 255, dtype=torch.uint8)
    if layout == "apart":  # pages further apart than they are long, behind something else
        room = torch.full((64 + pages * (page_size * _fp8.TOKEN_BYTES + 192),), 255, dtype=torch.uint8)
        cache = room[64:].view(pages, -1)[:, :-192].view(pages, page_size, _fp8.TOKEN_BYTES)
    cache[used] = rows
    return cache.view(codes)


def fp8_inputs(lengths, *, dtype, any_scale=False, layout="packed", codes=torch.uint8, **kwargs):
    """decode_inputs over 656 bytes a token."""
    q_nope, q_pe, kv, pe, *rest = decode_inputs(lengths, dtype=dtype, **kwargs)
    return q_nope, q_pe, packed(kv, pe, any_scale, layout, codes), *rest


def fp8_64(q_nope, q_pe, cache, table, seq_lens, scale, causal=True):
    """decode64 over the dequantised cache."""
    rows = _fp8.dequantize(cache.view(torch.uint8).flatten(0, 1), torch.float64).unflatten(0, cache.shape[:2])
    return decode64(q_nope, q_pe, rows[..., : _fp8.LATENT], rows[..., _fp8.LATENT :], table, seq_lens, scale, causal)


def check(args, causal=True, tolerance=None, **kwargs):
    out, lse = ops.mla_decode_fp8(*args, causal=causal, **kwargs)
    dtype = args[0].dtype
    expected_out, expected_lse = fp8_64(*args, causal=causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    blind = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    assert torch.equal(out.transpose(1, 2)[blind], torch.zeros_like(out.transpose(1, 2)[blind]))
    out_tolerance, lse_tolerance = TOLERANCES[dtype]
    assert_close(out, expected_out, tolerance or out_tolerance, "out")
    assert_close(lse, expected_lse, lse_tolerance, "lse")
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 64])
def test_heads(heads, dtype):
    check(fp8_inputs([70, 1, 0, 64], heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_page_sizes(page_size, dtype):
    lengths = [0, 1, page_size, page_size + 1, 2 * page_size - 1 or 1, 200]
    check(fp8_inputs(lengths, page_size=page_size, dtype=dtype))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_several_rows(s_q, causal, dtype):
    check(fp8_inputs([0, 1, 2, 3, 4, 15, 16, 17, 31, 33], s_q=s_q, page_size=16, dtype=dtype), causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize("codes", [torch.uint8, torch.float8_e4m3fn], ids=name_of)
def test_layouts(codes, layout, dtype):
    check(fp8_inputs([37, 0, 16], s_q=2, strided=True, page_size=16, layout=layout, codes=codes, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_any_scale(dtype):
    check(fp8_inputs([37, 100], any_scale=True, dtype=dtype))


@pytest.mark.parametrize("s_q", [1, 3])
def test_in_spans_of_keys(monkeypatch, s_q):
    cut_decode(monkeypatch, 1)
    check(fp8_inputs([70, 0, 33], page_size=16, s_q=s_q, dtype=torch.float64), tolerance=Tolerance(1e-7, 1e-6))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1]], ids=str)
def test_degenerate_batches(lengths):
    out, lse = check(fp8_inputs(lengths, dtype=torch.float32))
    assert out.shape == (len(lengths), 1, 4, 512) and lse.shape == (len(lengths), 4, 1)


def test_a_nan_that_is_seen_is_not_hidden():
    args = fp8_inputs([5], dtype=torch.float32)
    args[2][args[3][0, 0], 2, 7] = 0x7F
    out, _ = ops.mla_decode_fp8(*args)
    assert out.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_it_is_mla_decode_over_the_dequantised_cache(dtype):
    q_nope, q_pe, cache, *rest = fp8_inputs([37, 0, 16], s_q=2, dtype=dtype)
    rows = _fp8.dequantize(cache, dtype)
    expected = ops.mla_decode(q_nope, q_pe, rows[..., :512], rows[..., 512:], *rest)
    assert all(map(torch.equal, ops.mla_decode_fp8(q_nope, q_pe, cache, *rest), expected))


# Refusals

BAD = [
    ("q_nope", lambda t: t[..., :256], ValueError, "512"),
    ("q_nope", lambda t: t[0], ValueError, "[1, 2, 512]"),
    ("q_pe", lambda t: t[..., :32], ValueError, "64"),
    ("q_pe", lambda t: t.half(), TypeError, "float16"),
    ("cache", is_(None), TypeError, "NoneType"),
    ("cache", lambda t: t[0], ValueError, "[16, 656]"),
    ("cache", lambda t: t.float(), TypeError, "float32"),
    ("cache", lambda t: t.view(torch.int8), TypeError, "int8"),
    ("cache", lambda t: t[..., :655], ValueError, "656"),
    ("cache", lambda t: t[:, :12], ValueError, "power of two, got 12"),
    ("cache", lambda t: t[:, ::2], ValueError, "adjacent"),
    ("cache", lambda t: torch.cat([t, t], -1)[..., :656], ValueError, "adjacent"),
    ("cache", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "adjacent"),
    ("cache", lambda t: t.new_empty(3, 16 * 656 + 2)[:, :-2].view(3, 16, 656), ValueError, "multiples of 4"),
    ("cache", lambda t: t.new_empty(t.numel() + 1)[1:].view(t.shape), ValueError, "multiples of 4"),
    ("cache", lambda t: t.to(META), ValueError, "meta"),
    ("block_table", lambda t: t.long(), TypeError, "int32"),
    ("block_table", lambda t: t[:2], ValueError, "3"),
    ("block_table", is_(torch.tensor([[0], [3], [1]], dtype=torch.int32)), ValueError, "pages below 3"),
    ("seq_lens", lambda t: t.long(), TypeError, "int32"),
    ("seq_lens", is_(torch.tensor([1, 17, 2], dtype=torch.int32)), ValueError, "17"),
    ("softmax_scale", is_("one"), TypeError, "one"),
    ("causal", is_("no"), TypeError, "no"),
    ("num_splits", is_(0), ValueError, "0"),
]


@pytest.mark.parametrize("argument, change, error, words", BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD])
def test_a_bad_argument_is_named(argument, change, error, words):
    op = ops.get("mla_decode_fp8")
    args = dict(zip(op._signature.parameters, op.example("cpu", torch.float32, tokens=3, heads=2, page_size=16)))
    args[argument] = change(args[argument])
    for function in (ops.mla_decode_fp8, ops.mla_decode_fp8.reference):
        with pytest.raises(error) as caught:
            function(**args)
        assert re.match(rf"mla_decode_fp8: .*\b{argument}\b", str(caught.value)), str(caught.value)
        assert words in str(caught.value)


def test_strides_of_one_page_or_one_slot_say_nothing():
    q_nope, q_pe, cache, *rest = fp8_inputs([5], page_size=16, dtype=torch.float32)
    one = cache[rest[0][0, :1].long()].as_strided((1, 16, 656), (7, 656, 1))
    table = torch.zeros(1, 1, dtype=torch.int32)
    check((q_nope, q_pe, one, table, *rest[1:]))
