"""`planmill inspect` with good pictures (gaussian, padim, bank): scores against oracles, files, options, errors."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.covariance import LedoitWolf
from typer.testing import CliRunner

from planmill.cli import app
from planmill.errors import PlanmillError
from planmill.inspection import Inspection, Settings, inspect_pictures
from planmill.inspection.backbones import resolve_backbone
from planmill.inspection.gaussians import LayerGaussians, PlaceGaussians

NET = """
import torch

class Net(torch.nn.Module):
    image_size, grid, mean, std = (16, 24), (2, 3), (0.5,), (0.5,)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(1, 5, 8, 8), torch.nn.Conv2d(1, 4, 8, 8)

    def forward(self, x):
        tokens = [layer(x).flatten(2).transpose(1, 2) for layer in (self.first, self.second)]
        tokens[1] = torch.where(x.amax((1, 2, 3))[:, None, None] < -0.99, torch.nan, tokens[1])  # a black picture
        return tokens, tokens[0].mean(1)

factory = Net
"""
SIZE = (48, 32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and under pictures/ 16 good pictures, 9 others of which two are odd, and one that is black."""
    root = tmp_path_factory.mktemp("gaussians")
    (root / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    wave = 90 + 40 * np.sin(np.arange(SIZE[0]) / 5)
    for folder, count in (("good", 16), ("test", 9)):
        (root / "pictures" / folder).mkdir(parents=True)
        for index in range(count):
            picture = wave + random.normal(0, 12, (SIZE[1], SIZE[0]))
            if folder == "test" and index in (3, 7):
                picture[4:20, 20:36] = 240
            Image.fromarray(picture.clip(1, 255).astype(np.uint8)).save(root / "pictures" / folder / f"{index}.png")
    Image.new("L", SIZE).save(root / "pictures" / "test" / "black.png")
    return root


def settings(root: Path, method: str, out: str, **changes: object) -> Settings:
    """Good pictures inside the folder of all."""
    values = {
        "images": root / "pictures", "out": root / out, "backbone": f"{root / 'net.py'}:factory", "batch": 4,
        "plans": root / "plans", "method": method, "good": root / "pictures" / "good",
    }  # fmt: skip
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["gaussian", "padim"])
def result(root: Path, request: pytest.FixtureRequest) -> Inspection:
    """Both methods on the same pictures and one plan."""
    return inspect_pictures(settings(root, request.param, request.param))


def features(root: Path, result: Inspection) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per layer [N, P, C] in float64 of the good pictures, and of those scored, in the order of the result."""
    backbone = resolve_backbone(result.settings.backbone)
    found = []
    good = sorted(path.relative_to(root / "pictures").as_posix() for path in (root / "pictures" / "good").iterdir())
    for files in (good, [picture.file for picture in result.pictures]):
        pictures = (Image.open(root / "pictures" / f).resize((24, 16), Image.Resampling.BICUBIC) for f in files)
        pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
        with torch.no_grad():
            tokens, _ = backbone.module(backbone.normalize(pixels.unsqueeze(1)))
        found.append([layer.double().numpy() for layer in tokens])
    return found[0], found[1]


def standard(x: np.ndarray) -> np.ndarray:
    """LayerNorm without weights."""
    return (x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + 1e-5)


def bilinear(patches: np.ndarray) -> np.ndarray:
    """Maxima of the maps at the input's size."""
    maps = torch.from_numpy(patches).view(-1, 1, 2, 3)
    full = torch.nn.functional.interpolate(maps, size=(16, 24), mode="bilinear", align_corners=True)
    return full.amax((1, 2, 3)).numpy()


def test_scores_are_those_of_the_method(root: Path, result: Inspection) -> None:
    """Oracle: scikit-learn's LedoitWolf (BSD-3), whose distances are squared, and NumPy."""
    good, others = features(root, result)
    got = np.array([picture.score for picture in result.pictures])
    if result.settings.method == "gaussian":
        whole, parts = np.zeros(len(got)), np.zeros((len(got), 6))
        for fitted, layer in zip(good, others, strict=True):
            whole += np.sqrt(LedoitWolf().fit(fitted.mean(1)).mahalanobis(layer.mean(1))) / 2
            of_patches = LedoitWolf().fit(fitted.reshape(-1, fitted.shape[2]))
            parts += np.sqrt(of_patches.mahalanobis(layer.reshape(-1, layer.shape[2]))).reshape(-1, 6) / 2
        np.testing.assert_allclose(got, whole, rtol=1e-3)
    else:
        fitted, new = (
            np.concatenate(
                [(x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + 1e-5) for x in layers], 2
            )
            for layers in (good, others)
        )
        parts = np.empty((len(got), 6))
        for p in range(6):
            precision = np.linalg.inv(np.cov(fitted[:, p].T) + 0.01 * np.eye(9))
            delta = new[:, p] - fitted[:, p].mean(0)
            parts[:, p] = np.sqrt(np.einsum("nc,cd,nd->n", delta, precision, delta))
        np.testing.assert_allclose(got, bilinear(parts), rtol=1e-3)
    np.testing.assert_allclose([picture.raw_score for picture in result.pictures], bilinear(parts), rtol=1e-3)
    np.testing.assert_allclose([p.scores.ravel() for p in result.pictures], parts, rtol=2e-3)


def test_odd_pictures_come_first_and_good_ones_are_not_scored(result: Inspection) -> None:
    files = [picture.file for picture in result.pictures]
    assert {*files[:2]} == {"test/3.png", "test/7.png"}
    assert sorted(files) == [f"test/{i}.png" for i in range(9)]
    assert [(entry.file, entry.reason) for entry in result.skipped] == [
        ("test/black.png", "the backbone gives NaN or infinity for it")
    ]
    assert result.good == 16
    assert list(result.stage_times_s) == ["load", "read", "plan", "fit", "score", "write"]


def test_the_files_say_what_was_done(result: Inspection) -> None:
    out, method = result.settings.out, result.settings.method
    summary = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert summary["settings"]["method"] == method
    assert summary["settings"]["good_pictures"] == 16
    assert summary["settings"]["dimensions"] == (100 if method == "padim" else None)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert ("PaDiM" in html, "Rippel" in html, "MuSc" in html) == (method == "padim", method == "gaussian", False)
    assert f"16 of {result.settings.good}" in html
    highest = max(picture.score for picture in result.pictures)
    assert f'max="{highest:.4f}" value="{highest:.4f}"' in html
    assert html.count('class="heat"') == 9


def test_a_score_depends_on_no_other_picture(root: Path, result: Inspection, tmp_path: Path) -> None:
    """One picture alone, in another batch size."""
    Image.open(root / "pictures" / "test" / "5.png").save(tmp_path / "5.png")
    alone = inspect_pictures(settings(root, result.settings.method, "alone", images=tmp_path, batch=1))
    together = next(picture for picture in result.pictures if picture.file == "test/5.png")
    assert alone.pictures[0].score == pytest.approx(together.score, rel=1e-5)
    np.testing.assert_allclose(alone.pictures[0].scores, together.scores, rtol=1e-4)


@pytest.mark.parametrize("method", ["gaussian", "padim"])
def test_the_model_in_batches_is_the_model_at_once(generator: torch.Generator, method: str) -> None:
    """And `shrinkage` is (1 - s) S + s (tr S / d) I."""
    tokens = [torch.randn(12, 6, width, generator=generator) * 3 + 1 for width in (5, 4)]
    scores = []
    for cuts in ((12,), (5, 7), (1, 1, 10)):
        model = LayerGaussians(0.3) if method == "gaussian" else PlaceGaussians(7, 0.3, torch.float32)
        model.fit(zip(*(layer.split(cuts) for layer in tokens), strict=True))
        scores.append(model.score(tokens))
    for patches, whole in scores[1:]:
        torch.testing.assert_close(patches, scores[0][0], rtol=1e-5, atol=1e-6)
        if whole is not None:
            torch.testing.assert_close(whole, scores[0][1], rtol=1e-5, atol=1e-6)
    if method == "gaussian":
        truth = torch.zeros(12, dtype=torch.float64)
        for layer in tokens:
            rows = layer.double().mean(1)
            s = torch.cov(rows.T, correction=0)
            s = 0.7 * s + 0.3 * s.trace() / len(s) * torch.eye(len(s))
            delta = rows - rows.mean(0)
            truth += (delta @ torch.linalg.inv(s) * delta).sum(1).sqrt() / 2
        torch.testing.assert_close(scores[0][1].double(), truth, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    else:
        assert math.isfinite(float(scores[0][0].sum()))


def test_channels_are_drawn_the_same_in_every_run(generator: torch.Generator) -> None:
    tokens = [torch.randn(9, 3, 20, generator=generator) for _ in range(2)]
    models = [PlaceGaussians(width, None, torch.float32) for width in (8, 8, 40)]
    for model in models:
        model.fit([tokens])
    one, again, every = (model.score(tokens)[0] for model in models)
    assert torch.equal(one, again)
    assert not torch.equal(one, every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mean", "--method mean: must be one of mutual, gaussian, padim"),
        ("padim", "--method padim needs --good FOLDER"),
        ("mutual --good @GOOD", "--good is an option of --method gaussian, padim, bank, not of mutual"),
        ("gaussian --good @GOOD --dimensions 4", "--dimensions is an option of --method padim, not of gaussian"),
        ("gaussian --good @GOOD --radius 1", "--radius is an option of --method mutual, not of gaussian"),
        ("padim --good @GOOD --dimensions 0", "--dimensions 0: must be at least 1"),
        ("padim --good @GOOD --shrinkage 1.5", "--shrinkage 1.5: must be from 0 to 1"),
        ("gaussian --good missing", "missing: no such folder"),
        ("gaussian --good @ALL", "holds the pictures to score"),
        ("gaussian --good @ONE", "only 1 picture can be used, and a covariance needs at least 2 (bad.png: empty file)"),
        ("gaussian --good @FEW --shrinkage 0", "3 good pictures are too few for a covariance of 5 channels; give more"),
        ("padim --good @FEW --shrinkage 0", "3 good pictures are too few for a covariance of 9 channels; give more"),
        ("gaussian --good @EQUAL", "the covariance of the 2 good pictures is singular"),
        ("padim --good @MIXED", "a.png (48 x 32) and b.png (32 x 48) differ in shape; give good pictures of one shape"),
        ("padim --good @UPRIGHT", "no picture can be used (good/0.png: other shape: 48 x 32 pixels, and the good"),
        ("padim --good @BLACK", "no picture can be used, and a covariance needs at least 2"),
        ("bank", "--method bank needs --bank FILE"),
        ("mutual --bank b", "--bank is an option of --method bank, not of mutual"),
        ("bank --bank b --extend", "--extend needs --good FOLDER"),
        ("bank --bank b --share 0.5", "--share is of the patches of --good"),
        ("bank --bank b --good @GOOD --share 0", "--share 0: must be above 0 and at most 1"),
        ("bank --bank missing.bank", "--bank missing.bank: no such file; --good FOLDER without --extend makes one"),
        ("bank --bank nowhere/b --good @GOOD", "--bank nowhere/b: no folder nowhere; create it first"),
        ("bank --bank @NET", "is no saved MemoryBank"),
        ("bank --bank @NET --good @GOOD", "exists; leave out --good to score against it, or add the good pictures"),
    ],
)
def test_mistakes(root: Path, tmp_path: Path, options: str, message: str) -> None:
    source = root / "pictures"
    good: list[Image.Image] = [Image.open(source / "good" / f"{index}.png") for index in range(3)]
    turned = [picture.rotate(90, expand=True) for picture in good]
    pictures: dict[str, list[Image.Image]] = {
        "FEW": good, "ONE": good[:1], "EQUAL": good[:1] * 2, "MIXED": [good[0], turned[1]], "UPRIGHT": turned,
        "BLACK": [Image.new("L", SIZE)] * 2,
    }  # fmt: skip
    method = options.replace("@GOOD", str(source / "good")).replace("@ALL", str(source))
    method, *rest = method.replace("@NET", str(root / "net.py")).split()
    for index, word in enumerate(rest):
        if word.startswith("@"):
            rest[index] = str(tmp_path / word[1:])
            (tmp_path / word[1:]).mkdir()
            for name, picture in zip("abc", pictures[word[1:]], strict=False):
                picture.save(tmp_path / word[1:] / f"{name}.png")
    if "@ONE" in options:
        (tmp_path / "ONE" / "bad.png").touch()
    command = ["inspect", str(source), "--out", str(tmp_path / "out"), "--backbone", f"{root / 'net.py'}:factory"]
    command += ["--plans", str(root / "plans"), "--batch", "4", "--method", method, *rest]
    found = CliRunner().invoke(app, command)
    assert isinstance(found.exception, PlanmillError), found.exception
    assert message in str(found.exception)


@pytest.fixture(scope="module")
def banked(root: Path) -> Inspection:
    """A bank of half the good patches, and the first scores against it."""
    return inspect_pictures(settings(root, "bank", "bank", bank=root / "parts.safetensors", share=0.5))


def test_a_bank_scores_like_patchcore(root: Path, banked: Inspection) -> None:
    """Oracle: pooling, distances and re-weighting restated in NumPy float64; the bank's own rows from its file."""
    _, others = features(root, banked)
    rows = load_file(root / "parts.safetensors")["features"].double().numpy()
    assert rows.shape == (16 * 6 // 2, 9)
    for picture, *layers in zip(banked.pictures, *others, strict=True):
        patches = np.concatenate([pooled(layer) for layer in layers], 1)
        distances = np.linalg.norm(patches[:, None] - rows, axis=2)
        np.testing.assert_allclose(picture.scores.ravel(), distances.min(1), rtol=1e-3, atol=1e-5)
        worst = distances.min(1).argmax()
        nearest = distances[worst].argmin()
        around = np.argsort(np.linalg.norm(rows - rows[nearest], axis=1), kind="stable")[:9]
        away = np.exp(distances[worst][around])
        weight = 1 - np.exp(distances[worst][nearest]) / away.sum()
        assert picture.score == pytest.approx(weight * distances.min(1).max(), rel=1e-3)
    assert {picture.file for picture in banked.pictures[:2]} == {"test/3.png", "test/7.png"}


def pooled(layer: np.ndarray) -> np.ndarray:
    """LayerNorm over the picture, the mean of 3 x 3 patches with zeros outside, unit rows: [P, C] of a 2 x 3 grid."""
    x = (layer - layer.mean()) / np.sqrt(layer.var() + 1e-5)
    grid = np.pad(x.reshape(2, 3, -1), ((1, 1), (1, 1), (0, 0)))
    mean = sum(grid[i : i + 2, j : j + 3] for i in range(3) for j in range(3)) / 9
    rows = np.asarray(mean).reshape(6, -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.slow
def test_a_bank_is_used_and_extended_in_other_processes(root: Path, banked: Inspection, tmp_path: Path) -> None:
    bank = tmp_path / "parts.safetensors"
    shutil.copy(root / "parts.safetensors", bank)

    def run(out: str, *options: str) -> dict:
        command = [sys.executable, "-m", "planmill.cli", "inspect", str(root / "pictures" / "test"), "--json"]
        command += ["--out", str(tmp_path / out), "--backbone", f"{root / 'net.py'}:factory", "--batch", "4"]
        command += ["--plans", str(root / "plans"), "--method", "bank", "--bank", str(bank), *options]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout)

    again = run("again")
    here = {Path(picture.file).name: picture.score for picture in banked.pictures}
    there = {picture["file"]: picture["score"] for picture in again["pictures"]}
    assert there == pytest.approx(here, rel=1e-6)
    assert again["settings"]["good"] is None
    before = load_file(bank)["features"]
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(root / "pictures" / "test" / "3.png", odd)
    after = run("after", "--good", str(odd), "--extend", "--share", "1")
    grown = load_file(bank)["features"]
    assert torch.equal(grown[: len(before)], before)
    assert len(grown) == len(before) + 6
    extended = {picture["file"]: picture["raw_score"] for picture in after["pictures"]}
    assert extended["3.png"] == pytest.approx(0, abs=1e-3)
    assert extended["7.png"] < there["7.png"]


def test_a_bank_of_another_backbone_is_refused(root: Path, banked: Inspection, tmp_path: Path) -> None:
    other = tmp_path / "net.py"
    other.write_text(NET.replace("manual_seed(0)", "manual_seed(1)"))
    changed = settings(root, "bank", "other", bank=root / "parts.safetensors", good=None, backbone=f"{other}:factory")
    with pytest.raises(PlanmillError, match=r"parts.safetensors.*extractor|extractor.*parts.safetensors"):
        inspect_pictures(changed)
