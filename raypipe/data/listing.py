"""From what the user calls the input to a table with one row an image.

`look` finds out what there is and looks into no image; `raypipe.data.reader` fetches the bytes later, where they are needed.

| input | rows | `image_id` |
|---|---|---|
| a directory | every image file below it; if it has none, its tars or Parquet files | path in it |
| a glob (`**`, `{000..009}`, `{a,b}`), one file | the images, tars or Parquet files that match | path below the fixed part |
| a directory and a COCO JSON | the JSON's images in its order, whether the file exists or not | COCO id |
| WebDataset tars (`*.tar`) | image members; their `.json` and `.cls` give boxes and labels | sidecar's id, or member |
| Parquet | rows: encoded bytes (or HF's struct of bytes and path), raw pixels, or tensors | `image_id`, or file#row |
| `demo`, `demo:N` | procedural photos with boxes (`raypipe.data.demo`) | demo-SEED-INDEX |

Hidden files and `_raypipe/` are left out; what else is left out is counted by suffix. Order: directories and globs by path
components, everything else as stored. The first N rows are the same with and without `limit` (names excepted: what clashes
may be behind the limit). An image_id that occurs again gets `#2`, `#3`, ... (the same key in two tars, the same file in two
epochs); only COCO refuses this, because there annotations refer to the id. Tars are read through once to be listed, 37 us a
member; remote ones are fetched whole for that.

Rows whose image cannot be read are rows all the same. They become a `Reject` when they are read.
"""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data import demo
from raypipe.data.formats import files
from raypipe.data.formats.coco import list_coco
from raypipe.data.formats.parquet import list_parquet
from raypipe.data.formats.tar import list_tar
from raypipe.data.location import absolute, is_remote, join, local_path, local_uri
from raypipe.data.names import PACKED, PARQUET, SUFFIXES, TAR, suffix_of, unique_names
from raypipe.data.tables import EMPTY, SOURCE, Listed, box_lists, lists_of, rows, text
from raypipe.errors import UsageError

log = logging.getLogger(__name__)

_MOST_SUFFIXES = 20
"""Suffixes that are counted each; those of fewer files are counted together."""


def list_images(
    input: str, *, annotations: str | None = None, limit: int | None = None, seed: int = 0
) -> pa.Table:
    """The rows of `look`, for whoever does not ask what was left out."""
    return look(input, annotations=annotations, limit=limit, seed=seed).rows


def look(
    input: str, *, annotations: str | None = None, limit: int | None = None, seed: int = 0
) -> Listed:
    """The images of `input` as a table of SOURCE, in a deterministic order (see the module's table), and what was left out.

    What was left out is also said, in one line of the log.

    Args:
        annotations: a COCO JSON whose images are under the directory `input`.
        limit: only the first so many; the listing stops there.
        seed: which demo images.

    Raises:
        UsageError: there is nothing to read, or the listing itself (a JSON, a Parquet footer) makes no sense.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} leaves no image; give at least 1, or none for all")
    if input == "demo" or input.startswith("demo:"):
        if annotations is not None:
            raise UsageError(
                f"{input!r} has its own boxes; leave out the annotations {annotations!r}"
            )
        return Listed(_unique(_list_demo(input, limit, seed)))
    if not input:
        raise UsageError(
            "the input is empty; give a directory, a glob, tars, Parquet files or 'demo'"
        )
    if annotations is not None:
        listed = list_coco(input, annotations, limit, there=_files_beside(annotations, input))
        why = f" (not named in {annotations})"
    else:
        listed, why = _list_places(input, limit), ""
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
    return Listed(_unique(listed.rows), skipped)


def _files_beside(annotations: str, folder: str) -> Iterator[str]:
    """List the files below a folder, except the annotations themselves. A folder that cannot be listed gives a warning only: its
    images become rejects when they are read."""
    root, own = absolute(folder), absolute(annotations)
    try:
        yield from (path for path in files.find(folder)[1] if join(root, path) != own)
    except UsageError as error:
        log.warning("%s; files that the annotations do not name are not counted", error)


def _nothing(input: str, skipped: Counter[str]) -> str:
    if not is_remote(input) and os.path.isfile(local_path(input)):
        base = os.path.basename(local_path(input))
        if packed := _unpack(skipped, base):
            return (
                f"{input!r} is a compressed tar, whose images cannot be reached one by one{packed}"
            )
        if base.lower().endswith((*TAR, *PARQUET)):
            return f"no images in {input!r}: it holds {_told(skipped) or 'nothing'}"
        return (
            f"{input!r} is a file, and none that can hold images: images end in {' '.join(SUFFIXES)}, and .tar and .parquet "
            "files hold some"
        )
    there = f" ({_told(skipped)} there{_unpack(skipped)})" if skipped else ""
    return (
        f"no images in {input!r}: nothing there ends in {' '.join(SUFFIXES)} .tar .parquet{there}; hidden files do not count. "
        "A directory is searched in depth, a glob only where it says **"
    )


def _told(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())


def _unpack(skipped: Counter[str], name: str = "FILE") -> str:
    """The command that makes compressed tars readable, where some were left out."""
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
    for place in files.alternatives(input):
        base, paths = files.find(place)
        listed = _list_files(base, paths, left)
        pieces.append(listed.rows)
        skipped += listed.skipped
        left = left if left is None else left - listed.rows.num_rows
        if left == 0:
            break
    return Listed(pa.concat_tables(pieces), skipped)


def _list_files(base: str, paths: Iterable[str], limit: int | None) -> Listed:
    """Rows of the files: images if there are any; otherwise what is in the tars or Parquet files."""
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
            f"{base} holds {len(tars)} tars and {len(parquets)} Parquet files, and it is not clear which are meant; give a "
            "glob such as *.tar"
        )
    pieces, left = [EMPTY], limit
    for path in tars or parquets:
        if left == 0:
            break
        listed = (
            list_tar(join(base, path), left) if tars else list_parquet(join(base, path), path, left)
        )
        pieces.append(listed.rows)
        skipped += listed.skipped
        left = left if left is None else left - listed.rows.num_rows
    return Listed(pa.concat_tables(pieces), skipped)


def _image_files(base: str, paths: list[str]) -> pa.Table:
    if is_remote(base):
        return rows(paths, paths, [join(base, path) for path in paths])
    try:
        ids, folder = pa.array(paths, pa.string()), pa.scalar(base.rstrip("/"))
    except UnicodeEncodeError:  # row by row, because a million times that would take seconds
        texts = [text(path) for path in paths]
        return rows(texts, texts, [local_uri(os.path.join(base, path)) for path in paths])
    return rows(ids, ids, pc.binary_join_element_wise(folder, ids, "/"))


def _unique(table: pa.Table) -> pa.Table:
    """Makes `image_id` unique (again: #2, #3, ...) and turns source names into safe unique ones."""
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
