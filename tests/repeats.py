"""A test that fails is repeated, and the whole run says so at its end: machines that boot on a busy host are late now
and then. A fault of ours is there the second time too. Unit tests are never repeated: nothing they need can be late.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _pytest.runner import runtestprotocol

SHOWN = 2000  # characters of a failure, from its end
REPEATED = pytest.StashKey[list[str]]()  # of the run: one line for each repetition


def run_repeated(
    item: pytest.Item,
    nextitem: pytest.Item | None,
    patience: dict[str, int],
    reason_of: Callable[[pytest.TestReport], str],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Run `item`, and while it fails for a reason that `patience` still has times for, run it again.

    `before` each repetition clears away what the failure may have left beside the fixtures, which are all made anew.
    """
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    left = dict(patience)
    while True:
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        reason = next((reason for report in reports if report.failed and (reason := reason_of(report))), "")
        if not left.get(reason, 0):
            break
        left[reason] -= 1
        first = next(str(report.longrepr) for report in reports if report.failed)
        print(f"\n{item.nodeid}: {reason}; repeated\n{first[-SHOWN:]}")
        item.config.stash.setdefault(REPEATED, []).append(f"{item.nodeid}: {reason}")
        before()
        # Fixtures of the module and the session too: one that failed would be remembered, and fail the repetition.
        item.session._setupstate.teardown_exact(None)
        item._initrequest()  # type: ignore[attr-defined]  # what a repeated test needs; pytest has no public name for it
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
