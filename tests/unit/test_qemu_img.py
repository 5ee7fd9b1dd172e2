"""The parts of copying images that need no program: progress as it is printed, and where a sample looks."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sealift.hypervisor.images import MIB, SAMPLE_RANGES, sample
from sealift.hypervisor.qemu_img import parse_progress


@given(st.lists(st.integers(0, 10000), max_size=8), st.data())
def test_progress_is_read_in_whatever_pieces_it_comes(steps: list[int], data: st.DataObject) -> None:
    text = b"".join(b"    (%.2f/100%%)\r" % (step / 100) for step in steps)
    heard, rest = [], b""
    while text:
        cut = data.draw(st.integers(1, len(text)))
        percent, rest = parse_progress(rest + text[:cut])
        heard += [percent] if percent is not None else []
        text = text[cut:]
    printed = iter([step / 100 for step in steps])
    assert all(percent in printed for percent in heard), "in their order, some left out"
    assert heard[-1:] == [step / 100 for step in steps[-1:]]


@given(st.binary(max_size=200))
def test_other_output_is_no_progress(text: bytes) -> None:
    percent, rest = parse_progress(text)
    assert percent is None or b"/100%)" in text
    assert text.endswith(rest)
    assert len(rest) <= 64


@given(st.integers(1, 1 << 50), st.integers())
def test_a_sample_lies_within_the_disk(sectors: int, seed: int) -> None:
    size = min(sectors, 1 << 40) * 512
    ranges = sample(size, random.Random(seed).randrange)
    assert ranges == sorted(ranges)
    assert ranges[0][0] == 0
    assert sum(ranges[-1]) == size
    assert len(ranges) <= SAMPLE_RANGES + 2
    for start, length in ranges:
        assert 0 <= start < start + length <= size
        assert start % 512 == length % 512 == 0
    if size <= (SAMPLE_RANGES + 2) * MIB:
        assert sum(length for _, length in ranges) == size, "a small disk is read as a whole"
