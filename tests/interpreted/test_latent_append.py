"""latent_append's kernel against float64, and against the kernels of rms_norm and rope."""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import assert_close
from tests.interpreted.numerics import DTYPES, by_kernel
from tests.test_ops import ROUNDED, append_inputs, name_of, norm64, rope64, turns

SIZES = [(512, 64), (256, 32)]


def check(args):
    """Rows of slots are right, all others keep their NaN. The eps is not the default."""
    kv_a, weight, cos, sin, slots, cache = args
    latent, dtype = weight.shape[0], kv_a.dtype
    assert by_kernel(ops.latent_append, *args, 1e-5) is None
    flat = cache.view(-1, cache.shape[2])
    kept = slots >= 0
    rows, source = flat[slots[kept]], kv_a[kept]
    assert_close(rows[:, :latent], norm64(source[:, :latent], weight, 1e-5), ROUNDED[dtype], "latent")
    assert_close(rows[:, latent:], rope64(source[:, latent:], cos[kept], sin[kept]), ROUNDED[dtype], "pe")
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[slots[kept]] = False
    assert flat[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("latent, rope", SIZES, ids=str)
@pytest.mark.parametrize("tokens, page_size", [(5, 64), (21, 16), (1, 1), (9, 128), (7, 2), (5, 32)])
def test_rows(tokens, page_size, latent, rope, strided, dtype):
    pages = -(-tokens // page_size) + 2
    check(append_inputs(tokens, page_size, dtype, latent, rope, pages, strided))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("latent, rope", SIZES, ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
def test_both_sides_of_every_page_border(page_size, latent, rope, dtype):
    args = list(append_inputs(6, page_size, dtype, latent, rope))
    p = page_size
    args[4] = torch.tensor([0, p - 1, p, 2 * p - 1, 2 * p, 3 * p - 1])
    check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("latent, rope", SIZES, ids=str)
def test_the_same_bits_as_the_separate_kernels(latent, rope, dtype):
    kv_a, weight, cos, sin, slots, cache = append_inputs(9, 16, dtype, latent, rope, strided=True)
    by_kernel(ops.latent_append, kv_a, weight, cos, sin, slots, cache, 1e-6)
    rows = cache.view(-1, latent + rope)[slots]
    assert torch.equal(rows[:, :latent], by_kernel(ops.rms_norm, kv_a[:, :latent], weight, 1e-6))
    assert torch.equal(rows[:, latent:], by_kernel(ops.rope, kv_a[:, None, latent:], cos, sin)[:, 0])


@pytest.mark.parametrize("skipped", [[0], [4], [1, 2], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_slot_minus_one_is_skipped(dtype, skipped):
    args = list(append_inputs(5, 16, dtype))
    args[4] = torch.tensor([20, 47, 3, 0, 16])  # both ends of the cache
    args[4][skipped] = -1
    args[0][skipped] = float("nan")
    check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_layer_of_a_larger_storage(dtype):
    """Its neighbours stay."""
    kv_a, weight, cos, sin, slots, _ = append_inputs(5, 16, dtype)
    layers = torch.full((3, 3, 16, 576), float("nan"), dtype=dtype)
    check((kv_a, weight, cos, sin, slots, layers[1]))
    assert layers[[0, 2]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strided_arguments(dtype):
    """kv_a as columns of a fused projection and as every second row, slots and cos apart."""
    kv_a, weight, _, _, slots, cache = append_inputs(6, 16, dtype)
    wide = torch.full((12, 1536 + 576 + 3), float("nan"), dtype=dtype)
    wide[::2, 1536:2112] = kv_a
    table = torch.stack(turns(6, 64), -1)
    cos, sin = table.unbind(-1)
    weight = torch.stack([weight, torch.full_like(weight, float("nan"))], -1)[:, 0]
    slots = torch.stack([slots, torch.full_like(slots, -5)], -1)[:, 0]
    check((wide[::2, 1536:2112], weight, cos, sin, slots, cache))


def test_no_tokens(launches):
    args = append_inputs(0, 16, torch.float32)
    by_kernel(ops.latent_append, *args)
    assert args[5].isnan().all() and launches == []


def test_inputs_stay_and_the_kernel_takes_them_as_they_are(launches):
    args = append_inputs(5, 16, torch.bfloat16)
    before = [t.clone() for t in args[:5]]
    check(args)
    assert all(torch.equal(a, b) for a, b in zip(args, before))
    name, dtypes = launches[0]
    assert name == "latent_append" and len(launches) == 1
    assert dtypes == (*[torch.bfloat16] * 3, torch.float32, torch.float32, torch.int64, *[torch.bfloat16] * 2)


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_cache_of_more_than_2_to_the_31_elements(page_size, beyond_int32):
    pages = 2**31 // (page_size * 576) + 3
    kv_a, weight, cos, sin, _, _ = append_inputs(3, page_size, torch.float16)
    cache = beyond_int32((pages, page_size, 576), (page_size * 576, 576, 1), torch.float16)
    slots = torch.tensor([pages * page_size - 1, 5, (pages - 1) * page_size])
    by_kernel(ops.latent_append, kv_a, weight, cos, sin, slots, cache)
    rows = cache.view(-1, 576)[slots]
    assert_close(rows[:, :512], norm64(kv_a[:, :512], weight, 1e-6), ROUNDED[torch.float16])
    assert_close(rows[:, 512:], rope64(kv_a[:, 512:], cos, sin), ROUNDED[torch.float16])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("latent, rope", SIZES, ids=str)
@pytest.mark.parametrize("tokens, heads", [(5, 1), (3, 16), (2, 20), (1, 128)])
def test_queries_in_the_same_launch(tokens, heads, latent, rope, dtype, launches):
    """The cache as without them; rotated where they are, with the same bits as rope's own kernel."""
    kv_a, weight, cos, sin, slots, cache = append_inputs(tokens, 16, dtype, latent, rope)
    slots[0] = -1
    q = torch.randn(tokens, heads, 3 * rope).to(dtype)
    expected, before = cache.clone(), q.clone()
    by_kernel(ops.latent_append, kv_a, weight, cos, sin, slots, expected, 1e-5)
    turned = by_kernel(ops.rope, before[..., 2 * rope :], cos, sin)
    launches.clear()
    by_kernel(ops.latent_append, kv_a, weight, cos, sin, slots, cache, 1e-5, q[..., 2 * rope :])
    assert [name for name, _ in launches] == ["latent_append_rope"]
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q[..., 2 * rope :], turned)
    assert torch.equal(q[..., : 2 * rope], before[..., : 2 * rope])
