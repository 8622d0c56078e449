"""Who goes first: the tenant that was served least, and nobody saves up by staying away."""

from gpumeter_worker.engine.fairness import Lines
from gpumeter_worker.engine.sequence import Sampling, Sequence


class Line:
    """Sequences named by their tenant and number, in the order in which they come."""

    def __init__(self) -> None:
        self.lines = Lines()
        self.count = 0

    def enter(self, tenant: str) -> Sequence:
        sequence = Sequence(f"{tenant}{self.count}", 0, tenant, [1], 1, Sampling(max_tokens=1), arrival=self.count)
        self.count += 1
        self.lines.enter(sequence)
        return sequence

    def next(self, cost: int = 10) -> str:
        sequence = self.lines.first(lambda one: False)
        assert sequence is not None
        self.lines.take(sequence)
        self.lines.charge(sequence.tenant, cost)
        return sequence.session_id


def test_within_a_tenant_the_first_to_come_is_the_first_to_go() -> None:
    line = Line()
    for _ in range(3):
        line.enter("a")
    assert [line.next() for _ in range(3)] == ["a0", "a1", "a2"]


def test_a_tenant_with_a_long_line_does_not_keep_another_waiting() -> None:
    line = Line()
    for tenant in "aaaab":
        line.enter(tenant)
    assert [line.next() for _ in range(5)] == ["a0", "b4", "a1", "a2", "a3"]


def test_tenants_take_turns_by_what_their_requests_cost() -> None:
    line = Line()
    for tenant in "aaabbbbbb":
        line.enter(tenant)
    order = [line.next(cost=30 if line.lines.first(lambda one: False).tenant == "a" else 10)[0] for _ in range(8)]
    assert order == list("abbbabbb")


def test_who_comes_later_starts_with_the_lowest_of_those_who_are_here() -> None:
    line = Line()
    for tenant in "aaaa":
        line.enter(tenant)
    for _ in range(2):
        line.next(cost=100)
    for tenant in "bbbb":
        line.enter(tenant)
    assert line.lines.served("b") == 200
    assert [line.next(cost=100)[0] for _ in range(4)] == ["a", "b", "a", "b"]
    assert line.lines.served("a") == line.lines.served("b") == 400


def test_who_leaves_while_ahead_is_still_ahead_when_it_comes_back() -> None:
    line = Line()
    line.enter("b")
    ahead = line.enter("a")
    line.lines.take(ahead)
    line.lines.charge("a", 500)
    line.lines.exit(ahead)
    line.enter("a")
    assert line.lines.served("a") == 500
    assert line.next()[0] == "b"


def test_an_idle_engine_owes_nobody() -> None:
    line = Line()
    only = line.enter("a")
    line.next(cost=500)
    line.lines.exit(only)
    line.enter("a")
    assert line.lines.served("a") == 0


def test_a_preempted_sequence_stands_in_front_of_its_tenants_line() -> None:
    line = Line()
    first = line.enter("a")
    line.enter("a")
    line.lines.take(first)
    line.lines.put_back(first)
    assert len(line.lines) == 2
    assert line.next() == "a0"


def test_one_that_is_held_lets_the_next_of_its_tenant_pass() -> None:
    line = Line()
    held = line.enter("a")
    line.enter("a")
    found = line.lines.first(lambda one: one is held)
    assert found is not None
    assert found.session_id == "a1"
    assert line.lines.first(lambda one: True) is None


def test_a_million_tenants_that_came_once_are_not_remembered() -> None:
    line = Line()
    line.enter("stays")
    for number in range(20_000):
        guest = line.enter(f"t{number}")
        line.lines.take(guest)
        line.lines.charge(guest.tenant, number)
        line.lines.exit(guest)
    assert len(line.lines._served) < 10_000
