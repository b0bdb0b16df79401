"""``endcap rollout ... --context``: the same verbs, where a rollout is a cluster's object and an operator drives it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from endcap.cli.console import Console, Page
from endcap.documents import load_documents
from endcap.errors import InputError, OutcomeError
from endcap.objectives import ObjectivesDocument
from serving.operator.asks import ask_value
from serving.operator.objects import ASK_PREFIX, Json, objectives_path, rollout_path
from serving.rollout.events import Command
from serving.rollout.spec import RolloutDocument
from serving.targets.kserve.cluster import Cluster, open_cluster

D = TypeVar("D", RolloutDocument, ObjectivesDocument)

__all__ = ["OnCluster", "answer", "history_rows", "open_namespace", "page_of", "spec_to_apply"]

_POLL_S = 0.5
_UNSEEN_S = 60.0
"""An operator that has said nothing about a new object for so long is not there."""


def open_namespace(context: str, namespace: str | None) -> OnCluster:
    """The namespace of a kubeconfig's context; that which the context names where none is given.

    Raises:
        InputError: there is no such context.
    """
    cluster = open_cluster(context=context)
    if namespace is None:
        from kubernetes import config

        contexts, _ = config.list_kube_config_contexts()
        known = {one["name"]: one.get("context", {}) for one in contexts}
        namespace = str(known.get(context, {}).get("namespace") or "default")
    return OnCluster(cluster, namespace)


def spec_to_apply(document: RolloutDocument | ObjectivesDocument) -> Json:
    """What a person gave, as the API server takes it: times of the day as texts, nothing sticky as ``{}``."""
    spec: Json = document.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for freeze in spec.get("freeze", ()):
        for name in ("from", "until"):
            if isinstance(freeze.get(name), int):
                freeze[name] = f"{freeze[name] // 60:02}:{freeze[name] % 60:02}"
    if "sticky" in spec and spec["sticky"] is None:
        spec["sticky"] = {}
    return {name: value for name, value in spec.items() if value is not None}


@dataclass(frozen=True, slots=True)
class OnCluster:
    cluster: Cluster
    namespace: str

    # ---- begun ----

    def apply(self, file: Path, objectives: Path | None) -> str:
        """Apply the documents; returns the Rollout's name."""
        rollout = _one(file, RolloutDocument)
        if objectives is not None:
            declared = _one(objectives, ObjectivesDocument)
            self._apply(objectives_path(self.namespace, declared.metadata.name), declared)
        name = rollout.metadata.name
        self._apply(rollout_path(self.namespace, name), rollout)
        return name

    def _apply(self, path: str, document: RolloutDocument | ObjectivesDocument) -> None:
        meta = document.metadata.model_dump(mode="json", exclude_unset=True)
        self.cluster.apply(path, {
            "apiVersion": document.api_version, "kind": document.kind, "metadata": meta,
            "spec": spec_to_apply(document),
        })  # fmt: skip

    def follow(self, console: Console, name: str) -> Json:
        """Until it has ended; its object then.

        Raises:
            InputError: it was refused; the message says what to do. OutcomeError: no operator takes it up.
        """
        told, since_s = "", time.monotonic()
        with console.live() as draw:
            while True:
                found = self.get(name)
                status = found.get("status") or {}
                if status.get("observedGeneration") == found["metadata"]["generation"]:
                    change = _change(status)
                    if draw is not None:
                        draw(page_of(found, time.time()))
                    elif change != told:
                        told = change
                        console.say(f"{datetime.now(UTC):%H:%M:%S} {told}")
                    if status.get("phase") == "refused":
                        raise _refusal(found)
                    if _has_ended(found):
                        return found
                elif "phase" not in status and time.monotonic() - since_s > _UNSEEN_S:
                    raise OutcomeError(f"no operator has taken it up in {_UNSEEN_S:g} s", where=_where(found),
                                       next_step="see whether endcap's operator runs: kubectl get deployments -A "
                                       "-l app.kubernetes.io/part-of=endcap")  # fmt: skip
                time.sleep(_POLL_S)

    # ---- where it stands ----

    def get(self, name: str) -> Json:
        found = self.cluster.get(rollout_path(self.namespace, name))
        if found is None:
            raise InputError(f"no Rollout {name!r} in namespace {self.namespace}", where="--context",
                             next_step="name another with -n; kubectl get rollouts -A lists them")  # fmt: skip
        return found

    # ---- what people ask ----

    def ask(self, name: str, command: Command, by: str, timeout_s: float) -> Json:
        """Ask, and wait until the operator has heard it; the object then.

        Raises:
            InputError: nothing is to be asked of it. OutcomeError: it was not heard in time; it stays asked.
        """
        found = self.get(name)
        status = found.get("status") or {}
        if _has_ended(found):
            raise InputError(f"the rollout has ended: {status.get('message')}", where=_where(found))
        step = None
        if command is Command.APPROVE:
            step = status.get("approval")
            if step is None:
                raise InputError(f"nothing waits for approval: {status.get('message')}", where=_where(found),
                                 next_step="approve when endcap rollout status says that a step waits")  # fmt: skip
        value = ask_value(by, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), step=step)
        annotation = f"{ASK_PREFIX}{command}"
        self.cluster.merge(rollout_path(self.namespace, name), {"metadata": {"annotations": {annotation: value}}})
        ends_s = time.monotonic() + timeout_s
        while True:
            found = self.get(name)
            stands = (found["metadata"].get("annotations") or {}).get(annotation) == value
            if not stands or _has_ended(found):
                return found
            if time.monotonic() >= ends_s:
                raise OutcomeError(f"not taken up after {timeout_s:g} s; it stays asked", where=_where(found),
                                   next_step="see whether endcap's operator runs")  # fmt: skip
            time.sleep(_POLL_S)


def page_of(found: Mapping[str, Any], now_s: float) -> Page:
    """All of it, for people. ``now_s``: Unix time."""
    status = found.get("status") or {}
    lines: list[tuple[str, str | None]] = [(str(status.get("message") or "nobody has taken it up yet"), "bold")]
    if "stable" in status:
        lines.append((f"  version {status['stable']} -> {status['canary']}, step {status.get('step')}, share "
                      f"{status.get('share')}", "dim"))  # fmt: skip
    lines += [(f"  {status[name]}", None) for name in ("reason",) if status.get(name)]
    if status.get("waiting"):
        lines.append((f"  waits: {status['waiting']}", "yellow"))
    for one in status.get("conditions", ()):
        if one["type"] in ("Accepted", "UpToDate") and one["status"] == "False":
            lines.append((f"  {one['reason']}: {one['message']}", "yellow"))
    if status.get("lastLookAt"):
        age_s = max(0.0, now_s - datetime.fromisoformat(status["lastLookAt"]).timestamp())
        lines.append((f"  {status.get('looks', 0)} looks; told {age_s:.0f} s ago", "dim"))
    if status.get("next"):
        lines.append((f"  next: {status['next']}", "yellow"))
    columns = ("objective", "verdict", "canary", "control", "difference", "margin")
    rows = tuple(tuple(one.get(name) for name in ("name", *columns[1:])) for one in status.get("objectives", ()))
    return Page(tuple(lines), columns, rows)


def history_rows(found: Mapping[str, Any]) -> list[tuple[object, ...]]:
    status = found.get("status") or {}
    names = ("seq", "at", "step", "share", "action", "verdict", "by", "reason")
    return [tuple(line.get(name) for name in names) for line in status.get("history", ())]


def answer(found: Mapping[str, Any]) -> Json:
    """For ``--json``."""
    meta = found["metadata"]
    return {"rollout": meta["name"], "namespace": meta["namespace"], **(found.get("status") or {})}


def _one(path: Path, kind: type[D]) -> D:
    documents = load_documents(path, [kind])
    if len(documents) != 1:
        raise InputError(f"more than one {kind.__name__.removesuffix('Document')} document", where=path)
    return documents[0]


def _has_ended(found: Mapping[str, Any]) -> bool:
    """Of the candidate that is asked for: that of one before does not count."""
    status = found.get("status") or {}
    asked = re.fullmatch(r"models:/[^/@]+/(\d+)", str(found["spec"].get("candidate")))
    return status.get("phase") == "done" and (asked is None or asked[1] == status.get("canary"))


def _refusal(found: Mapping[str, Any]) -> InputError:
    status = found["status"]
    return InputError(str(status.get("message")), where=_where(found), next_step=status.get("next"))


def _change(status: Mapping[str, Any]) -> str:
    waiting = f"; waits: {status['waiting']}" if status.get("waiting") else ""
    verdicts = ", ".join(f"{one['name']} {one.get('verdict')}" for one in status.get("objectives", ()))
    detail = f": {status.get('reason')}" if status.get("outcome") else f" [{verdicts}]" if verdicts else ""
    return f"{status.get('message')}{detail}{waiting}"


def _where(found: Mapping[str, Any]) -> str:
    return f"rollout {found['metadata']['namespace']}/{found['metadata']['name']}"
