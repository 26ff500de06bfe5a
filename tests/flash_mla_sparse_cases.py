"""FlashMLA's sparse correctness cases as data: decode over indices into a paged cache, and sparse prefill.

`CASES` and `PREFILL_CASES` are the matrices of deepseek-ai/FlashMLA's test_flash_mla_sparse_decoding.py and
test_flash_mla_sparse_prefill.py for heads of 576 columns, written afresh, and more: the head counts of its dense tests,
extra caches (which it tries with its other layout only), caches that are not fp8. What is drawn, within what a result
must lie, and what is poisoned is FlashMLA's: NaN in every token that no index names, indices that lie nowhere.
"""

from __future__ import annotations

import itertools
import random
import zlib
from typing import NamedTuple

import torch

from ntops_mla.ops._fp8 import LATENT, TOKEN_BYTES, dequantize, quantize_into
from ntops_mla.testing import DECODE_LSE, SPARSE_OUT, SPARSE_PREFILL_LSE, SPARSE_PREFILL_OUT, assert_close
from tests.flash_mla_cases import GARBAGE_PAGE, HEADS, LSE_COS, WIDTH, draw_lengths, with_gaps

INFINITY = float("inf")
_DRAWN = 1 << 16  # tokens drawn at a time


class Scope(NamedTuple):
    """A cache and what is read of it: mean length of its requests, indices of a token, page size, how many of them
    count (`counted`: drawn for each request)."""

    s_k: int
    topk: int
    page_size: int
    counted: bool = False


class SparseCase(NamedTuple):
    """One call of flash_mla_with_kvcache with indices."""

    batch: int
    s_q: int
    heads: int
    scope: Scope
    varlen: bool = True
    sink: bool = True
    extra: Scope | None = None
    invalid: bool = False  # every index is -1
    empty: bool = False  # about half of the requests have no tokens

    @property
    def name(self) -> str:
        words = [f"b{self.batch}", f"q{self.s_q}", f"h{self.heads}"]
        for prefix, scope in (("", self.scope), ("extra", self.extra)):
            if scope is not None:
                words += [f"{prefix}k{scope.s_k}", f"top{scope.topk}", f"page{scope.page_size}"]
                words += ["counted"] if scope.counted else []
        return "-".join(words + [word for word in ("varlen", "sink", "invalid", "empty") if getattr(self, word)])

    @property
    def work(self) -> int:
        """(query row, key) pairs and gathered elements: what its time grows with."""
        keys = self.scope.topk + (self.extra.topk if self.extra else 0)
        return self.batch * self.s_q * keys * (self.heads + WIDTH)


_SCOPES = (
    (512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61), (2046, 2048, 2), (2046, 2048, 64),
    (2046, 2048, 576),
)  # fmt: skip
_REGULAR = tuple(
    SparseCase(batch, s_q, heads, Scope(*scope), varlen)
    for heads, scope, batch, s_q, varlen in itertools.product((64, 128), _SCOPES, (4, 74, 321), (1, 3), (True, False))
    if varlen or batch == 74
)
_CORNERS = tuple(
    SparseCase(batch, 3, heads, Scope(*scope), varlen, sink, None, invalid, empty)
    for heads, scope, batch, varlen, invalid, empty, sink in itertools.product(
        (64, 128), ((512, 64, 61), (650, 576, 53)), (4, 74, 321), (True, False), (True, False), (True, False),
        (True, False),
    )
    if (varlen or batch == 74) and (invalid or empty or sink)
)  # fmt: skip
_HEADS = tuple(
    SparseCase(batch, s_q, heads, Scope(*scope), sink=heads % 2 == 0)
    for heads, scope, batch, s_q in itertools.product(HEADS, ((300, 128, 64), (4096, 2048, 64)), (1, 2, 6, 128), (1, 2))
)
_EXTRA = tuple(
    SparseCase(batch, s_q, heads, Scope(1024, 576, 61, counted), True, True, Scope(512, 64, 2, more))
    for heads, batch, s_q, counted, more in itertools.product((64, 128), (4, 74), (1, 3), (True, False), (True, False))
)
CASES = _REGULAR + _CORNERS + _HEADS + _EXTRA


class SparseInputs(NamedTuple):
    """q, k_cache as the call takes it, indices, attn_sink, and the arguments of the extra cache; None: not given.

    keys, extra_keys: `[pages * page_size, 576]`, what the caches hold, on the CPU, in a dtype that holds it exactly.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    indices: torch.Tensor
    attn_sink: torch.Tensor | None
    topk_length: torch.Tensor | None
    extra_k_cache: torch.Tensor | None
    extra_indices_in_kvcache: torch.Tensor | None
    extra_topk_length: torch.Tensor | None
    keys: torch.Tensor
    extra_keys: torch.Tensor | None
    fp8: bool
    softmax_scale: float = WIDTH**-0.55

    def arguments(self) -> dict:
        """By name, but for the metadata."""
        given = self._asdict()
        for name in ("keys", "extra_keys", "fp8"):
            del given[name]
        return {
            **given, "block_table": None, "cache_seqlens": None, "head_dim_v": LATENT, "is_fp8_kvcache": self.fp8,
        }  # fmt: skip


def make_inputs(case: SparseCase, fp8: bool, device="cpu", dtype: torch.dtype = torch.bfloat16) -> SparseInputs:
    """The same inputs in every run; `fp8`: quantised, and compared with what the bytes say."""
    seed = zlib.crc32(case.name.encode())
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    q = _gaps(torch.randn(case.batch, case.s_q, case.heads, WIDTH, generator=generator).clamp_(-1, 1).to(dtype))
    sink = _sink(case.heads, generator) if case.sink else None
    scopes = []
    for scope in (case.scope, case.extra):
        if scope is None:
            scopes.append((None, None, None, None))
            continue
        cache, keys, indices = _cache(case, scope, fp8, dtype, generator, draw)
        counts = None
        if scope.counted:
            counts = torch.randint(0, scope.topk + 1, (case.batch,), generator=generator, dtype=torch.int32)
        _poison(cache, keys, indices, counts)
        scopes.append((cache, _gaps(indices), counts, keys))
    on = [[None if x is None else x.to(device) for x in scope[:3]] for scope in scopes]
    (cache, indices, counts), (extra, extra_indices, extra_counts) = on
    return SparseInputs(
        q.to(device), cache, indices, None if sink is None else sink.to(device), counts, extra, extra_indices,
        extra_counts, scopes[0][3], scopes[1][3], fp8,
    )  # fmt: skip


def _cache(case, scope, fp8, dtype, generator, draw):
    """The cache as it is passed, what it holds `[slots, 576]`, indices int32 `[B, s_q, topk]`."""
    lengths = draw_lengths(case, scope.s_k, draw)
    size = scope.page_size
    columns = max(-(-max(lengths) // (4 * size)), 1) * 4
    table = torch.randperm(case.batch * columns, generator=generator).view(case.batch, columns)
    pages = table.numel()
    # Pages lie a token further apart, as in FlashMLA's tests; between them is NaN.
    if fp8:
        cache = torch.full((pages, size + 1, TOKEN_BYTES), 0xFF, dtype=torch.uint8)[:, :size]
        keys = torch.empty(pages, size, WIDTH, dtype=torch.bfloat16)  # exact: the scales are powers of two
    else:
        cache = torch.full((pages, size + 1, WIDTH), float("nan"), dtype=dtype)[:, :size]
        keys = torch.empty(pages, size, WIDTH, dtype=dtype)
    together = max(1, _DRAWN // size)
    for first in range(0, pages, together):  # float32 of the whole cache would be gigabytes
        some = slice(first, first + together)
        rows = torch.randn(keys[some].shape, generator=generator).div_(10).clamp_(-1, 1)
        if fp8:
            quantize_into(cache[some], rows[..., :LATENT], rows[..., LATENT:])
            keys[some] = dequantize(cache[some])
        else:
            cache[some] = rows
            keys[some] = cache[some]
    if fp8:
        cache = cache.view(torch.float8_e4m3fn)
    indices = torch.full((case.batch, case.s_q, scope.topk), -1, dtype=torch.int32)
    if not case.invalid:
        for request, length in enumerate(lengths):
            for token in range(case.s_q):
                chosen = torch.randperm(length, generator=generator)[: scope.topk]
                place = table[request, chosen // size] * size + chosen % size
                # Where there are fewer keys than indices, the invalid ones lie anywhere.
                at = torch.randperm(scope.topk, generator=generator)[: len(chosen)]
                indices[request, token, at] = place.int()
    return cache[:, :, None], keys.reshape(-1, WIDTH), indices


def _poison(cache, keys, indices, counts):
    """NaN in every token that no index that counts names: in the cache as its bytes say it."""
    used = torch.zeros(len(keys) + 1, dtype=torch.bool)
    place = indices.long()
    if counts is not None:
        place = torch.where(torch.arange(indices.shape[2]) < counts[:, None, None], place, -1)
    used[place.flatten()] = True  # -1 is the last one
    rows = cache[:, :, 0]
    page, slot = (~used[:-1]).view(rows.shape[:2]).nonzero(as_tuple=True)
    if rows.dtype == torch.float8_e4m3fn:
        rows.view(torch.uint8)[page, slot] = 0xFF  # NaN in codes, scales and rope columns
    else:
        rows[page, slot] = float("nan")


def _sink(heads, generator):
    """Numbers, and now and then an infinity."""
    sink, kind = torch.randn(2, heads, generator=generator)
    sink[kind > 0.5] = INFINITY
    sink[kind < -0.5] = -INFINITY
    return sink


def _gaps(value):
    return with_gaps(value, float("nan") if value.is_floating_point() else GARBAGE_PAGE)


class Expected(NamedTuple):
    """float64 on the CPU: out `[..., H, 512]`, lse and max_logits `[..., H]`; +inf and -inf where there is no key."""

    out: torch.Tensor
    lse: torch.Tensor
    max_logits: torch.Tensor


def attend(q, keys, scale, sink) -> Expected:
    """q `[H, 576]` over keys `[n, 576]`."""
    heads = len(q)
    if not len(keys):
        inf = torch.full((heads,), INFINITY, dtype=torch.float64)
        return Expected(torch.zeros(heads, LATENT, dtype=torch.float64), inf, -inf)
    scores = q.double() @ keys.T * scale
    lse = scores.logsumexp(-1)
    out = (scores - lse[:, None]).exp() @ keys[:, :LATENT]
    if sink is not None:
        out = out / (1 + (sink.cpu().double() - lse).exp())[:, None]
    return Expected(out, lse, scores.amax(-1))


def reference(case: SparseCase, inputs: SparseInputs) -> Expected:
    """out `[B, s_q, H, 512]`, lse `[B, H, s_q]`, a token at a time."""
    q = inputs.q.cpu()
    scopes = [(inputs.keys, inputs.indices.cpu(), inputs.topk_length)]
    if inputs.extra_keys is not None:
        scopes.append((inputs.extra_keys, inputs.extra_indices_in_kvcache.cpu(), inputs.extra_topk_length))
    found = []
    for request, token in itertools.product(range(case.batch), range(case.s_q)):
        keys = []
        for all_keys, indices, counts in scopes:
            chosen = indices[request, token, : None if counts is None else int(counts[request])].long()
            keys.append(all_keys[chosen[(chosen >= 0) & (chosen < len(all_keys))]].double())
        found.append(attend(q[request, token], torch.cat(keys), inputs.softmax_scale, inputs.attn_sink))
    out, lse, most = (torch.stack(x).unflatten(0, (case.batch, case.s_q)) for x in zip(*found))
    return Expected(out, lse.transpose(1, 2), most.transpose(1, 2))


def check(case: SparseCase, out: torch.Tensor, lse: torch.Tensor, expected: Expected) -> None:
    """Raise AssertionError unless both are within FlashMLA's tolerances; zeros and +inf where there is no key."""
    assert out.shape == expected.out.shape and lse.shape == expected.lse.shape and lse.dtype == torch.float32
    blind = (expected.lse == INFINITY).transpose(1, 2)
    assert (out.cpu()[blind] == 0).all(), f"{case.name}: out without keys is not 0"
    assert_close(out, expected.out, SPARSE_OUT, f"{case.name}: out")
    assert_close(lse, expected.lse, DECODE_LSE._replace(cos=LSE_COS), f"{case.name}: lse")


def to_fp8(inputs):
    """FlashMLA's dense inputs over an fp8 cache, and over what it holds."""
    rows = inputs.k_cache[:, :, 0]
    cache = torch.full((len(rows), rows.shape[1] + 1, TOKEN_BYTES), 0xFF, dtype=torch.uint8)[:, : rows.shape[1]]
    quantize_into(cache, rows[..., :512], rows[..., 512:])
    plain = dequantize(cache, torch.float64)[:, :, None]
    return inputs._replace(k_cache=cache.view(torch.float8_e4m3fn)[:, :, None]), inputs._replace(k_cache=plain)


class SparsePrefillCase(NamedTuple):
    """One call of flash_mla_sparse_fwd."""

    s_q: int
    s_kv: int
    topk: int
    heads: int
    sink: bool = False
    counted: bool = False
    invalid: bool = False  # about 2 % of the tokens have no valid index

    @property
    def name(self) -> str:
        words = [f"q{self.s_q}", f"k{self.s_kv}", f"top{self.topk}", f"h{self.heads}"]
        return "-".join(words + [word for word in ("sink", "counted", "invalid") if getattr(self, word)])


_IRREGULAR = ((592, 128), (1840, 256), (1592, 384), (1521, 512), (95, 128), (153, 256), (114, 384))
PREFILL_CASES = tuple(
    dict.fromkeys(
        [
            SparsePrefillCase(s_q, *keys, heads)
            for heads, keys, s_q in itertools.product(
                (128, 64), ((128, 128), (256, 256), (512, 512), *_IRREGULAR), (1, 62, 213)
            )
        ]
        + [
            SparsePrefillCase(s_q, *keys, heads, sink, counted)
            for heads, keys, s_q, sink, counted in itertools.product(
                (128, 64), _IRREGULAR, (62, 213), (False, True), (False, True)
            )
        ]
        + [
            SparsePrefillCase(*sizes, heads, True, True, True)
            for heads, sizes in itertools.product(
                (128, 64), ((1, 128, 128), (1, 256, 256), (1234, 4321, 4096), (4096, 2048, 2048))
            )
        ]
        + [
            SparsePrefillCase(s_q, *keys, heads, True, True)
            for heads, keys, s_q in itertools.product((128, 64), ((32, 2048), (64, 8192)), (1, 1024))
        ]
        + [
            SparsePrefillCase(s_q, *keys, heads, heads % 2 == 0, s_q == 2)
            for heads, keys, s_q in itertools.product(HEADS, ((592, 128), (114, 384)), (1, 2))
        ]
    )
)
# Tokens that are compared: each is an attention of its own, and float64 of thousands would take minutes.
_REFERENCE_TOKENS = 256
SM_SCALE = 0.5


class SparsePrefillInputs(NamedTuple):
    """FlashMLA's arguments."""

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    sm_scale: float
    d_v: int
    attn_sink: torch.Tensor | None
    topk_length: torch.Tensor | None


def make_prefill_inputs(
    case: SparsePrefillCase, device="cpu", dtype: torch.dtype = torch.bfloat16
) -> SparsePrefillInputs:
    """The same inputs in every run: randn / 10 and a shift, NaN in the keys that no index names."""
    seed = zlib.crc32(case.name.encode())
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)

    def drawn(*shape):
        shift = (draw.random() - 0.5) / 10
        return (torch.randn(shape, generator=generator) / 10 + shift).clamp_(-10, 10).to(dtype)

    q, kv = drawn(case.s_q, case.heads, WIDTH), drawn(case.s_kv, 1, WIDTH)
    nowhere = torch.tensor(
        [-2147483648, -123456, -1, case.s_kv, 114514, 1919810, 2147480000, 2147483647], dtype=torch.int32
    )
    filler = nowhere[torch.randint(len(nowhere), (case.s_q, 1, case.topk), generator=generator)]
    # A random order of the keys for each token, in as many random places.
    order = torch.rand(case.s_q, case.s_kv, generator=generator).argsort(-1)[:, : case.topk].int()
    place = torch.rand(case.s_q, case.topk, generator=generator).argsort(-1)[:, : order.shape[1]]
    indices = filler.clone()
    indices[:, 0].scatter_(1, place, order)
    if case.invalid:
        indices[torch.randn(case.s_q, generator=generator) < -2] = nowhere[draw.randrange(len(nowhere))]
    sink = _sink(case.heads, generator) if case.sink else None
    counts = None
    if case.counted:
        counts = torch.randint(0, max(case.topk + 1, 64), (case.s_q,), generator=generator, dtype=torch.int32)
        counts.clamp_(max=case.topk)
    used = torch.zeros(case.s_kv, dtype=torch.bool)
    for token in range(case.s_q):
        used[_chosen(indices[token, 0], counts, token, case.s_kv)] = True
    kv[~used] = float("nan")
    values = (_gaps(q), _gaps(kv), _gaps(indices), SM_SCALE, LATENT, sink, counts)
    return SparsePrefillInputs(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in values))


def _chosen(indices, counts, token, s_kv):
    row = indices[: None if counts is None else int(counts[token])].long()
    return row[(row >= 0) & (row < s_kv)]


def prefill_tokens(case: SparsePrefillCase) -> list[int]:
    """Tokens that are compared, spread from the first to the last."""
    count = min(_REFERENCE_TOKENS, case.s_q)
    return sorted({round(i * (case.s_q - 1) / max(count - 1, 1)) for i in range(count)})


def prefill_reference(case: SparsePrefillCase, inputs: SparsePrefillInputs) -> Expected:
    """Of `prefill_tokens(case)`."""
    q, kv, indices = inputs.q.cpu(), inputs.kv.cpu()[:, 0].double(), inputs.indices.cpu()
    counts = None if inputs.topk_length is None else inputs.topk_length.cpu()
    found = [
        attend(q[token], kv[_chosen(indices[token, 0], counts, token, case.s_kv)], inputs.sm_scale, inputs.attn_sink)
        for token in prefill_tokens(case)
    ]
    return Expected(*(torch.stack(x) for x in zip(*found)))


def check_prefill(case: SparsePrefillCase, out, max_logits, lse, expected: Expected) -> None:
    """As `check`; no token may hold a NaN."""
    assert out.shape == (case.s_q, case.heads, LATENT) and lse.shape == max_logits.shape == (case.s_q, case.heads)
    assert not out.isnan().any() and not lse.isnan().any() and not max_logits.isnan().any()
    tokens = prefill_tokens(case)
    blind = expected.lse == INFINITY
    assert (out.cpu()[tokens][blind] == 0).all(), f"{case.name}: out without keys is not 0"
    assert_close(out[tokens], expected.out, SPARSE_PREFILL_OUT, f"{case.name}: out")
    assert_close(
        max_logits[tokens], expected.max_logits, SPARSE_PREFILL_LSE._replace(cos=LSE_COS), f"{case.name}: max_logits"
    )
    assert_close(lse[tokens], expected.lse, SPARSE_PREFILL_LSE._replace(cos=LSE_COS), f"{case.name}: lse")
