"""What a service goes through under load: a rollout, a killed operator, mistakes, a quota, an eviction, a lost node.

Owns the order of events and the evidence that they leave; judges nothing. One story and not many, because a worker
takes its time to start, and a bill takes a minute to close.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import manifests, steps
from demo.manifests import RELEASE, RELEASE_NAMESPACE
from devcluster import localnode, model, othernodes
from devcluster.layout import ClusterPaths
from devcluster.places import Place
from e2e.audit import lives_of
from e2e.chat import Chat
from e2e.stage import Act, Manifest, Stage, poll, uids
from e2e.story import PodWatch, copy_out, final_until_ns, until
from traffic.exchange import Exchange
from traffic.summary import table

TEAM = "team-faults"
NAME = "steady"
REPLICAS = 2
START_S = 240
FIRST_MODEL = manifests.MODEL_URI
SECOND_MODEL = f"pvc://{manifests.MODEL_CLAIM}/{model.SECOND}"
MISSING_MODEL = f"pvc://{manifests.MODEL_CLAIM}/typo"
MISSING_IMAGE = "localhost/no-such-image:none"
TOLERATED_S = 5


@dataclass
class Evidence:
    """Everything that the tests judge."""

    acts: dict[str, Act] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    pods_seen: list[Manifest] = field(default_factory=list)
    lost: Manifest = field(default_factory=dict)
    reports: list[Manifest] = field(default_factory=list)
    accounts: str = ""
    folder: Path = Path()

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.db"


def play(demo: steps.Demo, keys: dict[str, str], second: Place, paths: ClusterPaths, folder: Path) -> Evidence:
    """From a service with a worker on each of two nodes to its deletion with one node left."""
    stage = Stage(demo, TEAM, NAME)
    evidence = Evidence(folder=folder, acts=stage.acts)
    kube = demo.kube
    with PodWatch(kube, TEAM) as watch:
        kube.apply(manifests.namespace(TEAM))
        kube.apply(manifests.model_claim() | {"metadata": {"name": manifests.MODEL_CLAIM, "namespace": TEAM}})
        kube.apply(service(demo))
        with stage.act("start", f"{REPLICAS} workers start, one on each node", START_S):
            pass
        address = kube.get("-n", RELEASE_NAMESPACE, "service", f"{RELEASE}-gateway")["spec"]["clusterIP"]
        first_node = localnode.node_process(othernodes.first_state(paths))
        with Chat(first_node, address, keys, NAME) as chat:
            until(lambda: chat.finished() > len(keys), 60)
            roll_out(stage)
            spoil(stage)
            exhaust_quota(stage)
            evict(stage)
            lose_node(stage, chat, second, paths, evidence)
            settled = chat.finished()
            until(lambda: chat.finished() > settled + len(keys), 60)
        evidence.exchanges = sorted(chat.exchanges, key=lambda one: one.started_at_ns)
        print(f"\n{table(evidence.exchanges)}\n")
        with demo.progress.step("the service is deleted"):
            kube.run("-n", TEAM, "delete", f"inferenceservices.gpumeter.io/{NAME}", "--timeout=100s")
        watch.check()
    evidence.pods_seen = watch.seen
    return evidence


def settle(demo: steps.Demo, evidence: Evidence) -> None:
    """Wait until the last period is Final, and take the bill with the ledger behind it."""
    kube = demo.kube
    last_end_ns = max(life.ended_ns for life in lives_of(evidence.pods_seen))
    with demo.progress.step("the last period of the faults becomes Final"):
        until(lambda: final_until_ns(kube, TEAM) >= last_end_ns, 150)
    listed = kube.get("-n", TEAM, "usagereports.gpumeter.io")["items"]
    evidence.reports = [one for one in listed if one["spec"]["period"]["granularity"] not in ("Day", "Month")]
    collector = f"deployment/{RELEASE}-collector"
    command = ("-n", RELEASE_NAMESPACE, "exec", collector, "--", "gpumeter", "accounts", "--check")
    evidence.accounts = kube.run(*command, "--namespace", TEAM, "-o", "json")
    copy_out(kube, RELEASE_NAMESPACE, collector, "/var/lib/gpumeter/ledger.db", evidence.ledger)


def service(demo: steps.Demo) -> Manifest:
    """Workers that spread over the nodes, and leave one that says nothing after seconds instead of five minutes."""
    manifest: dict[str, Any] = manifests.inference_service(FIRST_MODEL, demo.image_version)
    manifest["metadata"] = {"name": NAME, "namespace": TEAM}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"gpumeter.io/inferenceservice": NAME}},
        "matchLabelKeys": ["pod-template-hash"],
    }
    tolerations = [
        {
            "key": f"node.kubernetes.io/{key}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": TOLERATED_S,
        }
        for key in ("unreachable", "not-ready")
    ]
    manifest["spec"] |= {
        "model": {**manifest["spec"]["model"], "name": NAME},
        "replicas": REPLICAS,
        "drain": {"timeout": "20s"},
        "template": {
            **manifest["spec"]["template"],
            "spec": {"topologySpreadConstraints": [spread], "tolerations": tolerations},
        },
    }
    return manifest


def roll_out(stage: Stage) -> None:
    """Another model, and in the middle of its rollout kill -9 to the operator."""
    with stage.act("rollout", "a new model is rolled out, and the operator killed meanwhile") as seen:
        stage.edit(model={"uri": SECOND_MODEL})
        until(lambda: len(stage.pods()) > REPLICAS, 30)
        seen["killed"] = stage.kill_operators()


def spoil(stage: Stage) -> None:
    """An image that does not exist, then a model that does not, then back."""
    with stage.act("mistakes", "an image and a model that do not exist are rolled out and taken back") as seen:
        stage.edit(engine={"image": MISSING_IMAGE})
        seen["image"] = stage.await_reason("ImagePullFailed", 30)
        stage.edit(engine={"image": None}, model={"uri": MISSING_MODEL})
        seen["model"] = stage.await_reason("ModelNotFound", 60)
        seen["meanwhile"] = uids(stage.ready())
        stage.edit(model={"uri": SECOND_MODEL})


def exhaust_quota(stage: Stage) -> None:
    """One more worker than the namespace may have."""
    quotas = f"/api/v1/namespaces/{TEAM}/resourcequotas"
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"pods": str(REPLICAS)}}}
    with stage.act("quota", "one more worker than the quota allows is asked for, and taken back") as seen:
        stage.api.request("POST", quotas, quota)
        until(lambda: stage.api.get(f"{quotas}/few")["status"].get("used", {}).get("pods") == str(REPLICAS), 30)
        stage.edit(replicas=REPLICAS + 1)
        seen["quota"] = stage.await_reason("QuotaExceeded", 30)
        stage.edit(replicas=REPLICAS)
        stage.api.delete(f"{quotas}/few")


def evict(stage: Stage) -> None:
    """A worker of the first node has to leave."""
    with stage.act("eviction", "a worker is evicted") as seen:
        victim = next(pod for pod in stage.ready() if pod["spec"]["nodeName"] == Place(1).name)
        seen["victim"] = victim["metadata"]["uid"]
        stage.evict(victim)
        until(lambda: seen["victim"] not in uids(stage.ready()), 30)


def lose_node(stage: Stage, chat: Chat, second: Place, paths: ClusterPaths, evidence: Evidence) -> None:
    """Every process of a node is killed at once; Kubernetes gives its worker up, and so does who runs the cluster."""
    with stage.act("loss", f"{second.name} is lost with a worker on it") as seen:
        there = [pod for pod in stage.ready() if pod["spec"]["nodeName"] == second.name]
        assert len(there) == 1, f"{len(there)} workers on {second.name}: nothing would be lost"
        evidence.lost = there[0]
        chat.ask_at_once(2 * REPLICAS)
        until(lambda: stage.running_in(evidence.lost) > 0, 30)
        othernodes.lose(paths, second)
        seen["condition"] = stage.await_reason("NodeLost", 60)
        until(lambda: len(stage.pods()) > REPLICAS, 60)
    stage.remove_by_force(evidence.lost)
    assert poll(lambda: evidence.lost["metadata"]["uid"] not in uids(stage.pods()), 20)
