"""FlashMLA's dense correctness cases as data: what it draws, and within what its results must lie.

`CASES` (decode) and `PREFILL_CASES` are the matrices of deepseek-ai/FlashMLA's test_flash_mla_dense_decoding.py, with
one latent head, and test_fmha_sm100.py, written afresh. `make_inputs(case, device, dtype)`, `reference(case, inputs)`
and `check(case, out, lse, expected)` serve whatever computes them: PyTorch, the interpreter, compiled kernels.
"""

from __future__ import annotations

import itertools
import random
import zlib
from typing import NamedTuple

import torch

from ntops_mla.testing import DECODE_LSE, DECODE_OUT, PREFILL_LSE, PREFILL_OUT, assert_close

WIDTH, LATENT = 576, 512
# What an entry of a block table holds past its request's pages.
GARBAGE_PAGE = 2147480000
# FlashMLA's comparison also has a default for the cosine, which its tests of lse leave as it is.
LSE_COS = 1e-7


class Case(NamedTuple):
    """One call of flash_mla_with_kvcache. s_k: the length of all requests, or its mean; empty: half have no keys."""

    batch: int
    s_q: int
    s_k: int
    heads: int
    varlen: bool
    causal: bool
    empty: bool = False
    page_size: int = 64

    @property
    def name(self) -> str:
        words = [f"b{self.batch}", f"q{self.s_q}", f"k{self.s_k}", f"h{self.heads}"]
        words += [word for word in ("varlen", "causal", "empty") if getattr(self, word)]
        return "-".join(words + ([f"page{self.page_size}"] if self.page_size != 64 else []))

    @property
    def work(self) -> int:
        """Pairs of a query row and a key, and elements of the cache: what its time grows with."""
        return self.batch * self.s_k * (self.s_q * self.heads + WIDTH)


HEADS = (1, 3, 9, 63, 64, 126, 128)
CASES = tuple(
    Case(batch, s_q, s_k, heads, varlen, causal)
    for batch, s_q, s_k, heads, varlen, causal in itertools.product(
        (1, 2, 6, 64), (1, 2, 4), (20, 140, 4096), HEADS, (False, True), (False, True)
    )
) + tuple(
    Case(128, 2, 4096, heads, True, causal, empty=True) for heads, causal in itertools.product(HEADS, (False, True))
)


def tenth(cases):
    """Every tenth case, one further on in each ten: a plain stride of ten would meet only one value of `causal`."""
    return tuple(case for i, case in enumerate(cases) if i % 10 == i // 10 % 10)


class Inputs(NamedTuple):
    """q `[B, s_q, H, 576]`, k_cache `[pages, page_size, 1, 576]`, block_table, cache_seqlens: FlashMLA's arguments."""

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor


class Expected(NamedTuple):
    """out, lse: float64 on the CPU, in the shapes of the results. keys: how many each row of lse sees."""

    out: torch.Tensor
    lse: torch.Tensor
    keys: torch.Tensor


def make_inputs(case: Case, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """The same inputs in every run: randn / 10 within +-1; NaN in all pages and slots that belong to no request.

    Half of the cases, by their name, have q and block_table with gaps between the elements of every dimension but the
    last, which hold NaN and pages that do not exist.
    """
    seed = zlib.crc32(case.name.encode())
    generator = torch.Generator().manual_seed(seed)
    lengths = draw_lengths(case, case.s_k, random.Random(seed))
    pages = [-(-length // case.page_size) for length in lengths]
    # FlashMLA rounds the longest request up to 256 tokens; 0 where all are empty.
    columns = -(-max(lengths) // 256) * 256 // case.page_size
    order = torch.randperm(case.batch * columns, generator=generator, dtype=torch.int32).view(case.batch, columns)
    k_cache = torch.full((case.batch * columns, case.page_size, 1, WIDTH), float("nan"), dtype=dtype)
    table = torch.full((case.batch, columns), GARBAGE_PAGE, dtype=torch.int32)
    for i, (length, count) in enumerate(zip(lengths, pages)):
        # Only pages in use are drawn: the rest is NaN whatever was there.
        latents = torch.full((count * case.page_size, WIDTH), float("nan"), dtype=dtype)
        latents[:length] = _small((length, WIDTH), generator)
        k_cache[order[i, :count].long()] = latents.view(count, case.page_size, 1, WIDTH)
        table[i, :count] = order[i, :count]
    q = _small((case.batch, case.s_q, case.heads, WIDTH), generator).to(dtype)
    gaps = seed % 2 == 1
    return Inputs(
        _on(q, device, gaps, float("nan")),
        k_cache.to(device),
        _on(table, device, gaps, GARBAGE_PAGE),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def reference(case: Case, inputs: Inputs) -> Expected:
    """The attention in float64 on the CPU, a request at a time, with FlashMLA's +inf where a row sees no key."""
    q, k_cache, table = inputs.q.cpu(), inputs.k_cache.cpu(), inputs.block_table.cpu()
    out = torch.zeros(case.batch, case.s_q, case.heads, LATENT, dtype=torch.float64)
    lse = torch.full((case.batch, case.heads, case.s_q), float("inf"), dtype=torch.float64)
    keys = torch.zeros(case.batch, 1, case.s_q, dtype=torch.int64)
    for i, length in enumerate(inputs.cache_seqlens.tolist()):
        used = table[i, : -(-length // case.page_size)].long()
        kv = k_cache[used].reshape(-1, WIDTH)[:length].double()
        visible = torch.full((case.s_q,), length)
        if case.causal:
            visible = (visible - case.s_q + 1 + torch.arange(case.s_q)).clamp_(min=0)
        keys[i, 0] = visible
        first = int((visible == 0).sum())  # rows without keys come first
        if first == case.s_q:
            continue
        # [rows, H, keys]
        scores = (q[i, first:].double().reshape(-1, WIDTH) @ kv.T).mul_(WIDTH**-0.5).view(-1, case.heads, length)
        if case.causal:
            scores.masked_fill_(torch.arange(length) >= visible[first:, None, None], float("-inf"))
        total = scores.logsumexp(-1)
        lse[i, :, first:] = total.T
        out[i, first:] = scores.sub_(total[..., None]).exp_() @ kv[:, :LATENT]
    return Expected(out, lse, keys)


def check(
    case: Case, out: torch.Tensor, lse: torch.Tensor, expected: Expected, lse_rows: torch.Tensor | None = None
) -> None:
    """Raise AssertionError unless out and lse are within FlashMLA's tolerances; lse_rows: True where lse is compared.

    Shapes, the zeros and the +inf of rows without keys are compared too.
    """
    assert out.shape == (case.batch, case.s_q, case.heads, LATENT) and lse.shape == (case.batch, case.heads, case.s_q)
    blind = expected.keys == 0
    assert (out.cpu().transpose(1, 2)[blind.expand(lse.shape)] == 0).all(), f"{case.name}: out without keys is not 0"
    # A request at a time: with all at once the comparison would take longer than the attention.
    dot = norm = 0.0
    for i, (x, y) in enumerate(zip(out.cpu(), expected.out)):
        assert_close(x, y, DECODE_OUT._replace(cos=None), f"{case.name}: out[{i}]")
        x = x.double().flatten()
        dot += (x @ y.flatten()).item()
        norm += (x @ x + y.flatten() @ y.flatten()).item()
    difference = 1 - 2 * dot / norm if norm else 0.0
    assert difference < DECODE_OUT.cos, f"{case.name}: cos_diff {difference:.3g}, allowed {DECODE_OUT.cos}"
    _check_lse(case, lse, expected, DECODE_LSE, lse_rows)


class PrefillCase(NamedTuple):
    """One call of flash_attn_varlen_func. s_q, s_k: the lengths of all requests, or their means."""

    batch: int
    s_q: int
    s_k: int
    varlen: bool
    heads: int
    kv_heads: int
    width: int
    value: int
    causal: bool

    @property
    def name(self) -> str:
        words = [f"b{self.batch}", f"q{self.s_q}", f"k{self.s_k}", f"h{self.heads}", f"hkv{self.kv_heads}"]
        words += [f"d{self.width}", f"dv{self.value}"]
        return "-".join(words + [word for word in ("varlen", "causal") if getattr(self, word)])

    @property
    def softmax_scale(self) -> float:
        return (self.width + 100) ** -0.5


# FlashMLA compares no results of 8192 tokens with 128 heads.
PREFILL_CASES = tuple(
    PrefillCase(2, tokens, tokens, varlen, heads, kv_heads, width, 128, causal)
    for tokens, varlen, (heads, kv_heads), width, causal in itertools.product(
        (4096, 8192), (False, True), ((128, 128), (32, 4)), (128, 192), (False, True)
    )
    if tokens == 4096 or heads == 32
)
# Heads of the reference: they are alike, and float64 would take minutes a case for all of 128.
_REFERENCE_HEADS = 4


class PrefillInputs(NamedTuple):
    """FlashMLA's first seven arguments."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_qo: torch.Tensor
    cu_seqlens_kv: torch.Tensor
    max_seqlen_qo: int
    max_seqlen_kv: int


def make_prefill_inputs(case: PrefillCase, device="cpu", dtype: torch.dtype = torch.bfloat16) -> PrefillInputs:
    """The same inputs in every run: randn / 10; the keys of a request at least as many as its rows, where varlen."""
    seed = zlib.crc32(case.name.encode())
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    rows, keys = [case.s_q] * case.batch, [case.s_k] * case.batch
    if case.varlen:
        rows = [int(max(draw.normalvariate(case.s_q, case.s_q / 2), 1)) for _ in rows]
        keys = [int(max(draw.normalvariate(case.s_k, case.s_k / 2), least)) for least in rows]
    q, k, v = (
        torch.randn(shape, generator=generator).div_(10).to(dtype).to(device)
        for shape in (
            (sum(rows), case.heads, case.width),
            (sum(keys), case.kv_heads, case.width),
            (sum(keys), case.kv_heads, case.value),
        )
    )
    starts = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in (rows, keys))
    return PrefillInputs(q, k, v, *starts, max(rows), max(keys))


def prefill_reference(case: PrefillCase, inputs: PrefillInputs, heads: list[int] | None = None) -> Expected:
    """out `[T, heads, value]`, lse `[T, heads]` in float64 on the CPU, of `reference_heads(case)` or of those named."""
    heads = reference_heads(case) if heads is None else heads
    q, k, v = inputs.q.cpu(), inputs.k.cpu(), inputs.v.cpu()
    out = torch.zeros(len(q), len(heads), case.value, dtype=torch.float64)
    lse = torch.full((len(q), len(heads)), float("-inf"), dtype=torch.float64)
    keys = torch.zeros(len(q), 1, dtype=torch.int64)
    bounds = zip(*(itertools.pairwise(x.tolist()) for x in (inputs.cu_seqlens_qo, inputs.cu_seqlens_kv)))
    for (first, last), (key, key_end) in bounds:
        rows, length = last - first, key_end - key
        visible = torch.full((rows,), length)
        if case.causal:
            visible = (visible - rows + 1 + torch.arange(rows)).clamp_(min=0)
        keys[first:last, 0] = visible
        for n, head in enumerate(heads):
            shared = head // (case.heads // case.kv_heads)
            k_head, v_head = k[key:key_end, shared].double(), v[key:key_end, shared].double()
            # 512 rows at a time: the scores of all would be a gigabyte
            for start in range(0, rows, 512):
                block = slice(first + start, min(first + start + 512, last))
                scores = q[block, head].double() @ k_head.T * case.softmax_scale
                scores.masked_fill_(torch.arange(length) >= keys[block], float("-inf"))
                total = scores.logsumexp(-1, keepdim=True)
                lse[block, n] = total[:, 0]
                blind = total == float("-inf")
                out[block, n] = scores.sub_(total.masked_fill(blind, 0)).exp_() @ v_head
    return Expected(out, lse, keys)


def reference_heads(case: PrefillCase) -> list[int]:
    """Some heads, spread from the first to the last."""
    count = min(_REFERENCE_HEADS, case.heads)
    return sorted({round(i * (case.heads - 1) / max(count - 1, 1)) for i in range(count)})


def check_prefill(
    case: PrefillCase,
    out: torch.Tensor,
    lse: torch.Tensor,
    expected: Expected,
    lse_rows: torch.Tensor | None = None,
) -> None:
    """As `check`, in the heads of the reference; the others must hold no NaN and lie in the values' range."""
    assert out.shape[1:] == (case.heads, case.value) and lse.shape == out.shape[:2]
    assert lse.stride(0) == 1, "lse's tokens must be contiguous"
    # Averages of values: none is larger than all of them can be.
    assert (out.abs() < 1).all() and not lse.isnan().any()
    heads = reference_heads(case)
    assert_close(out[:, heads], expected.out, PREFILL_OUT, f"{case.name}: out")
    _check_lse(case, lse[:, heads], expected, PREFILL_LSE, lse_rows)


def _check_lse(case, lse, expected, tolerance, rows):
    assert lse.dtype == torch.float32
    rows = torch.ones_like(expected.keys, dtype=torch.bool) if rows is None else rows
    rows = rows.expand(lse.shape)
    assert_close(lse.cpu()[rows], expected.lse[rows], tolerance._replace(cos=LSE_COS), f"{case.name}: lse")


def draw_lengths(case, s_k, draw):
    """The requests' lengths, s_k on average, at least s_q."""
    lengths = [s_k] * case.batch
    if case.varlen:
        lengths = [int(max(draw.normalvariate(s_k, s_k / 2), case.s_q)) for _ in lengths]
    return [0 if draw.random() < 0.5 else length for length in lengths] if case.empty else lengths


def _small(shape, generator):
    return torch.randn(shape, generator=generator).div_(10).clamp_(-1, 1)


def _on(value, device, gaps, filler):
    """`value` on the device; with gaps, a view into a larger tensor, whose rest is `filler`."""
    return with_gaps(value, filler, device) if gaps else value.to(device)


def with_gaps(value, filler, device="cpu"):
    """The same values in a view whose neighbours, but for the last dimension's, lie further apart, `filler` between."""
    base = torch.full([*(size + 1 for size in value.shape[:-1]), value.shape[-1] + 128], filler, dtype=value.dtype)
    window = tuple(slice(size) for size in value.shape)
    base[window] = value
    return base.to(device)[window]
