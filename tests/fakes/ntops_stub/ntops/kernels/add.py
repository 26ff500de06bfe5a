from ninetoothed import Tensor


def arrangement(input, other, output, block_size=1024):
    return input.tile((block_size,)), other.tile((block_size,)), output.tile((block_size,))


def application(input, other, output):
    output = input + other  # noqa: F841


def premake(dtype=None):
    return arrangement, application, tuple(Tensor(1, dtype=dtype) for _ in range(3))
