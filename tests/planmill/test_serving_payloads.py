"""Bodies that anyone may send: right ones become tensors, wrong ones a 4xx and one sentence, and nothing else."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from planmill.engine import TensorSpec
from planmill.serving.payloads import (
    JSON,
    NPY,
    REQUESTS,
    SAFETENSORS,
    BadRequestError,
    ImageSettings,
    decode,
    encode,
)

X = TensorSpec(name="x", dtype="float32", shape=["batch", 3, 8, 8])
GRAY = TensorSpec(name="x", dtype="uint8", shape=["batch", 1, "height", "width"])
TOKENS = TensorSpec(name="tokens", dtype="int32", shape=["batch", 5])
KEEP = TensorSpec(name="keep", dtype="bool", shape=["batch"])
PLAIN = ImageSettings()


def npy(array: numpy.ndarray) -> bytes:
    file = io.BytesIO()
    numpy.save(file, array)
    return file.getvalue()


def image(array: numpy.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def as_json(inputs: Any) -> bytes:
    return json.dumps({"inputs": inputs}).encode()


def test_the_same_tensors_in_every_form(generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 8, 8, generator=generator)
    bodies = [(as_json(x.tolist()), JSON), (as_json({"x": x.tolist()}), JSON), (npy(x.numpy()), NPY)]
    bodies += [(npy(numpy.asfortranarray(x.numpy())), NPY), (npy(x.numpy().astype(">f4")), NPY)]
    bodies.append((save({"x": x}), SAFETENSORS))
    for body, kind in bodies:
        (got,) = decode(body, kind, [X], PLAIN)
        assert torch.equal(got, x)
    tokens, keep = torch.tensor([[0, -1, 2**31 - 1, 3, 4]], dtype=torch.int32), torch.tensor([True])
    both = decode(as_json({"keep": [True], "tokens": tokens.tolist()}), JSON, [TOKENS, KEEP], PLAIN)
    assert torch.equal(both[0], tokens)
    assert both[0].dtype == torch.int32
    assert torch.equal(both[1], keep)


def test_images(generator: torch.Generator) -> None:
    pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
    settings = ImageSettings(mean=(0.5, 0.25, 0.0), std=(0.5,))
    (got,) = decode(image(pixels.numpy()), "image/png", [X], settings)
    wanted = (pixels.permute(2, 0, 1)[None] / 255 - torch.tensor([0.5, 0.25, 0.0]).reshape(1, 3, 1, 1)) / 0.5
    torch.testing.assert_close(got, wanted)
    (large,) = decode(image(numpy.full((40, 16, 3), 255, numpy.uint8), "JPEG"), "image/jpeg", [X], PLAIN)
    torch.testing.assert_close(large, torch.ones(1, 3, 8, 8))  # resized
    gray = torch.randint(0, 256, (5, 7), generator=generator, dtype=torch.uint8)
    (got,) = decode(image(gray.numpy()), "image/png", [GRAY], PLAIN)
    assert torch.equal(got, gray[None, None])
    (got,) = decode(image(gray.numpy().astype(numpy.uint16) * 257), "image/png", [GRAY], PLAIN)
    assert torch.equal(got, gray[None, None])


def test_sixteen_bits_become_eight() -> None:
    values = numpy.array([[0, 128, 129, 257, 40_000, 65_535]], numpy.uint16)
    (got,) = decode(image(values), "image/png", [GRAY], PLAIN)
    assert got.flatten().tolist() == [0, 0, 1, 1, 156, 255]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (7, 300), (31, 3), (8, 8)], ids=str)
def test_resizing_stays_small_whatever_the_picture(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """A high and narrow picture for a wide input: Pillow alone would widen it at its full height."""
    pixels = torch.randint(0, 256, size[::-1], generator=generator, dtype=torch.uint8).numpy()
    wide = TensorSpec(name="x", dtype="uint8", shape=["batch", 1, 4, 700])
    steps = []
    plain = Image.Image.resize

    def resize(self: Image.Image, to: tuple[int, int], *args: Any) -> Image.Image:
        steps.append(to[0] * self.height)  # between the two passes
        return plain(self, to, *args)

    wanted = plain(Image.fromarray(pixels), (700, 4), Image.Resampling.BILINEAR)
    monkeypatch.setattr(Image.Image, "resize", resize)
    (got,) = decode(image(pixels), "image/png", [wide], PLAIN)
    assert (got[0, 0].int() - torch.from_numpy(numpy.array(wanted)).int()).abs().max() <= 1
    assert max(steps) <= max(700 * 4, size[0] * size[1])


def png_of(width: int, height: int) -> bytes:
    """A valid head of a PNG that claims any size, and little else."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for tag, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(64))),
        (b"IEND", b""),
    ):
        parts += [struct.pack(">I", len(data)), tag, data, struct.pack(">I", zlib.crc32(tag + data))]
    return b"".join(parts)


def npy_of(head: str) -> bytes:
    """A .npy file of a head alone."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head.encode() + b"\n"


def scans_of(count: int) -> bytes:
    """A JPEG that refines the same picture again and again: each scan is small and costs a pass over the picture."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 90).save(file, "JPEG", progressive=True)
    body = file.getvalue()
    scan = body[body.rfind(b"\xff\xda") : -2]
    return body[:-2] + scan * (count - body.count(b"\xff\xda")) + body[-2:]


HUGE = b"\x93NUMPY\x01\x00\x76\x00" + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000, 9000000), }".ljust(117) + b"\n"
)


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"", JSON, 400, "empty"),
        (b"{", JSON, 400, "not JSON"),
        (b"\xff\xfe", JSON, 400, "not JSON"),
        (b"[" * 100_000, JSON, 400, "not JSON"),
        (b"[1, 2]", JSON, 400, "must be"),
        (as_json(3), JSON, 400, "must be"),
        (as_json({"y": [1]}), JSON, 400, "the plan takes x; got y"),
        (as_json({"x": [1], "y": [1]}), JSON, 400, "got x, y"),
        (as_json({"x": [[1], [1, 2]]}), JSON, 400, "equal lengths"),
        (as_json({"x": [["1.5"]]}), JSON, 400, "lists of numbers"),
        (as_json({"x": [None]}), JSON, 400, "lists of numbers"),
        (as_json({"x": [True]}), JSON, 400, "got booleans"),
        (b'{"inputs": [NaN]}', JSON, 400, "NaN is no JSON number"),
        (b'{"inputs": [1' + b"0" * 6000 + b"]}", JSON, 400, "."),
        (as_json(["a" * 20_000] + [""] * 100_000), JSON, 400, "lists of numbers"),  # 8 GB as an array of strings
        (b"\x93NUMPY", NPY, 400, "not an .npy"),
        (b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': (".ljust(117) + b"\n", NPY, 400, "not an .npy"),
        (HUGE, NPY, 400, "cut short"),
        (npy(numpy.zeros(3))[:-1], NPY, 400, "cut short"),
        (npy(numpy.zeros(3)) + b"x", NPY, 400, "too long"),
        (npy(numpy.array(["a"])), NPY, 400, "<U1"),
        (npy_of("(" * 3000), NPY, 400, "not an .npy"),
        (npy_of("{'descr': 'S0', 'fortran_order': False, 'shape': (99999999999999999999,), }"), NPY, 400, "S0"),
        (npy_of("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999), }"), NPY, 400, "float32"),
        (b'{"inputs": [1e39]}', JSON, 400, "beyond float32"),
        (b'{"inputs": [-1e999]}', JSON, 400, "beyond float32"),
        (b"\xff" * 64, SAFETENSORS, 400, "not a safetensors"),
        (image(numpy.zeros((8, 8, 3), numpy.uint8))[:-30], "image/png", 400, "not a whole PNG"),
        (image(numpy.zeros((8, 8, 3), numpy.uint8)), "image/jpeg", 400, "not a whole JPEG"),
        (png_of(60_000, 60_000), "image/png", 413, "pixels"),
        (png_of(5000, 4000), "image/png", 413, "5000 x 4000 pixels; at most 16777216"),
        (png_of(1, 32769), "image/png", 413, "a side of 32769 pixels; at most 32768"),
        (png_of(32769, 1), "image/png", 413, "a side of 32769 pixels; at most 32768"),
        (png_of(100, 100), "image/png", 400, "not a whole PNG"),
        (png_of(0, 8), "image/png", 400, "not a whole PNG"),
        (scans_of(101), "image/jpeg", 400, "has 101 scans; at most 100"),
    ],
)
def test_refused(body: bytes, kind: str, status: int, message: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        decode(body, kind, [X], PLAIN)
    assert refused.value.status == status
    assert message in refused.value.message
    assert len(refused.value.message) < 400


def test_a_photo_is_resized() -> None:
    photo = image(numpy.zeros((3000, 4000), numpy.uint8))
    assert decode(photo, "image/png", [X], PLAIN)[0].shape == (1, 3, 8, 8)


def test_refused_integers_and_kinds() -> None:
    for value in ([[1.5] * 5], [[2**31] * 5], [[2**70] * 5], [[True] * 5]):
        with pytest.raises(BadRequestError, match=r"integers of int32|lists of numbers"):
            decode(as_json(value), JSON, [TOKENS], PLAIN)
    with pytest.raises(BadRequestError, match="must be booleans"):
        decode(as_json([1]), JSON, [KEEP], PLAIN)
    with pytest.raises(BadRequestError, match="which is no image"):
        decode(image(numpy.zeros((8, 8), numpy.uint8)), "image/png", [TOKENS], PLAIN)
    with pytest.raises(BadRequestError, match="holds one input, and the plan takes tokens, keep"):
        decode(npy(numpy.zeros(3)), NPY, [TOKENS, KEEP], PLAIN)


def test_answers(generator: torch.Generator) -> None:
    x, flags = torch.randn(2, 3, generator=generator), torch.tensor([True, False])
    both = {"x": x, "flags": flags}
    read = json.loads(encode(both, JSON))["outputs"]
    assert torch.equal(torch.tensor(read["x"]), x)
    assert read["flags"] == [True, False]
    assert all(torch.equal(a, both[name]) for name, a in load(encode(both, SAFETENSORS)).items())
    assert torch.equal(torch.from_numpy(numpy.load(io.BytesIO(encode({"x": x}, NPY)))), x)
    assert numpy.load(io.BytesIO(encode({"x": x.bfloat16()}, NPY))).dtype == numpy.float32
    odd = torch.tensor([[[1.0, float("nan")], [float("inf"), -2.0]]])
    assert json.loads(encode({"y": odd}, JSON))["outputs"]["y"] == [[[1.0, None], [None, -2.0]]]
    assert json.loads(encode({"y": torch.empty(0, 2)}, JSON))["outputs"]["y"] == []
    with pytest.raises(BadRequestError, match="output y is complex"):
        encode({"y": torch.ones(2, dtype=torch.complex64)}, JSON)
    with pytest.raises(BadRequestError, match="npy holds one array"):
        encode(both, NPY)


def test_damaged_bodies_only_ever_get_a_4xx(generator: torch.Generator) -> None:
    x = torch.randn(1, 3, 8, 8, generator=generator)
    pixels = (x[0].permute(1, 2, 0) * 50 + 128).clamp(0, 255).to(torch.uint8).numpy()
    good = {JSON: as_json(x.tolist()), NPY: npy(x.numpy()), SAFETENSORS: save({"x": x})}
    good |= {"image/png": image(pixels), "image/jpeg": image(pixels, "JPEG")}
    rng = random.Random(0)
    damages: list[Callable[[bytearray], Any]] = [
        lambda b: b.__setitem__(rng.randrange(len(b)), rng.randrange(256)),
        lambda b: b.__delitem__(slice(rng.randrange(len(b)), None)),
        lambda b: b.__delitem__(slice(start := rng.randrange(len(b)), start + 4)),
        lambda b: b.extend(rng.randbytes(5)),
        lambda b: b.__setitem__(slice(0, min(64, len(b))), rng.randbytes(64)),
    ]
    statuses: list[int] = []
    for i in range(300):
        kind = REQUESTS[i % len(REQUESTS)]
        body = bytearray(good[kind])
        for _ in range(rng.randrange(1, 4)):
            rng.choice(damages)(body)
            body = body or bytearray(b"x")
        try:
            decode(bytes(body), kind, [X], PLAIN)
        except BadRequestError as error:
            statuses.append(error.status)
    assert len(statuses) > 100
    assert set(statuses) <= {400, 413}
