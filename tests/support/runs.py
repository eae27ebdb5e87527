"""Runs of tests: their settings, the same work without Ray, and how far one is."""

import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from raypipe.data.location import Location
from raypipe.data.reader import Reader
from raypipe.data.sinks import Sink
from raypipe.data.work import shards
from raypipe.run.background import Run
from raypipe.run.preprocess import Settings, plan
from raypipe.stages.planning import Preprocessing
from raypipe.stages.preprocess import preprocess_shard
from raypipe.stages.write import write_block
from tests.conftest import buffer


def quiet() -> Console:
    return Console(file=buffer(), width=200)


def texts(given: dict[str, Any]) -> dict[str, Any]:
    """Settings as a user gives them: paths as text."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}


def settings(**given) -> Settings:
    """One actor does all: a process takes 2 s of CPU to start. Tests of several ask for them."""
    return Settings.of(**texts({"actors": 1, "writers": 0, "shard_rows": 7} | given))


def plain_loop(wanted: Settings, root: Path) -> None:
    """The same work without Ray: a for-loop over the same functions."""
    todo = plan(wanted.changed(output=None))
    stored, backend = wanted.stored, wanted.decoding.backend
    pixels = Preprocessing(recipe=todo.recipe, backend=backend, seed=wanted.source.seed)
    sink = Sink(format=stored.format, root=Location.of(str(root)), quality=stored.quality)
    finish = todo.recipe.finish if stored.format == "npy" else None
    reader = Reader()
    for shard in shards(todo.work):
        block, _ = preprocess_shard(shard, pixels, reader=reader)
        write_block(block, sink, backend=backend, finish=finish)


def until(run: Run, met, *, at_most_s: float = 300) -> dict:
    """The first live record that `met` accepts."""
    ended = time.monotonic() + at_most_s
    while True:
        record = run.live()
        if met(record):
            return record
        assert time.monotonic() < ended, record
        time.sleep(0.1)


def running(record: dict) -> dict[str, tuple[int, int, int]]:
    """Actors of each stage: at work, starting, draining."""
    return {
        stage["name"]: (stage["actors"], stage["pending"], stage["draining"])
        for stage in record["stages"]
    }


def named(process: psutil.Process, name: str) -> bool:
    try:
        return process.name().startswith(name)
    except psutil.NoSuchProcess:
        return False
