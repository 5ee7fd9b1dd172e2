"""The VM file (TOML, docs/vm-file.md) read into a ``VmConfig``; pure.

Every key that is not known is refused by name: a misspelt key must not silently mean its default.
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
_SIZE = re.compile(r"([0-9]{1,15})\s*([KMGT])(iB)?")

_T = TypeVar("_T")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``512MiB``, ``2G`` or ``524280KiB``: powers of 1024; raises InvalidInput."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise InvalidInput("a size is not valid", todo='write it as "512MiB", "2G" or "524280KiB"')
    return int(found[1]) * _UNITS[found[2]]


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
            listed = ", ".join(f'"{word}"' for word in words)
            raise InvalidInput(f"the VM file's {self._key(key)} is not one we know", todo=f"choose one of {listed}")
        return value

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

    uuid = new_uuid
    if given := top.text("uuid", ""):
        try:
            uuid = UUID(given)
        except ValueError:
            raise InvalidInput("the VM file's uuid is not one", todo="leave it out to have one drawn") from None
    try:
        memory = parse_size(top.text("memory"))
    except InvalidInput as error:
        raise InvalidInput("the VM file's memory is not a size", todo=error.todo) from None
    config = VmConfig(
        name=top.text("name"),
        uuid=uuid,
        vcpus=top.take("vcpus", int, "a whole number"),
        memory_bytes=memory,
        machine=top.text("machine", "q35"),
        cpu=top.text("cpu", ""),
        accelerator=Accelerator(top.choice("accelerator", tuple(each.value for each in Accelerator), "auto")),
        disks=tuple(_disk(table) for table in top.tables("disks")),
        network=_network(top.table("network"), mac),
        boot=_boot(top.table("boot")),
        serial=top.text("serial", ""),
    )
    top.done()
    return config


def _disk(table: _Table) -> Disk:
    formats: dict[str, Literal["qcow2", "raw"]] = {"qcow2": "qcow2", "raw": "raw"}
    disk = Disk(path=table.text("path"), format=formats[table.choice("format", tuple(formats))])
    table.done()
    return disk


def _network(table: _Table | None, mac: str) -> Network:
    if table is None:
        return Network()
    kinds: dict[str, Literal["none", "user", "bridge"]] = {"none": "none", "user": "user", "bridge": "bridge"}
    kind = kinds[table.choice("kind", tuple(kinds))]
    bridge = table.text("bridge", "")
    given = table.text("mac", "").lower()
    table.done()
    if bridge and kind != "bridge":
        raise InvalidInput("the VM file names a bridge for another kind of network", todo='set kind = "bridge"')
    if kind == "none":
        if given:
            raise InvalidInput("the VM file sets network.mac without a network", todo="choose a kind, or remove it")
        return Network()
    if re.match(r"[0-9a-f][13579bdf]", given):
        raise InvalidInput("the VM file's network.mac is a group address", todo="begin it with 52:54:00")
    return Network(kind, bridge, given or mac)


def _boot(table: _Table | None) -> Boot | None:
    if table is None:
        return None
    boot = Boot(table.text("kernel"), table.text("initrd", ""), table.text("cmdline", ""))
    table.done()
    return boot
