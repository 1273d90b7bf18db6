"""LeNet-300-100 on MNIST, 784-300-100-10 with ReLU and biases, and a plain optax loop that trains it.

One thread a process: the layers are too small for two (set before JAX is imported).
"""

import os
import time
from itertools import pairwise

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

SIZES = (784, 300, 100, 10)
WEIGHTS = 266_200  # of the three kernels


def init(seed):
    """Weights (in, out) after Glorot and Bengio 2010, biases 0."""
    rng, params = np.random.default_rng(seed), {}
    for i, (n, m) in enumerate(pairwise(SIZES), 1):
        params[f"fc{i}"] = {"kernel": rng.normal(0, (2 / (n + m)) ** 0.5, (n, m)), "bias": np.zeros(m)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def forward(params, x):
    """Logits (B, 10) of images (B, 784)."""
    for i in (1, 2):
        x = jax.nn.relu(x @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"])  # (B, 300), (B, 100)
    return x @ params["fc3"]["kernel"] + params["fc3"]["bias"]


def loss(params, batch):
    """Mean cross-entropy of (images, labels)."""
    return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch[0]), batch[1]).mean()


@jax.jit
def accuracy(params, x, y):
    """Percent right."""
    return 100 * jnp.mean(forward(params, x).argmax(1) == y)


def train(optimizer, params, x, y, steps, seed, *, batch=100, watch=None, every=100, objective=loss):
    """(params, state, CPU seconds of the loop without compilation); watch(step, params) every `every` steps."""

    def step(params, state, index):
        updates, state = optimizer.update(jax.grad(objective)(params, (x[index], y[index])), state, params)
        return optax.apply_updates(params, updates), state

    rng, params = np.random.default_rng(seed), jax.tree.map(jnp.array, params)
    state = optimizer.init(params)
    indices = [jnp.asarray(rng.integers(0, len(y), batch)) for _ in range(steps)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, indices[0]).compile()
    clock = time.process_time()
    for i, index in enumerate(indices, 1):
        params, state = compiled(params, state, index)
        if watch is not None and i % every == 0:
            watch(i, params)
    jax.block_until_ready(params)
    return params, state, time.process_time() - clock


def living(masks):
    """The sizes of the layers that are left, and the share of zeros among the weights between them.

    masks: {"fc1": (784, 300), ...}. An input lives if a weight leaves it, a neuron if weights enter and leave it, so
    that what is dead can be cut out of the arrays.
    """
    masks = [np.asarray(masks[f"fc{i}"]) for i in (1, 2, 3)]
    neurons = [a.any(0) & b.any(1) for a, b in pairwise(masks)]
    alive = [masks[0].any(1), *neurons, np.ones(SIZES[-1], bool)]
    left = [m[a][:, b] for m, (a, b) in zip(masks, pairwise(alive), strict=True)]
    return [int(a.sum()) for a in alive[:-1]], 1 - sum(int(m.sum()) for m in left) / max(1, sum(m.size for m in left))
