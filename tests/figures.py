"""Every picture of the README, each by one command, and a page that replays a recording.

    python tests/figures.py timeline RUN/model.pt FILE -o timeline.png    words, said and shown
    python tests/figures.py lattice RUN/model.pt -o lattice.png           frames x tokens
    python tests/figures.py mask -o mask.png                              who sees whom
    python tests/figures.py links -o links.png                            word alignment
    python tests/figures.py curves RUN... -o curves.png                   losses by step
    python tests/figures.py tradeoff -o tradeoff.png                      quality against delay
    python tests/figures.py replay RUN/model.pt FILE -o OUT.html          captions as they came

The pictures need matplotlib; the page needs nothing.
"""
import argparse
import base64
import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from oneline import told

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COLOURS = ("#1f5fa8", "#c2570c", "#2f7d4f", "#8b3a8f", "#8a6d1a")
PALE, RULE = "#8a939d", "#d9dee3"
SOUND, LANE, GAP = 0.8, 0.25, 0.45  # inches: the waveform, a line of words, between two rows
ROW_S = 8.0                         # seconds of sound in a row of the timeline, at most
WIDTH = 10.0                        # inches
STYLE = {"font.family": "DejaVu Sans", "font.size": 10, "text.parse_math": False}   # "$" is itself


def plotting(output):
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures.py: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot
    kinds = matplotlib.backend_bases.FigureCanvasBase.filetypes
    if Path(output).suffix[1:].lower() not in kinds:
        sys.exit(f"figures.py: -o {output}: a picture ends in .{', .'.join(sorted(kinds))}")
    return pyplot


# ---- timeline: when a word is said, and when it is shown -----------------------------------------

def heard(checkpoint, path, start=0.0, duration=None, chunk=None):
    """-> samples, words, the tags of the streams, seconds per chunk."""
    from stream import Streamer, load_run, own_search, own_streams, read_audio
    model, tokenizer, beside = load_run(checkpoint)
    streamer = Streamer(model, tokenizer, chunk=chunk, **own_search(beside))
    samples = read_audio(path, start, duration)
    words = [event for event in streamer.accept(samples) + streamer.flush()
             if hasattr(event, "text")]
    chunk_s = streamer.chunk * model.config.frame_s or len(samples) / 16000
    tags = dict.fromkeys([*own_streams(beside, tokenizer), *(word.stream for word in words)])
    return samples, words, list(tags), chunk_s


def lanes(words, width_s):
    """A lane for every word: the first that is free from where the word is said to the end of where
    it is shown, so that no line runs through a word. Words that are shown together go below each
    other in the order of writing."""
    ends, places = [], []
    for word in words:
        free = next((k for k, end in enumerate(ends) if end <= word.end_s), len(ends))
        ends[free:free + 1] = [word.delay_ms / 1000 + width_s(word.text)]
        places.append(free)
    return places


def timeline(options):
    """Rows of equal length, of up to ROW_S seconds, so that a long recording stays readable; a word
    stands in the row in which it is said."""
    pyplot = plotting(options.output)
    samples, words, tags, chunk_s = heard(options.checkpoint, options.file, options.start,
                                          options.duration, options.chunk)
    if not words:
        sys.exit(f"figures.py: {options.checkpoint} writes no word for {options.file}")
    length = len(samples) / 16000
    n_rows = max(1, int(np.ceil(length / ROW_S - 1e-9)))
    row_s = length / n_rows
    end = row_s + max(0.6, *(w.delay_ms / 1000 - w.end_s + 0.05 * len(w.text) for w in words))
    inches = (WIDTH - 1.2) / end                               # per second
    rows = [[(tag, [word for word in words if word.stream == tag
                    and min(n_rows - 1, int(word.end_s / row_s)) == r]) for tag in tags]
            for r in range(n_rows)]
    rows = [[(tag, mine, lanes(mine, lambda text: (0.09 * len(text) + 0.12) / inches))
             for tag, mine in row if mine] for row in rows]
    heights = [SOUND + sum(depth(places) for *_, places in row) + GAP for row in rows]
    height = sum(heights) + 0.35
    with pyplot.rc_context(STYLE):
        figure, top = pyplot.figure(figsize=(WIDTH, height), dpi=160), 0.05
        for r, (row, own) in enumerate(zip(rows, heights)):
            bottom = height - top - own + GAP - 0.1
            axes = figure.add_axes((0.85 / WIDTH, bottom / height, 1 - 1.2 / WIDTH,
                                    (own - GAP) / height), frameon=False)
            axes.set(xlim=(r * row_s, r * row_s + end), ylim=(own - GAP, 0), yticks=[])
            draw_sound(axes, samples, r * row_s, min(length, (r + 1) * row_s), chunk_s, own - GAP)
            draw_streams(axes, row, tags)
            axes.tick_params(axis="x", colors=PALE, length=3, labelsize=9)
            top += own
        legend = ("dot: the frame that wrote the word     box: the word is shown, its chunk of "
                  f"{1000 * chunk_s:.0f} ms is complete")
        figure.text(1 - 0.35 / WIDTH, 0.1 / height, legend, ha="right", color=PALE, fontsize=8.5)
        figure.text(0.85 / WIDTH, 0.1 / height, "seconds", color=PALE, fontsize=8.5)
        figure.savefig(options.output, facecolor="white")
    print(options.output)


def depth(places):
    """Inches that a stream takes."""
    return 0.2 + LANE * (max(places) + 1)


def draw_sound(axes, samples, start, end, chunk_s, bottom):
    """The envelope of a row's waveform, between the lines at which a chunk is complete."""
    own = samples[round(start * 16000):round(end * 16000)]
    columns = max(1, min(len(own), 1400))
    pieces = np.array_split(own, columns)
    peak = (SOUND / 2 - 0.1) / max(1e-9, float(np.abs(samples).max()))
    x = start + (np.arange(columns) + 0.5) * (end - start) / columns
    low = np.array([piece.min(initial=0) for piece in pieces]) * peak
    high = np.array([piece.max(initial=0) for piece in pieces]) * peak
    axes.fill_between([start, end], 0.05, SOUND, color="#f2f4f6", linewidth=0, zorder=0)
    axes.fill_between(x, SOUND / 2 - high, SOUND / 2 - low, color="#5b6672", linewidth=0, zorder=3)
    edges = np.arange(chunk_s, len(samples) / 16000, chunk_s)
    for edge in np.append(edges[(edges >= start) & (edges < end)], end):
        axes.plot([edge, edge], [0.05, bottom], color=RULE, linewidth=0.7, zorder=1)


def draw_streams(axes, row, tags):
    """From the sound of a word (a dot) straight down, then across to where and when it is shown."""
    top = SOUND
    for tag, words, places in row:
        colour = COLOURS[list(tags).index(tag) % len(COLOURS)]
        axes.text(-0.012, top + 0.3, tag.strip("<>"), color=colour, ha="right", va="center",
                  weight="bold", transform=axes.get_yaxis_transform())
        for word, place in zip(words, places):
            shown, said, y = word.delay_ms / 1000, word.end_s, top + 0.3 + LANE * place
            axes.plot([said, said, shown], [SOUND, y, y], color=colour, linewidth=0.9, alpha=0.4,
                      zorder=2, solid_joinstyle="round")
            axes.plot([said], [SOUND], "o", color=colour, markersize=3.8, markeredgewidth=0,
                      zorder=4)
            axes.text(shown, y, word.text, color=colour, va="center", ha="left", zorder=5,
                      bbox={"facecolor": "white", "edgecolor": colour, "linewidth": 0.6,
                            "boxstyle": "round,pad=0.18"})
        top += depth(places)


# ---- lattice: frames x tokens, where the paths go ------------------------------------------------

def corpus_of(checkpoint):
    """The built-in corpus that a run learned from, as resume.pt beside its model says; else the
    default one."""
    import train
    from model import load
    path = Path(checkpoint).parent / "resume.pt"
    options = load(path)[1].get("options", {}) if path.exists() else {}
    if options.get("manifest"):
        sys.exit(f"figures.py: {checkpoint} has learned {options['manifest']}: the picture is of a "
                 "sentence of the built-in corpus")
    return train.BuiltIn(options.get("corpus", "de-en"), options.get("seed", 0))


def lattice(options):
    """The posterior of every node for one unseen built-in utterance, the best path, and the band
    that these posteriors would keep (in training, those of the simple transducer choose it)."""
    import torch
    import train
    from rnnt_loss import plain_lattice, plain_log_probs, prune_band, rnnt_align
    from serialize import interleave, mode_of, serialize
    from stream import load_run
    pyplot = plotting(options.output)
    model, tokenizer, beside = load_run(options.checkpoint)
    corpus = corpus_of(options.checkpoint)
    row, = corpus.rows(options.utterance, 1, test=True)
    samples, row = train.speak_row(row, corpus.seed)
    pairs = [pair for pair in interleave(row, mode_of(row, beside.get("mode", "align")))
             if pair[0] in tokenizer.tag_id]
    if not pairs:
        sys.exit(f"figures.py: {options.checkpoint} writes {' '.join(tokenizer.tags)}: the picture "
                 f"is of a sentence in {row.lang}, with {' '.join(row.st)}")
    ids = serialize(pairs, tokenizer)
    mel = train.mel_of(samples, model.config)[None]
    with torch.no_grad():
        logits = model(mel, torch.tensor([ids]))                                      # (1,T,U1,V)
    lengths = [logits.shape[1]], [len(ids)]
    path = rnnt_align(logits, [ids], *lengths, blank=0)[0].numpy()
    nodes = plain_lattice(plain_log_probs(logits[0].double().numpy(), ids, 0))[1].sum(-1)
    band = prune_band(torch.from_numpy(nodes)[None], *lengths, options.width)[0].numpy()
    with pyplot.rc_context(STYLE | {"font.size": 8}):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 0.5 + 0.16 * len(ids)), dpi=160)
        image = np.ma.masked_less(nodes.T, 1e-3)
        axes.imshow(band.T, origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=9)
        axes.imshow(image, origin="lower", aspect="auto", cmap="viridis_r", vmin=0, vmax=1)
        # In row u from the frame of label u to that of label u + 1.
        axes.step([0, *path, len(nodes) - 1], [0, *range(len(ids) + 1)], where="pre",
                  color="#c0392b", linewidth=1)
        words = [shown_token(tokenizer, token) for token in ids]
        axes.set_yticks(range(len(ids) + 1), ["start", *words], fontsize=6.5)
        colour_labels(axes, ids, tokenizer)
        axes.set(xlabel=f"encoder frames of {1000 * model.config.frame_s:.0f} ms", ylabel="tokens")
        axes.set_title("colour: posterior of a node   red: the best path   grey: a band of "
                       f"{options.width} rows", fontsize=8, color=PALE)
        figure.tight_layout()
        figure.savefig(options.output, facecolor="white")
    print(options.output)


def shown_token(tokenizer, token):
    if 1 <= token <= len(tokenizer.tags):
        return tokenizer.tags[token - 1]
    return tokenizer.pieces[token].decode(errors="replace").replace(" ", "\N{OPEN BOX}")


def colour_labels(axes, ids, tokenizer):
    """Tokens in the colour of their stream; a tag begins its own."""
    stream = 0
    for label, token in zip(axes.get_yticklabels()[1:], ids):
        if 1 <= token <= len(tokenizer.tags):
            stream = token - 1
        label.set_color(COLOURS[stream % len(COLOURS)])


# ---- mask: who sees whom -------------------------------------------------------------------------

def mask(options):
    from exercises import mask_right
    pyplot = plotting(options.output)
    n, chunk, left = options.frames, options.chunk, options.left
    seen = mask_right(n, chunk, left)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5, 5), dpi=160)
        own = np.arange(n)[:, None] // chunk == np.arange(n) // chunk
        shades = np.where(seen, np.where(own, 2, 1), 0)
        from matplotlib.colors import ListedColormap
        axes.imshow(shades, cmap=ListedColormap(["#ffffff", "#a9c4e4", COLOURS[0]]), vmin=0, vmax=2)
        for edge in np.arange(0, n + 1, chunk) - 0.5:
            axes.axhline(edge, color=RULE, linewidth=0.8)
            axes.axvline(edge, color=RULE, linewidth=0.8)
        axes.set(xlabel="frame that is seen", ylabel="frame that looks", xticks=[], yticks=[])
        axes.set_title(f"chunks of {chunk} frames, {left} chunks of left context", fontsize=9,
                       color=PALE)
        figure.tight_layout()
        figure.savefig(options.output, facecolor="white")
    print(options.output)


# ---- links: word alignment -----------------------------------------------------------------------

def links(options):
    """Our links (filled) and the true ones (rings) of a few of a thousand built-in sentences, the
    text that the aligner learned from; or of FILE.pairs, with its --gold."""
    import train
    from align import align_bitext, read_gold, read_pairs
    pyplot = plotting(options.output)
    if options.gold and not options.pairs:
        sys.exit("figures.py: --gold goes with --pairs")
    if options.pairs:
        pairs = read_pairs(options.pairs)
        gold = read_gold(options.gold, pairs)[0] if options.gold else [set()] * len(pairs)
    else:
        rows = train.BuiltIn("de-en", 0).rows(0, 1000)
        pairs = [(row.asr.split(), row.st["en"].split()) for row in rows]
        gold = [set(map(tuple, row.links["en"])) for row in rows]
    chosen, there = options.lines, min(len(pairs), len(gold))
    if wrong := [k for k in chosen if k >= there]:
        sys.exit(f"figures.py: --lines {wrong[0]}: there are {there} pairs, from 0")
    found = align_bitext(pairs)
    with pyplot.rc_context(STYLE):
        figure, all_axes = pyplot.subplots(1, len(chosen), figsize=(WIDTH, 4), dpi=160,
                                           squeeze=False)
        for axes, k in zip(all_axes[0], chosen):
            draw_links(axes, *pairs[k], found[k], gold[k])
        figure.suptitle("filled: our links   rings: the true ones", fontsize=9, color=PALE)
        figure.tight_layout()
        figure.savefig(options.output, facecolor="white")
    print(options.output)


def draw_links(axes, source, target, found, gold):
    axes.set(xlim=(-0.5, len(target) - 0.5), ylim=(len(source) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(len(target)), target, rotation=60, ha="left", color=COLOURS[1])
    axes.set_yticks(range(len(source)), source, color=COLOURS[0])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(color=RULE, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for i, j in found:
        axes.plot(j, i, "s", color=COLOURS[2], markersize=9)
    for i, j in gold:
        axes.plot(j, i, "o", markerfacecolor="none", markeredgecolor="#222222", markersize=14)


# ---- curves: losses by step ----------------------------------------------------------------------

LOSSES = "transducer", "simple", "letters", "words", "next_label"


def curves(options):
    """A panel a task, a line a run."""
    pyplot = plotting(options.output)
    logs = {}
    for run in options.runs:
        path = Path(run) / "log.csv"
        if not path.is_file():
            sys.exit(f"figures.py: {path}: no such file")
        try:
            with open(path, newline="", errors="replace") as file:
                logs[str(run)] = list(csv.DictReader(file))
            for line in logs[str(run)]:
                int(line["step"])
                [float(line[task]) for task in LOSSES if line.get(task)]
        except (KeyError, ValueError, TypeError, csv.Error):
            sys.exit(f"figures.py: {path}: not the log of a run")
    tasks = [t for t in LOSSES if any(line.get(t) for log in logs.values() for line in log)]
    if not tasks:
        sys.exit(f"figures.py: {' '.join(logs)}: no losses yet")
    with pyplot.rc_context(STYLE):
        figure, all_axes = pyplot.subplots(1, len(tasks), figsize=(WIDTH, 2.6), dpi=160,
                                           squeeze=False)
        for axes, task in zip(all_axes[0], tasks):
            for (name, log), colour in zip(logs.items(), COLOURS * len(logs)):
                points = [(int(line["step"]), float(line[task])) for line in log if line.get(task)]
                axes.plot(*zip(*points), color=colour, linewidth=1.2, label=name)
            axes.set_title(task.replace("_", " "), fontsize=9)
            axes.set(yscale="log", xlabel="step")
            axes.tick_params(labelsize=7, which="both")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
            axes.grid(color=RULE, linewidth=0.5, which="both")
        all_axes[0][0].set_ylabel("nats a symbol")
        if len(logs) > 1:
            all_axes[0][-1].legend(fontsize=7, frameon=False)
        figure.tight_layout()
        figure.savefig(options.output, facecolor="white")
    print(options.output)


# ---- tradeoff: quality against delay -------------------------------------------------------------

def tradeoff(options):
    """From what `reproduce.py search` wrote: an error rate over LAAL, a line a stream."""
    pyplot = plotting(options.output)
    if not Path(options.results).is_file():
        sys.exit(f"figures.py: {options.results} is not there: python tests/reproduce.py search "
                 "RUN/model.pt writes it")
    try:
        rows = json.loads(Path(options.results).read_text())["rows"]
        tags = list(next(iter(rows.values())))
        found = {tag: [(row[tag]["laal_ms"] / 1000, row[tag]["wer"], name)
                       for name, row in rows.items() if row[tag]["laal_ms"] is not None]
                 for tag in tags}
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        sys.exit(f"figures.py: {options.results}: not what reproduce.py search writes")
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=160)
        for (tag, points), colour in zip(found.items(), COLOURS * len(tags)):
            one = sorted(point for point in points if "beam 1" in point[2])
            axes.plot([x for x, *_ in one], [y for _, y, _ in one], "o-", color=colour, label=tag,
                      markersize=4)
            for x, y, name in points:
                if "beam 1" not in name:
                    axes.plot(x, y, "x", color=colour, markersize=5)
            for x, y, name in one:
                last = (x, y, name) == one[-1]                 # its name would leave the picture
                axes.annotate(name.split(",")[0], (x, y), fontsize=6.5, color=PALE,
                              xytext=(-5 if last else 4, 3), textcoords="offset points",
                              ha="right" if last else "left")
        axes.set(xlabel="LAAL, seconds", ylabel="WER, %")
        axes.grid(color=RULE, linewidth=0.5)
        axes.legend(frameon=False, fontsize=8)
        axes.set_title("dots: chunk sizes   crosses: larger beams", fontsize=8, color=PALE)
        figure.tight_layout()
        figure.savefig(options.output, facecolor="white")
    print(options.output)


# ---- replay: the captions as they came -----------------------------------------------------------

def replay(options):
    """One self-contained page: the sound inside, no network and no library."""
    from serialize import join
    from stream import load_run
    if Path(options.output).suffix.lower() not in (".html", ".htm"):
        sys.exit(f"figures.py: {options.output}: the name of a page ends in .html")
    versions, tags = [], []
    for chunk in options.chunks or load_run(options.checkpoint)[0].config.chunks:
        samples, words, more, chunk_s = heard(options.checkpoint, options.file, chunk=chunk)
        tags += [tag for tag in more if tag not in tags]       # a stray one may come in one size
        before, shown = {}, []
        for word in words:
            # A space where captions have one: not between two characters of Han or kana.
            last = before.get(word.stream)
            space = last is not None and join([last, word.text]) != last + word.text
            before[word.stream] = word.text
            shown.append({"stream": tags.index(word.stream), "text": word.text,
                          "space": space, "start": round(word.start_s, 3),
                          "written": round(word.end_s, 3),
                          "shown": round(word.delay_ms / 1000, 3)})
        versions.append({"chunk_ms": round(1000 * chunk_s), "words": shown})
    if not any(version["words"] for version in versions):
        print(f"{options.checkpoint} writes no word for {options.file}: the page has none",
              file=sys.stderr)
    data = {"title": Path(options.file).name, "seconds": len(samples) / 16000,
            "streams": [tag.strip("<>") for tag in tags], "colours": COLOURS,
            "versions": versions}
    # "<" escaped: no word can end the script that holds it.
    text = json.dumps(data).replace("<", "\\u003c")
    page = (ROOT / "tests" / "replay.html").read_text(encoding="utf-8")
    before, between, after = re.split("SOUND|DATA", page)
    page = before + wave_of(samples) + between + text + after
    Path(options.output).write_text(page, encoding="utf-8")
    print(options.output)


def wave_of(samples):
    """Base64 of a WAV file."""
    import soundfile
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1, 1), 16000, format="WAV", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()


# ---- Command line --------------------------------------------------------------------------------

def at_least(lowest):
    """An argparse type: a whole number that is not below `lowest`."""
    def number(text):
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} on")
        return int(text)
    return number


def seconds(text):
    """An argparse type."""
    try:
        if 0 <= float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def numbers(text):
    """An argparse type: whole numbers with commas between them."""
    return [at_least(0)(part) for part in text.split(",")]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, text, output):
        added = commands.add_parser(function.__name__, help=text, description=function.__doc__)
        added.add_argument("-o", "--output", default=output,
                           help=f"default: {output}; its ending says what kind of file")
        added.set_defaults(run=function)
        return added.add_argument

    add = command(timeline, "words, where they are said and when they are shown", "timeline.png")
    add("checkpoint")
    add("file")
    add("--start", type=seconds, default=0.0, help="seconds into the file")
    add("--duration", type=seconds, help="seconds; default: to the end")
    add("--chunk", type=int, help="frames; default: the first of the checkpoint")
    add = command(lattice, "the paths through frames x tokens", "lattice.png")
    add("checkpoint")
    add("--utterance", type=at_least(0), default=0, help="which of the unseen built-in ones")
    add("--width", type=at_least(2), default=16, help="rows of the band")
    add = command(mask, "who sees whom", "mask.png")
    add("--frames", type=at_least(1), default=24)
    add("--chunk", type=at_least(1), default=4)
    add("--left", type=at_least(0), default=2, help="chunks")
    add = command(links, "word alignment", "links.png")
    add("--pairs", help="FILE.pairs instead of the built-in corpus")
    add("--gold", help="its true links")
    add("--lines", default=[4, 9, 12], type=numbers, help="which sentences, from 0: 4,9,12")
    add = command(curves, "losses by step", "curves.png")
    add("runs", nargs="+")
    add = command(tradeoff, "quality against delay", "tradeoff.png")
    add("--results", default=str(ROOT / "tests" / "results" / "search.json"))
    add = command(replay, "a page that replays a recording with its captions", "replay.html")
    add("checkpoint")
    add("file")
    add("--chunks", type=numbers,
        help="sizes in frames to switch between; default: the checkpoint's")
    return parser


def main(argv=None):
    with told("figures.py"):
        options = make_parser().parse_args(argv)
        options.run(options)


if __name__ == "__main__":
    main()
