"""``endcap serve`` as a person types it: what is said to be served is what is served."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

from tests.packages import make_package


def endcap(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "endcap.cli", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_a_folder_that_served_one_package_is_not_said_to_serve_another(tmp_path: Path) -> None:
    one, other = make_package(tmp_path / "one"), make_package(tmp_path / "other")
    target = tmp_path / "a target"
    options = ["--public-key", str(tmp_path / "keys" / "signing.pub"), "--folder", str(target)]

    def serve_until_told_to_end(*more: str) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "endcap.cli", "serve", "up", *more, *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                said = ""
                while "export ENDCAP_TARGET" not in said:
                    said = process.stdout.readline()
                    assert said, "it ended before it served"
                assert f"'{target}'" in said, "what is shown can be pasted"
                assert endcap("serve", "down", "--target", str(target)).returncode == 0
                assert process.wait(30) == 0, "an end that was asked for is not a failure"
            finally:
                process.kill()

    declared = resources.files("endcap.cli.demo") / "objectives.yaml"
    serve_until_told_to_end(str(one), "--label", "7", "--objectives", str(declared))
    assert (target / "objectives.yaml").read_text() == declared.read_text(), "what drills judge the steady state by"
    refused = endcap("serve", "up", str(other), *options)
    assert refused.returncode == 2
    assert f"it served version 7 from {one}, and would again, not {other}" in refused.stderr
    missing = endcap("serve", "up", str(tmp_path / "none"), *options)
    assert missing.returncode == 3
    assert "none: no such package folder" in missing.stderr
    serve_until_told_to_end(str(one))
