"""The directories of key providers: built aside and put in place whole, so that a bad ask changes nothing.

Each provider has one of its name below the providers' directory, mode 0700. Names that begin with a dot are no
provider's: what is being built or thrown away has such a name, and what a crash left of that is swept up.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sealift.controller.provider_ask import ProviderAsk
from sealift.errors import Conflict
from sealift.keys import kmip_trust
from sealift.keys.native import NativeProvider
from sealift.keys.storage import KDK_BYTES, find_storage, sync_directory
from sealift.secret import Secret

_ASIDE = ".aside-"


class ProviderFiles:
    """The directories below ``root``. Calls are made by one task at a time, and block: they belong in a thread."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def of(self, name: str) -> Path:
        """The directory of the provider ``name``, which was checked to be one."""
        return self.root / name

    @contextmanager
    def aside(self) -> Iterator[Path]:
        """A new directory to build in, which goes with the block unless it was put in place."""
        self.root.mkdir(mode=0o700, exist_ok=True)
        self.sweep()
        path = self._aside()
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def placing(self, built: Path, name: str) -> Iterator[None]:
        """What was built is the directory of ``name`` from here on, durably, unless the block raises.

        Raises Conflict when there is one already, which may hold keys: a crash in the block, or a database of before,
        leaves one without a provider. So does a task that is cancelled in it, whose commit may have been carried out:
        a provider without its directory would be worse.
        """
        place = self.of(name)
        if place.exists():
            raise Conflict(
                f"{place} is there already, though there is no key provider {name}", todo="move that directory away"
            )
        built.rename(place)
        sync_directory(self.root)
        try:
            yield
        except Exception:
            place.rename(built)
            raise

    def delete(self, name: str) -> None:
        """Delete the directory of ``name``; it is gone at once, also when a crash interrupts this."""
        path = self._aside()
        with suppress(FileNotFoundError):
            self.of(name).rename(path)
        self.sweep()

    def sweep(self) -> None:
        """Delete everything that is aside."""
        for path in self.root.glob(_ASIDE + "*"):
            shutil.rmtree(path)

    def _aside(self) -> Path:
        return self.root / (_ASIDE + secrets.token_hex(8))


def build_native(directory: Path, name: str, kdk: Secret) -> None:
    """Fill ``directory`` with a native provider of that key; raises ProviderUnreachable when systemd-creds fails."""
    NativeProvider.make(name, directory, kdk=kdk, storage=find_storage())


def build(directory: Path, ask: ProviderAsk) -> None:
    """Fill ``directory`` with what a new provider keeps; raises InvalidInput, or as ``build_native``."""
    if ask.kind == "native":
        kdk = Secret(secrets.token_bytes(KDK_BYTES), length=KDK_BYTES)
        build_native(directory, ask.name, kdk)
        kdk.wipe()
        return
    common_name = f"sealift {ask.name}"[:64]  # a common name's upper bound (RFC 5280, appendix A.1)
    kmip_trust.pin(directory, ask.server_authority)
    match ask.client:
        case "generated":
            kmip_trust.generate(directory, common_name)
        case "csr":
            kmip_trust.request(directory, common_name)
        case "uploaded":
            assert ask.client_key is not None
            kmip_trust.upload(directory, ask.client_certificate, ask.client_key)
