"""nybble: serve 4-bit language models, with many LoRA adapters on one base.

    from nybble import LLM, SamplingParams

    with LLM("demo") as llm:
        print(llm.generate(["def add("], SamplingParams(max_tokens=32))[0].text)

The sub-packages are links to the repository's top-level folders. They are linked below this package
because generic names such as ``kernels`` (which transformers and bitsandbytes try to import) must
not be importable by themselves.
"""

import os
from typing import TYPE_CHECKING

# By AMX, oneDNN (PyTorch's products on the CPU) sums in an order that depends on how many rows
# there are: a request's output would depend on the others. It reads this before its first product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from nybble.engine import SamplingParams
    from nybble.llm import LLM, Completion

# Imported when they are asked for: `import nybble` itself loads neither torch nor transformers.
_MODULES = {
    "LLM": "nybble.llm",
    "Completion": "nybble.llm",
    "SamplingParams": "nybble.engine",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
