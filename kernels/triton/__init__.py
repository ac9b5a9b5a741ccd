"""Kernels for GPUs, written in Triton. Importing this package imports no Triton; its modules with kernels do."""
