"""Settings of the controller on the command line."""

from collections.abc import Iterator

import pytest

from support.command_line import CommandLine
from support.deployment import Deployment, a_deployment


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with a_deployment(tmp_path_factory.mktemp("deployment")) as made:
        yield made


def test_the_floor_under_all_moves_is_set_and_shown(deployment: Deployment, sealift: CommandLine) -> None:
    assert sealift("login", deployment.url, "--token", "-", stdin=deployment.token).exit_code == 0
    titles, *rows = sealift.says("settings", "list").splitlines()
    assert titles.split() == ["NAME", "VALUE", "MEANING"]
    assert any(row.split()[:2] == ["migration-encryption-floor", "none"] for row in rows)
    said = sealift.says("settings", "set", "migration-encryption-floor", "required")
    assert said.startswith("migration-encryption-floor is required: ")
    listed = {one["name"]: one["value"] for one in sealift.json("settings", "list")}
    assert listed["migration-encryption-floor"] == "required"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ["migration-encryption-floor", "sometimes"]),
        (2, ["migration-encryption-floor", "x" * 201]),
        (4, ["no-such-setting", "required"]),
        (2, ["../vms", "required"]),
    ],
)
def test_what_is_no_setting_is_refused(
    deployment: Deployment, sealift: CommandLine, code: int, words: list[str]
) -> None:
    assert sealift("login", deployment.url, "--token", "-", stdin=deployment.token).exit_code == 0
    said = sealift.fails(code, "settings", "set", *words)
    assert "sealift: " in said
    assert repr(words[0]) in said or len(words[1]) > 200
    assert code == 4 or "name" in said or len(words[1]) > 200 or "cannot be set to 'sometimes'" in said
