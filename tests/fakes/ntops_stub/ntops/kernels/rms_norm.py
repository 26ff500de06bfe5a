"""A name that ntops_mla has too."""

from ninetoothed import Tensor


def arrangement(input, output):
    return input.tile((1, -1)), output.tile((1, -1))


def application(input, output):
    output = input  # noqa: F841


def premake(ndim, dtype=None):
    return arrangement, application, tuple(Tensor(ndim, dtype=dtype) for _ in range(2))
