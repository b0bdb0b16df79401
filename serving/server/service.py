"""A package of any task made ready to answer: its graph, its batcher and, for a recommender, its catalogue."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from endcap.errors import InputError, PackageError
from endcap.package import Manifest, Task, TensorSpec
from serving.server.batching import Batcher, Limits, OverloadedError, Priority
from serving.server.cache import AnswerCache, Codec, Identity, outputs_codec, recommendation_codec
from serving.server.engine import DTYPES, Engine, GraphTimeoutError, Tensors, cores, load_engine, verify, warm_up
from serving.server.overload import CostModel
from serving.server.recommend import Asked, Catalogue, Recommendation, RecommendRequest, history_tensor, read_catalogue
from serving.server.shapes import BatchShape
from serving.tracing import CURRENT

__all__ = ["MAX_ROWS", "Limits", "OverloadedError", "Priority", "Service", "load_service"]

T = TypeVar("T")

MAX_ROWS = 256
"""Of one request of a task other than the recommender, whose own limit is its catalogue's."""
MAX_VALUES = 1 << 22
"""Of one input of one request."""
_WARM_ROWS = (1, 8, 32)
_WARM_LENGTH = 16
_WARM_S = 1.0
"""No more warming after this: a heavy graph learns its larger batches' time as it serves."""


@dataclass(frozen=True)
class Service:
    """One loaded package. Call :meth:`infer` and :meth:`recommend` on one event loop.

    ``catalogue``: a session recommender's, None for other tasks. ``cache``: where answers are kept, by keys that begin
    with the package's ``identity``.
    """

    manifest: Manifest
    engine: Engine
    shape: BatchShape
    cost: CostModel
    batcher: Batcher
    catalogue: Catalogue | None
    verification_s: float
    load_s: float
    cache: AnswerCache | None = None
    identity: Identity | None = None

    def limited(self, limits: Limits) -> Service:
        """The same loaded graph behind a batcher of its own."""
        return dataclasses.replace(self, batcher=Batcher(self.engine, self.shape, limits, cost=self.cost))

    def admit(self, priority: Priority = Priority.SHOPPER, *, within_s: float = math.inf) -> None:
        """As :meth:`Batcher.admit`: ask before a body is read.

        With a cache nothing is known before that: the answer may be a kept one, which no queue is needed for.
        """
        if self.cache is None:
            self.batcher.admit(priority, within_s=within_s)

    @property
    def crowded(self) -> bool:
        """Whether :meth:`admit` may refuse; cheap."""
        return self.cache is None and self.batcher.crowded

    def check(self, inputs: Tensors) -> None:
        """Refuse tensors that keep to the manifest and that the graph was not made for.

        Raises:
            InputError: names the input.
        """
        if self.catalogue is not None:
            self.catalogue.check_indices(inputs, self.manifest.inputs[0].name)
            return
        for spec in self.manifest.inputs:
            values = inputs[spec.name]
            where = f"inputs.{spec.name}"
            if values.size > MAX_VALUES or (values.ndim and len(values) > MAX_ROWS and self.shape.joinable):
                raise InputError(f"{spec.name} has shape {list(values.shape)}", where=f"{where}.shape",
                                 next_step=f"send at most {MAX_ROWS} rows and {MAX_VALUES} values")  # fmt: skip
            if values.size == 0:
                raise InputError(f"{spec.name} is empty", where=f"{where}.shape", next_step="send at least one value")
            if spec.longest is not None and any(
                wanted == -1 and size > spec.longest
                for wanted, size in zip(spec.shape[1:], values.shape[1:], strict=True)
            ):
                raise InputError(f"{spec.name} has shape {list(values.shape)}", where=f"{where}.shape",
                                 next_step=f"send at most {spec.longest} a row")  # fmt: skip
            if (spec.minimum is not None and values.min() < spec.minimum) or (
                spec.maximum is not None and values.max() > spec.maximum
            ):
                raise InputError(f"{spec.name} holds a value outside {spec.minimum} to {spec.maximum}",
                                 where=f"{where}.data", next_step="keep to the model's own range")  # fmt: skip
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise InputError(f"{spec.name} holds a value that is no finite number", where=f"{where}.data")

    async def infer(self, inputs: Tensors, *, within_s: float = math.inf,
                    priority: Priority = Priority.SHOPPER) -> dict[str, NDArray[Any]]:  # fmt: skip
        """All outputs by name; see :meth:`Batcher.infer`. Shared with other callers: do not write to them."""

        async def run() -> dict[str, NDArray[Any]]:
            return await self.batcher.infer(inputs, within_s=within_s, priority=priority)

        if self.cache is None or self.identity is None or (key := self.identity.of_inputs(inputs)) is None:
            return await run()
        return await self._kept(self.cache, key, run, outputs_codec, within_s)

    async def recommend(self, request: RecommendRequest, *, within_s: float = math.inf,
                        priority: Priority = Priority.SHOPPER) -> Recommendation:  # fmt: skip
        """The graph's answer, or the documented fallback.

        Raises:
            InputError: the package is no recommender, or does not know what the request's filters need.
        """
        catalogue = self.catalogue
        if catalogue is None:
            raise InputError(f"{self.manifest.name} is a {self.manifest.task}, not a recommender", where="model")
        asked = catalogue.ask(request)
        if not asked.known:
            return _steps(catalogue, asked, None)
        tensor = history_tensor(asked.known, self.manifest)
        name = self.manifest.inputs[0].name

        async def run() -> Recommendation:
            outputs = await self.batcher.infer({name: tensor}, within_s=within_s, priority=priority)
            return _steps(catalogue, asked, outputs)

        if self.cache is None or self.identity is None or request.explain:
            return await run()
        return await self._kept(self.cache, self.identity.of_recommendation(asked), run, recommendation_codec, within_s)

    @staticmethod
    async def _kept(cache: AnswerCache, key: bytes, run: Callable[[], Awaitable[T]], codec: Codec[T],
                    within_s: float) -> T:  # fmt: skip
        try:
            return await cache.answer(key, run, codec, within_s=within_s)
        except TimeoutError:
            raise GraphTimeoutError(f"no answer from the graph within {within_s:g} s", where="graph",
                                    next_step="try again") from None  # fmt: skip

    def close(self) -> None:
        """Let go of the batcher's threads."""
        self.batcher.close()


def _steps(catalogue: Catalogue, asked: Asked, outputs: Tensors | None) -> Recommendation:
    """What the recommender's steps make of the graph's outputs; None: it was not asked."""
    trace = CURRENT.get()
    begun_s = 0.0 if trace is None else time.perf_counter()
    if outputs is None:
        found = catalogue.recommend(asked)
    else:
        found = catalogue.recommend(asked, outputs["items"][0], outputs["scores"][0])
    if trace is not None:
        trace.add("steps", begun_s, time.perf_counter(), fallback=found.fallback or "none")
    return found


def load_service(folder: Path, public_key: Path, *, variant: str = "float32", limits: Limits | None = None,
                 threads: int | None = None, provider: str = "auto", stock: Path | None = None,
                 cache: AnswerCache | None = None, version: str = "", secret: bytes = b"",
                 sha256: str | None = None) -> Service:  # fmt: skip
    """Verify, load and warm a package; blocks.

    Args:
        limits: default: as many lanes as the cores given have room for.
        threads: of one run; None: the cores given, shared out over the workers.
        stock: what is in stock, of a recommender; None: the package says it, if anything does.
        sha256: of the manifest of the package that is meant (see :func:`serving.server.engine.verify`).
        cache: where answers are kept; ``version``, the model version's label, and ``secret`` go into their keys.

    Raises:
        PackageError: it must not or cannot be served.
        InputError: the stock file cannot be used.
    """
    package = verify(folder, public_key, sha256=sha256)
    manifest = package.manifest
    _check_schema(manifest, folder)
    begun_s = time.monotonic()
    given = cores()
    limits = limits or Limits(workers=2, lanes=min(2, given))
    catalogue = read_catalogue(package) if manifest.task is Task.SESSION_RECOMMENDER else None
    if stock is not None:
        if catalogue is None:
            raise InputError(f"a {manifest.task} has no stock", where=stock, next_step="leave --stock out")
        catalogue.watch_stock(stock)
    engine = load_engine(
        package, variant=variant, threads=threads or max(1, given // limits.workers), provider=provider
    )
    shape = BatchShape(manifest)
    cost = _warm(engine, manifest, shape, folder)
    digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()  # it holds the digests of all files
    identity = Identity(version=version, package=digest, variant=variant, secret=secret)
    return Service(manifest, engine, shape, cost, Batcher(engine, shape, limits, cost=cost), catalogue,
                   package.seconds, time.monotonic() - begun_s, cache, identity)  # fmt: skip


def _warm(engine: Engine, manifest: Manifest, shape: BatchShape, where: Path) -> CostModel:
    """Run the shortest and the longest input once, then learn what batches take."""
    recommender = manifest.task is Task.SESSION_RECOMMENDER
    longest = manifest.max_history if recommender else _WARM_LENGTH
    for length in (1, longest):
        warm_up(engine, _sample(manifest, 1, length), where)
    cost = CostModel()
    begun_s = time.monotonic()
    for rows in _WARM_ROWS if shape.joinable else (1,):
        for length in dict.fromkeys((1, min(8, longest), longest)):
            if time.monotonic() - begun_s > _WARM_S:
                return cost
            inputs = _sample(manifest, rows, length)
            extent = shape.measure(inputs)
            warm_up(engine, inputs, where)
            clock = time.thread_time if engine.on_cpu else time.perf_counter
            run_s = clock()
            warm_up(engine, inputs, where)
            cost.learn(extent.rows * extent.length, clock() - run_s)
    return cost


def _sample(manifest: Manifest, rows: int, length: int) -> dict[str, NDArray[Any]]:
    """Ones in every input, a valid token, item and mask, where its range allows."""

    def sized(spec: TensorSpec) -> tuple[int, ...]:
        length_of = length if spec.longest is None else min(length, spec.longest)
        return tuple(size if size > 0 else rows if axis == 0 else length_of for axis, size in enumerate(spec.shape))

    return {
        spec.name: np.full(sized(spec), b"", object) if spec.datatype == "BYTES"
        else np.full(sized(spec), _within(1, spec), DTYPES[spec.datatype])
        for spec in manifest.inputs
    }  # fmt: skip


def _within(value: int, spec: TensorSpec) -> int:
    value = value if spec.maximum is None else min(value, spec.maximum)
    return value if spec.minimum is None else max(value, spec.minimum)


_FLOATS = ("FP16", "FP32", "FP64")


def _recommender(inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]) -> bool:
    wanted = {"history": ("INT64", 2), "items": ("INT64", 2), "scores": ("FP32", 2)}
    found = {name: (spec.datatype, len(spec.shape)) for name, spec in {**inputs, **outputs}.items()}
    return len(inputs) == 1 and all(found.get(name) == form for name, form in wanted.items())


def _gives(*names: str) -> Callable[[dict[str, TensorSpec], dict[str, TensorSpec]], bool]:
    """One of ``names`` is a float [rows, any] output."""

    def holds(inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]) -> bool:
        return bool(inputs) and any(
            name in outputs and outputs[name].datatype in _FLOATS and len(outputs[name].shape) == 2 for name in names
        )

    return holds


_SCHEMAS: dict[Task, tuple[Callable[[dict[str, TensorSpec], dict[str, TensorSpec]], bool], str]] = {
    Task.SESSION_RECOMMENDER: (_recommender, "not the tensors of a session recommender (history; items, scores)"),
    Task.RANKER: (_gives("scores"), "not the tensors of a ranker (scores, float [rows, candidates])"),
    Task.ENCODER: (_gives("embedding"), "not the tensors of an encoder (embedding, float [rows, size])"),
    Task.CLASSIFIER: (_gives("logits", "probabilities"),
                      "not the tensors of a classifier (logits or probabilities, float [rows, classes])"),
    Task.GENERATOR: (lambda inputs, outputs: bool(inputs and outputs), "a generator without tensors"),
}  # fmt: skip


def _check_schema(manifest: Manifest, folder: Path) -> None:
    """What a task's graph takes and gives; see the package contract.

    Raises:
        PackageError: the manifest's tensors are not its task's.
    """
    holds, problem = _SCHEMAS[manifest.task]
    if not holds({spec.name: spec for spec in manifest.inputs}, {spec.name: spec for spec in manifest.outputs}):
        raise PackageError(problem, where=folder)
