"""What the controller's tests share."""

from __future__ import annotations

import pytest

from sealift.controller import inventory


@pytest.fixture(autouse=True)
def _time_for_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at VMs waits for keys as long as a busy machine needs, except where a test says otherwise."""
    monkeypatch.setattr(inventory, "JUDGE_S", 30.0)
