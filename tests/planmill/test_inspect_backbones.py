"""Backbones by name: weights from a file only, tokens as the library itself gives them, and clear errors."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from planmill.errors import PlanmillError
from planmill.inspection.backbones import resolve_backbone
from planmill.inspection.backbones.common import choose_layers, choose_size

FACTORY = """
import torch
import neighbour

class Net(torch.nn.Module):
    image_size, grid, mean, std = 8, (2, 2), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, size=8):
        super().__init__()
        self.image_size = size
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        tokens = torch.nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2) * self.scale
        return [tokens], tokens.mean(1)

def factory(size=8):
    return Net(size)

def wrong():
    return 3

def broken():
    raise KeyError("no such thing")

def bare():
    return torch.nn.Linear(1, 1)
"""


@pytest.fixture
def module_file(tmp_path: Path) -> Path:
    """A user's file with a neighbour that it imports."""
    (tmp_path / "net.py").write_text(FACTORY)
    (tmp_path / "neighbour.py").touch()
    return tmp_path / "net.py"


@pytest.fixture
def _no_checkout_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m pytest` puts the checkout on the path, where transformers takes kernels/ for a package of its own."""
    checkout = str(Path(__file__).resolve().parents[2])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", checkout)])


def test_quarters_and_sizes() -> None:
    assert choose_layers(4, None) == (0, 1, 2, 3)
    assert choose_layers(12, None) == (2, 5, 8, 11)
    assert choose_layers(24, None) == (5, 11, 17, 23)
    assert choose_layers(12, (7, 3)) == (3, 7)
    assert (choose_size(14, None), choose_size(16, None), choose_size(14, 224)) == (518, 512, 224)
    with pytest.raises(PlanmillError, match="blocks 0 to 11"):
        choose_layers(12, (12,))
    with pytest.raises(PlanmillError, match=r"multiple of the backbone's patch size 14, e\.g\. 504"):
        choose_size(14, 512)


def test_a_factory_and_its_options(module_file: Path) -> None:
    backbone = resolve_backbone(f"{module_file}:factory", size=16)
    assert backbone.image_size == (16, 16)
    assert backbone.grid == (2, 2)
    pixels = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    torch.testing.assert_close(backbone.normalize(pixels), torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("factory", {"layers": (1,)}, r"factory\(\) does not take --layers"),
        ("wrong", {}, "must return an nn.Module, got int"),
        ("broken", {}, "KeyError: 'no such thing'"),
        ("bare", {}, "has no attribute image_size, grid, mean, std"),
        ("missing", {}, "has no callable 'missing'"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(module_file: Path, attribute: str, options: dict, message: str) -> None:
    with pytest.raises(PlanmillError, match=message):
        resolve_backbone(f"{module_file}:{attribute}", **options)


def test_names_that_lead_nowhere(module_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanmillError, match="no file"):
        resolve_backbone(f"{tmp_path}/none.py:factory")
    with pytest.raises(PlanmillError, match="say which callable"):
        resolve_backbone(str(module_file))
    with pytest.raises(PlanmillError, match="no such file"):
        resolve_backbone("digits", weights=tmp_path / "none.safetensors")
    with pytest.raises(PlanmillError, match="timm has no model of this name; near it: vit_base_patch16"):
        resolve_backbone("vit_base_patch16")
    with pytest.raises(PlanmillError, match="32 x 32, not 64"):
        resolve_backbone("digits", size=64)


def test_timm_weights_that_are_not_there_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(
        PlanmillError, match=r"nothing is downloaded here: run `hf download timm/vit_tiny.*--weights FILE"
    ):
        resolve_backbone("vit_tiny_patch16_224")


def test_a_timm_vit_gives_its_raw_residual_stream(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    x = torch.randn(2, 3, 64, 64)
    for name in ("w.safetensors", "w.pth"):
        backbone = resolve_backbone("vit_tiny_patch16_224", weights=tmp_path / name, size=64, layers=(1, 11))
        assert (backbone.grid, backbone.image_size, backbone.layers) == ((4, 4), (64, 64), (1, 11))
        with torch.no_grad():
            tokens, descriptor = backbone.module(x)
            stream = model.patch_embed(x)
            stream = model._pos_embed(stream)
            for block in model.blocks[:2]:
                stream = block(stream)
        torch.testing.assert_close(tokens[0], stream[:, 1:])
        assert tokens[1].shape == (2, 16, 192)
        torch.testing.assert_close(descriptor, model.forward_head(model.forward_features(x), pre_logits=True))


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(PlanmillError, match=r"w\.safetensors does not fit this model"):
        resolve_backbone("vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", size=64)
    (tmp_path / "bad.safetensors").write_text("nothing")
    with pytest.raises(PlanmillError, match=r"bad\.safetensors"):
        resolve_backbone("vit_tiny_patch16_224", weights=tmp_path / "bad.safetensors", size=64)


def test_a_convolutional_model_is_no_vit(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(PlanmillError, match="no vision transformer"):
        resolve_backbone("resnet18", weights=tmp_path / "w.safetensors")


@pytest.mark.usefixtures("_no_checkout_on_the_path")
@pytest.mark.parametrize("kind", ["Dinov2", "ViT", "CLIPVision", "Dinov2WithRegisters"])
def test_a_transformers_vit_gives_its_hidden_states(tmp_path: Path, kind: str) -> None:
    import transformers

    from planmill.engine import capture

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = getattr(transformers, f"{kind}Config")(**settings, intermediate_size=64)
    name = "CLIPVisionModelWithProjection" if kind == "CLIPVision" else f"{kind}Model"
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(tmp_path)
    backbone = resolve_backbone(f"hf:{tmp_path}", size=56, layers=(0, 2))
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens, descriptor = backbone.module(x)
        expected = model(x, output_hidden_states=True)
    for got, index in zip(tokens, (1, 3), strict=True):
        torch.testing.assert_close(got, expected.hidden_states[index][:, -16:])
    pooled = expected.image_embeds if kind == "CLIPVision" else expected.pooler_output
    torch.testing.assert_close(descriptor, pooled)
    other = resolve_backbone(f"hf:{tmp_path}", weights=tmp_path / "model.safetensors", size=56, layers=(0, 2))
    with torch.no_grad():
        torch.testing.assert_close(other.module(x)[0], tokens)
    capture(backbone.module, x)  # it can become a plan


@pytest.mark.usefixtures("_no_checkout_on_the_path")
def test_a_transformers_model_never_gets_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from safetensors.torch import load_file

    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.1.norm1.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanmillError, match=r"no weights for encoder\.layer\.1\.norm1\.weight"):
        resolve_backbone(f"hf:{tmp_path}", size=28)
    with pytest.raises(PlanmillError, match=r"no weights for encoder\.layer\.1\.norm1\.weight"):
        resolve_backbone(f"hf:{tmp_path}", weights=tmp_path / "model.safetensors", size=28)


@pytest.mark.usefixtures("_no_checkout_on_the_path")
def test_a_transformers_model_that_is_not_cached_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PlanmillError, match="run `hf download facebook/nothing-here` once"):
        resolve_backbone("facebook/nothing-here")
