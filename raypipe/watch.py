"""The loop of `raypipe watch`: a run in the terminal, keys that scale it, or plain lines."""

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
from raypipe.insight.states import LiveRun


class Watched(Protocol):
    """What is watched: a raypipe.run.live.control.Control. Importing that takes 2 s, for Ray."""

    run_id: str

    def look(self) -> LiveRun: ...

    def scale(self, counts: dict[str, int]) -> dict[str, int]: ...


_STEP = {"+": 1, "=": 1, "-": -1, "_": -1}  # with and without Shift
_MOVE = {"\t": 1, "down": 1, "j": 1, "\x1b[Z": -1, "up": -1, "k": -1}
_ARROWS = {"\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down"}


def keys_in(data: bytes) -> list[str]:
    """The keys that a terminal sent: characters, `up`, `down`, and other escape sequences."""
    found = re.findall(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", data.decode(errors="replace"), re.DOTALL)
    return [_ARROWS.get(key, key) for key in found]


@contextmanager
def _keyboard(file: int) -> Iterator[Callable[[float], list[str]]]:
    """Read keys at once and without echo.

    Yields a function that waits for keys for at most so many seconds. The terminal is restored at
    the end, also when the process is told to end.
    """
    before = termios.tcgetattr(file)
    raw = termios.tcgetattr(file)
    raw[3] &= ~(termios.ICANON | termios.ECHO)
    raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
    # After Ctrl-Z the shell would have a terminal that neither echoes nor scrolls.
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


def pressed(key: str, looking: Looking, record: LiveRun, run: Watched) -> tuple[Looking, LiveRun]:
    """Act on `key`: move the selection, or scale the selected stage by one.

    An accepted scaling is entered in the record: the same key before the next update counts from
    there.
    """
    stages = record.stages
    if not stages or looking.selected is None:
        return looking, record
    at = min(looking.selected, len(stages) - 1)
    if key in _MOVE:
        return replace(looking, selected=(at + _MOVE[key]) % len(stages), message=""), record
    if key not in _STEP:
        return looking, record
    name = stages[at].name
    try:
        wanted = run.scale({name: stages[at].wanted + _STEP[key]})[name]
    except UsageError as refused:
        return replace(looking, message=str(refused)), record
    changed = tuple(
        replace(stage, wanted=wanted) if stage.name == name else stage for stage in stages
    )
    return replace(looking, message=f"{name}: {wanted} wanted"), replace(record, stages=changed)


LOOK_EVERY_S = 0.25
"""How often a change of the terminal's size is noticed while no key is pressed."""


def _full_screen(
    run: Watched, record: LiveRun, console: Console, interval: float
) -> tuple[LiveRun, Looking, str | None]:
    """Show the view and take keys until the run ends or the user quits.

    Returns:
        What was seen last, and how the run ended (None: the user quit).
    """
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
                    record = run.look()
                except UsageError as ended:
                    return record, replace(looking, selected=None), str(ended)
                looking = replace(looking, history=remember(looking.history, record))
                due = time.monotonic() + interval


def _lines(
    run: Watched, record: LiveRun, form: Callable[[LiveRun], str], interval: float
) -> tuple[LiveRun, str]:
    """Print a line an update until the run ends. Returns the last record, and how it ended."""
    while True:
        print(form(record), flush=True)
        time.sleep(interval)
        try:
            record = run.look()
        except UsageError as ended:
            return record, str(ended)


def _last_words(record: LiveRun, ended: str) -> str:
    seen = (
        f"{ended} Last seen at {record.done} of {record.images} images, {record.rejected} rejected."
    )
    if record.output is not None:
        seen += f" Its report, if it came to its end, is in {record.output}/_raypipe"
    return printable(seen)


def _as_json(record: LiveRun) -> str:
    return json.dumps(record.json())


def watch(run: Watched, console: Console, *, interval: float, as_json: bool, once: bool) -> None:
    """Show `run` until it ends: a whole screen with keys in a terminal, else lines.

    Args:
        interval: seconds between updates.
        as_json: print a line of JSON an update, in a terminal too.
        once: print one update and return.

    Raises:
        UsageError: the run has ended already.
    """
    record = run.look()
    terminal = (
        sys.stdin.isatty() and sys.stdout.isatty() and not console.is_dumb_terminal and not as_json
    )
    form = _as_json if as_json else line
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
