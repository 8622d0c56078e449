"""ServiceSpec -> manifests: everything that the operator owns for one InferenceService.

Owns the shape of the workers' pods: ports, environment, volumes, probes, security and rollout, and which objects there
are. Does not know what is in the cluster already, nor how manifests get there.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field

from gpumeter_operator.decide.access import MONITOR_API, POLICY_API, Monitoring, Peers, network_policy, pod_monitor
from gpumeter_operator.decide.credentials import Credentials
from gpumeter_operator.decide.development import notebook, notebook_secret, notebook_volumes
from gpumeter_operator.decide.names import (
    CREDENTIALS_ANNOTATION,
    DEVELOPMENT_ANNOTATION,
    DEVICES_ANNOTATION,
    DRAINING_LABEL,
    GPU_CLASS_ANNOTATION,
    HTTP_PORT,
    HTTP_PORT_NAME,
    MAIN_CONTAINER,
    MODEL_VARIABLE,
    REVISION_VARIABLE,
    SERVICE_LABEL,
    SERVICE_UID_ANNOTATION,
    TEMPLATE_ANNOTATION,
    USAGE_PORT,
    USAGE_PORT_NAME,
)
from gpumeter_operator.decide.owned import Manifest, fingerprint, labels, owned, stamped
from gpumeter_operator.decide.placement import NodeChoice, keep_whole, leave_lost_nodes, placement
from gpumeter_operator.decide.spec import ServiceSpec
from gpumeter_operator.decide.template import GPUS_VARIABLE, NO_GPUS, merge_template

USER_ID = 65532
START_TIMEOUT_S = 3_600  # fetching 100 GB of weights at 30 MB/s; what cannot start ends by itself before


@dataclass(frozen=True, slots=True)
class Installation:
    """What the release, not the service, decides about workers."""

    worker_image: str
    worker_image_pull_policy: str
    gateway_url: str
    gpu_classes: Mapping[str, NodeChoice] = field(default_factory=dict)
    peers: Peers | None = None  # None: no NetworkPolicies
    monitoring: Monitoring | None = None  # None: no PodMonitors
    development_image: str = ""  # with JupyterLab; empty: a service that wants a notebook names its own


@dataclass(frozen=True, slots=True)
class Workload:
    """The manifests of one service, and the hash of the pod template that current pods carry."""

    secrets: tuple[Manifest, ...]
    others: tuple[Manifest, ...]  # in the order of application; the Deployment is the last
    absent: tuple[Manifest, ...]  # that a former version or installation may have made; only apiVersion, kind and names
    template_hash: str
    credentials_fingerprint: str

    @property
    def deployment(self) -> Manifest:
        """The Deployment of the workers."""
        return self.others[-1]


def build(
    spec: ServiceSpec,
    wanted: int,
    installation: Installation,
    credentials: Credentials,
    *,
    marked: bool = True,
    monitored: bool = True,
) -> Workload:
    """All manifests of a service without problems, for `wanted` workers.

    `marked` is false while some pod has no label that says whether it drains: a Service that asked for it would cut off
    the pods of a former version before the new ones are ready. `monitored` is false where the cluster knows no
    PodMonitors.
    """
    chosen, absent = _by_choice(spec, installation, monitored=monitored)
    template, template_hash = _pod_template(spec, installation, credentials)
    return Workload(
        secrets=(_secret(spec, credentials), *((notebook_secret(spec, credentials),) if spec.jupyter else ())),
        others=tuple(
            stamped(manifest)
            for manifest in (
                _service_account(spec),
                _service(spec, marked=marked),
                _usage_service(spec),
                _disruption_budget(spec),
                *chosen,  # before the pods, which are never without their policy
                _deployment(spec, wanted, template),
            )
        ),
        absent=absent,
        template_hash=template_hash,
        credentials_fingerprint=_credentials_mark(spec, credentials),
    )


def _by_choice(
    spec: ServiceSpec, installation: Installation, *, monitored: bool
) -> tuple[tuple[Manifest, ...], tuple[Manifest, ...]]:
    """What the installation has chosen that services have, and what must not be there because it has not."""
    made, absent = [], []
    if installation.peers:
        made.append(network_policy(spec, installation.peers))
    else:
        absent.append(owned(spec, POLICY_API, "NetworkPolicy", spec.name))
    if monitored and installation.monitoring:
        made.append(pod_monitor(spec, installation.monitoring))
    elif monitored:
        absent.append(owned(spec, MONITOR_API, "PodMonitor", spec.name))
    return tuple(made), tuple(absent)


def selector(service_name: str) -> str:
    """Label selector of the workers, as text."""
    return f"{SERVICE_LABEL}={service_name}"


def url(spec: ServiceSpec) -> str:
    """Base URL of the OpenAI-compatible API inside the cluster."""
    return f"http://{spec.name}.{spec.namespace}.svc:{HTTP_PORT}/v1"


def _secret(spec: ServiceSpec, credentials: Credentials) -> Manifest:
    values = {"usage-token": credentials.usage_token, "hop-key": credentials.hop_key}
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return owned(spec, "v1", "Secret", f"{spec.name}-usage", type="Opaque", data=data)


def _service_account(spec: ServiceSpec) -> Manifest:
    return owned(spec, "v1", "ServiceAccount", spec.name, automountServiceAccountToken=False)


def _service(spec: ServiceSpec, *, marked: bool) -> Manifest:
    return owned(
        spec,
        "v1",
        "Service",
        spec.name,
        spec={
            "selector": {SERVICE_LABEL: spec.name, **({DRAINING_LABEL: "false"} if marked else {})},
            "ports": [{"name": HTTP_PORT_NAME, "port": HTTP_PORT, "targetPort": HTTP_PORT_NAME, "protocol": "TCP"}],
        },
    )


def _usage_service(spec: ServiceSpec) -> Manifest:
    return owned(
        spec,
        "v1",
        "Service",
        f"{spec.name}-usage",
        spec={
            "clusterIP": "None",
            # A worker that is not ready, or drains, still has records to hand over.
            "publishNotReadyAddresses": True,
            "selector": {SERVICE_LABEL: spec.name},
            "ports": [{"name": USAGE_PORT_NAME, "port": USAGE_PORT, "targetPort": USAGE_PORT_NAME, "protocol": "TCP"}],
        },
    )


def _disruption_budget(spec: ServiceSpec) -> Manifest:
    return owned(
        spec,
        "policy/v1",
        "PodDisruptionBudget",
        spec.name,
        spec={
            # maxUnavailable, not minAvailable: with one worker the latter would block the drain of a node for ever.
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": {SERVICE_LABEL: spec.name}},
        },
    )


def _deployment(spec: ServiceSpec, wanted: int, template: Manifest) -> Manifest:
    return owned(
        spec,
        "apps/v1",
        "Deployment",
        spec.name,
        spec={
            "replicas": wanted,
            "revisionHistoryLimit": 3,
            "selector": {"matchLabels": {SERVICE_LABEL: spec.name}},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": spec.max_surge, "maxUnavailable": spec.max_unavailable},
            },
            "progressDeadlineSeconds": START_TIMEOUT_S,
            "template": template,
        },
    )


def _pod_template(spec: ServiceSpec, installation: Installation, credentials: Credentials) -> tuple[Manifest, str]:
    worker = _main_container(spec, installation)
    ours: Manifest = {
        "metadata": {
            "labels": {**labels(spec), DRAINING_LABEL: "true" if spec.jupyter else "false"},
            "annotations": {
                SERVICE_UID_ANNOTATION: spec.uid,
                DEVICES_ANNOTATION: str(max(spec.gpu_count, 1)),
                GPU_CLASS_ANNOTATION: spec.gpu_class,
                CREDENTIALS_ANNOTATION: _credentials_mark(spec, credentials),
                **({DEVELOPMENT_ANNOTATION: "true"} if spec.jupyter else {}),
            },
        },
        "spec": {
            "serviceAccountName": spec.name,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": spec.termination_grace_s,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **placement(spec, installation.gpu_classes),
            "containers": [notebook(worker, spec, installation.development_image) if spec.jupyter else worker],
            "volumes": notebook_volumes(_volumes(spec), spec) if spec.jupyter else _volumes(spec),
        },
    }
    merged = merge_template(ours, spec.template)
    if spec.gpu_count:
        merged["spec"] = keep_whole(merged["spec"])
    merged["spec"] = leave_lost_nodes(merged["spec"])
    template_hash = fingerprint(merged)
    annotations = {**merged["metadata"]["annotations"], TEMPLATE_ANNOTATION: template_hash}
    return {**merged, "metadata": {**merged["metadata"], "annotations": annotations}}, template_hash


def _credentials_mark(spec: ServiceSpec, credentials: Credentials) -> str:
    """Which Secrets the pods were made with; another mark has them written before the pods."""
    return f"{credentials.fingerprint}-jupyter" if spec.jupyter else credentials.fingerprint


def _main_container(spec: ServiceSpec, installation: Installation) -> Manifest:
    gpus = {spec.gpu_resource_name: str(spec.gpu_count)} if spec.gpu_count else {}

    def probe(path: str, **timing: int) -> Manifest:
        return {"httpGet": {"path": path, "port": HTTP_PORT_NAME}, "timeoutSeconds": 5, **timing}

    return {
        "name": MAIN_CONTAINER,
        "image": spec.engine_image or installation.worker_image,
        "imagePullPolicy": installation.worker_image_pull_policy,
        "args": ["serve"],
        "ports": [
            {"name": HTTP_PORT_NAME, "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": USAGE_PORT_NAME, "containerPort": USAGE_PORT, "protocol": "TCP"},
        ],
        "env": _environment(spec, installation),
        "resources": {
            "requests": {"cpu": spec.cpu, "memory": spec.memory, **gpus},
            # No limit on CPU: throttling the thread that launches kernels would stretch every step.
            "limits": {"memory": spec.memory, **gpus},
        },
        "volumeMounts": _mounts(spec),
        # Three probes: while starting nothing kills the worker (loading may take long, and a fatal problem ends it by
        # itself); alive means that the process answers; ready means loaded, journal writable, not draining.
        "startupProbe": probe("/healthz", periodSeconds=2, failureThreshold=START_TIMEOUT_S // 2),
        "livenessProbe": probe("/healthz", periodSeconds=10, failureThreshold=6),
        "readinessProbe": probe("/readyz", periodSeconds=2, failureThreshold=2),
        # Where a worker dies without its own last words, the end of its log explains more than an exit code.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _environment(spec: ServiceSpec, installation: Installation) -> list[Manifest]:
    values = {
        "GPUMETER_SERVICE": spec.reference,
        "GPUMETER_SERVICE_UID": spec.uid,
        "GPUMETER_MODEL_NAME": spec.model_name,
        MODEL_VARIABLE: _worker_uri(spec),
        REVISION_VARIABLE: spec.model_revision,
        "GPUMETER_DTYPE": spec.dtype,
        "GPUMETER_MAX_MODEL_LEN": str(spec.max_model_len),
        "GPUMETER_MAX_BATCH_SIZE": str(spec.max_batch_size),
        "GPUMETER_MAX_BATCH_TOKENS": str(spec.max_batch_tokens),
        "GPUMETER_MAX_WAIT_MS": str(spec.max_wait_ms),
        "GPUMETER_MAX_QUEUE_LENGTH": str(spec.max_queue_length),
        "GPUMETER_CUDA_GRAPHS": str(int(spec.cuda_graphs)),
        "GPUMETER_COMPILE": str(int(spec.compile)),
        "GPUMETER_GPU_COUNT": str(spec.gpu_count),
        "GPUMETER_GPU_CLASS": spec.gpu_class,
        "GPUMETER_ATTRIBUTION": spec.attribution,
        "GPUMETER_CHECKPOINT_INTERVAL_MS": str(spec.checkpoint_interval_ms),
        "GPUMETER_LEASE_TIMEOUT_MS": str(spec.lease_timeout_ms),
        "GPUMETER_DRAIN_TIMEOUT_MS": str(spec.drain_timeout_ms),
        "GPUMETER_JOURNAL_DIR": "/var/lib/gpumeter",
        "GPUMETER_CREDENTIALS_DIR": "/etc/gpumeter/credentials",
        "GPUMETER_MODEL_CACHE": "/var/cache/gpumeter",
        "GPUMETER_GATEWAY_URL": installation.gateway_url,
        "HOME": "/tmp",  # noqa: S108 - the root is read-only, and libraries insist on a home
    }
    if spec.tensor > 1:  # only then: another template would have every worker of an upgraded operator replaced
        values["GPUMETER_TENSOR_PARALLEL"] = str(spec.tensor)
    if not spec.gpu_count:  # else the device plugin says which
        values[GPUS_VARIABLE] = NO_GPUS
    pod_uid = {"name": "GPUMETER_WORKER_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    return [{"name": name, "value": value} for name, value in values.items()] + [pod_uid]


def _claim_and_path(uri: str) -> tuple[str, str]:
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path.rstrip("/")


def _worker_uri(spec: ServiceSpec) -> str:
    if not spec.model_uri.startswith("pvc://"):
        return spec.model_uri
    return f"file:///mnt/models/{_claim_and_path(spec.model_uri)[1]}".rstrip("/")


def _volumes(spec: ServiceSpec) -> list[Manifest]:
    cache: Manifest = (
        {"persistentVolumeClaim": {"claimName": spec.cache_claim}} if spec.cache_claim else {"emptyDir": {}}
    )
    volumes: list[Manifest] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "journal", "emptyDir": {}},
        {"name": "cache", **cache},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": spec.shared_memory}},
        # 0440: readable by the group that fsGroup gives the worker, and by nobody else.
        {"name": "credentials", "secret": {"secretName": f"{spec.name}-usage", "defaultMode": 0o440}},
    ]
    if spec.model_uri.startswith("pvc://"):
        claim = {"claimName": _claim_and_path(spec.model_uri)[0], "readOnly": True}
        volumes.append({"name": "model", "persistentVolumeClaim": claim})
    return volumes


def _mounts(spec: ServiceSpec) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        {"name": "journal", "mountPath": "/var/lib/gpumeter"},
        {"name": "cache", "mountPath": "/var/cache/gpumeter"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
        {"name": "credentials", "mountPath": "/etc/gpumeter/credentials", "readOnly": True},
    ]
    if spec.model_uri.startswith("pvc://"):
        mounts.append({"name": "model", "mountPath": "/mnt/models", "readOnly": True})
    return mounts
