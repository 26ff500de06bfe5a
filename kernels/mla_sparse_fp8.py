"""Absorbed attention of each token over keys of its own, gathered from FlashMLA's fp8 cache, split over them.

kv[i, c] = scales[i, c // 128] codes[i, c];  s[j] = softmax_scale (q_nope . kv[i_j] + q_pe . pe[i_j])
out = softmax(s) kv;  lse = log sum exp(s);  max_logits = max(s)

q_nope `[T, H, 512]`, q_pe `[T, H, 64]`; of each token's 656 bytes codes, uint8 `[pages, page_size, 512]`, scales,
float32 `[pages, page_size, 4]`, and pe, a page's bytes as bfloat16, `[pages, page_size * 328]`; indices int32 `[T,
topk]` (page * page_size + slot), lengths int32 `[T]`, from 0 to topk -> out `[T, num_splits, H, 512]`, lse and
max_logits float32 `[T, num_splits, H]`, of each split's own keys; `mla_combine` joins the splits.

Keys, rows, splits and sentinels are as in `mla_sparse`, and the dequantisation as in `mla_decode_fp8`, which say why.

- A cache whose pages follow each other without a gap is one page (`flat`): no division. Slots are int64 for that.
- The next tile's codes are on their way, in registers, while this one is used, and the indices of the one after it.
- pe's rows have no end that the kernel knows: a bound that is no constant would be asked for each value, and each be
  loaded alone. What is no key has slot -1, and so places below 0, which the load leaves out.

Source: deepseek-ai/FlashMLA, README.md and tests/quant.py; arXiv 2512.02556, section 2.1 (the choice of keys).
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor

from ntops_mla.kernels import mla_decode_fp8


def arrangement(
    q_nope, q_pe, codes, scales, pe, indices, lengths, softmax_scale, least, flat, want_max, block_n, hardware, out,
    lse, max_logits, block_h, columns,
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

    q_nope_arranged = heads(q_nope, 128)
    head_blocks = q_nope_arranged.shape[2]
    grid = (tokens, num_splits, head_blocks)

    # (T, num_splits, head blocks) x (pages, page_size, groups) x (128,)
    codes_arranged = codes.tile((1, 1, 128)).tile((-1, -1, -1)).expand(grid)
    codes_arranged.dtype.dtype = codes_arranged.dtype.dtype.squeeze((0, 1))

    # (T, num_splits, head blocks) x (pages, page_size, groups) x ()
    scales_arranged = scales.tile((1, 1, 1)).tile((-1, -1, -1)).expand(grid)
    scales_arranged.dtype.dtype = scales_arranged.dtype.dtype.squeeze((0, 1, 2))

    # (T, num_splits, head blocks) x (pages, page_size * 328) x ()
    pe_arranged = pe.tile((1, 1)).tile((-1, -1)).unsqueeze(2).expand(grid)
    pe_arranged.dtype.dtype = pe_arranged.dtype.dtype.squeeze((0, 1))

    # (T, num_splits, head blocks) x (T, tiles) x (block_n,)
    indices_arranged = indices.tile((1, columns)).tile((-1, -1)).unsqueeze(2).expand(grid)
    indices_arranged.dtype.dtype = indices_arranged.dtype.dtype.squeeze(0)

    # (T, num_splits, head blocks) x ()
    lengths_arranged = lengths.tile((1,)).unsqueeze(1).unsqueeze(2).expand((-1, num_splits, head_blocks))
    lengths_arranged.dtype = lengths_arranged.dtype.squeeze(0)

    # (T, num_splits, head blocks) x (T, parts) x (block_h, 128)
    out_arranged = out.tile((1, 1, block_h, 128)).tile((-1, 1, 1, -1)).squeeze(3).expand((tokens, -1, -1))
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
        codes_arranged,
        scales_arranged,
        pe_arranged,
        indices_arranged,
        lengths_arranged,
        softmax_scale,
        least,
        flat,
        want_max,
        block_n,
        hardware,
        out_arranged,
        statistic(lse),
        statistic(max_logits),
    )


def application(
    q_nope, q_pe, codes, scales, pe, indices, lengths, softmax_scale, least, flat, want_max, block_n, hardware, out,
    lse, max_logits,
):  # fmt: skip
    length = lengths
    token = ntl.cast(lengths.offsets(0), ntl.int64)
    split = lse.offsets(1)
    num_splits = lse.source.shape[1]
    page_size = codes.source.shape[1]
    slots = codes.source.shape[0] * page_size
    # This split's tiles of indices: [start, end), counted as mla_combine counts them
    num_blocks = (length + block_n - 1) // block_n
    per_split = ntl.maximum((num_blocks + num_splits - 1) // num_splits, least)
    start = split * per_split
    end = ntl.minimum(start + per_split, num_blocks)
    if (start >= end) & (split > 0):
        return

    # [block_h, 128]
    q0 = q_nope[token, 0]
    # [block_h, 128]
    q1 = q_nope[token, 1]
    # [block_h, 128]
    q2 = q_nope[token, 2]
    # [block_h, 128]
    q3 = q_nope[token, 3]
    # [block_h, 64]
    qp = q_pe[token, 0]
    acc0 = ntl.zeros((q0.shape[0], q0.shape[1]), dtype=ntl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    m = ntl.full((q0.shape[0],), -1.0e29, dtype=ntl.float32)
    total = ntl.zeros((q0.shape[0],), dtype=ntl.float32)
    # exp(x) = exp2(x log2(e))
    scale = ntl.cast(softmax_scale, ntl.float32) * 1.4426950408889634

    # Of each key its page and slot, which is -1 for what is none: so a load leaves it out
    # [block_n]: -1 past the last of them
    index = indices[token, start]
    position = start * block_n + ntl.arange(0, block_n)
    slot = ntl.cast(index, ntl.int64)
    page = ntl.zeros((block_n,), dtype=ntl.int64)
    if flat == 0:
        whole = index // page_size
        page = ntl.cast(whole, ntl.int64)
        slot = ntl.cast(index - whole * page_size, ntl.int64)
    slot = ntl.where((position < length) & (index >= 0) & (index < slots), slot, -1)
    # [block_n, 128]
    c0 = codes[page[:, None], slot[:, None], 0]
    # [block_n, 128]
    c1 = codes[page[:, None], slot[:, None], 1]
    # [block_n, 128]
    c2 = codes[page[:, None], slot[:, None], 2]
    # [block_n, 128]
    c3 = codes[page[:, None], slot[:, None], 3]
    # [block_n]
    index = indices[token, start + 1]
    for block in range(start, end):
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
        kp = pe[page[:, None], place]
        # By float32: not every compiler casts bfloat16 to float16
        kp = ntl.cast(ntl.cast(kp, ntl.float32), q0.dtype)
        # [block_n, 128]
        k0 = mla_decode_fp8.dequantized(c0, w0, hardware, q0)
        k1 = mla_decode_fp8.dequantized(c1, w1, hardware, q0)
        k2 = mla_decode_fp8.dequantized(c2, w2, hardware, q0)
        k3 = mla_decode_fp8.dequantized(c3, w3, hardware, q0)
        seen = slot >= 0

        # The next tile
        position = (block + 1) * block_n + ntl.arange(0, block_n)
        slot = ntl.cast(index, ntl.int64)
        page = ntl.zeros((block_n,), dtype=ntl.int64)
        if flat == 0:
            whole = index // page_size
            page = ntl.cast(whole, ntl.int64)
            slot = ntl.cast(index - whole * page_size, ntl.int64)
        ours = (position < length) & (block + 1 < end)
        slot = ntl.where(ours & (index >= 0) & (index < slots), slot, -1)
        # [block_n, 128]
        c0 = codes[page[:, None], slot[:, None], 0]
        # [block_n, 128]
        c1 = codes[page[:, None], slot[:, None], 1]
        # [block_n, 128]
        c2 = codes[page[:, None], slot[:, None], 2]
        # [block_n, 128]
        c3 = codes[page[:, None], slot[:, None], 3]
        # [block_n]
        index = indices[token, block + 2]

        # [block_h, block_n]
        s = ntl.dot(qp, ntl.trans(kp), input_precision="ieee")
        s = ntl.dot(q0, ntl.trans(k0), s, input_precision="ieee")
        s = ntl.dot(q1, ntl.trans(k1), s, input_precision="ieee")
        s = ntl.dot(q2, ntl.trans(k2), s, input_precision="ieee")
        s = ntl.dot(q3, ntl.trans(k3), s, input_precision="ieee")
        s = ntl.where(seen[None, :], s * scale, -1.0e30)
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

    # A row without keys: out 0, lse and max_logits -inf
    divisor = ntl.where(total == 0, 1.0, total)
    out[token, 0] = acc0 / divisor[:, None]
    out[token, 1] = acc1 / divisor[:, None]
    out[token, 2] = acc2 / divisor[:, None]
    out[token, 3] = acc3 / divisor[:, None]
    lse = ntl.where(total == 0, float("-inf"), (m + ntl.log2(divisor)) * 0.6931471805599453)
    if want_max:
        max_logits = ntl.where(total == 0, float("-inf"), m * 0.6931471805599453)


def premake(block_h, block_n, hardware, dtype=None):
    """block_h, block_n: heads and keys of a tile; hardware: 1 where the compiler casts from float8_e4m3fn, else 0."""
    tensors = (
        Tensor(shape=(None, None, 512), dtype=dtype, other=0, name="q_nope"),
        Tensor(shape=(None, None, 64), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, None, 512), other=0, name="codes"),
        Tensor(shape=(None, None, 4), other=0, name="scales"),
        Tensor(shape=(None, 1 << 40), other=0, name="pe"),
        Tensor(2, other=-1, name="indices"),
        Tensor(1, name="lengths"),
        Tensor(0, name="softmax_scale"),
        Tensor(0, name="least"),
        Tensor(0, constexpr=True, name="flat"),
        Tensor(0, constexpr=True, name="want_max"),
        Tensor(0, constexpr=True, name="block_n"),
        Tensor(0, constexpr=True, name="hardware"),
        Tensor(shape=(None, None, None, 512), name="out"),
        Tensor(3, name="lse"),
        Tensor(3, name="max_logits"),
    )
    return functools.partial(arrangement, block_h=block_h, columns=block_n), application, tensors
