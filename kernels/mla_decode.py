"""Absorbed attention of a few new tokens per request over the paged latent cache, split over the keys.

s[j] = softmax_scale (q_nope . kv_cache[j] + q_pe . pe_cache[j]);  out = softmax(s) kv_cache;  lse = log sum exp(s)

q_nope `[B, s_q, H, C]`, q_pe `[B, s_q, H, R]`, kv_cache `[pages, page_size, C]`, pe_cache `[pages, page_size, R]`,
block_table int32 `[B, max_pages]`, seq_lens int32 `[B]` -> out `[B, num_splits, s_q * H, C]`, lse float32 `[B,
num_splits, s_q, H]`, of each split's own keys; `mla_combine` joins the splits. The new tokens and the heads are the
rows of one matrix, because all of them share the keys. A program takes `block_h` rows and one split of a request's
keys, `block_n` at a time; with one split it writes the result itself.

`planned`: which keys of which request a program takes stands in schedule int32 `[n, 4]`, as `mla_schedule` writes it,
and out is `[n, 1, s_q * H, C]`, lse `[n, 1, s_q, H]`; the out of a request that is not cut is written to whole `[B,
s_q * H, C]` instead. Otherwise each request has the same number of splits, and neither schedule, any int32 `[., .]`,
nor whole is looked at.

- A tile of keys is loaded once: its first C columns are the values too.
- The latent is cut into parts of `block_c` columns, each with its own accumulator. Which takes fewer registers hangs on
  the tile: compiled with Triton 3.6 for sm_90, one of 512 does in a tile of 64 rows and 64 keys (no spill, against 16
  bytes with two of 256).
- The page of the next tile is loaded before this one is used, so that two tiles can be in flight.
- Slots past the length are masked in the load, by row index -1: they may hold NaN, and 0 x NaN is NaN. A `where` on the
  loaded tile does the same and costs the compiler hundreds of bytes of spills.
- A split without keys returns at once and its part of `out` is never read; the first one always writes.
- The sentinels are finite, and a hidden score (-1e30) lies far below the first maximum (-1e29): exp2 of their
  difference is 0, so that a row that sees no key of a tile leaves m, total and the accumulators alone.
- One new token per request needs no diagonal: the caller passes `causal` False then, and the mask is one row.

Source: arXiv 2405.04434, section 2.1.2 and appendix C; the splits: deepseek-ai/FlashMLA, FlashDecoding.
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(
    q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, schedule, softmax_scale, least, causal, planned, block_n,
    out, lse, whole, block_h, block_c,
):  # fmt: skip
    # B and num_splits; planned: n and 1
    batch = out.shape[0]
    num_splits = out.shape[1]
    latent, rope = q_nope.shape[3], q_pe.shape[3]

    # The grid is (B, num_splits, row blocks), rows fastest: programs that read the same keys run together.
    def rows(tensor, columns):
        # (B, num_splits, row blocks) x (B, parts) x (block_h, columns)
        arranged = tensor.flatten(start_dim=1, end_dim=3).tile((1, block_h, columns)).tile((-1, 1, -1))
        arranged = arranged.squeeze(2).unsqueeze(1).expand((batch, num_splits, -1))
        arranged.dtype = arranged.dtype.squeeze(1)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
        return arranged

    q_nope_arranged = rows(q_nope, block_c)
    row_blocks = q_nope_arranged.shape[2]
    grid = (batch, num_splits, row_blocks)

    def paged(tensor, columns):
        # (B, num_splits, row blocks) x (pages, page_size, parts) x (columns,)
        arranged = tensor.tile((1, 1, columns)).tile((-1, -1, -1)).expand(grid)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze((0, 1))
        return arranged

    def listed(tensor):
        # (B, num_splits, row blocks) x (rows, columns) x ()
        arranged = tensor.tile((1, 1)).tile((-1, -1)).unsqueeze(2).expand(grid)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze((0, 1))
        return arranged

    # (B, num_splits, row blocks) x (B,) x ()
    seq_lens_arranged = seq_lens.tile((1,)).tile((-1,)).unsqueeze(1).unsqueeze(2).expand(grid)
    seq_lens_arranged.dtype.dtype = seq_lens_arranged.dtype.dtype.squeeze(0)

    # (B, num_splits, row blocks) x (B, parts) x (block_h, block_c)
    out_arranged = out.tile((1, 1, block_h, block_c)).tile((-1, 1, 1, -1)).squeeze(3).expand((batch, -1, -1))
    out_arranged.dtype = out_arranged.dtype.squeeze((1, 2))
    out_arranged.dtype.dtype = out_arranged.dtype.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x (block_h,)
    lse_arranged = lse.flatten(start_dim=2, end_dim=4).tile((1, 1, block_h))
    lse_arranged.dtype = lse_arranged.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x (B, parts) x (block_h, block_c)
    whole_arranged = whole.tile((1, block_h, block_c)).tile((-1, 1, -1)).squeeze(2).unsqueeze(1)
    whole_arranged = whole_arranged.expand((batch, num_splits, -1))
    whole_arranged.dtype = whole_arranged.dtype.squeeze(1)
    whole_arranged.dtype.dtype = whole_arranged.dtype.dtype.squeeze(0)

    return (
        q_nope_arranged,
        rows(q_pe, rope),
        paged(kv_cache, block_c),
        paged(pe_cache, rope),
        listed(block_table),
        seq_lens_arranged,
        listed(schedule),
        softmax_scale,
        least,
        causal,
        planned,
        block_n,
        out_arranged,
        lse_arranged,
        whole_arranged,
    )


def application(
    q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, schedule, softmax_scale, least, causal, planned, block_n,
    out, lse, whole,
):  # fmt: skip
    if planned:
        split = lse.offsets(0)
        # Nobody's is -1. What else lies outside the batch was never written: it is not followed.
        row = schedule[split, 0]
        idle = (row < 0) | (row >= seq_lens.shape[0])
    else:
        split = lse.offsets(1)
        row = lse.offsets(0)
    seq_len = seq_lens[row]
    num_blocks = (seq_len + block_n - 1) // block_n
    # This split's blocks of keys: [start, end)
    if planned:
        start = ntl.maximum(schedule[split, 1], 0) // block_n
        end = (ntl.minimum(schedule[split, 2], seq_len) + block_n - 1) // block_n
    else:
        num_splits = lse.source.shape[1]
        per_split = ntl.maximum((num_blocks + num_splits - 1) // num_splits, least)
        start = split * per_split
        end = ntl.minimum(start + per_split, num_blocks)
        idle = (start >= end) & (split > 0)
    if idle:
        return
    if planned:
        # Asked here, where no accumulator holds registers yet
        alone = schedule[row + 1, 3] - schedule[row, 3] == 1
    # Of the queries and pages, and of the results
    batch = ntl.cast(row, ntl.int64)
    target = ntl.cast(lse.offsets(0), ntl.int64)

    # The number of parts is a constant: each `if` on it is decided while compiling.
    # [block_h, block_c]
    q0 = q_nope[batch, 0]
    if q_nope.shape[1] == 2:
        # [block_h, block_c]
        q1 = q_nope[batch, 1]
    # [block_h, R]
    qp = q_pe[batch, 0]
    acc0 = ntl.zeros((q0.shape[0], q0.shape[1]), dtype=ntl.float32)
    acc1 = acc0
    m = ntl.full((q0.shape[0],), -1.0e29, dtype=ntl.float32)
    total = ntl.zeros((q0.shape[0],), dtype=ntl.float32)
    # exp(x) = exp2(x log2(e))
    scale = ntl.cast(softmax_scale, ntl.float32) * 1.4426950408889634

    if causal:
        # Row r is head r % H of new token r // H, which sees seq_len - s_q + 1 + r // H keys; [block_h]
        limit = seq_len - lse.source.shape[2] + 1 + lse.offsets(2)

    tiles = kv_cache.shape[1] // block_n
    page = ntl.cast(0, ntl.int64)
    if start < end:
        page = ntl.cast(block_table[row, start // tiles], ntl.int64)
    for block in range(start, end):
        position = block * block_n + ntl.arange(0, block_n)
        slot = block % tiles * block_n + ntl.arange(0, block_n)
        slot = ntl.where(position < seq_len, slot, -1)
        # [block_n, block_c]
        k0 = kv_cache[page, slot[:, None], 0]
        if kv_cache.shape[2] == 2:
            # [block_n, block_c]
            k1 = kv_cache[page, slot[:, None], 1]
        # [block_n, R]
        kp = pe_cache[page, slot[:, None], 0]
        page = ntl.cast(block_table[row, ntl.minimum(block + 1, num_blocks - 1) // tiles], ntl.int64)

        # [block_h, block_n]
        s = ntl.dot(q0, ntl.trans(k0), input_precision="ieee")
        if kv_cache.shape[2] == 2:
            s = ntl.dot(q1, ntl.trans(k1), s, input_precision="ieee")
        s = ntl.dot(qp, ntl.trans(kp), s, input_precision="ieee")
        if causal:
            s = ntl.where(position[None, :] < limit[:, None], s * scale, -1.0e30)
        else:
            s = ntl.where((position < seq_len)[None, :], s * scale, -1.0e30)
        m_new = ntl.maximum(m, ntl.max(s, axis=1))
        p = ntl.exp2(s - m_new[:, None])
        alpha = ntl.exp2(m - m_new)
        total = total * alpha + ntl.sum(p, axis=1)
        weight = ntl.cast(p, k0.dtype)
        acc0 = ntl.dot(weight, k0, acc0 * alpha[:, None], input_precision="ieee")
        if kv_cache.shape[2] == 2:
            acc1 = ntl.dot(weight, k1, acc1 * alpha[:, None], input_precision="ieee")
        m = m_new

    # A row without keys: out 0, lse -inf
    divisor = ntl.where(total == 0, 1.0, total)
    lse = ntl.where(total == 0, float("-inf"), (m + ntl.log2(divisor)) * 0.6931471805599453)
    if planned:
        if alone:
            whole[batch, 0] = acc0 / divisor[:, None]
            if kv_cache.shape[2] == 2:
                whole[batch, 1] = acc1 / divisor[:, None]
            return
    out[target, 0] = acc0 / divisor[:, None]
    if kv_cache.shape[2] == 2:
        out[target, 1] = acc1 / divisor[:, None]


def premake(page_size, block_h, block_n, block_c, latent=512, rope=64, dtype=None):
    """block_h, block_n: rows and keys of a tile; block_c: `latent`, or half of it for two accumulators."""
    tensors = (
        Tensor(shape=(None, None, None, latent), dtype=dtype, other=0, name="q_nope"),
        Tensor(shape=(None, None, None, rope), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, page_size, latent), dtype=dtype, other=0, name="kv_cache"),
        Tensor(shape=(None, page_size, rope), dtype=dtype, other=0, name="pe_cache"),
        Tensor(2, name="block_table"),
        Tensor(1, name="seq_lens"),
        Tensor(2, name="schedule"),
        Tensor(0, name="softmax_scale"),
        Tensor(0, name="least"),
        Tensor(0, constexpr=True, name="causal"),
        Tensor(0, constexpr=True, name="planned"),
        Tensor(0, constexpr=True, name="block_n"),
        Tensor(shape=(None, None, None, latent), name="out"),
        Tensor(4, name="lse"),
        Tensor(shape=(None, None, latent), name="whole"),
    )
    return functools.partial(arrangement, block_h=block_h, block_c=block_c), application, tensors
