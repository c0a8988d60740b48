"""Separable self-attention, O(N) in the number of tokens, as fused CPU and GPU kernels.

Mehta and Rastegari, "Separable Self-attention for Mobile Vision Transformers" (2022).
"""

from sep_attn import flops as _flops  # noqa: F401  PyTorch's FLOP counter then knows the operators
from sep_attn import functional, reference
from sep_attn.convert import convert
from sep_attn.export import decompositions
from sep_attn.module import SeparableAttention
from sep_attn.multihead import SeparableMultiheadAttention
from sep_attn.patch import patch, unpatch
from sep_attn.version import __version__

__all__ = [
    "SeparableAttention",
    "SeparableMultiheadAttention",
    "__version__",
    "convert",
    "decompositions",
    "functional",
    "patch",
    "reference",
    "unpatch",
]
