"""Work done ahead by threads while its results are used in order: what takes long (reading, compressing, comparing)
lets Python go on meanwhile."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, TypeVar

    Job = TypeVar("Job")
    Result = TypeVar("Result")

__all__ = ["in_order"]


class _Task:
    __slots__ = ("done", "error", "job", "result", "slot")

    def __init__(self, job: Any, slot: int) -> None:
        import threading

        self.job = job
        self.slot = slot
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
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
    import queue
    import threading
    from collections import deque

    waiting: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()

    def run() -> None:
        while (task := waiting.get()) is not None:
            try:
                task.result = work(task.job, task.slot)
            except BaseException as error:
                task.error = error
            task.done.release()

    threads = [threading.Thread(target=run, name=f"image {number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    under_way: deque[_Task] = deque()
    free = list(range(ahead))
    try:
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
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()


def _finished(under_way: Any) -> _Task:
    task: _Task = under_way.popleft()
    task.done.acquire()
    if task.error is not None:
        raise task.error
    return task
