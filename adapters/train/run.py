"""Recipes as runs: trained and scored, scored again, or only tried out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from adapters._errors import AdapterError
from adapters._hub.quiet import quiet
from adapters.train.recipe import Recipe

if TYPE_CHECKING:
    from adapters.train.outcome import Outcome, Scores
    from adapters.train.preflight import Preflight


def train(
    recipe: Recipe,
    output: str | Path | None = None,
    console: Console | None = None,
    *,
    resume: bool = False,
    restart: bool = False,
) -> Outcome | None:
    """Runs a recipe and prints what happens.

    Args:
        recipe: from `read_recipe`.
        output: folder of the adapter, in place of the recipe's.
        console: where to print; by default the standard output.
        resume: goes on from the newest complete checkpoint of a run that ended early.
        restart: starts over where there are such checkpoints, and removes them.

    Returns:
        What came of it; None in processes other than the first, which do not write.

    Raises:
        AdapterError: something is missing, the preflight failed, or the watchdog stopped the run.
        KeyboardInterrupt: with a sentence that says what there is and what to do.
    """
    started = time.perf_counter()
    folder = _folder(recipe, output)
    with _packages():
        from adapters.train.whole_run import WholeRun

        run = WholeRun(recipe, folder, console, started)
        try:
            return run.to_the_end(resume, restart)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(run.interrupted()) from None


def evaluate(recipe: Recipe, adapter: str | Path, console: Console | None = None) -> Scores:
    """Scores a saved adapter, and its base, on the recipe's held-out rows."""
    with _packages():
        from adapters.train.whole_run import score_saved

        return score_saved(recipe, adapter, console)


def examine(recipe: Recipe, output: str | Path | None = None, console: Console | None = None) -> Preflight:
    """Does all that a run does before its first step, and nothing after it: loads, attaches, reads the rows, tries.

    Args:
        recipe: from `read_recipe`.
        output: folder that the run would write to, in place of the recipe's; nothing is written.
        console: where to print; by default the standard output.

    Raises:
        AdapterError: it cannot even be tried. What failed in the preflight is in the result.
    """
    with _packages():
        from adapters.train.whole_run import examine_only

        return examine_only(recipe, _folder(recipe, output), console)


def _folder(recipe: Recipe, output: str | Path | None) -> Path:
    return Path(output or recipe.output.replace("{method}", recipe.method.name))


@contextmanager
def _packages() -> Iterator[None]:
    """Their notices on import are not printed, and where one is missing a clear sentence says so."""
    try:
        with quiet():
            yield
    except ModuleNotFoundError as error:
        raise AdapterError(
            f'training needs the package {error.name}: run `pip install "adapter-registry[all]"` and try again.'
        ) from error
