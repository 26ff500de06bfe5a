"""DecodeGraph: without graphs it is the layers themselves; with them, a padded batch's step, whatever the requests."""

import pytest
import torch

import ntops_mla
from ntops_mla import decode_graph, devices
from ntops_mla.decode_graph import DecodeGraph, _Buffers

CFG = ntops_mla.MLAConfig(
    hidden_size=64, num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=16,
)  # fmt: skip


class Replayed:
    """Stands for a device with graphs: what was captured is done again, into the same result."""

    def __init__(self, monkeypatch):
        self.captures = self.replays = 0
        monkeypatch.setattr(devices, "graph_problem", lambda device: None)
        monkeypatch.setattr(devices, "side_stream", lambda device: torch.no_grad())
        monkeypatch.setattr(devices, "capture", self.capture)
        # PyTorch computes here, which a real graph could not hold.
        monkeypatch.setattr(decode_graph.dispatch, "record", _Nothing)

    def capture(self, device, function, pool=None):
        self.captures += 1
        result = function()

        def replay():
            self.replays += 1
            with torch.inference_mode(result.is_inference()):  # a device's graph does not know of it
                result.copy_(function())

        return devices.Captured(replay, result, "the pool")


class _Nothing:
    def __enter__(self):
        return {}

    def __exit__(self, *raised):
        return None


@pytest.fixture
def graphs(monkeypatch):
    return Replayed(monkeypatch)


def layer(index=0, dtype=torch.float32):
    mla = ntops_mla.MLA(CFG, layer_idx=index, dtype=dtype).requires_grad_(False)
    for parameter in mla.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return mla


def cache_of(dtype=torch.float32, num_layers=1, num_pages=32):
    return ntops_mla.LatentCache(CFG, num_pages=num_pages, page_size=4, num_layers=num_layers, dtype=dtype)


def start(cache, mlas, lengths):
    """Requests 0, 1, 2... with histories."""
    x = torch.randn(sum(lengths), CFG.hidden_size, dtype=cache.dtype)
    step = cache.step(range(len(lengths)), lengths)
    for mla in mlas:
        mla(x, step)


def twins(lengths, num_layers=1, dtype=torch.float32):
    """The same layers over two caches that hold the same."""
    mlas = [layer(index, dtype) for index in range(num_layers)]
    seed = torch.random.get_rng_state()
    caches = []
    for _ in range(2):
        torch.random.set_rng_state(seed)
        caches.append(cache_of(dtype, num_layers))
        start(caches[-1], mlas, lengths)

    def run(x, step):
        for mla in mlas:
            x = mla(x, step)
        return x

    return run, mlas, *caches


def test_a_cpu_runs_the_layers_themselves():
    mla, cache = layer(), cache_of()
    graph = DecodeGraph(mla, cache, 4)
    assert graph.reason == "a cpu device has no graphs"
    start(cache, [mla], [3, 5])
    other = cache_of()
    other.storage[0].copy_(cache.storage[0])
    x = torch.randn(2, CFG.hidden_size)
    out = graph(x, cache.step([0, 1], [1, 1]))
    assert cache.length(0) == 4 and cache.length(1) == 6
    cache.truncate(0, 3), cache.truncate(1, 5)
    assert torch.equal(out, mla(x, cache.step([0, 1], [1, 1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_replays_over_other_requests_and_grown_lengths(graphs, num_layers, dtype):
    """Against eager steps of the same requests: within rounding, since the batch is padded; the same cache."""
    run, _, cache, eager = twins([3, 5, 1, 9, 2], num_layers, dtype)
    graph = DecodeGraph(run, cache, 8)
    assert graph.reason is None and graph.sizes == (1, 2, 4, 8)
    for requests in ([0, 1, 2], [4], [3, 0, 1, 2, 4], [1, 3], [0, 1, 2]):
        x = torch.randn(len(requests), CFG.hidden_size, dtype=dtype)
        ones = [1] * len(requests)
        step = cache.step(requests, ones)
        out = graph(x, step)
        expected = run(x, eager.step(requests, ones))
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        assert [cache.length(r) for r in range(5)] == [eager.length(r) for r in range(5)]
        with pytest.raises(ValueError, match="already used"):
            graph(x, step)
        for mine, theirs in zip(cache.storage, eager.storage):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert graphs.replays == 5


def test_the_bits_are_those_of_the_padded_batch_without_a_graph(graphs):
    run, _, cache, eager = twins([3, 6, 2], dtype=torch.bfloat16)
    graph = DecodeGraph(run, cache, 4)
    x = torch.randn(3, CFG.hidden_size, dtype=torch.bfloat16)
    out = graph(x, cache.step([0, 1, 2], [1, 1, 1]))
    padded = _Buffers(eager, 4, 2, CFG.hidden_size, torch.bfloat16)
    padded.fill(x, eager.step([0, 1, 2], [1, 1, 1]))
    assert torch.equal(out, padded.run(run)[:3])
    assert torch.equal(cache.storage[0], eager.storage[0])


def test_padded_rows_write_nothing_and_old_rows_do_not_return(graphs):
    """Four requests, then one, in a batch of four: the three rows of before must not be written again."""
    mla, cache = layer(), cache_of()
    start(cache, [mla], [5, 5, 5, 5])
    graph = DecodeGraph(mla, cache, 4)
    graph.sizes = (4,)
    graph(torch.randn(4, CFG.hidden_size), cache.step([0, 1, 2, 3], [1] * 4))
    before = cache.storage[0].clone()
    slot = cache.step([0], [1])
    graph(torch.randn(1, CFG.hidden_size), slot)
    changed = (cache.storage[0] != before).any(-1).view(-1).nonzero().flatten().tolist()
    assert changed == slot.slots.tolist() and graphs.captures == 1


def test_capturing_writes_nothing_and_moves_no_length(graphs):
    mla, cache = layer(), cache_of()
    start(cache, [mla], [3])
    before = cache.storage[0].clone()
    graph = DecodeGraph(mla, cache, 2)
    step = cache.step([0], [1])
    graph._capture(1, 1, CFG.hidden_size, torch.float32)
    assert torch.equal(cache.storage[0], before) and cache.length(0) == 3
    graph(torch.randn(1, CFG.hidden_size), step)
    assert cache.length(0) == 4


def test_a_graph_for_each_size_and_width(graphs):
    mla, cache = layer(), cache_of()
    start(cache, [mla], [3, 3, 3])
    graph = DecodeGraph(mla, cache, 3)
    assert graph.sizes == (1, 2, 3)
    for requests, captures in (([0], 1), ([1], 1), ([0, 1], 2), ([0, 1, 2], 3), ([0], 4), ([0], 4)):
        graph(torch.randn(len(requests), CFG.hidden_size), cache.step(requests, [1] * len(requests)))
        assert graphs.captures == captures, "request 0 has two pages at last"


@pytest.mark.parametrize("change", ["load", "in place", "moved", "said"])
def test_changed_weights_are_captured_anew(graphs, change):
    mla, cache = layer(), cache_of()
    start(cache, [mla], [5, 5])
    graph, x = DecodeGraph(mla, cache, 2), torch.randn(2, CFG.hidden_size)
    graph(x, cache.step([0, 1], [1, 1]))
    graph(x, cache.step([0, 1], [1, 1]))
    assert graphs.captures == 1
    if change == "load":
        mla.load_state_dict(layer().state_dict())
    elif change == "in place":
        mla.kv_b_proj.weight.mul_(2)
    elif change == "moved":
        mla.o_proj.weight.data = mla.o_proj.weight.data.clone()
    else:
        mla.weights_changed()
    for request in (0, 1):
        cache.truncate(request, 6)
    out = graph(x, cache.step([0, 1], [1, 1]))
    assert graphs.captures == 2
    for request in (0, 1):
        cache.truncate(request, 6)
    torch.testing.assert_close(out, mla(x, cache.step([0, 1], [1, 1])))


def test_captured_under_inference_mode_and_used_outside(graphs):
    mla, cache = layer(), cache_of()
    start(cache, [mla], [5])
    graph = DecodeGraph(mla, cache, 1)
    with torch.inference_mode():
        graph(torch.randn(1, CFG.hidden_size), cache.step([0], [1]))
    graph(torch.randn(1, CFG.hidden_size), cache.step([0], [1]))
    assert cache.length(0) == 7 and graphs.captures == 1


def test_a_stale_step_changes_nothing(graphs):
    mla, cache = layer(), cache_of()
    start(cache, [mla], [3, 3])
    graph = DecodeGraph(mla, cache, 2)
    graph(torch.randn(2, CFG.hidden_size), cache.step([0, 1], [1, 1]))
    step = cache.step([0, 1], [1, 1])
    cache.truncate(0, 2)
    before, replays = cache.storage[0].clone(), graphs.replays
    with pytest.raises(ValueError, match="stale"):
        graph(torch.randn(2, CFG.hidden_size), step)
    assert torch.equal(cache.storage[0], before) and graphs.replays == replays


def test_an_op_that_runs_pytorch_is_a_reason(monkeypatch):
    monkeypatch.setattr(devices, "graph_problem", lambda device: None)
    monkeypatch.setattr(devices, "side_stream", lambda device: torch.no_grad())
    mla, cache = layer(), cache_of()
    start(cache, [mla], [3])
    graph = DecodeGraph(mla, cache, 2)
    out = graph(torch.randn(1, CFG.hidden_size), cache.step([0], [1]))
    assert out.shape == (1, CFG.hidden_size) and cache.length(0) == 4
    assert graph.reason.startswith("PyTorch's form of an op reads lengths on the host: ")


def test_the_same_layer_twice_in_one_step_is_refused(graphs):
    mla, cache = layer(), cache_of()
    start(cache, [mla], [3])
    graph = DecodeGraph(lambda x, step: mla(mla(x, step), step), cache, 2)
    with pytest.raises(ValueError, match="already used by layer 0"):
        graph(torch.randn(1, CFG.hidden_size), cache.step([0], [1]))


def test_bad_arguments_are_named():
    mla, cache = layer(), cache_of()
    for arguments, error, words in (
        ((None, cache, 2), TypeError, "layers"),
        ((mla, None, 2), TypeError, "cache"),
        ((mla, cache, 0), ValueError, "max_requests"),
        ((mla, cache, 2.0), TypeError, "max_requests"),
    ):
        with pytest.raises(error, match=words):
            DecodeGraph(*arguments)
    start(cache, [mla], [3, 3, 3])
    graph, x = DecodeGraph(mla, cache, 2), torch.randn(2, CFG.hidden_size)
    for hidden, step, error, words in (
        (x, None, TypeError, "step"),
        (x, cache_of().step([0, 1], [1, 1]), ValueError, "another"),
        (x, cache.step([0], [2]), ValueError, "one new token"),
        (torch.randn(3, 64), cache.step([0, 1, 2], [1, 1, 1]), ValueError, "max_requests is 2"),
        (x[:1], cache.step([0, 1], [1, 1]), ValueError, r"hidden_states must be \[2, hidden\]"),
        (x.to("meta"), cache.step([0, 1], [1, 1]), ValueError, "device"),
        ("x", cache.step([0, 1], [1, 1]), TypeError, "hidden_states"),
    ):
        with pytest.raises(error, match=words):
            graph(hidden, step)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_forms(graphs, form):
    mla, cache = layer(), cache_of()
    start(cache, [mla], [3])
    graph = DecodeGraph(lambda x, step: mla(x, step, form), cache, 1)
    call = lambda: graph(torch.randn(1, CFG.hidden_size), cache.step([0], [1]))  # noqa: E731
    if form == "absorbed":
        assert call().isfinite().all()
        return
    with pytest.raises(ValueError, match="form must be None or 'absorbed'"):
        call()
