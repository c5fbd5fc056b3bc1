"""Writing a ``.npy`` array whose number of rows is known only at the end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray


class RowFile:
    """Appends rows of one shape and type to a ``.npy`` file.

    Args:
        path: The file, overwritten.
        shape: Shape of one row.
        dtype: Type of its values.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._rows = 0
        self._stream = path.open("wb")
        self._write_header()

    def append(self, row: NDArray[np.generic]) -> None:
        """Write one row.

        Raises:
            ValueError: Its shape or type is not the file's.
        """
        if row.shape != self._shape or row.dtype != self._dtype:
            raise ValueError(f"a row is {self._dtype} {self._shape}, not {row.dtype} {row.shape}")
        self._stream.write(row.tobytes())
        self._rows += 1

    def __enter__(self) -> RowFile:
        """The file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the final number of rows and close."""
        # NumPy pads the header so that the first axis can grow in place.
        self._stream.seek(0)
        self._write_header()
        self._stream.close()

    def _write_header(self) -> None:
        header = {
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._shape),
        }
        npy.write_array_header_1_0(self._stream, header)
