"""Audio in, words out: the streaming loop, greedy and beam search, captions, and how good and how
late the words are.

A stream is cut into chunks of C encoder frames. When the samples of one more chunk are there, it
goes

    samples -> log-mel -> encoder (keys and values of earlier chunks are cached) -> search
            -> tokens -> words

and what waits is never more than a chunk and 15 ms. So the same computations run on the same shapes
however the audio is cut into packets, and the result is the same to the last bit. (Streams that are
stepped as one batch may differ in the last bits: matrix products of another shape add up in another
order.)

`step` is the whole loop; searches, audio files and captions follow, and measuring comes last. The
network is model.py's, turning tokens into words serialize.py's. `python stream.py MODEL FILE`
prints captions, `python stream.py MODEL --eval MANIFEST` error rates and latency; alone, it shows
that packets do not matter.
"""
import os

if __name__ == "__main__":  # numpy, which resamples, has threads of its own beside --threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import io
import json
import math
import operator
import queue
import re
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
import unicodedata
from collections import Counter
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

try:
    from model import (HOP, PRESETS, SAMPLE_RATE, WINDOW, State, Transducer, load, log_mel,
                       too_little_memory)
    from model import InputError as ModelError
    from serialize import InputError, StreamParser, Tokenizer, join, read_manifest, units
except ModuleNotFoundError as error:
    if __name__ != "__main__" or error.name not in ("model", "serialize"):
        raise
    print(f"stream.py: {error.name}.py must lie beside it", file=sys.stderr)
    sys.exit(2)

BLANK = 0
LIMITS = (20, 500)  # labels in one frame, and in the last: a whole translation may be still to come
AHEAD = 8           # frames that greedy search looks at in one call
HALF_CHUNK = "half a chunk"
LONGEST_CHUNK_S = 60.0
LONGEST_WHOLE_S = 300  # of sound in one piece, with chunk 0: memory grows with its square
WIDEST_BEAM = 256   # hypotheses
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
BABBLE = 100.0      # tokens per second of sound; letters of quick speech with translation are 40
LOUDEST = 16.0      # float samples beyond -1..1 by so much are of another scale
PER_MS = SAMPLE_RATE / 1000  # samples in a millisecond


# ---- The loop ------------------------------------------------------------------------------------

class Written(NamedTuple):
    """One token of the output."""
    token: int
    frame: int        # the encoder frame that wrote it, counted from the start of the stream
    log_prob: float   # of the token where it was written, whatever the search was told to prefer


@dataclass
class Word:
    stream: str        # the tag of its stream
    text: str
    delay_ms: float    # the audio the model needed: to the end of the chunk after which it is shown
    start_s: float     # the start of the encoder frame that wrote its first token
    end_s: float       # the end of the encoder frame that wrote its last token, its separator
    elapsed_ms: float  # when it was there, had the audio come in real time, computing included
    confidence: float = 1.0  # geometric mean of the probabilities of its tokens


@dataclass
class Pause:
    """An utterance has ended: words were written, and then no token for a while. Seen where a chunk
    ends; none stands at the end of the audio."""
    delay_ms: float
    start_s: float     # the end of the last frame that wrote a token
    end_s: float       # so much has been heard
    elapsed_ms: float


class Streamer:
    """One audio stream. Many may share a model: `push` to each of them, or `close` it, then
    `advance` steps them in one batch."""

    def __init__(self, model, tokenizer, *, chunk=None, pause=None, tail=0.0, **search):
        """chunk: encoder frames, by default the model's first; 0: everything at once, at the end.
        pause: seconds without a token after which a Pause stands among the words, looked at where a
        chunk ends; None: never.
        tail: seconds of silence that the model hears behind the end, for models whose training had
        some there: they wait for it before they write the last words.
        search: beam, limits, hold, blank_penalty, see `new_search`.
        Raises InputError for an option out of range, a tokenizer of another size than the model's,
        a model in training mode."""
        self.model, self.config = model, model.config
        self.chunk = self.config.chunks[0] if chunk is None else whole("chunk", chunk)
        if not 0 <= self.chunk <= LONGEST_CHUNK_S / self.config.frame_s:
            raise InputError(f"chunk {self.chunk} must be 0, for everything at the end, or up to "
                             f"{LONGEST_CHUNK_S / self.config.frame_s:.0f} frames, a minute")
        if len(tokenizer) != self.config.vocab:
            raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the model "
                             f"{self.config.vocab}")
        if model.training:
            raise InputError("the model is in training mode, with dropout: call model.eval()")
        self.waiting = [np.zeros(0, np.float32)]  # samples that no chunk has used up yet
        self.received = self.frames = 0           # samples got, encoder frames done
        self.clock_ms, self.closed = 0.0, False   # end of the previous step, as elapsed_ms counts
        self.began = 0.0                          # when the computer turned to it
        self.encoder_state = model.encoder.initial_state(1, self.chunk)
        if pause is not None and not (isinstance(pause, (int, float)) and 0 < pause < 1e6):
            raise InputError(f"pause {pause!r} must be a number of seconds between 0 and 1e6")
        self.pause = None if pause is None else math.ceil(pause / self.config.frame_s)
        if not (isinstance(tail, (int, float)) and 0 <= tail <= LONGEST_CHUNK_S):
            raise InputError(f"tail {tail!r} must be a number of seconds from 0 to "
                             f"{LONGEST_CHUNK_S:g}")
        self.tail = round(tail * SAMPLE_RATE)
        self.search = new_search(model, self.chunk, **search)
        self.speller, self.n_tokens = Speller(tokenizer), 0
        self.in_utterance = False                 # something was written, and no pause since

    def accept(self, samples):
        """Samples (N,) at 16 kHz, float in -1..1 or int16, any number -> the words they finish.
        Raises InputError for other samples, beyond +-16 or no number, after the end, and for more
        than 300 s with chunk 0."""
        self.push(samples)
        return advance([self])[0]

    def flush(self):
        """The audio has ended: run what is left of it and release every word."""
        self.close()
        return advance([self])[0]

    def close(self):
        """No more audio comes: the next `advance` runs what is left."""
        self.closed = True

    def push(self, samples):
        """Samples as for `accept`, which wait until `advance`."""
        samples = np.asarray(samples)
        if samples.dtype == np.int16:
            samples = samples / np.float32(32768)
        if samples.dtype.kind != "f":
            raise InputError(f"samples must be float in -1..1, or int16, not {samples.dtype}")
        samples = samples.astype(np.float32)  # a copy: the caller may use his buffer again
        if self.closed:
            raise InputError("this stream was flushed; another one starts with a new Streamer")
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise InputError("samples must be finite numbers in one dimension, not "
                             f"{samples!r:.200}")
        if samples.size and np.abs(samples).max() > LOUDEST:
            raise InputError(f"float samples must lie in -1..1, not {np.abs(samples).max():g}: "
                             "int16 is scaled here if it comes as int16")
        if not self.chunk and self.received + len(samples) > LONGEST_WHOLE_S * SAMPLE_RATE:
            raise InputError(f"chunk 0 hears everything at once, {LONGEST_WHOLE_S} s at most: give "
                             "it a number of frames")
        self.waiting.append(samples)
        self.received += len(samples)

    def due(self):
        """What can run now, as (frames, whether they are the last), or None. After the end: a whole
        chunk where there still is one, then the shorter last one as it is."""
        if self.closed:
            left = self.config.frames(self.received + self.tail) - self.frames
            n_frames = min(left, self.chunk or left)
            return (n_frames, n_frames == left) if left else None
        end = (self.frames + self.chunk) * HOP * self.config.subsampling + WINDOW - HOP
        return (self.chunk, False) if self.chunk and self.received >= end else None

    def take(self, n_frames):
        """The samples of the next frames and of the last window's tail, zeros beyond the end."""
        used = n_frames * HOP * self.config.subsampling
        samples = np.concatenate(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
        self.waiting, self.frames = [samples[used:]], self.frames + n_frames
        samples = samples[:used + WINDOW - HOP]
        return np.pad(samples, (0, used + WINDOW - HOP - len(samples)))

    def events(self, tokens, final):
        """[Written] of one step -> its words, and a Pause if one was long enough. Nothing here
        depends on packets but the computing time in `elapsed_ms`."""
        self.n_tokens += len(tokens)
        spelled = [word for written in tokens for word in self.speller.feed(written)]
        self.in_utterance |= bool(spelled or self.speller.pending)
        pause = bool(self.pause and self.in_utterance and not final
                     and self.search.quiet >= self.pause and not self.search.withheld)
        if final and not math.isfinite(self.search.score):
            raise InputError("the model computes what is no number: its weights are damaged or far "
                             "too large")
        if final or pause:  # a word that is half written ends with its utterance
            spelled += self.speller.flush()
        last_sample = HOP * (self.frames * self.config.subsampling - 1) + WINDOW
        delay_ms = min(last_sample, self.received) / PER_MS
        now = time.perf_counter()
        self.clock_ms = max(delay_ms, self.clock_ms) + (now - self.began) * 1000
        self.began = now
        frame_s, heard_s = self.config.frame_s, self.received / SAMPLE_RATE
        events = [Word(tag, text, delay_ms, start_s=min(tokens[0].frame * frame_s, heard_s),
                       end_s=min((tokens[-1].frame + 1) * frame_s, heard_s),
                       elapsed_ms=self.clock_ms,
                       confidence=math.exp(sum(t.log_prob for t in tokens) / len(tokens)))
                  for tag, text, tokens in spelled]
        if pause:
            self.in_utterance = False
            began_s = min((self.frames - self.search.quiet) * frame_s, heard_s)
            events.append(Pause(delay_ms, began_s, min(self.frames * frame_s, heard_s),
                                self.clock_ms))
        return events


class Speller:
    """Tokens -> words, with the tokens that spell each; counts, by stream, what is malformed."""

    def __init__(self, tokenizer):
        self.parser, self.first_byte = StreamParser(tokenizer), tokenizer.first_byte
        self.pending = []       # the tokens of the word that is not complete yet
        self.cut = Counter()    # words that a tag ended, not their own last token
        self.invalid = Counter()  # characters that were not UTF-8

    def feed(self, written):
        """[(tag, text, its tokens)] that this token completes."""
        tag = self.parser.tag
        if 0 < written.token < self.first_byte:
            self.cut[tag] += bool(self.parser.pending)
        else:
            self.pending.append(written)
        return self.release(tag, lambda: self.parser.feed(written.token))

    def flush(self):
        return self.release(self.parser.tag, self.parser.flush)

    def release(self, tag, finish):
        invalid = self.parser.invalid
        pairs, tokens = finish(), self.pending
        self.invalid[tag] += self.parser.invalid - invalid
        if not self.parser.pending:
            self.pending = []
        return [(tag, text, tokens) for tag, text in pairs]


def advance(streamers):
    """Run all that can run, chunks of one model and size as one batch -> the new words of each."""
    events = {streamer: [] for streamer in streamers}
    for streamer in streamers:                    # also those that wait while others are stepped
        streamer.began = time.perf_counter()

    def kind(streamer):
        return id(streamer.model), type(streamer.search), streamer.chunk, streamer.due()
    while ready := [streamer for streamer in streamers if streamer.due()]:
        group = [streamer for streamer in ready if kind(streamer) == kind(ready[0])]
        for streamer, found in zip(group, step(group, *ready[0].due())):
            events[streamer] += found
    return list(events.values())


@torch.inference_mode()
def step(streamers, n_frames, final):
    """The next `n_frames` encoder frames of every stream in one batch -> the new words of each."""
    model = streamers[0].model
    samples = np.stack([streamer.take(n_frames) for streamer in streamers])             # (B, N)
    samples = torch.from_numpy(samples).to(model.joint.output.weight)
    mel = log_mel(samples, model.config.n_mels, model.config.floor)                 # (B, F, n_mels)
    state = State.join([streamer.encoder_state for streamer in streamers])
    frames, state = model.encoder(mel, state=state)                                     # (B, T, D)
    for b, streamer in enumerate(streamers):
        streamer.encoder_state = state.select([b])  # a copy: a slice would keep the batch alive
    searches = [streamer.search for streamer in streamers]
    tokens = type(searches[0]).advance(searches, model.joint.encoder_proj(frames), final)
    return [streamer.events(written, final) for streamer, written in zip(streamers, tokens)]


# ---- Searches: greedy, and beam ------------------------------------------------------------------

def new_search(model, chunk, *, beam=1, limits=LIMITS, hold=HALF_CHUNK, blank_penalty=0.0):
    """Greedy search for a beam of one, else beam search.

    limits: the symbols that one frame may write, and those of the last frame.
    hold: frames for which the best hypothesis must have held a token before it is shown; None:
        until all hypotheses agree.
    blank_penalty: taken off the log-probability of blank wherever it is compared with a label's,
        against translations that are too short (HENT-SRT, 2025); never part of a score.
    """
    beam = whole("beam", beam)
    if not 1 <= beam <= WIDEST_BEAM:
        raise InputError(f"beam {beam} must be from 1 to {WIDEST_BEAM}")
    try:
        each, last = map(operator.index, limits)
    except (TypeError, ValueError):
        raise InputError(f"limits {limits!r} must be two whole numbers") from None
    if not (isinstance(blank_penalty, (int, float)) and abs(blank_penalty) < 1e6):
        raise InputError(f"blank penalty {blank_penalty!r} must be a number between -1e6 and 1e6")
    if beam == 1:
        return Greedy(model, (each, last), blank_penalty)
    hold = chunk // 2 if hold == HALF_CHUNK else None if hold is None else whole("hold", hold)
    return Beam(model, beam, (each, last), hold=hold, blank_penalty=blank_penalty)


def whole(name, value):
    """numpy's integers too, as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} {value!r} must be a whole number") from None


@dataclass
class Labels:
    """What the label encoder (prediction network) made of the labels that each of B streams has
    written."""
    proj: torch.Tensor  # (B, J), ready to be added to a projected encoder frame
    state: State

    @staticmethod
    def start(model):
        """Of one stream that has written nothing."""
        return Labels.read(model, torch.zeros(1, 0, dtype=torch.long))

    @staticmethod
    def read(model, tokens, state=None):  # tokens (B, 1), or (1, 0) at the start
        out, state = model.label_encoder(tokens.to(model.joint.output.weight.device), state)
        return Labels(model.joint.label_proj(out[:, -1]), state)

    def after(self, model, tokens):
        """After one more token of each stream; where it is BLANK, the stream keeps what it had."""
        if not any(tokens):
            return self
        moved = Labels.read(model, torch.tensor(tokens)[:, None], self.state)
        if all(tokens):
            return moved
        B = len(tokens)
        return Labels.join([self, moved]).select([b + B * (token != BLANK)
                                                  for b, token in enumerate(tokens)])

    def select(self, rows):
        return Labels(self.proj[rows], self.state.select(rows))

    @staticmethod
    def join(parts):
        return Labels(torch.cat([part.proj for part in parts]),
                      State.join([part.state for part in parts]))


class Greedy:
    """One stream's way through the lattice: up by a label, on to the next frame by blank, the
    better one each time."""
    withheld = False            # what it has written, it has shown

    def __init__(self, model, limits=LIMITS, blank_penalty=0.0):
        self.model, self.limits, self.blank_penalty = model, limits, blank_penalty
        self.labels = Labels.start(model)
        self.done = 0           # frames of earlier calls
        self.at = 0             # frame of this call at which the path stands
        self.symbols = 0        # labels written in that frame
        self.quiet = 0          # frames since the last label, where a call ends
        self.score = 0.0        # log-probability of the path
        self.capped = 0         # frames that asked for more labels than the limit
        self.tokens = []        # [Written] of this call

    @staticmethod
    def advance(searches, frames, final, lengths=None):
        """Projected frames (B, T, J), the first `lengths` of each stream -> its new [Written].

        Only a label moves the label encoder, never blank. So until a label comes, nothing in the
        joint depends on the search, and one call looks at AHEAD frames of every stream that is not
        through; its path runs through their blanks and stops at a label.
        """
        B, T, _ = frames.shape
        lengths, model = lengths or [T] * B, searches[0].model
        labels = Labels.join([search.labels for search in searches])
        for search in searches:
            search.at, search.tokens = 0, []
        while rows := [b for b in range(B) if searches[b].at < lengths[b]]:
            nodes = look_ahead(model, frames, labels, rows, [searches[b].at for b in rows])
            written = [BLANK] * B
            for b, path in zip(rows, nodes):
                written[b] = searches[b].follow(path, lengths[b], final)
            labels = labels.after(model, written)
        for b, search in enumerate(searches):
            search.end_call(labels.select([b]), lengths[b])
        return [search.tokens for search in searches]

    def follow(self, path, length, final):
        """Walk along the (label, its log-probability, that of blank) of successive frames, up to
        and with the first label that is written. Returns it, or BLANK."""
        for label, label_score, blank_score in path:
            if self.at == length:
                break
            limit = self.limits[final and self.at == length - 1]
            wants_label = label_score > blank_score - self.blank_penalty
            if wants_label and self.symbols < limit:
                self.score += label_score
                self.symbols += 1
                self.tokens.append(Written(label, self.done + self.at, label_score))
                return label
            self.score += blank_score
            self.capped += wants_label
            self.at += 1
            self.symbols = 0
        return BLANK

    def end_call(self, labels, length):
        """The stream's own part of the batch, and how long it has been quiet."""
        self.labels, self.done = labels, self.done + length
        self.quiet += length
        if self.tokens:
            self.quiet = self.done - 1 - self.tokens[-1].frame


def look_ahead(model, frames, labels, rows, at):
    """For some rows of a batch, AHEAD frames from `at` on -> for each row, the likeliest label of
    each frame, its log-probability, and that of blank. Beyond the end the last frame stands in;
    `follow` stops before it."""
    rows = torch.tensor(rows, device=frames.device)[:, None]                     # (R, 1)
    at = torch.tensor(at, device=frames.device)[:, None]
    window = at + torch.arange(AHEAD, device=frames.device)                      # (R, AHEAD)
    frames = frames[rows, window.clamp(max=frames.shape[1] - 1)]                 # (R, AHEAD, J)
    log_probs = model.joint.combine(frames, labels.proj[rows]).log_softmax(-1)   # (R, AHEAD, V)
    label_scores, label = log_probs[..., BLANK + 1:].max(-1)
    found = (label + BLANK + 1).tolist(), label_scores.tolist(), log_probs[..., BLANK].tolist()
    return [zip(*row) for row in zip(*found)]


@torch.inference_mode()
def greedy_batch(model, mel, lengths, chunk=None, limits=LIMITS):
    """mel (B, F, n_mels) padded, lengths (B,) in mel frames -> (ids, frames) of each, as streaming
    gives, but offline."""
    lengths = torch.as_tensor(lengths, device=mel.device)
    out, _ = model.encoder(mel, lengths=lengths, chunk=chunk)
    n_frames = (-(-lengths // model.config.subsampling)).tolist()
    searches = [Greedy(model, limits) for _ in n_frames]
    found = Greedy.advance(searches, model.joint.encoder_proj(out), True, n_frames)
    return [([one.token for one in tokens], [one.frame for one in tokens]) for tokens in found]


@dataclass
class Hypothesis:
    tokens: tuple   # ids since the last token that was shown; equal ones are one hypothesis
    written: tuple  # the same as Written: of the likelier path, where two have met
    score: float    # log of the summed probability of the paths that write these tokens
    labels: Labels


class Beam:
    """Time-synchronous: the hypotheses stand at the same frame and go on together, once each has
    taken blank there.

    In one symbol step, every hypothesis that has not left the frame may leave it by blank or write
    any label. Those that left and those that wrote are pruned TOGETHER to the size of the beam, so
    a beam of one is greedy search. Paths that have written the same labels are one hypothesis and
    their probabilities add up.

    Every hypothesis takes one blank a frame. So a penalty on blank weighs the same on all of them
    where a frame ends; it matters only inside a frame, between those that left and those that
    wrote.
    """

    def __init__(self, model, size, limits=LIMITS, *, hold=None, blank_penalty=0.0):
        self.model, self.size, self.limits = model, size, limits
        self.hold, self.blank_penalty = hold, blank_penalty
        self.hyps = [Hypothesis((), (), 0.0, Labels.start(model))]  # the likeliest first
        self.done = 0         # frames done
        self.capped = 0       # frames that asked for more labels than the limit
        self.score = 0.0      # of the likeliest hypothesis
        self.shown_at = -1    # frame of the last token that was shown
        self.leader = ()      # the tokens of the likeliest hypothesis, after the frame before
        self.held_since = []  # for each of them, how many frames were done when it came to stay

    @staticmethod
    def advance(searches, frames, final):
        """frames (B, T, J) -> the tokens of each stream that can be shown now, as [Written]."""
        for search, own in zip(searches, frames):
            for t, frame in enumerate(own):
                search.one_frame(frame, search.limits[final and t == len(own) - 1])
        return [search.end_call(final) for search in searches]

    @property
    def quiet(self):
        """Frames since the last label of the likeliest hypothesis."""
        written = self.hyps[0].written
        return self.done - 1 - (written[-1].frame if written else self.shown_at)

    @property
    def withheld(self):
        """Whether the likeliest hypothesis has written what is not shown yet."""
        return bool(self.hyps[0].tokens)

    def one_frame(self, frame, limit):
        """All hypotheses through one frame, with up to `limit` labels each. In each round every
        active hypothesis is tried with blank, into `left`, and with all labels; those of the best
        that wrote one are active in the next round."""
        active, left = self.hyps, {}  # left: by tokens, those that took blank
        for symbols in range(limit + 1):
            labels = torch.cat([hyp.labels.proj for hyp in active])                      # (A, J)
            log_probs = self.model.joint.combine(frame, labels).log_softmax(-1)          # (A, V)
            for hyp, blank_score in zip(active, log_probs[:, BLANK].tolist()):
                take_blank(hyp, blank_score, left)
            if symbols == limit:
                label_score, blank_score = log_probs[0, BLANK + 1:].max(), log_probs[0, BLANK]
                self.capped += (label_score > blank_score - self.blank_penalty).item()
                break
            active, left = self.prune(active, log_probs, left)
            if not active:
                break
        self.hyps = sorted(left.values(), key=lambda hyp: -hyp.score)[:self.size]
        self.done, self.score = self.done + 1, self.hyps[0].score
        self.follow_leader()

    def prune(self, active, log_probs, left):
        """The best of those that left and of every active one with every label -> what is active
        and left now."""
        start = torch.tensor([hyp.score for hyp in active], dtype=torch.double)
        labels = log_probs[:, BLANK + 1:].cpu()     # Apple's GPU has no double
        scores = (labels.double() + start[:, None]).flatten()                      # (A (V - 1),)
        scores, index = scores.topk(min(self.size, scores.numel()))
        pool = [(hyp.score - self.blank_penalty, hyp, None) for hyp in left.values()]
        chosen = zip(scores.tolist(), index.tolist(), labels.flatten()[index].tolist())
        for score, k, log_prob in chosen:
            parent, label = divmod(k, labels.shape[1])
            pool.append((score, active[parent], Written(label + BLANK + 1, self.done, log_prob)))
        pool = sorted(pool, key=lambda entry: -entry[0])[:self.size]
        left = {hyp.tokens: hyp for _, hyp, written in pool if written is None}
        return self.grow([entry for entry in pool if entry[2] is not None]), left

    def grow(self, entries):
        """[(score, hypothesis, the label it writes)] -> the longer hypotheses."""
        if not entries:
            return []
        labels = Labels.join([hyp.labels for _, hyp, _ in entries])
        labels = labels.after(self.model, [written.token for *_, written in entries])
        return [Hypothesis(hyp.tokens + (written.token,), hyp.written + (written,), score,
                           labels.select(slice(k, k + 1)))
                for k, (score, hyp, written) in enumerate(entries)]

    def follow_leader(self):
        """A frame ends: since when has the likeliest hypothesis held each of its tokens?"""
        tokens = self.hyps[0].tokens
        same = common_prefix([self.leader, tokens])
        self.held_since = self.held_since[:same] + [self.done] * (len(tokens) - same)
        self.leader = tokens

    def end_call(self, final):
        """Decide what can be shown, and cut the hypotheses that do not agree with it."""
        leader = self.hyps[0]
        if final:
            self.hyps = [leader]
        elif self.hold is not None:
            held = sum(self.done - since >= self.hold for since in self.held_since)
            self.hyps = [hyp for hyp in self.hyps if hyp.tokens[:held] == leader.tokens[:held]]
        return self.show()

    def show(self):
        """Take out the tokens that all hypotheses agree on, with the times of the likeliest one;
        times never fall, also where another one leads than before."""
        n = common_prefix([hyp.tokens for hyp in self.hyps])
        shown = [written._replace(frame=max(written.frame, self.shown_at))
                 for written in self.hyps[0].written[:n]]
        self.hyps = [replace(hyp, tokens=hyp.tokens[n:], written=hyp.written[n:])
                     for hyp in self.hyps]
        self.leader, self.held_since = self.leader[n:], self.held_since[n:]
        self.shown_at = shown[-1].frame if shown else self.shown_at
        return shown


def common_prefix(sequences):
    """The length of what all of them begin with."""
    return len(os.path.commonprefix(sequences))


def take_blank(hyp, blank_score, left):
    """Put a hypothesis among those that left, where it may meet one that writes the same."""
    hyp = replace(hyp, score=hyp.score + blank_score)
    if twin := left.get(hyp.tokens):
        likelier = max(twin, hyp, key=lambda one: one.score)
        hyp = replace(likelier, score=float(np.logaddexp(twin.score, hyp.score)))
    left[hyp.tokens] = hyp


# ---- Sound: files -------------------------------------------------------------------------------

# A file is read if its container says how much sound it holds and that much is there. What can be
# seen not to be whole, or is of another kind, is refused in one line with the ffmpeg command that
# hands it over. What states no length (an MP3 without an Info frame, a WAV or FLAC written into a
# pipe) is read to its last byte: whether more was meant to come, nobody can tell.
CONTAINERS = ("WAV", "WAVEX", "RF64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3")
CHUNKED = CONTAINERS[:5]  # other things may follow the sound; libsndfile has looked through them
UNKNOWN = 1 << 62         # libsndfile gives more frames than that where a header states no number
DENSEST = 8192            # samples in a byte: more than FLAC or Opus makes of silence
CUT_OFF = re.compile(  # what libsndfile notes about a file that ends before its sound does
    r"(?:data|SSND|Data Size) *: (\d+) \(should be"
    r"|(lacks an end-of-stream|Junk after|from 'ds64' chunk)")
RATES, MOST_CHANNELS = (4000, 200_000), 64

MAGIC = {  # first bytes (a regular expression) -> what that is
    rb"RIFF....WAVE|RIFX|RF64": "WAV", rb"FORM....AIF": "AIFF", rb"caff": "CAF", rb"\.snd": "AU",
    rb"fLaC": "FLAC", rb"OggS": "Ogg", rb"ID3": "MP3", rb"....ftyp": "MPEG-4 (m4a, mp4, mov)",
    rb"\x30\x26\xb2\x75": "Windows Media (wma, asf)", rb"\x1a\x45\xdf\xa3": "Matroska or WebM",
    rb"#!AMR": "AMR", rb"\xff[\xe0-\xff].{7,40}?(?:Xing|Info|LAME)": "MP3", rb"riff\x2e\x91": "W64",
    rb"wvpk": "WavPack", rb"MAC ": "Monkey's Audio", rb"FLV\x01": "Flash video",
    rb"Creative Voice File": "VOC", rb"NIST_1A": "NIST SPHERE"}
SYNC_WORDS = {rb"\xff[\xf0\xf1\xf8\xf9]": "AAC", rb"\x0b\x77": "AC-3"}  # PCM may begin so as well
MP3_KBITS = [[8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160],       # MPEG 2 and 2.5
             [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]]   # MPEG 1


class AudioError(InputError):
    """Sound that cannot be used: one line, in printable characters, that names the file."""
    def __init__(self, message):
        super().__init__("".join(c if shows(c) else ascii(c)[1:-1] for c in message))


class SilentError(AudioError):
    """All samples are zero."""


def refusal(path, reason):
    """The AudioError that also says how to hand over the sound of about any file."""
    return AudioError(f"{path}: {reason}; try: {piped('-i ' + quoted(str(path)))}")


def quoted(path):
    """A name as a shell and ffmpeg take it, on one line: no option, no protocol (12:30.m4a), and
    what does not show as bash's $'...' has it."""
    path = f"file:{path}" if ":" in path or path.startswith("-") else path
    if all(map(shows, path)):
        return shlex.quote(path)
    codes = [char if shows(char) else
             f"\\x{byte:02x}" if (byte := ord(char) - 0xDC00) in range(128, 256) else  # no UTF-8
             f"\\U{ord(char):08x}" for char in re.sub(r"[\\']", r"\\\g<0>", path)]
    return f"$'{''.join(codes)}'"


def piped(source):
    """The command that decodes what ffmpeg's options name, and captions it."""
    return (f"ffmpeg -loglevel error {source} -f s16le -ac 1 -ar {SAMPLE_RATE} - | "
            "python stream.py MODEL -")


def kind_of(head, kinds):
    """The name of what begins with these bytes, or None."""
    return next((name for magic, name in kinds.items() if re.match(magic, head, re.DOTALL)), None)


def frame_of(data):
    """(kind, bytes) of the MP3 or AAC frame whose header begins these bytes, or (None, 0)."""
    if len(data) < 6 or data[0] != 255 or data[1] < 0xE0:    # eleven bits that are 1
        return None, 0
    version, layer, code = data[1] >> 3 & 3, data[1] >> 1 & 3, data[2] >> 4
    if data[1] & 0xF6 == 0xF0:
        return "AAC", (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
    if version == 1 or layer != 1 or code in (0, 15) or data[2] >> 2 & 3 == 3:
        return None, 0
    rate = (44100, 48000, 32000)[data[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[version]  # MPEG 1, 2, 2.5
    bits = MP3_KBITS[version == 3][code - 1] * 1000 * (1152 if version == 3 else 576) // rate
    return "MP3", bits // 8 + (data[2] >> 1 & 1)


def framed(data):
    """"MP3" or "AAC" if these bytes begin with a frame and a second one stands where it ends: a
    stream that was taken up in its middle has no other mark."""
    kind, length = frame_of(data)    # a header alone has six or seven bytes
    return kind if kind and length > 6 and frame_of(data[length:])[0] == kind else None


def read_audio(path, start=0.0, duration=None):
    """A file, or a piece of it in seconds -> float32 samples (N,), mono, 16 kHz.

    These are all blocks of `audio_blocks`; AudioError if anything is wrong with the file."""
    return np.concatenate(list(audio_blocks(path, start, duration)))


def audio_blocks(path, start=0.0, duration=None):
    """A file, or a piece of it in seconds, as float32 blocks (N,), mono, 16 kHz, of about a second.

    Raises AudioError: before the first block for what its beginning shows, in the middle for
    samples that are no numbers, after the last one for what only the end can tell (cut off,
    silent)."""
    with opened(path) as (file, *ends):
        rate = file.samplerate
        blocks = checked(path, stored_blocks(path, start, duration, file, *ends))
        blocks = one_channel(path, rate, blocks)
        yield from blocks if rate == SAMPLE_RATE else resampled(blocks, rate)


class RawFile(io.BufferedReader):
    """The bytes of a file, for libsndfile, which calls back and must see no exception. A damaged
    header sends it to impossible places: it stays put. What cannot be read is its `fault`."""
    fault = None

    def seek(self, *place):
        try:
            return super().seek(*place)
        except (OSError, OverflowError):
            return self.tell()

    def readinto(self, buffer):
        try:
            return super().readinto(buffer)
        except OSError as error:             # a disk that was pulled out
            self.fault = error
            return 0

    def __exit__(self, kind, *error):
        super().__exit__(kind, *error)
        if self.fault and (kind is None or issubclass(kind, Exception)):     # not Ctrl-C
            raise self.fault


@contextmanager
def opened(path):
    """A file as soundfile.SoundFile; the frames that it must have, None if unstated; and a
    function: the bytes of sound that were not read yet, as a part of those that were."""
    import soundfile
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{path}: a folder, not a file of sound")
        if not stat.S_ISREG(mode):  # opening a pipe waits, a device never ends
            raise refusal(path, "not a regular file")
        # Opened by number, the file has no name: its suffix decides nothing.
        with RawFile(io.FileIO(os.open(path, os.O_RDONLY))) as raw:
            size, head = os.fstat(raw.fileno()).st_size, raw.read(4096)
            if not size:
                raise AudioError(f"{path}: an empty file")
            begin, end = between_tags(raw, size)
            stated = info_frame(raw, begin)
            if stated and not 0.99 * stated <= end - begin <= 1.01 * stated:
                raise refusal(path, f"cut off or joined: its Info frame states {stated} bytes, "
                                    f"{end - begin} are there")
            raw.seek(0)
            with uninterrupted():      # or Ctrl-C would be lost in libsndfile, which calls back
                file = soundfile.SoundFile(raw)
            with file:
                unstated = file.frames > UNKNOWN or file.format == "MP3" and not stated
                promised = None if unstated else file.frames
                if fault := fault_of_header(file, size, promised):
                    raise refusal(path, fault)
                yield file, promised, lambda: (end - raw.tell()) / max(1, raw.tell() - begin)
    except soundfile.LibsndfileError as error:
        what = "no format of sound that is known here (raw samples? give ffmpeg their -f, -ar, -ac)"
        if kind := kind_of(head, MAGIC) or framed(head) or kind_of(head, SYNC_WORDS):
            what = f"{kind}, cut off or not readable here ({error.error_string})"
            if error.code == 1:  # unrecognised
                what = f"{kind}, which is not read here"
        raise refusal(path, what) from None
    except OSError as error:
        raise AudioError(f"{path}: {error.strerror or error}") from None


def fault_of_header(file, size, promised):
    """What the header of a file of `size` bytes shows to be wrong with it, or None."""
    if file.format not in CONTAINERS:
        return f"{file.format} does not show whether it is whole"
    if not RATES[0] <= file.samplerate <= RATES[1] or file.channels > MOST_CHANNELS:
        return f"a header of {file.samplerate} samples a second in {file.channels} channels"
    if promised and promised > DENSEST * size:
        return f"a header that promises {promised} samples in {size} bytes"
    for length, other in CUT_OFF.findall(file.extra_info):
        # About 2^31 or 2^32 bytes is what is written into a pipe, where the length is not known.
        if other or min(abs(int(length) - 2 ** 31), abs(int(length) - 2 ** 32)) > 2 ** 16:
            return "cut off"
    # Where chunks should follow each other something else stands, maybe more of the sound.
    if after := re.search(r"at position (\d+)\. (?:Exiting|Resynching)", file.extra_info):
        rest = size - int(after[1])
        if promised and rest / int(after[1]) * promised / file.samplerate > 0.25:
            return f"goes on after the sound that its header states, for {rest} bytes"
    return None


def between_tags(raw, size):
    """(begin, end) of the sound in a file's bytes: ID3v2 may stand before, APE and ID3v1 behind."""
    begin, end = 0, size
    raw.seek(0)
    head = raw.read(10)
    if head[:3] == b"ID3":  # maybe with a picture; the length has seven bits in each of four bytes
        begin = 10 + sum(byte << 7 * k for k, byte in enumerate(reversed(head[6:])))
    raw.seek(max(0, size - 128))
    if raw.read(3) == b"TAG":
        end -= 128
    raw.seek(max(0, end - 32))
    footer = raw.read(32)
    # Its length counts the footer; bit 31 of the flags: there is a header too.
    if len(footer) == 32 and footer[:8] == b"APETAGEX":
        end -= int.from_bytes(footer[12:16], "little") + 32 * (footer[23] >> 7)
    return begin, end


def info_frame(raw, begin):
    """The bytes of sound that the first frame of an MP3 states, if it is an Info or Xing frame."""
    raw.seek(begin)
    pattern = rb"\xff[\xe0-\xff].{7,40}?(?:Xing|Info)\0\0\0(.)(.{8})"
    frame = re.match(pattern, raw.read(64), re.DOTALL)
    if not frame or not frame[1][0] & 2:  # flags: 1, there is a number of frames; 2, of bytes
        return None
    at = 4 * (frame[1][0] & 1)
    return int.from_bytes(frame[2][at:at + 4], "big")


def stored_blocks(path, start, duration, file, promised, left):
    """Blocks (N, channels) of a second, as they are stored; AudioError if some are not there."""
    import soundfile
    rate, at = file.samplerate, 0
    first = round(start * rate) if promised is None else min(round(start * rate), promised)
    end = math.inf if duration is None else first + round(duration * rate)
    if end <= first:
        raise AudioError(f"{path}: a piece of {duration} s holds no sound")
    try:
        if first and promised is not None and file.seekable():
            with uninterrupted():
                at = file.seek(first)
        # soundfile would set a seekable file after each block to where it stands already. That
        # tears the bits that MP3 frames share, and fails in a FLAC of unknown length.
        file.seekable = lambda: False
        while at < end:
            with uninterrupted():
                block = file.read(int(min(end - at, rate)), "float32", always_2d=True)
            if not len(block):
                break
            if not (finite := np.isfinite(block).all(1)).all():
                bad = at + int(finite.argmin())
                raise AudioError(f"{path}: NaN or infinite at {bad / rate:.4f} s (sample {bad})")
            at += len(block)
            if at > first:
                yield block[max(0, len(block) - (at - first)):]
    except soundfile.LibsndfileError as error:
        raise refusal(path, f"cut off or damaged after {at / rate:.2f} s "
                            f"({error.error_string})") from None
    if not at:
        raise refusal(path, "no samples, as its header says")
    if at < end:  # the file ended first
        if promised and at < promised - rate // 20:
            raise refusal(path, f"cut off, {at / rate:.2f} s of {promised / rate:.2f} are there")
        unread_s = 0 if file.format in CHUNKED else left() * at / rate
        if unread_s > 0.25:
            raise refusal(path, f"goes on after {at / rate:.2f} s for about {unread_s:.2f} s that "
                                "libsndfile does not reach")
    if at <= first or duration is not None and at < end - rate // 20:      # manifests may round
        wanted = "more" if duration is None else f"{duration} s"
        raise AudioError(f"{path}: {at / rate:.2f} s long, not {wanted} from {start} s on")


def one_channel(path, rate, blocks):
    """Blocks (N, C) -> (N,): the mean of the channels, or their sum, or the loudest alone.

    This is decided once, by the first ten seconds with sound."""
    head, failure = [], None
    try:
        for block in blocks:
            if block.shape[1] == 1 or not head and not block.any():
                yield block[:, 0]  # the only one, or silence in all of them
            else:
                head.append(block)
            if sum(map(len, head)) >= 10 * rate:
                break
    except AudioError as error:  # what was there before it is still to be heard
        failure = error
    if head:
        weights = mixing_weights(path, np.concatenate(head))
        yield from (block @ weights for block in chain(head, blocks))
    if failure:
        raise failure


def mixing_weights(path, head):
    """head (N, C) -> the weight of each channel (C,).

    The mean of C unrelated channels has 1 / C^2 of the sum of their powers. With much less, they
    cancel each other: the loudest is taken alone. With no more than that and one channel that has
    it all, the others are silent, as yet: the sum is that channel, and keeps who speaks later."""
    head, channels = head.astype(np.float64), head.shape[1]
    power, powers = np.square(head.mean(1)).mean(), np.square(head).mean(0)
    if power < 0.5 * powers.sum() / channels ** 2:
        best = int(powers.argmax())
        say(AudioError(f"{path}: channel {best + 1} of {channels} is taken; the others cancel it"))
        return np.eye(channels, dtype=np.float32)[best]
    alone = power < 1.2 * powers.max() / channels ** 2
    return np.full(channels, 1 if alone else 1 / channels, np.float32)


def checked(path, blocks):
    """The same blocks (N, C); AudioError for another scale, and at the end for silence or
    clipping."""
    n = clipped = 0
    heard = False
    for samples in blocks:
        peaks = np.abs(samples).max(1)
        if peaks.max() > LOUDEST:
            raise AudioError(f"{path}: a sample of {peaks.max():g}, where full scale is 1")
        n, heard = n + len(samples), heard or peaks.any()
        clipped += np.count_nonzero(peaks >= 0.999)
        yield samples
    if not heard:
        raise SilentError(f"{path}: silent, all {n} samples are zero")
    if clipped > 0.1 * n:
        raise AudioError(f"{path}: clipped, {clipped / n:.0%} of the samples are at full scale")


def readable(rows, strict=False, chunk=None):
    """Yield (row, samples) of the rows whose sound can be used; the others are named and left out,
    for chunk 0 also those that are too long to be heard in one piece.

    Raises InputError at the first bad row if `strict`, and at the end if there was no good one."""
    n_rows = bad = 0
    for row in rows:
        n_rows += 1
        try:
            samples = read_audio(row.audio, row.start, row.duration)
            if chunk == 0 and len(samples) > LONGEST_WHOLE_S * SAMPLE_RATE:
                raise InputError(f"{len(samples) / SAMPLE_RATE:.0f} s of sound, with chunk 0 at "
                                 f"most {LONGEST_WHOLE_S}")
        except InputError as error:
            if strict:
                raise InputError(f"{row.where}: {error}") from None
            say(f"{row.where}: skipped: {error}")
            bad += 1
            continue
        yield row, samples
    if bad == n_rows:
        raise InputError(f"none of the {n_rows} rows has sound that can be used")
    if bad:
        say(f"{bad} of {n_rows} rows skipped")


# ---- Sound: resampling --------------------------------------------------------------------------

class Resampler:
    """Band-limited interpolation by a windowed sinc, of samples that come in pieces of any size.

    Output n lies at input n down / up. It is a sum over the 2 half inputs around it, with weights
    that depend on the fraction of n down / up alone. `group` outputs in a row come from the same
    inputs, `length` of them: their weights are a matrix, and groups whose fractions agree share
    it. From 44.1 kHz, `up` is 160 and `down` 441: 80 outputs lie among some 220 inputs, come from
    400 with those that the filter adds at both ends, and 2 kinds of such groups take turns."""

    def __init__(self, rate, to=SAMPLE_RATE, crossings=32):
        common = math.gcd(rate, to)
        self.up, self.down = to // common, rate // common
        cutoff = 0.95 * min(1.0, self.up / self.down)  # as a part of the input's half sampling rate
        self.half = math.ceil(crossings / cutoff)
        self.weights = sinc_weights(self.up, self.down, cutoff, self.half)
        self.kinds, self.length, self.group = self.weights.shape
        self.inputs = np.zeros(self.half - 1, np.float32)  # before the first one: silence
        self.at = 1 - self.half                            # the index of inputs[0]
        self.done = 0                                      # groups of outputs given

    def begin(self, group):
        """The index of the first input that a group of outputs needs."""
        return group * self.group * self.down // self.up + 1 - self.half

    def feed(self, samples, last=False):
        """The outputs (N,) that these inputs complete; after the `last` ones come zeros."""
        received = self.at + len(self.inputs) + len(samples)
        n_outputs = -(-received * self.up // self.down)  # of all inputs, if they are the last
        if last:
            ready = -(-n_outputs // self.group)
        else:  # the largest for which begin(ready - 1) + length <= received
            free = received - self.length + self.half
            ready = max(self.done, (free * self.up - 1) // (self.group * self.down) + 1)
        tail = np.zeros(2 * self.length if last else 0, np.float32)
        self.inputs = np.concatenate([self.inputs, samples, tail])
        out = np.zeros((ready - self.done, self.group), np.float32)
        for k in range(min(self.kinds, len(out))):
            first = self.done + k
            rows = len(out[k::self.kinds])
            apart = self.kinds * self.group * self.down // self.up
            windows = np.lib.stride_tricks.sliding_window_view(self.inputs, self.length)
            windows = windows[self.begin(first) - self.at::apart][:rows]
            out[k::self.kinds] = np.ascontiguousarray(windows) @ self.weights[first % self.kinds]
        out = out.ravel()[:n_outputs - self.done * self.group]
        used = self.begin(ready) - self.at
        self.inputs, self.at, self.done = self.inputs[used:].copy(), self.at + used, ready
        return out


@lru_cache(maxsize=4)
def sinc_weights(up, down, cutoff, half):
    """(kinds, length, group): a low pass, sinc under a cos^2 window, as `Resampler` needs it."""
    group = max(size for size in range(1, 101) if up % size == 0)
    group *= max(1, 64 // group)
    kinds = up // math.gcd(up, group)  # so many groups are whole periods of `up` outputs
    base, fraction = np.divmod(np.arange(kinds * group) * down, up)  # of the outputs of one period
    at = np.arange(1 - half, half + 1) - fraction[:, None] / up
    window = np.cos(np.pi * np.clip(at / (2 * half), -0.5, 0.5)) ** 2
    offset = (base.reshape(kinds, group) - base[::group, None]).ravel()  # in its group's inputs
    weights = np.zeros((kinds, offset.max() + 2 * half, group), np.float32)
    kind, place = np.divmod(np.arange(kinds * group), group)
    inputs = offset[:, None] + np.arange(2 * half)
    weights[kind[:, None], inputs, place[:, None]] = cutoff * np.sinc(cutoff * at) * window
    return weights


def resampled(blocks, rate):
    """Blocks (N,) at `rate` -> blocks at 16 kHz, the last one the filter's tail."""
    resampler = Resampler(rate)
    for block in blocks:
        yield resampler.feed(block)
    yield resampler.feed(np.zeros(0, np.float32), last=True)


def resample(samples, rate, to):
    """Samples (N,) at `rate` in one piece -> at `to`."""
    return samples if rate == to else Resampler(rate, to).feed(samples, last=True)


# ---- Sound: standard input, microphone, and files at their own pace ------------------------------

WITHOUT = (f"arecord -q -f S16_LE -c 1 -r {SAMPLE_RATE} | python stream.py MODEL -   or: "
           + piped("-f alsa -i default"))
STALLED_S = 2.0  # of no packets, or of exact zeros, that are worth a message
LATE_S = 2.0     # of sound that waits to be heard
TOO_LATE_S = 30.0  # of it, after which live captions go on with what is said now
UNHEARD_S = 0.5  # of sound that still waits at the end


def packets(source, realtime):
    """Packets (N,) of a file, of standard input (`-`: 16-bit PCM) or of the microphone (`mic`)."""
    if source in ("-", "mic"):
        yield from standard_input() if source == "-" else microphone()
        return
    began, done, size = time.perf_counter(), 0, SAMPLE_RATE // 10
    for block in audio_blocks(source):
        for start in range(0, len(block), size):
            packet = block[start:start + size]
            done += len(packet)
            if realtime:
                time.sleep(max(0.0, began + done / SAMPLE_RATE - time.perf_counter()))
            yield packet


def standard_input():
    """16-bit mono PCM at 16 kHz as it comes; what begins like a file of sound is refused."""
    if sys.stdin is None:
        raise AudioError("standard input is closed")
    if sys.stdin.buffer.isatty():
        raise AudioError(f"standard input is the keyboard, not sound: {WITHOUT}")
    arriving, head = iter(lambda: sys.stdin.buffer.read1(4096), b""), b""
    for data in arriving:
        head += data
        # Two frames of MP3 or AAC; the head of another file.
        if len(head) >= (4096 if head[:1] == b"\xff" else 64):
            break
    if kind := kind_of(head, MAGIC) or framed(head):
        raise AudioError(f"standard input: {kind}, not 16-bit PCM; into: {piped('-i -')}")
    received, heard, odd = 0, False, b""
    for data in chain([head], arriving):
        data = odd + data
        even = len(data) // 2 * 2        # half a sample waits for its other half
        odd, samples = data[even:], np.frombuffer(data[:even], "<i2").astype(np.float32) / 32768
        received, heard = received + len(samples), heard or samples.any()
        yield samples
    if not heard:
        raise AudioError(f"standard input: no sound, {received} samples and none but zeros")


def microphone():
    """Packets from the default input device, opened at its own rate; AudioError when it stops."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package without the library PortAudio
        raise AudioError(f"mic: {error}; pip install sounddevice (on Linux PortAudio too: apt "
                         f"install libportaudio2), or without it: {WITHOUT}") from None
    arrived = queue.SimpleQueue()

    def copy(block, frames, times, status):  # on the device's own thread, which must never wait
        arrived.put((block[:, 0].copy(), bool(status.input_overflow)))

    try:
        rate = round(sounddevice.query_devices(kind="input")["default_samplerate"])
        options = {"samplerate": rate, "channels": 1, "dtype": "float32"}
        with sounddevice.InputStream(**options, callback=copy) as device:
            try:
                yield from listen(device, arrived, rate)
            finally:                         # Ctrl-C, where the model is too slow
                unheard = sum(len(arrived.get()[0]) for _ in range(arrived.qsize())) / rate
                if unheard > UNHEARD_S:
                    say(f"mic: the last {unheard:.1f} s were not captioned any more")
    except (sounddevice.PortAudioError, ValueError) as error:
        devices = "; ".join(str(sounddevice.query_devices()).splitlines()) or "none"
        raise AudioError(f"mic: {error}; devices: {devices}; or: {WITHOUT}") from None
    raise AudioError("mic: the device has stopped")


def listen(device, arrived, rate):
    """Packets of a running device; what goes wrong is told on standard error and survived."""
    resampler = Resampler(rate)
    listening, zeros, late, stalled = False, 0, False, False
    while device.active or not arrived.empty():
        try:
            block, overflow = arrived.get(timeout=STALLED_S)
        except queue.Empty:
            if not stalled:
                say(f"mic: nothing has come for {STALLED_S:g} s")
            stalled = True
            continue
        stalled = False
        if not listening:
            say(f"listening at {rate} Hz, until Ctrl-C")
            listening = True
        before, late = late, arrived.qsize() * len(block) > LATE_S * rate
        if late and not before:
            say(f"mic: {LATE_S:g} s of sound wait: the computer is too slow for this model")
        if arrived.qsize() * len(block) > TOO_LATE_S * rate:
            left_out = sum(len(arrived.get()[0]) for _ in range(arrived.qsize())) / rate
            say(f"mic: {left_out:.1f} s of sound left out, to be on time again; times do not count "
                "them")
        if overflow:
            say("mic: some sound was lost, the computer is too slow")
        before, zeros = zeros, 0 if block.any() else zeros + len(block)
        if before < STALLED_S * rate <= zeros:
            say(f"mic: nothing but zeros for {STALLED_S:g} s: muted, or not allowed to listen?")
        yield resampler.feed(block)


# ---- A trained model ----------------------------------------------------------------------------

def own_search(beside):
    """What lies beside a model -> the options of a Streamer that this model was made for."""
    return {"blank_penalty": beside.get("blank_penalty", 0.0), "tail": beside.get("tail", 0.0)}


def own_streams(beside, tokenizer):
    """The tags of the streams that a model was trained to write; its tokenizer may have more."""
    learned = beside.get("streams", ())
    if not (isinstance(learned, (list, tuple)) and set(learned) <= set(tokenizer.tags)):
        raise InputError(f"streams {learned!r:.80} are none of the tokenizer's, "
                         f"{' '.join(tokenizer.tags)}")
    return tuple(tag for tag in tokenizer.tags if tag in learned or not learned)


def load_run(path, device="cpu"):
    """model.pt of a run -> (model, tokenizer, what else lies beside them). Raises InputError."""
    try:
        model, beside = load(path, map_location=device)
    except ModelError as error:
        raise InputError(error) from None
    try:
        tokenizer = Tokenizer.from_dict(beside["tokenizer"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: a damaged checkpoint, no usable tokenizer ({reason})") from None
    try:
        Streamer(model, tokenizer, **own_search(beside))
        own_streams(beside, tokenizer)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: a damaged checkpoint, {error}") from None
    return model, tokenizer, beside


# ---- Captions: lines, a terminal, JSON, subtitles ------------------------------------------------
# Each way to show them is called with the new words (and pauses) of a packet.

UNSEEN = "\u00ad\u200b\u200e\u200f\u2060\ufeff"


def shows(char):
    """Whether a character may reach a screen: no control, no change of direction, no line break.
    The two invisible joiners are letters to Persian and to Hindi; spaces come in many widths."""
    return char.isprintable() or char in "\u200c\u200d" or unicodedata.category(char) == "Zs"


def printable(text):
    """What a model, a file or its name says, on one line and without escape sequences; marks that
    nobody sees, as soft hyphens, are left out."""
    return "".join(char if shows(char) else "\ufffd" for char in str(text)
                   if char not in UNSEEN)


def columns(text):
    """The places that a text takes on a screen."""
    return sum(0 if unicodedata.combining(char) else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def fit(text, width):
    """The longest beginning that takes at most `width` columns."""
    while columns(text) > width:
        text = text[:-1]
    return text


def pieces(text, width):
    """A text in parts of at most `width` characters and columns."""
    parts = []
    while text:
        parts.append(fit(text[:width], width) or text[0])
        text = text[len(parts[-1]):]
    return parts


def say(message):
    """One line for the user, on standard error, above a progress bar; the work outlives it."""
    from tqdm import tqdm
    if sys.stderr is not None:
        Outlived(sys.stderr).outlive(lambda: tqdm.write(printable(message), file=sys.stderr))
        Terminal.disturbed |= sys.stderr.isatty()


def words_of(events):
    return [event for event in events if isinstance(event, Word)]


def show_json(events):
    """One object a line, and valid JSON whatever the encoding of standard output cannot say."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    for event in events:
        kind = "word" if isinstance(event, Word) else "end of utterance"
        fields = {name: round(value, 4) if isinstance(value, float) else value
                  for name, value in asdict(event).items()}
        line = json.dumps({"event": kind, **fields}, ensure_ascii=ascii_only)
        print("".join(char if shows(char) else json.dumps(char)[1:-1] for char in line), flush=True)


def show_lines(events):
    """Lines are only ever appended: one for each stream that has new words, of each chunk."""
    words = words_of(events)
    for delay_ms, tag in dict.fromkeys((word.delay_ms, word.stream) for word in words):
        text = printable(join([word.text for word in words
                               if (word.delay_ms, word.stream) == (delay_ms, tag)]))
        print(f"{delay_ms / 1000:8.2f} s  {printable(tag):8} {text}", flush=True)


class Terminal:
    """One line for each stream, growing in place. When one is full they all stay, and fresh ones
    begin below."""
    disturbed = False   # something else was written below the lines: draw them again, under it

    def __init__(self, tags):
        Terminal.disturbed = False
        self.lines = {tag: [] for tag in tags}  # the words of each
        self.drawn = 0                          # lines that are on the screen and may still grow
        self.margin = max(8, *(columns(printable(tag)) for tag in tags))

    def __call__(self, events):
        width = max(1, shutil.get_terminal_size().columns - self.margin - 2)
        for word in words_of(events):
            for text in pieces(printable(word.text), width):
                line = self.lines.setdefault(word.stream, [])
                if line and columns(join([*line, text])) > width:
                    self.lines = {tag: [] for tag in self.lines}
                    self.drawn = 0
                self.lines[word.stream].append(text)
                self.draw(width)

    def draw(self, width):
        if Terminal.disturbed:
            self.drawn, Terminal.disturbed = 0, False
        up = f"\x1b[{self.drawn}F" if self.drawn else ""  # so many lines
        names = {tag: printable(tag) for tag in self.lines}
        rows = [f"\x1b[2K\x1b[2m{names[tag]}{' ' * (self.margin - columns(names[tag]))}\x1b[0m "
                f"{fit(join(line), width)}\n"
                for tag, line in self.lines.items()]
        print(up + "".join(rows), end="", flush=True)
        self.drawn = len(rows)


class Subtitles:
    """One stream as SubRip (.srt) or WebVTT (.vtt): cues of at most two lines of 42 characters.

    A cue begins with its first word. The next one begins where a word does not fit any more, after
    a pause, or after seven seconds, but no sooner than a second later, lest the cues fall behind
    the sound; where a whole translation is written at once, its cues follow each other so. A cue
    stays until its last word, and, where the next one leaves time for it, as long as it takes to
    read. It is in the file as soon as the next one begins, so the input may be endless.
    """
    WIDTH, LINES, SHORTEST_S, LONGEST_S = 42, 2, 1.0, 7.0
    READ = 17.0                          # characters that are read in a second

    def __init__(self, path, tag, webvtt, pause):
        self.tag, self.webvtt, self.pause = tag, webvtt, pause
        self.words, self.lines = [], []  # of the cue that is not complete yet; lines: [[text]]
        self.paused = False              # behind its last word
        self.number, self.free_s = 0, 0.0  # cues written, and the end of the last of them
        self.fault = None                # why no more can be written
        self.file = open(path, "w", encoding="utf-8", newline="\n")
        if webvtt:
            self.file.write("WEBVTT\n\n")

    def __call__(self, events):
        try:
            for event in events if not self.fault else ():
                if isinstance(event, Pause):
                    self.paused = True
                elif event.stream == self.tag:
                    self.add(event)
            self.file.flush()
        except OSError as error:         # a full disk: the captions on the screen go on
            if not self.fault:
                self.fault = self.unwritten(error)
                say(self.fault)

    def unwritten(self, error):
        return InputError(f"{self.file.name}: {error.strerror}: the subtitles of {self.tag} end "
                          "there")

    def add(self, word):
        if self.words:
            paused = self.paused or word.start_s - self.words[-1].end_s >= self.pause
            if (word.end_s - self.start_s() > self.LONGEST_S
                    or paused and word.start_s - self.start_s() >= self.SHORTEST_S):
                self.finish(word.start_s)
        for text in pieces(printable(word.text), self.WIDTH):
            lines = self.with_text(text)
            if len(lines) > self.LINES:
                self.finish(word.start_s)
                lines = [[text]]
            self.lines = lines
            self.words.append(word)
        self.paused = False

    def start_s(self):
        return max(self.words[0].start_s, self.free_s)

    def with_text(self, text):
        """The lines of the cue with one more text, in the last line if it fits."""
        longer = [*self.lines[-1], text] if self.lines else [text]
        fits = max(len(join(longer)), columns(join(longer))) <= self.WIDTH
        return [*self.lines[:-1], longer] if fits or not self.lines else [*self.lines, [text]]

    def finish(self, until=math.inf):
        """Write the cue, if there is one; the word of the next one begins at `until`."""
        if self.words:
            text = "\n".join(join(line) for line in self.lines)
            start_s = self.start_s()
            self.free_s = max(self.words[-1].end_s, start_s + self.SHORTEST_S,
                              min(start_s + len(text) / self.READ, until))
            self.number += 1
            if self.webvtt:
                text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            times = f"{self.clock(start_s)} --> {self.clock(self.free_s)}"
            self.file.write(f"{self.number}\n{times}\n{text}\n\n")
        self.words, self.lines = [], []

    def clock(self, seconds):
        minutes, ms = divmod(round(seconds * 1000), 60000)
        text = f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02},{ms % 1000:03}"
        return text.replace(",", ".") if self.webvtt else text

    def close(self):
        try:
            with self.file:
                if not self.fault:
                    self.finish()
        except OSError as error:
            if not self.fault:
                raise self.unwritten(error) from None


def track_paths(path, tags):
    """tag -> file: `path` for the only stream, else one for each, talk.srt as talk.st-fr.srt."""
    if path == "-" or not Path(path).name or path.endswith(("/", os.sep)):
        raise InputError(f"{path}: not the name of a file for subtitles")
    path = Path(path)
    if len(tags) == 1:
        return {tags[0]: path}
    return {tag: path.with_name(f"{path.stem}.{file_name(tag)}{path.suffix}") for tag in tags}


def file_name(tag):
    """<st:fr> -> st-fr, and nothing that could lead out of the folder."""
    return re.sub(r"[^\w-]", "-", tag.strip("<>"))


SUBTITLES = re.compile(rb"(\xef\xbb\xbf)?\s*(WEBVTT|\d+\s+[\d:,.]+ -->|$)")   # how they begin


def planned_tracks(options, tags):
    """[(file, tag, whether it is WebVTT)] of the subtitles asked for; what cannot be written is
    refused before any file is touched."""
    planned = [(own, tag, webvtt)
               for path, webvtt in ((options.srt, False), (options.vtt, True)) if path
               for tag, own in track_paths(path, tags).items()]
    taken = {os.path.realpath(options.checkpoint): "the model"}
    if options.audio not in ("-", "mic"):
        taken[os.path.realpath(options.audio)] = "the recording"
    for own, tag, _ in planned:
        real = os.path.realpath(own)
        if options.audio == "-" and opened_as(0, real):
            taken[real] = "the recording"
        if opened_as(1, own):
            taken[real] = "the captions on standard output"
        if real in taken:
            raise InputError(f"{own}: subtitles of {tag} would overwrite {taken[real]}")
        if os.path.isdir(real) or not os.path.isdir(os.path.dirname(real)):
            raise InputError(f"{own}: a folder, or in a folder that is not there")
        # A pipe that the shell made, >(command), has a name that leads nowhere but can be opened.
        if not os.access(own if os.path.exists(own) else os.path.dirname(real), os.W_OK):
            raise InputError(f"{own}: not allowed to write there")
        if os.path.isfile(real):
            with open(real, "rb") as file:
                if not SUBTITLES.match(file.read(100)):
                    raise InputError(f"{own}: there already, and no subtitles: it stays as it is")
        taken[real] = f"other subtitles, of {tag}"
    return planned


def opened_as(number, path):
    """Whether this is the file that a shell's < (0) or > (1) opened."""
    try:
        there, own = os.fstat(number), os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(own.st_mode) and os.path.samestat(there, own)


@contextmanager
def opened_tracks(planned, pause):
    """The subtitle files; whatever happens, the last cue of each is written."""
    with ExitStack() as stack:
        tracks = []
        for own, tag, webvtt in planned:
            tracks.append(Subtitles(own, tag, webvtt, pause))
            stack.callback(tracks[-1].close)
        yield tracks


@contextmanager
def uninterrupted(message=""):
    """Ctrl-C within it takes effect at its end, a second one at once; SIGTERM and SIGHUP too, where
    they act as Ctrl-C does. Other handlers are somebody else's business. The message tells the user
    so. Gives the list of the signals that have come."""
    main = threading.current_thread() is threading.main_thread()
    caught = [number for number in STOPS
              if main and signal.getsignal(number) is signal.default_int_handler]
    seen = []

    def note(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        if message:
            with suppress(RuntimeError):   # amid a line that is being written
                say(message)
    for number in caught:
        signal.signal(number, note)
    try:
        yield seen
    finally:
        for number in caught:
            signal.signal(number, signal.default_int_handler)
    if seen:
        raise KeyboardInterrupt


def caption(model, tokenizer, options, search, tags):
    """Stream one recording, or whatever comes in, and show its words as they are ready -> the exit
    code."""
    if options.audio == "mic" and not search["chunk"]:
        raise InputError("this model hears everything at once, at the end, and mic has none: give "
                         "--chunk")
    screen = show_json if options.json else show_lines
    if sys.stdout.isatty() and not options.json:
        screen = Terminal(tags)
    planned = planned_tracks(options, tags)
    if len(planned) > 1:         # a file each: what they are called is not what was asked for
        say(f"subtitles: {', '.join(str(own) for own, *_ in planned)}")
    streamer = Streamer(model, tokenizer, pause=options.pause, **search)
    incoming, fault = packets(options.audio, options.realtime), None
    live = options.audio in ("-", "mic")     # Ctrl-C is their usual end
    try:  # what cannot be read is told before files of older captions are lost
        first = next((packet for packet in incoming if len(packet)), np.zeros(0, np.float32))
    except KeyboardInterrupt:
        if live:
            return 0
        raise
    interrupted = unshown = False
    with opened_tracks(planned, options.pause) as tracks:
        def show(events):
            nonlocal unshown
            for track in tracks:
                track(events)
            try:
                screen(events)
            except OSError as error:         # who reads has left, a terminal closed, a disk is full
                discard(sys.stdout)
                if not tracks:
                    raise
                if not isinstance(error, BrokenPipeError) and not unshown:
                    say(f"standard output: {error.strerror}; the subtitles go on")
                    unshown = True
        try:
            for packet in chain([first], incoming):
                with uninterrupted():        # or the words of this packet would be lost
                    show(streamer.accept(packet))
        except KeyboardInterrupt:  # the words of what was heard are still to come
            interrupted = not live
        except InputError as error:
            fault = error  # some faults, as a file cut off, show at its end: told after its words
        if streamer.received:
            show(streamer.flush())
    if streamer.search.capped:
        say(f"frames cut off at {LIMITS[0]} symbols (last: {LIMITS[1]}): {streamer.search.capped}")
    if fault:
        raise fault
    if unshown or any(track.fault for track in tracks):        # which was told
        return 2
    if interrupted:
        raise KeyboardInterrupt
    return 0


# ---- Evaluation: stream a set, then compare words and delays with the references -----------------

def evaluate(model, tokenizer, items, *, tags=None, batch_size=16, progress=0, bootstrap=0,
             **how):
    """items: (row, samples) of each utterance, a list or made one after the other -> (metrics by
    stream, one record by utterance).

    `batch_size` utterances are streamed in step; that changes words only where two scores agree to
    rounding, but computation-aware figures become those of a server with as many. Nothing holds the
    sound of more than a batch. tags: of the streams that are scored, by default all that the
    tokenizer has. progress: how many there will be, for a bar. how: the options of a Streamer.
    A batch that writes more than BABBLE tokens a second of sound is broken off, and the evaluation
    too, saying so, where that is so of all utterances together, 16 or more, as untrained models do.
    """
    if progress:
        from tqdm import tqdm
        items = tqdm(items, "evaluating", progress, leave=False, disable=None)
    training, records, source = model.training, [], iter(items)
    tokens, seconds, babbles = 0, 0.0, False
    model.eval()
    try:
        while not babbles and (group := list(islice(source, batch_size))):
            own, more_tokens, more_seconds = stream_group(model, tokenizer, group, how)
            records += own
            tokens, seconds = tokens + more_tokens, seconds + more_seconds
            babbles = tokens > BABBLE * seconds and len(records) >= 16
    finally:
        model.train(training)
        if progress:
            items.close()
    if babbles:
        say(f"the evaluation breaks off after {len(records)} utterances: {tokens / seconds:.0f} "
            f"tokens a second of sound, more than {BABBLE:g}: the model babbles")
    return summarise(records, tags or tokenizer.tags, bootstrap), records


def stream_group(model, tokenizer, group, how):
    """Utterances side by side, a second of sound after the other, until the end or until they
    babble -> their records, and over all of them the tokens that count and the seconds."""
    began = time.perf_counter()
    streamers = [Streamer(model, tokenizer, **how) for _ in group]
    events = [[] for _ in group]
    for start in range(0, max(1, *(len(samples) for _, samples in group)), SAMPLE_RATE):
        for streamer, (row, samples) in zip(streamers, group):
            if not streamer.closed:
                try:
                    streamer.push(samples[start:start + SAMPLE_RATE])
                except InputError as error:
                    raise InputError(f"{row.where or row.id}: {error}") from None
                if start + SAMPLE_RATE >= len(samples):
                    streamer.close()
        for own, found in zip(events, advance(streamers)):
            own += found
        # A second and the burst that a last frame may write, where a whole translation comes at
        # the end, are free.
        tokens = sum(max(0, streamer.n_tokens - LIMITS[1]) for streamer in streamers)
        heard_s = sum(1 + streamer.received / SAMPLE_RATE for streamer in streamers)
        if tokens > BABBLE * heard_s:
            break
    seconds = (time.perf_counter() - began) / len(group)
    records = [record_of(row, samples, streamer, words_of(own), seconds)
               for (row, samples), streamer, own in zip(group, streamers, events)]
    return records, tokens, heard_s


def texts_of(row):
    """{stream: text} of a row, where there is one."""
    texts = {"<asr>": row.asr} | {f"<st:{lang}>": text for lang, text in row.st.items()}
    return {tag: text for tag, text in texts.items() if text}


def record_of(row, samples, streamer, words, seconds):
    """What one utterance was and what was made of it."""
    return {"id": row.id, "audio": row.audio, "duration_ms": len(samples) / PER_MS, "words": words,
            "references": {tag: units(text) for tag, text in texts_of(row).items()},
            "score": streamer.search.score, "capped": streamer.search.capped,
            "invalid": dict(streamer.speller.invalid), "cut": dict(streamer.speller.cut),
            "broken_off": streamer.due() is not None or not streamer.closed, "seconds": seconds}


def summarise(records, tags, bootstrap=0):
    """Metrics by stream, flat and plain; with `bootstrap` draws of the utterances, name_95 are 95 %
    intervals.

    Words are serialize.py's units, so that in Han and kana every character is one. All text is
    compared in Unicode's form NFC: what looks equal on the screen is equal.
    """
    rows = {tag: [record for record in records if tag in record["references"]] for tag in tags}
    return {tag: Scores(rows[tag], tag, bootstrap).metrics for tag in tags if rows[tag]}


def compose(text):
    """The units of a text in form NFC."""
    return units(unicodedata.normalize("NFC", text))


def plain(words):
    """Lower-cased, without punctuation."""
    return units("".join(char for char in join(words).lower()
                         if unicodedata.category(char)[0] != "P"))


class Scores:
    """All figures of one stream over the records that have a reference in it: `metrics`."""

    def __init__(self, rows, tag, bootstrap):
        self.bootstrap, self.rows = bootstrap, rows
        self.references = [compose(join(row["references"][tag])) for row in rows]
        self.words = [words_in(row, tag) for row in rows]
        self.metrics = {"utterances": len(rows), "silent": sum(not own for own in self.words)}
        for name in ("invalid", "cut"):
            self.metrics[name] = sum(row.get(name, {}).get(tag, 0) for row in rows)
        self.metrics["broken_off"] = sum(row.get("broken_off", False) for row in rows)
        self.add_error_rates()
        self.add_sacrebleu()
        self.add_latencies()

    def ratio(self, name, above, below):
        """The quotient of two sums over the utterances, and its interval; None where below is 0."""
        above, below = np.array(above, float), np.array(below, float)
        self.metrics[name] = float(above.sum() / below.sum()) if below.sum() else None
        if self.bootstrap and below.sum():
            values = [above[rows].sum() / max(below[rows].sum(), 1e-9)
                      for rows in draws(len(above), self.bootstrap)]
            self.metrics[f"{name}_95"] = interval(values)

    def add_error_rates(self):
        """WER and CER as given, and _norm: lower-cased, without punctuation. The CER of a script
        whose words are its characters comes first."""
        names = [("wer", list), ("cer", join)]
        if script(self.references) != "words":
            names.reverse()
        texts = [[word.text for word in own] for own in self.words]
        for suffix, clean in (("", list), ("_norm", plain)):
            pairs = [(clean(ref), clean(hyp)) for ref, hyp in zip(self.references, texts)]
            for name, sequence in names:
                errors = [100 * edit_distance(sequence(ref), sequence(hyp)) for ref, hyp in pairs]
                self.ratio(name + suffix, errors, [len(sequence(ref)) for ref, _ in pairs])

    def add_sacrebleu(self):
        """BLEU and chrF (Post 2018, arXiv 1804.08771), with their signatures."""
        hypotheses = [join([word.text for word in own]) for own in self.words]
        references = [join(ref) for ref in self.references]
        tokenize = {"words": "13a", "han": "zh", "kana": "char"}[script(self.references)]
        self.metrics |= sacre(hypotheses, references, tokenize, self.bootstrap)

    def add_latencies(self):
        """AL and LAAL of the utterances with a word; _ca: computation-aware."""
        for suffix, field_name in (("", "delay_ms"), ("_ca", "elapsed_ms")):
            spoken = [(row["duration_ms"], [getattr(word, field_name) for word in own], len(ref))
                      for row, own, ref in zip(self.rows, self.words, self.references) if own]
            lags = [latency(delays, ms, n_ref) for ms, delays, n_ref in spoken]
            for name, lag in zip(("al", "laal"), zip(*lags) if lags else ([], [])):
                self.ratio(f"{name}{suffix}_ms", lag, [1] * len(lag))
        self.ratio("real_time_factor", [row["seconds"] for row in self.rows],
                   [row["duration_ms"] / 1000 for row in self.rows])


def words_in(record, tag):
    """A record's words of one stream, one for each unit of their composed text."""
    return [replace(word, text=unit) for word in record["words"] if word.stream == tag
            for unit in compose(word.text)]


def script(texts):
    """Of lists of units: "words", or "han" or "kana" where most characters are units themselves."""
    characters = [unit for text in texts for unit in text if join([unit, unit]) == unit + unit]
    if 2 * len(characters) <= sum(len(unit) for text in texts for unit in text):
        return "words"
    # A unit may have marks behind its character.
    kana = any(unicodedata.name(unit[0], "").startswith(("HIRAGANA", "KATAKANA"))
               for unit in characters)
    return "kana" if kana else "han"


def edit_rows(a, b):
    """The rows of Levenshtein's table, len(a) + 1 of them: cost[j] of row i are the fewest edits
    between a[:i] and b[:j], min(above[j] + 1, above[j-1] + (a[i-1] != b[j-1]), cost[j-1] + 1).
    The last of these, along the row, is a running minimum of cost[j] - j: a row is a few vector
    operations."""
    number = {item: k for k, item in enumerate(dict.fromkeys([*a, *b]))}
    codes, steps = np.array([number[item] for item in b], int), np.arange(len(b) + 1)
    cost = steps
    yield cost
    for item in a:
        row = cost + 1
        row[1:] = np.minimum(row[1:], cost[:-1] + (codes != number[item]))
        cost = np.minimum.accumulate(row - steps) + steps
        yield cost


def edit_distance(a, b):
    for cost in edit_rows(a, b):
        pass
    return int(cost[-1])


def stands_for(reference, hypothesis):
    """For each word of the hypothesis, the index of the reference word that it stands for, or is
    inserted before, in an alignment with the fewest edits."""
    cost = np.stack(list(edit_rows(reference, hypothesis)))
    i, where = len(reference), []
    for j in range(len(hypothesis), 0, -1):
        def replaces():
            return i and cost[i, j] == (
                cost[i - 1, j - 1] + (reference[i - 1] != hypothesis[j - 1]))
        while i and cost[i, j] == cost[i - 1, j] + 1 and not replaces():
            i -= 1  # a reference word that nothing stands for
        if replaces():
            i -= 1
        where.append(i)
    return where[::-1]


def resegment(whole, singles):
    """The record of one long stream -> one for each of the utterances that it was joined from,
    whose own records are `singles`.

    Each word goes to the utterance of the reference word that it stands for, in the alignment with
    the fewest edits (Matusov et al. 2005, mwerSegmenter), and its delay counts from the start of
    that utterance. So long streams have error rates, BLEU and delays of the same segments. A word
    inserted between two utterances goes to the later one, where its delay may be below 0; counts of
    what is malformed in the whole stream stand in the first part that has the text.
    """
    starts = np.cumsum([0.0] + [record["duration_ms"] for record in singles])
    kept = "id", "audio", "duration_ms", "references"
    parts = [{name: record[name] for name in kept if name in record}
             | {"words": [], "seconds": whole["seconds"] / len(singles)} for record in singles]
    parts[0]["broken_off"] = whole.get("broken_off", False)
    for tag in dict.fromkeys(tag for record in singles for tag in record["references"]):
        first = next(part for part in parts if tag in part["references"])
        for name in ("invalid", "cut"):
            first.setdefault(name, {})[tag] = whole.get(name, {}).get(tag, 0)
        texts = [record["references"].get(tag, []) for record in singles]
        owner = [k for k, text in enumerate(texts) for _ in text] or [0]
        words = words_in(whole, tag)
        reference = [word for text in texts for word in text]
        for word, i in zip(words, stands_for(reference, [word.text for word in words])):
            k = owner[min(i, len(owner) - 1)]
            parts[k]["words"].append(replace(word, delay_ms=word.delay_ms - starts[k],
                                             elapsed_ms=word.elapsed_ms - starts[k]))
    return parts


def latency(delays, source_ms, n_ref):
    """How far the words lag behind an ideal that spreads them evenly over the source, in ms:
    AL    1/tau * sum over i <= tau of d_i - (i - 1) S / n_ref, tau the first word that needed the
          whole source (Ma et al. 2019, arXiv 1810.08398)
    LAAL  the same with max(n_hyp, n_ref), so that writing too much does not look fast
          (Papi et al. 2022, arXiv 2206.05807)
    """
    if delays[0] > source_ms:
        return delays[0], delays[0]
    tau = next((i + 1 for i, d in enumerate(delays) if d >= source_ms), len(delays))

    def lag(n):
        return float(np.mean(np.array(delays[:tau]) - np.arange(tau) * source_ms / max(1, n)))
    return lag(n_ref), lag(max(len(delays), n_ref))


def sacre(hypotheses, references, tokenize, bootstrap):
    """BLEU and chrF of sacrebleu, with their signatures; tokenize: its name of a way to do that.
    Its own intervals fail where a draw scores 0; the statistics of a set are the sums of its
    sentences', so the draws are made here."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        say("BLEU and chrF are left out: pip install sacrebleu")
        return {"bleu": None, "chrf": None}
    metrics = {}
    for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
        score = metric.corpus_score(hypotheses, [references])
        metrics |= {name: score.score, f"{name}_signature": str(metric.get_signature())}
        if bootstrap:
            sums = np.array(metric._extract_corpus_statistics(hypotheses, [references]))
            values = [metric._compute_score_from_stats(sums[rows].sum(0).tolist()).score
                      for rows in draws(len(sums), bootstrap)]
            metrics[f"{name}_95"] = interval(values)
    return metrics


def draws(n, times):
    """The bootstrap, `times` draws: n of n utterances (n,), some more than once and others never;
    the same for every score."""
    rng = np.random.default_rng(0)
    return (rng.integers(n, size=n) for _ in range(times))


def interval(values):
    """What 95 % of them lie between."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def write_logs(folder, records, metrics):
    """All metrics, and a folder for each stream in the format of SimulEval, so that others can
    score it again."""
    for tag in metrics:
        path = Path(folder, file_name(tag))
        path.mkdir(parents=True, exist_ok=True)
        rows = [row for row in records if tag in row["references"]]
        lines = [json.dumps(log_entry(index, row, tag), ensure_ascii=False) + "\n"
                 for index, row in enumerate(rows)]
        (path / "instances.log").write_text("".join(lines), encoding="utf-8")
        (path / "config.yaml").write_text("source_type: speech\ntarget_type: text\n")
    text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
    Path(folder, "metrics.json").write_text(text, encoding="utf-8")


def log_entry(index, row, tag):
    words = words_in(row, tag)
    return {"index": index, "prediction": " ".join(word.text for word in words),
            "delays": [word.delay_ms for word in words],
            "elapsed": [word.elapsed_ms for word in words], "prediction_length": len(words),
            "reference": " ".join(row["references"][tag]), "source": [printable(row["audio"])],
            "source_length": row["duration_ms"]}


def check_log(folder, tags):
    """Before hours of work: can the logs be written there, and would nothing be lost?"""
    folders = Counter(map(file_name, tags))
    if twice := [tag for tag in tags if folders[file_name(tag)] > 1]:
        raise InputError(f"--log {folder}: {' and '.join(twice)} would share the folder "
                         f"{file_name(twice[0])}")
    old = Path(folder, "metrics.json")
    if Path(folder, "resume.pt").exists() or (
            old.is_file() and not old.read_bytes().lstrip().startswith(b"{")):
        raise InputError(f"--log {folder}: the folder of a training, whose metrics.json "
                         "would be lost; name another")
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--log {folder}: not allowed to write there")
    for tag in tags:
        Path(folder, file_name(tag)).mkdir(exist_ok=True)


def evaluation(model, tokenizer, options, search, tags):
    """Stream all of a manifest; print figures by stream, and write logs."""
    rows = read_manifest(options.eval, allow_outside=options.allow_outside, on_bad=say)
    has = set().union(*map(texts_of, rows))
    if not has & set(tags):
        raise InputError(f"{options.eval}: it has {' '.join(sorted(has))}, and the model writes "
                         f"{' '.join(tags)}: nothing to compare")
    if options.log:
        check_log(options.log, tags)
    written = [row for row in rows if texts_of(row).keys() & set(tags)]
    if len(written) < len(rows):
        say(f"{options.eval}: {len(rows) - len(written)} of {len(rows)} rows left out: no text in "
            f"a language that the model writes, {' '.join(tags)}")
    items = readable(written, chunk=search["chunk"])
    older = options.log and Path(options.log, "metrics.json").exists()
    with uninterrupted("stopping after this utterance; a second time: at once") as stopped:
        cut = []                       # the first one that was not heard any more

        def until_stopped():
            for item in items:
                if stopped:
                    cut.append(item)
                    return
                yield item
        metrics, records = evaluate(model, tokenizer, until_stopped(), tags=tags, batch_size=1,
                                    progress=len(written), bootstrap=1000, **search)
        if cut:
            say(f"stopped: the figures are those of the first {len(records)} utterances")
        try:
            for tag, figures in metrics.items():
                print(f"\n{printable(tag)}")
                for name, value in figures.items():
                    if not isinstance(value, list):
                        print(figure_line(name, value, figures.get(f"{name}_95")))
        finally:  # also where whoever reads the figures has seen enough
            if cut and older:
                say(f"{options.log}: its logs stay as they are")
            elif options.log and records:
                write_logs(options.log, records, metrics)


def figure_line(name, value, interval):
    value = f"{value:10.3f}" if isinstance(value, float) else value
    bounds = f"   95 %: {interval[0]:.3f} .. {interval[1]:.3f}" if interval else ""
    return f"  {name:18} {value}{bounds}"


# ---- Command line --------------------------------------------------------------------------------

def demonstration():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["la la la"], 262, tags=("<asr>", "<st:en>"))
    model = Transducer(replace(PRESETS["tiny"], vocab=len(tokenizer))).eval()
    samples = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE + 123).astype(np.float32)
    results = set()
    for packet in (1, 700, 4000, len(samples)):
        streamer, words = Streamer(model, tokenizer, limits=(3, 10)), []
        for start in range(0, len(samples), packet):
            words += streamer.accept(samples[start:start + packet])
        words = [replace(word, elapsed_ms=0) for word in words + streamer.flush()]
        score = streamer.search.score
        results.add(repr((score, words)))
        print(f"packets of {packet:6} samples: log-probability {score!r}, {len(words)} words")
    print("match" if len(results) == 1 else "NO MATCH")
    return int(len(results) > 1)


def at_least(lowest, kind=int):
    """An argparse type: a number that is not below `lowest`."""
    def number(text):
        if not kind(text) >= lowest:
            raise argparse.ArgumentTypeError(f"{text} must be {lowest} or more")
        return kind(text)
    return number


def arguments():
    parser = argparse.ArgumentParser(
        prog="stream.py", description="Live captions of a file, of standard input or of "
        "the microphone; with --eval, scores on a manifest.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="model.pt of a run; without it, a demonstration")
    add("audio", nargs="?",
        help="an audio file; - reads 16-bit mono PCM at 16 kHz from standard input; mic, the "
        "microphone")
    add("--chunk", type=int,
        help="encoder frames per chunk (default: the model's first; 0: everything at the end)")
    add("--beam", type=int, default=1, help="hypotheses in beam search (default 1: greedy)")
    add("--hold", type=at_least(0), metavar="FRAMES",
        help="a beam shows what its best hypothesis has held so long (default: half a chunk)")
    add("--blank-penalty", type=float, metavar="P",
        help="taken off the log-probability of writing nothing: more words (default: the model's)")
    add("--pause", type=at_least(0.04, float), default=1.0, metavar="SECONDS",
        help="without a token, they end an utterance (default 1): an event of --json, and the cue "
        "of a subtitle that has stood for a second")
    add("--json", action="store_true", help="one line of JSON for each word and pause")
    add("--srt", metavar="FILE", help="write SubRip subtitles too, one file for each stream")
    add("--vtt", metavar="FILE", help="the same as WebVTT")
    add("--realtime", action="store_true", help="play a file at its own pace")
    add("--eval", metavar="MANIFEST", help="stream all of a manifest and compare with its texts")
    add("--log", metavar="DIR", help="with --eval: write metrics.json and SimulEval logs there")
    add("--allow-outside", action="store_true",
        help="with --eval: audio may lie outside the manifest's folder")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--threads", type=at_least(1), default=1,
        help="of the processor (default 1: a chunk is too little work to share)")
    return parser


def search_of(options, model, beside):
    """The options of a Streamer that the command line has, or else the model and its file."""
    given = {"chunk": model.config.chunks[0] if options.chunk is None else options.chunk,
             "beam": options.beam,
             "hold": HALF_CHUNK if options.hold is None else options.hold}
    if options.blank_penalty is not None:
        given["blank_penalty"] = options.blank_penalty
    return own_search(beside) | given


def main(argv=None):
    parser = arguments()
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if value == "":
            parser.error(f"{name} is empty, as is a variable of the shell that is not set")
    if sys.stderr is None:   # closed: or print would write to standard output what it cannot
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        say("stream.py: standard output is closed")
        return 2
    if hasattr(sys.stdout, "reconfigure"):  # a letter that the screen lacks is a question mark
        sys.stdout.reconfigure(errors="replace")
    if not options.checkpoint:
        given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} wants a model before it, as in: "
                         "stream.py MODEL FILE")
    elif bool(options.audio) == bool(options.eval):
        parser.error("give a model, and after it an audio file, - for standard input, mic, or "
                     "--eval MANIFEST")
    if options.hold is not None and options.beam == 1:
        parser.error("--hold goes with --beam: greedy search takes nothing back")
    if options.realtime and options.audio in ("-", "mic"):
        parser.error(f"--realtime goes with a file: {options.audio} has a pace of its own")
    if options.allow_outside and not options.eval:
        parser.error("--allow-outside goes with --eval")
    if options.chunk == 0 and options.audio == "mic":
        parser.error("--chunk 0 hears everything at once, at the end, and mic has none")
    alone = "srt", "vtt", "json", "realtime", "pause"
    if options.eval and any(getattr(options, name) != parser.get_default(name) for name in alone):
        parser.error(f"--{', --'.join(alone)} go with one recording, not with --eval")
    if options.log and not options.eval:
        parser.error("--log goes with --eval")
    with redirect_stderr(Outlived(sys.stderr)):
        return told(options)


def told(options):
    """The work, and its exit code; of what goes wrong there is one line."""
    try:
        code = run(options) if options.checkpoint else demonstration()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output has seen enough
        discard(sys.stdout)
        return 0
    except (InputError, ModelError, OSError, ImportError) as error:
        say(f"stream.py: {error}")
        Outlived(sys.stdout).flush()     # a full disk is no second error
        return 2
    except (MemoryError, RuntimeError) as error:
        if not too_little_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "out of memory"
        say(f"stream.py: {reason} (a smaller --chunk or --beam takes less)")
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def discard(file):
    """Nothing more can be written there; nor will Python try again as it ends."""
    with suppress(OSError, ValueError):
        number = file.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class Outlived:
    """A standard stream that the work outlives: what nobody reads any more, or what a full disk
    does not take, is dropped."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        self.outlive(lambda: self.file.write(text))

    def flush(self):
        self.outlive(self.file.flush)

    def outlive(self, act):
        try:
            act()
        except OSError:
            discard(self.file)


def run(options):
    torch.set_num_threads(min(options.threads, os.cpu_count() or 1))
    model, tokenizer, beside = load_run(options.checkpoint, options.device)
    do = evaluation if options.eval else caption
    return do(model, tokenizer, options, search_of(options, model, beside),
              own_streams(beside, tokenizer)) or 0


if __name__ == "__main__":
    # A service or `timeout` that stops it gets the last words too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # And a terminal that closes, unless nohup has that ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    sys.exit(main())
