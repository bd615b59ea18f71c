"""A published GGUF file, once, to a folder of safetensors that any version of transformers reads quickly."""

from __future__ import annotations

import importlib.util
import io
import sys
from contextlib import redirect_stderr
from pathlib import Path

import torch
from rich.console import Console

from adapters._errors import AdapterError
from adapters._hub.quiet import quiet


def convert(gguf: Path, folder: Path) -> None:
    """Writes model (bf16), tokenizer, chat template and generation settings of a GGUF file to `folder`.

    Raises:
        AdapterError: the `gguf` package is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise AdapterError(
            'reading this model needs the package gguf: run `pip install "adapter-registry[models]"` and try again.'
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    waiting = Console(file=sys.stderr).status("converting the model to safetensors, once (about 20 seconds)")
    with waiting, quiet(), redirect_stderr(io.StringIO()):  # one of the bars cannot be switched off
        read = {"gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **read
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **read)
        tokenizer.model_max_length = model.config.max_position_embeddings
        # a fresh model: the one that was read remembers GGUF, and could not be saved
        config = model.config.__class__.from_dict(
            {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        )
        config.architectures = [type(model).__name__]
        with torch.device("meta"):
            plain = type(model)(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
