"""raypipe: preprocess images for machine learning on Ray, and see per stage what limits.

outcome = raypipe.preprocess("photos", output="out", actors=4)
run = raypipe.start("photos", output="out")  # in the background
loader = raypipe.loader("photos", batch_size=64, epochs=3)  # for a training loop

The run has live(), scale(), stop() and wait().
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raypipe.errors import UsageError

if TYPE_CHECKING:
    import os

    import pyarrow as pa
    from rich.console import Console

    from raypipe.run.background import Run
    from raypipe.run.result import Outcome
    from raypipe.train.loader import Loader
    from raypipe.train.minibatch import Minibatch

__all__ = ["UsageError", "loader", "preprocess", "start"]
__version__ = "0.1.0"


def preprocess(
    input: "str | os.PathLike[str]",
    *,
    consume: "Callable[[pa.Table], None] | None" = None,
    console: "Console | None" = None,
    **settings: Any,
) -> "Outcome":
    """Preprocess images, to the end.

    Args:
        input: folder, glob, file, tar or Parquet files, local or s3:// gs://; or demo, demo:COUNT.
        consume: called with each block of pixels (schema BLOCK of raypipe.data.tables). Only
            without an output.
        console: where messages go; by default the terminal (stderr).
        settings: the flags of jobs/preprocess.py by name: output="out", max_pixels=10**8.

    Returns:
        The outcome. Its `report` is report.json, or None if nothing was left to do.

    Raises:
        UsageError: the request cannot be done. Nothing was started.
    """
    from raypipe.run.preprocess import Settings, run

    return run(Settings.of(input=input, **settings), consume=consume, console=console)


def start(
    input: "str | os.PathLike[str]",
    *,
    consume: "Callable[[pa.Table], None] | None" = None,
    console: "Console | None" = None,
    **settings: Any,
) -> "Run":
    """Begin to preprocess images in the background; arguments as for `preprocess`.

    Returns:
        The run: live(), scale(preprocess=8), stop(), wait().

    Raises:
        UsageError: a setting is unknown or missing. Other errors are raised by `wait`.
    """
    from raypipe.run.preprocess import Settings, start

    return start(Settings.of(input=input, **settings), consume=consume, console=console)


def loader(
    input: "str | os.PathLike[str]",
    *,
    transform: "Callable[[Minibatch], Any] | None" = None,
    console: "Console | None" = None,
    **settings: Any,
) -> "Loader":
    """Preprocessed batches for a training loop. Iterate over it: one pass is one epoch.

    Actors start with the first batch. Batches fill past images that are rejected. Each image is
    given exactly once an epoch, also across `state_dict` and `load_state_dict`. With several ranks
    (torchrun, Ray Train, Lightning), each makes the same call and gets its share; `batch_size` is
    of each rank, and all ranks make the same number of steps.

    Args:
        input: as for `preprocess`.
        transform: called with each batch in the process of the loop; the loop gets what it returns.
        console: where messages go; by default the terminal (stderr).
        settings: recipe, batch_size, epochs, shuffle, finish, device, equal
            (raypipe.train.settings.Loading); and the flags of jobs/preprocess.py that say which
            images, how they are decoded and by how many actors: annotations, seed, backend,
            actors, limit, report ...

    Returns:
        The loader: len(), epoch, state_dict(), load_state_dict(), scale(preprocess=8), close(). It
        is a context manager too. Its batches are raypipe.train.minibatch.Minibatch.

    Raises:
        UsageError: the request cannot be done. Nothing was started.
    """
    from raypipe.train.loader import Loader
    from raypipe.train.settings import LoaderSettings

    given = LoaderSettings.of(input=input, **settings)
    return Loader(given, transform=transform, console=console)
