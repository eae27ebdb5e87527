"""Image files: finding them in folders and globs, reading ranges of their bytes, writing them.

Local or in a store. Files are found in a deterministic order.
"""

import functools
import glob
import io
import itertools
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import fs

from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.data.stores import ERRORS, BeyondEnd, one_line
from raypipe.data.tables import images_of
from raypipe.errors import UsageError
from raypipe.images.header import Reject

MAX_BYTES = 512 << 20
"""Encoded images above this are rejected unread: half a GiB is an accident or an attack."""

# --- listing -----------------------------------------------------------------------------------


HIDDEN, CIRCULAR = "(hidden)", "(link in a circle)"
"""What is left out of a folder, as it is counted. A hidden folder counts once."""


def find(input: str, skipped: Counter[str]) -> tuple[Location, Iterable[str]]:
    """The files of a folder, of a glob, or one file: their folder, and their paths in it, in order.

    Ids are relative to this folder.

    Args:
        skipped: counts what is left out of a folder, while the paths are taken. What a glob does
            not match is not counted.

    Raises:
        UsageError: there is no such place, or a folder cannot be listed.
    """
    place = Location.of(input)
    return (_find_remote if place.is_remote else _find_local)(place, skipped)


def alternatives(input: str) -> list[str]:
    """The places that braces in `input` stand for: `{000..009}` counts, `{a,b}` lists.

    A path that exists stands for itself.
    """
    if "{" not in input:
        return [input]
    place = Location.of(input)
    if not place.is_remote and place.exists():
        return [input]
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", input)
    if match is None:
        return [input]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        if int(last) < int(first):
            raise UsageError(f"{match[0]} in {input!r} counts downwards; write {{{last}..{first}}}")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    head, tail = input[: match.start()], input[match.end() :]
    return [place for choice in choices for place in alternatives(head + choice + tail)]


def root_of(input: str) -> str | None:
    """The local folder that everything `input` lists is below; None if it is remote or missing.

    It is the folder itself, the fixed part of a glob or of braces, or the folder of a file.
    """
    if Location.of(input).is_remote:
        return None
    folders = []
    for place in map(Location.of, alternatives(input)):
        path = place.path
        if not os.path.lexists(path) and (magic := re.search(r"[*?[]", path)) is not None:
            path = path[: magic.start()] + "_"
        folders.append(path if os.path.isdir(path) else os.path.dirname(path))
    folder = os.path.commonpath(folders)
    return folder if os.path.isdir(folder) else None


def _find_local(place: Location, skipped: Counter[str]) -> tuple[Location, Iterable[str]]:
    path = place.path
    if os.path.isdir(path):
        return place, _walk(path, skipped)
    if os.path.lexists(path):
        return _local(os.path.dirname(path)), [os.path.basename(path)]
    if not glob.has_magic(path):
        raise UsageError(
            f"{str(place)!r} does not exist (looked at {path}); nothing can be read from it"
        )
    base = os.path.dirname(path[: re.search(r"[*?[]", path).start()])  # type: ignore[union-attr]
    inside = path[len(base) :].lstrip("/")
    if "**" in components(inside):
        return _local(base), _deep(base, inside)
    matches = {match[len(base) :].lstrip("/") for match in glob.iglob(path)}
    return _local(base), sorted(
        (match for match in matches if STATE not in components(match)), key=components
    )


def _local(path: str) -> Location:
    return Location(path, path)


def _deep(base: str, pattern: str) -> Iterator[str]:
    """The paths below `base` that match a pattern with `**`.

    Not by glob: it follows links in circles, and skips folders that it cannot read.
    """
    wanted = _glob_regex(pattern, question=True)
    head = "/".join(itertools.takewhile(lambda part: part != "**", components(pattern)))
    folders = [
        folder[len(base) :].strip("/")
        for folder in glob.iglob(os.path.join(glob.escape(base), head))
        if os.path.isdir(folder)
    ]
    for folder in sorted(folders, key=components):
        if STATE not in components(folder):
            found = _walk(os.path.join(base, folder), Counter())
            inside = (posixpath.join(folder, path) for path in found)
            yield from filter(wanted.fullmatch, inside)


def _find_remote(place: Location, skipped: Counter[str]) -> tuple[Location, Iterable[str]]:
    system, path = place.filesystem()
    magic = re.search(r"[*\[]", path)
    base = path if magic is None else path[: magic.start()].rpartition("/")[0].rstrip("/")
    try:
        if magic is not None:
            there = system.get_file_info(posixpath.normpath(path)).type
            if there != fs.FileType.NotFound:  # a name with brackets, not a pattern
                magic, base = None, path
        if magic is None and "/" in path:
            info = system.get_file_info(path)
            if info.type == fs.FileType.File and not (
                info.size == 0 and _has_keys_below(system, path)
            ):
                base = path.rpartition("/")[0]
                return _reroot(place, base), [path[len(base) + 1 :]]
            if info.type == fs.FileType.NotFound:
                raise UsageError(f"{str(place)!r} does not exist; nothing can be read from it")
        infos = place.infos(base)
    except ERRORS as error:
        raise UsageError(f"cannot list {str(place)!r}: {one_line(error)}") from error
    markers = {info.path for info in infos if info.type == fs.FileType.File and info.size == 0}
    if markers:  # an empty object beside keys below its name stands for a folder
        markers &= {parent for info in infos for parent in _parents(info.path)}
    relative = [
        info.path[len(base) + 1 :]
        for info in infos
        if info.type == fs.FileType.File and info.path not in markers
    ]
    visible = [name for name in relative if not any(map(_is_hidden, name.split("/")))]
    if magic is not None:
        matches = _glob_regex(path[len(base) :].lstrip("/"))
        visible = [name for name in visible if matches.fullmatch(name)]
    else:
        hidden = {_hidden_part(name) for name in relative} - {""}
        skipped[HIDDEN] += len(hidden)
    return _reroot(place, base), sorted(visible, key=components)


def _hidden_part(path: str) -> str:
    """The path up to its first hidden component; empty if it has none, or is of raypipe's state."""
    parts = components(path)
    first = next((at for at, part in enumerate(parts) if _is_hidden(part)), None)
    return "" if first is None or parts[first] == STATE else "/".join(parts[: first + 1])


def _has_keys_below(system: fs.FileSystem, path: str) -> bool:
    """Whether a store has keys below the object `path`, which some tools put for a folder."""
    return bool(system.get_file_info(fs.FileSelector(path, allow_not_found=True)))


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _reroot(place: Location, base: str) -> Location:
    """The location of `base`, the path of a folder above `place` in its file system."""
    head, mark, query = str(place).partition("?")
    scheme, _, rest = head.partition("://")
    top = Location.of(f"{scheme}://{rest.partition('/')[0]}{mark}{query}")
    _, path = top.filesystem()
    return top / base[len(path) :].strip("/")


def _glob_regex(pattern: str, *, question: bool = False) -> re.Pattern[str]:
    """A glob as a regular expression, like glob with recursive=True.

    `**` as a whole component is any number of folders; `*` and `[]` stay in one component.

    question: `?` is one character. In a URI it starts a query instead.
    """
    regex = ""
    for piece in re.findall(r"\*\*/|\*\*$|\*|\[[^\]]+\]|.", pattern, re.DOTALL):
        if piece == "**/" and (not regex or regex.endswith("/")):
            regex += "(?:[^/]+/)*"
        elif piece == "**" and (not regex or regex.endswith("/")):
            regex += ".*"
        elif piece.startswith("*"):
            regex += "[^/]*" + ("/" if piece.endswith("/") else "")
        elif piece == "?" and question:
            regex += "[^/]"
        elif piece.startswith("["):
            regex += "[" + ("^/" + piece[2:] if piece[1] == "!" else piece[1:])
        else:
            regex += re.escape(piece) if piece != "/" else "/"
    return re.compile(regex)


def _walk(root: str, skipped: Counter[str]) -> Iterator[str]:
    """The relative paths of all files below `root`, ordered by components.

    A million files take seconds, because no file is asked for its status.
    """
    stack: list[tuple[Iterator[os.DirEntry[str]], str, tuple[str, ...]]] = [
        (iter(_entries(root, skipped)), "", (os.path.realpath(root),))
    ]
    while stack:
        entries, prefix, above = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        path = prefix + entry.name
        if not _is_folder(entry):
            yield path
            continue
        # Only a link can lead back up. Without one, the real path follows from the name.
        real = (
            os.path.realpath(entry.path)
            if entry.is_symlink()
            else os.path.join(above[-1], entry.name)
        )
        if real in above:
            skipped[CIRCULAR] += 1
        else:
            stack.append((iter(_entries(entry.path, skipped)), path + "/", (*above, real)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str, skipped: Counter[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            there = [entry for entry in entries if entry.name != STATE]
    except OSError as error:
        raise UsageError(
            f"cannot list the directory {folder!r}: {error.strerror}. Its images would be missing "
            "without a trace; make it readable or move it away"
        ) from error
    visible = [entry for entry in there if not _is_hidden(entry.name)]
    skipped[HIDDEN] += len(there) - len(visible)
    return sorted(visible, key=lambda entry: entry.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == STATE


def components(path: str) -> list[str]:
    """The parts of a path."""
    return path.split("/")


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file, from `offset` on; length -1 means up to its end."""

    place: Location
    offset: int
    length: int


def read_local(path: str, group: list[Range]) -> list[bytes | Reject]:
    """The bytes of adjacent ranges of a local file, or why they cannot be had. Raises OSError."""
    # Not open(): os.open, fstat and pread are enough. Non-blocking, in case x.jpg is a pipe.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    )
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return [unreadable(f"{path}: not a regular file")] * len(group)
        return _slices(path, status.st_size, group, functools.partial(_pread, descriptor))
    finally:
        os.close(descriptor)


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def read_remote(
    place: Location, group: list[Range], *, admit: Callable[[int], None] = lambda size: None
) -> list[bytes | Reject]:
    """The bytes of adjacent ranges of a file in a store, by one request. Raises OSError.

    admit: called with the number of bytes before any is read. It may raise.
    """
    name, first, last = str(place), group[0], group[-1]
    if first.offset < 0:
        return [_beyond(name, 0, one) for one in group]
    stop = None if last.length < 0 else last.offset + last.length
    if stop is not None and stop - first.offset > MAX_BYTES:
        return [_too_long(name, stop - first.offset)] * len(group)
    try:
        data, size = place.read_range(first.offset, stop, admit=admit)
    except BeyondEnd:
        data, size = b"", -1
    size = first.offset + len(data) if size < 0 else size
    return _slices(name, size, group, lambda length, offset: data[offset - first.offset :][:length])


def _slices(
    name: str, size: int, group: list[Range], read_at: Callable[[int, int], bytes]
) -> list[bytes | Reject]:
    """Adjacent ranges of a file of `size` bytes, with one call of read_at(length, offset)."""
    first, last = group[0], group[-1]
    start = first.offset
    stop = size if last.length < 0 else min(last.offset + last.length, size)
    if start == stop and len(group) == 1:
        return [_empty(name)] if first.length <= 0 else [_beyond(name, size, first)]
    if stop - start > MAX_BYTES:
        return [_too_long(name, stop - start)] * len(group)
    data = read_at(stop - start, start) if 0 <= start < stop else b""
    if len(group) == 1 and len(data) == (first.length if first.length >= 0 else size - start):
        return [data]
    out: list[bytes | Reject] = []
    for one in group:
        length = one.length if one.length >= 0 else size - one.offset
        piece = data[one.offset - start : one.offset - start + length]
        if length == 0:
            out.append(_empty(name))
        elif one.offset < 0 or len(piece) != length:
            out.append(_beyond(name, size, one))
        else:
            out.append(piece)
    return out


def _empty(name: str) -> Reject:
    return Reject("empty", f"{name}: zero bytes")


def _beyond(name: str, size: int, one: Range) -> Reject:
    return unreadable(
        f"{name}: cut short: {one.length} bytes from {one.offset} on, but the file has {size}"
    )


def _too_long(name: str, size: int) -> Reject:
    return unreadable(f"{name}: {size} bytes for one image, more than {MAX_BYTES}")


def unreadable(detail: str) -> Reject:
    """The reject of a row whose bytes cannot be had."""
    return Reject("unreadable", detail)


# --- writing -----------------------------------------------------------------------------------

EXTENSIONS = {"jpeg": ".jpg", "png": ".png", "npy": ".npy"}
"""The formats that are a file an image, and how their files end."""


def files_of(
    block: pa.Table, format: str, *, encode: Callable[[np.ndarray], bytes], keeps_suffix: bool
) -> Iterator[tuple[str, bytes]]:
    """The name and content of the file of each good row of a block (schema BLOCK).

    keeps_suffix: call a file like its source, with its suffix and then its own (a.jpg.npy).
    """
    names, uris = block["name"].to_pylist(), block["uri"].to_pylist()
    for name, uri, image in zip(names, uris, images_of(block), strict=True):
        if image is not None:
            own = Location.of(uri).suffix if keeps_suffix else ""
            yield name + own + EXTENSIONS[format], encode(image)


def npy(array: np.ndarray) -> bytes:
    """The content of a .npy file with the array."""
    array = np.ascontiguousarray(array)
    # One copy of the pixels: 13 us for 270 kB. np.save makes three copies: 40 us.
    return b"".join((_npy_header(array.shape, array.dtype), array.reshape(-1).view(np.uint8).data))


@functools.lru_cache(maxsize=1024)
def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
