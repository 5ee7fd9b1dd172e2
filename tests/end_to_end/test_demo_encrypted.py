"""The demonstration of encrypted VMs as a stranger runs it, with its key servers: it ends well, its proofs hold."""

from __future__ import annotations

import os
import subprocess

import pytest

from sealift.demo.cluster import Cluster
from sealift.demo.guest import GuestImage
from support.guest import CACHE

pytestmark = pytest.mark.qemu


@pytest.mark.timeout(300)
def test_the_demonstration_of_encrypted_vms_proves_what_it_says(guest_image: GuestImage) -> None:
    environment = {**os.environ, "SEALIFT_CACHE": str(CACHE)}
    argv = Cluster.argv("demo", "encrypted")
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count("  proved  ") >= 35
    assert "LOCKED" in done.stdout
    assert "What was done" in done.stdout
