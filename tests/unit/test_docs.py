"""The documentation says what is so: generated parts are current, tables agree, links exist, commands parse."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvik.cli.context import Context
from kvik.cli.main import load, parse_globals
from kvik.cli.options import parse
from kvik.cli.verbs import VERBS

ROOT = Path(__file__).parents[2]
SHARED = {"errors", "named", "numbers", "paths"}  # leaves that everything may import
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```([a-z]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Words of a shell's grammar that end one command and begin another.
SEPARATORS = {"|", "||", "&&", ";", "&"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *kinds: str) -> Iterator[str]:
    for _, kind, text in FENCE.findall(page.read_text()):
        if kind in kinds:
            yield text


def commands(block: str) -> Iterator[str]:
    """What follows the `$` prompts of a console block, with its continuation lines and here-documents taken in."""
    lines = iter(block.splitlines())
    for line in lines:
        if not line.lstrip().startswith("$ "):
            continue
        text = line.lstrip()[2:]
        while text.endswith("\\"):
            text = text[:-1] + next(lines)
        if here := re.search(r"<<'?(\w+)'?", text):
            text = text[: here.start()] + text[here.end() :]
            while next(lines).strip() != here[1]:
                pass
        yield text


def simple_commands(text: str) -> Iterator[list[str]]:
    """The simple commands of one shell line, without assignments and redirections."""
    words: list[str] = []
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    tokens = iter(lexer)
    for word in tokens:
        if word in SEPARATORS:
            yield words
            words = []
        elif re.fullmatch(r"[0-9]*[<>]+&?", word):
            next(tokens, None)
        elif not words and re.match(r"[A-Z_]+=", word):
            continue
        else:
            words.append(word)
    yield words


def ours(words: list[str]) -> list[str] | None:
    """The arguments if this runs `kvik`, perhaps by sudo."""
    if words and words[0] in ("sudo", "time"):
        words = words[1:]
    return words[1:] if words and words[0] in ("kvik", "./kvik") else None


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/generate-docs", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", there.read_text()), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_examples_parse(page: Path) -> None:
    """Verbs and options exist and take the values they are given. Nothing is run."""
    for block in blocks(page, "console"):
        for text in commands(block):
            for words in simple_commands(text):
                arguments = ours(words)
                if arguments is None:
                    continue
                rest, answer = parse_globals(arguments, Context())
                if answer is None and rest and not (len(rest) == 1 and ";" in rest[0]):
                    parse(rest[0], load(rest[0]), rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_verbs_named_in_the_text_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md" and not page.exists():
        return
    text = FENCE.sub("", page.read_text())
    for verb in re.findall(r"`(?:\./)?kvik ([a-z][a-z-]+)[^`]*`", text):
        assert verb in VERBS, verb
    for words in re.findall(r"`((?:\./)?kvik [a-z][^`]*)`", text):
        for word in re.findall(r"(?<=\s)--[a-z][a-z-]*", words.split(" -- ")[0]):
            assert load(words.split()[1]).find(word[2:]), words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_and_paths_named_in_the_text_exist(page: Path) -> None:
    for path in re.findall(r"`((?:src|scripts|tests|docs|benchmarks|requirements)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_sequence_diagrams_have_no_semicolons(page: Path) -> None:
    """They end a statement there: the picture would be an error message instead."""
    for block in blocks(page, "mermaid"):
        assert not block.startswith("sequenceDiagram") or ";" not in block


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


def test_the_console_blocks_are_found() -> None:
    """The checks above must have something to check."""
    found = [text for page in PAGES for block in blocks(page, "console") for text in commands(block)]
    assert len(found) > 40


def test_the_architecture_page_has_the_import_table() -> None:
    """The page's table and the one that is enforced are the same."""
    tree = ast.parse((Path(__file__).parent / "test_import_rules.py").read_text())
    enforced = _import_table(tree)
    shown: dict[str, set[str]] = {}
    for line in (ROOT / "docs/internals/architecture.md").read_text().splitlines():
        row = re.fullmatch(r"\| `([a-z]+)/` \| .* \| ([a-z, -]+) \|", line)
        if row:
            shown[row[1]] = set() if row[2] == "-" else set(row[2].split(", "))
    assert shown == {package: names for package, names in enforced.items() if package not in SHARED}


def _import_table(tree: ast.Module) -> dict[str, set[str]]:
    """MAY_IMPORT of the other test, without importing it (its own imports are its affair)."""
    wanted = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and getattr(node.targets[0] if isinstance(node, ast.Assign) else node.target, "id", "")
        in ("DRIVERS", "MAY_IMPORT")
    ]
    names: dict[str, dict[str, set[str]]] = {}
    exec(compile(ast.Module(body=wanted, type_ignores=[]), "MAY_IMPORT", "exec"), names)
    return names["MAY_IMPORT"]
