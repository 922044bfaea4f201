"""The paper's claims, run and reported.

Run `python -m sparseopt_jax.studies --help`.
"""
