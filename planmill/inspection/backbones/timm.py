"""Vision transformers of timm, with weights from a local file or from the user's cache. Nothing is downloaded."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from planmill.errors import PlanmillError
from planmill.inspection.backbones.common import Backbone, choose_layers, choose_size, name_some, read_weights


class TimmBackbone(nn.Module):
    """A timm ViT: raw residual stream after the blocks `layers`, and its pooled descriptor."""

    def __init__(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, pictures: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """[N, 3, H, W] -> ([N, P, D] per layer, [N, E])."""
        model: Any = self.model
        final, tokens = model.forward_intermediates(
            pictures, indices=list(self.layers), norm=False, output_fmt="NLC", return_prefix_tokens=False
        )
        return tokens, model.forward_head(final, pre_logits=True)


def load_timm_backbone(name: str, weights: Path | None, layers: Sequence[int] | None, size: int | None) -> Backbone:
    """A timm ViT by name.

    Raises:
        PlanmillError: timm is missing, no such model, no ViT, or its weights cannot be had.
    """
    timm = _import_timm()
    short = name.removeprefix("timm/")
    if not timm.is_model(short.split(".")[0]):
        base = short.split(".")[0]
        close = (timm.list_models(f"{base}*") or timm.list_models(f"*{base}*"))[:3]
        hint = f"; near it: {', '.join(close)}" if close else ""
        raise PlanmillError(
            f"--backbone {name}: timm has no model of this name{hint}. A transformers model is written org/name, "
            "a file of yours file.py:factory"
        )
    cfg = timm.get_pretrained_cfg(short, allow_unregistered=False)
    if cfg is None:
        raise PlanmillError(f"--backbone {name}: timm lists no weights of this name")
    file = weights or _cached_file(cfg)
    if file is None:
        repo = cfg.hf_hub_id
        how = f"run `hf download {repo}` once, or " if repo else ""
        raise PlanmillError(
            f"--backbone {name}: its weights are not in the cache, and nothing is downloaded here: {how}"
            "give --weights FILE"
        )
    with torch.device("meta"):  # no memory and no time: just to learn the patch size and the depth
        shape = timm.create_model(short, pretrained=False, num_classes=0)
    if not (hasattr(shape, "blocks") and hasattr(shape, "forward_intermediates") and hasattr(shape, "patch_embed")):
        raise PlanmillError(
            f"--backbone {name}: is no vision transformer of equal patches; give a ViT, e.g. vit_base_*"
        )
    patch = shape.patch_embed.patch_size[0]
    side, chosen = choose_size(patch, size), choose_layers(len(shape.blocks), layers)
    model = _create(timm, name, short, file, side)
    data = timm.data.resolve_model_data_config(model)
    return Backbone(
        module=TimmBackbone(model.eval(), chosen).eval(),
        name=name,
        source=f"timm {timm.__version__}",
        weights=str(file),
        layers=chosen,
        image_size=(side, side),
        grid=(side // patch, side // patch),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _create(timm: ModuleType, name: str, short: str, file: Path, side: int) -> nn.Module:
    """The model with the file's weights; timm's own filter resizes the position table and renames old keys."""
    try:
        model = timm.create_model(short, pretrained=False, num_classes=0, img_size=side)
    except TypeError as error:
        raise PlanmillError(f"--backbone {name}: is no ViT that takes an image size: {error}") from error
    try:
        if file.suffix == ".npz":
            model.load_pretrained(str(file))
            return model
        state = read_weights(file)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        missing = model.load_state_dict(convert(state, model) if convert else state, strict=False).missing_keys
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        raise PlanmillError(f"--backbone {name}: {file} does not fit this model: {' '.join(lines[:2])}") from error
    if missing:
        raise PlanmillError(f"--backbone {name}: {file} does not fit this model: it lacks {name_some(missing)}")
    return model


def _cached_file(cfg: Any) -> Path | None:
    """The model's weights in the Hugging Face cache or in torch's, where an earlier download left them."""
    if cfg.file and os.path.isfile(cfg.file):
        return Path(cfg.file)
    if cfg.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        standard = (
            "model.safetensors",
            "pytorch_model.bin",
            "open_clip_model.safetensors",
            "open_clip_pytorch_model.bin",
        )
        for filename in (cfg.hf_hub_filename, *standard) if cfg.hf_hub_filename else standard:
            found = try_to_load_from_cache(cfg.hf_hub_id, filename)
            if isinstance(found, str):
                return Path(found)
    if cfg.url:
        found_file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(cfg.url))
        if found_file.is_file():
            return found_file
    return None


def _import_timm() -> ModuleType:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise PlanmillError(f"timm cannot be imported ({error}): pip install 'planmill[models]'") from error
    except RuntimeError as error:  # a torchvision built for another torch fails so, at import
        raise PlanmillError(f"timm cannot be imported: torchvision does not fit this torch: {error}") from error
    return timm
