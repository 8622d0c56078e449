"""A service that nobody asks sleeps, and the first request wakes it: on a real node, through the gateway."""

import time
from collections.abc import Iterator

import pytest

from demo import steps
from demo.manifests import RELEASE, RELEASE_NAMESPACE
from e2e import sleeper
from e2e.sleeper import NAME, SERVICES, TEAM
from e2e.story import ready_reason, until
from traffic.asks import Ask, Kind
from traffic.exchange import Outcome, exchange

START_S = 120
"""A worker loads its model in it; the request waits for that, and no longer than the gateway lets it."""
ASLEEP_S = 360  # a start, half a minute without a request, and the end of a worker


@pytest.fixture(scope="module")
def asleep(release: steps.Demo) -> Iterator[steps.Demo]:
    """The service, which was ready once and has gone to sleep."""
    kube = release.kube
    sleeper.begin(release)
    with release.progress.step("a service that scales goes to sleep", lambda: ready_reason(kube, TEAM, NAME)):
        until(lambda: sleeper.sleeps(kube), ASLEEP_S, lambda: ready_reason(kube, TEAM, NAME))
    yield release
    kube.run("-n", TEAM, "delete", SERVICES, NAME, "--timeout=100s")


def test_the_first_request_wakes_a_service_that_sleeps_and_is_answered(asleep: steps.Demo, keys: dict[str, str]):
    kube = asleep.kube
    replicas = ("-n", TEAM, "get", "deployments", "-o", "jsonpath={.items[*].spec.replicas}")
    assert kube.run(*replicas) == "0"
    tenant = next(iter(keys))
    ask = Ask(0, Kind.PLAIN, {"model": NAME, "messages": [{"role": "user", "content": "Wake up."}], "max_tokens": 8})
    with kube.forwarded(RELEASE_NAMESPACE, f"{RELEASE}-gateway", 80) as port:
        started = time.monotonic()
        found = exchange("127.0.0.1", port, tenant, keys[tenant], ask, timeout_s=START_S)
    print(f"from zero to an answer in {time.monotonic() - started:.1f} s: {found}")
    assert found.outcome is Outcome.FINISHED, found.note
    assert {"FirstRequest", "NoRequests"} <= sleeper.history(kube)
