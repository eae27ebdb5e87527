"""Where things are: local paths through `os`, everything else through pyarrow.fs, under one spelling.

Objects of s3:// and gs:// are read through obstore, which says how many bytes came. pyarrow's S3 file
gives as many as were asked for, even when the object has become shorter. obstore also creates an
object only where none is. Errors of all clients become OSError: FileNotFoundError, PermissionError,
and `StoreError` for what may pass.

A location is a local path (also `file://`) or a URI that `pyarrow.fs.FileSystem.from_uri` knows: `s3://bucket/key`,
`gs://bucket/key`, `hdfs://...`. Options are URI queries and stay with every URI derived from it:
`s3://bucket/photos?endpoint_override=http://localhost:9000&region=us-east-1`. A `?` in a URI always starts a query; other
characters of a key may stand as they are or percent-encoded. Keep credentials in the environment (AWS_ACCESS_KEY_ID, ...):
a URI is written to the journal and to reports.

Local files go through `os` and not through pyarrow because that is measurably cheaper for a million small files.
"""

import configparser
import contextlib
import errno
import fcntl
import functools
import io
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes

import obstore
import pyarrow as pa
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import GCSStore, S3Store
from pyarrow import fs

from raypipe import UsageError

ERRORS = (OSError, pa.ArrowException)
"""What reading or writing at a location raises."""


class StoreError(OSError):
    """A store did not answer, or said that it cannot now: timeouts, HTTP 5xx, throttling. It says
    nothing of the object, and may pass."""


_PASSING = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
        *("ENETUNREACH", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EPIPE", "ENODEV", "ENXIO"),
        *("EREMOTEIO", "EAGAIN", "EBUSY", "EINTR", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"),
    )
    if hasattr(errno, name)
}
"""What the system says of a disk or a mount that does not answer, not of the file."""


def may_pass(error: BaseException, location: str) -> bool:
    """Whether a failure to read or write is the store's, which may pass, and not the file's."""
    if isinstance(error, StoreError):
        return True
    if isinstance(
        error, FileNotFoundError | PermissionError | NotADirectoryError | BeyondEnd | ValueError
    ):
        return False
    if not isinstance(error, ERRORS):
        return False
    if object_store(location) is not None:
        return False  # all that its client says is one of those above
    # Of another remote store all that is left is the network's and the server's.
    return is_remote(location) or getattr(error, "errno", None) in _PASSING


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


def suffix(location: str) -> str:
    """How a file's name ends, with the dot; empty if it has none."""
    return os.path.splitext(path_of(location))[1]


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


class BeyondEnd(OSError):
    """A range was asked for that begins behind an object's end."""


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Give obstore's errors as OSError."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(one_line(error)) from error
    except BaseError as error:
        if "status code: 416" in str(error):
            raise BeyondEnd(short(error)) from error
        raise StoreError(short(error)) from error


_STATUS = re.compile(r"(?:status code: |HTTP status )(\d{3}(?: [A-Z][A-Za-z]*)*)")


def short(error: BaseException) -> str:
    """What a failure to read or write says, without what differs from one file to the next: `HTTP 503
    Service Unavailable`, `Input/output error`."""
    text = str(error)
    if (status := _STATUS.search(text)) is not None:
        return f"HTTP {status[1]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, BaseError):  # its first line names the object, its last the reason
        reason = re.findall(
            r"^\s*(?:source|inner): (?:Os|Custom|hyper|reqwest).*?\"([^\"]+)\"", text, re.MULTILINE
        )
        text = text.partition("\n\nDebug source")[0]
        text = re.sub(r"(performing [A-Z]+) \S+ in \S+", r"\1", text) + (
            f" ({reason[-1]})" if reason else ""
        )
    return " ".join(text.split())[:200] or type(error).__name__


def object_store(uri: str) -> tuple[Any, str] | None:
    """The obstore client of an s3:// or gs:// URI, and the key in its bucket; None for others.

    It asks once: whoever calls decides how long a store is waited for (`raypipe.data.patience`).
    """
    match = _URI.fullmatch(uri)
    if match is None or match[1].lower() not in ("s3", "gs", "gcs"):
        return None
    scheme, authority, path, query = match.groups()
    client = _object_store(scheme.lower(), authority, query or "")
    return client, unquote(path).strip("/")


@functools.lru_cache(maxsize=64)
def _object_store(scheme: str, authority: str, query: str) -> Any:
    options = dict(parse_qsl(query.removeprefix("?")))
    user, _, bucket = authority.rpartition("@")
    endpoint = options.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    common: dict[str, Any] = {
        "client_options": {
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "timeout": "60s",
        },
        "retry_config": {"max_retries": 0},
    }
    if user == "anonymous":
        common["skip_signature"] = True
    if scheme != "s3":
        return GCSStore(bucket, **common | ({"base_url": endpoint} if endpoint else {}))
    system, _ = _filesystem(scheme, authority, query)
    key, _, secret = user.partition(":")
    keys = (
        {"access_key_id": unquote(key), "secret_access_key": unquote(secret)}
        if secret
        else _profile()
    )
    common |= keys | ({"endpoint": endpoint} if endpoint else {})
    return S3Store(bucket, region=system.region, **common)


def _profile() -> dict[str, str]:
    """Keys of ~/.aws/credentials, which obstore does not read; none where the environment has some."""
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ:
        return {}
    place = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws/credentials"
    found = configparser.RawConfigParser()
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        found.read(place)
    profile = os.environ.get("AWS_PROFILE", "default")
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    if not found.has_section(profile):
        return {}
    return {
        ours: found.get(profile, theirs)
        for theirs, ours in names.items()
        if found.has_option(profile, theirs)
    }


def read(location: str) -> bytes:
    """All bytes at a location. Raises one of ERRORS."""
    if not is_remote(location):
        with open(local_path(location), "rb") as file:
            return file.read()
    if (found := object_store(location)) is not None:
        client, key = found
        with _as_os_errors():
            return bytes(obstore.get(client, key).bytes())
    system, path = filesystem(location)
    with system.open_input_stream(path) as stream:
        return stream.read()


def read_range(uri: str, start: int, stop: int | None) -> tuple[bytes, int]:
    """The bytes of a remote file from `start` to before `stop` (None: its end), as many as there are, and
    the size of the file, which is -1 where only a range was asked for.

    Raises:
        StoreError: fewer bytes came than the store had announced, or it does not answer.
        OSError: it cannot be read.
    """
    if (found := object_store(uri)) is not None:
        client, key = found
        with _as_os_errors():
            if stop is not None:
                return bytes(obstore.get_range(client, key, start=start, end=stop)), -1
            answer = obstore.get(client, key)
            return bytes(answer.bytes())[start:], int(answer.meta["size"])
    system, path = filesystem(uri)
    with system.open_input_file(path) as file:
        size = file.size()
        data = file.read_at(min(stop or size, size) - start, start) if start < size else b""
    # pyarrow gives as many bytes as were asked for, also where the file has become shorter meanwhile.
    if system.get_file_info(path).size != size:
        raise StoreError("the file has changed while it was read")
    return data, size


class Ranges(io.RawIOBase):
    """A remote file of an object store, to be read at any place: a request a read.

    Reads raise StoreError where the store does not answer, and what `wait` makes of it: called with a
    read, it may call that again.
    """

    def __init__(
        self, uri: str, wait: Callable[[Callable[[], bytes]], bytes] = lambda read: read()
    ):
        found = object_store(uri)
        if found is None:
            raise UsageError(f"{uri!r} is not a URI of s3:// or gs://")
        self._uri, self._at, self._wait = uri, 0, wait
        client, key = found

        def head() -> bytes:
            with _as_os_errors():
                return str(obstore.head(client, key)["size"]).encode()

        self._size = int(wait(head))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        if self._at >= stop:
            return b""
        start = self._at
        data = self._wait(lambda: self._whole(start, stop))
        self._at += len(data)
        return data

    def _whole(self, start: int, stop: int) -> bytes:
        data, _ = read_range(self._uri, start, stop)
        if len(data) < stop - start:
            raise StoreError("the object has become shorter while it was read")
        return data


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
                return sorted(
                    e.name
                    for e in entries
                    if (e.is_file() if kind == fs.FileType.File else e.is_dir())
                )
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


def create(root: str, relative: str, data: bytes) -> bool:
    """Put `data` at `relative` under `root`, whole, unless something is there: then False.

    Of all who do it at the same time exactly one is told True: on a local disk, on NFS, on s3:// and
    on gs://. Other stores have no such operation, and are asked before they are written to.
    Raises one of ERRORS.
    """
    if is_remote(root):
        uri = join(root, relative)
        if (found := object_store(uri)) is None:
            if exists(uri):
                return False
            _write_remote(uri, data)
            return True
        client, key = found
        try:
            with _as_os_errors():
                obstore.put(client, key, data, mode="create")
        except StoreError as error:
            if isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
                return False
            raise
        return True
    target = os.path.join(local_path(root), relative)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{_temporary_name()}"
    Path(temporary).write_bytes(data)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        return _create_alone(target, data)  # a file system without hard links
    finally:
        os.unlink(temporary)
    return True


def _create_alone(target: str, data: bytes) -> bool:
    try:
        with open(target, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def replace_same(root: str, relative: str, before: bytes, data: bytes) -> bool:
    """Put `data` in the place of `before`; False if something else, or nothing, is there by now.

    Of all who do it at the same time exactly one is told True, as with `create`.
    Raises one of ERRORS.
    """
    uri = join(root, relative)
    if (found := object_store(uri)) is not None:
        client, key = found
        try:
            with _as_os_errors():
                there = obstore.get(client, key)
                if bytes(there.bytes()) != before:
                    return False
                obstore.put(client, key, data, mode={"e_tag": there.meta["e_tag"] or ""})
        except FileNotFoundError:
            return False
        except StoreError as error:
            if isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
                return False
            raise
        return True
    if is_remote(uri):
        try:
            same = read(uri) == before
        except FileNotFoundError:
            return False
        if same:
            _write_remote(uri, data)
        return same
    target = local_path(uri)
    with contextlib.suppress(FileNotFoundError), open(target, "r+b") as file:
        _lock(file.fileno())
        # Another process may have replaced the file before this one got the lock of the old one.
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(target)) or file.read() != before:
            return False
        temporary = f"{target}.{_temporary_name()}"
        Path(temporary).write_bytes(data)
        os.replace(temporary, target)
        return True
    return False


def _lock(descriptor: int) -> None:
    """Wait for the lock of an open file. It ends with the descriptor, so a killed process frees it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # A file system without locks: the window between reading and replacing stays open.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def contains(root: str, relative: str) -> bool:
    """Whether the file `relative` (posix, without `..`) can only be below `root`: of a local one no
    symbolic link in its path leads out."""
    if is_remote(root):
        return True
    top = os.path.realpath(local_path(root))
    folder = os.path.realpath(os.path.dirname(os.path.join(top, relative)))
    return folder == top or folder.startswith(top.rstrip("/") + "/")


def delete_empty(folder: str) -> None:
    """Deletes a folder that has nothing in it; in an object store there are none. Raises nothing."""
    if not is_remote(folder):
        with contextlib.suppress(OSError):
            os.rmdir(local_path(folder))


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
