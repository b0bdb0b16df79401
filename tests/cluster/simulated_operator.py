"""The operator's own process over simulated targets: ``python -m tests.cluster.simulated_operator FOLDER``.

All but the target is real: kopf, the Lease, the conductor, the stores, the API server. A target is a file a service in
FOLDER, so it outlives the process; it is as unkind as :mod:`tests.simulated`. ``FOLDER/behaviours.json`` says, by
service, how its versions behave.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endcap.errors import TargetError
from endcap.objectives import Objectives
from serving.operator.drive import Equipment
from serving.operator.logs import set_up_logs
from serving.operator.run import Operator, serve
from serving.operator.settings import settings_from
from serving.rollout.spec import RolloutSpec
from serving.targets.base import ModelVersion, Observation, StickyKey
from serving.targets.kserve import open_cluster
from serving.targets.kserve.errors import Reason, ServiceError
from tests.simulated import Behaviour, SimulatedTarget, _Served

RATE = 4000.0


class WallClock:
    """Unix time, the same in every process."""

    def now_s(self) -> float:
        return time.time()

    def wait(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


class KeptTarget(SimulatedTarget):
    """Read before each call, and written after it."""

    def __init__(self, path: Path, behaviours: Mapping[str, Behaviour]) -> None:
        self._path = path
        super().__init__(behaviours, WallClock(), RATE)  # type: ignore[arg-type]
        with self._held():
            pass

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._path.exists():
                kept = json.loads(self._path.read_text())
                self.shares, self.capacity, self.token = kept["shares"], set(kept["capacity"]), kept["token"]
                self.served = {label: _Served(**served) for label, served in kept["served"].items()}
                self.log, self._taken_s = kept["log"], kept["taken_s"]
                self._pending = [tuple(one) for one in kept["pending"]]
            yield
            scratch = self._path.with_suffix(".new")
            scratch.write_text(json.dumps({
                "shares": self.shares, "capacity": sorted(self.capacity), "token": self.token, "log": self.log,
                "taken_s": self._taken_s, "served": {label: vars(one) for label, one in self.served.items()},
                "pending": self._pending,
            }))  # fmt: skip
            scratch.replace(self._path)

    def acquire(self, holder: str) -> int:
        if not self.behaviours:
            raise ServiceError(Reason.NOT_FOUND, "there is no InferenceService of that name",
                               where=f"service {self._path.stem}", next_step="create it, or name another")  # fmt: skip
        with self._held():
            return super().acquire(holder)

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        with self._held():
            super().ensure_capacity(shares, token=token)

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None) -> None:
        with self._held():
            super().set_shares(shares, token=token, sticky=sticky)

    def retire(self, label: str, *, token: int) -> None:
        with self._held():
            super().retire(label, token=token)

    def observe(self, *, shoppers_since_s: float | None = None) -> Observation:
        if not self.behaviours:
            self.acquire("")
        if self._path.with_suffix(".away").exists():
            raise TargetError("its metrics do not answer", where=f"service {self._path.stem}")
        with self._held():
            return super().observe(shoppers_since_s=shoppers_since_s)


def outfit(folder: Path) -> Callable[[str, RolloutSpec, Objectives], Equipment]:
    def made(namespace: str, spec: RolloutSpec, objectives: Objectives) -> Equipment:
        known: dict[str, Any] = json.loads((folder / "behaviours.json").read_text())
        behaviours = {label: Behaviour(**how) for label, how in known.get(spec.service, {}).items()}
        label = spec.candidate.rpartition("/")[2]
        return Equipment(KeptTarget(folder / f"{namespace}.{spec.service}.json", behaviours),
                         ModelVersion(label, Path(label)))  # fmt: skip

    return made


def main() -> None:
    settings = settings_from()
    set_up_logs(settings.log_level)
    serve(Operator(open_cluster(), lambda _cluster: outfit(Path(sys.argv[1])), settings))


if __name__ == "__main__":
    main()
