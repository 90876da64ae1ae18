"""Accelerator kernels. Each sub-package is one operation with every implementation of it behind one function."""
