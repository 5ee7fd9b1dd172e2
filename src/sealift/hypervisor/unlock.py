"""Encrypted disks of a QEMU that waits before it builds its machine (``-preconfig``): each is added with its key.

QEMU 7.2 takes descriptors over QMP (``add-fd``) only once the machine is built, and by then its disks must be there.
So the process inherits one anonymous file, which holds a passphrase only while a secret object is made of it.

The secret object of a qcow2 image stays for as long as the process: QEMU opens the layer anew each time when the image
becomes this process's to write, at the target of a move and at a source that goes on after a failed one, and asks for
the secret again (qcow2_co_invalidate_cache in QEMU's block/qcow2.c). It is in QEMU's memory, as the disk's master key
is, and nobody can read it back. For a raw image it is gone once the disk is open.

Source: QEMU's QMP reference, ``blockdev-add`` (BlockdevOptionsLUKS, BlockdevQcow2Encryption), ``x-exit-preconfig``.
"""

from __future__ import annotations

from sealift.domain.deks import Deks
from sealift.domain.vm import VmConfig
from sealift.errors import HypervisorError, KeysNotHeld, QmpRefused
from sealift.hypervisor.hardware import disk_nodes
from sealift.hypervisor.passphrase import Passphrase
from sealift.hypervisor.qmp import Qmp


def check_held(config: VmConfig, deks: Deks) -> None:
    """Raise KeysNotHeld unless ``deks`` has the key of every encrypted disk."""
    missing = [disk.path for disk in config.disks if disk.dek is not None and disk.dek not in deks]
    if missing:
        raise KeysNotHeld(
            f"VM {config.name}: this host does not hold the key of {', '.join(missing)}",
            todo="the controller hands it over when the VM's key provider answers: sealift key-provider test",
        )


async def unlock(qmp: Qmp, config: VmConfig, deks: Deks, passphrase: Passphrase, *, timeout: float) -> None:
    """Add the encrypted disks, one after the other, and let QEMU build its machine.

    ``passphrase`` was inherited by that QEMU; it is empty before, after, and between two disks. Raises HypervisorError
    naming the disk that its key does not open, and as ``Qmp.execute``; then the process is of no use.
    """
    for number, disk in enumerate(config.disks):
        if disk.dek is None:
            continue
        secret_id = f"dek{number}"
        try:
            passphrase.fill(deks[disk.dek])
            secret = {"qom-type": "secret", "id": secret_id, "file": passphrase.path, "format": "raw"}
            await qmp.execute("object-add", secret, timeout)
        finally:
            passphrase.empty()
        file, image = disk_nodes(number, disk, secret_id=secret_id)
        try:
            await qmp.execute("blockdev-add", file, timeout)
            await qmp.execute("blockdev-add", image, timeout)
        except QmpRefused as error:
            raise HypervisorError(
                f"the disk {disk.path} of VM {config.name} cannot be opened with its key {disk.dek}: {error.what}",
                todo="the image or the VM's configuration is not the one that belongs here: find the right one",
            ) from error
        if disk.format == "raw":
            await qmp.execute("object-del", {"id": secret_id}, timeout)
    await qmp.execute("x-exit-preconfig", timeout=timeout)
