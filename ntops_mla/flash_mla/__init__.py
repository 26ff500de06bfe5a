"""FlashMLA's functions over the ops: `from ntops_mla import flash_mla` in the place of `import flash_mla`.

deepseek-ai/FlashMLA's interface, on every platform and the CPU, forward only: decode over paged latents, dense and by
indices, in bfloat16 and from the fp8 cache of 656 bytes a token; sparse prefill; attention over packed requests.
Element types, page sizes and strides that FlashMLA refuses may work: they are the ops'. docs/flash_mla.md tells of
every argument where it is supported.
"""

from ntops_mla.flash_mla.decode import flash_mla_with_kvcache
from ntops_mla.flash_mla.metadata import FlashMLASchedMeta, get_mla_metadata
from ntops_mla.flash_mla.sparse import flash_mla_sparse_fwd
from ntops_mla.flash_mla.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
