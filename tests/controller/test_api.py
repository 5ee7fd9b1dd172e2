"""The API as people and agents meet it: a real server over TLS, a real client that trusts only the authority."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from doubles.agent import FakeAgent, line, two_hosts
from sealift.api.app import MAX_BODY_BYTES
from sealift.api.schemas import Event, Host, Joined, JoinToken, Migration, Problem, Vm, WhoAmI
from sealift.controller.services import open_services
from sealift.domain.move import MoveState
from sealift.domain.token import parse_token
from support.api import ApiClient, an_admin_of
from support.controllers import FAST, make_state
from support.moves import LIMIT_S

TOML = """
name = "vm1"
vcpus = 1
memory = "64MiB"
"""


@dataclass
class Api(ApiClient):
    """A client of the API of a controller with hosts a and b."""

    a: FakeAgent
    b: FakeAgent

    async def running_vm(self) -> None:
        """vm1, defined and started at host a in the ordinary way."""
        await self.call("POST", "vms", {"host": "a", "config": TOML}, status=201)
        await self.call("POST", "vms/vm1/start")

    async def finished(self, migration: str) -> Migration:
        """The migration once it is over."""
        return await self.until(migration, lambda found: found.finished)

    async def until(self, migration: str, done: Callable[[Migration], bool]) -> Migration:
        """The migration once ``done`` holds of it."""
        async with asyncio.timeout(LIMIT_S):
            async for _ in self.services.events.follow(0, idle_s=0.02):
                found = Migration.model_validate_json((await self.call("GET", f"migrations/{migration}")).content)
                if done(found):
                    return found
        raise AssertionError("unreachable")


@contextlib.asynccontextmanager
async def an_api(tmp_path: Path) -> AsyncIterator[Api]:
    """A controller with hosts a and b, its server, and a client with an admin's token."""
    services = await open_services(make_state(tmp_path), pace=FAST)
    async with two_hosts(services, tmp_path) as (a, b), an_admin_of(services) as client:
        yield Api(services, client, a, b)


def with_api(tmp_path: Path, story: Callable[[Api], Awaitable[None]]) -> None:
    """Run a story against an API of its own."""

    async def main() -> None:
        async with an_api(tmp_path) as api:
            await story(api)

    asyncio.run(main())


def test_who_am_i_and_which_authority(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        me = WhoAmI.model_validate_json((await api.call("GET", "whoami")).content)
        assert me.name == "ann"
        pem = (await api.call("GET", "authority")).json()["certificate"]
        der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(serialization.Encoding.DER)
        made = JoinToken.model_validate_json((await api.call("POST", "join-tokens", {}, status=201)).content)
        assert parse_token(made.token).fingerprint == hashlib.sha256(der).digest()
        assert made.fingerprint == me.fingerprint
        assert made.token not in made.join_command

    with_api(tmp_path, story)


def test_without_a_token_nothing_is_told(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        schema = (await api.client.get("/api/openapi.json")).json()
        del api.client.headers["authorization"]
        closed = 0
        for path, methods in schema["paths"].items():
            for method in methods:
                if path in ("/api/v1/authority", "/api/v1/join"):
                    continue
                url = path.replace("{migration}", str(uuid4())).replace("{host}", "a").replace("{vm}", "vm1")
                response = await api.client.request(method, url, json={})
                assert response.status_code == 401, f"{method} {path}"
                assert response.json()["slug"] == "not_authenticated"
                closed += 1
        assert closed >= 18
        assert (await api.client.get("/docs")).status_code == 404
        assert (await api.client.get("/redoc")).status_code == 404

    with_api(tmp_path, story)


def test_an_agent_joins_over_the_wire(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        token = (await api.call("POST", "join-tokens", {}, status=201)).json()["token"]
        key = ec.generate_private_key(ec.SECP256R1())
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        body = {
            "token": token,
            "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
            "name": "c",
            "address": "10.0.0.3:7420",
            "migration_address": "10.0.0.3:7421",
        }
        joined = Joined.model_validate_json((await api.call("POST", "join", body)).content)
        assert joined.hosts_authority == api.services.authority.hosts.pem
        assert joined.certificate.endswith(joined.hosts_authority)
        problem = await api.problem("POST", "join", body | {"csr": "no"}, status=422)
        assert problem.slug == "invalid_input"
        problem = await api.problem("POST", "join", body | {"token": token[:-4] + "AAAA"}, status=401)
        assert problem.slug == "token_invalid"
        hosts = [Host.model_validate(host) for host in (await api.call("GET", "hosts")).json()]
        assert [(host.name, host.state, host.capability.value) for host in hosts] == [
            ("a", "reachable", "capable"),
            ("b", "reachable", "capable"),
            ("c", "unreachable", "unknown"),
        ]
        assert hosts[2].message
        await api.call("DELETE", "hosts/c", status=204)
        assert (await api.problem("GET", "hosts/c", status=404)).slug == "not_found"

    with_api(tmp_path, story)


SECRET = "slft1.join.c2VjcmV0c2VjcmV0"
MALFORMED = [
    ("join", f'{{"token": "{SECRET}"'),
    ("join", f'{{"token": ["{SECRET}"]}}'),
    ("join", f'{{"{SECRET}": 1}}'),
    ("join", f'{{"token": "{SECRET}", "csr": "{SECRET}", "name": "{SECRET}", "address": "", "migration_address": ""}}'),
    ("join", f'"{SECRET}"'),
    ("join", f'{{"token": "{SECRET}", "csr": "", "name": "{SECRET * 9}", "address": "x", "migration_address": "x"}}'),
    ("migrations", f'{{"vm": {{"{SECRET}": "{SECRET}"}}, "to": "{SECRET}", "bandwidth": "{SECRET}"}}'),
    ("migrations", f'{{"vm": "{SECRET}", "to": "b", "channels": "{SECRET}", "{SECRET}": "{SECRET}"}}'),
    ("vms", f'{{"host": 5, "config": ["{SECRET}"]}}'),
    (f"migrations/{SECRET}/cancel", "{}"),
    (f"vms/{SECRET}%20/start", "{}"),
    ("events?after=" + SECRET, None),
    (SECRET, "{}"),
]


def test_no_answer_quotes_what_was_malformed(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        for path, content in MALFORMED:
            method = "GET" if content is None else "POST"
            response = await api.client.request(
                method, f"/api/v1/{path}", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code in (401, 404, 422), path
            assert SECRET not in response.text, path
            assert "c2VjcmV0" not in response.text, path
            problem = Problem.model_validate_json(response.content)
            assert problem.slug in ("invalid_input", "token_invalid", "not_found")
        problem = await api.problem("POST", "migrations", {"vm": "vm1", "channels": 0, "x": 1}, status=422)
        for words in ("body.to: missing", "body.channels: greater_than_equal", "body: extra_forbidden"):
            assert words in problem.detail

    with_api(tmp_path, story)


def test_a_body_without_end_is_cut_off(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        big = b'{"token": "' + b"x" * MAX_BODY_BYTES
        response = await api.client.post("/api/v1/join", content=big, headers={"content-type": "application/json"})
        assert response.status_code == 422
        assert response.json()["slug"] == "invalid_input"

    with_api(tmp_path, story)


def test_a_vm_from_its_file_to_its_end(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        made = Vm.model_validate_json(
            (await api.call("POST", "vms", {"host": "a", "config": TOML}, status=201)).content
        )
        assert (made.name, made.host, made.migrate_encryption.value) == ("vm1", "a", "opportunistic")
        assert made.state is not None
        assert made.state.value == "stopped"
        assert (await api.problem("POST", "vms", {"host": "a", "config": TOML}, status=409)).slug == "already_exists"
        assert (await api.problem("POST", "vms", {"host": "z", "config": TOML}, status=404)).slug == "not_found"
        assert (await api.problem("POST", "vms", {"host": "a", "config": "x = 1"}, status=422)).slug == "invalid_input"
        changed = await api.call("PATCH", "vms/vm1", {"migrate_encryption": "required"})
        assert changed.json()["migrate_encryption"] == "required"
        assert (await api.call("POST", "vms/vm1/start")).json()["state"] == "running"
        assert [vm["hardware"]["machine"] for vm in (await api.call("GET", "vms")).json()] == ["pc-q35-7.2"]
        assert (await api.problem("DELETE", "vms/vm1", status=409)).detail == "stop it first"
        assert (await api.problem("DELETE", "hosts/a", status=409)).slug == "conflict"
        assert (await api.call("POST", "vms/vm1/stop", {"force": True})).json()["state"] == "stopped"
        await api.call("DELETE", "vms/vm1", status=204)
        assert (await api.problem("GET", "vms/vm1", status=404)).todo

    with_api(tmp_path, story)


def test_an_agents_refusal_reaches_the_person_as_it_is(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        made = (await api.call("POST", "vms", {"host": "a", "config": TOML}, status=201)).json()
        api.a.let_go.add(Vm.model_validate(made).uuid)
        problem = await api.problem("POST", "vms/vm1/start", status=409)
        assert problem.slug == "vm_let_go"

    with_api(tmp_path, story)


def test_a_migration_over_the_wire(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        await api.running_vm()
        wish = {"vm": "vm1", "to": "b", "bandwidth": 1 << 30, "channels": 2}
        dry = Migration.model_validate_json((await api.call("POST", "migrations", wish | {"dry_run": True})).content)
        assert (dry.dry_run, dry.state.value, dry.protection) == (True, "planned", "sealed")
        assert (await api.call("GET", "migrations")).json() == []
        made = (await api.call("POST", "migrations", wish, status=201)).json()
        done = await api.finished(made["id"])
        assert (done.state.value, done.source, done.target, done.channels) == ("done", "a", "b", 2)
        assert (done.cipher, done.requested_by, done.bandwidth) == ("AES-256-GCM", "ann", 1 << 30)
        assert done.downtime_ms == pytest.approx(50.0)
        assert done.total_s is not None
        assert done.total_s >= 0
        assert done.phases[0].at.utcoffset() is not None
        assert [each["id"] for each in (await api.call("GET", "migrations")).json()] == [made["id"]]
        assert (await api.call("GET", "vms/vm1")).json()["host"] == "b"
        assert (await api.problem("POST", f"migrations/{made['id']}/cancel", status=409)).slug == "conflict"
        assert (await api.problem("GET", f"migrations/{uuid4()}", status=404)).slug == "not_found"

    with_api(tmp_path, story)


def test_progress_is_told_and_a_cancellation_heard(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        await api.running_vm()
        whole = api.a.source_script
        api.a.source_script = lambda order: whole(order)[:2]
        api.b.target_script = lambda order: [line(MoveState.WAITING)]
        made = (await api.call("POST", "migrations", {"vm": "vm1", "to": "b"}, status=201)).json()
        found = await api.until(
            made["id"],
            lambda found: bool(found.state.value == "precopy" and found.progress and found.progress.total_bytes),
        )
        assert found.progress is not None
        assert found.progress.remaining_bytes == 400
        assert found.eta_s == pytest.approx(2.0)
        assert (await api.problem("POST", "migrations", {"vm": "vm1", "to": "b"}, status=409)).slug == "conflict"
        asked = (await api.call("POST", f"migrations/{made['id']}/cancel", status=202)).json()
        assert asked["cancel_requested"]
        over = await api.finished(made["id"])
        assert (over.state.value, over.error_slug) == ("cancelled", "migration_cancelled")

    with_api(tmp_path, story)


def test_a_refusal_says_why_and_where_its_record_is(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        await api.running_vm()
        await api.call("PATCH", "vms/vm1", {"migrate_encryption": "required"})
        api.b.sealed = False
        problem = await api.problem("POST", "migrations", {"vm": "vm1", "to": "b", "channels": 1000}, status=409)
        assert problem.slug == "plan_refused"
        assert "b cannot seal a move" in problem.detail
        assert "1000 channels" in problem.detail
        assert problem.todo
        assert [finding.severity for finding in problem.findings] == ["error", "error"]
        record = (await api.call("GET", f"migrations/{problem.migration}")).json()
        assert record["state"] == "refused"
        assert len(record["findings"]) == 2

    with_api(tmp_path, story)


def test_events_as_a_list_and_as_a_stream(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        listed = [Event.model_validate(event) for event in (await api.call("GET", "events")).json()]
        assert [event.seq for event in listed] == list(range(1, len(listed) + 1))
        assert {"host.joined", "token.made"} <= {event.type for event in listed}
        last = listed[-1].seq
        assert (await api.call("GET", f"events?after={last}")).json() == []

        async def read(headers: dict[str, str], query: str, wanted: int) -> list[Event]:
            found: list[Event] = []
            headers = {"accept": "text/event-stream", **headers}
            async with api.client.stream("GET", f"/api/v1/events{query}", headers=headers) as stream:
                assert stream.headers["content-type"].startswith("text/event-stream")
                fields: dict[str, str] = {}
                async for text in stream.aiter_lines():
                    if text.startswith(":"):
                        started.set()
                    elif text:
                        name, _, value = text.partition(": ")
                        fields[name] = value
                    elif fields:
                        event = Event.model_validate(json.loads(fields["data"]))
                        assert (fields["id"], fields["event"]) == (str(event.seq), event.type)
                        found.append(event)
                        fields = {}
                    if len(found) == wanted:
                        return found
            raise AssertionError("the stream ended")

        async with asyncio.timeout(LIMIT_S):
            started = asyncio.Event()
            assert await read({}, "?after=0", len(listed)) == listed
            assert await read({"last-event-id": "1"}, "", len(listed) - 1) == listed[1:]
            started.clear()
            coming = asyncio.create_task(read({}, "", 1))
            await started.wait()
            await api.call("POST", "join-tokens", {}, status=201)
            [event] = await coming
            assert (event.seq, event.type) == (last + 1, "token.made")

    with_api(tmp_path, story)


def test_the_server_speaks_tls_1_3_to_those_who_know_its_authority(tmp_path: Path) -> None:
    async def story(api: Api) -> None:
        url = str(api.client.base_url)
        old = ssl.create_default_context(cadata=api.services.authority.controllers.pem)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        for context in (old, ssl.create_default_context()):
            async with httpx2.AsyncClient(verify=context, trust_env=False) as client:
                with pytest.raises(httpx2.ConnectError):
                    await client.get(f"{url}/api/v1/authority")

    with_api(tmp_path, story)
