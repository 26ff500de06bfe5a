"""mla_decode_fp8's kernel against float64 over the dequantised cache; the interpreter's tile is 16 rows by 16 keys."""

import dataclasses
import importlib
import random

import pytest
import torch

from ntops_mla import ops
from ntops_mla.ops import _fp8
from ntops_mla.testing import DECODE_LSE, FP8_OUT
from tests.interpreted.numerics import DTYPES, by_kernel, check_attention
from tests.test_mla_decode_fp8 import fp8_64, fp8_inputs
from tests.test_ops import GARBAGE_PAGE, HALF, LSE, SINGLE, name_of

# The function of ops hides its module's name.
OP = importlib.import_module("ntops_mla.ops.mla_decode_fp8")
TOLERANCES = {torch.float32: (SINGLE, LSE), **{dtype: (FP8_OUT, DECODE_LSE) for dtype in HALF}}


def check(args, causal=True, num_splits=None, schedule=None):
    out, lse = by_kernel(ops.mla_decode_fp8, *args, causal=causal, num_splits=num_splits, schedule=schedule)
    expected_out, expected_lse = fp8_64(*args, causal=causal)
    check_attention(out.transpose(1, 2), lse, expected_out.transpose(1, 2), expected_lse, args[0].dtype, TOLERANCES)
    return out, lse


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


def one_key(codes, scale, dtype):
    """Arguments whose out is the one key's latent: `codes` [512] times `scale`."""
    cache = torch.full((1, 16, _fp8.TOKEN_BYTES), 255, dtype=torch.uint8)
    kept, scales, pe = _fp8.views(cache[:, :1])
    kept.copy_(codes), scales.fill_(scale), pe.zero_()
    q = torch.zeros(1, 1, 1, 576, dtype=dtype)
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return q[..., :512], q[..., 512:], cache, table, length, 0.1


@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 0.37])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_code_is_the_number_that_pytorch_makes_of_it(dtype, scale, hardware):
    """254 of the 256, bit for bit; the two others are NaN."""
    codes = torch.arange(512).remainder(256).to(torch.uint8)
    codes[codes & 127 == 127] = 0
    exact = (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)
    out, _ = by_kernel(ops.mla_decode_fp8, *one_key(codes, scale, dtype))
    assert exact.unique().numel() > 200 and torch.equal(out.flatten(), exact)


@pytest.mark.parametrize("code", [127, 255])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_nan_is_a_nan(dtype, code, hardware):
    codes = torch.zeros(512, dtype=torch.uint8)
    codes[300] = code
    out, lse = by_kernel(ops.mla_decode_fp8, *one_key(codes, 1.0, dtype))
    assert out.isnan()[..., 300].all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 64])
def test_heads(heads, dtype):
    check(fp8_inputs([17, 0, 1], heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_both_ways(dtype, hardware):
    check(fp8_inputs([37, 0, 5], page_size=16, s_q=2, dtype=dtype), num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_any_scale(num_splits, hardware):
    check(fp8_inputs([70, 33], heads=3, any_scale=True, dtype=torch.float32), num_splits=num_splits)


def borders(s_q):
    """Rows that see no key of a tile, of a split, and none at all; new tokens on both sides of a block of rows."""
    return {"lengths": [0, 1, 3, 15, 16, 17, 19, 31, 33, 49], "s_q": s_q, "heads": 5, "page_size": 32}


@pytest.mark.parametrize("s_q, causal, num_splits", [(1, True, 3), (2, True, 3), (2, False, 1), (4, True, 1)])
def test_lengths_around_the_borders_of_tiles(s_q, causal, num_splits):
    check(fp8_inputs(**borders(s_q), dtype=torch.float32), causal, num_splits)


@pytest.mark.parametrize("s_q", [2, 4])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_several_tokens_in_two_bytes(dtype, s_q):
    check(fp8_inputs([0, 1, 3, 17, 33], s_q=s_q, heads=5, page_size=32, dtype=dtype), num_splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_page_sizes(page_size, dtype):
    """Two new tokens on both sides of a page's border; splits end within pages."""
    check(fp8_inputs([page_size - 1, 0, page_size + 1, 1], page_size=page_size, s_q=2, dtype=dtype), num_splits=2)


@pytest.mark.parametrize(
    "num_splits, dtype",
    [(n, torch.float32) for n in (None, 1, 2, 3, 5, 40)] + [(n, d) for n in (1, 40) for d in HALF],
    ids=str,
)
def test_splits(num_splits, dtype):
    """Of 5, 0, 3 and 1 tiles: fewer splits than tiles, as many, and more, which stay empty."""
    check(fp8_inputs([70, 0, 33, 16], heads=3, dtype=dtype), num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_splits_that_are_chosen(dtype, launches):
    """A table as wide as three splits; one request fills it, one is short, one is empty."""
    check(fp8_inputs([520, 40, 0], heads=2, s_q=2, dtype=dtype))
    assert [name for name, _ in launches] == ["mla_decode_fp8", "mla_combine"]


@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize("codes", [torch.uint8, torch.float8_e4m3fn], ids=name_of)
def test_layouts(codes, layout):
    sizes = dict(page_size=16, s_q=2, strided=True, layout=layout, codes=codes)
    check(fp8_inputs([37, 0, 16, 5], dtype=torch.bfloat16, **sizes), num_splits=2)


def test_strides_of_one_page_say_nothing():
    q_nope, q_pe, cache, table, *rest = fp8_inputs([5], page_size=16, dtype=torch.float32)
    one = cache[table[0, :1].long()].as_strided((1, 16, 656), (7, 656, 1))
    check((q_nope, q_pe, one, torch.zeros(1, 1, dtype=torch.int32), *rest))


def test_inputs_stay_and_the_kernel_takes_them_as_they_are(launches):
    args = fp8_inputs([37, 5], page_size=16, dtype=torch.bfloat16)
    before = [t.clone() for t in args[:5]]
    check(args, num_splits=2)
    for value, copy in zip(args, before):
        torch.testing.assert_close(value, copy, rtol=0, atol=0)
    bf16, f32, i32, u8 = torch.bfloat16, torch.float32, torch.int32, torch.uint8
    assert launches == [
        ("mla_decode_fp8", (bf16, bf16, u8, f32, bf16, i32, i32, i32, f32, f32, bf16)),
        ("mla_combine", (f32, f32, i32, i32, bf16, f32)),
    ]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]], ids=str)
@pytest.mark.parametrize("num_splits", [None, 3])
def test_degenerate_batches(lengths, num_splits):
    out, lse = check(fp8_inputs(lengths, dtype=torch.float32), num_splits=num_splits)
    assert out.shape == (len(lengths), 1, 4, 512) and lse.shape == (len(lengths), 4, 1)


def test_without_heads_rows_or_pages():
    q_nope, q_pe, cache, table, *rest = fp8_inputs([0, 0], dtype=torch.float32)
    assert by_kernel(ops.mla_decode_fp8, q_nope[:, :, :0], q_pe[:, :, :0], cache, table, *rest)[0].numel() == 0
    assert by_kernel(ops.mla_decode_fp8, q_nope[:, :0], q_pe[:, :0], cache, table, *rest)[0].numel() == 0
    for num_splits in (None, 1, 2):
        check((q_nope, q_pe, cache[:0], table[:, :0], *rest), num_splits=num_splits)


def test_a_cache_of_more_than_2_to_the_31_bytes(beyond_int32):
    """The last pages are used, and one of the first."""
    pages = 2**31 // (64 * _fp8.TOKEN_BYTES) + 3
    cache = beyond_int32((pages, 64, _fp8.TOKEN_BYTES), (64 * _fp8.TOKEN_BYTES, _fp8.TOKEN_BYTES, 1), torch.uint8)
    used = [pages - 1, 2, pages - 2]
    for page in used:
        _fp8.quantize_into(cache[page], torch.randn(64, 512) / 10, torch.randn(64, 64) / 10)
    table = torch.tensor([[*used[:2], GARBAGE_PAGE], [used[2], GARBAGE_PAGE, GARBAGE_PAGE]], dtype=torch.int32)
    q_nope, q_pe = (torch.randn(2, 1, 3, columns).half() for columns in (512, 64))
    lengths = torch.tensor([100, 30], dtype=torch.int32)
    out, lse = by_kernel(ops.mla_decode_fp8, q_nope, q_pe, cache, table, lengths, 0.04)
    moved = torch.tensor([[0, 1, GARBAGE_PAGE], [2, GARBAGE_PAGE, GARBAGE_PAGE]], dtype=torch.int32)
    small = by_kernel(ops.mla_decode_fp8, q_nope, q_pe, cache[used], moved, lengths, 0.04)
    assert torch.equal(out, small[0]) and torch.equal(lse, small[1])
    check((q_nope, q_pe, cache[used], moved, lengths, 0.04))


@pytest.mark.parametrize("number", range(4))
def test_random_calls(number, _seed):
    """Everything at once."""
    draw = random.Random(int(torch.randint(1 << 30, ())))
    args = fp8_inputs(
        [draw.choice([0, 1, draw.randrange(20), draw.randrange(100)]) for _ in range(draw.randint(1, 4))],
        dtype=draw.choice(DTYPES),
        heads=draw.choice([1, 2, 5, 7, 16, 17]),
        s_q=draw.randint(1, 4),
        page_size=draw.choice([16, 32, 64, 128]),
        layout=draw.choice(["packed", "apart"]),
        codes=draw.choice([torch.uint8, torch.float8_e4m3fn]),
        strided=draw.random() < 0.5,
    )
    check(args, draw.random() < 0.7, draw.choice([None, 1, 2, 3, 5, 11]))
