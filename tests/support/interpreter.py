"""Makes Triton's interpreter faster."""

from __future__ import annotations

from typing import Any

import pytest


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It patches Triton's language anew at every call of a device function, half of its time; once a launch will do."""
    from triton.language import core
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if value is interpreter.tl or value is core]
        if languages and not any(core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(fn)

    monkeypatch.setattr(interpreter, "_patch_lang", once)
