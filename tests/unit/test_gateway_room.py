import random

import pytest

from gpumeter_operator.gateway.refusal import Refusal
from gpumeter_operator.gateway.room import Bounds, Room, Ticket

BOUNDS = Bounds(requests=6, tenant_requests=4, size=600, tenant_size=400)


def enter(room: Room, tenant: str, service: str = "a/m", size: int = 10, now_ns: int = 0) -> Ticket:
    ticket = room.ticket(service, tenant, size, now_ns)
    room.enter(ticket)
    return ticket


def served(room: Room, service: str = "a/m", now_ns: int = 0) -> list[Ticket]:
    """Everybody in the order in which they are let out."""
    order = []
    while (ticket := room.first(service, now_ns)) is not None:
        room.admit(ticket)
        order.append(ticket)
    return order


def test_inside_a_tenant_the_oldest_goes_first() -> None:
    room = Room(BOUNDS)
    tickets = [enter(room, "acme") for _ in range(4)]
    assert served(room) == tickets


def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few() -> None:
    room = Room(BOUNDS)
    many = [enter(room, "acme") for _ in range(4)]
    few = [enter(room, "bolt") for _ in range(2)]
    assert served(room) == [many[0], few[0], many[1], few[1], many[2], many[3]]


def test_services_do_not_wait_for_each_other() -> None:
    room = Room(BOUNDS)
    one, other = enter(room, "acme", "a/m"), enter(room, "acme", "a/n")
    assert served(room, "a/n") == [other]
    assert room.services == ("a/m",)
    assert served(room) == [one]
    assert room.services == ()


def test_a_request_that_no_worker_took_has_its_old_place_again() -> None:
    room = Room(BOUNDS)
    tickets = [enter(room, "acme") for _ in range(3)]
    room.admit(tickets[0])
    room.come_back(tickets[0])
    assert served(room) == tickets


def test_a_request_that_pauses_lets_others_go_and_is_first_when_its_time_has_come() -> None:
    room = Room(BOUNDS)
    first, second, third = (enter(room, "acme") for _ in range(3))
    room.admit(first)
    first.not_before_ns = 100
    room.come_back(first)
    assert room.first("a/m", 99) is second
    assert room.first_pause_ns("a/m", 99) == 100
    room.admit(second)
    assert served(room, now_ns=100) == [first, third]


@pytest.mark.parametrize(("size", "fits"), [(1, 4), (100, 4), (200, 2), (401, 0)])
def test_one_tenant_may_have_so_many_requests_and_bytes_in_the_room(size: int, fits: int) -> None:
    room = Room(BOUNDS)
    for _ in range(fits):
        enter(room, "acme", size=size)
    with pytest.raises(Refusal) as refused:
        enter(room, "acme", size=size)
    assert (refused.value.status, refused.value.code) == (503, "tenant_waiting_room_full")
    assert refused.value.retry_after_s > 0
    enter(room, "bolt", size=1)


@pytest.mark.parametrize(("size", "fits"), [(1, 6), (100, 6), (150, 4)])
def test_all_together_may_have_so_many_requests_and_bytes_in_the_room(size: int, fits: int) -> None:
    room = Room(BOUNDS)
    for number in range(fits):
        enter(room, f"tenant-{number}", size=size)
    with pytest.raises(Refusal) as refused:
        enter(room, "acme", size=size)
    assert (refused.value.status, refused.value.code) == (503, "waiting_room_full")


def test_who_comes_back_is_not_asked_for_room_because_it_was_let_in_before() -> None:
    room = Room(BOUNDS)
    ticket = enter(room, "acme")
    room.admit(ticket)
    for _ in range(4):
        enter(room, "acme")
    room.come_back(ticket)
    assert room.count("a/m") == 5


def test_a_place_that_is_given_back_is_free_for_the_next() -> None:
    room = Room(BOUNDS)
    tickets = [enter(room, "acme") for _ in range(4)]
    room.leave(tickets[2])
    tickets.append(enter(room, "acme"))
    assert served(room) == [tickets[0], tickets[1], tickets[3], tickets[4]]
    assert room.requests == 0


def test_who_has_waited_longest_is_known() -> None:
    room = Room(BOUNDS)
    assert room.since_ns("a/m") is None
    old = enter(room, "acme", now_ns=5)
    enter(room, "bolt", now_ns=7)
    assert room.since_ns("a/m") == 5
    room.admit(old)
    assert room.since_ns("a/m") == 7


@pytest.mark.parametrize("seed", range(20))
def test_however_they_come_and_go_no_tenant_gets_two_turns_while_another_waits(seed: int) -> None:
    chance, room = random.Random(seed), Room(Bounds(10**6, 10**6, 10**9, 10**9))
    inside: list[Ticket] = []
    turns_since: dict[str, int] = {}
    for _ in range(400):
        move = chance.random()
        if move < 0.5:
            inside.append(enter(room, chance.choice("abcde")))
        elif inside and move < 0.6:
            room.leave(inside.pop(chance.randrange(len(inside))))
        elif (ticket := room.first("a/m", 0)) is not None:
            room.admit(ticket)
            inside.remove(ticket)
            assert all(ticket.number < one.number for one in inside if one.tenant == ticket.tenant)
            for tenant in {one.tenant for one in inside} - {ticket.tenant}:
                turns_since[tenant] = turns_since.get(tenant, 0) + 1
                assert turns_since[tenant] <= 4, "five tenants: each turn comes after at most four others"
            turns_since[ticket.tenant] = 0
        for tenant in set(turns_since) - {one.tenant for one in inside}:
            turns_since[tenant] = 0
        assert room.requests == room.count("a/m") == len(inside)
