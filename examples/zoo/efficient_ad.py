"""EfficientAD (Batzner et al., WACV 2024, arXiv 2303.14535): a student learned to imitate a teacher and an autoencoder.

Inference only, with the layer names of anomalib, so that its checkpoints load; `convert_sequential` renames those of
nelson1425/EfficientAD. Statistics over normal images come with the checkpoint or from `calibrate`.

    planmill build examples/zoo/efficient_ad.py:small --weights FILE --input 3x256x256 --out efficient_ad.plan
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOW, HIGH = 0.9, 0.995  # quantiles of normal pixels that the maps are scaled by


class Detection(NamedTuple):
    """What the model gives: scores [B] and maps [B, 1, H, W], both float32; higher means more anomalous."""

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] by the mean and deviation of ImageNet."""
    mean, std = (
        torch.tensor(values, device=x.device).view(1, 3, 1, 1).to(x.dtype) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (x - mean) / std


class SmallNetwork(nn.Module):
    """Patch description network PDN-S: images [B, 3, H, W] -> features [B, C, h, w]; 256 -> 56 without padding."""

    def __init__(self, out_channels: int, padding: bool = False) -> None:
        super().__init__()
        pad = int(padding)
        self.conv1 = nn.Conv2d(3, 128, 4, padding=3 * pad)
        self.conv2 = nn.Conv2d(128, 256, 4, padding=3 * pad)
        self.conv3 = nn.Conv2d(256, 256, 3, padding=pad)
        self.conv4 = nn.Conv2d(256, out_channels, 4)
        self.avgpool1 = nn.AvgPool2d(2, 2, padding=pad)
        self.avgpool2 = nn.AvgPool2d(2, 2, padding=pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.avgpool1(F.relu(self.conv1(normalize(x))))
        x = self.avgpool2(F.relu(self.conv2(x)))
        return self.conv4(F.relu(self.conv3(x)))


class MediumNetwork(nn.Module):
    """Patch description network PDN-M: images [B, 3, H, W] -> features [B, C, h, w]; 256 -> 56 without padding."""

    def __init__(self, out_channels: int, padding: bool = False) -> None:
        super().__init__()
        pad = int(padding)
        self.conv1 = nn.Conv2d(3, 256, 4, padding=3 * pad)
        self.conv2 = nn.Conv2d(256, 512, 4, padding=3 * pad)
        self.conv3 = nn.Conv2d(512, 512, 1)
        self.conv4 = nn.Conv2d(512, 512, 3, padding=pad)
        self.conv5 = nn.Conv2d(512, out_channels, 4)
        self.conv6 = nn.Conv2d(out_channels, out_channels, 1)
        self.avgpool1 = nn.AvgPool2d(2, 2, padding=pad)
        self.avgpool2 = nn.AvgPool2d(2, 2, padding=pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.avgpool1(F.relu(self.conv1(normalize(x))))
        x = self.avgpool2(F.relu(self.conv2(x)))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        return self.conv6(F.relu(self.conv5(x)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> code [B, 64, H / 32 - 7, W / 32 - 7]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 64)
        for index in range(5):
            self.add_module(f"enconv{index + 1}", nn.Conv2d(widths[index], widths[index + 1], 4, stride=2, padding=1))
        self.enconv6 = nn.Conv2d(64, 64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        for index in range(1, 6):
            x = F.relu(self.get_submodule(f"enconv{index}")(x))
        return self.enconv6(x)


class Decoder(nn.Module):
    """Code -> features [B, C, h, w] of the size that the patch description network gives."""

    def __init__(self, out_channels: int, padding: bool = False) -> None:
        super().__init__()
        self.padding = padding
        for index in range(1, 7):
            self.add_module(f"deconv{index}", nn.Conv2d(64, 64, 4, padding=2))
        self.deconv7 = nn.Conv2d(64, 64, 3, padding=1)
        self.deconv8 = nn.Conv2d(64, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """See the class; dropout between the layers is for training only."""
        for index, size in enumerate(zip(*(self._sizes(side) for side in image_size), strict=True)):
            x = F.interpolate(x, size=size, mode="bilinear")
            x = F.relu(self.get_submodule(f"deconv{index + 1}")(x))
        return self.deconv8(x)

    def _sizes(self, side: int) -> tuple[int, ...]:
        """The side that each layer's input is resized to, for images of this side."""
        last = math.ceil(side / 4) - (0 if self.padding else 8)
        return side // 64 - 1, side // 32, side // 16 - 1, side // 8, side // 4 - 1, side // 2 - 1, last


class AutoEncoder(nn.Module):
    """Images [B, 3, H, W] -> features [B, C, h, w]."""

    def __init__(self, out_channels: int, padding: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(out_channels, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.decoder(self.encoder(normalize(x)), (x.shape[-2], x.shape[-1]))


class Statistics(nn.Module):
    """Named float32 buffers, zero until they are known.

    A cast of the model (`.to(torch.bfloat16)`) leaves them float32: differences of quantiles have few digits to lose.
    """

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Statistics":
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(self.get_buffer(name).device))
        return self

    def known(self) -> torch.Tensor:
        """Whether they were set, as one bool; decided by values, like the checkpoints that hold zeros until then."""
        return torch.stack([value.sum() != 0 for value in self.buffers()]).any()


class EfficientAD(nn.Module):
    """EfficientAD: images [B, 3, H, W] in [0, 1] -> `Detection`.

    t = (teacher(x) - mean) / std; (s1, s2) = student(x); a = ae(x); m_st = mean_c (t - s1)^2, m_ae = mean_c (a - s2)^2;
    both padded, resized to the image, M = 0.1 (m - q_a) / (q_b - q_a); the map is their mean, the score its maximum.

    Args:
        network: SmallNetwork (EfficientAD-S) or MediumNetwork (EfficientAD-M).
        out_channels: C of the teacher's features.
        padding: zero padding inside the networks.
        pad_maps: a border of 4 zeros around the maps before they are resized. As in anomalib it is on by default and
            independent of `padding`, though it is meant for networks without padding.
    """

    def __init__(
        self,
        network: type[SmallNetwork] | type[MediumNetwork] = SmallNetwork,
        out_channels: int = 384,
        padding: bool = False,
        pad_maps: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels, self.pad_maps = out_channels, pad_maps
        self.teacher = network(out_channels, padding)
        self.student = network(2 * out_channels, padding)
        self.ae = AutoEncoder(out_channels, padding)
        self.mean_std = Statistics(mean=(1, out_channels, 1, 1), std=(1, out_channels, 1, 1))
        self.quantiles = Statistics(qa_st=(), qb_st=(), qa_ae=(), qb_ae=())

    def forward(self, x: torch.Tensor) -> Detection:
        """See the class."""
        m_st, m_ae = self.maps(x)
        q = self.quantiles
        known = q.known()
        m_st = self._scaled(m_st, q.qa_st, q.qb_st, known)
        m_ae = self._scaled(m_ae, q.qa_ae, q.qb_ae, known)
        anomaly_map = 0.5 * m_st + 0.5 * m_ae
        return Detection(anomaly_map.amax((1, 2, 3)), anomaly_map)

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Student-teacher and student-autoencoder map [B, 1, H, W], float32, before quantiles scale them."""
        t, (s1, s2), a = self._teacher(x), self.student(x).float().split(self.out_channels, dim=1), self.ae(x).float()
        m_st = ((t - s1) ** 2).mean(1, keepdim=True)
        m_ae = ((a - s2) ** 2).mean(1, keepdim=True)
        return self._resized(m_st, x), self._resized(m_ae, x)

    def _teacher(self, x: torch.Tensor) -> torch.Tensor:
        known = self.mean_std.known()
        std = torch.where(known, self.mean_std.std, 1.0)
        return (self.teacher(x).float() - self.mean_std.mean) / std

    def _resized(self, m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.pad_maps:
            m = F.pad(m, (4, 4, 4, 4))
        return F.interpolate(m, size=x.shape[-2:], mode="bilinear")

    @staticmethod
    def _scaled(m: torch.Tensor, low: torch.Tensor, high: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return (m - torch.where(known, low, 0.0)) * torch.where(known, 0.1 / (high - low), 1.0)


def small() -> EfficientAD:
    """EfficientAD-S for images from 256 x 256, in eval mode."""
    return EfficientAD(SmallNetwork).eval()


def medium() -> EfficientAD:
    """EfficientAD-M for images from 256 x 256, in eval mode."""
    return EfficientAD(MediumNetwork).eval()


def convert_sequential(state: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of nelson1425/EfficientAD under the names of `network`: the same convolutions in the same order.

    Args:
        state: of a teacher, student or autoencoder that is one nn.Sequential: "0.weight", "0.bias", "3.weight", ...
        network: the network that it is for.

    Raises:
        ValueError: another number of layers.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    places = sorted({int(key.partition(".")[0]) for key in state})
    if len(names) != len(places):
        raise ValueError(f"convert_sequential: the network has {len(names)} convolutions, the state dict {len(places)}")
    by_place = dict(zip(places, names, strict=True))
    return {f"{by_place[int(key.partition('.')[0])]}.{key.partition('.')[2]}": value for key, value in state.items()}


@torch.no_grad()
def calibrate(model: EfficientAD, train: Iterable[torch.Tensor], held_out: Iterable[torch.Tensor]) -> None:
    """Set the statistics of a model from normal images.

    The teacher's mean and deviation (divided by n) per channel, over all pixels of `train`, in float64 around the mean;
    the 0.9 and 0.995 quantiles of both maps, over all pixels of `held_out`, interpolated, however many there are.

    Args:
        model: changed in place.
        train: batches of images [B, 3, H, W] in [0, 1].
        held_out: the same, images that it was not trained on.

    Raises:
        ValueError: no image, a channel of the teacher that never changes, a map whose quantiles are equal.
    """
    mean, std = _channel_statistics(model.teacher(batch) for batch in train)
    dead = (~(std > 0)).nonzero().flatten().tolist()
    if dead:
        raise ValueError(f"calibrate: channel {dead[0]} of the teacher is the same at every pixel of train")
    model.mean_std.mean.copy_(mean.view_as(model.mean_std.mean))
    model.mean_std.std.copy_(std.view_as(model.mean_std.std))
    maps = [tuple(m.flatten() for m in model.maps(batch)) for batch in held_out]
    if not maps:
        raise ValueError("calibrate: held_out has no image")
    for name, values in zip(("st", "ae"), (torch.cat(part) for part in zip(*maps, strict=True)), strict=True):
        low, high = quantiles(values, (LOW, HIGH))
        if not low < high:
            raise ValueError(f"calibrate: the quantiles of the {name} map are equal ({low:.6g}): give more images")
        model.quantiles.get_buffer(f"qa_{name}").fill_(low)
        model.quantiles.get_buffer(f"qb_{name}").fill_(high)


def _channel_statistics(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [C] of features [B, C, h, w], float64, merged batch by batch (Chan et al., 1983)."""
    count, mean, spread = 0, torch.zeros(()), torch.zeros(())
    for features in batches:
        x = features.double().transpose(0, 1).flatten(1)
        n, x_mean = x.shape[1], x.mean(1)
        difference, total = x_mean - mean, count + n
        mean = mean + difference * (n / total)
        spread = spread + (x - x_mean[:, None]).square().sum(1) + difference.square() * (count * n / total)
        count = total
    if not count:
        raise ValueError("calibrate: train has no image")
    return mean, (spread / count).sqrt()


def quantiles(values: torch.Tensor, at: tuple[float, ...]) -> list[float]:
    """Quantiles of any number of values, interpolated linearly in float64 (torch.quantile stops at 2^24 values)."""
    ordered = values.sort().values
    found = []
    for q in at:
        place = q * (len(ordered) - 1)
        below = math.floor(place)
        low, high = (float(ordered[min(i, len(ordered) - 1)]) for i in (below, below + 1))
        found.append(low + (high - low) * (place - below))
    return found
