"""What a relay or splice process is told, once, over an inherited socket: never by argument, environment or file.

    offset  0          4            4 + n
            | n, u32   | JSON, n    | sealed move: key (32), nonce (8)  |  plain move: token (16) |

The process answers with one line of JSON on the same socket when its control socket listens, ``{"ready": true}``, or
``{"error": SLUG, "what": TEXT}`` when it cannot start, and closes it. The JSON part is public. The secret part is
parsed by hand, so that no parser and no error message ever holds it.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_type_hints

from sealift.channel.protocol import KEY_BYTES, NONCE_BYTES, ROUTE_BYTES, ChannelSpec, Plan
from sealift.errors import InvalidInput
from sealift.secret import Secret

RECORD_BYTES: Final = 512 << 10
SILENCE_S: Final = 5.0
GIVE_UP_S: Final = 60.0
SWITCHOVER_TIMEOUT_S: Final = 5.0
SECRET_BYTES: Final = {Plan.SEALED: KEY_BYTES + NONCE_BYTES, Plan.PLAIN: ROUTE_BYTES}
_MAX_JSON: Final = 64 << 10
_LENGTH: Final = struct.Struct(">I")
_JSON_TYPES: Final = {str: (str,), int: (int,), float: (int, float)}

Role = Literal["source", "target"]
Phase = Literal["running", "switchover", "committed"]
"""The guest runs at the source; it is stopped and may still be resumed there; it is the target's."""
PHASES: Final[tuple[Phase, ...]] = ("running", "switchover", "committed")


@dataclass(frozen=True)
class RelaySpec:
    """The public part. ``spec.plan`` says whether a relay (sealed) or a splice (plain) can carry it out.

    ``directory`` is the private directory of this move: ``relay.sock`` and the local migration sockets lie in it.
    ``qemu_pid`` is the only process that may be at the other end of a local socket.
    """

    role: Role
    spec: ChannelSpec
    directory: str
    qemu_pid: int
    target: str = ""
    """Source only: ``host:port`` of the target's doorman."""
    door: str = ""
    """Target only: path of the datagram socket at which the doorman hands connections over."""
    source_address: str = ""
    """Target of a plain move only: the one IP address that connections may come from."""
    record_bytes: int = RECORD_BYTES
    """Payload of a full record in the direction of the move, in bytes."""
    silence_s: float = SILENCE_S
    """Seconds without a sign of life on the control channel after which the connections count as broken."""
    patience_s: float = 5.0
    """Source: how long the first connection is tried. Both: how long one attempt, handshake included, may take."""
    give_up_s: float = GIVE_UP_S
    """Seconds that a channel may be without connection while the guest runs at the source."""
    switchover_timeout_s: float = SWITCHOVER_TIMEOUT_S
    """The same while the guest is stopped and its source QEMU has not completed."""


@dataclass(frozen=True)
class SealedSecrets:
    """The one-time key and nonce of a sealed move."""

    key: Secret
    nonce: Secret

    def wipe(self) -> None:
        """Overwrite both."""
        self.key.wipe()
        self.nonce.wipe()


def encode_handover(spec: RelaySpec, secret: bytes | bytearray) -> bytes:
    """The frame for a relay; ``secret`` is 40 bytes (key, nonce) for a sealed move, 16 (token) for a plain one."""
    if len(secret) != SECRET_BYTES[spec.spec.plan]:
        raise ValueError("the secret does not fit the plan of the move")
    public = asdict(spec)
    public["spec"] = {k: v.hex() if isinstance(v, bytes) else v for k, v in asdict(spec.spec).items()}
    text = json.dumps(public).encode()
    return _LENGTH.pack(len(text)) + text + secret


def read_sealed(sock: socket.socket) -> tuple[RelaySpec, SealedSecrets]:
    """Receive a sealed move's frame; raises InvalidInput, which never quotes what was received."""
    spec, raw = _read(sock, Plan.SEALED)
    secrets = SealedSecrets(
        Secret(memoryview(raw)[:KEY_BYTES], length=KEY_BYTES), Secret(memoryview(raw)[KEY_BYTES:], length=NONCE_BYTES)
    )
    raw[:] = bytes(len(raw))
    return spec, secrets


def read_plain(sock: socket.socket) -> tuple[RelaySpec, Secret]:
    """Receive a plain move's frame, its token as the secret; raises InvalidInput."""
    spec, raw = _read(sock, Plan.PLAIN)
    token = Secret(raw, length=ROUTE_BYTES)
    raw[:] = bytes(len(raw))
    return spec, token


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``; raises InvalidInput."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput("an address is not of the form HOST:PORT")
    return host, int(port)


def _read(sock: socket.socket, plan: Plan) -> tuple[RelaySpec, bytearray]:
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    if length > _MAX_JSON:
        raise _malformed()
    spec = _parse(bytes(_exactly(sock, length)))
    if spec.spec.plan is not plan:
        raise InvalidInput("the move's plan is not one that this process carries out")
    return spec, _exactly(sock, SECRET_BYTES[plan])


def _exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, have = memoryview(data), 0
    while have < count:
        got = sock.recv_into(view[have:])
        if got == 0:
            raise InvalidInput("the specification ended early")
        have += got
    return data


def _parse(text: bytes) -> RelaySpec:
    try:
        public: dict[str, Any] = json.loads(text)
        inner = public.pop("spec")
        names = ("attempt", "subject", "source", "target")
        attempt, subject, source, target = (bytes.fromhex(inner.pop(name)) for name in names)
        channel = ChannelSpec(attempt, subject, source, target, Plan(inner.pop("plan")), **inner)
        spec = RelaySpec(spec=channel, **public)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _malformed() from None
    if not _is_typed(channel) or not _is_typed(spec):
        raise _malformed()
    if spec.role not in ("source", "target") or not 1024 <= spec.record_bytes <= 1 << 20:
        raise _malformed()
    return spec


def _is_typed(value: ChannelSpec | RelaySpec) -> bool:
    """Whether texts are texts, integers integers, and seconds numbers from 0 on."""
    hints = get_type_hints(type(value))
    for field in fields(value):
        kind, found = hints[field.name], getattr(value, field.name)
        if kind in _JSON_TYPES and type(found) not in _JSON_TYPES[kind]:
            return False
        if kind is float and not found >= 0:  # NaN is not
            return False
    return True


def _malformed() -> InvalidInput:
    return InvalidInput("the specification is malformed", todo="agent and relay must be of matching versions")
