"""How long a sequence may be, by the kind of a model's rotary scaling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.engine import Engine, EngineConfig
from nybble.loaders import open_checkpoint

TRAINED = 32_768
# As Qwen2.5's model cards tell users to add it to config.json.
QWEN_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTORS = [1.0] * 16  # for each pair of a head's 32 entries
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("scaling", "served", "most"),
    [
        pytest.param(None, TRAINED, TRAINED, id="none"),
        # One table of frequencies, whatever the length: original · factor.
        pytest.param(QWEN_YARN, 131_072, 131_072, id="yarn"),
        pytest.param({"rope_type": "linear", "factor": 2.0}, 65_536, 65_536, id="linear"),
        # The config's limit is that of the scaled model.
        pytest.param(LLAMA3, TRAINED, TRAINED, id="llama3"),
        # Frequencies that change with the length.
        pytest.param({"rope_type": "dynamic", "factor": 4.0}, TRAINED, TRAINED, id="dynamic"),
        pytest.param(LONGROPE, 4096, TRAINED, id="longrope"),
    ],
)
def test_a_model_is_served_up_to_where_its_rotary_table_is_exact(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    scaling: dict[str, Any] | None,
    served: int,
    most: int,
) -> None:
    """``most`` can be asked for: longrope's long factors then serve every position."""
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"max_position_embeddings": TRAINED, "rope_theta": 10_000.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))

    def offered(max_model_len: int | None) -> int:
        settings = EngineConfig(
            device="cpu", dtype=torch.bfloat16, max_num_seqs=1, max_model_len=max_model_len
        )
        return Engine.load(open_checkpoint(folder), settings, False).max_model_len

    assert offered(None) == served
    assert offered(most) == most
    with pytest.raises(ValueError, match=f"but the model goes up to {most}"):
        offered(most + 1)
