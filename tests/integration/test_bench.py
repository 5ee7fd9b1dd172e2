"""The benchmark of the relays runs, and writes what its readers expect. Its figures at this size mean nothing."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).parents[2]
RELAYS = {"relay_source", "relay_target"}
ROWS = {
    (name, path, channels): RELAYS
    for name, path in (("relay pair", "sealift"), ("relay pair", "no-cipher"), ("splice pair", "sealift-plain"))
    for channels in (1, 4)
}


def test_quick_run_writes_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "bench" / "relay.py"), "--quick", "--json", str(report)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written: dict[str, Any] = json.loads(report.read_text())
    assert set(written) == {"machine", "date", "results"}
    assert {"cpu", "cores", "kernel", "qemu", "python", "openssl"} <= set(written["machine"])
    assert datetime.datetime.fromisoformat(written["date"]).utcoffset() == datetime.timedelta(0)
    rows = {(row["name"], row["path"], row["channels"]): row for row in written["results"]}
    assert rows.keys() == ROWS.keys()
    assert len(rows) == len(written["results"])
    for key, row in rows.items():
        assert row["runs"] == 1
        assert row["seconds"] > 0
        assert row["gb_per_s"] > 0
        assert row["cpu_s_per_gb"] >= 0  # a run this short may be below the clock's tick
        assert row["cpu_s_per_gb_by"].keys() == ROWS[key]
        assert row["downtime_ms"] is None
        assert row["peak_rss_mib"] > 0
        assert " ".join([key[0], key[1]]) in " ".join(ran.stdout.split())
