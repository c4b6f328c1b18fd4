"""The model's makers decide what a request leaves open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from nybble.engine import Engine, EngineConfig
from nybble.engine.generation_config import (
    eos_token_ids,
    read_generation_config,
    sampling_defaults,
)
from nybble.loaders import open_checkpoint


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 3),
        ("top_p", "high"),
        ("top_p", [0.5]),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_k", 2.5),
        ("top_k", "20"),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("do_sample", "yes"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(name: str, value: object) -> None:
    for samples in ({"do_sample": True}, {"do_sample": False}, {}):
        with pytest.raises(ValueError, match=rf"generation_config\.json: {name}"):
            sampling_defaults({**samples, name: value})


def test_forms_that_mean_the_same_are_taken() -> None:
    found = sampling_defaults({"do_sample": True, "top_k": 20.0, "temperature": 1})
    assert (found, type(found["top_k"])) == ({"top_k": 20, "temperature": 1}, int)
    assert sampling_defaults({"do_sample": True, "top_k": -1, "top_p": None}) == {"top_k": 0}
    assert sampling_defaults({"do_sample": None}) == {}


def test_end_tokens_are_those_of_all_three_sources(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    ends = eos_token_ids(read_generation_config(folder), config, tokenizer, config.vocab_size)
    assert ends == {7, 9, config.eos_token_id, tokenizer.eos_token_id}


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        read_generation_config(tmp_path)


@pytest.fixture
def read_ends(tiny_model: Callable[..., Path]) -> Callable[[object], set[int]]:
    """The end tokens that a generation_config.json adds to the model's own."""
    config = AutoConfig.from_pretrained(tiny_model())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())

    def read(value: object) -> set[int]:
        own = eos_token_ids({}, config, tokenizer, config.vocab_size)
        found = eos_token_ids({"eos_token_id": value}, config, tokenizer, config.vocab_size)
        return set(found - own)

    return read


@pytest.mark.parametrize(
    ("value", "ends"),
    [([7, None], {7}), (7.0, {7}), ([7.0, 9], {7, 9}), (-1, set()), ([], set()), (None, set())],
)
def test_harmless_forms_of_end_tokens_are_taken(
    read_ends: Callable[[object], set[int]], value: object, ends: set[int]
) -> None:
    assert read_ends(value) == ends


@pytest.mark.parametrize("value", ["</s>", 7.5, True, {"id": 7}, [[7]]])
def test_what_is_no_token_id_is_named(
    read_ends: Callable[[object], set[int]], value: object
) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id in generation_config\.json is"):
        read_ends(value)


def test_an_end_token_that_never_comes_is_left_out_with_a_warning(
    read_ends: Callable[[object], set[int]], caplog: pytest.LogCaptureFixture
) -> None:
    assert read_ends([7, 10**6, -5]) == {7}
    assert len(caplog.messages) == 2
    assert "1000000, outside the vocabulary" in caplog.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"do_sample": true, "top_k": "20"}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer.json", "{}"),
        ("1_Pooling/config.json", "3"),
    ],
)
def test_loading_names_the_file_that_makes_no_sense(
    tmp_path: Path, tiny_model: Callable[..., Path], file: str, content: str
) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "m"))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    names = {"tokenizer_config.json": "the tokenizer of"}
    name = names.get(file, file.replace(".", r"\."))
    with pytest.raises(ValueError, match=name):
        Engine.load(open_checkpoint(folder), EngineConfig(kv_cache_bytes=1 << 20), progress=False)
