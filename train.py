"""From nothing, or from a manifest of your own speech, to a model that streams: the loop, and all
that it needs.

    python train.py                                a corpus that it makes itself, on a laptop
    python train.py train.jsonl --dev dev.jsonl    real speech (format of the rows: serialize.KINDS)
    python train.py --resume runs/de-en            go on where a run stopped
    torchrun --nproc_per_node=4 train.py ...       the same on four GPUs, or on more machines

Read `learn` and `train_step` first: the loop and one step of it. Then come the tasks and their
losses, Muon, what the model hears, where a run is kept, several processes, the built-in corpus, and
at the end the command line.

A transducer on a small grammar falls into a trap: its label encoder knows the grammar long before
its encoder can hear, so it learns to write everything in the first frame, guessed, and the sound is
ignored from then on. Warm-up keeps it out. The first half of it has one task: a CTC head spells the
letters that the encoder hears (units that words share are learned in minutes). The second half adds
two, still without the transducer loss; each can be solved by one side alone:
  - CTC also through the joint's own output layer, as if there were no labels, with the
    transcription as target (or the translation, if a model is to write that alone): so when the
    transducer starts, the joint already writes every word when it is heard;
  - the label encoder learns, as a language model, what comes next: word order and translation.
The joint starts deaf to labels (label_proj is zero), and when the transducer starts all labels are
hidden from the label encoder, then fewer. While this was built, models without the second task
stayed in the trap, and one without the third heard as well but had nine times the errors in its
translation (32.7 % against 3.7 % after 1500 steps, with AdamW).
"""
from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C while the imports run: no traceback
    # numpy's matrix products make batches beside the step: on two cores, threads of their own
    # would take five times as long, and the cores from the step.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import atexit
import csv
import io
import json
import math
import shlex
import sys
import time
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import align
import stream
from align import add_links, align_bitext
from model import (HOP, PRESETS, SAMPLE_RATE, InputError, Transducer, features, load, save,
                   too_little_memory)
from rnnt_loss import joint_rnnt_loss, prune_band, runs_on_gpu, simple_rnnt_loss
from serialize import InputError as TextError
from serialize import (ASR, MOST_TOLD, SEPARATOR, Row, Tokenizer, check_mode, interleave, mode_of,
                       needs, project_times, read_manifest, serialize, word_by_word, write_manifest)
from stream import STOPS, Outlived, evaluate, read_audio, readable, resample
from stream import say as tell        # `say` speaks a sentence, below

USER_ERRORS = InputError, TextError, align.InputError, OSError, ImportError  # told in one line
CLIP = 5.0            # largest norm of a step's gradient
MUON = 10             # learning rate of the matrices over that of all else
PARTS = dict(qkv=3, gate=2)  # layers that are several matrices in one, for Muon
WARM_UP = 100         # steps until the learning rate is at its peak
DECAY = 0.5           # share of the steps, the last ones, over which it falls
FORGET_STEPS = 150    # transducer steps over which ever fewer labels are hidden
SIDE_WEIGHT = 0.3     # of each side task, beside the transducer's 1
LOG_EVERY = 50        # steps; only then are losses fetched from the device
SAVE_EVERY = 600      # seconds between two checkpoints, at most, and a step: what a crash costs
MEET_S = 600          # seconds for the processes of a run to find each other
GIVE_UP = 20          # steps in a row that learned nothing: no finite gradient, or no sound
TAIL = 0.32           # seconds of silence that what is learned ends in, and that the search appends
KEPT_S = 18_000       # seconds of decoded sound that are kept in memory: 1.2 GB
LINKS_HERE = 50_000   # rows that are still aligned at the start of a run, where links lack
BPE_ROWS = 50_000     # rows that the tokenizer learns from, at most
TEST_SIZE = 200       # built-in utterances to evaluate on
TASKS = ("transducer", "simple", "letters", "words", "next_label")


# ---- Options: a line each, from which the flags and --help are made ------------------------------

def option(default, text, *, kind=None, low=None, high=None, choices=None):
    """A field of Options; `low` and `high` bound the values allowed, None where nothing does (no
    high without a low)."""
    metadata = dict(text=text, kind=kind or type(default), low=low, high=high, choices=choices)
    return field(default=default, metadata=metadata)


@dataclass
class Options:
    manifest: str = option("", "JSON lines of real speech; without it, the built-in corpus")
    dev: str = option("", "manifest to evaluate on; its rows need no links")
    corpus: str = option(
        "de-en", "languages of the built-in corpus: de-en, en-de,es,it or de,es,it-en")
    preset: str = option(
        "tiny", "size of the network, in million parameters: tiny 2, small 12, paper 139",
        choices=sorted(PRESETS))
    interleave: str = option(
        "align", "the order of both texts: align (by links), time (by times) or ratio:G, G from 0 "
        "to 1; or one text alone: asr, st")
    init: str = option("", "start from the weights of this model.pt, as far as they fit")
    resume: str = option(
        "", "go on with the run in this folder, with its options; those given here win")
    out: str = option("", "folder of the run; runs/NAME, numbered where that exists")
    seed: int = option(0, "of every random draw", low=0, high=2 ** 32 - 1)
    steps: int = option(1200, "updates of the weights", low=1)
    warm_steps: int = option(370, "of these, before the transducer loss starts", low=0)
    batch_seconds: float = option(
        42.0, "sound in a batch, padding included; a longer stream is a batch of its own", low=0.1)
    accumulate: int = option(1, "batches in an update, on each process", low=1)
    lr: float = option(2e-3, "peak learning rate", low=0, high=1)
    chunks: tuple = option(
        (), "chunk sizes in frames, one drawn per update (default: the preset's)")
    dropout: float = option(None, "(default: the preset's)", kind=float, low=0, high=0.99)
    label_dropout: float = option(
        0.1, "share of labels hidden from the label encoder", low=0, high=1)
    merges: int = option(100, "BPE merges of the vocabulary", low=0)
    prune: int = option(
        16, "labels that a frame may be at, in the transducer loss: a band (0: all, as by default "
        "with --restrict and for every order but align and time)", low=0)
    restrict: float = option(
        0.0, "where rows have times (align.py --times), write a word from its end until so many "
        "seconds later (0: at any time); 0.8 was surer in noise on the built-in corpus, and wrote "
        "Mboshi's words twice", low=0)
    blank_penalty: float = option(
        0.5, "nats taken off blank in the search: labels hidden in training leave it too likely",
        low=-100, high=100)
    fastemit: float = option(0.0, "FastEmit's lambda (arXiv 2010.11148)", low=0)
    delay_penalty: float = option(0.0, "the penalty of arXiv 2211.00490", low=0)
    augment: float = option(
        1.0, "share of streams that noise, telephones, codecs and SpecAugment disturb", low=0,
        high=1)
    join: int = option(3, "utterances joined into one stream, at most", low=1)
    noise: str = option("", "folder of noises to mix in")
    max_seconds: float = option(
        30.0, "rows of a manifest that are longer are left out, and joining stops there, pauses "
        "not counted",
        low=0.1)
    workers: int = option(0, "processes that prepare sound (0: a thread)", low=0)
    eval_every: int = option(600, "updates between two evaluations", low=1)
    device: str = option("", "cpu or cuda (default: cuda where there is one)")
    allow_outside: bool = option(False, "audio may lie outside the manifest's folder")
    strict: bool = option(False, "stop at the first bad row instead of leaving it out")


REAL = dict(steps=12000, warm_steps=3400, label_dropout=0.25, blank_penalty=0.75, merges=240,
            augment=0.2, eval_every=2000)
KEPT = "resume.pt", "model.pt", "best.pt", "metrics.json"   # of a run, in its folder
FIXED = "corpus", "preset", "interleave", "init", "seed", "merges"   # what a checkpoint decides


# ---- The loop ------------------------------------------------------------------------------------

@dataclass
class Run:
    """What a checkpoint holds and a step changes."""
    model: Transducer
    tokenizer: Tokenizer
    letters: str              # the alphabet of the CTC head, class 0 being its blank
    optimizers: list
    step: int = 0             # updates done
    position: tuple = (0, 0)  # epoch and batch in it that come next
    best: float = -1.0        # the highest mean chrF on the development set so far
    streams: tuple = ()       # tags of what is learned: not of translations, by --interleave asr


def train(options):
    """The whole run, new or resumed -> its folder and whether it was stopped before its end, the
    last evaluation included."""
    ranks = Ranks.here(options.device)
    options = replace(options, device=ranks.device)
    for name, read in {"dev": ranks.first, "init": not options.resume}.items():
        path = getattr(options, name)
        if ranks.agree(bool(read and path and not os.path.exists(path))):
            raise InputError(f"{flag(name)} {path}: no such file")         # before hours of reading
    # What the loss needs on a GPU, it says now.
    runs_on_gpu(torch.device(options.device), torch.float32)
    folder = run_directory(options, ranks)
    with locked(folder, ranks.first):
        with ranks.only_first_speaks():
            if ranks.first:            # of a run that was killed as it saved
                for half_written in folder.glob("*.pt.*.tmp"):
                    half_written.unlink(missing_ok=True)
            run = resume_run(options) if options.resume else None
            corpus, dev = open_corpus(options, ranks.first, run and run.tokenizer)
            run = run or new_run(options, corpus)
            run.streams = learned_streams(corpus, options)
            ranks.begin_alike(run, corpus)
            if options.resume:         # a new run has its letters from these rows
                warn_of_letters(run, corpus)
            warn_of_unseen(run, dev)
        learn(run, corpus, dev, options, ranks, folder)
    if ranks.world > 1:
        dist.destroy_process_group()
    owed = ranks.first and evaluation_owed(run.step, options, folder)
    return folder, run.step < options.steps or owed


def learn(run, corpus, dev, options, ranks, folder):
    """The loop: steps, and now and then an evaluation and a checkpoint."""
    source = Source(options, run)
    if ranks.first:
        announce(run, source, corpus, options, ranks, folder)
    log = Log(folder, run.step, ranks)
    with StopSignal() as stop:
        left, saved = run.step < options.steps, time.monotonic()
        if ranks.first and left and evaluation_owed(run.step, options, folder):
            milestone(run, dev, options, folder, log, stop)
        left = left and not ranks.agree(stop.wanted)
        with (Batches(source, corpus, run, options, ranks) as batches,
              saved_whatever_ends_it(run, options, folder, log, ranks)):
            for group in batches if left else ():              # those of one step on this process
                numbers = train_step(run, group, options, ranks)
                log.add(run, group, numbers, batches.waited)
                if ranks.agree(stop.wanted) or run.step >= options.steps:
                    break
                evaluates = run.step % options.eval_every == 0
                if ranks.first and (evaluates or time.monotonic() - saved > SAVE_EVERY):
                    try:
                        if evaluates:
                            milestone(run, dev, options, folder, log, stop)
                        else:
                            save_run(run, options, folder, log)
                    except OSError as error:                   # a disk that is full for a while
                        left_out = f"; step {run.step} is not evaluated" * evaluates
                        tell(f"train.py: {error}; the run goes on and saves again later{left_out}")
                    saved = time.monotonic()
                # Ended amid an evaluation, it stays at this step, whose evaluation is owed.
                if evaluates and ranks.agree(stop.wanted):
                    break
            # Before the batches end, for which a batch system that stops the run may not wait.
            log.close(run)
            if ranks.first and run.step == options.steps:
                milestone(run, dev, options, folder, log, stop)
            elif ranks.first:
                save_run(run, options, folder, log)


def train_step(run, batches, options, ranks):
    """One update of run, of which `batches` are this process's part -> numbers on the device, by
    name.

    Every task is the sum of its losses over the sum of its target symbols, in all batches of all
    processes: so the counts are added up before the first backward pass, the gradients after the
    last one, and it makes no difference into how many pieces a step was cut.
    """
    model, device = run.model.train(), options.device
    shared = [options.seed, run.step]
    # Dropout is a function of the step, so that a resumed run is exact (on a CPU: a GPU adds up
    # some gradients in an order of its own).
    torch.manual_seed(seed_of(*shared, ranks.rank))
    chunk = int(generator(*shared, "chunk").choice(model.config.chunks))
    set_learning_rates(run.optimizers, run.step, options)
    symbols = [sum(batch["symbols"][task] for batch in batches) for task in TASKS]
    counts = dict(zip(TASKS, ranks.add_numbers(symbols)))
    weights = tasks(run.step, options, counts["letters"] > 0)
    sums = torch.zeros(len(weights), device=device)
    for batch in (b for b in batches if b["mel_frames"]):
        each = losses(model, to_device(batch, device), list(weights), run.step, options, chunk)
        sum(weights[task] * loss / max(1, counts[task]) for task, loss in each.items()).backward()
        sums += torch.stack([loss.detach().float() for loss in each.values()])
    ranks.add_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    # A wait for the GPU; others are in the band of --prune. A step that overflows is dropped,
    # and so is one that heard nothing.
    learned = bool(torch.isfinite(norm) & (norm > 0))
    for optimizer in run.optimizers:
        if learned:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step, run.position = run.step + 1, batches[-1]["after"]
    sums = dict(zip(weights, ranks.add(sums)))
    return {task: total / max(1, counts[task]) for task, total in sums.items()} | {
        "gradient_norm": norm, "learned": learned}


# ---- The tasks of a step -------------------------------------------------------------------------

def tasks(step, options, letters=True):
    """{task: weight} of what is learned at this step; `letters`, whether its streams have any to
    spell: rows with translations only have none."""
    if letters and step < options.warm_steps // 2:
        return {"letters": 1.0}
    sides = ["letters", "words", "next_label"]
    if step < options.warm_steps:
        return dict.fromkeys(sides, 1.0)
    sides = dict.fromkeys(sides, SIDE_WEIGHT)
    if not options.prune:
        return {"transducer": 1.0} | sides
    # As the authors of the pruned loss do: first learn where to look.
    begun = min(1.0, (step - options.warm_steps) / FORGET_STEPS)
    return {"transducer": 0.1 + 0.9 * begun, "simple": 1 - 0.5 * begun} | sides


def losses(model, batch, names, step, options, chunk=None):
    """{task: nats, summed over the batch} for the tasks named, in this order; on a GPU in bfloat16
    where that is safe."""
    kind = batch.mel.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
        found = task_losses(model, batch, names, step, options, chunk)
    return {name: found[name] for name in names}


def task_losses(model, batch, names, step, options, chunk):
    """See `losses`.

    The transducer's is -log P(targets | sound) under the logits of `Transducer.forward`, which are
    never formed: the loss is fused with the joint network, and bytes that no text has, most of the
    256, are left out of it (`silence_unused`). With --prune it looks only at the nodes of a band,
    which a simple transducer finds (arXiv 2206.13236): what is heard without labels plus what is
    expected without sound, learned beside it.
    """
    frames, _ = model.encoder(batch.mel, batch.mel_lengths, chunk=chunk)                  # (B,T,D)
    frame_lengths = batch.mel_lengths // model.config.subsampling
    found = {}
    if "letters" in names:
        found["letters"] = ctc_loss(
            model.ctc(frames), frame_lengths, batch.letters, batch.letters_lengths)
    if {"words", "simple", "transducer"} & set(names):
        heard = model.joint.encoder_proj(frames)                                          # (B,T,J)
    if {"next_label", "simple", "transducer"} & set(names):
        forgotten = batch.chance < label_dropout(step, options)                           # (B,U)
        shown = torch.where(forgotten, model.config.vocab, batch.targets)
        labels, _ = model.label_encoder(shown)
    if {"words", "simple"} & set(names):       # what the joint hears where there are no labels
        alone = model.joint.combine(heard, heard.new_zeros(()))                           # (B,T,V)
    if "words" in names:
        found["words"] = ctc_loss(alone, frame_lengths, batch.words, batch.words_lengths)
    if "next_label" in names:
        found["next_label"] = language_loss(model, labels, batch.targets, batch.targets_lengths)
    keep, classes = batch.keep, batch.classes
    if {"simple", "transducer"} & set(names):
        targets = torch.searchsorted(classes, batch.targets)   # their places among the classes
    if "simple" in names:
        found["simple"], posteriors = simple_rnnt_loss(
            alone[..., classes], next_label_scores(model, labels)[..., classes], targets,
            frame_lengths, batch.targets_lengths,
            blank=0, reduction="sum")
        keep = prune_band(posteriors, frame_lengths, batch.targets_lengths, options.prune)
    if "transducer" in names:
        joint = model.joint
        found["transducer"] = joint_rnnt_loss(
            heard, joint.label_proj(labels), joint.output.weight[classes],
            joint.output.bias[classes], targets, frame_lengths, batch.targets_lengths,
            blank=0, reduction="sum", keep=keep,
            fastemit_lambda=options.fastemit, delay_penalty=options.delay_penalty)
    return found


def used_classes(tokenizer):
    """The ids that text like the training text is written with: all but the bytes that it lacks."""
    first = tokenizer.first_byte
    seen = {first + byte for byte in tokenizer.alphabet.encode() + SEPARATOR}
    return [k for k in range(len(tokenizer)) if not first <= k < first + 256 or k in seen]


@torch.no_grad()
def silence_unused(model, tokenizer):
    """Bytes that no text has get a probability of e^-30 or so. It is what they would be taught, and
    the loss, whose time grows with the classes, need not look at them."""
    unused = torch.ones(len(tokenizer), dtype=torch.bool)
    unused[used_classes(tokenizer)] = False
    model.joint.output.weight[unused] = 0
    model.joint.output.bias[unused] = -30


def label_dropout(step, options):
    """The share of labels that the label encoder does not get to see: all of them when the
    transducer starts, so that it must listen to write anything at all, then fewer and fewer."""
    left = 1 - (step - options.warm_steps) / FORGET_STEPS
    return max(options.label_dropout, left) if step >= options.warm_steps else options.label_dropout


def ctc_loss(logits, frame_lengths, targets, target_lengths):
    """Summed over the utterances that have a target (Graves et al., ICML 2006)."""
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)                            # (T,B,V)
    costs = F.ctc_loss(log_probs, targets, frame_lengths, target_lengths,
                       blank=0, reduction="none", zero_infinity=True)                     # (B,)
    return (costs * (target_lengths > 0).to(costs.device, non_blocking=True)).sum()


def next_label_scores(model, labels):
    """The label encoder as a language model: (B,U1,D) -> (B,U1,V), scored against its own
    embeddings."""
    # Without the embedding of a forgotten label, which comes last.
    known = model.label_encoder.embedding.weight[:model.config.vocab]
    return labels @ known.T / model.config.dim ** 0.5


def language_loss(model, labels, targets, target_lengths):
    """Cross entropy of the next label given those before it, the ones shown: word order and
    translation are learned from this long before the transducer's gradient would teach them."""
    positions = torch.arange(targets.shape[1], device=targets.device)
    present = positions < target_lengths.to(targets.device, non_blocking=True)[:, None]
    scores = next_label_scores(model, labels[:, :-1])                                     # (B,U,V)
    costs = F.cross_entropy(scores.float().transpose(1, 2), targets, reduction="none")    # (B,U)
    return (costs * present).sum()


# ---- Optimisers ----------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon).

    For a gradient G = U S V', five Newton-Schulz iterations X <- a X + (b A + c A^2) X, A = X X',
    pull all singular values of G / |G| towards 1, so that U V' is learned: no direction of a matrix
    waits for the others. They run in the parameters' type, not in bfloat16, which most laptops
    emulate, and on all matrices of one shape at once. A parameter that holds several matrices, one
    below the other, is updated in so many `parts`.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01, parts=1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      parts=parts))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    grad = self.with_momentum(p, group["momentum"])
                    for pair in zip(p.chunk(group["parts"]), grad.chunk(group["parts"])):
                        shapes.setdefault(pair[0].shape, []).append(pair)
            for (rows, columns), pairs in shapes.items():
                factor = group["lr"] * max(1, rows / columns) ** 0.5
                updates = orthogonalised(torch.stack([grad for _, grad in pairs]))
                for (matrix, _), update in zip(pairs, updates):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-factor)

    def with_momentum(self, p, momentum):
        """Nesterov's: the running mean of the gradients, and a look one step ahead."""
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p)
        return p.grad.lerp(state["mean"].lerp_(p.grad, 1 - momentum), momentum)


def orthogonalised(matrices, iterations=5):
    """(n,rows,columns) -> the same with all singular values between about 0.7 and 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    # Each iteration multiplies X by a polynomial of A = X X'. These commute, so X itself, the only
    # matrix that is not small and square, is needed twice: for the first A, and at the end.
    square = x @ x.mT
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for k in range(iterations):
        square = factor @ square @ factor if k else square
        factor = 3.4445 * identity - 4.775 * square + 2.0315 * square @ square
        product = factor @ product if k else factor
    x = product @ x
    return x.mT if tall else x


def make_optimizers(model, options):
    """Muon for the matrices of the two encoders, AdamW for all else: on real speech, CTC on letters
    then needs half the steps."""
    matrices = {name: p for name, p in model.named_parameters()
                if p.dim() == 2 and name.endswith("weight")
                and name.startswith(("encoder", "label_encoder")) and "embedding" not in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    groups = {}
    for name, p in matrices.items():
        groups.setdefault(PARTS.get(name.split(".")[-2], 1), []).append(p)
    return [Muon([dict(params=own, parts=parts) for parts, own in groups.items()],
                 lr=MUON * options.lr),
            torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)]


def set_learning_rates(optimizers, step, options):
    for optimizer, peak in zip(optimizers, (MUON * options.lr, options.lr)):
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate(step, options.steps)


def learning_rate(step, steps):
    """A factor: up in a line, level, and down in a line. While it is level a run can be made
    longer; after that, with more steps it would rise at once to where theirs is."""
    return min(1.0, (step + 1) / WARM_UP, max(0.02, (steps - step) / (DECAY * steps)))


# ---- What the model hears: rows -> streams -> sound -> features -> batches -----------------------
# Every draw is seeded, by epoch and row or by step, so a resumed run, more worker processes and
# more GPUs see the same.

ALONE = 0.4           # share of streams that have one utterance; the others draw 1 to --join
BEFORE = 0.1          # share of streams with silence, up to PAUSE, before the first word
PAUSE = 5.0           # seconds of silence between two utterances, at most; most are far shorter
VOICES = 0.15         # share of disturbed streams with other speakers in the background
SPEAKERS = 5          # how many
SPEEDS = 0.9, 1.0, 1.1   # of recorded speech (Ko et al., Interspeech 2015)


@dataclass
class Stream:
    """What is heard in one piece: utterances one after the other, and what lies under them."""
    rows: list
    pauses: list                # seconds of silence before each
    background: list            # rows of other speakers
    speed: float
    seconds: float              # in all, about


@dataclass
class Request:
    """A batch to be made. Nothing else travels to a worker process: it holds no manifest."""
    streams: list
    epoch: int
    after: tuple                # (epoch, batch) that follows this one
    easy: bool                  # undisturbed, but for pauses and speed: what cannot hear yet learns
                                # nothing from noise


def generator(*key):
    return np.random.default_rng([zlib.crc32(str(k).encode()) for k in key])


def seed_of(*key):
    return zlib.crc32(" ".join(map(str, key)).encode())


def epoch_streams(corpus, epoch, options):
    """The rows of one epoch, joined: those that share a file in their order, others as they
    come."""
    rows, rng = corpus.rows(epoch), generator(options.seed, epoch, "streams")
    following = neighbours(rows)
    # (A dict would look for its last key through all that were deleted.)
    unused = OrderedDict.fromkeys(rng.permutation(len(rows)).tolist())
    while unused:
        wanted = 1 if rng.random() < ALONE else rng.integers(1, options.join + 1)
        chosen, seconds, k = [], 0.0, None
        while unused and len(chosen) < wanted:
            k = following.get(k)                               # the next one of the same file
            if k not in unused:
                k = next(reversed(unused))
            more = corpus.seconds(rows[k])
            if chosen and seconds + more > options.max_seconds:
                break
            del unused[k]
            seconds += more
            chosen.append(rows[k])
        yield draw_stream(chosen, seconds, rows, rng, options)


def neighbours(rows):
    """{index of a row: index of the row that follows it in the same file}."""
    files = {}
    for k, row in enumerate(rows):
        if row.audio:
            files.setdefault(row.audio, []).append(k)
    following = {}
    for same in files.values():
        same.sort(key=lambda k: rows[k].start)
        following.update(pairwise(same))
    return following


def draw_stream(chosen, seconds, rows, rng, options):
    pauses = [PAUSE * x ** 6 for x in rng.random(len(chosen)).tolist()]      # 0.7 s on average
    augmented = options.augment > 0
    pauses[0] = PAUSE * rng.random() if augmented and rng.random() < BEFORE else 0
    loud = augmented and rng.random() < VOICES
    others = [rows[k] for k in rng.integers(len(rows), size=SPEAKERS)] if loud else []
    speed = float(rng.choice(SPEEDS)) if augmented and chosen[0].audio else 1.0
    return Stream(chosen, pauses, others, speed, (seconds + sum(pauses)) / speed)


def epoch_batches(corpus, epoch, options):
    """Streams of about equal length together, --batch-seconds of them with their padding; batches
    in random order."""
    rng = generator(options.seed, epoch, "batches")
    streams = list(epoch_streams(corpus, epoch, options))
    streams.sort(key=lambda s: s.seconds)
    batches = [[]]
    for s in streams:                                          # s is the longest so far
        if batches[-1] and s.seconds * (len(batches[-1]) + 1) > options.batch_seconds:
            batches.append([])
        batches[-1].append(s)
    return [batches[k] for k in rng.permutation(len(batches))]


def requests(corpus, run, options, ranks):
    """This process's batches, for ever, from the run's position on."""
    (epoch, first), count, begun = run.position, 0, run.step
    while True:
        batches = epoch_batches(corpus, epoch, options)
        # A step ends with the last process's batch, in this epoch or the next: its end is saved.
        others = ranks.world - 1 - ranks.rank
        for k in range(first, len(batches)):
            step = begun + count // (ranks.world * options.accumulate)
            easy = not options.augment or step < options.warm_steps // 2
            if count % ranks.world == ranks.rank:
                yield Request(batches[k], epoch, (epoch, k + 1 + others), easy)
            count += 1
        epoch, first = epoch + 1, max(0, first - len(batches))


SUFFIXES = ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .caf .au .rf64".split()


def noise_files(folder):
    files = sorted(str(path) for path in Path(folder).rglob("*")
                   if path.suffix.lower() in SUFFIXES and path.is_file())  # no pipe: it would wait
    if not files:
        raise InputError(f"--noise {folder}: no file called {', '.join(SUFFIXES)} in this folder")
    return files


class Source(torch.utils.data.Dataset):
    """Makes batches of what it is asked for, in this process or in a worker's."""

    def __init__(self, options, run):
        self.options, self.tokenizer, self.config = options, run.tokenizer, run.model.config
        self.classes = torch.tensor(used_classes(run.tokenizer))
        self.letter = {c: 1 + k for k, c in enumerate(run.letters)}
        self.noises = noise_files(options.noise) if options.noise else []
        self.kept, self.room = {}, 0 if options.workers else KEPT_S * SAMPLE_RATE

    def __getitem__(self, request):
        examples, bad = [], []
        for s in request.streams:
            sounds = [self.heard(row, bad) for row in s.rows]
            heard = [k for k, samples in enumerate(sounds) if samples is not None]
            if heard:
                left = replace(s, rows=[s.rows[k] for k in heard],
                               pauses=[s.pauses[k] for k in heard])
                examples.append(self.example(left, [sounds[k] for k in heard], request, bad))
        batch = collate(examples) if examples else {}
        if examples:       # text that the tokenizer did not learn from may have a byte more
            batch["classes"] = torch.unique(torch.cat([self.classes, batch["targets"].flatten()]))
        count = lambda name: int(batch[f"{name}_lengths"].sum()) if examples else 0
        symbols = {
            "transducer": count("targets"),
            "simple": count("targets"),
            "letters": count("letters"),
            "words": count("words"),
            "next_label": count("targets"),
        }
        return batch | {
            "symbols": symbols,
            "after": request.after,
            "bad": bad,
            "mel_frames": count("mel"),
            "rows": [row.where for s in request.streams for row in s.rows],
        }

    def example(self, s, sounds, request, bad):
        """One stream and the samples of its rows -> mel (F,80); targets, the interleaved stream;
        words, the transcription alone (the translation, where that is all there is to write);
        letters, the transcription as classes of the CTC head; chance, what decides whether a label
        is hidden; keep, see `lattice`."""
        options, rng = self.options, generator(self.options.seed, request.epoch, s.rows[0].id)
        samples, starts = joined(s, sounds)
        disturbed = not request.easy and rng.random() < options.augment
        if disturbed:
            samples = disturb(samples, self.background(s, len(samples), rng, bad), rng)
        mel = mel_of(samples, self.config)
        if disturbed:
            floor = math.log(self.config.floor)
            mel = without_bands(through_codec(mel, rng, floor), rng, floor)
            if s.rows[0].audio:        # a voice that never repeats itself needs no such help
                mel = without_stretches(mel, rng)
        modes = [mode_of(row, options.interleave) for row in s.rows]
        pairs = [interleave(row, mode) for row, mode in zip(s.rows, modes)]
        targets = serialize([pair for own in pairs for pair in own], self.tokenizer)
        # Where one of them has no transcription, letters cannot say what is heard there.
        spoken = " ".join(row.asr for row in s.rows) if all(row.asr for row in s.rows) else ""
        words = [" ".join(word for _, word in own) if mode == "st" else row.asr
                 for row, mode, own in zip(s.rows, modes, pairs)]
        n_frames = len(mel) // self.config.subsampling
        return dict(
            mel=mel,
            targets=targets,
            words=if_it_fits(self.tokenizer.encode(" ".join(words)), n_frames),
            letters=if_it_fits([self.letter[c] for c in spoken if c in self.letter], n_frames),
            chance=torch.from_numpy(rng.random(len(targets), np.float32)),
            keep=self.lattice(s, pairs, starts, n_frames, len(targets)))

    def sound_of(self, row, keep=True):
        """The samples of a row. Those of the first files are kept, up to KEPT_S: a small corpus is
        decoded once. (Not in worker processes: a row comes back to the same one by chance only.)"""
        key = row.audio, row.start, row.duration
        if key in self.kept:
            return self.kept[key]
        samples = sound_of(row, self.options.seed)
        if keep and row.audio and len(samples) <= self.room:
            self.kept[key], self.room = samples, self.room - len(samples)
        return samples

    def heard(self, row, bad):
        """The samples of a row, or None and why in `bad`."""
        try:
            return self.sound_of(row)
        except USER_ERRORS as error:
            bad.append(f"{row.where}: {error}")

    def background(self, s, n, rng, bad):
        """Other speakers, or a piece of a noise file, or None; n samples."""
        if s.background:
            voices = [self.heard(row, bad) for row in s.background]
            voices = [np.resize(voice, n) for voice in voices if voice is not None]
            levelled = [voice / (np.sqrt(np.mean(voice ** 2)) + 1e-9) for voice in voices]
            return sum(levelled) if levelled else None
        if self.noises and rng.random() < 0.5:
            path = self.noises[rng.integers(len(self.noises))]
            row = Row(id=path, audio=path, where=path)
            start = rng.random() * (stated_seconds(path) - n / SAMPLE_RATE)
            if start > 0:              # of an hour of noise no more is decoded than what is heard
                row.start, row.duration = start, n / SAMPLE_RATE
            try:
                noise = self.sound_of(row, keep=start <= 0)
                return np.resize(np.roll(noise, -rng.integers(len(noise))), n)
            except USER_ERRORS as error:       # a piece may be silent, and its file is not bad
                if start <= 0 or not isinstance(error, stream.SilentError):
                    bad.append(f"{path}: {error}")

    def lattice(self, s, pairs, starts, n_frames, n_labels):
        """keep (T,U1): the nodes of the lattice that the loss looks at; None: all, or those of the
        band that --prune finds."""
        options = self.options
        if options.prune or options.join == 1 and not options.restrict:
            return None
        times = self.label_times(s, pairs, starts) if options.restrict else None
        if times is None:
            return self.blocks(pairs, starts, n_frames, n_labels)
        return around(times, n_frames, self.config.frame_s, options.restrict)

    def label_times(self, s, pairs, starts):
        """For each label, when its word has been said, in s (of a translated word: when it could
        be); None where a row has no times."""
        times = []
        for row, own, start in zip(s.rows, pairs, starts):
            known = known_times(row)
            if any(known[tag] is None for tag, _ in own):
                return None
            ends = {tag: iter(known[tag]) for tag, _ in own}
            # A word without a time can be written when the one before it can (see `around`).
            times += [start / SAMPLE_RATE + (next(ends[tag]) or 0) / s.speed for tag, _ in own]
        written = word_by_word([pair for own in pairs for pair in own], self.tokenizer)
        return np.repeat(times, [len(ids) for ids in written])

    def blocks(self, pairs, starts, n_frames, n_labels):
        """keep (T,U1): while an utterance is heard, and one chunk longer, its labels are written
        and no others. So the lattice of joined utterances grows with their number, and not with its
        square."""
        keep = torch.zeros(n_frames, n_labels + 1, dtype=torch.bool)
        frame_samples, margin = HOP * self.config.subsampling, max(self.config.chunks)
        label, frame = 0, 0
        for k in range(len(starts)):
            through = [pair for own in pairs[:k + 1] for pair in own]
            after = len(serialize(through, self.tokenizer))
            last = k + 1 == len(starts)
            until = len(keep) if last else starts[k + 1] // frame_samples
            keep[frame:max(until + margin, frame + 1), label:after + 1] = True
            label, frame = after, until
        return keep


def known_times(row):
    """{tag: times of its words, or None}, those of a translation through the links where they
    lack."""
    row = replace(row, st_times=dict(row.st_times))
    project_times(row)
    return {ASR: row.times} | {f"<st:{lang}>": row.st_times.get(lang) for lang in row.st}


def around(times, n_frames, frame_s, after):
    """keep (T,U1) for labels of words that end at `times` (U,), in s: each is written from the
    frame in which its word ends, not before it is known, until `after` seconds later
    (alignment-restricted transducer, arXiv 2011.03072)."""
    times = np.maximum.accumulate(times)                       # none before the one it follows
    # A time on the border of two frames, as a Viterbi path's all are, is the end of the first.
    first = np.clip(np.ceil(times / frame_s - 1e-6) - 1, 0, n_frames - 1).astype(int)
    last = np.maximum(first, ((times + after) / frame_s).astype(int))
    frame = np.arange(n_frames)[:, None]
    # Row u begins with label u - 1, which leads to it, and ends with label u, which leaves it.
    begun, over = np.append(0, first), np.append(last, n_frames)
    return torch.from_numpy((frame >= begun) & (frame <= over))


def joined(s, sounds):
    """-> samples of the whole stream, and where each utterance starts, counted in samples. Behind
    recorded speech is the silence that the search will append."""
    parts, starts, at = [], [], 0
    for own, pause in zip(sounds, s.pauses):
        if s.speed != 1:
            own = resample(own, round(SAMPLE_RATE * s.speed), SAMPLE_RATE)
        silence = np.zeros(round(pause * SAMPLE_RATE), np.float32)
        starts.append(at + len(silence))
        at += len(silence) + len(own)
        parts += [silence, own]
    if s.rows[-1].audio:               # cut where its last word ended, as a rule; the voice is not
        parts.append(np.zeros(round(TAIL * SAMPLE_RATE), np.float32))
    return np.concatenate(parts), starts


def sound_of(row, seed):
    """The samples of a row: of its file, or of the built-in voice where it has none."""
    if not row.audio:
        return speak_row(row, seed)[0]
    return read_audio(row.audio, row.start, row.duration)


def stated_seconds(path):
    """What the header of a file says of its length; 0 where it says nothing."""
    import soundfile
    try:
        with open(path, "rb") as file:         # soundfile itself wants names that are UTF-8
            info = soundfile.info(file)
    except (soundfile.SoundFileError, OSError):
        return 0.0
    return info.duration if info.frames < stream.UNKNOWN else 0.0


def mel_of(samples, config):
    return features(torch.from_numpy(np.asarray(samples, np.float32)), config)            # (F,80)


def if_it_fits(symbols, n_frames):
    """A target for CTC; none where it has no path for so many: between two equal neighbours it
    needs a blank, and so a frame more."""
    repeats = sum(a == b for a, b in pairwise(symbols))
    return symbols if len(symbols) + repeats <= n_frames else []


def collate(examples):
    """[{name: sequence}] -> {name: padded tensor (B, longest, ...), name_lengths: (B,)}."""
    batch = {"keep": None}
    for name in ("mel", "targets", "words", "letters", "chance"):
        items = [e[name] if torch.is_tensor(e[name]) else torch.tensor(e[name], dtype=torch.long)
                 for e in examples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
        batch[f"{name}_lengths"] = torch.tensor([len(item) for item in items])
    if examples[0]["keep"] is not None:
        T, U1 = (max(e["keep"].shape[axis] for e in examples) for axis in (0, 1))
        masks = [e["keep"] for e in examples]
        padded = [F.pad(m, (0, U1 - m.shape[1], 0, T - len(m))) for m in masks]
        batch["keep"] = torch.stack(padded)
    return batch


def to_device(batch, device):
    """A batch's tensors by name; lengths and keep stay on the CPU, where the loss wants them."""
    def placed(name, x):
        moves = torch.is_tensor(x) and not name.endswith("_lengths") and name != "keep"
        return x.to(device, non_blocking=True) if moves else x
    return SimpleNamespace(**{name: placed(name, x) for name, x in batch.items()})


def unchanged(batch):
    return batch


class Batches:
    """The batches of one step after the other, made ahead in a thread or by DataLoader's worker
    processes."""

    def __init__(self, source, corpus, run, options, ranks):
        self.accumulate, self.strict = options.accumulate, options.strict
        self.waited, self.told = 0.0, set()
        wanted = requests(corpus, run, options, ranks)
        workers = {}
        if options.workers:
            # Spawned: numba's threads do not survive a fork.
            workers = dict(multiprocessing_context="spawn", persistent_workers=True,
                           worker_init_fn=quiet_worker)
        self.loader = iter(torch.utils.data.DataLoader(
            source, batch_size=None, sampler=wanted, num_workers=options.workers,
            collate_fn=unchanged, pin_memory=options.device != "cpu", **workers))
        # One thread of its own: more would take the cores from the step that is learned meanwhile,
        # and add up in another order than a worker process.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)
        self.loader = None                                     # the workers end here, in order

    def __iter__(self):
        ahead = [self.pool.submit(next, self.loader) for _ in range(2)]
        while True:
            group = []
            for _ in range(self.accumulate):
                began = time.perf_counter()
                group.append(ahead.pop(0).result())
                self.waited += time.perf_counter() - began
                ahead.append(self.pool.submit(next, self.loader))
                self.tell(group[-1]["bad"])
            yield group

    def tell(self, bad):
        for message in bad:
            if self.strict:
                raise InputError(message)
            if message not in self.told:
                tell(f"{message}: left out")
            self.told.add(message)


def quiet_worker(_):
    """Ctrl-C and SIGHUP reach every process of a terminal, and SIGTERM all of a job; only the first
    is to act on them, and tells the workers when there is nothing left to do."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    # Else one of six died of a library's threads as it ended ("terminate called").
    atexit.register(os._exit, 0)


# ---- Sounds as people have them ------------------------------------------------------------------

def disturb(samples, background, rng):
    """Samples (N,) -> as they come out of a telephone, a codec, a noisy room, too loud or too
    soft."""
    power = np.mean(samples ** 2) + 1e-9
    if background is None and rng.random() < 0.5:
        background = coloured_noise(len(samples), rng)
    if background is not None:
        ratio = 10 ** (-rng.uniform(7, 30) / 10)               # noise over speech, in power
        scale = np.sqrt(ratio * power / (np.mean(background ** 2) + 1e-9))
        samples = samples + (scale * background).astype(np.float32)
    if rng.random() < 0.4:
        samples = low_pass(samples, rng.uniform(3400, 8000))
    if rng.random() < 0.15:
        samples = mu_law(samples)
    peak = np.abs(samples).max() + 1e-9
    return samples * np.float32(min(10 ** rng.uniform(-1, 0.5), 1 / peak))


def coloured_noise(n, rng):
    """Noise whose power falls with frequency to the power of 0 (white) to 2 (brown)."""
    size = fast_size(n)
    hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    shape = np.maximum(hz, 50) ** (-rng.uniform(0, 2) / 2)
    spectrum = np.fft.rfft(rng.standard_normal(size, np.float32))
    return np.fft.irfft(spectrum * shape.astype(np.float32), size)[:n]


def low_pass(samples, hz):
    size = fast_size(len(samples))
    spectrum = np.fft.rfft(samples, size)
    spectrum[round(hz * size / SAMPLE_RATE):] = 0
    return np.fft.irfft(spectrum, size)[:len(samples)].astype(np.float32)


def fast_size(n):
    """The next number whose prime factors are small: a Fourier transform of a prime size takes
    thirty times as long."""
    step = 1 << max(0, n.bit_length() - 4)                     # of 8 to 16 steps
    return -(-n // step) * step


def mu_law(samples):
    """8 bits a sample on a logarithmic scale, as telephones do (ITU-T G.711), at the level of a
    full scale of 1."""
    peak = np.abs(samples).max() + 1e-9
    x = samples / peak
    code = np.round(127 * np.sign(x) * np.log1p(255 * np.abs(x)) / math.log(256))
    size = np.expm1(np.abs(code) / 127 * math.log(256))
    return (peak * np.sign(code) * size / 255).astype(np.float32)


def through_codec(mel, rng, floor):
    """(F,80) -> as MP3 of few bits leaves it, in a quarter of the cases: from some band upwards,
    silence wherever the sound is weak beside the loudest band of its frame."""
    if rng.random() >= 0.25:
        return mel
    weak = mel < mel.amax(1, keepdim=True) - rng.uniform(1, 6)     # nats: 4 to 26 dB
    weak[:, :rng.integers(30, 70)] = False
    return mel.masked_fill(weak, floor)


def without_bands(mel, rng, floor):
    """(F,80) -> the same with up to two groups of bands gone (SpecAugment, arXiv 1904.08779): each
    band at its own mean, or, as codecs leave it, at the floor."""
    mel, n_mels = mel.clone(), mel.shape[1]
    fill = mel.mean(0) if rng.random() < 0.5 else torch.full((n_mels,), floor)
    for _ in range(rng.integers(0, 3)):
        width = int(rng.integers(0, 17))
        low = int(rng.integers(0, n_mels - width + 1))
        mel[:, low:low + width] = fill[low:low + width]
    return mel


def without_stretches(mel, rng):
    """(F,80) -> the same with two stretches of time at the mean, of up to 0.4 s."""
    mel, n_frames = mel.clone(), len(mel)
    fill = mel.mean(0)
    for _ in range(2):
        width = int(rng.integers(0, max(1, min(40, n_frames // 8)) + 1))
        start = int(rng.integers(0, n_frames - width + 1))
        mel[start:start + width] = fill
    return mel


# ---- A run: where it comes from and where it is kept ---------------------------------------------

def run_directory(options, ranks):
    """The folder to write to: the resumed one, the one asked for, or a new one under runs/."""
    if options.resume:
        return Path(options.resume)
    if options.out:
        folder = Path(options.out)
        if held := [name for name in KEPT if (folder / name).exists()]:
            raise InputError(f"--out {folder} holds a run already ({', '.join(held)}): " + (
                f"go on with --resume {folder}, or " * ("resume.pt" in held)) + "choose another")
    else:
        name = Path(options.manifest).parent.name or "run" if options.manifest else options.corpus
        folder, number = Path(f"runs/{name}"), 1
        while any((folder / part).exists() for part in (*KEPT, "log.csv", "lock")):
            number += 1
            folder = Path(f"runs/{name}-{number}")
    chosen = [folder]
    if ranks.world > 1:                                        # what the first process chose
        dist.broadcast_object_list(chosen)
    chosen[0].mkdir(parents=True, exist_ok=True)
    return chosen[0]


@contextmanager
def locked(folder, first):
    """Two runs in one folder would each overwrite the other's checkpoints."""
    if not first:
        yield
        return
    with open(folder / "lock", "a") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass                                               # Windows: no such lock
        except BlockingIOError:
            raise InputError(f"{folder}: another run is writing there now") from None
        except OSError as error:                               # as on some network file systems
            tell(f"{file.name}: no locks here ({error.strerror}): nothing keeps a second run "
                 "from this folder")
        try:
            yield
        finally:
            file.close()
            if os.listdir(folder) == ["lock"]:                 # refused before anything was written
                (folder / "lock").unlink()
                with suppress(OSError):
                    folder.rmdir()


class Corpus:
    """Rows of a manifest."""

    def __init__(self, rows):
        self._rows = rows

    def rows(self, epoch):
        return self._rows

    def seconds(self, row):
        return row.duration


class Unseen:
    """(row, samples) of a development set, whose sound is read as it is asked for: hours of it need
    no memory."""

    def __init__(self, rows, chunk):
        self.rows, self.chunk = rows, chunk

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return readable(self.rows, chunk=self.chunk)


def open_corpus(options, evaluates=True, tokenizer=None):
    """-> the training corpus, and (row, samples) to evaluate on, for the process that does.
    tokenizer: that of a run which goes on, perhaps with other rows than it began with."""
    if not options.manifest:
        corpus = BuiltIn(options.corpus, options.seed)
        return corpus, corpus.unseen(TEST_SIZE)
    kept = dict(strict=options.strict, allow_outside=options.allow_outside)
    rows = read_manifest(options.manifest, **kept)
    if options.interleave == "align":
        link(rows, options)
    rows = list(usable(rows, options, tokenizer))
    dev = []
    if options.dev and evaluates:
        chunk = (options.chunks or PRESETS[options.preset].chunks)[0]
        found = readable(read_manifest(options.dev, **kept), options.strict, chunk)
        dev = Unseen([row for row, _ in found], chunk)
    if dev:
        compare(set(learned_streams(Corpus(rows), options)), dev.rows, options.dev)
        learned = {(row.audio, row.start) for row in rows}
        if known := sum((row.audio, row.start) in learned for row in dev.rows):
            tell(f"warning: {known} of {len(dev.rows)} rows of {options.dev} are learned from too: "
                 "its scores will be too good")
    check_rows(rows, options)
    return Corpus(rows), dev


def check_rows(rows, options):
    """Do they have what --restrict wants, and the letters task? InputError where none does."""
    if options.restrict:
        untimed = sum(None in map(known_times(row).get, streams_of(row, options)) for row in rows)
        told = f"{untimed} of {len(rows)} rows lack times of their words (or links to them)"
        if untimed == len(rows):
            raise InputError(f"--restrict {options.restrict}: {told}; align.py --times finds them")
        if untimed:
            tell(f"{told}: --restrict does not bind these")
    frame_s = PRESETS[options.preset].frame_s
    spoken = [(row.asr or "", row.duration / frame_s) for row in rows]
    short = sum(bool(text) and not if_it_fits(text, frames) for text, frames in spoken)
    if short:
        tell(f"{short} of {len(rows)} rows have fewer frames of {1000 * frame_s:.0f} ms than "
             "letters: the letters task leaves them out")


def streams_of(row, options):
    """The streams that this row is learned as."""
    mode, tags = mode_of(row, options.interleave), stream.texts_of(row).keys()
    return {"asr": tags & {ASR}, "st": tags - {ASR}}.get(mode, set(tags))


def learned_streams(corpus, options):
    return tuple(sorted(set().union(*(streams_of(row, options) for row in corpus.rows(0)))))


def compare(learned, rows, path):
    """Are there texts, in the development set, of the streams that a model learns to write?"""
    there = set().union(*map(stream.texts_of, rows))
    if not learned & there:
        raise InputError(f"{path}: it has {' '.join(sorted(there))}, and what is learned is "
                         f"{' '.join(sorted(learned))}: nothing to compare")
    if lacking := learned - there:
        tell(f"{path}: no text of {' '.join(sorted(lacking))}, which is learned and not evaluated")


def link(rows, options):
    """Word links where they lack, learned from all of the training rows, and from no other."""
    both = [row for row in rows if row.asr and any(row.st.values())]
    lacking = sum(any(text and not row.links.get(lang) for lang, text in row.st.items())
                  for row in both)
    if lacking and len(both) > LINKS_HERE:
        raise InputError(f"{options.manifest}: {lacking} of {len(both)} rows lack links; find "
                         "them once and for all with: python align.py "
                         f"{shlex.quote(options.manifest)} -o LINKED.jsonl"
                         + " --allow-outside" * options.allow_outside)
    if lacking:
        threads = torch.get_num_threads()
        add_links(rows, align_bitext)
        # numba's loops may have changed it: both may use the same OpenMP.
        torch.set_num_threads(threads)


def usable(rows, options, tokenizer=None):
    """The rows that can be learned from, with their durations; the others are named and left
    out."""
    left_out = 0
    unmeasured = any(row.duration is None for row in rows)
    for row in tqdm(rows, "lengths", unit="row", leave=False, disable=None if unmeasured else True):
        try:
            # Has the row what this order needs, and the tokenizer a tag for its language?
            pairs = interleave(row, mode_of(row, options.interleave))
            if tokenizer:
                serialize(pairs, tokenizer)
            if row.duration is None:
                samples = sum(map(len, stream.audio_blocks(row.audio, row.start)))
                row.duration = samples / SAMPLE_RATE
            if row.duration > options.max_seconds:
                raise InputError(f"{row.duration:.1f} s long, --max-seconds is "
                                 f"{options.max_seconds}")
            letters = sum(len(word) + 1 for _, word in pairs)
            if letters > stream.BABBLE * (1 + len(row.st)) * (1 + row.duration):
                raise InputError(f"{letters} letters to write in {row.duration:.1f} s of sound")
        except USER_ERRORS as error:
            message = str(error) if row.where in str(error) else f"{row.where}: {error}"
            if options.strict:
                raise InputError(message) from None
            left_out += 1
            if left_out <= MOST_TOLD:
                tell(f"{message}: left out")
            continue
        yield row
    if left_out:
        unnamed = f"; {left_out - MOST_TOLD} of them are not named" * (left_out > MOST_TOLD)
        tell(f"{left_out} of {len(rows)} rows left out{unnamed}")
    if left_out == len(rows):
        raise InputError(f"{options.manifest}: none of the {len(rows)} rows can be used")


def new_run(options, corpus):
    """Tokenizer, alphabet, network and the statistics of its features, from the training rows."""
    rows = corpus.rows(0)
    some = rows[::-(-len(rows) // BPE_ROWS)]
    texts = [text for row in some for text in (row.asr, *row.st.values()) if text]
    languages = sorted({lang for row in rows for lang in row.st})
    tags = ["<asr>"] + [f"<st:{lang}>" for lang in languages]
    tokenizer = Tokenizer.train(texts, 1 + len(tags) + 256 + options.merges, tags)
    # What a text may be written with, all rows say, also where the tokenizer learned from some.
    spoken = set().union(*(row.asr or "" for row in rows))
    written = spoken.union(*(text or "" for row in rows for text in row.st.values()))
    tokenizer.alphabet = "".join(sorted(c for c in written if not c.isspace()))
    letters = "".join(sorted(spoken))
    torch.manual_seed(options.seed)
    config = replace(PRESETS[options.preset], vocab=len(tokenizer), ctc_vocab=1 + len(letters))
    config = replace(config, chunks=options.chunks or config.chunks,
                     dropout=config.dropout if options.dropout is None else options.dropout)
    model = Transducer(config)
    # At first the joint only hears; labels come in by learning.
    torch.nn.init.zeros_(model.joint.label_proj.weight)
    torch.nn.init.zeros_(model.joint.label_proj.bias)
    silence_unused(model, tokenizer)
    model.encoder.set_statistics(*feature_statistics(rows, config, options))
    if options.init:
        take_weights(model, tokenizer, letters, options.init)
    model.to(options.device)
    return Run(model, tokenizer, letters, make_optimizers(model, options))


def feature_statistics(rows, config, options):
    """Mean and deviation (80,) of every band, over all rows, or 300 to 600 of many."""
    mels, faults = [], []
    for row in rows[::max(1, len(rows) // 300)]:
        try:
            mels.append(mel_of(sound_of(row, options.seed), config))
        except USER_ERRORS as error:                           # named when it is to be learned from
            faults.append(f"{row.where}: {error}")
    if not mels:
        raise InputError(f"{options.manifest}: none of {len(faults)} rows tried has usable sound; "
                         f"the first: {faults[0]}")
    frames = torch.cat(mels)
    return frames.mean(0), frames.std(0).clamp(min=1e-3)


def take_weights(model, tokenizer, letters, path):
    """--init: the tensors of another model that fit by name and shape; what counts tokens or
    letters only where the two tables are equal, for a row means nothing without its name."""
    other, beside = load(path)
    same_tokens = beside.get("tokenizer") == tokenizer.to_dict()
    same_letters = beside.get("letters") == letters
    tables = {
        "label_encoder.embedding": same_tokens,
        "joint.output": same_tokens,
        "ctc": same_letters,
    }
    own, taken = model.state_dict(), {}
    for name, tensor in other.state_dict().items():
        fits = all(equal for start, equal in tables.items() if name.startswith(start))
        if fits and name in own and own[name].shape == tensor.shape:
            taken[name] = tensor
    blocks = [name for name in own if name.startswith("encoder.stack.blocks")]
    if lacking := [name for name in blocks if name not in taken]:
        raise InputError(f"--init {path}: a network of another size than --preset makes here: "
                         f"{len(lacking)} of {len(blocks)} tensors of the encoder's layers do not "
                         f"fit, the first is {lacking[0]}")
    model.load_state_dict(own | taken)
    left = " ".join(sorted(own.keys() - taken.keys())) or "one left"
    why = ("; the tokens differ (--merges, or the texts): what knows them begins anew"
           * (not same_tokens))
    print(f"from {path}: {len(taken)} of {len(own)} tensors; not {left}{why}")


def resume_run(options):
    path = Path(options.resume) / "resume.pt"
    model, beside = load(path)
    needed = {"tokenizer", "letters", "step", "position", "optimizers", "best"}
    if missing := needed - beside.keys():
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}: it cannot be resumed")
    step, best = beside["step"], beside["best"]
    with undamaged(path):
        epoch, batch = beside["position"]
        numbers = {"step": step, "epoch": epoch, "batch": batch}
        for name, number in numbers.items():
            if type(number) is not int or number < 0:
                raise ValueError(f"its {name} is {number!r:.60}")
        if not isinstance(best, float) or not isinstance(beside["letters"], str):
            raise ValueError(f"its best score is {best!r:.60}, "
                             f"its letters {beside['letters']!r:.60}")
        tokenizer = Tokenizer.from_dict(beside["tokenizer"])
        own = len(tokenizer), 1 + len(beside["letters"])
        if own != (model.config.vocab, model.config.ctc_vocab):
            raise ValueError("its tokens or letters are not as many as its network has")
    owed = evaluation_owed(step, options, options.resume)
    if options.steps < step or options.steps == step and not owed:
        raise InputError(f"--steps is {options.steps}, but {path} has done {step}: to go on, give "
                         "more")
    before = beside["options"]
    other = [flag(name) if name != "manifest" else name
             for name in ("manifest", "batch_seconds", "join", "max_seconds")
             if before.get(name) != getattr(options, name)]
    if batch and other:
        tell(f"{' and '.join(other)} changed: the run goes on with the next epoch, {epoch + 1}")
        epoch, batch = epoch + 1, 0
    if options.chunks or options.dropout is not None:
        dropout = model.config.dropout if options.dropout is None else options.dropout
        config = replace(model.config, chunks=options.chunks or model.config.chunks,
                         dropout=dropout)
        weights, model = model.state_dict(), Transducer(config)
        model.load_state_dict(weights)
    optimizers = make_optimizers(model.to(options.device), options)
    with undamaged(path):
        for optimizer, state in zip(optimizers, beside["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if before.get("dev", "") != options.dev:
            best = Run.best
    return Run(model, tokenizer, beside["letters"], optimizers, step, (epoch, batch), best)


def save_run(run, options, folder, log):
    """resume.pt is complete in itself and all that --resume reads; model.pt is what stream.py
    needs. Killed between the two, a resumed run makes it again: so it comes first, but for the
    first time, when there would be nothing to resume."""
    log.flush(run)
    if begun := (folder / "resume.pt").exists():
        save_model(run, options, folder / "model.pt")
    save(folder / "resume.pt", run.model,
         tokenizer=run.tokenizer.to_dict(),
         letters=run.letters,
         options=asdict(options),
         optimizers=[optimizer.state_dict() for optimizer in run.optimizers],
         step=run.step,
         position=list(run.position),
         best=run.best)
    if not begun:
        save_model(run, options, folder / "model.pt")


@contextmanager
def saved_whatever_ends_it(run, options, folder, log, ranks):
    """Around the steps: what ends a run amid one, as a bad row with --strict or too little memory,
    does not cost it the steps before."""
    began = run.step
    try:
        yield
    except Exception as error:
        if ranks.first and run.step > began and not isinstance(error, (NothingLearned, OSError)):
            try:
                save_run(run, options, folder, log)
                tell(f"train.py: saved after step {run.step}; to go on: {resuming(folder)}")
            except Exception as another:
                tell(f"train.py: step {run.step} is not saved: {another or type(another).__name__}")
        raise


class NothingLearned(InputError):
    """The GIVE_UPth step in a row: the weights may be spoiled."""


def resuming(folder):
    """The command that goes on with a run, by as many processes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    program = f"torchrun --nproc_per_node={here}" if here > 1 else "python"
    return f"{program} train.py --resume {folder}"


def saved_search(options):
    """How a model that was trained so is searched: options of a Streamer."""
    return {"blank_penalty": options.blank_penalty, "tail": TAIL}


def save_model(run, options, path):
    save(path, run.model,
         tokenizer=run.tokenizer.to_dict(),
         letters=run.letters,
         mode=options.interleave,
         streams=list(run.streams),
         **saved_search(options),
         step=run.step)


@contextmanager
def replacing(path):
    """A file that takes the place of `path` once it is whole; a full disk is told with its name."""
    new = path.with_suffix(".new")
    try:
        with open(new, "w", newline="") as file:
            yield file
        os.replace(new, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was saved before stays as it is",
                      str(path)) from None


class Log:
    """log.csv: a line every LOG_EVERY steps, its losses the means since the line before; and the
    progress on screen."""
    COLUMNS = ("step", "epoch", "learning_rate", *TASKS,
               "gradient_norm", "skipped", "audio_s_per_s", "waited_s")

    def __init__(self, folder, step, ranks):
        self.path, self.first, self.world = folder / "log.csv", ranks.first, ranks.world
        lines = [line for line in self.past() if int(line["step"]) <= step] if step else []
        self.skipped, self.in_a_row = int(lines[-1]["skipped"]) if lines else 0, 0
        self.waited = 0.0
        if self.first:
            # What a resumed run does again, it writes again.
            with replacing(self.path) as file:
                writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(lines)
        self.bar = tqdm(initial=step, unit="step", dynamic_ncols=True,
                        disable=None if self.first else True)
        self.start()

    def past(self):
        if not self.path.exists():
            return []
        with open(self.path, newline="", errors="replace") as file:
            # A line that a power cut left half written, or full of zeros, is none.
            whole = (line for line in file if "\0" not in line and len(line) < 10_000)
            return [line for line in csv.DictReader(whole, quoting=csv.QUOTE_NONE)
                    if all((line.get(k) or "").isdecimal() for k in ("step", "skipped"))]

    def start(self):
        self.sums, self.counts, self.mel_frames, self.steps = {}, {}, 0, 0
        self.began, self.waited_before = time.perf_counter(), self.waited

    def add(self, run, group, numbers, waited):
        self.waited, self.lr = waited, run.optimizers[-1].param_groups[0]["lr"]
        # Those of the other processes are about as many.
        self.mel_frames += self.world * sum(batch["mel_frames"] for batch in group)
        self.steps, learned = self.steps + 1, numbers.pop("learned")
        self.give_up_if_stuck(learned, run, group, numbers["gradient_norm"])
        for name, number in numbers.items() if learned else ():  # on the device still: no wait here
            self.sums[name] = self.sums.get(name, 0) + number
            self.counts[name] = self.counts.get(name, 0) + 1
        self.bar.update()
        if run.step % LOG_EVERY == 0:
            self.flush(run)

    def give_up_if_stuck(self, learned, run, group, norm):
        """Counts the steps that were skipped; InputError for the GIVE_UPth in a row."""
        self.skipped += not learned
        self.in_a_row = 0 if learned else self.in_a_row + 1
        if self.in_a_row == GIVE_UP:
            rows = ", ".join(row for batch in group for row in batch["rows"])
            why = "without usable sound."
            if any(batch["mel_frames"] for batch in group):
                why = ("whose gradient is not finite; a lower --lr?" if norm else
                       "with nothing to learn: no text that fits its sound.")
            raise NothingLearned(f"step {run.step}: the {GIVE_UP}th in a row {why} What was saved "
                                 f"before stays as it is. Rows of this step: {rows}")

    def flush(self, run):
        if not self.steps:
            return
        seconds = time.perf_counter() - self.began
        line = {name: f"{float(total) / self.counts[name]:.5g}"
                for name, total in self.sums.items()}
        told = "  ".join(f"{name.replace('_', ' ')} {float(line[name]):.2f}"
                         for name in TASKS if name in line)
        line |= {
            "step": run.step,
            "epoch": run.position[0],
            "learning_rate": f"{self.lr:.4g}",
            "skipped": self.skipped,
            "audio_s_per_s": f"{self.mel_frames * HOP / SAMPLE_RATE / seconds:.4g}",
            "waited_s": f"{self.waited - self.waited_before:.3f}",
        }
        if self.first:
            size = None
            try:
                with open(self.path, "a", newline="") as file:
                    size, writer = file.tell(), csv.DictWriter(file, self.COLUMNS)
                    if not size:                               # somebody took it away
                        writer.writeheader()
                    writer.writerow(line)
            except OSError as error:           # no reason to lose a run, nor to save it later
                if size is not None:
                    with suppress(OSError):
                        os.truncate(self.path, size)           # half a line would spoil the next
                tell(f"{self.path}: {error.strerror}; the line of step {run.step} is left out")
            self.bar.set_postfix_str(f"{told}  {line['audio_s_per_s']} s/s")
            if self.bar.disable and run.step % (2 * LOG_EVERY) == 0:
                # Not a terminal: a line now and then.
                print(f"step {run.step}: {told}  {line['audio_s_per_s']} s of sound per s",
                      flush=True)
        self.start()

    def close(self, run):
        self.flush(run)
        self.bar.close()


def announce(run, source, corpus, options, ranks, folder):
    """What will happen, and how long it takes here: a step of every phase is tried on the first
    batch."""
    batches = epoch_batches(corpus, run.position[0], options)
    seconds = sum(s.seconds for batch in batches for s in batch)
    padded = sum(len(batch) * max(s.seconds for s in batch) for batch in batches)
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    per_step = options.accumulate * ranks.world                # batches
    told = (f"{options.steps - run.step} steps of about {per_step * padded / len(batches):.0f} s "
            f"of sound, {len(batches) / per_step:.0f} an epoch")
    print(f"{options.preset}, {options.interleave}: {millions:.2f} M parameters, "
          f"{len(run.tokenizer)} tokens, on {options.device}; {told}, "
          f"{1 - seconds / padded:.1%} of it padding; run folder {folder}", flush=True)
    batch = source[Request(batches[0], 0, (0, 0), True)]
    borders, total = (0, options.warm_steps // 2, options.warm_steps, options.steps), 0.0
    for first, end in pairwise(borders):                       # of the phases
        left = end - max(first, run.step)
        if left > 0 and batch["mel_frames"]:
            total += left * options.accumulate * trial(run, batch, first, options)
    print(f"that is about {total / 60:.0f} minutes here, beside the evaluations; Ctrl-C stops and "
          "saves", flush=True)


def trial(run, batch, step, options):
    """Seconds of a forward and backward pass as at `step`; nothing is learned."""
    for _ in range(2):                                         # the first one compiles
        began = time.perf_counter()
        on_device = to_device(batch, options.device)
        names = list(tasks(step, options, batch["symbols"]["letters"] > 0))
        each = losses(run.model.train(), on_device, names, step, options)
        sum(each.values()).backward()
        if options.device != "cpu":
            torch.cuda.synchronize()
        run.model.zero_grad(set_to_none=True)
    return 1.2 * (time.perf_counter() - began)                 # the optimisers take a fifth of it


def warn_of_letters(run, corpus):
    if unknown := set().union(*(row.asr or "" for row in corpus.rows(0))) - {*run.letters}:
        tell(f"warning: the letters task leaves out {len(unknown)} characters that it had not "
             f"learned with: {listed(unknown)}")


def warn_of_unseen(run, dev):
    rows = dev.rows if isinstance(dev, Unseen) else [row for row, _ in dev]
    texts = [text for row in rows for tag, text in stream.texts_of(row).items()
             if tag in run.streams]
    if unseen := {c for text in texts for c in run.tokenizer.unseen(text)}:
        tell(f"warning: {len(unseen)} characters of the development set never occur in "
             f"training and are written as bytes: {listed(unseen)}")


def listed(characters):
    return " ".join(sorted(characters)[:40]) + " ..." * (len(characters) > 40)


# ---- Evaluation on the way -----------------------------------------------------------------------

def evaluation_owed(step, options, folder):
    """Whether an evaluation was due after this step, and the run was ended before it was done."""
    due = step > options.warm_steps and (step % options.eval_every == 0 or step == options.steps)
    has_dev = options.dev or not options.manifest
    done = any(entry["step"] == step for entry in past_metrics(folder))
    return bool(has_dev and due and not done)


def milestone(run, dev, options, folder, log, stop):
    """Checkpoint, evaluation, and the checkpoint again, which now knows the best score.

    metrics.json comes last: an evaluation that does not stand there, for the run was ended amid it,
    is made again on resume."""
    save_run(run, options, folder, log)
    blind = run.step == options.steps and not options.manifest
    # Before the transducer starts, the joint cannot stop writing.
    if run.step > options.warm_steps and dev and not stop.wanted:
        metrics = assess(run, dev, options, folder, blind, stop)
        if not stop.wanted:
            save_run(run, options, folder, log)
            add_metrics(folder, run.step, metrics)
    log.start()                                                # that took its time


def past_metrics(folder):
    path = Path(folder) / "metrics.json"
    if not path.exists():
        return []
    try:
        past = json.loads(path.read_text())
        if not isinstance(past, list) or any(type(entry["step"]) is not int for entry in past):
            raise ValueError
        return past
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path}: damaged; move it away, the run goes on without it") from None


def add_metrics(folder, step, streams):
    # What a resumed run does again, it writes again.
    past = [entry for entry in past_metrics(folder) if entry["step"] < step]
    with replacing(folder / "metrics.json") as file:
        file.write(json.dumps(past + [{"step": step, "streams": streams}], indent=1))


def assess(run, dev, options, folder, blind, stop):
    """Scores on the development set, {stream: metrics}; the best model so far goes to best.pt;
    `blind`, also with noise for sound: who still writes well does not listen. Cut short, and of no
    use, where a stop is wanted."""
    def scored(items):
        going_on = takewhile(lambda _: not stop.wanted, items)
        return evaluate(run.model, run.tokenizer, going_on, tags=run.streams,
                        **saved_search(options))
    metrics, records = scored(dev)
    if stop.wanted:
        return metrics
    tqdm.write(f"step {run.step}, {len(records)} unseen utterances:")
    show_scores(metrics, records)
    chrf = [m["chrf"] for m in metrics.values() if m["chrf"] is not None]
    best = len(records) == len(dev) and bool(chrf) and np.mean(chrf) > run.best
    if best:
        before, run.best = run.best, float(np.mean(chrf))
        try:
            save_model(run, options, folder / "best.pt")
        except OSError:                        # then best.pt is still the one before
            run.best = before
            raise
    if not blind:
        return metrics
    rng = np.random.default_rng(0)
    blind_metrics, _ = scored(
        (row, rng.normal(0, 0.05, len(samples)).astype(np.float32)) for row, samples in dev)
    tqdm.write("the same with noise instead of the audio (a model that listens fails here):")
    show_scores(blind_metrics, [])
    return metrics | {f"blind {tag}": m for tag, m in blind_metrics.items()}


def show_scores(metrics, records, examples=3):
    """What a person wants to see of an evaluation: a table, and some utterances with the time of
    every word."""
    for tag, m in metrics.items():
        bleu = "" if m["bleu"] is None else f"  BLEU {m['bleu']:5.1f}  chrF {m['chrf']:5.1f}"
        lag = "" if m["laal_ms"] is None else f"  LAAL {m['laal_ms']:5.0f} ms"
        silent = f"  ({m['silent']} of {m['utterances']} without a word)" if m["silent"] else ""
        rates = "  ".join(f"{name.upper()} {m[name]:5.1f}" for name in m if name in ("wer", "cer"))
        tqdm.write(f"  {stream.printable(tag):8} {rates}{bleu}{lag}{silent}")
    for record in records[:examples]:
        for tag, reference in record["references"].items():
            if tag in metrics:
                words = [f"{w.text}\N{MIDDLE DOT}{w.delay_ms / 1000:.1f}"
                         for w in record["words"] if w.stream == tag]
                name, given, written = map(stream.printable, (tag, " ".join(reference),
                                                              " ".join(words)))
                if len(written) > 500:  # an untrained model babbles
                    written = f"{written[:500]} ... {len(words)} words"
                tqdm.write(f"    {name:8} reference   {given}\n"
                           f"    {'':8} at its time {written}")


def live_captions(folder, options):
    """Stream two sentences in a row, never heard, at their own pace, through the command that
    users have."""
    items = BuiltIn(options.corpus, options.seed).unseen(2)
    pause = np.zeros(SAMPLE_RATE, np.float32)
    parts = [part for _, own in items for part in (own * (0.5 / np.abs(own).max()), pause)]
    samples = np.concatenate(parts)
    example = folder / "unseen.wav"
    write_sound(example, samples)
    print(f"\nlive captions of {example}, which says: {' / '.join(row.asr for row, _ in items)}")
    stream.main([str(folder / "model.pt"), str(example), "--realtime"])
    return example


# ---- Processes that train together, and what stops them ------------------------------------------

class Ranks:
    """The processes that train together, one a GPU, as torchrun starts them; without it, this one
    alone."""

    def __init__(self, rank=0, world=1, device="cpu"):
        self.rank, self.world, self.device, self.first = rank, world, device, rank == 0

    @classmethod
    def here(cls, device):
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        given = {name: os.environ.get(name, value) for name, value in alone.items()}
        if (not all(n.isdecimal() for n in given.values())
                or int(given["RANK"]) >= int(given["WORLD_SIZE"])):
            told = ", ".join(f"{name} {value!r}" for name, value in given.items())
            raise InputError(f"{told}: processes that train together are started by torchrun")
        rank, world, local = map(int, given.values())
        if device == "cuda":
            there = torch.cuda.device_count()
            if local >= there:
                raise InputError(f"process {local} of this machine has no GPU: there are {there}; "
                                 f"--nproc_per_node={there}")
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if world > 1 and not dist.is_initialized():
            backend = "nccl" if "cuda" in device else "gloo"
            try:
                meeting = dist.rendezvous("env://", timeout=timedelta(seconds=MEET_S))
                store, rank, world = next(meeting)
                # The others wait while the first evaluates.
                dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                        timeout=timedelta(days=1))
                # GPUs find each other in the first sum, for which the store waits MEET_S: now, not
                # while one process still reads the development set.
                dist.all_reduce(torch.zeros(1, device=device))
            except (ValueError, RuntimeError) as error:
                raise InputError(f"these {world} processes do not find each other: {error}"
                                 .partition("\n")[0]) from None
        return cls(rank, world, device)

    def add(self, tensor):
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_numbers(self, numbers):
        """The sums of a list of plain numbers; on one process nothing waits for its device."""
        if self.world == 1:
            return numbers
        return self.add(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def add_gradients(self, model):
        """One message for all. DistributedDataParallel would not do: it averages, where tasks are
        divided by their counts already, and it wants a gradient for every parameter, which a phase
        with one task does not give. A process whose batch had no sound that can be used adds 0."""
        if self.world > 1:
            params = list(model.parameters())
            has = [p.grad is not None for p in params]
            anywhere = self.add(torch.tensor(has, dtype=torch.float32, device=self.device)).tolist()
            given = [p for p, count in zip(params, anywhere) if count]
            for p in given:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            flat = [p.grad.flatten() for p in given]
            total = self.add(torch.cat(flat)) if flat else torch.zeros(0)
            for p, grad in zip(given, total.split([p.numel() for p in given])):
                p.grad.copy_(grad.view_as(p))

    def begin_alike(self, run, corpus):
        """All processes learn from the same rows and begin with the first one's network: on other
        processors the statistics of the features differ in their last bits."""
        if self.world > 1:
            ids = [row.id for row in corpus.rows(0)]
            seen = [None] * self.world
            dist.all_gather_object(seen, (len(ids), seed_of(*ids), run.step, run.position))
            if len({own[:2] for own in seen}) > 1:
                raise InputError("the processes do not have the same rows to learn from, but "
                                 f"{', '.join(str(own[0]) for own in seen)} of them: can every "
                                 "machine read every file?")
            if len(set(seen)) > 1:
                raise InputError("the processes do not go on from the same step, but from "
                                 f"{', '.join(str(own[2]) for own in seen)}: has every machine the "
                                 "same resume.pt?")
            for tensor in run.model.state_dict().values():
                dist.broadcast(tensor, 0)

    def only_first_speaks(self):
        """Within it, what is told to the user is told once, not by every process."""
        nowhere = io.StringIO()
        quiet = ExitStack()
        if not self.first:
            quiet.enter_context(redirect_stdout(nowhere))
            quiet.enter_context(redirect_stderr(nowhere))
        return quiet

    def agree(self, wish):
        """True where any process says so."""
        if self.world == 1:
            return wish
        return bool(self.add(torch.tensor(float(wish), device=self.device)))


class StopSignal:
    """Within it, Ctrl-C, SIGTERM or a terminal that closes (SIGHUP, unless nohup has it ignored)
    let the step in progress end, then the run is saved; a second Ctrl-C ends it at once. (A second
    SIGTERM is none: a batch system sends one to every process, and torchrun passes its own on.)"""

    def __enter__(self):
        self.wanted = False
        self.before = {n: signal.signal(n, self.seen) for n in STOPS
                       if n in STOPS[:2] or signal.getsignal(n) is not signal.SIG_IGN}
        return self

    def seen(self, number, frame):
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- The built-in corpus, part 1: a synchronous grammar ------------------------------------------
# One sentence is a handful of concepts; every language spells the same concepts in an order of its
# own, so that the word links are known by construction.

LANGUAGES = ("de", "en", "es", "it")


def _table(text):
    """Entries end with a semicolon; an entry has a field for each language, "/" between forms, "_"
    for a space."""
    return [dict(zip(LANGUAGES, entry.split())) for entry in text.split(";")]


# Auxiliaries by person: I, you, he or she, we. English has none in the past tense, so its verb
# carries the link.
SUBJECTS = _table("""
    ich   I     yo       io;
    du    you   tú       tu;
    er    he    él       lui;
    sie   she   ella     lei;
    wir   we    nosotros noi;
    anna  anna  anna     anna;
    marco marco marco    marco;
    lena  lena  lena     lena;
    tomas tomas tomas    tomas""")
PERSON = {"ich": 0, "du": 1, "wir": 3}  # all others: 2
PERFECT = _table("habe/hast/hat/haben /// he/has/ha/hemos ho/hai/ha/abbiamo")
MODALS = _table("""
    will/willst/will/wollen want_to/want_to/wants_to/want_to
        quiero/quieres/quiere/queremos voglio/vuoi/vuole/vogliamo;
    kann/kannst/kann/können can/can/can/can
        puedo/puedes/puede/podemos posso/puoi/può/possiamo;
    muss/musst/muss/müssen must/must/must/must
        debo/debes/debe/debemos devo/devi/deve/dobbiamo""")
VERBS = _table("""
    gekauft/kaufen       bought/buy    comprado/comprar     comprato/comprare;
    gesehen/sehen        saw/see       visto/ver            visto/vedere;
    gefunden/finden      found/find    encontrado/encontrar trovato/trovare;
    gemalt/malen         painted/paint pintado/pintar       dipinto/dipingere;
    verkauft/verkaufen   sold/sell     vendido/vender       venduto/vendere;
    gezeichnet/zeichnen  drew/draw     dibujado/dibujar     disegnato/disegnare;
    gebracht/bringen     brought/bring traído/traer         portato/portare;
    verloren/verlieren   lost/lose     perdido/perder       perso/perdere;
    geputzt/putzen       cleaned/clean limpiado/limpiar     pulito/pulire;
    versteckt/verstecken hid/hide      escondido/esconder   nascosto/nascondere;
    gestohlen/stehlen    stole/steal   robado/robar         rubato/rubare;
    genommen/nehmen      took/take     tomado/tomar         preso/prendere""")
NOUNS = _table("""
    n/buch    book    m/libro    m/libro;
    n/auto    car     m/coche    f/macchina;
    n/haus    house   f/casa     f/casa;
    m/hund    dog     m/perro    m/cane;
    f/katze   cat     m/gato     m/gatto;
    n/brot    bread   m/pan      m/pane;
    f/blume   flower  f/flor     m/fiore;
    m/brief   letter  f/carta    f/lettera;
    n/bild    picture m/cuadro   m/quadro;
    m/tisch   table   f/mesa     m/tavolo;
    f/flasche bottle  f/botella  f/bottiglia;
    n/fenster window  f/ventana  f/finestra;
    n/hemd    shirt   f/camisa   f/camicia;
    f/birne   pear    f/pera     f/pera;
    m/hut     hat     m/sombrero m/cappello;
    f/lampe   lamp    f/lámpara  f/lampada""")
ADJECTIVES = _table("""
    rot   red   rojo/roja       rosso/rossa;
    alt   old   viejo/vieja     vecchio/vecchia;
    neu   new   nuevo/nueva     nuovo/nuova;
    klein small pequeño/pequeña piccolo/piccola;
    groß  big   grande/grande   grande/grande;
    grün  green verde/verde     verde/verde;
    weiß  white blanco/blanca   bianco/bianca;
    schön nice  bonito/bonita   bello/bella""")
ARTICLES = [
    dict(de=dict(m="den", f="die", n="das"),
         en={"": "the"},
         es=dict(m="el", f="la"),
         it=dict(m="il", f="la")),
    dict(de=dict(m="einen", f="eine", n="ein"),
         en={"": "a"},
         es=dict(m="un", f="una"),
         it=dict(m="un", f="una")),
]
ENDINGS = [                     # of a German adjective after those articles
    dict(m="en", f="e", n="e"),
    dict(m="en", f="e", n="es"),
]
ADVERBS = _table("""
    heute   today     hoy      oggi;
    gestern yesterday ayer     ieri;
    jetzt   now       ahora    adesso;
    hier    here      aquí     qui;
    wieder  again     otra_vez di_nuovo;
    oft     often     a_menudo spesso""")
PLACES = _table("""
    im_garten in_the_garden en_el_jardín nel_giardino;
    im_laden  in_the_shop   en_la_tienda nel_negozio;
    am_meer   at_the_sea    en_el_mar    al_mare;
    im_zug    on_the_train  en_el_tren   nel_treno""")
ORDER = dict(de="SATDJNPV", en="SAVDJNPT", es="TSAVDNJP", it="SAVTDNJP")  # the letters of `say`
MAX_WORDS = 9


def draw_sentence(rng):
    """One random sentence in all languages: {language: [(concept, word)]}."""
    def pick(items):
        return items[rng.integers(len(items))]
    chosen = dict(
        S=pick(SUBJECTS),
        A=pick(PERFECT * 2 + MODALS),
        V=pick(VERBS),
        D=int(rng.integers(2)),
        N=pick(NOUNS),
        J=pick(ADJECTIVES + [None] * 4),
        T=pick(ADVERBS + [None] * 3),
        P=pick(PLACES + [None] * 8))
    return {lang: say(chosen, lang) for lang in LANGUAGES}


def say(chosen, lang):
    """The words of one language in its order. Concepts: Subject, Auxiliary, Verb, Determiner,
    adJective, Noun, Time, Place; p marks the prepositions and articles before the last word of a
    place."""
    gender, _, noun = chosen["N"][lang].rpartition("/")
    person = PERSON.get(chosen["S"]["de"], 2)
    forms = {letter: chosen[letter] and chosen[letter][lang] for letter in "SAVJTP"}
    forms["A"] = forms["A"].split("/")[person]
    forms["V"] = forms["V"].split("/")[chosen["A"] in MODALS] # past tense, or the infinitive
    forms["D"], forms["N"] = ARTICLES[chosen["D"]][lang][gender], noun
    if forms["J"] and lang == "de":
        forms["J"] += ENDINGS[chosen["D"]][gender]
    elif forms["J"]:
        forms["J"] = forms["J"].split("/")[gender == "f" and lang != "en"]
    words = [(letter, word)
             for letter in ORDER[lang]
             for word in (forms[letter] or "").split("_") if word]
    following = [letter for letter, _ in words[1:]] + [""]
    return [("p" if letter == after == "P" else letter, word)
            for (letter, word), after in zip(words, following)]


def link_words(source, target, gendered):
    """Each target word is linked to the source words that decide it: to those of its concept (an
    auxiliary belongs to its verb where the other side has none), all words of a place to all, for
    the noun says whether it is in, on or at, and in a language with genders the words around a noun
    to the noun."""
    s_has, t_has = ("A" in dict(source)), ("A" in dict(target))

    def concept(letter):
        return "V" if letter == "A" and not (s_has and t_has) else letter

    def decided_by(letter):
        if letter in "pP":
            return "pP"
        return letter + "N" if gendered and letter in "DJ" else concept(letter)
    return [(i, j)
            for i, (a, _) in enumerate(source)
            for j, (b, _) in enumerate(target) if concept(a) in decided_by(b)]


def builtin_row(index, *, seed=0, source="de", targets=("en",), test=False):
    """Utterance number `index` of the built-in corpus as a manifest Row without audio (`speak_row`
    makes that)."""
    rng = np.random.default_rng((seed, index, int(test)))
    while True:
        sentence = draw_sentence(rng)
        key = " ".join(word for _, word in sentence["de"])
        short = max(map(len, sentence.values())) <= MAX_WORDS
        if short and (zlib.crc32(key.encode()) % 10 == 0) == test:
            break
    text = {lang: " ".join(word for _, word in words) for lang, words in sentence.items()}
    part = "test" if test else "train"
    speaker = int(rng.integers(40 if test else 4000))
    return Row(
        id=f"{part}{index:06d}",
        audio="",
        lang=source,
        asr=text[source],
        st={t: text[t] for t in targets},
        links={t: link_words(sentence[source], sentence[t], gendered=t != "en")
               for t in targets},
        speaker=f"{part}{speaker:04d}",
        where=f"built-in corpus, {index}")


# ---- The built-in corpus, part 2: a formant voice ------------------------------------------------
# Every letter is one or two sounds; a sound is a place in the space of three formants, with some
# voice and some noise. Sounds glide into one another, as they do in a mouth.

# Capitals are the silence before a stop opens, "_" is the silence between words. Columns: ms;
# F1, F2, F3 in Hz; how much voice; how much noise; centre and bandwidth of the noise in Hz.
SOUNDS = {name: tuple(map(float, values)) for name, *values in map(str.split, """
    a 85  750  1250  2600  1.0    0  1500  1500
    e 75  480  1950  2600  1.0    0  1500  1500
    i 70  290  2300  3000  1.0    0  1500  1500
    o 80  480   850  2500  1.0    0  1500  1500
    u 75  310   680  2300  1.0    0  1500  1500
    ö 75  430  1500  2300  1.0    0  1500  1500
    ü 75  280  1800  2200  1.0    0  1500  1500
    m 65  250   950  2200  .40    0  1500  1500
    n 60  250  1600  2700  .40    0  1500  1500
    l 55  380  1250  2900  .60    0  1500  1500
    r 55  460  1150  1550  .60  .04  1500  1500
    w 50  300   650  2200  .45  .03   900   900
    j 50  260  2250  3100  .45  .03  3000  1500
    f 70  350  1100  2300    0  .25  6500  3500
    s 75  350  1700  2600    0  .50  5500  1200
    h 50  500  1500  2500  .05  .22  1500  1500
    B 35  250   800  2300  .12    0   900   900
    D 35  250  1750  2700  .12    0  3800  1500
    G 35  250  2050  2350  .12    0  2000   700
    P 40  300   800  2300    0    0   900   900
    T 40  300  1750  2700    0    0  3800  1500
    K 40  300  2050  2350    0    0  2000   700
    b 18  350   900  2300  .40  .20   900   900
    d 18  350  1750  2700  .40  .25  3800  1500
    g 20  350  2050  2350  .40  .25  2000   700
    p 25  400   900  2300    0  .40   900   900
    t 25  400  1750  2700    0  .50  3800  1500
    k 28  400  2050  2350    0  .45  2000   700
    _ 40  500  1500  2500    0    0  1500  1500""".strip().split("\n"))}
LETTERS = {
    "b": "Bb", "c": "Kk", "d": "Dd", "g": "Gg", "k": "Kk", "p": "Pp", "q": "Kk", "t": "Tt",
    "v": "f", "x": "Kks", "y": "i", "z": "Ts", "ß": "s",
    "ä": "e", "á": "a", "à": "a", "é": "e", "è": "e",
    "í": "i", "ì": "i", "ó": "o", "ò": "o", "ú": "u", "ù": "u", "ñ": "nj",
}
BLOCK = 40  # samples (2.5 ms) between two settings of the filters


@dataclass(frozen=True)
class Speaker:
    pitch_hz: float
    tract: float  # scales every formant
    rate: float  # scales every duration


def make_speaker(name):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return Speaker(80 * (250 / 80) ** rng.random(), rng.uniform(0.88, 1.12), rng.uniform(0.8, 1.2))


def sounds_of(text):
    return [sound for c in text.lower() for sound in LETTERS.get(c, c if c in SOUNDS else "_")]


def speak(words, speaker, rng):
    """Say `words`. Returns (float32 samples at 16 kHz, word end times in s)."""
    rows, ends, blocks = [], [], 0

    def add(sound, stretch):
        nonlocal blocks
        n = max(2, round(SOUNDS[sound][0] * stretch * SAMPLE_RATE / 1000 / BLOCK))
        rows.append((n,) + SOUNDS[sound][1:])
        blocks += n
    add("_", rng.uniform(2, 6))
    for word in words:
        for sound in sounds_of(word):
            add(sound, speaker.rate * rng.uniform(0.85, 1.15))
        ends.append(blocks * BLOCK / SAMPLE_RATE)
        add("_", rng.uniform(0.2, 1.5))
    add("_", rng.uniform(4, 8))
    table = np.array(rows)
    track = np.repeat(table[:, 1:], table[:, 0].astype(int), axis=0)  # (blocks, 7)
    glide = np.ones(7) / 7  # 17.5 ms from one sound to the next
    padded = np.pad(track, ((3, 3), (0, 0)), mode="edge")
    track = np.stack([np.convolve(padded[:, k], glide, mode="valid") for k in range(7)], axis=1)
    track[:, [0, 1, 2, 5, 6]] *= speaker.tract
    noise = rng.standard_normal((2, blocks * BLOCK)).astype(np.float32)
    time = np.arange(blocks) * (BLOCK / SAMPLE_RATE)
    wobble = 0.04 * np.sin(2 * math.pi * (rng.random() + 2.5 * time))
    pitch = speaker.pitch_hz * (1.08 - 0.06 * time + wobble)
    wave = _formants(track, pitch, noise[0])
    wave *= 0.06 / np.sqrt(np.mean(wave ** 2))
    wave += noise[1] * (0.06 * 10 ** (-rng.uniform(10, 30) / 20))
    return wave * np.float32(10 ** (rng.uniform(-15, 15) / 20)), ends


@numba.njit(cache=True, nogil=True, fastmath=True)
def _formants(track, pitch, noise):
    """Source and filter: pulses through three resonators in a row, noise through a fourth beside
    them."""
    wave = np.empty(noise.size, np.float32)
    a, b, c = np.zeros(4), np.zeros(4), np.zeros(4)
    y1, y2 = np.zeros(4), np.zeros(4)
    phase, glottis = 0.0, 0.0
    for k in range(track.shape[0]):
        for r in range(4):
            centre = min(track[k, 5] if r == 3 else track[k, r], 7600.0)
            width = track[k, 6] if r == 3 else 60.0 + 0.04 * centre
            radius = math.exp(-math.pi * width / SAMPLE_RATE)
            c[r] = -radius * radius
            b[r] = 2 * radius * math.cos(2 * math.pi * centre / SAMPLE_RATE)
            a[r] = 1 - b[r] - c[r]
        # About equal loudness for any width.
        a[3] = math.sqrt(1 - math.exp(-2 * math.pi * track[k, 6] / SAMPLE_RATE))
        for n in range(k * BLOCK, (k + 1) * BLOCK):
            phase += pitch[k] / SAMPLE_RATE
            pulse = 0.0
            if phase >= 1:
                phase -= 1
                pulse = 1.0
            glottis = 0.92 * glottis + pulse + 0.01 * noise[n]
            x = track[k, 3] * glottis
            for r in range(3):
                y = a[r] * x + b[r] * y1[r] + c[r] * y2[r]
                y2[r], y1[r], x = y1[r], y, y
            y = a[3] * track[k, 4] * noise[n] + b[3] * y1[3] + c[3] * y2[3]
            y2[3], y1[3] = y1[3], y
            wave[n] = x + 0.15 * y
    return wave


def speak_row(row, seed=0):
    """The audio of a built-in row: (samples, row), the row now with its duration and times."""
    rng = np.random.default_rng((seed, zlib.crc32(row.id.encode())))
    samples, row.times = speak(row.asr.split(), make_speaker(row.speaker), rng)
    row.duration = len(samples) / SAMPLE_RATE
    for lang, text in row.st.items():
        # When each word could be said: once the words it is linked to have ended.
        last_needed = needs(len(row.times), text.split(), row.links[lang])
        row.st_times[lang] = [row.times[i] for i in last_needed]
    return samples, row


class BuiltIn:
    """Fresh utterances for ever: epoch e holds the utterances e * SIZE ... (e + 1) * SIZE - 1."""
    SIZE = 1600

    def __init__(self, languages, seed):
        sides = languages.split("-")
        if len(sides) != 2:
            raise InputError(f"--corpus is {languages!r}, not SOURCES-TARGETS as de-en or "
                             "de,es,it-en")
        self.sources, self.targets = (side.split(",") for side in sides)
        unknown = set(self.sources + self.targets) - set(LANGUAGES)
        if unknown or set(self.sources) & set(self.targets):
            raise InputError(f"--corpus is {languages!r}; the built-in corpus speaks "
                             f"{', '.join(LANGUAGES)}, and does not translate a language into "
                             "itself")
        self.seed = seed

    def rows(self, epoch, size=None, test=False):
        size = size or self.SIZE
        return [builtin_row(k, seed=self.seed, source=self.sources[k % len(self.sources)],
                            targets=self.targets, test=test)
                for k in range(epoch * size, (epoch + 1) * size)]

    def seconds(self, row):
        """About how long the voice takes to say it."""
        sounds = sounds_of(row.asr.replace(" ", ""))
        spoken = sum(SOUNDS[sound][0] for sound in sounds) * make_speaker(row.speaker).rate
        return (spoken + SOUNDS["_"][0] * (10 + 0.85 * len(row.asr.split()))) / 1000

    def unseen(self, n):
        """n test utterances with their audio: sentences and speakers that never occur in
        training."""
        return [(row, speak_row(row, self.seed)[0]) for row in self.rows(0, n, test=True)]


def write_sound(path, samples):
    import soundfile
    try:
        soundfile.write(path, samples, SAMPLE_RATE)
    except (soundfile.SoundFileError, UnicodeEncodeError) as error:    # a full disk, as a rule
        raise InputError(f"{path}: cannot be written: {error}") from None


def write_corpus(folder, size, options):
    """So many built-in utterances as audio files and a manifest, with links and times."""
    if not folder:
        raise InputError("--write-corpus: the folder's name is empty")
    if options.manifest or options.resume:
        raise InputError(f"--write-corpus {folder} writes the built-in corpus: it does not go with "
                         f"{options.manifest or '--resume ' + options.resume}")
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"--write-corpus wants a positive whole number, not {size!r}")
    n, corpus, folder = int(size), BuiltIn(options.corpus, options.seed), Path(folder)
    if (folder / "manifest.jsonl").exists():
        raise InputError(f"--write-corpus {folder}: there is a manifest.jsonl already")
    folder.mkdir(parents=True, exist_ok=True)
    rows = corpus.rows(0, n)
    for row in tqdm(rows, unit="utt", leave=False, disable=None):
        samples, _ = speak_row(row, options.seed)
        row.audio = str(folder / f"{row.id}.flac")
        write_sound(row.audio, np.clip(samples, -1, 1))
    write_manifest(folder / "manifest.jsonl", rows)
    minutes = sum(row.duration for row in rows) / 60
    print(f"{n} utterances, {minutes:.1f} minutes: {folder / 'manifest.jsonl'}")


# ---- The command ---------------------------------------------------------------------------------

def flag(name):
    return "--" + name.replace("_", "-")


def numbers_of(text):
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between "
                                         "them") from None


def make_parser():
    parser = argparse.ArgumentParser(description="\n\n".join(__doc__.split("\n\n")[:2]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    for f in fields(Options):
        kind, text = f.metadata["kind"], f.metadata["text"]
        if f.default not in (None, "", ()) and kind is not bool:
            real = f", with a manifest {REAL[f.name]}" if f.name in REAL else ""
            text += f" (default {f.default}{real})"
        if f.name == "manifest":
            parser.add_argument("manifest", nargs="?", help=text)
        elif kind is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag(f.name), type=numbers_of if kind is tuple else kind, help=text,
                                choices=f.metadata["choices"])
    parser.add_argument("--write-corpus", nargs=2, metavar=("DIR", "N"),
                        help="write N built-in utterances as a manifest, and stop")
    return parser


def parse_options(argv):
    """-> Options: the defaults, those for real speech, those of the run to go on with, the command
    line; later wins."""
    return read_arguments(argv)[0]


def read_arguments(argv):
    """-> parse_options(argv), and what --write-corpus was given, [DIR, N], or None."""
    given = vars(make_parser().parse_args(argv))
    folder_and_size = given.pop("write_corpus", None)
    return options_of(given), folder_and_size


def options_of(given):
    for name in ("manifest", "dev", "noise", "resume", "init", "out"):
        # As of a shell's variable that is not set; a run that goes on may do without some.
        if given.get(name) == "" and not (given.get("resume") and name in ("dev", "noise")):
            raise InputError(f"{name if name == 'manifest' else flag(name)} is empty")
    for name in ("manifest", "dev", "noise", "init", "resume"):
        if given.get(name):
            given[name] = os.path.abspath(given[name])  # a run goes on wherever one stands
    if given.get("resume"):
        return resumed_options(given)
    options = replace(Options(), **(REAL if given.get("manifest") else {}))
    if given.get("restrict") or given.get("interleave", "align") not in ("align", "time"):
        options = replace(options, prune=0)   # a band's steep end pulls bursts before their sound
    return check(replace(options, **given))


def resumed_options(given):
    folder = run_folder(given["resume"])
    saved = load(folder / "resume.pt")[1].get("options")
    if not isinstance(saved, dict) or not saved.keys() <= {f.name for f in fields(Options)}:
        raise InputError(f"{folder / 'resume.pt'}: its options are not those of this train.py: "
                         f"{saved!r:.80}")
    if Path(given.get("out", folder)).resolve() != folder.resolve():
        raise InputError(f"--out {given['out']}: a run goes on in its own folder, {folder}")
    for name in FIXED:
        if name in given and given[name] != saved.get(name):
            raise InputError(f"{flag(name)} {given[name]}: the checkpoint in {folder} was made "
                             f"with {saved.get(name)}, which cannot be changed on the way")
    device = given.pop("device", "")
    here = {"resume": str(folder), "out": str(folder), "device": device}
    with undamaged(folder / "resume.pt"):
        saved = saved | {"chunks": tuple(saved.get("chunks", ()))}
        for f in fields(Options):
            value, kind = saved.get(f.name, f.default), f.metadata["kind"]
            if value is not f.default and type(value) not in (kind, int if kind is float else kind):
                raise ValueError(f"its option {f.name} is {value!r:.60}")
        return check(Options(**(saved | given | here)))


@contextmanager
def undamaged(path):
    """Around what a checkpoint may hold and none of ours does."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: a damaged checkpoint, or one of another version of train.py: "
                         f"{error}") from None


def run_folder(path):
    """The folder of a run, given it or one of its files."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not (folder / "resume.pt").is_file():
        raise InputError(f"{path}: nothing to go on with, {folder / 'resume.pt'} is not there")
    return folder


def check(options):
    """The same options, complete, or an InputError that names the flag and its value."""
    for f in fields(Options):
        value, low, high = getattr(options, f.name), f.metadata["low"], f.metadata["high"]
        if value is None or low is None:
            continue
        most = 2 ** 31 - 1 if high is None else high
        if not low <= value <= most:
            allowed = f"{low} or more" if high is None and value < low else f"from {low} to {most}"
            raise InputError(f"{flag(f.name)} is {value}, not {allowed}")
    if options.warm_steps >= options.steps:
        raise InputError(f"--warm-steps is {options.warm_steps} of --steps {options.steps}: the "
                         "transducer would never start")
    try:
        check_mode(options.interleave)
    except TextError as error:
        raise InputError(f"--interleave: {error}") from None
    longest = round(stream.LONGEST_CHUNK_S / PRESETS[options.preset].frame_s)
    if too_long := [chunk for chunk in options.chunks if chunk > longest]:
        raise InputError(f"--chunks has {too_long[0]}, but stream.py takes chunks of at most "
                         f"{longest} frames, a minute (0: the whole utterance)")
    if options.prune == 1:
        raise InputError("--prune is 1, not 0 or at least 2: a band of one row never rises")
    if options.restrict and options.prune:
        raise InputError(f"--restrict is {options.restrict}, but --prune {options.prune} chooses "
                         "the lattice already: give --prune 0 too")
    if options.dev and not options.manifest:
        raise InputError(f"--dev {options.dev}: without a manifest the built-in corpus is learned, "
                         "which has unseen utterances of its own")
    if not options.manifest:
        BuiltIn(options.corpus, options.seed)
    elif options.corpus != Options.corpus:
        raise InputError(f"--corpus {options.corpus} beside the manifest {options.manifest}: one "
                         "of the two is learned")
    if options.noise:
        noise_files(options.noise)
        if not options.augment:
            raise InputError(f"--noise {options.noise} is never heard with --augment 0")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device is {options.device!r}, not cpu or cuda (of several GPUs, "
                         "CUDA_VISIBLE_DEVICES picks one)")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device is {device}, but torch {torch.__version__} sees no GPU here")
    return replace(options, device=device)


def main(argv=None):
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:        # closed: progress bars want one
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):    # a letter that the screen lacks is a question mark
        sys.stdout.reconfigure(errors="replace")
    with redirect_stdout(Outlived(sys.stdout)), redirect_stderr(Outlived(sys.stderr)):
        try:
            return command(argv)
        finally:
            print(end="", flush=True)         # here, where what a full disk refuses is dropped


def command(argv):
    """The exit code: 0; 2 after one line about what is wrong; 130 if stopped before it began."""
    try:
        options, folder_and_size = read_arguments(argv)
        if folder_and_size:
            write_corpus(*folder_and_size, options)
            return 0
        folder, stopped = train(options)
        if int(os.environ.get("RANK", 0)):                     # the first process tells the rest
            return 0
        if stopped:
            print(f"stopped; go on with: {resuming(folder)}")
            return 0
        example = "FILE" if options.manifest else live_captions(folder, options)
        print(f"\nthe model is {folder / 'model.pt'}; stream a file with it:\n"
              f"python stream.py {folder / 'model.pt'} {example}")
    except USER_ERRORS as error:
        tell(f"train.py: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:               # a processor's are of no type
        said, memory = str(error).partition("\n")[0], too_little_memory(error)
        if not memory and not said.startswith("DataLoader worker (pid"):      # one was killed
            raise
        tell(f"train.py: {said or 'out of memory'}" + " (the same update in less memory: half of "
             "--batch-seconds, twice --accumulate)" * memory)
        return 2
    except KeyboardInterrupt:
        tell("train.py: stopped")
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
