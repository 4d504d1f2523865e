"""Find the pictures of a folder and read them; what cannot be read is named, never fatal."""

import io
import os
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from planmill.errors import PlanmillError
from planmill.inspection.results import Progress, SkippedPicture
from planmill.pixels import eight_bit

_USUAL = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_RARE = (".avif", ".dib", ".j2k", ".jp2", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
SUFFIXES = frozenset(_USUAL + _RARE)
# Formats by content. What a name promises proves nothing, and some decoders (EPS) run other programs.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
SMALLEST_SIDE = 4
LARGEST_ASPECT_FACTOR = 4.0
THUMBNAIL_SIDE = 256

# What Pillow's decoders raise on damaged files, by format: SyntaxError (PNG), struct and index errors are ValueError,
# IndexError and EOFError, a variant that it does not read NotImplementedError; the bomb is its own class.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Picture:
    """One decoded picture.

    Args:
        path: the file.
        file: its name relative to the folder, with `/`, as text that can be encoded.
        pixels: [C, H, W] uint8, resized for the backbone.
        size: (width, height) of the original as shown, in pixels.
        note: what was done to it; may be empty.
        thumbnail: small JPEG of the original.
    """

    path: Path
    file: str
    pixels: np.ndarray
    size: tuple[int, int]
    note: str
    thumbnail: bytes


def find_pictures(folder: Path) -> tuple[list[Path], int]:
    """Files with a picture's suffix below `folder`, sorted, and the number of other files.

    Hidden files and folders are passed over. Links to files are followed, links to folders are not.

    Raises:
        PlanmillError: no such folder, or it cannot be read.
    """
    if not folder.exists():
        raise PlanmillError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise PlanmillError(f"{folder}: not a folder; give the folder that holds the pictures")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PlanmillError(f"{folder}: cannot be read: permission denied")
    found: list[Path] = []
    ignored = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                found.append(Path(parent, name))
            else:
                ignored += 1
    return sorted(found, key=lambda path: path.relative_to(folder).parts), ignored


def shown_name(path: Path, folder: Path) -> str:
    """The file's name relative to the folder; bytes that are no UTF-8 become `\\xNN`."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def read_pictures(
    paths: list[Path], folder: Path, size: tuple[int, int], channels: int, progress: Progress
) -> tuple[list[Picture], list[SkippedPicture]]:
    """Decode, and resize to `size` (height, width) with `channels` channels.

    Returns:
        The pictures in the order of `paths`, and those left out, each with a reason: unreadable ones, pictures with a
        side under 4 pixels, and pictures whose aspect ratio is more than 4 times off the set's median.
    """
    read: list[Picture] = []
    skipped: list[SkippedPicture] = []
    for index, path in enumerate(paths):
        progress("read", index, len(paths))
        name = shown_name(path, folder)
        try:
            read.append(_read(path, name, size, channels))
        except _UNREADABLE as error:
            skipped.append(SkippedPicture(name, _reason(path, error)))
    progress("read", len(paths), len(paths))
    kept = list(_drop_odd_sizes(read, skipped))
    skipped.sort(key=lambda entry: entry.file)
    return kept, skipped


def _read(path: Path, name: str, size: tuple[int, int], channels: int) -> Picture:
    if not path.is_file():
        raise OSError("a link to nothing" if path.is_symlink() else "not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns where it repairs; its limit on pixels still raises
        with Image.open(path, formats=_formats()) as image:
            frames = getattr(image, "n_frames", 1)
            image.load()
            upright = ImageOps.exif_transpose(image)
            mode = upright.mode
            shown = eight_bit(upright)
    if min(shown.size) < SMALLEST_SIDE:
        raise ValueError(f"odd size: {shown.width} x {shown.height} pixels, smaller than {SMALLEST_SIDE}")
    notes = [f"first of {frames} frames"] if frames > 1 else []
    if mode not in ("RGB", "L", "1"):
        notes.append(f"converted from {mode}")
    resized = shown.convert("L" if channels == 1 else "RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.atleast_3d(np.asarray(resized)).transpose(2, 0, 1).copy()
    return Picture(path, name, pixels, shown.size, ", ".join(notes), _thumbnail(shown))


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _thumbnail(image: Image.Image) -> bytes:
    """JPEG with the longer side at most 256 pixels."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def _reason(path: Path, error: BaseException) -> str:
    """Why a picture cannot be read, in a few words, without its path."""
    if isinstance(error, UnidentifiedImageError):
        empty = path.stat().st_size == 0
        return "empty file" if empty else "not a picture, or of a format that Pillow does not read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels: Pillow takes it for a decompression bomb"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.startswith(("odd size", "pixel values", "a link", "not a regular")) else f"damaged: {text}"


def _drop_odd_sizes(pictures: list[Picture], skipped: list[SkippedPicture]) -> Iterator[Picture]:
    """The pictures whose shape is not far from the rest; the others go to `skipped`."""
    if not pictures:
        return
    usual = statistics.median_low(picture.size[0] / picture.size[1] for picture in pictures)
    for picture in pictures:
        width, height = picture.size
        factor = width / height / usual
        if max(factor, 1 / factor) <= LARGEST_ASPECT_FACTOR:
            yield picture
            continue
        reason = f"odd size: {width} x {height} pixels, and most pictures have a width of {usual:.2g} heights"
        skipped.append(SkippedPicture(picture.file, reason))
