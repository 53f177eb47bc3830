"""`kvik doctor`: what this host can do, why, and the fix for what it cannot. Needs no daemon."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from kvik.host.doctor import Finding, Report, Status, examine
from kvik.paths import Paths

DESCRIPTION = "Say what this host can do, why, and how to fix what it cannot. Exit code 0: machines can run."

_COLOURS = {Status.OK: "32", Status.INFO: "36", Status.WARN: "33", Status.FAIL: "31"}
_MIN_WIDTH, _MAX_WIDTH = 60, 140


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--fresh", action="store_true", help="run the KVM probe again instead of using its last verdict"
    )
    parser.add_argument("--all", action="store_true", help="explain what is in order, too")


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="kvik doctor")
    configure(parser)
    options = parser.parse_args(argv)
    report = examine(Paths.default(), fresh=options.fresh)
    if options.json:
        json.dump(report.as_dict(), sys.stdout, indent=2)
        print()
    else:
        write(report, sys.stdout, explain_all=options.all)
    return 0 if report.usable else 1


def write(report: Report, out: TextIO, *, explain_all: bool = False, width: int | None = None) -> None:
    """An aligned table with the reason and the fix below each finding that needs them; colour only on a terminal."""
    colour = out.isatty()
    width = max(_MIN_WIDTH, min(_MAX_WIDTH, width or shutil.get_terminal_size((100, 24)).columns))
    column = max(len(finding.name) for finding in report.findings)
    group = ""
    for finding in report.findings:
        if finding.group != group:
            group = finding.group
            out.write(("\n" if finding is not report.findings[0] else "") + _paint(group, "1", colour) + "\n")
        status = _paint(f"{finding.status.value:<4}", _COLOURS[finding.status], colour)
        out.write(f"  {status}  {finding.name:<{column}}  {finding.what}\n")
        for line in _explanation(finding, explain_all):
            indent = " " * (column + 10)
            out.write(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent + "  ") + "\n")
    out.write("\n" + _summary(report) + "\n")


def _explanation(finding: Finding, explain_all: bool) -> list[str]:
    wanted = explain_all or finding.status in (Status.WARN, Status.FAIL) or finding.name in ("kvm", "accelerator")
    lines = [finding.why] if wanted and finding.why else []
    if finding.fix:
        lines.append(f"fix: {finding.fix}")
    return lines


def _summary(report: Report) -> str:
    if not report.usable:
        return "Machines cannot run here yet: see the lines marked fail."
    slow = " (software emulation)" if report.accelerator == "tcg" else ""
    return f"Machines can run here, with {report.accelerator}{slow}."


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if colour else text
