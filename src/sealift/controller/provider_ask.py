"""What a new key provider is to be, and whether that makes sense, before anything is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sealift.domain.key_server import check_member
from sealift.domain.vm import check_name
from sealift.errors import InvalidInput
from sealift.keys.kinds import Kind
from sealift.secret import Secret

MAX_MEMBERS = 16

ClientTrust = Literal["generated", "csr", "uploaded"]


@dataclass(frozen=True)
class ProviderAsk:
    """A provider that somebody wants to add; everything after ``kind`` but ``default`` is for kmip only.

    ``server_authority`` is PEM: the certificate that the servers' certificates are signed by, or a server's own.
    ``client`` says how the servers know us: by a key and a certificate that we make, by a certificate that somebody
    else makes for our request, or by an uploaded certificate and key (PEM).
    """

    name: str
    kind: Kind
    members: tuple[str, ...] = ()
    server_authority: str = ""
    client: ClientTrust = "generated"
    client_certificate: str = ""
    client_key: Secret | None = None
    default: bool = False


def check_ask(ask: ProviderAsk) -> None:
    """Raise InvalidInput for what contradicts itself; the message quotes nothing that was sent."""
    check_name("key provider", ask.name)
    uploads = bool(ask.client_certificate), ask.client_key is not None
    if ask.kind == "native":
        if ask.members or ask.server_authority or any(uploads) or ask.client != "generated":
            raise InvalidInput(
                "a native key provider has no servers and no certificates", todo="leave those out, or add a kmip one"
            )
        return
    if not 1 <= len(ask.members) <= MAX_MEMBERS:
        raise InvalidInput("a kmip key provider has 1 to 16 servers", todo="name them as host:port")
    for member in ask.members:
        check_member(member)
    if len({member.lower() for member in ask.members}) < len(ask.members):
        raise InvalidInput("a server of the key provider is named twice", todo="name each once")
    if not ask.server_authority:
        raise InvalidInput(
            "nothing says who the key servers are", todo="give their authority's certificate, or a server's own, as PEM"
        )
    if ask.client == "uploaded" and not all(uploads):
        raise InvalidInput("a client certificate and its key belong together", todo="give both")
    check_certificate(ask.client_certificate)
    if ask.client != "uploaded" and any(uploads):
        raise InvalidInput(
            "a client certificate or key was given that would not be used", todo="leave it out, or upload both"
        )


def check_certificate(pem: str) -> None:
    """Raise InvalidInput when a client certificate, which everybody may see, comes with a private key."""
    if "PRIVATE KEY" in pem:
        raise InvalidInput("the client certificate has a private key beside it", todo="hand in the certificate alone")
