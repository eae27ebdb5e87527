"""Measure what raypipe reaches of what this machine can do: side by side, interleaved, medians.

    # stream to a consumer, and write JPEG files; about 10 minutes
    python jobs/benchmarks/throughput.py --input demo:4000
    # only streaming, of your own photos
    python jobs/benchmarks/throughput.py --input photos/ --rounds 5 --modes stream
    # only these two
    python jobs/benchmarks/throughput.py --input demo:4000 \\
        --contenders plain-opencv raypipe-opencv

Contenders:
- as many plain processes as cores, each looping over its share with nothing delivered. They are the
  ceiling: they get the reused buffers and the allocator setting that raypipe's actors get;
- PyTorch's DataLoader;
- Ray Data as its documentation does it (read_images, map_batches, write_images);
- raypipe.

All resize to 300x300 (bilinear). They deliver uint8 batches of 64 to one consumer, or write JPEG
files of quality 95. Ray runs before the clock starts.

Images/s are over the time from the first batch to the last, without the first batch. For raypipe
and the plain processes they are over all of the time from when they could begin, which is a little
harder on them.
"""

import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import psutil
import pyarrow as pa
import ray
import tyro
from rich.console import Console
from rich.table import Table

from raypipe.data import demo
from raypipe.data.listing import list_images
from raypipe.run.cluster.machine import cores_here
from raypipe.run.cluster.session import ray_here
from raypipe.run.preprocess import Settings, run
from raypipe.stages.actor import keep_freed_memory
from raypipe.stages.preprocess import pixels

SIZE = 300
BATCH = 64
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]
CORES = cores_here()

Paths = list[str]
Moments = Iterator[tuple[float, int]]  # at which so many images came out, by time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    input: str = "demo:4000"
    """Folder, glob or demo:COUNT of image files."""
    rounds: int = 3
    """Every contender once a round."""
    modes: tuple[Literal["stream", "write"], ...] = ("stream", "write")
    """Batches to a consumer; JPEG files on disk."""
    contenders: tuple[str, ...] = ()
    """Only these; by default all."""


def local_files(input: str) -> Paths:
    """Paths of the images of `input`. Demo images become files first, which all contenders read."""
    uris = list_images(input).column("uri").to_pylist()
    if not input.startswith("demo"):
        return uris
    folder = Path(tempfile.gettempdir()) / f"raypipe-benchmark-{input.replace(':', '-')}"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:06d}.jpg" for index in range(len(uris))]
    for index, path in enumerate(paths):
        if not path.exists():
            path.write_bytes(demo.read(0, index))
    return [str(path) for path in paths]


@dataclass(frozen=True)
class Timing:
    """What one contender reached in one round."""

    images_per_s: float
    first_s: float  # until the first batch; of plain processes, until they could begin


Contender = Callable[[Paths, str | None], Timing]


def timed(batches: Callable[[Paths, str | None], Moments]) -> Contender:
    """Make a contender of a function that yields when batches came out."""

    def contender(paths: Paths, folder: str | None) -> Timing:
        started = time.perf_counter()
        (first, _), *rest = batches(paths, folder)
        return Timing(sum(count for _, count in rest) / (rest[-1][0] - first), first - started)

    return contender


def load(path: str) -> np.ndarray:
    """Read and decode an image file: (height, width, 3) RGB uint8."""
    with open(path, "rb") as file:
        image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None, path
    return image


def resize(image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Resize to SIZE x SIZE, bilinear."""
    return cv2.resize(image, (SIZE, SIZE), dst=out, interpolation=cv2.INTER_LINEAR)


def write(image: np.ndarray, path: str) -> None:
    """Write a JPEG file."""
    with open(path, "wb") as file:
        file.write(
            cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), QUALITY)[1].tobytes()
        )


def name_of(path: str, folder: str) -> str:
    """The file for the result of `path`."""
    return os.path.join(folder, Path(path).stem + ".jpg")


def _plain_loop(backend: str, paths: Paths, folder: str | None, ready, done) -> None:
    keep_freed_memory()
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    if backend == "opencv":
        cv2.setNumThreads(1)

        def one(path: str) -> np.ndarray:
            return resize(load(path), out)
    else:
        import torch
        from PIL import Image
        from torchvision.transforms.v2 import functional

        torch.set_num_threads(1)

        def one(path: str) -> np.ndarray:
            image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
            small = functional.resize(image, [SIZE, SIZE], antialias=False)
            return small.permute(1, 2, 0).numpy()

    one(paths[0])
    ready.wait()
    begun = time.perf_counter()
    for path in paths:
        image = one(path)
        if folder:
            write(image, name_of(path, folder))
    done.put((begun, time.perf_counter(), len(paths)))


def plain(backend: str) -> Contender:
    """Processes without a framework. Their clock starts at the first image, libraries loaded."""

    def contender(paths: Paths, folder: str | None) -> Timing:
        started = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        ready, done = context.Barrier(CORES), context.Queue()
        shares = [(backend, paths[i::CORES], folder, ready, done) for i in range(CORES)]
        processes = [context.Process(target=_plain_loop, args=share) for share in shares]
        for process in processes:
            process.start()
        results = [done.get() for _ in processes]
        for process in processes:
            process.join()
        begun = min(begun for begun, _, _ in results)
        took = max(ended for _, ended, _ in results) - begun
        return Timing(sum(count for _, _, count in results) / took, begun - started)

    return contender


class _Frames:
    """A map-style dataset for the DataLoader."""

    def __init__(self, paths: Paths, folder: str | None):
        self._paths = paths
        self._folder = folder

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        image = resize(load(self._paths[index]))
        if self._folder:
            write(image, name_of(self._paths[index], self._folder))
        return image


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)


def dataloader(paths: Paths, folder: str | None) -> Moments:
    """PyTorch's DataLoader over OpenCV, a worker a core."""
    from torch.utils.data import DataLoader

    frames: Any = _Frames(paths, folder)
    loader: Any = DataLoader(
        frames, batch_size=BATCH, num_workers=CORES, worker_init_fn=_one_thread
    )
    for batch in loader:
        yield time.perf_counter(), len(batch)


def _resized(batch: dict) -> dict:
    cv2.setNumThreads(1)
    return {"image": np.stack([resize(image) for image in batch["image"]])}


def ray_data(paths: Paths, folder: str | None) -> Moments:
    """Ray Data as documented."""
    dataset = ray.data.read_images(paths, mode="RGB").map_batches(_resized, batch_size=BATCH)
    if folder:
        begun = time.perf_counter()
        dataset.write_images(folder, column="image", file_format="jpeg")
        yield begun, 0
        yield time.perf_counter(), len(paths)
        return
    for batch in dataset.iter_batches(batch_size=BATCH):
        yield time.perf_counter(), len(batch["image"])


class _Bare:
    """A first actor pool, as a user would write it."""

    def __init__(self) -> None:
        cv2.setNumThreads(1)

    def __call__(self, batch: dict) -> dict:
        return {"image": np.stack([resize(load(path)) for path in batch["path"]])}


def ray_actors(paths: Paths, folder: str | None) -> Moments:
    """A bare Ray Data actor pool over a table of paths: how soon Ray alone has a first block."""
    if folder:
        raise NotImplementedError("the bare pool only delivers")
    blocks = [
        pa.table({"path": paths[at : at + 2 * BATCH]}) for at in range(0, len(paths), 2 * BATCH)
    ]
    pool = ray.data.ActorPoolStrategy(size=CORES)
    dataset = ray.data.from_arrow(blocks).map_batches(
        _Bare, batch_size=None, compute=pool, num_cpus=1
    )
    for batch in dataset.iter_batches(batch_size=BATCH):
        yield time.perf_counter(), len(batch["image"])


def raypipe(backend: Literal["opencv", "torchvision"]) -> Contender:
    """The run of jobs/preprocess.py."""

    def consume(block: pa.Table) -> None:
        batch = pixels(block)
        for at in range(0, len(batch), BATCH):
            assert batch[at : at + BATCH].shape[1:] == (SIZE, SIZE, 3)

    def contender(paths: Paths, folder: str | None) -> Timing:
        settings = Settings.of(
            input=os.path.commonpath([os.path.dirname(path) for path in paths]),
            limit=len(paths),
            output=folder,
            backend=backend,
            actors=CORES,
            writers=max(1, CORES // 2),
        )
        report = run(settings, consume=consume, console=Console(quiet=True)).report
        assert report is not None and report["images_out"] == len(paths), report
        return Timing(report["steady_images_per_s"], report["setup_s"] + report["first_output_s"])

    return contender


CONTENDERS: dict[str, Contender] = {
    "plain-opencv": plain("opencv"),
    "plain-torchvision": plain("torchvision"),
    "dataloader": timed(dataloader),
    "ray-data": timed(ray_data),
    "ray-actors": timed(ray_actors),
    "raypipe-opencv": raypipe("opencv"),
    "raypipe-torchvision": raypipe("torchvision"),
}


def measure(contender: Contender, paths: Paths, folder: str | None) -> tuple[Timing, int]:
    """Run `contender` once.

    Returns:
        Its timing, and the most bytes that this process, its children and Ray's object store took
        above what they had before.
    """
    stop, peak = threading.Event(), [0]

    def used() -> int:
        # Not PSS: it walks every page, which took a tenth of the machine for Ray's 20 processes.
        total = shutil.disk_usage("/dev/shm").used
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                memory = process.memory_info()
                total += memory.rss - memory.shared
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return total

    def watch() -> None:
        while not stop.wait(1.0):
            peak[0] = max(peak[0], used())

    before = used()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        timing = contender(paths, folder)
    finally:
        stop.set()
        watcher.join()
    return timing, peak[0] - before


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    paths = local_files(wanted.input)
    names = wanted.contenders or tuple(CONTENDERS)
    console = Console()
    ray_here(
        num_cpus=2 * CORES, log_to_driver=False, logging_level="ERROR", include_dashboard=False
    )
    results: dict[tuple[str, str], list[tuple[Timing, int]]] = {}
    for round_ in range(wanted.rounds):
        for mode in wanted.modes:
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                if (mode, name) == ("write", "ray-actors"):
                    continue
                folder = tempfile.mkdtemp(prefix="raypipe-benchmark-") if mode == "write" else None
                try:
                    result = measure(CONTENDERS[name], paths, folder)
                finally:
                    shutil.rmtree(folder or "", ignore_errors=True)
                results.setdefault((mode, name), []).append(result)
                console.print(
                    f"round {round_ + 1} {mode} {name}: {result[0].images_per_s:.0f} images/s",
                    highlight=False,
                )
    for mode in wanted.modes:
        table = Table(
            "contender",
            "images/s",
            "of plain-opencv",
            "min-max",
            "first, s",
            "memory, MB",
            title=f"{mode}, {len(paths)} images",
        )
        ceiling = [timing.images_per_s for timing, _ in results.get((mode, "plain-opencv"), [])]
        for name in (name for name in names if (mode, name) in results):
            rounds = results[mode, name]
            ratios = [
                timing.images_per_s / c for (timing, _), c in zip(rounds, ceiling, strict=False)
            ]
            table.add_row(
                name,
                f"{statistics.median(timing.images_per_s for timing, _ in rounds):.0f}",
                f"{statistics.median(ratios):.2f}" if ratios else "-",
                f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-",
                f"{statistics.median(timing.first_s for timing, _ in rounds):.1f}",
                f"{max(memory for _, memory in rounds) / 1e6:.0f}",
            )
        console.print(table)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
