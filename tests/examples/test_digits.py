"""The digits example: the weights that are committed, the split, and the trays."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


def load(name: str) -> ModuleType:
    """A module of the example, from its file."""
    spec = importlib.util.spec_from_file_location(f"digits_{name}", DIGITS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data() -> ModuleType:
    """data.py"""
    return load("data")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    """model.py"""
    return load("model")


@torch.no_grad()
def test_the_committed_weights_reach_97_percent_on_held_out_digits(data: ModuleType, digits: ModuleType) -> None:
    held_out = data.load()[1]
    logits = digits.load_model()(data.to_tensor(held_out.pictures, digits.MEAN, digits.STD))
    assert (logits.argmax(1).numpy() == held_out.labels).mean() >= 0.97


def test_the_split_is_45_percent_stratified_and_disjoint(data: ModuleType) -> None:
    train, held_out = data.load()
    assert len(held_out.labels) == round(0.45 * 1797)
    assert len(train.labels) + len(held_out.labels) == 1797
    shares = [np.bincount(part.labels) / len(part.labels) for part in (train, held_out)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.005)


def test_the_model_is_what_it_says(digits: ModuleType) -> None:
    model = digits.load_model()
    assert not model.training
    assert 0.4e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.6e6
    assert digits.WEIGHTS.stat().st_size < 2.5e6


@torch.no_grad()
def test_the_backbone_is_the_classifier_seen_from_inside(digits: ModuleType) -> None:
    model, backbone = digits.load_model(), digits.factory(layers=(1, 3))
    x = torch.randn(3, 1, 32, 32)
    tokens, descriptor = backbone(x)
    assert [layer.shape for layer in tokens] == [(3, 64, 96), (3, 64, 96)]
    torch.testing.assert_close(model.head(descriptor), model(x))


def test_a_tray_holds_held_out_digits_once_each(data: ModuleType) -> None:
    held_out = data.load()[1]
    for normal in range(10):
        tray, intruder = data.tray(normal)
        assert (len(tray.labels), intruder.sum()) == (68, 8)
        assert ((tray.labels != normal) == intruder).all()
    known = {picture.tobytes() for picture in held_out.pictures}
    assert all(picture.tobytes() in known for picture in tray.pictures)


def test_few_shots_are_classified_as_scikit_learn_does_or_better(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["few_shots.py", "--seeds", "3"])
    assert load("few_shots").main() == 0
    printed = capsys.readouterr().out
    assert printed.count("naive Bayes") == printed.count("retrieval") == 5
    assert "as expected" in printed
