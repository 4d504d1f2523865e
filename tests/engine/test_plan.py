"""The plan file: what is in it, and that nothing damaged, foreign or unfitting is ever loaded."""

import contextlib
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planmill.engine import Plan, PlanError, Session
from planmill.engine import machine as machine_module
from planmill.engine.machine import this_machine
from planmill.engine.manifest import Manifest, TensorRT
from planmill.engine.plan import _seal, check_destination


def test_manifest(perceptron_plan: Plan) -> None:
    manifest = Plan.read(perceptron_plan.path).manifest
    assert manifest == perceptron_plan.manifest
    assert manifest.target == "aoti"
    assert manifest.precision == "fp32"
    assert manifest.layout == "contiguous"
    assert [(t.name, t.dtype, t.shape) for t in manifest.inputs] == [("x", "float32", ["batch", 6])]
    assert [(t.name, t.dtype, t.shape) for t in manifest.outputs] == [("output", "float32", ["batch", 3])]
    assert manifest.dynamic["batch"].model_dump() == {"minimum": 1, "optimum": 4, "maximum": 9}
    assert manifest.metadata == {"classes": ["a", "b", "c"], "scale": 0.5}
    assert manifest.versions.torch == torch.__version__
    assert manifest.platform == this_machine()
    assert manifest.build_time_s > 0
    assert [case["batch"] for case in manifest.receipt.cases] == [1, 3, 4, 9]
    (output,) = manifest.receipt.outputs
    assert 0 <= output.max_rel <= manifest.receipt.tolerance.max_rel
    assert output.cosine > 0.999999


def test_file_is_an_ordinary_zip(perceptron_plan: Plan) -> None:
    with zipfile.ZipFile(perceptron_plan.path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["manifest.json", "aoti.pt2"]
        assert json.loads(archive.read("manifest.json"))["format"] == 1


def _damaged(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(["flip", "cut", "append", "zero", "swap", "insert"])
    at = rng.randrange(len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "append":
        return data + rng.randbytes(rng.randrange(1, 300))
    if kind == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + b"\xff" + data[at + 65 :]
    if kind == "insert":
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    half = len(data) // 2
    return data[half:] + data[:half]


def test_any_damage_is_found(perceptron_plan: Plan, tmp_path: Path) -> None:
    data = perceptron_plan.path.read_bytes()
    rng = random.Random(0)
    path = tmp_path / "damaged.plan"
    for _ in range(200):
        damaged = _damaged(data, rng)
        assert damaged != data
        path.write_bytes(damaged)
        with pytest.raises(PlanError):
            Session(path)


def test_damage_to_the_zip_under_a_valid_seal(perceptron_plan: Plan, tmp_path: Path) -> None:
    """As a forger would do it: the directory and the headers of the zip are damaged, and the seal is made again."""
    data = perceptron_plan.path.read_bytes()
    rng = random.Random(1)
    path = tmp_path / "forged.plan"
    with zipfile.ZipFile(perceptron_plan.path) as archive:
        directory, manifest = archive.start_dir, archive.getinfo("manifest.json").file_size
    places = [*range(directory, len(data) - 85), *range(0, manifest + 200)]
    for _ in range(300):
        at = rng.choice(places)
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        with path.open("r+b") as file:
            _seal(file)
        # Some bytes of a zip mean nothing (times, attributes): then the plan must be read as it was.
        with contextlib.suppress(PlanError):
            assert Plan.read(path).manifest.payloads == perceptron_plan.manifest.payloads


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"not a plan" * 100, bytes(5000), b"PK\x05\x06" + bytes(18), b"planmill seal sha256:" + b"0" * 64],
    ids=["empty", "two bytes", "text", "zeros", "empty zip", "only a seal"],
)
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.plan"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"foreign\.plan: not a plan, or cut short"):
        Session(path)


def test_paths_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file"):
        Session(tmp_path / "missing.plan")
    with pytest.raises(PlanError, match="cannot be read"):
        Session(tmp_path)
    foreign = tmp_path / "weights.zip"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("manifest.json", "{}" * 100)
    with pytest.raises(PlanError, match="not a plan"):
        Session(foreign)


def _sealed_zip(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with path.open("w+b") as file:
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in members:
                archive.writestr(name, content)
            archive.comment = b" " * 85
        _seal(file)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [], "0 files named manifest.json"),
        (lambda m: [*m, m[0]], "2 files named manifest.json"),
        (lambda m: m[:1], "not just those its manifest names"),
        (lambda m: [*m, ("../../evil.so", b"x")], "not just those its manifest names"),
        (lambda m: [m[0], ("/tmp/aoti.pt2", m[1][1])], "not just those its manifest names"),
        (lambda m: [*m, m[1]], "not just those its manifest names"),
        (lambda m: [m[0], (m[1][0], m[1][1] + b"x")], "damaged: aoti.pt2 has"),
        (lambda m: [m[0], (m[1][0], m[1][1][:-1] + b"?")], "is not what the manifest says"),
        (lambda m: [(m[0][0], b" " * (9 << 20)), m[1]], "too large"),
        (lambda m: [(m[0][0], b"\xff\xfe"), m[1]], "not a plan"),
        (lambda m: [(m[0][0], b"[" * 100_000), m[1]], "not a plan"),
    ],
)
def test_zip_with_other_members(
    perceptron_plan: Plan, tmp_path: Path, change: Callable[[list[tuple[str, bytes]]], Any], message: str
) -> None:
    with zipfile.ZipFile(perceptron_plan.path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with pytest.raises(PlanError, match=message):
        Session(_sealed_zip(tmp_path / "forged.plan", change(members)))


def test_compressed_members_are_refused(perceptron_plan: Plan, tmp_path: Path) -> None:
    bomb = bytes(50 << 20)
    path = _sealed_zip(tmp_path / "bomb.plan", [("manifest.json", bomb)], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(PlanError, match=r"manifest\.json is compressed or encrypted"):
        Session(path)


def _leaves(node: Any, path: tuple = ()) -> list[tuple]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(leaf for key, child in children for leaf in _leaves(child, (*path, key)))]


def _any_json(rng: random.Random, depth: int = 0) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice([-1, 0, 1, 2**31, 2**63, 10**400]),
        lambda: rng.choice([-0.5, 0.0, 1e308, float("nan"), float("inf")]),
        lambda: rng.choice(["", "x", "../x", "batch", "float32", "\x00", "\ud800", "9" * 400, "__class__", "Tensor"]),
        lambda: [_any_json(rng, depth + 1) for _ in range(rng.randrange(3))],
        lambda: {str(_any_json(rng, 9)): _any_json(rng, depth + 1) for _ in range(rng.randrange(3))},
    ]
    return rng.choice(kinds[: 5 if depth > 3 else 7])()


def test_fuzzed_manifest(perceptron_plan: Plan, tmp_path: Path) -> None:
    """Any value in any place: always one PlanError (the payload does not fit even where the manifest is read)."""
    rng = random.Random(2)
    text = perceptron_plan.manifest.model_dump_json()
    places = [leaf for leaf in _leaves(json.loads(text)) if leaf]
    for _ in range(400):
        document = json.loads(text)
        where = rng.choice(places)
        node: Any = document
        for key in where[:-1]:
            node = node[key]
        if rng.random() < 0.3:
            del node[where[-1]]
        else:
            node[where[-1]] = _any_json(rng)
        members = [("manifest.json", json.dumps(document).encode()), ("aoti.pt2", b"x")]
        with pytest.raises(PlanError):
            Session(_sealed_zip(tmp_path / "fuzzed.plan", members))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"torch": "2.1.0+cpu"}}, r"built with torch 2\.1\.0, .*pip|install torch==2\.1\.0"),
        ({"platform": {"machine": "riscv128"}}, "built for linux on riscv128"),
        ({"platform": {"system": "plan9"}}, "built for plan9 on"),
        ({"platform": {"isa": ["avx2", "avx9000"]}}, "needs a CPU with avx9000"),
    ],
)
def test_plan_from_elsewhere(
    perceptron_plan: Plan, forge: Callable[..., Path], change: dict[str, dict[str, Any]], message: str
) -> None:
    ((field, parts),) = change.items()
    part = getattr(perceptron_plan.manifest, field).model_copy(update=parts)
    with pytest.raises(PlanError, match=message):
        Session(forge(**{field: part}))


def test_other_build_of_the_same_torch_is_fine(perceptron_plan: Plan, forge: Callable[..., Path]) -> None:
    versions = perceptron_plan.manifest.versions
    other = versions.model_copy(update={"torch": machine_module.release(torch.__version__) + "+elsewhere"})
    Session(forge(versions=other))


def test_other_format_and_target(forge: Callable[..., Path]) -> None:
    with pytest.raises(PlanError, match="of another plan format than 1"):
        Session(forge(format=2))
    with pytest.raises(PlanError, match="no target named 'tpu'; there is aoti"):
        Session(forge(target="tpu"))
    tensorrt = TensorRT(
        version="1.7.1.116",
        sms=[89],
        plugin_mode="none",
        plugins={},
        layers={},
        opset=20,
        profile={},
        builder_seconds=1.0,
    )
    with pytest.raises(PlanError, match="a plan of target 'aoti' has no TensorRT version"):
        Session(forge(tensorrt=tensorrt))


@pytest.mark.parametrize("name", ["../aoti.pt2", "/etc/passwd", "a/b", "..", "", "A", "x" * 65])
def test_payload_names_are_plain(perceptron_plan: Plan, name: str) -> None:
    document = json.loads(perceptron_plan.manifest.model_dump_json())
    document["payloads"][0]["name"] = name
    with pytest.raises(ValueError, match=r"payloads\.0\.name"):
        Manifest.model_validate_json(json.dumps(document))


def test_destination(tmp_path: Path) -> None:
    assert check_destination(tmp_path / "a.plan") == tmp_path / "a.plan"
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder.plan").mkdir()
    with pytest.raises(PlanError, match=r"folder\.plan: exists and is not a regular file"):
        check_destination(tmp_path / "folder.plan")
    with pytest.raises(PlanError, match="no directory"):
        check_destination(tmp_path / "missing" / "a.plan")
    with pytest.raises(PlanError, match=r"name ends in \.plan"):
        check_destination(tmp_path / "a.zip")
    with pytest.raises(PlanError, match="cannot write into /proc"):
        check_destination("/proc/a.plan")


def test_read_from_a_copy(perceptron_plan: Plan, tmp_path: Path) -> None:
    """A plan holds no path of the place where it was built."""
    path = tmp_path / "with space [1].plan"
    shutil.copy(perceptron_plan.path, path)
    assert Session(path)(torch.randn(2, 6)).shape == (2, 3)  # type: ignore[union-attr]
