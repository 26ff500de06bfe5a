"""MLA: one Multi-head Latent Attention layer over packed requests and a paged latent cache."""

from __future__ import annotations

import dataclasses
import os
import weakref

import torch
from torch import nn

from ntops_mla import checkpoint, ops
from ntops_mla.cache import DTYPES, Step, check_device, check_dtype
from ntops_mla.config import MLAConfig
from ntops_mla.modules.linear import linear, linear_with_room
from ntops_mla.modules.rope_rows import permute_rope_rows
from ntops_mla.ops._attention import merge
from ntops_mla.plan import AbsorbedGroup, Plan


class MLA(nn.Module):
    """Multi-head Latent Attention: hidden states of all requests, packed, in; attention output out.

    kv_a = x W_kv_a;  cache <- [rms_norm(kv_a[:C]), rope(kv_a[C:])], quantised where the cache is
    q = x W_q, or rms_norm(x W_q_a) W_q_b; the last R columns of every head rotated
    absorbed form: o = mla_decode(q_nope W_UK, q_pe, cache) W_UV
    expanded form: k, v = cache W_kv_b;  o = mla_prefill(q, k, v)
    out = o W_o;  the form is chosen per request, by cost

    Parameters bear Hugging Face's names: q_proj, or q_a_proj, q_a_layernorm, q_b_proj; kv_a_proj_with_mqa,
    kv_a_layernorm, kv_b_proj, o_proj. `state_dict` and `load_state_dict` keep the checkpoint's order of RoPE rows, also
    where `cfg.rope_interleave` is False; the parameters themselves are in pairs. Inference only: no gradient is
    recorded.

    The absorbed form works on copies derived from kv_b_proj.weight. They follow a new parameter, `load_state_dict`,
    `.to` and every change in place that torch counts; a write past that count, through `weight.data`, numpy or DLPack,
    or in place in an inference tensor, is not seen: call `weights_changed()` after it.

    Source: arXiv 2405.04434, section 2.1; transformers models/deepseek_v3; deepseek-ai/DeepSeek-V3 inference/model.py.
    """

    def __init__(
        self,
        cfg: MLAConfig,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cfg, MLAConfig):
            raise TypeError(f"cfg must be an MLAConfig, got {type(cfg).__name__}")
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise TypeError(f"layer_idx must be an int, got {layer_idx!r}")
        if layer_idx < 0:
            raise ValueError(f"layer_idx must not be negative, got {layer_idx}")
        check_device(device)
        check_dtype(torch.get_default_dtype() if dtype is None else dtype)
        self.cfg = cfg
        self.layer_idx = layer_idx
        made = {"device": device, "dtype": dtype}
        bias = cfg.attention_bias
        heads = cfg.num_heads
        if cfg.q_lora_rank is None:
            self.q_proj = nn.Linear(cfg.hidden_size, heads * cfg.qk_head_dim, bias=False, **made)
        else:
            self.q_a_proj = nn.Linear(cfg.hidden_size, cfg.q_lora_rank, bias=bias, **made)
            self.q_a_layernorm = nn.RMSNorm(cfg.q_lora_rank, eps=cfg.rms_norm_eps, **made)
            self.q_b_proj = nn.Linear(cfg.q_lora_rank, heads * cfg.qk_head_dim, bias=False, **made)
        self.kv_a_proj_with_mqa = nn.Linear(cfg.hidden_size, cfg.latent_dim, bias=bias, **made)
        self.kv_a_layernorm = nn.RMSNorm(cfg.kv_lora_rank, eps=cfg.rms_norm_eps, **made)
        self.kv_b_proj = nn.Linear(
            cfg.kv_lora_rank, heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), bias=False, **made
        )
        self.o_proj = nn.Linear(heads * cfg.v_head_dim, cfg.hidden_size, bias=bias, **made)
        # (key, W_UK, W_UV): contiguous copies of kv_b_proj's halves, made when first needed and when the weight has
        # changed.
        self._absorption: tuple | None = None
        self._absorptions_made = 0
        if not cfg.rope_interleave:
            self._register_state_dict_hook(_to_checkpoint_order)
        self._join_projections()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        layer: int = 0,
        *,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MLA:
        """Load one layer's attention out of a Hugging Face directory (sharded or not, bfloat16 or FP8 with scales).

        layer: the checkpoint's; layer_idx: the cache's, the same unless given. dtype: the checkpoint's unless given
        (FP8: bfloat16). Raises FileNotFoundError (directory, config.json, shard), KeyError (tensor), TypeError (dtype),
        ValueError (layer, config, damaged file, a tensor of the attention that MLA does not have).
        """
        check_device(device)
        if dtype is not None:
            check_dtype(dtype)
        cfg = MLAConfig.from_pretrained(path)
        weights = checkpoint.load_attention(path, layer, dtype)
        if dtype is None and "kv_b_proj.weight" in weights:
            dtype = weights["kv_b_proj.weight"].dtype
        mla = cls(cfg, layer if layer_idx is None else layer_idx, device="meta", dtype=dtype)
        mla.to_empty(device=torch.get_default_device() if device is None else device)
        checkpoint.check_weights(weights, mla, path, layer)
        mla.load_state_dict(weights)
        return mla.requires_grad_(False)

    @classmethod
    def from_module(cls, attention: nn.Module) -> MLA:
        """Build from a transformers attention (DeepseekV2Attention, DeepseekV3Attention, ...), sharing its weights.

        Where the module rotates halves, q and kv_a are permuted copies. Raises ValueError where it is not an MLA, or
        one that computes more than this class: other parameters than ours (but an indexer's, which is left out),
        factors on q or kv, a model type that `MLAConfig.from_dict` refuses.
        """
        if not isinstance(attention, nn.Module) or not hasattr(attention, "kv_a_proj_with_mqa"):
            raise ValueError(f"attention must be a transformers MLA attention, got {type(attention).__name__}")
        kind = type(attention).__name__
        if not hasattr(getattr(attention, "config", None), "to_dict"):
            raise ValueError(f"attention must have its model's config, but {kind}.config has no to_dict")
        cfg = MLAConfig.from_dict(attention.config.to_dict())
        factors = sorted(name for name in vars(attention) if name.startswith("mla_scale_"))
        if factors:
            raise ValueError(f"attention {kind} multiplies q or kv by factors that MLA does not have: {_list(factors)}")
        norm = getattr(attention, "kv_a_layernorm", None)
        cfg = dataclasses.replace(cfg, rms_norm_eps=getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
        scale = getattr(attention, "scaling", cfg.softmax_scale)
        if abs(scale - cfg.softmax_scale) > 1e-6:
            raise ValueError(f"attention scales its scores by {scale}, its config says {cfg.softmax_scale}")
        mla = cls(cfg, attention.layer_idx or 0, device="meta")
        theirs = _own_parameters(attention, mla)
        for name, child in mla.named_children():
            for key in dict(child.named_parameters()):
                parameter = theirs[f"{name}.{key}"]
                permuted = None if cfg.rope_interleave else permute_rope_rows(cfg, f"{name}.{key}", parameter.detach())
                setattr(child, key, parameter if permuted is None else nn.Parameter(permuted, requires_grad=False))
        return mla.train(attention.training)

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, step: Step, form: str | None = None) -> torch.Tensor:
        """Attend causally, each request over its own history; write the new tokens into the step's cache.

        hidden_states: `[T, hidden_size]`, the requests' new tokens packed in the step's order, of the module's dtype
        and device. form: None (per request by cost), "absorbed" or "expanded". Returns `[T, hidden_size]`. Raises
        ValueError or TypeError that names the argument, with nothing written; a failed call leaves the step usable.
        """
        self._check(hidden_states, step)
        plan = step.plan(form)
        cfg = self.cfg
        q, kv_a = self._project(hidden_states)
        storage = step.cache.storage[self.layer_idx]
        weight = self.kv_a_layernorm.weight
        q_nope, q_pe = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        append = ops.latent_append if step.cache.kv_format is None else ops.latent_append_fp8
        # q is ours: its RoPE columns are rotated where they are.
        append(kv_a, weight, step.cos, step.sin, step.slots, storage, cfg.rms_norm_eps, q_pe)
        out = self._attend(q, q_nope, q_pe, step, plan)
        out = linear(out.reshape(len(out), -1), self.o_proj.weight, self.o_proj.bias)
        step.commit(self.layer_idx)
        return out

    def _check(self, hidden_states: torch.Tensor, step: Step) -> None:
        if not isinstance(step, Step):
            raise TypeError(f"step must be a Step, made by LatentCache.step, got {type(step).__name__}")
        if not isinstance(hidden_states, torch.Tensor):
            raise TypeError(f"hidden_states must be a tensor [T, hidden_size], got {type(hidden_states).__name__}")
        cfg, weight, cache = self.cfg, self.o_proj.weight, step.cache
        if hidden_states.dim() != 2 or hidden_states.shape[1] != cfg.hidden_size:
            raise ValueError(f"hidden_states must be [T, {cfg.hidden_size}], got shape {list(hidden_states.shape)}")
        if hidden_states.shape[0] != step.num_tokens:
            raise ValueError(
                f"hidden_states must have the step's {step.num_tokens} tokens (sum of its lengths), "
                f"got {hidden_states.shape[0]}"
            )
        if hidden_states.dtype != weight.dtype:
            raise TypeError(f"hidden_states must be of the module's dtype {weight.dtype}, got {hidden_states.dtype}")
        if hidden_states.device != weight.device:
            raise ValueError(
                f"hidden_states must be on the module's device {weight.device}, got {hidden_states.device}"
            )
        if cache.dtype != weight.dtype or cache.device != weight.device:
            raise ValueError(
                f"step's cache must be of the module's dtype and device {weight.dtype} on {weight.device}, "
                f"got {cache.dtype} on {cache.device}"
            )
        if cache.cfg is not cfg:
            for name in ("kv_lora_rank", "qk_rope_head_dim", "rope_theta", "rope_scaling"):
                ours, theirs = getattr(cfg, name), getattr(cache.cfg, name)
                if ours != theirs:
                    raise ValueError(f"step's cache was made for {name} {theirs}, the module has {ours}")
        step.check(self.layer_idx, self)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[T, H, Dqk]`, not yet rotated, and raw kv_a `[T, C + R]`."""
        cfg = self.cfg
        first = self.q_proj if cfg.q_lora_rank is None else self.q_a_proj
        second = self.kv_a_proj_with_mqa
        if _follows(first.weight, second.weight) and (first.bias is None) == (second.bias is None):
            # One product for both: x is read once.
            rows = first.out_features + second.out_features
            weight = first.weight.as_strided((rows, cfg.hidden_size), (cfg.hidden_size, 1))
            bias = None if first.bias is None else torch.cat([first.bias, second.bias])
            q, kv_a = linear(x, weight, bias).split([first.out_features, second.out_features], -1)
        else:
            q, kv_a = linear(x, first.weight, first.bias), linear(x, second.weight, second.bias)
        if cfg.q_lora_rank is not None:
            q = linear(ops.rms_norm(q, self.q_a_layernorm.weight, cfg.rms_norm_eps), self.q_b_proj.weight)
        return q.unflatten(-1, (cfg.num_heads, cfg.qk_head_dim)), kv_a

    def _attend(self, q, q_nope, q_pe, step: Step, plan: Plan) -> torch.Tensor:
        """`[T, H, Dv]` of all tokens, by the plan."""
        cfg = self.cfg
        if plan.expanded is None and len(plan.absorbed) == 1:
            return self._absorbed(q_nope, q_pe, step, plan.absorbed[0])
        if not plan.absorbed:
            return self._expanded(q, step, plan)
        out = torch.empty(len(q), cfg.num_heads, cfg.v_head_dim, dtype=q.dtype, device=q.device)
        for group in plan.absorbed:
            out[group.tokens] = self._absorbed(q_nope[group.tokens], q_pe[group.tokens], step, group)
        if plan.expanded is not None:
            if isinstance(plan.expanded, slice):
                self._expanded(q[plan.expanded], step, plan, out[plan.expanded])
            else:
                out[plan.expanded] = self._expanded(q[plan.expanded], step, plan)
        return out

    def _absorbed(self, q_nope, q_pe, step: Step, group: AbsorbedGroup) -> torch.Tensor:
        """q_nope `[B * s_q, H, Dnope]`, q_pe `[B * s_q, H, R]` -> `[B * s_q, H, Dv]`."""
        w_uk, w_uv = self._absorption_weights()
        cache, layer = step.cache, self.layer_idx
        # [H, B * s_q, Dnope] x [H, Dnope, C]
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        queries = q_latent.unflatten(0, (-1, group.s_q)), q_pe.unflatten(0, (-1, group.s_q))
        requests = group.block_table, group.seq_lens, self.cfg.softmax_scale
        schedule = group.schedule(self.cfg.num_heads, cache.page_size)
        if cache.kv_format is None:
            halves = cache.kv_cache[layer], cache.pe_cache[layer]
            out, _ = ops.mla_decode(*queries, *halves, *requests, schedule=schedule)
        else:
            out, _ = ops.mla_decode_fp8(*queries, cache.storage[layer], *requests, schedule=schedule)
        # [H, B * s_q, C] x [H, C, Dv]
        values = out.flatten(0, 1).transpose(0, 1)
        if values.device.type == "cpu" or torch.compiler.is_compiling():
            return torch.bmm(values, w_uv).transpose(0, 1)
        # Written as o_proj reads it, which saves a copy. On a CPU it does not: bmm itself would make one.
        out = torch.empty(len(q_nope), *w_uv.shape[::2], dtype=q_nope.dtype, device=q_nope.device)
        torch.bmm(values, w_uv, out=out.transpose(0, 1))
        return out

    def _expanded(self, q, step: Step, plan: Plan, out: torch.Tensor | None = None) -> torch.Tensor:
        """q `[Te, H, Dqk]`, rotated -> `[Te, H, Dv]`, in `out` where there is one, chunk by chunk; pieces of a request
        are merged by lse."""
        cfg = self.cfg
        # One call for all: what it makes is the result.
        whole = out is None and len(plan.chunks) == 1 and plan.chunks[0].one_call(cfg.num_heads)
        if out is None and not whole:
            out = torch.empty(len(q), cfg.num_heads, cfg.v_head_dim, dtype=q.dtype, device=q.device)
        merged = lse = None
        if any(chunk.merged for chunk in plan.chunks):
            merged = torch.zeros(out.shape, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
            lse = torch.full((len(out), cfg.num_heads), float("-inf"), dtype=torch.float32, device=out.device)
        for chunk in plan.chunks:
            # [Tk, C + R]
            rows = step.cache.rows(chunk.slots, self.layer_idx)
            latent, pe = rows.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
            for first in range(0, cfg.num_heads, chunk.heads):
                heads = slice(first, min(first + chunk.heads, cfg.num_heads))
                k, v = self._expand(latent, pe, heads)
                for segment in chunk.segments:
                    at = segment.rows, heads
                    bounds = segment.cu_seqlens_q, segment.cu_seqlens_k
                    part, part_lse = ops.mla_prefill(
                        q[at], k, v, *bounds, cfg.softmax_scale, segment.causal, want_lse=chunk.merged
                    )
                    if whole:
                        return part
                    if chunk.merged:
                        part, lse[at] = merge(merged[at], lse[at], part, part_lse.transpose(0, 1))
                        merged[at] = part
                    out[at] = part  # of a request in pieces, the last one writes the final value
        return out

    def _expand(self, latent: torch.Tensor, pe: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """latent `[Tk, C]`, pe `[Tk, R]` -> k `[Tk, heads, Dqk]`, v `[Tk, heads, Dv]` of some heads."""
        cfg = self.cfg
        width = cfg.qk_nope_head_dim + cfg.v_head_dim
        weight = self.kv_b_proj.weight[heads.start * width : heads.stop * width]
        # The room is for values as wide as the keys, which PyTorch's kernel wants: see ops/_attention.py.
        kv = linear_with_room(latent, weight, cfg.qk_rope_head_dim).unflatten(-1, (-1, width))
        k_nope, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
        return torch.cat([k_nope, pe[:, None].expand(-1, heads.stop - heads.start, -1)], -1), v

    def weights_changed(self) -> None:
        """Drop what is derived from the weights: call it after a write that torch does not count (see the class)."""
        self._absorption = None

    def weights_mark(self) -> tuple:
        """Equal as long as work that was captured as a graph reads the weights, and the copies of them, that are."""
        derived = self._absorptions_made, self._absorption is None
        return *derived, *((p.data_ptr(), _version(p)) for p in self.parameters())

    def _absorption_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK `[H, Dnope, C]` and W_UV `[H, C, Dv]`, contiguous: on views of kv_b_proj bmm is up to 9 times slower."""
        weight = self.kv_b_proj.weight
        # The parameter itself too: an allocator gives the address of a weight that is gone to the next one.
        key = (weight.data_ptr(), _version(weight), weight.device, weight.dtype)
        if self._absorption is None or self._absorption[0]() is not weight or self._absorption[1] != key:
            cfg = self.cfg
            per_head = weight.detach().view(cfg.num_heads, cfg.qk_nope_head_dim + cfg.v_head_dim, cfg.kv_lora_rank)
            w_uk, w_uv = per_head.split([cfg.qk_nope_head_dim, cfg.v_head_dim], 1)
            self._absorptions_made += 1
            self._absorption = (weakref.ref(weight), key, w_uk.contiguous(), w_uv.transpose(1, 2).contiguous())
        return self._absorption[2:]

    def __getstate__(self) -> dict:
        # Copies and files need no absorption weights: they are made anew.
        return {**self.__dict__, "_absorption": None}

    def _join_projections(self) -> None:
        """Lay q_proj (or q_a_proj) and kv_a_proj_with_mqa behind each other in one storage: one product serves both."""
        first = self.q_proj if self.cfg.q_lora_rank is None else self.q_a_proj
        second = self.kv_a_proj_with_mqa
        if first.weight.is_meta or _follows(first.weight, second.weight):
            return
        both = torch.cat([first.weight.detach(), second.weight.detach()])
        first.weight.data, second.weight.data = both[: first.out_features], both[first.out_features :]

    def _apply(self, fn, recurse=True):
        # .to(), .cuda(), .to_empty() move every parameter by itself.
        super()._apply(fn, recurse)
        self.weights_changed()
        self._join_projections()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Called with this module's entries before its children read theirs.
        if not self.cfg.rope_interleave:
            shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
            for key in [key for key in state_dict if key.startswith(prefix)]:
                name, value = key.removeprefix(prefix), state_dict[key]
                if name not in shapes or getattr(value, "shape", None) != shapes[name]:
                    continue  # torch's own error names it
                permuted = permute_rope_rows(self.cfg, name, value)
                if permuted is not None:
                    state_dict[key] = permuted
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.weights_changed()  # inference tensors do not count their versions

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}"


def _own_parameters(attention: nn.Module, mla: MLA) -> dict[str, nn.Parameter]:
    """The attention's parameters by name: ours, in our shapes, and no others but an indexer's; else ValueError."""
    kind = type(attention).__name__
    theirs = {name: value for name, value in attention.named_parameters() if not name.startswith("indexer.")}
    ours = dict(mla.named_parameters())
    if missing := [name for name in ours if name not in theirs]:
        raise ValueError(f"attention {kind} lacks parameters that its config says it has: {_list(missing)}")
    if more := [name for name in theirs if name not in ours]:
        raise ValueError(f"attention {kind} has parameters that MLA does not have: {_list(more)}")
    for name, value in theirs.items():
        if value.shape != ours[name].shape or value.dtype not in DTYPES:
            raise ValueError(
                f"attention {kind}: {name} must be {list(ours[name].shape)} by its config, of "
                f"{_list(map(str, DTYPES))}, got {list(value.shape)} of {value.dtype}"
            )
    return theirs


def _version(weight: torch.Tensor) -> int:
    """Changes in place that torch has counted; it counts none of an inference tensor."""
    return 0 if weight.is_inference() else weight._version


def _list(names) -> str:
    return ", ".join(names)


def _follows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `b`'s rows lie behind `a`'s in one storage."""
    return (
        a.dtype == b.dtype
        and a.is_contiguous()
        and b.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() == a.storage_offset() + a.numel()
    )


def _to_checkpoint_order(mla: MLA, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Give RoPE's rows back in halves: what `load_state_dict` took, `state_dict` returns."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        permuted = permute_rope_rows(mla.cfg, key.removeprefix(prefix), state_dict[key], back=True)
        if permuted is not None:
            state_dict[key] = permuted
