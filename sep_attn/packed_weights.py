"""Weights that a layer has packed for its kernels, kept from one call in eval to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sep_attn import native


class PackedWeights:
    """Memory in which the C++ kernels keep a layer's packed weights.

    The kernels compare a fingerprint of the weights at every call, so weights may change in any
    way, under ``.data`` too. One call at a time uses the memory; another at the same time packs for
    itself. Nothing of it is copied or pickled with the layer.

    Attributes:
        memory: uint8, or None while nothing is kept.
    """

    __slots__ = ("memory",)

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def allocate(self, qkv_weight: Tensor | None) -> Tensor:
        """New memory for the weights of a layer like this one's.

        Args:
            qkv_weight: ``[1 + 2 D, D]``, or ``[1 + 2 D, D, 1, 1]``.

        Raises:
            RuntimeError: the C++ kernels are not available.
            ValueError: the weight is missing, or of a rank or dtype that they do not take.
        """
        if qkv_weight is None or qkv_weight.dim() < 2:
            given = None if qkv_weight is None else list(qkv_weight.shape)
            raise ValueError(f"qkv_weight has shape {given}, expected [1 + 2 D, D]")
        size = native.packed_weights_bytes(qkv_weight.dtype, qkv_weight.shape[1])
        with torch.inference_mode(False):
            self.memory = torch.zeros(size, dtype=torch.uint8, device="cpu")
        return self.memory

    def release(self) -> None:
        """Gives the memory back; the next call begins anew."""
        self.memory = None

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights()
