"""The kinds of key providers, and how one that was set up is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sealift.keys.native import NativeProvider
from sealift.keys.provider import KeyProvider

Kind = Literal["native", "kmip"]


def open_provider(kind: Kind, name: str, directory: Path, members: Sequence[str]) -> KeyProvider:
    """The provider of that name, whose secrets lie in ``directory``; asks nobody anything yet.

    ``members`` are the addresses of a ``kmip`` provider's servers, in the order in which they are tried; none for
    ``native``, which must have been made there (``NativeProvider.make``).
    """
    match kind:
        case "native":
            return NativeProvider(name, directory)
        case "kmip":
            # Here, since TLS and its machinery is of no use to who has only built-in providers.
            from sealift.keys.kmip import KmipProvider

            return KmipProvider(name, members, directory)
