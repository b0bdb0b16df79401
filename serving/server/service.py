"""A package made ready to answer: engine and catalogue together, and the pool that keeps the event loop free."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from endcap.errors import EndcapError, PackageError
from endcap.package import Manifest, Task
from serving.server.engine import (
    Engine,
    GraphTimeoutError,
    Tensors,
    load_engine,
    verify,
    warm_up,
)
from serving.server.recommend import Catalogue, Recommendation, RecommendRequest, history_tensor, read_catalogue

__all__ = ["OverloadedError", "Pool", "Service", "load_service"]


class OverloadedError(EndcapError):
    """More requests wait than could be answered in time."""


class Pool:
    """Runs graphs on threads of their own: a slow or stalled graph never holds the event loop, nor health checks.

    Args:
        workers: runs at the same time (onnxruntime lets go of Python's lock while it runs).
        timeout_s: a run that waited and ran longer than this is ended.
        max_waiting: requests beyond this are turned away at once.
    """

    def __init__(self, *, workers: int, timeout_s: float, max_waiting: int) -> None:
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="graph")
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self.waiting = 0

    async def run(self, engine: Engine, inputs: Tensors, *, within_s: float = math.inf) -> dict[str, NDArray[Any]]:
        """All outputs by name. ``within_s``: how long the caller waits; a shorter limit than our own holds.

        Raises:
            OverloadedError: too many wait already.
            GraphError: the graph failed, or (GraphTimeoutError) took too long.
        """
        if self.waiting >= self._max_waiting:
            raise OverloadedError(f"{self.waiting} requests wait already", where="server",
                                  next_step="try another replica, or later")  # fmt: skip
        ticket = engine.ticket()
        limit_s = min(self._timeout_s, within_s)
        self.waiting += 1
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.get_running_loop().run_in_executor(self._executor, engine.run, inputs, ticket)
        except TimeoutError:
            raise GraphTimeoutError(f"no answer from the graph within {limit_s:g} s", where="graph",
                                    next_step="try again") from None  # fmt: skip
        finally:
            self.waiting -= 1
            ticket.revoke()

    def close(self) -> None:
        """Let go of the threads; a run that hangs does not hold the process."""
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Service:
    """One loaded package."""

    manifest: Manifest
    engine: Engine
    catalogue: Catalogue
    verification_s: float
    load_s: float

    async def recommend(self, request: RecommendRequest, pool: Pool, *, within_s: float = math.inf) -> Recommendation:
        """The graph's answer, or the documented fallback."""
        known = self.catalogue.known(request.history)
        if not known:
            return self.catalogue.popular(request.history, request.k)
        tensor = history_tensor(known, self.manifest)
        outputs = await pool.run(self.engine, {self.manifest.inputs[0].name: tensor}, within_s=within_s)
        answer = self.catalogue.answer(known, outputs["items"][0], outputs["scores"][0], request.k)
        return answer if answer.items else self.catalogue.popular(request.history, request.k)


def load_service(folder: Path, public_key: Path, *, variant: str = "float32") -> Service:
    """Verify, load and warm a package; blocks.

    Raises:
        PackageError: it must not or cannot be served.
    """
    package = verify(folder, public_key)
    manifest = package.manifest
    if manifest.task is not Task.SESSION_RECOMMENDER:
        raise PackageError(f"this server does not serve the task {manifest.task}", where=folder)
    _check_schema(manifest, folder)
    begun_s = time.monotonic()
    catalogue = read_catalogue(package)
    engine = load_engine(package, variant=variant)
    name = manifest.inputs[0].name
    warm_up(engine, {name: history_tensor([1], manifest)}, folder)
    warm_up(engine, {name: history_tensor([1] * manifest.max_history, manifest)}, folder)
    return Service(manifest, engine, catalogue, package.seconds, time.monotonic() - begun_s)


def _check_schema(manifest: Manifest, folder: Path) -> None:
    """A session recommender takes ``history`` int64 [batch, length] and gives ``items`` and ``scores``."""
    wanted = {"history": ("INT64", 2), "items": ("INT64", 2), "scores": ("FP32", 2)}
    found = {spec.name: (spec.datatype, len(spec.shape)) for spec in (*manifest.inputs, *manifest.outputs)}
    if len(manifest.inputs) != 1 or any(found.get(name) != form for name, form in wanted.items()):
        raise PackageError("not the tensors of a session recommender (history; items, scores)", where=folder)
