"""Key providers and settings over the wire, and that no secret comes back by any answer or lies in any log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import structlog

from sealift.api.encryption import (
    Export,
    KeyProvider,
    KeyProviderAdded,
    KeyProviderRemoved,
    KeyProviderTested,
    Setting,
)
from sealift.api.schemas import Problem
from sealift.controller.services import open_services
from sealift.demo.kmip import ServerAuthority
from sealift.keys.native import NativeProvider
from sealift.secret import Secret
from support.age import cheap_export
from support.api import ApiClient, an_admin_of
from support.controllers import FAST, make_state

CA = ServerAuthority()


def with_api(tmp_path: Path, story: Callable[[ApiClient], Awaitable[None]]) -> None:
    """Run a story against the API of a controller without hosts."""

    async def main() -> None:
        services = await open_services(make_state(tmp_path), pace=FAST)
        async with an_admin_of(services) as client:
            await story(ApiClient(services, client))

    asyncio.run(main())


async def kdk_of(api: ApiClient, name: str) -> Secret:
    native = await api.services.providers.open(name)
    assert isinstance(native, NativeProvider)
    return await native.derivation_key()


def test_a_native_provider_over_the_wire(tmp_path: Path) -> None:
    async def story(api: ApiClient) -> None:
        assert (await api.call("GET", "key-providers")).json() == []
        made = await api.call("POST", "key-providers", {"name": "home", "kind": "native"}, status=201)
        added = KeyProviderAdded.model_validate_json(made.content)
        provider = added.provider
        assert (provider.name, provider.kind, provider.default, provider.state) == (
            "home",
            "native",
            True,
            "not_exported",
        )
        assert (added.unlocks, provider.exported_at, provider.vms) == ([], None, [])
        assert provider.notes
        refused = await api.problem("POST", "key-providers", {"name": "home", "kind": "native"}, status=409)
        assert refused.slug == "already_exists"
        weak = await api.problem("POST", "key-providers/home/export", {"passphrase": "lapassword"}, status=422)
        assert weak.slug == "passphrase_weak"
        export = Export.model_validate_json((await api.call("POST", "key-providers/home/export")).content)
        assert export.file.startswith("-----BEGIN AGE ENCRYPTED FILE-----")
        assert len(export.passphrase.split("-")) == 8
        words = Secret(export.passphrase.encode(), length=len(export.passphrase))
        file = cheap_export("home", await kdk_of(api, "home"), words)
        wrong = {"file": file, "passphrase": export.passphrase + "x"}
        assert (await api.problem("POST", "key-providers/home/export/confirm", wrong, status=422)).slug == (
            "export_invalid"
        )
        right = {"file": file, "passphrase": export.passphrase}
        confirmed = await api.call("POST", "key-providers/home/export/confirm", right)
        provider = KeyProvider.model_validate_json(confirmed.content)
        assert provider.state == "ok"
        assert provider.exported_at is not None
        tested = KeyProviderTested.model_validate_json((await api.call("POST", "key-providers/home/test")).content)
        assert tested.ok
        assert len(tested.steps) == 5
        gone = KeyProviderRemoved.model_validate_json((await api.call("DELETE", "key-providers/home")).content)
        assert (gone.name, gone.locks) == ("home", [])
        assert "export" in gone.lost
        back = await api.call("POST", "key-providers/import", right, status=201)
        provider = KeyProviderAdded.model_validate_json(back.content).provider
        assert (provider.name, provider.default, provider.state) == ("home", True, "ok")
        everything = (await api.call("GET", "events")).text + (await api.call("GET", "key-providers/home")).text
        assert export.passphrase not in everything
        assert "AGE ENCRYPTED" not in everything

    with_api(tmp_path, story)


def test_a_kmip_provider_over_the_wire(tmp_path: Path) -> None:
    async def story(api: ApiClient) -> None:
        await api.call("POST", "key-providers", {"name": "home", "kind": "native"}, status=201)
        body = {
            "name": "kms",
            "kind": "kmip",
            "members": ["127.0.0.1:1"],
            "server_authority": CA.pem,
            "client": "csr",
            "default": True,
        }
        made = await api.call("POST", "key-providers", body, status=201)
        provider = KeyProviderAdded.model_validate_json(made.content).provider
        assert (provider.state, provider.default) == ("no_certificate", True)
        pem = CA.client(provider.certificate_request)
        assert (await api.problem("PATCH", "key-providers/kms", {}, status=422)).slug == "invalid_input"
        assert (await api.problem("PATCH", "key-providers/kms", {"default": False}, status=422)).slug
        await api.problem("PATCH", "key-providers/kms", {"client_certificate": CA.pem}, status=422)
        changed = await api.call("PATCH", "key-providers/kms", {"client_certificate": pem})
        provider = KeyProvider.model_validate_json(changed.content)
        assert (provider.state, provider.client_certificate) == ("unreachable", pem)
        assert [(each.address, each.ok) for each in provider.members] == [("127.0.0.1:1", False)]
        assert provider.members[0].message
        assert (await api.call("PATCH", "key-providers/home", {"default": True})).json()["default"]
        listed = [KeyProvider.model_validate(each) for each in (await api.call("GET", "key-providers")).json()]
        assert [(each.name, each.default) for each in listed] == [("home", True), ("kms", False)]
        for path, status in (("key-providers/x", 404), ("key-providers/x%20y", 422), ("key-providers/..", 404)):
            await api.problem("GET", path, status=status)
        await api.problem("DELETE", "key-providers/kms?force=perhaps", status=422)

    with_api(tmp_path, story)


def test_settings_over_the_wire(tmp_path: Path) -> None:
    async def story(api: ApiClient) -> None:
        [setting] = [Setting.model_validate(each) for each in (await api.call("GET", "settings")).json()]
        assert (setting.name, setting.value) == ("migration-encryption-floor", "none")
        changed = await api.call("PUT", "settings/migration-encryption-floor", {"value": "required"})
        assert "whatever the VM's setting is" in Setting.model_validate_json(changed.content).meaning
        assert (await api.call("GET", "settings")).json()[0]["value"] == "required"
        assert (await api.problem("PUT", "settings/other", {"value": "x"}, status=404)).slug == "not_found"
        wrong = await api.problem("PUT", "settings/migration-encryption-floor", {"value": "full"}, status=422)
        assert wrong.slug == "invalid_input"
        assert "none, opportunistic, required" in wrong.todo
        assert "full" not in wrong.detail

    with_api(tmp_path, story)


SECRET = "c2VjcmV0-passphrase-of-mine"
KEY = f"-----BEGIN PRIVATE KEY-----\\n{SECRET}\\n-----END PRIVATE KEY-----"
PEM = json.dumps(CA.pem)[1:-1]
MALFORMED = [
    ("POST", "key-providers/home/export", f'{{"passphrase": "{SECRET}"'),
    ("POST", "key-providers/home/export", f'{{"passphrase": ["{SECRET}"]}}'),
    ("POST", "key-providers/home/export", f'{{"{SECRET}": 1}}'),
    ("POST", "key-providers/home/export", f'"{SECRET}"'),
    ("POST", "key-providers/kms/export", f'{{"passphrase": "{SECRET}"}}'),
    ("POST", f"key-providers/{SECRET}%20/export", "{}"),
    ("POST", "key-providers/home/export/confirm", f'{{"file": "{SECRET}", "passphrase": "{SECRET}"}}'),
    ("POST", "key-providers/home/export/confirm", f'{{"file": 5, "passphrase": {{"{SECRET}": 1}}}}'),
    ("POST", "key-providers/home/export/confirm", '{"file": "", "passphrase": ""}'),
    ("POST", "key-providers/home/export/confirm", f'{{"file": "", "passphrase": "\\ud800{SECRET}"}}'),
    ("POST", "key-providers/import", f'{{"file": "{SECRET}", "passphrase": "{SECRET}", "default": "{SECRET}"}}'),
    ("POST", "key-providers/import", f'{{"file": "{SECRET}", "passphrase": "{SECRET}"}}'),
    ("POST", "key-providers/import", f'{{"file": "{SECRET * 3000}", "passphrase": "{SECRET}"}}'),
    ("POST", "key-providers", f'{{"name": "{SECRET}/", "kind": "native"}}'),
    ("POST", "key-providers", f'{{"name": "x", "kind": "{SECRET}"}}'),
    ("POST", "key-providers", f'{{"name": "x", "kind": "native", "client_key": "{KEY}"}}'),
    ("POST", "key-providers", f'{{"name": "x", "kind": "kmip", "members": ["{SECRET}"], "server_authority": "{PEM}"}}'),
    ("POST", "key-providers", f'{{"name": "x", "kind": "kmip", "members": ["a:1"], "server_authority": "{KEY}"}}'),
    (
        "POST",
        "key-providers",
        f'{{"name": "x", "kind": "kmip", "members": ["a:1"], "server_authority": "{PEM}", "client": "uploaded",'
        f' "client_certificate": "{PEM}", "client_key": "{KEY}"}}',
    ),
    (
        "POST",
        "key-providers",
        f'{{"name": "x", "kind": "kmip", "members": ["a:1"], "server_authority": "{PEM}", "client": "uploaded",'
        f' "client_certificate": "{PEM}{KEY}", "client_key": "{KEY}"}}',
    ),
    ("PATCH", "key-providers/kms", f'{{"client_certificate": "{KEY}"}}'),
    ("PATCH", "key-providers/kms", f'{{"client_certificate": "{PEM}{KEY}"}}'),
    ("PATCH", "key-providers/home", f'{{"default": "{SECRET}", "{SECRET}": 1}}'),
    ("POST", "key-providers", f'{{"name": "x\\ud800{SECRET}", "kind": "native"}}'),
    (
        "POST",
        "key-providers",
        f'{{"name": "x", "kind": "kmip", "members": ["\\ud800:1"], "server_authority": "{PEM}"}}',
    ),
    (
        "POST",
        "key-providers",
        f'{{"name": "x", "kind": "kmip", "members": ["a:1"], "server_authority": "\\ud800{PEM}"}}',
    ),
    ("PATCH", "key-providers/kms", f'{{"client_certificate": "\\ud800{SECRET}"}}'),
    ("PUT", "settings/migration-encryption-floor", f'{{"value": "{SECRET}"}}'),
    ("PUT", f"settings/{SECRET}", '{"value": "none"}'),
]


def test_no_answer_event_or_log_quotes_a_secret(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def story(api: ApiClient) -> None:
        await api.call("POST", "key-providers", {"name": "home", "kind": "native"}, status=201)
        body = {
            "name": "kms",
            "kind": "kmip",
            "members": ["127.0.0.1:1"],
            "server_authority": CA.pem,
            "client": "csr",
        }
        await api.call("POST", "key-providers", body, status=201)
        for method, path, content in MALFORMED:
            response = await api.client.request(
                method, f"/api/v1/{path}", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code in (404, 409, 422), f"{path} {content[:80]} {response.text}"
            assert "c2VjcmV0" not in response.text, path
            Problem.model_validate_json(response.content)
        assert "c2VjcmV0" not in (await api.call("GET", "events")).text
        assert [each["name"] for each in (await api.call("GET", "key-providers")).json()] == ["home", "kms"]

    with structlog.testing.capture_logs() as logged, caplog.at_level(logging.DEBUG):
        with_api(tmp_path, story)
    # The test's own client tells of every request's path; the server must not.
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx2", "httpcore2"))]
    assert "c2VjcmV0" not in str(logged) + str(ours) + "".join(capfd.readouterr())
