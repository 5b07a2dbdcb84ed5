"""What every order of writing costs on a manifest, and manifests made from what people have.

    python serialize.py MANIFEST                                                  the table of the orders
    python serialize.py --from covost covost_v2.fr_en.train.tsv -o train.jsonl    sound: clips/ beside the TSV
    python serialize.py --from mustc en-de/data/dev/txt/dev.yaml -o en-de/data/dev/dev.jsonl
    python serialize.py --from nemo asr.jsonl ast.jsonl -o train.jsonl            one line per stream is joined by sound

Several files, or lines, about the same stretch of sound become one row with several texts, so that --from covost with
en_de and en_fr makes a one-to-many corpus.
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from serialize import ASR, MODES, Tokenizer, interleave, make_row, read_manifest, serialize, write_manifest


def delays(row, pairs):
    """How far behind its evidence each linked word of a translation is written: [(words, seconds)].

    Its evidence is the last source word it is linked to. It can be written once the source word before it in `pairs`
    has been spoken (none: index -1, 0 s). Words: the difference of the two indices; seconds: of their two end times
    (NaN where unknown). Below zero the word must be guessed. A word without a link has no evidence and no delay.
    """
    evidence = {(f"<st:{lang}>", j): i for lang, links in row.links.items() for i, j in sorted(links)}
    ends = [math.nan if end is None else end for end in row.times or [None] * len(pairs)] + [0.0]
    written, out = Counter(), []
    for tag, _ in pairs:
        last, source = written[ASR] - 1, evidence.get((tag, written[tag]))
        if source is not None:
            out.append((last - source, ends[last] - ends[source]))
        written[tag] += 1
    return out


def project_times(row):
    """Where a row has no times for a translation: a word could be said when the last word linked to it has been.

    A stand-in for times found by a trained translation transducer (align.py --times): it makes `time` equal `align`.
    """
    for lang, links in row.links.items():
        if row.times and lang not in row.st_times:
            row.st_times[lang] = [None] * len(row.st[lang].split())
            for i, j in sorted(links):
                row.st_times[lang][j] = row.times[i]


def _mean(values):
    return sum(values) / len(values) if values else math.nan


def measure(rows, size):
    """Print a line per mode over the rows that have what the mode needs: how much there is to write, and how late.

    "behind" are the mean and the 90th percentile of the delays; a guessed word, whose delay is negative, counts as 0
    there, or guesses would make up for waiting.
    """
    texts = [text for row in rows for text in [row.asr or "", *row.st.values()]]
    tags = [ASR, *sorted({f"<st:{lang}>" for row in rows for lang in row.st})]
    tokenizer = Tokenizer.train(texts, size, tags)
    print("mode         rows   tokens/s  tags/word  guessed %    words behind   s behind   90th pct")
    for mode in MODES:
        done = []
        for row in rows:
            with suppress(ValueError):
                done.append((row, interleave(row, mode)))
        ids = [token for _, pairs in done for token in serialize(pairs, tokenizer)]
        late = [delay for row, pairs in done if mode != "st" for delay in delays(row, pairs)]
        words, seconds = [max(0, n) for n, _ in late], sorted(max(0.0, s) for _, s in late if s == s)
        tags, n_words = sum(token < tokenizer.first_byte for token in ids), sum(len(pairs) for _, pairs in done)
        spoken = sum(row.duration or math.nan for row, _ in done)
        numbers = [len(ids) / (spoken or math.nan), tags / (n_words or math.nan),
                   100 * _mean([n < 0 for n, _ in late]), _mean(words), _mean(seconds),
                   seconds[math.ceil(0.9 * len(seconds)) - 1] if seconds else math.nan]
        cells = ["-" if number != number else f"{number:.2f}" for number in numbers]
        print("{:10}{:7}{:>11}{:>11}{:>11}{:>16}{:>11}{:>11}".format(mode, len(done), *cells))


# ---- Importers: each takes a file and returns a function from (line number, line) to the object of a manifest line --

def covost(path):
    """CoVoST 2: path, sentence, translation, client_id, as its get_covost_splits.py writes them beside clips/."""
    languages = re.search(r"\.([A-Za-z-]+)_([A-Za-z-]+)\.", path.name)
    if not languages:
        raise ValueError(f"{path}: the name should tell the languages, as covost_v2.fr_en.train.tsv does")
    source, target = languages.groups()
    with open(path, encoding="utf-8") as file:
        header = file.readline().rstrip("\r\n").split("\t")
    if not {"path", "sentence", "translation"} <= set(header):
        raise ValueError(f"{path}:1: no header with path, sentence and translation, but {header}")

    def read(number, line):
        if number == 1:
            return None
        cells = dict(zip(header, line.split("\t")))
        return {"id": Path(cells["path"]).stem, "audio": f"clips/{cells['path']}", "lang": source,
                "asr": cells["sentence"], "st": {target: cells["translation"]}, "speaker": cells.get("client_id")}
    return read


def mustc(path):
    """MuST-C: txt/dev.yaml with one mapping per line, txt/dev.en and the others with one text per line, wav/."""
    texts = {file.suffix[1:]: file.read_text(encoding="utf-8").rstrip("\n").split("\n")
             for file in sorted(path.parent.glob(f"{path.stem}.*")) if file.suffix != ".yaml"}
    n_lines = len(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    for lang, lines in texts.items():
        if len(lines) != n_lines:
            raise ValueError(f"{path} has {n_lines} lines, but {path.stem}.{lang} {len(lines)}")
    if "en" not in texts:
        raise ValueError(f"{path}: no {path.stem}.en beside it")

    def read(number, line):
        cells = {key: value.strip(" '\"") for key, value in re.findall(r"(\w+): ([^,}]+)", line)}
        st = {lang: lines[number - 1] for lang, lines in texts.items() if lang != "en"}
        return {"id": f"{Path(cells['wav']).stem}_{number}", "audio": f"../wav/{cells['wav']}", "lang": "en", "st": st,
                "start": float(cells["offset"]), "duration": float(cells["duration"]), "asr": texts["en"][number - 1],
                "speaker": cells.get("speaker_id")}
    return read


def nemo(path):
    """NeMo and Canary: `text` is a transcription, or where target_lang is not source_lang, the translation."""
    def read(number, line):
        cells = json.loads(line)
        source, text = cells.get("source_lang") or cells.get("lang") or "", cells.get("text", cells.get("answer"))
        target = cells.get("target_lang") or source
        return {"audio": cells["audio_filepath"], "start": cells.get("offset"), "duration": cells.get("duration"),
                "lang": source, "speaker": cells.get("speaker"),
                **({"asr": text} if target == source else {"st": {target: text}})}
    return read


IMPORTERS = {"covost": covost, "mustc": mustc, "nemo": nemo}


def import_rows(kind, path, strict):
    """The rows of a foreign file; a line that makes no row is named and skipped, or a ValueError if `strict`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    read, bad = IMPORTERS[kind](path), 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = read(number, line.rstrip("\r"))
            if record:
                yield make_row(record, path, number, True)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            if strict:
                raise ValueError(f"{path}:{number}: {error!r}") from None
            print(f"{path}:{number}: skipped: {error!r}", file=sys.stderr)
            bad += 1
    if bad:
        print(f"{path}: {bad} lines skipped", file=sys.stderr)


def join_texts(rows):
    """Rows about the same stretch of the same file become one, with all their texts; the first text of a kind stays."""
    joined = {}
    for row in rows:
        first = joined.setdefault((row.audio, row.start, row.duration), row)
        first.asr, first.st = first.asr or row.asr, row.st | first.st
    return list(joined.values())


def main():
    parser = argparse.ArgumentParser(prog="serialize.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="a manifest, or foreign files with --from")
    parser.add_argument("--from", dest="kind", choices=IMPORTERS, help="the format of the files, if not a manifest")
    parser.add_argument("-o", "--out", help="write a manifest instead of the table")
    parser.add_argument("--size", type=int, default=1000, help="size of the vocabulary for the table (1000)")
    parser.add_argument("--project", action="store_true", help="missing times of translations: through the links")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad line instead of skipping it")
    args = parser.parse_args()
    try:
        if args.kind:
            rows = join_texts(row for path in args.files for row in import_rows(args.kind, path, args.strict))
        else:  # no sound is opened here, so it may lie anywhere
            rows = [row for path in args.files for row in read_manifest(path, args.strict, allow_outside=True)]
        if not rows:
            raise ValueError(f"{', '.join(args.files)}: no usable line")
        for row in rows if args.project else []:
            project_times(row)
        if args.out:
            write_manifest(args.out, rows)
            print(f"{args.out}: {len(rows)} rows", file=sys.stderr)
        else:
            measure(rows, args.size)
    except ValueError as error:
        sys.exit(f"serialize.py: {error}")


if __name__ == "__main__":
    main()
