"""``GET /openapi.json``: what the HTTP face takes and gives, for the package that is loaded.

The models below are of the wire, and only for this document: requests are parsed by hand, because that is several
times faster and says better what is wrong. Their limits are the parsers' own constants, and tests hold what the server
really answers, and what its parsers take, against the document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, RootModel, StrictBool, StrictInt, StrictStr
from pydantic.json_schema import models_json_schema

from endcap.package import Manifest, Task
from endcap.package.attributes import Scene
from serving.asgi import MAX_BODY_BYTES
from serving.server.oip import MAX_ID_CHARS as MAX_REQUEST_ID_CHARS
from serving.server.recommend import DEFAULT_K, MAX_CANDIDATES, MAX_EXCLUDED, MAX_HISTORY, MAX_ID_CHARS

__all__ = ["document"]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Open(BaseModel):
    """Other fields are left alone."""

    model_config = ConfigDict(extra="allow")


ItemId = Annotated[StrictStr, Field(max_length=MAX_ID_CHARS)]
Value = StrictBool | StrictInt | float | StrictStr
Values = Annotated[list[Any], Field(description="Values, flat in row-major order or nested by shape.")]


class Context(_Wire):
    scene: Scene | None = None


class Filters(_Wire):
    exclude: Annotated[list[ItemId], Field(max_length=MAX_EXCLUDED)] | None = None
    candidates: (
        Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES, json_schema_extra={"uniqueItems": True})]
        | None
    ) = None
    in_stock_only: StrictBool | None = None


class Diversity(_Wire):
    max_per_category: Annotated[int, Field(ge=1)] | None = None


class RecommendRequest(_Wire):
    shopper: Annotated[StrictStr, Field(min_length=1, max_length=MAX_ID_CHARS)]
    history: Annotated[list[ItemId], Field(max_length=MAX_HISTORY, description="Item ids, oldest first.")]
    k: Annotated[int, Field(ge=1)] = DEFAULT_K
    context: Context = Context()
    filters: Filters = Filters()
    diversity: Diversity = Diversity()
    explain: StrictBool | None = None


class RecommendResponse(_Open):
    items: Annotated[list[StrictStr], Field(description="Item ids, best first; at most k.")]
    scores: list[float]
    version: Annotated[StrictStr, Field(description="Of the model that answered.")]
    impression: Annotated[StrictStr | None, Field(description="A token to send back with the shopper's clicks.")]
    fallback: Annotated[StrictStr | None, Field(description="Why the answer is not all the graph's.")]


class RecommendFault(_Wire):
    what: StrictStr
    where: Annotated[StrictStr | None, Field(description="The field.")]
    next: StrictStr | None


class RecommendError(_Wire):
    error: RecommendFault


class InferError(_Wire):
    error: StrictStr


class TensorParameters(_Open):
    binary_data_size: Annotated[
        int | None, Field(ge=0, description="Bytes of the tensor after the JSON, in place of data.")
    ] = None


class InferInput(_Open):
    name: StrictStr
    shape: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
    datatype: StrictStr
    parameters: TensorParameters | None = None
    data: Values | None = None


class OutputParameters(_Open):
    binary_data: StrictBool = False


class InferRequestedOutput(_Open):
    name: StrictStr
    parameters: OutputParameters | None = None


class InferParameters(_Open):
    binary_data_output: StrictBool = False


class InferRequest(_Open):
    id: Annotated[StrictStr, Field(max_length=MAX_REQUEST_ID_CHARS)] | None = None
    inputs: list[InferInput]
    outputs: list[InferRequestedOutput] | None = None
    parameters: InferParameters | None = None


class InferOutput(_Wire):
    name: StrictStr
    shape: list[int]
    datatype: StrictStr
    data: list[Value | None] | None = None
    parameters: TensorParameters | None = None


class InferResponse(_Wire):
    model_name: StrictStr
    model_version: StrictStr
    id: StrictStr | None = None
    outputs: list[InferOutput]


class Instances(_Open):
    instances: Annotated[list[Any], Field(min_length=1)]


class Inputs(_Open):
    inputs: list[Any] | dict[str, Any]


class Predictions(_Wire):
    predictions: list[Any]


class Outputs(_Wire):
    outputs: list[Any] | dict[str, Any]


class Models(_Wire):
    models: list[StrictStr]


class ModelReady(_Wire):
    name: StrictStr
    ready: StrictBool


class Ready(_Wire):
    ready: StrictBool


class Live(_Wire):
    live: StrictBool


class Alive(_Wire):
    status: Literal["alive"]


class ServerMetadata(_Wire):
    name: Literal["endcap"]
    version: StrictStr
    extensions: list[StrictStr]


class RepositoryEntry(_Wire):
    name: StrictStr
    version: StrictStr
    state: Literal["READY", "UNAVAILABLE"]
    reason: StrictStr


class RepositoryIndex(RootModel[list[RepositoryEntry]]):
    pass


class Done(_Wire):
    pass


class TensorMetadata(_Wire):
    name: StrictStr
    datatype: StrictStr
    shape: list[Annotated[int, Field(ge=-1)]]


class ModelMetadata(_Wire):
    name: StrictStr
    versions: list[StrictStr]
    platform: StrictStr
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


_MODELS: tuple[type[BaseModel], ...] = (
    RecommendRequest, RecommendResponse, RecommendError, InferRequest, InferResponse, InferError, Instances, Inputs,
    Predictions, Outputs, Models, ModelReady, Ready, Live, Alive, ServerMetadata, ModelMetadata,
    RepositoryIndex, Done,
)  # fmt: skip

_REFUSALS = {
    400: "The request is wrong; the message names the field.",
    404: "No such model or version.",
    408: "The body came too slowly.",
    413: f"The body is larger than {MAX_BODY_BYTES} bytes.",
    415: "The body is compressed.",
    429: "Too much waits, and this is batch work; Retry-After says when to come again.",
    500: "The graph failed.",
    503: "Not ready, or too much waits; Retry-After says when to come again.",
    504: "No answer within the time allowed.",
}
_JSON = "application/json"
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}}
_JSON_BYTES = {
    "name": "Inference-Header-Content-Length", "in": "header", "required": False,
    "description": "How many bytes of the body are JSON, when raw tensors follow.",
    "schema": {"type": "integer", "minimum": 0},
}  # fmt: skip
_PRIORITY = {
    "name": "x-endcap-priority", "in": "header", "required": False, "schema": {"enum": ["shopper", "batch"]},
    "description": "Batch work waits behind shoppers and is turned away first.",
}  # fmt: skip
_DEADLINE = {
    "name": "x-request-deadline-ms", "in": "header", "required": False, "schema": {"type": "integer", "minimum": 1},
    "description": "How long the sender waits; work that would be late is not begun.",
}  # fmt: skip


def _ref(*names: str) -> dict[str, Any]:
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    return {_JSON: {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}}


def _get(summary: str, model: str, *, unready: bool = False) -> dict[str, Any]:
    responses = {"200": {"description": "As it is.", "content": _ref(model)}}
    if unready:
        responses["503"] = {"description": "Not ready.", "content": _ref(model, "InferError")}
    return {"get": {"summary": summary, "responses": responses}}


def _post(summary: str, request: dict[str, Any], response: dict[str, Any], error: str,
          *parameters: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    refusals = {str(status): {"description": text, "content": _ref(error)} for status, text in _REFUSALS.items()}
    return {
        "post": {
            "summary": summary,
            "parameters": [_PRIORITY, _DEADLINE, *parameters],
            "requestBody": {"required": True, "content": request},
            "responses": {"200": {"description": "The answer.", "content": response}} | refusals,
        }
    }


def _admin(summary: str, model: str, *, key: bool) -> dict[str, Any]:
    refusals = {401: "The admin key, or the token, is missing or wrong.", 403: "This server does not do that.",
                404: "No such model.", 409: "Refused; what served before goes on."} if key else {}  # fmt: skip
    responses = {"200": {"description": "Done.", "content": _ref(model)}} | {
        str(status): {"description": text, "content": _ref("InferError")} for status, text in refusals.items()
    }
    return {"post": {"summary": summary, "responses": responses} | ({"security": [{"admin": []}]} if key else {})}


def document(manifest: Manifest, *, version: str) -> bytes:
    """The OpenAPI 3.1 document."""
    name = manifest.name
    paths: dict[str, Any] = {}
    if manifest.task is Task.SESSION_RECOMMENDER:
        paths["/v1/recommend"] = _post(
            "What to show a shopper next.", _ref("RecommendRequest"), _ref("RecommendResponse"), "RecommendError"
        )
    infer = _post(
        "Run the graph (Open Inference Protocol v2).", _ref("InferRequest") | _BINARY, _ref("InferResponse") | _BINARY,
        "InferError", _JSON_BYTES,
    )  # fmt: skip
    paths |= {
        f"/v1/models/{name}:predict": _post(
            "Run the graph (KServe v1).", _ref("Instances", "Inputs"), _ref("Predictions", "Outputs"), "InferError"
        ),
        "/v1/models": _get("Names of the models.", "Models", unready=True),
        f"/v1/models/{name}": _get("Whether the model is ready.", "ModelReady", unready=True),
        f"/v2/models/{name}/infer": infer,
        f"/v2/models/{name}/versions/{version}/infer": infer,
        f"/v2/models/{name}": _get("The model's inputs and outputs.", "ModelMetadata", unready=True),
        f"/v2/models/{name}/ready": _get("Whether the model is ready.", "Ready", unready=True),
        f"/v2/models/{name}/versions/{version}": _get("The model's inputs and outputs.", "ModelMetadata", unready=True),
        f"/v2/models/{name}/versions/{version}/ready": _get("Whether the model is ready.", "Ready", unready=True),
        "/v2": _get("The server.", "ServerMetadata"),
        "/v2/health/live": _get("Whether the process lives.", "Live"),
        "/v2/health/ready": _get("Whether the server is ready.", "Ready", unready=True),
        "/v2/repository/index": _admin("The models that this server has.", "RepositoryIndex", key=False),
        f"/v2/repository/models/{name}/load": _admin("Read the package again and go on with it.", "Done", key=True),
        f"/v2/repository/models/{name}/unload": _admin("Let go of the package.", "Done", key=True),
        "/": _get("Whether the process lives (KServe v1).", "Alive"),
        "/metrics": {"get": {"summary": "Prometheus' exposition text.", "security": [{}, {"admin": []}], "responses": {
            "200": {"description": "As it is.", "content": {"text/plain": {"schema": {"type": "string"}}}},
            "401": {"description": "The admin key, or the token, is missing or wrong.", "content": _ref("InferError")},
        }}},
    }  # fmt: skip
    _, schemas = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    components = schemas["$defs"]
    tensor = components["InferInput"]["properties"]
    tensor["name"]["enum"] = [spec.name for spec in manifest.inputs]
    tensor["datatype"]["enum"] = sorted({spec.datatype for spec in manifest.inputs})
    components["InferRequestedOutput"]["properties"]["name"]["enum"] = [spec.name for spec in manifest.outputs]
    for model, field in (("RecommendRequest", "k"), ("Diversity", "max_per_category")):
        _bound(components[model]["properties"][field], manifest.top_k)
    components["RecommendRequest"]["properties"]["k"]["default"] = min(DEFAULT_K, manifest.top_k)
    return orjson.dumps({
        "openapi": "3.1.0",
        "info": {
            "title": f"endcap: {name}", "version": version,
            "description": f"A {manifest.task} served by endcap's model server.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components, "securitySchemes": {"admin": {"type": "http", "scheme": "bearer"}},
        },
    }, option=orjson.OPT_SORT_KEYS)  # fmt: skip


def _bound(schema: dict[str, Any], maximum: int) -> None:
    """Set the whole number's maximum, which only the package knows."""
    for form in (schema, *schema.get("anyOf", ())):
        if form.get("type") == "integer":
            form["maximum"] = maximum
