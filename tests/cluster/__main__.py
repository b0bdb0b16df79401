"""``python -m tests.cluster up|down|status|build``: the test cluster by hand."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tests.cluster import images, programs
from tests.cluster.access import KUBECONFIG_SETTING
from tests.cluster.cluster import FOLDER_SETTING, Cluster, Kind, Status, default_folder, why_not
from tests.cluster.errors import ClusterError


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status", "build"))
    parser.add_argument(
        "--folder",
        type=Path,
        default=default_folder(),
        help=f"where it lives ({FOLDER_SETTING}, else the user's cache); another folder is another cluster",
    )
    parser.add_argument("--only", choices=[Kind.CONTROL_PLANE.value], help="objects only: no node, and no root needed")
    parser.add_argument("--json", action="store_true", help="status for a program")
    return parser.parse_args()


def _printed(status: Status) -> str:
    if status.kind is None:
        return f"no cluster in {status.folder}" + (
            f"; left running: {', '.join(status.running)}" if status.running else ""
        )
    lines = [
        f"{status.kind}, {'ready' if status.ready else 'not ready'}, in {status.folder}",
        f"running: {', '.join(status.running)}",
    ]
    if status.missing:
        lines.append(
            f"ended: {', '.join(status.missing)} (started again by `up`; logs are in {status.folder / 'logs'})"
        )
    return "\n".join([*lines, f"export KUBECONFIG={status.kubeconfig}"])


def _build() -> None:
    """Everything that tests would else build while one of them waits; nothing where they cannot run here anyway."""
    reason = why_not(Kind.FULL) or images.why_not()
    if os.environ.get(KUBECONFIG_SETTING) or reason is not None:
        print(f"nothing is built: {reason or 'the tests are for another cluster'}")  # noqa: T201
        return
    for name in programs.PROGRAMS:
        programs.ensure(name)
    for documents in (programs.GATEWAY_CRDS, programs.KWOK_STAGES):
        programs.ensure_documents(documents)
    for role in _ROLES:
        images.ensure(role)


_ROLES = (*(role for role in images.ROLES if role != "pipeline"), images.STORAGE_INITIALIZER, images.REDIS)
"""Whose images tests run; the pipeline's carries torch and is 7 GB."""


def main() -> int:
    """0: done; for ``status``: ready. 1: not ready. 2: it cannot be done, with the reason."""
    arguments = _arguments()
    cluster = Cluster(arguments.folder)
    try:
        if arguments.command == "build":
            _build()
            return 0
        if arguments.command == "up":
            cluster.up(Kind.CONTROL_PLANE if arguments.only else Kind.FULL)
        elif arguments.command == "down":
            cluster.down()
            return 0
        status = cluster.status()
    except ClusterError as problem:
        print(problem, file=sys.stderr)  # noqa: T201
        return 2
    if arguments.json:
        known = {
            "folder": str(status.folder),
            "kind": status.kind,
            "ready": status.ready,
            "kubeconfig": str(status.kubeconfig) if status.kubeconfig else None,
            "running": status.running,
            "missing": status.missing,
        }
        print(json.dumps(known))  # noqa: T201
    else:
        print(_printed(status))  # noqa: T201
    return 0 if status.ready else 1


if __name__ == "__main__":
    sys.exit(main())
