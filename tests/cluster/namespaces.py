"""Where a full cluster's programs live: a network, mounts and processes of their own, and one cable to this machine.

Addresses of the cluster with slot N, all inside 10.(201 + N).0.0/16, routed over the cable only:
``.0.1`` this machine, ``.0.2`` the node (and the API server), ``.16.0/20`` pods, ``.64.0/20`` Services.
The machine's own firewall and its other interfaces are not touched, and packets are not forwarded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.daemons import Daemons
from tests.cluster.errors import ClusterError
from tests.cluster.net import Net

_CONTROLLERS = Path("/sys/fs/cgroup")
_END_S = 30.0


@dataclass(frozen=True, slots=True)
class Namespaces:
    folder: Path
    net: Net
    daemons: Daemons

    def up(self) -> None:
        """
        Raises:
            ClusterError: the system refuses.
        """
        entered = self.folder / "node" / "entered"
        if self.first_process() is None:
            entered.unlink(missing_ok=True)
            self.daemons.stop("init")  # one of the two processes may have been killed alone
            here = [sys.executable, "-I", str(Path(__file__).with_name("init.py")), str(self.folder)]
            unshare = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--propagation=private")
            self.daemons.start("init", here, prefix=unshare)
        self.daemons.wait_until(entered.exists, "init")
        self._lay_cable()
        for controller in _controllers():
            (controller / self.cgroup).mkdir(exist_ok=True)

    @property
    def cgroup(self) -> str:
        return f"endcap-test-{self.net.second}"

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command that is to run inside.

        Raises:
            ClusterError: there is no inside.
        """
        first = self.first_process()
        if first is None:
            raise ClusterError(f"the cluster in {self.folder} is not running")
        return ("nsenter", f"--target={first}", "--mount", "--net", "--pid", f"--wdns={self.folder}")

    def first_process(self) -> int | None:
        """The number, on this machine, of the process that is number 1 inside."""
        for number in self.daemons.running().get("init", []):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{number}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
                if len(numbers) > 1 and numbers[-1] == "1":
                    return number
        return None

    def run(self, *command: str) -> str:
        """Run ``command`` inside and give what it prints.

        Raises:
            ClusterError: it failed; with what it said.
        """
        ended = subprocess.run([*self.enter, *command], capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: {ended.stderr.strip()}")
        return ended.stdout

    def down(self) -> None:
        """Remove what processes leave: the machine's end of the cable goes with the network, control groups do not."""
        if self._is_anothers():
            return
        until_s = time.monotonic() + _END_S
        for controller in _controllers():
            while (left := controller / self.cgroup).exists():
                for folder in sorted((f for f in left.rglob("*") if f.is_dir()), reverse=True):
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                with contextlib.suppress(OSError):
                    left.rmdir()
                    break
                if time.monotonic() > until_s:
                    raise ClusterError(f"the control group {left} stays: processes are still in it (cgroup.procs)")
                time.sleep(0.05)
        # The network goes some moments after the last process in it; the next cluster may want the same addresses.
        while self.net.interface in interfaces() and time.monotonic() < until_s:
            subprocess.run(["ip", "link", "delete", self.net.interface], capture_output=True, check=False)
            time.sleep(0.05)

    @property
    def _mark(self) -> str:
        """Names this cluster on its cable: a digest, because a folder's name may be too long for it."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:32]

    def _is_anothers(self) -> bool:
        """Whether the addresses went to another cluster after this one died."""
        try:
            alias = Path(f"/sys/class/net/{self.net.interface}/ifalias").read_text().strip()
        except OSError:
            return False
        return alias not in {"", self._mark}  # without a mark: its layer was killed just then

    def _lay_cable(self) -> None:
        inside = f"{self.net.interface}n"
        if self._is_anothers():
            raise ClusterError(
                f"{self.net.all} has become another cluster's while this one was dead; take this one down, then up: "
                f"python -m tests.cluster down --folder {self.folder}"
            )
        if self.net.interface in interfaces():
            return
        first = self.first_process()
        steps = (
            f"ip link add {self.net.interface} type veth peer name {inside} netns {first}",
            f"ip address add {self.net.machine}/24 dev {self.net.interface}",
            f"ip link set {self.net.interface} alias {self._mark}",
            f"ip link set {self.net.interface} up",
        )
        for step in steps:
            _run(step)
        self.run("ip", "address", "add", f"{self.net.node}/24", "dev", inside)
        self.run("ip", "link", "set", inside, "up")
        # Answers of anything inside to this machine need no more; there is no way out of here.
        _run(f"ip route add {self.net.all} via {self.net.node} dev {self.net.interface}")


def interfaces() -> set[str]:
    """The names of this machine's network interfaces."""
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


def free_second(first: int, last: int) -> int:
    """The second byte of addresses that nobody on this machine has.

    Raises:
        ClusterError: all are taken.
    """
    known = json.loads(
        subprocess.run(["ip", "-j", "route", "show", "table", "all"], capture_output=True, check=True).stdout
    )
    taken = {route.get("dst", "").split("/")[0] for route in known}
    for second in range(first, last + 1):
        if not any(address.startswith(f"10.{second}.") for address in taken):
            return second
    raise ClusterError(
        f"10.{first}.0.0/16 to 10.{last}.0.0/16 are all routed on this machine already: `ip route` says by whom"
    )


def why_not() -> str | None:
    """Why this machine can have no node, in one line; None: it can."""
    if os.geteuid() != 0:
        return "a node needs root (namespaces, mounts, containerd)"
    if not (_CONTROLLERS / "memory").is_dir() and not (_CONTROLLERS / "cgroup.controllers").exists():
        return f"no control groups are mounted at {_CONTROLLERS}"
    return None


def _controllers() -> list[Path]:
    """The hierarchies of version 1, or the one of version 2."""
    if (_CONTROLLERS / "cgroup.controllers").exists():
        return [_CONTROLLERS]
    return [entry for entry in _CONTROLLERS.iterdir() if entry.is_dir() and not entry.is_symlink()]


def _run(command: str) -> None:
    ended = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise ClusterError(f"{command}: {ended.stderr.strip()}")
