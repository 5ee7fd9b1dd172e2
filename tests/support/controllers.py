"""A controller of a test's own: made by the real ``init`` parts, in a temporary directory, closed whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

from sealift.controller.authority import create_authority, write_private
from sealift.controller.orchestrator import draw_secret
from sealift.controller.run import Draw
from sealift.controller.services import Services, Settings, open_services, settings_path
from sealift.controller.watch import Pace

FAST = Pace(poll_s=0.01, ready_s=30.0, grace_s=0.05, patience_s=0.3, again_s=0.05, tidy_s=0.1, keep_s=60.0)


def make_state(directory: Path) -> Path:
    """A state directory as ``init`` leaves it, without tokens."""
    state = directory / "controller"
    state.mkdir(mode=0o700)
    settings = Settings(uuid4(), "127.0.0.1:7443", ("127.0.0.1", "localhost"))
    create_authority(state, settings.controller)
    write_private(settings_path(state), settings.dump())
    return state


@contextlib.asynccontextmanager
async def a_controller(state: Path, *, draw: Draw = draw_secret, pace: Pace = FAST) -> AsyncIterator[Services]:
    """The controller in ``state``, begun as after a start: what was unfinished is taken up."""
    services = await open_services(state, draw=draw, pace=pace)
    try:
        await services.start()
        yield services
    finally:
        await services.close()
