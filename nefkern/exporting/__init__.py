"""A run as one file for other programs: ONNX, with all that is between pixels and clusters."""
