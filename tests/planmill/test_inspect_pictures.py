"""Reading a folder of pictures: every kind that turns up, and what is left out with which reason."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from planmill.errors import PlanmillError
from planmill.inspection.pictures import Picture, find_pictures, read_pictures
from planmill.inspection.results import SkippedPicture


def quiet(stage: str, done: int, total: int) -> None:
    """No progress bar."""


def read(folder: Path, channels: int = 3) -> tuple[dict[str, Picture], dict[str, str]]:
    """Pictures and reasons by name."""
    pictures, skipped = read_pictures(find_pictures(folder)[0], folder, (16, 16), channels, quiet)
    return {picture.file: picture for picture in pictures}, {entry.file: entry.reason for entry in skipped}


def ramp(width: int = 20, height: int = 16) -> np.ndarray:
    """A grey ramp [height, width] uint8."""
    return np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)


def test_finds_pictures_recursively_and_sorted_and_counts_other_files(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.jpg", "z.webp", "notes.txt", ".hidden.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, ignored = find_pictures(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/1.jpg", "b/2.PNG", "z.webp"]
    assert ignored == 1


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    Image.fromarray(ramp()).save(elsewhere / "a.png")
    (folder / "link.png").symlink_to(elsewhere / "a.png")
    (folder / "broken.png").symlink_to(elsewhere / "missing.png")
    (folder / "loop").symlink_to(folder)
    pictures, skipped = read(folder)
    assert list(pictures) == ["link.png"]
    assert skipped == {"broken.png": "a link to nothing"}


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "no such folder"), ("file.png", "not a folder; give the folder")]
)
def test_a_folder_that_is_none_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file.png").touch()
    with pytest.raises(PlanmillError, match=message):
        find_pictures(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_is_read_as_the_same_picture(tmp_path: Path, mode: str) -> None:
    grey = ramp() if mode != "1" else (ramp() // 128 * 255).astype(np.uint8)
    suffix = {"CMYK": "tif", "YCbCr": "tif", "I;16": "tif", "I": "tif", "F": "tif"}.get(mode, "png")
    if mode in ("I;16", "I"):
        image = Image.fromarray((grey.astype(np.uint16) * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray((grey / 255).astype(np.float32))
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    pictures, skipped = read(tmp_path, channels=1)
    assert not skipped
    expected = np.asarray(Image.fromarray(grey).resize((16, 16), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(pictures[f"x.{suffix}"].pixels[0].astype(int) - expected).max() <= 3


def test_transparency_shows_black_and_not_what_lies_below(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert read(tmp_path)[0]["clear.png"].pixels.max() == 0


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp(20, 16)).save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path)[0]["turned.jpg"].size == (16, 20)


def test_an_animation_counts_with_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("L", (10, 10), value) for value in (0, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture = read(tmp_path)[0]["moving.gif"]
    assert picture.note.startswith("first of 2 frames")
    assert picture.pixels.max() == 0


def test_unreadable_pictures_are_named_with_a_reason(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "tif", "webp"):
        Image.fromarray(noise).save(tmp_path / f"cut.{suffix}")
        whole = (tmp_path / f"cut.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "print.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    pictures, skipped = read(tmp_path)
    assert list(pictures) == ["good.png"]
    assert skipped["empty.png"] == "empty file"
    assert skipped["text.png"] == skipped["print.png"] == "not a picture, or of a format that Pillow does not read"
    assert skipped["nan.tif"] == "pixel values of mode F outside 0..1"
    assert {"cut.png", "cut.jpg", "cut.webp", "cut.tif"} <= skipped.keys()
    assert list(skipped) == sorted(skipped)


def test_a_decompression_bomb_is_skipped(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    assert "decompression bomb" in read(tmp_path)[1]["bomb.png"]


def test_odd_sizes_are_skipped_and_other_shapes_are_not(tmp_path: Path) -> None:
    shapes = {"a": (20, 20), "b": (21, 33), "c": (40, 20), "d": (300, 7), "e": (1, 1), "f": (3, 200)}
    for name, (width, height) in shapes.items():
        Image.fromarray(ramp(width, height)).save(tmp_path / f"{name}.png")
    pictures, skipped = read(tmp_path)
    assert list(pictures) == ["a.png", "b.png", "c.png"]
    assert skipped["d.png"] == "odd size: 300 x 7 pixels, and most pictures have a width of 1 heights"
    assert skipped["e.png"] == "odd size: 1 x 1 pixels, smaller than 4"
    assert all(picture.pixels.shape == (3, 16, 16) for picture in pictures.values())


def test_a_name_that_is_no_utf8_can_be_shown(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "x.png")
    os.rename(os.fsencode(tmp_path / "x.png"), os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    assert list(read(tmp_path)[0]) == ["caf\\xe9.png"]


def test_reasons_carry_no_path(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    _, skipped = read_pictures([tmp_path / "text.png"], tmp_path, (16, 16), 3, quiet)
    assert skipped == [SkippedPicture("text.png", "not a picture, or of a format that Pillow does not read")]
