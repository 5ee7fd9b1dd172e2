"""The keys of the demonstration's encrypted VM, for proofs that they are not where they must not be."""

from __future__ import annotations

import asyncio
import base64

from sealift.keys import bundle
from sealift.keys.envelope import unwrap
from sealift.keys.provider import KeyProvider
from sealift.secret import Secret


def spellings(file: bytes, provider: KeyProvider) -> list[bytes]:
    """How the keys of the VM with this configuration file may be written: raw, hex, base64; its KEK and its disks'.

    Whoever asks must be able to read the VM's key at its provider, as the controller is; this closes the provider.
    """
    found, _ = bundle.read(file)

    async def kek_of() -> Secret:
        try:
            return await provider.get(found.key_id)
        finally:
            await provider.close()

    kek = asyncio.run(kek_of())

    def dek_of(one: bundle.WrappedDek) -> Secret:
        whose = {"provider": found.provider, "key_id": found.key_id}
        return unwrap(one.wrapped, kek=kek, vm=found.vm, dek_id=one.dek, **whose)

    return [spelt for key in (kek, *map(dek_of, found.deks)) for spelt in _spelt(key.reveal())]


def _spelt(raw: bytes) -> list[bytes]:
    texts = base64.b64encode(raw).rstrip(b"="), base64.urlsafe_b64encode(raw).rstrip(b"=")
    return [raw, raw.hex().encode(), raw.hex().upper().encode(), *texts]
