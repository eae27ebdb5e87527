"""What `raypipe watch` does: a run in the terminal as it goes, keys that scale it, and plain lines where there is no terminal."""

import json
import os
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from rich.console import Console
from rich.live import Live

from raypipe import UsageError
from raypipe.insight.markup import printable
from raypipe.insight.screen import Looking, line, remember, screen, view


class Watched(Protocol):
    """What is watched: raypipe.run.live.control.Control, which brings in Ray (2 s) and is left to the caller."""

    run_id: str

    def live(self) -> dict: ...

    def scale(self, counts: dict[str, int]) -> dict[str, int]: ...


_STEP = {"+": 1, "=": 1, "-": -1, "_": -1}  # with and without Shift
_MOVE = {"\t": 1, "down": 1, "j": 1, "\x1b[Z": -1, "up": -1, "k": -1}
_ARROWS = {"\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down"}


def keys_in(data: bytes) -> list[str]:
    """The keys that a terminal sent: characters, `up`, `down`; other escape sequences whole."""
    found = re.findall(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", data.decode(errors="replace"), re.DOTALL)
    return [_ARROWS.get(key, key) for key in found]


@contextmanager
def _keyboard(file: int) -> Iterator[Callable[[float], list[str]]]:
    """Keys at once and without echo: yields what waits for them at most so many seconds. The terminal is given back as it was, also when
    the process is asked to end.
    """
    before = termios.tcgetattr(file)
    raw = termios.tcgetattr(file)
    raw[3] &= ~(termios.ICANON | termios.ECHO)
    raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
    # Stopped by Ctrl-Z it would leave the shell a terminal that neither echoes nor scrolls.
    raw[6][termios.VSUSP] = b"\0"

    def read(seconds: float) -> list[str]:
        if not select.select([file], [], [], max(seconds, 0.0))[0]:
            return []
        return keys_in(os.read(file, 1024)) or ["q"]  # nothing to read: the terminal is gone

    def end(number: int, _) -> None:
        sys.exit(128 + number)

    ending = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    termios.tcsetattr(file, termios.TCSADRAIN, raw)
    try:
        yield read
    finally:
        termios.tcsetattr(file, termios.TCSAFLUSH, before)
        for number, handler in ending.items():
            signal.signal(number, handler)


def pressed(key: str, looking: Looking, record: dict, run: Watched) -> tuple[Looking, dict]:
    """What is seen after `key`: it moves the selection, or scales the selected stage by one and says what became of it.

    A scaling that is accepted is entered in the record, so that a key pressed again before the next update counts from there.
    """
    stages = record["stages"]
    if not stages or looking.selected is None:
        return looking, record
    at = min(looking.selected, len(stages) - 1)
    if key in _MOVE:
        return replace(looking, selected=(at + _MOVE[key]) % len(stages), message=""), record
    if key not in _STEP:
        return looking, record
    name = stages[at]["name"]
    try:
        wanted = run.scale({name: stages[at]["wanted"] + _STEP[key]})[name]
    except UsageError as refused:
        return replace(looking, message=str(refused)), record
    changed = [stage | {"wanted": wanted} if stage["name"] == name else stage for stage in stages]
    return replace(looking, message=f"{name}: {wanted} wanted"), record | {"stages": changed}


LOOK_EVERY_S = 0.25
"""How often a change of the terminal's size is noticed while no key is pressed."""


def _full_screen(
    run: Watched, record: dict, console: Console, interval: float
) -> tuple[dict, Looking, str | None]:
    """The view with keys, until the run ends or the user has seen enough: what was seen last, and in the first case how it ended."""
    looking = Looking(selected=0, history=remember((), record))
    drawn = None
    due = time.monotonic() + interval
    with (
        _keyboard(sys.stdin.fileno()) as keys,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            if drawn != (state := (record, looking, console.size)):
                live.update(screen(record, looking, width=console.width), refresh=True)
                drawn = state
            for key in keys(min(due - time.monotonic(), LOOK_EVERY_S)):
                if key in ("q", "Q"):
                    return record, looking, None
                looking, record = pressed(key, looking, record, run)
            if time.monotonic() >= due:
                try:
                    record = run.live()
                except UsageError as ended:
                    return record, replace(looking, selected=None), str(ended)
                looking = replace(looking, history=remember(looking.history, record))
                due = time.monotonic() + interval


def _lines(
    run: Watched, record: dict, form: Callable[[dict], str], interval: float
) -> tuple[dict, str]:
    """A line an update, until the run ends: the last record, and how it ended."""
    while True:
        print(form(record), flush=True)
        time.sleep(interval)
        try:
            record = run.live()
        except UsageError as ended:
            return record, str(ended)


def _last_words(record: dict, ended: str) -> str:
    seen = f"{ended} Last seen at {record['done']} of {record['images']} images, {record['rejected']} rejected."
    where = (
        ""
        if record["output"] is None
        else f" Its report, if it came to its end: {record['output']}/_raypipe/report.html"
    )
    return printable(seen + where)


def watch(run: Watched, console: Console, *, interval: float, as_json: bool, once: bool) -> None:
    """Show `run` until it ends: on a whole screen with keys if this is a terminal, else as lines.

    Args:
        interval: seconds from one update to the next.
        as_json: a line of JSON an update, whatever this is.
        once: one update, no keys.

    Raises:
        UsageError: the run is gone already.
    """
    record = run.live()
    terminal = (
        sys.stdin.isatty() and sys.stdout.isatty() and not console.is_dumb_terminal and not as_json
    )
    form = json.dumps if as_json else line
    if once:
        console.print(view(record, Looking(), width=console.width)) if terminal else print(
            form(record), flush=True
        )
        return
    if not terminal:
        record, ended = _lines(run, record, form, interval)
        print(_last_words(record, ended), file=sys.stderr if as_json else sys.stdout)
        return
    record, looking, left = _full_screen(run, record, console, interval)
    if left is not None:
        console.print(view(record, looking, width=console.width))
        console.print(_last_words(record, left), markup=False, highlight=False)
