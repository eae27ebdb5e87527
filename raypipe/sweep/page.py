"""The page of a sweep: a figure and a verdict for each claim, readable offline."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from raypipe.insight import planner
from raypipe.insight.html import document, facts, section
from raypipe.insight.markup import DASH, number, table, tag, text
from raypipe.sweep import advice
from raypipe.sweep.claims import Finding, findings, too_short
from raypipe.sweep.curves import BACKENDS, Record, Where, others
from raypipe.sweep.figures import NAMES, delays, figures

HOLDS = {"yes": "holds", "no": "does not hold", "cannot": "cannot be shown here"}

SECTIONS = ("Preprocessing", "Which library, and how many of what", "Training")

SHOWN: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    (SECTIONS[0], "alone", (5,)),
    (SECTIONS[0], "alone-cpu", (6,)),
    (SECTIONS[0], "threads", (6,)),
    (SECTIONS[0], "one", (7,)),
    (SECTIONS[0], "one-cpu", (8,)),
    (SECTIONS[0], "blocked", (9,)),
    (SECTIONS[0], "same", (10,)),
    (SECTIONS[0], "three", (11,)),
    (SECTIONS[0], "same-cpu", (12, 13)),
    (SECTIONS[0], "fused", ()),
    (SECTIONS[1], "budgets", (14,)),
    (SECTIONS[2], "train", (17,)),
    (SECTIONS[2], "train-use", (18,)),
    (SECTIONS[2], "workers", (19, 20)),
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
    chosen = advice.choices(records, where, writing=True) or advice.choices(
        records, where, writing=False
    )
    rows = []
    for cores in advice.BUDGETS:
        of = {c.backend: c for c in chosen if c.cores == cores}
        if not of:
            continue
        best = max(of.values(), key=lambda choice: choice.images_per_s)
        cells = [_choice(of[b]) if b in of else DASH for b in BACKENDS]
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
    said = (
        "By the planner, from what an image was measured to cost here with one actor: "
        "the fewest actors and writers that use the cores."
    )
    return (tag("p", said, class_="dim") + listed) if listed else ""


def _choice(choice: advice.Choice) -> str:
    counts = ", ".join(f"{count} to {text(stage)}" for stage, count in choice.counts.items())
    return f"{number(choice.images_per_s)} with {counts}"


def _gpus(records: Sequence[Record], where: Where) -> str:
    rows = [
        [
            NAMES[gpu.backend],
            number(gpu.now),
            number(gpu.training),
            number(gpu.preprocessing),
            number(gpu.ops),
        ]
        for gpu in advice.gpus(records, where)
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
    for design in advice.designs(records, where):
        trained = (
            "as fast as data comes"
            if design.trainer is None
            else f"{number(design.trainer)} images/s"
        )
        rates = [
            number(1 / seconds)
            for seconds in (design.clock.continuous_s, design.clock.once_s, design.clock.stored_s)
        ]
        epochs = [advice.epochs_from(of.break_even_epochs) for of in (design.clock, design.cpu)]
        rows.append([NAMES[design.backend], trained, *rates, *epochs])
    if not rows:
        return ""
    said = (
        "One design preprocesses in every epoch while training goes on: for data that is new each "
        "time, and worth tuning where preprocessing limits. The other preprocesses once, stores "
        "(Parquet, raw pixels) and reads that in every epoch: for the same data over and over, "
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
        "Serving: preprocess in parallel, and give output as many queues as it takes "
        f"({became(5, 10, 11)}).",
        "Training: look what limits first. If the GPU does, more of it helps and faster "
        f"preprocessing does not ({became(17, 18, 19, 20)}); whether to preprocess along with it "
        f"or once before depends on the purpose ({became(21)}).",
    )
    return "".join(tag("p", text(line)) for line in lines)


MEASURED = (
    "Time is that of the work alone: from the moment the last of a point's actors was ready, "
    "before which none gets an image, to the last image out. Starting Ray and its actors, and "
    "listing the input, are not in it. CPU is the mean use of all cores in the same span, by "
    "whatever ran on the machine. Of repeats the median is shown, with a line from the lowest "
    "to the highest; their order was mixed. Dashed lines are ideal: the time of the fewest "
    "actors, divided, until the CPU that an image was measured to take fills the cores. "
    "Hollow marks have more actors than the machine has cores. A cell decides a claim only if "
    "it took ten times what a run of its shape spends before its first image and after its "
    "last."
)


def disturbed(records: Sequence[Record], where: Where) -> str:
    """That other programs used the machine meanwhile; empty if none did."""
    held = others(records, where.cores)
    if held <= planner.TOLD:
        return ""
    return (
        f"Other programs held about {held:.0f}% of the machine's CPU meanwhile, so these figures "
        "are of what they left, and may be wrong. Measure again when it is quiet."
    )


def page(records: Sequence[Record], where: Where, about: Mapping[str, Any]) -> str:
    """The sweep as a self-contained HTML document.

    Args:
        records: of a sweep (raypipe.sweep.measure.RESULTS).
        about: `command` (str), `date` (str), and the tables `settings`, `versions` and `hardware`.
    """
    found = findings(records, where)
    by_number = {finding.claim: finding for finding in found}
    drawn = figures(records, where)
    count = {holds: sum(finding.holds == holds for finding in found) for holds in HOLDS}
    title = f"raypipe sweep {about.get('date') or ''}".strip()
    hardware = about.get("hardware") or {}
    lead = (
        f"{len(records):,} measurements on {number(hardware.get('cores'))} cores of "
        f"{hardware.get('processor') or 'unknown'}"
        f"{f', {where.gpus} GPU' if where.gpus else ', no GPU'}. {delays(where)}"
    )
    warnings = [said for said in (disturbed(records, where), too_short(records)) if said]
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
            f"{count['yes']} of the talk's {len(found)} claims hold here, {count['no']} do not, "
            f"{count['cannot']} cannot be shown.",
        ),
        tag("p", text(lead), class_="lead"),
        *(tag("p", tag("strong", text(said), class_="bad")) for said in warnings),
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
