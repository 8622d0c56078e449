"""One service's way through a story of faults: its start on two nodes, the traffic, its end and its bill.

Owns what every such story has in common, and the evidence. What happens in between, and in which order, is the
stories'; what it should have come to, the tests'.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
from e2e.stage import Act, Manifest, Stage
from e2e.story import PodWatch, copy_out, final_until_ns, until
from traffic.exchange import Exchange, Outcome
from traffic.summary import table

REPLICAS = 2
START_S = 240
FIRST_MODEL = manifests.MODEL_URI
SECOND_MODEL = f"pvc://{manifests.MODEL_CLAIM}/{model.SECOND}"
TOLERATED_S = 5


@dataclass(frozen=True)
class Scene:
    """The cluster on which a story is played: its release, its tenants' keys, and the node that can be lost."""

    demo: steps.Demo
    keys: dict[str, str]
    paths: ClusterPaths
    second: Place


@dataclass(frozen=True)
class Absence:
    """A node died with a worker's pod on it, and was there again with its disk."""

    pod_uid: str
    died_ns: int
    back_ns: int


@dataclass
class Evidence:
    """Everything that the tests judge.

    `lost`: pods of which nobody can say when they ended, by when they were lost. `absences`: pods whose node came back.
    """

    namespace: str
    name: str
    folder: Path
    acts: dict[str, Act] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    pods_seen: list[Manifest] = field(default_factory=list)
    lost: list[tuple[int, Manifest]] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)
    reports: list[Manifest] = field(default_factory=list)
    accounts: str = ""

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.db"

    @property
    def deaths_ns(self) -> list[int]:
        """When workers died without warning, so that their last records may have died with them."""
        return [*(died_ns for died_ns, _ in self.lost), *(one.died_ns for one in self.absences)]


def during(evidence: Evidence, *acts: str) -> list[Exchange]:
    """The requests that were under way in these acts; without any, nothing would be tested."""
    found = []
    for act in acts:
        own = [one for one in evidence.exchanges if evidence.acts[act].meets(one.started_at_ns, one.ended_at_ns)]
        assert any(one.outcome is Outcome.FINISHED for one in own), f"no request was answered in {act}"
        found += own
    return found


def unanswered(evidence: Evidence, act: str, excuses: Collection[str] = ()) -> list[Exchange]:
    """Those of an act that were not answered, but for what was under way in an act that may have ended it."""
    excused = [evidence.acts[name] for name in excuses]
    return [
        one
        for one in during(evidence, act)
        if one.outcome is not Outcome.FINISHED
        and not any(each.meets(one.started_at_ns, one.ended_at_ns) for each in excused)
    ]


@contextmanager
def ordeal(scene: Scene, stage: Stage, evidence: Evidence, **spec: Any) -> Iterator[Chat]:
    """A service with a worker on each of two nodes, under load; deleted when the block ends."""
    kube, namespace, name = scene.demo.kube, evidence.namespace, evidence.name
    evidence.acts = stage.acts
    with PodWatch(kube, namespace, patient=True) as watch:
        kube.apply(manifests.namespace(namespace))
        kube.apply(manifests.model_claim() | {"metadata": {"name": manifests.MODEL_CLAIM, "namespace": namespace}})
        kube.apply(service(scene.demo, namespace, name, spec))
        with stage.act("start", f"{namespace}/{name} starts, with workers on two nodes", START_S):
            pass
        address = kube.get("-n", RELEASE_NAMESPACE, "service", f"{RELEASE}-gateway")["spec"]["clusterIP"]
        first = localnode.node_process(othernodes.first_state(scene.paths))
        with Chat(first, address, scene.keys, name) as chat:
            await_answers(chat, scene)
            yield chat
            await_answers(chat, scene)
        evidence.exchanges = sorted(chat.exchanges, key=lambda one: one.started_at_ns)
        print(f"\n{table(evidence.exchanges)}\n")
        with scene.demo.progress.step("the service is deleted"):
            kube.run("-n", namespace, "delete", f"inferenceservices.gpumeter.io/{name}", "--timeout=100s")
        watch.check()
    evidence.pods_seen = watch.seen


def await_answers(chat: Chat, scene: Scene) -> None:
    """Until every tenant may have had one more answer."""
    so_far = chat.finished()
    until(lambda: chat.finished() > so_far + len(scene.keys), 60)


def settle(demo: steps.Demo, evidence: Evidence) -> None:
    """Wait until the last period is Final, and take the bill with the ledger behind it."""
    kube, namespace = demo.kube, evidence.namespace
    last_end_ns = max(life.ended_ns for life in lives_of(evidence.pods_seen))
    with demo.progress.step(f"the last period of {namespace} becomes Final"):
        until(lambda: final_until_ns(kube, namespace) >= last_end_ns, 150)
    listed = kube.get("-n", namespace, "usagereports.gpumeter.io")["items"]
    evidence.reports = [one for one in listed if one["spec"]["period"]["granularity"] not in ("Day", "Month")]
    collector = f"deployment/{RELEASE}-collector"
    command = ("-n", RELEASE_NAMESPACE, "exec", collector, "--", "gpumeter", "accounts", "--check")
    evidence.accounts = kube.run(*command, "--namespace", namespace, "-o", "json")
    copy_out(kube, RELEASE_NAMESPACE, collector, "/var/lib/gpumeter/ledger.db", evidence.ledger)


def service(demo: steps.Demo, namespace: str, name: str, spec: dict[str, Any]) -> Manifest:
    """Workers that spread over the nodes, and leave one that says nothing after seconds instead of five minutes."""
    manifest: dict[str, Any] = manifests.inference_service(FIRST_MODEL, demo.image_version)
    manifest["metadata"] = {"name": name, "namespace": namespace}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"gpumeter.io/inferenceservice": name}},
        "matchLabelKeys": ["pod-template-hash"],
    }
    silent = [f"node.kubernetes.io/{word}" for word in ("unreachable", "not-ready")]
    tolerations = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATED_S} for key in silent
    ]
    # Calibration takes seconds of every start, and nothing here is about who pays how much of a step.
    quick = {"name": "main", "env": [{"name": "GPUMETER_CALIBRATION_MS", "value": "0"}]}
    own = {"topologySpreadConstraints": [spread], "tolerations": tolerations, "containers": [quick]}
    manifest["spec"] |= {
        "model": {**manifest["spec"]["model"], "name": name},
        "replicas": REPLICAS,
        "drain": {"timeout": "20s"},
        "template": {**manifest["spec"]["template"], "spec": own},
        **spec,
    }
    return manifest
