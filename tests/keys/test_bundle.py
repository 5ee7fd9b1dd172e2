"""The configuration file of an encrypted VM: written, read, and every way in which it may have been changed."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.domain.vm import Disk, VmConfig
from sealift.errors import BundleInvalid
from sealift.keys.bundle import (
    MAX_FILE_BYTES,
    MAX_GENERATION,
    MAX_LINES,
    Bundle,
    Judgement,
    Verdict,
    WrappedDek,
    authentic,
    differing,
    judge,
    read,
    write,
)
from sealift.keys.envelope import WRAPPED_BYTES, config_tag
from sealift.secret import Secret

VM = UUID("11111111-2222-4333-8444-555555555555")
FIRST, SECOND = UUID(int=1), UUID(int=2)
KEK, OTHER_KEK = Secret(bytes(range(32)), length=32), Secret(bytes(32), length=32)
CONFIG = VmConfig("web1", VM, 2, 512 << 20, disks=(Disk("/a", "raw", FIRST), Disk("/b", "qcow2", SECOND)))
WRAPPED = (WrappedDek(FIRST, b"\x01" * WRAPPED_BYTES), WrappedDek(SECOND, b"\xff" * WRAPPED_BYTES))
BUNDLE = Bundle(VM, 5, "vault", "key-1", WRAPPED)
FILE = write(BUNDLE, CONFIG, KEK)
LATER = write(replace(BUNDLE, generation=6), CONFIG, KEK)


def sealed(body: bytes) -> bytes:
    """A file of any content with a right tag: so that what is refused is refused for its content."""
    return body + b"# sealift-tag-v1 hmac-sha256 " + config_tag(KEK, body).hex().encode() + b"\n"


def body_with(old: str, new: str) -> bytes:
    changed = FILE.rpartition(b"# sealift-tag")[0].decode().replace(old, new, 1)
    assert changed.encode() not in FILE, f"{old!r} is not in the file"
    return changed.encode()


def test_what_was_written_is_read_and_authentic() -> None:
    assert read(FILE) == (BUNDLE, CONFIG)
    assert authentic(FILE, KEK)
    assert not authentic(FILE, OTHER_KEK)


def test_the_file_tells_a_person_what_not_to_do_and_ends_with_its_tag() -> None:
    lines = FILE.decode().split("\n")
    assert lines[0].startswith("# ")
    assert "Do not edit it" in FILE.decode()
    assert re.fullmatch("# sealift-tag-v1 hmac-sha256 [0-9a-f]{64}", lines[-2])
    assert lines[-1] == ""


def test_nothing_of_a_key_is_in_the_file() -> None:
    assert KEK.reveal() not in FILE
    assert KEK.reveal().hex().encode() not in FILE


@given(
    generation=st.integers(1, MAX_GENERATION),
    provider=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
    key_id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:+/=-]{0,127}", fullmatch=True),
    wrapped=st.lists(st.binary(min_size=WRAPPED_BYTES, max_size=WRAPPED_BYTES), max_size=3),
)
def test_every_bundle_is_read_back(generation: int, provider: str, key_id: str, wrapped: list[bytes]) -> None:
    deks = tuple(WrappedDek(UUID(int=number), each) for number, each in enumerate(wrapped))
    config = replace(CONFIG, disks=tuple(Disk("/d", "raw", each.dek) for each in deks))
    bundle = Bundle(VM, generation, provider, key_id, deks)
    assert read(write(bundle, config, KEK)) == (bundle, config)


def test_every_flipped_bit_is_caught() -> None:
    for bit in range(8 * len(FILE)):
        changed = bytearray(FILE)
        changed[bit // 8] ^= 1 << bit % 8
        # The other file is the last one here, so nothing but the tag can tell.
        judgement = judge(bytes(changed), LATER, KEK)
        assert judgement.verdict is Verdict.TAMPERED, f"bit {bit}"


def test_every_truncation_is_caught() -> None:
    for length in range(len(FILE)):
        assert judge(FILE[:length], LATER, KEK).verdict is Verdict.TAMPERED
        assert judge(FILE[length + 1 :], LATER, KEK).verdict is Verdict.TAMPERED


@given(st.binary(min_size=1, max_size=40), st.integers(0, len(FILE)))
def test_everything_put_in_is_caught(extra: bytes, at: int) -> None:
    changed = FILE[:at] + extra + FILE[at:]
    assert judge(changed, LATER, KEK).verdict is Verdict.TAMPERED


def test_a_file_with_two_tags_is_judged_by_the_last() -> None:
    doubled = sealed(FILE)
    assert authentic(doubled, KEK)
    assert judge(FILE + FILE.splitlines(keepends=True)[-1], LATER, KEK).verdict is Verdict.TAMPERED


def test_an_older_copy_is_told_from_a_newer_one() -> None:
    assert judge(FILE, LATER, KEK) == Judgement(Verdict.OLDER, ("generation 5, and the controller wrote 6 last",))
    assert judge(LATER, FILE, KEK) == Judgement(Verdict.NEWER, ("generation 6, and the controller wrote 5 last",))


@pytest.mark.parametrize("kek", [KEK, OTHER_KEK, None])
def test_the_last_file_is_right_whatever_key_there_is(kek: Secret | None) -> None:
    assert judge(FILE, FILE, kek) == Judgement(Verdict.OK, ())


def test_without_the_key_only_what_claims_to_be_newer_may_be_it() -> None:
    claims = judge(LATER, FILE, None)
    assert claims == Judgement(Verdict.LOCKED, tuple(differing(FILE, LATER)), claims.unproved)
    assert "key key-1 of key provider vault, which it names" in claims.unproved
    before = judge(FILE, LATER, None)
    assert (before.verdict, before.unproved) == (Verdict.TAMPERED, claims.unproved), "it may be an older copy"
    twin = write(replace(BUNDLE, provider="other"), CONFIG, OTHER_KEK)
    foreign = write(replace(BUNDLE, vm=FIRST, generation=9), replace(CONFIG, uuid=FIRST), KEK)
    for other in (twin, foreign, b"nonsense", FILE[:-1]):
        assert judge(other, FILE, None) == Judgement(Verdict.TAMPERED, tuple(differing(FILE, other)))
    assert judge(FILE, b"", None).verdict is Verdict.LOCKED


@pytest.mark.parametrize("kek", [KEK, None])
def test_no_byte_can_be_flipped_without_a_word(kek: Secret | None) -> None:
    for at in range(len(FILE)):
        changed = FILE[:at] + bytes([FILE[at] ^ 2]) + FILE[at + 1 :]
        found = judge(changed, FILE, kek)
        claims = kek is None and b"generation = 7" in changed
        assert found.verdict is (Verdict.LOCKED if claims else Verdict.TAMPERED), f"byte {at}"
        assert found.lines, f"byte {at}"


@pytest.mark.parametrize("kek", [KEK, None])
@pytest.mark.parametrize("last", [FILE, b""])
def test_a_missing_file_is_tampered(last: bytes, kek: Secret | None) -> None:
    assert judge(b"", last, kek).verdict is Verdict.TAMPERED


def test_a_file_under_another_key_is_tampered() -> None:
    assert judge(LATER, FILE, OTHER_KEK).verdict is Verdict.TAMPERED


def test_two_authentic_files_of_one_generation_are_one_too_many() -> None:
    twin = write(BUNDLE, replace(CONFIG, vcpus=3), KEK)
    assert judge(twin, FILE, KEK) == Judgement(Verdict.TAMPERED, tuple(differing(FILE, twin)))


def test_an_authentic_file_of_another_vm_is_tampered() -> None:
    elsewhere = UUID(int=9)
    other = write(replace(BUNDLE, vm=elsewhere, generation=9), replace(CONFIG, uuid=elsewhere), KEK)
    assert judge(other, FILE, KEK).verdict is Verdict.TAMPERED


def test_an_authentic_file_that_cannot_be_read_is_tampered() -> None:
    assert judge(sealed(b"# nothing\n"), FILE, KEK).verdict is Verdict.TAMPERED


@pytest.mark.parametrize("last", [b"", b"damaged"])
def test_an_authentic_file_is_newer_than_none(last: bytes) -> None:
    judgement = judge(FILE, last, KEK)
    assert judgement.verdict is Verdict.NEWER
    assert "generation 5" in judgement.lines[0]


def test_a_hand_edit_is_shown_line_by_line() -> None:
    edited = FILE.replace(b"vcpus = 2", b"vcpus = 8")
    assert judge(edited, FILE, KEK) == Judgement(Verdict.TAMPERED, ("- vcpus = 2", "+ vcpus = 8"))
    added = FILE.replace(b"vcpus = 2\n", b"vcpus = 2\n\x1b[2Jevil = \xff\n")
    assert differing(FILE, added) == ["+ \\x1b[2Jevil = \\xff"]
    assert differing(FILE, FILE.replace(b"vcpus = 2\n", b"vcpus = 2\r\n")) == ["- vcpus = 2", "+ vcpus = 2\\r"]
    assert differing(FILE, FILE[:-1]) == ["- "]


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_any_two_files_are_compared(before: bytes, now: bytes) -> None:
    lines = differing(before, now)
    assert bool(lines) is (before != now)
    assert all(line.isprintable() for line in lines)
    assert judge(now, before, KEK).verdict in {Verdict.OK, Verdict.TAMPERED}


def test_what_is_shown_is_bounded() -> None:
    lines = differing(FILE, b"x" * 10_000 + b"\n" + b"".join(b"%d\n" % number for number in range(5000)))
    assert len(lines) == MAX_LINES + 1
    assert max(map(len, lines)) < 210
    assert re.fullmatch(r"\.\.\. and [0-9]+ lines more", lines[-1])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (body_with("version = 1", "version = 2"), "version 1"),
        (body_with("version = 1\n", ""), "version 1"),
        (body_with("generation = 5", "generation = 0"), "generation"),
        (body_with("generation = 5", f"generation = {MAX_GENERATION + 1}"), "generation"),
        (body_with("generation = 5", "generation = true"), "type"),
        (body_with("generation = 5\n", ""), "keys"),
        (body_with("generation = 5", "generation = 5\ncolour = 1"), "keys"),
        (body_with('provider = "vault"', 'provider = "../vault"'), "provider"),
        (body_with('key_id = "key-1"', 'key_id = "a\\nb"'), "key id"),
        (body_with("AES-256-GCM", "NULL"), "cipher"),
        (body_with('wrapped = "AQ', 'wrapped = "'), "length|base64"),
        (body_with('wrapped = "AQEB', 'wrapped = "*QEB'), "base64"),
        (body_with('wrapped = "', 'more = 1\nwrapped = "'), "keys"),
        (body_with(str(FIRST), str(SECOND)), "twice"),
        (body_with(f'vm = "{VM}"', f'vm = "{FIRST}"'), "two VMs"),
        (body_with(f'vm = "{VM}"', 'vm = "?"'), "uuid"),
        (body_with('path = "/a"\nformat = "raw"\ndek = ', 'path = "/a"\nformat = "raw"\nkey = '), "key"),
        (body_with(f'format = "raw"\ndek = "{FIRST}"', 'format = "raw"'), "not those of the disks"),
        (body_with("vcpus = 2", "vcpus = 0"), "vcpus"),
        (body_with("[vm]", "[um]"), r"\[vm\]"),
        (body_with("[encryption]", "encryption = 1\n[other]"), r"\[encryption\]|TOML"),
        (b"# nothing\n", r"\[encryption\]"),
        (b"\xff\n", "TOML"),
        (b"a = " + b"[" * 2000 + b"\n", "TOML"),
        (b"#" * MAX_FILE_BYTES + b"\n", "bytes"),
    ],
)
def test_what_cannot_be_read_is_named(body: bytes, named: str) -> None:
    with pytest.raises(BundleInvalid, match=named):
        read(sealed(body))


@pytest.mark.parametrize(
    "file",
    [
        b"",
        FILE[:-1],
        FILE + b"\n",
        FILE.replace(b"\n# sealift-tag", b" # sealift-tag"),
        FILE.replace(b"# sealift-tag-v1", b"# sealift-tag-v2"),
        FILE.rpartition(b" ")[0] + b" " + FILE.rpartition(b" ")[2].upper(),
        FILE.splitlines(keepends=True)[-1],
    ],
)
def test_a_file_without_its_last_line_is_none(file: bytes) -> None:
    assert not authentic(file, KEK)
    with pytest.raises(BundleInvalid, match="last line"):
        read(file)


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for file in (body, sealed(body + b"\n"), sealed(FILE + body + b"\n")):
        with contextlib.suppress(BundleInvalid):
            assert isinstance(read(file)[0], Bundle)


def test_a_file_is_written_only_for_its_own_vm_and_disks() -> None:
    with pytest.raises(BundleInvalid, match="two VMs"):
        write(BUNDLE, replace(CONFIG, uuid=FIRST), KEK)
    with pytest.raises(BundleInvalid, match="not those of the disks"):
        write(BUNDLE, replace(CONFIG, disks=CONFIG.disks[:1]), KEK)
    with pytest.raises(BundleInvalid, match="not those of the disks"):
        write(replace(BUNDLE, deks=WRAPPED[:1]), CONFIG, KEK)
