"""The members of a foreign tar one by one, from a local file or as a stream from a store.

tarfile asks for what a header claims and hides damage. So it reads here through `_Local` or
`_Forward`, which bound each read, and with `_Strict`, which reports damaged headers.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from raypipe.data.location import Location
from raypipe.data.stores import ERRORS, one_line
from raypipe.errors import UsageError

MAX_MEMBER_BYTES = 64 << 20
"""Members above this are not read here: sidecars, of which a million boxes take 60 MB as text."""

_MAX_READ = MAX_MEMBER_BYTES + 512


def members(place: Location) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """The members of a tar, each with a function that reads its content.

    Raises:
        UsageError: the store fails.
        Exception: anything, if the tar is damaged.
    """
    with (
        _opened(place) as source,
        tarfile.open(fileobj=source, mode="r:", tarinfo=_Strict, ignore_zeros=True) as tar,
    ):
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps a kilobyte a member

            def read(info: tarfile.TarInfo = info) -> bytes:
                source.seek(info.offset_data)
                content = source.read(info.size)
                if len(content) < info.size:
                    raise EOFError("unexpected end of data")
                return content

            yield info, read


class _Strict(tarfile.TarInfo):
    """Makes a damaged header an error everywhere; tarfile takes all but the first for the end.

    Blocks of zeros, the end mark, are skipped: more tars may follow (`cat a.tar b.tar`).
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Strict":
        begun = tar.offset
        try:
            info = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            source: Any = tar.fileobj
            behind = source.skip_zeros(begun)
            source.seek(behind)
            tar.offset = behind - tarfile.BLOCKSIZE  # tarfile adds one
            raise
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            if begun > 0:
                raise tarfile.SubsequentHeaderError(str(error)) from error  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
        if info.size < 0 or tar.offset <= begun:
            raise tarfile.SubsequentHeaderError(f"a member of {info.size} bytes")  # type: ignore[attr-defined]
        return info


# tarfile reads from _Local or _Forward, at most _MAX_READ bytes at once: a header may claim any
# size. skip_zeros(offset) gives the offset of the next block that is not all zeros, or the end.


def _bounded(size: int) -> int:
    if not 0 <= size <= _MAX_READ:
        raise tarfile.ReadError(f"a header of {size} bytes")
    return size


class _Local:
    """A local file, unbuffered.

    A buffer would read 8 KiB for every header of 512 bytes, and the next seek would drop it.
    """

    def __init__(self, file: io.FileIO):
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.tell, self.close = file.tell, file.close

    def seek(self, offset: int) -> int:
        if not 0 <= offset <= self._size:
            raise tarfile.ReadError("unexpected end of data")
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        return _whole_read(self._file, _bounded(size))

    def skip_zeros(self, offset: int) -> int:
        self._file.seek(offset)
        while chunk := self._file.read(1 << 20):
            if left := len(chunk.lstrip(b"\0")):
                return offset + (len(chunk) - left) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            offset += len(chunk)
        return offset


def _whole_read(file: Any, size: int) -> bytes:
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


class _Forward:
    """A stream from a store. It seeks forward by reading, and backward within the last chunk.

    At usual image sizes, one request a header would be slower than reading everything.
    """

    _CHUNK = 8 << 20  # of an object store, one request each

    def __init__(self, place: Location, stream: Any):
        self._place, self._stream = place, stream
        self._chunk, self._start, self._at = b"", 0, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> int:
        if offset < self._start:
            raise tarfile.ReadError("a member that begins before the one in front of it")
        self._at = offset
        return offset

    def close(self) -> None:
        self._stream.close()

    def read(self, size: int) -> bytes:
        parts = []
        left = _bounded(size)
        while left:
            here = self._at - self._start
            if here >= len(self._chunk) and not self._next():
                break
            if (here := self._at - self._start) >= len(self._chunk):
                continue
            part = self._chunk[here : here + left]
            parts.append(part)
            self._at += len(part)
            left -= len(part)
        return b"".join(parts)

    def skip_zeros(self, offset: int) -> int:
        self.seek(offset)
        while block := self.read(tarfile.BLOCKSIZE):
            if block.strip(b"\0"):
                return self._at - len(block)
        return self._at

    def _next(self) -> bool:
        try:
            chunk = self._stream.read(self._CHUNK)
        except ERRORS as error:
            raise UsageError(
                f"cannot read the tar {str(self._place)!r} to its end: {one_line(error)}. "
                "Nothing was started; try again when the store answers"
            ) from error
        # tarfile steps back by a byte, and to a block that it has seen.
        before = self._chunk[-tarfile.BLOCKSIZE :]
        self._start += len(self._chunk) - len(before)
        self._chunk = before + chunk
        return bool(chunk)


@contextmanager
def _opened(place: Location) -> Iterator[Any]:
    if place.is_remote:
        try:
            stream = place.stream()
        except ERRORS as error:
            raise UsageError(
                f"cannot read the tar {str(place)!r}: {one_line(error)}. It must exist, and its "
                "store must answer"
            ) from error
        with closing(_Forward(place, stream)) as source:
            yield source
        return
    path = place.path
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(
            f"cannot read the tar {str(place)!r}: it is no regular file; give one that can be "
            "read at any place"
        )
    with closing(_Local(open(path, "rb", buffering=0))) as source:
        yield source
