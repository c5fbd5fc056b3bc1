"""Export: checkpoint to one ONNX graph per component and class, with parity proofs. Needs the ``train`` extra."""
