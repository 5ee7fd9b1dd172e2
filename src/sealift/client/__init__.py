"""Typed client of the controller's public API (``api.schemas``), over HTTPS with the controllers' authority pinned.

How errors come back says ``client.connection``. The client is synchronous and not shared between threads.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from uuid import UUID

import httpx2

from sealift.api import schemas
from sealift.api.encryption import Verify
from sealift.client.connection import CONNECT_S, SILENCE_S, Connection, ProblemAnswer, named, normal_url
from sealift.client.encryption import EncryptedVms, KeyProviders, Settings
from sealift.domain.policy import MigrateEncryption
from sealift.domain.token import Token
from sealift.errors import ControllerUnreachable, FingerprintMismatch, InvalidInput, SealiftError

__all__ = ["Client", "Credentials", "ProblemAnswer", "Token", "login", "normal_url"]


@dataclass(frozen=True)
class Credentials:
    """What it takes to speak to a controller: ``https://host:port``, its authority (one PEM certificate), a token."""

    url: str
    authority: str
    token: Token


def login(url: str, token: Token) -> tuple[Credentials, schemas.WhoAmI]:
    """Pin the authority that ``token`` names, then see that the controller takes the token.

    Until the fingerprint was compared nothing secret is sent. Raises FingerprintMismatch, NotAuthenticated,
    ControllerUnreachable.
    """
    url = normal_url(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint below is the check
    with Connection(url, context, {}) as unverified:
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


class Client(KeyProviders, EncryptedVms, Settings):
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
        super().__init__(Connection(credentials.url, context, headers))

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
        return self._connection.ask(schemas.Host, "GET", f"hosts/{named('host', name)}")

    def remove_host(self, name: str) -> None:
        """Forget a host; raises Conflict while it has VMs."""
        self._connection.tell("DELETE", f"hosts/{named('host', name)}")

    def accept_host(self, name: str) -> schemas.Host:
        """Take a host as it is now, after it lost a capability."""
        return self._connection.ask(schemas.Host, "POST", f"hosts/{named('host', name)}/accept")

    def vms(self) -> list[schemas.Vm]:
        """All VMs."""
        return self._connection.ask(list[schemas.Vm], "GET", "vms")

    def vm(self, name: str) -> schemas.Vm:
        """One VM."""
        return self._connection.ask(schemas.Vm, "GET", f"vms/{named('VM', name)}")

    def create_vm(
        self, host: str, config: str, *, encrypt: bool = False, provider: str | None = None, verify: Verify = "sample"
    ) -> schemas.Vm:
        """Define a VM on ``host`` from the text of its TOML file; raises InvalidInput, AlreadyExists.

        With ``encrypt`` the answer names the conversion that encrypts it; raises PlanRefused, KeyProviderError's
        classes.
        """
        wish = schemas.VmCreate(host=host, config=config, encrypt=encrypt, provider=provider, verify=verify)
        return self._connection.ask(schemas.Vm, "POST", "vms", wish)

    def change_vm(self, name: str, migrate_encryption: MigrateEncryption) -> schemas.Vm:
        """Set whether a VM moves encrypted."""
        change = schemas.VmChange(migrate_encryption=migrate_encryption)
        return self._connection.ask(schemas.Vm, "PATCH", f"vms/{named('VM', name)}", change)

    def start_vm(self, name: str) -> schemas.Vm:
        """Start a VM; raises Conflict, VmLetGo and HypervisorError's classes."""
        return self._connection.ask(schemas.Vm, "POST", f"vms/{named('VM', name)}/start")

    def stop_vm(self, name: str, *, force: bool = False) -> schemas.Vm:
        """Ask the guest to power down, or kill it; raises Conflict."""
        return self._connection.ask(schemas.Vm, "POST", f"vms/{named('VM', name)}/stop", schemas.VmStop(force=force))

    def delete_vm(self, name: str, *, force: bool = False) -> None:
        """Forget a stopped VM, never its disks; raises Conflict, without ``force`` also for an encrypted one."""
        self._connection.tell("DELETE", f"vms/{named('VM', name)}", params={"force": force})

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
