"""Measure raypipe.loader beside other loaders, to a loop that touches every byte.

    # about 5 minutes on 2 cores
    python jobs/benchmarks/loader.py --input demo:2000
    # of your own photos
    python jobs/benchmarks/loader.py --input photos/ --rounds 5

Contenders, all with OpenCV to 300x300, shuffled, in batches of 64, with as many processes as cores:
- PyTorch's DataLoader;
- LitData's StreamingDataLoader, where `litdata` is installed: from files that hold the JPEGs;
- raypipe.loader.

uint8: batches as they are. float: normalised float32 (n, 3, height, width). The DataLoaders
normalise in the loop's process too, with the same function: in their workers it would quadruple
what they send.

Images/s are over the last three quarters of the batches, so that no start counts.

Then seconds from the call of raypipe.loader to its first batch, with Ray there before: of a fresh
loader, and of one that goes on from the middle of an epoch.
"""

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from peers import BATCH, SIZE, Frames, Paths, chunks, of_chunk, one_thread, prepared
from rich.console import Console
from throughput import local_files
from torch.utils.data import DataLoader

import raypipe
from raypipe.images import torchvision as on_torch
from raypipe.images.catalog import get
from raypipe.images.ops.geometry import Resize
from raypipe.images.recipe_json import to_json
from raypipe.run.cluster.machine import cores_here
from raypipe.run.cluster.session import ray_here

RECIPE = get("coco-300-pt")
FINISH = RECIPE.finish
CPU = torch.device("cpu")
Batches = Iterator[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    input: str = "demo:2000"
    """Folder, glob or demo:COUNT of image files."""
    epochs: int = 2
    """Of each contender in each round."""
    rounds: int = 3
    """Every contender once a round."""


def normalised(batch: torch.Tensor) -> torch.Tensor:
    """What finish="device" does on a CPU."""
    assert FINISH is not None
    return on_torch.finish(batch, replace(FINISH, layout="chw", dtype="float32"))


def dataloader(
    paths: Paths,
    epochs: int,
    finished: bool,
    *,
    workers: int | None = None,
    device: torch.device = CPU,
) -> Batches:
    frames: Any = Frames(paths, None)
    loader: Any = DataLoader(
        frames,
        batch_size=BATCH,
        shuffle=True,
        num_workers=cores_here() if workers is None else workers,
        worker_init_fn=one_thread,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        # A forked process hangs where this one has used threads of OpenCV, Ray or CUDA.
        multiprocessing_context="spawn",
    )
    for _ in range(epochs):
        for batch in loader:
            there = batch.to(device, non_blocking=True)
            yield normalised(there) if finished else there


def litdata(paths: Paths, epochs: int, finished: bool) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    folder = str(prepared("chunks", paths, chunks))
    loader = StreamingDataLoader(
        StreamingDataset(folder, shuffle=True, transform=partial(of_chunk, folder=None)),
        batch_size=BATCH,
        num_workers=cores_here(),
        worker_init_fn=one_thread,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    for _ in range(epochs):
        for batch in loader:
            yield normalised(batch) if finished else batch


def recipe() -> str:
    """The file of a recipe that resizes in uint8, as the others do. MLPerf's do so in float32."""
    file = Path(tempfile.gettempdir()) / "raypipe-benchmark-loader.json"
    resized = replace(RECIPE, name="benchmark", ops=(Resize(height=SIZE, width=SIZE),))
    file.write_text(json.dumps(to_json(resized)))
    return str(file)


def opened(paths: Paths, epochs: int, *, finished: bool = False) -> Any:
    return raypipe.loader(
        paths[0].rpartition("/")[0],
        recipe=recipe(),
        batch_size=BATCH,
        epochs=epochs,
        actors=cores_here(),
        limit=len(paths),
        finish="device" if finished else None,
        device="cpu" if finished else None,
        console=Console(quiet=True),
    )


def raypipes(paths: Paths, epochs: int, finished: bool) -> Batches:
    with opened(paths, epochs, finished=finished) as loader:
        for _ in range(epochs):
            for batch in loader:
                yield batch.images


CONTENDERS: dict[str, Callable[[Paths, int, bool], Batches]] = {
    "dataloader": dataloader,
    "litdata": litdata,
    "raypipe": raypipes,
}


def rate(batches: Batches) -> float:
    """Images/s of a loop that touches every byte, over the last three quarters."""
    moments: list[tuple[float, int]] = []
    for batch in batches:
        batch.max()  # a sum would turn bytes into int64 first: 1.5 ms an image, and this is 0.014
        moments.append((time.perf_counter(), len(batch)))
    begin = len(moments) // 4
    images = sum(count for _, count in moments[begin + 1 :])
    return images / (moments[-1][0] - moments[begin][0])


def first_batches(paths: Paths) -> tuple[float, float]:
    """Seconds to the first batch of a fresh loader, and of one that resumes in mid-epoch."""

    def first(state: dict[str, Any] | None) -> tuple[float, dict[str, Any]]:
        began = time.perf_counter()
        with opened(paths, 1) as loader:
            if state is not None:
                loader.load_state_dict(state)
            batches = iter(loader)
            next(batches)
            took = time.perf_counter() - began
            if state is None:
                for _ in range(len(loader) // 2):
                    next(batches)
            return took, loader.state_dict()

    fresh, state = first(None)
    return fresh, first(state)[0]


def main(benchmark: Benchmark) -> None:
    paths = local_files(benchmark.input)
    names = [name for name in CONTENDERS if name != "litdata" or importlib.util.find_spec(name)]
    ray_here(
        num_cpus=cores_here(), include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    rates: dict[tuple[str, str], list[float]] = {}
    for turn in range(benchmark.rounds):
        first = turn % len(names)  # the machine may become slower, or faster
        for kind in ("uint8", "float"):
            for name in names[first:] + names[:first]:
                batches = CONTENDERS[name](paths, benchmark.epochs, kind == "float")
                rates.setdefault((kind, name), []).append(rate(batches))
    firsts = [first_batches(paths) for _ in range(benchmark.rounds)]
    print(f"{len(paths)} images, {cores_here()} cores, medians of {benchmark.rounds} rounds")
    print("| batches | contender | images/s | of DataLoader |\n|---|---|---|---|")
    for (kind, name), values in rates.items():
        dataloader = rates[kind, "dataloader"]
        ratios = [mine / theirs for mine, theirs in zip(values, dataloader, strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        middle = f"{statistics.median(values):.0f} | {statistics.median(ratios):.2f} ({spread})"
        print(f"| {kind} | {name} | {middle} |")
    fresh, resumed = (statistics.median(each) for each in zip(*firsts, strict=True))
    ratio = statistics.median(resumed / fresh for fresh, resumed in firsts)
    print(f"first batch: {fresh:.2f} s fresh, {resumed:.2f} s resumed, ratio {ratio:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
