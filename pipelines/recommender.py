"""The recommender's pipeline: from purchase sequences to a signed, registered package, or to a reason why not."""

# mypy: disable-error-code="untyped-decorator, import-untyped"

from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl

from components.steps.kubeflow import (
    compare_champion,
    compress_graph,
    evaluate_candidates,
    export_graph,
    ingest_data,
    package_candidate,
    register_candidate,
    split_data,
    train_candidates,
)

__all__ = ["make_recommender", "recommender"]


def make_recommender(arrange: Callable[[Mapping[str, Any]], None] = lambda _: None) -> Any:
    """The pipeline; ``arrange`` is given its kfp tasks by step, to set what a cluster needs to know of them."""

    @dsl.pipeline(
        name="endcap-recommender",
        description="Ingest, split, train, evaluate, compare with the champion; where the gate passes: export, "
        "compress, package and sign, register.",
    )
    def recommender(
        registry: str,
        keys: str,
        name: str = "recommender",
        file: str = "",
        sha256: str = "",
        dataset: str = "beauty",
        shoppers: int = 0,
        items: int = 0,
        candidate: str = "best",
        seed: int = 7,
        epochs: int = 0,
        training_seconds: float = 0.0,
        checkpoint: str = "",
        git_commit: str = "",
        run: str = "",
    ) -> None:
        """Run the whole path once.

        Args:
            registry: URI of the MLflow registry.
            keys: folder of the signing key.
            name: of the registered model.
            file: data file of `user item item ...` lines; empty: the published `dataset`.
            sha256: what the data file must have; empty: anything.
            dataset: `beauty` or `synthetic`.
            shoppers: of the synthetic shop; 0: its default.
            items: of the synthetic shop; 0: its default.
            candidate: `best` (on validation), or the model to register.
            seed: of everything random.
            epochs: of the transformer at most; 0: as configured.
            training_seconds: of the transformer at most; 0: no limit.
            checkpoint: file that training writes after every epoch and goes on from, on a volume that outlives the
                step; empty: none.
            git_commit: of this code, for lineage.
            run: label of this run, for lineage.
        """
        ingested = ingest_data(file=file, sha256=sha256, dataset=dataset, shoppers=shoppers, items=items, seed=seed)
        parted = split_data(data=ingested.outputs["data"])
        split = parted.outputs["split"]
        trained = train_candidates(split=split, candidate=candidate, seed=seed, epochs=epochs,
                                   training_seconds=training_seconds, checkpoint=checkpoint)  # fmt: skip
        models = trained.outputs["models"]
        judged = evaluate_candidates(split=split, models=models, candidate=candidate, seed=seed)
        compared = compare_champion(
            data=ingested.outputs["data"], split=split, evaluation=judged.outputs["evaluation"],
            ranks=judged.outputs["ranks"], registry=registry, name=name, keys=keys, seed=seed,
        )  # fmt: skip
        # The registry changes without this pipeline knowing: what was compared before says nothing.
        compared.set_caching_options(False)
        with dsl.If(compared.outputs["Output"] == "pass", name="gate"):
            exported = export_graph(split=split, models=models, evaluation=judged.outputs["evaluation"], seed=seed)
            compressed = compress_graph(split=split, graph=exported.outputs["graph"],
                                        max_history=exported.outputs["Output"], seed=seed)  # fmt: skip
            packaged = package_candidate(
                data=ingested.outputs["data"], models=models,
                evaluation=judged.outputs["evaluation"], graph=exported.outputs["graph"],
                parity=exported.outputs["parity"], int8=compressed.outputs["int8"],
                compression=compressed.outputs["compression"], max_history=exported.outputs["Output"], name=name,
                keys=keys, seed=seed, git_commit=git_commit, run=run,
            )  # fmt: skip
            registered = register_candidate(
                package=packaged.outputs["package"], judged=packaged.outputs["judged"],
                training=trained.outputs["training"], registry=registry, name=name, keys=keys,
            )  # fmt: skip
            registered.set_caching_options(False)
        arrange(
            {"ingest": ingested, "split": parted, "train": trained, "evaluate": judged, "compare": compared,
             "export": exported, "compress": compressed, "package": packaged, "register": registered}
        )  # fmt: skip

    return recommender


recommender = make_recommender()
