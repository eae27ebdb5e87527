"""Measure fused writing beside separate writers, and whether the model of both holds.

    # the grid: a slow store or none, both backends, small and large results; about 15 minutes
    python jobs/benchmarks/writing.py --input demo:4000
    # large results only, three rounds
    python jobs/benchmarks/writing.py --recipes coco-1200 --backends opencv --store-ms 0 --rounds 3

Of each cell a few images are timed first, as before any run, by a process on each core: in a run,
Ray's start keeps the other cores busy meanwhile. The planner gives both forms the actors that it
finds best. Then both run in turn. There are two predictions of each form: before any run, from the
timing; and from the run of the other form, as the report's line and `raypipe plan` give it. Rates
are those of the middle four fifths of the images, by when each file was written.
"""

import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ray
import tyro
from rich.console import Console
from rich.table import Table

from raypipe.insight import forms, planner
from raypipe.run import probe as probes
from raypipe.run.cluster.machine import cores_here
from raypipe.run.cluster.session import ray_here
from raypipe.run.cluster.sizing import stage_costs, start_s
from raypipe.run.preprocess import Settings, preprocessing, run
from raypipe.stages.stage import Stage
from raypipe.stages.stage import forms as pipelines_of

sys.path.insert(0, str(Path(__file__).parent))
from peers import kept_until_the_end, steady, written

FORMS = ("fused", "separate")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    input: str = "demo:4000"
    """Images of any number; runs take the first ones."""
    recipes: tuple[str, ...] = ("coco-300", "coco-1200")
    """Small and large results, written as JPEG."""
    backends: tuple[Literal["opencv", "torchvision"], ...] = ("opencv", "torchvision")
    """Libraries."""
    store_ms: tuple[float, ...] = (0.0, 5.0, 20.0)
    """Milliseconds to add to the writing of each image."""
    actors: int = 6
    """Room for so many, of both stages together."""
    seconds: float = 15.0
    """Work of each run, by the timing."""
    rounds: int = 1
    """Both forms once a round."""


@dataclass(kw_only=True)
class Cell:
    """One cell of the grid: what was expected of each form, and what its runs gave."""

    settings: Settings
    counts: dict[str, dict[str, int]]
    expected: dict[str, float]
    measured: dict[str, list[float]] = field(default_factory=lambda: {form: [] for form in FORMS})
    by_other: dict[str, list[float]] = field(default_factory=lambda: {form: [] for form in FORMS})
    memory: dict[str, list[float]] = field(default_factory=lambda: {form: [] for form in FORMS})

    def actors(self, form: str) -> str:
        return " + ".join(map(str, self.counts[form].values()))


def timed(settings: Settings, room: int) -> Cell:
    """Time a few images, and choose the actors of both forms."""
    pipelines = _pipelines(settings)
    job = preprocessing(settings)
    probe = probes.of(job.todo.left, pipelines["separate"], threads=1)
    with ExitStack() as running:
        started = (probes.started(replace(probe, token=str(core))) for core in range(cores_here()))
        process, *others = [running.enter_context(one) for one in started]
        for one in (process, *others):
            one.wait(120)  # longer than a run would
        steps = probes.finish(process)
    assert steps is not None
    machine = planner.Machine(cores=cores_here(), actors=room)
    counts, expected = {}, {}
    for form, stages in pipelines.items():
        costs = stage_costs(stages, steps)
        counts[form] = planner.best(costs, machine, images=4000, start_s=start_s(stages))
        expected[form] = planner.bound(planner.with_actors(costs, counts[form]), machine)[0]
    return Cell(settings=settings, counts=counts, expected=expected)


def _pipelines(settings: Settings) -> dict[str, tuple[Stage, ...]]:
    """The stages of both forms."""
    job = preprocessing(settings.changed(actors="auto", writers="auto"))
    return dict(zip(FORMS, pipelines_of(job.stages("benchmark")), strict=True))


def measure(cell: Cell, form: str, seconds: float, results: str) -> None:
    """Run one form into a new folder in `results`. Note its rate, and what it says of the other."""
    actors, *writers = cell.counts[form].values()
    given = cell.settings.changed(
        actors=actors,
        writers=writers[0] if writers else 0,
        limit=int(cell.expected[form] * seconds),
    )
    folder = tempfile.mkdtemp(dir=results)
    report = run(given.changed(output=folder), console=Console(quiet=True)).report
    assert report is not None and report["images_out"] == report["images_in"]
    rate = steady(written(folder))
    cell.measured[form].append(rate)
    private = sum(stage["private_peak_bytes"] or 0 for stage in report["stages"])
    cell.memory[form].append((private + (report["object_store_peak_bytes"] or 0)) / 1e6)
    other = next(name for name in FORMS if name != form)
    cell.by_other[other].append(_other(report, cell.counts[other], rate))


def _other(report: Mapping[str, Any], counts: Mapping[str, int], measured: float) -> float:
    """Images/s of the other form with `counts`, by the report of this one."""
    costs, machine = planner.of_report(report)
    found = forms.other(report)
    assert found is not None
    now, _ = planner.bound(costs, machine)
    there = replace(machine, actors=sum(counts.values()))
    return measured * planner.bound(planner.with_actors(found[1], counts), there)[0] / now


def shown(cells: list[Cell], console: Console) -> None:
    """Print the table, and how far predictions were off."""
    table = Table(
        "recipe",
        "backend",
        "store, ms",
        "form",
        "actors",
        "images/s",
        "from a timing",
        "from the other form",
        "memory, MB",
        title="images/s: measured, and predicted",
    )
    errors: dict[str, list[float]] = {"from a timing": [], "from the other form": []}
    for cell in cells:
        given = cell.settings
        for form in FORMS:
            rate = statistics.median(cell.measured[form])
            predicted = dict(
                zip(
                    errors,
                    (cell.expected[form], statistics.median(cell.by_other[form])),
                    strict=True,
                )
            )
            for name, value in predicted.items():
                errors[name].append(abs(value / rate - 1))
            table.add_row(
                given.stored.recipe,
                given.decoding.backend,
                f"{given.writing.store_ms:g}",
                form,
                cell.actors(form),
                f"{rate:.0f}",
                *(
                    f"{value:.0f} ({100 * (value / rate - 1):+.0f}%)"
                    for value in predicted.values()
                ),
                f"{max(cell.memory[form]):.0f}",
            )
    console.print(table)
    for name, found in errors.items():
        console.print(
            f"{name}: median error {100 * statistics.median(found):.0f}%, worst "
            f"{100 * max(found):.0f}%",
            highlight=False,
        )
    for cell in cells:
        pairs = zip(cell.measured["fused"], cell.measured["separate"], strict=True)
        ratios = [fused / separate for fused, separate in pairs]
        given = cell.settings
        console.print(
            f"{given.stored.recipe}, {given.decoding.backend}, {given.writing.store_ms:g} ms: "
            f"fused is {statistics.median(ratios):.2f} of separate "
            f"({min(ratios):.2f}-{max(ratios):.2f})",
            highlight=False,
        )


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    console = Console(width=140)
    ray_here(
        num_cpus=4 * wanted.actors,
        log_to_driver=False,
        logging_level="ERROR",
        include_dashboard=False,
    )
    cells = []
    grid = itertools.product(wanted.recipes, wanted.backends, wanted.store_ms)
    with kept_until_the_end() as results:
        for recipe, backend, store_ms in grid:
            settings = Settings.of(
                input=wanted.input,
                output=os.path.join(results, "timed"),
                recipe=recipe,
                backend=backend,
                store_ms=store_ms,
            )
            cells.append(cell := timed(settings, wanted.actors))
            for round_ in range(wanted.rounds):
                for form in FORMS if round_ % 2 == 0 else FORMS[::-1]:
                    measure(cell, form, wanted.seconds, results)
                    console.print(
                        f"round {round_ + 1} {recipe} {backend} {store_ms:g} ms, {form} "
                        f"{cell.actors(form)}: {cell.measured[form][-1]:.0f} images/s, "
                        f"{cell.expected[form]:.0f} expected",
                        highlight=False,
                    )
    shown(cells, console)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
