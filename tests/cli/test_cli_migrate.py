"""`sealift migrate` and `sealift migration`, against a real controller whose hosts play what a test wrote."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles.agent import line, straight_source, straight_target
from sealift.api import schemas
from sealift.api.schemas import Migration
from sealift.cli import watching
from sealift.domain.move import LinkDown, LinkReport, MoveOrder, MoveState, Outage, Progress
from support.command_line import CommandLine
from support.deployment import Deployment, a_deployment
from support.terminal import terminal

VM = 'name = "web"\nvcpus = 2\nmemory = "512MiB"\n'
COPYING = Progress(total_bytes=1 << 30, remaining_bytes=1 << 29, transferred_bytes=3 << 28, rate=100e6, passes=1)


@pytest.fixture
def deployment(tmp_path: Path, sealift: CommandLine) -> Iterator[Deployment]:
    """Somebody is logged in to it, and VM web runs on host a."""
    with a_deployment(tmp_path) as made:
        assert sealift("login", made.url, "--token", "-", stdin=made.token).exit_code == 0
        assert sealift("vm", "create", "-", "--host", "a", stdin=VM).exit_code == 0
        sealift.says("vm", "start", "web")
        yield made


def endless(order: MoveOrder) -> list[dict[str, object]]:
    """A source that copies until it is told to stop."""
    return [line(MoveState.PREPARING), line(MoveState.PRECOPY, progress=COPYING)]


def waiting(order: MoveOrder) -> list[dict[str, object]]:
    """A target to which nothing complete has come yet."""
    return [line(MoveState.WAITING)]


def copy_on(deployment: Deployment) -> None:
    """Have moves copy until they are told to stop."""
    deployment.a.source_script, deployment.b.target_script = endless, waiting


def broken(order: MoveOrder) -> list[dict[str, object]]:
    """A source whose link falls silent."""
    return [
        line(MoveState.PREPARING),
        line(MoveState.PRECOPY, progress=COPYING),
        line(MoveState.FAILED, error_slug="peer_silent", error="nothing was heard from the target"),
    ]


def go_well(deployment: Deployment) -> None:
    """Have the move that copies come to a good end."""
    (there,), (here,) = deployment.b.moves.values(), deployment.a.moves.values()
    there.script, here.script = straight_target(there.order)[4:], straight_source(here.order)[3:]


def test_a_sealed_move_ends_with_one_line_that_says_so(deployment: Deployment, sealift: CommandLine) -> None:
    result = sealift("migrate", "web", "--to", "b", "--channels", "2", "--bandwidth", "2G", "--max-downtime", "0.2s")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"VM web runs on b: sealed with AES-256-GCM, 2 channels, 4\.88 KiB, [0-9.]+ m?s, downtime 50 ms", last
    )
    phases = [row.split()[-1] for row in result.stdout.splitlines()[:-1]]
    assert phases == ["requested", "planned", "preparing", "precopy", "switchover", "committing", "cleaning", "done"]
    (order,) = [order for role, order in deployment.a.orders]
    assert order.options.bandwidth == 2 << 30
    assert order.options.max_downtime_ms == 200
    assert order.options.multifd_channels == 2


def cut_off(order: MoveOrder) -> list[dict[str, object]]:
    """A source whose link went down 12 s ago."""
    what = "the connection was reset"
    outages = (Outage("peer_silent", "nothing was heard", 70), Outage("stream_truncated", what))
    down = LinkDown(12.0, 48.0, "stream_truncated", what)
    return [line(MoveState.PRECOPY, progress=COPYING, link=LinkReport(outages, 2, 70, 3, down))]


def test_how_long_to_wait_for_a_broken_link_is_told_to_both_hosts(deployment: Deployment, sealift: CommandLine) -> None:
    sealift.says("migrate", "web", "--to", "b", "--give-up", "2m", "--switchover-timeout", "7.5s")
    (order,) = [order for role, order in deployment.a.orders]
    assert [order] == [order for role, order in deployment.b.orders]
    assert (order.options.give_up_ms, order.options.switchover_timeout_ms) == (120_000, 7_500)
    (record,) = sealift.json("migration", "list")
    assert (record["give_up_ms"], record["switchover_timeout_ms"]) == (120_000, 7_500)
    shown = sealift.says("migration", "show", record["id"])
    assert re.search(r"gives up after +2 min 00 s\n", shown)
    assert re.search(r"in switchover +7\.5 s\n", shown)


def test_without_a_word_the_defaults_hold(deployment: Deployment, sealift: CommandLine) -> None:
    sealift.says("migrate", "web", "--to", "b")
    (order,) = [order for role, order in deployment.a.orders]
    assert (order.options.give_up_ms, order.options.switchover_timeout_ms) == (60_000, 5_000)
    assert "[default: 60s]" in sealift.says("migrate", "--help")


@pytest.mark.parametrize("words", [["--give-up", "0.5s"], ["--give-up", "25h"], ["--switchover-timeout", "2m"]])
def test_patience_out_of_bounds_is_refused_before_anything_changes(
    deployment: Deployment, sealift: CommandLine, words: list[str]
) -> None:
    said = sealift.fails(3, "migrate", "web", "--to", "b", *words)
    assert "is not between 1 s and" in said
    assert f"\n  -> give another {words[0]}" in said
    assert not deployment.a.orders
    assert not deployment.b.orders


def test_an_interrupted_link_is_seen_while_it_lasts_and_afterwards(
    deployment: Deployment, sealift: CommandLine
) -> None:
    deployment.a.source_script, deployment.b.target_script = cut_off, waiting
    with terminal(sealift, "migrate", "web", "--to", "b") as shown:
        shown.until(r"precopy[^\n]*768 MiB, link to b down for 12\.0 s, giving up in 48\.0 s")
        (listed,) = sealift.json("migration", "list")
        assert listed["link_down"]["left_s"] == 48
        record = sealift.says("migration", "show", listed["id"])
        assert "link to b down for 12.0 s, giving up in 48.0 s, link interrupted twice, 3 reconnects" in record
        go_well(deployment)
        shown.end()
    record = sealift.json("migration", "show", listed["id"])
    assert (record["outages"], record["reconnects"], record["link_down"]) == (2, 3, None)
    events = [json.loads(text) for text in sealift.says("events", "--json").splitlines()]
    assert [(e["type"], e["slug"]) for e in events if e["slug"]] == [
        ("migration.interrupted", "peer_silent"),
        ("migration.resumed", "peer_silent"),
        ("migration.interrupted", "stream_truncated"),
    ]
    assert "resumed after 70 ms" in sealift.says("events")


def test_without_a_terminal_an_interrupted_link_gets_lines(
    deployment: Deployment, sealift: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    up = Migration.model_validate(sealift.json("migrate", "web", "--to", "b")).model_copy(update={"phases": []})
    cut = {"left_s": 48.0, "slug": "stream_truncated", "what": "it was cut"}
    down = [
        up.model_copy(update={"link_down": schemas.LinkDown(down_s=down_s, **cut), "outages": 1})
        for down_s in (0.1, 3.0, 12.0, 13.0)
    ]
    back = up.model_copy(update={"outages": 1, "reconnects": 2, "longest_outage_ms": 13_400})
    short = up.model_copy(update={"outages": 2, "reconnects": 3, "longest_outage_ms": 13_400})
    lines = watching.Lines()
    for now in (up, *down, back, back, short, short):
        lines.show(now)
    assert [text.split(" s  ", 1)[1] for text in capsys.readouterr().out.splitlines()] == [
        "link to b down for 100 ms, giving up in 48.0 s: it was cut [stream_truncated]",
        "link to b down for 12.0 s, giving up in 48.0 s: it was cut [stream_truncated]",
        "link interrupted once, 2 reconnects, for 13.4 s at most; it is up",
        "link interrupted twice, 3 reconnects, for 13.4 s at most; it is up",
    ]


def test_a_plain_move_is_said_loudly_with_its_reason(deployment: Deployment, sealift: CommandLine) -> None:
    sealift.says("vm", "set", "web", "--migrate-encryption", "disabled")
    result = sealift("migrate", "web", "--to", "b")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert "PLAIN - NOT ENCRYPTED, NOT AUTHENTICATED (the VM's setting is disabled)" in last
    assert "sealed" not in last
    assert "PLAIN" in result.stderr


def test_a_refused_move_says_who_refused_what_and_what_to_do(deployment: Deployment, sealift: CommandLine) -> None:
    deployment.b.sealed = False
    sealift.says("vm", "set", "web", "--migrate-encryption", "required")
    said = sealift.fails(3, "migrate", "web", "--to", "b")
    assert "b cannot seal a move" in said
    assert "\n  -> enable the sealed channel on b" in said
    told = json.loads(sealift.fails(3, "migrate", "web", "--to", "b", "--json"))
    assert told["slug"] == "plan_refused"
    assert told["migration"]
    assert not deployment.b.orders


def test_a_dry_run_moves_nothing_and_says_what_would_be(deployment: Deployment, sealift: CommandLine) -> None:
    assert "It would move sealed with AES-256-GCM" in sealift.says("migrate", "web", "--to", "b", "--dry-run")
    assert sealift.json("migrate", "web", "--to", "b", "--dry-run")["dry_run"] is True
    assert sealift.json("migration", "list") == []
    deployment.b.sealed = False
    sealift.says("vm", "set", "web", "--migrate-encryption", "required")
    assert "would not be moved" in sealift.fails(3, "migrate", "web", "--to", "b", "--dry-run")


def test_the_record_for_scripts_is_one_object(deployment: Deployment, sealift: CommandLine) -> None:
    record = sealift.json("migrate", "web", "--to", "b")
    assert record["state"] == "done"
    assert record["protection"] == "sealed"
    assert record["downtime_ms"] == pytest.approx(50)
    (listed,) = sealift.json("migration", "list")
    assert listed["id"] == record["id"]
    short = record["id"][:8]
    assert sealift.json("migration", "show", short)["id"] == record["id"]
    shown = sealift.says("migration", "show", short)
    assert "AES-256-GCM" in shown
    assert "asked for by" in shown
    _, row = sealift.says("migration", "list").splitlines()
    assert row.split()[:6] == [short, "web", "a", "b", "done", "sealed"]


def test_a_failed_move_says_where_the_vm_is(deployment: Deployment, sealift: CommandLine) -> None:
    deployment.a.source_script, deployment.b.target_script = broken, waiting
    said = sealift.fails(7, "migrate", "web", "--to", "b")
    assert "web" in said
    assert "stays at a" in said
    assert "nothing was heard" in said


def test_a_move_left_alone_is_watched_and_cancelled_later(deployment: Deployment, sealift: CommandLine) -> None:
    copy_on(deployment)
    begun = sealift.json("migrate", "web", "--to", "b", "--detach")
    assert "was asked to cancel" in sealift.says("migration", "cancel", begun["id"][:8])
    assert "web runs on at a" in sealift.fails(8, "migration", "watch", begun["id"])
    assert "over" in sealift.fails(4, "migration", "cancel", begun["id"])


@pytest.mark.parametrize("identifier", ["zz", "", "00000000-0000-0000-0000-000000000000"])
def test_a_migration_that_is_not_there(deployment: Deployment, sealift: CommandLine, identifier: str) -> None:
    assert "sealift: " in sealift.fails(4, "migration", "show", identifier)


@pytest.mark.parametrize(
    "words",
    [["--bandwidth", "2GB"], ["--max-downtime", "3"], ["--channels", "0"], ["--to"]],
)
def test_a_wrong_wish_asks_nothing_of_the_controller(sealift: CommandLine, words: list[str]) -> None:
    sealift.fails(2, "migrate", "web", "--to", "b", *words)


def test_the_bar_shows_phase_bytes_rate_and_time_left(deployment: Deployment, sealift: CommandLine) -> None:
    copy_on(deployment)
    with terminal(sealift, "migrate", "web", "--to", "b") as shown:
        shown.until(r"precopy[^\n]*768 MiB, 95\.4 MiB/s, 5\.4 s left")
        go_well(deployment)
        assert shown.end() == 0
        assert re.search(r"runs on b: .*sealed.* with AES-256-GCM", shown.text.splitlines()[-1])


def test_ctrl_c_cancels_and_says_what_became_of_the_vm(deployment: Deployment, sealift: CommandLine) -> None:
    copy_on(deployment)
    with terminal(sealift, "migrate", "web", "--to", "b") as shown:
        shown.until("precopy")
        shown.press_ctrl_c()
        assert shown.end() == 8, shown.text[-500:]
    assert "asking the controller to cancel" in shown.text
    assert "VM web runs on at a" in shown.text
    (record,) = sealift.json("migration", "list")
    assert record["state"] == "cancelled"
    assert sealift.json("vm", "show", "web")["host"] == "a"


def test_a_second_ctrl_c_leaves_the_migration_to_itself(deployment: Deployment, sealift: CommandLine) -> None:
    copy_on(deployment)
    with terminal(sealift, "migrate", "web", "--to", "b") as shown:
        shown.until("precopy")
        deployment.down()  # nobody can be asked to cancel, so the first one waits
        try:
            shown.until("we wait")
            shown.press_ctrl_c()
            shown.until("Ctrl-C again")
            shown.press_ctrl_c()
            assert shown.end() == 130
        finally:
            deployment.up()
    # The one while the request to cancel was under way, the other once it had failed.
    assert re.search(
        "no longer (waiting; the controller may have been asked to cancel|following; it goes on), see", shown.text
    )
    (record,) = sealift.json("migration", "list")
    assert record["state"] == "precopy"


def test_an_onlookers_ctrl_c_cancels_nothing(deployment: Deployment, sealift: CommandLine) -> None:
    copy_on(deployment)
    begun = sealift.json("migrate", "web", "--to", "b", "--detach")
    with terminal(sealift, "migration", "watch", begun["id"]) as shown:
        shown.until("precopy")
        shown.press_ctrl_c()
        assert shown.end() == 130
    assert sealift.json("migration", "show", begun["id"])["cancel_requested"] is False


def test_a_controller_that_starts_anew_does_not_end_the_watching(deployment: Deployment, sealift: CommandLine) -> None:
    copy_on(deployment)
    with terminal(sealift, "migrate", "web", "--to", "b") as shown:
        shown.until("precopy")
        deployment.down()
        try:
            shown.until("goes on without it")
        finally:
            deployment.up()
        (there,), (here,) = deployment.b.moves.values(), deployment.a.moves.values()
        there.script = straight_target(there.order)[-1:]
        here.script = straight_source(here.order)[3:]
        assert shown.end() == 0
    assert "runs on b" in shown.text


def test_events_are_followed_until_ctrl_c(deployment: Deployment, sealift: CommandLine) -> None:
    with terminal(sealift, "events", "--follow") as shown:
        shown.until(r"host\.joined")
        sealift.says("host", "token")
        shown.until(r"token")
        shown.press_ctrl_c()
        assert shown.end() == 130
    assert "Traceback" not in shown.text
