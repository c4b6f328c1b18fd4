"""The fuzz targets for a moment each; `make fuzz` runs them for longer, guided by coverage."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_spec = importlib.util.spec_from_file_location(
    "nybble_fuzz_targets", Path(__file__).with_name("targets.py")
)
assert _spec is not None
assert _spec.loader is not None
targets: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(targets)


@pytest.mark.parametrize("target", targets.TARGETS.values())
def test_hostile_input_brings_no_error_but_those_foreseen(target: Any) -> None:
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=40))
    def attack(data: bytes) -> None:
        target(data)

    attack()


@pytest.mark.parametrize("path", targets.BODIES)
def test_the_examples_that_are_changed_are_valid(path: str) -> None:
    for example in targets.EXAMPLES[path]:
        targets.parse_body(targets.changed(example, b""), targets.BODIES[path])


def test_the_folders_that_are_changed_can_be_read() -> None:
    config, tensors = targets._model()
    targets._write("config.json", targets.changed(config, b""))
    targets._write("model.safetensors", tensors)
    assert len(list(targets.open_checkpoint(targets._folder()).weights())) == 9
    settings, tensors, shapes = targets._adapter()
    targets._write("adapter_config.json", targets.changed(settings, b""))
    targets._write("adapter_model.safetensors", tensors)
    assert targets.load_adapter(targets._folder(), shapes).modules
