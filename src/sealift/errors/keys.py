"""Key providers, keys, and encrypted VMs."""

from __future__ import annotations

from sealift.errors.base import SealiftError


class KeyProviderError(SealiftError):
    """A key provider did not do what it was asked."""

    slug, status, exit_code = "key_provider_failed", 502, 11

    nothing_asked = False
    """Whether it is certain that nobody was asked to do it, so that nothing of it can be left anywhere."""

    def __init__(self, what: str, *, todo: str = "", reason: str = "") -> None:
        """``reason``: why, without who cannot do what; by default all that is said."""
        super().__init__(what, todo=todo)
        self.reason = reason or what


class ProviderUnreachable(KeyProviderError):
    """No server of the key provider answered."""

    slug = "key_provider_unreachable"


class ProviderRefused(KeyProviderError):
    """A server of the key provider answered, and refused what it was asked."""

    slug = "key_provider_refused"


class ProviderImpostor(KeyProviderError):
    """Whoever answers at a key server's address is not that server; nothing was asked of it."""

    slug = "key_provider_impostor"


class ProviderAnswerInvalid(KeyProviderError):
    """A key server answered with something that is not KMIP, or too long, or not what was asked for."""

    slug = "key_provider_answer_invalid"


class KeyMissing(KeyProviderError):
    """The key provider answers and does not have the key: it was destroyed, or never was there."""

    slug, status = "key_missing", 409


class KeyNotActive(KeyProviderError):
    """The key provider has the key in a state in which nothing new may be done with it."""

    slug, status = "key_not_active", 409


class ProviderNotExported(KeyProviderError):
    """The native key provider was never exported; if the controller were lost, so would be every VM it encrypts."""

    slug, status, exit_code = "key_provider_not_exported", 409, 3


class ExportInvalid(KeyProviderError):
    """The exported key provider cannot be opened: another passphrase, or a damaged file."""

    slug, status, exit_code = "export_invalid", 422, 2


class PassphraseWeak(KeyProviderError):
    """The passphrase is too short or too common to protect keys."""

    slug, status, exit_code = "passphrase_weak", 422, 2


class EncryptionError(SealiftError):
    """Something about an encrypted VM is not as it must be."""

    slug, status, exit_code = "encryption_failed", 500, 7


class VmLocked(EncryptionError):
    """The VM is encrypted and its key cannot be had now; the message names the key provider and the key."""

    slug, status, exit_code = "vm_locked", 409, 12


class VmTampered(EncryptionError):
    """The encrypted VM's configuration file is not the one that Sealift wrote last."""

    slug, status, exit_code = "vm_tampered", 409, 13


class BundleInvalid(EncryptionError):
    """A VM configuration file, or the encryption bundle in it, cannot be read."""

    slug, status = "bundle_invalid", 422


class UnwrapFailed(EncryptionError):
    """A wrapped key does not authenticate: it was changed, or belongs to another VM, disk, provider or key."""

    slug, status = "unwrap_failed", 409


class KeysNotHeld(EncryptionError):
    """The host does not hold the keys of the VM's disks, and was not given them."""

    slug, status, exit_code = "keys_not_held", 409, 12


class ConversionFailed(EncryptionError):
    """Encrypting, decrypting or rekeying the VM's disks failed; the old images are in place and unchanged."""

    slug = "conversion_failed"


class ConversionCancelled(EncryptionError):
    """Encrypting, decrypting or rekeying was cancelled; the old images are in place and unchanged."""

    slug, status, exit_code = "conversion_cancelled", 409, 8


class DatastoreFull(EncryptionError):
    """There is not enough room beside a disk for its new image; the old one is in place and unchanged."""

    slug, status = "datastore_full", 507
