"""minigrad: automatic differentiation of NumPy arrays, and a network that learns with it.

An array remembers which arrays it was computed from, and a function that turns its gradient into
theirs. `backward` calls these functions from the newest array to the oldest: that is the whole idea.
`python examples/minigrad.py` teaches a network which of two spiral arms a point lies on.
"""

import itertools

import numpy as np

numbers = itertools.count()


class Tensor:
    """An array, how it was made, and how the loss depends on it."""

    def __init__(self, data, parents=(), closure=None):
        self.data = np.asarray(data, dtype=np.float64)
        self.grad = np.zeros_like(self.data)
        self.parents = parents
        self.closure = closure  # takes the gradient of this, dy, and returns one for each parent
        self.number = next(numbers)  # counts up, so a result has a higher number than its inputs

    def backward(self):
        """Add the derivative of this scalar to `.grad` of everything that it was computed from."""
        found, new = set(), {self}
        while new:
            found |= new
            new = {parent for tensor in new for parent in tensor.parents} - found
        self.grad = np.ones_like(self.data)
        for tensor in sorted(found, key=lambda tensor: -tensor.number):  # after all its uses
            gradients = tensor.closure(tensor.grad) if tensor.parents else ()
            for parent, gradient in zip(tensor.parents, gradients, strict=True):
                parent.grad += summed_to(gradient, parent.data.shape)

    def __add__(self, other):
        return Tensor(self.data + other.data, (self, other), lambda dy: (dy, dy))

    def __sub__(self, other):
        return Tensor(self.data - other.data, (self, other), lambda dy: (dy, -dy))

    def __mul__(self, other):
        x, y = self.data, other.data
        return Tensor(x * y, (self, other), lambda dy: (dy * y, dy * x))

    def __matmul__(self, other):
        x, y = self.data, other.data
        return Tensor(x @ y, (self, other), lambda dy: (dy @ y.T, x.T @ dy))

    def exp(self):
        y = np.exp(self.data)
        return Tensor(y, (self,), lambda dy: (dy * y,))

    def log(self):
        x = self.data
        return Tensor(np.log(x), (self,), lambda dy: (dy / x,))

    def tanh(self):
        y = np.tanh(self.data)
        return Tensor(y, (self,), lambda dy: (dy * (1 - y * y),))

    def sum(self, axis=None):
        """The sum over an axis, which stays with size 1, or over all."""
        y, ones = self.data.sum(axis, keepdims=axis is not None), np.ones_like(self.data)
        return Tensor(y, (self,), lambda dy: (dy * ones,))


def summed_to(gradient, shape):
    """Undo broadcasting: an element that was used many times gets the sum of its gradients."""
    gradient = gradient.sum(tuple(range(gradient.ndim - len(shape))))
    repeated = tuple(i for i, size in enumerate(shape) if size == 1)
    return gradient.sum(repeated, keepdims=True) if repeated else gradient


class MLP:
    """tanh(x W1 + b1) W2 + b2.   [N, inputs] -> [N, classes]"""

    def __init__(self, inputs, hidden, classes, rng):
        shapes = (inputs, hidden), (hidden,), (hidden, classes), (classes,)
        self.parameters = [Tensor(rng.standard_normal(shape) / shape[0] ** 0.5) for shape in shapes]

    def __call__(self, x):
        w1, b1, w2, b2 = self.parameters
        return (x @ w1 + b1).tanh() @ w2 + b2


def cross_entropy(logits, labels):
    """The mean of log(sum(exp(logits))) - logits[label].   logits [N, classes], labels [N]"""
    one_hot = Tensor(np.eye(logits.data.shape[1])[labels])
    losses = logits.exp().sum(axis=1).log() - (logits * one_hot).sum(axis=1)  # [N, 1]
    return losses.sum() * Tensor(1 / len(labels))


def spiral(n, rng):
    """Points on two arms that turn around each other.   -> x [N, 2], labels [N]"""
    labels, radius = rng.integers(0, 2, n), rng.uniform(0.1, 1.0, n)
    angle = 6 * radius + np.pi * labels + 0.1 * rng.standard_normal(n)
    return 3 * np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), labels


def train(steps=400, lr=1.0, seed=0):
    """Learn the spiral by gradient descent; return the loss of each step and the share of points classified right."""
    rng = np.random.default_rng(seed)
    (x, labels), model = spiral(200, rng), MLP(2, 32, 2, rng)
    losses = []
    for _ in range(steps):
        loss = cross_entropy(model(Tensor(x)), labels)
        loss.backward()
        for p in model.parameters:
            p.data, p.grad = p.data - lr * p.grad, np.zeros_like(p.grad)
        losses.append(float(loss.data))
    return losses, float(np.mean(model(Tensor(x)).data.argmax(1) == labels))


if __name__ == "__main__":
    losses, right = train()
    for step in range(0, len(losses), 50):
        print(f"step {step:3d}   loss {losses[step]:.3f}")
    print(f"{right:.0%} of the points are classified correctly")
