"""TTLV, the encoding of KMIP messages (KMIP 1.4, section 9.1): tag, type, length, value. Pure.

    offset  size     field
    0       3        tag: 42.... of the standard, 54.... of extensions
    3       1        type, see ItemType
    4       4        length n of the value without padding, big-endian
    8       n        the value, big-endian
    8+n     0 to 7   zeros up to a multiple of 8

What decodes here has exactly the size that its type says, zeros where the standard has zeros, and text that is UTF-8.
``decode`` raises ProviderAnswerInvalid for everything else, and neither that nor a repr quotes a value: among them are
keys. Byte strings decode to a ``bytearray`` each, so that its holder can overwrite it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeAlias

from sealift.errors import ProviderAnswerInvalid

HEADER_BYTES: Final = 8
MAX_DEPTH: Final = 12
"""Structures within structures; the deepest that we ask for, a key within an answer to Get, has six."""

MAX_ITEMS: Final = 8192
_ALIGN: Final = 8
_NAMESPACES: Final = (0x42, 0x54)


class ItemType(IntEnum):
    """Section 9.1.1.2."""

    STRUCTURE = 1
    INTEGER = 2
    LONG_INTEGER = 3
    BIG_INTEGER = 4
    ENUMERATION = 5
    BOOLEAN = 6
    TEXT_STRING = 7
    BYTE_STRING = 8
    DATE_TIME = 9
    INTERVAL = 10


Value: TypeAlias = "tuple[Item, ...] | bool | int | str | bytes | bytearray"

_SIZES: Final = {
    ItemType.INTEGER: 4,
    ItemType.LONG_INTEGER: 8,
    ItemType.ENUMERATION: 4,
    ItemType.BOOLEAN: 8,
    ItemType.DATE_TIME: 8,
    ItemType.INTERVAL: 4,
}
_SIGNED: Final = {ItemType.INTEGER, ItemType.LONG_INTEGER, ItemType.BIG_INTEGER, ItemType.DATE_TIME}


@dataclass(frozen=True)
class Item:
    """One item. ``value`` of a structure: its items; of a date-time and an interval: seconds (since 1970)."""

    tag: int
    type: ItemType
    value: Value = field(repr=False)


@dataclass(frozen=True)
class Header:
    """What an item begins with; ``length`` is that of its value, without padding."""

    tag: int
    type: ItemType
    length: int


def structure(tag: int, *items: Item) -> Item:
    """A structure."""
    return Item(tag, ItemType.STRUCTURE, items)


def integer(tag: int, value: int) -> Item:
    """An integer of 32 bits."""
    return Item(tag, ItemType.INTEGER, value)


def enumeration(tag: int, value: int) -> Item:
    """An enumeration of 32 bits."""
    return Item(tag, ItemType.ENUMERATION, value)


def text(tag: int, value: str) -> Item:
    """A text string."""
    return Item(tag, ItemType.TEXT_STRING, value)


def encode(item: Item) -> bytes:
    """The item as bytes; raises ValueError or OverflowError for a value that its type cannot hold (our bug)."""
    if item.tag >> 16 not in _NAMESPACES:
        raise ValueError(f"{item.tag:#x} is no tag")
    raw = _encode_value(item)
    head = item.tag.to_bytes(3, "big") + bytes([item.type]) + len(raw).to_bytes(4, "big")
    return head + raw + bytes(-len(raw) % _ALIGN)


def decode(raw: bytes | bytearray | memoryview) -> Item:
    """The one item that ``raw`` is, nothing before or behind it; raises ProviderAnswerInvalid."""
    with memoryview(raw) as view:
        item, end = _Decoder(view).item(0, len(view), MAX_DEPTH)
        if end != len(view):
            raise _invalid("there is something behind its end")
    return item


def decode_header(raw: bytes | bytearray | memoryview) -> Header:
    """The first ``HEADER_BYTES`` of an item; raises ProviderAnswerInvalid."""
    tag, kind = int.from_bytes(raw[:3], "big"), raw[3]
    if tag >> 16 not in _NAMESPACES or kind not in list(ItemType):
        raise _invalid("an item has a tag or a type that does not exist")
    return Header(tag, ItemType(kind), int.from_bytes(raw[4:8], "big"))


class _Decoder:
    """Reads items of one message, and counts them."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._items = 0

    def item(self, start: int, end: int, depth: int) -> tuple[Item, int]:
        """The item at ``start`` that must end before ``end``, and where its padding ends."""
        self._items += 1
        if self._items > MAX_ITEMS:
            raise _invalid("it has too many items")
        if end - start < HEADER_BYTES:
            raise _invalid("it ends within an item")
        header = decode_header(self._view[start : start + HEADER_BYTES])
        begin = start + HEADER_BYTES
        stop = begin + header.length
        padded = stop + -header.length % _ALIGN
        if padded > end:
            raise _invalid("an item is longer than what it is in")
        if any(self._view[stop:padded]):
            raise _invalid("the padding of an item is not zero")
        if header.type is ItemType.STRUCTURE:
            if padded != stop:
                raise _invalid("a structure's length is not a multiple of 8")
            return Item(header.tag, header.type, tuple(self._items_of(begin, stop, depth - 1))), padded
        return Item(header.tag, header.type, _decode_value(header.type, self._view[begin:stop])), padded

    def _items_of(self, start: int, end: int, depth: int) -> Iterator[Item]:
        if depth == 0:
            raise _invalid("its structures are nested too deep")
        while start < end:
            item, start = self.item(start, end, depth)
            yield item


def _encode_value(item: Item) -> bytes:
    value = item.value
    match item.type:
        case ItemType.STRUCTURE if isinstance(value, tuple):
            return b"".join(encode(each) for each in value)
        case ItemType.TEXT_STRING if isinstance(value, str):
            return value.encode()
        case ItemType.BYTE_STRING if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        case ItemType.BOOLEAN:
            if isinstance(value, bool):
                return int(value).to_bytes(8, "big")
        case ItemType.BIG_INTEGER if isinstance(value, int):
            size = value.bit_length() // 8 + 1  # one bit more, for the sign
            return value.to_bytes(size + -size % _ALIGN, "big", signed=True)
        case kind if kind in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            return value.to_bytes(_SIZES[kind], "big", signed=kind in _SIGNED)
    raise ValueError(f"this is no value of type {item.type.name}")


def _decode_value(kind: ItemType, raw: memoryview) -> Value:
    if kind is ItemType.BYTE_STRING:
        return bytearray(raw)
    if kind is ItemType.TEXT_STRING:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise _invalid("a text is not UTF-8") from None
    if kind is ItemType.BIG_INTEGER:
        if not raw or len(raw) % _ALIGN:
            raise _invalid("a big integer has the wrong length")
    elif len(raw) != _SIZES[kind]:
        raise _invalid("an item has a length that its type does not have")
    number = int.from_bytes(raw, "big", signed=kind in _SIGNED)
    if kind is not ItemType.BOOLEAN:
        return number
    if number not in (0, 1):
        raise _invalid("a boolean is neither true nor false")
    return bool(number)


def _invalid(why: str) -> ProviderAnswerInvalid:
    return ProviderAnswerInvalid(f"the answer is not TTLV: {why}")
