"""DeepSeek's Multi-head Latent Attention from one NineToothed source for every accelerator that Triton reaches."""

from ntops_mla._torch_version import require_torch

require_torch()

from ntops_mla import interpreter  # noqa: E402

interpreter.announce()  # before anything below could import Triton

from ntops_mla import ops  # noqa: E402
from ntops_mla.cache import CacheFull, LatentCache, Step  # noqa: E402
from ntops_mla.config import MLAConfig  # noqa: E402
from ntops_mla.decode_graph import DecodeGraph  # noqa: E402
from ntops_mla.dispatch import (  # noqa: E402
    BackendUnavailableError,
    Choice,
    KernelFallbackWarning,
    StrictFallbackError,
    use,
)
from ntops_mla.integrations.ntops import automatic as _register_automatically  # noqa: E402
from ntops_mla.integrations.ntops import register  # noqa: E402
from ntops_mla.modules import MLA  # noqa: E402
from ntops_mla.version import __version__  # noqa: E402

__all__ = [
    "MLA",
    "BackendUnavailableError",
    "CacheFull",
    "Choice",
    "DecodeGraph",
    "KernelFallbackWarning",
    "LatentCache",
    "MLAConfig",
    "Step",
    "StrictFallbackError",
    "__version__",
    "ops",
    "register",
    "use",
]

_register_automatically()
