"""Figures as inline SVG, without a script: a run's timeline, and the charts of a sweep.

They have no fixed size: lines are stretched to the width there is (a nested `viewBox`, strokes that do not scale), text is placed in
percent, so it is as readable on a phone as on a wide screen. The colours are CSS classes: raypipe.insight.html has them.
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

COLUMNS = 150
"""Points of a line at most: more cannot be told apart, and 3600 a stage would make a page of several MB."""

COLOURS = 6
"""Stage colours there are; a seventh stage has the first one's again."""

STATES = ("busy", "starved", "blocked")


def colours(report: dict) -> dict[str, str]:
    """The CSS class of each stage, in pipeline order: the same in all figures."""
    names = [s.get("name") for s in report.get("stages") or []] + [
        r.get("stage") for r in report.get("timeline") or []
    ]
    known_names = dict.fromkeys(str(name) for name in names if name is not None)
    return {name: f"s{place % COLOURS}" for place, name in enumerate(known_names)}


@dataclass(frozen=True, kw_only=True)
class _Times:
    """The timeline in columns of equal width, at most COLUMNS of them, and the time axis."""

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
    """One series of a figure. `heights` is where it is drawn, if not at its values: on top of others."""

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
        _figure(times, events, "Memory (RSS)", *_memory(lines("rss_bytes", join=max))),
        _figure(times, events, "GPU", "% busy", lines("gpu_percent"), top=100),
    ]
    listed = table(
        ["after", "actors"],
        [[duration(event.t_s), swatch(event.said, event.colour)] for event in events],
        "Scale events",
    )
    each = f"Each point is {duration(times.width_s)}{': their mean, for memory their highest' if times.joined > 1 else ''}."
    return (
        tag("p", each, class_="dim")
        + tag("div", *figures, class_="figures")
        + (
            tag("details", tag("summary", f"Scale events ({len(events)})"), listed)
            if events
            else ""
        )
    )


def _memory(lines: list[_Line]) -> tuple[str, list[_Line]]:
    """The unit, and the lines in it. No process has 0 bytes: that is a second in which no actor reported."""
    size, unit = bytes_unit(
        max((value or 0.0 for line in lines for value in line.values), default=0.0)
    )
    found = [
        replace(line, values=[value / size if value else None for value in line.values])
        for line in lines
    ]
    return unit, [line for line in found if any(line.values)]


def _states(times: _Times, stage: str, colour: str) -> list[_Line]:
    """busy, starved, blocked in percent, stacked. A column without all three stays empty."""
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


def _ticks(top: float, most: int, *, whole: bool = False) -> list[float]:
    """0, and multiples of 1, 2 or 5 times a power of ten until `top` is reached; `most` steps at most."""
    top = top if top > 1e-9 else 1.0
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= top / most * 0.999)
    step = max(step, 1.0) if whole else step
    return [round(i * step, 12) for i in range(math.ceil(top / step - 1e-6) + 1)]


def _tick(value: float) -> str:
    return f"{value / 1000:,g}k" if abs(value) >= 10_000 else f"{value:,g}"


def _runs(values: list[float | None], reach: int) -> Iterator[list[tuple[int, float]]]:
    """(column, value) of what belongs together: with `reach` columns at most from one to the next."""
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
    # Actors report about once a second: a second or two without a report is no gap.
    for run in _runs(line.heights or line.values, max(1, 3 // times.joined)):
        first, last = run[0][0], run[-1][0]
        if line.kind == "line":
            points = [(x(column + 0.5), y(value)) for column, value in run]
            if first == last:  # alone: as long as what it stands for, or nobody would see it
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


def _rows(spans: Sequence[tuple[float, float]], most: int) -> list[int | None]:
    """For each span a row in which it covers no earlier one; None where there is none among `most`."""
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
    # A letter takes 1/44 of the narrowest figure. Labels in the right half end at their line, the others start there.
    spans = [
        (p - w, p) if p > 0.5 else (p, p + w)
        for p, w in ((p, (len(e.said) + 2) / 44) for p, e in zip(places, events, strict=True))
    ]
    rows = _rows(spans, 4) if label else [None] * len(events)
    marks, labels = [], []
    for event, place, row in zip(events, places, rows, strict=True):
        x, y = f"{100 * place:.4g}%", 0 if row is None else -8 - 15 * row
        marks.append(tag("line", class_=f"event {event.colour}", x1=x, x2=x, y1=y, y2="100%"))
        if row is not None:
            side = {"dx": -4, "text_anchor": "end"} if place > 0.5 else {"dx": 4}
            labels.append(tag("text", text(event.said), class_="said", x=x, y=y + 6, **side))
    return "".join(marks + labels), 1 + max((row for row in rows if row is not None), default=-1)


def _along(said: str) -> str:
    """The name of the horizontal axis."""
    return tag("text", text(said), x="100%", y="100%", dy="2.9em", text_anchor="end")


def _levels(ticks: Sequence[float], height: Callable[[float], float]) -> str:
    """Lines across, with their values; `height` is 0 at the bottom and 1 at the top."""
    parts = []
    for value in ticks:
        y = f"{100 * (1 - height(value)):.4g}%"
        parts.append(tag("line", class_="grid", x2="100%", y1=y, y2=y))
        parts.append(tag("text", _tick(value), x=-6, y=y, dy=".35em", text_anchor="end"))
    return "".join(parts)


def _axes(times: _Times, y_ticks: list[float]) -> str:
    seconds, unit = times.unit
    parts = [_along(f"{unit} since the start"), _levels(y_ticks, lambda value: value / y_ticks[-1])]
    for value in _ticks(times.end_s / seconds, 6):
        if value * seconds <= times.end_s * 1.001:
            x = f"{100 * value * seconds / times.end_s:.4g}%"
            parts.append(tag("text", _tick(value), x=x, y="100%", dy="1.5em", text_anchor="middle"))
    return "".join(parts)


def _hits(times: _Times, events: list[_Event], lines: list[_Line]) -> str:
    """For each column an invisible strip that tells its figures when pointed at."""
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
    """A figure with axes and legend; nothing if there is nothing to show. `label`: name the scale events; `whole`: no half ticks."""
    if not lines:
        return ""
    y_ticks = _ticks(
        top or max(value for line in lines for value in line.values if value is not None),
        4,
        whole=whole,
    )
    marks, rows = _event_marks(times, events, label=label)
    # Of lines that fall together the first is the thickest, so that all are seen.
    widths = [
        {"style": f"stroke-width:{2 * (len(lines) - i)}px"} if line.kind == "steps" else {}
        for i, line in enumerate(lines)
    ]
    paths = [
        tag("path", class_=f"{line.kind} {line.colour}", d=_path(line, times, y_ticks[-1]), **width)
        for line, width in zip(lines, widths, strict=True)
    ]
    if lines[0].kind == "area":
        paths.reverse()  # each reaches down to 0, so the lowest lies on top
    stretched = {"class_": "in", "viewBox": "0 0 1000 1000", "preserveAspectRatio": "none"}
    plot = [
        _axes(times, y_ticks),
        tag("svg", *paths, **stretched),
        marks,
        tag("svg", _hits(times, events, lines), **stretched),
    ]
    spoken = f"{title}{unit and f' in {unit}'} over {duration(times.end_s)}. {' '.join(map(_summary, lines))}"
    legend = [swatch(line.name, line.colour) for line in lines]
    return _framed(
        title,
        unit,
        legend,
        plot,
        spoken=spoken,
        class_="plot",
        style=f"margin-top:{10 + 15 * rows}px",
    )


def _framed(
    title: str,
    unit: str,
    legend: Sequence[str],
    plot: Sequence[str],
    *,
    spoken: str,
    **attributes: str,
) -> str:
    """A figure: what it shows, in which unit, whose line is whose, and the plot."""
    named = tag(
        "figcaption",
        tag("h3", text(title)),
        tag("span", text(unit), class_="unit"),
        tag("span", *legend, class_="legend"),
    )
    return tag("figure", named, tag("svg", *plot, role="img", aria_label=spoken, **attributes))


# --- charts: what was measured, over how many of something there were ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. `points`: (x, y, lowest, highest); `dashed`: a yardstick, without marks; `beyond`: marks further right are hollow."""

    name: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    dashed: bool = False
    beyond: float = math.inf


def bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Rows of (name, length, what to print at its end, colour), the longest across; name and print are HTML."""
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


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last one below `low` to the first one above `high`."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [times * 10.0**power for power in powers for times in (1, 2, 5)]
    first = max(step for step in steps if step <= low)
    last = min(step for step in steps if step >= high and step > first)
    return [float(f"{step:.6g}") for step in steps if first <= step <= last]


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    along: str,
    span: tuple[float, float] | None = None,
    top: float | None = None,
    mark: tuple[float, str] | None = None,
) -> str:
    """Lines over counts, which stand apart as their ratios; nothing if there is nothing to show.

    Args:
        unit: of the values.
        along: what is counted.
        span: lowest and highest value to make room for, on an axis of ratios; so charts that are to be compared have the same one.
            None: an axis from 0.
        top: end of the axis from 0.
        mark: a count to draw a line at, and what to say of it.
    """
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    counts = sorted({x for x, *_ in points})
    left, right = math.log(counts[0]), math.log(counts[-1])

    def across(x: float) -> float:
        return 0.5 if left == right else 0.03 + 0.94 * (math.log(x) - left) / (right - left)

    if span is None:
        ticks = _ticks(top or max(point[3] for point in points), 5)
        height = _linear(ticks[-1])
    else:
        ticks = _decades(*span)
        height = _ratios(ticks[0], ticks[-1])

    plot = [_along(along), _levels(ticks, height), _count_ticks(counts, across)]
    rows = 0
    if mark is not None and counts[0] <= mark[0] <= counts[-1]:
        x = f"{100 * across(mark[0]):.4g}%"
        side = {"dx": -4, "text_anchor": "end"} if across(mark[0]) > 0.5 else {"dx": 4}
        plot.append(tag("line", class_="event none", x1=x, x2=x, y1=-18, y2="100%"))
        plot.append(tag("text", text(mark[1]), class_="said", x=x, y=-9, **side))
        rows = 1
    paths = [
        tag(
            "path",
            class_=f"{line.colour}{' ideal' if line.dashed else ''}",
            d=_joined(line, across, height),
        )
        for line in series
    ]
    plot.append(
        tag("svg", *paths, class_="in", viewBox="0 0 1000 1000", preserveAspectRatio="none")
    )
    plot += [_measured(line, unit, along, across, height) for line in series if not line.dashed]
    legend = [
        tag("span", text(line.name), class_=f"key {line.colour}{' ideal' if line.dashed else ''}")
        for line in series
    ]
    spoken = f"{title}, {unit}, over {along}. " + " ".join(
        f"{line.name}: {', '.join(f'{number(y)} at {number(x)}' for x, y, *_ in line.points)}."
        for line in series
        if not line.dashed
    )
    scale = unit if span is None else f"{unit}, log scale"
    return _framed(
        title,
        scale,
        legend,
        plot,
        spoken=spoken,
        class_="plot tall",
        style=f"margin-top:{10 + 15 * rows}px",
    )


def _linear(top: float) -> Callable[[float], float]:
    return lambda value: min(max(value / top, 0.0), 1.0)


def _ratios(low: float, high: float) -> Callable[[float], float]:
    return lambda value: min(max(math.log(value / low) / math.log(high / low), 0.0), 1.0)


def _count_ticks(counts: Sequence[float], across: Callable[[float], float]) -> str:
    """A tick at each count, and the counts themselves where one does not cover another: the last and the first first."""
    order = [counts[-1], *counts[:-1]]
    widths = [len(_tick(count)) / 44 for count in order]
    labelled = _rows(
        [
            (across(count) - width * 0.7, across(count) + width * 0.7)
            for count, width in zip(order, widths, strict=True)
        ],
        1,
    )
    parts = []
    for count, row in zip(order, labelled, strict=True):
        x = f"{100 * across(count):.4g}%"
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1="0", y2="100%"))
        if row is not None:
            parts.append(tag("text", _tick(count), x=x, y="100%", dy="1.5em", text_anchor="middle"))
    return "".join(parts)


def _joined(
    line: Series, across: Callable[[float], float], height: Callable[[float], float]
) -> str:
    """The `d` of an SVG path through the points of a line, in a square of 1000."""
    return "M" + "L".join(
        f"{1000 * across(x):.4g} {1000 * (1 - height(y)):.4g}" for x, y, *_ in line.points
    )


def _measured(
    line: Series,
    unit: str,
    along: str,
    across: Callable[[float], float],
    height: Callable[[float], float],
) -> str:
    """A mark at each point, from the lowest to the highest that was measured, which tells its figures when pointed at."""
    parts = []
    for x, y, low, high in line.points:
        place, level = f"{100 * across(x):.4g}%", f"{100 * (1 - height(y)):.4g}%"
        ends = {"y1": f"{100 * (1 - height(low)):.4g}%", "y2": f"{100 * (1 - height(high)):.4g}%"}
        said = f"{line.name}, {number(x)} {along}: {number(y)} {unit}" + (
            f" ({number(low)} to {number(high)})" if low < high else ""
        )
        parts.append(tag("line", class_=f"range {line.colour}", x1=place, x2=place, **ends))
        kind = "mark hollow" if x > line.beyond else "mark"
        parts.append(tag("circle", class_=f"{kind} {line.colour}", cx=place, cy=level, r=4))
        parts.append(
            tag("circle", tag("title", text(said)), class_="hit", cx=place, cy=level, r=10)
        )
    return "".join(parts)
