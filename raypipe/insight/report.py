"""A run's record -> report.json and the table in the terminal. Stands alone: reads plain records, knows nothing of Ray."""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from raypipe.insight import planner

LAST = ("write", "predict")
"""Stages with nobody behind them to be held up by: when they are not busy, they have no input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolView:
    """A stage's actors as the execution saw them: counts, and seconds summed over actors."""

    start: int = 0
    min: int = 0
    max: int = 0
    end: int = 0
    running: int = 0
    pending: int = 0  # starting
    draining: int = 0  # of those running: finish what they have, and go
    done: bool = False  # nothing is left for the stage to do
    queued: int = 0  # blocks waiting for the stage
    actor_s: float = 0.0  # ready, whatever they did
    starved_s: float = 0.0  # without work while no input waited


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows. `before` were done by an earlier run into the same output; `unread` had
    a store that did not give their bytes, and are tried again by the next run.

    `damaged_kept`: of `images_out`, those that are damaged and were delivered all the same; None: not known.
    """

    images_in: int
    images_out: int
    rejects_by_reason: dict[str, int]
    before: int = 0
    unread: int = 0
    damaged_kept: int | None = 0
    skipped: dict[str, int] = field(
        default_factory=dict
    )  # files that the listing left out, by suffix
    boxes_dropped: int | None = 0  # boxes of delivered images that could not be used
    boxes_from: dict[str, int] = field(
        default_factory=dict
    )  # images whose boxes were drawn in another frame, by which

    @property
    def rejected(self) -> int:
        return sum(self.rejects_by_reason.values())

    @property
    def lost(self) -> int:
        """Rows neither delivered, rejected nor unread: 0, or the run has failed."""
        return self.images_in - self.images_out - self.rejected - self.unread


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds of a run: `setup_s` for listing, planning and Ray's own start, then `wall_s`, in which all else is counted.

    `ready_s` is when the preprocess actors could begin, their mean (None: unknown); `outputs` when each shard came out, with its images.
    """

    wall_s: float
    setup_s: float
    ready_s: float | None
    outputs: list[tuple[float, int]]

    @property
    def first_output_s(self) -> float | None:
        return self.outputs[0][0] if self.outputs else None

    @property
    def steady_images_per_s(self) -> float | None:
        """All images over the time from when actors could begin to the last output: Ray's and the actors' own start left out,
        the filling of the pipeline and its emptying not. (Counting from the first output instead would make a gift of what the other
        actors have under way by then.)
        """
        if self.ready_s is None or not self.outputs or self.outputs[-1][0] <= self.ready_s:
            return None
        return sum(images for _, images in self.outputs) / (self.outputs[-1][0] - self.ready_s)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _stage(name: str, snapshot: dict, cores: float, *, on_gpu: bool) -> dict[str, Any]:
    actors = [actor for actor in snapshot["actors"] if actor["stage"] == name]
    pool = PoolView(**snapshot["pools"].get(name, {}))
    images = sum(actor["images"] for actor in actors)
    busy_s = sum(actor["busy_s"] for actor in actors)
    cpu_s = sum(actor["cpu_s"] for actor in actors)
    gpu_seen_s = sum(actor["gpu_seen_s"] for actor in actors)
    waits = [actor["core_wait_s"] for actor in actors]
    core_wait_s = None if None in waits else sum(waits)
    # The two clocks differ a little (10 Hz there, every call here); the shares must still sum to 1.
    total = max(pool.actor_s, busy_s)
    starved = total - busy_s if name in LAST else min(pool.starved_s, total - busy_s)
    first = min((actor["at"] for actor in snapshot["first"] if actor["stage"] == name), default=0.0)
    last = max((actor["at"] for actor in actors), default=0.0)
    return {
        "name": name,
        "on_gpu": on_gpu,
        "actors": {key: getattr(pool, key) for key in ("start", "min", "max", "end")},
        "images": images,
        "cpu_s_per_image": _ratio(cpu_s, images),
        "busy_s_per_image": _ratio(busy_s, images),
        "core_wait_s_per_image": None if core_wait_s is None else _ratio(core_wait_s, images),
        "cpu_percent": _ratio(100 * cpu_s, (last - first) * cores),
        "rss_peak_bytes": snapshot["rss_peak_by_stage"].get(name),
        "gpu_percent": _ratio(100 * sum(actor["gpu_busy_s"] for actor in actors), gpu_seen_s),
        "gpu_memory_peak_bytes": max(
            (
                actor["gpu_memory_peak_bytes"]
                for actor in actors
                if actor["gpu_memory_peak_bytes"] is not None
            ),
            default=None,
        ),
        "bytes_in": sum(actor["bytes_in"] for actor in actors),
        "bytes_out": sum(actor["bytes_out"] for actor in actors),
        "busy": _ratio(busy_s, total),
        "starved": _ratio(starved, total),
        "blocked": _ratio(total - busy_s - starved, total),
    }


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The work alone: `seconds` from when the last of the actors that the run began with could begin, to the last output, and the mean use of
    the `cores` of the nodes with actors meanwhile, 0 to 100. Unlike the steady rate it is of use only where no actor has begun before the
    others were there. None: not known.
    """

    seconds: float | None = None
    cpu_percent: float | None = None
    cores: float = 0.0


def _work(snapshot: dict, clock: Clock) -> _Work:
    began = []
    for stage in {sample["stage"] for sample in snapshot["first"]}:
        ready = sorted(
            (sample for sample in snapshot["first"] if sample["stage"] == stage),
            key=lambda sample: sample["at"],
        )
        began += ready[: PoolView(**snapshot["pools"].get(stage, {})).start or None]
    if not began or not clock.outputs:
        return _Work()
    work_s = clock.outputs[-1][0] - (max(sample["at"] for sample in began) - snapshot["started"])
    used = total = cores = 0.0
    for node in {sample["node"] for sample in began}:
        first = max(
            (sample for sample in began if sample["node"] == node), key=lambda sample: sample["at"]
        )
        last = max(
            (sample for sample in snapshot["actors"] if sample["node"] == node),
            key=lambda sample: sample["at"],
        )
        if last["at"] > first["at"]:
            used += last["node_cpu_busy_s"] - first["node_cpu_busy_s"]
            total += last["node_cpu_total_s"] - first["node_cpu_total_s"]
            cores += (last["node_cpu_total_s"] - first["node_cpu_total_s"]) / (
                last["at"] - first["at"]
            )
    return _Work(
        seconds=work_s if work_s > 0 else None,
        cpu_percent=100 * used / total if total > 0 else None,
        cores=cores,
    )


def _held_by_others(snapshot: dict, work: _Work, driver_cpu_s: float) -> float:
    """Percent of the cores, as `planner.held_by_others`; 0 where it is not known."""
    if not work.seconds or work.cpu_percent is None:
        return 0.0
    own_s = sum(actor["cpu_s"] + planner.END_S for actor in snapshot["actors"]) + driver_cpu_s
    return planner.held_by_others(work.cpu_percent, own_s / work.seconds, work.cores)


def _overhead(snapshot: dict, stages: list[dict]) -> float | None:
    """CPU seconds an image that the nodes spent on other than the stages while these worked: Ray's own processes."""
    images = max((stage["images"] for stage in stages), default=0)
    own = sum(actor["cpu_s"] for actor in snapshot["actors"])
    if not images or not own or not snapshot["nodes"]:
        return None
    busy = sum(node["cpu_busy_s"] for node in snapshot["nodes"].values())
    return min(max(busy - own, 0.0), planner.RAYS_SHARE * own) / images


def build(
    *,
    run_id: str,
    settings: dict,
    versions: dict,
    hardware: dict,
    counts: Counts,
    clock: Clock,
    cpu_percent: float | None,
    driver_cpu_s: float = 0.0,
    stage_names: list[str],
    on_gpu: Collection[str] = (),
    snapshot: dict,
    predicted: float | None = None,
) -> dict[str, Any]:
    """The report: JSON types only. A figure that could not be measured is None.

    Args:
        hardware: `cores` of all nodes together, and what else is known.
        cpu_percent: mean of all cores over the run, 0 to 100.
        driver_cpu_s: CPU seconds of the process that runs it, which may do something with what comes out.
        on_gpu: stages each of whose actors holds a GPU, whether or not it could be looked at.
        snapshot: of the run's collector (raypipe.run.live.collector.Collector.snapshot).
        predicted: images/s that the planner expected of the actors that the run began with.

    Returns:
        The record that design.md calls report.json. Per stage, `cpu_percent` is 0 to 100 of all cores, from its first actor's start to
        its last work; `rss_peak_bytes` the largest sum over its actors; `busy`, `starved` and `blocked` shares of its actors' time. `work_s`
        counts from when the last of the actors that it began with could begin, to the last output, `work_cpu_percent` is that of the machine
        meanwhile.
    """
    cores = hardware["cores"]
    if snapshot == NOTHING_SEEN:
        known = unmeasured(run_id=run_id, settings=settings, versions=versions, counts=counts)
        done_now = counts.images_out + counts.rejected + counts.unread - counts.before
        return known | {
            "hardware": hardware,
            "setup_s": clock.setup_s,
            "wall_s": clock.wall_s,
            "first_output_s": clock.first_output_s,
            "images_per_s": _ratio(done_now, clock.wall_s),
            "cpu_percent": cpu_percent,
            "verdict": {"stage": None, "reason": _NO_COLLECTOR, "advice": []},
        }
    stages = [_stage(name, snapshot, cores, on_gpu=name in on_gpu) for name in stage_names]
    overhead_s = _overhead(snapshot, stages)
    steady = clock.steady_images_per_s
    done_now = counts.images_out + counts.rejected + counts.unread - counts.before
    work = _work(snapshot, clock)
    return {
        "run_id": run_id,
        "settings": settings,
        "versions": versions,
        "hardware": hardware,
        **_counted(counts),
        "setup_s": clock.setup_s,
        "ready_s": clock.ready_s,
        "wall_s": clock.wall_s,
        "first_output_s": clock.first_output_s,
        "images_per_s": _ratio(done_now, clock.wall_s),
        "steady_images_per_s": steady,
        "cpu_percent": cpu_percent,
        "work_s": work.seconds,
        "work_cpu_percent": work.cpu_percent,
        "overhead_cpu_s_per_image": overhead_s,
        "stages": stages,
        "verdict": verdict(
            stages,
            cores,
            steady or _ratio(done_now, clock.wall_s) or 0.0,
            held=_held_by_others(snapshot, work, driver_cpu_s),
            overhead_s=overhead_s or 0.0,
        ),
        "predicted": None
        if predicted is None
        else {
            "images_per_s": predicted,
            "measured_images_per_s": steady,
            "actors": {stage["name"]: stage["actors"]["start"] for stage in stages},
        },
        "scale_events": snapshot["scale_events"],
        "timeline": snapshot["timeline"],
    }


NOTHING_SEEN: dict[str, Any] = {
    **{name: [] for name in ("actors", "first", "timeline", "scale_events")},
    **{name: {} for name in ("rss_peak_by_stage", "pools", "nodes")},
}
"""The snapshot of a collector that was killed."""

_NO_COLLECTOR = "What the stages cost is not known: the actor that collects it was killed. The counts are right."
_NO_DRIVER = "What this run cost is not known: its driver ended before it could report. The counts are the journal's."


def unmeasured(*, run_id: str, settings: dict, versions: dict, counts: Counts) -> dict[str, Any]:
    """The report of a run of which only the journal is left: `build`'s keys, with None for every figure."""
    figures = (
        *("setup_s", "ready_s", "wall_s", "first_output_s", "images_per_s", "steady_images_per_s"),
        *("cpu_percent", "work_s", "work_cpu_percent", "overhead_cpu_s_per_image", "predicted"),
    )
    return {
        "run_id": run_id,
        "settings": settings,
        "versions": versions,
        "hardware": dict.fromkeys(("cores", "nodes", "gpus", "memory_bytes", "processor")),
        **_counted(counts),
        **dict.fromkeys(figures),
        "stages": [],
        "verdict": {"stage": None, "reason": _NO_DRIVER, "advice": []},
        "scale_events": [],
        "timeline": [],
    }


def _counted(counts: Counts) -> dict[str, Any]:
    return {
        "images_in": counts.images_in,
        "images_out": counts.images_out,
        "images_rejected": counts.rejected,
        "images_unread": counts.unread,
        "images_done_before": counts.before,
        "images_damaged_kept": counts.damaged_kept,
        "rejects_by_reason": counts.rejects_by_reason,
        "skipped": counts.skipped,
        "boxes_dropped": counts.boxes_dropped,
        "boxes_from": counts.boxes_from,
    }


_WAITS_FOR = {"preprocess": "the input", "write": "the store"}
"""What a stage waits for where an image keeps it longer than its CPU does: a disk or a network."""


def verdict(
    stages: list[dict], cores: float, measured: float, *, held: float = 0.0, overhead_s: float = 0.0
) -> dict[str, Any]:
    """Which stage limits, why, and what a change would bring.

    Args:
        stages: as in the report.
        cores: of all nodes.
        measured: images/s, what the predictions start from.
        overhead_s: CPU seconds of Ray itself, an image.
        held: percent of all cores that other programs had meanwhile (`planner.held_by_others`).
    """
    costs = planner.costs_of(stages)
    if not costs:
        return {
            "stage": None,
            "reason": "No stage has finished a shard, so nothing is known of what they cost.",
            "advice": [],
        }
    if max(s["busy"] or 0.0 for s in stages) < 0.5:
        most = max(costs, key=lambda cost: cost.busy_s / cost.actors)
        reason = "Too short a run to tell what limits: no stage was busy for even half of the time that its actors were there."
        return {"stage": most.name, "reason": reason, "advice": []}
    machine = planner.Machine(cores=cores, overhead_s=overhead_s)
    _, limit = planner.bound(planner.uncontended(costs, cores), machine)
    by_name = {s["name"]: s for s in stages}
    if limit == planner.CORES:
        stage = max(costs, key=lambda cost: cost.cpu_s)
        share = stage.cpu_s / sum(cost.cpu_s for cost in costs)
        reason = (
            f"The {cores:g} cores limit: the stages need {1000 * sum(c.cpu_s for c in costs):.2f} ms of CPU an image, "
            f"{100 * share:.0f}% of it in {stage.name}. More actors than cores would share the same cores."
        )
    else:
        stage = next(cost for cost in costs if cost.name == limit)
        busy = by_name[limit]["busy"]
        others = [
            f"{s['name']} was {'blocked' if (s['blocked'] or 0) > (s['starved'] or 0) else 'starved'} "
            f"{100 * max(s['blocked'] or 0, s['starved'] or 0):.0f}% of its time"
            for s in stages
            if s["name"] != limit and s["busy"] is not None
        ]
        actors = f"{stage.actors} actor" + ("s were" if stage.actors > 1 else " was")
        reason = (
            f"{limit} limits: its {actors} busy {100 * (busy or 0):.0f}% of the time"
            + "".join(f"; {text}" for text in others)
            + "."
        )
        idle = 1 - (stage.cpu_s + (stage.core_wait_s or 0.0)) / stage.busy_s
        if limit in _WAITS_FOR and idle > 0.5:
            reason += (
                f" {100 * idle:.0f}% of that it waited for {_WAITS_FOR[limit]}, not for a core."
            )
    if held > planner.TOLD:
        reason += f" Other programs held about {held:.0f}% of the machine's CPU meanwhile: the figures are of what they left."
    advice = [asdict(change) for change in planner.changes(costs, machine, measured)]
    return {"stage": stage.name, "reason": reason, "advice": advice}


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


_ROWS: tuple[tuple[str, Callable[[dict], str]], ...] = (
    (
        "actors",
        lambda s: (
            str(s["actors"]["max"])
            if s["actors"]["min"] == s["actors"]["max"]
            else "{min} to {max}".format(**s["actors"])
        ),
    ),
    ("images", lambda s: str(s["images"])),
    ("CPU ms an image", lambda s: _number(s["cpu_s_per_image"], ".2f", 1000)),
    ("busy ms an image", lambda s: _number(s["busy_s_per_image"], ".2f", 1000)),
    ("CPU, % of all cores", lambda s: _number(s["cpu_percent"], ".0f")),
    ("memory, MB at most", lambda s: _number(s["rss_peak_bytes"], ".0f", 1e-6)),
    ("MB in", lambda s: _number(s["bytes_in"], ".1f", 1e-6)),
    ("MB out", lambda s: _number(s["bytes_out"], ".1f", 1e-6)),
    ("busy", lambda s: _number(s["busy"], ".0%")),
    ("starved (no input)", lambda s: _number(s["starved"], ".0%")),
    ("blocked (output full)", lambda s: _number(s["blocked"], ".0%")),
)


def outlook(report: dict, *, cpus: int | None = None, gpus: int | None = None) -> Group:
    """What this run's costs say of other machines and allocations, as a person reads it in a terminal.

    Args:
        cpus: cores, and at most as many actors; None: of the run's own machine.
        gpus: for stages that hold one; None: as many as the run had.

    Raises:
        ValueError: no stage has finished a shard, so nothing is known of what it costs.
    """
    costs, here = planner.of_report(report)
    ran = planner.outlook(costs, here, {cost.name: cost.actors for cost in costs})
    # A machine of one's own may have more actors than cores, where they wait; a number of CPUs asked for is a budget.
    room = max(here.actors, int(here.cores)) if cpus is None else cpus
    there = replace(
        here, cores=cpus or here.cores, actors=room, gpus=here.gpus if gpus is None else gpus
    )
    best = planner.outlook(costs, there)
    measured = report.get("steady_images_per_s")
    table = Table("", "images/s", "limited by", header_style="bold", box=box.SIMPLE_HEAD)
    for cost in costs:
        table.add_column(cost.name, justify="right")

    def row(name: str, seen: planner.Outlook, rate: float | None = None) -> None:
        limit = "cores" if seen.limit == planner.CORES else seen.limit
        counts = [str(seen.counts[cost.name]) for cost in costs]
        table.add_row(
            name, _number(seen.images_per_s if rate is None else rate, ".0f"), limit, *counts
        )

    machine = f"{there.cores:g} CPUs" + (
        f", {there.gpus} GPU{'s' if there.gpus > 1 else ''}"
        if there.gpus and any(cost.on_gpu for cost in costs)
        else ""
    )
    if measured:
        row("measured", ran, measured)
    row("as it ran, by the model", ran)
    row(f"best on {machine}", best)
    gains = Table("what more", "images/s", "gain", header_style="bold", box=box.SIMPLE_HEAD)
    for what, rate in best.gains:
        gain = 100 * (rate / best.images_per_s - 1) if best.images_per_s else 0.0
        gains.add_row(what, f"{rate:.0f}", "none" if gain < 1 else f"{gain:+.0f}%")
    millis = ", ".join(
        f"{cost.name} {1000 * cost.busy_s:.2f} busy, {1000 * cost.cpu_s:.2f} CPU" for cost in costs
    )
    lines = [f"ms an image: {millis}; Ray itself {1000 * here.overhead_s:.2f} CPU"]
    return Group(*(Text(line) for line in lines), table, gains)


def notes(report: dict) -> list[str]:
    """What a person should know of the images and boxes of a run beside their numbers, a sentence each."""
    lines = []
    if report.get("images_damaged_kept"):
        lines.append(
            f"{report['images_damaged_kept']} of those out are damaged, and were kept (--damaged keep)"
        )
    if report.get("skipped"):
        left_out = sorted(report["skipped"].items(), key=lambda item: -item[1])
        lines.append(
            "left out of the listing: "
            + ", ".join(f"{count} {suffix}" for suffix, count in left_out)
        )
    if report.get("boxes_dropped"):
        lines.append(
            f"{report['boxes_dropped']} boxes could not be used and were dropped (boxes_dropped.parquet)"
        )
    frames = report.get("boxes_from") or {}
    if moved := sum(count for kind, count in frames.items() if kind != "unclear"):
        lines.append(
            f"the boxes of {moved} images were drawn in another frame than the picture's, and moved"
        )
    if "unclear" in frames:
        lines.append(
            f"the boxes of {frames['unclear']} images are taken as upright: sizes cannot tell whether they are"
        )
    return lines


def terminal(report: dict) -> Group:
    """The report as a person reads it at the end of a run: fits a terminal of 80 columns."""
    table = Table("", header_style="bold", box=box.SIMPLE_HEAD)
    for stage in report["stages"]:
        table.add_column(stage["name"], justify="right")
    for label, cell in _ROWS:
        table.add_row(label, *(cell(stage) for stage in report["stages"]))
    before = (
        f" ({report['images_done_before']} of them by an earlier run)"
        if report["images_done_before"]
        else ""
    )
    unread = f" + {report['images_unread']} not read" if report.get("images_unread") else ""
    lines = [
        f"{report['images_in']} images in = {report['images_out']} out + {report['images_rejected']} rejected{unread}{before}",
        f"{_number(report['steady_images_per_s'], '.0f')} images/s once running, {_number(report['images_per_s'], '.0f')} from start to end",
        f"{_number(report['setup_s'], '.1f')} s to list and start Ray, then {_number(report['wall_s'], '.1f')} s, first output after "
        f"{_number(report['first_output_s'], '.1f')} s; "
        f"machine {_number(report['cpu_percent'], '.0f')}% busy",
    ]
    if report["rejects_by_reason"]:
        reasons = sorted(report["rejects_by_reason"].items(), key=lambda item: -item[1])
        lines.append("rejected: " + ", ".join(f"{count} {reason}" for reason, count in reasons))
    lines += notes(report)
    verdict_text = Text("verdict: ", style="bold") + Text(
        report["verdict"]["reason"], style="not bold"
    )
    measured = report["steady_images_per_s"] or report["images_per_s"] or 0.0
    gains = [
        a for a in report["verdict"]["advice"] if a["predicted_images_per_s"] > 1.02 * measured
    ][:2]
    advice = [
        Text(
            f"  {a['change']}: about {a['predicted_images_per_s']:.0f} images/s expected",
            style="dim",
        )
        for a in gains
    ]
    stages = [table] if report["stages"] else []
    return Group(*(Text(line) for line in lines), *stages, verdict_text, *advice)
