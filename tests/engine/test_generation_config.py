"""The model's makers decide what a request leaves open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from nybble.engine.generation_config import (
    eos_token_ids,
    read_generation_config,
    sampling_defaults,
)


def test_sampling_parameters_are_taken_where_the_model_is_to_be_sampled() -> None:
    settings = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "eos_token_id": 2,
        "min_p": None,
    }
    assert sampling_defaults(settings) == {"temperature": 0.7, "top_k": 20}
    assert sampling_defaults(settings | {"do_sample": False}) == {}
    assert sampling_defaults({}) == {}


@pytest.mark.parametrize("value", [3, "high"])
def test_values_that_make_no_sense_are_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: .*"):
        sampling_defaults({"do_sample": True, "top_p": value})


def test_end_tokens_are_those_of_all_three_sources(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    ends = eos_token_ids(read_generation_config(folder), config, tokenizer)
    assert ends == {7, 9, config.eos_token_id, tokenizer.eos_token_id}


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        read_generation_config(tmp_path)
