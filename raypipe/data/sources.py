"""From what the user calls the input to a table with one row an image, and from its rows to the images' bytes.

`list_images` finds out what there is and looks into no image; `Reader` fetches the bytes later, where they are needed.

| input | rows | `image_id` |
|---|---|---|
| a directory | every image file below it; if it has none, its tars or Parquet files | path in it |
| a glob (`**`, `{000..009}`, `{a,b}`), one file | the images, tars or Parquet files that match | path below the fixed part |
| a directory and a COCO JSON | the JSON's images in its order, whether the file exists or not | COCO id |
| WebDataset tars (`*.tar`) | image members; `.json` and `.cls` of their key give boxes and labels | sidecar's id, or member |
| Parquet | rows: encoded bytes (or HF's struct of bytes and path), or raw pixels, height, width | `image_id`, or file#row |
| `demo`, `demo:N` | procedural photos with boxes (`raypipe.data.demo`) | demo-SEED-INDEX |

Hidden files and `_raypipe/` are left out. Order: directories and globs by path components, everything else as stored. The first
N rows are the same with and without `limit` (names excepted: what clashes may be behind the limit). An image_id that occurs again gets `#2`, `#3`, ... (the same
key in two tars, the same file in two epochs); only COCO refuses this, because there annotations refer to the id.

Rows whose image cannot be read are rows all the same. They become a `Reject` when they are read.
"""

import bisect
import contextlib
import functools
import glob
import io
import itertools
import json
import logging
import os
import posixpath
import re
import stat
import tarfile
import threading
import unicodedata
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from raypipe import UsageError
from raypipe.data import demo
from raypipe.data.location import ERRORS, absolute, filesystem, is_remote, join, local_path, local_uri, path_of, read
from raypipe.images.decode import Reject

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")
"""What a file must end with, in upper or lower case, to be listed as an image."""

TAR = (".tar",)
PARQUET = (".parquet", ".pq")

BOXES = pa.list_(pa.list_(pa.float32(), 4))
"""Boxes of one image: float32, xyxy, absolute pixels."""

ANNOTATION_FIELDS = (
    pa.field("boxes", BOXES),
    pa.field("labels", pa.list_(pa.int64())),
    pa.field("crowds", pa.list_(pa.bool_())),
    pa.field("annotation_ids", pa.list_(pa.int64())),
)

SOURCE = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        *ANNOTATION_FIELDS,
    ]
)
"""What a source lists: where each image's bytes are, and what is known of it. No column has nulls.

- name: where the result goes, without extension: relative, posix, safe on every file system, unique whatever the case.
- uri: an absolute local path or a full URI. offset, length: a range of bytes, length -1 for all to the end. In a Parquet file
  offset is the number of the row, and length is 1.
- boxes: in pixels of the image as it is shown (EXIF orientation applied); labels: as the source numbers its classes; crowds,
  annotation_ids: COCO's. All four have one entry a box, and none where the source has none; only labels may be there without
  boxes, and then they are of the whole image.
"""

MAX_BYTES = 512 << 20
"""Encoded images above this are rejected instead of read: 0.5 GiB for one image is an accident or an attack."""


# --- listing -----------------------------------------------------------------------------------------------------------


def list_images(input: str, *, annotations: str | None = None, limit: int | None = None, seed: int = 0) -> pa.Table:
    """The images of `input` as a table of SOURCE, in a deterministic order (see the module's table).

    `annotations`: a COCO JSON whose images are under the directory `input`. `limit`: only the first so many; the listing
    stops there. `seed`: which demo images.

    Raises UsageError if there is nothing to read or the listing itself (a JSON, a Parquet footer) makes no sense.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} leaves no image; give at least 1, or none for all")
    if input == "demo" or input.startswith("demo:"):
        if annotations is not None:
            raise UsageError(f"{input!r} has its own boxes; leave out the annotations {annotations!r}")
        return _unique(_list_demo(input, limit, seed))
    if not input:
        raise UsageError("the input is empty; give a directory, a glob, tars, Parquet files or 'demo'")
    if annotations is not None:
        return _unique(_list_coco(input, annotations, limit))
    listed = _list_places(_Limit(limit), input)
    if listed.num_rows == 0:
        raise UsageError(
            f"no images in {input!r}: nothing there ends in {' '.join(SUFFIXES)} .tar .parquet (hidden files do not count). "
            "A directory is searched in depth, a glob only where it says **"
        )
    return _unique(listed)


@dataclass(slots=True)
class _Limit:
    """How many rows may still be listed."""

    left: int | None

    def take(self, items: Iterable[Any]) -> list[Any]:
        taken = list(items) if self.left is None else list(itertools.islice(items, self.left))
        if self.left is not None:
            self.left -= len(taken)
        return taken


def _list_places(limit: _Limit, input: str) -> pa.Table:
    remote = is_remote(input)
    pieces = []
    for place in _alternatives(input):
        find = _find_remote if remote else _find_local
        base, paths = find(place)
        pieces.append(_list_files(base, paths, limit))
        if limit.left == 0:
            break
    return pa.concat_tables(pieces)


def _alternatives(input: str) -> list[str]:
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
    return [place for choice in choices for place in _alternatives(head + choice + tail)]


def _find_local(input: str) -> tuple[str, Iterable[str]]:
    """The directory that ids are relative to, and the relative paths of the files, in order."""
    path = local_path(input)
    if os.path.isdir(path):
        return path, _walk(path)
    if os.path.lexists(path):
        return os.path.dirname(path), [os.path.basename(path)]
    if not glob.has_magic(path):
        raise UsageError(f"{input!r} does not exist (looked at {path}); nothing can be read from it")
    base = os.path.dirname(path[: re.search(r"[*?[]", path).start()])  # type: ignore[union-attr]
    matches = {match[len(base) :].lstrip("/") for match in glob.iglob(path, recursive=True)}
    return base, sorted(matches, key=_components)


def _find_remote(uri: str) -> tuple[str, Iterable[str]]:
    system, path = filesystem(uri)
    magic = re.search(r"[*\[]", path)
    base = path if magic is None else path[: magic.start()].rpartition("/")[0].rstrip("/")
    try:
        if magic is None and "/" in path:
            info = system.get_file_info(path)
            if info.type == fs.FileType.File:
                base = path.rpartition("/")[0]
                return _reroot(uri, path, base), [path[len(base) + 1 :]]
            if info.type == fs.FileType.NotFound:
                raise UsageError(f"{uri!r} does not exist; nothing can be read from it")
        infos = system.get_file_info(fs.FileSelector(base, recursive=True))
    except ERRORS as error:
        raise UsageError(f"cannot list {uri!r}: {_line(error)}") from error
    relative = (info.path[len(base) + 1 :] for info in infos if info.type == fs.FileType.File)
    if magic is not None:
        matches = _glob_regex(path[len(base) :].lstrip("/"))
        relative = (name for name in relative if matches.fullmatch(name))
    visible = (name for name in relative if not any(map(_is_hidden, name.split("/"))))
    return _reroot(uri, path, base), sorted(visible, key=_components)


def _reroot(uri: str, path: str, base: str) -> str:
    """The URI of `base`, a folder above `path`, which is where `uri` points to."""
    head, _, query = uri.partition("?")
    scheme, _, rest = head.partition("://")
    authority = rest.partition("/")[0]
    bucket_root = f"{scheme}://{authority}" + (f"?{query}" if query else "")
    _, root_path = filesystem(bucket_root)
    return join(bucket_root, base[len(root_path) :].strip("/"))


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """Like glob with recursive=True: `**` as a whole component is any number of folders, `*` and `[]` stay in one."""
    regex = ""
    for piece in re.findall(r"\*\*/|\*\*$|\*|\[[^\]]+\]|.", pattern, re.DOTALL):
        if piece == "**/" and (not regex or regex.endswith("/")):
            regex += "(?:[^/]+/)*"
        elif piece == "**" and (not regex or regex.endswith("/")):
            regex += ".*"
        elif piece.startswith("*"):
            regex += "[^/]*" + ("/" if piece.endswith("/") else "")
        elif piece.startswith("["):
            regex += "[" + ("^/" + piece[2:] if piece[1] == "!" else piece[1:])
        else:
            regex += re.escape(piece) if piece != "/" else "/"
    return re.compile(regex)


def _walk(root: str) -> Iterator[str]:
    """The relative paths of all files below `root`, ordered by components. A million files take seconds: no stat a file."""
    stack: list[tuple[Iterator[os.DirEntry[str]], str, tuple[str, ...]]] = [(iter(_entries(root)), "", (os.path.realpath(root),))]
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
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
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
    return name.startswith(".") or name == "_raypipe"


def _components(path: str) -> list[str]:
    return path.split("/")


def _list_files(base: str, paths: Iterable[str], limit: _Limit) -> pa.Table:
    """Rows of the files: images if there are any; otherwise what is in the tars or Parquet files."""
    tars: list[str] = []
    parquets: list[str] = []

    def images() -> Iterator[str]:
        for path in paths:
            lower = path.lower()
            if lower.endswith(SUFFIXES):
                yield path
            elif lower.endswith(TAR):
                tars.append(path)
            elif lower.endswith(PARQUET):
                parquets.append(path)

    found = limit.take(images())
    if found:
        return _image_files(base, found)
    if tars and parquets:
        raise UsageError(
            f"{base} holds {len(tars)} tars and {len(parquets)} Parquet files, and it is not clear which are meant; give a "
            "glob such as *.tar"
        )
    pieces = [_EMPTY]
    for path in tars or parquets:
        if limit.left == 0:
            break
        listing = _list_tar if tars else _list_parquet
        pieces.append(listing(join(base, path), path, limit))
    return pa.concat_tables(pieces)


def _image_files(base: str, paths: list[str]) -> pa.Table:
    try:
        ids = pa.array(paths, pa.string())
    except UnicodeEncodeError:
        uris = pa.array([local_uri(os.path.join(base, path)) for path in paths], pa.string())
        readable = [os.fsencode(path).decode(errors="backslashreplace") for path in paths]
        return _rows(readable, readable, uris)
    if is_remote(base):
        uris = pa.array([join(base, path) for path in paths], pa.string())
    else:
        uris = pc.binary_join_element_wise(local_path(join(base, "")).rstrip("/"), ids, "/")
    return _rows(ids, ids, uris)


def _rows(
    ids: pa.Array | Sequence[str],
    names: pa.Array | Sequence[str],
    uris: pa.Array | Sequence[str],
    offsets: Any = 0,
    lengths: Any = -1,
    *,
    boxes: Any = None,
    labels: Any = None,
    crowds: Any = None,
    annotation_ids: Any = None,
) -> pa.Table:
    count = len(ids)
    columns = {
        "image_id": ids,
        "name": names,
        "uri": uris,
        "offset": np.broadcast_to(np.asarray(offsets, np.int64), count),
        "length": np.broadcast_to(np.asarray(lengths, np.int64), count),
        "boxes": boxes,
        "labels": labels,
        "crowds": crowds,
        "annotation_ids": annotation_ids,
    }
    arrays = []
    for column in SOURCE:
        values = columns[column.name]
        if values is None:
            values = pa.ListArray.from_arrays(
                pa.array(np.zeros(count + 1, np.int32)), pa.array([], column.type.value_type), type=column.type
            )
        elif not isinstance(values, pa.Array | pa.ChunkedArray):
            values = pa.array(values, column.type)
        arrays.append(values)
    return pa.table(arrays, schema=SOURCE)


_EMPTY = SOURCE.empty_table()


def _unique(table: pa.Table) -> pa.Table:
    """Makes `image_id` unique (again: #2, #3, ...) and turns source names into safe unique ones."""
    ids = table["image_id"]
    if pc.count_distinct(ids).as_py() < len(ids):
        ids = pa.chunked_array([pa.array(_number_repeats(ids.to_pylist()), pa.string())])
    names = pa.chunked_array([pa.array(unique_names(table["name"].to_pylist()), pa.string())])
    table = table.set_column(0, SOURCE.field("image_id"), ids).set_column(1, SOURCE.field("name"), names)
    return table.combine_chunks()


def _number_repeats(ids: list[str]) -> list[str]:
    seen: set[str] = set()
    repeats: Counter[str] = Counter()
    out = []
    for image_id in ids:
        unique = image_id
        while unique in seen:
            repeats[image_id] += 1
            unique = f"{image_id}#{repeats[image_id] + 1}"
        seen.add(unique)
        out.append(unique)
    return out


# --- names ---------------------------------------------------------------------------------------------------------------

_MAX_COMPONENT = 200  # bytes; file systems allow 255, and an extension, `-12` or the source's own extension come on top
_MAX_NAME = 1000  # bytes; PATH_MAX is 4096, and 1024 on macOS
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u2028\u2029\ud800-\udfff]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE | re.DOTALL)  # as file names on Windows
_OURS = re.compile(r"_raypipe|epoch-\d+", re.IGNORECASE)  # as the first component: the sinks' own folders
_LIKE_A_FILE = (*SUFFIXES, *TAR, *PARQUET, ".json", ".cls")


def unique_names(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Output names, without extension, for names in a source: `set/a.jpg` becomes `set/a`.

    Each is a relative posix path without `..`, safe on Linux, macOS and Windows, and no two are equal, nor equal to one of
    `taken`, even where case and Unicode normalisation do not count. Names that clash keep their extension (`a.jpg` and
    `a.png` become `a.jpg` and `a.png`), and if they still do, get `-2`, `-3`, ... in order. With the names of an earlier
    listing as `taken`, rows can be added without any renaming.
    """
    parts = [_safe_name(name) for name in names]
    keys = [_fold(stem) for stem, _ in parts]
    count = Counter(keys)
    used = {_fold(name) for name in taken}
    out: list[str | None] = []
    for (stem, _), key in zip(parts, keys, strict=True):
        free = count[key] == 1 and key not in used
        out.append(stem if free else None)
    used.update(key for key, name in zip(keys, out, strict=True) if name is not None)
    repeats: Counter[str] = Counter()
    for index, name in enumerate(out):
        if name is not None:
            continue
        wanted = "".join(parts[index])
        candidate = wanted
        key = _fold(wanted)
        while _fold(candidate) in used:
            repeats[key] += 1
            candidate = f"{wanted}-{repeats[key] + 1}"
        used.add(_fold(candidate))
        out[index] = candidate
    return out  # type: ignore[return-value]


def _fold(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _safe_name(source: str) -> tuple[str, str]:
    """The source's path made safe, without its image extension, and that extension ("" if it has none)."""
    folder, _, base = source.rpartition("/")
    stem, suffix = posixpath.splitext(base)
    if suffix.lower() not in SUFFIXES:
        stem, suffix = base, ""
    prefix = _safe_folder(folder)
    if _PLAIN.fullmatch(stem) is None or _RESERVED.fullmatch(stem) or (not prefix and _OURS.fullmatch(stem)):
        stem = _safe_component(stem or "_", first=not prefix)
    name = prefix + stem
    if len(name) > _MAX_NAME // 4 and len(name.encode()) > _MAX_NAME:
        name = f"long-{blake2b(prefix.encode(), digest_size=8).hexdigest()}/{stem}"
    return name, suffix


@functools.lru_cache(maxsize=1 << 16)
def _safe_folder(folder: str) -> str:
    """The folders made safe, with a slash at the end, or ""."""
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    safe: list[str] = []
    for part in parts:
        part = _safe_component(part, first=not safe)
        # A folder `a.jpg/` would stand where the image `a` is to become the file `a.jpg`.
        safe.append(part + "_" if part.lower().endswith(_LIKE_A_FILE) else part)
    return "".join(part + "/" for part in safe)


def _safe_component(part: str, *, first: bool) -> str:
    safe = _UNSAFE.sub("_", part)
    if safe == "..":
        return "_"
    if safe.startswith("."):  # a hidden file would be left out when the output is an input again
        safe = "_" + safe
    if safe.endswith((".", " ")) or _RESERVED.fullmatch(safe) or (first and _OURS.fullmatch(safe)):
        safe += "_"
    encoded = safe.encode()
    if len(encoded) > _MAX_COMPONENT:
        digest = blake2b(part.encode(errors="surrogatepass"), digest_size=4).hexdigest()
        safe = encoded[: _MAX_COMPONENT - 9].decode(errors="ignore") + "-" + digest
    return safe


# --- demo ----------------------------------------------------------------------------------------------------------------


def _list_demo(input: str, limit: int | None, seed: int) -> pa.Table:
    count = demo.COUNT if limit is None else limit
    if input != "demo":
        text = input.removeprefix("demo:")
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(f"{input!r} does not say how many demo images to make; write for example demo:1000")
        count = int(text) if limit is None else min(int(text), limit)
    if seed < 0:
        raise UsageError(f"a seed of {seed} cannot be used for demo images; give 0 or more")
    demo.render_missing(seed, count)
    layouts = [demo.layout(seed, index) for index in range(count)]
    ids = [f"demo-{seed}-{index:06d}" for index in range(count)]
    counts = [len(layout.labels) for layout in layouts]
    total = sum(counts)
    return _rows(
        ids,
        ids,
        [f"demo://{seed}/{index}" for index in range(count)],
        boxes=_box_lists(counts, np.concatenate([layout.boxes for layout in layouts])),
        labels=_lists(counts, np.concatenate([layout.labels for layout in layouts])),
        crowds=_lists(counts, np.zeros(total, bool)),
        annotation_ids=_lists(counts, np.arange(1, total + 1)),
    )


def _lists(counts: Sequence[int] | np.ndarray, values: Any) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(np.asarray(counts, np.int64)))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values if isinstance(values, pa.Array) else pa.array(values))


def _box_lists(counts: Sequence[int] | np.ndarray, boxes: np.ndarray) -> pa.ListArray:
    flat = pa.array(np.ascontiguousarray(boxes, np.float32).reshape(-1))
    return _lists(counts, pa.FixedSizeListArray.from_arrays(flat, 4)).cast(BOXES)


# --- COCO ----------------------------------------------------------------------------------------------------------------


def _list_coco(input: str, annotations: str, limit: int | None) -> pa.Table:
    root = absolute(input)
    if not is_remote(root) and not os.path.isdir(root):
        raise UsageError(
            f"{input!r} is no directory; with annotations the input is the directory that the JSON's file names are in"
        )
    coco = read_coco(annotations)
    images = coco["images"]
    index_of = {}
    for position, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not isinstance(image.get("id"), int | str):
            raise UsageError(f"{annotations!r}: image number {position} has no id or no file_name: {str(image)[:200]}")
        if str(image["id"]) in index_of:
            raise UsageError(
                f"{annotations!r}: the image id {image['id']!r} occurs twice, so it is not clear which image its annotations "
                "belong to; make the ids unique"
            )
        index_of[str(image["id"])] = position
    boxes, labels, crowds, ids, owners = _coco_annotations(annotations, coco.get("annotations") or [], index_of)

    count = len(images) if limit is None else min(limit, len(images))
    order = np.argsort(owners, kind="stable")
    order = order[: np.searchsorted(owners[order], count)]
    counts = np.bincount(owners[order], minlength=count)[:count]
    names = [image["file_name"] for image in images[:count]]
    return _rows(
        [str(image["id"]) for image in images[:count]],
        names,
        [join(root, name) if is_remote(root) else local_uri(os.path.join(root, name)) for name in names],
        boxes=_box_lists(counts, boxes[order]),
        labels=_lists(counts, labels[order]),
        crowds=_lists(counts, crowds[order]),
        annotation_ids=_lists(counts, ids[order]),
    )


def read_coco(location: str) -> dict[str, Any]:
    """A COCO JSON: an object with a non-empty list `images`. Raises UsageError if it is not that."""
    try:
        coco = json.loads(read(location))
    except ERRORS as error:
        raise UsageError(f"cannot read the annotations {location!r}: {_line(error)}") from error
    except ValueError as error:
        raise UsageError(f"the annotations {location!r} are not JSON: {_line(error)}") from error
    if not isinstance(coco, dict) or not isinstance(coco.get("images"), list):
        raise UsageError(f'the annotations {location!r} are JSON, but not COCO: there is no list "images" in them')
    if not coco["images"]:
        raise UsageError(f'the annotations {location!r} list no image: "images" is empty')
    if not isinstance(coco.get("annotations", []), list):
        raise UsageError(f'the annotations {location!r} are not COCO: "annotations" is no list')
    return coco


def annotation_id(annotation: dict[str, Any], position: int) -> int:
    """The annotation's id, or its position in the JSON's list where it has none."""
    return annotation.get("id", position)


def _coco_annotations(
    location: str, annotations: list[Any], index_of: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    boxes: list[list[float]] = []
    labels: list[int] = []
    crowds: list[bool] = []
    ids: list[int] = []
    owners: list[int] = []
    strangers = without_box = 0
    for position, annotation in enumerate(annotations):
        try:
            owner = index_of.get(str(annotation["image_id"]))
            if owner is None:
                strangers += 1
                continue
            box = annotation.get("bbox")
            if not box:  # captions and panoptic JSONs have none
                without_box += 1
                continue
            x, y, width, height = map(float, box)
            label, crowd = int(annotation["category_id"]), bool(annotation.get("iscrowd", 0))
            identity = int(annotation_id(annotation, position))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{location!r}: annotation number {position} makes no sense ({type(error).__name__}: {_line(error)}): "
                f"{str(annotation)[:200]}. It needs image_id, category_id, an integer id and a bbox of four numbers"
            ) from error
        boxes.append([x, y, x + width, y + height])
        labels.append(label)
        crowds.append(crowd)
        ids.append(identity)
        owners.append(owner)
    if strangers:
        log.warning("%s: %d annotations belong to images that are not listed in it; they are ignored", location, strangers)
    if without_box:
        log.warning("%s: %d annotations have no bbox; they are ignored", location, without_box)
    return (
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(labels, np.int64),
        np.asarray(crowds, bool),
        np.asarray(ids, np.int64),
        np.asarray(owners, np.int64),
    )


# --- tars ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Member:
    path: str
    offset: int
    length: int


@dataclass(slots=True)
class _Sample:
    """Consecutive members of one key."""

    key: str
    images: list[_Member] = field(default_factory=list)
    json: bytes | None = None
    cls: bytes | None = None


def _list_tar(uri: str, relative: str, limit: _Limit) -> pa.Table:
    samples = _tar_samples(uri)
    rows = limit.take((sample, member) for sample in samples for member in sample.images)
    samples.close()
    ids, names, found, bad = [], [], [], 0
    for sample, member in rows:
        try:
            sidecar = _sidecar(sample)
        except (ValueError, TypeError, AttributeError):
            bad += 1
            sidecar = _Sidecar()
        stem = member.path[: -len(posixpath.splitext(member.path)[1])]
        own_id = sidecar.image_id if len(sample.images) == 1 else None
        ids.append(_text(stem if own_id is None else own_id))
        # The webdataset sink writes the dots of a name as %2E, because a key ends at its first dot.
        names.append(member.path if own_id is None else member.path.replace("%2E", ".").replace("%25", "%"))
        found.append(sidecar)
    if bad:
        log.warning("%s: %d .json or .cls files make no sense; their images go without annotations", uri, bad)
    return _rows(
        ids,
        [_text(name) for name in names],
        [local_uri(uri)] * len(rows),
        [member.offset for _, member in rows],
        [member.length for _, member in rows],
        boxes=[sidecar.boxes for sidecar in found],
        labels=[sidecar.labels for sidecar in found],
        crowds=[sidecar.crowds for sidecar in found],
        annotation_ids=[sidecar.annotation_ids for sidecar in found],
    )


def _text(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _tar_samples(uri: str) -> Generator[_Sample, None, None]:
    sample = _Sample("")
    for member, content in _tar_members(uri):
        folder, _, base = member.path.rpartition("/")
        if base.startswith("."):
            continue
        key = f"{folder}/{base.partition('.')[0]}"
        if key != sample.key:
            yield sample
            sample = _Sample(key)
        if content is None:
            sample.images.append(member)
        elif base.lower().endswith(".json"):
            sample.json = content
        else:
            sample.cls = content
    yield sample


def _tar_members(uri: str) -> Iterator[tuple[_Member, bytes | None]]:
    """Image members without, sidecars with their content. A tar that breaks off gives what was before the break."""
    count = 0
    try:
        with _open_tar(uri) as tar:
            for info in tar:
                count += 1
                tar.members = []  # type: ignore[attr-defined]  # else it keeps a kilobyte a member
                if not info.isreg() or info.issparse():
                    continue
                lower = info.name.lower()
                if lower.endswith(SUFFIXES):
                    yield _Member(info.name, info.offset_data, info.size), None
                elif lower.endswith((".json", ".cls")):
                    content = tar.extractfile(info)
                    yield _Member(info.name, info.offset_data, info.size), content.read() if content else b""
    except (tarfile.TarError, EOFError, *ERRORS) as error:
        if count == 0:
            raise UsageError(
                f"cannot read the tar {uri!r}: {_line(error)}. It must exist and be an uncompressed tar; unpack .tar.gz first, "
                "because images inside it cannot be reached one by one"
            ) from error
        log.warning("%s breaks off after %d members (%s); what was behind that is lost", uri, count, _line(error))


@contextlib.contextmanager
def _open_tar(uri: str) -> Iterator[tarfile.TarFile]:
    if not is_remote(uri):
        # Unbuffered: a buffer would read 8 KiB for every header of 512 bytes and be thrown away by the seek to the next.
        with open(local_path(uri), "rb", buffering=0) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
        return
    system, path = filesystem(uri)
    # As one stream: a request for each header would be slower than reading everything, at usual image sizes.
    with (
        system.open_input_stream(path, buffer_size=8 << 20) as stream,
        tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar,
    ):
        yield tar


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sidecar:
    image_id: str | None = None
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    annotation_ids: list[int] = field(default_factory=list)


def _sidecar(sample: _Sample) -> _Sidecar:
    """What .json (if it is written as our sink writes it) and .cls say. Raises ValueError, TypeError or AttributeError."""
    found = json.loads(sample.json) if sample.json is not None else {}
    image_id = found.get("image_id") if isinstance(found, dict) else None
    image_id = None if image_id is None else str(image_id)
    if not isinstance(found, dict) or not isinstance(found.get("boxes"), list):
        labels = [int(sample.cls)] if sample.cls is not None else []
        return _Sidecar(image_id=image_id, labels=labels)
    boxes = [[float(value) for value in box] for box in found["boxes"]]
    labels = [int(label) for label in found.get("labels", [])]
    crowds = [bool(crowd) for crowd in found.get("crowds", [False] * len(boxes))]
    annotation_ids = [int(number) for number in found.get("annotation_ids", range(len(boxes)))]
    if any(len(box) != 4 for box in boxes) or not (len(boxes) == len(crowds) == len(annotation_ids)):
        raise ValueError("lengths differ")
    if len(labels) != len(boxes) and boxes:
        raise ValueError("as many labels as boxes are needed")
    if not labels and sample.cls is not None:
        labels = [int(sample.cls)]
    return _Sidecar(image_id=image_id, boxes=boxes, labels=labels, crowds=crowds, annotation_ids=annotation_ids)


# --- Parquet -------------------------------------------------------------------------------------------------------------

_IMAGE_COLUMNS = ("image", "bytes", "jpg", "jpeg", "png", "webp", "content", "image_bytes", "img", "data")


_WITH_IMAGE = ("image_id", "name", "boxes", "labels", "crowds", "annotation_ids", "label")


def _list_parquet(uri: str, relative: str, limit: _Limit) -> pa.Table:
    """Rows of a file. `name`, `boxes` (xyxy), `labels`, `crowds`, `annotation_ids` or `label` are taken along if they fit."""
    try:
        with _open_parquet(uri) as file:
            _image_column(file.schema_arrow, uri)
            count = file.metadata.num_rows if limit.left is None else min(limit.left, file.metadata.num_rows)
            wanted = [name for name in _WITH_IMAGE if name in file.schema_arrow.names]
            table = file.read_row_groups(_groups_of_first(file, count), columns=wanted, use_threads=False).slice(0, count)
    except ERRORS as error:
        raise UsageError(f"cannot read the Parquet file {uri!r}: {_line(error)}; remove it or write it again") from error
    if limit.left is not None:
        limit.left -= count
    stem = posixpath.splitext(relative)[0]
    own_ids = _column(table, "image_id", pa.string())
    own_names = _column(table, "name", pa.string())
    numbered = [f"{stem}/{row:06d}" for row in range(count)]
    return _rows(
        _filled(own_ids, [f"{relative}#{row}" for row in range(count)]),
        _filled(own_names if own_names is not None else own_ids, numbered),
        [local_uri(uri)] * count,
        np.arange(count),
        1,
        **_parquet_annotations(uri, table),
    )


def _column(table: pa.Table, name: str, type: pa.DataType) -> pa.Array | None:
    """The column as `type`, without null lists; None if there is none or a foreign one happens to have its name."""
    if name not in table.column_names:
        return None
    try:
        values = table[name].cast(type).combine_chunks()
    except ERRORS:
        return None
    return pc.coalesce(values, pa.scalar([], type)) if pa.types.is_list(type) and values.null_count else values


def _filled(values: pa.Array | None, defaults: list[str]) -> list[str]:
    if values is None:
        return defaults
    return [value or default for value, default in zip(values.to_pylist(), defaults, strict=True)]


def _parquet_annotations(uri: str, table: pa.Table) -> dict[str, pa.Array | None]:
    boxes, labels, crowds, annotation_ids = (_column(table, field.name, field.type) for field in ANNOTATION_FIELDS)
    if labels is None and (label := _column(table, "label", pa.int64())) is not None:
        labels = _lists(label.is_valid().cast(pa.int64()).to_numpy(zero_copy_only=False), label.drop_null())
    if boxes is None:
        return {"labels": labels}
    counts = boxes.value_lengths().to_numpy(zero_copy_only=False)
    found = np.zeros_like(counts) if labels is None else labels.value_lengths().to_numpy(zero_copy_only=False)
    if (wrong := np.flatnonzero((counts > 0) & (counts != found))).size:
        row = wrong[0]
        raise UsageError(
            f"{uri!r}: row {row} has {counts[row]} boxes, but {found[row]} labels ({wrong.size} rows are like that); it is not "
            "clear what is in which box. Write as many `labels` as `boxes`, or rename the column `boxes`"
        )
    if crowds is None or not crowds.value_lengths().equals(boxes.value_lengths()):
        crowds = _lists(counts, np.zeros(counts.sum(), bool))
    if annotation_ids is None or not annotation_ids.value_lengths().equals(boxes.value_lengths()):
        annotation_ids = _lists(counts, np.arange(counts.sum()))
    return {"boxes": boxes, "labels": labels, "crowds": crowds, "annotation_ids": annotation_ids}


def _open_parquet(uri: str) -> pq.ParquetFile:
    if not is_remote(uri):
        return pq.ParquetFile(local_path(uri))
    system, path = filesystem(uri)
    return pq.ParquetFile(system.open_input_file(path), pre_buffer=True)


def _groups_of_first(file: pq.ParquetFile, count: int) -> list[int]:
    groups, rows = [], 0
    for group in range(file.metadata.num_row_groups):
        if rows >= count:
            break
        groups.append(group)
        rows += file.metadata.row_group(group).num_rows
    return groups


def _image_column(schema: pa.Schema, uri: str) -> str:
    """The column that holds the images' bytes. Raises UsageError if there is none, or no telling which."""
    holding = [column.name for column in schema if _holds_bytes(column.type)]
    for name in (*_IMAGE_COLUMNS, *holding[:1] * (len(holding) == 1)):
        if name in holding:
            return name
    raise UsageError(
        f"{uri!r} has no column with images that can be told by its name or as the only binary one: its columns are "
        f"{', '.join(f'{column.name} ({column.type})' for column in schema)}. Name it 'image'"
    )


def _holds_bytes(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(type.field(i).name == "bytes" and _holds_bytes(type.field(i).type) for i in range(type.num_fields))
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


# --- reading -------------------------------------------------------------------------------------------------------------

_CHUNK_ROWS = 16  # at most, in one I/O thread's turn
_CHUNK_BYTES = 4 << 20
_GAP = 64 << 10  # bytes between two ranges up to which reading them in one go is cheaper than another request


@dataclass(frozen=True, slots=True)
class _Range:
    uri: str
    offset: int
    length: int


class Reader:
    """Fetches the bytes of rows ahead of who consumes them, in `threads` I/O threads (0: in the caller's, not ahead).

    At most 2 * threads + 1 chunks of 16 rows or 4 MiB (and the image that exceeds them) are held. One reader may serve many
    calls of `read`, one after another or at the same time.
    """

    def __init__(self, threads: int = 4) -> None:
        if threads < 0:
            raise UsageError(f"{threads} reader threads are not possible; give 0 or more")
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "raypipe-read") if threads else None
        self._parquet = _ParquetReader()

    def close(self) -> None:
        """Ends the threads. Reads in progress are finished, not started ones dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._parquet.close()

    def read(self, rows: pa.Table) -> Iterator[bytes | Reject]:
        """The bytes of each row (of SOURCE's `uri`, `offset`, `length`) in order, or why they cannot be had.

        Rows of raw pixels in Parquet come as the bytes of a .npy file. Raises nothing for a row that cannot be read.
        """
        ranges = [
            _Range(uri, offset, length)
            for uri, offset, length in zip(
                rows["uri"].to_pylist(), rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True
            )
        ]
        todo = deque(_chunks(ranges, self._threads))
        if self._pool is None:
            while todo:
                chunk = todo.popleft()
                done = self._read(chunk)
                if len(done) < len(chunk):
                    todo.appendleft(chunk[len(done) :])
                yield from done
            return
        pool = self._pool
        flying: deque[tuple[list[_Range], Future[list[bytes | Reject]]]] = deque()
        try:
            while todo or flying:
                while todo and len(flying) < 2 * self._threads:
                    chunk = todo.popleft()
                    flying.append((chunk, pool.submit(self._read, chunk)))
                chunk, future = flying.popleft()
                done = future.result()
                if len(done) < len(chunk):  # it stopped at its limit of bytes
                    rest = chunk[len(done) :]
                    flying.appendleft((rest, pool.submit(self._read, rest)))
                elif todo:
                    chunk = todo.popleft()
                    flying.append((chunk, pool.submit(self._read, chunk)))
                del future
                done.reverse()
                while done:
                    yield done.pop()
        finally:
            for _, future in flying:
                future.cancel()

    def _read(self, ranges: list[_Range]) -> list[bytes | Reject]:
        """The first of the ranges, at least one: it stops when it has read more than a chunk's bytes."""
        out: list[bytes | Reject] = []
        size = 0
        for uri, run in itertools.groupby(ranges, lambda one: one.uri):
            for group in self._groups(list(run)):
                found = self._fetch(uri, group)
                out += found
                size += sum(len(one) for one in found if isinstance(one, bytes))
                if size > _CHUNK_BYTES:
                    return out
        return out

    def _groups(self, run: list[_Range]) -> Iterator[list[_Range]]:
        if _kind(run[0].uri) == "parquet":
            yield run
            return
        group: list[_Range] = []
        for one in run:
            if group and not _follows(group, one):
                yield group
                group = []
            group.append(one)
        yield group

    def _fetch(self, uri: str, group: list[_Range]) -> list[bytes | Reject]:
        try:
            match _kind(uri):
                case "parquet":
                    return self._parquet.read(uri, [one.offset for one in group])
                case "demo":
                    seed, _, index = uri.removeprefix("demo://").partition("/")
                    return [demo.read(int(seed), int(index))]
                case "remote":
                    return _read_remote(uri, group)
                case _:
                    return _read_local(local_path(uri), group)
        except (*ERRORS, ValueError) as error:
            return [_unreadable(f"{uri}: {_line(error)}")] * len(group)


def _chunks(ranges: list[_Range], threads: int) -> Iterator[list[_Range]]:
    """Rows that one I/O thread reads in a row: enough to make its hand-over cheap, few enough that all threads have some.

    Only one if each is a request of its own to a remote store.
    """
    rows = min(max(len(ranges) // (4 * max(threads, 1)), 1), _CHUNK_ROWS)
    start = 0
    while start < len(ranges):
        one = ranges[start]
        alone = one.length < 0 and _kind(one.uri) == "remote"
        stop = start + 1 if alone else min(start + rows, len(ranges))
        yield ranges[start:stop]
        start = stop


def _kind(uri: str) -> str:
    if uri.startswith("demo://"):
        return "demo"
    if uri.endswith(PARQUET) or path_of(uri).lower().endswith(PARQUET):
        return "parquet"
    return "remote" if is_remote(uri) else "local"


def _follows(group: list[_Range], one: _Range) -> bool:
    last = group[-1]
    if last.length < 0 or one.length < 0:
        return False
    end = last.offset + last.length
    return end <= one.offset <= end + _GAP and one.offset + one.length - group[0].offset <= _CHUNK_BYTES


def _read_local(path: str, group: list[_Range]) -> list[bytes | Reject]:
    # Not open(): os.open, fstat and read are what is needed. Not blocking, for whoever names a pipe x.jpg.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return [_unreadable(f"{path}: not a regular file")] * len(group)
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


def _read_remote(uri: str, group: list[_Range]) -> list[bytes | Reject]:
    system, path = filesystem(uri)
    with system.open_input_file(path) as file:
        return _slices(uri, file.size(), group, file.read_at)


def _slices(name: str, size: int, group: list[_Range], read_at: Callable[[int, int], bytes]) -> list[bytes | Reject]:
    """The ranges of a file of `size` bytes, which follow each other, with one call of read_at(length, offset)."""
    first, last = group[0], group[-1]
    start = first.offset
    stop = size if last.length < 0 else min(last.offset + last.length, size)
    if start == stop and len(group) == 1:
        return [_empty(name)] if first.length <= 0 else [_beyond(name, size, first)]
    if stop - start > MAX_BYTES:
        return [_unreadable(f"{name}: {stop - start} bytes for one image, more than {MAX_BYTES}")] * len(group)
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


def _beyond(name: str, size: int, one: _Range) -> Reject:
    return _unreadable(f"{name}: cut short: {one.length} bytes from {one.offset} on, but the file has {size}")


def _unreadable(detail: str) -> Reject:
    return Reject("unreadable", detail)


class _ParquetReader:
    """Rows of Parquet files by number. Keeps the last row group: rows in order decode each group once, shuffled ones do not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # threads that want the same row group wait for the one that reads it
        self._files: OrderedDict[str, tuple[pq.ParquetFile, str, list[int]]] = OrderedDict()
        self._group: tuple[str, int, pa.Table] | None = None

    def close(self) -> None:
        with self._lock:
            for file, _, _ in self._files.values():
                file.close()
            self._files.clear()
            self._group = None

    def read(self, uri: str, rows: list[int]) -> list[bytes | Reject]:
        with self._lock:
            _, column, ends = self._open(uri)
            by_group: dict[int, list[int]] = {}
            out: list[bytes | Reject] = [_unreadable(f"{uri}: no such row")] * len(rows)
            for position, row in enumerate(rows):
                if 0 <= row < ends[-1]:
                    by_group.setdefault(bisect.bisect_right(ends, row), []).append(position)
                else:
                    out[position] = _unreadable(f"{uri}: row {row}, but the file has {ends[-1]}")
            for group, positions in by_group.items():
                try:
                    table = self._read_group(uri, group)
                except ERRORS as error:
                    for position in positions:
                        out[position] = _unreadable(f"{uri}: row group {group}: {_line(error)}")
                    continue
                first = ends[group] - table.num_rows
                for position in positions:
                    out[position] = _parquet_row(f"{uri} row {rows[position]}", table, column, rows[position] - first)
            return out

    def _open(self, uri: str) -> tuple[pq.ParquetFile, str, list[int]]:
        if uri not in self._files:
            file = _open_parquet(uri)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            entry = (file, _image_column(file.schema_arrow, uri), list(itertools.accumulate(sizes)) or [0])
            self._files[uri] = entry
            if len(self._files) > 16:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(uri)
        return self._files[uri]

    def _read_group(self, uri: str, group: int) -> pa.Table:
        if self._group is None or self._group[:2] != (uri, group):
            self._group = None  # not two in memory
            file, column, _ = self._files[uri]
            columns = [column, *(name for name in ("height", "width") if name in file.schema_arrow.names)]
            self._group = (uri, group, file.read_row_group(group, columns=columns, use_threads=False))
        return self._group[2]


def _parquet_row(where: str, table: pa.Table, column: str, row: int) -> bytes | Reject:
    value = table[column][row].as_py()
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            return _unreadable(f"{where}: holds no bytes, only the path {value['path']!r}")
        value = value["bytes"]
    if value is None:
        return Reject("empty", f"{where}: no bytes")
    if not value:
        return _empty(where)
    if "height" in table.column_names and "width" in table.column_names:
        height, width = table["height"][row].as_py(), table["width"][row].as_py()
        # An encoded image of just this length would be a freak, but its first bytes would tell.
        if isinstance(height, int) and isinstance(width, int) and len(value) == height * width * 3:
            return npy(np.frombuffer(value, np.uint8).reshape(height, width, 3))
    return value


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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
