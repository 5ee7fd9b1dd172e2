"""The KMIP requests that Sealift makes, and what it takes for an answer (KMIP 1.2 to 1.4). Pure.

A ``Call`` is one request: ``request`` encodes it, ``answer`` checks what came back and reads it. A message here has
exactly one batch item. Everything that a server says is taken only as far as it was asked for: the operation, the
object and the key's kind must be those of the request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from sealift.errors import InvalidInput, KeyMissing, KeyProviderError, ProviderAnswerInvalid, ProviderRefused
from sealift.keys.kmip_numbers import Operation, Reason, Tag, UsageMask
from sealift.keys.provider import KEK_BYTES, KeyState, check_key_id
from sealift.keys.ttlv import (
    HEADER_BYTES,
    Item,
    ItemType,
    Value,
    decode,
    decode_header,
    encode,
    enumeration,
    integer,
    structure,
    text,
)
from sealift.secret import Secret

MAX_ANSWER_BYTES: Final = 64 << 10
"""No answer to what we ask is near this: a key takes some 300 bytes, the ids of a thousand keys 48 KiB."""

MAX_LABEL: Final = 255
_MAX_SAID: Final = 200

_T = TypeVar("_T")


_SYMMETRIC_KEY, _AES, _RAW, _UNINTERPRETED_TEXT = 2, 3, 1, 1
_CESSATION_OF_OPERATION = 6
_SUCCESS, _FAILED = 0, 1
_STATES: Final = {
    1: KeyState.PRE_ACTIVE,
    2: KeyState.ACTIVE,
    3: KeyState.DEACTIVATED,
    4: KeyState.COMPROMISED,
    5: KeyState.DESTROYED,
    6: KeyState.DESTROYED_COMPROMISED,
}


@dataclass(frozen=True, order=True)
class Version:
    """A version of the protocol."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    def item(self) -> Item:
        """As it stands in messages."""
        major = integer(Tag.PROTOCOL_VERSION_MAJOR, self.major)
        return structure(Tag.PROTOCOL_VERSION, major, integer(Tag.PROTOCOL_VERSION_MINOR, self.minor))


VERSIONS: Final = (Version(1, 4), Version(1, 3), Version(1, 2))
"""What we speak. KMIP 2.0 has other messages; DiscoverVersions, which 1.0 does not have, tells which one to use."""


@dataclass(frozen=True)
class Call(Generic[_T]):
    """One request, and how to read its answer's payload."""

    operation: Operation
    payload: tuple[Item, ...]
    read: Callable[[Item], _T]

    def request(self, version: Version) -> bytes:
        """The request as bytes."""
        header = structure(
            Tag.REQUEST_HEADER,
            version.item(),
            integer(Tag.MAXIMUM_RESPONSE_SIZE, MAX_ANSWER_BYTES),
            integer(Tag.BATCH_COUNT, 1),
        )
        operation = enumeration(Tag.OPERATION, self.operation)
        item = structure(Tag.BATCH_ITEM, operation, structure(Tag.REQUEST_PAYLOAD, *self.payload))
        return encode(structure(Tag.REQUEST_MESSAGE, header, item))

    def answer(self, raw: bytes | bytearray) -> _T:
        """What the whole message ``raw`` answers.

        Raises KeyMissing and ProviderRefused when it says so, ProviderAnswerInvalid when it is no answer to this call.
        Byte strings of the decoded message, a key perhaps, are overwritten before this returns or raises.
        """
        message = decode(raw)
        try:
            return self._read(message)
        finally:
            _wipe(message)

    def _read(self, message: Item) -> _T:
        if message.tag != Tag.RESPONSE_MESSAGE or message.type is not ItemType.STRUCTURE:
            raise _invalid("it is no response message")
        header = _one(message, Tag.RESPONSE_HEADER, ItemType.STRUCTURE)
        if _number(header, Tag.BATCH_COUNT, ItemType.INTEGER) != 1:
            raise _invalid("it does not have one batch item")
        item = _one(message, Tag.BATCH_ITEM, ItemType.STRUCTURE)
        status = _number(item, Tag.RESULT_STATUS, ItemType.ENUMERATION)
        if status == _FAILED:
            raise _refusal(item)
        if status != _SUCCESS:
            raise _invalid("it says neither that the operation was carried out nor that it was not")
        if _number(item, Tag.OPERATION, ItemType.ENUMERATION) != self.operation:
            raise _invalid("it is about another operation")
        return self.read(_one(item, Tag.RESPONSE_PAYLOAD, ItemType.STRUCTURE))


def answer_length(header: bytes | bytearray) -> int:
    """How many bytes follow the first eight of a message; raises ProviderAnswerInvalid for more than we take."""
    head = decode_header(header)
    if head.tag != Tag.RESPONSE_MESSAGE or head.type is not ItemType.STRUCTURE:
        raise _invalid("it is no response message")
    if head.length > MAX_ANSWER_BYTES - HEADER_BYTES:
        raise _invalid(f"it announces {head.length} bytes; at most {MAX_ANSWER_BYTES} are taken")
    return head.length


def check_label(label: str) -> str:
    """``label`` itself; raises InvalidInput for what no key may be named."""
    if not label or len(label) > MAX_LABEL or not label.isprintable():
        raise InvalidInput(f"a key's label is 1-{MAX_LABEL} printable characters")
    return label


# Requests: KMIP 1.4, section 4


def discover_versions() -> Call[Version]:
    """The highest version that both sides speak (section 4.26); raises ProviderAnswerInvalid when there is none."""

    def read(payload: Item) -> Version:
        theirs = {
            Version(
                _number(each, Tag.PROTOCOL_VERSION_MAJOR, ItemType.INTEGER),
                _number(each, Tag.PROTOCOL_VERSION_MINOR, ItemType.INTEGER),
            )
            for each in _all(payload, Tag.PROTOCOL_VERSION, ItemType.STRUCTURE)
        }
        common = theirs.intersection(VERSIONS)
        if not common:
            raise ProviderAnswerInvalid("it speaks none of KMIP 1.2, 1.3 and 1.4")
        return max(common)

    return Call(Operation.DISCOVER_VERSIONS, tuple(each.item() for each in VERSIONS), read)


def create(label: str) -> Call[str]:
    """Make an AES-256 key of that name (section 4.1); answers its id.

    Its use is to derive others. Encrypt and Decrypt are said besides, because there are servers that make no AES key
    without them.
    """
    mask = UsageMask.ENCRYPT | UsageMask.DECRYPT | UsageMask.DERIVE_KEY
    template = structure(
        Tag.TEMPLATE_ATTRIBUTE,
        _attribute("Cryptographic Algorithm", enumeration(Tag.ATTRIBUTE_VALUE, _AES)),
        _attribute("Cryptographic Length", integer(Tag.ATTRIBUTE_VALUE, KEK_BYTES * 8)),
        _attribute("Cryptographic Usage Mask", integer(Tag.ATTRIBUTE_VALUE, mask)),
        _name(label),
    )

    def read(payload: Item) -> str:
        if _number(payload, Tag.OBJECT_TYPE, ItemType.ENUMERATION) != _SYMMETRIC_KEY:
            raise _invalid("another kind of object was made than a symmetric key")
        return _key_id(_one(payload, Tag.UNIQUE_IDENTIFIER, ItemType.TEXT_STRING))

    return Call(Operation.CREATE, (enumeration(Tag.OBJECT_TYPE, _SYMMETRIC_KEY), template), read)


def locate(label: str) -> Call[list[str]]:
    """The ids of the keys of that name, of any state (section 4.9)."""

    def read(payload: Item) -> list[str]:
        return [_key_id(each) for each in _all(payload, Tag.UNIQUE_IDENTIFIER, ItemType.TEXT_STRING)]

    kind = _attribute("Object Type", enumeration(Tag.ATTRIBUTE_VALUE, _SYMMETRIC_KEY))
    return Call(Operation.LOCATE, (kind, _name(label)), read)


def get(key_id: str) -> Call[Secret]:
    """The key itself (section 4.11): an AES-256 key, raw and not wrapped, and that very key."""

    def read(payload: Item) -> Secret:
        _same_key(payload, key_id)
        if _number(payload, Tag.OBJECT_TYPE, ItemType.ENUMERATION) != _SYMMETRIC_KEY:
            raise _invalid("it holds another kind of object than a symmetric key")
        block = _one(_one(payload, Tag.SYMMETRIC_KEY, ItemType.STRUCTURE), Tag.KEY_BLOCK, ItemType.STRUCTURE)
        if any(item.tag in (Tag.KEY_WRAPPING_DATA, Tag.KEY_COMPRESSION_TYPE) for item in _items(block)):
            raise _invalid("the key in it is wrapped or compressed")
        if _number(block, Tag.KEY_FORMAT_TYPE, ItemType.ENUMERATION) != _RAW:
            raise _invalid("the key in it is not in raw format")
        kind = _number(block, Tag.CRYPTOGRAPHIC_ALGORITHM, ItemType.ENUMERATION)
        bits = _number(block, Tag.CRYPTOGRAPHIC_LENGTH, ItemType.INTEGER)
        value = _one(block, Tag.KEY_VALUE, ItemType.STRUCTURE)
        material = _one(value, Tag.KEY_MATERIAL, ItemType.BYTE_STRING).value
        assert isinstance(material, bytearray)
        if (kind, bits, len(material)) != (_AES, KEK_BYTES * 8, KEK_BYTES):
            raise _invalid("the key in it is not an AES key of 256 bits")
        return Secret(material, length=KEK_BYTES)

    payload = (text(Tag.UNIQUE_IDENTIFIER, key_id), enumeration(Tag.KEY_FORMAT_TYPE, _RAW))
    return Call(Operation.GET, payload, read)


def get_state(key_id: str) -> Call[KeyState]:
    """Its state (section 4.12)."""

    def read(payload: Item) -> KeyState:
        _same_key(payload, key_id)
        attribute = _one(payload, Tag.ATTRIBUTE, ItemType.STRUCTURE)
        if _one(attribute, Tag.ATTRIBUTE_NAME, ItemType.TEXT_STRING).value != "State":
            raise _invalid("it tells another attribute than the key's state")
        state = _STATES.get(_number(attribute, Tag.ATTRIBUTE_VALUE, ItemType.ENUMERATION))
        if state is None:
            raise _invalid("it tells a state that does not exist")
        return state

    payload = (text(Tag.UNIQUE_IDENTIFIER, key_id), text(Tag.ATTRIBUTE_NAME, "State"))
    return Call(Operation.GET_ATTRIBUTES, payload, read)


def get_names(key_id: str) -> Call[list[str]]:
    """The names that it has (section 4.12), those of them that are plain text (section 3.2); perhaps none."""

    def read(payload: Item) -> list[str]:
        _same_key(payload, key_id)
        names: list[str] = []
        for attribute in _all(payload, Tag.ATTRIBUTE, ItemType.STRUCTURE):
            if _one(attribute, Tag.ATTRIBUTE_NAME, ItemType.TEXT_STRING).value != "Name":
                raise _invalid("it tells another attribute than the key's name")
            value = _one(attribute, Tag.ATTRIBUTE_VALUE, ItemType.STRUCTURE)
            name = _one(value, Tag.NAME_VALUE, ItemType.TEXT_STRING).value
            if _number(value, Tag.NAME_TYPE, ItemType.ENUMERATION) == _UNINTERPRETED_TEXT:
                names.append(str(name))
        return names

    payload = (text(Tag.UNIQUE_IDENTIFIER, key_id), text(Tag.ATTRIBUTE_NAME, "Name"))
    return Call(Operation.GET_ATTRIBUTES, payload, read)


def activate(key_id: str) -> Call[None]:
    """Make a pre-active key active (section 4.19)."""
    return _change(Operation.ACTIVATE, key_id)


def revoke(key_id: str) -> Call[None]:
    """Make an active key deactivated, because it will be used no more (section 4.20)."""
    reason = structure(Tag.REVOCATION_REASON, enumeration(Tag.REVOCATION_REASON_CODE, _CESSATION_OF_OPERATION))
    return _change(Operation.REVOKE, key_id, reason)


def destroy(key_id: str) -> Call[None]:
    """Destroy a key that is not active (section 4.21)."""
    return _change(Operation.DESTROY, key_id)


def _change(operation: Operation, key_id: str, *more: Item) -> Call[None]:
    def read(payload: Item) -> None:
        _same_key(payload, key_id)

    return Call(operation, (text(Tag.UNIQUE_IDENTIFIER, key_id), *more), read)


def _attribute(name: str, value: Item) -> Item:
    return structure(Tag.ATTRIBUTE, text(Tag.ATTRIBUTE_NAME, name), value)


def _name(label: str) -> Item:
    value = structure(
        Tag.ATTRIBUTE_VALUE,
        text(Tag.NAME_VALUE, check_label(label)),
        enumeration(Tag.NAME_TYPE, _UNINTERPRETED_TEXT),
    )
    return _attribute("Name", value)


# Answers


def _refusal(item: Item) -> KeyProviderError:
    number = _number(item, Tag.RESULT_REASON, ItemType.ENUMERATION)
    said = [each.value for each in _all(item, Tag.RESULT_MESSAGE, ItemType.TEXT_STRING)]
    words = "".join(char if char.isprintable() else " " for char in str(said[0])) if said else ""
    words = " ".join(words.split())
    words = words[: _MAX_SAID - 3] + "..." if len(words) > _MAX_SAID else words
    reason = Reason(number).name.replace("_", " ").lower() if number in list(Reason) else f"reason {number:#x}"
    what = f"{reason}: {words}" if words else reason
    return KeyMissing(what) if number == Reason.ITEM_NOT_FOUND else ProviderRefused(what)


def _wipe(item: Item) -> None:
    if isinstance(item.value, bytearray):
        item.value[:] = bytes(len(item.value))
    elif isinstance(item.value, tuple):
        for each in item.value:
            _wipe(each)


def _items(parent: Item) -> tuple[Item, ...]:
    assert isinstance(parent.value, tuple)
    return parent.value


def _all(parent: Item, tag: Tag, kind: ItemType) -> list[Item]:
    found = [item for item in _items(parent) if item.tag == tag]
    if any(item.type is not kind for item in found):
        raise _invalid(f"an item has the wrong type: {tag.name.replace('_', ' ').lower()}")
    return found


def _one(parent: Item, tag: Tag, kind: ItemType) -> Item:
    found = _all(parent, tag, kind)
    if len(found) != 1:
        how = "is missing" if not found else "is there more than once"
        raise _invalid(f"an item {how}: {tag.name.replace('_', ' ').lower()}")
    return found[0]


def _number(parent: Item, tag: Tag, kind: ItemType) -> int:
    value: Value = _one(parent, tag, kind).value
    assert isinstance(value, int)
    return value


def _same_key(payload: Item, key_id: str) -> None:
    if _one(payload, Tag.UNIQUE_IDENTIFIER, ItemType.TEXT_STRING).value != key_id:
        raise _invalid("it is about another key")


def _key_id(item: Item) -> str:
    try:
        return check_key_id(str(item.value))
    except InvalidInput:
        raise _invalid("the key id in it has characters or a length that no file of ours could hold") from None


def _invalid(why: str) -> ProviderAnswerInvalid:
    return ProviderAnswerInvalid(f"the answer cannot be used: {why}")
