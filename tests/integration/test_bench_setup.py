"""The benchmark of setting up runs, and writes what its readers expect. Its figures after one run mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).parents[2]


def test_a_run_writes_the_parts_of_setting_up(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "bench" / "setup.py"), "--runs", "1", "--json", str(report)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written: dict[str, Any] = json.loads(report.read_text())
    assert set(written) == {"machine", "date", "results"}
    (row,) = written["results"]
    assert (row["name"], row["path"], row["runs"]) == ("set-up", "sealift", 1)
    parts = row["parts_ms"]
    assert all(value >= 0 for value in parts.values())
    assert row["seconds"] * 1000 == pytest.approx(sum(parts.values()), abs=0.2)
    assert 0 < row["seconds_without_qemu"] < row["seconds"]
    assert all(name in ran.stdout for name in parts)
