"""Minutes of bench-conservation's hour, with many crashes: whatever happens, every nanosecond has one owner."""

from pathlib import Path

import pytest

from rigs.hour import Hour, Load


@pytest.mark.parametrize("seed", (3,))
async def test_steps_slices_accounts_minutes_and_hours_agree_to_the_nanosecond(seed: int, tmp_path: Path) -> None:
    load = Load(seconds=150, arrival_s=0.4, cancel_share=0.3, engine_crash_s=40, worker_kill_s=60)
    count = await Hour(tmp_path, seed, load).run()
    assert count.problems == []
    assert count.crashes and count.kills and count.preempted and count.sessions["cancelled"], "give it another seed"
    assert count.unaccounted_ns == count.lost_ns > 0
    assert count.nonbillable_ns > 0
