"""latent_append, and RoPE of the queries' columns in the same launch.

cache[slots[t] // page_size, slots[t] % page_size] = [rms_norm(kv_a[t, :C], weight, eps), rope(kv_a[t, C:], cos[t],
sin[t])];  q_pe[t, h] = rope(q_pe[t, h], cos[t], sin[t])

As kernels/latent_append.py, with q_pe `[T, H, R]` of any strides, rotated in place: the caller passes it twice. A
program takes `block_h` heads of one token; those of a token all write its row of the cache, the same values, which is
less work than to tell them apart: the row is a fifteenth of R1's query columns.

Source: arXiv 2405.04434, section 2.1; arXiv 2104.09864, section 3.4.2.
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor

from ntops_mla.kernels import latent_append, rope


def arrangement(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, kv_cache, pe_cache, q_pe, q_out, block_h):
    heads = rope.arrangement(q_pe, cos, sin, q_out, block_h)
    rows = latent_append.arrangement(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, kv_cache, pe_cache)
    # (T,) -> (T, H / block_h)
    rows = (rope.beside_heads(row, heads[0].shape[1]) for row in rows)
    return *rows, heads[0], heads[3]


def application(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, kv_cache, pe_cache, q_pe, q_out):
    token = ntl.cast(cos.offsets(0), ntl.int64)
    # 2^31 slots would be terabytes: int32 is enough for them, and not all boards divide int64
    slot = ntl.cast(slots, ntl.int32)
    page_size = kv_cache.shape[1]
    # Page -1 is outside the cache, so that the store is masked; int64, because page * stride can pass 2^31
    there = (slots >= 0) & (slots < 2147483647)
    page = ntl.cast(ntl.where(there, slot // page_size, -1), ntl.int64)
    offset = slot % page_size

    # [C]
    x = ntl.cast(kv_a_latent[token], ntl.float32)
    # [C]
    w = ntl.cast(weight, ntl.float32)
    scale = ntl.rsqrt(ntl.sum(x * x, axis=0) / weight.shape[0] + eps)
    kv_cache[page, offset] = x * scale * w

    # [R]
    pe = ntl.cast(kv_a_pe[token], ntl.float32)
    # [R / 2]
    c = cos
    # [R / 2]
    s = sin
    even, odd = ntl.split(ntl.reshape(pe, (pe.shape[0] // 2, 2)))
    pe_cache[page, offset] = ntl.interleave(even * c - odd * s, even * s + odd * c)

    # [block_h, R]
    q = ntl.cast(q_pe[token], ntl.float32)
    first, second = ntl.split(ntl.reshape(q, (q.shape[0], q.shape[1] // 2, 2)))
    q_out[token] = ntl.interleave(first * c[None, :] - second * s[None, :], first * s[None, :] + second * c[None, :])


def premake(page_size, block_h, latent=512, rope=64, dtype=None):
    _, _, tensors = latent_append.premake(page_size, latent, rope, dtype)
    tensors = (
        *tensors,
        Tensor(shape=(None, None, rope), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, None, rope), dtype=dtype, name="q_out"),
    )
    return functools.partial(arrangement, block_h=block_h), application, tensors
