"""DRAEM (Zavrtanik et al., ICCV 2021, arXiv 2108.07610): an autoencoder paints the image without defects, and a U-Net
that sees both says which pixels are odd.

Inference only, with the layer names of VitjanZ/DRAEM, so that its two checkpoints load (`load_checkpoints`), and, one
level up, those of anomalib, whose state dict loads as it is.

    planmill build examples/zoo/draem.py:draem --weights FILE --input 3x256x256 --out draem.plan
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Detection(NamedTuple):
    """What the model gives: scores [B] and maps [B, 1, H, W], from 0 to 1; higher means more anomalous."""

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor


def convolutions(*channels: int) -> list[nn.Module]:
    """3 x 3 convolutions from each number of channels to the next, each with its norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return layers


def doubled(inputs: int, outputs: int) -> nn.Sequential:
    """Twice the side, corner to corner, then a convolution."""
    resize = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(resize, *convolutions(inputs, outputs))


class Encoder(nn.Module):
    """Images [B, C, H, W] -> the features of every block; each block after the first sees half the side.

    Args:
        channels: C, then what each block gives.
    """

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.blocks = len(channels) - 1
        for index, (inputs, outputs) in enumerate(pairwise(channels)):
            self.add_module(f"block{index + 1}", nn.Sequential(*convolutions(inputs, outputs, outputs)))
        self.halved = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See the class."""
        features = [self.get_submodule("block1")(x)]
        for index in range(2, self.blocks + 1):
            features.append(self.get_submodule(f"block{index}")(self.halved(features[-1])))
        return features


class Step(NamedTuple):
    """Channels of a step of the decoder."""

    inputs: int
    up: int  # of the resized convolution
    beside: int  # of the encoder's features that stand beside that; 0: none do
    middle: int
    outputs: int


class Decoder(nn.Module):
    """The last features [B, C, h, w] -> [B, K, H, W], through steps that double the side.

    Args:
        steps: by name, as in `up{name}` and `db{name}`.
        out_channels: K.
    """

    def __init__(self, steps: Mapping[str, Step], out_channels: int) -> None:
        super().__init__()
        self.names = list(steps)
        for name, step in steps.items():
            self.add_module(f"up{name}", doubled(step.inputs, step.up))
            self.add_module(f"db{name}", nn.Sequential(*convolutions(step.up + step.beside, step.middle, step.outputs)))
        self.fin_out = nn.Sequential(nn.Conv2d(steps[self.names[-1]].outputs, out_channels, 3, padding=1))

    def forward(self, x: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        """`beside`: the encoder's features, of every step or of none."""
        for index, name in enumerate(self.names):
            x = self.get_submodule(f"up{name}")(x)
            x = self.get_submodule(f"db{name}")(torch.cat((x, beside[index]), 1) if beside else x)
        return self.fin_out(x)


class ReconstructiveSubNetwork(nn.Module):
    """Images [B, 3, H, W], sides multiples of 16 -> the same without defects; no skip connection.

    Args:
        width: of the first block.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        w = width
        self.encoder = Encoder(3, w, 2 * w, 4 * w, 8 * w, 8 * w)
        steps = {
            "1": Step(8 * w, 8 * w, 0, 8 * w, 4 * w),
            "2": Step(4 * w, 4 * w, 0, 4 * w, 2 * w),
            "3": Step(2 * w, 2 * w, 0, 2 * w, w),
            "4": Step(w, w, 0, w, w),
        }
        self.decoder = Decoder(steps, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.decoder(self.encoder(x)[-1])


class DiscriminativeSubNetwork(nn.Module):
    """An image beside its reconstruction [B, 6, H, W], sides multiples of 32 -> logits [B, 2, H, W]: normal, odd.

    Args:
        width: of the first block.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.encoder_segment = Encoder(6, w, 2 * w, 4 * w, 8 * w, 8 * w, 8 * w)
        steps = {
            "_b": Step(8 * w, 8 * w, 8 * w, 8 * w, 8 * w),
            "1": Step(8 * w, 4 * w, 8 * w, 4 * w, 4 * w),
            "2": Step(4 * w, 2 * w, 4 * w, 2 * w, 2 * w),
            "3": Step(2 * w, w, 2 * w, w, w),
            "4": Step(w, w, w, w, w),
        }
        self.decoder_segment = Decoder(steps, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        *beside, last = self.encoder_segment(x)
        return self.decoder_segment(last, *reversed(beside))


class DRAEM(nn.Module):
    """DRAEM: images [B, 3, H, W] in [0, 1], sides multiples of 32 -> `Detection`.

    The map is the probability of "odd" at each pixel, softmax of two logits; the score its maximum, as in anomalib. The
    paper takes the maximum of the map's means over 21 x 21 pixels (section 3.3): `mean_size=21`, with zeros outside.

    Args:
        mean_size: the side, odd, of the means that the score is the largest of; 1: of the map itself.
        width: of the first block of the reconstructive network; the discriminative one has half of it.

    Raises:
        ValueError: an even size.
    """

    def __init__(self, mean_size: int = 1, width: int = 128) -> None:
        super().__init__()
        if mean_size < 1 or mean_size % 2 == 0:
            raise ValueError(f"DRAEM: mean_size must be odd and positive, got {mean_size}")
        self.reconstructive_subnetwork = ReconstructiveSubNetwork(width)
        self.discriminative_subnetwork = DiscriminativeSubNetwork(width // 2)
        self.mean_size = mean_size

    def forward(self, x: torch.Tensor) -> Detection:
        """See the class."""
        normal, odd = self.discriminative_subnetwork(torch.cat((x, self.reconstructive_subnetwork(x)), 1)).split(1, 1)
        anomaly_map = (odd.float() - normal.float()).sigmoid()
        means = anomaly_map
        if self.mean_size > 1:
            means = F.avg_pool2d(anomaly_map, self.mean_size, stride=1, padding=self.mean_size // 2)
        return Detection(means.amax((1, 2, 3)), anomaly_map)


def draem() -> DRAEM:
    """DRAEM in eval mode; the score as in anomalib."""
    return DRAEM().eval()


def load_checkpoints(
    model: DRAEM, reconstructive: Mapping[str, torch.Tensor], discriminative: Mapping[str, torch.Tensor]
) -> None:
    """Load the two state dicts of VitjanZ/DRAEM, NAME.pckl and NAME_seg.pckl."""
    model.reconstructive_subnetwork.load_state_dict(reconstructive)
    model.discriminative_subnetwork.load_state_dict(discriminative)
