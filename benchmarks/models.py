"""MobileViTv2 as timm and as Hugging Face build it, with random weights: no network is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

SEED = 0
IMAGE_SIZE = 256
TIMM_ATTENTION = "timm.models.mobilevit"
HUGGING_FACE_ATTENTION = "transformers.models.mobilevitv2.modeling_mobilevitv2"


def import_timm() -> ModuleType:
    """Imports timm, also where torchvision's binary does not fit torch (the CPU build of torch)."""
    return _import("timm")


def timm_mobilevitv2(name: str = "mobilevitv2_100", **options: Any) -> nn.Module:
    """timm's MobileViTv2 in eval mode; ``[B, 3, 256, 256]`` to logits ``[B, 1000]``.

    Args:
        name: timm's name of the model.
        options: for ``timm.create_model``, e.g. ``num_classes=10``.
    """
    timm = import_timm()
    with _seeded():
        return timm.create_model(name, pretrained=False, **options).eval()


def hugging_face_mobilevitv2(**options: Any) -> nn.Module:
    """Hugging Face's MobileViTv2 classifier in eval mode.

    Args:
        options: for ``MobileViTV2Config``, e.g. ``width_multiplier=0.5``.
    """
    modeling = _import(HUGGING_FACE_ATTENTION)
    with _seeded():
        config = modeling.MobileViTV2Config(**options)
        model = modeling.MobileViTV2ForImageClassification(config)
        _keep_signal_alive(model)
        return model.eval()


def hugging_face_segmentation(**options: Any) -> nn.Module:
    """Hugging Face's MobileViTv2 with DeepLabv3's head in eval mode; ``[B, 3, H, W]`` to logits
    ``[B, num_labels, H / 32, W / 32]``.

    Args:
        options: for ``MobileViTV2Config``, e.g. ``num_labels=21``.
    """
    modeling = _import(HUGGING_FACE_ATTENTION)
    with _seeded():
        config = modeling.MobileViTV2Config(**options)
        model = modeling.MobileViTV2ForSemanticSegmentation(config)
        _keep_signal_alive(model)
        return model.eval()


def timm_attention(embed_dim: int, **options: Any) -> nn.Module:
    """One ``LinearSelfAttention(embed_dim, attn_drop=0.0, proj_drop=0.0, bias=True)`` of timm."""
    mobilevit = _import(TIMM_ATTENTION)
    with _seeded():
        return mobilevit.LinearSelfAttention(embed_dim, **options)


def hugging_face_attention(embed_dim: int, **options: Any) -> nn.Module:
    """One ``MobileViTV2LinearSelfAttention`` of Hugging Face; options are the configuration's."""
    modeling = _import(HUGGING_FACE_ATTENTION)
    with _seeded():
        config = modeling.MobileViTV2Config(**options)
        return modeling.MobileViTV2LinearSelfAttention(config, embed_dim)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The separable attention layers of either model, by name, first to last."""
    classes = ("LinearSelfAttention", "MobileViTV2LinearSelfAttention")
    return {name: m for name, m in model.named_modules() if type(m).__name__ in classes}


@torch.no_grad()
def _keep_signal_alive(model: nn.Module) -> None:
    """Fresh weights and one batch's statistics; Hugging Face's own initialisation leaves every
    logit at zero, where nothing could be compared."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.reset_parameters()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _import(name: str) -> ModuleType:
    """Imports a module that imports torchvision (as transformers does where it is installed)."""
    with _missing_torchvision_operators_allowed():
        return importlib.import_module(name)


@contextmanager
def _missing_torchvision_operators_allowed() -> Iterator[None]:
    """torchvision refuses to import without its operators, though MobileViTv2 calls none."""
    register_fake = torch.library.register_fake

    def register_if_present(op: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        register = register_fake(op, *args, **kwargs)
        if not (isinstance(op, str) and op.startswith("torchvision::")):
            return register

        def attempt(function: Callable[..., Any]) -> Callable[..., Any]:
            try:
                return register(function)
            except RuntimeError:  # operator does not exist
                return function

        return attempt

    torch.library.register_fake = register_if_present
    try:
        yield
    finally:
        torch.library.register_fake = register_fake
