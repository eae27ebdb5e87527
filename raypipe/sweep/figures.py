"""The figures of a sweep: what was measured, over actors, writers, workers and cores."""

from collections.abc import Mapping, Sequence

from raypipe.insight.figures import COLOURS as SO_MANY
from raypipe.insight.figures import bars
from raypipe.insight.markup import known, number, tag, text
from raypipe.sweep import advice
from raypipe.sweep.charts import Series, chart
from raypipe.sweep.curves import BACKENDS, Record, Spot, Where, curve, held_up, ideal, three

COLOURS = {"opencv": "s0", "torchvision": "s1"}
NAMES = {"opencv": "OpenCV", "torchvision": "torchvision"}


def delays(where: Where) -> str:
    """What was delayed on purpose, for every figure; empty without a delay."""
    said = [
        f"{ms:g} ms longer to {what}"
        for what, ms in (("read", where.read_ms), ("write", where.store_ms))
        if ms
    ]
    return f"Every image takes {' and '.join(said)}, as from a slow store." if said else ""


def _series(
    spots: Sequence[Spot],
    key: str,
    backend: str,
    where: Where,
    *,
    name: str = "",
    scale: float = 1.0,
) -> Series | None:
    """A line of medians, from the lowest to the highest repeat."""
    points = []
    for spot in spots:
        values = [scale * value for value in spot.values(key)]
        if values:
            points.append(
                (float(spot.count), scale * (spot.median(key) or 0.0), min(values), max(values))
            )
    return (
        Series(
            name=name or NAMES[backend], colour=COLOURS[backend], points=points, beyond=where.cores
        )
        if points
        else None
    )


def _mark(where: Where) -> tuple[float, str]:
    return where.cores, f"{where.cores:g} core{'' if where.cores == 1 else 's'}"


def _span(lines: Sequence[Series]) -> tuple[float, float] | None:
    """The lowest and the highest value of lines, with a margin."""
    values = [value for line in lines for _, _, *ends in line.points for value in ends]
    return (0.98 * min(values), 1.02 * max(values)) if values else None


def _time_span(records: Sequence[Record], where: Where) -> tuple[float, float]:
    """The same for all figures of time without training, so that they compare."""
    times = [
        time
        for r in records
        if r["kind"] in ("preprocess", "fused") and (time := known(r.get("time_s")))
    ]
    for backend in BACKENDS if times else ():
        times += [time for _, time in ideal(curve(records, backend=backend), where.cores)]
    return (0.98 * min(times), 1.02 * max(times)) if times else (1.0, 2.0)


def _time(
    records: Sequence[Record],
    where: Where,
    writing: str,
    title: str,
    along: str,
    *,
    beside: str = "",
) -> str:
    """Time, with the ideal, or `beside`: with that of other writing as a yardstick."""
    lines: list[Series] = []
    for backend in BACKENDS:
        spots = curve(records, backend=backend, writing=writing)
        line = _series(spots, "time_s", backend, where)
        if line is not None:
            lines.append(line)
            best = [
                (float(count), time_s, time_s, time_s)
                for count, time_s in ideal(spots, where.cores)
            ]
            name = "ideal"
            if beside:
                other = _series(
                    curve(records, backend=backend, writing=beside), "time_s", backend, where
                )
                best, name = (list(other.points) if other else []), "as many writers"
            if len(best) > 1:
                lines.append(Series(name=name, colour=COLOURS[backend], points=best, dashed=True))
    return chart(title, "s", lines, along=along, span=_time_span(records, where), mark=_mark(where))


def _cpu(
    records: Sequence[Record],
    where: Where,
    writing: str,
    title: str,
    along: str,
    *,
    beside: bool = False,
) -> str:
    """CPU use. `beside`: with that of preprocessing only as a yardstick."""
    lines = []
    for backend in BACKENDS:
        spots = curve(records, backend=backend, writing=writing)
        line = _series(spots, "cpu_percent", backend, where)
        if line is None:
            continue
        lines.append(line)
        alone = _series(
            curve(records, backend=backend),
            "cpu_percent",
            backend,
            where,
            name="preprocessing only",
        )
        if beside and alone is not None and len(alone.points) > 1:
            lines.append(
                Series(name=alone.name, colour=alone.colour, points=alone.points, dashed=True)
            )
    return chart(title, "% of all cores", lines, along=along, top=100, mark=_mark(where))


def _threads(records: Sequence[Record], where: Where) -> str:
    """CPU use by threads of an actor, where several numbers were measured."""
    only = [r for r in records if r["kind"] == "preprocess" and r["writers"] == 0]
    counts = sorted({r["threads"] for r in only})
    lines = []
    for place, threads in enumerate(counts if len(counts) > 1 else []):
        for backend in BACKENDS:
            name = f"{NAMES[backend]}, {threads} thread{'s' if threads > 1 else ''}"
            line = _series(
                curve(only, backend=backend, threads=threads),
                "cpu_percent",
                backend,
                where,
                name=name,
            )
            if line is not None:
                lines.append(
                    Series(
                        name=name,
                        colour=f"s{(2 * place + BACKENDS.index(backend)) % SO_MANY}",
                        points=line.points,
                        beyond=line.beyond,
                    )
                )
    return chart(
        "CPU by threads an actor",
        "% of all cores",
        lines,
        along="preprocess actors",
        top=100,
        mark=_mark(where),
    )


def _blocked(records: Sequence[Record], where: Where) -> str:
    lines = []
    records = [{**record, "held_up": held_up(record)} for record in records]
    for backend in BACKENDS:
        spots = curve(records, backend=backend, writing="one")
        busy = _series(
            spots,
            "write_busy",
            backend,
            where,
            name=f"{NAMES[backend]}: the writer is busy",
            scale=100,
        )
        held = _series(
            spots,
            "held_up",
            backend,
            where,
            name=f"{NAMES[backend]}: actors are held up",
            scale=100,
        )
        lines += [held] if held else []
        if busy is not None and len(busy.points) > 1:
            lines.append(
                Series(name=busy.name, colour=busy.colour, points=busy.points, dashed=True)
            )
    return chart(
        "One writer: who waits for whom",
        "% of their time",
        lines,
        along="preprocess actors",
        top=100,
        mark=_mark(where),
    )


def _three(records: Sequence[Record]) -> str:
    rows = []
    for backend in BACKENDS:
        spots = three(records, backend)
        names = {
            "one": "1 writer",
            "same": f"{spots['same'].count} writers" if spots else "",
            "none": "nothing written",
        }
        for writing, spot in spots.items():
            time_s = spot.median("time_s")
            rows.append(
                (
                    text(f"{NAMES[backend]}, {names[writing]}"),
                    time_s or 0.0,
                    number(time_s, " s"),
                    COLOURS[backend],
                )
            )
    if not rows:
        return ""
    count = next(iter(three(records, b) for b in BACKENDS if three(records, b)))["same"].count
    caption = tag(
        "figcaption",
        tag("h3", f"One writer, {count} writers, none"),
        tag("span", f"s, with {count} actors", class_="unit"),
    )
    return tag("figure", caption, bars(rows))


def _budgets(records: Sequence[Record], where: Where) -> str:
    lines = []
    chosen = advice.choices(records, where, writing=False)
    for backend in BACKENDS:
        points = [
            (float(c.cores), c.images_per_s, c.images_per_s, c.images_per_s)
            for c in chosen
            if c.backend == backend
        ]
        if points:
            lines.append(Series(name=NAMES[backend], colour=COLOURS[backend], points=points))
    return chart(
        "Expected of cores, nothing written",
        "images/s",
        lines,
        along="cores",
        span=_span(lines),
        mark=_mark(where),
    )


def _trained(
    records: Sequence[Record],
    where: Where,
    *,
    over: str,
    fixed: str,
    keys: Mapping[str, str],
    title: str,
    unit: str,
) -> str:
    """Training by actors or workers, on GPUs if there are any.

    Args:
        keys: of a record, each with what to call it beside the backend.
    """
    devices = {r["device"] for r in records if r["kind"] == "train"}
    device = "gpu" if "gpu" in devices else "cpu"
    lines = []
    for backend in BACKENDS:
        spots = curve(
            records,
            backend=backend,
            kind="train",
            over=over,
            where=lambda r: r["device"] == device and r[fixed] == 1,
        )
        for place, (key, called) in enumerate(keys.items()):
            name = f"{NAMES[backend]}{called}"
            line = _series(spots, key, backend, where, name=name)
            if line is not None:
                lines.append(
                    Series(
                        name=name,
                        colour=line.colour,
                        points=line.points,
                        beyond=line.beyond,
                        dashed=place > 0,
                    )
                )
    along = (
        "preprocess actors" if over == "actors" else f"training workers, a {device.upper()} each"
    )
    on = f", on {device.upper()}"
    if unit == "s":
        return chart(title + on, "s", lines, along=along, span=_span(lines), mark=_mark(where))
    return chart(title + on, unit, lines, along=along, top=100, mark=_mark(where))


def figures(records: Sequence[Record], where: Where) -> dict[str, str]:
    """The figures by name, as HTML; those without a measurement are left out.

    Args:
        records: of a sweep (raypipe.sweep.measure.RESULTS).
    """
    actors, both = "preprocess actors", "preprocess actors, with as many writers"
    drawn = {
        "alone": _time(records, where, "none", "Preprocessing only: time", actors),
        "alone-cpu": _cpu(records, where, "none", "Preprocessing only: CPU", actors),
        "threads": _threads(records, where),
        "one": _time(records, where, "one", "One writer: time", actors),
        "one-cpu": _cpu(records, where, "one", "One writer: CPU", actors, beside=True),
        "blocked": _blocked(records, where),
        "same": _time(records, where, "same", "As many writers as actors: time", both),
        "three": _three(records),
        "same-cpu": _cpu(
            records, where, "same", "As many writers as actors: CPU", both, beside=True
        ),
        "fused": _time(
            records, where, "fused", "Actors that write themselves: time", actors, beside="same"
        ),
        "budgets": _budgets(records, where),
        "train": _trained(
            records,
            where,
            over="actors",
            fixed="workers",
            keys={"time_s": ""},
            title="Training: time",
            unit="s",
        ),
        "train-use": _trained(
            records,
            where,
            over="actors",
            fixed="workers",
            keys={"gpu_percent": ": GPU", "preprocess_cpu_percent": ": CPU for preprocessing"},
            title="Training: what is used",
            unit="% of GPU, of all cores",
        ),
        "workers": _trained(
            records,
            where,
            over="workers",
            fixed="actors",
            keys={"time_s": ""},
            title="1 actor, more workers: time",
            unit="s",
        ),
    }
    note = delays(where)
    said = tag("p", note, class_="dim") if note else ""
    return {name: figure + said for name, figure in drawn.items() if figure}
