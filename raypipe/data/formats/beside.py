"""Annotations in a text file for each image: which file is whose, and what all of them say."""

import os
import posixpath
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from raypipe.data.location import Location
from raypipe.data.tables import SOURCE, box_lists, lists, lists_of
from raypipe.errors import UsageError, logger, words

log = logger(__name__)

T = TypeVar("T")

_AT_ONCE = 16
"""Files of a store that are read at once: each read waits for the network."""


@dataclass(frozen=True, kw_only=True)
class Boxes(Generic[T]):
    """What one image's file says.

    boxes: x1 y1 x2 y2 of `frame`. labels: a number or a name each.
    frame: height and width; 0, 0: unknown.
    """

    boxes: list[list[float]] = field(default_factory=list)
    labels: list[T] = field(default_factory=list)
    frame: tuple[int, int] = (0, 0)


def read_beside(
    folder: Location,
    files: Sequence[str],
    parse: Callable[[bytes], Boxes[T]],
    *,
    what: str,
) -> list[Boxes[T]]:
    """What each of `files` in `folder` says; nothing for one that does not exist.

    A file that makes no sense leaves its image without annotations. A warning counts these.

    Args:
        what: the kind of files, for the warning.

    Raises:
        UsageError: a store or disk does not give a file.
    """

    def read(file: str) -> bytes | None:
        try:
            return (folder / file).read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UsageError(
                f"cannot read {str(folder / file)!r}: {words(error)}. Nothing was started. Make "
                f"it readable, or try again when its store answers."
            ) from error

    with ThreadPoolExecutor(_AT_ONCE if folder.is_remote else 1) as pool:
        contents = list(pool.map(read, files))
    found: list[Boxes[T]] = []
    bad: list[tuple[str, str]] = []
    for file, content in zip(files, contents, strict=True):
        try:
            found.append(Boxes() if content is None else parse(content))
        except Exception as error:  # foreign text: this image goes without annotations
            bad.append((file, words(error)))
            found.append(Boxes())
    if bad:
        log.warning(
            "%s: %d files of %s make no sense; their images go without annotations. The first is "
            "%s: %s",
            folder,
            len(bad),
            what,
            *bad[0],
        )
    if not any(content is not None for content in contents) and files:
        raise UsageError(
            f"none of the {len(files)} images has a file of {what} in {str(folder)!r}, such as "
            f"{files[0]}. Nothing was started. Give the folder whose files are named as the "
            f"images are"
        )
    return found


def with_boxes(images: pa.Table, found: Sequence[Boxes[int]]) -> pa.Table:
    """`images` (schema SOURCE) with these boxes. Their ids are numbers from 1 on."""
    counts = [len(one.boxes) for one in found]
    total = sum(counts)
    flat = [box for one in found for box in one.boxes]
    columns = {
        "boxes": box_lists(counts, np.array(flat, np.float64).reshape(-1, 4)),
        "labels": lists(
            [np.array(one.labels, np.int64) for one in found], SOURCE.field("labels").type
        ),
        "crowds": lists_of(counts, np.zeros(total, bool)),
        "annotation_ids": lists_of(counts, np.arange(1, total + 1)),
        "frame": pa.array([one.frame for one in found], SOURCE.field("frame").type),
    }
    return pa.table(
        [columns.get(name, images.column(name)) for name in SOURCE.names], schema=SOURCE
    )


def files_of(images: Iterable[str], suffix: str) -> list[str]:
    """The file of each image: its path with another suffix."""
    return [posixpath.splitext(path)[0] + suffix for path in images]


def is_folder(place: Location) -> bool:
    """Whether annotations are a folder of files, not one file."""
    if place.is_remote:
        return not place.suffix
    return os.path.isdir(place.path)
