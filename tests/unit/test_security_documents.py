"""What the documents say is shown by a test is: every test and file of tests that they name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCUMENTS = sorted((TESTS.parent / "docs" / "security").glob("*.md"))
NAMED = re.compile(r"`(?:(?P<file>[\w/]+\.py)(?:::)?)?(?P<test>test_\w+)?`")


def functions(file: Path) -> set[str]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    """A name without its file is of the file that was named last, in the same paragraph or row."""
    named = 0
    for block in re.split(r"\n\n|\n\||\n- ", document.read_text()):
        file: Path | None = None
        for found in NAMED.finditer(block):
            if found["file"]:
                file = TESTS / found["file"]
                assert file.is_file(), f"{document.name} names {found['file']}"
            if found["test"]:
                assert file is not None, f"{document.name} names {found['test']} of no file"
                assert found["test"] in functions(file), f"{document.name} names {file.name}::{found['test']}"
                named += 1
    assert named > 20


def test_every_test_of_attacks_is_named_by_a_document() -> None:
    """A test that shows a defence and that no document knows of is a promise that nobody can find."""
    said = "".join(document.read_text() for document in DOCUMENTS)
    for name in ("test_hostile_peers", "test_flood", "test_local_sockets"):
        for test in functions(TESTS / "channel" / f"{name}.py"):
            if test.startswith("test_"):
                assert f"{name}.py" in said
                assert test in said, f"{name}.py::{test}"
