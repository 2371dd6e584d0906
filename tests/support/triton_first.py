"""Imported before any kernel: so that tests can compile kernels without a GPU, where otherwise nothing loads Triton."""

import contextlib

with contextlib.suppress(ImportError):
    import triton  # noqa: F401
