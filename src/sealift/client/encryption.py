"""What the client asks of key providers, encrypted VMs and settings (``api.encryption``).

As everywhere in the client, any call may raise ControllerUnreachable, NotAuthenticated, NotFound and InvalidInput.
"""

from __future__ import annotations

from uuid import UUID

from pydantic import SecretStr

from sealift.api import encryption as wire
from sealift.api.schemas import VmRestored
from sealift.client.connection import Connection, named
from sealift.secret import Secret

REKEY_MANY_S = 3600.0
"""Longest wait for the answer about all VMs of a key provider, each of which asks a host and two providers."""


def _hidden(secret: Secret) -> SecretStr:
    """A passphrase or private key (UTF-8) for the body of a request."""
    return SecretStr(secret.reveal().decode())


class _Part:
    """A part of the client; all parts share one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection


class KeyProviders(_Part):
    """Calls about key providers. KeyProviderError's classes say what a provider did not do."""

    def key_providers(self) -> list[wire.KeyProvider]:
        """All key providers, each asked just now how it is."""
        return self._connection.ask(list[wire.KeyProvider], "GET", "key-providers")

    def key_provider(self, name: str) -> wire.KeyProvider:
        """One key provider."""
        return self._connection.ask(wire.KeyProvider, "GET", _provider(name))

    def add_key_provider(self, wish: wire.KeyProviderAdd) -> wire.KeyProviderAdded:
        """Add a key provider; raises AlreadyExists."""
        named("key provider", wish.name)
        return self._connection.ask(wire.KeyProviderAdded, "POST", "key-providers", wish)

    def make_default(self, name: str) -> wire.KeyProvider:
        """Have new encrypted VMs use this key provider when none is named."""
        return self._connection.ask(wire.KeyProvider, "PATCH", _provider(name), wire.KeyProviderChange(default=True))

    def set_certificate(self, name: str, certificate: str) -> wire.KeyProvider:
        """Hand in the certificate (PEM) that was signed for the provider's request; raises Conflict."""
        change = wire.KeyProviderChange(client_certificate=certificate)
        return self._connection.ask(wire.KeyProvider, "PATCH", _provider(name), change)

    def test_key_provider(self, name: str) -> wire.KeyProviderTested:
        """Make, activate, read, find and destroy a key on every member."""
        return self._connection.ask(wire.KeyProviderTested, "POST", f"{_provider(name)}/test")

    def remove_key_provider(self, name: str, *, force: bool) -> wire.KeyProviderRemoved:
        """Forget a key provider; raises Conflict while VMs have their keys there, unless ``force``."""
        return self._connection.ask(wire.KeyProviderRemoved, "DELETE", _provider(name), params={"force": force})

    def export_key_provider(self, name: str, passphrase: Secret | None) -> wire.Export:
        """The provider, sealed under ``passphrase`` or eight words that are drawn; raises PassphraseWeak, Conflict."""
        wish = wire.ExportRequest(passphrase=_hidden(passphrase) if passphrase else None)
        return self._connection.ask(wire.Export, "POST", f"{_provider(name)}/export", wish)

    def confirm_export(self, name: str, file: str, passphrase: Secret) -> None:
        """Show that an export can be opened, as it was read back from where it is kept; raises ExportInvalid."""
        body = wire.ExportConfirm(file=file, passphrase=_hidden(passphrase))
        self._connection.tell("POST", f"{_provider(name)}/export/confirm", body)

    def import_key_provider(self, file: str, passphrase: Secret, *, default: bool) -> wire.KeyProviderAdded:
        """Add a provider from its export, under the name it had; raises AlreadyExists, ExportInvalid."""
        body = wire.ImportRequest(file=file, passphrase=_hidden(passphrase), default=default)
        return self._connection.ask(wire.KeyProviderAdded, "POST", "key-providers/import", body)


class EncryptedVms(_Part):
    """Calls that encrypt, decrypt and rekey VMs; they may raise PlanRefused, Conflict, KeyProviderError's classes."""

    def encrypt_vm(self, name: str, wish: wire.EncryptRequest) -> wire.Conversion:
        """Begin to encrypt a stopped VM's disks, or only plan it."""
        return self._connection.ask(wire.Conversion, "POST", f"{_vm(name)}/encrypt", wish)

    def decrypt_vm(self, name: str, wish: wire.DecryptRequest) -> wire.Conversion:
        """Begin to decrypt a stopped VM's disks, or only plan it."""
        return self._connection.ask(wire.Conversion, "POST", f"{_vm(name)}/decrypt", wish)

    def rekey_vm(self, name: str, wish: wire.RekeyRequest) -> wire.Conversion:
        """Give a VM a new key; a deep rekey of the stopped VM's disks only begins with the answer."""
        return self._connection.ask(wire.Conversion, "POST", f"{_vm(name)}/rekey", wish)

    def rekey_many(self, source: str, target: str) -> list[wire.Rekeyed]:
        """Give a new key at provider ``target`` to every VM whose key is at ``source``; what became of each.

        That may take long, see ``REKEY_MANY_S``.
        """
        wish = wire.RekeyManyRequest(source=named("key provider", source), target=named("key provider", target))
        return self._connection.ask(list[wire.Rekeyed], "POST", "rekey", wish, answer_s=REKEY_MANY_S)

    def restore_config(self, name: str) -> VmRestored:
        """Put back the last authentic copy of an encrypted VM's configuration file; raises Conflict, VmLocked."""
        return self._connection.ask(VmRestored, "POST", f"{_vm(name)}/restore-config")

    def conversions(self) -> list[wire.Conversion]:
        """The newest conversions, newest first."""
        return self._connection.ask(list[wire.Conversion], "GET", "conversions")

    def conversion(self, conversion: UUID) -> wire.Conversion:
        """One conversion as it stands now."""
        return self._connection.ask(wire.Conversion, "GET", f"conversions/{conversion}")

    def cancel_conversion(self, conversion: UUID) -> wire.Conversion:
        """Ask for a conversion to end with the old images in place; raises Conflict when it is too late for that."""
        return self._connection.ask(wire.Conversion, "POST", f"conversions/{conversion}/cancel")


class Settings(_Part):
    """Calls about the controller's settings."""

    def settings(self) -> list[wire.Setting]:
        """All settings."""
        return self._connection.ask(list[wire.Setting], "GET", "settings")

    def set_setting(self, name: str, value: str) -> wire.Setting:
        """Change a setting."""
        path = f"settings/{named('setting', name)}"
        return self._connection.ask(wire.Setting, "PUT", path, wire.SettingChange(value=value))


def _provider(name: str) -> str:
    return f"key-providers/{named('key provider', name)}"


def _vm(name: str) -> str:
    return f"vms/{named('VM', name)}"
