"""stream.py: the same words however the audio comes, the scores that training would give, the delays of SimulEval."""
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import stream
from model import PRESETS, Transducer, log_mel, pad_samples, save
from rnnt_loss import rnnt_loss_reference
from serialize import Row, Tokenizer
from stream import (AudioError, Streamer, Word, advance, edit_distance, evaluate, greedy_batch, latency,
                    read_audio, resample)

TOKENIZER = Tokenizer.train(["la le li lo lu"] * 3, 270, tags=("<asr>", "<st:en>"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache(maxsize=None)
def lively(seed=0, dtype=torch.float32, **options):
    """Random weights, made decided, with the blank just so likely that about ten labels a second come out."""
    torch.manual_seed(seed)
    options = {"vocab": len(TOKENIZER), "layers": 2, "dropout": 0.0, "left_frames": 16, **options}
    model = Transducer(replace(PRESETS["tiny"], **options)).eval().to(dtype)
    mel = log_mel(pad_samples(torch.from_numpy(noise(64000)).to(dtype), 4))[None]
    bias, low, high = model.joint.output.bias, -30.0, 30.0
    with torch.no_grad():
        model.joint.output.weight *= 12
        model.joint.label_proj.weight *= 0.3  # mostly the frames decide, or the same labels come for ever
        bias[[t for t in range(3, len(TOKENIZER)) if not set(TOKENIZER.pieces[t]) <= set(b" laeiou")]] = -100
        for _ in range(12):  # bisection: the larger the bias of blank, the fewer labels
            bias[0] = (low + high) / 2
            many = len(greedy_batch(model, mel, [mel.shape[1]], limits=(3, 3))[0][0]) > 40
            low, high = (bias[0].item(), high) if many else (low, bias[0].item())
    return model


def noise(n, seed=0):
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.uniform(0.001, 0.3, n // 800 + 1), 800)[:n]
    return (rng.normal(size=n) * level).astype(np.float32)


def run(model, samples, packets=None, **options):
    """Everything a stream gives but the clock: words, exact score, capped."""
    streamer, words, start = Streamer(model, TOKENIZER, **options), [], 0
    for packet in packets or [len(samples)]:
        words += streamer.accept(samples[start:start + packet])
        start += packet
    words += streamer.accept(samples[start:]) + streamer.flush()
    return [(w.stream, w.text, w.delay_ms, w.frame_s) for w in words], streamer.search.score, streamer.search.capped


# ---- Exactness ------------------------------------------------------------------------------------------------------

N = 16000 * 3 + 77  # ends inside a frame
LIMITS = (3, 10)    # random weights would write up to the default limit of 500 in most last frames


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("label_encoder", ["transformer", "lstm"])
def test_packets_change_nothing(beam, label_encoder):
    """Words, delays, times and the score itself are equal to the last bit, whatever the packets."""
    model, samples = lively(label_encoder=label_encoder), noise(N)
    chunk = model.config.chunks[0] * 640
    whole = run(model, samples, beam=beam, limits=LIMITS)
    assert len(whole[0]) > 5
    rng = np.random.default_rng(1)
    for packets in ([1] * N, [7] * (N // 7), [160] * (N // 160), [4000] * (N // 4000), [chunk] * (N // chunk),
                    [chunk * 7 // 2] * 2, rng.integers(0, 3000, 20).tolist()):
        assert run(model, samples, packets, beam=beam, limits=LIMITS) == whole


def frames_of(model, samples, chunk):
    """The encoder frames that a stream computes, (T, D)."""
    streamer, seen = Streamer(model, TOKENIZER, chunk=chunk, limits=LIMITS), []
    hook = model.joint.encoder_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    streamer.accept(samples), streamer.flush()
    hook.remove()
    return torch.cat(seen, 1)[0]


@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_streaming_equals_the_masked_encoder(dtype, near):
    """Any chunk size, audio cut at any sample: the frames of the offline encoder, and its tokens."""
    model = lively(seed=2, dtype=dtype)
    rng = np.random.default_rng(2)
    for chunk, n in itertools.product([1, 4, 16, 0], [N, 40000, 40000 + 239, 40000 + 241, 17, int(rng.integers(1, N))]):
        samples = noise(n)
        mel = log_mel(pad_samples(torch.from_numpy(samples).to(dtype), 4))[None]
        offline = model.encoder(mel, chunk=chunk)[0][0]
        scale = max(1.0, offline.abs().max().item())
        assert (frames_of(model, samples, chunk) - offline).abs().max() <= near * scale
        wider = model.encoder(mel, chunk=chunk + 1)[0][0]  # the control: one frame more of context shows
        if chunk and len(offline) > chunk:
            assert (wider - offline).abs().max() > 1000 * near


def test_batch_equals_single():
    """Batched greedy over padded utterances gives each the tokens and frames of its own stream."""
    model = lively(seed=0, dtype=torch.float64)
    items = [(Row(id=str(k), audio="x", asr="la la"), noise(n, k)) for k, n in enumerate([N, 30001, 1, 16000, 9999])]
    _, many = evaluate(model, TOKENIZER, items, batch_size=5)
    _, single = evaluate(model, TOKENIZER, items, batch_size=1)
    assert sum(len(row["words"]) for row in many) > 10
    for a, b in zip(many, single):
        assert [replace(w, elapsed_ms=0) for w in a["words"]] == [replace(w, elapsed_ms=0) for w in b["words"]]


def test_many_streams_in_one_batch():
    """Sixteen streams, stepped together in packets of their own, give the words of each alone."""
    model = lively(seed=0, dtype=torch.float64)
    audio = [noise(20000 + 1111 * k, k) for k in range(16)]
    alone = [run(model, samples, limits=LIMITS) for samples in audio]
    streamers, words, rng = [Streamer(model, TOKENIZER, limits=LIMITS) for _ in audio], [[] for _ in audio], np.random.default_rng(0)
    at = [0] * 16
    while any(at[k] < len(audio[k]) for k in range(16)):
        cut = [a + int(rng.integers(0, 9000)) for a in at]
        packets = [x[a:b] for x, a, b in zip(audio, at, cut)]
        for streamer, packet in zip(streamers, packets):
            streamer.push(packet)
        for mine, new in zip(words, advance(streamers)):
            mine += new
        at = cut
    for streamer, mine in zip(streamers, words):
        mine += streamer.flush()
    for (expected, score, _), mine, streamer in zip(alone, words, streamers):
        assert [(w.stream, w.text, w.delay_ms, w.frame_s) for w in mine] == expected
        assert streamer.search.score == pytest.approx(score, abs=1e-9)


def test_state_keeps_its_shape():
    model = lively()
    streamer = Streamer(model, TOKENIZER)
    shapes = set()
    for k in range(40):
        streamer.accept(noise(5120, k))
        tensors = [*streamer.encoder_state.tensors().values(), *streamer.search.labels.state.tensors().values()]
        shapes.add(tuple(x.shape for x in tensors))
        assert sum(len(part.base if part.base is not None else part) for part in streamer.waiting) <= 2 * 5120 + 480
    assert len(shapes) == 1


# ---- Search ---------------------------------------------------------------------------------------------------------

def lattice(model, samples, ids, chunk=None):
    """Log-probabilities (T, U1, V) of the training forward, the labels given."""
    dtype = model.joint.output.weight.dtype
    frames, _ = model.encoder(log_mel(pad_samples(torch.from_numpy(samples).to(dtype), 4))[None], chunk=chunk)
    return model.joint(frames, model.label_encoder(torch.tensor([ids]))[0])[0].log_softmax(-1)


def path_score(log_probs, ids, at):
    """Follow the path: label u at frame at[u], blank once at the end of every frame."""
    total = sum(log_probs[t, u, token].item() for u, (token, t) in enumerate(zip(ids, at)))
    return total + sum(log_probs[t, sum(a <= t for a in at), 0].item() for t in range(len(log_probs)))


def tokens_of(model, samples, beam=None, **options):
    """What the search wrote, as ids and frames from the start of the stream."""
    streamer, found = Streamer(model, TOKENIZER, **options), []
    streamer.search = beam or streamer.search
    streamer.words = lambda tokens, last, began: found.extend(tokens) or []
    streamer.accept(samples), streamer.flush()
    return streamer.search, found


@pytest.mark.parametrize("label_encoder", ["transformer", "lstm"])
def test_greedy_score_is_the_training_score(label_encoder):
    """Chunks, windows and caches: the score collected is that of the same path in one training forward."""
    model, samples = lively(seed=0, dtype=torch.float64, label_encoder=label_encoder), noise(N)
    search, path = tokens_of(model, samples, limits=LIMITS)
    ids, at = zip(*path)
    assert len(ids) > 20 and search.capped > 0
    log_probs = lattice(model, samples, ids)
    assert search.score == pytest.approx(path_score(log_probs, ids, at), abs=1e-8)
    for t, u, token in [(t, u, token) for u, (token, t) in enumerate(zip(ids, at))]:
        assert log_probs[t, u].argmax() == token
    assert search.score <= -rnnt_loss_reference(model.joint(
        model.encoder(log_mel(pad_samples(torch.from_numpy(samples).double(), 4))[None])[0],
        model.label_encoder(torch.tensor([ids]))[0]), torch.tensor([ids]), torch.tensor([len(log_probs)]),
        torch.tensor([len(ids)]), blank=0).item() + 1e-8  # one path of all that write the same labels


def test_beam_of_one_is_greedy():
    model, samples = lively(seed=2, dtype=torch.float64), noise(N)
    greedy, path = tokens_of(model, samples, limits=LIMITS)
    beam, other = tokens_of(model, samples, stream.Beam(model, 1, LIMITS))
    assert other == path and beam.capped == greedy.capped > 0
    assert beam.score == pytest.approx(greedy.score, abs=1e-9)


def test_exhaustive_beam_equals_brute_force():
    """With room for every hypothesis, each label string has the probability that the RNN-T loss gives it."""
    torch.manual_seed(0)
    model = Transducer(replace(PRESETS["tiny"], vocab=3, layers=1, dropout=0.0)).eval().double()
    with torch.no_grad():
        model.joint.output.weight *= 8
    frames, longest = torch.randn(1, 3, 144, dtype=torch.float64), 3
    beam = stream.Beam(model, 2000, (longest, longest), hold=10**6)
    with torch.inference_mode():
        for frame in model.joint.encoder_proj(frames[0]):
            beam.one_frame(frame, longest)
    assert len(beam.hyps) == 2 ** (3 * longest + 1) - 1
    found = {hyp.tokens: hyp.score for hyp in beam.hyps}
    strings = [s for n in range(longest + 1) for s in itertools.product([1, 2], repeat=n)]
    for labels in strings:  # up to `longest` labels, so that the limit per frame forbids none of their paths
        ids = torch.tensor([labels], dtype=torch.long).view(1, -1)
        logits = model.joint(frames, model.label_encoder(ids)[0])
        loss = rnnt_loss_reference(logits, ids, torch.tensor([3]), torch.tensor([len(labels)]), blank=0)
        assert found[labels] == pytest.approx(-loss.item(), abs=1e-9)


def test_larger_beams_find_no_worse():
    scores = [np.mean([run(lively(seed=2), noise(24000, k), beam=beam, limits=LIMITS)[1] for k in range(6)])
              for beam in (1, 2, 4, 8)]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 1


def test_caps_are_counted():
    """A model that never takes blank writes its limit in every frame, and that many frames are counted."""
    model = lively(seed=3)
    bias, keep = model.joint.output.bias, model.joint.output.bias[0].item()
    with torch.no_grad():
        bias[0] = -1000.0
    try:
        for beam in (1, 2):
            search, path = tokens_of(model, noise(16000), limits=(4, 7), beam=None if beam == 1 else
                                     stream.Beam(model, beam, (4, 7)))
            assert len(path) == 24 * 4 + 7 and search.capped == 25
    finally:
        with torch.no_grad():
            bias[0] = keep
