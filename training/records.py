"""The task of the shipped models, in words: a document of records, and questions about it.

A document lists distinct records, each a colour and an animal ("red fox"). A question asks for the
records of one colour or of two; the answer names the matching records in document order, one
compound word each ("red-fox"), and fills the rest of its slots with the end-of-text token.
Answering needs each match's rank among the matches, so the network has to carry the question
through the rows of the document: that is why stale rows hurt.
"""

from __future__ import annotations

import numpy as np

COLOURS = (
    "red orange yellow green blue indigo violet pink brown black white grey gold silver teal ivory"
).split()
ANIMALS = "fox owl bear wolf deer hare lynx otter crow swan toad newt mole seal goat mouse".split()

SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>", "<|unknown|>")
EOS, BOS, MASK, UNK = range(4)
FUNCTION = ("which", "of", "them", "are", "or", "?")
VOCABULARY = (
    *SPECIAL,
    *FUNCTION,
    *COLOURS,
    *ANIMALS,
    *(f"{colour}-{animal}" for colour in COLOURS for animal in ANIMALS),
)
ID = {word: i for i, word in enumerate(VOCABULARY)}
COLOUR0, ANIMAL0 = ID[COLOURS[0]], ID[ANIMALS[0]]
RECORD0 = ID[f"{COLOURS[0]}-{ANIMALS[0]}"]

SLOTS = 8  # response length g
QUESTION = 6  # tokens of a question, both forms
RECORDS = len(COLOURS) * len(ANIMALS)

# The shares of a batch that hold one operation only, by its name.
OPERATIONS = {"one_colour": {"two_colour_share": 0.0}, "two_colours": {"two_colour_share": 1.0}}


def draw_documents(rng: np.random.Generator, count: int, records: int) -> np.ndarray:
    """`count` documents of distinct records in random order: int [count, records]."""
    return np.argsort(rng.random((count, RECORDS)), axis=1)[:, :records]


def document_tokens(documents: np.ndarray, words: int) -> np.ndarray:
    """Records [B, N] -> ids [B, 1 + words * N]: spelled in two words, or in one compound word."""
    bos = np.full((len(documents), 1), BOS)
    if words == 1:
        return np.concatenate([bos, documents + RECORD0], axis=1)
    colour, animal = documents // len(ANIMALS), documents % len(ANIMALS)
    spelled = np.stack([colour + COLOUR0, animal + ANIMAL0], axis=2).reshape(len(documents), -1)
    return np.concatenate([bos, spelled], axis=1)


def draw_questions(
    rng: np.random.Generator, documents: np.ndarray, two_colours: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Question ids [B, QUESTION] and answer ids [B, SLOTS], one per document.

    The first colour occurs in the document; where `two_colours` [B] is set, the question names a
    second, different one. "which of them are X ?" and "which are X or Y ?" have equally many words.
    """
    colours = documents // len(ANIMALS)
    picks = np.argsort(rng.random(documents.shape), axis=1)[:, :2]
    x, y = np.take_along_axis(colours, picks, axis=1).T
    shifted = (x + 1 + rng.integers(0, len(COLOURS) - 1, len(x))) % len(COLOURS)
    y = np.where(y == x, shifted, y)
    return questions_about(documents, x, np.where(two_colours, y, -1))


def questions_about(
    documents: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As draw_questions, for given colours x [B] and y [B] (-1: a question about x alone)."""
    colours, n = documents // len(ANIMALS), documents.shape[1]
    match = (colours == x[:, None]) | (colours == y[:, None])
    # matches first, in document order
    order = np.argsort(np.where(match, 0, n) + np.arange(n), axis=1)[:, :SLOTS]
    answer = np.full((len(documents), SLOTS), EOS)
    found = np.take_along_axis(match, order, axis=1)
    matching = np.take_along_axis(documents, order, axis=1) + RECORD0
    answer[:, : order.shape[1]] = np.where(found, matching, EOS)

    blank = SPECIAL[UNK]  # a colour goes here
    one = np.array([ID[w] for w in ("which", "of", "them", "are", blank, "?")])
    two = np.array([ID[w] for w in ("which", "are", blank, "or", blank, "?")])
    question = np.where((y >= 0)[:, None], two, one)
    question[:, 4] = np.where(y >= 0, y, x) + COLOUR0
    question[y >= 0, 2] = x[y >= 0] + COLOUR0
    return question, answer


def draw_batch(
    rng: np.random.Generator, batch: int, records: int, words: int, two_colour_share: float
) -> np.ndarray:
    """Training canvases with answers: int64 [batch, 1 + words * records + QUESTION + SLOTS]."""
    documents = draw_documents(rng, batch, records)
    question, answer = draw_questions(rng, documents, rng.random(batch) < two_colour_share)
    return np.concatenate([document_tokens(documents, words), question, answer], axis=1)


def text(ids: np.ndarray) -> str:
    """Words of `ids`, without special tokens."""
    return " ".join(VOCABULARY[i] for i in ids if i >= len(SPECIAL))


def document_text(document: np.ndarray, words: int = 2) -> str:
    """As a reader writes it: "red fox, blue owl, ..." (the tokenizer drops the commas).

    With `words` = 1, a record is one compound word: "red-fox, blue-owl, ...".
    """
    between = " " if words == 2 else "-"
    return ", ".join(VOCABULARY[r + RECORD0].replace("-", between) for r in document)
