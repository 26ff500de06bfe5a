"""RMSNorm of the latent, RoPE of the rope columns, and the write of both into the paged cache, in one launch.

cache[slots[t] // page_size, slots[t] % page_size] = [rms_norm(kv_a[t, :C], weight, eps), rope(kv_a[t, C:], cos[t],
sin[t])]

kv_a `[T, C + R]`, weight `[C]`, cos and sin float32 `[T, R / 2]`, slots int64 `[T]`, -1 skips the token; cache `[pages,
page_size, C + R]`. The latent and the rope columns are two views each of kv_a and cache: the caller passes either
tensor twice. One program per token; float32 inside, rounded once when stored.

Source: arXiv 2405.04434, section 2.1.
"""

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, kv_cache, pe_cache):
    tokens = slots.shape[0]
    latent = weight.shape[0]
    width = kv_a_latent.shape[1]

    def row(tensor, start, stop):
        # (T,) x (columns,)
        arranged = tensor[:, start:stop].tile((1, stop - start)).squeeze(1)
        arranged.dtype = arranged.dtype.squeeze(0)
        return arranged

    def rows(tensor, start, stop):
        # (T,) x (T,) x (columns,): the row is picked by an int64 index, because T * stride can pass 2^31
        arranged = tensor[:, start:stop].tile((1, stop - start)).tile((-1, 1)).squeeze(1).expand((tokens,))
        arranged.dtype = arranged.dtype.squeeze(1)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
        return arranged

    def paged(tensor, start, stop):
        # (T,) x (pages, page_size) x (columns,)
        columns = stop - start
        arranged = tensor[:, :, start:stop].tile((1, 1, columns)).tile((-1, -1, 1)).squeeze((0, 1)).expand((tokens,))
        arranged.dtype = arranged.dtype.squeeze(2)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze((0, 1))
        return arranged

    slot = slots.tile((1,))
    slot.dtype = slot.dtype.squeeze(0)
    half = (width - latent) // 2
    return (
        rows(kv_a_latent, 0, latent),
        rows(kv_a_pe, latent, width),
        weight.tile((latent,)).expand((tokens,)),
        row(cos, 0, half),
        row(sin, 0, half),
        slot,
        eps,
        paged(kv_cache, 0, latent),
        paged(pe_cache, latent, width),
    )


def application(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, kv_cache, pe_cache):
    token = ntl.cast(ntl.program_id(0), ntl.int64)
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


def premake(page_size, latent=512, rope=64, dtype=None):
    width = latent + rope
    tensors = (
        Tensor(shape=(None, width), dtype=dtype, other=0, name="kv_a_latent"),
        Tensor(shape=(None, width), dtype=dtype, other=0, name="kv_a_pe"),
        Tensor(shape=(latent,), dtype=dtype, other=0, name="weight"),
        Tensor(shape=(None, rope // 2), name="cos"),
        Tensor(shape=(None, rope // 2), name="sin"),
        Tensor(1, name="slots"),
        Tensor(0, name="eps"),
        Tensor(shape=(None, page_size, width), dtype=dtype, name="kv_cache"),
        Tensor(shape=(None, page_size, width), dtype=dtype, name="pe_cache"),
    )
    return arrangement, application, tensors
