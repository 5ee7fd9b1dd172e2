"""One controller and three hosts for the whole session, and a real guest on the first of them."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealift.demo.cluster import Cluster
from sealift.demo.guest import GuestImage
from support.encrypted import Home
from support.faults import CutCluster, cut_cluster
from support.guest import CACHE
from support.running_guest import Guest


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Hosts a and b can seal, host c cannot. Its path is short, because UNIX sockets lie below it."""
    directory = Path(tempfile.mkdtemp(prefix="sl-"))
    made = Cluster(directory / "c")
    try:
        made.start()
        for name in "abc":
            made.add_host(name, sealed_channel=name != "c")
        yield made
    finally:
        made.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def the_guest(cluster: Cluster, guest_image: GuestImage) -> Iterator[Guest]:
    guest = Guest(cluster, guest_image, "guest", host="a")
    yield guest
    guest.close()


@pytest.fixture
def guest(cluster: Cluster, the_guest: Guest) -> Iterator[Guest]:
    """The guest, running and sealed by choice, with every process of the cluster up; checked again afterwards."""
    _heal(cluster)
    the_guest.make_run()
    cluster.sealift("vm", "set", the_guest.name, "--migrate-encryption", "opportunistic")
    yield the_guest
    _heal(cluster)


@pytest.fixture(scope="session")
def home(cluster: Cluster) -> Home:
    """The key provider of the cluster."""
    return Home(cluster)


@pytest.fixture(scope="session")
def datastore() -> Iterator[Path]:
    """A directory that takes direct I/O, as tmpfs does not."""
    CACHE.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="datastore-", dir=CACHE))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def behind_cutters() -> Iterator[CutCluster]:
    """Two more hosts, and a link between them that can be broken."""
    with cut_cluster() as made:
        yield made


@pytest.fixture(scope="module")
def the_cut_guest(
    behind_cutters: CutCluster, guest_image: GuestImage, request: pytest.FixtureRequest
) -> Iterator[Guest]:
    """A guest of the module's own; it is stopped when the module is done."""
    name = request.module.__name__.rpartition("test_")[2]
    guest = Guest(behind_cutters.cluster, guest_image, name, host="a")
    yield guest
    guest.cluster.sealift("vm", "stop", "--force", guest.name)
    guest.close()


@pytest.fixture
def cut_guest(behind_cutters: CutCluster, the_cut_guest: Guest) -> Iterator[Guest]:
    """The guest, running, over a link that is whole."""
    behind_cutters.calm()
    the_cut_guest.make_run()
    yield the_cut_guest
    behind_cutters.calm()


def _heal(cluster: Cluster) -> None:
    """A test may have ended processes of the cluster; the next one finds them all."""
    for host in cluster.hosts.values():
        if host.process is not None:
            host.process.send_signal(signal.SIGCONT)
        if host.process is None or host.process.poll() is not None:
            cluster.start_agent(host)
    if not cluster.controller_runs:
        cluster.start_controller()
