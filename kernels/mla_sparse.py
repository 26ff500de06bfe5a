"""Absorbed attention of each token over keys of its own, gathered from the paged latent cache, split over them.

s[j] = softmax_scale (q_nope . kv_cache[i_j] + q_pe . pe_cache[i_j]);  out = softmax(s) kv_cache;
lse = log sum exp(s);  max_logits = max(s)

q_nope `[T, H, C]`, q_pe `[T, H, R]`, kv_cache `[pages, page_size, C]`, pe_cache `[pages, page_size, R]`, indices int32
`[T, topk]` (page * page_size + slot), lengths int32 `[T]`, from 0 to topk -> out `[T, num_splits, H, C]`, lse and
max_logits float32 `[T, num_splits, H]`, of each split's own keys; `mla_combine` joins the splits. The heads of a token
are the rows of one matrix, because all of them share the keys. A program takes `block_h` heads and one split of a
token's indices, `block_n` at a time; with one split it writes the result itself.

- An index that is negative or past the last page, and each one from `lengths` on, is no key. Its page or slot is
  outside the cache, or its page is made -1: the load's mask leaves it out, so that nothing is read for it and its row
  is 0. Its score is hidden.
- A tile of keys is loaded once: its first C columns are the values too.
- The indices of the next tile are loaded before this one is used, so that the loads of two tiles can be in flight.
- The page size is a number of the call, so that one compiled kernel takes caches of any. Each thread needs the row of
  every key that it loads a part of, so that a division by it is done some 16 times a tile and thread. So where pages
  follow each other without a gap the caller passes them as pages of one slot, and `flat` True: no division is compiled.
- The page is an int64, the slot within it an int32.
- A split without indices returns at once and its part of `out`, `lse` and `max_logits` is never written; the first one
  always writes.
- The sentinels are finite, and a hidden score (-1e30) lies far below the first maximum (-1e29): exp2 of their
  difference is 0, so that a tile without keys leaves m, total and the accumulators alone.
- The latent is cut into parts of `block_c` columns, each with its own accumulator, as in `mla_decode`.

Source: arXiv 2405.04434, section 2.1.2 and appendix C; arXiv 2512.02556, section 2.1 (the choice of keys);
deepseek-ai/FlashMLA flash_mla_sparse_fwd.
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(
    q_nope, q_pe, kv_cache, pe_cache, indices, lengths, softmax_scale, least, flat, want_max, block_n, out, lse,
    max_logits, block_h, block_c, columns,
):  # fmt: skip
    tokens = lengths.shape[0]
    num_splits = out.shape[1]
    rope = q_pe.shape[2]

    # The grid is (T, num_splits, head blocks), head blocks fastest: programs that read the same keys run together.
    # T is an inner level of what is large, and picked by an int64.
    def heads(tensor, width):
        # (T, num_splits, head blocks) x (T, parts) x (block_h, width)
        arranged = tensor.tile((1, block_h, width)).tile((-1, 1, -1))
        arranged = arranged.squeeze(2).unsqueeze(1).expand((tokens, num_splits, -1))
        arranged.dtype = arranged.dtype.squeeze(1)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
        return arranged

    q_nope_arranged = heads(q_nope, block_c)
    head_blocks = q_nope_arranged.shape[2]
    grid = (tokens, num_splits, head_blocks)

    def paged(tensor, width):
        # (T, num_splits, head blocks) x (pages, page_size, parts) x (width,)
        arranged = tensor.tile((1, 1, width)).tile((-1, -1, -1)).expand(grid)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze((0, 1))
        return arranged

    # (T, num_splits, head blocks) x (T, tiles) x (block_n,)
    indices_arranged = indices.tile((1, columns)).tile((-1, -1)).unsqueeze(2).expand(grid)
    indices_arranged.dtype.dtype = indices_arranged.dtype.dtype.squeeze(0)

    # (T, num_splits, head blocks) x ()
    lengths_arranged = lengths.tile((1,)).unsqueeze(1).unsqueeze(2).expand((-1, num_splits, head_blocks))
    lengths_arranged.dtype = lengths_arranged.dtype.squeeze(0)

    # (T, num_splits, head blocks) x (T, parts) x (block_h, block_c)
    out_arranged = out.tile((1, 1, block_h, block_c)).tile((-1, 1, 1, -1)).squeeze(3).expand((tokens, -1, -1))
    out_arranged.dtype = out_arranged.dtype.squeeze((1, 2))
    out_arranged.dtype.dtype = out_arranged.dtype.dtype.squeeze((0, 1))

    def statistic(tensor):
        # (T, num_splits, head blocks) x (block_h,)
        arranged = tensor.tile((1, 1, block_h))
        arranged.dtype = arranged.dtype.squeeze((0, 1))
        return arranged

    return (
        q_nope_arranged,
        heads(q_pe, rope),
        paged(kv_cache, block_c),
        paged(pe_cache, rope),
        indices_arranged,
        lengths_arranged,
        softmax_scale,
        least,
        flat,
        want_max,
        block_n,
        out_arranged,
        statistic(lse),
        statistic(max_logits),
    )


def application(
    q_nope, q_pe, kv_cache, pe_cache, indices, lengths, softmax_scale, least, flat, want_max, block_n, out, lse,
    max_logits,
):  # fmt: skip
    length = lengths
    token = ntl.cast(lengths.offsets(0), ntl.int64)
    split = lse.offsets(1)
    num_splits = lse.source.shape[1]
    pages = kv_cache.source.shape[0]
    page_size = kv_cache.source.shape[1]
    # This split's tiles of indices: [start, end), counted as mla_combine counts them
    num_blocks = (length + block_n - 1) // block_n
    per_split = ntl.maximum((num_blocks + num_splits - 1) // num_splits, least)
    start = split * per_split
    end = ntl.minimum(start + per_split, num_blocks)
    if (start >= end) & (split > 0):
        return

    # The number of parts is a constant: each `if` on it is decided while compiling.
    # [block_h, block_c]
    q0 = q_nope[token, 0]
    if q_nope.shape[1] == 2:
        # [block_h, block_c]
        q1 = q_nope[token, 1]
    # [block_h, R]
    qp = q_pe[token, 0]
    acc0 = ntl.zeros((q0.shape[0], q0.shape[1]), dtype=ntl.float32)
    acc1 = acc0
    m = ntl.full((q0.shape[0],), -1.0e29, dtype=ntl.float32)
    total = ntl.zeros((q0.shape[0],), dtype=ntl.float32)
    # exp(x) = exp2(x log2(e))
    scale = ntl.cast(softmax_scale, ntl.float32) * 1.4426950408889634

    # [block_n]: -1 past the last of them
    index = indices[token, start]
    for block in range(start, end):
        position = block * block_n + ntl.arange(0, block_n)
        page = index
        slot = ntl.zeros((block_n,), dtype=ntl.int32)
        if flat == 0:
            # Of a negative index one of the two is negative, whichever way the division rounds.
            page = index // page_size
            slot = index - page * page_size
        seen = (position < length) & (index >= 0) & (page < pages)
        page = ntl.cast(ntl.where(position < length, page, -1), ntl.int64)
        # [block_n, block_c]
        k0 = kv_cache[page[:, None], slot[:, None], 0]
        if kv_cache.shape[2] == 2:
            # [block_n, block_c]
            k1 = kv_cache[page[:, None], slot[:, None], 1]
        # [block_n, R]
        kp = pe_cache[page[:, None], slot[:, None], 0]
        # [block_n]
        index = indices[token, block + 1]

        # [block_h, block_n]
        s = ntl.dot(q0, ntl.trans(k0), input_precision="ieee")
        if kv_cache.shape[2] == 2:
            s = ntl.dot(q1, ntl.trans(k1), s, input_precision="ieee")
        s = ntl.dot(qp, ntl.trans(kp), s, input_precision="ieee")
        s = ntl.where(seen[None, :], s * scale, -1.0e30)
        m_new = ntl.maximum(m, ntl.max(s, axis=1))
        p = ntl.exp2(s - m_new[:, None])
        alpha = ntl.exp2(m - m_new)
        total = total * alpha + ntl.sum(p, axis=1)
        weight = ntl.cast(p, k0.dtype)
        acc0 = ntl.dot(weight, k0, acc0 * alpha[:, None], input_precision="ieee")
        if kv_cache.shape[2] == 2:
            acc1 = ntl.dot(weight, k1, acc1 * alpha[:, None], input_precision="ieee")
        m = m_new

    # A row without keys: out 0, lse and max_logits -inf
    divisor = ntl.where(total == 0, 1.0, total)
    out[token, 0] = acc0 / divisor[:, None]
    if kv_cache.shape[2] == 2:
        out[token, 1] = acc1 / divisor[:, None]
    lse = ntl.where(total == 0, float("-inf"), (m + ntl.log2(divisor)) * 0.6931471805599453)
    if want_max:
        max_logits = ntl.where(total == 0, float("-inf"), m * 0.6931471805599453)


def premake(block_h, block_n, block_c, latent=512, rope=64, dtype=None):
    """block_h, block_n: heads and keys of a tile; block_c: `latent`, or half of it for two accumulators."""
    tensors = (
        Tensor(shape=(None, None, latent), dtype=dtype, other=0, name="q_nope"),
        Tensor(shape=(None, None, rope), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, None, latent), dtype=dtype, other=0, name="kv_cache"),
        Tensor(shape=(None, None, rope), dtype=dtype, other=0, name="pe_cache"),
        Tensor(2, other=-1, name="indices"),
        Tensor(1, name="lengths"),
        Tensor(0, name="softmax_scale"),
        Tensor(0, name="least"),
        Tensor(0, constexpr=True, name="flat"),
        Tensor(0, constexpr=True, name="want_max"),
        Tensor(0, constexpr=True, name="block_n"),
        Tensor(shape=(None, None, None, latent), name="out"),
        Tensor(3, name="lse"),
        Tensor(3, name="max_logits"),
    )
    return functools.partial(arrangement, block_h=block_h, block_c=block_c, columns=block_n), application, tensors
