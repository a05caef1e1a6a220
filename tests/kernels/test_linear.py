"""linear on the CPU: against float64, whatever the sizes, strides and dtypes; and the same bits alone and in a batch."""

import pytest
import torch
from pilotfish.kernels.cpu import library
from pilotfish.kernels.dispatch import choose_backend
from pilotfish.kernels.linear import TOLERANCE, linear, linear_ref

DTYPES = [torch.float32, torch.bfloat16]
# (rows, inputs, outputs): single elements, sizes below and between multiples of vectors and tiles, a real layer.
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 8, 7), (3, 16, 4), (6, 17, 66), (7, 80, 129), (13, 100, 30), (64, 128, 48), (33, 576, 960)]


def make(rows, inputs, outputs, dtype, bias=True):
    generator = torch.Generator().manual_seed(rows * 10_000 + inputs * 100 + outputs)
    x = torch.randn(rows, inputs, generator=generator)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    return x, weight, torch.randn(outputs, generator=generator).to(dtype) if bias else None


def exact(x, weight, bias):
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_right(y, x, weight, bias):
    relative, absolute = TOLERANCE[torch.float32]
    torch.testing.assert_close(y.double(), exact(x, weight, bias), rtol=relative, atol=absolute)


def test_a_compiler_is_here_so_the_kernels_are_tested():
    assert library.unavailable_reason() is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_agrees_with_float64(rows, inputs, outputs, dtype, bias):
    x, weight, bias_N = make(rows, inputs, outputs, dtype, bias)
    assert choose_backend("linear", x, weight) == "cpp"
    assert_right(linear(x, weight, bias_N), x, weight, bias_N)
    assert_right(linear_ref(x, weight, bias_N), x, weight, bias_N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (43, 70)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(inputs, outputs, dtype):
    x, weight, bias = make(33, inputs, outputs, dtype)
    batch = linear(x, weight, bias)
    for rows in (1, 2, 3, 5, 6, 7, 16, 32):
        assert torch.equal(linear(x[:rows], weight, bias), batch[:rows])
    assert torch.equal(linear(x[32:], weight, bias), batch[32:])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(num_threads):
    x, weight, bias = make(9, 200, 333, torch.bfloat16)
    before = torch.get_num_threads()
    y = linear(x, weight, bias)
    try:
        torch.set_num_threads(num_threads)
        assert torch.equal(linear(x, weight, bias), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_and_leading_dimensions(dtype):
    x, weight, bias = make(24, 96, 40, dtype)
    x_view, weight_view = x[::3, 5:69], weight[3:31, 20:84]
    assert_right(linear(x_view, weight_view, bias[3:31]), x_view, weight_view, bias[3:31])
    y = linear(x.view(2, 3, 4, 96), weight, bias)
    assert y.shape == (2, 3, 4, 40)
    assert torch.equal(y.view(24, 40), linear(x, weight, bias))
    assert torch.equal(linear(x.T.contiguous().T, weight, bias), linear(x, weight, bias))
    assert linear(x[0], weight, bias).shape == (40,)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 4), (4, 8, 0), (3, 0, 4)])
def test_empty(rows, inputs, outputs):
    y = linear(torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.ones(outputs))
    assert torch.equal(y, torch.ones(rows, outputs))  # without inputs only the bias is left


def test_nothing_is_written_outside_the_output(monkeypatch):
    x, weight, bias = make(5, 19, 23, torch.bfloat16)
    guarded = torch.full((7, 23), 7.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape: guarded[1:6])
        linear(x, weight, bias)
    assert_right(guarded[1:6], x, weight, bias)
    assert bool((guarded[[0, 6]] == 7).all())


def test_infinity_and_nan_pass_through():
    x, weight, _ = make(2, 20, 6, torch.bfloat16, bias=False)
    x[0, 19], x[1, 3] = float("inf"), float("nan")
    y = linear(x, weight)
    assert bool(torch.isinf(y[0]).all())
    assert bool(torch.isnan(y[1]).all())


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None),
        (torch.zeros(2, 3), torch.zeros(3), None),
        (torch.tensor(1.0), torch.zeros(4, 1), None),
        (torch.zeros(2, 3), torch.zeros(3, 4).T, None),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3)),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(8)[::2]),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias):
    with pytest.raises(ValueError, match="linear: "):
        linear(x, weight, bias)


def test_an_output_in_float32():
    x, weight, bias = make(3, 64, 20, torch.bfloat16)
    y = linear(x, weight, bias, out_dtype=torch.float32)
    assert torch.equal(y, linear(x, weight, bias))
    half = linear_ref(x.bfloat16(), weight, bias, out_dtype=torch.float32)
    torch.testing.assert_close(half.double(), exact(x.bfloat16(), weight, bias), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="float32"):
        linear(x, weight, bias, out_dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 32, 64, 65, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (1024, 151936), (3072, 1024), (100, 30)])
def test_on_a_gpu_the_chosen_kernel_equals_the_reference(rows, inputs, outputs, dtype):
    x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
    weight = (torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, device="cuda", dtype=dtype)
    for some_bias in (None, bias):
        relative, absolute = TOLERANCE[dtype]
        y = linear(x, weight, some_bias)
        torch.testing.assert_close(y, linear_ref(x, weight, some_bias), rtol=relative, atol=absolute)
        relative, absolute = TOLERANCE[torch.float32]
        y = linear(x, weight, some_bias, out_dtype=torch.float32)
        expected = linear_ref(x, weight, some_bias, out_dtype=torch.float32)
        torch.testing.assert_close(y, expected, rtol=relative, atol=absolute)
