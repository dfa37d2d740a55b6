"""Make Triton's interpreter twice as fast, and let it notice integers that overflow.

It is slow because of what it does around each NumPy operation: it builds the types of blocks, and
computes, but does not assert, that integers do not overflow. Here the types are kept, and NumPy
checks integers. With another version of Triton than the one that we test, all stays as it is.
"""

import functools

import numpy as np

VERSION = "3.7."  # of Triton


def speed_up():
    try:
        import triton
    except ImportError:
        return
    if triton.__version__.startswith(VERSION):
        patch_device_functions()
        keep_numpy_types()
        keep_block_types()
        keep_shapes_of_tensors()
        check_overflow_with_numpy()


def patch_device_functions():
    """Let a device function patch triton.language at its first call only, not at every call."""
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang

    patch_once = functools.cache(_patch_lang)  # a launch has patched it already

    def call(device_function, *args, **kwargs):
        patch_once(device_function.fn)
        return device_function.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


def keep_numpy_types():
    """Look up the NumPy type of a Triton type once."""
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    known = {}  # name of the Triton type of a scalar: NumPy type

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = get_np_dtype


def keep_block_types():
    """Build each type of a block once: later ones of the same shape share its attributes."""
    from triton.language import block_type, constexpr

    build = block_type.__init__
    known = {}  # (type of the elements, *shape): attributes

    def init(self, element_ty, shape):
        numbers = [n.value if isinstance(n, constexpr) else n for n in shape]
        key = (element_ty.name, *numbers)
        if key not in known:
            build(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    block_type.__init__ = init


def keep_shapes_of_tensors():
    """Build the shape of tensors of the same type once."""
    from triton.language import tensor

    build = tensor.__init__
    known = {}  # name of the type: shape and number of elements

    def init(self, handle, type):
        if type.name not in known:
            build(self, handle, type)
            known[type.name] = self.shape, self.numel
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape, self.numel = known[type.name]

    tensor.__init__ = init


def check_overflow_with_numpy():
    """Assert, in int64, that sums, differences and products of integers fit their type."""
    from triton.language.semantic import TritonSemantic

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(semantic, lhs, rhs, binary_op):
        a, b = lhs.handle.data, rhs.handle.data
        if a.dtype != bool and a.dtype.itemsize < 8:
            exact = operations[binary_op.__name__](a, b, dtype=np.int64)
            limits = np.iinfo(a.dtype)
            fits = limits.min <= exact.min() and exact.max() <= limits.max
            assert fits, f"{a.dtype} overflows in {binary_op.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
