"""The configuration file of an encrypted VM: TOML with its encryption bundle, authenticated by the last line; pure.

    # comments for whoever opens it
    [encryption]             version, generation, vm, provider, key_id, cipher
    [[encryption.deks]]      dek (the id), wrapped (base64 of keys.envelope's 60 bytes); one for each key of a disk
    [vm] ...                 the configuration, as domain.vm_file writes it
    # sealift-tag-v1 hmac-sha256 <64 lower-case hex digits>

The tag is over every byte before that line, and its newline is the last byte of the file. There is nothing in a file
that the tag does not cover. The generation rises by one with every file written for the VM, so that an older authentic
copy is told from the present one; the host and the controller both keep the last.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hmac
import itertools
import re
import tomllib
from dataclasses import dataclass
from enum import Enum
from typing import Final
from uuid import UUID

from sealift.domain.vm import VmConfig, check_name
from sealift.domain.vm_file import dump_vm_toml, parse_vm_table, quoted
from sealift.errors import BundleInvalid, InvalidInput
from sealift.keys.envelope import CIPHER, WRAPPED_BYTES, config_tag
from sealift.keys.provider import check_key_id
from sealift.secret import Secret

VERSION: Final = 1
MAX_FILE_BYTES: Final = 256 << 10
MAX_GENERATION: Final = (1 << 63) - 1
MAX_LINES: Final = 40
_MAX_LINE: Final = 200
_MAX_COMPARED: Final = 400

_HEAD: Final = """\
# Sealift wrote this file. It is the configuration of an encrypted virtual machine, and it carries the keys of its
# disks, wrapped. Do not edit it: its last line authenticates every byte, so after any change the VM is called
# "tampered" and does not start. To change the VM use `sealift vm`; to put back the last file that Sealift wrote, use
# `sealift vm restore-config`.

"""
_TAG_LINE: Final = re.compile(rb"# sealift-tag-v1 hmac-sha256 ([0-9a-f]{64})\n")
_TAG_LINE_BYTES: Final = len("# sealift-tag-v1 hmac-sha256 ") + 64 + 1


@dataclass(frozen=True)
class WrappedDek:
    """One disk's key as it stands in the file: ``wrapped`` is what ``keys.envelope.wrap`` gave."""

    dek: UUID
    wrapped: bytes


@dataclass(frozen=True)
class Bundle:
    """What the file says of keys; raises BundleInvalid when it could not stand in one. ``generation`` is 1 or more."""

    vm: UUID
    generation: int
    provider: str
    key_id: str
    deks: tuple[WrappedDek, ...]
    cipher: str = CIPHER

    def __post_init__(self) -> None:
        try:
            check_name("key provider", self.provider)
            check_key_id(self.key_id)
        except InvalidInput as error:
            raise _invalid(self.vm, error.what) from None
        if not 1 <= self.generation <= MAX_GENERATION:
            raise _invalid(self.vm, "the generation is out of range")
        if self.cipher != CIPHER:
            raise _invalid(self.vm, "the cipher is not one we know")
        if any(len(each.wrapped) != WRAPPED_BYTES for each in self.deks):
            raise _invalid(self.vm, "a wrapped key has another length")
        if len({each.dek for each in self.deks}) != len(self.deks):
            raise _invalid(self.vm, "a key is there twice")


def write(bundle: Bundle, config: VmConfig, kek: Secret) -> bytes:
    """The file. Raises BundleInvalid when bundle and configuration are not of one VM with the same keys."""
    _check_pair(bundle, config)
    lines = [
        "[encryption]",
        f"version = {VERSION}",
        f"generation = {bundle.generation}",
        f'vm = "{bundle.vm}"',
        f"provider = {quoted(bundle.provider)}",
        f"key_id = {quoted(bundle.key_id)}",
        f"cipher = {quoted(bundle.cipher)}",
        "",
    ]
    for each in bundle.deks:
        wrapped = base64.b64encode(each.wrapped).decode()
        lines += ["[[encryption.deks]]", f'dek = "{each.dek}"', f'wrapped = "{wrapped}"', ""]
    body = (_HEAD + "\n".join(lines) + "\n" + dump_vm_toml(config, under="vm")).encode()
    if len(body) + _TAG_LINE_BYTES > MAX_FILE_BYTES:
        raise _invalid(bundle.vm, f"it would have more than {MAX_FILE_BYTES} bytes")
    return body + f"# sealift-tag-v1 hmac-sha256 {config_tag(kek, body).hex()}\n".encode()


def read(file: bytes) -> tuple[Bundle, VmConfig]:
    """What a file says, whoever wrote it: ``authentic`` is another question. Raises BundleInvalid."""
    if len(file) > MAX_FILE_BYTES:
        raise _invalid(None, f"it has more than {MAX_FILE_BYTES} bytes")
    if _split(file) is None:
        raise _invalid(None, "its last line is not a tag")
    try:
        document = tomllib.loads(file.decode())
    except (ValueError, RecursionError):
        # TOML's errors and Unicode's are ValueErrors, as are Python's own limits.
        raise _invalid(None, "it is not TOML") from None
    if document.keys() != {"encryption", "vm"} or not all(isinstance(value, dict) for value in document.values()):
        raise _invalid(None, "it does not have just the tables [encryption] and [vm]")
    bundle = _read_bundle(document["encryption"])
    try:
        config = parse_vm_table(document["vm"])
    except InvalidInput as error:
        raise _invalid(bundle.vm, error.what) from None
    _check_pair(bundle, config)
    return bundle, config


def authentic(file: bytes, kek: Secret) -> bool:
    """Whether ``write`` made just these bytes with this KEK; in constant time."""
    parts = _split(file)
    return parts is not None and hmac.compare_digest(config_tag(kek, parts[0]), parts[1])


def differing(before: bytes, now: bytes) -> list[str]:
    """The lines that differ, as "- before" and "+ now": printable, at most ``MAX_LINES``, then how many more there are.

    Both may be anything; what is compared is bounded, so that nobody's file can keep us busy.
    """
    old, new = before.split(b"\n"), now.split(b"\n")
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    old, new = old[shared:], new[shared:]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    left_out = max(len(old), len(new)) - _MAX_COMPARED
    old, new = old[:_MAX_COMPARED], new[:_MAX_COMPARED]
    lines: list[str] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if kind != "equal":
            lines += [f"- {_printable(line)}" for line in old[i1:i2]] + [f"+ {_printable(line)}" for line in new[j1:j2]]
    left_out = max(left_out, 0) + max(len(lines) - MAX_LINES, 0)
    return [*lines[:MAX_LINES], f"... and {left_out} lines more"] if left_out else lines


class Verdict(Enum):
    """What a file on a host is, against the last one that the controller wrote."""

    OK = "ok"
    LOCKED = "locked"  # it claims to be newer, and the key that would prove it cannot be had
    TAMPERED = "tampered"  # not the last one written, and nothing newer
    OLDER = "older"  # authentic, and not the last
    NEWER = "newer"  # authentic, and later than what this controller has: its database is from before


@dataclass(frozen=True)
class Judgement:
    """The verdict, and what shows it to a person: the lines that differ, or the two generations.

    ``unproved`` is why the key that the file names does not tell more; empty where there is no more to tell.
    """

    verdict: Verdict
    lines: tuple[str, ...]
    unproved: str = ""


def judge(file: bytes, last: bytes, kek: Secret | None) -> Judgement:
    """What ``file`` is, when the controller wrote ``last`` last (empty: it has none).

    ``kek`` is the key that the file names (``named``), None where it cannot be had: then ``unproved`` is not empty if
    it would have told more. The generation alone tells that a file is not the last one: only one whose generation is
    higher may be newer. An empty ``file`` stands for a missing one. Never raises: both may be anything.
    """
    if not file:
        return Judgement(Verdict.TAMPERED, ("the file is missing or empty",))
    if file == last:
        return Judgement(Verdict.OK, ())
    tampered = Judgement(Verdict.TAMPERED, tuple(differing(last, file)))
    found, known = named(file), named(last)
    if found is None or (known is not None and (found.vm != known.vm or found.generation == known.generation)):
        return tampered
    newer = known is None or found.generation > known.generation
    if kek is None:
        unproved = f"key {found.key_id} of key provider {found.provider}, which it names, cannot be had now"
        return Judgement(Verdict.LOCKED if newer else Verdict.TAMPERED, tampered.lines, unproved)
    if not authentic(file, kek):
        return tampered
    if known is None:
        return Judgement(Verdict.NEWER, (f"generation {found.generation}, and the controller has no readable one",))
    verdict = Verdict.NEWER if newer else Verdict.OLDER
    return Judgement(verdict, (f"generation {found.generation}, and the controller wrote {known.generation} last",))


def named(file: bytes) -> Bundle | None:
    """What a file says of its keys, whoever wrote it; None when it cannot be read."""
    try:
        return read(file)[0]
    except BundleInvalid:
        return None


def _split(file: bytes) -> tuple[bytes, bytes] | None:
    """What the tag is over, and the tag; None when the file does not end with a line of its own that is a tag."""
    found = _TAG_LINE.fullmatch(file[-_TAG_LINE_BYTES:])
    body = file[:-_TAG_LINE_BYTES]
    return (body, bytes.fromhex(found[1].decode())) if found and body.endswith(b"\n") else None


def _read_bundle(table: dict[str, object]) -> Bundle:
    keys = {"version", "generation", "vm", "provider", "key_id", "cipher"}
    if table.get("version") != VERSION:
        raise _invalid(None, f"it is not of version {VERSION}")
    if not keys <= table.keys() <= keys | {"deks"}:
        raise _invalid(None, "[encryption] does not have just the keys it must")
    vm, generation, provider, key_id, cipher = (
        table[key] for key in ("vm", "generation", "provider", "key_id", "cipher")
    )
    deks = table.get("deks", [])
    if not (
        isinstance(vm, str)
        and type(generation) is int
        and isinstance(provider, str)
        and isinstance(key_id, str)
        and isinstance(cipher, str)
        and isinstance(deks, list)
    ):
        raise _invalid(None, "[encryption] has a value of another type")
    return Bundle(_uuid(vm), generation, provider, key_id, tuple(_read_dek(each) for each in deks), cipher)


def _read_dek(table: object) -> WrappedDek:
    if not (isinstance(table, dict) and table.keys() == {"dek", "wrapped"}):
        raise _invalid(None, "a table [[encryption.deks]] does not have just the keys it must")
    dek, wrapped = table["dek"], table["wrapped"]
    if not isinstance(dek, str) or not isinstance(wrapped, str):
        raise _invalid(None, "a table [[encryption.deks]] has a value of another type")
    try:
        return WrappedDek(_uuid(dek), base64.b64decode(wrapped, validate=True))
    except (binascii.Error, ValueError):
        raise _invalid(None, "a wrapped key is not base64") from None


def _uuid(text: str) -> UUID:
    try:
        found = UUID(text)
    except ValueError:
        raise _invalid(None, "a uuid in [encryption] is not one") from None
    return found


def _check_pair(bundle: Bundle, config: VmConfig) -> None:
    if bundle.vm != config.uuid:
        raise _invalid(bundle.vm, "bundle and configuration are of two VMs")
    if {each.dek for each in bundle.deks} != set(config.deks):
        raise _invalid(bundle.vm, "the keys in the bundle are not those of the disks")


def _printable(line: bytes) -> str:
    text = line[: 4 * _MAX_LINE].decode(errors="backslashreplace")
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:_MAX_LINE])
    return shown if len(text) <= _MAX_LINE else shown + "..."


def _invalid(vm: UUID | None, why: str) -> BundleInvalid:
    of = f" of VM {vm}" if vm else ""
    return BundleInvalid(
        f"the configuration file{of} is not valid: {why}",
        todo="put back the VM's last authentic file with `sealift vm restore-config`",
    )
