"""One HTTPS connection to the controller, and what goes wrong with it in our own errors.

A problem document comes back as the error class it names; the document itself is the error's ``__cause__``
(``ProblemAnswer``), since a refusal has more to say than one sentence. When nobody answers, or the answer breaks off,
that is ControllerUnreachable.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from sealift.api import schemas
from sealift.domain.vm import check_name
from sealift.errors import (
    ControllerUnreachable,
    FingerprintMismatch,
    InvalidInput,
    NotAuthenticated,
    SealiftError,
    from_slug,
)

CONNECT_S, ANSWER_S, SILENCE_S = 5.0, 120.0, 60.0
"""Longest wait for a connection, for an answer (a plan asks both hosts), and for a sign of life on the event stream."""

MAY_BE_DONE = "the controller may still carry out what it was asked for"

_Answer = TypeVar("_Answer")

Params = Mapping[str, int] | None
"""A request's query; a bool is written as true or false."""


class ProblemAnswer(Exception):
    """The problem document behind an error that the controller answered."""

    def __init__(self, problem: schemas.Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def normal_url(text: str) -> str:
    """``https://host:port`` of what a person wrote, port 7443 if none; raises InvalidInput."""
    bad = InvalidInput("this is not a controller's address", todo="write it as https://HOST:7443")
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        port = 7443 if parts.port is None else parts.port
    except ValueError:
        raise bad from None
    plain = not parts.query and not parts.fragment and parts.path in ("", "/") and "@" not in parts.netloc
    if parts.scheme != "https" or not parts.hostname or not port or not plain:
        raise bad
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"https://{host}:{port}"


def named(kind: str, name: str) -> str:
    """``name`` for a request; raises InvalidInput, which quotes it: only who wrote it reads that."""
    return check_name(kind, name, quote=True)


def encoded(body: BaseModel) -> bytes:
    """A request's JSON. Here secrets are written out, which pydantic itself would write as stars."""

    def written(value: object) -> object:
        return value.get_secret_value() if isinstance(value, SecretStr) else to_jsonable_python(value)

    return json.dumps(body.model_dump(), default=written).encode()


class Connection:
    """Requests under /api/v1, and what goes wrong with them in our own errors."""

    def __init__(self, url: str, context: ssl.SSLContext, headers: Mapping[str, str]) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.url = url
        self.http = httpx2.Client(
            base_url=f"{url}/api/v1/",
            verify=context,
            headers=headers,
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            trust_env=False,  # a proxy would end the TLS connection whose other end is pinned
        )

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def ask(
        self,
        kind: type[_Answer],
        method: str,
        path: str,
        body: BaseModel | None = None,
        params: Params = None,
        *,
        answer_s: float = ANSWER_S,
    ) -> _Answer:
        """One request; its answer as ``kind``, a model or a list of models, waited for at most ``answer_s``."""
        response = self._send(method, path, body, params, answer_s)
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError:
            raise SealiftError(
                f"the controller at {self.url} answered what this version does not understand",
                todo="update the command line to the controller's version",
            ) from None

    def tell(self, method: str, path: str, body: BaseModel | None = None, params: Params = None) -> None:
        """One request whose answer says nothing."""
        self._send(method, path, body, params, ANSWER_S)

    def _send(self, method: str, path: str, body: BaseModel | None, params: Params, answer_s: float) -> httpx2.Response:
        content = encoded(body) if body else None
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            response = self.http.request(
                method,
                path,
                content=content,
                headers=headers,
                params=params,
                timeout=httpx2.Timeout(answer_s, connect=CONNECT_S),
            )
        except httpx2.TransportError as error:
            raise self.broken(error) from error
        except KeyboardInterrupt as interrupted:
            if method != "GET":
                interrupted.add_note(MAY_BE_DONE)
            raise
        if not response.is_success:
            raise self.problem(response)
        return response

    def problem(self, response: httpx2.Response) -> SealiftError:
        """The error that an answer is; its body was read."""
        try:
            problem = schemas.Problem.model_validate_json(response.content)
        except ValidationError:
            what = f"the controller at {self.url} answered status {response.status_code} without saying why"
            if response.status_code == NotAuthenticated.status:
                return NotAuthenticated(what, todo="run `sealift login`")
            return SealiftError(what, todo="see the controller's log")
        error = from_slug(problem.slug, problem.detail, problem.todo)
        error.__cause__ = ProblemAnswer(problem)
        return error

    def broken(self, error: httpx2.TransportError) -> SealiftError:
        """Our error for one of the transport."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return FingerprintMismatch(
                    f"the certificate shown at {self.url} was refused: {cause.verify_message}",
                    todo="use an address the controller was set up with; if its authority is new, log in again",
                )
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            what = f"the controller does not answer at {self.url}"
        else:
            what = f"the connection to the controller at {self.url} broke off"
        return ControllerUnreachable(what, todo="see that the controller runs and its port can be reached from here")
