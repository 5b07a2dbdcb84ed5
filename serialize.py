"""Many streams <-> one stream: what the transducer is taught to write, and how to read it back.

One decoder writes the transcription and its translations as ONE sequence of tokens (serialized
output training; arXiv 2307.03354, 2310.14806); a tag says whose words follow:

    <asr> ieri <st:en> yesterday <asr> ho comprato <st:en> I bought <asr> una <st:en> a ...

The way there is a choice of ORDER (interleave): a translated word placed too early must be guessed,
for the speech that says it has not been heard; placed too late, it keeps the listener waiting. The
way back must not wait (StreamParser).

    time       a word comes when it could be said; align.py --times finds the times
    align      a translated word comes with the last source word that it is linked to; align.py
               finds the links
    ratio:G    a fixed rhythm: G = 0 writes all transcription first, 0.5 alternates, 1 all
               translation first
    asr, st    the transcription alone, the translations alone: the separate baselines

    python serialize.py                  one sentence in every order
    python serialize.py MANIFEST         what every order costs there: tokens, guesses, delays
    python serialize.py --from covost covost_v2.fr_en.train.tsv -o train.jsonl    (clips/ beside it)
    python serialize.py --from mustc en-de/data/dev/txt/dev.yaml -o en-de/data/dev/dev.jsonl
    python serialize.py --from nemo asr.jsonl ast.jsonl -o train.jsonl
    python serialize.py --from tsv a.tsv --columns audio=path,asr=sentence,st.en=english -o a.jsonl

The file needs the standard library alone; soundfile, where installed, tells how long a recording
is. From the top: words, the orders, the tokens, manifests, their readers, importers, the command.
"""
import argparse
import csv
import json
import math
import os
import re
import stat
import sys
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from pathlib import Path

ASR = "<asr>"
LONGEST_PIECE = 1 << 16  # bytes that one id may write
MOST_TOLD = 100          # bad lines of a file that are named, each
SEPARATOR = b" "  # ends every word: whoever writes a word's last token has finished the word
MODES = ["asr", "st", "ratio:0.0", "ratio:0.5", "ratio:1.0", "align", "time"]


class InputError(ValueError):
    """Input of the user that cannot be used; the message says where it stands and what it is."""


# ---- Words: the units that are interleaved, linked, timed and counted ----------------------------
# Chinese and Japanese put no spaces between words, so there a unit is one character, which a
# listener can be shown at once; in every other script it is what white space separates. Han and
# kana by their Unicode blocks, in order: radicals; signs used like characters; kana, full width and
# half width; the characters; kana and characters beyond U+FFFF.
HAN_KANA = ("\u2e80-\u2fdf" "\u3005-\u3007\u3021-\u3029\u3038-\u303b"
            "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
            "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff" "\U0001aff0-\U0001b16f\U00020000-\U0003ffff")
# What stays with such a character: accents, tone and voicing marks, variant selectors.
MARKS = ("\u0300-\u036f\u20d0-\u20ff\u302a-\u302f\u3099\u309a"
         "\ufe00-\ufe0f\uff9e\uff9f\U000e0100-\U000e01ef")
UNIT = re.compile(f"[{HAN_KANA}][{MARKS}]*|[^\\s{HAN_KANA}]+")
NEEDLESS_SPACE = re.compile(f"([{HAN_KANA}][{MARKS}]*) (?![{MARKS}])| (?=[{HAN_KANA}])")
# Scripts without spaces whose words only a dictionary finds: line breaking class SA of Unicode's
# annex 14, without its rarest, and a few more. A sentence would count as one word; the reader tells
# the user.
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"
                      "\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf]")


def units(text):
    """Text -> its words; a character of Han or kana is a word of its own: [我, 爱, Python, 语, 言]."""
    return text.split() if text.isascii() else UNIT.findall(text)       # ASCII: thrice as fast


def join(words):
    """Words -> text, with a space wherever units() would not cut by itself: units(join(u)) == u."""
    text = " ".join(words)
    return text if text.isascii() else NEEDLESS_SPACE.sub(r"\1", text)


# ---- Interleaving: every order is one merge by time, only with different clocks ------------------
def interleave_time(streams):
    """Merge {tag: [(word, end_s)]} into [(tag, word)].

    Sorted by (rising end_s, order of the streams in the dict, index of the word). At equal times
    the earlier stream goes first, so that a transcribed word precedes what it allows to be said.
    """
    events = []
    for order, (tag, words) in enumerate(streams.items()):
        ends = rising([end for _, end in words])
        for index, ((word, _), end) in enumerate(zip(words, ends)):
            events.append((end, order, index, tag, word))
    return [(tag, word) for *_, tag, word in sorted(events)]


def rising(ends):
    """The end times of a stream's words as they are compared: known, and never falling.

    One below its predecessor's counts as that. A word without a time (None) takes its
    predecessor's; at the head, the first that is known; infinity if none is.
    """
    first = next((end for end in ends if end is not None), math.inf)
    known = (-math.inf if end is None else end for end in ends)
    return list(accumulate(known, max, initial=first))[1:]


def _merge(asr, st, asr_times, st_times):
    streams = {ASR: list(zip(asr, asr_times, strict=True))}
    for lang, words in st.items():
        streams[f"<st:{lang}>"] = list(zip(words, st_times[lang], strict=True))
    return interleave_time(streams)


def needs(n_asr, words, links):
    """need(j), the index of the last source word linked to target words 0..j (0 without a link).

    For every target word j; links are (source, target) pairs. InputError for one out of range.
    """
    latest = [0] * len(words)
    for i, j in links:
        if not (0 <= i < n_asr and 0 <= j < len(words)):
            raise InputError(f"link {i}-{j} lies outside {n_asr} source "
                             f"and {len(words)} target words")
        latest[j] = max(latest[j], i)
    return list(accumulate(latest, max))


def interleave_align(asr, st, links):
    """INTER ALIGN: after source word i come the pending target words with need(j) <= i.

    As a merge: a source word's time is its index, a target word's time its need.
    """
    need = {lang: needs(len(asr), words, links[lang]) for lang, words in st.items()}
    return _merge(asr, st, range(len(asr)), need)


def interleave_ratio(asr, st, gamma):
    """INTER gamma: a transcribed word is next while (1 - gamma) (1 + n_st) >= gamma (1 + n_asr).

    n_asr and n_st count the words written so far: with the two sides as times of the next words,
    the rule is a merge. Several translations take turns, and each is held to the rule by its own
    n_st; a finished one drops out.
    """
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma must lie between 0 and 1, not {gamma!r}")
    asr_clock = [(gamma * (1 + n), -1) for n in range(len(asr))]
    st_clock = {}
    for lang, words in st.items():  # n beside it: they take turns at gamma 1 too, where all is 0
        st_clock[lang] = [((1 - gamma) * (1 + n), n) for n in range(len(words))]
    return _merge(asr, st, asr_clock, st_clock)


def interleave(row, mode):
    """The (tag, word) pairs of a Row in the order that `mode` names.

    InputError, with the row's file and line, where it lacks what the mode needs; a text without a
    word counts as lacking.
    """
    check_mode(mode)
    asr, st = row.words()
    has_asr, has_st = bool(asr), any(st.values())
    both = has_asr and has_st
    if mode == "asr" and has_asr:
        return interleave_ratio(asr, {}, 0)
    if mode == "st" and has_st:
        return interleave_ratio([], st, 0)
    if mode.startswith("ratio:") and both:
        return interleave_ratio(asr, st, float(mode.removeprefix("ratio:")))
    if mode == "align" and both and all(row.links.get(lang) or not st[lang] for lang in st):
        return interleave_align(asr, st, {lang: row.links.get(lang, []) for lang in st})
    timed = row.times is not None and all(lang in row.st_times or not st[lang] for lang in st)
    if mode == "time" and both and timed:
        return _merge(asr, st, row.times, {lang: row.st_times.get(lang, []) for lang in st})
    lacking = {"asr": "transcription", "st": "translation", "align": "links", "time": "times"}
    raise InputError(f"{row.where or row.id}: no {lacking.get(mode, 'second text')} "
                     f"for mode {mode!r}")


def check_mode(mode):
    """InputError for what names no order."""
    try:
        known = mode in ("asr", "st", "align", "time") or (
            mode.startswith("ratio:") and 0 <= float(mode.removeprefix("ratio:")) <= 1)
    except ValueError:
        known = False
    if not known:
        raise InputError(f"unknown mode {mode!r}; there are asr, st, align, time and ratio:G with "
                         "gamma, G, from 0 to 1")


def mode_of(row, mode):
    """The mode for this row where `mode` is asked for: a row with one text is written as that text.

    Transcription alone: "asr"; translation alone: "st". Where asr or st itself is asked for, it
    stays, and interleave raises if the row lacks it.
    """
    asr, st = row.words()
    if mode in ("asr", "st") or asr and any(st.values()):
        return mode
    return "asr" if asr else "st"


def deinterleave(pairs):
    """Undo any of them: {tag: [word]}."""
    streams = {}
    for tag, word in pairs:
        streams.setdefault(tag, []).append(word)
    return streams


# ---- Tokens: words <-> integers, without loss ----------------------------------------------------
class Tokenizer:
    """Byte-level BPE (byte pair encoding, arXiv 1508.07909).

    Ids: 0 blank, then the tags, then the 256 bytes, then one per merge of two earlier ids. A word
    is its UTF-8 bytes and the separator, and a merge never reaches beyond them. So any text can be
    written, only the separator ends a word, and neither blank nor a tag can come out of text: text
    is made of bytes and merges.
    """

    def __init__(self, tags, merges=(), alphabet=""):
        self.tags, self.alphabet = list(tags), alphabet
        self.merges = [(first, second) for first, second in merges]
        if not self.tags or len(set(self.tags)) < len(self.tags):
            raise InputError(f"a tokenizer needs one or more different tags, not {self.tags}")
        self.tag_id = {tag: 1 + k for k, tag in enumerate(self.tags)}
        self.first_byte = 1 + len(self.tags)
        # The bytes that each id writes; blank and the tags write none.
        self.pieces = [b""] * self.first_byte + [bytes([byte]) for byte in range(256)]
        # Inside, ids are kept as characters and a word as a string: a merge is then str.replace.
        self.rank = {}  # pair of characters -> the id of its merge; the earlier merge is smaller
        for first, second in self.merges:
            earlier = self.first_byte <= min(first, second) <= max(first, second) < len(self.pieces)
            if not earlier or SEPARATOR in self.pieces[first]:
                raise InputError(f"merge {first}, {second} does not join two earlier pieces "
                                 "of one word")
            self.rank[chr(first) + chr(second)] = len(self.pieces)
            self.pieces.append(self.pieces[first] + self.pieces[second])
            if len(self.pieces[-1]) > LONGEST_PIECE:           # forty merges could fill the memory
                raise InputError(f"merge {first}, {second} makes a piece of "
                                 f"{len(self.pieces[-1])} bytes, {LONGEST_PIECE} at most")
        self._cache = {}

    def __len__(self):
        return len(self.pieces)

    @classmethod
    def train(cls, texts, size, tags=(ASR,)):
        """Merge the most frequent pair of neighbours, again and again, until there are `size` ids.

        Four words, each once, _ the separator:

            an_   and_   ant_   man_      the pair a n occurs 4 times, n _ 2 times, others once
            X_    Xd_    Xt_    mX_       after the merge X = a n;  X _ occurs 2 times
            Y     Xd_    Xt_    mY        after the merge Y = X _;  no pair occurs twice: the end

        Of equally frequent pairs the one with smaller ids is merged, so the result depends on how
        often each word occurs and on nothing else. InputError if `size` does not hold the bytes.
        """
        plain = cls(tags)
        if size < len(plain):
            raise InputError(f"a vocabulary of {size} is too small: blank, tags and bytes alone "
                             f"are {len(plain)}")
        counts = Counter(word for text in texts for word in units(text))
        spelled = {word: "".join(map(chr, plain.encode_word(word))) for word in counts}
        pairs = Counter()           # how often each pair of neighbours occurs
        found_in = defaultdict(set)  # the words that it occurs in, or once did
        for word in counts:
            cls._count_pairs(word, spelled[word], counts[word], pairs, found_in)
        merges = []
        while len(plain) + len(merges) < size and pairs:
            most = max(pairs.values())
            if most < 2:
                break
            pair = min(pair for pair, count in pairs.items() if count == most)
            merged = chr(len(plain) + len(merges))
            for word in found_in.pop(pair):
                cls._count_pairs(word, spelled[word], -counts[word], pairs, found_in)
                spelled[word] = spelled[word].replace(pair, merged)
                cls._count_pairs(word, spelled[word], counts[word], pairs, found_in)
            del pairs[pair]
            found_in.pop(pair, None)  # counting down has put it there again
            merges.append((ord(pair[0]), ord(pair[1])))
        return cls(tags, merges, "".join(sorted(set("".join(counts)))))

    @staticmethod
    def _count_pairs(word, chars, count, pairs, found_in):
        for first, second in zip(chars, chars[1:]):
            pairs[first + second] += count
            found_in[first + second].add(word)

    def encode_word(self, word):
        """The ids of one word: its bytes, then always the merge that was learned first. Cached.
        ValueError for what is no word."""
        if word not in self._cache:
            if word.split() != [word]:
                raise ValueError(f"{word!r} is not a word: empty, or with white space in it")
            chars = "".join(chr(self.first_byte + byte) for byte in word.encode() + SEPARATOR)
            while known := self.rank.keys() & {a + b for a, b in zip(chars, chars[1:])}:
                pair = min(known, key=self.rank.get)
                chars = chars.replace(pair, chr(self.rank[pair]))
            self._cache[word] = tuple(map(ord, chars))
        return self._cache[word]

    def encode(self, text):
        return [token for word in units(text) for token in self.encode_word(word)]

    def decode(self, ids):
        return join(word for _, word in parse(ids, self))

    def unseen(self, text):
        """The characters of `text` that the training text lacked: bytes that were never learned."""
        return set("".join(text.split())) - set(self.alphabet)

    def to_dict(self):
        """Plain data for a checkpoint; from_dict reads it back."""
        merges = [list(pair) for pair in self.merges]
        return {"tags": list(self.tags), "merges": merges, "alphabet": self.alphabet}

    @classmethod
    def from_dict(cls, data):
        """The tokenizer of to_dict; InputError for anything else."""
        try:
            tokenizer = cls(**data)
            texts = [*tokenizer.tags, tokenizer.alphabet]
            if not isinstance(data["tags"], str) and all(isinstance(text, str) for text in texts):
                return tokenizer
        except (TypeError, ValueError):
            pass
        raise InputError(f"not the data of a tokenizer: {data!r:.60}")


def serialize(pairs, tokenizer):
    """(tag, word) pairs -> ids, with a tag's id before the first word and at every change."""
    return [token for ids in word_by_word(pairs, tokenizer) for token in ids]


def word_by_word(pairs, tokenizer):
    """The ids that each (tag, word) adds to the stream."""
    tag_before = None
    for tag, word in pairs:
        if tag not in tokenizer.tag_id:
            raise InputError(f"the tokenizer has no tag {tag!r}, only {' '.join(tokenizer.tags)}")
        change = () if tag == tag_before else (tokenizer.tag_id[tag],)
        yield change + tokenizer.encode_word(word)
        tag_before = tag


def parse(ids, tokenizer):
    """ids -> (tag, word) pairs; parse(serialize(pairs)) == pairs, for any words."""
    parser = StreamParser(tokenizer)
    return [pair for token in ids for pair in parser.feed(token)] + parser.flush()


class StreamParser:
    """parse() one id at a time, for ANY ids, also those of a model that has not learned the rules.

    A word comes out with the token that ends it, whole characters only. A tag in the middle of a
    word ends it; words before any tag belong to the first tag; blank does nothing. What is not
    UTF-8 becomes U+FFFD and is counted in `invalid`. No word is empty or holds white space, even
    where a model writes the bytes of a no-break space.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.tag = tokenizer, tokenizer.tags[0]
        self.pending, self.invalid = b"", 0

    def feed(self, token_id):
        """The (tag, word) pairs that this token finishes: none or one; more only where a model
        writes the bytes of white space inside a word. ValueError for an id that there is not."""
        if not 0 <= token_id < len(self.tokenizer):
            raise ValueError(f"token {token_id} is outside the vocabulary of {len(self.tokenizer)}")
        if 0 < token_id < self.tokenizer.first_byte:
            finished = self.flush()
            self.tag = self.tokenizer.tags[token_id - 1]
            return finished
        self.pending += self.tokenizer.pieces[token_id]
        return self.flush() if self.pending.endswith(SEPARATOR) else []

    def flush(self):
        """The end of the input ends the word that is still open."""
        text = self.pending.decode(errors="replace")
        self.invalid += text.count("\ufffd") - self.pending.count("\ufffd".encode())
        self.pending = b""
        return [(self.tag, word) for word in text.split()]


# ---- Manifests: one utterance per line, in JSON --------------------------------------------------
@dataclass
class Row:
    """One utterance: where its sound lies and what is said in it.

    Words are the units of units(), counted from 0; times are in seconds. st, links and st_times
    are dicts by language.
    """

    id: str
    audio: str                    # path, already joined to the manifest's folder
    start: float = 0.0
    duration: float | None = None                             # None: to the end of the file
    lang: str = ""
    asr: str | None = None
    st: dict[str, str] = field(default_factory=dict)
    links: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # (word of asr, of st)
    times: list[float | None] | None = None                   # end of each word of asr
    st_times: dict[str, list[float | None]] = field(default_factory=dict)  # when it could be said
    speaker: str = ""
    # Beside the utterance itself: columns of the file that nobody here knows; file:line.
    other: dict = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)

    def words(self):
        """([word of asr], {language: [word]})."""
        return units(self.asr or ""), {lang: units(text) for lang, text in self.st.items()}


AUDIO = re.compile(r"[^\0]+")
LINKS = re.compile(r"\s*(\d+-\d+(\s+|$))*")
# What a line of the file may have, all but audio and one text optional, as in
# {"id": "a1", "audio": "wav/a.ogg", "start": 1.5, "duration": 3.2, "lang": "mb", "speaker": "anna",
#  "asr": "wa di", "st": {"fr": "il mange"}, "links": {"fr": "0-0 1-1"}, "times": [0.4, 0.9],
#  "st_times": {"fr": [0.5, 1.0]}}
# audio: seen from the manifest's folder; ids are unique; times may have null for what is unknown.
KINDS = {"id": str, "audio": AUDIO, "start": float, "duration": float, "lang": str, "speaker": str,
         "asr": str, "st": {str: str}, "links": {str: LINKS}, "times": [float],
         "st_times": {str: [float]}}


def _fits(value, kind):
    """Whether a JSON value is of a kind.

    Kinds: str, float (finite, from 0 on), a pattern, [kind] (or null in it) and {str: kind}.
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(item, kind[str]) for item in value.values())
    if isinstance(kind, list):
        return isinstance(value, list) and all(
            item is None or _fits(item, kind[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and 0 <= value < 1e9  # isinstance takes true for 1
    return isinstance(value, str) and (kind is str or kind.fullmatch(value) is not None)


def make_row(record, path, number, allow_outside=False):
    """A Row from one line's JSON object; InputError for everything that later code could trip over.

    In the file, links and times count what white space separates. A word of several units (Han,
    kana) passes its links and its time to each of them. Texts are brought to NFC, the composed
    form of Unicode, so that what looks equal is equal.
    """
    if not isinstance(record, dict) or record.get("audio") is None:
        foreign = isinstance(record, dict) and "audio_filepath" in record
        raise InputError(f"not a JSON object with audio: {record!r:.60}"
                         + " (a line for NeMo? --from nemo reads those)" * foreign)
    if half := re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
        raise InputError(f"half a character, {half[0]!r}")
    given = {key: record[key] for key in KINDS if record.get(key) is not None}
    given |= {key: str(given[key]) for key in ("id", "speaker") if type(given.get(key)) is int}
    for key, value in given.items():
        if not _fits(value, KINDS[key]):
            raise InputError(f"{key} cannot be {value!r:.60}")
    other = {key: value for key, value in record.items() if key not in KINDS}
    if not given.get("id"):
        given["id"] = f"{Path(path).stem}:{number}"
    row = Row(**given, other=other, where=f"{path}:{number}")
    parts = row.audio.replace(os.altsep or os.sep, os.sep).split(os.sep)   # Path's are slow
    if not allow_outside and (os.path.isabs(row.audio) or ".." in parts):
        raise InputError(f"audio {row.audio!r} leaves the manifest's folder; "
                         "--allow-outside permits that")
    if os.path.basename(os.path.normpath(row.audio)) in (os.curdir, os.pardir):
        raise InputError(f"audio {row.audio!r} is a folder")
    row.audio = os.path.normpath(os.path.join(os.path.dirname(path), row.audio))
    _count_in_units(row)
    if row.asr is not None:
        row.asr = _tidy(row.asr)
    row.st = {lang: _tidy(text) for lang, text in row.st.items()}
    if not row.asr and not any(row.st.values()):
        raise InputError("no text: neither asr nor st has a word")
    return row


def _tidy(text):
    return join(units(unicodedata.normalize("NFC", text)))


def _spans(text):
    """For every word that white space ends, the indices of its units."""
    if text.isascii():                # no Han and no kana
        return [range(k, k + 1) for k in range(len(text.split()))]
    ends = list(accumulate((len(units(word)) for word in text.split()), initial=0))
    return [range(*span) for span in zip(ends, ends[1:])]


def _count_in_units(row):
    """Links and times as the file has them, by white space, now by unit."""
    if not row.links.keys() | row.st_times.keys() <= row.st.keys():
        raise InputError(f"links or st_times for {sorted(row.links.keys() | row.st_times.keys())}, "
                         f"translations for {sorted(row.st)}")
    for lang, text in row.links.items():
        source, target = _spans(row.asr or ""), _spans(row.st[lang])
        numbers = list(map(int, re.findall(r"\d+", text)))
        pairs = list(zip(numbers[::2], numbers[1::2]))
        needs(len(source), target, pairs)  # refuses links out of range
        row.links[lang] = [(a, b) for i, j in pairs for a in source[i] for b in target[j]]
    if row.times is not None:
        row.times = _times_of_units(row.times, row.asr or "")
    row.st_times = {lang: _times_of_units(times, row.st[lang])
                    for lang, times in row.st_times.items()}


def _times_of_units(times, text):
    spans = _spans(text)
    if len(times) == len(units(text)):  # they count units already
        return times
    if len(times) != len(spans):
        raise InputError(f"{len(times)} times for {len(spans)} words, {text!r:.60}")
    return [time for time, span in zip(times, spans) for _ in span]


def printable(text):
    """Text from files as a terminal may show it: one line, no escape sequences, nothing turned."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def tell(message):
    """One line for the user, on standard error, unless that is closed or nobody reads it."""
    if sys.stderr is None:
        return
    try:
        print(printable(message), file=sys.stderr)
    except OSError:                   # the work goes on; nor will Python try again as it ends
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def read_lines(path):
    """[(number from 1, line)] of a regular file, as bytes without the LF.

    LF ends a line and nothing else does: a CR is white space, alone too, so that two files which
    correspond line by line stay together. InputError for what is not a regular file: a pipe or a
    device may never end.
    """
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{path}: a pipe or a device; write what it holds into a file first")
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if lines[0][:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: UTF-16, but UTF-8 is read here: iconv -f UTF-16 -t UTF-8")
    if not lines[-1]:
        lines.pop()  # what follows the end of the last line is no line
    return list(enumerate(lines, 1))


def decode(line):
    """UTF-8 -> text, without a byte order mark; InputError names the first wrong byte."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]    # its object is the line without the mark
        raise InputError(f"byte 0x{byte:02x} after {error.start} others is not UTF-8") from None


class Intake:
    """The rows of one or more files as they are read: bad ones are told and skipped, or raise.

    No two rows may have one id. With `by_sound`, rows about the same stretch of the same file
    become one row with several texts; starts and lengths less than 50 ms apart are rounded ones.
    """

    def __init__(self, strict=False, on_bad=None, by_sound=False):
        self.strict, self.tell, self.by_sound = strict, on_bad or tell, by_sound
        self.rows, self.ids, self.sounds = [], {}, {}
        self.named = set()       # ids that are ours, so ours to change
        self.counts = Counter()  # of one file

    @contextmanager
    def line(self, path, number):
        """Around the reading of one line: whatever is wrong with it gets its file and number."""
        try:
            yield
        except (ValueError, RecursionError) as error:
            if self.strict:
                raise InputError(f"{path}:{number}: {error}") from None
            self.counts["bad"] += 1
            if self.counts["bad"] <= MOST_TOLD:
                self.tell(f"{path}:{number}: skipped: {error}")

    @contextmanager
    def file(self, path):
        """Around the reading of one file: says at its end, once, what happened to its rows."""
        self.counts.clear()
        yield
        bad, good = self.counts["bad"], self.counts["good"]
        if bad:  # an importer's line is not yet a row
            unnamed = f"; {bad - MOST_TOLD} of them are not named" * (bad > MOST_TOLD)
            self.tell(f"{path}: {bad} {'lines' if self.by_sound else f'of {bad + good} rows'} "
                      f"skipped{unnamed}")
        if apart := self.counts["apart"]:
            self.tell(f"{path}: {apart} rows have the sound of another from the same place on, but "
                      "of another duration: rows of their own")
        if composed := self.counts["composed"]:
            self.tell(f"{path}: text of {composed} rows brought to NFC")
        if unspaced := self.counts["unspaced"]:
            self.tell(f"{path}: {unspaced} rows hold a script without spaces (as Thai, Lao, Khmer, "
                      "Burmese): what stands between two spaces counts as one word, so let them "
                      "stand between the words")
        if not good:
            raise InputError(f"{path}: no usable row")

    def add(self, record, path, number, allow_outside=False):
        """A line's object becomes a row, or joins the one that has its sound."""
        row = make_row(record, path, number, allow_outside)
        has_id = record.get("id") not in (None, "")
        if row.id in self.ids and not has_id:
            row.id = row.where
        elif row.id in self.named:
            earlier = self.ids.pop(row.id)
            earlier.id = earlier.where
            self.ids[earlier.id] = earlier
            self.named.remove(row.id)
        begun = self.begun_with(row) if self.by_sound else []
        same = [other for other in begun if about_equal(other.duration, row.duration)]
        if same:
            join_texts(same[0], row)
        elif row.id in self.ids:
            raise InputError(f"id {row.id!r} stands at {self.ids[row.id].where} already")
        else:
            self.counts["apart"] += bool(begun)
            self.ids[row.id] = row
            if not has_id:
                self.named.add(row.id)
            self.rows.append(row)
            if self.by_sound:
                self.sounds.setdefault((row.audio, round(10 * row.start)), []).append(row)
        self.counts["good"] += 1
        texts = [record.get("asr") or "", *(record.get("st") or {}).values()]
        normal = all(unicodedata.is_normalized("NFC", text) for text in texts)
        self.counts["composed"] += not normal
        self.counts["unspaced"] += any(UNSPACED.search(text) is not None for text in texts)

    def begun_with(self, row):
        """The rows of the same sound from the same place on, but for rounding."""
        tenth = round(10 * row.start)
        near = [other for key in (tenth - 1, tenth, tenth + 1)
                for other in self.sounds.get((row.audio, key), [])]
        return [other for other in near if about_equal(other.start, row.start)]


def read_manifest(path, strict=False, *, allow_outside=False, on_bad=None):
    """The rows of a JSON-lines manifest.

    Empty lines are ignored; columns that nobody knows are kept in Row.other. A bad line raises
    InputError with file and line if `strict`; else on_bad(message) is told (default: standard
    error), the line is skipped, and the count is told at the end. So is an id that stands twice. No
    file or no usable row is an InputError.
    """
    return read_manifests([path], strict, allow_outside, on_bad)


def read_manifests(paths, strict=False, allow_outside=False, on_bad=None):
    """read_manifest of several files; no id may stand twice in all of them."""
    intake = Intake(strict, on_bad)
    for path in paths:
        with intake.file(path):
            for number, line in read_lines(path):
                with intake.line(path, number):
                    if line.strip():
                        intake.add(from_json(decode(line)), path, number, allow_outside)
    return intake.rows


def from_json(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:      # whose own "line 1" is not that of the file
        raise InputError(f"not JSON, {error.msg} at character {error.pos + 1}: {text.strip()!r:.60}"
                         ) from None


def record_of(row, folder):
    """The JSON object of a Row in a manifest in `folder`; what has its default value is left out.

    Where links or times count the words, white space ends every one of them.
    """
    record = vars(row) | {"audio": os.path.relpath(row.audio, folder)}
    if row.links or row.times is not None or row.st_times:
        asr, st = row.words()
        record["asr"] = row.asr if row.asr is None else " ".join(asr)
        record["st"] = {lang: " ".join(words) for lang, words in st.items()}
    record["links"] = {lang: " ".join(f"{i}-{j}" for i, j in pairs)
                       for lang, pairs in row.links.items()}
    default = vars(Row(id=None, audio=None))
    kept = {key: record[key] for key in KINDS if record[key] != default[key]}
    return kept | row.other


def check_target(path):
    """InputError where write_manifest could not put its file, or would replace what is no manifest;
    a command asks before its work. Where a link is followed, sound named from the manifest's folder
    would be looked for in another."""
    folder = Path(path).parent
    if os.path.islink(path):
        raise InputError(f"{path}: a link; name the file itself: {os.path.realpath(path)}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: a folder, a pipe or a device, not a file that can be replaced")
    if not folder.is_dir():
        raise InputError(f"{path}: there is no folder {folder}")
    if str(path).endswith((os.sep, os.altsep or os.sep)):
        raise InputError(f"{path}: the name of a folder, not of a file")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: not allowed to write in {folder}")
    if os.path.exists(path) and not is_manifest(path):
        raise InputError(f"{path}: there already, and no manifest: it stays")


def is_manifest(path):
    """Whether a file is empty or begins with a JSON object that has `audio`, perhaps cut off."""
    with open(path, "rb") as file:
        head = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    first = head.partition(b"\n")[0]
    return not head or head[:1] == b"{" and re.search(rb'"audio"\s*:', first) is not None


def write_manifest(path, rows):
    """Write what read_manifest reads, under a temporary name first.

    Whatever fails, the file is whole: the old one or the new one, and the temporary one is gone.
    """
    check_target(path)
    lines = [json.dumps(record_of(row, Path(path).parent), ensure_ascii=False) for row in rows]
    try:
        content = "".join(line + "\n" for line in lines).encode()
    except UnicodeEncodeError as error:
        name = error.object[max(0, error.start - 40):error.end]
        raise InputError(f"{path}: a name that is not UTF-8 cannot stand in it: {name!r}") from None
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # not the temporary name
    finally:
        with suppress(OSError):
            temporary.unlink()


def same_file(a, b):
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def outside_hint(path, rows):
    """What to say of a manifest beside its name, where its sound lies outside its folder."""
    inside = not any(os.path.relpath(row.audio, Path(path).parent).split(os.sep)[0] == os.pardir
                     for row in rows)
    return "" if inside else "; the sound lies outside its folder, read it with --allow-outside"


# ---- What an order costs: how long a translated word waits, how much is guessed ------------------
def delays(row, pairs):
    """How far behind its evidence each linked word of a translation is written: [(words, seconds)].

    Its evidence is the last source word it is linked to. It can be written once the source word
    before it in `pairs` has been spoken (none: index -1, 0 s). Words: the difference of the two
    indices; seconds: of their two end times (NaN where unknown). Below zero the word must be
    guessed. A word without a link has no evidence and no delay.
    """
    evidence = {}
    for lang, links in row.links.items():
        for i, j in sorted(links):
            evidence[f"<st:{lang}>", j] = i
    ends = [math.nan if end is None else end for end in row.times or [None] * len(pairs)]
    ends.append(0.0)  # at index -1: before the first word
    written, found = Counter(), []
    for tag, _ in pairs:
        spoken, source = written[ASR] - 1, evidence.get((tag, written[tag]))
        if source is not None:
            found.append((spoken - source, ends[spoken] - ends[source]))
        written[tag] += 1
    return found


def project_times(row):
    """Times of translations without any: a word could be said when the last word linked to it has
    been.

    A stand-in for times found by a trained translation transducer (align.py --times). For one
    translation, mode `time` then differs from `align` in two things only: first words without a
    link wait for the first linked one, and source words that share a time, or lack one, count as
    one.
    """
    ends = rising(row.times or [])
    if not ends or math.inf in ends:    # no time is known
        return
    for lang, links in row.links.items():
        if links and lang not in row.st_times:
            row.st_times[lang] = [None] * len(units(row.st[lang]))
            for i, j in sorted(links):
                row.st_times[lang][j] = ends[i]


def _mean(values):
    return sum(values) / len(values) if values else math.nan


def cost_of(rows, mode, tokenizer):
    """(rows that have what the mode needs, [six numbers of the table]); NaN where unknown.

    "behind" are the mean and the 90th percentile of the delays; a guessed word, whose delay is
    negative, counts as 0 there, or guesses would make up for waiting.
    """
    usable, guessed, words, seconds = [], [], [], []
    for row in rows:
        try:
            pairs = interleave(row, mode)
        except InputError:
            continue
        usable.append((row, pairs))
        for n, s in delays(row, pairs) if mode != "st" else []:
            guessed.append(n < 0)
            words.append(max(0, n))
            if not math.isnan(s):
                seconds.append(max(0.0, s))
    streams = [serialize(pairs, tokenizer) for _, pairs in usable]
    n_tags = sum(token < tokenizer.first_byte for ids in streams for token in ids)
    n_words = sum(len(pairs) for _, pairs in usable) or math.nan
    timed = [(len(ids), row.duration) for (row, _), ids in zip(usable, streams) if row.duration]
    rate = sum(n for n, _ in timed) / sum(s for _, s in timed) if timed else math.nan
    percentile = sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1] if seconds else math.nan
    return len(usable), [rate, n_tags / n_words, 100 * _mean(guessed), _mean(words),
                         _mean(seconds), percentile]


def print_table(rows, size):
    """A line per mode: how much there is to write, and how late. `size`: of the vocabulary."""
    texts = [text for row in rows for text in [row.asr or "", *row.st.values()]]
    tags = [ASR, *sorted({f"<st:{lang}>" for row in rows for lang in row.st})]
    tokenizer = Tokenizer.train(texts, size, tags)
    print("mode         rows   tokens/s  tags/word  guessed %    words behind   s behind"
          "   90th pct")
    for mode in MODES:
        n_rows, numbers = cost_of(rows, mode, tokenizer)
        cells = ["-" if math.isnan(number) else f"{number:.2f}" for number in numbers]
        print("{:10}{:7}{:>11}{:>11}{:>11}{:>16}{:>11}{:>11}".format(mode, n_rows, *cells))


# ---- Importers: manifests from what people have --------------------------------------------------
# Each takes one file or more and gives rows; bad lines are told and skipped, or raise, as in
# read_manifest. Lines about the same stretch of sound become one row with several texts, so that
# CoVoST's en_de and en_fr, or NeMo's recognition and translation, make a one-to-many corpus.
def import_covost(*paths, strict=False, on_bad=None):
    """CoVoST 2: path, sentence, translation, client_id, as its get_covost_splits.py writes them.

    Its sound lies in clips/ beside the TSV; the TSV's name tells the languages. Ids are the paths
    without their suffix.
    """
    intake = Intake(strict, on_bad, by_sound=True)
    for path in paths:
        code = "([a-z]{2,3}(?:-[A-Za-z]+)?)"             # fr, sv-SE
        languages = re.findall(rf"\.{code}_{code}(?=\.)", Path(path).name)
        if not languages:
            raise InputError(f"{path}: the name should tell the languages, "
                             "as covost_v2.fr_en.train.tsv does")
        source, target = languages[-1]
        columns = {"audio": "path", "asr": "sentence", f"st.{target}": "translation"}
        optional = {"speaker": "client_id"}
        with intake.file(path):
            for number, record in tsv_records(path, intake, columns, optional):
                with intake.line(path, number):
                    clip = record["audio"]
                    record |= {"id": os.path.splitext(clip)[0], "lang": source}
                    intake.add(record | {"audio": _under("clips", clip)}, path, number, True)
    return with_durations(intake)


def import_tsv(*paths, columns, folder="", allow_outside=False, strict=False, on_bad=None):
    """Any TSV with a header: `columns` says which of its columns is what.

    {"audio": "path", "asr": "sentence", "st.en": "translation"}, and also id, lang, speaker, start
    and duration (seconds); columns not named are kept under their own names, but for those called
    like a key of the manifest, which are left out. Cells are not quoted; a backslash escapes a tab,
    a line's end, a quote and itself, and before anything else it is one. The sound lies in
    `folder`, seen from the TSV's.
    """
    intake = Intake(strict, on_bad, by_sound=True)
    known = [key for key in KINDS if _is_column(key)]
    for ours in columns:
        if not _is_column(ours):
            raise InputError(f"no column {ours!r}; there are {', '.join(known)} and st.LANGUAGE")
    if "audio" not in columns:
        raise InputError("the columns need audio=NAME")
    for path in paths:
        with intake.file(path):
            for number, record in tsv_records(path, intake, columns, {}):
                with intake.line(path, number):
                    record["audio"] = record["audio"] and os.path.join(folder, record["audio"])
                    intake.add(record, path, number, allow_outside)
    return with_durations(intake)


def _is_column(name):
    return KINDS.get(name) in (str, float, AUDIO) or re.fullmatch(r"st\.\S+", name) is not None


def _escape(match):
    """A backslash that escapes nothing, as in C:\\words, is doubled: csv would drop it."""
    return match[0] if match[1] in '\t\r"\\' else "\\" + match[0]


def tsv_records(path, intake, columns, optional):
    """Yield (line number, record) of a TSV; bad lines go to the intake.

    csv with backslashes and without quotes: what csv.writer and pandas write for QUOTE_NONE with
    an escape character. A line must have as many cells as the header: a stray tab would shift the
    texts to other columns. `columns` must be in the header, `optional` may.
    """
    # A CR that ends no line is white space, as in read_lines; to csv it would be an error.
    text = (line.decode(errors="surrogateescape") for _, line in read_lines(path))
    text = (re.sub(r"(?<!\\)\r\Z", "", line) for line in text)
    text = (re.sub(r"\\(.?)", _escape, line).replace("\r", " ") + "\n" for line in text)
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
    header = _header(path, reader, columns)
    columns = columns | {ours: name for ours, name in optional.items() if name in header}
    while True:
        number, cells = reader.line_num + 1, ()
        with intake.line(path, number):
            cells = _next_cells(reader)
            if cells and len(cells) != len(header):
                joined = (f"; lines {number} to {reader.line_num} are one, as a backslash ends the "
                          "line before") * (reader.line_num > number)
                raise InputError(f"{len(cells)} cells where the header has {len(header)}{joined}")
            if cells:
                record = _tsv_record(dict(zip(header, cells)), columns)
                yield number, record
        if cells is None:
            return


def _next_cells(reader):
    """The cells of the next line; None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:  # a cell beyond all bounds
        raise InputError(str(error)) from None


def _header(path, reader, columns):
    try:
        header = _next_cells(reader) or []
        header = decode("\t".join(header).encode(errors="surrogateescape")).split("\t")
    except InputError as error:
        raise InputError(f"{path}:1: {error}") from None
    if missing := [name for name in columns.values() if name not in header]:
        raise InputError(f"{path}:1: no column {', '.join(missing)!r} in the header "
                         f"{header!r:.200}")
    if len(set(header)) < len(header):
        raise InputError(f"{path}:1: a column stands twice in the header {header!r:.200}")
    return header


def _tsv_record(cells, columns):
    """{name in the file: text} -> the object of a manifest's line."""
    decode("\t".join(cells.values()).encode(errors="surrogateescape"))  # refuses what is not UTF-8
    record = {name: text for name, text in cells.items() if name not in {*columns.values(), *KINDS}}
    record["st"] = {}
    for ours, name in columns.items():
        if ours.startswith("st."):
            record["st"][ours.removeprefix("st.")] = cells[name]
        elif KINDS[ours] is float:
            record[ours] = _number(cells[name]) if cells[name].strip() else None
        else:
            record[ours] = cells[name]
    return record


def _number(text):
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text!r:.60} is not a number") from None


def _under(folder, name):
    """The path of a file of a corpus, which must lie in that corpus's folder."""
    if not name or os.path.isabs(name) or ".." in Path(name).parts:
        raise InputError(f"{name!r:.200} is no file inside {folder}")
    return f"{folder}/{name}"


def import_mustc(*paths, strict=False, on_bad=None):
    """MuST-C, and mTEDx: txt/dev.yaml with one mapping per line, its sound in wav/ beside txt/.

    Beside it dev.en and the translations, dev.de and so on, with one text per line. What is spoken
    tells the folder's name, es-en; without one, it is English.
    """
    intake = Intake(strict, on_bad, by_sound=True)
    for path in map(Path, paths):
        with intake.file(path):
            mappings = read_lines(path)
            while mappings and not mappings[-1][1].strip():
                mappings.pop()
            pairs = [part for part in path.absolute().parts
                     if re.fullmatch("[a-z]{2}-[a-z]{2}", part)]
            spoken = pairs[-1][:2] if pairs else "en"
            texts = _mustc_texts(path, len(mappings), spoken)
            for number, line in mappings:
                with intake.line(path, number):
                    record = _mustc_record(decode(line), number)
                    flac = os.path.splitext(record["audio"])[0] + ".flac"    # as mTEDx's sound is
                    if (os.path.exists(path.parent / flac)
                            and not os.path.exists(path.parent / record["audio"])):
                        record["audio"] = flac
                    if record["id"] in intake.ids:  # as in another pair's folder
                        record["id"] = None
                    said = {lang: _decode_line(lines[number - 1], path.with_suffix(f".{lang}"))
                            for lang, lines in texts.items()}
                    record |= {"lang": spoken, "asr": said.pop(spoken), "st": said}
                    intake.add(record, path, number, allow_outside=True)
    return with_durations(intake)


def _mustc_texts(path, n_lines, spoken):
    """{language: [(number, line)]} of the files beside the YAML."""
    files = {file.suffix[1:]: file for file in sorted(path.parent.iterdir())
             if file.stem == path.stem and re.fullmatch(r"\.[a-z]{2}", file.suffix)}
    texts = {lang: read_lines(file) for lang, file in files.items()}
    for lang, lines in texts.items():
        while len(lines) > n_lines and not lines[-1][1].strip():
            lines.pop()
        if len(lines) != n_lines:
            hint = ("an empty last line needs its end, too" if len(lines) == n_lines - 1 else
                    f"is it a text in {lang!r}?")
            raise InputError(f"{path} has {n_lines} lines, but {files[lang].name} {len(lines)}; "
                             f"{hint}")
    if spoken not in texts:
        raise InputError(f"{path}: no {path.stem}.{spoken} beside it")
    return texts


def _mustc_record(line, number):
    mapping = re.fullmatch(r"\s*-\s*\{(.*)\}\s*", line)
    if not mapping:
        raise InputError(f"not a mapping, as - {{duration: 3.5, ...}}: {line!r:.60}")
    pairs = re.findall(r"""(\w+):\s*('(?:[^']|'')*'|"[^"]*"|[^,]*)""", mapping[1])
    cells = {key: value[1:-1].replace("''", "'") if value[:1] == "'" else value.strip(' "')
             for key, value in pairs}
    if missing := {"wav", "offset", "duration"} - cells.keys():
        raise InputError(f"no {', '.join(sorted(missing))}")
    return {"id": f"{Path(cells['wav']).stem}_{number}", "audio": _under("../wav", cells["wav"]),
            "start": _number(cells["offset"]), "duration": _number(cells["duration"]),
            "speaker": cells.get("speaker_id")}


def _decode_line(numbered, path):
    number, line = numbered
    try:
        return decode(line)
    except InputError as error:
        raise InputError(f"{path}:{number}: {error}") from None


def import_nemo(*paths, strict=False, on_bad=None):
    """NeMo and Canary, JSON lines: one per sound and text.

    `text` is a transcription or, where target_lang is not source_lang, the translation; with an
    `answer` that differs, as in Granary, that is the translation and `text` what was said. The
    sound may lie anywhere, for these files name it by absolute paths.
    """
    intake = Intake(strict, on_bad, by_sound=True)
    for path in paths:
        with intake.file(path):
            for number, line in read_lines(path):
                with intake.line(path, number):
                    if line.strip():
                        record = _nemo_record(from_json(decode(line)))
                        intake.add(record, path, number, allow_outside=True)
    return with_durations(intake)


def _nemo_record(cells):
    if not isinstance(cells, dict) or cells.get("audio_filepath") is None:
        raise InputError(f"not a JSON object with audio_filepath: {cells!r:.60}")
    source = cells.get("source_lang") or cells.get("lang") or ""
    target = cells.get("target_lang") or source
    for name, language in {"source_lang": source, "target_lang": target}.items():
        if not isinstance(language, str):
            raise InputError(f"{name} cannot be {language!r:.60}")
    if target and not source:
        raise InputError(f"target_lang {target!r} without source_lang: is the text a transcription "
                         "or a translation?")
    used = {"audio_filepath", "offset", "source_lang", "target_lang", "text", "answer", *KINDS}
    record = {key: value for key, value in cells.items() if key not in used}
    text, answer = cells.get("text"), cells.get("answer")
    answer = None if answer == "na" else answer     # Canary's mark of an answer to be found
    if target == source:
        record["asr"] = answer if text is None else text
    elif text and answer and text != answer:
        record |= {"asr": text, "st": {target: answer}}
    else:
        record["st"] = {target: answer if text is None else text}
    names = {key: cells.get(key) for key in ("id", "speaker")}
    return record | names | {"audio": cells["audio_filepath"], "lang": source,
                             "start": cells.get("offset"), "duration": cells.get("duration")}


IMPORTERS = {"covost": import_covost, "mustc": import_mustc, "nemo": import_nemo, "tsv": import_tsv}


def about_equal(one_s, other_s):
    """Whether two times or durations, or None, are the same but for rounding."""
    return one_s == other_s or None not in (one_s, other_s) and abs(one_s - other_s) < 0.05


def join_texts(first, row):
    """`row`, about the same sound as `first`, adds its texts to it; InputError if they differ."""
    if first.lang and row.lang and first.lang != row.lang:
        raise InputError(f"another language ({first.lang!r}) for the same sound stands at "
                         f"{first.where}")
    texts = {"asr": (first.asr, row.asr)}
    texts |= {lang: (first.st.get(lang), text) for lang, text in row.st.items()}
    for name, (one, another) in texts.items():
        if one and another and one != another:
            raise InputError(f"another text ({name}) for the same sound stands at {first.where}")
    first.asr, first.lang = first.asr or row.asr, first.lang or row.lang
    first.speaker = first.speaker or row.speaker
    first.st |= {lang: first.st.get(lang) or text for lang, text in row.st.items()}
    first.other = row.other | first.other


def with_durations(intake):
    """The rows of an importer, with the durations that their files did not tell."""
    lacking = [row for row in intake.rows if row.duration is None]
    try:
        import soundfile  # noqa: F401
    except (ImportError, OSError):  # OSError: its library is missing
        if lacking:
            intake.tell(f"{len(lacking)} rows get no duration: pip install soundfile")
        return intake.rows
    if len(lacking) > 1000:
        intake.tell(f"the sound of {len(lacking)} rows is read, for their durations")
    seconds = {path: sound_seconds(path) for path in dict.fromkeys(row.audio for row in lacking)}
    for row in lacking:
        if seconds[row.audio] is not None and seconds[row.audio] > row.start:
            row.duration = seconds[row.audio] - row.start
    if unknown := sum(row.duration is None for row in lacking):
        intake.tell(f"{unknown} rows get no duration: their sound is missing, not surely whole, or "
                    "ends before their start")
    return intake.rows


def sound_seconds(path):
    """The length of a sound file, counted by reading it; None where a doubt is left.

    With a duration, a row asks for that stretch and no more; where sound may be cut off, the row
    must go without, so that whoever reads it to the end finds out.
    """
    import soundfile
    if not os.path.isfile(path):
        return None
    try:
        # By descriptor: called back for each read, Python would lose Ctrl-C and other errors there.
        raw = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        with soundfile.SoundFile(raw, closefd=False) as file:
            n, claimed, rate = 0, file.frames, file.samplerate
            while block := len(file.read(65536, dtype="int16")):
                n += block
            # An MP3 may claim too little, of two files end to end the first alone is read, and what
            # a header promises may not be there: the library's log tells. Other things may follow
            # the sound in containers of chunks.
            unread = 0
            if file.format not in ("WAV", "WAVEX", "RF64", "AIFF", "CAF"):
                read = os.lseek(raw, 0, os.SEEK_CUR)
                unread = (os.path.getsize(path) - read) * n / max(1, read) / rate
            doubt = re.search("should be|end-of-stream|Junk after|ds64|Exiting parser",
                              file.extra_info)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError, MemoryError):
        return None
    finally:
        os.close(raw)
    # Rates that stream.py does not read are a damaged header's, and so is the length.
    sure = n == claimed and unread < 0.25 and not doubt and 4000 <= rate <= 200_000
    return n / rate if sure else None


# ---- The command line ----------------------------------------------------------------------------
def demonstrate():
    """One sentence in every mode, a word per line; then through the tokens and back."""
    row = Row("demo", "", asr="ieri ho comprato una macchina rossa",
              st={"en": "yesterday I bought a red car"},
              links={"en": [(0, 0), (2, 1), (1, 2), (2, 2), (3, 3), (5, 4), (4, 5)]},
              times=[0.5, 0.7, 1.3, 1.5, 2.1, 2.6], st_times={"en": [0.8, 1.4, 1.4, 1.6, 2.7, 2.9]})
    columns = []
    for mode in MODES:
        pairs = interleave(row, mode)
        columns.append([word if tag == ASR else "  > " + word for tag, word in pairs])
    for line in [MODES, *zip_longest(*columns, fillvalue="")]:
        print("".join(f"{cell:15}" for cell in line).rstrip())
    pairs = interleave(row, "align")
    tokenizer = Tokenizer.train([row.asr, row.st["en"]], 300, [ASR, "<st:en>"])
    ids = serialize(pairs, tokenizer)
    print(f"align in {len(ids)} tokens: {ids}")
    print(f"read back exactly: {parse(ids, tokenizer) == pairs}")


def read_arguments(arguments):
    parser = argparse.ArgumentParser(prog="serialize.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="manifests, or foreign files with --from")
    parser.add_argument("--from", dest="kind", choices=IMPORTERS,
                        help="the format of the files, if they are no manifests")
    parser.add_argument("--columns", metavar="OURS=THEIRS,...",
                        help="tsv: audio=path,asr=sentence,st.en=translation")
    parser.add_argument("--folder", help="tsv: where the sound lies, seen from the TSV")
    parser.add_argument("--allow-outside", action="store_true",
                        help="tsv: sound may lie outside the TSV's folder (of manifests, it may)")
    parser.add_argument("-o", "--out", help="write a manifest instead of the table")
    parser.add_argument("--size", type=int,
                        help="size of the vocabulary for the table (1000)")
    parser.add_argument("--project", action="store_true",
                        help="times of translations that have none: through the links")
    parser.add_argument("--strict", action="store_true",
                        help="stop at the first bad line instead of skipping it")
    options = parser.parse_args(arguments)
    for name, value in [*vars(options).items(), *(("a file's name", f) for f in options.files)]:
        if value == "":
            parser.error(f"{name} is empty, as is a variable of the shell that is not set")
    if arguments and not options.files:
        parser.error("which files?")
    if (options.kind == "tsv") != (options.columns is not None):
        parser.error("--from tsv needs --columns, and nothing else does")
    if options.folder and options.kind != "tsv":
        parser.error("--folder is for --from tsv")
    if options.allow_outside and options.kind not in (None, "tsv"):
        parser.error(f"--allow-outside is not for --from {options.kind}, whose sound has its place")
    if options.size is not None and options.out:
        parser.error("--size is for the table, which -o replaces")
    if options.project and options.kind:
        parser.error("--project is for manifests: what --from reads has no links")
    return options


def read_rows(options):
    """The rows of the files that the command line names."""
    if options.kind is None:  # no sound is opened here, so it may lie anywhere
        return read_manifests(options.files, options.strict, allow_outside=True)
    how = {}
    if options.kind == "tsv":
        columns = dict(pair.split("=", 1) for pair in options.columns.split(",") if "=" in pair)
        if len(columns) <= options.columns.count(","):
            raise InputError(f"--columns should be OURS=THEIRS,..., not {options.columns!r}")
        how = {"columns": columns, "folder": options.folder or ""}
        how["allow_outside"] = options.allow_outside
    return IMPORTERS[options.kind](*options.files, strict=options.strict, **how)


def main(arguments):
    """The exit code: 0, or 2 after one line about what is wrong."""
    options = read_arguments(arguments)
    try:
        if sys.stdout is None and not options.out:
            raise InputError("standard output is closed")
        if options.out:
            if any(same_file(options.out, path) for path in options.files):
                if options.kind:
                    raise InputError(f"{options.out}: is read, and would be replaced")
                options.strict = True    # or lines that are skipped would be gone
            check_target(options.out)
        rows = read_rows(options) if options.files else []
        for row in rows if options.project else []:
            project_times(row)
        if not options.out:
            if options.files:
                print_table(rows, 1000 if options.size is None else options.size)
            else:
                demonstrate()
            print(end="", flush=True)   # here, where a pipe that nobody reads is caught
            return 0
        write_manifest(options.out, rows)
        tell(f"{options.out}: {len(rows)} rows{outside_hint(options.out, rows)}")
        return 0
    except InputError as error:
        tell(f"serialize.py: {error}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:           # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        tell(f"serialize.py: {error.filename or 'output'}: {error.strerror}")
        # What a full disk did not take, Python would try again as it ends.
        if not error.filename and sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
