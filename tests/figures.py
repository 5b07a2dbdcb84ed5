"""Every picture of the README, each by one command.

    python tests/figures.py timeline RUN/model.pt FILE -o timeline.png
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COLOURS = ("#1f5fa8", "#c2570c", "#2f7d4f", "#8b3a8f", "#8a6d1a")
PALE, RULE = "#8a939d", "#d9dee3"
SOUND, LANE = 1.1, 0.25  # inches: the waveform, a line of words


# ---- timeline: when a word is said, and when it is shown -------------------------------------------------------------

def heard(checkpoint, path, start, duration, chunk):
    """-> samples, words, the tags of the streams, seconds per chunk."""
    from model import load
    from serialize import Tokenizer
    from stream import Streamer, read_audio
    model, beside = load(checkpoint)
    tokenizer = Tokenizer.from_dict(beside["tokenizer"])
    streamer = Streamer(model, tokenizer, chunk=chunk)
    samples = read_audio(path, start, duration)
    words = streamer.accept(samples) + streamer.flush()
    chunk_s = streamer.chunk * model.config.frame_s or len(samples) / 16000
    return samples, words, tokenizer.tags, chunk_s


def lanes(words, width_s):
    """A lane for every word: the first that is free from where the word is said to the end of where it is shown, so
    that no line runs through a word. Words that are shown together go below each other in the order of writing."""
    ends, places = [], []
    for word in words:
        free = next((k for k, end in enumerate(ends) if end <= word.end_s), len(ends))
        ends[free:free + 1] = [word.delay_ms / 1000 + width_s(word.text)]
        places.append(free)
    return places


def timeline(options):
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures.py: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot
    samples, words, tags, chunk_s = heard(options.checkpoint, options.file, options.start, options.duration,
                                          options.chunk)
    if not words:
        sys.exit(f"figures.py: {options.checkpoint} writes no word for {options.file}")
    length = len(samples) / 16000
    end = length + 0.45  # room for the words that are shown at the end
    width = min(24, max(9, 2.4 * end))
    inches = (width - 1.2) / end  # per second
    streams = [(tag, [word for word in words if word.stream == tag]) for tag in tags]
    streams = [(tag, mine, lanes(mine, lambda text: (0.09 * len(text) + 0.12) / inches))
               for tag, mine in streams if mine]
    depths = [0.2 + LANE * (max(places) + 1) for _, _, places in streams]  # in inches, as all that is vertical here
    height = SOUND + sum(depths) + 0.55
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = pyplot.figure(figsize=(width, height), dpi=160)
        axes = figure.add_axes((0.85 / width, 0.5 / height, 1 - 1.2 / width, 1 - 0.55 / height), frameon=False)
        axes.set(xlim=(0, end), ylim=(height - 0.55, 0), yticks=[])
        draw_sound(axes, samples, length, chunk_s, height - 0.55)
        top = SOUND
        for (tag, mine, places), depth, colour in zip(streams, depths, COLOURS * len(streams)):
            draw_stream(axes, tag, mine, places, top, colour)
            top += depth
        legend = ("dot: the frame that wrote the word     box: the word is shown, its chunk of "
                  f"{1000 * chunk_s:.0f} ms is complete")
        figure.text(1 - 0.35 / width, 0.1 / height, legend, ha="right", color=PALE, fontsize=8.5)
        figure.text(0.85 / width, 0.1 / height, "seconds", color=PALE, fontsize=8.5)
        axes.tick_params(axis="x", colors=PALE, length=3, labelsize=9)
        figure.savefig(options.output, facecolor="white")
    print(options.output)


def draw_sound(axes, samples, length, chunk_s, bottom):
    """The envelope of the waveform, between the lines at which a chunk is complete."""
    columns = min(len(samples), 1400)
    pieces = np.array_split(samples, columns)
    peak = (SOUND / 2 - 0.1) / max(1e-9, float(np.abs(samples).max()))
    x = (np.arange(columns) + 0.5) * length / columns
    low, high = (np.array([extreme(piece) for piece in pieces]) * peak for extreme in (np.min, np.max))
    axes.fill_between([0, length], 0.05, SOUND, color="#f2f4f6", linewidth=0, zorder=0)
    axes.fill_between(x, SOUND / 2 - high, SOUND / 2 - low, color="#5b6672", linewidth=0, zorder=3)
    for edge in np.append(np.arange(chunk_s, length, chunk_s), length):
        axes.plot([edge, edge], [0.05, bottom], color=RULE, linewidth=0.7, zorder=1)


def draw_stream(axes, tag, words, places, top, colour):
    """From the sound of a word (a dot) straight down, then across to where and when it is shown."""
    axes.text(-0.012, top + 0.3, tag.strip("<>"), color=colour, ha="right", va="center", weight="bold",
              transform=axes.get_yaxis_transform())
    for word, place in zip(words, places):
        shown, said, y = word.delay_ms / 1000, word.end_s, top + 0.3 + LANE * place
        axes.plot([said, said, shown], [SOUND, y, y], color=colour, linewidth=0.9, alpha=0.4, zorder=2,
                  solid_joinstyle="round")
        axes.plot([said], [SOUND], "o", color=colour, markersize=3.8, markeredgewidth=0, zorder=4)
        axes.text(shown, y, word.text, color=colour, va="center", ha="left", zorder=5,
                  bbox={"facecolor": "white", "edgecolor": colour, "linewidth": 0.6, "boxstyle": "round,pad=0.18"})


# ---- Command line ----------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("timeline", help="the words of a recording, where they are said and when they are shown")
    one.add_argument("checkpoint")
    one.add_argument("file")
    one.add_argument("-o", "--output", default="timeline.png", help="its ending decides the format")
    one.add_argument("--start", type=float, default=0.0, help="seconds into the file")
    one.add_argument("--duration", type=float, help="seconds; default: to the end")
    one.add_argument("--chunk", type=int, help="frames; default: the first of the checkpoint")
    one.set_defaults(run=timeline)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
