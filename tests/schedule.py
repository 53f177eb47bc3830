"""With `pytest -n N`: N worker processes run a file of tests each, and what needs the machine for itself runs last.

Most tests wait for machines, daemons and programs, so two or three of them fit on one core. The files are handed out
in their order, whole, since fixtures are made once a file. When no file is left, one worker stays and runs the rest
one after another, with nothing beside it: the lab, which emulates a host with both cores, and what `ALONE` names.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from order import is_alone

LAST = "alone"  # the scope of all tests that run by themselves
IN_HAND = 2  # tests that a worker has left when it gets the next file


class Schedule(LoadScopeScheduling):
    """A file is a unit of work; all tests that run alone are one more, given out when nothing else runs any more."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # by their place, not by the number of their tests

    def _split_scope(self, nodeid: str) -> str:
        return LAST if is_alone(nodeid) else nodeid.partition("::")[0]

    def remove_node(self, node: WorkerController) -> str | None:
        """As the base class does it, but a test that its worker crashed with is not run again."""
        work = self.assigned_work.pop(node)
        crashed = next((test for unit in work.values() for test, done in unit.items() if not done), None)
        if crashed is not None:
            work[self._split_scope(crashed)][crashed] = True
            self.workqueue.update({scope: unit for scope, unit in work.items() if not all(unit.values())})
            for other in self.nodes:
                self._reschedule(other)
        return crashed

    def _assign_work_unit(self, node: WorkerController) -> None:
        """Keep `LAST` for the last: what a worker that crashed leaves undone comes back behind it."""
        if LAST in self.workqueue:
            self.workqueue.move_to_end(LAST)
            if len(self.workqueue) == 1 and len(self.assigned_work) > 1:
                return self._wind_down()
        super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        """Give it files until it has tests in hand: a worker runs one only when it knows the next, or that none is."""
        while not node.shutting_down and self.workqueue.keys() - {LAST}:
            if self._pending_of(self.assigned_work[node]) > IN_HAND:
                return
            self._assign_work_unit(node)
        if self.workqueue.keys() == {LAST}:
            self._wind_down()
        elif not self.workqueue and not node.shutting_down:
            node.shutdown()

    def _wind_down(self) -> None:
        """Only `LAST` is left: one worker waits for it, the others finish what they have and end."""
        last, *others = sorted(self.nodes, key=lambda node: node.shutting_down)
        for node in others:
            if not node.shutting_down:
                node.shutdown()
        if last.shutting_down:
            return  # a worker that replaces one that crashed will come
        if not any(self._pending_of(self.assigned_work[node]) for node in others):
            super()._assign_work_unit(last)
