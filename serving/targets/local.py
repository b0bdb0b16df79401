"""The local target's client: what rollouts, load tests and drills hold. It talks to the supervisor over loopback.

``open_target()`` finds a running one through its folder or ``ENDCAP_TARGET``;
``start_local_target(config)`` starts one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx
from pydantic import BaseModel, ValidationError

from endcap.errors import EndcapError, InputError, StateError, TargetError
from endcap.files import read_json, write_json
from endcap.processes import last_line, spawn, stop
from serving.targets.base import ModelVersion, Observation, StickyKey
from serving.targets.config import CONFIG_FILE, FAILED_FILE, TARGET_FILE, SupervisorConfig, TargetFile
from serving.targets.wire import (
    AcquireReply,
    AcquireRequest,
    ObservationReply,
    RetireRequest,
    ShadowRequest,
    SharesRequest,
    StateReply,
)

__all__ = ["TARGET_VARIABLE", "LocalTarget", "Replica", "open_target", "start_local_target"]

TARGET_VARIABLE = "ENDCAP_TARGET"
_ANSWER_S = 30.0
_REPLICAS_S = 600.0
"""The supervisor answers when replicas have come or gone, and has the deadline for that."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One model server. ``ready``: the gateway sends it requests. ``pid`` is None while it is being started again."""

    version: str
    zone: str
    index: int
    pid: int | None
    port: int
    ready: bool


class LocalTarget:
    """A running local target; implements :class:`serving.targets.base.Target`. Safe to use from several threads.

    As a context manager it ends the supervisor that :func:`start_local_target` started, and leaves others alone.
    """

    def __init__(self, folder: Path, found: TargetFile, *, process: subprocess.Popen[bytes] | None = None) -> None:
        self.folder = folder
        self.found = found
        self._process = process
        self._client = _client_of(found)

    @property
    def url(self) -> str:
        """Where shoppers' requests go: the gateway."""
        return self.found.gateway_url

    @property
    def records(self) -> Path:
        return self.found.records

    def acquire(self, holder: str) -> int:
        reply = self._ask("POST", "/v1/acquire", AcquireRequest(holder=holder))
        return AcquireReply.model_validate_json(reply).token

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        self._ask("POST", "/v1/capacity", SharesRequest.of(shares, token), within_s=_REPLICAS_S)

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None) -> None:
        self._ask("POST", "/v1/shares", SharesRequest.of(shares, token, sticky=sticky))

    def set_shadow(self, version: ModelVersion | None, *, share: float = 0.0, token: int) -> None:
        label = None if version is None else version.label
        self._ask("POST", "/v1/shadow", ShadowRequest(token=token, label=label, share=share))

    def retire(self, label: str, *, token: int) -> None:
        self._ask("POST", "/v1/retire", RetireRequest(token=token, label=label), within_s=_REPLICAS_S)

    def observe(self, *, shoppers_since_s: float | None = None) -> Observation:
        path = "/v1/observe" if shoppers_since_s is None else f"/v1/observe?shoppers_since_s={shoppers_since_s!r}"
        return ObservationReply.model_validate_json(self._ask("GET", path)).to_domain()

    def state(self) -> StateReply:
        """What the supervisor is doing: token, shares, versions, replicas, process ids."""
        return StateReply.model_validate_json(self._ask("GET", "/v1/state"))

    def replicas(self) -> list[Replica]:
        return [Replica(r.version, r.zone, r.index, r.pid, r.port, r.ready) for r in self.state().replicas]

    def healthy(self) -> dict[str, int]:
        """Replicas that the gateway sends requests to, by version."""
        found: dict[str, int] = {}
        for replica in self.replicas():
            found[replica.version] = found.get(replica.version, 0) + replica.ready
        return found

    def _ask(self, method: str, path: str, body: BaseModel | None = None, *, within_s: float = _ANSWER_S) -> bytes:
        content = None if body is None else body.model_dump_json()
        asked = self.found
        try:
            response = self._client.request(method, path, content=content, timeout=within_s)
        except httpx.HTTPError as error:
            if self._has_moved(asked):  # all that is asked is safe to repeat, and tokens outlive a supervisor
                return self._ask(method, path, body, within_s=within_s)
            raise TargetError(f"the target does not answer: {error!r}", where=self.folder,
                              next_step="see logs/supervisor.log there, or start it again") from error  # fmt: skip
        if response.status_code == 200:
            return response.content
        try:
            document = response.json()
        except ValueError:
            document = {}
        if not isinstance(document, dict) or "error" not in document:
            raise TargetError(f"the target answered {response.status_code}", where=f"{self.folder} {path}")
        raise EndcapError.from_json(document)

    def _has_moved(self, asked: TargetFile) -> bool:
        """Whether another supervisor serves the folder since ``asked``: one that died and was started again."""
        found = _target_file(self.folder)
        if found is None or found.pid == asked.pid or not _runs(found.pid):
            return False
        self.found, self._client = found, _client_of(found)
        return True

    def close(self) -> None:
        """Let go of the connection; the target goes on."""
        self._client.close()

    def wait(self) -> int:
        """Wait for the supervisor that this object started to end, and return its exit code."""
        if self._process is None:
            raise TargetError("this process did not start the target", where=self.folder)
        return self._process.wait()

    def stop(self, *, grace_s: float = 20.0) -> None:
        """End the supervisor that this object started, and with it everything it owns."""
        self.close()
        if self._process is not None:
            stop(self._process, grace_s=grace_s)

    def __enter__(self) -> LocalTarget:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.stop()


def open_target(folder: Path | None = None) -> LocalTarget:
    """The running target of ``folder`` (default: the environment variable ``ENDCAP_TARGET``).

    Raises:
        InputError: no folder was named.
        TargetError: no target runs there.
    """
    if folder is None:
        named = os.environ.get(TARGET_VARIABLE)
        if not named:
            raise InputError("no target was named", where=TARGET_VARIABLE,
                             next_step="set it to a running target's folder, or pass --target")  # fmt: skip
        folder = Path(named)
    path = folder.absolute() / TARGET_FILE
    start_it = "start one there: endcap serve up"
    if not path.exists():
        raise TargetError("no target runs here", where=folder, next_step=start_it)
    try:
        found = TargetFile.model_validate(read_json(path))
    except ValidationError as error:
        raise StateError("damaged", where=path, next_step=start_it) from error
    if not _runs(found.pid):
        raise TargetError(f"the target of process {found.pid} is gone", where=folder, next_step=start_it)  # fmt: skip
    return LocalTarget(folder.absolute(), found)


def _runs(pid: int) -> bool:
    """False also for a process that has ended and that its parent has not asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_local_target(config: SupervisorConfig, *, bind: bool = True, deadline_s: float = 120.0) -> LocalTarget:
    """Start a supervisor and return when its stable version serves.

    ``bind``: it ends when the thread that calls this ends; call it from the main thread.

    Raises:
        EndcapError: what the supervisor itself raised (see :func:`serving.targets.supervisor.run_supervisor`), or
            TargetError when it did not get ready in time. Nothing is left running.
    """
    folder = config.folder
    log = folder / "logs" / "supervisor.log"
    # The supervisor that holds the folder, if any, has read its config already; ours is refused by the lock.
    own_config = folder / f"{CONFIG_FILE}.{os.getpid()}"
    write_json(own_config, config.model_dump(mode="json"))
    log_from = log.stat().st_size if log.exists() else 0
    argv = [sys.executable, "-m", "serving.targets.supervisor", "--config", str(own_config)]
    process = spawn([*argv, "--bind-parent"] if bind else argv, log=log)
    try:
        ends_at = time.monotonic() + deadline_s
        while True:
            if process.poll() is not None:
                raise _failure(folder, process, log, log_from)
            found = _target_of(folder, process.pid)
            if found is not None:
                own_config.replace(folder / CONFIG_FILE)
                return LocalTarget(folder, found, process=process)
            if time.monotonic() > ends_at:
                raise TargetError(f"the target was not ready after {deadline_s:g} s", where=log)
            time.sleep(0.05)
    except BaseException:
        stop(process, grace_s=10)
        own_config.unlink(missing_ok=True)
        raise


def _target_of(folder: Path, pid: int) -> TargetFile | None:
    found = _target_file(folder)
    return found if found is not None and found.pid == pid else None


def _target_file(folder: Path) -> TargetFile | None:
    path = folder / TARGET_FILE
    if not path.exists():
        return None
    try:
        return TargetFile.model_validate(read_json(path))
    except (StateError, ValidationError):
        return None


def _client_of(found: TargetFile) -> httpx.Client:
    return httpx.Client(
        base_url=found.control_url,
        headers={"authorization": f"Bearer {found.control_token}"},
        timeout=_ANSWER_S,
        trust_env=False,
    )


def _failure(folder: Path, process: subprocess.Popen[bytes], log: Path, log_from: int) -> EndcapError:
    """Why a supervisor ended before it served, in its own words."""
    path = folder / FAILED_FILE
    document = read_json(path) if path.exists() else {}
    if isinstance(document, dict) and document.get("pid") == process.pid:
        return EndcapError.from_json({key: document.get(key) for key in ("error", "what", "where", "next")})
    return TargetError(f"the supervisor ended with code {process.returncode}: {last_line(log, since=log_from)}",
                       where=log)  # fmt: skip
