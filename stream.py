"""Audio in, words out: the streaming loop, greedy and beam search, captions, and how good and how late the words are.

A stream is cut into chunks of C encoder frames. When the samples of one more chunk are there, it goes

    samples -> log-mel -> encoder (keys and values of earlier chunks are cached) -> search -> tokens -> words

and less than a chunk waits. So the same computations run on the same shapes however the audio is cut into packets, and
the result is the same to the last bit. `step` is the whole loop; searches, audio files and captions follow, and
measuring comes last. The network is model.py's, turning tokens into words serialize.py's. `python stream.py MODEL FILE`
prints captions, with `--eval MANIFEST` error rates and latency; alone, it shows that packets do not matter.
"""
import argparse
import json
import math
import os
import re
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model import HOP, PRESETS, SAMPLE_RATE, WINDOW, State, Transducer, load, log_mel
from serialize import StreamParser, Tokenizer, read_manifest

BLANK = 0
LIMITS = (20, 500)  # symbols in one frame, and in the last one, where a whole translation may still have to come
PER_MS = SAMPLE_RATE / 1000  # samples in a millisecond


# ---- The loop -------------------------------------------------------------------------------------------------------

@dataclass
class Word:
    stream: str        # the tag of its stream
    text: str
    delay_ms: float    # the audio that the model needed: the end of the last sample of the chunk that wrote it
    frame_s: float     # the end of the encoder frame that wrote its last token
    elapsed_ms: float  # when it was there, had the audio come in real time: waiting and computing included


class Streamer:
    """One audio stream. Many may share a model: `push` to each of them, then `advance` steps them in one batch."""

    def __init__(self, model, tokenizer, *, chunk=None, beam=1, limits=LIMITS):
        self.model, self.config = model, model.config
        self.chunk = self.config.chunks[0] if chunk is None else chunk  # frames; 0: everything at once, at the end
        if self.chunk < 0 or beam < 1:
            raise ValueError(f"chunk {self.chunk} must not be negative, and beam {beam} must be 1 or more")
        if len(tokenizer) != self.config.vocab:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {self.config.vocab}")
        self.waiting = [np.zeros(0, np.float32)]  # samples that no chunk has used up yet
        self.received = self.frames = 0           # samples got, encoder frames done
        self.clock_ms, self.closed = 0.0, False   # end of the previous step, as `elapsed_ms` counts
        self.encoder_state = model.encoder.initial_state(1, self.chunk)
        self.search = Greedy(model, limits) if beam == 1 else Beam(model, beam, limits)
        self.parser = StreamParser(tokenizer)

    def accept(self, samples):
        """Samples (N,) at 16 kHz in -1..1, any number of them -> the words that they finish."""
        self.push(samples)
        return advance([self])[0]

    def flush(self):
        """The audio has ended: run what is left of it and release every word."""
        self.closed = True
        return advance([self])[0]

    def push(self, samples):
        samples = np.asarray(samples, np.float32)
        if self.closed:
            raise ValueError("this stream was flushed; another one starts with a new Streamer")
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise ValueError(f"samples must be finite numbers in one dimension, not {samples!r:.200}")
        self.waiting.append(samples)
        self.received += len(samples)

    def due(self):
        """What can run now, as (frames, whether they are the last), or None. After the end: a whole chunk where there
        still is one, then the shorter last one as it is."""
        if self.closed:
            left = self.config.frames(self.received) - self.frames
            n_frames = min(left, self.chunk or left)
            return (n_frames, n_frames == left) if left else None
        end = (self.frames + self.chunk) * HOP * self.config.subsampling + WINDOW - HOP
        return (self.chunk, False) if self.chunk and self.received >= end else None

    def take(self, n_frames):
        """The samples of the next frames and of the last window's tail, zeros beyond the end of the audio."""
        used = n_frames * HOP * self.config.subsampling
        samples = np.concatenate(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
        self.waiting, self.frames = [samples[used:]], self.frames + n_frames
        samples = samples[:used + WINDOW - HOP]
        return np.pad(samples, (0, used + WINDOW - HOP - len(samples)))

    def words(self, tokens, last, began):
        """[(token, frame)] -> words. Nothing here depends on packets but the computing time in `elapsed_ms`."""
        done = [(pair, frame) for token, frame in tokens for pair in self.parser.feed(token)]
        if last:
            done += [(pair, self.frames - 1) for pair in self.parser.flush()]
        last_sample = HOP * (self.frames * self.config.subsampling - 1) + WINDOW  # of the chunk's last mel frame
        delay_ms = min(last_sample, self.received) / PER_MS
        self.clock_ms = max(delay_ms, self.clock_ms) + (time.perf_counter() - began) * 1000
        return [Word(tag, text, delay_ms, (frame + 1) * self.config.frame_s, self.clock_ms)
                for (tag, text), frame in done]


def advance(streamers):
    """Run all that can run, chunks of the same size as one batch -> the new words of each stream."""
    words, kind = {streamer: [] for streamer in streamers}, lambda s: (s.due(), s.chunk, type(s.search))
    while ready := [streamer for streamer in streamers if streamer.due()]:
        group = [streamer for streamer in ready if kind(streamer) == kind(ready[0])]
        for streamer, new in zip(group, step(group, *ready[0].due())):
            words[streamer] += new
    return list(words.values())


@torch.inference_mode()
def step(streamers, n_frames, last):
    """The next `n_frames` encoder frames of every stream in one batch; returns the words of each."""
    began, model = time.perf_counter(), streamers[0].model
    samples = torch.from_numpy(np.stack([streamer.take(n_frames) for streamer in streamers]))  # (B, N)
    config = model.config
    mel = log_mel(samples.to(model.joint.output.weight), config.n_mels, config.floor)          # (B, F, 80)
    frames, state = model.encoder(mel, state=State.join([streamer.encoder_state for streamer in streamers]))
    for b, streamer in enumerate(streamers):
        streamer.encoder_state = state.select(slice(b, b + 1))
    searches = [streamer.search for streamer in streamers]
    tokens = type(searches[0]).advance(searches, model.joint.encoder_proj(frames), last)       # from (B, T, J)
    return [streamer.words(found, last, began) for streamer, found in zip(streamers, tokens)]


# ---- Searches: greedy, and beam -------------------------------------------------------------------------------------

@dataclass
class Labels:
    """What the label encoder made of the labels that each of B streams has written."""
    proj: torch.Tensor  # (B, J), ready to be added to a projected encoder frame
    state: State

    @staticmethod
    def read(model, tokens=torch.zeros(1, 0, dtype=torch.long), state=None):  # tokens (B, 1), none at the start
        out, state = model.label_encoder(tokens.to(model.joint.output.weight.device), state)
        return Labels(model.joint.label_proj(out[:, -1]), state)

    def select(self, rows):
        return Labels(self.proj[rows], self.state.select(rows))

    @staticmethod
    def join(parts):
        return Labels(torch.cat([part.proj for part in parts]), State.join([part.state for part in parts]))


class Greedy:
    """One stream's way through the lattice: up by a label, on to the next frame by blank, the better one each time."""

    def __init__(self, model, limits=LIMITS):
        self.model, self.limits, self.labels = model, limits, Labels.read(model)
        self.first = self.at = self.symbols = 0  # frames of earlier calls, frame of this one, labels written there
        self.score, self.capped = 0.0, 0  # log-probability of the path; frames that wanted more labels than the limit
        self.tokens = []                  # [(token, frame)] of this call

    @staticmethod
    def advance(searches, frames, last, lengths=None, window=8):
        """Projected frames (B, T, J), of which `lengths` are real -> the new tokens of each stream, [(token, frame)].

        Only a label moves the label encoder, never blank. So until a label comes, nothing in the joint depends on the
        search, and one call looks at `window` frames: the path runs through their blanks and stops at a label.
        """
        (B, T, _), model, labels = frames.shape, searches[0].model, Labels.join([s.labels for s in searches])
        lengths, ahead = lengths or [T] * B, torch.arange(window, device=frames.device)
        for search in searches:
            search.at, search.tokens = 0, []
        while rows := [b for b, search in enumerate(searches) if search.at < lengths[b]]:
            some = torch.tensor(rows, device=frames.device)
            at = torch.tensor([searches[b].at for b in rows], device=frames.device)[:, None] + ahead
            heard = frames[some[:, None], at.clamp(max=T - 1)]                                  # (R, W, J)
            log_probs = model.joint.combine(heard, labels.proj[some][:, None]).log_softmax(-1)  # (R, W, V)
            best, token = log_probs.max(-1)
            new = [BLANK] * B
            for b, *row in zip(rows, token.tolist(), best.tolist(), log_probs[..., BLANK].tolist()):
                new[b] = searches[b].follow(zip(*row), lengths[b], last)
            if any(new):  # every row reads a label, and those that wrote none keep what they had
                moved = Labels.read(model, torch.tensor(new)[:, None], labels.state)
                labels = moved if all(new) else Labels.join([labels, moved]).select(
                    [b + B * (token != BLANK) for b, token in enumerate(new)])
        for b, search in enumerate(searches):
            search.labels, search.first = labels.select(slice(b, b + 1)), search.first + lengths[b]
        return [search.tokens for search in searches]

    def follow(self, nodes, length, last):
        """Walk along (best token, its log-probability, that of blank) of successive frames; the label it writes."""
        for token, best, blank in nodes:
            if self.at == length:
                break
            if token != BLANK and self.symbols < self.limits[last and self.at == length - 1]:
                self.score, self.symbols = self.score + best, self.symbols + 1
                self.tokens.append((token, self.first + self.at))
                return token
            self.score, self.capped = self.score + blank, self.capped + (token != BLANK)
            self.at, self.symbols = self.at + 1, 0
        return BLANK


@torch.inference_mode()
def greedy_batch(model, mel, lengths, chunk=None, limits=LIMITS):
    """mel (B, F, 80) padded, lengths (B,) in mel frames -> (ids, frames) of each, as streaming gives, but offline."""
    lengths = torch.as_tensor(lengths, device=mel.device)
    out, _ = model.encoder(mel, lengths=lengths, chunk=chunk)
    n_frames = (-(-lengths // model.config.subsampling)).tolist()
    searches = [Greedy(model, limits) for _ in n_frames]
    found = Greedy.advance(searches, model.joint.encoder_proj(out), True, n_frames)
    return [([token for token, _ in tokens], [frame for _, frame in tokens]) for tokens in found]


@dataclass
class Hypothesis:
    tokens: tuple  # since the last token that all hypotheses agree on
    frames: tuple  # the frame of each, counted from the start of the stream
    score: float   # log of the summed probability of the paths that write these tokens, as far as they were followed
    labels: Labels


class Beam:
    """Time-synchronous: the hypotheses stand at the same frame and go on together, once each has taken blank there.

    In one symbol step, every hypothesis that has not left the frame may leave it by blank or write any label. Those
    that left and those that wrote are pruned TOGETHER to the size of the beam, so a beam of one is greedy search.
    Paths that have written the same labels are one hypothesis and their probabilities add up.
    """

    def __init__(self, model, size, limits=LIMITS, hold=100):
        self.model, self.size, self.limits, self.hold = model, size, limits, hold
        self.hyps = [Hypothesis((), (), 0.0, Labels.read(model))]
        self.at = self.capped = self.score = 0

    @staticmethod
    def advance(searches, frames, last):
        """frames (B, T, J) -> the tokens of each stream that are certain now, as [(token, frame)]."""
        for search, own in zip(searches, frames):
            for t, frame in enumerate(own):
                search.one_frame(frame, search.limits[last and t == len(own) - 1])
        return [search.certain(last) for search in searches]

    def one_frame(self, frame, limit):
        active, left = self.hyps, {}  # left: by tokens, those that took blank
        for symbols in range(limit + 1):
            labels = torch.cat([hyp.labels.proj for hyp in active])                             # (A, J)
            log_probs = self.model.joint.combine(frame, labels).log_softmax(-1)                 # (A, V)
            for hyp, blank in zip(active, log_probs[:, BLANK].tolist()):
                hyp = replace(hyp, score=hyp.score + blank)
                if twin := left.get(hyp.tokens):  # the times are those of the more probable one
                    first = max(twin, hyp, key=lambda h: h.score)
                    hyp = replace(first, score=float(np.logaddexp(twin.score, hyp.score)))
                left[hyp.tokens] = hyp
            if symbols == limit:
                self.capped += log_probs[0].argmax().item() != BLANK
                break
            active, left = self.prune(active, log_probs, left)
            if not active:
                break
        self.hyps = sorted(left.values(), key=lambda hyp: -hyp.score)[:self.size]
        self.at, self.score = self.at + 1, self.hyps[0].score

    def prune(self, active, log_probs, left):
        """The best of those that left and of every active one with every label -> what is active and left now."""
        scores = log_probs.double() + log_probs.new_tensor([hyp.score for hyp in active], dtype=torch.double)[:, None]
        scores, n = scores[:, BLANK + 1:], scores.shape[1] - 1  # labels only
        best, index = scores.flatten().topk(min(self.size, scores.numel()))
        pool = [(hyp.score, hyp, BLANK) for hyp in left.values()]
        pool += [(score, active[k // n], k % n + BLANK + 1) for score, k in zip(best.tolist(), index.tolist())]
        pool = sorted(pool, key=lambda entry: -entry[0])[:self.size]
        left = {hyp.tokens: hyp for _, hyp, token in pool if token == BLANK}
        grown = [entry for entry in pool if entry[2] != BLANK]
        if not grown:
            return [], left
        labels = Labels.join([hyp.labels for _, hyp, _ in grown])
        labels = Labels.read(self.model, torch.tensor([[token] for *_, token in grown]), labels.state)
        return [Hypothesis(hyp.tokens + (token,), hyp.frames + (self.at,), score, labels.select(slice(k, k + 1)))
                for k, (score, hyp, token) in enumerate(grown)], left

    def certain(self, last):
        """Tokens that all hypotheses share can be shown. Where they differ for `hold` tokens, the best one is right."""
        best = self.hyps[0].tokens
        decided = len(best) if last else max(0, len(best) - self.hold)
        self.hyps = [hyp for hyp in self.hyps if hyp.tokens[:decided] == best[:decided]][:1 if last else None]
        n = len(os.path.commonprefix([hyp.tokens for hyp in self.hyps]))  # works on any sequences
        tokens = list(zip(best[:n], self.hyps[0].frames[:n]))
        self.hyps = [replace(hyp, tokens=hyp.tokens[n:], frames=hyp.frames[n:]) for hyp in self.hyps]
        return tokens


# ---- Audio and captions ---------------------------------------------------------------------------------------------

class AudioError(ValueError):
    """Audio that cannot be used; the message names the file."""


def read_audio(path, start=0.0, duration=None):
    """A file, or a piece of it in seconds -> float32 samples (N,), mono, 16 kHz. Channels are averaged."""
    import soundfile
    try:
        with open(path, "rb") as raw, soundfile.SoundFile(raw) as file:
            rate, first = file.samplerate, round(start * file.samplerate)
            wanted = file.frames - first if duration is None else round(duration * rate)
            if wanted <= 0 or first + wanted > file.frames + rate // 20:  # manifests may round
                raise AudioError(f"{path}: {file.frames / rate:.2f} s long, not {duration or 'more'} from {start} on")
            file.seek(first)
            samples = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
            cut = re.search(r"lacks an end-of-stream|data : [1-9]\d{,8} \(should be", file.extra_info)  # its log
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError(f"{path}: not a readable audio file ({error})") from None
    if len(samples) < wanted - rate // 20 or cut and duration is None:
        raise AudioError(f"{path}: cut off, {len(samples) / rate:.2f} s could be read")
    if bad := np.count_nonzero(~np.isfinite(samples)):
        raise AudioError(f"{path}: {bad} of {len(samples)} samples are NaN or infinite")
    if not samples.any():
        raise AudioError(f"{path}: silent, all {len(samples)} samples are zero")
    if (clipped := np.mean(np.abs(samples) >= 0.999)) > 0.1:
        raise AudioError(f"{path}: clipped, {clipped:.0%} of the samples lie at full scale or beyond")
    return samples if rate == SAMPLE_RATE else resample(samples, rate, SAMPLE_RATE)


def resample(samples, rate, to, crossings=32):
    """Band-limited interpolation: a windowed sinc, one short filter for each of the phases that the ratio has."""
    up, down = to // math.gcd(rate, to), rate // math.gcd(rate, to)
    cutoff = 0.95 * min(1.0, up / down)  # as a part of the half sampling rate of the input
    half = math.ceil(crossings / cutoff)
    out = np.zeros(math.ceil(len(samples) * up / down), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, half), 2 * half)
    for phase in range(min(up, len(out))):
        base, rest = divmod(phase * down, up)  # output sample `phase` lies at base + rest / up of the input
        at = np.arange(1 - half, half + 1) - rest / up
        kernel = cutoff * np.sinc(cutoff * at) * np.cos(np.pi * np.clip(at / (2 * half), -0.5, 0.5)) ** 2
        out[phase::up] = windows[base + 1::down][:len(out[phase::up])] @ kernel.astype(np.float32)
    return out


def packets(source, realtime):
    """The audio of a file, or 16-bit PCM from standard input as it comes."""
    if source == "-":
        rest, received, heard = b"", 0, False
        while data := sys.stdin.buffer.read1(4096):
            data = rest + data
            rest = data[len(data) // 2 * 2:]  # half a sample waits for its other half
            samples = np.frombuffer(data[:len(data) // 2 * 2], "<i2").astype(np.float32) / 32768
            received, heard = received + len(samples), heard or samples.any()
            yield samples
        if not heard:
            raise AudioError(f"standard input: no sound, {received} samples and none but zeros")
        return
    samples, began, size = read_audio(source), time.perf_counter(), SAMPLE_RATE // 10
    for start in range(0, len(samples), size):
        if realtime:
            time.sleep(max(0.0, began + min(start + size, len(samples)) / SAMPLE_RATE - time.perf_counter()))
        yield samples[start:start + size]


def show_json(words):
    for word in words:
        print(json.dumps(asdict(word), ensure_ascii=False), flush=True)


def show_lines(words):
    """Lines are only ever appended: one for each stream that has new words."""
    for tag in dict.fromkeys(word.stream for word in words):
        text = " ".join(word.text for word in words if word.stream == tag)
        print(f"{words[0].delay_ms / 1000:8.2f} s  {tag:8} {text}", flush=True)


class Terminal:
    """One line for each stream, growing in place. When one is full they all stay, and fresh ones begin below."""

    def __init__(self, tags):
        self.lines, self.drawn = dict.fromkeys(tags, ""), 0

    def __call__(self, words):
        width = os.get_terminal_size().columns - 9
        columns = lambda text: sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
                                   for c in text)
        for word in words:
            text = "".join(c if c.isprintable() else "\ufffd" for c in word.text)  # a model may write any byte
            if columns(f"{self.lines[word.stream]} {text}") > width and self.lines[word.stream]:
                self.lines, self.drawn = dict.fromkeys(self.lines, ""), 0
            self.lines[word.stream] += f" {text}"
            rows = (f"\x1b[2K\x1b[2m{tag:8}\x1b[0m{line[:width]}\n" for tag, line in self.lines.items())
            print(f"\x1b[{self.drawn}F" * (self.drawn > 0) + "".join(rows), end="", flush=True)  # F: so many lines up
            self.drawn = len(self.lines)


def caption(model, tokenizer, options):
    show = show_json if options.json else Terminal(tokenizer.tags) if sys.stdout.isatty() else show_lines
    streamer = Streamer(model, tokenizer, chunk=options.chunk, beam=options.beam)
    try:
        for packet in packets(options.audio, options.realtime):
            show(streamer.accept(packet))
    except KeyboardInterrupt:
        pass  # the usual end of a microphone: the last words of what was heard are still to come
    if streamer.received:
        show(streamer.flush())
    if streamer.search.capped:
        print(f"frames cut off at {LIMITS[0]} symbols (last: {LIMITS[1]}): {streamer.search.capped}", file=sys.stderr)


# ---- Evaluation: stream a set, then compare words and delays with the references -----------------------------------

def evaluate(model, tokenizer, items, *, chunk=None, beam=1, batch_size=16, progress=False, bootstrap=0):
    """items: [(row, samples)] -> (metrics by stream, one record by utterance). `batch_size` utterances are streamed in
    step; that changes no word and no delay, but computation-aware figures become those of a server with as many."""
    training, records, starts = model.training, [], range(0, len(items), batch_size)
    if progress:
        from tqdm import tqdm
        starts = tqdm(starts, desc="evaluating", leave=False)
    model.eval()
    for start in starts:
        group, began = items[start:start + batch_size], time.perf_counter()
        streamers = [Streamer(model, tokenizer, chunk=chunk, beam=beam) for _ in group]
        for streamer, (_, samples) in zip(streamers, group):
            streamer.push(samples)
            streamer.closed = True
        for (row, samples), streamer, words in zip(group, streamers, advance(streamers)):
            texts = {"<asr>": row.asr, **{f"<st:{lang}>": text for lang, text in row.st.items()}}
            references = {tag: text.split() for tag, text in texts.items() if text is not None}
            records.append({"id": row.id, "audio": row.audio, "duration_ms": len(samples) / PER_MS, "words": words,
                            "references": references, "score": streamer.search.score,
                            "capped": streamer.search.capped, "seconds": (time.perf_counter() - began) / len(group)})
    model.train(training)
    return summarise(records, tokenizer.tags, bootstrap), records


def summarise(records, tags, bootstrap=0):
    """Metrics by stream, flat and plain; with `bootstrap` draws of the utterances, name_95 are 95 % intervals."""
    rows = {tag: [record for record in records if tag in record["references"]] for tag in tags}
    return {tag: _score(rows[tag], tag, bootstrap) for tag in tags if rows[tag]}


def _score(rows, tag, bootstrap):
    references = [row["references"][tag] for row in rows]
    words = [[word for word in row["words"] if word.stream == tag] for row in rows]
    texts = [[word.text for word in own] for own in words]
    metrics = {"utterances": len(rows), "silent": sum(not own for own in words)}
    def ratio(name, above, below):  # of two sums over the utterances
        above, below = np.array(above, float), np.array(below, float)
        metrics[name] = float(above.sum() / below.sum()) if below.sum() else None
        if bootstrap and metrics[name] is not None:
            drawn = np.random.default_rng(0).integers(len(above), size=(bootstrap, len(above)))
            values = above[drawn].sum(1) / np.maximum(below[drawn].sum(1), 1e-9)
            metrics[f"{name}_95"] = np.quantile(values, [0.025, 0.975]).tolist()

    plain = lambda words: "".join(c for c in " ".join(words).lower() if unicodedata.category(c)[0] != "P").split()
    for suffix, clean in (("", list), ("_norm", plain)):  # norm: lower-cased, without punctuation
        pairs = [(clean(ref), clean(hyp)) for ref, hyp in zip(references, texts)]
        for name, unit in (("wer", list), ("cer", " ".join)):
            ratio(name + suffix, [100 * edit_distance(unit(ref), unit(hyp)) for ref, hyp in pairs],
                  [len(unit(ref)) for ref, _ in pairs])
    metrics |= sacre([" ".join(hyp) for hyp in texts], [" ".join(ref) for ref in references], bootstrap)
    for suffix, field_name in (("", "delay_ms"), ("_ca", "elapsed_ms")):  # ca: computation-aware
        lags = [latency([getattr(word, field_name) for word in own], row["duration_ms"], len(ref))
                for row, own, ref in zip(rows, words, references) if own]  # the silent ones are counted above
        for name, lag in zip(("al", "laal"), zip(*lags) if lags else ([], [])):
            ratio(f"{name}{suffix}_ms", lag, [1] * len(lag))
    ratio("real_time_factor", [row["seconds"] for row in rows], [row["duration_ms"] / 1000 for row in rows])
    return metrics


def edit_distance(a, b):
    """Levenshtein: row i of the table is cost[j] = min(above[j] + 1, above[j-1] + (a[i] != b[j-1]), cost[j-1] + 1).
    The last of these, along the row, is a running minimum of cost[j] - j: a row is a few vector operations."""
    number = {item: k for k, item in enumerate(dict.fromkeys([*a, *b]))}
    codes, steps = np.array([number[item] for item in b], int), np.arange(len(b) + 1)
    cost = steps
    for item in a:
        row = cost + 1
        row[1:] = np.minimum(row[1:], cost[:-1] + (codes != number[item]))
        cost = np.minimum.accumulate(row - steps) + steps
    return int(cost[-1])


def latency(delays, source_ms, n_ref):
    """How far the words lag behind an ideal that spreads them evenly over the source: (AL, LAAL) in ms
    AL    1/tau * sum over i <= tau of d_i - (i - 1) S / n_ref,  tau the first word that needed the whole source
    LAAL  the same with max(n_hyp, n_ref), so that writing too much does not look fast
    """
    if delays[0] > source_ms:
        return delays[0], delays[0]
    tau = next((i + 1 for i, d in enumerate(delays) if d >= source_ms), len(delays))
    lag = lambda n: float(np.mean(np.array(delays[:tau]) - np.arange(tau) * source_ms / max(1, n)))
    return lag(n_ref), lag(max(len(delays), n_ref))


def sacre(hypotheses, references, bootstrap):
    """BLEU and chrF, with their signatures."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        print("BLEU and chrF are left out: pip install sacrebleu", file=sys.stderr)
        return {"bleu": None, "chrf": None}
    metrics = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        score = metric.corpus_score(hypotheses, [references])
        metrics |= {name: score.score, f"{name}_signature": str(metric.get_signature())}
        if bootstrap:  # its own intervals fail where a draw scores 0; a set's statistics are the sums of its sentences'
            sums = np.array(metric._extract_corpus_statistics(hypotheses, [references]))
            drawn = np.random.default_rng(0).integers(len(sums), size=(bootstrap, len(sums)))
            values = [metric._compute_score_from_stats(sums[some].sum(0).tolist()).score for some in drawn]
            metrics[f"{name}_95"] = np.quantile(values, [0.025, 0.975]).tolist()
    return metrics


def write_logs(folder, records, metrics):
    """All metrics, and a folder for each stream in the format of SimulEval, so that others can score it again."""
    for tag in metrics:
        path = Path(folder, tag.strip("<>").replace(":", "-"))
        path.mkdir(parents=True, exist_ok=True)
        with open(path / "instances.log", "w", encoding="utf-8") as file:
            for index, row in enumerate(row for row in records if tag in row["references"]):
                words = [word for word in row["words"] if word.stream == tag]
                entry = {"index": index, "prediction": " ".join(word.text for word in words),
                         "delays": [word.delay_ms for word in words], "elapsed": [word.elapsed_ms for word in words],
                         "prediction_length": len(words), "reference": " ".join(row["references"][tag]),
                         "source": [row["audio"]], "source_length": row["duration_ms"]}
                print(json.dumps(entry, ensure_ascii=False), file=file)
        (path / "config.yaml").write_text("source_type: speech\ntarget_type: text\n")
    Path(folder, "metrics.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")


def evaluation(model, tokenizer, options):
    items, rows = [], read_manifest(options.eval, allow_outside=options.allow_outside)
    for row in rows:
        try:
            items.append((row, read_audio(row.audio, row.start, row.duration)))
        except AudioError as error:
            print(f"{row.where}: skipped: {error}", file=sys.stderr)
    if not items:
        raise ValueError(f"{options.eval}: no row with usable audio")
    metrics, records = evaluate(model, tokenizer, items, chunk=options.chunk, beam=options.beam, batch_size=1,
                                progress=True, bootstrap=1000)
    for tag, figures in metrics.items():
        print(f"\n{tag}")
        for name, value in figures.items():
            if not isinstance(value, list):
                interval = "   95 %%: %.3f .. %.3f" % tuple(figures[f"{name}_95"]) if f"{name}_95" in figures else ""
                print(f"  {name:18} {f'{value:10.3f}' if isinstance(value, float) else value}{interval}")
    if options.log:
        write_logs(options.log, records, metrics)


def demonstration():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["la la la"], 262, tags=("<asr>", "<st:en>"))
    model = Transducer(replace(PRESETS["tiny"], vocab=len(tokenizer))).eval()
    samples = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE + 123).astype(np.float32)
    results = set()
    for packet in (1, 700, 4000, len(samples)):
        streamer = Streamer(model, tokenizer, limits=(3, 10))
        words = [streamer.accept(samples[start:start + packet]) for start in range(0, len(samples), packet)]
        words = [replace(word, elapsed_ms=0) for some in [*words, streamer.flush()] for word in some]
        results.add(repr((streamer.search.score, words)))
        print(f"packets of {packet:6} samples: log-probability {streamer.search.score!r}, {len(words)} words")
    print("match" if len(results) == 1 else "NO MATCH")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="stream.py", description="Live captions of a file or of standard input.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="model.pt of a run; without it, a demonstration")
    add("audio", nargs="?", help="an audio file; - reads 16-bit mono PCM at 16 kHz from standard input")
    add("--chunk", type=int, help="encoder frames per chunk (default: the model's first; 0: everything at the end)")
    add("--beam", type=int, default=1, help="hypotheses in beam search (default 1: greedy)")
    add("--json", action="store_true", help="one line of JSON for each word")
    add("--realtime", action="store_true", help="play a file at its own pace")
    add("--eval", metavar="MANIFEST", help="stream all of a manifest and compare with its texts")
    add("--log", metavar="DIR", help="with --eval: write metrics.json and SimulEval logs there")
    add("--allow-outside", action="store_true", help="with --eval: audio may lie outside the manifest's folder")
    add("--device", default="cpu")
    options = parser.parse_args(argv)
    if not options.checkpoint:
        return demonstration()
    if bool(options.audio) == bool(options.eval):
        parser.error("give an audio file, - for standard input, or --eval MANIFEST")
    torch.set_num_threads(1)  # a chunk is too little work to share
    try:
        model, beside = load(options.checkpoint, map_location=options.device)
        tokenizer = Tokenizer.from_dict(beside.get("tokenizer"))
        (evaluation if options.eval else caption)(model, tokenizer, options)
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"stream.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
