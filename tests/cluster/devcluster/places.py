"""Where each node of a local cluster stands in its network: names, addresses and the pods' ranges.

Pure. The first node runs the control plane, too; the others join it. Does not know how a node is started.
"""

from dataclasses import dataclass

NODES_MAX = 4
DOMAIN_SERVER = "10.250.0.1"
"""CoreDNS listens on the first node's address."""


@dataclass(frozen=True)
class Place:
    """The node with this number, counted from 1."""

    number: int

    @property
    def is_first(self) -> bool:
        return self.number == 1

    @property
    def name(self) -> str:
        return "gpumeter-node" if self.is_first else f"gpumeter-node-{self.number}"

    @property
    def address(self) -> str:
        return f"10.250.0.{self.number}"

    @property
    def pods(self) -> str:
        """The range of the pods' addresses on this node."""
        return f"10.244.{self.number - 1}.0/24"

    @property
    def path(self) -> str:
        """Where the API has the node."""
        return f"/api/v1/nodes/{self.name}"

    @property
    def others(self) -> "tuple[Place, ...]":
        """Every other place, taken or not: a route to an empty one leads nowhere and hurts nobody."""
        return tuple(Place(number) for number in range(1, NODES_MAX + 1) if number != self.number)


FIRST = Place(1)
EVERY = tuple(Place(number) for number in range(1, NODES_MAX + 1))
