"""A real guest is moved between network namespaces over a long and lossy cable that goes dark for a while."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealift.demo.cluster import Cluster
from sealift.demo.guest import GuestImage
from support.faults import RelayLine, settled
from support.namespaces import Site, Unavailable, two_sites
from support.running_guest import Guest

pytestmark = pytest.mark.qemu

DELAY_S, LOSS_PERCENT = 0.1, 1
DOORMAN_PORT = 7421


@pytest.fixture
def sites() -> Iterator[dict[str, Site]]:
    try:
        with two_sites(delay_s=DELAY_S, loss_percent=LOSS_PERCENT) as made:
            yield made
    except Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def far_guest(sites: dict[str, Site], guest_image: GuestImage) -> Iterator[Guest]:
    directory = Path(tempfile.mkdtemp(prefix="sl-"))
    cluster = Cluster(directory / "c")
    try:
        cluster.start()
        for name, site in sites.items():
            doorman = f"{site.cable}:{DOORMAN_PORT}"
            cluster.add_host(
                name, address=site.address, prefix=site.prefix, migration_listen=doorman, migration_address=doorman
            )
        guest = Guest(cluster, guest_image, "far", host="a", filled=4, dirty=0)
        guest.make_run()
        yield guest
        guest.close()
    finally:
        cluster.close()
        shutil.rmtree(directory, ignore_errors=True)


def test_one_percent_loss_a_tenth_of_a_second_and_a_black_hole(far_guest: Guest, sites: dict[str, Site]) -> None:
    """Packets are lost at random both ways and each is 100 ms late; none comes through, first of one connection."""
    source, target = far_guest.host, far_guest.other()
    lost = far_guest.console.ticks.lost()
    ident = far_guest.begin(target, "--channels", "4", "--max-downtime", "5s")
    with RelayLine(source) as relay:
        while (round_trip := relay.ask("status")["rtt_us"]) is None:
            pass
        assert round_trip >= 2e6 * DELAY_S
        while not relay.ask("status")["acked_out"]:
            pass
        sites[target.name].swallow_one(DOORMAN_PORT)
        assert relay.hear("interrupted", slug="peer_silent")
        assert relay.hear("resumed")
        sites[target.name].swallow()
        assert relay.hear("interrupted", channel=0, slug="peer_silent")
        sites[target.name].heal()
    record = settled(far_guest, ident, source, target, lost_before=lost)
    assert (record["state"], record["protection"]) == ("done", "sealed")
    assert all(site.lost() > 0 for site in sites.values())
