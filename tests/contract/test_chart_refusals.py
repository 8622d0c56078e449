"""Values that cannot work are refused by the chart, through the real helm, with a sentence that says what to do."""

import pytest

from charts import CHART, template

pytestmark = pytest.mark.shared

REFUSALS = {
    "no image": (
        ("image.repository=",),
        "Say which image to run: set image.repository, for example "
        "--set image.repository=registry.example.com/gpumeter-operator.",
    ),
    "no worker image": (
        ("workerImage.repository=",),
        "Say which image to run: set workerImage.repository, for example "
        "--set workerImage.repository=registry.example.com/gpumeter-worker.",
    ),
    "a tag in the repository": (
        ("image.repository=registry.example.com:5000/gpumeter:v1",),
        "image.repository is \"registry.example.com:5000/gpumeter:v1\"; give the name only, and put what follows ':' "
        "into image.tag or what follows '@' into image.digest.",
    ),
    "half a digest": (
        ("workerImage.digest=sha256:1234",),
        'workerImage.digest is "sha256:1234"; write it as sha256: and 64 hexadecimal digits, or leave it empty and use '
        "workerImage.tag.",
    ),
    "a pull policy in lower case": (
        ("image.pullPolicy=always",),
        'image.pullPolicy is "always"; use Always, IfNotPresent or Never.',
    ),
    "a period that there is not": (
        ("billing.period=2h",),
        'billing.period is "2h"; use 1h, or 1m, 5m or 15m for demos and tests.',
    ),
    "a grace period without a unit": (
        ("billing.closeGrace=5 minutes",),
        'billing.closeGrace is "5 minutes"; write a duration from 10s to 24h, for example 10m.',
    ),
    "hours that leave at once": (
        ("billing.keepDays.hours=0",),
        "billing.keepDays.hours is 0; write a number of days from 1 to 366.",
    ),
    "a class of GPU without nodes": (
        ("gpuClasses.h100.tolerations[0].key=x",),
        "gpuClasses.h100 has no nodeSelector; give it the labels of its nodes, for example {nodeSelector: "
        "{nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}}.",
    ),
    "a deletion that waits a day": (
        ("operator.deletionMargin=24h",),
        'operator.deletionMargin is "24h"; write a duration from 0s to 1h, for example 60s.',
    ),
    "metrics without an interval": (
        ("workers.podMonitor.interval=often",),
        'workers.podMonitor.interval is "often"; write a duration, for example 15s.',
    ),
    "collecting too seldom": (
        ("collector.pullInterval=1m",),
        'collector.pullInterval is "1m"; write a duration from 100ms to 4s, for example 2s, because a worker whose '
        "lease is the shortest (5s) stops admitting requests when nobody collects.",
    ),
    "collectors that cannot share a file": (
        ("collector.replicas=2",),
        "collector.replicas is 2, but the ledger is one SQLite file with one writer; set ledger.url.secretName to the "
        "Secret of a PostgreSQL that the collectors share, or leave collector.replicas at 1.",
    ),
    "a claim that is not used": (
        ("collector.persistence.enabled=false", "collector.persistence.existingClaim=bills"),
        'collector.persistence.existingClaim is "bills" but collector.persistence.enabled is false, so the claim would '
        "not be used; set enabled to true or leave existingClaim empty.",
    ),
    "two claims": (
        ("collector.persistence.storageClass=fast", "collector.persistence.existingClaim=bills"),
        'Set collector.persistence.storageClass ("fast", for a claim that the chart makes) or '
        'collector.persistence.existingClaim ("bills"), not both.',
    ),
    "a size without a unit": (
        ("collector.persistence.size=five",),
        'collector.persistence.size is "five"; write a Kubernetes quantity with a unit, for example 5Gi.',
    ),
    "a log level that there is not": (
        ("logging.level=verbose",),
        'logging.level is "verbose"; use debug, info, warning or error.',
    ),
    "a log format that there is not": (("logging.format=xml",), 'logging.format is "xml"; use json or text.'),
    "no gateway": (
        ("gateway.replicas=0",),
        "gateway.replicas is 0; without a gateway no request reaches a model, so use 1 or more.",
    ),
    "a kind of Service that there is not": (
        ("gateway.service.type=Ingress",),
        'gateway.service.type is "Ingress"; use ClusterIP, NodePort or LoadBalancer.',
    ),
    "a budget that blocks every drain": (
        ("gateway.podDisruptionBudget.maxUnavailable=0",),
        'gateway.podDisruptionBudget.maxUnavailable is "0"; use a number of pods from 1 or a percentage above 0%, '
        "because with 0 no node could be drained.",
    ),
    "a budget of the operator that blocks every drain": (
        ("operator.podDisruptionBudget.maxUnavailable=0%",),
        'operator.podDisruptionBudget.maxUnavailable is "0%"; use a number of pods from 1 or a percentage above 0%, '
        "because with 0 no node could be drained.",
    ),
    "a wait that is too long": (
        ("gateway.waitingRoom.timeout=2h",),
        'gateway.waitingRoom.timeout is "2h"; write a duration from 1s to 1h, for example 5m.',
    ),
    "hearts that beat too fast": (
        ("gateway.waitingRoom.heartbeat=100ms",),
        'gateway.waitingRoom.heartbeat is "100ms"; write a duration from 1s to 5m, for example 10s.',
    ),
    "a tenant's share that is more than the waiting room": (
        ("gateway.waitingRoom.maxRequestsPerTenant=600",),
        "gateway.waitingRoom.maxRequestsPerTenant is 600; use 0 to gateway.waitingRoom.maxRequests (512).",
    ),
    "more who wait than a gateway holds": (
        ("gateway.waitingRoom.maxRequests=2000",),
        "gateway.waitingRoom.maxRequests is 2000; use 0 to 1024, because a gateway holds 1024 requests in all.",
    ),
    "a prefix longer than any": (
        ("gateway.prefixAffinityBytes=2000000",),
        "gateway.prefixAffinityBytes is 2000000; use 0 to 1048576.",
    ),
    "no time to end": (
        ("gateway.terminationGracePeriod=1s",),
        'gateway.terminationGracePeriod is "1s"; write a duration from 20s to 1h, for example 120s.',
    ),
    "root": (
        ("podSecurityContext.runAsUser=0",),
        "podSecurityContext.runAsUser is 0; gpumeter's images run as user 65532 and need no root, so leave it or name "
        "another user above 0.",
    ),
    "a plan without a rate": (
        ("pricePlan.create=true",),
        "pricePlan.create is true but pricePlan.rates is empty; give at least one rate, for example "
        '{gpuClass: h100, perGpuHour: "2.50"}, or set pricePlan.create to false.',
    ),
    "a price as a number": (
        ("pricePlan.create=true", "pricePlan.rates[0].gpuClass=h100", "pricePlan.rates[0].perGpuHour=2"),
        "pricePlan.rates[0].perGpuHour is a bare number and would lose digits; write it in quotes, for example "
        '"2.50" (with --set use --set-string or a values file).',
    ),
    "a price with a currency": (
        ("pricePlan.create=true", "pricePlan.rates[0].gpuClass=h100", "pricePlan.rates[0].perGpuHour=$2.50"),
        'pricePlan.rates[0].perGpuHour is "$2.50"; write a plain decimal such as "2.50", without a sign, an exponent '
        "or a currency.",
    ),
    "a currency as a sign": (
        (
            "pricePlan.create=true",
            "pricePlan.rates[0].gpuClass=a",
            "pricePlan.rates[0].perGpuHour=2.50",
            "pricePlan.currency=$",
        ),
        'pricePlan.currency is "$"; write three capital letters (ISO 4217), for example USD.',
    ),
    "a rate without a price": (
        ("pricePlan.create=true", "pricePlan.rates[0].gpuClass=h100.1g.10gb", "pricePlan.rates[0].of=h100"),
        "pricePlan.rates[0] has no price; give it perGpuHour, or of and fraction for a slice of a GPU, for example "
        '{gpuClass: h100.1g.10gb, of: h100, fraction: "1/7"}.',
    ),
    "idle time for somebody": (
        (
            "pricePlan.create=true",
            "pricePlan.rates[0].gpuClass=a",
            "pricePlan.rates[0].perGpuHour=2.50",
            "pricePlan.idlePayer=acme",
        ),
        'pricePlan.idlePayer is "acme"; write platform, tenant (those who use a service share its idle time) or owner '
        "(the tenant that spec.pricing.owner of a service names).",
    ),
    "a name that is too long": (
        ("fullnameOverride=the-metered-inference-platform-of-the-company",),
        'The name "the-metered-inference-platform-of-the-company" has more than 40 characters and the names made from '
        "it would be too long; use a shorter release name or set fullnameOverride.",
    ),
}


def sentences(stderr: str) -> list[str]:
    assert "The values of the gpumeter chart cannot be used:" in stderr, stderr
    return [line.removeprefix("- ") for line in stderr.splitlines() if line.startswith("- ")]


@pytest.mark.parametrize("mistake", REFUSALS)
def test_bad_values_are_refused_with_a_sentence_and_no_other(mistake: str) -> None:
    settings, sentence = REFUSALS[mistake]
    refused = template(*settings)
    assert refused.returncode != 0
    assert sentences(refused.stderr) == [sentence]
    assert refused.stdout == ""


def test_every_sentence_of_the_chart_is_tested() -> None:
    """A refusal is one `append $problems`; those that ask a cluster are tested in the cluster ring."""
    refusals = (CHART / "templates" / "refusals.yaml").read_text().count("append $problems")
    images_twice, asks_a_cluster = 1, 6
    assert len(REFUSALS) == refusals + images_twice - asks_a_cluster


def test_all_problems_are_told_at_once() -> None:
    refused = template("billing.period=2h", "logging.level=loud", images=False)
    assert len(sentences(refused.stderr)) == 4


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("billing.perid=1m", "at '/billing': additional properties 'perid' not allowed"),
        ("collectr.pullInterval=1s", "additional properties 'collectr' not allowed"),
        ("gateway.replicas=two", "at '/gateway/replicas': got string, want integer"),
        ("collector.persistence.enabled=maybe", "at '/collector/persistence/enabled': got string, want boolean"),
        ("ledger.retentionDays=89", "at '/ledger/retentionDays': minimum: got 89, want 90"),
        ("ledger.url=postgresql://me@db/bills", "at '/ledger/url': got string, want object"),
        ("ledger.url.secretName=Bills", "at '/ledger/url/secretName': 'Bills' does not match pattern"),
        ("imagePullSecrets=registry", "at '/imagePullSecrets': got string, want array"),
    ],
)
def test_names_and_types_are_checked_by_the_schema(setting: str, words: str) -> None:
    refused = template(setting)
    assert refused.returncode != 0
    assert words in refused.stderr


@pytest.mark.parametrize(
    ("value", "accepted", "refused"),
    [
        ("billing.closeGrace", ("10s", "24h"), ("9s", "25h")),
        ("billing.keepDays.days", ("1", "1100"), ("0", "1101")),
        ("collector.pullInterval", ("100ms", "4s"), ("99ms", "4001ms")),
        ("gateway.terminationGracePeriod", ("20s", "1h"), ("19s", "61m")),
        ("gateway.waitingRoom.timeout", ("1s", "1h"), ("999ms", "61m")),
        ("gateway.waitingRoom.heartbeat", ("1s", "5m"), ("999ms", "301s")),
        ("gateway.waitingRoom.maxRequestsPerTenant", ("0", "512"), ("-1", "513")),
        ("gateway.podDisruptionBudget.maxUnavailable", ("1", "1%", "100%"), ("0%", "101%", "one")),
        ("collector.persistence.size", ("1Mi", "2Ti"), ("0Gi", "5", "5GB")),
        ("billing.period", ("1m", "5m", "15m", "1h"), ("60m", "1M")),
    ],
)
def test_bounds_are_where_the_sentence_says(value: str, accepted: tuple[str, ...], refused: tuple[str, ...]) -> None:
    for setting in accepted:
        assert template(f"{value}={setting}").returncode == 0, setting
    for setting in refused:
        assert template(f"{value}={setting}").returncode != 0, setting
