"""A sweep's measurements -> one page: a figure and a verdict for each claim of the talk, readable offline, without a script."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from raypipe.insight import planner
from raypipe.insight.figures import COLOURS as SO_MANY
from raypipe.insight.figures import bars
from raypipe.insight.html import document, facts, section
from raypipe.insight.markup import DASH, known, number, table, tag, text
from raypipe.sweep import claims
from raypipe.sweep.charts import Series, chart
from raypipe.sweep.claims import BACKENDS, Finding, Record, Spot, Where, curve

COLOURS = {"opencv": "s0", "torchvision": "s1"}
NAMES = {"opencv": "OpenCV", "torchvision": "torchvision"}
HOLDS = {"yes": "holds", "no": "does not hold", "cannot": "cannot be shown here"}


def delays(where: Where) -> str:
    """What was made slower on purpose, as every figure is to say; empty if nothing was."""
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
    """Room for all that lines have."""
    values = [value for line in lines for _, _, *ends in line.points for value in ends]
    return (0.98 * min(values), 1.02 * max(values)) if values else None


def _time_span(records: Sequence[Record], where: Where) -> tuple[float, float]:
    """The same for all figures of time without training, so that they can be compared."""
    times = [
        time for r in records if r["kind"] == "preprocess" and (time := known(r.get("time_s")))
    ]
    for backend in BACKENDS if times else ():
        times += [time for _, time in claims.ideal(curve(records, backend=backend), where.cores)]
    return (0.98 * min(times), 1.02 * max(times)) if times else (1.0, 2.0)


def _time(records: Sequence[Record], where: Where, writing: str, title: str, along: str) -> str:
    lines: list[Series] = []
    for backend in BACKENDS:
        spots = curve(records, backend=backend, writing=writing)
        line = _series(spots, "time_s", backend, where)
        if line is not None:
            lines.append(line)
            best = [
                (float(count), time_s, time_s, time_s)
                for count, time_s in claims.ideal(spots, where.cores)
            ]
            if len(best) > 1:
                lines.append(
                    Series(name="ideal", colour=COLOURS[backend], points=best, dashed=True)
                )
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
    """CPU use; `beside`: that of preprocessing only as a yardstick."""
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
    """CPU use by the threads that an actor may use, where several numbers were measured."""
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
    records = [{**record, "held_up": claims.held_up(record)} for record in records]
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
        spots = claims.three(records, backend)
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
    count = next(iter(claims.three(records, b) for b in BACKENDS if claims.three(records, b)))[
        "same"
    ].count
    caption = tag(
        "figcaption",
        tag("h3", f"One writer, {count} writers, none"),
        tag("span", f"s, with {count} actors", class_="unit"),
    )
    return tag("figure", caption, bars(rows))


def _budgets(records: Sequence[Record], where: Where) -> str:
    lines = []
    chosen = claims.choices(records, where, writing=False)
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
    """Training by actors or workers, those on GPUs if there are any; `keys`: of a record, and what to call it beside the backend."""
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
    """The figures by what they show, as HTML; those without a measurement are left out.

    Args:
        records: of a sweep (raypipe.sweep.command.RESULTS).
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


SECTIONS = ("Preprocessing", "Which library, and how many of what", "Training")

SHOWN: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    *(
        (SECTIONS[0], name, of)
        for name, of in (("alone", (5,)), ("alone-cpu", (6,)), ("threads", (6,)), ("one", (7,)))
    ),
    *(
        (SECTIONS[0], name, of)
        for name, of in (("one-cpu", (8,)), ("blocked", (9,)), ("same", (10,)), ("three", (11,)))
    ),
    (SECTIONS[0], "same-cpu", (12, 13)),
    (SECTIONS[1], "budgets", (14,)),
    *(
        (SECTIONS[2], name, of)
        for name, of in (("train", (17,)), ("train-use", (18,)), ("workers", (19, 20)))
    ),
)
"""Section, figure, and the claims that it shows."""


def _pill(finding: Finding) -> str:
    return tag("span", HOLDS[finding.holds], class_=f"pill {finding.holds}")


def _shown(found: Mapping[int, Finding], drawn: Mapping[str, str], title: str) -> str:
    """A section's figures, each with the claims that it shows."""
    parts = []
    for of, name, numbers in SHOWN:
        if of == title and name in drawn:
            said = [
                tag("p", tag("b", f"{n}. "), text(found[n].statement), " ", _pill(found[n]))
                for n in numbers
            ]
            parts.append(tag("div", drawn[name], *said, class_="shown"))
    return tag("div", *parts, class_="figures") if parts else ""


def _claims(found: Sequence[Finding]) -> str:
    rows = []
    for finding in found:
        why = tag("span", text(finding.why), class_="dim")
        measured = text(finding.measured) + ("<br>" if finding.measured else "") + why
        rows.append(
            [
                f"{finding.claim}",
                tag("span", finding.at, class_="dim"),
                text(finding.statement),
                measured,
                _pill(finding),
            ]
        )
    listed = table(["", "at", "the talk", "measured here", ""], rows, "Claims")
    return tag("div", listed, class_="claims")


def _choices(records: Sequence[Record], where: Where) -> str:
    chosen = claims.choices(records, where, writing=True) or claims.choices(
        records, where, writing=False
    )
    rows = []
    for cores in claims.BUDGETS:
        of = {c.backend: c for c in chosen if c.cores == cores}
        if not of:
            continue
        best = max(of.values(), key=lambda choice: choice.images_per_s)
        cells = [
            f"{number(of[b].images_per_s)} with {', '.join(f'{n} to {text(stage)}' for stage, n in of[b].counts.items())}"
            if b in of
            else DASH
            for b in BACKENDS
        ]
        rows.append([f"{cores}", tag("b", NAMES[best.backend]), *cells])
    listed = (
        table(
            ["cores", "better", *(f"{NAMES[b]}, images/s" for b in BACKENDS)],
            rows,
            "Advice by cores",
        )
        if rows
        else ""
    )
    said = "By the planner, from what an image was measured to cost here with one actor: the fewest actors and writers that use the cores."
    return (tag("p", said, class_="dim") + listed) if listed else ""


def _gpus(records: Sequence[Record], where: Where) -> str:
    rows = [
        [
            NAMES[gpu.backend],
            number(gpu.now),
            number(gpu.training),
            number(gpu.preprocessing),
            number(gpu.ops),
        ]
        for gpu in claims.gpus(records, where)
    ]
    head = [
        "images/s by the planner",
        "1 GPU",
        "one more, to train",
        "one for all preprocessing, at no cost",
        "measured: ops on the 1 GPU",
    ]
    return table(head, rows, "Where a GPU is better spent") if rows else ""


def _designs(records: Sequence[Record], where: Where) -> str:
    rows = []
    for design in claims.designs(records, where):
        trained = (
            "as fast as data comes"
            if design.trainer is None
            else f"{number(design.trainer)} images/s"
        )
        rates = [
            number(1 / seconds)
            for seconds in (design.clock.continuous_s, design.clock.once_s, design.clock.stored_s)
        ]
        epochs = [claims.epochs_from(of.break_even_epochs) for of in (design.clock, design.cpu)]
        rows.append([NAMES[design.backend], trained, *rates, *epochs])
    if not rows:
        return ""
    said = (
        "One design preprocesses in every epoch while training goes on: for data that is new each time, and worth tuning where preprocessing "
        "limits. The other preprocesses once, stores (Parquet, raw pixels) and reads that in every epoch: for the same data over and over, "
        "without random augmentation. From so many epochs on the second has cost less:"
    )
    head = [
        "",
        "training takes",
        "every epoch, images/s",
        "once, images/s",
        "from the store, images/s",
        "by the clock",
        "by CPU time",
    ]
    return tag("p", said) + table(head, rows, "Once or in every epoch")


def _comes_to(found: Mapping[int, Finding]) -> str:
    """Claim 22, from the others."""

    def became(*numbers: int) -> str:
        return ", ".join(f"claim {n} {HOLDS[found[n].holds]}" for n in numbers)

    lines = (
        f"Serving: preprocess in parallel, and give output as many queues as it takes ({became(5, 10, 11)}).",
        f"Training: look what limits first. If the GPU does, more of it helps and faster preprocessing does not ({became(17, 18, 19, 20)}); "
        f"whether to preprocess along with it or once before depends on the purpose ({became(21)}).",
    )
    return "".join(tag("p", text(line)) for line in lines)


MEASURED = (
    "Time is that of the work alone: from the moment the last of a point's actors was ready, before which none gets an image, to the last "
    "image out. Starting Ray and its actors, and listing the input, are not in it. CPU is the mean use of all cores in the same span, by "
    "whatever ran on the machine. Of repeats the median is shown, with a line from the lowest to the highest; their order was mixed. "
    "Dashed lines are ideal: the time of the fewest actors, divided, until the CPU that an image was measured to take fills the cores. Hollow marks have "
    "more actors than the machine has cores."
)


def disturbed(records: Sequence[Record], where: Where) -> str:
    """That other programs used the machine meanwhile, as whoever judges by the figures is to know; empty if none did."""
    held = claims.others(records, where.cores)
    return (
        f"Other programs held about {held:.0f}% of the machine's CPU meanwhile, so these figures are of what they left, and may be wrong. "
        f"Measure again when it is quiet."
        if held > planner.TOLD
        else ""
    )


def page(records: Sequence[Record], where: Where, about: Mapping[str, Any]) -> str:
    """The sweep as a self-contained HTML document.

    Args:
        records: of a sweep (raypipe.sweep.command.RESULTS).
        about: `command` (str), `date` (str), and the tables `settings`, `versions` and `hardware`.
    """
    found = claims.findings(records, where)
    by_number = {finding.claim: finding for finding in found}
    drawn = figures(records, where)
    count = {holds: sum(finding.holds == holds for finding in found) for holds in HOLDS}
    title = f"raypipe sweep {about.get('date') or ''}".strip()
    hardware = about.get("hardware") or {}
    lead = (
        f"{len(records):,} measurements on {number(hardware.get('cores'))} cores of {hardware.get('processor') or 'unknown'}"
        f"{f', {where.gpus} GPU' if where.gpus else ', no GPU'}. {delays(where)}"
    )
    below: dict[str, Callable[[Sequence[Record], Where], str]] = {
        SECTIONS[1]: _choices,
        SECTIONS[2]: _gpus,
    }
    shown = [
        section(
            name,
            _shown(by_number, drawn, name) + (below[name](records, where) if name in below else ""),
        )
        for name in SECTIONS
    ]
    body = [
        tag("p", text(title), class_="run"),
        tag(
            "h1",
            f"{count['yes']} of the talk's {len(found)} claims hold here, {count['no']} do not, {count['cannot']} cannot be shown.",
        ),
        tag("p", text(lead), class_="lead"),
        tag("p", tag("strong", text(warned), class_="bad"))
        if (warned := disturbed(records, where))
        else "",
        section("Claims", _claims(found)),
        *shown,
        section("Once, or in every epoch", _designs(records, where)),
        section("What it comes to", _comes_to(by_number)),
        section(
            "How it was measured",
            tag("p", MEASURED)
            + tag("p", tag("code", text(about.get("command") or "")))
            + "".join(
                facts(name, about.get(name.lower()))
                for name in ("Settings", "Versions", "Hardware")
            ),
        ),
    ]
    return document(title, body)


def terminal(found: Sequence[Finding]) -> Table:
    """What became of the claims, as a person reads it in a terminal."""
    listed = Table("", "the talk", "measured here", "", box=box.SIMPLE_HEAD, header_style="bold")
    colours = {"yes": "green", "no": "red", "cannot": "dim"}
    for finding in found:
        measured = Text(finding.measured or finding.why)
        listed.add_row(
            f"{finding.claim}",
            Text(finding.statement),
            measured,
            Text(HOLDS[finding.holds], style=colours[finding.holds]),
        )
    return listed
