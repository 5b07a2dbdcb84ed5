"""What long recordings cost: the utterances of a manifest joined into long streams, against the
same heard one by one.

    python tests/long_streams.py RUN/model.pt MANIFEST --seconds 300

A joined stream is heard as a whole, without a pause or a hint where an utterance ends. Its words
are then given back to the utterances, by the alignment with the fewest edits between all words
written and all words of the references, so that error rates, BLEU and delays (from the start of
each utterance) are those of the same segments in both columns.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oneline import told
from serialize import read_manifest
from stream import (SAMPLE_RATE, InputError, evaluate, load_run, own_search, own_streams, readable,
                    resegment, summarise)


def join(items, seconds):
    """Consecutive (row, samples) in lists of at least `seconds`; a last one shorter than half joins
    the one before."""
    groups, length = [], np.inf
    for item in items:
        if length >= seconds * SAMPLE_RATE:
            groups, length = [*groups, []], 0
        groups[-1].append(item)
        length += len(item[1])
    if len(groups) > 1 and length < seconds * SAMPLE_RATE / 2:
        rest = groups.pop()
        groups[-1] += rest
    return groups


def compare(model, tokenizer, items, seconds, **how):
    """(number of joined streams, metrics of single utterances, metrics of the same cut out of
    joined streams)"""
    groups = join(items, seconds)
    metrics, records = evaluate(model, tokenizer, items, bootstrap=1000, **how)
    whole = [(group[0][0], np.concatenate([samples for _, samples in group])) for group in groups]
    _, long = evaluate(model, tokenizer, whole, **how)
    if len(records) < len(items) or any(record["broken_off"] for record in long):
        raise InputError("the model babbles: the evaluation broke off, there is nothing to compare")
    if not metrics:
        raise InputError("no row has a text of a stream that the model writes")
    singles, parts = iter(records), []
    for group, record in zip(groups, long):
        parts += resegment(record, [next(singles) for _ in group])
    return len(groups), metrics, summarise(parts, how.get("tags") or tokenizer.tags, bootstrap=1000)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("manifest")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--allow-outside", action="store_true")
    return parser


def main():
    parser = make_parser()
    options = parser.parse_args()
    if not 0 < options.seconds < np.inf:
        parser.error(f"--seconds {options.seconds} must be a positive number")
    model, tokenizer, beside = load_run(options.checkpoint)
    items = list(readable(read_manifest(options.manifest, allow_outside=options.allow_outside)))
    how = own_search(beside) | {"tags": own_streams(beside, tokenizer), "chunk": options.chunk,
                                "progress": len(items)}
    n, alone, joined = compare(model, tokenizer, items, options.seconds, **how)
    print(f"{len(items)} utterances, {n} joined streams of about {options.seconds:g} s")
    print(f"{'':10}{'':12}{'one by one':>28}{'joined':>28}")
    for tag in alone:
        for name in ("wer", "cer", "bleu", "chrf", "laal_ms", "silent"):
            cells = []
            for figures in (alone[tag], joined[tag]):
                value, (low, high) = figures[name], figures.get(f"{name}_95") or ("", "")
                text = "-" if value is None else f"{value:.1f}"
                cells.append(f"{text} ({low:.1f} .. {high:.1f})" if low != "" else text)
            print(f"{tag:10}{name:12}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    with told("long_streams.py"):
        main()
