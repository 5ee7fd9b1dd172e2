"""Pages that are drawn from the code: ``python tests/support/generated_docs.py`` writes them, the tests compare."""

from __future__ import annotations

from pathlib import Path

from sealift.domain.lifecycle import CANCELLABLE, FINAL, State, diagram
from sealift.errors import all_errors

DOCS = Path(__file__).parents[2] / "docs"
ERRORS = DOCS / "errors.md"
LIFECYCLE = DOCS / "lifecycle.md"

_SAYS = {
    State.REQUESTED: "asked for and recorded; nothing was looked at yet",
    State.PLANNED: "every check passed; nothing was touched yet",
    State.REFUSED: "a check or the policy said no; nothing was touched",
    State.PREPARING: "key drawn, spec handed out; relays and the target's QEMU are being started",
    State.PRECOPY: "memory is copied while the guest runs at the source",
    State.SWITCHOVER: "the guest is stopped at the source; device state is in flight",
    State.COMMITTING: "the source let go; the target takes over",
    State.CLEANING: "the guest runs at the target; leftovers at the source are removed",
    State.DONE: "the VM runs at the target",
    State.FAILED: "the VM runs at the source as before; the target is empty",
    State.CANCELLED: "the same, because somebody asked",
    State.CRASHED: "the VM's QEMU is gone; it can be started from its disk at the host that owns it",
    State.OUTCOME_UNKNOWN: "it cannot be known who has the VM; it stays paused, and a person must look",
}


def errors_page() -> str:
    """Every error class as a row."""
    rows = [
        f"| `{cls.slug}` | {cls.status} | {cls.exit_code} | {(cls.__doc__ or '').splitlines()[0]} |"
        for cls in all_errors()
    ]
    head = [
        "# Errors",
        "",
        "Generated from `src/sealift/errors/`; do not edit.",
        "",
        "An answer of the API carries the slug in its problem document (RFC 9457), with `detail` saying what happened",
        "and `todo` what to do; the command line ends with the exit code.",
        "",
        "| slug | HTTP | exit | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def lifecycle_page() -> str:
    """States, their meaning, and the diagram."""
    rows = [
        f"| `{state.value}` | {'yes' if state in FINAL else ''} | {'yes' if state in CANCELLABLE else ''} "
        f"| {_SAYS[state]} |"
        for state in State
    ]
    head = [
        "# The life of a migration",
        "",
        "Generated from `src/sealift/domain/lifecycle.py`; do not edit.",
        "",
        "A state is recorded before the effect it stands for is performed.",
        "",
        "| state | final | can be cancelled | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, "", "```mermaid", diagram().rstrip(), "```"]) + "\n"


if __name__ == "__main__":
    ERRORS.write_text(errors_page())
    LIFECYCLE.write_text(lifecycle_page())
