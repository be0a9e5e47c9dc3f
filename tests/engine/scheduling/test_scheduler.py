"""Workflows of many slides through one pool: order, look-ahead, failures."""

import threading
from concurrent.futures import Future

import pytest

from cellseg_batch.engine.errors import ClusterError
from cellseg_batch.engine.scheduling.scheduler import TaskGroup, ThreadPool, ask, call_alone, run_workflows
from cellseg_batch.engine.scheduling.signals import Stop, Stopped


class Mortal(ThreadPool):
    """A pool whose worker dies of every call with a deadly item, and of the first ``unlucky`` calls."""

    def __init__(self, workers, deadly=(), unlucky=0):
        super().__init__(workers)
        self.deadly, self.unlucky, self.calls = set(deadly), unlucky, []

    def submit(self, call, *arguments):
        items = arguments[-1]
        self.calls.append(items)
        self.unlucky -= 1
        if self.unlucky >= 0 or self.deadly & {item for item in items if isinstance(item, int)}:
            future = Future()
            future.set_exception(SystemError("worker died"))
            return future
        return super().submit(call, *arguments)


def workflow(name, log, tasks=3):
    prepared = yield from ask(str.upper, name)
    log.append(f"{prepared} prepared")
    for step in (1, 2):
        done = []
        yield TaskGroup(lambda number, step=step: f"{name}{step}{number}", range(tasks), done.append)
        log.append(f"{prepared} pass {step}: {','.join(sorted(done))}")
    return prepared


@pytest.mark.parametrize("pool", [lambda: ThreadPool(1), lambda: ThreadPool(3), lambda: Mortal(2, unlucky=2)])
def test_every_task_of_a_pass_is_done_before_the_next_pass(pool):
    log = []
    ended = list(run_workflows((workflow(name, log) for name in "abcdefgh"), pool()))
    assert sorted(ended) == list("ABCDEFGH")
    for name in "abcdefgh":
        mine = [line for line in log if line.startswith(name.upper())]
        passes = [f"{name.upper()} pass {n}: {','.join(f'{name}{n}{i}' for i in range(3))}" for n in (1, 2)]
        assert mine == [f"{name.upper()} prepared", *passes]


def test_the_next_workflow_is_prepared_while_the_last_tasks_of_one_run():
    """The only block of the first workflow ends when the second is prepared: that never comes if it has to wait."""
    prepared = threading.Event()

    def first():
        yield from ask(str, "first")
        results = []
        yield TaskGroup(lambda _: prepared.wait(60), (0,), results.append)
        return results[0]

    def second():
        yield from ask(lambda _: prepared.set(), None)
        return True

    assert list(run_workflows((one() for one in (first, second)), ThreadPool(2))) == [True, True]


def test_workflows_and_tasks_are_opened_only_as_workers_need_them():
    opened, handed = [], []

    def workflow(number):
        opened.append(number)
        yield TaskGroup(handed.append, iter(range(5000 if number == 0 else 10**9)), lambda _: None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_workflows((workflow(number) for number in range(10**9)), ThreadPool(2)))
    assert opened == [0, 1, 2], "one workflow is opened ahead of those that are worked on"
    assert len(handed) <= 5000 + 2 * 2 * 256


def test_a_failing_task_fails_its_workflow_and_no_other():
    def fails(number):
        try:
            yield TaskGroup(lambda item: 1 // (item - 2), range(100), lambda _: None)
        except ZeroDivisionError:
            return f"{number} failed"

    def works(number):
        yield TaskGroup(str, range(3), lambda _: None)
        return f"{number} done"

    workflows = ((fails if number % 2 else works)(number) for number in range(6))
    assert sorted(run_workflows(workflows, ThreadPool(2))) == [f"{n} {'failed' if n % 2 else 'done'}" for n in range(6)]


def test_nothing_more_is_handed_out_for_a_workflow_that_has_failed():
    begun = []

    def fail(number):
        begun.append(number)
        raise OSError("full")

    def workflow():
        try:
            yield TaskGroup(fail, range(1000), lambda _: None)
        except OSError as error:
            return str(error)

    pool = ThreadPool(1)
    assert list(run_workflows(iter([workflow()]), pool)) == ["full"]
    assert len(begun) <= pool.window


def test_items_that_cannot_be_listed_fail_their_workflow():
    def items():
        yield 1
        raise OSError("gone")

    def fails():
        try:
            yield TaskGroup(str, items(), lambda _: None)
        except OSError as error:
            return str(error)

    assert list(run_workflows(iter([fails()]), ThreadPool(1))) == ["gone"]


def test_work_without_items_is_passed_over():
    def empty():
        yield TaskGroup(str, (), lambda _: None)
        return "end"

    assert list(run_workflows(iter([empty(), empty()]), ThreadPool(1))) == ["end", "end"]


def test_a_task_that_kills_its_workers_is_given_up_and_only_it():
    done, lost = [], []

    def workflow():
        yield TaskGroup(str, range(200), done.append, lambda item, error: lost.append((item, str(error))))

    pool = Mortal(2, deadly=[7, 150])
    list(run_workflows(iter([workflow()]), pool))
    assert sorted(lost) == [(7, "worker died"), (150, "worker died")]
    assert sorted(map(int, done)) == [number for number in range(200) if number not in (7, 150)]
    assert max(len(items) for items in pool.calls) > 1, "short tasks are handed out several at a time"
    assert pool.calls.count([7]) >= 2


def test_a_call_alone_is_made_again_when_its_worker_dies_and_at_last_given_up():
    assert call_alone(Mortal(1, unlucky=2), str, 7) == "7"
    with pytest.raises(ClusterError, match="3 that died of one"):
        call_alone(Mortal(1, deadly=[7]), str, 7)
    with pytest.raises(ValueError, match="seven"):
        call_alone(ThreadPool(1), int, "seven")


@pytest.mark.parametrize("grace", [60, 0.01])
def test_a_run_that_is_asked_to_stop_ends_what_has_begun_within_its_grace(grace):
    stop, release, closed, begun = Stop(grace), threading.Event(), [], []

    def block(number):
        begun.append(number)
        stop._ask(15, None)
        if grace > 1:
            release.set()
        release.wait()

    def workflow():
        try:
            yield TaskGroup(block, range(100), lambda _: None)
        finally:
            closed.append(True)

    with pytest.raises(Stopped) as stopped:
        list(run_workflows(iter([workflow()]), ThreadPool(1), stop))
    release.set()
    assert (stopped.value.exit_code, stopped.value.clean) == (143, grace > 1)
    assert (begun, closed) == ([0], [True])
