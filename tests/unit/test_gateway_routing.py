import pytest

from gpumeter_operator.gateway.endpoints import Endpoint, endpoints_from
from gpumeter_operator.gateway.models import catalogue_from, listing, resolve
from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.routing import BACKOFF_NS, FULL_NS, Failure, Load, choose, retry_after

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

S = 1_000_000_000
MANY = 1_000


def test_the_worker_with_the_fewest_outstanding_requests_is_chosen() -> None:
    load = Load()
    load.begin(A, 0)
    load.begin(C, 0)
    assert choose([A, B, C], load, MANY, 0) == B
    load.begin(B, 0)
    load.begin(B, 0)
    assert choose([A, B], load, MANY, 0) == A
    load.end(A)
    assert load.at(A) == 0


def test_workers_with_equal_load_take_turns() -> None:
    load = Load()
    assert {choose([A, B, C], load, MANY, 0) for _ in range(3)} == {A, B, C}


def test_a_worker_with_as_many_requests_as_it_takes_gets_no_more() -> None:
    load = Load()
    load.begin(A, 0)
    load.begin(B, 0)
    assert choose([A, B], load, 1, 0) is None
    load.end(B)
    assert choose([A, B], load, 1, 0) == B


def test_one_prefix_goes_to_one_of_the_least_loaded_and_prefixes_spread() -> None:
    load = Load()
    first = choose([A, B, C], load, MANY, 0, b"You are a helpful")
    assert first is not None
    assert {choose([A, B, C], load, MANY, 0, b"You are a helpful") for _ in range(5)} == {first}
    assert choose([C, first, B], load, MANY, 0, b"You are a helpful") == first
    assert {choose([A, B, C], load, MANY, 0, b"%d" % n) for n in range(50)} == {A, B, C}
    load.begin(first, 0)
    assert choose([A, B, C], load, MANY, 0, b"You are a helpful") != first


def test_when_a_worker_goes_only_its_prefixes_move() -> None:
    load = Load()
    prefixes = [b"%d" % n for n in range(100)]
    before = {prefix: choose([A, B, C], load, MANY, 0, prefix) for prefix in prefixes}
    after = {prefix: choose([A, B], load, MANY, 0, prefix) for prefix in prefixes}
    assert all(after[prefix] == before[prefix] for prefix in prefixes if before[prefix] != C)


@pytest.mark.parametrize("failure", [Failure.NOT_CONNECTED, Failure.UNAVAILABLE, Failure.HOP_REFUSED, Failure.LOST])
def test_a_worker_that_failed_is_left_alone_then_tried_by_one_request_and_sound_when_it_answers(
    failure: Failure,
) -> None:
    load = Load()
    load.failed(A, failure, 0)
    assert choose([A], load, MANY, BACKOFF_NS[0] - 1) is None
    assert {choose([A, B], load, MANY, 0) for _ in range(3)} == {B}
    assert load.usable_again_ns([A, B], 0) == BACKOFF_NS[0]
    assert choose([A], load, MANY, BACKOFF_NS[0]) == A
    load.begin(A, BACKOFF_NS[0])
    assert choose([A], load, MANY, BACKOFF_NS[0] + 1) is None  # the probe is under way
    load.worked(A)
    assert choose([A], load, MANY, BACKOFF_NS[0] + 1) == A


def test_every_further_failure_leaves_a_worker_alone_for_longer_up_to_a_limit() -> None:
    load, now_ns, pauses = Load(), 0, []
    for _ in range(len(BACKOFF_NS) + 2):
        load.failed(A, Failure.NOT_CONNECTED, now_ns)
        again_ns = load.usable_again_ns([A], now_ns)
        assert again_ns is not None
        pauses.append(again_ns - now_ns)
        now_ns = again_ns
    assert tuple(pauses) == (*BACKOFF_NS, BACKOFF_NS[-1], BACKOFF_NS[-1])


def test_requests_that_were_under_way_when_a_worker_failed_do_not_lengthen_its_pause() -> None:
    load = Load()
    for _ in range(20):
        load.failed(A, Failure.NOT_CONNECTED, 0)
    assert load.usable_again_ns([A], 0) == BACKOFF_NS[0]


def test_a_probe_that_was_given_up_lets_another_one_try() -> None:
    load = Load()
    load.failed(A, Failure.NOT_CONNECTED, 0)
    load.begin(A, S)
    load.end(A)
    assert choose([A], load, MANY, S) == A


def test_a_worker_that_left_readiness_starts_anew() -> None:
    load = Load()
    load.failed(A, Failure.NOT_CONNECTED, 0)
    load.failed(B, Failure.FULL, 0)
    load.forget_all_but([B])
    load.forget_all_but([A])
    assert not load.remembers
    assert choose([A], load, MANY, 0) == A


def test_a_worker_that_said_it_is_full_is_the_second_choice_for_a_second_and_not_shut() -> None:
    load = Load()
    load.begin(B, 0)
    load.failed(A, Failure.FULL, 0)
    assert choose([A, B], load, MANY, 0) == B
    assert choose([A], load, MANY, 0) == A
    assert choose([A, B], load, MANY, FULL_NS) == A


def test_what_a_worker_may_have_begun_is_never_sent_twice() -> None:
    assert not retry_after(Failure.LOST, others_left=True).allowed


@pytest.mark.parametrize("failure", [Failure.NOT_CONNECTED, Failure.UNAVAILABLE, Failure.FULL])
def test_what_no_worker_has_begun_is_sent_again(failure: Failure) -> None:
    assert retry_after(failure, others_left=False).allowed


def test_where_nobody_accepts_the_gateway_waiting_is_in_vain() -> None:
    assert retry_after(Failure.HOP_REFUSED, others_left=True).allowed
    assert not retry_after(Failure.HOP_REFUSED, others_left=False).allowed
