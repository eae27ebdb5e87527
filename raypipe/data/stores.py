"""Clients of stores: how they are made, and what their errors mean.

Objects of s3:// and gs:// are read and put through obstore. It tells how many bytes came; pyarrow's
S3 file gives as many bytes as were asked for, even if the object has become shorter. It puts a
small object by one request, pyarrow by three, and can create an object only if there is none. Lists
and deletes, and other stores, go through pyarrow.fs.

Errors of all clients become OSError: FileNotFoundError, PermissionError, and `StoreError` for
failures that may pass.
"""

import configparser
import contextlib
import errno
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import obstore
import pyarrow as pa
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore, S3Store
from pyarrow import fs

from raypipe.errors import UsageError

# --- errors ----------------------------------------------------------------------------------

ERRORS = (OSError, pa.ArrowException)
"""The exceptions of reading and writing at a location."""


class StoreError(OSError):
    """A store did not answer, or cannot now: timeouts, HTTP 5xx, throttling.

    It says nothing of the object, and may pass.
    """


class BeyondEnd(OSError):
    """A range begins behind an object's end."""


_PASSING = {
    getattr(errno, name)
    for name in [
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "ENOTCONN",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "ECONNRESET",
        "ECONNABORTED",
        "ECONNREFUSED",
        "EPIPE",
        "ENODEV",
        "ENXIO",
        "EREMOTEIO",
        "EAGAIN",
        "EBUSY",
        "EINTR",
        "EMFILE",
        "ENFILE",
        "ENOMEM",
        "ENOBUFS",
    ]
    if hasattr(errno, name)
}
"""The errors of a disk or a mount that does not answer. They say nothing of the file."""


def may_pass(error: BaseException, store: "Store | None") -> bool:
    """Whether a failure to read or write is the store's, which may pass, and not the file's.

    store: None for a local file.
    """
    if isinstance(error, StoreError):
        return True
    if isinstance(
        error, FileNotFoundError | PermissionError | NotADirectoryError | BeyondEnd | ValueError
    ):
        return False
    if not isinstance(error, ERRORS):
        return False
    if store is None:
        return getattr(error, "errno", None) in _PASSING
    # The errors of obstore are all above. Those of pyarrow do not tell the network from the file.
    return not store.has_objects


_ANSWERS = re.compile(
    r"AWS Error (?:ACCESS_DENIED|NO_SUCH|INVALID|SIGNATURE|MISSING|UNRECOGNIZED|ACCOUNT|VALIDATION)"
    r"|HTTP status (?:501|(?!408|429)4\d\d)"
)


def passing(error: BaseException, store: "Store | None") -> BaseException:
    """The error of a call of pyarrow.fs; a StoreError if the store may answer later.

    pyarrow has no class for that. It raises a plain OSError for whatever a store says.
    """
    if store is None or type(error) is not OSError or _ANSWERS.search(str(error)):
        return error
    return StoreError(short(error))


def one_line(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


_STATUS = re.compile(r"(?:status code: |HTTP status )(\d{3}(?: [A-Z][A-Za-z]*)*)")


def short(error: BaseException) -> str:
    """A failure to read or write, without the parts that differ from file to file.

    For example `HTTP 503 Service Unavailable` or `Input/output error`.
    """
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


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Raise obstore's errors as OSError."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(one_line(error)) from error
    except BaseError as error:
        if "status code: 416" in str(error):
            raise BeyondEnd(short(error)) from error
        raise StoreError(short(error)) from error


# --- clients ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Store:
    """A store by the parts of its URI: `scheme://authority?query`.

    It can be hashed and pickled. Its clients are made when they are first used, once a process.
    """

    scheme: str
    authority: str
    query: str

    @property
    def has_objects(self) -> bool:
        """Whether obstore has a client for it."""
        return self.scheme in ("s3", "gs", "gcs")

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """The pyarrow file system, and the path of the store's root in it.

        Raises:
            UsageError: pyarrow does not know the scheme, or an option is wrong.
        """
        return _filesystem(self)

    def objects(self) -> S3Store | GCSStore:
        """The obstore client of a store that `has_objects`.

        It tries once: the caller decides how long to wait for a store (`raypipe.data.patience`).
        """
        return _objects(self)


@functools.lru_cache(maxsize=64)
def _filesystem(store: Store) -> tuple[fs.FileSystem, str]:
    place = f"{store.scheme}://{store.authority}"
    try:
        return fs.FileSystem.from_uri(f"{place}/{store.query}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"cannot open {place}: {one_line(error)}. Give a local path or a URI of s3://, gs:// "
            "or another file system of pyarrow.fs, with its options as a query"
        ) from error


@functools.lru_cache(maxsize=64)
def _objects(store: Store) -> S3Store | GCSStore:
    options = dict(parse_qsl(store.query.removeprefix("?")))
    user, _, bucket = store.authority.rpartition("@")
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
    if store.scheme != "s3":
        return GCSStore(bucket, **common | ({"base_url": endpoint} if endpoint else {}))
    system, _ = _filesystem(store)
    key, _, secret = user.partition(":")
    keys = (
        {"access_key_id": unquote(key), "secret_access_key": unquote(secret)}
        if secret
        else _profile()
    )
    common |= keys | ({"endpoint": endpoint} if endpoint else {})
    return S3Store(bucket, region=system.region, **common)


def _profile() -> dict[str, str]:
    """Keys of ~/.aws/credentials, which obstore does not read; none if the environment has some."""
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


class Ranges(io.RawIOBase):
    """An object, to read at any place: one request a read.

    Args:
        wait: called with a read. It may call that several times, while the store does not answer.
    """

    def __init__(
        self,
        client: S3Store | GCSStore,
        key: str,
        wait: Callable[[Callable[[], bytes]], bytes] = lambda do: do(),
    ):
        self._client, self._key, self._at, self._wait = client, key, 0, wait

        def head() -> bytes:
            with as_os_errors():
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
        with as_os_errors():
            data = bytes(obstore.get_range(self._client, self._key, start=start, end=stop))
        if len(data) < stop - start:
            raise StoreError("the object has become shorter while it was read")
        return data
