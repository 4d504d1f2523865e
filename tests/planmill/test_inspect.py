"""`planmill inspect` end to end on real digits: scores, files, the plan's reuse, and errors. One plan is shared."""

import csv
import importlib.util
import io
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from planmill.cli import app, main
from planmill.errors import PlanmillError
from planmill.inspection import Inspection, Settings, inspect_pictures
from planmill.inspection.backbones import resolve_backbone
from planmill.inspection.outputs import heatmap_name
from planmill.inspection.plans import plan_key, plan_path

HOSTILE = "<script>alert('x') & \"y\" [bold]ü 日本.png"
TINY = """
import torch

class Tiny(torch.nn.Module):
    image_size, grid, mean, std = 8, (2, 2), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def forward(self, x):
        tokens = torch.nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return [tokens], tokens.mean(1)

factory = Tiny
"""
DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture(scope="session")
def data() -> ModuleType:
    """The example's data module."""
    spec = importlib.util.spec_from_file_location("digits_data", DIGITS / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plan is kept between tests."""
    return tmp_path_factory.mktemp("plans")


def write_tray(folder: Path, data: ModuleType, normal: int, intruders: int = 8, count: int = 60) -> dict[str, bool]:
    """A tray of held-out digits; which file is an intruder."""
    split, odd = data.tray(normal, intruders=intruders, count=count)
    folder.mkdir(parents=True)
    for index, picture in enumerate(split.pictures):
        Image.fromarray(picture).save(folder / f"{index:02d}.png")
    return {f"{index:02d}.png": bool(value) for index, value in enumerate(odd)}


@pytest.fixture(scope="session")
def messy(tmp_path_factory: pytest.TempPathFactory, data: ModuleType) -> Path:
    """A small tray with a hostile name, equal stems in two folders, unreadable pictures and a text file."""
    folder = tmp_path_factory.mktemp("messy") / "in"
    write_tray(folder, data, 3, intruders=2, count=8)
    (folder / "sub").mkdir()
    (folder / "00.png").rename(folder / "sub" / "01.png")
    Image.open(folder / "01.png").resize((48, 33)).convert("RGB").save(folder / "01.jpg")
    (folder / "02.png").rename(folder / HOSTILE)
    (folder / "empty.png").touch()
    (folder / "<b>text.png").write_text("no picture")
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="session")
def first(messy: Path, plans: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """The messy folder, inspected; this builds the plan."""
    return inspect_pictures(Settings(messy, tmp_path_factory.mktemp("first"), "digits", plans=plans))


@pytest.mark.parametrize("normal", [2, 8])
def test_intruders_score_higher(tmp_path: Path, data: ModuleType, plans: Path, first: Inspection, normal: int) -> None:
    intruders = write_tray(tmp_path / "in", data, normal)
    result = inspect_pictures(Settings(tmp_path / "in", tmp_path / "out", "digits", plans=plans))
    wanted = [intruders[picture.file] for picture in result.pictures]
    assert result.plan.origin == "reused"
    assert roc_auc_score(wanted, [picture.score for picture in result.pictures]) >= 0.97


@pytest.mark.parametrize("method", ["gaussian", "padim"])
def test_intruders_are_far_from_good_digits(
    tmp_path: Path, data: ModuleType, plans: Path, first: Inspection, method: Literal["gaussian", "padim"]
) -> None:
    """Good: 80 training digits of one class; scored: the tray of held-out ones."""
    intruders = write_tray(tmp_path / "in", data, 8)
    train = data.load()[0]
    (tmp_path / "good").mkdir()
    for index, picture in enumerate(train.pictures[train.labels == 8][:80]):
        Image.fromarray(picture).save(tmp_path / "good" / f"{index}.png")
    asked = Settings(tmp_path / "in", tmp_path / "out", "digits", plans=plans, method=method, good=tmp_path / "good")
    result = inspect_pictures(asked)
    wanted = [intruders[picture.file] for picture in result.pictures]
    assert result.good == 80
    assert roc_auc_score(wanted, [picture.score for picture in result.pictures]) >= 0.97


def test_what_is_reported_is_what_was_there(first: Inspection, messy: Path) -> None:
    files = [picture.file for picture in first.pictures]
    assert sorted(files) == sorted([*(f"0{i}.png" for i in (1, 3, 4, 5, 6, 7, 8, 9)), "01.jpg", "sub/01.png", HOSTILE])
    assert {entry.file: entry.reason for entry in first.skipped} == {
        "<b>text.png": "not a picture, or of a format that Pillow does not read",
        "empty.png": "empty file",
    }
    assert first.ignored == 1
    scores = [picture.score for picture in first.pictures]
    assert scores == sorted(scores, reverse=True)
    assert list(first.stage_times_s) == ["load", "read", "plan", "backbone", "score", "write"]
    assert first.plan.origin == "built"
    assert first.plan.why == "no plan for these weights and settings yet"


def test_scores_are_those_of_the_method(first: Inspection, messy: Path) -> None:
    """The raw scores, from the model without a plan and plain PyTorch in float64."""
    backbone = resolve_backbone("digits")
    files = [picture.file for picture in first.pictures]
    pixels = [np.asarray(Image.open(messy / f).convert("L").resize((32, 32), Image.Resampling.BICUBIC)) for f in files]
    with torch.no_grad():
        tokens, _ = backbone.module(backbone.normalize(torch.from_numpy(np.stack(pixels)).unsqueeze(1)))
    n, total = len(files), torch.zeros(len(files), 64, dtype=torch.float64)
    for layer in tokens:
        x = torch.nn.functional.layer_norm(layer.double(), layer.shape[1:]).transpose(1, 2).reshape(n, -1, 8, 8)
        for r in (1, 3, 5):
            z = torch.nn.functional.avg_pool2d(x, r, 1, r // 2).flatten(2).transpose(1, 2)
            z = torch.nn.functional.normalize(z, dim=2)
            a = torch.cdist(z.unsqueeze(1), z.unsqueeze(0)).amin(3)
            a[torch.arange(n), torch.arange(n)] = torch.inf
            total += a.sort(1).values[:, : int(0.3 * (n - 1))].mean(1) / (len(tokens) * 3)
    maps = torch.nn.functional.interpolate(total.view(n, 1, 8, 8), size=(32, 32), mode="bilinear", align_corners=True)
    expected = maps.amax((1, 2, 3))
    got = torch.tensor([picture.raw_score for picture in first.pictures], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_tables_hold_the_scores(first: Inspection) -> None:
    out = first.settings.out
    summary = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader(io.StringIO((out / "scores.csv").read_text(encoding="utf-8"), newline="")))
    assert summary["format"] == "planmill.inspection/1"
    assert summary["counts"] == {"scored": 11, "skipped": 2, "ignored": 1}
    assert [row["file"] for row in rows] == [entry["file"] for entry in summary["pictures"]]
    for row, entry, picture in zip(rows, summary["pictures"], first.pictures, strict=True):
        assert float(row["score"]) == entry["score"] == picture.score
        assert float(row["raw_score"]) == entry["raw_score"] == picture.raw_score
        assert int(row["rank"]) == entry["rank"]


def test_each_picture_has_a_heat_map_of_its_size(first: Inspection, messy: Path) -> None:
    names = [picture.heatmap for picture in first.pictures]
    assert len(set(names)) == len(names)
    low, high = first.scale
    for picture in first.pictures:
        image = Image.open(first.settings.out / picture.heatmap)
        assert image.size == picture.size == Image.open(messy / picture.file).size
        levels = np.asarray(image)
        assert image.mode == "P"
        assert low + levels.max() / 255 * (high - low) <= picture.scores.max() + (high - low) / 255


def test_the_report_is_self_contained_and_escapes_names(first: Inspection) -> None:
    html = (first.settings.out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>text" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;) &amp; &#34;y&#34; [bold]ü 日本.png" in html
    assert "http" not in html.replace('<meta http-equiv="Content-Security-Policy"', "")
    assert html.count('class="picture" src="data:image/jpeg;base64,') == 11
    assert html.count('class="heat" src="data:image/webp;base64,') == 11
    assert html.count(" alt=") == 22
    for title in ("Scores", "Time per stage", "Settings", "Skipped pictures"):
        assert f">{title}</h2>" in html


def test_nothing_is_written_into_the_pictures(first: Inspection, messy: Path) -> None:
    assert sum(path.is_file() for path in messy.rglob("*")) == 14


def test_order_of_files_and_batch_size_do_not_matter(
    first: Inspection, messy: Path, plans: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    names = {}
    for index, picture in enumerate(first.pictures):
        suffix = Path(picture.file).suffix
        names[f"{index:02d}{suffix}"] = picture
        shutil.copy(messy / picture.file, tmp_path / "in" / f"{index:02d}{suffix}")
    result = inspect_pictures(Settings(tmp_path / "in", tmp_path / "out", "digits", batch=3, plans=plans))
    assert result.plan.origin == "reused"
    assert result.plan.max_abs < 1e-4
    for picture in result.pictures:
        assert picture.score == pytest.approx(names[picture.file].score, abs=1e-4)
        assert picture.raw_score == pytest.approx(names[picture.file].raw_score, abs=1e-4)


def test_a_second_run_tidies_up_its_own_files_only(first: Inspection, messy: Path, plans: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(messy, source)
    inspect_pictures(Settings(source, out, "digits", plans=plans))
    (out / "mine.txt").write_text("keep")
    (out / "heatmaps" / "mine.png").write_text("keep")
    (source / "03.png").unlink()
    inspect_pictures(Settings(source, out, "digits", plans=plans))
    assert not (out / "heatmaps" / "03.png.png").exists()
    assert (out / "heatmaps" / "04.png.png").exists()
    assert (out / "mine.txt").read_text() == (out / "heatmaps" / "mine.png").read_text() == "keep"


def test_a_damaged_plan_is_built_again_and_said(messy: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(TINY)
    name, plans = f"{tmp_path / 'net.py'}:factory", tmp_path / "plans"
    plans.mkdir()
    damaged = plan_path(plans, resolve_backbone(name), "fp32", 8)
    damaged.write_bytes(b"no plan")
    result = inspect_pictures(Settings(messy, tmp_path / "out", name, plans=plans))
    assert (result.plan.origin, result.plan.path) == ("built", damaged)
    assert "the kept plan cannot be used" in result.plan.why
    assert damaged.stat().st_size > 1000


def test_other_weights_never_meet_the_kept_plan(first: Inspection, tmp_path: Path) -> None:
    backbone = resolve_backbone("digits")
    before = plan_key(backbone, "fp32", 8)
    assert before == plan_key(resolve_backbone("digits"), "fp32", 8)
    assert before != plan_key(backbone, "bf16", 8)
    assert before != plan_key(resolve_backbone("digits", layers=(1, 3)), "fp32", 8)
    with torch.no_grad():
        next(backbone.module.parameters()).view(-1)[0] += 1e-7
    assert before != plan_key(backbone, "fp32", 8)


def test_heat_map_names_are_mirrored_and_never_too_long() -> None:
    assert heatmap_name("a/b.jpg") == "heatmaps/a/b.jpg.png"
    assert heatmap_name("b.jpg") == "heatmaps/b.jpg.png"
    long = heatmap_name("d/" + "ü" * 125 + ".jpg")
    assert long.startswith("heatmaps/d/ü")
    assert len(long.rpartition("/")[2].encode()) <= 255


def test_json_is_all_there_is_on_standard_output(
    first: Inspection, messy: Path, plans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", str(messy), "--out", str(tmp_path), "--backbone", "digits", "--plans", str(plans), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["counts"] == {"scored": 11, "skipped": 2, "ignored": 1}


def test_the_summary_names_what_was_skipped_and_the_plan(
    first: Inspection, messy: Path, plans: Path, tmp_path: Path
) -> None:
    command = ["inspect", str(messy), "--out", str(tmp_path), "--backbone", "digits", "--plans", str(plans)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "skipped empty.png: empty file" in result.stdout
    assert "11 pictures scored, 2 skipped, 1 other files ignored" in result.stdout
    assert "plan: reused, checked again" in result.stdout
    assert f"wrote {tmp_path}/report.html" in result.stdout


def test_no_pictures_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    arguments = ["inspect", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--backbone", "digits"]
    monkeypatch.setattr("sys.argv", ["planmill", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert lines == [f"error: {tmp_path}/in: no pictures in this folder; it holds 1 other files"]
    assert not (tmp_path / "out").exists()


def test_nothing_readable_and_a_single_picture_are_errors(tmp_path: Path, data: ModuleType) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").touch()
    settings = Settings(source, tmp_path / "out", "digits")
    with pytest.raises(PlanmillError, match=r"no picture can be used.*at least 2 \(a\.png: empty file\)"):
        inspect_pictures(settings)
    Image.fromarray(data.load()[1].pictures[0]).save(source / "b.png")
    with pytest.raises(PlanmillError, match="only 1 picture can be used"):
        inspect_pictures(settings)


def test_the_output_may_not_lie_in_the_pictures(messy: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanmillError, match="never written to"):
        inspect_pictures(Settings(messy, messy / "out", "digits"))
    with pytest.raises(PlanmillError, match="never written to"):
        inspect_pictures(Settings(messy, messy, "digits"))
    (tmp_path / "file").touch()
    with pytest.raises(PlanmillError, match="exists and is not a folder"):
        inspect_pictures(Settings(messy, tmp_path / "file", "digits"))


@pytest.mark.parametrize("layers", ["a", "1,,2", "-1", "²"])
def test_layers_must_be_numbers(messy: Path, tmp_path: Path, layers: str) -> None:
    command = ["inspect", str(messy), "--out", str(tmp_path), "--backbone", "digits", f"--layers={layers}"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, PlanmillError)
    assert "give zero-based block numbers" in str(result.exception)
