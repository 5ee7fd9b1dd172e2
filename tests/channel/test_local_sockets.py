"""The local sockets of a relay are for one process, as often as planned: whoever else is there first gets nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from sealift.channel.local_sockets import SOURCE_SOCKET, TARGET_SOCKET, ExpectedPeer, SourceListener, dial_target
from sealift.errors import LocalClosed, LocalPeerRefused
from support.relays import PATIENCE, Site, TargetSide, channel_spec, dial_local, exactly, read_all

CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect(sys.argv[1]); "
LISTEN = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.bind(sys.argv[1]); s.listen(); "
    "print('listening', flush=True); c, _ = s.accept(); print(c.recv(100))"
)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as made:
        yield made


@pytest.fixture
def directory() -> Iterator[str]:
    """Short, because of the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="sl-") as made:
        yield made


@contextlib.contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process of the same user; killed at the end if it has not ended by itself."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        try:
            yield started
        finally:
            started.kill()


def test_others_that_connect_first_are_refused_and_counted_and_the_right_one_is_let_in(site: Site) -> None:
    with site.pair(channel_spec(2)) as pair:
        path = f"{pair.source.directory}/{SOURCE_SOCKET}"
        said = CONNECT + "s.sendall(b'I am QEMU'); print(s.recv(1) == b'')"
        for _ in range(3):
            with process(said, path) as stranger:
                assert stranger.communicate(timeout=3 * PATIENCE)[0] in (b"True\n", b"")  # closed, or reset
        pair.source.event("refused", nth=3)
        assert pair.source.status()["refused"] == {"local_peer_refused": 3}
        assert pair.target_side.nothing_came(), "they take no channel"
        for n in range(2):
            near, far = pair.connect()
            near.sendall(b"channel %d" % n)
            assert exactly(far, 9) == b"channel %d" % n
        assert pair.source.status()["refused"] == {"local_peer_refused": 3}


def test_after_the_planned_number_of_connections_there_is_no_socket_any_more(site: Site) -> None:
    with site.pair(channel_spec(2)) as pair, contextlib.ExitStack() as stack:
        path = f"{pair.source.directory}/{SOURCE_SOCKET}"
        surplus = []
        for _ in range(8):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(PATIENCE)
            with contextlib.suppress(OSError):  # gone already, or too many at once
                sock.connect(path)
                surplus.append(sock)
        assert len(surplus) >= 2
        for near in surplus[:2]:
            far = pair.accept()
            near.sendall(b"a channel's")
            assert exactly(far, 11) == b"a channel's"
        assert not os.path.exists(path)
        for sock in surplus[2:]:  # they had come in before it was closed
            assert read_all(sock) == b""
        assert pair.target_side.nothing_came()


def test_the_right_process_is_not_taken_for_itself_once_it_has_ended(directory: str) -> None:
    """Else whoever got its number next would be."""
    with process("input()\n" + CONNECT + "s.sendall(b'x')", f"{directory}/{SOURCE_SOCKET}") as expected:
        peer = ExpectedPeer(expected.pid)
        listener = SourceListener(directory, peer, 1)
        expected.communicate(b"\n", timeout=3 * PATIENCE)
        with pytest.raises(LocalPeerRefused, match="has ended"):
            listener.accept()
        listener.close()
        peer.close()


def test_a_process_that_does_not_exist_is_not_waited_for() -> None:
    with process("pass") as ended:
        ended.wait(3 * PATIENCE)
    with pytest.raises(LocalPeerRefused, match="no process"):
        ExpectedPeer(ended.pid)


def test_only_the_owner_may_connect_to_the_source(directory: str) -> None:
    peer = ExpectedPeer(os.getpid())
    listener = SourceListener(directory, peer, 1)
    assert os.stat(f"{directory}/{SOURCE_SOCKET}").st_mode & 0o777 == 0o600
    listener.close()
    assert os.listdir(directory) == []
    peer.close()


def test_another_that_listens_in_the_targets_place_gets_not_one_byte(site: Site) -> None:
    spec, secret = channel_spec(), os.urandom(40)
    target = TargetSide(site, spec, secret, listens=False)
    with process(LISTEN, f"{target.relay.directory}/{TARGET_SOCKET}") as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"listening\n"
        source = site.start_source(spec, secret)
        with dial_local(source.directory) as near:
            with contextlib.suppress(ConnectionError):
                near.sendall(b"memory of the guest")
            assert target.relay.event("broken")["slug"] == "local_peer_refused"
            assert read_all(near) == b""
        assert stranger.communicate(timeout=3 * PATIENCE)[0] == b"b''\n"
    target.close()


def test_the_right_one_at_the_targets_place_is_dialled_and_another_is_not(directory: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening, process("input()") as other:
        listening.bind(f"{directory}/{TARGET_SOCKET}")
        listening.listen()
        ours, theirs = ExpectedPeer(os.getpid()), ExpectedPeer(other.pid)
        with pytest.raises(LocalPeerRefused):
            dial_target(directory, theirs)
        dial_target(directory, ours).close()
        listening.close()
        with pytest.raises(LocalClosed):
            dial_target(directory, ours)
        ours.close()
        theirs.close()
