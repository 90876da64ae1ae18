"""What a stage will cost on machines that are not there: its real step, compiled for their topology on this one.

`compiling` compiles in a child process and keeps what XLA wrote down, `costs` adds it up with every loop counted as
often as it runs, `report` says whether it fits, how long a step takes and what bounds it, and `search` tries many
settings. Memory is XLA's own buffer assignment; times are estimates, good for comparing layouts, not for promising
seconds.
"""
