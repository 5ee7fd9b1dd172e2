"""Configuration files of encrypted VMs, as a controller would write them."""

from __future__ import annotations

import os
from uuid import UUID

from sealift.domain.deks import DEK_BYTES, Deks
from sealift.domain.vm import VmConfig
from sealift.keys.bundle import Bundle, WrappedDek, write
from sealift.keys.envelope import wrap
from sealift.keys.provider import KEK_BYTES
from sealift.secret import Secret

KEK = bytes(range(60, 60 + KEK_BYTES))
PROVIDER, KEY_ID = "native", "kek-1"


def keys(*ids: UUID) -> dict[UUID, Secret]:
    """Keys of these ids; each is drawn from its id, so that two calls agree."""
    return {dek: Secret((dek.bytes * 2)[:DEK_BYTES], length=DEK_BYTES) for dek in ids}


def file_of(config: VmConfig, generation: int, deks: Deks | None = None) -> bytes:
    """The file of ``config`` with its keys wrapped."""
    kek, deks = Secret(KEK, length=KEK_BYTES), deks if deks is not None else keys(*config.deks)
    names = {"vm": config.uuid, "provider": PROVIDER, "key_id": KEY_ID}
    wrapped = tuple(
        WrappedDek(dek, wrap(deks[dek], kek=kek, dek_id=dek, iv=os.urandom(12), **names))  # type: ignore[arg-type]
        for dek in config.deks
    )
    return write(Bundle(config.uuid, generation, PROVIDER, KEY_ID, wrapped), config, kek)
