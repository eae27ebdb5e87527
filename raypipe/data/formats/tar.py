"""WebDataset tars: which images one holds, where their bytes are, and which sidecars belong to which image.

A `.json` or `.cls` member belongs to the image with its full name (`a.0.jpg.json`) or full stem (`a.0.json` to `a.0.jpg`); else,
as in WebDataset, to the images whose key, the name up to the first dot, is its stem (`a.json` to `a.left.jpg` and
`a.right.jpg`). It may come before or after them, next to them or not.
"""

import io
import json
import logging
import os
import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from raypipe.data.location import (
    ERRORS,
    Ranges,
    filesystem,
    is_remote,
    local_path,
    local_uri,
    object_store,
    one_line,
)
from raypipe.data.names import SUFFIXES, suffix_of
from raypipe.data.patience import Patience
from raypipe.data.tables import Listed, flag, frame, real, rows, text, whole
from raypipe.errors import UsageError, printable, words

log = logging.getLogger(__name__)

MAX_SIDECAR_BYTES = 64 << 20
"""Sidecars above this make no sense: a million boxes take 60 MB as text."""

_MAX_READ = MAX_SIDECAR_BYTES + 512
_MOST = 1 << 62  # bytes of a member: a header may claim more than a table holds
_SIDECARS = (".json", ".cls")


@dataclass(frozen=True, slots=True)
class _Member:
    """An image, or a sidecar with its `content`. `run`: a number that members of one key, side by side, have in common."""

    path: str
    run: int
    offset: int = 0
    length: int = 0
    content: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What is known of one image."""

    image_id: str | None = None
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    annotation_ids: list[int] = field(default_factory=list)
    frame: tuple[int, int] = (0, 0)


def list_tar(uri: str, limit: int | None) -> Listed:
    """The images of a tar in its order, with what their sidecars say.

    The whole tar is read through, also with a `limit`: sidecars may come after all images. A tar that breaks off gives what
    was before the break, and a warning.

    Raises UsageError if it is no tar, or its store fails.
    """
    skipped: Counter[str] = Counter()
    images: list[_Member] = []
    sidecars: list[_Member] = []
    for member in _members(uri, skipped):
        (images if member.content is None else sidecars).append(member)
    joined, left_over = join_sidecars(
        [one.path for one in images], [one.run for one in images], sidecars
    )
    for member in left_over:
        skipped[suffix_of(member.path)] += 1
    if left_over:
        first = printable(left_over[0].path)
        why = "belong to no image in it, or to one that has another"
        log.warning(
            "%s: %d .json or .cls files %s; they are ignored. The first is %s",
            uri,
            len(left_over),
            why,
            first,
        )
    images = images if limit is None else images[:limit]
    found, bad = [], []
    alone = Counter(id(member) for of in joined for member in of.values())
    for member, of in zip(images, joined, strict=False):
        try:
            sidecar = parse_sidecar(
                *(of[kind].content if kind in of else None for kind in _SIDECARS)
            )
        except Exception as error:  # foreign text: whatever it raises, this image goes without
            bad.append((member.path, words(error)))
            sidecar = Sidecar()
        found.append((sidecar, all(alone[id(one)] == 1 for one in of.values())))
    if bad:
        first = f"that of {printable(bad[0][0])}: {bad[0][1]}"
        why = "make no sense; their images go without annotations"
        log.warning("%s: %d .json or .cls files %s. The first is %s", uri, len(bad), why, first)
    # An id that a sidecar gives to several images is none of theirs.
    own = [sidecar.image_id if single else None for sidecar, single in found]
    stems = [posixpath.splitext(member.path)[0] for member in images]
    # The webdataset sink writes the dots of a name as %2E, because a key ends at its first dot.
    names = [
        member.path if one is None else member.path.replace("%2E", ".").replace("%25", "%")
        for member, one in zip(images, own, strict=True)
    ]
    known = [sidecar for sidecar, _ in found]
    table = rows(
        [text(stem if one is None else one) for stem, one in zip(stems, own, strict=True)],
        [text(name) for name in names],
        [local_uri(uri)] * len(images),
        [member.offset for member in images],
        [member.length for member in images],
        boxes=[one.boxes for one in known],
        labels=[one.labels for one in known],
        crowds=[one.crowds for one in known],
        annotation_ids=[one.annotation_ids for one in known],
        frames=[one.frame for one in known],
    )
    return Listed(table, skipped)


# --- which sidecar belongs to which image ----------------------------------------------------------------------------------


def join_sidecars(
    images: list[str], runs: list[int], sidecars: Iterable[_Member]
) -> tuple[list[dict[str, _Member]], list[_Member]]:
    """The sidecars of each image by their suffix (.json, .cls), and those that belong to none.

    `images`: paths in the tar, in order; `runs`: as in `_Member`, of each.
    """
    by: dict[str, dict[str, list[int]]] = {
        name: defaultdict(list) for name in ("path", "stem", "key")
    }
    for at, path in enumerate(images):
        by["path"][path].append(at)
        by["stem"][posixpath.splitext(path)[0]].append(at)
        by["key"][_key(path)].append(at)
    joined: list[dict[str, _Member]] = [{} for _ in images]
    waiting = list(sidecars)
    for how in ("path", "stem", "key"):  # the closest kind of belonging comes first for all of them
        left = []
        for sidecar in waiting:
            stem, suffix = posixpath.splitext(sidecar.path)
            kind = suffix.lower()
            free = [at for at in by[how].get(stem, ()) if kind not in joined[at]]
            beside = [at for at in free if runs[at] == sidecar.run]
            # Several images of one path are samples of their own, as in two tars that were put together: one each.
            taken = {images[at]: at for at in reversed(beside or free)}
            for at in taken.values():
                joined[at][kind] = sidecar
            if not taken:
                left.append(sidecar)
        waiting = left
    return joined, waiting


def _key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of its last component."""
    folder, slash, base = path.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def parse_sidecar(json_: bytes | None, cls: bytes | None) -> Sidecar:
    """What .json (if it is written as our sink writes it) and .cls say. Raises anything where they make no sense."""
    found = json.loads(json_) if json_ is not None else {}
    image_id = found.get("image_id") if isinstance(found, dict) else None
    image_id = None if image_id is None else str(image_id)
    of_image = [whole(cls)] if cls is not None else []
    if not isinstance(found, dict) or not isinstance(found.get("boxes"), list):
        return Sidecar(image_id=image_id, labels=of_image)
    boxes = [[real(value) for value in box] for box in found["boxes"]]
    labels = [whole(label) for label in found.get("labels", [])]
    crowds = [flag(crowd) for crowd in found.get("crowds", [False] * len(boxes))]
    annotation_ids = [whole(number) for number in found.get("annotation_ids", range(len(boxes)))]
    if any(len(box) != 4 for box in boxes) or not (
        len(boxes) == len(crowds) == len(annotation_ids)
    ):
        raise ValueError("lengths differ")
    if len(labels) != len(boxes) and boxes:
        raise ValueError("as many labels as boxes are needed")
    return Sidecar(
        image_id=image_id,
        boxes=boxes,
        labels=labels or of_image,
        crowds=crowds,
        annotation_ids=annotation_ids,
        frame=frame(found),
    )


# --- members ---------------------------------------------------------------------------------------------------------------


def _members(uri: str, skipped: Counter[str]) -> Iterator[_Member]:
    """The images and sidecars of a tar, in its order; other members are counted."""
    count = 0
    key, run = None, 0
    places: dict[str, tuple[int, int]] = {}  # of the images so far, for links to them
    try:
        for info, read in _entries(uri):
            count += 1
            base = posixpath.basename(info.name)
            if info.isdir() or base.startswith("."):
                continue
            if (here := _key(info.name)) != key:
                key, run = here, run + 1
            lower = info.name.lower()
            if lower.endswith(SUFFIXES):
                place = _place(info, places)
                if place is None:
                    skipped["(link to nothing, or sparse)"] += 1
                    continue
                places[posixpath.normpath(info.name)] = place
                yield _Member(info.name, run, *place)
            elif lower.endswith(_SIDECARS) and info.isreg() and not info.issparse():
                yield _Member(
                    info.name, run, content=read() if info.size <= MAX_SIDECAR_BYTES else b""
                )
            else:
                skipped[suffix_of(base)] += 1
    except UsageError:
        raise
    except (
        Exception
    ) as error:  # foreign bytes: tarfile raises many kinds, and others from within itself
        if count and isinstance(error, ERRORS):
            raise UsageError(
                f"cannot read the tar {uri!r} to its end: {words(error)}. Nothing was started"
            ) from error
        if count == 0:
            raise UsageError(
                f"cannot read the tar {uri!r}: {words(error)}. It must exist and be an uncompressed tar; unpack .tar.gz first, "
                "because images inside it cannot be reached one by one"
            ) from error
        log.warning(
            "%s breaks off after %d members (%s); what was behind that is lost",
            uri,
            count,
            words(error),
        )
        skipped["(tar that breaks off)"] += 1


def _place(info: tarfile.TarInfo, places: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Where the bytes of a member are, offset and length; of a link, those of the image among `places` that it leads to. None: nowhere in the tar."""
    if info.isreg():
        return None if info.issparse() else (info.offset_data, min(info.size, _MOST))
    if info.islnk():
        return places.get(posixpath.normpath(info.linkname))
    if info.issym():
        return places.get(
            posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
        )
    return None


def _entries(uri: str) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """The members of a tar, each with what reads its content. Raises UsageError if the store fails, anything if the tar is bad."""
    with (
        _opened(uri) as source,
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
    """A damaged header is an error everywhere; tarfile takes it for the tar's end, unless it is the first.

    Blocks of zeros are the end mark, and more tars may follow it (`cat a.tar b.tar`): they are passed over.
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


# tarfile reads from _Local or _Forward, in turns of at most _MAX_READ bytes: a header may claim any size. Both can
# `skip_zeros`: give the offset of the first block of 512 bytes, from an offset on, that is not all zeros; or of the end.


def _bounded(size: int) -> int:
    if not 0 <= size <= _MAX_READ:
        raise tarfile.ReadError(f"a header of {size} bytes")
    return size


class _Local:
    """A local file. Unbuffered: a buffer would read 8 KiB for every header of 512 bytes and be thrown away by the next seek."""

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
    """A stream of a store: a request for each header would be slower than reading everything, at usual image sizes.

    Seeks forward by reading, and backward within the last chunk.
    """

    _CHUNK = 8 << 20  # a request each, of an object store

    def __init__(self, uri: str, stream: Any):
        self._uri, self._stream = uri, stream
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
                f"cannot read the tar {self._uri!r} to its end: {one_line(error)}. Nothing was started; try again when the "
                "store answers"
            ) from error
        before = self._chunk[
            -tarfile.BLOCKSIZE :
        ]  # tarfile steps back by a byte, and to a block that it has seen
        self._start += len(self._chunk) - len(before)
        self._chunk = before + chunk
        return bool(chunk)


def _stream(uri: str) -> Any:
    """A remote file to read from its beginning on. A store that fails meanwhile is asked again."""
    if object_store(uri) is not None:
        patience = Patience()
        return Ranges(uri, lambda read: patience.call(read, uri))
    system, path = filesystem(uri)
    return system.open_input_stream(path, buffer_size=8 << 20)


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    if is_remote(uri):
        try:
            stream = _stream(uri)
        except ERRORS as error:
            raise UsageError(
                f"cannot read the tar {uri!r}: {one_line(error)}. It must exist, and its store must answer"
            ) from error
        with closing(_Forward(uri, stream)) as source:
            yield source
        return
    path = local_path(uri)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(
            f"cannot read the tar {uri!r}: it is no regular file; give one that can be read at any place"
        )
    with closing(_Local(open(path, "rb", buffering=0))) as source:
        yield source
