"""Cuts in the link between two hosts while real guests move to and fro: is a guest ever lost, or there twice?

    python bench/faults.py [--cuts N] [--minutes M] [--seed S] [--json FILE]
    python bench/faults.py --steps [--minutes M] [--seed S] [--json FILE]

Two hosts with real agents, relays and QEMUs on this machine; between their migration ports a forwarder that breaks by
chance: at once or exactly at a step, in every phase, with one channel and with four. `--seed` repeats a session's
choices (what the machine makes of the same moment may differ). `--steps` takes each kind of fault at each step of a
move instead, 120 moves. After every move one copy of the guest must be there, find nothing wrong in a fresh check of
all its memory, and miss no tick; else the session ends there with an error. Handshakes cut short are counted apart.

The guest, the forwarder and these judgements are those of the end-to-end tests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from parts.measure import Row, machine, write_json

from sealift.agent.commitlog import Mark
from sealift.demo.guest import prepare
from sealift.errors import SealiftError
from support.faults import (
    KINDS,
    POINTS,
    CutCluster,
    Kind,
    Point,
    at_mark,
    cut_cluster,
    freeze,
    running_copies,
    settled,
    strike,
)
from support.guest import CACHE
from support.running_guest import SLOW, Guest
from support.step_cutter import SETUP_POINTS, StepCutter

_CHANNELS = (1, 4)
_BANDWIDTHS = ("0", "12M", "25M")
_MOST_CUTS = 8
_RESET_EVERY = 1 << 20
_LASTING = {"down": (0.1, 4.0), "freeze source": (0.1, 2.9), "freeze target": (0.1, 2.9), "swallow": (6.5, 8.0)}
"""Seconds. The forwarder ends TCP itself, so nobody repeats what it swallows: like a broken proxy, until the silence is
noticed, which takes 5 s. Shorter holes are TCP's own business; a test has packets dropped."""
_STEP_SHARE = 0.35
"""How many of the moves' first cuts strike at a step rather than at any moment."""


class Session:
    """Figures of one session, by number of channels."""

    def __init__(self) -> None:
        self.figures: dict[int, Counter[str]] = {channels: Counter() for channels in _CHANNELS}
        self.kinds: dict[int, Counter[str]] = {channels: Counter() for channels in _CHANNELS}
        self.began = time.monotonic()

    @property
    def cuts(self) -> int:
        """Faults that struck a move so far."""
        return sum(figures["cuts"] for figures in self.figures.values())

    def rows(self, name: str) -> list[Row]:
        """The figures as a report has them."""
        names = (
            *("migrations", "completed", "failed_safe", "cuts", "cut_handshakes", "reconnects"),
            *("lost", "duplicated", "unsettled", "outcome_unknown"),
        )
        return [
            {"name": name, "path": "sealift", "channels": channels}
            | {key: figures[key] for key in names}
            | {"cuts_by_kind": dict(sorted(self.kinds[channels].items()))}
            for channels, figures in self.figures.items()
        ]


class Moves:
    """A guest that moves to and fro over the breaking link."""

    def __init__(self, site: CutCluster, guest: Guest, session: Session) -> None:
        self._site, self._guest, self._session = site, guest, session
        self.source, self.target = guest.host, guest.other()
        self.channels = 1

    @property
    def cutter(self) -> StepCutter:
        """The link towards the target of the next move."""
        return self._site.cutters[self.target.name]

    def under_way(self) -> bool:
        """Whether a relay of a move is there to be hurt."""
        return any(self.source.run.glob("moves/*/relay.sock"))

    def cut(self, kind: str, act: Callable[[], None]) -> None:
        """Do something to the link, if a move is under way, and count it."""
        if self.under_way():
            act()
            self._session.figures[self.channels]["cuts"] += 1
            self._session.kinds[self.channels][kind] += 1

    @contextlib.contextmanager
    def at(self, point: Point, kind: Kind, seconds: float | None = None) -> Iterator[None]:
        """Within the block: let a fault strike when the move comes to a point."""

        def act() -> None:
            self.cut(kind, lambda: strike(kind, self.cutter, self.source, self.target, seconds=seconds))

        if point == "precopy":
            timer = threading.Timer(2.0, act)
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
        elif point in ("LET_GO", "COMMITTED"):
            host = self.source if point == "LET_GO" else self.target
            with at_mark(host, self._guest, Mark[point], act):
                yield
        else:
            assert not isinstance(point, str)
            self.cutter.cut_at(*point, act)
            yield

    def one(self, channels: int, bandwidth: str, meanwhile: Callable[[threading.Event], None] | None = None) -> None:
        """Move the guest once; ``meanwhile`` runs beside it, until its event is set. Raises AssertionError."""
        guest, figures = self._guest, self._session.figures[channels]
        lost_before = guest.console.ticks.lost()
        over = threading.Event()
        aside = threading.Thread(target=meanwhile or (lambda _: None), args=(over,), daemon=True)
        wish = ("migrate", guest.name, "--to", self.target.name, "--detach", "--channels", str(channels))
        figures["migrations"] += 1
        ident = guest.cluster.ask(*wish, "--bandwidth", bandwidth)["id"]
        aside.start()
        try:
            record = self._judged(ident, lost_before)
        finally:
            over.set()
            aside.join()
            self._site.calm()
        figures["completed" if record["state"] == "done" else "failed_safe"] += 1
        figures["reconnects"] += record["reconnects"]
        told = f": {record['error']}" if record["error"] else ""
        progress(f"move {figures['migrations']} with {channels} channels: {record['state']}{told}")
        if record["state"] == "done":
            self.source, self.target = self.target, self.source

    def _judged(self, ident: str, lost_before: int) -> dict[str, Any]:
        guest, figures = self._guest, self._session.figures[self.channels]
        try:
            record = settled(guest, ident, self.source, self.target, lost_before=lost_before)
        except BaseException:
            record, copies = guest.record(ident), guest.copies()
            run = running_copies(guest)
            figures["duplicated" if len(run) > 1 else "unsettled" if run else "lost"] += 1
            progress(f"NOT AS IT MUST BE: {record}; copies at {copies}, running at {run}")
            raise
        figures["outcome_unknown"] += any(phase["state"] == "outcome_unknown" for phase in record["phases"])
        return record


def by_chance(moves: Moves, session: Session, dice: random.Random, *, cuts: int, until: float) -> None:
    """Moves with random faults, until there were so many, or it is so late (monotonic seconds)."""
    while session.cuts < cuts and time.monotonic() < until:
        channels, bandwidth = dice.choice(_CHANNELS), dice.choice(_BANDWIDTHS)
        moves.channels = channels
        plan = [_drawn(moves, dice) for _ in range(dice.randint(1, _MOST_CUTS))]

        def strike_them(over: threading.Event, plan: list[tuple[float, str, float, Callable[[], None]]] = plan) -> None:
            for wait, kind, lasts, act in plan:
                if over.wait(wait):
                    return
                moves.cut(kind, act)
                over.wait(lasts)

        with contextlib.ExitStack() as stack:
            if dice.random() < _STEP_SHARE:
                point, kind = dice.choice(POINTS), dice.choice(KINDS)
                stack.enter_context(moves.at(point, kind))
            cutter = moves.cutter
            cutter.cut_setup(dice.randint(1, SETUP_POINTS) if dice.random() < _STEP_SHARE else 0)
            moves.one(channels, bandwidth, strike_them)
            session.figures[channels]["cut_handshakes"] += cutter.cut_in_setup.total()


def _drawn(moves: Moves, dice: random.Random) -> tuple[float, str, float, Callable[[], None]]:
    """One fault at any moment: seconds before it, its kind, how long it lasts, and how to do it."""
    wait = dice.choice((dice.uniform(0.0, 0.3), dice.uniform(0.0, 1.5)))
    kind = dice.choice(("reset", "half-open", "down", "swallow", "freeze source", "freeze target", "flip"))
    seconds = dice.uniform(*_LASTING.get(kind, (0.0, 0.0)))

    def act() -> None:
        match kind:
            case "swallow":
                strike("hole", moves.cutter, moves.source, moves.target, seconds=seconds)
            case "freeze source":
                freeze(moves.source, seconds)
            case "freeze target":
                freeze(moves.target, seconds)
            case "flip":
                moves.cutter.flip()
            case "reset" | "half-open" | "down":
                strike(kind, moves.cutter, moves.source, moves.target, seconds=seconds)

    return wait, kind, seconds, act


def step_by_step(moves: Moves, dice: random.Random, *, until: float) -> int:
    """Every kind of fault at every step, in any order, until it is so late; how many are left."""
    cases = list(itertools.product(_CHANNELS, POINTS, KINDS))
    dice.shuffle(cases)
    while cases and time.monotonic() < until:
        moves.channels, point, kind = cases.pop()
        progress(f"{kind} at {point if isinstance(point, str) else ' '.join(reversed(point))}")
        with moves.at(point, kind):
            moves.one(moves.channels, SLOW if point == "precopy" else "0")
    return len(cases)


def progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> int:
    session = Session()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    name = f"each kind at each step, order of seed {seed}" if options.steps else f"by chance, seed {seed}"
    print(f"faults {name}", flush=True)
    image = prepare(CACHE)
    failed = False
    with cut_cluster(reset_every=_RESET_EVERY) as site:
        guest = Guest(site.cluster, image, "bench", host="a", filled=24)
        try:
            guest.make_run()
            moves = Moves(site, guest, session)
            until, dice = time.monotonic() + options.minutes * 60, random.Random(seed)
            if options.steps:
                progress(f"{step_by_step(moves, dice, until=until)} cases were left out")
            else:
                by_chance(moves, session, dice, cuts=options.cuts, until=until)
        except (AssertionError, TimeoutError, SealiftError) as error:
            progress(f"ended by {type(error).__name__}: {error}")
            for host in site.cluster.hosts.values():
                progress(f"the last words of the agent of {host.name}:\n{host.log.read_text()[-8000:]}")
            failed = True
        finally:
            guest.close()
    rows = session.rows(name)
    for line in rows:
        print(", ".join(f"{key}: {value}" for key, value in line.items()))
    print(f"{session.cuts} cuts in {time.monotonic() - session.began:.0f} s")
    if options.json:
        write_json(options.json, asyncio.run(machine()), rows)
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=200, help="end after so many (200)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further move after so long (60)")
    parser.add_argument("--seed", type=int, help="repeat the choices of another session")
    parser.add_argument("--steps", action="store_true", help="each kind at each step, only the order by chance")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    return measure(options)


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave through every clean-up: what was started is ended."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
