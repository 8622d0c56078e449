from gpumeter_operator.gateway.demand import QUIET, Board, Demand

FIRST = 1_000
ONE, TWO = Demand(1, 0, 5), Demand(2, 7, 5)


def test_who_knows_nothing_is_told_all_that_is_not_quiet() -> None:
    board = Board(FIRST)
    board.put("a/m", ONE)
    board.put("a/n", TWO)
    board.put("a/n", QUIET)
    change = board.since(None)
    assert (change.whole, change.services) == (True, {"a/m": ONE})


def test_who_knows_a_version_is_told_what_changed_since_and_what_went_quiet() -> None:
    board = Board(FIRST)
    board.put("a/m", ONE)
    board.put("a/n", TWO)
    known = board.version
    board.put("a/n", QUIET)
    change = board.since(known)
    assert (change.whole, change.services) == (False, {"a/n": QUIET})
    assert board.since(change.version).services == {}


def test_what_has_not_changed_makes_no_version() -> None:
    board = Board(FIRST)
    assert not board.put("a/m", QUIET)
    assert board.put("a/m", ONE)
    assert not board.put("a/m", ONE)
    assert board.version == FIRST + 1


def test_a_version_of_a_former_process_or_of_the_future_is_told_all() -> None:
    board = Board(FIRST)
    board.put("a/m", ONE)
    for version in (0, FIRST - 1, FIRST + 2):
        assert board.since(version).whole
    assert not board.since(FIRST).whole


def test_only_urgent_changes_move_the_urgent_version() -> None:
    board = Board(FIRST)
    board.put("a/m", ONE)
    assert board.urgent_version == FIRST
    board.put("a/n", ONE, urgent=True)
    board.put("a/m", TWO)
    assert board.urgent_version == FIRST + 2 < board.version


def test_quiet_services_are_not_remembered_for_ever() -> None:
    board = Board(FIRST, entries_max=10)
    board.put("a/m", ONE)
    known = board.version
    for number in range(20):
        board.put(f"b/{number}", ONE)
        board.put(f"b/{number}", QUIET)
    assert board.since(known).whole
    assert board.since(known).services == {"a/m": ONE}
    assert not board.since(board.version).whole
