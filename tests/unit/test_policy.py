"""``decide`` over every setting, both hosts' capabilities, and encryption: no case is left to chance (P1, P5)."""

from __future__ import annotations

import itertools

import pytest

from sealift.domain.policy import Capability, HostView, MigrateEncryption, Plain, Refused, Sealed, decide

C, M = Capability, MigrateEncryption
CASES = list(itertools.product(M, C, C, [False, True]))


def outcome(setting: M, source: C, target: C, encrypted: bool) -> type:
    """The rules once more, in other words than the code's: the worse of two hosts, then the stricter setting."""
    if {source, target} & {C.UNKNOWN, C.LOST}:
        return Refused
    strict = "required" if encrypted else setting.value
    both = source is target is C.CAPABLE
    table = {
        ("disabled", True): Plain,
        ("disabled", False): Plain,
        ("opportunistic", True): Sealed,
        ("opportunistic", False): Plain,
        ("required", True): Sealed,
        ("required", False): Refused,
    }
    return table[strict, both]


def view(name: str, capability: C, versions: tuple[int, ...] = (1,)) -> HostView:
    return HostView(name, capability, versions if capability is C.CAPABLE else ())


@pytest.mark.parametrize(("setting", "source", "target", "encrypted"), CASES)
def test_every_case(setting: M, source: C, target: C, encrypted: bool) -> None:
    plan = decide(setting, encrypted=encrypted, source=view("a", source), target=view("b", target))
    assert type(plan) is outcome(setting, source, target, encrypted)
    assert plan.reason
    match plan:
        case Refused():
            assert plan.todo
        case Plain():
            assert not encrypted
            assert setting is not M.REQUIRED
        case Sealed():
            assert plan.version == 1


def test_the_table_has_every_outcome() -> None:
    assert len(CASES) == 3 * 4 * 4 * 2
    assert {outcome(*case) for case in CASES} == {Sealed, Plain, Refused}


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("setting", [M.OPPORTUNISTIC, M.REQUIRED])
def test_two_that_can_seal_but_share_no_version_are_refused_never_plain(setting: M, encrypted: bool) -> None:
    plan = decide(setting, encrypted=encrypted, source=view("a", C.CAPABLE, (1,)), target=view("b", C.CAPABLE, (2, 3)))
    assert isinstance(plan, Refused)


def test_the_highest_common_version_is_taken() -> None:
    plan = decide(
        M.REQUIRED, encrypted=False, source=view("a", C.CAPABLE, (1, 2, 3)), target=view("b", C.CAPABLE, (2, 1))
    )
    assert isinstance(plan, Sealed)
    assert plan.version == 2


def test_the_reason_names_the_host_that_cannot() -> None:
    plan = decide(M.OPPORTUNISTIC, encrypted=False, source=view("a", C.CAPABLE), target=view("b", C.INCAPABLE))
    assert plan.reason.endswith("b cannot seal a move")
