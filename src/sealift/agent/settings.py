"""The agent's configuration: one TOML file, every key optional, unknown keys refused by name.

name = "host-a"                       # default: the machine's host name
listen = "0.0.0.0:7420"               # controllers call here
migration_listen = "0.0.0.0:7421"     # the doorman: other hosts' moves
address = "host-a:7420"               # what controllers are told to call; default: name and port of `listen`
migration_address = "10.0.0.1:7421"   # what other hosts are told to call; default: as `address`, doorman's port
accelerator = "auto"                  # kvm, tcg or auto
sealed_channel = true                 # false: this host says that it cannot seal moves
qemu = "qemu-system-x86_64"
run_directory = "/run/sealift"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from sealift.channel.relay_spec import split_address
from sealift.domain.vm import Accelerator, check_name
from sealift.errors import InvalidInput


@dataclass(frozen=True)
class AgentSettings:
    """The configuration with its defaults filled in. Addresses are ``host:port``."""

    name: str
    state_directory: Path
    listen: str = "0.0.0.0:7420"
    migration_listen: str = "0.0.0.0:7421"
    address: str = ""
    migration_address: str = ""
    accelerator: Accelerator = Accelerator.AUTO
    sealed_channel: bool = True
    qemu: str = "qemu-system-x86_64"
    run_directory: Path = Path("/run/sealift")

    @property
    def database(self) -> Path:
        return self.state_directory / "agent.db"

    @property
    def identity(self) -> Path:
        return self.state_directory / "identity"

    @property
    def commits(self) -> Path:
        return self.state_directory / "commits"

    @property
    def relay_logs(self) -> Path:
        return self.state_directory / "relays"

    @property
    def doors(self) -> Path:
        return self.run_directory / "doors"


def parse_settings(text: str, *, hostname: str, state_directory: Path) -> AgentSettings:
    """The settings in ``text`` (TOML); raises InvalidInput naming the key that is wrong."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"the agent's configuration is not valid TOML: {error}") from error
    known = {field.name for field in fields(AgentSettings)} - {"state_directory"}
    for key, value in table.items():
        if key not in known:
            raise InvalidInput(f"the agent's configuration has an unknown key '{key}'", todo=f"known: {sorted(known)}")
        if not isinstance(value, bool if key == "sealed_channel" else str):
            raise InvalidInput(f"the agent's configuration: '{key}' has the wrong type")
    table.setdefault("name", hostname.split(".")[0])
    check_name("host", table["name"])
    if "accelerator" in table:
        try:
            table["accelerator"] = Accelerator(table["accelerator"])
        except ValueError:
            raise InvalidInput("the agent's configuration: accelerator is kvm, tcg or auto") from None
    if "run_directory" in table:
        table["run_directory"] = Path(table["run_directory"])
    settings = AgentSettings(state_directory=state_directory, **table)
    port = split_address(settings.listen)[1]
    doorman_port = split_address(settings.migration_listen)[1]
    address = settings.address or f"{hostname}:{port}"
    host, _ = split_address(address)
    migration_address = settings.migration_address or f"{host}:{doorman_port}"
    split_address(migration_address)
    table.update(address=address, migration_address=migration_address)
    return AgentSettings(state_directory=state_directory, **table)
