"""Root mean square normalisation of whole rows.

out[t] = input[t] / sqrt(mean(input[t]^2) + eps) * weight

input, out `[T, D]`, weight `[D]`; float32 inside, rounded once when stored. One program per row, which it holds whole.

Source: arXiv 1910.07467.
"""

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(input, weight, eps, out):
    tokens, width = input.shape

    def rows(tensor):
        # (T,) x (T,) x (D,): the row is picked by an int64 index, because T * D can pass 2^31
        arranged = tensor.tile((1, width)).tile((-1, 1)).squeeze(1).expand((tokens,))
        arranged.dtype = arranged.dtype.squeeze(1)
        arranged.dtype.dtype = arranged.dtype.dtype.squeeze(0)
        return arranged

    # (T,) x (D,)
    weight_arranged = weight.tile((width,)).expand((tokens,))
    return rows(input), weight_arranged, eps, rows(out)


def application(input, weight, eps, out):
    token = ntl.cast(ntl.program_id(0), ntl.int64)
    # [D]
    x = ntl.cast(input[token], ntl.float32)
    # [D]
    w = ntl.cast(weight, ntl.float32)
    scale = ntl.rsqrt(ntl.sum(x * x, axis=0) / weight.shape[0] + eps)
    out[token] = x * scale * w


def premake(width, dtype=None):
    tensors = (
        Tensor(shape=(None, width), dtype=dtype, other=0, name="input"),
        Tensor(shape=(width,), dtype=dtype, other=0, name="weight"),
        Tensor(0, name="eps"),
        Tensor(shape=(None, width), dtype=dtype, name="out"),
    )
    return arrangement, application, tensors
