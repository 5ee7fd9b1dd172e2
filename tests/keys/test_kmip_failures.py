"""The KMIP provider when servers fail at the worst moment, or do not agree."""

from __future__ import annotations

import asyncio

import pytest

from sealift.errors import KeyMissing, KeyNotActive, ProviderAnswerInvalid, ProviderRefused, ProviderUnreachable
from sealift.keys import kmip_member
from sealift.keys.kmip import MAX_LOCATED
from sealift.keys.kmip_numbers import Operation
from sealift.keys.provider import KeyState, new_key
from sealift.keys.ttlv import Item
from support.kmip_place import Place, always, failing_on, make_place, members, raising
from support.kmip_server import Answer, Die, Hang, Store, refusal


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


# what may have been carried out


@pytest.mark.parametrize("failure", [Die(), Hang()])
def test_a_key_whose_id_was_lost_is_found_and_no_second_one_made(place: Place, failure: Exception) -> None:
    store = Store()
    loses = store.answers(after=failing_on(Operation.CREATE, failure))

    async def main() -> None:
        silent = [0] if isinstance(failure, Hang) else []
        async with members(place, loses, store.answers(), silent=silent) as (provider, (first, second)):
            assert await provider.create("vm one") == "key-1"
            assert first.asked == [Operation.CREATE]
            assert Operation.CREATE not in second.asked
            assert list(store.labels) == ["key-1"]

    asyncio.run(main())


def test_a_connection_that_ended_unseen_makes_no_second_key(place: Place) -> None:
    """The one server there is closes a kept connection on Create: whether before or after it, only it knows."""
    for carried_out in (True, False):
        store = Store()
        hook = failing_on(Operation.CREATE, Die(), times=1)
        answers = store.answers(after=hook) if carried_out else store.answers(before=hook)
        asyncio.run(_makes_one_key(place, store, answers))


async def _makes_one_key(place: Place, store: Store, answers: Answer) -> None:
    async with members(place, answers) as (provider, (server,)):
        assert await provider.locate("vm one") == []
        assert await provider.create("vm one") == "key-1"
        assert list(store.labels) == ["key-1"]
        assert server.connections == 2


def test_a_key_that_is_in_use_is_never_taken_for_the_one_just_made(place: Place) -> None:
    store = Store()
    in_use = store.add("vm one", 2)
    fails = store.answers(before=failing_on(Operation.CREATE, Die()))

    async def main() -> None:
        async with members(place, fails, store.answers()) as (provider, _):
            made = await provider.create("vm one")
            assert made != in_use
            assert sorted(await provider.locate("vm one")) == sorted([made, in_use])

    asyncio.run(main())


def test_only_keys_that_say_themselves_that_they_have_the_label_are_found(place: Place) -> None:
    """The server leaves the name out of what it looks for, as a proxy may do, and answers with all keys."""
    store = Store(finds_all=True)
    for label in ("vm two", "vm one and more", "VM ONE"):
        store.add(label, 2)
    store.nameless.add(store.add("vm one", 2))
    right = store.add("vm one", 2)
    fails = store.answers(before=failing_on(Operation.CREATE, Die()))

    async def main() -> None:
        async with members(place, fails, store.answers()) as (provider, _):
            assert await provider.locate("vm one") == [right]
            assert await provider.locate("vm three") == []
            foreign = store.add("vm two", 1)  # pre-active, as one just made would be
            made = await provider.create("vm three")
            assert made != foreign
            assert store.labels[made] == "vm three"

    asyncio.run(main())


def test_who_finds_more_keys_than_can_have_a_label_is_not_believed(place: Place) -> None:
    store = Store()
    for _ in range(MAX_LOCATED):
        store.add("vm one", 1)

    async def main() -> None:
        async with members(place, store.answers()) as (provider, (server,)):
            assert len(await provider.locate("vm one")) == MAX_LOCATED
            store.add("vm one", 1)
            server.asked.clear()
            with pytest.raises(ProviderAnswerInvalid, match=f"finds {MAX_LOCATED + 1} keys for one label"):
                await provider.locate("vm one")
            assert server.asked == [Operation.LOCATE]

    asyncio.run(main())


def test_a_key_that_could_neither_be_activated_nor_destroyed_is_named(place: Place) -> None:
    store = Store()

    def gone_after_create(operation: Operation) -> None:
        if store.labels and operation is not Operation.CREATE:
            raise Die()

    async def main() -> None:
        async with members(place, store.answers(before=gone_after_create)) as (provider, _):
            with pytest.raises(ProviderUnreachable, match="key key-1 was left unused at key provider kms") as left:
                await new_key(provider, "vm one")
            assert "destroy key key-1 there" in left.value.todo

    asyncio.run(main())


def test_a_key_whose_activation_failed_is_destroyed(place: Place) -> None:
    store = Store()
    refuses = store.answers()

    def answer(operation: Operation, payload: Item) -> bytes:
        if operation is Operation.ACTIVATE:
            return refusal(operation, 0xC, "not today")
        return refuses(operation, payload)

    async def main() -> None:
        async with members(place, answer) as (provider, _):
            with pytest.raises(ProviderRefused, match="permission denied: not today"):
                await new_key(provider, "vm one")
            assert store.states == {"key-1": 5}
            assert await provider.locate("vm one") == []

    asyncio.run(main())


def test_a_key_that_somebody_else_just_activated_is_active(place: Place) -> None:
    store = Store()
    key_id = store.add("vm")

    def faster(operation: Operation) -> None:
        if operation is Operation.ACTIVATE:
            store.states[key_id] = 2

    async def main() -> None:
        async with members(place, store.answers(before=faster)) as (provider, (server,)):
            await provider.activate(key_id)
            assert server.asked == [Operation.GET_ATTRIBUTES, Operation.ACTIVATE, Operation.GET_ATTRIBUTES]

    asyncio.run(main())


def test_a_destruction_whose_answer_was_lost_is_done(place: Place) -> None:
    """Also when the server that is asked next has forgotten the key by then."""
    store = Store()
    key_id = store.add("vm", 2)

    def forget(operation: Operation) -> None:
        if operation is Operation.DESTROY:
            del store.states[key_id]
            raise Die()

    async def main() -> None:
        async with members(place, store.answers(after=forget), store.answers()) as (provider, _):
            await provider.destroy(key_id)
            assert await provider.state(key_id) is KeyState.DESTROYED
            with pytest.raises(KeyMissing):
                await provider.get(key_id)

    asyncio.run(main())


# members that do not agree


def test_a_member_that_lags_is_not_believed_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmip_member, "FIRST_PAUSE_S", 30.0)  # no pause ends between two calls
    lagging, ahead = Store(), Store()
    key_id = ahead.add("vm", 2)

    async def main() -> None:
        async with members(place, lagging.answers(), ahead.answers()) as (provider, servers):
            assert (await provider.get(key_id)).reveal() == ahead.materials[key_id]
            assert await provider.state(key_id) is KeyState.ACTIVE
            with pytest.raises(KeyMissing) as missing:
                await provider.get("key-9")
            for server in servers:
                assert f"{server.member}: item not found" in missing.value.what
        async with members(place, lagging.answers(), raising(Die())) as (provider, (one, other)):
            for said in ("closed the connection", "not asked again yet"):
                with pytest.raises(KeyMissing, match=f"{one.member}: item not found.*{other.member}: .*{said}"):
                    await provider.get(key_id)

    asyncio.run(main())


def test_a_refusal_is_not_asked_around(place: Place) -> None:
    store = Store()
    key_id = store.add("vm", 2)
    refuses = always(refusal(Operation.GET_ATTRIBUTES, 0xC, "not yours\nno"))

    async def main() -> None:
        async with members(place, refuses, store.answers()) as (provider, (first, second)):
            for call in (provider.state, provider.activate, provider.destroy):
                with pytest.raises(ProviderRefused, match=rf"{first.member}: permission denied: not yours no \("):
                    await call(key_id)
            assert second.asked == []
            assert first.connections == 1, "a refusal is no reason to connect anew"

    asyncio.run(main())


def test_states_are_told_apart_on_a_server_that_keeps_destroyed_keys(place: Place) -> None:
    store = Store()
    by_state = {number: store.add("vm", number) for number in range(1, 7)}

    async def main() -> None:
        async with members(place, store.answers()) as (provider, _):
            assert [await provider.state(key_id) for key_id in by_state.values()] == list(KeyState)
            assert await provider.locate("vm") == [by_state[number] for number in range(1, 5)]
            for number in (5, 6):
                with pytest.raises(KeyMissing, match="destroyed"):
                    await provider.get(by_state[number])
                with pytest.raises(KeyMissing, match="destroyed"):
                    await provider.activate(by_state[number])
                await provider.destroy(by_state[number])
            for number, word in ((3, "deactivated"), (4, "compromised")):
                with pytest.raises(KeyNotActive, match=f"{by_state[number]} of key provider kms is {word}"):
                    await provider.activate(by_state[number])
                assert len((await provider.get(by_state[number])).reveal()) == 32
            await provider.destroy(by_state[2])
            assert store.states[by_state[2]] == 5

    asyncio.run(main())
