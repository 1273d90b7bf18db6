"""Graphs, ensembles, reparametrised weights, embeddings that are summed, functions with derivatives of their own."""

import jax
import jax.numpy as jnp

from paper_reproductions.networks.small.made import Network, conv, dense, drawn, images, layer, tokens


def graph():
    """Messages along edges, summed at their ends; a second layer and a read-out of the whole graph."""
    source, target = jnp.asarray([0, 1, 2, 3, 1, 4]), jnp.asarray([1, 2, 3, 0, 0, 2])

    def fn(p, x):
        h = jnp.tanh(x @ p["embed"])
        for b in p["layers"]:
            pairs = jnp.concatenate([h[source], h[target]], -1)
            message = jax.nn.relu(dense(b["message"], pairs))
            h = h + jax.ops.segment_sum(message, target, len(x)) @ b["update"]
        return dense(p["head"], jax.ops.segment_sum(h, jnp.zeros(len(x), jnp.int32), 1))

    block = {"message": layer(12, 8), "update": (8, 6)}
    return Network(fn, drawn({"embed": (4, 6), "layers": [block] * 2, "head": layer(6, 3)}), images(5, 4))


def graph_attention():
    """Softmax over the edges of a node, heads side by side; edges stand in the batch."""

    def fn(p, batch):
        x, (source, target) = batch
        h = jnp.einsum("nc,chd->nhd", x, p["embed"])
        score = jax.nn.leaky_relu((h * p["from"]).sum(-1)[source] + (h * p["to"]).sum(-1)[target])
        weight = jnp.exp(score)
        weight = weight / jax.ops.segment_sum(weight, target, len(x))[target]
        mixed = jax.ops.segment_sum(weight[..., None] * h[source], target, len(x))
        return jax.nn.elu(mixed.reshape(len(x), -1)) @ p["head"]

    edges = jnp.asarray([0, 1, 2, 3, 1]), jnp.asarray([1, 2, 3, 0, 0])
    shapes = {"embed": (4, 3, 5), "from": (3, 5), "to": (3, 5), "head": (15, 3)}
    return Network(fn, drawn(shapes), (images(4, 4), edges))


def ensemble():
    """Three networks mapped over their params, their outputs averaged."""

    def one(p, x):
        h = jax.nn.relu(conv(jax.nn.relu(conv(x, p["one"])), p["two"], 2))
        return dense(p["head"], h.mean((1, 2)))

    def fn(p, x):
        return jax.vmap(one, (0, None))(p, x).mean(0)

    shapes = {"one": (3, 3, 3, 2, 4), "two": (3, 3, 3, 4, 5), "head": {"w": (3, 5, 3), "b": (3, 3)}}
    return Network(fn, drawn(shapes), images(2, 6, 6, 2))


def weight_norm():
    """Directions over their length, times a gain."""

    def normed(p):
        return p["v"] / jnp.sqrt((p["v"] ** 2).sum(0, keepdims=True)) * p["g"]

    def fn(p, x):
        return jax.nn.relu(x @ normed(p["one"]) + p["one"]["b"]) @ normed(p["two"])

    return Network(
        fn, drawn({"one": {"v": (5, 8), "g": (8,), "b": (8,)}, "two": {"v": (8, 3), "g": (3,)}}), images(4, 5)
    )


def highway():
    """Gated sums of a layer and its input, then gated linear units."""

    def fn(p, x):
        h = dense(p["embed"], x)
        for b in p["layers"]:
            t = jax.nn.sigmoid(dense(b["gate"], h))
            h = t * jnp.tanh(dense(b["new"], h)) + (1 - t) * h
        return (dense(p["a"], h) * jax.nn.sigmoid(dense(p["b"], h))) @ p["head"]

    block = {"gate": layer(6, 6), "new": layer(6, 6)}
    shapes = {"embed": layer(5, 6), "layers": [block] * 2, "a": layer(6, 7), "b": layer(6, 7), "head": (7, 3)}
    return Network(fn, drawn(shapes), images(4, 5))


def recommender():
    """DLRM: bags of embeddings and numbers, all pairs of them multiplied."""

    def fn(p, batch):
        numbers, bags = batch
        parts = [jax.nn.relu(dense(p["bottom"], numbers)) @ p["low"]]
        parts += [table[bag].sum(1) for table, bag in zip(p["tables"], bags, strict=True)]
        stacked = jnp.stack(parts, 1)
        pairs = jnp.einsum("bid,bjd->bij", stacked, stacked)
        first, second = jnp.triu_indices(len(parts), 1)
        joined = jnp.concatenate([parts[0], pairs[:, first, second]], -1)
        return dense(p["head"], jax.nn.relu(dense(p["top"], joined)))

    shapes = {"bottom": layer(4, 7), "low": (7, 5), "tables": [(9, 5), (8, 5)], "top": layer(8, 6), "head": layer(6, 1)}
    bags = tokens(3, 2, vocabulary=9), tokens(3, 3, vocabulary=8)
    return Network(fn, drawn(shapes), (images(3, 4), bags))


def siamese():
    """One tower for both inputs; distances and a product of what it gives."""

    def tower(p, x):
        return jnp.tanh(dense(p["two"], jax.nn.relu(dense(p["one"], x))))

    def fn(p, pair):
        a, b = (tower(p, x) for x in pair)
        cosine = (a * b).sum(-1) / jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1) + 1e-9)
        return cosine, jnp.abs(a - b) @ p["head"]

    return Network(
        fn, drawn({"one": layer(5, 8), "two": layer(8, 6), "head": (6, 2)}), (images(3, 5), images(3, 5, seed=2))
    )


@jax.custom_jvp
def softened(x):
    """|x| with the derivative of another function."""
    return jnp.abs(x)


@softened.defjvp
def _softened_rule(primals, tangents):
    return softened(*primals), jnp.tanh(primals[0]) * tangents[0]


@jax.custom_vjp
def stepped(x):
    """sign(x), straight through."""
    return jnp.sign(x)


stepped.defvjp(lambda x: (stepped(x), x), lambda x, g: (jnp.where(jnp.abs(x) < 1, g, 0.0),))


def derivatives():
    """Activations with derivatives of their own."""

    def fn(p, x):
        h = softened(x @ p["one"])
        return jax.nn.silu(stepped(h @ p["two"]) * jax.nn.relu6(h @ p["side"])) @ p["head"]

    return Network(fn, drawn({"one": (5, 8), "two": (8, 6), "side": (8, 6), "head": (6, 3)}), images(4, 5))


def radiance():
    """NeRF: positions again in the middle, a density beside the features, directions joined late."""

    def fn(p, batch):
        position, direction = batch
        h = jax.nn.relu(dense(p["one"], position))
        h = jax.nn.relu(dense(p["two"], jnp.concatenate([h, position], -1)))
        both = dense(p["three"], h)
        density, features = jax.nn.softplus(both[..., :1]), both[..., 1:]
        h = jax.nn.relu(dense(p["four"], jnp.concatenate([features, direction], -1)))
        return density * jax.nn.sigmoid(dense(p["colour"], h))

    shapes = {"one": layer(3, 6), "two": layer(9, 7), "three": layer(7, 6), "four": layer(8, 5), "colour": layer(5, 3)}
    return Network(fn, drawn(shapes), (images(4, 3), images(4, 3, seed=2)))


def adapters():
    """Low-rank additions to fixed matrices; a code that is decoded by the transpose of what made it."""

    def fn(p, x):
        h = jax.nn.relu(x @ (p["one"] + 0.5 * p["a"] @ p["b"]))
        code = jax.nn.relu(h @ p["tied"])
        return code @ p["tied"].T @ p["head"]

    shapes = {"one": (5, 8), "a": (5, 3), "b": (3, 8), "tied": (8, 6), "head": (8, 3)}
    return Network(fn, drawn(shapes), images(4, 5))


def factorised():
    """A Tucker layer and a bilinear form: a core times two sides."""

    def fn(p, pair):
        left, right = jnp.tanh(pair[0] @ p["left"]), jnp.tanh(pair[1] @ p["right"])
        return jnp.einsum("bi,ijk,bj->bk", left, p["core"], right) @ p["out"]

    shapes = {"left": (5, 6), "right": (4, 5), "core": (6, 5, 7), "out": (7, 3)}
    return Network(fn, drawn(shapes), (images(3, 5), images(3, 4)))
