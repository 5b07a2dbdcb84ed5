"""Audio in, words out: the streaming loop, greedy and beam search, captions, and what they score.

A stream is cut into chunks of C encoder frames. As soon as the samples of one more chunk are there, it goes

    samples -> log-mel -> encoder (keys and values of earlier chunks are cached) -> search -> tokens -> words

and whatever is less waits. So the same computations on the same shapes run however the audio is cut into packets, and
the result is the same to the last bit. The first thing to read is `step`, which is the whole loop; then the searches;
then captions; measuring comes last.

`python stream.py` streams noise in several packet sizes and prints that nothing changes; `--help` has the rest.
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model import HOP, PRESETS, SAMPLE_RATE, WINDOW, State, Transducer, load, log_mel, pad_samples
from serialize import StreamParser, Tokenizer, read_manifest

BLANK = 0
LIMITS = (20, 500)  # symbols in one frame, and in the last one, where a whole translation may still have to come
PER_MS = SAMPLE_RATE / 1000


# ---- The loop -------------------------------------------------------------------------------------------------------

@dataclass
class Word:
    stream: str        # the tag of the stream it belongs to
    text: str
    delay_ms: float    # the audio that the model needed: the end of the last sample of the chunk that wrote it
    frame_s: float     # the end of the encoder frame that wrote its last token
    elapsed_ms: float  # when it was there, had the audio come in real time: waiting and computing included


class Streamer:
    """One audio stream. Many of them may share a model, and `accept_many` steps them in one batch."""

    def __init__(self, model, tokenizer, *, chunk=None, beam=1, limits=LIMITS):
        config = model.config
        self.model, self.limits = model, limits
        self.chunk = config.chunks[0] if chunk is None else chunk  # frames; 0: everything at once, at the end
        if self.chunk < 0 or beam < 1:
            raise ValueError(f"chunk {self.chunk} must not be negative and beam {beam} must be 1 or more")
        if len(tokenizer) != config.vocab:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab}")
        self.samples_per_frame = HOP * config.subsampling
        self.waiting, self.n_waiting = [], 0  # samples not yet used up by a chunk
        self.received = self.frames = 0       # samples got, encoder frames done
        self.clock_ms = 0.0                   # end of the previous step, by the clock of `elapsed_ms`
        self.closed = False
        self.encoder_state = model.encoder.initial_state(1, self.chunk)
        self.search = Beam(model, beam, limits) if beam > 1 else Greedy(Labels.start(model, 1))
        self.parser = StreamParser(tokenizer)

    def accept(self, samples):
        """Samples (N,) at 16 kHz in -1..1, any number of them; returns the words that they finish."""
        return accept_many([self], [samples])[0]

    def flush(self):
        """The audio has ended: run what is left of it and release every word."""
        return flush_many([self])[0]

    def ready(self):
        return self.chunk and self.n_waiting >= self.chunk * self.samples_per_frame + WINDOW - HOP

    def push(self, samples):
        samples = np.asarray(samples, np.float32)
        if self.closed:
            raise ValueError("this stream was flushed: a new one starts with a new Streamer")
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise ValueError(f"samples must be finite numbers in one dimension, not {samples.dtype} {samples.shape}"
                             f" with {np.count_nonzero(~np.isfinite(samples))} NaN or infinite")
        self.waiting.append(samples)
        self.n_waiting += len(samples)
        self.received += len(samples)

    def take(self, n_frames):
        """The samples of the next frames, with the tail that the last window needs; zeros beyond the end."""
        used, needed = n_frames * self.samples_per_frame, n_frames * self.samples_per_frame + WINDOW - HOP
        samples = np.concatenate(self.waiting) if self.waiting else np.zeros(0, np.float32)
        self.waiting, self.n_waiting = [samples[used:].copy()], max(0, len(samples) - used)
        self.frames += n_frames
        return np.pad(samples[:needed], (0, max(0, needed - len(samples))))


def accept_many(streamers, packets):
    """A packet for each stream; chunks that are complete at the same time run as one batch."""
    words = {streamer: [] for streamer in streamers}
    for streamer, packet in zip(streamers, packets, strict=True):
        streamer.push(packet)
    while ready := [streamer for streamer in streamers if streamer.ready()]:
        for chunk in sorted({streamer.chunk for streamer in ready}):
            group = [streamer for streamer in ready if streamer.chunk == chunk]
            for streamer, new in zip(group, step(group, chunk)):
                words[streamer] += new
    return list(words.values())


def flush_many(streamers):
    """The rest of each stream: a whole chunk where there is still one, then the shorter last one as it is."""
    words = {}
    for streamer in streamers:
        streamer.closed, words[streamer] = True, []
        left = streamer.model.config.frames(streamer.received) - streamer.frames
        while left > 0:
            n_frames = min(left, streamer.chunk or left)
            left -= n_frames
            words[streamer] += step([streamer], n_frames, last=left == 0)[0]
    return list(words.values())


@torch.inference_mode()
def step(streamers, n_frames, last=False):
    """Run the next `n_frames` encoder frames of every stream in one batch; returns the words of each."""
    began, model = time.perf_counter(), streamers[0].model
    first = [streamer.frames for streamer in streamers]
    samples = torch.from_numpy(np.stack([streamer.take(n_frames) for streamer in streamers]))
    mel = log_mel(samples.to(model.joint.output.weight), model.config.n_mels)           # (B, F, 80)
    frames, state = model.encoder(mel, state=State.join([s.encoder_state for s in streamers]))
    frames = model.joint.encoder_proj(frames)                                           # (B, T, J)
    for b, streamer in enumerate(streamers):
        streamer.encoder_state = state.select(slice(b, b + 1))
    if isinstance(streamers[0].search, Beam):
        tokens = [streamer.search.advance(frames[b], last) for b, streamer in enumerate(streamers)]
    else:
        tokens = _greedy_step(model, frames, streamers, last)
    return [_words(s, path, start, last, began) for s, path, start in zip(streamers, tokens, first)]


def _greedy_step(model, frames, streamers, last):
    searches = [streamer.search for streamer in streamers]
    labels, (limit, last_limit) = Labels.join([search.labels for search in searches]), streamers[0].limits
    limits = (limit, last_limit if last else limit)
    found = greedy(model, frames, [frames.shape[1]] * len(streamers), labels, limits)
    for b, (search, (_, score, capped)) in enumerate(zip(searches, found)):
        search.labels = labels.select(slice(b, b + 1))
        search.score, search.capped = search.score + score, search.capped + capped
    return [path for path, _, _ in found]


def _words(streamer, path, first_frame, last, began):
    """Tokens -> words with their times. Nothing here depends on packets but the computing time in `elapsed_ms`."""
    config = streamer.model.config
    offset = 0 if isinstance(streamer.search, Beam) else first_frame  # beam search counts frames from the start of the stream
    delay_ms = chunk_delay_ms(config, streamer.frames, streamer.received)
    done = [(tag, text, frame + offset) for token, frame in path for tag, text in streamer.parser.feed(token)]
    if last:
        done += [(tag, text, streamer.frames - 1) for tag, text in streamer.parser.flush()]
    streamer.clock_ms = max(delay_ms, streamer.clock_ms) + (time.perf_counter() - began) * 1000
    return [Word(tag, text, delay_ms, (frame + 1) * config.frame_s, streamer.clock_ms) for tag, text, frame in done]


def chunk_delay_ms(config, n_frames, n_samples):
    """The audio needed for the first `n_frames` encoder frames: up to the end of the window of their last mel frame."""
    return min(n_samples, HOP * (n_frames * config.subsampling - 1) + WINDOW) / PER_MS


# ---- Greedy search --------------------------------------------------------------------------------------------------

@dataclass
class Labels:
    """What the label encoder made of the labels that each of B streams has written."""
    proj: torch.Tensor  # (B, J), ready to be added to a projected encoder frame
    state: object

    @classmethod
    def start(cls, model, batch):
        none = torch.zeros(batch, 0, dtype=torch.long, device=model.joint.output.weight.device)
        out, state = model.label_encoder(none)  # the start symbol alone
        return cls(model.joint.label_proj(out[:, -1]), state)

    def after(self, model, tokens):
        """The states once every stream has written one more token."""
        out, state = model.label_encoder(torch.tensor(tokens, device=self.proj.device)[:, None], self.state)
        return Labels(model.joint.label_proj(out[:, -1]), state)

    def select(self, rows):
        return Labels(self.proj[rows], self.state.select(rows))

    @staticmethod
    def join(labels):
        if len(labels) == 1:
            return labels[0]
        return Labels(torch.cat([one.proj for one in labels]), State.join([one.state for one in labels]))

    def put(self, rows, new):
        """These rows have moved on to `new`."""
        if len(rows) == len(self.proj):
            self.proj, self.state = new.proj, new.state
            return
        where = torch.arange(len(self.proj), device=self.proj.device)
        where[rows] = len(self.proj) + torch.arange(len(rows), device=self.proj.device)
        moved = Labels.join([self, new]).select(where)
        self.proj, self.state = moved.proj, moved.state


@dataclass
class Greedy:
    labels: Labels
    score: float = 0.0  # log-probability of the path taken
    capped: int = 0     # frames that wanted to write more than the limit


def greedy(model, frames, lengths, labels, limits, window=8):
    """Follow the best arc at every node of the lattice; returns ([(token, frame)], score, capped) for each stream.

    frames (B, T, J) are projected; limits: symbols allowed in a frame and in the last one, after which blank is taken.
    Only a label moves the label encoder, never blank. So until a label comes, the joint needs nothing from the search
    and `window` frames can be looked at in one call; the search stops at the first that is not blank.
    `labels` is brought up to date in place.
    """
    paths, scores, capped = [[] for _ in lengths], [0.0] * len(lengths), [0] * len(lengths)
    at, symbols = [0] * len(lengths), [0] * len(lengths)  # the frame each stream stands at, labels written in it
    ahead = torch.arange(window, device=frames.device)
    while rows := [b for b, length in enumerate(lengths) if at[b] < length]:
        here = torch.tensor([at[b] for b in rows], device=frames.device)
        index = (here[:, None] + ahead).clamp(max=frames.shape[1] - 1)                          # (R, W)
        pick = torch.tensor(rows, device=frames.device)
        nodes = torch.tanh(frames[pick[:, None], index] + labels.proj[pick][:, None])           # (R, W, J)
        log_probs = model.joint.output(nodes).log_softmax(-1)                                   # (R, W, V)
        best, token = (part.tolist() for part in log_probs.max(-1))
        blank = log_probs[..., BLANK].tolist()
        wrote, new = [], []
        for r, b in enumerate(rows):
            for w in range(min(window, lengths[b] - at[b])):
                last = at[b] == lengths[b] - 1
                if token[r][w] != BLANK and symbols[b] < limits[last]:
                    paths[b].append((token[r][w], at[b]))
                    scores[b] += best[r][w]
                    symbols[b] += 1
                    wrote.append(b)
                    new.append(token[r][w])
                    break
                capped[b] += token[r][w] != BLANK
                scores[b] += blank[r][w]
                at[b], symbols[b] = at[b] + 1, 0
        if new:
            labels.put(wrote, (labels if len(new) == len(lengths) else labels.select(wrote)).after(model, new))
    return list(zip(paths, scores, capped))


@torch.inference_mode()
def greedy_batch(model, mel, lengths, chunk=None, limits=LIMITS):
    """Many whole utterances at once through the offline masked encoder: (ids, frames) of each.

    mel (B, F, 80) padded, lengths (B,) in mel frames. The same search on the same frames as streaming: same tokens.
    """
    lengths = torch.as_tensor(lengths, device=mel.device)
    out, _ = model.encoder(mel, lengths=lengths, chunk=chunk)
    n_frames = [max(1, -(-n // model.config.subsampling)) for n in lengths.tolist()]
    found = greedy(model, model.joint.encoder_proj(out), n_frames, Labels.start(model, len(mel)), limits)
    return [([token for token, _ in path], [frame for _, frame in path]) for path, _, _ in found]


# ---- Beam search ----------------------------------------------------------------------------------------------------

@dataclass
class Hypothesis:
    tokens: tuple   # written since the last word that all hypotheses agree on
    frames: tuple   # the encoder frame of each, counted from the start of the stream
    score: float    # log of the summed probability of the paths found to these tokens
    labels: Labels


class Beam:
    """Time-synchronous: all hypotheses stand at the same frame, and go on together once each has taken blank there.

    In one symbol step every hypothesis that has not left the frame may leave it by blank or write any label; those
    that left and those that wrote are pruned TOGETHER to the size of the beam, so a beam of one is greedy search.
    Paths that reach the same labels are the same hypothesis and their probabilities add up.
    """

    def __init__(self, model, size, limits=LIMITS, hold=100):
        self.model, self.size, self.limits, self.hold = model, size, limits, hold
        self.hyps = [Hypothesis((), (), 0.0, Labels.start(model, 1))]
        self.at = self.capped = 0  # the frame it stands at; how often the best wanted to write more than the limit

    @property
    def score(self):
        return self.hyps[0].score

    def advance(self, frames, last=False):
        """frames (T, J), projected -> the tokens that are now certain, as [(token, frame)]."""
        for k, frame in enumerate(frames):
            self._frame(frame, self.limits[last and k == len(frames) - 1])
            self.at += 1
        return self._commit(last)

    def _frame(self, frame, limit):
        active, left = self.hyps, {}  # left: by tokens, those that took blank
        for symbols in range(limit + 1):
            nodes = torch.tanh(frame + torch.cat([hyp.labels.proj for hyp in active]))
            log_probs = self.model.joint.output(nodes).log_softmax(-1)                          # (A, V)
            for hyp, blank in zip(active, log_probs[:, BLANK].tolist()):
                self._leave(left, Hypothesis(hyp.tokens, hyp.frames, hyp.score + blank, hyp.labels))
            if symbols == limit:
                self.capped += log_probs[0].argmax().item() != BLANK
                break
            active = self._extend(active, log_probs, left)
            if not active:
                break
        self.hyps = sorted(left.values(), key=lambda hyp: -hyp.score)[:self.size]

    def _leave(self, left, hyp):
        """Add a hypothesis to those that left the frame; the times are those of the more probable path."""
        twin = left.get(hyp.tokens, hyp)
        if twin is not hyp:
            total = float(np.logaddexp(twin.score, hyp.score))
            hyp = Hypothesis(hyp.tokens, max(twin, hyp, key=lambda h: h.score).frames, total, hyp.labels)
        left[hyp.tokens] = hyp

    def _extend(self, active, log_probs, left):
        """Write a label: prune with those that left (in place), return the hypotheses that survive with a new label."""
        scores = log_probs.double() + log_probs.new_tensor([hyp.score for hyp in active], dtype=torch.double)[:, None]
        scores[:, BLANK] = -math.inf
        best, index = scores.flatten().topk(min(self.size, scores.numel()))
        pool = [(score, None, tokens) for tokens, score in ((hyp.tokens, hyp.score) for hyp in left.values())]
        pool += [(score, *divmod(i, scores.shape[1])) for score, i in zip(best.tolist(), index.tolist())
                 if score > -math.inf]
        pool = sorted(pool, key=lambda entry: -entry[0])[:self.size]
        kept = {tokens for _, parent, tokens in pool if parent is None}
        for tokens in set(left) - kept:
            del left[tokens]
        grown = [(score, active[parent], token) for score, parent, token in pool if parent is not None]
        if not grown:
            return []
        labels = Labels.join([hyp.labels for _, hyp, _ in grown]).after(self.model, [token for *_, token in grown])
        rows = [labels.select(slice(k, k + 1)) for k in range(len(grown))]
        return [Hypothesis(hyp.tokens + (token,), hyp.frames + (self.at,), score, own)
                for (score, hyp, token), own in zip(grown, rows)]

    def _commit(self, last):
        """Tokens that all hypotheses share are certain. One that stays open for `hold` tokens is decided by score."""
        best = self.hyps[0]
        if last or len(best.tokens) > self.hold:
            n = len(best.tokens) if last else len(best.tokens) - self.hold
            self.hyps = [hyp for hyp in self.hyps if hyp.tokens[:n] == best.tokens[:n]]
        n = len(best.tokens) if last else len(os.path.commonprefix([hyp.tokens for hyp in self.hyps]))
        certain = list(zip(best.tokens[:n], best.frames[:n]))
        self.hyps = [Hypothesis(h.tokens[n:], h.frames[n:], h.score, h.labels) for h in self.hyps]
        return certain


# ---- Audio ----------------------------------------------------------------------------------------------------------

class AudioError(ValueError):
    """Audio that cannot be used; the message names the file."""


def read_audio(path, start=0.0, duration=None):
    """A file, or a piece of it in seconds -> float32 samples (N,), mono, 16 kHz. Channels are averaged."""
    import soundfile
    try:
        with soundfile.SoundFile(path) as file:
            rate, first = file.samplerate, round(start * file.samplerate)
            wanted = file.frames - first if duration is None else round(duration * rate)
            if first < 0 or wanted <= 0 or first + wanted > file.frames + rate // 20:
                until = "the end" if duration is None else f"{start + duration:.2f} s"
                raise AudioError(f"{path}: holds {file.frames / rate:.2f} s, nothing from {start:.2f} s to {until}"
                                 if file.frames else f"{path}: holds no samples")
            file.seek(first)
            samples = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError(f"{path}: not a readable audio file ({error})") from None
    if len(samples) < wanted - rate // 20:
        raise AudioError(f"{path}: truncated, {len(samples) / rate:.2f} s of {wanted / rate:.2f} s could be read")
    check_audio(samples, path)
    return resample(samples, rate, SAMPLE_RATE)


def check_audio(samples, path):
    """Refuse what no model can make sense of, before it becomes words."""
    bad = np.count_nonzero(~np.isfinite(samples))
    if bad:
        raise AudioError(f"{path}: {bad} of {len(samples)} samples are NaN or infinite")
    if not samples.any():
        raise AudioError(f"{path}: silent, all {len(samples)} samples are zero")
    clipped = np.mean(np.abs(samples) >= 0.999)
    if clipped > 0.1:
        raise AudioError(f"{path}: clipped, {clipped:.0%} of the samples lie at or beyond full scale")


def resample(samples, rate, to, crossings=32):
    """Band-limited interpolation: a windowed sinc, one short filter for each of the phases that a ratio has."""
    if rate == to:
        return samples
    up, down = to // math.gcd(rate, to), rate // math.gcd(rate, to)
    cutoff = 0.95 * min(1.0, up / down)              # of the half sampling rate of the input
    half = math.ceil(crossings / cutoff)
    out = np.zeros(math.ceil(len(samples) * up / down), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, half), 2 * half)
    taps = np.arange(1 - half, half + 1)
    for phase in range(min(up, len(out))):
        base, fraction = divmod(phase * down, up)    # output sample `phase` lies at base + fraction / up of the input
        at = taps - fraction / up
        kernel = cutoff * np.sinc(cutoff * at) * np.cos(np.pi * np.clip(at / (2 * half), -0.5, 0.5)) ** 2
        count = len(out[phase::up])
        out[phase::up] = windows[base + 1::down][:count] @ kernel.astype(np.float32)
    return out


# ---- Captions -------------------------------------------------------------------------------------------------------

def packets(source, realtime):
    """The audio of a file, or 16-bit PCM from standard input as it comes."""
    if source == "-":
        rest, received, loud = b"", 0, False
        while data := sys.stdin.buffer.read1(4096):
            data = rest + data
            rest = data[len(data) // 2 * 2:]  # half a sample waits for its other half
            samples = np.frombuffer(data[:len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
            received, loud = received + len(samples), loud or samples.any()
            yield samples
        if not loud:
            raise AudioError(f"standard input: silent, {received} samples of 16-bit PCM and none but zeros")
        return
    samples, began, size = read_audio(source), time.perf_counter(), SAMPLE_RATE // 10
    for start in range(0, len(samples), size):
        if realtime:
            time.sleep(max(0.0, began + min(start + size, len(samples)) / SAMPLE_RATE - time.perf_counter()))
        yield samples[start:start + size]


class Plain:
    """Lines are only ever appended: one for each stream that has new words."""

    def __init__(self, tags):
        self.tags = tags

    def show(self, words):
        for tag in self.tags:
            if mine := [word for word in words if word.stream == tag]:
                print(f"{mine[0].delay_ms / 1000:8.2f} s  {tag:8} {' '.join(word.text for word in mine)}", flush=True)


class Json(Plain):
    def show(self, words):
        for word in words:
            print(json.dumps(asdict(word), ensure_ascii=False), flush=True)


class Terminal(Plain):
    """One line for each stream, growing in place. When one is full they all scroll up and a fresh block begins."""

    def __init__(self, tags):
        self.lines, self.drawn = dict.fromkeys(tags, ""), False
        self.show([])

    def show(self, words):
        for word in words:
            text = "".join(c if c.isprintable() else "\ufffd" for c in word.text)  # a model may write any byte
            grown = f"{self.lines[word.stream]} {text}"
            if columns(f"{word.stream:8}{grown}") > shutil.get_terminal_size().columns - 1:
                self.draw()
                self.lines, self.drawn, grown = dict.fromkeys(self.lines, ""), False, f" {text}"
            self.lines[word.stream] = grown
        self.draw()

    def draw(self):
        up = f"\x1b[{len(self.lines)}F" if self.drawn else ""  # back to the first line of the block
        width = shutil.get_terminal_size().columns - 9
        rows = (f"\x1b[2K\x1b[2m{tag:8}\x1b[0m{line[:width]}\n" for tag, line in self.lines.items())
        print(up + "".join(rows), end="", flush=True)
        self.drawn = True


def columns(text):
    """How wide a terminal shows it: accents stand on the letter before, East Asian letters are two wide."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def caption(model, tokenizer, options):
    kind = Json if options.json else Terminal if sys.stdout.isatty() else Plain
    captions, streamer = kind(tokenizer.tags), Streamer(model, tokenizer, chunk=options.chunk, beam=options.beam)
    try:
        for packet in packets(options.audio, options.realtime):
            captions.show(streamer.accept(packet))
    except KeyboardInterrupt:
        pass  # the usual end of a microphone: what was heard so far still has its last words to come
    if streamer.received:
        captions.show(streamer.flush())
    if streamer.search.capped:
        print(f"{streamer.search.capped} frames wanted more than {LIMITS} symbols and were cut off", file=sys.stderr)


# ---- Evaluation: stream a set, then compare words and delays with the references -----------------------------------

def evaluate(model, tokenizer, items, *, chunk=None, beam=1, batch_size=16, progress=False, bootstrap=0):
    """items: [(row, samples)] -> (metrics by stream, one record by utterance).

    A batch size of 1 streams the utterances one after the other, as a listener would hear them, and measures computing
    time; larger ones run the offline encoder, which writes the same words with the same delays, only sooner.
    """
    training = model.training
    model.eval()
    try:
        records = decode(model, tokenizer, items, (chunk, beam, batch_size, progress))
    finally:
        model.train(training)
    return summarise(records, tokenizer.tags, bootstrap), records


def decode(model, tokenizer, items, options):
    """One record per utterance, in the order of the items: what was said, what was written, and when."""
    chunk, beam, batch_size, progress = options
    order = sorted(range(len(items)), key=lambda i: len(items[i][1]))
    size, found = 1 if beam > 1 else batch_size, {}
    groups = [order[first:first + size] for first in range(0, len(order), size)]
    if progress:
        from tqdm import tqdm
        groups = tqdm(groups, unit="batch" if size > 1 else "utt", desc="evaluating", leave=False)
    for group in groups:
        audio = [items[i][1] for i in group]
        results = ([stream_one(model, tokenizer, audio[0], chunk, beam)] if size == 1
                   else stream_batch(model, tokenizer, audio, chunk))
        for i, result in zip(group, results):
            row, samples = items[i]
            texts = {"<asr>": row.asr, **{f"<st:{lang}>": text for lang, text in row.st.items()}}
            references = {tag: text.split() for tag, text in texts.items() if text is not None}
            found[i] = {"id": row.id, "audio": row.audio, "references": references,
                        "duration_ms": len(samples) / PER_MS, **result}
    return [found[i] for i in range(len(items))]


def stream_one(model, tokenizer, samples, chunk, beam):
    began, streamer = time.perf_counter(), Streamer(model, tokenizer, chunk=chunk, beam=beam)
    words = streamer.accept(samples) + streamer.flush()
    return {"words": words, "capped": streamer.search.capped, "score": streamer.search.score,
            "seconds": time.perf_counter() - began}


def stream_batch(model, tokenizer, audio, chunk):
    """The words and delays that streaming each of these would give; computing time cannot be known this way."""
    config, weight = model.config, model.joint.output.weight
    chunk = config.chunks[0] if chunk is None else chunk
    mels = [log_mel(pad_samples(torch.as_tensor(samples).to(weight), config.subsampling), config.n_mels)
            for samples in audio]
    mel = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)
    for samples, (ids, frames) in zip(audio, greedy_batch(model, mel, [len(one) for one in mels], chunk)):
        parser, n_frames, words = StreamParser(tokenizer), config.frames(len(samples)), []
        pairs = [(pair, frame) for token, frame in zip(ids, frames) for pair in parser.feed(token)]
        for (tag, text), frame in pairs + [(pair, n_frames - 1) for pair in parser.flush()]:
            end = min(n_frames, (frame // chunk + 1) * chunk) if chunk else n_frames  # of the chunk
            delay = chunk_delay_ms(config, end, len(samples))
            words.append(Word(tag, text, delay, (frame + 1) * config.frame_s, math.nan))
        yield {"words": words}


def join_items(items, seconds):
    """Utterances one after the other in streams of at least `seconds` -> [(row, samples)], [the items of each]."""
    groups, length = [[]], 0
    for item in items:
        if length >= seconds * SAMPLE_RATE:
            groups, length = [*groups, []], 0
        groups[-1].append(item)
        length += len(item[1])
    joined = []
    for group in groups:
        rows = [row for row, _ in group]
        st = {lang: " ".join(row.st.get(lang, "") for row in rows) for lang in rows[0].st}
        asr = None if rows[0].asr is None else " ".join(row.asr or "" for row in rows)
        joined.append((replace(rows[0], asr=asr, st=st), np.concatenate([samples for _, samples in group])))
    return joined, groups


def cut_back(record, items, tags):
    """The record of a joined stream -> one for each utterance in it, with delays from the start of that utterance.

    Each word goes where the word of the reference lies that the best alignment (fewest edits) puts it at.
    """
    starts = np.cumsum([0] + [len(samples) / PER_MS for _, samples in items])
    singles = [{"id": row.id, "audio": row.audio, "references": {}, "words": [], "seconds": record["seconds"] / len(items),
                "duration_ms": len(samples) / PER_MS} for row, samples in items]
    for tag in record["references"]:
        texts = [(row.asr if tag == "<asr>" else row.st.get(tag[4:-1]) or "").split() for row, _ in items]
        owner = [k for k, text in enumerate(texts) for _ in text]
        mine = [word for word in record["words"] if word.stream == tag]
        for single, text in zip(singles, texts):
            single["references"][tag] = text
        for word, at in zip(mine, align_edits(record["references"][tag], [word.text for word in mine])):
            k = owner[min(at, len(owner) - 1)] if owner else 0
            singles[k]["words"].append(replace(word, delay_ms=word.delay_ms - starts[k],
                                               elapsed_ms=word.elapsed_ms - starts[k]))
    return singles


def summarise(records, tags, bootstrap=0):
    """Metrics by stream, flat and plain, from the records of `decode`; name_95 are 95 % intervals."""
    metrics = {}
    for tag in tags:
        rows = [row for row in records if tag in row["references"]]
        if rows:
            metrics[tag] = score_stream(rows, tag, bootstrap)
    return metrics


def score_stream(rows, tag, bootstrap):
    references = [row["references"][tag] for row in rows]
    written = [[word for word in row["words"] if word.stream == tag] for row in rows]
    texts = [[word.text for word in words] for words in written]
    metrics = {"utterances": len(rows), "silent": sum(not words for words in texts)}

    def ratio(name, above, below):
        if below and not any(map(math.isnan, above)):
            metrics[name] = sum(above) / sum(below) if any(below) else math.nan
            if bootstrap:  # over utterances
                drawn = np.random.default_rng(0).integers(len(above), size=(bootstrap, len(above)))
                values = np.array(above)[drawn].sum(1) / np.maximum(1e-9, np.array(below)[drawn].sum(1))
                metrics[f"{name}_95"] = np.quantile(values, [0.025, 0.975]).tolist()
        else:
            metrics[name] = None

    for suffix, clean in (("", list), ("_norm", normalise)):
        pairs = [(clean(ref), clean(hyp)) for ref, hyp in zip(references, texts)]
        for name, of in (("wer", list), ("cer", " ".join)):
            edits = [100 * edit_distance(of(ref), of(hyp)) for ref, hyp in pairs]
            ratio(name + suffix, edits, [len(of(ref)) for ref, _ in pairs])
    metrics |= sacre([" ".join(hyp) for hyp in texts], [" ".join(ref) for ref in references], bootstrap)
    for suffix, of in (("", "delay_ms"), ("_ca", "elapsed_ms")):  # ca: computation-aware
        lags = [latency([getattr(word, of) for word in words], row["duration_ms"], len(ref))
                for row, words, ref in zip(rows, written, references) if words]
        for k, name in enumerate(("al", "laal")):
            ratio(f"{name}{suffix}_ms", [lag[k] for lag in lags], [1] * len(lags))
    if all("seconds" in row for row in rows):
        metrics["real_time_factor"] = sum(row["seconds"] for row in rows) * 1000 / sum(row["duration_ms"] for row in rows)
    return metrics


def edit_table(a, b):
    """cost[i, j]: substitutions, insertions and deletions that turn a[:i] into b[:j] (Levenshtein).

    cost[i, j] = min(cost[i-1, j] + 1, cost[i-1, j-1] + (a[i-1] != b[j-1]), cost[i, j-1] + 1), a row at a time: the last
    choice, along the row, is a running minimum of cost - j.
    """
    number = {item: k for k, item in enumerate(dict.fromkeys([*a, *b]))}
    codes = np.array([number[item] for item in b], np.int32)
    steps = np.arange(len(b) + 1, dtype=np.int32)
    table = np.empty((len(a) + 1, len(b) + 1), np.int32)
    table[0] = steps
    for i, item in enumerate(a):
        row = table[i] + 1
        row[1:] = np.minimum(row[1:], table[i, :-1] + (codes != number[item]))
        table[i + 1] = np.minimum.accumulate(row - steps) + steps
    return table


def edit_distance(a, b):
    return int(edit_table(a, b)[-1, -1])


def align_edits(reference, hypothesis):
    """The index of the reference word that each word of the hypothesis stands for, or stands before."""
    table, i, where = edit_table(reference, hypothesis), len(reference), []
    for j in range(len(hypothesis), 0, -1):
        while i and table[i, j] == table[i - 1, j] + 1:  # reference words that nothing stands for
            i -= 1
        if i and table[i, j] == table[i - 1, j - 1] + (reference[i - 1] != hypothesis[j - 1]):
            i -= 1
        where.append(i)
    return where[::-1]


def normalise(words):
    """Lower-cased, without punctuation."""
    kept = ("".join(c for c in word.lower() if unicodedata.category(c)[0] != "P") for word in words)
    return [word for word in kept if word]


def latency(delays, source_ms, n_ref):
    """Average lagging behind an ideal that spreads its words evenly over the source: (AL, LAAL), in ms.

    AL    = 1/tau sum over i <= tau of d_i - (i-1) S / n_ref,  tau the first word that needed the whole source
    LAAL  the same with max(n_hyp, n_ref), so that writing too much does not look fast
    """
    if delays[0] > source_ms:
        return delays[0], delays[0]
    tau = next((i + 1 for i, d in enumerate(delays) if d >= source_ms), len(delays))
    d = np.array(delays[:tau])
    return tuple(float(np.mean(d - np.arange(tau) * source_ms / max(1, n))) for n in (n_ref, max(len(delays), n_ref)))


def sacre(hypotheses, references, bootstrap):
    """BLEU with its signature, and chrF."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        print("BLEU and chrF are left out: pip install sacrebleu", file=sys.stderr)
        return {"bleu": None, "chrf": None}
    metrics = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        score = metric.corpus_score(hypotheses, [references], n_bootstrap=bootstrap or 1)
        metrics[name] = score.score
        if bootstrap:
            found = json.loads(score.format(width=4, is_json=True))
            middle, half = found["confidence_mean"], found["confidence_var"]
            metrics[f"{name}_95"] = [middle - half, middle + half]
        metrics[f"{name}_signature"] = str(metric.get_signature())
    return metrics


def write_logs(folder, records, metrics):
    """One folder for each stream in the format of SimulEval, which can score it again, and all the metrics."""
    for tag in metrics:
        path = Path(folder, tag.strip("<>").replace(":", "-"))
        path.mkdir(parents=True, exist_ok=True)
        rows = [row for row in records if tag in row["references"]]
        with open(path / "instances.log", "w", encoding="utf-8") as file:
            for index, row in enumerate(rows):
                words = [word for word in row["words"] if word.stream == tag]
                entry = {"index": index, "prediction": " ".join(word.text for word in words),
                         "delays": [word.delay_ms for word in words], "elapsed": [word.elapsed_ms for word in words],
                         "prediction_length": len(words), "reference": " ".join(row["references"][tag]),
                         "source": [row["audio"]], "source_length": row["duration_ms"]}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        (path / "config.yaml").write_text("source_type: speech\ntarget_type: text\n")
    Path(folder, "metrics.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")


def report(metrics):
    """A row for each figure, a column for each stream."""
    print(f"{'':18}" + "".join(f"{tag:>28}" for tag in metrics))
    for name in dict.fromkeys(name for columns in metrics.values() for name in columns):
        if name.endswith("_95") or name.endswith("_signature"):
            continue
        cells = []
        for figures in metrics.values():
            value, digits = figures.get(name), 0 if name.endswith("_ms") else 3 if "factor" in name else 2
            text = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.{digits}f}"
            if f"{name}_95" in figures:
                text += " ({:.{d}f} .. {:.{d}f})".format(*figures[f"{name}_95"], d=digits)
            cells.append(f"{text:>28}")
        print(f"{name:18}" + "".join(cells))
    for name in ("bleu_signature", "chrf_signature"):
        print(f"{name}: {next(iter(metrics.values())).get(name)}")


# ---- Command line ---------------------------------------------------------------------------------------------------

def evaluation(model, tokenizer, options):
    items, skipped = [], 0
    for row in read_manifest(options.eval, options.strict, allow_outside=options.allow_outside):
        try:
            items.append((row, read_audio(row.audio, row.start, row.duration)))
        except AudioError as error:
            if options.strict:
                raise AudioError(f"{row.where}: {error}") from None
            print(f"{row.where}: {error}", file=sys.stderr)
            skipped += 1
    if not items:
        raise ValueError(f"{options.eval}: no row with usable audio")
    how = {"chunk": options.chunk, "beam": options.beam, "batch_size": 1, "progress": True}
    metrics, records = evaluate(model, tokenizer, items, **how, bootstrap=1000)
    report(metrics)
    if options.log:
        write_logs(options.log, records, metrics)
    if options.join:
        joined, groups = join_items(items, options.join)
        _, long = evaluate(model, tokenizer, joined, **how)
        cut = [single for record, group in zip(long, groups) for single in cut_back(record, group, tokenizer.tags)]
        print(f"\nthe same utterances joined into {len(joined)} streams of {options.join:g} s or more, cut back after")
        report(summarise(cut, tokenizer.tags, 1000))
    if skipped:
        print(f"{skipped} rows were skipped because of their audio", file=sys.stderr)


def demonstration():
    """Random weights, a second of noise: whatever the packets, the words and their times do not change."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["la la la"], 262, tags=("<asr>", "<st:en>"))
    model = Transducer(replace(PRESETS["tiny"], vocab=len(tokenizer), dropout=0.0)).eval()
    samples = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE + 123).astype(np.float32)
    results = []
    for packet in (1, 700, 4000, len(samples)):
        streamer, words = Streamer(model, tokenizer, limits=(3, 10)), []
        for start in range(0, len(samples), packet):
            words += streamer.accept(samples[start:start + packet])
        words += streamer.flush()
        results.append((streamer.search.score, [(word.stream, word.text, word.delay_ms, word.frame_s) for word in words]))
        print(f"packets of {packet:6} samples: {len(words)} words, log-probability {streamer.search.score!r}")
    print("match" if all(result == results[0] for result in results) else "NO MATCH")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="stream.py", description="Live captions of a file or of standard input.")
    parser.add_argument("checkpoint", nargs="?", help="model.pt of a run; without it, a demonstration")
    parser.add_argument("audio", nargs="?", help="an audio file; - reads 16-bit mono PCM at 16 kHz from standard input")
    parser.add_argument("--chunk", type=int, help="encoder frames per chunk (default: the model's first; 0: all)")
    parser.add_argument("--beam", type=int, default=1, help="hypotheses in beam search (default 1: greedy)")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each word")
    parser.add_argument("--realtime", action="store_true", help="play a file at its own pace")
    parser.add_argument("--eval", metavar="MANIFEST", help="stream all of a manifest and compare with its texts")
    parser.add_argument("--log", metavar="DIR", help="with --eval: write SimulEval logs and metrics.json there")
    parser.add_argument("--join", metavar="S", type=float, help="with --eval: also joined into streams of S seconds")
    parser.add_argument("--strict", action="store_true", help="with --eval: stop at the first bad row")
    parser.add_argument("--allow-outside", action="store_true", help="with --eval: audio outside the manifest's folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    options = parser.parse_args(argv)
    if options.checkpoint and bool(options.audio) == bool(options.eval):
        parser.error("give one of an audio file, - for standard input, or --eval MANIFEST")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    if not options.checkpoint:
        return demonstration()
    torch.set_num_threads(options.threads)
    try:
        model, beside = load(options.checkpoint, map_location=options.device)
        if "tokenizer" not in beside:
            raise ValueError(f"{options.checkpoint}: holds no tokenizer")
        tokenizer = Tokenizer.from_dict(beside["tokenizer"])
        (evaluation if options.eval else caption)(model, tokenizer, options)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"stream.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
