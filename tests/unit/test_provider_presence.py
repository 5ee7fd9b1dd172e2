"""When it is news that a key provider is away, or back."""

from __future__ import annotations

from sealift.controller.provider_presence import Presence


def test_going_and_coming_back_is_news_once_each() -> None:
    presence = Presence()
    assert not presence.probe_answered("kms")
    assert presence.question_failed("kms", reached=False)
    assert not presence.question_failed("kms", reached=False)
    assert not presence.probe_failed("kms")
    assert presence.probe_answered("kms")
    assert not presence.probe_answered("kms")
    assert not presence.question_answered("kms")
    assert presence.probe_failed("kms")
    assert presence.question_answered("kms")


def test_who_answers_questions_with_nonsense_is_not_back_by_saying_who_he_is() -> None:
    presence = Presence()
    assert presence.question_failed("kms", reached=True)
    for _ in range(3):
        assert not presence.probe_answered("kms")
        assert not presence.question_failed("kms", reached=True)
    assert presence.question_answered("kms")


def test_who_falls_silent_at_questions_only_comes_back_once() -> None:
    """The first time it may have been the network; after that it takes an answer to a question."""
    presence = Presence()
    assert presence.question_failed("kms", reached=False)
    assert presence.probe_answered("kms")
    assert presence.question_failed("kms", reached=False)
    for _ in range(3):
        assert not presence.probe_answered("kms")
        assert not presence.question_failed("kms", reached=False)
    assert presence.question_answered("kms")
    assert presence.question_failed("kms", reached=False)
    assert presence.probe_answered("kms"), "it has answered a question since"


def test_who_was_not_even_reached_by_a_probe_is_back_when_he_is() -> None:
    presence = Presence()
    assert presence.question_failed("kms", reached=True)
    assert not presence.probe_failed("kms")
    assert presence.probe_answered("kms")


def test_each_is_for_itself_and_a_new_one_of_that_name_is_not_the_old_one() -> None:
    presence = Presence()
    assert presence.question_failed("kms", reached=True)
    assert presence.question_failed("other", reached=False)
    presence.forget("kms")
    assert presence.question_failed("kms", reached=False)
    assert presence.probe_answered("kms")
    assert presence.probe_answered("other")
