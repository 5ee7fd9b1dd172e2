"""How long a broken link between two hosts is waited for, in milliseconds: what holds if nobody says, and the bounds.

Here and nowhere else; it imports nothing, so that the command line can show the defaults without loading the rest.
"""

from typing import Final

GIVE_UP_MS: Final = 60_000
"""While the guest runs at the source, and so loses nothing by waiting."""
GIVE_UP_BOUNDS_MS: Final = (1_000, 24 * 3_600_000)

SWITCHOVER_TIMEOUT_MS: Final = 5_000
"""While the guest stands still and could still go on at the source. After that nobody gives up."""
SWITCHOVER_TIMEOUT_BOUNDS_MS: Final = (1_000, 60_000)
