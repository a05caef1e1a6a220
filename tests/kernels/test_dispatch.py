import logging

import pytest
import torch
from pilotfish.kernels import dispatch
from pilotfish.kernels.cpu import library
from pilotfish.kernels.cpu import ops as cpu_ops
from pilotfish.kernels.rms_norm import rms_norm, rms_norm_ref


@pytest.fixture
def set_mode(monkeypatch):
    def set_to(mode):
        monkeypatch.setenv("PILOTFISH_KERNELS", mode)
        forget()

    def forget():
        dispatch.kernel_mode.cache_clear()
        dispatch._choose.cache_clear()

    yield set_to
    monkeypatch.undo()
    forget()


def test_ref_forces_references(set_mode):
    set_mode("ref")
    assert dispatch.choose_backend("rms_norm", torch.zeros(2), torch.zeros(2)) == "reference"
    assert all("PILOTFISH_KERNELS=ref" in text for text in dispatch.backend_report().values())
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm_ref(x, weight, 1e-6))


def test_an_unknown_mode_names_the_known_ones(set_mode):
    set_mode("fast")
    with pytest.raises(ValueError, match="auto, invariant, ref"):
        dispatch.kernel_mode()


def test_mixed_and_unserved_devices_are_refused(set_mode):
    set_mode("auto")
    with pytest.raises(ValueError, match="one device"):
        dispatch.choose_backend("rms_norm", torch.zeros(2), torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="no kernel serves"):
        dispatch.choose_backend("rms_norm", torch.zeros(2, device="meta"))


def test_a_cpu_op_without_a_twin_runs_its_reference_and_says_so_once(set_mode, monkeypatch, caplog):
    monkeypatch.setattr(library, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cpu_ops, "supports", lambda op, *dtypes: op == "rms_norm")
    set_mode("auto")
    assert dispatch.choose_backend("rms_norm", torch.zeros(2)) == "cpp"
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            assert dispatch.choose_backend("an_op", torch.zeros(2).half()) == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "an_op has no C++ kernel for torch.float16: its torch reference runs"
    ]


def test_report_says_why_there_are_no_cpp_kernels(set_mode, monkeypatch):
    set_mode("auto")
    monkeypatch.setattr(library, "unavailable_reason", lambda: "no compiler")
    assert dispatch.backend_report()["cpu"] == "torch references, slower: no compiler"


@pytest.mark.gpu
def test_cuda_tensors_go_to_triton(set_mode):
    set_mode("auto")
    assert dispatch.choose_backend("rms_norm", torch.zeros(2, device="cuda")) == "triton"
    assert dispatch.backend_report()["cuda"].startswith("Triton")
