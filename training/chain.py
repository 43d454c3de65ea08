"""A task that needs dependent steps, in words: following a chain of records through a document.

The documents are those of records.py, in compound words. Each animal likes one colour: the i-th of
ANIMALS the i-th of COLOURS (a fox likes red, an owl orange, ...). "follow the chain from blue ?"
asks for the document's first blue record, then for its first record of the colour that this
record's animal likes, and so on; the chain ends where the document has no record of that colour, or
when the SLOTS are full (it may run in a circle). Each record can be looked up only once the one
before it is known, so a model that fills all slots in one step has to compose up to SLOTS look-ups
in its layers, while one that takes several steps can do them one by one. Questions by one colour or
two, as in records.py, are trained beside it.
"""

from __future__ import annotations

import numpy as np
import records
from records import ANIMALS, COLOUR0, COLOURS, EOS, RECORD0, SLOTS

CHAIN = ("follow", "the", "chain", "from")
VOCABULARY = (*records.VOCABULARY, *CHAIN)
ID = {word: i for i, word in enumerate(VOCABULARY)}

# The shares of a batch that hold one operation only, by its name.
OPERATIONS = {
    "chain": {"chain_share": 1.0, "two_colour_share": 0.0},
    "one_colour": {"chain_share": 0.0, "two_colour_share": 0.0},
    "two_colours": {"chain_share": 0.0, "two_colour_share": 1.0},
}


def questions_about(documents: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Question ids [B, QUESTION] and answer ids [B, SLOTS]: the chains from colours x [B]."""
    colours, row = documents // len(ANIMALS), np.arange(len(documents))
    # first[b, c]: where document b's first record of colour c is; -1: nowhere
    first = np.full((len(documents), len(COLOURS)), -1)
    for j in reversed(range(documents.shape[1])):
        first[row, colours[:, j]] = j
    answer = np.full((len(documents), SLOTS), EOS)
    colour, alive = x, np.ones(len(documents), bool)
    for slot in range(SLOTS):
        place = first[row, colour]
        alive = alive & (place >= 0)
        record = documents[row, place]
        answer[alive, slot] = record[alive] + RECORD0
        colour = np.where(alive, record % len(ANIMALS), colour)
    question = np.array([[ID[w] for w in (*CHAIN, COLOURS[0], "?")]]).repeat(len(documents), axis=0)
    question[:, 4] = x + COLOUR0
    return question, answer


def draw_batch(
    rng: np.random.Generator,
    batch: int,
    length: int,
    words: int,
    chain_share: float,
    two_colour_share: float,
) -> np.ndarray:
    """As records.draw_batch; of the questions, `chain_share` follow a chain from a colour that the
    document has, `two_colour_share` name two colours, and the others one."""
    documents = records.draw_documents(rng, batch, length)
    kind = rng.random(batch)
    chain, two = kind < chain_share, kind >= 1 - two_colour_share
    question, answer = records.draw_questions(rng, documents, two)
    picked = documents[np.arange(batch), rng.integers(0, length, batch)]
    chain_question, chain_answer = questions_about(documents, picked // len(ANIMALS))
    question = np.where(chain[:, None], chain_question, question)
    answer = np.where(chain[:, None], chain_answer, answer)
    return np.concatenate([records.document_tokens(documents, words), question, answer], axis=1)


def text(ids: np.ndarray) -> str:
    """Words of `ids`, without special tokens."""
    return " ".join(VOCABULARY[i] for i in ids if i >= len(records.SPECIAL))
