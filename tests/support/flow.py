"""A channel in use: data goes both ways all the time and every byte is looked at. Attacks are made beside it."""

from __future__ import annotations

import os
import socket
import threading

from support.relays import PATIENCE, Pair, exactly

_CHUNK = 32 << 10
_ANSWER = 1 << 10
_REST_S = 0.005


class Flow:
    """Use it in a ``with`` block, whose end fails if a byte was wrong, or a relay saw as much as an interruption."""

    def __init__(self, pair: Pair, *, interruptions: bool = False) -> None:
        """Takes the pair's next channel. ``interruptions``: other channels of the move may have them."""
        self._pair = pair
        self._near, self._far = pair.connect()
        for sock in (self._near, self._far):
            sock.settimeout(3 * PATIENCE)
        self._others_may_break = interruptions
        self._changed = threading.Condition()
        self._rounds = 0
        self._stopping = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Flow:
        self._thread.start()
        self.goes_on()
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            if kind is None:
                self.goes_on()
        finally:
            self._stopping.set()
            self._thread.join(4 * PATIENCE)
        if kind is None:
            self._assert_undisturbed()

    def goes_on(self, rounds: int = 3) -> None:
        """Return when data went through and came back several times more."""
        with self._changed:
            until = self._rounds + rounds
            self._changed.wait_for(lambda: self._rounds >= until or self._failed is not None, 3 * PATIENCE)
            if self._failed is not None:
                raise AssertionError("the live channel was disturbed") from self._failed
            assert self._rounds >= until, "nothing goes through the live channel any more"

    def _run(self) -> None:
        try:
            while not self._stopping.wait(_REST_S):
                self._round(self._near, self._far, _CHUNK)
                self._round(self._far, self._near, _ANSWER)
                with self._changed:
                    self._rounds += 1
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    @staticmethod
    def _round(giver: socket.socket, taker: socket.socket, count: int) -> None:
        data = os.urandom(count)
        giver.sendall(data)
        assert exactly(taker, count) == data

    def _assert_undisturbed(self) -> None:
        pair = self._pair
        seen = len([e for e in pair.target.events() if e["type"] == "message"])
        pair.source.ask("send", message={"type": "COMMIT"})
        assert pair.target.event("message", nth=seen + 1)["message"] == {"type": "COMMIT"}
        for relay in (pair.source, pair.target):
            kinds = {e["type"] for e in relay.events()}
            assert "broken" not in kinds
            if not self._others_may_break:
                assert not kinds & {"interrupted", "resumed"}
                assert relay.status()["interrupted"] == {}
