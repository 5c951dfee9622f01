"""A few threads that share one list of pieces. Kernels leave the interpreter's lock meanwhile.

The pieces do not depend on the number of threads and each result is one piece's, so that the bits
are the same for any number. The calling thread works too. Products by BLAS are made in one thread
each (`single_blas_thread`): on many processors BLAS adds in another order for another number of its
threads, and two pools that wait for each other by spinning are slower than either alone.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from functools import cache
from queue import SimpleQueue
from typing import Any

from refmoe.ctrl_c import ctrl_c
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
        self.change = threading.Condition()
        self.helping = 0  # threads at work beside the one that made the list
        self.ended = False

    def work(self) -> None:
        """Take pieces until none is left or one has failed."""
        try:
            for piece in self.pieces:  # a list's iterator hands each out once, whoever asks
                piece()
                if self.error is not None:
                    return
        except BaseException as error:
            self.error = error

    def help(self) -> None:
        """Work beside the thread that made the list, unless that has ended it already."""
        with self.change:
            if self.ended:
                return
            self.helping += 1
        self.work()
        with self.change:
            self.helping -= 1
            self.change.notify()

    def end(self) -> None:
        """Let no thread begin to help, and wait for those that do.

        After an interruption it may be called again.
        """
        with self.change:
            self.ended = True
            while self.helping:
                self.change.wait()


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
        ctrl_c.look()
        helpers = min(self.threads, len(pieces)) - 1
        if helpers < 1 or getattr(_here, "helping", False):  # a helper would wait for itself
            for piece in pieces:
                piece()
            return
        job = _Job(pieces)
        try:
            for _ in range(helpers):
                self.jobs.put(job)
            job.work()
        except KeyboardInterrupt as error:
            job.error = error
        while True:  # also after Ctrl-C: helpers write into arrays that must not go meanwhile
            try:
                job.end()
                break
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
    _limit.lock = threading.Lock()  # another thread of the parent may hold the old one for ever


@cache
def _blas() -> Any:
    """Return what sets the number of BLAS threads; it is loaded when the first product is made."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _take_control() -> None:
    """Let BLAS obey the next thread that sets a limit, whichever it is.

    From 3.8 on threadpoolctl obeys the first thread that sets a limit, and ignores others silently.
    """
    for library in _blas().lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


class _SingleBlasThread(ContextDecorator):
    """Limits BLAS from the first thread that enters to the last that leaves.

    BLAS has one setting for the process. If each thread restored it, one that leaves would give
    several threads to the products of another that is still inside. An error between two lines here
    leaves the limit in place, which is slower and never wrong.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.limit: Any = None  # threadpoolctl's, which knows what to restore

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                _take_control()
                self.limit = _blas().limit(limits=1, user_api="blas")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                _take_control()
                self.limit.restore_original_limits()
                _take_control()  # from this thread, for the next one


_limit = _SingleBlasThread()


def single_blas_thread() -> _SingleBlasThread:
    """Return a context, or a decorator, in which BLAS makes each matrix product in one thread."""
    return _limit


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
