"""The aligner against enumeration, planted dictionaries and gold links; its files; long pairs; word
times; contextual links."""
import itertools
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
import align
from align import NULL, WIDTH, Recipe

PLAIN = Recipe(variational=False, prior=0, spelling=0, stems=0, null=0, agree=False)  # textbook EM


def run(*arguments):
    """python align.py ... -> (what it printed, what it said)"""
    done = subprocess.run([sys.executable, ROOT / "align.py", *map(str, arguments)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def refused(*arguments, cwd=None, script=ROOT / "align.py", **options):
    """-> the one line that it said, exit code 2"""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True,
                          text=True, cwd=cwd, **options)
    assert done.returncode == 2 and done.stderr.startswith("align.py: "), done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def planted(n=300, seed=0, extra=0):
    """A random language of 60 words, its translation by a dictionary, word order shuffled a little,
    and, if `extra`, words of the target that nobody says. -> pairs, links"""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    source = [f"{x}{''.join(draw.choices(letters, k=6))}" for x in range(60)]
    target = [f"{x}{''.join(draw.choices(letters, k=6))}" for x in range(60)]
    pairs, links = [], []
    for _ in range(n):
        ids = draw.sample(range(60), draw.randint(3, 9))
        order = sorted(range(len(ids)), key=lambda i: i + draw.uniform(0, 1.5))
        words, gold = [], []
        for i in order:
            words += ["uh"] * (extra and draw.random() < 0.2)
            gold.append((i, len(words)))
            words.append(target[ids[i]])
        pairs.append(([source[x] for x in ids], words))
        links.append(sorted(gold))
    return pairs, links


# ---- Against enumeration -------------------------------------------------------------------------

def enumerate_paths(emission, null, jump):
    """All ways in which J words can be said by I words or NULL: P, posterior (J, I), expected
    counts of jumps."""
    J, I = emission.shape
    total, posterior, counts = 0.0, np.zeros((J, I)), np.zeros(2 * WIDTH + 1)
    for path in itertools.product(range(-1, I), repeat=J):
        p, last, moves = 1.0, -1, []
        for j, i in enumerate(path):
            if i < 0:
                p *= null[j]
                continue
            moves.append(min(max(i - last, -WIDTH), WIDTH) + WIDTH)
            p *= emission[j, i] * jump[moves[-1]]
            last = i
        total += p
        for j, i in enumerate(path):
            if i >= 0:
                posterior[j, i] += p
        np.add.at(counts, moves, p)
    return total, posterior / total, counts / total


@pytest.mark.parametrize("I, J", [(1, 1), (1, 4), (4, 1), (3, 5), (5, 3), (11, 2)])
def test_hmm_is_the_sum_over_all_paths(I, J):
    draw = np.random.default_rng(I * 10 + J)
    emission, null = draw.random((J, I), np.float32), draw.random(J, np.float32) / 4
    jump = draw.random(2 * WIDTH + 1)
    total, posterior, counts = enumerate_paths(emission.astype(float), null.astype(float), jump)
    found, found_counts, found_null = np.empty_like(emission), np.zeros_like(jump), null.copy()
    log_likelihood = align.hmm_sentence(emission, found_null, jump, found, found_counts)
    assert log_likelihood == pytest.approx(np.log(total), abs=1e-5)
    np.testing.assert_allclose(found, posterior, atol=1e-5)
    np.testing.assert_allclose(found_null, 1 - posterior.sum(1), atol=1e-5)
    np.testing.assert_allclose(found_counts, counts, atol=1e-4)


def test_ibm1_is_the_sum_over_all_words():
    draw = np.random.default_rng(0)
    emission, null = draw.random((4, 3), np.float32), draw.random(4, np.float32)
    near = np.exp(-2 * np.abs((np.arange(3) + 0.5) / 3 - (np.arange(4)[:, None] + 0.5) / 4))
    weight = near / near.sum(1, keepdims=True) * emission
    total = weight.sum(1) + null
    found, found_null = np.empty_like(emission), null.copy()
    log_likelihood = align.ibm1_sentence(emission, found_null, 2.0, found)
    assert log_likelihood == pytest.approx(np.log(total).sum(), abs=1e-5)
    np.testing.assert_allclose(found, weight / total[:, None], atol=1e-6)
    np.testing.assert_allclose(found_null, null / total, atol=1e-6)


@pytest.mark.parametrize("forward", [True, False])
def test_all_sentences_in_either_direction(forward):
    """The flat arrays against one sentence at a time; the sides have different lengths, so that
    exchanging them shows."""
    pairs = [("a b c".split(), "x y".split()), ([], "x".split()),
             ("c a".split(), "z x y z".split()), (["b"], ["y"])]
    bitext, (source_words, target_words) = align.make_bitext(pairs)
    direction = align.Direction(bitext, forward, 1)
    direction.table = np.random.default_rng(1).random(len(bitext.entry_source), np.float32)
    entries = zip(bitext.entry_source, bitext.entry_target, direction.table)
    entry = {(source_words[a], target_words[b]): t for a, b, t in entries}
    # a b c with x y, and a c with z; not b with z
    assert len(entry) == len(bitext.entry_source) == 8
    total = direction.e_step(True, 0.0)
    expected = []
    for s, (a, b) in enumerate(pairs):
        if a and b:
            t = (1 - NULL) * np.array([[entry[x, y] for y in b] for x in a])  # (I, J)
            words, vocabulary = (b, target_words) if forward else (a, source_words)
            null = NULL * direction.null_table[[vocabulary.index(word) for word in words]]
            p, posterior, _ = enumerate_paths(t.T if forward else t, null, direction.jump)
            expected.append(np.log(p))
            cells = slice(bitext.cell_start[s], bitext.cell_start[s + 1])
            found = direction.posterior[cells].reshape(len(a), len(b))
            np.testing.assert_allclose(found, posterior.T if forward else posterior, atol=1e-5)
    assert total == pytest.approx(sum(expected), abs=1e-4)


# ---- Learning ------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", [
    pytest.param(replace(PLAIN, ibm1=12, hmm=0, diagonal=0.0), id="ibm1"),
    pytest.param(replace(PLAIN, ibm1=12, hmm=0), id="ibm1 near the diagonal"),
    pytest.param(replace(PLAIN, ibm1=2, hmm=12), id="hmm")])
def test_the_likelihood_never_falls(recipe):
    pairs, _ = planted(200, extra=1)
    _, _, hidirection = align.train(pairs, recipe)
    rises = np.diff(np.array(hidirection)[recipe.ibm1 if recipe.hmm else 0:], axis=0)
    assert len(rises) == 11
    assert (rises > -1e-6 * abs(hidirection[-1][0])).all() and (rises[0] > 1).all()


@pytest.mark.parametrize("method", ["posterior", "grow-diag-final-and", "union"])
def test_a_planted_dictionary_is_recovered(method):
    pairs, gold = planted()
    assert align.align_bitext(pairs, Recipe(method=method)) == gold


def test_words_that_nobody_says_are_not_linked():
    pairs, gold = planted(extra=1)
    links = align.align_bitext(pairs)
    assert align.aer(links, gold) < 0.01
    said_by_nobody = [s for s, (_, target) in enumerate(pairs) for word in target if word == "uh"]
    linked = sum(pairs[s][1][j] == "uh" for s, line in enumerate(links) for _, j in line)
    assert len(said_by_nobody) > 200 and linked < 0.03 * len(said_by_nobody)


def test_a_word_more_likely_of_null_than_of_any_word_is_not_linked():
    recipe, nothing = align.Recipe(method="forward"), np.zeros((2, 1))
    assert align.choose_links(np.array([[0.3], [0.2]]), nothing, recipe) == []    # NULL: 0.5
    assert align.choose_links(np.array([[0.6], [0.1]]), nothing, recipe) == [(0, 0)]


def test_links_do_not_depend_on_threads_or_case():
    import numba
    pairs, _ = planted(100, extra=1)
    together = align.train(pairs)[1][0].posterior
    numba.set_num_threads(1)
    alone = align.train([([w.upper() for w in a], b) for a, b in pairs])[1][0].posterior
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    np.testing.assert_array_equal(together, alone)


def test_stems_align_words_never_seen_before():
    """Two new words in crossed order: their places say the wrong thing, the stems of their
    relatives the right one."""
    known = [(["qqqqa"], ["wwwwa"]), (["qqqqb"], ["wwwwb"]),
             (["kkkka"], ["mmmma"]), (["kkkkb"], ["mmmmb"])]
    pairs = planted(60)[0] + known + [("qqqqo kkkku".split(), "mmmmi wwwwe".split())]
    assert align.align_bitext(pairs)[-1] == [(0, 1), (1, 0)]
    assert align.align_bitext(pairs, Recipe(stems=0))[-1] == [(0, 0), (1, 1)]


def test_words_spelled_alike_are_drawn_together():
    pairs = [("nation president house".split(), "presidente nazione casa".split())]

    def posterior(spelling):
        _, (forward, _), _ = align.train(pairs, Recipe(spelling=spelling, ibm1=2, hmm=0))
        return forward.posterior.reshape(3, 3)

    with_it, without = posterior(1), posterior(0)
    assert with_it[0, 1] > 2 * without[0, 1] and with_it[1, 0] > 2 * without[1, 0]
    assert with_it[2, 0] < without[2, 0]


def test_spelling():
    words = ["president", "presidente", "xyz", "2020"]
    a, b = np.array([(0, 0), (0, 1), (0, 2), (3, 3)], np.int32).T
    assert align.spelled_alike((words, words), a, b).tolist() == pytest.approx([1, 0.8, 0, 1])


def test_exp_digamma():
    euler = 0.5772156649015329
    x = np.array([1, 2, 0.5, 100.0])
    expected = np.exp([-euler, 1 - euler, -euler - 2 * np.log(2), 4.600161852738087])
    np.testing.assert_allclose(align.exp_digamma(x), expected, rtol=1e-6)
    assert align.exp_digamma(np.zeros(1)) < 1e-100


def test_nothing_to_align():
    assert align.align_bitext([]) == []
    assert align.align_bitext([([], ["a"]), (["a"], [])]) == [[], []]
    assert align.align_bitext([(["a"], ["b"]), ([], ["a"])]) == [[(0, 0)], []]


# ---- Links: joined, scored, drawn ----------------------------------------------------------------

def test_symmetrise():
    forward, backward = {(0, 0), (1, 1), (1, 2), (4, 4)}, {(0, 0), (1, 1), (2, 1), (3, 5)}
    assert align.symmetrise(forward, backward, "intersection") == {(0, 0), (1, 1)}
    assert align.symmetrise(forward, backward, "union") == forward | backward
    # 1-2 and 2-1 are neighbours of 1-1 with one free word; 4-4 and 3-5 touch no link, but both
    # their words are free
    assert align.symmetrise(forward, backward) == forward | backward
    # 2-2 has both words free and no neighbour; 0-2 would give a second link to two linked words
    assert align.symmetrise({(0, 0), (2, 2)}, {(0, 0), (0, 2)}) == {(0, 0), (2, 2)}
    assert align.symmetrise(set(), set()) == set()


def test_aer():
    assert align.aer([[(0, 0), (1, 1)]], [[(0, 0), (1, 1)]]) == 0
    sure, possible = [{(0, 0), (1, 1)}], [{(1, 2)}]
    links = [{(0, 0), (1, 2), (2, 2)}]
    assert align.aer(links, sure, possible) == pytest.approx(1 - (1 + 2) / (3 + 2))
    assert align.aer([set()], sure, possible) == 1


# ---- The command line ----------------------------------------------------------------------------

def test_text_in_links_out(tmp_path):
    pairs, gold = planted(200)
    file, more, answers = tmp_path / "a.pairs", tmp_path / "more.pairs", tmp_path / "a.gold"
    lines = [" ".join(a) + " ||| " + " ".join(b) for a, b in pairs]
    lines[1] = "only one side |||"
    lines[2] = "a \0 b ||| c"
    lines[3] = "a ||| b ||| c"
    file.write_bytes("\n".join(lines[:50]).encode() + b"\nbad \xff byte ||| c\n")
    more.write_text("\n".join(lines[50:]) + "\n")
    links = [" ".join(f"{i}-{j}" for i, j in line) for line in gold]
    answers.write_text("\n".join([links[0] + " 99-0 x", "", "", ""] + links[4:50]) + "\n")
    out, said = run(file, "--train", more, "--gold", answers)
    assert out.splitlines() == [links[0], "", "", ""] + links[4:50] + [""]
    assert "AER 0.0" in said
    for place, what in ((2, "empty side"), (3, "NUL"), (4, "separator"), (51, "UTF-8")):
        assert f"{file}:{place}: not aligned: " in said and what in said
    assert f"{answers}:1: left out, '99-0'" in said and f"{answers}:1: left out, 'x'" in said
    assert f"{answers}:51: 50 lines of links for 51 pairs" in said


def test_demonstration():
    out, _ = run()
    assert out.splitlines()[-4:] == ["   das  # . . .", "  haus  . # . .",
                                     "   ist  . . # .", "   alt  . . . #"]


def test_a_missing_file_is_one_line():
    assert refused("nowhere.pairs") == "align.py: nowhere.pairs: No such file or directory\n"


def manifest(path, rows):
    import serialize
    audio = {"audio": str(path.parent / "x.wav")}
    serialize.write_manifest(path, [serialize.Row(**{**audio, **row}) for row in rows])


def test_manifest(tmp_path):
    from serialize import read_manifest
    pairs, gold = planted(200)
    rows = [{"id": str(n), "asr": " ".join(a), "st": {"xx": " ".join(b)}}
            for n, (a, b) in enumerate(pairs)]
    rows[0]["links"] = {"xx": [(0, 1)]}
    odd = [{"id": "no asr", "st": {"xx": "a"}}, {"id": "no st", "asr": "a"}]
    manifest(tmp_path / "in.jsonl", rows + odd)
    _, said = run(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    found = read_manifest(tmp_path / "out.jsonl")
    assert found[0].links == {"xx": [(0, 1)]} and "1 keep the links that they had" in said
    assert [row.links["xx"] for row in found[1:200]] == gold[1:]
    assert found[200].links == {} and found[201].links == {}
    assert [row.asr for row in found[:200]] == [row["asr"] for row in rows]


@pytest.mark.parametrize("start, end", [("-0.5", "-0.1"), ("0", "1e999"), ("0", "nan"),
                                        ("0", "2e9")])
def test_a_grid_has_no_times_that_a_manifest_refuses(start, end):
    def tokens(*times):
        return iter(['"IntervalTier"', '"words"', "0", "9", "1", *times, '"a"'])
    assert align.read_tier(tokens("0", "1")) == ("words", [(0.0, 1.0, "a")])
    with pytest.raises(ValueError):
        align.read_tier(tokens(start, end))


def test_gold_links_stay_inside_their_pair(tmp_path, capsys):
    """Two words and three: the last of each is 1 and 2, and what lies one beyond is named."""
    path = tmp_path / "x.gold"
    path.write_text("0-0 1p2 2-0 0-3 2-3\n")
    assert align.read_gold(path, [(["a", "b"], ["x", "y", "z"])]) == ([{(0, 0)}], [{(1, 2)}])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(f"left out, '{link}' is not a link" in line
               for link, line in zip(("2-0", "0-3", "2-3"), said))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/word-alignment")
def test_gold_links():
    """Two points above what was measured (20.0), eight below eflomal (29.3 on the same lines)."""
    folder = DATA / "word-alignment"
    pairs = align.read_pairs(folder / "en-it.dev.pairs")
    more = [pair for name in ("train", "test")
            for pair in align.read_pairs(folder / f"en-it.{name}.pairs")]
    sure, possible = align.read_gold(folder / "en-it.dev.gold", pairs)
    assert align.aer(align.align_bitext(pairs + more)[:len(pairs)], sure, possible) < 0.22


# ---- Long pairs ----------------------------------------------------------------------------------
def test_one_window_decides_about_every_link(monkeypatch):
    """And holds it, where it lies near the diagonal."""
    monkeypatch.setattr(align, "CELLS", 100)
    assert align.windows(10, 10) == [(0, 0, 10, 0, 10)] and len(align.windows(11, 10)) == 2
    for I, J in [(11, 10), (60, 60), (37, 80), (2, 900), (1, 500)]:
        found = align.windows(I, J)
        n = len(found) + 1
        for k, i0, i1, j0, j1 in found:  # 2 / n of both sides, rounded up
            assert 0 <= i0 < i1 <= I and 0 <= j0 < j1 <= J
            assert i1 - i0 < 2 * I / n + 2 and j1 - j0 < 2 * J / n + 2
        held = 0
        for i, j in itertools.product(range(I), range(J)):
            k, i0, i1, j0, j1 = found[align.deciding_window(i, j, I, J)]
            if abs((i + 0.5) / I - (j + 0.5) / J) < 0.5 / n:
                assert i0 <= i < i1 and j0 <= j < j1
                held += 1
        assert held >= min(I, J) / 2
    assert max((i1 - i0) * (j1 - j0) for _, i0, i1, j0, j1 in align.windows(60, 60)) == 100


def long_pair(n_words):
    """One pair of so many words, sentence after sentence of a planted language; its links."""
    pairs, gold = planted(n_words // 4)
    a, b, links = [], [], []
    for (source, target), line in zip(pairs, gold):
        links += [(len(a) + i, len(b) + j) for i, j in line]
        a, b = a + source, b + target
        if len(a) >= n_words:
            break
    return (a, b), sorted(links)


def test_a_pair_of_a_thousand_words(monkeypatch, capsys):
    """In windows, beside sentences to learn from, it is linked no worse than whole; it is told."""
    pair, gold = long_pair(1000)
    assert len(pair[0]) >= 1000
    *others, links = align.align_bitext([*planted()[0], pair])
    assert "1 pairs of more than 250000 cells" in capsys.readouterr().err
    assert len(others) == 300 and align.aer([links], [gold]) < 0.02
    assert align.aer([[(i, j + 1) for i, j in links]], [gold]) > 0.9  # control
    monkeypatch.setattr(align, "CELLS", 10**7)
    whole = align.align_bitext([*planted()[0], pair])[-1]
    assert capsys.readouterr().err == ""
    assert align.aer([links], [gold]) <= align.aer([whole], [gold])


# ---- The contextual aligner ----------------------------------------------------------------------

def test_extract_links():
    """Pieces 0 and 1 are word 0; the vectors are unit vectors: only equal ones are linked."""
    unit = 20 * np.eye(4)
    found = align.extract_links(unit[[0, 1, 2]], [0, 0, 1], unit[[2, 3, 1]], [0, 1, 1])
    assert found == [(0, 1), (1, 0)]
    # a source piece that is close to two target pieces is linked to both; one that is close to none
    # is linked to none
    assert align.extract_links(unit[[0, 3]], [0, 1], unit[[0, 0]], [0, 1]) == [(0, 0), (0, 1)]
    # softmax by hand: rows and columns of [[0, 7], [0, 0]]: 0.0009 0.9991; 0.5 0.5 and
    # 0.5 0.9991; 0.5 0.0009
    similarity = np.array([[0.0, 7.0], [0.0, 0.0]])
    assert align.extract_links(similarity, [0, 1], np.eye(2), [0, 1]) == [(0, 1), (1, 0)]
    found = align.extract_links(similarity, [0, 1], np.eye(2), [0, 1], 1e-4)
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_contextual_links_of_a_tiny_bert(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    import torch
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ho", "##use", "the", "das", "haus",
             "blue"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():  # words are told apart by themselves and not by their places
        model.embeddings.word_embeddings.weight *= 100
    model.save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    pairs = [(["the", "house"], ["house", "blue", "the"]), ([], ["the"]),
             (["the"] * 40, ["das"] * 3)]                  # more words than there are positions
    links = align.contextual_links(pairs, str(tmp_path))
    assert links[1] == [] and all(i < 28 for i, _ in links[2])
    assert {(0, 2), (1, 0)} <= set(links[0])
    # the same by hand: [CLS] the ho ##use [SEP] | [CLS] ho ##use blue the [SEP], the final layer
    with torch.inference_mode():
        a, b = (model(torch.tensor([ids])).last_hidden_state[0, 1:-1].numpy()
                for ids in ([2, 7, 5, 6, 3], [2, 5, 6, 10, 7, 3]))
    assert links[0] == align.extract_links(a, [0, 1, 1], b, [0, 0, 1, 2])
    (tmp_path / "a.pairs").write_text("the house ||| house blue the\n")
    out, _ = run(tmp_path / "a.pairs", "--model", tmp_path)
    assert out == " ".join(f"{i}-{j}" for i, j in links[0]) + "\n"
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {(0, 2), (1, 0)} <= set(align.contextual_links(pairs[:1], str(tmp_path))[0])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(align.InputError, match=f"--model {tmp_path}: "):
        align.contextual_links(pairs, str(tmp_path))


# ---- Files ---------------------------------------------------------------------------------------
CASES = DATA / "cases"
ESCAPE = "\x1b]0;owned\x07"


def test_a_line_ends_with_a_newline_and_nothing_else(tmp_path):
    """Sixteen lines stay sixteen, whatever else str.splitlines would take for an end."""
    lines = ["a b ||| c d", "a\rb ||| c\rd", "a\u2028b ||| c\x85d", "a\x0bb ||| c\x0cd", "",
             "a b ||| c d\r", "\ufeffa b ||| c d"]
    file = tmp_path / "odd.pairs"
    file.write_bytes("\n".join(lines).encode())
    pairs = align.read_pairs(file)
    assert pairs == [([*"ab"], [*"cd"])] * 4 + [([], [])] + [([*"ab"], [*"cd"])] * 2
    assert len(align.read_lines(file)) == 7 != len(file.read_text().splitlines())
    file.write_bytes(b"")
    out, _ = run(file)
    assert out == "" and align.read_lines(file) == []


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/data/cases")
def test_sixteen_odd_lines():
    out, said = run(CASES / "odd_lines.pairs")
    lines = out.split("\n")[:-1]
    assert len(lines) == (CASES / "odd_lines.pairs").read_bytes().count(b"\n") == 16
    assert lines[1] == "" and lines[3] != "" and "odd_lines.pairs:7: not aligned: a second" in said


def test_one_spelling_for_what_looks_the_same(tmp_path, capsys):
    file = tmp_path / "nfd.pairs"
    file.write_text("caf\u00e9 ||| kaffee\ncafe\u0301 ||| kaffee\nu\u0308 ||| x\n")
    pairs = align.read_pairs(file)
    assert pairs[0] == pairs[1] == (["caf\u00e9"], ["kaffee"]) and pairs[2][0] == ["\u00fc"]
    assert capsys.readouterr().err == f"{file}: 2 lines were not in NFC and now are\n"


def test_only_regular_files_are_read(tmp_path):
    import os
    os.mkfifo(tmp_path / "pipe.pairs")
    os.mkfifo(tmp_path / "pipe.TextGrid")
    (tmp_path / "good.pairs").write_text("a ||| b\n")
    for path in (tmp_path / "pipe.pairs", "/dev/zero", tmp_path):
        assert f"{path}: not a regular file" in refused(path, timeout=60)
        assert "not a regular file" in refused(tmp_path / "good.pairs", "--train", path, timeout=60)
        assert "not a regular file" in refused(tmp_path / "good.pairs", "--gold", path, timeout=60)
    with pytest.raises(align.InputError, match="no TextGrid"):
        align.textgrid_times(tmp_path)
    (tmp_path / "no.pairs").write_text("das haus the house\n")
    assert "no.pairs:1: no line has the separator" in refused(tmp_path / "no.pairs")


def test_nothing_from_a_file_reaches_the_terminal_as_a_command(tmp_path):
    file = tmp_path / "escape.pairs"
    file.write_text(f"{ESCAPE} ||| \na ||| b\n")
    gold = tmp_path / f"{ESCAPE[:4]}.gold"
    gold.write_text(f"{ESCAPE}\n0-0\n")
    _, said = run(file, "--gold", gold)
    assert "owned" in said and "AER 0.0" in said
    assert not any(ord(c) < 32 and c != "\n" or 127 <= ord(c) < 160 for c in said)


def test_it_says_what_it_wrote(tmp_path):
    file = tmp_path / "a.pairs"
    file.write_text("a b ||| c d\na ||| c\n")
    out, said = run(file)
    assert out == "0-0 1-1\n0-0\n" and "standard output: 2 lines, 3 links written" in said
    nothing, said = run(file, "-o", tmp_path / "a.links")
    assert nothing == "" and f"{tmp_path / 'a.links'}: 2 lines, 3 links written" in said
    assert (tmp_path / "a.links").read_text() == out


def test_a_full_disk_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "a.pairs").write_text("a b ||| c d\n" * 3000)
    (tmp_path / "a.links").write_text("old\n")
    script = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
              "import align; align.write_lines(sys.argv[1], ['0-0 1-1'] * 3000)")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.links"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode and "OSError" in done.stderr and "a.links'" in done.stderr
    assert (tmp_path / "a.links").read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.links", "a.pairs"]
    if Path("/dev/full").exists():
        assert "No space left" in refused(tmp_path / "a.pairs", "-o", "/dev/full")


def test_the_file_alone_in_an_empty_folder(tmp_path):
    """The demonstration and text need no other file; what needs one says which. That it compiles
    is said when it does, not whenever the file is newer than what was compiled."""
    script = tmp_path / "align.py"
    script.write_bytes((ROOT / "align.py").read_bytes())
    (tmp_path / "a.pairs").write_text("a b ||| c d\n")
    (tmp_path / "a.jsonl").write_text('{"audio": "x.wav", "asr": "a", "st": {"xx": "b"}}\n')
    for arguments, output in [([], "   alt  . . . #\n"), (["a.pairs"], "0-0 1-1\n")]:
        done = subprocess.run([sys.executable, "-s", script, *arguments], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith(output), done.stderr
        assert ("compiling" in done.stderr) == (not arguments)
        os.utime(script)
    said = refused("a.jsonl", "-o", "b.jsonl", cwd=tmp_path, script=script)
    assert "a manifest needs serialize.py beside align.py" in said
    assert not (tmp_path / "b.jsonl").exists()


def test_misused_options(tmp_path):
    assert "a manifest needs -o" in refused(tmp_path / "a.jsonl")
    assert "--times is for a manifest" in refused(tmp_path / "a.pairs", "--times", "x.ctm")
    assert "nowhere.jsonl" in refused("nowhere.jsonl", "-o", tmp_path / "b.jsonl")


@pytest.mark.parametrize("argv, named", [
    (["-o", "x"], "--out needs an input"),
    (["--times", "run/model.pt"], "--times needs an input"),
    (["--method", "union"], "--method needs an input"),
    (["a.jsonl", "-o", "b.jsonl", "--gold", "g"], "--gold is for FILE.pairs"),
    (["a.pairs", "--allow-outside"], "--allow-outside is for a manifest"),
    (["a.jsonl", "-o", "b.jsonl", "--model", "m", "--train", "t"], "--train is for what is learn"),
    (["a.pairs", "--model", "m", "--method", "union"], "--method is for what is learned"),
])
def test_an_option_that_would_change_nothing_is_refused(argv, named):
    with pytest.raises(align.InputError, match=named):
        align.parse_options(argv)
    if argv[0].startswith("a."):                       # the control: what has use is taken
        align.parse_options([a for a in argv if a in ("a.jsonl", "a.pairs", "--model", "m")])


def test_sound_outside_the_folder(tmp_path):
    import json
    (tmp_path / "in").mkdir()
    row = {"audio": "../x.wav", "asr": "a", "st": {"xx": "b"}}
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(row) + "\n")
    arguments = tmp_path / "in" / "a.jsonl", "-o", tmp_path / "b.jsonl"
    done = subprocess.run([sys.executable, ROOT / "align.py", *arguments], capture_output=True,
                          text=True)
    assert done.returncode == 2 and "--allow-outside permits" in done.stderr
    _, said = run(*arguments, "--allow-outside")
    assert f"{tmp_path / 'b.jsonl'}: 1 rows, 1 links written" in said
    assert json.loads((tmp_path / "b.jsonl").read_text())["audio"] == "x.wav"


def test_links_are_learned_from_all_rows_and_fill_only_what_lacks(capsys):
    from serialize import Row
    pairs, gold = planted(100)
    rows = [Row(id=str(n), audio="", asr=" ".join(a), st={"xx": " ".join(b)})
            for n, (a, b) in enumerate(pairs)]
    for row in rows[1:]:
        row.links = {"xx": [(0, 0)]}
    seen = []

    def learner(given):
        seen.append(len(given))
        return align.align_bitext(given)

    align.add_links(rows, learner)
    assert seen == [100] and rows[0].links["xx"] == gold[0]
    assert all(row.links == {"xx": [(0, 0)]} for row in rows[1:])
    align.add_links(rows, learner)  # nothing lacks
    assert seen == [100]
    alone = [Row(id="0", audio="", asr=rows[0].asr, st=rows[0].st)]
    align.add_links(alone, learner)  # control: one sentence does not teach its shuffled order
    assert alone[0].links["xx"] != gold[0] or gold[0] == sorted((k, k) for k in range(len(gold[0])))


# ---- Word times ----------------------------------------------------------------------------------

def test_word_times():
    #                              <asr>  ha  ##us  <st>  ist
    assert align.word_times([0, 3, 4, 4, 9], [-1, 0, 0, -1, 1], 0.04) == pytest.approx([0.2, 0.4])
    assert align.word_times([], [], 0.04) == []


CTM = ";; a comment\nu1 1 0.10 0.30 das\nu1 1 0.50 0.25 Haus\nnonsense\nu2 1 0.0 1.0 other\n"
LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.0
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1.0
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1.0
            text = "d"
    item [2]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.0
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.4
            text = "das"
        intervals [2]:
            xmin = 0.4
            xmax = 0.5
            text = ""
        intervals [3]:
            xmin = 0.5
            xmax = 0.75
            text = "Haus"
"""
SHORT = ('File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<exists>\n1\n'
         '"IntervalTier"\n"words"\n0\n1\n3\n0\n0.4\n"das"\n0.4\n0.5\n""\n0.5\n0.75\n"Haus"\n')


def test_times_from_a_ctm(tmp_path):
    from serialize import read_manifest
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "das haus", "times": [0.4, 0.7]},
                                     {"id": "u2", "asr": "mine"}])
    (tmp_path / "a.ctm").write_text(CTM)
    out = tmp_path / "out.jsonl"
    _, said = run(tmp_path / "in.jsonl", "-o", out, "--times", tmp_path / "a.ctm")
    first, second = read_manifest(tmp_path / "out.jsonl")
    assert first.times == [0.4, 0.75] and second.times is None
    assert "2 words: median 0.025 s, 90th percentile 0.045 s" in said
    assert "a.ctm:4: left out" in said and "in.jsonl:2: no times: 1 words of 'u2'" in said


@pytest.mark.parametrize("text, encoding", [(LONG, "utf-8"), (SHORT, "utf-8"), (LONG, "utf-16"),
                                            (SHORT, "utf-8-sig")])
def test_times_from_praat(tmp_path, text, encoding):
    (tmp_path / "u1.TextGrid").write_text(text, encoding=encoding)
    (tmp_path / "empty.TextGrid").write_text("")
    found = align.textgrid_times(tmp_path)
    assert found == {"u1": [("das", 0.4), ("", 0.5), ("Haus", 0.75)]}


def test_a_ctm_sorted_as_text(tmp_path, capsys):
    """10.5 stands before 9.0 there; a word said twice must not hide it. Times never fall."""
    lines = ["u 1 0.5 0.2 da", "u 1 10.5 0.2 da", "u 1 9.0 0.3 die", "u 1 9.1 0.1 in",
             "u 1 2e1 .5 x"]
    path = tmp_path / "a.ctm"
    path.write_text("\n".join(lines) + "\n")
    assert align.ctm_times(path) == {"u": [("da", 0.7), ("die", 9.3), ("in", 9.3), ("da", 10.7),
                                           ("x", 20.5)]}
    bad = ["u 1 1.2.3 0.1 a", "u 1 nan 0.1 a", "u 1 -1 0.1 a", "u 1 1 inf a", "u 1 1 0.1"]
    path.write_text("\n".join(bad + lines[:1]) + "\n")
    assert align.ctm_times(path) == {"u": [("da", 0.7)]}
    said = capsys.readouterr().err
    assert all(f"a.ctm:{n}: left out, not a line of a CTM" in said for n in range(1, 6))
    path.write_text("\n".join(bad))
    with pytest.raises(align.InputError, match="no line of a CTM"):
        align.ctm_times(path)


def test_textgrids_as_the_montreal_forced_aligner_writes_them(tmp_path, capsys):
    """SPEAKER/ID.TextGrid, and tiers named `anna - words` where several speak in a file."""
    for folder, end in (("anna", "0.75"), ("bob", "0.85")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "u1.TextGrid").write_text(LONG.replace("0.75", end))
    (tmp_path / "anna" / "u2.TextGrid").write_text(SHORT.replace('"words"', '"anna - words"'))
    (tmp_path / "cut.TextGrid").write_text(LONG[:-30])
    (tmp_path / "phones.TextGrid").write_text(LONG.replace('"words"', '"phones"'))
    found = align.textgrid_times(tmp_path)
    assert set(found) == {"anna/u1", "bob/u1", "anna/u2", "u2"}  # u1 alone could be either
    assert found["u2"] == [("das", 0.4), ("", 0.5), ("Haus", 0.75)]
    said = capsys.readouterr().err
    assert "cut.TextGrid: not a whole TextGrid" in said and "phones.TextGrid: no tier" in said
    from serialize import Row
    rows = [Row(id=name, audio="", asr="das haus", speaker=speaker) for name, speaker in
            [("u1", "bob"), ("u2", ""), ("anna/u1", ""), ("u1", "")]]
    times = {n: streams["<asr>"] for n, (_, streams) in
             enumerate(align.times_from(str(tmp_path))(rows))}
    assert times == {0: [0.4, 0.85], 1: [0.4, 0.75], 2: [0.4, 0.75]}


def test_a_speakers_folder_may_lie_deeper(tmp_path):
    """anna's file is hers, though bob was given the same sentence under the same name."""
    from serialize import Row
    (tmp_path / "mfa" / "anna").mkdir(parents=True)
    (tmp_path / "mfa" / "anna" / "u1.TextGrid").write_text(LONG)
    assert set(align.textgrid_times(tmp_path)) == {"mfa/anna/u1", "anna/u1", "u1"}
    rows = [Row(id="u1", audio="", asr="das haus", speaker=speaker) for speaker in ("anna", "bob")]
    times = [(row.speaker, ends["<asr>"]) for row, ends in align.times_from(str(tmp_path))(rows)]
    assert times == [("anna", [0.4, 0.75])]
    rows[0].speaker = "cleo"                                   # anna is no speaker: a folder
    assert len(list(align.times_from(str(tmp_path))(rows))) == 2


def test_two_channels_of_one_utterance_are_not_mixed(tmp_path, capsys):
    path = tmp_path / "a.ctm"
    path.write_text("sw1 A 0.0 0.3 hi\nsw1 B 0.1 0.2 yes\nsw2 1 0 0.5 no\nsw2 1 0.5 0.5 so\n")
    assert align.ctm_times(path) == {"sw2": [("no", 0.5), ("so", 1.0)]}
    assert "sw1 left out, it has the channels A, B" in capsys.readouterr().err


def test_case_is_more_than_lower_case():
    for word, other in (("stra\u00dfe", "STRASSE"), ("istanbul", "\u0130STANBUL"),
                        ("\u0131sparta", "ISPARTA"),
                        ("\u03bf\u03b4\u03cc\u03c2", "\u039f\u0394\u038c\u03a3")):
        assert align.match_words([word, "b"], [(other, 0.5), ("b", 0.7)]) == [0.5, 0.7], word
    assert align.match_words(["strase"], [("STRASSE", 0.5)]) is None


def test_two_speakers_in_one_textgrid(tmp_path):
    tier = '"IntervalTier"\n"{} - words"\n0\n1\n1\n{}\n{}\n"{}"\n'
    text = ('File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<exists>\n3\n'
            + tier.format("bob", 0.5, 0.75, 'say ""so""')
            + '"TextTier"\n"notes"\n0\n1\n1\n0.3\n"x"\n'
            + tier.format("anna", 0, 0.4, "das"))
    (tmp_path / "u.TextGrid").write_text(text)
    assert align.textgrid_times(tmp_path)["u"] == [("das", 0.4), ('say "so"', 0.75)]


def test_the_characters_of_a_longer_word_share_its_time():
    words = [*"\u4eca\u5929", "ok", "\u597d"]
    annotated = [("\u4eca\u5929", 0.5), ("OK", 0.8), ("\u597d", 1.0)]
    assert align.match_words(words, annotated) == [0.5, 0.5, 0.8, 1.0]
    assert align.match_words(words, annotated[:2]) is None
    assert align.match_words(words[:-1], annotated) is None
    assert align.match_words([], []) is None
    assert align.match_words(["cafe\u0301"], [("CAF\u00c9", 1.0)]) == [1.0]


def test_forced_aligners_leave_punctuation_out():
    words = ["\u201eHallo,", "-", "Welt!\u201c", "\u2026"]
    assert align.match_words(words, [("hallo", 0.5), ("welt", 0.9)]) == [0.5, 0.5, 0.9, 0.9]
    assert align.match_words(["-", "ja"], [("ja", 0.5)]) == [0.0, 0.5]
    assert align.match_words(["it's"], [("it's", 0.5)]) == [0.5]
    assert align.match_words(["ja", "-"], [("nein", 0.5)]) is None
    assert align.match_words(["-", "..."], [("-", 0.5)]) is None
    assert align.match_words(["ja"], [("ja", 0.5), ("ja", 0.7)]) is None


def test_a_word_that_the_aligner_cut_ends_with_its_last_piece():
    for words, annotated in [
            (["l'homme", "dort"], [("l'", 0.1), ("homme", 0.5), ("dort", 0.9)]),
            (["New-York", "dort"], [("new", 0.2), ("york", 0.5), ("dort", 0.9)]),
            (["a\u0301b", "-", "c"], [("A\u0301", 0.3), ("b", 0.5), ("c", 0.9)])]:
        ends = align.match_words(words, annotated)
        assert ends == ([0.5, 0.9] if len(words) == 2 else [0.5, 0.5, 0.9])
    assert align.match_words(["lhomme", "dort"], [("l", 0.1), ("homm", 0.5), ("dort", 0.9)]) is None


def test_words_that_look_like_silence_and_files_of_other_speakers(tmp_path, capsys):
    from serialize import Row
    tier = ('File type = "ooTextFile short"\n"TextGrid"\n0\n1\n<exists>\n1\n'
            '"IntervalTier"\n"words"\n0\n1\n{}\n{}')
    intervals = '0\n0.2\n""\n0.2\n{0}\n"bunu"\n{0}\n{1}\n"sil"\n'
    (tmp_path / "anna").mkdir()
    (tmp_path / "u1.TextGrid").write_text(tier.format(3, intervals.format(0.3, 0.6)))
    (tmp_path / "anna" / "u1.TextGrid").write_text(tier.format(3, intervals.format(0.4, 0.8)))
    (tmp_path / "u2.TextGrid").write_bytes(tier.format(3, intervals.format(0.3, 0.6)).replace(
        "bunu", "b\u00fcnu").encode("latin-1"))
    rows = [Row("u1", "a", asr="bunu sil", where="m:1"),
            Row("u1", "a", asr="bunu sil", speaker="anna", where="m:2"),
            Row("u1", "a", asr="bunu", where="m:3"), Row("u3", "a", asr="bunu", where="m:4"),
            Row("u1", "a", st={"en": "this"}, where="m:5")]
    times = [(row.where, ends["<asr>"]) for row, ends in align.times_from(str(tmp_path))(rows)]
    assert times == [("m:1", [0.3, 0.6]), ("m:2", [0.4, 0.8]), ("m:3", [0.3])]
    said = capsys.readouterr().err
    (tmp_path / "anna" / "u4.TextGrid").write_text(tier.format(3, intervals.format(0.4, 0.8)))
    rows = [Row("u4", "a", asr="bunu sil", speaker="bela", where="m:7"),     # has none of its own
            Row("u5", "a", asr="bunu sil", speaker="anna", where="m:8")]
    assert list(align.times_from(str(tmp_path))(rows)) == []
    assert "m:7: no times: no annotation of 'u4'" in capsys.readouterr().err
    rows[1].speaker = "cleo"                                   # anna is nobody here: a folder
    assert [row.id for row, _ in align.times_from(str(tmp_path))(rows)] == ["u4"]
    capsys.readouterr()
    (tmp_path / "cafe\u0301.TextGrid").write_text(tier.format(3, intervals.format(0.3, 0.6)))
    for name in ("caf\u00e9", "cafe\u0301"):                   # equal on the screen
        row, = align.times_from(str(tmp_path))([Row(name, "a", asr="bunu", where="m:6")])
        assert row[1]["<asr>"] == [0.3]
    capsys.readouterr()
    assert "m:4: no times: no annotation of 'u3'" in said
    assert "m:5: no times: no transcription" in said
    assert re.search(r"u2.TextGrid: neither UTF-8 nor UTF-16 at byte \d+", said)


def test_who_says_how_to_align_sees_it_done_beside_times_too(tmp_path, capsys, monkeypatch):
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "das haus", "st": {"en": "the house"},
                                      "links": {"en": [(0, 0), (1, 1)]}}])
    monkeypatch.setattr(align, "times_from", lambda path: lambda rows: iter(()))
    command = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--times", "x.pt"]
    with pytest.raises(align.InputError, match="x.pt: times for none of the 1 rows"):
        align.main([*command, "--method", "union"])
    assert not (tmp_path / "out.jsonl").exists()               # nothing was found
    assert "1 rows aligned, 1 keep the links that they had, AER" in capsys.readouterr().err
    monkeypatch.setattr(align, "contextual_links", lambda pairs, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        align.main([*command, "--model", "no-such-model"])


def test_a_text_that_is_not_cut_into_words_is_named():
    with pytest.raises(align.InputError, match="'das haus' is a text"):
        align.align_bitext([("das haus", "the house")])
    pairs = [("das haus".split(), "the house".split()), ([], ["x"])]
    assert align.align_bitext(zip(*zip(*pairs))) == align.align_bitext(pairs)


def test_a_manifest_may_have_any_name(tmp_path, capsys):
    """NeMo's are called .json, and so is what is made of them."""
    manifest(tmp_path / "in.json", [{"id": "u1", "asr": "das haus", "st": {"en": "the house"}}])
    align.main([str(tmp_path / "in.json"), "-o", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["links"]["en"]
    (tmp_path / "a.pairs").write_text("{ das haus ||| { the house\n")    # no object: two texts
    align.main([str(tmp_path / "a.pairs"), "-o", str(tmp_path / "links")])
    assert "0-0" in (tmp_path / "links").read_text()


def test_bars_are_words_in_a_manifest(tmp_path, capsys):
    """It has no separators; in FILE.pairs a second one leaves open where the sides meet."""
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "a ||| b", "st": {"en": "a ||| b"}}])
    align.main([str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")])
    assert "0-0" in json.loads((tmp_path / "out.jsonl").read_text())["links"]["en"]
    assert "not aligned" not in capsys.readouterr().err


def test_links_are_kept_where_the_times_fail(tmp_path, capsys, monkeypatch):
    """All that was aligned is written; what has links is not aligned again for times' sake."""
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "das haus",
                                      "st": {"en": "the house"}}])

    def failing(path):
        def source(rows):
            raise align.InputError("none of the 1 rows has sound")
            yield
        return source
    monkeypatch.setattr(align, "times_from", failing)
    command = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--times", "x.pt"]
    with pytest.raises(align.InputError, match="none of the 1 rows"):
        align.main(command)
    linked = (tmp_path / "out.jsonl").read_text()
    assert json.loads(linked)["links"]["en"] and "1 rows aligned" in capsys.readouterr().err
    with pytest.raises(align.InputError):
        align.main([str(tmp_path / "out.jsonl"), *command[1:]])
    assert "aligned" not in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == linked


def test_what_is_read_is_not_written_over(tmp_path):
    pairs, more, gold = (tmp_path / name for name in ("a.pairs", "b.pairs", "a.gold"))
    pairs.write_text("das haus ||| the house\n")
    more.write_text("ein haus ||| a house\n")
    gold.write_text("0-0 1-1\n")
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "das haus", "st": {"en": "the house"}}])
    times = tmp_path / "x.ctm"
    times.write_text("u1 1 0.1 0.2 das\nu1 1 0.4 0.2 haus\n")
    read = {path: path.read_bytes() for path in tmp_path.iterdir()}
    os.symlink(pairs, tmp_path / "link")
    for command, out in (([pairs], pairs), ([pairs], tmp_path / "link"),
                         ([pairs, "--train", more], more), ([pairs, "--gold", gold], gold),
                         ([tmp_path / "in.jsonl", "--times", times], times),
                         ([tmp_path / "in.jsonl", "--train", more], more)):
        with pytest.raises(align.InputError, match=f"{out.name}: that is .*, which is read"):
            align.main([*map(str, command), "-o", str(out)])
    with pytest.raises(align.InputError, match=f"{tmp_path}: a folder"):
        align.main([str(pairs), "-o", str(tmp_path)])
    assert {path: path.read_bytes() for path in read} == read


def test_the_commands_error_rate_knows_sure_from_possible(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.pairs").write_text("a b c ||| x y z\n")
    (tmp_path / "a.gold").write_text("0-0 1-1 1p2\n")
    monkeypatch.setattr(align, "align_bitext", lambda pairs, recipe: [[(0, 0), (1, 2), (2, 2)]])
    align.main([str(tmp_path / "a.pairs"), "--gold", str(tmp_path / "a.gold"), "-o",
                str(tmp_path / "a.links")])
    assert "AER 40.0\n" in capsys.readouterr().err      # swapped 25.0, sure ones alone 60.0


def test_a_ctm_gives_no_time_that_a_manifest_refuses(tmp_path, capsys):
    (tmp_path / "a.ctm").write_text("u 1 999999999 999999999 das\nu 1 0 1 haus\n")
    assert align.ctm_times(str(tmp_path / "a.ctm")) == {"u": [("haus", 1.0)]}
    assert "a.ctm:1: left out" in capsys.readouterr().err


def test_links_replace_links_and_nothing_else(tmp_path):
    (tmp_path / "a.pairs").write_text("a b ||| c d\n")
    (tmp_path / "talk.txt").write_text("\n12 34\nein wort\n")
    assert "there already, and no links: it stays" in refused(
        tmp_path / "a.pairs", "-o", tmp_path / "talk.txt")
    assert (tmp_path / "talk.txt").read_text() == "\n12 34\nein wort\n"
    (tmp_path / "gone.links").symlink_to(tmp_path / "none" / "x.links")
    assert "there is no folder" in refused(tmp_path / "a.pairs", "-o", tmp_path / "gone.links")
    for _ in range(2):
        align.main([str(tmp_path / "a.pairs"), "-o", str(tmp_path / "a.links")])
    page = "x" * 5000                                          # without a line's end
    for begin in ("", "\n", "12-3 "):
        (tmp_path / "talk.txt").write_text(begin + page)
        assert "no links: it stays" in refused(tmp_path / "a.pairs", "-o", tmp_path / "talk.txt")
    for cut in range(5):                                       # links cut by what is looked at
        (tmp_path / "long.links").write_text(" " * cut + "12-34 " * 1000)
        align.main([str(tmp_path / "a.pairs"), "-o", str(tmp_path / "long.links")])


def test_times_beyond_a_rows_end_are_none(tmp_path):
    """As Kaldi's, which count from the start of the recording."""
    from serialize import read_manifest
    row = {"asr": "das haus", "duration": 2.0}
    manifest(tmp_path / "in.jsonl", [{"id": "u1", **row}, {"id": "u2", **row, "start": 100}])
    (tmp_path / "a.ctm").write_text("u1 1 0.1 0.3 das\nu1 1 0.5 1.7 haus\n"
                                    "u2 1 100.1 0.3 das\nu2 1 100.5 1.0 haus\n")
    out = tmp_path / "out.jsonl"
    _, said = run(tmp_path / "in.jsonl", "-o", out, "--times", tmp_path / "a.ctm")
    assert [one.times for one in read_manifest(out)] == [[0.4, 2.2], None]
    assert "in.jsonl:2: no times: those in" in said and "end at 101.5 s of 2.0 s" in said


def test_textgrids_in_folders_that_are_links_are_read_once(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "u1.TextGrid").write_text(LONG)
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "disk")
    (tmp_path / "mfa").mkdir()
    (tmp_path / "mfa" / "anna").symlink_to(tmp_path / "disk")
    (tmp_path / "mfa" / "berta").mkdir()
    (tmp_path / "mfa" / "berta" / "u2.TextGrid").write_text(LONG)
    (tmp_path / "mfa" / "a-link").symlink_to(tmp_path / "mfa" / "berta")
    assert sorted(align.textgrid_times(tmp_path / "mfa")) == ["anna/u1", "berta/u2", "u1", "u2"]


def test_other_white_space_in_pairs_is_told(tmp_path, capsys):
    (tmp_path / "a.pairs").write_text("10\u00a0000 euros ||| 10,000 euros\r\na  b\t||| c\n")
    assert [len(a) for a, _ in align.read_pairs(tmp_path / "a.pairs")] == [3, 2]
    assert "a.pairs: 1 lines have other white space than blanks" in capsys.readouterr().err


def test_the_work_outlives_who_reads_its_messages(tmp_path):
    """The first language's message goes nowhere; the second one's links are found all the same."""
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "das haus",
                                      "st": {"en": "the house", "fr": "la maison"}}])
    command = f"'{sys.executable}' '{align.__file__}' in.jsonl -o out.jsonl 2>&1 | true"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    row, = map(json.loads, open(tmp_path / "out.jsonl"))
    assert set(row["links"]) == {"en", "fr"}


def test_what_was_not_found_replaces_nothing(tmp_path):
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "das haus", "st": {"en": "the house"}}])
    out = tmp_path / "out.jsonl"
    align.main([str(tmp_path / "in.jsonl"), "-o", str(out)])
    links = out.read_bytes()
    with pytest.raises(Exception):
        align.main([str(tmp_path / "in.jsonl"), "-o", str(out), "--model", "no/such/model"])
    assert out.read_bytes() == links


def test_silence_in_a_ctm_is_no_word(tmp_path):
    from serialize import Row
    (tmp_path / "a.ctm").write_text("u 1 0 0.3 SIL\nu 1 0.3 0.2 das\nu 1 0.5 0.1 <eps>\n"
                                    "u 1 0.6 0.4 haus\nu 1 1 0.2 SP\n")
    (_, times), = align.times_from(str(tmp_path / "a.ctm"))([Row("u", "a", asr="das haus")])
    assert times["<asr>"] == pytest.approx([0.5, 1.0])


def test_one_direction_alone_and_the_last_step_of_grow_diag():
    forward, backward = {(0, 0), (0, 2)}, {(0, 0), (3, 3)}
    assert align.symmetrise(forward, backward, "forward") == forward
    assert align.symmetrise(forward, backward, "backward") == backward
    # 0-2 has one free word, 3-3 two
    assert align.symmetrise(forward, backward) == {(0, 0), (3, 3)}


def test_the_method_is_the_one_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.pairs").write_text("a b ||| c d\n")
    seen = []
    monkeypatch.setattr(align, "align_bitext", lambda pairs, recipe: seen.append(recipe.method) or [
        [] for _ in pairs])
    for more in ([], ["--method", "union"], ["--method", "forward"]):
        align.main([str(tmp_path / "a.pairs"), "-o", str(tmp_path / "a.links"), *more])
    assert seen == ["posterior", "union", "forward"]


def test_options_that_are_empty_and_gold_of_nothing_are_told(tmp_path):
    """As `--times "$TIMES"` where the shell's variable is not set."""
    (tmp_path / "a.pairs").write_text("das haus ||| the house\n")
    for name in ("--times", "--model", "--gold", "-o"):
        with pytest.raises(align.InputError, match=f"{'--out' if name == '-o' else name} is empty"):
            align.main([str(tmp_path / "a.pairs"), name, ""])
    with pytest.raises(align.InputError, match="input is empty"):
        align.main([""])
    for gold in ("", "\n", "0,0 1,1\n"):
        (tmp_path / "a.gold").write_text(gold)
        with pytest.raises(align.InputError, match="a.gold: no link of .*a.pairs"):
            align.main([str(tmp_path / "a.pairs"), "--gold", str(tmp_path / "a.gold")])


def serialize_row(asr, st):
    from serialize import Row
    return Row(id="a", audio="a", asr=asr, st={"xx": st})


def test_small_things_are_told_as_they_are(tmp_path, capsys):
    assert align.align_bitext([(["a", ""], ["b", ""])] * 2)[0] == [(0, 0), (1, 1)]
    row = serialize_row("a b c", "x y")
    align.add_links([row], lambda pairs: [[]])        # without a link, all must be heard first
    assert row.links == {"xx": [(2, 0)]}
    (tmp_path / "x.pairs").write_text("a ||| b\nc d\n||| e\n")
    align.main([str(tmp_path / "x.pairs"), "-o", str(tmp_path / "x.links")])
    said = capsys.readouterr().err
    assert "x.pairs:2: not aligned: no separator |||" in said and said.count("x.pairs:2") == 1
    assert "x.pairs:3: not aligned: an empty side" in said
    for name, more in (("x.pairs", []), ("in.jsonl", ["--times", str(tmp_path / "none.pt")])):
        manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "a", "st": {"en": "b"}}])
        with pytest.raises(ValueError, match="there is no folder .*none"):    # before any work
            align.main([str(tmp_path / name), "-o", str(tmp_path / "none" / "out.jsonl"), *more])
    (tmp_path / "in.jsonl").write_text((tmp_path / "in.jsonl").read_text() + "{\n")
    before = (tmp_path / "in.jsonl").read_text()
    with pytest.raises(ValueError, match="in.jsonl:2: "):      # it would be gone
        align.main([str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "in.jsonl")])
    assert (tmp_path / "in.jsonl").read_text() == before
    assert ImportError in align.input_errors()
    capsys.readouterr()
    (tmp_path / "sub").mkdir()
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "a", "st": {"en": "b"}}])
    align.main([str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "sub" / "out.jsonl")])
    assert "the sound lies outside its folder" in capsys.readouterr().err


def test_more_text_is_cut_into_the_units_of_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "x.pairs").write_text("\u4eca\u5929 ok ||| today ok\n")
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "\u4eca\u5929",
                                      "st": {"en": "today"}}])
    seen = []
    monkeypatch.setattr(align, "align_bitext", lambda pairs, recipe: seen.extend(pairs) or [[]] * 2)
    align.main([str(tmp_path / "in.jsonl"), "--train", str(tmp_path / "x.pairs"), "-o",
                str(tmp_path / "out.jsonl")])
    assert [list(map(list, pair)) for pair in seen] == [
        [["\u4eca", "\u5929"], ["today"]], [["\u4eca", "\u5929", "ok"], ["today", "ok"]]]


def test_what_is_wrong_with_the_times_shows_before_the_alignment(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    manifest(tmp_path / "in.jsonl", [{"id": "u1", "asr": "das haus", "st": {"xx": "a"}}])
    monkeypatch.setattr(align, "add_links", lambda *_, **__: pytest.fail("hours of work"))
    (tmp_path / "bad.ctm").write_text("nothing\n")
    for name in ("no.ctm", "no.pt", "bad.ctm"):
        with pytest.raises((ValueError, OSError)) as caught:
            align.main([str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--times",
                        str(tmp_path / name)])
        assert name in str(caught.value) and not (tmp_path / "out.jsonl").exists()


def test_more_text_is_of_one_language(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"audio": "x.wav", "asr": "das haus", "st": {"xx": "a", "yy": "c"}}))
    (tmp_path / "more.pairs").write_text("das ||| a\n")
    with pytest.raises(align.InputError, match="--train is of one target language.*xx, yy"):
        align.main([str(path), "-o", str(tmp_path / "out.jsonl"), "--train",
                    str(tmp_path / "more.pairs")])


def test_silence_in_praat_is_no_word(tmp_path):
    (tmp_path / "u1.TextGrid").write_text(LONG)
    from serialize import Row
    rows = [Row(id="u1", audio="", asr="das haus"), Row(id="u2", audio="", asr="das haus")]
    assert list(align.times_from(str(tmp_path))(rows)) == [(rows[0], {"<asr>": [0.4, 0.75]})]


def viterbi_by_the_book(log_probs, ids):
    """log_probs (T, U + 1, V) -> the frame in which each label of the likeliest path is written."""
    T, U = len(log_probs), len(ids)
    score, by_label = np.full((T, U + 1), -np.inf), np.zeros((T, U + 1), bool)
    for t, u in itertools.product(range(T), range(U + 1)):
        blank = score[t - 1, u] + log_probs[t - 1, u, 0] if t else -np.inf
        label = score[t, u - 1] + log_probs[t, u - 1, ids[u - 1]] if u else -np.inf
        score[t, u] = max(blank, label, 0.0 if t == u == 0 else -np.inf)
        by_label[t, u] = label > blank
    t, u, frames = T - 1, U, []
    while u:
        if by_label[t, u]:
            frames.append(t)
            u -= 1
        else:
            t -= 1
    return frames[::-1]


def test_a_batch_has_the_times_of_its_rows_alone():
    torch = pytest.importorskip("torch")
    import model as models
    torch.manual_seed(0)
    model = models.Transducer(replace(models.PRESETS["tiny"], vocab=300)).eval()
    draw = np.random.default_rng(0)
    samples = [draw.normal(0, 0.1, n).astype(np.float32) for n in (16000, 40000, 9000, 31234)]
    ids = [draw.integers(10, 300, n).tolist() for n in (5, 12, 1, 9)]
    frames = align.best_path(model, samples, ids)
    assert frames == [align.best_path(model, [x], [y])[0] for x, y in zip(samples, ids)]
    assert [len(line) for line in frames] == [5, 12, 1, 9] and len(set(sum(frames, []))) > 4


def test_utf_16_and_files_that_cannot_be_read_are_named(tmp_path, capsys):
    path = tmp_path / "a.pairs"
    path.write_bytes("a ||| b\n".encode("utf-16"))
    with pytest.raises(align.InputError, match="a.pairs: UTF-16, but UTF-8 is read here"):
        align.read_pairs(path)
    path.write_bytes("a 1 0.1 0.2 b\n".encode("utf-16"))
    with pytest.raises(align.InputError, match="UTF-16"):
        align.ctm_times(path)
    (tmp_path / "gone.TextGrid").symlink_to(tmp_path / "nowhere")
    with pytest.raises(align.InputError, match="no TextGrid that can be read"):
        align.textgrid_times(tmp_path)
    assert "gone.TextGrid" in capsys.readouterr().err


def test_times_by_a_checkpoint(tmp_path, monkeypatch, capsys):
    """Of an untrained transducer, against the plain Viterbi above over all its logits."""
    torch = pytest.importorskip("torch")
    soundfile = pytest.importorskip("soundfile")
    import model as models
    from serialize import Tokenizer, read_manifest, serialize
    tokenizer = Tokenizer.train(["das haus", "the house"], 280, tags=("<asr>", "<st:en>"))
    torch.manual_seed(4)
    model = models.Transducer(replace(models.PRESETS["tiny"], vocab=len(tokenizer))).eval()
    models.save(tmp_path / "model.pt", model, tokenizer=tokenizer.to_dict(), mode="align",
                tail=0.32)
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    row = {"asr": "das haus", "st": {"en": "the house"}, "links": {"en": [(0, 0), (1, 1)]}}
    gone = {"id": "gone", **row, "audio": str(tmp_path / "y.wav")}
    alone, other = {"id": "alone", "asr": "das haus"}, {"id": "other", "st": {"fr": "la maison"}}
    manifest(tmp_path / "in.jsonl", [{"id": "u1", **row}, gone, alone, other])
    out = tmp_path / "out.jsonl"
    _, said = run(tmp_path / "in.jsonl", "-o", out, "--times", tmp_path / "model.pt")
    first, second, alone, other = read_manifest(out)
    assert second.times is None and "in.jsonl:2: skipped" in said
    assert len(alone.times) == 2 and alone.times == sorted(alone.times)      # as it was learned
    assert not other.st_times and "in.jsonl:4: no times: no text of a stream" in said

    monkeypatch.setattr(align, "BATCH_SAMPLES", 17000)         # of one row each
    sizes, best_path = [], align.best_path
    monkeypatch.setattr(align, "best_path", lambda model, samples, *rest: sizes.append(
        len(samples)) or best_path(model, samples, *rest))
    more = [{"id": name, **row} for name in ("u1", "u2", "u3")]
    manifest(tmp_path / "more.jsonl", more)
    align.main([str(tmp_path / "more.jsonl"), "-o", str(out), "--times",
                str(tmp_path / "model.pt")])
    assert "times for 3 of 3 rows" in capsys.readouterr().err
    assert [one.times for one in read_manifest(out)] == [first.times] * 3 and sizes == [1, 1, 1]

    monkeypatch.setattr(align, "LONGEST_TIMED_S", 0.9)         # longer ones would fill the memory
    command = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "short.jsonl"), "--times"]
    with pytest.raises(align.InputError, match="model.pt: times for none of the 4 rows"):
        align.main([*command, str(tmp_path / "model.pt")])
    said = capsys.readouterr().err
    monkeypatch.setattr(align, "LONGEST_TIMED_S", 300)
    bad = models.load(tmp_path / "model.pt")[0]
    with torch.no_grad():
        bad.encoder.std.fill_(1e-38)                           # finite, above 0, and useless
    models.save(tmp_path / "bad.pt", bad, tokenizer=tokenizer.to_dict(), mode="align")
    with pytest.raises(align.InputError, match="computes what is no number"):
        align.main([*command, str(tmp_path / "bad.pt")])
    manifest(tmp_path / "in.jsonl", [{"id": "long", **row, "asr": 200 * "das haus "}])
    with pytest.raises(align.InputError, match="times for none of the 1 rows"):
        align.main([*command, str(tmp_path / "model.pt")])
    assert "tokens to write in 1.0 s" in capsys.readouterr().err
    assert "in.jsonl:1: no times: 1 s, and times are found for at most 0.9 s" in said

    words = [("<asr>", "das"), ("<st:en>", "the"), ("<asr>", "haus"), ("<st:en>", "house")]
    ids = serialize(words, tokenizer)
    final = [len(serialize(words[:n], tokenizer)) - 1 for n in (1, 2, 3, 4)]  # each word's token

    def ends_after(seconds_of_silence):
        heard = np.append(samples, np.zeros(round(16000 * seconds_of_silence), np.float32))
        with torch.inference_mode():
            padded = models.pad_samples(torch.from_numpy(heard), model.config.subsampling)
            frames, _ = model.encoder(models.log_mel(padded)[None])
            labels, _ = model.label_encoder(torch.tensor([ids]))
            log_probs = model.joint(frames, labels)[0].log_softmax(-1).double().numpy()
        written = viterbi_by_the_book(log_probs, ids)
        return [round(min(1.0, (written[k] + 1) * model.config.frame_s), 3) for k in final]
    ends = ends_after(0.32)                                    # as its search hears it
    assert len(set(ends)) > 1 and ends != ends_after(0)
    assert (first.times, first.st_times["en"]) == (ends[::2], ends[1::2])


def test_short_rows_behind_a_long_one_are_as_long_in_a_batch(monkeypatch):
    """Two of 30000 samples with their padding fit, three do not."""
    import stream
    from serialize import Row, Tokenizer
    rows = [Row(id=str(k), audio="x", asr="a") for k in range(4)]
    sounds = [np.zeros(n, np.float32) for n in (30000, 10000, 10000, 10000)]
    sizes, tokenizer = [], Tokenizer.train(["a"], 280, tags=("<asr>",))
    monkeypatch.setattr(stream, "readable", lambda rows: zip(rows, sounds))
    monkeypatch.setattr(align, "BATCH_SAMPLES", 60000)
    monkeypatch.setattr(align, "batch_times", lambda *how: sizes.append(len(how[3])) or ())
    list(align.viterbi_times(rows, (None, tokenizer, {"mode": "asr"})))
    assert sizes == [2, 2]


def test_each_direction_teaches_the_other_in_the_hmms_iterations(monkeypatch):
    seen, real = [], align.Direction.expected_counts
    monkeypatch.setattr(align.Direction, "expected_counts", lambda self, other=None: seen.append(
        (self.forward, other and other.forward)) or real(self, other))
    align.train([(["a", "b"], ["x", "y"])] * 2, align.Recipe(ibm1=1, hmm=3))
    # The last iteration has no M-step.
    assert seen == [(True, None), (False, None)] + [(True, False), (False, True)] * 2
