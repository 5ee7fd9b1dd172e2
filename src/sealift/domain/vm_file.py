"""The VM file (TOML, docs/vm-file.md) read into a ``VmConfig``, and a ``VmConfig`` written down again; pure.

Every key that is not known is refused by name: a misspelt key must not silently mean its default.

What Sealift writes differs from what people write in one key: ``disks.dek``, the id of the disk's data-encryption key.
A person cannot choose it, so ``parse_vm_toml`` refuses it and ``parse_vm_table`` reads it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Literal, TypeVar
from uuid import UUID

from sealift.domain.vm import Accelerator, Boot, Disk, Network, VmConfig
from sealift.errors import InvalidInput

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,16})\s*(?:([KMGT])(?:iB)?|B)")
_NOT_YET = ("tpm", "firmware", "nvram")

_T = TypeVar("_T")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``512MiB``, ``2G``, ``524280KiB`` or ``512B``: powers of 1024; raises InvalidInput."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise InvalidInput("a size is not valid", todo='write it as "512MiB", "2G" or "524280KiB"')
    return int(found[1]) * (_UNITS[found[2]] if found[2] else 1)


class _Table:
    """One TOML table, whose keys are taken one by one; what is left over at the end is refused."""

    def __init__(self, name: str, values: Mapping[str, object]) -> None:
        self._name = name
        self._values = dict(values)

    def _key(self, key: str) -> str:
        # A quoted TOML key may hold anything, also what would break a line of the log.
        word = key if key.isprintable() else ascii(key)
        return f"{self._name}.{word}" if self._name else word

    def take(self, key: str, kind: type[_T], word: str, default: _T | None = None) -> _T:
        """The value of ``key``; without a default it must be there. ``word`` says in the message what it must be."""
        if key not in self._values:
            if default is None:
                raise InvalidInput(f"the VM file does not set {self._key(key)}", todo=f"set it to {word}")
            return default
        value = self._values.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidInput(f"the VM file's {self._key(key)} is not {word}", todo=f"set it to {word}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.take(key, str, "a text", default)
        if any(ord(char) < 32 or ord(char) == 127 for char in value):
            raise InvalidInput(f"the VM file's {self._key(key)} has a control character", todo="remove it")
        return value

    def choice(self, key: str, words: tuple[str, ...], default: str | None = None) -> str:
        value = self.text(key, default)
        if value not in words:
            listed = ", ".join(f'"{word}"' for word in words if word)
            raise InvalidInput(f"the VM file's {self._key(key)} is not one we know", todo=f"choose one of {listed}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        if default is not None and key not in self._values:
            return default
        try:
            size = parse_size(self.text(key))
        except InvalidInput as error:
            raise InvalidInput(f"the VM file's {self._key(key)} is not a size", todo=error.todo) from None
        if not size:
            raise InvalidInput(f"the VM file's {self._key(key)} is nothing", todo="give a size, or leave it out")
        return size

    def uuid(self, key: str) -> UUID | None:
        """The uuid of ``key``; None where there is none."""
        if not (given := self.text(key, "")):
            return None
        try:
            return UUID(given)
        except ValueError:
            raise InvalidInput(
                f"the VM file's {self._key(key)} is not one", todo="leave it out to have one drawn"
            ) from None

    def refuse(self, key: str, because: str, todo: str) -> None:
        if key in self._values:
            raise InvalidInput(f"the VM file sets {self._key(key)}: {because}", todo=todo)

    def table(self, key: str) -> _Table | None:
        if key not in self._values:
            return None
        value = self._values.pop(key)
        if not isinstance(value, dict):
            raise InvalidInput(f"the VM file's {self._key(key)} is not a table", todo=f"write it as [{key}]")
        return _Table(self._key(key), value)

    def tables(self, key: str) -> list[_Table]:
        value = self._values.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise InvalidInput(f"the VM file's {self._key(key)} is not a list of tables", todo=f"write [[{key}]]")
        return [_Table(f"{self._key(key)}[{number}]", item) for number, item in enumerate(value)]

    def done(self) -> None:
        if self._values:
            listed = ", ".join(sorted(self._key(key) for key in self._values))
            raise InvalidInput(f"the VM file has keys we do not know: {listed}", todo="docs/vm-file.md lists them all")


def parse_vm_toml(text: str, *, new_uuid: UUID, mac: str) -> VmConfig:
    """The VM that a TOML file describes; raises InvalidInput.

    ``new_uuid`` and ``mac`` were drawn by the caller for this VM; they are used where the file names none.
    """
    try:
        top = _Table("", tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"the VM file is not TOML: {error}") from None
    except (ValueError, RecursionError):
        # Python's own limits, which its TOML reader lets through: digits of a number, and nesting.
        raise InvalidInput("the VM file has too long a number, or nests too deep") from None

    return _read(top, new_uuid=new_uuid, mac=mac, ours=False)


def parse_vm_table(table: Mapping[str, object], name: str = "vm") -> VmConfig:
    """The VM that ``dump_vm_toml`` wrote under ``name``, read from that table; raises InvalidInput.

    Nothing is drawn here: it must name a uuid, and a network card without an address stays without.
    """
    return _read(_Table(name, table), new_uuid=None, mac="", ours=True)


def _read(top: _Table, *, new_uuid: UUID | None, mac: str, ours: bool) -> VmConfig:
    for key in _NOT_YET:
        top.refuse(
            key,
            "UEFI variables and vTPM state are not supported until they can be encrypted too",
            "remove it; the VM boots with SeaBIOS, or its kernel directly",
        )
    uuid = top.uuid("uuid") or new_uuid
    if uuid is None:
        raise InvalidInput("the VM file does not set the VM's uuid")
    roles: dict[str, Literal["", "controller"]] = {"": "", "controller": "controller"}
    config = VmConfig(
        name=top.text("name"),
        uuid=uuid,
        vcpus=top.take("vcpus", int, "a whole number"),
        memory_bytes=top.size("memory"),
        machine=top.text("machine", "q35"),
        cpu=top.text("cpu", ""),
        accelerator=Accelerator(top.choice("accelerator", tuple(each.value for each in Accelerator), "auto")),
        disks=tuple(_disk(table, ours=ours) for table in top.tables("disks")),
        network=_network(top.table("network"), mac),
        boot=_boot(top.table("boot")),
        serial=top.text("serial", ""),
        role=roles[top.choice("role", tuple(roles), "")],
    )
    top.done()
    return config


def _disk(table: _Table, *, ours: bool) -> Disk:
    formats: dict[str, Literal["qcow2", "raw"]] = {"qcow2": "qcow2", "raw": "raw"}
    if not ours:
        table.refuse("dek", "Sealift chooses the keys of disks", "remove it; `sealift vm create --encrypt` encrypts")
    disk = Disk(
        path=table.text("path"),
        format=formats[table.choice("format", tuple(formats))],
        dek=table.uuid("dek"),
        size_bytes=table.size("size", 0),
    )
    table.done()
    return disk


def _network(table: _Table | None, mac: str) -> Network:
    if table is None:
        return Network()
    kinds: dict[str, Literal["none", "user", "bridge"]] = {"none": "none", "user": "user", "bridge": "bridge"}
    kind = kinds[table.choice("kind", tuple(kinds))]
    network = Network(kind, table.text("bridge", ""), table.text("mac", "").lower() or ("" if kind == "none" else mac))
    table.done()
    return network


def _boot(table: _Table | None) -> Boot | None:
    if table is None:
        return None
    boot = Boot(table.text("kernel"), table.text("initrd", ""), table.text("cmdline", ""))
    table.done()
    return boot


def dump_vm_toml(config: VmConfig, under: str = "vm") -> str:
    """The whole configuration as TOML, in the table ``under``, each line printable; ends with a newline.

    ``parse_vm_table`` reads it back to an equal configuration. The same configuration gives the same text.
    """
    network, boot = config.network, config.boot
    lines = [f"[{under}]", _line("name", config.name), _line("uuid", str(config.uuid)), f"vcpus = {config.vcpus}"]
    lines.append(_line("memory", _size(config.memory_bytes)))
    lines += _lines(
        machine=config.machine,
        cpu=config.cpu,
        accelerator=config.accelerator.value,
        serial=config.serial,
        role=config.role,
    )
    for disk in config.disks:
        lines += ["", f"[[{under}.disks]]"]
        lines += _lines(
            path=disk.path,
            format=disk.format,
            size=_size(disk.size_bytes) if disk.size_bytes else "",
            dek=str(disk.dek) if disk.dek else "",
        )
    if network.kind != "none":
        lines += ["", f"[{under}.network]", *_lines(kind=network.kind, bridge=network.bridge, mac=network.mac)]
    if boot is not None:
        lines += ["", f"[{under}.boot]", _line("kernel", boot.kernel)]
        lines += _lines(initrd=boot.initrd, cmdline=boot.cmdline)
    return "\n".join(lines) + "\n"


def _lines(**values: str) -> list[str]:
    """Keys whose default is the empty text are left out where they have it."""
    return [_line(key, value) for key, value in values.items() if value]


def _line(key: str, value: str) -> str:
    return f"{key} = {quoted(value)}"


def quoted(text: str) -> str:
    """``text`` as a TOML basic string (TOML 1.0, section String), printable and on one line."""
    escaped = "".join(
        f"\\{char}" if char in '"\\' else char if char.isprintable() else f"\\U{ord(char):08x}" for char in text
    )
    return f'"{escaped}"'


def _size(size_bytes: int) -> str:
    """In the largest unit that says it exactly."""
    for unit, factor in reversed(_UNITS.items()):
        if size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}iB"
    return f"{size_bytes}B"
