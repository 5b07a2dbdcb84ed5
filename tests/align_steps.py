"""What each step of align.py brings, in alignment error rate and seconds; eflomal beside it.

    python tests/align_steps.py FILE.pairs --gold FILE.gold --train MORE.pairs ...
    python tests/align_steps.py ... --eflomal VENV/bin/eflomal-align    (pip install eflomal there)
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from align import METHODS, Recipe, aer, align_bitext, read_gold, read_lines, read_pairs, symmetrise
from oneline import told

STEPS = [  # each line adds to the one above
    ("IBM-1, target given source", dict(ibm1=9, hmm=0, variational=False, prior=0, spelling=0,
                                        stems=0, diagonal=0, agree=False, method="forward")),
    ("+ prior near the diagonal", dict(diagonal=4.0)),
    ("+ both directions, grow-diag-final-and", dict(method="grow-diag-final-and")),
    ("+ HMM (4 iterations of IBM-1, 5 of HMM)", dict(ibm1=4, hmm=5)),
    ("+ variational M-step, prior 0.1", dict(variational=True, prior=0.1)),
    ("+ agreement", dict(agree=True)),
    ("+ posterior threshold 0.5 instead of grow-diag", dict(method="posterior")),
    ("+ stems", dict(stems=10.0)),
    ("+ spelling = the default", dict(spelling=1.0)),
    ("default without agreement", dict(agree=False)),
    ("default without the variational M-step", dict(agree=True, variational=False)),
    ("default without the diagonal", dict(variational=True, diagonal=0.0)),
    ("default without the HMM", dict(diagonal=4.0, ibm1=9, hmm=0)),
    ("default, intersection", dict(ibm1=4, hmm=5, method="intersection")),
    ("default, grow-diag-final-and", dict(method="grow-diag-final-and")),
    ("default, union", dict(method="union")),
]


def eflomal(program, pairs, folder):
    """-> seconds, links forward, links backward"""
    text, forward, backward = (Path(folder) / name for name in ("text", "forward", "backward"))
    text.write_text("".join(f"{' '.join(a).lower()} ||| {' '.join(b).lower()}\n" for a, b in pairs))
    began = time.perf_counter()
    command = [program, "-i", text, "-f", forward, "-r", backward]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    return seconds, read_links(forward), read_links(backward)


def read_links(path):
    return [{tuple(map(int, link.split("-"))) for link in line.split()}
            for line in read_lines(path)]


def report(name, error_rate, seconds):
    print(f"{name:<48} {100 * error_rate:5.1f} {seconds:7.2f} s", flush=True)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs")
    parser.add_argument("--gold", required=True)
    parser.add_argument("--train", nargs="+", default=[])
    parser.add_argument("--eflomal", help="the program eflomal-align")
    parser.add_argument("--runs", type=int, default=3,
                        help="of the default, for the median time (0: one, and no steps)")
    return parser


def main():
    options = make_parser().parse_args()
    pairs = read_pairs(options.pairs)
    sure, possible = read_gold(options.gold, pairs)
    text = pairs + [pair for path in options.train for pair in read_pairs(path)]
    text = pairs + [(a, b) for a, b in text[len(pairs):] if a and b]
    align_bitext(text[:2])  # compile
    align_bitext(text[:2], Recipe(ibm1=1, hmm=0))
    cells = sum(len(a) * len(b) for a, b in text) / 1e6
    print(f"{len(text)} sentence pairs, {cells:.1f} million cells, {len(pairs)} pairs scored")
    recipe = Recipe()
    for name, changes in STEPS if options.runs else []:
        recipe = replace(recipe, **changes)
        began = time.perf_counter()
        links = align_bitext(text, recipe)[:len(sure)]
        report(name, aer(links, sure, possible), time.perf_counter() - began)
    seconds = []
    for _ in range(max(1, options.runs)):
        began = time.perf_counter()
        links = align_bitext(text)[:len(sure)]
        seconds.append(time.perf_counter() - began)
    report("align.py", aer(links, sure, possible), statistics.median(seconds))
    if options.eflomal:
        with tempfile.TemporaryDirectory() as folder:
            runs = [eflomal(options.eflomal, text, folder) for _ in range(max(1, options.runs))]
        took, forward, backward = runs[0]
        for method in METHODS[1:5]:
            links = [symmetrise(f, b, method) for f, b in zip(forward[:len(sure)], backward)]
            report(f"eflomal, {method}", aer(links, sure, possible),
                   statistics.median(run[0] for run in runs))


if __name__ == "__main__":
    with told("align_steps.py"):
        main()
