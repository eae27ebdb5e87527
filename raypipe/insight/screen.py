"""A run that goes on: the view of `raypipe watch`, and a plain line for a log. No Ray here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from raypipe.insight.markup import (
    ARROW,
    DASH,
    bytes_of,
    duration,
    known,
    machine_use,
    number,
    printable,
    share,
)
from raypipe.insight.states import LiveRun, LiveStage

GLYPHS = (
    ("busy", "\N{FULL BLOCK}", "green"),
    ("starved", "\N{MIDDLE DOT}", "blue"),
    ("blocked", "\N{MEDIUM SHADE}", "yellow"),
)
"""A glyph and a colour for each state: the bars can be read without colour."""

LEVELS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
SELECTED = "\N{BLACK RIGHT-POINTING TRIANGLE}"
HISTORY_S = 60.0
"""How long the sparkline looks back."""

WIDE = 110
"""From this width on, the shares stand beside their bar as figures."""

EVENTS = 5
"""How many of the latest scalings are shown."""

KEYS = "\u2191 \u2193 Tab  select a stage   + -  scale it by one   q  quit (the run goes on)"

_ASCII = str.maketrans(
    dict(zip(LEVELS, "__..--^#", strict=True))
    | {
        DASH: "-",
        ARROW: ">",
        SELECTED: ">",
        "\u2191": "^",
        "\u2193": "v",
        "\N{HORIZONTAL ELLIPSIS}": "~",
    }
    | {"\N{FULL BLOCK}": "#", "\N{MIDDLE DOT}": ".", "\N{MEDIUM SHADE}": "x"}
)
"""Each glyph has one cell in both: translating a finished layout does not shift it."""


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What the person at the terminal has selected, and has seen so far."""

    selected: int | None = None
    """Index of the stage that the keys scale; None: no keys are read."""
    history: tuple[tuple[float, float | None], ...] = ()
    """(at_s, images/s) of the last minute."""
    message: str = ""
    """The outcome of the last key."""


def remember(
    history: Iterable[tuple[float, float | None]], record: LiveRun
) -> tuple[tuple[float, float | None], ...]:
    """`history` with what `record` adds, without what is older than HISTORY_S."""
    longer = (*history, (record.at_s, record.images_per_s))
    return tuple((at, rate) for at, rate in longer if at > record.at_s - HISTORY_S)


@dataclass(frozen=True)
class _Plain:
    """A renderable in ASCII where the terminal's encoding has no more."""

    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            text = segment.text
            if options.ascii_only:
                text = text.translate(_ASCII).encode("ascii", "replace").decode()
            yield Segment(text, segment.style, segment.control)


def bar(parts: Sequence[tuple[float | None, str, str]], width: int) -> Text:
    """A bar of `width` cells, of (share, glyph, colour). Empty where a share is not known."""
    drawn, total, edge = Text(), 0.0, 0
    shares = [known(part) for part, _, _ in parts]
    if any(part is None for part in shares):
        return Text(DASH, style="dim")
    for value, (_, glyph, colour) in zip(shares, parts, strict=True):
        total += value or 0.0
        until = min(max(round(total * width), edge), width)
        drawn.append(glyph * (until - edge), style=colour)
        edge = until
    return drawn


def sparkline(history: Sequence[tuple[float, float | None]], now: float, columns: int) -> str:
    """images/s over the last HISTORY_S seconds, from 0 to the highest; blank where unknown."""
    cells: list[list[float]] = [[] for _ in range(columns)]
    for at, rate in history:
        age = now - at
        if rate is not None and 0 <= age < HISTORY_S:
            cells[columns - 1 - int(age / HISTORY_S * columns)].append(rate)
    means = [sum(cell) / len(cell) if cell else None for cell in cells]
    top = max((mean for mean in means if mean is not None), default=0.0)
    drawn, last = "", " "
    for mean in means:
        if mean is not None:
            last = LEVELS[round(mean / top * (len(LEVELS) - 1))] if top else LEVELS[0]
        drawn += last  # a column between two updates repeats the earlier
    return drawn


def _actors(stage: LiveStage, images: int) -> str:
    """How many actors run, and where it differs how many are wanted; "done" after all images."""
    if stage.images >= images > 0 and not stage.queued and not stage.images_per_s:
        return "done"
    return (
        f"{stage.actors}"
        if stage.actors == stage.wanted
        else f"{stage.actors} {ARROW} {stage.wanted}"
    )


def _percent(value: object) -> str:
    return share(None if (figure := known(value)) is None else figure / 100)


def _labelled(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=7)
    grid.add_column(overflow="fold")
    for label, content in rows:
        grid.add_row(Text(label), content)
    return grid


def _places(record: LiveRun) -> str:
    output = (
        ", nothing written" if record.output is None else f" {ARROW} {printable(record.output)}"
    )
    return printable(record.input) + output


def _title(record: LiveRun) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    # At most 30 columns, or it would push the name of the run away.
    grid.add_column(no_wrap=True, overflow="ellipsis", justify="right", max_width=30)
    grid.add_row(
        Text(f"run {printable(record.run_id)}", style="bold"),
        Text(duration(int(record.at_s))),
    )
    how = printable(f"{record.recipe}, {record.backend}")
    grid.add_row(Text(_places(record), style="dim"), Text(how, style="dim"))
    return grid


def _totals(record: LiveRun, looking: Looking, width: int) -> Table:
    done = record.done / record.images if record.images else None
    eta = known(record.eta_s)
    left = "" if eta is None else f", about {duration(int(eta))} left"
    images = bar(
        [(done, "\N{FULL BLOCK}", "green"), (1 - (done or 0.0), "\N{MIDDLE DOT}", "dim")],
        max(width - 70, 10),
    )
    images += Text(f"  {record.done:,} of {record.images:,}, {share(done)}{left}")
    if record.rejected:
        images += Text(f", {record.rejected:,} rejected", style="yellow")
    rate = Text(f"{number(record.images_per_s)}", style="bold") + Text(" images/s")
    if looking.history:
        rate += Text(f"  {sparkline(looking.history, record.at_s, 30)}", style="cyan") + Text(
            "  last minute", style="dim"
        )
    machine = (
        f"{_percent(record.cpu_percent)} of {record.cores:g} cores, room for "
        f"{record.actors_at_most} actors, sized {'automatically' if record.auto else 'by hand'}"
    )
    rows = [("images", images), ("rate", rate), ("machine", Text(machine))]
    if use := machine_use(record.stages_cpu_percent, record.other_cpu_percent):
        rows.append(("", Text(use, style="dim")))
    if record.waiting:
        rows.append(("waiting", Text(printable(record.waiting), style="yellow")))
    return _labelled(rows)


def _memory(stage: LiveStage) -> str:
    """Private memory; with shared pages where the system does not tell them apart."""
    return bytes_of(stage.rss_bytes if stage.private_bytes is None else stage.private_bytes)


def _figures(stage: LiveStage, *, gpu: bool, wide: bool) -> list[str]:
    return [
        number(stage.images_per_s),
        _percent(stage.cpu_percent),
        _memory(stage),
        *([_percent(stage.gpu_percent)] if gpu else []),
        f"{stage.queued}",
        *([share(getattr(stage, state)) for state, _, _ in GLYPHS] if wide else []),
    ]


def _stages(record: LiveRun, looking: Looking, width: int) -> Table:
    stages = record.stages
    gpu = any(known(stage.gpu_percent) is not None for stage in stages)
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_edge=False,
        expand=True,
    )
    table.add_column("", width=1)
    name_width = max([14, *(len(stage.name) for stage in stages if len(stage.steps) > 1)])
    table.add_column("stage", no_wrap=True, overflow="ellipsis", min_width=10, max_width=name_width)
    widths = (
        {"actors": 7, "images/s": 8, "CPU": 4, "memory": 7}
        | ({"GPU": 4} if gpu else {})
        | {"queue": 5}
    )
    for name, least in widths.items():  # fixed, so that no column jumps between updates
        table.add_column(name, justify="right", no_wrap=True, min_width=least)
    for name in [name for name, _, _ in GLYPHS] if width >= WIDE else []:
        table.add_column(name, justify="right", no_wrap=True)
    used = 1 + name_width + sum(widths.values()) + (4 + 7 + 7 if width >= WIDE else 0)
    room = width - used - 2 * len(table.columns)
    table.add_column("what its actors do", no_wrap=True, ratio=1)
    for index, stage in enumerate(stages):
        chosen, actors = index == looking.selected, _actors(stage, record.images)
        cells = [
            Text(SELECTED if chosen else ""),
            Text(printable(stage.name), style="bold" if chosen else ""),
            Text(actors, style="bold magenta" if ARROW in actors else ""),
            *(Text(figure) for figure in _figures(stage, gpu=gpu, wide=width >= WIDE)),
            bar(
                [(getattr(stage, state), glyph, hue) for state, glyph, hue in GLYPHS], max(room, 8)
            ),
        ]
        table.add_row(*cells)
        for step in stage.steps if len(stage.steps) > 1 else ():
            # Only the stage has actors, images/s, memory and a queue.
            after = [""] * (len(widths) - 3) + ([share(step.busy), "", ""] if width >= WIDE else [])
            table.add_row(
                *map(Text, ["", f"  {printable(step.name)}", "", ""]),
                *map(Text, [_percent(step.cpu_percent), *after]),
                bar([(step.busy, *GLYPHS[0][1:])], max(room, 8)),
                style="dim",
            )
    return table


def _nodes(record: LiveRun) -> list[RenderableType]:
    """A table of the nodes; nothing of one machine."""
    if len(record.nodes) < 2:
        return []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in ("node", "actors"):
        table.add_column(name, overflow="fold")
    for name in ("images/s", "CPU", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for node in record.nodes:
        actors = " + ".join(f"{count} {stage}" for stage, count in node.actors.items() if count)
        cells = ["", node.name, actors, number(node.images_per_s), _percent(node.cpu_percent)]
        table.add_row(*(Text(printable(cell)) for cell in [*cells, bytes_of(node.rss_bytes)]))
    return ["", table]


def _legend() -> Text:
    meaning = {"busy": "busy", "starved": "starved (no input)", "blocked": "blocked (output full)"}
    parts = [
        Text(f"{glyph * 2} ", style=colour) + Text(meaning[state], style="dim")
        for state, glyph, colour in GLYPHS
    ]
    return Text("   ").join(parts)


def _verdict(record: LiveRun) -> list[tuple[str, RenderableType]]:
    """The reason, the best change that a key can make, and the best of all where it is better."""
    verdict, shown = record.verdict, known(record.images_per_s) or 0.0
    rows: list[tuple[str, RenderableType]] = [("verdict", Text(printable(verdict.reason)))]
    here = tuple(f"{stage.name} actors" for stage in record.stages)
    at_hand = [advice for advice in verdict.advice if advice.change.startswith(here)]
    for choice in (at_hand, verdict.advice):
        best = max(choice, key=lambda advice: advice.predicted_images_per_s, default=None)
        if best is not None and best.predicted_images_per_s > 1.02 * shown:
            shown = best.predicted_images_per_s
            said = f"{printable(best.change)}: about {number(shown)} images/s expected"
            rows.append(("", Text(said, style="cyan")))
    return rows


def _events(record: LiveRun, most: int) -> list[tuple[str, RenderableType]]:
    newest = sorted(record.scale_events, key=lambda event: -event.t_s)[:most]
    changes = [
        Text(f"{printable(event.stage)} {event.before} {ARROW} {event.after}")
        + Text(f"  at {duration(int(event.t_s))} by {printable(event.by)}", style="dim")
        for event in newest
    ]
    return [("" if index else "scaled", change) for index, change in enumerate(changes)]


def view(record: LiveRun, looking: Looking, *, width: int) -> RenderableType:
    """The whole view, most important first, for a terminal of `width` columns (80 or more)."""
    parts: list[RenderableType] = [
        _title(record),
        "",
        _totals(record, looking, width),
        "",
        _stages(record, looking, width),
    ]
    parts += [
        Padding(_legend(), (0, 0, 0, 3)),
        *_nodes(record),
        "",
        _labelled([*_verdict(record), *_events(record, EVENTS)]),
    ]
    return _Plain(Group(*parts))


def screen(record: LiveRun, looking: Looking, *, width: int) -> RenderableType:
    """`view` cropped to the screen, above the outcome of the last key and the list of keys."""
    message = printable(looking.message)
    whole = Layout()
    whole.split_column(
        Layout(view(record, looking, width=width)),
        # Rows of its own: a long refusal must not push the keys off the screen.
        Layout(
            Text(message or " ", style="bold yellow"),
            size=1 + min(len(message) // max(width - 10, 1), 3),
        ),
        Layout(Text(KEYS, style="dim", no_wrap=True), size=1),
    )
    return _Plain(whole)


def listing(records: Sequence[LiveRun]) -> RenderableType:
    """The runs of a cluster as a table, a row each."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("since", "images", "images/s", "actors"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("input and output", overflow="fold", style="dim")
    for record in records:
        images = f"{record.done:,} of {record.images:,}"
        actors = " + ".join(_actors(stage, record.images) for stage in record.stages)
        figures = [duration(int(record.at_s)), images, number(record.images_per_s), actors]
        table.add_row(
            Text(printable(record.run_id)),
            *(Text(figure) for figure in figures),
            Text(_places(record)),
        )
    return _Plain(table)


def line(record: LiveRun) -> str:
    """A line for a log, in ASCII as far as names are."""
    eta = known(record.eta_s)
    left = "" if eta is None else f"{duration(int(eta))} left, "
    use = machine_use(record.stages_cpu_percent, record.other_cpu_percent)
    said = [
        f"{duration(int(record.at_s))}: {record.done}/{record.images} images, "
        f"{record.rejected} rejected, {number(record.images_per_s)} images/s, {left}"
        f"CPU {_percent(record.cpu_percent)} of {record.cores:g} cores{use and f' ({use})'}"
    ]
    for stage in record.stages:
        states = ", ".join(f"{state} {share(getattr(stage, state))}" for state, _, _ in GLYPHS)
        if len(stage.steps) > 1:
            parts = (f"{printable(step.name)} {share(step.busy)}" for step in stage.steps)
            states += f" (busy with {', '.join(parts)})"
        said.append(
            f"{printable(stage.name)}: actors {_actors(stage, record.images)}, "
            f"{number(stage.images_per_s)} images/s, CPU {_percent(stage.cpu_percent)}, "
            f"memory {_memory(stage)}, {states}, {stage.queued} queued"
        )
    if record.verdict.stage is not None:
        said.append(f"limit: {printable(record.verdict.stage)}")
    if record.waiting:
        said.append(printable(record.waiting))
    return "; ".join(said).replace(DASH, "-").replace(ARROW, "->")
