"""What a load is: settings, and what it comes to. Plain values that cross the border to the load's own process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from endcap.errors import InputError, TargetError
from endcap.files import read_json

__all__ = ["LoadConfig", "LoadSummary", "Threshold", "gateway_url"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """One load.

    ``target``: the running target's folder (its ``target.json`` names the gateway), or ``url`` for any other
    service that speaks the same two routes. ``shoppers``: the shoppers file; a rollout counts each of them once, so
    it needs as many as its verdict on clicks takes (see :func:`loadtests.shoppers.replay`). ``out``: the records
    folder.
    ``rate_rps``: mean of the Poisson arrivals; ``duration_s`` None: until stopped.
    ``timeout_s``: a request without an answer after it has failed; clients never retry.
    ``objectives``: a file; its goals become thresholds that decide the exit code, unless ``thresholds`` is off.
    ``max_in_flight``: beyond it arrivals are recorded as the generator's own failure, never dropped.
    """

    shoppers: Path
    out: Path
    target: Path | None = None
    url: str | None = None
    rate_rps: float = 150.0
    duration_s: float | None = None
    seed: int = 7
    timeout_s: float = 3.0
    k: int = 10
    objectives: Path | None = None
    thresholds: bool = True
    feedback: bool = True
    max_in_flight: int = 4096

    def to_argv(self) -> list[str]:
        """The arguments of ``python -m loadtests.run`` that mean the same."""
        argv = ["--shoppers", str(self.shoppers), "--out", str(self.out), "--rate", repr(self.rate_rps),
                "--seed", str(self.seed), "--timeout", repr(self.timeout_s), "--k", str(self.k),
                "--max-in-flight", str(self.max_in_flight)]  # fmt: skip
        if self.target is not None:
            argv += ["--target", str(self.target)]
        if self.url is not None:
            argv += ["--url", self.url]
        if self.duration_s is not None:
            argv += ["--duration", repr(self.duration_s)]
        if self.objectives is not None:
            argv += ["--objectives", str(self.objectives)]
        if not self.thresholds:
            argv.append("--no-thresholds")
        if not self.feedback:
            argv.append("--no-feedback")
        return argv


@dataclass(frozen=True, slots=True)
class Threshold:
    """An objective of the file, judged over the whole load. ``share`` None: no event, so not held."""

    name: str
    goal: float
    share: float | None
    total: int
    held: bool


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What a load came to. Requests are those for recommendations; feedback's beacons are counted apart.

    Latencies run from the intended send and are exact (nearest rank over all requests, failed ones included).
    ``saturated``: arrivals that the generator itself could not send; they are among ``failed``.
    ``lag_p99_ms``: how late the generator was in sending; large values mean that it, not the service, was slow.
    """

    requests: int
    failed: int
    offered_rps: float
    achieved_rps: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    feedback: int = 0
    feedback_failed: int = 0
    saturated: int = 0
    lag_p99_ms: float | None = None
    thresholds: tuple[Threshold, ...] = ()

    @property
    def thresholds_held(self) -> bool:
        return all(threshold.held for threshold in self.thresholds)


def gateway_url(config: LoadConfig) -> str:
    """Where the load is sent.

    Raises:
        InputError: neither a target nor a URL. TargetError: no target runs in that folder.
    """
    if config.url is not None:
        return config.url.rstrip("/")
    if config.target is None:
        raise InputError("no target given", next_step="give --target or set ENDCAP_TARGET")
    path = config.target / "target.json"
    if not path.exists():
        raise TargetError("no target runs here", where=config.target, next_step="start one with `endcap serve up`")
    document = read_json(path)
    url = document.get("gateway_url") if isinstance(document, dict) else None
    if not isinstance(url, str):
        raise TargetError("names no gateway_url", where=path)
    return url.rstrip("/")
