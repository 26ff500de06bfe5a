"""latent_append into FlashMLA's fp8 cache: RMSNorm, RoPE, quantisation and the write, in one launch.

cache[slots[t] // page_size, slots[t] % page_size] = quantised [rms_norm(kv_a[t, :512], weight, eps), rope(kv_a[t,
512:], cos[t], sin[t])]

kv_a `[T, 576]`, weight `[512]`, cos and sin float32 `[T, 32]`, slots int64 `[T]`, -1 skips the token; the cache is
three views of one storage, as in kernels/latent_quantize.py, where the quantisation is. The latent and the rope columns
are two views of kv_a: the caller passes it twice. One program per token; float32 inside. The latent is rounded to
bfloat16 before it is quantised: the bytes are those that a bfloat16 latent would give.

Source: arXiv 2405.04434, section 2.1; deepseek-ai/FlashMLA, README.md and tests/quant.py.
"""

import ninetoothed.language as ntl
from ninetoothed import Tensor

from ntops_mla.kernels import latent_quantize


def arrangement(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, codes, scales, pe_cache):
    tokens = slots.shape[0]

    def row(tensor):
        # (T,) x (columns,)
        arranged = tensor.tile((1, tensor.shape[1])).squeeze(1)
        arranged.dtype = arranged.dtype.squeeze(0)
        return arranged

    return (
        latent_quantize.rows(kv_a_latent, 0, 512, tokens),
        latent_quantize.rows(kv_a_pe, 512, 576, tokens),
        weight.tile((512,)).expand((tokens,)),
        row(cos),
        row(sin),
        latent_quantize.scalar(slots),
        eps,
        latent_quantize.paged(codes, tokens),
        latent_quantize.paged(scales, tokens),
        latent_quantize.paged(pe_cache, tokens),
    )


# float32 [512] -> RMSNorm of it, each number the nearest bfloat16, ties to even, in a float32: [4, 128], by groups. The
# rounding goes by integers, as nothing here is computed in two bytes.
def normalised_groups(x, w, eps):
    factor = ntl.rsqrt(ntl.sum(x * x, axis=0) / 512 + eps)
    normalised = x * factor * w
    bits = ntl.cast(normalised, ntl.int32, bitcast=True)
    rounded = ntl.cast((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536, ntl.float32, bitcast=True)
    # The sum would carry a NaN's bits into its sign
    return ntl.reshape(ntl.where((bits & 0x7FFFFFFF) > 0x7F800000, normalised, rounded), (4, 128))


def application(kv_a_latent, kv_a_pe, weight, cos, sin, slots, eps, codes, scales, pe_cache):
    token = ntl.cast(ntl.program_id(0), ntl.int64)
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
    groups = normalised_groups(x, w, eps)
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


def premake(page_size, dtype=None):
    tensors = (
        Tensor(shape=(None, 576), dtype=dtype, other=0, name="kv_a_latent"),
        Tensor(shape=(None, 576), dtype=dtype, other=0, name="kv_a_pe"),
        Tensor(shape=(512,), dtype=dtype, other=0, name="weight"),
        Tensor(shape=(None, 32), name="cos"),
        Tensor(shape=(None, 32), name="sin"),
        Tensor(1, name="slots"),
        Tensor(0, name="eps"),
        Tensor(shape=(None, page_size, 512), name="codes"),
        Tensor(shape=(None, page_size, 4), name="scales"),
        Tensor(shape=(None, page_size, 64), name="pe_cache"),
    )
    return arrangement, application, tensors
