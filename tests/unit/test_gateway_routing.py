import pytest

from gpumeter_operator.gateway.endpoints import Endpoint, endpoints_from
from gpumeter_operator.gateway.models import catalogue_from, listing, resolve
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.routing import MAX_ATTEMPTS, Failure, Outstanding, choose, retry_after

A, B, C = (Endpoint(f"10.0.0.{n}", 8000) for n in (1, 2, 3))


def inference_service(namespace: str, name: str, model: str | None = None, **metadata: object) -> dict[str, object]:
    return {
        "metadata": {"namespace": namespace, "name": name, "uid": f"uid-{namespace}-{name}"} | metadata,
        "spec": {"model": {"uri": "file:///m"} | ({"name": model} if model else {})},
    }


def endpoint_slice(
    service: str, *endpoints: dict[str, object], port: dict[str, object] | None = None
) -> dict[str, object]:
    return {
        "metadata": {"namespace": "team-a", "name": f"{service}-x", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [port or {"name": "http", "port": 8000}],
        "endpoints": list(endpoints),
    }


def pod(address: str, **conditions: bool | None) -> dict[str, object]:
    return {"addresses": [address], "conditions": conditions, "targetRef": {"uid": f"pod-{address}"}}


# Model names


def test_a_model_is_found_by_its_own_name_and_by_namespace_and_service() -> None:
    catalogue = catalogue_from(
        [inference_service("team-a", "smollm2", "SmolLM2"), inference_service("team-b", "other")]
    )
    assert resolve(catalogue, "SmolLM2").uid == "uid-team-a-smollm2"
    assert resolve(catalogue, "team-a/smollm2").model == "SmolLM2"
    assert resolve(catalogue, "other").qualified == "team-b/other"


def test_a_name_that_fits_several_services_is_refused_with_their_qualified_names() -> None:
    catalogue = catalogue_from([inference_service("team-a", "m"), inference_service("team-b", "m")])
    with pytest.raises(Refusal) as refused:
        resolve(catalogue, "m")
    assert refused.value.status == 400
    assert "team-a/m, team-b/m" in refused.value.message
    assert resolve(catalogue, "team-b/m").namespace == "team-b"


def test_an_unknown_name_is_refused_with_near_names_or_with_all() -> None:
    catalogue = catalogue_from([inference_service("team-a", "smollm2"), inference_service("team-a", "llama")])
    for asked, told in (("smolm2", "Did you mean smollm2?"), ("zzz", "There are: llama, smollm2.")):
        with pytest.raises(Refusal) as refused:
            resolve(catalogue, asked)
        assert refused.value.status == 404
        assert told in refused.value.message
    with pytest.raises(Refusal, match="No InferenceService exists"):
        resolve(catalogue_from([]), "smollm2")


def test_a_long_list_of_names_is_cut_and_counted() -> None:
    catalogue = catalogue_from([inference_service("team-a", f"qqqq-{n:03}") for n in range(20)])
    with pytest.raises(Refusal, match="and 12 more"):
        resolve(catalogue, "zzz")


def test_a_service_that_is_being_deleted_gets_nothing_new() -> None:
    gone = inference_service("team-a", "m", deletionTimestamp="2026-11-21T10:00:00Z")
    with pytest.raises(Refusal) as refused:
        resolve(catalogue_from([gone]), "m")
    assert refused.value.status == 404


def test_the_list_names_every_service_once_by_the_shortest_name_that_is_its_own() -> None:
    catalogue = catalogue_from(
        [
            inference_service("team-b", "m", creationTimestamp="2026-11-21T10:00:00Z"),
            inference_service("team-a", "m"),
            inference_service("team-a", "n"),
        ]
    )
    listed = listing(catalogue)
    assert [model["id"] for model in listed] == ["team-a/m", "n", "team-b/m"]
    assert listed[2]["created"] == 1795255200
    assert {model["object"] for model in listed} == {"model"}


# Endpoints


def test_only_ready_workers_that_do_not_terminate_are_endpoints() -> None:
    found = endpoints_from(
        [
            endpoint_slice(
                "smollm2",
                pod("10.0.0.1", ready=True, serving=True, terminating=False),
                pod("10.0.0.2", ready=False, serving=True, terminating=True),
                pod("10.0.0.3", ready=False, serving=False, terminating=False),
                pod("10.0.0.4"),
                pod("10.0.0.5", ready=True, serving=True, terminating=True),
            )
        ]
    )
    assert [endpoint.address for endpoint in found["team-a", "smollm2"]] == ["10.0.0.1", "10.0.0.4"]


def test_the_slices_of_the_usage_service_lead_nowhere() -> None:
    found = endpoints_from(
        [
            endpoint_slice("smollm2", pod("10.0.0.1")),
            endpoint_slice("smollm2-usage", pod("10.0.0.1"), port={"name": "usage", "port": 8001}),
        ]
    )
    assert set(found) == {("team-a", "smollm2")}


def test_a_pod_with_two_addresses_is_one_worker() -> None:
    four, six = endpoint_slice("m", pod("10.0.0.1")), endpoint_slice("m", pod("fd00::1"))
    six["addressType"], six["endpoints"][0]["targetRef"] = "IPv6", {"uid": "pod-10.0.0.1"}  # type: ignore[index]
    assert endpoints_from([six, four])["team-a", "m"] == (Endpoint("10.0.0.1", 8000),)
    assert endpoints_from([six])["team-a", "m"][0].origin == "http://[fd00::1]:8000"


# Choice and second attempts


def test_the_worker_with_the_fewest_outstanding_requests_is_chosen() -> None:
    outstanding = Outstanding()
    with outstanding.one_more(A), outstanding.one_more(C):
        assert choose([A, B, C], outstanding, frozenset()) == B
        with outstanding.one_more(B), outstanding.one_more(B):
            assert choose([A, B], outstanding, frozenset()) == A


def test_workers_with_equal_load_take_turns() -> None:
    outstanding = Outstanding()
    assert {choose([A, B, C], outstanding, frozenset()) for _ in range(3)} == {A, B, C}


def test_a_finished_request_no_longer_counts_even_when_it_failed() -> None:
    outstanding = Outstanding()
    with pytest.raises(RuntimeError), outstanding.one_more(A):
        raise RuntimeError
    assert outstanding.at(A) == 0


def test_without_candidates_nothing_is_chosen() -> None:
    assert choose([], Outstanding(), frozenset()) is None
    assert choose([A], Outstanding(), frozenset({A})) is None


def test_what_never_reached_a_worker_goes_to_another_one() -> None:
    retry = retry_after(Failure.NOT_CONNECTED, A, 1, frozenset())
    assert retry.allowed
    assert choose([A, B], Outstanding(), retry.excluded) == B


def test_what_a_worker_may_have_begun_is_never_sent_twice() -> None:
    assert not retry_after(Failure.LOST, A, 1, frozenset()).allowed


def test_attempts_end() -> None:
    assert not retry_after(Failure.NOT_CONNECTED, A, MAX_ATTEMPTS, frozenset({B, C})).allowed
