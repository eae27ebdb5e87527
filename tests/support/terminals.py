"""A terminal for a process, as a user has one: send it keys, and read its screen."""

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping

ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])")


class Terminal:
    """A pseudo-terminal with `command` in its foreground, killed at the end of the block."""

    def __init__(
        self,
        command: list[str],
        *,
        columns: int = 80,
        rows: int = 24,
        env: Mapping[str, str],
        **more,
    ):
        self._ours, self._its = os.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self._its)
        self.process = subprocess.Popen(
            command,
            stdin=self._its,
            stdout=self._its,
            stderr=self._its,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
            env={key: value for key, value in env.items() if key not in ("COLUMNS", "LINES")}
            | {"TERM": "xterm-256color"},
            **more,
        )
        self.output = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._its)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._its, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def _read(self, seconds: float) -> None:
        while select.select([self._ours], [], [], seconds)[0]:
            self.output += os.read(self._ours, 65536).decode(errors="replace")
            seconds = 0

    @property
    def screen(self) -> str:
        """The last whole screen that was drawn, or all output if none was."""
        return ESCAPE.sub("", self.output.rsplit("\x1b[H", 1)[-1])

    def shows(self, pattern: str, seconds: float = 60) -> str:
        """Wait until the screen shows `pattern` (a regular expression); the screen."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.screen, re.DOTALL):
            assert time.monotonic() < deadline, f"never showed {pattern!r}, but: {self.screen}"
            self._read(0.1)
            if self.process.poll() is not None:
                self._read(0.1)
                assert re.search(pattern, self.screen, re.DOTALL), (
                    f"ended with {self.process.returncode}: {self.output}"
                )
        return self.screen

    def ends(self, seconds: float = 60) -> int:
        """Wait until the process ends; its exit status."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still there: {self.screen}"
            self._read(0.05)
        with contextlib.suppress(OSError):
            self._read(0.1)
        return self.process.returncode

    @property
    def stops_at_ctrl_z(self) -> bool:
        return termios.tcgetattr(self._its)[6][termios.VSUSP] != b"\0"

    @property
    def restored(self) -> bool:
        """Whether the terminal is as it was: modes, the normal screen, a visible cursor."""

        def last(on: str, off: str) -> bool:
            return self.output.rfind(on) >= self.output.rfind(off)

        same = termios.tcgetattr(self._its) == self.before
        return same and last("\x1b[?1049l", "\x1b[?1049h") and last("\x1b[?25h", "\x1b[?25l")
