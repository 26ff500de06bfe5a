"""Causal attention within each request of a packed batch, every head with its own keys and values.

out[t, h] = softmax_j(softmax_scale q[t, h] . k[j, h]) v[j, h];  lse[h, t] = log sum_j exp(softmax_scale q[t, h] . k[j,
h])

q `[T, H, Dqk]`, k `[Tk, H, Dqk]`, v `[Tk, H, Dv]`, cu_seqlens_q and cu_seqlens_k int32 `[B + 1]` -> out `[T, H, Dv]`,
lse float32 `[H, T]`. Causal: the diagonal is aligned at the end of each request, row i of n sees the first n_k - n + 1
+ i keys. A program takes `block_m` rows of one request and one head, and the keys `block_n` at a time.

- The grid is (H, T // block_m + B), which the host knows without reading a length; each program finds its request by
  binary search over cu_seqlens_q, and the few that find none return.
- The query's columns are two tiles, 128 + 64 (or 128 + 128): 192 is no power of two.
- Rows and keys past a request's end are masked in the load, by row index -1.
- The sentinels are finite, and a hidden score (-1e30) lies far below the first maximum (-1e29): exp2 of their
difference
  is 0, so that a row that sees no key of a tile leaves m, total and the accumulator alone.

Source: arXiv 2205.14135; Dao-AILab/flash-attention flash_attn_varlen_func.
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(
    q_lo,
    q_hi,
    k_lo,
    k_hi,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    softmax_scale,
    causal,
    block_n,
    out,
    lse,
    block_m,
    tile_m,
    split,
):
    heads = q_lo.shape[1]
    width = q_lo.shape[2]
    tiles = q_lo.shape[0] // tile_m + cu_seqlens_q.shape[0] - 1

    def by_head(tensor, start, stop):
        # (H, tiles) x (tokens,) x (columns,)
        arranged = tensor[:, :, start:stop].tile((1, 1, stop - start)).tile((-1, 1, 1)).squeeze((0, 2))
        arranged = arranged.unsqueeze(1).expand((-1, tiles))
        arranged.dtype = arranged.dtype.squeeze((1, 2))
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze((0, 1))
        return arranged

    def bounds(tensor):
        # (H, tiles) x (B + 1,) x ()
        arranged = tensor.tile((1,)).tile((-1,)).unsqueeze(1).expand((heads, tiles))
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
        return arranged

    # (H, tiles) x (T,) x ()
    lse_arranged = lse.tile((1, 1)).tile((1, -1)).expand((-1, tiles))
    lse_arranged.dtype = lse_arranged.dtype.squeeze(0)
    lse_arranged.dtype.dtype = lse_arranged.dtype.dtype.squeeze((0, 1))
    return (
        by_head(q_lo, 0, split),
        by_head(q_hi, split, width),
        by_head(k_lo, 0, split),
        by_head(k_hi, split, width),
        by_head(v, 0, v.shape[2]),
        bounds(cu_seqlens_q),
        bounds(cu_seqlens_k),
        softmax_scale,
        causal,
        block_n,
        by_head(out, 0, v.shape[2]),
        lse_arranged,
        block_m,
    )


def application(
    q_lo, q_hi, k_lo, k_hi, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, block_n, out, lse, block_m
):
    num_requests = cu_seqlens_q.shape[0] - 1
    tile = ntl.program_id(0) % (q_lo.shape[0] // block_m + num_requests)
    # Request b has tiles cu_seqlens_q[b] // block_m + b and on: at least as many as it needs. The last b that begins
    # at or before this tile:
    low = ntl.cast(0, ntl.int32)
    high = num_requests
    while low < high:
        middle = (low + high + 1) // 2
        first = cu_seqlens_q[middle] // block_m + middle
        if first <= tile:
            low = middle
        else:
            high = middle - 1
    if low >= num_requests:
        return
    q_start = cu_seqlens_q[low]
    q_len = cu_seqlens_q[low + 1] - q_start
    k_start = cu_seqlens_k[low]
    k_len = cu_seqlens_k[low + 1] - k_start
    row_start = (tile - (q_start // block_m + low)) * block_m
    if row_start >= q_len:
        return

    # int64: T * H * Dqk can pass 2^31
    row = row_start + ntl.arange(0, block_m)
    token = ntl.cast(ntl.where(row < q_len, q_start + row, -1), ntl.int64)
    # [block_m, split]
    q0 = q_lo[token[:, None]]
    # [block_m, Dqk - split]
    q1 = q_hi[token[:, None]]
    acc = ntl.zeros((q0.shape[0], v.dtype.shape[0]), dtype=ntl.float32)
    m = ntl.full((q0.shape[0],), -1.0e29, dtype=ntl.float32)
    total = ntl.zeros((q0.shape[0],), dtype=ntl.float32)
    # exp(x) = exp2(x log2(e))
    scale = ntl.cast(softmax_scale, ntl.float32) * 1.4426950408889634

    end = k_len
    if causal:
        # The last row of the tile sees most
        end = ntl.minimum(k_len, row_start + block_m + k_len - q_len)
    for key_start in range(0, end, block_n):
        position = key_start + ntl.arange(0, block_n)
        key = ntl.cast(ntl.where(position < k_len, k_start + position, -1), ntl.int64)
        # [block_n, split]
        k0 = k_lo[key[:, None]]
        # [block_n, Dqk - split]
        k1 = k_hi[key[:, None]]
        # [block_m, block_n]
        s = ntl.dot(q0, ntl.trans(k0), input_precision="ieee")
        s = ntl.dot(q1, ntl.trans(k1), s, input_precision="ieee")
        visible = (position < k_len)[None, :]
        if causal:
            visible = visible & (position[None, :] <= (row + k_len - q_len)[:, None])
        s = ntl.where(visible, s * scale, -1.0e30)
        m_new = ntl.maximum(m, ntl.max(s, axis=1))
        p = ntl.exp2(s - m_new[:, None])
        alpha = ntl.exp2(m - m_new)
        total = total * alpha + ntl.sum(p, axis=1)
        # [block_n, Dv]
        values = v[key[:, None]]
        acc = ntl.dot(ntl.cast(p, values.dtype), values, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    # A row without keys: out 0, lse -inf
    divisor = ntl.where(total == 0, 1.0, total)
    out[token[:, None]] = acc / divisor[:, None]
    lse[token] = ntl.where(total == 0, float("-inf"), (m + ntl.log2(divisor)) * 0.6931471805599453)


def premake(block_m, block_n, qk_width=192, v_width=128, dtype=None):
    """block_m, block_n: rows and keys of a tile; qk_width 192 or 256."""

    def packed(width, name, other=0):
        return Tensor(shape=(None, None, width), dtype=dtype, other=other, name=name)

    tensors = (
        packed(qk_width, "q_lo"),
        packed(qk_width, "q_hi"),
        packed(qk_width, "k_lo"),
        packed(qk_width, "k_hi"),
        packed(v_width, "v"),
        Tensor(1, name="cu_seqlens_q"),
        Tensor(1, name="cu_seqlens_k"),
        Tensor(0, name="softmax_scale"),
        Tensor(0, constexpr=True, name="causal"),
        Tensor(0, constexpr=True, name="block_n"),
        packed(v_width, "out", None),
        Tensor(2, name="lse"),
        Tensor(0, constexpr=True, name="block_m"),
    )
    return functools.partial(arrangement, tile_m=block_m, split=128), application, tensors
