"""FlashMLA's fp8 cache: 656 bytes a token, 512 latent columns in float8_e4m3fn by groups of 128 and 64 in bfloat16.

| bytes | what |
|---|---|
| 0 to 511 | the latent's codes, float8_e4m3fn |
| 512 to 527 | four float32 scales, one for each 128 columns: latent = scale * code |
| 528 to 655 | the rope columns, bfloat16, not quantised |

Scales written here are powers of two, the least one that brings a group's largest column to 448 or below and at least
2^-13, so that scale * code is exact in bfloat16; what others wrote may have any scale. Source: deepseek-ai/FlashMLA,
README.md and tests/quant.py.
"""

from __future__ import annotations

import torch

LATENT, ROPE, GROUP = 512, 64, 128
GROUPS = LATENT // GROUP
TOKEN_BYTES = LATENT + 4 * GROUPS + 2 * ROPE  # 656
# Of float8_e4m3fn: the largest value. And the least scale: FlashMLA's 1e-4, rounded up to a power of two.
LARGEST = 448.0
NAN = 0x7F  # its code
LEAST_SCALE = 2.0**-13


def views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[..., 656]` bytes -> codes uint8 `[..., 512]`, scales float32 `[..., 4]`, pe bfloat16 `[..., 64]`, of the same
    memory.
    """
    cache = cache.view(torch.uint8)
    pe = LATENT + 4 * GROUPS
    return cache[..., :LATENT], cache[..., LATENT:pe].view(torch.float32), cache[..., pe:].view(torch.bfloat16)


def quantize_into(cache: torch.Tensor, latent: torch.Tensor, pe: torch.Tensor) -> None:
    """Write latent `[..., 512]` and pe `[..., 64]` into `[..., 656]` bytes."""
    codes, scales, rope = views(cache)
    groups = latent.unflatten(-1, (GROUPS, GROUP)).float()
    # amax / 448 as mantissa in [0.5, 1) and exponent: rounded up to a power of two without a logarithm's error
    mantissa, exponent = torch.frexp((groups.abs().amax(-1) / LARGEST).clamp_min(LEAST_SCALE))
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    found = (groups / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    # The cast makes 448 of an infinity, which nobody would notice
    codes.copy_(found.masked_fill(~groups.isfinite(), NAN).flatten(-2))
    scales.copy_(scale)
    rope.copy_(pe)


def dequantize(cache: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """`[..., 656]` bytes -> `[..., 576]`: scale * code in float32 and the rope columns, rounded to `dtype`."""
    codes, scales, pe = views(cache)
    latent = _wide(codes).unflatten(-1, (GROUPS, GROUP)).mul_(scales[..., None])
    return torch.cat([latent.flatten(-2).to(dtype), pe.to(dtype)], -1)


def _wide(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 as float32, new."""
    if codes.device.type != "cpu":
        return codes.view(torch.float8_e4m3fn).float()
    # PyTorch converts one code after the other on a CPU. As a float16 that begins with the code's bits it is the code /
    # 256, subnormal ones too; what would be 480 is NaN.
    low = codes & NAN
    half = (codes.to(torch.int16) << 8).bitwise_and_(-(1 << 15)).bitwise_or_(low.to(torch.int16) << 7)
    wide = half.view(torch.float16).float().mul_(256)
    if low.numel() and low.amax() == NAN:
        wide.masked_fill_(low == NAN, float("nan"))
    return wide
