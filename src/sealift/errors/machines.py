"""QEMU, what it stands on, and how a migration can end other than done."""

from __future__ import annotations

from sealift.errors.base import SealiftError


class HypervisorError(SealiftError):
    """QEMU did not do what it was asked."""

    slug, status, exit_code = "hypervisor_failed", 500, 7


class QemuMissing(HypervisorError):
    """QEMU is not installed on the host, or not where the configuration says."""

    slug, status, exit_code = "qemu_missing", 500, 7


class QmpTimeout(HypervisorError):
    """QEMU did not answer a QMP command in time."""

    slug, status, exit_code = "qmp_timeout", 504, 7


class QmpRefused(HypervisorError):
    """QEMU refused a QMP command, and said why."""

    slug, status, exit_code = "qmp_refused", 500, 7


class QemuGone(HypervisorError):
    """The QEMU process of the VM has ended."""

    slug, status, exit_code = "qemu_gone", 500, 7


class ContRefused(HypervisorError):
    """The guest was not let run, because in QEMU's present state that could make two copies run."""

    slug, status, exit_code = "cont_refused", 409, 7


class AcceleratorUnavailable(HypervisorError):
    """The configured accelerator does not run a virtual CPU on this host."""

    slug, status, exit_code = "accelerator_unavailable", 409, 7


class HardwareMismatch(HypervisorError):
    """The target host cannot build the very hardware the VM runs on."""

    slug, status, exit_code = "hardware_mismatch", 409, 3


class DatastoreNotShared(HypervisorError):
    """The target host does not see the file that the source host has just written beside the disk."""

    slug, status, exit_code = "datastore_not_shared", 409, 3


class MigrationError(SealiftError):
    """A migration ended in another way than done."""

    slug, status, exit_code = "migration_error", 500, 7


class MigrationFailed(MigrationError):
    """The migration failed; the VM runs at the source as before, and nothing is left at the target."""

    slug, status, exit_code = "migration_failed", 500, 7


class MigrationCancelled(MigrationError):
    """The migration was cancelled; the VM runs at the source as before, and nothing is left at the target."""

    slug, status, exit_code = "migration_cancelled", 409, 8


class OutcomeUnknown(MigrationError):
    """It cannot be known from here which host has the VM; it is left paused, and a person must look."""

    slug, status, exit_code = "outcome_unknown", 500, 9


class VmCrashed(MigrationError):
    """The VM's QEMU ended during the migration; the VM can be started again from its disk at its host."""

    slug, status, exit_code = "vm_crashed", 500, 10
