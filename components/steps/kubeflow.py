"""Kubeflow components: nothing but the passing of paths and parameters to the plain functions of this folder.

Kubeflow ships a component's source text, not its module, so each imports what it needs itself; that also keeps the
start of steps without PyTorch short. The annotations must be real types here (no ``from __future__``).
"""

# mypy: disable-error-code="untyped-decorator, import-untyped"

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

__all__ = [
    "compare_champion", "compress_graph", "evaluate_candidates", "export_graph", "ingest_data", "package_candidate",
    "register_candidate", "split_data", "train_candidates",
]  # fmt: skip

IMAGE = "python:3.11"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest_data(
    file: str, sha256: str, dataset: str, shoppers: int, items: int, seed: int,
    data: Output[Dataset], facts: Output[Artifact],
) -> None:  # fmt: skip
    """Get the data, validate it, count what was left out."""
    from pathlib import Path

    from components.steps.progress import step

    with step("ingest") as progress:
        from components.data import Shop, Source, obtain, save_dataset
        from endcap.files import write_json

        shop = Shop(shoppers=shoppers or Shop.shoppers, items=items or Shop.items)
        source = Source(file=Path(file) if file else None, sha256=sha256 or None, name=dataset, shop=shop, seed=seed)
        obtained = obtain(source)
        save_dataset(Path(data.path), obtained.dataset)
        write_json(Path(facts.path), {**obtained.dataset.describe(), "origin": obtained.origin})
        progress.produced("data.json", facts.path)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def split_data(data: Input[Dataset], split: Output[Dataset], shoppers: Output[Dataset]) -> None:
    """Leave one out, and write down the shoppers whom the load test replays."""
    from pathlib import Path

    from components.steps.progress import step

    with step("split") as progress:
        from components.data import leave_one_out, load_dataset, save_split, write_shoppers

        dataset = load_dataset(Path(data.path))
        save_split(Path(split.path), leave_one_out(dataset))
        write_shoppers(Path(shoppers.path), dataset)
        progress.produced("shoppers.jsonl", shoppers.path)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_candidates(
    split: Input[Dataset], candidate: str, seed: int, epochs: int, training_seconds: float, checkpoint: str,
    models: Output[Model], training: Output[Artifact],
) -> None:  # fmt: skip
    """Fit bestsellers, item-kNN and the transformer."""
    from pathlib import Path

    from components.steps.progress import step

    with step("train") as progress:
        from dataclasses import asdict

        from components.data import load_split
        from components.steps.learning import train_models, use_all_cores
        from components.steps.stored_models import save_models
        from endcap.files import write_json

        use_all_cores()
        made, summary = train_models(
            load_split(Path(split.path)), candidate=candidate, seed=seed, epochs=epochs or None,
            max_seconds=training_seconds or None, checkpoint=Path(checkpoint) if checkpoint else None,
            on_epoch=lambda record: progress.tell("epoch", **asdict(record)),
        )  # fmt: skip
        save_models(Path(models.path), made)
        write_json(Path(training.path), summary.to_json())
        progress.produced("training.json", training.path)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_candidates(
    split: Input[Dataset], models: Input[Model], candidate: str, seed: int,
    evaluation: Output[Artifact], ranks: Output[Artifact], metrics: Output[Metrics],
) -> None:  # fmt: skip
    """Judge all models on the test split; choose the blend and the candidate on validation."""
    from pathlib import Path

    from components.steps.progress import step

    with step("evaluate") as progress:
        from components.data import load_split
        from components.evaluation import write_evaluation
        from components.steps.learning import evaluate_models, use_all_cores
        from components.steps.stored_models import load_models
        from components.steps.stored_ranks import save_ranked

        use_all_cores()
        result, ranked = evaluate_models(load_split(Path(split.path)), load_models(Path(models.path)),
                                         candidate=candidate, seed=seed)  # fmt: skip
        write_evaluation(Path(evaluation.path), result)
        save_ranked(Path(ranks.path), ranked)
        for name in result.models:
            metrics.log_metric(f"{name} ndcg_at_10", result.value(name))
        progress.produced("evaluation.json", evaluation.path)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare_champion(
    data: Input[Dataset], split: Input[Dataset], evaluation: Input[Artifact], ranks: Input[Artifact],
    registry: str, name: str, keys: str, seed: int, comparison: Output[Artifact],
) -> str:  # fmt: skip
    """Ask the champion's package about the same shoppers; returns the gate's verdict, pass or fail."""
    from pathlib import Path

    from components.steps.progress import step

    with step("compare") as progress:
        from dataclasses import asdict

        from components.data import load_dataset, load_split
        from components.evaluation import read_evaluation
        from components.steps.champion import compare_with_champion
        from components.steps.stored_ranks import load_ranked
        from endcap.files import write_json
        from endcap.package import ensure_signing_key
        from endcap.registry import Registry

        candidate = read_evaluation(Path(evaluation.path)).candidate or ""
        decision = compare_with_champion(
            load_ranked(Path(ranks.path))[candidate], registry=Registry(registry), name=name,
            public_key=ensure_signing_key(Path(keys))[1], dataset=load_dataset(Path(data.path)),
            split=load_split(Path(split.path)), seed=seed,
        )  # fmt: skip
        write_json(Path(comparison.path), asdict(decision))
        progress.produced("gate.json", comparison.path)
        verdict = "pass" if decision.passed else "fail"
        progress.tell("gate", verdict=verdict, reason=decision.reason)
    return verdict


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export_graph(
    split: Input[Dataset], models: Input[Model], evaluation: Input[Artifact], seed: int,
    graph: Output[Model], parity: Output[Artifact],
) -> int:  # fmt: skip
    """Write the candidate as ONNX and prove that it answers as PyTorch does; returns the newest items it looks at."""
    from pathlib import Path

    from components.steps.progress import step

    with step("export"):
        from dataclasses import asdict

        from components.data import load_split
        from components.evaluation import read_evaluation
        from components.steps.learning import export_model
        from components.steps.stored_models import load_models
        from endcap.files import write_json

        judged = read_evaluation(Path(evaluation.path))
        trained = load_models(Path(models.path))
        found = export_model(trained, model=judged.candidate or "", knn_share=judged.blend.get("knn_share", 0.0),
                             path=Path(graph.path), histories=load_split(Path(split.path)).histories("test"),
                             seed=seed)  # fmt: skip
        write_json(Path(parity.path), asdict(found))
    return trained.max_history


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compress_graph(
    split: Input[Dataset], graph: Input[Model], max_history: int, seed: int,
    int8: Output[Model], compression: Output[Artifact],
) -> None:  # fmt: skip
    """Quantise the graph and measure what that costs."""
    from pathlib import Path

    from components.steps.progress import step

    with step("compress"):
        from components.data import load_split
        from components.steps.delivery import compress_model, compression_to_json
        from endcap.files import write_json

        found = compress_model(Path(graph.path), Path(int8.path), split=load_split(Path(split.path)),
                               max_history=max_history, seed=seed)  # fmt: skip
        write_json(Path(compression.path), compression_to_json(found))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def package_candidate(
    data: Input[Dataset], models: Input[Model], evaluation: Input[Artifact], graph: Input[Model],
    parity: Input[Artifact], int8: Input[Model], compression: Input[Artifact],
    max_history: int, name: str, keys: str, seed: int, git_commit: str, run: str,
    package: Output[Model], judged: Output[Artifact],
) -> None:  # fmt: skip
    """Build the package, seal it and sign it."""
    from pathlib import Path

    from components.steps.progress import step

    with step("package") as progress:
        from components.data import load_dataset
        from components.data.fetch import BEAUTY
        from components.evaluation import read_evaluation, write_evaluation
        from components.steps.delivery import package_model
        from endcap.files import read_json

        dataset = load_dataset(Path(data.path))
        licence = "none needed, generated" if dataset.synthetic else "as its owner says"
        licence = BEAUTY.licence if dataset.sha256 == BEAUTY.sha256 else licence
        _, whole = package_model(
            Path(package.path), name=name, graph=Path(graph.path), int8=Path(int8.path), models=Path(models.path),
            dataset=dataset, evaluation=read_evaluation(Path(evaluation.path)), parity=read_json(Path(parity.path)),
            compression=read_json(Path(compression.path)), max_history=max_history,
            lineage={
                "data": dataset.name, "data_sha256": dataset.sha256,
                "synthetic": str(dataset.synthetic).lower(), "seed": str(seed),
                "git_commit": git_commit, "pipeline_run": run,
            },
            caveats=dataset.caveats,
            licence=licence,
            keys=Path(keys),
        )  # fmt: skip
        write_evaluation(Path(judged.path), whole)
        progress.produced("evaluation.json", judged.path)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register_candidate(
    package: Input[Model], judged: Input[Artifact], training: Input[Artifact], registry: str, name: str, keys: str,
) -> str:  # fmt: skip
    """Register the package in MLflow; returns its version."""
    import tempfile
    from pathlib import Path

    from components.steps.progress import step

    with step("register") as progress, tempfile.TemporaryDirectory() as scratch:
        from components.evaluation import read_evaluation
        from components.steps.delivery import register_model
        from endcap.files import read_json
        from endcap.package import ensure_signing_key, verify_package
        from endcap.registry import Registry

        folder = Path(package.path)
        manifest = verify_package(folder, ensure_signing_key(Path(keys))[1])
        made = register_model(
            folder, registry=Registry(registry), name=name, evaluation=read_evaluation(Path(judged.path)),
            training=read_json(Path(training.path)), manifest=manifest, scratch=Path(scratch),
        )  # fmt: skip
        progress.tell("registered", version=made.version, digest=made.digest)
        progress.produced(f"packages/{name}-{made.version}", package.path)
    return made.version
