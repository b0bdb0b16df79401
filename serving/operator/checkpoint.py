"""A rollout's truth as one ConfigMap: what it was begun with, where it stands, what its looks came to, its decisions.

One update of one object is one decision: whole or not at all. Who writes names itself and how often the Lease had
changed hands (the fence): an update by a writer that was overtaken is refused by its resource version, and one that
would take over with an older fence refuses itself.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from endcap.documents import describe_validation
from endcap.errors import StateError
from endcap.objectives import Objectives
from serving.operator.objects import Json, RolloutObject
from serving.rollout.audit import LOOK
from serving.rollout.declared import Declared, declared_from, declared_json
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import State

__all__ = ["FORMAT", "Checkpoint", "checkpoint_name", "history_line"]

FORMAT = 1
_MAX_BYTES = 256 << 10
"""Of the compressed parts when they are read: bounded whatever somebody has written there."""
_WRITER, _FENCE = "endcap.dev/writer", "endcap.dev/fence"
_REPAIR = "restore the ConfigMap, or delete it: then the rollout begins anew where one version has all the traffic"


def checkpoint_name(rollout: str) -> str:
    return f"{rollout}.rollout.endcap.dev"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``history``: decisions that changed something, the last ``HISTORY`` of them, as a status shows them.

    ``heard``: by name, the ask that was taken up last. ``seen``: the last look's evidence as the audit log has it.
    ``resource_version``: of the object that this was read from, or written to.
    """

    spec: RolloutSpec
    objectives: Objectives
    state: State
    sight: Mapping[str, Any]
    seen: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    heard: Mapping[str, str] = field(default_factory=dict)
    writer: str = ""
    fence: int = 0
    resource_version: str = ""

    def to_object(self, rollout: RolloutObject) -> Json:
        """The ConfigMap, owned by ``rollout``."""
        meta: Json = {
            "name": checkpoint_name(rollout.key.name), "namespace": rollout.key.namespace,
            "labels": {"app.kubernetes.io/part-of": "endcap", "endcap.dev/service": self.spec.service},
            "annotations": {_WRITER: self.writer, _FENCE: str(self.fence)},
            "ownerReferences": [{
                "apiVersion": "endcap.dev/v1alpha1", "kind": "Rollout", "name": rollout.key.name, "uid": rollout.uid,
                "controller": True, "blockOwnerDeletion": False,
            }],
        }  # fmt: skip
        if self.resource_version:
            meta["resourceVersion"] = self.resource_version
        return {
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta,
            "data": {
                "format": str(FORMAT), "state.json": _json(self.state.to_json()), "sight.json": _json(self.sight),
                "seen.json": _json(self.seen), "heard.json": _json(self.heard),
            },
            "binaryData": {
                "declared.json.z": _packed(declared_json(self.spec, self.objectives)),
                "history.json.z": _packed(list(self.history)),
            },
        }  # fmt: skip

    @staticmethod
    def of(document: Mapping[str, Any], rollout: RolloutObject) -> Checkpoint:
        """Read what :meth:`to_object` made.

        Raises:
            StateError: it is another rollout's, or damaged; the message names the object.
        """
        meta = document["metadata"]
        where = f"configmap {meta['namespace']}/{meta['name']}"
        owners = [owner.get("uid") for owner in meta.get("ownerReferences") or ()]
        if rollout.uid not in owners:
            raise StateError("it is not this Rollout's: the name is taken, or the Rollout was made anew", where=where,
                             next_step="delete the ConfigMap, or give the Rollout another name")  # fmt: skip
        try:
            data, packed = document["data"], document["binaryData"]
            annotations = meta.get("annotations") or {}
            if data["format"] != str(FORMAT):
                raise ValueError(f"format {data['format']!r}; this version reads {FORMAT}")
            declared: Declared = declared_from(_unpacked(packed["declared.json.z"]))
            history = _unpacked(packed["history.json.z"])
            return Checkpoint(
                declared.spec, declared.objectives, State.from_json(json.loads(data["state.json"]), where=where),
                json.loads(data["sight.json"]), json.loads(data["seen.json"]),
                tuple({**line, "seq": int(line["seq"])} for line in history),
                {str(k): str(v) for k, v in json.loads(data["heard.json"]).items()},
                str(annotations.get(_WRITER, "")), int(annotations.get(_FENCE, 0)), str(meta["resourceVersion"]),
            )  # fmt: skip
        except ValidationError as error:
            raise StateError(f"damaged: {describe_validation(error)}", where=where, next_step=_REPAIR) from error
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise StateError(f"damaged, not a rollout's checkpoint ({error!r})", where=where,
                             next_step=_REPAIR) from error  # fmt: skip


def history_line(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """A line of the audit log, as short as a status shows it; None for a look that changed nothing."""
    if record["action"] == LOOK:
        return None
    event, share = record["event"] or {}, record["share"]
    line = {
        "seq": record["seq"], "at_s": record["at_s"], "action": record["action"], "step": record["step"],
        "share": None if share is None else f"{share:.0%}", "verdict": str(record["outcome"] or record["verdict"]),
        "reason": str(record["waiting"] or record["reason"])[:400], "by": event.get("by"),
    }  # fmt: skip
    return {name: value for name, value in line.items() if value is not None}


def _json(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def _packed(document: Any) -> str:
    return base64.b64encode(zlib.compress(_json(document).encode(), 6)).decode()


def _unpacked(text: str) -> Any:
    unpack = zlib.decompressobj()
    raw = unpack.decompress(base64.b64decode(text, validate=True), _MAX_BYTES)
    if unpack.unconsumed_tail:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    return json.loads(raw)
