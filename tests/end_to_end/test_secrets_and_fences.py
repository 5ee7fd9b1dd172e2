"""The key is nowhere it may not be, processes that hold it cannot be dumped, and a VM let go stays let go."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import TypeAdapter

from sealift.controller.authority import load_authority
from sealift.controller.services import load_settings, open_services
from sealift.demo.cluster import Cluster
from sealift.demo.guest import GuestImage
from sealift.domain.vm import VmConfig
from sealift.errors import StaleFence, VmLetGo
from support.running_guest import Guest, relay_pids

pytestmark = pytest.mark.qemu


def _processes(guest: Guest) -> dict[str, int]:
    """Every process that has something to do with a move of the guest, by role."""
    found = {"controller": guest.cluster.controller_pid}
    for host in guest.cluster.hosts.values():
        assert host.process is not None
        found[f"agent {host.name}"] = host.process.pid
        found[f"doorman {host.name}"] = int((host.run / "doorman.lock").read_text())
        for pid in relay_pids(host):
            found[f"relay {host.name}"] = pid
        if (pid := guest.qemu(host)) is not None:
            found[f"qemu {host.name}"] = pid
    return found


def _spellings(raw: bytes) -> list[bytes]:
    """How bytes may be written: raw, hex, base64."""
    plain = [raw, raw.hex().encode(), raw.hex().upper().encode()]
    return [*plain, base64.b64encode(raw).rstrip(b"="), base64.urlsafe_b64encode(raw).rstrip(b"=")]


def test_the_one_time_key_is_in_no_file_argument_or_environment(guest: Guest) -> None:
    key, nonce = os.urandom(32), os.urandom(8)
    forms = _spellings(key) + _spellings(nonce)
    cluster = guest.cluster
    cluster.kill_controller()
    with (cluster.directory / "controller.log").open("ab") as log:
        controller = subprocess.Popen(
            [sys.executable, "-m", "support.known_key_controller", str(cluster.directory / "controller")],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    assert controller.stdin is not None
    controller.stdin.write(key + nonce)
    controller.stdin.close()
    try:
        cluster.take_controller(controller)
        _look_for(forms, guest)
    finally:
        cluster.kill_controller()
        cluster.start_controller()


def _look_for(forms: list[bytes], guest: Guest) -> None:
    cluster = guest.cluster
    source, target = guest.host, guest.other()
    ident = guest.begin(target, "--bandwidth", "20M")
    processes = _processes(guest)
    assert {"relay a", "relay b", "qemu a", "qemu b"} <= set(processes)
    for role, pid in processes.items():
        seen = b"".join((Path("/proc") / str(pid) / name).read_bytes() for name in ("cmdline", "environ"))
        assert not [form for form in forms if form in seen], f"the key is in the arguments or environment of {role}"
    assert guest.wait(ident)["state"] == "done"
    assert guest.nothing_left(source)
    cluster.kill_controller()
    files = [path for path in cluster.directory.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"agent.db", "agent.log", "controller.log"}
    for path in files:
        content = path.read_bytes()
        assert not [form for form in forms if form in content], f"the key is in {path}"


def test_processes_that_hold_keys_leave_no_core_dumps(guest: Guest) -> None:
    ident = guest.begin(guest.other(), "--bandwidth", "12M")
    for role, pid in _processes(guest).items():
        if role.split()[0] in ("controller", "agent", "relay"):
            limits = (Path("/proc") / str(pid) / "limits").read_text()
            (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
            assert line.split()[4:6] == ["0", "0"], f"{role} may dump core"
    guest.cluster.sealift("migration", "cancel", ident)
    guest.wait(ident)


def test_a_vm_that_was_let_go_cannot_be_started_at_its_source_by_any_order(
    cluster: Cluster, guest_image: GuestImage
) -> None:
    guest = Guest(cluster, guest_image, "let-go", host="a")
    try:
        guest.make_run()
        config = TypeAdapter(VmConfig).validate_python(guest.show()["config"])
        guest.migrate(cluster.hosts["b"])

        async def try_it() -> None:
            services = await open_services(cluster.directory / "controller")
            try:
                agent = services.inventory.link(await services.inventory.host_row("a"))
                with pytest.raises(VmLetGo, match="let go"):
                    await agent.start(UUID(guest.uuid), fence=1000, file_hash="")
                with pytest.raises(StaleFence):
                    await agent.start(UUID(guest.uuid), fence=999, file_hash="")
                await agent.define(config, fence=1000, made_by_conversion=False)
                with pytest.raises(VmLetGo, match="let go"):
                    await agent.start(UUID(guest.uuid), fence=1000, file_hash="")
                await agent.delete(UUID(guest.uuid), fence=1000)
            finally:
                await services.close()

        asyncio.run(try_it())
        assert guest.copies() == ["b"]
        assert guest.unharmed()
    finally:
        guest.close()
        cluster.sealift("vm", "stop", "let-go", "--force", check=False)
        cluster.sealift("vm", "delete", "let-go", check=False)


def _answer(tls: ssl.SSLSocket) -> bytes:
    """What a request is answered with; with TLS 1.3 a client hears only now that it was turned away."""
    try:
        tls.sendall(b"GET /v1/capabilities HTTP/1.1\r\nHost: a\r\n\r\n")
        return tls.recv(1)
    except (ssl.SSLError, ConnectionError):
        return b""


def test_an_agent_listens_to_controllers_only(cluster: Cluster) -> None:
    host = cluster.hosts["a"]
    identity = host.state / "identity"
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.load_verify_locations(identity / "hosts.pem")
    trusting.check_hostname = False
    as_a_host = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    as_a_host.load_verify_locations(identity / "hosts.pem")
    as_a_host.check_hostname = False
    # A real certificate of this deployment, but of the hosts' authority: a compromised host is no controller.
    as_a_host.load_cert_chain(identity / "certificate.pem", identity / "key.pem")
    for context in (trusting, as_a_host):
        with socket.create_connection(("127.0.0.1", host.port)) as tcp, context.wrap_socket(tcp) as tls:
            assert tls.version() == "TLSv1.3"
            assert _answer(tls) == b""
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode, old.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", host.port)) as tcp, pytest.raises(ssl.SSLError):
        old.wrap_socket(tcp)
    as_controller = load_authority(
        cluster.directory / "controller", load_settings(cluster.directory / "controller").controller
    ).client_context()
    with socket.create_connection(("127.0.0.1", host.port)) as tcp:
        as_controller.check_hostname = False
        with as_controller.wrap_socket(tcp) as tls:
            assert _answer(tls) == b"H", "a controller is let in"


def test_what_a_host_keeps_secret_only_its_owner_may_read(cluster: Cluster) -> None:
    for host in cluster.hosts.values():
        for path in (host.state / "identity").iterdir():
            assert path.stat().st_mode & 0o777 == 0o600, path
        for directory in (host.state / "identity", host.run / "doors", host.run / "moves"):
            assert directory.stat().st_mode & 0o777 == 0o700, directory
