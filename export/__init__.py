"""From a checkpoint to a bundle: ONNX graphs, item vectors, index, parity."""
