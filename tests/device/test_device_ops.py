"""rms_norm, rope and the appends on the device against float64, and against each other."""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import assert_close
from tests.device.on_device import DTYPES, NAN, check_rounded, on, pick, run
from tests.test_latent_fp8 import FLIPPED, append_fp8_inputs, read
from tests.test_ops import HALF, ROPE_VIEWS, append_inputs, name_of, norm64, rope64, turns

pytestmark = pytest.mark.device
SIZES = [(512, 64), (256, 32)]


def check_norm(device, x, weight, eps=1e-6):
    out = run(ops.rms_norm, *on(device, (x, weight)), eps)
    assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    check_rounded(out, norm64(x, weight, eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [1, 2, 32, 100, 512, 1536, 7168, 16384])
def test_norm_of_widths(device, width, dtype):
    """Powers of two and others, whose tile is wider than the row."""
    check_norm(device, torch.randn(pick(300, 3), width).to(dtype), torch.randn(width).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:515],  # as kv_a's latent: a larger row stride, an odd place
        lambda x: x[:, 1::2],
        lambda x: x[::2],
        lambda x: x.t(),
        lambda x: x.view(3, 2, 1024)[:, :, :100],
        lambda x: x[0],
    ],
    ids=["columns", "every second column", "every second row", "transposed", "three dimensions", "a vector"],
)
def test_norm_of_strided_input(device, view, dtype):
    x = view(torch.randn(6, 1024).to(dtype))
    check_norm(device, x, torch.randn(2 * x.shape[-1]).to(dtype)[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_norm_of_odd_rows(device, dtype):
    """Tiny ones are governed by eps; the squares of large ones are past float16; NaN stays in its row; no rows."""
    weight = torch.randn(512).to(dtype)
    check_norm(device, (torch.randn(2, 512) * 1e-3).to(dtype), weight, 1e-2)
    check_norm(device, torch.full((2, 2048), 300.0, dtype=dtype), torch.ones(2048, dtype=dtype))
    assert not run(ops.rms_norm, *on(device, (torch.zeros(2, 512, dtype=dtype), weight))).any()
    assert run(ops.rms_norm, *on(device, (torch.zeros(0, 512, dtype=dtype), weight))).shape == (0, 512)
    x = torch.randn(3, 512).to(dtype)
    x[1, 7] = NAN
    out = run(ops.rms_norm, *on(device, (x, weight))).cpu()
    assert out[1].isnan().all()
    check_rounded(out[[0, 2]], norm64(x[[0, 2]], weight, 1e-6))


def check_rope(device, x, cos, sin):
    out = run(ops.rope, *on(device, (x, cos, sin)))
    assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    check_rounded(out, rope64(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 63, 64, 128])
def test_rope_of_heads(device, heads, width, dtype):
    check_rope(device, torch.randn(pick(300, 3), heads, width).to(dtype), *turns(pick(300, 3), width))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [192, 193])
@pytest.mark.parametrize("view", ROPE_VIEWS.values(), ids=ROPE_VIEWS)
def test_rope_of_strided_input(device, view, width, dtype):
    """A head of 193 columns makes all strides odd."""
    x = view(torch.randn(4, 9, width).to(dtype))
    x = x[..., :64] if x.shape[-1] > 64 else x
    table = torch.randn(2 * len(x), 64)[::2]  # cos and sin are halves of one table, and every second row
    check_rope(device, x, table[:, :32], table[:, 32:])


@pytest.mark.parametrize("shape", [(0, 16, 64), (3, 0, 64)], ids=str)
def test_rope_of_nothing(device, shape):
    assert run(ops.rope, *on(device, (torch.empty(shape), *turns(shape[0], 64)))).shape == shape


def check_append(device, args):
    """Rows of slots are right, all others keep their NaN, the inputs stay. The eps is not the default."""
    kv_a, weight, cos, sin, slots, cache = args
    latent = weight.shape[0]
    given = on(device, args)
    assert run(ops.latent_append, *given, 1e-5) is None
    for value, before in zip(given[:5], args):
        torch.testing.assert_close(value.cpu(), before, rtol=0, atol=0, equal_nan=True)
    flat = given[5].cpu().view(-1, cache.shape[2])
    kept = slots >= 0
    rows, source = flat[slots[kept]], kv_a[kept]
    check_rounded(rows[:, :latent], norm64(source[:, :latent], weight, 1e-5), "latent")
    check_rounded(rows[:, latent:], rope64(source[:, latent:], cos[kept], sin[kept]), "pe")
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[slots[kept]] = False
    assert flat[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("latent, rope", SIZES, ids=str)
@pytest.mark.parametrize("tokens, page_size", [(300, 64), (21, 16), (9, 128), (7, 2), (5, 32)])
def test_append_of_rows(device, tokens, page_size, latent, rope, strided, dtype):
    tokens = pick(tokens, min(tokens, 21))
    pages = -(-tokens // page_size) + 2
    check_append(device, append_inputs(tokens, page_size, dtype, latent, rope, pages, strided))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_append_at_both_sides_of_every_page_border(device, dtype):
    args = list(append_inputs(6, 64, dtype))
    args[4] = torch.tensor([0, 63, 64, 127, 128, 191])
    check_append(device, args)


@pytest.mark.parametrize("skipped", [[0], [4], [1, 2], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_append_skips_slot_minus_one(device, dtype, skipped):
    args = list(append_inputs(5, 16, dtype))
    args[4] = torch.tensor([20, 47, 3, 0, 16])  # both ends of the cache
    args[4][skipped] = -1
    args[0][skipped] = NAN
    given = on(device, args)
    run(ops.latent_append, *given, 1e-5)
    kept = [t for t in range(5) if t not in skipped]
    flat = given[5].cpu().view(-1, 576)
    assert flat.isnan().all(-1).sum() == len(flat) - len(kept)
    check_rounded(flat[args[4][kept], :512], norm64(args[0][kept, :512], args[1], 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_append_to_one_layer_of_a_larger_storage(device, dtype):
    """Its neighbours stay."""
    kv_a, weight, cos, sin, slots, _ = append_inputs(5, 16, dtype)
    layers = torch.full((3, 3, 16, 576), NAN, dtype=dtype, device=device)
    run(ops.latent_append, *on(device, (kv_a, weight, cos, sin, slots)), layers[1], 1e-6)
    assert layers[[0, 2]].isnan().all() and int((~layers[1].isnan()).all(-1).sum()) == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_append_of_strided_arguments(device, dtype):
    """kv_a as columns of a fused projection and as every second row; slots, weight and cos with gaps."""
    kv_a, weight, _, _, slots, cache = append_inputs(6, 16, dtype)
    wide = torch.full((12, 1536 + 576 + 3), NAN, dtype=dtype)
    wide[::2, 1536:2112] = kv_a
    cos, sin = torch.stack(turns(6, 64), -1).unbind(-1)
    weight = torch.stack([weight, torch.full_like(weight, NAN)], -1)[:, 0]
    slots = torch.stack([slots, torch.full_like(slots, -5)], -1)[:, 0]
    check_append(device, (wide[::2, 1536:2112], weight, cos, sin, slots, cache))


def test_append_of_nothing(device):
    args = on(device, append_inputs(0, 16, torch.float32))
    run(ops.latent_append, *args)
    assert args[5].isnan().all()


def units(value, other, size):
    """The largest difference in units in the last place of `size`."""
    finfo = torch.finfo(value.dtype)
    _, exponent = torch.frexp(size.double().clamp(min=finfo.smallest_normal))
    return ((value.double() - other.double()).abs() / (finfo.eps * torch.exp2(exponent - 1.0).double())).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("latent, rope", SIZES, ids=str)
def test_append_is_within_2_ulp_of_the_separate_kernels(device, latent, rope, dtype):
    """Compilers may fuse a product into a sum in one kernel and not in the other. Of a turned pair both members come
    from numbers as large as the larger one: there the unit is that one's."""
    tokens = pick(1000, 9)
    kv_a, weight, cos, sin, slots, cache = args = on(
        device, append_inputs(tokens, 64, dtype, latent, rope, tokens // 64 + 3, strided=True)
    )
    run(ops.latent_append, *args, 1e-6)
    rows = cache.view(-1, latent + rope)[slots].cpu()
    norm = run(ops.rms_norm, kv_a[:, :latent], weight, 1e-6).cpu()
    assert units(rows[:, :latent], norm, norm.abs()) <= 2
    turned = run(ops.rope, kv_a[:, None, latent:], cos, sin)[:, 0].cpu()
    larger = turned.abs().unflatten(-1, (-1, 2)).amax(-1, keepdim=True).expand(-1, -1, 2).flatten(1)
    assert units(rows[:, latent:], turned, larger) <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("latent, rope", SIZES, ids=str)
@pytest.mark.parametrize("heads", pick([1, 3, 16, 63, 128], [3, 20]))
def test_append_with_queries_is_within_2_ulp_of_both_apart(device, heads, latent, rope, dtype):
    """Rotated where they are, beside columns that stay; twice the same bits."""
    tokens = pick(300, 5)
    args = append_inputs(tokens, 64, dtype, latent, rope, tokens // 64 + 3)
    q = torch.randn(tokens, heads, 3 * rope).to(dtype)
    apart = on(device, args)
    run(ops.latent_append, *apart, 1e-6)
    turned = run(ops.rope, on(device, [q])[0][..., rope : 2 * rope], apart[2], apart[3]).cpu()
    seen = []
    for _ in range(2):
        given, (mine,) = on(device, args), on(device, [q])
        run(ops.latent_append, *given, 1e-6, mine[..., rope : 2 * rope])
        seen.append((given[5].cpu(), mine.cpu()))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0, equal_nan=True)
    cache, mine = seen[0]
    expected = apart[5].cpu()
    assert torch.equal(cache.isnan(), expected.isnan())
    cache, expected = cache.nan_to_num(0), expected.nan_to_num(0)
    assert units(cache[..., :latent], expected[..., :latent], expected[..., :latent].abs()) <= 2
    larger = expected[..., latent:].abs().unflatten(-1, (-1, 2)).amax(-1, keepdim=True).expand(-1, -1, -1, 2).flatten(2)
    assert units(cache[..., latent:], expected[..., latent:], larger) <= 2
    larger = turned.abs().unflatten(-1, (-1, 2)).amax(-1, keepdim=True).expand(-1, -1, -1, 2).flatten(2)
    assert units(mine[..., rope : 2 * rope], turned, larger) <= 2
    assert torch.equal(mine[..., :rope], q[..., :rope]) and torch.equal(mine[..., 2 * rope :], q[..., 2 * rope :])


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_the_unit_in_the_last_place(dtype):
    """Of the measure above: neighbours are one apart, whatever their size."""
    for x in torch.tensor([1.0, 1.5, 3.25e-3, 700.0]).to(dtype):
        after = torch.nextafter(x, torch.tensor(torch.inf, dtype=dtype))
        assert units(x[None], after[None], x[None]) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", pick([1, 3, 16, 63, 128], [3, 20]))
def test_append_fp8_with_queries_is_as_both_apart(device, heads, dtype):
    """Of the cache all but codes that a rounding moved, of the queries all but 2 ulp; twice the same bits."""
    tokens = pick(300, 5)
    args = append_fp8_inputs(tokens, 64, dtype, tokens // 64 + 3, strided=True)
    args[4][-1] = -1
    q = torch.randn(tokens, heads, 192).to(dtype)
    apart = on(device, args)
    run(ops.latent_append_fp8, *apart, 1e-6)
    turned = run(ops.rope, on(device, [q])[0][..., 64:128], apart[2], apart[3]).cpu()
    seen = []
    for _ in range(2):
        given, (mine,) = on(device, args), on(device, [q])
        run(ops.latent_append_fp8, *given, 1e-6, mine[..., 64:128])
        seen.append((given[5].cpu(), mine.cpu()))
    assert all(torch.equal(once, again) for once, again in zip(*seen))
    cache, mine = seen[0]
    value, expected = read(cache), read(apart[5].cpu())
    assert torch.equal(value.isnan(), expected.isnan())
    assert_close(value.nan_to_num(0), expected.nan_to_num(0), FLIPPED)
    larger = turned.abs().unflatten(-1, (-1, 2)).amax(-1, keepdim=True).expand(-1, -1, -1, 2).flatten(2)
    assert units(mine[..., 64:128], turned, larger) <= 2
    assert torch.equal(mine[..., :64], q[..., :64]) and torch.equal(mine[..., 128:], q[..., 128:])
