"""The agent's interface: what it answers to orders that are wrong, and that no answer quotes what it was sent."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
import structlog
from pydantic import TypeAdapter

from doubles.hosts import World
from doubles.images import PlayedImages, image, opened
from sealift.agent.agent import Agent
from sealift.agent.app import make_app
from sealift.agent.capabilities import CipherFacts
from sealift.agent.join import Identity
from sealift.agent.requests import FENCE
from sealift.agent.vm_files import sha256
from sealift.domain.conversion import ConversionKind, ConversionOrder
from sealift.domain.deks import encode_frame, encode_keys
from sealift.domain.move import MoveOrder, MoveState, PlainToken, SealedSecret, encode_spec
from sealift.domain.vm import Disk, VmConfig
from sealift.secret import Secret
from support.vm_files import file_of, keys

KEY, NONCE, TOKEN = bytes(range(1, 33)), bytes(range(200, 208)), bytes(range(100, 116))
LIMIT_S = 10.0

Scene = Callable[[httpx2.AsyncClient], Awaitable[None]]


def sealed() -> SealedSecret:
    return SealedSecret(Secret(KEY, length=32), Secret(NONCE, length=8))


def play(world: World, scene: Scene) -> None:
    """A scene with a client of host a's agent; the VM runs there."""

    async def main() -> None:
        await world.begin()
        a = world.a
        identity = Identity(a.id, a.settings.identity, "127.0.0.1")
        hypervisor: Any = None
        cipher, images = CipherFacts("", True, 1.0), a.images(a.fuse)
        agent = Agent(a.settings, identity, cipher, hypervisor, images, a._journal, a.vms, a.moves, a.conversions)
        transport = httpx2.ASGITransport(make_app(agent), raise_app_exceptions=False)
        try:
            async with (
                httpx2.AsyncClient(transport=transport, base_url="https://a") as client,
                asyncio.timeout(LIMIT_S),
            ):
                async with asyncio.timeout(LIMIT_S):
                    await scene(client)
        finally:
            await world.a.crash()
            await world.b.crash()

    asyncio.run(main())


def refused(response: httpx2.Response, status: int, slug: str) -> None:
    """A problem document of ours."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert (document["status"], document["slug"]) == (status, slug)
    assert document["detail"]
    assert document["title"]


def spoils(good: bytes) -> dict[str, bytes]:
    """A good order's body, made bad in many ways; each still has the secret in it, and words to look for."""
    (length,) = struct.unpack_from(">I", good)
    public, secret = json.loads(good[4 : 4 + length]), good[4 + length :]

    def body(document: object, *, raw: bytes = secret, more: int = 0) -> bytes:
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        return struct.pack(">I", len(text) + more) + text + raw

    return {
        "empty": b"",
        "only a length": good[:4],
        "a length beyond the end": body(public, more=1 << 20),
        "a length that takes the secret for JSON": body(public, more=len(secret)),
        "no JSON": body(b"quoted-word " + KEY.hex().encode()),
        "another type": body(["quoted-word"]),
        "a field too few": body({k: v for k, v in public.items() if k != "vm"}),
        "a wrong field": body(public | {"fence": "quoted-word"}),
        "a negative fence": body(public | {"fence": -1}),
        "a fence beyond everything": body(public | {"fence": 10**30}),
        "an unknown protection": body(public | {"protection": "quoted-word"}),
        "a wrong name inside": body(public | {"hardware": public["hardware"] | {"config": {"name": "quoted-word"}}}),
        "a key too short": body(public, raw=secret[:-1]),
        "a key too long": body(public, raw=secret + b"\0"),
        "a plain order with a key": body(public | {"protection": "plain"}),
        "too long": body(public, raw=secret + bytes(1 << 20)),
        "not UTF-8": body(b"\xff\xfe quoted-word"),
    }


SPOILS = sorted(spoils(struct.pack(">I", 24) + b'{"hardware":{},"vm":"x"}' + bytes(40)))


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("how", SPOILS)
def test_the_answer_to_a_malformed_order_never_quotes_it(
    world: World, how: str, role: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        order = world.order()
        response = await client.put(
            f"/v1/moves/{order.attempt}/{role}", content=spoils(encode_spec(order, sealed(), {}))[how]
        )
        refused(response, 422, "invalid_input")
        said = response.content + capfd.readouterr().err.encode()
        for secret in (KEY, NONCE):
            assert secret not in said
            assert secret.hex().encode() not in said
            assert str(secret)[2:-1].encode() not in said
        assert b"quoted-word" not in said
        assert world.a._journal.moves() == []

    play(world, scene)


def test_an_order_for_another_attempt_than_its_path_is_refused(world: World) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        body = encode_spec(world.order(), sealed(), {})
        refused(await client.put(f"/v1/moves/{uuid4()}/source", content=body), 422, "invalid_input")
        refused(await client.put("/v1/moves/quoted-word/source", content=body), 422, "invalid_input")
        refused(await client.put(f"/v1/moves/{uuid4()}/middle", content=body), 422, "invalid_input")

    play(world, scene)


def test_an_order_is_taken_once_and_answered_ever_after(world: World) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        order = world.order()
        secret = sealed()
        body = encode_spec(order, secret, {})
        first = await client.put(f"/v1/moves/{order.attempt}/source", content=body)
        assert first.status_code == 200, first.text
        assert first.json()["role"] == "source"
        relays = len(world.relays)
        again = await client.put(f"/v1/moves/{order.attempt}/source", content=body)
        assert again.status_code == 200
        assert len(world.relays) == relays == 1
        assert (await client.get(f"/v1/moves/{order.attempt}")).json()["role"] == "source"
        stale = world.order(fence=1)
        refused(
            await client.put(f"/v1/moves/{stale.attempt}/source", content=encode_spec(stale, sealed(), {})),
            409,
            "stale_fence",
        )
        ended = await client.post(f"/v1/moves/{order.attempt}/abort")
        assert ended.json()["state"] == MoveState.CANCELLED.value
        assert (await client.post(f"/v1/moves/{order.attempt}/forget")).status_code == 204
        refused(await client.get(f"/v1/moves/{order.attempt}"), 404, "not_found")
        refused(await client.put(f"/v1/moves/{order.attempt}/source", content=body), 409, "conflict")

    play(world, scene)


def test_a_plain_order_carries_a_token_and_nothing_else_will_do(world: World) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        order: MoveOrder = world.order(protection="plain")
        good = encode_spec(order, PlainToken(Secret(TOKEN, length=16)), {})
        refused(await client.put(f"/v1/moves/{order.attempt}/source", content=good + bytes(24)), 422, "invalid_input")
        assert (await client.put(f"/v1/moves/{order.attempt}/source", content=good)).status_code == 200

    play(world, scene)


@pytest.mark.parametrize("fence", [None, "", "-1", "1.5", "x", "²", "1" * 19, "9" * 5000, " 1"])
@pytest.mark.parametrize("deed", ["define", "start", "stop", "delete", "keys", "forget keys", "file"])
def test_an_order_about_a_vm_without_a_fence_is_refused(world: World, deed: str, fence: str | None) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        vm = world.config.uuid
        headers = {} if fence is None else {FENCE: fence.encode("latin-1")}
        config = TypeAdapter(VmConfig).dump_python(world.config, mode="json")
        match deed:
            case "define":
                response = await client.put(f"/v1/vms/{vm}", json={"config": config}, headers=headers)
            case "start":
                response = await client.post(f"/v1/vms/{vm}/start", headers=headers)
            case "stop":
                response = await client.post(f"/v1/vms/{vm}/stop", json={"force": True}, headers=headers)
            case "keys":
                response = await client.put(f"/v1/vms/{vm}/keys", content=encode_keys({}), headers=headers)
            case "forget keys":
                response = await client.post(f"/v1/vms/{vm}/keys/forget", headers=headers)
            case "file":
                response = await client.put(f"/v1/vms/{vm}/file", json={"file": ""}, headers=headers)
            case _:
                response = await client.delete(f"/v1/vms/{vm}", headers=headers)
        if fence == " 1":  # the space is not part of a header's value
            assert response.status_code in (200, 204, 409, 422)
            return
        refused(response, 422, "invalid_input")
        assert world.running() == ["a"]

    play(world, scene)


def test_a_fence_from_the_past_is_refused_over_the_wire(world: World) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        vm = world.config.uuid
        refused(await client.post(f"/v1/vms/{vm}/start", headers={FENCE: "7"}), 409, "conflict")
        refused(await client.post(f"/v1/vms/{vm}/stop", json={"force": True}, headers={FENCE: "6"}), 409, "stale_fence")
        assert world.running() == ["a"]
        stopped = await client.post(f"/v1/vms/{vm}/stop", json={"force": True}, headers={FENCE: "7"})
        assert stopped.json()["state"] == "stopped"

    play(world, scene)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/vms/quoted-word", b"{}"),
        ("PUT", "/v1/vms/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01", b'{"config": {"name": "quoted-word"}}'),
        ("PUT", "/v1/vms/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01", b"quoted-word"),
        ("PUT", "/v1/vms/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01", b"\xff\xfequoted-word"),
        ("POST", "/v1/moves/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01/answer", b'{"answer": "quoted-word"}'),
        ("PUT", "/v1/vms/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01/keys", b"\0\1quoted-word"),
        ("PUT", "/v1/vms/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01/keys", b"\0\1" + bytes(1 << 20) + b"quoted-word"),
        ("PUT", "/v1/vms/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01/file", b'{"file": ["quoted-word"]}'),
        ("POST", "/v1/keys/held", b'{"vm": "quoted-word", "deks": []}'),
        ("POST", "/v1/disks/look", b'{"disks": [{"path": "quoted-word", "format": "raw"}]}'),
        ("POST", "/v1/disks/look", b'{"disks": [{"path": "/x\\u0000quoted-word", "format": "raw"}]}'),
        ("POST", "/v1/disks/look", b'{"disks": [{"path": "/x", "format": "quoted-word"}]}'),
        ("PUT", "/v1/conversions/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01", b"quoted-word"),
        ("PUT", "/v1/conversions/6f1d0c52-5a87-4b52-9d5e-1f6b8a3f0a01", encode_frame(b'"quoted-word"', {})),
        ("POST", "/v1/markers", b'{"path": ["quoted-word"]}'),
        ("POST", "/v1/markers", b'{"path": "quoted-word"}'),
        ("POST", "/v1/markers", b'{"path": "/tmp/quoted-word\\u0000/x"}'),
        ("POST", "/v1/markers/read", b'{"path": "/etc/quoted-word"}'),
        ("POST", "/v1/markers/read", b'{"path": "../.sealift-marker-0123456789abcdef"}'),
        ("POST", "/v1/markers/read", b'{"path": "/x\\u0000quoted-word/.sealift-marker-0123456789abcdef"}'),
        ("POST", "/v1/markers/remove", b'{"path": "/etc/quoted-word"}'),
    ],
)
def test_what_is_malformed_is_not_quoted(world: World, method: str, path: str, body: bytes) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        headers = {"content-type": "application/json", FENCE: "1"}
        response = await client.request(method, path, content=body, headers=headers)
        refused(response, 422, "invalid_input")
        assert b"quoted-word" not in response.content

    play(world, scene)


def test_keys_are_held_told_of_and_forgotten_and_never_shown(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    dek = uuid4()
    raw = encode_keys({dek: Secret(KEY, length=32)})

    async def scene(client: httpx2.AsyncClient) -> None:
        vm, headers = world.config.uuid, {FENCE: "7"}

        async def held(*ids: UUID) -> bool:
            asked = {"vm": str(vm), "deks": [str(each) for each in ids]}
            answer = (await client.post("/v1/keys/held", json=asked)).json()
            return bool(answer["held"])

        assert not await held(dek)
        assert await held()
        assert (await client.put(f"/v1/vms/{vm}/keys", content=raw, headers=headers)).status_code == 204
        assert await held(dek)
        assert not await held(dek, uuid4())
        shown = await client.get(f"/v1/vms/{vm}")
        assert shown.json()["held"] == [str(dek)]
        refused(await client.put(f"/v1/vms/{vm}/keys", content=raw, headers={FENCE: "6"}), 409, "stale_fence")
        refused(await client.put(f"/v1/vms/{vm}/keys", content=raw[:-1], headers=headers), 422, "invalid_input")
        said = shown.content + b"".join(capfd.readouterr()[n].encode() for n in (0, 1))
        for secret in (KEY, KEY.hex().encode(), str(KEY)[2:-1].encode()):
            assert secret not in said
        assert await held(dek)
        assert (await client.post(f"/v1/vms/{vm}/keys/forget", headers=headers)).status_code == 204
        assert not await held(dek)
        away = uuid4()  # a VM that is not here: it may come
        assert (await client.put(f"/v1/vms/{away}/keys", content=raw, headers=headers)).status_code == 204
        refused(await client.get(f"/v1/vms/{away}"), 404, "not_found")

    play(world, scene)
    for path in world.a.settings.state_directory.rglob("*"):
        assert not path.is_file() or (KEY not in path.read_bytes() and KEY.hex().encode() not in path.read_bytes())


def test_an_encrypted_vm_over_the_wire(world: World, tmp_path: Path) -> None:
    """Encrypted by a conversion, started by its file's hash, its file put anew, and decrypted again."""
    path = tmp_path / "disk"
    path.write_text(image("content", None))
    plain = replace(world.config, uuid=uuid4(), name="enc", disks=(Disk(str(path), "raw"),))
    after = replace(plain, disks=(replace(plain.disks[0], dek=uuid4()),))
    first, second = file_of(after, 1), file_of(replace(after, vcpus=2), 2)
    world.a.images = PlayedImages

    async def convert(client: httpx2.AsyncClient, order: ConversionOrder) -> dict[str, Any]:
        at = f"/v1/conversions/{order.id}"
        body = encode_frame(TypeAdapter(ConversionOrder).dump_json(order), keys(*after.deks))
        refused(await client.put(f"/v1/conversions/{uuid4()}", content=body), 422, "invalid_input")
        assert (await client.put(at, content=body)).json()["state"] == "copying"
        await asyncio.gather(*world.a.conversions._tasks.values())
        status: dict[str, Any] = (await client.get(at)).json()
        assert (await client.post(f"{at}/cancel")).json() == status
        assert (await client.post(f"{at}/forget")).status_code == 204
        refused(await client.get(at), 404, "not_found")
        refused(await client.put(at, content=body), 409, "conflict")
        return status

    async def scene(client: httpx2.AsyncClient) -> None:
        at, headers = f"/v1/vms/{plain.uuid}", {FENCE: "7"}
        config = TypeAdapter(VmConfig).dump_python(plain, mode="json")
        [facts] = (await client.post("/v1/disks/look", json={"disks": [{"path": str(path), "format": "raw"}]})).json()
        assert facts["exists"]
        assert (await client.put(at, json={"config": config}, headers=headers)).status_code == 200
        text = first.decode("latin-1")
        encrypt = ConversionOrder(uuid4(), plain.uuid, 7, ConversionKind.ENCRYPT, after, text, "full")
        assert (await convert(client, encrypt))["state"] == "done"
        assert (await client.get(at)).json()["file"] == text
        refused(await client.post(f"{at}/start", headers=headers), 409, "vm_tampered")
        await client.post(f"{at}/keys/forget", headers=headers)
        hashed = {"file": sha256(first)}
        refused(await client.post(f"{at}/start", json=hashed, headers=headers), 409, "keys_not_held")
        await client.put(f"{at}/keys", content=encode_keys(keys(*after.deks)), headers=headers)
        put = await client.put(f"{at}/file", json={"file": second.decode("latin-1")}, headers=headers)
        assert put.json()["config"]["vcpus"] == 2
        refused(await client.put(f"{at}/file", json={"file": text}, headers=headers), 409, "conflict")
        refused(await client.post(f"{at}/start", json=hashed, headers=headers), 409, "vm_tampered")
        decrypt = ConversionOrder(uuid4(), plain.uuid, 7, ConversionKind.DECRYPT, plain, "", "sample")
        assert (await convert(client, decrypt))["state"] == "done"
        shown = (await client.get(at)).json()
        assert (shown["file"], shown["held"]) == ("", [])
        assert opened(path, None) == "content"

    play(world, scene)


def test_markers_are_written_read_and_removed_and_nothing_else_is(world: World, tmp_path: Path) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        secret = tmp_path / "secret"
        secret.write_text("0" * 64)
        link = tmp_path / ".sealift-marker-00000000000000aa"
        link.symlink_to(secret)
        made = (await client.post("/v1/markers", json={"path": str(tmp_path / "disk")})).json()
        assert (await client.post("/v1/markers/read", json={"path": made["path"]})).json() == {
            "content": made["content"]
        }
        refused(await client.post("/v1/markers/read", json={"path": str(link)}), 409, "datastore_not_shared")
        assert (await client.post("/v1/markers/remove", json={"path": made["path"]})).status_code == 204
        assert (await client.post("/v1/markers/remove", json={"path": made["path"]})).status_code == 204
        refused(await client.post("/v1/markers/read", json={"path": made["path"]}), 409, "datastore_not_shared")
        refused(await client.post("/v1/markers/remove", json={"path": str(secret)}), 422, "invalid_input")
        assert secret.exists()

    play(world, scene)


def test_an_unknown_order_is_a_problem_of_ours_too(world: World) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        refused(await client.get("/v1/nothing"), 404, "not_found")
        refused(await client.get("/openapi.json"), 404, "not_found")
        refused(await client.get("/docs"), 404, "not_found")
        refused(await client.patch("/v1/vms"), 404, "not_found")

    play(world, scene)


def test_a_defect_is_named_by_its_class_alone(world: World) -> None:
    async def scene(client: httpx2.AsyncClient) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("quoted-word")

        world.a.moves.status = fail  # type: ignore[method-assign, assignment]
        with structlog.testing.capture_logs() as logs:
            response = await client.get(f"/v1/moves/{uuid4()}")
        refused(response, 500, "internal")
        assert "quoted-word" not in response.text
        assert [entry["error"] for entry in logs] == ["RuntimeError"]

    play(world, scene)
