"""One measurement: the run of a point, and the row that it becomes. And where rows are kept."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console

from raypipe.data.formats.parquet import read_table
from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.errors import foreign
from raypipe.insight import planner
from raypipe.run import preprocess
from raypipe.sweep.curves import STAGES
from raypipe.sweep.grid import Point, preprocessing, training
from raypipe.sweep.settings import Settings

_OF_STAGE = (
    ("busy_s", "busy_s_per_image"),
    ("cpu_s", "cpu_s_per_image"),
    ("core_wait_s", "core_wait_s_per_image"),
    ("busy", "busy"),
    ("starved", "starved"),
    ("blocked", "blocked"),
    ("cpu_percent", "cpu_percent"),
)
"""Columns of each stage, and their keys in a report: seconds an image, shares of its actors' time,
percent of all cores."""

RESULTS = pa.schema(
    [
        # preprocess; fused: its actors write too, and each step has its costs; store and stored:
        # once to Parquet, and read back; train; ops: train, with the recipe's ops on the device
        ("kind", pa.string()),
        ("backend", pa.string()),
        ("actors", pa.int32()),
        ("writers", pa.int32()),
        ("workers", pa.int32()),
        ("device", pa.string()),  # that trains: cpu, gpu, or empty
        ("threads", pa.int32()),
        ("repeat", pa.int32()),
        ("images", pa.int64()),
        ("time_s", pa.float64()),  # from when all actors were ready to the last image
        ("images_per_s", pa.float64()),
        ("fixed_s", pa.float64()),  # before the first image and after the last, work not counted
        ("cpu_percent", pa.float64()),  # of all cores, in time_s
        ("gpu_percent", pa.float64()),
        *((f"{stage}_{name}", pa.float64()) for stage in STAGES for name, _ in _OF_STAGE),
        ("overhead_cpu_s", pa.float64()),  # of Ray itself, an image
        ("limit", pa.string()),  # a stage, or cores
        ("cores", pa.float64()),
        ("nodes", pa.int32()),
        ("at", pa.string()),  # ISO, UTC
        ("run_id", pa.string()),
    ]
)


def record(point: Point, report: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    """A report as a row of RESULTS. What was not measured is None.

    Args:
        kind: of the row: that of the point, or "store" for the first half of a "stored" one.
    """
    stages = _by_step({stage["name"]: stage for stage in report["stages"]})
    images = report["images_out"] + report["images_rejected"] - report["images_done_before"]
    try:
        _, limit = planner.bound(*planner.of_report(report))
    except ValueError:
        limit = ""
    of_stages = {
        f"{name}_{column}": stages[name].get(key) if name in stages else None
        for name in STAGES
        for column, key in _OF_STAGE
    }
    return {
        "kind": kind,
        "backend": point.backend,
        "actors": point.actors,
        "writers": 0 if kind == "stored" else point.writers,
        "workers": point.workers,
        "device": point.device,
        "threads": point.threads,
        "repeat": point.repeat,
        "images": images,
        "time_s": report["work_s"],
        "images_per_s": images / report["work_s"] if report["work_s"] else None,
        "fixed_s": report["fixed_s"],
        "cpu_percent": report["work_cpu_percent"],
        "gpu_percent": stages["train"]["gpu_percent"] if "train" in stages else None,
        **of_stages,
        "overhead_cpu_s": report["overhead_cpu_s_per_image"],
        "limit": limit,
        "cores": report["hardware"]["cores"],
        "nodes": report["hardware"]["nodes"],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": report["run_id"],
    }


def _by_step(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The stages of a report by name; of a fused one its steps, the first with all of its waiting.

    What Ray does in the actor between calls counts for the first too.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, stage in stages.items():
        if "+" not in name:
            found[name] = stage
            continue
        first, *others = stage["steps"]
        rest = {
            key: stage[key] - sum(step[key] for step in others)
            for key in ("busy_s_per_image", "cpu_s_per_image")
        }
        waiting = {key: stage[key] for key in ("starved", "blocked", "cpu_percent")}
        found |= {first["name"]: {**first, **rest, **waiting}}
        found |= {step["name"]: step for step in others}
    return found


class Failed(Exception):
    """A point lost images or rejected too many. The message is the run's own."""


def measure(point: Point, settings: Settings) -> list[dict[str, Any]]:
    """Do the run of a point and return its rows. What it wrote is deleted.

    Raises:
        Failed: it lost images, or rejected too many.
    """
    quiet = Console(quiet=True, force_terminal=False)
    place = settings.grid.root / f"{STATE}/point"
    scratch = str(place)
    place.delete_folder()

    def run(given: preprocess.Settings, kind: str) -> dict[str, Any]:
        outcome = preprocess.run(given, console=quiet)
        if failure := preprocess.verdict_on(outcome, given):
            raise Failed(f"{point}: {failure}")
        assert outcome.report is not None
        return record(point, outcome.report, kind=kind)

    try:
        if point.workers:
            # A sweep without training needs no torch, whose import takes 5 s of CPU.
            from raypipe.train import attempts
            from raypipe.train.result import verdict_on

            given = training(settings, point, storage=scratch)
            trained = attempts.run(given, console=quiet)
            if failure := verdict_on(trained, given):
                raise Failed(f"{point}: {failure}")
            assert trained.report is not None
            return [record(point, trained.report, kind=point.kind)]
        if point.kind == "stored":
            first = preprocessing(settings, point, output=scratch).changed(format="parquet")
            again = first.changed(input=scratch, output=None, annotations=None)
            return [run(first, "store"), run(again, "stored")]
        output = scratch if point.writers or point.kind == "fused" else None
        return [run(preprocessing(settings, point, output=output), point.kind)]
    finally:
        place.delete_folder()


def read_results(root: Location) -> list[dict[str, Any]]:
    """The rows of a sweep so far; none if it has none.

    Raises:
        UsageError: what is there is no table of results.
    """
    place = root / "results.parquet"
    try:
        data = place.read()
    except FileNotFoundError:
        return []
    what = f"the table of a sweep's results {place}"
    remedy = (
        "It is unknown what was measured. Remove it to measure again, or give another --output."
    )
    return _with_fixed(data, what, remedy).to_pylist()


def _with_fixed(data: bytes, what: str, remedy: str) -> pa.Table:
    """The table; one that was written before fixed costs were measured has none of them."""
    with foreign(what, remedy=remedy):
        names = pq.read_schema(pa.BufferReader(data)).names
    if "fixed_s" in names:
        return read_table(data, RESULTS, what, remedy=remedy)
    place = RESULTS.names.index("fixed_s")
    table = read_table(data, RESULTS.remove(place), what, remedy=remedy)
    return table.add_column(place, RESULTS.field(place), pa.nulls(len(table), pa.float64()))


def put_results(root: Location, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the rows of a sweep by `rows`, as Parquet and as CSV."""
    table = pa.Table.from_pylist(list(rows), schema=RESULTS)
    for name, put in (("results.parquet", pq.write_table), ("results.csv", pa.csv.write_csv)):
        sink = pa.BufferOutputStream()
        put(table, sink)
        root.write(name, memoryview(sink.getvalue()))


def is_of(row: Mapping[str, Any]) -> Point:
    """The point that a row was measured for."""
    kind = "stored" if row["kind"] == "store" else row["kind"]
    writers = row["actors"] if row["kind"] == "stored" else row["writers"]
    names = ("backend", "actors", "threads", "workers", "device", "repeat")
    return Point(kind=kind, writers=writers, **{name: row[name] for name in names})
