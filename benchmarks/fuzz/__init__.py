"""Random small programs, on a mesh and on one device: what `partition_fuzz` is made of.

`drawing` draws the parts of a program, `array_ops`, `math_ops`, `window_ops`,
`loop_ops`, `keras_ops` and `layer_ops` know the operations, `case` puts a program
together, `harness` runs it (and is the head of every script that is printed), `worker`
is the process in which it runs, `crew` the one that watches it.
"""
