"""What `--input` means: a table with one row an image.

`look` decodes nothing. `raypipe.data.reader` fetches the bytes later, where they are needed.

| input | rows | `image_id` |
|---|---|---|
| a directory | image files below it; if there are none, its tars or Parquet files | path in it |
| a glob (`**`, `{000..009}`, `{a,b}`) or a file | files that match | path below the fixed part |
| a directory and a COCO JSON | the JSON's images in its order, even without a file | COCO id |
| a directory, and YOLO's or Pascal VOC's files | image files below it | path in it |
| WebDataset tars | image members, annotated by `.json` and `.cls` | sidecar's id, or member |
| Parquet | rows: encoded bytes, raw pixels, or tensors | `image_id`, or file#row |
| `demo`, `demo:N` | procedural photos with boxes (`raypipe.data.demo`) | demo-SEED-INDEX |

`_raypipe/` is left out. So are hidden files and files that are no images: these are counted.
Directories and globs are ordered by path components, everything else as stored. The first N rows
are the same with and without `limit`; only their names may differ, if a later row's name clashes.

An image_id that occurs again gets `#2`, `#3`, ... (one key in two tars, one file in two epochs).
COCO refuses this, because annotations refer to the id. To list a tar, it is read once, at 37 us a
member; a remote tar is fetched whole.

A row whose image cannot be read is still a row. It becomes a `Reject` when it is read.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data import demo
from raypipe.data.formats import beside, files, voc, yolo
from raypipe.data.formats.coco import list_coco
from raypipe.data.formats.parquet import list_parquet
from raypipe.data.formats.tar import list_tar
from raypipe.data.location import Location
from raypipe.data.names import PACKED, PARQUET, SUFFIXES, TAR, suffix_of, unique_names
from raypipe.data.tables import EMPTY, SOURCE, Listed, box_lists, lists_of, rows, text
from raypipe.errors import UsageError, logger

log = logger(__name__)

_MOST_SUFFIXES = 20
"""At most so many suffixes are counted each; rarer ones are counted together."""


def list_images(
    input: str, *, annotations: str | None = None, limit: int | None = None, seed: int = 0
) -> pa.Table:
    """The rows of `look`, without the count of files that were left out."""
    return look(input, annotations=annotations, limit=limit, seed=seed).rows


def look(
    input: str,
    *,
    annotations: str | None = None,
    labels: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Listed:
    """The images of `input` (schema SOURCE), in a deterministic order, and the files left out.

    The latter are also told in one line of the log.

    Args:
        annotations: of images below the directory `input`: a COCO JSON, YOLO's data.yaml or its
            folder of text files, or Pascal VOC's folder of XML files.
        labels: "folder": an image's label is the number of its class folder, the first folder of
            its path. These are numbered from 0 on in alphabetical order, as torchvision's
            ImageFolder does. Images in none are left out.
        limit: stop after this many images.
        seed: of demo images.

    Raises:
        UsageError: there is nothing to read, or a JSON or a Parquet footer is damaged.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} leaves no image; give at least 1, or none for all")
    if input == "demo" or input.startswith("demo:"):
        if annotations is not None:
            raise UsageError(
                f"{input!r} has its own boxes; leave out the annotations {annotations!r}"
            )
        _check_files(input, labels, "it has labels of its own")
        return Listed(_unique(_list_demo(input, limit, seed)))
    if not input:
        raise UsageError(
            "the input is empty; give a directory, a glob, tars, Parquet files or 'demo'"
        )
    why = ""
    if annotations is not None:
        _check_files(input, labels, f"--annotations {annotations!r} has labels already")
        listed, why = _annotated(input, annotations, limit)
    elif labels is not None:
        listed = _by_folder(_list_places(input, None), input, labels, limit)
    else:
        listed = _list_places(input, limit)
    skipped = _most_common(listed.skipped)
    if listed.rows.num_rows == 0:
        raise UsageError(_nothing(input, listed.skipped))
    if skipped:
        log.warning(
            "%s: %d files are left out: %s%s%s",
            input,
            skipped.total(),
            _told(skipped),
            why,
            _unpack(skipped),
        )
    return Listed(_unique(listed.rows), skipped, listed.classes)


def _annotated(input: str, annotations: str, limit: int | None) -> tuple[Listed, str]:
    """The images with their annotations, and why other files are left out."""
    folder, place = Location.of(input), Location.of(annotations)
    if is_coco(annotations):
        left_out = Counter[str]()
        listed = list_coco(folder, place, limit, there=_files_beside(place, input, left_out))
        listed.skipped.update(+left_out)
        return listed, f" (not named in {annotations})"
    if not folder.is_remote and not os.path.isdir(folder.path):
        raise UsageError(
            f"{input!r} is no directory; with annotations the input is the directory of the images"
        )
    in_yolo = place.suffix.lower() in yolo.SUFFIXES
    suffix = ".txt" if in_yolo else _suffix_in(annotations)
    listed = _list_places(input, limit)
    _check_files(input, "annotations", "YOLO and Pascal VOC annotate image files", listed.rows)
    listed.skipped.pop(suffix, None)  # the annotations, where they are beside the images
    paths = listed.rows.column("image_id").to_pylist()
    if suffix == ".txt":
        rows_, classes = yolo.annotate(listed.rows, paths, folder, place)
    else:
        rows_, classes = voc.annotate(listed.rows, paths, place)
    return Listed(rows_, listed.skipped, classes), ""


def is_coco(annotations: str | None) -> bool:
    """Whether annotations are a COCO JSON: neither YOLO's data.yaml nor a folder."""
    if annotations is None:
        return False
    place = Location.of(annotations)
    return place.suffix.lower() not in yolo.SUFFIXES and not beside.is_folder(place)


def _suffix_in(annotations: str) -> str:
    """Whether the files of a folder of annotations are .txt or .xml."""
    _, paths = files.find(annotations, Counter())
    for path in paths:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in (".txt", ".xml"):
            return suffix
    raise UsageError(
        f"{annotations!r} has neither YOLO's text files nor Pascal VOC's XML files. Nothing was "
        f"started. Give their folder, YOLO's data.yaml, or a COCO JSON"
    )


def _by_folder(listed: Listed, input: str, labels: str, limit: int | None) -> Listed:
    """The images with the label of their class folder, without those in none."""
    why = "tars have .cls files for labels, and Parquet files a column `label`"
    _check_files(input, labels, why, listed.rows)
    heads = [path.partition("/") for path in listed.rows.column("image_id").to_pylist()]
    inside = np.array([bool(slash) for _, slash, _ in heads], bool)
    names = np.array([head for head, slash, _ in heads if slash], str)
    if not len(names):
        raise UsageError(
            f"no image of {input!r} is in a folder of its class, such as {input}/cat/1.jpg. Give "
            f"the folder of the class folders, or leave out --labels folder"
        )
    classes, numbers = np.unique(names, return_inverse=True)
    found = listed.rows.filter(pa.array(inside))
    column = lists_of(np.ones(len(names), np.int64), numbers.astype(np.int64))
    found = found.set_column(
        found.column_names.index("labels"), SOURCE.field("labels"), column
    ).slice(0, limit)
    skipped = listed.skipped + Counter({"(in no class folder)": int((~inside).sum())})
    return Listed(found, +skipped, tuple(classes.tolist()))


def _check_files(input: str, labels: str | None, why: str, found: pa.Table | None = None) -> None:
    """Raise UsageError if labels cannot be given to these images: they are no files."""
    if labels is None or (found is not None and pc.all(pc.equal(found["length"], -1)).as_py()):
        return
    raise UsageError(
        f"{input!r} cannot have labels from {labels!r}: {why}. Nothing was started. Leave it out, "
        f"or give a folder of image files"
    )


def _files_beside(annotations: Location, folder: str, skipped: Counter[str]) -> Iterator[str]:
    """The files below a folder, except the annotations themselves.

    A folder that cannot be listed gives only a warning: its images become rejects later.
    """
    try:
        base, paths = files.find(folder, skipped)
        yield from (path for path in paths if base / path != annotations)
    except UsageError as error:
        log.warning("%s; files that the annotations do not name are not counted", error)


def _nothing(input: str, skipped: Counter[str]) -> str:
    place = Location.of(input)
    if not place.is_remote and os.path.isfile(place.path):
        base = os.path.basename(place.path)
        if packed := _unpack(skipped, base):
            return (
                f"{input!r} is a compressed tar, whose images cannot be reached one by one{packed}"
            )
        if base.lower().endswith((*TAR, *PARQUET)):
            return f"no images in {input!r}: it holds {_told(skipped) or 'nothing'}"
        return (
            f"{input!r} is a file, and none that can hold images: images end in "
            f"{' '.join(SUFFIXES)}, and .tar and .parquet files hold some"
        )
    there = f" ({_told(skipped)} there{_unpack(skipped)})" if skipped else ""
    return (
        f"no images in {input!r}: nothing there ends in {' '.join(SUFFIXES)} .tar .parquet{there}; "
        "hidden files do not count. A directory is searched in depth, a glob only at **"
    )


def _told(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())


def _unpack(skipped: Counter[str], name: str = "FILE") -> str:
    """The command that makes compressed tars readable, if some were left out."""
    commands = {f"{PACKED[suffix]} {name}" for suffix in skipped if suffix in PACKED}
    return (
        f"; unpack compressed tars first, with {' or '.join(sorted(commands))}" if commands else ""
    )


def _most_common(skipped: Counter[str]) -> Counter[str]:
    if len(skipped) <= _MOST_SUFFIXES:
        return skipped
    kept = Counter(dict(skipped.most_common(_MOST_SUFFIXES)))
    kept["(others)"] = skipped.total() - kept.total()
    return kept


def _list_places(input: str, limit: int | None) -> Listed:
    pieces, skipped, left = [EMPTY], Counter[str](), limit
    classes: set[tuple[str, ...]] = set()
    for place in files.alternatives(input):
        base, paths = files.find(place, skipped)
        listed = _list_files(base, paths, left)
        pieces.append(listed.rows)
        skipped += listed.skipped
        classes.add(listed.classes)
        left = left if left is None else left - listed.rows.num_rows
        if left == 0:
            break
    return Listed(pa.concat_tables(pieces), +skipped, _common(classes))


def _common(classes: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The names of the classes, if all parts of the input have the same."""
    return next(iter(classes)) if len(classes) == 1 else ()


def _list_files(base: Location, paths: Iterable[str], limit: int | None) -> Listed:
    """The images among the files; if there are none, the images in tars or Parquet files."""
    tars: list[str] = []
    parquets: list[str] = []
    skipped = Counter[str]()

    def images() -> Iterator[str]:
        for path in paths:
            lower = path.lower()
            if lower.endswith(SUFFIXES):
                yield path
            elif lower.endswith(TAR):
                tars.append(path)
            elif lower.endswith(PARQUET):
                parquets.append(path)
            else:
                skipped[suffix_of(path)] += 1

    found = list(itertools.islice(images(), limit))
    if found:
        skipped.update(suffix_of(path) for path in (*tars, *parquets))
        return Listed(_image_files(base, found), skipped)
    if tars and parquets:
        raise UsageError(
            f"{base} holds {len(tars)} tars and {len(parquets)} Parquet files, and it is not clear "
            "which are meant; give a glob such as *.tar"
        )
    pieces, left = [EMPTY], limit
    classes: set[tuple[str, ...]] = set()
    for path in tars or parquets:
        if left == 0:
            break
        listed = list_tar(base / path, left) if tars else list_parquet(base / path, path, left)
        pieces.append(listed.rows)
        skipped += listed.skipped
        classes.add(listed.classes)
        left = left if left is None else left - listed.rows.num_rows
    return Listed(pa.concat_tables(pieces), skipped, _common(classes))


def _image_files(base: Location, paths: list[str]) -> pa.Table:
    if base.is_remote:
        return rows(paths, paths, base.uris(paths))
    try:
        ids, folder = pa.array(paths, pa.string()), pa.scalar(base.path.rstrip("/"))
    except UnicodeEncodeError:  # a row at a time: for a million rows, that would take seconds
        texts = [text(path) for path in paths]
        return rows(texts, texts, base.uris(paths))
    return rows(ids, ids, pc.binary_join_element_wise(folder, ids, "/"))


def _unique(table: pa.Table) -> pa.Table:
    """Make `image_id` unique (#2, #3, ...), and names safe and unique."""
    ids = table["image_id"]
    if pc.count_distinct(ids).as_py() < len(ids):
        ids = pa.chunked_array([pa.array(_number_repeats(ids.to_pylist()), pa.string())])
    names = pa.chunked_array([pa.array(unique_names(table["name"].to_pylist()), pa.string())])
    table = table.set_column(0, SOURCE.field("image_id"), ids).set_column(
        1, SOURCE.field("name"), names
    )
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


def _list_demo(input: str, limit: int | None, seed: int) -> pa.Table:
    count = demo.COUNT if limit is None else limit
    if input != "demo":
        text = input.removeprefix("demo:")
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(
                f"{input!r} does not say how many demo images to make; write for example demo:1000"
            )
        count = int(text) if limit is None else min(int(text), limit)
    if seed < 0:
        raise UsageError(f"a seed of {seed} cannot be used for demo images; give 0 or more")
    demo.render_missing(seed, count)
    layouts = [demo.layout(seed, index) for index in range(count)]
    ids = [f"demo-{seed}-{index:06d}" for index in range(count)]
    counts = [len(layout.labels) for layout in layouts]
    total = sum(counts)
    return rows(
        ids,
        ids,
        [f"demo://{seed}/{index}" for index in range(count)],
        boxes=box_lists(counts, np.concatenate([layout.boxes for layout in layouts])),
        labels=lists_of(counts, np.concatenate([layout.labels for layout in layouts])),
        crowds=lists_of(counts, np.zeros(total, bool)),
        annotation_ids=lists_of(counts, np.arange(1, total + 1)),
    )
