"""The laws of interleaving and of the tokens on random input, and what can be wrong with rows."""
import csv
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import serialize as module  # noqa: E402
from serialize import (ASR, InputError, Row, StreamParser, Tokenizer, deinterleave,  # noqa: E402
                       interleave, interleave_align, interleave_ratio, interleave_time, join,
                       mode_of, needs, parse, read_manifest, serialize, units,
                       write_manifest)

settings.register_profile("here", deadline=None, max_examples=150)
settings.load_profile("here")

# Any word at all: every character that is neither white space nor a surrogate, NUL and tags and
# U+FFFD included.
ANY_WORD = some.one_of(
    some.text(some.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).map(
        lambda s: "".join(s.split())),
    some.sampled_from(["<asr>", "<st:fr>", "\0", "\ufffd", "a\0b", "🙂", "ế", "e\u0301",
                       "\u200b"])).filter(bool)
WORDS = some.lists(ANY_WORD, max_size=8)


@some.composite
def bitexts(draw):
    """A transcription, one to three translations and links between them."""
    asr, st, links = draw(WORDS), {}, {}
    some_langs = some.sampled_from(["fr", "de", "en"])
    for lang in draw(some.lists(some_langs, min_size=1, max_size=3, unique=True)):
        st[lang] = draw(WORDS)
        links[lang] = []
        if asr and st[lang]:
            pair = some.tuples(some.integers(0, len(asr) - 1), some.integers(0, len(st[lang]) - 1))
            links[lang] = draw(some.lists(pair, max_size=10))
    return asr, st, links


def streams_of(asr, st):
    streams = {ASR: asr} | {f"<st:{lang}>": words for lang, words in st.items()}
    return {tag: words for tag, words in streams.items() if words}


# ---- Interleaving --------------------------------------------------------------------------------

def align_by_the_book(asr, st, links):
    """The definition: write a source word, then all that has its evidence and all before it out."""
    out, n = [], dict.fromkeys(st, 0)
    for i in range(max(1, len(asr))):
        out += [(ASR, asr[i])] if asr else []
        for lang, words in st.items():
            while n[lang] < len(words) and all(s <= i for s, t in links[lang] if t <= n[lang]):
                out.append((f"<st:{lang}>", words[n[lang]]))
                n[lang] += 1
    return out


def ratio_by_the_book(asr, st, gamma):
    out, n_asr, n_st = [], 0, dict.fromkeys(st, 0)
    while n_asr < len(asr) or any(n_st[lang] < len(st[lang]) for lang in st):
        open_ = [lang for lang in st if n_st[lang] < len(st[lang])]
        least = min((n_st[lang] for lang in open_), default=None)
        if n_asr < len(asr) and (least is None or (1 - gamma) * (1 + least) >= gamma * (1 + n_asr)):
            out.append((ASR, asr[n_asr]))
            n_asr += 1
        else:
            lang = [lang for lang in open_ if n_st[lang] == least][0]
            out.append((f"<st:{lang}>", st[lang][n_st[lang]]))
            n_st[lang] += 1
    return out


def broken_laws(asr, st, links, pairs):
    """The laws that an interleaving breaks.

    Words or order changed; a word before its evidence; a needless wait.
    """
    broken = set()
    if deinterleave(pairs) != streams_of(asr, st):
        return {"streams"}
    written = Counter()
    for tag, _ in pairs:
        if tag != ASR:
            evidence = max((i for i, j in links[tag[4:-1]] if j == written[tag]), default=-1)
            need = max((i for i, j in links[tag[4:-1]] if j <= written[tag]), default=0)
            broken |= {"too early"} if written[ASR] <= evidence else set()
            broken |= {"too late"} if written[ASR] > max(need, 0) + 1 else set()
        written[tag] += 1
    return broken


@given(bitexts())
def test_align_obeys_its_laws_and_its_definition(bitext):
    pairs = interleave_align(*bitext)
    assert not broken_laws(*bitext, pairs)
    assert pairs == align_by_the_book(*bitext)


def test_the_laws_find_what_they_should():
    """Negative controls: an order that cannot see the links, links turned round, a lazy order."""
    asr, st = list("abcd"), {"fr": list("wxyz")}
    links = {"fr": [(0, 0), (3, 1), (1, 2), (2, 3)]}
    turned = {"fr": [(j, i) for i, j in links["fr"]]}
    assert broken_laws(asr, st, links, interleave_align(asr, st, links)) == set()
    assert broken_laws(asr, st, links, interleave_ratio(asr, st, 0.5)) == {"too early"}
    assert "too early" in broken_laws(asr, st, links, interleave_align(asr, st, turned))
    assert broken_laws(asr, st, links, interleave_ratio(asr, st, 0)) == {"too late"}
    other = interleave_align(asr, {"fr": list("wyxz")}, links)
    assert broken_laws(asr, st, links, other) == {"streams"}


def test_align_on_the_sentence_of_the_documentation():
    asr = "ieri ho comprato una macchina rossa".split()
    st = {"en": "yesterday I bought a red car".split()}
    links = [(0, 0), (2, 1), (1, 2), (2, 2), (3, 3), (5, 4), (4, 5)]
    pairs = interleave_align(asr, st, {"en": links})
    tokens = Tokenizer.train([" ".join(asr)], 300, [ASR, "<st:en>"])
    text = ""
    for token in serialize(pairs, tokens):
        is_tag = 0 < token < tokens.first_byte
        text += f" {tokens.tags[token - 1]} " if is_tag else tokens.pieces[token].decode()
    assert text.split() == ("<asr> ieri <st:en> yesterday <asr> ho comprato <st:en> I bought "
                            "<asr> una <st:en> a <asr> macchina rossa <st:en> red car").split()


def test_words_without_links():
    asr, links = ["a", "b"], {"fr": [(1, 1)]}
    assert needs(2, ["x", "y", "z"], [(1, 1)]) == [0, 1, 1]
    assert interleave_align(asr, {"fr": ["x", "y", "z"]}, links) == [
        (ASR, "a"), ("<st:fr>", "x"), (ASR, "b"), ("<st:fr>", "y"), ("<st:fr>", "z")]
    assert interleave_align([], {"fr": ["x", "y"]}, {"fr": []}) == [
        ("<st:fr>", "x"), ("<st:fr>", "y")]
    for link in [(2, 0), (0, 3), (-1, 0), (0, -1)]:
        with pytest.raises(ValueError, match="lies outside 2 source and 3 target words"):
            interleave_align(asr, {"fr": ["x", "y", "z"]}, {"fr": [link]})


@given(bitexts(), some.sampled_from([0, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.9, 1]))
def test_ratio_is_its_definition(bitext, gamma):
    asr, st, _ = bitext
    pairs = interleave_ratio(asr, st, gamma)
    assert deinterleave(pairs) == streams_of(asr, st)
    assert pairs == ratio_by_the_book(asr, st, gamma)


def test_ratio_at_0_half_and_1():
    asr, st = ["a", "b", "c"], {"fr": ["x", "y", "z"]}
    assert "".join(word for _, word in interleave_ratio(asr, st, 0)) == "abcxyz"
    assert "".join(word for _, word in interleave_ratio(asr, st, 0.5)) == "axbycz"
    assert "".join(word for _, word in interleave_ratio(asr, st, 1)) == "xyzabc"
    st |= {"de": ["1", "2"]}
    assert "".join(word for _, word in interleave_ratio(asr, st, 0.5)) == "ax1by2cz"
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="gamma must lie between 0 and 1"):
            interleave_ratio(asr, st, gamma)


TIMES = some.one_of(some.none(), some.integers(0, 6).map(lambda n: n / 2), some.floats(0, 9))


TIMED = some.lists(some.tuples(ANY_WORD, TIMES), max_size=8)


@given(some.dictionaries(some.sampled_from([ASR, "<st:fr>", "<st:de>"]), TIMED))
def test_time_merges_by_the_running_maximum(streams):
    pairs = interleave_time(streams)
    assert deinterleave(pairs) == {
        tag: [word for word, _ in words] for tag, words in streams.items() if words}
    position, seen = {}, Counter()
    for k, (tag, _) in enumerate(pairs):
        position[tag, seen[tag]] = k
        seen[tag] += 1
    # A word follows exactly the words of other streams that come no later.
    for first, ours in enumerate(streams):
        for other in list(streams)[first + 1:]:
            for i, (_, a) in enumerate(streams[ours]):
                for j, (_, b) in enumerate(streams[other]):
                    if a is not None and b is not None:
                        a_clock = max(t for _, t in streams[ours][:i + 1] if t is not None)
                        b_clock = max(t for _, t in streams[other][:j + 1] if t is not None)
                        assert (position[ours, i] < position[other, j]) == (a_clock <= b_clock)


def written(**streams):
    pairs = interleave_time(
        {tag: list(zip(words, times)) for tag, (words, times) in streams.items()})
    return "".join(word for _, word in pairs)


def test_time_ties_missing_and_falling_times():
    # Equal times: the earlier stream goes first.
    assert written(asr=("ab", [1, 2]), st=("xy", [1, 2])) == "axby"
    assert written(st=("xy", [1, 2]), asr=("ab", [1, 2])) == "xayb"
    assert written(asr=("abc", [1, 5, 2]), st=("xy", [3, 5])) == "axbcy"  # 2 after 5 counts as 5
    assert written(asr=("ab", [1, 2]), st=("xy", [1, None])) == "axyb"  # no time: its predecessor's
    # At the head: the first that is known.
    assert written(asr=("abc", [1, 2, 3]), st=("xy", [None, 2])) == "abxyc"
    assert written(asr=("ab", [1, 2]), st=("xy", [None, None])) == "abxy"  # no time at all: the end
    assert written() == "" and written(asr=("", [])) == ""


def test_time_is_align_where_times_go_through_the_links():
    """For one pair: if a word may be said when its last linked word ends, both write the same."""
    rng = random.Random(1)
    for _ in range(200):
        n, m = rng.randint(1, 8), rng.randint(1, 8)
        links = sorted({(rng.randrange(n), j) for j in range(m) for _ in range(rng.randint(1, 2))})
        ends = sorted(rng.sample(range(100), n))
        said = [max(ends[i] for i, k in links if k == j) for j in range(m)]
        row = Row("a", "a", asr=" ".join(map(str, range(n))),
                  st={"fr": " ".join(map(str, range(m)))},
                  links={"fr": links}, times=ends, st_times={"fr": said})
        assert interleave(row, "time") == interleave(row, "align")


def test_projected_times_are_the_rising_ones():
    row = Row("a", "", asr="a b c d", st={"en": "w x y z"},
              links={"en": [(0, 0), (1, 1), (2, 2), (3, 3)]}, times=[None, 0.5, None, 0.4])
    module.project_times(row)
    assert row.st_times == {"en": [0.5, 0.5, 0.5, 0.5]}  # d came with c, whatever its time
    row.st_times, row.times = {}, [0.5, None, 2.0, 3.0]
    row.links = {"en": [(0, 0), (1, 2), (3, 2)]}
    module.project_times(row)
    assert row.st_times == {"en": [0.5, None, 3.0, None]}
    row.st_times, row.times = {}, [None] * 4
    module.project_times(row)
    assert row.st_times == {}
    row.st_times, row.times = {"en": [0.7, 3.0, 3.1, 3.2]}, [0.5, 1.0, 2.0, 3.0]
    module.project_times(row)
    assert row.st_times == {"en": [0.7, 3.0, 3.1, 3.2]}  # measured ones stay


def test_modes_of_a_row():
    row = Row("17", "a", asr="a b", st={"fr": "x y"}, links={"fr": [(0, 0), (1, 1)]},
              times=[1.0, 2.0],
              st_times={"fr": [2.5, 2.6]}, where="m.jsonl:3")
    orders = {"asr": "ab", "st": "xy", "ratio:0": "abxy", "ratio:1.0": "xyab", "align": "axby",
              "time": "abxy"}
    for mode, order in orders.items():
        assert "".join(word for _, word in interleave(row, mode)) == order
    for mode in ["align", "time", "ratio:0.5", "asr"]:
        with pytest.raises(ValueError, match=f"m.jsonl:3: .*'{mode}'"):
            interleave(Row("17", "a", st={"fr": "x"}, where="m.jsonl:3"), mode)
    for mode in ["st", "align", "time", "ratio:0.5"]:
        with pytest.raises(ValueError, match=f"17: .*'{mode}'"):
            interleave(Row("17", "a", asr="x"), mode)
    for missing, mode in [({"links": {}}, "align"), ({"times": None}, "time"),
                          ({"st_times": {}}, "time")]:
        lacking = "links" if mode == "align" else "times"
        with pytest.raises(ValueError, match=f"no {lacking}.*'{mode}'"):
            interleave(Row(**{**vars(row), **missing}), mode)
    # No word is lost without a message.
    with pytest.raises(ValueError, match="zip"):
        interleave(Row(**{**vars(row), "times": [1.0]}), "time")
    for mode in ["", "alig", "st:fr", "ratio", "ratio:", "ratio:x", "ratio:2", "ratio:nan"]:
        message = "gamma|float" if ":" in mode[5:] else f"unknown mode '{mode}'"
        with pytest.raises(ValueError, match=message):
            interleave(row, mode)


# ---- Tokens --------------------------------------------------------------------------------------

TAGS = [ASR, "<st:fr>", "<st:de>"]
PLAIN = Tokenizer(TAGS)
TEXTS = ["the cat sat on the mat", "ế ế ế 🙂🙂 <asr> <asr> aaaa aaaa aa", "le chat était là là là"]
TRAINED = Tokenizer.train(TEXTS * 3, 330, TAGS)
PAIRS = some.lists(some.tuples(some.sampled_from(TAGS), ANY_WORD), max_size=10)


@given(PAIRS)
def test_every_list_of_words_comes_back(pairs):
    for tokenizer in (PLAIN, TRAINED):
        ids = serialize(pairs, tokenizer)
        assert parse(ids, tokenizer) == pairs
        changes = sum(k == 0 or pairs[k - 1][0] != tag for k, (tag, _) in enumerate(pairs))
        assert sum(0 < token < tokenizer.first_byte for token in ids) == changes and 0 not in ids


@given(some.text(max_size=30).filter(lambda s: not any("\ud800" <= c <= "\udfff" for c in s)))
def test_text_is_lossless_but_for_white_space_and_never_a_tag(text):
    for tokenizer in (PLAIN, TRAINED):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == join(units(text))
        assert all(tokenizer.first_byte <= token < len(tokenizer) for token in ids)


@given(PAIRS)
def test_a_word_comes_with_its_last_token(pairs):
    for tokenizer in (PLAIN, TRAINED):
        parser, k = StreamParser(tokenizer), 0
        for tag, word in pairs:
            if k == 0 or pairs[k - 1][0] != tag:
                assert parser.feed(tokenizer.tag_id[tag]) == []
            *first, last = tokenizer.encode_word(word)
            assert all(parser.feed(token) == [] for token in first)
            assert parser.feed(last) == [(tag, word)]
            k += 1
        assert parser.flush() == [] and parser.invalid == 0


def test_a_tag_ends_the_word_that_is_open():
    """Its own last token, the separator, has not come: the word is the stream's it was begun in."""
    parser = StreamParser(TRAINED)
    assert parser.feed(TRAINED.pieces.index(b"l")) == []
    assert parser.feed(TRAINED.tag_id[TAGS[1]]) == [(TAGS[0], "l")]
    assert parser.tag == TAGS[1] and parser.flush() == []


@given(some.lists(some.integers(0, len(TRAINED) - 1), max_size=40),
       some.randoms(use_true_random=False))
def test_any_ids_are_read(ids, rng):
    """Untrained models write anything.

    No exception, no empty word, no white space inside, every wrong byte counted.
    """
    ids += [TRAINED.first_byte + rng.choice([0xC2, 0xA0, 0x85, 0xFF, 0xE2, 0x20]) for _ in range(6)]
    parser = StreamParser(TRAINED)
    pairs = [pair for token in ids for pair in parser.feed(token)] + parser.flush()
    assert pairs == parse(ids, TRAINED)
    assert all(word.split() == [word] and tag in TAGS for tag, word in pairs)
    text = "".join(word for _, word in pairs)
    written_ = b"".join(TRAINED.pieces[token] or b" " for token in ids if token)
    assert parser.invalid == text.count("\ufffd") - written_.count("\ufffd".encode())


def test_the_parser_waits_for_whole_characters_and_counts_wrong_ones():
    parser, byte = StreamParser(PLAIN), PLAIN.first_byte
    # Nothing is shown of half a character.
    assert [parser.feed(byte + b) for b in "é".encode()] == [[], []]
    assert parser.feed(0) == []  # blank writes nothing
    # Before any tag: the first.
    assert parser.feed(byte + ord(" ")) == [(ASR, "é")] and parser.invalid == 0
    parser.feed(byte + 0xC3)
    # A tag ends a word, here half a character.
    assert parser.feed(2) == [(ASR, "\ufffd")] and parser.invalid == 1
    parser.feed(byte + ord("a"))
    # The end releases what is left.
    assert parser.flush() == [("<st:fr>", "a")] and parser.flush() == []
    for b in b"\xff\xfe\xef\xbf\xbd":
        parser.feed(byte + b)
    # The third is genuine.
    assert parser.flush() == [("<st:fr>", "\ufffd\ufffd\ufffd")] and parser.invalid == 3
    assert parser.feed(byte + ord(" ")) == []  # an empty word is none
    for token in (-1, len(PLAIN)):
        message = f"token {token} is outside the vocabulary of {len(PLAIN)}"
        with pytest.raises(ValueError, match=message):
            parser.feed(token)


def naive_merges(texts, n, first_byte):
    """BPE as it is defined, everything counted anew for each merge."""
    words = Counter(tuple(first_byte + b for b in word.encode() + b" ")
                    for text in texts for word in text.split())
    merges = []
    while len(merges) < n:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        new, merged = first_byte + 256 + len(merges), Counter()
        for word, count in words.items():
            out = []
            for token in word:
                out = out[:-1] + [new] if out and (out[-1], token) == best else out + [token]
            merged[tuple(out)] += count
        words = merged
        merges.append(best)
    return merges, words


@settings(max_examples=40)
@given(some.lists(some.text("abé ", max_size=20), max_size=6))
def test_training_is_byte_pair_encoding(texts):
    tokenizer = Tokenizer.train(texts, 2 + 256 + 12, [ASR])
    merges, words = naive_merges(texts, 12, 2)
    assert tokenizer.merges == merges
    counted = Counter(tuple(tokenizer.encode_word(word)) for text in texts for word in text.split())
    assert counted == words  # encoding segments the training text as training did
    assert len(tokenizer) == 2 + 256 + len(merges)


def test_merges_are_those_of_the_industrial_tool():
    """Hugging Face's trainer learns the same merges in the same order, from bytes as letters."""
    industrial = pytest.importorskip("tokenizers", reason="pip install tokenizers to compare")
    path = DATA / "multi30k" / "train.fr.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [next(file) for _ in range(3000)]
    spell = lambda word: "".join(chr(256 + b) for b in word.encode() + b" ")  # noqa: E731
    spelled = [" ".join(map(spell, text.split())) for text in texts]
    peer = industrial.Tokenizer(industrial.models.BPE())
    peer.pre_tokenizer = industrial.pre_tokenizers.WhitespaceSplit()
    alphabet = [chr(256 + b) for b in range(256)]
    peer.train_from_iterator(spelled, industrial.trainers.BpeTrainer(
        vocab_size=256 + 1000, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    theirs = [tuple(pair) for pair in json.loads(peer.to_str())["model"]["merges"]]
    ours = Tokenizer.train(texts, 2 + 256 + 1000)
    pieces = ["".join(chr(256 + b) for b in piece) for piece in ours.pieces]
    assert theirs == [(pieces[a], pieces[b]) for a, b in ours.merges] and len(theirs) == 1000


def test_training_depends_on_counts_alone():
    texts = ["the cat sat on the mat", "a cat ate the rat", "là là ế", "the the a"]
    one = Tokenizer.train(texts, 300, TAGS).to_dict()
    turned = " ".join(reversed(" ".join(reversed(texts)).split()))
    assert one == Tokenizer.train([turned], 300, TAGS).to_dict()
    code = ("from serialize import Tokenizer; "
            f"print(Tokenizer.train({texts!r}, 300, {TAGS!r}).to_dict())")
    for seed in "01":  # the order of sets changes with it
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT,
                             env={**os.environ, "PYTHONHASHSEED": seed},
                             capture_output=True, text=True, check=True).stdout
        assert out.strip() == str(one)


def test_tokenizer_ids_pieces_and_plain_data():
    assert [PLAIN.tag_id[tag] for tag in TAGS] == [1, 2, 3]
    assert PLAIN.first_byte == 4 and len(PLAIN) == 260
    assert PLAIN.encode("a \u00e9") == [4 + ord("a"), 4 + 32, 4 + 0xC3, 4 + 0xA9, 4 + 32]
    # A whole word with its separator is one token.
    assert len(TRAINED) > 290 and len(TRAINED.encode("the the")) == 2
    # No piece goes beyond a word.
    assert all(piece.count(b" ") <= 1 and b" " not in piece[:-1] for piece in TRAINED.pieces)
    again = Tokenizer.from_dict(json.loads(json.dumps(TRAINED.to_dict())))
    assert again.encode("the cat zzz") == TRAINED.encode("the cat zzz")
    assert again.to_dict() == TRAINED.to_dict()
    assert TRAINED.unseen("the dog 中") == {"d", "g", "中"}
    wrong = [(lambda: Tokenizer.train(["a"], 100), "100 is too small"),
             (lambda: Tokenizer([]), "one or more"),
             (lambda: Tokenizer([ASR, ASR]), "different tags"),
             (lambda: Tokenizer([ASR], [(34, 35)]), "merge 34, 35"),
             (lambda: Tokenizer([ASR], [(99, 258)]), "earlier"),
             (lambda: Tokenizer([ASR], [(1, 99)]), "earlier"),
             (lambda: PLAIN.encode_word("a b"), "not a word"),
             (lambda: PLAIN.encode_word(""), "not a word"),
             (lambda: PLAIN.encode("a\ud800"), "surrogates"),
             (lambda: serialize([("<st:x>", "a")], PLAIN), "<st:x>")]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


# ---- Manifests -----------------------------------------------------------------------------------

GOOD = {"id": "u1", "audio": "wav/a.ogg", "start": 1.5, "duration": 3.2, "lang": "mb",
        "asr": "a  b\u00a0c", "st": {"fr": "x y"}, "links": {"fr": "0-0 2-1"},
        "times": [0.5, None, 2], "st_times": {"fr": [1, 2.5]},
        "speaker": "s", "other": [1]}


def manifest(tmp_path, *lines, name="m.jsonl"):
    path = tmp_path / name
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(lines))
    return path


def test_a_manifest_is_read_and_written(tmp_path):
    with_mark = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r"
    path = manifest(tmp_path, with_mark, b"", {"audio": "b.wav", "st": {"de": "z"}})
    first, second = read_manifest(path, strict=True)
    assert first == Row(id="u1", audio=str(tmp_path / "wav/a.ogg"), start=1.5, duration=3.2,
                        lang="mb", asr="a b c",
                        st={"fr": "x y"}, links={"fr": [(0, 0), (2, 1)]}, times=[0.5, None, 2],
                        st_times={"fr": [1, 2.5]}, speaker="s")
    assert (first.where, second.where) == (f"{path}:1", f"{path}:3")
    assert (second.id, second.asr, second.start, second.duration) == ("m:3", None, 0.0, None)
    write_manifest(tmp_path / "again.jsonl", [first, second])
    assert read_manifest(tmp_path / "again.jsonl", strict=True) == [first, second]
    (tmp_path / "deep").mkdir()
    # The sound is now above the manifest.
    write_manifest(tmp_path / "deep" / "n.jsonl", [first, second])
    with pytest.raises(ValueError, match="n.jsonl:1: audio .*--allow-outside"):
        read_manifest(tmp_path / "deep" / "n.jsonl", strict=True)
    assert read_manifest(tmp_path / "deep" / "n.jsonl", allow_outside=True) == [first, second]


WRONG_VALUES = {
    "audio": ["/etc/passwd", "../a.wav", "x/../../a.wav", "a\0.wav", "", 7],
    "asr": [7, ["a"], "only two"],
    "st": ["x", {"fr": 7}, ["x"], {"de": "x"}],
    "id": [{}, True], "speaker": [7.5], "lang": [[]],
    "start": [-1, "1", 10 ** 400],
    "duration": [float("nan"), float("inf")],
    "links": ["0-0", {"de": "0-0"}, {"fr": "0-0 3-1"}, {"fr": "0-2"}, {"fr": "0"}, {"fr": "a-b"},
              {"fr": "0-1-2"}, {"fr": [0, 0]}],
    "times": [[1, 2], 3, [1, 2, "3"], [1, -2, 3], {"a": 1}],
    "st_times": [{"fr": [1]}, {"de": [1]}, [1, 2]]}
BAD = [b"{", b"[1]", b"7", b"null", b"\xff\xfe", b"[" * 100000, b'{"audio": 1e999, "asr": "a"}',
       {"asr": "a"}, b'{"audio": "a.wav", "asr": "\\ud800"}', b'{"audio": "a.wav"}',
       {"audio": "a", "asr": " \u3000 "},
       *({**GOOD, key: wrong} for key, values in WRONG_VALUES.items() for wrong in values)]


@pytest.mark.parametrize("wrong", BAD, ids=lambda wrong: repr(wrong)[:40])
def test_a_bad_row_is_named_and_skipped(tmp_path, wrong):
    path = manifest(tmp_path, {**GOOD, "id": "before"}, wrong, {**GOOD, "id": "after"})
    told = []
    assert [row.id for row in read_manifest(path, on_bad=told.append)] == ["before", "after"]
    assert len(told) == 2 and told[0].startswith(f"{path}:2: skipped: ")
    assert told[1] == f"{path}: 1 of 3 rows skipped"
    assert len(told[0]) < len(str(path)) + 250
    with pytest.raises(ValueError, match=r"m\.jsonl:2: "):
        read_manifest(path, strict=True)


def test_manifests_without_rows(tmp_path, capsys):
    empty, bad = manifest(tmp_path, b"", b"  ", name="empty.jsonl"), manifest(tmp_path, b"{")
    for path, message in [(tmp_path / "none.jsonl", "none.jsonl: No such file"),
                          (tmp_path, "Is a directory"),
                          (empty, "empty.jsonl: no usable row"), (bad, "m.jsonl: no usable row")]:
        with pytest.raises(ValueError, match=message):
            read_manifest(path)
    assert "m.jsonl:1: skipped" in capsys.readouterr().err


def test_nothing_half_written(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [Row("1", str(tmp_path / "a.wav"), asr="a")])
    before = path.read_bytes()
    good = Row("1", str(tmp_path / "a.wav"), asr="a")
    bad = Row("2", str(tmp_path / "b.wav"), asr="\udc80")
    with pytest.raises(InputError, match="not UTF-8"):
        write_manifest(path, [good, bad])
    elsewhere = Row("3", os.fsdecode(bytes(tmp_path.parent) + b"/caf\xe9/a.wav"), asr="a")
    with pytest.raises(InputError, match="m.jsonl: a name that is not UTF-8"):
        write_manifest(path, [good, elsewhere])
    with pytest.raises(InputError, match="m.jsonl/x.jsonl: there is no folder"):
        write_manifest(path / "x.jsonl", [good])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.jsonl"]


def test_an_empty_id_is_none(tmp_path):
    lines = [json.dumps({"audio": f"{k}.wav", "asr": "a", "id": ""}).encode() for k in range(3)]
    rows = read_manifest(manifest(tmp_path, *lines))
    assert [row.id for row in rows] == ["m:1", "m:2", "m:3"]


def test_a_reader_who_leaves_is_no_error():
    script = f"{sys.executable} serialize.py | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Delays, importers, command line -------------------------------------------------------------

def test_delays_by_hand():
    row = Row("1", "a", asr="a b c", st={"fr": "x y z"}, links={"fr": [(2, 0), (0, 0), (0, 1)]},
              times=[1.0, 2.0, 4.0])
    # x needs c, y needs a, z needs nothing.
    assert module.delays(row, interleave(row, "ratio:0")) == [(0, 0.0), (2, 3.0)]
    assert module.delays(row, interleave(row, "align")) == [(0, 0.0), (2, 3.0)]
    assert module.delays(row, interleave(row, "ratio:0.5")) == [(-2, -3.0), (1, 1.0)]
    assert module.delays(row, interleave(row, "ratio:1")) == [(-3, -4.0), (-1, -1.0)]
    # The table does not count a guess as time won: 0 and 1 words behind, 0 and 1 s.
    numbers = module.cost_of([row], "ratio:0.5", Tokenizer(["<asr>", "<st:fr>"]))[1]
    assert numbers[2:] == [50, 0.5, 0.5, 1.0]


def test_tokens_a_second_and_tags_a_word():
    row = Row("1", "a", duration=2.0, asr="a b", st={"fr": "x"}, links={"fr": [(0, 0)]})
    n, numbers = module.cost_of([row], "ratio:0", Tokenizer(["<asr>", "<st:fr>"]))
    # two tags, and of each of three words a byte and the separator
    assert n == 1 and numbers[:2] == [4.0, pytest.approx(2 / 3)]


def command(*arguments):
    call = [sys.executable, "serialize.py", *map(str, arguments)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_command_line(tmp_path):
    code, out, err = command()
    assert code == 0 and "read back exactly: True" in out
    assert out.split("\n")[0].split() == module.MODES
    code, out, err = command(manifest(tmp_path, GOOD, b"{"))
    assert code == 0 and "m.jsonl:2: skipped" in err
    table = {line.split()[0]: line.split()[1:] for line in out.strip().split("\n")[1:]}
    assert list(table) == module.MODES
    assert table["align"][3] == "0.00" and table["ratio:1.0"][3] == "100.00"
    # Guesses do not make up for waiting.
    assert table["ratio:1.0"][4] == "0.00" and table["ratio:0.0"][4] == "1.00"
    untimed = {key: value for key, value in GOOD.items() if key != "st_times"}
    untimed["times"] = [0.5, 1, 2]
    time_line = command(manifest(tmp_path, untimed))[1].split("\n")[7]
    assert time_line.split() == ["time", "0"] + ["-"] * 6
    assert command(manifest(tmp_path, untimed), "--project")[1].split("\n")[7].split()[1] == "1"
    code, out, err = command(tmp_path / "none.jsonl")
    assert code == 2 and err.startswith("serialize.py: ") and "none.jsonl" in err
    assert "Traceback" not in err


def test_covost_is_imported(tmp_path):
    header = "path\tsentence\ttranslation\tclient_id"
    sentence = "c1.mp3\tHello \"you\"."
    tables = {"zh-CN": f"{sentence}\t你 好\tspk\nc2.mp3\n", "de": f"{sentence}\tHallo du\tspk\n"}
    for lang, lines in tables.items():
        path = tmp_path / f"covost_v2.en_{lang}.dev.tsv"
        path.write_text(f"{header}\n{lines}", encoding="utf-8")
    tables, out = sorted(tmp_path.glob("*.tsv")), tmp_path / "out.jsonl"
    code, _, err = command("--from", "covost", *tables, "-o", out)
    assert code == 0 and "zh-CN.dev.tsv:3: skipped" in err
    row, = read_manifest(tmp_path / "out.jsonl", strict=True)
    assert row == Row("c1", str(tmp_path / "clips/c1.mp3"), lang="en", asr='Hello "you".',
                      speaker="spk",
                      st={"de": "Hallo du", "zh-CN": "你好"})
    assert command("--from", "covost", manifest(tmp_path, b"x", name="a.tsv"))[0] == 2


def test_mustc_is_imported(tmp_path):
    folder = tmp_path / "en-de" / "data" / "dev" / "txt"
    folder.mkdir(parents=True)
    (folder / "dev.yaml").write_text(
        "- {duration: 3.5, offset: 16.08, rW: 9, speaker_id: spk.767, wav: ted_767.wav}\n"
        "- {duration: 1.25, offset: 20.0, speaker_id: spk.767, wav: 'ted_767.wav'}\n")
    (folder / "dev.en").write_text("Hello.\nThank you\u2028.\n", encoding="utf-8")
    (folder / "dev.de").write_text("Hallo.\nDanke.\n", encoding="utf-8")
    out = folder.parent / "dev.jsonl"
    assert command("--from", "mustc", folder / "dev.yaml", "-o", out)[0] == 0
    first, second = read_manifest(out, strict=True)
    assert first == Row("ted_767_1", str(folder.parent / "wav/ted_767.wav"), 16.08, 3.5, "en",
                        "Hello.",
                        {"de": "Hallo."}, speaker="spk.767")
    assert (second.start, second.duration) == (20.0, 1.25)
    assert (second.asr, second.st) == ("Thank you .", {"de": "Danke."})
    (folder / "dev.de").write_text("Hallo.\n")
    code, _, err = command("--from", "mustc", folder / "dev.yaml", "-o", tmp_path / "no.jsonl")
    assert code == 2 and "dev.yaml has 2 lines, but dev.de 1" in err
    assert not (tmp_path / "no.jsonl").exists()


def test_nemo_is_imported(tmp_path):
    sound = {"audio_filepath": "wav/a.wav", "duration": 2.0, "offset": 0.5, "source_lang": "en"}
    longer = {**sound, "duration": 9.0, "text": "long"}
    path = manifest(tmp_path, {**sound, "target_lang": "en", "text": "hello"}, longer,
                    {**sound, "target_lang": "de", "text": "hallo"}, b"{",
                    {**sound, "audio_filepath": "wav/b.wav", "target_lang": "fr",
                     "answer": "salut"}, {"text": "a"})
    code, _, err = command("--from", "nemo", path, "-o", tmp_path / "out.jsonl")
    assert code == 0 and "2 lines skipped" in err
    assert "m.jsonl:4: skipped" in err and "m.jsonl:6: skipped" in err
    first, other, second = read_manifest(tmp_path / "out.jsonl", strict=True)
    assert (other.asr, other.duration) == ("long", 9.0)  # another stretch of the same file
    assert first == Row("m:1", str(tmp_path / "wav/a.wav"), 0.5, 2.0, "en", "hello",
                        {"de": "hallo"})
    assert (second.asr, second.st) == (None, {"fr": "salut"})
    assert command("--from", "nemo", path, "--strict", "-o", tmp_path / "no.jsonl")[0] == 2
    assert not (tmp_path / "no.jsonl").exists()


def test_griko():
    path = DATA / "griko-italian" / "all.jsonl"
    if not path.exists():
        pytest.skip(f"needs the Griko-Italian corpus in {path.parent}")
    rows = read_manifest(path, strict=True)
    late = {mode: [delay for row in rows for delay in module.delays(row, interleave(row, mode))]
            for mode in ["align", "ratio:0"]}
    assert all(words >= 0 for delays in late.values() for words, _ in delays)  # neither guesses
    assert sum(s for _, s in late["align"]) < 0.05 * sum(s for _, s in late["ratio:0"])


# ---- Words of scripts without spaces -------------------------------------------------------------

HAN_WORDS = some.sampled_from(["我", "語", "か", "か\u3099", "ガ", "ー", "々", "𠀋", "葛\U000e0100"])
OTHER_WORDS = some.sampled_from(["Python", "。", "a。", "\u3099", "é", "한국어", "ไทย", "\u0301x"])
UNITS = some.lists(some.one_of(HAN_WORDS, OTHER_WORDS), max_size=8)


@given(UNITS)
def test_join_is_undone_by_units(words):
    assert units(join(words)) == words
    pairs = [(ASR, word) for word in words]
    assert parse(serialize(pairs, TRAINED), TRAINED) == pairs
    assert TRAINED.decode(TRAINED.encode(join(words))) == join(words)


@given(some.text(max_size=20))
def test_any_text_has_units_that_join(text):
    words = units(text)
    assert units(join(words)) == words and join(units(join(words))) == join(words)
    assert "".join(words) == "".join(text.split())
    if not any(unicodedata.name(c, "").startswith(("CJK", "KANGXI", "HIRAGANA", "KATAKANA"))
               or "\u2fff" < c < "\u33ff" or c > "\uf8ff" for c in text):
        assert words == text.split() and join(words) == " ".join(words)


def test_units_of_chinese_japanese_and_others():
    assert units("我爱 Python 语言。") == ["我", "爱", "Python", "语", "言", "。"]
    assert join(["我", "爱", "Python", "语", "言", "。"]) == "我爱Python语言。"
    assert units("か\u3099っこう, ガス") == ["か\u3099", "っ", "こ", "う", ",", "ガ", "ス"]
    assert join(["か", "\u3099"]) == "か \u3099"  # beside each other they would be one character
    assert units("나는 집에 ไทยไทย a-b") == ["나는", "집에", "ไทยไทย", "a-b"]
    assert join(["a", "b"]) == "a b" and join(["。", "b"]) == "。 b" and join([]) == ""
    assert units("".join(["我", "a", "b"])) != ["我", "a", "b"]  # without any space the law breaks


def test_normalising_changes_no_unit():
    """NFC of a character has as many units, so links and times counted before still fit."""
    for code in range(sys.maxunicode):
        if not unicodedata.is_normalized("NFC", chr(code)):
            composed = unicodedata.normalize("NFC", chr(code))
            assert len(units("我" + composed)) == len(units("我" + chr(code))), hex(code)


def test_links_and_times_of_a_longer_word_pass_to_its_characters(tmp_path):
    row = {"audio": "a.wav", "asr": "你好 world 再见", "times": [1.0, 2.0, None],
           "st": {"en": "hello world bye", "ja": "今日は"}, "st_times": {"ja": [0.5, 0.7, 0.9]},
           "links": {"en": "0-0 1-1 2-2", "ja": "0-0"}}
    first, = read_manifest(manifest(tmp_path, row), strict=True)
    assert first.asr == "你好world再见" and first.times == [1.0, 1.0, 2.0, None, None]
    assert first.links["en"] == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2)]
    assert first.links["ja"] == [(i, j) for i in (0, 1) for j in (0, 1, 2)]
    assert first.st_times == {"ja": [0.5, 0.7, 0.9]}  # as many as characters: they count them
    assert join(word for tag, word in interleave(first, "align") if tag == "<st:ja>") == "今日は"
    assert [word for _, word in interleave(first, "align")][:3] == ["你", "好", "hello"]
    write_manifest(tmp_path / "again.jsonl", [first])
    assert "你 好 world 再 见" in (tmp_path / "again.jsonl").read_text(encoding="utf-8")
    assert read_manifest(tmp_path / "again.jsonl", strict=True) == [first]
    plain = Row("1", str(tmp_path / "a.wav"), asr="你好")
    write_manifest(tmp_path / "plain.jsonl", [plain])
    assert '"你好"' in (tmp_path / "plain.jsonl").read_text(encoding="utf-8")
    for wrong in [{"times": [1.0]}, {"links": {"en": "3-0"}}]:  # a link counts words in the file
        with pytest.raises(InputError, match="m.jsonl:1: .*(1 times for 3 words|outside 3 source)"):
            read_manifest(manifest(tmp_path, row | wrong), strict=True)


def test_texts_are_composed_on_reading_and_nowhere_else(tmp_path):
    loose = "e\u0301te\u0301"
    told = []
    path = manifest(tmp_path, {"audio": "a", "asr": loose, "st": {"fr": "x"}},
                    {"audio": "b", "asr": "x", "st": {"fr": loose}}, {"audio": "c", "asr": "été"})
    rows = read_manifest(path, on_bad=told.append)
    assert [rows[0].asr, rows[1].st["fr"], rows[2].asr] == ["été"] * 3
    assert told == [f"{path}: text of 2 rows brought to NFC"]
    assert units(loose) == [loose] and join([loose]) == loose
    assert parse(serialize([(ASR, loose)], PLAIN), PLAIN) == [(ASR, loose)] != [(ASR, "été")]


def test_scripts_without_spaces_are_told(tmp_path):
    told = []
    texts = ["สวัสดี", "ສະບາຍດີ", "សួស្តី", "မင်္ဂလာပါ", "བཀྲ་ཤིས་བདེ་ལེགས", "ꦱꦸꦒꦼꦁ",
             "plain", "Ελλάδα हिन्दी 你好 안녕"]
    path = manifest(tmp_path, *({"audio": "a", "asr": text} for text in texts))
    read_manifest(path, on_bad=told.append)
    assert len(told) == 1 and told[0].startswith(f"{path}: 6 rows hold a script without spaces")


# ---- Rows come back as they were written ---------------------------------------------------------

SECONDS = some.one_of(some.just(0), some.just(0.0), some.floats(0, 1e6))
TEXT = some.one_of(some.just(""), some.just("0"), UNITS.map(join), WORDS.map(" ".join)).map(
    lambda text: join(units(unicodedata.normalize("NFC", text))))
JSON = some.recursive(
    some.one_of(some.none(), some.booleans(), some.integers(-9, 9), some.just(""), some.just(0.0)),
    lambda inner: some.lists(inner, max_size=2) | some.dictionaries(some.sampled_from("ab"), inner))


@some.composite
def rows_of_a_manifest(draw):
    asr = draw(some.one_of(some.none(), TEXT))
    st = draw(some.dictionaries(some.sampled_from(["", "fr", "de"]), TEXT))
    if not units(asr or "") and not any(units(text) for text in st.values()):
        asr = "a"
    timed = some.one_of(some.none(), SECONDS)
    n = len(units(asr or ""))
    times = draw(some.one_of(some.none(), some.lists(timed, min_size=n, max_size=n)))
    links, st_times = {}, {}
    timed_langs = some.lists(some.sampled_from(sorted(st)), unique=True) if st else some.just([])
    for lang in draw(timed_langs):
        m = len(units(st[lang]))
        st_times[lang] = draw(some.lists(timed, min_size=m, max_size=m))
        pairs = some.tuples(some.integers(0, max(0, n - 1)), some.integers(0, max(0, m - 1)))
        links[lang] = draw(some.lists(pairs, max_size=4)) if n and m else []
    name = some.sampled_from(["", "0", "s/1", "id"])
    other = some.dictionaries(some.sampled_from(["", "x", "where", "other"]), JSON, max_size=2)
    given_name = some.sampled_from(["0", "s/1", "id"])         # an empty one counts as none
    return Row(draw(given_name), "a.wav", draw(SECONDS), draw(some.one_of(some.none(), SECONDS)),
               draw(name), asr, st, links, times, st_times, draw(name), draw(other))


@given(rows_of_a_manifest())
def test_what_is_written_is_read(tmp_path_factory, row):
    folder = tmp_path_factory.getbasetemp()
    row.audio = str(folder / row.audio)
    write_manifest(folder / "law.jsonl", [row])
    again, = read_manifest(folder / "law.jsonl", strict=True)
    assert again == row and again.other == row.other
    assert type(again.duration) is type(row.duration) and repr(again.st) == repr(row.st)


def test_zero_seconds_are_not_the_whole_file(tmp_path):
    path = manifest(tmp_path, {"audio": "a.wav", "asr": "x", "duration": 0, "gain": 0,
                               "note": None})
    write_manifest(tmp_path / "again.jsonl", read_manifest(path, strict=True))
    record = json.loads((tmp_path / "again.jsonl").read_text())
    assert record == {"id": "m:1", "audio": "a.wav", "asr": "x", "duration": 0, "gain": 0,
                      "note": None}
    for wrong in [{"start": True}, {"times": [False]}]:  # true is no number
        with pytest.raises(InputError, match="cannot be"):
            read_manifest(manifest(tmp_path, {"audio": "a", "asr": "x"} | wrong), strict=True)


def test_no_id_stands_twice(tmp_path):
    path = manifest(tmp_path, {"id": "a\x1b[2J", "audio": "1", "asr": "x"},
                    {"audio": "2", "asr": "y"},
                    {"id": "a\x1b[2J", "audio": "3", "asr": "z"})
    told = []
    assert [row.asr for row in read_manifest(path, on_bad=told.append)] == ["x", "y"]
    assert told == [f"{path}:3: skipped: id 'a\\x1b[2J' stands at {path}:1 already",
                    f"{path}: 1 of 3 rows skipped"]
    with pytest.raises(InputError, match=r"m\.jsonl:3: id .* stands at .*m\.jsonl:1 already"):
        read_manifest(path, strict=True)
    (tmp_path / "b").mkdir()
    line = {"audio_filepath": "x.wav", "duration": 1.0, "id": "u", "text": "a"}
    one = manifest(tmp_path, line, name="1.jsonl")
    two = manifest(tmp_path / "b", line, name="2.jsonl")
    code, _, err = command("--from", "nemo", one, two, "--strict", "-o", tmp_path / "out.jsonl")
    assert code == 2 and f"{two}:1: id 'u' stands at {one}:1 already" in err
    again = manifest(tmp_path, line | {"text": "b"}, name="3.jsonl")  # other words for one sound
    code, _, err = command("--from", "nemo", one, again, "--strict", "-o", tmp_path / "out.jsonl")
    assert code == 2
    assert f"{again}:1: another text (asr) for the same sound stands at {one}:1" in err
    first, other = Row("1", "a", asr="hi", lang="en"), Row("2", "a", st={"en": "hi"}, lang="de")
    with pytest.raises(InputError, match="another language .'en'. for the same sound"):
        module.join_texts(first, other)
    module.join_texts(first, replace(other, lang=""))
    assert first.st == {"en": "hi"} and first.lang == "en"
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read_and_replaced(tmp_path, kind):
    path = {"fifo": tmp_path / "f.a_b.x", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    if kind == "fifo":
        os.mkfifo(path)
    for call in [read_manifest, module.import_nemo, module.import_mustc]:
        with pytest.raises(InputError, match="pipe or a device|Is a directory"):
            call(path)
    with pytest.raises(InputError, match="not a file that can be replaced"):
        write_manifest(path, [Row("1", "a", asr="a")])
    code, out, err = command(path)
    assert code == 2 and err.count("\n") == 1 and err.startswith("serialize.py: ") and not out


def test_no_escape_sequence_reaches_the_terminal(tmp_path):
    assert module.printable("a\x1b[31m\u202eb\n\ud800é中") == "a\\x1b[31m\\u202eb\\n\\ud800é中"
    evil = "\x1b]0;gone\x07\u202e"
    lines = [{"audio": evil + "\0", "asr": "x"}, {"audio": "a", "asr": [evil]}, {evil: evil},
             {"audio": "a", "asr": "x", "times": [1, 2]},
             {"audio": "a", "asr": "a", "st": {evil: 3}},
             {"audio": "a", "asr": "x", "st": {"fr": "y"}, "links": {evil: "0-0"}}]
    path = manifest(tmp_path, *lines, GOOD, name=f"m{evil[:3]}.jsonl")
    code, out, err = command(path)
    assert code == 0 and err.count("\n") == len(lines) + 1
    assert not {c for c in out + err if not c.isprintable()} - {"\n"}
    code, out, err = command(path, "--strict")
    assert code == 2 and err.count("\n") == 1 and "\x1b" not in err and "\\x1b" in err


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [Row(str(k), str(tmp_path / "a.wav"), asr="word " * 50) for k in range(200)]
    write_manifest(path, rows[:1])
    before = path.read_bytes()
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
            "import serialize; rows = [serialize.Row(str(k), 'a.wav', asr='word ' * 50) "
            "for k in range(200)]\n"
            "try: serialize.write_manifest(sys.argv[1], rows)\n"
            "except OSError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True,
                          text=True)
    assert "File too large" in done.stdout and str(path) in done.stdout
    assert ".tmp" not in done.stdout
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.jsonl"]
    with pytest.raises(InputError, match="there is no folder .*none"):
        write_manifest(tmp_path / "none" / "m.jsonl", rows)
    (tmp_path / "link.jsonl").symlink_to(path)                 # whose folder may be another
    with pytest.raises(InputError, match=f"link.jsonl: a link; name the file itself: {path}"):
        write_manifest(tmp_path / "link.jsonl", rows)
    assert path.read_bytes() == before and (tmp_path / "link.jsonl").is_symlink()


def test_a_command_asks_where_its_output_goes_before_its_work(tmp_path):
    """And reading over its own input, it does not leave out the lines that it cannot read."""
    path = manifest(tmp_path, GOOD, b"{")
    code, _, err = command(path, "-o", tmp_path / "none" / "out.jsonl")
    assert code == 2 and err.count("\n") == 1 and "there is no folder" in err
    before = path.read_bytes()
    code, _, err = command(path, "-o", path)
    assert code == 2 and "m.jsonl:2: " in err and path.read_bytes() == before
    assert command(path, "-o", tmp_path / "out.jsonl")[0] == 0
    table = tmp_path / "t.tsv"                                 # what it says beside would be gone
    table.write_text("path\ttext\na.wav\tja\n")
    code, _, err = command("--from", "tsv", table, "--columns", "audio=path,asr=text", "-o", table)
    assert code == 2 and "t.tsv: is read, and would be replaced" in err
    assert table.read_text().startswith("path\t")
    with pytest.raises(SystemExit):
        module.read_arguments(["--from", "covost", "x.tsv", "--folder", "wav"])


def test_nothing_is_said_where_standard_error_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    module.tell("a line")
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_no_times_through_no_links():
    row = Row("1", "a", asr="a b", st={"en": "x y"}, links={"en": []}, times=[0.5, 1.0])
    module.project_times(row)
    assert row.st_times == {}
    row.links["en"] = [(0, 1)]
    module.project_times(row)
    assert row.st_times == {"en": [None, 0.5]}


def test_a_backslash_that_escapes_nothing_is_one(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(rb"file	fr" + b"\n" + rb"clips\1.wav	AC\DC \\ \"a\" \N" + b"\n")
    row, = module.import_tsv(path, columns={"audio": "file", "asr": "fr"}, on_bad=[].append)
    assert row.asr == r'AC\DC \ "a" \N' and row.audio.endswith(r"clips\1.wav")


# ---- Modes by row, utterances in one stream ------------------------------------------------------

def test_a_row_with_one_text_is_written_as_that_text():
    both, asr = Row("1", "a", asr="a b", st={"fr": "x"}), Row("2", "a", asr="a", st={"fr": " "})
    st = Row("3", "a", asr="", st={"fr": "", "de": "x"})
    for mode in ["ratio:0.5", "align", "time"]:
        assert [mode_of(row, mode) for row in (both, asr, st)] == [mode, "asr", "st"]
    assert interleave(asr, mode_of(asr, "time")) == [(ASR, "a")]
    assert interleave(st, mode_of(st, "align")) == [("<st:de>", "x")]
    with pytest.raises(InputError, match="no links"):  # both texts: the links are needed
        interleave(both, mode_of(both, "align"))
    for row, mode, lacking in [(st, "asr", "transcription"), (asr, "st", "translation")]:
        with pytest.raises(InputError, match=f"no {lacking} for mode '{mode}'"):
            interleave(row, mode_of(row, mode))


def test_joined_utterances_are_written_one_after_the_other():
    """As training writes them: row after row, which in mode time is the merge of all words by
    their times in the joined sound, and in mode ratio is not."""
    def joined(rows, mode):
        return [pair for row in rows for pair in interleave(row, mode_of(row, mode))]

    first = Row("1", "a", asr="a b", st={"fr": "x y"}, links={"fr": [(0, 0), (1, 1)]},
                times=[1.0, 2.0], st_times={"fr": [1.5, 2.5]})
    second = Row("2", "b", asr="c d", st={"fr": "z"}, links={"fr": [(1, 0)]}, times=[0.5, 1.0],
                 st_times={"fr": [0.7]})
    alone = Row("3", "c", asr="e")
    assert "".join(word for _, word in joined([first, second, alone], "align")) == "axbycdze"
    assert "".join(word for _, word in joined([first, alone, second], "time")) == "axbyeczd"
    shifted = Row("1+2", "", asr="a b c d", st={"fr": "x y z"}, times=[1.0, 2.0, 3.5, 4.0],
                  st_times={"fr": [1.5, 2.5, 3.7]})  # the second begins at 3 s
    assert joined([first, second], "time") == interleave(shifted, "time")
    assert joined([first, second], "ratio:1") != interleave(shifted, "ratio:1")


# ---- The tokenizer's example and its data --------------------------------------------------------

def test_the_example_in_the_documentation_of_train():
    trained = Tokenizer.train(["an and", "ant man"], 300)
    assert [trained.pieces[a] + trained.pieces[b] for a, b in trained.merges] == [b"an", b"an "]
    x, y = len(PLAIN) - 2, len(PLAIN) - 1  # one tag instead of three
    assert trained.encode_word("an") == (y,) and trained.encode_word("man")[1:] == (y,)
    assert trained.encode_word("and")[0] == trained.encode_word("ant")[0] == x


@pytest.mark.parametrize("data", [None, {}, [], 7, {"tags": ["a"]}, {"tags": "<asr>"},
                                  {"tags": [1], "merges": []}, {"tags": ["a"], "merges": [[1, 4]]},
                                  {"tags": ["a"], "merges": [7]}, {"tags": ["a"], "alphabet": [1]},
                                  {"tags": ["a"], "merges": [["x", "y"]]},
                                  {"tags": ["a"], "new": 1}])
def test_what_is_no_tokenizer_is_refused(data):
    if data == {"tags": ["a"]}:
        assert len(Tokenizer.from_dict(data)) == 258
    else:
        with pytest.raises(InputError, match="not the data of a tokenizer"):
            Tokenizer.from_dict(data)


# ---- Importers, line by line ---------------------------------------------------------------------

def tsv(path, *rows, end="\n"):
    """As get_covost_splits.py writes: no quoting, backslash before what would be misread."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\",
                            lineterminator=end)
        writer.writerows(rows)
    return path


CELL = some.text(some.sampled_from('ab \t\n\r"\\é中'), max_size=6).map(lambda text: f"x{text}x")


@given(some.lists(some.tuples(CELL, CELL), min_size=1, max_size=4),
       some.sampled_from(["\n", "\r\n"]))
def test_a_covost_table_is_read_as_it_was_written(tmp_path_factory, texts, end):
    path = tmp_path_factory.getbasetemp() / "covost_v2.fr_en.law.tsv"
    rows = [(f"{k}.mp3", asr, st) for k, (asr, st) in enumerate(texts)]
    tsv(path, ("path", "sentence", "translation"), *rows, end=end)
    found = module.import_covost(path, strict=True, on_bad=[].append)
    expected = [(join(units(asr)), join(units(st))) for asr, st in texts]
    assert [(row.asr, row.st["en"]) for row in found] == expected


def test_covost_lines_that_cannot_be_trusted(tmp_path):
    path = tmp_path / "covost_v2.fr_en.x.tsv"
    lines = [b"\xef\xbb\xbfpath\tsentence\ttranslation\tage", b"s1/1.mp3\ta\tb\t20",
             b"s2/1.mp3\ta\tb\t",
             b"../1.mp3\ta\tb\t", b"/etc/1.mp3\ta\tb\t", b"4.mp3\ta\tb", b"5.mp3\ta\tq\tb\t",
             b"6.mp3\ta\rq\tb\t", b"7.mp3\t\xff\tb\t", b"\ta\tb\t", b"8.mp3\ta\\\nq\tb\t", b"",
             b"9.mp3\t\t\t"]
    path.write_bytes(b"\n".join(lines))
    told = []
    rows = module.import_covost(path, on_bad=told.append)
    assert [(row.id, row.where) for row in rows] == [("s1/1", f"{path}:2"), ("s2/1", f"{path}:3"),
                                                     ("6", f"{path}:8"), ("8", f"{path}:11")]
    assert rows[2].asr == "a q" == rows[3].asr  # a CR and an escaped end of line are white space
    assert rows[0].audio == str(tmp_path / "clips/s1/1.mp3") and rows[0].other == {"age": "20"}
    wrong = {4: "is no file inside clips", 5: "is no file inside clips",
             6: "3 cells where the header has 4", 7: "5 cells where the header has 4",
             9: "byte 0xff .* is not UTF-8", 10: "is no file inside clips",
             14: "no text"}
    for message, (number, reason) in zip(told, wrong.items()):
        assert re.match(f"{re.escape(str(path))}:{number}: skipped: .*{reason}", message), message
    assert told[len(wrong)] == f"{path}: 7 lines skipped"
    for header in [b"path\tsentence", b"", b"path\tsentence\ttranslation\tpath", b"path\ra",
                   b"path\tsentence\ttranslation\t\xff"]:
        path.write_bytes(header + b"\na\tb\tc\n")
        with pytest.raises(InputError, match=r"x\.tsv:1: "):
            module.import_covost(path)


def test_any_table_is_imported(tmp_path):
    path = tsv(tmp_path / "a.tsv", ["file", "fr", "en", "who", "from", "up_votes", "links"],
               ["a.wav", "un \"mot\"", "a word", "s", "1.5", "2", "x"],
               ["b.wav", "deux", "", "", "", "", ""],
               ["../c.wav", "trois", "", "", "", "", ""], ["d.wav", "quatre", "", "", "x", "", ""])
    columns = "audio=file,asr=fr,st.en=en,speaker=who,start=from"
    out = tmp_path / "out.jsonl"
    code, _, err = command("--from", "tsv", path, "--columns", columns, "-o", out)
    assert code == 0 and "a.tsv:4: skipped: audio '../c.wav' leaves" in err
    assert "a.tsv:5: skipped: 'x' is not a number" in err
    first, second = read_manifest(out, strict=True)
    assert first == Row("a:2", str(tmp_path / "a.wav"), 1.5, asr='un "mot"', st={"en": "a word"},
                        speaker="s")
    assert first.other == {"up_votes": "2"} and second.st == {"en": ""}
    rows = module.import_tsv(path, columns={"audio": "file", "asr": "fr"}, folder="clips",
                             allow_outside=True, on_bad=[].append)
    assert [row.audio for row in rows] == [str(tmp_path / name) for name in (
        "clips/a.wav", "clips/b.wav", "c.wav", "clips/d.wav")]
    assert command("--from", "tsv", path, "--columns", columns, "--folder", "clips", "-o",
                   out)[0] == 0
    assert read_manifest(out)[0].audio == str(tmp_path / "clips" / "a.wav")
    for wrong, message in [("audio=file,ars=fr", "no column 'ars'"), ("asr=fr", "need audio"),
                           ("audio=file,asr", "should be OURS=THEIRS"),
                           ("audio=file,asr=de", "a.tsv:1: no column 'de' in the header")]:
        code, _, err = command("--from", "tsv", path, "--columns", wrong, "-o", out)
        assert code == 2 and message in err and err.count("\n") == 1


def test_mustc_lines_stay_beside_each_other(tmp_path):
    folder = tmp_path / "txt"
    folder.mkdir()
    mapping = "- {{duration: 2.0, offset: {}, speaker_id: s, wav: {}}}\n".format
    (folder / "dev.yaml").write_text(
        mapping(0, "t.wav") + mapping(1, "'a, b.wav'") + mapping(2, "t.wav") + mapping("x", "t.wav")
        + mapping(3, "../t.wav") + "- {wav: t.wav}\n" + "nothing\n" + mapping(4, "t.wav"))
    (folder / "dev.en").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rtwo\nthree\n4\n5\n6\n7\n\xff\n")
    (folder / "dev.de").write_bytes(b"eins\nzwei\n\n\n\n\n\n\n")
    told = []
    rows = module.import_mustc(folder / "dev.yaml", on_bad=told.append)
    texts = [(row.asr, row.st["de"]) for row in rows]
    assert texts == [("one", "eins"), ("two two", "zwei"), ("three", "")]
    assert rows[1].audio == str(tmp_path / "wav/a, b.wav") and rows[2].id == "t_3"
    reasons = ["'x' is not a number", "is no file inside ../wav", "no duration, offset",
               "not a mapping", f"{folder / 'dev.en'}:8: byte 0xff after 0 others is not UTF-8"]
    for number, (message, reason) in enumerate(zip(told, reasons), 4):
        assert f"dev.yaml:{number}: skipped: " in message and reason in message
    assert told[5].endswith("dev.yaml: 5 lines skipped")


def test_mustc_texts_may_end_in_blank_lines_and_lack_none(tmp_path):
    folder = tmp_path / "txt"
    folder.mkdir()
    (folder / "dev.yaml").write_text(
        "".join(f"- {{duration: 2.0, offset: {k}, wav: t.wav}}\n" for k in range(2)))
    (folder / "dev.en").write_text("one\ntwo\n\n \n")
    (folder / "dev.de").write_text("eins\n\n")
    texts = [(row.asr, row.st["de"]) for row in module.import_mustc(folder / "dev.yaml")]
    assert texts == [("one", "eins"), ("two", "")]
    (folder / "dev.de").write_text("eins\n")
    with pytest.raises(InputError, match="has 2 lines, but dev.de 1; an empty last line needs its"):
        module.import_mustc(folder / "dev.yaml")


def test_mustc_of_two_pairs_and_what_else_lies_beside(tmp_path):
    """The same English lines with other translations and their own sound; manifests, backups and
    tables beside the texts are no translations."""
    line = "- {duration: 2.0, offset: 1.0, speaker_id: s, wav: ted_1.wav}\n"
    folders = []
    for lang in ("de", "fr"):
        folders.append(tmp_path / f"en-{lang}" / "txt")
        folders[-1].mkdir(parents=True)
        for name, text in (("yaml", line), ("en", "one\n"), (lang, f"{lang} 1\n"), ("de~", "x\n"),
                           ("jsonl", "{}\n"), ("tsv", "a\nb\nc\n")):
            (folders[-1] / f"dev.{name}").write_text(text)
    told = []
    rows = module.import_mustc(*(folder / "dev.yaml" for folder in folders), on_bad=told.append)
    assert [row.st for row in rows] == [{"de": "de 1"}, {"fr": "fr 1"}]
    assert rows[0].id == "ted_1_1" and rows[1].id == "dev:1"
    assert not any("skipped" in message for message in told)


def test_rows_without_ids_in_files_of_one_name(tmp_path):
    """Their ids are made here, and made different."""
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        lines = [{"audio_filepath": f"/{folder}/{n}.wav", "duration": 1.0, "text": "x",
                  "speaker": 1034, "lang": "de"} for n in range(3)]
        paths.append(manifest(tmp_path / folder, *lines, name="manifest.json"))
    rows = module.import_nemo(*paths, strict=True)
    assert len({row.id for row in rows}) == 6 and {row.speaker for row in rows} == {"1034"}


def test_nemo_texts_are_what_they_say(tmp_path):
    line = {"audio_filepath": "/x.wav", "duration": 1.0}
    path = manifest(tmp_path, {**line, "answer": "na", "source_lang": "de"},
                    {**line, "text": None, "answer": "ja", "source_lang": "de"},
                    {**line, "text": "yes", "target_lang": "en"}, name="n.json")
    told = []
    rows = module.import_nemo(path, on_bad=told.append)
    assert [row.asr for row in rows] == ["ja"]
    assert "n.json:1: skipped: no text" in told[0]
    assert "n.json:3: skipped: target_lang 'en' without source_lang" in told[1]


def test_align_needs_the_links_of_every_text():
    row = Row("1", "a", asr="a b", st={"fr": "x y", "de": "z w"}, links={"fr": [(0, 0), (1, 1)]})
    with pytest.raises(InputError, match="no links"):
        interleave(row, "align")
    row.links["de"] = [(1, 0), (1, 1)]
    assert "".join(word for _, word in interleave(row, "align")) == "axbyzw"


def test_numbers_may_be_ids(tmp_path):
    path = manifest(tmp_path, {"audio": "a.wav", "asr": "a", "id": 17, "speaker": 1034})
    row, = read_manifest(path, strict=True)
    assert (row.id, row.speaker) == ("17", "1034")
    path = manifest(tmp_path, *[{"audio": "a.wav", "asr": "a", "id": 0}] * 2)
    with pytest.raises(InputError, match="id '0' stands at .*m.jsonl:1 already"):
        read_manifest(path, strict=True)


def test_a_line_of_granary_has_both_texts(tmp_path):
    line = {"audio_filepath": "/x.wav", "duration": 1.0, "source_lang": "en", "target_lang": "it"}
    path = manifest(tmp_path, {**line, "text": "hello", "answer": "ciao"},
                    {**line, "offset": 1, "text": "ciao", "answer": "ciao"},
                    {**line, "offset": 2, "text": "ciao", "answer": "na"}, name="n.json")
    rows = module.import_nemo(path)
    assert [(row.asr, row.st, row.lang) for row in rows] == [
        ("hello", {"it": "ciao"}, "en"), (None, {"it": "ciao"}, "en"), (None, {"it": "ciao"}, "en")]


def test_places_in_a_sound_are_joined_if_only_rounded(tmp_path):
    """At a border of the tenths they are kept by, too."""
    line = {"audio_filepath": "/x.wav", "duration": 1.0, "source_lang": "de"}
    path = manifest(tmp_path, {**line, "offset": 12.34, "text": "ja"},
                    {**line, "offset": 20.049, "text": "da"}, {**line, "offset": 30, "text": "so"},
                    name="n.json")
    more = manifest(tmp_path, *({**line, "target_lang": "en", "offset": offset, "text": text}
                                for offset, text in [(12.340000000000002, "yes"), (20.051, "there"),
                                                     (30.06, "thus")]), name="m.json")
    rows = module.import_nemo(path, more)
    assert [(row.asr, row.st) for row in rows] == [
        ("ja", {"en": "yes"}), ("da", {"en": "there"}), ("so", {}), (None, {"en": "thus"})]


def test_many_rows_of_one_sound_are_read_in_time_that_grows_with_their_number(
        tmp_path, monkeypatch):
    """A bitext may name one file of silence for all its rows."""
    calls, real = [], module.about_equal
    monkeypatch.setattr(module, "about_equal", lambda *two: calls.append(two) or real(*two))
    read_manifest(manifest(tmp_path, *[{"audio": "a.wav", "asr": "a"}] * 100), strict=True)
    assert not calls


def test_rows_without_a_duration_do_not_hide_the_others_tokens_a_second(tmp_path):
    rows = [Row(str(k), "a", asr="ja da", duration=duration) for k, duration in
            enumerate((2.0, None, 1.0))]
    tokenizer = Tokenizer.train(["ja da"], 259, [ASR])
    counted, numbers = module.cost_of(rows, "asr", tokenizer)
    per_row = len(serialize(interleave(rows[0], "asr"), tokenizer))
    assert counted == 3 and numbers[0] == pytest.approx(2 * per_row / 3.0)


@pytest.mark.parametrize("pair, source, target", [("es-en", "es", "en"), ("en-de", "en", "de"),
                                                  ("data", "en", "de")])
def test_what_is_spoken_stands_in_the_folders_name(tmp_path, pair, source, target):
    """As in mTEDx. A quote within quotes is doubled, as YAML does."""
    folder = tmp_path / "xx-yy" / pair / "data" / "dev" / "txt"
    if pair == "data":
        folder = tmp_path / pair / "txt"
    folder.mkdir(parents=True)
    (folder / "dev.yaml").write_text("- {duration: 2.0, offset: 0, wav: 'it''s.wav'}\n")
    (folder / f"dev.{source}").write_text("said\n")
    (folder / f"dev.{target}").write_text("translated\n")
    row, = module.import_mustc(folder / "dev.yaml")
    assert (row.lang, row.asr, row.st) == (source, "said", {target: "translated"})
    assert Path(row.audio).name == "it's.wav" and row.id == "it's_1"
    (folder.parent / "wav").mkdir()
    (folder.parent / "wav" / "it's.flac").touch()      # in mTEDx the YAML says .wav all the same
    row, = module.import_mustc(folder / "dev.yaml")
    assert Path(row.audio) == folder.parent / "wav" / "it's.flac"
    (folder / "dev.gz").write_text("no\ntranslation\nof it\n")
    with pytest.raises(InputError, match="has 1 lines, but dev.gz 3; is it a text in 'gz'"):
        module.import_mustc(folder / "dev.yaml")


def test_the_last_pair_of_languages_in_a_name_counts(tmp_path):
    for name, source, target in [("cv.clean_set.fr_en.train.tsv", "fr", "en"),
                                 ("covost_v2.fr_en.train_small.tsv", "fr", "en"),
                                 ("covost_v2.en_sv-SE.dev.tsv", "en", "sv-SE")]:
        path = tsv(tmp_path / name, ["path", "sentence", "translation"], ["a.mp3", "oui", "yes"])
        row, = module.import_covost(path)
        assert (row.lang, row.st) == (source, {target: "yes"})


def test_lines_that_a_backslash_joins_are_named(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("file\tfr\na.wav\tC:\\clips\\\nb.wav\tdeux\nc.wav\ttrois\n")
    told = []
    rows = module.import_tsv(path, columns={"audio": "file", "asr": "fr"}, on_bad=told.append)
    assert [row.asr for row in rows] == ["trois"]
    assert "a.tsv:2: skipped: 3 cells where the header has 2; lines 2 to 3 are one" in told[0]


def test_a_row_takes_from_both_lines_about_its_sound(tmp_path):
    sound = {"audio_filepath": "/x.wav", "duration": 1.0}
    path = manifest(tmp_path, {**sound, "text": "ja"}, name="n.json")
    more = manifest(tmp_path, {**sound, "text": "yes", "source_lang": "de", "target_lang": "en",
                               "speaker": "anna", "topic": "x"}, name="m.json")
    row, = module.import_nemo(path, more)
    assert (row.asr, row.st, row.lang, row.speaker) == ("ja", {"en": "yes"}, "de", "anna")
    assert row.other == {"topic": "x"}


def test_lengths_of_one_sound_are_joined_if_only_rounded_and_told_if_not(tmp_path):
    sound = {"audio_filepath": "/x.wav", "duration": 3.5}
    english = {**sound, "text": "yes", "source_lang": "de", "target_lang": "en"}
    path = manifest(tmp_path, {**sound, "text": "ja"}, {**english, "duration": 3.5124},
                    {**english, "target_lang": "fr", "text": "oui", "duration": 3.6},
                    {**english, "target_lang": "it", "text": "si", "duration": 3.62}, name="n.json")
    told = []
    near, apart = module.import_nemo(path, on_bad=told.append)
    assert (near.asr, near.st, near.duration) == ("ja", {"en": "yes"}, 3.5)
    assert (apart.asr, apart.st, apart.duration) == (None, {"fr": "oui", "it": "si"}, 3.6)
    assert told == [f"{path}: 1 rows have the sound of another from the same place on, but of "
                    "another duration: rows of their own"]


def test_the_byte_that_is_named_is_the_wrong_one(tmp_path):
    for mark in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(InputError, match="byte 0xff after 2 others"):
            module.decode(mark + b"ab\xffc")
    path = manifest(tmp_path, {"audio_filepath": "/x.wav", "text": "a", "source_lang": ["de"],
                               "target_lang": "en"}, name="n.json")
    with pytest.raises(InputError, match=r"source_lang cannot be \['de'\]"):
        module.import_nemo(path, strict=True)


def test_time_needs_no_times_of_a_text_that_is_not_there():
    row = Row("1", "a", asr="a b", st={"en": "x", "fr": ""}, times=[1.0, 2.0],
              st_times={"en": [1.5]})
    assert interleave(row, "time") == [("<asr>", "a"), ("<st:en>", "x"), ("<asr>", "b")]
    row.st["fr"] = "y"
    with pytest.raises(ValueError, match="no times"):
        interleave(row, "time")


def test_the_mustc_case(tmp_path):
    if not (DATA / "cases" / "mustc").exists():
        pytest.skip(f"needs {DATA / 'cases' / 'mustc'}")
    rows = module.import_mustc(DATA / "cases" / "mustc" / "dev.yaml", strict=True)
    texts = [(row.asr, row.st["de"]) for row in rows]
    assert texts == [("one", "eins"), ("two", "zw ei"), ("three", "")]


def test_the_covost_case():
    path = DATA / "cases" / "covost_v2.fr_en.train.tsv"
    if not path.exists():
        pytest.skip(f"needs {path}")
    rows = module.import_covost(path, strict=True, on_bad=[].append)
    assert [row.asr for row in rows] == [
        "plain words", 'he said "yes" to me', '"Quoted from end to end."',
        'an unmatched " in the middle',
        "a back\\slash", "a tab here", "dots … and «guillemets»", "l'été", '""" three', "a | pipe",
        "tail\\"]
    assert all(row.st["en"] == row.asr.upper() for row in rows)


def test_nemo_lines_of_any_kind(tmp_path):
    good = {"audio_filepath": str(tmp_path / "a.wav"), "duration": 1.0, "text": "a", "pnc": "yes"}
    lines = [b"[]", b"3", b"null", b'"a"', b"[" * 100000, b'{"text": "a"}', b"\xff", b"{",
             *({**good, key: value} for key, value in [
                 ("audio_filepath", 7), ("audio_filepath", ""), ("text", ["a"]), ("text", None),
                 ("target_lang", ["de"]), ("source_lang", 7), ("offset", "x"), ("duration", -1),
                 ("duration", True), ("text", "\ud800"), ("id", [1])])]
    told = []
    path = manifest(tmp_path, *lines, good)
    row, = module.import_nemo(path, on_bad=told.append)
    assert (row.asr, row.other, row.duration) == ("a", {"pnc": "yes"}, 1.0)
    assert [message.split(": ")[0] for message in told] == [
        *(f"{path}:{n}" for n in range(1, len(lines) + 1)), f"{path}"]
    assert not [message for message in told if "Error" in message]


def test_imported_rows_get_the_duration_that_is_sure(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "clips").mkdir()
    noise = [((k * 7919) % 1000 - 500) / 1000 for k in range(12345)]
    for name in ["a.wav", "b.flac", "c.ogg", "d.mp3"]:
        soundfile.write(tmp_path / "clips" / name, noise, 16000)
        whole = (tmp_path / "clips" / name).read_bytes()
        (tmp_path / "clips" / f"cut_{name}").write_bytes(whole[:len(whole) * 2 // 3])
    os.mkfifo(tmp_path / "clips" / "pipe.wav")
    names = ["a.wav", "b.flac", "c.ogg", "d.mp3", "cut_a.wav", "cut_b.flac", "cut_c.ogg",
             "cut_d.mp3", "none.wav", "pipe.wav"]
    path = tsv(tmp_path / "covost_v2.fr_en.x.tsv", ("path", "sentence", "translation"),
               *((name, "a", "b") for name in names))
    told = []
    seconds = {}
    for row in module.import_covost(path, on_bad=told.append):
        seconds[Path(row.audio).name] = row.duration
    assert [seconds[name] for name in names[:4]] == [12345 / 16000] * 4
    assert [seconds[name] for name in names[4:]] == [None] * 6
    assert told == ["6 rows get no duration: their sound is missing, not surely whole, "
                    "or ends before their start"]
    path = tsv(tmp_path / "t.tsv", ("a", "b", "c"), ("a.wav", "x", "0.5"), ("a.wav", "y", "9"))
    columns = {"audio": "a", "asr": "b", "start": "c"}
    first, second = module.import_tsv(path, columns=columns, folder="clips", on_bad=[].append)
    assert (first.duration, second.duration) == (12345 / 16000 - 0.5, None)


@pytest.mark.parametrize("name", [
    "vbr_no_xing_6s.mp3", "two_mp3_3s_and_3s.mp3", "cut_at_two_thirds.au",
    "cut_at_two_thirds.aiff", "flac_length_unknown.flac", "bad_caf_TO_1245.bin"])
def test_no_duration_is_guessed(name):
    pytest.importorskip("soundfile")
    if not (DATA / "cases" / name).exists():
        pytest.skip(f"needs {DATA / 'cases' / name}")
    assert module.sound_seconds(DATA / "cases" / name) is None


def test_a_piece_does_not_double_until_the_memory_is_full():
    doubling = [[99, 99]] + [[258 + k, 258 + k] for k in range(40)]
    with pytest.raises(InputError, match="makes a piece of 131072 bytes"):
        Tokenizer(["<asr>"], doubling)


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named_once(tmp_path, coding):
    """As Windows writes a text: every line would else be another error."""
    text = "\ufeff" * (coding == "utf-16-be") + '{"id": "a", "audio": "a.wav", "asr": "b"}\n' * 3
    (tmp_path / "m.jsonl").write_bytes(text.encode(coding))
    with pytest.raises(InputError, match="m.jsonl: UTF-16, but UTF-8 is read here"):
        read_manifest(tmp_path / "m.jsonl")


def test_it_works_alone_in_an_empty_folder(tmp_path):
    """-S leaves only the standard library: no sibling and no package is needed."""
    shutil.copy(ROOT / "serialize.py", tmp_path)
    tsv(tmp_path / "covost_v2.fr_en.x.tsv", ("path", "sentence", "translation"),
        ("a.mp3", "b", "c"))
    tsv(tmp_path / "a.tsv", ("a", "b"), ("a.wav", "b"))
    manifest(tmp_path, {"audio_filepath": "a.wav", "text": "a"}, name="n.jsonl")
    (tmp_path / "dev.yaml").write_text("- {duration: 1, offset: 0, wav: a.wav}\n")
    (tmp_path / "dev.en").write_text("a\n")
    calls = [[], ["--from", "covost", "covost_v2.fr_en.x.tsv", "-o", "out.jsonl"], ["out.jsonl"],
             ["--from", "tsv", "a.tsv", "--columns", "audio=a,asr=b", "-o", "t.jsonl"],
             ["--from", "nemo", "n.jsonl", "-o", "o.jsonl"],
             ["--from", "mustc", "dev.yaml", "-o", "m.jsonl"]]
    for call in calls:
        done = subprocess.run([sys.executable, "-S", "-E", "serialize.py", *call], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        has_no_duration = call[1:2] in (["covost"], ["tsv"], ["nemo"])
        assert ("pip install soundfile" in done.stderr) == has_no_duration
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {
        "n.jsonl", "out.jsonl", "t.jsonl", "o.jsonl", "m.jsonl"}


def test_a_row_with_an_id_keeps_it_whichever_stands_first(tmp_path):
    """As where the rows of a manifest got names of ours, and one without a name is put on top."""
    nameless, named = {"audio": "a.wav", "asr": "x"}, {"id": "m:1", "audio": "b.wav", "asr": "y"}
    rows = read_manifest(manifest(tmp_path, nameless, named), strict=True)
    assert [(row.id, row.asr) for row in rows] == [(f"{tmp_path / 'm.jsonl'}:1", "x"), ("m:1", "y")]
    rows = read_manifest(manifest(tmp_path, {**named, "id": "m:2"}, nameless), strict=True)
    assert [row.id for row in rows] == ["m:2", f"{tmp_path / 'm.jsonl'}:2"]
    with pytest.raises(InputError, match="m.jsonl:3: id 'm:1' stands at .*:2 already"):
        read_manifest(manifest(tmp_path, nameless, named, {**named, "audio": "c.wav"}), strict=True)


@pytest.mark.parametrize("arguments, message", [
    (["FILE", "-o", ""], "out is empty"), ([""], "a file's name is empty"),
    (["FILE", "--from", "tsv", "--columns", ""], "columns is empty"),
    (["FILE", "--size", "9", "-o", "x.jsonl"], "--size is for the table"),
    (["FILE", "--folder", "x"], "--folder is for --from tsv"),
    (["FILE", "--from", "covost", "--allow-outside", "-o", "x"], "not for --from covost"),
    (["FILE", "--from", "covost", "--project", "-o", "x.jsonl"], "--project is for manifests")])
def test_options_that_would_do_nothing_are_told(tmp_path, arguments, message):
    path = manifest(tmp_path, GOOD)
    code, out, err = command(*[str(path) if a == "FILE" else a for a in arguments])
    assert code == 2 and message in err and not out


def test_only_a_manifest_is_replaced(tmp_path):
    """What an importer reads beside the file that it is given, and sound, stay."""
    path = manifest(tmp_path, GOOD)
    nemo = b'{"audio_filepath": "a.wav", "text": "x"}\n'
    for name, content in (("dev.en", b"a line of text\n"), ("a.mp3", b"ID3\x04"), ("b", b"\0"),
                          ("ast.json", nemo), ("package.json", b'{"name": "audio"}')):
        (tmp_path / name).write_bytes(content)
        code, _, err = command(path, "-o", tmp_path / name)
        assert code == 2 and f"{name}: there already, and no manifest: it stays" in err
        assert (tmp_path / name).read_bytes() == content
    for name, content in (("old.jsonl", b'\xef\xbb\xbf\n{"audio": "x"'), ("new", b"")):
        (tmp_path / name).write_bytes(content)
        assert command(path, "-o", tmp_path / name)[0] == 0
        assert len(read_manifest(tmp_path / name, strict=True)) == 1


def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    """As root, everything can be written: so with a stand-in for os.access."""
    path = manifest(tmp_path, GOOD)
    with pytest.raises(InputError, match="the name of a folder"):
        module.check_target(f"{tmp_path}/new/")
    monkeypatch.setattr(module, "read_manifests", None)            # must not be called
    monkeypatch.setattr(os, "access", lambda folder, how: str(folder) != str(tmp_path))
    told = []
    monkeypatch.setattr(module, "tell", told.append)
    assert module.main([str(path), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert told == [f"serialize.py: {tmp_path / 'out.jsonl'}: not allowed to write in {tmp_path}"]


@pytest.mark.parametrize("audio", [".", "./", "clips/..", "../..", "/abs"])
def test_sound_that_is_a_folder_is_refused(tmp_path, audio):
    """It had passed, and failed after the manifest was written."""
    path = manifest(tmp_path, GOOD, {**GOOD, "id": "b", "audio": audio})
    told = []
    rows = read_manifest(path, on_bad=told.append, allow_outside=audio != "/abs")
    assert len(rows) == 1 and audio in told[0]
    here = Row(id="a", audio=str(tmp_path), asr="x")               # an absolute path to it
    assert module.outside_hint(tmp_path / "m.jsonl", [here]) == ""


def test_of_very_many_bad_lines_a_hundred_are_named(tmp_path):
    told = []
    path = manifest(tmp_path, GOOD, *[{"audio_filepath": f"{n}.wav"} for n in range(250)])
    assert len(read_manifest(path, on_bad=told.append)) == 1
    assert len(told) == 101 and "m.jsonl:2: skipped: not a JSON object with audio" in told[0]
    assert "--from nemo" in told[0]
    assert told[-1].endswith("250 of 251 rows skipped; 150 of them are not named")


def test_what_is_not_json_is_shown(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("path\tsentence\n")
    with pytest.raises(InputError, match=r"a.tsv:1: not JSON, Expecting value at character 1: "
                                         r"'path\\tsentence'"):
        read_manifest(path, strict=True)


def test_the_hint_about_sound_elsewhere_goes_by_folders(tmp_path):
    inside = Row(id="a", audio=str(tmp_path / "..data" / "a.wav"), asr="x")
    outside = replace(inside, audio=str(tmp_path.parent / "a.wav"))
    assert module.outside_hint(tmp_path / "m.jsonl", [inside]) == ""
    assert "--allow-outside" in module.outside_hint(tmp_path / "m.jsonl", [inside, outside])


def test_ctrl_c_ends_with_130(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(module, "read_manifests", interrupted)
    assert module.main([str(tmp_path / "m.jsonl")]) == 130
