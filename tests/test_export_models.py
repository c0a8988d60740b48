"""Whole models exported after patch or convert, with sizes that stay dynamic, and what users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import assert_same_results, assert_standard, operators_of, to_onnx
from torch import Tensor, nn
from torch.export import Dim

import sep_attn
from benchmarks import models
from sep_attn import native

timm = models.import_timm()  # imports torchvision the way that works with any torch
import torchvision  # noqa: E402
import transformers  # noqa: E402

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason="the C++ kernels are not built"
)

BATCH = Dim("batch", min=1, max=16)
ROWS, COLUMNS = Dim("rows", min=2, max=64), Dim("columns", min=2, max=64)


class Called(nn.Module):
    """A Hugging Face model that gives one tensor."""

    def __init__(self, model: nn.Module, result: str, **options: Any) -> None:
        super().__init__()
        self.model, self.result, self.options = model, result, options

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x, **self.options), self.result)


def exported(model: nn.Module, x: Tensor, step: int) -> torch.export.ExportedProgram:
    """Batch, height and width are dynamic; images are whole numbers of steps."""
    shapes = ({0: BATCH, 2: step * ROWS, 3: step * COLUMNS},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    return program.run_decompositions(sep_attn.decompositions())


def converted_timm_vit() -> tuple[nn.Module, int]:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=10, dynamic_img_size=True
    )
    assert sep_attn.convert(model) == 2
    return model.eval(), 16


def converted_hugging_face_vit() -> tuple[nn.Module, int]:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
    )
    model = transformers.ViTModel(config)
    assert sep_attn.convert(model) == 2
    return Called(model.eval(), "last_hidden_state", interpolate_pos_encoding=True), 16


def patched_hugging_face_mobilevitv2() -> tuple[nn.Module, int]:
    model = models.hugging_face_mobilevitv2(
        width_multiplier=0.25, num_labels=10, n_attn_blocks=[1, 1, 1]
    )
    assert sep_attn.patch(model) == 3
    return Called(model, "logits"), 64


def patched_timm_block() -> tuple[nn.Module, int]:
    """One block: over a whole model torch.export takes longer than minutes for timm's sizes, which
    pass through floats (``math.ceil(H / patch_h)``), patched or not."""
    model = models.timm_mobilevitv2("mobilevitv2_050")
    block = next(m for m in model.modules() if type(m).__name__ == "MobileVitV2Block")
    assert sep_attn.patch(block) == 2
    return block, 2


@pytest.mark.parametrize(
    "build",
    [
        converted_timm_vit,
        converted_hugging_face_vit,
        patched_hugging_face_mobilevitv2,
        patched_timm_block,
    ],
)
@torch.no_grad()
def test_image_sizes_stay_dynamic(build: Any) -> None:
    model, step = build()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    channels = first.in_channels

    def images(batch: int, rows: int, columns: int) -> Tensor:
        return torch.rand(batch, channels, rows * step, columns * step)

    program = exported(model, images(2, 3, 4), step)
    assert operators_of(program) == {"aten"}
    proto = to_onnx(program)
    assert_standard(proto)
    for x in (images(2, 3, 4), images(1, 2, 5), images(3, 6, 3)):
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)
        assert_same_results(proto, model, (x,))


def test_onnx_of_a_converted_encoder_with_dynamic_tokens() -> None:
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
    assert sep_attn.convert(model) == 2
    count = Dim("count", min=2, max=512)
    proto = to_onnx(model, (torch.randn(2, 9, 16),), dynamic_shapes=({0: BATCH, 1: count},))
    assert_standard(proto)
    for shape in ((2, 9, 16), (1, 33, 16)):
        assert_same_results(proto, model, (torch.randn(shape),))


def small_timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4
    )


def small_hugging_face_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return Called(transformers.ViTForImageClassification(config), "logits")


def small_torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision's own is zero, and nothing would show
    return model


def small_hugging_face_mobilevitv2() -> nn.Module:
    model = models.hugging_face_mobilevitv2(
        width_multiplier=0.25, num_labels=10, n_attn_blocks=[1, 1, 1]
    )
    return Called(model, "logits")


@pytest.mark.parametrize(
    "build, prepare",
    [
        (small_timm_vit, sep_attn.convert),
        (small_hugging_face_vit, sep_attn.convert),
        (small_torchvision_vit, sep_attn.convert),
        (small_hugging_face_mobilevitv2, sep_attn.patch),
    ],
    ids=["timm", "hugging_face", "torchvision", "patched"],
)
def test_a_model_from_training_to_export(build: Any, prepare: Any, tmp_path: Path) -> None:
    size = 64 if prepare is sep_attn.patch else 32
    x, labels = torch.rand(4, 3, size, size), torch.arange(4)
    model = build().train()
    count = prepare(model)
    assert count > 1
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    attention = [name for name in before if "qkv_proj.weight" in name or "out_proj" in name]
    assert len(attention) >= 2 * count
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in attention)

    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = build()
    prepare(other)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    model.eval(), other.eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(other(x), expected)
        assert expected.std() > 1e-3

    program = torch.export.export(other, (x,), dynamic_shapes=({0: BATCH},))
    program = program.run_decompositions(sep_attn.decompositions())
    assert operators_of(program) == {"aten"}
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x[:1]), expected[:1], atol=1e-5, rtol=1e-4)
