"""What tests of listing, reading and writing share."""

import contextlib
import functools
import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from raypipe.data.reader import Reader
from raypipe.data.sinks import write_shard
from raypipe.data.tables import BLOCK
from raypipe.images import opencv
from raypipe.images.decode import read_header
from raypipe.images.header import Reject


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


# --- writing ---------------------------------------------------------------------------------


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Like a photo: smooth in the large, some texture in the small."""
    rng = np.random.default_rng(seed)
    large = cv2.resize(
        rng.uniform(0, 255, (4, 5, 3)).astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    return np.clip(large + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)


def block(
    images: list[np.ndarray | None],
    *,
    names: list[str] | None = None,
    epoch: int = 0,
    shard: int = 12,
) -> pa.Table:
    rows = []
    for i, image in enumerate(images):
        rows.append(
            {
                "epoch": epoch,
                "shard": shard,
                "image_id": f"id-{i}",
                "name": names[i] if names else f"set/{i:03d}",
                "uri": f"/in/{i}.jpg",
                "height": None if image is None else image.shape[0],
                "width": None if image is None else image.shape[1],
                "image": None if image is None else image.tobytes(),
                "reason": "corrupt" if image is None else None,
                "detail": "half of it is missing" if image is None else None,
                "boxes": [[1.5, 2, 3, 4 + i]] * (i % 3),
                "labels": [5, 6][: i % 3],
                "crowds": [False, True][: i % 3],
                "annotation_ids": [10 * i, 10 * i + 1][: i % 3],
            }
        )
    return pa.Table.from_pylist(rows, schema=BLOCK)


IMAGES = [photo(40 + i, 60 - i, i) for i in range(7)]
WITH_REJECTS = [None, *IMAGES[:3], None, *IMAGES[3:], None]

write_block = functools.partial(write_shard, encode=opencv.encode)


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def pictures(table: pa.Table) -> list[np.ndarray]:
    with contextlib.closing(Reader()) as reader:
        results = list(reader.read(table))
    assert not [one for one in results if isinstance(one, Reject)]
    return [opencv.decode(data, read_header(data)) for data in results]  # type: ignore[arg-type]
