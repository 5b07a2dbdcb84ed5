"""Every input from outside, damaged at random.

    python tests/fuzz.py                        200 cases of each kind
    python tests/fuzz.py --cases 10000          as many as one has time for
    python tests/fuzz.py opus --seed 7          one kind

A case is a good file with bytes changed, cut, doubled, moved or replaced by what is known to be
nasty. Its reader must return, or raise what is told to a user in one line (InputError, OSError);
anything else, a case that takes more than ten seconds, and an escape sequence on the screen is a
finding: it is printed with its seed, and the damaged file is kept.
"""
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import align  # noqa: E402
import model  # noqa: E402
import serialize  # noqa: E402
import stream  # noqa: E402
import train  # noqa: E402

TOLD = (model.InputError, serialize.InputError, align.InputError, OSError)
SECONDS = 10
NASTY = [b"\0", b"\xff", b"\r", b"\n", b"\r\n", b"\t", b'"', b"\\", b"\x1b[2J", b"\x1b]0;x\x07",
         b"\xef\xbb\xbf", b"\xed\xa0\x80", "\u2028".encode(), "\u202e".encode(), b"NaN", b"null",
         b"-1", b"1e999", b"99999999999999999999", b"{}", b"[]", b"[" * 2000, b"../../etc/passwd",
         b"/dev/zero", b"", b"|||", b" " * 50, b"'", b"<", b"%s", b"\x00\x00\x00\x80"]


def damaged(data, rng):
    """A few random changes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 1, 2, 4, 20, 200])
        kind = rng.randrange(7)
        if kind == 0:
            data[at:at + length] = bytes(rng.randrange(256) for _ in data[at:at + length])
        elif kind == 1:
            data[at:at] = rng.choice(NASTY)
        elif kind == 2:
            data[at:at + length] = rng.choice(NASTY)
        elif kind == 3:
            del data[at:at + length]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at:at] = data[at:at + length] * rng.choice([1, 2, 50])
        elif data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


# ---- Good files, and who reads them --------------------------------------------------------------

def rows_of(text, n=6):
    return "\n".join(text.format(k=k) for k in range(n)).encode() + b"\n"


def write_sound(path, subtype=None):
    import soundfile
    tone = (0.1 * np.sin(np.arange(4000) / 9)).astype(np.float32)
    opus = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {"subtype": subtype}
    soundfile.write(path, tone, 16000, **opus)
    return Path(path).read_bytes()


def pcm_pipe(folder):
    """Standard input, whatever comes through it; what is read is as long as it was."""
    tone = (3000 * np.sin(np.arange(4000) / 9)).astype("<i2").tobytes()

    def read(path):
        data = Path(path).read_bytes()
        before, sys.stdin = sys.stdin, SimpleNamespace(buffer=io.BytesIO(data))
        try:
            n = sum(map(len, stream.standard_input()))
        finally:
            sys.stdin = before
        if n != len(data) // 2:
            raise AssertionError(f"{len(data)} bytes, {n} samples")
    return "p.pcm", tone, read


def manifest(folder):
    """No sound outside the manifest's folder, however it is named."""
    def read(path):
        for row in serialize.read_manifest(path):
            if not Path(row.audio).is_relative_to(folder):
                raise AssertionError(f"{row.audio} lies outside {folder}")
    row = {"id": "a{k}", "audio": "a.wav", "start": 0.5, "duration": 1.25, "lang": "de",
           "asr": "das haus ist {k}", "st": {"en": "the house is {k}"},
           "links": {"en": "0-0 1-1 2-2"}, "times": [0.1, 0.5, 0.7, 0.9], "speaker": "s"}
    line = json.dumps(row).replace("{", "{{").replace("}", "}}").replace("{{k}}", "{k}")
    return "m.jsonl", rows_of(line), read


def covost(folder):
    head = b"path\tsentence\ttranslation\tclient_id\n"
    line = 'c{k}.mp3\tsie sagte \\"ja\\"\tshe said \\"yes\\"\tx'
    return "covost_v2.de_en.train.tsv", head + rows_of(line), serialize.import_covost


def tsv(folder):
    def read(path):
        return serialize.import_tsv(path, columns={"audio": "path", "asr": "text"})
    return "t.tsv", b"path\ttext\n" + rows_of("c{k}.wav\tein wort {k}"), read


def mustc(folder):
    """The YAML is damaged; the texts beside it are whole."""
    text = folder / "data" / "dev" / "txt"
    text.mkdir(parents=True, exist_ok=True)
    (folder / "data" / "dev" / "wav").mkdir(exist_ok=True)
    for lang in ("en", "de"):
        (text / f"dev.{lang}").write_bytes(rows_of("line {k}"))
    line = "- {{duration: 1.5, offset: {k}.25, speaker_id: s1, wav: t1.wav}}"
    return "data/dev/txt/dev.yaml", rows_of(line), serialize.import_mustc


def nemo(folder):
    line = '{{"audio_filepath": "a{k}.wav", "duration": 1.5, "text": "ein wort {k}"}}'
    return "n.json", rows_of(line), serialize.import_nemo


def pairs(folder):
    return "p.pairs", rows_of("das haus {k} ||| the house {k}"), align.read_pairs


def gold(folder):
    def read(path):
        return align.read_gold(path, [(["a"] * 3, ["b"] * 3)] * 6)
    return "p.gold", rows_of("0-0 1-1 2p2"), read


def times_of(path):
    rows = [serialize.Row(id=f"a{k}", audio="", asr="das haus", where=f"row {k}") for k in range(6)]
    return list(align.times_from(str(path))(rows))


def ctm(folder):
    return "w.ctm", rows_of("a{k} 1 0.10 0.20 das\na{k} 1 0.35 0.25 haus"), times_of


def textgrid(folder):
    def item(k, begin, end, text):
        return (f"        intervals [{k}]:\n            xmin = {begin}\n            xmax = {end}\n"
                f'            text = "{text}"\n')
    text = ('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 1\n'
            "tiers? <exists>\nsize = 1\nitem []:\n    item [1]:\n"
            '        class = "IntervalTier"\n        name = "words"\n        xmin = 0\n'
            "        xmax = 1\n        intervals: size = 2\n"
            + item(1, 0, 0.4, "das") + item(2, 0.4, 1, "haus"))

    def read(path):
        grids = folder / "grids"
        grids.mkdir(exist_ok=True)
        shutil.copy(path, grids / "a0.TextGrid")
        return times_of(str(grids))
    return "g.TextGrid", text.encode(), read


def sound(suffix, subtype=None):
    def make(folder):
        def read(path):
            return sum(map(len, stream.audio_blocks(path)))
        return f"a{suffix}", write_sound(folder / f"good{suffix}", subtype), read
    return make


def checkpoint(folder):
    from dataclasses import replace
    config = replace(model.PRESETS["tiny"], layers=1, label_layers=1, dim=8, heads=2, ff=8,
                     joint_dim=8, vocab=260, ctc_vocab=3)
    tokenizer = serialize.Tokenizer(("<asr>",))
    model.save(folder / "good.pt", model.Transducer(config), tokenizer=tokenizer.to_dict())
    return "m.pt", (folder / "good.pt").read_bytes(), stream.load_run


def command_lines(folder):
    """Flags and values at random, one a line."""
    flags = b"\n".join([b"--chunk\n4", b"--beam\n2", b"--steps\n9", b"--lr\n0.1", b"-o\nx",
                        b"--join\n2", b"--interleave\nalign", b"--threads\n1", b"--chunks\n8,4"])

    def read(path):
        words = Path(path).read_bytes().decode("utf-8", "surrogateescape").split("\n")
        for parse in (train.parse_options, stream.arguments().parse_args, align.parse_options,
                      serialize.read_arguments):
            # What one has typed oneself may be shown as it is.
            with contextlib.suppress(SystemExit, *TOLD), \
                    contextlib.redirect_stderr(io.StringIO()):
                parse(list(words))
    return "flags.txt", flags, read


KINDS = {
    "manifest": manifest, "covost": covost, "tsv": tsv, "mustc": mustc, "nemo": nemo,
    "pairs": pairs, "gold": gold, "ctm": ctm, "textgrid": textgrid, "checkpoint": checkpoint,
    "command lines": command_lines,
    "wav": sound(".wav"), "float wav": sound(".wav", "FLOAT"), "flac": sound(".flac"),
    "ogg": sound(".ogg"), "opus": sound(".opus"), "pcm pipe": pcm_pipe, "mp3": sound(".mp3"),
    "aiff": sound(".aiff"), "au": sound(".au"),
    "caf": sound(".caf"),
}


# ---- Running -------------------------------------------------------------------------------------

class TooLong(BaseException):
    """Not an Exception, so that no reader catches it."""


def too_long(*_):
    raise TooLong


def tried(read, path):
    """-> what is wrong with how the reader took it, or None."""
    screen = io.StringIO()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(screen):
            read(str(path))
    except TOLD as error:
        if not str(error) or "\n" in str(error):
            return f"told in no line, or in several: {error!s:.200}"
        with contextlib.redirect_stderr(screen):
            stream.say(error)
    except TooLong:
        return f"more than {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "an escape sequence on the screen" if "\x1b" in screen.getvalue() else None


def fuzz(kind, cases, seed, keep=None):
    """-> [(seed of the case, what was wrong)]"""
    findings = []
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        name, good, read = KINDS[kind](folder)
        path = folder / name
        path.write_bytes(good)
        if wrong := tried(read, path):
            return [(-1, f"the undamaged file: {wrong}")]
        for case in range(seed, seed + cases):
            data = damaged(good, random.Random(f"{kind} {case}"))
            path.write_bytes(data)
            if wrong := tried(read, path):
                findings.append((case, wrong))
                if keep:
                    Path(keep).mkdir(parents=True, exist_ok=True)
                    (Path(keep) / f"{kind.replace(' ', '_')}-{case}{path.suffix}").write_bytes(data)
    return findings


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default=os.path.join(tempfile.gettempdir(), "fuzz"),
                        help="folder for the damaged files that were findings")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    if options.cases < 1:
        parser.error(f"--cases is {options.cases}, not 1 or more")
    total = 0
    for kind in options.kinds or KINDS:
        findings = fuzz(kind, options.cases, options.seed, options.keep)
        total += len(findings)
        print(f"{kind:14} {options.cases} cases, {len(findings)} findings", flush=True)
        for case, wrong in findings[:10]:
            print(f"    case {case}: {wrong[:200]!r}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
