"""`adapters merge`: one plain model out of a base and an adapter."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters._errors import AdapterError
from adapters._whole import require_new
from adapters.cli.refusal import Json, Quantize, print_json, refusing


@refusing
def merge_adapter(
    model: Annotated[str, typer.Argument(help="The base: an embedded name, a Hub id or a folder.")],
    adapter: Annotated[str, typer.Argument(help="A saved adapter: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder of the merged model; it must not exist, or be empty.")],
    quantize: Quantize = None,
    shards: Annotated[
        str | None,
        typer.Option(
            help="Write files of this size, such as 256MB, one after the other, in the memory that one needs: for a "
            "base larger than memory. A merge that was broken off goes on."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, one a line, which both models continue; a few usual ones without it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, verify the result, and write a plain model with the certificate beside it.

    Example:  adapters merge smollm2-135m-instruct out/function-calls-lora --output out/merged
    """
    import adapters
    from adapters._hub.quiet import quiet
    from adapters._merge.prompts import usual
    from adapters.cli.loading import load_adapted

    require_new(output)
    with quiet():
        loaded, tokenizer = load_adapted(model, adapter, quantize)
        asked = _prompts(prompts) or usual(loaded, tokenizer)
        if shards is None:
            certificate = adapters.merge(loaded, "default", prompts=asked, tokenizer=tokenizer)
            write_model(loaded, tokenizer, asdict(certificate), output)
        else:
            certificate = _by_shards(loaded, tokenizer, output, shards, asked)
    if as_json:
        print_json({"output": str(output), "certificate": asdict(certificate)})
    else:
        typer.echo(f"{certificate}\nwritten to {output}")


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file} cannot be read as prompts: {error}.") from error
    if not found:
        raise AdapterError(f"{file} holds no prompt: write one a line.")
    return found


def _by_shards(model: Any, tokenizer: Any, output: Path, shard: str, prompts: Sequence[str]) -> Any:
    from rich.console import Console

    import adapters

    with Console(stderr=True).status("merging") as status:
        return adapters.merge_files(
            model,
            "default",
            output,
            tokenizer=tokenizer,
            shard=shard,
            prompts=prompts,
            tell=lambda text: status.update(f"merging: {text}"),
        )


def write_model(model: Any, tokenizer: Any, certificate: dict[str, Any], output: Path) -> None:
    """Everything in a folder beside `output`, then one rename: there is never half a model under that name."""
    from adapters._merge.files import CERTIFICATE

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent, ignore_cleanup_errors=True) as work:
        folder = Path(work) / "model"
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=2, default=str) + "\n")
        if output.is_dir():
            output.rmdir()  # empty; a rename onto it is refused on Windows
        os.replace(folder, output)
