"""One piece of work to one site, question by question, over a link that is a list of answers and a clock that is a number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from fedloom.runtimes.sites import exchange as module
from fedloom.runtimes.sites.exchange import Exchange, GaveUp, Patience, Unprepared
from fedloom.runtimes.sites.link import Answer
from fedloom.runtimes.sites.outbox import Message

TAKEN = Answer({"state": "taken"})


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def time_ns(self) -> int:
        return 255


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


class Script:
    """A link that gives these answers in turn, the last one for ever. An answer may be a function of the header.

    Args:
        takes: virtual seconds of each question; None: all of the patience where there is no answer, else nothing.
    """

    def __init__(self, clock: Clock, *answers: Any, takes: float | None = None) -> None:
        self.clock, self.answers, self.takes = clock, list(answers), takes
        self.asked: list[tuple[str, dict[str, Any], bytes, float]] = []

    def ask(self, site, header, data, timeout):
        self.asked.append((site, dict(header), bytes(data), timeout))
        if header["verb"] == "drop":
            return TAKEN
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer = answer(header) if callable(answer) else answer
        self.clock.now += self.takes if self.takes is not None else (timeout if answer is None else 0.0)
        return answer

    def verbs(self) -> list[str]:
        return [header["verb"] for _, header, *_ in self.asked]


PATIENCE = Patience(answer=20.0, silence=30.0, poll=5.0, prepare=100.0, deadline=None)


def exchange(link: Script, patience: Patience = PATIENCE) -> tuple[Exchange, list[Callable[[], object]]]:
    later: list[Callable[[], object]] = []
    return Exchange(link, patience, later.append), later


def done(data: bytes, size: int | None = None) -> Answer:
    return Answer({"state": "done", "size": len(data) if size is None else size}, data)


# ------------------------------------------------------------------ what is asked


def test_every_question_of_a_piece_of_work(clock, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 4)
    monkeypatch.setattr("fedloom.runtimes.sites.outbox.PIECE", 4)
    link = Script(
        clock,
        TAKEN,
        TAKEN,
        TAKEN,
        done(b"resu", 10),
        Answer({"state": "piece"}, b"lt-o"),
        Answer({"state": "piece"}, b"ne"),
    )
    exchanged, later = exchange(link)
    closed: list[int] = []
    message = Message(b"0123456789", done=closed.append)
    assert exchanged.done("a", "work", message, limit=10) == b"result-one"
    assert closed == [10], "the message is let go of once the site has it"
    put = {"verb": "put", "work": "ff-0", "kind": "work", "size": 10, "deadline": None}
    assert link.asked[:3] == [
        ("a", {**put, "offset": 0}, b"0123", 20.0),
        ("a", {**put, "offset": 4}, b"4567", 20.0),
        ("a", {**put, "offset": 8}, b"89", 20.0),
    ]
    # the site may take five seconds with this answer, and twenty more are waited for it
    assert link.asked[3] == ("a", {"verb": "wait", "work": "ff-0", "seconds": 5.0, "length": 4}, b"", 25.0)
    fetch = {"verb": "fetch", "work": "ff-0", "length": 4}
    assert link.asked[4:] == [("a", {**fetch, "offset": 4}, b"", 20.0), ("a", {**fetch, "offset": 8}, b"", 20.0)]
    assert len(later) == 1, "nobody waits for the answer to `drop`"
    later[0]()
    assert link.asked[6:] == [("a", {"verb": "drop", "work": "ff-0"}, b"", 20.0)]
    link.answers = [TAKEN, done(b"x")]
    exchanged.done("a", "work", Message(b"next"), 10)
    assert link.asked[-1][1]["work"] == "ff-1"


def test_an_empty_message_is_handed_over_as_well_and_a_small_limit_asks_for_no_more(clock):
    link = Script(clock, TAKEN, done(b""))
    assert exchange(link)[0].done("a", "prepare", Message(b""), 7) == b""
    assert link.verbs() == ["put", "wait"]
    assert link.asked[0][1]["deadline"] == 100.0, "preparing has its own time"
    assert link.asked[1][1]["length"] == 7


def test_it_waits_as_long_as_the_site_works_where_there_is_no_deadline(clock):
    working = [Answer({"state": "working"})] * 500
    link = Script(clock, TAKEN, *working, done(b"x"), takes=5.0)
    assert exchange(link)[0].done("a", "work", Message(b"w"), 10) == b"x"
    assert {timeout for _, header, _, timeout in link.asked if header["verb"] == "wait"} == {25.0}


# ------------------------------------------------------------------ waits


def test_a_site_that_takes_its_time_with_wait_is_not_silent(clock):
    """Silence counts from when the answer could have come: `waits` seconds later than that of other questions."""
    for waits, expected in ((0.0, 30.0), (100.0, 130.0)):
        clock.now = 0.0
        link = Script(clock, None, takes=10.0)
        with pytest.raises(GaveUp, match="a gives no answer") as caught:
            exchange(link)[0]._asked("a", {"verb": "wait"}, waits=waits)
        assert caught.value.reason == "lost"
        assert expected <= clock.now <= expected + 10.4
        assert {timeout for *_, timeout in link.asked} == {20.0 + waits}


def test_a_question_is_asked_again_with_a_pause_until_there_is_an_answer(clock):
    link = Script(clock, None, None, TAKEN, takes=1.0)
    assert exchange(link)[0]._asked("a", {"verb": "put"}, b"data") is TAKEN
    assert [asked[2] for asked in link.asked] == [b"data"] * 3
    assert clock.now == pytest.approx(1000.0 + 3 * 1.0 + 2 * 0.2)


def test_a_lost_answer_long_before_the_deadline_is_asked_for_again(clock):
    link = Script(clock, None, TAKEN, takes=1.0)
    assert exchange(link)[0]._asked("a", {"verb": "wait"}, until=clock.now + 100.0) is TAKEN
    assert len(link.asked) == 2


def test_near_the_deadline_no_answer_is_waited_for_longer_than_that(clock):
    link = Script(clock, None)
    with pytest.raises(GaveUp, match="a gives no answer and the deadline is over") as caught:
        exchange(link)[0]._asked("a", {"verb": "wait"}, waits=5.0, until=1007.0)
    assert caught.value.reason == "late"
    assert [timeout for *_, timeout in link.asked] == [7.0]
    link = Script(clock, None)
    with pytest.raises(GaveUp, match="deadline is over"):
        exchange(link)[0]._asked("a", {"verb": "wait"}, until=1000.0)
    assert [timeout for *_, timeout in link.asked] == [0.1], "a deadline that is over still leaves time for an answer"


# ------------------------------------------------------------------ deadlines and queues


def test_the_deadline_bounds_every_wait_and_ends_the_work(clock):
    link = Script(clock, TAKEN, Answer({"state": "working"}), takes=2.0)
    patience = Patience(answer=20.0, silence=30.0, poll=5.0, deadline=7.0)
    with pytest.raises(GaveUp, match="a was not done within its 7 seconds") as caught:
        exchange(link, patience)[0].done("a", "work", Message(b"w"), 10)
    assert caught.value.reason == "late"
    assert link.verbs() == ["put", "wait", "wait", "wait", "wait", "drop"]
    seconds = [header["seconds"] for _, header, *_ in link.asked if header["verb"] == "wait"]
    assert seconds == [5.0, 5.0, 3.0, 1.0]
    timeouts = [timeout for _, header, _, timeout in link.asked if header["verb"] == "wait"]
    assert timeouts == [8.0, 6.0, 4.0, 2.0], "one second more than the deadline, for the answer to come"
    assert link.asked[0][1]["deadline"] == 7.0


def test_the_time_of_work_begins_when_the_trainer_is_free(clock):
    states = [Answer({"state": "queued"})] * 10 + [Answer({"state": "working"})] * 3 + [done(b"x")]
    link = Script(clock, TAKEN, *states, takes=2.0)
    patience = Patience(answer=20.0, silence=30.0, poll=5.0, prepare=50.0, deadline=7.0)
    assert exchange(link, patience)[0].done("a", "work", Message(b"w"), 10) == b"x"
    link = Script(clock, TAKEN, Answer({"state": "queued"}), takes=2.0)
    with pytest.raises(GaveUp, match="a has been busy with other work for 50 seconds") as caught:
        exchange(link, patience)[0].done("a", "work", Message(b"w"), 10)
    assert caught.value.reason == "late"
    assert link.verbs()[-1] == "drop"
    assert link.verbs().count("wait") == 25


# ------------------------------------------------------------------ sites that do not do it


def test_a_site_that_knows_no_recipe_has_to_be_told(clock):
    unprepared = Answer({"state": "unprepared"})
    with pytest.raises(Unprepared):
        exchange(Script(clock, unprepared))[0].done("a", "work", Message(b"w"), 10)
    with pytest.raises(GaveUp) as caught:  # only work needs one
        exchange(Script(clock, unprepared))[0].done("a", "prepare", Message(b"w"), 10)
    assert caught.value.reason == "bad_message"


def test_work_that_is_unknown_was_lost(clock):
    link = Script(clock, TAKEN, Answer({"state": "unknown"}))
    with pytest.raises(GaveUp, match="a was started again in the middle of its work") as caught:
        exchange(link)[0].done("a", "work", Message(b"w"), 10)
    assert caught.value.reason == "lost"


def test_a_result_over_the_limit_is_not_fetched(clock):
    link = Script(clock, TAKEN, done(b"12345678", 12))
    with pytest.raises(GaveUp, match="a announced 12 bytes where at most 11 are taken") as caught:
        exchange(link)[0].done("a", "work", Message(b"w"), 11)
    assert (caught.value.reason, link.verbs()) == ("too_large", ["put", "wait", "drop"])
    link = Script(clock, TAKEN, done(b"12345678", 8))
    assert exchange(link)[0].done("a", "work", Message(b"w"), 8) == b"12345678"


@pytest.mark.parametrize(
    "answer",
    [
        done(b"123456789", 9),  # more than a piece at once
        done(b"123", 2),  # more than the whole result
    ],
)
def test_a_first_piece_of_another_size_is_refused(clock, monkeypatch, answer):
    monkeypatch.setattr(module, "PIECE", 8)
    with pytest.raises(GaveUp, match="a piece of another size than was asked for") as caught:
        exchange(Script(clock, TAKEN, answer))[0].done("a", "work", Message(b"w"), 100)
    assert caught.value.reason == "bad_message"


@pytest.mark.parametrize("piece", [b"", b"56789", b"5678901"])
def test_a_later_piece_of_another_size_is_refused(clock, monkeypatch, piece):
    """Eight bytes of which four are there: nothing, five and seven more are refused."""
    monkeypatch.setattr(module, "PIECE", 6)
    link = Script(clock, TAKEN, done(b"1234", 8), Answer({"state": "piece"}, piece))
    with pytest.raises(GaveUp, match="a piece of another size than was asked for"):
        exchange(link)[0].done("a", "work", Message(b"w"), 100)
    link = Script(clock, TAKEN, done(b"1234", 8), Answer({"state": "piece"}, b"5"), Answer({"state": "piece"}, b"678"))
    assert exchange(link)[0].done("a", "work", Message(b"w"), 100) == b"12345678"
    fetches = [(header["offset"]) for _, header, *_ in link.asked if header["verb"] == "fetch"]
    assert fetches == [4, 5]


@pytest.mark.parametrize("size", [None, "8", -1, 2.0])
def test_a_size_that_is_no_number_of_bytes_is_refused(clock, size):
    link = Script(clock, TAKEN, Answer({"state": "done", "size": size}))
    with pytest.raises(GaveUp, match="a gave an answer that cannot be read") as caught:
        exchange(link)[0].done("a", "work", Message(b"w"), 100)
    assert caught.value.reason == "bad_message"


@pytest.mark.parametrize(
    ("header", "reason", "detail"),
    [
        ({"state": "refused", "reason": "policy", "detail": "no"}, "policy", "a: no"),
        ({"state": "failed", "reason": "out_of_memory", "detail": "x" * 600}, "out_of_memory", "a: " + "x" * 500),
        ({"state": "refused", "reason": "Not A Code", "detail": "no"}, "bad_message", None),
        ({"state": "refused", "reason": 7, "detail": "no"}, "bad_message", None),
        ({"state": "refused", "reason": "policy", "detail": ["no"]}, "bad_message", None),
        ({"state": "refused", "reason": "policy"}, "bad_message", None),
        ({}, "bad_message", None),
    ],
    ids=str,
)
def test_what_a_site_says_of_work_that_it_did_not_do_is_a_code_and_a_bounded_sentence(clock, header, reason, detail):
    for answers in ((Answer(header),), (TAKEN, Answer(header)), (TAKEN, done(b"1", 2), Answer(header))):
        with pytest.raises(GaveUp) as caught:
            exchange(Script(clock, *answers))[0].done("a", "work", Message(b"w"), 100)
        assert (caught.value.reason, caught.value.detail) == (reason, detail or "a gave an answer that cannot be read")
        assert str(caught.value) == caught.value.detail


def test_numbers_of_work_are_never_used_twice(clock):
    link = Script(clock, *itertools.chain.from_iterable([TAKEN, done(b"x")] for _ in range(5)))
    exchanged, _ = exchange(link)
    for _ in range(5):
        exchanged.done("a", "work", Message(b"w"), 10)
    works = [header["work"] for _, header, *_ in link.asked if header["verb"] == "put"]
    assert len(set(works)) == 5
