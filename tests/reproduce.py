"""Run the experiments of the README again, one name at a time, and print their tables.

    python tests/reproduce.py builtin               de -> en on the built-in corpus, and the same
                                                    without each ingredient
    python tests/reproduce.py mboshi DATA           Mboshi -> French; DATA holds train.jsonl and
                                                    dev.jsonl
    python tests/reproduce.py further DATA          that run taken on, for more steps
    python tests/reproduce.py papers de-en          the papers' comparison: each stream alone and
                                                    both in every order; papers de-en 2: two seeds
    python tests/reproduce.py orders DATA           the same on real speech; DATA as for mboshi
    python tests/reproduce.py search RUN/model.pt   the run's unseen utterances by every beam and
                                                    chunk size
    python tests/reproduce.py sound RUN/model.pt    its unseen utterances as telephones, codecs and
                                                    rooms give them, after silence, in long streams
    python tests/reproduce.py latency RUN/model.pt  the run trained on, with FastEmit, with the
                                                    delay penalty, and with neither
    python tests/reproduce.py table                 tests/results/README.md from the result files

A training is `python train.py` with the options printed above it; its folder is
runs/reproduce/NAME. One that is done is not done again, one that was stopped goes on, and one that
was made with other options is refused. What was measured goes to tests/results/, from which `table`
makes the tables.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from oneline import told

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
RATE = 16000
LOG_LINES = 200           # of a run's log.csv that a result keeps, at most
EXPERIMENTS = {
    "builtin": {
        "all ingredients": [],
        "the whole lattice": ["--prune", "0"],
        "no CTC start": ["--warm-steps", "0"],
        "whole words": ["--merges", "1000"],
        "single clean utterances": ["--join", "1", "--augment", "0"],
    },
    "mboshi": {"Mboshi -> French": ["DATA/train.jsonl", "--dev", "DATA/dev.jsonl"]},
}
# Many times through 3.8 hours of speech: more of it is disturbed, lest it be learned by heart.
FURTHER = ["--steps", "20000", "--augment", "0.4"]
CHUNKS_MS = 160, 320, 640, 1000, 0                  # 0: the whole utterance
HEAD = (f"\n{'run':24} {'steps':>6}  {'stream':14} {'WER':>6} {'CER':>6} {'BLEU':>6} {'chrF':>6} "
        f"{'LAAL':>8}")


def run(name, options):
    """One training, unless it is done; -> its last metrics, and what is known of it."""
    folder = train_in(folder_name(name), options)
    return json.loads((folder / "metrics.json").read_text())[-1] | known_of(folder)


def folder_name(name):
    return "".join(c if c.isalnum() else "_" for c in name)


def known_of(folder):
    """What done.json says of a run, its options, and its log, thinned."""
    done, options = (json.loads((folder / name).read_text())
                     for name in ("done.json", "options.json"))
    head, *lines = (folder / "log.csv").read_text().splitlines()
    every = max(1, -(-len(lines) // LOG_LINES))
    # Of a path its last two parts: where it lay is nobody's business.
    options = [os.path.join(*Path(option).parts[-2:]) if os.path.isabs(option) else option
               for option in options]
    return done | {"options": options, "log": [head, *lines[::-every][::-1]]}     # with the last


def train_in(name, options):
    """`train.py` with these options in runs/reproduce/NAME, from where it stands -> its folder.
    Options that begin with --resume RUN go on from a copy of that run."""
    from model import load
    folder = ROOT / "runs" / "reproduce" / name
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "options.json"
    begun = (folder / "resume.pt").exists()        # else a command that was refused wrote the note
    known = begun or (folder / "done.json").exists()
    if known and note.exists() and json.loads(note.read_text()) != options:
        sys.exit(f"{folder} was made with other options: move it away, or run it as it was, "
                 f"{' '.join(json.loads(note.read_text()))}")
    write_whole(note, json.dumps(options))
    if (folder / "done.json").exists():
        return folder
    given = ["--resume", str(folder)] if begun else [*options, "--out", str(folder)]
    if options[:1] == ["--resume"]:
        if not begun:
            for file in ("log.csv", "metrics.json", "model.pt", "best.pt"):
                shutil.copy(Path(options[1]) / file, folder)
            shutil.copy(Path(options[1]) / "resume.pt", folder / "resume.new")
            os.replace(folder / "resume.new", folder / "resume.pt")         # now it is begun
        given = ["--resume", str(folder), *options[2:]]
    if left_to_do(folder, options):
        print("+", " ".join(["python train.py", *given]), flush=True)
        with open(folder / "commits.txt", "a") as file:        # of the code that trained it
            file.write(f"{commit()}\n")
        with subprocess.Popen([sys.executable, str(ROOT / "train.py"), *given]) as training:
            try:
                code = training.wait()
            except KeyboardInterrupt:
                code = training.wait()                         # it saves, and stops
        if code == 2:
            sys.exit(f"{folder}: train.py stopped, and says why above")
        if code or left_to_do(folder, options):
            sys.exit(f"{folder}: stopped; the same command goes on")
    beside = load(folder / "resume.pt")[1]
    seconds = None if given[0] == "--resume" else round(time.perf_counter() - began)
    commits = folder / "commits.txt"
    trained_at = commits.read_text().split() if commits.exists() else [commit()]
    done = {"steps": beside["step"], "seconds": seconds,
            "trained_at": ", ".join(dict.fromkeys(trained_at))}
    write_whole(folder / "done.json", json.dumps(done))
    return folder


def left_to_do(folder, given):
    """Whether the run there never began, or has steps or its last evaluation left."""
    import train
    from model import load
    if not (folder / "resume.pt").exists():
        return True
    steps = ["--steps", given[given.index("--steps") + 1]] if "--steps" in given else []
    options = train.parse_options(["--resume", str(folder), *steps])
    beside = load(folder / "resume.pt")[1]
    return beside["step"] < options.steps or train.evaluation_owed(beside["step"], options, folder)


def show(name, steps, streams, more=""):
    for tag, m in streams.items():
        scores = [m["wer"], m["cer"], m["bleu"], m["chrf"], m["laal_ms"]]
        print(f"{name:24} {steps:6}  {tag:14}",
              *("     -" if x is None else f"{x:6.1f}" for x in scores), "ms", more, flush=True)


def write_result(name, result):
    """A small file with what was measured, when, and on what."""
    about = {"date": str(date.today()), "commit": commit(), "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    write_whole(RESULTS / f"{name}.json", json.dumps(about | result, indent=1) + "\n")


def write_trainings(name, rows):
    """The result of trainings that differ in their options, and their last scores on the screen."""
    write_result(name, {"rows": rows})
    print(HEAD)
    for row, found in rows.items():
        show(row, found["step"], found["streams"])


def write_whole(path, text):
    """Or, on a full disk, not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def commit():
    """The commit that is checked out, with a + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"],
                            ["status", "--porcelain", "--untracked-files=no", "*.py"]))
    except OSError:                    # no git here
        head = changed = ""
    return (head or "unknown") + "+" * bool(changed)


def machine():
    import torch
    kind = torch.backends.cpu.get_cpu_capability()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} cores, {kind}, {platform.machine()}, torch {torch.__version__}"


def evaluated(run, items, **how):
    """What stream.evaluate says of a run as load_run gives it, searched as stream.py does, and
    scored in what it has learned."""
    from stream import evaluate, own_search, own_streams
    model, tokenizer, beside = run
    how = own_search(beside) | {"tags": own_streams(beside, tokenizer)} | how
    return evaluate(model, tokenizer, items, **how)


def options_of(path):
    """The options of the run that this model is of."""
    import train
    from model import load
    options = train.parse_options(["--resume", str(path)])
    if options.manifest and not options.dev:
        sys.exit(f"{path}: its run had no development set (--dev)")
    return options


def unseen_of(path, n):
    """(the run's options, the utterances that it did not learn from): its development set, or n of
    the built-in corpus."""
    import train
    from serialize import read_manifest
    from stream import readable
    options = options_of(path)
    if options.manifest:
        rows = read_manifest(options.dev, allow_outside=options.allow_outside)
        return options, list(readable(rows, chunk=0))          # `search` hears them whole, too
    return options, train.BuiltIn(options.corpus, options.seed).unseen(n)


def search(path):
    """Beams of 1 and 4 by every chunk size, those of 2 and 8 by the first that was learned. The
    score of an utterance is the log-probability of what was written: of one path for beam 1, of all
    paths that were met for larger ones."""
    import train
    from stream import load_run
    model, _, beside = made = load_run(path)
    options, dev = unseen_of(path, train.TEST_SIZE)
    print(HEAD)
    chunks, rows = [round(ms / 1000 / model.config.frame_s) for ms in CHUNKS_MS], {}
    pairs = [(chunk, beam) for beam in (1, 4) for chunk in chunks]
    for chunk, beam in pairs + [(model.config.chunks[0], beam) for beam in (2, 8)]:
        metrics, records = evaluated(made, dev, chunk=chunk, beam=beam)
        ms = f"{1000 * chunk * model.config.frame_s:.0f} ms" if chunk else "whole utterance"
        score = sum(record["score"] for record in records) / len(records)
        show(f"{ms}, beam {beam}", beside["step"], metrics, f"score {score:.2f}")
        rows[f"{ms}, beam {beam}"] = {
            tag: {"wer": m["wer"], "laal_ms": m["laal_ms"], "score": score}
            for tag, m in metrics.items()}
    write_result(named("search", options), {"steps": beside["step"], "utterances": len(dev),
                                            "rows": rows})


def further(data):
    """The run of `mboshi`, made first if it is not there, taken on for more steps."""
    data = str(Path(data).resolve())
    (name, options), = EXPERIMENTS["mboshi"].items()
    run(name, [option.replace("DATA", data) for option in options])
    start = ROOT / "runs" / "reproduce" / folder_name(name)
    row = run(f"{name}, taken on", ["--resume", str(start), *FURTHER])
    write_trainings("mboshi-further", {f"{name}, taken on": row})


def named(kind, options):
    """The name of a result file: of the built-in de -> en, the kind alone."""
    if options.manifest:
        return f"{kind}-{Path(options.manifest).parent.name}"
    return kind if options.corpus == "de-en" else f"{kind}-built-in-{options.corpus}"


def latency(path):
    """Three hundred steps more as the run was made, each time from its weights."""
    from stream import load_run
    path = Path(path).resolve()
    steps, options = load_run(path)[2]["step"], options_of(path)
    mark = f"{steps} {zlib.crc32(path.read_bytes()):08x}"      # of another model, other runs
    more = [*as_arguments(options), "--init", str(path), "--steps", "300", "--warm-steps", "0",
            "--eval-every", "300"]
    trained = {"neither": []}
    trained |= {f"{name} {value}": [flag, value]
                for name, flag in (("FastEmit", "--fastemit"), ("delay penalty", "--delay-penalty"))
                for value in ("0.005", "0.01")}
    name_of_run = named("latency", options)
    rows = {name: run(f"{name_of_run} {mark} {name}", more + given)
            for name, given in trained.items()}
    write_trainings(name_of_run, rows)


def as_arguments(options):
    """The command line that gives a new run the options of this one; not what it started from,
    where it lies, how long it is and how it is drawn to write soon."""
    from train import flag
    given, own = [options.manifest] if options.manifest else [], {"manifest", "resume", "init",
        "out", "steps", "warm_steps", "eval_every", "fastemit", "delay_penalty", "device"}
    for name, value in vars(options).items():
        if name in own or value in (None, "", ()) or value is False:
            continue
        given.append(flag(name))
        if value is not True:
            given.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return given


# ---- Sound as people have it ---------------------------------------------------------------------

def through_file(samples, suffix, *ffmpeg, **soundfile_options):
    """Written to a file of this kind, and read again as a user's file is."""
    import soundfile
    from stream import read_audio, resample
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.wav", Path(folder) / f"target{suffix}"
        samples = samples * (0.5 / np.abs(samples).max())
        if ffmpeg:
            soundfile.write(source, samples, RATE)
            subprocess.run(["ffmpeg", "-loglevel", "error", "-i", source, *ffmpeg, target],
                           check=True)
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
    return sum(np.resize(np.roll(v, rng.integers(len(v))), n) / np.sqrt(np.mean(v ** 2))
               for v in chosen)


def joined(items, pause_s, rng):
    """Many rows as one: their sound with pauses between, their texts one after the other."""
    pause = np.zeros(round(pause_s * RATE), np.float32)
    parts = [part for _, samples in items for part in (samples, pause)]
    rows = [row for row, _ in items]
    langs = [lang for lang in rows[0].st if all(row.st.get(lang) for row in rows)]
    st = {lang: " ".join(row.st[lang] for row in rows) for lang in langs}
    asr = " ".join(row.asr for row in rows) if all(row.asr for row in rows) else None
    return replace(rows[0], asr=asr, st=st), np.concatenate(parts)


def conditions(items, more):
    """(name, utterances) of every kind of sound; `more` are joined into the longest stream."""
    rng = np.random.default_rng(0)

    def each(change):
        return [(row, change(samples)) for row, samples in items]
    voices = [samples for _, samples in items]
    yield "clean", items
    yield "WAV, 8 kHz", each(lambda x: through_file(x, ".wav"))
    yield "mu-law, 8 kHz", each(lambda x: through_file(x, ".wav", subtype="ULAW"))
    for codec, suffix in (("libmp3lame", ".mp3"), ("libopus", ".ogg")):
        for kbit in (16, 32, 64):
            how = "-c:a", codec, "-b:a", f"{kbit}k"
            yield f"{codec} {kbit} kb/s", each(lambda x: through_file(x, suffix, *how))
    yield "white noise, 10 dB", each(lambda x: noisy(x, rng.standard_normal(len(x))))
    yield "pink noise, 10 dB", each(lambda x: noisy(x, pink(len(x), rng)))
    yield "five voices, 10 dB", each(lambda x: noisy(x, babble(len(x), voices, rng)))
    silence = np.zeros(5 * RATE, np.float32)
    yield "5 s of silence before", each(lambda x: np.concatenate([silence, x]))
    yield "5 s of silence behind", each(lambda x: np.concatenate([x, silence]))
    timed = [(row, samples[:round(row.times[-1] * RATE)]) for row, samples in items
             if row.times and row.times[-1]]
    if timed:
        yield "cut as the last word ends", timed
    yield "ten sentences", [joined(items[k:k + 10], 0.5, rng) for k in range(0, len(items), 10)]
    long, samples = joined(more, 0.5, rng)
    yield f"{len(samples) / RATE / 60:.1f} minutes", [(long, samples)]
    yield "noise for sound", each(lambda x: rng.normal(0, 0.05, len(x)).astype(np.float32))


def sound(path, n=60, long_s=300):
    """A table of WER: a row a condition; ffmpeg makes the MP3 and Opus files."""
    from stream import load_run
    made, rows = load_run(path), {}
    step = made[2]["step"]
    options, unseen = unseen_of(path, 2 * n)
    # As many as make a stream of five minutes, each with a pause of half a second.
    ends = np.cumsum([len(samples) / RATE + 0.5 for _, samples in unseen])
    more = unseen[:int(np.searchsorted(ends, long_s)) + 1]
    print(HEAD)
    for name, items in conditions(unseen[:n], more):
        streams, _ = evaluated(made, items)
        rows[name] = {tag: {"wer": m["wer"], "laal_ms": m["laal_ms"]}
                      for tag, m in streams.items()}
        show(name, step, streams)
    write_result(named("sound", options), {"steps": step, "utterances": len(unseen[:n]),
                                           "rows": rows})


# ---- The papers' comparison ----------------------------------------------------------------------
# All rows of a table learn from one written manifest, for the same number of steps, with the full
# lattice (a band would favour the orders without bursts), and start from the weights of one
# recogniser, as the papers' do; "ASR" too, which so has learned as long as the others. "ST" alone
# falls into a trap: it guesses the verb, for which it would have to wait, and to keep in mind all
# that it would write after it. "restricted" rows may not write a word before it can be known, so
# they learn to wait. TIME's times come from trained models: of the transcription by Viterbi under
# "ASR", of the translation under "ST restricted".

MAIN = "de,es,it-en"      # the corpus of which all rows are made; of others, those of the claim
TRAINING_ROWS = 6400
TEST_ROWS = 1000
# Steps, and warm steps of these; twice as many of both where a model learns several languages.
FIRST, NEXT = (700, 300), (700, 150)
SHARED = ["--merges", "100", "--label-dropout", "0.1", "--join", "1", "--augment", "0",
          "--prune", "0", "--restrict", "0", "--blank-penalty", "0.5"]
ORDERS = {"INTER 0.0": "ratio:0", "INTER 0.5": "ratio:0.5", "ALIGN": "align", "TIME": "time"}
SCORES = "wer", "cer", "bleu", "chrf", "laal_ms"
NOISES_DB = 30, 25, 20, *range(15, 2, -1)
DRAWS = 1000


def papers(corpus, seeds="1"):
    import train
    made, data = train.BuiltIn(corpus, 0), data_of(corpus)
    if not (data / "manifest.jsonl").exists():
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--corpus", corpus,
                        "--write-corpus", str(data), str(TRAINING_ROWS)], check=True)
    score(corpus, made, [trained(corpus, made, seed) for seed in range(int(seeds))])


def trained(corpus, made, seed):
    """{row of the table: the folder of its run} with this seed."""
    data = data_of(corpus)
    longer = 2 if len(made.sources + made.targets) > 2 else 1
    prefix = f"papers-{corpus}" + (f"-seed{seed}" if seed else "")

    def row(name, manifest, mode, lengths, *more):
        steps, warm_steps = (str(longer * n) for n in lengths)
        return train_in(f"{prefix}-{name}", [
            str(manifest), "--interleave", mode, "--steps", steps, "--warm-steps", warm_steps,
            *SHARED, "--eval-every", steps, "--seed", str(seed), *more])

    manifest = data / "manifest.jsonl"
    start = ["--init", str(row("first", manifest, "asr", FIRST) / "model.pt")]
    restricted = [*start, "--restrict", "0.8"]
    runs = {"ASR": row("asr", manifest, "asr", NEXT, *start)}
    if corpus == MAIN:
        runs["ASR restricted"] = row("asr-restricted", manifest, "asr", NEXT, *restricted)
    for lang in made.targets:
        own = one_translation(manifest, lang) if len(made.targets) > 1 else manifest
        if corpus == MAIN:
            runs[f"ST {lang}"] = row(f"st-{lang}", own, "st", NEXT, *start)
        runs[f"ST {lang} restricted"] = row(f"st-{lang}-restricted", own, "st", NEXT, *restricted)
    for name, mode in ORDERS.items():
        if corpus != MAIN and name.startswith("INTER"):
            continue
        learned = timed(manifest, data, seed, timing(runs)) if mode == "time" else manifest
        runs[name] = row(mode.replace(":", "-"), learned, mode, NEXT, *start)
        if corpus == MAIN and name == "ALIGN":
            runs["ALIGN restricted"] = row("align-restricted", manifest, mode, NEXT, *restricted)
    return runs


def data_of(corpus):
    return ROOT / "runs" / "reproduce" / f"papers-{corpus}-data"


def one_translation(manifest, lang):
    """The manifest with this translation alone."""
    from serialize import read_manifest, write_manifest
    rows = read_manifest(manifest)
    for row in rows:
        row.st, row.links = {lang: row.st[lang]}, {lang: row.links[lang]}
        row.st_times = {lang: row.st_times[lang]} if lang in row.st_times else {}
    path = Path(manifest).with_name(f"{lang}.jsonl")
    write_manifest(path, rows)
    return str(path)


def timing(runs):
    """Those whose times of words TIME learns."""
    return {name: run for name, run in runs.items()
            if name == "ASR" or name.startswith("ST") and name.endswith("restricted")}


def timed(path, folder, seed, runs):
    """The manifest with the times of words as these trained transducers emit them, one after the
    other; it stands in this folder."""
    for name, run in runs.items():
        target = folder / f"timed-{seed}-{name.replace(' ', '-')}.jsonl"
        if outdated(target, path, run / "model.pt"):
            aligned(path, target, "--times", str(run / "model.pt"))
        path = target
    return str(path)


def outdated(target, *sources):
    """Whether a file lacks, or is older than what it was made from."""
    return not target.exists() or any(
        Path(source).stat().st_mtime > target.stat().st_mtime for source in sources)


def aligned(path, target, *more):
    """What align.py makes of a manifest."""
    subprocess.run([sys.executable, str(ROOT / "align.py"), str(path), "-o", str(target),
                    "--allow-outside", *more], check=True)


def score(corpus, made, seeds):
    """Every model on the same unseen utterances, clean and in noise; -> tests/results. `seeds`: of
    each, {row of the table: folder}."""
    from serialize import read_manifest
    from stream import load_run
    models = {name: [load_run(runs[name] / "model.pt") for runs in seeds] for name in seeds[0]}
    items = made.unseen(TEST_ROWS)
    ratio_db = choose_noise(models["ALIGN"][0], made)
    rng = np.random.default_rng(1)
    in_noise = [(row, noisy(x, rng.standard_normal(len(x)), ratio_db)) for row, x in items]
    evidence, foreign = {row.id: evidence_of(row) for row, _ in items}, foreign_words(items)
    print(HEAD)
    rows = {}
    for name, own in models.items():
        done = [known_of(runs[name]) for runs in seeds]
        rows[name] = {**done[0], "seconds": [one["seconds"] for one in done],
                      "trained_at": sorted({one["trained_at"] for one in done}),
                      "parameters": sum(p.numel() for p in own[0][0].parameters())}
        for condition, heard in (("clean", items), ("noise", in_noise)):
            found = []
            for model in own:
                metrics, records = evaluated(model, heard)
                found.append({tag: figures(tag, m, records, evidence, foreign)
                              for tag, m in metrics.items()})
                show(f"{name}, {condition}", done[0]["steps"], metrics)
            rows[name][condition] = {tag: pooled([one[tag] for one in found]) for tag in found[0]}
    data = data_of(corpus)
    moved = moved_by_time(read_manifest(timed(data / "manifest.jsonl", data, 0, timing(seeds[0]))))
    write_result(f"papers-{corpus}", {
        "corpus": corpus, "training_rows": TRAINING_ROWS, "test_rows": TEST_ROWS,
        "noise_db": ratio_db, "seeds": len(seeds), "options": SHARED,
        "words_moved_by_time": moved,
        "differences": differences(rows), "rows": without_counts(rows)})


def moved_by_time(rows):
    """The share of translated words that TIME writes after another number of transcribed words than
    ALIGN does."""
    from serialize import ASR, InputError, interleave
    moved = []
    for row in rows:
        places = []
        for mode in ("align", "time"):
            try:
                pairs = interleave(row, mode)
            except InputError:         # without links or times: training leaves it out, or a text
                break
            before, own = 0, []
            for tag, _ in pairs:
                if tag == ASR:
                    before += 1
                else:
                    own.append((tag, before))
            places.append(sorted(own, key=lambda place: place[0]))    # stable: a stream's order
        if len(places) == 2:
            moved += [a != b for a, b in zip(*places)]
    return float(np.mean(moved))


def choose_noise(model, made):
    """The ratio of speech to white noise at which this model makes 5 % errors, on utterances that
    are not scored."""
    import train
    rng = np.random.default_rng(2)
    others = [(row, train.speak_row(row, made.seed)[0])
              for row in made.rows(1, TEST_ROWS, test=True)[:100]]
    for ratio_db in NOISES_DB:
        heard = [(row, noisy(x, rng.standard_normal(len(x)), ratio_db)) for row, x in others]
        metrics, _ = evaluated(model, heard)
        if min(m["wer"] for m in metrics.values()) >= 5:
            return ratio_db
    return NOISES_DB[-1]


def evidence_of(row):
    """{stream: when what each word says had been heard}, in s: the end of the last source word that
    it is linked to."""
    found = {"<asr>": row.times}
    for lang, text in row.st.items():
        ends = [0.0] * len(text.split())
        for i, j in row.links[lang]:
            ends[j] = max(ends[j], row.times[i])
        found[f"<st:{lang}>"] = ends
    return found


def foreign_words(items):
    """{utterance: {stream: the words that other languages have and its own has not}}."""
    words, languages = {}, {}
    for row, _ in items:
        own, translations = row.words()
        languages[row.id] = {"<asr>": row.lang, **{f"<st:{lang}>": lang for lang in translations}}
        for lang, found in {row.lang: own, **translations}.items():
            words.setdefault(lang, set()).update(found)
    foreign = {lang: set().union(*words.values()) - own for lang, own in words.items()}
    return {key: {tag: foreign[lang] for tag, lang in tags.items()}
            for key, tags in languages.items()}


def figures(tag, metrics, records, evidence, foreign):
    """What a table shows of one stream, and the errors of every utterance, for pairs. A word is
    guessed if it is right but was shown before what it says had been heard."""
    from stream import stands_for
    right, guessed, strange = 0, 0, []
    for record in records:
        reference = record["references"][tag]
        written = [word for word in record["words"] if word.stream == tag]
        texts = [word.text for word in written]
        strange += [text in foreign[record["id"]][tag] for text in texts]
        # By its reference word: of several, the last one stands for it, the others are inserted.
        standing = dict(zip(stands_for(reference, texts), written))
        for k, word in standing.items():
            if k < len(reference) and reference[k] == word.text:
                right += 1
                guessed += word.delay_ms < 1000 * evidence[record["id"]][tag][k]
    return {name: metrics[name] for name in SCORES} | errors_of(tag, records) | {
        "guessed": 100 * guessed / max(1, right),
        "foreign": 100 * sum(strange) / max(1, len(strange))}


def errors_of(tag, records):
    """The errors in every utterance that has a text of this stream, and its words."""
    from stream import edit_distance
    pairs = [(record["references"][tag],
              [word.text for word in record["words"] if word.stream == tag])
             for record in records if tag in record["references"]]
    return {"errors": [edit_distance(*pair) for pair in pairs],
            "words": [len(reference) for reference, _ in pairs]}


def pooled(seeds):
    """What figures() says of several seeds, as one: means, and an utterance's errors in all."""
    counts = {key: [sum(column) for column in zip(*(one[key] for one in seeds))]
              for key in ("errors", "words")}
    means = {key: None if seeds[0][key] is None else sum(one[key] for one in seeds) / len(seeds)
             for key in seeds[0] if key not in counts}
    return counts | means | {"wer_by_seed": [one["wer"] for one in seeds]}


def differences(rows):
    """WER of every row minus ALIGN's, with the interval that holds 95 % of 1,000 draws of the
    utterances."""
    import stream
    found = {}
    for name, row in rows.items():
        for condition in filter(row.__contains__, ("clean", "noise")):
            for tag in row[condition].keys() & rows["ALIGN"][condition].keys():
                own, align = row[condition][tag], rows["ALIGN"][condition][tag]
                if len(own["words"]) != len(align["words"]):   # a model babbled and was broken off
                    continue
                delta = np.array(own["errors"]) - np.array(align["errors"])
                total = np.array(own["words"])
                drawn = [100 * delta[chosen].sum() / total[chosen].sum()
                         for chosen in stream.draws(len(total), DRAWS)]
                found.setdefault(name, {}).setdefault(condition, {})[tag] = [
                    100 * delta.sum() / total.sum(), *stream.interval(drawn)]
    return found


def without_counts(rows):
    for row in rows.values():
        for condition in ("clean", "noise"):
            for own in row[condition].values():
                del own["errors"], own["words"]
    return rows


# ---- The same on real speech ---------------------------------------------------------------------
# All rows start from one model that has learned letters and words by CTC and no order yet. No time
# of a translated word is known, so "ST" is not restricted, and TIME has its times.

REAL_FIRST, REAL_NEXT = (3500, 3400), (2000, 300)        # steps, and warm steps of these
REAL_ROWS = {"ASR": "asr", "ST": "st", "INTER 0.0": "ratio:0", "ALIGN": "align", "TIME": "time"}


def orders(data):
    from serialize import read_manifest
    from stream import load_run, readable
    data = Path(data).resolve()
    # Another folder of the same name is other data.
    work = ROOT / "runs" / "reproduce" / f"orders-{data.name}-{zlib.crc32(str(data).encode()):08x}"
    linked, dev = work / "linked.jsonl", data / "dev.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if outdated(linked, data / "train.jsonl"):
        aligned(data / "train.jsonl", linked)

    def row(name, manifest, mode, lengths, *more):
        steps, warm_steps = map(str, lengths)
        return train_in(f"{work.name}-{name}", [
            str(manifest), "--dev", str(dev), "--allow-outside", "--interleave", mode, "--steps",
            steps, "--warm-steps", warm_steps, "--eval-every", steps, "--prune", "0", *more])

    start = ["--init", str(row("first", linked, "asr", REAL_FIRST) / "model.pt")]
    runs, rows = {}, {}
    heard = list(readable(read_manifest(dev, allow_outside=True)))
    for name, mode in REAL_ROWS.items():
        learned = timed(linked, work, 0, runs) if name == "TIME" else linked
        folder = row(mode.replace(":", "-"), learned, mode, REAL_NEXT, *start)
        if name in ("ASR", "ST"):
            runs[name] = folder
        streams, records = evaluated(load_run(folder / "model.pt"), heard)
        rows[name] = known_of(folder) | {
            "step": REAL_NEXT[0],
            "streams": {tag: {key: m[key] for key in SCORES} for tag, m in streams.items()},
            "clean": {tag: errors_of(tag, records) for tag in streams}}
        show(name, REAL_NEXT[0], rows[name]["streams"])
    found = differences(rows)
    for name in rows:
        del rows[name]["clean"]
        rows[name]["minus_align"] = found.get(name, {}).get("clean", {})
    moved = moved_by_time(read_manifest(timed(linked, work, 0, runs), allow_outside=True))
    write_result(f"orders-{data.name}", {"utterances": len(heard), "words_moved_by_time": moved,
                                         "rows": rows})


# ---- Tables --------------------------------------------------------------------------------------

def papers_table(result):
    seeds = result["seeds"]
    several = "," in result["corpus"]
    lines = [
        f"{result['training_rows']:,} utterances to learn from, one by one and undisturbed; "
        f"{result['test_rows']} unseen ones to score, clean and at {result['noise_db']} dB of "
        "white noise, the mildest at which all streams of the first ALIGN had 5 % wrong or more "
        "on 100 others; minutes of training, some "
        f"beside other work; {'one seed' if seeds == 1 else f'means of {seeds} seeds'}. "
        f"{about(result)}",
        "",
        "| row | stream | WER | in noise | minus ALIGN, in noise | BLEU | chrF | LAAL s "
        "| guessed % | " + "wrong language, in noise % | " * several + "M parameters | min |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|" + "--:|" * several]
    for name, row in result["rows"].items():
        for tag, clean in row["clean"].items():
            noise, delta = row["noise"][tag], result["differences"].get(name, {})
            delta = interval(delta.get("noise", {}).get(tag))
            bleu = ["", ""] if clean["bleu"] is None else [f"{clean['bleu']:.1f}",
                                                           f"{clean['chrf']:.1f}"]
            cells = [name, f"`{tag}`", f"{clean['wer']:.1f}", f"{noise['wer']:.1f}", delta,
                     *bleu, in_seconds(clean["laal_ms"]), f"{clean['guessed']:.1f}",
                     *[f"{noise['foreign']:.1f}" for _ in range(several)],
                     f"{row['parameters'] / 1e6:.2f}", minutes(row["seconds"])]
            lines.append("| " + " | ".join(cells) + " |")
    separate = {name.removesuffix(" restricted"): row for name, row in result["rows"].items()
                if name.startswith(("ASR", "ST"))}
    parameters = sum(row["parameters"] for row in separate.values())
    more = f"The separate models together have {parameters / 1e6:.2f} M parameters."
    if "," in result["corpus"].partition("-")[2]:
        more += (" Each translator has its own two languages, and so a vocabulary of its own: of "
                 "the recogniser that all start from it keeps all but what knows the tokens.")
    return lines + ["", f"{more} {moved_words(result)}"]


def sound_table(result):
    lines = [f"WER after {result['steps']} steps, {result['utterances']} unseen utterances. "
             f"{about(result)}", ""]
    tags = list(next(iter(result["rows"].values())))
    # Two conditions a line.
    lines += [("| sound | " + " | ".join(f"`{tag}`" for tag in tags) + " ") * 2 + "|",
              ("|---|" + "--:|" * len(tags)).rstrip("|") * 2 + "|"]
    cells = [f"| {name} | " + " | ".join(f"{row[tag]['wer']:.1f}" if tag in row else "-"
                                        for tag in tags) + " "
             for name, row in result["rows"].items()]
    cells += ["| " * (1 + len(tags))] * (len(cells) % 2)
    return lines + [a + b + "|" for a, b in zip(cells[0::2], cells[1::2])]


def search_table(result):
    tags = list(next(iter(result["rows"].values())))
    lines = [f"After {result['steps']} steps, {result['utterances']} unseen utterances. "
             f"{about(result)}", "",
             "| chunk, beam | " + "".join(f"WER `{tag}` | LAAL s | " for tag in tags) + "score |",
             "|---|" + "--:|" * (2 * len(tags) + 1)]
    for name, row in result["rows"].items():
        cells = [f"{row[tag]['wer']:.1f} | {in_seconds(row[tag]['laal_ms'])}" for tag in tags]
        lines.append(f"| {name} | {' | '.join(cells)} | {row[tags[0]]['score']:.2f} |")
    return lines


def runs_table(result):
    """Of trainings that differ in their options: what each one's last evaluation found."""
    paired = any("minus_align" in row for row in result["rows"].values())
    lines = [about(result), "",
             "| run | steps | minutes | stream | WER | CER | BLEU | chrF | LAAL s |"
             + " WER minus ALIGN's |" * paired,
             "|---|--:|--:|---|--:|--:|--:|--:|--:|" + "--:|" * paired]
    for name, row in result["rows"].items():
        for tag, m in row["streams"].items():
            if tag.startswith("blind"):        # noise for sound: `sound` has a row for it
                continue
            cells = ["" if m[key] is None else f"{m[key]:.1f}"
                     for key in ("wer", "cer", "bleu", "chrf")]
            delta = interval(row["minus_align"].get(tag)) if paired else ""
            lines.append(f"| {name} | {row['step']} | {minutes(row.get('seconds'))} | `{tag}` "
                         f"| {' | '.join(cells)} | {in_seconds(m['laal_ms'])} |"
                         + f" {delta} |" * paired)
    if paired:
        lines += ["", f"All go on from one recogniser of {REAL_FIRST[0]} steps. "
                  f"{moved_words(result)} The interval holds 95 % of 1,000 draws of the "
                  f"{result['utterances']} utterances."]
    return lines


def minutes(seconds):
    """Of one run or several, their mean; of one that was stopped between they are not known."""
    known = [s for s in (seconds if isinstance(seconds, list) else [seconds]) if s is not None]
    return f"{sum(known) / len(known) / 60:.0f}" if known else ""


def interval(delta):
    """A difference and what holds 95 % of its draws."""
    return f"{delta[0]:+.1f} ({delta[1]:+.1f} to {delta[2]:+.1f})" if delta else ""


def moved_words(result):
    return (f"TIME puts {result['words_moved_by_time']:.0%} of the translated words elsewhere than "
            "ALIGN.")


def in_seconds(ms):
    return "" if ms is None else f"{ms / 1000:.2f}"


def about(result):
    """When, by which code and on what; the rows may have been trained by earlier code."""
    trained = set()
    for row in result["rows"].values():
        at = row.get("trained_at", ())
        trained |= {at} if isinstance(at, str) else set(at)
    trained = ", ".join(sorted(trained - {result["commit"]}))
    earlier = f", of rows trained at {trained}" * bool(trained)
    earlier += " (+: and changes that were not committed)" * ("+" in trained)
    return f"({result['date']}, {result['commit']}{earlier}; {result['machine']})"


PICTURES = {
    "curves.png": ("Losses of the main job, by step", "python tests/figures.py curves runs/de-en"),
    "tradeoff.png": ("Quality against delay", "python tests/figures.py tradeoff"),
    "mask.png": ("Who sees whom: the chunk mask", "python tests/figures.py mask"),
    "links.png": ("Word links found and true", "python tests/figures.py links"),
    "timeline.png": ("Words, written and shown", "python tests/figures.py timeline "
                     "runs/de-en/model.pt runs/de-en/unseen.wav"),
    "lattice.png": ("The paths through a lattice", "python tests/figures.py lattice "
                    "runs/de-en/model.pt"),
}


def table():
    """tests/results/README.md from the result files beside it, and the tables that stand in the
    README between their marks."""
    text = ["# Results", "", "Made by `python tests/reproduce.py table` from the files beside it."]
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem):
        text += ["", f"## {path.stem}", "", *table_of(path)]
    for name, (what, command) in PICTURES.items():
        if (ROOT / ".github" / name).exists():
            text += ["", f"## {what}", "", f"![{what}](../../.github/{name})", "", f"    {command}"]
    write_whole(RESULTS / "README.md", "\n".join(text) + "\n")
    readme = ROOT / "README.md"
    whole = readme.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem):
        if f"<!-- {path.stem} -->" in whole:
            whole = between(whole, path.stem, "\n".join(table_of(path)))
    write_whole(readme, whole)
    print("\n".join(text))


def table_of(path):
    make = {"papers": papers_table, "sound": sound_table, "search": search_table}
    return make.get(path.stem.split("-")[0], runs_table)(json.loads(path.read_text()))


def between(text, name, body):
    """The text with what stands between its two marks replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"README.md: the marks {begin} and {end} must stand there once each")
    return text[:text.index(begin) + len(begin)] + f"\n{body}\n" + text[text.index(end):]


COMMANDS = "search", "sound", "latency", "further", "papers", "orders", "table"


def parse(argv):
    """-> the name of an experiment or a command, and its arguments; or the help."""
    name, *rest = argv or [""]
    if name not in {*EXPERIMENTS, *COMMANDS}:
        sys.exit(__doc__)
    seeds = rest[1:] if name == "papers" else []
    if (len(rest) - len(seeds) != (name not in ("builtin", "table")) or len(seeds) > 1
            or not all(n.isdecimal() and int(n) for n in seeds)):
        sys.exit(__doc__)
    return name, rest


def main(argv):
    sys.path.insert(0, str(ROOT))
    name, rest = parse(argv)
    if name in COMMANDS:
        return globals()[name](*rest)
    data = str(Path(rest[0]).resolve()) if rest else ""
    results = {row: run(row, [option.replace("DATA", data) for option in options])
               for row, options in EXPERIMENTS[name].items()}
    write_trainings(name, results)


if __name__ == "__main__":
    with told("reproduce.py"):
        main(sys.argv[1:])
