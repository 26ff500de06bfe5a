"""Caches of more than 2 GB and tensors of more than 2^31 elements: every address is computed in 64 bits.

In the interpreter sizes are an 8192nd, which tries the tests and not the addresses: tests/interpreted does that, with
memory that is reserved and never touched.
"""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.devices import device_module
from tests.device.on_device import INTERPRETED, NAN, agree_decode, check_attention, check_rounded, on, pick, run
from tests.interpreted.numerics import PREFILL
from tests.test_ops import GARBAGE_PAGE, append_inputs, norm64, prefill64, rope64, small, turns

pytestmark = pytest.mark.device
BF16 = torch.bfloat16
# In two bytes each: 2 GB, and the first index that int32 does not hold.
SIZES = {"2 GB": 2**30 // pick(1, 2**13), "2^31 elements": 2**31 // pick(1, 2**13)}
MANY = SIZES["2^31 elements"]


@pytest.fixture(params=SIZES)
def elements(request):
    return SIZES[request.param]


def allocate(device, *shapes, spare=1):
    """bfloat16 tensors of NaN; skips where they, and `spare` times as much again, do not fit."""
    needed = (1 + spare) * sum(2 * torch.Size(shape).numel() for shape in shapes)
    module = device_module(device)
    if not INTERPRETED and hasattr(module, "mem_get_info"):
        free, _ = module.mem_get_info(device)
        if free < needed:
            pytest.skip(f"{device} has {free >> 20} MiB free, {needed >> 20} are needed")
    try:
        return [torch.full(shape, NAN, dtype=BF16, device=device) for shape in shapes]
    except RuntimeError as error:  # OutOfMemoryError is one
        if "memory" not in str(error).lower():
            raise
        pytest.skip(f"{device} has no {needed >> 20} MiB: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("page_size", [16, 64])
def test_append(empty_board, elements, page_size):
    pages = elements // (page_size * 576) + 3
    cache = allocate(empty_board, (pages, page_size, 576), spare=0)[0]
    kv_a, weight, cos, sin, *_ = append_inputs(3, page_size, BF16)
    slots = torch.tensor([pages * page_size - 1, 5, (pages - 1) * page_size])
    args = on(empty_board, (kv_a, weight, cos, sin, slots))
    run(ops.latent_append, *args, cache, 1e-6)
    flat = cache.view(-1, 576)
    rows = rows_of(flat, slots.tolist())
    check_rounded(rows[:, :512], norm64(kv_a[:, :512], weight, 1e-6))
    check_rounded(rows[:, 512:], rope64(kv_a[:, 512:], cos, sin))
    # Nothing else was written, where an address cut to 32 bits would lie say. A part at a time and two columns, because
    # isnan of all would take half as much memory again.
    written = sum(int((~part[:, [0, 575]].isnan()).all(1).sum()) for part in flat.split(1 << 20))
    assert written == 3


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("layout", ["joined", "apart"])
def test_decode(empty_board, elements, layout, num_splits):
    """The last pages are used, and one of the first."""
    page_size, width = 64, 576 if layout == "joined" else 512
    pages = elements // (page_size * width) + 3
    shapes = [(pages, page_size, width)] * (1 if layout == "joined" else 2)
    caches = allocate(empty_board, *shapes, spare=0)
    pe = caches[0][..., 512:] if layout == "joined" else caches[1][..., :64]  # rows as far apart as the latents
    kv = caches[0][..., :512]
    used = [pages - 1, 2, pages - 2]
    lengths = torch.tensor([100, 30], dtype=torch.int32)
    table = torch.tensor([[*used[:2], GARBAGE_PAGE], [used[2], GARBAGE_PAGE, GARBAGE_PAGE]], dtype=torch.int32)
    few = torch.full((3, page_size, 576), NAN, dtype=BF16)
    for page, length in zip(few, (64, 36, 30)):
        page[:length] = small(length, 576, dtype=BF16)
    for page, rows in zip(used, few.to(empty_board)):
        kv[page], pe[page] = rows[:, :512], rows[:, 512:]
    heads = pick(20, 3)
    q_nope, q_pe = (torch.randn(2, 1, heads, columns).to(BF16) for columns in (512, 64))
    given = on(empty_board, (q_nope, q_pe, table, lengths))
    out, lse = run(ops.mla_decode, *given[:2], kv, pe, *given[2:], 576**-0.5, num_splits=num_splits)
    # The same with the three pages alone.
    table = torch.tensor([[0, 1], [2, GARBAGE_PAGE]], dtype=torch.int32)
    agree_decode((q_nope, q_pe, few[..., :512], few[..., 512:], table, lengths, 576**-0.5), out, lse)


def some(count):
    """Of `count` rows: the first, those on both sides of the middle, the last."""
    return [0, 1, count // 2 - 1, count // 2, count - 2, count - 1]


def rows_of(tensor, places):
    """By slices: what PyTorch's own indexing makes of so large a tensor is not under test."""
    return torch.stack([tensor[place] for place in places]).cpu()


def test_rms_norm(empty_board):
    rows = MANY // 7168 + 3
    x = allocate(empty_board, (rows, 7168))[0]
    picked = some(rows)
    few, weight = torch.randn(len(picked), 7168).to(BF16), torch.randn(7168).to(BF16)
    for place, row in zip(picked, few.to(empty_board)):
        x[place] = row
    out = run(ops.rms_norm, x, weight.to(empty_board))
    check_rounded(rows_of(out, picked), norm64(few, weight, 1e-6))


def test_rope(empty_board):
    heads = pick(128, 1024)  # fewer tokens for the interpreter
    tokens = MANY // (heads * 64) + 3
    x = allocate(empty_board, (tokens, heads, 64))[0]
    picked = some(tokens)
    few, (cos, sin) = torch.randn(len(picked), heads, 64).to(BF16), turns(tokens, 64)
    for place, row in zip(picked, few.to(empty_board)):
        x[place] = row
    out = run(ops.rope, x, cos.to(empty_board), sin.to(empty_board))
    check_rounded(rows_of(out, picked), rope64(few, cos[picked], sin[picked]))


def test_prefill(empty_board):
    """Many short requests; those on both sides of 2^31 and at the ends are compared, in two heads."""
    heads, each = pick(128, 16), pick(64, 4)
    requests = MANY // (heads * 192 * each) + 2
    tokens = requests * each
    q, k, v = allocate(empty_board, (tokens, heads, 192), (tokens, heads, 192), (tokens, heads, 128), spare=0.5)
    q.normal_()
    k.normal_(0, 0.1)
    v.normal_(0, 0.1)
    bounds = torch.arange(0, tokens + 1, each, dtype=torch.int32)
    given = bounds.to(empty_board)
    out, lse = run(ops.mla_prefill, q, k, v, given, given, 192**-0.5)
    ends = torch.tensor([0, each], dtype=torch.int32)
    for request in (0, requests // 2, requests - 2, requests - 1):
        rows = slice(request * each, (request + 1) * each)
        for head in (0, heads - 1):
            column = slice(head, head + 1)
            expected = prefill64(*(x[rows, column].cpu() for x in (q, k, v)), ends, ends, 192**-0.5)
            results = out[rows, column].transpose(0, 1), lse[column, rows]
            check_attention(*results, expected[0].transpose(0, 1), expected[1], BF16, PREFILL)
