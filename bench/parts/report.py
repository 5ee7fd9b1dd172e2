"""The parts of docs/benchmarks.md that programs write, and its chart.

What is between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` is replaced; everything else is people's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts.chart import Bar, Group, chart
from parts.goals import judge
from parts.measure import Row, side
from parts.routes import ENCRYPTED_PEERS, ROUTES

_GB_PER_S_AT_10_GBIT = 1.25

_VSPHERE = {"qemu-plain": {"source": 0.4, "target": 1.3}, "sealift": {"source": 1.1, "target": 1.6}}
"""Cores at 10 Gbit/s without and with encryption: VMware, "Encrypted vMotion Architecture, Performance and Best
Practices in vSphere 6.5" (2017), figures 7 and 8, read off the charts (about 0.1 core)."""

_GOALS = {1: (2.0, 0.65), 4: (1.3, 1.0)}
"""By channels: at least this many times the throughput, and at most this share of the CPU time, of encrypted peers."""
_PLAIN_GOAL = 0.5
_LINK_GOAL = 0.98

_COLOURS = {"sealift": "#0f766e", "qemu-plain": "#9ca3af"}
_PEER_COLOUR = "#b45309"

_MACHINE = {
    "cpu": "CPU",
    "cores": "cores",
    "memory_mib": "memory, MiB",
    "kernel": "kernel",
    "qemu": "QEMU (TCG)",
    "python": "Python",
    "cryptography": "cryptography",
    "openssl": "OpenSSL within it",
    "ssh": "ssh",
    "stunnel": "stunnel",
    "gnutls": "GnuTLS",
    "aes_256_gcm_seal_gb_per_cpu_s": "AES-256-GCM alone, sealing, GB per CPU-second",
    "aes_256_gcm_open_gb_per_cpu_s": "AES-256-GCM alone, opening, GB per CPU-second",
}


def write_migrations(docs: Path, settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """Put tables into benchmarks.md and the chart into benchmarks.svg; raises ValueError when there are no markers."""
    guests = list(dict.fromkeys(row["name"] for row in rows))
    parts = [_preamble(settings, rows), _machine(settings), "![Throughput and processor time](benchmarks.svg)"]
    for guest in guests:
        parts += [f"### {guest.capitalize()} guest", _migration_table([row for row in rows if row["name"] == guest])]
    parts += ["### Cores per 10 Gbit/s", _cores(rows), "### Goals", _goals(rows)]
    _replace(docs / "benchmarks.md", "migrate", parts)
    (docs / "benchmarks.svg").write_text(_chart(rows, guests[0]))


def write_links(docs: Path, settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """Put the table of shaped links into benchmarks.md; raises ValueError when there are no markers."""
    lines = []
    for row in rows:
        plain = _find(rows, row["name"], "qemu-plain", row["channels"])
        share = row["gb_per_s"] / plain["gb_per_s"] if plain else None
        verdict = "" if row["path"] != "sealift" or share is None else _met(share >= _LINK_GOAL)
        figures = [_number(row["seconds"], 2), _number(row["gb_per_s"] * 8, 2), _number(share, 3), verdict]
        lines.append([row["name"], f"`{row['path']}`", str(row["channels"]), *figures, _number(row["cpu_s_per_gb"], 2)])
    titles = ["link", "path", "channels", "s", "Gbit/s", "of plain", "at least 0.98", "CPU-s per GB"]
    _replace(docs / "benchmarks.md", "link", [_preamble(settings, rows), _markdown(titles, lines, left=2)])


def write_at_rest(docs: Path, settings: dict[str, Any], rows: Sequence[Row]) -> None:
    """Put the tables of encryption at rest into benchmarks.md; raises ValueError when there are no markers."""
    others = [row["others_cores"] for row in rows if row.get("others_cores") is not None]
    meanwhile = f" Everybody else used {min(others):.2f} to {max(others):.2f} cores meanwhile." if others else ""
    preamble = f"Measured on {settings['date']}, image of {settings['size_gib']:g} GiB.{meanwhile}"
    titles = ["", "path", "runs", "s", "GB/s", "CPU-s per GB", "of `qemu-img`"]
    lines = []
    for row in rows:
        figures = [_number(row.get("gb_per_s"), 3), _number(row.get("cpu_s_per_gb"), 2)]
        figures.append(_number(row.get("throughput_ratio"), 2))
        lines.append([row["name"], f"`{row['path']}`", str(row["runs"]), _number(row["seconds"], 3), *figures])
    goals = [[one.goal, one.measured, "" if one.met is None else _met(one.met)] for one in judge(rows)]
    parts = [preamble, _machine(settings), _markdown(titles, lines, left=2)]
    _replace(docs / "benchmarks.md", "atrest", [*parts, _markdown(["goal", "measured", ""], goals, left=3)])


def _preamble(settings: dict[str, Any], rows: Sequence[Row]) -> str:
    counts = sorted({row["runs"] for row in rows})
    runs = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    others = [row["others_cores"] for row in rows]
    cold = ", the target's memory untouched before" if settings.get("cold") else ""
    return (
        f"Measured on {settings['date']}: {settings['guest_mib']} MiB (less 8 KiB) of random memory{cold}, medians of "
        f"{runs} runs. Everybody else on the machine, its kernel's own threads included, used {min(others):.2f} to "
        f"{max(others):.2f} of its {settings['cores']} cores meanwhile (medians by row)."
    )


def _machine(settings: dict[str, Any]) -> str:
    known = [[title, str(settings[key])] for key, title in _MACHINE.items() if key in settings]
    return _markdown(["", ""], known, left=2)


def _migration_table(rows: Sequence[Row]) -> str:
    titles = [
        "path",
        "channels",
        "s",
        "GB/s",
        "CPU-s per GB",
        "before QEMU, source",
        "target",
        "QEMU, source",
        "target",
    ]
    titles += ["downtime, ms", "STOP to RESUME, ms", "peak MiB, source", "target", "QEMU, source", "target", "failed"]
    lines = []
    for row in rows:
        by, peaks = row["cpu_s_per_gb_by"], row["peak_rss_mib_by"]
        places = [(end, qemu) for qemu in (False, True) for end in ("source", "target")]
        lines.append(
            [f"`{row['path']}`", str(row["channels"]), _number(row["seconds"], 2), _number(row["gb_per_s"], 2)]
            + [_number(row["cpu_s_per_gb"], 2)]
            + [_number(side(by, end, qemu=qemu), 2) for end, qemu in places]
            + [_number(row["downtime_ms"], 0), _number(row["stop_to_resume_ms"], 0)]
            + [_number(side(peaks, end, qemu=qemu), 0) for end, qemu in places]
            + [str(row["failed"] or "")]
        )
    return _markdown(titles, lines, left=1)


def _cores(rows: Sequence[Row]) -> str:
    name = rows[0]["name"]
    titles = ["", "channels", "source: ours", "source: vSphere", "target: ours", "target: vSphere"]
    lines = []
    for channels in sorted({row["channels"] for row in rows}):
        both: dict[str, dict[str, float]] = {}
        for path, words in (("qemu-plain", "plain"), ("sealift", "sealed")):
            row = _find(rows, name, path, channels)
            if row is None:
                continue
            both[path] = {end: _cores_at_10_gbit(row, end) for end in ("source", "target")}
            lines.append([words, str(channels), *_side_by_side(both[path], _VSPHERE[path])])
        if len(both) == 2:
            ours, theirs = (
                {end: found["sealift"][end] - found["qemu-plain"][end] for end in ("source", "target")}
                for found in (both, _VSPHERE)
            )
            lines.append(["what sealing adds", str(channels), *_side_by_side(ours, theirs)])
    peers = [row for row in rows if row["name"] == name and row["path"] in ENCRYPTED_PEERS]
    for row in peers:
        ours = {end: _cores_at_10_gbit(row, end) for end in ("source", "target")}
        lines.append([f"`{row['path']}`", str(row["channels"]), *_side_by_side(ours, {})])
    return _markdown(titles, lines, left=1)


def _side_by_side(ours: dict[str, float], theirs: dict[str, float]) -> list[str]:
    return [_number(found.get(end), 2) for end in ("source", "target") for found in (ours, theirs)]


def _cores_at_10_gbit(row: Row, end: str) -> float:
    spent = (side(row["cpu_s_per_gb_by"], end, qemu=qemu) for qemu in (False, True))
    return sum(seconds or 0.0 for seconds in spent) * _GB_PER_S_AT_10_GBIT


def _goals(rows: Sequence[Row]) -> str:
    lines = []
    for ours in (row for row in rows if row["path"] == "sealift" and row["channels"] in _GOALS):
        faster, leaner = _GOALS[ours["channels"]]
        for path in ("qemu-plain", *ENCRYPTED_PEERS):
            theirs = _find(rows, ours["name"], path, ours["channels"])
            if theirs is None:
                continue
            speed = ours["gb_per_s"] / theirs["gb_per_s"]
            spent = ours["cpu_s_per_gb"] / theirs["cpu_s_per_gb"]
            if path == "qemu-plain":
                goals = [_number(speed, 2), f"{_PLAIN_GOAL:g}", _met(speed >= _PLAIN_GOAL), _number(spent, 2), "", ""]
            else:
                goals = [_number(speed, 2), f"{faster:g}", _met(speed >= faster)]
                goals += [_number(spent, 2), f"{leaner:g}", _met(spent <= leaner)]
            lines.append([ours["name"], f"`{path}`", str(ours["channels"]), *goals])
    titles = ["guest", "Sealift against", "channels", "throughput", "at least", "", "CPU time", "at most", ""]
    return _markdown(titles, lines, left=2)


def _chart(rows: Sequence[Row], guest: str) -> str:
    groups = []
    for channels in sorted({row["channels"] for row in rows}):
        bars = []
        for path in ROUTES:
            row = _find(rows, guest, path, channels)
            figures = [row["gb_per_s"], row["cpu_s_per_gb"]] if row else [None, None]
            if any(row["path"] == path for row in rows):
                bars.append(Bar(path, figures, _COLOURS.get(path, _PEER_COLOUR)))
        groups.append(Group(f"{channels} channel{'s' if channels > 1 else ''}", bars))
    panels = ["GB/s, more is better", "CPU-seconds per GB, all processes, less is better"]
    return chart(f"Moving a {guest} guest's random memory", panels, groups)


def _find(rows: Sequence[Row], name: str, path: str, channels: int) -> Row | None:
    wanted = (name, path, channels)
    return next((row for row in rows if (row["name"], row["path"], row["channels"]) == wanted), None)


def _met(met: bool) -> str:
    return "met" if met else "**not met**"


def _number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    rule = ["---" if n < left else "--:" for n in range(len(titles))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *lines))


def _replace(document: Path, name: str, parts: Sequence[str]) -> None:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = document.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{document} has no markers {begin} and {end}")
    between = "\n\n".join([begin, *parts, end])
    document.write_text(re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: between, text, flags=re.DOTALL))
