"""What a rollout needs on a cluster with KServe: the target, where the candidate lies, its checks, sources, notices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from endcap.errors import InputError
from endcap.objectives import Good, Objectives
from endcap.registry import Registry
from serving.operator.drive import Equipment
from serving.operator.settings import Settings
from serving.rollout.engine import CountSource, Gatekeeper
from serving.rollout.events import Gated
from serving.rollout.notices import Notifier, webhook_url
from serving.rollout.spec import RolloutSpec
from serving.targets.base import ModelVersion
from serving.targets.kserve import (
    Cluster,
    Delivery,
    Feedback,
    MLflowDelivery,
    PodScrapes,
    ServerTelemetry,
    Storage,
    target_for,
)

__all__ = ["KServeOutfit"]

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[-a-z0-9_]+))")
_PROMETHEUS_TOKEN = "ENDCAP_PROMETHEUS_TOKEN"  # noqa: S105 - the name of an environment variable


@dataclass(frozen=True, slots=True)
class _ByName:
    """``mlflow://NAME/LABEL``, or by the template: without a registry at hand there is no digest to be told."""

    name: str
    template: str | None

    def storage(self, label: str) -> Storage:
        uri = f"mlflow://{self.name}/{label}" if self.template is None else self.template
        return Storage(uri.format(name=self.name, version=label))


class KServeOutfit:
    """Implements :class:`serving.operator.drive.Outfit`."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster, self._settings = cluster, settings
        self._registry = None if settings.registry_uri is None else Registry(settings.registry_uri)

    def __call__(self, namespace: str, spec: RolloutSpec, objectives: Objectives) -> Equipment:
        with ExitStack() as held:
            name, label = self._named(spec.candidate)
            telemetry = ServerTelemetry(PodScrapes(), thresholds_ms=objectives.latency_thresholds_ms,
                                        feedback=self._feedback(objectives))  # fmt: skip
            target = target_for(self._cluster, spec.service, namespace, self._delivery(name), telemetry=telemetry,
                                fallback_runtime=self._settings.fallback_runtime, policy=True)  # fmt: skip
            source = self._source(spec, objectives, held)
            url = webhook_url(spec.webhook_from)
            notifier = None
            if url is not None:
                folder = Path(self._settings.registry_cache) / "notices" / namespace / spec.name
                notifier = held.enter_context(Notifier(url, spec, folder, flush_s=1.0))

            def check() -> None:
                target.check()
                target.check_asked(sticky=spec.sticky, shadow=spec.shadow is not None, baseline=spec.baseline)

            return Equipment(
                target, ModelVersion(label, Path(label)), self._gates(name, spec, objectives, namespace), source,
                None if notifier is None else notifier.tell, check, held.pop_all().close,
            )  # fmt: skip

    def _named(self, candidate: str) -> tuple[str, str]:
        """The model's name and the version's label."""
        found = _REFERENCE.fullmatch(candidate)
        if found is None:
            raise InputError(f"{candidate!r} names no model version", where="spec.candidate",
                             next_step="write models:/NAME/VERSION")  # fmt: skip
        if found["version"] is not None:
            if self._registry is not None:
                self._registry.version(found["name"], found["version"])
            return found["name"], found["version"]
        raise InputError(f"{candidate!r} names an alias, which may be moved while the rollout runs",
                         where="spec.candidate", next_step="write models:/NAME/VERSION")  # fmt: skip

    def _delivery(self, name: str) -> Delivery:
        template = self._settings.storage_template
        if self._registry is None:
            return _ByName(name, template)
        return MLflowDelivery(self._registry, name, template)

    def _feedback(self, objectives: Objectives) -> Feedback | None:
        clicked = any(objective.good is Good.CLICKED for objective in objectives.objectives)
        url = self._settings.collector_url
        return Feedback(url) if clicked and url is not None else None

    def _gates(self, name: str, spec: RolloutSpec, objectives: Objectives, namespace: str) -> Gatekeeper | None:
        """The checks before any traffic, where packages can be read here; the servers verify them in any case."""
        registry, key = self._registry, self._settings.public_key
        if registry is None or key is None or not Path(key).exists():
            return None
        from serving.gates import GateReport, GateSettings, run_gates

        asked = spec.gates
        settings = GateSettings(asked.offline_margin_relative, asked.segment_margin_relative,
                                asked.segment_min_shoppers, asked.max_shoppers, asked.replayed_requests)  # fmt: skip
        requests = None if asked.requests is None else Path(asked.requests)
        folder = Path(self._settings.registry_cache) / "gates" / namespace / spec.name

        def check(candidate: Path, stable: Path) -> Gated:
            packages: Mapping[str, Path] = {
                label: registry.resolve(f"models:/{name}/{label}").package for label in (str(candidate), str(stable))
            }
            report = run_gates(settings, packages[str(candidate)], packages[str(stable)], Path(key), objectives,
                               requests=requests, folder=folder)  # fmt: skip
            if requests is None:
                report = GateReport(report.gates[:1])
            return Gated(report.passed, report.reason)

        return check

    def _source(self, spec: RolloutSpec, objectives: Objectives, held: ExitStack) -> CountSource | None:
        if not any(objective.good is Good.COUNTED for objective in objectives.objectives):
            return None
        import os

        from serving.sources import PrometheusAccess, Sources

        url = spec.prometheus_url or self._settings.prometheus_url
        if url is None:
            raise InputError("an objective is counted by Prometheus, and none is named", where=f"rollout {spec.name}",
                             next_step="name it in spec.prometheus.url, or give the operator one")  # fmt: skip
        token = _PROMETHEUS_TOKEN if os.environ.get(_PROMETHEUS_TOKEN) else None
        sources = Sources(objectives, prometheus=PrometheusAccess(url, token_env=token))
        held.callback(sources.close)
        return sources
