"""The batcher: what goes together, what is never started, and that one bad request harms no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from endcap.errors import InputError
from endcap.package import Manifest, Task, TensorSpec, Variant
from serving.server.batching import INLINE_S, Batcher, Limits, OverloadedError, Priority
from serving.server.engine import GraphError, GraphTimeoutError, Ticket
from serving.server.overload import CostModel
from serving.server.shapes import BatchShape

BAD = 99


def manifest(
    *, outputs: tuple[TensorSpec, ...] | None = None, inputs: tuple[TensorSpec, ...] | None = None
) -> Manifest:
    return Manifest(
        name="m", task=Task.ENCODER, model="m",
        inputs=inputs or (TensorSpec(name="x", datatype="INT64", shape=(-1, -1), padding="right"),),
        outputs=outputs or (TensorSpec(name="embedding", datatype="FP32", shape=(-1, 1)),),
        variants={"float32": Variant(file="model.onnx")}, created_at="2026-11-22T00:00:00Z",
    )  # fmt: skip


class FakeEngine:
    """Sums rows. Remembers the shapes it ran; runs wait while ``gate`` is closed, for as long as no one ends them."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()
        self.stalls_on = -1
        self.on_cpu = False

    def ticket(self) -> Ticket:
        class Options:
            terminate = False
            log_severity_level = 4

        return Ticket(Options())

    def run(self, inputs: Any, ticket: Ticket) -> dict[str, NDArray[Any]]:
        values = inputs["x"]
        self.shapes.append(values.shape)
        self.threads.add(threading.current_thread().name)
        stalls = (values == self.stalls_on).any()
        while stalls or not self.gate.wait(0.001):
            if ticket.revoked:
                raise GraphTimeoutError("ended")
        if (values == BAD).any():
            raise GraphError("the graph failed (Bad)")
        return {"embedding": values.sum(axis=1, keepdims=True).astype(np.float32)}


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.gate.set()


def batcher_of(engine: FakeEngine, *, cost_s: float = 1.0, **limits: Any) -> Batcher:
    """``cost_s``: what every run is expected to take: above ``INLINE_S`` it goes on a thread."""
    cost = CostModel()
    cost.learn(1, cost_s)
    cost.learn(1 << 20, cost_s)
    for tokens in (1 << power for power in range(20)):
        cost.learn(tokens, cost_s)
    return Batcher(engine, BatchShape(manifest()), Limits(**limits), cost=cost)  # type: ignore[arg-type]


def rows(*values: list[int]) -> dict[str, NDArray[Any]]:
    return {"x": np.array(values, np.int64)}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_the_first_runs_at_once_and_what_comes_meanwhile_goes_together(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine)
        engine.gate.clear()
        first = asyncio.create_task(batcher.infer(rows([1])))
        await until(lambda: engine.shapes == [(1, 1)])
        others = [asyncio.create_task(batcher.infer(rows([number] * length))) for number, length in ((2, 3), (3, 1))]
        await asyncio.sleep(0)
        engine.gate.set()
        assert [(await one)["embedding"].tolist() for one in (first, *others)] == [[[1.0]], [[6.0]], [[3.0]]]
        assert engine.shapes == [(1, 1), (2, 3)]
        assert batcher.waiting == 0
        batcher.close()

    run(work())


def test_a_small_graph_runs_on_the_loop_with_all_that_came_in_one_turn(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, cost_s=INLINE_S / 4)
        answers = await asyncio.gather(*(batcher.infer(rows([number])) for number in range(5)))
        assert [answer["embedding"].item() for answer in answers] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert engine.shapes == [(5, 1)]
        assert engine.threads == {threading.main_thread().name}
        batcher.close()

    run(work())


@pytest.mark.parametrize("cost_s", [INLINE_S / 4, 1.0])
def test_one_bad_request_of_a_batch_fails_alone(engine: FakeEngine, cost_s: float) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, cost_s=cost_s)
        found = await asyncio.gather(*(batcher.infer(rows([number])) for number in (1, BAD, 3)), return_exceptions=True)
        assert isinstance(found[1], GraphError)
        assert [found[0]["embedding"].item(), found[2]["embedding"].item()] == [1.0, 3.0]  # type: ignore[index]
        batcher.close()

    run(work())


@pytest.mark.parametrize("cost_s", [INLINE_S / 4, 1e-3 + INLINE_S])
def test_one_that_stalls_holds_neither_the_loop_nor_the_others_of_its_batch(engine: FakeEngine, cost_s: float) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, cost_s=cost_s, workers=2, timeout_s=60.0)
        engine.stalls_on = 7
        stalled = asyncio.create_task(batcher.infer(rows([7]), within_s=50.0))
        other = asyncio.create_task(batcher.infer(rows([1])))
        assert (await other)["embedding"].item() == 1.0
        assert not stalled.done()
        assert (await batcher.infer(rows([2])))["embedding"].item() == 2.0
        stalled.cancel()
        await until(lambda: batcher.waiting == 0)
        batcher.close()

    run(work())


def test_a_second_lane_gathers_for_a_moment_while_the_first_works(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, lanes=2, workers=2, max_wait_s=0.2)
        engine.gate.clear()
        tasks = [asyncio.create_task(batcher.infer(rows([1])))]
        await until(lambda: len(engine.shapes) == 1)
        for number in (2, 3):  # not in one turn of the loop
            tasks.append(asyncio.create_task(batcher.infer(rows([number]))))
            await asyncio.sleep(0.001)
        await until(lambda: len(engine.shapes) == 2)
        assert engine.shapes == [(1, 1), (2, 1)]
        engine.gate.set()
        await asyncio.gather(*tasks)
        batcher.close()

    run(work())


def test_late_work_is_not_started(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, cost_s=2 * INLINE_S, max_rows=1, timeout_s=60.0)
        engine.gate.clear()
        first = asyncio.create_task(batcher.infer(rows([1])))
        await asyncio.sleep(0)  # it has asked, and its run has not begun
        with pytest.raises(GraphTimeoutError, match="no answer from the graph"):
            await batcher.infer(rows([2]), within_s=0.1)
        engine.gate.set()
        await first
        await batcher.infer(rows([3]))
        assert engine.shapes == [(1, 1), (1, 1)]
        batcher.close()

    run(work())


def test_whoever_would_be_answered_too_late_is_turned_away_by_the_head_alone(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, timeout_s=600.0)
        batcher.admit(within_s=0.001)  # nothing runs: it is tried
        engine.gate.clear()
        running = asyncio.create_task(batcher.infer(rows([1])))
        await until(lambda: len(engine.shapes) == 1)
        assert batcher.crowded
        batcher.admit(within_s=500.0)
        with pytest.raises(OverloadedError, match="would take about"):
            batcher.admit(within_s=0.1)
        with pytest.raises(OverloadedError):
            await batcher.infer(rows([2]), within_s=0.1)
        engine.gate.set()
        await running
        assert not batcher.crowded
        batcher.close()

    run(work())


def test_a_run_that_nobody_waits_for_is_ended(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, workers=1)
        engine.gate.clear()
        with pytest.raises(GraphTimeoutError):
            await batcher.infer(rows([1]), within_s=0.02)
        again = asyncio.create_task(batcher.infer(rows([2])))
        await until(lambda: len(engine.shapes) == 2)  # the only worker is free again
        engine.gate.set()
        await again
        batcher.close()

    run(work())


def test_shoppers_go_before_batch_jobs_which_are_turned_away_first(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, max_rows=1, max_waiting=4, timeout_s=60.0)
        engine.gate.clear()
        running = asyncio.create_task(batcher.infer(rows([0])))
        await until(lambda: len(engine.shapes) == 1)
        order: list[str] = []

        async def ask(name: str, priority: Priority) -> None:
            await batcher.infer(rows([1]), priority=priority)
            order.append(name)

        tasks = [asyncio.create_task(ask("batch", Priority.BATCH))]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(ask(name, Priority.SHOPPER)) for name in ("first", "second")]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refused:
            batcher.admit(Priority.BATCH)
        assert refused.value.priority is Priority.BATCH
        assert 1 <= refused.value.retry_after_s <= 30
        with pytest.raises(OverloadedError):
            await batcher.infer(rows([5]))
        engine.gate.set()
        await asyncio.gather(running, *tasks)
        assert order == ["first", "second", "batch"]
        batcher.close()

    run(work())


def test_rows_and_tokens_bound_a_batch_and_padding_may_not_be_most_of_it(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_of(engine, max_rows=4, max_tokens=2000, timeout_s=600.0)
        engine.gate.clear()
        tasks = [asyncio.create_task(batcher.infer(rows([0])))]
        await until(lambda: len(engine.shapes) == 1)
        for length in (1000, 1, 1000, 1, 1, 1000, 1, 1):
            tasks.append(asyncio.create_task(batcher.infer(rows([1] * length))))  # noqa: PERF401 - in order
        await asyncio.sleep(0)
        engine.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [answer["embedding"].item() for answer in answers[1:]] == [1000, 1, 1000, 1, 1, 1000, 1, 1]
        assert engine.shapes[1:] == [(2, 1000), (4, 1), (1, 1000), (1, 1)]
        batcher.close()

    run(work())


def test_a_batcher_goes_on_when_its_loop_is_another(engine: FakeEngine) -> None:
    batcher = batcher_of(engine)
    for number in (1, 2):
        assert asyncio.run(batcher.infer(rows([number])))["embedding"].item() == number
    batcher.close()


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_joined_and_split_again_every_request_has_its_own(sizes: list[tuple[int, int]], side: Any) -> None:
    shape = BatchShape(
        manifest(
            inputs=(
                TensorSpec(name="ids", datatype="INT64", shape=(-1, -1), axes=("rows", "length"), padding=side),
                TensorSpec(name="query", datatype="FP32", shape=(-1, 2)),
            ),
            outputs=(
                TensorSpec(name="scores", datatype="FP32", shape=(-1, -1), axes=("rows", "length")),
                TensorSpec(name="embedding", datatype="FP32", shape=(-1, 1)),
            ),
        )
    )
    requests = [
        {"ids": np.full((rows, length), place + 1), "query": np.full((rows, 2), place, np.float32)}
        for place, (rows, length) in enumerate(sizes)
    ]
    extents = [shape.measure(request) for request in requests]
    assert len({extent.key for extent in extents}) == 1
    batch = shape.join(requests)
    longest = max(length for _, length in sizes)
    assert batch["ids"].shape == (sum(rows for rows, _ in sizes), longest)
    parts = shape.split({"scores": batch["ids"], "embedding": batch["query"][:, :1]}, extents)
    for request, part in zip(requests, parts, strict=True):
        assert np.array_equal(part["scores"], request["ids"])
        assert np.array_equal(part["embedding"], request["query"][:, :1])


def test_what_cannot_be_cut_back_is_not_padded() -> None:
    shape = BatchShape(manifest(outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, -1)),)))
    short, long = shape.measure(rows([1])), shape.measure(rows([1, 2]))
    assert short.key != long.key


def test_rows_that_differ_between_inputs_are_refused_by_name() -> None:
    inputs = tuple(
        TensorSpec(name=name, datatype="INT64", shape=(-1, -1), axes=("rows", "length")) for name in ("ids", "mask")
    )
    shape = BatchShape(manifest(inputs=inputs))
    with pytest.raises(InputError, match="mask has 2 rows, others have 1"):
        shape.measure({"ids": np.ones((1, 2)), "mask": np.ones((2, 2))})
    with pytest.raises(InputError, match=r"axis 1 \(length\) of mask has size 3, not 2"):
        shape.measure({"ids": np.ones((1, 2)), "mask": np.ones((1, 3))})


def test_what_runs_take_is_learned_by_size_and_one_stall_changes_little() -> None:
    cost = CostModel()
    assert cost.expect_s(10) == float("inf")
    cost.learn(10, 0.001)
    assert cost.expect_s(9) == 0.001
    assert cost.expect_s(100) == pytest.approx(0.008)
    cost.learn(10, 60.0)
    assert cost.expect_s(10) < 0.002
    for _ in range(50):
        cost.learn(10, 1.0)
    assert cost.expect_s(10) > 0.5
