"""Measure how soon a run has its first output, and what CPU that costs, process by process.

    # raypipe beside a bare Ray Data pool; 3 minutes
    python jobs/benchmarks/startup.py
    # also the raypipe of another checkout; and writing
    python jobs/benchmarks/startup.py --checkouts ../before . --write --rounds 5

Each contender is a fresh process that starts a Ray of its own, once a round:
- bare: `ray.init()`, and a pool of two actors as in Ray Data's documentation. Each actor reads,
  decodes and resizes (and writes) the images of its blocks;
- raypipe with two actors: from the clone that this script is in, or from those of `--checkouts`.

The clock runs from the command to the first block of results; with `--write`, to the first block
that is on disk. CPU is of all processes that the command has started by then.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parents[2]

BARE = """
import sys

import cv2
import numpy as np
import pyarrow as pa
import ray

folder = sys.argv[1]

class Resize:
    def __init__(self):
        cv2.setNumThreads(1)

    def __call__(self, block):
        images = [cv2.resize(cv2.imread(path), (300, 300)) for path in block["path"]]
        if not folder:
            return {"image": np.stack(images)}
        for path, image in zip(block["path"], images):
            cv2.imwrite(folder + "/" + path.rpartition("/")[2], image)
        return {"written": [len(images)]}

ray.init()
paths = sys.stdin.read().split("\\n")
blocks = [pa.table({"path": paths[at : at + 64]}) for at in range(0, len(paths), 64)]
pool = ray.data.ActorPoolStrategy(size=2)
done = ray.data.from_arrow(blocks).map_batches(Resize, batch_size=None, compute=pool, num_cpus=1)
for block in done.iter_batches(batch_size=None):
    print("block", flush=True)
"""

RAYPIPE = """
import sys

import raypipe

def consume(block):
    print("block", flush=True)

first = sys.stdin.readline().strip()
raypipe.preprocess(
    input=first.rpartition("/")[0], recipe="coco-300", actors=2, shard_rows=64, consume=consume
)
"""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    rounds: int = 3
    """Every contender once a round."""
    images: int = 400
    """Generated photos, as JPEG files."""
    checkouts: tuple[str, ...] = (str(HERE),)
    """Clones whose raypipe is measured."""
    write: bool = False
    """Write JPEG files with `jobs/preprocess.py`, two actors and one writer."""


@dataclass(frozen=True)
class Start:
    """One start. `cpu`: seconds by kind of process until the first output; `whole`: to the end."""

    first_s: float
    cpu: dict[str, float]
    whole: float


def photos(count: int) -> list[str]:
    """Paths of generated photos."""
    sys.path.insert(0, str(HERE))
    from raypipe.data import demo

    folder = Path(tempfile.gettempdir()) / f"raypipe-benchmark-demo-{count}"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:06d}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        if not path.exists():
            path.write_bytes(demo.read(0, index))
    return [str(path) for path in paths]


KINDS = {
    "gcs_server": "GCS",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "multiprocessing": "dashboard",  # it starts its parts so
    "dashboard/agent.py": "dashboard agent",
    "runtime_env/agent": "runtime env agent",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime env agent",
    "log_monitor": "log monitor",
    "monitor.py": "monitor (autoscaler)",
    "raypipe.run.probe": "probe",
    "raypipe.run.cluster.forkserver": "fork server",
    "ray::_Auto": "autoscaling coordinator",
    "ray::_Stats": "stats actor",
    "ray::ActorLoc": "location tracker",
    "ray::Collector": "collector",
    "ray::IDLE": "workers that wait",
    "ray::Map": "actors of the pools",
}


def kind(command: str) -> str:
    """What a process is, by its command line."""
    return next((name for part, name in KINDS.items() if part in command), "others")


def cpu_of(root: psutil.Process, seen: dict[int, tuple[str, float]]) -> None:
    """Put the CPU seconds of `root` and all processes below it into `seen`."""
    for process in [root, *root.children(recursive=True)]:
        try:
            with process.oneshot():
                times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        name = "driver" if process.pid == root.pid else kind(command)
        if name == "others" and process.pid in seen:  # it is ending
            name = seen[process.pid][0]
        seen[process.pid] = name, times.user + times.system


def start(command: list[str], paths: list[str], folder: Path, where: str | None) -> Start:
    """Run `command`, which prints a line for each block, or writes files into folder/out."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    began = time.perf_counter()
    said = folder / "said"
    with said.open("w") as stdout:
        process = subprocess.Popen(
            command,
            cwd=where,
            env=keep | ({"PYTHONPATH": where} if where else {}),
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write("\n".join(paths))
    process.stdin.close()
    root, seen = psutil.Process(process.pid), dict[int, tuple[str, float]]()
    first_s, cpu, looked = 0.0, dict[str, float](), 0.0
    while process.poll() is None:
        there = not first_s and (
            said.stat().st_size > 0
            or any(folder.glob("out/*.jpg"))
            or any(folder.glob("out/_raypipe/journal/*.json"))
        )
        now = time.perf_counter()
        if there:
            first_s = now - began
        if there or now - looked > 0.3:
            looked = now
            try:
                cpu_of(root, seen)
            except psutil.Error:
                break
        if there:
            cpu = by_kind(seen)
        time.sleep(0.02)
    process.wait()
    return Start(first_s=first_s, cpu=cpu, whole=sum(by_kind(seen).values()))


def by_kind(seen: dict[int, tuple[str, float]]) -> dict[str, float]:
    """CPU seconds of each kind of process."""
    found: dict[str, float] = defaultdict(float)
    for name, seconds in seen.values():
        found[name] += seconds
    return dict(found)


def measure(name: str, wanted: Benchmark, paths: list[str]) -> Start:
    """One start of a contender: "bare", or the folder of a clone."""
    folder = Path(tempfile.mkdtemp(prefix="raypipe-benchmark-"))
    out = folder / "out"
    out.mkdir()
    try:
        if name == "bare":
            command = [sys.executable, "-c", BARE, str(out) if wanted.write else ""]
            return start(command, paths, folder, None)
        where = str(Path(name).resolve())
        command = [sys.executable, "-c", RAYPIPE]
        if wanted.write:
            command = [sys.executable, "jobs/preprocess.py", "--input", str(Path(paths[0]).parent)]
            command += ["--output", str(out), "--actors", "2", "--writers", "1"]
            command += ["--shard-rows", "64"]
        return start(command, paths, folder, where)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Measure and print."""
    wanted, console = tyro.cli(Benchmark, description=__doc__), Console()
    paths, names = photos(wanted.images), ["bare", *wanted.checkouts]
    results: dict[str, list[Start]] = {name: [] for name in names}
    for round_ in range(wanted.rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            one = measure(name, wanted, paths)
            results[name].append(one)
            console.print(
                f"round {round_ + 1} {name}: {one.first_s:.1f} s, {sum(one.cpu.values()):.1f} s of "
                f"CPU, {one.whole:.1f} to the end",
                highlight=False,
            )
    table = Table("", *names, title="medians")
    bare = [one.first_s for one in results["bare"]]

    def row(title: str, of, digits: int = 1) -> None:
        values = [statistics.median(of(name, at) for at in range(wanted.rounds)) for name in names]
        table.add_row(title, *(f"{value:.{digits}f}" if value else "-" for value in values))

    row("first output, s", lambda name, at: results[name][at].first_s)
    row("of bare", lambda name, at: results[name][at].first_s / bare[at], 2)
    row("CPU until then, s", lambda name, at: sum(results[name][at].cpu.values()))
    kinds = {kind: None for starts in results.values() for one in starts for kind in one.cpu}
    for kind_ in kinds:
        row(f"  {kind_}", lambda name, at, of=kind_: results[name][at].cpu.get(of, 0.0))
    row("CPU of the whole run, s", lambda name, at: results[name][at].whole)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
