"""The RNN-T (transducer) loss: by the definition, in plain numpy, by kernels for CPU and GPU, and
fused with the joint network, whose logits then never exist as a whole.

A transducer reads T encoder frames and writes U labels. At node (t,u) it has written u labels and
looks at frame t. There the joint network, which combines the encoder's frame t with the label
encoder's (prediction network's) state after u labels, gives V logits: the transducer writes a
blank, and moves to frame t+1, or the next label, and stays at frame t.

      u=2   o--o--o--o--->    a path climbs from the lower left corner to the upper right one and
            |  |  |  |        leaves by a blank
      u=1   o--o--o--o            --  blank: (t,u) to (t+1,u)
            |  |  |  |            |   label u+1: (t,u) to (t,u+1)
      u=0   o--o--o--o
           t=0  1  2  3       alpha(t,u): log of the summed probability of all paths to (t,u)

  alpha(t,u) = log(exp(alpha(t-1,u) + blank(t-1,u)) + exp(alpha(t,u-1) + label(t,u-1)))
  cost = -log P(labels | frames) = -(alpha(T-1,U) + blank(T-1,U))
                                                   (Graves 2012, arXiv 1211.3711, eq. 16 and 17)

where alpha(0,0) = 0 and what lies outside the grid is left out. A blank of the last frame below
row U leads nowhere: no path takes it.

`rnnt_loss_reference` says just that. Of a node's V logits it needs two numbers, the
log-probabilities of its two arcs, which we also call arcs; and the gradient needs one number for
each arc, its posterior: the fraction of P(labels | frames) that is carried by the paths over this
arc. (P is a sum over paths, and a path's probability is exp of the sum of its arcs; so dlogP/darc
is the probability of the paths over the arc divided by P.) So all other versions are the same three
steps, first in plain numpy (`plain_log_probs`, `plain_lattice`, `plain_gradient`), later as kernels
(B utterances, padded to T frames and U1 = U + 1 rows; n nodes, all B T U1 of them or those in use):

  log_probs  logits (n,V) -> arcs (n,2)      the two log-probabilities of every node
  lattice    arcs (B,T,U1,2) -> costs (B,)   and in place of the arcs their posteriors, -dcost/darc
  gradient   -> dcost/dlogits (n,V)          the chain rule through the softmax

The first and the last do the same to every node, and are limited by memory alone: they read the
logits, and write their gradient. Folding the softmax into both is known as function merging (arXiv
1909.12415). The middle one, the forward-backward algorithm, is all dependence: T + U steps, each
waiting for the one before, over two numbers a node.

  rnnt_loss         for given logits, in place of torchaudio's
  joint_rnnt_loss   computes the joint network's logits for a tile, a slice of the nodes, at a
                    time and drops them; with `keep`, for some nodes only
  simple_rnnt_loss  the transducer of logits that are sums, and prune_band, which turns its
                    posteriors into such a `keep` (pruned RNN-T, arXiv 2206.13236)
  rnnt_align        the best single path (Viterbi)

Processes: numba's OpenMP threads do not survive a fork. Workers that call the loss must be spawned
(`DataLoader(..., multiprocessing_context="spawn")`); or prepare data in workers and take the loss
in the parent, as train.py does. In a child forked after the loss has run, it raises RuntimeError
where OpenMP would end the process.

Threads: the loss runs on as many as torch does and leaves both libraries' counts as it found them;
call it from one thread at a time unless numba uses TBB or OpenMP (`numba.threading_layer()`).

`python rnnt_loss.py` runs the main versions on one batch and draws a lattice.
"""
import math
import operator
import os
import sys
import warnings
from collections import namedtuple
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, product
from types import SimpleNamespace

# Before numba is imported: it would warn of few GPU blocks, but one an utterance is what is meant.
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")
import numba
import numpy as np
import torch
from numba import cuda, njit, prange
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

try:
    njit(cache=True)(lambda: None)    # numba keeps compiled code beside this file, or under HOME
except RuntimeError as error:
    raise ImportError("numba finds no folder to keep compiled code in: set NUMBA_CACHE_DIR to one "
                      f"that can be written ({error})") from None

# The two arcs of a node, in arrays (...,2); `blank` in lower case is the class among the V logits.
# Such an array holds a number for each arc and is used again and again: log-probabilities before
# `lattice`, shares (see `plain_lattice`) after its forward pass, and after its backward pass
# posteriors, which are -dcost/darc.
BLANK, LABEL = 0, 1
# y[b,t,u] is the label that node (t,u) may write. Two values mean that there is none: all labels
# are written (u = U); the node lies outside its utterance.
NO_LABEL, PADDING = -1, -2
# What `check_arguments` makes of a loss's arguments. frames, counts (B,): each utterance's T and U;
# fused: logits need a log-softmax; fastemit, delay: as given; gpu: which kernels; arc_dtype: of the
# arcs; factor: what the sum of the costs is multiplied by, 0 for reduction="none".
Batch = namedtuple("Batch", "y frames counts blank fused fastemit delay gpu arc_dtype factor")
FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16
SLAB_BYTES = 4 << 20          # of logits that are converted at a time (half precision, on a CPU)
                              # or summed directly (simple_rnnt_loss), about
TILE_BYTES = 48 << 20         # of about this size are the tiles of the fused joint


# ---- By the definition ---------------------------------------------------------------------------

def rnnt_loss_reference(logits, targets, logit_lengths, target_lengths, *, blank,
                        fused_log_softmax=True, delay_penalty=0.0):
    """Costs (B,) in float64, one node at a time; autograd gives the gradient, where each node can
    be reached. The arguments are rnnt_loss's, and are not checked."""
    costs = []
    for b in range(len(logits)):
        T, U = int(logit_lengths[b]), int(target_lengths[b])
        logp = logits[b].double()                                                     # (T,U1,V)
        if fused_log_softmax:
            logp = logp.log_softmax(-1)
        alpha = {}                                   # (t,u) -> log-probability of reaching the node
        for t, u in product(range(T), range(U + 1)):
            ways = [] if t or u else [logp.new_zeros(())]           # the start: probability 1
            if t > 0:
                ways.append(alpha[t - 1, u] + logp[t - 1, u, blank])
            if u > 0:
                penalty = delay_penalty * ((T - 1) / 2 - t)
                ways.append(alpha[t, u - 1] + logp[t, u - 1, targets[b][u - 1]] + penalty)
            alpha[t, u] = torch.stack(ways).logsumexp(0)
        costs.append(-(alpha[T - 1, U] + logp[T - 1, U, blank]))
    return torch.stack(costs)


# ---- The three steps in plain numpy, for one utterance -------------------------------------------

def plain_log_probs(logits, labels, blank):
    """(T,U1,V), (U,) -> arcs (T,U1,2):  arc = logit[c] - log sum_k exp(logit[k]), where c is the
    blank or the node's label."""
    top = logits.max(-1, keepdims=True)               # log-sum-exp without overflow
    normalizer = top[..., 0] + np.log(np.exp(logits - top).sum(-1))                   # (T,U1)
    arcs = np.full((*normalizer.shape, 2), -np.inf)   # the last row has no label to write
    arcs[:, :, BLANK] = logits[:, :, blank] - normalizer
    for u, label in enumerate(labels):
        arcs[:, u, LABEL] = logits[:, u, label] - normalizer[:, u]
    return arcs


def plain_lattice(arcs):
    """(T,U1,2) -> log P and the posteriors of the arcs (T,U1,2).

    Forward, each arc gets its share of the node it leads to: the fraction of the probability of all
    paths to that node that came over this arc,

      share(arc) = exp(alpha(where it starts) + arc - alpha(where it leads)),

    so that the shares of the two arcs into a node add up to 1 (at the edges there is one arc; 0
    where no path comes). Backward, a path that goes through a node came in over one of the two, in
    proportion to their shares:

      posterior(arc) = share(arc) * posterior(the node it leads to)
      posterior(node) = the sum of the posteriors of its two outgoing arcs

    beginning with the last blank, out of (T-1,U), which every path takes: 1. This is
    forward-backward without beta, the log-probability of finishing from a node: no
    alpha + beta - log P, whose digits cancel in long audio.
    """
    T, U1, _ = arcs.shape
    alpha, posteriors = np.zeros((T, U1)), np.zeros_like(arcs)
    for t, u in product(range(T), range(U1)):
        if t == u == 0:
            continue                                  # the start: probability 1, log 0
        by_blank = alpha[t - 1, u] + arcs[t - 1, u, BLANK] if t else -np.inf
        by_label = alpha[t, u - 1] + arcs[t, u - 1, LABEL] if u else -np.inf
        alpha[t, u] = np.logaddexp(by_blank, by_label)
        if alpha[t, u] == -np.inf:
            continue                                  # no path comes here: shares of 0
        if t:
            posteriors[t - 1, u, BLANK] = np.exp(by_blank - alpha[t, u])              # its share
        if u:
            posteriors[t, u - 1, LABEL] = np.exp(by_label - alpha[t, u])
    logp = alpha[-1, -1] + arcs[-1, -1, BLANK]
    posteriors[T - 1, U1 - 1, BLANK] = logp > -np.inf
    for t, u in product(reversed(range(T)), reversed(range(U1))):
        if t < T - 1:
            posteriors[t, u, BLANK] *= posteriors[t + 1, u].sum()
        if u < U1 - 1:
            posteriors[t, u, LABEL] *= posteriors[t, u + 1].sum()
    return logp, posteriors


def plain_gradient(logits, labels, blank, posteriors):
    """-> dcost/dlogits (T,U1,V):  dcost/dlogit[k] = (g_blank if k is the blank, g_label if k is the
    node's label, else 0) - softmax[k] (g_blank + g_label), where g = dcost/darc = -posterior."""
    g = -posteriors
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    grad = -softmax * g.sum(-1, keepdims=True)
    grad[:, :, blank] += g[:, :, BLANK]
    for u, label in enumerate(labels):
        grad[:, u, label] += g[:, u, LABEL]
    return grad


def plain_rnnt_loss(logits, labels, blank):
    """One utterance, numpy logits (T,U1,V) and labels (U,) -> its cost and their gradient."""
    logp, posteriors = plain_lattice(plain_log_probs(logits, labels, blank))
    return -logp, plain_gradient(logits, labels, blank, posteriors)


# ---- The loss of given logits --------------------------------------------------------------------

def rnnt_loss(logits, targets, logit_lengths, target_lengths, blank=-1, clamp=-1, reduction="mean",
              fused_log_softmax=True, *, fastemit_lambda=0.0, delay_penalty=0.0, validate=False):
    """-log P(targets | logits), reduced. Arguments as torchaudio.functional.rnnt_loss's: names,
    order, defaults.

    logits (B,T,U1,V), float32, float64 (CPU only), float16 or bfloat16; targets (B,U) and both
    lengths (B,), integers in tensors, arrays or lists. clamp > 0 bounds each |dcost/dlogit|
    of an utterance's own cost, before the mean's 1/B and what is multiplied afterwards.
    fastemit_lambda scales the label arcs' part of the gradient by 1 + lambda, not the cost, whose
    derivative the gradient then is not (FastEmit, arXiv 2010.11148). delay_penalty adds
    delay_penalty ((T-1)/2 - t), T the utterance's own, to a label's log-probability at frame t, in
    cost and gradient: late ones cost, early ones gain, so a cost may be below 0 (arXiv 2211.00490).
    "mean" is over utterances. Costs are float32, or float64 for such logits.

    Raises ValueError for what does not fit, a target that is the blank included. With logits on a
    GPU, the values of targets, and of lengths that lie there, are checked only if validate, since
    that waits for them; else one out of range makes the cost of its utterance NaN.
    """
    _tensors(logits=logits)
    batch = check_arguments(logits, targets, logit_lengths, target_lengths, blank,
                            reduction=reduction, validate=validate, fused=fused_log_softmax,
                            fastemit=fastemit_lambda, delay=delay_penalty)
    clamp = _number("clamp", clamp)
    need_grad = torch.is_grad_enabled() and logits.requires_grad
    costs = _Loss.apply(logits.contiguous(), batch, clamp, need_grad)
    return costs.sum() * batch.factor if batch.factor else costs


class _Loss(Function):
    @staticmethod
    def forward(ctx, logits, batch, clamp, need_grad):
        # norms, a node's log-normaliser in two parts: top = max_k logit[k], and
        # log sum_k exp(logit[k] - top).
        arcs, norms = log_probs(logits.flatten(0, 2), batch.y.flatten(), batch)       # (n,2), (n,2)
        arcs = arcs.view(*batch.y.shape, 2)                                           # (B,T,U1,2)
        costs = lattice(arcs, batch, need_grad=need_grad)                             # (B,)
        ctx.save_for_backward(logits, arcs, norms)                               # posteriors by now
        ctx.options = batch, clamp
        return costs.to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx, upstream):
        _first_derivative_only()
        (logits, posteriors, norms), (batch, clamp) = ctx.saved_tensors, ctx.options
        grad = _empty_like(logits)
        upstream = upstream[:, None, None, None]
        arc_grads = -posteriors if clamp > 0 else -posteriors * upstream              # (B,T,U1,2)
        gradient(logits.flatten(0, 2), batch.y.flatten(), norms, arc_grads.flatten(0, 2), batch,
                 grad.flatten(0, 2))
        if clamp > 0:                                 # elementwise on dcost/dlogit, as torchaudio's
            grad.clamp_(-clamp, clamp).mul_(upstream)
        return grad, None, None, None


def _empty_like(logits):
    """numpy asks for huge pages. torch does not, and touching its fresh memory takes as long as
    copying it five times."""
    if logits.is_cuda or logits.dtype == torch.bfloat16:          # which numpy does not have
        return torch.empty_like(logits)
    return torch.from_numpy(np.empty_like(logits.detach().numpy()))


def _first_derivative_only():
    # once_differentiable would let it pass where upstream needs no gradient.
    if torch.is_grad_enabled():
        raise RuntimeError("rnnt_loss has no second derivative: backward was called with "
                           "create_graph=True")


# ---- The loss fused with the joint network -------------------------------------------------------

def joint_rnnt_loss(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths, *,
                    blank, reduction="mean", fastemit_lambda=0.0, delay_penalty=0.0,
                    tile_bytes=TILE_BYTES, keep=None):
    """rnnt_loss of the logits tanh(encoder_out[:, :, None] + label_out[:, None]) @ weight.T + bias,
    without holding them.

    encoder_out (B,T,J) and label_out (B,U1,J) are already projected; weight (V,J), bias (V,); the
    rest as rnnt_loss's. Under autocast the logits have its dtype, else encoder_out's. Lengths and
    keep, where they lie on a GPU, are fetched, each a wait; nothing else waits. A tile, a slice of
    the nodes, takes about tile_bytes. If the longest utterance fits a tile, loss and gradient take
    three matrix products of size n J V (logits, and the gradients of hidden vectors and weight);
    else up to four, as logits are overwritten and computed again once the lattice has run.
    reduction="none" runs one utterance at a time and keeps a weight gradient for each.

    keep (B,T,U1), bool: a node outside it has no arcs (log-probability -inf), no logits and no
    gradient; only the light lattice still visits it. The loss is then of the paths inside alone:
    never below the full one, inf where no path is left. Nearly all of the time is in the n nodes
    kept, so it is linear in T where they are a band (prune_band), or a block for each of the
    sentences that were joined into one stream.

    Raises ValueError for shapes, types and values that do not fit; on a GPU, a target out of range
    makes the cost NaN instead. The gradient is formed before a GradScaler's factor reaches it, so
    of the half precisions take bfloat16: float16 would lose what is small.
    """
    inputs = encoder_out, label_out, weight, bias
    joint = _Joint(inputs, targets, logit_lengths, target_lengths, blank, tile_bytes, keep,
                   reduction=reduction, fastemit=fastemit_lambda, delay=delay_penalty)
    if joint.batch.factor:                            # the same for all utterances
        need_grad = torch.is_grad_enabled() and any(a.requires_grad for a in inputs)
        return _JointLoss.apply(joint, need_grad, *inputs) * joint.batch.factor
    del joint                                         # it has checked the arguments
    # Fetched once, not for each utterance.
    logit_lengths, target_lengths, keep = (
        a if a is None else torch.as_tensor(a, device="cpu")
        for a in (logit_lengths, target_lengths, keep))
    alone = partial(joint_rnnt_loss, weight=weight, bias=bias, blank=blank, reduction="sum",
                    fastemit_lambda=fastemit_lambda, delay_penalty=delay_penalty,
                    tile_bytes=tile_bytes)
    costs = []
    for own in (slice(b, b + 1) for b in range(len(encoder_out))):
        costs.append(alone(
            encoder_out[own], label_out[own], targets=targets[own],
            logit_lengths=logit_lengths[own], target_lengths=target_lengths[own],
            keep=None if keep is None else keep[own]))
    return torch.stack(costs) if costs else bias.new_zeros(0)


class _JointLoss(Function):
    """The sum of the costs. The gradient is formed in forward, tile by tile, and backward only
    multiplies it. A group is the utterances whose lattices run before any of their gradients is
    formed (`_plan_tiles`): if one tile holds the whole group, the logits are still in the buffer
    when the gradient is due, else they are computed again."""

    @staticmethod
    def forward(ctx, joint, need_grad, *inputs):
        sum_dtype = joint.norms.dtype                 # half precision adds up in float32
        grads = [torch.zeros(a.shape, dtype=sum_dtype, device=a.device)
                 for a in inputs if need_grad]        # of encoder_out, label_out, weight, bias
        total = joint.norms.new_zeros((), dtype=torch.float64)
        for utterances, tiles in joint.groups:
            total += joint.costs_of(utterances, tiles, need_grad=need_grad).sum()
            if need_grad:
                for tile in tiles:
                    _add_tile_gradient(joint, tile, *grads)
        ctx.save_for_backward(*grads)                 # which backward lets go of
        return total.to(sum_dtype)

    @staticmethod
    def backward(ctx, upstream):
        _first_derivative_only()
        return None, None, *(grad * upstream for grad in ctx.saved_tensors)


def _add_tile_gradient(joint, tile, d_encoder, d_label, d_weight, d_bias):
    """The chain rule through the joint network, for the n nodes of one tile."""
    hidden, logits, d_logits = joint.compute(tile)                            # (n,J), (n,V), (n,V)
    arc_grads = -joint.arcs[joint.places[tile]]       # `costs_of` has made posteriors of them
    gradient(logits, joint.y[tile], joint.norms[tile], arc_grads, joint.batch, d_logits)
    d_hidden = d_logits @ joint.weight                                        # (n,J)
    d_sum = torch.ops.aten.tanh_backward(d_hidden, hidden).to(d_encoder.dtype)
    # Many nodes share a frame, and many share a row of labels.
    d_encoder.flatten(0, 1).index_add_(0, joint.encoder_rows[tile], d_sum)
    d_label.flatten(0, 1).index_add_(0, joint.label_rows[tile], d_sum)
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)           # no (V,J) in between
    else:
        d_weight += d_logits.T @ hidden
    d_bias += d_logits.sum(0, dtype=d_bias.dtype)


class _Joint:
    """The joint network over the n nodes in use, and what is known of each of them.

    The nodes of all utterances are packed in one list, in the order (b,t,u), without padding and
    without those that `keep` leaves out. A tile is a slice of that list, of no more nodes than have
    room in tile_bytes: its logits are computed together in one buffer, are reduced to two arcs a
    node, and stay there until the next tile's overwrite them.

      nodes     a a a a a a b b b c c c c c d d       of the utterances a, b, c, d
      tiles    [a a a a a a b b b][c c c c c d d]     room for 12, twice the longest: groups of
                                                      two, (a,b) and (c,d), a tile each
               [a a a a][a a b b][b c c c][c c d d]   room for 4: one group of many tiles

    `places` are the nodes' places in the padded (B,T,U1), where the lattice wants their arcs;
    `encoder_rows` and `label_rows` say for each node which row of encoder_out (B*T,J) and which of
    label_out (B*U1,J) are added for it.
    """

    def __init__(self, inputs, targets, logit_lengths, target_lengths, blank,
                 tile_bytes=TILE_BYTES, keep=None, **options):
        encoder_out, label_out, weight, bias = inputs
        B, T, U1, V, J = _joint_sizes(*inputs)
        tile_bytes = _whole("tile_bytes", tile_bytes)
        device, dtype = encoder_out.device, encoder_out.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        self.encoder_out = encoder_out.detach().flatten(0, 1)                         # (B T,J)
        self.label_out = label_out.detach().flatten(0, 1)                             # (B U1,J)
        self.weight, self.bias = weight.detach().to(dtype), bias.detach().to(dtype)
        # A wait for each that lies on a GPU.
        frames = _integers("logit_lengths", logit_lengths, 1, B).cpu()
        counts = _integers("target_lengths", target_lengths, 1, B).cpu()
        logits = SimpleNamespace(shape=(B, T, U1, V), device=device, dtype=dtype)
        self.batch = check_arguments(logits, targets, frames, counts, blank, **options)

        inside = _nodes_in_use(T, U1, frames, counts, keep)                           # (B,T,U1)
        b, t, u = (index.to(device, non_blocking=True)
                   for index in inside.nonzero(as_tuple=True))                        # (n,) each
        self.encoder_rows, self.label_rows = b * T + t, b * U1 + u
        self.places = self.encoder_rows * U1 + u
        self.y = self.batch.y.flatten()[self.places]
        # What no tile fills: without `keep` padding alone, which the lattice never reads; with it
        # also nodes that are not kept, out of which there is no way.
        unfilled = 0.0 if keep is None else -math.inf
        self.arcs = torch.full((B * T * U1, 2), unfilled, dtype=self.batch.arc_dtype, device=device)
        self.norms = torch.empty(len(u), 2, dtype=torch.promote_types(dtype, torch.float32),
                                 device=device)

        # A node takes its logits and their gradient, and about four vectors of the joint's width.
        room = max(1, tile_bytes // ((2 * V + 4 * J) * dtype.itemsize))               # nodes a tile
        self.groups = _plan_tiles(inside.sum((1, 2)).tolist(), room)
        self.buffers = self.weight.new_empty(2, min(room, len(u)), V)
        self.current = None

    def compute(self, tile):
        """-> hidden (n,J), logits (n,V), and a buffer (n,V) for their gradient. The tile computed
        last is not computed again."""
        if self.current != tile:
            hidden = self.encoder_out.index_select(0, self.encoder_rows[tile])        # (n,J)
            hidden.add_(self.label_out.index_select(0, self.label_rows[tile])).tanh_()
            self.hidden, self.current = hidden.to(self.weight.dtype), tile
            torch.addmm(self.bias, self.hidden, self.weight.T, out=self.buffers[0, :len(hidden)])
        return self.hidden, *self.buffers[:, :len(self.hidden)]

    def costs_of(self, utterances, tiles, **how):
        """-> the costs of a group. Its arcs, as `lattice` leaves them, stay in self.arcs, its
        log-normalisers in self.norms."""
        for tile in tiles:
            _, logits, _ = self.compute(tile)
            arcs, self.norms[tile] = log_probs(logits, self.y[tile], self.batch)
            self.arcs[self.places[tile]] = arcs
        arcs = self.arcs.view(*self.batch.y.shape, 2)[utterances]
        return lattice(arcs, self.batch, utterances, **how)


def _joint_sizes(encoder_out, label_out, weight, bias):
    """-> B, T, U1, V, J."""
    _tensors(encoder_out=encoder_out, label_out=label_out, weight=weight, bias=bias)
    if encoder_out.dtype != label_out.dtype:
        raise ValueError(f"encoder_out is {encoder_out.dtype}, label_out {label_out.dtype}: their "
                         "sum is to be of one type")
    e, l, w, v = (tuple(a.shape) for a in (encoder_out, label_out, weight, bias))
    if [len(e), len(l), len(w), len(v)] != [3, 3, 2, 1] or l[::2] != e[::2] or w != (*v, e[2]):
        raise ValueError("encoder_out (B,T,J), label_out (B,U1,J), weight (V,J), bias (V,) are "
                         f"{e}, {l}, {w}, {v}")
    return e[0], e[1], l[1], v[0], e[2]


def _nodes_in_use(T, U1, frames, counts, keep):
    """bool (B,T,U1), on the CPU: inside the utterance, and in `keep`."""
    in_frames = torch.arange(T, device="cpu") < frames[:, None]                       # (B,T)
    in_labels = torch.arange(U1, device="cpu") <= counts[:, None]                     # (B,U1)
    inside = in_frames[:, :, None] & in_labels[:, None]
    if keep is None:
        return inside
    keep = torch.as_tensor(keep)
    if keep.shape != inside.shape or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool of shape {tuple(inside.shape)}, "
                         f"not {keep.dtype} of shape {tuple(keep.shape)}")
    return inside & keep.cpu()


def _plan_tiles(sizes, room):
    """How many nodes each utterance has, how many a tile has room for -> groups, each a slice of
    utterances and its tiles, slices of the packed nodes.

    The gradient of a node's logits needs the lattice of its whole utterance. Where a tile has room
    for the longest utterance, a group is as many utterances as are sure to fit one tile: its logits
    are still there when their lattices have run and the gradient is due. Where not, all utterances
    are one group of many tiles, each to be computed again.
    """
    per_group = room // max([1, *sizes]) or len(sizes)           # utterances
    bounds = [0, *accumulate(sizes)]                  # utterance b has nodes bounds[b]:bounds[b+1]
    groups = []
    for b in range(0, len(sizes), per_group):
        first, last = bounds[b], bounds[min(b + per_group, len(sizes))]
        tiles = [slice(i, min(i + room, last)) for i in range(first, last, room)]
        groups.append((slice(b, b + per_group), tiles))
    return groups


# ---- Pruned: which nodes are worth their logits --------------------------------------------------
# Most nodes lie on no path worth the name. To know which ones do, a transducer that needs no joint
# network: its logits are am[t] + lm[u], of two small projections, and they are never formed
# (arXiv 2206.13236, section 3):
#
#   log sum_k exp(am[t,k] + lm[u,k]) = log sum_k exp(am[t,k]) exp(lm[u,k])
#
# which for all (t,u) is one matrix product of exponentials. Its node posteriors choose a band of
# rows for each frame, and the joint network is asked about nodes of the band only.

def simple_rnnt_loss(am, lm, targets, logit_lengths, target_lengths, *, blank, reduction="mean"):
    """rnnt_loss(am[:, :, None] + lm[:, None], ...) without these logits -> its cost, and the
    posteriors (B,T,U1) of the nodes.

    am (B,T,V) says what frame t sounds like, lm (B,U1,V) what may follow u labels; the rest as
    rnnt_loss's. The cost is differentiable in am and lm. A node's posterior is the probability that
    the path goes through it, for prune_band. All is in float32 at least, under autocast too (on a
    GPU where TF32 is allowed, the product of the exponentials is TF32). Nodes whose product of
    exponentials underflows (in float32, where for every class the distances below the peak of am
    and the peak of lm add up to more than 71 - log V nats) are summed directly; on a GPU, finding
    them is a wait. Raises ValueError for what does not fit; on a GPU, a target out of
    range makes the cost NaN instead.
    """
    _tensors(am=am, lm=lm)
    a, l = tuple(am.shape), tuple(lm.shape)
    if [len(a), len(l)] != [3, 3] or a[::2] != l[::2]:
        raise ValueError(f"am (B,T,V), lm (B,U1,V) are {a}, {l}")
    dtype = torch.promote_types(torch.promote_types(am.dtype, lm.dtype), torch.float32)
    logits = SimpleNamespace(shape=(a[0], a[1], l[1], a[2]), device=am.device, dtype=dtype)
    batch = check_arguments(logits, targets, logit_lengths, target_lengths, blank,
                            reduction=reduction)
    padding = batch.y == PADDING                                                      # (B,T,U1)
    labels = batch.y.amax(1).clamp(min=0)             # over t: the targets again, (B,U1)
    with torch.autocast(am.device.type, enabled=False):
        am = am.to(dtype).masked_fill(padding.all(2)[..., None], 0)   # it may hold anything
        lm = lm.to(dtype).masked_fill(padding.all(1)[..., None], 0)
        arcs = _simple_arcs(am, lm, labels, batch.blank).masked_fill(padding[..., None], 0)
        costs, posteriors = _Lattice.apply(arcs, batch)
    return costs.sum() * batch.factor if batch.factor else costs, posteriors


def _simple_arcs(am, lm, labels, blank):
    """am (B,T,V), lm (B,U1,V), labels (B,U1) -> arcs (B,T,U1,2) of the logits am + lm."""
    # A node's softmax does not see what is taken off all of its classes.
    am, lm = (a - a.detach().amax(-1, keepdim=True) for a in (am, lm))
    normalizer = _log_sum_exp_of_sums(am, lm)                                         # (B,T,U1)
    blanks = am[..., blank, None] + lm[..., blank][:, None]
    of_frames = am.gather(2, labels[:, None].expand(-1, am.shape[1], -1))             # (B,T,U1)
    of_rows = lm.gather(2, labels[:, :, None]).mT                                     # (B,1,U1)
    return torch.stack([blanks - normalizer, of_frames + of_rows - normalizer], -1)


def _log_sum_exp_of_sums(am, lm):
    """log sum_k exp(am[b,t,k] + lm[b,u,k]) as (B,T,U1), where no am or lm is above 0."""
    sums = am.exp() @ lm.exp().mT
    info = torch.finfo(am.dtype)
    # The terms that underflowed add up to at most V tiny. Of a sum below V tiny / eps that is more
    # than a rounding error.
    lost = sums < am.shape[-1] * info.tiny / info.eps
    result = sums.masked_fill(lost, 1).log()
    b, t, u = lost.nonzero(as_tuple=True)             # none, but where am and lm exclude each other
    if not len(b):
        return result
    rows = max(1, SLAB_BYTES // (am.shape[-1] * am.element_size()))
    # A slab's sums are dropped and, in backward, formed again.
    directly = [checkpoint(_log_sum_exp_at, am, lm, *slab, use_reentrant=False,
                           preserve_rng_state=False)
                for slab in zip(b.split(rows), t.split(rows), u.split(rows))]
    return result.index_put((b, t, u), torch.cat(directly))


def _log_sum_exp_at(am, lm, b, t, u):
    return (am[b, t] + lm[b, u]).logsumexp(-1)


class _Lattice(Function):
    """Arcs (B,T,U1,2) -> costs (B,) and the posteriors (B,T,U1) of the nodes; only the costs are
    differentiable."""

    @staticmethod
    def forward(ctx, arcs, batch):
        posteriors = arcs.to(batch.arc_dtype, copy=True)   # `lattice` makes them so
        costs = lattice(posteriors, batch)
        nodes = posteriors.sum(-1)                    # a path leaves a node by one arc or the other
        ctx.save_for_backward(posteriors)
        ctx.mark_non_differentiable(nodes)
        return costs.to(arcs.dtype), nodes

    @staticmethod
    def backward(ctx, upstream, _):
        _first_derivative_only()
        posteriors, = ctx.saved_tensors
        return (-posteriors * upstream[:, None, None, None]).to(upstream.dtype), None


@torch.no_grad()
def prune_band(posteriors, logit_lengths, target_lengths, width):
    """-> keep (B,T,U1), bool: for each frame the `width` neighbouring rows that together hold the
    most posterior, as a band with paths in it.

    posteriors (B,T,U1) as simple_rnnt_loss gives them; both lengths (B,). A frame's rows are its
    window. To have paths, the window of the first frame begins at row 0, that of the last frame
    ends at row U, and none begins below the one before or more than width - 1 rows above it, so
    that neighbours share a row. Where the heaviest rows break these rules, the window that begins
    lower wins:
    labels then move to later frames, which have heard more. Only the rule for the last frame moves
    rows up, and labels to earlier frames.

    A path in the band writes at most width - 1 labels in a frame, and where a translation waits for
    a word, labels come in bursts: width must be above the number of labels in the longest. Where
    even (width - 1) T < U, that utterance gets the least width that has a path, and a warning says
    so.

    Raises ValueError for what does not fit; lengths that lie on a GPU are a wait.
    """
    _tensors(posteriors=posteriors)
    if posteriors.dim() != 3 or 0 in posteriors.shape[1:]:
        raise ValueError(f"posteriors must be (B,T,U1), not {tuple(posteriors.shape)}")
    if (width := _whole("width", width)) < 1:
        raise ValueError(f"width must be a whole number of rows, 1 or more, not {width}")
    (B, T, U1), device = posteriors.shape, posteriors.device
    width = min(width, U1)                            # more rows than that there are not
    frames = _integers("logit_lengths", logit_lengths, 1, B).cpu()                    # (B,)
    counts = _integers("target_lengths", target_lengths, 1, B).cpu()
    _refuse("logit_lengths", frames, (frames < 1) | (frames > T), f"1..{T}")
    _refuse("target_lengths", counts, (counts < 0) | (counts >= U1), f"0..{U1 - 1}")
    frames, counts = frames[:, None], counts[:, None]                                 # (B,1)
    least = -(-counts // frames) + 1
    if (least > width).any():
        warnings.warn(f"prune_band: width {width} cannot write U labels in T frames where "
                      "(width - 1) T < U; wider there", stacklevel=3)
    width, frames, counts = (a.to(device) for a in (least.clamp(min=width), frames, counts))
    t, u = torch.arange(T, device=device), torch.arange(U1, device=device)
    last_first = (counts + 1 - width).clamp(min=0)    # first row of the window that ends at row U

    # In brackets, the first row of the window of each frame, T = 6, U = 5, width 2 for example.
    first = _heaviest_windows(posteriors, width, last_first)                    # (2 1 3 4 3 3)
    first = torch.where(t < frames, first, last_first)
    # It never falls: none is above a later one.
    first = first.flip(1).cummin(1).values.flip(1)                              # (1 1 3 3 3 3)
    rise = (width - 1) * t                                                      # is 0 1 2 3 4 5
    first = (first - rise).cummin(1).values + rise    # rises by at most width - 1 (1 1 2 3 3 3)
    first = torch.minimum(first, rise)                # starts at row 0         # (0 1 2 3 3 3)
    ends = last_first - (width - 1) * (frames - 1 - t)
    first = torch.maximum(first, ends)                # ends at row U           # (0 1 2 3 3 4)
    first, width = first[..., None], width[..., None]                                 # (B,T,1)
    keep = (u >= first) & (u < first + width)
    return keep & (t < frames)[..., None] & (u <= counts)[:, None]


def _heaviest_windows(posteriors, width, last_first):
    """(B,T): the first row, at most `last_first`, of each frame's window of `width` rows with the
    most posterior, less 1e-4 / U1 for each row between its centre and the frame's mean row: that
    decides where two are about equal."""
    T, U1 = posteriors.shape[1:]
    u = torch.arange(U1, device=posteriors.device)
    # The mass of the rows [u, u + width) is a difference of two running sums.
    sums = torch.nn.functional.pad(posteriors.double().cumsum(2), (1, 0))             # (B,T,U1+1)
    ends = (u + width).clamp(max=U1)[:, None].expand(-1, T, -1)                       # (B,T,U1)
    mass = sums.gather(2, ends) - sums[..., :-1]
    mean = (posteriors * u).sum(2) / posteriors.sum(2).clamp(min=1e-30)               # (B,T)
    centre = u + (width[..., None] - 1) / 2
    mass -= 1e-4 / U1 * (centre - mean[..., None]).abs()
    return mass.masked_fill((u > last_first)[:, None], -math.inf).argmax(2)


# ---- Viterbi -------------------------------------------------------------------------------------

@torch.no_grad()
def rnnt_align(logits, targets, logit_lengths, target_lengths, *, blank):
    """The frame (B,U1-1) at which the likeliest path writes each label; -1 in padding and where
    there is no path. Arguments as rnnt_loss's."""
    _tensors(logits=logits)
    batch = check_arguments(logits, targets, logit_lengths, target_lengths, blank)
    arcs, _ = log_probs(logits.contiguous().flatten(0, 2), batch.y.flatten(), batch)
    arcs = arcs.view(*batch.y.shape, 2)
    lattice(arcs, batch, viterbi=True)
    return _emitted(arcs)


@torch.no_grad()
def joint_rnnt_align(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths,
                     *, blank):
    """rnnt_align without the logits; arguments as joint_rnnt_loss's."""
    inputs = encoder_out, label_out, weight, bias
    joint = _Joint(inputs, targets, logit_lengths, target_lengths, blank)
    for utterances, tiles in joint.groups:
        joint.costs_of(utterances, tiles, viterbi=True)
    return _emitted(joint.arcs.view(*joint.batch.y.shape, 2))


def _emitted(arcs):
    """(B,T,U1,2), 1 on the path and 0 off it -> (B,U1-1), the frame of each label; -1 where there
    is none."""
    taken = (arcs[:, :, :-1, LABEL] == 1).int()                                       # (B,T,U1-1)
    return torch.where(taken.any(1), taken.argmax(1), -1)         # argmax: of its only 1


# ---- The three steps as kernels: the lattice, one text for CPU and GPU ---------------------------
# alpha is float64: in long audio a float32 would lose the digits that tell two ways into a node
# apart. Arcs and shares are kept, and exp and log taken, in `arc_dtype`: float64 on a CPU; on a GPU
# float32, which is much faster there.

def _make_join(arc_dtype):
    def join(a, b, viterbi):
        """log(e^a + e^b), or the larger of the two, and the share of each in it."""
        if a == -math.inf and b == -math.inf:
            return a, arc_dtype(0), arc_dtype(0)      # nothing comes here: no NaN from inf - inf
        top = a if a >= b else b
        of_a, of_b = math.exp(arc_dtype(a - top)), math.exp(arc_dtype(b - top))   # one of them is 1
        if viterbi:                                   # all to the larger one, to a of equal ones
            of_a, of_b = arc_dtype(a >= b), arc_dtype(not a >= b)
        return top + math.log(of_a + of_b), of_a / (of_a + of_b), of_b / (of_a + of_b)
    return join


def _make_lattice(join, barrier):
    def one_lattice(arcs, alpha, T, U, need_grad, viterbi, i, threads):
        """plain_lattice for an utterance whose arcs (T,U1,2) come in as log-probabilities and, if
        need_grad, go out as posteriors -> log P. With viterbi, shares are 0 or 1.

        Nodes of one antidiagonal d = t + u need only the one before (backward, the one after), so
        they can be done at once: thread i does every `threads`-th; on a CPU, thread 0 does all.
        alpha (2,U1) holds this antidiagonal and the one before. An arc's share can take its place,
        for nobody else reads it: an arc leads to one node. The last blank leads to none, and is
        still a log-probability after the forward pass.
        """
        for d in range(T + U):                        # forward
            new, old = alpha[d % 2], alpha[1 - d % 2]                                 # (U1,) each
            for u in range(max(0, d - T + 1) + i, min(d, U) + 1, threads):
                t = d - u
                by_blank = old[u] + arcs[t - 1, u, BLANK] if t else 0.0 if u == 0 else -math.inf
                by_label = old[u - 1] + arcs[t, u - 1, LABEL] if u else -math.inf
                new[u], blank_share, label_share = join(by_blank, by_label, viterbi)
                if t:
                    arcs[t - 1, u, BLANK] = blank_share
                if u:
                    arcs[t, u - 1, LABEL] = label_share
            barrier()
        # T is 0 where a length or label is out of range and the host could not see it.
        logp = alpha[(T + U - 1) % 2, U] + arcs[T - 1, U, BLANK] if T else math.nan
        barrier()                                     # every thread has read it: arcs may change
        for d in range(T + U - 1, -1, -1) if need_grad else range(0):                 # backward
            for u in range(max(0, d - T + 1) + i, min(d, U) + 1, threads):
                t = d - u
                if t < T - 1:
                    arcs[t, u, BLANK] *= arcs[t + 1, u, BLANK] + arcs[t + 1, u, LABEL]
                else:                                 # every path, if any, ends with the last blank
                    arcs[t, u, BLANK] = 1 if u == U and logp != -math.inf else 0
                if u < U:
                    arcs[t, u, LABEL] *= arcs[t, u + 1, BLANK] + arcs[t, u + 1, LABEL]
                else:
                    arcs[t, u, LABEL] = 0
            barrier()
        return logp
    return one_lattice


def _no_barrier():
    """One thread need not wait for others."""


def _gpu_barrier():
    cuda.syncthreads()


# Inlined, so that freshly compiled code and code from numba's cache on disk are the same bits.
_inline = njit(forceinline=True)
_device = cuda.jit(device=True)
_cpu_lattice_of = _inline(_make_lattice(_inline(_make_join(np.float64)), _inline(_no_barrier)))
_gpu_lattice_of = _device(_make_lattice(_device(_make_join(np.float32)), _device(_gpu_barrier)))


@njit(parallel=True, nogil=True, cache=True)
def _cpu_lattice(arcs, alpha, frames, counts, need_grad, viterbi, costs):
    for b in prange(costs.shape[0]):
        costs[b] = -_cpu_lattice_of(arcs[b], alpha[b], frames[b], counts[b], need_grad, viterbi,
                                    0, 1)


@cuda.jit
def _gpu_lattice(arcs, alpha, frames, counts, need_grad, viterbi, costs):
    """A block an utterance; its threads share each antidiagonal."""
    b, i = cuda.blockIdx.x, cuda.threadIdx.x
    logp = _gpu_lattice_of(arcs[b], alpha[b], frames[b], counts[b], need_grad, viterbi,
                           i, cuda.blockDim.x)
    if i == 0:
        costs[b] = -logp


# ---- CPU: log_probs and gradient -----------------------------------------------------------------
# Two loops over the vocabulary take nearly all of the time, and to keep up with memory they must
# vectorise. numba has no vectorised exp without Intel's SVML, so float32 has an exp and a max of
# its own. float64, which is there for tests, has the libraries'.
#
# 2^f = 1 + f q(f) for |f| <= 1/2; q's interpolation nodes miss f = 0, where it is 0/0, by the 1e-9.
_Q = np.polynomial.chebyshev.Chebyshev.interpolate(
    lambda f: np.expm1(f * math.log(2)) / f, 4, [-0.5, 0.5 + 1e-9])
_Q = tuple(np.float32(c) for c in _Q.convert(kind=np.polynomial.Polynomial).coef)
_ROUND = np.float32(1.5 * 2 ** 23)    # adding it leaves the nearest integer in a float32's low bits


@njit(fastmath={"contract"}, forceinline=True)
def _exp32(x):
    """exp(x) for x <= 88 without a branch or a call; relative error 3e-7 on [-1, 0], 1e-6 at -15,
    4e-6 at -85."""
    y = x * np.float32(1.4426950408889634)            # in powers of 2: log2 e
    # 2^-127 comes out as 0, as its exponent bits are; NaN stays NaN.
    y = np.float32(-127) if y < np.float32(-127) else y
    shifted = y + _ROUND
    f = y - (shifted - _ROUND)                        # y = n + f, |f| <= 1/2
    q = _Q[0] + f * (_Q[1] + f * (_Q[2] + f * (_Q[3] + f * _Q[4])))
    p = np.float32(1) + f * q                         # 2^f
    bits = np.int32(np.float32(shifted).view(np.int32) << 23) + np.float32(p).view(np.int32)
    return np.int32(bits).view(np.float32)            # n added to the exponent of p


@njit(forceinline=True)
def _max32(row):
    """The largest of a row, compared as int32, which vectorises. As ints, negative floats come in
    reverse order."""
    bits = row.view(np.int32)
    high = low = bits[0]
    for k in range(bits.shape[0]):                   # an index: `for v in bits` would not vectorise
        high, low = max(high, bits[k]), min(low, bits[k])
    return np.int32(high if high >= 0 else low).view(np.float32)


# Adding up in any order is what lets a sum vectorise.
@njit(fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _log_sum_exp32(row):
    """In two parts, to be subtracted one by one: for logits near 1e4 the float32 sum of the two is
    right to three decimals only."""
    top, total = _max32(row), np.float32(0)
    for k in range(row.shape[0]):
        total += _exp32(row[k] - top)                 # at most 1 each: no overflow
    return top, math.log(total)


@njit(fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _log_sum_exp64(row):
    top, total = row.max(), 0.0
    for k in range(row.shape[0]):
        total += math.exp(row[k] - top)
    return top, math.log(total)


@njit(fastmath={"contract"}, forceinline=True)
def _scaled_softmax32(row, norm, factor, out):
    top, rest = norm[0], norm[1]
    for k in range(row.shape[0]):
        out[k] = factor * _exp32((row[k] - top) - rest)


@njit(fastmath={"contract"}, forceinline=True)
def _scaled_softmax64(row, norm, factor, out):
    top, rest = norm[0], norm[1]
    for k in range(row.shape[0]):
        out[k] = factor * math.exp((row[k] - top) - rest)


@njit(forceinline=True)
def _arcs_of_row(i, blank, x, y, top, rest, arcs, norms):
    norms[i, 0], norms[i, 1] = top, rest
    arcs[i, BLANK] = np.float64(x[i, blank] - top) - rest
    if y[i] != NO_LABEL:
        arcs[i, LABEL] = np.float64(x[i, y[i]] - top) - rest


@njit(parallel=True, nogil=True, cache=True)
def _cpu_log_probs32(blank, fused, x, y, arcs, norms):
    for i in prange(x.shape[0]):
        if y[i] != PADDING:
            top = rest = np.float32(0)
            if fused:
                top, rest = _log_sum_exp32(x[i])
            _arcs_of_row(i, blank, x, y, top, rest, arcs, norms)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_log_probs64(blank, fused, x, y, arcs, norms):
    for i in prange(x.shape[0]):
        if y[i] != PADDING:
            top = rest = 0.0
            if fused:
                top, rest = _log_sum_exp64(x[i])
            _arcs_of_row(i, blank, x, y, top, rest, arcs, norms)


@njit(forceinline=True)
def _add_arc_grads(i, blank, y, arc_grads, out):
    if y[i] != PADDING:
        out[i, blank] += arc_grads[i, BLANK]
        if y[i] != NO_LABEL:
            out[i, y[i]] += arc_grads[i, LABEL]


@njit(parallel=True, nogil=True, cache=True)
def _cpu_gradient32(blank, fused, x, y, norms, arc_grads, out):
    for i in prange(x.shape[0]):
        by_blank, by_label = arc_grads[i, BLANK], arc_grads[i, LABEL]
        if fused and y[i] != PADDING and (by_blank != 0 or by_label != 0):
            _scaled_softmax32(x[i], norms[i], -(by_blank + by_label), out[i])
        else:
            out[i] = 0                # written, but the logits are not read: they may be anything
        _add_arc_grads(i, blank, y, arc_grads, out)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_gradient64(blank, fused, x, y, norms, arc_grads, out):
    for i in prange(x.shape[0]):
        by_blank, by_label = arc_grads[i, BLANK], arc_grads[i, LABEL]
        if fused and y[i] != PADDING and (by_blank != 0 or by_label != 0):
            _scaled_softmax64(x[i], norms[i], -(by_blank + by_label), out[i])
        else:
            out[i] = 0
        _add_arc_grads(i, blank, y, arc_grads, out)


# ---- CUDA: log_probs and gradient ----------------------------------------------------------------
# The 32 threads of a warp (lanes) share a row of logits, so that they read adjacent addresses; a
# block holds ROWS rows. numba has no bfloat16: such logits come as their bits, int16, with `brain`
# true. Sums are float32.
ROWS = 8
LATTICE_THREADS = 512                # of a block of the lattice, at most: 1024 would have to do
                                     # with 64 registers each, or not start


@cuda.jit(device=True)
def _float32(v, brain):
    """A logit; from the bits of a bfloat16, the upper half of a float32's."""
    return np.int32(np.int32(v) << 16).view(np.float32) if brain else np.float32(v)


@cuda.jit(device=True)
def _brain(v):
    """The bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""
    bits = np.int64(np.float32(v).view(np.int32))
    return np.int16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) if v == v else np.int16(0x7fc0)


@cuda.jit
def _gpu_log_probs(blank, fused, brain, x, y, arcs, norms):
    """One pass: every lane keeps the maximum so far and the sum of exp(x - maximum) (arXiv
    1805.02867), and the 32 pairs are merged."""
    lane, r = cuda.threadIdx.x, cuda.threadIdx.y
    i = np.int64(cuda.blockIdx.x) * ROWS + r          # 64 bits: there may be more than 2^31 logits
    tops = cuda.shared.array((ROWS, 32), np.float32)  # numba's simulator needs one of these a line
    sums = cuda.shared.array((ROWS, 32), np.float32)
    # No early return: all threads must meet at every barrier.
    label = y[i] if i < x.shape[0] else np.int64(PADDING)
    top, total = np.float32(-3.4028235e38), np.float32(0)             # not -inf: -inf - -inf is NaN
    if label != PADDING and fused:
        for k in range(lane, x.shape[1], 32):         # 32 lanes read 32 neighbours
            v = _float32(x[i, k], brain)
            if v > top:                               # seldom: a second exp for those only
                total *= math.exp(top - v)
                top = v
            total += math.exp(v - top)
    tops[r, lane], sums[r, lane] = top, total
    for step in (16, 8, 4, 2, 1):                     # a tree: 32 pairs become 16, 8, 4, 2, 1
        cuda.syncthreads()
        if lane < step:
            top0, top1 = tops[r, lane], tops[r, lane + step]
            new = max(top0, top1)
            sums[r, lane] = (sums[r, lane] * math.exp(top0 - new)
                             + sums[r, lane + step] * math.exp(top1 - new))
            tops[r, lane] = new
    if label != PADDING and lane == 0:
        top, rest = (tops[r, 0], math.log(sums[r, 0])) if fused else (np.float32(0), np.float32(0))
        norms[i, 0], norms[i, 1] = top, rest
        arcs[i, BLANK] = _float32(x[i, blank], brain) - top - rest
        if label != NO_LABEL:
            arcs[i, LABEL] = _float32(x[i, label], brain) - top - rest


@cuda.jit
def _gpu_gradient(blank, fused, brain, x, y, norms, arc_grads, out):
    """A row is read once and written once, padding only written."""
    i = np.int64(cuda.blockIdx.x) * ROWS + cuda.threadIdx.y
    if i < x.shape[0]:
        by_blank, by_label = arc_grads[i, BLANK], arc_grads[i, LABEL]
        label, top, rest = y[i], norms[i, 0], norms[i, 1]
        # Else 0 is written and the logits are not read.
        used = label != PADDING and (by_blank != 0 or by_label != 0)
        for k in range(cuda.threadIdx.x, x.shape[1], 32):
            g = np.float32(0)
            if used and fused:
                g = -(by_blank + by_label) * math.exp(_float32(x[i, k], brain) - top - rest)
            if used and k == blank:
                g += by_blank
            if used and k == label:
                g += by_label
            # One type for both: float32 holds any int16.
            out[i, k] = np.float32(_brain(g)) if brain else g


# ---- The three steps, on either ------------------------------------------------------------------

def log_probs(x, y, batch):
    """Logits x (n,V) of nodes with the labels y (n,) -> arcs (n,2), float64 on a CPU, and the
    log-normalisers in two parts (n,2): the maximum, and the rest."""
    arcs = torch.zeros((len(x), 2), dtype=batch.arc_dtype, device=x.device)
    norms_dtype = torch.promote_types(x.dtype, torch.float32)
    norms = torch.empty((len(x), 2), dtype=norms_dtype, device=x.device)
    cpu = _cpu_log_probs64 if x.dtype == torch.float64 else _cpu_log_probs32
    _run_rows(cpu, _gpu_log_probs, batch, x, y, arcs, norms)
    return arcs, norms


def lattice(arcs, batch, utterances=slice(None), need_grad=True, viterbi=False):
    """Costs (B,) of some utterances. Their arcs (B,T,U1,2) are overwritten, if need_grad: by
    posteriors, those of labels times 1 + fastemit; with viterbi too: by 1 on the best path and 0
    off it. Without need_grad, by what is of no use."""
    (B, T, U1, _), frames, counts = arcs.shape, batch.frames[utterances], batch.counts[utterances]
    if batch.delay:
        t = torch.arange(T, device=arcs.device)       # a late label costs, an early one gains
        penalty = batch.delay * ((frames[:, None].to(arcs.dtype) - 1) / 2 - t)        # (B,T)
        arcs[..., LABEL] += penalty[:, :, None]
    alpha = arcs.new_empty((B, 2, U1), dtype=torch.float64)
    costs = arcs.new_empty(B, dtype=torch.float64)
    args = arcs, alpha, frames, counts, need_grad, viterbi, costs
    if batch.gpu:
        _run_gpu(_gpu_lattice, B, min(LATTICE_THREADS, -(-U1 // 32) * 32), *args)
    else:
        _run_cpu(_cpu_lattice, *args)
    if batch.fastemit:                                # the gradient alone: labels come earlier
        arcs[..., LABEL] *= 1 + batch.fastemit
    return costs


def gradient(x, y, norms, arc_grads, batch, out):
    """out (n,V): the gradient of the logits x, given that of their arcs (n,2)."""
    cpu = _cpu_gradient64 if x.dtype == torch.float64 else _cpu_gradient32
    _run_rows(cpu, _gpu_gradient, batch, x, y, norms, arc_grads.to(norms.dtype), out)


# ---- Plumbing: torch's memory to numba's kernels -------------------------------------------------

def runs_on_gpu(device, dtype):
    """Whether the GPU's kernels take logits of this device and type. Raises ValueError or
    ImportError where nothing can."""
    if device.type == "cpu":
        return bool(numba.config.ENABLE_CUDASIM) and dtype != torch.float64
    if device.type != "cuda" or dtype == torch.float64:
        raise ValueError("rnnt_loss takes float64 logits on a CPU only, all else on CUDA too; not "
                         f"{dtype} on {device}")
    if not find_spec("numba_cuda"):
        raise ImportError("rnnt_loss on a GPU needs numba-cuda: pip install 'numba-cuda[cu13]' "
                          "(or cu12, by driver)")
    return True


def _run_rows(cpu, gpu, batch, x, *others):
    """Run a kernel over the rows of the logits x (n,V) and of others (n,...), the last of which may
    be half precision too."""
    if batch.gpu:
        blocks = -(-len(x) // ROWS)
        brain = x.dtype == torch.bfloat16
        return _run_gpu(gpu, blocks, (32, ROWS), batch.blank, batch.fused, brain, x, *others)
    half = x.dtype in (torch.float16, torch.bfloat16)            # the CPU's kernels know only wider
    step = max(1, SLAB_BYTES // (4 * x.shape[1]) if half else len(x))
    for i in range(0, len(x), step):
        slab = [a[i:i + step] for a in (x, *others)]
        wide = [a.float() if a.dtype in (torch.float16, torch.bfloat16) else a for a in slab]
        _run_cpu(cpu, batch.blank, batch.fused, *wide)
        slab[-1].copy_(wide[-1])                      # nothing is done where no cast was


def _run_cpu(kernel, *args):
    """On as many threads as torch uses."""
    _refuse_after_fork()
    threads, before = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        kernel(*map(_array, args))
    finally:
        numba.set_num_threads(before)                 # the caller's own choice
        torch.set_num_threads(threads)    # if both share one OpenMP, numba has changed torch's


def _run_gpu(kernel, blocks, threads, *args):
    """On the present stream of the GPU on which the last argument lies."""
    if not blocks:                                    # an empty batch has nothing to launch
        return
    with torch.cuda.device_of(args[-1]):              # numba launches on the current device
        stream = 0                                    # in the simulator
        if args[-1].is_cuda:
            stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
        kernel[blocks, threads, stream](*map(_array, args))


def _array(a):
    """torch's memory as numba takes it; nothing is copied."""
    if not isinstance(a, torch.Tensor):
        return a
    a = a.detach().view(torch.int16) if a.dtype == torch.bfloat16 else a.detach()
    return cuda.as_cuda_array(a, sync=False) if a.is_cuda else a.numpy()


_threads_began_in = []                # the process whose kernels started numba's OpenMP threads


def _refuse_after_fork():
    """GNU's OpenMP kills a child that uses threads which its parent started."""
    if not _threads_began_in:
        _threads_began_in.append(os.getpid())
    if _threads_began_in[0] != os.getpid() and numba.threading_layer() == "omp":
        raise RuntimeError("rnnt_loss ran before this process was forked, and OpenMP's threads do "
                           "not survive that: spawn workers (multiprocessing_context='spawn'), or "
                           "take the loss in the parent")


# ---- Plumbing: arguments -------------------------------------------------------------------------

def check_arguments(logits, targets, logit_lengths, target_lengths, blank, *, reduction="none",
                    validate=False, fused=True, fastemit=0.0, delay=0.0):
    """-> a Batch, or a ValueError that names what is wrong. Of logits only shape, device and dtype
    are used.

    With logits on a GPU, targets, and lengths that lie there too, are not checked unless validate:
    an utterance out of range gets no frames, and its cost is NaN.
    """
    shape, dtype, device = logits.shape, logits.dtype, logits.device
    if len(shape) != 4 or 0 in shape[2:] or dtype not in FLOATS:
        raise ValueError(f"logits must be (B,T,U+1,V) floats, not {dtype} of shape {tuple(shape)}")
    B, T, U1, V = shape
    factors = {"none": 0.0, "sum": 1.0, "mean": 1 / max(1, B)}    # an empty batch costs 0
    if reduction not in factors:
        raise ValueError(f"reduction is {reduction!r}, not 'none', 'mean' or 'sum'")
    delay = _number("delay_penalty", delay)
    if (fastemit := _number("fastemit_lambda", fastemit)) < 0:
        raise ValueError(f"fastemit_lambda must be 0 or more, not {fastemit}")
    blank = _whole("blank", blank)
    if not -V <= blank < V:
        raise ValueError(f"blank is {blank}, but a node has {V} logits")
    blank, gpu = blank % V, runs_on_gpu(device, dtype)
    targets = _integers("targets", targets, 2, B)
    logit_lengths = _integers("logit_lengths", logit_lengths, 1, B)
    target_lengths = _integers("target_lengths", target_lengths, 1, B)
    U = min(U1 - 1, targets.shape[1])

    def there(a):                                     # without waiting for the GPU
        # A copy to the CPU must be waited for, or it is read before it has arrived.
        return a.to(device, non_blocking=device.type != "cpu")
    frames, counts = there(logit_lengths), there(target_lengths)
    labels = torch.nn.functional.pad(there(targets[:, :U]), (0, U1 - U))              # (B,U1)
    written = torch.arange(U1, device=device) < counts[:, None]                       # (B,U1)
    labels = labels.masked_fill(~written, NO_LABEL)
    bad_T = (logit_lengths < 1) | (logit_lengths > T)
    bad_U = (target_lengths < 0) | (target_lengths > U)
    bad_labels = written & ((labels < 0) | (labels >= V) | (labels == blank))
    for name, values, bad, allowed in (
            ("logit_lengths", logit_lengths, bad_T, f"1..{T}"),
            ("target_lengths", target_lengths, bad_U, f"0..{U}"),
            ("targets", labels, bad_labels, f"0..{V - 1} without the blank, {blank}")):
        if validate or "cpu" in (device.type, values.device.type):   # a GPU is waited for
            _refuse(name, values, bad, allowed)
    bad = there(bad_T) | there(bad_U) | bad_labels.any(1)
    frames, counts = frames.masked_fill(bad, 0), counts.masked_fill(bad, 0)
    return Batch(node_labels(labels, frames, counts, T), frames, counts, blank, fused, fastemit,
                 delay, gpu, torch.float32 if gpu else torch.float64, factors[reduction])


def node_labels(labels, frames, counts, T):
    """labels (B,U1), NO_LABEL from U on; frames, counts (B,) -> y (B,T,U1)."""
    t = torch.arange(T, device=labels.device)
    u = torch.arange(labels.shape[1], device=labels.device)
    inside = (t < frames[:, None])[:, :, None] & (u <= counts[:, None])[:, None]
    return labels[:, None].expand(inside.shape).masked_fill(~inside, PADDING)


def _whole(name, value):
    """An int, of whatever counts as one."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None


def _number(name, value):
    """A float that is finite: one that is not would make the costs NaN, without a word."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return number


def _tensors(**named):
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a torch tensor, not {type(value).__name__}")


def _refuse(name, values, bad, allowed):
    """Name the first of the values that are bad, if there is one."""
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}{at} is {values[tuple(at)]}, not in {allowed}")


def _integers(name, value, dims, B):
    """An int64 tensor, of a tensor, array or list."""
    try:
        a = value if torch.is_tensor(value) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers in a tensor, array or list: {error}") from None
    if a is not value and a.numel() == 0:             # an empty list has no type, and one dimension
        a = a.long() if a.dim() > 1 else a.long().reshape(len(value), *(0,) * (dims - 1))
    no_integers = a.is_floating_point() or a.is_complex() or a.dtype == torch.bool
    if a.dim() != dims or len(a) != B or no_integers:
        raise ValueError(f"{name} must be {dims}-dimensional integers for {B} utterances, "
                         f"not {a.dtype} of shape {tuple(a.shape)}")
    return a.long()


# ---- python rnnt_loss.py -------------------------------------------------------------------------

def draw_lattice(posteriors, labels):
    """A picture in text of an utterance's lattice, from the posteriors of its arcs (T,U1,2): at
    every node, how many of a hundred paths, drawn by their probability, go through it."""
    T, U1, _ = posteriors.shape
    rows = []
    for u in reversed(range(U1)):
        written = f"u={u} {labels[u - 1] if u else '':>6} "
        percent = [f"{100 * posteriors[t, u].sum():3.0f}" for t in range(T)]
        rows.append(written + " -- ".join(percent) + (" -->" if u == U1 - 1 else ""))
        if u:
            rows.append(" " * 11 + "      ".join("|" * T))
    return "\n".join(rows + [" " * 10 + "".join(f"t={t:<5}" for t in range(T))])


def demonstrate():
    """The costs of a batch by each version, and where it has them, a known example's cost and the
    largest error of the gradient."""
    known = torch.tensor([[[[1, 6, 1, 1, 1], [1, 1, 6, 1, 1], [1, 1, 2, 8, 1]],
                           [[1, 6, 1, 1, 1], [1, 1, 2, 1, 1], [7, 1, 2, 1, 1]]]]) / 10
    of_known = [[1, 2]], [2], [2]                     # its cost is 4.495667
    torch.manual_seed(0)
    joint = [torch.randn(shape) for shape in ((3, 9, 16), (3, 5, 16), (20, 16), (20,))]
    logits = torch.tanh(joint[0][:, :, None] + joint[1][:, None]) @ joint[2].T + joint[3]
    targets, frames, counts = torch.randint(1, 20, (3, 4)), [9, 4, 1], [3, 4, 0]
    wide = logits.double().requires_grad_()
    costs = rnnt_loss_reference(wide, targets, frames, counts, blank=0)
    wanted, = torch.autograd.grad(costs.sum(), wide)

    def show(name, of_known, costs, grad=None):
        error = "" if grad is None else f"{(grad.cpu() - wanted).abs().max():.0e}"
        print(f"{name:24}{of_known:.6f} ", *(f"{cost:.6f}" for cost in costs), error)

    known_labels = torch.tensor(of_known[0])
    show("reference", rnnt_loss_reference(known, known_labels, [2], [2], blank=0).item(), costs)
    plain, grad = [], torch.zeros_like(wanted)
    for b, (T, U) in enumerate(zip(frames, counts)):
        own = wide[b, :T, :U + 1].detach().numpy()
        cost, of_logits = plain_rnnt_loss(own, targets[b, :U].tolist(), 0)
        plain.append(cost)
        grad[b, :T, :U + 1] = torch.from_numpy(of_logits)
    show("plain numpy", plain_rnnt_loss(known[0].double().numpy(), [1, 2], 0)[0], plain, grad)
    kinds = [("cpu", torch.float64), ("cpu", torch.float32)]
    for device, dtype in kinds + [("cuda", torch.float32)] * torch.cuda.is_available():
        x = logits.to(device, dtype).requires_grad_()
        costs = rnnt_loss(x, targets, frames, counts, blank=0, reduction="none")
        grad, = torch.autograd.grad(costs.sum(), x)
        show(f"kernels {device} {str(dtype)[6:]}",
             rnnt_loss(known.to(x), *of_known, blank=0).item(), costs, grad)
    costs = joint_rnnt_loss(*joint, targets, frames, counts, blank=0, reduction="none")
    print(f"{'fused with the joint':24}{'':9}", *(f"{cost:.6f}" for cost in costs))
    print("frames of the labels on the best path:",
          rnnt_align(logits, targets, frames, counts, blank=0).tolist())
    own = wide[0, :frames[0], :counts[0] + 1].detach().numpy()
    labels = targets[0, :counts[0]].tolist()
    print("\nthe lattice of the first utterance, and of 100 paths how many go through each node:")
    print(draw_lattice(plain_lattice(plain_log_probs(own, labels, 0))[1], labels))


if __name__ == "__main__":
    try:
        demonstrate()
        print(end="", flush=True)     # here, where a pipe that nobody reads is caught
    except OSError as error:          # a pipe whose reader has seen enough, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"rnnt_loss.py: {error}", file=sys.stderr)
            sys.exit(2)
