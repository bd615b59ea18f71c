"""A save that dies after any file-system call leaves the old or the new files whole, and everyone else's untouched."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import adapters
from adapters._errors import AdapterError, DamagedAdapter
from adapters._store import commit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
OWNED = ("adapter_model.safetensors", "adapter_config.json", "adapter.json", "README.md")
OLD = {"adapter_model.safetensors": b"old" * 99, "adapter_config.json": b"{}", "adapter.json": b"old record"}
NEW = {"adapter_model.safetensors": b"new!" * 999, "adapter.json": b"new record", "README.md": b"new card"}
OTHERS = {"optimizer.pt": b"\0\1\2", "other/adapter_model.safetensors": b"another adapter's", "notes.txt": b"mine"}
CALLS = ("open", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir", "mkdir", "makedirs", "listdir")


class Dying:
    """Stands in for `os`: the process is killed after the n-th call that touches the file system."""

    def __init__(self, after: int, torn: bool = False) -> None:
        self.left, self.torn, self.path = after, torn, os.path

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(name, real) if name in CALLS else real

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and name == "write" and self.torn:
                args = (args[0], bytes(args[1])[: len(args[1]) // 2])
            found = real(*args, **kwargs)
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call


def killed(folder: Path, files: dict[str, bytes], after: int, torn: bool = False) -> bool:
    """Saves in a child that dies after `after` calls; False when it finished before."""
    child = os.fork()
    if child == 0:
        commit.os = Dying(after, torn)  # type: ignore[attr-defined]
        try:
            commit.write(folder, files, OWNED)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def filled(folder: Path, files: dict[str, bytes]) -> Path:
    (folder / "other").mkdir(parents=True)
    for name, content in OTHERS.items():
        (folder / name).write_bytes(content)
    commit.write(folder, files, OWNED)
    return folder


def owned(folder: Path) -> dict[str, bytes]:
    with commit.reading(folder) as view:
        return {name: view[name] for name in OWNED if name in view}


def others(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OTHERS}


def deaths(tmp_path: Path, old: dict[str, bytes], new: dict[str, bytes], torn: bool = False) -> Iterator[Path]:
    """Folders after a save that died after its first, second, third ... call."""
    for after in range(1, 1000):
        folder = filled(tmp_path / str(after), old)
        if not killed(folder, new, after, torn):
            assert after > 30, "the calls of a save are not being counted"
            return
        yield folder


@pytest.mark.parametrize(
    ("old", "new", "torn"),
    [(OLD, NEW, False), (NEW, OLD, False), (OLD, NEW, True)],
    ids=["config goes", "config comes", "half a write"],
)
def test_death_after_every_call(tmp_path: Path, old: dict[str, bytes], new: dict[str, bytes], torn: bool) -> None:
    seen = set()
    for folder in deaths(tmp_path, old, new, torn):
        before = sorted(str(path) for path in folder.rglob("*"))
        found = owned(folder)
        assert found in (old, new)
        seen.add(found == new)
        assert others(folder) == OTHERS
        assert sorted(str(path) for path in folder.rglob("*")) == before, "reading wrote"
        commit.write(folder, {**old, "README.md": b"third"}, OWNED)
        assert owned(folder) == {**old, "README.md": b"third"}
        assert sorted(os.listdir(folder)) == sorted({*old, "README.md", "optimizer.pt", "other", "notes.txt"})
    assert seen == {False, True}


def test_an_adapter_survives_a_save_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, bytes]] = []
    with monkeypatch.context() as patch:  # the files of two real adapters; forking a process that runs torch can hang
        patch.setattr(commit, "write", lambda folder, files, owned: written.append(files))
        for method in ("lora", "prefix"):
            model = tiny.build("llama")
            adapters.attach(model, method, name=method)
            adapters.save(model, method, tmp_path)
    old, new = written
    assert old.keys() == new.keys()
    assert all(old[name] != new[name] for name in old)
    seen = set()
    for folder in deaths(tmp_path / "folders", old, new):
        name = adapters.inspect(folder).name  # every digest holds, so nothing is mixed
        assert owned(folder) == {"lora": old, "prefix": new}[name]
        assert others(folder) == OTHERS
        if name not in seen:
            assert adapters.load(tiny.build("llama"), folder).method == name
        seen.add(name)
    assert seen == {"lora", "prefix"}


def test_death_twice_in_a_row(tmp_path: Path) -> None:
    third = {"adapter_model.safetensors": b"third", "adapter.json": b"third"}
    for first in range(1, 50, 6):
        for second in range(1, 50, 7):
            folder = filled(tmp_path / f"{first}-{second}", OLD)
            killed(folder, NEW, first)
            between = owned(folder)
            killed(folder, third, second)
            assert owned(folder) in (between, third)
            assert others(folder) == OTHERS
            commit.write(folder, OLD, OWNED)
            assert owned(folder) == OLD


def test_a_folder_that_cannot_be_written_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["open", "write", "fsync", "mkdir", "rename"]
    for name, code in [(name, code) for name in names for code in (errno.ENOSPC, errno.EACCES)]:
        folder = filled(tmp_path / f"{name}{code}", OLD)

        def fail(*args: Any, code: int = code, name: str = name) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return os.open(*args)
            raise OSError(code, os.strerror(code))

        failing = Dying(10**9)
        setattr(failing, name, fail)
        with monkeypatch.context() as patch:
            patch.setattr(commit, "os", failing)
            with pytest.raises(AdapterError, match=os.strerror(code)):
                commit.write(folder, NEW, OWNED)
        assert owned(folder) == OLD
        assert others(folder) == OTHERS
        commit.write(folder, NEW, OWNED)
        assert owned(folder) == NEW


def test_a_pending_commit_is_read_from_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    for folder in deaths(tmp_path, OLD, NEW):
        if not (folder / commit.COMMIT).exists():
            continue
        paths = [folder, folder / commit.COMMIT]
        for path in paths:
            path.chmod(0o555)
        assert owned(folder) == NEW
        for path in paths:
            path.chmod(0o755)


def test_writers_at_once_never_mix(tmp_path: Path) -> None:
    folder = filled(tmp_path / "shared", OLD)
    sets = [{name: f"{writer}".encode() * 5000 for name in OWNED} for writer in range(4)]
    found: list[dict[str, bytes]] = []

    def save(files: dict[str, bytes]) -> None:
        for _ in range(8):
            commit.write(folder, files, OWNED)

    def read() -> None:
        found.extend(owned(folder) for _ in range(60))

    threads = [threading.Thread(target=save, args=(files,)) for files in sets] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(files in [OLD, *sets] for files in found)
    assert owned(folder) in sets


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "", "c:d", "a\\b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="not a file name"):
        commit.write(tmp_path, {name: b""}, [name])


def test_a_commit_that_names_other_files_is_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path / "f", OLD)
    (folder / commit.COMMIT).mkdir()
    (folder / commit.COMMIT / commit.MANIFEST).write_text('{"files": [], "remove": ["optimizer.pt"]}')
    with pytest.raises(DamagedAdapter, match="not an adapter's"):
        commit.write(folder, NEW, OWNED)
    assert others(folder) == OTHERS
    (folder / commit.COMMIT / commit.MANIFEST).write_text('{"files": ["../x"], "remove": []}')
    with pytest.raises(DamagedAdapter, match="cannot be completed"):
        owned(folder)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(AdapterError, match="is a folder"):
        commit.write(tmp_path, NEW, OWNED)
    assert os.listdir(tmp_path) == ["README.md"]
