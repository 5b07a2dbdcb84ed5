"""align.py -- who translates whom, and when was it said: what serialize.py needs to know before it interleaves.

    python align.py FILE.pairs > FILE.links                 0-0 1-2 ... for each line `a b ||| c d`
    python align.py IN.jsonl -o OUT.jsonl [--times SOURCE]  the same for a manifest, and the times of its words

The aligner learns from the bitext alone and tells it twice. Forward, every target word j is said by a source word a_j:

    P(target | source) = sum over all paths a of  prod_j  jump(a_j - a_{j-1}) * t(target_j | source_{a_j})

or by NULL; backward, the roles are exchanged. IBM model 1 is the story without jumps; it has no bad local optimum and
comes first. Expectation maximisation: the E-step finds the posterior of every link under the present tables, the M-step
adds posteriors up to expected counts and divides. Four things make it strong on a small corpus:

1. agreement (Liang, Taskar, Klein 2006): both directions count the product of their posteriors; each is a teacher;
2. a variational M-step, exp(digamma(count)): half a count less everywhere keeps rare words from collecting links;
3. a prior: two words spelled alike start with up to one imagined count;
4. a second prior, worth ten counts, from a table over stems: finanziarie learns from finanziario.
"""
import argparse
import re
import runpy
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numba import njit, prange

NULL = 0.02        # the chance that a word is said by no word of the other side
WIDTH = 8          # jumps longer than this share one probability
STEM = 4           # letters
METHODS = "posterior", "grow-diag-final-and", "intersection", "union", "forward", "backward"
REORDER = {"reassoc", "contract", "arcp", "nsz"}  # the compiler may add in vector lanes, but must keep nan and inf


@dataclass(frozen=True)
class Recipe:
    ibm1: int = 4              # iterations of IBM model 1, then
    hmm: int = 5               # of the two HMMs
    diagonal: float = 4.0      # in IBM-1: P(i | j) ~ exp(-diagonal * |i/I - j/J|)
    variational: bool = True
    agree: bool = True
    prior: float = 0.1         # imagined counts: of any two words that occur together,
    spelling: float = 1.0      # of two words spelled alike,
    stems: float = 10.0        # spread over the entries of a word as its stem's table says,
    null: float = 1.0          # and of any word as said by NULL, which would keep a frequent word for itself
    method: str = "posterior"  # link where the mean of both posteriors exceeds the threshold; or see symmetrise
    threshold: float = 0.5


# ---- The bitext as arrays -------------------------------------------------------------------------------------------
# source, target: the word ids of all sentences, one after the other, and (S+1,) where each sentence begins. Pair s has
# I x J cells, (i, j) at cell_start[s] + i*J + j; entry (cells,) is the table row that a cell uses, entry_source and
# entry_target (E,) its two words. Only words that occur together have a row: 12 bytes a cell, no vocabulary squared.
Bitext = namedtuple("Bitext", "source source_start target target_start cell_start entry entry_source entry_target")


def make_bitext(pairs):
    """-> (Bitext, source vocabulary, target vocabulary), lower-cased"""
    arrays, vocabularies = [], []
    for sentences in zip(*pairs):
        ids = {}
        flat = [ids.setdefault(word.lower(), len(ids)) for words in sentences for word in words]
        arrays += np.array(flat, np.int32), np.cumsum([0] + [len(words) for words in sentences])
        vocabularies.append(list(ids))
    cell_start = np.concatenate([[0], np.cumsum(np.diff(arrays[1]) * np.diff(arrays[3]))])
    by_word = np.argsort(arrays[0], kind="stable")  # all places of source word 0, then of word 1, ...
    sentence = np.repeat(np.arange(len(pairs)), np.diff(arrays[1]))
    latest = np.full(len(vocabularies[1]), -1, np.int32)
    entries = number_entries(tuple(arrays), cell_start, by_word, sentence, latest)
    return Bitext(*arrays, cell_start, *entries), vocabularies


@njit(cache=True)
def number_entries(arrays, cell_start, by_word, sentence, latest):
    """Number the word pairs that occur together, source word by source word: no sorting and no hashing."""
    source, source_start, target, target_start = arrays
    entry, entry_source, entry_target = [np.empty(cell_start[-1], np.int32) for _ in range(3)]
    number, size = np.zeros(len(latest), np.int32), 0
    for place in by_word:
        s, word = sentence[place], source[place]
        J = target_start[s + 1] - target_start[s]
        for j in range(J):
            other = target[target_start[s] + j]
            if latest[other] != word:  # latest: the source word that this target word met last
                latest[other], number[other] = word, size
                entry_source[size], entry_target[size] = word, other
                size += 1
            entry[cell_start[s] + (place - source_start[s]) * J + j] = number[other]
    return entry, entry_source[:size].copy(), entry_target[:size].copy()


# ---- E-step: the posterior of every link ----------------------------------------------------------------------------
# In a sentence, J words are said by I words: emission[j, i] = (1 - NULL) t(word j | word i), null[j] = NULL t(word j |
# NULL). Both functions fill posterior (J, I), turn null into the posterior of NULL, and return log P.

@njit(cache=True, fastmath=REORDER)
def ibm1_sentence(emission, null, diagonal, posterior):
    """Every word chooses alone."""
    (J, I), log_likelihood = emission.shape, 0.0
    for j in range(J):
        near = np.exp(-diagonal * np.abs((np.arange(I) + 0.5) / I - (j + 0.5) / J))
        posterior[j] = near / near.sum() * emission[j]
        total = null[j] + posterior[j].sum()
        posterior[j] /= total
        null[j] /= total
        log_likelihood += np.log(total)
    return log_likelihood


@njit(cache=True, fastmath=REORDER)
def hmm_sentence(emission, null, jump, posterior, jump_counts):
    """Forward-backward. State p is one more than the position linked last (0: none yet); a word said by NULL keeps it.
    Moving by d has probability jump[d + WIDTH], longer moves jump[0] and jump[-1]: what falls outside the sentence is
    lost, not redistributed, and so the counts added to jump_counts make an exact M-step."""
    J, I = emission.shape
    move = np.empty(2 * I + 1, np.float32)  # move[I + d]
    for d in range(-I, I + 1):
        move[I + d] = jump[min(max(d, -WIDTH), WIDTH) + WIDTH]
    state = np.zeros((J + 1, I + 1), np.float32)  # P(p after j words | the first j words)
    state[0, 0] = 1
    scale = np.empty(J, np.float32)
    for j in range(J):
        linked = posterior[j]
        linked[:] = 0
        for p in range(I + 1):
            if state[j, p] > 1e-10:  # most states are all but impossible
                for i in range(I):
                    linked[i] += state[j, p] * move[I + 1 - p + i]
        linked *= emission[j]
        scale[j] = 1 / (linked.sum() + null[j] + np.float32(1e-35))
        null[j] *= scale[j]
        linked *= scale[j]
        state[j + 1] = state[j] * null[j]
        state[j + 1, 1:] += linked
    future = np.ones(I + 1, np.float32)  # P(the words after j | p) / P(the words after j)
    moves = np.zeros((I + 1, I), np.float32)
    for j in range(J - 1, -1, -1):
        posterior[j] *= future[1:]
        ahead, stay = emission[j] * future[1:] * scale[j], null[j]
        null[j] = stay * (state[j] * future).sum()
        for p in range(I + 1):
            go = np.float32(0)
            for i in range(I):
                go += move[I + 1 - p + i] * ahead[i]
                moves[p, i] += state[j, p] * ahead[i]
            future[p] = go + stay * future[p]
    for p, i in np.ndindex(I + 1, I):
        jump_counts[min(max(i + 1 - p, -WIDTH), WIDTH) + WIDTH] += moves[p, i] * move[I + 1 - p + i]
    return -np.log(scale).sum()


@njit(cache=True)
def sentence_posteriors(table, null, forward, jump, diagonal, jump_counts):
    """table (I, J): turned, if forward, so that the words that are said come first. -> log P, posterior (I * J)"""
    emission = np.float32(1 - NULL) * (table.T.copy() if forward else table)
    posterior = np.empty_like(emission)
    log_likelihood = (hmm_sentence(emission, null, jump, posterior, jump_counts) if len(jump) else
                      ibm1_sentence(emission, null, diagonal, posterior))
    return log_likelihood, (posterior.T.copy() if forward else posterior).ravel()


@njit(parallel=True, cache=True)
def all_posteriors(bitext, forward, tables, diagonal, posteriors):
    """-> (log likelihood, expected counts of the jumps); no jumps given: IBM model 1"""
    source, source_start, target, target_start, cell_start, entry, _, _ = bitext
    (table, null_table, jump), (posterior, null_posterior) = tables, posteriors
    said, start = (target, target_start) if forward else (source, source_start)
    log_likelihood, jump_counts = np.zeros(len(start) - 1), np.zeros((len(start) - 1, 2 * WIDTH + 1))
    for s in prange(len(start) - 1):
        I, J = source_start[s + 1] - source_start[s], target_start[s + 1] - target_start[s]
        cells, null = slice(cell_start[s], cell_start[s + 1]), null_posterior[start[s]:start[s + 1]]
        if I and J:
            null[:] = NULL * null_table[said[start[s]:start[s + 1]]]
            log_likelihood[s], posterior[cells] = sentence_posteriors(
                table[entry[cells]].reshape(I, J), null, forward, jump, diagonal, jump_counts[s])
    return log_likelihood.sum(), jump_counts.sum(0)


# ---- M-step: expected counts -> tables ------------------------------------------------------------------------------

@njit(cache=True)
def add_up(index, values, others, size):
    """total[index[k]] += values[k] * others[k]; by one thread, so that the order of the sum is always the same."""
    total = np.zeros(size)
    for k in range(len(index)):
        total[index[k]] += values[k] if others is None else values[k] * others[k]
    return total


def exp_digamma(x):
    """About x - 1/2 for large x, almost 0 for small. The series holds from 6 on; digamma(x) = digamma(x+1) - 1/x."""
    y = np.maximum(x, 1e-3) + 6
    return y * np.exp(-0.5 / y - 1 / (12 * y**2) + 1 / (120 * y**4) - sum(1 / (y - k) for k in range(1, 7)))


def divide(counts, given, variational):
    """Counts of entries -> t(said | given) of entries."""
    weigh = exp_digamma if variational else np.asarray
    return (weigh(counts) / np.maximum(weigh(np.bincount(given, counts)), 1e-30)[given]).astype(np.float32)


class Direction:
    """One of the two stories: its tables and, after an E-step, its posteriors."""
    def __init__(self, bitext, forward, start):
        self.bitext, self.forward = bitext, forward
        self.given = bitext.entry_source if forward else bitext.entry_target
        self.words = bitext.target if forward else bitext.source  # the words that are said
        size = self.words.max() + 1
        self.table, self.null_table = (start / size).astype(np.float32), np.full(size, 1 / size, np.float32)
        self.jump = np.tanh(0.25) * np.exp(-0.5 * np.abs(np.arange(-WIDTH, WIDTH + 1) - 1))  # they sum to one
        self.posterior, self.null_posterior = (np.zeros(len(x), np.float32) for x in (bitext.entry, self.words))

    def e_step(self, hmm, diagonal):
        tables = self.table, self.null_table, self.jump if hmm else self.jump[:0]
        log_likelihood, self.jump_counts = all_posteriors(tuple(self.bitext), self.forward, tables, diagonal,
                                                          (self.posterior, self.null_posterior))
        return log_likelihood

    def m_step(self, counts, prior, stems, recipe):
        if recipe.stems:
            entry, *names = stems  # the stem entry of every entry, the two stems of every stem entry
            by_stem = divide(np.bincount(entry, counts) + recipe.prior, names[not self.forward], recipe.variational)
            prior = prior + recipe.stems * by_stem[entry]
        self.table = divide(counts + prior, self.given, recipe.variational)
        null = add_up(self.words, self.null_posterior, None, len(self.null_table)) + recipe.null
        self.null_table = (null / null.sum()).astype(np.float32)
        if self.jump_counts.any():
            self.jump = np.maximum(self.jump_counts / self.jump_counts.sum(), 1e-6)


@njit(parallel=True, cache=True)
def spelled_alike(left, right, entry_source, entry_target):
    """For each entry 0 .. 1 from the longest common subsequence of its words: 0 for half of the longer word or less."""
    alike = np.zeros(len(entry_source))
    for k in prange(len(entry_source)):
        a, b = left[entry_source[k]], right[entry_target[k]]  # letters, padded with 0
        m, n = (a > 0).sum(), (b > 0).sum()
        common = np.zeros((m + 1, n + 1), np.int8)
        for i in range(m):
            for j in range(n):
                common[i + 1, j + 1] = common[i, j] + 1 if a[i] == b[j] else max(common[i, j + 1], common[i + 1, j])
        alike[k] = max(0.0, 2 * common[m, n] / max(m, n) - 1)
    return alike


def train(pairs, recipe=Recipe()):
    """-> (bitext, both Directions with their last posteriors, the log likelihoods of both at each E-step)"""
    bitext, words = make_bitext(pairs)
    letters = [np.array(side, "U24").view(np.uint32).reshape(-1, 24) for side in words]
    alike = spelled_alike(*letters, bitext.entry_source, bitext.entry_target) if recipe.spelling else 0
    prior = np.full(len(bitext.entry_source), recipe.prior) + recipe.spelling * alike
    source, target = (np.unique([word[:STEM] for word in side], return_inverse=True)[1][entry]
                      for side, entry in zip(words, (bitext.entry_source, bitext.entry_target)))
    pairs, entry = np.unique(source * (target.max() + 1) + target, return_inverse=True)
    stems = entry, *np.divmod(pairs, target.max() + 1)
    both = [Direction(bitext, forward, np.ones(len(prior)) + 10 * alike) for forward in (True, False)]
    history = []
    for step in range(recipe.ibm1 + recipe.hmm):
        if step:
            partners = [story.posterior for story in both[::-1]] if recipe.agree and hmm else [None, None]
            counts = [add_up(bitext.entry, story.posterior, other, len(prior)) for story, other in zip(both, partners)]
            for story, own in zip(both, counts):
                story.m_step(own, prior, stems, recipe)
        hmm = step >= recipe.ibm1
        history.append([story.e_step(hmm, recipe.diagonal) for story in both])
    return bitext, both, history


# ---- Links and times ------------------------------------------------------------------------------------------------

def align_bitext(pairs, recipe=Recipe()):
    """[(source words, target words)] -> for each pair its links, a sorted list of (i, j), 0-based. Case is ignored."""
    if not any(a and b for a, b in pairs):
        return [[] for _ in pairs]
    bitext, stories, _ = train(pairs, recipe)
    result = []
    for s, (a, b) in enumerate(pairs):
        cells = slice(bitext.cell_start[s], bitext.cell_start[s + 1])
        result.append(choose_links(*(story.posterior[cells].reshape(len(a), len(b)) for story in stories), recipe))
    return result


def choose_links(forward, backward, recipe):
    """Two posteriors (I, J) -> links. Forward, a column and its NULL sum to one; backward, a row and its NULL."""
    if recipe.method == "posterior":
        return [(int(i), int(j)) for i, j in np.argwhere((forward + backward) / 2 > recipe.threshold)]
    f = {(int(p.argmax()), j) for j, p in enumerate(forward.T) if p.max(initial=0) > 1 - p.sum()}
    g = {(i, int(p.argmax())) for i, p in enumerate(backward) if p.max(initial=0) > 1 - p.sum()}
    return sorted(symmetrise(f, g, recipe.method))


def symmetrise(forward, backward, method="grow-diag-final-and"):
    """Two sets of links -> one; method: any of METHODS but posterior."""
    union, links = forward | backward, forward & backward
    if method != "grow-diag-final-and":
        return {"forward": forward, "backward": backward, "intersection": links, "union": union}[method]

    def linked(link):
        return any(link[0] == i for i, _ in links), any(link[1] == j for _, j in links)
    todo = sorted(links)
    for i, j in todo:  # grow-diag: add a neighbour of a link if one of its words has no link yet; then its neighbours
        for a, b in (-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1):
            near = i + a, j + b
            if near in union - links and not all(linked(near)):
                links.add(near)
                todo.append(near)
    for link in sorted(forward) + sorted(backward):  # final-and: where both words have no link yet
        if not any(linked(link)):
            links.add(link)
    return links


def aer(links, sure, possible=None):
    """Alignment error rate of lists of link sets: 1 - (|A & S| + |A & P|) / (|A| + |S|), where P includes S."""
    lines = [tuple(map(set, line)) for line in zip(links, sure, possible or sure, strict=True)]
    hits = sum(len(a & s) + len(a & (s | p)) for a, s, p in lines)
    return 1 - hits / max(1, sum(len(a) + len(s) for a, s, _ in lines))


def extract_links(source, source_word, target, target_word, threshold=1e-3):
    """awesome-align (Dou, Neubig 2021): two pieces are linked where the softmax of their similarity exceeds the
    threshold both ways, two words where any of their pieces are. source (m, D), source_word (m,): the word of each."""
    similarity = np.asarray(source, np.float64) @ np.asarray(target, np.float64).T  # (m, n)
    e, f = (np.exp(similarity - similarity.max(axis, keepdims=True)) for axis in (1, 0))  # softmax: e over its sum
    m, n = np.nonzero((e > threshold * e.sum(1, keepdims=True)) & (f > threshold * f.sum(0)))
    return sorted({(int(source_word[a]), int(target_word[b])) for a, b in zip(m, n)})


def contextual_links(pairs, name, layer=8):
    """name: a model with a fast tokenizer, as transformers takes it: bert-base-multilingual-cased, or a folder."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()

    def vectors(words):
        pieces = tokenizer([words], is_split_into_words=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            layers = model(**pieces, output_hidden_states=True).hidden_states
        word = np.array([-1 if w is None else w for w in pieces.word_ids(0)])  # None: [CLS] and [SEP]
        return layers[min(layer, len(layers) - 1)][0].numpy()[word >= 0], word[word >= 0]
    return [extract_links(*vectors(a), *vectors(b)) if a and b else [] for a, b in pairs]


def word_times(frames, word_of_token, frame_s):
    """frames (U,): the encoder frame that wrote each token; word_of_token (U,): the word it belongs to, -1 for a tag.
    -> for each word the end, in seconds, of the frame that wrote its last token."""
    last = {word: int(frame) for word, frame in zip(word_of_token, frames, strict=True) if word >= 0}
    return [(last[word] + 1) * frame_s for word in range(len(last))]


# ---- Files and the command line -------------------------------------------------------------------------------------

def warn(message):
    print(message, file=sys.stderr)


def read_lines(path):
    return [line.decode("utf-8-sig", "surrogateescape") for line in Path(path).read_bytes().splitlines()]


def read_pair(source, target, where):
    """The words of both sides; where they cannot be aligned, which is told, two empty lists."""
    text, source, target = f"{source} {target}", source.split(), target.split()
    problem = ("a NUL character" if "\0" in text else "a second separator |||" if "|||" in text else
               "bytes that are not UTF-8" if re.search("[\udc80-\udcff]", text) else
               "an empty side" if not (source and target) else "")
    if problem:
        warn(f"{where}: not aligned: {problem}: {text[:80]!r}")
    return ([], []) if problem else (source, target)


def read_pairs(path):
    return [read_pair(*line.partition("|||")[::2], f"{path}:{n}") for n, line in enumerate(read_lines(path), 1)]


def read_gold(path, pairs):
    """`i-j` (sure) and `ipj` (possible) -> (sure, possible); a link out of range is reported and left out."""
    lines = read_lines(path)
    if len(lines) != len(pairs):
        warn(f"{path}:{min(len(lines), len(pairs)) + 1}: {len(lines)} lines of links for {len(pairs)} pairs")
    gold = {kind: [set() for _ in zip(lines, pairs)] for kind in "-p"}
    for n, (line, (a, b)) in enumerate(zip(lines, pairs)):
        for link in line.split():
            match = re.fullmatch(r"(\d+)([-p])(\d+)", link)
            if match and int(match[1]) < len(a) and int(match[3]) < len(b):
                gold[match[2]][n].add((int(match[1]), int(match[3])))
            else:
                warn(f"{path}:{n + 1}: left out, {link!r} is not a link between {len(a)} and {len(b)} words")
    return gold["-"], gold["p"]


def add_links(rows, aligner):
    """Links for rows with two texts; those that a row has stay, and ours are compared with them."""
    for lang in sorted({lang for row in rows for lang in row.st}):
        todo = [row for row in rows if (row.asr or "").strip() and row.st.get(lang, "").strip()]
        links = aligner([read_pair(row.asr, row.st[lang], row.where) for row in todo])
        given = [(found, row.links[lang]) for row, found in zip(todo, links) if row.links.get(lang)]
        for row, found in zip(todo, links):
            row.links[lang] = row.links.get(lang) or found or [(len(row.asr.split()) - 1, 0)]  # all heard
        score = f", AER {100 * aer(*zip(*given)):.1f} against them" if given else ""
        warn(f"{lang}: {len(todo)} rows aligned, {len(given)} keep the links that they had{score}")


def demonstrate():
    texts = ("das haus", "the house"), ("das buch ist neu", "the book is new"), ("das haus ist alt", "the house is old")
    pairs = [(a.split(), b.split()) for a, b in texts]
    for (a, b), links in zip(pairs, align_bitext(pairs)):
        print("\n".join(f"{'':8}{'  ' * j}{word}" for j, word in enumerate(b)))
        for i, word in enumerate(a):
            print(f"{word:>6}  " + " ".join(".#"[(i, j) in links] for j in range(len(b))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", help="FILE.pairs, or a manifest IN.jsonl; nothing: a demonstration")
    parser.add_argument("-o", "--out", help="the manifest to write")
    parser.add_argument("--train", nargs="+", default=[], metavar="FILE.pairs", help="more text to learn from")
    parser.add_argument("--gold", help="`i-j` sure, `ipj` possible: print the alignment error rate to standard error")
    parser.add_argument("--method", choices=METHODS, default=Recipe.method, help="how the two directions are joined")
    parser.add_argument("--model", help="link by this encoder instead: a name for transformers, or its folder")
    parser.add_argument("--times", help="a checkpoint RUN/model.pt, a CTM, or a folder of TextGrids named by row id")
    options = parser.parse_args()
    aligner = (partial(contextual_links, name=options.model) if options.model else
               partial(align_bitext, recipe=Recipe(method=options.method)))
    if not options.input:
        demonstrate()
    elif options.input.endswith(".jsonl"):
        from serialize import read_manifest, write_manifest
        rows = read_manifest(options.input) if options.out else parser.error("a manifest needs -o OUT.jsonl")
        add_links(rows, aligner)
        if options.times:
            runpy.run_path(str(Path(__file__).with_name("tests") / "word_times.py"))["add_times"](rows, options.times)
        write_manifest(options.out, rows)
    else:
        pairs = read_pairs(options.input)
        links = aligner(pairs + [pair for path in options.train for pair in read_pairs(path)])[:len(pairs)]
        print("\n".join(" ".join(f"{i}-{j}" for i, j in pair) for pair in links))
        if options.gold:
            sure, possible = read_gold(options.gold, pairs)
            warn(f"AER {100 * aer(links[:len(sure)], sure, possible):.1f}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"align.py: {error}")
