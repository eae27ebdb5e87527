"""A sweep: the talk's measurements, one run a point, all on one Ray.

    DIR/results.parquet, results.csv   a row a measurement (schema RESULTS), written after each
    DIR/sweep.html                     the talk's claims, judged by them, with their figures
    DIR/_raypipe/run.json              the settings that all rows share: another command into DIR
                                       must agree with them

The same command goes on where it was, and ends with a table and a page. A point's run begins when
all its actors are ready: what is measured is work, not the start of processes.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from raypipe import UsageError
from raypipe.data import lease, outputs
from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.data.reader import Reader
from raypipe.images.recipe import check_backend
from raypipe.run import preprocess
from raypipe.run.causes import Untouched
from raypipe.run.cluster.machine import Session, cores_here, processor, versions
from raypipe.run.cluster.session import forking, joins, output_is_there, ray_session
from raypipe.run.console import attempt, ended, goes_on, say
from raypipe.run.dataset import together
from raypipe.run.settings import check_apart, parse
from raypipe.sweep import page
from raypipe.sweep.claims import Finding, findings, too_short
from raypipe.sweep.curves import Record, Where
from raypipe.sweep.grid import Point, check, fits, grid, largest, preprocessing, training
from raypipe.sweep.measure import Failed, is_of, measure, put_results, read_results
from raypipe.sweep.remaining import Remaining
from raypipe.sweep.settings import Settings

_CLEARING = "clearing-sweep"
"""Marks that a sweep's results are being deleted. Other jobs' results have a mark of their own."""

RESULT_FILES = ("results.parquet", "results.csv", "sweep.html")


@dataclass(frozen=True, kw_only=True)
class Swept:
    """How a sweep ended: what became of the claims, and which point failed, if one did.

    `warning`: what disturbed the measurements, and cells that are too short to decide.
    """

    findings: list[Finding]
    warning: str = ""
    failure: str | None = None


# --- what is in --output ------------------------------------------------------------------------


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that all rows of an output directory share, with the machine and the versions.

    As JSON types.
    """
    return {
        **settings.decided(),
        "shard_rows": settings.rows,
        "machine": {"processor": processor(), "cores": cores_here()},
        "versions": versions(),
    }


def clear(root: Location) -> None:
    """Delete what a sweep has left in `root`."""
    with outputs.clearing(root, _CLEARING):
        for name in RESULT_FILES:
            (root / name).delete()
        (root / f"{STATE}/training").delete_folder()
        (root / f"{STATE}/point").delete_folder()
        (root / f"{STATE}/run.json").delete()


def _parts(settings: Settings) -> dict[Location, dict[str, Any]]:
    """What decides the rows, by where it is noted."""
    root = settings.grid.root
    parts = {root: deciding(settings)}
    if settings.training.train:
        parts[root / f"{STATE}/training"] = settings.training.decided()
    return parts


def look(settings: Settings) -> tuple[list[dict[str, Any]], bool]:
    """The rows that were measured with the same settings, and whether the output is to be cleared.

    It changes nothing.

    Raises:
        UsageError: the output has rows of other settings, files that are no sweep's, or another
            driver.
    """
    root = settings.grid.root
    lease.check(root, option="--output")
    interrupted = outputs.is_clearing(root, _CLEARING)
    clears = not settings.grid.resume or interrupted
    damaged, made = False, None
    try:
        made = outputs.read_made(root)
    except UsageError:
        if not clears:
            raise
        damaged = True
    if made is not None and not {"machine", "shard_rows"} <= made.settings.keys():
        raise UsageError(
            f"--output {str(root)!r} has the results of another job ({STATE}/run.json). Nothing "
            "was measured. Give an --output of its own."
        )
    taken = [name for name in RESULT_FILES if (root / name).exists()]
    if taken and made is None and not (interrupted or damaged):
        raise UsageError(
            f"{root / taken[0]} exists and is no result of an earlier sweep: it "
            "would be overwritten. Nothing was measured. Give an --output without it."
        )
    if clears:
        return [], True
    there = {
        place: outputs.check_settings(place, wanted) for place, wanted in _parts(settings).items()
    }
    return (read_results(root) if there[root] else []), False


def claim(settings: Settings, *, clears: bool) -> None:
    """Delete what is there, where that was asked for, and note what decides the rows."""
    if clears:
        clear(settings.grid.root)
    for place, wanted in _parts(settings).items():
        if outputs.read_made(place) is None:
            outputs.put_made(place, outputs.Made(settings=wanted, versions=versions()))


def leave(
    settings: Settings,
    rows: Sequence[Record],
    *,
    gpus: int,
    command: str,
    left_out: Sequence[str] = (),
) -> list[Finding]:
    """Write the table and the page of what was measured so far."""
    where = Where(
        cores=rows[0]["cores"],
        gpus=gpus,
        read_ms=settings.cells.read_ms,
        store_ms=settings.cells.store_ms,
    )
    days = sorted({row["at"][:10] for row in rows})
    about = {
        "command": command,
        "date": " to ".join(dict.fromkeys((days[0], days[-1]))),
        "settings": settings.flat | {"shard_rows": settings.rows},
        "versions": versions(),
        "hardware": {
            "cores": where.cores,
            "nodes": rows[0]["nodes"],
            "memory_bytes": psutil.virtual_memory().total,
            "processor": processor(),
            "gpus": gpus,
            **({"no_memory_for": list(left_out)} if left_out else {}),
        },
    }
    put_results(settings.grid.root, rows)
    settings.grid.root.write("sweep.html", page.page(rows, where, about).encode())
    return findings(rows, where)


# --- the sweep ----------------------------------------------------------------------------------


def sweep(
    arguments: list[str] | None = None,
    *,
    description: str | None = None,
    prog: str | None = None,
) -> int:
    """Measure here what the talk measured, and judge its claims."""
    console = Console(stderr=True)
    settings = parse(Settings, arguments, description=description or sweep.__doc__, prog=prog)
    kept = f"What is measured is in {settings.grid.output}."
    again = goes_on(resume=settings.grid.resume)
    swept = attempt(lambda: run(settings, console=console), kept=kept, again=again, console=console)
    if isinstance(swept, int):
        return swept
    if swept.findings:
        Console().print(page.terminal(swept.findings))
        if swept.warning:
            console.print(swept.warning, style="yellow", markup=False, highlight=False)
        say(console, f"page: {settings.grid.output}/sweep.html")
    return ended(swept.failure and f"{swept.failure}\n{kept} {again}", console=console)


def run(settings: Settings, *, console: Console) -> Swept:
    """Measure what is not measured yet, and write the table and the page, also where it breaks off.

    Raises:
        UsageError: the message is for the user; nothing was measured.
        KeyboardInterrupt: what was measured is kept, and the same settings go on.
    """
    check(settings)
    joined = joins()
    output = settings.grid.output
    most = preprocessing(settings, largest(settings, joined=joined), output=output)
    check_apart(output, settings.source.input)
    job = preprocess.preprocessing(most.changed(output=None))
    for backend in settings.grid.backends:
        check_backend(job.todo.recipe, backend)
    beside = _trains_on_cpus(settings) if settings.training.train else 0
    rows, clears = look(settings)
    console.print("Starting Ray ...", highlight=False)
    then = preprocess.writing(most, job.todo)
    stages = (*job.stages("sweep"), *([then] if then else []))
    tell = partial(console.print, markup=False, highlight=False)
    with contextlib.ExitStack() as stack:
        forks = stack.enter_context(forking(stages))
        session = stack.enter_context(
            ray_session(stages, beside=beside, trains=settings.training.train, forks=forks)
        )
        # The rest of Ray starts before the first measurement, not within it.
        output_is_there()
        stack.enter_context(together())
        if joined:
            _check_room(settings, session)
        held = stack.enter_context(
            lease.hold(settings.grid.root, run_id="sweep", option="--output", tell=tell)
        )
        if not clears:
            rows = read_results(settings.grid.root)  # another sweep may have measured meanwhile
        claim(settings, clears=clears)
        points, left_out = _points(settings, session, joined=joined, tell=tell)
        # Once before, so that no point is the one that reads from a cold disk.
        for _ in Reader(threads=8).read(job.todo.work):
            pass
        failure = None
        found: list[Finding] = []
        try:
            _measure_all(settings, points, rows, session, console=console, check=held.check)
        except Failed as error:
            failure = str(error)
        except Untouched as error:  # of the run of one point: the sweep has rows all the same
            raise KeyboardInterrupt from error
        finally:
            command = shlex.join(["python", *sys.argv])
            if rows:
                gpus = session.gpus
                found = leave(settings, rows, gpus=gpus, command=command, left_out=left_out)
    warnings = (page.disturbed(rows, Where(cores=session.cores)), too_short(rows))
    return Swept(findings=found, warning=" ".join(filter(None, warnings)), failure=failure)


def _trains_on_cpus(settings: Settings) -> int:
    """How many training workers need a CPU beside the pools: none where there is a GPU.

    Raises:
        UsageError: these settings cannot be trained with.
    """
    # A sweep without training needs no torch, whose import takes 5 s of CPU.
    import torch

    from raypipe.train.plan import plan

    first = Point(kind="train", backend="opencv", actors=1, threads=1, workers=1)
    plan(training(settings, first, storage=settings.grid.output))
    return 0 if torch.cuda.is_available() else max(settings.training.workers or (2,))


def _points(
    settings: Settings, session: Session, *, joined: bool, tell: Callable[[str], None]
) -> tuple[list[Point], list[str]]:
    """The points of the grid, and those that are left out because they do not fit into memory."""
    points = grid(settings, cores=session.cores, gpus=session.gpus)
    if joined:
        return points, []
    left_out = [str(point) for point in points if not point.repeat and not fits(point)]
    if left_out:
        tell(f"Left out for want of memory: {'; '.join(left_out)}.")
    return [point for point in points if fits(point)], left_out


def _measure_all(
    settings: Settings,
    points: Sequence[Point],
    rows: list[dict[str, Any]],
    session: Session,
    *,
    console: Console,
    check: Callable[[], None],
) -> None:
    """Measure the points that have no row yet; `rows` grows, and the table with it.

    Args:
        check: raises once the output is no longer held.
    """
    remaining = Remaining(session.cores)
    done = {is_of(row) for row in rows}
    for point in done:
        remaining.add(point, [row for row in rows if is_of(row) == point])
    left = [point for point in points if point not in done]
    if len(left) < len(points):
        said = f"{len(points) - len(left)} of {len(points)} points are measured already."
        console.print(said, highlight=False)
    with _progress(console, len(left)) as show:
        for place, point in enumerate(left, start=1):
            check()
            begun = time.perf_counter()
            fresh = measure(point, settings)
            rows += fresh
            put_results(settings.grid.root, rows)
            remaining.add(point, fresh, time.perf_counter() - begun)
            show(point, fresh[-1], remaining.seconds(left[place:]) or 0.0)


def _check_room(settings: Settings, session: Session) -> None:
    most = largest(settings, joined=True)
    if most.actors + most.writers > session.at_most:
        raise UsageError(
            f"The largest point has {most.actors} actors and {most.writers} writers, but the "
            f"cluster has {session.at_most} CPUs, one each. Nothing was measured. Give smaller "
            "--actors, or add nodes first."
        )


Show = Callable[[Point, Record, float], None]
"""Show a point that was measured, its row, and the seconds that are left."""


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Show]:
    """A line for each point with the time left; in a terminal with a bar below."""
    columns = (
        TextColumn("points"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("points", total=total, left="")
        done = 0

        def show(point: Point, row: Record, left_s: float) -> None:
            nonlocal done
            done += 1
            left = f"{left_s / 60:.0f} min left" if left_s >= 60 else f"{left_s:.0f} s left"
            progress.update(task, completed=done, left=left)
            took = "no time known"
            if row["time_s"] is not None:
                took = f"{row['time_s']:.2f} s, {row['images_per_s']:.0f} images/s"
            cpu = "" if row["cpu_percent"] is None else f", CPU {row['cpu_percent']:.0f}%"
            console.print(
                f"{done}/{total} {point}: {took}{cpu}{'' if console.is_terminal else f'; {left}'}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

        yield show
