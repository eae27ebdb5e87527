"""What is known of an execution when it begins: for its collector, and for the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ray

from raypipe.run.cluster import internals
from raypipe.run.cluster.machine import Session
from raypipe.run.cluster.sizing import bound
from raypipe.run.live.steering import Facts
from raypipe.stages.stage import Stage

if TYPE_CHECKING:
    from raypipe.run.execution import Execution, Setup


def facts_of(
    setup: "Setup",
    session: Session,
    stages: Sequence[Stage],
    asked: Mapping[str, int],
    *,
    workers_on_gpu: bool,
) -> Facts:
    """What the collector is told.

    Args:
        asked: actors of each stage that the run is to have.
    """
    on_gpu = [stage.name for stage in stages if stage.gpu]
    workers = setup.workers
    if workers is not None and workers_on_gpu:
        on_gpu.append(workers.name)
    cpus = workers.cpus if workers is not None else 0
    known = session.grows and not session.fits
    most_gpus = session.most_gpus
    return Facts(
        input=setup.input,
        output=setup.output,
        recipe=setup.recipe,
        backend=str(setup.given["backend"]),
        images=setup.images,
        cores=session.cores,
        at_most=session.room.actors + cpus,
        # What a fused stage does later has no count of its own.
        auto=tuple(s.name for s in stages if {s.name, s.steps[0].name} & set(setup.auto)),
        memory=session.memory,
        holds={stage.name: bound(stage) for stage in stages},
        on_gpu=tuple(on_gpu),
        gpus=session.gpus,
        workers="" if workers is None else workers.name,
        unscalable=_unscalable(),
        asked=dict(asked),
        fixed={workers.name: workers.count} if workers is not None else {},
        moves=session.joined,
        left_out=session.left_out,
        grows=session.grows,
        most=session.at_most + cpus if known else None,
        most_gpus=int(most_gpus) if most_gpus is not None and math.isfinite(most_gpus) else None,
    )


def _unscalable() -> str:
    """Why actor counts cannot be changed during a run; empty: they can."""
    if not (lacks := internals.missing("scaling")):
        return ""
    return (
        f"live scaling is off: this Ray ({ray.__version__}) lacks {', '.join(lacks)}, which "
        f"raypipe knows from Ray 2.60. All else works"
    )


def opening(execution: "Execution", asked: Mapping[str, int], *, unscalable: str) -> list[str]:
    """The lines that a run begins with.

    Args:
        asked: actors of each stage that the run is to have.
        unscalable: as in Facts.
    """
    setup, session = execution.setup, execution.session
    doing = [
        f"{execution.counts[stage.name]} {stage.doing}{' on GPU' if stage.gpu else ''}"
        for stage in execution.stages
    ]
    if setup.workers is not None:
        device = "GPU" if execution.workers_on_gpu else "CPU"
        doing.append(f"{setup.workers.count} training on {device}")
    elif setup.output is None:
        doing.append("nothing written")
    dashboard = f"; Ray dashboard: http://{session.dashboard}" if session.dashboard else ""
    lines = [
        f"Run {setup.run_id}: {setup.what}; actors: {', '.join(doing)}; "
        f"{session.cores:g} cores{dashboard}"
    ]
    if dict(asked) != execution.counts:
        wanted = ", ".join(f"{asked[stage.name]} {stage.doing}" for stage in execution.stages)
        rest = " The autoscaler is asked for the rest." if session.grows else ""
        lines.append(
            f"The cluster has room for {session.room.actors} of the {sum(asked.values())} actors "
            f"asked for ({wanted}). The run begins with those, and uses nodes as they come.{rest}"
        )
    if unscalable:
        lines.append(f"{unscalable[0].upper()}{unscalable[1:]}.")
    there = f" --address {session.address}" if session.joined else ""
    return [*lines, f"Watch it: raypipe watch {setup.run_id}{there}"]
