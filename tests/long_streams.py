"""What long recordings cost: the utterances of a manifest joined into long streams, against the same heard one by one.

    python tests/long_streams.py RUN/model.pt MANIFEST --seconds 300

A joined stream is heard as a whole, without a pause or a hint where an utterance ends. Its words are then given back
to the utterances, by the alignment with the fewest edits between all words written and all words of the references, so
that error rates, BLEU and delays (from the start of each utterance) are those of the same segments in both columns.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import load
from serialize import Tokenizer, read_manifest
from stream import SAMPLE_RATE, AudioError, evaluate, read_audio, summarise


def join(items, seconds):
    """Consecutive (row, samples) in lists of at least `seconds`; a last one shorter than half joins the one before."""
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


def stands_for(reference, hypothesis):
    """For each word of the hypothesis, the index of the reference word it stands for, or is inserted before."""
    cost = np.zeros((len(reference) + 1, len(hypothesis) + 1), int)
    cost[0], cost[:, 0] = np.arange(cost.shape[1]), np.arange(cost.shape[0])
    for i, word in enumerate(reference):
        for j, other in enumerate(hypothesis):
            cost[i + 1, j + 1] = min(cost[i, j + 1] + 1, cost[i + 1, j] + 1, cost[i, j] + (word != other))
    i, where = len(reference), []
    for j in range(len(hypothesis), 0, -1):
        while i and cost[i, j] == cost[i - 1, j] + 1 and cost[i, j] != cost[i - 1, j - 1] + (
                reference[i - 1] != hypothesis[j - 1]):
            i -= 1  # a reference word that nothing stands for
        if i and cost[i, j] == cost[i - 1, j - 1] + (reference[i - 1] != hypothesis[j - 1]):
            i -= 1
        where.append(i)
    return where[::-1]


def cut(whole, singles):
    """The record of a joined stream -> one for each of the utterances in it, whose own records are `singles`."""
    starts = np.cumsum([0.0] + [record["duration_ms"] for record in singles])
    parts = [{**record, "words": [], "seconds": whole["seconds"] / len(singles)} for record in singles]
    for tag in dict.fromkeys(tag for record in singles for tag in record["references"]):
        texts = [record["references"].get(tag, []) for record in singles]
        owner = [k for k, text in enumerate(texts) for _ in text] or [0]
        words = [word for word in whole["words"] if word.stream == tag]
        where = stands_for([word for text in texts for word in text], [word.text for word in words])
        for word, i in zip(words, where):
            k = owner[min(i, len(owner) - 1)]
            parts[k]["words"].append(replace(word, delay_ms=word.delay_ms - starts[k],
                                             elapsed_ms=word.elapsed_ms - starts[k]))
    return parts


def compare(model, tokenizer, items, seconds, **how):
    """(number of joined streams, metrics of single utterances, metrics of the same cut out of joined streams)"""
    groups = join(items, seconds)
    metrics, records = evaluate(model, tokenizer, items, bootstrap=1000, **how)
    whole = [(group[0][0], np.concatenate([samples for _, samples in group])) for group in groups]
    _, long = evaluate(model, tokenizer, whole, **how)
    singles, parts = iter(records), []
    for group, record in zip(groups, long):
        parts += cut(record, [next(singles) for _ in group])
    return len(groups), metrics, summarise(parts, tokenizer.tags, bootstrap=1000)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("manifest")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--chunk", type=int)
    options = parser.parse_args()
    model, beside = load(options.checkpoint)
    items = []
    for row in read_manifest(options.manifest):
        try:
            items.append((row, read_audio(row.audio, row.start, row.duration)))
        except AudioError as error:
            print(f"{row.where}: skipped: {error}", file=sys.stderr)
    n, alone, joined = compare(model, Tokenizer.from_dict(beside["tokenizer"]), items, options.seconds,
                               chunk=options.chunk, progress=True)
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
    main()
