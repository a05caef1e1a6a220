"""Set before any test imports a kernel: Triton reads TRITON_INTERPRET when it is imported.

Tests have small tensors and run beside each other: torch has one thread, since more would spin while they wait for each other.
What is imported stays: the garbage collector looks at none of it.
"""

import gc
import os
import signal

import pytest
import torch

gc.disable()  # until all modules are here
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: tests interrupt this process and others
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LONGEST = ("controller", "models", "workers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders with long files first: a file is one process's, and where the last one is long the others wait for it."""
    items.sort(key=lambda item: item.path.parent.name not in _LONGEST)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured (`record_property("figures", ...)`), whether they passed or not."""
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, value in report.user_properties:
            if name == "figures" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")
