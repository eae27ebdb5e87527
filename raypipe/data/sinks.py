"""Where results go: one shard of finished rows becomes files, each put whole or not at all.

| format | files under the root | content |
|---|---|---|
| jpeg, png | `[epoch-NNN/][folder/]name.jpg`, `.png` | the image |
| npy | `[epoch-NNN/][folder/]name.npy` | HWC uint8, or what `finish` returns |
| webdataset | `[epoch-NNN/]shard-NNNNNN.tar` | `key.jpg` and `key.json` an image |
| parquet | `[epoch-NNN/]part-NNNNNN.parquet` | a row an image, with raw HWC uint8 pixels |
| huggingface | `[epoch-NNN/]train-NNNNNN.parquet` | a row an image, as JPEG, for `load_dataset` |

In MLPerf's cache, npy files are called `name.jpg.npy`. A tar also has `key.cls` for an image with
one label and no box. The content is made in `raypipe.data.formats`; this module decides the names.

A file's name and bytes depend only on its rows, so writing a shard twice changes nothing. Rejected
rows write nothing, and a shard of only rejected rows writes no file. All results can be inputs
again (`raypipe.data.listing`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raypipe.data.formats.files import EXTENSIONS, files_of, npy
from raypipe.data.formats.huggingface import Holds, huggingface_of
from raypipe.data.formats.parquet import parquet_of
from raypipe.data.formats.tar import tar_of
from raypipe.data.location import Location
from raypipe.data.puts import Puts
from raypipe.errors import UsageError

FORMATS = (*EXTENSIONS, "webdataset", "parquet", "huggingface")

Encode = Callable[[np.ndarray, str, int], bytes]
Finish = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """A format and the place it is written to.

    Attributes:
        folder: below the root, for image files (jpeg, png, npy).
        quality: of JPEG, 1 to 100.
        keeps_suffix: put the source's suffix before the file's own (a.jpg.npy).
        holds: what images have beside their pixels (huggingface).
        classes: the name of each label from 0 on (huggingface); empty: not known.
    """

    format: str
    root: Location
    folder: str = ""
    quality: int = 95
    keeps_suffix: bool = False
    holds: Holds = None
    classes: tuple[str, ...] = ()

    @property
    def tmp(self) -> str:
        """Below a local root, for unfinished files. Killed writers leave files there."""
        return f"{self.root.state}/tmp"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(
                f"the format {self.format!r} cannot be written; choose one of {', '.join(FORMATS)}"
            )
        if not 1 <= self.quality <= 100:
            raise UsageError(f"a JPEG quality of {self.quality} does not exist; give 1 to 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The files of one shard.

    Attributes:
        files: relative to the root. jpeg, png, npy: one a good row, in order; else at most one.
        bytes: of all files.
    """

    files: list[str]
    bytes: int


def write_shard(
    sink: Sink, block: pa.Table, *, encode: Encode, finish: Finish | None = None
) -> Written:
    """Write the good rows of a block (schema BLOCK; all rows of one epoch and one shard).

    Args:
        encode: called with a HWC RGB uint8 image, "jpeg" or "png", and the quality.
        finish: makes the array to store of a HWC uint8 image; only npy uses it.

    Raises:
        OSError, pa.ArrowException: the place cannot be written to. Files already written stay; the
            next try overwrites them.
    """
    if block["image"].null_count == block.num_rows:
        return Written(files=[], bytes=0)
    epoch, shard = block["epoch"][0].as_py(), block["shard"][0].as_py()
    prefix = f"epoch-{epoch:03d}/" if epoch else ""
    if sink.format == "webdataset":
        return _put(sink, f"{prefix}shard-{shard:06d}.tar", tar_of(block, encode, sink.quality))
    if sink.format == "parquet":
        return _put(sink, f"{prefix}part-{shard:06d}.parquet", parquet_of(block))
    if sink.format == "huggingface":
        made = huggingface_of(block, encode, sink.quality, holds=sink.holds, classes=sink.classes)
        return _put(sink, f"{prefix}train-{shard:06d}.parquet", made)
    folder = prefix + (sink.folder.strip("/") + "/" if sink.folder else "")

    def encoded(image: np.ndarray) -> bytes:
        if sink.format == "npy":
            return npy(image if finish is None else finish(image))
        return encode(image, sink.format, sink.quality)

    files, size = [], 0
    images = files_of(block, sink.format, encode=encoded, keeps_suffix=sink.keeps_suffix)
    with Puts(sink.root) as puts:
        for name, data in images:
            puts.put(folder + name, data)
            files.append(folder + name)
            size += len(data)
    return Written(files=files, bytes=size)


def _put(sink: Sink, file: str, data: bytes | memoryview) -> Written:
    sink.root.write(file, data)
    return Written(files=[file], bytes=len(data))
