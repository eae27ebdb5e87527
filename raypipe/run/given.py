"""Values that Python code gives, as the types that they must have."""

import functools
import os
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from raypipe.errors import UsageError


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value that Python code has given, as a type.

    Args:
        name: what it is given as, for the message.
        hint: the type, such as `int | None`. Text may be given as a path object.

    Raises:
        UsageError: it is no such value.
    """
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(map(_wanted, error.errors())))
        raise UsageError(f"{name} is {value!r}; it must be {wanted}.") from error


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _wanted(error: ErrorDetails) -> str:
    """What a value must be by an error, as "a valid integer" or "'jpeg', 'png' or 'npy'"."""
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    return error["msg"].removeprefix("Input should be ").partition(",")[0]
