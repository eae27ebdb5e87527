"""A folder or a file, local or in a store, resolved once.

`Location.of` takes what the user gave: a local path (also `~` and `file://`), or a URI that
`pyarrow.fs.FileSystem.from_uri` knows: `s3://bucket/key`, `gs://bucket/key`, `hdfs://...`. Options
are a URI's query, and stay with every location below it:
`s3://bucket/photos?endpoint_override=http://localhost:9000&region=us-east-1`. A `?` in a URI always
starts a query. Other characters of a key may stand as they are or percent-encoded.

Keep credentials in the environment (AWS_ACCESS_KEY_ID, ...): a URI is written to the journal and to
reports.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, unquote, unquote_to_bytes

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, PreconditionError
from pyarrow import fs

from raypipe.data import local
from raypipe.data.names import STATE
from raypipe.data.patience import Patience
from raypipe.data.stores import Ranges, Store, StoreError, as_os_errors, may_pass, passing

_URI = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://([^/?]*)([^?]*)(\?.*)?", re.DOTALL)
_WITHOUT_FOLDERS = ("s3", "gcs", "abfs")
_CHUNK = 8 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Location:
    """A folder or a file. Two locations are equal if they have the same path in the same store.

    It can be hashed and pickled. In another process it means the same, and makes new clients. All
    operations raise one of ERRORS where they fail, unless they say otherwise. Those that can be
    repeated are, for READ_PATIENCE_S, while the store fails.

    Attributes:
        text: what the user gave, or a text made of it. `str()` gives it.
        path: local, the absolute path; else the key in the store, unquoted.
        store: None for a local one.
        state: of an output, the folder below it for a run's own files.
    """

    text: str = field(compare=False)
    path: str
    store: Store | None = None
    state: str = field(default=STATE, compare=False)

    @classmethod
    def of(cls, text: str) -> "Location":
        """The location that a user, or the column `uri` of a table, means by `text`."""
        match = _URI.fullmatch(text) if "://" in text else None
        if match is None:
            home = text.startswith("~") and "\0" not in text
            return cls(text, os.path.abspath(os.path.expanduser(text) if home else text))
        scheme, authority, path, query = match.groups()
        if scheme.lower() == "file":
            return cls(text, os.fsdecode(unquote_to_bytes(path)))
        store = Store(scheme.lower(), authority, query or "")
        return cls(text, unquote(path).strip("/"), store)

    def __str__(self) -> str:
        return self.text

    # --- names -------------------------------------------------------------------------------

    @property
    def is_remote(self) -> bool:
        """Whether it is in a store."""
        return self.store is not None

    @property
    def uri(self) -> str:
        """How a table names it, the same in any process.

        An absolute path, or a URI: in a store, or `file://` if the path is not valid UTF-8.
        """
        return self.text if self.store is not None else _local_uri(self.path)

    def uris(self, relatives: Iterable[str]) -> list[str]:
        """The `uri` of each of many files below this folder."""
        if self.store is not None:
            return [(self / relative).text for relative in relatives]
        return [_local_uri(os.path.join(self.path, relative)) for relative in relatives]

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, with the dot; empty if there is none."""
        return os.path.splitext(self.path)[1]

    def __truediv__(self, relative: str) -> "Location":
        """The location `relative` (posix, unquoted) below this one; a URI keeps its query."""
        if not relative:
            return self
        if self.store is None:
            path = os.path.join(self.path, relative)
            return Location(path, path)
        head, mark, query = self.text.partition("?")
        head = head.rstrip("/")
        if head.endswith(":"):  # only a scheme
            head += "//"
        path = f"{self.path}/{relative.strip('/')}" if self.path else relative.strip("/")
        return Location(f"{head}/{quote(relative)}{mark}{query}", path, self.store)

    def within(self, folder: "Location") -> bool:
        """Whether it is `folder` or below it. Local paths are compared without their links."""
        if self.is_remote != folder.is_remote:
            return False
        if self.is_remote:
            (one, inner), (other, outer) = self.filesystem(), folder.filesystem()
            return one == other and (inner == outer or inner.startswith(outer.rstrip("/") + "/"))
        inner, outer = os.path.realpath(self.path), os.path.realpath(folder.path)
        return os.path.isdir(outer) and os.path.commonpath([inner, outer]) == outer

    def contains(self, relative: str) -> bool:
        """Whether the file `relative` (posix, without `..`) can only be below this folder.

        Locally, no symbolic link in its path leads out.
        """
        if self.is_remote:
            return True
        top = os.path.realpath(self.path)
        folder = os.path.realpath(os.path.dirname(os.path.join(top, relative)))
        return folder == top or folder.startswith(top.rstrip("/") + "/")

    # --- the store ---------------------------------------------------------------------------

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """The pyarrow file system of a remote location, and its path there. Raises UsageError."""
        assert self.store is not None, f"{self.text} is local"
        system, base = self.store.filesystem()
        return system, f"{base.rstrip('/')}/{self.path}".rstrip("/")

    def _patiently(self, do: Callable[[], T]) -> T:
        """The result of `do`, which is repeated while the store fails. Twice must be as once."""

        def ask() -> T:
            try:
                return do()
            except OSError as error:
                told = passing(error, self.store)
                if told is error:
                    raise
                raise told from error

        return Patience().call(ask, self.may_pass)

    def may_pass(self, error: BaseException) -> bool:
        """Whether a failure here is the store's, which may pass, and not the file's."""
        return may_pass(error, self.store)

    # --- reading -----------------------------------------------------------------------------

    def read(self, *, once: bool = False) -> bytes:
        """All bytes of a file.

        once: do not ask again if the store fails.
        """
        return self._read() if once else self._patiently(self._read)

    def _read(self) -> bytes:
        if self.store is None:
            with open(self.path, "rb") as file:
                return file.read()
        if self.store.has_objects:
            with as_os_errors():
                return bytes(obstore.get(self.store.objects(), self.path).bytes())
        system, path = self.filesystem()
        with system.open_input_stream(path) as stream:
            return stream.read()

    def read_range(
        self, start: int, stop: int | None, *, admit: Callable[[int], None] = lambda size: None
    ) -> tuple[bytes, int]:
        """The bytes of a remote file from `start` to before `stop`, or to its end.

        Args:
            admit: called with the number of bytes before any is read. It may raise.

        Returns:
            As many bytes as there are; and the file's size, or -1 if only a range was asked for.

        Raises:
            StoreError: fewer bytes came than the store had announced, or it does not answer.
        """
        if self.store is not None and self.store.has_objects:
            client = self.store.objects()
            with as_os_errors():
                if stop is not None:
                    admit(stop - start)
                    return bytes(obstore.get_range(client, self.path, start=start, end=stop)), -1
                answer = obstore.get(client, self.path)
                admit(int(answer.meta["size"]) - start)
                return bytes(answer.bytes())[start:], int(answer.meta["size"])
        system, path = self.filesystem()
        with system.open_input_file(path) as file:
            size = file.size()
            admit(max(min(stop or size, size) - start, 0))
            data = file.read_at(min(stop or size, size) - start, start) if start < size else b""
        # pyarrow gives as many bytes as were asked for, even if the file has become shorter.
        if system.get_file_info(path).size != size:
            raise StoreError("the file has changed while it was read")
        return data, size

    def open(self, *, patient: bool = False) -> pa.NativeFile:
        """The file, to read at any place.

        patient: reads are repeated while the store fails. Else the caller repeats them.
        """
        if self.store is None:
            return pa.OSFile(self.path)
        if self.store.has_objects:
            ranges = self.stream() if patient else Ranges(self.store.objects(), self.path)
            return pa.PythonFile(ranges, mode="r")
        system, path = self.filesystem()
        return system.open_input_file(path)

    def stream(self) -> Ranges | pa.NativeFile:
        """A remote file, to read from its start. Reads are repeated while its store fails."""
        if self.store is not None and self.store.has_objects:
            patience = Patience()
            client = self.store.objects()
            return Ranges(client, self.path, lambda do: patience.call(do, self.may_pass))
        system, path = self.filesystem()
        return system.open_input_stream(path, buffer_size=_CHUNK)

    # --- listing -----------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is a file. Locally also a folder or a broken link."""
        if self.store is None:
            return os.path.lexists(self.path)
        system, path = self.filesystem()
        return self._patiently(lambda: system.get_file_info(path)).type == fs.FileType.File

    def names(self) -> list[str]:
        """Names of the files directly in a folder, sorted; none if there is no such folder."""
        return self._listed(fs.FileType.File)

    def folders(self) -> list[str]:
        """Names of the folders directly in a folder, sorted; none if there is no such folder."""
        return self._listed(fs.FileType.Directory)

    def _listed(self, kind: fs.FileType) -> list[str]:
        if self.store is not None:
            system, path = self.filesystem()
            folder = fs.FileSelector(path, allow_not_found=True)
            found = self._patiently(lambda: system.get_file_info(folder))
            return sorted(info.base_name for info in found if info.type == kind)
        try:
            with os.scandir(self.path) as entries:
                return sorted(
                    e.name
                    for e in entries
                    if (e.is_file() if kind == fs.FileType.File else e.is_dir())
                )
        except FileNotFoundError:
            return []

    def below(self) -> Iterator[str]:
        """The files below a remote folder, by their paths in it; none if there is no folder."""
        system, path = self.filesystem()
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        for info in self._patiently(lambda: system.get_file_info(selector)):
            if info.type == fs.FileType.File:
                yield info.path[len(path) :].lstrip("/")

    def infos(self, folder: str) -> list[fs.FileInfo]:
        """All that is below a folder of the store. A store that does not answer is asked again.

        Args:
            folder: its path in `filesystem()`.

        Raises:
            OSError: the store still does not answer, or has no such folder.
        """
        system, _ = self.filesystem()
        selector = fs.FileSelector(folder, recursive=True)
        return self._patiently(lambda: system.get_file_info(selector))

    # --- writing -----------------------------------------------------------------------------

    def write(self, relative: str, data: bytes | memoryview, *, tmp: str | None = None) -> None:
        """Put `data` at `relative` below this folder: whole or not at all, over what was there.

        tmp: a folder below this one for unfinished local files; by default that of its state.
        """
        if self.store is None:
            local.write(self.path, relative, data, f"{self.state}/tmp" if tmp is None else tmp)
        else:
            (self / relative)._put(data)

    def create(self, relative: str, data: bytes) -> bool:
        """Put `data` at `relative` below this folder, whole, unless something is there: then False.

        If several processes do it at once, exactly one gets True: on a local disk, on NFS, on s3://
        and on gs://. Other stores have no such operation, so they are asked before the write.
        """
        if self.store is None:
            return local.create(os.path.join(self.path, relative), data)
        target = self / relative
        if self.store.has_objects:
            client = self.store.objects()
            return _conditional(lambda: obstore.put(client, target.path, data, mode="create"))
        if target.exists():
            return False
        target._put(data)
        return True

    def replace_same(self, relative: str, before: bytes, data: bytes) -> bool:
        """Put `data` in the place of `before`; False if something else, or nothing, is there.

        If several processes do it at once, exactly one gets True, as with `create`.
        """
        if self.store is None:
            return local.replace_same(os.path.join(self.path, relative), before, data)
        target = self / relative
        try:
            if not self.store.has_objects:
                same = target.read(once=True) == before
                if same:
                    target._put(data)
                return same
            client = self.store.objects()
            with as_os_errors():
                there = obstore.get(client, target.path)
                if bytes(there.bytes()) != before:
                    return False
            mode: Any = {"e_tag": there.meta["e_tag"] or ""}
            return _conditional(lambda: obstore.put(client, target.path, data, mode=mode))
        except FileNotFoundError:
            return False

    def _put(self, data: bytes | memoryview) -> None:
        """Write a file of a store, again while the store fails."""
        self._patiently(lambda: self._put_once(data))

    def _put_once(self, data: bytes | memoryview) -> None:
        """Write a file of a store: by one request, or by one stream."""
        if self.store is not None and self.store.has_objects:
            with as_os_errors():  # obstore takes bytes that are unsigned only
                obstore.put(self.store.objects(), self.path, memoryview(data).cast("B"))
            return
        system, path = self.filesystem()
        if system.type_name not in _WITHOUT_FOLDERS:
            system.create_dir(path.rpartition("/")[0], recursive=True)
        # Closing makes the object appear, and an exception closes a stream too. So everything is
        # written at once. If a part of the upload failed, closing fails and nothing appears.
        stream = system.open_output_stream(path)
        stream.write(data)
        stream.close()

    # --- deleting ----------------------------------------------------------------------------

    def delete(self) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.store is None:
                os.unlink(self.path)
            else:
                system, path = self.filesystem()
                self._patiently(lambda: system.delete_file(path))

    def delete_folder(self) -> None:
        """Delete a folder with everything below it, if it is there."""
        if self.store is None:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.path)
            return
        system, path = self.filesystem()

        def delete() -> None:
            if system.get_file_info(path).type == fs.FileType.Directory:
                system.delete_dir(path)

        self._patiently(delete)

    def delete_empty(self) -> None:
        """Delete a local folder if it is empty; stores have no folders. Raises nothing."""
        if self.store is None:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)


def _local_uri(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


def _conditional(put: Callable[[], object]) -> bool:
    """Whether a conditional put succeeded."""
    try:
        with as_os_errors():
            put()
    except StoreError as error:
        if isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
            return False
        raise
    return True
