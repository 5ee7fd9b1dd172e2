"""The agent's configuration: one TOML file, every key optional, unknown keys refused by name.

name = "host-a"                       # default: the machine's host name
listen = "0.0.0.0:7420"               # controllers call here
migration_listen = "0.0.0.0:7421"     # the doorman: other hosts' moves
address = "host-a:7420"               # what controllers are told to call
migration_address = "10.0.0.1:7421"   # what other hosts are told to call
accelerator = "auto"                  # kvm, tcg or auto
sealed_channel = true                 # false: this host says that it cannot seal moves
qemu = "qemu-system-x86_64"
run_directory = "/run/sealift"

Both addresses default to the IP address from which this host reached the controller when it joined.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
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

    def at(self, own_address: str) -> AgentSettings:
        """The settings with addresses that were left open: ``own_address``, an IP address, and the listeners' ports."""
        host = f"[{own_address}]" if ":" in own_address else own_address
        port, migration_port = split_address(self.listen)[1], split_address(self.migration_listen)[1]
        return replace(
            self,
            address=self.address or f"{host}:{port}",
            migration_address=self.migration_address or f"{host}:{migration_port}",
        )

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
    for key in ("listen", "migration_listen", "address", "migration_address"):
        if key in table:
            split_address(table[key])
    return AgentSettings(state_directory=state_directory, **table)
