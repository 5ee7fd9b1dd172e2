"""The file of an exported key provider, and how passphrases are read."""

import os
import stat
from pathlib import Path

import pytest

from sealift.api.encryption import ExportRequest, KeyProviderAdd
from sealift.cli import export_file, passphrases
from sealift.client.connection import encoded
from sealift.errors import InvalidInput
from support.command_line import CommandLine

TEXT = "-----BEGIN AGE ENCRYPTED FILE-----\nnot really\n-----END AGE ENCRYPTED FILE-----\n"


def test_it_is_written_for_its_owner_alone_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "export"
    before = os.umask(0)
    try:
        export_file.write(path, TEXT)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert export_file.read_back(path) == TEXT


@pytest.mark.parametrize("there", ["file", "dangling link", "directory"])
def test_what_is_there_is_never_overwritten(tmp_path: Path, there: str) -> None:
    path = tmp_path / "export"
    match there:
        case "file":
            path.write_text("precious")
        case "dangling link":
            path.symlink_to(tmp_path / "elsewhere")
        case _:
            path.mkdir()
    with pytest.raises(InvalidInput, match="is there already"):
        export_file.check_free(path)
    with pytest.raises(InvalidInput, match="is there already"):
        export_file.write(path, TEXT)
    assert there != "file" or path.read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_is_not_there_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a directory"):
        export_file.check_free(tmp_path / "none" / "export")


def test_a_file_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: both end a write half way."""
    import resource
    import signal

    path = tmp_path / "export"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(InvalidInput, match="cannot be written: File too large"):
            export_file.write(path, TEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff", "not an exported"), (b"root:x:0:0", "not an exported"), (b"x" * 65537, "larger than")],
)
def test_what_cannot_be_an_export_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "export"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=said):
        export_file.read_back(path)
    with pytest.raises(InvalidInput, match="cannot be read: No such file") as refused:
        export_file.read_back(tmp_path / "none")
    assert refused.value.todo


def test_a_passphrase_is_the_first_line_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("  eight words \r\nand a note\n")
    assert passphrases.read(f"@{tmp_path / 'words'}", again=True).reveal() == b"  eight words "


@pytest.mark.parametrize("content", [b"", b"\nlater\n", b"\xff\xfe", b"x" * 1025])
def test_what_is_no_passphrase_is_refused_without_being_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "words").write_bytes(content)
    with pytest.raises(InvalidInput) as refused:
        passphrases.read(f"@{tmp_path / 'words'}", again=False)
    assert "later" not in str(refused.value)
    assert "xx" not in str(refused.value)


def test_a_file_of_a_passphrase_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"{tmp_path}/none cannot be read: No such file"):
        passphrases.read(f"@{tmp_path / 'none'}", again=False)


def test_a_passphrase_on_the_command_line_is_refused(sealift: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "export").write_text(TEXT)
    for words in (["import", str(tmp_path / "export")], ["export", "safe", "--output", str(tmp_path / "new")]):
        said = sealift.fails(2, "key-provider", *words, "--passphrase", "correct horse battery")
        assert "process list" in said
        assert "horse" not in said


def test_without_a_terminal_there_is_no_prompt(sealift: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "export").write_text(TEXT)
    assert "--passphrase -" in sealift.fails(2, "key-provider", "import", str(tmp_path / "export"))


def test_secrets_are_written_out_only_in_the_body_of_a_request() -> None:
    body = ExportRequest.model_validate({"passphrase": 'a "quoted" wörd'})
    assert "quoted" not in repr(body)
    assert "quoted" not in body.model_dump_json()
    assert ExportRequest.model_validate_json(encoded(body)) == body
    uploaded = KeyProviderAdd.model_validate({"name": "k", "kind": "kmip", "members": ["a:1"], "client_key": "PEM"})
    assert KeyProviderAdd.model_validate_json(encoded(uploaded)) == uploaded
