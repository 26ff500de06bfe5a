"""latent_append_fp8, and RoPE of the queries' columns in the same launch.

cache[slots[t] // page_size, slots[t] % page_size] = quantised [rms_norm(kv_a[t, :512], weight, eps), rope(kv_a[t,
512:], cos[t], sin[t])];  q_pe[t, h] = rope(q_pe[t, h], cos[t], sin[t])

As kernels/latent_append_fp8.py, with q_pe `[T, H, 64]` of any strides, rotated in place: the caller passes it twice. A
program takes `block_h` heads of one token; those of a token all write its row of the cache, the same bytes, as in
kernels/latent_append_rope.py.

Source: arXiv 2405.04434, section 2.1; arXiv 2104.09864, section 3.4.2; deepseek-ai/FlashMLA, README.md and
tests/quant.py.
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor

from ntops_mla.kernels import latent_append_fp8, latent_quantize, rope


def arrangement(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, codes, scales, pe_cache, q_pe, q_out, block_h):
    heads = rope.arrangement(q_pe, cos, sin, q_out, block_h)
    rows = latent_append_fp8.arrangement(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, codes, scales, pe_cache)
    # (T,) -> (T, H / block_h)
    rows = (rope.beside_heads(row, heads[0].shape[1]) for row in rows)
    return *rows, heads[0], heads[3]


def application(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, codes, scales, pe_cache, q_pe, q_out):
    token = ntl.cast(cos.offsets(0), ntl.int64)
    # 2^31 slots would be terabytes: int32 is enough for them, and not all boards divide int64
    slot = ntl.cast(slots, ntl.int32)
    page_size = codes.shape[1]
    # Page -1 is outside the cache, so that the store is masked; int64, because page * stride can pass 2^31
    there = (slots >= 0) & (slots < 2147483647)
    page = ntl.cast(ntl.where(there, slot // page_size, -1), ntl.int64)
    offset = slot % page_size

    # [512]
    x = ntl.cast(kv_a_latent[token], ntl.float32)
    # [512]
    w = ntl.cast(weight, ntl.float32)
    groups = latent_append_fp8.normalised_groups(x, w, eps)
    bits = latent_quantize.scale_bits(groups)
    code = latent_quantize.encode(groups, bits)
    codes[page, offset] = ntl.cast(ntl.reshape(code, (512,)), ntl.uint8)
    scales[page, offset] = ntl.cast(bits, ntl.float32, bitcast=True)

    # [64]
    pe = ntl.cast(kv_a_pe[token], ntl.float32)
    # [32]
    c = cos
    # [32]
    s = sin
    even, odd = ntl.split(ntl.reshape(pe, (pe.shape[0] // 2, 2)))
    pe_cache[page, offset] = ntl.interleave(even * c - odd * s, even * s + odd * c)

    # [block_h, 64]
    q = ntl.cast(q_pe[token], ntl.float32)
    first, second = ntl.split(ntl.reshape(q, (q.shape[0], q.shape[1] // 2, 2)))
    q_out[token] = ntl.interleave(first * c[None, :] - second * s[None, :], first * s[None, :] + second * c[None, :])


def premake(page_size, block_h, dtype=None):
    _, _, tensors = latent_append_fp8.premake(page_size, dtype)
    tensors = (
        *tensors,
        Tensor(shape=(None, None, 64), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, None, 64), dtype=dtype, name="q_out"),
    )
    return functools.partial(arrangement, block_h=block_h), application, tensors
