"""nn.Modules built from the ops."""

from ntops_mla.modules.mla import MLA

__all__ = ["MLA"]
