"""An agent's parts: everything that its interface stands on."""

from __future__ import annotations

from dataclasses import dataclass

from sealift.agent.capabilities import CipherFacts
from sealift.agent.conversions import Conversions
from sealift.agent.join import Identity
from sealift.agent.journal import Journal
from sealift.agent.moves import Moves
from sealift.agent.settings import AgentSettings
from sealift.agent.vms import Vms
from sealift.hypervisor.base import Hypervisor
from sealift.hypervisor.images import Images


@dataclass
class Agent:
    """One host's agent; ``entry.agent`` puts it together."""

    settings: AgentSettings
    identity: Identity
    cipher: CipherFacts
    hypervisor: Hypervisor
    images: Images
    journal: Journal
    vms: Vms
    moves: Moves
    conversions: Conversions
