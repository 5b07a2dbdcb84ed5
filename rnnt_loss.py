"""The RNN-T (transducer) loss: a plain reference, kernels for CPU and GPU, and a version fused with the joint network.

A transducer reads T encoder frames and writes U labels. At node (t,u) it has written u labels and looks at frame t. The
joint network gives V logits there: it writes a blank (moves to frame t+1) or the next label (stays at frame t):

      u=2   o--o--o--o--->    a path climbs from the lower left corner to the upper right one and leaves by a blank
            |  |  |  |        --  blank: (t,u) to (t+1,u)
      u=1   o--o--o--o        |   label y[u]: (t,u) to (t,u+1)
            |  |  |  |
      u=0   o--o--o--o        alpha(t,u) = log of the summed probability of all paths from the start to (t,u)
           t=0  1  2  3                  = log(exp(alpha(t-1,u) + blank(t-1,u)) + exp(alpha(t,u-1) + label(t,u-1)))

      cost = -log P(labels | frames) = -(alpha(T-1,U) + blank(T-1,U))       (Graves 2012, arXiv 1211.3711, eq. 16, 17)

Of a node's V logits the recursion needs two numbers, the log-probabilities of its two arcs. The gradient needs one per
arc, its posterior: of the probability of all paths that spell the labels, the part that goes over it. So every version
but the reference is three steps (B utterances, padded to T frames and U1 = U + 1 rows; n = B T U1 nodes):

  log_probs  logits (n,V) -> arcs (n,2)      arc[j] = logit[j] - log sum_k exp(logit[k])        j: the blank, the label
  lattice    arcs (B,T,U1,2) -> costs (B,)   and in place of the arcs' log-probabilities their posteriors, -dcost/darc
  gradient   chain rule; other g[k] are 0    dcost/dlogit[k] = g[k] - softmax[k] sum_j g[j]     g[j] = dcost/darc[j]

The first and the last are all arithmetic: they read the logits, and write their gradient, at the speed of memory. The
middle one is all dependence: T + U steps, each waiting for the one before, over two numbers a node. rnnt_loss does this
for given logits; joint_rnnt_loss computes the joint network's a tile at a time, so that they never exist as a whole;
rnnt_align finds the best single path. `python rnnt_loss.py` runs all of them on one batch.
"""
import math
import os
import warnings
from collections import namedtuple
from functools import partial
from importlib.util import find_spec
from itertools import product

os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")  # before the import; one block an utterance is meant
import numba
import numpy as np
import torch
from numba import cuda, njit, prange
from numba.extending import overload
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

BLANK, LABEL = 0, 1           # the two arcs of a node
NO_LABEL, PADDING = -1, -2    # in y, for a node: no label left to write (u = U); outside its utterance
SLAB_BYTES = 4 << 20          # on a CPU, half-precision logits are cast to float32 in slabs of this size
TILE_BYTES = 48 << 20         # of about this size are the tiles of the fused joint


def rnnt_loss_reference(logits, targets, logit_lengths, target_lengths, *, blank, fused_log_softmax=True,
                        delay_penalty=0.0):
    """Costs (B,) in float64, by the definition and one node at a time; autograd gives the gradient."""
    costs = []
    for b in range(len(logits)):
        T, U = int(logit_lengths[b]), int(target_lengths[b])
        logp = logits[b].double().log_softmax(-1) if fused_log_softmax else logits[b].double()  # (T,U1,V)
        alpha = {}                                         # (t,u) -> log-probability of reaching that node
        for t, u in product(range(T), range(U + 1)):
            ways = [] if t or u else [logp.new_zeros(())]               # the start: probability 1
            if t > 0:
                ways.append(alpha[t - 1, u] + logp[t - 1, u, blank])
            if u > 0:
                ways.append(alpha[t, u - 1] + logp[t, u - 1, targets[b, u - 1]] + delay_penalty * ((T - 1) / 2 - t))
            alpha[t, u] = torch.stack(ways).logsumexp(0)
        costs.append(-(alpha[T - 1, U] + logp[T - 1, U, blank]))
    return torch.stack(costs)


# y (B,T,U1): the label each node may write; frames, counts (B,): each utterance's T and U; fused: logits need a
# log-softmax; fastemit, delay: the two lambdas; gpu: which kernels; real: dtype of the arcs; factor: see _batch.
Batch = namedtuple("Batch", "y frames counts blank fused fastemit delay gpu real factor")


# ------------------------------------------------------------------------------ the lattice, one text for CPU and GPU
# alpha is float64: in long audio a float32 would lose the digits that tell two ways apart. Only the difference of two
# ways is rounded to `real`, for exp and log: float64 on a CPU, float32, which is much faster there, on a GPU.
def _make_join(real):
    def join(a, b, best):
        """log(e^a + e^b), or the larger of the two, and the share of each in it."""
        if a == -math.inf and b == -math.inf:
            return a, real(0), real(0)                     # nothing comes here: no NaN from inf - inf
        top = a if a >= b else b
        of_a, of_b = math.exp(real(a - top)), math.exp(real(b - top))       # one of them is 1
        if best:
            of_a, of_b = real(a >= b), real(not a >= b)    # all to the larger one, or of two NaN to one
        return top + math.log(of_a + of_b), of_a / (of_a + of_b), of_b / (of_a + of_b)
    return join


def _make_lattice(join, barrier):
    def lattice(arcs, alpha, T, U, want, best, i, wide):
        """log P of an utterance, whose arcs (T,U1,2) come in as log-probabilities and, if wanted, go out as posteriors.

        Forward: alpha joins the two ways into a node, over a blank and over a label. Each of these two arcs is then
        overwritten with its share of the node's alpha. Backward: an arc's posterior is its share times the posterior
        of the node it leads to, which is the sum of that node's two outgoing arcs'; the last blank's is 1. No beta, no
        further exp, and no alpha + beta - log P, whose digits cancel in long audio. With best, shares are 0 or 1.

        Nodes of one antidiagonal d = t + u need only the one before (backward, the one after), so they can be done at
        once: thread i does every `wide`-th, on a CPU thread 0 all. alpha (2,U1) holds this antidiagonal and the last.
        """
        for d in range(T + U):                             # forward
            new, old = alpha[d % 2], alpha[1 - d % 2]      # (U1,) each: this antidiagonal and the last
            for u in range(max(0, d - T + 1) + i, min(d, U) + 1, wide):
                t = d - u                                  # on: the way in over a blank; up: over a label
                on = old[u] + arcs[t - 1, u, BLANK] if t else 0.0 if u == 0 else -math.inf
                up = old[u - 1] + arcs[t, u - 1, LABEL] if u else -math.inf
                new[u], share_on, share_up = join(on, up, best)
                if t:
                    arcs[t - 1, u, BLANK] = share_on
                if u:
                    arcs[t, u - 1, LABEL] = share_up
            barrier()
        # T is 0 where a length or label is out of range and the host could not see it.
        logp = alpha[(T + U - 1) % 2, U] + arcs[T - 1, U, BLANK] if T else math.nan
        barrier()                                          # now every thread has it
        for d in range(T + U - 1, -1, -1) if want else range(0):            # backward
            for u in range(max(0, d - T + 1) + i, min(d, U) + 1, wide):
                t = d - u
                if t < T - 1:
                    arcs[t, u, BLANK] *= arcs[t + 1, u, BLANK] + arcs[t + 1, u, LABEL]
                else:                                      # the last blank is on every path, the others lead nowhere
                    arcs[t, u, BLANK] = 1 if u == U and logp != -math.inf else 0
                if u < U:
                    arcs[t, u, LABEL] *= arcs[t, u + 1, BLANK] + arcs[t, u + 1, LABEL]
                else:
                    arcs[t, u, LABEL] = 0
            barrier()
        return logp
    return lattice


# Inlined, so that freshly compiled code and code from numba's cache on disk are the same, bit for bit.
_inline, _device = njit(forceinline=True), cuda.jit(device=True)
_cpu_lattice_of = _inline(_make_lattice(_inline(_make_join(np.float64)), _inline(lambda: None)))
_gpu_lattice_of = _device(_make_lattice(_device(_make_join(np.float32)), _device(lambda: cuda.syncthreads())))


# ---------------------------------------------------------------------------------------------------------------- CPU
# Two loops over the vocabulary take nearly all of the time. To keep up with memory they must vectorise, but numba has
# no vectorised exp without Intel's SVML. So: 2^f = 1 + f q(f), |f| <= 1/2; q's nodes miss f = 0 (0/0) by the 1e-9.
_Q = np.polynomial.chebyshev.Chebyshev.interpolate(lambda f: np.expm1(f * math.log(2)) / f, 4, [-0.5, 0.5 + 1e-9])
_Q = tuple(np.float32(c) for c in _Q.convert(kind=np.polynomial.Polynomial).coef)
_ROUND = np.float32(1.5 * 2 ** 23)     # adding it leaves the nearest integer in the low bits of a float32


@njit(fastmath={"contract"}, forceinline=True)
def _exp32(x):
    """exp(x) for x <= 88 without a branch or a call; relative error 3e-7 on [-1, 0], 1e-6 at -15, 4e-6 at -85."""
    y = x * np.float32(1.4426950408889634)                 # in powers of 2: log2 e
    y = np.float32(-127) if y < np.float32(-127) else y    # 2^-127 comes out as 0, its exponent bits are; NaN stays NaN
    shifted = y + _ROUND
    f = y - (shifted - _ROUND)                             # y = n + f, |f| <= 1/2
    p = np.float32(1) + f * (_Q[0] + f * (_Q[1] + f * (_Q[2] + f * (_Q[3] + f * _Q[4]))))       # 2^f
    bits = np.int32(np.float32(shifted).view(np.int32) << 23) + np.float32(p).view(np.int32)
    return np.int32(bits).view(np.float32)                 # n added to the exponent of p


@njit(forceinline=True)
def _max32(row):
    """The largest of a row, compared as int32, which vectorises. As ints, negative floats come in reverse order."""
    bits = row.view(np.int32)
    high = low = bits[0]
    for k in range(bits.shape[0]):                         # an index: `for v in bits` would not vectorise
        high, low = max(high, bits[k]), min(low, bits[k])
    return np.int32(high if high >= 0 else low).view(np.float32)


def _exp(x): ...                       # stubs: in a kernel numba calls these overloads, by the argument's type
def _max(row): ...
overload(_exp)(lambda x: (lambda x: _exp32(x)) if x == numba.float32 else (lambda x: math.exp(x)))
overload(_max)(lambda row: (lambda row: _max32(row)) if row.dtype == numba.float32 else (lambda row: row.max()))


@njit(fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _log_sum_exp(row):
    """In two parts, to be subtracted one by one: for logits near 1e4 their float32 sum is right to 3 digits only."""
    top, total = _max(row), row.dtype.type(0)
    for k in range(row.shape[0]):
        total += _exp(row[k] - top)                        # at most 1 each: no overflow
    return top, math.log(total)


@njit(fastmath={"contract"}, forceinline=True)
def _scaled_softmax(row, norm, factor, out):
    top, rest = norm[0], norm[1]
    for k in range(row.shape[0]):
        out[k] = factor * _exp((row[k] - top) - rest)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_log_probs(blank, fused, x, y, arcs, norms):
    for i in prange(x.shape[0]):
        if y[i] != PADDING:
            top = rest = x.dtype.type(0)
            if fused:
                top, rest = _log_sum_exp(x[i])
            norms[i, 0], norms[i, 1] = top, rest
            arcs[i, BLANK] = np.float64(x[i, blank] - top) - rest
            if y[i] != NO_LABEL:
                arcs[i, LABEL] = np.float64(x[i, y[i]] - top) - rest


@njit(parallel=True, nogil=True, cache=True)
def _cpu_lattice(arcs, alpha, frames, counts, want, best, costs):
    for b in prange(costs.shape[0]):
        costs[b] = -_cpu_lattice_of(arcs[b], alpha[b], frames[b], counts[b], want, best, 0, 1)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_gradient(blank, fused, x, y, norms, arc_grads, out):
    for i in prange(x.shape[0]):
        on, up = arc_grads[i, BLANK], arc_grads[i, LABEL]  # dcost/darc of the blank, of the label
        if fused and y[i] != PADDING and (on != 0 or up != 0):
            _scaled_softmax(x[i], norms[i], -(on + up), out[i])
        else:
            out[i] = 0                                     # written, but the logits not read: they may be anything
        if y[i] != PADDING:
            out[i, blank] += on
            if y[i] != NO_LABEL:
                out[i, y[i]] += up


# --------------------------------------------------------------------------------------------------------------- CUDA
# The same three steps. The 32 threads of a warp (lanes) share a row of logits, so that they read adjacent addresses; a
# block holds ROWS rows. numba has no bfloat16: such logits come as their bits, int16, with `brain` true. Sums: float32.
ROWS = 8
LATTICE_THREADS = 1024                                     # of a block of the lattice, at most
_float32 = _device(lambda v, brain: np.int32(np.int32(v) << 16).view(np.float32) if brain else np.float32(v))


@cuda.jit(device=True)
def _brain(v):
    """The bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""
    bits = np.int64(np.float32(v).view(np.int32))
    return np.int16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) if v == v else np.int16(0x7fc0)


@cuda.jit
def _gpu_log_probs(blank, fused, brain, x, y, arcs, norms):
    """One pass: every lane keeps the maximum so far and the sum of exp(x - maximum), and the 32 pairs are merged."""
    lane, r = cuda.threadIdx.x, cuda.threadIdx.y
    i = np.int64(cuda.blockIdx.x) * ROWS + r               # 64 bits: there may be more than 2^31 logits
    tops = cuda.shared.array((ROWS, 32), np.float32)       # numba's simulator needs one of these a line
    sums = cuda.shared.array((ROWS, 32), np.float32)
    label = y[i] if i < x.shape[0] else np.int64(PADDING)  # no early return: all threads must meet at every barrier
    top, total = np.float32(-3.4028235e38), np.float32(0)  # not -inf: -inf - -inf is NaN
    if label != PADDING and fused:
        for k in range(lane, x.shape[1], 32):              # 32 lanes read 32 neighbours
            v = _float32(x[i, k], brain)
            if v > top:                                    # seldom: a second exp for those only
                total *= math.exp(top - v)
                top = v
            total += math.exp(v - top)
    tops[r, lane], sums[r, lane] = top, total
    for step in (16, 8, 4, 2, 1):                          # a tree: 32 pairs become 16, 8, 4, 2, 1
        cuda.syncthreads()
        if lane < step:
            top0, top1 = tops[r, lane], tops[r, lane + step]
            new = max(top0, top1)
            sums[r, lane] = sums[r, lane] * math.exp(top0 - new) + sums[r, lane + step] * math.exp(top1 - new)
            tops[r, lane] = new
    if label != PADDING and lane == 0:
        top, rest = (tops[r, 0], math.log(sums[r, 0])) if fused else (np.float32(0), np.float32(0))
        norms[i, 0], norms[i, 1] = top, rest
        arcs[i, BLANK] = _float32(x[i, blank], brain) - top - rest
        if label != NO_LABEL:
            arcs[i, LABEL] = _float32(x[i, label], brain) - top - rest


@cuda.jit
def _gpu_lattice(arcs, alpha, frames, counts, want, best, costs):
    b, i = cuda.blockIdx.x, cuda.threadIdx.x               # a block an utterance; its threads share each antidiagonal
    logp = _gpu_lattice_of(arcs[b], alpha[b], frames[b], counts[b], want, best, i, cuda.blockDim.x)
    if i == 0:
        costs[b] = -logp


@cuda.jit
def _gpu_gradient(blank, fused, brain, x, y, norms, arc_grads, out):
    """A row is read once and written once, padding only written."""
    i = np.int64(cuda.blockIdx.x) * ROWS + cuda.threadIdx.y
    if i < x.shape[0]:
        on, up, label, top, rest = arc_grads[i, BLANK], arc_grads[i, LABEL], y[i], norms[i, 0], norms[i, 1]
        used = label != PADDING and (on != 0 or up != 0)   # else 0 is written and the logits are not read
        for k in range(cuda.threadIdx.x, x.shape[1], 32):
            g = -(on + up) * math.exp(_float32(x[i, k], brain) - top - rest) if used and fused else np.float32(0)
            if used and k == blank:
                g += on
            if used and k == label:
                g += up
            out[i, k] = np.float32(_brain(g)) if brain else g              # one type for both: float32 holds any int16


# ----------------------------------------------------------------------------------------- the three steps, on either
def runs_on_gpu(device, dtype):
    """Whether the GPU's kernels take logits of this device and type; an error where they cannot."""
    if device.type == "cpu":
        return bool(numba.config.ENABLE_CUDASIM) and dtype != torch.float64
    if device.type != "cuda" or dtype == torch.float64:
        raise ValueError(f"rnnt_loss takes float64 logits on a CPU only, all else on CUDA too; not {dtype} on {device}")
    if not find_spec("numba_cuda"):
        raise ImportError("rnnt_loss on a GPU needs numba-cuda: pip install 'numba-cuda[cu13]' (or cu12, by driver)")
    return True


def _array(a):
    """torch's memory as numba takes it; nothing is copied."""
    if not isinstance(a, torch.Tensor):
        return a
    a = a.detach().view(torch.int16) if a.dtype == torch.bfloat16 else a.detach()
    return cuda.as_cuda_array(a, sync=False) if a.is_cuda else a.numpy()


def _run(kernel, grid, *args):
    """Run a kernel: on as many threads as torch uses, or with a grid (blocks, threads) on the GPU's present stream."""
    if grid is None:
        threads, before = torch.get_num_threads(), numba.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            kernel(*map(_array, args))
        finally:
            numba.set_num_threads(before)                  # the caller's own choice
            torch.set_num_threads(threads)  # if both share one OpenMP, numba has changed torch's
    elif grid[0]:                                          # an empty batch has nothing to launch
        with torch.cuda.device_of(args[-1]):               # numba launches on the current device
            stream = torch.cuda.current_stream().cuda_stream if args[-1].is_cuda else 0  # 0 in the simulator
            kernel[(*grid, stream and cuda.external_stream(stream))](*map(_array, args))


def _run_rows(cpu, gpu, batch, x, *others):
    """Run a kernel over the rows of the logits x (n,V) and of others (n,...), the last of which may be half too."""
    if batch.gpu:
        grid = -(-len(x) // ROWS), (32, ROWS)              # blocks (rounded up), threads
        return _run(gpu, grid, batch.blank, batch.fused, x.dtype == torch.bfloat16, x, *others)
    step = max(1, len(x) if x.dtype in (torch.float32, torch.float64) else SLAB_BYTES // (4 * x.shape[1]))
    for i in range(0, len(x), step):                       # the CPU's kernels know float32 and float64
        slab = [a[i:i + step] for a in (x, *others)]
        wide = [a.float() if a.dtype in (torch.float16, torch.bfloat16) else a for a in slab]
        _run(cpu, None, batch.blank, batch.fused, *wide)
        slab[-1].copy_(wide[-1])                           # back to half; nothing is done where no cast was


def log_probs(x, y, batch):
    """Logits x (n,V) of nodes with the labels y (n,) -> arcs (n,2), float64 on a CPU, and log-normalisers (n,2)."""
    arcs = torch.zeros((len(x), 2), dtype=batch.real, device=x.device)
    norms = torch.empty((len(x), 2), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    _run_rows(_cpu_log_probs, _gpu_log_probs, batch, x, y, arcs, norms)
    return arcs, norms


def lattice(arcs, batch, some=slice(None), want=True, best=False):
    """Costs (B,) of some utterances. Their arcs (B,T,U1,2) become posteriors: if best, 1 on the best path, 0 off it."""
    (B, T, U1, _), frames, counts = arcs.shape, batch.frames[some], batch.counts[some]
    if batch.delay:
        t = torch.arange(T, device=arcs.device)            # a late label costs, an early one gains
        arcs[..., LABEL] += batch.delay * ((frames[:, None].to(arcs.dtype) - 1) / 2 - t)[:, :, None]
    alpha, costs = (arcs.new_empty(shape, dtype=torch.float64) for shape in ((B, 2, U1), (B,)))
    grid = (B, min(LATTICE_THREADS, -(-U1 // 32) * 32)) if batch.gpu else None
    _run(_gpu_lattice if batch.gpu else _cpu_lattice, grid, arcs, alpha, frames, counts, want, best, costs)
    if batch.fastemit:
        arcs[..., LABEL] *= 1 + batch.fastemit             # the gradient alone is changed: labels come earlier
    return costs


def gradient(x, y, norms, arc_grads, batch, out):
    """out (n,V): the gradient of the logits x, given that of their arcs (n,2)."""
    _run_rows(_cpu_gradient, _gpu_gradient, batch, x, y, norms, arc_grads.to(norms.dtype), out)


def _batch(shape, device, dtype, targets, logit_lengths, target_lengths, blank, *, reduction="none",
           validate=False, fused=True, fastemit=0.0, delay=0.0):
    """Check the arguments and make a Batch; its factor multiplies the sum of the costs, 0 means one cost an utterance.

    On a GPU, values are not checked unless validate: an utterance out of range gets no frames, and its cost is NaN.
    """
    if len(shape) != 4 or 0 in shape[2:] or not dtype.is_floating_point:
        raise ValueError(f"logits must be (B,T,U+1,V) floats, not {dtype} of shape {tuple(shape)}")
    B, T, U1, V = shape
    factors = {"none": 0.0, "sum": 1.0, "mean": 1 / max(1, B)}  # an empty batch costs 0
    if reduction not in factors:
        raise ValueError(f"reduction is {reduction!r}, not 'none', 'mean' or 'sum'")
    if not -V <= blank < V:
        raise ValueError(f"blank is {blank}, but a node has {V} logits")
    for name, a in (("targets", targets), ("logit_lengths", logit_lengths), ("target_lengths", target_lengths)):
        dims = 2 if a is targets else 1
        if a.dim() != dims or len(a) != B or a.is_floating_point() or a.dtype == torch.bool:
            raise ValueError(f"{name} must be {dims}-dimensional integers for {B} utterances, "
                             f"not {a.dtype} of shape {tuple(a.shape)}")
    blank, U, gpu = blank % V, min(U1 - 1, targets.shape[1]), runs_on_gpu(device, dtype)
    logit_lengths, target_lengths = logit_lengths.long(), target_lengths.long()                  # for T above 127
    bad_T, bad_U = (logit_lengths < 1) | (logit_lengths > T), (target_lengths < 0) | (target_lengths > U)
    frames, counts, labels = (a.to(device, torch.int64) for a in (logit_lengths, target_lengths, targets[:, :U]))
    t, u = torch.arange(T, device=device), torch.arange(U1, device=device)                       # (T,), (U1,)
    labels = torch.where(u < counts[:, None], torch.nn.functional.pad(labels, (0, U1 - U)), NO_LABEL)  # (B,U1)
    wrong = (u < counts[:, None]) & ((labels < 0) | (labels >= V) | (labels == blank))           # (B,U1)
    for name, a, bad, allowed in (("logit_lengths", logit_lengths, bad_T, f"1..{T}"),
                                  ("target_lengths", target_lengths, bad_U, f"0..{U}"),
                                  ("targets", labels, wrong, f"0..{V - 1} without the blank, {blank}")):
        if (validate or a.device.type == "cpu") and bad.any():                                   # a GPU is waited for
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}{at} is {a[tuple(at)]}, not in {allowed}")
    bad = bad_T.to(device) | bad_U.to(device) | wrong.any(1)
    frames, counts = torch.where(bad, 0, frames), torch.where(bad, 0, counts)
    inside = (t < frames[:, None])[:, :, None] & (u <= counts[:, None])[:, None]                 # (B,T,U1)
    return Batch(torch.where(inside, labels[:, None], PADDING), frames, counts, blank, fused, fastemit, delay, gpu=gpu,
                 real=torch.float32 if gpu else torch.float64, factor=factors[reduction])


def _first_derivative_only():
    if torch.is_grad_enabled():            # once_differentiable would let it pass where upstream needs no gradient
        raise RuntimeError("rnnt_loss has no second derivative: backward was called with create_graph=True")


# ---------------------------------------------------------------------------------------------------- loss from logits
class _Loss(Function):
    @staticmethod
    def forward(ctx, logits, batch, clamp, want):
        arcs, norms = log_probs(logits.flatten(0, 2), batch.y.flatten(), batch)                  # (n,2), (n,2)
        arcs = arcs.view(*batch.y.shape, 2)                                                      # (B,T,U1,2)
        costs = lattice(arcs, batch, want=want)                                                  # (B,)
        ctx.save_for_backward(logits, arcs, norms)                                               # posteriors by now
        ctx.options = batch, clamp
        return costs.to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx, upstream):
        _first_derivative_only()
        (logits, posteriors, norms), (batch, clamp) = ctx.saved_tensors, ctx.options
        native = not logits.is_cuda and logits.dtype != torch.bfloat16   # numpy's pages are huge; torch's cost 5 copies
        grad = torch.from_numpy(np.empty_like(logits.detach().numpy())) if native else torch.empty_like(logits)
        upstream = upstream[:, None, None, None]
        arc_grads = -posteriors if clamp > 0 else -posteriors * upstream                        # (B,T,U1,2)
        gradient(logits.flatten(0, 2), batch.y.flatten(), norms, arc_grads.flatten(0, 2), batch, grad.flatten(0, 2))
        if clamp > 0:                                      # elementwise on dcost/dlogit, as torchaudio does
            grad.clamp_(-clamp, clamp).mul_(upstream)
        return grad, None, None, None


def rnnt_loss(logits, targets, logit_lengths, target_lengths, blank=-1, clamp=-1, reduction="mean",
              fused_log_softmax=True, *, fastemit_lambda=0.0, delay_penalty=0.0, validate=False):
    """-log P(targets | logits), reduced. Arguments as torchaudio.functional.rnnt_loss's: names, order, defaults.

    logits (B,T,U1,V) float32, float64 (CPU only), float16, bfloat16; targets (B,U), both lengths (B,), integers.
    clamp > 0 bounds each |dcost/dlogit|. fastemit_lambda scales the label arcs' part of the gradient by 1 + lambda, not
    the cost (arXiv 2010.11148). delay_penalty adds delay_penalty ((T-1)/2 - t), T the utterance's own, to a label's
    log-probability at frame t, in cost and gradient (arXiv 2211.00490). "mean" is over utterances. Bad arguments raise
    ValueError; values on a GPU are checked only if validate (a wait); else one out of range makes the cost NaN.
    """
    batch = _batch(logits.shape, logits.device, logits.dtype, targets, logit_lengths, target_lengths, blank,
                   reduction=reduction, validate=validate, fused=fused_log_softmax, fastemit=fastemit_lambda,
                   delay=delay_penalty)
    costs = _Loss.apply(logits.contiguous(), batch, clamp, torch.is_grad_enabled() and logits.requires_grad)
    return costs.sum() * batch.factor if batch.factor else costs


# ----------------------------------------------------------------------------------------------- fused with the joint
class _Joint:
    """The joint network over the n nodes in use, packed in order (b, t, u). A tile is a slice of them.

    groups: (slice of utterances, their tiles) pairs. If a tile has room for the longest utterance, a group is as many
    as are sure to fit one tile; if not, all utterances are one group of many tiles.
    """
    def __init__(self, inputs, targets, logit_lengths, target_lengths, blank, tile_bytes=TILE_BYTES, keep=None,
                 **options):
        e, l, w, v = (tuple(a.shape) for a in inputs)
        if [len(e), len(l), len(w), len(v)] != [3, 3, 2, 1] or l[::2] != e[::2] or w != (*v, e[2]):
            raise ValueError(f"encoder_out (B,T,J), label_out (B,U1,J), weight (V,J), bias (V,) are {e}, {l}, {w}, {v}")
        (B, T, J), U1, V, device = e, l[1], v[0], inputs[0].device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else inputs[0].dtype
        self.encoder_out, self.label_out = (a.detach().flatten(0, 1) for a in inputs[:2])        # (B T,J), (B U1,J)
        self.weight, self.bias = (a.detach().to(dtype) for a in inputs[2:])
        T_b, U_b = logit_lengths.cpu(), target_lengths.cpu()                                     # the only wait, if any
        self.batch = _batch((B, T, U1, V), device, dtype, targets, T_b, U_b, blank, **options)
        inside = (torch.arange(T)[:, None] < T_b[:, None, None]) & (torch.arange(U1) <= U_b[:, None, None])
        if keep is not None:
            if keep.shape != inside.shape or keep.dtype != torch.bool:
                raise ValueError(f"keep must be bool of shape {tuple(inside.shape)}, "
                                 f"not {keep.dtype} of shape {tuple(keep.shape)}")
            inside &= keep.cpu()
        b, t, u = (a.to(device) for a in inside.nonzero(as_tuple=True))                          # (n,) each
        self.encoder_rows, self.label_rows = b * T + t, b * U1 + u      # of encoder_out, of label_out, for each node
        self.nodes = self.encoder_rows * U1 + u                         # its place in (B,T,U1)
        self.y = self.batch.y.flatten()[self.nodes]                     # its label
        nothing = 0.0 if keep is None else -math.inf                    # a node that is not kept has no arcs
        self.arcs = torch.full((B * T * U1, 2), nothing, dtype=self.batch.real, device=device)  # at the same places
        self.norms = torch.empty(len(u), 2, dtype=torch.promote_types(dtype, torch.float32), device=device)
        sizes, rows = inside.sum((1, 2)), max(1, tile_bytes // ((2 * V + 4 * J) * dtype.itemsize))
        many = rows // max([1, *sizes.tolist()]) or B                   # utterances in a group
        ends, self.groups = [0, *sizes.cumsum(0).tolist()], []          # where each utterance's nodes end
        for b in range(0, B, many):
            first, last = ends[b], ends[min(b + many, B)]
            self.groups.append((slice(b, b + many), [slice(i, min(i + rows, last)) for i in range(first, last, rows)]))
        self.buffers, self.current = self.weight.new_empty(2, min(rows, len(u)), V), None

    def compute(self, tile):
        """-> hidden (n,J), logits (n,V), and an (n,V) buffer for their gradient. The last tile computed is kept."""
        if self.current != tile:
            hidden = self.encoder_out.index_select(0, self.encoder_rows[tile])                  # (n,J)
            hidden.add_(self.label_out.index_select(0, self.label_rows[tile])).tanh_()
            self.hidden, self.current = hidden.to(self.weight.dtype), tile
            torch.addmm(self.bias, self.hidden, self.weight.T, out=self.buffers[0, :len(hidden)])
        return self.hidden, *self.buffers[:, :len(self.hidden)]

    def run(self, some, tiles, **how):
        """-> costs of a group. Its arcs, as `lattice` leaves them, stay in self.arcs, log-normalisers in self.norms."""
        for tile in tiles:
            self.arcs[self.nodes[tile]], self.norms[tile] = log_probs(self.compute(tile)[1], self.y[tile], self.batch)
        return lattice(self.arcs.view(*self.batch.y.shape, 2)[some], self.batch, some, **how)


class _JointLoss(Function):
    """The sum of the costs. The gradient is formed in forward, tile by tile; backward only multiplies it."""
    @staticmethod
    def forward(ctx, joint, want, *inputs):
        wide = joint.norms.dtype
        ctx.grads = [torch.zeros(a.shape, dtype=wide, device=a.device) for a in inputs if want]  # of all four inputs
        total = joint.norms.new_zeros((), dtype=torch.float64)
        for some, tiles in joint.groups:
            total += joint.run(some, tiles, want=want).sum()
            for tile in tiles if want else ():
                hidden, logits, grad = joint.compute(tile)                                       # (n,J), (n,V), (n,V)
                gradient(logits, joint.y[tile], joint.norms[tile], -joint.arcs[joint.nodes[tile]], joint.batch, grad)
                d_sum = torch.ops.aten.tanh_backward(grad @ joint.weight, hidden).to(wide)       # (n,J)
                ctx.grads[0].flatten(0, 1).index_add_(0, joint.encoder_rows[tile], d_sum)
                ctx.grads[1].flatten(0, 1).index_add_(0, joint.label_rows[tile], d_sum)
                if grad.dtype == wide:
                    ctx.grads[2].addmm_(grad.T, hidden)    # no (V,J) in between
                else:
                    ctx.grads[2] += grad.T @ hidden        # half precision adds up in float32
                ctx.grads[3] += grad.sum(0, dtype=wide)
        return total.to(wide)

    @staticmethod
    def backward(ctx, upstream):
        _first_derivative_only()
        return None, None, *(grad * upstream for grad in ctx.grads)


def joint_rnnt_loss(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths, *, blank,
                    reduction="mean", fastemit_lambda=0.0, delay_penalty=0.0, tile_bytes=TILE_BYTES, keep=None):
    """rnnt_loss(tanh(encoder_out[:, :, None] + label_out[:, None]) @ weight.T + bias, ...) without its logits.

    encoder_out (B,T,J) and label_out (B,U1,J) are already projected; weight (V,J), bias (V,). Under autocast, logits
    have its dtype, else encoder_out's. Lengths on the CPU spare a wait for the GPU. A tile takes about tile_bytes.
    If every utterance fits a tile, the gradient takes three matrix products of size n J V, else four, as logits are
    dropped and computed again. reduction="none" runs one utterance at a time and keeps a weight gradient for each.

    keep (B,T,U1), bool: a node outside it has no arcs (log-probability -inf), takes no time and gets no gradient. The
    loss is then of the paths inside alone: never below the full one, inf where no path is left. All of the time is in
    the n nodes kept, so in a band (prune_band), or in the blocks of sentences that were joined, it is linear in T.
    A keep that lies on a GPU is fetched once, the only wait of such a step.
    """
    inputs = encoder_out, label_out, weight, bias
    joint = _Joint(inputs, targets, logit_lengths, target_lengths, blank, tile_bytes, reduction=reduction,
                   fastemit=fastemit_lambda, delay=delay_penalty, keep=keep)
    if joint.batch.factor:
        want = torch.is_grad_enabled() and any(a.requires_grad for a in inputs)
        return _JointLoss.apply(joint, want, *inputs) * joint.batch.factor      # one factor for all utterances
    alone = partial(joint_rnnt_loss, blank=blank, reduction="sum", fastemit_lambda=fastemit_lambda,
                    delay_penalty=delay_penalty, tile_bytes=tile_bytes)
    costs = [alone(encoder_out[b:b + 1], label_out[b:b + 1], weight, bias, targets[b:b + 1], logit_lengths[b:b + 1],
                   target_lengths[b:b + 1], keep=None if keep is None else keep[b:b + 1])
             for b in range(len(targets))]
    return torch.stack(costs) if costs else bias.new_zeros(0)


# ------------------------------------------------------------------------------------------------------------- pruned
# Most nodes lie on no path worth the name. To know which ones do, a transducer that needs no joint network: its logits
# are am[t] + lm[u], of two small projections, and they are never formed (arXiv 2206.13236, section 3):
#
#   log sum_k exp(am[t,k] + lm[u,k]) = log sum_k exp(am[t,k]) exp(lm[u,k])         one matrix product of exponentials
#
# Its node posteriors choose a band of rows for each frame, and the joint network is asked about nodes of the band only.
def _simple_arcs(am, lm, labels):
    """am (B,T,V), lm (B,U1,V) -> arcs (B,T,U1,2) of the logits am[:, :, None] + lm[:, None]; labels (B,U1) from 0."""
    blank, labels = labels
    am, lm = (a - a.detach().amax(-1, keepdim=True) for a in (am, lm))     # a node's softmax does not see such offsets
    normalizer = _log_sum_exp_of_sums(am, lm)                              # (B,T,U1)
    blanks = am[..., blank, None] + lm[..., blank][:, None]
    of_frames = am.gather(2, labels[:, None].expand(-1, am.shape[1], -1))  # (B,T,U1)
    of_rows = lm.gather(2, labels[:, :, None]).mT                          # (B,1,U1)
    return torch.stack([blanks - normalizer, of_frames + of_rows - normalizer], -1)


def _log_sum_exp_of_sums(am, lm):
    """log sum_k exp(am[b,t,k] + lm[b,u,k]) as (B,T,U1), where no am or lm is above 0."""
    product = am.exp() @ lm.exp().mT
    info = torch.finfo(am.dtype)                                           # what underflowed is at most V tiny:
    lost = product < am.shape[-1] * info.tiny / info.eps                   # here it would be seen
    result = product.masked_fill(lost, 1).log()
    b, t, u = lost.nonzero(as_tuple=True)                                  # none, but where peaks are 60 nats apart
    rows = max(1, SLAB_BYTES // (am.shape[-1] * am.element_size()))
    slabs = zip(b.split(rows), t.split(rows), u.split(rows))
    directly = [checkpoint(_log_sum_exp_at, am, lm, *slab, use_reentrant=False, preserve_rng_state=False)
                for slab in slabs if len(b)]                               # a slab's sums are dropped and formed again
    return result.index_put((b, t, u), torch.cat(directly)) if directly else result


def _log_sum_exp_at(am, lm, b, t, u):
    return (am[b, t] + lm[b, u]).logsumexp(-1)


class _Lattice(Function):
    """Arcs (B,T,U1,2) -> costs (B,) and the posteriors (B,T,U1) of the nodes; only the costs are differentiable."""
    @staticmethod
    def forward(ctx, arcs, batch):
        posteriors = arcs.to(batch.real, copy=True)
        costs = lattice(posteriors, batch)
        nodes = posteriors.sum(-1)                         # on the path: it leaves by one arc or the other
        ctx.save_for_backward(posteriors)
        ctx.mark_non_differentiable(nodes)
        return costs.to(arcs.dtype), nodes

    @staticmethod
    def backward(ctx, upstream, _):
        _first_derivative_only()
        posteriors, = ctx.saved_tensors
        return (-posteriors * upstream[:, None, None, None]).to(upstream.dtype), None


def simple_rnnt_loss(am, lm, targets, logit_lengths, target_lengths, *, blank, reduction="mean"):
    """rnnt_loss(am[:, :, None] + lm[:, None], ...) without these logits -> its cost, and posteriors (B,T,U1).

    am (B,T,V) says what frame t sounds like, lm (B,U1,V) what may follow u labels; the rest as rnnt_loss's. The cost is
    differentiable in am and lm. A node's posterior is the probability that the path goes through it, for prune_band.
    All is in float32 at least, under autocast too. Nodes whose product of exponentials underflows (am and lm peak at
    labels more than some 60 nats apart) are summed directly; on a GPU, finding them is a wait.
    """
    a, l = tuple(am.shape), tuple(lm.shape)
    if [len(a), len(l)] != [3, 3] or a[::2] != l[::2]:
        raise ValueError(f"am (B,T,V), lm (B,U1,V) are {a}, {l}")
    dtype = torch.promote_types(torch.promote_types(am.dtype, lm.dtype), torch.float32)
    batch = _batch((a[0], a[1], l[1], a[2]), am.device, dtype, targets, logit_lengths, target_lengths, blank,
                   reduction=reduction)
    padding = batch.y == PADDING                                           # (B,T,U1)
    labels = batch.y.amax(1).clamp(min=0)                                  # (B,U1)
    with torch.autocast(am.device.type, enabled=False):
        am = am.to(dtype).masked_fill(padding.all(2)[..., None], 0)        # padding may hold anything
        lm = lm.to(dtype).masked_fill(padding.all(1)[..., None], 0)
        arcs = _simple_arcs(am, lm, (batch.blank, labels)).masked_fill(padding[..., None], 0)
        costs, posteriors = _Lattice.apply(arcs, batch)
    return costs.sum() * batch.factor if batch.factor else costs, posteriors


@torch.no_grad()
def prune_band(posteriors, logit_lengths, target_lengths, width):
    """-> keep (B,T,U1), bool: for each frame the `width` rows that hold the most posterior, as a band with paths in it.

    posteriors (B,T,U1) as simple_rnnt_loss gives them. To have paths, a band starts at row 0, ends at row U, never
    falls, and rises by at most width - 1 a frame, so that two frames share a row. Where windows disagree with that, the
    lower row wins: labels then move to later frames, which have heard more; only the end may pull them forward.

    A path in the band writes at most width - 1 labels in a frame, and a stream of words of two languages comes in
    bursts: width must be above the longest. Where even (width - 1) T < U, that utterance gets the least width that has
    a path, and a warning says so.
    """
    B, T, U1 = posteriors.shape
    frames, counts = (a.to(posteriors.device, torch.int64)[:, None] for a in (logit_lengths, target_lengths))
    least = -(-target_lengths.long() // logit_lengths.long().clamp(min=1)) + 1         # (B,)
    if (least > width).any():
        warnings.warn(f"prune_band: width {width} cannot write U labels in T frames where (width - 1) T < U; "
                      "wider there", stacklevel=2)
    width = least.clamp(min=width).to(posteriors.device)[:, None]          # (B,1)
    t, u = torch.arange(T, device=posteriors.device), torch.arange(U1, device=posteriors.device)
    last = (counts + 1 - width).clamp(min=0)                               # the highest first row of a window

    # the mass of a window of rows [s, s + width) is a difference of two running sums; of equals, the most central
    sums = torch.nn.functional.pad(posteriors.double().cumsum(2), (1, 0))  # (B,T,U1 + 1)
    ends = (u + width).clamp(max=U1)[:, None].expand(-1, T, -1)            # (B,T,U1)
    mass = sums.gather(2, ends) - sums[..., :-1]
    mean = (posteriors * u).sum(2) / posteriors.sum(2).clamp(min=1e-30)    # (B,T)
    mass -= 1e-4 / U1 * (u + (width[..., None] - 1) / 2 - mean[..., None]).abs()
    first = mass.masked_fill((u > last)[:, None], -math.inf).argmax(2)     # (B,T): the first row of each frame's window

    first = torch.where(t < frames, first, last)
    first = first.flip(1).cummin(1).values.flip(1)                         # never falls: no later window is lower
    rise = (width - 1) * t
    first = (first - rise).cummin(1).values + rise                         # rises by at most width - 1
    first = torch.minimum(first, rise)                                     # starts at row 0
    first = torch.maximum(first, last - (width - 1) * (frames - 1 - t))[..., None]     # ends at row U: (B,T,1)
    keep = (u >= first) & (u < first + width[..., None])
    return keep & (t < frames)[..., None] & (u <= counts)[:, None]


# ------------------------------------------------------------------------------------------------------------- Viterbi
def _emitted(arcs):
    """The frame of each label arc that is 1, (B,T,U1,2) -> (B,U1-1); -1 where none is."""
    taken = (arcs[:, :, :-1, LABEL] == 1).int()            # (B,T,U1-1)
    return torch.where(taken.any(1), taken.argmax(1), -1)  # argmax: its only 1


@torch.no_grad()
def rnnt_align(logits, targets, logit_lengths, target_lengths, *, blank):
    """The frame (B,U1-1) at which the likeliest path writes each label; -1 in padding and where there is no path."""
    batch = _batch(logits.shape, logits.device, logits.dtype, targets, logit_lengths, target_lengths, blank)
    arcs = log_probs(logits.contiguous().flatten(0, 2), batch.y.flatten(), batch)[0].view(*batch.y.shape, 2)
    lattice(arcs, batch, best=True)
    return _emitted(arcs)


@torch.no_grad()
def joint_rnnt_align(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths, *, blank):
    """rnnt_align without the logits; arguments as joint_rnnt_loss's."""
    joint = _Joint((encoder_out, label_out, weight, bias), targets, logit_lengths, target_lengths, blank)
    for some, tiles in joint.groups:
        joint.run(some, tiles, best=True)
    return _emitted(joint.arcs.view(*joint.batch.y.shape, 2))


def demonstrate():
    """Each version: a known example's cost, a batch's costs, and the largest error of its gradient."""
    known = torch.tensor([[[[1, 6, 1, 1, 1], [1, 1, 6, 1, 1], [1, 1, 2, 8, 1]],
                           [[1, 6, 1, 1, 1], [1, 1, 2, 1, 1], [7, 1, 2, 1, 1]]]]) / 10          # costs 4.495667
    of_known = torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([2])
    torch.manual_seed(0)
    joint = [torch.randn(shape) for shape in ((3, 9, 16), (3, 5, 16), (20, 16), (20,))]
    logits = torch.tanh(joint[0][:, :, None] + joint[1][:, None]) @ joint[2].T + joint[3]
    batch = torch.randint(1, 20, (3, 4)), torch.tensor([9, 4, 1]), torch.tensor([3, 4, 0])
    ours = [("CPU", "cpu", torch.float64), ("CPU", "cpu", torch.float32), ("CUDA", "cuda", torch.float32)]
    for name, device, dtype in [("reference", "cpu", torch.float64)] + ours[:2 + torch.cuda.is_available()]:
        loss = rnnt_loss_reference if name == "reference" else partial(rnnt_loss, reduction="none")
        x = logits.to(device, dtype).requires_grad_()
        costs = loss(x, *batch, blank=0)
        grad = torch.autograd.grad(costs.sum(), x)[0].cpu()
        wanted = grad if name == "reference" else wanted
        print(f"{name:10s}{str(dtype)[6:]:8s}{loss(known.to(x), *of_known, blank=0).item():.6f} ",
              *(f"{c:.6f}" for c in costs), f"{(grad - wanted).abs().max():.0e}")
    costs = joint_rnnt_loss(*joint, *batch, blank=0, reduction="none")
    print("fused with joint          ", *(f"{c:.6f}" for c in costs))
    print("frames of the labels on the best path:", rnnt_align(logits, *batch, blank=0).tolist())


if __name__ == "__main__":
    demonstrate()
