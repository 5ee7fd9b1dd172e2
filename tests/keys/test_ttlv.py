"""The encoding of KMIP messages: published examples, and what nobody should be able to make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.errors import ProviderAnswerInvalid
from sealift.keys.ttlv import MAX_DEPTH, MAX_ITEMS, Item, ItemType, Value, decode, encode, structure

TAG = 0x420020
_VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "kmip-ttlv.json").read_text())["tests"]


def _hex(spaced: str) -> bytes:
    return bytes.fromhex(spaced.replace("|", ""))


def _value(kind: ItemType, given: object) -> Value:
    match given:
        case str() if kind is ItemType.BYTE_STRING:
            return bytes.fromhex(given)
        case list():
            return tuple(Item(int(tag, 16), ItemType[name], value) for tag, name, value in given)
        case bool() | int() | str():
            return given
    raise AssertionError(given)


@pytest.mark.parametrize("vector", _VECTORS, ids=[vector["type"] for vector in _VECTORS])
def test_the_examples_of_the_standard(vector: dict[str, str]) -> None:
    kind = ItemType[vector["type"]]
    item = Item(TAG, kind, _value(kind, vector["value"]))
    assert encode(item) == _hex(vector["hex"])
    assert decode(_hex(vector["hex"])) == item


def test_every_type_has_an_example() -> None:
    assert {vector["type"] for vector in _VECTORS} == {kind.name for kind in ItemType}


_TAGS = st.integers(0x420000, 0x42FFFF) | st.integers(0x540000, 0x54FFFF)
_NUMBERS = {
    ItemType.INTEGER: st.integers(-(1 << 31), (1 << 31) - 1),
    ItemType.LONG_INTEGER: st.integers(-(1 << 63), (1 << 63) - 1),
    ItemType.BIG_INTEGER: st.integers(-(1 << 200), 1 << 200),
    ItemType.ENUMERATION: st.integers(0, (1 << 32) - 1),
    ItemType.BOOLEAN: st.booleans(),
    ItemType.DATE_TIME: st.integers(-(1 << 63), (1 << 63) - 1),
    ItemType.INTERVAL: st.integers(0, (1 << 32) - 1),
    ItemType.TEXT_STRING: st.text(max_size=20),
    ItemType.BYTE_STRING: st.binary(max_size=20),
}
_LEAVES = st.one_of(*(st.builds(Item, _TAGS, st.just(kind), values) for kind, values in _NUMBERS.items()))
ITEMS = st.recursive(
    _LEAVES,
    lambda inner: st.builds(Item, _TAGS, st.just(ItemType.STRUCTURE), st.lists(inner, max_size=4).map(tuple)),
    max_leaves=12,
)


@given(ITEMS)
def test_what_was_encoded_decodes_to_the_same(item: Item) -> None:
    raw = encode(item)
    assert len(raw) % 8 == 0
    assert decode(raw) == item


@given(st.binary(max_size=80) | ITEMS.flatmap(lambda item: _changed(encode(item))))
def test_any_bytes_are_one_item_or_refused(raw: bytes) -> None:
    try:
        item = decode(raw)
    except ProviderAnswerInvalid:
        return
    # A big integer may be longer than it has to be; everything else has one encoding only.
    again = encode(item)
    assert decode(again) == item
    assert again == raw or _has_big_integer(item)


def _has_big_integer(item: Item) -> bool:
    inner = item.value if isinstance(item.value, tuple) else ()
    return item.type is ItemType.BIG_INTEGER or any(_has_big_integer(each) for each in inner)


def _changed(raw: bytes) -> st.SearchStrategy[bytes]:
    at, to = st.integers(0, len(raw) - 1), st.integers(0, 255)
    return st.builds(lambda at, to: raw[:at] + bytes([to]) + raw[at + 1 :], at, to) | st.builds(lambda at: raw[:at], at)


@pytest.mark.parametrize(
    ("spaced", "why"),
    [
        ("", "ends within an item"),
        ("42 00 20 02 00 00 00", "ends within an item"),
        ("43 00 20 02 00 00 00 04 00 00 00 08 00 00 00 00", "a tag or a type"),
        ("42 00 20 00 00 00 00 04 00 00 00 08 00 00 00 00", "a tag or a type"),
        ("42 00 20 0B 00 00 00 04 00 00 00 08 00 00 00 00", "a tag or a type"),
        ("42 00 20 02 00 00 00 04 00 00 00 08 00 00 00 01", "padding"),
        ("42 00 20 02 00 00 00 04 00 00 00 08", "longer than what it is in"),
        ("42 00 20 02 00 00 00 03 00 00 08 00 00 00 00 00", "a length that its type"),
        ("42 00 20 02 00 00 00 08 00 00 00 00 00 00 00 08", "a length that its type"),
        ("42 00 20 03 00 00 00 04 00 00 00 08 00 00 00 00", "a length that its type"),
        ("42 00 20 05 00 00 00 00", "a length that its type"),
        ("42 00 20 06 00 00 00 08 00 00 00 00 00 00 00 02", "neither true nor false"),
        ("42 00 20 04 00 00 00 00", "big integer"),
        ("42 00 20 04 00 00 00 04 00 00 00 08 00 00 00 00", "big integer"),
        ("42 00 20 07 00 00 00 01 FF 00 00 00 00 00 00 00", "UTF-8"),
        ("42 00 20 08 FF FF FF FF", "longer than what it is in"),
        ("42 00 20 01 00 00 00 04 00 00 00 00 00 00 00 00", "multiple of 8"),
        ("42 00 20 01 00 00 00 08 42 00 20 02 00 00 00 04 00 00 00 08 00 00 00 00", "longer than what it is in"),
        ("42 00 20 02 00 00 00 04 00 00 00 08 00 00 00 00 00", "behind its end"),
    ],
)
def test_what_is_not_exactly_as_the_standard_says_is_refused(spaced: str, why: str) -> None:
    with pytest.raises(ProviderAnswerInvalid, match=why):
        decode(bytes.fromhex(spaced))


def test_nesting_and_number_of_items_have_their_limits() -> None:
    def nested(levels: int) -> Item:
        item = structure(TAG)
        for _ in range(levels - 1):
            item = structure(TAG, item)
        return item

    def many(count: int) -> Item:
        return structure(TAG, *[structure(TAG)] * (count - 1))

    assert decode(encode(nested(MAX_DEPTH - 1))) == nested(MAX_DEPTH - 1)
    with pytest.raises(ProviderAnswerInvalid, match="nested too deep"):
        decode(encode(nested(MAX_DEPTH)))
    assert decode(encode(many(MAX_ITEMS))) == many(MAX_ITEMS)
    with pytest.raises(ProviderAnswerInvalid, match="too many items"):
        decode(encode(many(MAX_ITEMS + 1)))


def test_values_are_not_shown_and_byte_strings_can_be_overwritten() -> None:
    raw = encode(Item(TAG, ItemType.BYTE_STRING, b"a key"))
    item = decode(raw)
    assert "key" not in repr(item)
    assert isinstance(item.value, bytearray)
    item.value[:] = bytes(5)
    assert raw[8:13] == b"a key"


@pytest.mark.parametrize(
    "item",
    [
        Item(0x430000, ItemType.INTEGER, 1),
        Item(TAG, ItemType.INTEGER, 1 << 31),
        Item(TAG, ItemType.INTEGER, True),
        Item(TAG, ItemType.INTEGER, "1"),
        Item(TAG, ItemType.ENUMERATION, -1),
        Item(TAG, ItemType.BOOLEAN, 1),
        Item(TAG, ItemType.TEXT_STRING, b"1"),
        Item(TAG, ItemType.STRUCTURE, 1),
    ],
)
def test_a_value_that_the_type_cannot_hold_is_not_encoded(item: Item) -> None:
    with pytest.raises((ValueError, OverflowError)):
        encode(item)
