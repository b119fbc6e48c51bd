"""The line of waiting requests: who is next, who gives way, and that nobody is starved."""

from hypothesis import given
from hypothesis import strategies as st

from agent.config import WaitingSection
from agent.core.types import LatencyClass
from agent.routing.line import Line, Ticket

REALTIME, NEAR, BATCH = LatencyClass.REALTIME, LatencyClass.NEAR, LatencyClass.BATCH


def line(**settings: int) -> Line:
    return Line(WaitingSection.model_validate(settings))


def join(line: Line, latency_class: LatencyClass, name: str, priority: int = 5) -> Ticket:
    ticket, evicted = line.join(latency_class, priority, name)
    assert ticket is not None
    assert evicted is None
    return ticket


def taken(line: Line) -> list[str]:
    order = []
    while (ticket := line.take(lambda _: True)) is not None:
        order.append(ticket.holder)
    return order


def test_by_class_then_priority_then_arrival() -> None:
    waiting = line()
    join(waiting, BATCH, "batch")
    join(waiting, NEAR, "near")
    join(waiting, NEAR, "urgent near", priority=9)
    join(waiting, NEAR, "later near")
    join(waiting, REALTIME, "realtime")
    assert taken(waiting) == ["realtime", "urgent near", "near", "later near", "batch"]
    assert len(waiting) == 0


def test_whoever_has_no_room_is_passed_by() -> None:
    waiting = line()
    join(waiting, REALTIME, "realtime")
    join(waiting, BATCH, "batch")
    ticket = waiting.take(lambda ticket: ticket.holder != "realtime")
    assert ticket is not None
    assert ticket.holder == "batch"
    assert waiting.take(lambda _: False) is None
    assert len(waiting) == 1


def test_after_so_many_who_were_let_past_the_oldest_is_next() -> None:
    waiting = line(passed_over=3)
    join(waiting, BATCH, "batch")
    for number in range(6):
        join(waiting, REALTIME, f"realtime {number}")
    assert taken(waiting)[:5] == ["realtime 0", "realtime 1", "realtime 2", "batch", "realtime 3"]


def test_the_same_within_a_class_for_a_low_priority() -> None:
    waiting = line(passed_over=2)
    join(waiting, NEAR, "low", priority=1)
    for number in range(4):
        join(waiting, NEAR, f"high {number}", priority=9)
    assert taken(waiting)[:4] == ["high 0", "high 1", "low", "high 2"]


def test_a_full_class_lets_a_higher_priority_in_for_its_lowest() -> None:
    waiting = line(near=2)
    join(waiting, NEAR, "first", priority=3)
    join(waiting, NEAR, "second", priority=3)
    assert waiting.join(NEAR, 3, "third") == (None, None)
    ticket, evicted = waiting.join(NEAR, 4, "more urgent")
    assert ticket is not None
    assert evicted is not None
    assert evicted.holder == "second"
    assert taken(waiting) == ["more urgent", "first"]


def test_a_full_line_sheds_the_lowest_class_first() -> None:
    waiting = line(total=2)
    join(waiting, BATCH, "batch")
    join(waiting, NEAR, "near")
    _, evicted = waiting.join(REALTIME, 1, "realtime")
    assert evicted is not None
    assert evicted.holder == "batch"
    _, evicted = waiting.join(REALTIME, 1, "another")
    assert evicted is not None
    assert evicted.holder == "near"
    assert waiting.join(REALTIME, 1, "third") == (None, None)
    assert waiting.join(BATCH, 10, "batch again") == (None, None)


def test_whoever_leaves_is_gone_once() -> None:
    waiting = line()
    ticket = join(waiting, NEAR, "near")
    assert waiting.leave(ticket)
    assert not waiting.leave(ticket)
    assert taken(waiting) == []


def test_who_precedes_whom() -> None:
    waiting = line()
    join(waiting, NEAR, "near", priority=5)
    assert not waiting.precedes(REALTIME, 1)
    assert not waiting.precedes(NEAR, 6)
    assert waiting.precedes(NEAR, 5)
    assert waiting.precedes(BATCH, 10)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.sampled_from(list(LatencyClass)), st.integers(1, 10)),
        st.tuples(st.just("take"), st.sampled_from(list(LatencyClass)), st.just(0)),
        st.tuples(st.just("leave"), st.sampled_from(list(LatencyClass)), st.integers(0, 30)),
    ),
    max_size=120,
)


@given(steps)
def test_no_bound_is_exceeded_and_nobody_is_lost(steps: list[tuple[str, LatencyClass, int]]) -> None:
    bounds = {"realtime": 2, "near": 3, "interactive": 4, "batch": 5}
    waiting = line(**bounds, total=8, passed_over=2)
    inside: dict[int, Ticket] = {}
    for number, (step, latency_class, value) in enumerate(steps):
        if step == "join":
            ticket, evicted = waiting.join(latency_class, value, number)
            if evicted is not None:
                del inside[evicted.holder]
            if ticket is not None:
                inside[number] = ticket
        elif step == "take":
            taken = waiting.take(lambda ticket, only=latency_class: ticket.latency_class is only)
            if taken is not None:
                del inside[taken.holder]
        elif inside:
            ticket = inside.pop(sorted(inside)[value % len(inside)])
            assert waiting.leave(ticket)
        assert len(waiting) == len(inside) <= 8
        assert all(count <= bounds[name] for name, count in waiting.counts().items())


def test_under_a_stream_of_the_tightest_class_every_class_moves_on() -> None:
    waiting = line(passed_over=4)
    for latency_class in LatencyClass:
        for number in range(5):
            join(waiting, latency_class, f"{latency_class.value} {number}")
    served: list[str] = []
    for number in range(100):
        ticket = waiting.take(lambda _: True)
        assert ticket is not None
        served.append(ticket.holder)
        join(waiting, REALTIME, f"more {number}")
    for latency_class in LatencyClass:
        assert sum(name.startswith(latency_class.value) for name in served) == 5
