"""A small vision transformer for handwritten digits: 32 x 32 grey pictures, patch 4, width 96, 4 blocks.

`DigitsModel` classifies; `DigitsBackbone` is the same network seen by `planmill inspect`: patch tokens of chosen blocks
and one descriptor per picture. `factory` builds the backbone with the trained weights:

    planmill inspect PICTURES --out DIR --backbone examples/digits/model.py:factory
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("digits.safetensors")
IMAGE_SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 4, 96, 4, 4, 10
MEAN, STD = 0.3, 0.35  # of the training pictures, scaled to [0, 1]


class Attention(nn.Module):
    """Multi-head self-attention over tokens [N, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [N, T, C] -> [N, T, C]."""
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, c))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [N, T, C] -> [N, T, C]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DigitsModel(nn.Module):
    """Vision transformer: pictures [N, 1, 32, 32] float32 (normalised) -> logits [N, 10] float32."""

    def __init__(self) -> None:
        super().__init__()
        patches = (IMAGE_SIZE // PATCH) ** 2
        self.patchify = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(1, patches, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def features(self, pictures: torch.Tensor, layers: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Residual stream after each of the blocks `layers` ([N, 64, 96]), and the mean of the last, normalised."""
        x = self.patchify(pictures).flatten(2).transpose(1, 2) + self.position
        tokens = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in layers:
                tokens.append(x)
        return tokens, self.norm(x).mean(1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of pictures [N, 1, 32, 32]."""
        return self.head(self.features(pictures, ())[1])


class DigitsBackbone(nn.Module):
    """The protocol of `planmill inspect`: `forward`, and what to do to a picture before it."""

    image_size = (IMAGE_SIZE, IMAGE_SIZE)
    grid = (IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH)
    mean: tuple[float, ...] = (MEAN,)
    std: tuple[float, ...] = (STD,)

    def __init__(self, model: DigitsModel, layers: Sequence[int] = tuple(range(DEPTH))) -> None:
        super().__init__()
        self.model = model
        self.layers = tuple(layers)

    def forward(self, pictures: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Pictures [N, 1, 32, 32] -> (patch tokens [N, 64, 96] per layer, descriptors [N, 96])."""
        return self.model.features(pictures, self.layers)


def load_model(weights: str | Path = WEIGHTS) -> DigitsModel:
    """The trained classifier, in evaluation mode."""
    model = DigitsModel()
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return model.eval()


def factory(
    weights: str | Path | None = None, layers: Sequence[int] | None = None, size: int | None = None
) -> DigitsBackbone:
    """What `--backbone examples/digits/model.py:factory` calls; `--weights`, `--layers`, `--size` arrive as given."""
    if size not in (None, IMAGE_SIZE):
        raise ValueError(f"the digits model takes pictures of {IMAGE_SIZE} x {IMAGE_SIZE}, not {size}")
    return DigitsBackbone(load_model(weights or WEIGHTS), layers or range(DEPTH)).eval()
