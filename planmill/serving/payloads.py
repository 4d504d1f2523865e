"""Request bodies to tensors, and tensors to response bodies. Nothing here knows HTTP or Ray.

A body comes from anyone: its size is known before this is called, and nothing in it may make more memory than a small
multiple of that, or run code. What cannot be read raises `BadRequestError` with one sentence for the sender.
"""

import io
import json
import math
import struct
import tokenize
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from planmill.engine import TensorSpec
from planmill.pixels import eight_bit

JSON, NPY, SAFETENSORS = "application/json", "application/x-npy", "application/x-safetensors"
IMAGES = {"image/png": "PNG", "image/jpeg": "JPEG"}
REQUESTS = (JSON, NPY, SAFETENSORS, *IMAGES)
RESPONSES = (JSON, NPY, SAFETENSORS)

_MOST_SCANS = 100  # of a JPEG: a progressive one has ten, and each costs a pass over the picture
_MOST_SIDE = 1 << 15  # pixels of a side: a row costs time of its own, however short it is

Named = dict[str, torch.Tensor]


class BadRequestError(Exception):
    """A request that cannot be served as it is.

    Args:
        status: of the HTTP response, 400 to 499.
        message: one sentence.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)  # both, so that it can be pickled
        self.status, self.message = status, message


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes an input.

    Args:
        mean, std: per channel, subtracted and divided by after the values were scaled to 0..1; one number is for all
            channels. An input of uint8 takes the bytes as they are.
        max_pixels: of an image; more is refused before it is decoded.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    max_pixels: int = 1 << 24


def decode(body: bytes, kind: str, specs: Sequence[TensorSpec], images: ImageSettings) -> list[torch.Tensor]:
    """The plan's inputs in order; their sizes are not checked yet.

    Args:
        body: of the request.
        kind: its content type, one of REQUESTS.
        specs: of the plan's inputs.
        images: for images.

    Raises:
        BadRequestError: the body is not what `kind` says, or holds other inputs than the plan's.
    """
    if not body:
        raise BadRequestError(400, "the body is empty")
    if kind in IMAGES:
        return [_decode_image(body, IMAGES[kind], _only(specs, kind), images)]
    if kind == NPY:
        return [_decode_npy(body, _only(specs, kind))]
    read: Callable[[bytes, Sequence[TensorSpec]], Named] = {JSON: _decode_json, SAFETENSORS: _decode_safetensors}[kind]
    found = read(body, specs)
    names = [spec.name for spec in specs]
    if found.keys() != set(names):
        given = ", ".join(sorted(found)[:8]) or "nothing"
        raise BadRequestError(400, f"the plan takes {', '.join(names)}; got {given[:200]}")
    return [found[name] for name in names]


def encode(outputs: Mapping[str, torch.Tensor], kind: str) -> bytes:
    """A response body.

    Args:
        outputs: by name.
        kind: its content type, one of RESPONSES.

    Raises:
        BadRequestError: npy was asked for, and there are several outputs; or JSON, and one is complex.
    """
    if kind == SAFETENSORS:
        return save_safetensors({name: x.contiguous() for name, x in outputs.items()})
    if kind == NPY:
        if len(outputs) != 1:
            raise BadRequestError(406, f"npy holds one array, and the plan has {len(outputs)} outputs: ask for {JSON}")
        file = io.BytesIO()
        numpy.save(file, _to_numpy(next(iter(outputs.values()))), allow_pickle=False)
        return file.getvalue()
    for name, x in outputs.items():
        if x.is_complex():
            raise BadRequestError(406, f"output {name} is complex, and JSON has no such number: ask for {SAFETENSORS}")
    return json.dumps({"outputs": {name: _to_json(x) for name, x in outputs.items()}}, allow_nan=False).encode()


def _only(specs: Sequence[TensorSpec], kind: str) -> TensorSpec:
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise BadRequestError(415, f"{kind} holds one input, and the plan takes {names}: send {JSON} or {SAFETENSORS}")
    return specs[0]


def _decode_json(body: bytes, specs: Sequence[TensorSpec]) -> Named:
    def refuse(text: str) -> float:
        raise BadRequestError(400, f"{text} is no JSON number")

    try:
        content = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(400, f"the body is not JSON: {str(error)[:200]}") from None
    given = content.get("inputs") if isinstance(content, dict) else None
    if isinstance(given, list) and len(specs) == 1:
        given = {specs[0].name: given}
    if not isinstance(given, dict):
        raise BadRequestError(400, 'the body must be {"inputs": {NAME: nested lists of numbers}}')
    known = {spec.name: spec for spec in specs}
    return {name: _from_lists(value, known[name]) if name in known else torch.empty(0) for name, value in given.items()}


def _from_lists(value: Any, spec: TensorSpec) -> torch.Tensor:
    try:
        # As objects first: numpy pads every string of a list to the longest.
        kinds = set(map(type, numpy.array(value, dtype=object).ravel().tolist()))
        array = numpy.array(value if kinds <= {bool, int, float} else "")
    except (ValueError, OverflowError, RecursionError, TypeError):
        kinds = {list}
    if list in kinds:
        raise BadRequestError(400, f"input {spec.name} must be nested lists of equal lengths") from None
    if array.dtype.kind not in "biuf":
        raise BadRequestError(400, f"input {spec.name} must be nested lists of numbers")
    return _cast(array, spec)


def _cast(array: numpy.ndarray, spec: TensorSpec) -> torch.Tensor:
    """Numbers as JSON has them in the dtype of the input: nothing but a float's last digits may be lost."""
    dtype, kind = spec.torch_dtype, array.dtype.kind
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        if kind == "b":
            raise BadRequestError(400, f"input {spec.name} must be numbers, got booleans")
        found = torch.from_numpy(array.astype(numpy.float64)).to(dtype)
        if not torch.isfinite(found).all():
            raise BadRequestError(400, f"input {spec.name} has a number beyond {spec.dtype}")
        return found
    if dtype == torch.bool:
        if kind != "b":
            raise BadRequestError(400, f"input {spec.name} must be booleans")
        return torch.from_numpy(array)
    bounds = torch.iinfo(dtype)
    if kind not in "iu" or int(array.min()) < bounds.min or int(array.max()) > bounds.max:
        raise BadRequestError(400, f"input {spec.name} must be integers of {spec.dtype}")
    return torch.from_numpy(array.astype(spec.dtype))


def _decode_npy(body: bytes, spec: TensorSpec) -> torch.Tensor:
    """The header is read first: numpy itself would make an array of whatever size the header claims."""
    file = io.BytesIO(body)
    try:
        version = numpy.lib.format.read_magic(file)
        read = {(1, 0): numpy.lib.format.read_array_header_1_0, (2, 0): numpy.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=4096)
    except (
        *(ValueError, KeyError, EOFError, SyntaxError, RecursionError, MemoryError, TypeError),
        tokenize.TokenError,  # numpy tokenizes a header that is no Python, in case it is Python 2
    ):
        raise BadRequestError(400, "the body is not an .npy file") from None
    data = memoryview(body)[file.tell() :]
    count = 1
    for size in shape:
        count *= size
    if dtype.hasobject or any(size < 0 for size in shape) or count * dtype.itemsize != len(data):
        raise BadRequestError(400, "the .npy file is cut short, too long, or holds no plain numbers")
    try:
        array = numpy.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(numpy.array(array, dtype=dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, OverflowError):
        raise BadRequestError(400, f"the .npy file holds {str(dtype)[:40]}, and the plan takes {spec.dtype}") from None


def _decode_safetensors(body: bytes, specs: Sequence[TensorSpec]) -> Named:
    try:
        return load_safetensors(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError, RecursionError):
        raise BadRequestError(400, "the body is not a safetensors file") from None


def _decode_image(body: bytes, kind: str, spec: TensorSpec, settings: ImageSettings) -> torch.Tensor:
    """An image as the sample of an input [B, C, H, W], resized where H and W are fixed."""
    channels = spec.shape[1] if len(spec.shape) == 4 else None
    if channels not in (1, 3):
        raise BadRequestError(415, f"the plan's input {spec.name} is {spec}, which is no image: send {JSON}")
    picture = _open_image(body, kind, "L" if channels == 1 else "RGB", settings.max_pixels)
    height, width = (
        size if isinstance(size, int) else own for size, own in zip(spec.shape[2:], picture.size[::-1], strict=True)
    )
    picture = _resized(picture, width, height)
    pixels = torch.from_numpy(numpy.array(picture)).reshape(height, width, channels).permute(2, 0, 1)[None]
    if spec.torch_dtype == torch.uint8:
        return pixels.contiguous()
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (settings.mean, settings.std))
    return ((pixels.float() / 255 - mean) / std).to(spec.torch_dtype)


def _open_image(body: bytes, kind: str, mode: str, max_pixels: int) -> Any:
    """A PIL image of `mode`; 16 bits per value become 8."""
    from PIL import Image

    scans = body.count(b"\xff\xda") if kind == "JPEG" else 1
    if scans > _MOST_SCANS:
        raise BadRequestError(400, f"the JPEG has {scans} scans; at most {_MOST_SCANS} are decoded")
    try:
        with Image.open(io.BytesIO(body), formats=[kind]) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise BadRequestError(413, f"the image has {size} pixels; at most {max_pixels} are decoded")
            if max(image.size) > _MOST_SIDE:
                raise BadRequestError(413, f"the image has a side of {max(image.size)} pixels; at most {_MOST_SIDE}")
            return eight_bit(image).convert(mode)
    except Image.DecompressionBombError:
        raise BadRequestError(413, f"the image has more than {max_pixels} pixels") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, zlib.error, MemoryError):
        raise BadRequestError(400, f"the body is not a whole {kind} image") from None


def _resized(picture: Any, width: int, height: int) -> Any:
    """Bilinear. Pillow resizes rows first: a high and narrow picture would become wide at its full height."""
    from PIL import Image

    if width * picture.height > picture.width * height:
        picture = picture.resize((picture.width, height), Image.Resampling.BILINEAR)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _to_numpy(x: torch.Tensor) -> numpy.ndarray:
    """NumPy has no bfloat16: float32 holds it exactly."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _to_json(x: torch.Tensor) -> Any:
    """Nested lists; null where JSON has no number (NaN, infinity)."""
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        return _nest([value if math.isfinite(value) else None for value in x.flatten().tolist()], list(x.shape))
    return x.tolist()


def _nest(flat: list, shape: list[int]) -> Any:
    if not shape:
        return flat[0]
    step = len(flat) // shape[0] if shape[0] else 0
    return [_nest(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]
