"""Writes ``envelope-v1.json``, which freezes wrapped keys and the configuration file of encrypted VMs.

    python tests/vectors/make_envelope_v1.py > tests/vectors/envelope-v1.json

Run once for a version of the file. If the output ever differs from the file, VMs that were encrypted before can no
longer be opened, and that needs a new version and a new file beside this one. ``tests/keys/test_envelope.py`` derives
the same from primitives alone.
"""

from __future__ import annotations

import json
import sys
from uuid import UUID

from sealift.domain.vm import Boot, Disk, Network, VmConfig
from sealift.keys.bundle import Bundle, WrappedDek, write
from sealift.keys.envelope import SubKey, config_tag, subkey, wrap
from sealift.secret import Secret

KEK = bytes(range(0x80, 0xA0))
DEKS = {
    UUID("0b5f1c7e-4a3d-4e5f-8a9b-0c1d2e3f4051"): bytes(range(32)),
    UUID("7d1e2f3a-4b5c-4d6e-9f80-a1b2c3d4e5f6"): bytes(range(32, 64)),
}
IVS = [bytes(range(0xF0, 0xFC)), bytes(range(0xE0, 0xEC))]
VM = UUID("11111111-2222-4333-8444-555555555555")
PROVIDER, KEY_ID = "vault.example", "2f9d-0001/A+b="
FIRST, SECOND = DEKS
CONFIG = VmConfig(
    name="web1",
    uuid=VM,
    vcpus=2,
    memory_bytes=524280 << 10,
    disks=(
        Disk("/srv/a.qcow2", "qcow2", FIRST, 10 << 30),
        Disk("/srv/b \u00e9", "raw", SECOND, 1536),
        Disk("/c", "raw"),
    ),
    network=Network("bridge", "br0", "52:54:00:12:34:56"),
    boot=Boot("/boot/vmlinuz", "/boot/initrd", 'console=ttyS0 "quoted" back\\slash \u2028'),
)


def vectors() -> dict[str, object]:
    """All of it; bytes in hex, the file as text."""
    kek = Secret(KEK, length=32)
    wrapped = [
        wrap(Secret(dek, length=32), kek=kek, vm=VM, dek_id=dek_id, provider=PROVIDER, key_id=KEY_ID, iv=iv)
        for (dek_id, dek), iv in zip(DEKS.items(), IVS, strict=True)
    ]
    bundle = Bundle(VM, 7, PROVIDER, KEY_ID, tuple(map(WrappedDek, DEKS, wrapped)))
    return {
        "kek": KEK.hex(),
        "subkeys": {which.value.decode(): subkey(kek, which).reveal().hex() for which in SubKey},
        "vm": str(VM),
        "provider": PROVIDER,
        "key_id": KEY_ID,
        "deks": [
            {"id": str(dek_id), "dek": DEKS[dek_id].hex(), "iv": iv.hex(), "wrapped": each.hex()}
            for dek_id, iv, each in zip(DEKS, IVS, wrapped, strict=True)
        ],
        "tag_of_nothing": config_tag(kek, b"").hex(),
        "file": write(bundle, CONFIG, kek).decode(),
    }


if __name__ == "__main__":
    json.dump(vectors(), sys.stdout, indent=1)
    sys.stdout.write("\n")
