"""Other implementations of the same ops, where they can be imported: one file, one adapter each.

An adapter has `name`, `timed` (what its figure is of), `available(problem)`, a reason or None, and `make(problem)`,
which prepares everything that a caller would prepare once and gives the call that is timed. `note`: what a reader of
the figure has to know.
"""

from bench_rows.peers.flag_gems import FlagGems
from bench_rows.peers.flash_attn import FlashAttention2, FlashAttention3
from bench_rows.peers.flash_mla import FlashMLA
from bench_rows.peers.flashinfer import FlashInfer
from bench_rows.peers.sageattention import SageAttention
from bench_rows.peers.torch_sdpa import TorchSDPA

# transformers and the looping torch row are peers of whole layers: modules.py
PEERS = (FlashMLA(), FlashInfer(), FlashAttention2(), FlashAttention3(), FlagGems(), SageAttention(), TorchSDPA())
