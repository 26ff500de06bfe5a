"""LatentCache and Step: pages, lengths and the life of a step, against a plain model of them."""

import dataclasses
import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.overrides import TorchFunctionMode

from ntops_mla import CacheFull, LatentCache, MLAConfig
from ntops_mla.rope_table import attention_factor, inverse_frequencies

CFG = MLAConfig(
    hidden_size=16,
    num_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    max_position_embeddings=40,
)


LONG = dataclasses.replace(CFG, max_position_embeddings=400)


def make(num_pages=8, page_size=4, num_layers=1, cfg=CFG, **keys):
    return LatentCache(cfg, num_pages, page_size, num_layers, **{"dtype": torch.float32, **keys})


def use(step, *layers):
    """What a successful mla does to its step, without the arithmetic."""
    for layer in layers or range(step.cache.num_layers):
        step.check(layer)
        step.commit(layer)


def rows(length, cfg=CFG, dtype=torch.float32, device="cpu"):
    return (
        torch.randn(length, cfg.kv_lora_rank).to(device, dtype),
        torch.randn(length, cfg.qk_rope_head_dim).to(device, dtype),
    )


def snapshot(cache):
    """All that can be seen of a cache."""
    lengths = {request: cache.length(request) for request in cache.requests}
    return cache.num_free_pages, lengths, [storage.clone() for storage in cache.storage]


def assert_unchanged(cache, before):
    free, lengths, storages = before
    assert cache.num_free_pages == free
    assert {request: cache.length(request) for request in cache.requests} == lengths
    assert all(torch.equal(now, then) for now, then in zip(cache.storage, storages, strict=True))


# Storage


@pytest.mark.parametrize(
    "cfg, dtype, expected",
    [
        (MLAConfig.deepseek_r1(), torch.bfloat16, 1152),
        (MLAConfig.deepseek_v2_lite(), torch.float32, 2304),
        (CFG, torch.float64, 96),
    ],
)
def test_bytes_per_token(cfg, dtype, expected):
    assert make(2, cfg=cfg, dtype=dtype).bytes_per_token == expected


def test_one_zeroed_contiguous_storage_per_layer():
    cache = make(3, 4, 2)
    assert len(cache.storage) == len(cache.kv_cache) == len(cache.pe_cache) == 2
    for layer in range(2):
        storage, kv, pe = cache.storage[layer], cache.kv_cache[layer], cache.pe_cache[layer]
        assert storage.shape == (3, 4, 12) and storage.is_contiguous() and not storage.any()
        assert kv.shape == (3, 4, 8) and pe.shape == (3, 4, 4)
        kv.fill_(layer + 1)
        pe.fill_(-layer - 1)
        assert (storage[..., :8] == layer + 1).all() and (storage[..., 8:] == -layer - 1).all()
    assert cache.storage[0].untyped_storage().data_ptr() != cache.storage[1].untyped_storage().data_ptr()


def test_flash_mla_view_is_the_storage():
    cache = make(3, 4, 2)
    view = cache.flash_mla_view(1)
    assert view.shape == (3, 4, 1, 12)
    view.fill_(5)
    assert (cache.storage[1] == 5).all() and not cache.storage[0].any()
    assert cache.flash_mla_view().data_ptr() == cache.storage[0].data_ptr()


@pytest.mark.parametrize("layer, kind", [(2, ValueError), (-1, ValueError), (True, TypeError), ("0", TypeError)])
def test_flash_mla_view_of_no_layer(layer, kind):
    with pytest.raises(kind, match="layer must be"):
        make(3, 4, 2).flash_mla_view(layer)


def test_dtype_and_device_by_default():
    cache = LatentCache(CFG, 1)
    assert cache.dtype == torch.get_default_dtype() and cache.device == torch.device("cpu")
    assert (cache.page_size, cache.num_layers) == (64, 1)


@pytest.mark.parametrize(
    "keys, kind, message",
    [
        ({"cfg": {}}, TypeError, "cfg must be an MLAConfig, got dict"),
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1, got 0"),
        ({"num_pages": -1}, ValueError, "num_pages"),
        ({"num_pages": 2.0}, TypeError, "num_pages must be an int, got 2.0"),
        ({"num_pages": True}, TypeError, "num_pages"),
        ({"page_size": 0}, ValueError, "page_size"),
        ({"page_size": 48}, ValueError, "page_size must be a power of two, got 48"),
        ({"page_size": "64"}, TypeError, "page_size"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"num_layers": None}, TypeError, "num_layers"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of .*bfloat16.*int8"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be one of"),
        ({"device": "nosuch"}, ValueError, "device must be .*got 'nosuch'"),
        ({"device": 1.5}, ValueError, "device must be .*got 1.5"),
    ],
)
def test_bad_arguments_of_the_cache(keys, kind, message):
    with pytest.raises(kind, match=message):
        make(**keys)


# Requests


@pytest.mark.parametrize(
    "call", [lambda c: c.length(1), lambda c: c.truncate(1, 0), lambda c: c.free(1)], ids=["length", "truncate", "free"]
)
def test_an_unknown_request_is_a_key_error(call):
    cache = make()
    with pytest.raises(KeyError, match="request 1"):
        call(cache)
    use(cache.step([1], [2]))
    cache.free(1)
    with pytest.raises(KeyError, match="request 1"):
        call(cache)


def test_a_request_exists_from_its_first_step_or_fill():
    cache = make()
    step = cache.step([3], [2])
    assert cache.requests == (3,) and cache.length(3) == 0
    use(step)
    cache.fill(7, *rows(5))
    assert cache.requests == (3, 7)
    assert (cache.length(3), cache.length(7)) == (2, 5)


def test_any_integer_names_a_request():
    cache = make()
    use(cache.step(torch.tensor([-5, 1 << 40]), range(1, 3)))
    assert cache.requests == (-5, 1 << 40)
    assert cache.length(-5) == 1 and cache.length(1 << 40) == 2


BAD_STEPS = [
    ([1, 1], [1, 1], ValueError, "requests must be distinct, got 1 more than once"),
    ([], [], ValueError, "requests"),
    ([1, 2], [1], ValueError, "lengths must have one entry per request, 2, got 1"),
    ([1], [1, 1], ValueError, "lengths"),
    ([1], [0], ValueError, "lengths must be at least 1, got 0"),
    ([5, 1], [2, -3], ValueError, "lengths must be at least 1, got -3"),
    (["1"], [1], TypeError, "requests must be an int, got '1'"),
    ([1.0], [1], TypeError, "requests"),
    ([True], [1], TypeError, "requests"),
    ([1], [1.0], TypeError, "lengths"),
    ([1], [True], TypeError, "lengths"),
    ([1], [None], TypeError, "lengths"),
    (1, [1], TypeError, "requests must be a list of ints, got 1"),
    ([1], 1, TypeError, "lengths must be a list of ints, got 1"),
    ([1], [41], ValueError, "lengths: request 1 would reach 41 tokens, max_position_embeddings is 40"),
    ([5], [36], ValueError, "lengths: request 5 would reach 41 tokens"),
    ([1, 5], [30, 1], CacheFull, "needs 8 pages, 6 of 8 are free"),
    ([5], [28], CacheFull, "free"),
]


@pytest.mark.parametrize("requests, lengths, kind, message", BAD_STEPS)
def test_a_bad_step_changes_nothing(requests, lengths, kind, message):
    cache = make()
    cache.fill(5, *rows(5))
    older = cache.step([5], [1])
    before = snapshot(cache)
    with pytest.raises(kind, match=message):
        cache.step(requests, lengths)
    assert_unchanged(cache, before)
    use(older)  # still usable
    assert cache.length(5) == 6


def test_cache_full_is_a_runtime_error_of_the_package():
    assert issubclass(CacheFull, RuntimeError)


def test_the_last_page_and_the_last_position_can_be_had():
    cache = make(10)
    use(cache.step([1], [39]))
    use(cache.step([1], [1]))
    assert cache.length(1) == 40 and cache.num_free_pages == 0


# The life of a step


def test_a_step_reserves_and_moves_no_length():
    cache = make()
    step = cache.step([1, 2], [5, 4])
    assert cache.num_free_pages == 5
    assert (cache.length(1), cache.length(2)) == (0, 0)
    assert (step.requests, step.lengths, step.past_lengths, step.num_tokens) == ((1, 2), (5, 4), (0, 0), 9)
    use(step)
    assert cache.num_free_pages == 5
    assert (cache.length(1), cache.length(2)) == (5, 4)


def test_the_first_layer_moves_the_lengths():
    cache = make(num_layers=3)
    step = cache.step([1], [5])
    use(step, 2)
    assert cache.length(1) == 5
    use(step, 0, 1)
    assert cache.length(1) == 5


def test_each_layer_uses_a_step_once():
    cache = make(num_layers=2)
    step = cache.step([1], [5])
    use(step, 1)
    with pytest.raises(ValueError, match="step was already used by layer 1"):
        step.check(1)
    use(step, 0)
    with pytest.raises(ValueError, match="already used by layer 0"):
        step.check(0)
    assert cache.length(1) == 5


@pytest.mark.parametrize("layer", [2, -1])
def test_a_layer_that_the_cache_does_not_have(layer):
    with pytest.raises(ValueError, match="num_layers 2"):
        make(num_layers=2).step([1], [1]).check(layer)


# What makes a step on requests 1 (existing, 5 tokens) and 2 (new) stale, and what the error says
STALE = {
    "fill": (lambda c: c.fill(2, *rows(3)), "request 2 was filled"),
    "truncate": (lambda c: c.truncate(1, 5), "request 1 was truncated"),
    "truncate the new one": (lambda c: c.truncate(2, 0), "request 2 was truncated"),
    "free": (lambda c: c.free(1), "request 1 was freed"),
    "free the new one": (lambda c: c.free(2), "request 2 was freed"),
    "newer step": (lambda c: c.step([1], [1]), "newer step on request 1"),
    "newer step on the new one": (lambda c: c.step([3, 2], [1, 1]), "newer step on request 2"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_step_says_why(name):
    event, message = STALE[name]
    cache = make()
    cache.fill(1, *rows(5))
    step = cache.step([1, 2], [4, 6])
    kept = event(cache)
    with pytest.raises(ValueError, match=f"step is stale: .*{message}"):
        step.check(0)
    del kept


@pytest.mark.parametrize("name", [name for name in STALE if name != "fill"])  # what holds rows is not filled
def test_a_used_step_too_becomes_stale(name):
    event, message = STALE[name]
    cache = make(num_layers=2)
    cache.fill(1, *rows(5), layer=0)
    cache.fill(1, *rows(5), layer=1)
    step = cache.step([1, 2], [4, 6])
    use(step, 0)
    kept = event(cache)
    with pytest.raises(ValueError, match=message):
        step.check(1)
    del kept


@pytest.mark.parametrize("name", STALE)
def test_an_unused_step_leaves_no_trace(name):
    """Pages, lengths and rows of the table are those of a cache on which the step was never made."""
    event, _ = STALE[name]
    cache, never = make(), make()
    for c in (cache, never):
        c.fill(1, *rows(5))
    step = cache.step([1, 2], [4, 6])
    kept = [event(cache)]
    # The step alone made request 2: without it there is nothing to truncate or free.
    kept.append(None if name.endswith("new one") and "step" not in name else event(never))
    assert cache.num_free_pages == never.num_free_pages
    assert {r: cache.length(r) for r in cache.requests} == {r: never.length(r) for r in never.requests}
    del step
    gc.collect()
    assert cache.num_free_pages == never.num_free_pages
    del kept
    gc.collect()
    assert cache.num_free_pages == never.num_free_pages


def test_a_dropped_step_returns_its_pages():
    cache = make()
    cache.fill(1, *rows(5))
    step = cache.step([1, 2], [4, 6])
    assert cache.num_free_pages == 3
    del step
    gc.collect()
    assert cache.num_free_pages == 6
    assert cache.requests == (1,) and cache.length(1) == 5
    with pytest.raises(KeyError):
        cache.length(2)


def test_a_used_step_that_is_dropped_keeps_its_pages():
    cache = make()
    step = cache.step([1], [6])
    use(step)
    del step
    gc.collect()
    assert cache.num_free_pages == 6 and cache.length(1) == 6


def test_an_overwritten_step_makes_room_for_the_next():
    """The newer step on the same requests may need the pages that the older one holds."""
    cache = make(4)
    step = cache.step([1, 2], [8, 8])
    assert cache.num_free_pages == 0
    step = cache.step([2, 1], [12, 4])
    use(step)
    assert (cache.length(1), cache.length(2)) == (4, 12)


def test_a_fill_may_take_the_pages_of_the_step_it_ends():
    cache = make(4)
    step = cache.step([1, 2], [8, 8])
    cache.fill(1, *rows(16))
    assert cache.requests == (1,) and cache.num_free_pages == 0
    with pytest.raises(ValueError, match="stale"):
        step.check(0)


def test_steps_on_other_requests_do_not_disturb():
    cache = make()
    steps = [cache.step([request], [3]) for request in range(4)]
    cache.fill(9, *rows(4))
    cache.free(9)
    for step in steps:
        use(step)
    assert [cache.length(request) for request in range(4)] == [3] * 4


def test_a_step_of_many_makes_several_stale():
    cache = make()
    one, two, other = cache.step([1], [3]), cache.step([2], [3]), cache.step([3], [3])
    both = cache.step([2, 1], [1, 1])
    for stale in (one, two):
        with pytest.raises(ValueError, match="stale"):
            stale.check(0)
    use(both)
    use(other)


def test_a_late_drop_of_a_stale_step_frees_nothing_twice():
    cache = make()
    old = cache.step([1], [8])
    new = cache.step([1], [8])
    del old
    gc.collect()
    assert cache.num_free_pages == 6
    use(new)
    assert cache.num_free_pages == 6 and cache.length(1) == 8


def test_a_step_that_outlives_its_cache():
    step = make().step([1], [2])
    gc.collect()
    use(step)
    assert step.cache.length(1) == 2


# truncate and free


def test_truncate_to_nothing_ends_a_request_that_only_a_step_made():
    cache = make()
    step = cache.step([5], [1])
    cache.truncate(5, 0)
    assert cache.requests == () and cache.num_free_pages == 8
    with pytest.raises(KeyError):
        cache.length(5)
    with pytest.raises(ValueError, match="stale"):
        step.check(0)


def test_truncate_gives_pages_back():
    cache = make()
    use(cache.step([1], [13]))
    for length, free in ((13, 4), (12, 5), (9, 5), (8, 6), (1, 7), (0, 8), (0, 8)):
        cache.truncate(1, length)
        assert (cache.length(1), cache.num_free_pages) == (length, free)
    use(cache.step([1], [2]))
    assert cache.length(1) == 2


@pytest.mark.parametrize(
    "length, kind", [(6, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)]
)
def test_truncate_only_shortens(length, kind):
    cache = make()
    cache.fill(1, *rows(5))
    step = cache.step([1], [1])
    before = snapshot(cache)
    with pytest.raises(kind, match="length must be"):
        cache.truncate(1, length)
    assert_unchanged(cache, before)
    use(step)


@pytest.mark.parametrize("request_", ["1", 1.0, True, None])
def test_a_request_is_an_int(request_):
    cache = make()
    cache.fill(1, *rows(5))
    for call in (cache.length, cache.free, lambda r: cache.truncate(r, 0), lambda r: cache.fill(r, *rows(1))):
        with pytest.raises(TypeError, match="request must be an int"):
            call(request_)


def test_free_returns_all_pages_to_others():
    cache = make(4)
    use(cache.step([1], [9]))
    use(cache.step([2], [4]))
    cache.free(1)
    assert cache.num_free_pages == 3 and cache.requests == (2,)
    step = cache.step([3], [12])
    use(step)
    assert cache.num_free_pages == 0


def test_a_freed_request_begins_anew():
    cache = make()
    use(cache.step([1], [9]))
    cache.free(1)
    step = cache.step([1], [2])
    assert step.past_lengths == (0,) and step.positions.tolist() == [0, 1]


def test_many_requests_come_and_go():
    """More than the table was made for, more columns too."""
    cache = make(400, 1)
    for request in range(50):
        use(cache.step([request], [1 + request % 7]))
    for request in range(0, 50, 2):
        cache.free(request)
    use(cache.step(range(100, 140), [3] * 40))
    use(cache.step([49], [30]))
    step = cache.step(cache.requests, [1] * len(cache.requests))
    assert_tables_right(cache, step)


# fill


def test_fill_writes_the_rows_in_order():
    cache = make(num_layers=2)
    use(cache.step([9], [3]))  # so that pages are not the first ones
    latent, pe = rows(6)
    cache.fill(1, latent, pe, layer=1)
    step = cache.step([1], [1])
    table = step.block_table[0].tolist()
    slots = [table[p // 4] * 4 + p % 4 for p in range(6)]
    assert torch.equal(cache.storage[1].view(-1, 12)[slots], torch.cat([latent, pe], -1))
    assert not cache.storage[0].any()
    assert step.past_lengths == (6,)


def test_fill_of_every_layer():
    cache = make(num_layers=2)
    cache.fill(1, *rows(6), layer=1)
    step = cache.step([1], [1])
    use(step, 1)
    cache = make(num_layers=2)
    cache.fill(1, *rows(6), layer=1)
    cache.fill(1, *rows(6), layer=0)
    assert cache.num_free_pages == 6
    use(cache.step([1], [1]))
    assert cache.length(1) == 7


def test_a_layer_that_was_not_filled_refuses_the_step():
    cache = make(num_layers=2)
    cache.fill(1, *rows(6), layer=1)
    with pytest.raises(ValueError, match="layer 0 holds 0 rows of request 1, the step starts at 6"):
        cache.step([1], [1]).check(0)


def test_a_layer_left_out_of_a_step_can_be_filled_afterwards():
    cache = make(num_layers=2)
    use(cache.step([1], [6]), 0)
    with pytest.raises(ValueError, match="layer 1"):
        cache.step([1], [1]).check(1)
    cache.fill(1, *rows(6), layer=1)
    use(cache.step([1], [1]))
    assert cache.length(1) == 7


def test_fill_after_truncating_to_nothing():
    cache = make()
    cache.fill(1, *rows(6))
    cache.truncate(1, 0)
    cache.fill(1, *rows(9))
    assert cache.length(1) == 9 and cache.num_free_pages == 5


META = rows(3, device="meta")
BAD_FILLS = [
    ((5, *rows(5)), ValueError, "request 5 already holds 5 rows in layer 0"),
    ((5, *rows(4), 1), ValueError, "latent must have 5 tokens, what request 5 holds, got 4"),
    ((5, *rows(6), 1), ValueError, "latent must have 5 tokens"),
    ((1, *rows(0)), ValueError, "latent"),
    ((1, rows(3)[0], rows(2)[1]), ValueError, "pe must have latent's 3 tokens, got 2"),
    ((1, rows(3)[0][:, :7], rows(3)[1]), ValueError, r"latent must be \[p, 8\], got shape \[3, 7\]"),
    ((1, rows(3)[0], rows(3)[0]), ValueError, r"pe must be \[p, 4\], got shape \[3, 8\]"),
    ((1, rows(3)[0][None], rows(3)[1]), ValueError, "latent must be"),
    ((1, rows(3)[0].double(), rows(3)[1]), TypeError, "latent .*float32, got .*float64"),
    ((1, rows(3)[0], rows(3)[1].bfloat16()), TypeError, "pe .*float32, got .*bfloat16"),
    ((1, META[0], rows(3)[1]), ValueError, "latent .*cpu, got meta"),
    ((1, rows(3)[0], META[1]), ValueError, "pe .*cpu, got meta"),
    ((1, rows(3)[0].to_sparse(), rows(3)[1]), TypeError, "latent .*torch.strided, got torch.sparse_coo"),
    ((1, rows(3)[0], rows(3)[1].to_sparse()), TypeError, "pe .*torch.strided, got torch.sparse_coo"),
    ((5, rows(5)[0].to_sparse(), rows(5)[1], 1), TypeError, "latent .*torch.strided"),
    ((1, rows(3)[0].tolist(), rows(3)[1]), TypeError, "latent must be a tensor .*got list"),
    ((1, rows(3)[0], None), TypeError, "pe must be a tensor"),
    ((1, *rows(3), 2), ValueError, "layer must be between 0 and 1"),
    ((1, *rows(3), -1), ValueError, "layer"),
    ((1, *rows(3), "0"), TypeError, "layer"),
    ((1, *rows(41)), ValueError, "latent: request 1 would reach 41 tokens, max_position_embeddings is 40"),
    ((1, *rows(25)), CacheFull, "fill needs 7 pages, 6 of 8"),
]


@pytest.mark.parametrize("arguments, kind, message", BAD_FILLS)
def test_a_bad_fill_changes_nothing(arguments, kind, message):
    cache = make(num_layers=2)
    cache.fill(5, *rows(5))
    step = cache.step([5], [1])
    before = snapshot(cache)
    with pytest.raises(kind, match=message):
        cache.fill(*arguments)
    assert_unchanged(cache, before)
    use(step, 0)


class Failing(TorchFunctionMode):
    """The `number`th call of a torch function fails, as where memory is at its end."""

    def __init__(self, name, number=0):
        self.name, self.number, self.calls = name, number, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", None) == self.name:
            self.calls += 1
            if self.calls == self.number + 1:
                raise MemoryError(self.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("operation", ["cat", "index_copy_", "arange", "tensor", "zeros"])
@pytest.mark.parametrize("request_, length", [(5, 5), (1, 7), (2, 70)], ids=["next layer", "by a step only", "new"])
def test_a_fill_that_fails_changes_nothing(operation, request_, length):
    """Whatever it was about to do; 70 tokens make the block table grow."""
    cache = make(30, num_layers=2, cfg=LONG)
    cache.fill(5, *rows(5))
    steps = [cache.step([5], [1]), cache.step([1], [9])]
    before = snapshot(cache)
    arguments = (request_, *rows(length), 1)
    try:
        with Failing(operation):
            cache.fill(*arguments)
    except MemoryError:
        assert_unchanged(cache, before)
        for step in steps:
            use(step, 0)
        assert cache.length(5) == 6 and cache.length(1) == 9
    else:
        assert operation == "zeros" and length < 70  # only a growing table needs it


@pytest.mark.parametrize("operation", ["outer", "to", "tensor", "arange", "index_select", "zeros", "repeat_interleave"])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 70, 5]], ids=str)
def test_a_step_that_fails_changes_nothing(operation, number, lengths):
    """The `number`th call of an operation fails: growing RoPE's table, the device's tensors, the block table."""
    cache = make(60, cfg=LONG)
    cache.fill(5, *rows(5))
    older = [cache.step([5, 6], [1, 3]), cache.step([7], [2])]
    before = snapshot(cache)
    failing = Failing(operation, number)
    cache._rope._table = cache._rope._table[:0]  # as after many more positions: the table must grow
    try:
        with failing:
            cache.step([5, 7, 8], lengths)
    except MemoryError as error:
        kept = error  # its traceback holds the frames, as a debugger or a log would
        assert_unchanged(cache, before)
        for step in older:
            use(step)
        assert (cache.length(5), cache.length(6), cache.length(7)) == (6, 3, 2)
        del kept
    else:
        assert failing.calls <= number
    use(cache.step([5, 7, 8], lengths))
    held = sum(-(-cache.length(request) // cache.page_size) for request in cache.requests)
    gc.collect()
    assert cache.num_free_pages == 60 - held


# A step's tensors


def assert_tables_right(cache, step):
    """Every tensor of a step against its meaning; returns the slots of each request's tokens."""
    size = cache.page_size
    ends = [past + new for past, new in zip(step.past_lengths, step.lengths)]
    assert step.block_table.dtype == step.seq_lens.dtype == step.cu_seqlens.dtype == torch.int32
    assert step.slots.dtype == step.positions.dtype == torch.int64
    assert step.block_table.is_contiguous()
    assert step.block_table.shape == (len(ends), max(-(-end // size) for end in ends))
    assert step.seq_lens.tolist() == ends
    bounds = [sum(step.lengths[:i]) for i in range(len(ends) + 1)]
    assert step.cu_seqlens.tolist() == bounds
    positions = [p for past, end in zip(step.past_lengths, ends) for p in range(past, end)]
    assert step.positions.tolist() == positions
    table = step.block_table.tolist()
    owner = [i for i, new in enumerate(step.lengths) for _ in range(new)]
    assert step.slots.tolist() == [table[i][p // size] * size + p % size for i, p in zip(owner, positions)]
    used = [page for row, end in zip(table, ends) for page in row[: -(-end // size)]]
    assert len(set(used)) == len(used) and all(0 <= page < cache.num_pages for page in used)
    # What stands behind a request's pages is a valid page too: a kernel may load it before it masks.
    assert step.block_table.min() >= 0 and step.block_table.max() < cache.num_pages
    cfg = cache.cfg
    inverse = inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * inverse
    factor = attention_factor(cfg.rope_scaling)
    for value, expected in ((step.cos, angles.cos() * factor), (step.sin, angles.sin() * factor)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("page_size", [1, 2, 4, 64])
@pytest.mark.parametrize(
    "pasts, lengths",
    [
        ([0], [1]),
        ([0], [9]),
        ([4, 0, 7], [1, 1, 1]),  # a decode step takes a path of its own
        ([3, 0, 8, 12], [2, 5, 1, 4]),
        ([1, 39], [39, 1]),
    ],
)
def test_tensors_of_a_step(page_size, pasts, lengths):
    cache = make(120, page_size)
    order = list(range(len(pasts)))[::-1]
    for request in order:
        if pasts[request]:
            cache.fill(request, *rows(pasts[request]))
    step = cache.step(range(len(pasts)), lengths)
    assert step.past_lengths == tuple(pasts)
    assert_tables_right(cache, step)


def test_cos_and_sin_of_long_yarn_positions():
    """The table grows to the asked position and keeps what it had."""
    cfg = MLAConfig.deepseek_v2_lite()
    cache = make(8, 1024, cfg=cfg, dtype=torch.bfloat16)
    for length in (1, 1023, 1, 5000):
        step = cache.step([1], [length])
        assert_tables_right(cache, step)
        use(step)


def test_tensors_keep_their_values_when_the_cache_goes_on():
    cache = make(20)
    step = cache.step([1, 2], [5, 1])
    table = step.block_table.clone()
    use(step)
    cache.free(1)
    use(cache.step([3], [20]))
    assert torch.equal(step.block_table, table)


def test_a_plan_is_made_once_a_form():
    step = make().step([1, 2], [3, 1])
    assert step.plan() is step.plan(None)
    assert step.plan("absorbed") is step.plan("absorbed") is not step.plan("expanded")
    with pytest.raises(ValueError, match="form must be one of"):
        step.plan("both")


def test_pages_of_two_steps_never_overlap():
    cache = make()
    one, two = cache.step([1], [9]), cache.step([2], [9])
    assert not set(one.block_table[0].tolist()) & set(two.block_table[0].tolist())


# Any order of events


class Walk(RuleBasedStateMachine):
    """Events in any order on a small cache, beside a plain model: lengths, rows, who holds how many pages."""

    PAGES, SIZE, LAYERS, LIMIT = 9, 4, 2, 24
    LAYER_SETS = st.sampled_from([(0, 1), (1, 0), (0,), (1,)])

    @initialize(seed=st.integers(0, 1 << 30))
    def start(self, seed):
        torch.manual_seed(seed)
        cfg = MLAConfig(
            hidden_size=4,
            num_heads=1,
            kv_lora_rank=2,
            qk_nope_head_dim=2,
            qk_rope_head_dim=2,
            v_head_dim=2,
            max_position_embeddings=self.LIMIT,
        )
        self.cache = make(self.PAGES, self.SIZE, self.LAYERS, cfg)
        self.lengths, self.rows = {}, {}  # request -> tokens; (request, layer) -> the rows that were written
        # step -> what the model knows of it, in order of making
        self.steps = []

    def pages(self, length):
        return -(-length // self.SIZE)

    def held(self):
        """Pages by the model: the requests', and those that unused steps reserve."""
        own = sum(map(self.pages, self.lengths.values()))
        return own + sum(self.reserved(entry) for entry in self.steps if entry["open"] and not entry["layers"])

    def reserved(self, entry):
        return sum(
            self.pages(past + new) - self.pages(past) for past, new in zip(entry["pasts"], entry["new"], strict=True)
        )

    def spare(self, requests):
        """Free pages once the unused steps on `requests` are ended."""
        ended = [e for e in self.steps if e["open"] and not e["layers"] and set(e["requests"]) & set(requests)]
        return self.PAGES - self.held() + sum(map(self.reserved, ended))

    def end(self, requests):
        """Steps on these requests are stale."""
        for entry in self.steps:
            if set(entry["requests"]) & set(requests):
                entry["open"] = False

    def known(self):
        """Requests that exist: with a length of their own, or through an unused step."""
        through = {r for e in self.steps if e["open"] and not e["layers"] for r in e["requests"]}
        return set(self.lengths) | through

    def attempt(self, allowed, kind, call):
        """Run `call`; where the model forbids it, it must raise `kind` and change nothing."""
        if allowed:
            return call()
        before = snapshot(self.cache)
        with pytest.raises(kind):
            call()
        assert_unchanged(self.cache, before)

    @rule(new=st.dictionaries(st.integers(0, 4), st.integers(1, 11), min_size=1, max_size=4))
    def step(self, new):
        requests, lengths = list(new), list(new.values())
        pasts = [self.lengths.get(r, 0) for r in requests]
        entry = {"requests": requests, "new": lengths, "pasts": pasts, "open": True, "layers": set()}
        within = all(past + n <= self.LIMIT for past, n in zip(pasts, lengths))
        room = self.reserved(entry) <= self.spare(requests)
        kind = CacheFull if within else ValueError
        step = self.attempt(within and room, kind, lambda: self.cache.step(requests, lengths))
        if step is None:
            return
        self.end(requests)
        entry["step"] = step
        self.steps.append(entry)
        assert_tables_right(self.cache, step)
        assert step.past_lengths == tuple(pasts)

    @rule(new=st.dictionaries(st.integers(0, 4), st.integers(1, 5), min_size=1, max_size=4), layers=LAYER_SETS)
    def step_and_use(self, new, layers):
        made = len(self.steps)
        self.step(new)
        for layer in layers if len(self.steps) > made else ():
            self.use_one(self.steps[-1], layer)

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def use(self, data, layer):
        # By index: what is drawn is kept by Hypothesis, and a step that is kept is not dropped.
        self.use_one(self.steps[-1 - data.draw(st.integers(0, len(self.steps) - 1))], layer)

    def use_one(self, entry, layer):
        step = entry["step"]
        whole = all(len(self.rows.get((r, layer), ())) == past for r, past in zip(entry["requests"], entry["pasts"]))
        allowed = entry["open"] and layer not in entry["layers"] and whole
        self.attempt(allowed, ValueError, lambda: step.check(layer))
        if not allowed:
            return
        written = torch.randn(step.num_tokens, self.cache.cfg.latent_dim)
        self.cache.storage[layer].view(-1, written.shape[1])[step.slots] = written
        step.commit(layer)
        entry["layers"].add(layer)
        for request, past, part in zip(entry["requests"], entry["pasts"], written.split(entry["new"])):
            self.lengths[request] = past + len(part)
            old = self.rows.get((request, layer), written[:0])
            self.rows[request, layer] = torch.cat([old, part])

    @rule(request=st.integers(0, 4), layer=st.integers(0, LAYERS - 1), length=st.integers(1, 26), fits=st.booleans())
    def fill(self, request, layer, length, fits):
        own = self.lengths.get(request, 0)
        if fits and own:
            length = own
        fresh = not len(self.rows.get((request, layer), ())) and own in (0, length) and length <= self.LIMIT
        room = self.pages(length) - self.pages(own) <= self.spare([request])
        latent, pe = rows(length, self.cache.cfg)
        kind = CacheFull if fresh else ValueError
        self.attempt(fresh and room, kind, lambda: self.cache.fill(request, latent, pe, layer))
        if fresh and room:
            self.end([request])
            self.lengths[request] = length
            self.rows[request, layer] = torch.cat([latent, pe], -1)

    @rule(request=st.integers(0, 4), length=st.integers(0, 24), within=st.booleans())
    def truncate(self, request, length, within):
        known, own = request in self.known(), self.lengths.get(request, 0)
        if within:
            length = min(length, own)
        allowed = known and length <= own
        self.attempt(allowed, ValueError if known else KeyError, lambda: self.cache.truncate(request, length))
        if allowed:
            self.end([request])
            if request in self.lengths:
                self.lengths[request] = length
            for layer in range(self.LAYERS):
                if (request, layer) in self.rows:
                    self.rows[request, layer] = self.rows[request, layer][:length]

    @rule(request=st.integers(0, 4))
    def free(self, request):
        known = request in self.known()
        self.attempt(known, KeyError, lambda: self.cache.free(request))
        if known:
            self.end([request])
            self.lengths.pop(request, None)
            for layer in range(self.LAYERS):
                self.rows.pop((request, layer), None)

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def drop(self, data):
        index = data.draw(st.integers(0, len(self.steps) - 1))
        del self.steps[index]["step"]
        del self.steps[index]
        gc.collect(0)

    @rule(bad=st.sampled_from([([1, 1], [1, 1]), ([0], [0]), ([], []), ([2], [True]), (["a"], [1]), ([1, 2], [1])]))
    def bad_step(self, bad):
        self.attempt(False, (ValueError, TypeError), lambda: self.cache.step(*bad))

    @invariant()
    def agrees(self):
        cache = self.cache
        assert set(cache.requests) == self.known()
        for request in cache.requests:
            assert cache.length(request) == self.lengths.get(request, 0)
        assert cache.num_free_pages == self.PAGES - self.held()
        owned = [page for record in cache._requests.values() for page in record.pages]
        reserved = [
            page
            for entry in self.steps
            if entry["open"] and not entry["layers"]
            for pages in entry["step"]._reservation.pages
            for page in pages
        ]
        assert sorted(cache._free + owned + reserved) == list(range(self.PAGES))

    @invariant()
    def keeps_what_was_written(self):
        """By the pages in the record: no event may move or overwrite another request's rows."""
        cache = self.cache
        for (request, layer), expected in self.rows.items():
            pages = cache._requests[request].pages
            stored = cache.storage[layer][pages].view(-1, cache.cfg.latent_dim)[: len(expected)]
            assert torch.equal(stored, expected)

    def teardown(self):
        # All steps dropped and all requests ended: every page is free again.
        if not hasattr(self, "cache"):
            return
        for entry in self.steps:
            del entry["step"]
        self.steps.clear()
        gc.collect(0)
        assert set(self.cache.requests) == set(self.lengths)
        for request in self.cache.requests:
            self.cache.free(request)
        assert self.cache.num_free_pages == self.PAGES and self.cache.requests == ()


TestWalk = Walk.TestCase
TestWalk.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
