"""The one tree of errors. Each says what happened, where, and what to do next.

A command prints ``str(error)`` and exits with ``exit_code``; nothing under :class:`EndcapError` ever reaches a
person as a traceback. Errors cross process borders (pipeline steps, the local target) as JSON.
"""

from __future__ import annotations

import errno
from typing import ClassVar

__all__ = [
    "BusyError",
    "CapacityError",
    "DataError",
    "EndcapError",
    "FencedError",
    "InputError",
    "OutcomeError",
    "PackageError",
    "RegistryError",
    "SourceError",
    "StateError",
    "StepError",
    "StillRunningError",
    "StorageError",
    "TargetError",
    "VerificationError",
    "from_os_error",
]


class EndcapError(Exception):
    """Base of all errors that endcap raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: object = None, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.next_step = next_step

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.next_step is None else f"{text}\n  next: {self.next_step}"

    def to_json(self) -> dict[str, str | None]:
        """The error as a JSON object: ``{"error", "what", "where", "next"}``."""
        return {"error": type(self).__name__, "what": self.what, "where": self.where, "next": self.next_step}

    @staticmethod
    def from_json(document: dict[str, str | None]) -> EndcapError:
        """The inverse of :meth:`to_json`; an unknown kind becomes a plain :class:`EndcapError`."""
        kind = _KINDS.get(document.get("error") or "", EndcapError)
        return kind(document.get("what") or "unknown error", where=document.get("where"),
                    next_step=document.get("next"))  # fmt: skip


class InputError(EndcapError):
    """An argument, a file or a request that a person can correct."""

    exit_code = 2


class DataError(InputError):
    """A data file that is missing, damaged, of the wrong checksum or of the wrong form."""


class PackageError(EndcapError):
    """A model package that does not keep to its contract."""

    exit_code = 3


class VerificationError(PackageError):
    """A model package whose signature or digests do not verify. It must never be loaded."""


class RegistryError(EndcapError):
    """MLflow's store is missing, locked or does not hold what was asked for."""


class StepError(EndcapError):
    """A pipeline step failed; carries the step's own error."""


class TargetError(EndcapError):
    """The thing that serves (a local target, a cluster) could not do as asked."""


class CapacityError(TargetError):
    """Replicas that traffic needs did not become available."""


class FencedError(TargetError):
    """A write that carried an older fencing token than the target has seen."""


class SourceError(TargetError):
    """What counts events beside the target gave no answer that can be believed. That is no data, never zero."""


class StateError(EndcapError):
    """A file of ours that is damaged. Never treated as a fresh start."""


class BusyError(EndcapError):
    """Another process holds what this one needs."""


class StorageError(EndcapError):
    """The disk is full or refuses to be written."""


class OutcomeError(EndcapError):
    """Everything ran, and an outcome that had to happen did not."""

    exit_code = 4


class StillRunningError(EndcapError):
    """What was waited for has not ended in the time that was given; it goes on."""

    exit_code = 5


_KINDS: dict[str, type[EndcapError]] = {}


def _collect(kind: type[EndcapError]) -> None:
    _KINDS[kind.__name__] = kind
    for child in kind.__subclasses__():
        _collect(child)


_collect(EndcapError)


def from_os_error(error: OSError, *, doing: str) -> EndcapError:
    """Turn an ``OSError`` of a write into one that a person can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space left while {doing}", where=error.filename,
                            next_step="free some space, then run the same command again")  # fmt: skip
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"not allowed to write while {doing}", where=error.filename,
                            next_step="choose a folder you may write to (--out)")  # fmt: skip
    return StorageError(f"{error.strerror or error} while {doing}", where=error.filename)
