"""TensorRT and TensorRT-RTX: building plans in a process of its own, and running them."""
