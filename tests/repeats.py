"""A test that fails is repeated, and the whole run says so at its end: machines that boot on a busy host are late now
and then. A fault of ours is there the second time too. Unit tests are never repeated: nothing they need can be late.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _pytest.runner import runtestprotocol

SHOWN = 2000  # characters of a failure, from its end
PROPERTY = "repeated"  # of a test's report, which comes from a worker's process too: why, and how it had failed


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
    repeated: list[tuple[str, object]] = []
    while True:
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        reason = next((reason for report in reports if report.failed and (reason := reason_of(report))), "")
        if not left.get(reason, 0):
            break
        left[reason] -= 1
        first = next(str(report.longrepr) for report in reports if report.failed)
        repeated.append((PROPERTY, f"{reason}\n{first[-SHOWN:]}"))
        before()
        # Fixtures of the module and the session too: one that failed would be remembered, and fail the repetition.
        item.session._setupstate.teardown_exact(None)
        item._initrequest()  # type: ignore[attr-defined]  # what a repeated test needs; pytest has no public name for it
    reports[0].user_properties.extend(repeated)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


class Repeats:
    """Shows how a repeated test had failed when its report comes, and lists all that were repeated at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "setup":  # the first, which alone has them
            return
        for name, text in report.user_properties:
            if name != PROPERTY:
                continue
            reason, _, failure = str(text).partition("\n")
            self._lines.append(f"{report.nodeid}: {reason}")
            if terminal := self._config.pluginmanager.get_plugin("terminalreporter"):
                terminal.write_line(f"\n{report.nodeid}: {reason}; repeated\n{failure}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._lines:
            terminalreporter.section("repeated")
            for line in self._lines:
                terminalreporter.write_line(line)
