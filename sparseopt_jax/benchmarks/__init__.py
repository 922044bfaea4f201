"""Speed and memory, as ratios to plain Optax in the same process.

Run `python -m sparseopt_jax.benchmarks --help`.
"""
