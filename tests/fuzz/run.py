"""Fuzzing guided by coverage, with atheris: ``./dev fuzz [TARGET...] [--seconds N] [--keep]``.

Every target gets an equal share of the seconds, in a process of its own. It begins with the kept corpus and with what
earlier runs found, which lies in the cache directory. An input that breaks a promise is written to the findings there
and ends its target; replay it with ``python tests/fuzz/run.py TARGET --replay FILE``. ``--keep`` afterwards adds the
found inputs to the kept corpus in which lines of Sealift follow each other as in no kept one. (libFuzzer can reduce a
corpus too, but it starts itself anew for that, which this program cannot be.)
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["sealift", "tomllib"], enable_loader_override=False):
    from fuzz.targets import TARGETS, Target

CACHE = Path(os.environ.get("SEALIFT_CACHE", Path(__file__).parents[2] / ".cache")) / "fuzz"
SECONDS = 600
_SLOWEST_S = 60
_MEMORY_MB = 1024
_KEPT_BYTES = 4096
"""A larger input is not kept."""


def main() -> int:
    """1 when a target found something."""
    options = _options()
    if options.replay:
        for path in options.replay:
            TARGETS[options.targets[0]].check(path.read_bytes())
        return 0
    findings: Path = options.cache / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    broken = []
    for name in options.targets:
        target, found = TARGETS[name], options.cache / "corpus" / name
        found.mkdir(parents=True, exist_ok=True)
        before = set(findings.iterdir())
        seconds = max(1, options.seconds // len(options.targets))
        arguments = [
            f"-max_total_time={seconds}",
            f"-max_len={target.longest}",
            f"-timeout={_SLOWEST_S}",
            f"-rss_limit_mb={_MEMORY_MB}",
            f"-artifact_prefix={findings}/{name}-",
            "-print_final_stats=1",
            f"-seed={options.seed}",
            str(found),
            str(target.corpus),
        ]
        status, said = _in_process(lambda t=target, a=arguments: _fuzz(t, a))
        print(f"{name:20} {_summary(said)}", flush=True)
        if status or set(findings.iterdir()) - before:
            broken.append(name)
            print(said)
        elif options.keep:
            print(f"{'':20} {_keep(target, found)} inputs added to the corpus", flush=True)
    if broken:
        print(f"a promise was broken by: {', '.join(broken)}; the inputs are in {findings}")
    return 1 if broken else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev fuzz", description="Fuzz the parsers of Sealift.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all of them if none")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for all targets together ({SECONDS})")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer's choices; 0: another one each time")
    parser.add_argument("--keep", action="store_true", help="add what reaches something new to the kept corpus")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="run these inputs through one target")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where findings and found inputs are written")
    options = parser.parse_args()
    options.targets = options.targets or list(TARGETS)
    if unknown := sorted(set(options.targets) - set(TARGETS)):
        parser.error(f"no such target: {', '.join(unknown)}; there are: {', '.join(TARGETS)}")
    return options


def _fuzz(target: Target, arguments: list[str]) -> NoReturn:
    atheris.Setup([sys.argv[0], *arguments], target.check)
    atheris.Fuzz()
    raise AssertionError("libFuzzer ends the process")


def _in_process(run: Callable[[], NoReturn]) -> tuple[int, str]:
    """Run what never returns in a child; its status and what it said."""
    with tempfile.TemporaryFile() as out:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            run()  # what it raises ends this process the usual way, on which libFuzzer writes the input down
        _, status = os.waitpid(child, 0)
        out.seek(0)
        return status, out.read().decode(errors="replace")


def _summary(said: str) -> str:
    """Executions, rate, and how far coverage came from where the corpus had it."""
    cover = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said)
    started = re.findall(r"INITED cov: (\d+) ft: (\d+) corp: (\d+)", said) or cover[:1]
    executed = re.findall(r"number_of_executed_units: *(\d+)", said) or re.findall(r"^#(\d+)", said, re.MULTILINE)
    if not cover or not executed:
        return "did not start"
    first, last = started[0], cover[-1]
    return (
        f"{int(executed[-1]):>9} executions; coverage {first[0]} -> {last[0]} edges, {first[1]} -> {last[1]} features; "
        f"{first[2]} -> {last[2]} inputs"
    )


def _keep(target: Target, found: Path) -> int:
    """Add the fewest and shortest found inputs that reach what the kept corpus does not; how many those are."""
    reached = set().union(*(_steps(target, path.read_bytes()) for path in target.corpus.iterdir()))
    new = {path.read_bytes() for path in found.iterdir() if path.stat().st_size <= _KEPT_BYTES}
    gains = {data: _steps(target, data) - reached for data in new}
    kept = 0
    while any(gains.values()):
        best = max(gains, key=lambda data: (len(gains[data]), -len(data), data))
        (target.corpus / f"found-{hashlib.sha256(best).hexdigest()[:8]}").write_bytes(best)
        reached, kept = gains.pop(best), kept + 1
        gains = {data: steps - reached for data, steps in gains.items()}
    return kept


def _steps(target: Target, data: bytes) -> set[tuple[str, int, int]]:
    """Which lines of Sealift followed which while an input was run."""
    steps: set[tuple[str, int, int]] = set()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if "/sealift/" not in frame.f_code.co_filename:
            return None
        steps.add((frame.f_code.co_filename, last.get(frame, 0), frame.f_lineno))
        last[frame] = frame.f_lineno
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        target.check(data)
    finally:
        sys.settrace(before)
    return steps


if __name__ == "__main__":
    sys.exit(main())
