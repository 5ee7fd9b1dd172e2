"""The test guest for tests that boot it; tests/conftest.py makes the fixture known."""

import os
from pathlib import Path

import pytest

from sealift.demo.guest import GuestImage, prepare

CACHE = Path(os.environ.get("SEALIFT_CACHE") or Path(__file__).parents[2] / ".cache")


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """Kernel and initramfs of the test guest; made at first use in SEALIFT_CACHE or the repository's ``.cache``."""
    return prepare(CACHE)
