"""The commands, one module each, and what runs them.

A command's module has a docstring (its help; the first line is its line in `vocojax --help`), `define_flags()` and
`main(arguments)`. It imports the standard library and absl only, so that help and a misspelt flag take no time; `main`
imports what does the work.
"""
