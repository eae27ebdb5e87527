"""How many actors a run has room for, and how many each stage gets."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from raypipe.errors import UsageError
from raypipe.insight import forms, planner
from raypipe.insight.room import Node, actors_on
from raypipe.run.cluster.machine import Session, cores_here
from raypipe.stages.actor import ACTOR_BYTES
from raypipe.stages.stage import Stage
from raypipe.stages.stage import forms as pipelines_of

REST_BYTES = 1500 * 10**6
"""Memory for the driver, Ray's own processes and the system, in addition to the actors."""

ROOM = 0.6
"""Share of a machine's memory that actors may take; the rest is for the object store and others."""

START_S = {"opencv": 1.0, "torchvision": 3.0}
"""CPU seconds of an actor's start, by backend (measured; mostly imports of libraries)."""


def memory_for(actors: Iterable[tuple[int, str]]) -> int:
    """Bytes of memory for a run with these actors: their number, and their libraries."""
    return sum(count * ACTOR_BYTES[libraries] for count, libraries in actors) + REST_BYTES


def room_here(stages: Sequence[Stage], *, shard_bytes: int = 0) -> int:
    """How many actors this machine has memory for. Actors that mostly wait may outnumber the cores.

    All fit with what they are expected to take. If each takes all of its --actor-memory, so many
    fit of which most are of the smallest stage; `bounded` says how many of each.
    Who asks for more actors gets them, as long as what is expected fits.

    Args:
        shard_bytes: memory that an actor of the first stage takes for its largest shard.

    Raises:
        UsageError: there is not enough memory for the actors asked for.
    """
    memory = memory_here()
    first = stages[0]
    each = max(_actor_bytes(first) + shard_bytes, *(_actor_bytes(stage) for stage in stages))
    room = min(max(int(ROOM * memory / each), 2), _at_their_bounds(stages, memory - REST_BYTES))
    asked = [(stage.actors, stage) for stage in stages if isinstance(stage.actors, int)]
    needed = REST_BYTES + sum(count * _actor_bytes(stage) for count, stage in asked)
    if isinstance(first.actors, int):
        needed += shard_bytes * first.actors
    if needed > memory and asked:
        raise UsageError(
            f"{_counted(stages, {})} need about {needed / 1e9:.0f} GB of memory; this machine has "
            f"{memory / 1e9:.0f} GB and {cores_here()} cores. Ask for fewer with "
            f"{_options(stages)}."
        )
    return max(room, sum(count for count, _ in asked) + 1)


def room_there(stages: Sequence[Stage], nodes: Sequence[Node]) -> int:
    """How many actors the nodes of a cluster have CPUs and memory for (`actors_on`)."""
    asked = [stage.actors for stage in stages if isinstance(stage.actors, int)]
    free = len(stages) - len(asked)
    return actors_on(nodes, holds=max(map(bound, stages)), asked=sum(asked) + free)


def _at_their_bounds(stages: Sequence[Stage], memory: int) -> int:
    """How many actors `memory` bytes are enough for, one of each stage at least."""
    smallest, *others = sorted(map(bound, stages))
    return max(int(memory - sum(others)) // smallest, 1) + len(others)


def bounded(stages: Sequence[Stage]) -> int:
    """Bytes that the actors of this machine may take together, those that were asked for at least.

    Of each, count what it takes at most (`bound`).
    """
    asked = sum(bound(s) * (s.actors if isinstance(s.actors, int) else 1) for s in stages)
    return max(memory_here() - REST_BYTES, asked)


def bound(stage: Stage) -> int:
    """Bytes that an actor of the stage may take: its libraries, and its images."""
    return _actor_bytes(stage) + stage.memory


def memory_here(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or what its cgroup has.

    Args:
        root: where proc/ and sys/ are.
    """
    limits = [psutil.virtual_memory().total]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return limits[0]
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        # The limits of all groups around it hold too. In a container only the last may be visible.
        for parent in (Path(path), *Path(path).parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                limits.append(int((folder / str(parent).lstrip("/") / name).read_text()))
    return min(limits)


def _actor_bytes(stage: Stage) -> int:
    return max(ACTOR_BYTES[libraries] for libraries in stage.libraries)


def _counted(stages: Sequence[Stage], counts: dict[str, int]) -> str:
    """The actors of each stage, in words."""
    return " and ".join(f"{counts.get(stage.name, stage.actors)} {stage.noun}" for stage in stages)


def _options(stages: Sequence[Stage]) -> str:
    return " and ".join(f"--{stage.option}" for stage in stages)


def on_gpus(count: int, noun: str, *, must: bool | None, session: Session) -> bool:
    """Decide whether `count` actors hold a GPU each.

    Args:
        noun: for the actors; also the option that sets their number.
        must: True: they have to. False: they must not. None: they do if there are enough.

    Raises:
        UsageError: they have to, and there are too few GPUs.
    """
    most = session.gpus if session.most_gpus is None else session.most_gpus
    if must and count > most:
        raise UsageError(
            f"--gpu with {count} {noun} needs as many GPUs, but Ray sees {session.gpus}. Ask for "
            f"fewer with --{noun}, add GPU nodes, or use --cpu."
        )
    return bool(must) or (must is None and count <= session.gpus)


def seated(stage: Stage, session: Session) -> Stage:
    """Decide whether the stage's actors hold GPUs. If so, "auto" is as many actors as GPUs.

    Raises:
        UsageError: they have to, and there are too few GPUs.
    """
    count = max(session.gpus, 1) if stage.actors == "auto" else stage.actors
    on_gpu = on_gpus(count, stage.noun, must=stage.gpu, session=session)
    return replace(stage, gpu=on_gpu, actors=count if on_gpu else stage.actors)


def size_pools(
    stages: Sequence[Stage],
    costs: Sequence[planner.StageCost] | None,
    session: Session,
    *,
    images: int,
) -> dict[str, int]:
    """Decide how many actors each stage is to have.

    Where nodes are missing, there may be room for fewer of them at first (`Session.fits`).

    Args:
        stages: in order, after `seated`.
        costs: of stages, timed beforehand; None or incomplete: a rule of thumb decides.
        images: number of images to do.

    Raises:
        UsageError: the cluster has fewer CPUs than were asked for.
    """
    fixed = {stage.name: stage.actors for stage in stages if isinstance(stage.actors, int)}
    on_gpu = {stage.name for stage in stages if stage.gpu}
    seats = sum(fixed[name] for name in on_gpu)  # they take no CPU
    room = session.at_most + seats
    # The timing was on a CPU, so it does not hold for stages that are on GPUs.
    known = [cost for cost in stage_costs(stages, costs) if cost.name not in on_gpu]
    free = {stage.name for stage in stages} - fixed.keys()
    machine = machine_of(session)
    if free and free <= {cost.name for cost in known}:
        counts = dict(
            planner.best(known, machine, fixed=fixed, images=images, start_s=start_s(stages))
        )
    else:
        first, *others = stages
        cpus = int(machine.cores)
        counts = {
            stage.name: fixed.get(stage.name, max(1, int(stage.share * cpus))) for stage in others
        }
        taken = sum(counts[stage.name] * bound(stage) for stage in others if not stage.gpu)
        by_memory = min((session.memory - taken) / bound(first), cpus)
        counts[first.name] = max(1, min(int(by_memory), room - sum(counts.values())))
    counts |= fixed
    if sum(counts.values()) > room and not session.fits:
        most = ", with all the nodes that its autoscaler may add" if session.grows else ""
        raise UsageError(
            f"{_counted(stages, counts)} take {sum(counts.values()) - seats} CPUs, one each, but "
            f"the cluster has {session.at_most}{most}: Ray would wait for ever for the rest. Ask "
            f"for fewer with {_options(stages)}, or add nodes first."
        )
    return {stage.name: counts[stage.name] for stage in stages}


def machine_of(session: Session) -> planner.Machine:
    """What the planner knows of the machine before a run."""
    more = max(session.at_most - session.room.actors, 0) if session.grows else 0
    return planner.Machine(
        cores=session.cores + more, actors=session.at_most, memory=session.memory
    )


def start_s(stages: Iterable[Stage]) -> float:
    """CPU seconds of the start of an actor, of the stage that takes longest."""
    return max(START_S[libraries] for stage in stages for libraries in stage.libraries)


def stage_costs(
    stages: Sequence[Stage], costs: Sequence[planner.StageCost] | None
) -> list[planner.StageCost]:
    """What is known of the costs of stages, from those of their steps (`forms.staged`)."""
    by_name = {stage.name: stage for stage in stages}
    return [
        replace(
            cost,
            actors=count if isinstance(count := by_name[cost.name].actors, int) else 1,
            holds=bound(by_name[cost.name]),
        )
        for cost in forms.staged(costs or (), list(by_name))
    ]


def chosen(
    stages: Sequence[Stage],
    costs: Sequence[planner.StageCost] | None,
    session: Session,
    *,
    images: int,
) -> tuple[Stage, ...]:
    """Choose the pipeline that does the steps of `stages` first: fused or separate.

    Fused, unless the model expects separate writers to take less time. That is so where many
    actors wait for a slow store, and there is no memory for as many that decode too.

    Args:
        costs: of steps, timed beforehand; None or incomplete: separate where the step waits.
        images: number of images to do.
    """
    pipelines = pipelines_of(stages)
    if len(pipelines) == 1:
        return pipelines[0]
    fused, separate = pipelines
    if any(len(stage_costs(pipeline, costs)) < len(pipeline) for pipeline in pipelines):
        return separate if any(step.wait_ms for step in separate[-1].steps) else fused
    fused_s, separate_s = (_takes_s(pipeline, costs, session, images) for pipeline in pipelines)
    return separate if fused_s > planner.WORTH * separate_s else fused


def _takes_s(
    stages: Sequence[Stage],
    costs: Sequence[planner.StageCost] | None,
    session: Session,
    images: int,
) -> float:
    """Seconds of a run by the model, with the start of its actors; inf: there is no room."""
    try:
        counts = size_pools(stages, costs, session, images=images)
    except UsageError:
        return math.inf
    known = planner.with_actors(stage_costs(stages, costs), counts)
    rate, _ = planner.bound(known, machine_of(session))
    return images / rate + sum(counts.values()) * start_s(stages) / session.cores
