"""The operator with the rights that the chart gives it, and no others: what is not granted fails, and is logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.access import Access
from tests.cluster.chart import ACCOUNT, installed, know_kserve
from tests.cluster.operators import GOOD, WORSE, World
from tests.cluster.rights import as_account


@pytest.mark.parametrize("watched", ["named", "all"])
def test_rollouts_run_to_their_ends_with_the_charts_rights(
    control_plane: Access, namespace: str, tmp_path: Path, watched: str
) -> None:
    know_kserve(control_plane)
    with control_plane.namespace() as shop:
        settings = [f"operator.watchNamespaces={{{shop}}}"] if watched == "named" else []
        with installed(control_plane, namespace, *settings):
            operator = as_account(control_plane, namespace, ACCOUNT, tmp_path)
            world = World(control_plane, shop, tmp_path)
            world.behave({"good": {"1": GOOD, "2": GOOD}, "worse": {"1": GOOD, "2": WORSE}})
            try:
                world.operator(KUBECONFIG=str(operator.kubeconfig), ENDCAP_NAMESPACE=namespace,
                               ENDCAP_WATCH_NAMESPACES=shop if watched == "named" else "")  # fmt: skip
                for name in ("good", "worse"):
                    world.apply(name)
                assert world.until("done", "good")["outcome"] == "promoted"
                assert world.until("done", "worse")["outcome"] == "rolled_back"
                # A finalizer is taken away, and the object goes.
                world.kubectl("delete", "rollout", "good", "--timeout=120s")
                log = (tmp_path / "operator-0.log").read_text().splitlines()
                refused = [line for line in log if "forbidden" in line.lower()]
                assert refused == []
            finally:
                world.stop()
