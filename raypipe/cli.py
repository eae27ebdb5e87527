"""`raypipe recipes | report`: what there is to run, and what a run was. Running is what jobs/ are for."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from raypipe import UsageError
from raypipe.data import journal, location
from raypipe.images import catalog
from raypipe.images.recipe import to_json
from raypipe.insight.report import terminal


@dataclass(frozen=True)
class Recipes:
    """List the recipes that jobs take by name, or print one as JSON, to start an own recipe from."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Recipe to print as JSON."""


@dataclass(frozen=True)
class Report:
    """Print the report of a run again."""

    run: Annotated[str, tyro.conf.Positional]
    """Output directory of the run, or the folder given as --report."""


def recipes(command: Recipes, console: Console) -> None:
    """All recipes as a table, or one as JSON."""
    if command.name is not None:
        console.print_json(json.dumps(to_json(catalog.get(command.name))))
        return
    table = Table("recipe", "size", "what it is, and where from", header_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    for name, recipe in catalog.RECIPES.items():
        size = "varies" if recipe.fixed_size is None else "{}x{}".format(*recipe.fixed_size)
        table.add_row(name, size, recipe.description)
    console.print(table)


def report(command: Report, console: Console) -> None:
    """The report of a finished run.

    Raises:
        UsageError: there is none.
    """
    places = [location.join(command.run, f"{journal.STATE}/report.json"), location.join(command.run, "report.json")]
    for place in places:
        try:
            console.print(terminal(json.loads(location.read(place))))
            return
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{place} is no report of raypipe ({type(error).__name__}: {error}).") from error
    raise UsageError(f"There is no report in {command.run!r}: neither {' nor '.join(places)} exists. A run writes it when it ends.")


def main(arguments: list[str] | None = None) -> int:
    """The `raypipe` command; returns the exit status: 0, or 2 for bad arguments."""
    commands: dict[str, Callable[..., Any]] = {"recipes": Recipes, "report": Report}
    command: Any = tyro.extras.subcommand_cli_from_dict(commands, prog="raypipe", description=__doc__, args=arguments)
    try:
        (recipes if isinstance(command, Recipes) else report)(command, Console())
    except UsageError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
