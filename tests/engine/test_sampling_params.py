"""The limits of sampling parameters, which tests/server/api/test_limits.py has over HTTP."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from nybble.engine import LIMITS, ParameterError, Request, SamplingParams

# What is wrong, and what the error says besides the parameter's name.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n is 0, expected a whole number between 1 and 128"),
    ({"n": 129}, "n is 129, expected a whole number between 1 and 128"),
    ({"max_tokens": -2}, "max_tokens is -2, expected a whole number of 0 or more, or -1 for no"),
    ({"min_tokens": -1}, "min_tokens is -1, expected a whole number of 0 or more"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens is 3, expected at most the 2 of max_tokens"),
    ({"temperature": 100.5}, "temperature is 100.5, expected a number between 0 and 100"),
    ({"temperature": -0.1}, "temperature is -0.1, expected a number between 0 and 100"),
    ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p is 1.5, expected a number above 0 and at most 1"),
    ({"top_k": -2}, "top_k is -2, expected a whole number between 0 and 2147483647; 0 and -1 are"),
    ({"top_k": 10**400}, "expected a whole number between 0 and 2147483647; 0 and -1 are off"),
    ({"min_p": 1.5}, "min_p is 1.5, expected a number between 0 and 1"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number between 0.01 and 100"),
    ({"presence_penalty": 3}, "presence_penalty is 3, expected a number between -2 and 2"),
    ({"frequency_penalty": -3}, "frequency_penalty is -3, expected a number between -2 and 2"),
    ({"bad_words": ["a", " "]}, "bad_words[1] is ' ', expected a text with more than spaces"),
    ({"bad_words": ["a"] * 257}, "bad_words has 257 texts, expected at most 256"),
    ({"allowed_token_ids": []}, "allowed_token_ids has no token ids, expected 1 to 262144"),
    ({"seed": 2**63}, "seed is 9223372036854775808, expected a whole number between"),
    ({"stop": ["a"] * 17}, "stop has 17 texts, expected at most 16"),
    ({"stop": ["a", "b" * 257]}, "stop[1] has 257 characters, expected at most 256"),
    ({"stop": ["a", ""]}, "stop[1] is '', expected a text that is not empty"),
    ({"stop_token_ids": [5] * 17}, "stop_token_ids has 17 token ids, expected at most 16"),
    ({"logprobs": 21}, "logprobs is 21, expected a whole number between 0 and 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1, expected a whole number between 0 and 20"),
    ({"logprob_token_ids": [5]}, "logprob_token_ids is allowed only with logprobs"),
    ({"logprob_token_ids": [5] * 129, "logprobs": 1}, "has 129 token ids, expected at most 128"),
]
# What JSON's types exclude already.
WRONG_IN_PYTHON: list[tuple[dict[str, Any], str]] = [
    ({"seed": "a"}, "seed is 'a', expected a whole number between -9223372036854775808 and"),
    ({"seed": True}, "seed is True, expected a whole number"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5, expected a whole number"),
    ({"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
    ({"n": None}, "n is None, expected a whole number"),
    ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
    ({"temperature": float("nan")}, "temperature is nan, expected a number"),
    ({"temperature": None}, "temperature is None, expected a number"),
    ({"ignore_eos": 1}, "ignore_eos is 1, expected True or False"),
    ({"stop": 3}, "stop is 3, expected a list of texts"),
    ({"stop": ["a", 3]}, "stop[1] is 3, expected a text"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0] is 'a', expected a token id"),
    ({"stop_token_ids": 3}, "stop_token_ids is 3, expected a list of token ids"),
    ({"allowed_token_ids": "ab"}, "allowed_token_ids is 'ab', expected a list of token ids"),
    ({"logit_bias": [5]}, "logit_bias is [5], expected numbers by token id"),
    ({"logit_bias": {"5": 1}}, "logit_bias has the key '5', expected a token id"),
    ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101, expected a number between -100"),
    ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 biases, expected at most"),
]


@pytest.mark.parametrize(
    ("wrong", "says"), WRONG + WRONG_IN_PYTHON, ids=lambda each: str(each)[:40]
)
def test_a_wrong_value_is_named_with_what_is_allowed(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**wrong)
    assert says in str(caught.value)
    assert caught.value.parameter in wrong


def test_every_parameter_has_a_limit() -> None:
    own = {each.name for each in dataclasses.fields(SamplingParams)}
    assert own - LIMITS.keys() == {"shown_special_tokens"}  # the server's own
    assert LIMITS.keys() <= own


def test_other_spellings_of_the_same_are_taken() -> None:
    same = SamplingParams(top_k=-1, seed=-1, max_tokens=-1, bad_words="a", stop=["b"])
    assert same == SamplingParams(bad_words=("a",), stop="b")
    arrays = SamplingParams(
        seed=np.int64(5),
        temperature=np.float32(0.5),
        stop_token_ids=np.array([5]),
        top_k=np.int8(3),
    )
    assert arrays == SamplingParams(seed=5, temperature=0.5, stop_token_ids=(5,), top_k=3)
    kinds = [type(each) for each in (arrays.seed, arrays.temperature, arrays.stop_token_ids[0])]
    assert kinds == [int, float, int]


def test_names_of_other_libraries_are_refused_with_what_to_use_instead() -> None:
    for name, says in (
        ("max_new_tokens", "SamplingParams has no 'max_new_tokens': use max_tokens"),
        ("temprature", "SamplingParams has no 'temprature': did you mean temperature?"),
        ("xyzzy", "SamplingParams has no 'xyzzy'. It has: max_tokens, "),
    ):
        with pytest.raises(TypeError, match="SamplingParams") as caught:
            SamplingParams(**{name: 1})
        assert str(caught.value).startswith(says)


def test_each_of_n_sequences_has_a_seed_of_its_own_and_the_first_reads_the_prompt() -> None:
    several = SamplingParams(n=3, seed=2**63 - 2, prompt_logprobs=1)
    own = [several.of_sequence(index) for index in range(3)]
    assert [each.seed for each in own] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [each.prompt_logprobs for each in own] == [1, None, None]
    assert [each.n for each in own] == [1, 1, 1]
    assert (several.n, several.seed) == (3, 2**63 - 2)
    assert SamplingParams(n=2).of_sequence(1) == SamplingParams()
    with pytest.raises(ParameterError, match="n is 3, but a request is one sequence"):
        Request("r", (5,), several)
