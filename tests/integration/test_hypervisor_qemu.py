"""The conformance suite on real QEMU, and what is QEMU's own. Everything here fails, not skips, without QEMU."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from contract.check_hypervisor import CHECKS, Bench, check_hypervisor
from sealift.domain.vm import Accelerator
from sealift.hypervisor.base import Hypervisor
from sealift.hypervisor.qemu import QemuHypervisor

pytestmark = pytest.mark.qemu


@pytest.fixture
def root() -> Iterator[Path]:
    """A short directory: pytest's own are too long for UNIX sockets."""
    with tempfile.TemporaryDirectory(prefix="slh-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def hypervisor() -> Hypervisor:
    return QemuHypervisor("qemu-system-x86_64", Accelerator.TCG)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Bench], Awaitable[None]], hypervisor: Hypervisor, root: Path) -> None:
    asyncio.run(check_hypervisor(hypervisor, root, (check,)))
