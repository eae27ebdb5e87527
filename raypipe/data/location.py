"""Where things are: local paths through `os`, everything else through pyarrow.fs, under one spelling.

A location is a local path (also `file://`) or a URI that `pyarrow.fs.FileSystem.from_uri` knows: `s3://bucket/key`,
`gs://bucket/key`, `hdfs://...`. Options are URI queries and stay with every URI derived from it:
`s3://bucket/photos?endpoint_override=http://localhost:9000&region=us-east-1`. A `?` in a URI always starts a query; other
characters of a key may stand as they are or percent-encoded. Keep credentials in the environment (AWS_ACCESS_KEY_ID, ...):
a URI is written to the journal and to reports.

Local files go through `os` and not through pyarrow because that is measurably cheaper for a million small files.
"""

import contextlib
import functools
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from urllib.parse import quote, unquote, unquote_to_bytes

import pyarrow as pa
from pyarrow import fs

from raypipe import UsageError

ERRORS = (OSError, pa.ArrowException)
"""What reading or writing at a location raises."""

_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://([^/?]*)([^?]*)(\?.*)?", re.DOTALL)
_OBJECT_STORES = ("s3", "gcs", "abfs")


def is_remote(location: str) -> bool:
    """Whether `location` is a URI of anything but the local file system."""
    match = _URI.fullmatch(location)
    return match is not None and match[1].lower() != "file"


def local_path(location: str) -> str:
    """The absolute path of a local location (`~` is expanded). Names that are not UTF-8 come as `file://` URIs."""
    match = _URI.fullmatch(location)
    if match is not None:
        return os.fsdecode(unquote_to_bytes(match[3]))
    return os.path.abspath(os.path.expanduser(location))


def local_uri(path: str) -> str:
    """How a row names a local file: by its path, or by a `file://` URI where the path is not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


def path_of(location: str) -> str:
    """The path within the location as text, without query: what to take a suffix or a last component from."""
    match = _URI.fullmatch(location)
    return location if match is None else unquote(match[3])


def absolute(location: str) -> str:
    """The location so that it means the same in any process: local paths made absolute, URIs unchanged."""
    return location if is_remote(location) else local_path(location)


def join(root: str, relative: str) -> str:
    """`relative` (posix, unquoted) under `root`; a URI's query stays at the end."""
    if not relative:
        return root
    match = _URI.fullmatch(root)
    if match is None or match[1].lower() == "file":
        return os.path.join(local_path(root), relative)
    scheme, authority, path, query = match.groups()
    return f"{scheme}://{authority}{path.rstrip('/')}/{quote(relative)}{query or ''}"


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a remote URI and the path in it. Raises UsageError for a scheme nobody knows."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise UsageError(f"{uri!r} is not a URI")
    scheme, authority, path, query = match.groups()
    system, base = _filesystem(scheme.lower(), authority, query or "")
    return system, (base.rstrip("/") + "/" + unquote(path).strip("/")).rstrip("/")


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, authority: str, query: str) -> tuple[fs.FileSystem, str]:
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{authority}/{query}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"cannot open {scheme}://{authority}: {one_line(error)}. Give a local path or a URI of s3://, gs:// or another "
            "file system of pyarrow.fs, with its options as a query"
        ) from error


def read(location: str) -> bytes:
    """All bytes at a location. Raises one of ERRORS."""
    if not is_remote(location):
        with open(local_path(location), "rb") as file:
            return file.read()
    system, path = filesystem(location)
    with system.open_input_stream(path) as stream:
        return stream.read()


def names(folder: str) -> list[str]:
    """Names of the files directly in a folder, sorted; none if there is no such folder. Raises one of ERRORS."""
    return _listed(folder, fs.FileType.File)


def folders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; none if there is no such folder. Raises one of ERRORS."""
    return _listed(folder, fs.FileType.Directory)


def _listed(folder: str, kind: fs.FileType) -> list[str]:
    if not is_remote(folder):
        try:
            with os.scandir(local_path(folder)) as entries:
                return sorted(e.name for e in entries if (e.is_file() if kind == fs.FileType.File else e.is_dir()))
        except FileNotFoundError:
            return []
    system, path = filesystem(folder)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == kind)


def exists(location: str) -> bool:
    """Whether there is a file. Raises one of ERRORS."""
    if not is_remote(location):
        return os.path.lexists(local_path(location))
    system, path = filesystem(location)
    return system.get_file_info(path).type == fs.FileType.File


def below(folder: str) -> Iterator[str]:
    """All files below a remote folder, by their paths relative to it; none if there is no such folder. Raises one of ERRORS."""
    system, path = filesystem(folder)
    for info in system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True)):
        if info.type == fs.FileType.File:
            yield info.path[len(path) :].lstrip("/")


def within(location: str, folder: str) -> bool:
    """Whether `location` is `folder` or in it: of local ones what they really are, of remote ones what they are called."""
    if is_remote(location) != is_remote(folder):
        return False
    if is_remote(location):
        (one, inner), (other, outer) = filesystem(location), filesystem(folder)
        return one == other and (inner == outer or inner.startswith(outer.rstrip("/") + "/"))
    inner, outer = os.path.realpath(local_path(location)), os.path.realpath(local_path(folder))
    return os.path.isdir(outer) and os.path.commonpath([inner, outer]) == outer


def delete(location: str) -> None:
    """Deletes a file, if it is there. Raises one of ERRORS."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(location):
            system, path = filesystem(location)
            system.delete_file(path)
        else:
            os.unlink(local_path(location))


def delete_folder(location: str) -> None:
    """Deletes a folder with all below it, if it is there. Raises one of ERRORS."""
    if not is_remote(location):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(local_path(location))
        return
    system, path = filesystem(location)
    if system.get_file_info(path).type == fs.FileType.Directory:
        system.delete_dir(path)


def write(root: str, relative: str, data: bytes | memoryview, *, tmp: str = "_raypipe/tmp") -> None:
    """Puts `data` at `relative` under `root`: whole or not at all, over what was there. Raises one of ERRORS.

    Local: a file in `root/tmp`, then renamed. Not flushed to the disk: a killed process never leaves a partial file, a power
    failure may. Remote: one stream whose object appears when it is closed, and it is closed only after all was written.
    """
    if is_remote(root):
        _write_remote(join(root, relative), data)
        return
    root = local_path(root)
    temporary = os.path.join(root, tmp, _temporary_name())
    target = os.path.join(root, relative)
    try:
        descriptor = _create(temporary)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        try:
            os.replace(temporary, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _create(path: str) -> int:
    # Folders are made when they turn out to be missing: no stat per file, and a folder that somebody removed comes back.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


_PROCESS = uuid.uuid4().hex[:12]


def _temporary_name() -> str:
    # Unique over nodes that share the folder (uuid), forks (pid) and threads; reused by the next file of the thread.
    return f"{_PROCESS}-{os.getpid()}-{threading.get_ident()}"


def _write_remote(uri: str, data: bytes | memoryview) -> None:
    system, path = filesystem(uri)
    if system.type_name not in _OBJECT_STORES:
        system.create_dir(path.rpartition("/")[0], recursive=True)
    # One write of everything: closing makes the object appear, and a stream is closed when it is dropped by an exception too.
    # If a part of the upload failed, closing fails as well and nothing appears.
    stream = system.open_output_stream(path)
    stream.write(data)
    stream.close()


def one_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return " ".join(str(error).split()) or type(error).__name__
