"""Takes what we use of published test vectors, unchanged, out of clones of the repositories that publish them.

    python tests/vectors/take_published.py WYCHEPROOF_CLONE FLYNN_NOISE_CLONE

writes ``aes-256-gcm.json``, ``x25519.json`` and ``noise-nnpsk0-flynn.json`` beside this file, from the commits named
below. Vectors are data; each file says where it is from and under which licence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WYCHEPROOF = "dac1dd4729fd1f8dd9e1e9f3dce51d783da6c166"
FLYNN = "4d9f71cd4ba1fe81415efac312664ccc4bc79b46"


def published(clone: str, commit: str, path: str) -> str:
    return subprocess.run(
        ["git", "-C", clone, "show", f"{commit}:{path}"], check=True, capture_output=True, text=True
    ).stdout


def aes_256_gcm(clone: str) -> dict[str, Any]:
    path = "testvectors_v1/aes_gcm_test.json"
    groups = json.loads(published(clone, WYCHEPROOF, path))["testGroups"]
    (group,) = [g for g in groups if (g["keySize"], g["ivSize"], g["tagSize"]) == (256, 96, 128)]
    note = (
        "The tests of the one group with a 256-bit key, a 96-bit IV and a 128-bit tag, unchanged; "
        "all but the group's frame is left out."
    )
    return {"provenance": _wycheproof(path, note), "tests": group["tests"]}


def x25519(clone: str) -> dict[str, Any]:
    path = "testvectors_v1/x25519_test.json"
    (group,) = json.loads(published(clone, WYCHEPROOF, path))["testGroups"]
    assert group["curve"] == "curve25519"
    note = "Every test of the file's one group, unchanged; the group's frame is left out."
    return {"provenance": _wycheproof(path, note), "tests": group["tests"]}


def noise_nnpsk0(clone: str) -> dict[str, Any]:
    path, name = "vectors.txt", "Noise_NNpsk0_25519_AESGCM_SHA256"
    blocks = [
        dict(line.split("=", 1) for line in block.splitlines())
        for block in published(clone, FLYNN, path).strip().split("\n\n")
    ]
    return {
        "provenance": {
            "repository": "github.com/flynn/noise",
            "commit": FLYNN,
            "file": path,
            "licence": "BSD-3-Clause",
            "licence_text": published(clone, FLYNN, "LICENSE").splitlines(),
            "note": "Every vector of that file with this protocol name; each line NAME=VALUE is a member here.",
        },
        "tests": [block for block in blocks if block["handshake"] == name],
    }


def _wycheproof(path: str, note: str) -> dict[str, str]:
    return {
        "repository": "github.com/C2SP/wycheproof",
        "commit": WYCHEPROOF,
        "file": path,
        "licence": "Apache-2.0",
        "note": note,
    }


def text(content: dict[str, Any]) -> str:
    """One line for each test."""
    provenance = json.dumps(content["provenance"], indent=1).replace("\n", "\n ")
    tests = ",\n  ".join(json.dumps(test) for test in content["tests"])
    return f'{{\n "provenance": {provenance},\n "tests": [\n  {tests}\n ]\n}}\n'


if __name__ == "__main__":
    wycheproof, flynn = sys.argv[1:]
    (HERE / "aes-256-gcm.json").write_text(text(aes_256_gcm(wycheproof)))
    (HERE / "x25519.json").write_text(text(x25519(wycheproof)))
    (HERE / "noise-nnpsk0-flynn.json").write_text(text(noise_nnpsk0(flynn)))
