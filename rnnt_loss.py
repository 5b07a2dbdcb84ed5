"""The RNN-T (transducer) loss: plain, fast on a CPU, fast on a GPU, and fused with the joint network.

A transducer reads T encoder frames and writes U labels. At node (t, u) it has read t frames and written u labels, and
it either writes a blank (go to the next frame) or the next label (stay on the frame):

      u=2   o--o--o--o->      a path climbs from the lower left corner to the upper right one and ends
            |  |  |  |        with a blank there; --> is a blank, | is the label y[u]
      u=1   o--o--o--o        alpha(t,u) = log of the sum over the paths from the start to (t,u)
            |  |  |  |        beta(t,u)  = log of the sum over the paths from (t,u) to the end
      u=0   o--o--o--o
           t=0  1  2  3       cost = -log P(labels | frames) = -beta(0,0)
"""
import functools
import itertools
import math
import warnings
from collections import namedtuple

import numba
import numpy as np
import torch
from numba import cuda, njit, prange
from numba.extending import overload

SLAB_BYTES = 4 << 20      # half-precision logits are cast to float32 this much at a time
TILE_BYTES = 48 << 20     # the fused joint holds at most about this much of the logits


def rnnt_loss_reference(logits, targets, logit_lengths, target_lengths, *, blank, fused_log_softmax=True,
                        delay_penalty=0.0):
    """Costs (B,) in float64, by the definition and one utterance at a time; autograd gives the gradient."""
    costs = []
    for b in range(len(logits)):
        T, U = int(logit_lengths[b]), int(target_lengths[b])
        logp = logits[b].double()
        logp = logp.log_softmax(-1) if fused_log_softmax else logp
        alpha = {}
        for t in range(T):
            for u in range(U + 1):
                arcs = []
                if t > 0:
                    arcs.append(alpha[t - 1, u] + logp[t - 1, u, blank])
                if u > 0:
                    delay = delay_penalty * ((T - 1) / 2 - t)
                    arcs.append(alpha[t, u - 1] + logp[t, u - 1, int(targets[b, u - 1])] + delay)
                alpha[t, u] = torch.stack(arcs).logsumexp(0) if arcs else logp.new_zeros(())
        costs.append(-(alpha[T - 1, U] + logp[T - 1, U, blank]))
    return torch.stack(costs)


# A batch in the form the kernels take. Planes hold one number per node, in float64: the log-normaliser of the logits and
# the log-probabilities of the two arcs, which the lattice replaces by the arcs' posteriors.
Job = namedtuple("Job", "labels frames counts lse blank label costs blank_id fused fastemit delay clamp")


# ---------------------------------------------------------------------------------------------------------------- CPU
# 2^f = 1 + f q(f) on [-1/2, 1/2]: q is interpolated, so that 2^0 is exactly 1; 1e-7 relative.
_Q = np.polynomial.chebyshev.Chebyshev.interpolate(lambda f: np.expm1(f * math.log(2)) / f, 4, [-0.5, 0.5 + 1e-9])
_Q = tuple(np.float32(c) for c in _Q.convert(kind=np.polynomial.Polynomial).coef)
_LOG2E = np.float32(1 / math.log(2))
_ROUND = np.float32(1.5 * 2 ** 23)     # adding it leaves the nearest integer in the low bits of a float32
_FLOOR = np.float32(-127)              # 2^-127 comes out as exactly 0: its exponent bits are 0


@njit(fastmath={"contract"}, cache=True)
def _exp32(x):
    """exp(x) for x <= 88 without a branch or a call, so that LLVM vectorises the loop around it."""
    y = x * _LOG2E
    y = _FLOOR if y < _FLOOR else y                        # NaN stays NaN
    shifted = y + _ROUND
    f = y - (shifted - _ROUND)                             # x log2(e) = n + f, |f| <= 1/2
    p = np.float32(1) + f * (_Q[0] + f * (_Q[1] + f * (_Q[2] + f * (_Q[3] + f * _Q[4]))))
    bits = np.int32(np.float32(shifted).view(np.int32) << 23) + np.float32(p).view(np.int32)
    return np.int32(bits).view(np.float32)


@njit(cache=True)
def _max32(row):
    """The largest float32 of a row, compared as integers: a loop over floats would not vectorise."""
    bits = row.view(np.int32)
    top = np.int32(-2 ** 31)
    for k in range(bits.shape[0]):
        v = bits[k]
        v = np.int32(v ^ (np.int32(v >> 31) & np.int32(0x7fffffff)))     # negative floats sort backwards
        top = max(top, v)
    return np.int32(top ^ (np.int32(top >> 31) & np.int32(0x7fffffff))).view(np.float32)


def _exp(x):
    raise NotImplementedError("only inside a kernel")


@overload(_exp)
def _exp_overload(x):
    return (lambda x: _exp32(x)) if x == numba.float32 else (lambda x: math.exp(x))


def _max(row):
    raise NotImplementedError("only inside a kernel")


@overload(_max)
def _max_overload(row):
    return (lambda row: _max32(row)) if row.dtype == numba.float32 else (lambda row: row.max())


@njit(fastmath={"reassoc", "contract", "nsz"}, cache=True)
def _sum_exp(row, top):
    total = row.dtype.type(0)
    for k in range(row.shape[0]):
        total += _exp(row[k] - top)
    return total


@njit(fastmath={"contract"}, cache=True)
def _scaled_softmax(row, lse, factor, out):
    for k in range(row.shape[0]):
        out[k] = factor * _exp(row[k] - lse)


@njit(cache=True)
def _node(i, nodes, T, U1):
    """Row i of the logits at hand belongs to node (b, t, u)."""
    n = nodes[i] if nodes.shape[0] else i
    return n // (T * U1), n // U1 % T, n % U1


@njit(cache=True)
def _log_probs_row(row, i, nodes, job):
    T, U1 = job.lse.shape[1:]
    b, t, u = _node(i, nodes, T, U1)
    if t < job.frames[b] and u <= job.counts[b]:
        lse = 0.0
        if job.fused:
            top = _max(row)
            lse = top + math.log(_sum_exp(row, top))
        job.lse[b, t, u] = lse
        job.blank[b, t, u] = row[job.blank_id] - lse
        if u < job.counts[b]:
            job.label[b, t, u] = row[job.labels[b, u]] - lse + job.delay * ((job.frames[b] - 1) / 2 - t)


@njit(cache=True)
def _join(a, b):
    """log(e^a + e^b) and the shares of the two in the sum."""
    if a == -math.inf and b == -math.inf:
        return a, 0.0, 0.0
    e = math.exp(-abs(a - b))
    large = 1 / (1 + e)
    if a >= b:
        return a + math.log1p(e), large, e * large
    return b + math.log1p(e), e * large, large


@njit(cache=True)
def _lattice_of(blank, label, T, U, want):
    """The cost of one utterance. The arcs' log-probabilities (T,U1) become, in place, their posteriors.

    Forward, alpha(t,u) joins what comes over the blank from (t-1,u) and over the label from (t,u-1); on each of the two
    arcs we leave the share that came over it. Backward, the probability gamma of passing through a node, 1 at the end,
    is dealt out over the two arcs that enter it by those shares: no beta, no exp, and nothing to cancel in long audio.
    """
    alpha = np.empty(U + 1)                                # of the current frame up to u, of the one before beyond
    for t in range(T):
        for u in range(U + 1):
            on = alpha[u] + blank[t - 1, u] if t else 0.0 if u == 0 else -math.inf
            up = alpha[u - 1] + label[t, u - 1] if u else -math.inf
            alpha[u], share_on, share_up = _join(on, up)
            if t:
                blank[t - 1, u] = share_on
            if u:
                label[t, u - 1] = share_up
    logp = alpha[U] + blank[T - 1, U]
    if want:
        blank[T - 1] = 0                                   # no way out of the last frame but from the last label
        label[:, U] = 0
        blank[T - 1, U] = 0.0 if logp == -math.inf else math.exp(logp - logp)
        for t in range(T - 1, -1, -1):
            for u in range(U, -1, -1):
                gamma = blank[t, u] + label[t, u]
                if t:
                    blank[t - 1, u] *= gamma
                if u:
                    label[t, u - 1] *= gamma
    return -logp


@njit(cache=True)
def _lattice_row(b, job, want):
    U = job.counts[b]
    job.costs[b] = _lattice_of(job.blank[b, :, :U + 1], job.label[b, :, :U + 1], job.frames[b], U, want)


@njit(cache=True)
def _gradient_row(row, i, nodes, job, scale, grad):
    T, U1 = job.lse.shape[1:]
    b, t, u = _node(i, nodes, T, U1)
    on, up = 0.0, 0.0
    if t < job.frames[b] and u <= job.counts[b]:
        on, up = job.blank[b, t, u], job.label[b, t, u] * (1 + job.fastemit)
    if (on == 0 and up == 0) or not job.fused:
        grad[:] = 0
    if on == 0 and up == 0:
        return
    s = 1.0 if job.clamp > 0 else scale[b]
    if job.fused:
        _scaled_softmax(row, row.dtype.type(job.lse[b, t, u]), row.dtype.type(s * (on + up)), grad)
    grad[job.blank_id] -= s * on
    if up != 0:
        grad[job.labels[b, u]] -= s * up
    if job.clamp > 0:
        for k in range(grad.shape[0]):
            grad[k] = min(max(grad[k], -job.clamp), job.clamp) * scale[b]


# The parallel loops call a function per row: numba would drop a store into a tuple's array from the loop itself.
@njit(parallel=True, nogil=True, cache=True)
def _cpu_log_probs(x, first, nodes, job):
    for i in prange(x.shape[0]):
        _log_probs_row(x[i], first + i, nodes, job)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_lattice(job, want):
    for b in prange(job.costs.shape[0]):
        _lattice_row(b, job, want)


@njit(parallel=True, nogil=True, cache=True)
def _cpu_gradient(x, first, nodes, job, scale, out):
    for i in prange(x.shape[0]):
        _gradient_row(x[i], first + i, nodes, job, scale, out[i])


class _Cpu:
    """The three steps over numpy views of torch's memory."""
    @staticmethod
    def run(kernel, *args):
        numba.set_num_threads(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))
        kernel(*(Job(*map(_numpy, a)) if isinstance(a, Job) else _numpy(a) for a in args))

    @classmethod
    def log_probs(cls, x, first, nodes, job):              # x (n,V): rows first, first+1, ... of nodes
        for i, j in _slabs(x):
            cls.run(_cpu_log_probs, _wide(x[i:j]), first + i, nodes, job)

    @classmethod
    def lattice(cls, job, want):
        cls.run(_cpu_lattice, job, want)

    @classmethod
    def gradient(cls, x, first, nodes, job, scale, out):
        for i, j in _slabs(x):
            wide = _wide(x[i:j])
            part = out[i:j] if wide.dtype == out.dtype else torch.empty_like(wide)
            cls.run(_cpu_gradient, wide, first + i, nodes, job, scale, part)
            if part.dtype != out.dtype:
                out[i:j] = part


def _numpy(a):
    return a.detach().numpy() if isinstance(a, torch.Tensor) else a


def _wide(x):
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _slabs(x):
    step = len(x) if x.dtype in (torch.float32, torch.float64) else max(1, SLAB_BYTES // (4 * x.shape[1]))
    return [(i, min(i + step, len(x))) for i in range(0, len(x), max(1, step))]


def _empty(shape, dtype):
    """Fresh CPU memory by way of numpy, which asks the system for huge pages: torch's costs more than the arithmetic."""
    return torch.from_numpy(np.empty(shape, {torch.float32: np.float32, torch.float64: np.float64}[dtype])) \
        if dtype in (torch.float32, torch.float64) else torch.empty(shape, dtype=dtype)


# --------------------------------------------------------------------------------------------------------------- CUDA
# The same three steps. 32 lanes share a row of logits, so that they read neighbours; a block holds ROWS rows. numba has
# no bfloat16: such logits come as int16, their bits, and `brain` is true.
ROWS = 8
_LOWEST = np.float32(-3e38)                                # where a running maximum starts: -inf - -inf would be NaN


@cuda.jit(device=True)
def _real(v, brain):
    return np.int32(np.int32(v) << 16).view(np.float32) if brain else np.float32(v)


@cuda.jit(device=True)
def _brain(v):
    """The bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""
    bits = np.int64(np.float32(v).view(np.int32))
    if v != v:
        return np.int16(0x7fc0)
    return np.int16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)


@cuda.jit(device=True)
def _gpu_node(i, nodes, job):
    T, U1 = job.lse.shape[1], job.lse.shape[2]
    n = nodes[i] if nodes.shape[0] else i
    b, t, u = n // (T * U1), n // U1 % T, n % U1
    return b, t, u, t < job.frames[b] and u <= job.counts[b]


@cuda.jit
def _gpu_log_probs(x, first, nodes, job, brain):
    """One pass: every lane keeps the maximum so far and the sum of exp(x - maximum), and the 32 pairs are merged."""
    lane, r = cuda.threadIdx.x, cuda.threadIdx.y
    i, V = np.int64(cuda.blockIdx.x) * ROWS + r, x.shape[1]
    tops = cuda.shared.array((ROWS, 32), np.float32)       # the simulator tells shared arrays apart by their line
    sums = cuda.shared.array((ROWS, 32), np.float32)
    b, t, u, inside = _gpu_node(first + min(i, x.shape[0] - 1), nodes, job)
    inside = inside and i < x.shape[0]
    top, total = _LOWEST, np.float32(0)
    if inside and job.fused:
        for k in range(lane, V, 128):                      # four loads in flight, one rescaling for the four
            v0 = _real(x[i, k], brain)
            v1 = _real(x[i, k + 32], brain) if k + 32 < V else _LOWEST
            v2 = _real(x[i, k + 64], brain) if k + 64 < V else _LOWEST
            v3 = _real(x[i, k + 96], brain) if k + 96 < V else _LOWEST
            new = max(max(max(v0, v1), max(v2, v3)), top)
            total = total * math.exp(top - new) + math.exp(v0 - new) + math.exp(v1 - new)
            total += math.exp(v2 - new) + math.exp(v3 - new)
            top = new
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
def _gpu_gradient(x, first, nodes, job, scale, out, brain):
    lane, i, V = cuda.threadIdx.x, np.int64(cuda.blockIdx.x) * ROWS + cuda.threadIdx.y, x.shape[1]
    if i < x.shape[0]:
        b, t, u, inside = _gpu_node(first + i, nodes, job)
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


@cuda.jit(device=True)
def _gpu_join(a, b):
    """_join with float64 sums and float32 corrections: log1p(e) <= ln 2, so that its error does not grow with audio."""
    if a == -math.inf and b == -math.inf:
        return a, np.float32(0), np.float32(0)
    e = math.exp(np.float32(-abs(a - b)))
    large = np.float32(1) / (np.float32(1) + e)
    rest = np.float64(math.log1p(e))
    if a >= b:
        return a + rest, large, e * large
    return b + rest, e * large, large


@cuda.jit
def _gpu_lattice(job, edge, want):
    """_lattice_of by antidiagonals, one block an utterance, one thread a label: at step d thread i is at frame d - i.

    A thread keeps what came over the blank; what came over the label it takes from its neighbour by way of `turn`, two
    slots deep, so that one barrier a step is enough. What the next step needs from memory is fetched a step ahead. More
    labels than threads are done strip by strip, `edge` (B,T) carrying alpha from one strip to the next.
    """
    b, i, wide = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    T, U = job.frames[b], job.counts[b]
    blank, label = job.blank[b], job.label[b]
    turn = cuda.shared.array((2, 1024), np.float64)
    if T < 1:                                              # lengths out of range, unseen by the host
        if i == 0:
            job.costs[b] = math.nan
        return
    strips = U // wide + 1
    for strip in range(strips):
        u, many = strip * wide + i, min(wide, U + 1 - strip * wide)
        alpha, next_on, next_up = -math.inf, np.float32(0), np.float32(0)
        for d in range(-1, T + many - 1):
            t, here_on, here_up = d - i, next_on, next_up
            if -1 <= t < T - 1 and u <= U:
                next_on = blank[t, u] if t >= 0 else np.float32(0)
                next_up = label[t + 1, u - 1] if u > 0 else np.float32(0)
            if 0 <= t < T and u <= U:
                on = alpha + here_on if t > 0 else (0.0 if u == 0 else -math.inf)
                up = -math.inf
                if u > 0:
                    up = here_up + (turn[(d + 1) % 2, i - 1] if i > 0 else edge[b, t])
                alpha, share_on, share_up = _gpu_join(on, up)
                turn[d % 2, i] = alpha
                if t > 0:
                    blank[t - 1, u] = share_on
                if u > 0:
                    label[t, u - 1] = share_up
                if i == wide - 1:
                    edge[b, t] = alpha
                if t == T - 1:
                    logp = alpha + blank[t, u]
                    if u == U:
                        job.costs[b] = -logp
                    blank[t, u] = 0.0 if u < U or logp == -math.inf else math.exp(logp - logp)
            cuda.syncthreads()
    for strip in range(strips - 1 if want else -1, -1, -1):
        u, many = strip * wide + i, min(wide, U + 1 - strip * wide)
        on, next_on, next_up = np.float32(0), np.float32(0), np.float32(0)
        for d in range(-1, T + many - 1):
            t, share_on, share_up = T - 1 - (d - (many - 1 - i)), next_on, next_up
            if 0 < t <= T and u <= U:
                next_on = blank[t - 2, u] if t > 1 else np.float32(0)
                next_up = label[t - 1, u - 1] if u > 0 else np.float32(0)
            if 0 <= t < T and u <= U:
                if t == T - 1:
                    on = blank[t, u]
                up = np.float32(0)
                if u < U:
                    up = np.float32(turn[(d + 1) % 2, i + 1]) if i < wide - 1 else label[t, u]
                gamma = on + up
                on = share_on * gamma
                if t > 0:
                    blank[t - 1, u] = on
                if u > 0:
                    label[t, u - 1] = share_up * gamma
                    turn[d % 2, i] = share_up * gamma
            cuda.syncthreads()


class _Cuda:
    """The kernels on torch's memory, stream and device. Under numba's simulator the same code runs on CPU tensors."""
    threads = 1024                                         # of a block of the lattice, at most

    @staticmethod
    def array(a):
        if not isinstance(a, torch.Tensor):
            return a
        a = a.detach().view(torch.int16) if a.dtype == torch.bfloat16 else a.detach()
        return cuda.as_cuda_array(a, sync=False) if a.is_cuda else a.numpy()

    @classmethod
    def run(cls, kernel, grid, block, like, *args):
        args = [Job(*map(cls.array, a)) if isinstance(a, Job) else cls.array(a) for a in args]
        if not like.is_cuda:
            kernel[grid, block](*args)
        elif grid:
            with torch.cuda.device(like.device):
                kernel[grid, block, cuda.external_stream(torch.cuda.current_stream().cuda_stream)](*args)

    @classmethod
    def log_probs(cls, x, first, nodes, job):
        cls.run(_gpu_log_probs, -(-len(x) // ROWS), (32, ROWS), x, x, first, nodes, job, x.dtype == torch.bfloat16)

    @classmethod
    def lattice(cls, job, want):
        edge, width = torch.empty(job.lse.shape[:2], dtype=torch.float64, device=job.lse.device), job.lse.shape[2]
        cls.run(_gpu_lattice, len(edge), min(cls.threads, -(-width // 32) * 32), edge, job, edge, want)

    @classmethod
    def gradient(cls, x, first, nodes, job, scale, out):
        cls.run(_gpu_gradient, -(-len(x) // ROWS), (32, ROWS), x, x, first, nodes, job, scale, out,
                x.dtype == torch.bfloat16)


class _Torch:
    """The plain fallback for a GPU without numba's compiler: rows by torch, the lattice on the CPU."""
    @staticmethod
    def rows(x, first, nodes, job):
        T, U1 = job.lse.shape[1:]
        for i, j in _slabs(x):
            n = nodes[first + i:first + j] if len(nodes) else torch.arange(first + i, first + j, device=x.device)
            b, u = n // (T * U1), n % U1
            inside = (n // U1 % T < job.frames[b]) & (u <= job.counts[b])
            yield slice(i, j), n, b, n // U1 % T, job.labels[b, u], inside, torch.arange(j - i, device=x.device)

    @classmethod
    def log_probs(cls, x, first, nodes, job):
        for rows, n, b, t, y, _, i in cls.rows(x, first, nodes, job):
            wide = x[rows].to(job.lse.dtype)
            lse = wide.logsumexp(-1) if job.fused else torch.zeros_like(wide[:, 0])
            job.lse.view(-1)[n], job.blank.view(-1)[n] = lse, wide[:, job.blank_id] - lse
            job.label.view(-1)[n] = wide[i, y.clamp(min=0)] - lse + job.delay * ((job.frames[b] - 1) / 2 - t)

    @staticmethod
    def lattice(job, want):
        here = Job(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in job))
        _Cpu.lattice(here, want)
        for a, b in zip(job, here):
            if isinstance(a, torch.Tensor):
                a.copy_(b)

    @classmethod
    def gradient(cls, x, first, nodes, job, scale, out):
        for rows, n, b, _, y, inside, i in cls.rows(x, first, nodes, job):
            on = torch.where(inside, job.blank.view(-1)[n], 0)
            up = torch.where(inside & (y >= 0), job.label.view(-1)[n] * (1 + job.fastemit), 0)
            grad = (x[rows].to(on.dtype) - job.lse.view(-1)[n, None]).exp_().mul_((on + up)[:, None]) * int(job.fused)
            grad.masked_fill_((on + up == 0)[:, None], 0)
            grad[:, job.blank_id] -= on
            grad[i, y.clamp(min=0)] -= up
            grad = grad.clamp_(-job.clamp, job.clamp) if job.clamp > 0 else grad
            out[rows] = grad.mul_(scale.to(grad.dtype)[b, None])


# ------------------------------------------------------------------------------------------------------------ checking
def _make_job(shape, like, targets, logit_lengths, target_lengths, blank, *, fused=True, fastemit=0.0, delay=0.0,
              clamp=-1.0):
    (B, T, U1, V), device = shape, like.device
    blank_id = blank + V if blank < 0 else blank
    if not 0 <= blank_id < V:
        raise ValueError(f"blank is {blank}, but there are {V} logits per node")
    for name, tensor, dims in (("targets", targets, 2), ("logit_lengths", logit_lengths, 1),
                               ("target_lengths", target_lengths, 1)):
        if tensor.dim() != dims or len(tensor) != B:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the batch has {B} utterances")
        if tensor.is_floating_point():
            raise ValueError(f"{name} must hold integers, not {tensor.dtype}")
    _check_lengths("logit_lengths", logit_lengths, 1, T)
    _check_lengths("target_lengths", target_lengths, 0, min(U1 - 1, targets.shape[1]))
    targets, counts = targets.to(device, torch.int64), target_lengths.to(device, torch.int64)
    labels = torch.full((B, U1), -1, dtype=torch.int64, device=device)
    U = min(U1 - 1, targets.shape[1])
    within = torch.arange(U, device=device) < counts[:, None]
    wrong = within & ((targets[:, :U] < 0) | (targets[:, :U] >= V) | (targets[:, :U] == blank_id))
    if device.type == "cpu" and wrong.any():
        b, u = wrong.nonzero()[0].tolist()
        raise ValueError(f"targets[{b}, {u}] is {targets[b, u]}: labels must lie in 0..{V - 1} and differ from blank "
                         f"({blank_id})")
    labels[:, :U] = torch.where(within, targets[:, :U], -1)
    planes = [torch.empty((B, T, U1), dtype=torch.float64, device=device) for _ in range(3)]
    return Job(labels, logit_lengths.to(device, torch.int64), counts, *planes,
               torch.empty(B, dtype=torch.float64, device=device), blank_id, fused, float(fastemit), float(delay),
               float(clamp))


def _check_lengths(name, lengths, low, high):
    if lengths.device.type == "cpu":
        for b, n in enumerate(lengths.tolist()):
            if not low <= n <= high:
                raise ValueError(f"{name}[{b}] is {n}, outside {low}..{high}")


def _check_reduction(reduction):
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, not 'none', 'mean' or 'sum'")
    return reduction


_EVERY = torch.empty(0, dtype=torch.int64)     # no list of nodes: row i is node i


@functools.cache
def _gpu_compiles():
    """Whether numba can compile for the GPU at hand; says so once where it cannot."""
    try:
        probe = cuda.jit(lambda a: None)
        probe[1, 1](np.zeros(1, np.float32))
        return True
    except Exception as error:                             # no driver, no NVVM, a version that does not fit: all the same
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        warnings.warn(f"numba cannot compile for this GPU ({reason}): rnnt_loss runs through torch and the CPU, slowly. "
                      "pip install 'numba-cuda[cu12]' (or [cu13]) helps.", stacklevel=2)
        return False


def _backend(device, dtype):
    if device.type == "cpu" and not numba.config.ENABLE_CUDASIM:
        return _Cpu
    return _Cuda if dtype != torch.float64 and device.type in ("cuda", "cpu") and _gpu_compiles() else _Torch


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, job, want):
        ctx.job, ctx.backend = job, _backend(logits.device, logits.dtype)
        ctx.save_for_backward(logits)
        ctx.backend.log_probs(logits.view(-1, logits.shape[-1]), 0, _EVERY, job)
        ctx.backend.lattice(job, want)
        return job.costs.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_costs):
        logits, V = ctx.saved_tensors[0], ctx.saved_tensors[0].shape[-1]
        grad = _empty(logits.shape, logits.dtype)
        ctx.backend.gradient(logits.view(-1, V), 0, _EVERY, ctx.job, grad_costs.double().contiguous(), grad.view(-1, V))
        return grad, None, None


def rnnt_loss(logits, targets, logit_lengths, target_lengths, blank=-1, clamp=-1, reduction="mean",
              fused_log_softmax=True, *, fastemit_lambda=0.0, delay_penalty=0.0):
    """The cost -log P(targets | logits); arguments as torchaudio.functional.rnnt_loss.

    logits (B,T,U1,V) float, targets (B,U), logit_lengths (B,), target_lengths (B,) integers.
    """
    job = _make_job(logits.shape, logits, targets, logit_lengths, target_lengths, blank,
                    fused=fused_log_softmax, fastemit=fastemit_lambda, delay=delay_penalty, clamp=clamp)
    costs = _Loss.apply(logits.contiguous(), job, torch.is_grad_enabled() and logits.requires_grad)
    if _check_reduction(reduction) == "none":
        return costs
    return costs.sum() / (max(1, len(costs)) if reduction == "mean" else 1)


# ----------------------------------------------------------------------------------------------- fused with the joint
class _Joint:
    """The joint network over tiles of packed nodes: whole utterances where each fits the budget, else just rows."""
    def __init__(self, inputs, job, lengths, tile_bytes):
        kind, self.job = inputs[0].device.type, job
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs[0].dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32       # of costs and sums of gradients
        self.backend = _backend(inputs[0].device, dtype)
        self.encoder_out, self.label_out = (a.detach().reshape(-1, a.shape[-1]) for a in inputs[:2])
        self.weight, self.bias = (a.detach().to(dtype) for a in inputs[2:])
        (V, J), (T, U1) = self.weight.shape, job.lse.shape[1:]
        nodes = [((b * T + np.arange(n))[:, None] * U1 + np.arange(u + 1)).ravel() for b, (n, u) in enumerate(lengths)]
        self.nodes = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *nodes])).to(inputs[0].device)
        self.tiles, self.whole = _tiles([len(n) for n in nodes], tile_bytes // ((2 * V + 4 * J) * self.weight.itemsize))

    def __iter__(self):                                    # -> tile, hidden (n,J), logits and room for more (n,V)
        T, U1 = self.job.lse.shape[1:]
        logits, room = self.weight.new_empty((2, max((j - i for i, j, _ in self.tiles), default=0), len(self.weight)))
        for tile in self.tiles:
            nodes = self.nodes[tile[0]:tile[1]]
            tile = (*tile, nodes // U1, nodes // (T * U1) * U1 + nodes % U1)          # rows of encoder_out, label_out
            hidden = self.encoder_out.index_select(0, tile[3]).add_(self.label_out.index_select(0, tile[4]))
            hidden, n = hidden.tanh_().to(self.weight.dtype), len(nodes)
            yield tile, hidden, torch.addmm(self.bias, hidden, self.weight.T, out=logits[:n]), room[:n]

    def zeros(self):
        inputs = (self.encoder_out, self.label_out, self.weight, self.bias)
        return [torch.zeros(a.shape, dtype=self.wide, device=a.device) for a in inputs]

    def add_gradients(self, grads, scale, tile, hidden, logits, grad):
        first, _, _, encoder_rows, label_rows = tile
        self.backend.gradient(logits, first, self.nodes, self.job, scale, grad)
        if grad.dtype == self.wide:
            grads[2].addmm_(grad.T, hidden)
        else:
            grads[2].add_(grad.T @ hidden)
        grads[3].add_(grad.sum(0, dtype=self.wide))
        d_sum = torch.ops.aten.tanh_backward(grad @ self.weight, hidden).to(self.wide)
        grads[0].index_add_(0, encoder_rows, d_sum)
        grads[1].index_add_(0, label_rows, d_sum)


def _tiles(sizes, rows):
    """Ranges of packed nodes with the utterances they hold, (first, end, utterances), and whether all hold whole ones."""
    ends = list(itertools.accumulate(sizes))
    if max(sizes, default=0) > rows:
        step = max(1, rows)
        return [(i, min(i + step, ends[-1]), None) for i in range(0, ends[-1], step)], False
    tiles = []
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
        ctx.joint, ctx.factor, job, backend = joint, factor, joint.job, joint.backend
        ctx.grads = joint.zeros() if want and factor and joint.whole else None
        scale = torch.full_like(job.costs, factor or 1)
        for tile, hidden, logits, room in joint:
            backend.log_probs(logits, tile[0], joint.nodes, job)
            if ctx.grads:
                backend.lattice(Job(*(a[tile[2]] if isinstance(a, torch.Tensor) else a for a in job)), True)
                joint.add_gradients(ctx.grads, scale, tile, hidden, logits, room)
        if not ctx.grads:
            backend.lattice(job, want)
        return (job.costs.sum() * factor if factor else job.costs).to(joint.wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        inputs, joint = ctx.saved_tensors, ctx.joint       # fetched: an input changed in place since is an error
        if ctx.grads:
            grads = [g * upstream for g in ctx.grads]
        else:
            grads, scale = joint.zeros(), (upstream.double() * (ctx.factor or 1)).expand_as(joint.job.costs).contiguous()
            for tile in joint:
                joint.add_gradients(grads, scale, *tile)
        return (*(g.to(a.dtype).view(a.shape) for g, a in zip(grads, inputs)), None, None, None)


def joint_rnnt_loss(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths, *, blank,
                    reduction="mean", fastemit_lambda=0.0, delay_penalty=0.0, tile_bytes=TILE_BYTES):
    """rnnt_loss(tanh(encoder_out[:, :, None] + label_out[:, None]) @ weight.T + bias, ...) without its logits.

    encoder_out (B,T,J) and label_out (B,U1,J) are already projected; weight (V,J), bias (V,). Under autocast the joint
    is computed in its dtype. Lengths on the CPU cost no synchronisation with a GPU. tile_bytes bounds the memory.
    """
    inputs = (encoder_out, label_out, weight, bias)
    joint = _make_joint(inputs, targets, logit_lengths, target_lengths, blank, tile_bytes,
                        fastemit=fastemit_lambda, delay=delay_penalty)
    factor = {"none": None, "sum": 1.0, "mean": 1 / max(1, len(targets))}[_check_reduction(reduction)]
    want = torch.is_grad_enabled() and any(a.requires_grad for a in inputs)
    with torch.autocast(encoder_out.device.type, enabled=False):
        return _JointLoss.apply(*inputs, joint, factor, want)


def _make_joint(inputs, targets, logit_lengths, target_lengths, blank, tile_bytes, **options):
    encoder_out, label_out, weight, bias = inputs
    if encoder_out.shape[2] != label_out.shape[2] or weight.shape != (len(bias), encoder_out.shape[2]):
        raise ValueError("the joint's widths disagree: encoder_out {}, label_out {}, weight {}, bias {}".format(
            *(tuple(a.shape) for a in inputs)))
    logit_lengths, target_lengths = logit_lengths.cpu(), target_lengths.cpu()
    shape = (*encoder_out.shape[:2], label_out.shape[1], len(weight))
    job = _make_job(shape, encoder_out, targets, logit_lengths, target_lengths, blank, **options)
    return _Joint(inputs, job, list(zip(logit_lengths.tolist(), target_lengths.tolist())), tile_bytes)


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
    blank, label, T, U = (_numpy(a.cpu()) for a in (job.blank, job.label, job.frames, job.counts))
    for b in range(len(frames)):
        _best_path(blank[b], label[b], T[b], U[b], frames[b].numpy())
    return frames.to(job.labels.device)


@torch.no_grad()
def rnnt_align(logits, targets, logit_lengths, target_lengths, *, blank):
    """The frame (B,U) at which the best path emits each label; -1 beyond the target's length."""
    job = _make_job(logits.shape, logits, targets, logit_lengths, target_lengths, blank)
    _backend(logits.device, logits.dtype).log_probs(logits.contiguous().view(-1, logits.shape[-1]), 0, _EVERY, job)
    return _align(job)


@torch.no_grad()
def joint_rnnt_align(encoder_out, label_out, weight, bias, targets, logit_lengths, target_lengths, *, blank):
    """rnnt_align without the logits; arguments as joint_rnnt_loss."""
    joint = _make_joint((encoder_out, label_out, weight, bias), targets, logit_lengths, target_lengths, blank,
                        TILE_BYTES)
    for tile, _, logits, _ in joint:
        joint.backend.log_probs(logits, tile[0], joint.nodes, joint.job)
    return _align(joint.job)
