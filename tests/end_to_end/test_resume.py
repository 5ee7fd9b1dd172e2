"""A real guest is moved over a link that is reset again and again: the move is done and the guest notices nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealift.demo.cluster import Cluster
from sealift.demo.guest import GuestImage
from support.cutter import Cutter
from support.ports import free_port
from support.running_guest import Guest

pytestmark = pytest.mark.qemu

RESETS, RESET_EVERY = 20, 1 << 20


@pytest.fixture(scope="module")
def behind_cutters() -> Iterator[tuple[Cluster, dict[str, Cutter]]]:
    """Two hosts; what others are told of their migration ports is a cutter's."""
    directory = Path(tempfile.mkdtemp(prefix="sl-"))
    cluster, cutters = Cluster(directory / "c"), {}
    try:
        cluster.start()
        for name in "ab":
            doorman = free_port()
            cutters[name] = Cutter(doorman, reset_every=RESET_EVERY)
            cutters[name].__enter__()
            listen = f"127.0.0.1:{doorman}"
            cluster.add_host(name, migration_port=cutters[name].port, migration_listen=listen)
        yield cluster, cutters
    finally:
        cluster.close()
        for cutter in cutters.values():
            cutter.__exit__()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cut_guest(behind_cutters: tuple[Cluster, dict[str, Cutter]], guest_image: GuestImage) -> Iterator[Guest]:
    guest = Guest(behind_cutters[0], guest_image, "cut", host="a")
    yield guest
    guest.close()


@pytest.mark.parametrize("channels", [1, 4])
def test_twenty_resets_in_one_move_cost_no_tick(
    cut_guest: Guest, behind_cutters: tuple[Cluster, dict[str, Cutter]], channels: int
) -> None:
    cut_guest.make_run()
    source = cut_guest.host
    target = cut_guest.other()
    cutter = behind_cutters[1][target.name]
    cutter.resets_left = RESETS
    record = cut_guest.migrate(target, "--channels", str(channels))
    assert record["state"] == "done"
    assert record["protection"] == "sealed"
    assert cutter.resets_left == 0
    assert cut_guest.copies() == [target.name]
    assert cut_guest.nothing_left(source)
    assert cut_guest.unharmed()
    assert cut_guest.console.ticks.lost() == 0
