"""Triton, or a stand-in where it is not installed: kernel files import either way, and their references work."""

try:
    import triton
    import triton.language as tl
except ImportError:

    def _refuse(what):
        raise ImportError(f"a kernel launch needs {what}, and triton is not installed: use the `_ref` function")

    class _Kernel:
        """What `jit` makes of a function: it cannot be launched."""

        def __getitem__(self, grid):
            _refuse("triton")

    class _Absent:
        """Has what a kernel file uses while it is imported; anything else says what is missing."""

        @staticmethod
        def jit(function=None, **options):
            return _Kernel() if function is not None else lambda function: _Kernel()

        @staticmethod
        def constexpr(value):
            return value

        def __getattr__(self, name):
            _refuse(f"triton.{name}")

    triton = tl = _Absent()

# Kernels work in base 2: exp2 is what the hardware has.
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

__all__ = ["_LN2", "_LOG2E", "tl", "triton"]
