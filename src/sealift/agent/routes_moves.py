"""The agent's interface: moves."""

from __future__ import annotations

from uuid import UUID

from fastapi import FastAPI, Request
from pydantic import BaseModel

from sealift.agent.agent import Agent
from sealift.agent.requests import raw_body
from sealift.domain.deks import wipe
from sealift.domain.move import MAX_ORDER_BYTES, Answer, MoveStatus, Role, decode_spec
from sealift.errors import InvalidInput


class AnswerOrder(BaseModel):
    """The target's durable answer."""

    answer: Answer


def add_moves(app: FastAPI, agent: Agent) -> None:
    """Both sides' orders, and what the controller carries between them."""
    moves = agent.moves

    @app.put("/v1/moves/{attempt}/{role}")
    async def take(attempt: UUID, role: Role, request: Request) -> MoveStatus:
        order, secret, deks = decode_spec(await raw_body(request, MAX_ORDER_BYTES))
        try:
            if order.attempt != attempt:
                raise InvalidInput("the order's path and specification name different attempts")
            if role is Role.SOURCE:
                return await moves.take_source(order, secret)
            return await moves.take_target(order, secret, deks)
        finally:
            secret.wipe()  # the relay has it now, or nobody
            wipe(deks)

    @app.get("/v1/moves/{attempt}")
    async def status(attempt: UUID) -> MoveStatus:
        return moves.status(attempt)

    @app.post("/v1/moves/{attempt}/cancel")
    async def cancel(attempt: UUID) -> MoveStatus:
        return await moves.cancel(attempt)

    @app.post("/v1/moves/{attempt}/abort")
    async def abort(attempt: UUID) -> MoveStatus:
        return await moves.abort(attempt)

    @app.post("/v1/moves/{attempt}/commit")
    async def commit(attempt: UUID) -> MoveStatus:
        return await moves.commit(attempt)

    @app.post("/v1/moves/{attempt}/answer")
    async def answer(attempt: UUID, order: AnswerOrder) -> MoveStatus:
        return await moves.answer(attempt, order.answer)

    @app.post("/v1/moves/{attempt}/forget", status_code=204)
    async def forget(attempt: UUID) -> None:
        await moves.forget(attempt)
