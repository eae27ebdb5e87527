"""Figures as inline SVG, without a script: the timeline of a run, and parts of any figure.

Figures have no fixed size. Lines stretch to the width (a nested `viewBox`, strokes that do not
scale) and text is placed in percent, so it is as readable on a phone as on a wide screen. Colours
are CSS classes of raypipe.insight.html.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median

from raypipe.insight.markup import (
    ARROW,
    bytes_unit,
    duration,
    known,
    number,
    swatch,
    table,
    tag,
    text,
)
from raypipe.insight.states import STATES

COLUMNS = 150
"""Points of a line at most: 3600 a stage would make a page of several MB, and look the same."""

COLOURS = 6
"""Colours of stages; a seventh stage has the first one's again."""


def colours(report: dict) -> dict[str, str]:
    """The CSS class of each stage, in pipeline order: the same in all figures."""
    names = [s.get("name") for s in report.get("stages") or []] + [
        r.get("stage") for r in report.get("timeline") or []
    ]
    known_names = dict.fromkeys(str(name) for name in names if name is not None)
    return {name: f"s{place % COLOURS}" for place, name in enumerate(known_names)}


@dataclass(frozen=True, kw_only=True)
class _Times:
    """The timeline in at most COLUMNS columns of equal width, and the time axis."""

    width_s: float
    joined: int  # buckets in a column
    count: int
    end_s: float  # of the axis
    cells: dict[tuple[str, int], list[dict]]

    @property
    def unit(self) -> tuple[float, str]:
        return (
            (1.0, "seconds")
            if self.end_s <= 120
            else (60.0, "minutes")
            if self.end_s <= 7200
            else (3600.0, "hours")
        )

    def values(
        self, stage: str, key: str, join: Callable[[list[float]], float] = fmean
    ) -> list[float | None]:
        """One value a column, None where nothing was measured."""
        found = [
            [known(record.get(key)) for record in self.cells.get((stage, column), [])]
            for column in range(self.count)
        ]
        measured = [[value for value in values if value is not None] for values in found]
        return [join(values) if values else None for values in measured]


@dataclass(frozen=True, kw_only=True)
class _Event:
    t_s: float
    said: str
    colour: str


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One series of a figure. `heights`: where it is drawn, if it stands on top of others."""

    name: str
    colour: str
    values: list[float | None]
    heights: list[float | None] | None = None
    kind: str = "line"  # or steps, area


def _events(report: dict) -> list[_Event]:
    colour_of = colours(report)
    found = []
    for event in report.get("scale_events") or []:
        stage, t_s = str(event.get("stage")), known(event.get("t_s"))
        if t_s is not None:
            short = stage if len(stage) <= 16 else stage[:15] + "\N{HORIZONTAL ELLIPSIS}"
            said = f"{short} {number(event.get('from'))}{ARROW}{number(event.get('to'))}"
            found.append(_Event(t_s=max(t_s, 0.0), said=said, colour=colour_of.get(stage, "none")))
    return sorted(found, key=lambda event: event.t_s)


def _times(report: dict, events: list[_Event]) -> _Times | None:
    records = [
        (t_s, r)
        for r in report.get("timeline") or []
        if (t_s := known(r.get("t_s"))) is not None and 0 <= t_s < 1e9
    ]
    if not records:
        return None
    starts = sorted({t_s for t_s, _ in records})
    bucket = max(median([after - before for before, after in pairwise(starts)] or [1.0]), 1e-3)
    joined = math.ceil((starts[-1] / bucket + 1) / COLUMNS)
    width = bucket * joined
    cells: dict[tuple[str, int], list[dict]] = {}
    for t_s, record in records:
        cells.setdefault((str(record.get("stage")), int(t_s / width + 1e-6)), []).append(record)
    count = 1 + max(column for _, column in cells)
    end = max([count * width, known(report.get("wall_s")) or 0.0, *(event.t_s for event in events)])
    return _Times(width_s=width, joined=joined, count=count, end_s=end, cells=cells)


def over_time(report: dict) -> str:
    """All figures over time, and the list of scale events."""
    events = _events(report)
    times = _times(report, events)
    if times is None:
        return tag("p", "Nothing was measured over time: no actor got as far as its first report.")
    colour_of = colours(report)

    def lines(
        key: str, *, join: Callable[[list[float]], float] = fmean, kind: str = "line"
    ) -> list[_Line]:
        found = [
            _Line(name=name, colour=colour, values=times.values(name, key, join), kind=kind)
            for name, colour in colour_of.items()
        ]
        return [line for line in found if any(value is not None for value in line.values)]

    figures = [
        _figure(times, events, "Throughput", "images/s", lines("images_per_s"), label=True),
        _figure(
            times,
            events,
            "Actors",
            "",
            lines("actors", join=lambda values: values[-1], kind="steps"),
            label=True,
            whole=True,
        ),
        *(
            _figure(
                times, events, name, "% of its actors' time", _states(times, name, colour), top=100
            )
            for name, colour in colour_of.items()
        ),
        _figure(times, events, "CPU", "cores used", lines("cpu_cores")),
        _figure(times, events, *_memory(lines)),
        _figure(times, events, "GPU", "% busy", lines("gpu_percent"), top=100),
    ]
    listed = table(
        ["after", "actors"],
        [[duration(event.t_s), swatch(event.said, event.colour)] for event in events],
        "Scale events",
    )
    how = ": their mean, for memory their highest" if times.joined > 1 else ""
    each = f"Each point is {duration(times.width_s)}{how}."
    return (
        tag("p", each, class_="dim")
        + tag("div", *figures, class_="figures")
        + (
            tag("details", tag("summary", f"Scale events ({len(events)})"), listed)
            if events
            else ""
        )
    )


def _memory(lines: Callable[..., list[_Line]]) -> tuple[str, str, list[_Line]]:
    """Title, unit and lines: private memory, or RSS in the reports of older versions.

    No process has 0 bytes: that is a second in which no actor reported.
    """
    private = lines("private_bytes", join=max)
    found = private or lines("rss_bytes", join=max)
    highest = max((value or 0.0 for line in found for value in line.values), default=0.0)
    size, unit = bytes_unit(highest)
    scaled = [
        replace(line, values=[value / size if value else None for value in line.values])
        for line in found
    ]
    title = "Memory (private)" if private else "Memory (RSS)"
    return title, unit, [line for line in scaled if any(line.values)]


def _states(times: _Times, stage: str, colour: str) -> list[_Line]:
    """Busy, starved and blocked in percent, stacked. A column without all three stays empty."""
    columns = [
        [100 * (share or 0.0) / sum(shares) for share in shares]
        if None not in shares and sum(shares) > 0
        else None
        for shares in zip(*(times.values(stage, state) for state in STATES), strict=True)
    ]
    lines = [
        _Line(
            name=state,
            colour=colour if state == "busy" else state,
            values=[None if shares is None else shares[place] for shares in columns],
            heights=[None if shares is None else sum(shares[: place + 1]) for shares in columns],
            kind="area",
        )
        for place, state in enumerate(STATES)
    ]
    return lines if any(columns) else []


def ticks(top: float, most: int, *, whole: bool = False) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten up to `top`; at most `most` steps."""
    top = top if top > 1e-9 else 1.0
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= top / most * 0.999)
    step = max(step, 1.0) if whole else step
    return [round(i * step, 12) for i in range(math.ceil(top / step - 1e-6) + 1)]


def tick(value: float) -> str:
    return f"{value / 1000:,g}k" if abs(value) >= 10_000 else f"{value:,g}"


def _runs(values: list[float | None], reach: int) -> Iterator[list[tuple[int, float]]]:
    """(column, value) of values at most `reach` columns apart."""
    run: list[tuple[int, float]] = []
    for column, value in enumerate(values):
        if value is None:
            continue
        if run and column - run[-1][0] > reach:
            yield run
            run = []
        run.append((column, value))
    if run:
        yield run


def _path(line: _Line, times: _Times, top: float) -> str:
    """The `d` of an SVG path, in a square of 1000."""

    def x(column: float) -> str:
        return f"{1000 * column * times.width_s / times.end_s:.4g}"

    def y(value: float) -> str:
        return f"{1000 * (1 - min(max(value / top, 0.0), 1.0)):.4g}"

    parts = []
    # Actors report about once a second: a second or two without a report are no gap.
    for run in _runs(line.heights or line.values, max(1, 3 // times.joined)):
        first, last = run[0][0], run[-1][0]
        if line.kind == "line":
            points = [(x(column + 0.5), y(value)) for column, value in run]
            if first == last:  # alone: as long as its column, or nobody would see it
                points = [(x(first), points[0][1]), (x(last + 1), points[0][1])]
            parts.append("M" + "L".join(f"{right} {down}" for right, down in points))
            continue
        ends = [*(column for column, _ in run[1:]), last + 1]
        steps = "".join(f"V{y(value)}H{x(end)}" for (_, value), end in zip(run, ends, strict=True))
        parts.append(
            f"M{x(first)} 1000{steps}V1000Z"
            if line.kind == "area"
            else f"M{x(first)} {y(run[0][1])}{steps}"
        )
    return "".join(parts)


def apart(spans: Sequence[tuple[float, float]], most: int) -> list[int | None]:
    """For each span a row in which it covers no earlier one; None where all `most` are taken."""
    taken: list[list[tuple[float, float]]] = [[] for _ in range(most)]
    rows: list[int | None] = []
    for start, end in spans:
        row = next(
            (i for i, others in enumerate(taken) if all(end <= a or b <= start for a, b in others)),
            None,
        )
        if row is not None:
            taken[row].append((start, end))
        rows.append(row)
    return rows


def _event_marks(times: _Times, events: list[_Event], *, label: bool) -> tuple[str, int]:
    """SVG of the vertical lines, and how many rows of labels are above the figure."""
    places = [event.t_s / times.end_s for event in events]
    # A letter takes 1/44 of the narrowest figure. Labels in the right half end at their line.
    spans = [
        (p - w, p) if p > 0.5 else (p, p + w)
        for p, w in ((p, (len(e.said) + 2) / 44) for p, e in zip(places, events, strict=True))
    ]
    rows = apart(spans, 4) if label else [None] * len(events)
    marks, labels = [], []
    for event, place, row in zip(events, places, rows, strict=True):
        x, y = f"{100 * place:.4g}%", 0 if row is None else -8 - 15 * row
        marks.append(tag("line", class_=f"event {event.colour}", x1=x, x2=x, y1=y, y2="100%"))
        if row is not None:
            side = {"dx": -4, "text_anchor": "end"} if place > 0.5 else {"dx": 4}
            labels.append(tag("text", text(event.said), class_="said", x=x, y=y + 6, **side))
    return "".join(marks + labels), 1 + max((row for row in rows if row is not None), default=-1)


def along_axis(said: str) -> str:
    """The name of the horizontal axis."""
    return tag("text", text(said), x="100%", y="100%", dy="2.9em", text_anchor="end")


def levels(ticks: Sequence[float], height: Callable[[float], float]) -> str:
    """Horizontal lines with their values; `height` is 0 at the bottom and 1 at the top."""
    parts = []
    for value in ticks:
        y = f"{100 * (1 - height(value)):.4g}%"
        parts.append(tag("line", class_="grid", x2="100%", y1=y, y2=y))
        parts.append(tag("text", tick(value), x=-6, y=y, dy=".35em", text_anchor="end"))
    return "".join(parts)


def _axes(times: _Times, y_ticks: list[float]) -> str:
    seconds, unit = times.unit
    parts = [
        along_axis(f"{unit} since the start"),
        levels(y_ticks, lambda value: value / y_ticks[-1]),
    ]
    for value in ticks(times.end_s / seconds, 6):
        if value * seconds <= times.end_s * 1.001:
            x = f"{100 * value * seconds / times.end_s:.4g}%"
            parts.append(tag("text", tick(value), x=x, y="100%", dy="1.5em", text_anchor="middle"))
    return "".join(parts)


def _hits(times: _Times, events: list[_Event], lines: list[_Line]) -> str:
    """For each column an invisible strip that shows its figures when pointed at."""
    seconds, unit = times.unit
    strips = []
    for column in range(times.count):
        if any(line.values[column] is not None for line in lines):
            start, end = column * times.width_s, (column + 1) * times.width_s
            said = [f"{line.name} {number(line.values[column])}" for line in lines]
            said += [event.said for event in events if start <= event.t_s < end]
            title = tag("title", text(f"{number(start / seconds)} {unit}: {', '.join(said)}"))
            x, width = (f"{1000 * value / times.end_s:.4g}" for value in (start, times.width_s))
            strips.append(tag("rect", title, class_="hit", x=x, width=width, height=1000))
    return "".join(strips)


def _summary(line: _Line) -> str:
    known = [value for value in line.values if value is not None]
    return f"{line.name}: mean {number(fmean(known))}, highest {number(max(known))}."


def _figure(
    times: _Times,
    events: list[_Event],
    title: str,
    unit: str,
    lines: list[_Line],
    *,
    label: bool = False,
    whole: bool = False,
    top: float | None = None,
) -> str:
    """A figure with axes and legend; empty without lines.

    Args:
        label: name the scale events.
        whole: no half ticks.
        top: end of the vertical axis; None: the highest value.
    """
    if not lines:
        return ""
    y_ticks = ticks(
        top or max(value for line in lines for value in line.values if value is not None),
        4,
        whole=whole,
    )
    marks, rows = _event_marks(times, events, label=label)
    # Of lines that coincide the first is the thickest, so that all are visible.
    widths = [
        {"style": f"stroke-width:{2 * (len(lines) - i)}px"} if line.kind == "steps" else {}
        for i, line in enumerate(lines)
    ]
    paths = [
        tag("path", class_=f"{line.kind} {line.colour}", d=_path(line, times, y_ticks[-1]), **width)
        for line, width in zip(lines, widths, strict=True)
    ]
    if lines[0].kind == "area":
        paths.reverse()  # each reaches down to 0, so the lowest must lie on top
    stretched = {"class_": "in", "viewBox": "0 0 1000 1000", "preserveAspectRatio": "none"}
    plot = [
        _axes(times, y_ticks),
        tag("svg", *paths, **stretched),
        marks,
        tag("svg", _hits(times, events, lines), **stretched),
    ]
    summaries = " ".join(map(_summary, lines))
    spoken = f"{title}{unit and f' in {unit}'} over {duration(times.end_s)}. {summaries}"
    legend = [swatch(line.name, line.colour) for line in lines]
    return framed(
        title,
        unit,
        legend,
        plot,
        spoken=spoken,
        class_="plot",
        style=f"margin-top:{10 + 15 * rows}px",
    )


def framed(
    title: str,
    unit: str,
    legend: Sequence[str],
    plot: Sequence[str],
    *,
    spoken: str,
    **attributes: str,
) -> str:
    """A figure with its title, unit, legend and plot; `spoken` is what a screen reader says."""
    named = tag(
        "figcaption",
        tag("h3", text(title)),
        tag("span", text(unit), class_="unit"),
        tag("span", *legend, class_="legend"),
    )
    return tag("figure", named, tag("svg", *plot, role="img", aria_label=spoken, **attributes))


def bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """A bar chart of (name, length, what to print at its end, colour); name and print are HTML."""
    longest = max((length for _, length, _, _ in rows), default=0) or 1
    drawn = [
        (name, tag("i", class_=colour, style=f"width:{max(60 * length / longest, 0):.1f}%"), said)
        for name, length, said, colour in rows
    ]
    return tag(
        "dl",
        *(tag("dt", name) + tag("dd", bar, tag("b", said)) for name, bar, said in drawn),
        class_="bars",
    )
