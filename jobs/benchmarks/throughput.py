"""Measure what raypipe reaches of what this machine can do: side by side, interleaved, medians.

    # stream to a consumer, and write JPEG files; about 20 minutes
    python jobs/benchmarks/throughput.py --input demo:4000
    # from the command to its end, start-up included
    python jobs/benchmarks/throughput.py --input demo:4000 --modes alone-write alone-stream
    # only these two, of your own photos, on two cores
    python jobs/benchmarks/throughput.py --input photos/ --rounds 5 --cores 2 \\
        --contenders plain-opencv raypipe-opencv

Contenders (peers.py):
- as many plain processes as cores, each looping over its share with nothing delivered. Those with
  OpenCV are the ceiling: they get the reused buffers and the allocator setting of raypipe's actors;
- PyTorch's DataLoader, WebDataset, LitData: a worker a core. WebDataset and LitData read the files
  from tars and chunks of their own, which are made before the clock starts;
- Ray Data as its documentation does it (read_images, map_batches, write_images), and as one tunes
  it: a table of paths, and a pool of actors that do it all;
- raypipe, an actor a core, which writes itself; and with a writer for two actors (only written).

All resize to 300x300 (bilinear). They deliver uint8 batches of 64 to one consumer, or write JPEG
files of quality 95. WebDataset and LitData need `pip install -e '.[benchmark]'`.

Modes stream and write: Ray runs before the clock starts. Images/s are those of the middle four
fifths of the images, by when each batch reached the consumer (in plain processes: was done) or each
file was written. So nobody's start or end counts.

Modes alone-stream and alone-write: each contender is a fresh process with all of its defaults. Time
and CPU are of the whole command, with all processes that it starts.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from raypipe.stages.preprocess import pixels

sys.path.insert(0, str(Path(__file__).parent))  # also in processes that import this file
from peers import (
    BATCH,
    PEERS,
    SIZE,
    Contender,
    Moment,
    Paths,
    Timing,
    kept_until_the_end,
    steady,
    written,
)
from startup import cpu_of

JOBS = Path(__file__).resolve().parents[1]

Mode = Literal["stream", "write", "alone-stream", "alone-write"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    input: str = "demo:4000"
    """Folder, glob or demo:COUNT of image files."""
    rounds: int = 3
    """Every contender once a round."""
    modes: tuple[Mode, ...] = ("stream", "write")
    """Batches to a consumer; JPEG files on disk; these from command to end."""
    contenders: tuple[str, ...] = ()
    """Only these; by default all."""
    cores: int | None = None
    """Pin everything to so many cores; by default to those that this process may use."""


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


def folder_of(paths: Paths) -> str:
    """The folder that holds all files."""
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def recipe() -> str:
    """The file of a recipe that does what the peers do. coco-300 resizes in float32, as MLPerf."""
    file = Path(tempfile.gettempdir()) / "raypipe-benchmark-recipe.json"
    ops = [{"op": "Resize", "height": SIZE, "width": SIZE}]
    file.write_text(json.dumps({"name": "benchmark", "ops": ops}))
    return str(file)


def raypipe(backend: Literal["opencv", "torchvision"], *, writers: int = 0) -> Contender:
    """The run of jobs/preprocess.py. Without `writers` the actors write themselves."""

    def contender(paths: Paths, folder: str | None) -> Timing:
        moments: list[Moment] = []

        def consume(block: pa.Table) -> None:
            batch = pixels(block)
            for at in range(0, len(batch), BATCH):
                assert batch[at : at + BATCH].shape[1:] == (SIZE, SIZE, 3)
            moments.append((time.perf_counter(), len(batch)))

        settings = Settings.of(
            input=folder_of(paths),
            recipe=recipe(),
            limit=len(paths),
            output=folder,
            backend=backend,
            actors=cores_here(),
            writers=writers,
        )
        consumed = None if folder else consume
        report = run(settings, consume=consumed, console=Console(quiet=True)).report
        assert report is not None and report["images_out"] == len(paths), report
        return Timing(moments, report["setup_s"] + report["first_output_s"])

    return contender


CONTENDERS: dict[str, Contender] = PEERS | {
    "raypipe-opencv": raypipe("opencv"),
    "raypipe-opencv-writers": raypipe("opencv", writers=max(1, cores_here() // 2)),
    "raypipe-torchvision": raypipe("torchvision"),
}
MEASURED_ONCE: dict[str, Mode] = {"raypipe-opencv-writers": "write"}
"""Contenders that differ from another in one mode only."""


@dataclass(frozen=True)
class Result:
    """One round of one contender. Seconds, bytes; None: not measured in this mode."""

    images_per_s: float
    first_s: float | None = None
    memory: int | None = None
    cpu_s_per_image: float | None = None


def measure(contender: Contender, paths: Paths, folder: str | None) -> Result:
    """Run `contender` once, with the most memory that this process, its children and Ray took."""
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
    moments = written(folder) if folder else timing.moments
    return Result(steady(moments), timing.first_s, peak[0] - before)


def command_of(name: str, paths: Paths, folder: str | None) -> list[str]:
    """The command that does all `paths` with one contender."""
    output = ["--output", folder] if folder else []
    library, _, backend = name.partition("-")
    if library == "raypipe":
        given = ["--input", folder_of(paths), "--backend", backend, "--recipe", recipe()]
        return [sys.executable, str(JOBS / "preprocess.py"), *given, *output]
    return [sys.executable, str(JOBS / "benchmarks/peers.py"), name, folder_of(paths), *output]


def alone(name: str, paths: Paths, folder: str | None) -> Result:
    """Run a contender as a process of its own."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    began = time.perf_counter()
    process = subprocess.Popen(
        command_of(name, paths, folder),
        env=outside,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    root, seen = psutil.Process(process.pid), dict[int, tuple[str, float]]()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            try:
                cpu_of(root, seen)
            except psutil.Error:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    took = time.perf_counter() - began
    ended.set()
    watcher.join()
    assert status == 0, f"{name} ended with {status}"
    cpu_s = sum(seconds for _, seconds in seen.values())
    return Result(len(paths) / took, cpu_s_per_image=cpu_s / len(paths))


def one_round(mode: Mode, name: str, paths: Paths, results: str) -> Result:
    """Measure one contender once. It writes into a new folder in `results`."""
    folder = tempfile.mkdtemp(dir=results) if mode.endswith("write") else None
    if mode.startswith("alone"):
        return alone(name, paths, folder)
    return measure(CONTENDERS[name], paths, folder)


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    if wanted.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: wanted.cores])
    paths = local_files(wanted.input)
    names = wanted.contenders or tuple(CONTENDERS)
    console = Console()
    if not all(mode.startswith("alone") for mode in wanted.modes):
        ray_here(
            num_cpus=2 * cores_here(),
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False,
        )
    results: dict[tuple[Mode, str], list[Result]] = {}
    with kept_until_the_end() as folder:
        for round_ in range(wanted.rounds):
            for mode in wanted.modes:
                for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                    if MEASURED_ONCE.get(name, mode) != mode:
                        continue
                    result = one_round(mode, name, paths, folder)
                    results.setdefault((mode, name), []).append(result)
                    console.print(
                        f"round {round_ + 1} {mode} {name}: {result.images_per_s:.0f} images/s",
                        highlight=False,
                    )
    for mode in wanted.modes:
        measured = {name: results[mode, name] for name in names if (mode, name) in results}
        console.print(table_of(f"{mode}, {len(paths)} images", measured))
    ray.shutdown()
    return 0


def table_of(title: str, results: dict[str, list[Result]]) -> Table:
    """Medians of all rounds, with ratios to the plain OpenCV processes of the same round."""
    table = Table(
        "contender",
        "images/s",
        "of plain-opencv",
        "min-max",
        "first, s",
        "memory, MB",
        "CPU, ms an image",
        title=title,
    )

    def middle(values: Sequence[float | None], scale: float, digits: int) -> str:
        known = [value for value in values if value is not None]
        return f"{scale * statistics.median(known):.{digits}f}" if known else "-"

    ceiling = [one.images_per_s for one in results.get("plain-opencv", [])]
    for name, rounds in results.items():
        ratios = [one.images_per_s / c for one, c in zip(rounds, ceiling, strict=False)]
        table.add_row(
            name,
            middle([one.images_per_s for one in rounds], 1, 0),
            middle(ratios, 1, 2),
            f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-",
            middle([one.first_s for one in rounds], 1, 1),
            middle([one.memory for one in rounds], 1e-6, 0),
            middle([one.cpu_s_per_image for one in rounds], 1000, 1),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
