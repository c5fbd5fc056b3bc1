"""Quantised graphs: the context encoder's matrix products in int8, with Q/DQ nodes, calibrated on the draws' images.

Only those, because only there int8 may pay: the denoisers and the autoencoder are convolutions, which ONNX Runtime's
CPU provider computes in its own layout in fp32 and as plain ones in int8. ``docs/export.md`` has the figures.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from busigen.export.reference import Asked

QUANTISED = ("context",)
"""Components, and their only graphs, that int8 is for."""

OPERATORS = ("MatMul",)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warning that a model was not pre-processed, which busigen's own folding has done."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class _Calls(CalibrationDataReader):
    """What a graph was asked, for calibration."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self._calls: Iterator[dict[str, NDArray[Any]]] = iter([call.inputs for call in asked])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next call's inputs."""
        return next(self._calls, None)


def quantised(
    graphs: Mapping[str, ModelProto], asked: Mapping[str, Sequence[Asked]], operators: Sequence[str] = OPERATORS
) -> dict[str, ModelProto]:
    """Graphs with operators of some kinds in int8: weights per channel, activations by the range they were seen in.

    Args:
        graphs: fp32.
        asked: calibration inputs per graph; none of them may be empty.
        operators: kinds of nodes that are quantised.
    """
    found = {}
    for name, model in graphs.items():
        with _unwarned(), tempfile.TemporaryDirectory(prefix="busigen-") as folder:
            source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
            onnx.save(model, str(source))
            quantize_static(
                str(source),
                str(target),
                _Calls(asked[name]),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(operators),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            found[name] = onnx.load(str(target))
        del found[name].graph.value_info[:]
    return found
