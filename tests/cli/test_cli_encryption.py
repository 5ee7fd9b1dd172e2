"""Encrypting, decrypting and rekeying on the command line; the controller is real, its hosts play what is written."""

import dataclasses
import json
import re
import sqlite3
from collections.abc import Iterator
from uuid import UUID

import pytest
import structlog

from doubles.vault import failing, straight, stuck
from sealift.api.encryption import Rekeyed
from sealift.cli.credentials import load
from sealift.client import Client
from sealift.client.connection import ANSWER_S
from sealift.client.encryption import REKEY_MANY_S, EncryptedVms
from sealift.controller.link import AgentLink
from sealift.domain.conversion import DiskFacts
from sealift.domain.vm import VmStatus
from sealift.errors import Conflict, HostUnreachable
from support.command_line import CommandLine
from support.deployment import Deployment, a_deployment
from support.terminal import terminal

DISK = "/srv/web.raw"
VM = f'name = "web"\nvcpus = 1\nmemory = "512MiB"\n[[disks]]\npath = "{DISK}"\nformat = "raw"\n'
PLAIN_DISK = DiskFacts("", True, 1 << 30, 1 << 30, 8 << 30, "ext4")


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # it would print amid what commands print
    with a_deployment(tmp_path_factory.mktemp("deployment")) as made:
        yield made
    structlog.reset_defaults()


@pytest.fixture
def deployment(controller: Deployment, sealift: CommandLine) -> Iterator[Deployment]:
    """Somebody is logged in to it, provider safe is the default, and there is no VM."""
    assert sealift("login", controller.url, "--token", "-", stdin=controller.token).exit_code == 0
    if not sealift.json("key-provider", "list"):
        add_provider(controller, sealift, "safe")
    controller.a.vault.script = straight
    controller.a.vault.refuse = None
    controller.a.vault.images.clear()
    yield controller
    for one in sealift.json("vm", "list"):
        if one["conversion"]:
            sealift("conversion", "cancel", one["conversion"])
            sealift("conversion", "watch", one["conversion"])
        sealift("vm", "stop", one["name"], "--force")
        sealift("vm", "delete", one["name"], "--force")
    assert sealift.json("vm", "list") == []


def add_provider(deployment: Deployment, sealift: CommandLine, name: str) -> None:
    """A native provider that counts as exported, without the second that a passphrase's stretching takes."""
    sealift.says("key-provider", "add", name, "--kind", "native")
    with sqlite3.connect(deployment.state / "controller.db") as database:
        database.execute("UPDATE key_providers SET exported_at = 1 WHERE name = ?", (name,))
    database.close()


@pytest.fixture
def vm(deployment: Deployment, sealift: CommandLine) -> str:
    """A VM in clear on host a."""
    made = sealift("vm", "create", "-", "--host", "a", stdin=VM)
    assert made.exit_code == 0, made.output
    return "web"


@pytest.fixture
def encrypted(vm: str, sealift: CommandLine) -> str:
    sealift.says("vm", "encrypt", vm)
    return vm


def test_a_vm_is_encrypted_and_everything_says_so(vm: str, sealift: CommandLine) -> None:
    assert sealift.says("vm", "list").splitlines()[1].split()[:3] == ["web", "stopped", "no"]
    said = sealift.says("vm", "encrypt", vm)
    assert re.search(r"VM web on a is encrypted under key \S+ of key provider safe, 0\.98 KiB in ", said)
    assert "always moved sealed" in said
    assert re.search(r"warning: what VM web has stored so far was in clear.*\n    -> ", said)
    assert re.search(r"^ +[0-9.]+ s  done$", said, re.MULTILINE)
    assert sealift.says("vm", "list").splitlines()[1].split()[:3] == ["web", "stopped", "ok"]
    shown = sealift.says("vm", "show", vm)
    for pattern in (
        r"encryption +ok\n",
        r"key provider +safe\n",
        r"key id +\S+\n",
        r"cipher +AES-256-GCM\n",
        r"generation +1\n",
        r"migrate encryption +required \(was opportunistic before encryption\)\n",
    ):
        assert re.search(pattern, shown), (pattern, shown)
    assert f"{DISK} (raw, LUKS)" in shown
    assert "sealed" in sealift.fails(4, "vm", "set", vm, "--migrate-encryption", "disabled")


def test_its_conversion_has_a_record(encrypted: str, sealift: CommandLine) -> None:
    listed = sealift.json("conversion", "list")[0]
    titles, row, *_ = sealift.says("conversion", "list").splitlines()
    assert titles.split()[:5] == ["ID", "VM", "HOST", "KIND", "STATE"]
    assert row.split()[:9] == [listed["id"][:8], "web", "a", "encrypt", "done", "100", "%", "of", "0.98"]
    shown = sealift.says("conversion", "show", listed["id"][:13])
    assert re.search(r"key provider +safe\n", shown)
    assert re.search(r"asked for by +ada\n", shown)
    assert "was in clear" in shown
    assert "sealift: " in sealift.fails(4, "conversion", "show", "zz")
    assert "is over: done; there is nothing to cancel" in sealift.fails(4, "conversion", "cancel", listed["id"])


def test_after_decryption_the_setting_stays(encrypted: str, sealift: CommandLine) -> None:
    said = sealift.says("vm", "decrypt", encrypted)
    assert "VM web on a is decrypted, its disks are in clear" in said
    assert "sealift vm set web --migrate-encryption" in said
    assert "required (was opportunistic before encryption)" in sealift.says("vm", "show", encrypted)
    assert sealift.says("vm", "list").splitlines()[1].split()[2] == "no"
    assert "migrate encryption opportunistic." in sealift.says(
        "vm", "set", "web", "--migrate-encryption", "opportunistic"
    )


def test_what_stands_against_it_is_all_said(vm: str, deployment: Deployment, sealift: CommandLine) -> None:
    ordered = len(deployment.a.vault.orders)
    deployment.a.vault.images[DISK] = dataclasses.replace(PLAIN_DISK, snapshots=2, free_bytes=1 << 20)
    said = sealift.fails(3, "vm", "encrypt", vm)
    assert "2 internal snapshots" in said
    assert "has 1 MiB free" in said
    planned = sealift("vm", "encrypt", vm, "--dry-run")
    assert planned.exit_code == 3
    assert "error: disk /srv/web.raw of VM web has 2 internal snapshots" in planned.stdout
    assert "VM web would not be encrypted" in planned.stderr
    told = json.loads(sealift.fails(3, "vm", "encrypt", vm, "--json"))
    assert told["slug"] == "plan_refused"
    assert len([found for found in told["findings"] if found["severity"] == "error"]) == 2
    assert len(deployment.a.vault.orders) == ordered


def test_a_dry_run_changes_nothing(vm: str, deployment: Deployment, sealift: CommandLine) -> None:
    said = sealift.says("vm", "encrypt", vm, "--dry-run")
    assert "It would be encrypted" in said
    assert "warning: what VM web has stored so far was in clear" in said
    assert sealift.json("vm", "encrypt", vm, "--dry-run")["state"] == "planned"
    assert sealift.json("vm", "show", vm)["encrypted"] is False


def test_a_failure_says_that_the_vm_is_as_it_was(vm: str, deployment: Deployment, sealift: CommandLine) -> None:
    deployment.a.vault.script = failing()
    said = sealift.fails(7, "vm", "encrypt", vm)
    assert "VM web on a was not encrypted: there is no room" in said
    assert "\n  -> make room" in said
    assert sealift.json("vm", "show", vm)["encrypted"] is False


def test_a_shallow_rekey_names_the_old_key_while_the_vm_runs(encrypted: str, sealift: CommandLine) -> None:
    old = sealift.json("vm", "show", encrypted)["encryption"]["key_id"]
    sealift.says("vm", "start", encrypted)
    said = sealift.says("vm", "rekey", encrypted)
    assert re.search(r"VM web on a is now under key \S+ of key provider safe\.", said)
    assert f"Old copies of its configuration file are still opened by key {old} of key provider safe." in said
    assert "`sealift vm rekey --deep web`" in said
    told = sealift.json("vm", "rekey", encrypted)
    assert (told["state"], told["deep"]) == ("done", False)
    assert sealift.json("vm", "show", encrypted)["encryption"]["key_id"] == told["key_id"]


def test_a_deep_rekey_begun_is_watched_later(encrypted: str, deployment: Deployment, sealift: CommandLine) -> None:
    deployment.a.vault.script = stuck()
    begun = sealift("vm", "rekey", encrypted, "--deep", "--verify", "full", "--detach")
    assert begun.exit_code == 0, begun.output
    short = re.search(r"`sealift conversion watch ([0-9a-f]{8})`", begun.stdout)
    assert short
    assert sealift.says("vm", "list").splitlines()[1].split()[2] == "converting"
    assert re.search(r"conversion +deep rekey, copying, ", sealift.says("vm", "show", encrypted))
    assert deployment.a.vault.orders[-1][0].verify == "full"
    (conversion,) = deployment.a.vault.conversions.values()
    conversion.script = straight(conversion.order)
    said = sealift.says("conversion", "watch", short[1])
    assert "VM web on a has new disk keys" in said
    assert "Copies of the old images" in said


def test_all_vms_of_a_provider_are_moved_to_another(
    encrypted: str, deployment: Deployment, sealift: CommandLine
) -> None:
    assert sealift("vm", "create", "-", "--host", "a", "--encrypt", stdin=VM.replace("web", "mail")).exit_code == 0
    add_provider(deployment, sealift, "attic")
    deployment.a.vault.refuse = Conflict("the host will not", todo="ask it why")
    result = sealift("vm", "rekey", "--from", "safe", "--to", "attic")
    assert result.exit_code == 7
    titles, *rows = result.stdout.splitlines()
    assert titles.split() == ["VM", "RESULT", "OLD", "KEY", "NEW", "KEY", "MESSAGE"]
    assert [row.split()[:3] for row in rows[:2]] == [["mail", "FAILED", "[conflict]"], ["web", "FAILED", "[conflict]"]]
    assert "  -> ask it why" in rows
    assert "2 of 2 VMs were not rekeyed" in result.stderr
    deployment.a.vault.refuse = None
    said = sealift.says("vm", "rekey", "--from", "safe", "--to", "attic")
    assert [row.split()[:2] for row in said.splitlines()[1:3]] == [["mail", "rekeyed"], ["web", "rekeyed"]]
    assert "Leave safe in place" in said
    assert sealift.json("vm", "rekey", "--from", "safe", "--to", "attic") == []
    assert {one["name"]: len(one["vms"]) for one in sealift.json("key-provider", "list")} == {"attic": 2, "safe": 0}
    for one in ("mail", "web"):
        sealift.says("vm", "rekey", one, "--provider", "safe")
    sealift.says("key-provider", "remove", "attic")


def test_a_rekey_whose_host_did_not_answer_is_told_from_one_that_failed(
    encrypted: str, deployment: Deployment, sealift: CommandLine
) -> None:
    add_provider(deployment, sealift, "attic")
    deployment.a.vault.drop = {"file"}
    try:
        result = sealift("vm", "rekey", "--from", "safe", "--to", "attic")
        other = sealift("vm", "rekey", "--from", "safe", "--to", "attic", "--json")
    finally:
        deployment.a.vault.drop = set()
    assert result.exit_code == 5, result.output
    assert result.stdout.splitlines()[1].split()[:3] == ["web", "UNDER", "WAY"]
    assert "the rekey of VM web is under way" in result.stderr
    assert "not rekeyed" not in result.stderr
    assert "sealift conversion list" in result.stderr
    assert other.exit_code == 7, "no second one is begun meanwhile"
    assert [one["error_slug"] for one in json.loads(other.stdout)] == ["conflict"]
    newest = sealift.json("conversion", "list")[0]
    sealift.says("conversion", "watch", newest["id"])
    assert sealift.json("vm", "show", encrypted)["encryption"]["provider"] == "attic"
    sealift.says("vm", "rekey", encrypted, "--provider", "safe")
    sealift.says("key-provider", "remove", "attic")


def test_a_host_that_did_not_answer_before_anything_was_begun_has_failed(
    encrypted: str, deployment: Deployment, sealift: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what has a record is under way."""
    lost = Rekeyed(vm=encrypted, old_provider="safe", old_key_id="k", error_slug="host_unreachable", error="gone")
    monkeypatch.setattr(EncryptedVms, "rekey_many", lambda self, source, target: [lost])
    result = sealift("vm", "rekey", "--from", "safe", "--to", "safe")
    assert result.exit_code == 7
    assert result.stdout.splitlines()[1].split()[:3] == ["web", "FAILED", "[host_unreachable]"]


def test_the_answer_about_many_vms_may_take_longer_than_others(
    deployment: Deployment, sealift: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(sealift.home))
    waits: dict[str, float] = {}
    with Client(load()) as client:
        hooks = client._connection.http.event_hooks
        hooks["request"] = [lambda request: waits.update({request.url.path: request.extensions["timeout"]["read"]})]
        client._connection.http.event_hooks = hooks
        client.rekey_many("safe", "safe")
        client.settings()
    assert waits == {"/api/v1/rekey": REKEY_MANY_S, "/api/v1/settings": ANSWER_S}


def test_a_vm_is_made_encrypted(deployment: Deployment, sealift: CommandLine) -> None:
    made = sealift("vm", "create", "-", "--host", "a", "--encrypt", "--provider", "safe", stdin=VM)
    assert made.exit_code == 0, made.output
    assert "is encrypted under key" in made.stdout
    assert made.stdout.splitlines()[-1] == "VM web is defined on a; `sealift vm start web` starts it."
    sealift.says("vm", "start", "web")
    told = sealift("vm", "create", "-", "--host", "a", "--encrypt", "--json", stdin=VM.replace("web", "mail"))
    assert json.loads(told.stdout)["encryption"]["state"] == "ok"


def test_a_vm_whose_encryption_fails_is_not_kept(deployment: Deployment, sealift: CommandLine) -> None:
    deployment.a.vault.script = failing()
    made = sealift("vm", "create", "-", "--host", "a", "--encrypt", stdin=VM)
    assert made.exit_code == 7
    assert "VM web on a was not created: there is no room" in made.stderr
    assert sealift.json("vm", "list") == []
    told = sealift("vm", "create", "-", "--host", "a", "--encrypt", "--json", stdin=VM)
    assert told.exit_code == 7
    assert json.loads(told.stdout)["state"] == "failed"
    deployment.a.vault.images[DISK] = dataclasses.replace(PLAIN_DISK, backing=True)
    refused = sealift("vm", "create", "-", "--host", "a", "--encrypt", stdin=VM)
    assert refused.exit_code == 3
    assert "refers to another file" in refused.stderr
    assert sealift.json("vm", "list") == []


def test_a_vm_whose_provider_is_gone_locks_and_says_why(
    encrypted: str, deployment: Deployment, sealift: CommandLine
) -> None:
    add_provider(deployment, sealift, "attic")
    sealift.says("vm", "rekey", encrypted, "--provider", "attic")
    assert "web" in sealift.fails(4, "key-provider", "remove", "attic")
    deployment.a.vault.restart()
    with terminal(sealift, "events", "--follow") as shown:
        shown.until(r"vm\.rekeyed.*attic")
        said = sealift.says("key-provider", "remove", "attic", "--force")
        assert "The keys of these VMs cannot be fetched any more: web." in said
        assert "They lock when the agent of their host is restarted" in said
        shown.until(r"vm\.locked.*attic")
    found = sealift.json("vm", "show", encrypted)["encryption"]
    row = sealift.says("vm", "list").splitlines()[1]
    assert row.split()[2] == "LOCKED"
    assert "attic" in row
    assert re.search(rf"because +.*{re.escape(found['key_id'])}", sealift.says("vm", "show", encrypted))
    assert "attic" in sealift.fails(12, "vm", "start", encrypted)
    said = sealift.says("vm", "restore-config", encrypted)
    assert "nothing was changed" in said
    assert "It is still LOCKED: VM web is locked: it needs key" in said
    added = sealift.says("key-provider", "add", "attic", "--kind", "native")
    assert "VMs refer to that name: web.\nLocked are: web. They unlock by themselves once their keys are found" in added


def test_a_changed_file_is_shown_and_put_back(encrypted: str, deployment: Deployment, sealift: CommandLine) -> None:
    ((vm, file),) = deployment.a.vault.files.items()
    deployment.a.vault.files[vm] = file.replace(b"vcpus = 1", b"vcpus = 9")
    row = sealift.says("vm", "list").splitlines()[1]
    assert row.split()[2] == "TAMPERED"
    shown = sealift.says("vm", "show", encrypted)
    assert "\n  - vcpus = 1\n  + vcpus = 9\n" in shown
    assert "sealift vm restore-config web" in shown
    assert "vcpus = 9" in sealift.fails(13, "vm", "start", encrypted)
    assert "generation 1 again, the last authentic one: it was put back" in sealift.says("vm", "restore-config", "web")
    assert "nothing was changed" in sealift.says("vm", "restore-config", encrypted)
    assert sealift.json("vm", "restore-config", encrypted)["outcome"] == "unchanged"
    assert sealift.says("vm", "list").splitlines()[1].split()[2] == "ok"
    sealift.says("vm", "start", encrypted)


def test_of_a_host_that_does_not_answer_nothing_is_known(
    encrypted: str, deployment: Deployment, sealift: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(self: AgentLink) -> list[VmStatus]:
        raise HostUnreachable("host a at [::1]:1 did not answer: connection refused")

    monkeypatch.setattr(AgentLink, "vms", silent)
    assert sealift.says("vm", "list").splitlines()[1].split()[:3] == ["web", "unknown", "yes"]
    assert sealift.json("vm", "show", encrypted)["encryption"]["state"] == "unknown"


def test_what_is_to_be_known_of_keys_is_no_reason_to_be_ok(
    encrypted: str, deployment: Deployment, sealift: CommandLine
) -> None:
    add_provider(deployment, sealift, "loft")
    sealift.says("vm", "rekey", encrypted, "--provider", "loft")
    sealift.says("key-provider", "remove", "loft", "--force")
    shown = sealift.says("vm", "show", encrypted)
    assert re.search(r"encryption +ok\n", shown)
    assert re.search(r"note +key provider loft is not there any more", shown)
    assert "because" not in shown
    assert "loft is not there any more" in sealift.says("vm", "list")
    said = sealift.fails(12, "vm", "rekey", encrypted, "--provider", "safe")
    assert "VM web needs key" in said
    assert "is locked" not in said
    assert "add or import key provider loft again" in said


def test_a_key_provider_that_never_was_has_no_vms_to_rekey(deployment: Deployment, sealift: CommandLine) -> None:
    assert "there is no key provider typo" in sealift.fails(4, "vm", "rekey", "--from", "typo", "--to", "safe")
    assert "No VM has its key" in sealift.says("vm", "rekey", "--from", "safe", "--to", "safe")
    assert "--from needs --to as well" in sealift.fails(2, "vm", "rekey", "--from", "safe")


def test_an_encrypted_vm_is_deleted_only_by_force(encrypted: str, sealift: CommandLine) -> None:
    assert "sealift vm decrypt web" in sealift.fails(4, "vm", "delete", encrypted)
    sealift.says("vm", "delete", encrypted, "--force")
    assert sealift.json("vm", "list") == []


@pytest.mark.parametrize(
    "words",
    [
        ["rekey"],
        ["rekey", "web", "--from", "safe", "--to", "attic"],
        ["rekey", "--from", "safe"],
        ["rekey", "--from", "safe", "--to", "attic", "--deep"],
        ["rekey", "web", "--verify", "full"],
        ["rekey", "web", "--dry-run"],
        ["encrypt", "web", "--dry-run", "--detach"],
        ["encrypt", "web", "--provider", "../x"],
        ["encrypt", "web", "--verify", "perhaps"],
        ["encrypt"],
        ["create", "-", "--host", "a", "--provider", "safe"],
        ["create", "-", "--host", "a", "--encrypt", "--provider", "bad name"],
        ["create", "-", "--host", "a", "--verify", "full"],
    ],
)
def test_what_does_not_fit_together_asks_nothing_of_the_controller(sealift: CommandLine, words: list[str]) -> None:
    sealift.fails(2, "vm", *words)


def test_ctrl_c_cancels_and_says_what_is_left(vm: str, deployment: Deployment, sealift: CommandLine) -> None:
    deployment.a.vault.script = stuck()
    with terminal(sealift, "vm", "encrypt", vm) as shown:
        shown.until(r"copying[^\n]*300 B of 0\.98 KiB")
        shown.press_ctrl_c()
        assert shown.end() == 8, shown.text[-500:]
    assert "asking the controller to cancel" in shown.text
    assert "VM web on a was not encrypted: it was cancelled; its old images are in place" in shown.text
    assert sealift.json("vm", "show", vm)["encrypted"] is False


def test_a_host_that_does_not_answer_is_told_of_once_and_again_when_a_cancel_waits_for_it(
    vm: str, deployment: Deployment, sealift: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(self: AgentLink, conversion: UUID) -> None:
        raise HostUnreachable("host a at [::1]:1 did not answer: connection refused")

    deployment.a.vault.script = stuck()
    with terminal(sealift, "vm", "encrypt", vm) as shown, monkeypatch.context() as patch:
        shown.until(r"copying[^\n]*300 B of 0\.98 KiB")
        patch.setattr(AgentLink, "conversion", silent)
        shown.until(r"host a does not answer since [^;]*; the controller asks again; see that its agent runs")
        (one, *_) = sealift.json("conversion", "list")
        short = one["id"][:8]
        assert f"{short}: host a does not answer since" in sealift.says("conversion", "list")
        assert re.search(r"in its way +host a does not answer since", sealift.says("conversion", "show", short))
        assert shown.text.count("host a does not answer since") == 1
        shown.press_ctrl_c()
        shown.until(r"(?s)asking the controller to cancel.*host a does not answer since")
        assert shown.text.count("host a does not answer since") == 2
        shown.press_ctrl_c()  # which may come while the terminal library writes, and have it write that again
        assert shown.end() == 130
    told = f"no longer waiting; the controller was asked to cancel, see `sealift conversion watch {short}`"
    assert told in shown.text


def test_an_onlookers_ctrl_c_cancels_nothing(vm: str, deployment: Deployment, sealift: CommandLine) -> None:
    deployment.a.vault.script = stuck()
    begun = sealift.json("vm", "encrypt", vm, "--detach")
    with terminal(sealift, "conversion", "watch", begun["id"]) as shown:
        shown.until("copying")
        shown.press_ctrl_c()
        assert shown.end() == 130
    assert "no longer following" in shown.text
    assert sealift.json("conversion", "show", begun["id"])["state"] == "copying"
    assert "was asked to cancel" in sealift.says("conversion", "cancel", begun["id"])
    assert "was not encrypted: it was cancelled" in sealift.fails(8, "conversion", "watch", begun["id"])
