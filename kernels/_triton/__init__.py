"""Triton kernels, one file per op; each defines `forward(*args, save)` and `backward(dy, ...)`."""
