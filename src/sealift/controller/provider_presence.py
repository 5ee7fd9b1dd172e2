"""Whether key providers answer, as far as is known, and when that is news. Pure.

A probe only asks a provider who it is; a question is about a key. A provider may answer the one and fail the other, and
must not be said to come and go each time: who answered probes and failed a question is back when it answers a question.
"""

from __future__ import annotations


class Presence:
    """What was met last at each provider, by name. Each call says whether to tell of it: of going away, or of return.

    A provider is away, or not. While it is, it may be ``mute``: it can be reached, and its answers are worth nothing.
    One that is back may be ``unproven``: all that it answered since is probes.
    """

    def __init__(self) -> None:
        self._away: set[str] = set()
        self._mute: set[str] = set()
        self._unproven: set[str] = set()

    def probe_failed(self, name: str) -> bool:
        """It does not even say who it is: the first probe that it answers again will show that it is back."""
        self._mute.discard(name)
        return self._leaves(name)

    def probe_answered(self, name: str) -> bool:
        """It says who it is. That is no return of one that failed a question otherwise than by not being reached."""
        if name not in self._away or name in self._mute:
            return False
        self._away.discard(name)
        self._unproven.add(name)
        return True

    def question_failed(self, name: str, *, reached: bool) -> bool:
        """A question was not answered; with ``reached`` somebody did say something, and it was no answer."""
        if reached or name in self._unproven:
            self._mute.add(name)
        return self._leaves(name)

    def question_answered(self, name: str) -> bool:
        """A question was answered, if only with a no."""
        was_away = name in self._away
        self.forget(name)
        return was_away

    def forget(self, name: str) -> None:
        """It was removed."""
        for known in (self._away, self._mute, self._unproven):
            known.discard(name)

    def _leaves(self, name: str) -> bool:
        self._unproven.discard(name)
        news = name not in self._away
        self._away.add(name)
        return news
