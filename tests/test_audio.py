"""stream.py, its sound: files, standard input, microphone.

What can be shown to be whole is read, all else is refused in one line."""
import copy
import io
import itertools
import os
import shutil
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import serialize
import stream
from model import save
from serialize import InputError, Row, Tokenizer
from stream import (AudioError, Resampler, Streamer, audio_blocks, load_run, read_audio, readable,
                    resample)
from test_stream import LIMITS, TOKENIZER, captions, folder, lively, noise, pcm  # noqa: F401

CASES = ROOT.parent / "shared" / "data" / "cases"
FFMPEG = "ffmpeg -loglevel error -i {} -f s16le -ac 1 -ar 16000 - | python stream.py MODEL -"
SECOND = 16000


def refused(path, message, ffmpeg=True, **piece):
    """One printable line with the name of the file, the reason, and what to do."""
    with pytest.raises(AudioError) as caught:
        read_audio(path, **piece)
    text = str(caught.value)
    assert str(path) in text and message in text and text.isprintable() and "<_io" not in text
    assert (FFMPEG.format(path) in text) == ffmpeg


# ---- Resampling ---------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [4096, 8000, 8192, 11025, 16384, 22050, 32768, 44100, 48000])
def test_resampling(rate):
    """A tone below half of both rates keeps its shape; one above half of the new rate is gone."""
    t = np.arange(rate) / rate
    out = resample(np.sin(2 * np.pi * 1234 * t).astype(np.float32), rate, 16000)
    assert len(out) == 16000
    inner = slice(200, -200)  # the ends miss their neighbours
    exact = np.sin(2 * np.pi * 1234 * np.arange(16000) / 16000)
    assert np.abs(out - exact)[inner].max() < 1e-3
    if rate > 19000:
        gone = resample(np.sin(2 * np.pi * 9500 * t).astype(np.float32), rate, 16000)
        assert np.abs(gone[inner]).max() < 1e-3


@pytest.mark.parametrize("rate", [8000, 8192, 12345, 32768, 44100, 48000, 96000])
def test_resampling_in_pieces(rate):
    """Pieces of any sizes give what one piece gives; the control forgets what was before."""
    samples = noise(rate)
    whole = resample(samples, rate, 16000)
    cuts = [0, 1, 2, 300, 301, 5000, 7777, rate]
    pieces = [samples[a:b] for a, b in itertools.pairwise(cuts)]
    resampler = Resampler(rate)
    parts = [resampler.feed(piece, last=piece is pieces[-1]) for piece in pieces]
    assert len(whole) == 16000 == sum(map(len, parts))
    assert np.abs(np.concatenate(parts) - whole).max() < 1e-6
    forgetful = np.concatenate([resample(piece, rate, 16000) for piece in pieces])[:16000]
    assert np.abs(forgetful - whole[:len(forgetful)]).max() > 1e-2


# ---- Blocks -------------------------------------------------------------------------------------

def test_read_audio(tmp_path):
    x = noise(32000) * 0.5
    soundfile.write(tmp_path / "mono.flac", x, 16000)
    whole = read_audio(tmp_path / "mono.flac")
    assert np.abs(whole - x).max() < 1e-4
    assert np.array_equal(read_audio(tmp_path / "mono.flac", 0.5, 1.0), whole[8000:24000])
    soundfile.write(tmp_path / "stereo.wav", np.stack([x, x[::-1]], 1), 16000)
    assert np.abs(read_audio(tmp_path / "stereo.wav") - (x + x[::-1]) / 2).max() < 1e-4
    soundfile.write(tmp_path / "fast.ogg", x, 48000)
    assert len(read_audio(tmp_path / "fast.ogg")) == 10667
    (tmp_path / "flac.raw").write_bytes((tmp_path / "mono.flac").read_bytes())
    assert np.array_equal(read_audio(tmp_path / "flac.raw"), whole)  # its content decides


@pytest.mark.parametrize("rate,kind", [(16000, "wav"), (44100, "flac"), (22050, "mp3"),
                                       (48000, "ogg")])
def test_blocks_are_the_whole(tmp_path, rate, kind):
    """Bit for bit; and what soundfile reads in one go is the same sound."""
    path = tmp_path / f"x.{kind}"
    soundfile.write(path, np.repeat(noise(rate * 4), 2)[:rate * 7 // 2] * 0.5, rate)
    blocks = list(audio_blocks(path))
    assert len(blocks) >= 4 and np.array_equal(np.concatenate(blocks), read_audio(path))
    samples, _ = soundfile.read(path, dtype="float32")
    assert np.abs(np.concatenate(blocks) - resample(samples, rate, 16000)).max() < 1e-5


def test_memory_stays_flat_and_the_first_block_does_not_wait(tmp_path):
    """Five minutes, 19 MB as samples, in less than 2 MB; a fault at the end does not keep the
    start back."""
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(noise(SECOND * 10) * 0.5, 30), 44100)
    next(audio_blocks(path))                        # the filter is made once, and kept
    tracemalloc.start()
    n = sum(len(block) for block in audio_blocks(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == -(-30 * 10 * SECOND * 160 // 441) and peak < 2e6
    soundfile.write(path.with_suffix(".flac"), np.tile(noise(SECOND * 10) * 0.5, 2), 16000)
    data = path.with_suffix(".flac").read_bytes()
    path.with_suffix(".flac").write_bytes(data[:len(data) * 2 // 3])
    blocks = audio_blocks(path.with_suffix(".flac"))
    assert len(list(itertools.islice(blocks, 12))) == 12
    with pytest.raises(AudioError, match="cut off"):
        list(blocks)


def test_one_channel(tmp_path, capsys):
    """The mean where all have sound, the sum where one alone has, as yet; the louder channel, told,
    where they cancel each other."""
    x, y = noise(SECOND * 2) * 0.5, noise(SECOND * 2, 1) * 0.5
    zero, late = x * 0, np.zeros(SECOND * 12, np.float32)

    def read(*channels):
        soundfile.write(tmp_path / "x.wav", np.stack(channels, 1), 16000, subtype="FLOAT")
        samples = read_audio(tmp_path / "x.wav")
        return samples, capsys.readouterr().err
    for channels in ([x, y], [x, x], [x, 0.5 * x], [x, y, x, y]):
        samples, told = read(*channels)
        assert np.abs(samples - np.mean(channels, 0)).max() < 1e-6 and not told
    for channels, loudest in (([x, -x], 0), ([0.5 * x, -x], 1)):
        samples, told = read(*channels)
        assert np.array_equal(samples, channels[loudest])
        assert f"channel {loudest + 1} of {len(channels)}" in told and told.count("\n") == 1
    # One that has it all is taken as it is, and who speaks later is heard too.
    for channels in ([zero, x], [x, zero], [zero, zero, x, zero, zero, zero]):
        samples, told = read(*channels)
        assert np.array_equal(samples, x) and not told
    loud = np.tile(0.9 * np.sign(x), 6)  # both at once: louder than 1, and yet not clipped
    samples, told = read(np.concatenate([loud, loud]), np.concatenate([0 * loud, loud]))
    assert np.array_equal(samples[:len(loud)], loud) and np.allclose(samples[len(loud):], 2 * loud)
    first = np.concatenate([np.tile(x, 6), zero])
    samples, told = read(first, np.concatenate([np.tile(zero, 6), y]))
    assert np.array_equal(samples, np.concatenate([np.tile(x, 6), y])) and not told
    # Silence decides nothing: the ten seconds begin with the first sound.
    samples, told = read(np.concatenate([late, x]), np.concatenate([late, -x]))
    assert np.array_equal(samples[-len(x):], x) and "channel 1 of 2" in told
    # Decided once: what cancels after eleven seconds stays with the mean.
    long = np.tile(x, 6)
    samples, told = read(np.concatenate([long, x]), np.concatenate([long, -x]))
    assert not told and not samples[-len(x):].any()


# ---- What is refused ----------------------------------------------------------------------------

def test_bad_samples_in_a_file(tmp_path):
    x = noise(16000)
    nan = np.where(np.arange(16000) == 5, np.nan, x)
    bad = {"nan": (nan, "NaN or infinite at 0.0003 s (sample 5)"),
           "silent": (x * 0, "silent, all 16000"), "clipped": (np.clip(x * 100, -1, 1), "clipped"),
           "empty": (x[:0], "no samples, as its header says")}
    for name, (samples, message) in bad.items():
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, samples, 16000, subtype="FLOAT")
        refused(path, message, ffmpeg=name == "empty")
    soundfile.write(tmp_path / "short.wav", x, 16000)
    refused(tmp_path / "short.wav", "1.00 s long", ffmpeg=False, start=0.5, duration=2.0)
    refused(tmp_path / "short.wav", "1.00 s long", ffmpeg=False, start=1.5)
    for start in (0, 0.5, 2):
        refused(tmp_path / "short.wav", "a piece of 0 s holds no sound", ffmpeg=False, start=start,
                duration=0)
    refused(tmp_path / "missing.wav", "No such file", ffmpeg=False)


NOT_WRITABLE = {("AIFF", "DWVW_12"), ("AIFF", "DWVW_N"), ("WAV", "MPEG_LAYER_III"),
                ("MP3", "MPEG_LAYER_I"), ("MP3", "MPEG_LAYER_II")}
WHOLE = [(kind, subtype) for kind in stream.CONTAINERS
         for subtype in soundfile.available_subtypes(kind) if (kind, subtype) not in NOT_WRITABLE]


@pytest.mark.parametrize("kind,subtype", WHOLE)
def test_cut_at_two_thirds(tmp_path, kind, subtype):
    """All that is read is read to its end, from any place in it; refused with a third missing."""
    path = tmp_path / "x"
    soundfile.write(path, noise(SECOND * 3) * 0.5, 16000, format=kind, subtype=subtype)
    whole = read_audio(path)
    assert 3 <= len(whole) / SECOND < 3.1
    if subtype.startswith("DWVW"):  # libsndfile can read it, but not from a place inside
        refused(path, "psf_fseek", start=1.0, duration=0.5)
    else:
        piece = read_audio(path, 1.0, 0.5)
        assert len(piece) == 8000 and np.abs(piece - whole[16000:24000]).max() < 0.2
    data = path.read_bytes()
    for part in (2 / 3, 0.97):
        path.write_bytes(data[:int(part * len(data))])
        refused(path, "cut off")


def test_joined(tmp_path):
    """Two files in one: libsndfile stops after the first, of which it says nothing."""
    for kind, message in (("mp3", "joined"), ("ogg", "goes on"), ("flac", "goes on"),
                          ("au", "goes on"), ("wav", "WAV"), ("aiff", "AIFF")):
        path = tmp_path / f"x.{kind}"
        soundfile.write(path, noise(SECOND * 3) * 0.5, 16000)
        assert serialize.sound_seconds(path) == pytest.approx(3, abs=0.1 * (kind == "mp3"))
        path.write_bytes(path.read_bytes() * 2)
        refused(path, message)
        assert serialize.sound_seconds(path) is None           # an importer states no duration


def test_containers_that_do_not_show_their_end(tmp_path):
    for kind in ("NIST", "PAF", "VOC", "IRCAM", "W64"):
        path = tmp_path / "x"
        soundfile.write(path, noise(SECOND) * 0.5, 16000, format=kind, subtype="PCM_16")
        refused(path, f"{kind} does not show whether it is whole")


def test_what_it_is(tmp_path):
    """Formats that are not read here are named by their first bytes."""
    for head, kind in [(b"\0\0\0\x20ftypM4A ", "MPEG-4"), (b"\xff\xf1\x50\x80", "AAC"),
                       (b"#!AMR\n", "AMR"), (b"\x0b\x77", "AC-3"),
                       (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media"),
                       (b"\x1a\x45\xdf\xa3", "Matroska or WebM"),
                       (b"this is text", "no format"), (pcm_of(noise(300)), "raw samples?")]:
        for name in ("x", "x.raw", "x.wav"):
            path = tmp_path / name
            path.write_bytes(head + bytes(500))
            refused(path, kind)
            path.write_bytes(b"")
            refused(path, "an empty file", ffmpeg=False)
    path = tmp_path / "it's\x1b[2J.wav"  # an escape sequence does not reach the terminal
    path.write_bytes(b"#!AMR\n")
    with pytest.raises(AudioError, match="AMR") as caught:
        read_audio(path)
    assert str(caught.value).isprintable()


def test_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")
    refused("/dev/zero", "not a regular file")
    refused(tmp_path, "a folder", ffmpeg=False)


def wav_that_promises(n_bytes, samples):
    number = lambda value, size=4: (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return (b"RIFF" + number(n_bytes + 36) + b"WAVEfmt " + number(16) + number(1, 2) +
            number(1, 2) + number(16000) + number(32000) + number(2, 2) + number(16, 2) +
            b"data" + number(n_bytes) + pcm_of(samples))


def pcm_of(samples):
    return (samples * 32767 * 0.5).astype("<i2").tobytes()


def test_lengths_in_a_wav(tmp_path):
    """What is written into a pipe, the length unknown, is read to its end; a promise is kept."""
    x = noise(SECOND)
    for unknown in (2 ** 32 - 1, 2 ** 31 - 1, 2 ** 31 - 4096, 2 ** 31):
        (tmp_path / "x.wav").write_bytes(wav_that_promises(unknown, x))
        assert len(read_audio(tmp_path / "x.wav")) == SECOND
    for promise in (10 ** 9, 32002, 3 * 10 ** 9, 40000):
        (tmp_path / "x.wav").write_bytes(wav_that_promises(promise, x))
        refused(tmp_path / "x.wav", "cut off")
    for too_little in (3200, 3201, 20000):
        (tmp_path / "x.wav").write_bytes(wav_that_promises(too_little, x))
        refused(tmp_path / "x.wav", "goes on after the sound that its header states")
        assert serialize.sound_seconds(tmp_path / "x.wav") is None
    whole = wav_that_promises(32000, x)     # what stands behind the sound is none, if it is short
    for behind in (bytes(500), b"\xff\xfe\x01\x02" * 500, b"LIST\4\0\0\0INFO"):
        (tmp_path / "x.wav").write_bytes(whole + behind)
        assert len(read_audio(tmp_path / "x.wav")) == SECOND


def test_lengths_in_a_flac(tmp_path):
    """36 bits before the checksum count the samples; 0: unknown, as ffmpeg writes into a pipe."""
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(SECOND * 3) * 0.5, 16000)
    whole, data = read_audio(path), bytearray(path.read_bytes())
    assert int.from_bytes(data[21:26], "big") & (1 << 36) - 1 == SECOND * 3

    def state(samples):
        data[21:26] = (data[21] >> 4 << 36 | samples).to_bytes(5, "big")
        path.write_bytes(data)
    state(0)
    assert np.array_equal(read_audio(path), whole)
    assert np.array_equal(read_audio(path, 2.0, 0.5), whole[32000:40000])
    path.write_bytes(data[:len(data) * 2 // 3])
    refused(path, "cut off or damaged after 1.00 s")
    for samples in (2 ** 31, 2 ** 36 - 1):
        state(samples)
        refused(path, f"promises {samples} samples")
    state(SECOND * 4)
    refused(path, "cut off")


def test_rates_and_channels(tmp_path):
    for rate in (2, 3_000_000, 2 ** 31 - 1):
        soundfile.write(tmp_path / "x.wav", noise(8000) * 0.5, rate)
        refused(tmp_path / "x.wav", f"{rate} samples a second")
    soundfile.write(tmp_path / "x.wav", np.tile(noise(800)[:, None], 100) * 0.5, 16000)
    refused(tmp_path / "x.wav", "100 channels")


def mp3(folder, mode):
    """(the Info frame, the frames of sound) of an MP3 of 6 s, the last four of which are silent."""
    samples = np.concatenate([noise(SECOND * 2) * 0.5, np.zeros(SECOND * 4, np.float32)])
    soundfile.write(folder / "plain.mp3", samples, 16000, bitrate_mode=mode, compression_level=0.5)
    data = (folder / "plain.mp3").read_bytes()
    kbps = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160][data[2] >> 4]
    length = 72 * kbps * 1000 // 16000 + (data[2] >> 1 & 1)  # of the first frame, MPEG-2
    assert data[length] == 0xff and (b"Info" in data[:length] or b"Xing" in data[:length])
    return data[:length], data[length:]


def test_mp3(tmp_path):
    """The Info frame is believed if its bytes are there; without one, all bytes must be reached."""
    path, picture = tmp_path / "x.mp3", b"ID3\4\0\0\0\2\0\0" + b"\xff\xfb" * 16384
    for mode in ("CONSTANT", "VARIABLE"):
        info, sound = mp3(tmp_path, mode)
        for data in (info + sound, picture + info + sound, info + sound + b"TAG" + bytes(125)):
            path.write_bytes(data)
            assert len(read_audio(path)) == 6 * SECOND
        for data in (info + sound[:len(sound) * 2 // 3], info + sound + sound[:9999],
                     (info + sound) * 2, (info + sound + b"TAG" + bytes(125)) * 2):
            path.write_bytes(data)
            refused(path, "cut off or joined: its Info frame states")
    # `sound` has a variable rate now: its first frames are long, and the library's guess is short.
    path.write_bytes(sound)
    refused(path, "that libsndfile does not reach")
    refused(path, "that libsndfile does not reach", start=4, duration=1)
    info, sound = mp3(tmp_path, "CONSTANT")
    for data in (sound, picture + sound, sound + b"TAG" + bytes(125)):
        path.write_bytes(data)
        assert 6 <= len(read_audio(path)) / SECOND < 6.2


@pytest.mark.skipif(not CASES.is_dir(), reason=f"needs the files of {CASES}")
def test_cases():
    for name, seconds in [("flac_length_unknown.flac", 3), ("gsm610.wav", 2),
                          ("cbr_cover_picture_3s.mp3", 3.096)]:
        assert len(read_audio(CASES / name)) == round(seconds * SECOND)
    for name, message in [("vbr_no_xing_6s.mp3", "does not reach"),
                          ("two_mp3_3s_and_3s.mp3", "joined"),
                          ("cut_at_two_thirds.au", "cut off"),
                          ("cut_at_two_thirds.aiff", "cut off"),
                          ("bad_flac_MemoryError_3431.bin", "promises"),
                          ("bad_caf_TO_1245.bin", "2 samples a second")]:
        refused(CASES / name, message)


@pytest.mark.parametrize("kind", ["aiff", "caf", "flac", "mp3", "wav", "au", "ogg"])
def test_damaged_headers(tmp_path, kind):
    """A byte of the header changed to anything: sound of about its length, or AudioError."""
    rng, counts = np.random.default_rng(0), {"read": 0, "refused": 0}
    path = tmp_path / f"x.{kind}"
    soundfile.write(path, noise(SECOND) * 0.5, 16000)
    data = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.integers(0, 100)] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert len(read_audio(path)) < 5 * SECOND
            counts["read"] += 1
        except AudioError as error:
            assert str(path) in str(error)
            counts["refused"] += 1
    assert counts["refused"] > 5
    assert counts["read"] > 5 or kind == "ogg"  # whose pages have checksums


# ---- Samples handed over ------------------------------------------------------------------------

def test_samples_of_other_types():
    """int16 is scaled, the same sound gives the same words; other integers have no known scale."""
    samples = (noise(SECOND) * 20000).astype(np.int16)

    def heard(samples):
        streamer = Streamer(lively(), TOKENIZER, limits=LIMITS)
        words = streamer.accept(samples) + streamer.flush()
        return streamer.search.score, [(word.stream, word.text) for word in words]
    exact = heard(samples / np.float32(32768))
    assert heard(samples) == exact == heard(samples / 32768.0) and len(exact[1]) > 3
    assert heard(samples.astype(np.float32) / 20000) != exact
    streamer = Streamer(lively(), TOKENIZER)
    for kind in (np.uint8, np.int8, np.uint16, np.int32, np.int64, bool, complex, str):
        with pytest.raises(ValueError, match="float in -1..1, or int16, not"):
            streamer.accept(samples[:10].astype(kind))
    assert streamer.received == 0


def test_the_callers_buffer_may_be_used_again():
    """As audio callbacks do: what waits for its chunk to be full is a copy."""
    samples = noise(SECOND)
    once, again = (Streamer(lively(), TOKENIZER, limits=LIMITS) for _ in range(2))
    words, buffer = [once.accept(samples), []], np.zeros(1000, np.float32)
    for start in range(0, SECOND, 1000):
        buffer[:] = samples[start:start + 1000]
        words[1] += again.accept(buffer)
        buffer[:] = 9.0
    assert once.search.score == again.search.score and len(words[0]) == len(words[1]) > 3


def test_bad_samples_are_refused():
    streamer = Streamer(lively(), TOKENIZER, limits=LIMITS)
    for bad in (np.array([0.1, np.nan]), np.zeros((2, 2)), np.array([np.inf])):
        with pytest.raises(ValueError, match="finite numbers in one dimension"):
            streamer.accept(bad)
    with pytest.raises(ValueError, match="in -1..1, not 20000"):
        streamer.accept(np.array([0.0, -20000.0]))
    with pytest.raises(ValueError, match="eval"):
        Streamer(copy.deepcopy(lively()).train(), TOKENIZER)
    streamer.flush()
    with pytest.raises(ValueError, match="was flushed"):
        streamer.accept(np.zeros(1))
    with pytest.raises(ValueError, match="tokens"):
        Streamer(lively(), Tokenizer(["<asr>"]))


# ---- The command --------------------------------------------------------------------------------

def test_refused_before_or_after_the_words(folder, capsys, monkeypatch, tmp_path):
    """What the header shows is told at once; what the end tells, after the words."""
    x = np.tile(noise(SECOND * 2) * 0.5, 3)
    soundfile.write(tmp_path / "cut.wav", x, 16000)
    soundfile.write(tmp_path / "cut.flac", x, 16000)
    for name, some in (("cut.wav", False), ("cut.flac", True)):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:len(data) * 2 // 3])
        code, out, err = captions(folder, capsys, monkeypatch, str(tmp_path / name))
        told = [line for line in err.splitlines() if "frames cut off" not in line]  # random weights
        assert code == 2 and bool(out) == some and len(told) == 1 and name in told[0]
    assert float(out.splitlines()[-1].split()[0]) == 3.0  # the flush, after the last whole block


def test_standard_input(folder, capsys, monkeypatch):
    """PCM is read as it comes; a file of sound is named; nothing or silence is exit code 2."""
    for data, count in ((b"", 0), (b"\x01", 0), (bytes(2000), 1000), (bytes(7), 3)):
        code, out, err = captions(folder, capsys, monkeypatch, "-", data=data)
        assert code == 2 and f"no sound, {count} samples" in err
    assert captions(folder, capsys, monkeypatch, "-", data=pcm(folder)[:8])[0] == 0
    for kind in ("WAV", "FLAC", "OGG", "AIFF", "CAF", "AU", "RF64", "MP3", "W64"):
        file = io.BytesIO()
        soundfile.write(file, noise(SECOND) * 0.5, 16000, format=kind)
        code, out, err = captions(folder, capsys, monkeypatch, "-", data=file.getvalue())
        assert code == 2 and not out and err.count("\n") == 1 and FFMPEG.format("-") in err
        assert kind.replace("RF64", "WAV").lower() in err.lower()
    # MP3 and AAC that are taken up in their middle, as from a radio station, begin with any frame.
    aac = b"".join(b"\xff\xf1\x50\x80" + bytes([size >> 3, (size & 7) << 5]) + b"\x55" * (size - 6)
                   for size in (300, 401, 280))
    for kind, sound in (("MP3", mp3(folder, "CONSTANT")[1]), ("MP3", mp3(folder, "VARIABLE")[1]),
                        ("AAC", aac)):
        code, out, err = captions(folder, capsys, monkeypatch, "-", data=sound)
        assert code == 2 and not out and f"standard input: {kind}, not 16-bit PCM" in err
        assert stream.framed(sound) == kind and not stream.framed(sound[1:])
        # PCM may begin with such bytes: then no other frame stands where the first would end.
        quiet = sound[:6] + pcm(folder)
        assert not stream.framed(quiet)
        assert captions(folder, capsys, monkeypatch, "-", data=quiet)[0] == 0


def test_closed_ends(folder):
    for end, message in (("<&-", "standard input is closed"), (">&-", "standard output is closed")):
        command = f"{sys.executable} {ROOT / 'stream.py'} {folder / 'model.pt'} - {end}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, input="")
        assert done.returncode == 2 and done.stderr == f"stream.py: {message}\n"


def test_closed_standard_error_and_a_full_disk(folder):
    """Messages go nowhere then, and not among the captions; what could not be written is told
    once."""
    model, sound = folder / "model.pt", folder / "2.wav"

    def shell(command):
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    python = sys.executable
    given = shell(f"{python} stream.py {model} {sound} --json --eval x")
    assert given.returncode == 2 and given.stderr
    quiet = shell(f"{python} stream.py {model} --eval {folder / 'set.jsonl'} 2>&-")
    assert quiet.returncode == 0 and "wer" in quiet.stdout and "skipped" not in quiet.stdout
    for command in (f"stream.py {model} {sound}", "serialize.py", "align.py", "model.py"):
        full = shell(f"{python} {command} > /dev/full")
        assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
        assert "No space left" in full.stderr
    for command in (f"serialize.py {folder / 'set.jsonl'}", f"align.py {folder / 'set.jsonl'}"):
        closed = shell(f"{python} {command} >&-")
        said = f"{command.partition(' ')[0]}: standard output is closed\n"
        assert (closed.returncode, closed.stderr) == (2, said)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_a_piece_begins_at_its_second_at_any_rate(tmp_path, rate):
    soundfile.write(tmp_path / "ramp.wav", np.linspace(.1, .9, 2 * rate), rate)
    piece = read_audio(tmp_path / "ramp.wav", 0.5, 1.0)
    assert len(piece) == SECOND
    assert piece[SECOND // 2] == pytest.approx(0.5, abs=1e-2)      # at 1.0 s


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_resampling_keeps_what_lies_just_below_the_new_rates_half(rate):
    tone = np.sin(2 * np.pi * 6800 * np.arange(rate) / rate).astype(np.float32)
    exact = np.sin(2 * np.pi * 6800 * np.arange(16000) / 16000)
    assert np.abs(resample(tone, rate, 16000) - exact)[200:-200].max() < 1e-2


def test_an_ape_tag_is_no_sound():
    def ends(flags):
        numbers = (2000, 5032, 1, flags)                           # version, bytes, items
        return b"APETAGEX" + b"".join(n.to_bytes(4, "little") for n in numbers) + bytes(8)
    for tag in (ends(1 << 31) + bytes(5000) + ends(1 << 31), bytes(5000) + ends(0)):
        for behind in (b"", b"TAG" + bytes(125)):
            data = bytes(1000) + tag + behind
            assert stream.between_tags(io.BytesIO(data), len(data)) == (0, 1000)


def test_more_than_a_tenth_at_full_scale_is_clipped(tmp_path):
    for every, refuse in ((7, True), (20, False)):
        x = np.where(np.arange(SECOND) % every == 0, 1.0, 0.1 * noise(SECOND))
        soundfile.write(tmp_path / "x.wav", x, 16000, subtype="FLOAT")
        if refuse:
            refused(tmp_path / "x.wav", "clipped, 14% of the samples", ffmpeg=False)
        else:
            assert len(read_audio(tmp_path / "x.wav")) == SECOND


def test_the_command_loads_the_model_where_it_is_told(folder, capsys):
    command = [str(folder / "model.pt"), str(folder / "2.wav"), "--device"]
    assert stream.main([*command, "nonsense"]) == 2
    assert "cannot be loaded on device nonsense" in capsys.readouterr().err
    assert stream.main([*command, "cpu"]) == 0


def test_a_duration_may_be_rounded_by_fifty_ms(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(SECOND) * 0.5, 16000)
    assert len(read_audio(tmp_path / "x.wav", 0.5, 0.54)) == 8000
    assert len(read_audio(tmp_path / "x.wav", 0, 1.05)) == SECOND
    refused(tmp_path / "x.wav", "1.00 s long, not 0.56 s from 0.5 s on", ffmpeg=False, start=0.5,
            duration=0.56)


def test_stream_alone_names_what_it_needs(tmp_path):
    (tmp_path / "stream.py").write_bytes((ROOT / "stream.py").read_bytes())
    for present, lacking in (([], "model"), (["model"], "serialize")):
        for name in present:
            (tmp_path / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
        done = subprocess.run([sys.executable, "stream.py"], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 2
        assert done.stderr == f"stream.py: {lacking}.py must lie beside it\n"


def test_a_model_that_computes_no_numbers_says_so(folder, tmp_path, capsys):
    model, tokenizer, beside = load_run(folder / "model.pt")
    with torch.no_grad():
        model.encoder.std.fill_(1e-38)                         # finite, above 0, and useless
    save(tmp_path / "model.pt", model, **beside)
    assert stream.main([str(tmp_path / "model.pt"), str(folder / "2.wav")]) == 2
    assert "computes what is no number" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("tail", None), ("blank_penalty", "x"),
                                         ("streams", ["<st:xx>"]), ("streams", [[1]])])
def test_options_beside_the_weights_that_are_none(folder, tmp_path, name, value):
    model, tokenizer, beside = load_run(folder / "model.pt")
    save(tmp_path / "model.pt", model, **beside | {name: value})
    said = "model.pt: a damaged checkpoint, " + name.replace("_", " ") * (value != [[1]])
    with pytest.raises(InputError, match=said):
        load_run(tmp_path / "model.pt")


def test_one_long_row_does_not_end_an_evaluation(folder, capsys, monkeypatch):
    monkeypatch.setattr(stream, "LONGEST_WHOLE_S", 2)
    how = ["--eval", str(folder / "set.jsonl")]
    assert stream.main([str(folder / "model.pt"), *how, "--chunk", "0"]) == 0
    out, err = capsys.readouterr()
    assert "set.jsonl:3: skipped: 2 s of sound, with chunk 0 at most 2" in err
    assert "utterances" in out


def test_figures_are_shown_before_logs_are_written(folder, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "metrics.json")
    monkeypatch.setattr(stream, "write_logs", full)
    assert stream.main([str(folder / "model.pt"), "--eval", str(folder / "set.jsonl"), "--log",
                        str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "wer" in out and "No space left" in err


def test_subtitles_do_not_overwrite_the_model(folder, capsys):
    before = (folder / "model.pt").read_bytes()
    (folder / "x.asr.srt").unlink(missing_ok=True)
    os.symlink(folder / "model.pt", folder / "x.asr.srt")
    assert stream.main([str(folder / "model.pt"), str(folder / "2.wav"), "--srt",
                        str(folder / "x.srt")]) == 2
    assert "would overwrite the model" in capsys.readouterr().err
    assert (folder / "model.pt").read_bytes() == before
    (folder / "x.asr.srt").unlink()


@pytest.mark.parametrize("name, wanted", [
    ("Recording at 3.04\u202fPM.mov", "'Recording at 3.04\u202fPM.mov'"),
    ("12:30 talk.m4a", "'file:12:30 talk.m4a'"), ("-i.mp4", "file:-i.mp4"),
    ("it's\n\x1b[2J\u202e.mp4", r"$'it\'s\U0000000a\U0000001b[2J\U0000202e.mp4'"),
    ("caf\udce9\\.m4a", r"$'caf\xe9\\.m4a'")])
def test_the_command_that_is_offered_names_the_file(tmp_path, monkeypatch, name, wanted):
    """bash gives it the name, ffmpeg takes that for a file's."""
    monkeypatch.chdir(tmp_path)
    with open(os.fsencode(name), "wb") as file:
        file.write(b"\0\0\0\x20ftypM4A ")
    with pytest.raises(AudioError) as caught:
        read_audio(name)
    text = str(caught.value)
    assert f"ffmpeg -loglevel error -i {wanted} -f" in text and "\x1b" not in text
    assert text.count("\n") == 0 and all(map(stream.shows, text))
    if shutil.which("bash"):
        said = subprocess.run(["bash", "-c", f"printf %s {wanted}"], capture_output=True,
                              env=os.environ | {"LC_ALL": "C.UTF-8"}).stdout
        assert said.removeprefix(b"file:") == os.fsencode(name)


def test_a_stub_of_an_ape_tag_is_no_sound(tmp_path):
    for size in (8, 23, 31):
        (tmp_path / "a.mp3").write_bytes(b"APETAGEX".ljust(size, b"\0"))
        refused(tmp_path / "a.mp3", "no format of sound")


@pytest.mark.parametrize("first", [-3585, -1793, -1537, -3841])
def test_samples_that_begin_as_an_aac_header_without_a_length_are_samples(first):
    assert stream.framed(np.array([first] + 99 * [0], "<i2").tobytes()) is None


@pytest.mark.parametrize("arguments, message", [
    (["--log", ""], "log is empty"), (["--srt", ""], "srt is empty"),
    (["--pause", "0.3"], "--pause go with one recording"),
    (["--chunk", "1" + 400 * "0"], "chunk 1000"),
    (["--blank-penalty", "1e6"], "blank penalty 1000000.0")])
def test_options_that_would_do_nothing_or_too_much_are_told(folder, capsys, arguments, message):
    try:
        code = stream.main([str(folder / "model.pt"), "--eval", str(folder / "set.jsonl"),
                            *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_model_that_is_an_empty_name(capsys):
    with pytest.raises(SystemExit):
        stream.main(["", "talk.wav"])
    assert "checkpoint is empty" in capsys.readouterr().err


def test_subtitles_do_not_overwrite_what_is_piped_in(folder, tmp_path):
    raw, samples = tmp_path / "talk.pcm", pcm(folder)
    raw.write_bytes(samples)
    with open(raw, "rb") as file:
        done = subprocess.run([sys.executable, ROOT / "stream.py", folder / "model.pt", "-",
                               "--srt", tmp_path / "x.srt", "--vtt", raw], stdin=file,
                              capture_output=True, text=True)
    assert raw.read_bytes() == samples and done.returncode == 0, done.stderr
    assert (tmp_path / "talk.asr.pcm").exists()                # of two streams: other names
    planned = stream.planned_tracks        # of one stream alone: the name is as given
    options = stream.arguments().parse_args(["m.pt", "-", "--srt", str(raw)])
    with open(raw, "rb") as file:
        kept = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            with pytest.raises(InputError, match="would overwrite the recording"):
                planned(options, ["<asr>"])
        finally:
            os.dup2(kept, 0)
            os.close(kept)
    with pytest.raises(InputError, match="there already, and no subtitles"):
        planned(options, ["<asr>"])


def test_two_streams_do_not_share_a_folder_of_logs(folder, tmp_path, capsys):
    model, tokenizer, _ = load_run(folder / "model.pt")
    options = stream.arguments().parse_args(
        ["m.pt", "--eval", str(folder / "set.jsonl"), "--log", str(tmp_path / "log")])
    tokenizer.tags = ("<asr>", "<st:pt.BR>", "<st:pt-BR>")
    with pytest.raises(InputError, match="<st:pt.BR> and <st:pt-BR> would share .* st-pt-BR"):
        stream.evaluation(model, tokenizer, options, {"chunk": 16}, tokenizer.tags)


def test_ctrl_c_before_the_first_sound(folder, monkeypatch):
    """Of a file, 130; of standard input, the usual end."""
    def interrupted(*_):
        raise KeyboardInterrupt
        yield
    monkeypatch.setattr(stream, "packets", interrupted)
    assert stream.main([str(folder / "model.pt"), str(folder / "1.wav")]) == 130
    assert stream.main([str(folder / "model.pt"), "-"]) == 0


def test_a_beam_has_a_bound(folder, capsys):
    assert stream.main([str(folder / "model.pt"), str(folder / "2.wav"), "--beam", "100000"]) == 2
    assert "beam 100000 must be from 1 to 256" in capsys.readouterr().err


def test_readable(tmp_path, capsys):
    """Bad rows are named and left out; strict, the first is an error; no good row is one too."""
    soundfile.write(tmp_path / "good.wav", noise(SECOND) * 0.5, 16000)
    rows = [Row(id=str(k), audio=str(tmp_path / name), asr="la") for k, name in
            enumerate(["good.wav", "gone.wav", "good.wav"])]
    for row in rows:
        row.where = f"set.jsonl:{row.id}"
    found = list(readable(rows))
    assert [row.id for row, _ in found] == ["0", "2"] and len(found[0][1]) == SECOND
    err = capsys.readouterr().err
    assert "set.jsonl:1: skipped: " in err and "1 of 3 rows skipped" in err
    with pytest.raises(InputError, match="set.jsonl:1: .*gone.wav"):
        list(readable(rows, strict=True))
    with pytest.raises(InputError, match="none of the 1 rows"):
        list(readable(rows[1:2]))


def test_a_row_is_a_piece_of_its_file(tmp_path):
    soundfile.write(tmp_path / "ramp.wav", np.linspace(.1, .9, 2 * SECOND), 16000)
    row = Row(id="a", audio=str(tmp_path / "ramp.wav"), start=0.5, duration=1.0, asr="x")
    (_, samples), = readable([row])
    assert len(samples) == SECOND and samples[0] == pytest.approx(0.3, abs=1e-3)


def test_load_run(folder, tmp_path):
    model, tokenizer, beside = load_run(folder / "model.pt")
    assert len(tokenizer) == model.config.vocab and beside["mode"] == "align"
    plain = TOKENIZER.to_dict()
    for k, tokenizer in enumerate([None, {}, 3, {**plain, "merges": 3}, {**plain, "tags": []},
                                   Tokenizer(["<asr>"]).to_dict()]):
        save(tmp_path / f"{k}.pt", model, tokenizer=tokenizer)
        with pytest.raises(InputError, match=f"{k}.pt: a damaged checkpoint"):
            load_run(tmp_path / f"{k}.pt")
    save(tmp_path / "none.pt", model)
    with pytest.raises(InputError, match="none.pt: a damaged checkpoint"):
        load_run(tmp_path / "none.pt")
    for device in ["nonsense"] + ["cuda"] * (not torch.cuda.is_available()):
        with pytest.raises(InputError, match=f"cannot be loaded on device {device}"):
            load_run(folder / "model.pt", device)


# ---- The microphone -----------------------------------------------------------------------------

def sounddevice(script, rate=48000, input_device=True):
    """A stand-in for the module. Each time the device is asked whether it is active, the next entry
    of the script happens: a list of (samples, overflow) comes in, or nothing does (None)."""
    module = types.ModuleType("sounddevice")
    module.PortAudioError = type("PortAudioError", (Exception,), {})
    module.opened = []
    buffer = np.zeros((1 << 16, 1), np.float32)  # PortAudio uses its memory again after each call

    class InputStream:
        def __init__(self, *, samplerate, channels, dtype, callback):
            assert samplerate == rate and channels == 1 and dtype == "float32"
            self.script, self.callback = iter(script), callback
            module.opened.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.closed = True

        @property
        def active(self):
            entry = next(self.script, "end")
            for samples, overflow in entry if isinstance(entry, list) else []:
                buffer[:len(samples), 0] = samples
                self.callback(buffer[:len(samples)], len(samples), None,
                              types.SimpleNamespace(input_overflow=overflow))
            return entry != "end"

    def query_devices(kind=None):
        if kind and not input_device:
            raise module.PortAudioError("Error querying device -1")
        devices = "  0 HDMI (0 in, 8 out)\n  1 Dock (0 in, 2 out)"
        return {"default_samplerate": float(rate)} if kind else devices
    module.InputStream, module.query_devices = InputStream, query_devices
    return module


def from_microphone(monkeypatch, capsys, folder, module):
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    monkeypatch.setattr(stream, "STALLED_S", 0.01)
    code = stream.main([str(folder / "model.pt"), "mic"])
    return code, *capsys.readouterr()


def test_microphone(folder, capsys, monkeypatch):
    """At its own rate, in packets of 10 ms, late ones together: the words of resampled sound."""
    sound = np.repeat(soundfile.read(folder / "2.wav", dtype="float32")[0], 3)  # at 48 kHz
    packets = [(sound[k:k + 480], False) for k in range(0, len(sound), 480)]
    script = [packets[:1], packets[1:2], None, packets[2:5]]
    script += [packets[k:k + 2] for k in range(5, len(packets), 2)]
    module = sounddevice(script)
    code, out, err = from_microphone(monkeypatch, capsys, folder, module)
    told = [line for line in err.splitlines() if "frames cut off" not in line]  # random weights
    assert told[:2] == ["listening at 48000 Hz, until Ctrl-C", "mic: nothing has come for 0.01 s"]
    assert code == 2 and told[2:] == ["stream.py: mic: the device has stopped"]
    assert module.opened[0].closed
    resampler, streamer = Resampler(48000), Streamer(*load_run(folder / "model.pt")[:2])
    pieces = [resampler.feed(samples) for samples, _ in packets]  # the filter's tail is not to come
    words = [word for piece in pieces for word in streamer.accept(piece)] + streamer.flush()
    shown = [word for line in out.splitlines() for word in line.split()[3:]]
    assert sorted(shown) == sorted(word.text for word in words) and len(words) > 5


def test_microphone_in_trouble(folder, capsys, monkeypatch):
    """Lost sound and seconds of exact zeros are told, once a time, and survived."""
    sound, zeros = noise(4800) * 0.5, np.zeros(400, np.float32)
    packets = [(sound, False), (zeros, False), (zeros, False), (zeros, False), (sound, True),
               (zeros, False), (zeros, False)]
    script = [[packet] for packet in packets]
    code, out, err = from_microphone(monkeypatch, capsys, folder, sounddevice(script, 44100))
    told = [line for line in err.splitlines() if "frames cut off" not in line]  # random weights
    assert code == 2 and told == [
        "listening at 44100 Hz, until Ctrl-C",
        "mic: nothing but zeros for 0.01 s: muted, or not allowed to listen?",
        "mic: some sound was lost, the computer is too slow",
        "mic: nothing but zeros for 0.01 s: muted, or not allowed to listen?",
        "stream.py: mic: the device has stopped"]


def test_a_model_too_slow_for_the_microphone_is_told(folder, capsys, monkeypatch):
    monkeypatch.setattr(stream, "LATE_S", 0.02)
    packet = noise(480) * 0.5, False
    for script, times in (([[packet] * 8], 1), ([[packet] * 8, *[[]] * 7, [packet] * 8], 2),
                          ([[packet]] * 3, 0)):
        _, _, err = from_microphone(monkeypatch, capsys, folder, sounddevice(script))
        assert err.count("too slow for this model") == times


def test_captions_that_come_too_late_go_on_with_what_is_said_now(folder, capsys, monkeypatch):
    """Of twenty packets of 10 ms that wait, the first is heard, then those after them."""
    monkeypatch.setattr(stream, "TOO_LATE_S", 0.1)
    heard, accept = [], Streamer.accept
    monkeypatch.setattr(Streamer, "accept", lambda self, packet: heard.append(
        len(packet)) or accept(self, packet))
    packet = noise(480) * 0.5, False
    _, _, err = from_microphone(monkeypatch, capsys, folder, sounddevice([[packet] * 21, [packet]]))
    assert "mic: 0.2 s of sound left out, to be on time again" in err
    assert 1 <= len([n for n in heard if n]) <= 2 and sum(heard) <= 2 * 160


def test_a_microphone_that_gives_nothing_is_told_once(folder, capsys, monkeypatch):
    packet = noise(480) * 0.5, False
    script = [[packet], None, None, None, [packet], None, None, [packet]]
    _, _, err = from_microphone(monkeypatch, capsys, folder, sounddevice(script))
    assert err.count("nothing has come") == 2


def test_sound_that_waits_when_the_microphone_is_stopped_is_told(folder, capsys, monkeypatch):
    """Eight packets of 10 ms come at once, Ctrl-C while the first is computed."""
    monkeypatch.setattr(stream, "UNHEARD_S", 0.05)

    def interrupted(self, packet):
        raise KeyboardInterrupt
    monkeypatch.setattr(Streamer, "accept", interrupted)
    script = [[(noise(480) * 0.5, False)] * 8]
    code, _, err = from_microphone(monkeypatch, capsys, folder, sounddevice(script))
    assert code == 0 and "mic: the last 0.1 s were not captioned any more" in err


def test_no_microphone(folder, capsys, monkeypatch):
    """Without package or device: one line that says what to install, what there is, other ways."""
    code, out, err = from_microphone(monkeypatch, capsys, folder, None)  # None: import fails
    assert code == 2 and not out and err.count("\n") == 1 and "pip install sounddevice" in err
    assert "arecord -q -f S16_LE -c 1 -r 16000 | python stream.py MODEL -" in err
    assert FFMPEG.replace("-i {}", "-f alsa -i default") in err
    module = sounddevice([], input_device=False)
    code, out, err = from_microphone(monkeypatch, capsys, folder, module)
    assert code == 2 and not out and err.count("\n") == 1 and "Error querying device" in err
    assert "0 HDMI (0 in, 8 out);   1 Dock" in err and "arecord" in err


def test_a_disk_that_fails_is_told_by_its_own_words(tmp_path, monkeypatch, capfd):
    """libsndfile reads by calling back, where an exception would be printed and lost."""
    soundfile.write(tmp_path / "a.wav", noise(160000), 16000)
    reads = iter(range(1000))

    class Failing(io.FileIO):
        def readinto(self, buffer):
            if next(reads) >= 4:
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)
    monkeypatch.setattr(stream.io, "FileIO", Failing)
    with pytest.raises(stream.AudioError, match="a.wav: Input/output error"):
        stream.read_audio(tmp_path / "a.wav")
    assert "Traceback" not in capfd.readouterr().err


def test_clipping_of_16_bits_ends_at_32767(tmp_path):
    """Which is read as 0.99997. 2286 of 16000 samples."""
    x = np.where(np.arange(SECOND) % 7 == 0, 32767, 3000 * noise(SECOND)).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", x, 16000)
    refused(tmp_path / "x.wav", "clipped, 14% of the samples", ffmpeg=False)


def test_an_mp3_of_44_khz_is_known_by_its_frames(folder, capsys, monkeypatch):
    """128000 1152 / 44100 / 8 = 417 bytes each."""
    sound = (b"\xff\xfb\x90\x00" + bytes(413)) * 4
    assert stream.frame_of(sound) == ("MP3", 417)
    assert stream.frame_of(b"\xff\xfb\x92\x00\0\0") == ("MP3", 418)          # padded
    code, out, err = captions(folder, capsys, monkeypatch, "-", data=sound)
    assert code == 2 and not out and "standard input: MP3, not 16-bit PCM" in err


@pytest.mark.parametrize("rate", [4000, 88200, 96000, 192000])
def test_files_of_any_usual_rate_are_read(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", noise(2 * rate) * 0.5, rate)
    assert len(read_audio(tmp_path / "x.wav")) == 2 * SECOND
