"""The training loop: configuration, state, step, checkpoints and records.

`sparseopt_jax.train` is the command that joins these with a model and a data
set. Importing this package loads nothing; each module is imported by name.
"""
