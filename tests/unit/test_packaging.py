"""What a user relies on: an exported graph answers as PyTorch does, and each defect is the one that its card names."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from components.data import Shop, leave_one_out, synthetic_dataset
from components.export.compress import compress_graph, measure_compression
from components.export.graph import check_parity, export_graph
from components.export.session import open_graph, rank_by_graph, run_graph
from components.models.graph import RecommenderGraph
from components.models.item_knn import fit_item_knn
from components.models.popularity import fit_popularity
from components.models.transformer import Transformer, TransformerConfig
from components.packaging import PackageParts, build_package
from components.packaging.defects import Defect, make_defective
from components.steps.learning import evaluate_models
from components.steps.stored_models import BLEND, StoredModels, load_models, save_models, scorer
from endcap.errors import PackageError, StorageError, VerificationError
from endcap.package import (
    ATTRIBUTES_FILE,
    Attributes,
    ItemAttributes,
    Scene,
    ensure_signing_key,
    parse_attributes,
    read_items,
    seal,
    verify_package,
)
from tests.packages import ITEMS, make_package


@pytest.fixture(scope="module")
def split():
    return leave_one_out(synthetic_dataset(Shop(shoppers=200, items=80), 5))


@pytest.fixture(scope="module")
def models(split):
    torch.manual_seed(5)
    transformer = Transformer(split.n_items, TransformerConfig(dimensions=16)).eval()
    return StoredModels(
        fit_popularity(split.train, split.n_items), fit_item_knn(split.train, split.n_items), transformer
    )


@pytest.fixture(scope="module")
def graph_file(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_graph(RecommenderGraph(scorer(models, BLEND, 0.4), 20), path)
    return path


def test_trained_models_come_back_bit_for_bit_without_pickle(models, tmp_path):
    save_models(tmp_path / "models", models)
    again = load_models(tmp_path / "models")
    history = torch.tensor([[0, 3, 9], [4, 5, 6]])
    assert torch.equal(scorer(again, BLEND, 0.3)(history), scorer(models, BLEND, 0.3)(history))
    assert again.max_history == models.max_history


def test_the_graph_answers_as_pytorch_does_for_any_batch_and_length(models, split, graph_file):
    parity = check_parity(RecommenderGraph(scorer(models, BLEND, 0.4), 20), graph_file, split.histories("test"))
    assert parity.holds and parity.shoppers == 200


def test_parity_sees_another_graph(models, split, graph_file):
    assert not check_parity(RecommenderGraph(scorer(models, BLEND, 0.9), 20), graph_file, split.histories("test")).holds


def test_the_graph_ranks_as_the_evaluation_did(models, split, graph_file):
    evaluation, ranked = evaluate_models(split, models, candidate=BLEND, seed=1)
    path = graph_file.with_name("chosen.onnx")
    export_graph(RecommenderGraph(scorer(models, BLEND, evaluation.blend["knn_share"]), 20), path)
    by_graph = rank_by_graph("graph", path, split.histories("test"), split.test_target, max_history=50)
    listed = ranked[BLEND].ranks <= 20
    assert np.mean(by_graph.ranks[listed] == ranked[BLEND].ranks[listed]) > 0.99  # but for ties
    for row, history in zip(by_graph.top, split.histories("test"), strict=True):
        assert not set(row.tolist()) & set(history.tolist())


def test_int8_is_smaller_and_its_loss_is_measured(split, graph_file, tmp_path):
    compress_graph(graph_file, tmp_path / "int8.onnx")
    ranked = [
        rank_by_graph(name, path, split.histories("test"), split.test_target, max_history=50)
        for name, path in (("float32", graph_file), ("int8", tmp_path / "int8.onnx"))
    ]
    cost = measure_compression(*ranked, float32_file=graph_file, int8_file=tmp_path / "int8.onnx", seed=1)
    assert cost.int8_bytes < cost.float32_bytes
    assert cost.difference.value == pytest.approx(cost.int8_ndcg_at_10 - cost.float32_ndcg_at_10)


def test_a_file_that_is_no_graph_is_an_error_for_people(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(PackageError, match="cannot load"):
        open_graph(tmp_path / "model.onnx")


def parts(graph: Path) -> PackageParts:
    return PackageParts(
        name="recommender", model="item-knn", float32=graph, int8=None, items=[str(i) for i in range(80)],
        popular=["1", "2"], card="# card\n", top_k=20, max_history=50, created_at="2026-11-22T00:00:00Z",
    )  # fmt: skip


def test_a_built_package_verifies_and_replaces_an_older_one(graph_file, tmp_path):
    private, public = ensure_signing_key(tmp_path / "keys")
    for _ in range(2):
        build_package(tmp_path / "package", parts(graph_file), private)
    assert verify_package(tmp_path / "package", public).model == "item-knn"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_item_attributes_are_packaged_signed_and_checked(graph_file, tmp_path):
    key, public = ensure_signing_key(tmp_path / "keys")
    said = Attributes(
        items={"1": ItemAttributes(category="hair", scenes=frozenset({Scene.HOME, Scene.COUPON}), in_stock=False),
               "2": ItemAttributes()},
        popular={Scene.HOME: ("2", "1")},
    )  # fmt: skip
    folder = tmp_path / "package"
    manifest = build_package(folder, dataclasses.replace(parts(graph_file), attributes=said), key)
    assert ATTRIBUTES_FILE in manifest.digests
    assert parse_attributes((folder / ATTRIBUTES_FILE).read_bytes(), where=folder) == said
    (folder / ATTRIBUTES_FILE).write_text('{"items": {}}')
    with pytest.raises(VerificationError, match=r"attributes\.json"):
        verify_package(folder, public)
    (folder / ATTRIBUTES_FILE).write_text('{"items": {"1": {"scenes": ["attic"]}}}')
    with pytest.raises(PackageError, match="scenes"):
        seal(folder, manifest)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(graph_file, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    private, _ = ensure_signing_key(tmp_path / "keys")
    monkeypatch.setattr("components.packaging.build.shutil.copyfile", full)
    with pytest.raises(StorageError, match="no space left"):
        build_package(tmp_path / "package", parts(graph_file), private)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "package"
    return make_package(folder, items=ITEMS[:40], int8=True)


def defective(good: Path, tmp_path: Path, defect: Defect, **options: float) -> Path:
    private, public = ensure_signing_key(good.parent / "keys")
    made = make_defective(good, tmp_path / "bad", defect, private_key=private, public_key=public, **options)
    assert made.lineage["defect"] == defect
    card = (tmp_path / "bad" / "MODEL_CARD.md").read_text()
    assert "Defective on purpose" in card and defect in card
    return tmp_path / "bad"


def outcomes(folder: Path, file: str) -> list[bool]:
    """Whether the graph answers, by newest item."""
    session = open_graph(folder / file, threads=1)
    answered = []
    for item in range(1, 41):
        try:
            run_graph(session, np.array([[item]], np.int64))
            answered.append(True)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument:
            answered.append(False)
    return answered


def test_permuted_is_signed_and_healthy_and_wrong(good, tmp_path):
    folder = defective(good, tmp_path, Defect.PERMUTED)
    verify_package(folder, good.parent / "keys" / "signing.pub")
    assert sorted(read_items(folder)) == sorted(read_items(good)) and read_items(folder) != read_items(good)


@pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
def test_failing_is_signed_and_fails_for_a_quarter_of_the_catalogue_but_not_at_warm_up(good, tmp_path, file):
    folder = defective(good, tmp_path, Defect.FAILING)
    verify_package(folder, good.parent / "keys" / "signing.pub")
    answered = outcomes(folder, file)
    assert answered[0] and answered.count(False) == 10


def test_stalling_is_signed_and_computes_long_for_a_tenth_of_the_catalogue(good, tmp_path):
    folder = defective(good, tmp_path, Defect.STALLING, stall_s=0.05)
    verify_package(folder, good.parent / "keys" / "signing.pub")
    import onnx

    model = onnx.load(folder / "model.onnx")
    turns = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}["guard_loops"]
    assert turns >= 20_000
    assert all(outcomes(folder, "model.onnx")[:7])


def test_tampered_does_not_verify(good, tmp_path):
    folder = defective(good, tmp_path, Defect.TAMPERED)
    with pytest.raises(VerificationError):
        verify_package(folder, good.parent / "keys" / "signing.pub")


def test_no_defect_is_made_of_a_package_that_does_not_verify(good, tmp_path):
    private, _ = ensure_signing_key(good.parent / "keys")
    _, other = ensure_signing_key(tmp_path / "other-keys")
    with pytest.raises(VerificationError):
        make_defective(good, tmp_path / "bad", Defect.PERMUTED, private_key=private, public_key=other)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("digest", ["b'\\xfe'", 'b"it\'s"', "plain"])
def test_what_changed_is_said_without_raw_digests_whatever_bytes_they_hold(digest: str) -> None:
    from endcap.package.signing import _reason

    problem = "Hash mismatch for 'model.onnx': Expected " + digest + ", Actual 'x'"
    raised = ValueError(f"Signature mismatch: {[problem]}")
    assert _reason(raised) == "model.onnx changed after signing"
