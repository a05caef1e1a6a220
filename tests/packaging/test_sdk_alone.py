"""`pip install pilotfish` gives the SDK: it works where its declared dependencies are all that is installed."""

import importlib.metadata
import os
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[1] / "client" / "scripted_server.py"
ALLOWED = ("grpcio", "protobuf", "typing_extensions")  # the last is grpcio's own dependency

USE = """
import asyncio, sys
import pilotfish
from pilotfish import AsyncClient, Client, SamplingParams
from pilotfish.common.errors import InvalidRequest

assert pilotfish.__file__.startswith(sys.prefix), pilotfish.__file__
address = sys.argv[1]
with Client(address) as client:
    assert client.generate("count 3", SamplingParams(max_tokens=3)).text == "1 2 3 "
    assert [delta.text for delta in client.stream_chat("Hi")] == ["user: Hi"]
    assert client.status().model == "served"
    try:
        client.generate("fail invalid_request 1")
        raise SystemExit("no error was raised")
    except InvalidRequest as error:
        assert error.message == "the server says invalid_request"

async def main():
    async with AsyncClient(address) as client:
        assert (await client.generate("count 2")).text == "1 2 "

asyncio.run(main())
parts = {name.split(".")[1] for name in sys.modules if name.startswith("pilotfish.")}
assert parts == {"client", "common", "proto"}, parts
absent = ("torch", "ray", "numpy", "transformers", "tokenizers", "jinja2", "fastapi", "pydantic")
assert not [name for name in absent if name in sys.modules]
for name in absent:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is installed here, so this proves nothing")
print("the SDK works")
"""


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and ALLOWED, which are linked from this environment: nothing is downloaded."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    for name in ALLOWED:
        distribution = importlib.metadata.distribution(name)
        assert distribution.files is not None
        for file in distribution.files:
            if ".." not in file.parts and file.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(distribution.locate_file(file))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-index", str(wheel)], check=True, timeout=120)
    return python


@pytest.fixture
def address() -> Iterator[str]:
    with subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            yield process.stdout.readline().strip()
        finally:
            watchdog.cancel()
            process.kill()


def test_the_sdk_works_with_its_declared_dependencies_alone(bare_python: Path, address: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [bare_python, "-I", "-c", USE, address],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the SDK works"
