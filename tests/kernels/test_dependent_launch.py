import pytest
import torch
from pilotfish.kernels.dependent_launch import launch_options
from pilotfish.kernels.gated_activation import gated_activation
from pilotfish.kernels.rms_norm import rms_norm


def test_without_hardware_for_it_nothing_starts_early():
    assert launch_options(torch.device("cpu")) == {"EARLY_START": False}


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 33, 5000])
def test_a_captured_chain_keeps_its_order(num_rows):
    """Kernels that start early, each reading what the one before wrote, in a graph whose input changes."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    assert launch_options(torch.device("cuda", torch.cuda.current_device()))["launch_pdl"]
    x = torch.randn(num_rows, 2048, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)

    def chain(wait):
        y, residual = rms_norm(x, weight, 1e-6), x
        wait()
        for _ in range(20):
            half = gated_activation(y, "silu")
            wait()
            y, residual = rms_norm(torch.cat((half, half), dim=1), weight, 1e-6, residual_TH=residual)
            wait()
            y = rms_norm(y, weight, 1e-6)
            wait()
        return y, residual

    chain(torch.cuda.synchronize)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, expected in zip(captured, chain(torch.cuda.synchronize), strict=True):
            assert torch.equal(ours, expected)
