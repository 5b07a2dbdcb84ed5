"""Many streams <-> one stream: what the transducer is taught to write, and how to read it back.

One decoder writes the transcription and its translations as ONE sequence of tokens; a tag says whose words follow:

    <asr> ieri <st:en> yesterday <asr> ho comprato <st:en> I bought <asr> una <st:en> a <asr> macchina rossa ...

Training needs that sequence from separate texts (interleave -> serialize), captions need the separate texts back, word
by word, while the tokens are still coming (StreamParser). The way there is a choice of ORDER. A translated word placed
too early must be guessed, since the speech that says it has not been heard; placed too late, it keeps the listener
waiting. The order is named by a mode:

    ratio:G    a fixed rhythm; G = 0 writes all transcription first, 0.5 alternates, 1 all translation first
    align      a translated word as soon as every source word it is linked to has been written (links: align.py)
    time       every word when it could be said (times of both streams: align.py --times)
    asr, st    one stream alone, for the separate baselines; st:fr where there are several translations

Words are what white space separates. Nothing here knows about sound: a Row of a manifest says where it lies.
Standard library only. `python serialize.py` shows one sentence in every mode, `python serialize.py MANIFEST` measures.
"""
import heapq
import json
import math
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ASR = "<asr>"


# ---- Interleaving: several lists of words -> one list of (tag, word) ------------------------------------------------

def interleave_ratio(asr, st, gamma):
    """The next word comes from the transcription while (1 - gamma) (1 + n_st) >= gamma (1 + n_asr).

    n_asr and n_st count the words written so far; of several translations n_st counts the one that is furthest behind,
    and that one writes next (the first such in the dict's order). A finished stream no longer counts.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie between 0 and 1, not {gamma!r}")
    out, n_asr, n_st = [], 0, dict.fromkeys(st, 0)
    while True:
        unfinished = [lang for lang in st if n_st[lang] < len(st[lang])]
        behind = min(unfinished, key=n_st.get, default=None)
        if n_asr < len(asr) and (behind is None or (1 - gamma) * (1 + n_st[behind]) >= gamma * (1 + n_asr)):
            out.append((ASR, asr[n_asr]))
            n_asr += 1
        elif behind is not None:
            out.append((f"<st:{behind}>", st[behind][n_st[behind]]))
            n_st[behind] += 1
        else:
            return out


def needs(n_asr, words, links):
    """need(j): the index of the source word that must be written before target word j can be; one per target word.

    It is the last source word linked to any of the target words 0..j, because j cannot come before its predecessors.
    So an unlinked target word follows its predecessor at once, and before the first link need is 0.
    """
    last = [0] * len(words)
    for i, j in links:
        if not (0 <= i < n_asr and 0 <= j < len(words)):
            raise ValueError(f"link {i}-{j} lies outside the {n_asr} source and {len(words)} target words")
        last[j] = max(last[j], i)
    for j in range(1, len(words)):
        last[j] = max(last[j], last[j - 1])
    return last


def interleave_align(asr, st, links):
    """After source word i, write every pending target word with need(j) <= i; streams in the dict's order."""
    missing = [lang for lang in st if lang not in links]
    if missing:
        raise ValueError(f"no links for translation {missing[0]!r}")
    need = {lang: needs(len(asr), words, links[lang]) for lang, words in st.items()}
    out, n_st = [], dict.fromkeys(st, 0)
    for i in range(max(1, len(asr))):  # an empty source still lets every target word out
        out += [(ASR, word) for word in asr[i:i + 1]]
        for lang, words in st.items():
            while n_st[lang] < len(words) and need[lang][n_st[lang]] <= i:
                out.append((f"<st:{lang}>", words[n_st[lang]]))
                n_st[lang] += 1
    return out


def interleave_time(streams):
    """Merge {tag: [(word, end_s)]} by (end_s, order of the streams in the dict, index of the word).

    A stream keeps its own order: a time smaller than one before it counts as that earlier one. A word without a time
    (None) takes its predecessor's; at the head of a stream, the first time that is known; in a stream with no time at
    all, infinity. Equal times: the earlier stream goes first, so a transcribed word precedes what it allows to be said.
    """
    events = []
    for order, (tag, words) in enumerate(streams.items()):
        clock = next((end for _, end in words if end is not None), math.inf)
        for index, (word, end) in enumerate(words):
            if end is not None and math.isnan(end):
                raise ValueError(f"the time of word {index} of {tag} ({word!r}) is not a number")
            clock = clock if end is None else max(clock, end) if index else end
            events.append((clock, order, index, tag, word))
    return [(tag, word) for *_, tag, word in sorted(events)]


def interleave(row, mode):
    """The (tag, word) pairs of a row in the order that `mode` names; ValueError when the row lacks what it needs."""
    def wanted(what, present):
        if not present:
            raise ValueError(f"{row.where or row.id}: mode {mode!r} needs {what}")

    asr, st = (row.asr or "").split(), {lang: text.split() for lang, text in row.st.items()}
    kind, _, value = mode.partition(":")
    if kind in ("asr", "st"):
        wanted("a transcription", kind == "st" or asr)
        wanted("one translation; with several, name one, as in st:fr", kind == "asr" or value in st or len(st) == 1)
        tag, words = (ASR, asr) if kind == "asr" else (f"<st:{value or next(iter(st))}>", st[value or next(iter(st))])
        return [(tag, word) for word in words]
    wanted("a transcription and a translation", row.asr is not None and st)
    if kind == "ratio":
        return interleave_ratio(asr, st, _number(value, f"the ratio of mode {mode!r}"))
    if mode == "align":
        for lang, words in st.items():
            wanted(f"links for {lang!r} (align.py finds them)", row.links.get(lang) or not (asr and words))
        return interleave_align(asr, st, {lang: row.links.get(lang, []) for lang in st})
    if mode == "time":
        wanted("times of the transcription (align.py --times)", row.times is not None)
        streams = {ASR: list(zip(asr, row.times))}
        for lang, words in st.items():
            wanted(f"st_times of {lang!r} (align.py --times)", lang in row.st_times)
            streams[f"<st:{lang}>"] = list(zip(words, row.st_times[lang]))
        return interleave_time(streams)
    raise ValueError(f"unknown mode {mode!r}; there are align, time, ratio:G with G in 0..1, asr, st and st:LANGUAGE")


def deinterleave(pairs):
    """Undo any of them: {tag: [word]}, tags in the order of their first word."""
    streams = defaultdict(list)
    for tag, word in pairs:
        streams[tag].append(word)
    return dict(streams)


# ---- Tokenizer: words -> integers, without loss ---------------------------------------------------------------------

SEPARATOR = b" "  # ends every word: whoever writes a word's last token has finished the word


def _merge(ids, pair, new):
    out, k = [], 0
    while k < len(ids):
        step = 2 if k + 1 < len(ids) and (ids[k], ids[k + 1]) == pair else 1
        out.append(new if step == 2 else ids[k])
        k += step
    return out


class Tokenizer:
    """Byte-level BPE. Ids: 0 blank, then the tags, then the 256 bytes, then one per merge of two earlier ids.

    A word is its UTF-8 bytes and the separator, and a merge never reaches beyond them. So any text can be written, only
    the separator ends a word, and neither blank nor a tag can come out of text: text is made of bytes and merges.
    """

    def __init__(self, tags, merges=(), alphabet=""):
        self.tags, self.merges, self.alphabet = list(tags), [(a, b) for a, b in merges], alphabet
        if not self.tags or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"a tokenizer needs one or more different tags, not {self.tags}")
        self.tag_id = {tag: 1 + k for k, tag in enumerate(self.tags)}
        self.first_byte = 1 + len(self.tags)
        self.pieces = [b""] * self.first_byte + [bytes([b]) for b in range(256)]  # what each id writes
        for a, b in self.merges:
            if not self.first_byte <= min(a, b) <= max(a, b) < len(self.pieces) or SEPARATOR in self.pieces[a]:
                raise ValueError(f"merge {a}, {b} does not join two earlier pieces of one word")
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.rank = {pair: self.first_byte + 256 + k for k, pair in enumerate(self.merges)}
        self._cache = {}

    def __len__(self):
        return len(self.pieces)

    @classmethod
    def train(cls, texts, size, tags=(ASR,)):
        """Merge the most frequent pair of neighbours until there are `size` ids, or until no pair occurs twice.

        Equal counts: the pair of smaller ids goes first, so the result depends on how often each word occurs and on
        nothing else. Only the words that hold a merged pair are counted anew. A heap finds the best pair; an entry
        whose count has fallen since is put back with its new count when it comes up (counts of old pairs only fall).
        """
        counts = Counter(word for text in texts for word in text.split())
        plain = cls(tags, alphabet="".join(sorted(set("".join(counts)))))
        if size < len(plain):
            raise ValueError(f"a vocabulary of {size} is too small: blank, tags and bytes alone are {len(plain)}")
        words = [(plain.encode_word(word), count) for word, count in counts.items()]
        frequency, holders = Counter(), defaultdict(set)

        def count_pairs(k, sign):
            ids, count = words[k]
            for pair in zip(ids, ids[1:]):
                frequency[pair] += sign * count
                holders[pair].add(k)

        for k in range(len(words)):
            count_pairs(k, 1)
        heap = [(-count, pair) for pair, count in frequency.items()]
        heapq.heapify(heap)
        merges = []
        while heap and len(plain) + len(merges) < size:
            count, pair = heapq.heappop(heap)
            if -count != frequency[pair]:
                heapq.heappush(heap, (-frequency[pair], pair))
                continue
            if frequency[pair] < 2:
                break
            new = len(plain) + len(merges)
            merges.append(pair)
            born = set()
            for k in holders.pop(pair):
                count_pairs(k, -1)
                words[k] = (_merge(words[k][0], pair, new), words[k][1])
                count_pairs(k, 1)
                born.update(p for p in zip(words[k][0], words[k][0][1:]) if new in p)
            for p in born:
                heapq.heappush(heap, (-frequency[p], p))
        return cls(tags, merges, plain.alphabet)

    def encode_word(self, word):
        """The ids of one word: the bytes, then again and again the merge that was learned first. Kept in a cache."""
        ids = self._cache.get(word)
        if ids is None:
            if word.split() != [word]:
                raise ValueError(f"{word!r} is not a word: empty, or with white space in it")
            ids = [self.first_byte + byte for byte in _utf8(word) + SEPARATOR]
            while len(ids) > 1:
                pair = min(zip(ids, ids[1:]), key=lambda pair: self.rank.get(pair, math.inf))
                if pair not in self.rank:
                    break
                ids = _merge(ids, pair, self.rank[pair])
            self._cache[word] = ids
        return ids

    def encode(self, text):
        return [token for word in text.split() for token in self.encode_word(word)]

    def decode(self, ids):
        return " ".join(word for _, word in parse(ids, self))

    def unseen(self, text):
        """The characters of `text` that the training text did not have: encoded, but as bytes never learned."""
        return set("".join(text.split())) - set(self.alphabet)

    def to_dict(self):
        return {"tags": list(self.tags), "merges": [list(pair) for pair in self.merges], "alphabet": self.alphabet}

    @classmethod
    def from_dict(cls, data):
        try:
            return cls(data["tags"], data["merges"], data.get("alphabet", ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the data of a tokenizer: {error!r}") from None


def _utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate, {text[error.start]!r}, in {text[:60]!r}") from None


# ---- One stream of tokens, written and read -------------------------------------------------------------------------

def serialize(pairs, tokenizer):
    """(tag, word) pairs -> ids, with a tag's id before the first word and wherever the stream changes."""
    ids, current = [], None
    for tag, word in pairs:
        if tag not in tokenizer.tag_id:
            raise ValueError(f"the tokenizer has no tag {tag!r}, only {' '.join(tokenizer.tags)}")
        if tag != current:
            ids.append(tokenizer.tag_id[tag])
            current = tag
        ids += tokenizer.encode_word(word)
    return ids


class StreamParser:
    """The way back, one id at a time, for ANY ids, also those of a model that has not learned the rules yet.

    A word comes out with the token that ends it, whole characters only. A tag in the middle of a word ends that word;
    words before any tag belong to the first tag; blank does nothing. What is not UTF-8 becomes U+FFFD and is counted
    in `invalid`. No word is empty or holds white space (a model can write the bytes of a no-break space).
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.tag = tokenizer, tokenizer.tags[0]
        self.pending, self.invalid = b"", 0

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


def parse(ids, tokenizer):
    """ids -> (tag, word) pairs; parse(serialize(pairs)) == pairs."""
    parser = StreamParser(tokenizer)
    return [pair for token in ids for pair in parser.feed(token)] + parser.flush()


# ---- Manifests: one utterance per line, in JSON ---------------------------------------------------------------------

@dataclass
class Row:
    """One utterance: where its sound lies and what is said in it. Words are counted from 0, times are in seconds."""
    id: str
    audio: str                                                       # path, already joined to the manifest's folder
    start: float = 0.0
    duration: float | None = None                                    # None: to the end of the file
    lang: str = ""
    asr: str | None = None
    st: dict[str, str] = field(default_factory=dict)                 # language -> translation
    links: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # language -> (word of asr, word of st)
    times: list[float] | None = None                                 # end of each word of asr; None where unknown
    st_times: dict[str, list[float]] = field(default_factory=dict)   # language -> when each word could be said
    speaker: str = ""
    where: str = field(default="", compare=False)                    # file:line, for messages


def _number(value, name):
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not a number >= 0")
    return number


def _text(value, name):
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not text")
    _utf8(value)
    return " ".join(value.split())


def _times(values, n_words, name):
    if not isinstance(values, list) or len(values) != n_words:
        raise ValueError(f"{name} must be a list of {n_words} times, one for each word, not {values!r:.60}")
    return [None if value is None else _number(value, name) for value in values]


def _links(text, n_asr, words, name):
    try:
        pairs = [tuple(map(int, link.split("-"))) for link in text.split()]
        needs(n_asr, words, pairs)  # checks the range
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name} {text!r:.60}: {error}; expected is '0-0 1-2', indices of words from 0") from None
    return pairs


def _row(record, path, number, allow_outside):
    """A Row from one line's JSON object; ValueError for everything that later code could stumble over."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, not {record!r:.60}")

    def by_language(key):
        value = record.get(key) or {}
        if not isinstance(value, dict) or key != "st" and set(value) - set(st):
            raise ValueError(f"{key} must be an object with a language of st as key, not {value!r:.60}")
        return value.items()

    audio = record.get("audio")
    if not isinstance(audio, str) or not _utf8(audio) or "\0" in audio:
        raise ValueError(f"audio {audio!r} is not a path")
    if not allow_outside and (os.path.isabs(audio) or ".." in Path(audio).parts):
        raise ValueError(f"audio {audio!r} leaves the manifest's folder; --allow-outside permits that")
    st = {}
    st = {_text(lang, "a language of st"): _text(text, f"st {lang}") for lang, text in by_language("st")}
    asr = None if record.get("asr") is None else _text(record["asr"], "asr")
    if not asr and not any(st.values()):
        raise ValueError("no text: neither asr nor st has a word")
    n_asr, n_st = len((asr or "").split()), {lang: len(text.split()) for lang, text in st.items()}
    duration, times = record.get("duration"), record.get("times")
    return Row(
        id=str(record.get("id", f"{Path(path).stem}:{number}")),
        audio=os.path.normpath(os.path.join(os.path.dirname(path), audio)),
        start=_number(record.get("start", 0.0), "start"),
        duration=None if duration is None else _number(duration, "duration"),
        lang=_text(record.get("lang", ""), "lang"), asr=asr, st=st,
        links={lang: _links(text, n_asr, st[lang].split(), f"links {lang}") for lang, text in by_language("links")},
        times=None if times is None else _times(times, n_asr, "times"),
        st_times={lang: _times(values, n_st[lang], f"st_times {lang}") for lang, values in by_language("st_times")},
        speaker=_text(record.get("speaker", ""), "speaker"), where=f"{path}:{number}")


def read_manifest(path, strict=False, *, allow_outside=False, on_bad=None):
    """The rows of a JSON-lines manifest. Unknown keys and empty lines are ignored.

    A bad line raises ValueError with file and line if `strict`; else it is told to on_bad(message), skipped and
    counted, and the count is told at the end. A manifest that cannot be read or has no usable row is a ValueError.
    """
    on_bad = on_bad or (lambda message: print(message, file=sys.stderr))
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    rows, bad = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line.decode("utf-8-sig")), path, number, allow_outside))
        except (ValueError, RecursionError) as error:
            if strict:
                raise ValueError(f"{path}:{number}: {error}") from None
            on_bad(f"{path}:{number}: skipped: {error}")
            bad += 1
    if bad:
        on_bad(f"{path}: {bad} of {bad + len(rows)} rows skipped")
    if not rows:
        raise ValueError(f"{path}: no usable row in the manifest")
    return rows


def write_manifest(path, rows):
    """Write what read_manifest reads, under a temporary name first, so that there is no half-written manifest."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                record = {key: value for key, value in vars(row).items() if value not in (None, "", {}) and key != "where"}
                record["audio"] = os.path.relpath(row.audio, path.parent)
                if row.links:
                    record["links"] = {k: " ".join(f"{i}-{j}" for i, j in pairs) for k, pairs in row.links.items()}
                print(json.dumps(record, ensure_ascii=False), file=file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
