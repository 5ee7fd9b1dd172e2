"""Sizes, rates and durations on the command line."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.cli import quantities
from sealift.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000", 1000),
        ("2G", 2 << 30),
        ("1.5GiB/s", 3 << 29),
        (" 800 MiB ", 800 << 20),
        ("4K", 4096),
        ("1T", 1 << 40),
        ("10Gbit", 1_250_000_000),
        ("8bit", 1),
        ("100Mbit/s", 12_500_000),
    ],
)
def test_a_rate_is_read(text: str, expected: int) -> None:
    assert quantities.parse_rate(text) == expected


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "2GB", "2g", "1e9", "0x10", "1.G", "2 G B", "1,5G", "nan", "9" * 16, "2G/h"]
)
def test_a_bad_rate_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        quantities.parse_rate(text)
    assert "2G" in caught.value.todo


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300ms", 300), ("1.5s", 1500), ("2min", 120_000), ("2m", 120_000), ("1h", 3_600_000), ("0.6ms", 1)],
)
def test_a_duration_is_read(text: str, expected: int) -> None:
    assert quantities.parse_duration_ms(text) == expected


@pytest.mark.parametrize("text", ["", "0ms", "0.4ms", "300", "1d", "-1s", "1 s s", "ms"])
def test_a_bad_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        quantities.parse_duration_ms(text)


@given(st.text(max_size=12))
def test_whatever_is_typed_is_read_or_refused(text: str) -> None:
    for parse in (quantities.parse_rate, quantities.parse_duration_ms):
        with contextlib.suppress(InvalidInput):
            assert parse(text) >= 0


@given(st.integers(0, 1 << 55))
def test_a_shown_size_is_short_and_close_to_the_truth(count: int) -> None:
    shown = quantities.size(count)
    assert len(shown) <= 8
    if shown.endswith("PiB"):
        return  # nothing moves at such a rate
    assert quantities.parse_rate(re.sub(" B$", "", shown)) == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 ms"), (0.085, "85 ms"), (0.9996, "1.0 s"), (8.44, "8.4 s"), (59.96, "1 min 00 s"), (125, "2 min 05 s")],
)
def test_a_duration_is_shown(seconds: float, expected: str) -> None:
    assert quantities.duration(seconds) == expected


def test_hours_are_shown() -> None:
    assert quantities.duration(3 * 3600 + 20 * 60 + 40) == "3 h 20 min"
