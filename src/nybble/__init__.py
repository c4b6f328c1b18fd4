"""nybble: serve 4-bit language models, with many LoRA adapters on one base.

The sub-packages are links to the repository's top-level folders. They are linked below this package
because generic names such as ``kernels`` (which transformers and bitsandbytes try to import) must
not be importable by themselves.
"""

__version__ = "0.1.0"
