"""A secret does not show, compare, hash, pickle, copy or format itself; only ``reveal`` reads it."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest

from sealift.secret import Secret

RAW = b"sixteen bytes..!"


@pytest.fixture
def held() -> Secret:
    return Secret(RAW, length=16)


def test_reveal_gives_the_bytes(held):
    assert held.reveal() == RAW
    assert Secret(bytearray(RAW), length=16).reveal() == Secret(memoryview(RAW), length=16).reveal() == RAW


def test_it_holds_a_copy_of_its_own():
    given = bytearray(RAW)
    held = Secret(given, length=16)
    given[:] = bytes(16)
    assert held.reveal() == RAW


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_wrong_length_is_refused_without_quoting(length):
    with pytest.raises(ValueError, match="16") as caught:
        Secret(RAW, length=length)
    assert "sixteen" not in str(caught.value)


def test_no_repr_and_no_str_shows_it(held):
    for shown in (repr(held), str(held), f"{held!r}", f"{[held]}", "%s" % held, "%r" % (held,)):  # noqa: UP031
        assert "sixteen" not in shown
        assert RAW.hex() not in shown
        assert "Secret" in shown


def test_no_log_shows_it(held, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("holding %s and %r", held, held)
    assert "sixteen" not in caplog.text
    assert "<Secret>" in caplog.text


def test_no_format(held):
    with pytest.raises(TypeError):
        f"{held}"
    with pytest.raises(TypeError):
        format(held, "x")


def test_no_comparison(held):
    for compare in (lambda: held == held, lambda: held != held, lambda: held == RAW, lambda: held == RAW):
        with pytest.raises(TypeError):
            compare()
    with pytest.raises(TypeError):
        _ = held in [RAW]


def test_no_order_no_hash_no_length_no_bytes_no_iteration(held):
    for use in (lambda: held < held, lambda: hash(held), lambda: {held}, lambda: len(held), lambda: bytes(held)):
        with pytest.raises(TypeError):
            use()
    for use in (lambda: list(held), lambda: memoryview(held), lambda: held[0], lambda: held + held):
        with pytest.raises(TypeError):
            use()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle(held, protocol):
    with pytest.raises(TypeError):
        pickle.dumps(held, protocol)


def test_no_copy_and_no_json(held):
    for use in (copy.copy, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError):
            use(held)
    with pytest.raises(TypeError):
        copy.deepcopy({"key": held})


def test_no_dict_to_look_into(held):
    with pytest.raises(TypeError):
        vars(held)
    with pytest.raises(AttributeError):
        held.note = "x"


def test_wipe_overwrites_and_ends_it(held):
    inner = held._raw
    held.wipe()
    held.wipe()
    assert inner == bytes(16)
    with pytest.raises(ValueError, match="wiped"):
        held.reveal()
    assert repr(held) == "<Secret>"
