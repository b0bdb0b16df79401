"""Child processes that never outlive us, however we die.

Linux tells a process when its parent is gone (prctl(2), ``PR_SET_PDEATHSIG``); the setting survives execve(2).
Every process that endcap starts is bound so: its own code calls :func:`bind_to_parent`, or a foreign program
(Envoy) is started through :func:`leashed`. Programs that sit two levels down behind a shell (Kubeflow's local
runner) are bound to a named ancestor by :func:`bind_to_lifeline`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from endcap.errors import EndcapError, from_os_error

__all__ = [
    "LIFELINE_VARIABLE",
    "bind_to_lifeline",
    "bind_to_parent",
    "free_port",
    "last_line",
    "leashed",
    "spawn",
    "stop",
]

LIFELINE_VARIABLE = "ENDCAP_LIFELINE_PID"
_PR_SET_PDEATHSIG = 1
_LOG_TAIL_BYTES = 1 << 20


def bind_to_parent(signal_number: int = signal.SIGKILL, *, parent_pid: int | None = None) -> None:
    """Have the kernel send us ``signal_number`` when the process that started us dies.

    Call it first thing in a process's ``main``. ``parent_pid``, where known, closes the gap in which the parent
    died before we asked.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    expected = parent_pid if parent_pid is not None else int(os.environ.get("ENDCAP_PARENT_PID", "0"))
    if expected and os.getppid() != expected:
        os.kill(os.getpid(), signal_number)


def bind_to_lifeline() -> None:
    """Die with the process named in ``ENDCAP_LIFELINE_PID``, even when a shell stands between us and it."""
    pid = int(os.environ.get(LIFELINE_VARIABLE, "0"))
    if not pid:
        return
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def leashed(argv: Sequence[str]) -> list[str]:
    """``argv`` behind a launcher that binds the foreign program to us, then becomes it."""
    launcher = (
        "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9,0,0,0);"
        "os.getppid()==int(sys.argv[1]) or os._exit(1);os.execvp(sys.argv[2],sys.argv[2:])"
    )
    return [sys.executable, "-I", "-S", "-c", launcher, str(os.getpid()), *argv]


def spawn(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None,
          cwd: Path | None = None, leash: bool = False) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a child whose output goes to the end of ``log``.

    It stands in a session of its own, so that Ctrl-C reaches only us and we end it in order.
    Call it from a thread that lives as long as the process (PDEATHSIG follows the thread that forked).
    """
    environment = {**os.environ, **(env or {}), "ENDCAP_PARENT_PID": str(os.getpid())}
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                leashed(argv) if leash else list(argv),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=environment, cwd=cwd, start_new_session=True,
            )  # fmt: skip
    except FileNotFoundError as error:
        raise EndcapError(f"program not found: {argv[0]}", next_step="run `make setup`") from error
    except OSError as error:
        raise from_os_error(error, doing=f"starting {argv[0]}") from error


def stop(process: subprocess.Popen[bytes], *, grace_s: float = 5.0) -> int:
    """End a child: SIGTERM (and SIGCONT, should it be stopped), then SIGKILL after ``grace_s``. Returns its code."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            process.send_signal(signal.SIGCONT)
        try:
            return process.wait(grace_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    return process.wait()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free now. The caller must cope with another taking it first (start again)."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def last_line(log: Path, *, since: int = 0) -> str:
    """The last line that a process wrote to its log after byte ``since``: usually its reason."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(since, end - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return lines[-1].strip() if lines else "it said nothing"
