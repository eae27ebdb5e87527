"""Import own ops and models by their names, `module:name`."""

import importlib
from collections.abc import Collection
from typing import Any

from raypipe.errors import UsageError, printable


def imported(name: str, *, what: str, trusted: Collection[str] | None = None) -> Any:
    """Import an attribute by its name, "module:attribute".

    Args:
        what: what it is and where it is named; the message begins with it: "own model".
        trusted: the names that may be imported. None: any, because the user wrote the name.

    Raises:
        UsageError: it is not trusted, or cannot be imported.
    """
    shown = repr(printable(name))
    if trusted is not None and name not in trusted:
        raise UsageError(
            f"{what} {shown} is no part of raypipe: loading it would run code that whoever made "
            f"the file chose. Nothing was loaded. If you know that code, add "
            f"--trust {printable(name)}"
        )
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the module, which may raise anything
        raise UsageError(
            f"{what} {shown} cannot be imported: {type(error).__name__}: {error}; it must be "
            "importable as module:name on every node"
        ) from error
