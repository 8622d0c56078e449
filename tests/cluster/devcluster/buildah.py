"""buildah with a storage of its own in the cache.

Owns its options and its calls. Knows no image by name.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster import packages
from devcluster.errors import ClusterError

ALONE = ("unshare", "--mount", "--propagation", "private")


@dataclass(frozen=True)
class Buildah:
    """A storage in `folder`. Every call runs in a mount namespace of its own: buildah leaves a mount behind."""

    folder: Path

    def run(self, arguments: Sequence[str], log: Path, failure: str, cwd: Path | None = None) -> str:
        """Run one call; standard output comes back, everything else goes to the log."""
        return self.call([*self.prefix(), *arguments], log, failure, cwd)

    def call(self, command: Sequence[str], log: Path, failure: str, cwd: Path | None = None) -> str:
        with log.open("ab") as output:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=cwd,
                env=self.environment(),
                check=False,
            )
            output.write(done.stdout)
        if done.returncode != 0:
            raise ClusterError(failure, log)
        return done.stdout.decode().strip()

    def prefix(self) -> list[str]:
        storage = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")]
        return [*ALONE, "buildah", *storage, "--storage-driver", "overlay"]

    def environment(self) -> Mapping[str, str]:
        path = f"{os.environ.get('PATH', '')}:{packages.SYSTEM_PATH}"
        # chroot needs no runtime, no cgroup and no network of its own, and so works in a container, too
        return {**os.environ, "PATH": path, "BUILDAH_ISOLATION": "chroot"}

    def has(self, reference: str) -> bool:
        """Say whether an image is there; without buildah there is none."""
        if not (self.folder / "storage").exists() or packages.missing(["buildah"]):
            return False
        command = [*self.prefix(), "images", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment(), check=False)
        images = json.loads(done.stdout or "[]") if done.returncode == 0 else []
        return any(reference in (image.get("names") or []) for image in images)

    def commit_tar(self, tar: Path, reference: str, bundle: Path | None, bundle_target: str, log: Path) -> None:
        """Make an image of one layer out of a root file system, with a CA bundle that its programs trust."""
        failure = f"The image {reference} could not be made."
        container = self.run(["from", "scratch"], log, failure)
        try:
            self.run(["add", "-q", container, str(tar), "/"], log, failure)
            settings = ["--cmd", "python3"]
            if bundle:
                self.run(["copy", "-q", "--chmod", "0644", container, str(bundle), bundle_target], log, failure)
                settings += ["--env", f"SSL_CERT_FILE={bundle_target}"]
            self.run(["config", *settings, container], log, failure)
            self.run(["commit", "-q", container, reference], log, failure)
        finally:
            self.run(["rm", container], log, failure)

    def build(self, arguments: Sequence[str], context: Path, log: Path, failure: str) -> None:
        self.run(["build", "--layers", "--pull=false", *arguments, str(context)], log, failure, cwd=context)

    def push_to_folder(self, reference: str, folder: Path, log: Path) -> None:
        """Write the image as an OCI layout of uncompressed layers; those that lie there already are not written again.

        buildah's own push compresses in spite of its option: for torch's layer 20 seconds that nobody gains.
        """
        source = f"containers-storage:[overlay@{self.folder / 'storage'}+{self.folder / 'run'}]{reference}"
        failure = f"The image {reference} could not be written to {folder}."
        command = ["skopeo", "copy", "-q", "--dest-oci-accept-uncompressed-layers", source, f"oci:{folder}:{reference}"]
        self.call([*ALONE, *command], log, failure)
