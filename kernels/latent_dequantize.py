"""Rows out of FlashMLA's fp8 cache: out[t] = [scales codes, pe] of the token in slots[t], zeros for slot -1.

slots int64 `[T]`, page * page_size + offset; the cache is three views of one storage, as in kernels/latent_quantize.py;
latent `[T, 512]` and pe `[T, 64]` are two views of the result, which the caller passes twice. One program per token;
float32 inside, rounded once when stored.

A code becomes a float32 by shifts: boards without float8_e4m3fn have the layout all the same.

Source: deepseek-ai/FlashMLA, README.md; arXiv 2209.05433, table 1 (E4M3).
"""

import ninetoothed.language as ntl
from ninetoothed import Tensor

from ntops_mla.kernels import latent_quantize


# The code of a float8_e4m3fn, in an int32 -> float32 (a comment: NineToothed would put a docstring into the kernel)
def decode(code):
    size = code & 0x7F
    # Normal: an exponent's bias of 127 where it was 7; 0x7F is NaN
    normal_bits = ntl.where(size == 0x7F, 0x7FC00000, (size << 20) + 0x3C000000)
    # Below 8: steps of 2^-9, a unit in the last place of 2^14
    subnormal = ntl.cast(size + 0x46800000, ntl.float32, bitcast=True) - 16384.0
    value = ntl.where(size < 8, subnormal, ntl.cast(normal_bits, ntl.float32, bitcast=True))
    return ntl.where(code > 0x7F, -value, value)


def arrangement(codes, scales, pe_cache, slots, latent, pe):
    tokens = slots.shape[0]
    cache = (latent_quantize.paged(tensor, tokens) for tensor in (codes, scales, pe_cache))
    rows = latent_quantize.rows(latent, 0, 512, tokens), latent_quantize.rows(pe, 512, 576, tokens)
    return *cache, latent_quantize.scalar(slots), *rows


def application(codes, scales, pe_cache, slots, latent, pe):
    token = ntl.cast(ntl.program_id(0), ntl.int64)
    # 2^31 slots would be terabytes: int32 is enough for them, and not all boards divide int64
    slot = ntl.cast(slots, ntl.int32)
    page_size = codes.shape[1]
    # Page -1 is outside the cache: zeros are loaded; int64, because page * stride can pass 2^31
    there = (slots >= 0) & (slots < 2147483647)
    page = ntl.cast(ntl.where(there, slot // page_size, -1), ntl.int64)
    offset = slot % page_size

    # [512], as groups
    code = ntl.reshape(ntl.cast(codes[page, offset], ntl.int32), (4, 128))
    # [4]
    scale = scales[page, offset]
    value = decode(code)
    latent[token] = ntl.reshape(value * scale[:, None], (512,))
    # [64]
    rotated = ntl.cast(pe_cache[page, offset], ntl.float32)
    pe[token] = rotated


def premake(page_size, dtype=None):
    tensors = (
        Tensor(shape=(None, page_size, 512), other=0, name="codes"),
        Tensor(shape=(None, page_size, 4), other=0, name="scales"),
        Tensor(shape=(None, page_size, 64), other=0, name="pe_cache"),
        Tensor(1, name="slots"),
        Tensor(shape=(None, 576), dtype=dtype, name="latent"),
        Tensor(shape=(None, 576), dtype=dtype, name="pe"),
    )
    return arrangement, application, tensors
