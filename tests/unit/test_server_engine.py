"""What is loaded is what was signed, and a run can be ended."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from endcap.errors import InputError, PackageError, VerificationError
from endcap.files import sha256_file
from endcap.package import read_manifest, seal, sign_package
from serving.server.engine import GraphError, GraphTimeoutError, cores, load_engine, verify
from serving.server.service import load_service
from tests.packages import ITEMS, make_package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(
        tmp_path_factory.mktemp("packages") / "good", int8=True, fails_on=[ITEMS[10]], stalls_on=[ITEMS[20]],
        stall_loops=200_000_000,
    )  # fmt: skip


def public_key(package: Path) -> Path:
    return package.parent / "keys" / "signing.pub"


def reseal(package: Path, **change: object) -> None:
    """Change the manifest and sign again, as its maker could."""
    seal(package, read_manifest(package).model_copy(update=change))
    sign_package(package, package.parent / "keys" / "signing.key")


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_a_verified_package_answers(package: Path, variant: str) -> None:
    service = load_service(package, public_key(package), variant=variant)
    outputs = service.engine.run({"history": np.array([[0, 3, 4]])}, service.engine.ticket())
    assert outputs["items"][0, :3].tolist() == [5, 6, 7]
    assert outputs["scores"].dtype == np.float32


@pytest.mark.parametrize("name", ["model.onnx", "items.json", "popular.json", "package.json", "model.sig"])
def test_one_changed_byte_is_refused_before_onnxruntime_sees_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path / "package")
    raw = bytearray((package / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (package / name).write_bytes(raw)
    loaded: list[object] = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *arguments, **_: loaded.append(arguments))
    with pytest.raises(VerificationError):
        load_service(package, public_key(package))
    assert loaded == []


def test_a_file_that_changes_after_verification_is_not_used(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    verified = verify(package, public_key(package))
    (package / "model.onnx").write_bytes(b"another graph")
    with pytest.raises(VerificationError, match="changed after it was verified"):
        load_engine(verified)


def test_another_package_than_the_registered_one_is_refused_though_it_is_signed(tmp_path: Path) -> None:
    package, other = (make_package(tmp_path / name, model=name) for name in ("meant", "other"))
    meant = sha256_file(package / "package.json")
    assert verify(package, public_key(package), sha256=meant).manifest.model == "meant"
    with pytest.raises(VerificationError, match=f"another package than the one meant.*{meant[:12]}"):
        verify(other, public_key(other), sha256=meant)


def test_unsigned_and_wrongly_signed_packages_are_refused(tmp_path: Path) -> None:
    unsigned = make_package(tmp_path / "unsigned", sign=False)
    other = make_package(tmp_path / "other" / "package")
    with pytest.raises(VerificationError, match="not signed"):
        load_service(unsigned, public_key(other))
    mine = make_package(tmp_path / "mine" / "package")
    with pytest.raises(VerificationError, match="does not verify"):
        load_service(mine, public_key(other))


def test_a_signed_graph_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    (package / "model.onnx").write_bytes(b"not a graph")
    reseal(package)
    with pytest.raises(PackageError, match="onnxruntime cannot load"):
        load_service(package, public_key(package))


def test_a_manifest_that_does_not_fit_its_graph_is_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    manifest = read_manifest(package)
    items, scores = manifest.outputs
    reseal(package, outputs=(items.model_copy(update={"shape": (-1, 7)}), scores))
    with pytest.raises(PackageError, match="shape"):
        load_service(package, public_key(package))
    reseal(package, outputs=(items,))
    with pytest.raises(PackageError, match="session recommender"):
        load_service(package, public_key(package))


def test_a_variant_that_is_not_there_is_named(package: Path) -> None:
    with pytest.raises(InputError, match="no variant fp4"):
        load_service(package, public_key(package), variant="fp4")


def test_a_run_that_fails_says_so_and_the_next_is_fine(package: Path) -> None:
    engine = load_service(package, public_key(package)).engine
    with pytest.raises(GraphError, match="the graph failed"):
        engine.run({"history": np.array([[11]])}, engine.ticket())
    assert engine.run({"history": np.array([[1]])}, engine.ticket())["items"][0, 0] == 2


def test_a_run_that_takes_too_long_is_ended(package: Path) -> None:
    engine = load_service(package, public_key(package)).engine
    ticket = engine.ticket()
    timer = threading.Timer(0.05, ticket.revoke)
    timer.start()
    with pytest.raises(GraphTimeoutError):
        engine.run({"history": np.array([[21]])}, ticket)
    timer.join()
    with pytest.raises(GraphTimeoutError, match="did not get to run"):
        engine.run({"history": np.array([[1]])}, ticket)


def test_the_gpu_is_used_only_where_onnxruntime_offers_one(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="offers no CUDA"):
        load_service(package, public_key(package), provider="cuda")
    assert load_service(package, public_key(package), provider="auto").engine.on_cpu
    asked: list[list[str]] = []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)

    def remember(graph: bytes, options: object, *, providers: list[str]) -> object:
        asked.append(providers)
        return session(graph, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", remember)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(InputError, match="cannot use CUDA here"):
        load_service(package, public_key(package), provider="cuda")
    for provider in ("auto", "cpu"):
        assert load_service(package, public_key(package), provider=provider).engine.on_cpu
    assert asked == [["CUDAExecutionProvider", "CPUExecutionProvider"]] * 2 + [["CPUExecutionProvider"]]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu.max": "150000 100000"}, 2), ({"cpu.max": "max 100000"}, 8), ({}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_the_cores_given_are_the_affinitys_and_the_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], found: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert cores(tmp_path) == found
