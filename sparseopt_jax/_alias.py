"""SGD with SparseOpt, ready made."""

from typing import Any

import optax

from sparseopt_jax import _correction
from sparseopt_jax import _distributions
from sparseopt_jax import _leaves
from sparseopt_jax import _topology
from sparseopt_jax import _transform
from sparseopt_jax import _wrappers


def sparseopt_sgd(
  learning_rate: optax.ScalarOrSchedule,
  sparsity: float,
  topology: _topology.Topology = _topology.Static(),  # noqa: B008
  *,
  momentum: float | None = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  weight_decay_mask: Any = None,
  distribution: str | _distributions.Distribution = "erk",
  sparse: _leaves.Rule = None,
  corrected: _leaves.Rule = None,
  masks: Any = None,
  output_axis: _leaves.AxisRule = -1,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""SGD with SparseOpt: corrected gradient, decay, momentum, exact zeros.

  .. math::

    \begin{align*}
      u_t &= \tilde g_t + \lambda w_t \\
      v_t &= \mu v_{t-1} + u_t \\
      w_{t+1} &= m \odot (w_t - \eta v_t)
    \end{align*}

  with the corrected gradient :math:`\tilde g` and the masks :math:`m` of
  :func:`sparseopt_jax.sparseopt`. Weight decay comes after the correction and
  is not rescaled. It is short for

  .. code-block:: python

    keep_params_sparse(
      optax.chain(
        sparseopt(sparsity, topology, ...),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.sgd(learning_rate, momentum, nesterov),
      )
    )

  Under ``optax.inject_hyperparams`` only ``learning_rate``, ``momentum`` and
  ``weight_decay`` can be injected; all others that are numbers, strings or
  topologies belong into ``static_args``, those left at their default too:
  ``static_args=('sparsity', 'topology', 'output_axis', 'seed')``.

  Args:
    learning_rate: :math:`\eta`, or a schedule.
    sparsity: Fraction of zeros over all sparse leaves, in [0, 1).
    topology: As for :func:`sparseopt_jax.sparseopt`.
    momentum: :math:`\mu`; None for none.
    nesterov: Whether to use Nesterov momentum.
    weight_decay: :math:`\lambda`.
    weight_decay_mask: Which leaves decay, as in ``optax.add_decayed_weights``.
    distribution: As for :func:`sparseopt_jax.sparseopt`.
    sparse: As for :func:`sparseopt_jax.sparseopt`.
    corrected: As for :func:`sparseopt_jax.sparseopt`.
    masks: As for :func:`sparseopt_jax.sparseopt`.
    output_axis: As for :func:`sparseopt_jax.sparseopt`.
    seed: As for :func:`sparseopt_jax.sparseopt`.

  Returns:
    A ``GradientTransformationExtraArgs``. Its ``update`` needs ``params``.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If an argument lies outside its range, no leaf can be sparse, or
      ``corrected`` is given, is not ``False``, and chooses no sparse leaf.

  Examples:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import sparseopt_jax
    >>> topology = sparseopt_jax.RigL(update_until=300)
    >>> tx = sparseopt_jax.sparseopt_sgd(0.1, sparsity=0.75, topology=topology)
    >>> params = {'kernel': jnp.ones((8, 4)), 'bias': jnp.zeros(4)}
    >>> opt_state = tx.init(params)
    >>> params = sparseopt_jax.apply_masks(params, opt_state)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> params = optax.apply_updates(params, updates)

  References:
    Adnan et al., `SparseOpt: Addressing Normalization-induced Gradient Skew in
    Sparse Training <https://arxiv.org/abs/2605.27541>`_, 2026
  """
  if not _correction.is_scalar(weight_decay):
    raise TypeError(f"weight_decay must be a number; got {weight_decay!r}.")
  links = [
    _transform.sparseopt(
      sparsity,
      topology,
      distribution=distribution,
      sparse=sparse,
      corrected=corrected,
      masks=masks,
      output_axis=output_axis,
      seed=seed,
    )
  ]
  # An injected weight decay is traced; a plain 0 would cost a pass for nothing.
  if not (isinstance(weight_decay, int | float) and weight_decay == 0):
    links.append(optax.add_decayed_weights(weight_decay, weight_decay_mask))
  links.append(optax.sgd(learning_rate, momentum, nesterov))
  return _wrappers.keep_params_sparse(optax.chain(*links))
