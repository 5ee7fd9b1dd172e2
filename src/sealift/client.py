"""Typed client of the controller's public API (``api.schemas``), over HTTPS with the controllers' authority pinned.

A problem document comes back as the error class it names; the document itself is the error's ``__cause__``
(``ProblemAnswer``), since a refused migration has more to say than one sentence. When nobody answers, or the answer
breaks off, that is ControllerUnreachable. The client is synchronous and not shared between threads.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import httpx2
from pydantic import BaseModel, TypeAdapter, ValidationError

from sealift.api import schemas
from sealift.domain.policy import MigrateEncryption
from sealift.domain.token import Token
from sealift.domain.vm import check_name
from sealift.errors import (
    ControllerUnreachable,
    FingerprintMismatch,
    InvalidInput,
    NotAuthenticated,
    SealiftError,
    from_slug,
)

CONNECT_S, ANSWER_S, SILENCE_S = 5.0, 120.0, 60.0
"""Longest wait for a connection, for an answer (a plan asks both hosts), and for a sign of life on the event stream."""

_Answer = TypeVar("_Answer")


class ProblemAnswer(Exception):
    """The problem document behind an error that the controller answered."""

    def __init__(self, problem: schemas.Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


@dataclass(frozen=True)
class Credentials:
    """What it takes to speak to a controller: ``https://host:port``, its authority (one PEM certificate), a token."""

    url: str
    authority: str
    token: Token


def normal_url(text: str) -> str:
    """``https://host:port`` of what a person wrote, port 7443 if none; raises InvalidInput."""
    bad = InvalidInput("this is not a controller's address", todo="write it as https://HOST:7443")
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        port = 7443 if parts.port is None else parts.port
    except ValueError:
        raise bad from None
    plain = not parts.query and not parts.fragment and parts.path in ("", "/") and "@" not in parts.netloc
    if parts.scheme != "https" or not parts.hostname or not port or not plain:
        raise bad
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"https://{host}:{port}"


def login(url: str, token: Token) -> tuple[Credentials, schemas.WhoAmI]:
    """Pin the authority that ``token`` names, then see that the controller takes the token.

    Until the fingerprint was compared nothing secret is sent. Raises FingerprintMismatch, NotAuthenticated,
    ControllerUnreachable.
    """
    url = normal_url(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint below is the check
    with _Connection(url, context, {}) as unverified:
        answer = unverified.ask(schemas.Authority, "GET", "authority")
    try:
        der = ssl.PEM_cert_to_DER_cert(answer.certificate)
    except ValueError:
        der = b""
    if hashlib.sha256(der).digest() != token.fingerprint:
        raise FingerprintMismatch(
            f"the controller at {url} is not the one this token is for, or somebody is in between",
            todo="check the address, and that the token is from this controller",
        )
    # Encoded anew, so that what is pinned is exactly the certificate that was compared.
    credentials = Credentials(url, ssl.DER_cert_to_PEM_cert(der), token)
    with Client(credentials) as client:
        return credentials, client.whoami()


class _Connection:
    """Requests under /api/v1, and what goes wrong with them in our own errors."""

    def __init__(self, url: str, context: ssl.SSLContext, headers: Mapping[str, str]) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.url = url
        self.http = httpx2.Client(
            base_url=f"{url}/api/v1/",
            verify=context,
            headers=headers,
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            trust_env=False,  # a proxy would end the TLS connection whose other end is pinned
        )

    def __enter__(self) -> _Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def ask(
        self,
        kind: type[_Answer],
        method: str,
        path: str,
        body: BaseModel | None = None,
        params: Mapping[str, int] | None = None,
    ) -> _Answer:
        """One request; its answer as ``kind``, which may be a model or a list of models."""
        response = self._send(method, path, body, params)
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError:
            raise SealiftError(
                f"the controller at {self.url} answered what this version does not understand",
                todo="update the command line to the controller's version",
            ) from None

    def tell(self, method: str, path: str) -> None:
        """One request whose answer says nothing."""
        self._send(method, path, None, None)

    def _send(
        self, method: str, path: str, body: BaseModel | None, params: Mapping[str, int] | None
    ) -> httpx2.Response:
        content = body.model_dump_json().encode() if body else None
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            response = self.http.request(method, path, content=content, headers=headers, params=params)
        except httpx2.TransportError as error:
            raise self.broken(error) from error
        if not response.is_success:
            raise self.problem(response)
        return response

    def problem(self, response: httpx2.Response) -> SealiftError:
        """The error that an answer is; its body was read."""
        try:
            problem = schemas.Problem.model_validate_json(response.content)
        except ValidationError:
            what = f"the controller at {self.url} answered status {response.status_code} without saying why"
            if response.status_code == NotAuthenticated.status:
                return NotAuthenticated(what, todo="run `sealift login`")
            return SealiftError(what, todo="see the controller's log")
        error = from_slug(problem.slug, problem.detail, problem.todo)
        error.__cause__ = ProblemAnswer(problem)
        return error

    def broken(self, error: httpx2.TransportError) -> SealiftError:
        """Our error for one of the transport."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return FingerprintMismatch(
                    f"the certificate shown at {self.url} was refused: {cause.verify_message}",
                    todo="use an address the controller was set up with; if its authority is new, log in again",
                )
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            what = f"the controller does not answer at {self.url}"
        else:
            what = f"the connection to the controller at {self.url} broke off"
        return ControllerUnreachable(what, todo="see that the controller runs and its port can be reached from here")


class Client:
    """The controller's resources. Every method may raise ControllerUnreachable, NotAuthenticated and, for the
    resource it names, NotFound or InvalidInput; what else is said with the method. Use it as a context manager, or
    ``close`` it."""

    def __init__(self, credentials: Credentials) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=credentials.authority)
        except (ssl.SSLError, ValueError):
            raise InvalidInput("the stored authority is not a certificate", todo="run `sealift login` again") from None
        headers = {"Authorization": f"Bearer {credentials.token.text()}"}
        self._connection = _Connection(credentials.url, context, headers)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; doing it twice is fine."""
        self._connection.http.close()

    def whoami(self) -> schemas.WhoAmI:
        """Whose token this is, and who answers."""
        return self._connection.ask(schemas.WhoAmI, "GET", "whoami")

    def join_token(self, replaces: str | None = None) -> schemas.JoinToken:
        """A token for one host to join with, in the place of host ``replaces`` if given."""
        return self._connection.ask(
            schemas.JoinToken, "POST", "join-tokens", schemas.JoinTokenRequest(replaces=replaces)
        )

    def hosts(self) -> list[schemas.Host]:
        """All hosts."""
        return self._connection.ask(list[schemas.Host], "GET", "hosts")

    def host(self, name: str) -> schemas.Host:
        """One host."""
        return self._connection.ask(schemas.Host, "GET", f"hosts/{check_name('host', name)}")

    def remove_host(self, name: str) -> None:
        """Forget a host; raises Conflict while it has VMs."""
        self._connection.tell("DELETE", f"hosts/{check_name('host', name)}")

    def accept_host(self, name: str) -> schemas.Host:
        """Take a host as it is now, after it lost a capability."""
        return self._connection.ask(schemas.Host, "POST", f"hosts/{check_name('host', name)}/accept")

    def vms(self) -> list[schemas.Vm]:
        """All VMs."""
        return self._connection.ask(list[schemas.Vm], "GET", "vms")

    def vm(self, name: str) -> schemas.Vm:
        """One VM."""
        return self._connection.ask(schemas.Vm, "GET", f"vms/{check_name('VM', name)}")

    def create_vm(self, host: str, config: str) -> schemas.Vm:
        """Define a VM on ``host`` from the text of its TOML file; raises InvalidInput, AlreadyExists."""
        return self._connection.ask(schemas.Vm, "POST", "vms", schemas.VmCreate(host=host, config=config))

    def change_vm(self, name: str, migrate_encryption: MigrateEncryption) -> schemas.Vm:
        """Set whether a VM moves encrypted."""
        change = schemas.VmChange(migrate_encryption=migrate_encryption)
        return self._connection.ask(schemas.Vm, "PATCH", f"vms/{check_name('VM', name)}", change)

    def start_vm(self, name: str) -> schemas.Vm:
        """Start a VM; raises Conflict, VmLetGo and HypervisorError's classes."""
        return self._connection.ask(schemas.Vm, "POST", f"vms/{check_name('VM', name)}/start")

    def stop_vm(self, name: str, *, force: bool = False) -> schemas.Vm:
        """Ask the guest to power down, or kill it; raises Conflict."""
        return self._connection.ask(
            schemas.Vm, "POST", f"vms/{check_name('VM', name)}/stop", schemas.VmStop(force=force)
        )

    def delete_vm(self, name: str) -> None:
        """Forget a stopped VM, never its disks; raises Conflict."""
        self._connection.tell("DELETE", f"vms/{check_name('VM', name)}")

    def migrate(self, wish: schemas.MigrationCreate) -> schemas.Migration:
        """Begin a migration, or only plan it (``dry_run``); raises PlanRefused and its kin, Conflict."""
        return self._connection.ask(schemas.Migration, "POST", "migrations", wish)

    def migrations(self) -> list[schemas.Migration]:
        """The newest migrations, newest first."""
        return self._connection.ask(list[schemas.Migration], "GET", "migrations")

    def migration(self, migration: UUID) -> schemas.Migration:
        """One migration as it stands now."""
        return self._connection.ask(schemas.Migration, "GET", f"migrations/{migration}")

    def cancel(self, migration: UUID) -> schemas.Migration:
        """Ask for a migration to end at its source; raises Conflict when it is too late for that."""
        return self._connection.ask(schemas.Migration, "POST", f"migrations/{migration}/cancel")

    def events(self, after: int = 0) -> Iterator[schemas.Event]:
        """The events with a number above ``after`` that there are, oldest first."""
        while True:
            page = self._connection.ask(list[schemas.Event], "GET", "events", params={"after": after})
            yield from page
            if not page or page[-1].seq <= after:
                return
            after = page[-1].seq

    def follow(self, after: int = 0, *, patience_s: float = 60.0, pause_s: float = 0.5) -> Iterator[schemas.Event]:
        """The events with a number above ``after``, for ever, each once and in order.

        When the stream breaks off it is taken up after the last event; ControllerUnreachable is raised once nobody
        has answered for ``patience_s``. Between attempts it pauses ``pause_s``, then longer, up to 5 s.
        """
        silent_since, pause = None, pause_s
        while True:
            try:
                for event in self._stream(after):
                    silent_since = None
                    if event is not None:
                        after, pause = event.seq, pause_s
                        yield event
                failure: SealiftError = ControllerUnreachable("the controller ended the stream of events")
            except httpx2.TransportError as error:
                failure = self._connection.broken(error)
                if not isinstance(failure, ControllerUnreachable):
                    raise failure from error
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since >= patience_s:
                raise failure
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def _stream(self, after: int) -> Iterator[schemas.Event | None]:
        """One connection's events; None first, when the controller has answered."""
        with self._connection.http.sse(
            "events",
            params={"after": after},
            headers={"Last-Event-ID": str(after)},
            timeout=httpx2.Timeout(CONNECT_S, read=SILENCE_S),
        ) as source:
            if not source.response.is_success:
                source.response.read()
                raise self._connection.problem(source.response)
            yield None
            for sent in source:
                if sent.data:
                    yield schemas.Event.model_validate_json(sent.data)
