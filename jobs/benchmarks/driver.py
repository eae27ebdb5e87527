"""Measure what one driver can do: shards a second that it schedules, and memory a row.

    # shards a second, with 256 rows each; about a minute
    python jobs/benchmarks/driver.py
    # a million files: listing, work, and a run over all of them; about 10 minutes and 4 GB of disk
    python jobs/benchmarks/driver.py --files 1000000

The stage does nothing: no image is read or decoded, and each shard comes out as one small row. So
the time is Ray's and the driver's alone. Images/s that a driver can feed are its shards/s times the
rows of a shard; cores that it can feed are shards/s times the seconds of a core that a shard takes.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass

import psutil
import pyarrow as pa
import ray
import tyro
from rich.console import Console

from raypipe.data import journal
from raypipe.data.listing import list_images
from raypipe.data.location import Location
from raypipe.data.tables import DONE, SOURCE
from raypipe.data.work import MAX_SHARD_ROWS, make_work, shards
from raypipe.run.cluster.machine import cores_here
from raypipe.run.cluster.session import ray_here
from raypipe.run.dataset import dataset_of, together
from raypipe.run.result import became
from raypipe.stages.stage import Done, Stage

CORE_S = 0.0023
"""CPU seconds of an image in one core: a frame of 640x480 to 300x300, written as JPEG."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    shards: int = 4000
    """Shards, where no files are asked for."""
    rows: int = MAX_SHARD_ROWS
    """Rows of a shard."""
    actors: int = 2
    """Actors that do nothing."""
    files: int = 0
    """Make so many empty files, list them, and do nothing with each; 0: rows without files."""


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """The step: a shard comes out as its counts (schema DONE), untouched."""

    name = "nothing"
    libraries = "opencv"
    memory = 0
    wait_ms = 0.0

    def begin(self, *, threads: int, gpu: bool) -> "Nothing":
        return self

    gpu = None

    def __call__(self, block: pa.Table) -> Done:
        counts = (block.column("shard")[0].as_py(), block.num_rows, 0, 0)
        made = {name: [count] for name, count in zip(DONE.names, counts, strict=True)}
        return Done(
            block=pa.table(made, schema=DONE), images=block.num_rows, bytes_in=0, bytes_out=0
        )


def listed(count: int, folder: str, console: Console) -> pa.Table:
    """Rows of so many empty files (schema SOURCE)."""
    began = time.perf_counter()
    for index in range(count):
        if index % 1000 == 0:
            os.makedirs(f"{folder}/{index // 1000:04d}", exist_ok=True)
        os.close(os.open(f"{folder}/{index // 1000:04d}/{index:08d}.jpg", os.O_CREAT | os.O_WRONLY))
    console.print(f"{count} empty files made in {time.perf_counter() - began:.0f} s")
    return list_images(folder)


def made_up(count: int) -> pa.Table:
    """Rows without files (schema SOURCE)."""
    names = [f"{index // 1000:04d}/{index:08d}" for index in range(count)]
    columns = {
        "image_id": [f"{name}.jpg" for name in names],
        "name": names,
        "uri": [f"/nowhere/photos/{name}.jpg" for name in names],
        "offset": pa.array([0] * count, pa.int64()),
        "length": pa.array([-1] * count, pa.int64()),
    }
    for field in SOURCE:
        if field.name not in columns:
            nested = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
            columns[field.name] = pa.array([[] if nested else None] * count, field.type)
    return pa.table(columns).select(SOURCE.names).cast(SOURCE)


class Memory:
    """Resident memory of this process that is not shared, and what rows add to it."""

    def __init__(self, rows: int, console: Console) -> None:
        self._process, self._rows, self._console = psutil.Process(), rows, console
        self._before = self._now()

    def _now(self) -> int:
        used = self._process.memory_info()
        return used.rss - used.shared

    def told(self, what: str) -> None:
        """Print what there is more than at the start."""
        more = self._now() - self._before
        self._console.print(
            f"{what}: {more / 1e6:.0f} MB more, {more / self._rows:.0f} bytes a row"
        )


def accounted(work: pa.Table, root: Location, memory: Memory, console: Console) -> None:
    """Make a journal in which all rows of `work` are written, and read it as the end of a run."""
    for shard in shards(work):
        written = [
            journal.Written(image_id=image_id, file=f"{name}.jpg", height=300, width=300)
            for image_id, name in zip(
                shard.column("image_id").to_pylist(), shard.column("name").to_pylist(), strict=True
            )
        ]
        files = [one.file for one in written]
        number = shard.column("shard")[0].as_py()
        entry = journal.Entry(
            epoch=0, shard=number, written=written, rejected=[], files=files, bytes=0
        )
        journal.put_entry(root, entry)
    began = time.perf_counter()
    found = became(root, work)
    assert len(found.written) == work.num_rows
    console.print(f"the journal was read in {time.perf_counter() - began:.0f} s")
    memory.told("with the journal of all rows")


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    console = Console(width=140, highlight=False)
    count = wanted.files or wanted.shards * wanted.rows
    memory = Memory(count, console)
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
        began = time.perf_counter()
        source = listed(count, folder, console) if wanted.files else made_up(count)
        console.print(f"{count} rows after {time.perf_counter() - began:.0f} s")
        memory.told("listed")
        work = make_work(source, rows_per_shard=wanted.rows)
        del source
        memory.told("cut into shards")
        ray_here(
            num_cpus=wanted.actors,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False,
        )
        memory.told("with Ray")
        run(work, wanted, memory, console)
        ray.shutdown()
        accounted(work, Location.of(f"{folder}/out"), memory, console)
        if wanted.files:
            console.print("deleting the files ...")
    return 0


def run(work: pa.Table, wanted: Benchmark, memory: Memory, console: Console) -> None:
    """Pass all shards through actors that do nothing, and print the rates."""
    stage = Stage(
        steps=(Nothing(),),
        actors=wanted.actors,
        noun="actors",
        option="actors",
        doing="doing nothing",
        in_flight=4,
    )
    done = rows = 0
    cpu = time.process_time()
    first: float | None = None
    with together():
        blocks = dataset_of(work, (stage,), {stage.name: wanted.actors}).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        for block in blocks:
            first = first or time.perf_counter()
            done += block.num_rows
            rows += sum(block.column("images").to_pylist())
    took = time.perf_counter() - (first or 0.0)
    memory.told("at the end of the run")
    assert rows == work.num_rows, (rows, work.num_rows)
    rate = done / took
    console.print(
        f"{done} shards of {wanted.rows} rows by {wanted.actors} actors on {cores_here()} cores: "
        f"{rate:.0f} shards/s, {1000 * (time.process_time() - cpu) / done:.1f} ms of the "
        f"driver's CPU each; {rate * wanted.rows:.0f} rows/s\n"
        f"at {1000 * CORE_S:.1f} ms of a core an image this feeds "
        f"{rate * wanted.rows * CORE_S:.0f} cores"
    )


if __name__ == "__main__":
    sys.exit(main())
