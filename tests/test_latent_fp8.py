"""The ops on FlashMLA's fp8 cache, latent_append_fp8, latent_quantize and latent_dequantize: references and refusals.

tests/test_ops.py holds what is asked of every op, tests/interpreted/test_latent_fp8.py the kernels.
"""

import pytest
import torch

import tests.test_ops as any_op
from ntops_mla import ops
from ntops_mla.ops import _fp8
from ntops_mla.testing import Tolerance, assert_close
from tests.test_ops import (
    DTYPES,
    META,
    QUERIES,
    ROUNDED,
    cast,
    flat,
    is_,
    longer,
    meta,
    name_of,
    norm64,
    one_more,
    rope64,
    turns,
)

NAMES = ("latent_append_fp8", "latent_quantize", "latent_dequantize")
# Of a cache as it reads, between two ways to compute the latent: a rounding to bfloat16 that falls otherwise can move a
# code by a whole step, an eighth; hardly any does.
FLIPPED = Tolerance(2e-5, 1.01 / 8, 5e-6)


def nothing(pages, page_size):
    """A cache in which every row reads NaN."""
    return torch.full((pages, page_size, 656), 255, dtype=torch.uint8)


def read(cache, dtype=torch.float64):
    return _fp8.dequantize(cache, dtype)


def rows_of(cache, slots):
    return cache.flatten(0, 1)[slots]


def bytes_of(latent, pe):
    cache = torch.empty(len(latent), 656, dtype=torch.uint8)
    _fp8.quantize_into(cache, latent, pe)
    return cache


def columns(tokens, width, dtype, strided):
    rows = torch.randn(tokens, width + 7 if strided else width).to(dtype)
    return rows[:, 3 : 3 + width] if strided else rows


def append_fp8_inputs(tokens, page_size, dtype, pages=3, strided=False):
    kv_a, weight = columns(tokens, 576, dtype, strided), torch.randn(512).to(dtype)
    slots = torch.randperm(pages * page_size)[:tokens]
    return kv_a, weight, *turns(tokens, 64), slots, nothing(pages, page_size)


def quantize_inputs(tokens, page_size, dtype, pages=3, strided=False):
    """Groups of very different sizes."""
    latent = columns(tokens, 512, dtype, strided) * torch.logspace(-4, 3, 512).to(dtype)
    pe, slots = columns(tokens, 64, dtype, strided), torch.randperm(pages * page_size)[:tokens]
    return latent, pe, slots, nothing(pages, page_size)


def dequantize_inputs(tokens, page_size, dtype, pages=3):
    cache = nothing(pages, page_size)
    _fp8.quantize_into(cache, torch.randn(pages, page_size, 512), torch.randn(pages, page_size, 64))
    return cache, torch.randperm(pages * page_size)[:tokens], dtype


def queries(tokens, heads, dtype, strided=True):
    """Their RoPE columns, as columns of q or by themselves."""
    q = torch.randn(tokens, heads, 192).to(dtype)
    return q[..., 128:] if strided else q[..., 128:].contiguous()


def arguments(name, dtype, tokens=5, heads=None):
    """Of an op of NAMES, strided, with a token that is skipped; heads: of latent_append_fp8's queries."""
    pages = -(-tokens // 16) + 2
    if name == "latent_append_fp8":
        q_pe = None if heads is None else queries(tokens, heads, dtype)
        args = [*append_fp8_inputs(tokens, 16, dtype, pages, strided=True), 1e-6, q_pe]
    elif name == "latent_quantize":
        args = [*quantize_inputs(tokens, 16, dtype, pages, strided=True)]
    else:
        args = [*dequantize_inputs(tokens, 16, dtype, pages)]
    slots = next(a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64)
    slots[-1] = -1
    return args


def exact(name, args):
    """The arguments in float64, with caches of their own; cos and sin are float32 in every op."""
    first = 2 if name != "latent_dequantize" else 0
    wide = [a.double() for a in args[:first]]
    rest = [a.clone() if isinstance(a, torch.Tensor) else a for a in args[first:]]
    if name == "latent_append_fp8" and rest[-1] is not None:
        rest[-1] = rest[-1].double()
    return [*wide, *(torch.float64 if isinstance(a, torch.dtype) else a for a in rest)]


def check_outcome(name, args, result, q_pe=None):
    """`result`, the rows or the cache that came out of `args` (as they were before), and the queries that were turned
    beside it, against float64."""
    wanted = exact(name, args)
    expected = getattr(ops, name).reference(*wanted)
    if expected is not None:  # a product with a power of two is exact, and rounded once
        assert torch.equal(result.cpu(), expected.to(result.dtype))
        return
    value, expected = read(result.cpu()), read(any_op.cache_of(name, wanted))
    assert torch.equal(value.isnan(), expected.isnan())  # NaN where nothing is written
    assert_close(value.nan_to_num(0), expected.nan_to_num(0), FLIPPED, name)
    if q_pe is not None:
        assert_close(q_pe.cpu(), wanted[-1], ROUNDED[q_pe.dtype], "q_pe")


# latent_append_fp8


def check_rows(args, eps=1e-5):
    """Rows of slots against float64: codes are the nearest; all other bytes stay."""
    kv_a, weight, cos, sin, slots, cache = args
    kept = slots >= 0
    rows = rows_of(cache, slots[kept])
    expected = norm64(kv_a[kept, :512], weight, eps)
    error = (read(rows)[:, :512] - expected).abs()
    # half a step: a sixteenth, or of the subnormal codes 2^-10 of the scale; and the rounding to bfloat16 before
    scale = _fp8.views(rows)[1].repeat_interleave(128, -1)
    allowed = torch.maximum(expected.abs() / 16, scale * 2.0**-10) + expected.abs() * 2.0**-8 + 1e-6
    assert (error <= allowed).all()
    assert_close(read(rows)[:, 512:], rope64(kv_a[kept, 512:], cos[kept], sin[kept]), ROUNDED[torch.bfloat16], "pe")
    untouched = torch.ones(cache.shape[0] * cache.shape[1], dtype=torch.bool)
    untouched[slots[kept]] = False
    assert (cache.flatten(0, 1)[untouched] == 255).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("tokens, page_size", [(5, 64), (37, 16), (1, 1), (9, 128)])
def test_append(tokens, page_size, strided, dtype):
    args = append_fp8_inputs(tokens, page_size, dtype, pages=-(-tokens // page_size) + 2, strided=strided)
    assert ops.latent_append_fp8(*args, 1e-5) is None
    check_rows(args)


def test_append_gives_the_bytes_of_quantised_bfloat16_rows():
    """Those of latent_append's own row, and of latent_quantize's of it."""
    kv_a, weight, cos, sin, slots, cache = append_fp8_inputs(20, 16, torch.bfloat16)
    plain, expected = torch.zeros(3, 16, 576, dtype=torch.bfloat16), cache.clone()
    ops.latent_append(kv_a, weight, cos, sin, slots, plain)
    rows = rows_of(plain, slots)
    ops.latent_append_fp8(kv_a, weight, cos, sin, slots, cache)
    assert torch.equal(rows_of(cache, slots), bytes_of(rows[:, :512], rows[:, 512:]))
    ops.latent_quantize(rows[:, :512], rows[:, 512:], slots, expected)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=name_of)
def test_append_rounds_to_bfloat16_once(dtype):
    """From the normalised value, not from one that was rounded to the inputs' dtype."""
    kv_a, weight, cos, sin, slots, cache = append_fp8_inputs(40, 16, dtype)
    ops.latent_append_fp8(kv_a, weight, cos, sin, slots, cache)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    latent = ops.rms_norm.reference(kv_a[:, :512].to(wide), weight.to(wide)).bfloat16()
    pe = ops.rope.reference(kv_a[:, None, 512:].to(wide), cos, sin)[:, 0]
    assert torch.equal(rows_of(cache, slots), bytes_of(latent, pe))


@pytest.mark.parametrize("skipped", [[0], [4], [1, 2], [0, 1, 2, 3, 4]], ids=str)
def test_append_skips_slot_minus_one(skipped):
    args = list(append_fp8_inputs(5, 16, torch.bfloat16))
    args[4] = torch.tensor([20, 47, 3, 0, 16])  # both ends of the cache
    args[4][skipped] = -1
    args[0][skipped] = float("nan")  # what is skipped is not looked at
    ops.latent_append_fp8(*args, 1e-5)
    check_rows(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 20])
def test_append_rotates_queries_where_they_are(heads, dtype):
    """The same cache as without them, the same bits as rope; skipped tokens' too; their other columns stay."""
    kv_a, weight, cos, sin, slots, cache = append_fp8_inputs(5, 16, dtype, strided=True)
    slots[3] = -1
    q, expected = torch.randn(5, heads, 192).to(dtype), cache.clone()
    before = q.clone()
    ops.latent_append_fp8(kv_a, weight, cos, sin, slots, expected, 1e-5)
    assert ops.latent_append_fp8(kv_a, weight, cos, sin, slots, cache, 1e-5, q[..., 128:]) is None
    assert torch.equal(cache, expected)
    assert torch.equal(q[..., 128:], ops.rope(before[..., 128:], cos, sin))
    assert torch.equal(q[..., :128], before[..., :128])
    assert_close(q[..., 128:], rope64(before[..., 128:], cos, sin), ROUNDED[dtype])


def test_append_of_bad_slots_leaves_the_queries():
    kv_a, weight, cos, sin, slots, cache = append_fp8_inputs(5, 16, torch.float32)
    q_pe = torch.randn(5, 2, 64)
    before, slots[4] = q_pe.clone(), 48
    with pytest.raises(ValueError, match="slots must be"):
        ops.latent_append_fp8(kv_a, weight, cos, sin, slots, cache, 1e-6, q_pe)
    assert torch.equal(q_pe, before) and (cache == 255).all()


def test_append_of_no_tokens_with_queries():
    args = append_fp8_inputs(0, 16, torch.float32)
    ops.latent_append_fp8(*args, 1e-6, torch.empty(0, 2, 64))
    assert (args[-1] == 255).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_float8_cache_is_the_same_bytes(name):
    """FlashMLA's own element type, and one layer of a larger storage: its neighbours stay."""
    args = arguments(name, torch.bfloat16)
    at = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dtype == torch.uint8)
    layers = nothing(3 * 3, 16).view(3, 3, 16, 656).view(torch.float8_e4m3fn)
    layers[1].view(torch.uint8).copy_(args[at])
    result = getattr(ops, name)(*args)
    again = getattr(ops, name)(*args[:at], layers[1], *args[at + 1 :])
    assert (result is None and again is None) or torch.equal(result, again)
    assert torch.equal(layers[1].view(torch.uint8), args[at])
    assert (layers[[0, 2]].view(torch.uint8) == 255).all()


# latent_quantize


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("tokens, page_size", [(5, 64), (37, 16), (1, 1), (9, 128)])
def test_quantize(tokens, page_size, strided, dtype):
    pages = -(-tokens // page_size) + 2
    latent, pe, slots, cache = quantize_inputs(tokens, page_size, dtype, pages, strided)
    slots[0] = -1
    expected = cache.clone()
    expected.flatten(0, 1)[slots[1:]] = bytes_of(latent[1:], pe[1:])
    assert ops.latent_quantize(latent, pe, slots, cache) is None
    assert torch.equal(cache, expected)


def test_nothing_is_written_of_no_tokens_or_of_bad_slots():
    for name, make in (("latent_append_fp8", append_fp8_inputs), ("latent_quantize", quantize_inputs)):
        args = make(0, 16, torch.float32)
        getattr(ops, name)(*args)
        assert (args[-1] == 255).all()
        args = make(5, 16, torch.float32)
        args[-2][4] = 48
        with pytest.raises(ValueError, match=f"{name}: slots must be -1 or below 48"):
            getattr(ops, name)(*args)
        assert (args[-1] == 255).all()


# latent_dequantize


def codes_as_values(scale=1.0):
    """(a cache whose four tokens hold every code, float8's own reading of it)."""
    cache = torch.zeros(2, 2, 656, dtype=torch.uint8)
    codes, scales, pe = _fp8.views(cache)
    codes.copy_(torch.arange(256, dtype=torch.uint8).repeat(8).view(2, 2, 512))
    scales.fill_(scale)
    pe.copy_(torch.randn(2, 2, 64))
    values = codes.view(torch.float8_e4m3fn).double() * scales.double().repeat_interleave(128, -1)
    return cache, torch.cat([values, pe.double()], -1).flatten(0, 1)


@pytest.mark.parametrize("scale", [1.0, 2.0**-13, 3.7])
def test_dequantize_every_code(scale):
    cache, expected = codes_as_values(scale)
    out = ops.latent_dequantize(cache, torch.arange(4), torch.float32)
    assert torch.equal(out.isnan(), expected.isnan()) and int(out[0].isnan().sum()) == 4
    torch.testing.assert_close(out, expected.float(), rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tokens, page_size", [(5, 64), (37, 16), (1, 1), (0, 16)])
def test_dequantize(tokens, page_size, dtype):
    cache, slots, _ = dequantize_inputs(tokens, page_size, dtype, pages=-(-tokens // page_size) + 2)
    out = ops.latent_dequantize(cache, slots, dtype)
    assert out.dtype == dtype and out.shape == (tokens, 576) and out.is_contiguous()
    assert torch.equal(out, read(rows_of(cache, slots), dtype))
    if dtype == torch.bfloat16:
        assert torch.equal(ops.latent_dequantize(cache, slots), out)


def test_dequantize_gathers_in_any_order_and_gives_zeros_for_minus_one():
    cache, *_ = dequantize_inputs(3, 16, torch.bfloat16)
    slots = torch.tensor([47, 5, -1, 5, 0, -1])
    out = ops.latent_dequantize(cache, slots)
    kept = slots >= 0
    assert torch.equal(out[kept], read(rows_of(cache, slots[kept]), torch.bfloat16))
    assert (out[~kept] == 0).all()
    assert (ops.latent_dequantize(nothing(1, 16), torch.tensor([-1, -1])) == 0).all()


def test_what_is_written_is_read_exactly():
    """Scales that are powers of two lose nothing in bfloat16; a second round changes nothing."""
    latent, pe, slots, cache = quantize_inputs(20, 16, torch.bfloat16)
    ops.latent_quantize(latent, pe, slots, cache)
    rows = ops.latent_dequantize(cache, slots)
    assert torch.equal(rows.double(), read(rows_of(cache, slots)))
    again = nothing(3, 16)
    ops.latent_quantize(rows[:, :512], rows[:, 512:], slots, again)
    assert torch.equal(ops.latent_dequantize(again, slots), rows)


# Refusals; the message names the op and the argument

CACHE = [
    ("cache", flat, ValueError, "[pages, page_size, 656]"),
    ("cache", lambda t: t[..., :576].contiguous(), ValueError, "656"),
    ("cache", lambda t: t[:, :12].contiguous(), ValueError, "power of two, got 12"),
    ("cache", lambda t: t[:, ::2], ValueError, "contiguous"),
    ("cache", cast(torch.bfloat16), TypeError, "bfloat16"),
    ("cache", lambda t: t.view(torch.int8), TypeError, "int8"),
    ("cache", meta, ValueError, "meta"),
    ("cache", lambda t: None, TypeError, "NoneType"),
    (
        "cache",
        lambda t: torch.empty(t.numel() + 2, dtype=t.dtype)[2:].view(t.shape),
        ValueError,
        "multiple of 4 bytes, for its float32 scales, and begins at byte 2",
    ),
]
SLOTS = [
    ("slots", one_more, ValueError, "[1, 3]"),
    ("slots", cast(torch.int32), TypeError, "int64"),
    ("slots", meta, ValueError, "meta"),
    ("slots", lambda t: torch.tensor([0, 32, 1]), ValueError, "32"),
    ("slots", lambda t: torch.tensor([0, 1, -2]), ValueError, "-2"),
    ("slots", lambda t: [0, 1, 2], TypeError, "list"),
]
BAD = [
    *[(name, *bad) for name in NAMES for bad in (*CACHE, *SLOTS)],
    ("latent_append_fp8", "kv_a", one_more, ValueError, "[1, 3, 576]"),
    ("latent_append_fp8", "kv_a", lambda t: t[:, :575], ValueError, "576"),
    ("latent_append_fp8", "kv_a", cast(torch.int64), TypeError, "int64"),
    ("latent_append_fp8", "weight", one_more, ValueError, "[512]"),
    ("latent_append_fp8", "weight", lambda t: t[:256], ValueError, "512"),
    ("latent_append_fp8", "weight", cast(torch.float16), TypeError, "float16"),
    ("latent_append_fp8", "weight", meta, ValueError, "meta"),
    ("latent_append_fp8", "cos", lambda t: t[:2], ValueError, "3"),
    ("latent_append_fp8", "cos", cast(torch.float64), TypeError, "float32"),
    ("latent_append_fp8", "sin", flat, ValueError, "[96]"),
    ("latent_append_fp8", "sin", meta, ValueError, "meta"),
    ("latent_append_fp8", "slots", longer(0), ValueError, "3"),
    ("latent_append_fp8", "eps", lambda t: "small", TypeError, "small"),
    *[("latent_append_fp8", *bad) for bad in QUERIES],
    # A width that latent_append takes
    ("latent_append_fp8", "q_pe", is_(torch.zeros(3, 2, 32)), ValueError, "64"),
    ("latent_quantize", "latent", one_more, ValueError, "[1, 3, 512]"),
    ("latent_quantize", "latent", lambda t: t[:, :256], ValueError, "512"),
    ("latent_quantize", "latent", cast(torch.int8), TypeError, "int8"),
    ("latent_quantize", "pe", flat, ValueError, "[192]"),
    ("latent_quantize", "pe", longer(0), ValueError, "3"),
    ("latent_quantize", "pe", lambda t: t[:, :32], ValueError, "64"),
    ("latent_quantize", "pe", cast(torch.bfloat16), TypeError, "bfloat16"),
    ("latent_quantize", "pe", meta, ValueError, "meta"),
    ("latent_quantize", "slots", longer(0), ValueError, "3"),
    ("latent_dequantize", "dtype", lambda t: torch.int32, TypeError, "int32"),
    ("latent_dequantize", "dtype", lambda t: torch.float8_e4m3fn, TypeError, "float8_e4m3fn"),
]


@pytest.mark.parametrize("name, argument, change, error, words", BAD, ids=[f"{b[0]}-{b[1]}-{b[4]}" for b in BAD])
def test_a_bad_argument_is_named_and_nothing_is_written(name, argument, change, error, words):
    any_op.test_a_bad_argument_is_named_and_nothing_is_written(name, argument, change, error, words)
    any_op.test_explain_refuses_what_shapes_show_to_be_bad(name, argument, change, error, words)


def test_the_launch_takes_shapes_alone():
    """Meta tensors: how a large cache is asked for on a small machine."""
    for name in NAMES:
        args = ops.get(name).example(META, torch.bfloat16, tokens=7)
        result = getattr(ops, name)(*args)
        assert result is None or (result.shape, result.dtype) == ((7, 576), torch.bfloat16)
