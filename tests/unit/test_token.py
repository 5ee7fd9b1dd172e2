"""The text of tokens: what is written is read again, and nothing else is read."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.domain.token import Token, TokenKind, fingerprint_text, parse_token
from sealift.errors import TokenInvalid
from sealift.secret import Secret

GOOD = Token(TokenKind.JOIN, bytes(range(32)), Secret(b"\xff" * 16, length=16))


@given(st.sampled_from(TokenKind), st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
def test_what_is_written_is_read_again(kind: TokenKind, fingerprint: bytes, secret: bytes) -> None:
    text = Token(kind, fingerprint, Secret(secret, length=16)).text()
    found = parse_token(f"  {text}\n")
    assert (found.kind, found.fingerprint, found.secret.reveal()) == (kind, fingerprint, secret)
    assert found.digest() == hashlib.sha256(secret).digest()
    assert found.text() == text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text + "=",
        lambda text: text.replace("slft1", "slft2"),
        lambda text: text.replace(".join.", ".root."),
        lambda text: text.replace(".join.", "."),
        lambda text: text.replace(".", "..", 1),
        lambda text: text.replace("_", "/"),
        lambda text: text[:-1] + "x",  # bits that 16 bytes do not have
        lambda text: text[:-2] + "\u00e9\u00e9",
        lambda text: "A" * 100000,
    ],
)
def test_anything_else_is_refused_and_never_quoted(change: object) -> None:
    text = change(GOOD.text())  # type: ignore[operator]
    with pytest.raises(TokenInvalid) as caught:
        parse_token(text)
    assert text == "" or text not in str(caught.value)


def test_a_token_does_not_show_its_secret() -> None:
    assert "/" not in repr(GOOD)
    assert GOOD.secret.reveal().hex() not in repr(GOOD)
    assert GOOD.text().rpartition(".")[2] not in repr(GOOD)


def test_the_fingerprint_is_the_part_of_the_token_that_people_compare() -> None:
    assert fingerprint_text(GOOD.fingerprint).removeprefix("SHA256:") == GOOD.text().split(".")[2]
