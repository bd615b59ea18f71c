"""Every command and code block of the README is run, or checked where running it is what another test does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.real
@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in blocks("python"):
        exec(compile(example, "README.md", "exec"), {})
    for name in re.findall(r'adapters\.save\(.*"(out/\w+)"\)', README):
        assert (tmp_path / name / "adapter_model.safetensors").exists(), name


def test_the_two_commands_are_one_line_each_and_install_what_they_run() -> None:
    commands = [block.strip() for block in blocks("sh") if block.startswith("python3 -m venv")]
    assert len(commands) == 2
    for command, ending in zip(commands, ("adapters train recipes/quickstart.yaml", "python -m pytest"), strict=True):
        assert "\n" not in command
        assert command.endswith(ending)
        assert "-c .ci/constraints.txt" in command


def test_every_command_line_parses_and_every_option_exists() -> None:
    (listing,) = [block for block in blocks("sh") if block.startswith("adapters methods")]
    for line in listing.strip().splitlines():
        words = shlex.split(line, comments=True)
        options = [word for word in words if word.startswith("--")]
        shown = subprocess.run(
            [sys.executable, "-m", "adapters", words[1], "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert shown.returncode == 0, shown.stderr
        for option in options:
            assert option in shown.stdout, (words[1], option)


def test_the_file_tree_is_the_file_tree() -> None:
    (tree,) = [block for block in blocks("text") if block.startswith("adapters/")]
    for name in re.findall(r"^ {15}(\w+)/ ", tree, re.M):
        assert (ROOT / "adapters" / name).is_dir(), name
    packages = {
        path.name for path in (ROOT / "adapters").iterdir() if path.is_dir() and not path.name.startswith("__p")
    }
    assert packages == set(re.findall(r"^ {15}(\w+)/ ", tree, re.M))
