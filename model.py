"""The network: from waveform to logits, for a whole recording at once or chunk by chunk.

    waveform -> log-mel -> strided convolutions -> chunked Transformer --\\
                                                                          joint -> logits
    labels written so far ----------------------> label encoder ---------/

From log-mel to logits it is `Transducer.forward`: a Transformer-Transducer (arXiv 2002.02562), that
is, the RNN transducer of Graves (arXiv 1211.3711) with attention in both encoders. Our names, and
the field's:

    label encoder    prediction network, predictor, decoder: what comes next, by the labels so far
    joint            joint network, joiner
    distance bias    relative position bias (T5, arXiv 1910.10683)
    chunk mask       chunked attention (arXiv 2010.11395; U2, arXiv 2012.05481)

The encoder hears in chunks of C frames. A frame sees all of its own chunk and the `left` chunks
before it, in every layer, so the look-ahead is at most C - 1 frames however deep the network is
(for C = 0 the chunk is the whole recording). The memory that the past takes is bounded too: the
keys and values of the last left * C frames, and the last inputs of the convolutions. Training and
offline use give the whole recording in one call, where a mask says who sees whom; streaming gives
one chunk per call together with the state of the call before. Both run the same lines of code
(`Stack.forward`), and a test holds their outputs against each other.

What this file does not do: losses (rnnt_loss.py), search and audio files (stream.py), text
(serialize.py).

    python model.py         the presets: parameters, chunk lengths, and a drawing of the mask
"""

import math
import os
import pickle
import sys
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLE_RATE = 16000
WINDOW = 400  # samples in a mel frame: 25 ms
HOP = 160     # samples from one mel frame to the next: 10 ms
FFT = 512
FLOOR = 1e-5  # power of a mel band; noise of one step of 16-bit sound lies 10 to 20 dB below
MASKED = -3e4  # added to a score that must not count: exp() makes it 0, and it is finite in float16
LONGEST_CHUNK = 4096  # frames; more is not streaming, and its memory of the past would be huge
MOST_MELS = 126  # with FFT points at 16 kHz

CHECKPOINT_FORMAT = "joint-streaming-transducer"
CHECKPOINT_VERSION = 2


class InputError(ValueError):
    """What a user gave cannot be used; the message is one line and names it."""


# ---- Options -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    vocab: int               # V, blank (0) included
    dim: int                 # D
    heads: int               # H
    layers: int
    ff: int                  # hidden width of the encoder's feed-forward part
    subsampling: int         # mel frames per encoder frame: 2, 4 or 8
    chunks: tuple[int, ...]  # chunk sizes C in frames, the default first; 0: the whole utterance
    left_frames: int         # how far back a frame sees in each layer; rounded up to whole chunks
    dropout: float
    label_encoder: str       # "transformer" or "lstm"
    label_layers: int
    label_context: int       # labels that a layer of a "transformer" sees, the last one included
    joint_dim: int
    ctc_vocab: int = 0       # classes of the auxiliary CTC head on the encoder; 0: no head
    n_mels: int = 80
    max_distance: int = 64   # relative positions further apart than this share one bias
    kernel: int = 0          # frames under the encoder's depthwise convolutions; 0: none
    floor: float = FLOOR     # smallest power of a mel band

    def __post_init__(self):
        for field in fields(self):
            value, may_be_zero = getattr(self, field.name), field.name in MAY_BE_ZERO
            if field.type is int and (type(value) is not int or value < 1 - may_be_zero):
                raise InputError(f"{field.name} {value!r} must be a whole number, 0 or more"
                                 if may_be_zero else
                                 f"{field.name} must be a positive whole number, not {value!r}")
            if field.type is float and type(value) not in (int, float):
                raise InputError(f"{field.name} must be a number, not {value!r}")
        for right, message in (
                (self.dim % self.heads == 0,
                 f"dim {self.dim} is not divisible by heads {self.heads}"),
                (self.subsampling in (2, 4, 8),
                 f"subsampling must be 2, 4 or 8, not {self.subsampling!r}"),
                (type(self.chunks) is tuple and self.chunks and all(map(_is_chunk, self.chunks)),
                 f"chunks must be one or more numbers of frames up to {LONGEST_CHUNK}, "
                 f"0 for the whole utterance, not {self.chunks!r}"),
                (self.left_frames <= LONGEST_CHUNK,
                 f"left_frames {self.left_frames} is more than {LONGEST_CHUNK}"),
                (self.label_context <= LONGEST_CHUNK,
                 f"label_context {self.label_context} is more than {LONGEST_CHUNK}"),
                (self.n_mels <= MOST_MELS,
                 f"n_mels {self.n_mels} is more than {MOST_MELS}: some bands would lie between two "
                 "frequencies of the spectrum and hear nothing"),
                (self.kernel == 0 or self.kernel % 2 == 1,
                 f"kernel must be odd, or 0 for no convolution, not {self.kernel}"),
                (0 <= self.dropout < 1, f"dropout must lie in [0, 1), not {self.dropout!r}"),
                (0 < self.floor < 1, f"floor must lie in (0, 1), not {self.floor!r}"),
                (self.label_encoder in ("transformer", "lstm"),
                 f'label_encoder must be "transformer" or "lstm", not {self.label_encoder!r}')):
            if not right:
                raise InputError(message)

    @property
    def frame_s(self) -> float:
        return HOP * self.subsampling / SAMPLE_RATE

    def frames(self, n_samples: int) -> int:
        return max(1, -(-n_samples // (HOP * self.subsampling)))

    def left_chunks(self, chunk: int) -> int:
        if not _is_chunk(chunk):
            raise InputError(f"a chunk is a whole number from 1 to {LONGEST_CHUNK} frames (0: the "
                             f"whole utterance), not {chunk!r}")
        return -(-self.left_frames // chunk) if chunk else 0


MAY_BE_ZERO = ("left_frames", "ctc_vocab", "kernel")


def _is_chunk(value):
    return type(value) is int and 0 <= value <= LONGEST_CHUNK


PRESETS = {
    "tiny": Config(vocab=512, dim=144, heads=4, layers=4, ff=576, subsampling=4, kernel=15,
                   chunks=(16, 8, 32), left_frames=64, dropout=0.1,
                   label_encoder="transformer", label_layers=2, label_context=64, joint_dim=144),
    "small": Config(vocab=1024, dim=256, heads=4, layers=12, ff=1024, subsampling=4,
                    chunks=(8, 4, 16, 32), left_frames=128, dropout=0.1,
                    label_encoder="transformer", label_layers=2, label_context=64, joint_dim=320),
    "paper": Config(vocab=4096, dim=512, heads=8, layers=24, ff=4096, subsampling=4,
                    chunks=(25,), left_frames=450, dropout=0.1,
                    label_encoder="transformer", label_layers=2, label_context=64, joint_dim=640),
}


# ---- Features ----------------------------------------------------------------------------------

@lru_cache(maxsize=None)
@torch.inference_mode(False)
def _window_and_bands(n_mels, dtype, device):
    """Hann window (WINDOW,) and triangular mel filters (FFT // 2 + 1, n_mels), 20 Hz to 8 kHz. As
    they are kept, they must not be inference tensors, in which no gradient flows."""
    def mel(hz):
        return 1127 * math.log1p(hz / 700)
    edges = torch.linspace(mel(20.0), mel(SAMPLE_RATE / 2), n_mels + 2, dtype=torch.float64)
    hz = torch.arange(FFT // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / FFT
    bins = 1127 * torch.log1p(hz / 700)
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bands = torch.minimum(rise, fall).clamp(min=0)
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)
    return window.to(device, dtype), bands.to(device, dtype)


def log_mel(samples: Tensor, n_mels: int = 80, floor: float = FLOOR) -> Tensor:
    """(N,) or (B, N) in -1..1 -> (F, n_mels) or (B, F, n_mels): log of the power in each band.

    Frame k is made of samples [160 k, 160 k + 400) and nothing else: no centring, no padding, no
    statistics of the utterance; any of those would let a frame see the future. Powers below
    `floor` count as `floor`, so that digital silence is like a quiet room and not like nothing
    that was ever recorded. Computed in the samples' type, under autocast too. Raises InputError for
    samples that are not float32 or float64.
    """
    if samples.dtype not in (torch.float32, torch.float64):
        raise InputError(f"samples must be float32 or float64 in -1..1, not {samples.dtype}")
    window, bands = _window_and_bands(n_mels, samples.dtype, samples.device)
    if samples.shape[-1] < WINDOW:
        return samples.new_zeros(*samples.shape[:-1], 0, n_mels)
    spectrum = torch.fft.rfft(samples.unfold(-1, WINDOW, HOP) * window, n=FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    with torch.autocast(samples.device.type, enabled=False):   # bfloat16 would be too coarse
        return (power @ bands).clamp(min=floor).log()


def pad_samples(samples: Tensor, subsampling: int) -> Tensor:
    """Zeros at the end, so that log_mel gives exactly T * subsampling frames,
    T = max(1, ceil(N / (160 * subsampling)))."""
    n = samples.shape[-1]
    frames = max(1, -(-n // (HOP * subsampling))) * subsampling
    return F.pad(samples, (0, HOP * frames + WINDOW - HOP - n))


def features(samples: Tensor, config: Config) -> Tensor:
    """Samples (..., N) of a whole recording -> log-mel (..., T * subsampling, n_mels), padded as
    the streaming search pads it."""
    return log_mel(pad_samples(samples, config.subsampling), config.n_mels, config.floor)


# ---- State -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class State:
    """What a batch of streams remembers between two calls. The first dimension of every tensor is
    the stream, so that streams can be taken out of a batch and put together into one. The shapes
    never change."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def select(self, rows) -> "State":
        """The state of some streams of the batch; rows is an index tensor, a list or a slice."""
        return replace(self, **{name: tensor[rows] for name, tensor in self.tensors().items()})

    @staticmethod
    def join(states: list["State"]) -> "State":
        """One batch out of several."""
        first, *others = states
        if not others:
            return first
        return replace(first, **{name: torch.cat([getattr(state, name) for state in states])
                                 for name in first.tensors()})


@dataclass(frozen=True)
class StackState(State):
    keys: Tensor           # (B, layers, H, past, D / H)
    values: Tensor         # (B, layers, H, past, D / H)
    filled: Tensor         # (B,) how many of the past frames are real, the last ones
    bias: Tensor           # (B, H, C, past + C) of a whole chunk, as the stream began: Stack.bias
    inputs: Tensor | None  # (B, layers, kernel - 1, D) the last inputs of the convolutions

    def layer(self, i):
        inputs = None if self.inputs is None else self.inputs[:, i]
        return self.keys[:, i], self.values[:, i], inputs


@dataclass(frozen=True)
class EncoderState(StackState):
    tails: Tensor  # (B, widths of all strided convolutions) the last input frame of each
    chunk: int     # C, frames per call


@dataclass(frozen=True)
class LSTMState(State):
    hidden: Tensor  # (B, layers, D)
    cell: Tensor    # (B, layers, D)


# ---- Transformer -------------------------------------------------------------------------------

class Convolution(nn.Module):
    """Depthwise convolution over time (Conformer, arXiv 2005.08100) that stays in the chunk.

    Half of the channels are causal: their `kernel` taps end at the frame itself. The taps of the
    others are centred on it, and those that would lie beyond the end of its chunk see zeros
    (dynamic chunk convolution, arXiv 2304.09325). So a frame in the middle of a chunk hears up to
    (kernel - 1) / 2 frames that are there anyway, and no frame waits for the next chunk.
    """

    def __init__(self, dim, kernel, dropout):
        super().__init__()
        self.n_past, self.ahead = kernel - 1, kernel // 2
        self.norm, self.gate = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv2d(dim, dim, (1, kernel), groups=dim)
        self.middle_norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, chunk, past=None, real=None):
        """x (B, Q, D); past (B, kernel - 1, D): the inputs before, None at the start; real
        (B, Q, 1): False where a frame is padding. -> (B, Q, D), the last kernel - 1 inputs."""
        B, Q, D = x.shape
        inputs = F.glu(self.gate(self.norm(x)))
        if real is not None:
            inputs = inputs.masked_fill(~real, 0)
        if past is None:
            past = x.new_zeros(B, self.n_past, D)
        inputs = torch.cat([past, inputs], 1)
        # All chunks at once, a chunk with what lies before it being a row of a picture (B, D, n, .)
        # whose channels lie next to each other in memory: as x has them, and fast.
        windows = F.pad(inputs, (0, 0, 0, -Q % chunk)).unfold(1, self.n_past + chunk, chunk)
        causal, centred = windows.transpose(1, 2).chunk(2, 1)
        windows = torch.cat([causal, F.pad(centred[..., self.ahead:], (0, self.ahead))], 1)
        y = self.depthwise(windows.contiguous(memory_format=torch.channels_last))  # (B, D, n, C)
        y = y.permute(0, 2, 3, 1).reshape(B, -1, D)[:, :Q]
        return x + self.dropout(self.out(F.silu(self.middle_norm(y)))), inputs[:, Q:]


class Block(nn.Module):
    """One layer: attention, convolution if there is one, feed-forward; each behind a norm
    (pre-norm, arXiv 2002.04745) and added to what it reads."""

    def __init__(self, dim, heads, ff, dropout, kernel):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.convolution = Convolution(dim, kernel, dropout) if kernel else None
        self.ff1, self.ff2 = nn.Linear(dim, ff), nn.Linear(ff, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, bias, chunk, real=None, past=(None, None, None)):
        """x (B, Q, D); bias (1 or B, H, Q, K), added to the attention scores; past: keys, values
        and inputs of the convolution before x. -> x, and the same three with those of x."""
        keys, values, inputs = past
        x, keys, values = self.attend(x, bias, keys, values)
        if self.convolution:
            x, inputs = self.convolution(x, chunk, inputs, real)
        x = x + self.dropout(self.ff2(F.relu(self.ff1(self.norm2(x)))))
        return x, (keys, values, inputs)

    def attend(self, x, bias, past_keys, past_values):
        B, Q, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, Q, 3, self.heads, -1)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, Q, D / H) each
        if past_keys is not None:
            keys = torch.cat([past_keys, keys], 2)          # (B, H, K, D / H)
            values = torch.cat([past_values, values], 2)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.to(x.dtype))
        return x + self.dropout(self.out(seen.transpose(1, 2).reshape(B, Q, D))), keys, values


class Stack(nn.Module):
    """Transformer layers over frames or labels in chunks: the one attention path of this file."""

    def __init__(self, config, layers, ff, max_distance, kernel=0):
        super().__init__()
        self.max_distance = max_distance
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, ff, config.dropout, kernel)
                                    for _ in range(layers))
        self.norm = nn.LayerNorm(config.dim)
        # A bias per head and distance, query minus key, shared by the layers (relative position
        # bias). At first it falls with the distance, in some heads faster than in others (ALiBi,
        # arXiv 2108.12409).
        distance = torch.arange(-max_distance, max_distance + 1).abs()
        slope = 2.0 ** -torch.arange(1, config.heads + 1)
        self.distance_bias = nn.Parameter(-distance * slope[:, None])  # (H, 2 M + 1)
        for block in self.blocks:
            added = [block.out, block.ff2] + ([block.convolution.out] if kernel else [])
            for linear in added:  # many layers add up: keep their sum of the size of one
                std = (len(added) * layers * linear.in_features) ** -0.5
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def bias(self, queries, past, chunk, left):
        """What is added to the attention scores of `queries` frames, which begin a chunk, and
        `past` frames before them: (H, queries, past + queries), the distance's bias, and MASKED
        where a frame does not see another one. chunk: its frames; left: how many chunks before its
        own a frame sees."""
        device, M = self.distance_bias.device, self.max_distance
        key = torch.arange(-past, queries, device=device)
        query = torch.arange(queries, device=device)[:, None]
        distance = (query - key).clamp(-M, M)
        bias = torch.take_along_dim(self.distance_bias[:, None], distance[None] + M, 2)
        chunks_back = query // chunk - key // chunk  # the floor numbers the past chunks -1, -2 ..
        return bias.masked_fill((chunks_back < 0) | (chunks_back > left), MASKED)

    def forward(self, x, chunk, left, state=None, lengths=None):
        """x (B, Q, D) that begins at a chunk's first frame; chunk, left: as for `bias`, chunk 0 is
        all of x; state: the frames before; lengths (B,): how many of the Q are real. -> (B, Q, D),
        and what each layer knows of past and present: keys, values, inputs of the convolution."""
        Q, past = x.shape[1], 0 if state is None else state.keys.shape[3]
        chunk, real = chunk or Q, None
        position = torch.arange(-past, Q, device=x.device)
        if state is not None and Q <= state.bias.shape[2] and not torch.is_grad_enabled():
            bias = state.bias[:, :, :Q, :past + Q]   # (else it must have a gradient)
        else:
            bias = self.bias(Q, past, chunk, left)[None]
        if state is not None:
            unfilled = position < -state.filled[:, None]
            bias = bias.masked_fill(unfilled[:, None, None], MASKED)
        if lengths is not None:
            real = position < lengths.to(x.device)[:, None]
            bias = bias.masked_fill(~real[:, None, None], MASKED)
            real = real[:, past:, None]
        memory = []
        for i, block in enumerate(self.blocks):
            x, after = block(x, bias, chunk, real, (None,) * 3 if state is None else state.layer(i))
            memory.append(after)
        return self.norm(x), memory


def remember(memory, filled, past):
    """The fields of a StackState after `memory`, which Stack.forward returned: the last `past`
    frames, with zeros in front where there are fewer."""
    keys, values, inputs = zip(*memory)
    extra = keys[0].shape[2] - past

    def last(layers):
        if extra < 0:
            return F.pad(torch.stack(layers, 1), (0, 0, -extra, 0))
        return torch.stack([layer[:, :, extra:] for layer in layers], 1)

    return {"keys": last(keys), "values": last(values), "filled": filled.clamp(max=past),
            "inputs": None if inputs[0] is None else torch.stack(inputs, 1)}


# ---- Encoder -----------------------------------------------------------------------------------

class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.n_mels))
        self.register_buffer("std", torch.ones(config.n_mels))
        # Each strided convolution halves the frames: output t is made of inputs 2t - 1, 2t, 2t + 1,
        # so that encoder frame t needs no mel frame after s * t + s - 1, and a stream has to keep
        # one input frame of each. It is one Linear over three neighbours, laid side by side.
        widths = [config.n_mels] + [config.dim] * int(math.log2(config.subsampling))
        self.convolutions = nn.ModuleList(nn.Linear(3 * a, b) for a, b in zip(widths, widths[1:]))
        self.tail_widths = widths[:-1]
        self.project = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = Stack(config, config.layers, config.ff, config.max_distance, config.kernel)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation (n_mels,) of the features, as training data has them. Raises
        InputError for numbers that nothing can be divided by."""
        mean, std = mean.to(self.mean.dtype), std.to(self.std.dtype)
        for a, b in zip(*(x.flatten().tolist() for x in torch.broadcast_tensors(mean, std))):
            if not (math.isfinite(a) and 0 < b < math.inf):
                raise InputError("of every band the mean must be finite and the deviation above 0, "
                                 f"not {a:g} and {b:g}")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def initial_state(self, batch: int, chunk: int | None = None) -> EncoderState:
        """Of `batch` streams that have heard nothing and come in chunks of `chunk` frames."""
        c = self.config
        chunk = c.chunks[0] if chunk is None else chunk
        left = c.left_chunks(chunk)
        new = self.stack.distance_bias.new_zeros
        bias = self.stack.bias(chunk, left * chunk, max(1, chunk), left).detach()
        cache = new(batch, c.layers, c.heads, left * chunk, c.dim // c.heads)
        inputs = new(batch, c.layers, c.kernel - 1, c.dim) if c.kernel else None
        return EncoderState(cache, cache, new(batch, dtype=torch.long),
                            bias.expand(batch, -1, -1, -1), inputs,
                            new(batch, sum(self.tail_widths)), chunk)

    def subsample(self, mel, tails):
        """(B, F, n_mels), (B, sum of widths) -> (B, T, D), new tails"""
        x, kept = (mel - self.mean) / self.std, []
        for conv, tail in zip(self.convolutions, tails.split(self.tail_widths, 1)):
            x = torch.cat([tail[:, None], x], 1)
            kept.append(x[:, -1])
            pairs = x[:, 1:].reshape(x.shape[0], -1, 2 * x.shape[2])  # inputs 2t, 2t + 1
            x = F.relu(conv(torch.cat([x[:, :-1:2], pairs], 2)))      # and 2t - 1 before them
        return self.dropout(self.project(x)), torch.cat(kept, 1)

    def check(self, mel, lengths, state, chunk):
        """InputError for what would be computed all the same, by broadcasting, and be wrong.
        -> the lengths as a tensor."""
        s, n_mels = self.config.subsampling, self.config.n_mels
        if mel.dim() != 3 or mel.shape[2] != n_mels or mel.shape[1] % s or 0 in mel.shape[:2]:
            raise InputError(f"mel must be (B, F, {n_mels}), B above 0, F a positive multiple of "
                             f"{s}, as pad_samples makes it, not {tuple(mel.shape)}")
        if state is not None and (len(state.filled) != len(mel) or state.chunk != chunk):
            raise InputError(f"mel of {len(mel)} streams in chunks of {chunk} frames, but a state "
                             f"of {len(state.filled)} in chunks of {state.chunk}")
        if state is not None and chunk and mel.shape[1] > chunk * s:
            raise InputError(f"a call with a state takes one chunk, {chunk * s} mel frames, "
                             f"not {mel.shape[1]}")
        if lengths is None:
            return None
        lengths = torch.as_tensor(lengths)
        if not lengths.is_floating_point() and lengths.dtype != torch.bool:
            lengths = lengths.long()           # sums with narrow ones would wrap
        # On a GPU a look at the numbers would wait for it.
        legal = lengths.device.type != "cpu" or ((lengths > 0) & (lengths <= mel.shape[1])).all()
        if lengths.shape != mel.shape[:1] or lengths.dtype != torch.long or not legal:
            raise InputError(f"lengths must be {len(mel)} whole numbers from 1 to {mel.shape[1]}, "
                             f"not {lengths.tolist()}")
        return lengths

    def forward(self, mel, lengths=None, state=None, chunk=None):
        """mel (B, F, n_mels) -> frames (B, T, D), state.

        Offline: state None, whole utterances, `lengths` (B,) their mel frames, of which each gives
        ceil(length / subsampling) frames, the loss's logit_lengths; `chunk` in frames (0: the whole
        utterance, None: the first of the config's); the state returned is None.
        Streaming: `state` from initial_state or the call before, one chunk of mel frames, of the
        state's size. Only the last may be short, by `lengths` too, for padding is remembered as if
        it had been heard, and with chunk 0 there is one call: that is up to the caller. Raises
        InputError for what does not fit.
        """
        s = self.config.subsampling
        if state is not None and chunk is None:
            chunk = state.chunk
        elif chunk is None:
            chunk = self.config.chunks[0]
        left = self.config.left_chunks(chunk)
        lengths = self.check(mel, lengths, state, chunk)
        lengths = None if lengths is None else (lengths + s - 1) // s
        tails = mel.new_zeros(len(mel), sum(self.tail_widths)) if state is None else state.tails
        x, tails = self.subsample(mel, tails)
        x, memory = self.stack(x, chunk, left, state, lengths)
        if state is None:
            return x, None
        filled = state.filled + x.shape[1]
        return x, replace(state, tails=tails, **remember(memory, filled, left * chunk))


# ---- Label encoder -----------------------------------------------------------------------------

class LabelEncoder(nn.Module):
    """Reads the labels written so far (the field's prediction network). Position u of its output
    has read labels 1 .. u and the start symbol (blank). To the Transformer a label is a chunk of
    one frame: it sees itself and label_context - 1 labels before it, in every layer.

    The label V, one more than can be written, means "forgotten": training hides labels behind it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab + 1, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.dropout = nn.Dropout(config.dropout)
        if config.label_encoder == "lstm":
            self.lstm = nn.LSTM(config.dim, config.dim, config.label_layers, batch_first=True,
                                dropout=config.dropout * (config.label_layers > 1))
            self.norm = nn.LayerNorm(config.dim)
        else:
            self.stack = Stack(config, config.label_layers, 4 * config.dim, config.label_context)

    def forward(self, labels, state=None):
        """labels (B, U) -> (B, U + 1, D) from the start, or (B, U, D) after the labels that `state`
        has read; and the state after them. Padding must be labels too, 0 will do. Raises InputError
        for another shape or type and, on a CPU, for a number that is no label."""
        if (labels.dim() != 2 or labels.dtype not in (torch.int32, torch.int64)
                or state is not None and not labels.shape[1]):
            raise InputError("labels must be whole numbers (B, U), not "
                             f"{labels.dtype} {tuple(labels.shape)}")
        if state is None:
            labels = F.pad(labels, (1, 0))  # blank is 0
        try:
            x = self.dropout(self.embedding(labels))
        except IndexError:
            raise InputError(f"labels must be from 0 to {self.config.vocab}, not from "
                             f"{labels.min()} to {labels.max()}") from None
        if self.config.label_encoder == "lstm":
            return self.run_lstm(x, state)
        return self.run_transformer(x, state)

    def run_transformer(self, x, state):
        left = self.config.label_context - 1
        y, memory = self.stack(x, 1, left, state)
        if state is None:
            filled = torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.long)
            bias = self.stack.bias(1, left, 1, left).detach().expand(len(x), -1, -1, -1)
        else:
            filled, bias = state.filled + x.shape[1], state.bias
        return y, StackState(bias=bias, **remember(memory, filled, left))

    def run_lstm(self, x, state):
        past = None
        if state is not None:  # torch wants the layer first
            past = tuple(h.transpose(0, 1).contiguous() for h in (state.hidden, state.cell))
        y, (hidden, cell) = self.lstm(x, past)
        return self.norm(y), LSTMState(hidden.transpose(0, 1), cell.transpose(0, 1))


# ---- Model -------------------------------------------------------------------------------------

class Joint(nn.Module):
    """logits = output(tanh(encoder_proj(frame) + label_proj(label))) (Graves, Mohamed, Hinton 2013,
    arXiv 1303.5778; in the first transducer, arXiv 1211.3711, the two were added and no more)"""

    def __init__(self, config):
        super().__init__()
        self.encoder_proj = nn.Linear(config.dim, config.joint_dim)
        self.label_proj = nn.Linear(config.dim, config.joint_dim)
        self.output = nn.Linear(config.joint_dim, config.vocab)
        nn.init.zeros_(self.output.bias)

    def forward(self, frames, labels):
        """(B, T, D), (B, U1, D) -> (B, T, U1, V); rnnt_loss.joint_rnnt_loss does not form it."""
        return self.combine(self.encoder_proj(frames)[:, :, None], self.label_proj(labels)[:, None])

    def combine(self, frames, labels):
        """Projected frames and labels (..., J), of shapes that broadcast -> (..., V). A search
        projects a frame or a label once and combines it many times."""
        return self.output(torch.tanh(frames + labels))


class Transducer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.label_encoder = LabelEncoder(config)
        self.joint = Joint(config)
        self.ctc = nn.Linear(config.dim, config.ctc_vocab) if config.ctc_vocab else None

    def forward(self, mel, labels, lengths=None, chunk=None):
        """mel (B, F, n_mels), labels (B, U), lengths (B,) in mel frames -> logits (B, T, U + 1, V).

        The definition of the whole model: logits[b, t, u] score what comes next for utterance b
        when frame t is heard and the first u labels are written, blank (0) to go on to frame
        t + 1. Training computes the same in pieces, never all logits at once.
        """
        if len(mel) != len(labels):
            raise InputError(f"mel of {len(mel)} utterances, but labels of {len(labels)}")
        frames, _ = self.encoder(mel, lengths, chunk=chunk)
        label_out, _ = self.label_encoder(labels)
        return self.joint(frames, label_out)


# ---- Checkpoints -------------------------------------------------------------------------------

def save(path, model: Transducer, **plain) -> None:
    """Tensors and plain data only, under a temporary name first: a reader never meets half a file.
    Raises InputError for what `load` would refuse, and OSError, with the path, where the disk is
    full or the like; the old file then stays."""
    path = os.fspath(path)
    _check_plain(plain, path)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: not saved: {name} holds numbers that are NaN or infinite")
    content = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION,
               "config": asdict(model.config), "model": model.state_dict(), "beside": plain}
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "wb") as file:
            _write(content, file)
        os.replace(temporary, path)
    except OSError as error:
        why = f"not saved, and what was there is untouched: {error.strerror or error}"
        raise OSError(error.errno, why, path) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _check_plain(value, path, name=""):
    """numpy's numbers, paths and the like are code to torch.load, which then refuses the file."""
    if type(value) in (dict, list, tuple):
        for key, item in value.items() if type(value) is dict else enumerate(value):
            _check_plain(key, path, f"the key {key!r:.50} in {name}")
            _check_plain(item, path, f"{name}.{key}".lstrip("."))
    elif not isinstance(value, Tensor) and type(value) not in (bool, int, float, str, type(None)):
        raise InputError(f"{path}: not saved: {name} is {value!r:.80}, a {type(value).__name__}; a "
                         "checkpoint takes tensors and plain data only")


def _write(content, file):
    """torch.save, which hides an OSError of the file behind a RuntimeError of its own."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        while error is not None and not isinstance(error, OSError):
            error = error.__cause__ or error.__context__
        if error is None:
            raise
        raise error
    file.flush()
    os.fsync(file.fileno())


def load(path, map_location="cpu") -> tuple[Transducer, dict]:
    """The model in eval mode, its weights in float32, and what was saved beside it. Code in the
    file is refused, never run.
    Raises InputError, one line with the path, for whatever is not a whole and sound checkpoint."""
    path = os.fspath(path)
    _check_device(map_location, path)
    content = _read(path, map_location)
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project: "
                         f"it lacks the mark {CHECKPOINT_FORMAT!r}")
    version = content.get("version")
    if type(version) is not int or version != CHECKPOINT_VERSION:      # a tensor compares too
        raise InputError(f"{path}: checkpoint version {str(version):.20}, "
                         f"this code reads version {CHECKPOINT_VERSION}: "
                         "train it again, or use the code that wrote it")
    try:
        config, weights = content["config"], content["model"]
        for name in ("config", "model", "beside"):
            if not isinstance(content[name], dict):
                raise InputError(f"{name} is no dict but {content[name]!r:.50}")
        config = Config(**{**config, "chunks": tuple(config["chunks"])})
        model = _model_for(config, weights).to_empty(device=map_location)
        model.load_state_dict(weights)
    except KeyError as error:
        raise InputError(f"{path}: a damaged checkpoint: it lacks {error}") from None
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        if too_little_memory(error):                  # ours, not the file's
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: a damaged checkpoint: {reason:.300}") from None
    return model.eval(), content["beside"]


def _model_for(config, weights):
    """A model without memory (on the meta device) that these weights fit: so neither a wrong size
    in the file nor a wrong tensor costs more than a look at it."""
    for name in ("layers", "label_layers"):  # every layer has some tensors of its own
        if getattr(config, name) > len(weights):
            raise InputError(f"{name} {getattr(config, name)}, with {len(weights)} weights in all")
    with torch.device("meta"):
        model = Transducer(config)
    expected = model.state_dict()
    if different := expected.keys() ^ weights.keys():
        name = min(map(str, different))
        fault = "is missing" if name in expected else "is no weight of this model"
        raise InputError(f"{name:.50} {fault}")
    for name, tensor in weights.items():
        shape = tuple(expected[name].shape)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            raise InputError(f"{name} must have the shape {shape}: {tensor!r:.50}")
        if not (tensor.is_floating_point() and tensor.is_contiguous() and not tensor.is_meta):
            raise InputError(f"{name} must be plain floating-point numbers: {tensor!r:.50}")
        used = tensor.to(expected[name].dtype)
        if not torch.isfinite(used).all():
            raise InputError(f"{name} holds numbers that are NaN or infinite as {used.dtype}")
        if name == "encoder.std" and not (used > 0).all():
            raise InputError(f"{name} must be above 0, not {tensor.min():g}")
    return model


def _check_device(device, path):
    if not isinstance(device, (str, int, torch.device)):
        raise InputError(f"{path}: {device!r:.50} is no device; cpu or cuda is")
    if str(device).startswith("meta"):
        raise InputError(f"{path}: cannot be loaded on device meta, which holds no numbers")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by builds of torch
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be loaded on device {device}: {reason}") from None


def _read(path, map_location):
    if not os.path.isfile(path):
        what = "not a regular file" if os.path.exists(path) else "no such file"
        raise InputError(f"{path}: {what}")
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):  # what torch.save writes is a zip archive
                raise InputError("something else, or cut off")
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: refused, it holds more than tensors and plain data: "
                         f"{reason:.300}") from None
    except Exception as error:  # a reader of damaged archives may fail in any way
        if too_little_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a checkpoint: {reason:.300}") from None


def too_little_memory(error):
    """Whether that is it: torch's errors on a processor, and those that a driver gives it, are
    plain RuntimeErrors."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in str(error) for sign in ("can't allocate memory", "out of memory"))


# ---- Demonstration -----------------------------------------------------------------------------

def main():
    print(f"{'preset':8}{'encoder':>10}{'labels':>10}{'joint':>10}{'all':>10}   frame   "
          "chunks (look-ahead, beyond the 15 ms of a frame's last window, at most)")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = Transducer(config)
        parts = model.encoder, model.label_encoder, model.joint, model
        sizes = (sum(p.numel() for p in part.parameters()) / 1e6 for part in parts)
        frame = round(1000 * config.frame_s)
        chunks = ", ".join(f"{c * frame} ({(c - 1) * frame}) ms" if c else "whole"
                           for c in config.chunks)
        sizes = "".join(f"{size:8.2f} M" for size in sizes)
        print(f"{name:8}{sizes}   {frame} ms   {chunks}")
    config = replace(PRESETS["tiny"], left_frames=6)
    print(f"\nThe chunk mask: 4 frames a chunk, {config.left_frames} frames of left context, "
          f"rounded up to {config.left_chunks(4)} chunks.\n"
          "A row is a frame that looks, # what it sees.\n")
    for row in Stack(config, 1, 1, 1).bias(16, 0, 4, config.left_chunks(4))[0]:
        print("".join(" #" if bias > MASKED / 2 else " ." for bias in row))


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)     # here, where a pipe that nobody reads is caught
    except OSError as error:          # a pipe whose reader has seen enough, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"model.py: {error}", file=sys.stderr)
            sys.exit(2)
