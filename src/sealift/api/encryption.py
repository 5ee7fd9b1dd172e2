"""Wire models of key providers, encrypted VMs, conversions and settings; conventions as in ``api.schemas``."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Verify = Literal["sample", "full"]


class Request(BaseModel):
    """A body that a client sends."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(BaseModel):
    """A body that the controller answers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


# Key providers: /key-providers


class KeyProviderAdd(Request):
    """POST key-providers. ``members`` (kmip: 1 to 16 of host:port) are tried in turn.

    ``server_authority`` (kmip, PEM) pins who the servers are: their authority's certificate, or a server's own.
    ``client`` says how the servers know us: ``generated`` (a key and self-signed certificate of ours, shown by GET),
    ``csr`` (a key of ours and a request to be signed elsewhere; PATCH the certificate in), ``uploaded``.
    """

    name: str = Field(max_length=63)
    kind: Literal["native", "kmip"]
    members: list[str] = Field(default=[], max_length=16)
    server_authority: str = Field(default="", max_length=65536)
    client: Literal["generated", "csr", "uploaded"] = "generated"
    client_certificate: str = Field(default="", max_length=65536)
    client_key: SecretStr | None = None
    default: bool = False


class KeyProviderChange(Request):
    """PATCH key-providers/{name}: make it the default, or hand in the certificate that was signed for its request."""

    default: Literal[True] | None = None
    client_certificate: str | None = Field(default=None, max_length=65536)


class Member(Document):
    """One server of a provider, as it was just seen."""

    address: str
    ok: bool
    message: str = ""


class KeyProvider(Document):
    """A key provider as it was just seen.

    ``state``: ``ok``; ``degraded`` (some members do not answer); ``unreachable``; ``not_exported`` (native: to be
    exported before the first VM may use it); ``no_certificate`` (kmip: its request is not signed yet). ``notes`` say
    plainly what an administrator must know: where its secrets lie, what `destroy` means.
    """

    name: str
    kind: Literal["native", "kmip"]
    default: bool
    state: Literal["ok", "degraded", "unreachable", "not_exported", "no_certificate"]
    message: str = ""
    members: list[Member] = []
    vms: list[str] = []  # that find their key here
    notes: list[str] = []
    client_certificate: str = ""  # PEM, public
    certificate_request: str = ""  # PEM, public
    exported_at: datetime | None = None
    created_at: datetime


class TestStep(Document):
    """One thing that `key-provider test` tried."""

    name: str
    ok: bool
    message: str = ""
    ms: float


class KeyProviderAdded(Document):
    """The answer to POST key-providers and to an import: the provider, and VMs that are locked for want of it.

    Those unlock once their keys are found there.
    """

    provider: KeyProvider
    unlocks: list[str]


class KeyProviderTested(Document):
    """POST key-providers/{name}/test: a key was made, activated, read, found and destroyed again on each member."""

    ok: bool
    steps: list[TestStep]


class KeyProviderRemoved(Document):
    """DELETE key-providers/{name}[?force=true]: the VMs that had their keys there, and what is gone with it.

    They lock when the agent of their host is restarted; those that run go on. There is no default provider afterwards
    when this was it.
    """

    name: str
    locks: list[str]
    lost: str = ""
    was_default: bool = False


class ExportRequest(Request):
    """POST key-providers/{name}/export; without a passphrase eight words are drawn."""

    passphrase: SecretStr | None = None


class Export(Document):
    """An exported provider, ASCII-armoured age. It counts once it was read back (POST .../export/confirm)."""

    file: str
    passphrase: str = ""  # the eight words; shown this once; empty when the caller chose one


class ExportConfirm(Request):
    """POST key-providers/{name}/export/confirm: what was read back from where it is kept."""

    file: str = Field(max_length=65536)
    passphrase: SecretStr


class ImportRequest(Request):
    """POST key-providers/import."""

    file: str = Field(max_length=65536)
    passphrase: SecretStr
    default: bool = False


# Encrypted VMs: /vms/{name}/...


class VmEncryption(Document):
    """What encrypts a VM.

    ``state``: ``ok``; ``locked`` and ``tampered``, why is in ``message``; ``unknown`` while its host does not answer.
    ``lines`` are those of its configuration file that differ from the last one written.
    """

    provider: str
    key_id: str
    cipher: str
    generation: int
    state: Literal["ok", "locked", "tampered", "unknown"]
    message: str = ""
    lines: list[str] = []


class EncryptRequest(Request):
    """POST vms/{name}/encrypt; without ``provider`` the default one."""

    provider: str | None = None
    verify: Verify = "sample"
    dry_run: bool = False


class DecryptRequest(Request):
    """POST vms/{name}/decrypt."""

    verify: Verify = "sample"
    dry_run: bool = False


class RekeyRequest(Request):
    """POST vms/{name}/rekey: a new KEK, from ``provider`` or the one it has; with ``deep`` new disk keys as well."""

    provider: str | None = None
    deep: bool = False
    verify: Verify = "sample"
    dry_run: bool = False


class ConversionFinding(Document):
    """One thing the plan of a conversion found; an error refuses it, a warning does not."""

    severity: Literal["error", "warning"]
    text: str
    todo: str


class Conversion(Document):
    """An encryption, decryption or rekey. A shallow rekey is ``done`` when it is answered.

    Answered with 201 and then carried out by itself; GET conversions/{id} follows it, POST conversions/{id}/cancel
    cancels it. A dry run is answered with 200, is ``planned`` or ``refused``, and finished with that: it is stored
    nowhere, so its ``id`` is null. ``deep`` tells one rekey from the other; it is false for the others, which
    always copy. ``message``: what is in its way just now, while it is under way.
    """

    id: UUID | None
    vm: UUID
    vm_name: str
    host: str
    kind: Literal["encrypt", "decrypt", "rekey"]
    deep: bool
    state: Literal["planned", "refused", "copying", "verifying", "swapping", "done", "failed", "cancelled"]
    finished: bool
    message: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    provider: str = ""
    key_id: str = ""
    old_provider: str = ""
    old_key_id: str = ""
    findings: list[ConversionFinding] = []
    error_slug: str = ""
    error: str = ""
    todo: str = ""
    requested_by: str = ""
    created_at: datetime
    finished_at: datetime | None = None


class RekeyManyRequest(Request):
    """POST rekey: a new KEK at provider ``target`` for every VM whose KEK is at ``source``; shallow, VMs may run."""

    source: str
    target: str


class Rekeyed(Document):
    """What became of one VM of many; ``error_slug`` is empty when it went well."""

    vm: str
    old_provider: str
    old_key_id: str
    provider: str = ""
    key_id: str = ""
    error_slug: str = ""
    error: str = ""
    todo: str = ""


# Settings: /settings


class Setting(Document):
    """One setting of the controller, with what it means."""

    name: str
    value: str
    meaning: str


class SettingChange(Request):
    """PUT settings/{name}."""

    value: str = Field(max_length=200)
