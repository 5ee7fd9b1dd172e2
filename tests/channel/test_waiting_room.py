"""Seats and credit, with a model beside them: nobody is crowded out by one address, and memory is bounded."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sealift.channel.waiting_room import Credit, WaitingRoom, origin

SEATS = 12
ORIGINS = st.sampled_from("abcde")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("10.0.0.9", "10.0.0.9"),
        ("::ffff:10.0.0.9", "10.0.0.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_origin_is_an_address_or_a_64(host: str, expected: str) -> None:
    assert origin(host) == expected


class Room(RuleBasedStateMachine):
    """The room against a plain list of (visitor, origin) in the order of coming."""

    def __init__(self) -> None:
        super().__init__()
        self.room: WaitingRoom[int] = WaitingRoom(SEATS)
        self.model: list[tuple[int, str]] = []
        self.numbers = itertools.count()

    @rule(where=ORIGINS, at_most=st.integers(1, SEATS))
    def enter(self, where: str, at_most: int) -> None:
        visitor = next(self.numbers)
        self.model.append((visitor, where))
        for lost in self.room.enter(visitor, where, at_most=at_most):
            crowds = Counter(place for _, place in self.model)
            place = dict(self.model)[lost]
            assert lost != visitor
            assert lost == next(v for v, p in self.model if p == place), "the oldest of its origin"
            if not (place == where and crowds[where] > at_most):
                assert sum(crowds.values()) == SEATS + 1
                largest = {p for p, count in crowds.items() if count == max(crowds.values())}
                assert lost == next(v for v, p in self.model if p in largest)
            self.model.remove((lost, place))
        assert sum(p == where for _, p in self.model) <= at_most

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.model))
        self.room.leave(entry[0])
        self.model.remove(entry)

    @invariant()
    def same(self) -> None:
        assert list(self.room) == [visitor for visitor, _ in self.model]
        assert len(self.room) == len(self.model) <= SEATS
        assert all(visitor in self.room for visitor, _ in self.model)


TestRoom = Room.TestCase


@given(st.lists(st.just("flooder"), min_size=SEATS, max_size=200), st.integers(1, SEATS // 2))
def test_a_flood_from_one_origin_takes_no_seat_of_those_within_their_share(flood: list[str], others: int) -> None:
    room: WaitingRoom[tuple[str, int]] = WaitingRoom(SEATS)
    neighbours = [("neighbour", n) for n in range(others)]
    for neighbour in neighbours:
        assert room.enter(neighbour, "neighbour", at_most=SEATS) == []
    for n, where in enumerate(flood):
        room.enter((where, n), where, at_most=SEATS)
    assert [visitor for visitor in room if visitor[0] == "neighbour"] == neighbours


SECONDS = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(ORIGINS, SECONDS), max_size=80))
def test_an_origin_is_limited_when_it_spent_more_than_its_burst_and_what_came_back(
    spends: list[tuple[str, float]],
) -> None:
    burst, rate = 5, 0.5
    credit = Credit(burst, rate, most=10)
    model = dict.fromkeys("abcde", (float(burst), 0.0))
    now = 0.0
    for where, pause in spends:
        now += pause
        left, since = model[where]
        have = min(burst, left + (now - since) * rate)
        assert credit.spent(where, now) == (have < 1)
        model[where] = (max(-burst, have - 1), now)
        assert credit.spend(where, now) == (1 <= have < 2)
        for other in set("abcde") - {where}:
            assert not credit.spent(other, now) or model[other][0] < burst, "nobody pays for another"


@given(st.integers(0, 1000))
def test_credit_comes_back_however_much_was_spent(spends: int) -> None:
    credit = Credit(burst=3, per_second=2.0, most=4)
    for _ in range(spends):
        credit.spend("x", 0.0)
    assert credit.spent("x", 0.0) == (spends > 2)
    assert credit.spent("x", 1.5) == (spends > 5)
    assert not credit.spent("x", 2.0)


@given(st.lists(st.integers(0, 50), max_size=300))
def test_only_so_many_origins_are_remembered_those_that_spent_last(spenders: list[int]) -> None:
    credit = Credit(burst=1, per_second=0.0, most=8)
    for n in spenders:
        credit.spend(str(n), 0.0)
    last = set(list(dict.fromkeys(reversed(spenders)))[:8])
    assert len(credit) == len(last)
    for n in set(spenders):
        assert credit.spent(str(n), 0.0) == (n in last)
