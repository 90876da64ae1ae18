"""What a kernel will cost on an accelerator that is not there, read off the code that its compiler emits.

libtpu and XLA's CUDA backend compile for a described device on any x86 Linux machine. `tpu` replays the VLIW bundles
of a Pallas TPU kernel, `gpu` reads ptxas' report and the machine code of a Triton kernel, and `report` sets the
project's attention kernels beside public ones; `hlo` reads the text of whole programs. The figures are estimates: good
for comparing kernels and block sizes, not for promising seconds.
"""
