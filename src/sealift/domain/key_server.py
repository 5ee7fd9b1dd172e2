"""The address of a key server, as a person writes it. Pure."""

from __future__ import annotations

import ipaddress
import re

from sealift.domain.quoting import quoted
from sealift.errors import InvalidInput

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
"""Names of up to 253 characters whose labels have up to 63 (RFC 1035, section 2.3.4)."""


def check_member(text: str, *, quote: bool = False) -> None:
    """Raise InvalidInput unless ``text`` is host:port (IPv6: [host]:port); ``quote`` as in ``vm.check_name``."""
    bad = InvalidInput(
        "the address of a key server is not valid" + (f": {quoted(text)}" if quote else ""),
        todo="write host:port, as in kms.example.net:5696",
    )
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise bad
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise bad from None
    elif not _HOST.fullmatch(host):
        raise bad
