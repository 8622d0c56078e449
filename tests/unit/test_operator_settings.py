"""The operator's environment: defaults, and every wrong variable in a sentence of its own."""

import json
from pathlib import Path

import kopf
import pytest

from gpumeter_operator.decide.access import Monitoring, Peers
from gpumeter_operator.decide.credentials import credentials_of, derive
from gpumeter_operator.decide.placement import NodeChoice
from gpumeter_operator.environment import SettingsInvalid
from gpumeter_operator.flow.operation import OVERDUE_MIN_S
from gpumeter_operator.handled import HandledInMemory, OnlyRetries
from gpumeter_operator.settings import configure_kopf, read_settings


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "master-key"
    path.write_bytes(b"k" * 32)
    return str(path)


def test_only_image_key_and_namespace_are_needed(key: str) -> None:
    settings = read_settings(
        {"GPUMETER_WORKER_IMAGE": "worker:1", "GPUMETER_MASTER_KEY_FILE": key, "GPUMETER_NAMESPACE": "gpumeter-system"}
    )
    assert settings.installation.worker_image == "worker:1"
    assert settings.installation.worker_image_pull_policy == "IfNotPresent"
    assert (settings.status_interval_ms, settings.status_hold_ms) == (3_000, 5_000)
    assert settings.deletion_margin_ms == 60_000
    assert settings.http_port == 8080
    assert (settings.namespace, settings.lease) == ("gpumeter-system", "gpumeter-operator")
    assert settings.master_key == b"k" * 32


def test_what_the_chart_says_of_nodes_and_networks_is_read_from_json(key: str) -> None:
    peers = {"http": [{"podSelector": {}}], "usage": [{"podSelector": {}}], "egress": []}
    needed = {"GPUMETER_WORKER_IMAGE": "worker:1", "GPUMETER_MASTER_KEY_FILE": key, "GPUMETER_NAMESPACE": "gpumeter"}
    installation = read_settings(
        {
            **needed,
            "GPUMETER_GPU_CLASSES": json.dumps({"h100": {"nodeSelector": {"pool": "h100"}}}),
            "GPUMETER_WORKER_PEERS": json.dumps(peers),
            "GPUMETER_WORKER_MONITORING": json.dumps({"labels": {"release": "p"}, "interval": "30s"}),
        }
    ).installation
    assert installation.gpu_classes == {"h100": NodeChoice({"pool": "h100"})}
    assert installation.peers == Peers(({"podSelector": {}},), ({"podSelector": {}},), None)
    assert installation.monitoring == Monitoring({"release": "p"}, "30s")
    plain = read_settings(needed).installation
    assert (plain.gpu_classes, plain.peers, plain.monitoring) == ({}, None, None)


def test_a_policy_without_peers_would_let_everybody_in_and_is_refused(key: str) -> None:
    with pytest.raises(SettingsInvalid) as invalid:
        read_settings(
            {
                "GPUMETER_WORKER_IMAGE": "worker:1",
                "GPUMETER_NAMESPACE": "gpumeter-system",
                "GPUMETER_MASTER_KEY_FILE": key,
                "GPUMETER_WORKER_PEERS": '{"http": [{"podSelector": {}}], "usage": []}',
                "GPUMETER_GPU_CLASSES": '{"h100": {}}',
                "GPUMETER_WORKER_MONITORING": "[",
            }
        )
    told = "\n".join(invalid.value.problems)
    assert len(invalid.value.problems) == 3
    assert "GPUMETER_WORKER_PEERS names nobody who may reach workers" in told
    assert "GPUMETER_GPU_CLASSES says nothing of the nodes of 'h100'" in told
    assert "GPUMETER_WORKER_MONITORING is '['; set a JSON object" in told


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"k" * 31)
    with pytest.raises(SettingsInvalid) as invalid:
        read_settings(
            {
                "GPUMETER_MASTER_KEY_FILE": str(short),
                "GPUMETER_STATUS_INTERVAL_MS": "fast",
                "GPUMETER_HTTP_PORT": "0",
                "GPUMETER_WORKER_IMAGE_PULL_POLICY": "Sometimes",
            }
        )
    told = "\n".join(invalid.value.problems)
    assert len(invalid.value.problems) == 6
    for part in (
        "GPUMETER_WORKER_IMAGE is not set",
        "holds 31 bytes; a master key has at least 32",
        "GPUMETER_STATUS_INTERVAL_MS is 'fast'; set a whole number from 200 to 60000",
        "GPUMETER_HTTP_PORT is '0'",
        "GPUMETER_NAMESPACE is not set; name the namespace in which the operators' Lease is to lie",
        "GPUMETER_WORKER_IMAGE_PULL_POLICY is 'Sometimes'",
    ):
        assert part in told


def test_a_missing_key_file_is_named() -> None:
    with pytest.raises(SettingsInvalid, match="/no/such/key, which cannot be read: No such file"):
        read_settings({"GPUMETER_WORKER_IMAGE": "x", "GPUMETER_MASTER_KEY_FILE": "/no/such/key"})


def test_kopf_gets_our_finalizer_and_limits() -> None:
    settings = kopf.OperatorSettings()
    configure_kopf(settings, HandledInMemory())
    assert settings.persistence.finalizer == "gpumeter.io/usage"
    assert settings.networking.request_timeout == 10
    assert max(settings.queueing.error_delays) < OVERDUE_MIN_S / 2, "what kopf leaves alone is no frozen watch"


def test_what_kopf_has_dealt_with_is_known_without_a_write_until_the_service_is_edited_stopped_or_gone() -> None:
    handled, patch = HandledInMemory(), kopf.Patch()

    def body(generation: int = 1, uid: str = "u-1", **annotations: str) -> kopf.Body:
        whole = {"operator.gpumeter.io/release": "a retry of kopf's", **annotations}
        return kopf.Body({"metadata": {"uid": uid, "generation": generation, "annotations": whole}})

    def is_news(one: kopf.Body) -> bool:
        return bool(handled.fetch(body=one) != handled.build(body=one))

    assert handled.fetch(body=body()) is None, "a process that begins has dealt with nothing"
    handled.store(body=body(), patch=patch, essence=handled.build(body=body()))
    assert not patch, "nothing is written"
    assert not is_news(body(**{"somebody.example/else": "x"}))
    assert is_news(body(generation=2))
    assert is_news(body(**{"gpumeter.io/stop": "true"}))
    assert handled.fetch(body=body(uid="u-2")) is None, "a namesake is another one"
    handled.forget("u-1")
    assert handled.fetch(body=body()) is None


def test_kopf_notes_what_it_is_to_try_again_and_nothing_of_what_is_done() -> None:
    storage, patch = OnlyRetries(prefix="operator.gpumeter.io", v1=False), kopf.Patch()
    body = kopf.Body({"metadata": {"uid": "u-1"}})
    storage.store(key="reconcile", record={"success": True, "retries": 1}, body=body, patch=patch)
    assert not patch, "neither a note nor kopf's mark"
    storage.store(key="release", record={"success": False, "retries": 1}, body=body, patch=patch)
    assert "operator.gpumeter.io/release" in patch["metadata"]["annotations"]


def test_credentials_are_derived_per_purpose_and_per_service() -> None:
    # Reckoned with: printf 'usage-token:u-1' | openssl dgst -sha256 -hmac kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk
    known = "0d49ee0caec6cb7f6124c4dc18bbe9b3317df8950aa0923c421a115555bbcb22"
    assert derive(b"k" * 32, "usage-token", "u-1") == known
    values = {derive(b"k" * 32, purpose, uid) for purpose in ("usage-token", "hop-key") for uid in ("u-1", "u-2")}
    assert len(values) == 4
    assert credentials_of(b"k" * 32, "u-1").fingerprint != credentials_of(b"j" * 32, "u-1").fingerprint
