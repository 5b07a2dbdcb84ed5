"""The built-in corpus, its voice, the data path and the training loop."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import PRESETS, load  # noqa: E402
from serialize import interleave, read_manifest  # noqa: E402


# ---- Grammar

def test_grammar_is_large_enough():
    rows = [train.builtin_row(k, targets=("en", "es", "it")) for k in range(56000)]
    texts = {"de": [row.asr for row in rows]} | {lang: [row.st[lang] for row in rows] for lang in ("en", "es", "it")}
    for lang, sentences in texts.items():
        assert len({word for text in sentences for word in text.split()}) >= 60, lang
        lengths = [len(text.split()) for text in sentences]
        assert 4 <= min(lengths) <= 5 and 8 <= max(lengths) <= 9, lang
    assert len(set(texts["de"])) >= 50_000  # and so of every pair


def test_orders_and_links_of_a_known_sentence():
    tables = dict(S=train.SUBJECTS, V=train.VERBS, N=train.NOUNS, J=train.ADJECTIVES, T=train.ADVERBS, P=train.PLACES)
    chosen = {letter: next(entry for entry in table if entry["en"] == english) for (letter, table), english in
              zip(tables.items(), ("she", "bought/buy", "car", "red", "today", "in_the_shop"))}
    chosen |= dict(A=train.PERFECT[0], D=0)
    said = {lang: train.say(chosen, lang) for lang in train.LANGUAGES}
    assert {lang: " ".join(word for _, word in words) for lang, words in said.items()} == {
        "de": "sie hat heute das rote auto im laden gekauft",
        "en": "she bought the red car in the shop today",
        "es": "hoy ella ha comprado el coche rojo en la tienda",
        "it": "lei ha comprato oggi la macchina rossa nel negozio"}
    links = set(train.link_words(said["de"], said["en"]))
    assert links == {(0, 0), (1, 1), (8, 1), (2, 8), (3, 2), (4, 3), (5, 4), (6, 5), (6, 6), (7, 7)}
    assert (1, 2) in train.link_words(said["de"], said["es"])  # hat - ha: both have an auxiliary
    chosen["A"] = train.MODALS[0]
    assert " ".join(word for _, word in train.say(chosen, "de")) == "sie will heute das rote auto im laden kaufen"
    assert " ".join(word for _, word in train.say(chosen, "en")).startswith("she wants to buy the red car")


def test_corpus_is_deterministic_and_test_is_unseen():
    assert train.builtin_row(5, seed=3) == train.builtin_row(5, seed=3)
    assert train.builtin_row(5, seed=3) != train.builtin_row(5, seed=4)
    seen = [train.builtin_row(k) for k in range(20000)]
    unseen = [train.builtin_row(k, test=True) for k in range(2000)]
    assert not {row.asr for row in seen} & {row.asr for row in unseen}
    assert not {row.speaker for row in seen} & {row.speaker for row in unseen}
    voices = {train.make_speaker(row.speaker) for row in seen}
    assert not voices & {train.make_speaker(row.speaker) for row in unseen}
    a, b = train.speak_row(train.builtin_row(7))[0], train.speak_row(train.builtin_row(7))[0]
    assert np.array_equal(a, b)


@pytest.mark.parametrize("languages", ["de,es,it-en", "en-de,es,it"])
def test_many_to_one_and_one_to_many(languages):
    sources, targets = (side.split(",") for side in languages.split("-"))
    rows = train.BuiltIn(languages, 0, 4).rows(0, 30)
    assert {row.lang for row in rows} == set(sources)
    assert all(set(row.st) == set(targets) for row in rows)
    for row in rows:
        train.speak_row(row)
        for mode in ("align", "time", "ratio:0.5"):
            pairs = interleave(row, mode)
            assert len(pairs) == len(row.asr.split()) + sum(len(text.split()) for text in row.st.values())
    with pytest.raises(ValueError, match="not fr"):
        train.BuiltIn("de-fr", 0, 4)


# ---- Voice

def test_voice_has_the_pitch_the_formants_and_the_times_it_claims():
    rng = np.random.default_rng(0)
    speaker = train.Speaker(pitch_hz=120.0, tract=1.1, rate=1.0)
    samples, ends = train.speak(["aaaaaaaa", "iiiiiiii"], speaker, rng)
    assert samples.dtype == np.float32 and len(ends) == 2 and np.isfinite(samples).all()
    middle = int((ends[0] - 0.4) * 16000)
    piece = samples[middle:middle + 4096] - samples[middle:middle + 4096].mean()
    correlation = np.correlate(piece, piece, "full")[4095:]
    period = 60 + np.argmax(correlation[60:250])
    assert 16000 / period == pytest.approx(120, rel=0.12)  # the melody moves by up to a tenth

    def peak(end, low, high):
        at = int((end - 0.4) * 16000)
        spectrum = np.abs(np.fft.rfft(samples[at:at + 4096] * np.hanning(4096)))
        smooth = np.convolve(spectrum, np.ones(60) / 60, "same")  # wider than a harmonic
        hz = np.fft.rfftfreq(4096, 1 / 16000)
        inside = (hz > low) & (hz < high)
        return hz[inside][np.argmax(smooth[inside])]
    assert peak(ends[0], 300, 1100) == pytest.approx(750 * 1.1, rel=0.15)  # the first formant of a, and of i
    assert peak(ends[1], 150, 1100) == pytest.approx(290 * 1.1, rel=0.30)


def test_word_ends_are_where_the_sound_stops():
    speaker = train.Speaker(150.0, 1.0, 1.0)
    samples, ends = train.speak(["aaaa"], speaker, np.random.default_rng(1))
    level = np.sqrt(np.convolve(samples ** 2, np.ones(80) / 80, "same"))
    loud = np.flatnonzero(level > 0.3 * level.max())
    assert loud[-1] / 16000 == pytest.approx(ends[0], abs=0.02)


def test_speakers_levels_and_noise_stay_in_their_ranges():
    speakers = [train.make_speaker(f"train{k:04d}") for k in range(500)]
    for values, low, high in (([s.pitch_hz for s in speakers], 80, 250), ([s.tract for s in speakers], 0.88, 1.12),
                              ([s.rate for s in speakers], 0.8, 1.2)):
        assert low <= min(values) < low * 1.05 and high * 0.95 < max(values) <= high
    loudness = [20 * np.log10(np.sqrt(np.mean(train.speak_row(train.builtin_row(k))[0] ** 2)) / 0.06)
                for k in range(60)]
    assert -15 < min(loudness) < -9 and 9 < max(loudness) < 15.5  # the noise adds at most 0.4 dB


# ---- Data

def write_rows(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture
def bad_manifest(tmp_path):
    tone = (0.1 * np.sin(np.arange(16000) / 20)).astype(np.float32)
    soundfile.write(tmp_path / "good.wav", tone, 16000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, tone], 1), 16000)
    soundfile.write(tmp_path / "rate.wav", tone[:8000], 8000)
    soundfile.write(tmp_path / "silent.wav", 0 * tone, 16000)
    soundfile.write(tmp_path / "empty.wav", tone[:0], 16000)
    soundfile.write(tmp_path / "cut.flac", tone, 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:200])
    names = ["good.wav", "stereo.wav", "rate.wav", "silent.wav", "empty.wav", "cut.flac", "missing.wav"]
    rows = [{"audio": name, "asr": "a b", "st": {"en": "c d"}, "links": {"en": "0-0 1-1"}} for name in names]
    path = write_rows(tmp_path, rows + [{"audio": "good.wav"}])
    path.write_text(path.read_text() + "not json\n")
    return path


def test_bad_rows_are_named_counted_and_left_out(bad_manifest, capsys):
    options = train.parse_options([str(bad_manifest)])
    rows = read_manifest(bad_manifest)
    corpus = train.Manifest(rows, 4, options)
    assert [Path(row.audio).name for row in corpus.rows(0)] == ["good.wav", "stereo.wav", "rate.wav"]
    assert [row.duration for row in corpus.rows(0)] == [1.0, 1.0, 1.0]
    said = capsys.readouterr().err
    for number, what in ((4, "silent"), (5, "0.00 s"), (6, "cut.flac"), (7, "missing.wav"), (8, "no text"), (9, "")):
        line = next(line for line in said.splitlines() if f"rows.jsonl:{number}:" in line)
        assert what in line
    assert "2 of 9 rows skipped" in said and "4 of 7 rows skipped" in said


def test_strict_stops_at_the_first_bad_row(bad_manifest, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([str(bad_manifest), "--strict", "--out", str(out)]) == 2
    assert "rows.jsonl:8" in capsys.readouterr().err and not list(out.glob("*.pt"))
    assert train.main([str(tmp_path / "nothing.jsonl"), "--out", str(out)]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


def test_augmentation_is_a_function_of_its_seed_and_keeps_most_of_the_sound():
    mel, lengths = torch.randn(32, 200, 80) - 10, torch.full((32,), 200)
    lengths[0], mel[0, 100:] = 100, 0

    def draw(seed):
        torch.manual_seed(seed)
        return train.augment(mel, lengths)
    once = draw(0)
    assert torch.equal(once, draw(0)) and not torch.equal(once, draw(1))
    assert (once[0, 100:] == 0).all() and (once[0, :100] < -2).all()  # padding stays zero and does not count
    change = (once - mel)[1:]
    level = change.flatten(1).mode().values[:, None, None]  # most of the sound is only louder or softer
    assert (level.abs() <= 2).all() and level.std() > 0.5
    kept = ((change - level).abs() < 1e-4).float().mean((1, 2))
    assert kept.min() > 0.3 and 0.5 < kept.mean() < 0.9


def test_batches_hold_every_row_once_with_little_padding():
    corpus = train.BuiltIn("de-en", 0, 4)
    options = train.parse_options([])
    batches = train.epoch_batches(corpus, 0, options)
    ids = [row.id for batch in batches for row in batch]
    assert sorted(ids) == sorted(row.id for row in corpus.rows(0))
    letters = [[len(row.asr) for row in batch] for batch in batches]
    padding = 1 - sum(map(sum, letters)) / sum(max(batch) * len(batch) for batch in letters)
    assert padding < 0.1
    assert ids != [row.id for batch in train.epoch_batches(corpus, 1, options) for row in batch]


# ---- Training

@pytest.fixture
def small(monkeypatch):
    """A preset that trains in seconds, on one thread: with more, sums may be added up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(train.PRESETS, "tiny", replace(PRESETS["tiny"], dim=16, heads=2, layers=1, ff=32, joint_dim=16))
    monkeypatch.setattr(train.BuiltIn, "SIZE", 16)
    monkeypatch.setattr(train, "TEST_SIZE", 3)
    yield
    torch.set_num_threads(threads)


def test_resume_is_bit_exact(small, tmp_path):
    """Stopped while the label encoder's optimizer has no state yet; then side tasks, augmentation, transducer."""
    common = ["--batch", "4", "--warm-steps", "8", "--warmup", "2", "--chunks", "4,8", "--merges", "20", "--device", "cpu",
              "--augment", "--forget-steps", "2"]
    assert train.main(common + ["--steps", "10", "--out", str(tmp_path / "whole")]) == 0
    options = train.parse_options(common + ["--steps", "10", "--out", str(tmp_path / "half")])
    steps = iter(range(100))
    real_step = train.train_step

    def stop_after_three(*args):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real_step(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stop_after_three)
        train.train(options)
    half = tmp_path / "half" / "model.pt"
    assert load(half)[1]["step"] == 3
    assert train.main(["--resume", str(half)]) == 0
    (whole, a), (resumed, b) = load(tmp_path / "whole" / "model.pt"), load(half)
    assert a["step"] == b["step"] == 10 and a["position"] == b["position"]
    for (name, x), y in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(x, y), name
    assert train.main(common + ["--steps", "10", "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    other, _ = load(tmp_path / "other" / "model.pt")  # the control: another seed, other weights
    assert not torch.equal(whole.joint.output.weight, other.joint.output.weight)


def test_tasks_come_one_after_the_other():
    def at(step, *more):
        return set(train.tasks(step, train.parse_options(["--warm-steps", "10", *more])))
    assert at(4) == {"letters"} and at(9) == {"letters", "words", "next_label"} and at(10) == at(9) | {"transducer"}
    assert "words" not in at(10, "--interleave", "st")  # a model that only translates must not learn to write them


def test_encoder_learns_to_spell_in_two_hundred_steps():
    """A fixed number of steps from a fixed seed. CTC on letters starts above 4 nats and falls below 1 on sentences and
    speakers never heard; on noise of the same length it does not."""
    options = train.parse_options(["--device", "cpu"])
    corpus, dev = train.open_corpus(options, 4)
    model, tokenizer = train.new_model(options, corpus, dev)
    optimizers = train.make_optimizers(model, options)
    batches = train.batches_from(corpus, tokenizer, (0, 0), options)
    model.train()
    history = [train.train_step(model, optimizers, next(batches)[0], step, options) for step in range(200)]
    batches.close()
    assert all(set(losses) == {"letters", "gradient_norm"} for losses in history)  # only the encoder warms up
    assert history[0]["letters"] > 4

    def spelling(samples):
        rows = [row for row, _ in dev[:32]]
        mels = [train.mel_of(one, 4) for one in samples]
        letters = [[byte + 1 for byte in row.asr.encode()] for row in rows]
        batch = train.collate(mel=mels, letters=letters)
        with torch.no_grad():
            frames, _ = model.eval().encoder(batch.mel, batch.mel_lengths)
            return float(train.ctc_loss(model.ctc(frames), batch.mel_lengths // 4, batch.letters, batch.letters_lengths))
    rng = np.random.default_rng(0)
    assert spelling([samples for _, samples in dev[:32]]) < 1.0
    assert spelling([rng.normal(0, 0.05, len(samples)).astype(np.float32) for _, samples in dev[:32]]) > 3.0
