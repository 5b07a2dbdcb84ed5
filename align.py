"""align.py -- who translates whom, and when was it said: what serialize.py must know to interleave.

    python align.py FILE.pairs > FILE.links     0-0 1-2 ... for each line `a b ||| c d`
    python align.py IN.jsonl -o OUT.jsonl       links for the rows of a manifest that lack them
    python align.py IN.jsonl -o OUT.jsonl --times RUN/model.pt    and the times of its words: of the
                                                best path through a trained transducer (Viterbi),
    python align.py IN.jsonl -o OUT.jsonl --times FILE.ctm        of a forced aligner's output
                                                (the transcription alone),
    python align.py IN.jsonl -o OUT.jsonl --times FOLDER          of Praat TextGrids, as MFA's

The aligner learns from the bitext alone, and in both directions. Forward, every target word j is
emitted by a source word a_j, and a_1 .. a_J is the path of a hidden Markov model (HMM):

    P(target | source) = sum over all paths a of
                         prod_j  jump(a_j - a_{j-1}) * t(target_j | source_{a_j})

or a word is emitted by NULL, no word at all. Backward, the sides are exchanged. (Long jumps share
one weight, each the whole of it: in a long sentence P is a score, its jumps add up to more than 1.)
IBM model 1 is the same without jumps, here with a fixed pull to the diagonal instead; it needs no
good tables to begin with, so it comes first. Expectation maximisation (EM): the E-step finds the
posterior of every link under the present tables, the M-step adds the posteriors up to expected
counts and divides. On a small corpus four things make it strong:

1. agreement: in the HMM's iterations both directions count, of two words, the product of their
   posteriors, so that each teaches the other;
2. a variational M-step, exp(digamma(count)): about half a count less everywhere, which keeps rare
   words from collecting links ("garbage collection");
3. a prior: up to one imagined count for two words spelled alike, which also start up to eleven
   times as likely as others;
4. a second prior, ten counts times the probability of a pair of stems, from a table over these:
   finanziarie learns from finanziario.

Papers: IBM model 1, Brown et al. 1993 (Computational Linguistics 19:2); the HMM, Vogel, Ney,
Tillmann 1996 (COLING); agreement, Liang, Taskar, Klein 2006 (NAACL); the variational M-step, Riley,
Gildea 2012 (ACL); the pull to the diagonal, Dyer, Chahuneau, Smith 2013 (NAACL, fast_align). The
priors of points 3 and 4 are ours. Papi et al. (arXiv 2307.03354, 2310.14806) interleave by such
links and by such times; the aligner they use is awesome-align (arXiv 2101.08231, here `--model`).
"""
import argparse
import importlib
import math
import os
import re
import stat
import sys
import unicodedata
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from numba import config, get_num_threads, njit

try:
    njit(cache=True)(lambda: None)    # numba keeps compiled code beside this file, or under HOME
except RuntimeError as error:
    raise ImportError("numba finds no folder to keep compiled code in: set NUMBA_CACHE_DIR to one "
                      f"that can be written ({error})") from None

NULL = 0.02        # the chance that a word is emitted by no word of the other side
WIDTH = 8          # jumps of this length and longer have one weight, each of them the whole of it
STEM = 4           # letters
CELLS = 250_000    # of 500 words beside 500; a longer pair is aligned in windows of that size
LONGEST_TIMED_S = 300  # of sound whose words' times are found in one piece
SAMPLE_RATE = 16000   # model.py's
BATCH_SAMPLES = 120 * SAMPLE_RATE  # of sound with its padding that go through a model together
# What forced aligners write where nothing is said.
SILENCES = "", "sil", "sp", "<eps>", "<sil>", "<silence>"
METHODS = "posterior", "grow-diag-final-and", "intersection", "union", "forward", "backward"
REORDER = {"reassoc", "contract", "arcp", "nsz"}  # the compiler may add in vector lanes


class InputError(ValueError):
    """What a user gave cannot be used; the message names the file, the line and the value."""


@dataclass(frozen=True)
class Recipe:
    """How to learn and how to link. Counts are numbers of occurrences."""
    ibm1: int = 4              # iterations of IBM model 1, then
    hmm: int = 5               # of the two HMMs
    diagonal: float = 4.0      # in IBM-1: P(i | j) ~ exp(-diagonal * |i/I - j/J|)
    variational: bool = True
    agree: bool = True
    prior: float = 0.1         # imagined counts: of any two words that occur together,
    spelling: float = 1.0      # of two words spelled alike,
    stems: float = 10.0        # times the probability of the pair of their stems,
    null: float = 1.0          # and of any word as emitted by NULL, or it keeps a frequent word
    method: str = "posterior"  # link where the mean of both posteriors exceeds the threshold,
    threshold: float = 0.5     # or see symmetrise


# ---- The bitext as arrays ------------------------------------------------------------------------
# source, target: the word ids of all sentences, one after the other; source_start, target_start
# (S+1,): where each sentence begins. Pair s has I x J cells, (i, j) at cell_start[s] + i*J + j.
# entry (cells,): the row of the translation table that a cell uses; entry_source, entry_target
# (E,): the two words of a row. Only words that occur together have a row: 12 bytes a cell, and
# nowhere the product of two vocabularies.
Bitext = namedtuple("Bitext", "source source_start target target_start "
                              "cell_start entry entry_source entry_target")


def make_bitext(pairs):
    """[(source words, target words)] -> Bitext, (source, target vocabulary), in lower case."""
    arrays, vocabularies = [], []
    for sentences in zip(*pairs):
        ids = {}
        flat = [ids.setdefault(word.lower(), len(ids)) for words in sentences for word in words]
        arrays.append(np.array(flat, np.int32))
        arrays.append(np.cumsum([0] + [len(words) for words in sentences]))
        vocabularies.append(list(ids))
    source, source_start, target, target_start = arrays
    cells = np.diff(source_start) * np.diff(target_start)
    cell_start = np.concatenate([[0], np.cumsum(cells)])
    by_word = np.argsort(source, kind="stable")  # all places of source word 0, then of word 1, ...
    sentence = np.repeat(np.arange(len(pairs)), np.diff(source_start))
    numbers = number_entries(*arrays, cell_start, by_word, sentence, len(vocabularies[1]))
    return Bitext(*arrays, cell_start, *numbers), vocabularies


@njit(cache=True)
def number_entries(source, source_start, target, target_start, cell_start, by_word, sentence, n):
    """Number the word pairs that occur together, source word by source word: no sorting, no hashes.
    n: the number of target words."""
    cells = cell_start[-1]
    entry = np.empty(cells, np.int32)
    entry_source = np.empty(cells, np.int32)
    entry_target = np.empty(cells, np.int32)
    met = np.empty(n, np.int32)     # the source word that a target word met most recently,
    number = np.empty(n, np.int32)  # and the number of that entry
    met[:] = -1
    size = 0
    for place in by_word:
        s, word = sentence[place], source[place]
        J = target_start[s + 1] - target_start[s]
        cell = cell_start[s] + (place - source_start[s]) * J
        for j in range(J):
            other = target[target_start[s] + j]
            if met[other] != word:
                met[other], number[other] = word, size
                entry_source[size], entry_target[size] = word, other
                size += 1
            entry[cell + j] = number[other]
    return entry, entry_source[:size].copy(), entry_target[:size].copy()


# ---- E-step: the posterior of every link ---------------------------------------------------------
# In a sentence, J words are emitted by I words: emission[j, i] = (1 - NULL) t(word j | word i) and
# null[j] = NULL t(word j | NULL). Both models fill posterior (J, I), turn null into the posterior
# of NULL, and return log P. Loops instead of array expressions, and Python's threads instead of
# numba's: so all of it compiles in a fifth of the time.

@njit(cache=True, fastmath=REORDER)
def ibm1_sentence(emission, null, diagonal, posterior):
    """IBM model 1: every word chooses alone, P(i | j) t(word j | word i) / their sum over i."""
    J, I = emission.shape
    near = np.empty(I, np.float32)
    log_likelihood = 0.0
    for j in range(J):
        total_near = 0.0
        for i in range(I):
            near[i] = math.exp(-diagonal * abs((i + 0.5) / I - (j + 0.5) / J))
            total_near += near[i]
        total = null[j]
        for i in range(I):
            posterior[j, i] = near[i] / total_near * emission[j, i]
            total += posterior[j, i]
        for i in range(I):
            posterior[j, i] /= total
        null[j] /= total
        log_likelihood += math.log(total)
    return log_likelihood


@njit(cache=True)
def running_sums(values, below, above):
    """below[k] = the sum of values[:k], above[k] = the sum of values[k:]."""
    n = len(values)
    below[0] = above[n] = 0
    for k in range(n):
        below[k + 1] = below[k] + values[k]
        above[n - 1 - k] = above[n - k] + values[n - 1 - k]


@njit(cache=True, fastmath=REORDER)
def hmm_sentence(emission, null, jump, posterior, jump_counts):
    """Forward-backward (Baum-Welch), in I * J * WIDTH steps. State p is one more than the position
    linked most recently (0: none yet); NULL keeps it. From p to word i is a jump of i + 1 - p:

      posterior[j, i] ~ emission[j, i] * sum_p state[j, p] * jump(i + 1 - p)
      state[j + 1, i + 1] = posterior[j, i] + null[j] * state[j, i + 1],

    each over the sum of all ways (scale), and the same backward with what follows (future). In the
    sums the near jumps, shorter than WIDTH, are a loop over the states that are not all but
    impossible, and the far ones two running sums. jump (2 WIDTH + 1,): at [d] the weight of a jump
    of d - WIDTH; its ends stand for all jumps at least so long. The weights add up to 1, and what
    falls outside the sentence is lost, not redistributed: so what is added to jump_counts makes an
    exact M-step of them."""
    J, I = emission.shape
    near = jump.astype(np.float32)
    down, up = near[0], near[2 * WIDTH]  # the long jumps, which are seen to apart
    near[0] = near[2 * WIDTH] = 0
    shift = WIDTH + 1  # word i lies at i + shift of these two, so at p + d, and no d falls outside
    linked = np.zeros(I + 2 * shift, np.float32)
    ahead = np.zeros(I + 2 * shift, np.float32)
    state = np.zeros((J + 1, I + 1), np.float32)  # P(p after j words | the first j words)
    state[0, 0] = 1
    scale = np.empty(J, np.float32)               # 1 / P(word j | the words before it)
    below, above = np.empty(I + 2, np.float32), np.empty(I + 2, np.float32)
    for j in range(J):
        running_sums(state[j], below, above)
        for i in range(I):
            far_up, far_down = below[max(i + 2 - WIDTH, 0)], above[min(i + 1 + WIDTH, I + 1)]
            linked[i + shift] = up * far_up + down * far_down
        for p in range(I + 1):
            if state[j, p] > 1e-10:  # most states are all but impossible
                for d in range(2 * WIDTH):
                    linked[p + d] += state[j, p] * near[d]
        total = null[j] + np.float32(1e-35)
        for i in range(I):
            posterior[j, i] = linked[i + shift] * emission[j, i]
            total += posterior[j, i]
        scale[j] = 1 / total
        null[j] *= scale[j]
        state[j + 1, 0] = state[j, 0] * null[j]
        for i in range(I):
            posterior[j, i] *= scale[j]
            state[j + 1, i + 1] = state[j, i + 1] * null[j] + posterior[j, i]
    future = np.ones(I + 1, np.float32)  # P(the words after j | p) / P(the words after j)
    moved, log_likelihood = np.zeros(2 * WIDTH + 1, np.float32), 0.0
    for j in range(J - 1, -1, -1):
        for i in range(I):
            posterior[j, i] *= future[i + 1]
            ahead[i + shift] = emission[j, i] * future[i + 1] * scale[j]
        running_sums(ahead[shift:shift + I], below, above)
        stayed = np.float32(0)
        for p in range(I + 1):
            stayed += state[j, p] * future[p]
            far_down, far_up = down * below[max(p - WIDTH, 0)], up * above[min(p - 1 + WIDTH, I)]
            go = far_down + far_up
            for d in range(2 * WIDTH):
                step = near[d] * ahead[p + d]
                go += step
                moved[d] += state[j, p] * step
            moved[0] += state[j, p] * far_down
            moved[2 * WIDTH] += state[j, p] * far_up
            future[p] = go + null[j] * future[p]
        null[j] *= stayed
        log_likelihood -= math.log(scale[j])
    for d in range(2 * WIDTH + 1):
        jump_counts[d] += moved[d]
    return log_likelihood


@njit(cache=True, nogil=True)
def pair_posteriors(begin, end, layout, tables, diagonal, posteriors, results):
    """The pairs begin .. end - 1: their emissions from the tables, then one of the two models (no
    jumps given: IBM-1), and the posteriors into their places."""
    forward, words, start, other_start, cell_start, entry = layout
    table, null_table, jump = tables
    posterior, null_posterior = posteriors
    log_likelihood, jump_counts = results
    for s in range(begin, end):
        J, I = start[s + 1] - start[s], other_start[s + 1] - other_start[s]
        if J == 0 or I == 0:
            continue
        step_j, step_i = (1, J) if forward else (I, 1)  # the cells lie source word by source word
        emission = np.empty((J, I), np.float32)
        found = np.empty((J, I), np.float32)
        null = null_posterior[start[s]:start[s + 1]]
        for j in range(J):
            null[j] = NULL * null_table[words[start[s] + j]]
            for i in range(I):
                cell = cell_start[s] + j * step_j + i * step_i
                emission[j, i] = (1 - NULL) * table[entry[cell]]
        if len(jump):
            log_likelihood[s] = hmm_sentence(emission, null, jump, found, jump_counts[s])
        else:
            log_likelihood[s] = ibm1_sentence(emission, null, diagonal, found)
        for j in range(J):
            for i in range(I):
                posterior[cell_start[s] + j * step_j + i * step_i] = found[j, i]


def in_parallel(function, n, block):
    """function(begin, end) for all blocks of 0 .. n - 1, on as many threads as numba would use. The
    function must let go of Python's lock (nogil) and write to places of its own."""
    with ThreadPoolExecutor(get_num_threads()) as pool:
        blocks = [pool.submit(function, k, min(k + block, n)) for k in range(0, n, block)]
    for done in blocks:
        done.result()  # raises what the function raised


# ---- M-step: expected counts -> tables -----------------------------------------------------------

@njit(cache=True)
def add_up(index, values, total):
    """total[index[k]] += values[k]; by one thread, so that sums are always taken in one order."""
    for k in range(len(index)):
        total[index[k]] += values[k]


def exp_digamma(x):
    """About x - 1/2 for large x, almost 0 for small. digamma's series holds from 6 on, and below
    digamma(x) = digamma(x + 1) - 1/x."""
    y = np.maximum(x, 1e-3) + 6
    below = sum(1 / (y - k) for k in range(1, 7))
    return y * np.exp(-0.5 / y - 1 / (12 * y**2) + 1 / (120 * y**4) - below)


def divide(counts, given, variational):
    """Counts of entries -> t(emitted | given) of entries; given (E,): the word that emits."""
    weigh = exp_digamma if variational else np.asarray
    total = np.maximum(weigh(np.bincount(given, counts)), 1e-30)
    return (weigh(counts) / total[given]).astype(np.float32)


class Direction:
    """One of the two models: its tables and, after an E-step, its posteriors."""

    def __init__(self, bitext, forward, start):
        """start: what the rows of the translation table are proportional to at first"""
        self.bitext, self.forward = bitext, forward
        self.given = bitext.entry_source if forward else bitext.entry_target
        self.words = bitext.target if forward else bitext.source  # those that are emitted
        size = self.words.max() + 1
        self.table = (start / size).astype(np.float32)
        self.null_table = np.full(size, 1 / size, np.float32)
        distance = np.abs(np.arange(-WIDTH, WIDTH + 1) - 1)
        self.jump = np.tanh(0.25) * np.exp(-0.5 * distance)  # 1 in all, if it fell on beyond
        self.posterior = np.zeros(len(bitext.entry), np.float32)
        self.null_posterior = np.zeros(len(self.words), np.float32)

    def e_step(self, hmm, diagonal):
        """Fills posterior (cells,), null_posterior (words,), jump_counts. -> log likelihood"""
        starts = self.bitext.source_start, self.bitext.target_start
        starts = starts[::-1] if self.forward else starts  # of the words that are emitted first
        layout = self.forward, self.words, *starts, self.bitext.cell_start, self.bitext.entry
        tables = self.table, self.null_table, self.jump if hmm else self.jump[:0]
        posteriors = self.posterior, self.null_posterior
        n_pairs = len(self.bitext.cell_start) - 1
        log_likelihood, jump_counts = np.zeros(n_pairs), np.zeros((n_pairs, 2 * WIDTH + 1))
        results = log_likelihood, jump_counts

        def block(begin, end):
            pair_posteriors(begin, end, layout, tables, float(diagonal), posteriors, results)

        in_parallel(block, n_pairs, 256)
        self.jump_counts = jump_counts.sum(0)
        return log_likelihood.sum()

    def expected_counts(self, other=None):
        """Expected counts of the entries, each posterior times that of the other direction."""
        counts = np.zeros(len(self.table))
        posterior = self.posterior if other is None else self.posterior * other.posterior
        add_up(self.bitext.entry, posterior, counts)
        return counts

    def m_step(self, counts, prior, stems, recipe):
        """New tables from counts (E,) and imagined counts (E,); stems: see number_stems."""
        if recipe.stems:
            stem_entry, *stem_given = stems
            stem_counts = np.bincount(stem_entry, counts) + recipe.prior
            by_stem = divide(stem_counts, stem_given[not self.forward], recipe.variational)
            prior = prior + recipe.stems * by_stem[stem_entry]
        self.table = divide(counts + prior, self.given, recipe.variational)
        null = np.full(len(self.null_table), float(recipe.null))
        add_up(self.words, self.null_posterior, null)
        self.null_table = (null / null.sum()).astype(np.float32)
        if self.jump_counts.any():
            self.jump = np.maximum(self.jump_counts / self.jump_counts.sum(), 1e-6)


def spelled_alike(vocabularies, entry_source, entry_target):
    """For each entry 0 .. 1 from the longest common subsequence of its two words (their first 24
    letters): 0 for half of the longer word or less, 1 for all of it."""
    left, right = (np.array(words, "U24").view(np.uint32).reshape(-1, 24) for words in vocabularies)
    alike = np.zeros(len(entry_source))

    def block(begin, end):
        common_letters(begin, end, left, right, entry_source, entry_target, alike)

    in_parallel(block, len(alike), 4096)
    return alike


@njit(cache=True, nogil=True)
def common_letters(begin, end, left, right, entry_source, entry_target, alike):
    """left, right (words, 24): letters, padded with 0. Fills alike[begin:end]."""
    common = np.zeros(right.shape[1] + 1, np.int64)  # [j]: letters shared by a so far and by b[:j]
    for k in range(begin, end):
        a, b = left[entry_source[k]], right[entry_target[k]]
        m = n = 0
        while m < len(a) and a[m]:
            m += 1
        while n < len(b) and b[n]:
            common[n + 1] = 0
            n += 1
        for i in range(m):
            before = 0  # common[j] as it was one letter of a ago
            for j in range(n):
                longest = before + 1 if a[i] == b[j] else max(common[j], common[j + 1])
                before, common[j + 1] = common[j + 1], longest
        alike[k] = max(0.0, 2 * common[n] / max(m, n, 1) - 1)


def number_stems(vocabularies, bitext):
    """-> stem_entry (E,): for each entry the number of its pair of stems; then for each such pair
    its source stem and its target stem."""
    sides = []
    for side, entry in zip(vocabularies, (bitext.entry_source, bitext.entry_target)):
        stem_of_word = np.unique([word[:STEM] for word in side], return_inverse=True)[1]
        sides.append(stem_of_word[entry])
    source, target = sides
    n_target = target.max() + 1
    both, stem_entry = np.unique(source * n_target + target, return_inverse=True)
    return stem_entry, *np.divmod(both, n_target)


def train(pairs, recipe=Recipe()):
    """EM. -> bitext, both Directions with the posteriors of their final tables, and the log
    likelihoods of both at each E-step."""
    tell_compilation()
    bitext, vocabularies = make_bitext(pairs)
    alike = np.zeros(len(bitext.entry_source))
    if recipe.spelling:
        alike = spelled_alike(vocabularies, bitext.entry_source, bitext.entry_target)
    prior = recipe.prior + recipe.spelling * alike
    stems = number_stems(vocabularies, bitext)
    forward, backward = (Direction(bitext, way, 1 + 10 * alike) for way in (True, False))
    history = []
    steps = recipe.ibm1 + recipe.hmm
    for step in range(steps):
        hmm = step >= recipe.ibm1
        history.append([each.e_step(hmm, recipe.diagonal) for each in (forward, backward)])
        if step == steps - 1:
            break  # whoever called wants posteriors, not tables
        agree = hmm and recipe.agree
        forward_counts = forward.expected_counts(backward if agree else None)
        backward_counts = backward.expected_counts(forward if agree else None)
        forward.m_step(forward_counts, prior, stems, recipe)
        backward.m_step(backward_counts, prior, stems, recipe)
    return bitext, (forward, backward), history


def tell_compilation():
    """numba compiles at the first call and keeps the result on disk. Say so before, not after."""
    if config.DISABLE_JIT or pair_posteriors.signatures:
        return
    try:  # what is on disk for this source; numba has no public question for it
        kept = pair_posteriors._cache._cache_file._load_index()
    except (AttributeError, OSError):
        kept = {}
    if not kept:
        warn("align.py: compiling, some seconds, at the first run only")


# ---- Links ---------------------------------------------------------------------------------------

def align_bitext(pairs, recipe=Recipe()):
    """[(source words, target words)] -> for each pair its links, a sorted list of (i, j), 0-based.
    Case is ignored. Raises InputError for a text that is not cut into words.

    Time and memory grow with I * J of a pair, and its tables are not made smaller by a long one: so
    one of more than CELLS cells is learned from, and linked, window by window (see windows).
    """
    pairs = list(pairs)
    if texts := [side for pair in pairs for side in pair if isinstance(side, str)]:
        raise InputError(f"{texts[0]!r:.80} is a text where a list of words should be: split it")
    if not any(a and b for a, b in pairs):
        return [[] for _ in pairs]
    pieces = [(s, *window) for s, (a, b) in enumerate(pairs) for window in windows(len(a), len(b))]
    texts = [(pairs[s][0][i0:i1], pairs[s][1][j0:j1]) for s, _, i0, i1, j0, j1 in pieces]
    bitext, directions, _ = train(texts, recipe)
    links, long = [[] for _ in pairs], set()
    for n, (s, k, i0, i1, j0, j1) in enumerate(pieces):
        cells = slice(bitext.cell_start[n], bitext.cell_start[n + 1])
        both = [direction.posterior[cells].reshape(i1 - i0, j1 - j0) for direction in directions]
        found = choose_links(*both, recipe)
        I, J = len(pairs[s][0]), len(pairs[s][1])
        if I * J <= CELLS:
            links[s] = found
        else:
            found = [(i0 + i, j0 + j) for i, j in found]
            links[s] += [link for link in found if deciding_window(*link, I, J) == k]
            long.add(s)
    if long:
        warn(f"align.py: {len(long)} pairs of more than {CELLS} cells (words times words) were "
             f"aligned in windows along the diagonal")
    return [sorted(line) for line in links]


def window_parts(I, J):
    return math.ceil(2 * math.sqrt(I * J / CELLS))


def windows(I, J):
    """Stretches of a pair of I and J words: [(k, i0, i1, j0, j1)], k = 0, 1, ...

    A pair of CELLS cells or less is one. A longer one is cut into n parts, on both sides alike, and
    a window is two neighbouring parts, so that windows overlap by half and hold at most about CELLS
    cells (of a side with less than n words, one or two words).
    """
    if I * J <= CELLS:
        return [(0, 0, I, 0, J)]
    n = window_parts(I, J)
    return [(k, k * I // n, -(-(k + 2) * I // n), k * J // n, -(-(k + 2) * J // n))
            for k in range(n - 1)]


def deciding_window(i, j, I, J):
    """Which window of a long pair decides about link i-j: the one that has it nearest its middle. A
    link is found where a window has both words: always within a part, I / n words, of the diagonal,
    and never beyond two."""
    n = window_parts(I, J)
    place = n * ((i + 0.5) / I + (j + 0.5) / J) / 2  # along the diagonal, in parts
    return min(max(math.floor(place - 0.5), 0), n - 2)


def choose_links(forward, backward, recipe):
    """Two posteriors (I, J) -> links. Forward, a column and its NULL sum to one; backward, a row
    and its NULL."""
    if recipe.method == "posterior":
        mean = (forward + backward) / 2
        return [(int(i), int(j)) for i, j in np.argwhere(mean > recipe.threshold)]
    f = {(int(p.argmax()), j) for j, p in enumerate(forward.T) if p.max(initial=0) > 1 - p.sum()}
    g = {(i, int(p.argmax())) for i, p in enumerate(backward) if p.max(initial=0) > 1 - p.sum()}
    return sorted(symmetrise(f, g, recipe.method))


def symmetrise(forward, backward, method="grow-diag-final-and"):
    """Two sets of links -> one; method: any of METHODS but posterior. Koehn, Och, Marcu 2003."""
    union, links = forward | backward, forward & backward
    if method != "grow-diag-final-and":
        return {"forward": forward, "backward": backward,
                "intersection": links, "union": union}[method]
    sources, targets = {i for i, _ in links}, {j for _, j in links}  # the words that have a link
    todo = sorted(links)

    def add(i, j):
        links.add((i, j))
        sources.add(i)
        targets.add(j)
        todo.append((i, j))
    # grow-diag: add a neighbour of a link if one of its words has no link yet; then its neighbours
    for i, j in todo:
        for a, b in (-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1):
            near = i + a, j + b
            if near in union and not (near[0] in sources and near[1] in targets):
                add(*near)
    # final-and: add a link of either direction where both words have no link yet
    for i, j in sorted(forward) + sorted(backward):
        if i not in sources and j not in targets:
            add(i, j)
    return links


def aer(links, sure, possible=None):
    """Alignment error rate (Och, Ney 2003) of lists of link sets:

        1 - (|A & S| + |A & P|) / (|A| + |S|),    A links, S sure, P possible, which includes S
    """
    lines = [tuple(map(set, line)) for line in zip(links, sure, possible or sure, strict=True)]
    hits = sum(len(a & s) + len(a & (s | p)) for a, s, p in lines)
    return 1 - hits / max(1, sum(len(a) + len(s) for a, s, _ in lines))


def extract_links(source, source_word, target, target_word, threshold=1e-3):
    """awesome-align (Dou, Neubig 2021, arXiv 2101.08231): two word pieces are linked where the
    softmax of their similarity exceeds the threshold both ways, two words where any of their pieces
    are. source (m, D): a vector a piece; source_word (m,): the word that it belongs to."""
    if not len(source) or not len(target):
        return []
    similarity = np.asarray(source, np.float64) @ np.asarray(target, np.float64).T  # (m, n)
    rows = np.exp(similarity - similarity.max(1, keepdims=True))  # softmax: these over their sums
    columns = np.exp(similarity - similarity.max(0, keepdims=True))
    close = (rows > threshold * rows.sum(1, keepdims=True)) & (columns > threshold * columns.sum(0))
    return sorted({(int(source_word[m]), int(target_word[n])) for m, n in zip(*np.nonzero(close))})


def contextual_links(pairs, name, layer=8):
    """Links from the vectors of a pretrained encoder. name: a model with a fast tokenizer, as
    transformers takes it: bert-base-multilingual-cased, or a folder. Words beyond its longest
    input, often 512 pieces, get no links. Raises InputError for a model that cannot be used."""
    torch, transformers = needed("torch", "--model"), needed("transformers", "--model")

    def vectors(words):
        pieces = tokenizer([words], is_split_into_words=True, return_tensors="pt", **limit)
        with torch.inference_mode():
            layers = model(**pieces, output_hidden_states=True).hidden_states
        word = np.array([-1 if w is None else w for w in pieces.word_ids(0)])  # -1: [CLS], [SEP]
        return layers[min(layer, len(layers) - 1)][0].numpy()[word >= 0], word[word >= 0]

    try:
        # A space before each word, or those of RoBERTa's kind do not take words one by one.
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, add_prefix_space=True)
        model = transformers.AutoModel.from_pretrained(name).float().eval()
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        if not tokenizer.is_fast:
            raise ValueError("no fast tokenizer, which knows the word of each piece")
        # Tokenizers do not always say how much the model can take; some models begin at position 2.
        positions = getattr(model.config, "max_position_embeddings", None) or 0
        longest = min(tokenizer.model_max_length, positions - 2 if positions > 2 else math.inf)
        limit = {"max_length": int(longest), "truncation": True} if longest < 1e9 else {}
        vectors(["a"])                # one that hears sound, for one, takes no text
    except (OSError, ImportError):
        raise
    except Exception as error:        # a reader of damaged files may fail in any way
        reason = str(error).partition("\n")[0]
        raise InputError(f"--model {name}: {type(error).__name__}: {reason}") from None
    return [extract_links(*vectors(a), *vectors(b)) if a and b else [] for a, b in pairs]


def add_links(rows, align, compare=False):
    """Fill row.links where a row with two texts lacks them; those that it has stay. Learns from all
    rows that have both texts. align: [(source words, target words)] -> links, as align_bitext.

    A pair without any link gets one, from the last source word to the first target word: all must
    be heard before anything is said. compare: align, and compare with the links that are there,
    also where no row lacks any.
    """
    words = [row.words() for row in rows]
    for lang in sorted({lang for row in rows for lang in row.st}):
        both = [(row, asr, st[lang]) for row, (asr, st) in zip(rows, words) if asr and st.get(lang)]
        given = sum(bool(row.links.get(lang)) for row, _, _ in both)
        if given == len(both) and not compare:
            continue
        links = align([check_pair(asr, st, row.where) for row, asr, st in both])
        hits = [(found, row.links[lang]) for (row, _, _), found in zip(both, links)
                if row.links.get(lang)]
        for (row, asr, _), found in zip(both, links):
            row.links[lang] = row.links.get(lang) or found or [(len(asr) - 1, 0)]
        score = f", AER {100 * aer(*zip(*hits)):.1f} against them" if hits else ""
        warn(f"{lang}: {len(both)} rows aligned, {given} keep the links that they had{score}")


# ---- Word times ----------------------------------------------------------------------------------
# A transducer's times say when it could write a word, which is what interleaving needs; those of a
# forced aligner say when the word was over.

def word_times(frames, word_of_token, frame_s):
    """frames (U,): the encoder frame that wrote each token; word_of_token (U,): the word it belongs
    to, -1 for a tag; frame_s: seconds a frame. -> for each word the end, in seconds, of the frame
    that wrote its last token."""
    ends = {}
    for word, frame in zip(word_of_token, frames, strict=True):
        if word >= 0:
            ends[word] = (int(frame) + 1) * frame_s
    return [ends[word] for word in range(len(ends))]


def viterbi_times(rows, run):
    """When each word of a row is complete on the best path (Viterbi) of a trained transducer that
    writes what it was trained to write: (model, tokenizer, what lay beside them). Yields (row,
    {tag: [end in s]}); a row that lacks sound, or what the model's order needs (links, or for one
    trained on times, times), is named and left out."""
    serialize, stream = needed("serialize", "--times"), needed("stream", "--times")
    model, tokenizer, beside = run
    tail, ready = stream.own_search(beside)["tail"], []
    for row, samples in stream.readable(rows):
        try:
            mode = serialize.mode_of(row, str(beside.get("mode")))
            pairs = [pair for pair in serialize.interleave(row, mode)
                     if pair[0] in tokenizer.tag_id]           # the streams that it writes
            if not pairs:
                raise InputError("no text of a stream that the model writes")
            ids = serialize.serialize(pairs, tokenizer)
            heard_s = len(samples) / SAMPLE_RATE
            if heard_s > LONGEST_TIMED_S:             # memory grows with its square
                raise InputError(f"{heard_s:.0f} s, and times are found for at most "
                                 f"{LONGEST_TIMED_S} s: cut it into utterances")
            if len(ids) > stream.BABBLE * (1 + len(row.st)) * (1 + heard_s):
                raise InputError(f"{len(ids)} tokens to write in {heard_s:.1f} s")
        except ValueError as error:
            warn(f"{row.where}: no times: {str(error).removeprefix(f'{row.where}: ')}")
            continue
        longest = max([len(samples), *(len(earlier) for _, earlier, _, _ in ready)])
        if ready and longest * (len(ready) + 1) > BATCH_SAMPLES:
            yield from batch_times(model, tokenizer, serialize, ready, tail)
            ready = []
        ready.append((row, samples, pairs, ids))
    if ready:
        yield from batch_times(model, tokenizer, serialize, ready, tail)


def batch_times(model, tokenizer, serialize, ready, tail):
    """ready: [(row, samples, (tag, word) pairs, token ids)]; see viterbi_times. As a search does,
    the model hears `tail` seconds of silence behind each recording; no time lies in it."""
    silence = np.zeros(round(tail * SAMPLE_RATE), np.float32)
    heard = [np.concatenate([samples, silence]) for _, samples, _, _ in ready]
    frames = best_path(model, heard, [ids for *_, ids in ready])
    for (row, samples, pairs, ids), written in zip(ready, frames):
        if -1 in written:
            warn(f"{row.where}: no times: no path through the model writes its text")
            continue
        parser, done, word_of_token = serialize.StreamParser(tokenizer), 0, []
        for token in ids:
            word_of_token.append(-1 if 0 < token < tokenizer.first_byte else done)
            done += len(parser.feed(token))  # the words, one or none, that this token completes
        streams = {}
        ends = word_times(written, word_of_token, model.config.frame_s)
        for (tag, _), end in zip(pairs, ends, strict=True):
            streams.setdefault(tag, []).append(min(end, len(samples) / SAMPLE_RATE))
        yield row, streams


def best_path(model, samples, ids):
    """[samples], [token ids] -> for each the frames in which its tokens are written, [int]"""
    torch, models = needed("torch", "--times"), needed("model", "--times")
    rnnt_loss = needed("rnnt_loss", "--times")
    config, pad = model.config, partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    with torch.inference_mode():
        mels = [models.features(torch.from_numpy(x), config) for x in samples]
        mel_lengths = torch.tensor([len(mel) for mel in mels])
        frames, _ = model.encoder(pad(mels), mel_lengths)
        targets = pad([torch.tensor(line, dtype=torch.long) for line in ids])
        labels, _ = model.label_encoder(targets)
        if not (frames.isfinite().all() and labels.isfinite().all()):
            raise InputError("--times: the model computes what is no number: it is damaged")
        written = rnnt_loss.joint_rnnt_align(
            model.joint.encoder_proj(frames), model.joint.label_proj(labels),
            model.joint.output.weight, model.joint.output.bias, targets,
            mel_lengths // config.subsampling, torch.tensor([len(line) for line in ids]), blank=0)
    return [line[:len(tokens)] for line, tokens in zip(written.tolist(), ids)]


def ctm_times(path):
    """A CTM, `utterance channel start duration word` a line -> {utterance: [(word, end in s)]}, by
    time, whatever the order of the lines. Other lines are named and left out."""
    found, channels, bad = {}, {}, []
    for n, line in enumerate(read_lines(path), 1):
        fields = line.split()
        if not fields or line.startswith(";;"):
            continue
        start, duration = map(seconds, fields[2:4]) if len(fields) > 4 else (None, None)
        if start is None or duration is None or start + duration >= 1e9 or not_utf8(line):
            bad.append(f"{path}:{n}: left out, not a line of a CTM: {line[:80]!r}")
        else:
            found.setdefault(fields[0], []).append((start, start + duration, fields[4]))
            channels.setdefault(fields[0], set()).add(fields[1])
    if not found:
        raise InputError(f"{path}: no line of a CTM: utterance, channel, start, duration, word")
    for message in bad:
        warn(message)
    for utterance, names in channels.items():
        if len(names) > 1:                            # two speakers, whose words would be mixed
            warn(f"{path}: {utterance} left out, it has the channels {', '.join(sorted(names))}: "
                 "let each be an utterance of its own, and a row")
            del found[utterance]
    return {utterance: in_time(words) for utterance, words in found.items()}


def textgrid_times(folder):
    """Praat TextGrids in a folder and the folders in it, as the Montreal Forced Aligner writes them
    -> {path without its suffix: [(word, end in s)]}, and by its last parts alone (speaker/name,
    name) where no other path ends so."""
    found = {}
    for file in files_under(folder):
        if file.suffix.lower() == ".textgrid":
            try:
                words = read_textgrid(file)
            except (InputError, OSError) as error:
                warn(f"{error if isinstance(error, InputError) else f'{file}: {error.strerror}'}: "
                     "left out")
            else:
                found[nfc(file.relative_to(folder).with_suffix("").as_posix())] = in_time(words)
    if not found:
        raise InputError(f"{folder}: no TextGrid that can be read")
    ends = {key: endings(key) for key in found}
    count = Counter(end for own in ends.values() for end in own)
    return found | {end: found[key] for key, own in ends.items() for end in own if count[end] == 1}


def files_under(folder):
    """In a folder and the folders in it, also those that are links, each once."""
    seen, files = set(), []
    for at, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            folders.clear()
        else:
            seen.add(real)
            files += [Path(at, name) for name in names]
            # A folder's own name before that of a link to it, on every disk.
            folders.sort(key=lambda name: (os.path.islink(os.path.join(at, name)), name))
    return sorted(files)


def endings(key):
    """a/b/c -> a/b/c, b/c, c"""
    parts = key.split("/")
    return ["/".join(parts[n:]) for n in range(len(parts))]


# Praat's own rule for its text files: numbers, quoted texts and flags that stand free count, and
# everything else is commentary. So the long and the short format are one.
PRAAT = re.compile(r'(?<!\S)(?:"(?:[^"]|"")*"|[-+]?\d[-+.\deE]*|<exists>)(?!\S)')


def read_textgrid(path):
    """One file -> [(start, end, word)] of its tiers `words` and `SPEAKER - words`."""
    content = read_regular(path)
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: neither UTF-8 nor UTF-16 at byte {error.start}") from None
    try:
        tokens = iter(PRAAT.findall(text))
        kind, what = next(tokens), next(tokens)       # older programs name the short format
        if kind not in ('"ooTextFile"', '"ooTextFile short"') or what != '"TextGrid"':
            raise ValueError(f"it begins with {kind} {what}")
        next(tokens), next(tokens), next(tokens)  # xmin, xmax, <exists>
        tiers = [read_tier(tokens) for _ in range(int(next(tokens)))]
    except (ValueError, StopIteration) as error:
        reason = f" ({error})" if str(error) else ""
        raise InputError(f"{path}: not a whole TextGrid in text format{reason}") from None
    words = [tier for name, tier in tiers if re.fullmatch("(.* - )?words", name, re.I)]
    if not words:
        raise InputError(f"{path}: no tier `words` among {[name for name, _ in tiers]}")
    return [interval for tier in words for interval in tier]


def read_tier(tokens):
    """-> name, [(start, end, text)]; a point tier has no intervals"""
    kind, name = next(tokens), unquote(next(tokens))
    next(tokens), next(tokens)  # xmin, xmax
    intervals = []
    for _ in range(int(next(tokens))):
        given = [next(tokens) for _ in range(1 + (kind == '"IntervalTier"'))]
        times = [seconds(text) for text in given]
        if None in times:
            raise ValueError(f"tier {name!r}, interval {len(intervals) + 1}: {given} are no times "
                             "from 0 on")
        intervals.append((times[0], times[-1], unquote(next(tokens))))
    return name, intervals


def unquote(text):
    if text[0] != '"':
        raise ValueError(f"{text} where a text should stand")
    return nfc(text[1:-1].replace('""', '"').strip())


def in_time(words):
    """[(start, end, word)] -> [(word, end)], by time; an end before its predecessor's counts as
    that, so that times never fall."""
    words = sorted(words, key=lambda word: word[:2])
    ends = accumulate((end for _, end, _ in words), max)
    return [(word, end) for (_, _, word), end in zip(words, ends)]


def seconds(text):
    """-> float, or None if it is no time that a manifest may have"""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 1e9 else None


def annotated_times(rows, found, path):
    """Times of a CTM or of TextGrids. Yields (row, {"<asr>": [end in s]}); a row whose words are
    not those of the annotation, apart from case and punctuation, is named and left out.

    Their utterances are rows: named by speaker/id, or by row.id alone where that is not another
    speaker's, and their times count from the row's start, not from that of a longer file."""
    speakers = {nfc(row.speaker) for row in rows}
    pairs = (end.partition("/") for key in found for end in endings(key))
    taken = {own_id for speaker, slash, own_id in pairs if slash and speaker in speakers}
    for row in rows:
        words = found.get(nfc(f"{row.speaker}/{row.id}"))
        if words is None and not (row.speaker and nfc(row.id) in taken):
            words = found.get(nfc(row.id))
        own = row.words()[0]
        if not words or not own:
            lacking = f"annotation of {row.id!r} in {path}" if own else "transcription"
            warn(f"{row.where}: no times: no {lacking}")
            continue
        spoken = [(word, end) for word, end in words if word.lower() not in SILENCES]
        ends = match_words(own, words) or match_words(own, spoken)  # `sil` is a word in Turkish
        if ends and row.duration and ends[-1] > row.duration + 0.5:
            warn(f"{row.where}: no times: those in {path} end at {ends[-1]:.1f} s of "
                 f"{row.duration:.1f} s: do they count from the start of a longer file?")
        elif ends is None:
            warn(f"{row.where}: no times: {len(spoken)} words of {row.id!r} in {path} are not "
                 f"those of {row.asr!r}")
        else:
            yield row, {"<asr>": ends}


def letters_of(word):
    """Without case, ß and SS being one and so the four letters i of Turkish, and without
    punctuation: forced aligners leave it out."""
    word = nfc(word.casefold().replace("i\u0307", "i").replace("\u0131", "i"))
    return "".join(c for c in word if c.isalnum() or unicodedata.category(c)[0] == "M")


def match_words(words, annotated):
    """The end of each of `words`, or None if the texts differ in more than case, punctuation and
    spaces. A word ends with the annotated (word, end) that has its last letter: aligners cut some
    words that are one here (l'homme), and leave whole what are several (Han, kana). A word without
    a letter, a dash or a quote, ends with the word before it."""
    words = [letters_of(word) for word in words]
    spoken = [(letter, end) for text, end in annotated for letter in letters_of(text)]
    if not spoken or "".join(words) != "".join(letter for letter, _ in spoken):
        return None
    n_letters = accumulate(map(len, words))           # of the words up to this one
    return [spoken[n - 1][1] if n else 0.0 for n in n_letters]


def times_from(path):
    """What reads times: a function of rows that yields (row, {tag: [end in s]}), from a checkpoint
    RUN/model.pt, a CTM or a folder of TextGrids; what is wrong with these shows at once."""
    if path.endswith(".pt"):
        for package in ("soundfile", "tqdm", "rnnt_loss"):
            needed(package, "--times")
        return partial(viterbi_times, run=needed("stream", "--times").load_run(path))
    found = textgrid_times(path) if Path(path).is_dir() else ctm_times(path)
    return partial(annotated_times, found=found, path=path)


def add_times(rows, path, source):
    """Fill row.times and row.st_times by `source`, which is times_from(path). Times that a row has
    are replaced, and ours are compared with them."""
    errors, count = {}, 0
    for row, streams in source(rows):
        for tag, ends in streams.items():
            known = row.times if tag == "<asr>" else row.st_times.get(tag[4:-1])
            differences = [abs(a - b) for a, b in zip(ends, known or []) if b is not None]
            errors.setdefault(tag, []).extend(differences)
            ends = [round(end, 3) for end in ends]
            if tag == "<asr>":
                row.times = ends
            else:
                row.st_times[tag[4:-1]] = ends
        count += 1
    if not count:
        raise InputError(f"{path}: times for none of the {len(rows)} rows")
    warn(f"{path}: times for {count} of {len(rows)} rows")
    for tag, error in errors.items():
        if error:
            median, tail = np.percentile(error, (50, 90))
            warn(f"{tag}: |end - reference| over {len(error)} words: median {median:.3f} s, "
                 f"90th percentile {tail:.3f} s")


# ---- Files ---------------------------------------------------------------------------------------

def warn(message):
    """One line to standard error. What a terminal would obey, as an escape sequence out of a file,
    is shown as its code."""
    if sys.stderr is None:
        return
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    try:
        print("".join(shown), file=sys.stderr)
    except OSError:                   # nobody reads it: the work goes on
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def nfc(text):
    """Canonical composition: one spelling for what looks the same."""
    return unicodedata.normalize("NFC", text)


def not_utf8(text):
    return re.search("[\udc80-\udcff]", text) is not None


def read_regular(path):
    """The bytes of a file. A pipe, a device or a folder could be endless and is refused."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{path}: not a regular file")
    return Path(path).read_bytes()


def read_lines(path):
    """The lines of a text file: they end with \\n, before which one \\r is dropped, and with no
    other. A byte order mark is dropped, text becomes NFC (told once), and bytes that are not UTF-8
    become lone surrogates (see not_utf8), so that a caller can name the line."""
    lines = read_regular(path).split(b"\n")
    if lines[0][:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: UTF-16, but UTF-8 is read here: iconv -f UTF-16 -t UTF-8")
    if not lines[-1]:
        lines.pop()
    given = [line.removesuffix(b"\r").decode("utf-8-sig", "surrogateescape") for line in lines]
    composed = [nfc(line) for line in given]
    if changed := sum(a != b for a, b in zip(given, composed)):
        warn(f"{path}: {changed} lines were not in NFC and now are")
    return composed


def check_pair(source, target, where):
    """The words of both sides; where they cannot be aligned, which is told, two empty lists."""
    text = " ".join([*source, *target])
    problem = ("a NUL character" if "\0" in text else
               "bytes that are not UTF-8" if not_utf8(text) else
               "an empty side" if not (source and target) else "")
    if problem:
        warn(f"{where}: not aligned: {problem}: {text[:80]!r}")
        return [], []
    return source, target


def read_pairs(path):
    """`source words ||| target words` a line -> [(source words, target words)]"""
    lines = read_lines(path)
    if lines and not any("|||" in line for line in lines):
        raise InputError(f"{path}:1: no line has the separator |||: {lines[0][:80]!r}")
    pairs = []
    if other := sum(len(line.split()) > len(re.findall(r"[^ \t\r]+", line)) for line in lines):
        warn(f"{path}: {other} lines have other white space than blanks, as no-break spaces, which "
             "ends a word here; it may not where their links were counted")
    for n, line in enumerate(lines, 1):
        source, separator, target = line.partition("|||")
        if line.strip() and (not separator or "|||" in target):
            which = "a second" if separator else "no"
            warn(f"{path}:{n}: not aligned: {which} separator |||: {line[:80]!r}")
            pairs.append(([], []))
            continue
        pairs.append(check_pair(source.split(), target.split(), f"{path}:{n}"))
    return pairs


def read_gold(path, pairs):
    """`i-j` (sure) and `ipj` (possible) -> (sure, possible), a set a line each; a link out of range
    is named and left out."""
    lines = read_lines(path)
    if len(lines) != len(pairs):
        n = min(len(lines), len(pairs)) + 1
        warn(f"{path}:{n}: {len(lines)} lines of links for {len(pairs)} pairs")
    gold = {kind: [set() for _ in zip(lines, pairs)] for kind in "-p"}
    for n, (line, (a, b)) in enumerate(zip(lines, pairs)):
        for link in line.split():
            match = re.fullmatch(r"([0-9]{1,9})([-p])([0-9]{1,9})", link)
            if match and int(match[1]) < len(a) and int(match[3]) < len(b):
                gold[match[2]][n].add((int(match[1]), int(match[3])))
            else:
                warn(f"{path}:{n + 1}: left out, {link!r} is not a link between {len(a)} and "
                     f"{len(b)} words")
    return gold["-"], gold["p"]


def write_lines(path, lines):
    """To a file, or to standard output (None). A file is written under another name beside it and
    renamed: a full disk leaves the old one as it was and nothing else."""
    content = "".join(f"{line}\n" for line in lines).encode()
    if path is None and sys.stdout is None:
        raise InputError("standard output is closed")
    if path is None or os.path.exists(path) and not os.path.isfile(path):
        with open(sys.stdout.fileno() if path is None else path, "wb",  # a device or a pipe
                  closefd=path is not None) as file:
            file.write(content)
        return
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        Path(temporary).write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # not the temporary name
    finally:
        with suppress(OSError):
            Path(temporary).unlink()


# ---- The command line ----------------------------------------------------------------------------

def needed(name, purpose):
    """A module that only a part of the command line needs: one of the files beside this one, or a
    package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in ("model", "rnnt_loss", "serialize", "stream"):
            raise InputError(f"{purpose} needs {error.name}.py beside align.py") from None
        raise InputError(f"{purpose} needs {error.name}: pip install {error.name}") from None


def input_errors():
    """What is told in one line. Each file stands alone and so has an InputError of its own."""
    files = [sys.modules.get(name) for name in ("model", "serialize")]
    return OSError, ImportError, InputError, *(file.InputError for file in files if file)


def demonstrate():
    """Three sentences, a table each: # where two words are linked."""
    texts = [("das haus", "the house"), ("das buch ist neu", "the book is new"),
             ("das haus ist alt", "the house is old")]
    pairs = [(a.split(), b.split()) for a, b in texts]
    for (a, b), links in zip(pairs, align_bitext(pairs)):
        for j, word in enumerate(b):
            print(f"{'':8}{'  ' * j}{word}")
        for i, word in enumerate(a):
            print(f"{word:>6}  " + " ".join(".#"[(i, j) in links] for j in range(len(b))))


def check_output(options):
    """Before the work: can the output be written, and is it no file that is read? (A manifest may
    be written over itself.)"""
    out = options.out
    if os.path.isdir(out):
        raise InputError(f"{out}: a folder, not a file to write")
    if not (folder := Path(os.path.realpath(out)).parent).is_dir():    # of a link, its target's
        raise InputError(f"{out}: there is no folder {folder}")
    if not os.access(folder if os.path.isfile(out) or not os.path.exists(out) else out, os.W_OK):
        raise InputError(f"{out}: not allowed to write there")
    read = [*options.train, options.gold, options.times]
    for path in read if options.manifest else [*read, options.input]:
        if path and os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
            raise InputError(f"-o {out}: that is {path}, which is read")
    if not options.manifest and os.path.isfile(out):
        with open(out, "rb") as file:
            begun = file.read(4096)
            cut = rb"(\d+-?)?" * (len(begun) == 4096)     # where a link may end in its middle
            if not re.fullmatch(rb"(\s|\d+-\d+\b)*" + cut, begun):
                raise InputError(f"{out}: there already, and no links: it stays")


def align_pairs(options, align):
    pairs = read_pairs(options.input)
    sure, possible = read_gold(options.gold, pairs) if options.gold else (None, None)
    if options.gold and not any(sure + possible):
        raise InputError(f"{options.gold}: no link of {options.input}, so nothing to compare with")
    links = align(pairs)
    write_lines(options.out, (" ".join(f"{i}-{j}" for i, j in line) for line in links))
    count = sum(map(len, links))
    warn(f"{options.out or 'standard output'}: {len(links)} lines, {count} links written")
    if options.gold:
        warn(f"AER {100 * aer(links[:len(sure)], sure, possible):.1f}")


def align_manifest(options, align):
    if not options.out:
        raise InputError("a manifest needs -o OUT.jsonl")
    serialize = needed("serialize", "a manifest")
    serialize.check_target(options.out)
    # Lines that were skipped would be gone from the only file that had them.
    strict = serialize.same_file(options.out, options.input)
    rows = serialize.read_manifest(options.input, strict, allow_outside=options.allow_outside)
    languages = {lang for row in rows for lang in row.st}
    if options.train and len(languages) > 1:
        raise InputError(f"--train is of one target language, {options.input} has "
                         f"{', '.join(sorted(languages))}")
    # Before the links: what is wrong with the times shows at once, and where torch came after
    # numba's first threads, their OpenMP runtimes would get into each other's way (attention takes
    # a hundred times as long).
    source = times_from(options.times) if options.times else None
    # Who says how to align wants to see it done, also where all rows have links and lack times.
    told = options.method or options.model or options.train
    before = [(dict(row.links), row.times, dict(row.st_times)) for row in rows]
    found = False
    try:
        add_links(rows, align, compare=not options.times or bool(told))
        if source:
            add_times(rows, options.times, source)
        found = True
    finally:                                    # what was found is kept, whatever else may lack
        if found or before != [(row.links, row.times, row.st_times) for row in rows]:
            write_rows(options, rows, serialize)


def write_rows(options, rows, serialize):
    serialize.write_manifest(options.out, rows)
    links = sum(len(line) for row in rows for line in row.links.values())
    hint = serialize.outside_hint(options.out, rows)
    warn(f"{options.out}: {len(rows)} rows, {links} links written{hint}")


def parse_options(argv):
    parser = argparse.ArgumentParser(prog="align.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", nargs="?", help="FILE.pairs, or a manifest IN.jsonl; nothing: a demonstration")
    add("-o", "--out", help="the file to write; links: standard output if not given")
    add("--train", nargs="+", default=[], metavar="FILE.pairs", help="more text to learn from")
    add("--gold", help="`i-j` sure, `ipj` possible: print the alignment error rate")
    add("--method", choices=METHODS, help=f"how directions are joined (default {Recipe.method})")
    add("--model", help="link by this encoder instead: a name for transformers, or its folder")
    add("--times", help="RUN/model.pt (the texts that it writes), or a CTM or a folder of TextGrids"
        " named by row id (the transcription alone)")
    add("--allow-outside", action="store_true", help="sound may lie outside the manifest's folder")
    options = parser.parse_args(argv)
    manifest = is_manifest(options.input or "")
    refuse_useless(options, manifest)
    options.manifest = manifest
    return options


def is_manifest(path):
    """By its name, or because it begins with a JSON object, which no pair of texts does."""
    if path.endswith(".jsonl"):
        return True
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        first = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0]
    return first[:1] == b"{" and b"|||" not in first


def refuse_useless(options, manifest):
    """An option that would change nothing is told, not ignored."""
    for name, value in vars(options).items():
        if value == "":                       # as of a shell's variable that is not set
            name = name if name == "input" else "--" + name.replace("_", "-")
            raise InputError(f"{name} is empty")
    given = {"--" + name.replace("_", "-") for name, value in vars(options).items()
             if value and name != "input"}
    if given and not options.input:
        raise InputError(f"{min(given)} needs an input, FILE.pairs or a manifest IN.jsonl")
    no_manifest = f"is for a manifest, a file of JSON lines, not {options.input!r}"
    no_learning = "is for what is learned from the text; --model links by what it knows"
    for name, useless, why in (
            ("--gold", manifest,
             "is for FILE.pairs; the links of a manifest are compared anyway"),
            ("--times", not manifest, no_manifest),
            ("--allow-outside", not manifest, no_manifest),
            ("--train", options.model, no_learning),
            ("--method", options.model, no_learning)):
        if name in given and useless:
            raise InputError(f"{name} {why}")


def main(argv=None):
    options = parse_options(argv)
    if options.out:
        check_output(options)
    elif sys.stdout is None:
        raise InputError("standard output is closed")
    more = [pair for path in options.train for pair in read_pairs(path)]
    if more and options.manifest:     # whose words are serialize.py's units
        units = needed("serialize", "a manifest").units
        more = [tuple(units(" ".join(side)) for side in pair) for pair in more]

    def align(pairs):
        if options.model:
            return contextual_links(pairs, options.model)
        recipe = Recipe(method=options.method or Recipe.method)
        return align_bitext(pairs + more, recipe)[:len(pairs)]

    if not options.input:
        demonstrate()
    elif options.manifest:
        align_manifest(options, align)
    else:
        align_pairs(options, align)


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)     # here, where a pipe that nobody reads is caught
    except BrokenPipeError:           # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:      # torch's, of no type on a processor
        said = str(error) or "out of memory"
        if "can't allocate memory" not in said and "out of memory" not in said:
            raise
        warn(f"align.py: {said.splitlines()[0]}")
        sys.exit(2)
    except input_errors() as error:
        named = isinstance(error, OSError) and error.filename
        warn(f"align.py: {error.filename}: {error.strerror}" if named else f"align.py: {error}")
        if isinstance(error, OSError) and not named and sys.stdout:    # or Python would try again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
