"""One layer's attention weights out of a Hugging Face directory of safetensors, sharded or not, FP8 dequantised."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ntops_mla.config import read_config_json, text_config

INDEX = "model.safetensors.index.json"

# Every MLA attention has this tensor; what stands before `layers` differs (model., language_model.model., ...).
_LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?layers\.(?P<layer>\d+)\.self_attn\.)kv_a_proj_with_mqa\.weight$")
_SCALE = "_scale_inv"
# Tensors beside the attention's own that it can be computed without: sparse selection, and tables made anew.
_LEFT_OUT = ("indexer.", "rotary_emb.")
_FP8 = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2") if hasattr(torch, name)
)


def layers(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The layers whose attention the directory holds, rising. Raises FileNotFoundError, ValueError."""
    return tuple(sorted(_attentions(_weight_map(path))))


def load_attention(
    path: str | os.PathLike[str], layer: int, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The layer's attention tensors on the CPU, keyed as in the attention module ("q_proj.weight", ...).

    dtype: cast to it; None keeps the checkpoint's (FP8 weights become bfloat16). An FP8 weight is multiplied by its
    `weight_scale_inv`, one float32 per block (quantization_config.weight_block_size, 128 x 128 by default).
    Raises FileNotFoundError (directory, shard), ValueError (layer, damaged file, block size), KeyError (scale).
    """
    weight_map = _weight_map(path)
    prefixes = _attentions(weight_map)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an int, got {layer!r}")
    if layer not in prefixes:
        held = ", ".join(map(str, sorted(prefixes))) or "none"
        raise ValueError(f"layer {layer} does not exist in {os.fspath(path)!r}; its layers with MLA: {held}")
    prefix = prefixes[layer]
    names = [name for name in weight_map if name.startswith(prefix)]
    tensors = _read(path, {name: weight_map[name] for name in names})
    weights = {}
    for name, value in tensors.items():
        if name.endswith(_SCALE):
            continue
        if value.dtype in _FP8:
            scale = tensors.get(name + _SCALE)
            if scale is None:
                raise KeyError(f"{name} is FP8 but the checkpoint has no {name + _SCALE}")
            value = dequantise(value, scale, _block_size(path), torch.bfloat16 if dtype is None else dtype)
        weights[name.removeprefix(prefix)] = value if dtype is None else value.to(dtype)
    return weights


def dequantise(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """weight[i, j] * scale_inv[i // block[0], j // block[1]] in float32, rounded once to `dtype`.

    weight: FP8 `[N, K]`; scale_inv: float32 `[ceil(N / block[0]), ceil(K / block[1])]`. Raises ValueError for another
    shape of scale_inv. Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md, inference/kernel.py weight_dequant.
    """
    expected = tuple(-(-size // edge) for size, edge in zip(weight.shape, block, strict=True))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv of a {list(weight.shape)} weight in blocks of {list(block)} must be {list(expected)}, "
            f"got {list(scale_inv.shape)}"
        )
    scale = scale_inv.float().repeat_interleave(block[0], 0)[: weight.shape[0]]
    scale = scale.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    return (weight.float() * scale).to(dtype)


def check_weights(
    weights: Mapping[str, torch.Tensor], module: nn.Module, path: str | os.PathLike[str], layer: int
) -> None:
    """The checkpoint has every parameter of `module` in its shape: KeyError or ValueError that names the tensor.

    An indexer and rotary buffers are dropped from `weights`; any other tensor that the module does not have belongs to
    a variant that it does not compute: ValueError that names it.
    """
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if name not in weights:
            raise KeyError(f"layer {layer} of {os.fspath(path)!r} has no tensor self_attn.{name}")
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"self_attn.{name} of layer {layer} must be {list(parameter.shape)} by config.json, "
                f"got {list(weights[name].shape)}"
            )
    # Only of the projections: an indexer has a norm with a bias.
    unknown_bias = [n for n in weights if n.endswith(".bias") and n.count(".") == 1 and n not in parameters]
    if unknown_bias:
        raise ValueError(f"the checkpoint has {', '.join(unknown_bias)}, but config.json does not set attention_bias")
    others = [name for name in weights if name not in parameters]
    unknown = [name for name in others if not name.startswith(_LEFT_OUT)]
    if unknown:
        raise ValueError(
            f"self_attn of layer {layer} of {os.fspath(path)!r} has tensors that MLA does not have, so it computes "
            f"something else: {', '.join(unknown)}"
        )
    for name in others:
        del weights[name]


def _attentions(weight_map: Mapping[str, str]) -> dict[int, str]:
    found = {}
    for name in weight_map:
        match = _LAYER.match(name)
        if match:
            found[int(match["layer"])] = match["prefix"]
    return found


def _weight_map(path: str | os.PathLike[str]) -> dict[str, str]:
    """Tensor name -> file name: from the index, or, without one, from every safetensors file there."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"model path {path!r} is not a directory")
    index = os.path.join(path, INDEX)
    if os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            try:
                content = json.load(f)
            except json.JSONDecodeError as error:
                raise ValueError(f"{index!r} is not valid JSON: {error}") from error
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index!r} has no weight_map")
        return weight_map
    files = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    if not files:
        raise FileNotFoundError(f"no {INDEX} and no *.safetensors in {path!r}")
    weight_map = {}
    for file in files:
        with _open(os.path.join(path, file)) as f:
            weight_map.update(dict.fromkeys(f.keys(), file))
    return weight_map


def _read(path: str | os.PathLike[str], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(set(names.values())):
        shard = os.path.join(os.fspath(path), file)
        if not os.path.exists(shard):
            missing = next(name for name, at in names.items() if at == file)
            raise FileNotFoundError(f"shard {file!r} is missing in {os.fspath(path)!r}; it holds {missing}")
        with _open(shard) as f:
            held = set(f.keys())
            for name in (name for name, at in names.items() if at == file):
                if name not in held:
                    raise KeyError(f"{INDEX} says that {file} holds {name}, but it does not")
                tensors[name] = f.get_tensor(name)
    return tensors


def _block_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    config = read_config_json(path)
    quantization = config.get("quantization_config") or text_config(config).get("quantization_config") or {}
    block = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else quantization
    if block is None:
        return 128, 128
    sizes = isinstance(block, (list, tuple)) and [type(edge) is int and edge > 0 for edge in block]
    if sizes != [True, True]:
        raise ValueError(
            "quantization_config's weight_block_size of config.json must be two positive ints (rows, columns of a "
            f"block), got {block!r}"
        )
    return tuple(block)


@contextlib.contextmanager
def _open(file: str) -> Iterator:
    """A safetensors file, open; ValueError that names it where it is damaged."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors: pip install safetensors") from error
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise ValueError(f"{file!r} is not a valid safetensors file: {error}") from error
