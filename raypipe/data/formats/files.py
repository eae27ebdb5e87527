"""Files of an input: which there are in folders and globs, local or in a store, in a deterministic order."""

import functools
import glob
import io
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Iterator

import numpy as np
from pyarrow import fs

from raypipe.data.location import ERRORS, filesystem, is_remote, join, local_path, one_line
from raypipe.data.names import STATE
from raypipe.data.patience import listed
from raypipe.errors import UsageError


def find(place: str) -> tuple[str, Iterable[str]]:
    """The folder that ids are relative to, and the relative paths of the files in order, of a folder, a glob or a file.

    Raises UsageError if there is no such place, or a folder cannot be listed.
    """
    return _find_remote(place) if is_remote(place) else _find_local(place)


def alternatives(input: str) -> list[str]:
    """The input, or what its braces stand for: `{000..009}` counts, `{a,b}` lists. A path that exists stands for itself."""
    if "{" not in input or (not is_remote(input) and os.path.lexists(local_path(input))):
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


def _find_local(input: str) -> tuple[str, Iterable[str]]:
    """The directory that ids are relative to, and the relative paths of the files, in order."""
    path = local_path(input)
    if os.path.isdir(path):
        return path, _walk(path)
    if os.path.lexists(path):
        return os.path.dirname(path), [os.path.basename(path)]
    if not glob.has_magic(path):
        raise UsageError(
            f"{input!r} does not exist (looked at {path}); nothing can be read from it"
        )
    base = os.path.dirname(path[: re.search(r"[*?[]", path).start()])  # type: ignore[union-attr]
    inside = path[len(base) :].lstrip("/")
    if "**" in components(inside):
        return base, _deep(base, inside)
    matches = {match[len(base) :].lstrip("/") for match in glob.iglob(path)}
    return base, sorted(
        (match for match in matches if STATE not in components(match)), key=components
    )


def _deep(base: str, pattern: str) -> Iterator[str]:
    """The paths below `base` that match a pattern with `**`. glob itself would follow links in circles there, and pass over folders that it cannot read."""
    wanted = _glob_regex(pattern, question=True)
    head = "/".join(itertools.takewhile(lambda part: part != "**", components(pattern)))
    folders = [
        folder[len(base) :].strip("/")
        for folder in glob.iglob(os.path.join(glob.escape(base), head))
        if os.path.isdir(folder)
    ]
    for folder in sorted(folders, key=components):
        if STATE not in components(folder):
            inside = (posixpath.join(folder, path) for path in _walk(os.path.join(base, folder)))
            yield from filter(wanted.fullmatch, inside)


def _find_remote(uri: str) -> tuple[str, Iterable[str]]:
    system, path = filesystem(uri)
    magic = re.search(r"[*\[]", path)
    base = path if magic is None else path[: magic.start()].rpartition("/")[0].rstrip("/")
    try:
        if (
            magic is not None
            and system.get_file_info(posixpath.normpath(path)).type != fs.FileType.NotFound
        ):  # it is called so
            magic, base = None, path
        if magic is None and "/" in path:
            info = system.get_file_info(path)
            if info.type == fs.FileType.File and not (
                info.size == 0 and _has_keys_below(system, path)
            ):
                base = path.rpartition("/")[0]
                return _reroot(uri, path, base), [path[len(base) + 1 :]]
            if info.type == fs.FileType.NotFound:
                raise UsageError(f"{uri!r} does not exist; nothing can be read from it")
        infos = listed(lambda: system.get_file_info(fs.FileSelector(base, recursive=True)), uri)
    except ERRORS as error:
        raise UsageError(f"cannot list {uri!r}: {one_line(error)}") from error
    markers = {info.path for info in infos if info.type == fs.FileType.File and info.size == 0}
    if markers:  # an empty object beside keys below its name stands for a folder
        markers &= {parent for info in infos for parent in _parents(info.path)}
    relative = (
        info.path[len(base) + 1 :]
        for info in infos
        if info.type == fs.FileType.File and info.path not in markers
    )
    if magic is not None:
        matches = _glob_regex(path[len(base) :].lstrip("/"))
        relative = (name for name in relative if matches.fullmatch(name))
    visible = (name for name in relative if not any(map(_is_hidden, name.split("/"))))
    return _reroot(uri, path, base), sorted(visible, key=components)


def _has_keys_below(system: fs.FileSystem, path: str) -> bool:
    """Whether a store has keys below `path`, as well as an object of that name: some tools put an empty one for a folder."""
    return bool(system.get_file_info(fs.FileSelector(path, allow_not_found=True)))


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _reroot(uri: str, path: str, base: str) -> str:
    """The URI of `base`, a folder above `path`, which is where `uri` points to."""
    head, _, query = uri.partition("?")
    scheme, _, rest = head.partition("://")
    authority = rest.partition("/")[0]
    bucket_root = f"{scheme}://{authority}" + (f"?{query}" if query else "")
    _, root_path = filesystem(bucket_root)
    return join(bucket_root, base[len(root_path) :].strip("/"))


def _glob_regex(pattern: str, *, question: bool = False) -> re.Pattern[str]:
    """Like glob with recursive=True: `**` as a whole component is any number of folders, `*` and `[]` stay in one; and `?`, which in a URI
    starts a query, if `question` says so."""
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


def _walk(root: str) -> Iterator[str]:
    """The relative paths of all files below `root`, ordered by components. A million files take seconds: no stat a file."""
    stack: list[tuple[Iterator[os.DirEntry[str]], str, tuple[str, ...]]] = [
        (iter(_entries(root)), "", (os.path.realpath(root),))
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
        # Only a link can lead back up; without one the real path is known by appending.
        real = (
            os.path.realpath(entry.path)
            if entry.is_symlink()
            else os.path.join(above[-1], entry.name)
        )
        if real not in above:
            stack.append((iter(_entries(entry.path)), path + "/", (*above, real)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not _is_hidden(entry.name)]
    except OSError as error:
        raise UsageError(
            f"cannot list the directory {folder!r}: {error.strerror}. Its images would be missing without a trace; make it "
            "readable or move it away"
        ) from error
    return sorted(visible, key=lambda entry: entry.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == STATE


def components(path: str) -> list[str]:
    return path.split("/")


# --- a file of pixels --------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file with the array."""
    array = np.ascontiguousarray(array)
    # One copy of the pixels; np.save into memory makes three (270 kB: 13 against 40 us).
    return b"".join((_npy_header(array.shape, array.dtype), array.reshape(-1).view(np.uint8).data))


@functools.lru_cache(maxsize=1024)
def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
