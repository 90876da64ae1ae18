"""Costs of a kernel on an accelerator that is not there, read from the code that its compiler emits.

libtpu and XLA's CUDA backend compile for a described device on any x86 Linux machine. `tpu` replays the VLIW bundles
(`bundles`) of a Pallas TPU kernel, `gpu` reads ptxas' report and the machine code of a Triton kernel. `report` compares
the project's attention with public kernels on four `layouts`. The figures are estimates: good for comparing kernels and
block sizes, not for promising seconds.
"""
