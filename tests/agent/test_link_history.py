"""Outages of a link, from the interruptions of its channels."""

from __future__ import annotations

from sealift.agent.link_history import LinkHistory
from sealift.domain.move import OUTAGES_TOLD, LinkDown, Outage


def test_a_link_is_down_until_its_last_channel_is_back() -> None:
    link = LinkHistory()
    link.interrupt(0, "peer_silent", "nothing was heard")
    link.interrupt(2, "stream_truncated", "cut")
    link.resume(2, 40)
    assert link.report({}).outages == (Outage("peer_silent", "nothing was heard"),)
    link.resume(0, 70)
    link.interrupt(1, "record_forged", "a tag")
    link.resume(1, 5)
    report = link.report({"reconnects": 3})
    assert report.outages == (Outage("peer_silent", "nothing was heard", 70), Outage("record_forged", "a tag", 5))
    assert (report.count, report.longest_ms, report.reconnects, report.down) == (2, 70, 3, None)


def test_what_the_relay_says_of_this_moment_is_passed_on_unless_it_has_given_up() -> None:
    link = LinkHistory()
    link.interrupt(1, "stream_truncated", "cut")
    now = {"down_s": 12.0, "left_s": 48.0, "slug": "stream_truncated", "what": "cut", "more": "of a newer relay"}
    assert link.report({"outage": now}).down == LinkDown(12.0, 48.0, "stream_truncated", "cut")
    assert link.report({"outage": now, "broken": {"slug": "stream_truncated", "what": "cut"}}).down is None


def test_a_flood_of_outages_is_only_counted() -> None:
    link = LinkHistory()
    for _ in range(OUTAGES_TOLD + 10):
        link.interrupt(1, "stream_truncated", "cut")
        link.resume(1, 1)
    link.interrupt(1, "stream_truncated", "cut")
    link.resume(1, 900)
    report = link.report({})
    assert len(report.outages) == OUTAGES_TOLD
    assert all(outage.lasted_ms == 1 for outage in report.outages)
    assert (report.count, report.longest_ms) == (OUTAGES_TOLD + 11, 900)


def test_a_resumption_that_is_not_expected_changes_nothing() -> None:
    """The relay stops telling of interruptions at some number, and then of resumptions a little later."""
    link = LinkHistory()
    link.resume(1, 5)
    assert link.report({}) == LinkHistory().report({})
