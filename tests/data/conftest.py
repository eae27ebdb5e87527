"""What the tests of listing and of reading share."""

import contextlib
import io
import tarfile
from pathlib import Path

import pyarrow as pa

from raypipe.data.reader import Reader
from raypipe.images.decode import Reject


def put(root: Path, *files: str) -> dict[str, bytes]:
    """Files of made-up bytes: neither listing nor reading looks into an image."""
    contents = {}
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        contents[file] = (file.encode() * 50)[: 100 + len(contents)]
        path.write_bytes(contents[file])
    return contents


def read(table: pa.Table, threads: int = 4, patience_s: float = 8.0) -> list[bytes | Reject]:
    with contextlib.closing(Reader(threads, patience_s=patience_s)) as reader:
        return list(reader.read(table))


def reasons(results: list[bytes | Reject]) -> list[str | None]:
    return [one.reason if isinstance(one, Reject) else None for one in results]


def ids(table: pa.Table) -> list[str]:
    return table["image_id"].to_pylist()


def names(table: pa.Table) -> list[str]:
    return table["name"].to_pylist()


def tar(path: Path, *members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
