"""Measure what the latency of an object store costs: images/s with it, beside those without.

    # a real S3 server on this machine, 30 ms away and near; about 5 minutes
    python jobs/benchmarks/stores.py --rounds 3
    # requests alone: one at a time and 64 at a time, by the clients that there are
    python jobs/benchmarks/stores.py --requests

Small JPEGs are read from a bucket and preprocessed; or they are read from disk, preprocessed and
written to a bucket, a file an image. A proxy in front of the server delays each request, and each
new connection, by the latency. The same proxy without a delay is what that is compared with. The
server (moto, in Python) is slow and takes one of the cores: a real store is not. Rates are steady
ones, of all images from when the actors were ready to the last output.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import obstore
import ray
import tyro
from pyarrow import fs
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from raypipe.data.location import Location  # noqa: E402
from raypipe.run.cluster.session import ray_here  # noqa: E402
from raypipe.run.preprocess import Settings, run  # noqa: E402
from tests.support.s3 import query, server  # noqa: E402

BUCKET = "benchmark"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure."""

    images: int = 2000
    """Small objects."""
    latency_ms: float = 30.0
    """From a request to its answer."""
    actors: int = 2
    """Preprocess actors; they write too."""
    rounds: int = 1
    """Near and far once a round, in turn."""
    requests: bool = False
    """Only the requests, without raypipe."""


@contextlib.contextmanager
def proxied(target: str, latency_ms: float) -> Iterator[str]:
    """Where a proxy in front of `target` listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.proxy", target, f"--latency-ms={latency_ms}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def picture(index: int) -> bytes:
    """A JPEG of 160x120, which compresses as photos do."""
    coarse = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image)[1].tobytes()


def place(address: str, key: str) -> Location:
    """A key of the bucket, by way of `address`."""
    return Location.of(f"s3://{BUCKET}/{key}?{query(address)}")


def rate(settings: Settings, images: int) -> float:
    """Steady images/s of a run, in which no image may be lost."""
    report = run(settings, console=Console(quiet=True)).report
    assert report is not None and report["images_out"] == images, report
    return report["steady_images_per_s"]


def pipelines(wanted: Benchmark, addresses: dict[str, str], folder: str, console: Console) -> None:
    """Print the images/s of reading and of writing, far beside near."""
    ray_here(
        num_cpus=wanted.actors, log_to_driver=False, logging_level="ERROR", include_dashboard=False
    )
    found: dict[str, list[float]] = {"reading": [], "writing": []}
    for round_ in range(wanted.rounds):
        order = list(addresses) if round_ % 2 == 0 else list(addresses)[::-1]
        for direction, ratios in found.items():
            rates = {}
            for name in order:
                far = addresses[name]
                given = Settings.of(
                    input=str(place(far, "photos")) if direction == "reading" else folder,
                    output=None
                    if direction == "reading"
                    else str(place(far, f"out-{round_}-{name}")),
                    recipe="photos-300",
                    actors=wanted.actors,
                    writers=0,
                )
                rates[name] = rate(given, wanted.images)
            ratios.append(rates["far"] / rates["near"])
            console.print(
                f"round {round_ + 1}, {direction}: {rates['far']:.0f} images/s far, "
                f"{rates['near']:.0f} near: {ratios[-1]:.2f}",
                highlight=False,
            )
    for direction, ratios in found.items():
        console.print(
            f"{direction} with {wanted.latency_ms:g} ms is {statistics.median(ratios):.2f} of that "
            f"without ({min(ratios):.2f}-{max(ratios):.2f})",
            highlight=False,
        )


def requests(wanted: Benchmark, addresses: dict[str, str], console: Console) -> None:
    """Print objects/s and CPU of this process by client, direction and requests at a time."""
    data = {f"requests/{i:05d}.jpg": picture(i) for i in range(wanted.images)}
    for name, address in addresses.items():
        root = place(address, "")
        assert root.store is not None
        client = root.store.objects()
        text = f"s3://{BUCKET}/?{query(address)}"
        plain, base = fs.FileSystem.from_uri(text)
        delayed, _ = fs.FileSystem.from_uri(f"{text}&allow_delayed_open=true")

        def streamed(system: fs.FileSystem, key: str, base: str = base) -> None:
            with system.open_output_stream(f"{base}/{key}") as stream:
                stream.write(data[key])

        def read(key: str, plain: fs.FileSystem = plain, base: str = base) -> None:
            with plain.open_input_stream(f"{base}/{key}") as stream:
                stream.read()

        def put(key: str, client: Any = client) -> None:
            obstore.put(client, key, data[key])

        def get(key: str, client: Any = client) -> None:
            bytes(obstore.get(client, key).bytes())

        ways: dict[str, Callable[[str], object]] = {
            "put, obstore": put,
            "put, pyarrow": partial(streamed, plain),
            "put, pyarrow, allow_delayed_open": partial(streamed, delayed),
            "get, obstore": get,
            "get, pyarrow": read,
        }
        for way, do in ways.items():
            for at_once in (1, 64):
                some = list(data)[: wanted.images if at_once > 1 else wanted.images // 20]
                with ThreadPoolExecutor(at_once) as threads:
                    list(threads.map(do, some[:at_once]))  # connections
                    began, cpu = time.perf_counter(), time.process_time()
                    list(threads.map(do, some))
                    took, cpu = time.perf_counter() - began, time.process_time() - cpu
                console.print(
                    f"{name}, {way}, {at_once} at a time: {len(some) / took:.0f} objects/s, "
                    f"{1000 * cpu / len(some):.2f} ms of CPU each",
                    highlight=False,
                )


def main() -> int:
    """Measure and print."""
    wanted = tyro.cli(Benchmark, description=__doc__)
    console = Console(width=140)
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    with (
        server() as near,
        proxied(near, 0.0) as no_way,
        proxied(near, wanted.latency_ms) as long_way,
        tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder,
    ):
        addresses = {"near": no_way, "far": long_way}
        system, path = place(near, "").filesystem()
        system.create_dir(path)
        if wanted.requests:
            requests(wanted, addresses, console)
            return 0
        for index in range(wanted.images):
            data = picture(index)
            Path(folder, f"{index:05d}.jpg").write_bytes(data)
            place(near, "").write(f"photos/{index:05d}.jpg", data)
        pipelines(wanted, addresses, folder, console)
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
