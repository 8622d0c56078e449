"""What the operator keeps of the objects that it mirrors."""

from typing import Any

from gpumeter_operator.adapters.packed import packed, packed_workload, unpacked, unpacked_workload, without_bulk
from gpumeter_operator.decide.credentials import credentials_of
from gpumeter_operator.decide.spec import read
from gpumeter_operator.decide.workload import Installation, build

OWNER = {"apiVersion": "gpumeter.io/v1alpha1", "kind": "InferenceService", "name": "a", "uid": "s", "controller": True}
DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {
        "name": "a",
        "namespace": "n",
        "uid": "u",
        "resourceVersion": "7",
        "annotations": {"x": "y"},
        "labels": {"gpumeter.io/inferenceservice": "a", "theirs": "x"},
        "ownerReferences": [OWNER],
    },
    "spec": {
        "replicas": 0,
        "template": {
            "metadata": {"annotations": {"gpumeter.io/template": "h", "t": "x"}},
            "spec": {"containers": [{"name": "main"}]},
        },
    },
    "status": {"conditions": [{"type": "ReplicaFailure", "status": "True"}]},
}


def test_the_whole_of_a_packed_object_comes_back_and_its_short_form_has_what_is_read_often() -> None:
    kept = packed(DEPLOYMENT)
    assert unpacked(kept) == DEPLOYMENT
    assert kept["metadata"] == {
        "name": "a",
        "namespace": "n",
        "uid": "u",
        "resourceVersion": "7",
        "labels": {"gpumeter.io/inferenceservice": "a"},
        "ownerReferences": [{"uid": "s", "controller": True}],
    }
    template = {"metadata": {"annotations": {"gpumeter.io/template": "h"}}}
    assert (kept["spec"], kept["status"]) == ({"replicas": 0, "template": template}, DEPLOYMENT["status"])
    assert (kept["apiVersion"], kept["kind"]) == ("apps/v1", "Deployment")
    assert packed(DEPLOYMENT) == kept, "a list that found nothing new is seen to be the same"
    assert packed({"metadata": {"name": "a", "uid": "u"}})["metadata"] == {"name": "a", "uid": "u"}


def test_a_packed_workload_comes_back_as_it_was_built_in_less_than_a_third_of_its_text() -> None:
    metadata = {"namespace": "n", "name": "a", "uid": "u", "generation": 1}
    spec, _ = read({"metadata": metadata, "spec": {"model": {"uri": "hf://o/n"}, "scaling": {"maxReplicas": 4}}})
    built = build(spec, 2, Installation("i", "IfNotPresent", ""), credentials_of(b"k" * 32, spec.uid))
    assert unpacked_workload(packed_workload(built)) == built
    assert len(packed_workload(built)) * 3 < len(repr(built))


def test_a_pod_keeps_what_tells_of_its_life_and_of_the_model_that_its_worker_serves() -> None:
    uri, revision = {"name": "GPUMETER_MODEL_URI", "value": "hf://o/n"}, {"name": "GPUMETER_MODEL_REVISION"}
    main = {"name": "main", "image": "i", "env": [{"name": "A", "value": "b"}, uri, revision], "volumeMounts": []}
    pod = {
        "metadata": {"name": "p"},
        "spec": {
            "nodeName": "n",
            "terminationGracePeriodSeconds": 30,
            "containers": [main, {"name": "logs", "image": "l"}],
            "volumes": [{"name": "v"}],
            "affinity": {},
        },
        "status": {"podIP": "10.0.0.1"},
    }
    kept = without_bulk(pod)
    assert kept["spec"] == {
        "nodeName": "n",
        "terminationGracePeriodSeconds": 30,
        "containers": [{"name": "main", "env": [uri, revision]}, {"name": "logs"}],
    }
    assert (kept["metadata"], kept["status"]) == (pod["metadata"], pod["status"])
    assert without_bulk({"metadata": {}}) == {"metadata": {}}
