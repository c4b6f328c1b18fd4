"""Triton's interpreter without the work that changes nothing, which is half of its time."""

from __future__ import annotations

import functools
from typing import Any

import pytest


def spare(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """interpreter: ``triton.runtime.interpreter``."""
    _patch_once_a_launch(interpreter, patch)
    # Each sum of integers is computed again in 64 bits, to compare it; the result is looked at only
    # if the interpreter's options say `debug`.
    assert not interpreter.interpreter_builder.options.debug
    semantic = interpreter.interpreter_semantic
    patch.setattr(semantic, "binary_op_sanitize_overflow_impl", lambda *operands: None)
    _look_up_dtypes_once(interpreter, patch)


def _patch_once_a_launch(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Triton's language is patched at each call of a function, though a launch has done that."""
    patched: set[int] = set()
    given, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = {id(interpreter.tl), id(interpreter.tl.core)}

    @functools.cache
    def named(function: Any) -> set[int]:
        return {id(each) for each in function.__globals__.values()} & languages

    def patch_language(function: Any) -> Any:
        if named(function) <= patched:
            return interpreter._LangPatchScope()
        patched.update(named(function))
        return given(function)

    def launched(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        try:
            launch(self, *arguments, **options)
        finally:
            patched.clear()

    patch.setattr(interpreter, "_patch_lang", patch_language)
    patch.setattr(interpreter.GridExecutor, "__call__", launched)


def _look_up_dtypes_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """The table of dtypes is built at each look-up; types of one name are equal."""
    given, known = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_dtype(of: Any) -> Any:
        if of.name not in known:
            known[of.name] = given(of)
        return known[of.name]

    patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
