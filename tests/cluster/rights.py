"""A cluster as one of its ServiceAccounts sees it: what that account was not granted fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.cluster.access import Access

__all__ = ["as_account"]


def as_account(access: Access, namespace: str, account: str, folder: Path) -> Access:
    """The same cluster with a token of the ServiceAccount in place of the admin's certificate; its kubeconfig in
    ``folder``."""
    token = access.kubectl("create", "token", account, "--namespace", namespace, "--duration=1h").strip()
    document: dict[str, Any] = yaml.safe_load(access.kubectl("config", "view", "--raw", "--minify"))
    document["users"] = [{"name": account, "user": {"token": token}}]
    document["contexts"][0]["context"] |= {"user": account}
    path = folder / f"kubeconfig-{account}"
    path.write_text(yaml.safe_dump(document))
    path.chmod(0o600)
    return Access(path, access.cluster)
