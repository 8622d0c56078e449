"""The command lines and configuration files of Kubernetes' own programs.

Owns every flag, with its reason where it is not plain. Pure: starts nothing, reads and writes no file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from devcluster.places import DOMAIN_SERVER, Place

SERVICE_RANGE = "10.96.0.0/16"
SERVICE_API = "10.96.0.1"
POD_RANGE = "10.244.0.0/16"
DOMAIN = "cluster.local"
NODE_SILENCE_S = 20
"""A node that says nothing for so long is not Ready, and neither are its pods."""


@dataclass(frozen=True)
class Component:
    """One program that is kept running: its name is also its log's."""

    name: str
    argv: tuple[str, ...]


@dataclass(frozen=True)
class ControlPlane:
    """Where a control plane listens and where its certificates and data are."""

    programs: dict[str, Path]
    pki: Path
    data: Path
    address: str
    port: int
    etcd_port: int
    etcd_peer_port: int

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def etcd_url(self) -> str:
        return f"http://127.0.0.1:{self.etcd_port}"

    def kubeconfig(self, identity: str) -> Path:
        return self.pki / f"{identity}.kubeconfig"


def etcd(plane: ControlPlane) -> Component:
    peers = f"http://127.0.0.1:{plane.etcd_peer_port}"
    return Component(
        "etcd",
        (
            str(plane.programs["etcd"]),
            f"--data-dir={plane.data / 'etcd'}",
            f"--listen-client-urls={plane.etcd_url}",
            f"--advertise-client-urls={plane.etcd_url}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            "--unsafe-no-fsync",  # this data may be lost with the machine; waiting for the disk doubles every write
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=30m",
            "--logger=zap",
            "--log-level=warn",
        ),
    )


def apiserver(plane: ControlPlane, *, alone: bool) -> Component:
    """Return the API server; `alone` means that no node belongs to it and it listens on 127.0.0.1."""
    argv = [
        str(plane.programs["kube-apiserver"]),
        f"--etcd-servers={plane.etcd_url}",
        f"--bind-address={plane.address if alone else '0.0.0.0'}",
        f"--advertise-address={plane.address}",
        f"--secure-port={plane.port}",
        f"--tls-cert-file={plane.pki / 'apiserver.crt'}",
        f"--tls-private-key-file={plane.pki / 'apiserver.key'}",
        f"--client-ca-file={plane.pki / 'ca.crt'}",
        f"--service-account-key-file={plane.pki / 'sa.pub'}",
        f"--service-account-signing-key-file={plane.pki / 'sa.key'}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",  # beside those that are on by default
        "--allow-privileged=true",
        f"--kubelet-client-certificate={plane.pki / 'kubelet-client.crt'}",
        f"--kubelet-client-key={plane.pki / 'kubelet-client.key'}",
        "--kubelet-preferred-address-types=InternalIP",
        "--profiling=false",
    ]
    if alone:
        argv.append("--endpoint-reconciler-type=none")  # a Service cannot lead to a loopback address
    return Component("kube-apiserver", tuple(argv))


def controller_manager(plane: ControlPlane, *, alone: bool) -> Component:
    argv = [
        str(plane.programs["kube-controller-manager"]),
        f"--kubeconfig={plane.kubeconfig('controller-manager')}",
        f"--service-account-private-key-file={plane.pki / 'sa.key'}",
        f"--root-ca-file={plane.pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={plane.pki / 'ca.crt'}",
        f"--cluster-signing-key-file={plane.pki / 'ca.key'}",
        "--leader-elect=false",
        "--profiling=false",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        # Without it every controller has the manager's own few rights: no garbage collection, no aggregated roles.
        "--use-service-account-credentials",
    ]
    # The default of 20 requests a second makes start-up and every rollout wait for nothing but this limit.
    argv += ["--kube-api-qps=200", "--kube-api-burst=400"]
    if alone:
        argv.append("--secure-port=0")  # nobody asks it, and two on one machine would want one port
    else:
        argv += ["--allocate-node-cidrs", f"--cluster-cidr={POD_RANGE}"]
        # Kubelets here report every 5 s; the default of 50 s would make every test of a lost node wait for it.
        argv.append(f"--node-monitor-grace-period={NODE_SILENCE_S}s")
    return Component("kube-controller-manager", tuple(argv))


def scheduler(plane: ControlPlane) -> Component:
    return Component(
        "kube-scheduler",
        (
            str(plane.programs["kube-scheduler"]),
            f"--kubeconfig={plane.kubeconfig('scheduler')}",
            "--leader-elect=false",
            "--profiling=false",
        ),
    )


@dataclass(frozen=True)
class Node:
    """A node's name, address and folders, as they are seen from inside the node."""

    programs: dict[str, Path]
    place: Place
    home: Path
    sockets: Path
    cni_programs: str
    cgroups_version: int

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def address(self) -> str:
        return self.place.address

    @property
    def containerd_socket(self) -> Path:
        return self.sockets / "containerd.sock"


def containerd(node: Node) -> Component:
    return Component("containerd", (str(node.programs["containerd"]), "-c", str(node.home / "containerd.toml")))


def kubelet(node: Node, kubeconfig: Path) -> Component:
    return Component(
        "kubelet",
        (
            str(node.programs["kubelet"]),
            f"--kubeconfig={kubeconfig}",
            f"--config={node.home / 'kubelet.json'}",
            "--root-dir=/var/lib/kubelet",
            f"--node-ip={node.address}",
            f"--hostname-override={node.name}",
        ),
    )


def proxy(node: Node, kubeconfig: Path) -> Component:
    return Component(
        "kube-proxy",
        (
            str(node.programs["kube-proxy"]),
            f"--kubeconfig={kubeconfig}",
            "--proxy-mode=nftables",
            f"--cluster-cidr={POD_RANGE}",
            f"--hostname-override={node.name}",
            "--conntrack-max-per-core=0",  # the limit is the machine's, not this namespace's to set
        ),
    )


def coredns(node: Node) -> Component:
    return Component("coredns", (str(node.programs["coredns"]), "-conf", str(node.home / "Corefile")))


def corefile(node: Node, kubeconfig: Path, context: str) -> str:
    return f""".:53 {{
  bind {node.address}
  errors
  kubernetes {DOMAIN} in-addr.arpa {{
    kubeconfig {kubeconfig} {context}
    pods insecure
  }}
  cache 5
  loadbalance
}}
"""


def containerd_toml(node: Node, pause_image: str) -> str:
    """Return containerd's configuration: every folder that it would make by itself is named, so none is the host's."""
    home = node.home / "containerd"
    return f"""version = 3
root = "{home / "root"}"
state = "/run/containerd-state"
temp = "/run/containerd-temp"
[grpc]
  address = "{node.containerd_socket}"
[ttrpc]
  address = "/run/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause_image}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{node.cni_programs}"]
  conf_dir = "{node.home / "cni"}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.internal.v1.opt"]
  path = "{home / "opt"}"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
"""


def cni_conflist(place: Place) -> str:
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,  # a pod may reach itself through its Service
        "ipam": {
            "type": "host-local",
            "dataDir": "/run/cni-addresses",  # forgotten when the node stops, as its pods are
            "ranges": [[{"subnet": place.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, portmap]}, indent=1)


def kubelet_json(node: Node, pki: Path) -> str:
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "containerRuntimeEndpoint": f"unix://{node.containerd_socket}",
            "clusterDNS": [DOMAIN_SERVER],
            "clusterDomain": DOMAIN,
            "resolvConf": str(node.home / "resolv.conf"),
            "failSwapOn": False,
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
                "webhook": {"enabled": True},
            },
            "authorization": {"mode": "Webhook"},
            "volumePluginDir": str(node.home / "volume-plugins"),
            # The machine's disk is shared with everything else: a share of it says nothing about this node.
            "evictionHard": {"imagefs.available": "1%", "nodefs.available": "1%", "memory.available": "100Mi"},
            "imageGCHighThresholdPercent": 99,
            "imageGCLowThresholdPercent": 98,
            "maxPods": 200,
            "nodeStatusUpdateFrequency": "5s",
            "syncFrequency": "5s",
            "serializeImagePulls": False,
        },
        indent=1,
    )
