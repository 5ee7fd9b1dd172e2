"""KMIP requests and answers: published messages, and answers that are not what was asked for."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.errors import InvalidInput, KeyMissing, KeyProviderError, ProviderAnswerInvalid, ProviderRefused
from sealift.keys import kmip_messages as kmip
from sealift.keys.kmip_messages import MAX_ANSWER_BYTES, VERSIONS, Call, Version, answer_length
from sealift.keys.kmip_numbers import Operation, Tag
from sealift.keys.provider import KeyState
from sealift.keys.ttlv import Item, ItemType, decode, encode, enumeration, integer, structure, text
from support.kmip_server import key_item, message, name_value, refusal, version, wrapped

_VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "kmip-messages.json").read_text())["tests"]
PUBLISHED = {(each["kind"], each["where"]): bytes.fromhex(each["hex"]) for each in _VECTORS}
KEY, OTHER = "21d28b8a-06df-43c0-b72f-2a161633ada9", "28c7bad1-bc9b-41df-b439-1ba04a6fd982"
MATERIAL = bytes(range(32))
CALLS: dict[str, Call[Any]] = {
    "discover": kmip.discover_versions(),
    "create": kmip.create("vm one"),
    "locate": kmip.locate("vm one"),
    "get": kmip.get(KEY),
    "state": kmip.get_state(KEY),
    "names": kmip.get_names(KEY),
    "activate": kmip.activate(KEY),
    "revoke": kmip.revoke(KEY),
    "destroy": kmip.destroy(KEY),
}


def child(item: Item, *tags: Tag) -> Item:
    for tag in tags:
        assert isinstance(item.value, tuple)
        item = next(each for each in item.value if each.tag == tag)
    return item


# published messages


@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=[f"{kind} {where}" for kind, where in PUBLISHED])
def test_published_messages_are_the_same_when_written_again(raw: bytes) -> None:
    assert encode(decode(raw)) == raw


def test_our_requests_are_encoded_as_the_published_ones() -> None:
    state = decode(kmip.get_state(KEY).request(VERSIONS[0]))
    published = decode(PUBLISHED["request", "UC 4.1, step 8, Get Attributes"])
    assert encode(child(state, Tag.BATCH_ITEM)) == encode(child(published, Tag.BATCH_ITEM))

    header = child(state, Tag.REQUEST_HEADER).value
    published_header = child(decode(PUBLISHED["request", "UC 12.1, step 1, Query"]), Tag.REQUEST_HEADER).value
    assert isinstance(header, tuple)
    assert isinstance(published_header, tuple)
    assert [each.tag for each in header] == [each.tag for each in published_header]

    # Algorithm and length as published; our mask asks for one use more, and we give one name.
    ours = child(decode(kmip.create("FirstTestName").request(VERSIONS[0])), Tag.BATCH_ITEM, Tag.REQUEST_PAYLOAD)
    theirs = child(decode(PUBLISHED["request", "TC 17.1, time 0, Create"]), Tag.BATCH_ITEM, Tag.REQUEST_PAYLOAD)
    assert child(ours, Tag.OBJECT_TYPE) == child(theirs, Tag.OBJECT_TYPE)
    mine, published_attributes = (child(each, Tag.TEMPLATE_ATTRIBUTE).value for each in (ours, theirs))
    assert isinstance(mine, tuple)
    assert isinstance(published_attributes, tuple)
    assert (*mine[:2], mine[3]) == (*published_attributes[:2], published_attributes[3])
    assert child(mine[2], Tag.ATTRIBUTE_NAME) == child(published_attributes[2], Tag.ATTRIBUTE_NAME)
    assert child(mine[2], Tag.ATTRIBUTE_VALUE).value == 0x20C

    get = child(decode(kmip.get(KEY).request(VERSIONS[0])), Tag.BATCH_ITEM)
    published_get = child(decode(PUBLISHED["request", "UC 4.1, step 6, Get"]), Tag.BATCH_ITEM)
    assert child(get, Tag.OPERATION) == child(published_get, Tag.OPERATION)
    assert child(get, Tag.REQUEST_PAYLOAD, Tag.UNIQUE_IDENTIFIER) == child(
        published_get, Tag.REQUEST_PAYLOAD, Tag.UNIQUE_IDENTIFIER
    )


def test_published_answers_are_understood() -> None:
    assert kmip.create("x").answer(PUBLISHED["answer", "TC 17.1, time 0, Create"]) == OTHER
    assert kmip.get_state(KEY).answer(PUBLISHED["answer", "UC 4.1, step 8, Get Attributes"]) is KeyState.COMPROMISED
    kmip.activate(KEY).answer(PUBLISHED["answer", "UC 4.1, step 6, Activate"])
    kmip.revoke(KEY).answer(PUBLISHED["answer", "UC 4.1, step 7, Revoke"])
    kmip.destroy(OTHER).answer(PUBLISHED["answer", "TC 17.1, time 5, Destroy"])
    with pytest.raises(ProviderAnswerInvalid, match="not an AES key of 256 bits"):
        kmip.get(KEY).answer(PUBLISHED["answer", "UC 4.1, step 6, Get"])
    with pytest.raises(ProviderRefused, match=r"^response too large: Response size: 568"):
        kmip.get(KEY).answer(PUBLISHED["answer", "UC 12.1, step 1, refused"])
    with pytest.raises(ProviderRefused, match=r"^invalid field: Attribute Name specified more than once: Object Type$"):
        kmip.get_state(KEY).answer(PUBLISHED["answer", "TC 17.1, time 1, refused"])


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_to_another_operation_or_about_another_key_is_none(name: str) -> None:
    for (kind, where), raw in PUBLISHED.items():
        about_this = where in {
            "create": ("UC 3.1.1, Create", "TC 17.1, time 0, Create"),
            "state": ("UC 4.1, step 8, Get Attributes",),
            "activate": ("UC 4.1, step 6, Activate",),
            "revoke": ("UC 4.1, step 7, Revoke",),
        }.get(name, ())
        if kind == "answer" and not about_this and "refused" not in where:
            with pytest.raises(ProviderAnswerInvalid):
                CALLS[name].answer(raw)


# requests


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("which", VERSIONS)
def test_a_request_says_its_version_and_what_we_can_take(name: str, which: Version) -> None:
    request = decode(CALLS[name].request(which))
    header = child(request, Tag.REQUEST_HEADER)
    assert child(header, Tag.PROTOCOL_VERSION) == version(which.major, which.minor)
    assert child(header, Tag.MAXIMUM_RESPONSE_SIZE) == integer(Tag.MAXIMUM_RESPONSE_SIZE, MAX_ANSWER_BYTES)
    assert child(request, Tag.BATCH_ITEM, Tag.OPERATION).value == CALLS[name].operation


@pytest.mark.parametrize("label", ["", "x" * 256, "a\nb", "\udcff", "\x00"])
def test_a_label_that_no_key_may_have_is_refused(label: str) -> None:
    for call in (kmip.create, kmip.locate):
        with pytest.raises(InvalidInput):
            call(label)


# answers


def test_the_highest_common_version_is_taken() -> None:
    def answer(*theirs: tuple[int, int]) -> bytes:
        return message(Operation.DISCOVER_VERSIONS, *(version(*each) for each in theirs))

    def discovered(*theirs: tuple[int, int]) -> Version:
        return kmip.discover_versions().answer(answer(*theirs))

    assert discovered((2, 1), (2, 0), (1, 4), (1, 3), (1, 2), (1, 1)) == Version(1, 4)
    assert discovered((1, 2), (1, 3)) == Version(1, 3)
    assert discovered((1, 2)) == Version(1, 2)
    for none in [(), ((2, 0), (1, 1))]:
        with pytest.raises(ProviderAnswerInvalid, match=r"none of KMIP 1\.2, 1\.3 and 1\.4"):
            discovered(*none)


def test_a_key_is_taken_as_it_was_asked_for() -> None:
    assert kmip.get(KEY).answer(message(Operation.GET, *key_item(KEY, MATERIAL))).reveal() == MATERIAL


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"key_id": OTHER}, "about another key"),
        ({"material": MATERIAL[:16], "bits": 128}, "not an AES key of 256 bits"),
        ({"material": MATERIAL[:31]}, "not an AES key of 256 bits"),
        ({"material": MATERIAL + b"1"}, "not an AES key of 256 bits"),
        ({"bits": 128}, "not an AES key of 256 bits"),
        ({"algorithm": 2}, "not an AES key of 256 bits"),
        ({"format": 2}, "not in raw format"),
        ({"wrapped": True}, "wrapped or compressed"),
        ({"object_type": 7}, "another kind of object"),
    ],
)
def test_another_key_or_another_kind_of_key_is_refused_and_not_quoted(changes: dict[str, Any], why: str) -> None:
    parts: dict[str, Any] = {"key_id": KEY, "material": MATERIAL} | changes
    raw = bytearray(message(Operation.GET, *key_item(**parts)))
    with pytest.raises(ProviderAnswerInvalid, match=why) as refused:
        kmip.get(KEY).answer(raw)
    raw[:] = bytes(len(raw))  # as its holder does
    told = traceback.TracebackException.from_exception(refused.value, capture_locals=True)
    (inner,) = [frame.locals for frame in told.stack if frame.name == "read"]
    assert inner is not None
    assert "payload" in inner
    assert not any(repr(parts["material"][:8])[2:-1] in value for value in inner.values())


def test_every_state_is_known_and_no_other() -> None:
    def answer(number: int, name: str = "State") -> bytes:
        value = enumeration(Tag.ATTRIBUTE_VALUE, number)
        attribute = structure(Tag.ATTRIBUTE, text(Tag.ATTRIBUTE_NAME, name), value)
        return message(Operation.GET_ATTRIBUTES, text(Tag.UNIQUE_IDENTIFIER, KEY), attribute)

    call = kmip.get_state(KEY)
    assert [call.answer(answer(number)) for number in range(1, 7)] == list(KeyState)
    for bad in (answer(0), answer(7), answer(2, "Object Type")):
        with pytest.raises(ProviderAnswerInvalid):
            call.answer(bad)


def test_names_are_read_and_nothing_else() -> None:
    def answer(*values: Item, name: str = "Name", key_id: str = KEY) -> bytes:
        found = [
            structure(Tag.ATTRIBUTE, text(Tag.ATTRIBUTE_NAME, name), integer(0x420009, index), value)  # its index
            for index, value in enumerate(values)
        ]
        return message(Operation.GET_ATTRIBUTES, text(Tag.UNIQUE_IDENTIFIER, key_id), *found)

    call = kmip.get_names(KEY)
    assert call.answer(answer()) == []
    assert call.answer(answer(name_value("vm one"), name_value("urn:x", 2), name_value("VM ONE"))) == [
        "vm one",
        "VM ONE",
    ]
    for bad, why in (
        (answer(name_value("vm one"), key_id=OTHER), "another key"),
        (answer(name_value("vm one"), name="State"), "another attribute"),
        (answer(text(Tag.ATTRIBUTE_VALUE, "vm one")), "wrong type: attribute value"),
        (answer(structure(Tag.ATTRIBUTE_VALUE, text(Tag.NAME_VALUE, "vm one"))), "missing: name type"),
        (answer(structure(Tag.ATTRIBUTE_VALUE, enumeration(Tag.NAME_TYPE, 1))), "missing: name value"),
    ):
        with pytest.raises(ProviderAnswerInvalid, match=why):
            call.answer(bad)


def test_keys_are_located_none_one_or_many() -> None:
    def answer(*ids: str) -> bytes:
        return message(Operation.LOCATE, *(text(Tag.UNIQUE_IDENTIFIER, each) for each in ids))

    call = kmip.locate("vm one")
    for ids in ([], [KEY], [KEY, OTHER]):
        assert call.answer(answer(*ids)) == ids
    with pytest.raises(ProviderAnswerInvalid, match="key id"):
        call.answer(answer(KEY, "../../etc/passwd"))


@pytest.mark.parametrize("key_id", ["", "a b", "-x", "x" * 129, "a\n", "§"])
def test_a_key_id_that_our_files_could_not_hold_is_refused(key_id: str) -> None:
    kind = enumeration(Tag.OBJECT_TYPE, 2)
    with pytest.raises(ProviderAnswerInvalid, match="key id"):
        kmip.create("x").answer(message(Operation.CREATE, kind, text(Tag.UNIQUE_IDENTIFIER, key_id)))


def test_a_refusal_says_why_in_words_that_fit_a_terminal() -> None:
    said = "No\x1b[31m\n\n  such key " + "x" * 400
    with pytest.raises(ProviderRefused) as refused:
        kmip.get(KEY).answer(refusal(Operation.GET, 0xC, said))
    assert refused.value.what.startswith("permission denied: No [31m such key xxx")
    assert refused.value.what.isprintable()
    assert len(refused.value.what) < 250
    with pytest.raises(ProviderRefused, match=r"^reason 0x999: why$"):
        kmip.get(KEY).answer(refusal(Operation.GET, 0x999, "why"))
    with pytest.raises(KeyMissing, match=r"^item not found: no such thing$"):
        kmip.get(KEY).answer(refusal(Operation.GET, 1, "no such thing"))


def _status(number: int) -> bytes:
    return message(Operation.ACTIVATE, text(Tag.UNIQUE_IDENTIFIER, KEY), status=number)


def _batch() -> Item:
    return structure(
        Tag.BATCH_ITEM,
        enumeration(Tag.OPERATION, Operation.ACTIVATE),
        enumeration(Tag.RESULT_STATUS, 0),
        structure(Tag.RESPONSE_PAYLOAD, text(Tag.UNIQUE_IDENTIFIER, KEY)),
    )


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (lambda: _status(2), "neither that"),
        (lambda: _status(3), "neither that"),
        (lambda: wrapped(_batch(), count=2), "one batch item"),
        (lambda: wrapped(_batch(), _batch()), "more than once"),
        (lambda: wrapped(), "is missing"),
        (lambda: encode(structure(Tag.REQUEST_MESSAGE, _batch())), "no response message"),
        (lambda: encode(structure(Tag.RESPONSE_MESSAGE, _batch())), "is missing: response header"),
        (lambda: message(Operation.ACTIVATE), "is missing: unique identifier"),
        (lambda: message(Operation.ACTIVATE, integer(Tag.UNIQUE_IDENTIFIER, 1)), "wrong type"),
        (lambda: message(Operation.ACTIVATE, *[text(Tag.UNIQUE_IDENTIFIER, KEY)] * 2), "more than once"),
        (lambda: encode(Item(Tag.RESPONSE_MESSAGE, ItemType.TEXT_STRING, "hello")), "no response message"),
    ],
)
def test_what_is_no_answer_is_refused(raw: Callable[[], bytes], why: str) -> None:
    kmip.activate(KEY).answer(wrapped(_batch()))
    with pytest.raises(ProviderAnswerInvalid, match=why):
        kmip.activate(KEY).answer(raw())


def test_the_length_of_an_answer_is_known_before_it_is_read() -> None:
    raw = wrapped(_batch())
    assert answer_length(raw[:8]) == len(raw) - 8
    head = raw[:4]
    assert answer_length(head + (MAX_ANSWER_BYTES - 8).to_bytes(4, "big")) == MAX_ANSWER_BYTES - 8
    for length in (MAX_ANSWER_BYTES, 0xFFFFFFF8, 0xFFFFFFFF):
        with pytest.raises(ProviderAnswerInvalid, match=f"announces {length} bytes"):
            answer_length(head + length.to_bytes(4, "big"))
    for other in (b"HTTP/1.1", PUBLISHED["request", "UC 4.1, step 6, Get"][:8], b"\x42\x00\x7b\x02" + bytes(4)):
        with pytest.raises(ProviderAnswerInvalid):
            answer_length(other)


_ANSWERS = [raw for (kind, _), raw in PUBLISHED.items() if kind == "answer"]


@given(st.sampled_from(list(CALLS)), st.sampled_from(_ANSWERS), st.integers(0, 400), st.integers(0, 255))
def test_an_answer_changed_anywhere_is_taken_or_refused_by_name(name: str, raw: bytes, at: int, to: int) -> None:
    changed = bytearray(raw)
    changed[at % len(raw)] = to
    said = ""
    try:
        CALLS[name].answer(changed)
    except KeyProviderError as refused:
        said = str(refused)
    assert not said or said.isprintable()
