"""Every promise of the targets, for the kept corpus, for inputs near it, and for a moment of coverage-guided fuzzing.

The long form is ``./dev fuzz``; README.md beside this file says more.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.choices import Choices, altered
from fuzz.make_corpus import seeds
from fuzz.targets import CORPUS, TARGETS, Target

HERE = Path(__file__).parent
NAMES = sorted(TARGETS)
KEPT = {name: {path.name: path.read_bytes() for path in sorted(TARGETS[name].corpus.iterdir())} for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_corpus(name: str) -> None:
    for content in KEPT[name].values():
        TARGETS[name].check(content)


def test_the_named_inputs_are_what_their_maker_makes() -> None:
    named = {t: {n: c for n, c in kept.items() if not n.startswith("found-")} for t, kept in KEPT.items()}
    assert named == seeds()


def test_the_corpus_stays_small_and_has_no_target_that_is_gone() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    contents = [content for kept in KEPT.values() for content in kept.values()]
    assert len(contents) <= 200
    assert sum(map(len, contents)) <= 300 << 10


def _near(target: Target) -> st.SearchStrategy[bytes]:
    """Kept inputs, altered and joined, and now and then anything at all."""
    kept = sorted(KEPT[target.name].values())
    changed = st.builds(lambda a, how: altered(a, Choices(how)), st.sampled_from(kept), st.binary(max_size=6))
    joined = st.builds(lambda a, b, at: a[: at % (len(a) + 1)] + b, changed, changed, st.integers(0, 512))
    return changed | joined | st.binary(max_size=min(256, target.longest))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_near_the_corpus(name: str) -> None:
    target = TARGETS[name]

    # The same inputs each time: new ones are the business of the long form.
    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(_near(target))
    def check(data: bytes) -> None:
        target.check(data)

    check()


def test_a_moment_guided_by_coverage(tmp_path: Path) -> None:
    """Two processes, each with half of the targets and a second for each of them."""
    pytest.importorskip("atheris", reason="there is no atheris for this Python: see pyproject.toml")
    shuffled = random.Random(3).sample(NAMES, len(NAMES))
    runs = [_fuzz(shuffled[half::2], tmp_path / str(half)) for half in (0, 1)]
    try:
        said = [run.communicate(timeout=160)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    for name in NAMES:
        (line,) = [line for each in said for line in each.splitlines() if line.startswith(f"{name} ")]
        assert int(line.split()[1]) > len(KEPT[name])


def _fuzz(names: list[str], cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "run.py"), *names, "--seconds", str(len(names)), "--seed", "1"]
    return subprocess.Popen(
        [*command, "--cache", str(cache)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_a_broken_promise_is_found_and_kept(tmp_path: Path) -> None:
    """The fuzzer itself, on a target that has a fault."""
    pytest.importorskip("atheris", reason="there is no atheris for this Python: see pyproject.toml")
    program = tmp_path / "faulty.py"
    program.write_text(_FAULTY.format(here=str(HERE), tests=str(HERE.parent), corpus=str(tmp_path)))
    (tmp_path / "faulty").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(program), "faulty", "--cache", str(tmp_path), *arguments],
            capture_output=True,
            text=True,
            timeout=160,
        )

    found = run("--seconds", "60", "--seed", "1")
    assert found.returncode == 1
    assert "a promise was broken by: faulty" in found.stdout
    (finding,) = (tmp_path / "findings").iterdir()
    assert "BrokenPromise" in run("--replay", str(finding)).stderr


_FAULTY = """
import sys
from pathlib import Path

sys.path[:0] = [{here!r}, {tests!r}]
import run
from fuzz import targets


class BrokenPromise(Exception):
    pass


def faulty(data: bytes) -> None:
    if len(data) > 1:
        raise BrokenPromise


targets.CORPUS = Path({corpus!r})
run.TARGETS["faulty"] = targets.Target(faulty, 8)
sys.exit(run.main())
"""
