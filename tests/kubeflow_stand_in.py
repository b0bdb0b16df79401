"""A stand-in for Kubeflow Pipelines' API server: its HTTP contract (v2beta1) without anything that runs a pipeline.

It refuses what the real one refuses. Bodies are held against the swagger's own models (``kfp_server_api``: names,
types, enumerations, required ids), pipelines against the protobuf messages that the server parses them into, requests
against its checks: a token where many users share it, a namespace that the token may use, an experiment that is there,
a cron of six fields, a filter in its JSON form. Errors have grpc-gateway's form.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import datetime
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

PREFIX = "/apis/v2beta1"


class RefusalError(Exception):
    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def checked(kind: str, value: Any, where: str = "body") -> Any:
    """``value`` as the swagger's type ``kind``; what it does not know is an error, as in the server's protobuf JSON."""
    if value is None or kind == "object":
        return value
    if kind.startswith("list["):
        if not isinstance(value, list):
            raise RefusalError(400, 3, f"{where}: not a list")
        return [checked(kind[5:-1], one, where) for one in value]
    if kind.startswith("dict("):
        if not isinstance(value, dict):
            raise RefusalError(400, 3, f"{where}: not an object")
        return value
    simple = {"str": str, "bool": bool, "int": int, "datetime": str}.get(kind)
    if simple is not None:
        if not isinstance(value, simple):
            raise RefusalError(400, 3, f"proto: {where}: not of type {kind}: {value!r}")
        return value
    model = getattr(kfp_server_api, kind)
    if not model.openapi_types:
        if value not in model.allowable_values:
            raise RefusalError(400, 3, f'proto: {where}: invalid value for enum: "{value}"')
        return value
    if not isinstance(value, dict):
        raise RefusalError(400, 3, f"proto: {where}: not an object")
    names = {wire: name for name, wire in model.attribute_map.items()}
    for name, item in value.items():
        if name not in names:
            raise RefusalError(400, 3, f'proto: (line 1:2): unknown field "{name}"')
        checked(model.openapi_types[names[name]], item, f"{where}.{name}")
    return value


def check_pipeline(spec: Any) -> None:
    try:
        if "pipeline_spec" in spec:
            json_format.ParseDict(spec["platform_spec"], pipeline_spec_pb2.PlatformSpec())
            spec = spec["pipeline_spec"]
        message = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    except (json_format.ParseError, TypeError, KeyError) as error:
        raise RefusalError(400, 3, f"Failed to parse the pipeline spec: {error}") from error
    if not message.pipeline_info.name or not message.root.dag.tasks:
        raise RefusalError(400, 3, "Invalid input error: unknown template format")


class Kubeflow:
    """``token`` None: a Kubeflow for one user, which asks for none. ``namespaces``: those that the token may use."""

    def __init__(self, *, token: str | None = None, namespaces: tuple[str, ...] = ()) -> None:
        self.token, self.namespaces = token, namespaces
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring: dict[str, dict[str, Any]] = {}
        self.seen: list[str] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        """Called before each request is handled; may raise a RefusalError."""
        self._lock = threading.Lock()
        self._clock = 0

    def answer(self, method: str, target: str, authorization: str | None, body: bytes) -> dict[str, Any]:
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self._lock:
            self.seen.append(f"{method} {parts.path}")
        self.before(method, parts.path)
        if self.token is not None and authorization != f"Bearer {self.token}":
            raise RefusalError(401, 16, "Failed to authorize the request: there is no user identity header")
        if not parts.path.startswith(PREFIX):
            raise RefusalError(404, 5, "Not Found")
        collection, _, key = parts.path.removeprefix(PREFIX + "/").partition("/")
        document = json.loads(body) if body else None
        with self._lock:
            match method, collection, key:
                case "GET", "experiments", "":
                    return self._list("experiments", self.experiments, query)
                case "POST", "experiments", "":
                    return self._create_experiment(checked("V2beta1Experiment", document))
                case "POST", "runs", "":
                    return self._create_run(checked("V2beta1Run", document))
                case "GET", "runs", _ if key in self.runs:
                    return self.runs[key]
                case "GET", "recurringruns", "":
                    return self._list("recurringRuns", self.recurring, query)
                case "POST", "recurringruns", "":
                    return self._create_recurring(checked("V2beta1RecurringRun", document))
                case "DELETE", "recurringruns", _ if key in self.recurring:
                    del self.recurring[key]
                    return {}
        raise RefusalError(404, 5, f"ResourceNotFoundError: {collection} {key} not found.")

    def _namespace(self, namespace: str) -> None:
        if self.token is None:
            return
        if not namespace:
            raise RefusalError(400, 3, "Invalid input error: In multi-user mode, a namespace is needed")
        if namespace not in self.namespaces:
            raise RefusalError(403, 7, f"User is not authorized with reason: (request: namespace:{namespace})")

    def _list(self, name: str, all_of: dict[str, dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        unknown = set(query) - {"page_token", "page_size", "sort_by", "filter", "namespace", "experiment_id"}
        if unknown:
            raise RefusalError(400, 3, f"parameter not found: {unknown}")
        experiment = query.get("experiment_id")
        if experiment is not None and experiment not in self.experiments:
            raise RefusalError(404, 5, f"ResourceNotFoundError: Experiment {experiment} not found.")
        self._namespace(self.experiments[experiment]["namespace"] if experiment else query.get("namespace", ""))
        found = [one for one in all_of.values() if experiment is None or one["experiment_id"] == experiment]
        for predicate in json.loads(query["filter"])["predicates"] if "filter" in query else ():
            if predicate["operation"] != "EQUALS" or predicate["key"] not in ("display_name", "name"):
                raise RefusalError(400, 3, f"Invalid input error: filter {predicate}")
            found = [one for one in found if one["display_name"] == predicate["stringValue"]]
        start, size = int(query.get("page_token") or 0), min(int(query.get("page_size") or 20), 2)
        page: dict[str, Any] = {"total_size": len(found)}
        if found[start : start + size]:
            page[name] = found[start : start + size]
        if start + size < len(found):
            page["next_page_token"] = str(start + size)
        return page

    def _create_experiment(self, document: dict[str, Any]) -> dict[str, Any]:
        name, namespace = document.get("display_name", ""), document.get("namespace", "")
        self._namespace(namespace)
        if not name:
            raise RefusalError(400, 3, "Invalid input error: Experiment name is empty")
        if any((one["display_name"], one["namespace"]) == (name, namespace) for one in self.experiments.values()):
            raise RefusalError(409, 6, f"AlreadyExistError: experiment {name} already exists")
        key = str(uuid.uuid4())
        self.experiments[key] = {"experiment_id": key, "display_name": name, "namespace": namespace,
                                 "storage_state": "AVAILABLE", "created_at": self._now()}  # fmt: skip
        return self.experiments[key]

    def _common(self, document: dict[str, Any]) -> None:
        if not document.get("display_name"):
            raise RefusalError(400, 3, "Invalid input error: the name is empty")
        experiment = self.experiments.get(document.get("experiment_id", ""))
        if experiment is None:
            raise RefusalError(404, 5, "ResourceNotFoundError: Experiment not found.")
        self._namespace(experiment["namespace"])
        spec = document.get("pipeline_spec")
        if spec is None:
            raise RefusalError(400, 3, "Invalid input error: no pipeline spec")
        check_pipeline(spec)
        declared = spec.get("pipeline_spec", spec)["root"]["inputDefinitions"]["parameters"]
        given = document["runtime_config"]["parameters"]
        for name, one in declared.items():
            if name not in given and not one.get("isOptional"):
                raise RefusalError(400, 3, f"Invalid input error: missing parameter {name}")
        for name in given:
            if name not in declared:
                raise RefusalError(400, 3, f"Invalid input error: unknown parameter {name}")

    def _create_run(self, document: dict[str, Any]) -> dict[str, Any]:
        self._common(document)
        key = str(uuid.uuid4())
        self.runs[key] = {**document, "run_id": key, "state": "PENDING", "storage_state": "AVAILABLE",
                          "created_at": self._now()}  # fmt: skip
        return self.runs[key]

    def _create_recurring(self, document: dict[str, Any]) -> dict[str, Any]:
        self._common(document)
        cron = document.get("trigger", {}).get("cron_schedule", {}).get("cron", "")
        if len(cron.split()) != 6 or not re.fullmatch(r"[0-9a-zA-Z*/,?\- ]+", cron):
            raise RefusalError(400, 3, f"Schedule cron is not a supported format (robfig/cron): {cron}")
        if not 1 <= int(document.get("max_concurrency", "0")) <= 10:
            raise RefusalError(400, 3, "The max concurrency of a recurring run must be 1 to 10")
        key = str(uuid.uuid4())
        self.recurring[key] = {**document, "recurring_run_id": key, "created_at": self._now(),
                               "status": "ENABLED" if document["mode"] == "ENABLE" else "DISABLED"}  # fmt: skip
        return self.recurring[key]

    def _now(self) -> str:
        self._clock += 1
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        return (start + datetime.timedelta(seconds=self._clock)).isoformat().replace("+00:00", "Z")


@contextmanager
def serving(kubeflow: Kubeflow) -> Iterator[str]:
    """The URL at which it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                status, document = 200, kubeflow.answer(self.command, self.path, self.headers["authorization"], body)
            except RefusalError as error:
                status = error.status
                document = {"error": str(error), "code": error.code, "message": str(error), "details": []}
            except RedirectError as error:
                self.send_response(302)
                self.send_header("location", str(error))
                self.send_header("content-length", "0")
                self.end_headers()
                return
            self.reply(status, json.dumps(document).encode(), "application/json")

        def reply(self, status: int, raw: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_DELETE = handle_any  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RedirectError(Exception):
    """Sends the caller to the URL that it is made with, as a proxy sends one to a login page."""
