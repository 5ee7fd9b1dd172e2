"""Hosts, VMs and events on the command line, against a real controller."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command_line import CommandLine
from support.deployment import Deployment, a_deployment

VM = 'name = "web"\nvcpus = 2\nmemory = "512MiB"\n'


@pytest.fixture
def deployment(tmp_path: Path, sealift: CommandLine) -> Iterator[Deployment]:
    """Somebody is logged in to it."""
    with a_deployment(tmp_path) as made:
        assert sealift("login", made.url, "--token", "-", stdin=made.token).exit_code == 0
        yield made


@pytest.fixture
def vm(deployment: Deployment, sealift: CommandLine, tmp_path: Path) -> str:
    """A VM that runs on host a."""
    (tmp_path / "web.toml").write_text(VM)
    sealift.says("vm", "create", str(tmp_path / "web.toml"), "--host", "a")
    sealift.says("vm", "start", "web")
    return "web"


def test_hosts_are_listed_and_shown(deployment: Deployment, sealift: CommandLine) -> None:
    titles, *rows = sealift.says("host", "list").splitlines()
    assert titles.split("  ")[0] == "NAME"
    assert [row.split()[:3] for row in rows] == [["a", "reachable", "yes"], ["b", "reachable", "yes"]]
    assert deployment.a.address in rows[0]
    shown = sealift.says("host", "show", "a")
    assert "Test CPU" in shown
    assert "8.00 GiB" in shown
    assert sealift.json("host", "show", "a")["capabilities"]["cpu_model"] == "Test CPU"


def test_a_host_that_lost_its_seal_is_accepted(deployment: Deployment, sealift: CommandLine) -> None:
    sealift.says("host", "list")
    deployment.a.sealed = False
    assert "NO LONGER" in sealift.says("host", "list")
    assert "NO" in sealift.says("host", "accept", "a")
    assert sealift.json("host", "show", "a")["capability"] == "incapable"


def test_a_token_for_a_host_is_alone_on_its_line(deployment: Deployment, sealift: CommandLine) -> None:
    first, *rest = sealift.says("host", "token").splitlines()
    assert first.startswith("slft1.join.")
    assert any("sealift agent join" in line for line in rest)
    made = sealift.json("host", "token", "--replaces", "a")
    assert made["token"].startswith("slft1.join.")


def test_a_host_is_removed(deployment: Deployment, sealift: CommandLine) -> None:
    sealift.says("host", "remove", "b")
    assert [one["name"] for one in sealift.json("host", "list")] == ["a"]
    assert "sealift: " in sealift.fails(4, "host", "remove", "b")


def test_the_life_of_a_vm(deployment: Deployment, sealift: CommandLine, tmp_path: Path) -> None:
    assert "no VM yet" in sealift.says("vm", "list")
    assert sealift.json("vm", "list") == []
    created = sealift("vm", "create", "-", "--host", "a", stdin=VM)
    assert created.exit_code == 0, created.output
    assert "sealift vm start web" in created.stdout
    assert "running on a" in sealift.says("vm", "start", "web")
    _, row = sealift.says("vm", "list").splitlines()
    assert row.split()[:7] == ["web", "running", "no", "a", "opportunistic", "2", "512"]
    sealift.says("vm", "set", "web", "--migrate-encryption", "required")
    assert sealift.json("vm", "show", "web")["migrate_encryption"] == "required"
    shown = sealift.says("vm", "show", "web")
    assert "pc-q35-7.2" in shown
    sealift.says("vm", "stop", "web", "--force")
    assert sealift.json("vm", "show", "web")["state"] == "stopped"
    sealift.says("vm", "delete", "web")
    assert sealift.json("vm", "list") == []


def test_what_is_wrong_with_a_vm_file_is_said(deployment: Deployment, sealift: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(VM + 'colour = "red"\n')
    assert "colour" in sealift.fails(2, "vm", "create", str(file), "--host", "a")
    file.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in sealift.fails(2, "vm", "create", str(file), "--host", "a")


def test_a_vm_that_is_not_there(deployment: Deployment, sealift: CommandLine) -> None:
    """Whatever is typed as a name never becomes another request."""
    assert json.loads(sealift.fails(4, "vm", "show", "nobody", "--json"))["slug"] == "not_found"
    for name in ("../hosts", "..", "a b", "?", "", "web/start"):
        assert json.loads(sealift.fails(2, "vm", "show", name, "--json"))["slug"] == "invalid_input"


def test_events_are_told_in_order_and_after_a_number(vm: str, sealift: CommandLine) -> None:
    lines = [json.loads(line) for line in sealift.says("events", "--json").splitlines()]
    numbers = [event["seq"] for event in lines]
    assert numbers == sorted(set(numbers))
    assert {"host.joined"} <= {event["type"] for event in lines}
    later = sealift.says("events", "--after", str(numbers[-2])).splitlines()
    assert len(later) == 1
    assert later[0].split()[0] == str(numbers[-1])


def test_text_from_elsewhere_cannot_steer_the_terminal(deployment: Deployment, sealift: CommandLine) -> None:
    from sealift.cli.output import clean

    assert clean("a\x1b[2Jb\r\nc\x9b1m") == "a [2Jb c 1m"


@pytest.mark.parametrize(
    "words",
    [[], ["vm"], ["host"], ["migration"], ["key-provider"], ["conversion"], ["settings"], ["vm", "rekey"], ["migrate"]],
)
def test_help_is_there_without_a_login(sealift: CommandLine, words: list[str]) -> None:
    result = sealift(*words, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_a_closed_output_is_no_failure(sealift: CommandLine) -> None:
    """As cron and daemons may have it."""
    command = [sys.executable, "-m", "sealift.entry.main", "--version"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_told(sealift: CommandLine) -> None:
    from sealift import __version__

    assert sealift.says("--version").strip() == f"sealift, version {__version__}"


def test_the_program_starts_without_what_is_slow_to_import() -> None:
    program = (
        "import sys, sealift.cli.main; print([name for name in ('pydantic', 'httpx2', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
