"""Key providers on the command line, against a real controller with its real built-in provider."""

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sealift.cli.main import cli, run
from sealift.demo.ports import free_port
from support.command_line import CommandLine
from support.deployment import Deployment, a_deployment
from support.terminal import terminal

PASSPHRASE = "fourteen rusty anchors under the pier"


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with a_deployment(tmp_path_factory.mktemp("deployment")) as made:
        yield made


@pytest.fixture
def deployment(controller: Deployment, sealift: CommandLine) -> Deployment:
    """Somebody is logged in to it, and it has no key provider."""
    assert sealift("login", controller.url, "--token", "-", stdin=controller.token).exit_code == 0
    for one in sealift.json("key-provider", "list"):
        sealift.says("key-provider", "remove", one["name"])
    return controller


class Authority:
    """Signs certificates as a key server's administrator would."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "key servers")])
        self.pem = self._certificate(self._name, self._key.public_key(), ca=True)

    def sign(self, request: str) -> str:
        csr = x509.load_pem_x509_csr(request.encode())
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return self._certificate(csr.subject, key, ca=False)

    def pair(self) -> tuple[str, str]:
        """A certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._certificate(self._name, key.public_key(), ca=False), pem.decode()

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool) -> str:
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def kmip(authority: Authority, tmp_path: Path) -> list[str]:
    """The options of a kmip provider whose server does not answer."""
    (tmp_path / "authority.pem").write_text(authority.pem)
    servers = ["--server", f"127.0.0.1:{free_port()}", "--authority", str(tmp_path / "authority.pem")]
    return ["--kind", "kmip", *servers]


def test_a_native_provider_says_what_to_do_next(deployment: Deployment, sealift: CommandLine) -> None:
    assert "no key provider yet" in sealift.says("key-provider", "list")
    said = sealift.says("key-provider", "add", "safe", "--kind", "native")
    assert "Key provider safe (native) is added, and the default." in said
    assert "sealift key-provider export safe --output FILE" in said
    titles, row = sealift.says("key-provider", "list").splitlines()
    assert titles.split()[:4] == ["NAME", "KIND", "STATE", "DEFAULT"]
    assert row.split()[:5] == ["safe", "native", "NOT", "EXPORTED", "yes"]
    shown = sealift.says("key-provider", "show", "safe")
    assert re.search(r"exported +NEVER", shown)
    assert "note" in shown


def test_an_export_counts_after_it_was_read_back_and_opens_with_its_words_only(
    deployment: Deployment, sealift: CommandLine, tmp_path: Path
) -> None:
    """One test for all of it, since each opening takes a second by design."""
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    path = tmp_path / "safe.age"
    words, *rest = sealift.says("key-provider", "export", "safe", "--output", str(path)).splitlines()
    assert len(re.split("[ -]", words)) == 8
    assert not any(words in line for line in rest)
    assert any("was read back from the disk" in line for line in rest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_text()
    assert "AGE ENCRYPTED FILE" in before
    found = sealift.json("key-provider", "show", "safe")
    assert found["state"] == "ok"
    assert found["exported_at"]
    assert "not overwritten" in sealift.fails(2, "key-provider", "export", "safe", "--output", str(path))
    assert path.read_text() == before

    sealift.says("key-provider", "remove", "safe")
    other = sealift("key-provider", "import", str(path), "--passphrase", "-", "--json", stdin=f"{words}s")
    assert other.exit_code == 2
    assert json.loads(other.stderr)["slug"] == "export_invalid"
    (tmp_path / "words").write_text(f"{words}\n")
    said = sealift.says("key-provider", "import", str(path), "--passphrase", f"@{tmp_path / 'words'}", "--default")
    assert "Key provider safe (native) is added, and the default." in said
    assert sealift.json("key-provider", "show", "safe")["state"] == "ok"


def test_an_own_passphrase_is_not_shown(deployment: Deployment, sealift: CommandLine, tmp_path: Path) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    path = tmp_path / "safe.age"
    words = ("key-provider", "export", "safe", "--output", str(path), "--passphrase", "-", "--json")
    done = sealift(*words, stdin=f"{PASSPHRASE}\n")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"provider": "safe", "file": str(path), "passphrase": ""}
    assert PASSPHRASE not in done.output


def into_nothing(sealift: CommandLine, *words: str, full: bool) -> "subprocess.CompletedProcess[str]":
    """A command whose output nobody takes: on a disk that is full, or as after `| head -0`."""
    if full:
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-c", "from sealift.cli.main import cli, run; run(cli)", *words],
            env={**os.environ, "XDG_CONFIG_HOME": str(sealift.home)},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("words", [["key-provider", "list"], ["key-provider", "show", "safe"], ["--help"]])
def test_a_full_disk_is_said_in_one_line_and_a_closed_pipe_in_none(
    deployment: Deployment, sealift: CommandLine, words: list[str]
) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    done = into_nothing(sealift, *words, full=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the output cannot be written: No space left on device" in done.stderr
    done = into_nothing(sealift, *words, full=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_whoever_interrupts_a_change_is_told_that_it_may_be_made(
    deployment: Deployment, sealift: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    sealift.says("key-provider", "add", "safe", "--kind", "native")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(sealift.home))
    monkeypatch.setattr("httpx2.Client.request", interrupted)
    for words, told in ((["key-provider", "default", "safe"], True), (["key-provider", "list"], False)):
        with pytest.raises(SystemExit) as ended:
            run(cli, words)
        assert ended.value.code == 130
        said = capsys.readouterr().err
        assert "sealift: interrupted" in said
        assert ("the controller may still carry out what it was asked for" in said) is told


def test_a_command_line_that_is_wrong_is_told_of_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(cli, ["key-provider", "show", "--json"])
    assert ended.value.code == 2
    told = json.loads(capsys.readouterr().err)
    assert (told["slug"], told["exit_code"]) == ("invalid_input", 2)
    assert "NAME" in told["what"]
    assert "sealift key-provider show --help" in told["todo"]


def test_no_export_counts_whose_words_nobody_could_see(
    deployment: Deployment, sealift: CommandLine, tmp_path: Path
) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    for json_too in ([], ["--json"]):
        path = tmp_path / f"safe{len(json_too)}.age"
        words = ["key-provider", "export", "safe", "--output", str(path), *json_too]
        for full in (False, True):
            done = into_nothing(sealift, *words, full=full)
            assert done.returncode == 1, done.stderr
            assert f"what opens {path} could not be shown, so it is no export, and was removed" in done.stderr
            assert "Traceback" not in done.stderr
            assert not path.exists()
            assert sealift.json("key-provider", "show", "safe")["state"] == "not_exported"
    path = tmp_path / "safe.age"
    told = sealift.json("key-provider", "export", "safe", "--output", str(path))
    assert (told["file"], len(re.split("[ -]", told["passphrase"]))) == (str(path), 8)
    assert sealift.json("key-provider", "show", "safe")["state"] == "ok"


def test_a_weak_passphrase_is_asked_for_twice_and_refused_unseen(
    deployment: Deployment, sealift: CommandLine, tmp_path: Path
) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    path = tmp_path / "safe.age"
    with terminal(sealift, "key-provider", "export", "safe", "--output", str(path), "--passphrase", "prompt") as shown:
        shown.until("Passphrase: ")
        shown.type("password1234567890\n")
        shown.until("Repeat for confirmation: ")
        shown.type("password123456789\n")
        shown.until(r"do not match[^P]*Passphrase: ")
        shown.type("password1234567890\n")
        shown.until(r"(?s)do not match.*Repeat for confirmation: ")
        shown.type("password1234567890\n")
        assert shown.end() == 2
    assert "the passphrase is made of common words" in shown.text
    assert "password123" not in shown.text
    assert not path.exists()


def test_what_cannot_be_written_is_no_export(deployment: Deployment, sealift: CommandLine, tmp_path: Path) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    said = sealift.fails(2, "key-provider", "export", "safe", "--output", str(tmp_path / "none" / "safe.age"))
    assert "is not a directory" in said
    (tmp_path / "other").write_text("something else")
    other = sealift("key-provider", "import", str(tmp_path / "other"), "--passphrase", "-", stdin=PASSPHRASE)
    assert other.exit_code == 2
    assert "is not an exported key provider" in other.stderr
    for words in (["export", "safe", "--output", "-"], ["import", "-"]):
        assert "standard" in sealift.fails(2, "key-provider", *words)
    assert not Path("-").exists()
    assert sealift.json("key-provider", "show", "safe")["state"] == "not_exported"


def test_a_provider_is_tested_step_by_step(deployment: Deployment, sealift: CommandLine, tmp_path: Path) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    titles, *rows = sealift.says("key-provider", "test", "safe").splitlines()
    assert titles.split() == ["STEP", "RESULT", "TOOK", "MESSAGE"]
    assert len(rows) > 3
    assert rows[-1] == "Key provider safe does all that is asked of it."
    assert all(" ok " in row for row in rows[:-1])


def test_servers_that_do_not_answer_fail_the_test(
    deployment: Deployment, sealift: CommandLine, kmip: list[str]
) -> None:
    sealift.says("key-provider", "add", "vault", *kmip)
    said = sealift("key-provider", "test", "vault")
    assert said.exit_code == 11
    assert "FAILED" in said.stdout
    assert "does not do all that is asked of it" in said.stderr
    assert (said.stdout + said.stderr).count("Connection refused") == 1
    assert "key provider vault cannot make a key" not in said.stdout
    _, row = sealift.says("key-provider", "list").splitlines()
    assert row.split()[:5] == ["vault", "kmip", "UNREACHABLE", "yes", "0"]
    assert "NOT OK" in sealift.says("key-provider", "show", "vault")


def test_a_generated_certificate_is_printed_to_be_installed(
    deployment: Deployment, sealift: CommandLine, kmip: list[str]
) -> None:
    said = sealift.says("key-provider", "add", "vault", *kmip)
    pem = re.search(r"-----BEGIN CERTIFICATE-----\n.*-----END CERTIFICATE-----\n", said, re.DOTALL)
    assert pem
    x509.load_pem_x509_certificate(pem[0].encode())
    assert "Install this certificate" in said
    assert pem[0] in sealift.says("key-provider", "show", "vault")


def test_a_request_is_printed_and_what_was_signed_for_it_is_handed_in(
    deployment: Deployment, sealift: CommandLine, kmip: list[str], authority: Authority, tmp_path: Path
) -> None:
    added = sealift.json("key-provider", "add", "vault", *kmip, "--client", "csr")
    assert added["provider"]["state"] == "no_certificate"
    assert added["provider"]["certificate_request"] in sealift.says("key-provider", "show", "vault")
    assert "sealift key-provider certificate vault" in sealift.fails(4, "key-provider", "test", "vault")
    signed = tmp_path / "signed.pem"
    signed.write_text(authority.pair()[0])
    assert "another key" in sealift.fails(2, "key-provider", "certificate", "vault", str(signed))
    signed.write_text(authority.sign(added["provider"]["certificate_request"]))
    row = sealift.says("key-provider", "list").splitlines()[1]
    assert row.split()[:8] == ["vault", "kmip", "NO", "CERTIFICATE", "yes", "0", "of", "1"]
    said = sealift.says("key-provider", "default", "vault")
    assert "No VM can be given a key of it as it is" in said
    assert "sealift key-provider certificate vault FILE" in said
    assert "has its certificate" in sealift.says("key-provider", "certificate", "vault", str(signed))
    assert sealift.json("key-provider", "show", "vault")["state"] == "unreachable"


def test_a_request_is_shown_with_the_next_step(deployment: Deployment, sealift: CommandLine, kmip: list[str]) -> None:
    said = sealift.says("key-provider", "add", "vault", *kmip, "--client", "csr")
    assert "-----BEGIN CERTIFICATE REQUEST-----\n" in said
    assert "sealift key-provider certificate vault FILE" in said


def test_own_certificate_and_key_are_taken_and_the_key_is_never_shown(
    deployment: Deployment, sealift: CommandLine, kmip: list[str], authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.pair()
    (tmp_path / "c.pem").write_text(certificate)
    (tmp_path / "k.pem").write_text(key)
    files = ["--client-certificate", str(tmp_path / "c.pem"), "--client-key", str(tmp_path / "k.pem")]
    added = sealift("key-provider", "add", "vault", *kmip, "--client", "uploaded", *files)
    assert added.exit_code == 0, added.output
    assert "Install this certificate" not in added.output
    assert "BEGIN CERTIFICATE" not in added.output
    shown = sealift.json("key-provider", "show", "vault")
    assert shown["client_certificate"].strip() == certificate.strip()
    assert "PRIVATE" not in added.output + json.dumps(shown) + sealift.says("events", "--json")


@pytest.mark.parametrize(
    "words",
    [
        ["--kind", "native", "--server", "a:1"],
        ["--kind", "native", "--client", "csr"],
        ["--kind", "kmip"],
        ["--kind", "kmip", "--server", "a:5696"],
        ["--kind", "kmip", "--server", "kms1", "--authority", os.devnull],
        ["--kind", "kmip", *["--server", "a:5696"] * 17],
        ["--kind", "tpm"],
        [],
    ],
)
def test_what_does_not_fit_together_asks_nothing_of_the_controller(sealift: CommandLine, words: list[str]) -> None:
    sealift.fails(2, "key-provider", "add", "vault", *words)


@pytest.mark.parametrize("client", [["--client", "uploaded"], ["--client-key"], ["--client-certificate"]])
def test_certificate_and_key_go_together(
    sealift: CommandLine, kmip: list[str], authority: Authority, tmp_path: Path, client: list[str]
) -> None:
    (tmp_path / "x.pem").write_text(authority.pair()[1])
    file = [] if "uploaded" in client else [str(tmp_path / "x.pem")]
    assert "--client-certificate" in sealift.fails(2, "key-provider", "add", "vault", *kmip, *client, *file)


def test_files_that_are_no_certificates_are_refused(sealift: CommandLine, kmip: list[str], tmp_path: Path) -> None:
    for content in (b"hello", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\n" + b"x" * 65536):
        (tmp_path / "authority.pem").write_bytes(content)
        said = sealift.fails(2, "key-provider", "add", "vault", *kmip)
        assert "is not PEM text" in said
        assert "xxx" not in said


def test_names_with_odd_characters_are_refused(deployment: Deployment, sealift: CommandLine) -> None:
    for name in ("../x", "a b", "a/export", "", "ü", "-x"):
        with contextlib.suppress(SystemExit):
            assert sealift("key-provider", "add", "--kind", "native", "--", name).exit_code == 2
            shown = sealift("key-provider", "show", "--", name)
            assert shown.exit_code == 2
            assert f"the key provider name {name!r} is not valid" in shown.stderr
    assert sealift.json("key-provider", "list") == []


def test_the_default_is_changed(deployment: Deployment, sealift: CommandLine) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    sealift.says("key-provider", "add", "attic", "--kind", "native")
    assert "attic is the default now" in sealift.says("key-provider", "default", "attic")
    assert {one["name"]: one["default"] for one in sealift.json("key-provider", "list")} == {
        "attic": True,
        "safe": False,
    }


def test_what_is_gone_with_a_removed_provider_is_said(deployment: Deployment, sealift: CommandLine) -> None:
    sealift.says("key-provider", "add", "safe", "--kind", "native")
    said = sealift.says("key-provider", "remove", "safe")
    assert "never exported" in said
    assert "There is no default key provider now" in said
    sealift.fails(4, "key-provider", "remove", "safe")
