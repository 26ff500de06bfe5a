"""DecodeGraph on the device: replayed with other requests and grown lengths, bitwise as the padded batch's step."""

import pytest
import torch

import ntops_mla
from ntops_mla.decode_graph import DecodeGraph, _Buffers
from tests.device.on_device import INTERPRETED

CFG = ntops_mla.MLAConfig(
    hidden_size=256, num_heads=4, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128,
)  # fmt: skip
LENGTHS = [3, 70, 15, 200, 1]


@pytest.mark.device
@pytest.mark.parametrize("kv_format", [None, "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_replays(device, dtype, kv_format):
    lengths = [-(-length // 8) for length in LENGTHS] if INTERPRETED else LENGTHS
    mla = ntops_mla.MLA(CFG, device=device, dtype=dtype).requires_grad_(False)
    sizes = {"num_pages": 64, "page_size": 16, "kv_format": kv_format}
    caches = [ntops_mla.LatentCache(CFG, device=device, dtype=dtype, **sizes) for _ in range(2)]
    x = torch.randn(sum(lengths), CFG.hidden_size).to(dtype).to(device)
    for cache in caches:
        mla(x, cache.step(range(5), lengths))
    cache, eager = caches
    graph = DecodeGraph(mla, cache, 8)
    for requests in ([0, 1, 2], [4], [3, 0, 1, 2, 4], [0, 1, 2], [3, 0, 1, 2, 4]):
        ones = [1] * len(requests)
        x = torch.randn(len(requests), CFG.hidden_size).to(dtype).to(device)
        out = graph(x, cache.step(requests, ones))
        step = eager.step(requests, ones)
        if INTERPRETED:  # the layers themselves: the interpreter has no graphs
            assert torch.equal(out, mla(x, step))
            continue
        assert graph.reason is None and graph._captured
        pages = 1 << (step.block_table.shape[1] - 1).bit_length()
        padded = _Buffers(eager, next(size for size in graph.sizes if size >= len(requests)), pages, 256, dtype)
        padded.fill(x, step)
        assert torch.equal(out, padded.run(mla)[: len(requests)])
        step.commit(0)
        assert torch.equal(cache.storage[0], eager.storage[0])
