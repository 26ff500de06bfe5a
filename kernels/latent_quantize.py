"""The write of finished rows into FlashMLA's fp8 cache: 512 latent columns quantised by groups of 128, 64 RoPE columns.

cache[slots[t] // page_size, slots[t] % page_size] = [codes, scales, pe[t]]
latent[t, 128 g + i] = scales[g] codes[128 g + i]

latent `[T, 512]`, pe `[T, 64]`, slots int64 `[T]`, -1 skips the token. The cache's 656 bytes a token are three views of
one storage: codes uint8 `[pages, page_size, 512]`, scales float32 `[pages, page_size, 4]`, pe_cache bfloat16 `[pages,
page_size, 64]`. One program per token.

Codes are float8_e4m3fn made of integers: boards without the type have the layout all the same. Scales are powers of
two, so that dividing by one is exact, and so is the product that stands for it here: a board's `/` need not be.

Source: deepseek-ai/FlashMLA, README.md and tests/quant.py; arXiv 2209.05433, table 1 (E4M3).
"""

import ninetoothed.language as ntl
from ninetoothed import Tensor


def rows(tensor, start, stop, tokens):
    """(T,) x (T,) x (columns,): the row is picked by an int64 index, because T * stride can pass 2^31."""
    arranged = tensor[:, start:stop].tile((1, stop - start)).tile((-1, 1)).squeeze(1).expand((tokens,))
    arranged.dtype = arranged.dtype.squeeze(1)
    arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
    return arranged


def paged(tensor, tokens):
    """(T,) x (pages, page_size) x (columns,)."""
    arranged = tensor.tile((1, 1, tensor.shape[2])).tile((-1, -1, 1)).squeeze((0, 1)).expand((tokens,))
    arranged.dtype = arranged.dtype.squeeze(2)
    arranged.dtype.dtype = arranged.dtype.dtype.squeeze((0, 1))
    return arranged


def scalar(slots):
    """(T,) x ()."""
    arranged = slots.tile((1,))
    arranged.dtype = arranged.dtype.squeeze(0)
    return arranged


def arrangement(latent, pe, slots, codes, scales, pe_cache):
    tokens = slots.shape[0]
    cache = paged(codes, tokens), paged(scales, tokens), paged(pe_cache, tokens)
    return rows(latent, 0, 512, tokens), rows(pe, 0, 64, tokens), scalar(slots), *cache


# Comments and no docstrings in what follows: NineToothed would put them into the kernel. A local must not be named as
# what a caller passes: NineToothed would take the one for the other.
# float32 [4, 128] -> the bits of each group's scale, int32 [4]: largest / 448 rounded up to a power of two, at least
# 2^-13
def scale_bits(groups):
    largest = ntl.max(ntl.abs(groups), axis=1)
    # 448 = 1.75 * 2^8: a largest mantissa above 1.75 (fraction 0x600000) takes the next power, 0x1fffff carries it
    exponent = ((ntl.cast(largest, ntl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    return ntl.maximum(exponent, 114) << 23


# float32 [4, 128] and scale_bits of them -> the code of the float8_e4m3fn nearest to each group / its scale, ties to
# even, int32 [4, 128]; of NaN too
def encode(groups, scales):
    # 2^-k for 2^k
    inverse = ntl.cast(0x7F000000 - scales, ntl.float32, bitcast=True)
    scaled = groups * inverse[:, None]
    pattern = ntl.cast(scaled, ntl.int32, bitcast=True)
    # Past 448 there is only NaN; 480 is where its code would be
    size = ntl.minimum(pattern & 0x7FFFFFFF, 0x43F00000)
    # Normal: 20 of 23 fraction bits go, rounded to even; the exponent's bias becomes 7 where it was 127
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Below 2^-6: steps of 2^-9, a unit in the last place of 2^14, to which the sum rounds
    sum_bits = ntl.cast(ntl.abs(scaled) + 16384.0, ntl.int32, bitcast=True)
    code = ntl.where(size < 0x3C800000, sum_bits - 0x46800000, normal)
    return code | ((pattern >> 24) & 0x80)


def application(latent, pe, slots, codes, scales, pe_cache):
    token = ntl.cast(ntl.program_id(0), ntl.int64)
    # 2^31 slots would be terabytes: int32 is enough for them, and not all boards divide int64
    slot = ntl.cast(slots, ntl.int32)
    page_size = codes.shape[1]
    # Page -1 is outside the cache, so that the store is masked; int64, because page * stride can pass 2^31
    there = (slots >= 0) & (slots < 2147483647)
    page = ntl.cast(ntl.where(there, slot // page_size, -1), ntl.int64)
    offset = slot % page_size

    # [512]
    x = ntl.cast(latent[token], ntl.float32)
    groups = ntl.reshape(x, (4, 128))
    bits = scale_bits(groups)
    code = encode(groups, bits)
    codes[page, offset] = ntl.cast(ntl.reshape(code, (512,)), ntl.uint8)
    scales[page, offset] = ntl.cast(bits, ntl.float32, bitcast=True)
    # [64]
    rotated = ntl.cast(pe[token], ntl.float32)
    pe_cache[page, offset] = rotated


def premake(page_size, dtype=None):
    tensors = (
        Tensor(shape=(None, 512), dtype=dtype, other=0, name="latent"),
        Tensor(shape=(None, 64), dtype=dtype, other=0, name="pe"),
        Tensor(1, name="slots"),
        Tensor(shape=(None, page_size, 512), name="codes"),
        Tensor(shape=(None, page_size, 4), name="scales"),
        Tensor(shape=(None, page_size, 64), name="pe_cache"),
    )
    return arrangement, application, tensors
