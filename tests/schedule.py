"""With `pytest -n N`: N worker processes run a file of tests each; the lab comes last, by as many as have a CPU each.

Most tests wait for machines, daemons and programs, so two or three of them fit on one core. The files are handed out
in their order, whole, since fixtures are made once a file. The lab's are the last, and no test of them waits: it
emulates a host, with one CPU. `FEW` (tests/order.py) says how many workers go on then; the others end.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from order import FEW, is_heavy

IN_HAND = 2  # tests that a worker has left when it gets the next file


class Schedule(LoadScopeScheduling):
    """A file is a unit of work; those that are heavy are at the end of the queue, for `FEW` workers."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # by their place, not by the number of their tests

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def remove_node(self, node: WorkerController) -> str | None:
        """As the base class does it, but a test that its worker crashed with is not run again."""
        work = self.assigned_work.pop(node)
        crashed = next((test for unit in work.values() for test, done in unit.items() if not done), None)
        if crashed is not None:
            work[self._split_scope(crashed)][crashed] = True
            undone = {scope: unit for scope, unit in work.items() if not all(unit.values())}
            waiting = [*undone.items(), *self.workqueue.items()]
            self.workqueue.clear()
            self.workqueue.update(sorted(waiting, key=lambda item: is_heavy(item[0])))  # the heavy ones stay the last
            for other in self.nodes:
                self._reschedule(other)
        return crashed

    def _assign_work_unit(self, node: WorkerController) -> None:
        """The next file, if it is for this worker: when only heavy ones are left and enough work at them, it ends."""
        if is_heavy(next(iter(self.workqueue))):
            others = (
                work for other, work in self.assigned_work.items() if other is not node and not other.shutting_down
            )
            if sum(any(map(is_heavy, work)) for work in others) >= FEW:
                return node.shutdown()
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        """Give it files until it has tests in hand: a worker runs one only when it knows the next, or that none is."""
        while not node.shutting_down and self.workqueue:
            if self._pending_of(self.assigned_work[node]) > IN_HAND:
                return
            self._assign_work_unit(node)
        if not node.shutting_down:
            node.shutdown()
