"""`adapters export`: an adapter in the form that another program reads."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters._errors import AdapterError
from adapters._whole import require_new
from adapters.cli.refusal import Json, print_json, refusing


class Form(StrEnum):
    """What is written."""

    PEFT = "peft"
    GGUF = "gguf"
    MLX = "mlx"
    MERGED = "merged"
    MERGED_GGUF = "merged-gguf"


@refusing
def export_adapter(
    model: Annotated[str, typer.Argument(help="The base: an embedded name, a Hub id or a folder.")],
    adapter: Annotated[str, typer.Argument(help="A saved adapter: a folder or a Hub id.")],
    to: Annotated[
        Form,
        typer.Option(
            help="peft: the two files of stock PEFT (also for vLLM, mistral.rs). gguf: a LoRA for llama.cpp. "
            "mlx: a LoRA or DoRA for mlx-lm. merged: a plain model. merged-gguf: the same for llama.cpp."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder, or file for gguf; it must not exist.")],
    base_gguf: Annotated[
        Path | None,
        typer.Option(help="The base as a GGUF file, in any precision: proves names and orders; merged-gguf needs it."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of merged-gguf: float32, float16 or bfloat16.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Write an adapter for another program, and read back what was written.

    Example:  adapters export smollm2-135m-instruct out/function-calls-lora --to gguf --output out/lora.gguf
    """
    from adapters._hub.quiet import quiet
    from adapters.cli.loading import load_adapted

    require_new(output)
    if to is Form.MERGED_GGUF and base_gguf is None:
        raise AdapterError("--to merged-gguf needs --base-gguf FILE: the base's tokenizer and settings come from it.")
    with quiet():
        report = _written(to, *load_adapted(model, adapter), output, base_gguf, dtype)
    if as_json:
        print_json({"output": str(output), "report": asdict(report)})
    else:
        typer.echo(f"{report}\nwritten to {output}")


def _written(to: Form, model: Any, tokenizer: Any, output: Path, base_gguf: Path | None, dtype: str) -> Any:
    """The library's report."""
    import adapters
    from adapters._merge.prompts import usual
    from adapters.cli.merge import write_model

    match to:
        case Form.PEFT:
            return adapters.export_peft(model, "default", output)
        case Form.GGUF:
            return adapters.export_gguf(model, "default", output, base_gguf)
        case Form.MLX:
            return adapters.export_mlx(model, "default", output)
    certificate = adapters.merge(model, "default", prompts=usual(model, tokenizer), tokenizer=tokenizer)
    if to is Form.MERGED:
        write_model(model, tokenizer, asdict(certificate), output)
        return certificate
    assert base_gguf is not None
    return adapters.export_model(model, output, base_gguf, dtype, tokenizer)
