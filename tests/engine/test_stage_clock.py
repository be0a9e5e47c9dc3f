"""Busy seconds, and the stretches that they are made of."""

import threading

from cellseg_batch.engine.stage_clock import StageClock


def test_seconds_add_up_over_threads_and_are_the_sum_of_the_intervals():
    clock = StageClock(keep_intervals=True)

    def work():
        for _ in range(3):
            with clock.stage("read"):
                pass
            with clock.stage("model"):
                pass

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stage in ("read", "model"):
        spent = [one.end - one.start for one in clock.intervals if one.stage == stage]
        assert len(spent) == 6
        assert abs(sum(spent) - clock.seconds[stage]) < 1e-9


def test_a_stage_that_fails_is_counted_and_intervals_are_kept_only_when_asked_for():
    clock = StageClock()
    try:
        with clock.stage("write"):
            raise OSError
    except OSError:
        pass
    assert clock.seconds["write"] > 0
    assert clock.intervals == []
