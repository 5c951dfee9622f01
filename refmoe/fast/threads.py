"""A few threads that share one list of pieces. Kernels leave the interpreter's lock meanwhile.

The pieces do not depend on the number of threads and each result is one piece's, so that the bits
are the same for any number. The calling thread works too. Pieces that multiply by BLAS do it in one
thread each (`one_blas_thread`): two pools that wait for each other by spinning are slower than
either alone.
"""

import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from queue import SimpleQueue
from typing import Any

from threadpoolctl import ThreadpoolController

from refmoe.files import InputError

Piece = Callable[[], None]


def available() -> int:
    """Return how many processors this process may use, or `REFMOE_THREADS`."""
    asked = os.environ.get("REFMOE_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Job:
    """A list of pieces, each taken by the thread that comes first. The first error ends it."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = iter(pieces)
        self.error: BaseException | None = None
        self.done = threading.Semaphore(0)

    def work(self) -> None:
        try:
            for piece in self.pieces:  # a list's iterator hands each out once, whoever asks
                piece()
                if self.error is not None:
                    return
        except BaseException as error:
            self.error = error

    def help(self) -> None:
        self.work()
        self.done.release()


class Pool:
    """Threads that wait for pieces, the calling thread being one of them."""

    def __init__(self, threads: int):
        self.threads = threads
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        for _ in range(threads - 1):
            threading.Thread(target=self._help, daemon=True).start()

    def _help(self) -> None:
        _here.helping = True
        while (job := self.jobs.get()) is not None:
            job.help()

    def close(self) -> None:
        """Let the helpers end. None of them may be at work."""
        for _ in range(self.threads - 1):
            self.jobs.put(None)

    def run(self, pieces: Sequence[Piece]) -> None:
        """Run all pieces, in any order. An error of one is raised when no other is at work."""
        helpers = min(self.threads, len(pieces)) - 1
        if helpers < 1 or getattr(_here, "helping", False):  # a helper would wait for itself
            for piece in pieces:
                piece()
            return
        job = _Job(pieces)
        for _ in range(helpers):
            self.jobs.put(job)
        job.work()
        while helpers:  # also after Ctrl-C: they write into arrays that must not go meanwhile
            try:
                job.done.acquire()
                helpers -= 1
            except KeyboardInterrupt as error:
                job.error = error
        if job.error is not None:
            raise job.error


_here = threading.local()
_pool: Pool | None = None


def pool() -> Pool:
    """Return this process's pool; a forked child makes its own."""
    global _pool
    if _pool is None:
        _pool = Pool(available())
    return _pool


def use(threads: int) -> None:
    """Use this many threads from now on."""
    global _pool
    if threads < 1:
        raise InputError(f"{threads} threads; at least one is needed")
    if _pool is not None and _pool.threads != threads:
        _pool.close()
        _pool = None
    _pool = _pool or Pool(threads)


def _forget() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def one_blas_thread() -> Any:
    """Return a context in which a matrix product by BLAS stays in its own thread."""
    return _blas().limit(limits=1, user_api="blas")
