"""Batches that are too large for the memory there is: telling that from other failures, and what would fit."""

from __future__ import annotations

from collections.abc import Callable

SMALLEST = 2
"""Rows that a batch has at least (:data:`busigen.runtime.sampler.MIN_BATCH`)."""

_SIGNS = (
    "out of memory",  # CUDA's own words, and TensorRT's
    "outofmemory",
    "memory allocation",  # TensorRT's builder
    "insufficient memory",
    "cudaerror 2:",
    "failed to allocate memory",  # ONNX Runtime's arena, on the processor and on a card
    "bad_alloc",
    "bad allocation",
    "available memory of",  # ONNX Runtime's arena under gpu_mem_limit
    "cudaerrormemoryallocation",
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
)


def ran_out(error: BaseException) -> bool:
    """Whether an engine's error says that there was too little memory."""
    return isinstance(error, MemoryError) or says_ran_out(str(error))


def says_ran_out(account: str) -> bool:
    """Whether a library's own words say that there was too little memory."""
    told = account.lower()
    return any(sign in told for sign in _SIGNS)


def largest_that_fits(rows: int, fits: Callable[[int], bool]) -> int:
    """The first of a half, a quarter, an eighth... of ``rows`` that fits; 0 if not even ``SMALLEST`` do.

    Args:
        rows: of the batch that did not fit.
        fits: tries so many rows.
    """
    while (rows := rows // 2) >= SMALLEST:
        if fits(rows):
            return rows
    return 0
