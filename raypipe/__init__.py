"""raypipe: preprocess images for machine learning on Ray, and see per stage what limits.

outcome = raypipe.preprocess(input="photos", output="out", actors=4)
run = raypipe.start(input="photos", output="out")  # in the background

The run has live(), scale(), stop() and wait().
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raypipe.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

    from raypipe.run.background import Run
    from raypipe.run.result import Outcome

__all__ = ["UsageError", "preprocess", "start"]
__version__ = "0.1.0"


def preprocess(
    *,
    consume: "Callable[[pa.Table], None] | None" = None,
    console: "Console | None" = None,
    **settings: Any,
) -> "Outcome":
    """Preprocess images, to the end.

    Args:
        consume: called with each block of pixels (schema BLOCK of raypipe.data.tables). Only
            without an output.
        console: where messages go; by default the terminal (stderr).
        settings: the flags of jobs/preprocess.py by name: input="photos", max_pixels=10**8.

    Returns:
        The outcome. Its `report` is report.json, or None if nothing was left to do.

    Raises:
        UsageError: the request cannot be done. Nothing was started.
    """
    from raypipe.run.preprocess import Settings, run

    return run(Settings.of(**settings), consume=consume, console=console)


def start(
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

    return start(Settings.of(**settings), consume=consume, console=console)
