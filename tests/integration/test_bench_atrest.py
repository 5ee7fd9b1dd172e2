"""The benchmark of encryption at rest runs and writes what its readers expect. At this size figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.guest import CACHE

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).parents[2]
OPERATIONS = ("encrypt", "rekey --deep", "decrypt")
STARTS = ("start", "start, keys fetched")


def test_a_small_run_writes_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    sizes = ["--size", "0.01", "--runs", "1", "--vms", "2", "--starts", "1"]
    command = [sys.executable, str(ROOT / "bench" / "atrest.py"), *sizes, "--json", str(report)]
    before = set(CACHE.glob("*"))
    ran = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written: dict[str, Any] = json.loads(report.read_text())
    assert (written["machine"]["size_gib"], written["machine"]["vms"]) == (0.01, 2)
    rows = {(row["name"], row["path"]): row for row in written["results"]}
    assert rows.keys() == {
        *((name, path) for path in STARTS for name in ("encrypted", "plain")),
        ("sealift", "rekey --from --to"),
        *((name, operation) for name in ("sealift", "qemu-img") for operation in OPERATIONS),
    }
    assert all(row["runs"] == 1 and row["seconds"] > 0 for row in rows.values())
    for operation in OPERATIONS:
        ours, theirs = rows["sealift", operation], rows["qemu-img", operation]
        assert ours["throughput_ratio"] == pytest.approx(ours["gb_per_s"] / theirs["gb_per_s"], rel=0.01)
        assert ours["cpu_s_per_gb_by"].keys() == {"agent", "controller"}
        assert operation in ran.stdout
    assert not {path.name for path in set(CACHE.glob("*")) - before if path.name.startswith("atrest-")}
