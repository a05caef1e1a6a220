"""The same tests through Triton's interpreter on the CPU and, marked `gpu`, on a GPU.

A test that asks for `device`, `dtype` or `case` runs once for each: on "cpu" in float32 and float16 with its module's SMALL
cases; on "cuda" in bfloat16 too, with the SMALL and the LARGE ones (dicts from a name to a case). Where the module's CPU_CASES
or CUDA_CASES names cases for a dtype, with those only: the interpreter is slow, and so is compiling. bfloat16 tl.dot is wrong
in the interpreter, which tests/conftest.py chooses.
"""

import itertools
from collections.abc import Iterator

import interpreter_patches
import pytest
import torch
from pilotfish.kernels.cpu.threads import use_threads
from pilotfish.kernels.cuda import loader

interpreter_patches.install()

DTYPES = {
    "cpu": (torch.float32, torch.float16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name for name in ("device", "dtype", "case") if name in metafunc.fixturenames]
    if "device" not in names:
        return
    params = []
    for device, dtypes in DTYPES.items():
        cases = getattr(metafunc.module, "SMALL", {})
        if device == "cuda":
            cases = cases | getattr(metafunc.module, "LARGE", {})
        values = {"device": [device], "dtype": dtypes, "case": cases.items()}
        for choice in itertools.product(*(values[name] for name in names)):
            chosen = dict(zip(names, choice, strict=True))
            if {"dtype", "case"} <= chosen.keys():
                wanted = getattr(metafunc.module, f"{device.upper()}_CASES", {}).get(chosen["dtype"])
                if wanted is not None and chosen["case"][0] not in wanted:
                    continue
            arguments = [value[1] if name == "case" else value for name, value in zip(names, choice, strict=True)]
            labels = [value[0] if name == "case" else str(value) for name, value in zip(names, choice, strict=True)]
            marks = [pytest.mark.gpu] if device == "cuda" else []
            params.append(pytest.param(*arguments, marks=marks, id="-".join(labels).replace("torch.", "")))
    metafunc.parametrize(names, params)


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest) -> None:
    if hasattr(request.node, "callspec") and "device" in request.node.callspec.params:
        interpreter_patches.need_kernels_for(request.node.callspec.params["device"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Of the C++ kernels, so that they share their work; torch keeps one (tests/conftest.py)."""
    use_threads(2)
    yield
    use_threads(torch.get_num_threads())


@pytest.fixture
def nvrtc() -> None:
    """Skips where there is no compiler; what it says of a source is the test's to hear."""
    pytest.importorskip("cuda.bindings")
    try:
        loader.compile_source(b'extern "C" __global__ void nothing() {}', "nothing.cu", ["--gpu-architecture=sm_90a"])
    except loader.BuildError as error:
        if "does not load" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def fresh_loader(monkeypatch, tmp_path):
    """The folder of a cache without kernels; loading one answers what was compiled."""
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "_failure", None)
    monkeypatch.setattr(loader, "_load_function", lambda path, name, index: (path.read_bytes(), name, index))
    loader.load_once.cache_clear()
    yield tmp_path / "kernels"
    loader.load_once.cache_clear()
