"""What everything else stands on: files that are never half-written, documents, objectives, errors, packages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.documents import MAX_DOCUMENT_BYTES
from endcap.errors import (
    BusyError,
    EndcapError,
    InputError,
    PackageError,
    StateError,
    StorageError,
    VerificationError,
)
from endcap.files import FolderLock, JsonLines, read_json, read_json_lines, write_atomic, write_json
from endcap.objectives import load_objectives
from endcap.package import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Manifest,
    Task,
    Variant,
    ensure_signing_key,
    seal,
    sign_package,
    verify_package,
)
from endcap.processes import leashed

# ---- errors ----


def every_kind(kind: type[EndcapError] = EndcapError) -> list[type[EndcapError]]:
    """Those of the spine, whatever other rooms' tests have imported before."""
    below = [found for child in kind.__subclasses__() for found in every_kind(child)]
    return [found for found in (kind, *below) if found.__module__ == "endcap.errors"]


@pytest.mark.parametrize("kind", every_kind())
def test_an_error_crosses_a_process_border_as_it_was(kind: type[EndcapError]) -> None:
    error = kind("it broke", where="here", next_step="mend it")
    back = EndcapError.from_json(json.loads(json.dumps(error.to_json())))
    assert type(back) is kind
    assert str(back) == "here: it broke\n  next: mend it"


# ---- files ----


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    """/dev/full is the kernel's own full disk; a limit on file sizes stands in for it where a file is replaced."""
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    with pytest.raises(StorageError, match="no space left"), JsonLines(Path("/dev/full")) as lines:
        lines.append({"a": 1})
    limited = (
        "import resource,sys,signal;from pathlib import Path;from endcap.files import write_atomic;"
        "from endcap.errors import StorageError;signal.signal(signal.SIGXFSZ,signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE,(10,10));\n"
        "try: write_atomic(Path(sys.argv[1]),'x'*100)\nexcept StorageError: sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", limited, str(path)], check=False).returncode == 7
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left"


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), max_size=8), st.integers(0, 40))
def test_a_torn_last_line_is_left_out_and_written_over(records: list[dict[str, int]], torn: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        with JsonLines(path) as lines:
            for record in records:
                lines.append(record)
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"half": "a record that was being written'[:torn])
        assert list(read_json_lines(path)) == records
        with JsonLines(path) as lines:
            lines.append({"after": 1})
        assert list(read_json_lines(path)) == [*records, {"after": 1}]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[1]\n", b"{]\n", b"nope\n"])
def test_a_damaged_line_is_an_error_that_names_file_and_line(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a":1}\n' + damage + b'{"b":2}\n')
    with pytest.raises(StateError, match=r"records\.jsonl: line 2"):
        list(read_json_lines(path))


def test_a_folder_has_one_holder_and_the_kernel_lets_go_when_it_dies(tmp_path: Path) -> None:
    code = (
        "import sys,time;from pathlib import Path;from endcap.files import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])):\n  print('held',flush=True);sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=str(holder.pid)), FolderLock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with FolderLock(tmp_path):
        pass


# ---- processes ----


def test_a_foreign_program_dies_with_us_even_by_sigkill(tmp_path: Path) -> None:
    code = (
        "import subprocess,sys;from endcap.processes import leashed\n"
        "p=subprocess.Popen(leashed(['sleep','600']));print(p.pid,flush=True);sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.send_signal(signal.SIGKILL)
            parent.wait()
            import select

            assert select.select([child], [], [], 10)[0], "the child outlived its parent"
        finally:
            os.close(child)


def test_a_leashed_program_gets_its_own_arguments() -> None:
    out = subprocess.run(leashed(["printf", "%s|", "a b", "$c"]), check=True, capture_output=True).stdout
    assert out == b"a b|$c|"


# ---- documents and objectives ----

OBJECTIVES = """
apiVersion: endcap.dev/v1alpha1
kind: Objectives
metadata: {name: recommender}
spec:
  service: recommender
  objectives:
  - {name: availability, goal: 0.999, good: answered}
  - {name: latency, goal: 0.99, good: answered, withinMs: 100}
  - {name: click-through, goal: 0.05, good: clicked, windowSeconds: 10, marginRelative: 0.1}
"""


def test_the_objectives_of_the_design_are_read(tmp_path: Path) -> None:
    path = tmp_path / "objectives.yaml"
    path.write_text(OBJECTIVES)
    objectives = load_objectives(path)
    assert [o.name for o in objectives.objectives] == ["availability", "latency", "click-through"]
    assert objectives.named("latency").within_ms == 100
    assert objectives.latency_thresholds_ms == (100,)
    assert objectives.click_window_s == 10
    assert objectives.named("availability").margin == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("v1alpha1", "v2", "apiVersion"),
        ("kind: Objectives", "kind: Objective", "known here: Objectives"),
        ("goal: 0.999", "goal: 1.5", "goal"),
        ("goal: 0.999", "gaol: 0.999", "gaol"),
        ("windowSeconds: 10, ", "", "needs windowSeconds"),
        ("marginRelative: 0.1}", "}\n  - {name: bought, goal: 0.01, good: clicked, windowSeconds: 60}", "one window"),
        ("name: latency", "name: availability", "same name"),
        ("spec:", "spec: [", "not YAML"),
        ("service: recommender", "service: n o", "service"),
    ],
)
def test_a_wrong_document_is_refused_with_file_and_field(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "objectives.yaml"
    path.write_text(OBJECTIVES.replace(old, new, 1))
    with pytest.raises(InputError, match=complaint) as raised:
        load_objectives(path)
    assert "objectives.yaml" in str(raised.value)


@given(st.binary(max_size=200))
def test_no_file_of_any_bytes_does_more_than_be_refused(raw: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(raw)
        file.flush()
        with pytest.raises(InputError):
            load_objectives(Path(file.name))


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "objectives.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(InputError, match="larger than"):
        load_objectives(path)


# ---- packages ----


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    for name in ("model.onnx", "MODEL_CARD.md"):
        (folder / name).write_text(name)
    for name in ("items.json", "popular.json"):
        (folder / name).write_text('["a"]')
    seal(
        folder,
        Manifest(
            name="shop", task=Task.SESSION_RECOMMENDER, model="test", inputs=(), outputs=(),
            variants={"float32": Variant(file="model.onnx")}, top_k=5, max_history=50, created_at="2026-01-01",
        ),
    )  # fmt: skip
    private, _ = ensure_signing_key(tmp_path / "keys")
    sign_package(folder, private)
    return folder


def test_a_signed_package_verifies_wherever_it_is_carried(package: Path, tmp_path: Path) -> None:
    moved = package.rename(tmp_path / "elsewhere")
    assert verify_package(moved, tmp_path / "keys" / "signing.pub").name == "shop"


FILES = ["model.onnx", "items.json", "popular.json", "MODEL_CARD.md", MANIFEST_FILE, SIGNATURE_FILE]


@pytest.mark.parametrize("name", FILES)
def test_one_byte_changed_anywhere_is_refused(name: str, package: Path, tmp_path: Path) -> None:
    path = package / name
    raw = bytearray(path.read_bytes())
    # The signature file is JSON about base64: change what it says, not its white space.
    position = raw.index(b'"payload":') + 20 if name == SIGNATURE_FILE else len(raw) // 2
    raw[position] ^= 1
    path.write_bytes(raw)
    with pytest.raises(PackageError):
        verify_package(package, tmp_path / "keys" / "signing.pub")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name: str, package: Path, tmp_path: Path) -> None:
    (package / name).unlink()
    with pytest.raises(PackageError):
        verify_package(package, tmp_path / "keys" / "signing.pub")


def test_an_extra_file_a_link_and_another_key_are_refused(package: Path, tmp_path: Path) -> None:
    public = tmp_path / "keys" / "signing.pub"
    (package / "extra.bin").write_bytes(b"x")
    with pytest.raises(VerificationError):
        verify_package(package, public)
    (package / "extra.bin").unlink()
    (package / "link").symlink_to("/etc/passwd")
    with pytest.raises(VerificationError):
        verify_package(package, public)
    (package / "link").unlink()
    _, other = ensure_signing_key(tmp_path / "other-keys")
    with pytest.raises(VerificationError, match="signature does not verify"):
        verify_package(package, other)
    verify_package(package, public)


def test_a_package_can_be_signed_anew_by_a_path_relative_to_where_one_is(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sign_package(Path("package"), Path("keys/signing.key"))
    assert verify_package(Path("package"), Path("keys/signing.pub")).name == "shop"
    assert verify_package(package, tmp_path / "keys" / "signing.pub").name == "shop"


def test_a_file_that_is_no_public_key_is_not_blamed_on_the_package(package: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.pub").write_text("ssh-ed25519 AAAA somebody")
    with pytest.raises(VerificationError, match=r"wrong\.pub: not a public key in PEM form"):
        verify_package(package, tmp_path / "wrong.pub")


def test_the_signing_key_is_readable_by_its_owner_alone_and_is_kept(tmp_path: Path) -> None:
    private, public = ensure_signing_key(tmp_path / "keys")
    assert private.stat().st_mode & 0o777 == 0o600
    before = private.read_bytes(), public.read_bytes()
    ensure_signing_key(tmp_path / "keys")
    assert (private.read_bytes(), public.read_bytes()) == before
    private.chmod(0o644)
    with pytest.raises(PackageError, match="read by others"):
        ensure_signing_key(tmp_path / "keys")


def test_writing_is_atomic_under_sigkill(tmp_path: Path) -> None:
    """A writer killed at any moment leaves a whole document, the old or the new."""
    path = tmp_path / "state.json"
    write_atomic(path, json.dumps([0] * 5000))
    code = (
        "import json,sys;from pathlib import Path;from endcap.files import write_atomic\n"
        "n=0\nprint('go',flush=True)\nwhile True:\n  n+=1;write_atomic(Path(sys.argv[1]),json.dumps([n]*5000))"
    )
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            seen = read_json(path)
            while read_json(path) == seen:
                pass
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert len(set(read_json(path))) == 1
