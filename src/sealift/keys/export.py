"""A native key provider as a file that can be kept in a safe: age under a passphrase, ASCII-armoured.

The file is an age v1 file with one scrypt recipient (https://age-encryption.org/v1), so `age --decrypt` opens it too.
In it is one line of JSON, exactly

    {"format":"sealift-key-provider","version":1,"name":"NAME","kdk":"64 lower-case hex digits"}

It is put together and taken apart as bytes, so no JSON parser makes a string of the key. The passphrase has to be one
for a moment, since the age library takes nothing else.

age stretches the passphrase so that one guess takes about a second here. That does not save a guessable one, so eight
words drawn from 2048 (88 bits) are what Sealift proposes, and others are measured.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable
from typing import Final

import pyrage
from mnemonic import Mnemonic
from zxcvbn import zxcvbn

from sealift.domain.vm import check_name
from sealift.errors import ExportInvalid, PassphraseWeak
from sealift.keys.storage import KDK_BYTES
from sealift.secret import Secret

WORDS: Final = 8
_BITS_PER_WORD: Final = 11
MIN_PASSPHRASE: Final = 16
MIN_SCORE: Final = 3
_MEASURED: Final = 72  # zxcvbn refuses longer texts: its time grows with the square of the length
MAX_EXPORT: Final = 1 << 16
_ARMOUR: Final = "-----BEGIN AGE ENCRYPTED FILE-----"
_ARMOUR_WITHIN: Final = 1024  # age takes white space before it
_PAYLOAD: Final = re.compile(
    rb'\{"format":"sealift-key-provider","version":1,"name":"([A-Za-z0-9][A-Za-z0-9._-]{0,62})","kdk":"([0-9a-f]{64})"\}\n'
)
_VERSION: Final = re.compile(rb'\{"format":"sealift-key-provider","version":([0-9]{1,9})[,}]')


def draw_words(draw: Callable[[int], bytes]) -> str:
    """Eight words with hyphens between: 88 bits, evenly. ``draw(n)`` gives n bytes that nobody can guess.

    The words are those of BIP-39, English: chosen to be told apart by their first four letters.
    """
    words = Mnemonic("english").wordlist
    number = int.from_bytes(draw(WORDS * _BITS_PER_WORD // 8), "big")
    picks = [number >> _BITS_PER_WORD * place & (1 << _BITS_PER_WORD) - 1 for place in reversed(range(WORDS))]
    return "-".join(words[pick] for pick in picks)


def check_passphrase(text: str) -> None:
    """Raises PassphraseWeak for what could be guessed; the message gives the rule and never quotes the passphrase."""
    if len(text) < MIN_PASSPHRASE:
        raise _weak(f"has fewer than {MIN_PASSPHRASE} characters")
    if zxcvbn(text[:_MEASURED], user_inputs=["sealift"])["score"] < MIN_SCORE:
        raise _weak("is made of common words, names, dates or patterns")


def encode_payload(provider_name: str, kdk: Secret) -> bytes:
    """What is sealed in the file: the line of the module's docstring, with its newline."""
    name = check_name("key provider", provider_name).encode()
    digits = binascii.hexlify(kdk.reveal())
    return b'{"format":"sealift-key-provider","version":1,"name":"' + name + b'","kdk":"' + digits + b'"}\n'


def decode_payload(payload: bytes) -> tuple[str, Secret]:
    """Name and key of ``encode_payload``; raises ExportInvalid, which never quotes what it was given."""
    if found := _PAYLOAD.fullmatch(payload):
        return found[1].decode(), Secret(binascii.unhexlify(found[2]), length=KDK_BYTES)
    version = _VERSION.match(payload)
    if version and int(version[1]) != 1:
        raise _invalid(
            f"it is of version {int(version[1])}", "import it with the Sealift that wrote it, or a newer one"
        )
    raise _invalid("it opens and is something else", "give the file that `sealift key-provider export` wrote")


def seal_export(provider_name: str, kdk: Secret, passphrase: Secret) -> str:
    """The file for a provider's key derivation key. Takes about a second; the passphrase is UTF-8."""
    payload = encode_payload(provider_name, kdk)
    sealed: bytes = pyrage.passphrase.encrypt(payload, passphrase.reveal().decode(), armored=True)
    return sealed.decode()


def open_export(file: str, passphrase: Secret) -> tuple[str, Secret]:
    """The provider's name and its key derivation key; raises ExportInvalid. Takes about a second."""
    if _ARMOUR not in file[:_ARMOUR_WITHIN]:
        raise _invalid("it is not an exported key provider", "give the file that `sealift key-provider export` wrote")
    try:
        raw, words = file.strip().encode("ascii"), passphrase.reveal().decode()
        payload = pyrage.passphrase.decrypt(raw if len(raw) <= MAX_EXPORT else b"", words)
    except pyrage.DecryptError as error:
        # The library's words, of which the first line says it; it does not quote what it was given.
        said = (str(error).splitlines() or ["no reason"])[0]
        raise _invalid(f"it does not open ({said})", "check the passphrase, and that the file is whole") from None
    except UnicodeError:
        raise _invalid("file or passphrase is no text", "give the file as it was exported") from None
    return decode_payload(payload)


def _weak(why: str) -> PassphraseWeak:
    return PassphraseWeak(
        f"the passphrase {why}",
        todo=f"give {MIN_PASSPHRASE} characters or more that nobody would guess, or let Sealift draw eight words",
    )


def _invalid(why: str, todo: str) -> ExportInvalid:
    return ExportInvalid(f"the exported key provider cannot be read: {why}", todo=todo)
