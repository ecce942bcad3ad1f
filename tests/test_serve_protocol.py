"""What may be asked of ``burnish serve``: what is taken from the recipe, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from launch.select_config import DrawSettings
from launch.serve_protocol import ApiError, read_request

ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Say something."}]}
RECIPE = DrawSettings(num_candidates=4, max_tokens=8, temperatures=(1.0, 0.5))


def asked(fewest: int = 1, **more: Any) -> Any:
    return read_request({**ASKED, **more}, "tiny", RECIPE, fewest)


def test_a_request_takes_from_the_recipe_what_it_does_not_say() -> None:
    assert asked().sampling == RECIPE and asked().seed is None and asked().messages == ASKED["messages"]
    found = asked(max_tokens=3, temperature=0, best_of=2, seed=7)
    assert found.sampling == DrawSettings(num_candidates=2, max_tokens=3, temperatures=(0.0,)) and found.seed == 7
    assert asked(max_completion_tokens=2).sampling.max_tokens == 2


def test_what_decides_nothing_is_taken_and_parts_of_a_text_are_one_text() -> None:
    assert asked(n=1, stream=False, top_p=1.0, stop=None, user="me", tools=[], tool_choice="none").sampling == RECIPE
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]
    assert asked(messages=[{"role": "user", "content": parts}]).messages == [{"role": "user", "content": "Say it."}]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"n": 2}, "n", "send 1"),
        ({"stream": True}, "stream", "send False"),
        ({"top_p": 0.9}, "top_p", "not supported"),
        ({"stop": ["x"]}, "stop", "not supported"),
        ({"guided_json": {}}, "guided_json", "leave it out"),
        ({"max_tokens": 9}, "max_tokens", "1 to 8"),
        ({"max_tokens": True}, "max_tokens", "whole number"),
        ({"best_of": 5}, "best_of", "1 to 4"),
        ({"temperature": -1}, "temperature", "0 to 2"),
        ({"temperature": float("nan")}, "temperature", "0 to 2"),
        ({"temperature": 10**5000}, "temperature", "0 to 2"),
        ({"seed": "7"}, "seed", "whole number"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "Say it."}, "messages", "list of messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages", "no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text alone"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 5}]}, "messages", "tool_calls"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "messages", "surrogate"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(more: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        asked(**more)
    assert caught.value.status == 400 and caught.value.param == param


def test_another_model_is_not_there_and_a_comparing_scorer_needs_two() -> None:
    with pytest.raises(ApiError, match="ask for 'tiny'") as caught:
        asked(model="gpt-x")
    assert caught.value.status == 404
    with pytest.raises(ApiError, match="2 to 4"):
        asked(fewest=2, best_of=1)
    with pytest.raises(ApiError, match="no JSON object"):
        read_request([ASKED], "tiny", RECIPE, 1)
