"""What is said of a file that a person wrote, before anything happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from endcap.errors import InputError
from serving.rollout.spec import load_rollout

HEAD = "apiVersion: endcap.dev/v1alpha1\nkind: Rollout\nmetadata: {name: shop}\n"
SPEC = 'service: shop, candidate: "models:/shop/2"'


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (f"{{{SPEC}, stepz: []}}", "spec.stepz: unknown field"),
        (f"{{{SPEC}, alpha: 2}}", "spec.alpha: Input should be less than 0.5"),
        (f"{{{SPEC}, steps: [{{share: 0}}, {{share: 1}}]}}",
         "spec.steps.0.share: Input should be greater than or equal to 0.0001"),
        (f"{{{SPEC}, steps: []}}", "spec.steps: Tuple should have at least 1 item after validation, not 0"),
        (f"{{{SPEC}, steps: [{{share: 0.5}}]}}", "spec: steps: the last share must be 1"),
    ],
)  # fmt: skip
def test_each_fault_is_said_once_and_plainly(spec: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(f"{HEAD}spec: {spec}\n")
    with pytest.raises(InputError) as caught:
        load_rollout(path)
    assert caught.value.what == said


@pytest.mark.parametrize("twice", ["spec: {%s}\nspec: {%s}\n", "spec: {%s, alpha: 0.01, %s}\n"])
def test_a_key_that_stands_twice_is_no_key_at_all(twice: str, tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(HEAD + twice % (SPEC, SPEC))
    with pytest.raises(InputError, match=r"stands twice.*line"):
        load_rollout(path)


def test_merged_keys_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    steps = "steps: [&step {share: 0.1, minSeconds: 1, maxSeconds: 7}, {<<: *step, share: 1}]"
    path.write_text(f"{HEAD}spec: {{{SPEC}, {steps}}}\n")
    assert [(step.share, step.max_s) for step in load_rollout(path).steps] == [(0.1, 7), (1, 7)]
