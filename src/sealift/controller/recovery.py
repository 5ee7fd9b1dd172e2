"""What a controller does first: take up again what an earlier life of it left unfinished.

Nothing is repeated. A migration whose spec was not handed out ends as failed: the VM was not touched. For every other
one both agents are asked about the attempt, and their journals say how to go on: the source knows it, then it is
watched to its end; it does not, then the attempt is marked as aborted on both hosts, so that an order still on its way
is refused when it comes, and the migration ends as failed. The secret died with the earlier life, and is not needed.

The same holds for conversions: the host's journal says how one stands, and one whose order it never got ends as failed,
since the keys of the order died with the earlier life. A shallow rekey is carried on from the file in its record.
"""

from __future__ import annotations

import structlog

from sealift.controller.conversions import Conversions
from sealift.controller.encryption import Encryption
from sealift.controller.ledger import Ledger
from sealift.controller.orchestrator import Orchestrator

log = structlog.get_logger("sealift.recovery")


async def recover(ledger: Ledger, orchestrator: Orchestrator, conversions: Conversions, encryption: Encryption) -> int:
    """Resume every migration and conversion that is unfinished or not tidied up; answers how many."""
    rows = await ledger.open()
    for row in rows:
        log.info("taking up a migration", migration=str(row.id), vm=row.vm_name, state=row.state)
        orchestrator.resume(row)
    converting = await conversions.open()
    for each in converting:
        log.info("taking up a conversion", conversion=str(each.id), vm=each.vm_name, state=each.state)
        encryption.resume(each)
    return len(rows) + len(converting)
