"""Measure `--actors auto`: what it reaches, whether it follows a change, whether predictions hold.

    # beside static allocations found by search, and Ray Data's own autoscaler
    python jobs/benchmarks/scaling.py auto
    # images grow 40 times halfway: the rate 20 s later, beside the best static allocation's
    python jobs/benchmarks/scaling.py change
    # one run predicts 14 allocations, which are then run
    python jobs/benchmarks/scaling.py predict
    # throughput with meters, collector and steering, and without
    python jobs/benchmarks/scaling.py overhead

The stages mostly wait, so that any machine shows the effects. Waiting takes no core, so logical
CPUs may far outnumber the cores. Only the start of actors (about 1 s of CPU each) is the machine's
own. All times are whole executions, actors' start included, except where a table says otherwise.

`auto` is the case of ray-project/ray#65540: two stages of 0.17 s and 0.21 s a task, the second slow
to start. Ray Data's autoscaler is measured twice: as it is in Ray 2.60, where it starts as many
actors as the queue asks for, and as it was when that was reported, an actor at a time.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import cv2
import numpy as np
import ray
import tyro
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.table import Table

from raypipe import UsageError
from raypipe.data.work import shards
from raypipe.images import opencv
from raypipe.images.ops.geometry import Resize
from raypipe.images.ops.op import Op
from raypipe.images.recipe import Recipe
from raypipe.insight import planner
from raypipe.run.cluster.session import ray_here
from raypipe.run.dataset import dataset_of
from raypipe.run.live.collector import Facts, collecting
from raypipe.run.meter import Meter
from raypipe.run.preprocess import Settings, preprocessing, run, start
from raypipe.stages.actor import actor_class

TINY = Recipe(name="tiny", ops=(Resize(height=32, width=32, antialias=False),))


@dataclass(frozen=True, kw_only=True)
class Wait(Op):
    """An op that waits in proportion to the image's size, as a slow remote decoder would."""

    purpose = "neutral"
    ms_per_megapixel: float


@opencv.apply.register
def _(op: Wait, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    time.sleep(op.ms_per_megapixel * image.shape[0] * image.shape[1] / 1e9)
    return image


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    what: Annotated[Literal["auto", "change", "predict", "overhead"], tyro.conf.Positional]
    cpus: int = 20
    """Logical CPUs of the Ray that is started: as many actors may run."""
    tasks: int = 3000
    """Shards of one image each (auto); images (change, overhead); images of the run that predicts,
    and a fifth of them where stages wait (predict)."""
    slow_start_s: float = 0.0
    """Delay the start of every writer, as loading a model would (auto)."""
    rounds: int = 3
    """Rounds of every contender, interleaved (auto, overhead); of auto alone (change); of the
    stages that compute (predict)."""


def quiet() -> Console:
    return Console(quiet=True)


def waiting(settings: Settings, **changes: Any) -> Settings:
    """Settings with 0.17 s to preprocess a task and 0.21 s to write it."""
    return settings.changed(
        read_ms=170.0, store_ms=210.0, shard_rows=1, recipe=_file(TINY), **changes
    )


def _file(recipe: Recipe) -> str:
    from raypipe.images.recipe_json import to_json

    path = Path(tempfile.gettempdir()) / f"raypipe-benchmark-{recipe.name}.json"
    path.write_text(json.dumps(to_json(recipe)))
    return str(path)


def took(settings: Settings) -> dict[str, Any]:
    """Run into a temporary folder; return the report."""
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
        report = run(settings.changed(output=folder), console=quiet()).report
    assert report is not None and report["images_out"] == report["images_in"]
    return report


def autoscaled_by_ray_data(settings: Settings, cpus: int, *, one_by_one: bool) -> float:
    """Measure the same two stages under Ray Data's own autoscaler, in seconds.

    Args:
        one_by_one: as it was by default before ray-project/ray#66035.
    """
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
        job = preprocessing(settings.changed(output=folder))
        dataset = ray.data.from_arrow(list(shards(job.todo.work)))
        for stage in job.stages("benchmark"):
            meter = Meter(stage=stage.name, collector=None)
            dataset = dataset.map_batches(
                actor_class(stage),
                fn_constructor_kwargs={
                    "steps": stage.steps,
                    "threads": 1,
                    "gpu": False,
                    "meter": meter,
                },
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=1, max_size=cpus - 1),
                num_cpus=1,
            )
        if one_by_one:
            context = dataset.context
            context.autoscaling_config = replace(
                context.autoscaling_config, actor_pool_max_upscaling_delta=1
            )
        with mock.patch.dict(
            os.environ, RAY_DATA_ACTOR_AUTOSCALER="DEFAULT" if one_by_one else "BACKLOG_AWARE"
        ):  # the latter is the default
            begun = time.perf_counter()
            for _ in dataset.iter_batches(batch_size=None):
                pass
            return time.perf_counter() - begun


def auto(wanted: Benchmark, console: Console) -> None:
    """Compare seconds for the same work: static allocations, `auto`, Ray Data's autoscaler."""
    base = waiting(Settings.of(input=f"demo:{wanted.tasks}", actors=1, writers=1))
    half = round(wanted.cpus * 0.17 / 0.38)
    static = {(p, wanted.cpus - p) for p in (half - 1, half, half + 1)}

    def seconds_of(**counts: Any) -> Callable[[], float]:
        return lambda: took(base.changed(**counts))["wall_s"]

    contenders = {f"static {p} + {w}": seconds_of(actors=p, writers=w) for p, w in sorted(static)}
    contenders["raypipe auto"] = seconds_of(actors="auto", writers="auto")
    contenders["Ray Data's autoscaler"] = lambda: autoscaled_by_ray_data(
        base, wanted.cpus, one_by_one=False
    )
    contenders["the same, an actor at a time"] = lambda: autoscaled_by_ray_data(
        base, wanted.cpus, one_by_one=True
    )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(wanted.rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender())
            console.print(f"round {round_ + 1} {name}: {seconds[name][-1]:.1f} s", highlight=False)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(time for name, time in medians.items() if name.startswith("static"))
    table = Table(
        "contender",
        "s",
        "of the best static rate",
        title=f"{wanted.tasks} tasks of 0.17 + 0.21 s, {wanted.cpus} logical CPUs",
    )
    for name, median in medians.items():
        table.add_row(
            name,
            f"{median:.1f} ({min(seconds[name]):.1f}-{max(seconds[name]):.1f})",
            f"{best / median:.2f}",
        )
    console.print(table)


def change(wanted: Benchmark, console: Console) -> None:
    """Compare rates after images have grown 40 times halfway, in the next 20 s and later.

    The contenders are static allocations and auto, which starts with one for small images.
    """
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
        small, large = (
            cv2.imencode(".png", np.zeros((*size, 3), np.uint8))[1].tobytes()
            for size in ((480, 640), (3000, 4000))
        )
        half = wanted.tasks // 2
        for index, image in enumerate([small] * half + [large] * half):
            Path(folder, f"{index:06d}.png").write_bytes(image)
        from scaling import Wait as Imported  # so that actors find it by name

        recipe = _file(Recipe(name="growing", ops=(Imported(ms_per_megapixel=100.0), *TINY.ops)))
        base = Settings.of(input=folder, recipe=recipe, store_ms=20.0, shard_rows=2)
        static = {
            f"static {wanted.cpus - writers} + {writers}": base.changed(
                actors=wanted.cpus - writers, writers=writers
            )
            for writers in (1, 2, 3)
        }
        found = {}
        for name, settings in (
            static | {f"auto, round {round_ + 1}": base for round_ in range(wanted.rounds)}
        ).items():
            found[name] = _followed(settings, half)
            console.print(
                f"{name}: {found[name][0]:.1f}, then {found[name][1]:.1f} images/s", highlight=False
            )
    best = max(found[name][1] for name in static)
    table = Table(
        "contender",
        "to 20 s",
        "later",
        "of the best static",
        "changes",
        title="images/s after images have grown",
    )
    for name, (soon, later, events) in found.items():
        table.add_row(name, f"{soon:.1f}", f"{later:.1f}", f"{later / best:.2f}", events)
    console.print(table)


def _followed(settings: Settings, half: int) -> tuple[float, float, str]:
    """Run, and watch how the rate follows the growth of the images.

    Returns:
        Images/s in the 20 s after the first `half` images, images/s from then to the end, and the
        changes that the run made.
    """
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as output:
        run_ = start(settings.changed(output=output), console=quiet())
        points: list[tuple[float, int]] = []
        while not run_.done:
            with contextlib.suppress(UsageError):  # it ends between the two questions
                record = run_.live()
                points.append((record["at_s"], record["done"]))
            time.sleep(0.5)
        report = run_.wait().report or {}
    changed_at = next(at for at, done in points if done >= half)
    last_at = max(at for at, done in points if done < 2 * half)

    def rate(since: float, until: float) -> float:
        inside = [point for point in points if changed_at + since <= point[0] <= changed_at + until]
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    events = (
        f"{e['t_s'] - changed_at:+.0f} s {e['stage']} {e['from']} -> {e['to']}"
        for e in report["scale_events"]
    )
    return rate(0, 20), rate(20, last_at - changed_at), "; ".join(events)


def running_rate(report: dict[str, Any]) -> float:
    """Images/s written while all actors were there and had work; nan: the run was too short.

    It comes from the timeline, without the start and the end.
    """
    wanted = {stage["name"]: stage["actors"]["max"] for stage in report["stages"]}
    seconds: dict[float, dict[str, dict[str, Any]]] = {}
    for record in report["timeline"]:
        seconds.setdefault(record["t_s"], {})[record["stage"]] = record
    full = [
        all(name in s and s[name]["actors"] == n for name, n in wanted.items())
        for s in seconds.values()
    ]
    inside = [
        index
        for index, is_full in enumerate(full)
        if is_full and seconds[list(seconds)[index]]["preprocess"]["queued"]
    ]
    rates = [
        rate
        for index in inside[2:]
        if (rate := list(seconds.values())[index]["write"]["images_per_s"]) is not None
    ]
    return statistics.fmean(rates) if len(rates) >= 5 else math.nan


def predict(wanted: Benchmark, console: Console) -> None:
    """Predict the throughput of other allocations from one run, and run them."""
    waits = Settings.of(
        input="demo:20000", read_ms=60.0, store_ms=40.0, shard_rows=8, recipe=_file(TINY)
    )
    computes = Settings.of(input="demo:20000", shard_rows=64)
    grid: list[tuple[str, Settings, int, list[tuple[int, int]]]] = [
        ("computing", computes, wanted.rounds, [(1, 1), (1, 2), (2, 1), (2, 2)]),
        (
            "waiting",
            waits,
            1,
            [(2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (12, 8), (4, 8), (6, 3), (3, 6), (10, 6)],
        ),
    ]
    table = Table(
        "stages",
        "preprocess",
        "write",
        "predicted",
        "measured",
        "error",
        title="images/s once running, predicted from one run",
    )
    errors = []
    for kind, settings, rounds, allocations in grid:
        known = settings.changed(
            actors=2,
            writers=1,
            limit=wanted.tasks if kind == "computing" else wanted.tasks // 5,
        )
        seen: dict[tuple[int, int], list[tuple[float, float]]] = {
            allocation: [] for allocation in allocations
        }
        for _ in range(rounds):
            costs, machine = planner.of_report(took(known))
            for actors, writers in allocations:
                there = planner.outlook(
                    costs, machine, {"preprocess": actors, "write": writers}
                ).images_per_s
                # Images for 20 s, and for the start of actors: about 1.2 s each on two cores.
                images = int(there * (20 + 1.2 * (actors + writers)))
                rate = running_rate(
                    took(settings.changed(actors=actors, writers=writers, limit=images))
                )
                seen[actors, writers].append((there, rate))
                console.print(
                    f"{kind} {actors} + {writers}: predicted {there:.0f}, measured {rate:.0f}",
                    highlight=False,
                )
        for (actors, writers), pairs in seen.items():
            predicted, measured = (statistics.median(rates) for rates in zip(*pairs, strict=True))
            errors.append(abs(predicted / measured - 1))
            error = f"{100 * (predicted / measured - 1):+.0f}%"
            table.add_row(
                kind, str(actors), str(writers), f"{predicted:.0f}", f"{measured:.0f}", error
            )
    console.print(table)
    console.print(
        f"median error {100 * statistics.median(errors):.0f}%, worst {100 * max(errors):.0f}%",
        highlight=False,
    )


def overhead(wanted: Benchmark, console: Console) -> None:
    """Images/s from the first block to the last, with a collector and without."""
    job = preprocessing(Settings.of(input=f"demo:{wanted.tasks}"))

    def rate(collector: Any) -> float:
        stages = job.stages(f"overhead-{time.time()}")
        dataset = dataset_of(job.todo.work, stages, {"preprocess": 2}, collector=collector)
        moments = [
            (time.perf_counter(), len(block["image_id"]))
            for block in dataset.iter_batches(batch_size=None, prefetch_batches=0)
        ]
        return sum(count for _, count in moments[1:]) / (moments[-1][0] - moments[0][0])

    ratios = []
    for round_ in range(wanted.rounds):
        facts = Facts(images=wanted.tasks, auto=("preprocess",), at_most=2)
        with collecting(f"overhead-{round_}", facts) as collector:
            rates = (
                [rate(None), rate(collector)] if round_ % 2 else [rate(collector), rate(None)][::-1]
            )
        ratios.append(rates[1] / rates[0])
        console.print(
            f"round {round_ + 1}: {rates[0]:.0f} images/s without, {rates[1]:.0f} with: "
            f"{ratios[-1]:.3f}",
            highlight=False,
        )
    console.print(
        f"median {statistics.median(ratios):.3f} of the throughput without "
        f"({min(ratios):.3f}-{max(ratios):.3f})",
        highlight=False,
    )


def slow_writers(seconds: float) -> Callable[[], None]:
    """A set-up hook of Ray's processes that makes writers slow to start, for all contenders."""

    def patch() -> None:
        import functools
        import time

        from raypipe.stages.write import Writer

        begin = Writer.__init__

        @functools.wraps(begin)
        def slowly(self: Writer, *given: Any) -> None:
            time.sleep(seconds)
            begin(self, *given)

        Writer.__init__ = slowly  # type: ignore[method-assign, assignment]

    return patch


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    environment = (
        {"worker_process_setup_hook": slow_writers(wanted.slow_start_s)}
        if wanted.slow_start_s
        else None
    )
    ray_here(
        num_cpus=wanted.cpus,
        log_to_driver=False,
        logging_level="ERROR",
        include_dashboard=False,
        runtime_env=environment,
    )
    {"auto": auto, "change": change, "predict": predict, "overhead": overhead}[wanted.what](
        wanted, Console()
    )
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
