"""The zoo: public checkpoints load under their published names, and the networks compute what the published ones do.

Oracles: anomalib's EfficientAdModel (Apache-2.0) and DraemModel (Apache-2.0; its networks are VitjanZ's, MIT).
SimpleNet is compared with the unfold-and-pool form of its paper, restated here.
"""

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

ZOO = Path(__file__).resolve().parents[2] / "examples" / "zoo"


class Batch(NamedTuple):
    """anomalib's result."""

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor


def load_file(name: str, path: Path) -> ModuleType:
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def efficient_ad() -> ModuleType:
    """efficient_ad.py"""
    return load_file("zoo_efficient_ad", ZOO / "efficient_ad.py")


@pytest.fixture(scope="module")
def simple_net() -> ModuleType:
    """simple_net.py"""
    return load_file("zoo_simple_net", ZOO / "simple_net.py")


@pytest.fixture(scope="module")
def draem() -> ModuleType:
    """draem.py"""
    return load_file("zoo_draem", ZOO / "draem.py")


@pytest.fixture(scope="module")
def anomalib_networks() -> Iterator[Callable[[str], ModuleType]]:
    """anomalib's own modules of networks by name, without the ten seconds that importing the whole package takes."""
    package = importlib.util.find_spec("anomalib")
    assert package is not None
    assert package.submodule_search_locations is not None
    models = Path(package.submodule_search_locations[0]) / "models" / "image"
    data, layers = ModuleType("anomalib.data"), ModuleType("anomalib.models.components.layers")
    vars(data)["InferenceBatch"] = Batch  # all that the networks import from the package is a tuple,
    vars(layers)["SSPCAB"] = nn.Module  # and a block that none of them holds
    packages = [ModuleType(name) for name in ("anomalib", "anomalib.models", "anomalib.models.components")]
    with pytest.MonkeyPatch.context() as patch:
        for module in (*packages, data, layers):
            patch.setitem(sys.modules, module.__name__, module)
        yield lambda name: load_file(f"anomalib_{name}", models / name / "torch_model.py")


@pytest.fixture(scope="module")
def anomalib_ad(anomalib_networks: Callable[[str], ModuleType]) -> ModuleType:
    """anomalib's EfficientAD"""
    return anomalib_networks("efficient_ad")


def randomized(model: nn.Module, generator: torch.Generator, calibrated: bool = True) -> nn.Module:
    """Every statistic of an anomalib model drawn, as calibration would have left them."""
    lows = {"mean": 0.2, "std": 0.2, "qa_st": 0.7, "qb_st": 1.1, "qa_ae": 0.5, "qb_ae": 0.8}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 4 and not name.startswith("mean_std"):
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
            low = lows.get(name.rpartition(".")[2])
            if low is not None:
                value.copy_(low + 0.2 * torch.rand(value.shape, generator=generator) if calibrated else 0 * value)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("padding", "pad_maps", "calibrated", "size"),
    [(False, True, True, (256, 256)), (True, False, True, (256, 320)), (False, True, False, (256, 256))],
    ids=["published", "padded", "uncalibrated"],
)
def test_a_state_dict_of_anomalib_loads_and_gives_its_maps(
    efficient_ad: ModuleType,
    anomalib_ad: ModuleType,
    generator: torch.Generator,
    padding: bool,
    pad_maps: bool,
    calibrated: bool,
    size: tuple[int, int],
) -> None:
    theirs = anomalib_ad.EfficientAdModel(teacher_out_channels=16, padding=padding, pad_maps=pad_maps)
    randomized(theirs, generator, calibrated)
    ours = efficient_ad.EfficientAD(out_channels=16, padding=padding, pad_maps=pad_maps).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, *size, generator=generator)
    got, wanted = ours(x), theirs(x)
    assert got.anomaly_map.shape == (1, 1, *size)
    torch.testing.assert_close(got.anomaly_map, wanted.anomaly_map, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pred_score, wanted.pred_score.flatten(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_medium_network_has_the_names_and_sums_of_anomalib(
    efficient_ad: ModuleType, anomalib_ad: ModuleType, generator: torch.Generator
) -> None:
    theirs = anomalib_ad.EfficientAdModel(model_size=anomalib_ad.EfficientAdModelSize.M)
    ours = efficient_ad.medium()
    ours.load_state_dict(randomized(theirs, generator).state_dict())
    x = torch.rand(2, 3, 52, 60, generator=generator)  # the smallest that the network takes, and wider
    for name in ("teacher", "student"):
        torch.testing.assert_close(ours.get_submodule(name)(x), theirs.get_submodule(name)(x))


@torch.no_grad()
def test_sequential_checkpoints_are_renamed(efficient_ad: ModuleType, generator: torch.Generator) -> None:
    # As nelson1425/EfficientAD (Apache-2.0) builds PDN-S: convolution, ReLU, pooling, ...
    convolutions = [nn.Conv2d(3, 128, 4), nn.Conv2d(128, 256, 4), nn.Conv2d(256, 256, 3), nn.Conv2d(256, 24, 4)]
    a, b, c, d = convolutions
    published = nn.Sequential(a, nn.ReLU(), nn.AvgPool2d(2, 2), b, nn.ReLU(), nn.AvgPool2d(2, 2), c, nn.ReLU(), d)
    network = efficient_ad.SmallNetwork(24)
    network.load_state_dict(efficient_ad.convert_sequential(published.state_dict(), network))
    x = torch.rand(1, 3, 48, 48, generator=generator)
    torch.testing.assert_close(network(x), published(efficient_ad.normalize(x)))
    autoencoder = efficient_ad.AutoEncoder(24)
    places = [0, 2, 4, 6, 8, 10, *range(12, 37, 4), 38]  # resizing, convolution, ReLU, dropout in the decoder
    shapes = [m.weight.shape for m in autoencoder.modules() if isinstance(m, nn.Conv2d)]
    state = {f"{i}.weight": torch.randn(shape) for i, shape in zip(places, shapes, strict=True)}
    state |= {f"{i}.bias": torch.randn(shape[0]) for i, shape in zip(places, shapes, strict=True)}
    autoencoder.load_state_dict(efficient_ad.convert_sequential(state, autoencoder))
    assert autoencoder.decoder.deconv7.weight.equal(state["36.weight"])
    with pytest.raises(ValueError, match="the network has 14 convolutions, the state dict 4"):
        efficient_ad.convert_sequential(published.state_dict(), autoencoder)


class Maps(nn.Module):
    """Stands for an EfficientAD with cheap networks: only what `calibrate` touches is real."""

    def __init__(self, efficient_ad: ModuleType) -> None:
        super().__init__()
        self.teacher = nn.Conv2d(3, 4, 2)
        self.mean_std = efficient_ad.Statistics(mean=(1, 4, 1, 1), std=(1, 4, 1, 1))
        self.quantiles = efficient_ad.Statistics(qa_st=(), qb_st=(), qa_ae=(), qb_ae=())

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two maps that differ."""
        return x[:, :1] ** 2, x[:, 1:2] ** 3


def test_calibration_equals_numpy_and_survives_a_large_mean(
    efficient_ad: ModuleType, generator: torch.Generator
) -> None:
    model = Maps(efficient_ad).requires_grad_(False)
    model.teacher.bias = nn.Parameter(
        torch.full((4,), 3000.0), requires_grad=False
    )  # E[x^2] - E[x]^2 in float32 would leave no digit of the deviation
    train = [torch.rand(n, 3, 9, 9, generator=generator) for n in (3, 1, 4)]
    held_out = [torch.rand(n, 3, 33, 17, generator=generator) for n in (2, 3)]
    efficient_ad.calibrate(model, train, held_out)
    features = torch.cat([model.teacher.double()(x.double()) for x in train]).transpose(0, 1).flatten(1).numpy()
    model.teacher.float()
    assert np.allclose(model.mean_std.mean.flatten(), features.mean(1), rtol=1e-6)
    assert np.allclose(model.mean_std.std.flatten(), features.std(1), rtol=1e-3)
    for name, wanted in zip(("st", "ae"), model.maps(torch.cat(held_out)), strict=True):
        for end, q in (("a", 0.9), ("b", 0.995)):
            found = float(model.quantiles.get_buffer(f"q{end}_{name}"))
            assert found == pytest.approx(np.quantile(wanted.double().numpy(), q), rel=1e-6)
    assert efficient_ad.quantiles(torch.tensor([3.0]), (0.9,)) == [3.0]
    for train_bad, held_bad, message in (
        ([], held_out, "train has no image"),
        (train, [], "held_out has no image"),
        ([torch.zeros(2, 3, 9, 9)], held_out, "channel 0 of the teacher is the same at every pixel"),
        (train, [torch.ones(2, 3, 9, 9)], "the quantiles of the st map are equal"),
    ):
        with pytest.raises(ValueError, match=message):
            efficient_ad.calibrate(model, train_bad, held_bad)


def test_statistics_stay_float32_when_the_model_is_cast(efficient_ad: ModuleType) -> None:
    model = Maps(efficient_ad)
    model.quantiles.qb_st.fill_(1.2345678)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    assert cast.teacher.weight.dtype == torch.bfloat16
    assert cast.quantiles.qb_st.equal(model.quantiles.qb_st)


class Published(nn.Module):
    """SimpleNet's head as its paper and code say it: unfold, resize, pool twice, adapter, discriminator, blur."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.adapter = nn.Linear(width, width)
        self.first, self.norm, self.tail = (
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, 1, bias=False),
        )

    def forward(self, layers: list[torch.Tensor], image: tuple[int, int]) -> tuple[torch.Tensor, np.ndarray]:
        b, _, h, w = layers[0].shape
        pooled = []
        for x in layers:
            patches = F.unfold(x, 3, padding=1).view(b, -1, *x.shape[2:])  # (channel, row, column) first
            patches = F.interpolate(patches, size=(h, w), mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
            pooled.append(F.adaptive_avg_pool1d(patches[:, None], self.width)[:, 0])
        stacked = torch.stack(pooled, dim=1).flatten(1)[:, None]
        rows = self.adapter(F.adaptive_avg_pool1d(stacked, self.width)[:, 0])
        scores = -self.tail(F.leaky_relu(self.norm(self.first(rows)), 0.2)).view(b, h, w)
        resized = F.interpolate(scores[:, None], size=image, mode="bilinear")[:, 0]
        return scores.flatten(1).max(1).values, np.stack([gaussian_filter(m, sigma=4) for m in resized.numpy()])


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "width", "grid", "deep", "image"),
    [((512, 1024), 1536, (9, 7), (5, 4), (40, 33)), ((64, 128), 192, (6, 6), (3, 3), (20, 20))],
    ids=["paper", "small"],
)
def test_simple_net_equals_the_published_form(
    simple_net: ModuleType,
    generator: torch.Generator,
    channels: tuple[int, int],
    width: int,
    grid: tuple[int, int],
    deep: tuple[int, int],
    image: tuple[int, int],
) -> None:
    published = Published(width, 24).eval()
    published.norm.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
    published.norm.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
    head = simple_net.SimpleNetHead(channels, width, 24, grid, image).eval()
    state = {
        "pre_projection": {f"layers.0fc.{k}": v for k, v in published.adapter.state_dict().items()},
        "discriminator": {
            **{f"body.block1.0.{k}": v for k, v in published.first.state_dict().items()},
            **{f"body.block1.1.{k}": v for k, v in published.norm.state_dict().items()},
            "tail.weight": published.tail.weight,
        },
    }
    simple_net.load_checkpoint(head, state)
    layer2 = torch.randn(2, channels[0], *grid, generator=generator)
    layer3 = torch.randn(2, channels[1], *deep, generator=generator)
    score, anomaly_map = head(layer2, layer3)
    wanted_score, wanted_map = published([layer2, layer3], image)
    torch.testing.assert_close(score, wanted_score, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(anomaly_map.numpy(), wanted_map, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds no 'discriminator', but pre_projection"):
        simple_net.load_checkpoint(head, {"pre_projection": state["pre_projection"]})
    with pytest.raises(ValueError, match="width 1000 must divide 18 times the channels"):
        simple_net.SimpleNetHead(width=1000)
    with pytest.raises(ValueError, match="do not split into periods"):
        simple_net.Stencil(3, 6)


@torch.no_grad()
def test_draem_has_the_names_and_maps_of_anomalib(
    draem: ModuleType, anomalib_networks: Callable[[str], ModuleType], generator: torch.Generator
) -> None:
    module = anomalib_networks("draem")
    with torch.device("meta"):
        theirs, ours = module.DraemModel(), draem.draem()
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    theirs.reconstructive_subnetwork = module.ReconstructiveSubNetwork(base_width=8)
    theirs.discriminative_subnetwork = module.DiscriminativeSubNetwork(6, 2, base_width=4)
    for name, value in theirs.state_dict().items():
        if value.dtype == torch.float32:
            value.copy_(2 * torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
    ours = draem.DRAEM(width=8).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 64, 96, generator=generator)
    got, wanted = ours(x), theirs.eval()(x)
    assert wanted.anomaly_map.max() - wanted.anomaly_map.min() > 0.1
    torch.testing.assert_close(got.anomaly_map[:, 0], wanted.anomaly_map, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pred_score, wanted.pred_score, rtol=1e-5, atol=1e-6)
    # The two checkpoints of VitjanZ/DRAEM, and the paper's score.
    twin = draem.DRAEM(mean_size=21, width=8).eval()
    parts = (theirs.reconstructive_subnetwork.state_dict(), theirs.discriminative_subnetwork.state_dict())
    draem.load_checkpoints(twin, *parts)
    means = F.conv2d(F.pad(wanted.anomaly_map[:, None], (10, 10, 10, 10)), torch.full((1, 1, 21, 21), 1 / 441))
    torch.testing.assert_close(twin(x).pred_score, means.amax((1, 2, 3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="mean_size must be odd and positive, got 2"):
        draem.DRAEM(mean_size=2)
