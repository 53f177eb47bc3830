"""Work done ahead by threads while its results are used in order: what takes long (reading, compressing, comparing)
lets Python go on meanwhile."""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Iterable, Iterator
    from queue import SimpleQueue
    from typing import Any, TypeVar

    Job = TypeVar("Job")
    Result = TypeVar("Result")
else:
    from _queue import SimpleQueue  # threading and queue take longer to import than a small image to copy

__all__ = ["in_order"]


class _Task:
    __slots__ = ("done", "error", "job", "result", "slot")

    def __init__(self, job: Any, slot: int) -> None:
        self.job = job
        self.slot = slot
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = allocate_lock()
        self.done.acquire()


def in_order(
    jobs: Iterable[Job], work: Callable[[Job, int], Result], workers: int, ahead: int
) -> Iterator[tuple[Job, Result]]:
    """(job, what `work` made of it), in the order of the jobs.

    `work` is told which of `ahead` slots is its own until the next result is asked for, for buffers that are used again
    and again. No workers: it is called here. An error of `work` is raised where its result would be.
    """
    if not workers:
        for job in jobs:
            yield job, work(job, 0)
        return
    waiting: SimpleQueue[_Task | None] = SimpleQueue()

    def run(ended: LockType) -> None:
        while (task := waiting.get()) is not None:
            try:
                task.result = work(task.job, task.slot)
            except BaseException as error:
                task.error = error
            task.done.release()
        ended.release()

    under_way: list[_Task] = []
    free = list(range(ahead))
    ends: list[LockType] = []
    try:
        for _ in range(workers):
            ended = allocate_lock()
            ended.acquire()
            start_new_thread(run, (ended,))
            ends.append(ended)
        for job in jobs:
            task = _Task(job, free.pop())
            under_way.append(task)
            waiting.put(task)
            if not free:
                done = _finished(under_way)
                yield done.job, done.result
                free.append(done.slot)
        while under_way:
            done = _finished(under_way)
            yield done.job, done.result
    finally:
        for _ in ends:
            waiting.put(None)
        for ended in ends:
            ended.acquire()


def _finished(under_way: list[_Task]) -> _Task:
    task = under_way.pop(0)
    task.done.acquire()
    if task.error is not None:
        raise task.error
    return task
