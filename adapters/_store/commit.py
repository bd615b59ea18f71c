"""Replaces several files of a folder as one step, so that a crash after any file-system call leaves old or new whole.

    .adapter-staging-<random>/   the new files and a manifest, each written and synced   -> a crash: the old set
    rename to .adapter-commit/   one atomic call, the decision                           -> a crash: the new set
    move each file into place, remove what is no longer there, then the manifest and the folder

A reader that finds `.adapter-commit/` lays it over the folder without writing; the next writer first completes it.
Everything goes through `os`, so that a test can kill the process after every call.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from adapters._errors import AdapterError, DamagedAdapter

try:
    import fcntl
except ImportError:  # Windows: the rename still decides between two writers, but nothing makes one wait
    fcntl = None  # type: ignore[assignment]

COMMIT, STAGING, MANIFEST = ".adapter-commit", ".adapter-staging-", "manifest.json"


def plain(name: object) -> bool:
    """Whether `name` is a file name that stays in its folder and cannot be one of this module's own."""
    return isinstance(name, str) and 0 < len(name) < 200 and name[0] != "." and not set(name) & set("/\\:\0")


@dataclass(frozen=True)
class View(Mapping[str, bytes]):
    """The files of a folder as of its last decided commit; contents are read on access."""

    folder: str
    where: Mapping[str, str]

    def __getitem__(self, name: str) -> bytes:
        fd = os.open(self.where[name], os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            return file.read()

    def into(self, name: str, *buffers: memoryview) -> int:
        """Fills buffers, one after the other, with a file from its beginning; returns how many bytes there were."""
        fd = os.open(self.where[name], os.O_RDONLY)
        done = 0
        with os.fdopen(fd, "rb", buffering=0) as file:
            for rest in buffers:
                while rest and (more := file.readinto(rest)):
                    rest, done = rest[more:], done + more
        return done

    def __contains__(self, name: object) -> bool:
        return name in self.where  # Mapping's own would read the file

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def size(self, name: str) -> int:
        """Bytes of a file, without reading it."""
        return os.stat(self.where[name]).st_size


@contextlib.contextmanager
def reading(folder: str | os.PathLike[str]) -> Iterator[View]:
    """The folder's files, held still: a writer waits until the block is left. Never writes, so read-only media work.

    Raises:
        AdapterError: there is no such folder, or it may not be read.
        DamagedAdapter: a pending commit cannot be understood.
    """
    root = os.fspath(folder)
    try:
        with _lock(root, shared=True):
            yield View(root, _paths(root))
    except OSError as error:
        raise AdapterError(f"the folder {root} cannot be read: {error.strerror or error}.") from error


def write(folder: str | os.PathLike[str], files: Mapping[str, bytes], owned: Collection[str]) -> None:
    """Makes `files` the folder's whole set of `owned` names, in one step; other files are never touched.

    Raises:
        AdapterError: the disk is full, a permission is missing, or another writer won; the old files are whole.
    """
    root = os.fspath(folder)
    for name in {*files, *owned}:
        if not plain(name) or name not in owned:
            raise AdapterError(f"{name!r} is not a file name that an adapter may write.")
    try:
        os.makedirs(root, exist_ok=True)
        with _lock(root, shared=False) as locked:
            for name in owned:
                if os.path.isdir(os.path.join(root, name)):
                    raise AdapterError(f"{os.path.join(root, name)} is a folder, where a file is to be written.")
            _finish(root, owned)
            if locked:  # without a lock a staging folder may belong to a writer that is alive
                _sweep(root, owned)
            _decide(root, files, owned)
            _finish(root, owned)
    except OSError as error:
        raise AdapterError(f"saving into {root} failed: {error.strerror or error}.") from error


def _decide(root: str, files: Mapping[str, bytes], owned: Collection[str]) -> None:
    """Stages the files and renames the staging folder: before the last call nothing has happened."""
    staging = os.path.join(root, STAGING + secrets.token_hex(8))
    manifest = json.dumps({"files": sorted(files), "remove": sorted(set(owned) - set(files))}).encode()
    try:
        os.mkdir(staging)
        for name, content in {**files, MANIFEST: manifest}.items():
            _put(os.path.join(staging, name), content)
        _sync(staging)
        os.rename(staging, os.path.join(root, COMMIT))
    except OSError:
        with contextlib.suppress(OSError):
            _clear(staging, {*owned, MANIFEST})
        raise
    _sync(root)


def _finish(root: str, owned: Collection[str]) -> None:
    """Completes a decided commit, however far an earlier process came with it."""
    commit = os.path.join(root, COMMIT)
    if not os.path.isdir(commit):
        return
    manifest = _manifest(root)
    if manifest is not None:
        staged = set(os.listdir(commit))
        if not {*manifest["files"], *manifest["remove"]} <= set(owned):
            raise DamagedAdapter(f"{commit} names files that are not an adapter's; look at it and remove it.")
        for name in manifest["files"]:
            if name in staged:
                os.replace(os.path.join(commit, name), os.path.join(root, name))
        for name in manifest["remove"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(root, name))
        _sync(root)
        os.unlink(os.path.join(commit, MANIFEST))
    os.rmdir(commit)
    _sync(root)


def _manifest(root: str) -> dict[str, list[str]] | None:
    """What the decided commit holds; None when all of it is in place."""
    path = os.path.join(root, COMMIT, MANIFEST)
    try:
        fd = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        with os.fdopen(fd, "rb") as file:
            found = json.loads(file.read(1 << 20))
        if set(found) == {"files", "remove"} and all(plain(name) for name in [*found["files"], *found["remove"]]):
            return {"files": list(found["files"]), "remove": list(found["remove"])}
    except (ValueError, TypeError):
        pass
    raise DamagedAdapter(f"{path} is not a list of an adapter's files; the save that wrote it cannot be completed.")


def _paths(root: str) -> dict[str, str]:
    where = {name: os.path.join(root, name) for name in os.listdir(root) if plain(name)}
    manifest = _manifest(root)
    if manifest is not None:
        commit = os.path.join(root, COMMIT)
        where.update({name: os.path.join(commit, name) for name in os.listdir(commit) if name in manifest["files"]})
        for name in manifest["remove"]:
            where.pop(name, None)
    return {name: path for name, path in where.items() if os.path.isfile(path)}


def _sweep(root: str, owned: Collection[str]) -> None:
    """Removes what writers that died before deciding left behind, if it holds nothing but an adapter's files."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if name.startswith(STAGING) and os.path.isdir(path) and not os.path.islink(path):
            _clear(path, {*owned, MANIFEST})


def _clear(path: str, names: Collection[str]) -> None:
    found = os.listdir(path)
    if set(found) <= set(names):
        for name in found:
            os.unlink(os.path.join(path, name))
        os.rmdir(path)


def _put(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(folder: str) -> None:
    if os.name == "nt":  # folders cannot be opened, and need not be
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _lock(root: str, *, shared: bool) -> Iterator[bool]:
    """Holds an advisory lock on the folder itself: it leaves no file, and dies with its process. Yields if it took."""
    if fcntl is None:
        yield False
        return
    fd = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            locked = True
        except OSError:  # some network file systems have no locks
            locked = False
        yield locked
    finally:
        os.close(fd)
