"""Absorbed attention of a few new tokens per request over FlashMLA's fp8 cache, split over the keys.

kv[j, c] = scales[j, c // 128] codes[j, c]
s[j] = softmax_scale (q_nope . kv[j] + q_pe . pe[j]);  out = softmax(s) kv;  lse = log sum exp(s)

q_nope `[B, s_q, H, 512]`, q_pe `[B, s_q, H, 64]`; of each token's 656 bytes the first 512 as codes, uint8 `[pages,
page_size, 512]`, the next 16 as scales, float32 `[pages, page_size, 4]`, and the last 128 in pe, a page's bytes as
bfloat16, `[pages, page_size * 328]`; block_table int32 `[B, max_pages]`, seq_lens int32 `[B]` -> out `[B, num_splits,
s_q * H, 512]`, lse float32 `[B, num_splits, s_q, H]`, of each split's own keys; `mla_combine` joins the splits. Rows,
splits, `planned`, masks and sentinels are as in `mla_decode`; schedule int32 `[n, 4]`, whole `[B, s_q * H, 512]`.

- A tile of keys is dequantised once, for all rows of a program: scale * code in float32, rounded to the queries' dtype.
  It goes by groups of 128 columns, each with its own accumulator: a tile of 512 is more float32 values than registers.
- A code becomes a number without an instruction for it: its bits, moved into a float16's, are code / 256, which is
  widened to float32 and multiplied by 256 scale: exact for all 256 codes, with NaN (127 and 255). Only in the bits are
  float16's subnormal numbers met, not in a tile, where not every matrix unit keeps them. `hardware` 1: the cast from
  float8_e4m3fn, where there is an instruction.
- The next tile's codes are on their way, in registers, while this one is used. Left to the compiler they are not: it
  wants the bytes in two layouts, one for each product, and then copies none of them ahead. A dequantisation that it
  cannot move (within an `if`) is copied ahead and done twice.
- Not done: scales applied to the scores and to the weights instead of the keys. Compiled for sm_90 it takes 254
  registers in place of 219 (32 rows, 32 keys, 8 warps), and weight * scale falls below what float16 can hold.
- pe is read as one row a page, because 328 is no multiple of 16: as a stride it would be read 2 bytes at a time.

Source: deepseek-ai/FlashMLA, README.md and tests/quant.py; arXiv 2405.04434, section 2.1.2 and appendix C.
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(
    q_nope, q_pe, codes, scales, pe, block_table, seq_lens, schedule, softmax_scale, least, causal, planned, block_n,
    hardware, out, lse, whole, block_h,
):  # fmt: skip
    # B and num_splits; planned: n and 1
    batch = out.shape[0]
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

    def listed(tensor):
        # (B, num_splits, row blocks) x (rows, columns) x ()
        arranged = tensor.tile((1, 1)).tile((-1, -1)).unsqueeze(2).expand(grid)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze((0, 1))
        return arranged

    # (B, num_splits, row blocks) x (B,) x ()
    seq_lens_arranged = seq_lens.tile((1,)).tile((-1,)).unsqueeze(1).unsqueeze(2).expand(grid)
    seq_lens_arranged.dtype.dtype = seq_lens_arranged.dtype.dtype.squeeze(0)

    # (B, num_splits, row blocks) x (B, parts) x (block_h, 128)
    out_arranged = out.tile((1, 1, block_h, 128)).tile((-1, 1, 1, -1)).squeeze(3).expand((batch, -1, -1))
    out_arranged.dtype = out_arranged.dtype.squeeze((1, 2))
    out_arranged.dtype.dtype = out_arranged.dtype.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x (block_h,)
    lse_arranged = lse.flatten(start_dim=2, end_dim=4).tile((1, 1, block_h))
    lse_arranged.dtype = lse_arranged.dtype.squeeze((0, 1))

    # (B, num_splits, row blocks) x (B, parts) x (block_h, 128)
    whole_arranged = whole.tile((1, block_h, 128)).tile((-1, 1, -1)).squeeze(2).unsqueeze(1)
    whole_arranged = whole_arranged.expand((batch, num_splits, -1))
    whole_arranged.dtype = whole_arranged.dtype.squeeze(1)
    whole_arranged.dtype.dtype = whole_arranged.dtype.dtype.squeeze(0)

    return (
        q_nope_arranged,
        rows(q_pe, rope),
        codes_arranged,
        scales_arranged,
        pe_arranged,
        listed(block_table),
        seq_lens_arranged,
        listed(schedule),
        softmax_scale,
        least,
        causal,
        planned,
        block_n,
        hardware,
        out_arranged,
        lse_arranged,
        whole_arranged,
    )


def dequantized(byte, scale, hardware, like):
    if hardware:
        value = ntl.cast(ntl.cast(byte, ntl.float8e4nv, bitcast=True), ntl.float32)
        factor = scale
    else:
        code = ntl.cast(byte, ntl.int32)
        size = code & 127
        # 127 is NaN: with all 5 bits of a float16's exponent set
        bits = ((code & 128) << 8) | ((size | ((size + 1) & 128)) << 7)
        value = ntl.cast(ntl.cast(ntl.cast(bits, ntl.int16), ntl.float16, bitcast=True), ntl.float32)
        factor = scale * 256.0
    return ntl.cast(value * factor[:, None], like.dtype)


def application(
    q_nope, q_pe, codes, scales, pe, block_table, seq_lens, schedule, softmax_scale, least, causal, planned, block_n,
    hardware, out, lse, whole,
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

    # [block_h, 128]
    q0 = q_nope[batch, 0]
    # [block_h, 128]
    q1 = q_nope[batch, 1]
    # [block_h, 128]
    q2 = q_nope[batch, 2]
    # [block_h, 128]
    q3 = q_nope[batch, 3]
    # [block_h, 64]
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
        page = ntl.cast(block_table[row, start // tiles], ntl.int64)
    position = start * block_n + ntl.arange(0, block_n)
    slot = start % tiles * block_n + ntl.arange(0, block_n)
    slot = ntl.where(position < seq_len, slot, -1)
    # [block_n, 128]
    c0 = codes[page, slot[:, None], 0]
    # [block_n, 128]
    c1 = codes[page, slot[:, None], 1]
    # [block_n, 128]
    c2 = codes[page, slot[:, None], 2]
    # [block_n, 128]
    c3 = codes[page, slot[:, None], 3]
    for block in range(start, end):
        # The next tile's page
        ahead = ntl.cast(block_table[row, ntl.minimum(block + 1, num_blocks - 1) // tiles], ntl.int64)
        position = block * block_n + ntl.arange(0, block_n)
        slot = block % tiles * block_n + ntl.arange(0, block_n)
        slot = ntl.where(position < seq_len, slot, -1)
        # [block_n]
        w0 = scales[page, slot, 0]
        # [block_n]
        w1 = scales[page, slot, 1]
        # [block_n]
        w2 = scales[page, slot, 2]
        # [block_n]
        w3 = scales[page, slot, 3]
        # A token is 328 values of 2 bytes, the last 64 of them its rope columns
        place = slot[:, None] * 328 + (264 + ntl.arange(0, 64))[None, :]
        # [block_n, 64]
        kp = pe[page, place]
        # By float32: not every compiler casts bfloat16 to float16
        kp = ntl.cast(ntl.cast(kp, ntl.float32), q0.dtype)
        # [block_n, 128]
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
    lse = ntl.where(total == 0, float("-inf"), (m + ntl.log2(divisor)) * 0.6931471805599453)
    if planned:
        if alone:
            whole[batch, 0] = acc0 / divisor[:, None]
            whole[batch, 1] = acc1 / divisor[:, None]
            whole[batch, 2] = acc2 / divisor[:, None]
            whole[batch, 3] = acc3 / divisor[:, None]
            return
    out[target, 0] = acc0 / divisor[:, None]
    out[target, 1] = acc1 / divisor[:, None]
    out[target, 2] = acc2 / divisor[:, None]
    out[target, 3] = acc3 / divisor[:, None]


def premake(page_size, block_h, block_n, hardware, dtype=None):
    """block_h, block_n: rows and keys of a tile; hardware: 1 where the compiler casts from float8_e4m3fn, else 0."""
    tensors = (
        Tensor(shape=(None, None, None, 512), dtype=dtype, other=0, name="q_nope"),
        Tensor(shape=(None, None, None, 64), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, page_size, 512), other=0, name="codes"),
        Tensor(shape=(None, page_size, 4), other=0, name="scales"),
        Tensor(shape=(None, page_size * 328), other=0, name="pe"),
        Tensor(2, name="block_table"),
        Tensor(1, name="seq_lens"),
        Tensor(2, name="schedule"),
        Tensor(0, name="softmax_scale"),
        Tensor(0, name="least"),
        Tensor(0, constexpr=True, name="causal"),
        Tensor(0, constexpr=True, name="planned"),
        Tensor(0, constexpr=True, name="block_n"),
        Tensor(0, constexpr=True, name="hardware"),
        Tensor(shape=(None, None, None, 512), name="out"),
        Tensor(4, name="lse"),
        Tensor(shape=(None, None, 512), name="whole"),
    )
    return functools.partial(arrangement, block_h=block_h), application, tensors
