"""Train the digits model: a minute or two on two cores. Writes digits.safetensors beside this file.

python examples/digits/train.py [--epochs 30] [--out FILE]
"""

import argparse
import math
from pathlib import Path

import data
import model as digits
import torch
from safetensors.torch import save_file
from torch import nn

BATCH = 32
LEARNING_RATE = 1e-3


def augment(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random rotation (10 degrees), scale (10 %), and shift (2 pixels) of each picture of [N, 1, 32, 32]."""
    n = len(pictures)
    angle, scale, dx, dy = (torch.rand(4, n, generator=generator) * 2 - 1) * torch.tensor(
        [math.radians(10), 0.1, 2 / 16, 2 / 16]
    ).unsqueeze(1)
    cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = nn.functional.affine_grid(theta, list(pictures.shape), align_corners=False)
    return nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def train(epochs: int) -> digits.DigitsModel:
    """Train on the training split alone."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    split = data.load()[0]
    x, y = data.to_tensor(split.pictures, digits.MEAN, digits.STD), torch.from_numpy(split.labels)
    model = digits.DigitsModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            logits = model(augment(x[chosen], generator))
            loss = nn.functional.cross_entropy(logits, y[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / len(x):.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: digits.DigitsModel) -> float:
    """Share of the held-out digits that are classified correctly."""
    split = data.load()[1]
    logits = model(data.to_tensor(split.pictures, digits.MEAN, digits.STD))
    return float((logits.argmax(1) == torch.from_numpy(split.labels)).float().mean())


def main() -> None:
    """Train, judge on the held-out digits, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS)
    arguments = parser.parse_args()
    model = train(arguments.epochs)
    print(f"held-out accuracy {accuracy(model):.4f}")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, arguments.out)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
