"""Run the experiments of the README again, one name at a time, and print their tables.

    python tests/reproduce.py builtin            de -> en on the built-in corpus, and the same without each ingredient
    python tests/reproduce.py languages          de, es, it -> en and en -> de, es, it
    python tests/reproduce.py mboshi DATA        Mboshi -> French; DATA holds train.jsonl and dev.jsonl
    python tests/reproduce.py search RUN/model.pt   the run's unseen utterances by every beam and chunk size

A training is `python train.py` with the options printed above it; its folder is runs/reproduce/NAME.
"""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {
    "builtin": {"all ingredients": [], "labels from the start": ["--forget-steps", "0"],
                "no CTC start": ["--warm-steps", "0"], "whole words": ["--merges", "1000"]},
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
    sys.path.insert(0, str(ROOT))
    import train
    from model import load
    from serialize import Tokenizer, read_manifest
    from stream import evaluate, read_audio
    model, beside = load(path)
    tokenizer, options = Tokenizer.from_dict(beside["tokenizer"]), train.parse_options(["--resume", path])
    if options.manifest and not options.dev:
        sys.exit(f"{path}: its run had no development set (--dev)")
    if options.manifest:
        dev = [(row, read_audio(row.audio, row.start, row.duration)) for row in read_manifest(options.dev)]
    else:
        dev = train.BuiltIn(options.corpus, options.seed, model.config.subsampling).unseen(train.TEST_SIZE)
    chunks = model.config.chunks
    for chunk, beam in [(chunks[0], beam) for beam in (1, 2, 4, 8)] + [(chunk, 1) for chunk in (*chunks[1:], 0)]:
        metrics, records = evaluate(model, tokenizer, dev, chunk=chunk, beam=beam)
        ms = f"{1000 * chunk * model.config.frame_s:.0f} ms" if chunk else "whole utterance"
        score = sum(record["score"] for record in records) / len(records)
        show(f"{ms}, beam {beam}", beside["step"], metrics, f"score {score:.2f}")


def main(argv):
    needs_more = argv[:1] in (["mboshi"], ["search"])
    if not argv or argv[0] not in {*EXPERIMENTS, "search"} or len(argv) != 1 + needs_more:
        sys.exit(__doc__)
    head = f"\n{'run':24} {'steps':>6}  {'stream':14} {'WER':>6} {'CER':>6} {'BLEU':>6} {'chrF':>6} {'LAAL':>8}"
    if argv[0] == "search":
        print(head)
        return search(argv[1])
    results = {name: run(name, [option.replace("DATA", argv[-1]) for option in options])
               for name, options in EXPERIMENTS[argv[0]].items()}
    print(head)
    for name, result in results.items():
        show(name, result["step"], result["streams"])


if __name__ == "__main__":
    main(sys.argv[1:])
