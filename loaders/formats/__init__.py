"""Checkpoint formats: one file each, and the only table of them.

Code elsewhere does not compare format names. It uses the object of the checkpoint's format
(:func:`format_of`) or of the format to write (:func:`writing_format`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from nybble.loaders.errors import CheckpointError
from nybble.loaders.formats.affine import AffineWeight
from nybble.loaders.formats.auto_round import AutoRound
from nybble.loaders.formats.awq import Awq
from nybble.loaders.formats.base import (
    AffineFormat,
    CodebookFormat,
    Format,
    OptionError,
    QuantizedWeight,
    WritableFormat,
    WriteOptions,
)
from nybble.loaders.formats.bitsandbytes import BitsAndBytes
from nybble.loaders.formats.codebook import CodebookWeight
from nybble.loaders.formats.compressed_fp4 import CompressedTensorsFp4
from nybble.loaders.formats.compressed_tensors import CompressedTensors, CompressedTensorsFp8
from nybble.loaders.formats.fp8 import Fp8
from nybble.loaders.formats.gguf import Gguf
from nybble.loaders.formats.gptq import Gptq
from nybble.loaders.formats.hqq import Hqq
from nybble.loaders.formats.int8 import BitsAndBytesInt8, CompressedTensorsInt8
from nybble.loaders.formats.mxfp4 import Mxfp4
from nybble.loaders.formats.other_settings import refuse_transforms, unknown_settings
from nybble.loaders.formats.settings import Settings, read_object

__all__ = [
    "FORMATS",
    "AffineFormat",
    "AffineWeight",
    "CodebookFormat",
    "CodebookWeight",
    "Format",
    "OptionError",
    "QuantizedWeight",
    "Settings",
    "WritableFormat",
    "WriteOptions",
    "format_of",
    "known_methods",
    "unknown_settings",
    "writing_format",
    "written_formats",
]

# If two have the same quant_method, the first that accepts the settings is used.
FORMATS: tuple[type[Format], ...] = (
    Gptq,
    Awq,
    BitsAndBytesInt8,
    BitsAndBytes,
    CompressedTensorsFp8,
    CompressedTensorsFp4,
    CompressedTensorsInt8,
    CompressedTensors,
    AutoRound,
    Fp8,
    Hqq,
    Mxfp4,
    Gguf,
)


def format_of(folder: Path) -> Format | None:
    """How the checkpoint in ``folder`` is quantized, from its config.json; None for 16 bits.

    Raises CheckpointError naming the field or the method that is not supported.
    """
    settings = _settings(folder)
    if settings is None:
        return None
    for format in FORMATS:
        if format.accepts(settings):
            refuse_transforms(settings, format.transforms)
            return format.from_settings(settings)
    known = ", ".join(known_methods())
    raise CheckpointError(
        f"{settings.source}: quant_method {settings.get('quant_method')!r} is not supported; "
        f"supported are {known}"
    )


def known_methods() -> list[str]:
    """Every ``quant_method`` that can be read."""
    return list(dict.fromkeys(format.quant_method for format in FORMATS))


def _settings(folder: Path) -> Settings | None:
    """``quantization_config``, or the settings file that older tools write instead."""
    path = folder / "config.json"
    found = read_object(path).get("quantization_config")
    if found is not None:
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{path}: quantization_config is not an object")
        return Settings(found, f"{path}: quantization_config")
    for format in FORMATS:
        if format.own_file is not None and (folder / format.own_file).is_file():
            path = folder / format.own_file
            return Settings({"quant_method": format.quant_method, **read_object(path)}, str(path))
    return None


def written_formats() -> list[str]:
    """The names that :func:`writing_format` takes."""
    return [name for format in FORMATS for name in format.writes]


def writing_format(
    name: str, options: WriteOptions | None = None, *, like: Format | None = None
) -> WritableFormat:
    """The format called ``name``, to be written.

    options: those left out are taken from ``like`` if both formats have the same kind of grid
        (affine or codebook), else they are the format's defaults.
    Raises ValueError for a name that is not known, OptionError for an option that the format does
    not take.
    """
    chosen = next((format for format in FORMATS if name in format.writes), None)
    if chosen is None or not issubclass(chosen, WritableFormat):
        raise ValueError(f"format {name!r} is not known; known are {', '.join(written_formats())}")
    options = options or WriteOptions()
    for field in fields(options):
        if getattr(options, field.name) and field.name not in chosen.options:
            takers = [n for f in FORMATS if field.name in f.options for n in f.writes]
            raise OptionError(field.name, f"is for {', '.join(takers)}, not for {name}")
    widths = chosen.widths if issubclass(chosen, AffineFormat) else (4,)
    if options.bits is not None and options.bits not in widths:
        known = ", ".join(map(str, widths))
        raise OptionError("bits", f"is {options.bits}, expected one of {known} for {name}")
    if isinstance(like, WritableFormat) and isinstance(like, AffineFormat) == issubclass(
        chosen, AffineFormat
    ):
        taken = {
            field: value
            for field in chosen.options
            if getattr(options, field) is None and (value := getattr(like.written, field))
        }
        options = replace(options, **taken)
    return chosen.for_writing(name, options)
