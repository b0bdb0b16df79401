"""The API server, as little of it as is needed: objects by their paths, as JSON.

The client for Python brings the ways to log in (kubeconfig, service account, exec plugins); it is imported when a
cluster is opened, so that nothing else pays for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import orjson

from endcap.errors import InputError, TargetError
from serving.targets.kserve.errors import ConflictError, RefusedError
from serving.targets.kserve.names import FIELD_MANAGER

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

__all__ = ["Cluster", "Json", "open_cluster", "path_of"]

Json: TypeAlias = dict[str, Any]
_TIMEOUT_S = (5.0, 20.0)
_LARGEST_BYTES = 64 << 20
_CONNECTIONS = 96
"""Kept open at most: an operator asks from as many threads."""

_GROUPS = {
    "inferenceservices": "apis/serving.kserve.io/v1beta1",
    "deployments": "apis/apps/v1",
    "revisions": "apis/serving.knative.dev/v1",
    "leases": "apis/coordination.k8s.io/v1",
    "httproutes": "apis/gateway.networking.k8s.io/v1",
    "horizontalpodautoscalers": "apis/autoscaling/v2",
    "backendtrafficpolicies": "apis/gateway.envoyproxy.io/v1alpha1",
    "pods": "api/v1",
    "services": "api/v1",
    "events": "api/v1",
    "configmaps": "api/v1",
}


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """``kind`` is the plural, as ``deployments``."""
    path = f"/{_GROUPS[kind]}/namespaces/{quote(namespace, safe='')}/{kind}"
    return f"{path}/{quote(name, safe='')}" if name else path


class Cluster:
    """One API server. Safe to use from several threads.

    All methods raise TargetError when it does not answer, and one of its kinds when it refuses.
    """

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    def get(self, path: str) -> Json | None:
        """None where it is not there, nor its kind."""
        return self._json("GET", path)

    def items(self, path: str, *, labels: Mapping[str, str] | None = None, **query: str) -> list[Json] | None:
        """The objects of a list; None where the kind is not there."""
        selector = ",".join(f"{key}={value}" for key, value in (labels or {}).items())
        found = self._json("GET", path, query=query | ({"labelSelector": selector} if selector else {}))
        return None if found is None else list(found.get("items") or ())

    def text(self, path: str) -> bytes:
        """What lies behind a proxy path, as it is."""
        found = self._ask("GET", path, accept="*/*")
        if found is None:
            raise TargetError("not there", where=path)
        return found

    def close(self) -> None:
        """Let go of connections."""
        self._api.rest_client.pool_manager.clear()
        self._api.close()

    def create(self, path: str, body: Json) -> Json:
        return self._needed("POST", path, body)

    def replace(self, path: str, body: Json) -> Json:
        """Refused with ConflictError when ``metadata.resourceVersion`` is not the newest."""
        return self._needed("PUT", path, body)

    def apply(self, path: str, body: Json) -> Json:
        """Server-side apply of just the fields in ``body``; they are ours then, whoever had them."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return self._needed("PATCH", path, body, query=query, kind="application/apply-patch+yaml")

    def merge(self, path: str, body: Json) -> Json:
        return self._needed("PATCH", path, body, kind="application/merge-patch+json",
                            query={"fieldManager": FIELD_MANAGER})  # fmt: skip

    def delete(self, path: str) -> None:
        """Safe to repeat."""
        self._json("DELETE", path)

    def _needed(self, method: str, path: str, body: Json, *, query: Mapping[str, str] | None = None,
                kind: str = "application/json") -> Json:  # fmt: skip
        found = self._json(method, path, body=body, query=query, kind=kind)
        if found is None:
            raise TargetError("it is gone", where=path)
        return found

    def _json(self, method: str, path: str, *, body: Json | None = None, query: Mapping[str, str] | None = None,
              kind: str = "application/json") -> Json | None:  # fmt: skip
        answer = self._ask(method, path, body=body, query=query, kind=kind)
        if answer is None:
            return None
        try:
            document = orjson.loads(answer)
        except orjson.JSONDecodeError as error:
            raise TargetError("the API server's answer is no JSON", where=path) from error
        if not isinstance(document, dict):
            raise TargetError("the API server's answer is no object", where=path)
        return document

    def _ask(self, method: str, path: str, *, body: Json | None = None, query: Mapping[str, str] | None = None,
             kind: str = "application/json", accept: str = "application/json") -> bytes | None:  # fmt: skip
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": accept} if body is None else {"Accept": accept, "Content-Type": kind}
        try:
            response = self._api.call_api(
                path, method, query_params=list((query or {}).items()), header_params=headers,
                body=None if body is None else body, auth_settings=["BearerToken"],
                _preload_content=False, _return_http_data_only=True, _request_timeout=_TIMEOUT_S,
            )  # fmt: skip
            try:
                data: bytes = response.read(_LARGEST_BYTES)
            finally:
                response.release_conn()
            return data
        except ApiException as error:
            if error.status == 404 and method in ("GET", "DELETE"):
                return None
            raise _refusal(error, path) from error
        except (HTTPError, OSError) as error:
            raise TargetError(f"the API server does not answer: {type(error).__name__}", where=path) from error


def _refusal(error: Any, path: str) -> TargetError:
    said = str(error.reason or "")
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        said = orjson.loads(error.body)["message"]
    said = said.strip().replace("\n", " ")[:600]
    if error.status == 409:
        return ConflictError(said, where=path)
    if error.status in (401, 403) and "denied the request" not in said:
        return RefusedError(said, where=path, next_step="give endcap's ServiceAccount the role that the chart has")
    if error.status in (400, 403, 404, 405, 415, 422) or "failed to create typed patch object" in said:
        return RefusedError(said, where=path)
    return TargetError(f"the API server answers {error.status}: {said}", where=path)


def open_cluster(*, kubeconfig: str | None = None, context: str | None = None) -> Cluster:
    """The cluster of a kubeconfig's context; without either, that of the pod we run in, or of the usual kubeconfig.

    Raises:
        InputError: no cluster is named there.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    try:
        if kubeconfig is None and context is None:
            try:
                config.load_incluster_config(client_configuration=settings)
            except config.ConfigException:
                config.load_kube_config(client_configuration=settings)
        else:
            config.load_kube_config(config_file=kubeconfig, context=context, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise InputError(f"no cluster is known: {error}", where=kubeconfig or context,
                         next_step="name one: --context, or KUBECONFIG") from error  # fmt: skip
    settings.retries = False
    settings.connection_pool_maxsize = _CONNECTIONS
    return Cluster(client.ApiClient(settings))
