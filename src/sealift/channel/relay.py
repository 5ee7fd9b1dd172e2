"""The relay of a sealed move, source or target: holds the one-time key and the sockets, and nothing else."""

from __future__ import annotations

import os
import socket
from typing import Any

from sealift.channel.carrier import Carrier
from sealift.channel.noise import Initiator, Responder
from sealift.channel.protocol import KEY_BYTES, Preface
from sealift.channel.relay_control import EventList
from sealift.channel.relay_ends import Accept, SourceEnd, TargetEnd
from sealift.channel.relay_move import Move
from sealift.channel.relay_spec import read_sealed
from sealift.channel.sealed_wire import Handshaker
from sealift.channel.wire import Wire
from sealift.secret import Secret

CIPHER = "AES-256-GCM"


def rehearse() -> None:
    """Go through a handshake with keys that are thrown away, both ends of it.

    What the cryptographic library sets up when it is first used takes some 15 ms. A relay that waits for its move has
    done that before.
    """
    key = Secret(os.urandom(KEY_BYTES), length=KEY_BYTES)
    initiator, responder = Initiator(key, b"", os.urandom(KEY_BYTES)), Responder(key, b"", os.urandom(KEY_BYTES))
    responder.message1(initiator.message1())
    answer, keys = responder.message2()
    for made in (keys, initiator.message2(answer)):
        made.initiator_to_responder.wipe()
        made.responder_to_initiator.wipe()
    key.wipe()


def open_relay(handover: socket.socket, events: EventList) -> tuple[Move, SourceEnd | TargetEnd]:
    """Receive the specification and bind everything; nothing is connected or accepted before ``start``.

    Raises InvalidInput, LocalPeerRefused, OSError.
    """
    spec, secrets = read_sealed(handover)
    move = Move(spec, events, cipher=CIPHER, wipe=secrets.wipe)
    source = spec.role == "source"
    shaker = Handshaker(spec.spec, secrets, initiator=source, record_bytes=spec.record_bytes)

    def join(sock: socket.socket, channel: int, epoch: int, carrier: Carrier[Any], deadline: float) -> Wire:
        return shaker.initiate(sock, spec.spec.preface(channel, epoch), carrier, deadline)

    def admit(sock: socket.socket, preface: Preface, deadline: float) -> Accept:
        return shaker.respond(sock, preface, deadline)

    def check(preface: Preface, sock: socket.socket) -> None:
        spec.spec.admit(preface)

    return move, SourceEnd(move, join) if source else TargetEnd(move, admit, check=check)
