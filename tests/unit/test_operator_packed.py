"""What the operator keeps of the objects that it mirrors."""

from gpumeter_operator.adapters.packed import packed, unpacked, without_bulk

DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": "7", "annotations": {"x": "y"}},
    "spec": {
        "replicas": 0,
        "template": {"metadata": {"annotations": {"t": "h"}}, "spec": {"containers": [{"name": "main"}]}},
    },
    "status": {"conditions": [{"type": "ReplicaFailure", "status": "True"}]},
}


def test_the_whole_of_a_packed_object_comes_back_and_its_short_form_has_identity_replicas_and_status() -> None:
    kept = packed(DEPLOYMENT)
    assert unpacked(kept) == DEPLOYMENT
    assert kept["metadata"] == {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": "7"}
    template = {"metadata": {"annotations": {"t": "h"}}}
    assert (kept["spec"], kept["status"]) == ({"replicas": 0, "template": template}, DEPLOYMENT["status"])
    assert (kept["apiVersion"], kept["kind"]) == ("apps/v1", "Deployment")
    assert packed(DEPLOYMENT) == kept, "a list that found nothing new is seen to be the same"


def test_a_pod_keeps_what_tells_of_its_life_and_of_its_worker() -> None:
    main = {"name": "main", "image": "i", "env": [{"name": "A", "value": "b"}], "volumeMounts": [{"name": "v"}]}
    pod = {
        "metadata": {"name": "p"},
        "spec": {
            "nodeName": "n",
            "terminationGracePeriodSeconds": 30,
            "containers": [main],
            "volumes": [{"name": "v"}],
        },
        "status": {"podIP": "10.0.0.1"},
    }
    kept = without_bulk(pod)
    assert kept["spec"] == {
        "nodeName": "n",
        "terminationGracePeriodSeconds": 30,
        "containers": [{"name": "main", "image": "i", "env": [{"name": "A", "value": "b"}]}],
    }
    assert (kept["metadata"], kept["status"]) == (pod["metadata"], pod["status"])
    assert without_bulk({"metadata": {}}) == {"metadata": {}}
