"""The kernels on FlashMLA's fp8 cache: the bytes of the PyTorch reference, without any float8 in them."""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.ops import _fp8
from ntops_mla.testing import assert_close
from tests.interpreted.numerics import DTYPES, by_kernel
from tests.test_latent_fp8 import (
    FLIPPED,
    NAMES,
    append_fp8_inputs,
    arguments,
    bytes_of,
    check_rows,
    codes_as_values,
    dequantize_inputs,
    nothing,
    quantize_inputs,
    read,
    rows_of,
)
from tests.test_ops import ROUNDED, clones, name_of, rope64

PAGES = [(5, 64), (21, 16), (1, 1), (9, 128), (7, 2)]


def check_bytes(latent, pe, slots, cache):
    """The kernel's are the reference's, and nothing else is written."""
    expected = cache.clone()
    kept = slots >= 0
    expected.flatten(0, 1)[slots[kept]] = bytes_of(latent[kept], pe[kept])
    assert by_kernel(ops.latent_quantize, latent, pe, slots, cache) is None
    assert torch.equal(cache, expected)


# latent_quantize


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("tokens, page_size", PAGES)
def test_quantize(tokens, page_size, strided, dtype):
    check_bytes(*quantize_inputs(tokens, page_size, dtype, -(-tokens // page_size) + 2, strided))


def test_quantize_values_of_every_size():
    """From float32's subnormal numbers, where the scale stays at its least, to its largest."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    latent = (2.0 ** exponents[:, None] * (1 + torch.rand(len(exponents), 512, dtype=torch.float64))).float()
    latent *= torch.randint(0, 2, latent.shape) * 2 - 1
    latent[::3] *= torch.logspace(0, -3, 512)
    check_bytes(latent, torch.randn(len(latent), 64), torch.arange(len(latent)), nothing(18, 16))


def test_quantize_rounds_to_the_nearest_code():
    """Every value there is, what lies half-way between two, and their neighbours; a group's largest is 448 and so its
    scale is 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, between, *(torch.nextafter(between, torch.tensor(v)) for v in (0.0, 1e9))])
    values = torch.cat([values, -values])
    latent = torch.zeros(4, 4, 128)
    latent[..., 0] = 448
    groups = latent.flatten(0, 1)
    for index, part in enumerate(values.split(127)):
        groups[index, 1 : 1 + len(part)] = part
    check_bytes(latent.flatten(1), torch.randn(4, 64), torch.arange(4), nothing(1, 16))
    cache = nothing(1, 16)
    by_kernel(ops.latent_quantize, latent.flatten(1), torch.randn(4, 64), torch.arange(4), cache)
    assert (_fp8.views(cache)[1][0, :4] == 1).all()


def test_quantize_scales_at_their_steps():
    """A largest column of 448 times a power of two takes that power; the next number after it takes twice as much."""
    largest = 448 * 2.0 ** torch.arange(-16, 16).float()
    latent = torch.zeros(32, 4, 128)
    latent[:, 0, 5], latent[:, 1, 7] = largest, -largest
    latent[:, 2, 0] = torch.nextafter(largest, torch.tensor(1e9))
    latent[:, 3, 127] = torch.nextafter(largest, torch.tensor(0.0))
    cache = nothing(2, 16)
    check_bytes(latent.flatten(1), torch.randn(32, 64), torch.arange(32), cache)
    power = (largest / 448).clamp_min(2.0**-13)
    expected = torch.stack([power, power, torch.where(largest / 448 < 2.0**-13, power, 2 * power), power], -1)
    assert torch.equal(_fp8.views(cache)[1].flatten(0, 1), expected)


def test_quantize_zeros_of_both_signs():
    latent = torch.zeros(2, 512)
    latent[1] = -0.0
    cache = nothing(1, 2)
    check_bytes(latent, torch.zeros(2, 64), torch.arange(2), cache)
    assert (cache[0, 0, :512] == 0).all() and (cache[0, 1, :512] == 0x80).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_quantize_does_not_hide_what_is_not_finite(value):
    latent = torch.randn(1, 512)
    latent[0, 200] = value
    latent.view(torch.int32)[0, 300] = 0x7FFFFFFF  # the NaN that NVIDIA's arithmetic makes
    cache = nothing(1, 2)
    by_kernel(ops.latent_quantize, latent, torch.randn(1, 64), torch.tensor([1]), cache)
    row = read(cache)[0, 1]
    assert row[[200, 300]].isnan().all() and not row[:128].isnan().any()


@pytest.mark.parametrize("skipped", [[0], [1, 2], [0, 1, 2, 3, 4]], ids=str)
def test_quantize_skips_slot_minus_one(skipped):
    latent, pe, slots, cache = quantize_inputs(5, 16, torch.bfloat16)
    slots[skipped] = -1
    latent[skipped] = float("nan")
    check_bytes(latent, pe, slots, cache)


# latent_append_fp8


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("tokens, page_size", PAGES)
def test_append(tokens, page_size, strided, dtype):
    args = append_fp8_inputs(tokens, page_size, dtype, -(-tokens // page_size) + 2, strided)
    assert by_kernel(ops.latent_append_fp8, *args, 1e-5) is None
    check_rows(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_append_gives_the_bytes_of_the_separate_kernels(dtype):
    """Of latent_append's in float32, rounded to bfloat16; of bfloat16 that is its own row."""
    kv_a, weight, cos, sin, slots, cache = append_fp8_inputs(9, 16, dtype, strided=True)
    by_kernel(ops.latent_append_fp8, kv_a, weight, cos, sin, slots, cache)
    wide = torch.float32 if dtype != torch.bfloat16 else dtype
    plain = torch.zeros(3, 16, 576, dtype=wide)
    by_kernel(ops.latent_append, kv_a.to(wide), weight.to(wide), cos, sin, slots, plain)
    rows = rows_of(plain, slots).bfloat16()
    assert torch.equal(rows_of(cache, slots), bytes_of(rows[:, :512], rows[:, 512:]))
    again = nothing(3, 16)
    by_kernel(ops.latent_quantize, rows[:, :512], rows[:, 512:], slots, again)
    assert torch.equal(again, cache)


@pytest.mark.parametrize("skipped", [[0], [1, 2], [0, 1, 2, 3, 4]], ids=str)
def test_append_skips_slot_minus_one(skipped):
    args = list(append_fp8_inputs(5, 16, torch.bfloat16))
    args[4] = torch.tensor([20, 47, 3, 0, 16])  # both ends of the cache
    args[4][skipped] = -1
    args[0][skipped] = float("nan")
    by_kernel(ops.latent_append_fp8, *args, 1e-5)
    check_rows(args)


def test_append_as_the_reference_does():
    args = append_fp8_inputs(17, 16, torch.bfloat16)
    expected = clones(args)
    by_kernel(ops.latent_append_fp8, *args)
    ops.latent_append_fp8.reference(*expected)
    value, wanted = read(args[5]), read(expected[5])
    assert torch.equal(value.isnan(), wanted.isnan())
    assert_close(value.nan_to_num(0), wanted.nan_to_num(0), FLIPPED)


def test_append_does_not_hide_nan():
    """Nor one whose bits an integer's sum would carry into the sign."""
    args = append_fp8_inputs(2, 16, torch.float32)
    args[0].view(torch.int32)[0, 300] = 0x7FFFFFFF
    args[0][1, 540] = float("nan")
    by_kernel(ops.latent_append_fp8, *args)
    rows = read(rows_of(args[5], args[4]))
    assert rows[0, :512].isnan().all() and rows[1, 540:542].isnan().all()
    assert not rows[1, :512].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tokens, heads, page_size", [(5, 1, 16), (3, 8, 64), (2, 20, 1), (1, 128, 128)])
def test_append_with_queries_in_the_same_launch(tokens, heads, page_size, dtype, launches):
    """The cache as without them; rotated where they are, with the same bits as rope's own kernel, skipped tokens' too;
    the columns beside them stay."""
    kv_a, weight, cos, sin, slots, cache = append_fp8_inputs(tokens, page_size, dtype, tokens + 1, strided=True)
    slots[0] = slots[0] if tokens == 1 else -1
    q = torch.full((tokens, heads, 192), float("nan"), dtype=dtype)
    q[..., 64:128] = torch.randn(tokens, heads, 64).to(dtype)
    q_pe = q[..., 64:128]
    expected, before = cache.clone(), q_pe.clone()
    by_kernel(ops.latent_append_fp8, kv_a, weight, cos, sin, slots, expected, 1e-5)
    turned = by_kernel(ops.rope, before, cos, sin)
    launches.clear()
    assert by_kernel(ops.latent_append_fp8, kv_a, weight, cos, sin, slots, cache, 1e-5, q_pe) is None
    assert [name for name, _ in launches] == ["latent_append_fp8_rope"]
    assert launches[0][1][-2:] == (dtype, dtype)
    assert torch.equal(cache, expected)
    check_rows((kv_a, weight, cos, sin, slots, cache))
    assert torch.equal(q_pe, turned)
    assert_close(q_pe, rope64(before, cos, sin), ROUNDED[dtype], "q_pe")
    assert q[..., :64].isnan().all() and q[..., 128:].isnan().all()


@pytest.mark.parametrize(
    "shape, view",
    [
        ((64, 5, 3), lambda q: q.permute(1, 2, 0)[1:]),  # columns apart, heads side by side
        ((4, 11, 64), lambda q: q[:, 1::2]),
        ((20, 4, 64), lambda q: q.transpose(0, 1)),
    ],
    ids=["columns apart", "every second head", "heads first"],
)
def test_append_with_queries_of_any_strides(shape, view):
    """And every token skipped: of the cache nothing is written then."""
    kv_a, weight, cos, sin, slots, cache = append_fp8_inputs(4, 16, torch.float32)
    base = torch.full(shape, float("nan"))
    q_pe = view(base)
    q_pe.copy_(torch.randn(q_pe.shape))
    others, before = base.isnan(), q_pe.clone()
    slots.fill_(-1)
    kv_a.fill_(float("nan"))
    by_kernel(ops.latent_append_fp8, kv_a, weight, cos, sin, slots, cache, 1e-6, q_pe)
    assert (cache == 255).all()
    assert torch.equal(q_pe, by_kernel(ops.rope, before, cos, sin))
    assert torch.equal(base.isnan(), others)


def test_append_hides_nan_of_neither_part():
    """NaN of a latent does not reach the queries, nor one of a query the cache or another head."""
    args = append_fp8_inputs(2, 16, torch.float32)
    q_pe = torch.randn(2, 3, 64)
    args[0][0, 300] = float("nan")
    q_pe[1, 2, 8] = float("nan")
    by_kernel(ops.latent_append_fp8, *args, 1e-6, q_pe)
    rows = read(rows_of(args[5], args[4]))
    assert rows[0, :512].isnan().all() and not rows[0, 512:].isnan().any() and not rows[1].isnan().any()
    assert q_pe[1, 2, 8:10].isnan().all() and int(q_pe.isnan().sum()) == 2


def test_queries_without_heads(launches):
    """The cache is written all the same."""
    args = append_fp8_inputs(3, 16, torch.float32)
    by_kernel(ops.latent_append_fp8, *args, 1e-5, torch.empty(3, 0, 64))
    assert [name for name, _ in launches] == ["latent_append_fp8"]
    check_rows(args)


# latent_dequantize


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [1.0, 2.0**-13, 3.7])
def test_dequantize_every_code(scale, dtype):
    """All 256, NaN too, of scales that are powers of two and of others."""
    cache, expected = codes_as_values(scale)
    out = by_kernel(ops.latent_dequantize, cache, torch.arange(4), dtype)
    # The product in float32, rounded once more
    torch.testing.assert_close(out, expected.float().to(dtype), rtol=0, atol=0, equal_nan=True)
    assert int(out[0].isnan().sum()) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tokens, page_size", PAGES)
def test_dequantize(tokens, page_size, dtype):
    cache, slots, _ = dequantize_inputs(tokens, page_size, dtype, -(-tokens // page_size) + 2)
    slots = torch.stack([slots, torch.full_like(slots, -5)], -1)[:, 0]
    out = by_kernel(ops.latent_dequantize, cache, slots, dtype)
    assert torch.equal(out, read(rows_of(cache, slots), dtype))


def test_dequantize_gives_zeros_for_minus_one():
    cache, *_ = dequantize_inputs(3, 16, torch.bfloat16)
    slots = torch.tensor([47, 5, -1, 5, 0, -1])
    out = by_kernel(ops.latent_dequantize, cache, slots)
    assert torch.equal(out, ops.latent_dequantize.reference(cache, slots))
    assert (by_kernel(ops.latent_dequantize, nothing(1, 16), torch.tensor([-1, -1])) == 0).all()


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_one_launch_of_the_cache_as_it_is(name, launches):
    args = arguments(name, torch.float16)
    by_kernel(getattr(ops, name), *args)
    assert [kernel for kernel, _ in launches] == [name]
    dtypes = launches[0][1]
    cache = (torch.uint8, torch.float32, torch.bfloat16)
    at = 0 if name == "latent_dequantize" else -3
    assert dtypes[at : at + 3 or None] == cache and torch.float8_e4m3fn not in dtypes


@pytest.mark.parametrize("name", NAMES)
def test_a_float8_cache_is_the_same_bytes(name):
    args = arguments(name, torch.bfloat16)
    at = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dtype == torch.uint8)
    other = args[at].clone()
    result = by_kernel(getattr(ops, name), *args)
    again = by_kernel(getattr(ops, name), *args[:at], other.view(torch.float8_e4m3fn), *args[at + 1 :])
    assert torch.equal(other, args[at]) and (result is None or torch.equal(result, again))


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name, launches):
    args = arguments(name, torch.float32)
    args = [a[:0] if isinstance(a, torch.Tensor) and len(a) == 5 and a.dtype != torch.uint8 else a for a in args]
    args[0] = args[0] if name == "latent_dequantize" else args[0][:0]
    result = by_kernel(getattr(ops, name), *args)
    assert launches == [] and (result is None or result.shape == (0, 576))


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_cache_of_more_than_2_to_the_31_bytes(page_size, beyond_int32):
    """And in elements of its float32 and bfloat16 parts' strides."""
    pages = 2**31 // (page_size * 656) * 4 + 3
    cache = beyond_int32((pages, page_size, 656), (page_size * 656, 656, 1), torch.uint8)
    latent, pe, *_ = quantize_inputs(3, page_size, torch.float16)
    slots = torch.tensor([pages * page_size - 1, 5, (pages - 1) * page_size])
    by_kernel(ops.latent_quantize, latent, pe, slots, cache)
    assert torch.equal(rows_of(cache, slots), bytes_of(latent, pe))
    rows = by_kernel(ops.latent_dequantize, cache, slots)
    assert torch.equal(rows, read(rows_of(cache, slots), torch.bfloat16))
    kv_a, weight, cos, sin, *_ = append_fp8_inputs(3, page_size, torch.bfloat16)
    by_kernel(ops.latent_append_fp8, kv_a, weight, cos, sin, slots, cache)
    small = nothing(3, page_size)
    by_kernel(ops.latent_append_fp8, kv_a, weight, cos, sin, torch.arange(3), small)
    assert torch.equal(rows_of(cache, slots), rows_of(small, torch.arange(3)))
