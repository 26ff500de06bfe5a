"""A small ntops, laid out as the real one is: what registering meets where the real one is not installed."""

from ntops import kernels, torch

__all__ = ["kernels", "torch"]
