"""Client code: a residual network in NNX, `nnx.Optimizer` and `nnx.jit`."""

import clients
from flax import nnx
import jax.numpy as jnp
import numpy as np
import optax

import sparseopt_jax
from sparseopt_jax import flops
from sparseopt_jax import inspection


class Block(nnx.Module):
  """A residual block, its shortcut a convolution where the shape changes."""

  def __init__(self, inputs, features, stride, rngs):
    conv = lambda size, inputs, stride: nnx.Conv(
      inputs, features, (size, size), stride, use_bias=False, rngs=rngs
    )
    norm = lambda: nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
    self.conv1, self.norm1 = conv(3, inputs, stride), norm()
    self.conv2, self.norm2 = conv(3, features, 1), norm()
    self.conv3, self.norm3 = conv(1, inputs, stride), norm()

  def __call__(self, x):
    y = nnx.relu(self.norm1(self.conv1(x)))
    y = self.norm2(self.conv2(y))
    return nnx.relu(y + self.norm3(self.conv3(x)))


class ResNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.blocks = nnx.List([Block(8, 8, 2, rngs), Block(8, 16, 2, rngs)])
    self.head = nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.stem(x))
    for block in self.blocks:
      x = block(x)
    return self.head(x.mean((1, 2)))


@nnx.jit
def train_step(model, optimizer, images, labels):
  def loss(model):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(model(images), labels).mean()

  optimizer.update(model, nnx.grad(loss)(model))


def test_nnx():
  images, labels = clients.digits()
  model = ResNet(nnx.Rngs(0))
  corrected = inspection.batch_normalized(model, images[:1])
  # All but the stem, which a ReLU follows, and the classifier.
  assert set(corrected.paths) == {
    f"blocks/{block}/conv{i}/kernel" for block in "01" for i in (1, 2, 3)
  }
  topology = sparseopt_jax.RigL(update_until=60, update_every=10)
  tx = sparseopt_jax.sparsify(
    optax.sgd(0.1, momentum=0.9), 0.8, topology, corrected=corrected
  )
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  params = nnx.state(model, nnx.Param)
  nnx.update(model, sparseopt_jax.apply_masks(params, optimizer.opt_state))
  masks = sparseopt_jax.get_masks(optimizer.opt_state)

  model.train()
  for batch in clients.batches(epochs=6):
    train_step(model, optimizer, *batch)

  model.eval()
  assert jnp.mean(model(images).argmax(-1) == labels) > 0.9
  new_masks = sparseopt_jax.get_masks(optimizer.opt_state)
  params = nnx.state(model, nnx.Param)
  clients.assert_sparse(params, masks, new_masks, 0.8)

  # What a forward pass costs: the stem is dense of 9 x 1 weights at 64 places.
  densities = {
    path: float(mask.mean())
    for path, mask in clients.by_path(new_masks).items()
  }
  assert densities.keys() == {"stem/kernel", "head/kernel", *corrected.paths}
  dense = flops.forward_flops(model, images[:1])
  sparse = flops.forward_flops(model, images[:1], densities=densities)
  assert sparse < 0.5 * dense

  # Another optimiser goes on with the same masks.
  other = nnx.Optimizer(
    model,
    sparseopt_jax.sparsify(
      optax.adam(1e-3), 0.8, topology, corrected=corrected, masks=new_masks
    ),
    wrt=nnx.Param,
  )
  got = clients.by_path(sparseopt_jax.get_masks(other.opt_state))
  for path, mask in clients.by_path(new_masks).items():
    np.testing.assert_array_equal(got[path], mask)
