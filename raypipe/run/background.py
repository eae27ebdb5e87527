"""A run in the background of a notebook or a program."""

import threading
from collections.abc import Callable
from typing import Any

from raypipe.errors import UsageError
from raypipe.run.live.control import Control
from raypipe.run.result import Outcome


class Run:
    """A run in the background, which can be watched and scaled.

    Args:
        do: does the run. It is called with `began` and `stop`, as in `carry_out`.
    """

    def __init__(self, do: Callable[..., Outcome]):
        self._stop = threading.Event()
        self._began = threading.Event()
        self._control: Control | None = None
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

        def begin(control: Control) -> None:
            self._control = control
            self._began.set()

        def work() -> None:
            try:
                self._outcome = do(began=begin, stop=self._stop)
            except BaseException as error:  # `wait` raises it
                self._error = error
            finally:
                self._began.set()

        self._thread = threading.Thread(target=work, name="raypipe-run", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def live(self) -> dict[str, Any]:
        """The current figures (`Control.live`). Waits for the execution to begin.

        Raises:
            UsageError: it has ended.
        """
        return self._begun().live()

    def scale(self, **counts: int) -> dict[str, int]:
        """Change actor counts, as in scale(preprocess=8, write=4) (`Control.scale`).

        Waits for the first actors of the execution.
        """
        return self._begun().scale(counts, wait=True)

    def stop(self) -> None:
        """End the run after the shards in progress. Results are kept; the same settings go on."""
        self._stop.set()

    def wait(self) -> Outcome:
        """Wait for the end, and return the outcome. Raises what the run raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def _begun(self) -> Control:
        self._began.wait()
        if self._control is None:
            self.wait()
            raise UsageError("This run had nothing to do.")
        return self._control
