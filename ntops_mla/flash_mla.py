"""FlashMLA's functions over the ops: `from ntops_mla import flash_mla` in the place of `import flash_mla`.

The dense half of deepseek-ai/FlashMLA, on every platform and the CPU, forward only. What is not here yet, the fp8 cache
and the sparse functions, raises NotImplementedError. Element types, page sizes and strides that FlashMLA refuses may
work: they are the ops'.
"""

from __future__ import annotations

import dataclasses
import numbers

import torch

from ntops_mla.ops import _check, mla_decode, mla_prefill

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

_FP8 = "the fp8 cache of 656 bytes a token is not implemented yet: pass a bfloat16, float16 or float32 cache"
_SPARSE = "sparse attention (DSA) is not implemented yet: only dense attention is"


@dataclasses.dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata` returns and callers pass along; the split of the work itself is the op's.

    The op reads the lengths anew in every call, so that nothing here grows stale when they change: it only remembers
    what it was made or first used for, and a call of other sizes is refused, as FlashMLA refuses it.
    """

    @dataclasses.dataclass
    class Config:
        """The sizes of the first call."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool

    have_initialized: bool = False
    config: Config | None = None
    # FlashMLA keeps its plan here; there is none to keep.
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None
    # What the old form of get_mla_metadata was told; None: nothing.
    _batch: int | None = dataclasses.field(default=None, repr=False)
    _rows_per_head_k: int | None = dataclasses.field(default=None, repr=False)
    _heads_q: int | None = dataclasses.field(default=None, repr=False)


# The arguments that decide what a FlashMLASchedMeta serves, by the names of Config.
_MEANING = {
    "b": "the batch size",
    "s_q": "the query tokens of a request",
    "h_q": "the query heads",
    "page_block_size": "the page size of k_cache",
    "h_k": "the heads of k_cache",
    "causal": "causal",
}


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_heads_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_q_tokens_per_head_k: int | None = None,
) -> tuple[FlashMLASchedMeta, None]:
    """Make the two objects that `flash_mla_with_kvcache` wants as tile_scheduler_metadata and num_splits.

    No argument is needed. The old forms' are taken and checked against the call that follows: cache_seqlens int32
    `[B]`; num_heads_per_head_k (later num_q_tokens_per_head_k) = s_q * H // num_heads_k; num_heads_k = 1; num_heads_q =
    H. Nothing is computed and no length is read.

    Returns (FlashMLASchedMeta, None). Raises TypeError or ValueError that names the argument, NotImplementedError for
    is_fp8_kvcache and topk. Source: deepseek-ai/FlashMLA, flash_mla_interface.py, and its first release.
    """
    op = "get_mla_metadata"
    if is_fp8_kvcache:
        raise NotImplementedError(f"{op}: is_fp8_kvcache: {_FP8}")
    if topk is not None:
        raise NotImplementedError(f"{op}: topk: {_SPARSE}")
    meta = FlashMLASchedMeta()
    if cache_seqlens is not None:
        _check_lengths(op, cache_seqlens)
        meta._batch = cache_seqlens.shape[0]
    if num_heads_per_head_k is not None and num_q_tokens_per_head_k is not None:
        raise ValueError(f"{op}: num_heads_per_head_k and num_q_tokens_per_head_k are one argument, got both")
    for name, value in (
        ("num_heads_per_head_k", num_heads_per_head_k),
        ("num_q_tokens_per_head_k", num_q_tokens_per_head_k),
        ("num_heads_k", num_heads_k),
        ("num_heads_q", num_heads_q),
    ):
        if value is not None:
            _count(op, name, value, 1)
    if num_heads_k is not None and num_heads_k != 1:
        raise ValueError(f"{op}: num_heads_k must be 1, the latent that all heads share, got {num_heads_k}")
    meta._rows_per_head_k = num_heads_per_head_k if num_heads_per_head_k is not None else num_q_tokens_per_head_k
    meta._heads_q = num_heads_q
    return meta, None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over each request's paged latents, whose first head_dim_v columns are the value.

    s[j] = softmax_scale q . k[j];  out = softmax(s) k[:, :head_dim_v];  lse = log sum exp(s)

    q: `[B, s_q, H, 576]`. k_cache: `[pages, page_size, 1, 576]`, page_size a power of two. block_table: int32 `[B,
    max_pages]`; entries past a request's pages and slots past its length are never read. cache_seqlens: int32 `[B]`,
    with the new tokens. head_dim_v: 512 (q and k_cache of 288 columns and 256 work too). Any strides.
    tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned; one pair serves all calls of one batch size,
    s_q, H, page size and causal, and lengths may change between them. softmax_scale: None, 1 / sqrt(576). causal: row i
    of s_q sees the first cache_seqlens - s_q + 1 + i keys, otherwise all of them.

    Returns out `[B, s_q, H, 512]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[B, H,
    s_q]`, natural logarithm; neither ever requires grad. A row that sees no key: out 0, lse +inf. Raises TypeError or
    ValueError that names the argument, NotImplementedError for is_fp8_kvcache and what belongs to sparse attention
    (indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length). Source:
    deepseek-ai/FlashMLA, flash_mla_interface.py.
    """
    op = "flash_mla_with_kvcache"
    for name, value in (
        ("indices", indices),
        ("attn_sink", attn_sink),
        ("extra_k_cache", extra_k_cache),
        ("extra_indices_in_kvcache", extra_indices_in_kvcache),
        ("topk_length", topk_length),
        ("extra_topk_length", extra_topk_length),
    ):
        if value is not None:
            raise NotImplementedError(f"{op}: {name}: {_SPARSE}")
    _check.flag(op, "is_fp8_kvcache", is_fp8_kvcache)
    if is_fp8_kvcache:
        raise NotImplementedError(f"{op}: is_fp8_kvcache: {_FP8}")
    _check_decode(op, q, k_cache, block_table, cache_seqlens, head_dim_v, causal)
    scale = _scale(op, softmax_scale, q)
    config = FlashMLASchedMeta.Config(
        q.shape[0], q.shape[1], q.shape[2], k_cache.shape[1], k_cache.shape[2], bool(causal)
    )
    _check_meta(op, tile_scheduler_metadata, num_splits, config)
    latents = k_cache[:, :, 0]
    with torch.no_grad():
        try:
            out, lse = mla_decode(
                q[..., :head_dim_v],
                q[..., head_dim_v:],
                latents[..., :head_dim_v],
                latents[..., head_dim_v:],
                block_table,
                cache_seqlens,
                scale,
                config.causal,
            )
        except ValueError as error:
            raise _renamed(error, "mla_decode", op, {"seq_lens": "cache_seqlens"}) from error
        # On the device: the op merges parts, so that it says -inf where FlashMLA says +inf.
        lse.masked_fill_(lse == float("-inf"), float("inf"))
    # Only what has run counts as used: a failed call leaves its metadata as it was.
    tile_scheduler_metadata.config = config
    tile_scheduler_metadata.have_initialized = True
    return out, lse


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raise NotImplementedError: sparse prefill is not there yet.

    q: `[s_q, H, 576]`, kv: `[s_kv, 1, 576]`, indices: int32 `[s_q, 1, topk]` -> out `[s_q, H, 512]`, max_logits and lse
    float32 `[s_q, H]`. Source: deepseek-ai/FlashMLA, flash_mla_interface.py.
    """
    raise NotImplementedError(f"flash_mla_sparse_fwd: {_SPARSE}")


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each request of a packed batch, every head with its own keys and values; forward only.

    out[t, h] = softmax_j(softmax_scale q[t, h] . k[j, h]) v[j, h];  lse[t, h] = log sum_j exp(softmax_scale q[t, h] .
    k[j, h])

    q: `[T, H, 192]`. k: `[Tk, Hk, 192]`, v: `[Tk, Hk, 128]`, Hk dividing H: head h reads k and v of h // (H / Hk), and
    fewer than H are copied out to H. Other widths run in PyTorch. cu_seqlens_qo, cu_seqlens_kv: int32 `[B + 1]`, rising
    from 0 to T and Tk. max_seqlen_qo, max_seqlen_kv: at least the longest request; only what needs no look at the
    device is checked of them. dropout_p: 0. softmax_scale: None, 1 / sqrt(192). causal: the diagonal is aligned at the
    end of each request. deterministic: False (every run repeats bit for bit anyway). is_varlen: False says that all
    requests are of one length; the cu_seqlens are read all the same.

    Returns out `[T, H, 128]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[T, H]`,
    natural logarithm, T contiguous. A row that sees no key: out 0, lse -inf: here FlashMLA says -inf, other than in
    `flash_mla_with_kvcache`. Raises TypeError or ValueError that names the argument, NotImplementedError for dropout,
    for deterministic, and for an input that requires grad in grad mode. Source: deepseek-ai/FlashMLA,
    flash_mla_interface.py.
    """
    op = "flash_attn_varlen_func"
    _check.number(op, "dropout_p", dropout_p)
    for name, value in (("causal", causal), ("deterministic", deterministic), ("is_varlen", is_varlen)):
        _check.flag(op, name, value)
    if dropout_p != 0:
        raise NotImplementedError(f"{op}: dropout_p: dropout is not implemented, FlashMLA has none either: pass 0")
    if deterministic:
        raise NotImplementedError(
            f"{op}: deterministic concerns the backward pass, which is not implemented; the forward pass repeats bit "
            "for bit without it: pass False"
        )
    _check_prefill(op, q, k, v, cu_seqlens_qo, cu_seqlens_kv)
    for name, value, rows, total in (
        ("max_seqlen_qo", max_seqlen_qo, "q", q.shape[0]),
        ("max_seqlen_kv", max_seqlen_kv, "k", k.shape[0]),
    ):
        _check_longest(op, name, value, rows, total, cu_seqlens_qo.shape[0] - 1, is_varlen)
    scale = _scale(op, softmax_scale, q)
    if torch.is_grad_enabled():
        for name, value in (("q", q), ("k", k), ("v", v)):
            if value.requires_grad:
                raise NotImplementedError(
                    f"{op}: {name} requires grad, but only the forward pass is implemented: call it under "
                    "torch.no_grad() or with detached tensors"
                )
    if k.shape[1] != q.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    try:
        out, lse = mla_prefill(q, k, v, cu_seqlens_qo, cu_seqlens_kv, scale, causal)
    except ValueError as error:
        names = {"cu_seqlens_q ": "cu_seqlens_qo ", "cu_seqlens_k ": "cu_seqlens_kv "}
        raise _renamed(error, "mla_prefill", op, names) from error
    return out, lse.T


def _check_decode(op, q, k_cache, block_table, cache_seqlens, head_dim_v, causal):
    _check.tensor(op, "q", q, "[B, s_q, H, 576]", 4)
    _check.dtype(op, "q", q)
    _check.tensor(op, "k_cache", k_cache, "[pages, page_size, 1, 576]", 4)
    if k_cache.shape[2] != 1:
        raise ValueError(
            f"{op}: k_cache must be [pages, page_size, 1, {q.shape[3]}], one latent that all heads share (h_kv 1), "
            f"got h_kv {k_cache.shape[2]} in shape {list(k_cache.shape)}"
        )
    _check.size(op, "k_cache", k_cache, 3, q.shape[3], "[pages, page_size, 1, 576]")
    _check.page_size(op, "k_cache", k_cache.shape[1])
    _count(op, "head_dim_v", head_dim_v, 1)
    if head_dim_v >= q.shape[3]:
        raise ValueError(
            f"{op}: head_dim_v must be below the {q.shape[3]} columns of q and k_cache (512 of 576, 256 of 288), "
            f"got {head_dim_v}"
        )
    for name, value, shape, dims in (
        ("block_table", block_table, "[B, max_pages]", 2),
        ("cache_seqlens", cache_seqlens, "[B]", 1),
    ):
        if value is None:
            raise TypeError(f"{op}: {name} must be an int32 tensor {shape}; None is for sparse attention only")
        _check.tensor(op, name, value, shape, dims)
        _check.dtype(op, name, value, (torch.int32,))
        _check.size(op, name, value, 0, q.shape[0], shape)
    _check.same(op, "q", q, ("k_cache", k_cache))
    _check.same_device(op, "q", q, ("block_table", block_table), ("cache_seqlens", cache_seqlens))
    _check.flag(op, "causal", causal)


def _check_meta(op, meta, num_splits, config):
    """`meta` comes from here and belongs to a call of these sizes."""
    fresh = "get_mla_metadata() makes a new one"
    if not isinstance(meta, FlashMLASchedMeta):
        raise TypeError(
            f"{op}: tile_scheduler_metadata must be what ntops_mla.flash_mla.get_mla_metadata returned, a "
            f"FlashMLASchedMeta, got {type(meta).__module__}.{type(meta).__qualname__}"
        )
    if num_splits is not None:
        raise TypeError(
            f"{op}: num_splits must be None, as ntops_mla.flash_mla.get_mla_metadata returned it, got "
            f"{type(num_splits).__name__}"
        )
    if meta._batch is not None and meta._batch != config.b:
        raise ValueError(
            f"{op}: tile_scheduler_metadata was made for cache_seqlens of {meta._batch} requests, got {config.b}; "
            f"{fresh}"
        )
    if meta._heads_q is not None and meta._heads_q != config.h_q:
        raise ValueError(
            f"{op}: tile_scheduler_metadata was made for num_heads_q {meta._heads_q}, got q of {config.h_q} heads; "
            f"{fresh}"
        )
    if meta._rows_per_head_k is not None and meta._rows_per_head_k != config.s_q * config.h_q:
        raise ValueError(
            f"{op}: tile_scheduler_metadata was made for {meta._rows_per_head_k} query rows per head of k_cache, got "
            f"s_q {config.s_q} times {config.h_q} heads; {fresh}"
        )
    if meta.config is None or meta.config == config:
        return
    for name, meaning in _MEANING.items():
        before, now = getattr(meta.config, name), getattr(config, name)
        if before != now:
            raise ValueError(
                f"{op}: tile_scheduler_metadata was used with another size before: {meaning} was {before}, got {now}; "
                f"{fresh}"
            )


def _check_prefill(op, q, k, v, cu_seqlens_qo, cu_seqlens_kv):
    _check.tensor(op, "q", q, "[T, H, 192]", 3)
    _check.dtype(op, "q", q)
    _check.tensor(op, "k", k, "[Tk, Hk, 192]", 3)
    _check.size(op, "k", k, 2, q.shape[2], "[Tk, Hk, 192]")
    if k.shape[1] != q.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0):
        raise ValueError(
            f"{op}: k must be [Tk, Hk, {q.shape[2]}] with Hk dividing q's {q.shape[1]} heads, got shape {list(k.shape)}"
        )
    _check.tensor(op, "v", v, "[Tk, Hk, 128]", 3)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: v must be [Tk, Hk, 128] with k's {list(k.shape[:2])}, got shape {list(v.shape)}")
    _check.same(op, "q", q, ("k", k), ("v", v))
    _check.cu_seqlens(op, q, ("cu_seqlens_qo", cu_seqlens_qo), ("cu_seqlens_kv", cu_seqlens_kv))


def _check_longest(op, name, longest, rows, total, batch, is_varlen):
    """What can be said of max_seqlen without the lengths, which lie on the device."""
    _count(op, name, longest, 0)
    if longest * batch < total:
        raise ValueError(
            f"{op}: {name} must be at least the longest request, got {longest} for {batch} requests and "
            f"{total} rows of {rows}"
        )
    if not is_varlen and total % max(batch, 1) != 0:
        raise ValueError(
            f"{op}: is_varlen must be True where requests differ in length, got False for {batch} requests and "
            f"{total} rows of {rows}"
        )


def _check_lengths(op, cache_seqlens):
    _check.tensor(op, "cache_seqlens", cache_seqlens, "[B]", 1)
    _check.dtype(op, "cache_seqlens", cache_seqlens, (torch.int32,))


def _count(op, name, value, least):
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def _scale(op, softmax_scale, q):
    if softmax_scale is None:
        return max(q.shape[-1], 1) ** -0.5
    _check.number(op, "softmax_scale", softmax_scale)
    return softmax_scale


def _renamed(error, inner, op, names):
    """The op's complaint about a value, with FlashMLA's names of the arguments."""
    text = str(error).replace(f"{inner}: ", f"{op}: ")
    for name, ours in names.items():
        text = text.replace(name, ours)
    return ValueError(text)
