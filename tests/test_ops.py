"""Every op on the CPU: its PyTorch reference against float64, its refusals, and its life under torch.library."""

import importlib
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ntops_mla import ops
from ntops_mla.ops import _attention, _rows
from ntops_mla.testing import DECODE_LSE, DECODE_OUT, PREFILL_LSE, PREFILL_OUT, Tolerance, assert_close

ROOT = Path(__file__).resolve().parent.parent
# The functions of ops hide their modules' names.
DECODE = importlib.import_module("ntops_mla.ops._paged")
PREFILL = importlib.import_module("ntops_mla.ops.mla_prefill")

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32, torch.float64)
NAMES = ops.names()


def written(name):
    """The names of the arguments that the op writes to."""
    arguments = getattr(torch.ops.ntops_mla, name).default._schema.arguments
    return [a.name for a in arguments if a.alias_info and a.alias_info.is_write]


def cache_of(name, args):
    """The cache that the op writes to."""
    return args[list(ops.get(name)._signature.parameters).index("cache")]


WRITING = [name for name in NAMES if written(name)]

# An element-wise op computes in float32 and rounds once: half a unit in the last place (2^-8 of the value in bfloat16,
# 2^-11 in float16) and a little float32 noise, which decides about ties and, by cancellation, about small values.
ROUNDED = {
    # half a unit of the value, and float32's noise of a difference of products: they add up
    torch.bfloat16: Tolerance(1e-6, 1.01 * 2**-8, both=True),
    torch.float16: Tolerance(1e-6, 1.01 * 2**-11, both=True),
    torch.float32: Tolerance(1e-6, 1e-6),
    torch.float64: Tolerance(1e-12, 1e-12),
}
# float32 sums of some hundred products in another order than float64's lose about 1e-6 of the scores; the outputs are
# averages of values around 0.1, so 2e-6 is far below what a lost or doubled key changes and far above the noise.
SINGLE = Tolerance(2e-6, 2e-5, 1e-9)
DOUBLE = Tolerance(1e-10, 1e-10, 1e-12)
LSE = Tolerance(2e-6, 2e-6)  # lse is float32, whatever the inputs
DECODE_TOLERANCES = {
    **{dtype: (DECODE_OUT, DECODE_LSE) for dtype in HALF},
    torch.float32: (SINGLE, LSE),
    torch.float64: (DOUBLE, LSE),
}
PREFILL_TOLERANCES = {
    **{dtype: (PREFILL_OUT, PREFILL_LSE) for dtype in HALF},
    torch.float32: (SINGLE, LSE),
    torch.float64: (DOUBLE, LSE),
}

# What an unused entry of a block table may hold.
GARBAGE_PAGE = 2147480000


def small(*shape, dtype):
    """randn / 10 within +-1, as FlashMLA's tests draw them."""
    return (torch.randn(*shape) / 10).clamp_(-1, 1).to(dtype)


def turns(tokens, rope):
    angle = torch.rand(tokens, rope // 2) * 6.3
    return angle.cos(), angle.sin()


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def test_the_ops_are_those_of_the_design():
    assert {"rms_norm", "rope", "latent_append", "mla_decode", "mla_prefill", "mla_sparse"} <= set(NAMES)
    assert {"mla_decode_fp8", "mla_sparse_fp8"} <= set(NAMES)


# rms_norm


def norm64(input, weight, eps):
    x = input.double()
    return x / (x * x).mean(-1, keepdim=True).add(eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 512), (3, 1536), (2, 3, 2048), (2, 7168), (0, 64)], ids=str)
def test_rms_norm(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    out = ops.rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, norm64(x, weight, 1e-6), ROUNDED[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :512], lambda x: x[:, 1::2], lambda x: x[::2], lambda x: x.t(), lambda x: x[None, 3:4]],
    ids=["columns", "every second column", "every second row", "transposed", "one row"],
)
def test_rms_norm_of_strided_input(view, dtype):
    x = view(torch.randn(6, 1024).to(dtype))
    weight = torch.randn(2 * x.shape[-1]).to(dtype)[::2]
    out = ops.rms_norm(x, weight)
    assert out.is_contiguous()
    assert_close(out, norm64(x, weight, 1e-6), ROUNDED[dtype])


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_of_tiny_rows_is_governed_by_eps(eps):
    x, weight = torch.randn(3, 512) * 1e-4, torch.ones(512)
    assert_close(ops.rms_norm(x, weight, eps), norm64(x, weight, eps), ROUNDED[torch.float32])
    assert torch.equal(ops.rms_norm(torch.zeros(2, 512), weight, eps), torch.zeros(2, 512))


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_rms_norm_squares_in_float32(dtype):
    """300^2 is past float16, and a bfloat16 sum of 2048 squares stops growing."""
    x, weight = torch.full((2, 2048), 300.0, dtype=dtype), torch.ones(2048, dtype=dtype)
    assert_close(ops.rms_norm(x, weight), torch.ones(2, 2048), ROUNDED[dtype])


# rope


def rope64(x, cos, sin):
    """Each pair as a complex number, turned."""
    a, b = x.double()[..., 0::2], x.double()[..., 1::2]
    c, s = (t.double()[:, None] if x.dim() == 3 else t.double() for t in (cos, sin))
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(5, 16, 64), (1, 1, 32), (3, 7, 2), (4, 1, 64), (0, 16, 64)], ids=str)
def test_rope(shape, dtype):
    x = torch.randn(shape).to(dtype)
    cos, sin = turns(shape[0], shape[2])
    out = ops.rope(x, cos, sin)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, rope64(x, cos, sin), ROUNDED[dtype])


# [4, 8 or more, 192 or 193] -> [T, H, 64 or more]: ways in which a query's columns can lie
ROPE_VIEWS = {
    "query": lambda x: x[:, :, 128:192],  # as the module passes it: the last columns of every head's query
    "odd offset": lambda x: x[:, :, 1:65],
    "every second column": lambda x: x[:, :, :128:2],
    "transposed": lambda x: x.transpose(0, 1)[:4],
    "heads": lambda x: x[:, ::3, 3:67],
    "one head at an odd offset": lambda x: x[:1, :1, 1:65],
    "expanded": lambda x: x[:1, :1, :64].expand(4, 11, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("view", ROPE_VIEWS.values(), ids=ROPE_VIEWS)
def test_rope_of_strided_input(view, dtype):
    """A head of 193 columns makes all strides odd, which a view as complex numbers would not take."""
    for width in (192, 193):
        x = view(torch.randn(4, 8, width).to(dtype))
        x = x[..., :64] if x.shape[-1] > 64 else x
        cos, sin = turns(x.shape[0], 64)
        assert_close(ops.rope(x, cos, sin), rope64(x, cos, sin), ROUNDED[dtype], f"width {width}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rope_takes_strided_cos_and_sin(dtype):
    """Halves of one table, and every second row of it."""
    x, table = torch.randn(3, 2, 64).to(dtype), torch.randn(6, 64)[::2]
    cos, sin = table[:, :32], table[:, 32:]
    assert_close(ops.rope(x, cos, sin), rope64(x, cos, sin), ROUNDED[dtype])


def test_rope_takes_yarns_factor_from_cos_and_sin():
    """They are used as they are, even where cos^2 + sin^2 is not 1."""
    x = torch.randn(3, 2, 64)
    cos, sin = turns(3, 64)
    assert_close(ops.rope(x, 1.5 * cos, 1.5 * sin), 1.5 * rope64(x, cos, sin), ROUNDED[torch.float32])


# latent_append


def append_inputs(tokens, page_size, dtype, latent=512, rope=64, pages=3, strided=False):
    width = latent + rope
    kv_a = torch.randn(tokens, width + 7 if strided else width).to(dtype)
    kv_a = kv_a[:, 3 : 3 + width] if strided else kv_a
    cos, sin = turns(tokens, rope)
    weight = torch.randn(latent).to(dtype)
    slots = torch.randperm(pages * page_size)[:tokens]
    return kv_a, weight, cos, sin, slots, torch.full((pages, page_size, width), float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize(
    "tokens, page_size, latent, rope",
    [(5, 64, 512, 64), (37, 16, 512, 64), (1, 1, 512, 64), (9, 128, 256, 32), (6, 4, 24, 8)],
)
def test_latent_append(tokens, page_size, latent, rope, strided, dtype):
    """The rows against float64; every other row keeps its NaN; the same bits as rms_norm and rope done one by one."""
    kv_a, weight, cos, sin, slots, cache = append_inputs(tokens, page_size, dtype, latent, rope, strided=strided)
    result = ops.latent_append(kv_a, weight, cos, sin, slots, cache, 1e-5)
    assert result is None
    flat = cache.view(-1, latent + rope)
    rows = flat[slots]
    assert_close(rows[:, :latent], norm64(kv_a[:, :latent], weight, 1e-5), ROUNDED[dtype], "latent")
    assert_close(rows[:, latent:], rope64(kv_a[:, latent:], cos, sin), ROUNDED[dtype], "pe")
    assert torch.equal(rows[:, :latent], ops.rms_norm(kv_a[:, :latent], weight, 1e-5))
    assert torch.equal(rows[:, latent:], ops.rope(kv_a[:, None, latent:], cos, sin)[:, 0])
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[slots] = False
    assert flat[untouched].isnan().all()


@pytest.mark.parametrize("skipped", [[0], [4], [1, 2], [0, 1, 2, 3, 4]], ids=str)
def test_latent_append_skips_slot_minus_one(skipped):
    kv_a, weight, cos, sin, _, cache = append_inputs(5, 16, torch.bfloat16)
    slots = torch.tensor([20, 47, 3, 0, 16])  # both ends of the cache
    expected = cache.clone()
    kept = [t for t in range(5) if t not in skipped]
    ops.latent_append(kv_a[kept], weight, cos[kept], sin[kept], slots[kept], expected)
    slots[skipped] = -1
    kv_a[skipped] = float("nan")  # what is skipped is not looked at
    ops.latent_append(kv_a, weight, cos, sin, slots, cache)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    assert int((~cache.isnan()).all(-1).sum()) == len(kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads, rope", [(1, 64), (20, 64), (3, 32)])
def test_latent_append_rotates_queries_where_they_are(heads, rope, dtype):
    """The same cache as without them, the same bits as rope; the queries' other columns stay."""
    kv_a, weight, cos, sin, slots, cache = append_inputs(5, 16, dtype, 8 * rope, rope)
    slots[3] = -1
    q = torch.randn(5, heads, 128 + rope).to(dtype)
    expected, before = cache.clone(), q.clone()
    ops.latent_append(kv_a, weight, cos, sin, slots, expected, 1e-5)
    assert ops.latent_append(kv_a, weight, cos, sin, slots, cache, 1e-5, q[..., 128:]) is None
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q[..., 128:], ops.rope(before[..., 128:], cos, sin))
    assert torch.equal(q[..., :128], before[..., :128])


def test_latent_append_of_bad_slots_leaves_the_queries():
    kv_a, weight, cos, sin, slots, cache = append_inputs(5, 16, torch.float32)
    q_pe = torch.randn(5, 2, 64)
    before, slots[4] = q_pe.clone(), 48
    with pytest.raises(ValueError, match="slots must be"):
        ops.latent_append(kv_a, weight, cos, sin, slots, cache, 1e-6, q_pe)
    assert torch.equal(q_pe, before) and cache.isnan().all()


def test_latent_append_of_nothing_writes_nothing():
    args = append_inputs(0, 16, torch.float32)
    ops.latent_append(*args)
    ops.latent_append(*args, 1e-6, torch.empty(0, 2, 64))
    assert args[5].isnan().all()


def test_latent_append_writes_a_view_of_many_layers():
    """One layer of a larger storage: its neighbours stay."""
    kv_a, weight, cos, sin, slots, _ = append_inputs(5, 16, torch.bfloat16)
    layers = torch.full((3, 3, 16, 576), float("nan"), dtype=torch.bfloat16)
    ops.latent_append(kv_a, weight, cos, sin, slots, layers[1])
    assert layers[[0, 2]].isnan().all()
    assert int((~layers[1].isnan()).all(-1).sum()) == 5


# mla_decode


def decode_inputs(
    lengths,
    *,
    dtype,
    heads=4,
    s_q=1,
    page_size=64,
    latent=512,
    rope=64,
    layout="joined",
    strided=False,
):
    """Scattered pages; NaN wherever no request has a row; garbage in the block table's unused entries."""
    batch, width = len(lengths), latent + rope
    counts = [-(-n // page_size) for n in lengths]
    total, columns = sum(counts) + 2, max([*counts, 0]) + 1
    order = torch.randperm(total).tolist()
    table = torch.full((batch, columns), GARBAGE_PAGE, dtype=torch.int32)
    filled = torch.full((total, page_size, width), float("nan"), dtype=dtype)
    for b, (n, count) in enumerate(zip(lengths, counts)):
        mine, order = order[:count], order[count:]
        table[b, :count] = torch.tensor(mine, dtype=torch.int32)
        rows = torch.full((count * page_size, width), float("nan"), dtype=dtype)
        rows[:n] = small(n, width, dtype=dtype)
        filled[mine] = rows.view(count, page_size, width)
    if layout == "joined":
        kv, pe = filled[..., :latent], filled[..., latent:]
    elif layout == "rows padded":  # both in one storage, with columns between and behind them
        room = torch.full((total, page_size, width + 9), float("nan"), dtype=dtype)
        room[..., 1 : 1 + latent], room[..., latent + 4 : latent + 4 + rope] = filled.split([latent, rope], -1)
        kv, pe = room[..., 1 : 1 + latent], room[..., latent + 4 : latent + 4 + rope]
    elif layout == "apart":
        kv, pe = filled[..., :latent].clone(), filled[..., latent:].clone()
    elif layout == "odd strides":  # two tensors, pages inside slots, and columns that are not adjacent
        kv = torch.empty(page_size, total, latent + 1, dtype=dtype).transpose(0, 1)[..., 1:]
        pe = torch.empty(rope, page_size, total, dtype=dtype).permute(2, 1, 0)
        kv.copy_(filled[..., :latent])
        pe.copy_(filled[..., latent:])
    elif layout == "swapped":  # one storage, the rope columns first
        room = torch.cat([filled[..., latent:], filled[..., :latent]], -1)
        kv, pe = room[..., rope:], room[..., :rope]
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    q = small(batch, s_q, heads, width, dtype=dtype) * 10
    q_nope, q_pe = q.split([latent, rope], -1)
    if strided:
        q_nope = torch.empty(batch, heads, s_q, latent + 5, dtype=dtype).transpose(1, 2)[..., 2:-3].copy_(q_nope)
        q_pe = torch.empty(batch, rope, heads, s_q, dtype=dtype).permute(0, 3, 2, 1).copy_(q_pe)
        table = torch.stack([table, torch.full_like(table, GARBAGE_PAGE)], -1).flatten(1)[:, ::2]
        seq_lens = torch.stack([seq_lens, torch.full_like(seq_lens, GARBAGE_PAGE)], -1)[:, 0]
        # A lone row, and a lone element of it, is contiguous whatever its strides.
        assert not ((q_nope.is_contiguous() and batch * s_q * heads > 1) or (q_pe.is_contiguous() and s_q * heads > 1))
        assert not (seq_lens.is_contiguous() and batch > 1)
    return q_nope, q_pe, kv, pe, table, seq_lens, width**-0.5


def decode64(q_nope, q_pe, kv, pe, table, seq_lens, scale, causal=True):
    """A request and a row at a time."""
    batch, s_q, heads, latent = q_nope.shape
    page_size = kv.shape[1]
    out = torch.zeros(batch, s_q, heads, latent, dtype=torch.float64)
    lse = torch.full((batch, heads, s_q), float("-inf"), dtype=torch.float64)
    for b, n in enumerate(seq_lens.tolist()):
        pages = table[b, : -(-n // page_size)].tolist()
        keys = torch.cat([kv[pages].double(), pe[pages].double()], -1).flatten(0, 1)[:n]
        for i in range(s_q):
            seen = keys[: max(0, n - s_q + 1 + i)] if causal else keys
            if not len(seen):
                continue
            scores = torch.cat([q_nope[b, i], q_pe[b, i]], -1).double() @ seen.T * scale
            lse[b, :, i] = scores.logsumexp(-1)
            out[b, i] = scores.softmax(-1) @ seen[:, :latent]
    return out, lse


def check_decode(args, causal=True, tolerance=None, **kwargs):
    out, lse = ops.mla_decode(*args, causal=causal, **kwargs)
    dtype = args[0].dtype
    expected_out, expected_lse = decode64(*args, causal=causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    blind = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    assert torch.equal(out.transpose(1, 2)[blind], torch.zeros_like(out.transpose(1, 2)[blind]))
    out_tolerance, lse_tolerance = DECODE_TOLERANCES[dtype]
    assert_close(out, expected_out, tolerance or out_tolerance, "out")
    assert_close(lse, expected_lse, lse_tolerance, "lse")
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 63, 64, 128])
def test_decode_heads(heads, dtype):
    check_decode(decode_inputs([70, 1, 0, 64], heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
def test_decode_page_sizes(page_size, dtype):
    """Lengths on both sides of every border, one of many pages, and none."""
    lengths = [0, 1, page_size, page_size + 1, 2 * page_size - 1 or 1, 3 * page_size, 200]
    check_decode(decode_inputs(lengths, page_size=page_size, dtype=dtype))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_decode_several_rows(s_q, causal, dtype):
    """Around the page's border each row ends in another page; below s_q the first rows see nothing."""
    check_decode(
        decode_inputs([0, 1, 2, 3, 4, 14, 15, 16, 17, 18, 31, 32, 33, 34, 35], s_q=s_q, page_size=16, dtype=dtype),
        causal,
    )


def cut_decode(monkeypatch, room, threads=1):
    """Keys of PyTorch's form in parts: `room` of them gathered at once, as few as 32 for a thread."""
    monkeypatch.setattr(DECODE, "at_once", lambda *_: room)
    monkeypatch.setattr(DECODE, "_KEYS_PER_ROW", 1)
    monkeypatch.setattr(DECODE, "_THREAD_KEYS", 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


@pytest.mark.parametrize("room, threads", [(1 << 20, 1), (48, 1), (48, 20)], ids=["whole", "in spans", "for threads"])
@pytest.mark.parametrize("tokens", [1, 5, 128], ids=lambda n: f"{n} at once")
@pytest.mark.parametrize("elements", [1, 1 << 23], ids=["masks of a token", "large masks"])
def test_decode_long_runs_in_blocks_of_tokens(monkeypatch, elements, tokens, room, threads):
    """Runs longer and shorter than a block, of requests of unequal lengths, some shorter than the run."""
    monkeypatch.setattr(DECODE, "_CAUSAL_TOKENS", tokens)
    monkeypatch.setattr(DECODE, "_MASK_ELEMENTS", elements)
    cut_decode(monkeypatch, room, threads)
    args = decode_inputs([70, 17, 80, 65, 0, 78, 3, 33], s_q=33, heads=3, page_size=16, dtype=torch.float64)
    check_decode(args)
    args = decode_inputs([70, 17, 80, 65, 0, 78], s_q=1, heads=3, page_size=16, dtype=torch.float64)
    check_decode(args)


def test_decode_of_one_tokens_rows_shares_one_mask(monkeypatch):
    """A decode step's groups, of similar lengths each, slice one small mask; where it would be large, each its own."""
    made = []
    hide = DECODE._Requests._hide
    monkeypatch.setattr(DECODE._Requests, "_hide", lambda *args: made.append(args) or hide(*args))
    args = decode_inputs([70, 17, 180, 65, 0, 78, 300], page_size=16, dtype=torch.float32)
    check_decode(args)
    assert len(made) == 1
    monkeypatch.setattr(DECODE, "_SHARED_ELEMENTS", 500)
    check_decode(args)
    assert len(made) == 4  # of up to 128, of up to 256 and of up to 384 keys


@pytest.mark.parametrize("layout", ["joined", "rows padded", "apart", "odd strides", "swapped"])
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=name_of)
def test_decode_layouts(layout, strided, dtype):
    check_decode(decode_inputs([37, 0, 16, 5], page_size=16, s_q=2, layout=layout, strided=strided, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_decode_small_heads(dtype):
    check_decode(decode_inputs([37, 0, 64, 5], latent=256, rope=32, s_q=2, dtype=dtype))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]], ids=str)
def test_decode_degenerate_batches(lengths):
    out, lse = check_decode(decode_inputs(lengths, dtype=torch.float32))
    assert out.shape == (len(lengths), 1, 4, 512) and lse.shape == (len(lengths), 4, 1)


def test_decode_without_heads_or_rows():
    q_nope, q_pe, *rest = decode_inputs([5, 3], dtype=torch.float32)
    out, lse = ops.mla_decode(q_nope[:, :, :0], q_pe[:, :, :0], *rest)
    assert out.shape == (2, 1, 0, 512) and lse.shape == (2, 0, 1)
    out, lse = ops.mla_decode(q_nope[:, :0], q_pe[:, :0], *rest)
    assert out.shape == (2, 0, 4, 512) and lse.shape == (2, 4, 0)


def test_decode_without_pages():
    """A new cache with a block table of no columns."""
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([0, 0], dtype=torch.float32)
    out, lse = ops.mla_decode(q_nope, q_pe, kv[:0], pe[:0], table[:, :0], seq_lens, scale)
    assert torch.equal(out, torch.zeros(2, 1, 4, 512)) and torch.equal(lse, torch.full((2, 4, 1), float("-inf")))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("room", [1, 100, 300])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("s_q", [1, 4])
@pytest.mark.parametrize("layout, page_size", [("joined", 16), ("odd strides", 32)])
def test_decode_in_spans_of_keys(monkeypatch, room, threads, causal, s_q, layout, page_size):
    """With little room the keys are gathered in parts, and with more threads than requests each part is cut for them;
    in float64, to see any slip in what merges them."""
    lengths = [n * page_size // 16 for n in (400, 300, 3, 0, 33, 64, 1, 98)]
    args = decode_inputs(lengths, page_size=page_size, s_q=s_q, layout=layout, dtype=torch.float64)
    whole, whole_lse = check_decode(args, causal)
    parts = []
    attend = DECODE.attend
    monkeypatch.setattr(DECODE, "attend", lambda q, k, *a, **kw: parts.append(k.shape) or attend(q, k, *a, **kw))
    cut_decode(monkeypatch, room, threads)
    out, lse = check_decode(args, causal)
    rows = s_q * 4
    for requests, splits, keys, _ in parts:
        assert requests * splits <= max(threads, room // keys)
        assert requests * splits * keys <= max(room, requests * rows) + requests * splits * 32
    assert len(parts) >= 3 and (room > 100 or len(parts) > 4)
    assert any(splits > 1 for _, splits, _, _ in parts) == (threads > 1 and room > 1)
    assert_close(out, whole, DOUBLE)
    assert_close(lse, whole_lse, LSE)


@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("layout", ["joined", "rows padded", "apart", "odd strides", "swapped"])
def test_decode_of_a_page_that_is_none(layout, page):
    q_nope, q_pe, kv, pe, table, *rest = decode_inputs([37, 20], page_size=16, layout=layout, dtype=torch.float32)
    assert len(kv) <= 7
    table[1, 1] = page if page != 6 else len(kv)
    with pytest.raises(ValueError, match=f"block_table must hold pages below {len(kv)}, got"):
        ops.mla_decode(q_nope, q_pe, kv, pe, table, *rest)


def test_decode_of_keys_that_no_page_holds():
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([3, 0], dtype=torch.float32)
    for cache in (kv[:0], torch.empty(0, 128, 512)[:, ::2]):
        with pytest.raises(ValueError, match="seq_lens must be 0 for a cache without pages, got 3"):
            ops.mla_decode(q_nope, q_pe, cache, pe[:0], table, seq_lens, scale)


def test_decode_of_no_rows_is_contiguous():
    """Of queries that are halves of one tensor, as the result for compiled graphs says."""
    q_nope, q_pe, *rest = decode_inputs([5, 3], dtype=torch.float32)
    both = torch.cat([q_nope, q_pe], -1)
    for some in ((slice(0), slice(None)), (slice(None), slice(0))):
        q = both[(slice(None), *some)]
        out, _ = ops.mla_decode(q[..., :512], q[..., 512:], *rest)
        assert out.is_contiguous() and out.stride() == torch.empty(out.shape).stride()


def test_decodes_reference_takes_queries_that_record():
    q_nope, q_pe, *rest = decode_inputs([5, 3], dtype=torch.bfloat16)
    out, _ = ops.mla_decode.reference(q_nope.requires_grad_(), q_pe, *rest)
    assert torch.equal(out, ops.mla_decode(q_nope.detach(), q_pe, *rest)[0])


def test_decode_of_rows_that_see_no_key_of_a_thread(monkeypatch):
    """Of a request shorter than the longest of its group, and of a run's first rows."""
    lengths = [4, 2, 1, 0, 2, 223, 121, 100]
    cut_decode(monkeypatch, 1 << 20, 200)
    monkeypatch.setattr(DECODE, "_alike", bool)
    for s_q in (1, 5):
        for dtype in (torch.float64, torch.bfloat16):
            check_decode(decode_inputs(lengths, s_q=s_q, page_size=16, dtype=dtype))


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_decode_in_spans_of_keys_rounds_once(monkeypatch, dtype, threads):
    """The parts are merged in float32: 25 roundings on the way would show."""
    args = decode_inputs([800, 13], page_size=16, s_q=2, dtype=dtype)
    cut_decode(monkeypatch, 1, threads)
    check_decode(args)


@pytest.mark.parametrize("room, threads", [(1 << 20, 1), (1 << 20, 200), (400, 1)], ids=["whole", "threads", "spans"])
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_decode_where_exponentials_are_worst(monkeypatch, dtype, s_q, room, threads):
    """A first key and 700 like each other behind it, whose lse is small in all, or is not."""
    behind = torch.cat([torch.linspace(-9, -6, 90), torch.tensor([0.0, 5.0])])
    requests, pages = len(behind), 11
    q_nope, q_pe = torch.ones(requests, s_q, 1, 512, dtype=dtype), torch.zeros(requests, s_q, 1, 64, dtype=dtype)
    kv = torch.zeros(requests, pages * 64, 512, dtype=dtype)
    kv[:, 1:, 0] = behind[:, None]
    table = torch.arange(requests * pages, dtype=torch.int32).view(requests, pages)
    cut_decode(monkeypatch, room, threads)
    lengths = torch.full((requests,), 701, dtype=torch.int32)
    pe = torch.zeros(requests * pages, 64, 64, dtype=dtype)
    check_decode((q_nope, q_pe, kv.view(-1, 64, 512), pe, table, lengths, 1.0))


@pytest.mark.parametrize("num_splits", [None, 1, 3, 100])
def test_decode_splits_do_not_change_the_result(num_splits):
    args = decode_inputs([37, 0, 200, 5], dtype=torch.float64)
    out, _ = check_decode(args, num_splits=num_splits)
    assert_close(out, ops.mla_decode(*args)[0], DOUBLE)


def test_decode_lse_is_a_natural_logarithm():
    """One key, whose score is known."""
    q = torch.zeros(1, 1, 1, 512)
    q[..., 0] = 3.0
    kv, pe = torch.zeros(1, 16, 512), torch.zeros(1, 16, 64)
    kv[0, 0, 0] = 2.0
    out, lse = ops.mla_decode(q, torch.zeros(1, 1, 1, 64), kv, pe, _ints([[0]]), _ints([1]), 0.5)
    assert lse.item() == 3.0
    assert torch.equal(out[0, 0, 0], kv[0, 0])


def test_decode_requests_may_share_pages():
    """The same page in two tables: a common prefix, read and not written."""
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([40, 40], page_size=16, dtype=torch.float64)
    table[1, :2] = table[0, :2]
    check_decode((q_nope, q_pe, kv, pe, table, seq_lens, scale))


def test_decode_one_row_per_token_is_a_causal_batch():
    """Unequal numbers of new tokens: each token its own row with its request's table and its own length."""
    args = decode_inputs([35], s_q=3, page_size=16, dtype=torch.float64)
    q_nope, q_pe, kv, pe, table, _, scale = args
    out, lse = ops.mla_decode(*args)
    rows = [q.transpose(0, 1) for q in (q_nope, q_pe)]
    by_row, by_row_lse = ops.mla_decode(*rows, kv, pe, table.expand(3, -1), _ints([33, 34, 35]), scale)
    assert_close(by_row[:, 0], out[0], DOUBLE)
    assert_close(by_row_lse[..., 0].T, lse[0], LSE)


def _ints(values):
    return torch.tensor(values, dtype=torch.int32)


# mla_prefill


def prefill_inputs(lengths, key_lengths=None, *, dtype, heads=3, dqk=192, dv=128, strided=False):
    key_lengths = lengths if key_lengths is None else key_lengths
    tokens, keys = sum(lengths), sum(key_lengths)
    bounds = [_ints([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (lengths, key_lengths)]
    q, k, v = (
        small(n, heads, d, dtype=dtype) * factor for n, d, factor in ((tokens, dqk, 10), (keys, dqk, 1), (keys, dv, 1))
    )
    if strided:  # k and v as slices of what kv_b_proj gives, q with its heads outside
        together = torch.full((keys, heads, dqk + dv + 3), float("nan"), dtype=dtype)
        together[..., :dqk], together[..., dqk + 1 : dqk + 1 + dv] = k, v
        k, v = together[..., :dqk], together[..., dqk + 1 : dqk + 1 + dv]
        q = q.transpose(0, 1).contiguous().transpose(0, 1)
        bounds = [torch.stack([b, b], -1)[:, 0] for b in bounds]
    return q, k, v, *bounds, dqk**-0.5


def prefill64(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal=True):
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float64)
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts) - 1):
        rows, keys = slice(starts[b], starts[b + 1]), slice(key_starts[b], key_starts[b + 1])
        n, n_k = rows.stop - rows.start, keys.stop - keys.start
        scores = torch.einsum("ihd,jhd->hij", q[rows].double(), k[keys].double()) * scale
        if causal:
            hidden = torch.arange(n_k)[None] > torch.arange(n)[:, None] + n_k - n
            scores.masked_fill_(hidden, float("-inf"))
        total = scores.logsumexp(-1)
        weights = (scores - total[..., None]).exp().nan_to_num(0)
        lse[:, rows], out[rows] = total, torch.einsum("hij,jhd->ihd", weights, v[keys].double())
    return out, lse


def check_prefill(args, causal=True):
    out, lse = ops.mla_prefill(*args, causal=causal)
    dtype = args[0].dtype
    expected_out, expected_lse = prefill64(*args, causal=causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    blind = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    assert torch.equal(out.transpose(0, 1)[blind], torch.zeros_like(out.transpose(0, 1)[blind]))
    tolerance, lse_tolerance = PREFILL_TOLERANCES[dtype]
    assert_close(out, expected_out, tolerance, "out")
    assert_close(lse, expected_lse, lse_tolerance, "lse")
    return blind


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "lengths, key_lengths",
    [
        ([70], None),
        ([1], None),
        ([0, 5, 0, 33, 1, 0], None),
        ([3, 1, 40, 0], [50, 9, 41, 7]),
        ([5, 2, 3], [2, 0, 3]),
    ],
    ids=["one", "one token", "empty requests", "pasts", "fewer keys than rows"],
)
def test_prefill(lengths, key_lengths, causal, dtype):
    blind = check_prefill(prefill_inputs(lengths, key_lengths, dtype=dtype), causal)
    # 3 rows above the diagonal and 2 of a request without keys, in 3 heads
    assert int(blind.sum()) == (0 if lengths != [5, 2, 3] else 3 * (5 if causal else 2))


@pytest.mark.parametrize("past", [1, 64, 130])
@pytest.mark.parametrize("elements, tokens", [(1, 127), (1, 128), (1, 129), (1, 260), (1 << 23, 512), (1 << 23, 513)])
def test_prefill_past_in_blocks_of_rows(monkeypatch, elements, tokens, past):
    """The masked path goes by blocks of 512 rows, of 128 where masks would be large; a last one of one row is seen
    whole."""
    blocks = []
    attend = PREFILL.attend
    monkeypatch.setattr(PREFILL, "attend", lambda q, *a, **kw: blocks.append(q.shape[2]) or attend(q, *a, **kw))
    monkeypatch.setattr(PREFILL, "_MASK_ELEMENTS", elements)
    rows = 128 if elements == 1 else 512
    check_prefill(prefill_inputs([tokens, 2], [tokens + past, 2], heads=1, dqk=24, dv=16, dtype=torch.float64))
    assert blocks == [min(rows, tokens - done) for done in range(0, tokens, rows)] + [2]


@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("dqk, dv", [(192, 128), (256, 256), (24, 40), (40, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_prefill_head_sizes(dqk, dv, strided, dtype):
    args = prefill_inputs([20, 0, 7], [29, 3, 7], dqk=dqk, dv=dv, strided=strided, dtype=dtype)
    check_prefill(args)
    check_prefill(args, causal=False)


@pytest.mark.parametrize("heads", [1, 16, 128])
def test_prefill_heads(heads):
    check_prefill(prefill_inputs([9, 4], [9, 6], heads=heads, dtype=torch.bfloat16))


def test_prefill_of_nothing():
    args = prefill_inputs([0, 0], dtype=torch.float32)
    out, lse = ops.mla_prefill(*args)
    assert out.shape == (0, 3, 128) and lse.shape == (3, 0)
    out, lse = ops.mla_prefill(*args[:3], _ints([0]), _ints([0]), 1.0)
    assert out.shape == (0, 3, 128)


def test_prefill_without_heads():
    """In a process of its own: PyTorch's CPU kernel divides by the number of heads and ends the process."""
    run(
        """
        import torch
        from ntops_mla import ops
        args = ops.get("mla_prefill").example(heads=0)
        out, lse = ops.mla_prefill(*args)
        assert out.shape == (4, 0, 128) and lse.shape == (0, 4)
        """
    )


# What both attentions stand on

FORMS = ["attend", "_attend_by_rows"]


def form(name):
    """The path of this device, and the one for devices without a fused kernel that gives the lse."""
    if name == "attend":
        return _attention.attend
    return lambda q, k, v, scale, mask=None, causal=False: _attention._attend_by_rows(q, k, v, scale, mask, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_prefill_without_an_lse(dtype):
    """The same out, bit for bit; rows of few keys, whose lse is computed anew, among them."""
    args = prefill_inputs([20, 0, 7, 4], [29, 3, 7, 1], dtype=dtype)
    out, lse = ops.mla_prefill(*args, want_lse=False)
    assert (lse.shape, lse.dtype) == ((0,), torch.float32)
    assert torch.equal(out, ops.mla_prefill(*args)[0])
    with pytest.raises(TypeError, match="want_lse must be True or False, got 1"):
        ops.mla_prefill.explain(*args, want_lse=1)


def attend64(q, k, v, scale, mask=None, causal=False):
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attend_where_exponentials_are_worst(name, dtype):
    """One key and n like each other behind it: the error of an exponential is the lse's, wherever it is largest."""
    behind = torch.linspace(-3, 0, 300)
    q = torch.ones(300, 1, 1, 8, dtype=dtype)
    for keys in (17, 33, 65, 513):
        k = torch.zeros(300, 1, keys, 8, dtype=dtype)
        k[:, 0, 1:, 0] = behind[:, None]
        _, lse = form(name)(q, k, k, 1.0)
        assert_close(lse, attend64(q, k, k, 1.0)[1], PREFILL_LSE if dtype in HALF else LSE)


@pytest.mark.parametrize("elements", [1, 100, 1 << 24], ids=["a row", "some rows", "all rows"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mask_shape", [None, (2, 3, 9, 11), (2, 1, 1, 11), (1, 1, 9, 11), (2, 3, 1, 11)], ids=str)
def test_attend(monkeypatch, name, dtype, mask_shape, elements):
    """[B, H, Lq, D] with Dv > D, every form of the mask, and blocks of any number of rows."""
    monkeypatch.setattr(_attention, "_SCORE_ELEMENTS", elements)
    q, k, v = (small(2, 3, n, d, dtype=dtype) for n, d in ((9, 24), (11, 24), (11, 40)))
    mask = None
    if mask_shape is not None:
        hidden = torch.rand(mask_shape) < 0.4
        hidden[..., 0] = False
        mask = (torch.randn(mask_shape).masked_fill(hidden, float("-inf"))).to(dtype)
    out, lse = form(name)(q * 10, k * 10, v, 0.3, mask)
    expected, expected_lse = attend64(q * 10, k * 10, v, 0.3, mask)
    assert (out.dtype, lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, expected, DECODE_TOLERANCES[dtype][0])
    assert_close(lse, expected_lse, PREFILL_LSE if dtype in HALF else LSE)


@pytest.mark.parametrize("elements", [1, 100, 1 << 24], ids=["a row", "some rows", "all rows"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attend_causal(monkeypatch, name, dtype, elements):
    monkeypatch.setattr(_attention, "_SCORE_ELEMENTS", elements)
    q, k, v = (small(2, 3, 33, d, dtype=dtype) for d in (24, 24, 16))
    out, lse = form(name)(q * 10, k, v, 0.3, None, True)
    expected, expected_lse = attend64(q * 10, k, v, 0.3, None, True)
    assert_close(out, expected, DECODE_TOLERANCES[dtype][0])
    assert_close(lse, expected_lse, PREFILL_LSE if dtype in HALF else LSE)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ops_by_rows_as_on_an_accelerator(monkeypatch, dtype):
    """Both references with the path that other devices take, a few rows at a time; blind rows included."""
    calls = []

    def by_rows(q, k, v, scale, mask=None, causal=False, exact_lse=True):
        calls.append(q.shape)
        return _attention._attend_by_rows(q, k, v, scale, mask, causal)

    monkeypatch.setattr(_attention, "_SCORE_ELEMENTS", 200)
    monkeypatch.setattr(DECODE, "attend", by_rows)
    monkeypatch.setattr(PREFILL, "attend", by_rows)
    for causal in (True, False):
        check_decode(decode_inputs([37, 0, 1, 16, 5], page_size=16, s_q=4, dtype=dtype), causal)
        check_prefill(prefill_inputs([20, 0, 7, 4], [29, 3, 7, 1], dtype=dtype), causal)
    cut_decode(monkeypatch, 1)
    args = decode_inputs([37, 0, 1, 16, 5], page_size=16, s_q=4, dtype=dtype)
    check_decode(args)
    assert len(calls) > 10


def test_attend_by_rows_widens_shared_keys_and_values_once(monkeypatch):
    k = torch.randn(2, 1, 40, 24).bfloat16()
    q = torch.randn(2, 1, 6, 24).bfloat16()
    widened = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a: widened.append(x.data_ptr()) or to(x, *a))
    shared = _attention._attend_by_rows(q, k, k, 0.3, None, False)
    assert widened.count(k.data_ptr()) == 1
    apart = _attention._attend_by_rows(q, k, k.clone(), 0.3, None, False)
    assert all(map(torch.equal, shared, apart))


@pytest.mark.parametrize("room", [0, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_values_narrower_than_keys_are_read_with_what_lies_behind_them(room, dtype, monkeypatch):
    """As far as their storage goes; it is NaN, and nobody's."""
    q, k = (torch.randn(2, 3, n, 192).to(dtype) for n in (5, 12))
    rows = torch.full((2 * 12 * 3 * 256 + room,), float("nan"), dtype=dtype)
    v = rows[: len(rows) - room].view(2, 12, 3, 256)[..., 128:]
    v.normal_()
    v = v.transpose(1, 2)
    padded = []
    monkeypatch.setattr(
        _attention, "widen", lambda x, n, own=_attention.widen: padded.append(n - x.shape[-1]) or own(x, n)
    )
    out, lse = _attention.attend(q, k, v, 0.1)
    assert (64 in padded) == (room < 64)
    for one, other in zip((out, lse), _attention.attend(q, k, v.contiguous(), 0.1)):
        assert torch.equal(one, other)
    assert out.shape == (2, 3, 5, 128)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mla_schedule"])
def test_no_gradient_is_left_out_in_silence(name):
    """Whatever runs: the values of a call under no_grad, a backward that refuses; what is written to records none."""
    args = ops.get(name).example("cpu", torch.float32)
    given = {
        argument: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for argument, value in zip(ops.get(name)._signature.parameters, args)
    }
    tensors = {argument: value for argument, value in given.items() if isinstance(value, torch.Tensor)}
    for argument, value in tensors.items():
        value.requires_grad_(value.is_floating_point() and argument not in written(name))
    got, expected = getattr(ops, name)(**given), getattr(ops, name)(*args)
    assert not any(tensors[argument].requires_grad for argument in written(name) if argument in tensors)
    recorded = any(value.requires_grad for value in tensors.values())
    assert recorded or name == "latent_dequantize"
    results = () if got is None else got if isinstance(got, tuple) else (got,)
    for one, other in zip(results, expected if isinstance(expected, tuple) else (expected,)):
        assert torch.equal(one, other)
        if recorded:
            with pytest.raises(NotImplementedError, match=f"{name}: only the forward pass"):
                one.sum().backward()


def test_decode_in_pytorch_where_gradients_are_recorded():
    args = decode_inputs([70, 3], dtype=torch.float32)
    expected = ops.mla_decode.reference(*args)
    args[2].requires_grad_()
    for one, other in zip(ops.mla_decode.reference(*args), expected):
        assert torch.equal(one, other)


def test_merge_is_a_softmax_over_both():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 12, 12))
    whole, whole_lse = _attention.attend(q, k, v, 0.5)
    first = _attention.attend(q, k[:, :, :5], v[:, :, :5], 0.5)
    second = _attention.attend(q, k[:, :, 5:], v[:, :, 5:], 0.5)
    out, lse = _attention.merge(*first, *second)
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_merge_with_nothing_changes_nothing(first):
    some, nothing = (torch.randn(4, 8), torch.randn(4)), (torch.zeros(4, 8), torch.full((4,), float("-inf")))
    out, lse = _attention.merge(*nothing, *some) if first else _attention.merge(*some, *nothing)
    assert torch.equal(out, some[0]) and torch.equal(lse, some[1])


def test_merge_of_two_nothings_is_nothing():
    nothing = torch.zeros(4, 8), torch.full((4,), float("-inf"))
    out, lse = _attention.merge(*nothing, *nothing)
    assert torch.equal(out, nothing[0]) and torch.equal(lse, nothing[1])


def test_merge_of_far_apart_parts_does_not_overflow():
    a, b = torch.randn(1, 8), torch.randn(1, 8)
    out, lse = _attention.merge(a, torch.tensor([500.0]), b, torch.tensor([-500.0]))
    assert torch.equal(out, a) and lse.item() == 500.0


def test_joined_sees_neighbours_in_one_storage():
    """A view: no copy, also where the rows are part of longer ones."""
    room = torch.randn(3, 4, 20)
    for start in (0, 5):
        a, b = room[..., start : start + 8], room[..., start + 8 : start + 12]
        whole = _rows.joined(a, b)
        assert torch.equal(whole, room[..., start : start + 12])
        assert whole.data_ptr() == a.data_ptr()


ROOM = torch.arange(240.0).view(3, 4, 20)


@pytest.mark.parametrize(
    "a, b",
    [
        (ROOM[..., :8].clone(), ROOM[..., 8:12]),
        (ROOM[..., 8:12], ROOM[..., :8]),
        (ROOM[..., :8], ROOM[..., 9:13]),
        (ROOM[..., :8], ROOM[:2, :, 8:12]),
        (ROOM[:1, ..., :8], ROOM[1:2, ..., 8:12]),
        (ROOM[..., :16:2], ROOM[..., 16::2]),
        (ROOM[:, ::2, :8], ROOM[:, :2, 8:12]),
        (ROOM.transpose(1, 2)[:, :4], ROOM.transpose(1, 2)[:, 4:8]),
    ],
    ids=["another storage", "swapped", "a gap", "fewer rows", "other rows", "columns apart", "strides", "transposed"],
)
def test_joined_refuses_what_is_no_neighbour(a, b):
    assert _rows.joined(a, b) is None


# Bad arguments

META = torch.device("meta")


def good(name):
    """Valid arguments by name, small."""
    names = list(ops.get(name)._signature.parameters)
    return dict(zip(names, ops.get(name).example(torch.device("cpu"), torch.float32, tokens=3, heads=2, page_size=16)))


def cast(dtype):
    return lambda t: t.to(dtype)


def meta(t):
    return t.to(META)


def flat(t):
    return t.flatten()


def one_more(t):
    """A dimension more."""
    return t[None]


def longer(dim):
    return lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim)


def shorter(dim):
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1)


def is_(value):
    return lambda t: value


# What an append must refuse as q_pe, beside 3 tokens of 64 RoPE columns.
QUERIES = [
    ("q_pe", is_(torch.zeros(3, 64)), ValueError, "[3, 64]"),
    ("q_pe", is_(torch.zeros(2, 2, 64)), ValueError, "3"),
    ("q_pe", is_(torch.zeros(3, 2, 62)), ValueError, "64"),
    ("q_pe", is_(torch.zeros(3, 2, 64, dtype=torch.float16)), TypeError, "float16"),
    ("q_pe", is_(torch.zeros(3, 2, 64, device=META)), ValueError, "meta"),
    ("q_pe", is_(torch.zeros(3, 1, 64).expand(3, 2, 64)), ValueError, "expanded"),
    ("q_pe", is_([0.0]), TypeError, "list"),
]

# (op, argument, what becomes of it, exception, further words); the message names the op and the argument.
BAD = [
    ("rms_norm", "input", lambda t: t[0, 0], ValueError, "[]"),
    ("rms_norm", "input", cast(torch.int32), TypeError, "int32"),
    ("rms_norm", "weight", one_more, ValueError, "[1, 512]"),
    ("rms_norm", "weight", shorter(0), ValueError, "512"),
    ("rms_norm", "weight", cast(torch.bfloat16), TypeError, "bfloat16"),
    ("rms_norm", "weight", meta, ValueError, "meta"),
    ("rms_norm", "input", is_("x"), TypeError, "str"),
    ("rms_norm", "weight", is_([1.0]), TypeError, "list"),
    ("rms_norm", "weight", is_(None), TypeError, "NoneType"),
    ("rms_norm", "eps", is_("small"), TypeError, "small"),
    ("rms_norm", "eps", is_(None), TypeError, "None"),
    ("rope", "q_pe", lambda t: t[0], ValueError, "[2, 64]"),
    ("rope", "q_pe", cast(torch.complex64), TypeError, "complex64"),
    ("rope", "q_pe", lambda t: t[..., :63], ValueError, "63"),
    ("rope", "cos", one_more, ValueError, "cos"),
    ("rope", "cos", shorter(0), ValueError, "3"),
    ("rope", "cos", shorter(1), ValueError, "32"),
    ("rope", "cos", cast(torch.bfloat16), TypeError, "float32"),
    ("rope", "cos", cast(torch.float64), TypeError, "float32"),
    ("rope", "cos", meta, ValueError, "meta"),
    ("rope", "sin", flat, ValueError, "[96]"),
    ("rope", "sin", longer(0), ValueError, "3"),
    ("rope", "sin", longer(1), ValueError, "32"),
    ("rope", "sin", cast(torch.float16), TypeError, "float32"),
    ("rope", "sin", meta, ValueError, "meta"),
    ("rope", "q_pe", is_(None), TypeError, "NoneType"),
    ("rope", "sin", is_(1.0), TypeError, "float"),
    ("latent_append", "kv_a", one_more, ValueError, "[1, 3, 576]"),
    ("latent_append", "kv_a", cast(torch.int64), TypeError, "int64"),
    ("latent_append", "kv_a", lambda t: t[:, :512], ValueError, "512"),
    ("latent_append", "kv_a", lambda t: t[:, :575], ValueError, "575"),
    ("latent_append", "weight", one_more, ValueError, "[1, 512]"),
    ("latent_append", "weight", cast(torch.float16), TypeError, "float16"),
    ("latent_append", "weight", meta, ValueError, "meta"),
    ("latent_append", "cos", shorter(0), ValueError, "3"),
    ("latent_append", "cos", shorter(1), ValueError, "32"),
    ("latent_append", "cos", cast(torch.float64), TypeError, "float32"),
    ("latent_append", "cos", meta, ValueError, "meta"),
    ("latent_append", "sin", flat, ValueError, "[96]"),
    ("latent_append", "sin", cast(torch.bfloat16), TypeError, "float32"),
    ("latent_append", "sin", meta, ValueError, "meta"),
    ("latent_append", "slots", one_more, ValueError, "[1, 3]"),
    ("latent_append", "slots", longer(0), ValueError, "3"),
    ("latent_append", "slots", cast(torch.int32), TypeError, "int64"),
    ("latent_append", "slots", meta, ValueError, "meta"),
    ("latent_append", "slots", is_(torch.tensor([0, 32, 1])), ValueError, "32"),
    ("latent_append", "slots", is_(torch.tensor([0, 1, -2])), ValueError, "-2"),
    ("latent_append", "cache", flat, ValueError, "[pages, page_size, C + R]"),
    ("latent_append", "cache", lambda t: t[..., :575].contiguous(), ValueError, "576"),
    ("latent_append", "cache", lambda t: t[:, :12].contiguous(), ValueError, "power of two, got 12"),
    ("latent_append", "cache", lambda t: t[:, :0].contiguous(), ValueError, "power of two, got 0"),
    ("latent_append", "cache", lambda t: t[:, ::2], ValueError, "contiguous"),
    ("latent_append", "cache", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), ValueError, "contiguous"),
    ("latent_append", "cache", cast(torch.bfloat16), TypeError, "bfloat16"),
    ("latent_append", "cache", meta, ValueError, "meta"),
    ("latent_append", "cache", is_(None), TypeError, "NoneType"),
    ("latent_append", "slots", is_([0, 1, 2]), TypeError, "list"),
    ("latent_append", "eps", is_("small"), TypeError, "small"),
    *[("latent_append", *bad) for bad in QUERIES],
    ("mla_decode", "q_nope", lambda t: t[0], ValueError, "[1, 2, 512]"),
    ("mla_decode", "q_nope", cast(torch.int8), TypeError, "int8"),
    ("mla_decode", "q_pe", lambda t: t[0], ValueError, "[1, 2, 64]"),
    ("mla_decode", "q_pe", longer(0), ValueError, "[4, 1, 2, 64]"),
    ("mla_decode", "q_pe", longer(1), ValueError, "[3, 2, 2, 64]"),
    ("mla_decode", "q_pe", longer(2), ValueError, "[3, 1, 3, 64]"),
    ("mla_decode", "q_pe", cast(torch.float16), TypeError, "float16"),
    ("mla_decode", "q_pe", meta, ValueError, "meta"),
    ("mla_decode", "kv_cache", one_more, ValueError, "[pages, page_size, C]"),
    ("mla_decode", "kv_cache", lambda t: t[..., :511], ValueError, "512"),
    ("mla_decode", "kv_cache", lambda t: t[:, :15], ValueError, "power of two, got 15"),
    ("mla_decode", "kv_cache", cast(torch.bfloat16), TypeError, "bfloat16"),
    ("mla_decode", "kv_cache", meta, ValueError, "meta"),
    ("mla_decode", "pe_cache", flat, ValueError, "[pages, page_size, R]"),
    ("mla_decode", "pe_cache", lambda t: t[..., :63], ValueError, "64"),
    ("mla_decode", "pe_cache", shorter(0), ValueError, "[2, 16]"),
    ("mla_decode", "pe_cache", lambda t: t[:, :8], ValueError, "[3, 8]"),
    ("mla_decode", "pe_cache", cast(torch.float64), TypeError, "float64"),
    ("mla_decode", "pe_cache", meta, ValueError, "meta"),
    ("mla_decode", "block_table", flat, ValueError, "[B, max_pages]"),
    ("mla_decode", "block_table", shorter(0), ValueError, "3"),
    ("mla_decode", "block_table", cast(torch.int64), TypeError, "int32"),
    ("mla_decode", "block_table", meta, ValueError, "meta"),
    ("mla_decode", "block_table", is_(_ints([[0], [3], [1]])), ValueError, "pages below 3"),
    ("mla_decode", "block_table", is_(_ints([[0], [-1], [1]])), ValueError, "-1"),
    ("mla_decode", "block_table", is_(_ints([[0], [GARBAGE_PAGE], [1]])), ValueError, str(GARBAGE_PAGE)),
    ("mla_decode", "seq_lens", one_more, ValueError, "[B]"),
    ("mla_decode", "seq_lens", longer(0), ValueError, "3"),
    ("mla_decode", "seq_lens", cast(torch.int64), TypeError, "int32"),
    ("mla_decode", "seq_lens", meta, ValueError, "meta"),
    ("mla_decode", "seq_lens", is_(_ints([1, -1, 2])), ValueError, "-1"),
    ("mla_decode", "seq_lens", is_(_ints([1, 17, 2])), ValueError, "17"),
    ("mla_decode", "num_splits", is_(0), ValueError, "0"),
    ("mla_decode", "num_splits", is_(-1), ValueError, "-1"),
    ("mla_decode", "num_splits", is_(1.5), TypeError, "1.5"),
    ("mla_decode", "softmax_scale", is_("one"), TypeError, "one"),
    ("mla_decode", "softmax_scale", is_(None), TypeError, "None"),
    ("mla_decode", "causal", is_("no"), TypeError, "no"),
    ("mla_decode", "block_table", is_(None), TypeError, "NoneType"),
    ("mla_decode", "seq_lens", is_([1, 2, 3]), TypeError, "list"),
    ("mla_prefill", "q", lambda t: t[0], ValueError, "[2, 192]"),
    ("mla_prefill", "q", cast(torch.int32), TypeError, "int32"),
    ("mla_prefill", "k", flat, ValueError, "[Tk, H, Dqk]"),
    ("mla_prefill", "k", longer(1), ValueError, "[3, 3, 192]"),
    ("mla_prefill", "k", shorter(2), ValueError, "[3, 2, 191]"),
    ("mla_prefill", "k", cast(torch.bfloat16), TypeError, "bfloat16"),
    ("mla_prefill", "k", meta, ValueError, "meta"),
    ("mla_prefill", "v", one_more, ValueError, "[Tk, H, Dv]"),
    ("mla_prefill", "v", longer(0), ValueError, "[4, 2, 128]"),
    ("mla_prefill", "v", longer(1), ValueError, "[3, 3, 128]"),
    ("mla_prefill", "v", cast(torch.float64), TypeError, "float64"),
    ("mla_prefill", "v", meta, ValueError, "meta"),
    ("mla_prefill", "cu_seqlens_q", one_more, ValueError, "[B + 1]"),
    ("mla_prefill", "cu_seqlens_q", longer(0), ValueError, "[3]"),
    ("mla_prefill", "cu_seqlens_q", cast(torch.int64), TypeError, "int32"),
    ("mla_prefill", "cu_seqlens_q", meta, ValueError, "meta"),
    ("mla_prefill", "cu_seqlens_q", is_(_ints([1, 3])), ValueError, "[1, 3]"),
    ("mla_prefill", "cu_seqlens_q", is_(_ints([0, 2])), ValueError, "[0, 2]"),
    ("mla_prefill", "cu_seqlens_q", is_(_ints([0, 4])), ValueError, "[0, 4]"),
    ("mla_prefill", "cu_seqlens_k", one_more, ValueError, "[B + 1]"),
    ("mla_prefill", "cu_seqlens_k", shorter(0), ValueError, "[1]"),
    ("mla_prefill", "cu_seqlens_k", cast(torch.int64), TypeError, "int32"),
    ("mla_prefill", "cu_seqlens_k", meta, ValueError, "meta"),
    ("mla_prefill", "cu_seqlens_k", is_(_ints([0, 2])), ValueError, "[0, 2]"),
    ("mla_prefill", "softmax_scale", is_("one"), TypeError, "one"),
    ("mla_prefill", "causal", is_("no"), TypeError, "no"),
    ("mla_prefill", "v", is_(None), TypeError, "NoneType"),
]


@pytest.mark.parametrize("name, argument, change, error, words", BAD, ids=[f"{b[0]}-{b[1]}-{b[4]}" for b in BAD])
def test_a_bad_argument_is_named_and_nothing_is_written(name, argument, change, error, words):
    args = good(name)
    base = args[argument]
    args[argument] = change(base)
    written = [t for t in (base, *args.values()) if isinstance(t, torch.Tensor) and t.device != META]
    before = [t.clone() for t in written]
    for function in (getattr(ops, name), getattr(ops, name).reference):
        with pytest.raises(error) as caught:
            function(**args)
        assert re.match(rf"{name}: .*\b{argument}\b", str(caught.value)), str(caught.value)
        assert words in str(caught.value)
    for tensor, copy in zip(written, before):
        assert torch.equal(tensor, copy)


def test_cu_seqlens_must_rise():
    q, k, v, *_, scale = prefill_inputs([2, 2], dtype=torch.float32)
    for name, bounds in (("cu_seqlens_q", ([0, 5, 4], [0, 2, 4])), ("cu_seqlens_k", ([0, 2, 4], [0, -1, 4]))):
        with pytest.raises(ValueError, match=rf"mla_prefill: {name} must rise from 0 to 4"):
            ops.mla_prefill(q, k, v, *(_ints(b) for b in bounds), scale)


@pytest.mark.parametrize("name, argument, change, error, words", BAD, ids=[f"{b[0]}-{b[1]}-{b[4]}" for b in BAD])
def test_explain_refuses_what_shapes_show_to_be_bad(name, argument, change, error, words):
    """As the op does; values inside tensors are not looked at."""
    args = good(name)
    if argument in ("slots", "block_table", "seq_lens") or argument.startswith("cu_seqlens"):
        changed = change(args[argument])
        same = isinstance(changed, torch.Tensor) and changed.shape == args[argument].shape
        if same and changed.dtype == args[argument].dtype and changed.device == args[argument].device:
            args[argument] = changed
            assert getattr(ops, name).explain(**args).op == name
            return
    args[argument] = change(args[argument])
    with pytest.raises(error, match=rf"{name}: .*\b{argument}\b"):
        getattr(ops, name).explain(**args)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_argument_is_a_type_error(name):
    args = good(name)
    first = next(iter(args))
    del args[first]
    for ask in (getattr(ops, name), getattr(ops, name).explain, getattr(ops, name).reference):
        with pytest.raises(TypeError, match=first):
            ask(**args)


# Life under torch.library and torch.compile


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for t in value or () if isinstance(t, torch.Tensor)]


def clones(args):
    """Copies in which views of one storage are still views of one storage."""
    copies = {}
    result = []
    for a in args:
        if isinstance(a, torch.Tensor):
            storage = a.untyped_storage()
            copy = copies.setdefault(storage.data_ptr(), storage.clone())
            a = torch.empty(0, dtype=a.dtype).set_(copy, a.storage_offset(), a.shape, a.stride())
        result.append(a)
    return result


def everything(function, args):
    """What the call returns and what it leaves in its arguments."""
    out = function(*args)
    return [*tensors(out), *tensors(args)]


def example(name, dtype=torch.bfloat16, **sizes):
    return ops.get(name).example(torch.device("cpu"), dtype, **{"tokens": 5, "heads": 2, "page_size": 16, **sizes})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_function_reference_and_torch_op_agree(name, dtype):
    args = example(name, dtype)
    function = getattr(ops, name)
    expected = everything(function, clones(args))
    assert function.explain(*args).backend == "reference"
    for other in (function.reference, getattr(torch.ops.ntops_mla, name)):
        for a, b in zip(everything(other, clones(args)), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_may_be_named_and_defaults_left_out(name):
    args = example(name)
    op, function = ops.get(name), getattr(ops, name)
    parameters = op._signature.parameters
    expected = everything(function, clones(args))
    for call in (function, function.reference, getattr(torch.ops.ntops_mla, name)):
        named = dict(zip(parameters, clones(args)))
        given = {
            key: value
            for key, value in named.items()
            if isinstance(value, torch.Tensor) or value != parameters[key].default
        }
        result = [*tensors(call(**given)), *tensors(named.values())]
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_the_functions_signature(name):
    """Names, order and defaults of the public function and of torch.ops are the same."""
    schema = getattr(torch.ops.ntops_mla, name).default._schema
    parameters = ops.get(name)._signature.parameters
    assert [a.name for a in schema.arguments] == list(parameters)
    for argument, parameter in zip(schema.arguments, parameters.values()):
        assert argument.has_default_value() == (parameter.default is not parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == parameter.default
    expected = {
        "latent_append": ["cache", "q_pe"],
        "latent_append_fp8": ["cache", "q_pe"],
        "latent_quantize": ["cache"],
    }
    assert written(name) == expected.get(name, [])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in WRITING])
def test_outputs_are_new(name, tokens, dtype):
    """No output shares memory with an input or with another output, and no input changes."""
    args = example(name, dtype, tokens=tokens)
    before = [t.clone() for t in tensors(args)]
    outputs = tensors(getattr(ops, name)(*args))
    storages = [t.untyped_storage().data_ptr() for t in outputs]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {t.untyped_storage().data_ptr() for t in tensors(args)}
    for t in outputs:
        t.fill_(float("nan") if t.is_floating_point() else 77)
    for t, copy in zip(tensors(args), before):
        assert torch.equal(t, copy)


@pytest.mark.parametrize("name", NAMES)
def test_fake_results_have_the_real_ones_form(name):
    args = example(name)
    real = tensors(getattr(ops, name)(*clones(args)))
    fake = tensors(getattr(ops, name)(*(a.to(META) if isinstance(a, torch.Tensor) else a for a in args)))
    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


OPCHECK_SIZES = {
    "small": {},
    "one token": {"tokens": 1, "heads": 1},
    "float32": {"dtype": torch.float32},
    "256 + 32": {"kv_lora_rank": 256, "rope": 32},
    "queries": {"q_heads": 3},
}


@pytest.mark.parametrize("sizes", OPCHECK_SIZES.values(), ids=OPCHECK_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, sizes):
    results = torch.library.opcheck(getattr(torch.ops.ntops_mla, name).default, example(name, **sizes))
    assert set(results.values()) == {"SUCCESS"}, results


def compiled_forms(name):
    """A graph around the op that uses its result, or what it wrote, within the graph."""
    function = getattr(ops, name)
    if name in WRITING:
        cache_at = list(ops.get(name)._signature.parameters).index("cache")
        # What lies behind the cache: q_pe of the appends, which is written to as well
        others = slice(cache_at + 1, None)

        def graph(first, *args):
            args = (first * 2, *args)
            cache = args[cache_at]
            # float64, because Inductor adds in another order than PyTorch
            before = cache.sum(dtype=torch.float64)
            function(*args)
            return before, cache.sum(dtype=torch.float64), cache * 3, *(t * 3 for t in tensors(args[others]))

    else:

        def graph(first, *args):
            result = function(first * 2, *args)
            return tuple(t * 3 for t in tensors(result))

    return graph


def check_compiled(name, backend, dtype=torch.float32, **sizes):
    args = example(name, dtype, **sizes)
    graph = compiled_forms(name)
    torch.compiler.reset()
    compiled = torch.compile(graph, fullgraph=True, backend=backend)
    for _ in range(2):  # the second call reuses the graph
        for a, b in zip(everything(compiled, clones(args)), everything(graph, clones(args)), strict=True):
            torch.testing.assert_close(a, b)
    if name in WRITING:
        args = clones(args)
        before, after, *_ = compiled(*args)
        assert before == 0 and after != 0
        assert int(cache_of(name, args).flatten(0, 1).any(-1).sum()) == 5, "the caller's cache"


@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    check_compiled(name, "aot_eager")


@pytest.mark.parametrize("name", ["latent_append", "latent_append_fp8"])
def test_compile_with_queries(name):
    check_compiled(name, "aot_eager", q_heads=2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", NAMES)
def test_compile_with_inductor(name):
    check_compiled(name, "inductor")


def test_compile_with_changing_lengths():
    """A server meets ever new numbers of tokens: two graphs, not one for each."""
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph

    compiled = torch.compile(lambda *args: ops.rope(*args), fullgraph=True, backend=count)
    torch.compiler.reset()
    for tokens in (3, 5, 7, 11):
        args = example("rope", tokens=tokens)
        assert torch.equal(compiled(*args), ops.rope(*args))
    assert len(frames) == 2


# What an import brings in, and memory


def run(code, timeout=60):
    """`code` in a Python of its own, in the repository's root; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_import_brings_in_no_heavy_module():
    """Neither does running an op on a CPU."""
    said = run(
        """
        import sys, torch
        torch_alone = set(sys.modules)
        import ntops_mla
        ntops_mla.ops.rms_norm(*ntops_mla.ops.get("rms_norm").example())
        print(sorted({name.partition(".")[0] for name in set(sys.modules) - torch_alone}))
        """
    )
    assert "'ntops_mla'" in said
    for heavy in ("triton", "ninetoothed", "transformers", "safetensors", "vllm", "flash_mla"):
        assert f"'{heavy}'" not in said, said


# 16384 keys: what the call allocates above its inputs. All scores of the prefill would be 2 GiB, all gathered rows of
# the decode (40 requests that share one history) 720 MiB, one mask for 2000 requests as wide as the longest 375 MiB,
# the keys of each of 16 tokens in float32 576 MiB twice, the masks of a run of 8192 tokens 320 MiB.
MEMORY = {
    "prefill": """
        q, k, v = (torch.randn(keys, 2, d).bfloat16() for d in (192, 192, 128))
        args = q, k, v, ints(0, keys), ints(0, keys), 192**-0.5
        call = ops.mla_prefill
    """,
    "prefill with a past": """
        q, k, v = (torch.randn(n, 2, d).bfloat16() for n, d in ((8192, 192), (keys, 192), (keys, 128)))
        args = q, k, v, ints(0, 8192), ints(0, keys), 192**-0.5
        call = ops.mla_prefill
    """,
    "decode": """
        cache = torch.empty(keys // 64, 64, 576, dtype=torch.bfloat16).normal_()
        q = torch.randn(40, 1, 2, 576).bfloat16()
        table = torch.arange(keys // 64, dtype=torch.int32).expand(40, -1)
        args = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], table, ints(*[keys] * 40), 576**-0.5
        call = ops.mla_decode
    """,
    "decode of many short and one long": """
        cache = torch.empty(4 * keys // 64, 64, 576, dtype=torch.bfloat16).normal_()
        q = torch.randn(2000, 1, 2, 576).bfloat16()
        table = torch.arange(4 * keys // 64, dtype=torch.int32).expand(2000, -1)
        lengths = ints(*[64] * 1999, 4 * keys)
        args = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], table, lengths, 576**-0.5
        call = ops.mla_decode
    """,
    "decode of several tokens by rows": """
        import importlib
        from ntops_mla.ops import _attention, _paged
        decode = importlib.import_module("ntops_mla.ops._paged")
        decode.attend = lambda q, k, v, scale, mask, exact_lse: _attention._attend_by_rows(q, k, v, scale, mask, False)
        cache = torch.empty(keys // 64, 64, 576, dtype=torch.bfloat16).normal_()
        q = torch.randn(1, 16, 2, 576).bfloat16()
        table = torch.arange(keys // 64, dtype=torch.int32)[None]
        args = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], table, ints(keys), 576**-0.5
        call = ops.mla_decode
    """,
    "decode of a long run": """
        cache = torch.randn(keys // 128, 64, 576).bfloat16()
        q = torch.randn(1, keys // 2, 2, 576).bfloat16()
        table = torch.arange(keys // 128, dtype=torch.int32)[None]
        args = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], table, ints(keys // 2), 576**-0.5
        call = ops.mla_decode
    """,
}


# What was measured and about half as much again, where that is below the limit of all.
MEBIBYTES = {
    "decode of many short and one long": 60,
    "decode of several tokens by rows": 60,
    "decode of a long run": 90,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_linear_in_the_keys(case):
    # Not ru_maxrss, which a child inherits from the process that started it.
    code = r"""
        import re, torch
        from ntops_mla import ops
        keys = 16384

        def ints(*values):
            return torch.tensor(values, dtype=torch.int32)

        def peak():
            return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024

        call(*small)
        before = peak()
        out, lse = call(*args)
        growth = peak() - before
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
        print(growth)
    """
    code = textwrap.dedent(code)
    # A small call first: what the first call of all allocates is not the keys'.
    name = "mla_decode" if case.startswith("decode") else "mla_prefill"
    setup = textwrap.dedent(MEMORY[case]) + f'small = ops.get("{name}").example(heads=2)\n'
    growth = float(run(code.replace("call(*small)", setup + "call(*small)"), timeout=120))
    assert 0 < growth < MEBIBYTES.get(case, 320), f"{growth:.0f} MiB"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_step_over_two_layers_does_not_copy_the_caches():
    """What it allocates does not grow with the pages: told by the allocator, since a clock is no judge."""
    kv_a, weight, cos, sin, slots, _ = append_inputs(2, 16, torch.float32)
    slots[:] = torch.tensor([3, 20])
    table, lengths = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)

    def step(kv_a, q, caches):
        for cache in caches:
            ops.latent_append(kv_a, weight, cos, sin, slots, cache, 1e-6, q[..., 512:])
            q_nope, q_pe = q[:, None, :, :512], q[:, None, :, 512:]
            out, _ = ops.mla_decode(q_nope, q_pe, cache[..., :512], cache[..., 512:], *given)
            kv_a = kv_a + out.mean()
        return kv_a

    given = (table, lengths, 0.1)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    allocated = []
    for pages in (4, 4000):  # a cache of 4000 pages is 147 MB
        caches = [torch.zeros(pages, 16, 576) for _ in range(2)]
        q = torch.randn(2, 3, 576)
        call = lambda: compiled(kv_a, q, caches)  # noqa: B023, E731
        call()
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        allocated.append(sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()))
        assert all(int(cache.view(-1, 576).any(-1).sum()) == 2 for cache in caches), "the caller's caches"
    assert 0 < allocated[1] < 2 * allocated[0] + (1 << 20), allocated
