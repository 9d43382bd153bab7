"""Triton, or a stand-in where it is not installed: kernel files import either way, and their references work."""

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Has what a kernel file uses while it is imported; anything else, as a launch needs, says what is missing."""

        @staticmethod
        def jit(function=None, **options):
            return function or (lambda function: function)

        @staticmethod
        def constexpr(value):
            return value

        def __getattr__(self, name):
            raise ImportError(
                f"a kernel launch needs triton.{name}, and triton is not installed: use the `_ref` function"
            )

    triton = tl = _Absent()

__all__ = ["tl", "triton"]
