"""Fixtures that every test can ask for by name."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ("support.guest", "support.command_line")

# A machine that stalls for a moment makes one example slow, and none wrong.
settings.register_profile("sealift", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sealift")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole systems first: with several workers the short tests then fill up what is left, and nobody waits at the
    end."""
    items.sort(key=lambda item: item.path.parent.name != "end_to_end")
