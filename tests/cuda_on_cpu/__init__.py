"""The CUDA path run on a CPU: devices, copies, waits, kernels and memory are a card's, the arithmetic is not."""
