"""An optimizer of one file: RMSProp."""

from minimoe.reference.extensions import Option
from minimoe.reference.optimizers import Optimizer


def update(b, inout_param, inout_states, grad, step, *, weight_decay, eps, decay):
    """v = d v + (1-d) g^2, w = w (1 - lr wd) - lr g / (sqrt(v) + eps).   flat [P] each"""
    g = b.clipped(grad, step.scale, step.ok)  # zeros where the step is skipped
    rate = b.xp.where(step.ok, step.lr, b.xp.zeros_like(step.lr))
    v = inout_states["v"]
    v *= b.where_ok(step.ok, decay, 1.0, grad)
    v += b.where_ok(step.ok, 1.0 - decay, 0.0, grad) * g * g
    inout_param *= 1.0 - rate * weight_decay
    inout_param -= rate * g / (b.xp.sqrt(v) + eps)


optimizer = Optimizer(
    name="rmsprop",
    formula="v = d v + (1-d) g^2, w = w (1 - lr wd) - lr g / (sqrt(v) + eps)",
    paper="Tieleman & Hinton 2012",
    update=update,
    states=("v",),
    reads=("eps",),
    options={"decay": Option(0.99, "of the mean of squares", lambda d: None if 0 <= d < 1 else "must be in [0, 1)")},
)
