"""The self-test passes on this host, and a cipher that computes something else does not pass it."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealift.channel import selftest
from sealift.errors import SelfTestFailed


def test_the_known_answers_are_given_here():
    assert selftest.run() == selftest.CHECKS == 6


class Faulty:
    """The real cipher, for faults to be built on."""

    def __init__(self, key):
        self.real = AESGCM(key)

    def encrypt(self, nonce, data, associated_data):
        return self.real.encrypt(nonce, data, associated_data)

    def encrypt_into(self, nonce, data, associated_data, buf):
        return self.real.encrypt_into(nonce, data, associated_data, buf)

    def decrypt_into(self, nonce, data, associated_data, buf):
        return self.real.decrypt_into(nonce, data, associated_data, buf)


class WrongWhenSealing(Faulty):
    def encrypt_into(self, nonce, data, associated_data, buf):
        written = super().encrypt_into(nonce, data, associated_data, buf)
        buf[0] ^= 1
        return written


class WrongWhenOpening(Faulty):
    def decrypt_into(self, nonce, data, associated_data, buf):
        written = super().decrypt_into(nonce, data, associated_data, buf)
        buf[-1] ^= 0x80
        return written


class RefusesEverything(Faulty):
    def decrypt_into(self, nonce, data, associated_data, buf):
        raise InvalidTag


class TakesEverything(Faulty):
    def decrypt_into(self, nonce, data, associated_data, buf):
        try:
            return super().decrypt_into(nonce, data, associated_data, buf)
        except InvalidTag:
            return len(buf)


@pytest.mark.parametrize("cipher", [WrongWhenSealing, WrongWhenOpening, RefusesEverything, TakesEverything])
@pytest.mark.parametrize("where", ["selftest", "records"])
def test_a_cipher_that_computes_something_else(monkeypatch: pytest.MonkeyPatch, cipher, where):
    monkeypatch.setattr(f"sealift.channel.{where}.AESGCM", cipher)
    with pytest.raises(SelfTestFailed) as caught:
        selftest.run()
    assert caught.value.slug == "self_test_failed"
    assert caught.value.todo
