"""How the shipped models were made: their tasks, what is exported, and that training resumes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import bicache
import numpy as np
import pytest

tomllib = pytest.importorskip("tomllib")
torch = pytest.importorskip("torch")
TRAINING = Path(__file__).resolve().parent.parent / "training"
sys.path.insert(0, str(TRAINING))
import chain  # noqa: E402
import export  # noqa: E402
import records  # noqa: E402
import train  # noqa: E402

RECIPES = {path.stem: tomllib.loads(path.read_text()) for path in TRAINING.glob("recipes/*.toml")}


def answer_by_reading(document: list[str], question: list[str]) -> list[str]:
    """The answer as a reader of the task's description finds it, word by word."""
    if question[0] != "follow":
        asked = {word for word in question if word in records.COLOURS}
        return [word for word in document if word.split("-")[0] in asked][: records.SLOTS]
    colour, answer = question[4], list[str]()
    while len(answer) < records.SLOTS:
        found = next((word for word in document if word.startswith(colour + "-")), None)
        if found is None:
            break
        answer.append(found)
        colour = records.COLOURS[records.ANIMALS.index(found.split("-")[1])]
    return answer


@pytest.mark.parametrize("length", [8, 16, 40])
def test_chain_answers_are_what_a_reader_finds(length: int) -> None:
    rng = np.random.default_rng(length)
    batch = chain.draw_batch(rng, 300, length, 1, chain_share=0.5, two_colour_share=0.25)
    kinds: dict[str, int] = {}
    ends = set()
    for row in batch:
        document, question, answer = np.split(row, [1 + length, -records.SLOTS])
        assert document[0] == records.BOS
        words, asked = chain.text(document).split(), chain.text(question).split()
        assert len(asked) == records.QUESTION and len(set(words)) == length
        wanted = answer_by_reading(words, asked)
        assert chain.text(answer).split() == wanted
        assert (answer[len(wanted) :] == records.EOS).all()
        kinds[asked[1]] = kinds.get(asked[1], 0) + 1
        if asked[0] == "follow":
            ends.add(len(wanted) == records.SLOTS)
    assert ends == {False, True}  # dead ends, and chains that fill all slots
    assert kinds["the"] > kinds["of"] > 50 and kinds["are"] > 50


@pytest.mark.parametrize("operation", chain.OPERATIONS)
def test_an_operation_can_be_drawn_alone(operation: str) -> None:
    shares = chain.OPERATIONS[operation]
    batch = chain.draw_batch(np.random.default_rng(0), 100, 12, 1, **shares)
    second = {chain.VOCABULARY[token] for token in batch[:, 1 + 12 + 1]}
    assert second == {{"chain": "the", "one_colour": "of", "two_colours": "are"}[operation]}


def test_the_chain_adds_words_and_moves_none() -> None:
    assert chain.VOCABULARY[: len(records.VOCABULARY)] == records.VOCABULARY
    assert len(set(chain.VOCABULARY)) == len(chain.VOCABULARY)


@pytest.mark.parametrize("name", RECIPES)
def test_export_writes_what_ships(name: str, tmp_path: Path) -> None:
    recipe, folder = RECIPES[name], bicache.LLM(name, threads=1).path
    vocabulary = train.task_of(recipe).VOCABULARY
    config = export.config(recipe["model"], recipe["stage"][-1]["layers"], len(vocabulary))
    assert config == json.loads((folder / "config.json").read_text())
    export.tokenizer(vocabulary).save(str(tmp_path / "tokenizer.json"))
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    assert made == json.loads((folder / "tokenizer.json").read_text())
    lines = (folder / "questions.jsonl").read_text().splitlines()
    assert export.held_out(recipe, 5, 96) == [json.loads(line) for line in lines]


def test_every_shipped_model_has_a_recipe_and_a_log() -> None:
    assert set(RECIPES) == set(bicache.shipped_models())
    for name, recipe in RECIPES.items():
        lines = (TRAINING / "logs" / f"{name}.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert last["stage"] == recipe["stage"][-1]["name"]
        assert last["step"] == recipe["stage"][-1]["steps"]


@pytest.mark.parametrize("name", ["records-control", "chain"])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_STEPS", 3)
    recipe = copy.deepcopy(RECIPES[name])
    recipe["model"] |= {"dim": 16, "ffn": 16}
    recipe["train"] |= {"log_steps": 6}
    (stage,) = recipe["stage"]
    stage |= {"layers": 1, "steps": 6, "tokens_per_step": 200, "records": [6, 8], "raise_at": 0.0}

    def run(out: Path, stop_at: int | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        out.mkdir(exist_ok=True)
        lines: list[dict[str, Any]] = []
        torch.manual_seed(0)
        vocabulary = train.task_of(recipe).VOCABULARY
        model = train.DLM(train.ModelConfig(vocab=len(vocabulary), layers=1, **recipe["model"]))
        with monkeypatch.context() as m:
            if stop_at is not None:
                step = train.Optimizer.step
                done = iter(range(stop_at))

                def stopping(self: Any, scale: float) -> None:
                    if next(done, None) is None:
                        raise KeyboardInterrupt
                    step(self, scale)

                m.setattr(train.Optimizer, "step", stopping)
            train.train_stage(stage, recipe, model, out, lines.append)
        return torch.load(out / f"{stage['name']}.pt"), lines

    whole, lines = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=5)
    assert torch.load(tmp_path / "stopped" / f"{stage['name']}.pt")["next"] == 3
    resumed, resumed_lines = run(tmp_path / "stopped")
    for line in (*lines, *resumed_lines):
        del line["seconds"]
    assert lines == resumed_lines and lines[-1]["step"] == whole["next"] == 6
    assert all(torch.equal(resumed["model"][k], v) for k, v in whole["model"].items())
