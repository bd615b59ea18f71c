"""Files that llama.cpp reads: an adapter as GGUF LoRA, and a whole model in the form of its base's own GGUF file."""

from adapters._gguf.adapter import GgufReport, export_gguf
from adapters._gguf.model import ModelReport, export_model

__all__ = ["GgufReport", "ModelReport", "export_gguf", "export_model"]
