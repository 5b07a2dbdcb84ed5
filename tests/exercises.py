"""Six exercises, from the recursion of the loss to the latency of a word, that check themselves.

    python tests/exercises.py             the list, and where to read
    python tests/exercises.py 3           the text of one
    python tests/exercises.py 3 my.py     check the function that my.py defines

An answer is plain Python and numpy. It is compared with the project's own code on many small
inputs; an answer that is wrong in one of the usual ways is told in which.
"""
import copy
import importlib.util
import inspect
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from oneline import told

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Exercise:
    title: str
    text: str           # what to write, why, where to read, a number to expect
    signature: str      # of the function that my.py must define
    right: object       # the project's answer
    inputs: object      # () -> a list of tuples of arguments
    mistakes: dict      # what one is told: a function that is wrong in this way

    @property
    def name(self):
        return self.signature.split("(")[0]


# ---- 1, 2: the lattice ---------------------------------------------------------------------------

def random_lattices():
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 3), (4, 1), (2, 3), (5, 4), (7, 3)]
    return [tuple(np.log(rng.uniform(0.05, 0.9, (2, *shape)))) for shape in shapes]


def arcs_of(blank, label):
    """As rnnt_loss.py has them: the last row writes no label."""
    arcs = np.stack([blank, label], -1)
    arcs[:, -1, 1] = -np.inf
    return arcs


def forward_right(blank, label):
    from rnnt_loss import plain_lattice
    return -plain_lattice(arcs_of(blank, label))[0]


def forward_with(join, blank, label, last_blank=True, stay=True):
    """The recursion with what may be wrong in it as options."""
    T, U1 = blank.shape
    alpha = np.full((T, U1), -np.inf)
    alpha[0, 0] = 0
    for t in range(T):
        for u in range(U1):
            ways = [alpha[t, u]]
            if t:
                ways.append(alpha[t - 1, u] + blank[t - 1, u])
            if u and stay:
                ways.append(alpha[t, u - 1] + label[t, u - 1])
            if u and t and not stay:
                ways.append(alpha[t - 1, u - 1] + label[t - 1, u - 1])
            alpha[t, u] = join(ways)
    return -(alpha[-1, -1] + (blank[-1, -1] if last_blank else 0))


def posteriors_right(blank, label):
    from rnnt_loss import plain_lattice
    return plain_lattice(arcs_of(blank, label))[1]


def shares_alone(blank, label):
    """The forward half: shares that were never multiplied down the paths."""
    arcs = arcs_of(blank, label)
    T, U1, _ = arcs.shape
    alpha, shares = np.zeros((T, U1)), np.zeros_like(arcs)
    for t in range(T):
        for u in range(U1):
            if t or u:
                by_blank = alpha[t - 1, u] + arcs[t - 1, u, 0] if t else -np.inf
                by_label = alpha[t, u - 1] + arcs[t, u - 1, 1] if u else -np.inf
                alpha[t, u] = np.logaddexp(by_blank, by_label)
                if t:
                    shares[t - 1, u, 0] = math.exp(by_blank - alpha[t, u])
                if u:
                    shares[t, u - 1, 1] = math.exp(by_label - alpha[t, u])
    shares[-1, -1, 0] = 1
    return shares


def without_the_last_blank(blank, label):
    posteriors = posteriors_right(blank, label).copy()
    posteriors[-1, -1, 0] = 0
    return posteriors


# ---- 3: INTER ALIGN ------------------------------------------------------------------------------

def sentences():
    rng = np.random.default_rng(0)
    found = [("ieri ho comprato una macchina rossa".split(),
              "yesterday I bought a red car".split(),
              [(0, 0), (2, 1), (1, 2), (2, 2), (3, 3), (5, 4), (4, 5)])]
    for _ in range(30):
        n, m = rng.integers(0, 7, 2)
        links = [(i, j) for i in range(n) for j in range(m) if rng.random() < 0.25]
        # Words come again, as "the" does.
        found.append(([f"s{i % 3}" for i in range(n)], [f"t{j % 3}" for j in range(m)], links))
    return found


def align_right(source, target, links):
    from serialize import interleave_align
    found = interleave_align(source, {"en": target}, {"en": links})
    return [("asr" if tag == "<asr>" else "st", word) for tag, word in found]


def align_with_first_links(source, target, links):
    from serialize import needs
    first = {j: min(i for i, k in links if k == j) for _, j in links}
    return in_order(source, target, needs(len(source), target, [(i, j) for j, i in first.items()]))


def in_order(source, target, need):
    out, j = [], 0
    for i, word in enumerate(source):
        out.append(("asr", word))
        while j < len(target) and need[j] <= i:
            out.append(("st", target[j]))
            j += 1
    return out + [("st", word) for word in target[j:]]


def align_out_of_order(source, target, links):
    """Each target word as soon as its own links allow."""
    out, own = [], [max((i for i, k in links if k == j), default=0) for j in range(len(target))]
    for i, word in enumerate(source):
        out.append(("asr", word))
        out += [("st", word) for word, need in zip(target, own) if need == i]
    return out if source else [("st", word) for word in target]


def align_early(source, target, links):
    """Each target word before the source word that it needs."""
    from serialize import needs
    need, out, j = needs(len(source), target, links), [], 0
    for i, word in enumerate(source):
        while j < len(target) and need[j] <= i:
            out.append(("st", target[j]))
            j += 1
        out.append(("asr", word))
    return out + [("st", word) for word in target[j:]]


# ---- 4: the chunk mask ---------------------------------------------------------------------------

def mask_right(n, chunk, left):
    """What the encoder's own attention bias leaves open."""
    import torch
    from dataclasses import replace
    from model import MASKED, PRESETS, Transducer
    config = replace(PRESETS["tiny"], layers=1, dim=8, heads=1, ff=8, vocab=4, ctc_vocab=2)
    with torch.no_grad():
        bias = Transducer(config).encoder.stack.bias(n, 0, chunk, left)[0]
    return (bias > MASKED / 2).numpy()


def mask_with(n, seen):
    query, key = np.arange(n)[:, None], np.arange(n)
    return np.broadcast_to(seen(query, key), (n, n))


# ---- 5: greedy search ----------------------------------------------------------------------------

class Toy:
    """A transducer small enough to look at: `logits(t, labels)` at frame t after these labels. It
    counts every label that it is given, a blank too."""
    MOST = 1000

    def __init__(self, seed, T, V=5):
        self.seed, self.asked, rng = seed, 0, np.random.default_rng(seed)
        self.frames = rng.normal(size=(T, V)) * 2
        self.table = rng.normal(size=(V, V)) * 2
        self.blank, self.T = 0, T

    def logits(self, t, labels):
        self.asked += 1
        if len(labels) > self.MOST or self.asked > 100 * self.MOST:
            raise ValueError(f"over {self.MOST} labels, or questions without end: at most `limit` "
                             "are written at a frame, and at a blank the next one's turn comes")
        history = sum(self.table[label] / (1 + k) for k, label in enumerate(reversed(labels)))
        return self.frames[t] + history + 1.2 * (np.arange(len(self.frames[t])) == self.blank)

    def __repr__(self):
        return f"Toy({self.seed}, {self.T})"


def greedy_right(toy, limit):
    labels = []
    for t in range(toy.T):
        for _ in range(limit):
            k = int(np.argmax(toy.logits(t, labels)))
            if k == toy.blank:
                break
            labels.append(k)
    return labels


def feeds_blanks(toy, limit):
    fed, labels = [], []
    for t in range(toy.T):
        for _ in range(limit):
            k = int(np.argmax(toy.logits(t, fed)))
            fed.append(k)
            if k == toy.blank:
                break
            labels.append(k)
    return labels


def moves_on_labels(toy, limit):
    labels = []
    for t in range(toy.T):
        k = int(np.argmax(toy.logits(t, labels)))
        if k != toy.blank:
            labels.append(k)
    return labels


def collapses_repeats(toy, limit):
    labels = greedy_right(toy, limit)
    return [k for k, before in zip(labels, [None, *labels]) if k != before]


# ---- 6: LAAL -------------------------------------------------------------------------------------

def laal_right(delays, source_ms, n_reference):
    from stream import latency
    return latency(delays, source_ms, n_reference)[1]


def laal_with(delays, source_ms, n, first=0, whole=False):
    tau = next((i + 1 for i, d in enumerate(delays) if d >= source_ms), len(delays))
    tau = len(delays) if whole else tau
    ideal = (np.arange(tau) + first) * source_ms / n
    return float(np.mean(np.array(delays[:tau]) - ideal))


def timed_outputs():
    return [([1000, 2000, 3000], 3000, 3), ([640, 640, 1920, 3200, 3200], 3200, 4),
            ([500, 900, 1500], 4000, 6), ([2000, 2000, 2000, 2000], 2000, 2),
            ([640, 1280, 1280, 1920, 1920, 1920], 2500, 5)]


# ---- The list ------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        "the forward recursion", """
        -log P(labels | frames) of a transducer. blank and label (T,U1) hold the log-probability of
        the two arcs of every node; label[:, -1] means nothing, as there is no label left to write.
        Why: all of training is this number. Where: the top of rnnt_loss.py, rnnt_loss_reference.
        Expect 1.386294 for blank = label = log(1/2) with T = 2 and U1 = 1: two blanks.""",
        "forward(blank, label)", forward_right, random_lattices, {
            "that is the likeliest path alone: add up the paths with log-sum-exp, not max":
                lambda b, l: forward_with(max, b, l),
            "the last blank, which leaves the lattice at (T-1, U), is missing":
                lambda b, l: forward_with(np.logaddexp.reduce, b, l, last_blank=False),
            "a label stays at its frame, (t,u) to (t,u+1); yours moves to the next frame, as CTC's":
                lambda b, l: forward_with(np.logaddexp.reduce, b, l, stay=False)}),
    Exercise(
        "the gradient by shares", """
        The posteriors (T,U1,2) of all arcs: of the probability of all paths, the part that goes
        over the arc; [..., 0] is the blank, [..., 1] the label. -posterior is the gradient of the
        cost. Why: this needs no beta, no second exp, and nothing cancels in long audio. Where:
        plain_lattice in rnnt_loss.py. Expect 1 at [-1, -1, 0]: every path takes the last blank.""",
        "posteriors(blank, label)", posteriors_right, random_lattices, {
            "these are the shares; going backward, multiply each by the posterior of the node it "
            "leads to": shares_alone,
            "every path leaves by the last blank: its posterior is 1": without_the_last_blank,
            "that is the gradient of the cost, the negative of the posteriors":
                lambda b, l: -posteriors_right(b, l)}),
    Exercise(
        "INTER ALIGN", """
        One stream out of two texts: [("asr", word) or ("st", word), ...]. After source word i comes
        every target word whose links, and those of all target words before it, end at i or before;
        a target word with no link waits for those before it only, so that one before all links is
        written with source word 0; with no source word, all target words. A word may come again.
        links are (source, target) pairs. Why: each
        translated word is written when it has been heard enough, and no later. Where:
        interleave_align in serialize.py, arXiv 2307.03354. Expect, for ieri ho comprato una
        macchina rossa: ieri / yesterday / ho comprato / I bought / una / a / macchina rossa / red
        car.""",
        "inter_align(source, target, links)", align_right, sentences, {
            "the order of target words is kept: a word waits for the needs of all words before it, "
            "a running maximum": align_out_of_order,
            "a word with two links needs the later of its source words, not the first":
                align_with_first_links,
            "the target words are written before the source word that they need, not after it":
                align_early}),
    Exercise(
        "the chunk mask", """
        A bool (n,n): may frame i see frame j? Frames come in chunks of `chunk`; a frame sees all of
        its own chunk and of the `left` chunks before. Why: with this mask, one pass over the whole
        recording computes what streaming computes chunk by chunk. Where: Stack.bias in model.py.
        Expect for mask(4, 2, 0): two blocks of two by two.""",
        "mask(n, chunk, left)", mask_right,
        lambda: [(4, 2, 0), (6, 2, 1), (7, 3, 1), (9, 1, 4), (8, 4, 0), (10, 3, 2)], {
            "that is a causal mask: inside its chunk a frame sees later frames too":
                lambda n, c, left: mask_with(n, lambda i, j: (j <= i) & (i // c - j // c <= left)),
            "the past has no end in yours: only `left` chunks before its own are seen":
                lambda n, c, left: mask_with(n, lambda i, j: j // c <= i // c),
            "left counts whole chunks, not frames: all frames of a chunk see equally far back":
                lambda n, c, left: mask_with(
                    n, lambda i, j: (j // c <= i // c) & (j >= i - left * c))}),
    Exercise(
        "greedy search", """
        The labels that a transducer writes, best logit by best logit. toy.logits(t, labels) are the
        logits at frame t after these labels; toy.T frames, toy.blank is the blank. A label stays at
        its frame, where at most `limit` are written; a blank goes on. Why: the label encoder knows
        labels; a blank is not one, and a well-known tutorial feeds it all the same. Where: Greedy
        in stream.py. Expect [1, 3, 3, 1] of Toy(0, 5) with a limit of 1, and no blank (0).""",
        "greedy(toy, limit)", greedy_right,
        lambda: [(Toy(seed, T), limit) for seed in range(12) for T in (1, 5, 9)
                 for limit in (1, 3)], {
            "the blank was fed to the label encoder: `labels` must hold labels only": feeds_blanks,
            "a label does not move to the next frame: stay until a blank, or until `limit` labels":
                moves_on_labels,
            "equal neighbours are two labels here; only CTC merges them": collapses_repeats}),
    Exercise(
        "LAAL", """
        Length-adaptive average lagging in ms: the mean over i = 1..tau of d_i - (i - 1) S /
        max(n_hyp, n_ref). d_i, which is delays[i - 1], are the ms of source that word i needed, S
        is source_ms, n_hyp the number of delays, n_ref n_reference, and tau the first word that
        needed the whole source (the last one, if none did). Why: it is the number the papers
        report, about 1 s. Where: latency in stream.py, arXiv 2206.05807. Expect
        1000 for delays 1000, 2000, 3000 of 3000 ms and three words.""",
        "laal(delays, source_ms, n_reference)", laal_right, timed_outputs, {
            "that is AL: LAAL divides by the longer of hypothesis and reference":
                lambda d, s, n: laal_with(d, s, n),
            "the mean ends with the first word that needed the whole source":
                lambda d, s, n: laal_with(d, s, max(len(d), n), whole=True),
            "the first word's ideal delay is 0: count i - 1 words before word i":
                lambda d, s, n: laal_with(d, s, max(len(d), n), first=1)}),
]


# ---- Checking ------------------------------------------------------------------------------------

def same(a, b):
    """Equal, numbers to a millionth."""
    if hasattr(a, "tolist"):           # numpy's, torch's
        a = a.tolist()
    if isinstance(b, (list, tuple)):
        return (isinstance(a, (list, tuple)) and len(a) == len(b)
                and all(same(x, y) for x, y in zip(a, b)))
    if isinstance(b, str):
        return a == b
    try:
        a, b = np.asarray(a, float), np.asarray(b, float)
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-6)


def check(exercise, answer):
    """-> whether the answer is right, and what to tell."""
    inputs = exercise.inputs()
    wanted = [exercise.right(*given) for given in inputs]
    found = []
    for k, given in enumerate(inputs):
        try:
            own = answer(*copy.deepcopy(given))                 # it may change what it gets
            found.append(list(own) if inspect.isgenerator(own) else own)
        except (Exception, SystemExit) as error:
            return False, f"{shown(exercise, given)} raised {type(error).__name__}: {error}"
    wrong = [k for k in range(len(inputs)) if not same(found[k], wanted[k])]
    if not wrong:
        return True, f"right on all {len(inputs)} inputs"
    for hint, mistake in exercise.mistakes.items():
        if all(same(found[k], mistake(*given)) for k, given in enumerate(inputs)):
            return False, hint
    k = wrong[0]
    if found[k] is None:
        return False, f"{exercise.name} returned None: is a return missing?"
    return False, (f"{len(wrong)} of {len(inputs)} inputs are wrong, the first: "
                   f"{shown(exercise, inputs[k])}\nis not\n{brief(found[k])}\nbut\n"
                   f"{brief(wanted[k])}")


def shown(exercise, given):
    return f"{exercise.name}({', '.join(brief(value) for value in given)})"


def brief(value):
    if isinstance(value, np.ndarray):
        value = np.array2string(value, precision=4, separator=", ")
    text = str(value)
    return text if len(text) < 600 else text[:600] + " ..."


def load_answer(path, name):
    """The function of this name that the file defines."""
    if not Path(path).is_file():
        raise SystemExit(f"exercises.py: {path}: no such file")
    if not path.endswith(".py"):
        raise SystemExit(f"exercises.py: {path}: a file of Python ends in .py")
    spec = importlib.util.spec_from_file_location("answer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["answer"] = module                     # where dataclasses look for it
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:           # of theirs: a slip, or a sys.exit at the end
        raise SystemExit(f"exercises.py: {path}: {type(error).__name__}: {error}") from None
    answer = getattr(module, name, None)
    if not callable(answer):
        raise SystemExit(f"exercises.py: {path} defines no function {name}")
    return answer


def main(argv):
    numbers = {str(k): exercise for k, exercise in enumerate(EXERCISES, 1)}
    if not argv:
        print(__doc__)
        for number, exercise in numbers.items():
            print(f"  {number}  {exercise.title:24} {exercise.signature}")
        return 0
    if argv[0] not in numbers or len(argv) > 2:
        print(f"exercises.py: there are exercises 1 to {len(numbers)}, not {' '.join(argv)!r}",
              file=sys.stderr)
        return 2
    exercise = numbers[argv[0]]
    if len(argv) == 1:
        print(f"{exercise.title}: define {exercise.signature}\n")
        print(textwrap.fill(" ".join(exercise.text.split()), 88))
        return 0
    right, message = check(exercise, load_answer(argv[1], exercise.name))
    print(f"{'right' if right else 'not yet'}: {message}")
    return 0 if right else 1


if __name__ == "__main__":
    code = 0
    with told("exercises.py"):
        code = main(sys.argv[1:])
    sys.exit(code)
