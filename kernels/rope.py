"""Rotary position embedding of interleaved pairs.

out[2i] = q[2i] cos[i] - q[2i+1] sin[i];  out[2i+1] = q[2i] sin[i] + q[2i+1] cos[i]

q_pe, out `[T, H, R]` of any strides, cos and sin float32 `[T, R / 2]`, one row per token; float32 inside, rounded once
when stored. A program takes `block_h` heads of one token. Both members of a pair come with one access: the columns are
loaded as they lie and split in registers.

Source: arXiv 2104.09864, section 3.4.2.
"""

import functools

import ninetoothed.language as ntl
from ninetoothed import Tensor


def beside_heads(arranged, blocks):
    """(T,) -> (T, blocks), a number as it is: each of a token's row blocks has what the token has."""
    return arranged.unsqueeze(1).expand((-1, blocks)) if arranged.ndim else arranged


def arrangement(q_pe, cos, sin, out, block_h):
    tokens, _, width = q_pe.shape

    def by_heads(tensor):
        # (T, H / block_h) x (T,) x (block_h, R): the token is picked by an int64 index, T * H * R can pass 2^31
        arranged = tensor.tile((1, block_h, width)).tile((-1, 1, 1)).squeeze(2).expand((tokens, -1))
        arranged.dtype = arranged.dtype.squeeze((1, 2))
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
        return arranged

    q_pe_arranged = by_heads(q_pe)

    def by_token(tensor):
        # (T, H / block_h) x (R / 2,)
        arranged = tensor.tile((1, width // 2)).expand((-1, q_pe_arranged.shape[1]))
        arranged.dtype = arranged.dtype.squeeze(0)
        return arranged

    return q_pe_arranged, by_token(cos), by_token(sin), by_heads(out)


def application(q_pe, cos, sin, out):
    token = ntl.cast(cos.offsets(0), ntl.int64)
    # [block_h, R]
    x = ntl.cast(q_pe[token], ntl.float32)
    # [R / 2]
    c = cos
    # [R / 2]
    s = sin
    even, odd = ntl.split(ntl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    out[token] = ntl.interleave(even * c[None, :] - odd * s[None, :], even * s[None, :] + odd * c[None, :])


def premake(block_h, width=64, dtype=None):
    tensors = (
        Tensor(shape=(None, None, width), dtype=dtype, other=0, name="q_pe"),
        Tensor(shape=(None, width // 2), name="cos"),
        Tensor(shape=(None, width // 2), name="sin"),
        Tensor(shape=(None, None, width), dtype=dtype, name="out"),
    )
    return functools.partial(arrangement, block_h=block_h), application, tensors
