"""Triton, or a stand-in where it is not installed: kernel files import either way, and their references work."""

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Swallows what happens at import: decorators, annotations, constants. A launch, `kernel[grid]`, is refused."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

        def __getitem__(self, grid):
            raise ImportError("this function launches a Triton kernel, and triton is not installed: use its `_ref`")

    triton = tl = _Absent()

__all__ = ["tl", "triton"]
