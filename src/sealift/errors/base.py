"""The root of every error, the errors that belong to no one room, and how an error crosses the wire."""

from __future__ import annotations

import json
from typing import Any, ClassVar


class SealiftError(Exception):
    """Something unexpected went wrong inside Sealift; the log of the process that said so has the details."""

    slug: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, todo: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.todo = todo

    def __str__(self) -> str:
        return f"{self.what} ({self.todo})" if self.todo else self.what


class InvalidInput(SealiftError):
    """The request or file does not say what it must; nothing was changed."""

    slug, status, exit_code = "invalid_input", 422, 2


class NotFound(SealiftError):
    """There is no such host, VM, migration, conversion, key provider, setting or page."""

    slug, status, exit_code = "not_found", 404, 4


class AlreadyExists(SealiftError):
    """Something of that name or uuid is already there."""

    slug, status, exit_code = "already_exists", 409, 4


class Conflict(SealiftError):
    """The VM, host, key provider, migration or conversion is not in a state that allows this now."""

    slug, status, exit_code = "conflict", 409, 4


class AuthenticationError(SealiftError):
    """The other side could not show who it is."""

    slug, status, exit_code = "authentication_failed", 401, 6


class NotAuthenticated(AuthenticationError):
    """The request carries no valid access token; run `sealift login`."""

    slug, status, exit_code = "not_authenticated", 401, 6


class TokenInvalid(AuthenticationError):
    """The join token is not one this controller gave out."""

    slug, status, exit_code = "token_invalid", 401, 6


class TokenUsed(AuthenticationError):
    """The join token was used already, by another key."""

    slug, status, exit_code = "token_used", 401, 6


class TokenExpired(AuthenticationError):
    """The join token is older than its hour; make a new one with `sealift host token`."""

    slug, status, exit_code = "token_expired", 401, 6


class FingerprintMismatch(AuthenticationError):
    """The controller's authority is not the one the token names: wrong address, or somebody is in between."""

    slug, status, exit_code = "fingerprint_mismatch", 502, 6


class HostIdentityMismatch(AuthenticationError):
    """Whoever answers at a host's address is not that host; no order was sent."""

    slug, status, exit_code = "host_identity_mismatch", 502, 6


class Unreachable(SealiftError):
    """Nobody answered in time."""

    slug, status, exit_code = "unreachable", 502, 5


class ControllerUnreachable(Unreachable):
    """The controller did not answer at its address."""

    slug, status, exit_code = "controller_unreachable", 502, 5


class HostUnreachable(Unreachable):
    """The host's agent did not answer the controller."""

    slug, status, exit_code = "host_unreachable", 502, 5


class PlanRefused(SealiftError):
    """A migration or conversion was refused before anything was changed; the message says by whom and why."""

    slug, status, exit_code = "plan_refused", 409, 3


class HostNameTaken(SealiftError):
    """A host of that name has joined already; a token made with `--replaces` lets a new machine take its place."""

    slug, status, exit_code = "host_name_taken", 409, 4


class StaleFence(SealiftError):
    """The order carries a lower fence number than one already seen for this VM: it comes from the past."""

    slug, status, exit_code = "stale_fence", 409, 4


class VmLetGo(SealiftError):
    """This host has let the VM go in a migration; starting it here could run it twice."""

    slug, status, exit_code = "vm_let_go", 409, 3


class ToolMissing(SealiftError):
    """A program or package that the demonstration needs is not to be had on this machine."""

    slug, status, exit_code = "tool_missing", 500, 1


class SelfTestFailed(SealiftError):
    """The cipher on this host does not compute its known answers; sealed moves are refused here."""

    slug, status, exit_code = "self_test_failed", 500, 1


class MemoryUnprotected(SealiftError):
    """The kernel did not let a process that will hold keys forbid dumps of its memory; the process did not start."""

    slug, status, exit_code = "memory_unprotected", 500, 1


class IllegalTransition(SealiftError):
    """The lifecycle has no such step from the present state (a defect in Sealift)."""

    slug, status, exit_code = "illegal_transition", 500, 1


def all_errors() -> list[type[SealiftError]]:
    """Every error class, root first, in the order of definition."""
    found: list[type[SealiftError]] = []
    waiting: list[type[SealiftError]] = [SealiftError]
    while waiting:
        cls = waiting.pop(0)
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return found


def from_slug(slug: str, what: str, todo: str = "") -> SealiftError:
    """The error that crossed the wire as ``slug``, as its own class again; the root class if we do not know it."""
    for cls in all_errors():
        if cls.slug == slug:
            return cls(what, todo=todo)
    return SealiftError(f"{slug}: {what}", todo=todo)


def to_problem(error: SealiftError) -> dict[str, Any]:
    """The problem document (RFC 9457) of an error, with ``slug`` and ``todo`` as extension members."""
    return {
        "type": "about:blank",
        "title": (type(error).__doc__ or "").strip(),
        "status": error.status,
        "detail": error.what,
        "slug": error.slug,
        "todo": error.todo,
    }


def from_problem(body: bytes, status: int) -> SealiftError:
    """The error in a problem document; the root class when the answer is something else."""
    try:
        document = json.loads(body)
        return from_slug(str(document["slug"]), str(document["detail"]), str(document.get("todo", "")))
    except (ValueError, KeyError, TypeError):
        return SealiftError(f"the answer was HTTP {status} and not one of Sealift's")
