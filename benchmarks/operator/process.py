"""The operator's own process over simulated targets in memory: ``python -m benchmarks.operator.process LOOKS``.

All but the target is what the chart runs. Every look that was due is a line of LOOKS: rollout, when it was due, when
the API server had acknowledged it. A service's name says how its candidate behaves: ``bad-SECONDS-N`` begins to fail
half of its requests so long after the target was made; anything else is as good as stable.
"""

from __future__ import annotations

import sys
from pathlib import Path

from endcap.files import JsonLines
from endcap.objectives import Objectives
from serving.operator.drive import Equipment
from serving.operator.logs import set_up_logs
from serving.operator.objects import Key
from serving.operator.run import Operator, serve
from serving.operator.settings import settings_from
from serving.rollout.engine import SystemClock
from serving.rollout.spec import RolloutSpec
from serving.targets.base import ModelVersion
from serving.targets.kserve import open_cluster
from tests.simulated import Behaviour, SimulatedTarget

RATE = 200.0


class Turning(SimulatedTarget):
    """One whose candidate turns bad."""

    turns_at_s = float("inf")

    def _behaviour(self, label: str) -> Behaviour:
        bad = label == "2" and self.clock.now_s() >= self.turns_at_s
        return Behaviour(answered=0.5) if bad else Behaviour()


class Shops:
    """Targets by service, made at the first rollout of each: they outlive engines, not the process."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._targets: dict[tuple[str, str], SimulatedTarget] = {}

    def __call__(self, namespace: str, spec: RolloutSpec, objectives: Objectives) -> Equipment:
        target = self._targets.get((namespace, spec.service))
        if target is None:
            target = Turning({"1": Behaviour(), "2": Behaviour()}, self._clock, RATE)  # type: ignore[arg-type]
            kind, _, rest = spec.service.partition("-")
            if kind == "bad":
                target.turns_at_s = self._clock.now_s() + float(rest.partition("-")[0])
            self._targets[namespace, spec.service] = target
        return Equipment(target, ModelVersion("2", Path("2")))


def main() -> None:
    settings = settings_from()
    set_up_logs(settings.log_level)
    shops = Shops()
    with JsonLines(Path(sys.argv[1])) as looks:

        def looked(key: Key, due_s: float, begun_s: float, acknowledged_s: float) -> None:
            looks.append({"rollout": str(key), "due_s": due_s, "begun_s": begun_s, "acknowledged_s": acknowledged_s})

        serve(Operator(open_cluster(), lambda _cluster: shops, settings, looked))


if __name__ == "__main__":
    main()
