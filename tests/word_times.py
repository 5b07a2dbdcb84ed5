"""When was each word said: fills `times` and `st_times` of a manifest, and compares them with what was there.

    python align.py IN.jsonl -o OUT.jsonl --times RUN/model.pt    the best path through a trained transducer (Viterbi)
    python align.py IN.jsonl -o OUT.jsonl --times FILE.ctm        a forced aligner's output, utterances named by row id
    python align.py IN.jsonl -o OUT.jsonl --times FOLDER          Praat TextGrids, FOLDER/ID.TextGrid, tier "words"

A transducer's times say when it could write a word, which is what interleaving needs; a forced aligner's say when the
word was over.
"""
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from align import read_lines, warn, word_times


def times_by_checkpoint(rows, path):
    """The best path through a trained transducer says when each word of what it writes is complete: {tag: ends}."""
    import torch
    from tqdm import tqdm
    import serialize
    from model import load, log_mel, pad_samples
    from rnnt_loss import joint_rnnt_align
    from stream import read_audio
    model, beside = load(path)
    tokenizer, joint = serialize.Tokenizer.from_dict(beside["tokenizer"]), model.joint
    for row in tqdm(rows, desc="times", disable=None):
        try:
            ids = serialize.serialize(serialize.interleave(row, beside["mode"]), tokenizer)
            samples = torch.from_numpy(read_audio(row.audio, row.start, row.duration))
        except ValueError as error:
            warn(f"{row.where}: no times: {error}")
            continue
        with torch.inference_mode():
            frames, _ = model.encoder(log_mel(pad_samples(samples, model.config.subsampling))[None])
            targets, lengths = torch.tensor([ids]), (torch.tensor([frames.shape[1]]), torch.tensor([len(ids)]))
            labels, _ = model.label_encoder(targets)
            written = joint_rnnt_align(joint.encoder_proj(frames), joint.label_proj(labels), joint.output.weight,
                                       joint.output.bias, targets, *lengths, blank=0)[0].tolist()
        parser, ends = serialize.StreamParser(tokenizer), {}
        for frame, token in zip(written, ids):
            for tag, _ in parser.feed(token):  # this token completes a word
                ends.setdefault(tag, []).append(frame)
        yield row, {tag: word_times(e, range(len(e)), model.config.frame_s) for tag, e in ends.items()}


def read_times(path):
    """A CTM, or a folder of Praat TextGrids with a tier named words -> {utterance: [(word, end)]}"""
    found = {}
    for file in sorted(Path(path).glob("*.TextGrid")):
        text = file.read_bytes()
        text = text.decode("utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
        tier = re.search(r'"IntervalTier"\s+(?:name = )?"words"(.*?)(?:"IntervalTier"|"TextTier"|$)', text, re.S)
        intervals = re.findall(r'([-+.\de]+)\s+(?:text = )?"((?:[^"]|"")*)"', tier[1] if tier else "")
        found[file.stem] = [(word.strip().replace('""', '"'), float(end)) for end, word in intervals]
    for n, line in enumerate(read_lines(path) if not Path(path).is_dir() else (), 1):
        fields = re.match(r"(\S+)\s+\S+\s+([\d.]+)\s+([\d.]+)\s+(\S+)", line)  # utterance channel start duration word
        if fields:
            found.setdefault(fields[1], []).append((fields[4], float(fields[2]) + float(fields[3])))
        elif line.strip() and not line.startswith(";;"):
            warn(f"{path}:{n}: left out, not a line of a CTM: {line[:80]!r}")
    return found


def times_by_annotation(rows, path):
    found = read_times(path)
    for row in rows:
        words = [(word.lower(), end) for word, end in found.get(row.id, []) if word not in ("", "sil", "sp", "<eps>")]
        if [word for word, _ in words] == (row.asr or "").lower().split():
            yield row, {"<asr>": [end for _, end in words]}
        else:
            warn(f"{row.where}: no times: {len(words)} words of {row.id!r} in {path} are not those of {row.asr!r}")


def add_times(rows, path):
    """Times that a row has are replaced, and ours are compared with them."""
    errors = {}
    for row, streams in (times_by_checkpoint if path.endswith(".pt") else times_by_annotation)(rows, path):
        known = {"<asr>": row.times, **{f"<st:{lang}>": times for lang, times in row.st_times.items()}}
        for tag, ends in streams.items():
            errors.setdefault(tag, []).extend(abs(a - b) for a, b in zip(ends, known.get(tag) or []) if b is not None)
            streams[tag] = [round(end, 3) for end in ends]
        row.times = streams.pop("<asr>", row.times)
        row.st_times.update((tag[4:-1], ends) for tag, ends in streams.items())
    for tag, error in errors.items():
        if not error:
            continue  # nothing to compare with
        median, most = np.percentile(error, (50, 90))
        warn(f"{tag}: |end - reference| over {len(error)} words: median {median:.3f} s, 90th percentile {most:.3f} s")
