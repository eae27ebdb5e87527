"""What raypipe is measured beside. Each contender also runs alone, from command to end:

    python jobs/benchmarks/peers.py dataloader photos/ --output out

All resize to 300x300 (bilinear). They deliver uint8 batches of 64, or write JPEG files of quality
95. Peers with a storage format of their own get the images in it: that is prepared before the
clock starts.
"""

import hashlib
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro

from raypipe.run.cluster.machine import cores_here
from raypipe.stages.actor import keep_freed_memory

SIZE = 300
BATCH = 64
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]

Paths = list[str]
Moment = tuple[float, int]
"""When images came out, in seconds, and how many."""


@dataclass(frozen=True)
class Timing:
    """What one contender did in one round.

    moments: when images were done, by time.perf_counter().
    first_s: until the first batch; of plain processes, until they could begin.
    """

    moments: list[Moment]
    first_s: float


Contender = Callable[[Paths, str | None], Timing]
"""Reads the files, and writes results into the folder, if one is given."""


def timed(batches: Callable[[Paths, str | None], Iterator[Moment]]) -> Contender:
    """Make a contender of a function that yields when batches came out."""

    def contender(paths: Paths, folder: str | None) -> Timing:
        started = time.perf_counter()
        moments = list(batches(paths, folder))
        return Timing(moments, moments[0][0] - started)

    return contender


def steady(moments: list[Moment]) -> float:
    """Images/s without start and end: the slope over the middle four fifths of the images.

    Whole blocks come out at once. So a count from the first to the last would be a block too large.
    """
    moments = sorted(moments)
    at = np.repeat([when for when, _ in moments], [count for _, count in moments])
    edge = len(at) // 10
    middle = np.arange(edge, len(at) - edge)
    return float(np.polyfit(at[middle] - at[0], middle, 1)[0])


def kept_until_the_end() -> tempfile.TemporaryDirectory[str]:
    """A folder for the results of all contenders, to be deleted when all are measured.

    After a folder was deleted, ext4 without a journal took 0.1 to 0.4 ms longer for each new file
    for some time: it looks through the inodes that were freed just before.
    """
    return tempfile.TemporaryDirectory(prefix="raypipe-benchmark-")


def written(folder: str) -> list[Moment]:
    """When the files of `folder` were written, by the system's clock."""
    return [(file.stat().st_mtime_ns / 1e9, 1) for file in os.scandir(folder) if file.is_file()]


# --- one image -------------------------------------------------------------------------------


def read(path: str) -> bytes:
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def decode(data: bytes) -> np.ndarray:
    """Decode with OpenCV: (height, width, 3) RGB uint8."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


def resize(image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Resize to SIZE x SIZE, bilinear."""
    return cv2.resize(image, (SIZE, SIZE), dst=out, interpolation=cv2.INTER_LINEAR)


def write(image: np.ndarray, folder: str, name: str) -> None:
    """Write a JPEG file."""
    data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), QUALITY)[1].tobytes()
    with open(os.path.join(folder, name), "wb") as file:
        file.write(data)


def resized(data: bytes, name: str, folder: str | None) -> np.ndarray:
    """Do an image as the frameworks' workers do: decode, resize, perhaps write."""
    image = resize(decode(data))
    if folder:
        write(image, folder, name)
    return image


# --- plain processes -------------------------------------------------------------------------


def _of_opencv() -> Callable[[bytes], np.ndarray]:
    cv2.setNumThreads(1)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    return lambda data: resize(decode(data), out)


def _of_simplejpeg() -> Callable[[bytes], np.ndarray]:
    import simplejpeg

    cv2.setNumThreads(1)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    return lambda data: resize(simplejpeg.decode_jpeg(data, "RGB"), out)


def _of_torchvision() -> Callable[[bytes], np.ndarray]:
    import io

    import torch
    from PIL import Image
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)

    def one(data: bytes) -> np.ndarray:
        pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        small = functional.resize(image, [SIZE, SIZE], antialias=False)
        return small.permute(1, 2, 0).numpy()

    return one


_PLAIN = {
    "opencv": _of_opencv,
    "simplejpeg": _of_simplejpeg,
    "torchvision": _of_torchvision,
}


def _plain_loop(library: str, paths: Paths, folder: str | None, ready, done) -> None:
    keep_freed_memory()
    one = _PLAIN[library]()
    one(read(paths[0]))
    ready.wait()
    begun, moments = time.perf_counter(), []
    for path in paths:
        image = one(read(path))
        if folder:
            write(image, folder, os.path.basename(path))
        moments.append((time.perf_counter(), 1))
    done.put((begun, moments))


def plain(library: str) -> Contender:
    """Processes without a framework."""

    def contender(paths: Paths, folder: str | None) -> Timing:
        started, cores = time.perf_counter(), cores_here()
        context = multiprocessing.get_context("spawn")
        ready, done = context.Barrier(cores), context.Queue()
        shares = [(library, paths[i::cores], folder, ready, done) for i in range(cores)]
        processes = [context.Process(target=_plain_loop, args=share) for share in shares]
        for process in processes:
            process.start()
        results = [done.get() for _ in processes]
        for process in processes:
            process.join()
        moments = [moment for _, moments in results for moment in moments]
        return Timing(moments, min(begun for begun, _ in results) - started)

    return contender


# --- loaders of PyTorch ----------------------------------------------------------------------


class Frames:
    """A map-style dataset for the DataLoader."""

    def __init__(self, paths: Paths, folder: str | None):
        self._paths = paths
        self._folder = folder

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self._paths[index]
        return resized(read(path), os.path.basename(path), self._folder)


def one_thread(_: int) -> None:
    """Begin a worker."""
    cv2.setNumThreads(1)


def _workers() -> dict[str, Any]:
    """A worker a core. They are forked, as is usual, unless this process has Ray's threads.

    A process that is forked from one with threads may hang.
    """
    import ray

    how = "spawn" if ray.is_initialized() else None
    return {
        "num_workers": cores_here(),
        "worker_init_fn": one_thread,
        "multiprocessing_context": how,
    }


def dataloader(paths: Paths, folder: str | None) -> Iterator[Moment]:
    """PyTorch's DataLoader over OpenCV, a worker a core."""
    from torch.utils.data import DataLoader

    frames: Any = Frames(paths, folder)
    loader: Any = DataLoader(frames, batch_size=BATCH, **_workers())
    for batch in loader:
        yield time.perf_counter(), len(batch)


def prepared(what: str, paths: Paths, make: Callable[[Paths, Path], None]) -> Path:
    """A folder with the images in a format of a peer's own, made at the first call."""
    key = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"raypipe-benchmark-{what}-{key}"
    if not folder.exists():
        unfinished = Path(tempfile.mkdtemp(prefix="raypipe-benchmark-"))
        make(paths, unfinished)
        unfinished.rename(folder)
    return folder


def _tars(paths: Paths, folder: Path) -> None:
    count = 4 * cores_here()
    for at in range(count):
        with tarfile.open(folder / f"{at:04d}.tar", "w") as tar:
            for path in paths[at::count]:
                tar.add(path, os.path.basename(path))


def _of_tar(sample: dict[str, Any], folder: str | None) -> tuple[np.ndarray]:
    return (resized(sample["jpg"], f"{sample['__key__']}.jpg", folder),)


def webdataset(paths: Paths, folder: str | None) -> Iterator[Moment]:
    """WebDataset over tars of the files, a worker a core."""
    import webdataset as wds

    tars = sorted(map(str, prepared("tars", paths, _tars).iterdir()))
    samples = wds.WebDataset(tars, shardshuffle=False).map(partial(_of_tar, folder=folder))
    loader = wds.WebLoader(samples.batched(BATCH), batch_size=None, **_workers())
    for (images,) in loader:
        yield time.perf_counter(), len(images)


def _item(path: str) -> dict[str, Any]:
    return {"name": os.path.basename(path), "image": read(path)}


def chunks(paths: Paths, folder: Path) -> None:
    """Put the images into LitData's chunks."""
    from litdata import optimize

    optimize(_item, paths, str(folder), chunk_bytes="64MB", num_workers=cores_here(), verbose=False)


def of_chunk(item: dict[str, Any], folder: str | None) -> np.ndarray:
    """Do an image that LitData has read."""
    cv2.setNumThreads(1)
    return resized(item["image"], item["name"], folder)


def litdata(paths: Paths, folder: str | None) -> Iterator[Moment]:
    """LitData's StreamingDataLoader over its chunks of the files, a worker a core."""
    from litdata import StreamingDataLoader, StreamingDataset

    folder_of_chunks = prepared("chunks", paths, chunks)

    one = partial(of_chunk, folder=folder)
    loader = StreamingDataLoader(
        StreamingDataset(str(folder_of_chunks), transform=one), batch_size=BATCH, **_workers()
    )
    for batch in loader:
        yield time.perf_counter(), len(batch)


# --- Ray Data --------------------------------------------------------------------------------


def _resized(batch: dict) -> dict:
    cv2.setNumThreads(1)
    return {"image": np.stack([resize(image) for image in batch["image"]])}


def ray_data(paths: Paths, folder: str | None) -> Iterator[Moment]:
    """Ray Data as documented."""
    import ray

    dataset = ray.data.read_images(paths, mode="RGB").map_batches(_resized, batch_size=BATCH)
    if folder:
        begun = time.perf_counter()
        dataset.write_images(folder, column="image", file_format="jpeg")
        yield begun, len(paths)
        return
    for batch in dataset.iter_batches(batch_size=BATCH):
        yield time.perf_counter(), len(batch["image"])


class _Pool:
    """An actor that does it all, as a user would tune it."""

    def __init__(self, folder: str | None) -> None:
        cv2.setNumThreads(1)
        self._folder = folder

    def __call__(self, block: dict) -> dict:
        images = [
            resized(read(path), os.path.basename(path), self._folder) for path in block["path"]
        ]
        return {"written": np.ones(len(images))} if self._folder else {"image": np.stack(images)}


def ray_pool(paths: Paths, folder: str | None) -> Iterator[Moment]:
    """A tuned Ray Data pool: a table of paths, actors that do it all, an actor a core."""
    import pyarrow as pa
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    rows = 2 * BATCH
    blocks = [pa.table({"path": paths[at : at + rows]}) for at in range(0, len(paths), rows)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _Pool,
        fn_constructor_args=[folder],
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=cores_here()),
        num_cpus=1,
    )
    for batch in dataset.iter_batches(batch_size=rows):
        (column,) = batch.values()
        yield time.perf_counter(), len(column)


PEERS: dict[str, Contender] = {
    "plain-opencv": plain("opencv"),
    "plain-simplejpeg": plain("simplejpeg"),
    "plain-torchvision": plain("torchvision"),
    "dataloader": timed(dataloader),
    "webdataset": timed(webdataset),
    "litdata": timed(litdata),
    "ray-data": timed(ray_data),
    "ray-pool": timed(ray_pool),
}


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One contender, from command to end."""

    contender: tyro.conf.Positional[str]
    input: tyro.conf.Positional[str]
    """Folder of image files."""
    output: str | None = None
    """Write JPEG files here."""


def main() -> int:
    """Run one contender."""
    wanted = tyro.cli(Alone, description=__doc__)
    if wanted.output:
        shutil.rmtree(wanted.output, ignore_errors=True)
        os.makedirs(wanted.output)
    paths = sorted(str(path) for path in Path(wanted.input).iterdir())
    PEERS[wanted.contender](paths, wanted.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
