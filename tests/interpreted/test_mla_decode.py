"""mla_decode's and mla_combine's kernels against float64; the tile in the interpreter is 16 rows by 16 keys."""

import random

import pytest
import torch

from ntops_mla import StrictFallbackError, ops
from ntops_mla.testing import assert_close
from tests.interpreted.numerics import DTYPES, by_kernel, check_decode
from tests.test_ops import GARBAGE_PAGE, HALF, LSE, SINGLE, decode_inputs, name_of, small


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 63, 64, 128])
def test_heads(heads, dtype):
    check_decode(decode_inputs([17, 0, 1], heads=heads, dtype=dtype))


def borders(s_q):
    """Rows that see no key of a tile, of a split, and none at all; new tokens on both sides of a block of rows."""
    return {"lengths": [0, 1, 3, 15, 16, 17, 19, 31, 33, 49], "s_q": s_q, "heads": 5, "page_size": 32}


@pytest.mark.parametrize("causal, num_splits", [(True, 1), (True, 3), (False, 3)])
@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_lengths_around_the_borders_of_tiles(s_q, causal, num_splits):
    check_decode(decode_inputs(**borders(s_q), dtype=torch.float32), causal, num_splits)


@pytest.mark.parametrize("s_q, num_splits", [(2, 3), (4, 1)])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_lengths_around_the_borders_of_tiles_in_two_bytes(dtype, s_q, num_splits):
    check_decode(decode_inputs(**borders(s_q), dtype=dtype), True, num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "page_size, latent, rope", [*[(n, 512, 64) for n in (16, 32, 64, 128)], *[(n, 256, 32) for n in (16, 64)]]
)
def test_page_sizes(page_size, latent, rope, dtype):
    """Two new tokens on both sides of a page's border; splits end within pages."""
    lengths = [page_size - 1, 0, page_size + 1, 1]
    args = decode_inputs(lengths, latent=latent, rope=rope, page_size=page_size, s_q=2, dtype=dtype)
    check_decode(args, num_splits=2)


@pytest.mark.parametrize(
    "num_splits, dtype",
    [(n, torch.float32) for n in (None, 1, 2, 3, 4, 5, 6, 7, 40)] + [(n, d) for n in (1, 40) for d in HALF],
    ids=str,
)
def test_splits(num_splits, dtype):
    """Of 5, 0, 3 and 1 tiles: fewer splits than tiles, as many, and more, which stay empty."""
    check_decode(decode_inputs([70, 0, 33, 16], heads=3, dtype=dtype), num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("s_q", [1, 2])
def test_splits_that_are_chosen(s_q, dtype, launches):
    """A table as wide as three splits; one request fills it, one is short, one is empty."""
    check_decode(decode_inputs([520, 40, 0], heads=2, s_q=s_q, dtype=dtype))
    assert [name for name, _ in launches] == ["mla_decode", "mla_combine"]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_lengths_far_below_the_tables_width(dtype):
    """As a replayed graph has them: the splits are planned for the table."""
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([5, 0, 33], heads=3, dtype=dtype)
    wide = torch.full((3, 40), GARBAGE_PAGE, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    check_decode((q_nope, q_pe, kv, pe, wide, seq_lens, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", ["joined", "rows padded", "apart", "odd strides", "swapped"])
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
def test_layouts(layout, strided, dtype):
    """Caches in one storage and in two, of odd strides; a strided q, q_pe, block table and lengths."""
    args = decode_inputs([37, 0, 16, 5], page_size=16, s_q=2, layout=layout, strided=strided, dtype=dtype)
    check_decode(args, num_splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_arguments_as_the_module_passes_them(dtype):
    """q_nope as a product's transpose, q_pe as the last 64 of 192 columns, a transposed and sliced table."""
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([37, 16], page_size=16, heads=20, dtype=dtype)
    q_nope = q_nope.flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1).unflatten(0, (2, 1))
    wide = torch.full((2, 1, 20, 192), float("nan"), dtype=dtype)
    wide[..., 128:] = q_pe
    tall = torch.full((9, 4), GARBAGE_PAGE, dtype=torch.int32)
    tall[1 : 1 + table.shape[1], 1:3] = table.t()
    check_decode((q_nope, wide[..., 128:], kv, pe, tall.t()[1:3, 1:], seq_lens, scale))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_flash_mlas_inputs(dtype, num_splits):
    """Queries as small as the keys, so that all weights are alike."""
    args = decode_inputs([130, 64, 0, 1], heads=3, s_q=2, dtype=dtype)
    for q in args[:2]:
        q.div_(10)
    check_decode(args, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_keys_of_unit_variance(dtype, num_splits):
    """Not in bfloat16, whose rounding of the weights alone is beyond the tolerance for values around 1."""
    args = decode_inputs([130, 64, 0, 1], heads=3, s_q=2, dtype=dtype)
    for cache in args[2:4]:
        cache.mul_(10)
    check_decode(args, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign, num_splits):
    """Scores of +-2000: nothing overflows; with -2000 the hidden ones must not win."""
    args = list(decode_inputs([40, 3], heads=3, s_q=2, dtype=torch.float32))
    args[0].fill_(sign * 10.0)
    args[1].zero_()
    args[2][~args[2].isnan()] = 10.0
    args[6] = 2000 / (512 * 100)
    out, lse = by_kernel(ops.mla_decode, *args, num_splits=num_splits)
    seen = torch.tensor([[39, 40], [2, 3]]).log()[:, None].expand(2, 3, 2)
    assert_close(lse, sign * 2000.0 + seen, LSE)
    assert_close(out, torch.full_like(out, 10.0), SINGLE)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_largest_score_may_come_last(dtype, num_splits):
    """The running maximum rises in every tile, or never."""
    for steps in (torch.arange(48), torch.arange(48).flip(0)):
        q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([48], heads=3, dtype=dtype)
        kv[table[0, 0], :48, 0] = (steps / 48).to(dtype)
        q_nope[..., 0] = 100
        check_decode((q_nope, q_pe, kv, pe, table, seq_lens, scale), num_splits=num_splits)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]], ids=str)
@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_degenerate_batches(lengths, num_splits):
    out, lse = check_decode(decode_inputs(lengths, dtype=torch.float32), num_splits=num_splits)
    assert out.shape == (len(lengths), 1, 4, 512) and lse.shape == (len(lengths), 4, 1)


def test_without_heads_rows_or_pages():
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([0, 0], dtype=torch.float32)
    rest = kv, pe, table, seq_lens, scale
    assert by_kernel(ops.mla_decode, q_nope[:, :, :0], q_pe[:, :, :0], *rest)[0].shape == (2, 1, 0, 512)
    assert by_kernel(ops.mla_decode, q_nope[:, :0], q_pe[:, :0], *rest)[0].shape == (2, 0, 4, 512)
    for num_splits in (None, 1, 2):
        check_decode((q_nope, q_pe, kv[:0], pe[:0], table[:, :0], seq_lens, scale), num_splits=num_splits)


def test_lse_is_a_natural_logarithm():
    """One key, whose score is known."""
    q = torch.zeros(1, 1, 1, 512)
    q[..., 0] = 3.0
    kv, pe = torch.zeros(1, 16, 512), torch.zeros(1, 16, 64)
    kv[0, 0, 0] = 2.0
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out, lse = by_kernel(ops.mla_decode, q, torch.zeros(1, 1, 1, 64), kv, pe, table, length, 0.5)
    assert abs(lse.item() - 3) < 1e-6 and torch.equal(out[0, 0, 0], kv[0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_requests_may_share_pages(dtype):
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([40, 40], page_size=16, dtype=dtype)
    table[1, :2] = table[0, :2]
    check_decode((q_nope, q_pe, kv, pe, table, seq_lens, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_row_per_token_is_a_causal_batch(dtype):
    """Bit for bit: the same tiles in the same order."""
    q_nope, q_pe, kv, pe, table, _, scale = args = decode_inputs([35], s_q=3, page_size=16, dtype=dtype)
    out, lse = by_kernel(ops.mla_decode, *args, num_splits=1)
    rows = [q.transpose(0, 1) for q in (q_nope, q_pe)]
    lengths = torch.tensor([33, 34, 35], dtype=torch.int32)
    by_row = by_kernel(ops.mla_decode, *rows, kv, pe, table.expand(3, -1), lengths, scale, num_splits=1)
    assert torch.equal(by_row[0][:, 0], out[0]) and torch.equal(by_row[1][..., 0].T, lse[0])


def test_the_same_bits_every_time():
    args = decode_inputs([70, 0, 33], s_q=2, dtype=torch.bfloat16)
    first, second = (by_kernel(ops.mla_decode, *args, num_splits=3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_inputs_stay_and_the_kernel_takes_them_as_they_are(launches):
    args = decode_inputs([37, 5], page_size=16, dtype=torch.bfloat16)
    before = [t.clone() for t in args[:6]]
    check_decode(args, num_splits=2)
    for value, copy in zip(args, before):
        torch.testing.assert_close(value, copy, rtol=0, atol=0, equal_nan=True)
    bf16, f32, i32 = torch.bfloat16, torch.float32, torch.int32
    assert launches == [
        ("mla_decode", (bf16, bf16, bf16, bf16, i32, i32, i32, f32, f32, bf16)),
        ("mla_combine", (f32, f32, i32, i32, bf16, f32)),
    ]


@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
def test_a_cache_of_more_than_2_to_the_31_elements(apart, beyond_int32):
    """The last pages are used, and one of the first."""
    page_size, width = 64, 512 if apart else 576
    pages = 2**31 // (page_size * width) + 3
    cache = beyond_int32((pages, page_size, width), (page_size * width, width, 1), torch.float16)
    pe = beyond_int32((pages, page_size, 64), (page_size * 512, 512, 1), torch.float16) if apart else cache[..., 512:]
    kv = cache[..., :512]
    used = [pages - 1, 2, pages - 2]
    for page in used:
        kv[page], pe[page] = small(page_size, 512, dtype=kv.dtype), small(page_size, 64, dtype=kv.dtype)
    table = torch.tensor([[*used[:2], GARBAGE_PAGE], [used[2], GARBAGE_PAGE, GARBAGE_PAGE]], dtype=torch.int32)
    q_nope, q_pe = (torch.randn(2, 1, 3, columns).half() for columns in (512, 64))
    check_decode((q_nope, q_pe, kv, pe, table, torch.tensor([100, 30], dtype=torch.int32), 576**-0.5))


@pytest.mark.parametrize("s_q", [1, 2])
def test_heads_far_apart(s_q, beyond_int32):
    q_nope, q_pe, *rest = decode_inputs([5], s_q=s_q, heads=3, dtype=torch.float16)
    far = [beyond_int32(q.shape, (512, 512, 2**30 + 8, 1), q.dtype).copy_(q) for q in (q_nope, q_pe)]
    check_decode((*far, *rest))


def test_slots_too_far_apart_are_refused(beyond_int32):
    """A whole cache is not copied for one call."""
    q_nope, q_pe, _kv, pe, *rest = decode_inputs([5], page_size=16, dtype=torch.float16)
    far = beyond_int32((3, 16, 512), (512, 2**28, 1), torch.float16)
    with pytest.raises(StrictFallbackError, match="int32"):
        ops.mla_decode(q_nope, q_pe, far, pe, *rest)


@pytest.mark.parametrize("number", range(6))
def test_random_calls(number, _seed):
    """Everything at once."""
    draw = random.Random(int(torch.randint(1 << 30, ())))
    page_size, heads = draw.choice([16, 32, 64, 128]), draw.choice([1, 2, 5, 7, 16, 17])
    latent, rope = draw.choice([(512, 64), (256, 32)])
    args = decode_inputs(
        [draw.choice([0, 1, draw.randrange(20), draw.randrange(100)]) for _ in range(draw.randint(1, 4))],
        dtype=draw.choice(DTYPES),
        heads=heads,
        s_q=draw.randint(1, 5),
        page_size=page_size,
        latent=latent,
        rope=rope,
        layout=draw.choice(["joined", "rows padded", "apart", "odd strides", "swapped"]),
        strided=draw.random() < 0.5,
    )
    check_decode(args, draw.random() < 0.7, draw.choice([None, 1, 2, 3, 5, 11]))


def test_half_is_no_worse_than_its_dtype_allows():
    """The tolerances stand for both: float16 is eight times closer to float64 than bfloat16."""
    errors = {}
    for dtype in HALF:
        args = decode_inputs([60, 33], heads=3, dtype=dtype)
        out, _ = by_kernel(ops.mla_decode, *args)
        exact, _ = ops.mla_decode.reference(*(a.double() if a.is_floating_point() else a for a in args[:6]), args[6])
        errors[dtype] = (out.double() - exact).abs().max() / exact.abs().max()
    assert errors[torch.float16] < 2e-3 and errors[torch.bfloat16] < 1.6e-2


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_a_length_past_the_table_reads_nothing_past_it(num_splits):
    """Of a device nobody reads the lengths: that request's result is none, and the others' are as they were."""
    args = list(decode_inputs([37, 16], page_size=16, heads=3, dtype=torch.float32))
    expected = ops.mla_decode(*args, num_splits=num_splits)
    args[5] = torch.tensor([37, 300], dtype=torch.int32)
    out, lse = ops.mla_decode(*args, num_splits=num_splits)
    assert_close(out[0], expected[0][0], SINGLE)
    assert_close(lse[0], expected[1][0], LSE)
