"""What 16 bits do to the image scores of EfficientAD-S and SimpleNet, trained and calibrated on a texture.

    python benchmarks/engine/sixteen_bit_scores.py [--steps 150] [--networks efficient_ad simple_net]

Normal images are crops of one half of scikit-image's gravel; 64 test images are crops of the other half, a quarter of
them as they are, the others with a defect of graded strength. The networks are the zoo's; the teacher and the backbone
have random weights of full size, the rest is trained here, see there. Scores of the
float32 program are compared with those of the program that `planmill build --precision bf16` (or fp16) compiles, run
by `Rounded`: float32 sums of products of 16-bit numbers, each result rounded, as units for 16 bits do it. Steps that a
compiler fuses are rounded here and not there.
"""

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from planmill.engine import capture
from planmill.engine.rewrites import default_passes, rewrite
from planmill.kernels.convolution import convolve_with_winograd
from planmill.kernels.convolution.winograd_convolution.transform import SIZES, transform_weight

CASES: list = []  # nothing for `planmill bench`: it measures scores, not time

TESTS, GOOD = 64, 16
HALVES = (torch.bfloat16, torch.float16)
_TINT = torch.tensor([0.95, 0.85, 0.7]).view(3, 1, 1)


class Rounded(torch.fx.Interpreter):
    """Runs a program of 16-bit tensors in float32, and rounds each result to the dtype that the program gives it.

    Large convolutions are computed by Winograd's algorithm, in float32: its own error is a thousandth of a rounding.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self._kernels: dict[torch.fx.Node, torch.Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """See the class; a step that takes nothing in 16 bits runs as it is."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not any(map(_is_half, pytree.tree_leaves((args, kwargs)))) or "_assert" in str(n.target):
            return super().run_node(n)
        wide, named = pytree.tree_map(lambda x: x.float() if _is_half(x) else x, (args, kwargs))
        found = self._convolved(n, *wide)
        if found is None:
            assert callable(n.target)
            found = n.target(*wide, **named)
        like = n.meta["val"]
        return pytree.tree_map(lambda x, y: x.to(y.dtype) if isinstance(x, torch.Tensor) else x, found, like)

    def _convolved(self, n: torch.fx.Node, *args: Any) -> torch.Tensor | None:
        """A large convolution; None where it is small, or something else."""
        if n.target is not torch.ops.aten.conv2d.default or len(args) > 5 or set(args[3] if args[3:] else [1]) != {1}:
            return None
        x, weight, bias, padding = args[0], args[1], args[2] if args[2:] else None, args[4] if args[4:] else [0]
        if min(weight.shape[:2]) < 32 or weight.shape[2] not in SIZES or len({*padding}) > 1:
            return None
        if n not in self._kernels:
            self._kernels[n] = transform_weight(weight)
        bias = torch.zeros(len(weight)) if bias is None else bias
        return convolve_with_winograd(x, self._kernels[n], bias, size=weight.shape[2], padding=padding[0])


def _is_half(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in HALVES


def program(model: nn.Module, inputs: tuple[torch.Tensor, ...], precision: Any) -> torch.fx.Interpreter:
    """What a plan for this CPU compiles.

    Capturing runs the model, in 16 bits too, which takes minutes where the processor has no units for them: not here.
    """
    module = sys.modules[capture.__module__]
    plain = module._must_run  # type: ignore[attr-defined]

    def run(model: nn.Module, examples: tuple[torch.Tensor, ...], how: str) -> Any:
        return None if how.startswith("in ") else plain(model, examples, how)

    with mock.patch.multiple(module, _must_run=run, suitable_layout=lambda *_: "channels_last"):
        captured = capture(model, inputs, dynamic=None, precision=precision)
    return Rounded(rewrite(captured, default_passes("aoti", "cpu")).program.module(check_guards=False))


@functools.cache
def zoo(name: str) -> ModuleType:
    """An example by its file."""
    path = Path(__file__).parents[2] / "examples" / "zoo" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"sixteen_bits_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where pickle looks for its classes
    spec.loader.exec_module(module)
    return module


@functools.cache
def texture(name: str) -> torch.Tensor:
    """A picture [512, 512] in 0..1 that scikit-image ships."""
    from skimage import data

    return torch.from_numpy(getattr(data, name)()).float() / 255


def crops(count: int, size: int, half: str, generator: torch.Generator) -> torch.Tensor:
    """Images [count, 3, size, size] out of the left or the right of the texture, turned and mirrored."""
    picture, found = texture("gravel"), []
    last = picture.shape[1] - size
    for _ in range(count):
        y = _draw(0, picture.shape[0] - size, generator)
        x = _draw(0, last // 2, generator) if half == "left" else _draw(last - last // 4, last, generator)
        crop = picture[y : y + size, x : x + size].rot90(_draw(0, 3, generator))
        found.append((crop.flip(0) if _draw(0, 1, generator) else crop) * _TINT)
    return torch.stack(found)


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def damaged(image: torch.Tensor, kind: int, strength: float, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """An image with a defect (another texture, a blur, a blot, a scratch), and how much of it each pixel has."""
    size = image.shape[-1]
    y, x = (_draw(40, size - 40, generator) for _ in range(2))
    height, width = (4, 90) if kind == 3 else (_draw(8, 30, generator), _draw(8, 30, generator))
    grid = torch.arange(size).float()
    mask = strength * torch.exp(-((((grid[:, None] - y) / height) ** 2 + ((grid - x) / width) ** 2) ** 2))
    other = {
        0: texture("grass")[:size, :size] * _TINT,
        1: F.avg_pool2d(image[None], 9, 1, 4)[0],
        2: torch.full_like(image, 0.9),
        3: torch.zeros_like(image),
    }[kind]
    return image + mask * (other - image), mask


def tests(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images, and the strength of the defect in each, 0 to 1."""
    images = crops(TESTS, size, "right", generator)
    strengths = torch.cat([torch.zeros(GOOD), torch.logspace(-1.3, 0, TESTS - GOOD)])
    for index in range(GOOD, TESTS):
        images[index], _ = damaged(images[index], index % 4, float(strengths[index]), generator)
    return (images * 255).round() / 255, strengths


def start(network: Any) -> Any:
    """Random weights that keep the deviation of activations from layer to layer (He et al., 2015)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network


def train_efficient_ad(generator: torch.Generator) -> Any:
    """EfficientAD-S: student and autoencoder imitate a random teacher.

    Their last layers are fitted in closed form to the features of three images (9408 positions, 4096 and 576 weights
    per channel), the layers before stay random: in the time that takes, gradient descent gets nowhere near.
    """
    model = start(zoo("efficient_ad").small())
    images = crops(3, 256, "left", generator)
    statistics, calibrate = zoo("efficient_ad")._channel_statistics, zoo("efficient_ad").calibrate
    with torch.no_grad():
        mean, std = statistics(features := [model.teacher(x) for x in images.split(1)])
        t = (torch.cat(features) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        fitted = _fit_last(model.ae.decoder.deconv8, functools.partial(model.ae, images), t.float())
        targets = torch.cat([t.float(), fitted], dim=1)
        fitted = _fit_last(model.student.conv4, functools.partial(model.student, images), targets)
        left = (targets - fitted).square().mean((0, 2, 3)).view(2, -1).mean(1).tolist()
        print(
            f"efficient_ad: student {left[0]:.3f} of the teacher's variance, {left[1]:.3f} to the autoencoder",
            flush=True,
        )
    calibrate(model, images.split(1), crops(6, 256, "right", generator).split(1))
    return model.eval()


def _fit_last(layer: nn.Conv2d, run: Callable[[], Any], targets: torch.Tensor) -> torch.Tensor:
    """Set a last layer by ridge regression of `targets` [B, C, h, w] on its input; what it gives then."""
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    run()
    hook.remove()
    size = layer.kernel_size[0]
    x = F.unfold(seen[0], size, padding=int(layer.padding[0])).transpose(1, 2).flatten(0, 1)
    y = targets.permute(0, 2, 3, 1).flatten(0, 2)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    solution = torch.cholesky_solve(x.T @ y, torch.linalg.cholesky(gram))
    layer.weight.copy_(solution.T.view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(y_mean - x_mean @ solution)
    return F.conv2d(seen[0], layer.weight, layer.bias, padding=layer.padding)  # type: ignore[arg-type]


class Backbone(nn.Module):
    """Random features as SimpleNet takes: images [B, 3, 288, 288] -> [B, 512, 36, 36], [B, 1024, 18, 18]."""

    def __init__(self) -> None:
        super().__init__()
        widths, sizes = (3, 64, 256, 512, 1024), (7, 3, 3, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], widths[i + 1], size, 2, size // 2, bias=True),
                nn.BatchNorm2d(widths[i + 1], momentum=None),
                nn.ReLU(),
            )
            for i, size in enumerate(sizes)
        )
        start(self)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found[2], found[3]


def train_simple_net(steps: int, generator: torch.Generator) -> tuple[Backbone, nn.Module]:
    """SimpleNet's head on a random backbone: normal features above 0.5, others below -0.5.

    The others are half normal features with noise, as in the paper, and half features of defects, without which a head
    on random features finds no defect at all.
    """
    backbone, head = Backbone(), zoo("simple_net").wide_resnet50()
    images = crops(32, 288, "left", generator)
    pairs = [damaged(x, index % 4, 1.0, generator) for index, x in enumerate(crops(32, 288, "left", generator))]
    with torch.no_grad():
        backbone.train()
        backbone(images[:8])  # the statistics of its norms
        backbone.eval()
        patches, others = (
            torch.cat([_patches(head, *backbone(x)) for x in part.split(4)])
            for part in (images, torch.stack([image for image, _ in pairs]))
        )
    others = others[F.avg_pool2d(torch.stack([mask for _, mask in pairs])[:, None], 8).flatten() > 0.5]
    head.train()
    optimizer = torch.optim.Adam(head.parameters(), 2e-4)
    for step in range(steps):
        rows = patches[torch.randint(len(patches), (768,), generator=generator)]
        bad = others[torch.randint(len(others), (256,), generator=generator)]
        features = head.pre_projection(torch.cat([rows, bad]))
        noise = torch.randn(256, features.shape[1], generator=generator) * (0.3 * features.detach().std())
        given = torch.cat([features[:512], features[512:768] + noise, features[768:]])
        true, fake = head.discriminator(given).split([512, 512])
        loss = F.relu(0.5 - true).mean() + F.relu(0.5 + fake).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"simple_net step {step}: loss {loss.item():.3f}", flush=True)
    return backbone, head.eval()


def _patches(head: Any, layer2: torch.Tensor, layer3: torch.Tensor) -> torch.Tensor:
    """The rows [P, width] that the head computes with."""
    deep = F.interpolate(head.stencil3(layer3), size=layer2.shape[-2:], mode="bilinear")
    return torch.cat([head.stencil2(layer2), deep], 1).permute(0, 2, 3, 1).flatten(0, 2)


def compare(single: torch.Tensor, half: torch.Tensor, strengths: torch.Tensor) -> dict[str, float]:
    """How scores [N] in 16 bits differ from those in float32."""
    order = single.argsort()
    s, h = single[order].double(), half[order].double()
    above, below = torch.triu_indices(len(s), len(s), 1)
    swapped = (h[above] >= h[below]) & (s[above] < s[below])
    gaps = ((s[below] - s[above]) / s.abs().maximum(s.abs().flip(0)).max())[swapped]
    ranks = torch.stack([s.argsort().argsort(), h.argsort().argsort()]).double()
    return {
        "worst_rel": float(((h - s).abs() / s.abs()).max()),
        "median_rel": float(((h - s).abs() / s.abs()).median()),
        "worst_of_range": float((h - s).abs().max() / (s.max() - s.min())),
        "spearman": float(torch.corrcoef(ranks)[0, 1]),
        "pairs_swapped": int(swapped.sum()),
        "largest_gap_swapped": float(gaps.max()) if len(gaps) else 0.0,
        "auroc_single": auroc(single, strengths),
        "auroc_half": auroc(half, strengths),
    }


def auroc(scores: torch.Tensor, strengths: torch.Tensor) -> float:
    """The part of pairs of a good and a bad image that the scores order."""
    good, bad = scores[strengths == 0], scores[strengths > 0]
    return float(((bad[:, None] > good) + 0.5 * (bad[:, None] == good)).mean())


def scored(name: str, steps: int, state: Path | None) -> Iterator[dict[str, Any]]:
    """The rows of a network: one for each precision."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    size = 256 if name == "efficient_ad" else 288
    zoo(name)
    path = None if state is None else state / f"{name}-{steps}.pt"
    if path is not None and path.exists():
        made = torch.load(path, weights_only=False)
    else:
        made = train_efficient_ad(generator) if name == "efficient_ad" else train_simple_net(steps, generator)
        if path is not None:
            torch.save(made, path)
    generator.manual_seed(1)
    images, strengths = tests(size, generator)
    with torch.no_grad():
        model = made if name == "efficient_ad" else made[1]
        inputs = [(x,) if name == "efficient_ad" else made[0](x) for x in images.split(1)]
        single = _scores(model, inputs, "fp32")
        for precision in ("bf16", "fp16"):
            half = _scores(model, inputs, precision)
            if path is not None:
                torch.save((single, half, strengths), path.with_suffix(f".{precision}.scores"))
            yield {"network": name, "precision": precision, **compare(single, half, strengths)}


def _scores(model: nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]], precision: str) -> torch.Tensor:
    run = program(model, inputs[0], precision)
    return torch.cat([run.run(*x)[0] for x in inputs])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--networks", nargs="+", default=["efficient_ad", "simple_net"])
    parser.add_argument("--state", type=Path, help="a folder that keeps trained networks and scores")
    arguments = parser.parse_args()
    for name in arguments.networks:
        for row in scored(name, arguments.steps, arguments.state):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
