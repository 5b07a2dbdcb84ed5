"""Audio in, words out: the streaming loop, greedy and beam search, captions, and how good and how late the words are.

A stream is cut into chunks of C encoder frames. When the samples of one more chunk are there, it goes

    samples -> log-mel -> encoder (keys and values of earlier chunks are cached) -> search -> tokens -> words

and less than a chunk waits. So the same computations run on the same shapes however the audio is cut into packets, and
the result is the same to the last bit. `step` is the whole loop; searches, audio files and captions follow, and
measuring comes last. The network is model.py's, turning tokens into words serialize.py's. `python stream.py MODEL FILE`
prints captions, with `--eval MANIFEST` error rates and latency; alone, it shows that packets do not matter.
"""
import argparse
import io
import json
import math
import os
import queue
import re
import shlex
import stat
import sys
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from model import (HOP, PRESETS, SAMPLE_RATE, WINDOW, InputError, State, Transducer, load,
                   log_mel)
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
        """Samples (N,) at 16 kHz, float in -1..1 or int16, any number -> the words they finish."""
        self.push(samples)
        return advance([self])[0]

    def flush(self):
        """The audio has ended: run what is left of it and release every word."""
        self.closed = True
        return advance([self])[0]

    def push(self, samples):
        samples = np.asarray(samples)
        if samples.dtype == np.int16:
            samples = samples / np.float32(32768)
        if samples.dtype.kind != "f":
            raise ValueError(f"samples must be float in -1..1, or int16, not {samples.dtype}")
        samples = samples.astype(np.float32, copy=False)
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


# ---- Sound: files -------------------------------------------------------------------------------

# A file is read if it can be shown to be whole: its container says how much sound it holds, and
# that much is there. Anything else is refused, in one line with the ffmpeg command that hands it
# over.
CONTAINERS = ("WAV", "WAVEX", "RF64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3")
CHUNKED = CONTAINERS[:5]  # other things may follow the sound; libsndfile has looked through them
UNKNOWN = 1 << 62         # libsndfile gives more frames than that where a header states no number
DENSEST = 8192            # samples in a byte: more than FLAC or Opus makes of silence
CUT_OFF = re.compile(  # what libsndfile notes about a file that ends before its sound does
    r"(?:data|SSND|Data Size) *: (\d+) \(should be"
    r"|(lacks an end-of-stream|Junk after|from 'ds64' chunk)")
RATES, MOST_CHANNELS = (4000, 200_000), 64

KINDS = {  # first bytes (a regular expression) -> what that is
    rb"RIFF....WAVE|RIFX|RF64": "WAV", rb"FORM....AIF": "AIFF", rb"caff": "CAF", rb"\.snd": "AU",
    rb"fLaC": "FLAC", rb"OggS": "Ogg", rb"ID3": "MP3", rb"....ftyp": "MPEG-4 (m4a, mp4, mov)",
    rb"\x30\x26\xb2\x75": "Windows Media (wma, asf)", rb"\x1a\x45\xdf\xa3": "Matroska or WebM",
    rb"#!AMR": "AMR"}
SYNC_WORDS = {rb"\xff[\xf0\xf1\xf8\xf9]": "AAC", rb"\x0b\x77": "AC-3"}  # PCM may begin so as well


class AudioError(InputError):
    """Sound that cannot be used: one line, in printable characters, that names the file."""
    def __init__(self, message):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def refusal(path, reason):
    """The AudioError that also says how to hand over the sound of about any file."""
    return AudioError(f"{path}: {reason}; try: {piped('-i ' + shlex.quote(str(path)))}")


def piped(source):
    """The command that decodes what ffmpeg's options name, and captions it."""
    return (f"ffmpeg -loglevel error {source} -f s16le -ac 1 -ar {SAMPLE_RATE} - | "
            "python stream.py MODEL -")


def kind_of(head, kinds):
    """The name of what begins with these bytes, or None."""
    return next((name for magic, name in kinds.items() if re.match(magic, head, re.DOTALL)), None)


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
        blocks = stored_blocks(path, start, duration, file, *ends)
        blocks = checked(path, one_channel(path, rate, blocks))
        yield from blocks if rate == SAMPLE_RATE else resampled(blocks, rate)


class RawFile(io.BufferedReader):
    """The bytes of a file. A damaged header sends libsndfile to impossible places: it stays put."""
    def seek(self, *place):
        try:
            return super().seek(*place)
        except (OSError, OverflowError):
            return self.tell()


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
            size, head = os.fstat(raw.fileno()).st_size, raw.read(16)
            begin, end = between_tags(raw, size)
            stated = info_frame(raw, begin)
            if stated and not 0.99 * stated <= end - begin <= 1.01 * stated:
                raise refusal(path, f"cut off or joined: its Info frame states {stated} bytes, "
                                    f"{end - begin} are there")
            raw.seek(0)
            with soundfile.SoundFile(raw) as file:
                unstated = file.frames > UNKNOWN or file.format == "MP3" and not stated
                promised = None if unstated else file.frames
                if fault := fault_of_header(file, size, promised):
                    raise refusal(path, fault)
                yield file, promised, lambda: (end - raw.tell()) / max(1, raw.tell() - begin)
    except soundfile.LibsndfileError as error:
        what = "no format of sound that is known here (raw samples? give ffmpeg their -f, -ar, -ac)"
        if kind := kind_of(head, KINDS | SYNC_WORDS):
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
    if footer[:8] == b"APETAGEX":  # its length counts the footer; bit 31 of the flags: a header too
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
    first = min(round(start * rate), file.frames)
    end = math.inf if duration is None else first + round(duration * rate)
    try:
        if first and file.seekable():
            at = file.seek(first)
        # soundfile would set a seekable file after each block to where it stands already. That
        # tears the bits that MP3 frames share, and fails in a FLAC of unknown length.
        file.seekable = lambda: False
        while at < end:
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
    if at <= first or duration is not None and at < end - rate // 20:  # manifests may round
        wanted = "more" if duration is None else f"{duration} s"
        raise AudioError(f"{path}: {at / rate:.2f} s long, not {wanted} from {start} s on")
    if duration is None:
        unread_s = 0 if file.format in CHUNKED else left() * at / rate
        if promised and at < promised - rate // 20:
            raise refusal(path, f"cut off, {at / rate:.2f} s of {promised / rate:.2f} are there")
        if unread_s > 0.25:
            raise refusal(path, f"goes on after {at / rate:.2f} s for about {unread_s:.2f} s that "
                                "libsndfile does not reach")


def one_channel(path, rate, blocks):
    """Blocks (N, C) -> (N,): the mean of the channels, or the loudest if the mean would lose sound.

    This is decided once, by the first ten seconds with sound."""
    weights, head, failure = None, [], None
    try:
        for block in blocks:
            if weights is not None:
                yield block @ weights
            elif block.shape[1] == 1 or not head and not block.any():
                yield block[:, 0]  # the only one, or silence in all of them
            else:
                head.append(block)
            if weights is None and sum(map(len, head)) >= 10 * rate:
                weights = mixing_weights(path, np.concatenate(head))
                yield from (block @ weights for block in head)
    except AudioError as error:  # what was there before it is still to be heard
        failure = error
    if weights is None and head:
        weights = mixing_weights(path, np.concatenate(head))
        yield from (block @ weights for block in head)
    if failure:
        raise failure


def mixing_weights(path, head):
    """head (N, C) -> weights (C,) that sum to 1.

    If one of C channels alone has sound, the mean has 1 / C^2 of its power; with C different
    voices, 1 / C; where channels cancel, less than either."""
    head, channels = head.astype(np.float64), head.shape[1]
    power, powers = np.square(head.mean(1)).mean(), np.square(head).mean(0)
    if power < 1.2 / channels ** 2 * powers.max():
        best = int(powers.argmax())
        print(AudioError(f"{path}: channel {best + 1} of {channels} is taken; the others are "
                         "silent, or cancel it"), file=sys.stderr)
        return np.eye(channels, dtype=np.float32)[best]
    return np.full(channels, 1 / channels, np.float32)


def checked(path, blocks):
    """The same blocks; AudioError at the end for silence or clipping."""
    n = clipped = 0
    heard = False
    for samples in blocks:
        n, heard = n + len(samples), heard or samples.any()
        clipped += np.count_nonzero(np.abs(samples) >= 0.999)
        yield samples
    if not heard:
        raise AudioError(f"{path}: silent, all {n} samples are zero")
    if clipped > 0.1 * n:
        raise AudioError(f"{path}: clipped, {clipped / n:.0%} of the samples are at full scale")


def readable(rows, strict=False):
    """Yield (row, samples) of the rows whose sound can be used; the others are named and left out.

    Raises InputError at the first bad row if `strict`, and at the end if there was no good one."""
    from tqdm import tqdm  # its write goes around a progress bar, if there is one
    n_rows = bad = 0
    for row in rows:
        n_rows += 1
        try:
            samples = read_audio(row.audio, row.start, row.duration)
        except InputError as error:
            if strict:
                raise InputError(f"{row.where}: {error}") from None
            tqdm.write(f"{row.where}: skipped: {error}", file=sys.stderr)
            bad += 1
            continue
        yield row, samples
    if bad == n_rows:
        raise InputError(f"none of the {n_rows} rows has sound that can be used")
    if bad:
        tqdm.write(f"{bad} of {n_rows} rows skipped", file=sys.stderr)


# ---- Sound: resampling --------------------------------------------------------------------------

class Resampler:
    """Band-limited interpolation by a windowed sinc, of samples that come in pieces of any size.

    Output n lies at input n down / up. It is a sum over the 2 half inputs around it, with weights
    that depend on the fraction of n down / up alone. `group` outputs in a row come from the same
    inputs, `length` of them: their weights are a matrix, and groups whose fractions agree share
    it."""

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
    kinds = -(-up // group)
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
    waiting, received, heard, known = b"", 0, False, False
    while (data := sys.stdin.buffer.read1(4096)) or not known:
        waiting += data
        if data and len(waiting) < 12 and not known:
            continue  # the first bytes of a file may be on their way
        if not known and (kind := kind_of(waiting, KINDS)):
            raise AudioError(f"standard input: {kind}, not 16-bit PCM; into: {piped('-i -')}")
        whole = len(waiting) // 2 * 2  # half a sample waits for its other half
        samples = np.frombuffer(waiting[:whole], "<i2").astype(np.float32) / 32768
        waiting, known = waiting[whole:], True
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
            yield from listen(device, arrived, rate)
    except (sounddevice.PortAudioError, ValueError) as error:
        devices = "; ".join(str(sounddevice.query_devices()).splitlines()) or "none"
        raise AudioError(f"mic: {error}; devices: {devices}; or: {WITHOUT}") from None
    raise AudioError("mic: the device has stopped")


def listen(device, arrived, rate):
    """Packets of a running device; what goes wrong is told on standard error and survived."""
    resampler = Resampler(rate)
    listening, zeros = False, 0
    while device.active or not arrived.empty():
        try:
            block, overflow = arrived.get(timeout=STALLED_S)
        except queue.Empty:
            print(f"mic: nothing has come for {STALLED_S:g} s", file=sys.stderr)
            continue
        if not listening:
            print(f"listening at {rate} Hz, until Ctrl-C", file=sys.stderr)
            listening = True
        if overflow:
            print("mic: some sound was lost, the computer is too slow", file=sys.stderr)
        before, zeros = zeros, 0 if block.any() else zeros + len(block)
        if before < STALLED_S * rate <= zeros:
            print(f"mic: nothing but zeros for {STALLED_S:g} s: muted, or not allowed to listen?",
                  file=sys.stderr)
        yield resampler.feed(block)


# ---- Captions -----------------------------------------------------------------------------------

def load_run(path, device="cpu"):
    """model.pt of a run -> (model, tokenizer, what else lies beside them). Raises InputError."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used: {reason}") from None
    model, beside = load(path, map_location=device)
    try:
        tokenizer = Tokenizer.from_dict(beside["tokenizer"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: a damaged checkpoint, no usable tokenizer ({reason})") from None
    if len(tokenizer) != model.config.vocab:
        raise InputError(f"{path}: a damaged checkpoint, its tokenizer has {len(tokenizer)} "
                         f"tokens, its model {model.config.vocab}")
    return model, tokenizer, beside


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
    streamer, failure = Streamer(model, tokenizer, chunk=options.chunk, beam=options.beam), None
    try:
        for packet in packets(options.audio, options.realtime):
            show(streamer.accept(packet))
    except KeyboardInterrupt:
        pass  # the usual end of a microphone: the last words of what was heard are still to come
    except AudioError as error:
        failure = error  # told after the words of what was heard
    if streamer.received:
        show(streamer.flush())
    if streamer.search.capped:
        print(f"frames cut off at {LIMITS[0]} symbols (last: {LIMITS[1]}): {streamer.search.capped}", file=sys.stderr)
    if failure:
        raise failure


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
    add("audio", nargs="?", help="an audio file; -: 16-bit mono PCM at 16 kHz from standard input; "
        "mic: the microphone (a file of that name is ./mic)")
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
        parser.error("give an audio file, - for standard input, mic, or --eval MANIFEST")
    torch.set_num_threads(1)  # a chunk is too little work to share
    try:
        if sys.stdout is None:
            raise InputError("standard output is closed")
        model, tokenizer, _ = load_run(options.checkpoint, options.device)
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
