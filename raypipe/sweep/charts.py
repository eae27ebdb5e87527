"""Charts of a sweep as inline SVG: what was measured, over how many of something there were."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raypipe.insight.figures import along_axis, apart, framed, levels, tick, ticks
from raypipe.insight.markup import number, tag, text


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    `points`: (x, y, lowest, highest). `dashed`: a yardstick, without marks. `beyond`: marks further
    right are hollow.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    dashed: bool = False
    beyond: float = math.inf


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last below `low` to the first above `high`."""
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
    """Lines over counts, which are placed by their ratios; empty without a point.

    Args:
        unit: of the values.
        along: what is counted.
        span: lowest and highest value of a log axis. Charts that are to be compared have the same.
            None: an axis from 0.
        top: end of the axis from 0.
        mark: a count to draw a line at, and its label.
    """
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    counts = sorted({x for x, *_ in points})
    left, right = math.log(counts[0]), math.log(counts[-1])

    def across(x: float) -> float:
        return 0.5 if left == right else 0.03 + 0.94 * (math.log(x) - left) / (right - left)

    if span is None:
        marks = ticks(top or max(point[3] for point in points), 5)
        height = _linear(marks[-1])
    else:
        marks = _decades(*span)
        height = _ratios(marks[0], marks[-1])

    plot = [along_axis(along), levels(marks, height), _count_ticks(counts, across)]
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
    return framed(
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
    """A tick at each count, and its label where it covers no other: last and first count first."""
    order = [counts[-1], *counts[:-1]]
    widths = [len(tick(count)) / 44 for count in order]
    labelled = apart(
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
            parts.append(tag("text", tick(count), x=x, y="100%", dy="1.5em", text_anchor="middle"))
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
    """A mark at each point, with the range of the repeats; it shows its figures when pointed at."""
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
