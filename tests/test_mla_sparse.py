"""mla_sparse on the CPU: its PyTorch reference against float64, and what it refuses."""

import importlib
import re

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import DECODE_LSE, PREFILL_LSE, SPARSE_OUT, assert_close
from tests.test_ops import (
    DOUBLE,
    DTYPES,
    HALF,
    LSE,
    SINGLE,
    cast,
    flat,
    longer,
    meta,
    name_of,
    one_more,
    shorter,
    small,
)

SPARSE = importlib.import_module("ntops_mla.ops.mla_sparse")
ROWS = importlib.import_module("ntops_mla.ops._rows")
_ADDS = SPARSE._adds_before_it_rounds

# FlashMLA's, of its sparse decode; the lse of the two-byte dtypes and the largest score, which has no rounded weights.
TOLERANCES = {
    **{dtype: (SPARSE_OUT, DECODE_LSE, PREFILL_LSE) for dtype in HALF},
    torch.float32: (SINGLE, LSE, LSE),
    torch.float64: (DOUBLE, LSE, LSE),
}

# What an index that names no key may be, beside those just past a cache.
NOWHERE = (-1, -2, -64, -2147483648, 2147483647, 2147483584)

LAYOUTS = ("joined", "rows padded", "pages padded", "pages oddly padded", "apart", "odd strides", "swapped")


def sparse_inputs(
    counts,
    topk,
    *,
    dtype,
    s_q=1,
    heads=4,
    page_size=64,
    pages=3,
    latent=512,
    rope=64,
    layout="joined",
    strided=False,
    lengths=None,
):
    """`counts`: the keys of each of the B * s_q tokens, at random places; the other indices name none.

    The cache is NaN but where such a key is, some keys occur twice. `lengths`: topk_length of each token, as a list:
    the keys are among the first so many, and what follows names NaN.
    """
    tokens, width, slots = len(counts), latent + rope, pages * page_size
    used = torch.randperm(slots)[: max(1, slots // 2)]
    free = torch.tensor(sorted({*range(slots)} - {*used.tolist()}) or [0])
    filled = torch.full((slots, width), float("nan"), dtype=dtype)
    filled[used] = small(len(used), width, dtype=dtype)
    nowhere = torch.tensor([*NOWHERE, slots, slots + 1])
    indices = nowhere[torch.randint(len(nowhere), (tokens, topk))]
    for token, count in enumerate(counts):
        room = topk if lengths is None else min(max(lengths[token], 0), topk)
        indices[token, torch.randperm(room)[:count]] = used[torch.randint(len(used), (min(count, room),))]
        indices[token, room:] = free[torch.randint(len(free), (topk - room,))]
    indices = indices.to(torch.int32).view(tokens // s_q, s_q, topk)
    filled = filled.view(pages, page_size, width)
    if layout == "joined":
        kv, pe = filled[..., :latent], filled[..., latent:]
    elif layout == "rows padded":
        room = torch.full((pages, page_size, width + 9), float("nan"), dtype=dtype)
        room[..., 1 : 1 + latent], room[..., latent + 4 : latent + 4 + rope] = filled.split([latent, rope], -1)
        kv, pe = room[..., 1 : 1 + latent], room[..., latent + 4 : latent + 4 + rope]
    elif layout == "pages padded":  # by whole slots
        room = torch.full((pages, page_size + 3, width), float("nan"), dtype=dtype)
        room[:, :page_size] = filled
        kv, pe = room[:, :page_size, :latent], room[:, :page_size, latent:]
    elif layout == "pages oddly padded":  # by a part of a slot
        stride = page_size * width + 7
        room = torch.full((pages * stride,), float("nan"), dtype=dtype)
        room = room.as_strided((pages, page_size, width), (stride, width, 1)).copy_(filled)
        kv, pe = room[..., :latent], room[..., latent:]
    elif layout == "apart":
        kv, pe = filled[..., :latent].clone(), filled[..., latent:].clone()
    elif layout == "odd strides":  # two tensors, pages inside slots, and columns that are not adjacent
        kv = torch.empty(page_size, pages, latent + 1, dtype=dtype).transpose(0, 1)[..., 1:]
        pe = torch.empty(rope, page_size, pages, dtype=dtype).permute(2, 1, 0)
        kv.copy_(filled[..., :latent])
        pe.copy_(filled[..., latent:])
    elif layout == "swapped":  # one storage, the rope columns first
        room = torch.cat([filled[..., latent:], filled[..., :latent]], -1)
        kv, pe = room[..., rope:], room[..., :rope]
    q = small(tokens // s_q, s_q, heads, width, dtype=dtype) * 10
    q_nope, q_pe = q.split([latent, rope], -1)
    length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32).view(-1, s_q)
    if strided:
        batch = tokens // s_q
        q_nope = torch.empty(batch, heads, s_q, latent + 5, dtype=dtype).transpose(1, 2)[..., 2:-3].copy_(q_nope)
        q_pe = torch.empty(batch, rope, heads, s_q, dtype=dtype).permute(0, 3, 2, 1).copy_(q_pe)
        indices = torch.stack([indices, torch.zeros_like(indices)], -1).flatten(2)[..., ::2]
        length = None if length is None else torch.stack([length, torch.full_like(length, 2147480000)], -1)[..., 0]
        assert heads == 1 or not (q_nope.is_contiguous() or q_pe.is_contiguous())

    return q_nope, q_pe, kv, pe, indices, width**-0.5, length


def sparse64(q_nope, q_pe, kv, pe, indices, scale, topk_length=None):
    """A token and a key at a time, with no softmax of PyTorch's."""
    batch, s_q, heads, latent = q_nope.shape
    pages, page_size, _ = kv.shape
    out = torch.zeros(batch, s_q, heads, latent, dtype=torch.float64)
    lse, most = (torch.full((batch, s_q, heads), float("-inf"), dtype=torch.float64) for _ in range(2))
    for b in range(batch):
        for i in range(s_q):
            named = indices[b, i].tolist()
            if topk_length is not None:
                named = named[: max(0, int(topk_length[b, i]))]
            places = [divmod(index, page_size) for index in named if 0 <= index < pages * page_size]
            if not places:
                continue
            k, p = (torch.stack([cache[place] for place in places]).double() for cache in (kv, pe))
            scores = scale * (q_nope[b, i].double() @ k.T + q_pe[b, i].double() @ p.T)
            most[b, i] = scores.max(1)[0]
            weights = (scores - most[b, i][:, None]).exp()
            lse[b, i] = most[b, i] + weights.sum(1).log()
            out[b, i] = weights @ k / weights.sum(1, keepdim=True)
    return out, lse, most


def check_results(results, expected, dtype, tolerances):
    """`results`: out, lse, max_logits; -inf and 0 are those of `expected`."""
    out, lse, most = results
    assert (out.dtype, lse.dtype, most.dtype) == (dtype, torch.float32, torch.float32)
    assert [r.shape for r in results] == [e.shape for e in expected]
    blind = expected[1] == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    assert not most.numel() or torch.equal(most == float("-inf"), blind)
    assert torch.equal(out[blind], torch.zeros_like(out[blind]))
    for value, wanted, tolerance, name in zip(results, expected, tolerances, ("out", "lse", "max_logits")):
        assert_close(value, wanted, tolerance, name)


def check_sparse(args, **kwargs):
    """With the largest scores and without, which are two ways on a CPU."""
    results, expected = ops.mla_sparse(*args, want_max=True, **kwargs), sparse64(*args)
    check_results(results, expected, args[0].dtype, TOLERANCES[args[0].dtype])
    out, lse, most = ops.mla_sparse(*args, **kwargs)
    assert (most.shape, most.dtype) == ((0,), torch.float32)
    check_results((out, lse, results[2]), expected, args[0].dtype, TOLERANCES[args[0].dtype])
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 63, 64, 128])
def test_heads(heads, dtype):
    check_sparse(sparse_inputs([40, 1, 0, 17], 40, heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [1, 2, 61, 64, 69, 576])
def test_page_sizes(page_size, dtype):
    args = sparse_inputs([50, 3, 0, 1], 50, page_size=page_size, pages=-(-200 // page_size), dtype=dtype)
    check_sparse(args)


@pytest.mark.parametrize("topk", [1, 2, 15, 16, 17, 128, 500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_numbers_of_indices(topk, dtype):
    check_sparse(sparse_inputs([topk, 1, topk // 2, 0], topk, s_q=2, dtype=dtype))


@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("page_size, pages", [(1, 70), (16, 5), (70, 1), (1, 1)])
def test_layouts(page_size, pages, dtype, layout, strided):
    counts = [20, 0, 11, 3, 1, 20]
    sizes = dict(page_size=page_size, pages=pages, layout=layout, strided=strided, s_q=3)
    check_sparse(sparse_inputs(counts, 20, dtype=dtype, **sizes))
    check_sparse(sparse_inputs(counts, 20, dtype=dtype, lengths=[20, 7, 12, 3, 1, 25], **sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_small_heads(dtype):
    check_sparse(sparse_inputs([37, 0, 64, 5], 64, latent=256, rope=32, s_q=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_lengths(dtype):
    """None, negative ones, all, and beyond."""
    lengths = [0, -1, -2147483648, 1, 16, 39, 40, 41, 2147483647]
    check_sparse(sparse_inputs([40] * 9, 40, lengths=lengths, s_q=3, dtype=dtype))
    check_sparse(sparse_inputs([0, 3, 1, 1, 0, 20, 30, 2, 7], 40, lengths=lengths, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_duplicates_count_as_often_as_they_occur(dtype):
    q_nope, q_pe, kv, pe, indices, scale, _ = sparse_inputs([5], 5, dtype=dtype)
    twice = torch.cat([indices, indices[..., :2], indices[..., :2]], -1)
    check_sparse((q_nope, q_pe, kv, pe, twice, scale))
    same = indices[..., :1].expand(1, 1, 7)
    out, lse, most = check_sparse((q_nope, q_pe, kv, pe, same, scale))
    assert_close(lse, most + torch.tensor(7.0).log(), LSE)
    assert_close(out[0, 0, 0], kv.flatten(0, 1)[indices[0, 0, 0]], SINGLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_index_names_a_key(dtype):
    """All that an index may be beside a key, one after the other and all together; with a cache of NaN."""
    q_nope, q_pe, kv, pe, _, scale, _ = sparse_inputs([0], 1, dtype=dtype)
    kv.fill_(float("nan"))
    pe.fill_(float("nan"))
    slots = kv.shape[0] * kv.shape[1]
    indices = torch.tensor([*NOWHERE, slots, slots + 1, slots * 64], dtype=torch.int32)
    rows = len(indices)
    check_sparse((q_nope, q_pe, kv, pe, indices[None, None], scale))
    queries = q_nope.expand(rows, -1, -1, -1), q_pe.expand(rows, -1, -1, -1)
    check_sparse((*queries, kv, pe, indices[:, None, None], scale))
    check_sparse((*queries, kv[:0], pe[:0], torch.zeros_like(indices)[:, None, None], scale))


def test_nothing_to_do():
    q_nope, q_pe, kv, pe, indices, scale, _ = sparse_inputs([5, 3], 5, dtype=torch.float32)
    args = kv, pe, indices, scale
    out, lse, most = ops.mla_sparse(q_nope[:, :, :0], q_pe[:, :, :0], *args, want_max=True)
    assert out.shape == (2, 1, 0, 512) and lse.shape == most.shape == (2, 1, 0)
    out, lse, most = ops.mla_sparse(q_nope[:, :0], q_pe[:, :0], kv, pe, indices[:, :0], scale, want_max=True)
    assert out.shape == (2, 0, 4, 512) and lse.shape == most.shape == (2, 0, 4)
    out, lse, most = ops.mla_sparse(q_nope[:0], q_pe[:0], kv, pe, indices[:0], scale, want_max=True)
    assert out.shape == (0, 1, 4, 512) and lse.shape == most.shape == (0, 1, 4)
    check_sparse((q_nope, q_pe, kv, pe, indices[..., :0], scale))


def test_lse_and_max_logits_are_natural_logarithms_of_scaled_scores():
    """Two equal keys, whose score is known."""
    q = torch.zeros(1, 1, 1, 512)
    q[..., 0] = 3.0
    kv, pe = torch.zeros(1, 16, 512), torch.zeros(1, 16, 64)
    kv[0, 5, 0] = 2.0
    indices = torch.tensor([[[5, -1, 5]]], dtype=torch.int32)
    out, lse, most = ops.mla_sparse(q, torch.zeros(1, 1, 1, 64), kv, pe, indices, 0.5, want_max=True)
    assert most.item() == 3.0 and abs(lse.item() - 3.0 - torch.tensor(2.0).log().item()) < 1e-6
    assert torch.equal(out[0, 0, 0], kv[0, 5])


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_scores_are_not_rounded_to_two_bytes(dtype):
    """Scores of 4 to 8, rounded to bfloat16, are off by up to a 64th."""
    args = sparse_inputs([100, 60], 100, dtype=dtype)
    for q in args[:2]:
        q.mul_(20)
    assert check_sparse(args)[2].max() > 3


@pytest.mark.parametrize("exact", [True, False], ids=["two products", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("lengths", [None, [30, 7, 0, 40, 19, 1]], ids=["all", "lengths"])
@pytest.mark.parametrize("heads", [4, 40])
def test_on_cpus_of_both_kinds(monkeypatch, heads, exact, dtype, lengths):
    """Whether bfloat16 products add in float32 or not; of more heads also where nobody asks for the largest score."""
    monkeypatch.setattr(SPARSE, "_adds_before_it_rounds", lambda: exact and _ADDS())
    ran = []
    attend = SPARSE._attend
    monkeypatch.setattr(SPARSE, "_attend", lambda *args: ran.append(args) or attend(*args))
    check_sparse(sparse_inputs([40, 7, 0, 40, 3, 1], 40, lengths=lengths, heads=heads, dtype=dtype))
    assert len(ran) == (2 if exact and _ADDS() and heads == 40 and dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("scale", [0.0, 5e-46, -0.0])
@pytest.mark.parametrize("heads", [16, 64])
def test_a_scale_of_nothing(heads, scale):
    """PyTorch's product in bfloat16 leaves what it was given where its factor is 0."""
    torch.empty(1 << 22, dtype=torch.bfloat16).fill_(float("nan"))
    args = list(sparse_inputs([40, 7, 0, 40], 40, heads=heads, dtype=torch.bfloat16))
    args[5] = scale
    check_sparse(args)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("heads", [16, 64])
def test_a_small_lse(heads, dtype):
    """Of two keys, and of many with scores below 0: as exact as any."""
    args = list(sparse_inputs([2] * 30, 2, heads=heads, dtype=dtype))
    args[5] = 0.2
    check_sparse(args)
    q_nope, q_pe, kv, pe, indices, _, lengths = sparse_inputs([60] * 30, 60, heads=heads, dtype=dtype)
    for q in (q_nope, q_pe):
        q.zero_()
    q_nope[..., 0] = 1
    kv[..., 0] = -4.1  # log(60)
    check_sparse((q_nope, q_pe, kv, pe, indices, 1.0, lengths))


@pytest.mark.parametrize("tokens", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_a_few_tokens_at_a_time(monkeypatch, tokens, dtype):
    gathered = []
    attend = SPARSE._attend
    monkeypatch.setattr(SPARSE, "_attend", lambda q, *rest: gathered.append(len(q)) or attend(q, *rest))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(ROWS, "_CPU_GATHER_BYTES", tokens * 30 * 576 * dtype.itemsize + 5)
    check_sparse(sparse_inputs([30, 4, 0, 30, 11, 1, 29], 30, dtype=dtype))
    assert gathered == {0: [1] * 7, 1: [1] * 7, 2: [2, 2, 2, 1], 4: [4, 3]}[tokens]


@pytest.mark.parametrize("num_splits", [None, 1, 3, 100])
def test_splits_do_not_change_the_result(num_splits):
    args = sparse_inputs([37, 0, 20, 5], 40, dtype=torch.float64)
    out, _, _ = check_sparse(args, num_splits=num_splits)
    assert torch.equal(out, ops.mla_sparse(*args, want_max=True)[0])


def test_one_list_of_keys_in_pages_of_one_and_in_one_page():
    """As a prefill's keys may be passed: bit for bit the same."""
    q_nope, q_pe, kv, pe, indices, scale, _ = sparse_inputs([40, 33], 40, pages=1, page_size=90, dtype=torch.bfloat16)
    whole = check_sparse((q_nope, q_pe, kv, pe, indices, scale))
    single = check_sparse((q_nope, q_pe, kv.transpose(0, 1), pe.transpose(0, 1), indices, scale))
    assert all(map(torch.equal, whole, single))


@pytest.mark.parametrize("lengths", [None, [5, 2]], ids=["all", "lengths"])
def test_another_device_is_not_waited_for(monkeypatch, lengths):
    """What would copy a number to the host, on meta tensors raises: the reference runs on them."""
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in sparse_inputs([5, 3], 8, dtype=torch.bfloat16)]
    args[6] = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device="meta")[:, None]
    out, lse, most = SPARSE._reference(*args, None, True)
    assert out.shape == (2, 1, 4, 512) and lse.shape == most.shape == (2, 1, 4)


def test_as_on_another_device(monkeypatch):
    """Its path, on the CPU: masks in place of places, and products in float32."""
    attend, gather = SPARSE._attend, SPARSE._gather

    class Elsewhere(torch.Tensor):
        """A CPU tensor that says it is somewhere else."""

        device = property(lambda self: torch.device("meta"))
        __torch_function__ = torch._C._disabled_torch_function_impl

    def masked(caches, indices, lengths):
        index = indices.long()
        arange = torch.arange
        with monkeypatch.context() as patch:
            patch.setattr(torch, "arange", lambda *a, device=None: arange(*a))
            keys, hidden = gather(caches, index.as_subclass(Elsewhere), lengths)
        return keys.as_subclass(torch.Tensor), hidden.as_subclass(torch.Tensor)

    monkeypatch.setattr(SPARSE, "_gather", masked)
    monkeypatch.setattr(SPARSE, "_attend", lambda q, *rest: attend(q.as_subclass(Elsewhere), *rest))
    for lengths in (None, [40, 7, 0, 40, 19, 1]):
        for layout in ("joined", "apart", "pages oddly padded"):
            check_sparse(sparse_inputs([40, 7, 0, 40, 3, 1], 40, layout=layout, lengths=lengths, dtype=torch.bfloat16))


# What is refused


def good():
    """Valid arguments by name."""
    names = list(ops.get("mla_sparse")._signature.parameters)
    args = dict(zip(names, ops.get("mla_sparse").example("cpu", torch.float32, tokens=3, heads=2, s_q=2, topk=5)))
    args["topk_length"] = torch.full((3, 2), 4, dtype=torch.int32)
    return args


def is_(value):
    return lambda t: value


BAD = [
    ("q_nope", lambda t: t[0], ValueError, "[2, 2, 512]"),
    ("q_nope", cast(torch.int8), TypeError, "int8"),
    ("q_nope", is_("q"), TypeError, "str"),
    ("q_pe", lambda t: t[0], ValueError, "[2, 2, 64]"),
    ("q_pe", longer(0), ValueError, "[4, 2, 2, 64]"),
    ("q_pe", longer(1), ValueError, "[3, 3, 2, 64]"),
    ("q_pe", longer(2), ValueError, "[3, 2, 3, 64]"),
    ("q_pe", cast(torch.float16), TypeError, "float16"),
    ("q_pe", meta, ValueError, "meta"),
    ("kv_cache", one_more, ValueError, "[pages, page_size, C]"),
    ("kv_cache", lambda t: t[..., :511], ValueError, "512"),
    ("kv_cache", lambda t: t[:, :0], ValueError, "at least 1"),
    ("kv_cache", cast(torch.bfloat16), TypeError, "bfloat16"),
    ("kv_cache", meta, ValueError, "meta"),
    ("pe_cache", flat, ValueError, "[pages, page_size, R]"),
    ("pe_cache", lambda t: t[..., :63], ValueError, "64"),
    ("pe_cache", shorter(0), ValueError, "[3, 64]"),
    ("pe_cache", lambda t: t[:, :8], ValueError, "[4, 8]"),
    ("pe_cache", cast(torch.float64), TypeError, "float64"),
    ("pe_cache", meta, ValueError, "meta"),
    ("indices", flat, ValueError, "[B, s_q, topk]"),
    ("indices", shorter(0), ValueError, "3"),
    ("indices", longer(1), ValueError, "2"),
    ("indices", cast(torch.int64), TypeError, "int32"),
    ("indices", meta, ValueError, "meta"),
    ("indices", is_(None), TypeError, "NoneType"),
    ("topk_length", flat, ValueError, "[B, s_q]"),
    ("topk_length", shorter(0), ValueError, "3"),
    ("topk_length", longer(1), ValueError, "2"),
    ("topk_length", cast(torch.int64), TypeError, "int32"),
    ("topk_length", meta, ValueError, "meta"),
    ("topk_length", is_(4), TypeError, "int"),
    ("softmax_scale", is_("one"), TypeError, "one"),
    ("softmax_scale", is_(None), TypeError, "None"),
    ("num_splits", is_(0), ValueError, "0"),
    ("num_splits", is_(-1), ValueError, "-1"),
    ("num_splits", is_(1.5), TypeError, "1.5"),
    ("want_max", is_("no"), TypeError, "no"),
]


@pytest.mark.parametrize("argument, change, error, words", BAD, ids=[f"{b[0]}-{b[3]}" for b in BAD])
def test_a_bad_argument_is_named(argument, change, error, words):
    args = good()
    args[argument] = change(args[argument])
    sparse = ops.mla_sparse
    for function in (sparse, sparse.reference, sparse.explain):
        with pytest.raises(error) as caught:
            function(**args)
        assert re.match(rf"mla_sparse: .*\b{argument}\b", str(caught.value)), str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize("want_max", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"s_q": 3, "heads": 1}, {"kv_lora_rank": 256, "rope": 32}], ids=str)
def test_fake_results_and_opcheck(sizes, lengths, want_max):
    args = list(ops.get("mla_sparse").example("cpu", torch.bfloat16, **{"heads": 2, "tokens": 2, **sizes}))
    args[6:] = torch.ones(args[4].shape[:2], dtype=torch.int32) if lengths else None, 2, want_max
    real = ops.mla_sparse(*args)
    fake = ops.mla_sparse(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]
    results = torch.library.opcheck(torch.ops.ntops_mla.mla_sparse.default, tuple(args))
    assert set(results.values()) == {"SUCCESS"}, results


def test_explain_says_what_would_run():
    args = ops.get("mla_sparse").example("meta", torch.bfloat16, heads=128)
    assert ops.mla_sparse.explain(*args).op == "mla_sparse"
    choice = ops.mla_sparse.explain(*ops.get("mla_sparse").example("cpu", torch.bfloat16))
    assert (choice.platform, choice.backend) == ("cpu", "reference")
