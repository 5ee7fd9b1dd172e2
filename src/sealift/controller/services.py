"""What a running controller consists of, opened and closed together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sealift.controller.access import Access
from sealift.controller.authority import Authority, load_authority
from sealift.controller.conversion_plan import MachineUuid, Planner, machine_uuid
from sealift.controller.conversion_run import ConversionTools
from sealift.controller.conversions import Conversions
from sealift.controller.encryption import Encryption
from sealift.controller.events import EventLog
from sealift.controller.inventory import Inventory
from sealift.controller.keeper import Keeper
from sealift.controller.keyring import Keyring
from sealift.controller.ledger import Ledger
from sealift.controller.link import Links
from sealift.controller.orchestrator import Orchestrator, draw_secret
from sealift.controller.providers import Providers
from sealift.controller.recovery import recover
from sealift.controller.run import Draw
from sealift.controller.settings import ControllerSettings
from sealift.controller.store import Store, open_store
from sealift.controller.vm_keys import VmKeys
from sealift.controller.watch import Pace
from sealift.domain.move import ChannelLimits
from sealift.errors import NotFound

SETTINGS_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What ``init`` fixed: who this controller is, where it listens, and the names it is called by."""

    controller: UUID
    listen: str  # host:port
    addresses: tuple[str, ...]

    @property
    def url(self) -> str:
        """Where people and agents reach the controller: its first name, and the port it listens on."""
        name = self.addresses[0]
        return f"https://{f'[{name}]' if ':' in name else name}:{self.listen.rpartition(':')[2]}"

    def dump(self) -> bytes:
        """As stored in ``controller.json``."""
        document = {
            "version": SETTINGS_VERSION,
            "controller": str(self.controller),
            "listen": self.listen,
            "addresses": list(self.addresses),
        }
        return json.dumps(document, indent=2).encode() + b"\n"


def settings_path(state: Path) -> Path:
    """The file of the settings; it is written last by ``init``, so where it is, everything is."""
    return state / "controller.json"


def load_settings(state: Path) -> Settings:
    """The settings of the controller in ``state``; raises NotFound when none is there."""
    try:
        document = json.loads(settings_path(state).read_text())
    except FileNotFoundError:
        raise NotFound(f"{state} holds no controller", todo="make one with `sealift controller init`") from None
    addresses: Sequence[str] = document["addresses"]
    return Settings(UUID(document["controller"]), str(document["listen"]), tuple(addresses))


@dataclass(frozen=True)
class Services:
    """The parts, wired. ``start`` once, ``close`` in the end."""

    settings: Settings
    authority: Authority
    store: Store
    events: EventLog
    links: Links
    access: Access
    inventory: Inventory
    ledger: Ledger
    orchestrator: Orchestrator
    settings_store: ControllerSettings
    providers: Providers
    keyring: Keyring
    conversions: Conversions
    encryption: Encryption
    keeper: Keeper

    async def start(self) -> None:
        """Take up what an earlier life left unfinished, and begin to keep encrypted VMs ready."""
        await recover(self.ledger, self.orchestrator, self.conversions, self.encryption)
        self.keeper.start()

    async def close(self) -> None:
        """Stop watching migrations and conversions, and close connections and database."""
        await self.keeper.stop()
        await self.encryption.stop()
        await self.orchestrator.stop()
        await self.providers.close()
        await self.links.close()
        await self.store.close()


async def open_services(
    state: Path,
    *,
    draw: Draw = draw_secret,
    pace: Pace | None = None,
    limits: ChannelLimits | None = None,
    machine: MachineUuid = machine_uuid,
) -> Services:
    """The controller whose state is in the directory ``state``; raises NotFound when it holds none.

    ``draw`` makes each attempt's secret; a test hands in its own to know what must appear nowhere. ``limits`` are those
    of every sealed channel, by default the protocol's highest; a test lowers them to see keys change. ``machine`` tells
    the SMBIOS UUID of the machine that this controller runs on.
    """
    settings = load_settings(state)
    authority = load_authority(state, settings.controller)
    store = await open_store(state / "controller.db")
    events, links = EventLog(store), Links(authority)
    settings_store = ControllerSettings(events)
    providers = Providers(events, state / "providers")
    keyring = Keyring(providers)
    inventory, ledger = Inventory(events, links, VmKeys(keyring)), Ledger(events)
    pace = pace or Pace()
    conversions = Conversions(events, providers.fresh)
    tools = ConversionTools(conversions, inventory, pace)
    return Services(
        settings=settings,
        authority=authority,
        store=store,
        events=events,
        links=links,
        access=Access(events, authority),
        inventory=inventory,
        ledger=ledger,
        orchestrator=Orchestrator(ledger, inventory, settings_store, draw=draw, pace=pace, limits=limits),
        settings_store=settings_store,
        providers=providers,
        keyring=keyring,
        conversions=conversions,
        encryption=Encryption(tools, Planner(inventory, providers, machine)),
        keeper=Keeper(events, inventory, providers, every_s=pace.keep_s, probe_s=pace.probe_s),
    )
