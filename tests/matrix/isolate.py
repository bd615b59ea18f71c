"""Runs each job in a process of its own, with a limit of time and of memory; what it sent before it died is kept."""

from __future__ import annotations

import os
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

J = TypeVar("J")
Emit = Callable[[Any], None]
_fork = get_context("fork")  # children start with transformers imported, in a few milliseconds


@dataclass
class Done(Generic[J]):
    """A finished job: what it sent, how it ended ("" when it ended well), and how long it took."""

    job: J
    sent: list[Any] = field(default_factory=list)
    ended: str = ""
    seconds: float = 0.0


def isolated(
    jobs: Iterable[J], work: Callable[[J, Emit], None], workers: int, seconds: float, gigabytes: int
) -> Iterator[Done[J]]:
    """Jobs as they finish, at most `workers` at a time."""
    waiting, running = iter(jobs), dict[Connection, tuple[Any, float, Done[J]]]()
    exhausted = False
    try:
        while True:
            while not exhausted and len(running) < workers:
                try:
                    job = next(waiting)
                except StopIteration:
                    exhausted = True
                    break
                ours, theirs = _fork.Pipe(duplex=False)
                process = _fork.Process(target=_child, args=(work, job, theirs, gigabytes), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (process, time.monotonic(), Done(job))
            if not running:
                return
            yield from _collect(running, seconds)
    finally:
        for process, _, _ in running.values():
            process.kill()


def _collect(running: dict[Connection, tuple[Any, float, Done[J]]], seconds: float) -> Iterator[Done[J]]:
    ready = wait(list(running), timeout=1.0)
    for pipe, (process, started, done) in list(running.items()):
        over = False
        if pipe in ready:
            try:
                kind, content = pipe.recv()
                if kind == "sent":
                    done.sent.append(content)
                else:
                    done.ended, over = content, True
            except EOFError:
                process.join()
                done.ended, over = f"the process ended with {process.exitcode}", True
        elif time.monotonic() - started > seconds:
            process.kill()
            done.ended, over = f"stopped after {seconds:.0f} s", True
        if over:
            process.join()
            pipe.close()
            del running[pipe]
            done.seconds = time.monotonic() - started
            yield done


def _child(work: Callable[[J, Emit], None], job: J, pipe: Connection, gigabytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        work(job, lambda content: pipe.send(("sent", content)))
        ended = ""
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ended = f"{type(error).__name__}: {error} ({os.path.basename(last.filename)}:{last.lineno})"
    pipe.send(("ended", ended))
    pipe.close()
    os._exit(0)  # without the interpreter's own end, which waits for threads that the parent had
