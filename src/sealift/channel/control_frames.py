"""Control messages as a byte stream: the content of channel 0 of a move.

    offset  0           2
            | length u16 | JSON object of that many bytes, UTF-8, with a text member "type", nested at most 8 deep |

In a sealed move these bytes are the payload of DATA records; in a plain move they are what is on the wire.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from sealift.channel.protocol import CONTROL_FRAME_BYTES
from sealift.errors import InvalidInput, RecordUnexpected

Message = dict[str, Any]

MAX_DEPTH: Final = 8
"""How deep a message may nest, itself counted. Python reads deeper JSON than it can write again, so a message at the
limit of the interpreter would be taken here and then break whoever hands it on."""

_LENGTH: Final = struct.Struct(">H")


def encode_frame(message: Message) -> bytes:
    """One message as it is sent; raises InvalidInput if it has no type, is too long or nests too deep."""
    if not isinstance(message.get("type"), str):
        raise InvalidInput("a control message needs a type")
    if not _is_flat(message, MAX_DEPTH):
        raise InvalidInput(f"a control message nests deeper than {MAX_DEPTH}")
    try:
        text = json.dumps(message, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        raise InvalidInput("a control message cannot be written as JSON") from None
    if len(text) > CONTROL_FRAME_BYTES:
        raise InvalidInput(f"a control message has {len(text)} bytes; at most {CONTROL_FRAME_BYTES} are allowed")
    return _LENGTH.pack(len(text)) + text


class FrameReader:
    """Puts messages together again from pieces of any size; never holds more than one frame and one piece."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    @property
    def midway(self) -> bool:
        """Whether the stream stands in the middle of a frame, where it must not end."""
        return bool(self._waiting)

    def feed(self, data: bytes | memoryview) -> list[Message]:
        """The messages completed by ``data``; raises RecordUnexpected for what is not a message."""
        self._waiting += data
        messages: list[Message] = []
        while len(self._waiting) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._waiting)
            if length > CONTROL_FRAME_BYTES:
                raise RecordUnexpected(f"the peer announced a control message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._waiting) < end:
                break
            messages.append(_parse(bytes(self._waiting[_LENGTH.size : end])))
            del self._waiting[:end]
        return messages


def _parse(text: bytes) -> Message:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str) or not _is_flat(message, MAX_DEPTH):
        raise RecordUnexpected("the peer sent a control message that is not a shallow JSON object with a type")
    return message


def _is_flat(value: object, depth: int) -> bool:
    """Whether ``value`` nests at most ``depth`` deep."""
    if isinstance(value, dict):
        return depth > 0 and all(_is_flat(each, depth - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_flat(each, depth - 1) for each in value)
    return True
