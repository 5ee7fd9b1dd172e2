"""What is asked of the registry of key providers: nonsense is refused, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealift.controller.provider_ask import ProviderAsk, check_ask
from sealift.demo.kmip import ServerAuthority
from sealift.domain.key_server import check_member
from sealift.errors import InvalidInput
from sealift.keys.kmip_link import parse_address
from sealift.secret import Secret
from support.registries import Registry, with_registry

CA = ServerAuthority()
GOOD = ProviderAsk("kms", "kmip", ("kms1.example.net:5696",), CA.pem)


def secret(text: str) -> Secret:
    return Secret(text.encode(), length=len(text.encode()))


@pytest.mark.parametrize(
    "change",
    [
        {"members": ()},
        {"members": tuple(f"kms{number}:5696" for number in range(17))},
        {"members": ("kms1:5696", "KMS1:5696")},
        {"members": ("kms1",)},
        {"server_authority": ""},
        {"client": "uploaded"},
        {"client": "uploaded", "client_certificate": CA.pem},
        {"client": "uploaded", "client_key": secret("key")},
        {"client": "uploaded", "client_certificate": "-----BEGIN PRIVATE KEY-----", "client_key": secret("key")},
        {"client_certificate": CA.pem},
        {"client": "csr", "client_key": secret("key")},
        {"kind": "native"},
        {"kind": "native", "members": ()},
        {"kind": "native", "members": (), "server_authority": "", "client": "csr"},
    ],
    ids=lambda change: "-".join(f"{key}={str(value)[:12]}" for key, value in change.items()),
)
def test_an_ask_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    check_ask(GOOD)
    with pytest.raises(InvalidInput) as refused:
        check_ask(ProviderAsk(**{**vars(GOOD), **change}))  # type: ignore[arg-type]
    assert refused.value.todo


@pytest.mark.parametrize(
    "text",
    [
        "kms:5696",
        "kms-1.example.net:1",
        "10.0.0.1:65535",
        "[::1]:5696",
        "[2001:db8::17]:5696",
        "a_b:80",
        "a" * 63 + ".net:1",
    ],
)
def test_an_address_of_a_key_server(text: str) -> None:
    check_member(text)


NO_ADDRESSES = """
kms kms: :5696 kms:0 kms:65536 kms:+5 kms:\u0665 ::1:5696 [::1:5696 [kms]:5696 [::1] -kms:5696 kms/x:1 kms:5696:1
"""
ODD_ADDRESSES = [
    "",
    ":",
    "kms:5 6",
    "k ms:5696",
    "kms\n:5696",
    "kms:5696\n",
    "kms:" + "9" * 5000,
    "a" * 254 + ":1",
    "a" * 64 + ":1",
]
ODD_ADDRESSES += [f"kms.{'a' * 64}.net:1", ".".join(["a" * 63] * 4) + ":1"]


@pytest.mark.parametrize("text", [*NO_ADDRESSES.split(), *ODD_ADDRESSES])
def test_no_address_of_a_key_server(text: str) -> None:
    with pytest.raises(InvalidInput, match="address of a key server is not valid"):
        check_member(text)
    with pytest.raises(InvalidInput) as quoted:
        check_member(text, quote=True)
    assert repr(text[:60]) in quoted.value.what
    assert len(quoted.value.what) < 400  # also of what is long and odd


@given(
    st.text()
    | st.from_regex(r"[\[\]a-z0-9_.:-]{1,20}:[0-9]{1,6}", fullmatch=True)
    | st.builds("[{}]:{}".format, st.ip_addresses(v=6), st.integers(0, 70000))
)
def test_what_is_taken_for_an_address_is_one_to_the_provider_too(text: str) -> None:
    try:
        check_member(text)
    except InvalidInput:
        return
    found = parse_address(text)
    assert 0 < found.port < 65536
    assert found.host == text.rpartition(":")[0].removeprefix("[").removesuffix("]")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".aside-1", "a b", "a\n", "ä", "-x", "x" * 64, "a\0"])
def test_odd_names_are_refused_everywhere(name: str, tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        providers, words = registry.providers, secret("correct horse battery")
        for refused in (
            providers.add(ProviderAsk(name, "native"), asked_by="ann"),
            providers.show(name),
            providers.open(name),
            providers.test(name, asked_by="ann"),
            providers.set_default(name, asked_by="ann"),
            providers.export(name, None, asked_by="ann"),
            providers.confirm_export(name, "", words, asked_by="ann"),
            providers.accept_certificate(name, "", asked_by="ann"),
            providers.require_usable(name),
            providers.remove(name, force=True, asked_by="ann"),
        ):
            with pytest.raises(InvalidInput):
                await refused
        assert registry.files() == set()
        assert await registry.happened() == []

    with_registry(tmp_path, story)


@pytest.mark.parametrize(
    "change",
    [
        {"server_authority": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
        {"client": "uploaded", "client_certificate": CA.pem, "client_key": secret("no key")},
        {"client": "uploaded", "client_certificate": "none", "client_key": secret("no key")},
    ],
    ids=["authority", "key", "certificate"],
)
def test_a_bad_ask_changes_nothing(change: dict[str, object], tmp_path: Path) -> None:
    async def story(registry: Registry) -> None:
        await registry.add("home")
        before = await registry.happened()
        with pytest.raises(InvalidInput):
            await registry.providers.add(
                ProviderAsk(**{**vars(GOOD), **change}),  # type: ignore[arg-type]
                asked_by="ann",
            )
        assert registry.files() == {"home"}
        assert [each.row.name for each in await registry.providers.list()] == ["home"]
        assert len(await registry.happened()) == len(before)
        await registry.providers.add(ProviderAsk("kms", "native"), asked_by="ann")  # the name is still to be had

    with_registry(tmp_path, story)
