"""The demo: what it measures is what the engine did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bicache import LLM, cli
from bicache import demo as demo_module
from bicache.demo import Document, Question, demo_policies, pick, read_questions, run_demo
from conftest import TinyCheckpoint

LAYERS, DEPTH, LENGTH = 4, 1, 4
PREFIXES = ("w5 w6 w7 w8 w9", "w20 w21 w22")
PROMPTS = ("w10 w11", "w12", "w13 w14", "w15")
SAFE = f"bicache:depth={DEPTH},refresh_steps=2"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model; its questions' right answers are what it answers without a cache."""
    source = tiny_checkpoint(layers=LAYERS, tokenizer=True, seed=2)
    folder = tmp_path_factory.mktemp("model")
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    sidecar = {
        "format": 1,
        "generation": {"gen_length": LENGTH, "steps": LENGTH, "block_length": LENGTH},
        "calibration": {"cache": SAFE},
    }
    (folder / "bicache.json").write_text(json.dumps(sidecar))
    llm = LLM(folder, threads=1)
    lines = []
    for prefix in PREFIXES:
        for prompt, out in zip(PROMPTS, llm.generate(list(PROMPTS), prefix=prefix), strict=True):
            lines.append(json.dumps({"prefix": prefix, "prompt": prompt, "answer": out.text}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def report(model: Path) -> dict[str, Any]:
    llm = LLM(model, threads=1)
    return run_demo(llm, read_questions(model / "questions.jsonl")).as_dict()


def row(report: dict[str, Any], start: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [p for p in report["policies"] if p["policy"].startswith(start)]
    assert len(found) == 1
    return found[0]


def test_policies_are_the_safe_depth_and_two_past_it(report: dict[str, Any]) -> None:
    assert [p["policy"] for p in report["policies"]] == [
        "none",
        "naive:source=alone",
        "naive:source=first_request",
        "bicache:depth=1,refresh_steps=2,splice=official",
        "bicache:depth=3,refresh_steps=2,splice=official",
    ]
    # past the deepest entry of a table
    tables = ("bicache:depth=0:1/50:3,refresh_steps=2", "bicache:depth=agreement:48:3/86:0")
    assert [demo_policies(safe, 9)[4] for safe in tables] == [
        "bicache:depth=5,refresh_steps=2,splice=official",
        "bicache:depth=5,refresh_steps=16,splice=official",
    ]
    assert demo_policies(tables[0], 4)[4].startswith("bicache:depth=4,")
    for wrong in ("none", "bicache:depth=probe:0.9"):
        with pytest.raises(ValueError, match="depth"):
            demo_policies(wrong, 4)


def test_the_table_leaves_out_defaults_but_not_what_names_the_variant() -> None:
    assert demo_module.short_name("none") == "none"
    assert demo_module.short_name("naive:source=alone") == "naive:source=alone"
    safe = "bicache:depth=5,refresh_steps=16,splice=official"
    assert demo_module.short_name(safe) == "bicache:depth=5"
    other = safe.replace("official", "strict")
    assert demo_module.short_name(other) == "bicache:depth=5,splice=strict"


def test_accuracy_is_counted_over_all_questions(report: dict[str, Any]) -> None:
    assert report["questions"] == 8 and report["documents"] == 2
    assert row(report, "none")["exact_match"] == 1.0
    for p in report["policies"]:
        assert (8 * p["exact_match"]).is_integer()
    assert row(report, "naive:source=alone")["exact_match"] < 1


def test_rows_are_those_of_the_formulas(report: dict[str, Any]) -> None:
    prefix_rows = [len(text.split()) + 1 for text in PREFIXES]  # and the first special token
    suffixes = [len(text.split()) + LENGTH for text in PROMPTS]
    none = naive = safe = 0
    for p in prefix_rows:
        naive += p * LAYERS  # the entry
        safe += p * DEPTH
        for s in suffixes:
            none += LENGTH * LAYERS * (p + s)
            naive += LENGTH * LAYERS * s
            refreshes = LENGTH // 2
            safe += LENGTH * LAYERS * s + refreshes * (LAYERS - DEPTH) * p
    assert row(report, "none")["rows"] == none
    assert row(report, "naive:source=alone")["rows"] == naive
    assert row(report, "bicache:depth=1")["rows"] == safe
    for p in report["policies"]:
        assert p["rows_share"] == pytest.approx(p["rows"] / none)


def test_hits_are_all_but_the_first_of_each_document(report: dict[str, Any]) -> None:
    hits = [p["prefix_hits"] for p in report["policies"]]
    assert hits == [0] + 4 * [len(PREFIXES) * (len(PROMPTS) - 1)]


def test_speed_is_measured_in_every_round(report: dict[str, Any]) -> None:
    assert row(report, "none")["speed"] == 1.0
    for p in report["policies"]:
        assert len(p["seconds"]) == demo_module.ROUNDS == report["rounds"] == 3
        assert min(p["seconds"]) > 0 and p["tokens_per_second"] > 0
        median = sorted(p["seconds"])[1]
        assert p["tokens_per_second"] == pytest.approx(8 * LENGTH / median)


class Parrot:
    """Stands for an LLM: answers what it is told to."""

    path = Path("parrot")
    dtype, threads = "f32", 1

    class config:  # noqa: N801
        layers = LAYERS

    def __init__(self, llm: LLM, texts: dict[str, list[str]]) -> None:
        self.llm, self.texts, self.path = llm, texts, llm.path

    def cache_string(self, cache: str) -> str:
        return self.llm.cache_string(cache)

    def clear_prefixes(self) -> None:
        pass

    def generate(self, prompts: list[str], *, prefix: str, cache: str) -> list[Any]:
        import dataclasses

        texts = self.texts[cache.partition(":")[0]]
        outs = self.llm.generate(prompts, prefix=prefix, cache=cache)
        return [dataclasses.replace(o, text=t) for o, t in zip(outs, texts, strict=True)]


def test_answers_to_the_first_question_are_counted_where_they_are_wrong(model: Path) -> None:
    questions = [("w10", "a b"), ("w11", "c"), ("w12", "a b"), ("w13", ""), ("w14", "d")]
    document = Document("w5 w6", tuple(Question(*q) for q in questions))
    texts = {
        "none": ["a  b", "c", "a b", "", "d"],  # spaces do not count
        "naive": ["a b", "a b", "a b", "a b", "x"],
        "bicache": ["x", "c", "a b", "", "a b"],
    }
    parrot: Any = Parrot(LLM(model, threads=1), texts)
    report = run_demo(parrot, [document], rounds=1).as_dict()
    # Questions 1, 3 and 4 have another right answer than question 0; question 2 has the same.
    assert row(report, "none")["answers_first"] == 0
    assert row(report, "none")["exact_match"] == 1
    assert row(report, "naive:source=alone")["answers_first"] == pytest.approx(2 / 3)
    assert row(report, "naive:source=alone")["exact_match"] == pytest.approx(2 / 5)
    assert row(report, "bicache:depth=1")["answers_first"] == pytest.approx(1 / 3)
    assert row(report, "bicache:depth=1")["exact_match"] == pytest.approx(3 / 5)
    example = report["example"]
    assert (example["prompt"], example["answer"], example["first_answer"]) == ("w11", "c", "a b")
    assert example["texts"]["naive:source=alone"] == "a b"


def test_where_all_answers_are_the_same_nothing_can_be_confused(model: Path) -> None:
    document = Document("w5", (Question("w10", "a"), Question("w11", "a")))
    report = run_demo(LLM(model, threads=1), [document], rounds=1)
    assert all(p.answers_first is None for p in report.policies) and report.example is None
    assert "-" in demo_module.as_table(report).splitlines()[4].split()


def test_other_tokens_in_a_later_round_are_an_error(model: Path) -> None:
    class Moody(Parrot):
        seed = 0

        def generate(self, prompts: list[str], *, prefix: str, cache: str) -> list[Any]:
            self.seed += 1
            return self.llm.generate(
                prompts, prefix=prefix, cache=cache, seed=self.seed, temperature=2.0
            )

    moody: Any = Moody(LLM(model, threads=1), {})
    with pytest.raises(RuntimeError, match="first round"):
        run_demo(moody, [Document("w5", (Question("w10", "a"),))])


def test_the_table(model: Path, capfd: Any) -> None:
    assert cli.main(["demo", "--model", str(model), "--threads", "1"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("policy "))
    table = lines[header : header + 7]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table[2:4]] == ["none", "naive:source=alone"]
    assert "100.0 %" in table[2] and "1.00x" in table[2]
    for word in ("exact match", "prefix hits", "of this machine", "An example"):
        assert word in out


def test_json_is_one_object(model: Path, capsys: Any) -> None:
    argv = ["demo", "--model", str(model), "--json", "--documents", "1", "--questions", "3"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 1 and report["questions"] == 3
    assert len(report["policies"]) == 5


def test_pick_spreads_questions_over_documents() -> None:
    documents = [
        Document("a", tuple(Question(str(i), "") for i in range(4))),
        Document("b", (Question("0", ""),)),
        Document("c", tuple(Question(str(i), "") for i in range(3))),
    ]
    assert [len(d.questions) for d in pick(documents, None, None)] == [4, 1, 3]
    assert [len(d.questions) for d in pick(documents, None, 6)] == [3, 1, 2]
    assert [len(d.questions) for d in pick(documents, 2, None)] == [4, 1]
    assert [len(d.questions) for d in pick(documents, None, 2)] == [1, 1]
    for count, questions in ((0, None), (4, None), (None, 0), (None, 9), (-1, None), (1, 5)):
        with pytest.raises(ValueError, match=r"expected 1\.\."):
            pick(documents, count, questions)


def test_consecutive_lines_with_one_prefix_are_a_document(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"prefix": p, "prompt": "x", "answer": "y"} for p in "aabba"]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    documents = read_questions(path)
    assert [(d.prefix, len(d.questions)) for d in documents] == [("a", 2), ("b", 2), ("a", 1)]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "at least one"),
        (b"\n", "line 1"),
        (b"{", "line 1"),
        (b"[]\n", "line 1"),
        (b'{"prefix": "a", "prompt": "b", "answer": "c"}\n{"prefix": "a"}\n', "line 2"),
        (b'{"prefix": "a", "prompt": "b", "answer": 3}\n', "line 1"),
        (b"\xff\n", "UTF-8"),
    ],
)
def test_wrong_question_files(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=part):
        read_questions(path)
    with pytest.raises(FileNotFoundError, match="questions.jsonl"):
        read_questions(tmp_path / "other" / "questions.jsonl")


def test_without_a_calibration_there_is_no_demo(text_llm: LLM) -> None:
    with pytest.raises(ValueError, match="calibration"):
        run_demo(text_llm, [Document("w5", (Question("w6", ""),))])


def test_the_main_job_on_the_shipped_model() -> None:
    """What the README says of the shipped model, on all of its held-out questions."""
    llm = LLM("records")
    report = run_demo(llm, read_questions(llm.path / "questions.jsonl"), rounds=1)
    assert report.documents >= 4 and report.questions >= 400
    none, alone, first, safe, past = report.policies
    assert none.exact_match >= 0.97 and safe.exact_match >= 0.97
    assert alone.exact_match <= 0.05 and first.exact_match <= 0.05 and past.exact_match <= 0.05
    assert first.answers_first is not None and first.answers_first >= 0.95
    assert all(p.answers_first == 0 for p in (none, alone, safe, past))
    # Counts do not depend on the machine: they are those of the committed measurement.
    path = Path(__file__).parent.parent / "bench" / "results" / "demo.json"
    committed = json.loads(path.read_text())["policies"]
    counts = [(p["policy"], p["rows"], p["prefix_hits"]) for p in committed]
    assert [(p.policy, p.rows, p.prefix_hits) for p in report.policies] == counts
