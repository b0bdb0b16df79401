"""What KServe runs before a model server to bring ``mlflow://NAME/VERSION`` to the pod's volume.

    python -m endcap.storage_initializer mlflow://recommender/7 /mnt/models

KServe's contract for a ClusterStorageContainer: two arguments, the URI and the folder, which is mounted and so can be
neither renamed nor replaced. The registry is ``MLFLOW_TRACKING_URI``'s. The package must have the digest that was
registered; the model server then verifies signature and digests again, whatever brought them. Started again after
a crash it begins anew.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from endcap.errors import EndcapError, InputError, from_os_error
from endcap.registry import Registry

__all__ = ["main"]

_URI = re.compile(r"mlflow://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,127})/(?P<version>@?[A-Za-z0-9][A-Za-z0-9._-]{0,63})")


def main(argv: Sequence[str] | None = None) -> int:
    """The process's exit code."""
    try:
        _deliver(sys.argv[1:] if argv is None else argv)
    except EndcapError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def reference_of(uri: str) -> str:
    """``mlflow://NAME/VERSION``, or ``mlflow://NAME/@ALIAS``, as the registry's own ``models:/`` reference.

    Raises:
        InputError: neither.
    """
    found = _URI.fullmatch(uri)
    if found is None:
        raise InputError(f"{uri!r} names no model version", next_step="write mlflow://NAME/VERSION")
    version = found["version"]
    return f"models:/{found['name']}{version}" if version.startswith("@") else f"models:/{found['name']}/{version}"


def _deliver(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        raise InputError("two arguments are needed: the URI and the folder")
    reference, folder = reference_of(arguments[0]), Path(arguments[1])
    registry = os.environ.get("MLFLOW_TRACKING_URI")
    if not registry:
        raise InputError("no registry is given", where="MLFLOW_TRACKING_URI",
                         next_step="give the chart mlflow.url or mlflow.install")  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():  # of a start before this one
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        # On the same volume, so that files are moved and never held twice.
        with tempfile.TemporaryDirectory(prefix=".coming-", dir=folder) as scratch:
            found = Registry(registry).resolve(reference, destination=Path(scratch) / "package")
            for file in found.package.iterdir():
                file.rename(folder / file.name)
    except OSError as error:
        raise from_os_error(error, doing=f"bringing {reference} to {folder}") from error
    sys.stderr.write(f"{reference} is in {folder}: version {found.version}, digest {found.digest}\n")


if __name__ == "__main__":
    sys.exit(main())
