"""``decide`` over every setting and floor, both hosts' capabilities, encryption: nothing is left to chance (P1, P5)."""

from __future__ import annotations

import itertools

import pytest

from sealift.domain.policy import Capability, HostView, MigrateEncryption, Plain, Refused, Sealed, decide

C, M = Capability, MigrateEncryption
CASES = list(itertools.product(M, M, C, C, [False, True]))


def outcome(setting: M, floor: M, source: C, target: C, encrypted: bool) -> type:
    """The rules once more, in other words than the code's: the worse of two hosts, then the stricter setting."""
    if {source, target} & {C.UNKNOWN, C.LOST}:
        return Refused
    asked = {setting, floor} | ({M.REQUIRED} if encrypted else set())
    strict = next(word for word in ("required", "opportunistic", "disabled") if M(word) in asked)
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


@pytest.mark.parametrize(("setting", "floor", "source", "target", "encrypted"), CASES)
def test_every_case(setting: M, floor: M, source: C, target: C, encrypted: bool) -> None:
    plan = decide(setting, encrypted=encrypted, floor=floor, source=view("a", source), target=view("b", target))
    assert type(plan) is outcome(setting, floor, source, target, encrypted)
    assert plan.reason
    match plan:
        case Refused():
            assert plan.todo
        case Plain():
            assert not encrypted
            assert M.REQUIRED not in (setting, floor)
        case Sealed():
            assert plan.version == 1


def test_the_table_has_every_outcome() -> None:
    assert len(CASES) == 3 * 3 * 4 * 4 * 2
    assert {outcome(*case) for case in CASES} == {Sealed, Plain, Refused}


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("setting", [M.OPPORTUNISTIC, M.REQUIRED])
def test_two_that_can_seal_but_share_no_version_are_refused_never_plain(setting: M, encrypted: bool) -> None:
    source, target = view("a", C.CAPABLE, (1,)), view("b", C.CAPABLE, (2, 3))
    plan = decide(setting, encrypted=encrypted, floor=M.DISABLED, source=source, target=target)
    assert isinstance(plan, Refused)


def test_the_highest_common_version_is_taken() -> None:
    source, target = view("a", C.CAPABLE, (1, 2, 3)), view("b", C.CAPABLE, (2, 1))
    plan = decide(M.REQUIRED, encrypted=False, floor=M.DISABLED, source=source, target=target)
    assert isinstance(plan, Sealed)
    assert plan.version == 2


def test_the_reason_names_the_host_that_cannot() -> None:
    source, target = view("a", C.CAPABLE), view("b", C.INCAPABLE)
    plan = decide(M.OPPORTUNISTIC, encrypted=False, floor=M.DISABLED, source=source, target=target)
    assert plan.reason.endswith("b cannot seal a move")


@pytest.mark.parametrize(("setting", "floor", "source", "target", "encrypted"), CASES)
def test_the_reason_says_whether_the_vm_or_the_floor_decided(
    setting: M, floor: M, source: C, target: C, encrypted: bool
) -> None:
    if {source, target} & {C.UNKNOWN, C.LOST}:
        return  # the hosts decided
    plan = decide(setting, encrypted=encrypted, floor=floor, source=view("a", source), target=view("b", target))
    decided = {
        "the VM is encrypted": encrypted,
        f"the VM's setting is {setting.value}": not encrypted and strictness(setting) >= strictness(floor),
        f"the floor of this controller is {floor.value}": not encrypted and strictness(floor) > strictness(setting),
    }
    assert [words for words in decided if plan.reason.startswith(words)] == [
        words for words, so in decided.items() if so
    ]


def strictness(setting: M) -> int:
    return ["disabled", "opportunistic", "required"].index(setting.value)
