"""The real kernels on CPU tensors, in Triton's interpreter: for a process that began with NTOPS_MLA_INTERPRET=1.

tests/test_interpreted.py starts such processes, one for each file. Here every address that a kernel reads or writes is
checked, and nothing falls back to PyTorch unnoticed.
"""

import numpy as np
import pytest
import torch

import ntops_mla.dispatch
from ntops_mla import interpreter
from ntops_mla.kernel import Kernel


def pytest_configure(config):
    if not interpreter.enabled():
        raise pytest.UsageError(
            f"tests/interpreted needs {interpreter.VARIABLE}=1 from the start of the process, because Triton decides "
            "at its import whether it interprets; tests/test_interpreted.py runs it so"
        )


@pytest.fixture(autouse=True)
def _strict(monkeypatch, _fresh_dispatch):
    """A fallback that no test asked for fails it."""
    monkeypatch.setenv("NTOPS_MLA_STRICT", "1")
    for name in ("NTOPS_MLA_BACKEND", "NTOPS_MLA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    ntops_mla.dispatch.reset()


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """(kernel, dtypes of its tensors) of every launch; each of its accesses must lie within one of its tensors."""
    interpreter.activate()
    from triton.runtime.interpreter import InterpreterBuilder

    spans, done = [], []
    plain = Kernel.plain

    def launch(kernel, *args):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        done.append((kernel.name, tuple(t.dtype for t in tensors)))
        spans[:] = [span(t) for t in tensors if t.numel()]
        plain(kernel, *args)

    def guard(name):
        access = getattr(InterpreterBuilder, name)
        place = 1 if name == "create_masked_load" else 2  # of the mask

        def guarded(builder, pointers, *rest):
            mask = rest[place - 1].data
            addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.shape))
            active = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)]
            if active.size:
                low, high = int(active.min()), int(active.max()) + pointers.get_element_ty().primitive_bitwidth // 8
                if not any(start <= low and high <= end for start, end in spans):
                    raise AssertionError(f"{done[-1][0]}: {name} of [{low}, {high}), in none of its tensors {spans}")
            return access(builder, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, guarded)

    monkeypatch.setattr(Kernel, "plain", launch)
    guard("create_masked_load")
    guard("create_masked_store")
    return done


def span(tensor):
    """[start, end) of the addresses that hold elements of `tensor`."""
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


@pytest.fixture
def beyond_int32(monkeypatch):
    """A function of shape, strides and dtype: a tensor with elements more than 2^31 places behind its first.

    The memory is reserved and not touched. The interpreter would copy each storage onto itself after a launch, which
    touches all of it.
    """
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)

    def make(shape, strides, dtype):
        elements = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
        assert elements > 2**31
        try:
            storage = torch.UntypedStorage(elements * dtype.itemsize)
        except RuntimeError as error:
            pytest.skip(f"this machine reserves no {elements * dtype.itemsize >> 30} GiB: {error}")
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)

    return make
