"""Triton's interpreter without the work that changes nothing, which is half of its time."""

from __future__ import annotations

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
    given, languages = interpreter._patch_lang, {id(interpreter.tl), id(interpreter.tl.core)}

    def patch_language(function: Any) -> Any:
        named = {id(each) for each in function.__globals__.values()} & languages
        if named <= patched:
            return interpreter._LangPatchScope()
        patched.update(named)
        scope = given(function)
        restore = scope.restore

        def restored() -> None:
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    patch.setattr(interpreter, "_patch_lang", patch_language)


def _look_up_dtypes_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """The table of dtypes is built at each look-up; types of one name are equal."""
    given, known = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_dtype(of: Any) -> Any:
        if of.name not in known:
            known[of.name] = given(of)
        return known[of.name]

    patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
