"""The ops: each a public function, registered as torch.ops.ntops_mla.<name>, with `.explain` and `.reference`."""

from ntops_mla.ops._op import get, names
from ntops_mla.ops.latent_append import latent_append
from ntops_mla.ops.latent_append_fp8 import latent_append_fp8
from ntops_mla.ops.latent_dequantize import latent_dequantize
from ntops_mla.ops.latent_quantize import latent_quantize
from ntops_mla.ops.mla_decode import mla_decode
from ntops_mla.ops.mla_decode_fp8 import mla_decode_fp8
from ntops_mla.ops.mla_prefill import mla_prefill
from ntops_mla.ops.mla_schedule import mla_schedule
from ntops_mla.ops.mla_sparse import mla_sparse
from ntops_mla.ops.mla_sparse_fp8 import mla_sparse_fp8
from ntops_mla.ops.rms_norm import rms_norm
from ntops_mla.ops.rope import rope

__all__ = [
    "get",
    "latent_append",
    "latent_append_fp8",
    "latent_dequantize",
    "latent_quantize",
    "mla_decode",
    "mla_decode_fp8",
    "mla_prefill",
    "mla_schedule",
    "mla_sparse",
    "mla_sparse_fp8",
    "names",
    "rms_norm",
    "rope",
]
