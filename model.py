"""The network: from waveform to logits, for a whole recording at once or chunk by chunk as it arrives.

    waveform -> log-mel -> strided convolutions -> chunk-masked Transformer --\\
                                                                               joint -> logits over the vocabulary
    labels written so far ------------------------> label encoder ------------/

The encoder hears in chunks of C frames. A frame sees all of its own chunk and the `left` chunks before it, in every
layer, so the look-ahead is at most C - 1 frames however deep the network is, and what a chunk needs of the past is
bounded: the keys and values of the last left * C frames. Training and offline use give the whole recording in one
call, where a mask says who sees whom; streaming gives one chunk per call together with the state of the call before.
Both run the same lines of code (`Stack.forward`), and a test holds their outputs against each other.

What this file does not do: losses (rnnt_loss.py), search and audio files (stream.py), text (serialize.py).

    python model.py         the presets: parameters, chunk lengths, and a drawing of the mask
"""

import math
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

InputError = ValueError
SAMPLE_RATE = 16000
WINDOW = 400  # samples in a mel frame: 25 ms
HOP = 160     # samples from one mel frame to the next: 10 ms
FFT = 512
MASKED = -3e4  # added to a score that must not count: exp() makes it exactly 0, and it is finite in float16 too

CHECKPOINT_FORMAT = "joint-streaming-transducer"
CHECKPOINT_VERSION = 1


# ---------------------------------------------------------------------------------------------------------- options

@dataclass(frozen=True)
class Config:
    vocab: int               # V, blank (0) included
    dim: int                 # D
    heads: int               # H
    layers: int
    ff: int                  # hidden width of the encoder's feed-forward part
    subsampling: int         # mel frames per encoder frame: 2, 4 or 8
    chunks: tuple[int, ...]  # chunk sizes C in frames that the model is trained for, the default first; 0: whole
    left_frames: int         # how far back a frame sees; rounded up to whole chunks
    dropout: float
    label_encoder: str       # "transformer" or "lstm"
    label_layers: int
    label_context: int       # labels a layer of the Transformer label encoder sees, itself included
    joint_dim: int
    ctc_vocab: int = 0       # classes of the auxiliary CTC head on the encoder; 0: no head
    n_mels: int = 80
    max_distance: int = 64   # relative positions further apart than this share one bias

    def __post_init__(self):
        for name in ("vocab", "dim", "heads", "layers", "ff", "label_layers", "label_context", "joint_dim", "n_mels",
                     "max_distance"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        for right, message in (
                (self.dim % self.heads == 0, f"dim {self.dim} is not divisible by heads {self.heads}"),
                (self.subsampling in (2, 4, 8), f"subsampling must be 2, 4 or 8, not {self.subsampling!r}"),
                (self.chunks and all(isinstance(c, int) and c >= 0 for c in self.chunks),
                 f"chunks must be one or more numbers of frames, 0 for the whole utterance, not {self.chunks!r}"),
                (self.left_frames >= 0, f"left_frames {self.left_frames} must not be negative"),
                (self.ctc_vocab >= 0, f"ctc_vocab {self.ctc_vocab} must not be negative"),
                (0 <= self.dropout < 1, f"dropout must lie in [0, 1), not {self.dropout!r}"),
                (self.label_encoder in ("transformer", "lstm"),
                 f'label_encoder must be "transformer" or "lstm", not {self.label_encoder!r}')):
            if not right:
                raise ValueError(message)

    @property
    def frame_s(self) -> float:
        return HOP * self.subsampling / SAMPLE_RATE

    def frames(self, n_samples: int) -> int:
        return max(1, -(-n_samples // (HOP * self.subsampling)))

    def left_chunks(self, chunk: int) -> int:
        if chunk < 0:
            raise ValueError(f"a chunk has one or more frames (0: the whole utterance), not {chunk}")
        return -(-self.left_frames // chunk) if chunk else 0


PRESETS = {
    "tiny": Config(vocab=512, dim=144, heads=4, layers=4, ff=576, subsampling=4, chunks=(8, 4, 16, 32),
                   left_frames=64, dropout=0.1, label_encoder="transformer", label_layers=2, label_context=48,
                   joint_dim=144),
    "small": Config(vocab=1024, dim=256, heads=4, layers=12, ff=1024, subsampling=4, chunks=(8, 4, 16, 32),
                    left_frames=128, dropout=0.1, label_encoder="transformer", label_layers=2, label_context=32,
                    joint_dim=320),
    "paper": Config(vocab=4096, dim=512, heads=8, layers=24, ff=4096, subsampling=4, chunks=(25,),
                    left_frames=450, dropout=0.1, label_encoder="transformer", label_layers=2, label_context=64,
                    joint_dim=640),
}


# --------------------------------------------------------------------------------------------------------- features

@lru_cache(maxsize=None)
def _window_and_bands(n_mels, dtype, device):
    """Hann window (WINDOW,) and triangular mel filters (FFT // 2 + 1, n_mels), 20 Hz to 8 kHz."""
    mel = lambda hz: 1127 * math.log1p(hz / 700)
    edges = torch.linspace(mel(20.0), mel(SAMPLE_RATE / 2), n_mels + 2, dtype=torch.float64)
    bins = 1127 * torch.log1p(torch.arange(FFT // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / FFT / 700)
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bands = torch.minimum(rise, fall).clamp(min=0)
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)
    return window.to(device, dtype), bands.to(device, dtype)


def log_mel(samples: Tensor, n_mels: int = 80) -> Tensor:
    """(N,) or (B, N) -> (F, n_mels) or (B, F, n_mels). Frame k is made of samples [160 k, 160 k + 400) and nothing
    else: no centring, no padding, no statistics of the utterance; any of those would let a frame see the future."""
    window, bands = _window_and_bands(n_mels, samples.dtype, samples.device)
    if samples.shape[-1] < WINDOW:
        return samples.new_zeros(*samples.shape[:-1], 0, n_mels)
    spectrum = torch.fft.rfft(samples.unfold(-1, WINDOW, HOP) * window, n=FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ bands).clamp(min=1e-8).log()


def pad_samples(samples: Tensor, subsampling: int) -> Tensor:
    """Zeros at the end, so that log_mel gives exactly T * subsampling frames, T = max(1, ceil(N / (160 * s)))."""
    n = samples.shape[-1]
    frames = max(1, -(-n // (HOP * subsampling))) * subsampling
    return F.pad(samples, (0, HOP * frames + WINDOW - HOP - n))


# ------------------------------------------------------------------------------------------------------------ state

class State:
    """What a batch of streams remembers between two calls: tensors, or one tensor per layer, whose first dimension is
    the stream, so that streams can be taken out of a batch and put together into one. Their shapes never change."""

    def select(self, rows) -> "State":
        """The state of some streams of the batch; rows is an index tensor, a list or a slice."""
        return State._each([self], lambda same: same[0][rows])

    @staticmethod
    def join(states: list["State"]) -> "State":
        """One batch out of several."""
        return State._each(states, torch.cat) if len(states) > 1 else states[0]

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, layer after layer."""
        layers = {name: value if isinstance(value, tuple) else (value,) for name, value in vars(self).items()}
        return {f"{name}.{i}": x for name, values in layers.items() for i, x in enumerate(values)
                if isinstance(x, Tensor)}

    @staticmethod
    def _each(states, function):
        def apply(values):
            if isinstance(values[0], tuple):
                return tuple(function(layer) for layer in zip(*values))
            return function(values) if isinstance(values[0], Tensor) else values[0]
        return type(states[0])(*(apply([getattr(s, f.name) for s in states]) for f in fields(states[0])))


@dataclass(frozen=True)
class AttentionState(State):
    keys: tuple[Tensor, ...]    # (B, H, past, D / H) in each layer
    values: tuple[Tensor, ...]  # (B, H, past, D / H)
    filled: Tensor              # (B,) how many of the past frames are real, the last ones


@dataclass(frozen=True)
class EncoderState(AttentionState):
    tails: Tensor               # (B, widths of all convolution inputs) the last input frame of each convolution
    chunk: int                  # frames per call


@dataclass(frozen=True)
class LSTMState(State):
    hidden: Tensor  # (B, layers, D)
    cell: Tensor    # (B, layers, D)


# -------------------------------------------------------------------------------------------------------- Transformer

class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim, heads, ff, dropout):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ff1, self.ff2 = nn.Linear(dim, ff), nn.Linear(ff, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, bias, past=None):  # x (B, Q, D), bias (1 or B, H, Q, K), past (keys, values)
        B, Q, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, Q, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, Q, D / H)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(B, Q, D)))
        return x + self.dropout(self.ff2(F.relu(self.ff1(self.norm2(x))))), k, v


class Stack(nn.Module):
    """Transformer layers over frames or labels in chunks: the one attention path of everything in this file."""

    def __init__(self, config, layers, ff, max_distance):
        super().__init__()
        self.max_distance, self.kept = max_distance, (None, None)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, ff, config.dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(config.dim)
        # A bias per head and distance, query minus key, shared by the layers. Heads start with different reach.
        distance = torch.arange(-max_distance, max_distance + 1).abs()
        self.distance_bias = nn.Parameter(-distance / 2.0 ** torch.arange(1, config.heads + 1)[:, None])  # (H, 2 M + 1)
        for block in self.blocks:
            for last in (block.out, block.ff2):  # many layers add up: keep their sum of the size of one
                nn.init.normal_(last.weight, std=(2 * layers * last.in_features) ** -0.5)
                nn.init.zeros_(last.bias)

    def bias(self, queries, past, chunk, left):
        """(H, queries, past + queries): position bias, and MASKED where a query does not see a key. Positions count
        from the first query, which begins a chunk: the past has negative ones, and the floor of position / chunk
        numbers the chunks on both sides. A stream's last one is kept until its weights change (but by weight.data)."""
        weight, M, (known, kept) = self.distance_bias, self.max_distance, self.kept
        key = queries, past, chunk, left, weight.dtype, weight.data_ptr(), weight.is_inference() or weight._version
        if known == key and not torch.is_grad_enabled():
            return kept
        offsets = torch.arange(1 - queries - past, queries, device=weight.device)  # key minus query, past to future
        position = weight[:, (-offsets).clamp(-M, M) + M].unfold(1, past + queries, 1).flip(1)
        chunks_back = offsets[-queries:, None] // chunk - offsets[queries - 1:] // chunk
        bias = position.masked_fill((chunks_back < 0) | (chunks_back > left), MASKED)
        self.kept = (key, bias) if past and not torch.is_grad_enabled() else (None, None)
        return bias

    def forward(self, x, chunk, left, state=None, lengths=None):
        """x (B, Q, D) beginning at a chunk's first frame; state: the frames before; lengths (B,): how many of the Q
        are real. Returns (B, Q, D) and the keys and values of past and present, (B, H, K, D / H) per layer."""
        Q, past = x.shape[1], state.keys[0].shape[2] if state else 0
        bias = self.bias(Q, past, chunk or Q, left)[None]
        position = torch.arange(-past, Q, device=x.device)
        if state is not None:
            bias = bias.masked_fill((position < -state.filled[:, None])[:, None, None], MASKED)
        if lengths is not None:
            bias = bias.masked_fill((position >= lengths[:, None])[:, None, None], MASKED)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, bias, (state.keys[i], state.values[i]) if state else None)
            keys.append(k)
            values.append(v)
        return self.norm(x), keys, values


def remember(keys, values, filled, past):
    """The last `past` frames of the keys and values of every layer, zeros in front where there are fewer."""
    def last(x):
        return x[:, :, x.shape[2] - past:] if x.shape[2] >= past else F.pad(x, (0, 0, past - x.shape[2], 0))
    return {"keys": tuple(map(last, keys)), "values": tuple(map(last, values)), "filled": filled.clamp(max=past)}


# ---------------------------------------------------------------------------------------------------------- encoder

class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.n_mels))
        self.register_buffer("std", torch.ones(config.n_mels))
        # Each convolution halves the frames: output t is made of inputs 2t - 1, 2t, 2t + 1, so that encoder frame t
        # needs no mel frame after s * t + s - 1, and a stream has to keep one input frame of each.
        widths = [config.n_mels] + [config.dim] * int(math.log2(config.subsampling))
        self.convolutions = nn.ModuleList(nn.Linear(3 * a, b) for a, b in zip(widths, widths[1:]))
        self.tail_widths = widths[:-1]
        self.project = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = Stack(config, config.layers, config.ff, config.max_distance)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        self.mean.copy_(mean)
        self.std.copy_(std)

    def initial_state(self, batch: int, chunk: int | None = None) -> EncoderState:
        c = self.config
        chunk = c.chunks[0] if chunk is None else chunk
        new = self.stack.distance_bias.new_zeros
        past = tuple(new(batch, c.heads, c.left_chunks(chunk) * chunk, c.dim // c.heads) for _ in range(c.layers))
        return EncoderState(past, past, new(batch, dtype=torch.long), new(batch, sum(self.tail_widths)), chunk)

    def subsample(self, mel, tails):  # (B, F, n_mels), (B, sum of widths) -> (B, T, D), new tails
        x, kept = (mel - self.mean) / self.std, []
        for conv, tail in zip(self.convolutions, tails.split(self.tail_widths, 1)):
            x = torch.cat([tail[:, None], x], 1)
            kept.append(x[:, -1])
            pairs = x[:, 1:].reshape(x.shape[0], -1, 2 * x.shape[2])       # inputs 2t, 2t + 1
            x = F.relu(conv(torch.cat([x[:, :-1:2], pairs], 2)))           # and 2t - 1 before them
        return self.dropout(self.project(x)), torch.cat(kept, 1)

    def forward(self, mel, lengths=None, state=None, chunk=None):
        """mel (B, F, n_mels) -> frames (B, T, D), state.

        Offline: state None, whole utterances, `lengths` their mel frames; the state returned is None.
        Streaming: `state` from initial_state or the call before, one chunk of mel frames; only the last may be short.
        """
        s = self.config.subsampling
        if mel.shape[1] % s or not mel.shape[1]:
            raise ValueError(f"{mel.shape[1]} mel frames are not a positive multiple of {s}; pad_samples makes them so")
        if state is not None or chunk is None:
            chunk = state.chunk if state else self.config.chunks[0]
        left = self.config.left_chunks(chunk)
        if state is not None and chunk and mel.shape[1] > chunk * s:
            raise ValueError(f"a call with a state takes one chunk, {chunk * s} mel frames, not {mel.shape[1]}")
        lengths = None if lengths is None else (lengths + s - 1) // s
        tails = state.tails if state else mel.new_zeros(mel.shape[0], sum(self.tail_widths))
        x, tails = self.subsample(mel, tails)
        x, keys, values = self.stack(x, chunk, left, state, lengths)
        if state is None:
            return x, None
        return x, EncoderState(**remember(keys, values, state.filled + x.shape[1], left * chunk), tails=tails,
                               chunk=chunk)


# ---------------------------------------------------------------------------------------------------- label encoder

class LabelEncoder(nn.Module):
    """Reads the labels written so far. Position u of its output has read labels 1 .. u and the start symbol (blank).
    To the Transformer a label is a chunk of one frame: it sees itself and label_context - 1 labels before it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.dropout = nn.Dropout(config.dropout)
        if config.label_encoder == "lstm":
            self.lstm = nn.LSTM(config.dim, config.dim, config.label_layers, batch_first=True)
            self.norm = nn.LayerNorm(config.dim)
        else:
            self.stack = Stack(config, config.label_layers, 4 * config.dim, config.label_context)

    def forward(self, labels, state=None):
        """labels (B, U) -> (B, U + 1, D) from the start, or (B, U, D) after the labels that `state` has read."""
        if state is None:
            labels = F.pad(labels, (1, 0))  # blank is 0
        x = self.dropout(self.embedding(labels))
        if self.config.label_encoder == "lstm":
            past = None if state is None else tuple(h.transpose(0, 1).contiguous() for h in (state.hidden, state.cell))
            x, (hidden, cell) = self.lstm(x, past)
            return self.norm(x), LSTMState(hidden.transpose(0, 1), cell.transpose(0, 1))
        left = self.config.label_context - 1
        x, keys, values = self.stack(x, 1, left, state)
        filled = x.shape[1] + (state.filled if state else torch.zeros_like(labels[:, 0]))
        return x, AttentionState(**remember(keys, values, filled, left))


# ------------------------------------------------------------------------------------------------------------ model

class Joint(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder_proj = nn.Linear(config.dim, config.joint_dim)
        self.label_proj = nn.Linear(config.dim, config.joint_dim)
        self.output = nn.Linear(config.joint_dim, config.vocab)
        nn.init.zeros_(self.output.bias)

    def forward(self, frames, labels):  # (B, T, D), (B, U1, D) -> (B, T, U1, V)
        both = self.encoder_proj(frames)[:, :, None] + self.label_proj(labels)[:, None]
        return self.output(torch.tanh(both))


class Transducer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.label_encoder = LabelEncoder(config)
        self.joint = Joint(config)
        self.ctc = nn.Linear(config.dim, config.ctc_vocab) if config.ctc_vocab else None


# ------------------------------------------------------------------------------------------------------ checkpoints

def save(path, model: Transducer, **plain) -> None:
    """Tensors and plain data only, under a temporary name first: a reader never meets half a file."""
    path = os.fspath(path)
    content = {"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, "config": asdict(model.config),
               "model": model.state_dict(), "beside": plain}
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path, map_location="cpu") -> tuple[Transducer, dict]:
    """The model in eval mode and what was saved beside it. Code in the file is refused, never run."""
    path = os.fspath(path)
    content = _read(path, map_location)
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project: it lacks the mark {CHECKPOINT_FORMAT!r}")
    if content.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path}: checkpoint version {content.get('version')!r}, this code reads {CHECKPOINT_VERSION}")
    try:
        config = Config(**{**content["config"], "chunks": tuple(content["config"]["chunks"])})
        model = Transducer(config).to(map_location)
        model.load_state_dict(content["model"])
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: a damaged checkpoint: {error}") from None
    return model.eval(), content["beside"]


def _read(path, map_location):
    try:
        if not zipfile.is_zipfile(path):  # what torch.save writes is a zip archive
            raise ValueError("something else, or cut off" if os.path.exists(path) else "no such file")
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: refused, it holds more than tensors and plain data: {reason}") from None
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint: {error}") from None


# ---------------------------------------------------------------------------------------------------- demonstration

def main():
    print(f"{'preset':8}{'encoder':>10}{'labels':>10}{'joint':>10}{'all':>10}   frame   chunks (look-ahead at most)")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = Transducer(config)
        millions = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:8.2f} M"
        frame = round(1000 * config.frame_s)
        chunks = ", ".join(f"{c * frame} ({(c - 1) * frame}) ms" if c else "whole" for c in config.chunks)
        print(f"{name:8}{millions(model.encoder)}{millions(model.label_encoder)}{millions(model.joint)}"
              f"{millions(model)}   {frame} ms   {chunks}")
    config = replace(PRESETS["tiny"], left_frames=6)
    print(f"\nThe chunk mask: 4 frames a chunk, {config.left_frames} frames of left context, rounded up to "
          f"{config.left_chunks(4)} chunks. A row is a frame that looks, # what it sees.\n")
    for row in Stack(config, 1, 1, 1).bias(16, 0, 4, config.left_chunks(4))[0]:
        print("".join(" #" if bias > MASKED / 2 else " ." for bias in row))


if __name__ == "__main__":
    main()
