"""Run the experiments of the README again, one name at a time, and print their tables.

    python tests/reproduce.py builtin            de -> en on the built-in corpus, and the same without each ingredient
    python tests/reproduce.py languages          de, es, it -> en and en -> de, es, it
    python tests/reproduce.py mboshi DATA        Mboshi -> French; DATA holds train.jsonl and dev.jsonl
    python tests/reproduce.py search RUN/model.pt   the run's unseen utterances by every beam and chunk size
    python tests/reproduce.py sound RUN/model.pt    its unseen utterances as telephones, codecs and rooms give them

A training is `python train.py` with the options printed above it; its folder is runs/reproduce/NAME.
"""
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

RATE = 16000

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {
    "builtin": {"all ingredients": [], "no CTC start": ["--warm-steps", "0"], "whole words": ["--merges", "1000"],
                "single clean utterances": ["--join", "1", "--no-augment"]},
    "languages": {"de,es,it -> en": ["--corpus", "de,es,it-en"], "en -> de,es,it": ["--corpus", "en-de,es,it"]},
    "mboshi": {"Mboshi -> French": ["DATA/train.jsonl", "--dev", "DATA/dev.jsonl"]},
}


def run(name, options):
    folder = ROOT / "runs" / "reproduce" / name.replace(" ", "_").replace(">", "").replace(",", "_")
    command = [sys.executable, str(ROOT / "train.py"), *options, "--out", str(folder)]
    print("+", " ".join(["python train.py", *options]), flush=True)
    subprocess.run(command, check=True)
    return json.loads((folder / "metrics.json").read_text())[-1]


def show(name, steps, streams, more=""):
    for tag, m in streams.items():
        scores = [m["wer"], m["cer"], m["bleu"], m["chrf"], m["laal_ms"]]
        print(f"{name:24} {steps:6}  {tag:14}", *("     -" if x is None else f"{x:6.1f}" for x in scores), "ms", more,
              flush=True)


def search(path):
    """Beams 1 to 8 at the chunk size that the model prefers, and the other chunk sizes. The score of an utterance is
    the log-probability of what was written: of one path for beam 1, of all paths that were met for larger ones."""
    import train
    from stream import evaluate, load_run, readable
    from serialize import read_manifest
    model, tokenizer, beside = load_run(path)
    options = train.resumed_options({"resume": path, "steps": beside["step"] + 1})
    if options.manifest and not options.dev:
        sys.exit(f"{path}: its run had no development set (--dev)")
    if options.manifest:
        dev = list(readable(read_manifest(options.dev)))
    else:
        dev = train.BuiltIn(options.corpus, options.seed).unseen(train.TEST_SIZE)
    chunks = model.config.chunks
    for chunk, beam in [(chunks[0], beam) for beam in (1, 2, 4, 8)] + [(chunk, 1) for chunk in (*chunks[1:], 0)]:
        metrics, records = evaluate(model, tokenizer, dev, chunk=chunk, beam=beam)
        ms = f"{1000 * chunk * model.config.frame_s:.0f} ms" if chunk else "whole utterance"
        score = sum(record["score"] for record in records) / len(records)
        show(f"{ms}, beam {beam}", beside["step"], metrics, f"score {score:.2f}")


# ---- Sound as people have it -----------------------------------------------------------------------------------

def through_file(samples, suffix, *ffmpeg, **soundfile_options):
    """Written to a file of this kind, and read again as a user's file is."""
    import soundfile
    from stream import read_audio, resample
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.wav", Path(folder) / f"target{suffix}"
        samples = samples * (0.5 / np.abs(samples).max())
        if ffmpeg:
            soundfile.write(source, samples, RATE)
            subprocess.run(["ffmpeg", "-loglevel", "error", "-i", source, *ffmpeg, target], check=True)
        else:
            soundfile.write(target, resample(samples, RATE, 8000), 8000, **soundfile_options)
        return read_audio(str(target))


def noisy(samples, noise, ratio_db=10):
    scale = np.sqrt(np.mean(samples ** 2) / np.mean(noise ** 2) / 10 ** (ratio_db / 10))
    return (samples + scale * noise).astype(np.float32)


def pink(n, rng):
    spectrum = np.fft.rfft(rng.standard_normal(n))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), n)


def babble(n, voices, rng):
    chosen = [voices[k] for k in rng.integers(len(voices), size=5)]
    return sum(np.resize(np.roll(v, rng.integers(len(v))), n) / np.sqrt(np.mean(v ** 2)) for v in chosen)


def joined(items, pause_s, rng):
    """Many rows as one: their sound with pauses between, their texts one after the other."""
    parts = [part for _, samples in items for part in (samples, np.zeros(round(pause_s * RATE), np.float32))]
    row = items[0][0]
    st = {lang: " ".join(other.st[lang] for other, _ in items) for lang in row.st}
    return replace(row, asr=" ".join(other.asr for other, _ in items), st=st), np.concatenate(parts)


def conditions(items):
    rng = np.random.default_rng(0)
    each = lambda change: [(row, change(samples)) for row, samples in items]
    voices = [samples for _, samples in items]
    yield "clean", items
    yield "WAV, 8 kHz", each(lambda x: through_file(x, ".wav"))
    yield "mu-law, 8 kHz", each(lambda x: through_file(x, ".wav", subtype="ULAW"))
    for codec, suffix in (("libmp3lame", ".mp3"), ("libopus", ".ogg")):
        for kbit in (16, 32, 64):
            yield f"{codec} {kbit} kb/s", each(lambda x: through_file(x, suffix, "-c:a", codec, "-b:a", f"{kbit}k"))
    yield "white noise, 10 dB", each(lambda x: noisy(x, rng.standard_normal(len(x))))
    yield "pink noise, 10 dB", each(lambda x: noisy(x, pink(len(x), rng)))
    yield "five voices, 10 dB", each(lambda x: noisy(x, babble(len(x), voices, rng)))
    yield "5 s of silence before", each(lambda x: np.concatenate([np.zeros(5 * RATE, np.float32), x]))
    yield "ten sentences", [joined(items[k:k + 10], 0.5, rng) for k in range(0, len(items), 10)]
    yield "five minutes", [joined(items, 0.5, rng)]
    yield "noise for sound", each(lambda x: rng.normal(0, 0.05, len(x)).astype(np.float32))


def sound(path, n=60):
    """A table of WER: a row a condition; ffmpeg makes the MP3 and Opus files."""
    import train
    from stream import evaluate, load_run
    model, tokenizer, beside = load_run(path)
    for name, items in conditions(train.BuiltIn("de-en", 0).unseen(n)):
        show(name, beside["step"], evaluate(model, tokenizer, items)[0])


def main(argv):
    sys.path.insert(0, str(ROOT))
    needs_more = argv[:1] in (["mboshi"], ["search"], ["sound"])
    if not argv or argv[0] not in {*EXPERIMENTS, "search", "sound"} or len(argv) != 1 + needs_more:
        sys.exit(__doc__)
    head = f"\n{'run':24} {'steps':>6}  {'stream':14} {'WER':>6} {'CER':>6} {'BLEU':>6} {'chrF':>6} {'LAAL':>8}"
    if argv[0] in ("search", "sound"):
        print(head)
        return (search if argv[0] == "search" else sound)(argv[1])
    results = {name: run(name, [option.replace("DATA", argv[-1]) for option in options])
               for name, options in EXPERIMENTS[argv[0]].items()}
    print(head)
    for name, result in results.items():
        show(name, result["step"], result["streams"])


if __name__ == "__main__":
    main(sys.argv[1:])
