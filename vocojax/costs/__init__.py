"""Costs of kernels, steps, answers and data without the machine: estimates to compare by, no promise of seconds.

`rows`: typical rows of samples, the one set that every figure here rests on.
`topologies`: machines that are not there, to compile for.
`hlo`, `flops`: XLA's programs as text, and the products in them.
`kernels`: a kernel, from the code that its compiler emits. `launch/kernel_report.py`.
`steps`: an optimizer step, from the program that XLA schedules. `launch/compile_report.py`.
`prices`: hours and dollars of a run.
`rehearsal`: a run before it is booked, on one page. `launch/rehearse.py`.
`answers`: an answer with and without a cache (paper Table 7). `launch/efficiency.py`.
`step_times`: training and answers beside `torch_peer`, measured on this CPU. `launch/step_report.py`.
`data`: the input pipeline, measured on this machine. `launch/data_report.py`.
"""
