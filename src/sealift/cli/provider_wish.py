"""What `sealift key-provider add` asks for, from its options and the files that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from sealift.errors import InvalidInput

if TYPE_CHECKING:
    from sealift.api.encryption import KeyProviderAdd

MAX_PEM = 65536
MAX_MEMBERS = 16


def check_kmip(
    servers: tuple[str, ...],
    authority: TextIO | None,
    client: str | None,
    certificate: TextIO | None,
    key: TextIO | None,
) -> None:
    """Raise InvalidInput where the options of a kmip provider do not fit together."""
    from sealift.domain.key_server import check_member

    if not 1 <= len(servers) <= MAX_MEMBERS:
        raise InvalidInput(
            f"a kmip key provider has 1 to {MAX_MEMBERS} servers", todo="give --server HOST:PORT for each of them"
        )
    for server in servers:
        check_member(server, quote=True)
    if authority is None:
        raise InvalidInput(
            "nothing says who the servers are",
            todo="give --authority FILE with the certificate of their authority, or a server's own",
        )
    if client == "uploaded" and (certificate is None or key is None):
        raise InvalidInput(
            "--client uploaded needs certificate and key", todo="give --client-certificate FILE and --client-key FILE"
        )
    if client != "uploaded" and (certificate or key):
        raise InvalidInput("--client-certificate and --client-key are for --client uploaded", todo="say so, or neither")


def wish(
    name: str,
    kind: str,
    servers: tuple[str, ...],
    authority: TextIO | None,
    client: str,
    certificate: TextIO | None,
    key: TextIO | None,
    default: bool,
) -> KeyProviderAdd:
    """What is sent to the controller; raises InvalidInput."""
    from sealift.api.encryption import KeyProviderAdd
    from sealift.domain.vm import check_name

    return KeyProviderAdd.model_validate(
        {
            "name": check_name("key provider", name, quote=True),
            "kind": kind,
            "members": list(servers),
            "server_authority": pem(authority),
            "client": client,
            "client_certificate": pem(certificate),
            "client_key": pem(key) or None,
            "default": default,
        }
    )


def pem(file: TextIO | None) -> str:
    """The text of a file; empty without one. Raises InvalidInput, which does not quote it."""
    if file is None:
        return ""
    try:
        text = file.read(MAX_PEM + 1)
    except UnicodeDecodeError:
        raise InvalidInput(f"{file.name} is not PEM text", todo="give a file with -----BEGIN lines") from None
    if len(text) > MAX_PEM or "-----BEGIN " not in text:
        raise InvalidInput(f"{file.name} is not PEM text", todo="give a file with -----BEGIN lines")
    return text
