"""Kubernetes Events: one a decision, under a name of its own, so that telling it again changes nothing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from endcap.errors import TargetError
from serving.operator.objects import Json, RolloutObject, events_path
from serving.operator.status import stamp
from serving.operator.store import Api
from serving.rollout.state import Outcome
from serving.targets.kserve.errors import ConflictError

__all__ = ["Events", "decision_event"]

log = logging.getLogger("endcap.operator")
_MESSAGE = 1000
_BAD = {Outcome.ROLLED_BACK, Outcome.HELD, Outcome.ABORTED, Outcome.REFUSED}


class Events:
    """Tells them; one that cannot be told is lost, and holds nothing up. ``instance``: which replica tells."""

    def __init__(self, api: Api, instance: str) -> None:
        self._api, self._instance = api, instance

    def decided(self, rollout: RolloutObject, line: Mapping[str, Any], *, begun_at_s: float) -> None:
        """``line``: of the history. ``begun_at_s``: when the run began that it is of."""
        kind, reason, message = decision_event(line)
        self._tell(rollout, f"{rollout.uid[:8]}.{int(begun_at_s)}.{line['seq']}", kind, reason, message,
                   float(line["at_s"]))  # fmt: skip

    def refused(self, rollout: RolloutObject, reason: str, message: str, *, at_s: float) -> None:
        """Once for a refusal of the object as it is now."""
        told = hashlib.sha256(f"{rollout.generation} {reason} {message}".encode()).hexdigest()[:10]
        self._tell(rollout, f"{rollout.uid[:8]}.{told}", "Warning", reason, message, at_s)

    def _tell(self, rollout: RolloutObject, name: str, kind: str, reason: str, message: str, at_s: float) -> None:
        body: Json = {
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": f"{rollout.key.name}.{name}", "namespace": rollout.key.namespace},
            "involvedObject": rollout.reference, "type": kind, "reason": reason, "message": message[:_MESSAGE],
            "firstTimestamp": stamp(at_s), "lastTimestamp": stamp(at_s), "count": 1,
            "source": {"component": "endcap-operator"}, "reportingComponent": "endcap.dev/operator",
            "reportingInstance": self._instance[:128],
        }  # fmt: skip
        try:
            self._api.create(events_path(rollout.key.namespace), body)
        except ConflictError:
            pass  # it was told already, by whoever took the decision
        except TargetError as error:
            log.warning("an event was not told: %s", error.what, extra={"rollout": str(rollout.key), "reason": reason})


def decision_event(line: Mapping[str, Any]) -> tuple[str, str, str]:
    """Type, reason and message of the event of one decision."""
    action, said = str(line["action"]), str(line.get("reason", ""))
    share = f" {line['share']}" if line.get("share") and action in ("growing", "observing", "holding") else ""
    by = f" by {line['by']}" if line.get("by") else ""
    bad = line.get("verdict") in _BAD and action in ("returning", "end")
    warns = bad or action == "holding"
    reason = {"end": "Ended", "start": "Begun"}.get(action, action.title())
    outcome = f" ({str(line['verdict']).replace('_', ' ')})" if action in ("returning", "retiring", "end") else ""
    return "Warning" if warns else "Normal", reason, f"{action}{share}{by}{outcome}: {said}"
