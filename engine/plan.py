"""The plan file: a zip with `manifest.json` and payloads, sealed by a digest of all its bytes.

The seal is the zip's comment, so the file stays an ordinary zip; it turns any damage, however small, into one check.
It guards against accidents. It is no signature: a plan holds native code, and only a trusted one may be loaded.
"""

import contextlib
import hashlib
import io
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import torch
from pydantic import ValidationError

from planmill.engine.errors import PlanError
from planmill.engine.machine import package_version, release, require_gpu, these_versions, this_machine
from planmill.engine.manifest import FORMAT_VERSION, Gpu, Manifest, Payload

_MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 8 << 20
_SEAL = b"planmill seal sha256:"
_SEAL_BYTES = len(_SEAL) + 64
_CHUNK = 1 << 20
_REBUILD = "build it again with `planmill build`"


@dataclass(frozen=True)
class Plan:
    """A plan file whose bytes and manifest have been checked.

    Args:
        path: where it lies.
        manifest: what it says about itself.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Plan":
        """Check a plan file and read its manifest; runs none of its code.

        Args:
            path: a file written by `build`.

        Raises:
            PlanError: no such file, not a plan, damaged, cut short, or of a format this version does not read.
        """
        path = Path(path)
        with _opened(path) as archive:
            manifest = _read_manifest(path, archive)
            _check_members(path, archive, manifest)
            for payload in manifest.payloads:
                if _read(path, archive, payload.name, payload.size) != payload.sha256:
                    raise PlanError(f"{path}: damaged: {payload.name} is not what the manifest says; {_REBUILD}")
        return cls(path, manifest)

    def check_environment(self) -> None:
        """Say whether this machine and this torch can run the plan.

        Raises:
            PlanError: another version of torch (of TensorRT, for its plans), another system or architecture, a missing
                instruction set, or no GPU that a plan for one runs on.
        """
        need, have = self.manifest.platform, this_machine()
        if self.manifest.tensorrt is not None:
            self._check_tensorrt(self.manifest.tensorrt.version)
            return
        made, here = self.manifest.versions.torch, these_versions().torch
        if release(made) != release(here):
            raise PlanError(
                f"{self.path}: built with torch {release(made)}, and its native code runs only there; this is torch "
                f"{release(here)}: install torch=={release(made)} or {_REBUILD}"
            )
        if (need.system, need.machine) != (have.system, have.machine):
            raise PlanError(
                f"{self.path}: built for {need.system} on {need.machine}; this is {have.system} on {have.machine}: "
                f"{_REBUILD} here"
            )
        missing = sorted(set(need.isa) - set(have.isa))
        if missing:
            raise PlanError(
                f"{self.path}: needs a CPU with {', '.join(missing)}, which this machine does not have: {_REBUILD} here"
            )
        if self.manifest.gpu is not None:
            self._check_gpu(self.manifest.gpu)

    def _check_gpu(self, made: Gpu) -> None:
        built = f"{self.path}: built for a GPU of compute capability {made.sm // 10}.{made.sm % 10} ({made.name})"
        require_gpu(built)
        major, minor = torch.cuda.get_device_capability()
        if major != made.sm // 10 or minor < made.sm % 10:
            raise PlanError(f"{built}; this one has {major}.{minor} ({torch.cuda.get_device_name()}): {_REBUILD} here")

    def _check_tensorrt(self, made: str) -> None:
        from planmill.engine.tensorrt.builder import INSTALL

        library = self.manifest.target  # targets tensorrt and tensorrt-rtx: the packages are called the same
        here = package_version(library)
        if here is None:
            raise PlanError(
                f"{self.path}: needs {library} {made}, which is not installed: {INSTALL[library.replace('-', '_')]}"
            )
        if release(made) != release(here):
            raise PlanError(
                f"{self.path}: built with {library} {made}, and its payload runs only there; this is {here}: install "
                f"that version or {_REBUILD}"
            )

    def extract(self, folder: Path) -> Path:
        """Copy the first payload into `folder`.

        Returns:
            The file, named by the manifest, never by the zip.
        """
        payload = self.manifest.payloads[0]
        target = folder / payload.name
        with _opened(self.path, sealed=False) as archive, target.open("wb") as out:
            if _read(self.path, archive, payload.name, payload.size, out) != payload.sha256:
                raise PlanError(f"{self.path}: changed while it was being read; load it again")
        return target


def describe_payload(path: Path) -> Payload:
    """Name, size and sha256 of a payload on disk."""
    with path.open("rb") as file:
        size = path.stat().st_size
        return Payload(name=path.name, size=size, sha256=_digest(file, size))


def check_destination(out: str | os.PathLike[str]) -> Path:
    """Say before the work starts whether a plan can be written to `out`.

    Raises:
        PlanError: the suffix is not .plan, `out` is no regular file, its directory is missing or cannot be written to.
    """
    path = Path(out)
    if path.suffix != ".plan":
        raise PlanError(f"{path}: a plan's file name ends in .plan")
    if path.exists() and not path.is_file():
        raise PlanError(f"{path}: exists and is not a regular file; give another name")
    if not path.parent.is_dir():
        raise PlanError(f"{path}: no directory {path.parent}; create it first")
    with _scratch(path) as (_, _):
        pass
    return path


def write_plan(path: Path, manifest: Manifest, payloads: Mapping[str, Path]) -> Plan:
    """Write a plan beside its destination and move it there in one step: what stood there stays until then.

    Args:
        path: destination; an existing file is replaced.
        manifest: names every payload.
        payloads: payload name to the file that holds it.

    Raises:
        PlanError: the directory cannot be written to.
    """
    with _scratch(path) as (file, scratch):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_MANIFEST, manifest.model_dump_json(indent=2))
            for payload in manifest.payloads:
                archive.write(payloads[payload.name], payload.name)
            archive.comment = b" " * _SEAL_BYTES
        _seal(file)
        os.fsync(file.fileno())
        os.replace(scratch, path)
    return Plan(path, manifest)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """An open temporary file in the directory of `path`, gone at the end unless it was moved away."""
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise PlanError(f"{path}: cannot write into {path.parent}: {error.strerror}") from error
    try:
        # mkstemp gives 0600; a plan is as readable as any file that the user writes.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)
        with os.fdopen(handle, "w+b") as file:
            yield file, scratch
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def _seal(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest = _digest(file, size - _SEAL_BYTES)
    file.seek(size - _SEAL_BYTES)
    file.write(_SEAL + digest.encode())
    file.flush()


@contextlib.contextmanager
def _opened(path: Path, *, sealed: bool = True) -> Iterator[zipfile.ZipFile]:
    """The file as a zip; with `sealed`, once its seal was found whole."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file") from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PlanError(f"{path}: not a regular file")
        if sealed:
            _check_seal(path, file, status.st_size)
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, RuntimeError, ValueError, OverflowError) as error:
            raise PlanError(f"{path}: not a plan: {error}") from error
        with archive:
            yield archive


def _check_seal(path: Path, file: BinaryIO, size: int) -> None:
    if size <= _SEAL_BYTES:
        raise PlanError(f"{path}: not a plan, or cut short ({size} bytes); {_REBUILD}")
    file.seek(size - _SEAL_BYTES)
    seal = file.read(_SEAL_BYTES)
    if not seal.startswith(_SEAL):
        raise PlanError(f"{path}: not a plan, or cut short: the seal at its end is missing; {_REBUILD}")
    file.seek(0)
    if _digest(file, size - _SEAL_BYTES).encode() != seal[len(_SEAL) :]:
        raise PlanError(f"{path}: damaged: its bytes do not match its seal; copy it again or {_REBUILD}")


def _digest(file: IO[bytes], size: int, copy: BinaryIO | None = None) -> str:
    """sha256 of the next `size` bytes, copied on the way; of fewer where the file ends early."""
    digest, left = hashlib.sha256(), size
    while left and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest()


def _read_manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    members = [member for member in archive.infolist() if member.filename == _MANIFEST]
    if len(members) != 1:
        raise PlanError(f"{path}: not a plan: it holds {len(members)} files named {_MANIFEST}, and must hold one")
    _check_member(path, members[0])
    if members[0].file_size > _LARGEST_MANIFEST:
        raise PlanError(f"{path}: not a plan: its manifest of {members[0].file_size} bytes is too large")
    text = io.BytesIO()
    _read(path, archive, _MANIFEST, members[0].file_size, text)
    try:
        return Manifest.model_validate_json(text.getvalue())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or _MANIFEST
        if where == "format":
            raise PlanError(
                f"{path}: of another plan format than {FORMAT_VERSION}, the one this planmill reads; {_REBUILD}"
            ) from None
        raise PlanError(f"{path}: not a plan: {where} in its manifest: {first['msg']}") from None


def _read(path: Path, archive: zipfile.ZipFile, name: str, size: int, copy: BinaryIO | None = None) -> str:
    """sha256 of a member, copied on the way."""
    try:
        with archive.open(name) as member:
            return _digest(member, size, copy)
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OSError) as error:
        raise PlanError(f"{path}: damaged: {name} cannot be read: {error}") from error


def _check_members(path: Path, archive: zipfile.ZipFile, manifest: Manifest) -> None:
    want = sorted([_MANIFEST, *(payload.name for payload in manifest.payloads)])
    got = sorted(archive.namelist())
    if got != want:
        raise PlanError(f"{path}: not a plan: it holds {len(got)} files, and not just those its manifest names")
    for payload in manifest.payloads:
        member = archive.getinfo(payload.name)
        _check_member(path, member)
        if member.file_size != payload.size:
            raise PlanError(f"{path}: damaged: {payload.name} has {member.file_size} bytes, not {payload.size}")


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    """Stored as it is: nothing in a plan can grow when it is unpacked."""
    stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
    if not stored or member.flag_bits & 0x1:
        raise PlanError(f"{path}: not a plan: {member.filename} is compressed or encrypted")
