"""`sealift login`: whom it believes, what it keeps, and what it says when it cannot."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealift import client
from sealift.demo.ports import free_port
from sealift.errors import ControllerUnreachable, InvalidInput
from support.command_line import CommandLine
from support.deployment import Deployment, a_deployment


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with a_deployment(tmp_path_factory.mktemp("deployment")) as made:
        yield made


def test_the_token_is_taken_from_standard_input_and_kept_for_its_owner_alone(
    deployment: Deployment, sealift: CommandLine
) -> None:
    result = sealift("login", deployment.url, "--token", "-", stdin=f"{deployment.token}\n")
    assert result.exit_code == 0, result.output
    assert "as ada" in result.stdout
    assert "SHA256:" in result.stdout
    assert stat.S_IMODE(sealift.credentials.stat().st_mode) == 0o600
    assert stat.S_IMODE(sealift.credentials.parent.stat().st_mode) == 0o700
    assert json.loads(sealift.credentials.read_text())["url"] == deployment.url
    assert sorted(path.name for path in sealift.credentials.parent.iterdir()) == ["credentials.json"]
    assert [host["name"] for host in sealift.json("host", "list")] == ["a", "b"]


def test_the_token_is_taken_from_a_file(deployment: Deployment, sealift: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"  {deployment.token}\n")
    told = sealift.json("login", deployment.url, "--token", f"@{tmp_path / 'token'}")
    assert told["name"] == "ada"
    assert deployment.token not in json.dumps(told)


def test_a_token_on_the_command_line_is_taken_with_a_warning(deployment: Deployment, sealift: CommandLine) -> None:
    result = sealift("login", deployment.url, "--token", deployment.token)
    assert result.exit_code == 0
    assert "warning" in result.stderr
    assert deployment.token not in result.output


def test_without_a_terminal_or_a_token_it_says_how_to_give_one(deployment: Deployment, sealift: CommandLine) -> None:
    assert "--token -" in sealift.fails(2, "login", deployment.url)


def test_a_controller_that_the_token_does_not_name_is_refused(
    deployment: Deployment, sealift: CommandLine, tmp_path: Path
) -> None:
    with a_deployment(tmp_path) as other:
        result = sealift("login", other.url, "--token", "-", "--json", stdin=deployment.token)
    assert result.exit_code == 6
    assert json.loads(result.stderr)["slug"] == "fingerprint_mismatch"
    assert not sealift.credentials.exists()


def test_a_token_the_controller_does_not_know_is_refused_and_not_kept(
    deployment: Deployment, sealift: CommandLine
) -> None:
    unknown = deployment.token.rpartition(".")[0] + "." + "A" * 22
    result = sealift("login", deployment.url, "--token", "-", stdin=unknown)
    assert result.exit_code == 6
    assert result.stderr.startswith("sealift: ")
    assert not sealift.credentials.exists()


@pytest.mark.parametrize("text", ["", "hello", "slft1.admin.x.y", "slft1." + "A" * 300])
def test_what_is_not_a_token_is_refused_without_being_quoted(
    deployment: Deployment, sealift: CommandLine, text: str
) -> None:
    result = sealift("login", deployment.url, "--token", "-", stdin=text)
    assert result.exit_code == 6
    assert not text or text not in result.output


def test_a_join_token_is_for_hosts(deployment: Deployment, sealift: CommandLine) -> None:
    result = sealift("login", deployment.url, "--token", "-", stdin=deployment.join_token)
    assert result.exit_code == 2
    assert "admin token" in result.stderr


def test_nobody_at_the_address(deployment: Deployment, sealift: CommandLine) -> None:
    result = sealift("login", f"https://127.0.0.1:{free_port()}", "--token", "-", stdin=deployment.token)
    assert result.exit_code == 5
    assert "does not answer" in result.stderr


def test_later_another_authority_at_the_address_is_refused(
    deployment: Deployment, sealift: CommandLine, tmp_path: Path
) -> None:
    sealift("login", deployment.url, "--token", "-", stdin=deployment.token)
    (tmp_path / "other").mkdir()
    with a_deployment(tmp_path / "other") as other:
        kept = json.loads(sealift.credentials.read_text())
        sealift.credentials.write_text(json.dumps({**kept, "url": other.url}))
        assert "certificate" in sealift.fails(6, "host", "list")


def test_nobody_logged_in(sealift: CommandLine) -> None:
    assert "sealift login" in sealift.fails(6, "vm", "list")


def test_errors_for_scripts_carry_the_slug(sealift: CommandLine) -> None:
    told = json.loads(sealift.fails(6, "vm", "list", "--json"))
    assert told["slug"] == "not_authenticated"
    assert told["exit_code"] == 6


@pytest.mark.parametrize("damage", ["mode", "text", "version", "token", "authority"])
def test_damaged_credentials_are_named(deployment: Deployment, sealift: CommandLine, damage: str) -> None:
    sealift("login", deployment.url, "--token", "-", stdin=deployment.token)
    kept = json.loads(sealift.credentials.read_text())
    match damage:
        case "mode":
            sealift.credentials.chmod(0o644)
        case "text":
            sealift.credentials.write_text("{")
        case "version":
            sealift.credentials.write_text(json.dumps({**kept, "version": 9}))
        case _:
            sealift.credentials.write_text(json.dumps({**kept, damage: "nonsense"}))
    said = sealift.fails(2, "vm", "list")
    assert "login" in said or "chmod" in said
    assert deployment.token not in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://c", "https://c:7443"),
        ("c.example:9", "https://c.example:9"),
        ("https://[::1]:8443/", "https://[::1]:8443"),
        ("HTTPS://C.Example", "https://c.example:7443"),
    ],
)
def test_an_address_is_completed(text: str, expected: str) -> None:
    assert client.normal_url(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "http://c", "https://u:p@c", "https://c/x", "https://c:0", "https://c:x", "https://c?q", "https://[::1"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        client.normal_url(text)


def test_the_client_says_when_a_connection_breaks_off(deployment: Deployment, sealift: CommandLine) -> None:
    sealift("login", deployment.url, "--token", "-", stdin=deployment.token)
    kept = client.Credentials(deployment.url, *_pinned(sealift, deployment))
    with client.Client(kept) as made:
        assert made.whoami().name == "ada"
        deployment.down()
        try:
            with pytest.raises(ControllerUnreachable):
                made.whoami()
        finally:
            deployment.up()
        assert made.whoami().name == "ada"


def _pinned(sealift: CommandLine, deployment: Deployment) -> tuple[str, client.Token]:
    from sealift.domain.token import parse_token

    return json.loads(sealift.credentials.read_text())["authority"], parse_token(deployment.token)
