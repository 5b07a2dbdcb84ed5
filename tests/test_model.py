"""model.py: what each part promises, and above all that streaming is the offline computation."""

import errno
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model as m  # noqa: E402

SMALL = m.Config(vocab=40, dim=32, heads=4, layers=3, ff=48, subsampling=4, chunks=(4, 1, 16),
                 left_frames=10, dropout=0.1, label_encoder="transformer", label_layers=2,
                 label_context=5, joint_dim=24, ctc_vocab=7)
KINDS = [SMALL, replace(SMALL, label_encoder="lstm", subsampling=8),
         replace(SMALL, subsampling=2, max_distance=3), replace(SMALL, kernel=15)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def make(config=SMALL, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = m.Transducer(config).to(dtype).eval()
    mean, std = torch.full((config.n_mels,), -8.0), torch.full((config.n_mels,), 3.0)
    model.encoder.set_statistics(mean, std)
    with torch.no_grad():  # steeper than the initial values: every distance tells
        model.encoder.stack.distance_bias.normal_(std=2.0)
    return model


def speech(n, dtype=torch.float64, seed=0):
    """Not speech, but as uneven: noise whose level changes every 20 ms."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(n // 320 + 1, generator=generator, dtype=dtype).exp()
    level = level.repeat_interleave(320)[:n]
    return 0.1 * level * torch.randn(n, generator=generator, dtype=dtype)


def mel_of(config, n, dtype=torch.float64, seed=0):
    return m.log_mel(m.pad_samples(speech(n, dtype, seed), config.subsampling))


def stream(model, mel, chunk, **options):
    """mel (B, F, 80) through the encoder one chunk at a time."""
    state = model.encoder.initial_state(mel.shape[0], chunk)
    step = chunk * model.config.subsampling or mel.shape[1]
    frames = []
    for start in range(0, mel.shape[1], step):
        out, state = model.encoder(mel[:, start:start + step], state=state, **options)
        frames.append(out)
    return torch.cat(frames, 1), state


# ---- Features ----------------------------------------------------------------------------------

def test_mel_frame_against_the_definition():
    """Frame 3 from its own 400 samples, summed over cosines and sines: no fast transform."""
    samples = speech(1600)
    piece = samples[480:880] * torch.hann_window(400, periodic=False, dtype=torch.float64)
    angle = torch.arange(257, dtype=torch.float64)[:, None] * torch.arange(400) * 2 * torch.pi / 512
    power = (piece * angle.cos()).sum(1) ** 2 + (piece * angle.sin()).sum(1) ** 2
    mel = lambda hz: 1127 * math.log(1 + hz / 700)
    edges = torch.linspace(mel(20), mel(8000), 82, dtype=torch.float64)
    bands = torch.zeros(80, dtype=torch.float64)
    for band in range(80):
        low, peak, high = edges[band:band + 3].tolist()
        for k in range(257):
            at = mel(31.25 * k)
            weight = (at - low) / (peak - low) if at <= peak else (high - at) / (high - peak)
            bands[band] += max(0.0, weight) * power[k]
    assert torch.allclose(m.log_mel(samples)[3], bands.log(), atol=1e-10)


def test_mel_frame_is_made_of_its_own_samples_only():
    samples = speech(3200)
    mel = m.log_mel(samples)
    assert mel.shape == ((3200 - 400) // 160 + 1, 80)
    other = samples.clone()
    other[:480] = 0.3
    other[880:] = -0.2
    assert torch.equal(m.log_mel(other)[3], mel[3])
    assert not torch.equal(m.log_mel(other)[2], mel[2])
    assert not torch.equal(m.log_mel(other)[4], mel[4])


def test_mel_of_batches_short_and_silent_input():
    both = torch.stack([speech(2000, seed=1), speech(2000, seed=2)])
    assert torch.allclose(m.log_mel(both)[1], m.log_mel(both[1]), atol=1e-12)
    assert m.log_mel(torch.zeros(399)).shape == (0, 80)
    assert m.log_mel(torch.zeros(2, 0)).shape == (2, 0, 80)
    assert m.log_mel(torch.zeros(400)).isfinite().all()
    assert m.log_mel(torch.ones(400)).dtype == torch.float32


def test_every_band_hears_its_tone():
    """A tone raises the bands around its own frequency above all others; no band is deaf."""
    for hz in (150, 440, 1000, 3000, 7000):
        tone = torch.sin(2 * torch.pi * hz * torch.arange(400, dtype=torch.float64) / 16000)
        mels = 1127 * torch.log1p(torch.tensor([20., hz, 8000.]) / 700)
        expected = float((mels[1] - mels[0]) / (mels[2] - mels[0])) * 81 - 1
        assert abs(m.log_mel(tone)[0].argmax().item() - expected) <= 1.5
    click = torch.zeros(400, dtype=torch.float64)
    click[200] = 1
    assert m.log_mel(click).min() > -3  # the floor is log(1e-5)


def test_the_floor_of_the_features():
    """Digital silence is the floor, as is noise of half a step of 16-bit sound; louder sound does
    not feel it."""
    silence = torch.zeros(3200, dtype=torch.float64)
    quiet = silence + torch.randn(3200, dtype=torch.float64) / 65536
    assert torch.allclose(m.log_mel(silence), torch.tensor(1e-5, dtype=torch.float64).log())
    assert torch.equal(m.log_mel(quiet), m.log_mel(silence))
    assert m.log_mel(quiet, floor=1e-12).max() > m.log_mel(silence, floor=1e-12).max() + 1
    loud = 0.1 * torch.randn(3200, dtype=torch.float64)
    assert torch.equal(m.log_mel(loud), m.log_mel(loud, floor=1e-12))
    assert torch.equal(m.log_mel(silence, floor=0.5).exp(), torch.full((18, 80), 0.5).double())


@pytest.mark.parametrize("subsampling", [2, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 399, 640, 641, 1280, 16000, 16001])
def test_padding_gives_whole_frames(n, subsampling):
    config = replace(SMALL, subsampling=subsampling)
    T = max(1, -(-n // (160 * subsampling)))
    padded = m.pad_samples(torch.ones(n), subsampling)
    assert config.frames(n) == T and m.log_mel(padded).shape == (T * subsampling, 80)
    assert padded.shape == (160 * T * subsampling + 240,)
    assert padded[:n].all() and not padded[n:].any()
    assert config.frame_s == 0.01 * subsampling


# ---- Encoder -----------------------------------------------------------------------------------

@pytest.mark.parametrize("config", KINDS[:2], ids=["x4", "x8"])
@pytest.mark.parametrize("chunk", [1, 4, 0])
def test_what_a_frame_depends_on(config, chunk):
    """By derivative: frame t needs no mel frame after its own chunk, in spite of three layers, and
    none from before what `left` chunks in each layer and the convolutions reach."""
    model, s, T, t = make(config), config.subsampling, 80, 66
    mel = torch.randn(1, T * s, 80, dtype=torch.float64, requires_grad=True)
    frames, _ = model.encoder(mel, chunk=chunk)
    some = frames[0, t] @ torch.randn(config.dim, dtype=torch.float64)
    gradient, = torch.autograd.grad(some, mel)
    used = gradient[0].abs().sum(1).nonzero()[:, 0]
    if chunk == 0:
        assert used.min() == 0 and used.max() == T * s - 1
        return
    first = t // chunk - config.layers * -(-config.left_frames // chunk)  # chunk
    assert used.max() == (t // chunk + 1) * chunk * s - 1
    assert first > 0 and used.min() == first * chunk * s - (s - 1)


def test_attention_against_loops():
    """One layer, one query and one head at a time, looking at exactly the frames it may see."""
    config = replace(SMALL, layers=1, max_distance=6)
    encoder, T, chunk = make(config).encoder, 19, 4
    block, left = encoder.stack.blocks[0], 3  # ceil(10 / 4) chunks
    x = torch.randn(1, T, config.dim, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x))[0].view(T, 3, 4, 8).unbind(1)  # (T, H, D / H)
    seen = torch.zeros(T, 4, 8, dtype=torch.float64)
    for t in range(T):
        keys = [j for j in range(T) if t // chunk - left <= j // chunk <= t // chunk]
        for head in range(4):
            distance = torch.tensor([max(-6, min(6, t - j)) + 6 for j in keys])
            score = k[keys, head] @ q[t, head] / 8 ** 0.5
            score = score + encoder.stack.distance_bias[head, distance]
            seen[t, head] = score.softmax(0) @ v[keys, head]
    y = x + block.out(seen.reshape(1, T, -1))
    y = y + block.ff2(torch.relu(block.ff1(block.norm2(y))))
    assert torch.allclose(encoder.stack(x, chunk, left)[0], encoder.stack.norm(y), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", KINDS, ids=["x4", "x8", "x2", "kernel 15"])
@torch.no_grad()
def test_streaming_is_the_offline_forward(config, dtype):
    model = make(config, dtype)
    for chunk in (1, 4, 16, 0):
        for n in (1, 5000, 16000, 33333, 40960):
            mel = mel_of(config, n, dtype)[None]
            offline, none = model.encoder(mel, chunk=chunk)
            streamed, _ = stream(model, mel, chunk)
            assert none is None and offline.shape == (1, config.frames(n), config.dim)
            assert (streamed - offline).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["tiny", "small"])
@torch.no_grad()
def test_streaming_is_the_offline_forward_for_the_presets(name):
    config = m.PRESETS[name]
    model = make(config, torch.float32)
    mel = mel_of(config, 8 * 16000, torch.float32)[None]
    for chunk in config.chunks:
        difference = (stream(model, mel, chunk)[0] - model.encoder(mel, chunk=chunk)[0]).abs().max()
        assert difference < 1e-5, (chunk, difference)


@torch.no_grad()
def test_a_wrong_context_is_noticed():
    """The negative control: one frame more to the left, or chunks one frame longer, is not within
    the tolerance."""
    model = make()
    mel = mel_of(SMALL, 40000)[None]
    for chunk, other, left in ((1, 1, 11), (4, 5, 10), (4, 4, 13)):
        wrong = make(replace(SMALL, left_frames=left))
        difference = (stream(wrong, mel, other)[0] - model.encoder(mel, chunk=chunk)[0]).abs().max()
        assert difference > 1e-4, (chunk, other, left)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", [0, 15])
@pytest.mark.parametrize("chunk", [1, 4, 16, 0])
@torch.no_grad()
def test_batch_is_single(dtype, kernel, chunk):
    """Ragged utterances padded with garbage, each equal to itself alone."""
    model = make(replace(SMALL, kernel=kernel), dtype)
    mels = [mel_of(SMALL, n, dtype, seed=n) for n in (20000, 700, 31000, 16001)]
    lengths = torch.tensor([len(mel) for mel in mels])
    batch = torch.full((4, int(lengths.max()), 80), 1e3, dtype=dtype)
    for row, mel in zip(batch, mels):
        row[:len(mel)] = mel
    frames, _ = model.encoder(batch, lengths, chunk=chunk)
    for row, mel in zip(frames, mels):
        alone, _ = model.encoder(mel[None], chunk=chunk)
        assert (row[:alone.shape[1]] - alone[0]).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", [0, 15])
@torch.no_grad()
def test_streams_of_different_age_in_one_batch(kernel):
    """Streams that began at different times are joined, stepped together, one is taken out, the
    others go on; the last chunks, of different length, are stepped together too."""
    model, step = make(replace(SMALL, kernel=kernel)), 16
    mels = [mel_of(SMALL, n, seed=n) for n in (26000, 30000, 31900)]
    alone = [stream(model, mel[None], 4)[0][0] for mel in mels]
    states, parts, at = [], [[], [], []], [0, 2 * step, 5 * step]
    for mel, begun, part in zip(mels, at, parts):
        state = model.encoder.initial_state(1, 4)
        for start in range(0, begun, step):
            frames, state = model.encoder(mel[None, start:start + step], state=state)
            part.append(frames[0])
        states.append(state)
    rows, state = [0, 1, 2], m.State.join(states)
    while rows:
        pieces = [mels[row][at[row]:at[row] + step] for row in rows]
        lengths = torch.tensor([len(piece) for piece in pieces])
        mel = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=50.0)
        frames, state = model.encoder(mel, lengths, state)
        for i, row in enumerate(rows):
            parts[row].append(frames[i, :lengths[i] // 4])
            at[row] += step
        kept = [i for i, row in enumerate(rows) if at[row] < len(mels[row])]
        rows, state = [rows[i] for i in kept], state.select(kept)
    for part, whole in zip(parts, alone):
        assert (torch.cat(part) - whole).abs().max() < 1e-10


@pytest.mark.parametrize("kernel", [0, 15])
@torch.no_grad()
def test_state_keeps_its_shape(kernel):
    """... and its memory: a view into something that grows would keep the shape."""
    model = make(replace(SMALL, kernel=kernel))
    for chunk in (1, 4, 16):
        state, memory = model.encoder.initial_state(2, chunk), set()
        shapes = {name: x.shape for name, x in state.tensors().items()}
        past = -(-10 // chunk) * chunk
        assert shapes["keys"] == shapes["values"] == (2, 3, 4, past, 8)
        assert shapes["bias"] == (2, 4, chunk, past + chunk)
        names = {"keys", "values", "filled", "bias", "tails"}
        assert shapes.keys() == (names | {"inputs"} if kernel else names)
        assert not kernel or shapes["inputs"] == (2, 3, 14, 32)
        for _ in range(40):
            mel = torch.randn(2, chunk * 4, 80, dtype=torch.float64)
            _, state = model.encoder(mel, state=state)
            assert {name: x.shape for name, x in state.tensors().items()} == shapes
            assert state.chunk == chunk
            memory.add(sum(x.untyped_storage().nbytes() for x in state.tensors().values()))
        assert len(memory) == 1


# ---- Convolution ---------------------------------------------------------------------------------

def convolution(kernel=5, dim=6):
    torch.manual_seed(0)
    return m.Convolution(dim, kernel, 0.0).double().eval()


@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
@pytest.mark.parametrize("kernel", [1, 5, 15])
@torch.no_grad()
def test_convolution_against_loops(kernel, chunk):
    """One frame, channel and tap at a time: causal in the first half of the channels, centred in
    the second and zero beyond the chunk."""
    layer, T, D = convolution(kernel), 13, 6
    x = torch.randn(1, T, D, dtype=torch.float64)
    inputs = torch.nn.functional.glu(layer.gate(layer.norm(x)))[0]
    weight, y = layer.depthwise.weight[:, 0, 0], torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        end = min(T, (t // chunk + 1) * chunk)
        for d in range(D):
            first = t - (kernel - 1 if d < 3 else kernel // 2)
            y[t, d] = layer.depthwise.bias[d] + sum(
                weight[d, k] * inputs[first + k, d] for k in range(kernel) if 0 <= first + k < end)
    expected = x[0] + layer.out(torch.nn.functional.silu(layer.middle_norm(y)))
    out, kept = layer(x, chunk)
    assert (out[0] - expected).abs().max() < 1e-12
    padded = torch.nn.functional.pad(inputs, (0, 0, kernel - 1, 0))
    assert torch.equal(kept[0], padded[len(padded) - kernel + 1:])


@pytest.mark.parametrize("chunk", [4, 0])
def test_convolution_hears_the_chunk_and_nothing_after_it(chunk):
    """By derivative, without attention: t hears from 14 frames before it in each of three layers
    to the end of its chunk, or 7 frames ahead a layer where the chunk is the whole utterance."""
    encoder, T, t = make(replace(SMALL, kernel=15)).encoder, 60, 49
    for block in encoder.stack.blocks:
        torch.nn.init.zeros_(block.out.weight)
    mel = torch.randn(1, T * 4, 80, dtype=torch.float64, requires_grad=True)
    frames, _ = encoder(mel, chunk=chunk)
    gradient, = torch.autograd.grad(frames[0, t].square().sum(), mel)
    used = gradient[0].abs().sum(1).nonzero()[:, 0]
    last = min(T - 1, t + 3 * 7) if chunk == 0 else (t // chunk + 1) * chunk - 1
    assert (used.min(), used.max()) == ((t - 3 * 14) * 4 - 3, last * 4 + 3)


@pytest.mark.parametrize("kernel", [0, 15])
@torch.no_grad()
def test_a_last_chunk_of_one_frame(kernel):
    """Streaming, offline and in a batch beside a longer one: the same frame."""
    config = replace(SMALL, kernel=kernel)
    model = make(config)
    mel = mel_of(config, 640 * 8 + 1)[None]  # two chunks of four frames, and one sample
    offline, _ = model.encoder(mel, chunk=4)
    assert offline.shape[1] == 9
    assert (stream(model, mel, 4)[0] - offline).abs().max() < 1e-10
    longer = torch.full((1, 80, 80), 1e3, dtype=torch.float64)
    longer[:, :36] = mel
    ragged, _ = model.encoder(longer, torch.tensor([36]), chunk=4)
    assert (ragged[:, :9] - offline).abs().max() < 1e-10
    wrong, _ = model.encoder(longer, torch.tensor([37]), chunk=4)  # the control: one frame too many
    assert (wrong[:, :9] - offline).abs().max() > 1e-4


@torch.no_grad()
def test_a_wrong_cache_of_the_convolution_is_noticed():
    """The negative control: a stream that forgets its convolutions' inputs, or keeps them from one
    frame earlier, is not within the tolerance."""
    model = make(replace(SMALL, kernel=15))
    mel = mel_of(SMALL, 640 * 12)[None]
    offline, _ = model.encoder(mel, chunk=4)
    _, state = model.encoder(mel[:, :16], state=model.encoder.initial_state(1, 4))
    for inputs in (torch.zeros_like(state.inputs), state.inputs.roll(1, 2)):
        frames, _ = model.encoder(mel[:, 16:32], state=replace(state, inputs=inputs))
        assert (frames - offline[:, 4:8]).abs().max() > 1e-4
    frames, _ = model.encoder(mel[:, 16:32], state=state)
    assert (frames - offline[:, 4:8]).abs().max() < 1e-10


def test_a_chunk_has_a_legal_size():
    model = make()
    for chunk in (-3, 10 ** 8):  # memory for the last chunk of 10^8 frames would be 57 GB
        with pytest.raises(m.InputError, match=str(chunk)):
            model.encoder(torch.zeros(1, 8, 80, dtype=torch.float64), chunk=chunk)
        with pytest.raises(m.InputError, match=str(chunk)):
            model.encoder.initial_state(1, chunk)


# ---- Label encoder -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["transformer", "lstm"])
@torch.no_grad()
def test_labels_in_any_pieces(kind):
    encoder = make(replace(SMALL, label_encoder=kind)).label_encoder
    labels = torch.randint(1, 40, (3, 30))
    whole, after = encoder(labels)
    assert whole.shape == (3, 31, 32)
    for cuts in ([0, 1, 2, 3, 30], [0, 12, 30], [7, 8, 30], list(range(31))):
        out, state = encoder(labels[:, :cuts[0]])
        parts = [out]
        for a, b in zip(cuts, cuts[1:]):
            out, state = encoder(labels[:, a:b], state)
            parts.append(out)
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10
        for a, b in zip(state.tensors().values(), after.tensors().values(), strict=True):
            assert torch.allclose(a, b, atol=1e-10)


@torch.no_grad()
def test_label_context_is_bounded():
    """Two layers that see 5 labels each: the output moves with the last 9 labels and no other."""
    encoder = make().label_encoder
    labels = torch.randint(1, 40, (1, 25))
    whole, state = encoder(labels)
    assert state.keys.shape == (1, 2, 4, 4, 8)
    for u in range(25):
        other = labels.clone()
        other[0, u] = labels[0, u] % 39 + 1
        changed = (encoder(other)[0] - whole)[0].abs().amax(1) > 0
        # output u + 1 is the first that has read label u
        assert changed.nonzero()[:, 0].tolist() == list(range(u + 1, min(26, u + 1 + 9)))


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
@torch.no_grad()
def test_hypotheses_part_and_meet(kind):
    """Beam search: rows of one state go on with different labels, then in another order."""
    encoder = make(replace(SMALL, label_encoder=kind)).label_encoder
    _, state = encoder(torch.tensor([[3, 4]]))
    _, state = encoder(torch.tensor([[5], [6], [7]]), state.select([0, 0, 0]))
    out, _ = encoder(torch.tensor([[8], [9]]), state.select(torch.tensor([2, 0])))
    expected, _ = encoder(torch.tensor([[3, 4, 7, 8], [3, 4, 5, 9]]))
    assert (out[:, 0] - expected[:, -1]).abs().max() < 1e-10


def test_features_have_gradients_also_after_inference():
    m._window_and_bands.cache_clear()
    with torch.inference_mode():
        m.log_mel(torch.ones(800))
    samples = torch.randn(800, requires_grad=True)
    m.log_mel(samples).sum().backward()
    assert samples.grad.abs().sum() > 0


# ---- Joint and training ------------------------------------------------------------------------

@torch.no_grad()
def test_joint_against_loops():
    model = make()
    frames = torch.randn(2, 5, 32, dtype=torch.float64)
    labels = torch.randn(2, 3, 32, dtype=torch.float64)
    logits, joint = model.joint(frames, labels), model.joint
    assert logits.shape == (2, 5, 3, 40)
    for b, t, u in [(0, 0, 0), (1, 4, 2), (0, 3, 1)]:
        hidden = torch.tanh(joint.encoder_proj(frames[b, t]) + joint.label_proj(labels[b, u]))
        assert torch.allclose(logits[b, t, u], joint.output(hidden), atol=1e-12)
    assert model.ctc(frames).shape == (2, 5, 7) and make(replace(SMALL, ctc_vocab=0)).ctc is None


@pytest.mark.parametrize("kernel", [0, 15])
@torch.no_grad()
def test_forward_is_the_whole_model(kernel):
    """Encoder, label encoder and joint; ragged utterances as alone; the chunk is passed on."""
    model, labels = make(replace(SMALL, kernel=kernel)), torch.randint(1, 40, (2, 6))
    mel, lengths = torch.randn(2, 120, 80, dtype=torch.float64), torch.tensor([120, 36])
    logits = model(mel, labels, lengths, chunk=4)
    assert logits.shape == (2, 30, 7, 40)
    alone = model(mel[1:, :36], labels[1:], chunk=4)
    assert (logits[1:, :9] - alone).abs().max() < 1e-10
    frames, _ = model.encoder(mel, lengths, chunk=4)
    a, b = model.joint.encoder_proj(frames), model.joint.label_proj(model.label_encoder(labels)[0])
    assert (logits[:, 3, 2] - model.joint.combine(a[:, 3], b[:, 2])).abs().max() < 1e-12
    assert (logits - model(mel, labels, lengths, chunk=5)).abs().max() > 1e-4


@torch.no_grad()
def test_the_forgotten_label_is_none_of_the_vocabulary():
    encoder = make().label_encoder
    assert encoder.embedding.weight.shape == (41, 32)
    hidden = encoder(torch.full((1, 1), 40))[0][0, 1]
    shown = encoder(torch.arange(40)[:, None])[0][:, 1]
    assert (shown - hidden).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
@pytest.mark.parametrize("kernel", [0, 15])
def test_gradients_reach_every_parameter_and_padding_none(kind, kernel):
    model = make(replace(SMALL, label_encoder=kind, kernel=kernel)).train()
    mel = torch.randn(2, 120, 80, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([120, 16])  # whole chunks of the second are padding and see nothing else
    frames, _ = model.encoder(mel, lengths, chunk=4)
    labels, _ = model.label_encoder(torch.randint(1, 40, (2, 6)))
    logits = model.joint(frames, labels)
    written = logits[0].square().sum() + logits[1, :4].square().sum()
    (written + model.ctc(frames[1, :4]).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not mel.grad[1, 16:].any() and mel.grad[1, :16].any(1).all()


@pytest.mark.parametrize("kernel", [0, 15])
def test_half_precision_stays_finite(kernel):
    model = make(replace(SMALL, kernel=kernel), torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        frames, _ = model.encoder(torch.randn(2, 120, 80), torch.tensor([120, 16]))
        logits = model.joint(frames, model.label_encoder(torch.randint(1, 40, (2, 6)))[0])
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


MEL = torch.zeros(2, 16, 80, dtype=torch.float64)


@pytest.mark.parametrize("arguments, told", [
    ((MEL[0],), r"\(16, 80\)"), ((MEL[..., :1],), r"\(2, 16, 1\)"),
    ((MEL[:, :0],), "multiple of 4"), ((MEL[:, :15],), "multiple of 4"),
    ((MEL, torch.tensor([16])), r"2 whole numbers .* \[16\]"),
    ((MEL, [16, 17]), r"from 1 to 16, not \[16, 17\]"), ((MEL, [16, 0]), r"not \[16, 0\]"),
    ((MEL, [16.0, 4.0]), "whole numbers"), ((MEL, None, "state", 2), "chunks of 2 frames.* of 4"),
    ((MEL[:1], None, "state"), "mel of 1 streams.*a state of 2"), ((MEL, None, None, 2.0), r"2\.0"),
    ((MEL[:, :12].repeat(1, 2, 1), None, "state"), "takes one chunk, 16 mel frames, not 24"),
])
def test_the_encoder_refuses_what_does_not_fit(arguments, told):
    """torch would broadcast most of it, and compute something else."""
    model = make()
    arguments = [model.encoder.initial_state(2) if a == "state" else a for a in arguments]
    with pytest.raises(m.InputError, match=told):
        model.encoder(*arguments)


def test_lengths_may_be_a_list_and_a_state_brings_its_chunk():
    model, mel = make(), torch.randn(2, 16, 80, dtype=torch.float64)
    assert torch.equal(model.encoder(mel, [16, 8])[0],
                       model.encoder(mel, torch.tensor([16, 8], dtype=torch.int32))[0])
    state = model.encoder.initial_state(2)
    assert state.chunk == SMALL.chunks[0]
    assert torch.equal(model.encoder(mel, state=state)[0],
                       model.encoder(mel, state=state, chunk=state.chunk)[0])


def test_what_is_no_sound_no_statistics_and_no_labels():
    with pytest.raises(m.InputError, match="int16"):
        m.log_mel(torch.zeros(800, dtype=torch.int16))
    for mean, std in ((0.0, 0.0), (0.0, float("nan")), (float("inf"), 1.0)):
        with pytest.raises(m.InputError, match="deviation above 0, not [a-z.0-9]+ and [a-z.0-9]+$"):
            make().encoder.set_statistics(torch.full((80,), mean), torch.full((80,), std))
    for labels in (torch.tensor([1, 2]), torch.ones(1, 2)):
        with pytest.raises(m.InputError, match=r"labels must be whole numbers \(B, U\)"):
            make().label_encoder(labels)


def test_no_band_is_deaf_up_to_the_most():
    """And one more has a band between two frequencies of the spectrum, which hears nothing."""
    def deaf(n_mels):
        bands = m._window_and_bands(n_mels, torch.float64, torch.device("cpu"))[1]
        return int((bands.amax(0) == 0).sum())
    assert [deaf(n) for n in range(1, m.MOST_MELS + 2)] == [0] * m.MOST_MELS + [1]
    with pytest.raises(m.InputError, match="n_mels 127"):
        replace(SMALL, n_mels=127)


def test_a_masked_score_is_finite_in_float16_and_its_exponential_zero():
    masked = torch.tensor(m.MASKED, dtype=torch.float16)
    assert masked.isfinite() and not torch.tensor(m.MASKED).exp()


@pytest.mark.parametrize("kind, n", [("transformer", 8), ("lstm", 7)])
def test_every_part_drops_the_share_of_the_config(kind, n):
    """Two encoder layers and their convolutions, the two inputs, and what reads the labels."""
    config = replace(SMALL, layers=2, kernel=3, dropout=0.25, label_encoder=kind)
    model, used = make(config, torch.float32).train(), []
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.LSTM)):
            module.register_forward_hook(lambda module, *_: used.append(module))
    model(torch.randn(1, 16, 80), torch.tensor([[1, 2]]))
    shares = [part.dropout if isinstance(part, torch.nn.LSTM) else part.p for part in used]
    assert len(set(used)) == n and set(shares) == {0.25}, shares


def test_dropout_is_in_training_and_nowhere_else():
    """A share of what a layer adds is dropped and the rest scaled up: as much in the mean."""
    torch.manual_seed(0)
    block = m.Block(32, 2, 64, 0.25, 0)
    x, bias = torch.randn(1, 6, 32), torch.zeros(1, 2, 6, 6)
    plain = block.eval()(x, bias, 6)[0]
    assert torch.equal(plain, block(x, bias, 6)[0])
    block.train()
    drawn = torch.stack([block(x, bias, 6)[0] for _ in range(400)])
    assert (drawn.std(0) > 0.01).float().mean() > 0.9
    assert (drawn.mean(0) - plain).abs().mean() < 0.15 * (plain - x).abs().mean()


def test_random_numbers_are_those_of_the_seed():
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.joint.output.weight, c.joint.output.weight)
    assert not a.joint.output.bias.any()


# ---- The bench and the picture -----------------------------------------------------------------

def test_the_planted_model_of_the_bench_hears_its_tones():
    """Random weights but for three units: one label for every tone, in the smaller presets."""
    bench = pytest.importorskip("bench")
    for preset in ("tiny", "small"):
        _, new = bench.planted_streamer(preset, chunk=8)
        _, words = bench.stream_chunks(new(), bench.tones(0, 3))
        assert [word.text for word in words] == ["ab"] * 10
        assert all(abs(word.end_s - 0.1 * (3 * k + 2)) < 0.1 for k, word in enumerate(words))


# ---- Options and files -------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, words", [
    ({"dim": 30}, "dim 30 .* heads 4"), ({"layers": 0}, "layers .* 0"),
    ({"vocab": "9"}, "vocab .* '9'"),
    ({"subsampling": 3}, "subsampling .* 3"), ({"chunks": ()}, r"chunks .* \(\)"),
    ({"chunks": (4, -1)}, "chunks .* -1"),
    ({"left_frames": -5}, "left_frames -5"), ({"left_frames": 10 ** 12}, "is more than 4096"),
    ({"dropout": 1.0}, r"dropout .* 1\.0"),
    ({"label_encoder": "gru"}, "label_encoder .* 'gru'"), ({"ctc_vocab": -1}, "ctc_vocab -1"),
    ({"kernel": 4}, "kernel .* 4"), ({"kernel": -1}, "kernel -1"),
    ({"floor": 0.0}, r"floor .* 0\.0"),
    ({"floor": float("nan")}, "floor .* nan"), ({"layers": True}, "layers .* True"),
    ({"dropout": "0.1"}, "dropout .* '0.1'"), ({"chunks": [4]}, r"chunks .* \[4\]"),
    ({"chunks": (10 ** 8,)}, "chunks .*100000000")])
def test_options_are_validated(wrong, words):
    with pytest.raises(m.InputError, match=words):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("config", KINDS[:2], ids=["transformer", "lstm"])
@torch.no_grad()
def test_checkpoint_round_trip(tmp_path, config):
    model, path = make(config, torch.float32), tmp_path / "model.pt"
    m.save(path, model, mode="align", tokenizer={"tags": ["<asr>"]}, moments=torch.arange(3))
    other, beside = m.load(path)
    assert other.config == config and not other.training
    assert beside["mode"] == "align" and beside["tokenizer"] == {"tags": ["<asr>"]}
    assert torch.equal(beside["moments"], torch.arange(3))
    mel = mel_of(config, 8000, torch.float32)[None]
    assert torch.equal(model.encoder(mel)[0], other.encoder(mel)[0])
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_a_block_drops_behind_each_of_its_three_parts():
    block, used = m.Block(32, 2, 64, 0.25, 3).train(), []
    block.dropout.register_forward_hook(lambda *_: used.append("block"))
    block.convolution.dropout.register_forward_hook(lambda *_: used.append("convolution"))
    block(torch.randn(1, 6, 32), torch.zeros(1, 2, 6, 6), 6)
    assert used == ["block", "convolution", "block"]           # attention, ..., feed-forward


def test_features_do_not_depend_on_autocast(tmp_path):
    """bfloat16 has three digits: errors of 0.03 in the logarithm."""
    samples = torch.randn(8000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.autocast("cpu", torch.bfloat16):
        mel = m.log_mel(samples)
    assert mel.dtype == torch.float32 and torch.equal(mel, m.log_mel(samples))
    with pytest.raises(m.InputError, match="float32 or float64 in -1..1, not torch.bfloat16"):
        m.log_mel(samples.bfloat16())


def test_streaming_gives_the_distance_bias_its_gradient():
    """In chunks as offline; the bias that a stream keeps has none, and may be old."""
    model = make(dtype=torch.float64)
    mel = mel_of(model.config, 16000)[None]
    step = model.config.chunks[0] * model.config.subsampling
    grads = []
    for chunks in (mel,), mel.split(step, 1):
        model.zero_grad()
        state = model.encoder.initial_state(1) if len(chunks) > 1 else None
        total = 0
        for chunk in chunks:
            frames, state = model.encoder(chunk, state=state)
            total = total + frames.square().sum()
        total.backward()
        grads.append(model.encoder.stack.distance_bias.grad.clone())
    assert len(mel.split(step, 1)) > 2 and grads[0].abs().max() > 1e-6
    assert (grads[0] - grads[1]).abs().max() < 1e-9 * grads[0].abs().max() + 1e-12


@pytest.mark.parametrize("padding", [-1, -100, 10 ** 6])
def test_padding_that_is_no_label_is_named(padding):
    model = make()
    mel = mel_of(model.config, 8000, torch.float32)[None]
    labels = torch.tensor([[1, 2, padding]])
    with pytest.raises(m.InputError, match=f"labels must be from 0 to .*{padding}"):
        model(mel, labels)


def test_sizes_that_would_broadcast_are_refused():
    model = make()
    mel = mel_of(model.config, 8000, torch.float32)[None]
    labels = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(m.InputError, match="mel of 3 utterances, but labels of 1"):
        model(mel.expand(3, -1, -1), labels)
    with pytest.raises(m.InputError, match="B above 0"):
        model.encoder(mel[:0])
    _, state = model.label_encoder(labels)
    with pytest.raises(m.InputError, match="labels must be whole numbers"):
        model.label_encoder(labels[:, :0], state)


def test_lengths_of_narrow_types_do_not_wrap():
    model = make()
    mel = mel_of(model.config, 48000, torch.float32)[None].expand(2, -1, -1)
    n, s = mel.shape[1], model.config.subsampling
    assert n > 255 - s
    whole = model.encoder(mel, [253, 150])[0]
    for dtype in (torch.uint8, torch.int16):
        assert torch.equal(whole, model.encoder(mel, torch.tensor([253, 150], dtype=dtype))[0])
    with pytest.raises(m.InputError, match="lengths must be 2 whole numbers"):
        model.encoder(mel, torch.tensor([True, True]))


@pytest.mark.parametrize("bad, told", [
    ({"bad": lambda: None}, "bad is <function"), ({"step": np.int64(3)}, "step is .*int64"),
    ({"where": {"x": [1, Path("a")]}}, r"where\.x\.1 is .*Path"), ({"d": {(1, 2.5): {3}}}, "a set"),
    ({"d": {Path("a"): 1}}, "the key .* in d"), ({"o": OrderedDict(a=1)}, "a OrderedDict")])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, bad, told):
    path = tmp_path / "model.pt"
    m.save(path, make(), step=1)
    with pytest.raises(m.InputError, match=f"model.pt: not saved: .*{told}"):
        m.save(path, make(), **bad)
    assert m.load(path)[1] == {"step": 1} and os.listdir(tmp_path) == ["model.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut might leave the new name and nothing behind it."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(m.os, name, lambda *args, name=name, real=real: done.append(
            name) or real(*args))
    m.save(tmp_path / "model.pt", make())
    assert done == ["fsync", "replace"]


@pytest.mark.parametrize("device", [None, {"cuda:0": "cpu"}, "meta", "nowhere"])
def test_a_device_has_a_name(tmp_path, device):
    """With map_location=None, torch would leave the weights without numbers."""
    m.save(tmp_path / "model.pt", make())
    with pytest.raises(m.InputError, match="model.pt: .* device"):
        m.load(tmp_path / "model.pt", device)


def test_whatever_else_is_plain_comes_back(tmp_path):
    """Else a check that refuses too much would pass the test before."""
    plain = {"a": [1, 2.5, None, True, "x", (1, {"b": torch.arange(2)})], "c": {3: "d", "": []}}
    m.save(tmp_path / "model.pt", make(), **plain)
    assert repr(m.load(tmp_path / "model.pt")[1]) == repr(plain)


@pytest.mark.parametrize("room", [0, 5_000, 60_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, room):
    """A stand-in for a file on a disk with so many bytes left."""
    class Full(io.FileIO):
        written = 0

        def write(self, data):
            self.written += len(data)
            if self.written > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    path, model = tmp_path / "model.pt", make(dtype=torch.float32)
    m.save(path, model, step=1)
    assert path.stat().st_size > 60_000
    monkeypatch.setattr(m, "open", lambda name, mode: Full(name, mode), raising=False)
    with pytest.raises(OSError, match="untouched: No space left on device.*model.pt") as caught:
        m.save(path, model, step=2)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert m.load(path)[1] == {"step": 1} and os.listdir(tmp_path) == ["model.pt"]


class Code:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    good, path, ran = tmp_path / "good.pt", tmp_path / "bad.pt", tmp_path / "ran"
    m.save(good, make())
    content = torch.load(good)
    code = Code()
    code.path = str(ran)

    def refused(words):
        with pytest.raises(m.InputError, match=words) as caught:
            m.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("no such file")
    path.write_text("hello")
    refused("not a checkpoint")
    path.write_bytes(b"")
    refused("not a checkpoint")
    path.write_bytes(good.read_bytes()[:-500])
    refused("not a checkpoint")
    path.write_bytes(pickle.dumps(code))
    refused("not a checkpoint")
    torch.save({**content, "beside": code}, path)
    refused("refused")
    assert not ran.exists()
    torch.save([1, 2], path)
    refused("not a checkpoint")
    torch.save({**content, "version": 99}, path)
    refused("version 99")
    torch.save({**content, "config": {**content["config"], "wings": 2}}, path)
    refused("wings")
    torch.save({**content, "config": asdict(replace(SMALL, dim=64))}, path)
    refused("damaged")
    torch.save({key: value for key, value in content.items() if key != "model"}, path)
    refused("damaged.*model")
    torch.save({**content, "version": 1}, path)
    refused("version 1, this code reads version 2")
    torch.save({**content, "version": torch.tensor([2, 2])}, path)
    refused("version tensor")


def damages(content):
    """(what is put in the place of a part, words of the message)"""
    weights, name = content["model"], "joint.output.weight"
    whole = weights[name]
    def weight(tensor):
        return {"model": {**weights, name: tensor}}
    def option(**wrong):
        return {"config": {**content["config"], **wrong}}
    return [
        (weight(torch.full_like(whole, math.nan)), f"{name} holds numbers that are NaN"),
        (weight(whole.index_fill(0, torch.tensor(3), -math.inf)), f"{name} holds .* infinite"),
        ({"model": {**weights, "encoder.std": weights["encoder.std"] * math.inf}}, "encoder.std"),
        ({"model": {**weights, "encoder.std": weights["encoder.std"] * 0}}, "std must be above 0"),
        (weight(whole.double() + 1e39), f"{name} holds .* infinite as torch.float32"),
        ({"model": {**weights, "encoder.std": weights["encoder.std"].double() * 1e-60}},
         "std must be above 0"),
        (weight(whole[1:].clone()), f"{name} must have the shape"),
        (weight(whole.tolist()), f"{name} must have the shape"),
        (weight(None), f"{name} must have the shape"),
        (weight(whole.long()), f"{name} must be plain floating-point"),
        (weight(whole[:1, :1].expand(whole.shape)), f"{name} must be plain"),
        (weight(torch.empty(whole.shape, device="meta")), f"{name} must be plain"),
        ({"model": {k: w for k, w in weights.items() if k != name}}, f"{name} is missing"),
        ({"model": {**weights, "wings": whole}}, "wings is no weight"),
        ({"model": list(weights.values())}, "model is no dict"), ({"model": {}}, "layers 3"),
        ({"config": [1, 2]}, "config is no dict"), ({"config": None}, "config is no dict"),
        ({"config": {}}, "lacks 'chunks'"), ({"beside": [1]}, "beside is no dict"),
        (option(layers=10 ** 9), "layers 1000000000"),
        (option(label_layers=10 ** 9), "label_layers 1000000000"),
        (option(layers=10 ** 9, label_encoder="lstm"), "layers 1000000000"),
        (option(ff=10 ** 12), "damaged"), (option(dim=4 * 10 ** 18), "damaged"),
        (option(vocab=10 ** 9), "damaged"), (option(max_distance=10 ** 18), "damaged"),
        (option(n_mels=10 ** 9), "damaged"), (option(chunks=4), "damaged"),
        (option(chunks="44"), "chunks"), (option(chunks=(10 ** 9,)), "chunks .*1000000000"),
        (option(layers="3"), "layers"), (option(dropout=[]), "dropout"),
        (option(kernel=15), "conv")]


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    """... at once, and before memory is taken for what its config claims."""
    path = tmp_path / "model.pt"
    m.save(path, make(dtype=torch.float32), step=1)
    content = torch.load(path)
    for damage, words in damages(content):
        torch.save({**content, **damage}, path)
        with pytest.raises(m.InputError, match=words) as caught:
            m.load(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 400
    torch.save(content, path)
    assert m.load(path)[1] == {"step": 1}


def test_what_is_no_regular_file_and_a_device_that_is_not_there(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "fifo", tmp_path, Path(os.devnull)):
        with pytest.raises(m.InputError, match=f"{place}: not a regular file"):
            m.load(place)
    m.save(tmp_path / "model.pt", make())
    for device in ["wings"] + ["cuda"] * (not torch.cuda.is_available()):
        with pytest.raises(m.InputError, match=f"model.pt: cannot be .* device {device}") as caught:
            m.load(tmp_path / "model.pt", device)
        assert "not a checkpoint" not in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_a_stream_keeps_its_position_bias():
    """... of a whole chunk, and a shorter last one uses a corner of it."""
    config = replace(m.PRESETS["tiny"], left_frames=8)
    encoder = m.Transducer(config).encoder
    state = encoder.initial_state(2, 4)
    assert torch.equal(state.bias[1, :, :3, :11], encoder.stack.bias(3, 8, 4, 2))
    _, after = encoder(torch.randn(2, 16, 80), state=state)
    assert after.bias is state.bias
    encoder.stack.distance_bias += 1.0  # a stream that begins later has the later weights
    seen = state.bias > m.MASKED / 2
    later = encoder.initial_state(2, 4).bias
    assert torch.equal(later[seen], state.bias[seen] + 1) and seen.any()


def test_the_demonstration_prints_the_mask_it_uses(tmp_path):
    """Of the file alone, in an empty folder."""
    shutil.copy(ROOT / "model.py", tmp_path)
    command = [sys.executable, "model.py"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in m.PRESETS) and "320 (280) ms" in out
    rows = [line.split() for line in out.splitlines() if line.strip() and set(line) <= set(" .#")]
    assert len(rows) == 16
    for t, row in enumerate(rows):
        assert row == ["#" if 0 <= t // 4 - j // 4 <= 2 else "." for j in range(16)]


def test_a_model_that_diverged_replaces_no_good_one(tmp_path):
    model = m.Transducer(m.PRESETS["tiny"])
    m.save(tmp_path / "model.pt", model)
    before = (tmp_path / "model.pt").read_bytes()
    with torch.no_grad():
        model.joint.output.bias[3] = float("nan")
    with pytest.raises(m.InputError, match="not saved: joint.output.bias holds numbers that"):
        m.save(tmp_path / "model.pt", model)
    assert (tmp_path / "model.pt").read_bytes() == before
    with pytest.raises(m.InputError, match="the deviation above 0"):
        model.encoder.set_statistics(torch.zeros(80).double(), torch.full((80,), 1e-60).double())
    for kind in (torch.bool, torch.int16, torch.float32):
        with pytest.raises(m.InputError, match="labels must be whole numbers"):
            model.label_encoder(torch.ones(1, 2, dtype=kind))
