"""Absorbed attention of a few new tokens per request over FlashMLA's fp8 cache, split over the keys.

kv[j, c] = scale[j, c // 128] code[j, c]
s[j] = softmax_scale (q_nope . kv[j] + q_pe . pe[j]);  out = softmax(s) kv;  lse = log sum exp(s)
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(
    q_nope, q_pe, codes, scales, pe, block_table, seq_lens, softmax_scale, least, causal, block_n, hardware, out, lse,
    block_h,
):  # fmt: skip
    batch = seq_lens.shape[0]
    num_splits = out.shape[1]
    rope = q_pe.shape[3]

    # The grid is (B, num_splits, row blocks), rows fastest: programs that read the same keys run together.
    def rows(tensor, columns):
        # (B, num_splits, row blocks) x (B, parts) x (block_h, columns)
        arranged = tensor.flatten(start_dim=1, end_dim=3).tile((1, block_h, columns)).tile((-1, 1, -1))
        arranged = arranged.squeeze(2).unsqueeze(1).expand((batch, num_splits, -1))
        arranged.dtype = arranged.dtype.squeeze(1)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
        return arranged

    q_nope_arranged = rows(q_nope, 128)
    row_blocks = q_nope_arranged.shape[2]
    grid = (batch, num_splits, row_blocks)

    # (B, num_splits, row blocks) x (pages, page_size, groups) x (128,)
    codes_arranged = codes.tile((1, 1, 128)).tile((-1, -1, -1)).expand(grid)
    codes_arranged.dtype.dtype = codes_arranged.dtype.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x (pages, page_size, groups) x ()
    scales_arranged = scales.tile((1, 1, 1)).tile((-1, -1, -1)).expand(grid)
    scales_arranged.dtype.dtype = scales_arranged.dtype.dtype.squeeze((0, 1, 2))

    # (B, num_splits, row blocks) x (pages, page_size * 328) x ()
    pe_arranged = pe.tile((1, 1)).tile((-1, -1)).unsqueeze(2).expand(grid)
    pe_arranged.dtype.dtype = pe_arranged.dtype.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x (max_pages,) x ()
    block_table_arranged = block_table.tile((1, 1)).tile((1, -1)).unsqueeze(2).expand((-1, num_splits, row_blocks))
    block_table_arranged.dtype = block_table_arranged.dtype.squeeze(0)
    block_table_arranged.dtype.dtype = block_table_arranged.dtype.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x ()
    seq_lens_arranged = seq_lens.tile((1,)).unsqueeze(1).unsqueeze(2).expand((-1, num_splits, row_blocks))
    seq_lens_arranged.dtype = seq_lens_arranged.dtype.squeeze(0)

    # (B, num_splits, row blocks) x (B, parts) x (block_h, 128)
    out_arranged = out.tile((1, 1, block_h, 128)).tile((-1, 1, 1, -1)).squeeze(3).expand((batch, -1, -1))
    out_arranged.dtype = out_arranged.dtype.squeeze((1, 2))
    out_arranged.dtype.dtype = out_arranged.dtype.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x (block_h,)
    lse_arranged = lse.flatten(start_dim=2, end_dim=4).tile((1, 1, block_h))
    lse_arranged.dtype = lse_arranged.dtype.squeeze((0, 1))

    return (
        q_nope_arranged,
        rows(q_pe, rope),
        codes_arranged,
        scales_arranged,
        pe_arranged,
        block_table_arranged,
        seq_lens_arranged,
        softmax_scale,
        least,
        causal,
        block_n,
        hardware,
        out_arranged,
        lse_arranged,
    )


def dequantized(byte, scale, hardware, like):
    if hardware:
        value = ntl.cast(ntl.cast(byte, ntl.float8e4nv, bitcast=True), ntl.float32)
        weight = scale
    else:
        wide = ntl.cast(byte, ntl.int16)
        rest = wide & 0x7F
        bits = ((wide & 0x80) << 8) | ((rest | ((rest + 1) & 0x80)) << 7)
        value = ntl.cast(ntl.cast(bits, ntl.float16, bitcast=True), ntl.float32)
        weight = scale * 256.0
    return ntl.cast(value * weight[:, None], like.dtype)


def application(
    q_nope, q_pe, codes, scales, pe, block_table, seq_lens, softmax_scale, least, causal, block_n, hardware, out, lse
):
    seq_len = seq_lens
    batch = ntl.cast(seq_lens.offsets(0), ntl.int64)
    split = lse.offsets(1)
    num_splits = lse.source.shape[1]
    # This split's blocks of keys: [start, end)
    num_blocks = (seq_len + block_n - 1) // block_n
    per_split = ntl.maximum((num_blocks + num_splits - 1) // num_splits, least)
    start = split * per_split
    end = ntl.minimum(start + per_split, num_blocks)
    if (start >= end) & (split > 0):
        return

    # [block_h, 128]
    q0 = q_nope[batch, 0]
    # [block_h, 128]
    q1 = q_nope[batch, 1]
    # [block_h, 128]
    q2 = q_nope[batch, 2]
    # [block_h, 128]
    q3 = q_nope[batch, 3]
    # [block_h, R]
    qp = q_pe[batch, 0]
    acc0 = ntl.zeros((q0.shape[0], q0.shape[1]), dtype=ntl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    m = ntl.full((q0.shape[0],), -1.0e29, dtype=ntl.float32)
    total = ntl.zeros((q0.shape[0],), dtype=ntl.float32)
    # exp(x) = exp2(x log2(e))
    scale = ntl.cast(softmax_scale, ntl.float32) * 1.4426950408889634

    if causal:
        # Row r is head r % H of new token r // H, which sees seq_len - s_q + 1 + r // H keys; [block_h]
        limit = seq_len - lse.source.shape[2] + 1 + lse.offsets(2)

    tiles = codes.shape[1] // block_n
    page = ntl.cast(0, ntl.int64)
    if start < end:
        page = ntl.cast(block_table[start // tiles], ntl.int64)
    slot = start % tiles * block_n + ntl.arange(0, block_n)
    slot = ntl.where(start * block_n + ntl.arange(0, block_n) < seq_len, slot, -1)
    # [block_n, 128]
    c0 = codes[page, slot[:, None], 0]
    # [block_n, 128]
    c1 = codes[page, slot[:, None], 1]
    # [block_n, 128]
    c2 = codes[page, slot[:, None], 2]
    # [block_n, 128]
    c3 = codes[page, slot[:, None], 3]
    for block in range(start, end):
        position = block * block_n + ntl.arange(0, block_n)
        slot = block % tiles * block_n + ntl.arange(0, block_n)
        slot = ntl.where(position < seq_len, slot, -1)
        ahead = ntl.cast(block_table[ntl.minimum(block + 1, num_blocks - 1) // tiles], ntl.int64)
        # [block_n]
        w0 = scales[page, slot, 0]
        # [block_n]
        w1 = scales[page, slot, 1]
        # [block_n]
        w2 = scales[page, slot, 2]
        # [block_n]
        w3 = scales[page, slot, 3]
        place = slot[:, None] * 328 + (264 + ntl.arange(0, 64))[None, :]
        # [block_n, R]
        kp = pe[page, place]
        kp = ntl.cast(ntl.cast(kp, ntl.float32), q0.dtype)
        k0 = dequantized(c0, w0, hardware, q0)
        k1 = dequantized(c1, w1, hardware, q0)
        k2 = dequantized(c2, w2, hardware, q0)
        k3 = dequantized(c3, w3, hardware, q0)

        page = ahead
        slot = (block + 1) % tiles * block_n + ntl.arange(0, block_n)
        slot = ntl.where((position + block_n < seq_len) & (block + 1 < end), slot, -1)
        # [block_n, 128]
        c0 = codes[page, slot[:, None], 0]
        # [block_n, 128]
        c1 = codes[page, slot[:, None], 1]
        # [block_n, 128]
        c2 = codes[page, slot[:, None], 2]
        # [block_n, 128]
        c3 = codes[page, slot[:, None], 3]

        # [block_h, block_n]
        s = ntl.dot(qp, ntl.trans(kp), input_precision="ieee")
        s = ntl.dot(q0, ntl.trans(k0), s, input_precision="ieee")
        s = ntl.dot(q1, ntl.trans(k1), s, input_precision="ieee")
        s = ntl.dot(q2, ntl.trans(k2), s, input_precision="ieee")
        s = ntl.dot(q3, ntl.trans(k3), s, input_precision="ieee")
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
        acc1 = ntl.dot(weight, k1, acc1 * alpha[:, None], input_precision="ieee")
        acc2 = ntl.dot(weight, k2, acc2 * alpha[:, None], input_precision="ieee")
        acc3 = ntl.dot(weight, k3, acc3 * alpha[:, None], input_precision="ieee")
        m = m_new

    # A row without keys: out 0, lse -inf
    divisor = ntl.where(total == 0, 1.0, total)
    out[batch, 0] = acc0 / divisor[:, None]
    out[batch, 1] = acc1 / divisor[:, None]
    out[batch, 2] = acc2 / divisor[:, None]
    out[batch, 3] = acc3 / divisor[:, None]
    lse = ntl.where(total == 0, float("-inf"), (m + ntl.log2(divisor)) * 0.6931471805599453)


def premake(page_size, block_h, block_n, hardware=0, dtype=None):
    tensors = (
        Tensor(shape=(None, None, None, 512), dtype=dtype, other=0, name="q_nope"),
        Tensor(shape=(None, None, None, 64), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, page_size, 512), other=0, name="codes"),
        Tensor(shape=(None, page_size, 4), other=0, name="scales"),
        Tensor(shape=(None, page_size * 328), other=0, name="pe"),
        Tensor(2, name="block_table"),
        Tensor(1, name="seq_lens"),
        Tensor(0, name="softmax_scale"),
        Tensor(0, name="least"),
        Tensor(0, constexpr=True, name="causal"),
        Tensor(0, constexpr=True, name="block_n"),
        Tensor(0, constexpr=True, name="hardware"),
        Tensor(shape=(None, None, None, 512), name="out"),
        Tensor(shape=(None, None, None, None), name="lse"),
    )
    return functools.partial(arrangement, block_h=block_h), application, tensors
