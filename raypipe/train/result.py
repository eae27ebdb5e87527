"""What a training leaves at its end: the report, and what became of every row."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from raypipe.data.journal import Dropped, Rejected
from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.insight import planner
from raypipe.insight import report as reports
from raypipe.insight.states import PoolView, Snapshot
from raypipe.models.checkpoint import Progress
from raypipe.run import result
from raypipe.run.cluster.machine import versions
from raypipe.run.execution import Execution, Measured
from raypipe.train.following import Watch
from raypipe.train.plan import Todo
from raypipe.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended.

    report: None if there was nothing left to do.
    checkpoint: folder of the last one.
    """

    report: dict[str, Any] | None
    progress: Progress
    rows: int
    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a training is judged on.

    blocks: of schema BLOCK.
    rejected: number of their rows that have no pixels.
    dropped: boxes that cannot be used (journal.Dropped, as dicts).
    """

    blocks: Sequence[ray.ObjectRef] = ()
    rejected: int = 0
    dropped: Sequence[dict[str, Any]] = ()


def is_complete(progress: Progress, settings: Settings) -> bool:
    """Whether all epochs are done."""
    return progress.epoch == settings.learning.epochs


def report_of(
    settings: Settings,
    todo: Todo,
    execution: Execution,
    measured: Measured,
    progress: Progress,
    watch: Watch,
    held: HeldOut,
) -> dict[str, Any]:
    """Make report.json of a training that has ended."""
    workers = [worker for attempt in watch.workers for worker in attempt]
    spent = {
        what: sum(worker[what] for worker in workers)
        for what in ("wait", "step", "evaluate", "checkpoint", "wall")
    }
    count = settings.training.workers
    snapshot = _with_workers(measured.snapshot, spent, count)
    report = execution.report(
        replace(measured, snapshot=snapshot),
        _counts(todo, progress, before=watch.before[0]),
        outputs=watch.outputs,
        ready_s=watch.began and watch.began - execution.begun_at,
    )
    wall_s = spent["wall"]
    report["train"] = {
        "epochs": progress.epochs,
        "steps": progress.step,
        "map": progress.epochs[-1]["map"] if progress.epochs else None,
        "holdout_rejected": held.rejected,
        "attempts": len(watch.workers),
        "workers": workers,
        "accelerator_utilisation": spent["step"] / wall_s if wall_s else None,
        "wait_share": spent["wait"] / wall_s if wall_s else None,
        "break_even": _break_even(report, execution.costs or [], todo),
    }
    return report


def report_without_figures(
    settings: Settings, todo: Todo, progress: Progress, *, run_id: str
) -> dict[str, Any]:
    """Make report.json of a training whose figures were lost with its driver."""
    report = reports.unmeasured(
        run_id=run_id,
        settings=settings.flat,
        versions=versions(),
        counts=_counts(todo, progress, before=todo.epochs.total),
    )
    unknown = (
        "attempts",
        "workers",
        "accelerator_utilisation",
        "wait_share",
        "break_even",
        "holdout_rejected",
    )
    report["train"] = dict.fromkeys(unknown) | {
        "epochs": progress.epochs,
        "steps": progress.step,
        "map": progress.epochs[-1]["map"] if progress.epochs else None,
    }
    return report


def leave(settings: Settings, report: dict[str, Any], progress: Progress) -> None:
    """Put the report and the rejects into the storage, and into --report."""
    rejected = [Rejected(**row) for row in progress.rejects]
    dropped = [Dropped(**row) for row in progress.dropped]
    storage = Location.of(settings.training.storage)
    result.leave_report(storage, f"{STATE}/", report, rejected, dropped=dropped)
    if settings.running.report is not None:
        result.leave_report(
            Location.of(settings.running.report), "", report, rejected, dropped=dropped
        )


def _with_workers(snapshot: Snapshot, spent: dict[str, float], count: int) -> Snapshot:
    """Replace the workers' figures in the collector's snapshot by those of their own clocks.

    A worker's meter also counts the work of the feeding thread.
    """
    if snapshot == reports.NOTHING_SEEN:
        return snapshot
    pool = PoolView(
        start=count,
        min=count,
        max=count,
        end=count,
        actor_s=spent["wall"],
        starved_s=spent["wait"],
    )
    busy_s = spent["step"] + spent["evaluate"] + spent["checkpoint"]
    mine = [actor for actor in snapshot.actors if actor.stage == "train"]
    clocked = [replace(actor, busy_s=busy_s / len(mine)) for actor in mine]
    others = [actor for actor in snapshot.actors if actor.stage != "train"]
    pools = {**snapshot.pools, "train": pool}
    return replace(snapshot, pools=pools, actors=(*others, *clocked))


def _counts(todo: Todo, progress: Progress, *, before: int) -> reports.Counts:
    """The report's counts. `before`: rows done by earlier runs."""
    reasons = Counter(row["reason"] for row in progress.rejects)
    return reports.Counts(
        images_in=todo.epochs.total,
        images_out=progress.images,
        rejects_by_reason=_in_all(reasons, progress),
        before=before,
        damaged_kept=progress.damaged,
        skipped=todo.skipped,
        boxes_dropped=len(progress.dropped),
        boxes_from=result.frames_told(progress.boxes_from),
    )


def _in_all(reasons: Counter[str], progress: Progress) -> dict[str, int]:
    """Rejected rows of all epochs by reason, estimated from the rejected images.

    Each image is in every epoch, but the last epoch may not be over.
    """
    images, rows = reasons.total(), progress.rejected
    if not images:
        return {"unknown": rows} if rows else {}
    spread = {reason: count * rows // images for reason, count in reasons.most_common()}
    first = next(iter(spread))
    spread[first] += rows - sum(spread.values())
    return spread


def _break_even(
    report: dict[str, Any], timed: list[planner.StageCost], todo: Todo
) -> dict[str, Any]:
    """Compare the two designs: preprocess continuously, or once into a store."""
    if todo.recipe.random:
        why = (
            "The recipe draws anew in each epoch, which stored images cannot: only continuous "
            "preprocessing gives these."
        )
        return {"epochs": None, "reason": why}
    if todo.training.left is not None:
        why = "The recipe's ops are done on the training device: there is nothing to store."
        return {"epochs": None, "reason": why}
    try:
        measured, machine = planner.of_report(report)
        # Figures of the run itself replace those of the probe.
        costs = {cost.name: cost for cost in [*timed, *measured]}
        stages = {name: costs[name] for name in ("preprocess", "write", "stored", "train")}
    except (ValueError, KeyError):
        return {"epochs": None, "reason": "Too little was measured to tell."}
    images = todo.epochs.rows
    found = planner.designs(images=images, machine=machine, **stages)
    epochs = found.break_even_epochs
    if epochs is None:
        why = (
            f"Storing saves no time: an epoch takes {found.continuous_s:.1f} s with preprocessing, "
            f"{found.stored_s:.1f} s from a store."
        )
    else:
        why = (
            f"Preprocessing once takes {found.once_s:.1f} s and saves "
            f"{found.continuous_s - found.stored_s:.1f} s in each epoch: from "
            f"{math.ceil(epochs)} epochs on it takes less in all."
        )
    return {"epochs": epochs, "reason": why, **asdict(found)}


def verdict_on(outcome: Outcome, settings: Settings) -> str | None:
    """Why a finished training counts as failed: rows lost, or too many rejected. None: success."""
    progress = outcome.progress
    if progress.rows != outcome.rows:
        return (
            f"{progress.rows} of {outcome.rows} rows are accounted for: some were missed, or seen "
            f"twice. This is a defect of raypipe; report it. --no-resume trains again."
        )
    limit = settings.running.max_reject_fraction
    if progress.rejected > limit * outcome.rows:
        first = progress.rejects[0]
        return (
            f"{progress.rejected} of {outcome.rows} rows were rejected, more than "
            f"--max-reject-fraction {limit:g} allows; the model is kept. The first: "
            f"{first['uri']}: {first['reason']} ({first['detail']}). All are in "
            f"{settings.training.storage}/{STATE}/rejects.parquet."
        )
    return None
