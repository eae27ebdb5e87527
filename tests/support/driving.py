"""A run in a process of its own, on a cluster: what it says, how it goes, and a hand on it.

    python -m tests.support.driving '{"input": ..., ...}'

prints its live record as a line of JSON twice a second, and at the end its report. A line of JSON
to its stdin scales it.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import ROOT
from tests.support.clusters import environment

if TYPE_CHECKING:
    from raypipe.images.recipe import Recipe

UNTIL_S = 150.0

AROUND = environment(
    PYTHONPATH=str(ROOT),
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="a" * 32,
    # A lost node is noticed sooner.
    RAY_health_check_period_ms="1000",
    RAY_health_check_failure_threshold="3",
)
"""The environment of a cluster whose nodes come and go, and of its runs."""


def given_of(out: Path | str, there: Path, **given: Any) -> dict[str, Any]:
    """A run on images that wait until the file `there` exists, one a shard."""
    recipe = {"recipe": "waits", "there": str(there)}
    return {"input": "demo:3000", "output": str(out), **recipe, "shard_rows": 1, **given}


def waiting_recipe(there: str) -> "Recipe":
    """The recipe `waits`, which takes 1 s an image until the file `there` exists."""
    from raypipe.images.ops.geometry import Resize
    from raypipe.images.recipe import Recipe
    from tests.support.killing import WaitUntil

    ops = (WaitUntil(there=there), Resize(height=30, width=30))
    return Recipe(name="waits", ops=ops)


def main(given: dict[str, Any]) -> None:
    from rich.console import Console

    import raypipe
    from raypipe.images.catalog import RECIPES

    if there := given.pop("there", None):
        RECIPES["waits"] = waiting_recipe(there)
    run = raypipe.start(**given, console=Console(stderr=True, width=400))

    def obey() -> None:
        for line in sys.stdin:
            try:
                print(json.dumps({"scaled": run.scale(**json.loads(line))}), flush=True)
            except raypipe.UsageError as error:
                print(json.dumps({"scaled": str(error)}), flush=True)

    threading.Thread(target=obey, daemon=True).start()
    while not run.done:
        with contextlib.suppress(raypipe.UsageError):
            print(json.dumps({"live": run.live()}), flush=True)
        time.sleep(0.5)
    try:
        print(json.dumps({"report": run.wait().report}), flush=True)
    except raypipe.UsageError as error:
        sys.exit(f"refused: {error}")


@dataclass
class Driven:
    """The run, from outside. `live`: its latest record; `said`: its lines."""

    process: subprocess.Popen
    live: dict[str, Any] | None = None
    scaled: Any = None
    report: dict[str, Any] | None = None
    said: list[str] = field(default_factory=list)

    def until(self, met: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first live record from now on that `met` accepts."""
        ends, before = time.monotonic() + UNTIL_S, self.live
        while self.live is before or self.live is None or not met(self.live):
            assert self.process.poll() is None, "\n".join(self.said)
            assert time.monotonic() < ends, (self.live, self.said)
            time.sleep(0.05)
        return self.live

    def says(self, part: str) -> str:
        """The first line with `part`."""
        ends = time.monotonic() + UNTIL_S
        while not (found := [line for line in self.said if part in line]):
            assert self.process.poll() is None, "\n".join(self.said)
            assert time.monotonic() < ends, self.said
            time.sleep(0.05)
        return found[0]

    def scale(self, **counts: int) -> Any:
        """The counts that are asked for then; or why that is refused."""
        assert self.process.stdin is not None
        self.scaled = None
        self.process.stdin.write(json.dumps(counts) + "\n")
        self.process.stdin.flush()
        ends = time.monotonic() + UNTIL_S
        while self.scaled is None:
            assert self.process.poll() is None and time.monotonic() < ends, self.said
            time.sleep(0.05)
        return self.scaled

    def ended(self) -> dict[str, Any]:
        """The report, when it has ended."""
        assert self.process.wait(timeout=UNTIL_S) == 0, "\n".join(self.said)
        ends = time.monotonic() + 10
        while self.report is None and time.monotonic() < ends:
            time.sleep(0.05)
        assert self.report is not None, self.said
        return self.report


@contextlib.contextmanager
def driven(given: dict[str, Any], env: dict[str, str]) -> Iterator[Driven]:
    """Start such a run. It is killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.driving", json.dumps(given)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = Driven(process)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                for name, value in json.loads(line).items():
                    setattr(run, name, value)

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            run.said.append(line.rstrip())

    threads = [threading.Thread(target=do, daemon=True) for do in (read, listen)]
    for thread in threads:
        thread.start()
    try:
        yield run
    finally:
        process.kill()
        process.wait()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
