"""DecodeGraph on the device: replayed with other requests and grown lengths, bitwise as the padded batch's step."""

import dataclasses

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
def test_replays_of_ragged_requests(device, kv_format):
    """Two layers share a schedule, which follows the lengths of each replay; the long request changes its place."""
    cfg, dtype = dataclasses.replace(CFG, max_position_embeddings=8192), torch.bfloat16
    lengths = [300, 2, 20] if INTERPRETED else [4000, 2, 700]
    layers = [ntops_mla.MLA(cfg, i, device=device, dtype=dtype).requires_grad_(False) for i in range(2)]
    sizes = {"num_pages": 128, "num_layers": 2, "kv_format": kv_format}
    caches = [ntops_mla.LatentCache(cfg, device=device, dtype=dtype, **sizes) for _ in range(2)]
    for request, length in enumerate(lengths):
        rows = torch.randn(2, length, 576).to(dtype).to(device) / 10
        for cache in caches:
            for layer in range(2):
                cache.fill(request, *rows[layer].split([512, 64], -1), layer)

    def both(x, step):
        for mla in layers:
            x = mla(x, step)
        return x

    cache, eager = caches
    graph = DecodeGraph(both, cache, 4)
    for requests in ([0, 1, 2], [2, 1, 0], [1, 2], [1, 0], [0, 1, 2]):
        ones = [1] * len(requests)
        x = torch.randn(len(requests), cfg.hidden_size).to(dtype).to(device)
        out, step = graph(x, cache.step(requests, ones)), eager.step(requests, ones)
        if INTERPRETED:
            assert torch.equal(out, both(x, step))
            continue
        assert graph.reason is None and graph._captured
        pages = 1 << (step.block_table.shape[1] - 1).bit_length()
        padded = _Buffers(eager, next(size for size in graph.sizes if size >= len(requests)), pages, 256, dtype)
        padded.fill(x, step)
        assert torch.equal(out, padded.run(both)[: len(requests)])
        for layer in range(2):
            step.commit(layer)
            assert torch.equal(cache.storage[layer], eager.storage[layer])


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
