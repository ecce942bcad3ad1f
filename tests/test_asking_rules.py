"""What is decided about an endpoint without asking it: pace, budget, patience, the protocol, what is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.asking import Question, Reply
from trainers.chat_protocol import SHOWN, estimated_tokens, read_reply, request_body, shown
from trainers.patience import MAX_BUSY, MAX_IN_A_ROW, Patience, delay_s, retry_after_s, trouble_of
from trainers.rate_limit import WINDOW_S, Budget, RateLimit
from trainers.reply_cache import ReplyCache, question_key

# --- pacing, pure ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "tokens"), [(5, None), (None, 100), (7, 90), (1, 10)])
def test_no_minute_sees_more_requests_or_tokens_than_the_limits_and_none_is_held_back_for_nothing(
    requests: int | None, tokens: int | None
) -> None:
    random, limit, now = np.random.default_rng(0), RateLimit(requests, tokens), 0.0
    given: list[tuple[float, int]] = []
    for _ in range(300):
        now += float(random.exponential(4.0))
        size = int(random.integers(1, 30))
        given.append((limit.reserve(size, now), size))
        assert given[-1][0] >= now
    starts = [at for at, _ in given]
    assert starts == sorted(starts)
    most = tokens or 10**9
    for first in range(len(given)):
        window = [min(size, most) for at, size in given[first:] if at < starts[first] + WINDOW_S]
        assert len(window) <= (requests or 10**9)
        assert sum(window) <= most
    assert RateLimit().reserve(10**6, 3.0) == 3.0


def test_a_request_starts_at_once_where_the_minute_before_is_empty() -> None:
    limit = RateLimit(2, None)
    assert [limit.reserve(1, t) for t in (0.0, 1.0, 2.0, 200.0)] == [0.0, 1.0, 60.0, 200.0]


def test_tokens_that_were_not_used_are_given_back_and_a_hold_stops_everybody() -> None:
    limit = RateLimit(None, 100)
    at = limit.reserve(100, 0.0)
    limit.settle(at, 100, 10)
    assert limit.reserve(90, 1.0) == 1.0
    assert limit.reserve(1, 2.0) == 60.0
    limit.hold(500.0)
    assert limit.reserve(1, 3.0) == 500.0


def test_a_budget_is_never_passed_by_what_is_under_way_and_a_failed_request_spends_no_tokens() -> None:
    budget = Budget(num_requests=4, num_tokens=100, spent=(1, 20))
    assert [budget.take(40), budget.take(40), budget.take(1)] == [None, None, "num_tokens"]
    budget.settle(40, 0)
    assert budget.take(40) is None and budget.take(0) == "num_requests"
    budget.settle(40, 10)
    budget.settle(40, 10)
    assert (budget.spent_requests, budget.spent_tokens) == (4, 40)


# --- patience, pure -------------------------------------------------------------------------------


def test_a_question_is_given_up_where_others_are_answered_and_else_the_endpoint_is_checked() -> None:
    patience = Patience(patience_s=100.0, num_retries=2)
    patience.answered(5.0)
    assert [patience.failed("slow", attempt, 0.0, 10.0, 10.0 + attempt) for attempt in (0, 1)] == ["again"] * 2
    assert patience.failed("slow", 2, 0.0, 10.0, 12.0) == "check_endpoint", "nobody was answered since it failed"
    assert patience.unchecked("slow", 0.0, 100.0) == "again"
    assert patience.unchecked("slow", 0.0, 100.0, asked_s=30.0) == "give_up_endpoint"
    assert patience.unchecked("down", 0.0, 111.0) == "give_up_endpoint"
    assert {patience.unchecked(kind, 0.0, 20.0) for kind in ("nonsense", "rejected", "refused")} == {"give_up_endpoint"}
    patience.answered(50.0)
    assert patience.failed("slow", 2, 0.0, 10.0, 60.0) == "give_up_question", "another one was answered at 50"
    assert patience.unchecked("slow", 0.0, 150.0) == "again", "the patience begins anew with each answer"
    patience = Patience(10.0, 99)
    assert patience.failed("down", 0, 0.0, 0.0, 0.0) == "again"
    assert patience.failed("down", 1, 0.0, 0.0, 11.0) == "check_endpoint", "whatever retries are left"


def test_a_rate_limit_is_waited_for_until_nobody_was_answered_for_as_long_as_the_patience_lasts() -> None:
    patience = Patience(patience_s=100.0, num_retries=0)
    assert [patience.failed("busy", i, 0.0, 1.0, now) for i, now in enumerate((1.0, 90.0))] == ["again"] * 2
    assert patience.failed("busy", 2, 0.0, 1.0, 90.0, asked_s=20.0) == "give_up_endpoint"
    patience.answered(91.0)
    assert patience.failed("busy", 3, 0.0, 1.0, 180.0) == "again", "another one was answered at 91"
    assert patience.failed("busy", MAX_BUSY, 0.0, 1.0, 190.0) == "give_up_question", "the others are answered"
    assert patience.failed("busy", 4, 0.0, 1.0, 281.0) == "give_up_endpoint"


def test_a_pause_in_which_nothing_was_asked_is_not_waiting() -> None:
    patience = Patience(patience_s=100.0, num_retries=2)
    patience.answered(0.0)
    assert patience.failed("slow", 0, 1.0, 2.0, 2.0) == "again"
    assert patience.failed("slow", 0, 1000.0, 1001.0, 1001.0) == "again", "asked in the next step, a quarter later"
    assert patience.unchecked("down", 1000.0, 1050.0) == "again"


def test_a_refusal_is_the_question_s_fault_only_where_the_endpoint_takes_another() -> None:
    patience = Patience(100.0, 0)
    assert patience.failed("refused", 0, 0.0, 0.0, 0.0) == "check_endpoint", "nothing was ever answered"
    patience.answered(1.0, is_check=True)
    assert patience.failed("refused", 1, 0.0, 0.0, 1.0) == "give_up_question"
    assert patience.failed("refused", 0, 2.0, 2.0, 2.0) == "check_endpoint"
    assert patience.unchecked("refused", 2.0, 2.0) == "give_up_endpoint", "credit that has run out, a key withdrawn"


def test_questions_that_are_refused_one_after_another_are_the_endpoint_s_fault() -> None:
    patience = Patience(100.0, 0)
    advice = []
    for _ in range(MAX_IN_A_ROW):
        patience.answered(1.0, is_check=True)
        advice.append(patience.failed("refused", 0, 0.0, 0.0, 0.0))
    assert advice == ["give_up_question"] * (MAX_IN_A_ROW - 1) + ["give_up_endpoint"]
    patience.answered(1.0)
    assert patience.failed("refused", 0, 0.0, 2.0, 2.0) == "give_up_question"


def test_every_status_is_a_trouble_of_one_kind() -> None:
    expected = {200: None, 401: "rejected", 403: "rejected", 404: "rejected", 302: "rejected", 429: "busy",
                408: "broken", 500: "broken", 503: "broken", 529: "broken", 400: "refused", 422: "refused",
                204: "nonsense", 402: "rejected", 407: "rejected"}  # fmt: skip
    assert {status: trouble_of(status) for status in expected} == expected


def test_retry_after_is_read_in_both_forms_and_no_try_comes_before_it() -> None:
    wall = 1_000_000_000.0  # Sun, 09 Sep 2001 01:46:40 GMT
    assert retry_after_s({"Retry-After": "7"}, wall) == 7.0
    assert retry_after_s({"Retry-After": "Sun, 09 Sep 2001 01:47:00 GMT"}, wall) == 20.0
    assert retry_after_s({"Retry-After": "Sun, 09 Sep 2001 01:46:00 GMT"}, wall) == 0.0
    assert retry_after_s({}, wall) is None and retry_after_s({"Retry-After": "soon"}, wall) is None
    for attempt, draw in itertools.product(range(40), (0.0, 0.5, 0.999)):
        assert delay_s(attempt, 7.0, draw) >= 7.0
        assert 0.5 <= delay_s(attempt, None, draw) <= 60.0


# --- protocol and cache, pure ---------------------------------------------------------------------


def test_what_shapes_a_reply_is_in_the_key_and_nothing_else() -> None:
    base = {"text": "Q", "max_tokens": 8, "system": "S", "temperature": 0.5, "seed": 1}
    changed: list[dict[str, Any]] = [{**base, **change} for change in (
        {"text": "R"}, {"max_tokens": 9}, {"system": None}, {"temperature": 0.6}, {"seed": 2},
    )]  # fmt: skip
    keys = {question_key(request_body("m", Question(**q), {})) for q in [base, *changed]}
    keys |= {question_key(request_body("n", Question(**base), {}))}
    keys |= {question_key(request_body("m", Question(**base), {"top_p": 0.9}))}
    assert len(keys) == 8
    assert question_key({"a": 1, "b": 2}) == question_key({"b": 2, "a": 1})


def test_a_parameter_that_is_null_is_left_out_of_the_request() -> None:
    body = request_body("m", Question("Q", 8, "S"), {"seed": None, "max_tokens": None, "max_completion_tokens": 9})
    assert body == {
        "model": "m", "temperature": 0.0, "max_completion_tokens": 9,
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
    }  # fmt: skip


def test_a_reply_is_kept_whole_and_a_torn_file_is_none(tmp_path: Path) -> None:
    cache, said = ReplyCache(tmp_path), Reply("Grüße\n", cut_off=True, num_prompt_tokens=3, num_completion_tokens=2)
    key = question_key({"q": 1})
    assert cache.get(key) is None
    cache.put(key, said)
    assert cache.get(key) == said
    file = next(tmp_path.rglob(f"{key}.json"))
    file.write_text(file.read_text()[:9])
    assert cache.get(key) is None
    cache.put(key, said)
    assert cache.get(key) == said and [f.name for f in tmp_path.rglob("*") if f.is_file()] == [f"{key}.json"]
    with pytest.raises(ValueError, match="silence"):
        cache.put(key, Reply("", "timeout"))


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b"[]", b'{"choices": [{"message": {"content": 3}}]}', b"\xff"]
)
def test_a_body_that_is_no_chat_completion_is_not_taken_for_one(body: bytes) -> None:
    assert isinstance(read_reply(body), str)


def body_of(content: Any, **choice: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}, **choice}]}).encode()


def test_a_reply_without_text_or_usage_is_empty() -> None:
    assert read_reply(body_of(None, finish_reason="length")) == Reply("", cut_off=True)


@pytest.mark.parametrize("choice", [{"finish_reason": "error"}, {"error": {"code": 502, "message": "upstream"}}])
def test_a_failure_inside_a_success_is_no_reply(choice: dict[str, Any]) -> None:
    assert isinstance(read_reply(body_of("I thi", **choice)), str)


def test_half_a_character_in_a_reply_can_be_written_and_kept(tmp_path: Path) -> None:
    found = read_reply(body_of("fine \ud83d"))
    assert isinstance(found, Reply) and found.text == "fine ?"
    key = question_key(request_body("m", Question("half \ud83d", 8), {}))
    ReplyCache(tmp_path).put(key, found)
    assert ReplyCache(tmp_path).get(key) == found


def test_a_secret_is_taken_out_of_a_body_before_the_body_is_cut() -> None:
    for secret in ("sk-" + "0123456789" * 16, 'with"quote\\and/slash' * 5):
        echo = {"error": {"message": f"{'x' * 60} Bearer {secret} {'y' * 300}"}}
        for body in (json.dumps(echo), json.dumps(echo).replace("/", "\\/"), f"{'x' * 60} Bearer {secret} and more"):
            said = shown(body.encode(), secret)
            assert "<key>" in said and secret[:10] not in said and len(said) <= SHOWN + 3


def test_an_estimate_counts_the_reply_by_the_limit_that_is_sent_and_text_by_its_bytes() -> None:
    question = Question("Q" * 300, 64, "S" * 30)
    assert estimated_tokens(request_body("m", question, {}), 64) == 110 + 8 + 64
    raised = request_body("m", question, {"max_tokens": None, "max_completion_tokens": 4096})
    assert estimated_tokens(raised, 64) == 110 + 8 + 4096
    assert estimated_tokens(request_body("m", Question("字" * 100, 8), {"max_tokens": None}), 8) == 100 + 8 + 8
