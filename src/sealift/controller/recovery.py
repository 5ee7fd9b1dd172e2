"""What a controller does first: take up again what an earlier life of it left unfinished.

Nothing is repeated. A migration whose spec was not handed out ends as failed: the VM was not touched. For every other
one both agents are asked about the attempt, and their journals say how to go on: the source knows it, then it is
watched to its end; it does not, then the attempt is marked as aborted on both hosts, so that an order still on its way
is refused when it comes, and the migration ends as failed. The secret died with the earlier life, and is not needed.
"""

from __future__ import annotations

import structlog

from sealift.controller.ledger import Ledger
from sealift.controller.orchestrator import Orchestrator

log = structlog.get_logger("sealift.recovery")


async def recover(ledger: Ledger, orchestrator: Orchestrator) -> int:
    """Resume every migration that is unfinished or not tidied up; answers how many."""
    rows = await ledger.open()
    for row in rows:
        log.info("taking up a migration", migration=str(row.id), vm=row.vm_name, state=row.state)
        orchestrator.resume(row)
    return len(rows)
