"""``endcap model``: packages and their registry."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import DEFAULT_REGISTRY, JsonOption, RegistryOption
from endcap.cli.registries import open_registry

app = typer.Typer(no_args_is_help=True, help="Model packages and the registry that keeps them.")

NameArgument = Annotated[str, typer.Argument(help="The model's name.")]


@app.command("list")
def list_versions(
    name: NameArgument = "recommender", registry: RegistryOption = DEFAULT_REGISTRY, json_output: JsonOption = False
) -> None:
    """All versions of a model, newest first."""
    console = Console(json_output=json_output)
    versions = open_registry(registry).versions(name)
    console.table(
        ["version", "aliases", "registered (UTC)", "package digest"],
        [
            (
                v.version, ", ".join(v.aliases),
                datetime.fromtimestamp(v.created_at_s, UTC).strftime("%Y-%m-%d %H:%M:%S"), v.digest[:16],
            )
            for v in versions
        ],
    )  # fmt: skip
    console.result(
        [
            {"version": v.version, "aliases": list(v.aliases), "digest": v.digest, "created_at_s": v.created_at_s,
             "tags": dict(v.tags)}
            for v in versions
        ]
    )  # fmt: skip


@app.command()
def champion(
    name: NameArgument = "recommender",
    set_version: Annotated[str | None, typer.Option("--set", help="Make this version the champion.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    json_output: JsonOption = False,
) -> None:
    """Say, or set, which version is the champion."""
    console = Console(json_output=json_output)
    store = open_registry(registry)
    if set_version is not None:
        store.set_champion(name, set_version)
    found = store.champion(name)
    console.say(f"{name}: no champion yet" if found is None else f"{name}: version {found.version}")
    console.result({"name": name, "champion": None if found is None else found.version})


@app.command()
def fetch(
    reference: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Option(help="Folder for the package.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    json_output: JsonOption = False,
) -> None:
    """Copy a version's package out of the registry, whole or not at all."""
    console = Console(json_output=json_output)
    found = open_registry(registry).resolve(reference, destination=out.absolute())
    console.good(f"version {found.version} is in {found.package}")
    console.result({"version": found.version, "package": str(found.package), "digest": found.digest})


@app.command()
def show(package: Annotated[Path, typer.Argument(help="A package folder.")], json_output: JsonOption = False) -> None:
    """What a package says of itself. Says nothing about whether that is true: see `verify`."""
    from endcap.package import read_manifest

    console = Console(json_output=json_output)
    manifest = read_manifest(package)
    console.say(
        f"{manifest.name}: {manifest.model} ({manifest.task}), top {manifest.top_k}, made {manifest.created_at}"
    )
    console.table(
        ["variant", "file", "quality"],
        [
            (name, variant.file, ", ".join(f"{k} {v:.4f}" for k, v in variant.quality.items()))
            for name, variant in manifest.variants.items()
        ],
    )
    console.table(["lineage", ""], list(manifest.lineage.items()))
    console.result(manifest.model_dump(mode="json"))


@app.command()
def verify(
    package: Annotated[Path, typer.Argument(help="A package folder.")],
    public_key: Annotated[Path, typer.Option(help="Key that it must be signed with.")] = Path("out/keys/signing.pub"),
    json_output: JsonOption = False,
) -> None:
    """Check signature and digests; exits 3 when the package must not be served."""
    from endcap.package import verify_package

    console = Console(json_output=json_output)
    manifest = verify_package(package, public_key)
    console.good(f"{package}: signature and {len(manifest.digests)} digests verify")
    console.result({"package": str(package), "verified": True, "digests": manifest.digests})


@app.command()
def sign(
    package: Annotated[Path, typer.Argument(help="A package folder; its manifest is sealed anew.")],
    keys: Annotated[Path, typer.Option(help="Folder of the signing key; made on first use.")] = Path("out/keys"),
) -> None:
    """Seal a package (digests into its manifest) and sign it."""
    from endcap.package import ensure_signing_key, read_manifest, seal, sign_package

    private_key, _ = ensure_signing_key(keys)
    seal(package, read_manifest(package))
    signature = sign_package(package, private_key)
    Console().good(f"signed: {signature}")


@app.command()
def text(
    task: Annotated[str, typer.Argument(help="encoder: texts to vectors; ranker: a query and candidates to scores.")],
    weights: Annotated[Path, typer.Option(help="Folder of the pretrained model, as transformers keep it.")],
    out: Annotated[Path, typer.Option(help="Folder for the package.")],
    name: Annotated[str, typer.Option(help="The model's name.")] = "search",
    judged: Annotated[Path | None, typer.Option(help="Folder of judgements.csv and *.json.zip to measure on.")] = None,
    licence: Annotated[str, typer.Option(help="Of the weights; it goes into the model card.")] = "not stated",
    longest: Annotated[int, typer.Option(help="Tokens of a text, beyond which it is cut.", min=8)] = 256,
    keys: Annotated[Path, typer.Option(help="Folder of the signing key; made on first use.")] = Path("out/keys"),
    registry: Annotated[str | None, typer.Option(help="Register it there too: an MLflow URI, or a folder.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Make a signed package of a pretrained text model, float32 and int8, and measure it. Nothing is trained."""
    from components.text.judged import read_judged
    from components.text.packages import TextParts, build_text_package
    from endcap.errors import InputError
    from endcap.package import Task, ensure_signing_key

    console = Console(json_output=json_output)
    if task not in (Task.ENCODER, Task.RANKER):
        raise InputError(f"no such task: {task}", where="TASK", next_step="encoder or ranker")
    queries = read_judged(judged) if judged is not None else []
    parts = TextParts(name, Task(task), weights, weights.name, licence,
                      datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), queries, longest=longest)  # fmt: skip
    made = build_text_package(out.absolute(), parts, ensure_signing_key(keys)[0])
    console.table(
        ["ranked by", "NDCG@10", "95 %"],
        [
            (by, f"{one.ndcg_at_10.value:.4f}", f"{one.ndcg_at_10.low:.4f} to {one.ndcg_at_10.high:.4f}")
            for by, one in made.quality.items()
        ],
    )
    version = None
    if registry is not None:
        metrics = {f"{by}_ndcg_at_10": one.ndcg_at_10.value for by, one in made.quality.items()}
        version = open_registry(registry).register(
            out, name=name, metrics=metrics, params={"model": made.manifest.model, "longest": longest},
            tags=made.manifest.lineage,
        ).version  # fmt: skip
    console.good(f"signed: {out}" + ("" if version is None else f"; version {version} of {name}"))
    console.result({
        "package": str(out), "name": name, "version": version, "parity": made.parity,
        "ndcg_at_10": {by: one.ndcg_at_10.value for by, one in made.quality.items()},
    })  # fmt: skip
