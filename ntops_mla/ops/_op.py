"""How an op is made: registration with torch.library, dispatch, and `.explain`, `.reference` on the public function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ntops_mla import dispatch
from ntops_mla.dispatch import Choice
from ntops_mla.platform import Platform, get_platform

_LIBRARY = torch.library.Library("ntops_mla", "FRAGMENT")
_OPS: dict[str, Op] = {}

# Element types an op takes; float64 runs the reference everywhere and is there for checks.
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Those that its kernel is tried in, unless it says otherwise.
_KERNEL_DTYPES = FLOATS[:3]


class Op:
    """One registered op, forward only: what `python -m ntops_mla ops | explain` and the tests ask.

    check(*args) raises for bad arguments; key, supports, kernel, tiles, look: see `dispatch.OpSpec`; example(device,
    dtype, **sizes) makes valid arguments. dtypes: the element types that its kernel is tried in.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        schema: str,
        check: Callable[..., None],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        key: Callable[..., tuple],
        supports: Callable[..., str | None],
        example: Callable[..., tuple],
        kernel: Callable[..., Any] | None = None,
        through_float32: Callable[..., Any] | None = None,
        tiles: Callable[..., list] | None = None,
        look: Callable[..., None] | None = None,
        dtypes: tuple[torch.dtype, ...] = _KERNEL_DTYPES,
    ) -> None:
        self.name = function.__name__
        self.function = function
        self.schema = schema
        self.signature = f"{self.name}{schema}"
        self.doc = inspect.getdoc(function).splitlines()[0]
        self.example = example
        self.dtypes = dtypes
        self._check = check
        self._signature = inspect.signature(function)
        self.spec = dispatch.OpSpec(self.name, key, reference, supports, kernel, through_float32, tiles, look)

        defaults = tuple(p.default for p in self._signature.parameters.values())

        # torch leaves trailing arguments out that equal the schema's defaults.
        def run(*args):
            args += defaults[len(args) :]
            check(*args)
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                return _ForwardOnly.apply(self.spec, *args)
            return dispatch.call(self.spec, args[0].device, args)

        def run_fake(*args):
            args += defaults[len(args) :]
            check(*args)
            return fake(*args)

        _LIBRARY.define(f"{self.name}{schema}")
        _LIBRARY.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ntops_mla::{self.name}", run_fake, lib=_LIBRARY)

    def tried_in(self, dtypes: Iterable[torch.dtype]) -> tuple[torch.dtype, ...]:
        """Of `dtypes` those that its kernel is tried in; its own, where it knows none of them."""
        return tuple(dtype for dtype in dtypes if dtype in self.dtypes) or self.dtypes

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Raise for arguments that the op does not take."""
        self._check(*self._bind(args, kwargs))

    def explain(self, *args: Any, platform: Platform | str | None = None, **kwargs: Any) -> Choice:
        """The `Choice` for these arguments, without running them; `platform` (or its name) pretends that they are on
        it."""
        if isinstance(platform, str):
            platform = get_platform(platform)
        args = self._bind(args, kwargs)
        self._check(*args)
        return dispatch.explain(self.spec, args[0].device, args, platform)

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The PyTorch implementation, whatever the dispatcher would choose."""
        args = self._bind(args, kwargs)
        self._check(*args)
        return self.spec.reference(*args)

    def _bind(self, args: tuple, kwargs: dict) -> tuple:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args


class _ForwardOnly(torch.autograd.Function):
    """A call whose results refuse to be gone back through: torch's own fallback would leave gradients out and go on,
    and PyTorch's form would have them where the kernel has none."""

    @staticmethod
    def forward(ctx, spec, *args):
        ctx.name = spec.name
        return dispatch.call(spec, args[0].device, args)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"{ctx.name}: only the forward pass is implemented; call it under torch.no_grad()")


def register(function: Callable[..., Any], **parts: Any) -> Callable[..., Any]:
    """Register `function`, the public face of torch.ops.ntops_mla.<name>, and hang explain and reference on it."""
    op = Op(function, **parts)
    _OPS[op.name] = op

    @functools.wraps(function)
    def public(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            # torch's own refusal of a wrong Python type, before any check of ours could run
            if "Expected a value of type" not in str(error):
                raise
            op.check(*args, **kwargs)
            raise

    public.explain = op.explain
    public.reference = op.reference
    return public


def names() -> tuple[str, ...]:
    """The names of all ops."""
    return tuple(_OPS)


def get(name: str) -> Op:
    """The op of that name; ValueError names those there are."""
    if name not in _OPS:
        raise ValueError(f"no op {name!r}; there are {', '.join(_OPS)}")
    return _OPS[name]
