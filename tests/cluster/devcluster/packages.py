"""Programs of the machine's own distribution.

Owns which program comes from which Debian package, and installing what is missing. Does not know what they are for.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from devcluster.errors import ClusterError
from devcluster.progress import Progress

PACKAGE_OF = {
    "runc": "runc",
    "nft": "nftables",
    "conntrack": "conntrack",
    "socat": "socat",
    "openssl": "openssl",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "bridge-cni": "containernetworking-plugins",
    "buildah": "buildah",
    "skopeo": "skopeo",
    "mmdebstrap": "mmdebstrap",
}
FOR_NODE = ("runc", "nft", "conntrack", "socat", "openssl", "ip", "unshare", "nsenter", "bridge-cni")
FOR_CONTROL_PLANE = ("openssl",)
FOR_IMAGES = ("buildah", "skopeo")
FOR_BASE_IMAGES = ("mmdebstrap",)
CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def ensure(programs: Sequence[str], progress: Progress, logs: Path) -> None:
    """Install the packages of the programs that are missing, or say in words what to install."""
    lacking = missing(programs)
    if not lacking:
        return
    packages = sorted({PACKAGE_OF[program] for program in lacking})
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise ClusterError(
            f"These programs are missing: {', '.join(lacking)}. On Debian they come with: "
            f"sudo apt-get install {' '.join(packages)}"
        )
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "apt.log"
    with progress.step(f"installing {' '.join(packages)}"):
        if not install(packages, log):
            run_apt(["update"], log)
            if not install(packages, log):
                raise ClusterError(f"apt-get could not install {' '.join(packages)}.", log)
    if still := missing(programs):
        raise ClusterError(f"The packages are installed, but these programs are not found: {', '.join(still)}.", log)


def missing(programs: Iterable[str]) -> list[str]:
    return [program for program in programs if not is_there(program)]


def is_there(program: str) -> bool:
    if program == "bridge-cni":
        return cni_folder() is not None
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}") is not None


def cni_folder() -> str | None:
    return next((folder for folder in CNI_FOLDERS if (Path(folder) / "bridge").exists()), None)


def install(packages: Sequence[str], log: Path) -> bool:
    return run_apt(["install", "-y", "--no-install-recommends", *packages], log)


def run_apt(arguments: Sequence[str], log: Path) -> bool:
    """Run apt-get; it waits for another package manager rather than failing beside it."""
    with log.open("ab") as output:
        done = subprocess.run(
            ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    return done.returncode == 0
