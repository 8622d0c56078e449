"""The PodMonitor that the operator writes, as the API server of a cluster with Prometheus' operator takes it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from apiserver import ROOT, Run
from gpumeter_operator.decide.access import Monitoring
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, build

DEFINITION = ROOT / "tests/cluster/theirs/monitoring.coreos.com_podmonitors.yaml"
NAME = "podmonitors.monitoring.coreos.com"


@pytest.fixture
def monitors(kubectl: Run) -> Iterator[None]:
    """The API server knows PodMonitors, for this test alone."""
    kubectl("apply", "--server-side", "-f", str(DEFINITION))
    kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{NAME}")
    yield
    kubectl("delete", "crd", NAME)


def test_a_pod_monitor_is_what_prometheus_operator_takes_to_the_last_field(
    monitors: None, kubectl: Run, tmp_path: Path
) -> None:
    metadata = {"namespace": "default", "name": "smollm2", "uid": "u-1", "generation": 1}
    spec, _ = read({"metadata": metadata, "spec": {"model": {"uri": "hf://o/n"}}})
    installation = Installation("worker:1", "IfNotPresent", "", monitoring=Monitoring({"release": "prometheus"}, "15s"))
    workload = build(spec, 1, installation, credentials_of(b"k" * 32, "u-1"), monitored=True)
    [monitor] = [one for one in workload.others if one["kind"] == "PodMonitor"]
    file = tmp_path / "monitor.json"
    file.write_text(json.dumps(monitor))
    taken = kubectl("apply", "--server-side", "--validate=strict", "-o", "json", "-f", str(file))
    kept = json.loads(taken.stdout)
    assert kept["spec"] == monitor["spec"], "nothing was pruned, and nothing is filled in that would look like drift"
    monitor["spec"]["podMetricsEndpoints"][0]["interval"] = "often"
    file.write_text(json.dumps(monitor))
    refused = kubectl("apply", "--server-side", "--validate=strict", "-f", str(file), check=False)
    assert refused.returncode and "interval" in refused.stderr, "this definition would take anything"
