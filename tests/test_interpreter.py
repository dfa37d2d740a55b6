"""tests/interpreter.py: Triton's interpreter notices integers that overflow."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.interpreter import VERSION

is_patched = triton.__version__.startswith(VERSION) and not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not is_patched, reason="the interpreter is Triton's own")


@triton.jit
def combine_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr):
    offsets = tl.arange(0, 4)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    else:
        out = x * y
    tl.store(out_ptr + offsets, out)


@pytest.mark.parametrize(
    "operation, x, y, expected, beyond",
    [
        ("add", 2**31 - 2, 1, 2**31 - 1, 2**31 - 1),
        ("add", -(2**31) + 1, -1, -(2**31), -(2**31)),
        ("sub", -(2**31) + 1, 1, -(2**31), -(2**31)),
        ("mul", 2**30 - 1, 2, 2**31 - 2, 2**30),
        ("mul", -(2**30), 2, -(2**31), -(2**30) - 1),
    ],
)
def test_integers_that_overflow_are_noticed(operation, x, y, expected, beyond):
    """beyond: the first x whose result does not fit int32."""

    def combine(x, dtype):
        x = torch.tensor([0, x, 0, 0], dtype=dtype)
        out = torch.empty_like(x)
        combine_kernel[(1,)](x, torch.full_like(x, y), out, operation)
        return out[1].item()

    assert combine(x, torch.int32) == expected
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflows"):
        combine(beyond, torch.int32)
    combine(beyond, torch.int64)
