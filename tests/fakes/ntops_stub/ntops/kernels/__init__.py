from ntops.kernels import add, rms_norm

__all__ = ["add", "rms_norm"]
