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

Hidden files and `_raypipe/` are left out. Order: directories and globs by path components, everything else as stored. The
first N rows are the same with and without `limit` (names excepted: what clashes may be behind the limit). An image_id that
occurs again gets `#2`, `#3`, ... (the same key in two tars, the same file in two epochs); only COCO refuses this, because there
annotations refer to the id. Tars are read through once to be listed, 37 us a member; remote ones are fetched whole for that.

Rows whose image cannot be read are rows all the same. They become a `Reject` when they are read.
"""

import contextlib
import glob
import itertools
import json
import logging
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from raypipe import UsageError
from raypipe.data import demo
from raypipe.data.location import ERRORS, absolute, filesystem, is_remote, join, local_path, local_uri, one_line, read
from raypipe.data.names import PARQUET, STATE, SUFFIXES, TAR, unique_names
from raypipe.data.reader import Reader, image_column, open_parquet

__all__ = ["ANNOTATION_FIELDS", "BOXES", "SOURCE", "Reader", "annotation_id", "list_images", "read_coco", "unique_names"]

log = logging.getLogger(__name__)

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
    if listed.num_rows == 0 and not is_remote(input) and os.path.isfile(local_path(input)):
        raise UsageError(
            f"{input!r} is a file, and none that can hold images: images end in {' '.join(SUFFIXES)}, and .tar and .parquet files hold some"
        )
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
    inside = path[len(base) :].lstrip("/")
    if "**" in _components(inside):
        return base, _deep(base, inside)
    matches = {match[len(base) :].lstrip("/") for match in glob.iglob(path)}
    return base, sorted((match for match in matches if STATE not in _components(match)), key=_components)


def _deep(base: str, pattern: str) -> Iterator[str]:
    """The paths below `base` that match a pattern with `**`. glob itself would follow links in circles there, and pass over folders that it cannot read."""
    wanted = _glob_regex(pattern, question=True)
    head = "/".join(itertools.takewhile(lambda part: part != "**", _components(pattern)))
    folders = [
        folder[len(base) :].strip("/") for folder in glob.iglob(os.path.join(glob.escape(base), head)) if os.path.isdir(folder)
    ]
    for folder in sorted(folders, key=_components):
        if STATE not in _components(folder):
            inside = (posixpath.join(folder, path) for path in _walk(os.path.join(base, folder)))
            yield from filter(wanted.fullmatch, inside)


def _find_remote(uri: str) -> tuple[str, Iterable[str]]:
    system, path = filesystem(uri)
    magic = re.search(r"[*\[]", path)
    base = path if magic is None else path[: magic.start()].rpartition("/")[0].rstrip("/")
    try:
        if magic is not None and system.get_file_info(posixpath.normpath(path)).type != fs.FileType.NotFound:  # it is called so
            magic, base = None, path
        if magic is None and "/" in path:
            info = system.get_file_info(path)
            if info.type == fs.FileType.File:
                base = path.rpartition("/")[0]
                return _reroot(uri, path, base), [path[len(base) + 1 :]]
            if info.type == fs.FileType.NotFound:
                raise UsageError(f"{uri!r} does not exist; nothing can be read from it")
        infos = system.get_file_info(fs.FileSelector(base, recursive=True))
    except ERRORS as error:
        raise UsageError(f"cannot list {uri!r}: {one_line(error)}") from error
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
    return name.startswith(".") or name == STATE


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
        if tars or parquets:
            log.warning("%s: %d tars and %d Parquet files beside the images are left out", base, len(tars), len(parquets))
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
    if is_remote(base):
        return _rows(paths, paths, [join(base, path) for path in paths])
    try:
        ids, folder = pa.array(paths, pa.string()), pa.scalar(base.rstrip("/"))
    except UnicodeEncodeError:  # row by row, because a million times that would take seconds
        texts = [_text(path) for path in paths]
        return _rows(texts, texts, [local_uri(os.path.join(base, path)) for path in paths])
    return _rows(ids, ids, pc.binary_join_element_wise(folder, ids, "/"))


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
        if not _is_coco_image(image):
            raise UsageError(f"{annotations!r}: image number {position} has no id or no file_name: {str(image)[:200]!a}")
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


def _is_coco_image(image: Any) -> bool:
    if not isinstance(image, dict) or not isinstance(image.get("id"), int | str) or not isinstance(image.get("file_name"), str):
        return False
    try:  # JSON can spell what is no Unicode, and no file is called
        f"{image['id']}{image['file_name']}".encode()
    except UnicodeEncodeError:
        return False
    return True


def read_coco(location: str) -> dict[str, Any]:
    """A COCO JSON: an object with a non-empty list `images`. Raises UsageError if it is not that."""
    try:
        coco = json.loads(read(location))
    except ERRORS as error:
        raise UsageError(f"cannot read the annotations {location!r}: {one_line(error)}") from error
    except ValueError as error:
        raise UsageError(f"the annotations {location!r} are not JSON: {one_line(error)}") from error
    if not isinstance(coco, dict) or not isinstance(coco.get("images"), list):
        raise UsageError(f'the annotations {location!r} are JSON, but not COCO: there is no list "images" in them')
    if not coco["images"]:
        raise UsageError(f'the annotations {location!r} list no image: "images" is empty')
    if not isinstance(coco.get("annotations", []), list):
        raise UsageError(f'the annotations {location!r} are not COCO: "annotations" is no list')
    return coco


def annotation_id(annotation: dict[str, Any], position: int) -> int:
    """The annotation's id, or its position in the JSON's list where it has none. Raises TypeError or ValueError if that is no whole number."""
    return int(annotation.get("id", position))


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
            identity = annotation_id(annotation, position)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{location!r}: annotation number {position} makes no sense ({type(error).__name__}: {one_line(error)}): "
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


def check_annotation_ids(source: pa.Table, annotations: str) -> None:
    """Raises UsageError where an image of `source` (schema SOURCE) has an annotation id twice: then it is not clear which of its boxes is which."""
    for image_id, ids in zip(source["image_id"].to_pylist(), source["annotation_ids"].to_pylist(), strict=True):
        if len(set(ids)) < len(ids):
            again = next(one for one in ids if ids.count(one) > 1)
            raise UsageError(
                f"{annotations!r}: the annotation id {again} occurs twice for the image {image_id!r}, so it is not clear which of its boxes is which, "
                f"and the JSON of what is written would be wrong; make the ids unique"
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
    """The name with whatever is not Unicode in it written out: Arrow holds only UTF-8."""
    return name.encode(errors="backslashreplace").decode()


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
    count = unread = 0
    places: dict[str, tuple[int, int]] = {}  # of the images so far, for links to them
    try:
        with _open_tar(uri) as tar:
            for info in tar:
                count += 1
                tar.members = []  # type: ignore[attr-defined]  # else it keeps a kilobyte a member
                lower = info.name.lower()
                place = _place(info, places)
                if lower.endswith(SUFFIXES):
                    if place is None:
                        unread += not info.isdir()
                        continue
                    places[posixpath.normpath(info.name)] = place
                    yield _Member(info.name, *place), None
                elif not info.isreg() or info.issparse():
                    continue
                elif lower.endswith((".json", ".cls")):
                    content = tar.extractfile(info)
                    yield _Member(info.name, info.offset_data, info.size), content.read() if content else b""
    except (tarfile.TarError, EOFError, *ERRORS) as error:
        if count == 0:
            raise UsageError(
                f"cannot read the tar {uri!r}: {one_line(error)}. It must exist and be an uncompressed tar; unpack .tar.gz first, "
                "because images inside it cannot be reached one by one"
            ) from error
        log.warning("%s breaks off after %d members (%s); what was behind that is lost", uri, count, one_line(error))
    if unread:
        log.warning("%s: %d images are left out: links to what the tar does not have before them, or sparse files", uri, unread)


def _place(info: tarfile.TarInfo, places: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Where the bytes of a member are, offset and length; of a link, those of the image among `places` that it leads to. None: nowhere in the tar."""
    if info.isreg():
        return None if info.issparse() else (info.offset_data, info.size)
    if info.islnk():
        return places.get(posixpath.normpath(info.linkname))
    if info.issym():
        return places.get(posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname)))
    return None


class _Strict(tarfile.TarInfo):
    """A damaged header is an error everywhere; tarfile takes it for the tar's end, unless it is the first."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Strict":
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            if tar.offset > 0:
                raise tarfile.SubsequentHeaderError(str(error)) from error  # type: ignore[attr-defined]
            raise


@contextlib.contextmanager
def _open_tar(uri: str) -> Iterator[tarfile.TarFile]:
    if not is_remote(uri):
        # Unbuffered: a buffer would read 8 KiB for every header of 512 bytes and be thrown away by the seek to the next.
        with open(local_path(uri), "rb", buffering=0) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Strict) as tar:
            yield tar
        return
    system, path = filesystem(uri)
    # As one stream: a request for each header would be slower than reading everything, at usual image sizes.
    with (
        system.open_input_stream(path, buffer_size=8 << 20) as stream,
        tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20, tarinfo=_Strict) as tar,
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


_WITH_IMAGE = ("image_id", "name", "boxes", "labels", "crowds", "annotation_ids", "label")


def _list_parquet(uri: str, relative: str, limit: _Limit) -> pa.Table:
    """Rows of a file. `name`, `boxes` (xyxy), `labels`, `crowds`, `annotation_ids` or `label` are taken along if they fit."""
    try:
        with open_parquet(uri) as file:
            image_column(file.schema_arrow, uri)
            count = file.metadata.num_rows if limit.left is None else min(limit.left, file.metadata.num_rows)
            wanted = [name for name in _WITH_IMAGE if name in file.schema_arrow.names]
            table = file.read_row_groups(_groups_of_first(file, count), columns=wanted, use_threads=False).slice(0, count)
    except ERRORS as error:
        raise UsageError(f"cannot read the Parquet file {uri!r}: {one_line(error)}; remove it or write it again") from error
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


def _groups_of_first(file: pq.ParquetFile, count: int) -> list[int]:
    groups, rows = [], 0
    for group in range(file.metadata.num_row_groups):
        if rows >= count:
            break
        groups.append(group)
        rows += file.metadata.row_group(group).num_rows
    return groups
