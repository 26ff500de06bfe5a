"""Whether a command line wants kernels on a CPU, asked before torch, Triton or ntops_mla are imported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

VARIABLE = "NTOPS_MLA_INTERPRET"


def wanted(argv: Sequence[str]) -> bool:
    """`--cpu --backend kernel`: on a CPU, kernels exist only in Triton's interpreter. Not where the variable is set."""
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--cpu", action="store_true")
    flags.add_argument("--backend", nargs="?")  # what is wrong with it is said later, by the whole parser
    args, _ = flags.parse_known_args(argv)
    return args.cpu and args.backend == "kernel" and not os.environ.get(VARIABLE, "").strip()
