from ntops.torch.add import add
from ntops.torch.rms_norm import rms_norm

__all__ = ["add", "rms_norm"]
