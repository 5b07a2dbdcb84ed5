"""From nothing, or from a manifest of your own speech, to a model that streams: corpus, batches, steps, checkpoint.

    python train.py                                  the built-in corpus: nine and a half minutes on two cores
    python train.py train.jsonl --dev dev.jsonl      real speech (the format of the rows: serialize.Row)
    python train.py --resume runs/de-en/model.pt     go on where a run stopped

A transducer on a small grammar falls into a trap: its label encoder knows the grammar long before its encoder can hear,
so it learns to write everything in the first frame, guessed, and the sound is ignored from then on. Warm-up keeps it
out. Its first half has one task: a CTC head spells the letters that the encoder hears (units that words share are
learned in minutes). The second half adds two, still without the transducer loss; each can be solved by one side alone:
  - CTC also through the joint's own output layer, as if there were no labels, with the transcription as target: so when
    the transducer starts, the joint already writes every word when it is heard;
  - the label encoder learns, as a language model, what comes next: word order and translation.
The joint starts deaf to labels (label_proj is zero), and at first all labels are hidden from the label encoder, then
fewer. While this was built, models without the second task stayed in the trap, and one without the third heard as well
but had nine times the errors in its translation (32.7 % against 3.7 % after 1500 steps, with AdamW).
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import stream
from align import add_links, align_bitext
from model import PRESETS, Transducer, load, log_mel, pad_samples, save
from rnnt_loss import joint_rnnt_loss, runs_on_gpu
from serialize import Row, Tokenizer, interleave, needs, read_manifest, serialize, write_manifest
from stream import evaluate, read_audio

SAMPLE_RATE = 16000
CLIP = 5.0  # norm of the gradient
MUON = 10  # its learning rate over AdamW's
TASKS = ("transducer", "letters", "words", "next_label")
LOGGED = TASKS + ("gradient_norm", "audio_s_per_s")

# ---------------------------------------------------------------------------------------------------------------------
# The built-in corpus, part 1: a synchronous grammar. One sentence is a handful of concepts; every language spells the
# same concepts in an order of its own, so that the word links are known by construction.

LANGUAGES = ("de", "en", "es", "it")


def _table(text):
    """Entries end with a semicolon; an entry has a field for each language, "/" between forms, "_" for a space."""
    return [dict(zip(LANGUAGES, entry.split())) for entry in text.split(";")]


# Auxiliaries by person: I, you, he or she, we. English has none in the past tense, so its verb carries the link.
SUBJECTS = _table("""ich I yo io; du you tú tu; er he él lui; sie she ella lei; wir we nosotros noi;
                     anna anna anna anna; marco marco marco marco; lena lena lena lena; tomas tomas tomas tomas""")
PERSON = {"ich": 0, "du": 1, "wir": 3}  # all others: 2
PERFECT = _table("habe/hast/hat/haben /// he/has/ha/hemos ho/hai/ha/abbiamo")
MODALS = _table("""
    will/willst/will/wollen want_to/want_to/wants_to/want_to quiero/quieres/quiere/queremos voglio/vuoi/vuole/vogliamo;
    kann/kannst/kann/können can/can/can/can puedo/puedes/puede/podemos posso/puoi/può/possiamo;
    muss/musst/muss/müssen must/must/must/must debo/debes/debe/debemos devo/devi/deve/dobbiamo""")
VERBS = _table("""
    gekauft/kaufen bought/buy comprado/comprar comprato/comprare; gesehen/sehen saw/see visto/ver visto/vedere;
    gefunden/finden found/find encontrado/encontrar trovato/trovare; gemalt/malen painted/paint pintado/pintar
    dipinto/dipingere; verkauft/verkaufen sold/sell vendido/vender venduto/vendere; gezeichnet/zeichnen drew/draw
    dibujado/dibujar disegnato/disegnare; gebracht/bringen brought/bring traído/traer portato/portare;
    verloren/verlieren lost/lose perdido/perder perso/perdere; geputzt/putzen cleaned/clean limpiado/limpiar
    pulito/pulire; versteckt/verstecken hid/hide escondido/esconder nascosto/nascondere; gestohlen/stehlen
    stole/steal robado/robar rubato/rubare; genommen/nehmen took/take tomado/tomar preso/prendere""")
NOUNS = _table("""
    n/buch book m/libro m/libro; n/auto car m/coche f/macchina; n/haus house f/casa f/casa; m/hund dog m/perro m/cane;
    f/katze cat m/gato m/gatto; n/brot bread m/pan m/pane; f/blume flower f/flor m/fiore; m/brief letter f/carta
    f/lettera; n/bild picture m/cuadro m/quadro; m/tisch table f/mesa m/tavolo; f/flasche bottle f/botella
    f/bottiglia; n/fenster window f/ventana f/finestra; n/hemd shirt f/camisa f/camicia; f/birne pear f/pera f/pera;
    m/hut hat m/sombrero m/cappello; f/lampe lamp f/lámpara f/lampada""")
ADJECTIVES = _table("""
    rot red rojo/roja rosso/rossa; alt old viejo/vieja vecchio/vecchia; neu new nuevo/nueva nuovo/nuova;
    klein small pequeño/pequeña piccolo/piccola; groß big grande/grande grande/grande; grün green verde/verde
    verde/verde; weiß white blanco/blanca bianco/bianca; schön nice bonito/bonita bello/bella""")
ARTICLES = [dict(de=dict(m="den", f="die", n="das"), en={"": "the"}, es=dict(m="el", f="la"), it=dict(m="il", f="la")),
            dict(de=dict(m="einen", f="eine", n="ein"), en={"": "a"}, es=dict(m="un", f="una"),
                 it=dict(m="un", f="una"))]
ENDINGS = [dict(m="en", f="e", n="e"), dict(m="en", f="e", n="es")]  # of a German adjective after those articles
ADVERBS = _table("""heute today hoy oggi; gestern yesterday ayer ieri; jetzt now ahora adesso; hier here aquí qui;
                    wieder again otra_vez di_nuovo; oft often a_menudo spesso""")
PLACES = _table("""im_garten in_the_garden en_el_jardín nel_giardino; im_laden in_the_shop en_la_tienda nel_negozio;
                   am_meer at_the_sea en_el_mar al_mare; im_zug on_the_train en_el_tren nel_treno""")
ORDER = dict(de="SATDJNPV", en="SAVDJNPT", es="TSAVDNJP", it="SAVTDNJP")  # the letters of `say`
MAX_WORDS = 9


def draw_sentence(rng):
    """One random sentence in all languages: {language: [(concept, word)]}."""
    def pick(items):
        return items[rng.integers(len(items))]
    chosen = dict(S=pick(SUBJECTS), A=pick(PERFECT * 2 + MODALS), V=pick(VERBS), D=int(rng.integers(2)), N=pick(NOUNS),
                  J=pick(ADJECTIVES + [None] * 4), T=pick(ADVERBS + [None] * 3), P=pick(PLACES + [None] * 8))
    return {lang: say(chosen, lang) for lang in LANGUAGES}


def say(chosen, lang):
    """The words of one language in its order. Concepts: Subject, Auxiliary, Verb, Determiner, adJective, Noun, Time,
    Place; p marks the prepositions and articles before the last word of a place."""
    gender, _, noun = chosen["N"][lang].rpartition("/")
    person = PERSON.get(chosen["S"]["de"], 2)
    forms = {letter: chosen[letter] and chosen[letter][lang] for letter in "SAVJTP"}
    forms["A"] = forms["A"].split("/")[person]
    forms["V"] = forms["V"].split("/")[chosen["A"] in MODALS] # past tense, or the infinitive
    forms["D"], forms["N"] = ARTICLES[chosen["D"]][lang][gender], noun
    if forms["J"] and lang == "de":
        forms["J"] += ENDINGS[chosen["D"]][gender]
    elif forms["J"]:
        forms["J"] = forms["J"].split("/")[gender == "f" and lang != "en"]
    words = [(letter, word) for letter in ORDER[lang] for word in (forms[letter] or "").split("_") if word]
    return [("p" if letter == "P" and (k + 1 < len(words) and words[k + 1][0] == "P") else letter, word)
            for k, (letter, word) in enumerate(words)]


def link_words(source, target):
    """Words of the same concept are linked; an auxiliary belongs to its verb where the other side has none."""
    s_has, t_has = ("A" in dict(source)), ("A" in dict(target))
    def concept(letter):
        return "V" if letter == "A" and not (s_has and t_has) else letter
    return [(i, j) for i, (a, _) in enumerate(source) for j, (b, _) in enumerate(target) if concept(a) == concept(b)]


def builtin_row(index, *, seed=0, source="de", targets=("en",), test=False):
    """Utterance number `index` of the built-in corpus as a manifest Row without audio (`speak_row` makes that)."""
    rng = np.random.default_rng((seed, index, int(test)))
    while True:
        sentence = draw_sentence(rng)
        key = " ".join(word for _, word in sentence["de"])
        if max(map(len, sentence.values())) <= MAX_WORDS and (zlib.crc32(key.encode()) % 10 == 0) == test:
            break
    text = {lang: " ".join(word for _, word in words) for lang, words in sentence.items()}
    return Row(id=f"{'test' if test else 'train'}{index:06d}", audio="", lang=source, asr=text[source],
               st={t: text[t] for t in targets}, links={t: link_words(sentence[source], sentence[t]) for t in targets},
               speaker=f"{'test' if test else 'train'}{int(rng.integers(40 if test else 4000)):04d}",
               where=f"built-in corpus, {index}")


# ---------------------------------------------------------------------------------------------------------------------
# The built-in corpus, part 2: a formant voice. Every letter is one or two sounds; a sound is a place in the space of
# three formants, with some voice and some noise. Sounds glide into one another, as they do in a mouth.

# A sound: ms, F1, F2, F3 in Hz, how much voice, how much noise, centre and bandwidth of the noise in Hz. Capitals are
# the silence before a stop opens, "_" is the silence between words.
SOUNDS = {name: tuple(map(float, values)) for name, *values in map(str.split, """
    a 85 750 1250 2600  1.0  0   1500 1500; e 75 480 1950 2600  1.0  0   1500 1500; i 70 290 2300 3000  1.0  0   1500 1500
    o 80 480  850 2500  1.0  0   1500 1500; u 75 310  680 2300  1.0  0   1500 1500; ö 75 430 1500 2300  1.0  0   1500 1500
    ü 75 280 1800 2200  1.0  0   1500 1500; m 65 250  950 2200  .40  0   1500 1500; n 60 250 1600 2700  .40  0   1500 1500
    l 55 380 1250 2900  .60  0   1500 1500; r 55 460 1150 1550  .60 .04  1500 1500; w 50 300  650 2200  .45 .03   900  900
    j 50 260 2250 3100  .45 .03  3000 1500; f 70 350 1100 2300   0  .25  6500 3500; s 75 350 1700 2600   0  .50  5500 1200
    h 50 500 1500 2500  .05 .22  1500 1500; B 35 250  800 2300  .12  0    900  900; D 35 250 1750 2700  .12  0   3800 1500
    G 35 250 2050 2350  .12  0   2000  700; P 40 300  800 2300   0   0    900  900; T 40 300 1750 2700   0   0   3800 1500
    K 40 300 2050 2350   0   0   2000  700; b 18 350  900 2300  .40 .20   900  900; d 18 350 1750 2700  .40 .25  3800 1500
    g 20 350 2050 2350  .40 .25  2000  700; p 25 400  900 2300   0  .40   900  900; t 25 400 1750 2700   0  .50  3800 1500
    k 28 400 2050 2350   0  .45  2000  700; _ 40 500 1500 2500   0   0   1500 1500""".replace(";", "\n").strip().split("\n"))}
LETTERS = {"b": "Bb", "c": "Kk", "d": "Dd", "g": "Gg", "k": "Kk", "p": "Pp", "q": "Kk", "t": "Tt", "v": "f", "x": "Kks",
           "y": "i", "z": "Ts", "ß": "s", "ä": "e", "á": "a", "à": "a", "é": "e", "è": "e", "í": "i", "ì": "i",
           "ó": "o", "ò": "o", "ú": "u", "ù": "u", "ñ": "nj"}
BLOCK = 40  # samples (2.5 ms) between two settings of the filters


@dataclass(frozen=True)
class Speaker:
    pitch_hz: float
    tract: float  # scales every formant
    rate: float  # scales every duration


def make_speaker(name):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return Speaker(80 * (250 / 80) ** rng.random(), rng.uniform(0.88, 1.12), rng.uniform(0.8, 1.2))


def speak(words, speaker, rng):
    """Say `words`. Returns (float32 samples at 16 kHz, word end times in s)."""
    rows, ends, blocks = [], [], 0

    def add(sound, stretch):
        nonlocal blocks
        n = max(2, round(SOUNDS[sound][0] * stretch * SAMPLE_RATE / 1000 / BLOCK))
        rows.append((n,) + SOUNDS[sound][1:])
        blocks += n
    add("_", rng.uniform(2, 6))
    for word in words:
        for letter in word.lower():
            for sound in LETTERS.get(letter, letter if letter in SOUNDS else "_"):
                add(sound, speaker.rate * rng.uniform(0.85, 1.15))
        ends.append(blocks * BLOCK / SAMPLE_RATE)
        add("_", rng.uniform(0.2, 1.5))
    add("_", rng.uniform(4, 8))
    table = np.array(rows)
    track = np.repeat(table[:, 1:], table[:, 0].astype(int), axis=0)  # (blocks, 7)
    glide = np.ones(7) / 7  # 17.5 ms from one sound to the next
    padded = np.pad(track, ((3, 3), (0, 0)), mode="edge")
    track = np.stack([np.convolve(padded[:, k], glide, mode="valid") for k in range(7)], axis=1)
    track[:, [0, 1, 2, 5, 6]] *= speaker.tract
    noise = rng.standard_normal((2, blocks * BLOCK)).astype(np.float32)
    time = np.arange(blocks) * (BLOCK / SAMPLE_RATE)
    pitch = speaker.pitch_hz * (1.08 - 0.06 * time + 0.04 * np.sin(2 * math.pi * (rng.random() + 2.5 * time)))
    wave = _formants(track, pitch, noise[0])
    wave *= 0.06 / np.sqrt(np.mean(wave ** 2))
    wave += noise[1] * (0.06 * 10 ** (-rng.uniform(10, 30) / 20))
    return wave * np.float32(10 ** (rng.uniform(-15, 15) / 20)), ends


@numba.njit(cache=True, nogil=True, fastmath=True)
def _formants(track, pitch, noise):
    """Source and filter: pulses through three resonators in a row, noise through a fourth beside them."""
    wave = np.empty(noise.size, np.float32)
    a, b, c = np.zeros(4), np.zeros(4), np.zeros(4)
    y1, y2 = np.zeros(4), np.zeros(4)
    phase, glottis = 0.0, 0.0
    for k in range(track.shape[0]):
        for r in range(4):
            centre = min(track[k, 5] if r == 3 else track[k, r], 7600.0)
            width = track[k, 6] if r == 3 else 60.0 + 0.04 * centre
            radius = math.exp(-math.pi * width / SAMPLE_RATE)
            c[r] = -radius * radius
            b[r] = 2 * radius * math.cos(2 * math.pi * centre / SAMPLE_RATE)
            a[r] = 1 - b[r] - c[r]
        a[3] = math.sqrt(1 - math.exp(-2 * math.pi * track[k, 6] / SAMPLE_RATE))  # about equal loudness for any width
        for n in range(k * BLOCK, (k + 1) * BLOCK):
            phase += pitch[k] / SAMPLE_RATE
            pulse = 0.0
            if phase >= 1:
                phase -= 1
                pulse = 1.0
            glottis = 0.92 * glottis + pulse + 0.01 * noise[n]
            x = track[k, 3] * glottis
            for r in range(3):
                y = a[r] * x + b[r] * y1[r] + c[r] * y2[r]
                y2[r], y1[r], x = y1[r], y, y
            y = a[3] * track[k, 4] * noise[n] + b[3] * y1[3] + c[3] * y2[3]
            y2[3], y1[3] = y1[3], y
            wave[n] = x + 0.15 * y
    return wave


def speak_row(row, seed=0):
    """The audio of a built-in row: (samples, row), the row now with its duration and times."""
    rng = np.random.default_rng((seed, zlib.crc32(row.id.encode())))
    samples, row.times = speak(row.asr.split(), make_speaker(row.speaker), rng)
    row.duration = len(samples) / SAMPLE_RATE
    for lang, text in row.st.items():  # when it could be said: once the words it is linked to have ended
        row.st_times[lang] = [row.times[i] for i in needs(len(row.times), text.split(), row.links[lang])]
    return samples, row


# ---------------------------------------------------------------------------------------------------------------------
# Data: rows -> features and targets -> batches. Every draw is seeded, by row or by step, so that a resumed run
# and a repeated one see the same utterances in the same order.

class BuiltIn:
    """Fresh utterances for ever: epoch e holds the utterances e * SIZE ... (e + 1) * SIZE - 1."""
    SIZE = 1600

    def __init__(self, languages, seed, subsampling):
        self.sources, self.targets = (side.split(",") for side in languages.split("-"))
        unknown = set(self.sources + self.targets) - set(LANGUAGES)
        if unknown:
            raise ValueError(f"the built-in corpus speaks {', '.join(LANGUAGES)}, not {', '.join(sorted(unknown))}")
        self.seed, self.subsampling = seed, subsampling

    def rows(self, epoch, size=SIZE, test=False):
        return [builtin_row(k, seed=self.seed, source=self.sources[k % len(self.sources)], targets=self.targets,
                            test=test) for k in range(epoch * size, (epoch + 1) * size)]

    def size(self, row):
        return len(row.asr)  # the voice spends about the same time on every letter

    def mel(self, row):
        return mel_of(speak_row(row, self.seed)[0], self.subsampling)

    def unseen(self, n):
        """n test utterances with their audio: sentences and speakers that never occur in training."""
        return [(row, speak_row(row, self.seed)[0]) for row in self.rows(0, n, test=True)]


class Manifest:
    """Rows with their features, computed once and kept in half precision: 60 MB for an hour."""

    def __init__(self, rows, subsampling, options):
        self._rows, self._mel = [], {}
        for row, samples in readable(rows, options):
            self._rows.append(row)
            self._mel[row.id] = mel_of(samples, subsampling).half()

    def rows(self, epoch):
        return self._rows

    def size(self, row):
        return row.duration

    def mel(self, row):
        return self._mel[row.id].float()


def readable(rows, options):
    """Yield (row, samples) for the rows that can be used; the others are named, counted and left out."""
    bad = 0
    for row in tqdm(rows, desc="audio", unit="row", leave=False, disable=None):
        try:
            interleave(row, options.interleave)  # has the row what this mode needs?
            samples = read_audio(row.audio, row.start, row.duration)
        except ValueError as error:
            message = str(error) if row.where in str(error) else f"{row.where}: {error}"
            if options.strict:
                raise ValueError(message) from None
            tqdm.write(f"{message}: skipped", file=sys.stderr)
            bad += 1
            continue
        row.duration = len(samples) / SAMPLE_RATE
        yield row, samples
    if bad:
        tqdm.write(f"{bad} of {len(rows)} rows skipped", file=sys.stderr)
    if bad == len(rows):
        raise ValueError(f"none of the {len(rows)} rows can be used")


def mel_of(samples, subsampling):
    return log_mel(pad_samples(torch.from_numpy(samples), subsampling))  # (F, 80)


def collate(**sequences):
    """Padded tensors with their lengths: collate(mel=[...]) has .mel (B, F, 80) and .mel_lengths (B,)."""
    batch = SimpleNamespace()
    for name, items in sequences.items():
        items = [item if torch.is_tensor(item) else torch.tensor(item, dtype=torch.long) for item in items]
        setattr(batch, name, torch.nn.utils.rnn.pad_sequence(items, batch_first=True))
        setattr(batch, f"{name}_lengths", torch.tensor([len(item) for item in items]))
    return batch


def random_state(*key):
    return np.random.default_rng([zlib.crc32(str(k).encode()) for k in key])


def epoch_batches(corpus, epoch, options):
    """The rows of one epoch in batches of about equal length, the batches in random order."""
    rows = corpus.rows(epoch)
    rng = random_state(options.seed, epoch, "order")
    size = np.array([corpus.size(row) for row in rows]) * rng.uniform(0.95, 1.05, len(rows))
    order = np.argsort(size, kind="stable")
    batches = [[rows[i] for i in order[k:k + options.batch]] for k in range(0, len(order), options.batch)]
    return [batches[k] for k in rng.permutation(len(batches))]


def make_batch(rows, corpus, tokenizer, options):
    """mel; targets, the interleaved stream; spoken, the transcription alone; letters, the same as bytes + 1."""
    return collate(mel=[corpus.mel(row) for row in rows],
                   targets=[serialize(interleave(row, options.interleave), tokenizer) for row in rows],
                   spoken=[tokenizer.encode(row.asr or "") for row in rows],
                   letters=[[byte + 1 for byte in (row.asr or "").encode()] for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# Training

def augment(mel, lengths):
    """(B, F, 80), (B,): another level (exact on a log-mel) and SpecAugment, two bands and two stretches of time of every
    utterance replaced by its mean."""
    (B, n_frames, n_mels), new = mel.shape, partial(torch.rand, device=mel.device)
    time, band = (torch.arange(n, device=mel.device) for n in (n_frames, n_mels))
    real, length = (time < lengths[:, None])[:, :, None], lengths[:, None].float()
    mean = (mel * real).sum((1, 2), keepdim=True) / (length[:, :, None] * n_mels)
    hidden = torch.zeros_like(mel, dtype=torch.bool)
    for place, extent, longest, axis in 2 * ((band, n_mels, 16, 1), (time, length, (length / 8).clamp(max=40), 2)):
        width = longest * new(B, 1)
        start = (extent - width) * new(B, 1)
        hidden |= ((place >= start) & (place < start + width)).unsqueeze(axis)
    return (torch.where(hidden, mean, mel) + 4 * new(B, 1, 1) - 2) * real


def label_dropout(step, options):
    """The share of labels that the label encoder does not get to see: all of them when the transducer starts, so that it
    must listen to write anything at all, then fewer and fewer."""
    left = 1 - (step - options.warm_steps) / max(1, options.forget_steps)
    return max(options.label_dropout, left) if step >= options.warm_steps else options.label_dropout


def ctc_loss(logits, frame_lengths, targets, target_lengths):
    """Per target symbol, in nats; utterances without a transcription, or with more symbols than frames, do not count."""
    costs = F.ctc_loss(logits.float().log_softmax(-1).transpose(0, 1), targets, frame_lengths, target_lengths,
                       blank=0, reduction="none", zero_infinity=True)  # (B,)
    return (costs * (target_lengths > 0)).sum() / target_lengths.sum().clamp(min=1)


def language_loss(model, label_out, targets, target_lengths):
    """Cross entropy of the next label given those before it (the ones shown), from the label encoder and its own embeddings alone:
    word order and translation are learned from this long before the transducer's gradient would teach them."""
    scores = label_out[:, :-1] @ model.label_encoder.embedding.weight.T / model.config.dim ** 0.5  # (B, U, V)
    present = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]
    return F.cross_entropy(scores[present].float(), targets[present])


def tasks(step, options):
    """What is learned at this step, and how much each task weighs."""
    if step < options.warm_steps // 2:
        return {"letters": 1.0}
    sides = ("letters", "next_label") + ("words",) * (options.interleave != "st")  # words: those of the transcription
    if step < options.warm_steps:
        return dict.fromkeys(sides, 1.0)
    return {"transducer": 1.0} | dict.fromkeys(sides, options.side_weight)


def losses(model, batch, names, chunk=None, forget=0.0):
    """{task: nats per target symbol} for the tasks named; `forget` is the share of labels that the label encoder does
    not get to see."""
    frames, _ = model.encoder(batch.mel, batch.mel_lengths, chunk=chunk)  # (B, T, D)
    frame_lengths = batch.mel_lengths // model.config.subsampling
    joint, result = model.joint, {}
    if "letters" in names:
        result["letters"] = ctc_loss(model.ctc(frames), frame_lengths, batch.letters, batch.letters_lengths)
    if "words" in names:
        alone = joint.output(torch.tanh(joint.encoder_proj(frames)))  # (B, T, V): what the joint hears without labels
        result["words"] = ctc_loss(alone, frame_lengths, batch.spoken, batch.spoken_lengths)
    if "next_label" in names:
        forgotten = torch.rand(batch.targets.shape, device=batch.targets.device) < forget
        label_out, _ = model.label_encoder(torch.where(forgotten, 0, batch.targets))  # (B, U1, D)
        result["next_label"] = language_loss(model, label_out, batch.targets, batch.targets_lengths)
    if "transducer" in names:
        cost = joint_rnnt_loss(joint.encoder_proj(frames), joint.label_proj(label_out), joint.output.weight,
                               joint.output.bias, batch.targets, frame_lengths, batch.targets_lengths,
                               blank=0, reduction="sum")
        result["transducer"] = cost / batch.targets_lengths.sum()
    return result


def make_optimizers(model, options):
    """Muon for the matrices of the two encoders, AdamW for all else: on real speech, CTC on letters then needs half the
    steps."""
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and name.endswith("weight")
                and name.startswith(("encoder", "label_encoder")) and "embedding" not in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return (torch.optim.Muon(matrices.values(), lr=MUON * options.lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01))


def learning_rate(step, options):
    """A factor: linear warm-up, then half a cosine down to a fiftieth."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, step / options.steps))))


def train_step(model, optimizers, batch, step, options):
    """One update; returns the losses and the norm of their gradient as numbers, by name."""
    torch.manual_seed(zlib.crc32(f"{options.seed} {step}".encode()))  # dropout is a function of the step: resume is exact
    chunk = int(random_state(options.seed, step, "chunk").choice(model.config.chunks))
    for optimizer, peak in zip(optimizers, (MUON * options.lr, options.lr)):
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate(step, options)
    weights = tasks(step, options)
    if options.augment and len(weights) > 1:  # what cannot hear yet learns nothing from holes
        batch.mel = augment(batch.mel, batch.mel_lengths)
    each = losses(model, batch, weights, chunk, label_dropout(step, options))
    sum(weights[name] * loss for name, loss in each.items()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    if torch.isfinite(norm):  # a batch that overflows is dropped, not learned from
        for optimizer in optimizers:
            optimizer.step()
    return {name: float(loss.detach()) for name, loss in each.items()} | {"gradient_norm": float(norm)}


# ---------------------------------------------------------------------------------------------------------------------
# A run: options -> corpus, model, folder -> steps -> checkpoint and captions

COMMON = dict(manifest=None, dev=None, corpus="de-en", preset="tiny", interleave="align", resume=None, seed=0, out=None,
              steps=1300, batch=16, lr=2e-3, warmup=100, warm_steps=400, forget_steps=150, side_weight=0.3,
              label_dropout=0.1, merges=100, dropout=0.1, chunks=(16, 8), augment=False, eval_every=500, device=None,
              strict=False, allow_outside=False, write_corpus=None)
REAL = dict(steps=8500, warm_steps=5000, forget_steps=500, label_dropout=0.25, merges=240, chunks=(16, 8, 32),
            augment=True, eval_every=1000)
TEST_SIZE = 200  # built-in utterances to evaluate on


def parse_options(argv):
    """Defaults, those for real speech, those of the run that is resumed, the command line: the later ones win."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("manifest", nargs="?", help="JSON lines of real speech; without it, the built-in corpus")
    add("--dev", help="manifest to evaluate on")
    add("--corpus", help="languages of the built-in corpus: de-en, en-de,es,it or de,es,it-en")
    add("--preset", choices=sorted(PRESETS))
    add("--interleave", help="align, time, ratio:G, asr or st")
    add("--resume", metavar="MODEL.PT", help="go on with this run, with its options; those given here win")
    add("--out", help="folder of the run")
    for name in ("seed", "steps", "batch", "warmup", "warm-steps", "forget-steps", "merges", "eval-every"):
        add(f"--{name}", type=int)
    for name in ("lr", "side-weight", "label-dropout", "dropout"):
        add(f"--{name}", type=float)
    add("--chunks", type=lambda text: tuple(map(int, text.split(","))), help="chunk sizes in frames, drawn per batch")
    add("--augment", action=argparse.BooleanOptionalAction, help="SpecAugment and level")
    add("--device", help="cpu or cuda")
    add("--strict", action="store_true", help="stop at the first bad row instead of skipping it")
    add("--allow-outside", action="store_true", help="audio may lie outside the manifest's folder")
    add("--write-corpus", nargs=2, metavar=("DIR", "N"), help="write N built-in utterances as a manifest, and stop")
    given = vars(parser.parse_args(argv))
    saved = load(given["resume"])[1].get("options", {}) if "resume" in given else {}
    real = REAL if (saved | given).get("manifest") else {}
    options = argparse.Namespace(**(COMMON | real | saved | given))
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.out = options.out or f"runs/{Path(options.manifest).resolve().parent.name if options.manifest else options.corpus}"
    return options


def open_corpus(options, subsampling):
    """(training corpus, items to evaluate on)."""
    if options.manifest is None:
        corpus = BuiltIn(options.corpus, options.seed, subsampling)
        return corpus, corpus.unseen(TEST_SIZE)
    kept = dict(strict=options.strict, allow_outside=options.allow_outside)
    rows = read_manifest(options.manifest, **kept)
    dev = read_manifest(options.dev, **kept) if options.dev else []
    if options.interleave == "align":
        threads = torch.get_num_threads()
        add_links([row for row in rows + dev if not all(map(row.links.get, row.st))], align_bitext)
        torch.set_num_threads(threads)  # numba's loops may have changed it: both may use the same OpenMP
    return Manifest(rows, subsampling, options), list(readable(dev, options)) if dev else []


def train_tokenizer(rows, dev, merges):
    texts = [text for row in rows for text in (row.asr, *row.st.values()) if text]
    languages = sorted({lang for row in rows for lang in row.st})
    tags = ["<asr>"] + [f"<st:{lang}>" for lang in languages]
    tokenizer = Tokenizer.train(texts, 1 + len(tags) + 256 + merges, tags)
    unseen = {c for row, _ in dev for text in (row.asr or "", *row.st.values()) for c in tokenizer.unseen(text)}
    if unseen:
        print(f"warning: {len(unseen)} characters of the development set never occur in training and are written as "
              f"bytes: {' '.join(sorted(unseen))}", file=sys.stderr)
    return tokenizer


def new_model(options, corpus, dev):
    """(model, tokenizer) for a corpus, with the statistics of its features."""
    rows = corpus.rows(0)
    tokenizer = train_tokenizer(rows, dev, options.merges)
    torch.manual_seed(options.seed)
    config = replace(PRESETS[options.preset], vocab=len(tokenizer), ctc_vocab=257, dropout=options.dropout)
    model = Transducer(replace(config, chunks=options.chunks) if options.chunks else config)
    torch.nn.init.zeros_(model.joint.label_proj.weight)  # at first the joint only hears; labels come in by learning
    torch.nn.init.zeros_(model.joint.label_proj.bias)
    sample = torch.cat([corpus.mel(row) for row in rows[::max(1, len(rows) // 300)]])  # (frames, 80)
    model.encoder.set_statistics(sample.mean(0), sample.std(0).clamp(min=1e-3))
    return model, tokenizer


def batches_from(corpus, tokenizer, position, options):
    """Batches for ever from (epoch, number within it) on; the next two are made while the present one is learned."""
    with ThreadPoolExecutor(1) as pool:
        waiting = []
        epoch, first = position
        while True:
            groups = epoch_batches(corpus, epoch, options)
            for k in range(first, len(groups)):
                waiting.append((pool.submit(make_batch, groups[k], corpus, tokenizer, options), (epoch, k + 1)))
                if len(waiting) > 2:
                    future, after = waiting.pop(0)
                    yield future.result(), after
            epoch, first = epoch + 1, 0


def show_scores(metrics, records, examples=3):
    """What a person wants to see of an evaluation: a table, and some utterances with the time of every word."""
    for tag, m in metrics.items():
        bleu = "" if m["bleu"] is None else f"  BLEU {m['bleu']:5.1f}  chrF {m['chrf']:5.1f}"
        lag = "" if m["laal_ms"] is None else f"  LAAL {m['laal_ms']:5.0f} ms"
        tqdm.write(f"  {tag:8} WER {m['wer']:5.1f}  CER {m['cer']:5.1f}{bleu}{lag}"
                   + (f"  ({m['silent']} of {m['utterances']} without a word)" if m["silent"] else ""))
    for record in records[:examples]:
        for tag, reference in record["references"].items():
            if tag in metrics:
                words = [f"{w.text}\N{MIDDLE DOT}{w.delay_ms / 1000:.1f}" for w in record["words"] if w.stream == tag]
                written = " ".join(words)
                if len(written) > 500:  # an untrained model babbles
                    written = f"{written[:500]} ... {len(words)} words"
                tqdm.write(f"    {tag:8} reference   {' '.join(reference)}\n    {'':8} at its time {written}")


def start(options, corpus, dev):
    """-> model, tokenizer, optimizers, step, position: those of a new run, or of the one to go on with."""
    if not options.resume:
        model, tokenizer = new_model(options, corpus, dev)
        model.to(options.device)
        return model, tokenizer, make_optimizers(model, options), 0, (0, 0)
    model, saved = load(options.resume)
    if missing := {"tokenizer", "step", "position", "optimizers"} - saved.keys():
        raise ValueError(f"{options.resume} lacks {', '.join(sorted(missing))}: it streams, but cannot be resumed")
    optimizers = make_optimizers(model.to(options.device), options)
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    return model, Tokenizer.from_dict(saved["tokenizer"]), optimizers, saved["step"], tuple(saved["position"])


def train(options):
    """The whole run; returns the path of the checkpoint and of a file to stream with it."""
    runs_on_gpu(torch.device(options.device), torch.float32)  # what the loss needs on a GPU, it says now
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    corpus, dev = open_corpus(options, PRESETS[options.preset].subsampling)
    model, tokenizer, optimizers, step, position = start(options, corpus, dev)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.preset}: {count / 1e6:.2f} M parameters, {len(tokenizer)} tokens, "
          f"{options.steps - step} steps on {options.device}; run folder {folder}")
    path, log = folder / "model.pt", open(folder / "log.csv", "a" if options.resume else "w", newline="")
    if not options.resume:
        print("step", "epoch", *LOGGED, sep=",", file=log)

    def checkpoint():
        save(path, model, tokenizer=tokenizer.to_dict(), mode=options.interleave, options=vars(options),
             optimizers=[optimizer.state_dict() for optimizer in optimizers], step=step, position=position)

    bar = tqdm(total=options.steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
    began = time.perf_counter()
    try:
        for batch, after in batches_from(corpus, tokenizer, position, options):
            if step >= options.steps:
                break
            model.train()
            on_device = SimpleNamespace(**{name: x.to(options.device) for name, x in vars(batch).items()})
            numbers = train_step(model, optimizers, on_device, step, options)
            step, position = step + 1, after
            numbers["audio_s_per_s"] = float(batch.mel_lengths.sum()) / 100 / (time.perf_counter() - began)
            began = time.perf_counter()
            print(step, after[0], *(f"{numbers[x]:.4g}" if x in numbers else "" for x in LOGGED), sep=",", file=log,
                  flush=True)
            told = "  ".join(f"{name.replace('_', ' ')} {numbers[name]:.2f}" for name in TASKS if name in numbers)
            bar.update()
            bar.set_postfix_str(f"{told}  {numbers['audio_s_per_s']:.0f} s/s")
            if bar.disable and step % 100 == 0:  # not a terminal: a line now and then
                print(f"step {step}: {told}  {numbers['audio_s_per_s']:.0f} s of audio per s", flush=True)
            if step % options.eval_every == 0 and step < options.steps:
                checkpoint()
                if dev and step > options.warm_steps:  # before, the joint cannot stop writing
                    assess(model, tokenizer, dev, step, folder)
                began = time.perf_counter()
    except KeyboardInterrupt:
        print(f"\nstopped at step {step}; go on with: python train.py --resume {path}")
    bar.close()
    checkpoint()
    if dev and step > options.warm_steps:
        assess(model, tokenizer, dev, step, folder, blind=options.manifest is None)
        if options.manifest is None:
            return path, live_captions(path, options)
    return path, "FILE"


def assess(model, tokenizer, dev, step, folder, blind=False):
    """Scores on the development set; `blind`, also with noise for sound: who still writes well does not listen."""
    metrics, records = evaluate(model, tokenizer, dev)
    tqdm.write(f"step {step}, {len(dev)} unseen utterances:")
    show_scores(metrics, records)
    if blind:
        rng = np.random.default_rng(0)
        noise = [(row, rng.normal(0, 0.05, len(samples)).astype(np.float32)) for row, samples in dev]
        blind_metrics, _ = evaluate(model, tokenizer, noise)
        metrics = metrics | {f"blind {tag}": m for tag, m in blind_metrics.items()}
        tqdm.write("the same with noise instead of the audio (a model that listens fails here):")
        show_scores(blind_metrics, [])
    path = folder / "metrics.json"
    past = json.loads(path.read_text()) if path.exists() else []
    past = [entry for entry in past if entry["step"] < step]  # what a resumed run does again, it writes again
    path.write_text(json.dumps(past + [{"step": step, "streams": metrics}], indent=1))


def write_corpus(folder, n, options):
    """N built-in utterances as audio files and a manifest, with links and times."""
    import soundfile
    corpus, folder = BuiltIn(options.corpus, options.seed, 4), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = corpus.rows(0, n)
    for row in tqdm(rows, unit="utt", leave=False, disable=None):
        samples, _ = speak_row(row, options.seed)
        row.audio = str(folder / f"{row.id}.flac")
        soundfile.write(row.audio, np.clip(samples, -1, 1), SAMPLE_RATE)
    write_manifest(folder / "manifest.jsonl", rows)
    print(f"{n} utterances, {sum(row.duration for row in rows) / 60:.1f} minutes: {folder / 'manifest.jsonl'}")


def live_captions(path, options):
    """Stream one utterance that was never heard, at its own pace, through the command that users have."""
    import soundfile
    row, samples = BuiltIn(options.corpus, options.seed, 4).unseen(1)[0]
    example = path.parent / "unseen.wav"
    soundfile.write(example, samples * (0.5 / np.abs(samples).max()), SAMPLE_RATE)
    print(f"\nlive captions of {example}, which says: {row.asr}")
    stream.main([str(path), str(example), "--realtime"])
    return example


def main(argv=None):
    try:
        options = parse_options(argv)
        if options.write_corpus:
            write_corpus(options.write_corpus[0], int(options.write_corpus[1]), options)
            return 0
        path, example = train(options)
        print(f"\nthe checkpoint is {path}; stream a file with it:\npython stream.py {path} {example}")
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
