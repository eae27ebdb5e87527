"""A run as it stands: the view of `raypipe watch`, and a plain line. Stands alone: reads live records, knows nothing of Ray.

A live record is what raypipe.run.live.control.Control.live returns: JSON types, None for what is not known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from raypipe.insight.markup import ARROW, DASH, bytes_of, duration, known, number, printable, share

STATES = (
    ("busy", "\N{FULL BLOCK}", "green"),
    ("starved", "\N{MIDDLE DOT}", "blue"),
    ("blocked", "\N{MEDIUM SHADE}", "yellow"),
)
"""What an actor's time goes into: a glyph each, so that the bars can be read without colour."""

LEVELS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
SELECTED = "\N{BLACK RIGHT-POINTING TRIANGLE}"
HISTORY_S = 60.0
"""How long the sparkline looks back."""

WIDE = 110
"""Columns from which the shares stand beside their bar as figures."""

EVENTS = 5
"""How many of the last scalings are shown."""

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
"""One cell for one cell, so that translating what is laid out already does not shift it."""


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What the person who looks has selected, and has seen so far."""

    selected: int | None = None
    """Index of the stage that keys scale; None: no keys are read."""
    history: tuple[tuple[float, float | None], ...] = ()
    """(at_s, images/s) of the last minute."""
    message: str = ""
    """What became of the last key."""


def remember(
    history: Iterable[tuple[float, float | None]], record: dict
) -> tuple[tuple[float, float | None], ...]:
    """`history` and what `record` adds to it, less what is older than HISTORY_S."""
    longer = (*history, (record["at_s"], record["images_per_s"]))
    return tuple((at, rate) for at, rate in longer if at > record["at_s"] - HISTORY_S)


@dataclass(frozen=True)
class _Plain:
    """A renderable that keeps to ASCII where the terminal's encoding has no more."""

    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            text = segment.text
            if options.ascii_only:
                text = text.translate(_ASCII).encode("ascii", "replace").decode()
            yield Segment(text, segment.style, segment.control)


def bar(parts: Sequence[tuple[float | None, str, str]], width: int) -> Text:
    """A bar of `width` cells: (share, glyph, colour) side by side. Empty where a share is not known."""
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
    """images/s over the last HISTORY_S seconds, from 0 to the highest; blank where nothing is known."""
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


def _actors(stage: dict, images: int) -> str:
    """How many actors run, and how many are wanted where that differs. Of a stage that has done all `images`, what is left counts no more."""
    if stage["images"] >= images > 0 and not stage["queued"] and not stage["images_per_s"]:
        return "done"
    return (
        f"{stage['actors']}"
        if stage["actors"] == stage["wanted"]
        else f"{stage['actors']} {ARROW} {stage['wanted']}"
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


def _places(record: dict) -> str:
    output = (
        ", nothing written"
        if record["output"] is None
        else f" {ARROW} {printable(record['output'])}"
    )
    return printable(record["input"]) + output


def _title(record: dict) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    grid.add_column(
        no_wrap=True, overflow="ellipsis", justify="right", max_width=30
    )  # not to push the run's name away
    grid.add_row(
        Text(f"run {printable(record['run_id'])}", style="bold"),
        Text(duration(int(record["at_s"]))),
    )
    how = printable(f"{record['recipe']}, {record['backend']}")
    grid.add_row(Text(_places(record), style="dim"), Text(how, style="dim"))
    return grid


def _totals(record: dict, looking: Looking, width: int) -> Table:
    done = record["done"] / record["images"] if record["images"] else None
    left = (
        "" if known(record["eta_s"]) is None else f", about {duration(int(record['eta_s']))} left"
    )
    images = bar(
        [(done, "\N{FULL BLOCK}", "green"), (1 - (done or 0.0), "\N{MIDDLE DOT}", "dim")],
        max(width - 70, 10),
    )
    images += Text(f"  {record['done']:,} of {record['images']:,}, {share(done)}{left}")
    if record["rejected"]:
        images += Text(f", {record['rejected']:,} rejected", style="yellow")
    rate = Text(f"{number(record['images_per_s'])}", style="bold") + Text(" images/s")
    if looking.history:
        rate += Text(f"  {sparkline(looking.history, record['at_s'], 30)}", style="cyan") + Text(
            "  last minute", style="dim"
        )
    machine = f"{_percent(record['cpu_percent'])} of {record['cores']:g} cores, room for {record['actors_at_most']} actors, "
    machine += "sized automatically" if record["auto"] else "sized by hand"
    return _labelled([("images", images), ("rate", rate), ("machine", Text(machine))])


def _figures(stage: dict, *, gpu: bool, wide: bool) -> list[str]:
    return [
        number(stage["images_per_s"]),
        _percent(stage["cpu_percent"]),
        bytes_of(stage["rss_bytes"]),
        *([_percent(stage["gpu_percent"])] if gpu else []),
        f"{stage['queued']}",
        *([share(stage[state]) for state, _, _ in STATES] if wide else []),
    ]


def _stages(record: dict, looking: Looking, width: int) -> Table:
    stages = record["stages"]
    gpu = any(known(stage["gpu_percent"]) is not None for stage in stages)
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_edge=False,
        expand=True,
    )
    table.add_column("", width=1)
    table.add_column("stage", no_wrap=True, overflow="ellipsis", min_width=10, max_width=14)
    widths = (
        {"actors": 7, "images/s": 8, "CPU": 4, "memory": 7}
        | ({"GPU": 4} if gpu else {})
        | {"queue": 5}
    )
    for name, least in widths.items():  # so that nothing jumps from one update to the next
        table.add_column(name, justify="right", no_wrap=True, min_width=least)
    for name in [name for name, _, _ in STATES] if width >= WIDE else []:
        table.add_column(name, justify="right", no_wrap=True)
    used = 1 + 14 + sum(widths.values()) + (4 + 7 + 7 if width >= WIDE else 0)
    room = width - used - 2 * len(table.columns)
    table.add_column("what its actors do", no_wrap=True, ratio=1)
    for index, stage in enumerate(stages):
        chosen, actors = index == looking.selected, _actors(stage, record["images"])
        cells = [
            Text(SELECTED if chosen else ""),
            Text(printable(stage["name"]), style="bold" if chosen else ""),
            Text(actors, style="bold magenta" if ARROW in actors else ""),
            *(Text(figure) for figure in _figures(stage, gpu=gpu, wide=width >= WIDE)),
            bar([(stage[state], glyph, colour) for state, glyph, colour in STATES], max(room, 8)),
        ]
        table.add_row(*cells)
    return table


def _legend() -> Text:
    meaning = {"busy": "busy", "starved": "starved (no input)", "blocked": "blocked (output full)"}
    parts = [
        Text(f"{glyph * 2} ", style=colour) + Text(meaning[state], style="dim")
        for state, glyph, colour in STATES
    ]
    return Text("   ").join(parts)


def _verdict(record: dict) -> list[tuple[str, RenderableType]]:
    """Why, the best that keys can do about it, and the best of all where that is clearly more."""
    verdict, shown = record["verdict"], known(record["images_per_s"]) or 0.0
    rows: list[tuple[str, RenderableType]] = [("verdict", Text(printable(verdict["reason"])))]
    here = tuple(f"{stage['name']} actors" for stage in record["stages"])
    at_hand = [advice for advice in verdict["advice"] if advice["change"].startswith(here)]
    for choice in (at_hand, verdict["advice"]):
        best = max(choice, key=lambda advice: advice["predicted_images_per_s"], default=None)
        if best is not None and best["predicted_images_per_s"] > 1.02 * shown:
            shown = best["predicted_images_per_s"]
            rows.append(
                (
                    "",
                    Text(
                        f"{printable(best['change'])}: about {number(shown)} images/s expected",
                        style="cyan",
                    ),
                )
            )
    return rows


def _events(record: dict, most: int) -> list[tuple[str, RenderableType]]:
    newest = sorted(record["scale_events"], key=lambda event: -event["t_s"])[:most]
    changes = [
        Text(f"{printable(event['stage'])} {event['from']} {ARROW} {event['to']}")
        + Text(f"  at {duration(int(event['t_s']))} by {printable(event['by'])}", style="dim")
        for event in newest
    ]
    return [("" if index else "scaled", change) for index, change in enumerate(changes)]


def view(record: dict, looking: Looking, *, width: int) -> RenderableType:
    """All of it, most important first, for a terminal of `width` columns (made for 80 and more)."""
    parts: list[RenderableType] = [
        _title(record),
        "",
        _totals(record, looking, width),
        "",
        _stages(record, looking, width),
    ]
    parts += [
        Padding(_legend(), (0, 0, 0, 3)),
        "",
        _labelled([*_verdict(record), *_events(record, EVENTS)]),
    ]
    return _Plain(Group(*parts))


def screen(record: dict, looking: Looking, *, width: int) -> RenderableType:
    """`view` on a whole screen, cropped to its height, above what became of the last key and the keys that there are."""
    message = printable(looking.message)
    whole = Layout()
    whole.split_column(
        Layout(view(record, looking, width=width)),
        # Rows of its own, so that a long refusal does not push the keys off the screen; words wrap, so they fill less than a row.
        Layout(
            Text(message or " ", style="bold yellow"),
            size=1 + min(len(message) // max(width - 10, 1), 3),
        ),
        Layout(Text(KEYS, style="dim", no_wrap=True), size=1),
    )
    return _Plain(whole)


def listing(records: Sequence[dict]) -> RenderableType:
    """The runs of a cluster as a table, a row each."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("since", "images", "images/s", "actors"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("input and output", overflow="fold", style="dim")
    for record in records:
        images = f"{record['done']:,} of {record['images']:,}"
        actors = " + ".join(_actors(stage, record["images"]) for stage in record["stages"])
        figures = [duration(int(record["at_s"])), images, number(record["images_per_s"]), actors]
        table.add_row(
            Text(printable(record["run_id"])),
            *(Text(figure) for figure in figures),
            Text(_places(record)),
        )
    return _Plain(table)


def line(record: dict) -> str:
    """A line of plain ASCII for a log, as far as names are."""
    cpu, eta = _percent(record["cpu_percent"]), known(record["eta_s"])
    said = [
        f"{duration(int(record['at_s']))}: {record['done']}/{record['images']} images, {record['rejected']} rejected, "
        f"{number(record['images_per_s'])} images/s, {'' if eta is None else f'{duration(int(eta))} left, '}CPU {cpu} of {record['cores']:g} cores"
    ]
    for stage in record["stages"]:
        states = ", ".join(f"{state} {share(stage[state])}" for state, _, _ in STATES)
        memory = bytes_of(stage["rss_bytes"])
        said.append(
            f"{printable(stage['name'])}: actors {_actors(stage, record['images'])}, {number(stage['images_per_s'])} images/s, CPU {_percent(stage['cpu_percent'])}, "
            f"memory {memory}, {states}, {stage['queued']} queued"
        )
    if record["verdict"]["stage"] is not None:
        said.append(f"limit: {printable(record['verdict']['stage'])}")
    return "; ".join(said).replace(DASH, "-").replace(ARROW, "->")
