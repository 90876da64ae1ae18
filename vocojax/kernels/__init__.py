"""Accelerator kernels. Each sub-package is one operation: one function, and every implementation of it."""
