"""A real Kubernetes for development and tests: a node in namespaces of its own, kind, or a control plane alone.

Owns what other code may import; the command line is in __main__. Standard library only.
"""

from devcluster.controlplane import control_plane
from devcluster.errors import ClusterError
from devcluster.tools import tool

__all__ = ["ClusterError", "control_plane", "tool"]
