"""What the board itself can do, measured in the same run: a copy and a matrix product of torch's."""

from __future__ import annotations

import torch

from bench_rows.timing import Call, Clock

# Bytes of a copy's source, and rows of a square product.
COPY = {"device": 1 << 30, "cpu": 256 << 20, "quick": 32 << 20}
SQUARE = {"device": 8192, "cpu": 2048, "quick": 512}


def measure(clock: Clock, size: str, dtype: torch.dtype, runs: int, seconds: float) -> dict:
    """TB/s of a copy (read and write counted) and TFLOP/s of a product, by the fastest quarter: it is a ceiling."""
    device = clock.device
    source = torch.ones(COPY[size], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows = SQUARE[size]
    a, b = (torch.randn(rows, rows, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls = [Call(lambda: target.copy_(source)), Call(lambda: torch.matmul(a, b, out=out))]
    copy, matmul = clock.measure(calls, runs, seconds)
    for found in (copy, matmul):
        if isinstance(found, Exception):
            raise found
    return {
        "copy_tb_per_s": 2 * source.numel() / copy.low / 1e9,
        "copy_bytes": source.numel(),
        "matmul_tflop_per_s": 2 * rows**3 / matmul.low / 1e9,
        "matmul_rows": rows,
    }
