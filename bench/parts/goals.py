"""The goals of encryption at rest, and what rows of bench/parts/at_rest.py say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parts.measure import Row

RATIO_GOAL, RATIO_GOAL_GIB = 0.8, 10
REKEY_GOAL_S, REKEY_GOAL_VMS = 10.0, 100
START_GOAL_MS = 300.0
START, START_FETCHED = "start", "start, keys fetched"
"""Paths of rows: with the keys at the host, and with a host whose agent has just been restarted."""

_STARTS = {
    START: "start of an encrypted VM",
    START_FETCHED: "the same on a host that has lost its keys, so that they come from the key server first",
}


@dataclass(frozen=True)
class Judged:
    """A goal, what was measured, and whether that meets it; None when it was not measured at its full size."""

    goal: str
    measured: str
    met: bool | None


def judge(rows: Sequence[Row]) -> list[Judged]:
    """What of the goals was met."""
    found = []
    for line in rows:
        if "throughput_ratio" in line:
            ratio = line["throughput_ratio"]
            image = f"a full image of {RATIO_GOAL_GIB:g} GiB"
            goal = f"{line['path']}, {image}: at least {RATIO_GOAL:g} of the throughput of `qemu-img convert`"
            met = ratio >= RATIO_GOAL if line["gib"] >= RATIO_GOAL_GIB else None
            found.append(Judged(goal, f"{ratio:.2f} with {line['gib']:g} GiB", met))
        if "vms" in line:
            goal = f"a new key for {REKEY_GOAL_VMS} VMs in one command: under {REKEY_GOAL_S:g} s"
            met = line["seconds"] < REKEY_GOAL_S if line["vms"] >= REKEY_GOAL_VMS else None
            found.append(Judged(goal, f"{line['seconds']:.2f} s for {line['vms']}", met))
    for path, what in _STARTS.items():
        starts = {line["name"]: line["seconds"] for line in rows if line["path"] == path}
        if starts:
            more = (starts["encrypted"] - starts["plain"]) * 1000
            goal = f"{what}: at most {START_GOAL_MS:g} ms slower than of a plain one"
            found.append(Judged(goal, f"{more:.0f} ms", more <= START_GOAL_MS))
    return found
