"""What key servers answer."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz.choices import Choices, altered
from sealift.errors import KeyProviderError, ProviderAnswerInvalid
from sealift.keys import kmip_messages as kmip
from sealift.keys.kmip_messages import Call, Version
from sealift.keys.provider import KEK_BYTES, KeyState, check_key_id
from sealift.keys.ttlv import Item, ItemType, decode, encode
from sealift.secret import Secret
from support.kmip_server import key_item, message, version

_VECTORS = Path(__file__).parents[1] / "vectors" / "kmip-messages.json"
_KEY = "21d28b8a-06df-43c0-b72f-2a161633ada9"
_CALLS: tuple[Call[object], ...] = (
    kmip.discover_versions(),
    kmip.create("vm"),
    kmip.locate("vm"),
    kmip.get(_KEY),
    kmip.get_state(_KEY),
    kmip.activate(_KEY),
    kmip.get_names(_KEY),
)
_GENUINE = (
    message(kmip.Operation.DISCOVER_VERSIONS, version(2, 0), version(1, 4), version(1, 2)),
    message(kmip.Operation.GET, *key_item(_KEY, bytes(range(KEK_BYTES)))),
    *(bytes.fromhex(each["hex"]) for each in json.loads(_VECTORS.read_text())["tests"] if each["kind"] == "answer"),
)


def kmip_answer(data: bytes) -> None:
    """Bytes are one item and written again the same, or refused; an answer is of its kind, or refused by name."""
    choices = Choices(data)
    call = choices.one_of(_CALLS)
    raw = choices.one_of(_GENUINE) if choices.flag() else choices.rest()
    for _ in range(choices.number(3)):
        raw = altered(raw, choices)
    try:
        item = decode(raw)
    except ProviderAnswerInvalid:
        item = None
    if item is not None:
        again = encode(item)
        assert decode(again) == item
        assert again == raw or _has_big_integer(item)  # which alone may be longer than it has to be
    said, refusal = _answer(call, raw)
    assert refusal.isprintable()
    if refusal:
        return
    assert item is not None
    match said:
        case Secret():
            assert len(said.reveal()) == KEK_BYTES
        case str():
            check_key_id(said)
        case list() if call.operation is kmip.Operation.LOCATE:
            assert [check_key_id(each) for each in said] == said
        case list():
            assert all(isinstance(each, str) for each in said)
        case _:
            assert said is None or isinstance(said, (KeyState, Version))


def _answer(call: Call[object], raw: bytes) -> tuple[object, str]:
    try:
        return call.answer(raw), ""
    except KeyProviderError as refused:
        return None, str(refused)


def _has_big_integer(item: Item) -> bool:
    inner = item.value if isinstance(item.value, tuple) else ()
    return item.type is ItemType.BIG_INTEGER or any(_has_big_integer(each) for each in inner)
