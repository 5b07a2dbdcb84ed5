"""Many streams <-> one stream: what the transducer is taught to write, and how to read it back.

One decoder writes the transcription and its translations as ONE sequence of tokens; a tag says whose words follow:

    <asr> ieri <st:en> yesterday <asr> ho comprato <st:en> I bought <asr> una <st:en> a <asr> macchina rossa ...

The way there is a choice of ORDER (interleave): a translated word placed too early must be guessed, for the speech that
says it has not been heard; placed too late, it keeps the listener waiting. The way back must not wait (StreamParser).

    time       a word comes when it could be said; align.py --times finds the times
    align      a translated word comes with the last source word that it is linked to; align.py finds the links
    ratio:G    a fixed rhythm: G = 0 writes all transcription first, 0.5 alternates, 1 all translation first
    asr, st    the transcription alone, the translations alone: the separate baselines

A word is what white space separates. `python serialize.py` shows every order, `python serialize.py MANIFEST` measures.
"""
import json
import math
import os
import re
import runpy
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, groupby, zip_longest
from pathlib import Path

InputError = ValueError


def units(text):
    return text.split()


def join(units):
    return " ".join(units)


ASR = "<asr>"
SEPARATOR = b" "  # ends every word: whoever writes a word's last token has finished the word
MODES = ["asr", "st", "ratio:0.0", "ratio:0.5", "ratio:1.0", "align", "time"]


# ---- Interleaving: every order is one merge by time, only with different clocks -------------------------------------
def interleave_time(streams):
    """Merge {tag: [(word, end_s)]} into [(tag, word)] by (end_s, order of the streams in the dict, index of the word).

    Inside a stream times never fall: one below its predecessor's counts as that. A word without a time (None) takes its
    predecessor's; at the head, the first that is known; infinity if none is. At equal times the earlier stream goes
    first, so that a transcribed word precedes what it allows to be said.
    """
    events = []
    for order, (tag, words) in enumerate(streams.items()):
        clock = next((end for _, end in words if end is not None), math.inf)
        for index, (word, end) in enumerate(words):
            clock = clock if end is None else max(clock, end)
            events.append((clock, order, index, tag, word))
    return [(tag, word) for *_, tag, word in sorted(events)]


def _merge(asr, st, asr_times, st_times):
    translations = {f"<st:{lang}>": list(zip(words, st_times[lang], strict=True)) for lang, words in st.items()}
    return interleave_time({ASR: list(zip(asr, asr_times, strict=True))} | translations)


def needs(n_asr, words, links):
    """need(j), the index of the last source word linked to target words 0..j (0 without a link), for every j."""
    last = [0] * len(words)
    for i, j in links:
        if not (0 <= i < n_asr and 0 <= j < len(words)):
            raise ValueError(f"link {i}-{j} lies outside {n_asr} source and {len(words)} target words")
        last[j] = max(last[j], i)
    return list(accumulate(last, max))


def interleave_align(asr, st, links):
    """INTER ALIGN: after source word i come the pending target words with need(j) <= i; the clock counts words."""
    return _merge(asr, st, range(len(asr)), {lang: needs(len(asr), words, links[lang]) for lang, words in st.items()})


def interleave_ratio(asr, st, gamma):
    """INTER gamma: the next word is a transcribed one while (1 - gamma) (1 + n_st) >= gamma (1 + n_asr).

    n_asr and n_st count the words written so far: with the two sides as times of the next words, the rule is a merge.
    Several translations take turns; a finished one drops out.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie between 0 and 1, not {gamma!r}")
    ticks = {lang: [((1 - gamma) * (1 + n), n) for n in range(len(words))] for lang, words in st.items()}
    return _merge(asr, st, [(gamma * (1 + n), -1) for n in range(len(asr))], ticks)  # n: take turns also at gamma 1


def interleave(row, mode):
    """The (tag, word) pairs of a Row in the order `mode` names; ValueError if it lacks what they need, as links."""
    (asr, st), both = row.words(), row.asr is not None and row.st
    if mode == "asr" and row.asr is not None:
        return interleave_ratio(asr, {}, 0)
    if mode == "st" and st:
        return interleave_ratio([], st, 0)
    if mode.startswith("ratio:") and both:
        return interleave_ratio(asr, st, float(mode[6:]))
    if mode == "align" and both and all(row.links.get(lang) or not asr or not st[lang] for lang in st):
        return interleave_align(asr, st, {lang: row.links.get(lang, []) for lang in st})
    if mode == "time" and both and row.times is not None and row.st_times.keys() >= st.keys():
        return _merge(asr, st, row.times, row.st_times)
    if mode not in MODES and not mode.startswith("ratio:"):
        raise ValueError(f"unknown mode {mode!r}; there are asr, st, align, time and ratio:G with G from 0 to 1")
    lacking = {"asr": "transcription", "st": "translation", "align": "links", "time": "times"}.get(mode, "second text")
    raise ValueError(f"{row.where or row.id}: no {lacking} for mode {mode!r}")


def deinterleave(pairs):
    """Undo any of them: {tag: [word]}."""
    return {tag: [word for other, word in pairs if other == tag] for tag in dict.fromkeys(tag for tag, _ in pairs)}


# ---- Tokens: words <-> integers, without loss -----------------------------------------------------------------------
class Tokenizer:
    """Byte-level BPE. Ids: 0 blank, then the tags, then the 256 bytes, then one per merge of two earlier ids.

    A word is its UTF-8 bytes and the separator, and a merge never reaches beyond them. So any text can be written, only
    the separator ends a word, and neither blank nor a tag can come out of text: text is made of bytes and merges.
    """
    def __init__(self, tags, merges=(), alphabet=""):
        self.tags, self.merges, self.alphabet, self._cache = list(tags), [(a, b) for a, b in merges], alphabet, {}
        if not self.tags or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"a tokenizer needs one or more different tags, not {self.tags}")
        self.tag_id = {tag: 1 + k for k, tag in enumerate(self.tags)}
        self.first_byte = 1 + len(self.tags)
        self.pieces = [b""] * self.first_byte + [bytes([b]) for b in range(256)]  # the bytes that each id writes
        self.rank = {chr(a) + chr(b): len(self.pieces) + k for k, (a, b) in enumerate(self.merges)}
        for a, b in self.merges:
            if not self.first_byte <= min(a, b) <= max(a, b) < len(self.pieces) or SEPARATOR in self.pieces[a]:
                raise ValueError(f"merge {a}, {b} does not join two earlier pieces of one word")
            self.pieces.append(self.pieces[a] + self.pieces[b])

    def __len__(self):
        return len(self.pieces)

    @classmethod
    def train(cls, texts, size, tags=(ASR,)):
        """Merge the most frequent pair of neighbours until there are `size` ids, or until no pair occurs twice.

        Of equally frequent pairs the one with smaller ids is merged, so the result depends on how often each word
        occurs and on nothing else. Ids are kept as characters, a word as a string: a merge is then str.replace.
        """
        counts = Counter(word for text in texts for word in text.split())
        plain, merges, pairs = cls(tags), [], Counter()
        if size < len(plain):
            raise ValueError(f"a vocabulary of {size} is too small: blank, tags and bytes alone are {len(plain)}")
        spelled = {word: "".join(map(chr, plain.encode_word(word))) for word in counts}

        def count_pairs(word, sign):
            for k in range(len(spelled[word]) - 1):
                pairs[spelled[word][k:k + 2]] += sign * counts[word]
        for word in counts:
            count_pairs(word, 1)
        while len(plain) + len(merges) < size and (most := max(pairs.values(), default=0)) > 1:
            best = min(pair for pair, count in pairs.items() if count == most)
            for word in [word for word, chars in spelled.items() if best in chars]:
                count_pairs(word, -1)
                spelled[word] = spelled[word].replace(best, chr(len(plain) + len(merges)))
                count_pairs(word, 1)
            merges.append((ord(best[0]), ord(best[1])))
        return cls(tags, merges, "".join(sorted(set("".join(counts)))))

    def encode_word(self, word):
        """The ids of one word: its bytes, then again and again the merge that was learned first. Kept in a cache."""
        if word not in self._cache:
            if word.split() != [word]:
                raise ValueError(f"{word!r} is not a word: empty, or with white space in it")
            chars = "".join(chr(self.first_byte + byte) for byte in word.encode() + SEPARATOR)
            while known := self.rank.keys() & {chars[k:k + 2] for k in range(len(chars) - 1)}:
                pair = min(known, key=self.rank.get)
                chars = chars.replace(pair, chr(self.rank[pair]))
            self._cache[word] = tuple(map(ord, chars))
        return self._cache[word]

    def encode(self, text):
        return [token for word in text.split() for token in self.encode_word(word)]

    def decode(self, ids):
        return " ".join(word for _, word in parse(ids, self))

    def unseen(self, text):
        """The characters of `text` that the training text did not have: written as bytes that were never learned."""
        return set("".join(text.split())) - set(self.alphabet)

    def to_dict(self):
        return {"tags": list(self.tags), "merges": [list(pair) for pair in self.merges], "alphabet": self.alphabet}

    @classmethod
    def from_dict(cls, data):
        return cls(**data)


def serialize(pairs, tokenizer):
    """(tag, word) pairs -> ids, with a tag's id before the first word and wherever the stream changes."""
    ids = []
    for tag, group in groupby(pairs, key=lambda pair: pair[0]):
        if tag not in tokenizer.tag_id:
            raise ValueError(f"the tokenizer has no tag {tag!r}, only {' '.join(tokenizer.tags)}")
        ids += [tokenizer.tag_id[tag], *(token for _, word in group for token in tokenizer.encode_word(word))]
    return ids


def parse(ids, tokenizer):
    """ids -> (tag, word) pairs; parse(serialize(pairs)) == pairs."""
    parser = StreamParser(tokenizer)
    return [pair for token in ids for pair in parser.feed(token)] + parser.flush()


class StreamParser:
    """parse() one id at a time, for ANY ids, also those of a model that has not learned the rules yet.

    A word comes out with the token that ends it, whole characters only. A tag in the middle of a word ends it; words
    before any tag belong to the first tag; blank does nothing. What is not UTF-8 becomes U+FFFD and is counted in
    `invalid`. No word is empty or holds white space, even where a model writes the bytes of a no-break space.
    """
    def __init__(self, tokenizer):
        self.tokenizer, self.tag, self.pending, self.invalid = tokenizer, tokenizer.tags[0], b"", 0

    def feed(self, token_id):
        """The (tag, word) pairs that this token finishes: none or one."""
        if not 0 <= token_id < len(self.tokenizer):
            raise ValueError(f"token {token_id} is outside the vocabulary of {len(self.tokenizer)}")
        if 0 < token_id < self.tokenizer.first_byte:
            finished = self.flush()
            self.tag = self.tokenizer.tags[token_id - 1]
            return finished
        self.pending += self.tokenizer.pieces[token_id]
        return self.flush() if self.pending.endswith(SEPARATOR) else []

    def flush(self):
        """The end of the input ends the last word."""
        text = self.pending.decode(errors="replace")
        self.invalid += text.count("\ufffd") - self.pending.count("\ufffd".encode())
        self.pending = b""
        return [(self.tag, word) for word in text.split()]


# ---- Manifests: one utterance per line, in JSON ---------------------------------------------------------------------
@dataclass
class Row:
    """One utterance: where its sound lies and what is said in it. Words are counted from 0, times are in seconds."""
    id: str
    audio: str                                                # path, already joined to the manifest's folder
    start: float = 0.0
    duration: float | None = None                             # None: to the end of the file
    lang: str = ""
    asr: str | None = None
    st: dict[str, str] = field(default_factory=dict)          # by language, as are links and st_times
    links: dict[str, list[tuple[int, int]]] = field(default_factory=dict)   # (word of asr, word of st)
    times: list[float | None] | None = None                   # end of each word of asr; None where unknown
    st_times: dict[str, list[float | None]] = field(default_factory=dict)   # when each word of st could be said
    speaker: str = ""
    where: str = field(default="", compare=False)             # file:line, for messages

    def words(self):
        return (self.asr or "").split(), {lang: text.split() for lang, text in self.st.items()}


KEYS = {"id": str, "audio": re.compile(r"[^\0]+"), "start": float, "duration": float, "lang": str, "speaker": str,
        "asr": str, "st": {str: str}, "links": {str: re.compile(r"\s*(\d+-\d+(\s+|$))*")}, "times": [float],
        "st_times": {str: [float]}}


def _fits(value, kind):
    """Whether a JSON value is of a kind: str, float (>= 0, finite), a pattern, [kind] (or null) or {str: kind}."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(item, kind[str]) for item in value.values())
    if isinstance(kind, list):
        return isinstance(value, list) and all(item is None or _fits(item, kind[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and 0 <= value < 1e9
    return isinstance(value, str) and (kind is str or kind.fullmatch(value) is not None)


def make_row(record, path, number, allow_outside):
    """A Row from one line's JSON object; ValueError for everything that later code could stumble over."""
    if not isinstance(record, dict) or record.get("audio") is None:
        raise ValueError(f"not a JSON object with audio: {record!r:.60}")
    json.dumps(record, ensure_ascii=False).encode()  # half a character (a lone surrogate) is a ValueError
    given = {key: record[key] for key in KEYS if record.get(key) is not None}
    for key, value in given.items():
        if not _fits(value, KEYS[key]):
            raise ValueError(f"{key} cannot be {value!r:.60}")
    row = Row(**{"id": f"{Path(path).stem}:{number}", **given}, where=f"{path}:{number}")
    if not allow_outside and (os.path.isabs(row.audio) or ".." in Path(row.audio).parts):
        raise ValueError(f"audio {row.audio!r} leaves the manifest's folder; --allow-outside permits that")
    row.audio = os.path.normpath(Path(path).parent / row.audio)
    row.links = {k: [tuple(map(int, link.split("-"))) for link in text.split()] for k, text in row.links.items()}
    asr, st = row.words()
    row.asr, row.st = " ".join(asr) or None, {lang: " ".join(words) for lang, words in st.items()}
    if not row.asr and not any(st.values()):
        raise ValueError("no text: neither asr nor st has a word")
    if not row.links.keys() | row.st_times.keys() <= st.keys():
        raise ValueError(f"links or st_times for {sorted(row.links | row.st_times)}, translations for {sorted(st)}")
    interleave_align(asr, {lang: st[lang] for lang in row.links}, row.links)  # refuses links out of range
    for words, times in [(asr, row.times), *((st[lang], times) for lang, times in row.st_times.items())]:
        if times is not None and len(times) != len(words):
            raise ValueError(f"{len(times)} times for {len(words)} words, {' '.join(words)!r:.60}")
    return row


def read_manifest(path, strict=False, *, allow_outside=False, on_bad=None):
    """The rows of a JSON-lines manifest. Unknown keys and empty lines are ignored. A bad line raises ValueError with
    file and line if `strict`; else on_bad(message) is told (standard error), the line is skipped, and the count is told
    at the end. No file or no usable row is a ValueError.
    """
    on_bad = on_bad or (lambda message: print(message, file=sys.stderr))
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    rows, bad = [], 0
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(make_row(json.loads(line.decode("utf-8-sig")), path, number, allow_outside))
        except (ValueError, RecursionError) as error:
            if strict:
                raise ValueError(f"{path}:{number}: {error}") from None
            on_bad(f"{path}:{number}: skipped: {error}")
            bad += 1
    if bad:
        on_bad(f"{path}: {bad} of {bad + len(rows)} rows skipped")
    if not rows:
        raise ValueError(f"{path}: no usable row")
    return rows


def write_manifest(path, rows):
    """Write what read_manifest reads, under a temporary name first: there is no half-written manifest."""
    lines, temporary = [], Path(f"{path}.{os.getpid()}.tmp")
    for row in rows:
        links = {lang: " ".join(f"{i}-{j}" for i, j in pairs) for lang, pairs in row.links.items()}
        record = vars(row) | {"audio": os.path.relpath(row.audio, Path(path).parent), "links": links, "where": None}
        lines.append(json.dumps({key: value for key, value in record.items() if value}, ensure_ascii=False) + "\n")
    temporary.write_bytes("".join(lines).encode())
    os.replace(temporary, path)


def demonstrate():
    """One sentence in every mode, a word per line, translations marked; then through the tokens and back."""
    row = Row("demo", "", asr="ieri ho comprato una macchina rossa", st={"en": "yesterday I bought a red car"},
              links={"en": [(0, 0), (2, 1), (1, 2), (2, 2), (3, 3), (5, 4), (4, 5)]},
              times=[0.5, 0.7, 1.3, 1.5, 2.1, 2.6], st_times={"en": [0.8, 1.4, 1.4, 1.6, 2.7, 2.9]})
    columns = [[word if tag == ASR else "  > " + word for tag, word in interleave(row, mode)] for mode in MODES]
    for line in [MODES, *zip_longest(*columns, fillvalue="")]:
        print("".join(f"{cell:15}" for cell in line).rstrip())
    pairs, tokenizer = interleave(row, "align"), Tokenizer.train([row.asr, row.st["en"]], 300, [ASR, "<st:en>"])
    ids = serialize(pairs, tokenizer)
    print(f"align in {len(ids)} tokens: {ids}\nread back exactly: {parse(ids, tokenizer) == pairs}")


if __name__ == "__main__":
    if sys.argv[1:]:  # the table about a manifest lies beside the tests
        runpy.run_path(str(Path(__file__).with_name("tests") / "manifests.py"), run_name="__main__")
    else:
        demonstrate()
