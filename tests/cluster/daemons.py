"""The cluster's processes: started apart from the command that starts them, found again and stopped by a mark.

Each carries the mark (the cluster's folder) in its environment, so that one is found again whatever was killed before
its number could be written down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError

_MARK = "ENDCAP_TEST_CLUSTER_FOLDER"
_NAME = "ENDCAP_TEST_CLUSTER_PROGRAM"

READY_S = 120.0
"""Generous: other programs share the machine."""

_LAST_LINES = 15


def write_settings(file: Path, text: str) -> None:
    """Unless it says so already: kube-proxy ends, and Envoy Gateway begins anew and may end, when their settings are
    written, be it with the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


_KERNEL_THREAD = 0x200000
"""PF_KTHREAD in the flags of ``/proc/PID/stat`` (proc(5))."""

_EXECS_S = 0.05


def _environment(process: Path) -> list[bytes]:
    """Empty for a moment while a process becomes another program (execve), which must not look like its end."""
    until_s = time.monotonic() + _EXECS_S
    while not (found := (process / "environ").read_bytes()) and time.monotonic() < until_s:
        time.sleep(0.001)
    return found.split(b"\0")


@dataclass(frozen=True, slots=True)
class Daemons:
    """The processes of the cluster in ``folder``: their ``logs/``, and in ``started/`` how each was started."""

    folder: Path

    def running(self) -> dict[str, list[int]]:
        """Process numbers by program name."""
        found: dict[str, list[int]] = {}
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and (name := self._name_of(process)):
                found.setdefault(name, []).append(int(process.name))
        return found

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def start(
        self, name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        """Start ``prefix`` + ``argv``, unless it runs. ``prefix`` enters namespaces."""
        if name in self.running():
            return
        started = self.folder / "started" / f"{name}.json"
        started.parent.mkdir(parents=True, exist_ok=True)
        started.write_text(
            json.dumps({"argv": list(argv), "environment": dict(environment or {}), "prefix": list(prefix)})
        )
        self._spawn(name, argv, environment or {}, prefix)

    def start_again(self, name: str) -> None:
        """As it was started before; for a program that a test has killed."""
        known = json.loads((self.folder / "started" / f"{name}.json").read_text())
        self.start(name, known["argv"], known["environment"], known["prefix"])

    def stop(self, name: str, *, with_signal: signal.Signals = signal.SIGTERM, deadline_s: float = 20.0) -> None:
        """End the program ``name``; killed if it does not within the deadline."""
        self._end(lambda: self.running().get(name, []), with_signal, deadline_s)

    def kill_all(self) -> None:
        """End everything at once, whatever it is doing."""
        self._end(lambda: [number for numbers in self.running().values() for number in numbers], signal.SIGKILL, 20.0)

    def wait_until(self, ready: Callable[[], bool], name: str, *, deadline_s: float = READY_S) -> None:
        """Wait until ``ready``; the program's own last words are in the error when it does not come.

        Raises:
            ClusterError: it ended, or was not ready in time.
        """
        until_s = time.monotonic() + deadline_s
        while not ready():
            if name not in self.running():
                raise ClusterError(f"{name} ended; its log {self.log(name)} ends with:\n{self._last_words(name)}")
            if time.monotonic() > until_s:
                raise ClusterError(
                    f"{name} was not ready within {deadline_s:.0f} s; its log {self.log(name)} ends with:\n"
                    f"{self._last_words(name)}"
                )
            time.sleep(0.1)

    def _spawn(self, name: str, argv: Sequence[str], environment: Mapping[str, str], prefix: Sequence[str]) -> None:
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        # setsid leaves a child that is nobody's: it outlives this process, and marked from its first moment on.
        with log.open("ab") as output:
            subprocess.run(
                ["setsid", "--fork", *prefix, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(self.folder),
                    **environment,
                    _MARK: str(self.folder),
                    _NAME: name,
                },
                cwd=self.folder,
                check=True,
            )

    def _end(self, which: Callable[[], list[int]], with_signal: signal.Signals, deadline_s: float) -> None:
        until_s = time.monotonic() + deadline_s
        signalled: set[int] = set()
        while numbers := which():
            late = time.monotonic() > until_s
            for number in numbers:
                if late or number not in signalled:
                    signalled.add(number)
                    try:
                        os.kill(number, signal.SIGKILL if late else with_signal)
                    except ProcessLookupError:
                        continue
            time.sleep(0.05)
            if late and time.monotonic() > until_s + deadline_s:
                raise ClusterError(f"processes {numbers} do not end, not even when killed")

    def _name_of(self, process: Path) -> str | None:
        try:
            state, *numbers = (process / "stat").read_text().rpartition(")")[2].split()
            if state in {"Z", "X"} or int(numbers[5]) & _KERNEL_THREAD:
                return None
            variables = _environment(process)
        except OSError:
            return None
        if f"{_MARK}={self.folder}".encode() not in variables:
            return None
        prefix = f"{_NAME}=".encode()
        return next((v.removeprefix(prefix).decode() for v in variables if v.startswith(prefix)), None)

    def _last_words(self, name: str) -> str:
        log = self.log(name)
        return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:]) if log.exists() else "(no log)"
