"""The event stream of the client: each event once and in order, whatever breaks in between."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from sealift.cli.credentials import load
from sealift.client import Client
from sealift.errors import ControllerUnreachable, NotAuthenticated
from support.command_line import CommandLine
from support.deployment import Deployment, a_deployment


@pytest.fixture
def deployment(tmp_path: Path, sealift: CommandLine) -> Iterator[Deployment]:
    with a_deployment(tmp_path) as made:
        assert sealift("login", made.url, "--token", "-", stdin=made.token).exit_code == 0
        yield made


@pytest.fixture
def client(deployment: Deployment, sealift: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(sealift.home))
    with Client(load()) as made:
        yield made


def test_following_goes_on_after_the_controller_was_gone(deployment: Deployment, client: Client) -> None:
    known = [event.seq for event in client.events()]
    following = client.follow(0, pause_s=0.02)
    seen = [next(following).seq for _ in known]
    assert seen == known
    deployment.down()
    starting = Thread(target=deployment.up)  # while the client below is trying
    starting.start()
    try:
        with Client(load()) as other:
            asker = Thread(target=lambda: (starting.join(), other.join_token()))
            asker.start()
            try:
                seen.append(next(following).seq)
            finally:
                asker.join(30)
    finally:
        starting.join(30)
    assert seen == [event.seq for event in client.events()][: len(seen)]
    assert len(seen) == len(known) + 1
    following.close()


def test_following_gives_up_when_nobody_comes_back(deployment: Deployment, client: Client) -> None:
    following = client.follow(0, patience_s=0.1, pause_s=0.02)
    for _ in list(client.events()):
        next(following)
    deployment.down()
    with pytest.raises(ControllerUnreachable):
        next(following)


def test_following_without_leave_is_refused_at_once(
    deployment: Deployment, sealift: CommandLine, client: Client
) -> None:
    kept = json.loads(sealift.credentials.read_text())
    sealift.credentials.write_text(json.dumps({**kept, "token": kept["token"].rpartition(".")[0] + "." + "A" * 22}))
    with Client(load()) as stranger, pytest.raises(NotAuthenticated):
        next(stranger.follow(0))
