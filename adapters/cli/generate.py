"""`adapters generate`: an answer to one prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapters._errors import AdapterError
from adapters.cli.refusal import Json, Quantize, print_json, refusing


@refusing
def generate_text(
    model: Annotated[str, typer.Argument(help="The base: an embedded name, a Hub id or a folder.")],
    prompt: Annotated[str, typer.Option(help="What to answer; a user turn where the model has a chat template.")],
    adapter: Annotated[str | None, typer.Option(help="A saved adapter; without one the base answers.")] = None,
    system: Annotated[str | None, typer.Option(help="A system turn before the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt greedily, with or without an adapter.

    Example:  adapters generate smollm2-135m-instruct --adapter out/fr --prompt "Good morning"
    """
    import adapters
    from adapters._hub.quiet import quiet
    from adapters.cli.loading import load_adapted
    from adapters.train.generation import generate
    from adapters.train.machine import use_all_cores

    use_all_cores()
    with quiet():
        if adapter is None:
            loaded, tokenizer = adapters.load_base(model, quantize=quantize, kind="causal")
        else:
            loaded, tokenizer = load_adapted(model, adapter, quantize)
        if tokenizer is None or not loaded.can_generate():
            raise AdapterError(f"{model!r} cannot generate text: it is no causal language model with a tokenizer.")
        (ids,) = generate(loaded, tokenizer, [_ids(tokenizer, prompt, system)], max_new_tokens)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if as_json:
        print_json({"model": model, "adapter": adapter, "prompt": prompt, "text": text, "tokens": len(ids)})
    else:
        typer.echo(text)


def _ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    from adapters.data import encode_prompt

    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "system", "content": system}] if system is not None else []
        return encode_prompt(tokenizer, [*turns, {"role": "user", "content": prompt}])
    if system is not None:
        raise AdapterError("--system needs a model with a chat template, which this one has not.")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids
