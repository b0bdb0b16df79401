"""The HTTP routes of tensors: the Open Inference Protocol's ``/infer``, KServe v1's ``:predict``, and what they tell
about the model. The codecs are pure and elsewhere; here they meet the service.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from endcap.package import Manifest
from serving.asgi import Headers, Scope
from serving.server import oip, v1
from serving.server.service import Service

if TYPE_CHECKING:
    from serving.server.app import Asked

_ABOUT = re.compile(r"/v[12]/models/([^/]+)(?:/versions/([^/]+))?(?:/ready)?")

__all__ = ["ROUTES", "Answer", "Description", "ask", "look", "route_of"]

ROUTES = ("infer", "predict")


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    headers: Headers = ()
    content_type: bytes = b"application/json"
    status: int = 200


def route_of(path: str) -> str | None:
    """The route, one of :data:`ROUTES`, that a path is of, whatever the model."""
    if path.startswith("/v2/models/") and path.endswith("/infer"):
        return "infer"
    if path.startswith("/v1/models/") and path.endswith(":predict"):
        return "predict"
    return None


async def ask(route: str, service: Service, scope: Scope, body: bytes, asked: Asked, *, version: str) -> Answer:
    """Answer a request for a run of the graph.

    Raises:
        UnknownModelError: another model, or another version of it.
        InputError, OverloadedError, GraphError: as the codecs and the service.
    """
    manifest = service.manifest
    path: str = scope["path"]
    if route == "predict":
        oip.check_model(path[len("/v1/models/") : -len(":predict")], "", manifest, version)
        predict = v1.parse_predict(body, manifest)
        service.check(predict.inputs)
        outputs = await service.infer(predict.inputs, within_s=asked.within_s, priority=asked.priority)
        return Answer(v1.format_predictions(predict, outputs, manifest))
    asked_name, _, asked_version = path[len("/v2/models/") : -len("/infer")].partition("/versions/")
    oip.check_model(asked_name, asked_version, manifest, version)
    request = oip.parse_infer(body, manifest, oip.header_length(scope["headers"]))
    service.check(request.inputs)
    outputs = await service.infer(request.inputs, within_s=asked.within_s, priority=asked.priority)
    answer, json_bytes = oip.split_answer(request, outputs, manifest, version=version)
    if json_bytes is None:
        return Answer(answer)
    return Answer(answer, ((oip.BINARY_HEADER, str(json_bytes).encode()),), b"application/octet-stream")


def look(path: str, manifest: Manifest, *, version: str, ready: bool) -> Answer | None:
    """The answer to a GET about the loaded model; None: not a path of these.

    Raises:
        UnknownModelError: of another model, or another version of it.
    """
    if (asked := _ABOUT.fullmatch(path)) is not None:
        oip.check_model(asked[1], asked[2] or "", manifest, version)
    name = manifest.name
    if path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{version}"):
        return Answer(oip.metadata(manifest, version=version))
    if path in (f"/v2/models/{name}/ready", f"/v2/models/{name}/versions/{version}/ready"):
        return Answer(b'{"ready":true}') if ready else Answer(b'{"ready":false}', status=503)
    if path == "/v1/models":
        return Answer(v1.models(manifest))
    if path == f"/v1/models/{name}":
        return Answer(v1.ready(manifest, ready=ready), status=200 if ready else 503)
    return None


class Description:
    """The OpenAPI document of what is loaded: made when first asked for, and off the event loop."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._manifest: Manifest | None = None
        self._text = b""

    async def text(self, manifest: Manifest) -> bytes:
        """``GET /openapi.json``."""
        if self._manifest is not manifest:
            self._text = await asyncio.to_thread(self._make, manifest)
            self._manifest = manifest
        return self._text

    def _make(self, manifest: Manifest) -> bytes:
        from serving.server import openapi  # its models take a tenth of a second, which most replicas never need

        return openapi.document(manifest, version=self._version)
