"""A small convolutional network in plain JAX: twice (Conv-BN-ReLU, Conv-BN-ReLU, pool), then Dense-ReLU-Dense.

Parameters are a dictionary of dictionaries of arrays. The running statistics of batch norm are among them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def init(h, w, c, width, seed=0):
    """Parameters for images (h, w, c): {name: {leaf: array}}, biases and statistics at 0, scales and variances at 1."""
    sizes = {"conv1": (3, 3, c, width), "conv2": (3, 3, width, width), "conv3": (3, 3, width, 2 * width)}
    sizes |= {"conv4": (3, 3, 2 * width, 2 * width), "linear1": (h // 4 * (w // 4) * 2 * width, 4 * width)}
    sizes |= {"linear2": (4 * width, 10)}
    params, rng = {}, np.random.default_rng(seed)
    for name, size in sizes.items():
        zeros, ones = np.zeros(size[-1]), np.ones(size[-1])
        params[name] = {"kernel": rng.normal(0, (2 / np.prod(size[:-1])) ** 0.5, size)}  # He et al. 2015
        if name.startswith("linear"):
            params[name]["bias"] = zeros
        else:
            params["bn" + name[-1]] = {"scale": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def net(params, x, train=False):
    """Logits of images (n, h, w, c); in training mode also the new running statistics, None at every other leaf."""
    updates = dict.fromkeys(params)
    for i in (1, 2, 3, 4):
        layout, bn = ("NHWC", "HWIO", "NHWC"), params[f"bn{i}"]
        x = jax.lax.conv_general_dilated(x, params[f"conv{i}"]["kernel"], (1, 1), "SAME", dimension_numbers=layout)
        mean, var = bn["running_mean"], bn["running_var"]  # (c,) each
        if train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            new = {"running_mean": mean, "running_var": var}
            updates[f"bn{i}"] = dict.fromkeys(bn) | {k: 0.9 * bn[k] + 0.1 * v for k, v in new.items()}
        x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5) * bn["scale"] + bn["bias"])  # (n, h, w, c)
        if i in (2, 4):
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))  # (n, h/2, w/2, c)
    x = x.reshape(len(x), -1) @ params["linear1"]["kernel"] + params["linear1"]["bias"]  # (n, 4 * width)
    x = jax.nn.relu(x) @ params["linear2"]["kernel"] + params["linear2"]["bias"]  # (n, 10)
    return (x, updates) if train else x


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(net(params, batch[0]), batch[1]).mean()


def train_loss(params, batch):
    logits, updates = net(params, batch[0], train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), updates


@jax.jit
def statistics(params, batch):
    return net(params, batch[0], train=True)[1]


@jax.jit
def hits(params, batch):
    return (net(params, batch[0]).argmax(1) == batch[1]).sum()
