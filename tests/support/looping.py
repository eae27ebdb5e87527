"""A training loop of somebody's own, as a process: it logs what it gets, and keeps its state.

    python -m tests.support.looping '{"input": "photos", "given": {...}, "folder": "out"}'

With RANK and WORLD_SIZE it is one of several, in step with each other as DDP is.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import raypipe
from tests.conftest import ROOT
from tests.support.runs import quiet


def loop(
    input: str,
    given: dict[str, Any],
    folder: str,
    *,
    attempt: int = 0,
    stop: int | None = None,
    pause_s: float = 0.0,
) -> None:
    """Train for `stop` steps, or to the end, from the state of the attempt before."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not dist.is_initialized():  # Ray Train has done it
        dist.init_process_group("gloo")
    rank = dist.get_rank() if several else 0
    model: nn.Module = nn.Linear(3, 1)
    if several:
        model = nn.parallel.DistributedDataParallel(model)
    root, steps = Path(folder), 0
    loader = raypipe.loader(input, console=quiet(), **given)
    before = [state for at in range(attempt) if (state := _state(root, at)).exists()]
    if before:
        loader.load_state_dict(json.loads(before[-1].read_text())["data"])
    with loader, (root / f"log-{attempt}-{rank}.jsonl").open("w") as log:
        for epoch in range(loader.epoch, given["epochs"]):
            for batch in loader:
                steps += 1
                line = {"epoch": epoch, "image_ids": batch.image_ids, "rejects": batch.rejects}
                log.write(json.dumps(line) + "\n")
                log.flush()
                # Ranks meet in it: a state of rank 0 has no step that another rank has not logged.
                model(batch.images.float().mean(dim=(1, 2))).sum().backward()
                if rank == 0:
                    state = {"data": loader.state_dict(), "steps": steps}
                    _state(root, attempt).with_suffix(".tmp").write_text(json.dumps(state))
                    _state(root, attempt).with_suffix(".tmp").replace(_state(root, attempt))
                time.sleep(pause_s)
                if steps == stop:
                    return


def _state(root: Path, attempt: int) -> Path:
    return root / f"state-{attempt}.json"


def logged(folder: Path) -> list[list[dict[str, Any]]]:
    """The steps of each process, as far as the attempt's state has them."""
    found = []
    for path in sorted(folder.glob("log-*.jsonl")):
        state = _state(folder, int(path.stem.split("-")[1]))
        kept = json.loads(state.read_text())["steps"] if state.exists() else 0
        found.append([json.loads(line) for line in path.read_text().splitlines()[:kept]])
    return found


def images(steps: list[list[dict[str, Any]]]) -> Counter[tuple[int, str]]:
    """How often each image was in each epoch."""
    return Counter(
        (step["epoch"], image_id) for of in steps for step in of for image_id in step["image_ids"]
    )


def started(
    folder: Path, environment: dict[str, str], *, ranks: int = 1, **arguments: Any
) -> list[subprocess.Popen]:
    """The processes of a loop. Arguments are those of `loop`."""
    text = json.dumps({"folder": str(folder), **arguments})
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.looping", text],
            env=environment | ({**several, "RANK": str(rank)} if ranks > 1 else {}),
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop(**json.loads(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()
