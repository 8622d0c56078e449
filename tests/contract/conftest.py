"""How the contract ring is shared out among processes."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep all that runs an engine in one process: two engines would fight for the processors, and both crawl."""
    if item.path.name.startswith("test_worker_"):
        item.add_marker(pytest.mark.xdist_group("engine"))
