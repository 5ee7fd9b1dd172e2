"""Every error: a slug of its own, a status, an exit code, a line in the documents; and its way over the wire."""

from __future__ import annotations

import json
import re

import pytest

from sealift.errors import SealiftError, all_errors, from_problem, from_slug, to_problem
from support.generated_docs import ERRORS, errors_page


def test_slugs_are_unique() -> None:
    slugs = [cls.slug for cls in all_errors()]
    assert len(slugs) == len(set(slugs))


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.slug)
def test_each_has_what_the_other_side_needs(cls: type[SealiftError]) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", cls.slug)
    assert "slug" in vars(cls)
    assert 400 <= cls.status < 600
    assert 1 <= cls.exit_code <= 125
    assert cls.__doc__
    assert cls.__doc__.splitlines()[0].endswith(".")


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.slug)
def test_each_crosses_the_wire_as_itself(cls: type[SealiftError]) -> None:
    error = cls("VM vm1 at host a: no", todo="do this")
    assert str(error) == "VM vm1 at host a: no (do this)"
    for again in (
        from_slug(cls.slug, error.what, error.todo),
        from_problem(json.dumps(to_problem(error)).encode(), cls.status),
    ):
        assert type(again) is cls
        assert (again.what, again.todo) == (error.what, error.todo)


def test_a_slug_from_the_future_is_not_lost() -> None:
    error = from_slug("from_the_future", "what it says")
    assert type(error) is SealiftError
    assert "from_the_future" in str(error)
    assert "what it says" in str(error)


def test_the_page_lists_them_all() -> None:
    assert ERRORS.read_text() == errors_page(), "run tests/support/generated_docs.py"
