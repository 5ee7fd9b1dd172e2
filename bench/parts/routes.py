"""The ways a migration can take from one QEMU to the other; each is an async context manager around one run.

sealift            QEMU - UNIX socket - relay - TCP, sealed, through the doorman - relay - UNIX socket - QEMU
qemu-plain         QEMU - TCP - QEMU, in clear
qemu-tls-x509      QEMU - its own TLS 1.3 (GnuTLS), certificates at both ends, AES-256-GCM forced - QEMU
qemu-tls-psk       the same with a pre-shared key and QEMU's default priorities
qemu-tls-psk-aes   the same with AES-128-GCM forced: with the 256-bit suite of TLS 1.3 GnuTLS has no such key
ssh                QEMU - UNIX socket - ssh -L, aes128-gcm@openssh.com - sshd - UNIX socket - QEMU
stunnel            QEMU - UNIX socket - stunnel, TLS 1.3 (OpenSSL), AES-256-GCM - stunnel - UNIX socket - QEMU
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.ends import End, Ends
from parts.machines import Machine, until
from parts.peers import Peers, write_certificates, write_psk
from parts.relays import connected_pair
from sealift.channel.local_sockets import SOURCE_SOCKET, TARGET_SOCKET
from sealift.hypervisor.process import spawn

_START_S = 30.0
_AES_256 = "NORMAL:-CIPHER-ALL:+AES-256-GCM"
_AES_128 = "NORMAL:-CIPHER-ALL:+AES-128-GCM"


@dataclass(frozen=True)
class Way:
    """Where the source is told to migrate to, the processes on the way by role, and how to know what they carried.

    ``carried`` returns when everything has arrived, with the bytes that each process on the way says it carried.
    """

    uri: str
    roles: dict[str, int]
    carried: Callable[[], Awaitable[list[int]]]


@dataclass(frozen=True)
class Trip:
    """What a route gets: both machines (the target waits for its order to listen), the hosts, and a directory."""

    source: Machine
    target: Machine
    ends: Ends
    root: Path
    channels: int  # QEMU's connections, the main one included
    peers: Peers


async def _nothing_to_say() -> list[int]:
    return []


@contextlib.asynccontextmanager
async def _sealift(trip: Trip) -> AsyncIterator[Way]:
    source, target = trip.source, trip.target
    async with connected_pair(
        "relay", trip.root, trip.channels, source_pid=source.pid, target_pid=target.pid, ends=trip.ends
    ) as relays:
        await target.order("migrate-incoming", {"uri": f"unix:{relays.target.directory / TARGET_SOCKET}"})

        async def carried() -> list[int]:
            await asyncio.gather(relays.source.until("drained"), relays.target.until("drained"))
            sealed, opened = await relays.source.client.status(), await relays.target.client.status()
            return [sealed["sealed_out"], opened["sealed_in"]]

        yield Way(f"unix:{relays.source.directory / SOURCE_SOCKET}", relays.roles, carried)


@contextlib.asynccontextmanager
async def _plain(trip: Trip) -> AsyncIterator[Way]:
    uri = f"tcp:{trip.ends.target.address}:{_free_port(trip.ends.target)}"
    await trip.target.order("migrate-incoming", {"uri": uri})
    yield Way(uri, {}, _nothing_to_say)


def _qemu_tls(kind: str, priority: str | None) -> Route:
    @contextlib.asynccontextmanager
    async def route(trip: Trip) -> AsyncIterator[Way]:
        if kind == "x509":
            write_certificates(trip.root, {trip.ends.target.address})
        else:
            write_psk(trip.root)
        for machine, endpoint in ((trip.source, "client"), (trip.target, "server")):
            credentials: dict[str, Any] = {"qom-type": f"tls-creds-{kind}", "id": "tls0", "dir": str(trip.root)}
            credentials |= {"endpoint": endpoint, "verify-peer": True} | ({"priority": priority} if priority else {})
            await machine.order("object-add", credentials)
            await machine.order("migrate-set-parameters", {"tls-creds": "tls0"})
        async with _plain(trip) as way:
            yield way

    return route


@contextlib.asynccontextmanager
async def _ssh(trip: Trip) -> AsyncIterator[Way]:
    """As Proxmox VE does it: the target's UNIX socket forwarded to one at the source, in one SSH connection.

    Each connect to it is a channel of that connection, opened in order, so multifd works; all of them share one cipher
    thread in each of the two processes.
    """
    listening = await _listen(trip)
    local, port = trip.root / "forwarded", _free_port(trip.ends.target)
    _write_ssh_files(trip, port)
    as_root = ["unshare", "--mount", "sh", "-ec", _SSHD_AS_ROOT, str(trip.root)] if os.geteuid() == 0 else []
    async with contextlib.AsyncExitStack() as stack:
        server = [*as_root, str(trip.peers.sshd), "-D", "-e", "-f", str(trip.root / "sshd_config")]
        sshd = await stack.enter_async_context(_daemon(server, trip.root / "sshd.log", trip.ends.target))
        await _tcp_is_served(trip.ends.target, port, trip.root / "sshd.log")
        options = {
            "Ciphers": "aes128-gcm@openssh.com",
            "IdentityFile": str(trip.root / "user"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": os.devnull,
            "StrictHostKeyChecking": "no",
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
            "LogLevel": "ERROR",
        }
        words = [word for option, value in options.items() for word in ("-o", f"{option}={value}")]
        client = [trip.peers.ssh, "-F", "none", *words, "-p", str(port), "-N", "-L", f"{local}:{listening}"]
        client.append(f"{getpass.getuser()}@{trip.ends.target.address}")
        ssh = await stack.enter_async_context(_daemon(client, trip.root / "ssh.log", trip.ends.source))
        await _appears(local, trip.root / "ssh.log")
        yield Way(f"unix:{local}", {"ssh_source": ssh, "sshd_target": sshd}, _nothing_to_say)


_SSHD_AS_ROOT = """
mount --bind "$0/passwd" /etc/passwd
mount --bind "$0/shadow" /etc/shadow
mount -t tmpfs run /run
mkdir /run/sshd
exec "$@"
"""
"""Started by root, sshd wants a user and a directory that its package makes, and a root who may log in. It finds them
in a mount namespace of its own; the system stays as it is."""


def _write_ssh_files(trip: Trip, port: int) -> None:
    _write(trip.root / "passwd", ["root:x:0:0::/:/bin/sh", "sshd:x:65533:65534::/run/sshd:/bin/false"])
    _write(trip.root / "shadow", ["root:x:19000::::::"])  # no password, and not locked
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", trip.root / name], check=True)
    config = [
        f"HostKey {trip.root / 'host'}",
        f"AuthorizedKeysFile {trip.root / 'user.pub'}",
        f"ListenAddress {trip.ends.target.address}:{port}",
        *("PidFile none", "UsePAM no", "StrictModes no", "UseDNS no", "LogLevel ERROR"),
        *trip.peers.sshd_helpers(),
    ]
    _write(trip.root / "sshd_config", config)


@contextlib.asynccontextmanager
async def _stunnel(trip: Trip) -> AsyncIterator[Way]:
    """A TLS connection, and a thread at each end, for each of QEMU's connections."""
    write_certificates(trip.root, {trip.ends.target.address})
    listening = await _listen(trip)
    local, port = trip.root / "local", _free_port(trip.ends.target)
    common = ["foreground = yes", "pid =", "syslog = no", "debug = 3"]
    tls = [f"CAfile = {trip.root / 'ca-cert.pem'}", "verifyChain = yes", "sslVersionMin = TLSv1.3"]
    tls.append("ciphersuites = TLS_AES_256_GCM_SHA384")
    address = f"{trip.ends.target.address}:{port}"
    for name, role in (("client", f"accept = {local}\nconnect = {address}"), ("server", f"accept = {address}")):
        service = [f"[migration]\nclient = {'yes' if name == 'client' else 'no'}", role]
        service += [f"connect = {listening}"] if name == "server" else []
        keys = [f"cert = {trip.root / name}-cert.pem", f"key = {trip.root / name}-key.pem"]
        _write(trip.root / f"{name}.conf", [*common, *service, *tls, *keys])
    async with contextlib.AsyncExitStack() as stack:
        pids = []
        for name, end in (("server", trip.ends.target), ("client", trip.ends.source)):
            log = trip.root / f"{name}.log"
            command = [str(trip.peers.stunnel), str(trip.root / f"{name}.conf")]
            pids.append(await stack.enter_async_context(_daemon(command, log, end)))
            await (_tcp_is_served(end, port, log) if name == "server" else _appears(local, log))
        yield Way(f"unix:{local}", {"stunnel_source": pids[1], "stunnel_target": pids[0]}, _nothing_to_say)


Route = Callable[[Trip], AbstractAsyncContextManager[Way]]

ROUTES: dict[str, Route] = {
    "sealift": _sealift,
    "qemu-plain": _plain,
    "qemu-tls-x509": _qemu_tls("x509", _AES_256),
    "qemu-tls-psk": _qemu_tls("psk", None),
    "qemu-tls-psk-aes": _qemu_tls("psk", _AES_128),
    "ssh": _ssh,
    "stunnel": _stunnel,
}
ENCRYPTED_PEERS = tuple(path for path in ROUTES if path not in ("sealift", "qemu-plain"))


async def _listen(trip: Trip) -> Path:
    path = trip.root / "incoming"
    await trip.target.order("migrate-incoming", {"uri": f"unix:{path}"})
    return path


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n")


@contextlib.asynccontextmanager
async def _daemon(command: list[str], log: Path, end: End) -> AsyncIterator[int]:
    """Another's program, ended on the way out, with what it printed when something went wrong."""
    with end.inside():
        process = spawn(command, log_path=log)
    try:
        yield process.pid
    except Exception:
        print(_text(log), end="", file=sys.stderr)
        raise
    finally:
        process.kill()  # sshd's children see their connection end
        await process.wait_exit(10)


async def _appears(path: Path, log: Path) -> None:
    await until(path.is_socket, lambda: f"nobody listens at {path}: {_text(log)}", _START_S)


async def _tcp_is_served(end: End, port: int, log: Path) -> None:
    def served() -> bool:
        with end.inside(), socket.socket() as probe:
            return probe.connect_ex((end.address, port)) == 0

    await until(served, lambda: f"nobody listens at {end.address}:{port}: {_text(log)}", _START_S)


def _text(log: Path) -> str:
    return log.read_text(errors="replace")


def _free_port(end: End) -> int:
    with end.inside(), socket.create_server((end.address, 0)) as server:
        port: int = server.getsockname()[1]
    return port
