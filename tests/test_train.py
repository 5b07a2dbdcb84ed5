"""The built-in corpus, its voice, the data path and the training loop."""
import csv
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import PRESETS, load, save  # noqa: E402
from rnnt_loss import rnnt_loss  # noqa: E402
from serialize import interleave, parse, serialize  # noqa: E402
import stream  # noqa: E402
from stream import greedy_batch, load_run  # noqa: E402


# ---- Grammar

def test_grammar_is_large_enough():
    rows = [train.builtin_row(k, targets=("en", "es", "it")) for k in range(56000)]
    texts = {"de": [row.asr for row in rows]} | {
        lang: [row.st[lang] for row in rows] for lang in ("en", "es", "it")
    }
    for lang, sentences in texts.items():
        assert len({word for text in sentences for word in text.split()}) >= 60, lang
        lengths = [len(text.split()) for text in sentences]
        assert 4 <= min(lengths) <= 5 and 8 <= max(lengths) <= 9, lang
    assert len(set(texts["de"])) >= 50_000  # and so of every pair


def test_orders_and_links_of_a_known_sentence():
    tables = dict(
        S=train.SUBJECTS,
        V=train.VERBS,
        N=train.NOUNS,
        J=train.ADJECTIVES,
        T=train.ADVERBS,
        P=train.PLACES,
    )
    chosen = {
        letter: next(entry for entry in table if entry["en"] == english)
        for (letter, table), english in zip(
            tables.items(), ("she", "bought/buy", "car", "red", "today", "in_the_shop")
        )
    }
    chosen |= dict(A=train.PERFECT[0], D=0)
    said = {lang: train.say(chosen, lang) for lang in train.LANGUAGES}
    assert {lang: " ".join(word for _, word in words) for lang, words in said.items()} == {
        "de": "sie hat heute das rote auto im laden gekauft",
        "en": "she bought the red car in the shop today",
        "es": "hoy ella ha comprado el coche rojo en la tienda",
        "it": "lei ha comprato oggi la macchina rossa nel negozio"}
    links = set(train.link_words(said["de"], said["en"], False))
    place = {(i, j) for i in (6, 7) for j in (5, 6, 7)}        # in, and not on or at: for the shop
    assert links == {(0, 0), (1, 1), (8, 1), (2, 8), (3, 2), (4, 3), (5, 4)} | place
    spanish = train.link_words(said["de"], said["es"], True)
    assert (1, 2) in spanish                                   # hat - ha: both have an auxiliary
    # el coche rojo: article and adjective have the noun's gender.
    assert {(i, j) for i, j in spanish if j in (4, 5, 6)} == {
        (3, 4), (5, 4), (5, 5), (4, 6), (5, 6)}
    chosen["A"] = train.MODALS[0]
    assert (
        " ".join(word for _, word in train.say(chosen, "de"))
        == "sie will heute das rote auto im laden kaufen"
    )
    assert " ".join(word for _, word in train.say(chosen, "en")).startswith(
        "she wants to buy the red car"
    )


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
    rows = train.BuiltIn(languages, 0).rows(0, 30)
    assert {row.lang for row in rows} == set(sources)
    assert all(set(row.st) == set(targets) for row in rows)
    for row in rows:
        train.speak_row(row)
        for mode in ("align", "time", "ratio:0.5"):
            pairs = interleave(row, mode)
            assert len(pairs) == len(row.asr.split()) + sum(
                len(text.split()) for text in row.st.values()
            )
    with pytest.raises(ValueError, match="de-fr"):
        train.BuiltIn("de-fr", 0)


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
    # the first formant of a, and of i
    assert peak(ends[0], 300, 1100) == pytest.approx(750 * 1.1, rel=0.15)
    assert peak(ends[1], 150, 1100) == pytest.approx(290 * 1.1, rel=0.30)


def test_a_tract_scales_all_formants_and_the_noise(monkeypatch):
    seen, scaled = [], [0, 1, 2, 5, 6]
    monkeypatch.setattr(train, "_formants", lambda track, pitch, noise: seen.append(
        track.copy()) or noise.copy())
    for tract in (1.0, 1.12):
        train.speak(["sag", "ja"], train.Speaker(120.0, tract, 1.0), np.random.default_rng(0))
    assert np.allclose(seen[1][:, scaled], 1.12 * seen[0][:, scaled])
    assert np.array_equal(seen[1][:, 3:5], seen[0][:, 3:5])


def test_word_ends_are_where_the_sound_stops():
    speaker = train.Speaker(150.0, 1.0, 1.0)
    samples, ends = train.speak(["aaaa"], speaker, np.random.default_rng(1))
    level = np.sqrt(np.convolve(samples ** 2, np.ones(80) / 80, "same"))
    loud = np.flatnonzero(level > 0.3 * level.max())
    assert loud[-1] / 16000 == pytest.approx(ends[0], abs=0.02)


def test_speakers_levels_and_noise_stay_in_their_ranges():
    speakers = [train.make_speaker(f"train{k:04d}") for k in range(500)]
    for values, low, high in (
        ([s.pitch_hz for s in speakers], 80, 250),
        ([s.tract for s in speakers], 0.88, 1.12),
        ([s.rate for s in speakers], 0.8, 1.2),
    ):
        assert low <= min(values) < low * 1.05 and high * 0.95 < max(values) <= high
    loudness = [
        20 * np.log10(np.sqrt(np.mean(train.speak_row(train.builtin_row(k))[0] ** 2)) / 0.06)
        for k in range(60)
    ]
    assert -15 < min(loudness) < -9 and 9 < max(loudness) < 15.5  # the noise adds at most 0.4 dB


# ---- Options

def refused(capsys, *argv):
    """What a command says that is refused: one line, exit code 2."""
    assert train.main(list(map(str, argv))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("train.py: "), said
    return said


@pytest.mark.parametrize(
    "argv",
    [
        ["--eval-every", "0"],
        ["--batch-seconds", "0"],
        ["--batch-seconds", "-2"],
        ["--steps", "-1"],
        ["--join", "0"],
        ["--label-dropout", "1.5"],
        ["--device", "gpu"],
        ["--lr", "nan"],
        ["--lr", "-1"],
        ["--dropout", "1"],
        ["--accumulate", "0"],
        ["--interleave", "foo"],
        ["--interleave", "ratio:1.5"],
        ["--interleave", "ratio:x"],
        ["--prune", "1"],
        ["--restrict", "0.8", "--prune", "8"],
        ["--prune", "-1"],
        ["--prune", "10000000000000000000"],
        ["--join", "10000000000000000000"],
        ["--steps", "9" * 400],
        ["--warm-steps", "1200"],
        ["--fastemit", "-0.1"],
        ["--workers", "-1"],
        ["--max-seconds", "0"],
        ["--merges", "-1"],
        ["--seed", "-1"],
        ["--corpus", "de-fr"],
        ["--corpus", "de"],
        ["--corpus", "de-de"],
        ["--chunks", "-3"],
        ["--chunks", "1501"],
        ["--device", "cpu:0"],
        ["--device", "cuda:1"],
        ["--seed", str(2 ** 32)],
        ["--augment", "1.5"],
        ["--dev", "/dev.jsonl"],
    ],
)
def test_a_value_out_of_range_is_named(argv, capsys, tmp_path):
    said = refused(
        capsys,
        *argv,
        *([] if argv[0] == "--device" else ["--device", "cpu"]),
        "--out",
        tmp_path / "run",
    )
    assert argv[0].strip("-").replace("-", "_") in said.replace("-", "_") and argv[1] in said
    assert not list(tmp_path.rglob("*.pt"))


def test_numbers_that_are_none_are_named(capsys):
    with pytest.raises(SystemExit):
        train.parse_options(["--chunks", "8;16"])
    assert "--chunks: '8;16' is not whole numbers" in capsys.readouterr().err


def test_there_are_at_most_31_flags_with_a_sentence_each():
    actions = [
        a
        for a in train.make_parser()._actions
        if a.option_strings and a.dest not in ("help", "write_corpus")
    ]
    assert len(actions) <= 31 and all(a.help for a in actions)
    options = train.parse_options(["--device", "cpu"])
    assert (options.lr, options.steps, options.warm_steps, options.prune) == (2e-3, 1200, 370, 16)
    options = train.parse_options(["x.jsonl", "--device", "cpu"])
    assert (options.lr, options.steps, options.warm_steps, options.prune) == (2e-3, 12000, 3400, 16)
    options = train.parse_options(["x.jsonl", "--device", "cpu", "--steps", "5000"])
    assert (options.steps, options.merges) == (5000, 240)


def test_resume_of_nothing_and_of_another_model(small, capsys, tmp_path):
    assert "resume.pt" in refused(capsys, "--resume", tmp_path)
    folder = run(tmp_path / "run", "--steps", "6")
    capsys.readouterr()
    for flag, value in (
        ("--merges", "7"),
        ("--corpus", "de-es"),
        ("--seed", "3"),
        ("--interleave", "asr"),
    ):
        said = refused(capsys, "--resume", folder, flag, value, "--steps", "9")
        assert flag in said and value in said
    assert "its own folder" in refused(
        capsys, "--resume", folder, "--out", tmp_path / "x", "--steps", "9")
    assert "--steps is 6" in refused(capsys, "--resume", folder)
    assert "--steps is 5" in refused(capsys, "--resume", folder / "model.pt", "--steps", "5")
    said = refused(capsys, "--out", folder, *SHORT)
    assert str(folder) in said and "--resume" in said


@pytest.mark.parametrize("name, value", [
    ("options", {"steps": "many"}), ("options", {"chunks": None}), ("options", {"preset": "huge"}),
    ("options", {"interleave": 5}), ("options", {"dev": 5}), ("options", {"join": 2.5}),
    ("step", "x"), ("step", -1), ("step", True), ("letters", None), ("letters", "abc"),
    ("position", [0]), ("position", [0, "x"]), ("best", None), ("optimizers", [1, 2]),
    ("tokenizer", None), ("tokenizer", {"tags": ["<asr>"], "merges": []})])
def test_what_lies_beside_good_weights_is_looked_at(small, tmp_path, capsys, name, value):
    folder = run(tmp_path / "run", "--steps", "6")
    model, beside = load(folder / "resume.pt")
    value = beside["options"] | value if name == "options" else value
    save(folder / "resume.pt", model, **beside | {name: value})
    capsys.readouterr()
    said = refused(capsys, "--resume", folder, "--steps", "9")
    assert "resume.pt" in said and "damaged checkpoint" in said


def test_a_run_goes_on_with_the_dropout_and_chunks_given(small, tmp_path):
    folder = run(tmp_path / "run", "--steps", "6")
    made = train.resume_run(train.parse_options(
        ["--resume", str(folder), "--steps", "9", "--dropout", "0.4", "--chunks", "2,6",
         "--device", "cpu"]))
    assert (made.model.config.dropout, made.model.config.chunks) == (0.4, (2, 6))
    assert {m.p for m in made.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.4}
    assert same_weights(weights_of(folder / "resume.pt"), made.model.state_dict())


def test_a_model_of_the_same_tokens_gives_all_it_has(small, tmp_path, capsys):
    first = run(tmp_path / "a", "--steps", "6") / "model.pt"
    options, given = train.parse_options([*SHORT, "--init", str(first)]), weights_of(first)
    capsys.readouterr()
    made = train.new_run(options, train.BuiltIn("de-en", 0))
    assert same_weights(given, made.model.state_dict())
    assert "not one left" in capsys.readouterr().out
    other = train.new_run(options, train.BuiltIn("de-es", 0)).model.state_dict()
    name = "label_encoder.embedding.weight"
    assert not torch.equal(other[name], given[name])


def test_a_new_joint_is_deaf_to_labels_and_hears(small):
    made = train.new_run(train.parse_options(["--device", "cpu"]), train.BuiltIn("de-en", 0))
    joint, labels = made.model.joint, torch.tensor([[3, 4, 5]])
    frames = torch.randn(1, 2, made.model.config.dim)
    with torch.no_grad():
        logits = joint(frames, made.model.eval().label_encoder(labels)[0])
    assert torch.equal(logits, logits[:, :, :1].expand_as(logits))
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3


def test_the_defaults_for_real_speech():
    def chosen(*argv):
        options = train.parse_options([*argv, "--device", "cpu"])
        return [options.augment, options.label_dropout, options.eval_every, options.join]

    assert chosen() == [1.0, 0.1, 600, 3]
    assert chosen("m.jsonl") == [0.2, 0.25, 2000, 3]
    assert chosen("m.jsonl", "--augment", "0.4") == [0.4, 0.25, 2000, 3]


# ---- Data

def example_of(source, s, easy=True):
    """What the model is given of one stream."""
    bad = []
    sounds = [source.sound_of(row) for row in s.rows]
    example = source.example(s, sounds, train.Request([s], 0, (0, 1), easy), bad)
    assert not bad
    return example


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
    soundfile.write(tmp_path / "long.wav", np.tile(tone, 31), 16000)
    soundfile.write(tmp_path / "empty.wav", tone[:0], 16000)
    soundfile.write(tmp_path / "cut.flac", tone, 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:200])
    names = [
        "good.wav",
        "stereo.wav",
        "rate.wav",
        "long.wav",
        "empty.wav",
        "cut.flac",
        "missing.wav",
    ]
    rows = [
        {"audio": name, "asr": "a b", "st": {"en": "c d"}, "links": {"en": "0-0 1-1"}}
        for name in names
    ]
    path = write_rows(tmp_path, rows + [{"audio": "good.wav"}])
    path.write_text(path.read_text() + "not json\n")
    return path


def test_bad_rows_are_named_counted_and_left_out(bad_manifest, capsys):
    corpus, _ = train.open_corpus(train.parse_options([str(bad_manifest), "--device", "cpu"]))
    assert [Path(row.audio).name for row in corpus.rows(0)] == [
        "good.wav",
        "stereo.wav",
        "rate.wav",
    ]
    assert [row.duration for row in corpus.rows(0)] == [1.0, 1.0, 1.0]
    said = capsys.readouterr().err
    for number, what in (
        (4, "31.0 s long"),
        (5, "empty"),
        (6, "cut.flac"),
        (7, "missing.wav"),
        (8, "no text"),
        (9, ""),
    ):
        line = next(line for line in said.splitlines() if f"rows.jsonl:{number}:" in line)
        assert what in line
    assert "2 of 9 rows skipped" in said and "4 of 7 rows left out" in said


def test_a_text_that_no_sound_can_hold_is_left_out(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1), 16000)
    rows = [{"audio": "a.wav", "asr": text, "st": {"en": "b"}} for text in
            ("a" * 300, "a" * 600, "a b " * 1000)]
    corpus, _ = train.open_corpus(train.parse_options(
        [str(write_rows(tmp_path, rows)), "--device", "cpu"]))
    assert [len(row.asr) for row in corpus.rows(0)] == [300]
    said = capsys.readouterr().err
    assert "rows.jsonl:2: 603 letters to write in 1.0 s of sound: left out" in said


def test_a_text_that_ctc_cannot_fit_into_its_frames_is_none_for_it(tmp_path, capsys):
    """Its cost would be 0, and its letters counted among those learned."""
    assert train.if_it_fits([1, 1, 2], 3) == [] and train.if_it_fits([1, 1, 2], 4) == [1, 1, 2]
    assert train.if_it_fits("aba", 3) == "aba"                 # no two neighbours are equal
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1), 16000)        # 25 frames
    rows = [{"audio": "a.wav", "asr": "ab" * 20}, {"audio": "a.wav", "asr": "ab"}]
    train.open_corpus(train.parse_options([str(write_rows(tmp_path, rows)), "--device", "cpu"]))
    said = capsys.readouterr().err
    assert "1 of 2 rows have fewer frames of 40 ms than letters" in said


def test_the_tokenizer_learns_from_all_over_a_large_manifest(tmp_path, monkeypatch):
    """Which may be sorted by language."""
    monkeypatch.setattr(train, "BPE_ROWS", 3)
    seen, learn = [], train.Tokenizer.train
    monkeypatch.setattr(train.Tokenizer, "train", lambda texts, *rest: seen.extend(texts) or learn(
        texts, *rest))
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1), 16000)
    rows = [{"audio": "a.wav", "asr": f"w{k}"} for k in range(7)]
    options = train.parse_options([str(write_rows(tmp_path, rows)), "--device", "cpu",
                                   "--interleave", "asr"])
    train.new_run(options, train.open_corpus(options)[0])
    assert seen == ["w0", "w3", "w6"]


def test_a_run_finds_its_files_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").touch()
    options = train.parse_options(["m.jsonl", "--dev", "d.jsonl", "--device", "cpu"])
    assert (options.manifest, options.dev) == (str(tmp_path / "m.jsonl"), str(tmp_path / "d.jsonl"))


def test_strict_is_about_sound_too(tmp_path):
    soundfile.write(tmp_path / "good.wav", np.full(16000, 0.1), 16000)
    rows = [{"audio": f"{name}.wav", "asr": "x"} for name in ("good", "gone")]
    bad, good = str(write_rows(tmp_path, rows)), tmp_path / "good.jsonl"
    good.write_text(json.dumps(rows[0]) + "\n")
    for argv in ([bad], [str(good), "--dev", bad]):
        train.open_corpus(train.parse_options([*argv, "--device", "cpu"]))
        with pytest.raises(ValueError, match="rows.jsonl:2: .*gone.wav"):
            train.open_corpus(train.parse_options([*argv, "--device", "cpu", "--strict"]))


def test_sound_outside_the_folder_is_learned_where_that_is_allowed(tmp_path):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1), 16000)
    rows = str(write_rows(tmp_path / "in", [{"audio": "../a.wav", "asr": "x"}]))
    corpus, _ = train.open_corpus(train.parse_options([rows, "--allow-outside", "--device", "cpu"]))
    assert [row.duration for row in corpus.rows(0)] == [1.0]
    with pytest.raises(ValueError, match="no usable row"):
        train.open_corpus(train.parse_options([rows, "--device", "cpu"]))


def test_strict_stops_at_the_first_bad_row(bad_manifest, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([str(bad_manifest), "--strict", "--out", str(out)]) == 2
    assert "rows.jsonl:8" in capsys.readouterr().err and not list(out.glob("*.pt"))
    assert train.main([str(tmp_path / "nothing.jsonl"), "--out", str(out)]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


def test_rows_with_one_text_are_learned_as_that_text(small, tmp_path):
    tone = (0.1 * np.sin(np.arange(32000) / 20)).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", tone, 16000)
    rows = [{"audio": "tone.wav", "asr": "a b", "st": {"en": "c d"}, "links": {"en": "0-0 1-1"}},
            {"audio": "tone.wav", "asr": "a b"}, {"audio": "tone.wav", "st": {"en": "c d"}}]
    options = train.parse_options(
        [str(write_rows(tmp_path, rows)), "--device", "cpu", "--join", "1", "--augment", "0"]
    )
    corpus, _ = train.open_corpus(options)
    made = train.new_run(options, corpus)
    source, tokenizer = train.Source(options, made), made.tokenizer
    batches = [
        source[train.Request([s], 0, (0, 1), True)] for s in train.epoch_streams(corpus, 0, options)
    ]
    texts = {tuple(parse(batch["targets"][0].tolist(), tokenizer)) for batch in batches}
    both = (("<asr>", "a"), ("<st:en>", "c"), ("<asr>", "b"), ("<st:en>", "d"))
    assert texts == {both, both[::2], both[1::2]}
    # What the joint is to write without labels: the transcription where there is one to write.
    alone = {(len(parse(batch["targets"][0].tolist(), tokenizer)),
              tuple(batch["words"][0].tolist())) for batch in batches}
    transcription, translation = (tuple(tokenizer.encode(text)) for text in ("a b", "c d"))
    assert alone == {(4, transcription), (2, transcription), (2, translation)}
    source.options = replace(options, interleave="st")
    s = next(s for s in train.epoch_streams(corpus, 0, options) if s.rows[0].asr and s.rows[0].st)
    example = example_of(source, s)
    assert tuple(example["words"]) == translation and len(example["letters"]) == 3


def streams_of(corpus, options, epoch=0):
    return list(train.epoch_streams(corpus, epoch, options))


def test_batches_hold_every_row_once_with_little_padding():
    corpus, options = train.BuiltIn("de-en", 0), train.parse_options(["--device", "cpu"])
    batches = train.epoch_batches(corpus, 0, options)
    ids = [row.id for batch in batches for s in batch for row in s.rows]
    assert sorted(ids) == sorted(row.id for row in corpus.rows(0))
    padded = sum(max(s.seconds for s in batch) * len(batch) for batch in batches)
    assert 1 - sum(s.seconds for batch in batches for s in batch) / padded < 0.1
    assert (
        max(max(s.seconds for s in batch) * len(batch) for batch in batches)
        <= options.batch_seconds
    )
    assert ids != [
        row.id for batch in train.epoch_batches(corpus, 1, options) for s in batch for row in s.rows
    ]
    lengths = [len(s.rows) for batch in batches for s in batch]
    assert set(lengths) == {1, 2, 3} and max(s.seconds for batch in batches for s in batch) < 35


def test_epoch_after_epoch_brings_other_utterances(small):
    """From the built-in corpus others, from a manifest the same in another order; and each request
    says which one follows it, over the end of an epoch too."""
    options = train.parse_options(["--device", "cpu", "--batch-seconds", "300"])
    corpus = train.BuiltIn("de-en", 0)
    made = train.new_run(options, corpus)
    wanted, seen, requests = train.requests(corpus, made, options, train.Ranks()), {}, []
    for request in itertools.islice(wanted, 3 * corpus.SIZE):  # more than three epochs have
        requests.append(request)
        seen.setdefault(request.epoch, set()).update(
            row.id for s in request.streams for row in s.rows)
        if len(seen) == 3:
            break
    assert set(seen) == {0, 1, 2} and not seen[0] & seen[1] and len(seen[0]) == corpus.SIZE
    for k, request in enumerate(requests):
        place = sum(other.epoch == request.epoch for other in requests[:k])
        assert request.after == (request.epoch, place + 1)
    # Several processes end a step in the next epoch: a place behind the end is one of that epoch.
    short = replace(options, batch_seconds=10)
    made.position = (0, len(train.epoch_batches(corpus, 0, short)) + 1)
    behind = next(train.requests(corpus, made, short, train.Ranks()))
    assert behind.after == (1, 2)
    assert behind.streams == train.epoch_batches(corpus, 1, short)[1]
    fixed = train.Corpus([replace(row, duration=3.0) for row in corpus.rows(0)])
    orders = [
        [
            row.id
            for batch in train.epoch_batches(fixed, epoch, options)
            for s in batch
            for row in s.rows
        ]
        for epoch in (0, 1)
    ]
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])


def test_the_length_of_a_built_in_row_is_known_before_it_is_spoken():
    corpus = train.BuiltIn("de-en", 0)
    error = [
        corpus.seconds(row) / (len(train.speak_row(row)[0]) / 16000) - 1
        for row in corpus.rows(0, 60)
    ]
    assert abs(np.mean(error)) < 0.03 and np.abs(error).max() < 0.15


def test_rows_of_one_file_are_joined_in_their_order(tmp_path):
    rows = [
        train.Row(id=f"{f}{k}", audio=f"{f}.wav", start=float(k), duration=1.0, asr="a")
        for k in range(40)
        for f in "xy"
    ]
    options = train.parse_options(["--device", "cpu", "--join", "5"])
    joined = [s for s in streams_of(train.Corpus(rows), options) if len(s.rows) > 1]
    pairs = [(a, b) for s in joined for a, b in zip(s.rows, s.rows[1:])]
    follows = np.mean([b.audio == a.audio and b.start == a.start + 1 for a, b in pairs])
    assert follows > 0.5  # of 80 rows drawn blindly, about one in 80 would
    assert sum(len(s.rows) for s in streams_of(train.Corpus(rows), options)) == len(rows)
    mixed = [rows[k] for k in (10, 0, 3, 4)]                    # x at 5 and 0, y at 1, x at 2
    assert train.neighbours(mixed) == {1: 3, 3: 0}


def test_recorded_speech_ends_in_the_silence_that_the_search_appends():
    rows = [train.builtin_row(0), train.builtin_row(1)]
    sounds = [np.ones(1600, np.float32), np.full(800, 2, np.float32)]
    s = train.Stream(rows, [0.0, 0.5], [], 1.0, 1.0)
    spoken, starts = train.joined(s, sounds)
    assert starts == [0, 1600 + 8000] and len(spoken) == 1600 + 8000 + 800   # it has its own
    rows[1].audio = "x.wav"
    recorded, _ = train.joined(s, sounds)
    assert np.array_equal(recorded[:len(spoken)], spoken)
    assert len(recorded) - len(spoken) == 0.32 * 16000 and not recorded[len(spoken):].any()


def test_an_example_of_joined_utterances_has_their_words_in_turn_and_a_lattice_of_blocks():
    corpus = train.BuiltIn("de-en", 0)
    options = train.parse_options(["--device", "cpu", "--augment", "0", "--prune", "0"])
    source = train.Source(options, train.new_run(options, corpus))
    s = next(s for s in streams_of(corpus, options) if len(s.rows) == 3)
    example = example_of(source, s)
    pairs = parse(example["targets"], source.tokenizer)
    assert pairs == [pair for row in s.rows for pair in interleave(row, "align")]
    samples, starts = train.joined(s, [source.sound_of(row) for row in s.rows])
    for row, start in zip(s.rows, starts):
        own = train.speak_row(row)[0]
        assert np.array_equal(samples[start:start + len(own)], own)
    keep, labels = example["keep"], np.cumsum(
        [len(train.serialize(interleave(row, "align"), source.tokenizer)) for row in s.rows]
    )
    assert keep.shape == (len(example["mel"]) // 4, len(example["targets"]) + 1)
    at = starts[1] // 640  # the frame at which the second one starts
    assert keep[at - 1].nonzero().max() == labels[0] and keep[at - 1, 0]
    assert keep[at].nonzero().flatten().tolist() == list(range(labels[1] + 1))  # for a chunk, both
    after = at + max(source.config.chunks)
    assert keep[after].nonzero().min() == labels[0]
    assert keep[-1].nonzero().flatten().tolist() == list(range(labels[1], labels[2] + 1))
    assert keep.float().mean() < 0.6                           # the work that is left
    # However short the utterances, and without a margin, a path leads through.
    source.config = replace(source.config, chunks=(0,))
    through = source.blocks([interleave(row, "align") for row in s.rows], [0, 100, 200], 200,
                            len(example["targets"]))
    assert through.any(0).all() and through[0, 0] and through[-1, -1]


def test_a_restricted_lattice_by_hand():
    """Frames of 0.25 s; three labels of words that end at 0.5, 1.6 and (out of order) 1.0 s."""
    keep = train.around(np.array([0.5, 1.6, 1.0]), 9, 0.25, 0.5)
    first, last = [1, 6, 6], [4, 8, 8]      # 0.5 s is the end of frame 1, 0.5 + 0.5 s in frame 4 ..
    for t in range(9):
        for u in range(4):
            begun = u == 0 or t >= first[u - 1]
            left = u == 3 or t <= last[u]
            assert keep[t, u] == (begun and left), (t, u)
    # A word after the end of the sound is written in the last frame.
    late = train.around(np.array([0.5, 9.0]), 9, 0.25, 0.5)
    assert late[:, 2].nonzero().flatten().tolist() == [8] and late[8, 1]


@pytest.mark.parametrize("order", ["align", "time", "asr", "st", "ratio:0", "ratio:0.5"])
def test_labels_are_written_around_the_times_of_their_words(order):
    corpus = train.BuiltIn("de-en", 0)
    options = train.parse_options(["--device", "cpu", "--augment", "0", "--interleave", order,
                                   "--restrict", "0.8"])
    source = train.Source(options, train.new_run(options, corpus))
    s = next(s for s in streams_of(corpus, options) if len(s.rows) == 2)
    example = example_of(source, s)
    keep, frame_s = example["keep"], 0.04
    _, starts = train.joined(s, [source.sound_of(row) for row in s.rows])
    pairs, times, label, latest = [], [], 0, 0.0
    for row, start in zip(s.rows, starts):
        own = {"<asr>": iter(row.times), "<st:en>": iter(row.st_times["en"])}
        for pair in interleave(row, order):
            pairs.append(pair)
            latest = max(latest, start / 16000 + next(own[pair[0]]))
            times.append(latest)
    for n, time in enumerate(times, 1):
        after = len(serialize(pairs[:n], source.tokenizer))
        for k in range(label, after):          # frames in which label k can be written
            frames = (keep[:, k] & keep[:, k + 1]).nonzero().flatten().tolist()
            first = max(0, math.ceil(time / frame_s - 1e-6) - 1)
            assert frames == list(range(first, min(len(keep), int((time + 0.8) / frame_s) + 1)))
        label = after
    assert label == len(example["targets"]) == keep.shape[1] - 1
    # Times of the translation that are not given follow from the links.
    given = source.label_times(s, [interleave(row, order) for row in s.rows], starts)
    s.rows = [replace(row, st_times={}) for row in s.rows]
    if order != "time":
        projected = source.label_times(s, [interleave(row, order) for row in s.rows], starts)
        assert np.array_equal(*map(np.maximum.accumulate, (given, projected)))
    source.options = replace(options, restrict=0.0)            # the control
    whole = example_of(source, s)["keep"]
    assert whole.sum() > 1.4 * keep.sum() and whole[0, 1]


def test_a_row_without_times_or_a_run_without_the_option_has_no_restricted_lattice(tmp_path):
    assert train.main(["--write-corpus", str(tmp_path), "4"]) == 0
    manifest = tmp_path / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    del rows[1]["times"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def masks(*more):
        options = train.parse_options([str(manifest), "--device", "cpu", "--augment", "0",
                                       "--join", "1", "--prune", "0", "--restrict", "0.8", *more])
        corpus, _ = train.open_corpus(options)
        source = train.Source(options, train.new_run(options, corpus))
        streams = [train.Stream([row], [0.0], [], 1.0, 3.0) for row in corpus.rows(0)]
        return [source[train.Request([s], 0, (0, 1), True)]["keep"] for s in streams]
    assert [mask.float().mean() < 0.8 for mask in masks()] == [True, False, True, True]
    assert masks("--restrict", "0") == 4 * [None] == masks("--restrict", "0", "--prune", "8")


@pytest.mark.parametrize("n", [16384, 48017])
def test_a_low_pass_takes_what_is_above_and_nothing_else(n):
    """To the bit of a transform where the length is one of its own; where it is padded, but for the
    ends."""
    x = np.random.default_rng(0).normal(0, 0.1, n).astype(np.float32)
    y = train.low_pass(x, 4000)
    assert y.shape == x.shape and y.dtype == np.float32
    power, before = (np.abs(np.fft.rfft(signal)) ** 2 for signal in (y, x))
    cut = round(4000 * n / 16000)
    assert power[cut + 2:].sum() < (1e-6 if n == 16384 else 1e-3) * power.sum()
    if n == 16384:
        assert np.allclose(power[:cut], before[:cut], rtol=1e-2)
    assert power[:cut].sum() == pytest.approx(before[:cut].sum(), rel=1e-2)


def test_mu_law():
    x = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    y = train.mu_law(x)
    assert y.shape == x.shape and y.dtype == np.float32 and len(np.unique(y)) <= 255
    assert 30 < 10 * np.log10(np.var(x) / np.var(y - x)) < 45              # G.711: about 38 dB


def test_how_often_there_is_a_telephone_and_how_much_of_the_spectrum(monkeypatch):
    x, coded, cut = np.sin(np.arange(1600) / 5).astype(np.float32) * 0.1, [], []
    monkeypatch.setattr(train, "mu_law", lambda samples: coded.append(1) or samples)
    monkeypatch.setattr(train, "low_pass", lambda samples, hz: cut.append(hz) or samples)
    for seed in range(1000):
        train.disturb(x, None, np.random.default_rng(seed))
    assert 0.11 < len(coded) / 1000 < 0.19 and 0.35 < len(cut) / 1000 < 0.45
    assert 3400 <= min(cut) < 3600 and 7800 < max(cut) <= 8000


def test_disturbed_sound_is_up_to_20_db_softer_and_10_db_louder():
    x = np.sin(np.arange(16000) / 5).astype(np.float32) * 0.1
    gains = [(x @ train.disturb(x, None, np.random.default_rng(seed))) / (x @ x)
             for seed in range(200)]
    assert 0.09 < min(gains) < 0.13 and 2.5 < max(gains) < 3.4
    assert 0.4 < np.median(gains) < 0.8                        # 10 ** -0.25


def test_disturbed_sound_is_a_function_of_its_seed_and_has_the_noise_it_claims():
    x = np.sin(np.arange(16000) / 5).astype(np.float32) * 0.1
    noise = np.random.default_rng(1).normal(0, 1, 16000)
    once, again, other = (train.disturb(x, noise, np.random.default_rng(k)) for k in (5, 5, 6))
    assert (
        np.array_equal(once, again) and not np.array_equal(once, other) and once.dtype == np.float32
    )
    ratios = []
    for k in range(200):
        y = train.disturb(x, noise, np.random.default_rng(k)).astype(float)
        speech = (x @ y) / (x @ x)  # how much of the tone is left, and what beside it
        ratios.append(10 * np.log10(np.sum((speech * x) ** 2) / np.sum((y - speech * x) ** 2)))
        assert np.isfinite(y).all() and np.abs(y).max() <= 1.001
    assert 4 < np.percentile(ratios, 2) < 8 and np.percentile(ratios, 98) < 40


def test_bands_are_taken_to_their_mean_or_to_the_floor():
    mel, filled = torch.randn(200, 80) + torch.arange(80) / 8, []
    for seed in range(60):
        holed = train.without_bands(mel, np.random.default_rng(seed), -11.5)
        assert torch.equal(holed, train.without_bands(mel, np.random.default_rng(seed), -11.5))
        changed = holed != mel
        assert torch.equal(changed, changed[:1].expand(200, 80))           # a band as a whole
        if changed.any():
            floor = bool((holed[changed] == -11.5).all())
            assert floor or torch.allclose(holed[changed], mel.mean(0).expand(200, 80)[changed])
            filled.append(floor)
        assert changed[0].sum() <= 32
    assert 30 < len(filled) < 50 and 5 < sum(filled) < len(filled) - 5


def test_the_first_phase_hears_the_sound_as_it_is(small):
    options = train.parse_options(["--device", "cpu", "--join", "1"])
    corpus = train.BuiltIn("de-en", 0)
    source = train.Source(options, train.new_run(options, corpus))
    for row in corpus.rows(0):
        s = train.Stream([row], [0.0], [], 1.0, 3.0)
        plain = train.mel_of(train.sound_of(row, 0), source.config)
        heard = {easy: example_of(source, s, easy)["mel"] for easy in (True, False)}
        assert torch.equal(heard[True], plain) and not torch.equal(heard[False], plain)
    wanted = train.requests(corpus, train.new_run(options, corpus), options, train.Ranks())
    easy = [next(wanted).easy for _ in range(options.warm_steps)]
    half = options.warm_steps // 2
    assert all(easy[:half]) and not any(easy[half:])


def test_the_first_phase_ends_at_its_step_however_a_step_is_cut(small):
    options = train.parse_options(["--device", "cpu", "--accumulate", "3", "--warm-steps", "8"])
    corpus = train.BuiltIn("de-en", 0)
    made = train.new_run(options, corpus)
    for rank in (0, 1):
        wanted = train.requests(corpus, made, options, train.Ranks(rank, 2))
        assert [next(wanted).easy for _ in range(24)] == [True] * 12 + [False] * 12


def test_a_share_of_the_streams_is_disturbed(small):
    options = train.parse_options(["--device", "cpu", "--join", "1"])
    corpus = train.BuiltIn("de-en", 0)
    made = train.new_run(options, corpus)
    streams = [train.Stream([row], [0.0], [], 1.0, 3.0) for row in corpus.rows(0)[:60]]
    plain = [train.mel_of(train.sound_of(s.rows[0], 0), made.model.config) for s in streams]
    for share, low, high in ((0, 0, 0), (0.5, 0.25, 0.75), (1, 1, 1)):
        source = train.Source(replace(options, augment=share), made)
        heard = [example_of(source, s, easy=False)["mel"] for s in streams]
        assert low <= np.mean([not torch.equal(a, b) for a, b in zip(heard, plain)]) <= high


def test_a_codec_silences_what_is_weak_above_a_band_in_a_quarter_of_the_streams():
    mel, floor, changed_by = torch.randn(200, 80), -11.5, []
    for seed in range(200):
        coded = train.through_codec(mel, np.random.default_rng(seed), floor)
        changed = coded != mel
        if changed.any():
            changed_by.append(seed)
            assert (coded[changed] == floor).all()
            first = changed.any(0).nonzero()[0].item()
            assert first >= 30                                 # the lower bands stay
            above = torch.arange(80) >= first
            depth = mel.amax(1, keepdim=True) - mel
            # Above it, exactly what lies deeper below the loudest band than some bound.
            assert depth[changed].min() >= depth[:, above][~changed[:, above]].max()
            assert 1 <= depth[changed].min() <= 6.5
    assert 30 < len(changed_by) < 70


def test_stretches_are_taken_to_the_mean_of_their_bands():
    mel, lengths = torch.randn(400, 80) + torch.arange(80) / 8, []
    for seed in range(60):
        holed = train.without_stretches(mel, np.random.default_rng(seed))
        changed = holed != mel
        assert torch.equal(changed, changed[:, :1].expand(400, 80))
        assert torch.allclose(holed[changed], mel.mean(0).expand(400, 80)[changed])
        lengths.append(int(changed[:, 0].sum()))
    assert max(lengths) <= 80 and 30 < np.mean(lengths) < 50


@pytest.mark.parametrize("n", [1, 2, 7, 15, 16, 17, 48017, 100003])
def test_noise_and_filters_of_any_length_take_a_size_of_small_factors(n):
    size = train.fast_size(n)
    assert n <= size <= 1.13 * n + 1
    for factor in (2, 3, 5, 7, 11, 13):
        while size % factor == 0:
            size //= factor
    assert size == 1
    noise = train.coloured_noise(n, np.random.default_rng(0))
    assert noise.shape == (n,) and np.isfinite(noise).all()
    assert train.low_pass(noise.astype(np.float32), 4000).shape == (n,)


def test_a_row_that_turns_out_bad_is_named_once_and_left_out(tmp_path, capsys, small):
    tone = (0.1 * np.sin(np.arange(16000) / 20)).astype(np.float32)
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", tone, 16000)
    rows = [
        {
            "audio": f"{name}.wav",
            "duration": 1.0,
            "asr": "x y",
            "st": {"en": "z"},
            "links": {"en": "0-0"},
        }
        for name in "ab"
    ]
    options = train.parse_options(
        [str(write_rows(tmp_path, rows)), "--device", "cpu", "--join", "1"]
    )
    corpus, _ = train.open_corpus(options)
    made = train.new_run(options, corpus)
    (tmp_path / "b.wav").write_bytes(b"no longer a sound")
    with train.Batches(
        train.Source(options, made), corpus, made, options, train.Ranks()
    ) as batches:
        for group, _ in zip(batches, range(4)):
            assert len(group[0]["mel"]) == 1
    assert capsys.readouterr().err.count("rows.jsonl:2") == 1
    strict = replace(options, strict=True)
    with train.Batches(train.Source(strict, made), corpus, made, strict, train.Ranks()) as batches:
        with pytest.raises(train.InputError, match="rows.jsonl:2"):
            next(iter(batches))


def test_a_bad_row_takes_no_good_one_with_it(tmp_path, small):
    """Neither the utterances that it is joined to, nor the one that it is a background to."""
    tone = (0.1 * np.sin(np.arange(16000) / 20)).astype(np.float32)
    rows = [{"audio": f"{name}.wav", "duration": 1.0, "asr": f"{name} y"} for name in "abc"]
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", tone, 16000)
    options = train.parse_options(
        [str(write_rows(tmp_path, rows)), "--device", "cpu", "--augment", "1"])
    corpus, _ = train.open_corpus(options)
    source = train.Source(options, train.new_run(options, corpus))
    (tmp_path / "b.wav").write_bytes(b"no longer a sound")
    s = train.Stream(corpus.rows(0), [0.5, 1.0, 0.0], [corpus.rows(0)[1]], 1.0, 4.5)
    batch = source[train.Request([s], 0, (0, 1), False)]
    pairs = parse(batch["targets"][0].tolist(), source.tokenizer)
    assert pairs == [("<asr>", word) for word in "a y c y".split()]
    assert batch["mel"].shape[1] == 252 + 32       # 0.5 + 1 + 0 + 1 s, whole frames; silence
    assert len(batch["bad"]) == 2 and all("rows.jsonl:2" in message for message in batch["bad"])
    assert source.background(s, 100, np.random.default_rng(0), []) is None


@pytest.mark.parametrize("content", ["", "[{}]", "3", '[{"step": 1, "str', '[{"step": "600"}]',
                                     '[{"step": Infinity}]', "{}", "[" * 100_000])
def test_damaged_metrics_are_named(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(train.InputError, match="metrics.json: damaged; move it away"):
        train.past_metrics(tmp_path)


def test_a_corpus_is_not_written_over_another(tmp_path, capsys):
    (tmp_path / "manifest.jsonl").write_text("mine")
    assert "there is a manifest.jsonl already" in refused(capsys, "--write-corpus", tmp_path, "2")
    assert (tmp_path / "manifest.jsonl").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_shell_left_empty_is_told(capsys):
    """As `train.py "$DATA"`: it would train on the built-in corpus."""
    assert "manifest is empty" in refused(capsys, "", "--device", "cpu")
    for name in ("--resume", "--init", "--out", "--dev", "--noise"):
        assert f"{name} is empty" in refused(capsys, name, "", "--device", "cpu")
    assert "the folder's name is empty" in refused(capsys, "--write-corpus", "", "3")


def test_noise_comes_from_a_folder_with_sound_in_it(tmp_path, capsys, small):
    assert "nowhere" in refused(capsys, "--noise", tmp_path / "nowhere", "--device", "cpu")
    (tmp_path / "README.txt").write_text("noises")
    said = refused(capsys, "--noise", tmp_path, "--device", "cpu")
    assert "--noise" in said and str(tmp_path) in said
    hum = (0.5 * np.sin(np.arange(8000) / 10)).astype(np.float32)
    soundfile.write(tmp_path / "hum.wav", hum, 16000)
    (tmp_path / "broken.wav").write_bytes(b"none")
    if sys.platform == "linux":
        shutil.copy(tmp_path / "hum.wav", os.fsencode(tmp_path) + b"/stra\xdfe.wav")  # no UTF-8
        os.mkfifo(tmp_path / "pipe.wav")                       # whoever opens it waits for ever
    options = train.parse_options(["--noise", str(tmp_path), "--device", "cpu", "--join", "1"])
    corpus = train.BuiltIn("de-en", 0)
    source, bad, found = train.Source(options, train.new_run(options, corpus)), [], []
    s = train.Stream(corpus.rows(0)[:1], [0.0], [], 1.0, 3.0)
    for seed in range(40):
        found.append(source.background(s, 20000, np.random.default_rng(seed), bad))
    heard = [noise for noise in found if noise is not None]
    assert bad and all("broken.wav" in message for message in bad) and 4 < len(heard) < 20
    for noise in heard:                                        # from some place in the hum on
        starts = np.flatnonzero(np.abs(hum - noise[0]) < 1e-4)
        assert any(np.allclose(noise, np.resize(np.roll(hum, -k), 20000), atol=1e-4)
                   for k in starts)                            # and over again, the whole of it
    assert "never heard" in refused(capsys, "--noise", tmp_path, "--augment", "0")


def test_of_a_long_noise_only_what_is_heard_is_decoded(tmp_path, monkeypatch):
    """An hour would: here ten seconds, of which every sample tells its place."""
    ramp = np.linspace(0.1, 0.9, 160000).astype(np.float32)
    soundfile.write(tmp_path / "ramp.wav", ramp, 16000, subtype="FLOAT")
    options = train.parse_options(["--noise", str(tmp_path), "--device", "cpu"])
    corpus, read = train.BuiltIn("de-en", 0), []
    source = train.Source(options, train.new_run(options, corpus))
    real = train.read_audio

    def counted(*asked):
        read.append(len(real(*asked)))
        return real(*asked)
    monkeypatch.setattr(train, "read_audio", counted)
    s, bad, firsts = train.Stream(corpus.rows(0)[:1], [0.0], [], 1.0, 3.0), [], []
    for seed in range(40):
        noise = source.background(s, 20000, np.random.default_rng(seed), bad)
        if noise is not None:
            firsts.append(noise.min())
            assert noise.max() - noise.min() == pytest.approx(0.8 * 20000 / 160000, rel=1e-3)
    assert not bad and not source.kept and set(read) == {20000} and len(firsts) > 8
    assert min(firsts) < 0.3 and max(firsts) > 0.6               # from anywhere in it


def test_small_corpora_are_decoded_once(tmp_path, small, monkeypatch):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.full(16000, 0.1, np.float32), 16000)
    rows = [{"audio": f"{name}.wav", "duration": 1.0, "asr": "x"} for name in "ab"]
    options = train.parse_options([str(write_rows(tmp_path, rows)), "--device", "cpu"])
    corpus, _ = train.open_corpus(options)
    made, decoded = train.new_run(options, corpus), []
    real = train.read_audio
    monkeypatch.setattr(train, "read_audio", lambda *of: decoded.append(of[0]) or real(*of))
    monkeypatch.setattr(train, "KEPT_S", 1.5)                  # there is room for the first
    for workers, times in ((0, [1, 3]), (2, [3, 3])):
        source = train.Source(replace(options, workers=workers), made)
        decoded.clear()
        for _ in range(3):
            for row in corpus.rows(0):
                assert np.array_equal(source.sound_of(row), real(row.audio))
        assert [sum(Path(path).stem == name for path in decoded) for name in "ab"] == times


def test_each_row_hears_its_own_piece_of_a_file(small, tmp_path):
    """Those kept in memory too; and one without a duration goes to the end."""
    soundfile.write(tmp_path / "ramp.wav", np.linspace(.1, .9, 32000), 16000)
    rows = [{"audio": "ramp.wav", "start": start, "asr": "x", **more} for start, more in
            ((0, {"duration": 1.0}), (1.0, {"duration": 1.0}), (0.5, {}))]
    options = train.parse_options([str(write_rows(tmp_path, rows)), "--device", "cpu"])
    corpus, _ = train.open_corpus(options)
    source = train.Source(options, train.new_run(options, corpus))
    for _ in range(2):
        heard = [source.sound_of(row) for row in corpus.rows(0)]
        assert [len(samples) for samples in heard] == [16000, 16000, 24000]
        assert [samples[0] for samples in heard] == pytest.approx([0.1, 0.5, 0.3], abs=1e-3)
    assert [row.duration for row in corpus.rows(0)] == [1.0, 1.0, 1.5]


def test_unseen_utterances_are_unseen():
    corpus = train.BuiltIn("de-en", 0)
    learned, unseen = corpus.rows(0), [row for row, _ in corpus.unseen(50)]
    assert len(unseen) == 50 and all(row.id.startswith("test") for row in unseen)
    assert not {row.asr for row in learned} & {row.asr for row in unseen}
    assert not {row.speaker for row in learned} & {row.speaker for row in unseen}


def test_how_often_there_is_silence_a_pause_and_a_background():
    """Silence before the first word in a tenth of the streams, pauses of 5/7 s in the mean, other
    speakers in 15 % of them."""
    options = train.parse_options(["--device", "cpu"])
    rows = [train.Row(id=str(k), audio=f"{k}.wav", asr="x", duration=1.0) for k in range(9)]
    drawn = [train.draw_stream(rows[:3], 3.0, rows, np.random.default_rng(seed), options)
             for seed in range(4000)]
    before = np.array([s.pauses[0] for s in drawn])
    assert 0.08 < (before > 0).mean() < 0.12 and 4.5 < before.max() < 5
    assert np.mean([s.pauses[1:] for s in drawn]) == pytest.approx(5 / 7, abs=0.05)
    assert 0.13 < np.mean([bool(s.background) for s in drawn]) < 0.17
    assert {len(s.background) for s in drawn} == {0, 5}
    speeds = [s.speed for s in drawn]
    assert all(abs(speeds.count(speed) / 4000 - 1 / 3) < 0.04 for speed in (0.9, 1.0, 1.1))
    assert all(s.seconds == pytest.approx((3.0 + sum(s.pauses)) / s.speed) for s in drawn)
    plain = [train.draw_stream(rows[:3], 3.0, rows, np.random.default_rng(seed),
                               replace(options, augment=0)) for seed in range(300)]
    assert not any(s.pauses[0] or s.background or s.speed != 1 for s in plain)


def test_other_speakers_are_equally_loud(small, tmp_path):
    tone = np.sin(2 * np.pi * np.outer([300, 700], np.arange(16000)) / 16000)
    for name, loud, wave in (("a", 0.5, tone[0]), ("b", 0.005, tone[1])):
        soundfile.write(tmp_path / f"{name}.wav", loud * wave, 16000, subtype="FLOAT")
    rows = [{"audio": f"{name}.wav", "duration": 1.0, "asr": "x"} for name in "ab"]
    options = train.parse_options([str(write_rows(tmp_path, rows)), "--device", "cpu"])
    corpus, _ = train.open_corpus(options)
    source = train.Source(options, train.new_run(options, corpus))
    s = train.Stream(corpus.rows(0)[:1], [0.0], corpus.rows(0), 1.0, 1.0)
    power = np.abs(np.fft.rfft(source.background(s, 16000, np.random.default_rng(0), []))) ** 2
    assert power[300] == pytest.approx(power[700], rel=1e-3) and power[300] > 1e6


def test_half_of_what_has_no_background_gets_noise_and_low_tones_have_most_of_it():
    tone = (0.1 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)).astype(np.float32)
    noisy, cut = [], []
    for seed in range(300):
        heard = train.disturb(tone, None, np.random.default_rng(seed))
        power = np.abs(np.fft.rfft(heard)) ** 2
        noisy.append(power[500] < 10 ** 3.1 * (power.sum() - power[490:511].sum()))
        white = np.random.default_rng(seed).standard_normal(16000).astype(np.float32)
        power = np.abs(np.fft.rfft(train.disturb(tone, white, np.random.default_rng(seed)))) ** 2
        cut.append(power[7900:].mean() < 0.1 * power[2000:3000].mean())
    assert 0.4 < np.mean(noisy) < 0.6 and 0.3 < np.mean(cut) < 0.5
    low = [np.abs(np.fft.rfft(train.coloured_noise(16000, np.random.default_rng(seed)))) ** 2
           for seed in range(50)]
    assert np.mean([power[:1000].sum() / power.sum() for power in low]) > 0.3     # white: 0.125


@pytest.mark.parametrize("audio, low, high", [("", 0.5, 0.95), ("x.wav", 0.95, 1)])
def test_codecs_and_holes_are_in_what_is_heard(small, monkeypatch, audio, low, high):
    """Of recorded speech, holes in time are in every disturbed stream."""
    options = train.parse_options(["--device", "cpu", "--join", "1"])
    corpus = train.BuiltIn("de-en", 0)
    made = train.new_run(options, corpus)
    monkeypatch.setattr(train, "disturb", lambda samples, *_: samples)
    source, changed = train.Source(options, made), []
    for row in corpus.rows(0) * 4:
        samples = train.sound_of(row, 0)
        row = replace(row, audio=audio, id=f"{row.id} {len(changed)}")
        s = train.Stream([row], [0.0], [], 1.0, 3.0)
        plain = train.mel_of(train.joined(s, [samples])[0], made.model.config)
        mel = source.example(s, [samples], train.Request([s], 0, (0, 1), False), [])["mel"]
        changed.append(not torch.equal(mel, plain))
    assert low <= np.mean(changed) <= high, np.mean(changed)


def test_joining_stops_at_the_longest():
    options = replace(train.parse_options(["--device", "cpu"]), augment=0.0)
    for seconds, longest in ((20.0, 1), (10.0, 3)):
        rows = [train.Row(id=str(k), audio=f"{k}.wav", asr="x", duration=seconds)
                for k in range(30)]
        streams = list(train.epoch_streams(train.Corpus(rows), 0, options))
        assert max(len(s.rows) for s in streams) == longest
        assert sorted(int(row.id) for s in streams for row in s.rows) == list(range(30))


def test_the_learning_rates_of_a_step():
    """Level until half of the steps, then down in a line; ten times as much for the matrices."""
    weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    options = replace(train.parse_options(["--device", "cpu"]), steps=1000, lr=2e-3)
    for step, share in ((49, 0.5), (300, 1), (500, 1), (750, 0.5), (900, 0.2), (999, 0.02)):
        train.set_learning_rates(optimizers, step, options)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx(
            [2e-2 * share, 2e-3 * share])


def test_a_wish_of_any_process_is_everybodys():
    class Asked(train.Ranks):
        others = 1

        def add(self, tensor):
            return tensor + self.others
    ranks = Asked(0, 2, "cpu")
    assert ranks.agree(False) is True and ranks.agree(True) is True
    ranks.others = 0
    assert ranks.agree(False) is False and train.Ranks().agree(False) is False


# ---- Tasks and losses

def test_tasks_come_one_after_the_other():
    def at(step, *more):
        return set(train.tasks(step, train.parse_options(["--warm-steps", "10", *more])))
    assert (
        at(4) == {"letters"}
        and at(9) == {"letters", "words", "next_label"}
        and at(10) == at(9) | {"transducer", "simple"}
    )
    assert at(10, "--prune", "0") == at(9) | {"transducer"} == at(10, "--interleave", "st")


def test_the_search_is_that_of_the_options():
    penalty = lambda *argv: train.saved_search(train.parse_options(["--device", "cpu", *argv]))
    assert penalty() == {"blank_penalty": 0.5, "tail": 0.32}
    assert penalty("m.jsonl")["blank_penalty"] == 0.75
    assert penalty("m.jsonl", "--blank-penalty", "-1")["blank_penalty"] == -1


def test_a_new_network_is_that_of_the_options_and_the_texts(small, tmp_path, monkeypatch):
    """The vocabulary learns from translations too, dropout is the one asked for, and the features'
    statistics are those of rows from all over the manifest."""
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1), 16000)
    rows = [{"audio": "a.wav", "asr": "a", "st": {"en": "xylophone"}}] * 10
    plain = [str(write_rows(tmp_path, rows)), "--device", "cpu", "--merges", "10"]
    monkeypatch.setattr(train, "sound_of",
                        lambda row, seed: int(row.id) if row.id.isdecimal() else 0)
    monkeypatch.setattr(train, "mel_of", lambda k, config: torch.full((1, 80), float(k)))
    for given, dropout in ((plain, PRESETS["tiny"].dropout), ([*plain, "--dropout", "0.3"], 0.3)):
        options = train.parse_options(given)
        made = train.new_run(options, train.open_corpus(options)[0])
        assert made.model.config.dropout == dropout
    assert len(made.tokenizer.encode("xylophone")) == 1 and len(made.tokenizer.encode("a")) == 1
    many = [train.Row(id=f"{k:03}", audio="a.wav", asr="a") for k in range(700)]
    mean, deviation = train.feature_statistics(many, made.model.config, options)
    assert mean.tolist() == [349.0] * 80                         # of 0, 2 .. 698
    assert deviation[0].item() == pytest.approx(np.std(np.arange(0, 700, 2), ddof=1))


def test_labels_are_hidden_by_even_chances(batch_of_eight):
    options, made, batch = batch_of_eight
    chance = batch.chance.flatten()
    assert 0 <= chance.min() < 0.1 and 0.9 < chance.max() < 1 and 0.4 < chance.mean() < 0.6


def test_weights_and_rates_at_chosen_steps():
    options = train.parse_options(
        ["--steps", "1000", "--warm-steps", "400", "--prune", "8", "--device", "cpu"]
    )
    sides = {"letters": 0.3, "words": 0.3, "next_label": 0.3}
    for step, transducer, simple in ((400, 0.1, 1), (475, 0.55, 0.75), (900, 1, 0.5)):
        assert train.tasks(step, options) == pytest.approx(
            {"transducer": transducer, "simple": simple} | sides)
    assert train.tasks(900, replace(options, prune=0)) == pytest.approx({"transducer": 1} | sides)
    assert [train.learning_rate(k, 1000) for k in (0, 49, 99, 500, 750, 900, 999)] == pytest.approx(
        [0.01, 0.5, 1, 1, 0.5, 0.2, 0.02])
    assert [train.label_dropout(k, options) for k in (399, 400, 475, 550, 900)] == pytest.approx(
        [0.1, 1, 0.5, 0.1, 0.1]
    )


@pytest.fixture
def batch_of_eight():
    options = train.parse_options(
        ["--device", "cpu", "--join", "1", "--augment", "0", "--dropout", "0"]
    )
    corpus = train.BuiltIn("de-en", 0)
    made = train.new_run(options, corpus)
    chosen = [train.Stream([row], [0.0], [], 1.0, 3.0) for row in corpus.rows(0, 8)]
    return (
        options,
        made,
        train.to_device(train.Source(options, made)[train.Request(chosen, 0, (0, 1), True)], "cpu"),
    )


def test_a_step_learns_with_dropout_whatever_mode_it_finds(batch_of_eight, monkeypatch):
    options, made, batch = batch_of_eight
    seen = []
    monkeypatch.setattr(train, "losses", lambda model, _, names, *rest: seen.append(
        model.training) or {name: 0 * model.joint.output.bias.sum() for name in names})
    made.model.eval()                                # as `load` leaves it
    train.train_step(made, [vars(batch)], options, train.Ranks())
    assert seen == [True]


def test_the_transducer_looks_at_a_band_of_so_many_rows(batch_of_eight, monkeypatch):
    options, made, batch = batch_of_eight
    kept, real = [], train.joint_rnnt_loss
    monkeypatch.setattr(train, "joint_rnnt_loss", lambda *args, **how: kept.append(
        how["keep"]) or real(*args, **how))
    for width in (4, 8):
        train.losses(made.model, batch, ["simple", "transducer"], 900,
                     replace(options, prune=width), 16)
    assert [int(keep.sum(-1).max()) for keep in kept] == [4, 8]


def test_who_has_nothing_to_spell_costs_nothing():
    logits, nine = torch.randn(2, 9, 5), torch.tensor([9, 9])
    both = train.ctc_loss(logits, nine, torch.tensor([[1, 2], [0, 0]]), torch.tensor([2, 0]))
    one = train.ctc_loss(logits[:1], nine[:1], torch.tensor([[1, 2]]), torch.tensor([2]))
    assert torch.isclose(both, one) and one > 1


def test_a_step_weighs_its_tasks_by_their_symbols_and_is_clipped(batch_of_eight, monkeypatch):
    options, made, batch = batch_of_eight
    bias, made.step = made.model.joint.output.bias, 900
    torch.nn.init.zeros_(bias)
    made.optimizers = [torch.optim.SGD([bias], lr=1.0)]        # 0.01 at this step
    monkeypatch.setattr(train, "losses", lambda model, batch, names, *_: {
        name: 1e5 * bias[k] for k, name in enumerate(names)})
    train.train_step(made, [vars(batch)], options, train.Ranks())
    wanted = torch.tensor([weight / batch.symbols[task]
                           for task, weight in train.tasks(900, options).items()])
    assert torch.allclose(-bias[:5], 0.01 * 5 * wanted / wanted.norm(), rtol=1e-3)


def test_fastemit_reaches_the_gradient_and_not_the_cost(batch_of_eight):
    options, made, batch = batch_of_eight
    made.model.eval()
    found = []
    for weight in (0.0, 1.0):
        cost = train.losses(made.model, batch, ["transducer"], 500, replace(
            options, fastemit=weight), chunk=16)["transducer"]
        grad, = torch.autograd.grad(cost, made.model.joint.output.bias)
        found.append((cost.item(), grad))
    (cost, plain), (same, early) = found
    assert cost == pytest.approx(same, rel=1e-6)
    assert early[0] > plain[0] + 1                             # blank is drawn down the more


def test_every_chunk_size_is_trained(batch_of_eight, monkeypatch):
    options, made, batch = batch_of_eight
    seen = []

    def losses(model, batch, names, step, options, chunk):
        seen.append(chunk)
        return {name: 0 * model.joint.output.bias.sum() for name in names}
    monkeypatch.setattr(train, "losses", losses)
    for _ in range(40):
        train.train_step(made, [vars(batch)], options, train.Ranks())
    assert set(seen) == {8, 16, 32} and all(seen.count(chunk) > 5 for chunk in (8, 16, 32))


def test_what_a_model_is_saved_with_and_searched_with(small, tmp_path, monkeypatch):
    """How it is to be searched, and the order that it writes; the evaluation on the way searches
    like that too."""
    asked = []
    monkeypatch.setattr(train, "evaluate", lambda *_, **how: asked.append(how) or ({}, []))
    folder = run(tmp_path / "run", "--steps", "5", "--interleave", "ratio:0.5",
                 "--blank-penalty", "0.7")
    search = {"blank_penalty": 0.7, "tail": 0.32}
    beside = load(folder / "model.pt")[1]
    assert beside["mode"] == "ratio:0.5" and beside["step"] == 5
    assert {name: beside[name] for name in search} == search
    assert asked and all(how == {"tags": ("<asr>", "<st:en>")} | search for how in asked)


def test_times_and_sound_at_another_speed():
    """A tenth quicker: all is over a tenth sooner, and behind it lies the silence of the search."""
    made = train.new_run(train.parse_options(["--device", "cpu"]), train.BuiltIn("de-en", 0))
    source = train.Source(train.parse_options(["--device", "cpu"]), made)
    row = train.Row(id="a", audio="a", asr="a b", times=[1.1, 2.2])
    s = train.Stream([row], [0.5], [], 1.1, 3.0)
    samples, starts = train.joined(s, [np.zeros(17600, np.float32)])
    assert starts == [8000] and len(samples) == 8000 + 16000 + 5120
    pairs = [interleave(row, "asr")]
    times = source.label_times(s, pairs, starts)
    assert sorted(set(times.round(6).tolist())) == [1.5, 2.5]


def test_steps_skipped_now_and_then_end_no_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "GIVE_UP", 3)
    log = train.Log(tmp_path, 0, train.Ranks())
    made = SimpleNamespace(step=1, position=(0, 0), optimizers=[
        SimpleNamespace(param_groups=[{"lr": 1.0}])])
    for learned in [False, False, True] * 4:
        log.add(made, [{"mel_frames": 9, "rows": ["x"]}],
                {"learned": learned, "gradient_norm": torch.tensor(1.0)}, 0.0)
    assert (log.skipped, log.in_a_row) == (8, 0)


def test_the_log_has_means(small, tmp_path):
    """LOG_EVERY is 2 here: of letters 2.0 and 4.0, and of 300 mel frames."""
    log = train.Log(tmp_path, 0, train.Ranks())
    made = SimpleNamespace(step=0, position=(3, 0), optimizers=[
        SimpleNamespace(param_groups=[{"lr": 1.0}]), SimpleNamespace(param_groups=[{"lr": 0.5}])])
    for value, norm in ((2.0, 1.0), (4.0, 2.0)):
        made.step += 1
        log.began = train.time.perf_counter() - 2.0
        log.add(made, [{"mel_frames": 150}], {"letters": torch.tensor(value), "learned": True,
                                          "gradient_norm": torch.tensor(norm)}, 0.25 * made.step)
    line, = csv.DictReader(open(tmp_path / "log.csv"))
    assert (line["step"], line["epoch"], line["letters"], line["gradient_norm"]) == (
        "2", "3", "3", "1.5")
    assert (line["learning_rate"], line["waited_s"], line["skipped"]) == ("0.5", "0.500", "0")
    assert 1.4 < float(line["audio_s_per_s"]) <= 1.5           # 3 s of sound in 2 s and a little


def test_the_transducer_task_is_the_loss_of_the_models_own_logits(batch_of_eight):
    options, made, batch = batch_of_eight
    made.model.eval()
    torch.nn.init.normal_(made.model.joint.label_proj.weight, std=0.1)
    step = options.warm_steps + 10 * train.FORGET_STEPS
    batch.chance = torch.full_like(batch.chance, 0.5)  # none is hidden now, all are at the start
    with torch.no_grad():
        found = train.losses(
            made.model, batch, ["transducer", "next_label"], step, options, chunk=16
        )
        logits = made.model(batch.mel, batch.targets, batch.mel_lengths, chunk=16)
    cost = rnnt_loss(
        logits,
        batch.targets,
        batch.mel_lengths // 4,
        batch.targets_lengths,
        blank=0,
        reduction="sum",
    )
    assert float(found["transducer"]) == pytest.approx(float(cost), rel=1e-5)
    late = replace(options, delay_penalty=0.1)
    with torch.no_grad():
        found = train.losses(made.model, batch, ["transducer"], step, late, chunk=16)
    delayed = rnnt_loss(logits, batch.targets, batch.mel_lengths // 4, batch.targets_lengths,
                        blank=0, reduction="sum", delay_penalty=0.1)
    assert float(found["transducer"]) == pytest.approx(float(delayed), rel=1e-5)
    assert abs(float(delayed) / float(cost) - 1) > 1e-3
    # all are
    hidden = train.losses(made.model, batch, ["transducer"], options.warm_steps, options, chunk=16)
    assert abs(float(hidden["transducer"]) / float(cost) - 1) > 1e-4


def test_bytes_that_no_text_has_are_left_out_of_the_loss(batch_of_eight):
    """With them, it is the same to 1e-9 in float64, as their gradients are; without the bias that
    silences them, it is not. A byte that only this batch has is in."""
    options, made, batch = batch_of_eight
    tokenizer = made.tokenizer
    everything = torch.arange(len(tokenizer))
    known = torch.tensor(train.used_classes(tokenizer))
    assert torch.equal(batch.classes, known) and len(known) < 150 < len(everything)
    text = " ".join(row.asr for row in train.BuiltIn("de-en", 0).rows(0, 500))
    assert set(tokenizer.encode(text)) <= set(known.tolist())
    made.model.eval().double()
    batch.mel = batch.mel.double()
    step = options.warm_steps + 10 * train.FORGET_STEPS

    def cost(classes, prune=0):
        made.model.zero_grad()
        batch.classes = classes
        names = ["simple", "transducer"] if prune else ["transducer"]
        found = train.losses(made.model, batch, names, step, replace(options, prune=prune), 16)
        sum(found.values()).backward()
        return [float(found[name]) for name in names], made.model.joint.output.bias.grad.clone()
    for prune in (0, 8):
        (few, few_grad), (all_of_them, grad) = cost(known, prune), cost(everything, prune)
        assert few == pytest.approx(all_of_them, rel=1e-9)
        assert (few_grad - grad).abs().max() < 1e-8 < grad.abs().max()
    with torch.no_grad():
        made.model.joint.output.bias.zero_()                   # the control
    (few, _), (all_of_them, _) = cost(known), cost(everything)
    assert few[0] < 0.99 * all_of_them[0]
    rare = replace(train.BuiltIn("de-en", 0).rows(0, 1)[0], asr="anna \N{SNOWMAN}", st={})
    source = train.Source(options, made)
    source.letter = {}
    again = source[train.Request([train.Stream([rare], [0.0], [], 1.0, 3.0)], 0, (0, 1), True)]
    assert set(again["classes"].tolist()) == set(known.tolist()) | set(
        tokenizer.encode("\N{SNOWMAN}"))


def test_the_language_model_does_not_see_what_it_predicts(batch_of_eight):
    """The loss of a label depends on the labels before it and on itself, not through the label
    encoder."""
    _, made, batch = batch_of_eight
    made.model.eval()
    changed = batch.targets.clone()
    changed[:, 5] = changed[:, 5] % 200 + 1
    with torch.no_grad():
        scores, other = (train.next_label_scores(made.model, made.model.label_encoder(x)[0])[:, :-1]
                         for x in (batch.targets, changed))
    assert torch.equal(scores[:, :6], other[:, :6]) and not torch.equal(scores[:, 6], other[:, 6])
    costs = torch.nn.functional.cross_entropy(
        scores.transpose(1, 2), batch.targets, reduction="none"
    )
    wanted = sum(costs[b, :n].sum() for b, n in enumerate(batch.targets_lengths))
    labels = made.model.label_encoder(batch.targets)[0]
    assert float(
        train.language_loss(made.model, labels, batch.targets, batch.targets_lengths)
    ) == pytest.approx(float(wanted), rel=1e-5)
    assert scores.shape[2] == made.model.config.vocab          # the forgotten label is no class


def test_muon_makes_its_updates_orthogonal_as_torch_does():
    torch.manual_seed(0)
    for shape in ((6, 6), (12, 5), (5, 12)):
        x = torch.randn(3, *shape, dtype=torch.float64)
        plain = x / torch.linalg.matrix_norm(x, keepdim=True)
        for _ in range(5):                                     # as it is defined, on X itself
            a = plain @ plain.mT
            plain = 3.4445 * plain - 4.775 * a @ plain + 2.0315 * a @ a @ plain
        assert (train.orthogonalised(x) - plain).abs().max() < 1e-6
        assert (train.orthogonalised(x, 4) - plain).abs().max() > 1e-2
        p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        values = torch.linalg.svdvals(
            train.orthogonalised(torch.randn(1, *shape, dtype=torch.float64))[0]
        )
        # of a random matrix they spread from near 0 to above 4
        assert values.min() > 0.3 and values.max() < 1.3
        if not hasattr(torch.optim, "Muon"):                   # before torch 2.9
            continue
        start, ours = p.detach().clone(), train.Muon([p], lr=0.02)
        twin = torch.nn.Parameter(start.clone())
        theirs = torch.optim.Muon([twin], lr=0.02, weight_decay=0.01)
        for _ in range(3):
            p.grad = torch.randn(shape, dtype=torch.float64)
            twin.grad = p.grad.clone()
            ours.step()
            theirs.step()
        moved = (p - start).norm()
        assert float((p - twin).norm() / moved) < 0.03         # torch iterates in bfloat16


def test_muon_updates_the_parts_of_a_parameter_each_on_its_own(batch_of_eight):
    """Queries, keys and values lie in one parameter: as if they were three."""
    torch.manual_seed(0)
    joined = torch.nn.Parameter(torch.randn(15, 5, dtype=torch.float64))
    alone = [torch.nn.Parameter(part.clone()) for part in joined.detach().chunk(3)]
    whole = torch.nn.Parameter(joined.detach().clone())
    muons = [train.Muon([dict(params=[joined], parts=3)], lr=0.02), train.Muon(alone, lr=0.02),
             train.Muon([whole], lr=0.02)]
    for _ in range(3):
        scale = torch.tensor([1, 9, 0.1]).repeat_interleave(5)[:, None]
        joined.grad = torch.randn(15, 5, dtype=torch.float64) * scale
        whole.grad = joined.grad.clone()
        for part, grad in zip(alone, joined.grad.chunk(3)):
            part.grad = grad.clone()
        for muon in muons:
            muon.step()
    assert (joined - torch.cat(alone)).abs().max() < 1e-12
    assert (joined - whole).abs().max() > 1e-2                 # the control
    _, made, _ = batch_of_eight
    parts = {name: group["parts"] for group in train.make_optimizers(made.model, train.Options())[0]
             .param_groups for name, p in made.model.named_parameters()
             if any(p is own for own in group["params"])}
    shapes = {name: p.shape for name, p in made.model.named_parameters()}
    assert {parts[name] for name in parts if name.endswith("qkv.weight")} == {3}
    assert {parts[name] for name in parts if name.endswith("gate.weight")} == {2}
    assert all(shapes[name][0] == n * shapes[name][1] for name, n in parts.items() if n > 1)


def test_eight_utterances_are_overfitted_and_noise_is_not(batch_of_eight):
    """All tasks, a tiny net: greedy search then gives the targets, and with noise for sound it does
    not."""
    options, made, batch = batch_of_eight
    config = replace(
        made.model.config,
        dim=64,
        heads=2,
        layers=2,
        ff=128,
        joint_dim=64,
        chunks=(16,),
        dropout=0.0,
    )
    torch.manual_seed(1)
    statistics = made.model.encoder.mean, made.model.encoder.std
    made.model = train.Transducer(config)
    made.model.encoder.set_statistics(*statistics)
    options = replace(options, steps=270, warm_steps=90, lr=4e-3, label_dropout=0.0)
    made.optimizers = train.make_optimizers(made.model, options)
    group = [vars(batch)]
    for _ in range(options.steps):
        numbers = train.train_step(made, group, options, train.Ranks())
    assert float(numbers["transducer"]) < 0.05

    def written(mel):
        return [ids for ids, _ in greedy_batch(made.model.eval(), mel, batch.mel_lengths, chunk=16)]
    wanted = [row[:n].tolist() for row, n in zip(batch.targets, batch.targets_lengths)]
    assert written(batch.mel) == wanted
    noise = made.model.encoder.mean + made.model.encoder.std * torch.randn_like(batch.mel)
    assert sum(a == b for a, b in zip(written(noise), wanted)) == 0


def test_a_small_encoder_learns_to_spell_in_150_steps(monkeypatch):
    """A fixed number of steps from a fixed seed. CTC on letters starts above 3 nats and falls below
    1 on sentences and speakers never heard; on noise of the same length it does not."""
    monkeypatch.setitem(train.PRESETS, "tiny", replace(PRESETS["tiny"], dim=96, ff=384))
    options = train.parse_options(["--device", "cpu", "--join", "1", "--augment", "0",
                                   "--batch-seconds", "14", "--lr", "0.003"])
    corpus, dev = train.open_corpus(options)
    made = train.new_run(options, corpus)
    source = train.Source(options, made)
    with train.Batches(source, corpus, made, options, train.Ranks()) as batches:
        history = [
            train.train_step(made, group, options, train.Ranks())
            for group, _ in zip(batches, range(150))
        ]
    # only this warms up
    assert all(set(numbers) == {"letters", "gradient_norm", "learned"} for numbers in history)
    assert float(history[0]["letters"]) > 3

    def spelling(samples):
        mels = [train.mel_of(one, made.model.config) for one in samples]
        letters = [[source.letter[c] for c in row.asr] for row, _ in dev[:32]]
        lengths = torch.tensor([len(mel) for mel in mels])
        mel = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)
        targets = torch.nn.utils.rnn.pad_sequence(
            list(map(torch.tensor, letters)), batch_first=True
        )
        counts = torch.tensor(list(map(len, letters)))
        with torch.no_grad():
            frames, _ = made.model.eval().encoder(mel, lengths)
            return float(
                train.ctc_loss(made.model.ctc(frames), lengths // 4, targets, counts) / counts.sum()
            )

    rng = np.random.default_rng(0)
    assert spelling([samples for _, samples in dev[:32]]) < 1.0
    assert (
        spelling([rng.normal(0, 0.05, len(samples)).astype(np.float32) for _, samples in dev[:32]])
        > 2.5
    )


# ---- Runs

SHORT = [
    "--warm-steps",
    "4",
    "--batch-seconds",
    "12",
    "--chunks",
    "4,8",
    "--merges",
    "20",
    "--device",
    "cpu",
    "--prune",
    "8",
]


@pytest.fixture
def small(monkeypatch):
    """A preset that trains in seconds, on one thread: with more, sums may be added up in another
    order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(
        train.PRESETS,
        "tiny",
        replace(PRESETS["tiny"], dim=16, heads=2, layers=1, ff=32, joint_dim=16),
    )
    monkeypatch.setattr(train.BuiltIn, "SIZE", 16)
    monkeypatch.setattr(train, "TEST_SIZE", 3)
    monkeypatch.setattr(train, "WARM_UP", 2)
    monkeypatch.setattr(train, "FORGET_STEPS", 2)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "live_captions", lambda folder, options: "FILE")
    yield
    torch.set_num_threads(threads)


def run(folder, *more):
    assert train.main([*SHORT, "--out", str(folder), *more]) == 0
    return Path(folder)


def corpus_rows(folder, n):
    """The rows of n built-in utterances that were written there."""
    assert train.main(["--write-corpus", str(folder), str(n)]) == 0
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def manifest_of(folder, rows):
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "manifest.jsonl")


def stopped_at(step, call):
    """Run `call` and ask it, as Ctrl-C does, to stop in the step that is the `step`-th from now."""
    done, real = iter(range(1, 1000)), train.train_step

    def counted(*args):
        if next(done) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", counted)
        return call()


def weights_of(path):
    return load(path)[0].state_dict()


def same_weights(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


def test_resume_is_bit_exact_and_tells_every_step_once(small, tmp_path):
    """Stopped in the warm-up, and again later: the same weights and log as without a stop, also
    from a copy."""
    whole = run(tmp_path / "whole", "--steps", "10")
    half = tmp_path / "half"
    stopped_at(3, lambda: run(half, "--steps", "10"))
    assert load(half / "resume.pt")[1]["step"] == 3 and not (half / "metrics.json").exists()
    log = (half / "log.csv").read_text()
    (half / "log.csv").write_text(log + "4,0\n6,0\n")  # what a run that was killed had told already
    (tmp_path / "copy").mkdir()
    for file in half.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    assert stopped_at(4, lambda: train.main(["--resume", str(half / "model.pt")])) == 0
    assert load(half / "resume.pt")[1]["step"] == 7
    assert train.main(["--resume", str(half)]) == 0
    wanted, given = weights_of(whole / "resume.pt"), weights_of(half / "resume.pt")
    assert same_weights(wanted, given)
    steps = [int(line["step"]) for line in csv.DictReader(open(half / "log.csv"))]
    assert steps == sorted(set(steps)) and steps[-1] == 10
    # the copy was not touched, and goes on where it lies
    assert load(tmp_path / "copy" / "resume.pt")[1]["step"] == 3
    assert train.main(["--resume", str(tmp_path / "copy")]) == 0
    assert same_weights(wanted, weights_of(tmp_path / "copy" / "resume.pt"))
    # the control: another seed, other weights
    other = run(tmp_path / "other", "--steps", "10", "--seed", "1")
    assert not same_weights(wanted, weights_of(other / "resume.pt"))


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
from dataclasses import replace
import torch, train
from model import PRESETS
torch.set_num_threads(1)
train.PRESETS["tiny"] = replace(PRESETS["tiny"], dim=16, heads=2, layers=1, ff=32, joint_dim=16)
train.BuiltIn.SIZE, train.TEST_SIZE = 16, 3
train.WARM_UP, train.FORGET_STEPS, train.LOG_EVERY = 2, 2, 2
renamed, saved = os.replace, []
def kill_between(source, target):
    renamed(source, target)
    saved.append(str(target))
    if [name.endswith("model.pt") for name in saved].count(True) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill_between
train.main(sys.argv[2:])
"""


def test_killed_between_the_two_renames(small, tmp_path):
    """kill -9 in the second save: model.pt is of step 6 then and resume.pt of step 3. The run goes
    on from resume.pt, to the bits of the run that was never killed. (In the other order, a run
    killed in its last save could not be resumed, and would never get its model.pt.)"""
    every = ["--steps", "10", "--eval-every", "3"]
    whole, killed = run(tmp_path / "whole", *every), tmp_path / "killed"
    root = str(Path(train.__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, root, *SHORT, *every, "--out", killed])
    assert done.returncode == -signal.SIGKILL
    assert [load(killed / f"{name}.pt")[1]["step"] for name in ("resume", "model")] == [3, 6]
    assert train.main(["--resume", str(killed)]) == 0
    for name in ("resume.pt", "model.pt"):
        assert same_weights(weights_of(whole / name), weights_of(killed / name))
    assert [line["step"] for line in csv.DictReader(open(killed / "log.csv"))] == [
        line["step"] for line in csv.DictReader(open(whole / "log.csv"))
    ]


def evaluations(folder):
    return [entry["step"] for entry in train.past_metrics(folder)]


def test_two_processes_make_one_run(tmp_path):
    """Each with half of a step; the first alone holds the lock, speaks and evaluates."""
    code = KILLED.split("renamed, saved")[0] + (
        "train.live_captions = lambda *_: 'FILE'\nsys.exit(train.main(sys.argv[2:]))")
    call = [sys.executable, "-c", code, str(Path(train.__file__).parent), *SHORT, "--steps", "8",
            "--out", str(tmp_path / "run")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=os.environ | {
        "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank in "01"]
    try:                                                       # a rank that is refused ends first
        said = [process.communicate(timeout=300)[0] for process in two[::-1]][::-1]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [0, 0]
    assert "parameters" in said[0] and said[1] == "" and evaluations(tmp_path / "run") == [8]


@pytest.mark.parametrize("every, done, left", [(3, [], [6, 9, 10]), (4, [8], [10])])
def test_an_evaluation_that_was_cut_off_is_made_up(small, tmp_path, monkeypatch, every, done, left):
    """Killed while it evaluates: after step 6, or after the last step, 10. The checkpoint stands,
    and the same command makes the evaluation first."""
    class Killed(BaseException):
        pass

    def killed(run, *args, real=train.assess, **how):
        if run.step == (6 if every == 3 else 10):
            raise Killed
        return real(run, *args, **how)
    folder, options = tmp_path / "run", ["--steps", "10", "--eval-every", str(every)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "assess", killed)
        with pytest.raises(Killed):
            run(folder, *options)
    assert evaluations(folder) == done
    assert train.main(["--resume", str(folder)]) == 0
    assert evaluations(folder) == done + left
    assert list(train.past_metrics(folder)[-1]["streams"]) == [
        "<asr>", "<st:en>", "blind <asr>", "blind <st:en>"]
    # Then there is nothing left to do, as before.
    assert train.main(["--resume", str(folder)]) == 2
    assert evaluations(folder) == done + left


def test_streams_that_are_not_learned_are_not_scored(small, tmp_path, capsys):
    """With --interleave asr the tokenizer has the tags of the translations, for the run that is to
    begin from this one; but nobody wants to see their 100 % WER."""
    rows = corpus_rows(tmp_path, 6)
    for row in rows:
        row["st"]["en"] += "\u03a9"                            # unseen, if it is learned at all
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(tmp_path / "manifest.jsonl"), "--dev", str(tmp_path / "dev.jsonl"), *SHORT,
               "--steps", "6"]
    for mode, streams in (("asr", ["<asr>"]), ("st", ["<st:en>"]), ("align", ["<asr>", "<st:en>"])):
        folder = tmp_path / mode
        capsys.readouterr()
        assert train.main([*command, "--interleave", mode, "--out", str(folder)]) == 0
        assert ("as bytes: \u03a9" in capsys.readouterr().err) == ("<st:en>" in streams)
        entry, = json.loads((folder / "metrics.json").read_text())
        assert list(entry["streams"]) == streams
        model, tokenizer, beside = stream.load_run(folder / "model.pt")
        assert list(stream.own_streams(beside, tokenizer)) == streams
        assert list(tokenizer.tags) == ["<asr>", "<st:en>"]
        capsys.readouterr()
        assert stream.main([str(folder / "model.pt"), "--eval", command[0]]) == 0
        out = capsys.readouterr().out
        assert [tag for tag in tokenizer.tags if f"\n{tag}\n" in out] == streams


def test_a_network_of_another_size_is_no_beginning(small, tmp_path, capsys):
    first = run(tmp_path / "a", "--steps", "5")
    wider = replace(train.PRESETS["tiny"], dim=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", wider)
        said = refused(capsys, *SHORT, "--steps", "5", "--init", first / "model.pt", "--out",
                       tmp_path / "b")
    assert "a network of another size" in said and "encoder.stack.blocks.0." in said
    run(tmp_path / "c", "--steps", "5", "--init", str(first / "model.pt"), "--merges", "7")
    assert "the tokens differ" in capsys.readouterr().out


@pytest.mark.parametrize("at_step", [6, 9])
def test_ctrl_c_amid_an_evaluation_saves_and_stops(small, tmp_path, capsys, at_step):
    """In the middle of a run and at its end: no figures of half a development set, no captions, and
    the evaluation is made when the run goes on."""
    folder, options = tmp_path / "run", ["--steps", "9", "--eval-every", "6"]

    def interrupted(model, tokenizer, items, real=train.evaluate, **how):
        def until(items):
            for k, item in enumerate(items):
                if k == 1 and load(folder / "resume.pt")[1]["step"] == at_step:
                    os.kill(os.getpid(), signal.SIGINT)
                yield item
        return real(model, tokenizer, until(items), **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        patch.setattr(train, "live_captions", None)            # must not be called
        run(folder, *options)
    assert "stopped; go on with: python train.py --resume" in capsys.readouterr().out
    assert load(folder / "resume.pt")[1]["step"] == at_step
    assert evaluations(folder) == [step for step in (6,) if step < at_step]
    assert train.main(["--resume", str(folder)]) == 0
    assert evaluations(folder) == [6, 9]


def test_a_stop_amid_an_evaluation_reads_no_further(monkeypatch, tmp_path):
    """An hour of development sound is not decoded to be dropped."""
    read, stop = [], SimpleNamespace(wanted=False)

    class Dev:
        def __iter__(self):
            for k in range(5):
                read.append(k)
                yield k

    def evaluate(model, tokenizer, items, **how):
        for _ in items:
            stop.wanted = True
        return {}, []
    monkeypatch.setattr(train, "evaluate", evaluate)
    options = train.parse_options(["--device", "cpu"])
    made = SimpleNamespace(model=None, tokenizer=None, streams=("<asr>",))
    assert train.assess(made, Dev(), options, tmp_path, True, stop) == {} and read == [0, 1]


def test_the_last_evaluation_also_hears_noise_for_sound(monkeypatch, tmp_path):
    heard, samples = [], np.full(16000, 0.5, np.float32)

    def evaluate(model, tokenizer, items, **how):
        heard.append([own for _, own in items])
        return {}, []
    monkeypatch.setattr(train, "evaluate", evaluate)
    made = SimpleNamespace(model=None, tokenizer=None, streams=("<asr>",), step=1, best=-1.0)
    how = made, [(None, samples)], train.parse_options(["--device", "cpu"]), tmp_path
    train.assess(*how, False, SimpleNamespace(wanted=False))
    assert len(heard) == 1 and heard[0][0] is samples
    train.assess(*how, True, SimpleNamespace(wanted=False))
    (real,), (noise,) = heard[1:]
    assert real is samples and len(noise) == 16000
    assert noise.std() == pytest.approx(0.05, rel=0.03) and abs(noise.mean()) < 0.002


def test_a_run_that_hears_nothing_stops_and_keeps_its_checkpoint(small, tmp_path, capsys):
    """The sound is gone when the run goes on: no step is counted as learned."""
    assert train.main(["--write-corpus", str(tmp_path / "c"), "8"]) == 0
    manifest = tmp_path / "c" / "manifest.jsonl"
    folder = tmp_path / "run"
    assert train.main([str(manifest), *SHORT, "--steps", "6", "--out", str(folder)]) == 0
    before = (folder / "resume.pt").read_bytes()
    for sound in (tmp_path / "c").glob("*.flac"):
        sound.unlink()
    assert train.main(["--resume", str(folder), "--steps", "60"]) == 2
    said = capsys.readouterr().err
    assert "step 26: the 20th in a row without usable sound" in said and "manifest.jsonl:1" in said
    assert (folder / "resume.pt").read_bytes() == before


def test_a_full_disk_is_named_by_the_file(small, tmp_path, capsys, monkeypatch):
    class Full:
        def __init__(self, folder):
            self.folder = folder

        def __getattr__(self, name):
            raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train.json, "dumps", lambda *args, **how: Full(tmp_path).write)
        assert train.main([*SHORT, "--steps", "6", "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "metrics.json" in said and "No space left" in said and "stays as it is" in said


def test_a_disk_that_is_full_for_a_while_ends_no_run(small, tmp_path, capsys, monkeypatch):
    """Lines of the log are left out, and a checkpoint that cannot be written is tried again."""
    class Writer(train.csv.DictWriter):
        def writerow(self, line):
            raise OSError(28, "No space left on device")

        def writeheader(self):                                 # before the run: as ever
            self.writer.writerow(self.fieldnames)

    real, failed = train.save_run, []

    def save_run(run, *rest):
        if run.step == 2 and not failed:
            failed.append(run.step)
            raise OSError(28, "No space left on device", "resume.pt")
        real(run, *rest)
    monkeypatch.setattr(train.csv, "DictWriter", Writer)
    monkeypatch.setattr(train, "save_run", save_run)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    folder = tmp_path / "run"
    assert train.main([*SHORT, "--steps", "6", "--eval-every", "2", "--out", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "log.csv: No space left on device; the line of step 1 is left out" in said
    assert "the run goes on and saves again later" in said and failed == [2]
    assert load(folder / "resume.pt")[1]["step"] == 6
    assert (folder / "log.csv").read_text().count("\n") == 1


def test_a_log_that_was_taken_away_ends_no_run(small, tmp_path, monkeypatch):
    real = train.train_step

    def step(run, *rest):
        if run.step == 3:
            (tmp_path / "run" / "log.csv").unlink()
        return real(run, *rest)
    monkeypatch.setattr(train, "train_step", step)
    folder = run(tmp_path / "run", "--steps", "6")
    with open(folder / "log.csv") as file:                     # with names of its columns
        assert [line["step"] for line in csv.DictReader(file)] == ["4", "6"]


@pytest.mark.parametrize("error", [train.InputError("a bad row"), MemoryError(),
                                   RuntimeError("DataLoader worker (pid 7) is killed")])
def test_what_ends_a_run_amid_a_step_does_not_cost_it_those_before(
        small, tmp_path, monkeypatch, capsys, error):
    real = train.train_step

    def step(run, *rest):
        if run.step == 4:
            raise error
        return real(run, *rest)
    monkeypatch.setattr(train, "train_step", step)
    folder = tmp_path / "run"
    assert train.main([*SHORT, "--steps", "6", "--out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"saved after step 4; to go on: python train.py --resume {folder}" in said
    assert load(folder / "resume.pt")[1]["step"] == 4
    assert [line["step"] for line in csv.DictReader(open(folder / "log.csv"))] == ["2", "4"]


def test_a_run_is_saved_before_its_workers_end(small, tmp_path, monkeypatch):
    """A batch system kills what has not ended soon, and they may be amid a long batch."""
    order, real = [], train.save_run
    monkeypatch.setattr(train, "save_run", lambda *args: order.append("saved") or real(*args))
    monkeypatch.setattr(train.Batches, "__exit__", lambda self, *error: order.append("ended"))
    stopped_at(2, lambda: run(tmp_path / "run", "--steps", "6"))
    assert order == ["saved", "ended"]


def test_half_written_checkpoints_of_a_killed_run_are_cleared_away(small, tmp_path):
    folder = run(tmp_path / "run", "--steps", "5")
    for name in ("resume.pt.17.abcd.tmp", "best.pt.17.abcd.tmp", "notes.tmp"):
        (folder / name).write_bytes(b"half")
    assert train.main(["--resume", str(folder), "--steps", "6"]) == 0
    assert [path.name for path in folder.glob("*.tmp")] == ["notes.tmp"]


def test_the_command_that_goes_on_is_that_of_as_many_processes(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert train.resuming("r") == "python train.py --resume r"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train.resuming("r") == "torchrun --nproc_per_node=4 train.py --resume r"


def test_a_run_that_goes_on_with_other_batches_begins_an_epoch(small, tmp_path, capsys):
    """The number of a batch means nothing among batches of another size."""
    folder = tmp_path / "run"
    stopped_at(2, lambda: run(folder, "--steps", "6"))
    epoch, batch = load(folder / "resume.pt")[1]["position"]
    assert batch > 0

    def goes_on(*more):
        run = train.resume_run(train.parse_options(["--resume", str(folder), *more]))
        return run.position, capsys.readouterr().err
    assert goes_on() == ((epoch, batch), "")                   # the control
    assert goes_on("--lr", "0.01") == ((epoch, batch), "")
    position, said = goes_on("--batch-seconds", "9", "--join", "2")
    assert position == (epoch + 1, 0)
    assert "--batch-seconds and --join changed: the run goes on with the next epoch" in said


def test_processes_begin_at_the_same_step(small, tmp_path, monkeypatch):
    folder = run(tmp_path / "run", "--steps", "5")
    options = train.parse_options(["--resume", str(folder), "--steps", "8"])
    own, corpus = train.resume_run(options), train.open_corpus(options)[0]
    ranks = train.Ranks(0, 2)
    monkeypatch.setattr(train.dist, "broadcast", lambda *_: None)

    def gathered(change):
        def gather(seen, mine):
            seen[:] = [mine, change(*mine)]
        monkeypatch.setattr(train.dist, "all_gather_object", gather)
        ranks.begin_alike(own, corpus)
    gathered(lambda *mine: mine)
    with pytest.raises(train.InputError, match="not go on from the same step, but from 5, 7: "):
        gathered(lambda n, ids, step, position: (n, ids, 7, position))
    with pytest.raises(train.InputError, match="not have the same rows to learn from, but 16, 9 "):
        gathered(lambda n, ids, step, position: (9, ids, step, position))


def test_rows_to_evaluate_on_that_are_learned_from_are_told(tmp_path, capsys):
    assert train.main(["--write-corpus", str(tmp_path), "3"]) == 0
    manifest = str(tmp_path / "manifest.jsonl")
    capsys.readouterr()
    train.open_corpus(train.parse_options([manifest, "--dev", manifest, "--device", "cpu"]))
    assert "warning: 3 of 3 rows of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dev", "init"])
def test_a_file_that_is_not_there_is_told_before_anything_is_read(name, tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text("no row\n")
    assert f"--{name} {tmp_path}/typo: no such file" in refused(
        capsys, str(tmp_path / "m.jsonl"), f"--{name}", str(tmp_path / "typo"))


def test_letters_that_a_run_did_not_begin_with_are_told(small, tmp_path, capsys):
    assert train.main(["--write-corpus", str(tmp_path / "c"), "3"]) == 0
    manifest = tmp_path / "c" / "manifest.jsonl"
    folder = run(tmp_path / "run", str(manifest), "--steps", "4", "--warm-steps", "1")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    (tmp_path / "c" / "other.jsonl").write_text("".join(
        json.dumps(row | {"asr": row["asr"].replace("e", "ж")}) + "\n" for row in rows))
    capsys.readouterr()
    assert train.main(["--resume", str(folder), "--steps", "5"]) == 0
    assert "the letters task" not in capsys.readouterr().err   # the control
    assert train.main(["--resume", str(folder), str(tmp_path / "c" / "other.jsonl"), "--steps",
                       "6"]) == 0
    said = capsys.readouterr().err
    assert "the letters task leaves out 1 characters that it had not learned with: ж" in said


def test_of_many_bad_rows_the_first_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "MOST_TOLD", 2)
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1), 16000)
    rows = [{"audio": "a.wav", "asr": "a"}] + [{"audio": "a.wav", "asr": "a" * 600}] * 5
    train.open_corpus(train.parse_options([str(write_rows(tmp_path, rows)), "--device", "cpu"]))
    said = capsys.readouterr().err
    assert said.count("letters to write") == 2
    assert "5 of 6 rows left out; 3 of them are not named" in said


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_terminal_that_closes_stops_a_run_unless_nohup_says_otherwise():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, wanted in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with train.StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.wanted == wanted
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error, told", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
     "half of --batch-seconds"), (MemoryError(), "out of memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "worker (pid 7)")])
def test_too_little_memory_is_told(error, told, capsys, monkeypatch):
    def fails(options):
        raise error
    monkeypatch.setattr(train, "train", fails)
    assert told in refused(capsys, "--device", "cpu")
    for said in ("mat1 and mat2 shapes cannot be multiplied",              # mistakes in the code
                 "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"):
        error = RuntimeError(said)
        with pytest.raises(RuntimeError, match=said[:20]):
            train.main(["--device", "cpu"])


def test_links_are_learned_at_the_start_from_few_rows_only(small, tmp_path, capsys, monkeypatch):
    """The aligner learns from all rows with both texts, so these are counted, not those that lack
    links."""
    assert train.main(["--write-corpus", str(tmp_path), "6"]) == 0
    manifest = tmp_path / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    monkeypatch.setattr(train, "LINKS_HERE", 5)
    options = train.parse_options([str(manifest), "--device", "cpu"])
    train.open_corpus(options)
    del rows[2]["links"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(train.InputError, match="1 of 6 rows lack"):
        train.open_corpus(options)
    monkeypatch.setattr(train, "LINKS_HERE", 6)
    for lacking in (rows[2:3], rows):
        for row in lacking:
            row.pop("links", None)
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        corpus, _ = train.open_corpus(options)
        assert len(corpus.rows(0)) == 6 and all(row.links["en"] for row in corpus.rows(0))
        assert f"6 rows aligned, {6 - len(lacking)} keep" in capsys.readouterr().err


def test_hours_of_unseen_sound_are_read_as_they_are_asked_for(small, tmp_path):
    assert train.main(["--write-corpus", str(tmp_path), "3"]) == 0
    manifest = str(tmp_path / "manifest.jsonl")
    _, dev = train.open_corpus(train.parse_options([manifest, "--dev", manifest, "--device",
                                                    "cpu"]))
    first, again = list(dev), list(dev)
    assert len(dev) == 3 == len(again)
    assert all(a[0] is b[0] and np.array_equal(a[1], b[1]) for a, b in zip(first, again))
    (tmp_path / "train000001.flac").unlink()
    assert len(list(dev)) == 2


def test_a_run_that_goes_on_with_other_rows_leaves_those_of_a_new_language_out(
        small, tmp_path, capsys):
    assert train.main(["--write-corpus", str(tmp_path / "c"), "4"]) == 0
    manifest, folder = tmp_path / "c" / "manifest.jsonl", tmp_path / "run"
    assert train.main([str(manifest), *SHORT, "--steps", "6", "--out", str(folder)]) == 0
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for name in ("st", "links", "st_times"):
        rows[1][name] = {"xx": rows[1][name]["en"]}
    other = tmp_path / "c" / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert train.main(["--resume", str(folder), str(other), "--steps", "8"]) == 0
    said = capsys.readouterr().err
    assert "other.jsonl:2" in said and "no tag '<st:xx>', only <asr> <st:en>: left out" in said
    assert "1 of 4 rows left out" in said
    assert train.main(["--resume", str(folder), str(manifest), "--steps", "9"]) == 0
    assert "left out" not in capsys.readouterr().err


def test_what_is_too_long_to_be_heard_whole_is_not_evaluated_on(
        small, tmp_path, capsys, monkeypatch):
    """A model whose first chunk size is 0 is evaluated with it: its run would end there."""
    monkeypatch.setattr(train.stream, "LONGEST_WHOLE_S", 1.5)
    tone = (0.1 * np.sin(np.arange(32000) / 20)).astype(np.float32)
    for name, seconds in (("short", 1), ("long", 2)):
        soundfile.write(tmp_path / f"{name}.wav", tone[:16000 * seconds], 16000)
    rows = [{"audio": f"{name}.wav", "asr": "x"} for name in ("short", "long")]
    rows = write_rows(tmp_path, rows)
    command = [str(rows), "--dev", str(rows), "--device", "cpu", "--interleave", "asr"]
    _, dev = train.open_corpus(train.parse_options([*command, "--chunks", "0,16"]))
    assert [row.where for row, _ in dev] == [f"{rows}:1"]
    assert f"{rows}:2: skipped: 2 s of sound, with chunk 0 at most 1.5" in capsys.readouterr().err
    _, dev = train.open_corpus(train.parse_options([*command, "--chunks", "16,0"]))
    assert len(list(dev)) == 2


def test_a_run_without_a_development_set_is_evaluated_when_it_gets_one(small, tmp_path, capsys):
    assert train.main(["--write-corpus", str(tmp_path / "c"), "8"]) == 0
    manifest = tmp_path / "c" / "manifest.jsonl"
    folder = tmp_path / "run"
    assert train.main([str(manifest), *SHORT, "--steps", "6", "--out", str(folder)]) == 0
    assert evaluations(folder) == []
    assert "has done 6" in refused(capsys, "--resume", folder)
    assert train.main(["--resume", str(folder), "--dev", str(manifest)]) == 0
    assert evaluations(folder) == [6] and load(folder / "resume.pt")[1]["step"] == 6


def test_a_best_score_belongs_to_its_development_set(small, tmp_path):
    assert train.main(["--write-corpus", str(tmp_path / "c"), "8"]) == 0
    for name in ("a", "b"):
        lines = (tmp_path / "c" / "manifest.jsonl").read_text().splitlines()
        (tmp_path / "c" / f"{name}.jsonl").write_text("\n".join(lines[:3]) + "\n")
    folder = tmp_path / "run"
    assert train.main([str(tmp_path / "c" / "manifest.jsonl"), *SHORT, "--steps", "6", "--dev",
                       str(tmp_path / "c" / "a.jsonl"), "--out", str(folder)]) == 0
    for dev, kept in (("a", 1e6), ("b", train.Run.best)):
        model, beside = load(folder / "resume.pt")
        train.save(folder / "resume.pt", model, **beside | {"best": 1e6})
        options = train.parse_options(["--resume", str(folder), "--steps", "9",
                                       "--dev", str(tmp_path / "c" / f"{dev}.jsonl")])
        assert train.resume_run(options).best == kept


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups")
def test_sigterm_to_all_processes_saves_the_run(tmp_path):
    """As a batch system sends it, to the workers too: they go on until the run is saved, here five
    steps later, as if another process took so long to agree."""
    code = KILLED.split("renamed, saved")[0] + """
real = train.train_step
def step(run, *args):
    if run.step in (3, 5):               # twice: torchrun passes its own on to those who got one
        os.killpg(0, signal.SIGTERM)
    return real(run, *args)
train.train_step = step
later = iter([False] * 5)
train.Ranks.agree = lambda self, wish: wish and next(later, True)
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[2:]))
"""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, Path(train.__file__).parent, *SHORT, "--steps", "20",
         "--workers", "2", "--out", folder],
        start_new_session=True, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr.count("Traceback") == 0, done.stderr
    assert "stopped; go on with" in done.stdout
    assert load(folder / "resume.pt")[1]["step"] == 9


def test_translations_alone_are_learned_from_the_first_step(small, tmp_path):
    """Rows without a transcription have no letters to spell: the other tasks begin at once."""
    assert train.main(["--write-corpus", str(tmp_path), "8"]) == 0
    manifest = tmp_path / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    losses = {}
    for name, dropped in (("both", []), ("translations", ["asr", "links", "times"])):
        kept = [{key: row[key] for key in row.keys() - set(dropped)} for row in rows]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in kept))
        folder = tmp_path / name
        assert train.main([str(manifest), *SHORT, "--steps", "10", "--warm-steps", "8",
                           "--out", str(folder)]) == 0
        losses[name] = next(csv.DictReader(open(folder / "log.csv")))
    assert losses["both"]["step"] == "2" == losses["translations"]["step"]
    assert not losses["both"]["words"] and not losses["both"]["next_label"]
    assert float(losses["translations"]["words"]) > 1
    assert float(losses["translations"]["next_label"]) > 1


def test_letters_are_those_of_all_that_is_heard_or_none(small, tmp_path):
    """Joined with a row that has no transcription, a row's letters would stand for the sound of
    both."""
    rows = corpus_rows(tmp_path, 4)
    rows[1]["asr"] = None
    del rows[1]["links"], rows[1]["times"]
    options = train.parse_options([manifest_of(tmp_path, rows), *SHORT])
    corpus, _ = train.open_corpus(options)
    made = train.new_run(options, corpus)
    source, some = train.Source(options, made), corpus.rows(0)

    def letters(*which):
        stream = train.Stream([some[k] for k in which], [0.0] * len(which), [], 1.0, 9.0)
        return source[train.Request([stream], 0, (0, 1), True)]["letters_lengths"].tolist()
    assert letters(0)[0] > 5 and letters(0, 2)[0] > letters(0)[0] and letters(0, 1) == [0]
    # All rows say what a text may be written with, also where the tokenizer learned from some.
    assert made.tokenizer.alphabet == "".join(sorted(
        {c for row in some for text in (row.asr, *row.st.values()) for c in text or ""} - {" "}))


def test_a_folder_with_a_model_is_not_written_over(small, tmp_path, capsys, monkeypatch):
    for name in train.KEPT:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        said = refused(capsys, *SHORT, "--out", folder)
        assert f"holds a run already ({name})" in said
        assert ("--resume" in said) == (name == "resume.pt")
        assert (folder / name).read_bytes() == b"x"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "de-en").mkdir(parents=True)
    (tmp_path / "runs" / "de-en" / "model.pt").write_bytes(b"x")
    assert train.run_directory(train.parse_options(SHORT), train.Ranks()).name == "de-en-2"


@pytest.mark.parametrize("rank, world, local", [
    ("1", "1", "0"), ("", "1", "0"), ("x", "2", "0"), ("0", "-1", "0"), ("2", "2", "0"),
    ("0", "2", "x")])
def test_ranks_that_cannot_be(small, capsys, monkeypatch, rank, world, local):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, value)
    said = refused(capsys, *SHORT)
    assert f"RANK '{rank}', WORLD_SIZE '{world}', LOCAL_RANK '{local}': processes that" in said


@pytest.mark.parametrize("address, port, message", [
    (None, "29500", "environment variable MASTER_ADDR expected"),
    ("localhost", "none", "invalid literal for int() with base 10: 'none'")])
def test_processes_that_do_not_find_each_other(small, capsys, monkeypatch, address, port, message):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if address:
        monkeypatch.setenv("MASTER_ADDR", address)
    said = refused(capsys, *SHORT)
    assert "these 2 processes do not find each other" in said and message in said


def test_why_no_row_has_sound(small, tmp_path, capsys):
    rows = corpus_rows(tmp_path, 3)
    for row in rows:
        row |= {"audio": "none/" + row["audio"], "duration": 3.0}
    said = refused(capsys, manifest_of(tmp_path, rows), *SHORT)
    assert "none of 3 rows tried has usable sound; the first: " in said
    assert "No such file" in said and ":1: " in said


def test_steps_without_letters_among_others_learn_the_rest(small, tmp_path, monkeypatch):
    """One transcription among eight rows: most steps of the first phase have no letters to spell,
    and are neither lost nor taken for failures."""
    rows = corpus_rows(tmp_path, 8)
    for row in rows[1:]:
        row["asr"] = None
        del row["links"], row["times"]
    manifest = manifest_of(tmp_path, rows)
    monkeypatch.setattr(train, "GIVE_UP", 2)
    folder = run(tmp_path / "run", manifest, "--steps", "10", "--warm-steps", "8",
                 "--batch-seconds", "2")
    lines = list(csv.DictReader(open(folder / "log.csv")))
    assert lines[-1]["step"] == "10" and lines[-1]["skipped"] == "0"
    assert any(float(line["next_label"] or 0) > 1 for line in lines[:2])


def test_a_crash_costs_no_more_than_the_time_between_two_checkpoints(
        small, tmp_path, capsys, monkeypatch):
    real = train.train_step

    def step(run, *args):
        if run.step == 5:
            raise SystemExit           # no Exception, which would be saved on the way out
        return real(run, *args)
    whole = run(tmp_path / "whole", "--steps", "8")
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--steps", "8")
    assert load(tmp_path / "run" / "resume.pt")[1]["step"] == 5
    monkeypatch.setattr(train, "train_step", real)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    same = [weights_of(folder / "resume.pt") for folder in (whole, tmp_path / "run")]
    assert same_weights(*same)


def test_restrict_says_which_rows_it_does_not_bind(small, tmp_path, capsys):
    rows, restrict = corpus_rows(tmp_path, 4), ["--restrict", "0.8", "--prune", "0"]
    del rows[1]["times"]
    options = train.parse_options([manifest_of(tmp_path, rows), "--device", "cpu", *restrict])
    train.open_corpus(options)
    assert "1 of 4 rows lack times of their words" in capsys.readouterr().err
    for row in rows:
        row.pop("times", None)
    manifest = manifest_of(tmp_path, rows)
    assert "--restrict 0.8: 4 of 4 rows lack times" in refused(
        capsys, manifest, *restrict, "--out", tmp_path / "run")


def test_a_band_is_for_orders_without_bursts():
    prune = lambda *argv: train.parse_options(["--device", "cpu", *argv]).prune
    assert [prune(), prune("m.jsonl"), prune("--interleave", "time")] == [16, 16, 16]
    assert prune("--restrict", "0.8") == 0
    assert [prune("--interleave", order) for order in ("asr", "st", "ratio:0.5")] == [0, 0, 0]
    assert prune("--interleave", "st", "--prune", "8") == 8


def test_the_built_in_corpus_is_not_written_beside_a_manifest(tmp_path, capsys):
    assert "does not go with" in refused(
        capsys, tmp_path / "m.jsonl", "--write-corpus", tmp_path / "x", "3")
    assert not (tmp_path / "x").exists()


def test_processes_with_other_rows_stop_and_begin_with_the_first_ones_network(small, monkeypatch):
    options = train.parse_options(["--device", "cpu"])
    corpus = train.BuiltIn("de-en", 0)
    made, sent, other = train.new_run(options, corpus), [], []

    def gather(seen, own):
        seen[:] = [own, other[0] if other else own]
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    monkeypatch.setattr(train.dist, "broadcast", lambda tensor, source: sent.append(tensor))
    train.Ranks(1, 2).begin_alike(made, corpus)
    assert len(sent) == len(made.model.state_dict())
    own = dict(made.model.named_parameters())["joint.output.weight"]
    assert own.data_ptr() in [tensor.data_ptr() for tensor in sent]    # in place, not a copy
    other.append((15, 7))
    with pytest.raises(train.InputError, match="but 16, 15 of them"):
        train.Ranks(1, 2).begin_alike(made, corpus)
    train.Ranks(0, 1).begin_alike(made, corpus)                        # alone, nothing to compare


def test_a_run_can_be_made_longer_and_model_pt_streams(small, tmp_path):
    folder = run(tmp_path / "run", "--steps", "6")
    assert train.main(["--resume", str(folder), "--steps", "9"]) == 0
    assert load(folder / "resume.pt")[1]["step"] == 9
    model, tokenizer, beside = load_run(folder / "model.pt")
    assert (
        beside["step"] == 9 and "optimizers" not in beside and len(tokenizer) == model.config.vocab
    )
    assert (folder / "model.pt").stat().st_size < 0.6 * (folder / "resume.pt").stat().st_size
    assert [entry["step"] for entry in json.loads((folder / "metrics.json").read_text())] == [6, 9]


def test_workers_and_threads_make_the_same_batches(small, tmp_path):
    options = train.parse_options([*SHORT, "--steps", "10"])
    corpus = train.BuiltIn("de-en", 0)
    made = train.new_run(options, corpus)

    def first(workers):
        chosen = replace(options, workers=workers)
        with train.Batches(
            train.Source(chosen, made), corpus, made, chosen, train.Ranks()
        ) as batches:
            return [group[0] for group, _ in zip(batches, range(5))]
    for a, b in zip(first(0), first(2)):
        assert a["after"] == b["after"] and a["rows"] == b["rows"]
        for name in ("mel", "targets", "letters", "chance"):
            assert torch.equal(a[name], b[name]), name


def test_a_step_in_pieces_is_the_step(small, tmp_path):
    """Ten steps of two batches on one process, and of one batch on each of two: the same weights to
    1e-10."""
    code = """
import sys; sys.path[:0] = sys.argv[1:3]
from dataclasses import replace
import torch, train
from model import PRESETS
torch.set_num_threads(1)
train.PRESETS["tiny"] = replace(PRESETS["tiny"], dim=16, heads=2, layers=1, ff=32, joint_dim=16,
                                dropout=0.0)
train.BuiltIn.SIZE, train.WARM_UP, train.FORGET_STEPS = 40, 2, 2
ranks = train.Ranks.here("cpu")
options = train.parse_options(sys.argv[4:])
corpus = train.BuiltIn("de-en", 0)
made = train.new_run(options, corpus)
made.model.double()
made.optimizers = train.make_optimizers(made.model, options)
real = train.to_device
def in_double(batch, device):
    batch = real(batch, device)
    batch.mel = batch.mel.double()
    return batch
train.to_device = in_double
with train.Batches(train.Source(options, made), corpus, made, options, ranks) as batches:
    for group, _ in zip(batches, range(10)):
        numbers = train.train_step(made, group, options, ranks)
if ranks.first:
    torch.save([made.model.state_dict(), made.position, float(numbers["transducer"])], sys.argv[3])
"""
    root, files = Path(train.__file__).parent, [tmp_path / "one.pt", tmp_path / "two.pt"]
    argv = [str(root), str(root), str(files[0]), *SHORT, "--steps", "10", "--accumulate", "2"]
    subprocess.run([sys.executable, "-c", code, *argv], check=True)
    argv = [str(root), str(root), str(files[1]), *SHORT, "--steps", "10"]
    two = [
        subprocess.Popen(
            [sys.executable, "-c", code, *argv],
            env=os.environ
            | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29577",
            },
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in two] == [0, 0]
    (one, at_one, cost_one), (both, at_both, cost_both) = map(torch.load, files)
    assert at_one == at_both and cost_one == pytest.approx(cost_both, rel=1e-10)
    assert max(float((x - both[name]).abs().max()) for name, x in one.items()) < 1e-10


def test_a_gradient_that_is_not_finite_is_dropped_and_twenty_stop_the_run(
    small, tmp_path, capsys, monkeypatch
):
    real = train.losses

    def burst(*args):
        return {name: loss * float("nan") for name, loss in real(*args).items()}
    monkeypatch.setattr(train, "losses", burst)
    monkeypatch.setattr(train, "announce", lambda *args: None)
    monkeypatch.setattr(train, "GIVE_UP", 5)
    before = train.new_run(
        train.parse_options([*SHORT, "--steps", "30"]), train.BuiltIn("de-en", 0)
    ).model.state_dict()
    assert train.main([*SHORT, "--steps", "30", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "step 5" in said and "built-in corpus" in said
    assert not (tmp_path / "run" / "model.pt").exists()
    monkeypatch.setattr(train, "GIVE_UP", 500)
    folder = run(tmp_path / "other", "--steps", "6", "--eval-every", "100")
    assert same_weights(before, weights_of(folder / "resume.pt"))
    assert list(csv.DictReader(open(folder / "log.csv")))[-1]["skipped"] == "6"
    monkeypatch.setattr(train, "losses", real)                 # a resumed run counts on, and
    assert train.main(["--resume", str(folder), "--steps", "8"]) == 0
    last = list(csv.DictReader(open(folder / "log.csv")))[-1]  # such steps are in no mean
    assert last["skipped"] == "6" and 0 < float(last["letters"]) < 1e6


def test_a_process_without_usable_sound_adds_nothing():
    """Two processes of which this one has gradients of some parameters, and the other of none."""
    class Two(train.Ranks):
        def add(self, tensor):
            return tensor

    model = torch.nn.Linear(3, 2)
    for filled in (False, True):
        model.bias.grad = torch.ones(2) if filled else None
        Two(0, 2).add_gradients(model)
        assert model.weight.grad is None and (model.bias.grad is not None) == filled

    class Other(Two):
        def add(self, tensor):
            return tensor.copy_(torch.full_like(tensor, 7.0))   # all have gradients elsewhere
    model.bias.grad = None
    Other(1, 2).add_gradients(model)
    assert (model.bias.grad == 7).all() and (model.weight.grad == 7).all()


def test_what_is_told_to_the_user_is_told_by_the_first_process_only(capsys):
    for rank in (0, 1):
        with train.Ranks(rank, 2).only_first_speaks():
            print("said by", rank)
            print("warned by", rank, file=sys.stderr)
    assert capsys.readouterr() == ("said by 0\n", "warned by 0\n")


def test_a_worker_outlives_the_signals_of_its_job_and_runs_no_library_at_its_end():
    """A handler that was there before would speak after its own: what it says must not come."""
    code = ("import atexit, os, signal, sys, train; atexit.register(print, 'late')\n"
            "if len(sys.argv) > 1: train.quiet_worker(0)\n"
            "os.kill(os.getpid(), signal.SIGTERM); print('lives', flush=True)\n")
    root = Path(train.__file__).parent
    worker, other = (subprocess.run([sys.executable, "-c", code, *more], cwd=root, text=True,
                                    capture_output=True) for more in (["worker"], []))
    assert (worker.returncode, worker.stdout) == (0, "lives\n"), worker.stderr
    assert other.returncode and "lives" not in other.stdout


def test_the_best_so_far_is_remembered_by_a_resumed_run(small, tmp_path, monkeypatch):
    scores = iter([50.0, 60.0, 40.0])
    monkeypatch.setattr(train, "evaluate", lambda model, tokenizer, dev, **_: (
        {"<asr>": dict.fromkeys(["wer", "cer", "bleu", "laal_ms", "silent"], 0.0)
         | {"chrf": next(scores), "utterances": 3}}, [{}] * 3))
    monkeypatch.setattr(train, "show_scores", lambda *args: None)
    options = ["--steps", "6", "--augment", "0"]
    monkeypatch.setattr(train, "open_corpus", lambda *_: (
        train.BuiltIn("de-en", 0), [None] * 3))
    monkeypatch.setattr(train, "warn_of_unseen", lambda *args: None)
    real = train.assess
    monkeypatch.setattr(train, "assess", lambda run, dev, options, folder, blind, stop: real(
        run, dev, options, folder, False, stop))
    folder = run(tmp_path / "run", *options)
    assert load(folder / "resume.pt")[1]["best"] == 50 == load(folder / "best.pt")[1]["step"] + 44
    for steps, best, at in (("8", 60, 8), ("9", 60, 8)):
        assert train.main(["--resume", str(folder), "--steps", steps]) == 0
        assert load(folder / "resume.pt")[1]["best"] == best
        assert load(folder / "best.pt")[1]["step"] == at


def test_the_best_is_so_in_the_mean_and_over_all_utterances(monkeypatch, tmp_path):
    saved, found = [], {"<asr>": {"chrf": 80.0}, "<st:en>": {"chrf": 40.0}}
    options, stop = train.parse_options(["--device", "cpu"]), SimpleNamespace(wanted=False)
    monkeypatch.setattr(train, "show_scores", lambda *_: None)
    monkeypatch.setattr(train, "save_model", lambda run, *_: saved.append(run.best))
    for best, n, after in ((50.0, 3, 60), (70.0, 3, 70), (50.0, 2, 50)):
        monkeypatch.setattr(train, "evaluate", lambda *_, **__: (found, [None] * n))
        made = SimpleNamespace(model=None, tokenizer=None, streams=(), step=1, best=best)
        train.assess(made, [None] * 3, options, tmp_path, False, stop)
        assert made.best == after
    assert saved == [60]


@pytest.mark.parametrize("streams", ["", "2>&-"])
def test_a_screen_without_letters_or_a_stream_that_is_closed_ends_no_training(streams, tmp_path):
    """Umlauts and the middle dot of the first evaluation, on a screen that knows ASCII alone."""
    script = tmp_path / "tiny.py"
    script.write_text("import sys\nfrom dataclasses import replace\nimport train\n"
                      "from model import PRESETS\n"
                      "train.PRESETS['tiny'] = replace(PRESETS['tiny'], dim=16, heads=2, layers=1,"
                      " ff=32, joint_dim=16)\n"
                      "train.BuiltIn.SIZE, train.TEST_SIZE = 8, 2\n"
                      "train.live_captions = lambda *_: 'FILE'\n"
                      "sys.exit(train.main(sys.argv[1:]))\n")
    command = f"{sys.executable} {script} {' '.join(SHORT)} --steps 6 --out {tmp_path / 'run'}"
    done = subprocess.run(["bash", "-c", f"{command} {streams}"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii",
                                            "PYTHONPATH": os.path.dirname(train.__file__)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").exists()
    assert "WER" in done.stdout and "at its time" in done.stdout


def test_the_first_score_of_a_script_without_spaces_is_that_of_its_characters(capsys):
    numbers = {"bleu": None, "laal_ms": None, "silent": 0, "utterances": 1}
    train.show_scores({"<asr>": {"cer": 12.5, "wer": 50.0} | numbers,
                       "<st:en>": {"wer": 50.0, "cer": 12.5} | numbers}, [])
    lines = capsys.readouterr().out.splitlines()
    assert ["CER  12.5  WER  50.0" in lines[0], "WER  50.0  CER  12.5" in lines[1]] == [True, True]


def test_start_from_another_model(small, tmp_path, capsys):
    first = run(tmp_path / "asr", "--steps", "6", "--interleave", "asr", "--prune", "0")
    options = train.parse_options(
        [*SHORT, "--steps", "6", "--init", str(first / "model.pt"), "--corpus", "de-es"]
    )
    capsys.readouterr()
    made = train.new_run(options, train.BuiltIn("de-es", 0))
    said = capsys.readouterr().out
    given, own = weights_of(first / "model.pt"), made.model.state_dict()
    assert torch.equal(own["encoder.project.weight"], given["encoder.project.weight"])
    assert torch.equal(own["ctc.weight"], given["ctc.weight"])  # the same letters
    assert not torch.equal(own["joint.output.bias"], given["joint.output.bias"])  # other tokens
    assert "joint.output.bias" in said and "ctc" not in said.split(" not ")[1]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process")
def test_ctrl_c_while_importing_ends_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, train.__file__, "--help"], capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_one_run_a_folder_and_a_number_for_the_next(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main([*SHORT, "--steps", "5"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["de-en", "de-en-2"]
    begun = tmp_path / "runs" / "de-en-3"
    begun.mkdir()
    with train.locked(begun, True):                            # of which there is no log yet
        assert train.run_directory(train.parse_options(SHORT), train.Ranks()).name == "de-en-4"
    with train.locked(tmp_path / "runs" / "de-en", True):
        capsys.readouterr()
        log = (tmp_path / "runs" / "de-en" / "log.csv").read_text()
        (tmp_path / "runs" / "de-en" / "log.csv").write_text(log + log.splitlines()[-1] + "\n")
        assert "another run" in refused(
            capsys, "--resume", tmp_path / "runs" / "de-en", "--steps", "9"
        )
        # What that one has told since its last checkpoint is still there.
        assert len((tmp_path / "runs" / "de-en" / "log.csv").read_text()) > len(log)


def test_disk_full_keeps_the_old_checkpoint(small, tmp_path, capsys, monkeypatch):
    folder = run(tmp_path / "run", "--steps", "6")
    before = {file: (folder / file).read_bytes() for file in ("resume.pt", "model.pt")}
    capsys.readouterr()

    def full(content, file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in refused(capsys, "--resume", folder, "--steps", "8")
    assert before == {file: (folder / file).read_bytes() for file in before}
    assert not list(folder.glob("*.tmp"))


def test_a_log_that_cannot_be_written_anew_stays_whole(small, tmp_path, capsys, monkeypatch):
    folder = run(tmp_path / "run", "--steps", "6")
    log = (folder / "log.csv").read_bytes()
    assert log.count(b"\n") > 1

    def full(writer, rows):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train.csv.DictWriter, "writerows", full)
        said = refused(capsys, "--resume", folder, "--steps", "8")
        assert "No space left" in said and "log.csv" in said
    assert (folder / "log.csv").read_bytes() == log


@pytest.mark.parametrize("full", ["sound", "manifest"])
def test_a_corpus_on_a_full_disk_names_the_file(full, tmp_path, capsys, monkeypatch):
    import soundfile

    def sound(path, samples, rate):
        raise soundfile.SoundFileError(f"Error opening {path}")

    def manifest(path, rows):
        raise OSError(28, "No space left on device", str(path))
    if full == "sound":
        monkeypatch.setattr(soundfile, "write", sound)
    else:
        monkeypatch.setattr(train, "write_manifest", manifest)
    said = refused(capsys, "--write-corpus", tmp_path, "2")
    named = "manifest.jsonl" if full == "manifest" else ".flac: cannot be written"
    assert str(tmp_path) in said and named in said and not (tmp_path / "manifest.jsonl").exists()


def test_a_run_that_never_began_leaves_no_lock(tmp_path, capsys):
    assert "none.jsonl" in refused(capsys, tmp_path / "none.jsonl", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "--corpus is '../x-en'" in refused(capsys, "--corpus", "../x-en")
    assert not (tmp_path.parent / "x-en").exists()


def test_training_hears_the_sound_of_its_manifest(small, tmp_path):
    corpus = train.BuiltIn("de-en", 0)
    folder = tmp_path / "corpus"
    assert train.main(["--write-corpus", str(folder), "8"]) == 0
    options = train.parse_options(
        [str(folder / "manifest.jsonl"), "--device", "cpu", "--join", "1", "--augment", "0"]
    )
    rows, _ = train.open_corpus(options)
    made = train.new_run(options, rows)
    source = train.Source(options, made)
    for row, own in zip(rows.rows(0), corpus.rows(0, 8)):
        example = example_of(source, train.Stream([row], [0.0], [], 1.0, 3.0))
        silence = np.zeros(round(0.32 * 16000))
        samples = np.concatenate([train.speak_row(own)[0].clip(-1, 1), silence])
        spoken = train.mel_of(samples, made.model.config)
        assert torch.allclose(example["mel"], spoken, atol=0.2) and example["mel"].std() > 1
        assert row.asr == own.asr and row.links == own.links


def test_a_development_set_in_other_streams_is_told(small, tmp_path, capsys):
    assert train.main(["--write-corpus", str(tmp_path), "3"]) == 0
    manifest, dev = tmp_path / "manifest.jsonl", tmp_path / "dev.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]

    def said(**texts):
        dev.write_text("".join(json.dumps({"audio": row["audio"], "start": 0.1} | texts) + "\n"
                               for row in rows))       # other pieces than those learned from
        capsys.readouterr()
        train.open_corpus(train.parse_options([str(manifest), "--dev", str(dev), "--device",
                                               "cpu"]))
        return capsys.readouterr().err
    assert said(asr="x", st={"en": "y"}) == ""
    assert "no text of <st:en>, which is learned and not evaluated" in said(asr="x", st={"e": "y"})
    with pytest.raises(train.InputError, match="it has <st:e>, and what is learned is <asr> <st:en>"
                                               ": nothing to compare"):
        said(st={"e": "y"})


def test_processes_that_wait_in_vain_are_told(small, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(train, "MEET_S", 1)
    assert "these 2 processes do not find each other" in refused(capsys, *SHORT)


def test_a_training_outlives_whoever_reads_its_output(tmp_path):
    """As `train.py | head -1`: it goes on, and its model is there in the end."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
from dataclasses import replace
import train
train.PRESETS["tiny"] = replace(train.PRESETS["tiny"], dim=16, heads=2, layers=1, ff=32,
                                joint_dim=16)
train.BuiltIn.SIZE, train.TEST_SIZE, train.LOG_EVERY = 16, 3, 1
sys.exit(train.main(sys.argv[1:]))
"""
    call = [sys.executable, "-c", script, *SHORT, "--steps", "6", "--out", str(tmp_path / "run")]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert "parameters" in done.stdout.readline()
        done.stdout.close()
        errors = done.stderr.read()
    assert (done.returncode, "Broken" in errors, "Traceback" in errors) == (0, False, False), errors
    assert load(tmp_path / "run" / "resume.pt")[1]["step"] == 6
    assert (tmp_path / "run" / "model.pt").exists()


def test_noise_that_cannot_be_read_is_told_and_a_silent_piece_is_not(small, tmp_path, monkeypatch):
    noise = tmp_path / "noise"
    noise.mkdir()
    (noise / "long.wav").write_bytes(b"")
    options = train.parse_options(["--device", "cpu", "--noise", str(noise)])
    source = train.Source(options, train.new_run(options, train.BuiltIn("de-en", 0)))
    monkeypatch.setattr(train, "stated_seconds", lambda path: 600.0)
    s = train.Stream([], [], [], 1.0, 1.0)

    def found(error):
        def fails(row, seed):
            raise error
        monkeypatch.setattr(train, "sound_of", fails)
        bad = []
        heard = [source.background(s, 16000, np.random.default_rng(k), bad) for k in range(8)]
        assert heard == 8 * [None]
        return set(bad)
    path = str(noise / "long.wav")
    assert found(train.stream.AudioError("cut off")) == {f"{path}: cut off"}
    assert found(train.stream.SilentError("silent")) == set()


def test_a_first_save_that_is_killed_leaves_a_run_that_goes_on(small, tmp_path, monkeypatch):
    folder, real = tmp_path / "run", train.save

    def killed(path, *args, **how):
        real(path, *args, **how)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save", killed)
    assert train.main([*SHORT, "--steps", "6", "--out", str(folder)]) == 130
    assert [path.name for path in folder.glob("*.pt")] == ["resume.pt"]
    monkeypatch.setattr(train, "save", real)
    resumed = train.main(["--resume", str(folder), "--steps", "8"])
    assert resumed == 0 and load(folder / "model.pt")[1]["step"] == 8


def test_a_log_with_bytes_of_a_power_cut_is_read(small, tmp_path):
    folder = run(tmp_path / "run", "--steps", "6")
    log = (folder / "log.csv").read_bytes()
    (folder / "log.csv").write_bytes(log + 200_000 * b"\0" + b"\xff\n")
    assert train.main(["--resume", str(folder), "--steps", "8"]) == 0
    steps = [int(line["step"]) for line in csv.DictReader(open(folder / "log.csv"))]
    assert steps == [2, 4, 6, 8]


def test_a_manifest_in_the_root_has_a_folder_for_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = replace(train.parse_options(SHORT), manifest="/train.jsonl")
    assert train.run_directory(options, train.Ranks()) == Path("runs/run")


# ---- What no other test would see ----------------------------------------------------------------

def test_a_row_is_disturbed_in_another_way_in_every_epoch(small):
    options = train.parse_options(["--device", "cpu", "--join", "1"])
    corpus = train.BuiltIn("de-en", 0)
    source = train.Source(options, train.new_run(options, corpus))
    s = train.Stream(corpus.rows(0)[:1], [0.0], [], 1.0, 3.0)
    sounds = [source.sound_of(row) for row in s.rows]
    a, again, b = (source.example(s, sounds, train.Request([s], epoch, (0, 1), False), [])
                   for epoch in (0, 0, 1))
    assert torch.equal(a["mel"], again["mel"]) and torch.equal(a["chance"], again["chance"])
    assert not torch.equal(a["mel"], b["mel"]) and not torch.equal(a["chance"], b["chance"])


def test_the_simple_task_is_the_loss_of_the_summed_logits(batch_of_eight):
    """And teaches the label encoder, whose scores are scaled by the root of its width, 144."""
    options, made, batch = batch_of_eight
    model, step = made.model.eval(), options.warm_steps + 10 * train.FORGET_STEPS
    batch = SimpleNamespace(**vars(batch) | {"chance": torch.full_like(batch.chance, 0.5)})
    weight = model.label_encoder.embedding.weight
    ours = train.losses(model, batch, ["simple"], step, options, 16)["simple"]
    frames, _ = model.encoder(batch.mel, batch.mel_lengths, chunk=16)
    am = model.joint.output(torch.tanh(model.joint.encoder_proj(frames)))
    lm = model.label_encoder(batch.targets)[0] @ weight[:-1].T / 12
    logits = (am[:, :, None] + lm[:, None])[..., batch.classes]
    cost = rnnt_loss(logits, torch.searchsorted(batch.classes, batch.targets),
                     batch.mel_lengths // 4, batch.targets_lengths, blank=0, reduction="sum")
    assert ours.item() == pytest.approx(cost.item(), rel=1e-5)
    a, b = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (ours, cost))
    assert (a - b).abs().max() < 1e-3 * b.abs().max()


def test_a_checkpoint_every_ten_minutes_and_not_at_every_step_after(small, tmp_path, monkeypatch):
    """At 250 s a step; the last step saves before its evaluation and after it."""
    steps, saved, step, save_run = [], [], train.train_step, train.save_run
    monkeypatch.setattr(train, "time", SimpleNamespace(
        monotonic=lambda: 250.0 * len(steps), perf_counter=train.time.perf_counter))
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(train, "save_run",
                        lambda run, *rest: saved.append(run.step) or save_run(run, *rest))
    run(tmp_path / "run", "--steps", "8")
    assert saved == [3, 6, 8, 8]


def test_a_task_counts_its_own_symbols(batch_of_eight):
    _, _, batch = batch_of_eight
    rows = train.BuiltIn("de-en", 0).rows(0, 8)
    labels, words = (int(n.sum()) for n in (batch.targets_lengths, batch.words_lengths))
    assert batch.symbols == {"transducer": labels, "simple": labels, "next_label": labels,
                             "words": words, "letters": sum(len(row.asr) for row in rows)}
    assert 0 < words < labels


def test_the_built_in_voice_keeps_its_speed():
    options = train.parse_options(["--device", "cpu"])
    rows = train.BuiltIn("de-en", 0).rows(0, 8)
    drawn = [train.draw_stream(rows[:3], 3.0, rows, np.random.default_rng(seed), options)
             for seed in range(100)]
    assert {s.speed for s in drawn} == {1.0}
    recorded = [replace(row, audio="a.wav") for row in rows]               # the control
    assert {train.draw_stream(recorded[:3], 3.0, rows, np.random.default_rng(seed), options).speed
            for seed in range(100)} == set(train.SPEEDS)


def test_stretches_of_a_short_utterance_are_an_eighth_of_it_at_most():
    mel = torch.randn(80, 80) + torch.arange(80) / 8
    gone = [int((train.without_stretches(mel, np.random.default_rng(seed)) != mel)[:, 0].sum())
            for seed in range(60)]
    assert 15 < max(gone) <= 20                                # two of ten frames


def test_noise_lies_7_to_30_db_below_the_speech(monkeypatch):
    for name in ("low_pass", "mu_law"):
        monkeypatch.setattr(train, name, lambda samples, *_: samples)
    x = np.sin(np.arange(16000) / 5).astype(np.float32) * 0.1
    noise, ratios = np.random.default_rng(1).normal(0, 1, 16000), []
    for seed in range(400):
        y = train.disturb(x, noise, np.random.default_rng(seed)).astype(float)
        own = (x @ y) / (x @ x) * x
        ratios.append(10 * np.log10(np.sum(own ** 2) / np.sum((y - own) ** 2)))
    assert 6.8 < min(ratios) < 7.7 and 29.3 < max(ratios) < 30.4
    assert np.mean(ratios) == pytest.approx(18.5, abs=1.2)     # of 400: 0.33 off, as a rule


def test_a_codec_cuts_anywhere_from_band_30_to_69():
    mel = torch.full((1, 80), -10.0)
    mel[:, 0] = 0                        # all others are weaker by more than 6 nats
    coded = [train.through_codec(mel, np.random.default_rng(seed), -11.5) for seed in range(400)]
    cuts = [int((x != mel)[0].int().argmax()) for x in coded if not torch.equal(x, mel)]
    assert 70 < len(cuts) < 130 and 30 <= min(cuts) < 33 and 66 < max(cuts) <= 69


def test_another_seed_is_another_network(small):
    def weights(seed):
        options = train.parse_options(["--device", "cpu", "--seed", seed])
        return train.new_run(options, train.BuiltIn("de-en", 0)).model.encoder.project.weight
    assert torch.equal(weights("0"), weights("0")) and not torch.equal(weights("0"), weights("1"))
