"""What is said of a conversion: how fast it goes, its lines, its end. Values in, text out."""

import datetime
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.api.encryption import Conversion, ConversionFinding
from sealift.cli import converting
from sealift.cli.output import Output
from sealift.errors import ConversionCancelled, ConversionFailed, DatastoreFull, PlanRefused

BEGAN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
GIB = 1 << 30


def a_conversion(**fields: Any) -> Conversion:
    """VM web on host a, being encrypted."""
    facts: dict[str, Any] = {
        "id": UUID(int=7 << 96),
        "vm": UUID(int=1),
        "vm_name": "web",
        "host": "a",
        "kind": "encrypt",
        "deep": False,
        "state": "copying",
        "finished": False,
        "provider": "safe",
        "key_id": "new-key",
        "created_at": BEGAN,
    }
    return Conversion.model_validate(facts | fields)


def ended(state: str, **fields: Any) -> Conversion:
    return a_conversion(state=state, finished=True, finished_at=BEGAN + datetime.timedelta(seconds=20), **fields)


def test_the_rate_is_that_of_the_last_ten_seconds() -> None:
    pace = converting.Pace()
    assert pace.look("copying", 0, 100.0) == 0
    assert pace.look("copying", 500, 105.0) == 100
    assert pace.look("copying", 1000, 110.0) == 100
    assert pace.look("copying", 1000, 120.0) == 0, "it stands still"
    assert pace.look("verifying", 1000, 121.0) == 0, "another state begins anew"
    assert pace.look("verifying", 3000, 122.0) == 2000
    assert pace.look("verifying", 10, 123.0) == 0, "and so does one that counts from the beginning"


@given(st.lists(st.tuples(st.sampled_from(["copying", "verifying"]), st.integers(0, 1 << 50), st.floats(0, 30))))
def test_a_rate_is_never_negative_whatever_is_seen(looks: list[tuple[str, int, float]]) -> None:
    pace, at = converting.Pace(), 0.0
    for state, done, later in looks:
        at += later
        assert pace.look(state, done, at) >= 0


def test_the_figures_say_bytes_rate_and_time_left() -> None:
    half = a_conversion(done_bytes=5 * GIB, total_bytes=10 * GIB)
    assert converting.figures_of(half, GIB / 4) == "5.00 GiB of 10.0 GiB, 256 MiB/s, 20.0 s left"
    assert converting.figures_of(half, 0) == "5.00 GiB of 10.0 GiB"
    assert converting.figures_of(a_conversion(), 0) == ""
    assert converting.figures_of(a_conversion(total_bytes=GIB), 0) == "", "a header is made, nothing is copied yet"


def test_without_a_terminal_each_state_and_each_tenth_gets_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    times: Iterator[float] = iter([0.0, 0.0, 1.0, 1.1, 2.0, 3.0, 4.0])
    lines = converting.ConversionLines(lambda: next(times))
    for done in (0, 1 * GIB, 1 * GIB, 2 * GIB):
        lines.show(a_conversion(done_bytes=done, total_bytes=4 * GIB))
    lines.show(a_conversion(state="verifying", total_bytes=4 * GIB))
    lines.show(ended("done", done_bytes=4 * GIB, total_bytes=4 * GIB))
    assert capsys.readouterr().out.splitlines() == [
        "     0.0 s  making the new image",
        "     1.0 s  copying  1.00 GiB of 4.00 GiB, 1.00 GiB/s, 3.0 s left",
        "     2.0 s  copying  2.00 GiB of 4.00 GiB, 1.00 GiB/s, 2.0 s left",
        "     3.0 s  verifying",
        "     4.0 s  done",
    ]


def test_a_vm_that_was_encrypted_is_said_to_be_with_its_key() -> None:
    first, second = converting.conclusion(ended("done", done_bytes=GIB, total_bytes=GIB))
    assert first == "VM web on a is encrypted under key new-key of key provider safe, 1.00 GiB in 20.0 s."
    assert "always moved sealed" in second


def test_after_decryption_it_is_said_that_the_setting_stays() -> None:
    text = " ".join(converting.conclusion(ended("done", kind="decrypt", provider="", key_id="")))
    assert "in clear" in text
    assert "sealift vm set web --migrate-encryption" in text


@pytest.mark.parametrize("deep", [False, True])
def test_after_a_rekey_the_old_key_is_named_with_what_it_still_opens(deep: bool) -> None:
    one = ended("done", kind="rekey", deep=deep, old_provider="attic", old_key_id="old-key")
    text = " ".join(converting.conclusion(one))
    assert "opened by key old-key of key provider attic" in text
    assert ("old images" in text) is deep
    assert converting.kind_of(one) == ("deep rekey" if deep else "rekey")
    assert converting.kind_of(ended("done", deep=True)) == "encrypt"


def test_what_the_plan_warned_of_is_said_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    remains = ConversionFinding(severity="warning", text="what was in clear may remain", todo="erase the free space")
    converting.tell(Output(), ended("done", findings=[remains]))
    out = capsys.readouterr().out
    assert "warning: what was in clear may remain\n    -> erase the free space" in out


def test_each_end_but_done_is_its_own_error() -> None:
    converting.check(ended("done"))
    with pytest.raises(ConversionCancelled, match=r"VM web on a was not encrypted: .*old images are in place") as again:
        converting.check(ended("cancelled"))
    assert again.value.todo == "run `sealift vm encrypt web` again"
    with pytest.raises(ConversionCancelled, match=r"VM web on a was not rekeyed: ") as again:
        converting.check(ended("cancelled", kind="rekey", deep=True))
    assert again.value.todo == "run `sealift vm rekey web --deep` again"
    with pytest.raises(ConversionCancelled, match=r"VM web on a was not created: .*nothing of it is left") as again:
        converting.check(ended("cancelled"), creating=True)
    assert again.value.todo == "run the same `sealift vm create` again"
    with pytest.raises(DatastoreFull, match="VM web on a was not rekeyed: no room") as full:
        converting.check(ended("failed", kind="rekey", error_slug="datastore_full", error="no room", todo="make room"))
    assert full.value.todo == "make room"
    with pytest.raises(ConversionFailed, match="did not say why") as silent:
        converting.check(ended("failed"))
    assert silent.value.todo == "see `sealift conversion show 00000007`"
    with pytest.raises(PlanRefused, match="was not decrypted: it runs"):
        converting.check(ended("refused", kind="decrypt", error="it runs"))


def test_a_dry_run_says_what_would_be_done_or_is_the_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    converting.show_plan(Output(), ended("planned", total_bytes=GIB))
    assert "It would be encrypted with a new key of key provider safe, 1.00 GiB to copy." in capsys.readouterr().out
    error = ConversionFinding(severity="error", text="a disk has snapshots", todo="delete them")
    with pytest.raises(PlanRefused, match="VM web would not be encrypted: a disk has snapshots"):
        converting.show_plan(Output(), ended("refused", findings=[error], error=error.text))
    assert "error: a disk has snapshots\n    -> delete them" in capsys.readouterr().out
