"""The rules of the talk's claims about training, and about what comes before it (17 to 21)."""

from collections.abc import Callable

from raypipe.insight.markup import number
from raypipe.sweep import advice
from raypipe.sweep.curves import BACKENDS, Spot, curve
from raypipe.sweep.rules import (
    POINTS,
    Part,
    Parts,
    Sweep,
    cannot,
    falls,
    flat,
    holds_if,
    several,
    times,
)


def _trained(sweep: Sweep, judge: Callable[[list[Spot]], Part], *, over: str, fixed: str) -> Parts:
    """`judge` of each backend's training on GPUs. On CPUs it says what was measured, no more."""
    parts = {}
    no_gpu = "this machine has no GPU" if not sweep.where.gpus else "not measured: --train"
    mine = [r for r in sweep.records if r["kind"] == "train" and r[fixed] == 1]
    for backend in BACKENDS:
        on_gpu, on_cpu = (
            curve(
                [r for r in mine if r["device"] == device], backend=backend, kind="train", over=over
            )
            for device in ("gpu", "cpu")
        )
        if on_gpu:
            parts[backend] = judge(on_gpu)
        elif on_cpu:
            measured = judge(on_cpu).measured or times(on_cpu)
            parts[backend] = cannot(no_gpu, f"on CPU instead: {measured}")
        else:
            parts[backend] = cannot(no_gpu)
    return parts


def training_flat(sweep: Sweep) -> Parts:
    """Claim 17."""
    return _trained(sweep, flat, over="actors", fixed="workers")


def training_limits(sweep: Sweep) -> Parts:
    """Claim 18: use of the GPU against CPU for preprocessing."""

    def judge(spots: list[Spot]) -> Part:
        last = spots[-1]
        gpu, cpu = last.median("gpu_percent"), last.median("preprocess_cpu_percent")
        measured = (
            f"with {several(last.count, 'actor')} GPU {number(gpu, '%')}, "
            f"preprocessing {number(cpu, '%')} of the cores, limited by {last.limit()}"
        )
        if gpu is None or cpu is None:
            return cannot("the use of the GPU is not known", measured)
        return Part(
            holds=holds_if(gpu > cpu + POINTS and last.limit() == "train"), measured=measured
        )

    return _trained(sweep, judge, over="actors", fixed="workers")


def training_falls(sweep: Sweep) -> Parts:
    """Claim 19: more GPUs."""

    def judge(spots: list[Spot]) -> Part:
        if len(spots) < 2:
            return cannot("needs 2 GPUs", times(spots) + " workers")
        return falls(spots, sweep.where.cores, "workers")

    return _trained(sweep, judge, over="workers", fixed="actors")


def gpu_for_training(sweep: Sweep) -> Parts:
    """Claim 20: where one more GPU is better spent."""
    found = advice.gpus(sweep.records, sweep.where)
    if not found:
        why = "not measured: --train" if sweep.where.gpus else "this machine has no GPU"
        return {"": cannot(why)}
    parts = {}
    for gpu in found:
        measured = (
            f"{number(gpu.now)} images/s; {number(gpu.training)} with one more GPU to train, "
            f"{number(gpu.preprocessing)} if one did all preprocessing for nothing"
        )
        if gpu.ops is not None:
            measured += f"; {number(gpu.ops)} measured with the ops on the GPU that trains"
        holds = holds_if(gpu.training > gpu.preprocessing)
        parts[gpu.backend] = Part(holds=holds, measured=measured)
    return parts


def storing_pays(sweep: Sweep) -> Parts:
    """Claim 21: from how many epochs on storing has won."""
    found = [d for d in advice.designs(sweep.records, sweep.where) if d.trainer is None]
    if not found:
        return {"": cannot("storing and reading back were not measured")}
    parts = {}
    for design in found:
        by_cpu, by_clock = design.cpu.break_even_epochs, design.clock.break_even_epochs
        parts[design.backend] = Part(
            holds=holds_if(by_cpu is not None or by_clock is not None),
            measured=f"by CPU time {advice.epochs_from(by_cpu)}, "
            f"by the clock {advice.epochs_from(by_clock)}",
        )
    return parts
