"""stream.py: the same words however the audio comes, the scores that training would give, the
delays of SimulEval."""

import fcntl
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import types
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import stream
import train
from model import PRESETS, Transducer, load, log_mel, pad_samples, save
from rnnt_loss import rnnt_loss_reference
from serialize import Row, Tokenizer, units
from stream import Streamer, Word, advance, edit_distance, evaluate, greedy_batch, latency

TOKENIZER = Tokenizer.train(["la le li lo lu"] * 3, 270, tags=("<asr>", "<st:en>"))


@lru_cache(maxsize=None)
def lively(seed=0, dtype=torch.float32, **options):
    """Random weights, made decided, with the blank just so likely that about ten labels a second
    come out: the first such model whose words are many enough to compare."""
    return random_model(talkative(seed, **options), dtype, **options)


@lru_cache(maxsize=None)
def talkative(seed, **options):
    """The first of many random models that writes words early, late, and under a beam."""
    for offset in range(100 * seed, 100 * seed + 100):
        model, samples = random_model(offset, torch.float32, **options), noise(N)
        begun = Streamer(model, TOKENIZER, chunk=4, limits=LIMITS).accept(samples[:9600])
        if len(begun) > 3 and len(run(model, samples, limits=LIMITS)[0]) > 12 and (
                len(run(model, samples, beam=3, limits=LIMITS)[0]) > 5):
            return offset
    raise AssertionError("no random model writes words")


def random_model(seed, dtype, **options):
    torch.manual_seed(seed)
    options = {
        "vocab": len(TOKENIZER),
        "layers": 2,
        "dropout": 0.0,
        "left_frames": 16,
        "label_layers": 1,
        "label_context": 16,
        "joint_dim": 160,
        "chunks": (8, 4, 16, 32),
        "kernel": 0,
        **options,
    }
    model = Transducer(replace(PRESETS["tiny"], **options)).eval().to(dtype)
    mel = log_mel(pad_samples(torch.from_numpy(noise(64000)).to(dtype), 4))[None]
    bias, low, high = model.joint.output.bias, -30.0, 30.0
    with torch.no_grad():
        model.joint.output.weight *= 12
        model.joint.label_proj.weight *= (
            0.3  # mostly the frames decide, or the same labels come for ever
        )
        bias[
            [t for t in range(3, len(TOKENIZER)) if not set(TOKENIZER.pieces[t]) <= set(b" laeiou")]
        ] = -100
        for _ in range(12):  # bisection: the larger the bias of blank, the fewer labels
            bias[0] = (low + high) / 2
            many = len(greedy_batch(model, mel, [mel.shape[1]], limits=(3, 3))[0][0]) > 40
            low, high = (bias[0].item(), high) if many else (low, bias[0].item())
    return model


def noise(n, seed=0):
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.uniform(0.001, 0.3, n // 800 + 1), 800)[:n]
    return (rng.normal(size=n) * level).astype(np.float32)


def close_to(words):
    """Words without the clock, probabilities to nine digits: for sums in another order."""
    return [replace(word, elapsed_ms=0, confidence=round(word.confidence, 9)) for word in words]


def run(model, samples, packets=None, **options):
    """Everything a stream gives but the clock: words, exact score, capped."""
    streamer, words, start = Streamer(model, TOKENIZER, **options), [], 0
    for packet in packets or [len(samples)]:
        words += streamer.accept(samples[start:start + packet])
        start += packet
    words += streamer.accept(samples[start:]) + streamer.flush()
    return [replace(w, elapsed_ms=0) for w in words], streamer.search.score, streamer.search.capped


# ---- Exactness -----------------------------------------------------------------------------------

N = 16000 * 3 + 77  # ends inside a frame
LIMITS = (3, 10)    # random weights would write up to the default limit of 500 in most last frames


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("label_encoder", ["transformer", "lstm"])
def test_packets_change_nothing(beam, label_encoder):
    """Words, delays, times and the score itself are equal to the last bit, whatever the packets."""
    model, samples = lively(label_encoder=label_encoder, kernel=15), noise(N)
    chunk = model.config.chunks[0] * 640
    whole = run(model, samples, beam=beam, limits=LIMITS)
    assert len(whole[0]) > 5
    rng = np.random.default_rng(1)
    for packets in (
        [1] * N,
        [7] * (N // 7),
        [160] * (N // 160),
        [4000] * (N // 4000),
        [chunk] * (N // chunk),
        [chunk * 7 // 2] * 2,
        rng.integers(0, 3000, 20).tolist(),
    ):
        assert run(model, samples, packets, beam=beam, limits=LIMITS) == whole


def frames_of(model, samples, chunk, tokenizer=TOKENIZER):
    """The encoder frames that a stream computes, (T, D)."""
    streamer, seen = Streamer(model, tokenizer, chunk=chunk, limits=LIMITS), []
    hook = model.joint.encoder_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    streamer.accept(samples), streamer.flush()
    hook.remove()
    return torch.cat(seen, 1)[0]


@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_streaming_equals_the_masked_encoder(dtype, near):
    """Any chunk size, audio cut at any sample: the frames of the offline encoder, and its
    tokens."""
    model = lively(seed=2, dtype=dtype, kernel=15)
    rng = np.random.default_rng(2)
    for chunk, n in itertools.product(
        [1, 4, 16, 0], [N, 40000, 40000 + 239, 40000 + 241, 17, int(rng.integers(1, N))]
    ):
        samples = noise(n)
        mel = log_mel(pad_samples(torch.from_numpy(samples).to(dtype), 4))[None]
        offline = model.encoder(mel, chunk=chunk)[0][0]
        scale = max(1.0, offline.abs().max().item())
        assert (frames_of(model, samples, chunk) - offline).abs().max() <= near * scale
        # the control: one frame more of context shows
        wider = model.encoder(mel, chunk=chunk + 1)[0][0]
        if chunk and len(offline) > chunk:
            assert (wider - offline).abs().max() > 1000 * near


@pytest.mark.parametrize("beam, chunk", [(1, 8), (3, 8), (1, 0)])
def test_the_tail_is_silence_behind_the_end(beam, chunk):
    """The words of the same sound with so many zeros behind it; but nothing lies beyond the end:
    not the sound that a word needed, not the time at which it is said. Packets change nothing."""
    model, samples, tail = lively(kernel=15), noise(N), 0.5
    how = dict(beam=beam, chunk=chunk, limits=LIMITS)
    longer = np.concatenate([samples, np.zeros(round(tail * 16000), np.float32)])
    words, score, capped = run(model, samples, tail=tail, **how)
    wanted, *others = run(model, longer, **how)
    assert [score, capped] == others and score != run(model, samples, **how)[1]
    cut = [replace(word, delay_ms=min(word.delay_ms, N / 16), start_s=min(word.start_s, N / 16000),
                   end_s=min(word.end_s, N / 16000)) for word in wanted]
    assert words == cut and len(words) > 5 and (chunk or cut != wanted)
    assert run(model, samples, [777] * (N // 777), tail=tail, **how) == (words, score, capped)


@pytest.mark.parametrize("tail", ["x", None, -0.1, 61, float("nan")])
def test_a_tail_that_is_none_is_refused(tail):
    with pytest.raises(stream.InputError, match=f"tail {tail!r} must be a number of seconds from"):
        Streamer(lively(), TOKENIZER, tail=tail)


trained = pytest.mark.skipif("CHECKPOINT" not in os.environ,
                             reason="a trained model: CHECKPOINT=runs/de-en/model.pt pytest")


@trained
@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_trained_checkpoint_is_exact(dtype, near):
    """Packets bit for bit, frames as offline, and the same words at either precision, on speech."""
    model, beside = load(os.environ["CHECKPOINT"])
    tokenizer, items = Tokenizer.from_dict(beside["tokenizer"]), train.BuiltIn("de-en", 0).unseen(8)
    double, _ = load(os.environ["CHECKPOINT"])
    double.double()
    model = double if dtype == torch.float64 else model

    def words(model, samples, step, chunk):
        streamer = Streamer(model, tokenizer, chunk=chunk)
        found = [
            w for k in range(0, len(samples), step) for w in streamer.accept(samples[k : k + step])
        ]
        return [replace(w, elapsed_ms=0) for w in found + streamer.flush()], streamer.search.score
    for chunk, (_, samples) in itertools.product((*model.config.chunks, 0), items):
        whole = words(model, samples, len(samples), chunk)
        assert words(model, samples, 777, chunk) == whole and len(whole[0]) > 3
        others = words(double, samples, len(samples), chunk)[0]
        assert [(w.text, w.delay_ms) for w in others] == [(w.text, w.delay_ms) for w in whole[0]]
        mel = log_mel(pad_samples(torch.from_numpy(samples).to(dtype), 4))[None]
        offline = model.encoder(mel, chunk=chunk)[0][0]
        error = (frames_of(model, samples, chunk, tokenizer) - offline).abs().max()
        assert error <= near * max(1.0, offline.abs().max().item())


@trained
def test_silence_before_and_behind_costs_no_word():
    """5 s of it before and after the speech, or none at all behind its last word: no more errors
    than without, but for one in fifty words."""
    model, tokenizer, beside = stream.load_run(os.environ["CHECKPOINT"])
    silence, errors, n_words = np.zeros(5 * 16000, np.float32), np.zeros(3, int), 0
    for row, samples in train.BuiltIn("de-en", 0).unseen(30):
        hard_end = samples[:round(row.times[-1] * 16000)]
        wanted = {"<asr>": row.asr.split(), "<st:en>": row.st["en"].split()}
        n_words += sum(map(len, wanted.values()))
        kinds = samples, np.concatenate([silence, samples, silence]), hard_end
        for k, heard in enumerate(kinds):
            streamer = Streamer(model, tokenizer, **stream.own_search(beside))
            words = stream.words_of(streamer.accept(heard) + streamer.flush())
            errors[k] += sum(
                stream.edit_distance(text, [word.text for word in words if word.stream == tag])
                for tag, text in wanted.items())
    assert n_words > 300 and errors.max() <= errors[0] + 0.02 * n_words, (errors, n_words)


def test_batch_equals_single():
    """Batched greedy over padded utterances gives each the tokens and frames of its own stream."""
    model = lively(seed=0, dtype=torch.float64)
    items = [
        (Row(id=str(k), audio="x", asr="la la"), noise(n, k))
        for k, n in enumerate([N, 30001, 1, 16000, 9999])
    ]
    _, many = evaluate(model, TOKENIZER, items, batch_size=5)
    _, single = evaluate(model, TOKENIZER, items, batch_size=1)
    assert sum(len(row["words"]) for row in many) > 10
    for a, b in zip(many, single):
        assert close_to(a["words"]) == close_to(b["words"])


def test_many_streams_in_one_batch():
    """Sixteen streams, stepped together in packets of their own, give the words of each alone."""
    model = lively(seed=0, dtype=torch.float64)
    audio = [noise(20000 + 1111 * k, k) for k in range(16)]
    alone = [run(model, samples, limits=LIMITS) for samples in audio]
    streamers = [Streamer(model, TOKENIZER, limits=LIMITS) for _ in audio]
    words, rng = [[] for _ in audio], np.random.default_rng(0)
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
        assert close_to(mine) == close_to(expected)
        assert streamer.search.score == pytest.approx(score, abs=1e-9)


def test_streams_of_two_models_are_computed_by_their_own():
    models = [lively(seed=seed, dtype=torch.float64) for seed in (0, 2)]
    alone = [close_to(run(model, noise(N), limits=LIMITS)[0]) for model in models]
    assert alone[0] != alone[1] and all(alone)
    streamers = [Streamer(model, TOKENIZER, limits=LIMITS) for model in models]
    for streamer in streamers:
        streamer.push(noise(N))
    words = [mine + streamer.flush() for streamer, mine in zip(streamers, advance(streamers))]
    assert [close_to(mine) for mine in words] == alone


def test_state_keeps_its_shape():
    model = lively()
    streamer = Streamer(model, TOKENIZER)
    shapes = set()
    for k in range(40):
        streamer.accept(noise(5120, k))
        tensors = [
            *streamer.encoder_state.tensors().values(),
            *streamer.search.labels.state.tensors().values(),
        ]
        shapes.add(tuple(x.shape for x in tensors))
        assert (
            sum(len(part.base if part.base is not None else part) for part in streamer.waiting)
            <= 2 * 5120 + 480
        )
    assert len(shapes) == 1


def test_a_burst_of_garbage_is_forgotten():
    """Whatever was heard, the encoder knows nothing of it once it lies further back than all layers
    together see; in the middle of it, as a control, it does."""
    model, rng = lively(), np.random.default_rng(0)
    before, after, n = noise(10240, 1), noise(4 * 16000, 2), 4 * 5120
    garbage = [np.zeros(n), np.clip(50 * noise(n, 3), -1, 1), np.sign(rng.normal(size=n)),
               np.full(n, 10.0), rng.uniform(-10, 10, n) * (rng.random(n) < 0.01)]
    states = []
    for burst in garbage:
        streamer, heard = Streamer(model, TOKENIZER, limits=LIMITS), []
        for part in (before, burst, after):
            while len(part):
                size = int(rng.integers(0, 3000))
                streamer.accept(part[:size].astype(np.float32))
                part = part[size:]
            heard.append(streamer.encoder_state)
        states.append(heard)
    for _, during, end in states[1:]:
        for name, wanted in states[0][2].tensors().items():
            assert torch.allclose(end.tensors()[name], wanted, atol=1e-5), name
        assert not torch.allclose(during.keys, states[0][1].keys, atol=1e-2)


# ---- Search --------------------------------------------------------------------------------------

def lattice(model, samples, ids, chunk=None):
    """Log-probabilities (T, U1, V) of the training forward, the labels given."""
    dtype = model.joint.output.weight.dtype
    frames, _ = model.encoder(
        log_mel(pad_samples(torch.from_numpy(samples).to(dtype), 4))[None], chunk=chunk
    )
    return model.joint(frames, model.label_encoder(torch.tensor([ids]))[0])[0].log_softmax(-1)


def path_score(log_probs, ids, at):
    """Follow the path: label u at frame at[u], blank once at the end of every frame."""
    total = sum(log_probs[t, u, token].item() for u, (token, t) in enumerate(zip(ids, at)))
    return total + sum(
        log_probs[t, sum(a <= t for a in at), 0].item() for t in range(len(log_probs))
    )


def tokens_of(model, samples, beam=None, **options):
    """What the search wrote, as ids and frames from the start of the stream."""
    streamer, found = Streamer(model, TOKENIZER, **options), []
    streamer.search = beam or streamer.search
    streamer.events = lambda tokens, final: found.extend(tokens) or []
    streamer.accept(samples), streamer.flush()
    return streamer.search, [(written.token, written.frame) for written in found]


@pytest.mark.parametrize("label_encoder", ["transformer", "lstm"])
def test_greedy_score_is_the_training_score(label_encoder):
    """Chunks, windows and caches: the score collected is that of the same path in one training
    forward."""
    model, samples = lively(seed=0, dtype=torch.float64, label_encoder=label_encoder), noise(N)
    search, path = tokens_of(model, samples, limits=LIMITS)
    ids, at = zip(*path)
    assert len(ids) > 20 and search.capped > 0
    log_probs = lattice(model, samples, ids)
    assert search.score == pytest.approx(path_score(log_probs, ids, at), abs=1e-8)
    for t, u, token in [(t, u, token) for u, (token, t) in enumerate(zip(ids, at))]:
        assert log_probs[t, u].argmax() == token
    # one path of all that write the same labels
    assert (
        search.score
        <= -rnnt_loss_reference(
            model.joint(
                model.encoder(log_mel(pad_samples(torch.from_numpy(samples).double(), 4))[None])[0],
                model.label_encoder(torch.tensor([ids]))[0],
            ),
            torch.tensor([ids]),
            torch.tensor([len(log_probs)]),
            torch.tensor([len(ids)]),
            blank=0,
        ).item()
        + 1e-8
    )


@pytest.mark.parametrize("chunk", [None, 3, 0])
def test_offline_batch_gives_the_tokens_of_streaming(chunk):
    """Padded utterances in one offline batch: for each the ids and the frames that streaming it
    alone gives."""
    model = lively(seed=2, dtype=torch.float64)
    audio = [noise(n, k) for k, n in enumerate([N, 20001, 700, 33000])]
    mels = [log_mel(pad_samples(torch.from_numpy(samples).double(), 4)) for samples in audio]
    mel = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)
    found = greedy_batch(model, mel, [len(one) for one in mels], chunk=chunk, limits=LIMITS)
    for samples, (ids, at) in zip(audio, found):
        assert list(zip(ids, at)) == tokens_of(model, samples, chunk=chunk, limits=LIMITS)[1]
    assert sum(len(ids) for ids, _ in found) > 50


def test_a_blank_penalty_and_a_hold_reach_the_beam():
    model, samples = lively(seed=2, dtype=torch.float64), noise(N)
    greedy, path = tokens_of(model, samples, limits=LIMITS, blank_penalty=3.0)
    beam, other = tokens_of(model, samples, stream.Beam(model, 1, LIMITS, blank_penalty=3.0))
    assert other == path != tokens_of(model, samples, limits=LIMITS)[1]
    assert beam.score == pytest.approx(greedy.score, abs=1e-9)
    found = stream.new_search(model, 8, beam=2, blank_penalty=3.0, hold=7)
    assert (found.blank_penalty, found.hold) == (3.0, 7)


def test_a_beam_is_quiet_since_the_last_token_that_it_showed():
    streamer = Streamer(lively(), TOKENIZER, pause=1.0, beam=2)    # 25 frames
    streamer.search.done, streamer.search.shown_at, streamer.in_utterance = 50, 44, True
    assert streamer.search.quiet == 5 and streamer.events([], False) == []
    streamer.search.done = 70
    pause, = streamer.events([], False)
    assert isinstance(pause, stream.Pause) and streamer.search.quiet == 25


def test_a_beam_has_held_a_token_since_it_came_to_stay():
    beam = stream.Beam(lively(), 2, hold=3)
    for done, tokens, since in ((4, (1,), [4]), (6, (1, 2), [4, 6]), (9, (1, 3), [4, 9])):
        beam.done, beam.hyps = done, [replace(beam.hyps[0], tokens=tokens)]
        beam.follow_leader()
        assert beam.held_since == since


def test_a_greedy_search_knows_how_long_it_was_quiet():
    search = stream.Greedy(lively())
    for tokens, quiet in (([stream.Written(5, 3, -0.1)], 4), ([], 12), ([], 20),
                          ([stream.Written(5, 29, -0.1)], 2)):
        search.tokens = tokens
        search.end_call(search.labels, 8)
        assert search.quiet == quiet
    assert search.done == 32


def test_beam_of_one_is_greedy():
    model, samples = lively(seed=2, dtype=torch.float64), noise(N)
    greedy, path = tokens_of(model, samples, limits=LIMITS)
    beam, other = tokens_of(model, samples, stream.Beam(model, 1, LIMITS))
    assert other == path and beam.capped == greedy.capped > 0
    assert beam.score == pytest.approx(greedy.score, abs=1e-9)


def test_exhaustive_beam_equals_brute_force():
    """With room for every hypothesis, each label string has the probability that the RNN-T loss
    gives it."""
    torch.manual_seed(0)
    model = Transducer(replace(PRESETS["tiny"], vocab=3, layers=1, dropout=0.0)).eval().double()
    with torch.no_grad():
        model.joint.output.weight *= 8
    frames, longest = torch.randn(1, 3, 144, dtype=torch.float64), 3
    beam = stream.Beam(model, 2000, (longest, longest), hold=None)
    with torch.inference_mode():
        for frame in model.joint.encoder_proj(frames[0]):
            beam.one_frame(frame, longest)
    assert len(beam.hyps) == 2 ** (3 * longest + 1) - 1
    found = {hyp.tokens: hyp.score for hyp in beam.hyps}
    strings = [s for n in range(longest + 1) for s in itertools.product([1, 2], repeat=n)]
    for (
        labels
    ) in strings:  # up to `longest` labels, so that the limit per frame forbids none of their paths
        ids = torch.tensor([labels], dtype=torch.long).view(1, -1)
        logits = model.joint(frames, model.label_encoder(ids)[0])
        loss = rnnt_loss_reference(
            logits, ids, torch.tensor([3]), torch.tensor([len(labels)]), blank=0
        )
        assert found[labels] == pytest.approx(-loss.item(), abs=1e-9)


def test_larger_beams_find_no_worse():
    scores = [
        np.mean(
            [run(lively(seed=2), noise(24000, k), beam=beam, limits=LIMITS)[1] for k in range(6)]
        )
        for beam in (1, 2, 4, 8)
    ]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 1


def test_caps_are_counted():
    """A model that never takes blank writes its limit in every frame, and that many frames are
    counted."""
    model = lively(seed=3)
    bias, keep = model.joint.output.bias, model.joint.output.bias[0].item()
    with torch.no_grad():
        bias[0] = -1000.0
    try:
        for beam in (1, 2):
            search, path = tokens_of(model, noise(16000), limits=(4, 7), beam=None if beam == 1 else
                                     stream.Beam(model, beam, (4, 7)))
            assert len(path) == 24 * 4 + 7 and search.capped == 25
        search, path = tokens_of(model, noise(16000))          # the command's own limits
        assert len(path) == 24 * 20 + 500 and search.capped == 25
    finally:
        with torch.no_grad():
            bias[0] = keep


# ---- Words and their times -----------------------------------------------------------------------

def test_a_word_is_delayed_by_the_audio_it_needs():
    """The chunk's last window ends 240 samples after the chunk, and never after the end of the
    audio."""
    model, samples, written = lively(seed=2), noise(9600 + 5), 0
    for chunk in (1, 4, 8):
        streamer, used = Streamer(model, TOKENIZER, chunk=chunk, limits=LIMITS), 0
        for k in range(len(samples)):
            for word in streamer.accept(
                samples[k : k + 1]
            ):  # it comes with exactly the sample that completes the chunk
                written += 1
                assert word.delay_ms == (k + 1) / 16 == (used + chunk * 640 + 240) / 16
                assert word.start_s < word.end_s <= word.delay_ms / 1000
                assert word.delay_ms <= word.elapsed_ms
            if k + 1 == used + chunk * 640 + 240:
                used += chunk * 640
        for word in streamer.flush():
            assert word.delay_ms == len(samples) / 16
    assert written > 10


def test_elapsed_waits_for_the_audio_and_for_the_step_before(monkeypatch):
    """elapsed = max(arrival of the audio, end of the previous step) + computing time; here every
    step takes 500 ms."""
    clock = itertools.count()
    monkeypatch.setattr(stream.time, "perf_counter", lambda: next(clock) * 0.5)
    streamer = Streamer(lively(), TOKENIZER, limits=LIMITS)
    words = streamer.accept(noise(16000)) + streamer.flush()
    ends = dict.fromkeys((word.delay_ms, word.elapsed_ms) for word in words)
    assert (
        set(ends) <= {(335.0, 835.0), (655.0, 1335.0), (975.0, 1835.0), (1000.0, 2335.0)}
        and len(ends) > 2
    )


# source ms, delays, elapsed, reference; scored by SimulEval 1.1.4 and OmniSTEval, see below
PLANTED = [
    (
        3200.0,
        [655.0, 655.0, 1295.0, 2575.0, 3200.0, 3200.0],
        [670.5, 670.5, 1309.25, 2590.0, 3213.0, 3213.0],
        "a b c d e f",
    ),
    (2500.5, [335.0, 655.0, 975.0], [351.0, 670.0, 990.0], "a b c d e"),
    (
        1800.0,
        [975.0, 1295.0, 1295.0, 1615.0, 1800.0, 1800.0],
        [985.0, 1304.0, 1304.0, 1830.0, 1841.0, 1841.0],
        "a b c",
    ),
    (900.0, [900.0, 900.0], [935.0, 935.0], "a b"),
    (700.0, [], [], "a b c"),
    (5000.0, [1295.0], [1400.0], "a"),
]


def planted_records():
    return [
        {
            "id": str(k),
            "audio": f"{k}.wav",
            "duration_ms": source,
            "seconds": 0.1,
            "references": {"<asr>": ref.split()},
            "words": [
                Word("<asr>", "abcdef"[i], d, 0.0, 0.0, e)
                for i, (d, e) in enumerate(zip(delays, elapsed))
            ],
        }
        for k, (source, delays, elapsed, ref) in enumerate(PLANTED)
    ]


def test_latency_equals_simuleval_and_omnisteval(tmp_path):
    """The log below, given to `simuleval --score-only` and to `omnisteval shortform`, has these
    figures (in ms)."""
    records = planted_records()
    metrics = stream.summarise(records, ["<asr>", "<st:en>"])
    figures = metrics["<asr>"]
    assert list(metrics) == ["<asr>"] and figures["silent"] == 1 and figures["utterances"] == 6
    assert figures["al_ms"] == pytest.approx(631.047, abs=1e-3)      # both tools
    assert figures["laal_ms"] == pytest.approx(751.047, abs=1e-3)
    assert figures["al_ca_ms"] == pytest.approx(716.993, abs=1e-3)
    assert figures["laal_ca_ms"] == pytest.approx(806.993, abs=1e-3)
    assert figures["bleu"] == pytest.approx(60.839, abs=1e-3)
    assert figures["chrf"] == pytest.approx(75.8014, abs=1e-4)
    stream.write_logs(tmp_path, records, metrics)
    lines = [json.loads(line) for line in open(tmp_path / "asr" / "instances.log")]
    assert [line["index"] for line in lines] == list(range(6))
    assert lines[1] == {
        "index": 1,
        "prediction": "a b c",
        "delays": [335.0, 655.0, 975.0],
        "elapsed": [351.0, 670.0, 990.0],
        "prediction_length": 3,
        "reference": "a b c d e",
        "source": ["1.wav"],
        "source_length": 2500.5,
    }
    assert (
        tmp_path / "asr" / "config.yaml"
    ).read_text() == "source_type: speech\ntarget_type: text\n"
    assert json.loads((tmp_path / "metrics.json").read_text())["<asr>"]["silent"] == 1


def test_latency_of_known_speech():
    """Ten words in 5 s, each written at its end: LAAL 500 ms; with chunks of a second, 778 ms."""
    ends = [500.0 * (k + 1) for k in range(10)]
    assert latency(ends, 5000.0, 10)[1] == pytest.approx(500)
    assert latency([1000.0 * math.ceil(end / 1000) for end in ends], 5000.0, 10)[
        1
    ] == pytest.approx(777.7, abs=0.1)
    assert latency([6000.0, 6500.0], 5000.0, 2) == (6000.0, 6000.0)
    # twice as many words as there should be: AL is fooled, LAAL is not
    al, laal = latency([100.0] * 4, 1000.0, 2)
    assert al == pytest.approx(-650) and laal == pytest.approx(-275)


@pytest.mark.parametrize("seed", range(5))
def test_edit_distance(seed):
    def plain(a, b):  # the definition
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        a, b = ("".join(rng.choice(list("abc"), size=rng.integers(0, 6))) for _ in range(2))
        assert edit_distance(a, b) == plain(a, b) == edit_distance(list(b), list(a))


def test_scores_and_intervals():
    """10 wrong words of 40 in every second utterance: 12.5 % overall, and an interval of the right
    width."""
    def record(k):
        wrong = 10 * (k % 2)
        words = [
            Word("<st:en>", f"no{i}" if i < wrong else f"W{i},", 100.0, 0.0, 0.1, 120.0)
            for i in range(40)
        ]
        return {
            "references": {"<st:en>": [f"W{i}," for i in range(40)]},
            "words": words,
            "duration_ms": 1000.0,
            "seconds": 0.02,
        }
    figures = stream.summarise(
        [record(k) for k in range(100)], ["<asr>", "<st:en>"], bootstrap=1000
    )["<st:en>"]
    assert figures["wer"] == 12.5 and figures["silent"] == 0
    low, high = figures["bleu_95"]    # 12.5 +- 2.5 % of the words are wrong: BLEU 84, +- 3
    assert 4 < high - low < 9
    half = 1.96 * 12.5 / 10  # of a mean of 100 draws of 0 or 25
    assert figures["wer_95"] == pytest.approx([12.5 - half, 12.5 + half], abs=0.5)
    assert (
        figures["bleu_95"][0] < figures["bleu"] < figures["bleu_95"][1]
        and "nrefs:1" in figures["bleu_signature"]
    )
    assert figures["real_time_factor"] == pytest.approx(0.02)
    clean = [{"references": {"<asr>": ["Ja,", "-", "GUT."]}, "duration_ms": 9.0, "seconds": 0.1,
              "words": [Word("<asr>", w, 1, 1, 1, 1) for w in ("ja", "gut")]}]
    figures = stream.summarise(clean, ["<asr>"])["<asr>"]
    assert figures["wer"] == 100 and figures["wer_norm"] == 0 == figures["cer_norm"]


# ---- The command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, three recordings and their manifest, one row of which has no audio."""
    folder = tmp_path_factory.mktemp("stream")
    # 5 is the first that did where this was written; each takes seconds to be tried.
    model = next(model for model in map(lively, (5, *range(2, 40))) if writes_all(model))
    save(folder / "model.pt", model, tokenizer=TOKENIZER.to_dict(), mode="align")
    rows = []
    for k in range(3):
        soundfile.write(
            folder / f"{k}.wav", noise(20000 + 9000 * k, k) * 0.5, 16000, subtype="PCM_16"
        )
        rows.append(
            {"id": str(k), "audio": f"{k}.wav", "asr": "la le li lo", "st": {"en": "la lu"}}
        )
    rows.append({"id": "gone", "audio": "gone.wav", "asr": "la"})
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def writes_all(model):
    """Both streams somewhere, and in the last recording words on the way and at its end; also with
    the command's own limits."""
    recordings = [
        np.rint(noise(20000 + 9000 * k, k) * 0.5 * 32767).astype(np.float32) / 32768
        for k in range(3)
    ]
    for limits in (LIMITS, stream.LIMITS):
        words = [run(model, samples, limits=limits)[0] for samples in recordings]
        delays = {word.delay_ms for word in words[2]}
        if (
            {word.stream for own in words for word in own} < {"<asr>", "<st:en>"}
            or 38000 / 16 not in delays
            or (not any(1500 < delay < 38000 / 16 for delay in delays))
        ):
            return False
    return True


def pcm(folder):
    return soundfile.read(folder / "2.wav", dtype="int16")[0].tobytes()


def captions(folder, capsys, monkeypatch, source, *more, data=b""):
    """Run the command in this process; returns its exit code, standard output and error."""
    class Pipe(io.BytesIO):
        def read1(self, _=-1):
            return super().read1(333)  # an odd number of bytes, as pipes give them
    monkeypatch.setattr(stream.sys, "stdin", types.SimpleNamespace(buffer=Pipe(data)))
    code = stream.main([str(folder / "model.pt"), source, *more])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_line_of_wide_characters_has_42_columns(tmp_path):
    words = [("\u6211", 0.1 * k, 0.1 * k + 0.1) for k in range(30)]
    assert cues(tmp_path / "a", words) == (
        "1\n00:00:00,000 --> 00:00:03,000\n" + "\u6211" * 21 + "\n" + "\u6211" * 9 + "\n\n")


def test_cues_pause_as_the_command_is_told(folder, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(stream, "opened_tracks",
                        lambda planned, pause: asked.append(pause) or nullcontext([]))
    command = [str(folder / "model.pt"), str(folder / "2.wav"), "--srt", str(tmp_path / "x.srt")]
    assert stream.main([*command, "--pause", "2.5"]) == 0 == stream.main(command)
    assert asked == [2.5, 1.0]


def test_an_evaluation_stays_in_its_folder(folder, tmp_path, capsys):
    row = {"id": "a", "audio": str(folder / "0.wav"), "asr": "la"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    assert stream.main([str(folder / "model.pt"), "--eval", str(tmp_path / "m.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "--allow-outside permits that" in err and "no usable row" in err


def test_logs_do_not_replace_a_runs_own_history(folder, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text('[{"step": 9}]')
    command = [str(folder / "model.pt"), "--eval", str(folder / "set.jsonl"), "--log"]
    assert stream.main([*command, str(tmp_path)]) == 2
    assert "the folder of a training" in capsys.readouterr().err
    assert (tmp_path / "metrics.json").read_text() == '[{"step": 9}]'


def test_a_full_disk_ends_the_subtitles_and_not_the_captions(folder, capsys, monkeypatch, tmp_path):
    code, whole, _ = captions(folder, capsys, monkeypatch, str(folder / "2.wav"), "--json")
    real, calls = stream.Subtitles.add, []

    def full(track, word):
        calls.append(word)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(stream.Subtitles, "add", full)
    code, out, err = captions(folder, capsys, monkeypatch, str(folder / "2.wav"), "--json",
                              "--srt", str(tmp_path / "x.srt"))
    assert code == 2 and "x.asr.srt" in err and err.count("No space left") == 2     # two tracks
    texts = [[json.loads(line).get("text") for line in said.splitlines()] for said in (whole, out)]
    assert texts[0] == texts[1] and len(calls) == 2            # one of each stream


def test_a_screen_that_takes_no_more_costs_no_subtitles(folder, capsys, monkeypatch, tmp_path):
    def full(events):
        if events:
            raise OSError(28, "No space left on device")
    _, whole, _ = captions(folder, capsys, monkeypatch, str(folder / "2.wav"), "--srt",
                           str(tmp_path / "x.srt"))
    tracks = {path: path.read_text() for path in tmp_path.iterdir()}
    monkeypatch.setattr(stream, "show_lines", full)
    monkeypatch.setattr(stream, "discard", lambda file: None)
    code, _, err = captions(folder, capsys, monkeypatch, str(folder / "2.wav"), "--srt",
                            str(tmp_path / "x.srt"))
    assert whole and code == 2 and "standard output: No space left on device; the sub" in err
    assert {path: path.read_text() for path in tmp_path.iterdir()} == tracks and len(tracks) == 2
    assert captions(folder, capsys, monkeypatch, str(folder / "2.wav"))[0] == 2


@pytest.mark.parametrize("error, code", [(MemoryError(), 2), (RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), 2)])
def test_too_little_memory_is_told(folder, capsys, monkeypatch, error, code):
    def fails(*args):
        raise error
    monkeypatch.setattr(stream, "caption", fails)
    command = [str(folder / "model.pt"), str(folder / "2.wav")]
    assert stream.main(command) == code and "takes less" in capsys.readouterr().err
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")       # a mistake in the code
    with pytest.raises(RuntimeError, match="mat1"):
        stream.main(command)


def test_malformed_output_stands_in_the_figures():
    record = planted_records()[0] | {"invalid": {"<asr>": 2, "<st:en>": 7}, "cut": {"<asr>": 3},
                                     "broken_off": True}
    figures = stream.summarise([record, record, planted_records()[1]], ["<asr>"])["<asr>"]
    assert (figures["invalid"], figures["cut"], figures["broken_off"]) == (4, 6, 2)


def test_long_streams_stand_under_their_name(monkeypatch, capsys):
    import long_streams
    asked, rest = {}, dict(cer=1.0, bleu=None, chrf=None, laal_ms=None, silent=0)
    alone, joined = {"<asr>": {"wer": 10.0} | rest}, {"<asr>": {"wer": 20.0} | rest}
    monkeypatch.setattr(long_streams, "compare", lambda m, t, items, seconds, **how: asked.update(
        how, seconds=seconds) or (1, alone, joined))
    monkeypatch.setattr(long_streams, "load_run", lambda path: (None, TOKENIZER, {"tail": 0.32}))
    monkeypatch.setattr(long_streams, "read_manifest", lambda *_, **__: [])
    monkeypatch.setattr(long_streams, "readable", lambda rows: [])
    monkeypatch.setattr(sys, "argv", "x m.pt m.jsonl --seconds 60 --chunk 8".split())
    long_streams.main()
    assert ["<asr>", "wer", "10.0", "20.0"] in map(str.split, capsys.readouterr().out.splitlines())
    assert (asked["seconds"], asked["chunk"], asked["tail"]) == (60, 8, 0.32)


def test_vtt_is_webvtt_and_srt_is_not(folder, capsys, monkeypatch, tmp_path):
    more = "--srt", str(tmp_path / "x.srt"), "--vtt", str(tmp_path / "x.vtt")
    assert captions(folder, capsys, monkeypatch, str(folder / "2.wav"), *more)[0] == 0
    for tag in ("asr", "st-en"):
        srt, vtt = ((tmp_path / f"x.{tag}.{kind}").read_text("utf-8") for kind in ("srt", "vtt"))
        assert vtt.startswith("WEBVTT\n\n") and "WEBVTT" not in srt
        times = re.findall(r"\d\d:\d\d:\d\d,\d{3} --> .*", srt)
        assert times and re.findall(r".* --> .*", vtt) == [t.replace(",", ".") for t in times]


def test_captions(folder, capsys, monkeypatch):
    """File and pipe give the same lines; an odd last byte is dropped; --json has every field of
    every word."""
    code, lines, _ = captions(folder, capsys, monkeypatch, str(folder / "2.wav"))
    assert code == 0 and len(lines.splitlines()) > 3 and "<asr>" in lines and "\x1b" not in lines
    assert captions(folder, capsys, monkeypatch, "-", data=pcm(folder) + b"\x01")[:2] == (0, lines)
    code, events, _ = captions(folder, capsys, monkeypatch, str(folder / "2.wav"), "--json")
    words = [json.loads(line) for line in events.splitlines() if '"event": "word"' in line]
    assert code == 0 and sum(len(line.split()) - 3 for line in lines.splitlines()) == len(words)
    assert set(words[0]) == {"event", *asdict(Word("", "", 0, 0, 0, 0))}


def test_captions_grow_in_place(monkeypatch, capsys):
    """A terminal of 30 columns, played back: a full line stays, and the next words begin a block
    below."""
    monkeypatch.setattr(stream.shutil, "get_terminal_size", lambda *_: os.terminal_size((30, 24)))
    terminal = stream.Terminal(["<asr>", "<st:en>"])
    for k, text in enumerate(["ich", "habe", "e\u0301te\u0301", "gekauft\x1b[2J", "was?"]):
        terminal([Word("<asr>", text, 0, 0, 0, 0)] + [Word("<st:en>", "I", 0, 0, 0, 0)] * (k == 0))
    screen, row = {}, 0
    for part in re.split(r"(\x1b\[\d+F|\n)", capsys.readouterr().out):
        if re.fullmatch(r"\x1b\[\d+F", part):
            row -= int(part[2:-1])
        elif part == "\n":
            row += 1
        elif part:
            assert part.startswith("\x1b[2K")
            screen[row] = re.sub(r"\x1b\[\d*[Km]", "", part).rstrip()
    assert screen == {0: "<asr>    ich habe e\u0301te\u0301", 1: "<st:en>  I",
                      2: "<asr>    gekauft\ufffd[2J was?", 3: "<st:en>"}


def test_a_message_amid_the_captions_stays_on_the_screen(monkeypatch, capsys):
    """Fresh lines begin below it; before, the cursor went up too few lines, and wrote over it."""
    monkeypatch.setattr(stream.shutil, "get_terminal_size", lambda *_: os.terminal_size((30, 24)))
    terminal = stream.Terminal(["<asr>", "<st:en>"])
    terminal([Word("<asr>", "a", 0, 0, 0, 0)])
    terminal([Word("<asr>", "b", 0, 0, 0, 0)])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)    # not into a file
    stream.say("mic: some sound was lost")
    capsys.readouterr()
    terminal([Word("<asr>", "c", 0, 0, 0, 0)])
    terminal([Word("<asr>", "d", 0, 0, 0, 0)])
    out = capsys.readouterr().out
    assert out.count("\x1b[2F") == 1 and not out.startswith("\x1b[2F") and "a b c d" in out


def test_lines_have_the_time_of_their_chunk_and_long_tags_their_room(monkeypatch, capsys):
    said = [("<asr>", "a", 640), ("<st:pt-BR>", "b", 640), ("<asr>", "c", 1280)]
    stream.show_lines([Word(tag, text, ms, 0, 0, 0) for tag, text, ms in said])
    assert capsys.readouterr().out.splitlines() == [
        "    0.64 s  <asr>    a", "    0.64 s  <st:pt-BR> b", "    1.28 s  <asr>    c"]
    monkeypatch.setattr(stream.shutil, "get_terminal_size", lambda *_: os.terminal_size((20, 24)))
    terminal = stream.Terminal(["<asr>", "<st:pt-BR>"])
    terminal([Word("<st:pt-BR>", "abcdefghijklm", 0, 0, 0, 0)])
    rows = re.sub(r"\x1b\[\d*[Km]", "", capsys.readouterr().out).splitlines()
    assert rows == ["<asr>      ", "<st:pt-BR> abcdefgh", "<asr>      ", "<st:pt-BR> ijklm"]
    assert stream.pieces("\uac00" * 30, 42) == ["\uac00" * 21, "\uac00" * 9]  # two columns each
    assert stream.pieces("\uac00b", 1) == ["\uac00", "b"]        # wider than the screen, and shown


def test_realtime_keeps_the_pace(folder, capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(stream.time, "sleep", slept.append)
    monkeypatch.setattr(stream.time, "perf_counter", lambda: 0.0)
    assert captions(folder, capsys, monkeypatch, str(folder / "0.wav"), "--realtime")[0] == 0
    assert slept[0] == pytest.approx(0.1) and slept[-1] == pytest.approx(20000 / 16000)


def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, monkeypatch, tmp_path):
    audio = str(folder / "0.wav")
    code_in_pickle = tmp_path / "evil.pt"
    torch.save({"format": "x", "run": print}, code_in_pickle)
    other = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**other, "version": 99}, tmp_path / "later.pt")
    for checkpoint, message in [
        (folder / "nothing.pt", "no such file"),
        (folder / "0.wav", "not a checkpoint"),
        (code_in_pickle, "refused"),
        (tmp_path / "later.pt", "version 99"),
    ]:
        assert stream.main([str(checkpoint), audio]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith(f"stream.py: {checkpoint}: ") and message in err
    assert stream.main([str(folder / "model.pt"), "--eval", str(folder / "missing.jsonl")]) == 2
    assert captions(folder, capsys, monkeypatch, audio, "--beam", "0")[0] == 2
    model, rows = str(folder / "model.pt"), str(folder / "set.jsonl")
    for wrong in ([model], ["--eval", rows], [model, audio, "--log", str(tmp_path)],
                  [model, "--eval", rows, "--json"], [model, "--eval", rows, "--srt", "x.srt"],
                  ["--json"], ["--srt", "x.srt"], [audio], [model, audio, "--hold", "5"],
                  [model, "-", "--realtime"], [model, "mic", "--chunk", "0"],
                  [model, audio, "--allow-outside"]):
        with pytest.raises(SystemExit) as caught:
            stream.main(wrong)
        assert caught.value.code == 2, wrong
    monkeypatch.setattr(stream.os, "access", lambda path, mode: "locked" not in str(path))
    (tmp_path / "locked").mkdir()
    for options in (["--eval", rows, "--log", str(tmp_path / "locked")],
                    [audio, "--srt", str(tmp_path / "locked" / "x.srt")]):
        assert stream.main([model, *options]) == 2
        assert "locked" in (said := capsys.readouterr().err) and "not allowed to write" in said
    assert not list((tmp_path / "locked").iterdir())
    keyboard = types.SimpleNamespace(buffer=types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(stream.sys, "stdin", keyboard)
    assert stream.main([model, "-"]) == 2 and "is the keyboard" in capsys.readouterr().err


def test_everything_at_once_has_a_bound(folder):
    """Its memory grows with the square of its length, and endless input would give no word."""
    model, tokenizer, _ = stream.load_run(folder / "model.pt")
    minute = noise(60 * 16000)
    whole, chunks = Streamer(model, tokenizer, chunk=0), Streamer(model, tokenizer)
    for _ in range(5):
        whole.push(minute)
    with pytest.raises(stream.InputError, match="chunk 0 hears everything at once, 300 s at most"):
        whole.push(minute[:1])
    for _ in range(6):
        chunks.push(minute)


def test_one_babbling_utterance_does_not_end_the_evaluation(monkeypatch):
    """Broken off, it counts; the others are heard. Where all babble, sixteen are enough."""
    heard = []

    def group_of(model, tokenizer, group, how):
        heard.append(group[0])
        return [{"id": group[0]}], 5000 * (group[0] in loud), 10.0
    monkeypatch.setattr(stream, "stream_group", group_of)
    monkeypatch.setattr(stream, "summarise", lambda records, *_: len(records))
    for loud, wanted in (({3, 70}, 100), (set(range(100)), 16), (set(), 100)):
        heard.clear()
        assert stream.evaluate(lively(), TOKENIZER, list(range(100)), batch_size=1)[0] == wanted
        assert heard == list(range(wanted))


def test_rows_that_the_model_does_not_write_are_left_out_and_told(folder, tmp_path, capsys,
                                                                  monkeypatch):
    monkeypatch.setattr(stream, "BABBLE", 1e9)
    rows = [{"id": "a", "audio": str(folder / "0.wav"), "asr": "la"},
            {"id": "b", "audio": str(folder / "1.wav"), "st": {"it": "la"}}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(folder / "model.pt"), "--eval", str(manifest), "--allow-outside"]
    assert stream.main(command) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 rows left out" in err and "utterances         1" in out
    rows[0]["audio"] = str(folder / "gone.wav")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stream.main(command) == 2
    assert "none of the 1 rows" in capsys.readouterr().err


def test_eval(folder, capsys, monkeypatch):
    """Figures on the screen, logs in the folder, bad rows skipped and named."""
    monkeypatch.setattr(stream, "BABBLE", 1000.0)  # random weights do
    command = [
        str(folder / "model.pt"),
        "--eval",
        str(folder / "set.jsonl"),
        "--log",
        str(folder / "log"),
    ]
    assert stream.main(command) == 0
    out, err = capsys.readouterr()
    assert "set.jsonl:4: skipped" in err and "gone.wav" in err
    for name in ("wer", "cer_norm", "bleu", "chrf", "laal_ca_ms", "real_time_factor", "nrefs:1"):
        assert name in out
    metrics = json.loads((folder / "log" / "metrics.json").read_text())
    assert (
        metrics["<asr>"]["utterances"] == 3
        and metrics["<st:en>"]["laal_ms"] <= metrics["<st:en>"]["laal_ca_ms"]
    )
    for name in ("asr", "st-en"):
        lines = [json.loads(line) for line in open(folder / "log" / name / "instances.log")]
        assert len(lines) == 3 and all(len(x["delays"]) == x["prediction_length"] for x in lines)
        assert all(x["delays"] == sorted(x["delays"]) for x in lines)
        assert all(max(x["delays"], default=0) <= x["source_length"] for x in lines)


def test_eval_searches_as_it_is_told(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(stream, "evaluate", lambda *_, **how: asked.update(how) or ({}, [None]))
    command = [str(folder / "model.pt"), "--eval", str(folder / "set.jsonl")]
    assert stream.main([*command, "--chunk", "4", "--beam", "3", "--blank-penalty", "2"]) == 0
    assert (asked["chunk"], asked["beam"], asked["blank_penalty"]) == (4, 3, 2)
    assert asked["hold"] == stream.HALF_CHUNK
    assert (asked["batch_size"], asked["bootstrap"]) == (1, 1000)   # delays of one stream alone
    assert stream.main([*command, "--beam", "3", "--hold", "5"]) == 0 and asked["hold"] == 5


def test_a_caption_pauses_as_it_is_told(folder, monkeypatch):
    asked = {}

    class Spy(stream.Streamer):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            asked.update(how)
    monkeypatch.setattr(stream, "Streamer", Spy)
    assert stream.main([str(folder / "model.pt"), str(folder / "2.wav"), "--pause", "0.5"]) == 0
    assert asked["pause"] == 0.5


def test_logs_outlive_a_reader(folder, monkeypatch):
    command = [str(folder / "model.pt"), "--eval", str(folder / "set.jsonl")]
    monkeypatch.setattr(stream, "evaluate", lambda *_, **how: ({"<asr>": {"wer": 1.0}}, [None]))
    written = []
    monkeypatch.setattr(stream, "write_logs", lambda *what: written.append(what))

    def gone(*_):
        raise BrokenPipeError
    monkeypatch.setattr(stream, "figure_line", gone)
    options = stream.arguments().parse_args([*command, "--log", str(folder)])
    model, tokenizer, beside = stream.load_run(command[0])
    with pytest.raises(BrokenPipeError):
        stream.evaluation(model, tokenizer, options, stream.search_of(options, model, beside),
                          tokenizer.tags)
    assert written == [(str(folder), [None], {"<asr>": {"wer": 1.0}})]


def test_no_microphone_for_a_model_that_hears_everything_at_once(folder):
    model, tokenizer, beside = stream.load_run(str(folder / "model.pt"))
    model.config = replace(model.config, chunks=(0, 16))
    options = stream.arguments().parse_args(["model.pt", "mic"])
    with pytest.raises(stream.InputError, match="mic has none: give --chunk"):
        stream.caption(model, tokenizer, options, stream.search_of(options, model, beside),
                       tokenizer.tags)


def test_subtitles_survive_whatever_ends_the_captions(folder, capsys, monkeypatch, tmp_path):
    """A reader of the screen who leaves, and audio that is not there: the subtitles are whole, an
    older file is not emptied."""
    track = tmp_path / "x.srt"
    more = "--srt", str(track)
    assert captions(folder, capsys, monkeypatch, str(folder / "2.wav"), *more)[0] == 0
    tracks = {path: path.read_text() for path in tmp_path.glob("x*.srt")}
    assert len(tracks) == 2 and all("-->" in text for text in tracks.values())
    assert captions(folder, capsys, monkeypatch, str(tmp_path / "nothing.wav"), *more)[0] == 2
    assert {path: path.read_text() for path in tracks} == tracks

    def gone(events):
        if events:
            raise BrokenPipeError
    monkeypatch.setattr(stream, "show_lines", gone)
    monkeypatch.setattr(stream.os, "dup2", lambda *_: None)
    monkeypatch.setattr(stream.sys.stdout, "fileno", lambda: 1, raising=False)
    assert captions(folder, capsys, monkeypatch, str(folder / "2.wav"), *more)[0] == 0
    left = {path: path.read_text() for path in tracks}
    assert left == tracks                      # they go on when nobody reads the screen any more


def test_subtitles_that_cannot_be_written_touch_no_file(folder, capsys, monkeypatch, tmp_path):
    old, sound = tmp_path / "y.asr.srt", tmp_path / "x.st-en.srt"
    older = "\ufeff1\n00:00:00,000 --> 00:00:01,000\nolder captions\n\n"
    old.write_text(older)
    (tmp_path / "sub").mkdir()
    other = tmp_path / "b.wav"
    shutil.copy(folder / "1.wav", other)       # as in: --srt *.wav
    monkeypatch.setattr(stream, "own_streams", lambda *_: ("<asr>", "<st:en>"))
    shutil.copy(folder / "2.wav", sound)
    for more, message in (
            (("--srt", str(tmp_path / "y.srt"), "--vtt", str(tmp_path / "none" / "y.vtt")),
             "in a folder that is not there"),
            (("--srt", "."), "not the name of a file"), (("--srt", "-"), "not the name of a file"),
            (("--vtt", f"{tmp_path}/sub/"), "not the name of a file"),
            (("--srt", str(tmp_path / "x"), "--vtt", str(tmp_path / "x")), "other subtitles"),
            (("--srt", str(tmp_path / "x.srt")), "overwrite the recording")):
        code, lines, err = captions(folder, capsys, monkeypatch, str(sound), *more)
        assert code == 2 and not lines and message in err and len(err.splitlines()) == 1, more
    monkeypatch.setattr(stream, "own_streams", lambda *_: ("<asr>",))
    code, lines, err = captions(folder, capsys, monkeypatch, str(sound), "--srt", str(other))
    assert code == 2 and f"{other}: there already, and no subtitles" in err
    assert old.read_text() == older and other.read_bytes() == (folder / "1.wav").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b.wav", "sub", "x.st-en.srt", "y.asr.srt"]


@pytest.mark.parametrize("begin, subtitles", [
    (b"", True), (b"\n", True), (b"WEBVTT\n\n1\n", True), (b"\xef\xbb\xbfWEBVTT - x\n", True),
    (b"1\r\n00:00:00,000 --> 00:00:01,000\r\n", True), (b"RIFF\x24\x00", False),
    (b"<!-- a page --><html>", False), (b'{"id": "a"}\n', False), (b"\0" * 100, False)])
def test_what_begins_as_subtitles_do(begin, subtitles):
    assert bool(stream.SUBTITLES.match(begin)) == subtitles


def test_subtitles_and_captions_do_not_share_a_file(folder, tmp_path):
    model, sound = folder / "model.pt", folder / "1.wav"
    with open(tmp_path / "t.asr.srt", "w") as both:
        done = subprocess.run([sys.executable, Path(stream.__file__), model, sound,
                               "--srt", tmp_path / "t.srt"], stdout=both, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode == 2 and "would overwrite the captions on standard output" in done.stderr
    assert not (tmp_path / "t.asr.srt").read_bytes() and not (tmp_path / "t.st-en.srt").exists()


@pytest.mark.parametrize("option, told", [
    ({"chunk": 16.0}, "chunk 16.0 must be a whole"), ({"beam": 2.5}, "beam 2.5 must be a whole"),
    ({"beam": 2, "hold": "soon"}, "hold 'soon' must be a whole"), ({"limits": 5}, "limits 5 must"),
    ({"limits": (3, None)}, "limits .3, None. must be two"),
    ({"limits": (1, 2, 3)}, "limits .1, 2, 3. must be two")])
def test_an_option_of_another_type_is_told_at_once(option, told):
    with pytest.raises(stream.InputError, match=told):
        Streamer(lively(), TOKENIZER, **option)


def test_options_may_be_numpys_numbers():
    given = dict(chunk=np.int64(4), beam=np.int32(2), hold=np.int8(3), limits=np.array([3, 10]))
    streamer = Streamer(lively(), TOKENIZER, **given)
    assert type(streamer.chunk) is int and streamer.search.limits == (3, 10)


def test_marks_that_nobody_sees_are_not_shown():
    """Soft hyphens, marks of direction; but what turns the direction round is told."""
    assert stream.printable("Ver\u00adkehr \u200fשלום\ufeff") == "Verkehr שלום"
    assert stream.printable("a\u202eb\x1b[2Jc\u200dd") == "a\ufffdb\ufffd[2Jc\u200dd"


def test_the_last_cue_of_every_track_is_written(tmp_path, monkeypatch):
    """A disk that is full for the first does not cost the second its words."""
    planned = [(tmp_path / name, "<asr>", False) for name in ("a", "b")]
    with pytest.raises(stream.InputError, match="b: the disk is full: the subtitles of <asr> end"):
        with stream.opened_tracks(planned, 1.0) as tracks:
            for track in tracks:
                track([Word("<asr>", "ja", 0, 0.0, 0.5, 0)])

            def full():
                raise OSError(28, "the disk is full")
            monkeypatch.setattr(tracks[1], "finish", full)     # closed first, as it came last
    assert (tmp_path / "a").read_text() == "1\n00:00:00,000 --> 00:00:01,000\nja\n\n"
    assert all(track.file.closed for track in tracks)


def test_an_evaluation_that_is_stopped_tells_what_it_has(folder, capsys, tmp_path, monkeypatch):
    """Ctrl-C while the second of three utterances is heard: the figures of two."""
    monkeypatch.setattr(stream, "BABBLE", 1e9)
    done, real = iter(range(1, 9)), stream.stream_group

    def interrupted(*args):
        if next(done) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(stream, "stream_group", interrupted)
    command = [str(folder / "model.pt"), "--eval", str(folder / "set.jsonl"), "--log",
               str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's & ignores it
    try:
        code = stream.main(command)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        out, err = capsys.readouterr()
        assert code == 130 and "stopping after this utterance" in err
        assert "stopped: the figures are those of the first 2 utterances" in err and "wer" in out
        metrics = (tmp_path / "metrics.json").read_text()
        assert json.loads(metrics)["<asr>"]["utterances"] == 2
        done = iter(range(0, 9))       # amid the last utterance: nothing is missing
        assert stream.main(command) == 130 and "the figures are" not in capsys.readouterr().err
        metrics = (tmp_path / "metrics.json").read_text()
        assert json.loads(metrics)["<asr>"]["utterances"] == 3
        done = iter(range(1, 9))
        assert stream.main(command) == 130                     # what is there already stays
        assert "its logs stay as they are" in capsys.readouterr().err
        assert (tmp_path / "metrics.json").read_text() == metrics
    finally:
        signal.signal(signal.SIGINT, before)


def test_logs_have_the_words_that_are_scored(tmp_path):
    """A unit each, composed: SimulEval's figures are those of metrics.json."""
    record = {"references": {"<asr>": ["é", "我", "爱"]}, "audio": "a", "duration_ms": 1000.0,
              "words": [Word("<asr>", "e\u0301", 100.0, 0.0, 0.1, 120.0),
                        Word("<asr>", "我爱", 200.0, 0.1, 0.2, 220.0)]}
    entry = stream.log_entry(0, record, "<asr>")
    assert (entry["prediction"], entry["prediction_length"]) == ("é 我 爱", 3)
    assert entry["delays"] == [100.0, 200.0, 200.0]


def test_where_logs_cannot_go_is_told_before_the_evaluation(folder, capsys, monkeypatch):
    monkeypatch.setattr(stream, "evaluate", lambda *_, **__: pytest.fail("after hours"))
    command = [str(folder / "model.pt"), "--eval", str(folder / "set.jsonl")]
    assert stream.main([*command, "--log", str(folder / "0.wav")]) == 2
    assert "0.wav" in capsys.readouterr().err.splitlines()[-1]


def test_an_empty_text_is_no_reference(folder, monkeypatch):
    monkeypatch.setattr(stream, "BABBLE", 1e9)
    row = Row(id="x", audio="x", asr="", st={"en": "la"})
    model, tokenizer, _ = stream.load_run(folder / "model.pt")
    metrics, records = stream.evaluate(model, tokenizer, [(row, noise(16000))])
    assert list(records[0]["references"]) == ["<st:en>"] == list(metrics)


def test_waiting_for_another_group_counts_as_elapsed(monkeypatch):
    """Two chunk sizes are two batches. A clock that goes on by a second each time that it is read:
    twice as the streams begin, then once as each of three steps ends. The second stream waits for
    both of the first."""
    model = lively()
    streamers = [Streamer(model, TOKENIZER, chunk=chunk) for chunk in (16, 32)]
    for streamer in streamers:
        streamer.push(noise(2 * 10240 + 800))              # two chunks of 16 frames, or one of 32
    ticks = iter(range(100))
    monkeypatch.setattr(stream.time, "perf_counter", lambda: float(next(ticks)))
    short, long = stream.advance(streamers)
    first, last = ([word.elapsed_ms for word in short if word.delay_ms == delay]
                   for delay in sorted({word.delay_ms for word in short}))
    assert next(ticks) == 5 and set(first) == {655.0 + 2000}       # began at 0, ended at 2
    assert set(last) == {655.0 + 3000}                             # and again at 3
    assert {word.elapsed_ms for word in long} == {1295.0 + 3000}   # began at 1, ended at 4


def test_an_idle_stream_does_not_keep_its_batch():
    model = lively()
    streamers = [Streamer(model, TOKENIZER) for _ in range(8)]
    for k, streamer in enumerate(streamers):
        streamer.push(noise(16000, k))
    stream.advance(streamers)
    for state in (streamers[0].encoder_state, streamers[0].search.labels.state):
        for tensor in state.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_when_a_word_begins_and_ends_and_how_sure_it_is():
    """From its first token's frame to its last's; the geometric mean of their probabilities."""
    streamer = Streamer(lively(), TOKENIZER)
    streamer.push(np.zeros(16000))
    tokens = [stream.Written(TOKENIZER.pieces.index(piece), frame, log_prob)
              for piece, frame, log_prob in ((b"l", 3, -0.1), (b"a", 5, -0.2), (b" ", 7, -0.6))]
    word, = streamer.events(tokens, False)
    assert (word.text, word.start_s, word.end_s) == ("la", pytest.approx(.12), pytest.approx(.32))
    assert word.confidence == pytest.approx(math.exp(-0.3))


def test_where_a_pause_began_and_how_far_it_was_heard():
    streamer = Streamer(lively(), TOKENIZER, pause=0.5)
    streamer.push(np.zeros(48000))
    assert streamer.pause == 13                                # frames of 40 ms, rounded up
    streamer.frames, streamer.search.quiet, streamer.in_utterance = 50, 20, True
    pause, = streamer.events([], False)
    assert (pause.start_s, pause.end_s) == (pytest.approx(1.2), pytest.approx(2.0))
    assert pause.delay_ms == pytest.approx((160 * 199 + 400) / 16)


def test_a_word_is_shown_once_the_best_hypothesis_has_held_it():
    """Of two tokens, the one held for seven frames; and who does not agree with it is out."""
    search = stream.Beam(lively(), 3, hold=4)
    first, = search.hyps

    def hypothesis(*tokens):
        return replace(first, tokens=tokens,
                       written=tuple(stream.Written(token, 2, -0.1) for token in tokens))
    search.done, search.leader, search.held_since = 10, (5, 6), [3, 9]
    search.hyps = [hypothesis(5, 6), hypothesis(5, 7), hypothesis(7)]
    assert [written.token for written in search.end_call(False)] == [5]
    assert [hyp.tokens for hyp in search.hyps] == [(6,), (7,)]
    assert (search.leader, search.held_since) == ((6,), [9])   # what stays has not been held longer
    search.shown_at, search.hyps = 7, [hypothesis(5)]          # written in frame 2
    assert [written.frame for written in search.end_call(True)] == [7]
    search = stream.Beam(lively(), 3, hold=8)                  # the control: not held so long
    search.done, search.leader, search.held_since = 10, (5, 6), [3, 9]
    search.hyps = [hypothesis(5, 6), hypothesis(5, 7), hypothesis(7)]
    assert search.end_call(False) == [] and len(search.hyps) == 3
    assert stream.new_search(lively(), 8, beam=2).hold == 4    # half a chunk


def test_malformed_output_is_counted_by_stream():
    speller = stream.Speller(TOKENIZER)

    def feed(*tokens):
        return [word for token in tokens for word in speller.feed(stream.Written(token, 0, -0.1))]
    letter, end = (TOKENIZER.pieces.index(piece) for piece in (b"l", b" "))
    feed(1, letter, end, 2)                                    # a whole word, and then a tag
    assert not +speller.cut and not +speller.invalid
    feed(1, letter, 2)                                         # a tag inside a word
    assert +speller.cut == {"<asr>": 1}
    feed(TOKENIZER.pieces.index(b"\xff"), end)
    assert +speller.invalid == {"<st:en>": 1} and +speller.cut == {"<asr>": 1}


def test_who_babbles_is_broken_off(monkeypatch):
    """It writes its limit of 20 in each of the 48 frames of two seconds, 500 being free."""
    model = lively(seed=3)
    bias, keep = model.joint.output.bias, model.joint.output.bias[0].item()
    row = Row("x", "x", asr="la")
    with torch.no_grad():
        bias[0] = -1000.0
    try:
        with monkeypatch.context() as patch:
            patch.setattr(stream, "BABBLE", 1)
            figures, _ = evaluate(model, TOKENIZER, [(row, noise(64000))])
    finally:
        with torch.no_grad():
            bias[0] = keep
    assert figures["<asr>"]["broken_off"] == 1
    figures, _ = evaluate(model, TOKENIZER, [(row, noise(64000))])
    assert figures["<asr>"]["broken_off"] == 0


def test_characters_are_counted_as_characters():
    def record(reference, *words):
        return {"references": {"<asr>": units(reference)}, "duration_ms": 1000.0, "seconds": 0.1,
                "words": [Word("<asr>", word, 100.0, 0.0, 0.1, 120.0) for word in words]}
    figures = stream.summarise([record("abcd ef", "abcd", "eg")], ["<asr>"])["<asr>"]
    assert figures["wer"] == 50 and figures["cer"] == pytest.approx(100 / 7)
    for text, kind in (("\u6211\u7231\u4f60", "zh"), ("\u3042\u3044\u3046", "char"),
                       ("ab", "13a")):
        figures = stream.summarise([record(text, text)], ["<asr>"])["<asr>"]
        assert f"tok:{kind}" in figures["bleu_signature"] and figures["cer"] == 0


# ---- Subtitles -----------------------------------------------------------------------------------

def cues(path, words, webvtt=False, pause=1.0):
    """What a track of <asr> makes of words (text, start, end), pauses (None) and other streams."""
    track = stream.Subtitles(path, "<asr>", webvtt, pause)
    for word in words:
        if word is None:
            track([stream.Pause(0.0, 0.0, 0.0, 0.0)])
        else:
            text, start, end, *tag = word
            track([Word(*(tag or ["<asr>"]), text, 0.0, start, end, 0.0)])
    track.close()
    return path.read_text("utf-8")


def test_a_cue_is_in_the_file_as_soon_as_the_next_one_begins(tmp_path):
    track = stream.Subtitles(tmp_path / "a", "<asr>", False, 1.0)
    track([Word("<asr>", "ja", 0.0, 0.0, 0.5, 0.0), stream.Pause(0.0, 0.0, 0.0, 0.0)])
    assert (tmp_path / "a").read_text("utf-8") == ""           # when it ends is not known yet
    track([Word("<asr>", "nein", 0.0, 3.0, 3.5, 0.0)])
    assert (tmp_path / "a").read_text("utf-8") == "1\n00:00:00,000 --> 00:00:01,000\nja\n\n"
    track.close()


def times_of(text):
    """[(start, end)] of the cues of a track, in s."""
    def seconds(clock):
        hours, minutes, rest = clock.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(rest.replace(",", "."))
    return [tuple(map(seconds, line.split(" --> "))) for line in text.splitlines() if "-->" in line]


@pytest.mark.parametrize("paused", [False, True])
def test_cues_do_not_fall_behind_short_pauses(tmp_path, paused):
    """Two words a second, each after a pause: were each a cue of a second, the last would come 100
    s late."""
    words = [("la", 0.5 * k, 0.5 * k + 0.04) for k in range(200)]
    if paused:
        words = [event for word in words for event in (word, None)]
    found = times_of(cues(tmp_path / "a", words, pause=5 if paused else 0.3))
    assert found == [(k, k + 1) for k in range(100)]


def test_no_cue_begins_before_the_one_before_has_ended(tmp_path):
    """Written at once, three cues of two lines each follow each other by a second."""
    words = [("x" * 42, 2.0 + 0.01 * k, 2.01 + 0.01 * k) for k in range(5)]
    found = times_of(cues(tmp_path / "a", words))
    assert found == [(2, 3), (3, 4), (4, pytest.approx(4 + 42 / 17, abs=1e-3))]


def test_a_cue_stays_as_long_as_it_takes_to_read(tmp_path):
    """17 characters a second, if the next one leaves time for it."""
    burst = [("x" * 33 + "y", 2.0, 2.04), ("z" * 33 + "!", 2.04, 2.08)]      # and a line break: 69
    text = cues(tmp_path / "a", burst + [("next", 9.0, 9.1)])
    assert times_of(text) == [(2, pytest.approx(2 + 69 / 17, abs=1e-3)), (9, 10)]
    text = cues(tmp_path / "a", burst + [("next", 4.0, 4.1)])
    assert times_of(text) == [(2, 4), (4, 5)]


def test_a_word_wider_than_a_line_goes_over_several(tmp_path):
    line = "x" * 42
    assert cues(tmp_path / "a", [("x" * 100, 0.0, 0.5)]) == (
        f"1\n00:00:00,000 --> 00:00:01,000\n{line}\n{line}\n\n"
        f"2\n00:00:01,000 --> 00:00:02,000\n{'x' * 16}\n\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_keeps_its_numbers_and_letters(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="replace"))
    stream.show_json([Word("<asr>", "été我", 655.0, 0.12, 0.32, 670.51239, 0.8765432),
                      stream.Pause(1.0, 2.0, 3.0, 4.0)])
    word, pause = map(json.loads, written.getvalue().splitlines())
    assert word == {"event": "word", "stream": "<asr>", "text": "été我", "delay_ms": 655.0,
                    "start_s": 0.12, "end_s": 0.32, "elapsed_ms": 670.5124, "confidence": 0.8765}
    assert pause["event"] == "end of utterance" and pause["start_s"] == 2.0


def test_a_track_has_one_stream(tmp_path):
    words = [("ja", 0, 0.5), ("yes", 0, 0.5, "<st:en>")]
    assert cues(tmp_path / "a", words) == "1\n00:00:00,000 --> 00:00:01,000\nja\n\n"


def test_webvtt_as_its_players_want_it(tmp_path):
    assert cues(tmp_path / "a", [("a<b&c>", 3661.0, 3662.5)], webvtt=True) == (
        "WEBVTT\n\n1\n01:01:01.000 --> 01:01:02.500\na&lt;b&amp;c&gt;\n\n")


@pytest.mark.parametrize("words, times", [
    ([("a", 0, 0.2), None, ("b", 1.0, 1.2)], ["00,000 --> 00:00:01,000",
                                              "01,000 --> 00:00:02,000"]),
    ([("a", 0, 0.2), None, ("b", 0.4, 0.6)], ["00,000 --> 00:00:01,000"]),
    ([("a", 0, 0.2), None, ("b", 0.4, 0.6), ("c", 1.2, 1.4)], ["00,000 --> 00:00:01,400"]),
    ([("a", 0, 0.2), ("b", 1.3, 1.5)], ["00,000 --> 00:00:01,000", "01,300 --> 00:00:02,300"]),
    ([("a", 0, 0.2), ("b", 1.1, 1.5)], ["00,000 --> 00:00:01,500"]),
    ([("w", k, k + 1) for k in range(8)], ["00,000 --> 00:00:07,000", "07,000 --> 00:00:08,000"]),
    ([("x" * 42, k, k + 1) for k in range(3)], ["00,000 --> 00:00:02,000",
                                                "02,000 --> 00:00:04,471"])])
def test_where_a_cue_ends_and_none_overlaps(tmp_path, words, times):
    """After a pause event, a second without a word, seven seconds, and two lines; not before it
    has stood for a second."""
    found = [line[6:] for line in cues(tmp_path / "a", words).splitlines() if "-->" in line]
    assert found == times


def test_a_pause_ends_the_word_that_is_half_written():
    """Its last token after the pause would else make a word that stands behind it and began
    before it."""
    streamer = Streamer(lively(), TOKENIZER, pause=0.1)
    streamer.push(np.zeros(16000))
    half = [stream.Written(TOKENIZER.pieces.index(b"l"), 3, -0.1)]
    assert streamer.events(half, False) == []
    streamer.search.quiet = 100
    word, pause = streamer.events([], False)
    assert isinstance(word, Word) and isinstance(pause, stream.Pause)
    assert word.text == "l" and word.start_s == pytest.approx(0.12)
    assert streamer.events([], False) == [] and streamer.speller.flush() == []


def test_no_pause_where_a_beam_withholds_a_token_or_the_audio_ends():
    streamer = Streamer(lively(), TOKENIZER, pause=0.1, beam=2)
    half = [stream.Written(TOKENIZER.pieces.index(b"l"), 3, -0.1)]
    assert streamer.events(half, False) == []
    streamer.search.done = 100
    first = streamer.search.hyps[0]
    streamer.search.hyps = [replace(first, tokens=(5,), written=(stream.Written(5, 9, -0.1),))]
    assert streamer.search.quiet == 90 and streamer.search.withheld
    assert streamer.events([], False) == []               # the rest of "l" may be on its way
    streamer.search.hyps = [first]
    word, pause = streamer.events([], False)
    assert word.text == "l" and isinstance(pause, stream.Pause)
    streamer.search.done = 1
    assert streamer.events(half, False) == []
    streamer.search.done = 200
    assert [type(event) for event in streamer.events([], True)] == [Word]


def test_the_search_is_that_of_the_models_file_unless_the_command_says_otherwise(folder, capsys):
    model, beside = load(folder / "model.pt")
    save(folder / "eager.pt", model, **beside | {"blank_penalty": 3.0})

    def shown(name, *more):
        assert stream.main([str(folder / name), str(folder / "2.wav"), *more]) == 0
        return capsys.readouterr().out
    plain, eager = shown("model.pt"), shown("eager.pt")
    assert len(eager) > len(plain) and shown("eager.pt", "--blank-penalty", "0") == plain
    assert shown("model.pt", "--blank-penalty", "3") == eager
    save(folder / "bad.pt", model, **beside | {"blank_penalty": "x"})
    assert stream.main([str(folder / "bad.pt"), str(folder / "2.wav")]) == 2
    assert "blank penalty 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("end_signal", [signal.SIGINT, signal.SIGTERM])
def test_closed_pipe_and_interrupt(folder, end_signal):
    """A reader that has seen enough, and Ctrl-C, or a service's end, at a microphone: both end
    quietly, the latter with its last words."""
    command = [sys.executable, str(ROOT / "stream.py"), str(folder / "model.pt")]
    end = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader = subprocess.Popen([*command, str(folder / "2.wav"), "--json"], **end)
    microphone = subprocess.Popen([*command, "-"], stdin=subprocess.PIPE, **end)
    reader.stdout.readline()
    reader.stdout.close()
    assert reader.wait(60) == 0 and reader.stderr.read().count(b"Traceback") == 0
    microphone.stdin.write(pcm(folder))
    microphone.stdin.flush()
    lines = [microphone.stdout.readline().decode()]
    while float(lines[-1].split()[0]) < 1.5:
        lines.append(microphone.stdout.readline().decode())
    while int.from_bytes(fcntl.ioctl(microphone.stdin, termios.FIONREAD, bytes(4)), sys.byteorder):
        pass  # all was heard, so that the end is always the same
    microphone.send_signal(end_signal)
    out, err = microphone.communicate(timeout=60)
    assert microphone.returncode == 0 and b"Traceback" not in err
    assert float((lines + out.decode().splitlines())[-1].split()[0]) > 1.5 and out


@pytest.fixture
def ctrl_c():
    """Python's own answer to it, which a process lacks that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("source, ends_with", [("x.wav", 130), ("-", 0), ("mic", 0)])
def test_ctrl_c_amid_a_chunk_takes_effect_after_its_words(folder, capsys, monkeypatch, ctrl_c,
                                                          source, ends_with):
    """The second packet is interrupted while it is computed: its words are shown, and none of what
    would follow it. A file was not heard to its end; what has no end was."""
    real, calls = Streamer.accept, []

    def interrupted(self, packet):
        calls.append(packet)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, packet)
    packets = np.array_split(noise(N), 6)
    monkeypatch.setattr(stream, "packets", lambda *_: iter(packets))
    monkeypatch.setattr(Streamer, "accept", interrupted)
    code, out, _ = captions(folder, capsys, monkeypatch, source, "--json")
    assert code == ends_with and len(calls) == 2
    model, tokenizer, beside = stream.load_run(folder / "model.pt")
    wanted = Streamer(model, tokenizer, **stream.own_search(beside))
    words = real(wanted, packets[0]) + real(wanted, packets[1]) + wanted.flush()
    words = [event.text for event in words if isinstance(event, Word)]
    assert words == [event["text"] for event in map(json.loads, out.splitlines())
                     if event["event"] == "word"] and words


def test_ctrl_c_inside_libsndfile_is_not_lost(folder, monkeypatch, ctrl_c):
    """An exception in a callback of libsndfile is printed and forgotten: what it reads comes to an
    end, and the file would be called cut off."""
    real, calls = stream.RawFile.readinto, []

    def interrupted(self, buffer):
        calls.append(len(buffer))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, buffer)
    monkeypatch.setattr(stream.RawFile, "readinto", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.read_audio(str(folder / "2.wav"))
    assert len(calls) >= 4


def test_out_of_memory_is_one_line(folder, capsys, monkeypatch):
    def full(*_):
        raise MemoryError
    monkeypatch.setattr(stream, "caption", full)
    assert stream.main([str(folder / "model.pt"), str(folder / "2.wav")]) == 2
    told = "stream.py: out of memory (a smaller --chunk or --beam takes less)\n"
    assert capsys.readouterr().err == told


def test_a_second_ctrl_c_ends_it_at_once(ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with stream.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            done.append(2)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def elsewhere():                         # where no handler can be set, it does nothing
        with stream.uninterrupted():
            done.append(3)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [1, 3]


def test_joined_streams_are_cut_back():
    """Words of a joined stream go back to their utterances, with delays from the start of each."""
    import long_streams
    texts = ["a b c", "d e", "", "f g h"]
    singles = [{"references": {"<asr>": text.split()}, "duration_ms": 1000.0, "id": str(k)}
               for k, text in enumerate(texts)]
    written = [
        ("a", 400.0),
        ("x", 900.0),
        ("d", 1500.0),
        ("e", 1600.0),
        ("g", 3400.0),
        ("h", 3500.0),
        ("h", 4000.0),
    ]
    whole = {
        "seconds": 4.0,
        "words": [Word("<asr>", text, ms, 0.0, 0.0, ms) for text, ms in written],
    }
    parts = [
        [(word.text, word.delay_ms) for word in part["words"]]
        for part in stream.resegment(whole, singles)
    ]
    assert parts == [[("a", 400.0), ("x", 900.0)], [("d", 500.0), ("e", 600.0)], [],
                     [("g", 400.0), ("h", 500.0), ("h", 1000.0)]]
    none = [{"references": {"<asr>": []}, "duration_ms": 1000.0}]
    short = {"seconds": 1.0, "words": whole["words"][:1], "cut": {"<asr>": 2}}
    alone = stream.resegment(short, none)
    assert alone[0]["words"] == whole["words"][:1] and alone[0]["cut"] == {"<asr>": 2}
    second = [{"references": {"<st:en>": []}, "duration_ms": 1000.0}, *none]
    assert stream.resegment(short, second)[1]["cut"] == {"<asr>": 2}
    items = [(Row(id="x", audio="x"), np.zeros(16000 * n)) for n in (1, 2, 3, 1, 1)]
    assert [len(group) for group in long_streams.join(items, 3)] == [2, 1, 2]
    assert [len(group) for group in long_streams.join(items, 4)] == [3, 2] and len(
        long_streams.join(items, 5)
    ) == 1
    rows = [(Row(id=str(k), audio="x", asr="la lo"), noise(16000, k)) for k in range(4)]
    n, alone, joined = long_streams.compare(lively(seed=2), TOKENIZER, rows, 2)
    assert n == 2 and alone["<asr>"]["utterances"] == joined["<asr>"]["utterances"] == 4


@pytest.mark.parametrize("text, name", [
    ("葛\U000e0100城市", "han"), ("か\u309aき", "kana"), ("葛\U000e0100か", "kana"), ("a b か", "words")])
def test_the_script_of_characters_with_marks(text, name):
    """A variation selector or a sound mark belongs to its character: one unit."""
    assert stream.script([units(text)]) == name


# ---- What no other test would see ----------------------------------------------------------------

def test_a_word_has_its_own_tokens_and_not_those_before():
    speller, found = stream.Speller(TOKENIZER), []
    for piece, frame in zip((b"l", b"a", b" ", b"l", b"o", b" "), (3, 5, 7, 20, 21, 22)):
        token = stream.Written(TOKENIZER.pieces.index(piece), frame, -0.1)
        found += [(text, [one.frame for one in own]) for _, text, own in speller.feed(token)]
    assert found == [("la", [3, 5, 7]), ("lo", [20, 21, 22])]


def test_a_terminal_gets_lines_that_grow_and_json_stays_json(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = captions(folder, capsys, monkeypatch, str(folder / "2.wav"))
    assert code == 0 and "\x1b[2K\x1b[2m<asr>" in out
    code, out, _ = captions(folder, capsys, monkeypatch, str(folder / "2.wav"), "--json")
    assert code == 0 and "\x1b" not in out and all(map(json.loads, out.splitlines()))


def test_a_pause_follows_whole_words_too():
    streamer = Streamer(lively(), TOKENIZER, pause=0.1)
    streamer.push(np.zeros(16000))
    word, = streamer.events([stream.Written(TOKENIZER.pieces.index(piece), frame, -0.1)
                             for piece, frame in ((b"l", 3), (b"a", 4), (b" ", 5))], False)
    streamer.search.quiet = 100
    pause, = streamer.events([], False)
    assert word.text == "la" and isinstance(pause, stream.Pause)


def test_a_greedy_token_has_its_own_probability():
    search = stream.Greedy(lively())
    assert search.follow([(5, -0.2, -1.8)], 1, False) == 5
    assert search.tokens == [stream.Written(5, 0, -0.2)] and search.score == -0.2


def test_a_token_of_a_beam_has_its_own_probability():
    search = stream.Beam(lively(), 2)
    first = replace(search.hyps[0], score=-2.0)
    active, left = search.prune([first], torch.tensor([[0.2, 0.5, 0.3]]).log(), {})
    assert not left and [(hyp.tokens, round(hyp.written[0].log_prob, 4), round(hyp.score, 4))
                         for hyp in active] == [((1,), -0.6931, -2.6931), ((2,), -1.204, -3.204)]


@pytest.mark.parametrize("turned", [False, True])
def test_where_two_paths_meet_the_likelier_tells_the_time(turned):
    """Their probabilities add up: -1.5 + log(1 + e^-2)."""
    first, left = stream.Beam(lively(), 2).hyps[0], {}
    pair = [replace(first, tokens=(5,), written=(stream.Written(5, frame, -0.1),), score=score)
            for frame, score in ((2, -1.0), (7, -3.0))]
    for hyp in reversed(pair) if turned else pair:
        stream.take_blank(hyp, -0.5, left)
    met, = left.values()
    assert met.written[0].frame == 2 and met.score == pytest.approx(-1.373072, abs=1e-6)


def test_bleu_sees_capitals():
    """Precisions 2/4, 1/3 and, smoothed, 1/4 and 1/4: the fourth root of 50 33.3 25 25."""
    record = {"references": {"<asr>": "Das Haus ist rot".split()}, "duration_ms": 1.0,
              "seconds": 0.1, "words": [Word("<asr>", text, 1.0, 0.0, 0.1, 1.0)
                                        for text in "das haus ist rot".split()]}
    figures = stream.summarise([record], ["<asr>"])["<asr>"]
    assert "case:mixed" in figures["bleu_signature"]
    assert figures["bleu"] == pytest.approx(31.947, abs=1e-3)


def test_logs_of_a_stream_have_the_rows_with_its_text(tmp_path):
    records = [{"references": {tag: [text]}, "audio": "x", "duration_ms": 1.0, "words": []}
               for tag, text in (("<asr>", "a"), ("<st:en>", "b"))]
    stream.write_logs(tmp_path, records, {"<asr>": {}, "<st:en>": {}})
    for name, text in (("asr", "a"), ("st-en", "b")):
        line, = map(json.loads, open(tmp_path / name / "instances.log"))
        assert (line["index"], line["reference"]) == (0, text)


def test_a_record_has_what_was_malformed():
    streamer = Streamer(lively(), TOKENIZER)
    streamer.speller.invalid["<asr>"], streamer.speller.cut["<st:en>"] = 2, 1
    record = stream.record_of(Row("x", "x", asr="la"), np.zeros(1600), streamer, [], 0.5)
    assert (record["invalid"], record["cut"]) == ({"<asr>": 2}, {"<st:en>": 1})
    assert (record["duration_ms"], record["seconds"], record["broken_off"]) == (100.0, 0.5, True)


def test_a_letter_that_the_screen_lacks_is_a_question_mark(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(stream, "run", lambda options: print("été") or 0)
    assert stream.main(["m.pt", "a.wav"]) == 0 and written.getvalue() == b"?t?\n"
