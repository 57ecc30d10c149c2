"""What a gateway knows of its servers: the backlog of what it sent, the breaker, and who is not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.edge_plants import beat, fleet, plant, task

from gmel.edge.deciding import RULES, Decider
from gmel.edge.fleet import STALE_S, Fleet, ServerState
from gmel.edge.task import Task
from gmel.scenario.errors import InputError


def send(found: Fleet, server: ServerState, each: Task) -> None:
    server.send(found.expect(each, server), found.memory_of)


def test_the_backlog_is_what_was_sent() -> None:
    found = fleet(a=2.0)
    server = found.servers["a"]
    assert server.backlog_s(0.0) == 0.0
    send(found, server, task("1", images=4))
    send(found, server, task("2", images=2))
    assert server.backlog_s(0.0) == pytest.approx(3.0)
    server.flights["1"].began = 10.0
    assert server.backlog_s(11.5) == pytest.approx(1.5)
    # Longer than expected: it is about to end, but not gone.
    assert server.backlog_s(100.0) == pytest.approx(1.0 + 0.05 * 2.0)
    server.succeed(server.flights.pop("1"), 2.0)
    assert server.backlog_s(100.0) == pytest.approx(1.0)


def test_work_of_others_fades_with_the_age_of_the_heartbeat() -> None:
    found = fleet(a=1.0)
    server = found.hear("a", beat(foreign_s=2.0), 10.0)
    assert server.backlog_s(10.5) == pytest.approx(1.5)
    assert server.backlog_s(12.9) == 0.0
    send(found, server, task("1"))
    assert server.backlog_s(10.5) == pytest.approx(2.5), "beside what was sent, not in its place"


def test_several_gpus_wait_only_when_all_are_busy() -> None:
    found = fleet(a=1.0)
    server = found.hear("a", beat(gpus=2), 0.0)
    send(found, server, task("1"))
    assert server.backlog_s(0.0) == 0.0
    send(found, server, task("2"))
    assert server.backlog_s(0.0) == pytest.approx(1.0)


def test_a_burst_does_not_run_to_one_server() -> None:
    found = fleet(a=1.0, b=2.0, c=4.0)
    decider = Decider(found)
    for number in range(14):
        each = task(f"t{number}")
        decision = decider.decide(each, 0.0, 0.0)
        assert decision is not None
        send(found, decision.server, each)
    assert {len(server.flights) for server in found.servers.values()} == {2, 4, 8}
    assert len(found.servers["c"].flights) == 8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tasks", [1, 3, 100, 1000])
def test_a_healthy_server_under_load_is_never_left_alone(rule: str, tasks: int) -> None:
    """Whatever it holds, however long that takes: only a failure opens the breaker."""
    found = fleet(a=1.0, b=2.0, c=4.0)
    decider = Decider(found)
    decider.change(rule, 0.0)
    now = 0.0
    for number in range(tasks):
        each = task(f"t{number}")
        decision = decider.decide(each, now, 0.0)
        assert decision is not None
        send(found, decision.server, each)
        if number % 3 == 2:
            server = decision.server
            name, flight = next(iter(server.flights.items()))
            del server.flights[name]
            server.succeed(flight, 40.0)  # far slower than expected
        now += 0.001
        for name in found.servers:
            found.hear(name, beat(running=len(found.servers[name].flights)), now)
        assert len(found.usable("part", now)) == 3


def test_the_breaker_opens_lets_one_through_and_closes() -> None:
    found = fleet(a=1.0, b=1.0)
    server = found.servers["a"]
    send(found, server, task("1"))
    del server.flights["1"]
    server.fail(0.0)
    assert [each.name for each in found.usable("part", 0.4)] == ["b"]
    assert server.usable(0.6), "half open"
    send(found, server, task("2"))
    assert not server.usable(0.6), "one task tries it"
    assert server.alive(0.6), "left alone is not dead"
    server.succeed(server.flights.pop("2"), 1.0)
    assert server.usable(0.6)
    assert server.failures == 0


def test_each_failure_of_a_try_leaves_it_alone_for_longer_up_to_a_limit() -> None:
    server = fleet(a=1.0).servers["a"]
    now, pauses = 0.0, list[float]()
    for _ in range(2000):  # hours of tries: the time stays a number
        server.fail(now)
        pauses.append(server.shut_until - now)
        now = server.shut_until
    assert pauses[:4] == pytest.approx([0.5, 1.0, 2.0, 4.0])
    assert max(pauses) == pytest.approx(10.0)
    assert pauses == sorted(pauses)


def test_tasks_that_see_the_same_failure_count_once() -> None:
    server = fleet(a=1.0).servers["a"]
    for _ in range(3):
        server.fail(1.0)
    assert (server.failures, server.lost) == (1, 3)
    assert server.shut_until == pytest.approx(1.5)


@given(st.lists(st.tuples(st.sampled_from(["fail", "done", "beat", "wait"]), st.floats(0.0, 20.0)), max_size=40))
def test_whatever_happened_a_server_that_is_heard_and_idle_is_tried_again(steps: list[tuple[str, float]]) -> None:
    found = fleet(a=1.0)
    server, now = found.servers["a"], 0.0
    for what, seconds in steps:
        now += seconds
        if what == "fail":
            server.fail(now)
        elif what == "done":
            server.succeed(found.expect(task(), server), seconds)
        elif what == "beat":
            found.hear("a", beat(), now)
    found.hear("a", beat(), now)
    found.hear("a", beat(), now + 10.1)
    assert server.usable(now + 10.1)


def test_who_is_not_heard_is_not_there() -> None:
    found = fleet(a=1.0, b=1.0)
    found.hear("b", beat(), 2.0)
    assert [each.name for each in found.usable("part", STALE_S - 0.01)] == ["a", "b"]
    assert [each.name for each in found.usable("part", STALE_S)] == ["b"]
    assert found.state("part", STALE_S) == "ready"
    assert found.state("part", 2.0 + STALE_S) == "none alive"


def test_a_late_heartbeat_is_a_new_chance() -> None:
    found = fleet(a=1.0)
    server = found.servers["a"]
    for _ in range(6):
        server.fail(server.shut_until + 0.1 if server.failures else 0.0)
    found.hear("a", beat(), 7.0)
    assert server.usable(7.0), "it was away, and is back"


def test_a_draining_server_gets_nothing_and_one_without_the_model_neither() -> None:
    found = fleet(a=1.0, b=1.0)
    found.hear("a", beat(draining=True), 0.0)
    found.hear("b", beat(models=("other",)), 0.0)
    assert found.usable("part", 0.0) == []
    assert [each.name for each in found.usable("other", 0.0)] == ["b"]
    assert found.state("part", 0.0) == "not offered"


def test_servers_that_nobody_described_join_up_to_a_limit() -> None:
    found = Fleet(plant(a=1.0))
    for number in range(4095):
        found.hear(f"s{number}", beat(), 0.0)
    with pytest.raises(InputError, match="no more are taken"):
        found.hear("one-more", beat(), 0.0)
    found.hear("a", beat(), 0.0)


def test_the_model_that_comes_with_a_task_is_there_for_the_next() -> None:
    found = fleet(a=1.0)
    server = found.hear("a", beat(memory_gb=0.15), 0.0)
    other = Task("1", "d", "other")
    assert found.expect(other, server).switch_s == 2.0
    send(found, server, other)
    assert found.expect(other, server).switch_s == 0.0
    send(found, server, task("2"))  # there is room for one
    assert found.expect(other, server).switch_s == 2.0
    found.hear("a", beat(memory_gb=0.15, resident=("other",)), 0.0)
    assert found.expect(other, server).switch_s == 2.0, "what it said before it got the tasks counts less"


def test_pace_follows_what_tasks_take() -> None:
    found = fleet(a=1.0)
    server = found.servers["a"]
    for _ in range(100):
        flight = found.expect(task(), server)
        server.succeed(flight, 3.0)
    assert server.pace == pytest.approx(3.0, rel=0.01)
    assert found.expect(task(), server).service_s == pytest.approx(3.0, rel=0.01)
    server.succeed(found.expect(task(), server), 1e9)
    assert server.pace < 10, "one wild measurement does not move it far"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_pace_stays_a_number(times: list[float]) -> None:
    found = fleet(a=1.0)
    for time_s in times:
        found.servers["a"].succeed(found.expect(task(), found.servers["a"]), time_s)
    assert 0.02 <= found.servers["a"].pace <= 50.0
