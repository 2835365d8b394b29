"""Bugs that train on with a loss that hardly moves, planted in the NumPy backend one at a time: the suite finds each and names its kernel.

They keep buffers and results between calls, forget `out` in a composite, swallow NaN, change what a skipped step must leave, stop at the
size of a tile or a counter, add up long sums one by one, choose among ties as they like, and return another dtype. Plain mistakes are
planted in test_conformance.py.
"""

import re

import numpy as np
import pytest

from minimoe.backend import Backend, check_overrides
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.norm import NormSaved
from minimoe.reference.optimizers import OPTIMIZERS, names
from minimoe.reference.routers import within_best_groups
from minimoe.testing import ConformanceError, cases
from minimoe.testing.training_examples import optimizer_steps
from minimoe_numpy import NumpyBackend


class Planted(NumpyBackend):
    """One dtype is enough."""

    dtypes = ("float32",)


# ---- what is kept between calls ---------------------------------------------------------------------------------------------------------


class SharedBuffer(Planted):
    """Returns the same buffer at every call of one shape."""

    buffers: dict = {}

    def gelu(self, x, tanh=False, out=None):
        return self.store(super().gelu(x, tanh), self.buffers.setdefault(x.shape, np.empty_like(x)) if out is None else out)


class SharedGradient(Planted):
    """Returns the same gradient buffer at every backward of one shape."""

    buffers: dict = {}

    def swiglu_backward(self, dy, gate_up, limit=0.0):
        dx = super().swiglu_backward(dy, gate_up, limit)
        return self.store(dx, self.buffers.setdefault(dx.shape, np.empty_like(dx)))


class SharedTotal(Planted):
    """Keeps the residual stream of one shape in a buffer."""

    buffers: dict = {}

    def add_rms_norm(self, x, delta, weight, eps):
        total = self.store(x + delta, self.buffers.setdefault(x.shape, np.empty_like(x)))
        y, rstd = self.rms_norm(total, weight, eps)
        return (total, y), NormSaved(total, weight, (rstd,))

    def add_rms_norm_backward(self, dtotal, dy, saved):
        return super().add_rms_norm_backward(dtotal, dy, saved)


class StaleSaved(Planted):
    """Saves in the backend, so that the second forward overwrites what the first left for its backward."""

    def ffn(self, x, weights, activation, limit=0.0):
        y, self.kept = super().ffn(x, weights, activation, limit)
        return y, None

    def ffn_backward(self, dy, saved, activation, limit=0.0, out=None, accumulate=False):
        return super().ffn_backward(dy, self.kept, activation, limit, out, accumulate)


class SharedHidden(Planted):
    """Saves the activations of one shape in one buffer."""

    buffers: dict = {}

    def expert_ffn(self, rows, weights, offsets, activation, limit=0.0):
        y, saved = super().expert_ffn(rows, weights, offsets, activation, limit)
        hidden = self.buffers.setdefault(saved.hidden.shape, np.empty_like(saved.hidden))
        return y, saved._replace(hidden=self.store(saved.hidden, hidden))

    def expert_ffn_backward(self, dy, saved, activation, limit=0.0, out=None, accumulate=False):
        return super().expert_ffn_backward(dy, saved, activation, limit, out, accumulate)


class CacheByShape(Planted):
    """Computes the mask of dropout once for each shape."""

    masks: dict = {}

    def dropout(self, x, rate, rng, out=None):
        mask = self.masks.setdefault((x.shape, rate), self.dropout_mask(x.size, rate, rng, x.dtype).reshape(x.shape))
        return self.store(x * mask, out)


class CacheByAddress(Planted):
    """Packs a weight once for each address, as if nobody wrote it in place."""

    packed: dict = {}

    def linear(self, x, weight, bias=None, out=None):
        kept, packed = self.packed.setdefault(id(weight), (weight, weight.T.copy()))
        y = self.xp.matmul(self.rows(x), packed if kept is weight else weight.T).reshape(*x.shape[:-1], weight.shape[0])
        return self.store(y if bias is None else y + bias, out)


class PlanByShape(Planted):
    """Keeps the plan of the first ids of each shape and option."""

    plans: dict = {}

    def route(self, ids, weights, valid, *, n_experts, rows, capacity=None, priority="position"):
        plan = super().route(ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority)
        return self.plans.setdefault((ids.shape, n_experts, str(capacity), priority, valid is None), plan)


# ---- out and accumulate of composites ---------------------------------------------------------------------------------------------------


class CompositeIgnoresAccumulate(Planted):
    def expert_ffn(self, rows, weights, offsets, activation, limit=0.0):
        return super().expert_ffn(rows, weights, offsets, activation, limit)

    def expert_ffn_backward(self, dy, saved, activation, limit=0.0, out=None, accumulate=False):
        return super().expert_ffn_backward(dy, saved, activation, limit, out)


class CompositeIgnoresOut(Planted):
    def moe_ffn(self, x, gate_weights, plan, weights, activation, limit=0.0):
        return super().moe_ffn(x, gate_weights, plan, weights, activation, limit)

    def moe_ffn_backward(self, dy, saved, activation, limit=0.0, out=None, accumulate=False):
        return super().moe_ffn_backward(dy, saved, activation, limit)


class CompositeForgetsBiases(Planted):
    def ffn(self, x, weights, activation, limit=0.0):
        return super().ffn(x, weights, activation, limit)

    def ffn_backward(self, dy, saved, activation, limit=0.0, out=None, accumulate=False):
        to = None if out is None else ExpertWeights(out.up, out.down)
        return super().ffn_backward(dy, saved, activation, limit, to, accumulate)


class HeadAddsIntoOut(Planted):
    def linear_cross_entropy(self, x, weight, targets, ignore=-100):
        return super().linear_cross_entropy(x, weight, targets, ignore)

    def linear_cross_entropy_backward(self, dloss, saved, ignore=-100, out=None, accumulate=False):
        return super().linear_cross_entropy_backward(dloss, saved, ignore, out, True)


class SecondMicroBatchReplaces(Planted):
    """Adds the weights' gradients, and replaces those of the biases."""

    def expert_ffn(self, rows, weights, offsets, activation, limit=0.0):
        return super().expert_ffn(rows, weights, offsets, activation, limit)

    def expert_ffn_backward(self, dy, saved, activation, limit=0.0, out=None, accumulate=False):
        drows, gradients = super().expert_ffn_backward(dy, saved, activation, limit, out, accumulate)
        if accumulate and gradients.down_bias is not None:
            self.store(self.grouped_bias_backward(dy, saved.offsets), gradients.down_bias)
        return drows, gradients


class WritesBesideOut(Planted):
    """Writes whole vectors of sixteen bytes, past the end of `out`."""

    def embedding_backward(self, dy, ids, vocab, padding=None, out=None, accumulate=False):
        result = super().embedding_backward(dy, ids, vocab, padding, out, accumulate)
        if out is not None and out.base is not None:
            end = (out.ctypes.data - out.base.ctypes.data) // 4 + out.size
            out.base[end : end + -out.size % 4] = 0.0
        return result


# ---- NaN, infinity, skipped steps -------------------------------------------------------------------------------------------------------


class LossSwallowsNaN(Planted):
    def cross_entropy(self, logits, targets, ignore=-100):
        total, count, lse = super().cross_entropy(logits, targets, ignore)
        return np.nan_to_num(total), count, lse


class HeadSwallowsNaN(Planted):
    def linear_cross_entropy(self, x, weight, targets, ignore=-100):
        (total, count), saved = super().linear_cross_entropy(x, weight, targets, ignore)
        return (np.nan_to_num(total), count), saved

    def linear_cross_entropy_backward(self, dloss, saved, ignore=-100, out=None, accumulate=False):
        return super().linear_cross_entropy_backward(dloss, saved, ignore, out, accumulate)


class NormSwallowsNaN(Planted):
    def rms_norm(self, x, weight, eps, out=None):
        y, rstd = super().rms_norm(x, weight, eps)
        return self.store(np.where(np.isnan(rstd), 0, y), out), rstd


class ReluSwallowsNaN(Planted):
    def relu(self, x, out=None):
        return self.store(np.fmax(x, 0.0).astype(x.dtype), out)


class GeluClipsInfinity(Planted):
    def gelu(self, x, tanh=False, out=None):
        return super().gelu(np.minimum(x, 1e4).astype(x.dtype), tanh, out)


class AttentionSwallowsNaN(Planted):
    def attention(self, q, k, v, *, scale, causal, window=0, q_pos, k_pos, k_valid=None, sinks=None, dropout=0.0, rng=None, out=None):
        masks = {"causal": causal, "window": window, "q_pos": q_pos, "k_pos": k_pos, "k_valid": k_valid}
        y, lse = super().attention(q, k, v, scale=scale, **masks, sinks=sinks, dropout=dropout, rng=rng)
        return self.store(np.where(np.isnan(y), 0, y).astype(y.dtype), out), lse


class GateSwallowsNaN(Planted):
    def gate(self, logits, bias, valid, *, rule):
        result = super().gate(logits, bias, valid, rule=rule)
        return result._replace(weights=np.nan_to_num(result.weights))


class SumStopsBelowInfinity(Planted):
    def sum_of_squares(self, x):
        total = super().sum_of_squares(x)
        return np.where(np.isinf(total), np.finfo(np.float32).max, total).astype(np.float32)


class SkippedStepDecays(Planted):
    """Decays weights in a skipped step, if the gradient is finite."""

    def adamw(self, inout_param, inout_m, inout_v, grad, *, lr, step, scale, ok, beta1, beta2, eps, weight_decay):
        given = {"lr": lr, "step": step, "scale": scale, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().adamw(inout_param, inout_m, inout_v, grad, ok=ok, **given)
        if not ok and np.isfinite(grad).all():
            inout_param *= 1.0 - lr * weight_decay


class SkippedStepForgets(Planted):
    """Lets momentum fade in a skipped step, by less than float32's tolerance shows."""

    def lion(self, inout_param, inout_m, grad, *, lr, scale, ok, beta1, beta2, weight_decay):
        super().lion(inout_param, inout_m, grad, lr=lr, scale=scale, ok=ok, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        if not ok:
            inout_m *= np.float32(1.0 - 2e-7)


# ---- tiles and counters -----------------------------------------------------------------------------------------------------------------


class TileOf1024Columns(Planted):
    def rms_norm(self, x, weight, eps, out=None):
        _, rstd = super().rms_norm(x[..., :1024], weight[:1024], eps)
        return self.store(x * rstd * weight, out), rstd


class VocabularyTile(Planted):
    def cross_entropy(self, logits, targets, ignore=-100):
        loss, count, lse = super().cross_entropy(logits, targets, ignore)
        short = self.logsumexp(logits[:, :4096])
        return loss + np.where(targets != ignore, short - lse, 0).sum(dtype=loss.dtype), count, short


class OneBlockOfTopK(Planted):
    def top_k(self, x, k):
        return super().top_k(x[..., : max(1024, k)], k)


class SixtyFourExperts(Planted):
    def gate(self, logits, bias, valid, *, rule):
        masked = np.where(np.arange(logits.shape[1]) < 64, logits, np.float32(-1e9)).astype(logits.dtype)
        return super().gate(masked, bias, valid, rule=rule)


class ThousandExperts(Planted):
    def grouped_matmul(self, x, weight, offsets, transpose=False, out=None):
        y = super().grouped_matmul(x, weight, offsets, transpose, out)
        if len(weight) > 1024:
            y[offsets[1024] :] = 0.0
        return y


class RowsOf16Bits(Planted):
    def dispatch(self, x, plan, out=None):
        short = plan.order.astype(np.int64) // plan.inverse.shape[1] % 2**16
        return self.store(x[short % len(x)], out)


class SignedRowsOf16Bits(Planted):
    def embedding(self, ids, weight, out=None):
        return self.store(weight[ids.astype(np.int16)], out)


class GridOf65535Blocks(Planted):
    def relu(self, x, out=None):
        y = super().relu(x, out)
        y[65_535:] = 0.0
        return y


class AttentionGrid(Planted):
    """Has a block for each sequence, up to 65,535."""

    def attention(self, q, k, v, *, scale, causal, window=0, q_pos, k_pos, k_valid=None, sinks=None, dropout=0.0, rng=None, out=None):
        masks = {"causal": causal, "window": window, "q_pos": q_pos, "k_pos": k_pos, "k_valid": k_valid}
        y, lse = super().attention(q, k, v, scale=scale, **masks, sinks=sinks, dropout=dropout, rng=rng, out=out)
        y[65_535:] = 0.0
        return y, lse


class CountsInFloat32(Planted):
    def cross_entropy(self, logits, targets, ignore=-100):
        loss, count, lse = super().cross_entropy(logits, targets, ignore)
        return loss, np.minimum(count, np.float32(2**24)), lse


class BincountInFloat32(Planted):
    def bincount(self, ids, minlength):
        return np.minimum(super().bincount(ids, minlength), 2**24)


class OffsetsOf16Bits(Planted):
    def route(self, ids, weights, valid, *, n_experts, rows, capacity=None, priority="position"):
        plan = super().route(ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority)
        return plan._replace(inverse=np.where(plan.inverse < 2**16, plan.inverse, plan.inverse - 2**16).astype(np.int32))


# ---- long sums, ties, dtypes, rows from the end -----------------------------------------------------------------------------------------


def one_by_one(x):
    """Add up the last axis in float32, one term after the other."""
    return np.cumsum(x, axis=-1, dtype=np.float32)[..., -1] if x.shape[-1] else np.zeros(x.shape[:-1], np.float32)


class NaiveSumOfSquares(Planted):
    def sum_of_squares(self, x):
        return one_by_one(np.reshape(x * x, (-1,)))


class NaiveMean(Planted):
    def layer_norm(self, x, weight, bias, eps, out=None):
        mean = one_by_one(x)[..., None] / np.float32(x.shape[-1])
        centred = x - mean
        rstd = np.float32(1.0) / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(eps))
        y = centred * rstd * weight + (0 if bias is None else bias)
        return self.store(y.astype(x.dtype), out), mean, rstd


class HalfAccumulator(Planted):
    """Adds up the blocks of a product in float16."""

    def linear(self, x, weight, bias=None, out=None):
        if x.shape[-1] < 2000:
            return super().linear(x, weight, bias, out)
        total = np.zeros((len(x), len(weight)), np.float16)
        for start in range(0, x.shape[-1], 100):
            total += (x[:, start : start + 100] @ weight[:, start : start + 100].T).astype(np.float16)
        return self.store(total.astype(x.dtype), out)


class NaiveLogsumexp(Planted):
    def cross_entropy(self, logits, targets, ignore=-100):
        if logits.shape[1] < 2000:
            return super().cross_entropy(logits, targets, ignore)
        top = logits.max(axis=1)
        lse = top + np.log(one_by_one(np.exp(logits - top[:, None])))
        loss = np.where(targets == ignore, np.float32(0), lse - logits[np.arange(len(logits)), targets])
        return loss.sum(), (targets != ignore).sum().astype(np.float32), lse


class UnstableTopK(Planted):
    """Is stable as long as it sorts by insertion."""

    def top_k(self, x, k):
        if x.shape[-1] <= 16:
            return super().top_k(x, k)
        values, ids = super().top_k(x[..., ::-1], k)
        return values, (x.shape[-1] - 1 - ids).astype(np.int32)


class UnstableGate(Planted):
    """Gives ties of many experts to the last."""

    def gate(self, logits, bias, valid, *, rule):
        if logits.shape[1] < 1000 or bias is not None or rule.router == "expert_choice":
            return super().gate(logits, bias, valid, rule=rule)
        result = super().gate(logits[:, ::-1], None, valid, rule=rule)
        ids = (logits.shape[1] - 1 - result.ids).astype(np.int32)
        return result._replace(
            ids=ids, scores=result.scores[:, ::-1], counts=result.counts[::-1].copy(), prob_sum=result.prob_sum[::-1].copy()
        )


class UnstableCapacity(Planted):
    """Drops the first instead of the last among equal probabilities of many tokens."""

    def route(self, ids, weights, valid, *, n_experts, rows, capacity=None, priority="position"):
        if priority == "probability" and len(ids) > 1000 and weights.min() == weights.max():
            weights = weights + np.linspace(0, 1, weights.size, dtype=weights.dtype).reshape(weights.shape)
        return super().route(ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority)


class UnstableLibrary:
    """NumPy, with a sort that is stable for few keys alone."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def argsort(x, axis=-1, stable=True):
        if x.shape[axis] <= 16:
            return np.argsort(x, axis=axis, stable=True)
        return x.shape[axis] - 1 - np.argsort(np.flip(x, axis), axis=axis, stable=True)


class UnstableSort(Planted):
    xp = UnstableLibrary()


class WideStatistics(Planted):
    def rms_norm(self, x, weight, eps, out=None):
        y, rstd = super().rms_norm(x, weight, eps, out)
        return y, rstd.astype(np.float64)


class WideLoss(Planted):
    def cross_entropy(self, logits, targets, ignore=-100):
        loss, count, lse = super().cross_entropy(logits, targets, ignore)
        return loss.astype(np.float64), count, lse


class WideGradient(Planted):
    def linear_dx(self, dy, weight, out=None, accumulate=False):
        return super().linear_dx(dy.astype(np.float64), weight.astype(np.float64), out, accumulate)


class CountsAsFloats(Planted):
    def gate(self, logits, bias, valid, *, rule):
        result = super().gate(logits, bias, valid, rule=rule)
        return result._replace(counts=result.counts.astype(np.int64))


class RowsFromTheStartAlone(Planted):
    def scatter_add(self, inout_target, index, values):
        known = index >= 0
        super().scatter_add(inout_target, index[known], values[known])


# ---- what only some inputs show ---------------------------------------------------------------------------------------------------------


class OnePassVariance(Planted):
    """var = mean(x^2) - mean(x)^2 cancels."""

    def layer_norm(self, x, weight, bias, eps, out=None):
        mean = np.mean(x, axis=-1, keepdims=True)
        variance = np.maximum(np.mean(x * x, axis=-1, keepdims=True) - mean * mean, 0.0)
        rstd = (1.0 / np.sqrt(variance + eps)).astype(x.dtype)
        y = (x - mean) * rstd * weight
        return self.store(y if bias is None else y + bias, out), mean, rstd


class ShortTableOfAngles(Planted):
    def rope(self, x, positions, inv_freq, scale=1.0, interleaved=False, out=None):
        return super().rope(x, positions % 2048, inv_freq, scale, interleaved, out)


class QueriesOfTheFirstSequence(Planted):
    def attention(self, q, k, v, *, scale, causal, window=0, q_pos, k_pos, k_valid=None, sinks=None, dropout=0.0, rng=None, out=None):
        options = {"scale": scale, "causal": causal, "window": window, "k_pos": k_pos, "k_valid": k_valid, "sinks": sinks}
        return super().attention(q, k, v, q_pos=q_pos[:1], dropout=dropout, rng=rng, out=out, **options)


class DropoutOfTheFirstMicroBatch(Planted):
    def attention(self, q, k, v, *, scale, causal, window=0, q_pos, k_pos, k_valid=None, sinks=None, dropout=0.0, rng=None, out=None):
        options = {"scale": scale, "causal": causal, "window": window, "k_pos": k_pos, "k_valid": k_valid, "sinks": sinks}
        first = None if rng is None else rng._replace(micro=0)
        return super().attention(q, k, v, q_pos=q_pos, dropout=dropout, rng=first, out=out, **options)


class IgnoresAFixedTarget(Planted):
    def cross_entropy(self, logits, targets, ignore=-100):
        return super().cross_entropy(logits, targets)

    def cross_entropy_backward(self, dloss, logits, targets, logsumexp, ignore=-100):
        return super().cross_entropy_backward(dloss, logits, targets, logsumexp)


class FixedEps(Planted):
    def adamw(self, inout_param, inout_m, inout_v, grad, *, lr, step, scale, ok, beta1, beta2, eps, weight_decay):
        options = {"scale": scale, "ok": ok, "beta1": beta1, "beta2": beta2, "eps": 1e-8, "weight_decay": weight_decay}
        super().adamw(inout_param, inout_m, inout_v, grad, lr=lr, step=step, **options)


class CorrectionStops(Planted):
    """The bias correction of a step past 100 is that of step 100."""

    def adamw(self, inout_param, inout_m, inout_v, grad, *, lr, step, scale, ok, beta1, beta2, eps, weight_decay):
        options = {"scale": scale, "ok": ok, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().adamw(inout_param, inout_m, inout_v, grad, lr=lr, step=np.minimum(step, 100), **options)


class SignOfZero(Planted):
    """Moves what has no gradient: the sign is 1 or -1."""

    def lion(self, inout_param, inout_m, grad, *, lr, scale, ok, beta1, beta2, weight_decay):
        options = {"scale": scale, "ok": ok, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay}
        still = (inout_m == 0) & (grad == 0) & ok
        super().lion(inout_param, inout_m, grad, lr=lr, **options)
        inout_param -= lr * still


class DividesByZeroNorm(Planted):
    def orthogonal(self, x, steps=5):
        empty = np.sum(x * x, axis=(-2, -1), keepdims=True) == 0
        return np.where(empty, np.float32(np.nan), super().orthogonal(x, steps))


class ClosedGroupsScoreZero(Planted):
    """Masks the groups that are closed by 0, which wins over choices below zero."""

    def gate(self, logits, bias, valid, *, rule):
        result = super().gate(logits, bias, valid, rule=rule)
        if rule.n_groups < 2 or valid is not None:
            return result
        scores = self.sigmoid(logits)
        choice = within_best_groups(self, scores if bias is None else scores + bias, rule.n_groups, rule.top_groups)
        _, ids = self.top_k(np.where(np.isinf(choice), np.float32(0.0), choice), rule.top_k)
        weights = np.take_along_axis(scores, ids.astype(np.int64), axis=-1) * rule.route_scale
        return result._replace(weights=weights, ids=ids, counts=self.bincount(ids.reshape(-1), logits.shape[1]))


class LeavesStrides(Planted):
    def contiguous(self, x):
        return x


SMALL, LARGE = "", ", large"
BUGS = [
    (SharedBuffer, "gelu", SMALL, "the first result changed when it was called again"),
    (SharedGradient, "swiglu_backward", SMALL, "the first result changed when it was called again"),
    (SharedTotal, "add_rms_norm", SMALL, "the first result changed when it was called again"),
    (SharedTotal, "add_rms_norm_backward", SMALL, "the first outputs changed when the forward ran again"),
    (StaleSaved, "ffn_backward", SMALL, "the first backward after two forwards.*must not share what they save"),
    (SharedHidden, "expert_ffn_backward", SMALL, "the first backward after two forwards"),
    (CacheByShape, "dropout", SMALL, "called with other numbers of the same shapes"),
    (CacheByAddress, "linear", SMALL, "called again after its inputs were written in place"),
    (PlanByShape, "route", SMALL, r"result\.order"),
    (CompositeIgnoresAccumulate, "expert_ffn_backward", SMALL, "out given, accumulate"),
    (CompositeIgnoresOut, "moe_ffn_backward", SMALL, r"does not return `out`\.up"),
    (CompositeForgetsBiases, "ffn_backward", SMALL, r"does not return `out`\.up_bias"),
    (HeadAddsIntoOut, "linear_cross_entropy_backward", SMALL, "out given.*got nan.*its old content is not zero"),
    (SecondMicroBatchReplaces, "expert_ffn_backward", SMALL, r"out given, accumulate, result\[1\]\.down_bias"),
    (WritesBesideOut, "embedding_backward", SMALL, "it wrote beside `out`"),
    (LossSwallowsNaN, "cross_entropy", SMALL, "with NaN.*expected nan"),
    (HeadSwallowsNaN, "linear_cross_entropy", SMALL, "with NaN.*expected nan"),
    (NormSwallowsNaN, "rms_norm", SMALL, "with NaN.*expected nan"),
    (ReluSwallowsNaN, "relu", SMALL, "with nan.*expected nan"),
    (GeluClipsInfinity, "gelu", SMALL, "with inf.*expected inf"),
    (AttentionSwallowsNaN, "attention", SMALL, "with NaN.*expected nan"),
    (GateSwallowsNaN, "gate", SMALL, "with nan.*expected nan"),
    (SumStopsBelowInfinity, "sum_of_squares", SMALL, "with inf.*expected inf"),
    (SkippedStepDecays, "adamw", SMALL, "skipped, with a finite gradient"),
    (SkippedStepForgets, "lion", SMALL, "skipped.*tolerance 0"),
    (TileOf1024Columns, "rms_norm", LARGE, r"x \[3,5003\]"),
    (VocabularyTile, "cross_entropy", LARGE, r"logits \[3,50030\]"),
    (OneBlockOfTopK, "top_k", LARGE, r"\[3,5003\]"),
    (SixtyFourExperts, "gate", SMALL, r"logits \[9,70\]"),
    (ThousandExperts, "grouped_matmul", LARGE, "1100 experts"),
    (RowsOf16Bits, "dispatch", LARGE, r"x \[70001,2\]"),
    (SignedRowsOf16Bits, "embedding", LARGE, r"weight \[70001,2\]"),
    (GridOf65535Blocks, "relu", LARGE, r"x \[70001, 3\]"),
    (AttentionGrid, "attention", LARGE, r"q \[70001,1,1,2\]"),
    (CountsInFloat32, "cross_entropy", LARGE, r"more targets than float32 counts.*result\[1\]"),
    (BincountInFloat32, "bincount", LARGE, "17039360 ids"),
    (OffsetsOf16Bits, "route", LARGE, r"ids \[70001,2\].*inverse"),
    (NaiveSumOfSquares, "sum_of_squares", LARGE, "a long sum"),
    (NaiveMean, "layer_norm", LARGE, "a long sum"),
    (HalfAccumulator, "linear", LARGE, "a long sum"),
    (NaiveLogsumexp, "cross_entropy", LARGE, "a long sum"),
    (UnstableTopK, "top_k", SMALL, "ties among 1,000"),
    (UnstableGate, "gate", LARGE, r"logits \[3,1100\].*equal logits.*ids"),
    (UnstableCapacity, "route", LARGE, "capacity by probability, equal weights"),
    (UnstableSort, "argsort", SMALL, "1000 keys"),
    (UnstableSort, "gate", LARGE, r"expert_choice, logits \[1100,2\], equal"),
    (WideStatistics, "rms_norm", SMALL, r"result\[1\] holds float64, expected float32"),
    (WideLoss, "cross_entropy", SMALL, r"result\[0\] holds float64, expected float32"),
    (WideGradient, "linear_dx", SMALL, "result holds float64, expected float32"),
    (CountsAsFloats, "gate", SMALL, r"result\.counts holds int64, expected int32.*Indices and counts are int32"),
    (RowsFromTheStartAlone, "scatter_add", SMALL, "some counted from the end"),
    (OnePassVariance, "layer_norm", SMALL, "far from zero"),
    (OnePassVariance, "add_layer_norm", SMALL, "far from zero"),
    (ShortTableOfAngles, "rope", SMALL, "late positions"),
    (QueriesOfTheFirstSequence, "attention", SMALL, "positions of each sequence"),
    (DropoutOfTheFirstMicroBatch, "attention", SMALL, "dropout"),
    (IgnoresAFixedTarget, "cross_entropy", SMALL, "target 3 ignored"),
    (IgnoresAFixedTarget, "cross_entropy_backward", SMALL, "target 3 ignored"),
    (IgnoresAFixedTarget, "linear_cross_entropy", SMALL, "target 3 ignored"),
    (IgnoresAFixedTarget, "linear_cross_entropy_backward", SMALL, "target 3 ignored"),
    (FixedEps, "adamw", SMALL, "step 100, eps 0.1"),
    (CorrectionStops, "adamw", SMALL, "step 2000"),
    (SignOfZero, "lion", SMALL, "without a gradient"),
    (DividesByZeroNorm, "muon", SMALL, "without a gradient.*got nan"),
    (ClosedGroupsScoreZero, "gate", SMALL, "groups.*every choice below zero"),
    (LeavesStrides, "contiguous", SMALL, "must be a view"),
]


@pytest.mark.parametrize("planted, kernel, size, says", BUGS, ids=[f"{bug[0].__name__}, {bug[1]}" for bug in BUGS])
def test_a_planted_bug_is_found(planted, kernel, size, says):
    backend: Backend = planted()
    check_overrides(backend)
    below = ("array layer", "kernels")
    (case,) = [case for case in cases(backend, kernel=kernel) if case.level in below and case.name.split(" [")[0] == kernel + size]
    assert case.quick is (size == SMALL)
    with pytest.raises(ConformanceError) as caught:
        case.run()
    text = str(caught.value)
    assert re.match(rf"(xp\.)?{kernel} at ", text) and re.search(says, text), text
    hints = "The reference is in|This kernel is the reference|Fix the array layer|Indices and|Sums may|Write|Two|Nothing|Results"
    assert re.search(rf"{hints}|xp\.argsort must", text)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_table_is_called_and_skipped_with_finite_gradients(name):
    labels = [example.label for example in optimizer_steps(name)]
    assert name in names() and any("skipped, with a finite gradient" in label for label in labels)
