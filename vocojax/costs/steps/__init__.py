"""Costs of a stage on machines that are not there: its real step, compiled for their topology on this one.

`compiling` compiles in a child process and keeps what XLA writes, `program` adds it up with every loop counted as often
as it runs, `attention` prices the kernels, `report` says whether it fits, how long a step takes and what bounds it,
`search` tries many settings, and `tables` prints. Memory is XLA's own buffer assignment. Times are estimates.
"""
