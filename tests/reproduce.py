"""Run the experiments of the README again, one name at a time, and print their tables.

    python tests/reproduce.py builtin            de -> en on the built-in corpus, and the same without each ingredient
    python tests/reproduce.py languages          de, es, it -> en and en -> de, es, it
    python tests/reproduce.py mboshi DATA        Mboshi -> French; DATA holds train.jsonl and dev.jsonl

Every run is `python train.py` with the options printed above it; its folder is runs/reproduce/NAME.
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


def main(argv):
    if not argv or argv[0] not in EXPERIMENTS or (argv[0] == "mboshi") != (len(argv) == 2):
        sys.exit(__doc__)
    results = {name: run(name, [option.replace("DATA", argv[-1]) for option in options])
               for name, options in EXPERIMENTS[argv[0]].items()}
    print(f"\n{'run':24} {'steps':>6}  {'stream':14} {'WER':>6} {'CER':>6} {'BLEU':>6} {'chrF':>6} {'LAAL':>8}")
    for name, result in results.items():
        for tag, m in result["streams"].items():
            scores = [m["wer"], m["cer"], m["bleu"], m["chrf"], m["laal_ms"]]
            print(f"{name:24} {result['step']:6}  {tag:14}", *("     -" if x is None else f"{x:6.1f}" for x in scores), "ms")


if __name__ == "__main__":
    main(sys.argv[1:])
