"""A report, and what its costs say of other machines, as a person reads them in a terminal."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from raypipe.insight import forms, planner
from raypipe.insight.markup import columns, machine_use
from raypipe.insight.nodes import HEAD, rows_of

Record = Mapping[str, Any]
"""A report, or a stage of it, as JSON types."""


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _actors(stage: Record) -> str:
    least, most = stage["actors"]["min"], stage["actors"]["max"]
    return str(most) if least == most else f"{least} to {most}"


def _memory(stage: Record) -> str:
    """Private memory; of an older report, which has none, with shared pages."""
    private = stage.get("private_peak_bytes")
    return _number(stage["rss_peak_bytes"] if private is None else private, ".0f", 1e-6)


_ROWS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("actors", "actors", _actors),
    ("images", "images", lambda s: str(s["images"])),
    ("CPU ms an image", "cpu_s_per_image", lambda s: _number(s["cpu_s_per_image"], ".2f", 1000)),
    ("busy ms an image", "busy_s_per_image", lambda s: _number(s["busy_s_per_image"], ".2f", 1000)),
    ("CPU, % of all cores", "cpu_percent", lambda s: _number(s["cpu_percent"], ".0f")),
    ("memory, MB at most", "rss_peak_bytes", _memory),
    ("MB in", "bytes_in", lambda s: _number(s["bytes_in"], ".1f", 1e-6)),
    ("MB out", "bytes_out", lambda s: _number(s["bytes_out"], ".1f", 1e-6)),
    ("busy", "busy", lambda s: _number(s["busy"], ".0%")),
    ("starved (no input)", "starved", lambda s: _number(s["starved"], ".0%")),
    ("blocked (output full)", "blocked", lambda s: _number(s["blocked"], ".0%")),
)
"""Of each row its label, the key that a stage (and perhaps a step) has for it, and the cell."""


def outlook(report: Record, *, cpus: int | None = None, gpus: int | None = None) -> Group:
    """What this run's costs say of other machines and allocations.

    Args:
        cpus: cores, and at most as many actors; None: those of the run's own machine.
        gpus: for stages whose actors hold one; None: as many as the run had.

    Raises:
        ValueError: no stage has finished a shard, so nothing is known of what it costs.
    """
    costs, here = planner.of_report(report)
    ran = planner.outlook(costs, here, {cost.name: cost.actors for cost in costs})
    # On its own machine a run may have more actors than cores, where they wait. --cpus is a budget.
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
        said = _number(seen.images_per_s if rate is None else rate, ".0f")
        table.add_row(name, said, limit, *counts)

    machine = f"{there.cores:g} CPUs"
    if there.gpus and any(cost.on_gpu for cost in costs):
        machine += f", {there.gpus} GPU{'s' if there.gpus > 1 else ''}"
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
    cost_line = f"ms an image: {millis}; Ray itself {1000 * here.overhead_s:.2f} CPU"
    instead = forms.best_instead(report, there)
    return Group(Text(cost_line), table, *([Text(instead)] if instead else []), gains)


def notes(report: Record) -> list[str]:
    """What a person should know of the run beside its numbers, a sentence each."""
    lines = []
    if form := forms.said(report.get("writing")):
        lines.append(form)
    if kept := report.get("images_damaged_kept"):
        lines.append(f"{kept} of those out are damaged, and were kept (--damaged keep)")
    if skipped := report.get("skipped"):
        left_out = sorted(skipped.items(), key=lambda item: -item[1])
        said = ", ".join(f"{count} {suffix}" for suffix, count in left_out)
        lines.append(f"left out of the listing: {said}")
    if dropped := report.get("boxes_dropped"):
        lines.append(f"{dropped} boxes could not be used and were dropped (boxes_dropped.parquet)")
    frames = report.get("boxes_from") or {}
    if moved := sum(count for kind, count in frames.items() if kind != "unclear"):
        lines.append(
            f"the boxes of {moved} images were drawn in another frame than the picture's, and moved"
        )
    if "unclear" in frames:
        lines.append(
            f"the boxes of {frames['unclear']} images are taken as upright: "
            "sizes cannot tell whether they are"
        )
    return lines


def terminal(report: Record) -> Group:
    """The report at the end of a run: fits a terminal of 80 columns."""
    table = Table("", header_style="bold", box=box.SIMPLE_HEAD)
    shown = columns(report["stages"])
    for name, _, is_step in shown:
        table.add_column(name, justify="right", style="dim" if is_step else "")
    for label, key, cell in _ROWS:
        # A step has no actors of its own, and no memory.
        cells = ("" if is_step and key not in of else cell(of) for _, of, is_step in shown)
        table.add_row(label, *cells)
    verdict_text = Text("verdict: ", style="bold") + Text(
        report["verdict"]["reason"], style="not bold"
    )
    stages = [table] if report["stages"] else []
    lines = (Text(line) for line in (*_totals(report), *notes(report)))
    return Group(*lines, *stages, *_nodes(report), verdict_text, *_advice(report))


def _nodes(report: Record) -> list[Table]:
    """A table of the nodes of a cluster; of one machine none."""
    if not (rows := rows_of(report)):
        return []
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for name in HEAD:
        table.add_column(name, justify="left" if name in HEAD[:2] else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return [table]


def _totals(report: Record) -> list[str]:
    before = unread = ""
    if report["images_done_before"]:
        before = f" ({report['images_done_before']} of them by an earlier run)"
    if report.get("images_unread"):
        unread = f" + {report['images_unread']} not read"
    use = machine_use(report.get("stages_cpu_percent"), report.get("other_cpu_percent"))
    lines = [
        f"{report['images_in']} images in = {report['images_out']} out + "
        f"{report['images_rejected']} rejected{unread}{before}",
        f"{_number(report['steady_images_per_s'], '.0f')} images/s once running, "
        f"{_number(report['images_per_s'], '.0f')} from start to end",
        f"{_number(report['setup_s'], '.1f')} s to list and start Ray, then "
        f"{_number(report['wall_s'], '.1f')} s, first output after "
        f"{_number(report['first_output_s'], '.1f')} s",
        f"machine {_number(report['cpu_percent'], '.0f')}% busy{use and f': {use}'}",
    ]
    if (store := report.get("object_store_peak_bytes")) is not None:
        lines.append(
            f"memory: private to each stage below; Ray's object store {store / 1e6:.0f} MB at most"
        )
    if report["rejects_by_reason"]:
        reasons = sorted(report["rejects_by_reason"].items(), key=lambda item: -item[1])
        lines.append("rejected: " + ", ".join(f"{count} {reason}" for reason, count in reasons))
    return lines


def _advice(report: Record) -> list[Text]:
    """The two best changes that bring more than 2%."""
    measured = report["steady_images_per_s"] or report["images_per_s"] or 0.0
    gains = [
        advice
        for advice in report["verdict"]["advice"]
        if advice["predicted_images_per_s"] > 1.02 * measured
    ]
    return [
        Text(
            f"  {gain['change']}: about {gain['predicted_images_per_s']:.0f} images/s expected",
            style="dim",
        )
        for gain in gains[:2]
    ]
