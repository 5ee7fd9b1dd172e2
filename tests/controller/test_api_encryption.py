"""Encrypted VMs and conversions over the wire, through the client that the command line uses too."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

from doubles.agent import FakeAgent, two_hosts
from doubles.vault import failing, stuck
from sealift.api.encryption import Conversion, Rekeyed
from sealift.api.schemas import Vm
from sealift.controller.services import open_services
from support.api import ApiClient, an_admin_of
from support.controllers import FAST, make_state
from support.encrypted_world import TOML, World
from support.moves import LIMIT_S

VM1 = {"host": "a", "config": TOML.format(name="vm1")}


def with_api(tmp_path: Path, story: Callable[[ApiClient, FakeAgent], Awaitable[None]]) -> None:
    """Run a story against the API of a controller with hosts a and b and the key provider ``home``."""

    async def main() -> None:
        state = make_state(tmp_path)
        services = await open_services(state, pace=FAST, machine=lambda: None)
        async with two_hosts(services, tmp_path) as (a, b), an_admin_of(services) as client:
            await World(state, services, a, b).provide("home")
            await story(ApiClient(services, client), a)

    asyncio.run(main())


async def over(api: ApiClient, made: Conversion) -> Conversion:
    """The conversion once it is over."""
    async with asyncio.timeout(LIMIT_S):
        async for _ in api.services.events.follow(0, idle_s=0.02):
            found = Conversion.model_validate_json((await api.call("GET", f"conversions/{made.id}")).content)
            if found.finished:
                return found
    raise AssertionError("unreachable")


async def begin(api: ApiClient, what: str, body: dict[str, object]) -> Conversion:
    """Begin a conversion of vm1."""
    return Conversion.model_validate_json((await api.call("POST", f"vms/vm1/{what}", body, status=201)).content)


async def shown(api: ApiClient) -> Vm:
    """vm1."""
    return Vm.model_validate_json((await api.call("GET", "vms/vm1")).content)


def test_a_vm_is_encrypted_rekeyed_decrypted_and_followed(tmp_path: Path) -> None:
    async def story(api: ApiClient, a: FakeAgent) -> None:
        await api.call("POST", "vms", VM1, status=201)
        dry = Conversion.model_validate_json(
            (await api.call("POST", "vms/vm1/encrypt", {"dry_run": True}, status=200)).content
        )
        assert (dry.state, dry.kind, dry.finished, dry.host) == ("planned", "encrypt", True, "a")
        assert (dry.id, dry.deep) == (None, False), "there is nothing to ask after"
        assert [finding.severity for finding in dry.findings] == ["warning"]
        assert (await api.call("GET", "conversions")).json() == []
        a.vault.script = stuck()
        made = await begin(api, "encrypt", {"verify": "full"})
        assert (made.state, made.requested_by) == ("copying", "ann")
        assert (await shown(api)).conversion == made.id
        async with asyncio.timeout(LIMIT_S):
            while (await api.call("GET", f"conversions/{made.id}")).json()["done_bytes"] != 300:
                await a.vault.looked.wait()
        asked = await api.call("POST", f"conversions/{made.id}/cancel", status=202)
        assert Conversion.model_validate_json(asked.content).id == made.id
        assert (await over(api, made)).state == "cancelled"
        a.vault.script = type(a.vault)().script
        made = await over(api, await begin(api, "encrypt", {}))
        assert (made.state, made.provider, made.done_bytes, made.total_bytes) == ("done", "home", 1000, 1000)
        vm = await shown(api)
        assert vm.encryption is not None
        assert (vm.encryption.state, vm.encryption.cipher, vm.encryption.key_id) == ("ok", "AES-256-GCM", made.key_id)
        shallow = await begin(api, "rekey", {})
        assert (shallow.state, shallow.finished, shallow.deep, shallow.old_key_id) == ("done", True, False, made.key_id)
        assert "not locked out" in shallow.findings[0].text
        deep = await over(api, await begin(api, "rekey", {"deep": True}))
        assert (deep.state, deep.deep, deep.old_key_id) == ("done", True, shallow.key_id)
        many = [
            Rekeyed.model_validate(each)
            for each in (await api.call("POST", "rekey", {"source": "home", "target": "home"})).json()
        ]
        assert [(each.vm, each.old_key_id, each.error_slug) for each in many] == [("vm1", deep.key_id, "")]
        problem = await api.problem("PATCH", "vms/vm1", {"migrate_encryption": "disabled"}, status=409)
        assert "always moves sealed" in problem.detail
        assert (await over(api, await begin(api, "decrypt", {}))).state == "done"
        vm = await shown(api)
        assert (vm.encryption, vm.migrate_encryption.value) == (None, "required")
        assert vm.migrate_encryption_before is not None
        kinds = [each["kind"] for each in (await api.call("GET", "conversions")).json()]
        assert kinds == ["decrypt", "rekey", "rekey", "rekey", "encrypt", "encrypt"]

    with_api(tmp_path, story)


def test_refusals_over_the_wire(tmp_path: Path) -> None:
    async def story(api: ApiClient, a: FakeAgent) -> None:
        await api.call("POST", "vms", VM1, status=201)
        await api.call("POST", "vms/vm1/start")
        problem = await api.problem("POST", "vms/vm1/encrypt", {"provider": "nowhere"}, status=409)
        assert problem.slug == "plan_refused"
        assert [finding.severity for finding in problem.findings] == ["error", "error"]
        for words in ("vm1 is running", "nowhere"):
            assert words in problem.detail
        dry = await api.call("POST", "vms/vm1/decrypt", {"dry_run": True})
        assert dry.json()["state"] == "refused"
        for path in ("encrypt", "decrypt", "rekey"):
            assert (await api.problem("POST", f"vms/none/{path}", {}, status=404)).slug == "not_found"
        assert (await api.problem("POST", "vms/vm1/restore-config", status=409)).slug == "conflict"
        assert (await api.problem("POST", "vms/vm1/rekey", {}, status=409)).slug == "conflict"
        assert (await api.problem("GET", f"conversions/{uuid4()}", status=404)).slug == "not_found"
        assert (await api.problem("POST", "rekey", {"source": "home", "target": "x"}, status=404)).slug == "not_found"

    with_api(tmp_path, story)


def test_a_vm_created_encrypted_over_the_wire(tmp_path: Path) -> None:
    async def story(api: ApiClient, a: FakeAgent) -> None:
        a.vault.script = failing()
        refused = await api.problem("POST", "vms", VM1 | {"encrypt": True, "provider": "nowhere"}, status=409)
        assert refused.slug == "plan_refused"
        assert not a.vms
        a.vault.script = type(a.vault)().script
        made = Vm.model_validate_json((await api.call("POST", "vms", VM1 | {"encrypt": True}, status=201)).content)
        assert made.conversion is not None
        found = await api.call("GET", f"conversions/{made.conversion}")
        assert (await over(api, Conversion.model_validate_json(found.content))).state == "done"
        a.vault.files[made.uuid] = b""
        vm = await shown(api)
        assert vm.encryption is not None
        assert vm.encryption.state == "tampered"
        restored = Vm.model_validate_json((await api.call("POST", "vms/vm1/restore-config")).content)
        assert restored.encryption is not None
        assert restored.encryption.state == "ok"
        assert (await api.problem("DELETE", "vms/vm1", status=409)).slug == "conflict"
        await api.call("DELETE", "vms/vm1?force=true", status=204)

    with_api(tmp_path, story)
