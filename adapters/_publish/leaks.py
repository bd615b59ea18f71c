"""What must not leave the machine: paths of it, and secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PATHS = (
    r"(?<![\w.:/])/(?:home|Users|root|mnt|tmp|var|opt|srv|data|scratch|workspace|content|kaggle|private)/[^\s\"'`|<>)\]]+",
    r"(?<!\w)[A-Za-z]:\\+[^\s\"'`|<>]+",
    r"(?<!\w)~/[^\s\"'`|<>)\]]+",
    r"file://[^\s\"'`|<>]+",
)
SECRETS = {
    "a token of the Hub": r"hf_[A-Za-z0-9]{30,}",
    "an API key": r"sk-[A-Za-z0-9_-]{20,}",
    "a key of AWS": r"(?:AKIA|ASIA)[0-9A-Z]{16}",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/\s:@\"']+:[^/\s@\"']+@",
}


@dataclass(frozen=True)
class Leak:
    """Something private in a file. `shown` is a path, or the beginning of a secret."""

    file: str
    kind: str
    shown: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.file} ({self.shown})"


def leaks(files: Mapping[str, bytes]) -> Iterator[Leak]:
    """Paths and secrets in the text of files; of safetensors, in the header."""
    for name, content in files.items():
        text = _text(name, content)
        for pattern in PATHS:
            yield from (Leak(name, "a local path", found.group()) for found in re.finditer(pattern, text))
        for kind, pattern in SECRETS.items():
            yield from (Leak(name, kind, f"{found.group()[:6]}…") for found in re.finditer(pattern, text))


def _text(name: str, content: bytes) -> str:
    if name.endswith(".safetensors"):
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    if name.endswith(".png"):
        return ""
    text = content.decode("utf-8", "replace")
    # as it would be read: in JSON, a path of Windows has its strokes twice, and letters may be written as numbers
    return text if not name.endswith((".json", ".safetensors")) else _unescaped(text)


def _unescaped(text: str) -> str:
    def plain(found: re.Match[str]) -> str:
        try:
            value: str = json.loads(found.group())
        except json.JSONDecodeError:
            return found.group()
        return f'"{value}"'

    return re.sub(r'"(?:[^"\\]|\\.)*\\(?:[^"\\]|\\.)*"', plain, text)
