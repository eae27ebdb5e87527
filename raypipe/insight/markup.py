"""Safe text and HTML from untrusted text, and figures as a person reads them."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

DASH = "\N{EN DASH}"
ARROW = "\N{RIGHTWARDS ARROW}"


def printable(value: object) -> str:
    """`value` in one line, with every control character spelled out.

    Among these are newlines, escapes to the terminal, bidi overrides and lone surrogates.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def text(value: object) -> str:
    """`value`, printable, for a text node or a quoted attribute."""
    return escape(printable(value))


def tag(element: str, /, *inner: str, **attributes: object) -> str:
    """An HTML element.

    Args:
        inner: HTML.
        attributes: are escaped here; class_ stands for class, text_anchor for text-anchor.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"'
        for name, value in attributes.items()
    )
    return f"<{element}{written}>" + (
        "" if element in ("meta", "img") else f"{''.join(inner)}</{element}>"
    )


def known(value: object) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def number(value: object, unit: str = "", scale: float = 1.0) -> str:
    """About three digits of `value` x `scale`, or a dash."""
    if (figure := known(value)) is None:
        return DASH
    figure *= scale
    digits = 0 if abs(figure) >= 100 or figure == round(figure) else 1 if abs(figure) >= 10 else 2
    return (f"{figure:,.{digits}f}" if abs(figure) >= 0.1 or not figure else f"{figure:.2g}") + unit


def columns(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """The columns of a table of stages: name, record, and whether it is a step of the one before.

    A stage of one step has no column for it.
    """
    found: list[tuple[str, Mapping[str, Any], bool]] = []
    for stage in stages:
        found.append((str(stage.get("name")), stage, False))
        steps = stage.get("steps") or []
        if len(steps) > 1:
            found += [(f"of it {step.get('name')}", step, True) for step in steps]
    return found


def bytes_unit(largest: float) -> tuple[float, str]:
    return next(
        (unit for unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if largest >= unit[0]),
        (1e3, "kB"),
    )


def bytes_of(value: object) -> str:
    size, unit = bytes_unit(known(value) or 0.0)
    return number(value, f" {unit}", 1 / size)


def duration(value: object) -> str:
    seconds = known(value)
    if seconds is None or seconds < 120:
        return number(value, " s")
    if seconds < 7200:
        return f"{seconds // 60:.0f} min {int(seconds % 60)} s"
    return f"{seconds // 3600:,.0f} h {int(seconds % 3600 / 60)} min"


def share(value: object) -> str:
    return DASH if (figure := known(value)) is None else f"{figure:.0%}"


def machine_use(stages: object, other: object) -> str:
    """Who used the CPU of the machine, from percents of it; empty where that is not known."""
    by_stages, by_others = known(stages), known(other)
    if by_stages is None or by_others is None:
        return ""
    return f"{by_stages:.0f}% in the stages, {by_others:.0f}% in Ray and the system"


def swatch(name: object, colour: str) -> str:
    """A name with its colour in front."""
    return tag("span", text(name), class_=f"key {colour}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """A table that scrolls in its own box, by keyboard too.

    Args:
        head: HTML, as are `rows`. The first cell of a row names it.
        name: what a screen reader calls the table.
    """
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))) if head else ""
    body = (
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    )
    return tag(
        "div",
        tag("table", top, tag("tbody", *body)),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=name,
    )
