"""Triton's interpreter as it is, but for two thirds of its time.

It replaces the language's functions by its own once a launch and module, not again whenever a kernel calls another function.
It computes no overflow conditions of integers, which it does not look at where `debug` is off.
"""

from __future__ import annotations

import dataclasses
import functools
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import triton.language as tl
from pilotfish.kernels.rms_norm import _rms_norm_kernel
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

_patch_lang = interpreter._patch_lang
_call_grid = interpreter.GridExecutor.__call__
_patched: set[ModuleType] = set()


@functools.cache
def _languages(fn: FunctionType) -> frozenset[ModuleType]:
    return frozenset(value for value in fn.__globals__.values() if isinstance(value, ModuleType) and value in (tl, tl.core))


def _patch_once(fn: FunctionType) -> Any:
    if _languages(fn) <= _patched:
        return interpreter._LangPatchScope()  # nothing to take back
    _patched.update(_languages(fn))
    return _patch_lang(fn)


def _launch(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
    _patched.clear()  # the launch before has taken its own back
    _call_grid(self, *args, **kwargs)
    _patched.clear()


def install() -> None:
    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def need_kernels_for(device: str) -> None:
    """Kernels take CPU tensors only where Triton was imported in interpreter mode, and CUDA ones only where it was not."""
    interpreted = isinstance(_rms_norm_kernel, InterpretedFunction)
    if device == "cpu" and not interpreted:
        if torch.cuda.is_available():
            pytest.skip("the interpreter needs TRITON_INTERPRET=1 on a machine with a GPU")
        pytest.fail("a test imported the kernels before TRITON_INTERPRET=1 was set")
    if device == "cuda" and interpreted:
        pytest.skip("TRITON_INTERPRET is set: the kernels would run in the interpreter")
