"""The module: a drop-in replacement of timm's ``LinearSelfAttention``."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, nn

from sep_attn.backends import warn
from sep_attn.children import not_plain, unreadable
from sep_attn.functional import separable_attention, shortest_way
from sep_attn.packed_weights import PackedWeights
from sep_attn.reference import separable_attention_of_modules
from sep_attn.validation import (
    ACTIVATIONS,
    BACKENDS,
    check_choice,
    check_patch_size,
    check_probability,
)

# How other libraries name the projections; ours are `qkv_proj.weight` and so on.
_FOREIGN_INFIXES = (".block.conv.", ".convolution.")


def _parameter(module: Any, name: str) -> Any:
    """``module.name``, sooner where it is a plain parameter: ``nn.Module``'s look-up takes a
    microsecond."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


class SeparableAttention(nn.Module):
    """Separable self-attention, Mehta and Rastegari 2022, eq. 3.

    ``forward`` takes ``[B, N, D]``, ``[B, D, P, N]`` (timm, ml-cvnets, Hugging Face), or
    ``[B, D, H, W]`` when ``patch_size`` is given. ``load_state_dict`` also takes the key names and
    the ``[.., .., 1, 1]`` convolution weights of timm, ml-cvnets and Hugging Face.

    Args:
        embed_dim: D, the number of channels.
        attn_drop: dropout of the softmax weights while training, no renormalisation.
        proj_drop: dropout of the output while training.
        bias: whether the projections have biases.
        value_act: ``"relu"`` (paper) or ``"identity"``.
        patch_size: ``(patch_h, patch_w)`` or an int: read rank 4 as ``[B, D, H, W]``, where every
            pixel position of the patch is a slice of its own.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        qkv_proj: ``nn.Linear(D, 1 + 2 D)``: row 0 the score, then the keys, then the values.
        out_proj: ``nn.Linear(D, D)``.
        attn_drop: ``nn.Dropout`` of the softmax weights.
        proj_drop: ``nn.Dropout`` of the output; timm's ``out_drop``.

    The kernels read the parameters of the first two and the probability of the third and call none
    of them. Where one was hooked, subclassed or replaced (by LoRA, quantisation, ...), the layer
    calls them, in plain PyTorch, with a warning; with a backend named by hand it raises.

    Raises:
        TypeError, ValueError: an argument out of range; the message says what was expected.
    """

    def __init__(
        self,
        embed_dim: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias: bool = True,
        *,
        value_act: str = "relu",
        patch_size: int | tuple[int, int] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(embed_dim, "__index__") or isinstance(embed_dim, bool):
            raise TypeError(f"embed_dim must be an int, got {type(embed_dim).__name__}")
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be positive, got {embed_dim}")
        check_probability("attn_drop", attn_drop)
        check_probability("proj_drop", proj_drop)
        check_choice("value_act", value_act, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        embed_dim = operator.index(embed_dim)
        self.embed_dim = embed_dim
        self.value_act = value_act
        self.patch_size = check_patch_size(patch_size)
        self.backend = backend
        self.qkv_proj = nn.Linear(embed_dim, 1 + 2 * embed_dim, bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self._packed_weights = PackedWeights()

    def forward(
        self,
        x: Tensor,
        x_prev: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments, results and errors of :func:`sep_attn.functional.separable_attention`."""
        modules = self._modules
        qkv_proj, out_proj = modules["qkv_proj"], modules["out_proj"]
        attn_drop: Any = modules["attn_drop"]
        if reason := (
            not_plain("qkv_proj", qkv_proj, nn.Linear)
            or not_plain("out_proj", out_proj, nn.Linear)
            or not_plain("attn_drop", attn_drop, nn.Dropout)
        ):
            return self._by_calls(reason, x, x_prev, key_padding_mask, need_weights)
        if x_prev is None and key_padding_mask is None and not need_weights:
            out = self._shortest_way(x)
            if out is not None:
                return out
        if reason := unreadable("qkv_proj", qkv_proj) or unreadable("out_proj", out_proj):
            return self._by_calls(reason, x, x_prev, key_padding_mask, need_weights)
        result = separable_attention(
            x,
            _parameter(qkv_proj, "weight"),
            _parameter(qkv_proj, "bias"),
            _parameter(out_proj, "weight"),
            _parameter(out_proj, "bias"),
            x_prev=x_prev,
            key_padding_mask=key_padding_mask,
            dropout_p=attn_drop.p if attn_drop.training else 0.0,
            value_act=self.value_act,
            patch_size=self.patch_size,
            need_weights=need_weights,
            backend=self.backend,
        )
        if isinstance(result, tuple):
            return self._dropped(result[0]), result[1]
        return self._dropped(result)

    def _dropped(self, out: Tensor) -> Tensor:
        proj_drop: Any = self._modules["proj_drop"]
        if not_plain("proj_drop", proj_drop, nn.Dropout) is None and (
            not proj_drop.training or proj_drop.p == 0.0
        ):
            return out
        return cast(Tensor, proj_drop(out))

    def _by_calls(
        self,
        reason: str,
        x: Tensor,
        x_prev: Tensor | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Equation 3 in plain PyTorch, by calls of children that the kernels must not bypass."""
        message = f"sep_attn's kernels cannot serve this {type(self).__name__}: {reason}"
        if self.backend in ("native", "triton"):
            raise RuntimeError(f'{message}; undo that, or use backend="auto"')
        if self.backend == "auto" and not torch.compiler.is_compiling():
            warn(f"{message}; it is called, in plain PyTorch")
        result = separable_attention_of_modules(
            x,
            self.qkv_proj,
            self.out_proj,
            self.attn_drop,
            embed_dim=self.embed_dim,
            x_prev=x_prev,
            key_padding_mask=key_padding_mask,
            value_act=self.value_act,
            patch_size=self.patch_size,
            need_weights=need_weights,
        )
        if isinstance(result, tuple):
            return self._dropped(result[0]), result[1]
        return self._dropped(result)

    def _shortest_way(self, x: Tensor) -> Tensor | None:
        modules, training = self._modules, self.training
        attn_drop = modules["attn_drop"]
        if attn_drop.training and attn_drop.p > 0.0:
            return None
        out = shortest_way(
            x,
            modules["qkv_proj"]._parameters,
            modules["out_proj"]._parameters,
            self.value_act,
            self.patch_size,
            self.backend,
            None if training else self._packed_weights,
        )
        return None if out is None else self._dropped(out)

    def train(self, mode: bool = True) -> SeparableAttention:
        """As ``nn.Module.train``; nothing packed is kept in training."""
        if mode:
            self._packed_weights.release()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> SeparableAttention:
        self._packed_weights.release()
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"value_act={self.value_act!r}"]
        if self.patch_size is not None:
            parts.append(f"patch_size={self.patch_size}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for projection in ("qkv_proj", "out_proj"):
            for kind in ("weight", "bias"):
                own = f"{prefix}{projection}.{kind}"
                for infix in _FOREIGN_INFIXES:
                    foreign = f"{prefix}{projection}{infix}{kind}"
                    if foreign in state_dict and own not in state_dict:
                        state_dict[own] = state_dict.pop(foreign)
                value = state_dict.get(own)
                if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:] == (1, 1):
                    state_dict[own] = value.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
