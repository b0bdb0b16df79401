"""The chart where pods run: what it installs becomes ready and answers, and what shoppers did outlives its pod."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from serving import impressions
from tests.cluster.access import Access
from tests.cluster.chart import CHART, RELEASE, helm, keys_secret, know_kserve, values, volume
from tests.process import wait_until

Json = dict[str, Any]
PATIENCE_S = 300.0


ASK = """
import json, sys, urllib.request
url, body = sys.argv[1], sys.argv[2].encode() if len(sys.argv) > 2 else None
request = urllib.request.Request(url, body, {"content-type": "application/json"})
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


def ask(access: Access, namespace: str, path: str, body: Json | None = None) -> str:
    """Of the collector, by its Service's name, from its own pod."""
    text = [] if body is None else [json.dumps(body)]
    url = f"http://endcap-collector.{namespace}.svc:8080{path}"
    return access.kubectl("exec", "deployment/endcap-collector", f"--namespace={namespace}", "--", "python", "-c", ASK,
                          url, *text)  # fmt: skip


def test_operator_and_collector_run_restricted_and_what_shoppers_did_is_kept(
    full_cluster: Access, pod_namespace: str, tmp_path: Path
) -> None:
    access, namespace = full_cluster, pod_namespace
    know_kserve(access)
    image = access.image("server")
    controller = access.image("controller")
    access.apply(keys_secret(tmp_path), namespace=namespace)
    with volume(access, namespace, image) as storage:
        access.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        settings = values(f"images.server={image}", f"images.controller={controller}", storage,
                          "operator.replicas=2", "collector.windowSeconds=1")  # fmt: skip
        try:
            helm(access, "install", RELEASE, str(CHART), "--namespace", namespace, "--wait", "--timeout=5m", *settings)
            assert "Phase:          Succeeded" in helm(access, "test", RELEASE, "--namespace", namespace)
            lease = access.get("lease", "endcap-operator", "--namespace", namespace)["spec"]
            pods = access.get("pods", "--namespace", namespace, "-l", "app.kubernetes.io/name=endcap-operator")["items"]
            assert len(pods) == 2 and any(lease["holderIdentity"].startswith(pod["metadata"]["name"]) for pod in pods)

            key = impressions.read_key(tmp_path / "impression.key")
            tokens = [impressions.mint(key, version="7", shopper=str(shopper), now_s=time.time())[1]
                      for shopper in range(5)]  # fmt: skip
            events = [{"impression": token, "type": "shown"} for token in tokens]
            events += [{"impression": tokens[0], "type": "clicked", "item": "4"}]
            assert json.loads(ask(access, namespace, "/v1/feedback", {"events": events}))["refused"] == []

            def closed() -> bool:
                found = json.loads(ask(access, namespace, "/v1/evidence"))["versions"].get("7", {})
                return bool((found.get("closed"), found.get("clicked")) == (5, 1))

            wait_until(closed, "the window closes", deadline_s=PATIENCE_S)

            # The pod dies without a word; the next one goes on from the volume, and answers for all of it.
            before = the_pod(access, namespace)
            access.kubectl("delete", "pod", before, f"--namespace={namespace}", "--grace-period=0", "--force")
            wait_until(lambda: the_pod(access, namespace) not in ("", before), "another pod", deadline_s=PATIENCE_S)
            access.wait("deployment/endcap-collector", "condition=Available", namespace)
            access.wait(f"pod/{the_pod(access, namespace)}", "condition=Ready", namespace)
            assert closed()
            assert 'endcap_feedback_clicked_impressions_total{version="7"} 1.0' in ask(access, namespace, "/metrics")

            # An upgrade restarts it for the new setting, and a rollback brings the old one back.
            helm(access, "upgrade", RELEASE, str(CHART), "--namespace", namespace, "--wait", "--timeout=5m", *settings,
                 "--set", "collector.windowSeconds=2")  # fmt: skip
            assert json.loads(ask(access, namespace, "/v1/evidence"))["window_s"] == 2
            helm(access, "rollback", RELEASE, "1", "--namespace", namespace, "--wait", "--timeout=5m")
            assert json.loads(ask(access, namespace, "/v1/evidence"))["window_s"] == 1
            assert closed()
        finally:
            access.helm("uninstall", RELEASE, "--namespace", namespace, "--wait")


def the_pod(access: Access, namespace: str) -> str:
    """The collector's pod that is not going away; empty where there is none."""
    found = access.get("pods", f"--namespace={namespace}", "-l", "app.kubernetes.io/name=endcap-collector")["items"]
    names = [one["metadata"]["name"] for one in found if "deletionTimestamp" not in one["metadata"]]
    return names[0] if len(names) == 1 else ""
