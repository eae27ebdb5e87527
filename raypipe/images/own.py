"""Code of the user's own, by name: ops and models that are written `module:name`."""

import importlib
from collections.abc import Collection
from typing import Any

from raypipe.errors import UsageError, printable


def imported(name: str, *, what: str, trusted: Collection[str] | None = None) -> Any:
    """What is called `name` in Python, "module:attribute".

    Args:
        what: what it is and where it is named, as the beginning of a sentence: "own model".
        trusted: the names that may be imported. None: the user wrote the name, so it may be any.

    Raises:
        UsageError: it is not trusted, or cannot be imported.
    """
    shown = repr(printable(name))
    if trusted is not None and name not in trusted:
        raise UsageError(
            f"{what} {shown} is no part of raypipe: loading it would run code that whoever made the file chose. Nothing "
            f"was loaded. If you know that code, add --trust {printable(name)}"
        )
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the module, which may raise anything
        raise UsageError(
            f"{what} {shown} cannot be imported: {type(error).__name__}: {error}; it must be importable as "
            "module:name on every node"
        ) from error
