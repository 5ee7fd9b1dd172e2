"""That a guest is let run in one place only: everything else about P4 rests on it."""

from __future__ import annotations

import re
from pathlib import Path

import sealift


def test_the_command_that_lets_a_guest_run_is_sent_in_one_place() -> None:
    root = Path(sealift.__file__).parent
    found = {
        str(path.relative_to(root)): len(re.findall(r"""["']cont["']""", path.read_text()))
        for path in root.rglob("*.py")
    }
    assert {path: count for path, count in found.items() if count} == {"hypervisor/qemu_vm.py": 1}


def test_nothing_starts_by_itself_what_was_received() -> None:
    """QEMU's own ways to let a guest run without being told: none is used."""
    root = Path(sealift.__file__).parent / "hypervisor"
    texts = {path.name: path.read_text() for path in root.glob("*.py")}
    for word in ("system_wakeup", "human-monitor-command", "migrate-start-postcopy"):
        assert not [name for name, text in texts.items() if word in text]
    # The machine of an encrypted VM is built on order. That lets no guest run, since every QEMU is started with -S.
    assert [name for name, text in texts.items() if '"x-exit-preconfig"' in text] == ["unlock.py"]
    assert texts["hardware.py"].count('args.append("-S")') == 1
