"""What a person or a CI job meets at the command line: nouns, one clear error, an exit code, JSON where asked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NOUNS = ["pipeline", "model", "serve", "objectives", "rollout", "load", "drill", "report", "demo"]


def endcap(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    import os

    clean = {k: v for k, v in os.environ.items() if k not in ("ENDCAP_TARGET", "MLFLOW_TRACKING_URI")}
    return subprocess.run(
        [sys.executable, "-m", "endcap.cli", *arguments], capture_output=True, text=True, check=False,
        env=clean | (env or {}), timeout=120,
    )  # fmt: skip


def test_help_shows_the_nouns() -> None:
    shown = endcap("--help")
    assert shown.returncode == 0
    for noun in NOUNS:
        assert f"\n  {noun} " in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonsense"], 2, "nonsense"),
        (["model", "verify", "{tmp}/none", "--public-key", "{tmp}/none.pub"], 3, "no such package folder"),
        (["model", "show", "{tmp}"], 3, "not a model package"),
        (["model", "list", "--registry", "{tmp}"], 1, "{tmp}"),
        (["rollout", "start", "{tmp}/none.yaml"], 2, "no such file"),
        (["rollout", "status", "{tmp}"], 2, "no rollout here"),
        (["rollout", "abort", "{tmp}"], 2, "no rollout here"),
        (["rollout", "history", "{tmp}"], 2, "no rollout here"),
        (["rollout", "schema", "Pod"], 2, "Pod"),
        (["serve", "status", "--target", "{tmp}"], 1, "no target runs here"),
        (["serve", "up", "{tmp}", "--public-key", "{tmp}/none.pub", "--folder", "{tmp}/t"], 3, "{tmp}"),
        (["serve", "up", "{tmp}", "--public-key", "{tmp}/none.pub", "--port", "99999"], 2, "port"),
        (["serve", "up", "{tmp}", "--public-key", "{tmp}/k", "--label", "a b"], 2, "'a b' is no label"),
        (["load", "run", "--shoppers", "{tmp}/none", "--url", "http://localhost", "--rate", "-1"], 2, "rate"),
        (["load", "run", "--shoppers", "{tmp}/none"], 2, "nothing to load"),
        (["drill", "run", "replica-kill"], 2, "no target to drill"),
        (["report", "build", "{tmp}"], 2, "{tmp}"),
        (["pipeline", "run", "--data", "{tmp}/none", "--out", "{tmp}/o", "--keys", "{tmp}/k", "--registry", "{tmp}/r"],
         2, "none"),
        (["demo", "--rate", "0"], 2, "rate"),
        (["demo", "--out", "{earlier}", "--data", "{tmp}/none"], 2, "{tmp}/none: no such data file"),
        (["demo", "--out", "{earlier}", "--dataset", "beuaty"], 2, "known: beauty, synthetic"),
        (["demo", "--out", "{earlier}", "--package", "{tmp}/none"], 2, "{tmp}/none: no such package folder"),
        (["demo", "--out", "{earlier}", "--package", "{earlier}/packages"], 2, "which a demo empties first"),
        (["demo", "--out", "{earlier}", "--keys", "{earlier}/keys"], 2, "which a demo empties first"),
        (["demo", "--out", "{busy}"], 2, "holds files that no demo made"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error_and_no_traceback(
    arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    busy = tmp_path / "somebody"
    busy.mkdir()
    (busy / "thesis.tex").write_text("dear")
    earlier = tmp_path / "earlier"
    (earlier / "packages").mkdir(parents=True)
    for name in (".endcap-demo", "report.html"):
        (earlier / name).touch()
    fill = {"{tmp}": str(tmp_path), "{busy}": str(busy), "{earlier}": str(earlier)}

    def filled(text: str) -> str:
        for key, value in fill.items():
            text = text.replace(key, value)
        return text

    shown = endcap(*(filled(argument) for argument in arguments))
    assert shown.returncode == code, shown.stderr
    assert "Traceback" not in shown.stderr
    assert shown.stderr.count("error: ") == 1
    assert filled(said) in shown.stderr
    assert (busy / "thesis.tex").read_text() == "dear"
    assert (earlier / "report.html").exists(), "what an earlier demo made is only emptied for one that can begin"


def test_an_error_is_a_document_where_a_machine_reads(tmp_path: Path) -> None:
    shown = endcap("model", "show", str(tmp_path), "--json")
    assert shown.returncode == 3
    assert json.loads(shown.stdout)["error"] == "PackageError"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_interrupted_says_so_and_does_not_exit_as_if_done(number: int, code: int) -> None:
    waiting = """
import signal
from endcap.cli.main import app, main
signal.signal(signal.SIGINT, signal.default_int_handler)
@app.command()
def wait() -> None:
    print("waiting", flush=True)
    signal.pause()
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", waiting, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "everything that was started is ended" in said
    assert "Traceback" not in said


def test_lineage_names_the_commit_of_this_code_wherever_the_demo_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endcap.cli.demo.run import _git_commit

    here = _git_commit()
    monkeypatch.chdir(tmp_path)
    assert _git_commit() == here


def test_the_schemas_of_the_files_people_write_can_be_printed() -> None:
    schema = json.loads(endcap("rollout", "schema").stdout)
    assert schema["properties"]["kind"]["const"] == "Rollout"
    assert "maxSeconds" in json.dumps(schema)


def test_the_guide_s_rollout_with_every_field_is_one_and_its_defaults_are_the_defaults(tmp_path: Path) -> None:
    from dataclasses import replace

    from serving.rollout.spec import GatesSpec, load_rollout

    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    begins = guide.index("    spec:\n      service: recommender\n      candidate:")
    lines = guide[begins : guide.index("\n\n", begins)].splitlines()
    envelope = "apiVersion: endcap.dev/v1alpha1\nkind: Rollout\nmetadata: {name: recommender}\n"
    (tmp_path / "full.yaml").write_text(envelope + "\n".join(line[4:] for line in lines) + "\n")
    (tmp_path / "short.yaml").write_text(
        envelope + 'spec: {service: recommender, candidate: "models:/recommender/7"}\n'
    )
    full, short = load_rollout(tmp_path / "full.yaml"), load_rollout(tmp_path / "short.yaml")
    assert full.shadow is not None and len(full.freeze) == 2 and full.gates.requests is not None
    assert full.steps[0] == short.steps[0]
    as_examples = {"steps": short.steps, "margins": {}, "shadow": None, "freeze": (), "prometheus_url": None}
    assert replace(full, **as_examples, gates=replace(full.gates, requests=None)) == replace(short, gates=GatesSpec())


def test_a_role_s_lock_is_a_part_of_the_whole() -> None:
    """Images installed a role at a time run the very versions that the tests ran."""

    def pins(path: Path) -> set[str]:
        lines = path.read_text().splitlines()
        return {line.split(";")[0].strip(" \\") for line in lines if "==" in line and line[0].isalnum()}

    locks = Path(__file__).parents[2] / "locks"
    whole = pins(locks / "all.txt")
    assert len(whole) > 200
    for role in ("server", "pipeline", "load", "drills", "controller", "local"):
        assert pins(locks / f"{role}.txt") <= whole, role
    assert not any(pin.startswith(("torch==", "kserve==", "pandas==")) for pin in pins(locks / "server.txt"))
