"""The first process of a full cluster's namespaces: everything in them ends when it does.

Run by namespaces.py under ``unshare``, as process 1 of a process namespace, with mounts and a network of its own: no
mount, interface, firewall rule or process of the node outlives it, however it ends. Imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def main(folder: Path) -> None:
    # What the node's programs write below these fixed paths is the cluster's own.
    for name in ("lib", "log"):
        (folder / "node" / name).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", str(folder / "node" / name), f"/var/{name}"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"], check=True)
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    (folder / "node" / "entered").touch()
    while signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) == signal.SIGCHLD:
        reap()


def reap() -> None:
    """Take leave of children that have ended: orphans become process 1's."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
