"""MemoryBank: parity with anomalib (Apache-2.0) and with the paper's formulas in float64; fit, files and messages."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from planmill.kernels.neighbors import MemoryBank, choose_coreset


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows around twelve centres, as patches are."""
    return normal(12, width, seed=99)[torch.arange(count) % 12] + 0.3 * normal(count, width, seed=seed)


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture(scope="module")
def anomalib() -> Iterator[SimpleNamespace]:
    """anomalib's own files of PatchCore and of its sampling, without the ten seconds that importing the package takes.

    What stands in for the rest of the package is not called here: feature extraction and drawing.
    """
    spec = importlib.util.find_spec("anomalib")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    models = Path(spec.submodule_search_locations[0]) / "models"

    def load(name: str, path: Path) -> ModuleType:
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None
        assert found.loader is not None
        loaded = importlib.util.module_from_spec(found)
        patch.setitem(sys.modules, name, loaded)
        found.loader.exec_module(loaded)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        components, image = "anomalib.models.components", "anomalib.models.image.patchcore"
        for name in ("anomalib", "anomalib.models", "anomalib.models.image", image, components):
            patch.setitem(sys.modules, name, module(name, __path__=[]))
        reduction = f"{components}.dimensionality_reduction"
        patch.setitem(sys.modules, reduction, module(reduction, __path__=[]))
        projection = load(
            f"{reduction}.random_projection",
            models / "components" / "dimensionality_reduction" / "random_projection.py",
        )
        vars(sys.modules[reduction])["SparseRandomProjection"] = projection.SparseRandomProjection
        sampling = load("anomalib_sampling", models / "components" / "sampling" / "k_center_greedy.py")
        vars(sys.modules[components]).update(
            DynamicBufferMixin=type("DynamicBufferMixin", (), {}),
            KCenterGreedy=sampling.KCenterGreedy,
            TimmFeatureExtractor=lambda **_: nn.Identity(),
        )
        for name, contents in (
            ("anomalib.data", {"InferenceBatch": tuple}),
            ("anomalib.utils", {"deprecate": lambda **_: lambda function: function}),
            (f"{image}.anomaly_map", {"AnomalyMapGenerator": nn.Identity}),
        ):
            patch.setitem(sys.modules, name, module(name, **contents))
        model = load(f"{image}.torch_model", models / "image" / "patchcore" / "torch_model.py")
        yield SimpleNamespace(KCenterGreedy=sampling.KCenterGreedy, PatchcoreModel=model.PatchcoreModel)


def narrowest_choice(features: torch.Tensor, chosen: list[int]) -> float:
    """By how much the farthest row leads the second at its narrowest, relative to its distance; in float64."""
    f, narrowest = features.double(), torch.inf
    nearest = (f - f[chosen[0]]).norm(dim=1)
    for row in chosen[1:]:
        first, second = nearest.topk(2).values.tolist()
        narrowest = min(narrowest, (first - second) / first)
        nearest = nearest.minimum((f - f[row]).norm(dim=1))
    return narrowest


def test_the_rows_that_anomalib_chooses(anomalib: SimpleNamespace) -> None:
    compared = 0
    for seed in range(6):
        x = clusters(600, 400, seed=seed)
        torch.manual_seed(seed)
        sampler = anomalib.KCenterGreedy(x, 0.1)
        want = sampler.select_coreset_idxs()
        assert sampler.features.shape[1] < x.shape[1], "anomalib no longer projects"
        if narrowest_choice(sampler.features, want) > 1e-5:  # else float32 decides, on each machine in its own way
            assert choose_coreset(sampler.features, 60, start=want[0]).tolist() == want
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("neighbours", [1, 9, 300])
def test_the_scores_of_anomalib(anomalib: SimpleNamespace, neighbours: int) -> None:
    bank = MemoryBank.fit(clusters(1400, 64), count=140, reweighting=neighbours)
    model = anomalib.PatchcoreModel(["layer2"], num_neighbors=neighbours)
    model.memory_bank = bank.features
    x = clusters(3 * 50, 64, seed=5)
    want, rows = model.nearest_neighbors(x, 1)
    images = model.compute_anomaly_score(want.view(3, 50), rows.view(3, 50), x)
    scores, image_scores = bank(x.view(3, 50, 64))
    torch.testing.assert_close(scores.flatten(), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(bank.search(x, 1)[1][:, 0].long(), rows)
    torch.testing.assert_close(image_scores, images, atol=1e-4, rtol=1e-4)
    want, rows = model.nearest_neighbors(x, 5)
    got, found = bank.search(x, 5)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.long(), rows)


def patchcore(x: torch.Tensor, bank: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of one image, from the paper's formulas, in float64 and by differences."""
    x, bank = x.double(), bank.double()
    away = (x[:, None] - bank).square().sum(2).sqrt()
    scores, row = away.min(1)
    p = int(scores.argmax())
    around = (bank - bank[row[p]]).square().sum(1).argsort(stable=True)[:b]
    weight = 1 - away[p, row[p]].exp() / away[p, around].exp().sum()
    return scores, weight * scores[p]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_formulas_of_the_paper(dtype: torch.dtype) -> None:
    bank = MemoryBank.fit(clusters(900, 33).to(dtype), ratio=0.2, reweighting=4)
    x = clusters(2 * 3 * 40, 33, seed=7).view(2, 3, 40, 33).to(dtype)
    scores, image_scores = bank(x.transpose(0, 1))
    assert scores.shape == (3, 2, 40)
    assert image_scores.shape == (3, 2)
    for i in range(2):
        for j in range(3):
            want, image = patchcore(x[i, j], bank.features, 4)
            torch.testing.assert_close(scores[j, i].double(), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(image_scores[j, i].double(), image, atol=1e-5, rtol=1e-5)
    alone = bank(x[1, 2])
    assert torch.equal(alone[0], scores[2, 1])
    assert torch.equal(alone[1], image_scores[2, 1])


def test_rows_and_neighbours_of_a_bank() -> None:
    x = torch.cat([clusters(300, 20), clusters(40, 20), clusters(40, 20)])  # with copies
    bank = MemoryBank.fit(x, ratio=1.0, seed=4)
    assert torch.equal(bank.features, x[choose_coreset(x, 380, seed=4).long()])
    away = torch.cdist(bank.features.double(), bank.features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(bank.neighbors[:, 0], torch.arange(380, dtype=torch.int32))
    torch.testing.assert_close(away.gather(1, bank.neighbors.long()), away.sort(1).values[:, :9], atol=1e-6, rtol=1e-6)
    assert all(len(set(row)) == 9 for row in bank.neighbors.tolist())


def test_more_copies_than_neighbours() -> None:
    bank = MemoryBank(torch.ones(1200, 3), reweighting=3)
    assert torch.equal(bank.neighbors[:, 0], torch.arange(1200, dtype=torch.int32))
    torch.testing.assert_close(bank(torch.zeros(2, 3))[1], torch.tensor(3**0.5 * 2 / 3))


def test_a_stream_that_fits_gives_the_bank_of_the_whole() -> None:
    x = clusters(1000, 16)
    whole = MemoryBank.fit(x, seed=2)
    assert torch.equal(MemoryBank.fit(iter(x.split(37)), seed=2).features, whole.features)
    assert torch.equal(MemoryBank.fit(x.split(1000), seed=2, budget=1000).features, whole.features)


@pytest.mark.parametrize("size", [{"ratio": 0.05}, {"count": 50}], ids=str)
def test_a_stream_that_does_not_fit(size: dict[str, Any]) -> None:
    """The bank does not depend on how the stream is cut, never holds the whole, and covers nearly as well."""
    x = clusters(1000, 16)
    banks = [MemoryBank.fit(rows, budget=230, **size) for rows in (x, x.split(1), x.split(230), [x[:900], x[900:]])]
    for bank in banks:
        assert len(bank) == 50
        assert torch.equal(bank.features, banks[0].features)
        assert torch.equal(bank.neighbors, banks[0].neighbors)
    whole = MemoryBank.fit(x, **size)
    radius, best = (float(torch.cdist(x, b.features).amin(1).max()) for b in (banks[0], whole))
    assert best <= radius <= 1.5 * best


def test_a_bank_grows_by_what_it_does_not_cover() -> None:
    x = clusters(500, 24)
    bank = MemoryBank.fit(x, extractor="e")
    new = torch.cat([x[:90], x[:10] + 50])
    before = bank.features.clone()
    assert bank.extend(new.split(30), count=10) is bank
    assert torch.equal(bank.features[:50], before)
    assert bool((bank.features[50:] > 25).any(1).all()), "rows that the bank covers were added"
    assert torch.equal(bank.neighbors, MemoryBank(bank.features).neighbors)
    assert (bank.manifest.seen, bank.extractor) == (600, "e")


def test_a_saved_bank_is_the_same_bank(tmp_path: Path) -> None:
    path = tmp_path / "good.bank"
    bank = MemoryBank.fit(clusters(300, 8).half(), seed=3, projection=5, reweighting=4, extractor="vit.blocks.5")
    bank.save(path)
    loaded = MemoryBank.load(path, extractor="vit.blocks.5")
    x = clusters(20, 8, seed=1).half()
    for a, b in zip(bank(x), loaded(x), strict=True):
        assert torch.equal(a, b)
    assert loaded.manifest == bank.manifest
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["manifest"])
    assert (facts["extractor"], facts["rows"], facts["seen"], facts["metric"]) == ("vit.blocks.5", 30, 300, "l2")
    with pytest.raises(ValueError, match=r"holds features of 'vit\.blocks\.5', not of 'vit\.blocks\.6'"):
        MemoryBank.load(path, extractor="vit.blocks.6")
    empty = MemoryBank(reweighting=4)
    empty.load_state_dict(bank.state_dict())
    assert torch.equal(empty(x)[1], bank(x)[1])


def test_files_that_are_no_bank(tmp_path: Path) -> None:
    path = tmp_path / "some.bank"
    bank = MemoryBank.fit(clusters(60, 8))
    bank.save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    whole = path.read_bytes()
    tensors = {"features": bank.features, "neighbors": bank.neighbors}

    def changed(**facts: object) -> dict[str, str]:
        return {**metadata, "manifest": json.dumps({**json.loads(metadata["manifest"]), **facts})}

    for name, content in (
        ("is no saved MemoryBank", lambda: path.write_bytes(whole[: len(whole) // 2])),
        ("is no saved MemoryBank", lambda: path.write_bytes(b"no bank")),
        ("is no saved MemoryBank", lambda: save_file(tensors, path)),
        ("is no saved MemoryBank", lambda: save_file(tensors, path, {**metadata, "manifest": "{"})),
        ("is no saved MemoryBank", lambda: save_file(tensors, path, {**metadata, "manifest": "[1]"})),
        ("is no saved MemoryBank", lambda: save_file(tensors, path, {**metadata, "manifest": "{}"})),
        ("reweighting '9'", lambda: save_file(tensors, path, changed(reweighting="9"))),
        ("metric 'dot'", lambda: save_file(tensors, path, changed(metric="dot"))),
        ("rows of F64", lambda: save_file({**tensors, "features": bank.features.double()}, path, metadata)),
        ("NaN or infinity", lambda: save_file({**tensors, "features": bank.features / 0}, path, metadata)),
        ("do not fit", lambda: save_file({**tensors, "features": bank.features[:3]}, path, metadata)),
        ("no row of the bank", lambda: save_file({**tensors, "neighbors": bank.neighbors + 1}, path, metadata)),
    ):
        content()
        with pytest.raises(ValueError, match=name):
            MemoryBank.load(path)
    with pytest.raises(FileNotFoundError):
        MemoryBank.load(tmp_path / "absent")


def test_a_patch_that_is_not_finite_is_infinitely_strange() -> None:
    bank = MemoryBank.fit(clusters(60, 8))
    x = clusters(20, 8, seed=1).view(2, 10, 8)
    x[1, 4, 2] = torch.nan
    scores, image_scores = bank(x)
    assert scores.isinf().nonzero().tolist() == [[1, 4]]
    assert image_scores.isinf().tolist() == [False, True]
    assert torch.equal(image_scores[0], bank(x[0])[1])
    assert bank(x[:0])[1].shape == (0,)


def test_one_row_has_no_surroundings() -> None:
    torch.testing.assert_close(MemoryBank(torch.zeros(1, 4))(torch.ones(3, 4))[1], torch.tensor(2.0))


def test_compiled_and_exported() -> None:
    bank = MemoryBank.fit(clusters(90, 8))
    x = clusters(60, 8, seed=1).view(3, 20, 8)
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    auto = torch.export.Dim.AUTO
    program = torch.export.export(bank, (x,), dynamic_shapes=({0: auto, 1: auto},)).module()
    for function in (compiled, program):
        for a, b in zip(function(x), bank(x), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(program(x[:2, :7])[0], bank(x[:2, :7])[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, b: MemoryBank()(x), ValueError, "MemoryBank: the bank is empty; MemoryBank.fit makes one"),
        (lambda x, b: MemoryBank().search(x, 1), ValueError, "search: the bank is empty"),
        (lambda x, b: MemoryBank().extend(x), ValueError, "extend: the bank is empty"),
        (lambda x, b: MemoryBank().save("x"), ValueError, "save: the bank is empty"),
        (lambda x, b: b.search(x, 5), ValueError, "k must be from 1 to 4 in a bank of 4 rows, got 5"),
        (lambda x, b: b.search(x, 0), ValueError, "k must be from 1 to 4 in a bank of 4 rows, got 0"),
        (lambda x, b: b(x[:, :3]), ValueError, r"features must be \[..., 4\] like the bank, got \[6, 3\]"),
        (lambda x, b: b(x[0]), ValueError, r"features must be \[..., P, D\], got \[4\]"),
        (lambda x, b: b(x[:0]), ValueError, r"at least one patch, got \[0, 4\]"),
        (lambda x, b: b(x.half()), TypeError, "features must be torch.float32 like the bank, got torch.float16"),
        (lambda x, b: MemoryBank.fit(x[:0]), ValueError, "features hold no rows"),
        (lambda x, b: MemoryBank.fit(iter([])), ValueError, "features hold no rows"),
        (lambda x, b: MemoryBank.fit(x, count=7), ValueError, "count must be at most the 6 rows of features, got 7"),
        (lambda x, b: MemoryBank.fit(x, count=0), ValueError, "count must be at least 1, got 0"),
        (lambda x, b: MemoryBank.fit(x, ratio=0.0), ValueError, "ratio must be above 0 and at most 1, got 0.0"),
        (lambda x, b: MemoryBank.fit(x, budget=0), ValueError, "budget must be at least 1, got 0"),
        (lambda x, b: MemoryBank.fit(x, reweighting=0), ValueError, "reweighting must be from 1 to 1024, got 0"),
        (lambda x, b: MemoryBank.fit(x[None]), ValueError, r"features must be \[n, D\] with D at least 1"),
        (
            lambda x, b: MemoryBank.fit([x, x[:, :2]]),
            ValueError,
            r"must be \[n, 4\] like the rows before, got \[6, 2\]",
        ),
        (lambda x, b: MemoryBank.fit([x, x.half()]), TypeError, "must be torch.float32 like the rows before"),
        (lambda x, b: MemoryBank.fit([x, 3]), TypeError, "features must be tensors .*, got int"),
        (lambda x, b: MemoryBank.fit(3), TypeError, "a tensor or an iterable of tensors, got int"),
        (lambda x, b: MemoryBank.fit(x / (x != x[2])), ValueError, "row 2 of features holds NaN or infinity"),
        (lambda x, b: b.extend(x[:, :2]), ValueError, r"extend: features must be \[n, 4\] like the rows before"),
        (lambda x, b: b.extend(x.half()), TypeError, "extend: features must be torch.float32 like the rows before"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(6, 4), MemoryBank(normal(4, 4, seed=1)))
