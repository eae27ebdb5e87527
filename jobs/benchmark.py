"""What raypipe reaches of what this machine can do: side by side, interleaved, medians.

    python jobs/benchmark.py --input demo:4000                    # stream to a consumer, and write JPEG files; about 10 minutes
    python jobs/benchmark.py --input photos/ --rounds 5 --modes stream
    python jobs/benchmark.py --input demo:4000 --contenders plain-opencv raypipe-opencv

Contenders: as many plain processes as cores, each looping over its share with nothing delivered (the ceiling; they get the reused
buffers and the allocator setting that raypipe's actors get); PyTorch's DataLoader; Ray Data as its documentation does it (read_images,
map_batches, write_images); raypipe. All resize to 300x300 (bilinear) and deliver uint8 batches of 64 to one consumer, or write JPEG
files of quality 95. Ray runs before the clock starts. Steady is from the first batch to the last.
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
from raypipe.data.sources import list_images
from raypipe.run.pipeline import Settings, cores_here, run
from raypipe.stages.preprocess import keep_freed_memory, pixels

SIZE = 300
BATCH = 64
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]
CORES = cores_here()

Paths = list[str]
Clock = Iterator[tuple[float, int]]  # moments at which so many images were done, by time.perf_counter()


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
    """Paths of the images of `input`; demo images are copied out of their cache first, as the others read files."""
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


def load(path: str) -> np.ndarray:
    """The image file at `path`, decoded, (height, width, 3) RGB uint8."""
    with open(path, "rb") as file:
        image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None, path
    return image


def resize(image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """To SIZE x SIZE, bilinear."""
    return cv2.resize(image, (SIZE, SIZE), dst=out, interpolation=cv2.INTER_LINEAR)


def write(image: np.ndarray, path: str) -> None:
    """As a JPEG file."""
    with open(path, "wb") as file:
        file.write(cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), QUALITY)[1].tobytes())


def name_of(path: str, folder: str) -> str:
    """Where the result of `path` goes."""
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


def plain(backend: str) -> Callable[[Paths, str | None], Clock]:
    """Processes without any framework. Their clock runs from the first image, loading of libraries excepted."""

    def contender(paths: Paths, folder: str | None) -> Clock:
        context = multiprocessing.get_context("spawn")
        ready, done = context.Barrier(CORES), context.Queue()
        shares = [(backend, paths[i::CORES], folder, ready, done) for i in range(CORES)]
        processes = [context.Process(target=_plain_loop, args=share) for share in shares]
        for process in processes:
            process.start()
        results = [done.get() for _ in processes]
        for process in processes:
            process.join()
        yield min(begun for begun, _, _ in results), 0
        yield max(ended for _, ended, _ in results), sum(count for _, _, count in results)

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


def dataloader(paths: Paths, folder: str | None) -> Clock:
    """PyTorch's DataLoader over OpenCV, a worker a core."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(_Frames(paths, folder), batch_size=BATCH, num_workers=CORES, worker_init_fn=_one_thread)  # type: ignore[arg-type]
    for batch in loader:
        yield time.perf_counter(), len(batch)


def _resized(batch: dict) -> dict:
    cv2.setNumThreads(1)
    return {"image": np.stack([resize(image) for image in batch["image"]])}


def ray_data(paths: Paths, folder: str | None) -> Clock:
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
    """What a user would write into an actor pool at first."""

    def __init__(self) -> None:
        cv2.setNumThreads(1)

    def __call__(self, batch: dict) -> dict:
        return {"image": np.stack([resize(load(path)) for path in batch["path"]])}


def ray_actors(paths: Paths, folder: str | None) -> Clock:
    """A bare Ray Data actor pool over a table of paths: how fast Ray alone has a first block."""
    if folder:
        raise NotImplementedError("the bare pool only delivers")
    blocks = [pa.table({"path": paths[at : at + 2 * BATCH]}) for at in range(0, len(paths), 2 * BATCH)]
    pool = ray.data.ActorPoolStrategy(size=CORES)
    dataset = ray.data.from_arrow(blocks).map_batches(_Bare, batch_size=None, compute=pool, num_cpus=1)
    for batch in dataset.iter_batches(batch_size=BATCH):
        yield time.perf_counter(), len(batch["image"])


def raypipe(backend: Literal["opencv", "torchvision"]) -> Callable[[Paths, str | None], Clock]:
    """jobs/preprocess.py's own run."""

    def contender(paths: Paths, folder: str | None) -> Clock:
        moments: list[tuple[float, int]] = []

        def consume(block) -> None:
            batch = pixels(block)
            moments.extend((time.perf_counter(), len(batch[at : at + BATCH])) for at in range(0, len(batch), BATCH))

        begun = time.perf_counter()
        settings = Settings(
            input=os.path.commonpath([os.path.dirname(path) for path in paths]),
            limit=len(paths),
            output=folder,
            backend=backend,
            actors=CORES,
            writers=max(1, CORES // 2),
        )
        outcome = run(settings, consume=consume, console=Console(quiet=True))
        assert outcome.report is not None and outcome.report["images_out"] == len(paths), outcome.report
        if folder:
            moments = [(begun + outcome.report["setup_s"] + at, images) for at, images in outcome.outputs]
        yield from moments

    return contender


CONTENDERS: dict[str, Callable[[Paths, str | None], Clock]] = {
    "plain-opencv": plain("opencv"),
    "plain-torchvision": plain("torchvision"),
    "dataloader": dataloader,
    "ray-data": ray_data,
    "ray-actors": ray_actors,
    "raypipe-opencv": raypipe("opencv"),
    "raypipe-torchvision": raypipe("torchvision"),
}


@dataclass(frozen=True)
class Result:
    """Of one contender in one round."""

    steady: float  # images/s
    first_s: float
    memory: int  # bytes at most, of all processes of this one and Ray's object store, above what was there before


def measure(contender: Callable[[Paths, str | None], Clock], paths: Paths, folder: str | None) -> Result:
    """Run it once."""
    stop, peak = threading.Event(), [0]

    def used() -> int:
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return total

    def watch() -> None:
        while not stop.wait(1.0):
            peak[0] = max(peak[0], used())

    before = used()
    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    try:
        moments = list(contender(paths, folder))
    finally:
        stop.set()
        watcher.join()
    images = sum(count for _, count in moments[1:])
    return Result(images / (moments[-1][0] - moments[0][0]), moments[0][0] - begun, peak[0] - before)


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    paths = local_files(wanted.input)
    names = wanted.contenders or tuple(CONTENDERS)
    console = Console()
    ray.init(address="local", num_cpus=2 * CORES, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    results: dict[tuple[str, str], list[Result]] = {}
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
                console.print(f"round {round_ + 1} {mode} {name}: {result.steady:.0f} images/s", highlight=False)
    for mode in wanted.modes:
        table = Table(
            "contender", "images/s", "of plain-opencv", "min-max", "first, s", "memory, MB", title=f"{mode}, {len(paths)} images"
        )
        ceiling = [r.steady for r in results.get((mode, "plain-opencv"), [])]
        for name in (name for name in names if (mode, name) in results):
            rounds = results[mode, name]
            ratios = [r.steady / c for r, c in zip(rounds, ceiling, strict=False)]
            table.add_row(
                name,
                f"{statistics.median(r.steady for r in rounds):.0f}",
                f"{statistics.median(ratios):.2f}" if ratios else "-",
                f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-",
                f"{statistics.median(r.first_s for r in rounds):.1f}",
                f"{max(r.memory for r in rounds) / 1e6:.0f}",
            )
        console.print(table)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
