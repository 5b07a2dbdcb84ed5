"""The RNN-T (transducer) loss: plain, fast on a CPU, fast on a GPU, and fused with the joint network.

A transducer reads T encoder frames and writes U labels. At node (t,u) it has u labels written and looks at frame t; it
writes either a blank (and goes to the next frame) or the next label (and stays):

      u=2   o--o--o--o--->    a path climbs from the lower left corner to the upper right one and leaves by a blank
            |  |  |  |        --  blank: (t,u) to (t+1,u)
      u=1   o--o--o--o        |   label y[u]: (t,u) to (t,u+1)
            |  |  |  |
      u=0   o--o--o--o        alpha(t,u) = log of the sum, over all paths from the start to (t,u), of their probability
           t=0  1  2  3                  = log(exp(alpha(t-1,u) + blank(t-1,u)) + exp(alpha(t,u-1) + label(t,u-1)))

      cost = -log P(labels | frames) = -(alpha(T-1,U) + blank(T-1,U))

The gradient for logit k of a node needs no more than the posterior of its two arcs, the probability that a path drawn
from those that spell the labels goes over the arc:

      dcost/dlogit[t,u,k] = (on + up) softmax[k] - on [k is blank] - up [k is y[u]],    on, up: of the blank, the label

So every version is three steps: `log_probs` reads the logits (B,T,U1,V) and keeps three numbers a node; `lattice` turns
two of them into posteriors; `gradient` reads the logits again and writes their gradient. Nothing else has the logits'
size. rnnt_loss does it for logits, joint_rnnt_loss for the joint network's, a tile at a time, so that the logits never
exist. rnnt_align finds the best single path. `python rnnt_loss.py` compares.
"""
import math
import os
import warnings
from collections import namedtuple
from contextlib import nullcontext
from functools import cache, partial

os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")  # a block an utterance is what we want
import numba
import numpy as np
import torch
from numba import cuda, njit, prange
from numba.extending import overload

SLAB_BYTES = 4 << 20      # half-precision logits are cast to float32 this much at a time
TILE_BYTES = 48 << 20     # the fused joint holds about this much at a time


def rnnt_loss_reference(logits, targets, logit_lengths, target_lengths, *, blank, fused_log_softmax=True,
                        delay_penalty=0.0):
    """Costs (B,) in float64, by the definition and one node at a time; autograd gives the gradient."""
    costs = []
    for b in range(len(logits)):
        T, U = int(logit_lengths[b]), int(target_lengths[b])
        logp = logits[b].double().log_softmax(-1) if fused_log_softmax else logits[b].double()
        alpha = {}
        for t in range(T):
            for u in range(U + 1):
                arcs = [] if t or u else [logp.new_zeros(())]
                if t > 0:
                    arcs.append(alpha[t - 1, u] + logp[t - 1, u, blank])
                if u > 0:
                    delay = delay_penalty * ((T - 1) / 2 - t)
                    arcs.append(alpha[t, u - 1] + logp[t, u - 1, int(targets[b, u - 1])] + delay)
                alpha[t, u] = torch.stack(arcs).logsumexp(0)
        costs.append(-(alpha[T - 1, U] + logp[T - 1, U, blank]))
    return torch.stack(costs)


# A batch as the kernels take it: labels (B,U1), -1 where a node has no label arc; frames and counts (B,), the lengths;
# the planes lse, blank, label (B,T,U1), the log-normaliser and the two arcs of each node; alpha (B,2,U1); costs (B,).
Job = namedtuple("Job", "labels frames counts lse blank label alpha costs blank_id fused fastemit delay clamp gpu")


# ------------------------------------------------------------------------------------------ the lattice, for both
def _node(n, job):
    """Node number n is (b,t,u); is it in use?"""
    T, U1 = job.lse.shape[1], job.lse.shape[2]
    b, t, u = n // (T * U1), n // U1 % T, n % U1
    return b, t, u, t < job.frames[b] and u <= job.counts[b]


def _make_join(real):
    def join(a, b):
        """log(e^a + e^b), and the shares of the two in the sum."""
        if a == -math.inf and b == -math.inf:
            return a, real(0), real(0)
        e = math.exp(real(-abs(a - b)))
        large = real(1) / (real(1) + e)
        rest = np.float64(math.log1p(e))
        if a >= b:
            return a + rest, large, e * large
        return b + rest, e * large, large
    return join


def _make_lattice(join, barrier):
    def lattice(b, i, wide, job, want):
        """The cost of utterance b. Its arcs' log-probabilities become, in place, their posteriors.

        Forward, alpha joins what comes over a blank and what comes over a label, and leaves on each of these two arcs
        the share that came over it. Backward, the probability of passing through a node, 1 at the end, is dealt out
        over the two arcs that enter it by those shares. There is no beta, hardly an exp, and alpha + beta - log P,
        whose digits cancel in long audio, is never formed.

        Nodes with the same d = t + u need only those with d - 1, so they can be done at once: thread i of `wide`, on a
        CPU the only one, does every wide-th. alpha holds this d and the last.
        """
        blank, label, alpha, T, U = job.blank[b], job.label[b], job.alpha[b], job.frames[b], job.counts[b]
        for d in range(T + U):
            new, old = alpha[d % 2], alpha[1 - d % 2]
            for u in range(max(0, d - T + 1) + i, min(d, U) + 1, wide):
                t = d - u
                on = old[u] + blank[t - 1, u] if t else 0.0 if u == 0 else -math.inf
                up = old[u - 1] + label[t, u - 1] if u else -math.inf
                new[u], share_on, share_up = join(on, up)
                if t:
                    blank[t - 1, u] = share_on
                if u:
                    label[t, u - 1] = share_up
            barrier()
        # T is 0 where a length is out of range and the host could not see it.
        logp = alpha[(T + U - 1) % 2, U] + blank[T - 1, U] if T else math.nan
        barrier()                                          # now every thread has it
        if i == 0:
            job.costs[b] = -logp
        if want and T:
            for t in range(i, T, wide):                    # arcs that lead out of the lattice; all but one:
                label[t, U] = 0.0
            for u in range(i, U + 1, wide):                # no path: 0 everywhere; NaN: NaN
                blank[T - 1, u] = 0.0 if u < U or logp == -math.inf else math.exp(logp - logp)
            barrier()
            for d in range(T + U - 1, -1, -1):
                for u in range(max(0, d - T + 1) + i, min(d, U) + 1, wide):
                    t = d - u
                    through = blank[t, u] + label[t, u]
                    if t:
                        blank[t - 1, u] *= through
                    if u:
                        label[t, u - 1] *= through
                barrier()
    return lattice


_device = cuda.jit(device=True)
_inline = njit(forceinline=True)
_cpu_node, _gpu_node = _inline(_node), _device(_node)
_cpu_lattice_of = _inline(_make_lattice(_inline(_make_join(np.float64)), _inline(lambda: None)))
_gpu_lattice_of = _device(_make_lattice(_device(_make_join(np.float32)), _device(lambda: cuda.syncthreads())))


# ---------------------------------------------------------------------------------------------------------------- CPU
# Two loops over the vocabulary take nearly all of the time. At the speed of memory they must vectorise, and numba has
# no vectorised exp. Here is one: 2^f = 1 + f q(f) on [-1/2, 1/2], q interpolated, so that 2^0 is exactly 1.
_Q = np.polynomial.chebyshev.Chebyshev.interpolate(lambda f: np.expm1(f * math.log(2)) / f, 4, [-0.5, 0.5 + 1e-9])
_Q = tuple(np.float32(c) for c in _Q.convert(kind=np.polynomial.Polynomial).coef)
_LOG2E = np.float32(1 / math.log(2))
_ROUND = np.float32(1.5 * 2 ** 23)     # adding it leaves the nearest integer in the low bits of a float32
_FLOOR = np.float32(-127)              # 2^-127 comes out as exactly 0: its exponent bits are 0


@njit(fastmath={"contract"}, forceinline=True)
def _exp32(x):
    """exp(x) for x <= 88 without a branch or a call; relative error 1e-7 near 0, 1e-6 at -15."""
    y = x * _LOG2E
    y = _FLOOR if y < _FLOOR else y                        # NaN stays NaN
    shifted = y + _ROUND
    f = y - (shifted - _ROUND)                             # y = n + f, |f| <= 1/2
    p = np.float32(1) + f * (_Q[0] + f * (_Q[1] + f * (_Q[2] + f * (_Q[3] + f * _Q[4]))))
    bits = np.int32(np.float32(shifted).view(np.int32) << 23) + np.float32(p).view(np.int32)
    return np.int32(bits).view(np.float32)                 # n added to the exponent of p


@njit(forceinline=True)
def _max32(row):
    """The largest of a row, compared as whole numbers, which vectorises: negative floats are sorted backwards."""
    bits = row.view(np.int32)
    high = low = bits[0]
    for k in range(bits.shape[0]):
        v = bits[k]
        high, low = max(high, v), min(low, v)
    return np.int32(high if high >= 0 else low).view(np.float32)


def _exp(x):
    raise NotImplementedError("only inside a kernel")


def _max(row):
    raise NotImplementedError("only inside a kernel")


overload(_exp)(lambda x: (lambda x: _exp32(x)) if x == numba.float32 else (lambda x: math.exp(x)))
overload(_max)(lambda row: (lambda row: _max32(row)) if row.dtype == numba.float32 else (lambda row: row.max()))


@njit(fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _sum_exp(row, top):
    total = row.dtype.type(0)
    for k in range(row.shape[0]):
        total += _exp(row[k] - top)
    return total


@njit(fastmath={"contract"}, forceinline=True)
def _scaled_softmax(row, lse, factor, out):
    for k in range(row.shape[0]):
        out[k] = factor * _exp(row[k] - lse)


@njit(forceinline=True)
def _log_probs_row(row, node, job):
    b, t, u, inside = _cpu_node(node, job)
    if inside:
        lse = 0.0
        if job.fused:
            top = _max(row)
            lse = top + math.log(_sum_exp(row, top))
        job.lse[b, t, u] = lse
        job.blank[b, t, u] = row[job.blank_id] - lse
        if u < job.counts[b]:
            job.label[b, t, u] = row[job.labels[b, u]] - lse + job.delay * ((job.frames[b] - 1) / 2 - t)


@njit(forceinline=True)
def _gradient_row(row, node, job, scale, grad):
    b, t, u, inside = _cpu_node(node, job)
    on = job.blank[b, t, u] if inside else 0.0
    up = (1 + job.fastemit) * job.label[b, t, u] if inside else 0.0
    if (on == 0 and up == 0) or not job.fused:
        grad[:] = 0
    if on != 0 or up != 0:
        factor = 1.0 if job.clamp > 0 else scale[b]        # clamped is the gradient of the cost itself
        if job.fused:
            _scaled_softmax(row, row.dtype.type(job.lse[b, t, u]), row.dtype.type(factor * (on + up)), grad)
        grad[job.blank_id] -= factor * on
        if u < job.counts[b]:
            grad[job.labels[b, u]] -= factor * up
        if job.clamp > 0:
            for k in range(grad.shape[0]):
                grad[k] = min(max(grad[k], -job.clamp), job.clamp) * scale[b]


# The parallel loops do no more than call: a store to an array inside a tuple, in the loop itself, numba would drop.
@njit(parallel=True, nogil=True, cache=True)
def _cpu_log_probs(x, nodes, job):
    for i in prange(x.shape[0]):
        _log_probs_row(x[i], nodes[i], job)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_lattice(job, want):
    for b in prange(job.costs.shape[0]):
        _cpu_lattice_of(b, 0, 1, job, want)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_gradient(x, nodes, job, scale, out):
    for i in prange(x.shape[0]):
        _gradient_row(x[i], nodes[i], job, scale, out[i])


# --------------------------------------------------------------------------------------------------------------- CUDA
# The same three steps. 32 lanes share a row of logits, so that neighbours read neighbours; a block holds ROWS rows.
# numba has no bfloat16: such logits come as int16, their bits, and `brain` is true. Sums are float32, alpha is float64.
ROWS = 8
LATTICE_THREADS = 1024                                     # of a block of the lattice, at most
_LOWEST = np.float32(-3e38)                                # where a running maximum starts: -inf - -inf would be NaN


@cuda.jit(device=True)
def _real(v, brain):
    return np.int32(np.int32(v) << 16).view(np.float32) if brain else np.float32(v)


@cuda.jit(device=True)
def _brain(v):
    """The bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""
    bits = np.int64(np.float32(v).view(np.int32))
    return np.int16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) if v == v else np.int16(0x7fc0)


@cuda.jit
def _gpu_log_probs(x, nodes, job, brain):
    """One pass: every lane keeps the maximum so far and the sum of exp(x - maximum), and the 32 pairs are merged."""
    lane, r = cuda.threadIdx.x, cuda.threadIdx.y
    i, V = np.int64(cuda.blockIdx.x) * ROWS + r, x.shape[1]
    tops = cuda.shared.array((ROWS, 32), np.float32)       # the simulator tells shared arrays apart by their line
    sums = cuda.shared.array((ROWS, 32), np.float32)
    b, t, u, inside = _gpu_node(nodes[min(i, x.shape[0] - 1)], job)
    inside = inside and i < x.shape[0]                     # every thread must meet every barrier below
    top, total = _LOWEST, np.float32(0)
    if inside and job.fused:
        for k in range(lane, V, 32):
            v = _real(x[i, k], brain)
            if v > top:                                    # seldom: a second exp for those only
                total *= math.exp(top - v)
                top = v
            total += math.exp(v - top)
    tops[r, lane], sums[r, lane] = top, total
    step = 16
    while step:
        cuda.syncthreads()
        if lane < step:
            top0, top1 = tops[r, lane], tops[r, lane + step]
            new = max(top0, top1)
            sums[r, lane] = sums[r, lane] * math.exp(top0 - new) + sums[r, lane + step] * math.exp(top1 - new)
            tops[r, lane] = new
        step //= 2
    if inside and lane == 0:
        lse = tops[r, 0] + math.log(sums[r, 0]) if job.fused else np.float32(0)
        job.lse[b, t, u] = lse
        job.blank[b, t, u] = _real(x[i, job.blank_id], brain) - lse
        if u < job.counts[b]:
            y, delay = job.labels[b, u], np.float32(job.delay * ((job.frames[b] - 1) / 2 - t))
            job.label[b, t, u] = _real(x[i, y], brain) - lse + delay if 0 <= y < V else np.float32(math.nan)


@cuda.jit
def _gpu_gradient(x, nodes, job, scale, out, brain):
    lane, i, V = cuda.threadIdx.x, np.int64(cuda.blockIdx.x) * ROWS + cuda.threadIdx.y, x.shape[1]
    if i < x.shape[0]:
        b, t, u, inside = _gpu_node(nodes[i], job)
        on, up, lse, y = np.float32(0), np.float32(0), np.float32(0), np.int64(-1)
        if inside:
            on, lse = job.blank[b, t, u], job.lse[b, t, u]
            if u < job.counts[b]:
                y, up = job.labels[b, u], job.label[b, t, u] * np.float32(1 + job.fastemit)
        factor, clamp, weight = np.float32(scale[b]), np.float32(job.clamp), on + up
        for k in range(lane, V, 32):
            g = np.float32(0)
            if weight != 0:                                # else the row is written but not read
                if job.fused:
                    g = weight * math.exp(_real(x[i, k], brain) - lse)
                if k == job.blank_id:
                    g -= on
                if k == y:
                    g -= up
                if clamp > 0:
                    g = min(max(g, -clamp), clamp)
                g *= factor
            if brain:
                out[i, k] = _brain(g)
            else:
                out[i, k] = g


@cuda.jit
def _gpu_lattice(job, want):                               # a block an utterance; its threads share each antidiagonal
    _gpu_lattice_of(cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x, job, want)


@cache
def _gpu_compiles():
    """Whether numba can compile for the GPU at hand; says so once where it cannot."""
    try:
        @cuda.jit
        def probe(a):
            a[0] = max(a[0], a[0])
        probe[1, 1](np.zeros(1, np.float32))
        return True
    except Exception as error:                             # no driver, no NVVM, numba without numba-cuda: all the same
        reason = next(iter(str(error).split("\n")), "")
        warnings.warn(f"numba cannot compile for this GPU ({reason}): rnnt_loss sends the logits through the CPU. "
                      "pip install 'numba-cuda[cu12]' (or cu13, as your driver) makes it fast.", stacklevel=2)
        return False


# ----------------------------------------------------------------------------------------- the three steps, on either
def _array(a):
    """torch's memory as numba takes it; nothing is copied."""
    if isinstance(a, Job):
        return Job(*map(_array, a))
    if not isinstance(a, torch.Tensor):
        return a
    a = a.detach().view(torch.int16) if a.dtype == torch.bfloat16 else a.detach()
    return cuda.as_cuda_array(a, sync=False) if a.is_cuda else a.numpy()


def _run(kernel, grid, *args):
    """Run a kernel: on as many threads as torch uses, or with a grid (blocks, threads) on the GPU's present stream."""
    if not grid:
        threads = torch.get_num_threads()
        numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
        kernel(*map(_array, args))
        torch.set_num_threads(threads)                     # where both use the same OpenMP, numba has changed it
    elif grid[0]:
        device = next(a for a in args if isinstance(a, Job)).costs.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():    # the simulator has CPU tensors
            stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
            kernel[(*grid, stream and cuda.external_stream(stream))](*map(_array, args))


def _on_gpu(device, dtype):
    gpu = device.type == "cuda" or numba.config.ENABLE_CUDASIM
    return bool(gpu and dtype != torch.float64 and _gpu_compiles())


def _slabs(x):
    """-> first row, rows of the logits x (n,V) in a type and place for the CPU's kernels."""
    native = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    step = max(1, len(x) if native else SLAB_BYTES // (4 * x.shape[1]))
    for i in range(0, len(x), step):
        yield i, x[i:i + step] if native else x[i:i + step].to("cpu", torch.promote_types(x.dtype, torch.float32))


def log_probs(x, nodes, job):
    """x (n,V): the logits of the nodes with these numbers (n,)."""
    if job.gpu:
        _run(_gpu_log_probs, (-(-len(x) // ROWS), (32, ROWS)), x, nodes, job, x.dtype == torch.bfloat16)
        return
    for i, rows in _slabs(x):
        _run(_cpu_log_probs, None, rows, nodes[i:i + len(rows)], job)


def lattice(job, want):
    """Costs; where gradients are wanted, the arcs' posteriors too."""
    threads = min(LATTICE_THREADS, -(-job.alpha.shape[-1] // 32) * 32)
    _run(*((_gpu_lattice, (len(job.costs), threads)) if job.gpu else (_cpu_lattice, None)), job, want)


def gradient(x, nodes, job, scale, out):
    """out (n,V): the gradient of the same rows, utterance b's multiplied by scale[b]."""
    if job.gpu:
        grid = -(-len(x) // ROWS), (32, ROWS)
        _run(_gpu_gradient, grid, x, nodes, job, scale, out, x.dtype == torch.bfloat16)
        return
    for i, rows in _slabs(x):
        here = out[i:i + len(rows)]
        grad = here if here.dtype == rows.dtype and here.device == rows.device else torch.empty_like(rows)
        _run(_cpu_gradient, None, rows, nodes[i:i + len(rows)], job, scale, grad)
        if grad is not here:
            here.copy_(grad)


def _all_nodes(job):
    return torch.arange(job.lse.numel(), device=job.lse.device)


# ------------------------------------------------------------------------------------------------------------ checking
def _make_job(shape, kind, targets, logit_lengths, target_lengths, blank, *, fused=True, fastemit=0.0, delay=0.0,
              clamp=-1.0, validate=None):
    """Check what can be checked without waiting for a GPU (everything with validate=True), and put it into a Job."""
    B, T, U1, V = shape
    blank_id, U = blank + V if blank < 0 else blank, min(U1 - 1, targets.shape[-1])
    if not 0 <= blank_id < V:
        raise ValueError(f"blank is {blank}, but a node has {V} logits")
    for name, a, dims in (("targets", targets, 2), ("logit_lengths", logit_lengths, 1),
                          ("target_lengths", target_lengths, 1)):
        if a.dim() != dims or len(a) != B or a.is_floating_point():
            raise ValueError(f"{name} must be {dims}-dimensional integers for {B} utterances, "
                             f"not {a.dtype} of shape {tuple(a.shape)}")
    gpu = _on_gpu(*kind)                                   # kind: device, dtype
    home = kind[0] if gpu else "cpu"
    frames, counts, labels = (a.to(home, torch.int64) for a in (logit_lengths, target_lengths, targets))
    labels = torch.nn.functional.pad(labels[:, :U], (0, U1 - U), value=-1)
    within = torch.arange(U1, device=home) < counts[:, None]
    wrong = within & ((labels < 0) | (labels >= V) | (labels == blank_id))
    short, long = (frames < 1) | (frames > T), (counts < 0) | (counts > U)
    for name, a, bad, low, high in (("logit_lengths", frames, short, 1, T), ("target_lengths", counts, long, 0, U),
                                    ("targets", labels, wrong, f"blank ({blank_id}) and outside 0", V - 1)):
        if (validate or a.device.type == "cpu") and bad.any():
            at = bad.nonzero()[0].tolist()
            raise ValueError(f"{name}{at} is {a[tuple(at)]}, not in {low}..{high}")
    # What stays unchecked on a GPU: an utterance with a wrong length gets no frames, and its cost is NaN.
    frames, counts = (torch.where(short | long, 0, a) for a in (frames, counts))
    planes = torch.empty((3, B, T, U1), dtype=torch.float32 if gpu else torch.float64, device=home)
    alpha, costs = (torch.empty(shape, dtype=torch.float64, device=home) for shape in ((B, 2, U1), (B,)))
    return Job(torch.where(within, labels, -1), frames, counts, *planes, alpha, costs, blank_id, fused, float(fastemit),
               float(delay), float(clamp), gpu)


def _factor(reduction, B):
    """What the sum of the costs is multiplied by; 0 where they stay apart."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, not 'none', 'mean' or 'sum'")
    return {"none": 0.0, "sum": 1.0, "mean": 1 / max(1, B)}[reduction]


def _first_derivative_only():
    if torch.is_grad_enabled():
        raise RuntimeError("rnnt_loss has no second derivative: backward was called with create_graph=True")


# ---------------------------------------------------------------------------------------------------- loss from logits
class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, job, want):
        ctx.job = job
        ctx.save_for_backward(logits)
        log_probs(logits.view(-1, logits.shape[-1]), _all_nodes(job), job)
        lattice(job, want)
        return job.costs.to(logits.device, torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx, upstream):
        _first_derivative_only()
        logits, = ctx.saved_tensors
        if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
            grad = torch.from_numpy(np.empty_like(logits.detach().numpy()))     # huge pages: torch's cost 5 x a copy
        else:
            grad = torch.empty_like(logits)
        scale, rows = upstream.to(ctx.job.costs.device, torch.float64).contiguous(), (-1, logits.shape[-1])
        gradient(logits.view(rows), _all_nodes(ctx.job), ctx.job, scale, grad.view(rows))
        return grad, None, None


def rnnt_loss(logits, targets, logit_lengths, target_lengths, blank=-1, clamp=-1, reduction="mean",
              fused_log_softmax=True, *, fastemit_lambda=0.0, delay_penalty=0.0, validate=None):
    """-log P(targets | logits). Names, order and defaults of the arguments are torchaudio.functional.rnnt_loss's.

    logits (B,T,U1,V) float32, float64, float16 or bfloat16; targets (B,U), logit_lengths (B,), target_lengths (B,) int.
    fastemit_lambda multiplies the label arcs' part of the gradient by 1 + lambda; the cost is reported without it.
    delay_penalty adds lambda ((T-1)/2 - t) to a label's log-probability at frame t, T the utterance's own length.
    validate=True checks values on a GPU too, which waits for it; else a length or label out of range there gives a cost
    of NaN.
    """
    if logits.dim() != 4 or not logits.is_floating_point():
        raise ValueError(f"logits must be (B,T,U+1,V) floats, not {logits.dtype} of shape {tuple(logits.shape)}")
    factor = _factor(reduction, len(logits))
    kind = logits.device, logits.dtype
    job = _make_job(logits.shape, kind, targets, logit_lengths, target_lengths, blank, fused=fused_log_softmax,
                    fastemit=fastemit_lambda, delay=delay_penalty, clamp=clamp, validate=validate)
    costs = _Loss.apply(logits.contiguous(), job, torch.is_grad_enabled() and logits.requires_grad)
    return costs.sum() * factor if factor else costs


# ----------------------------------------------------------------------------------------------- fused with the joint
class _Joint:
    """The joint network over tiles of packed nodes: whole utterances where each fits the budget, else just rows."""
    def __init__(self, inputs, targets, logit_lengths, target_lengths, blank, tile_bytes=TILE_BYTES, **options):
        like, (V, J) = inputs[0], inputs[2].shape
        if any(a.shape[-1] != J for a in inputs[:2]) or len(inputs[3]) != V:
            raise ValueError("the joint's widths disagree: encoder_out {}, label_out {}, weight {}, bias {}".format(
                *(tuple(a.shape) for a in inputs)))
        logit_lengths, target_lengths = logit_lengths.cpu(), target_lengths.cpu()      # the only wait for a GPU, if any
        autocast = torch.is_autocast_enabled(like.device.type)
        dtype = torch.get_autocast_dtype(like.device.type) if autocast else like.dtype
        self.wide = torch.promote_types(dtype, torch.float32)                          # of costs and sums of gradients
        (B, T), U1 = like.shape[:2], inputs[1].shape[1]
        self.job = _make_job((B, T, U1, V), (like.device, dtype), targets, logit_lengths, target_lengths, blank,
                             **options)
        self.encoder_out, self.label_out = (a.detach().reshape(-1, J) for a in inputs[:2])
        self.weight, self.bias = (a.detach().to(dtype) for a in inputs[2:])
        nodes = [((b * T + np.arange(n))[:, None] * U1 + np.arange(u + 1)).ravel()
                 for b, (n, u) in enumerate(zip(logit_lengths.tolist(), target_lengths.tolist()))]
        self.nodes = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *nodes])).to(self.job.costs.device)
        self.tiles, self.whole = _tiles([len(n) for n in nodes], tile_bytes // ((2 * V + 4 * J) * self.weight.itemsize))

    def __iter__(self):                                    # -> tile, hidden (n,J), logits and room for more (n,V)
        T, U1 = self.job.lse.shape[1:]
        logits, room = self.weight.new_empty((2, max((j - i for i, j, _ in self.tiles), default=0), len(self.weight)))
        for tile in self.tiles:
            nodes = self.nodes[tile[0]:tile[1]].to(self.weight.device)
            tile = (*tile, nodes // U1, nodes // (T * U1) * U1 + nodes % U1)          # rows of encoder_out, label_out
            hidden = self.encoder_out.index_select(0, tile[3]).add_(self.label_out.index_select(0, tile[4]))
            hidden, n = hidden.tanh_().to(self.weight.dtype), len(nodes)
            yield tile, hidden, torch.addmm(self.bias, hidden, self.weight.T, out=logits[:n]), room[:n]

    def zeros(self):
        inputs = (self.encoder_out, self.label_out, self.weight, self.bias)
        return [torch.zeros(a.shape, dtype=self.wide, device=a.device) for a in inputs]

    def add_gradients(self, grads, scale, tile, hidden, logits, grad):
        first, end, _, encoder_rows, label_rows = tile
        gradient(logits, self.nodes[first:end], self.job, scale, grad)
        if grad.dtype == self.wide:
            grads[2].addmm_(grad.T, hidden)
        else:
            grads[2].add_(grad.T @ hidden)
        grads[3].add_(grad.sum(0, dtype=self.wide))
        d_sum = torch.ops.aten.tanh_backward(grad @ self.weight, hidden).to(self.wide)
        grads[0].index_add_(0, encoder_rows, d_sum)
        grads[1].index_add_(0, label_rows, d_sum)


def _tiles(sizes, rows):
    """Ranges of packed nodes, (first, end, utterances held), and whether they all hold whole utterances."""
    ends, tiles = np.cumsum(sizes, dtype=np.int64).tolist(), []
    if max(sizes, default=0) > rows:
        rows = max(1, rows)
        return [(i, min(i + rows, ends[-1]), None) for i in range(0, ends[-1], rows)], False
    for b, (size, end) in enumerate(zip(sizes, ends)):
        if tiles and end - tiles[-1][0] <= rows:
            tiles[-1] = (tiles[-1][0], end, slice(tiles[-1][2].start, b + 1))
        else:
            tiles.append((end - size, end, slice(b, b + 1)))
    return tiles, True


class _JointLoss(torch.autograd.Function):
    """Each tile: joint -> (lse, blank, label) -> dropped, and computed again for the gradient in backward. Where whole
    utterances fit a tile and one upstream factor serves all (mean, sum), its gradient is formed at once instead."""
    @staticmethod
    def forward(ctx, encoder_out, label_out, weight, bias, joint, factor, want):
        ctx.save_for_backward(encoder_out, label_out, weight, bias)
        ctx.joint, ctx.factor, job = joint, factor, joint.job
        ctx.grads = joint.zeros() if want and factor and joint.whole else None
        scale = torch.full_like(job.costs, factor)
        for tile, hidden, logits, room in joint:
            log_probs(logits, joint.nodes[tile[0]:tile[1]], job)
            if ctx.grads:
                lattice(Job(*(a[tile[2]] if isinstance(a, torch.Tensor) else a for a in job)), True)
                joint.add_gradients(ctx.grads, scale, tile, hidden, logits, room)
        if not ctx.grads:
            lattice(job, want)
        return (job.costs.sum() * factor if factor else job.costs).to(weight.device, joint.wide)

    @staticmethod
    def backward(ctx, upstream):
        _first_derivative_only()
        inputs, joint = ctx.saved_tensors, ctx.joint       # fetched: an input changed in place since is an error
        if ctx.grads:
            grads = [g * upstream for g in ctx.grads]
        else:
            scale = upstream.to(joint.job.costs.device, torch.float64) * (ctx.factor or 1)
            grads, scale = joint.zeros(), scale.expand_as(joint.job.costs).contiguous()
            for tile in joint:
                joint.add_gradients(grads, scale, *tile)
        return (*(g.to(a.dtype).view(a.shape) for g, a in zip(grads, inputs)), None, None, None)


def joint_rnnt_loss(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths, *, blank,
                    reduction="mean", fastemit_lambda=0.0, delay_penalty=0.0, tile_bytes=TILE_BYTES):
    """rnnt_loss(tanh(encoder_out[:, :, None] + label_out[:, None]) @ weight.T + bias, ...) without its logits.

    encoder_out (B,T,J) and label_out (B,U1,J) are already projected; weight (V,J), bias (V,). Under autocast the joint
    is computed in its dtype. Lengths on the CPU cost no synchronisation with a GPU. tile_bytes bounds the memory.
    """
    inputs, factor = (encoder_out, label_out, weight, bias), _factor(reduction, len(targets))
    joint = _Joint(inputs, targets, logit_lengths, target_lengths, blank, tile_bytes, fastemit=fastemit_lambda,
                   delay=delay_penalty)
    want = torch.is_grad_enabled() and any(a.requires_grad for a in inputs)
    with torch.autocast(encoder_out.device.type, enabled=False):
        return _JointLoss.apply(*inputs, joint, factor, want)


# ------------------------------------------------------------------------------------------------------------- Viterbi
@njit(nogil=True, cache=True)
def _best_path(blank, label, T, U, frames):
    """frames[u]: the frame at which the best path emits label u; -1 where there is no path."""
    best = np.full((T + 1, U + 1), -np.inf)
    best[T, U] = 0.0
    for t in range(T - 1, -1, -1):
        for u in range(U, -1, -1):
            best[t, u] = blank[t, u] + best[t + 1, u]
            if u < U:
                best[t, u] = max(best[t, u], label[t, u] + best[t, u + 1])
    t, u = 0, 0
    while u < U and best[0, 0] > -np.inf:
        if label[t, u] + best[t, u + 1] >= blank[t, u] + best[t + 1, u]:
            frames[u] = t
            u += 1
        else:
            t += 1


def _align(job):
    frames = torch.full((len(job.labels), job.labels.shape[1] - 1), -1, dtype=torch.int64)
    blank, label, T, U = (a.cpu().numpy() for a in (job.blank, job.label, job.frames, job.counts))
    for b in range(len(frames)):
        _best_path(blank[b], label[b], T[b], U[b], frames[b].numpy())
    return frames


@torch.no_grad()
def rnnt_align(logits, targets, logit_lengths, target_lengths, *, blank):
    """The frame (B,U1-1) at which the best path writes each label; -1 beyond the target and where there is no path."""
    job = _make_job(logits.shape, (logits.device, logits.dtype), targets, logit_lengths, target_lengths, blank)
    log_probs(logits.contiguous().view(-1, logits.shape[-1]), _all_nodes(job), job)
    return _align(job).to(logits.device)


@torch.no_grad()
def joint_rnnt_align(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths, *, blank):
    """rnnt_align without the logits; arguments as joint_rnnt_loss's."""
    joint = _Joint((encoder_out, label_out, weight, bias), targets, logit_lengths, target_lengths, blank)
    with torch.autocast(encoder_out.device.type, enabled=False):
        for tile, _, logits, _ in joint:
            log_probs(logits, joint.nodes[tile[0]:tile[1]], joint.job)
    return _align(joint.job).to(encoder_out.device)


def demonstrate():
    """The known example, then a ragged batch, by every version at hand: costs and gradients side by side."""
    known = torch.full((1, 2, 3, 5), 0.1, dtype=torch.float64)
    for value, *place in ((.6, 0, 0, 1), (.6, 0, 1, 2), (.8, 0, 2, 3), (.2, 0, 2, 2), (.6, 1, 0, 1), (.2, 1, 1, 2),
                          (.7, 1, 2, 0), (.2, 1, 2, 2)):
        known[0][tuple(place)] = value
    lengths = torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([2])
    print(f"known example      4.495666773771\n"
          f"reference          {rnnt_loss_reference(known, *lengths, blank=0).item():.12f}\n"
          f"CPU                {rnnt_loss(known, *lengths, blank=0).item():.12f}")
    torch.manual_seed(0)
    joint = [torch.randn(shape) for shape in ((3, 9, 16), (3, 5, 16), (20, 16), (20,))]
    logits = torch.tanh(joint[0][:, :, None] + joint[1][:, None]) @ joint[2].T + joint[3]
    rest = torch.randint(1, 20, (3, 4)), torch.tensor([9, 4, 1]), torch.tensor([3, 4, 0])
    by_ours = partial(rnnt_loss, blank=0, reduction="none")
    rows = {"reference": (partial(rnnt_loss_reference, blank=0), logits.double()),
            "CPU, float64": (by_ours, logits.double()), "CPU, float32": (by_ours, logits)}
    if torch.cuda.is_available():
        rows["CUDA, float32"] = by_ours, logits.cuda()
    right = None
    for name, (loss, x) in rows.items():
        costs = loss(x.requires_grad_(), *rest)
        grad = torch.autograd.grad(costs.sum(), x)[0].cpu()
        right = grad if right is None else right
        print(f"{name:18s} costs {' '.join(f'{c:.6f}' for c in costs.tolist())}, gradient differs by at most "
              f"{(grad - right).abs().max():.0e}")
    costs = joint_rnnt_loss(*joint, *rest, blank=0, reduction="none")
    print(f"{'fused with joint':18s} costs {' '.join(f'{c:.6f}' for c in costs.tolist())}")
    print("best path          labels at frames", rnnt_align(logits, *rest, blank=0).tolist())


if __name__ == "__main__":
    demonstrate()
