"""The clamp in an ONNX graph."""
