"""A `musa` device in pure Python on a stock torch: tensors say musa:0, and compute on the CPU.

Our own ops see the wrapper, so that the dispatcher chooses by its device; everything else is unwrapped.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "zeros", "ones", "full",
    "rand", "randn", "scalar_tensor", "randint", "randint.low", "eye", "linspace", "tril_indices",
)  # fmt: skip


class MusaTensor(torch.Tensor):
    """`host` is the CPU tensor that holds its data."""

    @staticmethod
    def __new__(cls, host, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            dtype=host.dtype,
            device=torch.device("musa", 0),
            storage_offset=host.storage_offset(),
            requires_grad=requires_grad,
        )

    def __init__(self, host, requires_grad=False):
        self.host = host

    def __repr__(self):
        return f"MusaTensor({self.host})"

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def tolist(self):
        return self.host.tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            # It picks its kernel by the device's type before anything is unwrapped.
            return MusaTensor(function(*tree_map(_host, args), **tree_map(_host, kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():  # the default would make a wrapper of every result
            return function(*args, **(kwargs or {}))

    @classmethod
    @torch.inference_mode(False)  # a wrapper made under it could not become the alias that detach makes
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.namespace == "ntops_mla":
            return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        to_cpu = False
        if kwargs.get("device") is not None:
            to_cpu = torch.device(kwargs["device"]).type != "musa"
            kwargs["device"] = "cpu"
        out = function(*tree_map(_host, args), **tree_map(_host, kwargs))
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, MusaTensor)]

        def wrapped(value):
            if not isinstance(value, torch.Tensor):
                return value
            for one in given:
                if one.host is value:  # an in-place op's own argument
                    return one
            return value if to_cpu else MusaTensor(value)

        return tree_map(wrapped, out)


def _host(value):
    return value.host if isinstance(value, MusaTensor) else value


_library = torch.library.Library("aten", "IMPL")


def install(queries: dict) -> None:
    """Name the device, let torch make tensors on it, and give torch.musa what boards' programs ask."""
    _setup_privateuseone_for_python_backend("musa")
    for name in _FACTORIES:
        _library.impl(name, _factory(name), "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    module = torch.musa
    answers = {
        **queries,
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: SimpleNamespace(musa_stream=0, wait_stream=lambda other: None),
    }
    for name, answer in answers.items():
        setattr(module, name, answer)


def _factory(name):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args, **kwargs):
        kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        return MusaTensor(op(*args, **kwargs, device="cpu"))

    return make


def _copy_from(source, target, non_blocking=False):
    _host(target).copy_(_host(source))
    return target
