"""What the costs that a sweep measured advise: which library, how many actors, and which design."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raypipe.insight import planner
from raypipe.insight.markup import number
from raypipe.insight.planner import Machine, StageCost
from raypipe.sweep.curves import BACKENDS, Record, Spot, Where, curve

BUDGETS = (1, 2, 4, 8, 16, 32, 64)
"""Cores that advice is given for."""

ACTORS_A_CORE = 16
"""Actors that advice may have for each core: more than one, for those that wait for a store."""


def costs(spots: Sequence[Spot], cores: float, stages: Sequence[str]) -> list[StageCost]:
    """What an image costs each of `stages`, by the point with the fewest actors.

    There the least of it is waiting for one another. Empty where a stage was not measured.
    """
    if not spots:
        return []
    first = spots[0]
    counts = {"preprocess": "actors", "write": "writers", "train": "workers"}
    found = []
    for stage in stages:
        busy, cpu = first.median(f"{stage}_busy_s"), first.median(f"{stage}_cpu_s")
        if not busy or cpu is None:
            return []
        found.append(
            StageCost(
                name=stage,
                actors=int(first.records[0][counts[stage]]),
                busy_s=busy,
                cpu_s=cpu,
                core_wait_s=first.median(f"{stage}_core_wait_s"),
                on_gpu=stage == "train" and first.records[0].get("device") == "gpu",
            )
        )
    return planner.uncontended(found, cores)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best actors of a backend for so many cores, and the images/s that the planner expects."""

    cores: int
    backend: str
    counts: Mapping[str, int]
    images_per_s: float
    limit: str


def choices(records: Sequence[Record], where: Where, *, writing: bool) -> list[Choice]:
    """The best of each backend for each budget of cores, writing too or preprocessing only."""
    found = []
    names = ("preprocess", "write") if writing else ("preprocess",)
    for cores in BUDGETS:
        for backend in BACKENDS:
            spots = curve(records, backend=backend, writing="same" if writing else "none")
            stages = costs(spots, where.cores, names)
            if not stages:
                continue
            best = planner.outlook(stages, Machine(cores=cores, actors=ACTORS_A_CORE * cores))
            found.append(
                Choice(
                    cores=cores,
                    backend=backend,
                    counts=best.counts,
                    images_per_s=best.images_per_s,
                    limit=best.limit,
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Design:
    """Preprocessing in every epoch against doing it once and storing it, of one backend.

    `clock` and `cpu`: seconds an image takes by the planner's clock, and of CPU time. `trainer`:
    images/s of the training alone; None: as fast as data comes.
    """

    backend: str
    trainer: float | None
    clock: planner.Designs
    cpu: planner.Designs


def designs(records: Sequence[Record], where: Where) -> list[Design]:
    """The two designs of claim 21, for each backend that was measured storing and reading back.

    Where training was measured, with that too.
    """
    found = []
    machine = Machine(cores=where.cores, actors=int(ACTORS_A_CORE * where.cores))
    for backend in BACKENDS:
        preprocess = costs(curve(records, backend=backend), where.cores, ("preprocess",))
        storing = curve(records, backend=backend, kind="store")
        write = costs(storing, where.cores, ("preprocess", "write"))[1:]
        stored = costs(curve(records, backend=backend, kind="stored"), where.cores, ("preprocess",))
        if not (preprocess and write and stored):
            continue
        each = replace(preprocess[0], actors=planner.best(preprocess, machine)["preprocess"])
        alone = curve(records, backend=backend, kind="train", where=lambda r: r["workers"] == 1)
        trained = costs(alone, where.cores, ("preprocess", "train"))[1:]
        cpu = planner.Designs(
            once_s=each.cpu_s + write[0].cpu_s, continuous_s=each.cpu_s, stored_s=stored[0].cpu_s
        )
        for train in [None, *trained]:
            clock = planner.designs(
                images=1,
                preprocess=each,
                write=write[0],
                stored=stored[0],
                machine=machine,
                train=train,
            )
            trainer = None if train is None else train.actors / train.busy_s
            found.append(Design(backend=backend, trainer=trainer, clock=clock, cpu=cpu))
    return found


def epochs_from(epochs: float | None) -> str:
    """From which epoch on storing has won, in words."""
    if epochs is None:
        return "never"
    return f"from {number(math.ceil(epochs))} epoch{'' if epochs <= 1 else 's'} on"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Where a GPU would go, of one backend, in images/s.

    `now`: as it is. `training`: with one more worker that trains. `preprocessing`: if a GPU took
    all of the preprocessing at no cost, more than any could do. `ops`: measured with the recipe's
    ops on the GPU that trains; None: it was not.
    """

    backend: str
    now: float
    training: float
    preprocessing: float
    ops: float | None


def gpus(records: Sequence[Record], where: Where) -> list[Gpu]:
    """For each backend that was measured training on a GPU."""
    found = []
    for backend in BACKENDS:
        spots = curve(
            records,
            backend=backend,
            kind="train",
            where=lambda r: r["device"] == "gpu" and r["workers"] == 1,
        )
        stages = costs(spots, where.cores, ("preprocess", "train"))
        if not stages:
            continue
        machine = Machine(
            cores=where.cores, actors=int(ACTORS_A_CORE * where.cores), gpus=stages[1].actors
        )
        richer = replace(machine, gpus=stages[1].actors + 1)
        ops = curve(records, backend=backend, kind="ops")
        found.append(
            Gpu(
                backend=backend,
                now=planner.outlook(stages, machine).images_per_s,
                training=planner.outlook(stages, richer).images_per_s,
                preprocessing=planner.bound(stages[1:], machine)[0],
                ops=ops[0].median("images_per_s") if ops else None,
            )
        )
    return found
