"""mla_sparse: absorbed attention of each token over a list of keys of its own in the paged latent cache."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board
from ntops_mla.kernel import within_int32
from ntops_mla.ops import _check
from ntops_mla.ops._attention import attend, may_be_inexact, sharpen
from ntops_mla.ops._op import register
from ntops_mla.ops._rows import Rows, at_once, joined, rows_of
from ntops_mla.ops._split import Made, make, needed, plan, refuse_far_slots
from ntops_mla.ops.mla_decode import check_caches, check_numbers, check_queries, unsupported_heads
from ntops_mla.platform import Platform, Tile

_NO_KEY = float("-inf")

# Keys that a split has at least, unless the caller says how many splits there are. Fewer than in mla_decode, as in
# FlashMLA: a token has 2048 at most as a rule, and one of 128 heads then makes 64 programs with a tile of 64 rows and
# 128 with one of 32.
SPLIT_KEYS = 64

# Heads up to which PyTorch's fused kernel for a CPU is faster than products with their softmax between them.
_FUSED_HEADS = 32


def mla_sparse(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    pe_cache: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    num_splits: int | None = None,
    want_max: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend over the cached latents that each token's indices name, key and value at once, all heads sharing them.

    s[j] = softmax_scale (q_nope . kv_cache[i_j] + q_pe . pe_cache[i_j]);  out = softmax(s) kv_cache;
    lse = log sum exp(s);  max_logits = max(s)

    q_nope: `[B, s_q, H, C]`, already absorbed (C = 512 or 256). q_pe: `[B, s_q, H, R]`. kv_cache: `[pages, page_size,
    C]`, pe_cache: `[pages, page_size, R]`, pages of any size and of any strides. indices: int32 `[B, s_q, topk]`, page
    * page_size + slot; one below 0 or past the last page is no key, one that occurs twice counts twice. topk_length:
    int32 `[B, s_q]`, how many of the indices count, from the first on (below 0: none; above topk: all), or None: all.
    What no index names is never read. num_splits: parts a token's indices are cut into, None: chosen. want_max: whether
    max_logits is wanted.

    Returns out `[B, s_q, H, C]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch), lse and max_logits
    float32 `[B, s_q, H]`, natural logarithm; max_logits is empty, `[0]`, unless it is wanted. A token without keys: out
    0, lse and max_logits -inf. Raises TypeError or ValueError that names the argument. Source: arXiv 2405.04434,
    section 2.1.2 and appendix C; arXiv 2512.02556, section 2.1; deepseek-ai/FlashMLA flash_mla_sparse_fwd.
    """
    return torch.ops.ntops_mla.mla_sparse(
        q_nope, q_pe, kv_cache, pe_cache, indices, softmax_scale, topk_length, num_splits, want_max
    )


def _check_args(q_nope, q_pe, kv_cache, pe_cache, indices, softmax_scale, topk_length, num_splits, want_max):
    op = "mla_sparse"
    check_queries(op, q_nope, q_pe)
    check_caches(op, q_nope, q_pe, kv_cache, pe_cache, any_page_size=True)
    check_lists(op, q_nope, indices, topk_length)
    check_numbers(op, softmax_scale, num_splits)
    _check.flag(op, "want_max", want_max)


def check_lists(op: str, q_nope: torch.Tensor, indices: object, topk_length: object) -> None:
    """The indices of each token of q_nope, and how many of them count."""
    _check.tensor(op, "indices", indices, "[B, s_q, topk]", 3)
    _check.dtype(op, "indices", indices, (torch.int32,))
    _check.size(op, "indices", indices, 0, q_nope.shape[0], "[B, s_q, topk]")
    _check.size(op, "indices", indices, 1, q_nope.shape[1], "[B, s_q, topk]")
    _check.same_device(op, "q_nope", q_nope, ("indices", indices))
    if topk_length is not None:
        _check.tensor(op, "topk_length", topk_length, "[B, s_q]", 2)
        _check.dtype(op, "topk_length", topk_length, (torch.int32,))
        _check.size(op, "topk_length", topk_length, 0, q_nope.shape[0], "[B, s_q]")
        _check.size(op, "topk_length", topk_length, 1, q_nope.shape[1], "[B, s_q]")
        _check.same_device(op, "q_nope", q_nope, ("topk_length", topk_length))


def _reference(q_nope, q_pe, kv_cache, pe_cache, indices, softmax_scale, topk_length, num_splits, want_max):
    cache = rows_of(kv_cache, pe_cache)
    return attend_lists(cache, q_nope, q_pe, indices, softmax_scale, topk_length, want_max)


def attend_lists(
    cache: Rows,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    want_max: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mla_sparse in PyTorch, over any cache of rows."""
    out, lse, maxima = results(q_nope, want_max)
    if not out.numel() or not indices.shape[2] or not cache.count:
        return out.zero_(), lse.fill_(_NO_KEY), maxima.fill_(_NO_KEY)
    q = joined(q_nope, q_pe)
    # [T, H, C + R], [T, topk], [T], and what is written: views, on which the results' dimensions lie
    q = (torch.cat([q_nope, q_pe], -1) if q is None else q).flatten(0, 1)
    indices, lengths = indices.flatten(0, 1), None if topk_length is None else topk_length.flatten()
    outs, lses, most = out.flatten(0, 1), lse.flatten(0, 1), maxima.flatten(0, 1) if want_max else None
    tokens, topk = indices.shape
    few = q.shape[1] <= _FUSED_HEADS
    fused = q.device.type == "cpu" and not want_max and (few or not _in_two_products(q, softmax_scale))
    step = max(1, at_once(q, q.shape[2]) // topk)
    for first in range(0, tokens, step):
        some = slice(first, first + step)
        # [t, topk, C + R], [t, topk]
        keys, hidden = _gather(cache, indices[some], None if lengths is None else lengths[some])
        if fused:
            part, lses[some] = _attend_fused(q[some], keys, hidden, softmax_scale)
        else:
            part, lses[some], largest = _attend(q[some], keys, hidden, softmax_scale)
            if want_max:
                most[some] = largest
        outs[some] = part[..., : out.shape[3]]
    return out, lse, maxima


def _gather(cache, indices, lengths):
    """Keys `[t, topk, C + R]`, latent and rope side by side, 0 where there is none; which those are, None: nowhere."""
    index, host = indices.long(), indices.device.type == "cpu"
    least, greatest = index.aminmax() if host and lengths is None else (-1, 0)
    if least >= 0 and greatest < cache.count:  # the same without the matrices of what is hidden
        return cache.gather(index.flatten()).view(*index.shape, -1), None
    hidden = (index < 0) | (index >= cache.count)
    if lengths is not None:
        hidden |= torch.arange(index.shape[1], device=index.device) >= lengths[:, None]
    if host and not hidden.any():
        hidden = None
    else:
        index = index.masked_fill(hidden, 0)
    keys = cache.gather(index.flatten())
    if hidden is not None:
        # What the cache holds there may be NaN, and 0 x NaN is NaN. Only the CPU can ask for the places: another device
        # would have to wait for the answer.
        if host:
            keys.index_fill_(0, hidden.flatten().nonzero()[:, 0], 0)
        else:
            keys.masked_fill_(hidden.flatten()[:, None], 0)
    return keys.view(*index.shape, -1), hidden


def _attend_fused(q, keys, hidden, scale):
    """out and lse of `_attend`, by PyTorch's own kernel for a CPU, which does not tell the largest score."""
    mask = None if hidden is None else _mask(hidden, q.dtype)
    # The heads are the rows of one head.
    out, lse = (x[:, 0] for x in attend(q[:, None], keys[:, None], keys[:, None], scale, mask))
    if hidden is not None:
        blind = hidden.all(-1)[:, None]
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, _NO_KEY)
    return out, lse


def _mask(hidden, dtype):
    """Additive `[t, 1, 1, topk]`."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, _NO_KEY)[:, None, None]


def _in_two_products(q, scale):
    """Whether `_attend` multiplies with matrix instructions. Not by a scale that is 0 in float32: PyTorch's baddbmm
    leaves its result unwritten then."""
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and abs(scale) >= torch.finfo(torch.float32).tiny
        and _adds_before_it_rounds()
    )


def _attend(q, keys, hidden, scale):
    """q `[t, H, D]`, keys `[t, topk, D]`, which are the values too, hidden `[t, topk]` or None -> out `[t, H, D]`, lse
    and the largest score `[t, H]`."""
    # A token's scores are a column for each head, [t, topk, H]: what PyTorch packs anew for the matrix unit are the
    # queries then, of which there are fewer than keys.
    turned = q.transpose(1, 2)
    twice = _in_two_products(q, scale)
    if twice:
        # Faster than one in float32, and good for 16 bits: the second one gives what the first one has rounded away.
        scores = torch.baddbmm(q.new_empty(()), keys, turned, beta=0, alpha=scale)
        rest = torch.baddbmm(scores, keys, turned, beta=-1, alpha=scale)
        scores = scores.float().add_(rest)
    else:
        keys = keys.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        scores = torch.bmm(keys, turned.to(keys.dtype)).mul_(scale)
    if hidden is not None:
        scores.masked_fill_(hidden[..., None], _NO_KEY)
    # In place: softmax and logsumexp would each make a matrix of their own, and take their exponentials twice.
    most = scores.amax(1)
    weights = scores.sub_(most[:, None]).exp_()
    total = weights.sum(1)
    lse = total.log().add_(most)
    weights.mul_(total.reciprocal_()[:, None])
    if hidden is not None:
        blind = hidden.all(-1)[:, None]
        weights.masked_fill_(blind[..., None], 0)
        lse.masked_fill_(blind, _NO_KEY)
    if twice and may_be_inexact(lse, q):
        sharpen(lse[:, None], q[:, None], keys[:, None], scale, None if hidden is None else _mask(hidden, q.dtype))
    # All columns of the keys, though the last ones are no value: with a part of each row the product takes longer.
    return torch.bmm(weights.to(keys.dtype).transpose(1, 2), keys), lse, most


@functools.lru_cache(maxsize=1)
def _adds_before_it_rounds() -> bool:
    """Whether this CPU's bfloat16 baddbmm adds to its input in float32: tried, as it hangs on PyTorch's libraries."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 64, 128, generator=generator).bfloat16() for _ in range(2))
    exact = torch.bmm(a.float(), b.float().transpose(1, 2))
    rounded = exact.bfloat16()
    rest = torch.baddbmm(rounded, a, b.transpose(1, 2), beta=-1)
    return bool(((rounded.float() + rest.float() - exact).abs() <= exact.abs() * 2**-16 + 1e-5).all())


def _fake(q_nope, q_pe, kv_cache, pe_cache, indices, softmax_scale, topk_length, num_splits, want_max):
    return results(q_nope, want_max)


def results(q_nope: torch.Tensor, want_max: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse and max_logits, not yet written."""
    shape, device = q_nope.shape[:3], q_nope.device
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=device)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    return out, lse, torch.empty(shape if want_max else 0, dtype=torch.float32, device=device)


def _key(q_nope, q_pe, kv_cache, pe_cache, indices, softmax_scale, topk_length, num_splits, want_max):
    return (q_nope.dtype,), (q_nope.shape[3], q_pe.shape[3], q_nope.shape[2])


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    return unsupported_heads(*sizes[:2])


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    latent, _, heads = sizes
    tile = _tile(board, dtypes[0], latent, heads)
    return needed(board, "mla_sparse", tile, dtypes[0], latent)


def _tile(board: Board, dtype: torch.dtype, latent: int, heads: int) -> Tile | None:
    return board.tile("mla_sparse", dtype, rows=heads, latent=latent)


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, latent: int, rope: int, heads: int) -> Made:
    tile = _tile(board, dtype, latent, heads)
    # A part of the columns lies in the latent.
    block_c = min(tile.blocks["block_c"], latent)
    return make(board, "mla_sparse", tile, dtype, latent, block_c=block_c, latent=latent, rope=rope)


def counts(indices: torch.Tensor, topk_length: torch.Tensor | None) -> torch.Tensor:
    """How many of each token's indices `[T, topk]` count: int32 `[T]`."""
    tokens, topk = indices.shape
    if topk_length is None:
        return torch.full((tokens,), topk, dtype=torch.int32, device=indices.device)
    return topk_length.flatten().clamp(0, topk)


def _kernel(board: Board, q_nope, q_pe, kv_cache, pe_cache, indices, softmax_scale, topk_length, num_splits, want_max):
    batch, s_q, heads, latent = q_nope.shape
    out, lse, maxima = results(q_nope, want_max)
    if not out.numel():
        return out, lse, maxima
    # [T, H, C], [T, H, R], [T, topk]: views, unless requests lie apart from each other
    q_nope, q_pe, indices = (within_int32(x.flatten(0, 1), 1) for x in (q_nope, q_pe, indices))
    kv_cache, pe_cache, flat = _flattened(kv_cache, pe_cache)
    lengths = counts(indices, topk_length)
    made = _made(board, q_nope.dtype, latent, q_pe.shape[2], heads)
    splits, least = plan(board, made, batch * s_q, heads, indices.shape[1], num_splits, SPLIT_KEYS)
    inputs = (q_nope, q_pe, kv_cache, pe_cache, indices, lengths, softmax_scale, least)
    launch(made, inputs, flat, splits, out, lse, maxima if want_max else None)
    return out, lse, maxima


def _flattened(*caches):
    """(the caches, True) as pages of one slot where pages follow each other without a gap, else as they are, False."""
    pages, page_size, _ = caches[0].shape
    if all(pages == 1 or page_size == 1 or c.stride(0) == page_size * c.stride(1) for c in caches):
        rows = (c.stride(0) if page_size == 1 else c.stride(1) for c in caches)
        shapes = ((pages * page_size, 1, c.shape[2]) for c in caches)
        return *(c.as_strided(s, (row, 1, c.stride(2))) for c, s, row in zip(caches, shapes, rows)), True
    refuse_far_slots(**dict(zip(("kv_cache", "pe_cache"), caches)))
    return *caches, False


def launch(made: Made, inputs: tuple, flat: bool, splits: int, out, lse, maxima) -> None:
    """Both launches; out `[B, s_q, H, C]`, lse and maxima (None: not wanted) `[B, s_q, H]`, all contiguous."""
    q_nope, q_pe, kv_cache, pe_cache, indices, lengths, softmax_scale, least = inputs
    # All that the launches depend on: to read a shape or a stride costs 0.15 us, and outputs are contiguous.
    key = (
        q_nope.dtype, made.block_n, q_nope.shape, q_nope.stride(), q_pe.stride(), kv_cache.shape, kv_cache.stride(),
        pe_cache.stride(), indices.shape, indices.stride(), softmax_scale, least, flat, splits, maxima is None,
        q_nope.data_ptr() & 15, q_pe.data_ptr() & 15, kv_cache.data_ptr() & 15, pe_cache.data_ptr() & 15,
        indices.data_ptr() & 15, lengths.data_ptr() & 15,
    )  # fmt: skip
    want_max = maxima is not None
    launch_lists(made, (*inputs, flat, want_max, made.block_n), key, indices, lengths, least, splits, out, lse, maxima)


def launch_lists(
    made: Made, inputs: tuple, key: tuple, indices, lengths, least: int, splits: int, out, lse, maxima
) -> None:
    """`made.attend(*inputs, out, lse, max_logits)`, and with several splits `made.combine` of them."""
    heads, latent = out.shape[2:]
    tokens, want_max = lengths.shape[0], maxima is not None
    rows = (tokens, 1, heads)
    whole, whole_lse = out.view(*rows, latent), lse.view(rows)
    if splits == 1:
        made.attend(*inputs, whole, whole_lse, maxima.view(rows) if want_max else whole_lse, key=key)
        return
    part = torch.empty(tokens, splits, heads, latent, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(tokens, splits, heads, dtype=torch.float32, device=out.device)
    # A split without indices writes nothing.
    part_max = torch.full_like(part_lse, _NO_KEY) if want_max else part_lse
    made.attend(*inputs, part, part_lse, part_max, key=key)
    # In the place of a schedule a list that is there: each token has as many splits.
    parts = part, part_lse[:, :, None]
    made.combine(*parts, lengths, indices, least, False, made.block_n, whole, whole_lse, key=key)
    if want_max:
        torch.amax(part_max, 1, out=maxima.view(tokens, heads))


def _example(
    device="cpu",
    dtype=torch.bfloat16,
    *,
    tokens=4,
    heads=16,
    kv_lora_rank=512,
    rope=64,
    page_size=64,
    s_q=1,
    topk=48,
    pages=4,
    gap=0,
    ragged=True,
    num_splits=None,
    want_max=False,
    **_,
):
    """gap: slots between two pages. ragged: see `example_lists`."""
    cache = torch.randn(pages, page_size + gap, kv_lora_rank + rope, device=device, dtype=dtype)[:, :page_size]
    return (
        torch.randn(tokens, s_q, heads, kv_lora_rank, device=device, dtype=dtype),
        torch.randn(tokens, s_q, heads, rope, device=device, dtype=dtype),
        cache[:, :, :kv_lora_rank],
        cache[:, :, kv_lora_rank:],
        example_lists(tokens, s_q, topk, pages * page_size, ragged, device),
        (kv_lora_rank + rope) ** -0.5,
        None,
        num_splits,
        want_max,
    )


def example_lists(tokens: int, s_q: int, topk: int, slots: int, ragged: bool, device) -> torch.Tensor:
    """Indices of an example. ragged: each token has one index less than the one before it that names a key, and at
    least one."""
    indices = torch.randint(slots, (tokens, s_q, topk), dtype=torch.int32)
    named = torch.arange(topk, topk - tokens * s_q, -1) if ragged else torch.full((tokens * s_q,), topk)
    named = named.clamp(min=1).view(tokens, s_q, 1)
    return indices.masked_fill(torch.arange(topk) >= named, -1).to(device)


mla_sparse = register(
    mla_sparse,
    schema=(
        "(Tensor q_nope, Tensor q_pe, Tensor kv_cache, Tensor pe_cache, Tensor indices, float softmax_scale, "
        "Tensor? topk_length=None, int? num_splits=None, bool want_max=False) -> (Tensor, Tensor, Tensor)"
    ),
    check=_check_args,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
)
