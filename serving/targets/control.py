"""The supervisor's control API: a bearer token, JSON in and out, errors as the one tree of errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol, TypeVar

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from endcap.documents import describe_validation
from endcap.errors import BusyError, CapacityError, EndcapError, FencedError, InputError, VerificationError
from serving.targets.wire import AcquireRequest, RetireRequest, ShadowRequest, SharesRequest

__all__ = ["Control", "control_app", "serve_control"]

M = TypeVar("M", bound=BaseModel)
log = logging.getLogger("endcap.target")


class Control(Protocol):
    """What the API asks of the supervisor."""

    async def acquire(self, request: AcquireRequest) -> BaseModel: ...
    async def ensure_capacity(self, request: SharesRequest) -> None: ...
    async def set_shares(self, request: SharesRequest) -> None: ...
    async def set_shadow(self, request: ShadowRequest) -> None: ...
    async def retire(self, request: RetireRequest) -> None: ...
    async def observe(self, shoppers_since_s: float | None) -> BaseModel: ...
    async def state(self) -> BaseModel: ...


def status_of(error: EndcapError) -> int:
    """The HTTP status that stands for an error; the body says the rest."""
    if isinstance(error, FencedError | BusyError):
        return 409
    if isinstance(error, VerificationError):
        return 422
    if isinstance(error, InputError):
        return 400
    return 503 if isinstance(error, CapacityError) else 500


def control_app(control: Control, token: str) -> Starlette:
    """The API over ``control``; every request needs ``Authorization: Bearer <token>``."""
    expected = f"Bearer {token}".encode()

    def endpoint(work: Callable[[Request], Awaitable[BaseModel | None]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, expected):
                return JSONResponse({"error": "InputError", "what": "the control token is missing or wrong"}, 401)
            try:
                reply = await work(request)
            except ValidationError as error:
                wrong = InputError(describe_validation(error), where="control API")
                return JSONResponse(wrong.to_json(), 400)
            except EndcapError as error:
                return JSONResponse(error.to_json(), status_of(error))
            return JSONResponse({} if reply is None else reply.model_dump(mode="json"))

        return answer

    async def body(request: Request, model: type[M]) -> M:
        return model.model_validate_json(await request.body())

    async def acquire(request: Request) -> BaseModel:
        return await control.acquire(await body(request, AcquireRequest))

    async def capacity(request: Request) -> None:
        await control.ensure_capacity(await body(request, SharesRequest))

    async def shares(request: Request) -> None:
        await control.set_shares(await body(request, SharesRequest))

    async def shadow(request: Request) -> None:
        await control.set_shadow(await body(request, ShadowRequest))

    async def retire(request: Request) -> None:
        await control.retire(await body(request, RetireRequest))

    async def observe(request: Request) -> BaseModel:
        return await control.observe(_since_s(request.query_params.get("shoppers_since_s")))

    async def state(_: Request) -> BaseModel:
        return await control.state()

    return Starlette(
        routes=[
            Route("/v1/acquire", endpoint(acquire), methods=["POST"]),
            Route("/v1/capacity", endpoint(capacity), methods=["POST"]),
            Route("/v1/shares", endpoint(shares), methods=["POST"]),
            Route("/v1/shadow", endpoint(shadow), methods=["POST"]),
            Route("/v1/retire", endpoint(retire), methods=["POST"]),
            Route("/v1/observe", endpoint(observe), methods=["GET"]),
            Route("/v1/state", endpoint(state), methods=["GET"]),
        ]
    )


def _since_s(given: str | None) -> float | None:
    try:
        since_s = None if given is None else float(given)
    except ValueError:
        since_s = math.nan
    if since_s is not None and not math.isfinite(since_s):
        raise InputError(f"{given} is not a time", where="shoppers_since_s", next_step="give Unix time in seconds")
    return since_s


class _Server(uvicorn.Server):
    """uvicorn inside a process that handles its own signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_control(app: Starlette, listener: socket.socket, *, stopping: Awaitable[object]) -> None:
    """Serve until ``stopping`` is done; requests in flight get two seconds to end."""
    server = _Server(
        uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await stopping
    finally:
        server.should_exit = True
        await serving
