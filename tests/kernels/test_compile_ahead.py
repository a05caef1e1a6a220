import logging
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from pilotfish.kernels import compile_ahead
from pilotfish.kernels.compile_ahead import NotedKernels, compile_all
from pilotfish.kernels.cuda import loader

MACROS = (("ROWS", 8),)

# Triton's own compiler, on a machine without a GPU: only the driver, which would load and launch, is not Triton's.
REHEARSAL = """
import threading
from types import SimpleNamespace

import torch
from pilotfish.kernels.compile_ahead import compile_all, noted_kernels
from pilotfish.kernels.rms_norm import _rms_norm_triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched, compiled = [], []

class Driver:
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda module: None,
    )
    launcher_cls = lambda self, src, metadata: lambda *args: launched.append(args[:3])
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

def norm(hidden):
    return _rms_norm_triton(torch.ones(3, hidden), torch.ones(hidden), 1e-6)

actual = Driver()
driver.set_active(actual)
torch.cuda.set_device = lambda device: None
knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append((threading.current_thread().name, cache_hit))

norm(256)
assert launched == [(3, 1, 1)] and len(compiled) == 1, (launched, compiled)
with noted_kernels() as noted:
    assert all(norm(hidden).eq(0).all() for hidden in (256, 512, 512, 1024))
    assert len(launched) == len(compiled) == 1, (launched, compiled)
    other = threading.Thread(target=norm, args=(256,))
    other.start()
    other.join()
    assert len(launched) == 2, "another thread launches"
assert driver.active is actual and knobs.runtime.jit_cache_hook is None
assert len(noted) == 3 and not noted.cuda, noted
compile_all(noted, device=torch.device("cuda", 0), num_threads=2)  # the first is loaded, and stays
threads, found = zip(*sorted(compiled[1:]), strict=True)
assert len(launched) == 2 and len(compiled) == 3 and not any(found), (launched, compiled)
assert all(thread.startswith("compile") for thread in threads), threads
for hidden in (256, 512, 1024):
    norm(hidden)
assert len(launched) == 5 and len(compiled) == 3, (launched, compiled)
try:
    with noted_kernels():
        raise KeyboardInterrupt
except KeyboardInterrupt:
    norm(512)
assert len(launched) == 6, launched

from pilotfish.kernels.online_softmax import score_keys
from pilotfish.kernels.prefill_attention import _prefill_kernel

# The constants of a callee are in its caller's key, whichever of the two is known first.
caller_first = _prefill_kernel.cache_key
assert "LOG2_E" in {name for name, _ in _prefill_kernel.used_global_vals}
_prefill_kernel.hash = None
assert score_keys.cache_key and _prefill_kernel.cache_key == caller_first
"""


def test_what_a_rehearsal_notes_is_compiled_on_threads_and_at_hand_at_its_first_launch(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PILOTFISH_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", REHEARSAL], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_cuda_kernel_is_noted_then_compiled_and_then_found(fresh_loader, monkeypatch):
    compiled = []
    monkeypatch.setattr(loader, "compile_source", lambda code, name, options: compiled.append(name) or b"cubin")
    with loader.only_noted() as noted:
        kernel = loader.load("streaming_linear", MACROS, 0)
        assert kernel == loader.load("streaming_linear", MACROS, 0)
        loader.launch(kernel, (), grid=(1, 1), num_threads=32, shared_bytes=0)
    assert list(noted) == [("streaming_linear", MACROS)]
    assert not compiled
    with pytest.raises(AssertionError, match="kept"):
        loader.launch(kernel, (), grid=(1, 1), num_threads=32, shared_bytes=0)
    for _ in range(2):
        compile_all(NotedKernels(cuda=noted), device=torch.device("cuda", 0), num_threads=2)
    assert loader.load("streaming_linear", MACROS, 0) == (b"cubin", "streaming_linear", 0)
    assert compiled == ["streaming_linear.cu"]


def test_what_cannot_be_compiled_ahead_complains_at_its_first_launch(fresh_loader, monkeypatch, caplog):
    def fail(code, name, options):
        raise loader.BuildError(f"{name} is wrong")

    def broken(specialization):
        raise ValueError(f"cannot compile {specialization}")

    monkeypatch.setattr(loader, "compile_source", fail)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    function = type("Function", (), {"device_caches": {0: ({},)}, "preload": staticmethod(broken)})
    noted = NotedKernels(triton={("kernel", "key"): (function, "these numbers")}, cuda={("streaming_linear", MACROS): None})
    with caplog.at_level(logging.WARNING):
        compile_all(noted, device=torch.device("cuda", 0), num_threads=2)
        assert "cannot compile these numbers" in caplog.text
        assert "streaming_linear.cu is wrong" not in caplog.text
        assert loader.load("streaming_linear", MACROS, 0) is None
    assert "streaming_linear.cu is wrong" in caplog.text


def test_one_process_compiles_and_the_others_wait_as_long_as_it_may_take(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path))
    order, inside, leave = [], threading.Event(), threading.Event()

    def compile_first():
        with compile_ahead._alone_on_this_machine():
            inside.set()
            leave.wait(10)
            order.append("first")

    first = threading.Thread(target=compile_first)
    first.start()
    assert inside.wait(10)
    monkeypatch.setattr(compile_ahead, "TIMEOUT_S", 0.1)
    with caplog.at_level(logging.INFO), compile_ahead._alone_on_this_machine():
        order.append("impatient")
    assert "several processes" in caplog.text
    monkeypatch.setattr(compile_ahead, "TIMEOUT_S", 10)
    monkeypatch.setattr(time, "sleep", lambda seconds: leave.set())
    with compile_ahead._alone_on_this_machine():
        order.append("second")
    first.join(10)
    assert order == ["impatient", "first", "second"]
