"""Quantizes a 16-bit checkpoint folder into one of the public 4-bit layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nybble.loaders import CheckpointError
from nybble.loaders.packed_file import copy_model_files
from nybble.loaders.shards import Shards
from nybble.quantizers.formats import Format, module_tensors, quantization_config
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

_SHARD_BYTES = 1 << 30


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    format: Format,
    group_size: int = 128,
    sym: bool = False,
    progress: bool = True,
) -> None:
    """Round every linear layer of the decoder to 4 bits; embeddings, norms and head stay as are.

    group_size: inputs that share a scale, −1 for all of them; NF4 has blocks of 64 whatever it is.
    sym: for GPTQ, a fixed zero of 8. Raises CheckpointError where the source is quantized already
    or a layer's sizes do not fit, FileExistsError where the target has content.
    """
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" in config:
        raise CheckpointError(f"{source} is quantized already; give the 16-bit checkpoint")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shards = Shards(source)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    files: list[Path] = []

    def flush() -> None:
        path = scratch / f"model-{len(files) + 1:05}.safetensors"
        save_file(shard, path, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, path.name))
        files.append(path)
        shard.clear()

    for name in tqdm(shards.names(), desc="Quantizing", unit=" tensors", disable=not progress):
        tensor = shards.read(name)
        module, _, leaf = name.rpartition(".")
        if tensor.ndim == 2 and leaf == "weight" and ".layers." in name:
            try:
                shard.update(module_tensors(format, module, tensor, group_size, sym=sym))
            except ValueError as error:
                raise CheckpointError(f"{source}: {error}") from error
        else:
            shard[name] = tensor
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
            flush()
    flush()
    if len(files) == 1:
        files[0].rename(scratch / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": weight_map}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index))
    copy_model_files(source, scratch)
    config["quantization_config"] = quantization_config(format, group_size, sym=sym)
    (scratch / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
