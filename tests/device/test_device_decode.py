"""mla_decode on the device against float64, over everything that decides about its tiles, splits and addresses."""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import assert_close
from tests.device.on_device import DTYPES, NAN, check_decode, on, pick, run, scaled
from tests.test_ops import GARBAGE_PAGE, HALF, LSE, SINGLE, decode_inputs, name_of

pytestmark = pytest.mark.device
# Around the borders of tiles, pages and splits.
BORDERS = scaled(0, 1, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 513)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 63, 64, 128])
def test_heads(device, heads, dtype):
    check_decode(device, decode_inputs(scaled(300, 0, 1, 33, 257), heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_lengths_around_the_borders(device, s_q, causal, num_splits, dtype):
    """Rows that see no key of a tile, of a split, and none at all."""
    args = decode_inputs(BORDERS, s_q=s_q, heads=pick(16, 3), page_size=32, dtype=dtype)
    check_decode(device, args, causal, num_splits)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("s_q, heads", [(2, 63), (4, 20), (2, 128), (3, 1)])
def test_new_tokens_on_both_sides_of_a_block_of_rows(device, s_q, heads, dtype):
    check_decode(device, decode_inputs(scaled(200, 0, 2, 65), s_q=s_q, heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("latent, rope", [(512, 64), (256, 32)], ids=str)
def test_page_sizes(device, page_size, latent, rope, dtype):
    """Two new tokens on both sides of a page's border; splits end within pages."""
    lengths = [page_size - 1, 0, page_size + 1, 1, pick(5, 1) * page_size]
    args = decode_inputs(lengths, latent=latent, rope=rope, page_size=page_size, s_q=2, heads=pick(20, 3), dtype=dtype)
    check_decode(device, args, num_splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("num_splits", [None, 1, 2, 5, 7, 40])
def test_splits(device, num_splits, dtype):
    """Fewer splits than tiles, as many, and more, which stay empty."""
    args = decode_inputs(scaled(1000, 0, 333, 16, 513), heads=pick(16, 3), page_size=pick(64, 16), dtype=dtype)
    check_decode(device, args, num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("s_q", [1, 2])
def test_splits_that_are_chosen(device, s_q, dtype):
    """One request fills the table, one is short, one is empty."""
    check_decode(device, decode_inputs([pick(4000, 520), 40, 0], heads=pick(16, 2), s_q=s_q, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_lengths_far_below_the_tables_width(device, dtype):
    """As a replayed graph has them: the splits are planned for the table."""
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([5, 0, 33], heads=3, dtype=dtype)
    wide = torch.full((3, pick(500, 40)), GARBAGE_PAGE, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    check_decode(device, (q_nope, q_pe, kv, pe, wide, seq_lens, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["joined", "rows padded", "apart", "odd strides", "swapped"])
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
def test_layouts(device, layout, strided, dtype):
    """Caches in one storage and in two, of odd strides; a strided q, q_pe, block table and lengths."""
    args = decode_inputs(scaled(290, 0, 128, 40), page_size=16, s_q=2, layout=layout, strided=strided, dtype=dtype)
    check_decode(device, args, num_splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_arguments_as_the_module_passes_them(device, dtype):
    """q_nope as a product's transpose, q_pe as the last 64 of 192 columns, a transposed and sliced table."""
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([37, 16], page_size=16, heads=20, dtype=dtype)
    q_nope = q_nope.flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1).unflatten(0, (2, 1))
    wide = torch.full((2, 1, 20, 192), NAN, dtype=dtype)
    wide[..., 128:] = q_pe
    tall = torch.full((9, 4), GARBAGE_PAGE, dtype=torch.int32)
    tall[1 : 1 + table.shape[1], 1:3] = table.t()
    check_decode(device, (q_nope, wide[..., 128:], kv, pe, tall.t()[1:3, 1:], seq_lens, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_large_batch(device, dtype):
    lengths = torch.randint(0, pick(2000, 40), (pick(128, 5),)).tolist()
    check_decode(device, decode_inputs(lengths, heads=pick(16, 3), dtype=dtype))


@pytest.mark.parametrize("heads", [1, 128])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_a_long_request(device, dtype, heads):
    check_decode(device, decode_inputs([pick(100_001, 601)], heads=pick(heads, min(heads, 4)), dtype=dtype))


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(device, sign, num_splits):
    """Scores of +-2000: nothing overflows; with -2000 the hidden ones must not win."""
    args = list(decode_inputs([40, 3], heads=3, s_q=2, dtype=torch.float32))
    args[0].fill_(sign * 10.0)
    args[1].zero_()
    args[2][~args[2].isnan()] = 10.0
    args[6] = 2000 / (512 * 100)
    out, lse = run(ops.mla_decode, *on(device, args), num_splits=num_splits)
    seen = torch.tensor([[39, 40], [2, 3]]).log()[:, None].expand(2, 3, 2)
    assert_close(lse, sign * 2000.0 + seen, LSE)
    assert_close(out, torch.full(out.shape, 10.0), SINGLE)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_largest_score_may_come_last(device, dtype, num_splits):
    """The running maximum rises in every tile, or never."""
    length = pick(300, 48)
    for steps in (torch.arange(length), torch.arange(length).flip(0)):
        q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([length], heads=3, page_size=16, dtype=dtype)
        pages = table[0, : -(-length // 16)].long()
        column = kv[pages, :, 0].flatten()
        column[:length] = (steps / length).to(dtype)
        kv[pages, :, 0] = column.view(-1, 16)
        q_nope[..., 0] = 100
        check_decode(device, (q_nope, q_pe, kv, pe, table, seq_lens, scale), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]], ids=str)
def test_degenerate_batches(device, lengths, num_splits):
    out, lse = check_decode(device, decode_inputs(lengths, dtype=torch.bfloat16), num_splits=num_splits)
    assert out.shape == (len(lengths), 1, 4, 512) and lse.shape == (len(lengths), 4, 1)


def test_without_heads_rows_or_pages(device):
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([0, 0], dtype=torch.bfloat16)
    given = on(device, (q_nope, q_pe, kv, pe, table, seq_lens, scale))
    rest = given[2:]
    assert run(ops.mla_decode, given[0][:, :, :0], given[1][:, :, :0], *rest)[0].shape == (2, 1, 0, 512)
    assert run(ops.mla_decode, given[0][:, :0], given[1][:, :0], *rest)[0].shape == (2, 0, 4, 512)
    for num_splits in (None, 1, 2):
        check_decode(device, (q_nope, q_pe, kv[:0], pe[:0], table[:, :0], seq_lens, scale), num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_requests_may_share_pages(device, dtype):
    q_nope, q_pe, kv, pe, table, seq_lens, scale = decode_inputs([40, 40], page_size=16, dtype=dtype)
    table[1, :2] = table[0, :2]
    check_decode(device, (q_nope, q_pe, kv, pe, table, seq_lens, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_row_per_token_is_a_causal_batch(device, dtype):
    """How unequal numbers of new tokens are passed."""
    q_nope, q_pe, kv, pe, table, _, scale = decode_inputs([35], s_q=3, page_size=16, dtype=dtype)
    check_decode(device, (q_nope, q_pe, kv, pe, table, torch.tensor([35], dtype=torch.int32), scale))
    rows = [q.transpose(0, 1) for q in (q_nope, q_pe)]
    lengths = torch.tensor([33, 34, 35], dtype=torch.int32)
    check_decode(device, (*rows, kv, pe, table.expand(3, -1), lengths, scale))


def test_inputs_stay(device):
    args = decode_inputs([37, 5], page_size=16, dtype=torch.bfloat16)
    given = on(device, args)
    run(ops.mla_decode, *given, num_splits=2)
    for value, before in zip(given[:6], args):
        torch.testing.assert_close(value.cpu(), before, rtol=0, atol=0, equal_nan=True)
