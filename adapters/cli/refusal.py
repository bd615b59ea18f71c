"""What every command shares: one sentence and an exit code in place of a traceback, and JSON on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from adapters._errors import AdapterError

P = ParamSpec("P")
R = TypeVar("R")

Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, everything else to standard error.")]
Quantize = Annotated[str | None, typer.Option(help="Load the base in 4 bits: nf4.")]


def refusing(command: Callable[P, R]) -> Callable[P, R]:
    """Turns a refusal into its sentence on standard error and exit code 1, an interrupt into exit code 130."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AdapterError as error:
            _say(str(error))
            raise typer.Exit(1) from error
        except OSError as error:  # a full disk, a folder that may not be written
            _say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            _say(str(error) or "interrupted.")
            raise typer.Exit(130) from error

    return run


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _say(sentence: str) -> None:
    print(f"adapters: {sentence}", file=sys.stderr, flush=True)
