"""mla_sparse's kernel, with mla_combine, against float64; the tile in the interpreter is 16 heads by 16 keys."""

import random

import pytest
import torch

from ntops_mla import StrictFallbackError, ops
from ntops_mla.testing import assert_close
from tests.interpreted.numerics import DTYPES, by_kernel, check_sparse
from tests.test_mla_sparse import LAYOUTS, NOWHERE, sparse_inputs
from tests.test_ops import LSE, SINGLE, name_of, small


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 64])
def test_heads(heads, dtype):
    check_sparse(sparse_inputs([33, 0, 5], 33, heads=heads, dtype=dtype), num_splits=1)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("page_size", [1, 2, 61, 64, 69, 576])
@pytest.mark.parametrize("layout", ["joined", "pages padded"])
def test_page_sizes(layout, page_size, num_splits):
    """Pages that follow each other and pages that do not are two forms of the kernel."""
    sizes = {"page_size": page_size, "pages": -(-100 // page_size) + 1, "layout": layout}
    check_sparse(sparse_inputs([35, 3], 35, dtype=torch.bfloat16, **sizes), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("topk", [1, 15, 16, 17, 48])
def test_numbers_of_indices_around_the_borders_of_tiles(topk, num_splits):
    check_sparse(sparse_inputs([topk, topk // 2, 1, 0], topk, s_q=2, dtype=torch.float32), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [None, 1, 2, 3, 4, 5, 6, 40])
def test_splits(num_splits):
    """Fewer splits than tiles, as many, and more, which stay empty; splits and tiles in which no index names a key."""
    check_sparse(sparse_inputs([70, 0, 1, 5], 70, heads=3, dtype=torch.float32), num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_lengths(num_splits, dtype):
    """None, negative ones, all, and beyond; what follows names NaN. The splits are those of each token's length."""
    lengths = [0, -2147483648, 1, 16, 39, 40, 2147483647]
    args = sparse_inputs([40, 40, 40, 40, 0, 40, 33], 40, heads=3, lengths=lengths, dtype=dtype)
    check_sparse(args, num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_splits_that_are_chosen(dtype, launches):
    """A list as long as three splits; one token has all of them, one few, one none."""
    check_sparse(sparse_inputs([300, 40, 0], 300, heads=2, lengths=[300, 40, 300], dtype=dtype))
    assert [name for name, _ in launches] == ["mla_sparse", "mla_combine"]


@pytest.mark.parametrize("num_splits", [1, 3])
def test_no_index_names_a_key(num_splits):
    """With a cache of NaN."""
    q_nope, q_pe, kv, pe, _, scale, _ = sparse_inputs([0], 1, dtype=torch.bfloat16)
    kv.fill_(float("nan"))
    pe.fill_(float("nan"))
    slots = kv.shape[0] * kv.shape[1]
    indices = torch.tensor([*NOWHERE, slots, slots + 1, slots * 64] * 4, dtype=torch.int32)[None, None]
    check_sparse((q_nope, q_pe, kv, pe, indices, scale), num_splits=num_splits)
    check_sparse((q_nope, q_pe, kv[:0], pe[:0], torch.zeros_like(indices), scale), num_splits=num_splits)


def test_tiles_without_keys_before_between_and_behind():
    q_nope, q_pe, kv, pe, indices, scale, _ = sparse_inputs([16], 16, heads=3, dtype=torch.float32)
    nothing = torch.full((1, 1, 16), -1, dtype=torch.int32)
    for tiles in ((nothing, indices), (indices, nothing, indices), (nothing, nothing, indices, nothing)):
        for num_splits in (1, 2):
            check_sparse((q_nope, q_pe, kv, pe, torch.cat(tiles, -1), scale), num_splits=num_splits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
def test_layouts(layout, strided):
    """Caches in one storage and in two, of odd strides; strided queries, indices and lengths."""
    args = sparse_inputs(
        [20, 0, 11, 3], 20, s_q=2, page_size=17, layout=layout, strided=strided, lengths=[20, 3, 19, 25],
        dtype=torch.bfloat16,
    )  # fmt: skip
    check_sparse(args, num_splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("num_splits", [1, 2])
def test_small_heads(num_splits, dtype):
    check_sparse(sparse_inputs([37, 0, 9], 40, latent=256, rope=32, dtype=dtype), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_keys_of_unit_variance(dtype, num_splits):
    """Not in bfloat16, whose rounding of the weights alone is beyond the tolerance for values around 1."""
    args = sparse_inputs([130, 1], 130, heads=3, dtype=dtype)
    for cache in args[2:4]:
        cache.mul_(10)
    check_sparse(args, num_splits=num_splits)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_large_scores(sign, num_splits):
    """Scores of +-2000: nothing overflows; with -2000 the hidden ones must not win."""
    q_nope, q_pe, kv, pe, indices, _, _ = sparse_inputs([40, 3], 40, heads=3, dtype=torch.float32)
    q_nope.fill_(sign * 10.0)
    q_pe.zero_()
    kv[~kv.isnan()] = 10.0
    args = q_nope, q_pe, kv, pe, indices, 2000 / (512 * 100)
    out, lse, most = by_kernel(ops.mla_sparse, *args, num_splits=num_splits, want_max=True)
    seen = torch.tensor([40.0, 3.0]).log()[:, None, None].expand(2, 1, 3)
    assert_close(most, torch.full_like(most, sign * 2000.0), LSE)
    assert_close(lse, sign * 2000.0 + seen, LSE)
    assert_close(out, torch.full_like(out, 10.0), SINGLE)


def test_duplicates_count_as_often_as_they_occur():
    q_nope, q_pe, kv, pe, indices, scale, _ = sparse_inputs([5], 5, dtype=torch.float32)
    check_sparse((q_nope, q_pe, kv, pe, indices.repeat(1, 1, 7), scale), num_splits=2)


@pytest.mark.parametrize("counts", [[], [0], [0, 0], [1]], ids=str)
@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_degenerate_batches(counts, num_splits):
    out, lse, most = check_sparse(sparse_inputs(counts, 8, dtype=torch.float32), num_splits=num_splits)
    assert out.shape == (len(counts), 1, 4, 512) and lse.shape == most.shape == (len(counts), 1, 4)


def test_without_heads_rows_or_indices():
    q_nope, q_pe, kv, pe, indices, scale, _ = sparse_inputs([0, 0], 8, dtype=torch.float32)
    args = kv, pe, indices, scale
    assert by_kernel(ops.mla_sparse, q_nope[:, :, :0], q_pe[:, :, :0], *args)[0].shape == (2, 1, 0, 512)
    none = by_kernel(ops.mla_sparse, q_nope[:, :0], q_pe[:, :0], kv, pe, indices[:, :0], scale)
    assert none[0].shape == (2, 0, 4, 512)
    for num_splits in (None, 1, 2):
        check_sparse((q_nope, q_pe, kv, pe, indices[..., :0], scale), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_max_logits_only_where_they_are_wanted(num_splits):
    args = sparse_inputs([40, 0], 40, dtype=torch.bfloat16)
    out, lse, most = by_kernel(ops.mla_sparse, *args, num_splits=num_splits)
    again = by_kernel(ops.mla_sparse, *args, num_splits=num_splits, want_max=True)
    assert most.shape == (0,) and again[2].shape == lse.shape
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_one_kernel_for_pages_of_any_size(monkeypatch):
    """What is compiled for does not depend on the caches' shapes."""
    forms = set()
    for page_size, pages in ((1, 100), (61, 2), (64, 2)):
        args = sparse_inputs([5], 8, page_size=page_size, pages=pages, dtype=torch.bfloat16)
        forms.add(ops.get("mla_sparse").spec.key(*args, None, False))
    assert len(forms) == 1


def test_inputs_stay_and_the_kernel_takes_them_as_they_are(launches):
    args = sparse_inputs([37, 5], 40, lengths=[40, 6], dtype=torch.bfloat16)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    check_sparse(args, num_splits=2)
    for value, copy in zip((a for a in args if isinstance(a, torch.Tensor)), before, strict=True):
        torch.testing.assert_close(value, copy, rtol=0, atol=0, equal_nan=True)
    bf16, f32, i32 = torch.bfloat16, torch.float32, torch.int32
    assert launches == [
        ("mla_sparse", (bf16, bf16, bf16, bf16, i32, i32, f32, f32, f32)),
        ("mla_combine", (f32, f32, i32, i32, bf16, f32)),
    ]


@pytest.mark.parametrize("shape", ["pages", "one page", "pages of one"])
def test_a_cache_of_more_than_2_to_the_31_elements(shape, beyond_int32):
    """The last slots are used, and one of the first."""
    slots = 2**31 // 576 + 300
    slots -= slots % 64
    page_size = {"pages": 64, "one page": slots, "pages of one": 1}[shape]
    cache = beyond_int32((slots // page_size, page_size, 576), (page_size * 576, 576, 1), torch.float16)
    used = [slots - 1, 2, slots - 64, slots - 65]
    for slot in used:
        cache[slot // page_size, slot % page_size] = small(576, dtype=cache.dtype)
    indices = torch.tensor([[[*used, slots, 2147483647]]], dtype=torch.int32)
    q_nope, q_pe = (torch.randn(1, 1, 3, columns).half() for columns in (512, 64))
    check_sparse((q_nope, q_pe, cache[..., :512], cache[..., 512:], indices, 576**-0.5))


def test_far_apart_queries_and_indices(beyond_int32):
    """Heads, tokens and lists that int32 offsets do not reach."""
    q_nope, q_pe, kv, pe, indices, scale, _ = sparse_inputs([5, 3, 8], 8, heads=3, dtype=torch.float16)
    far = [beyond_int32(q.shape, (512, 512, 2**30 + 8, 1), q.dtype).copy_(q) for q in (q_nope, q_pe)]
    check_sparse((*far, kv, pe, indices, scale))
    tokens = [beyond_int32(q.shape, (2**30 + 8, 4096, 512, 1), q.dtype).copy_(q) for q in (q_nope, q_pe)]
    check_sparse((*tokens, kv, pe, indices, scale), num_splits=2)
    lists = beyond_int32(indices.shape, (2**30 + 8, 8, 1), torch.int32).copy_(indices)
    check_sparse((q_nope, q_pe, kv, pe, lists, scale))


def test_slots_too_far_apart_are_refused(beyond_int32):
    """A whole cache is not copied for one call."""
    q_nope, q_pe, _kv, pe, *rest = sparse_inputs([5], 8, page_size=16, dtype=torch.float16)
    far = beyond_int32((3, 16, 512), (512, 2**28, 1), torch.float16)
    with pytest.raises(StrictFallbackError, match="int32"):
        ops.mla_sparse(q_nope, q_pe, far, pe, *rest)


def test_the_same_bits_every_time():
    args = sparse_inputs([70, 0, 33], 70, dtype=torch.bfloat16)
    first, second = (by_kernel(ops.mla_sparse, *args, num_splits=3, want_max=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("number", range(6))
def test_random_calls(number, _seed):
    """Everything at once."""
    draw = random.Random(int(torch.randint(1 << 30, ())))
    topk, s_q, batch = draw.randint(1, 90), draw.randint(1, 3), draw.randint(1, 3)
    tokens = s_q * batch
    latent, rope = draw.choice([(512, 64), (256, 32)])
    args = sparse_inputs(
        [draw.randint(0, topk) for _ in range(tokens)],
        topk,
        s_q=s_q,
        dtype=draw.choice(DTYPES),
        heads=draw.choice([1, 2, 5, 16, 17]),
        page_size=draw.choice([1, 2, 16, 61, 64]),
        pages=draw.randint(1, 9),
        latent=latent,
        rope=rope,
        layout=draw.choice(LAYOUTS),
        strided=draw.random() < 0.5,
        lengths=draw.choice([None, [draw.randint(-1, topk + 1) for _ in range(tokens)]]),
    )
    check_sparse(args, draw.choice([None, 1, 2, 3, 5, 11]))
