"""Policy objects: what they accept, and that their strings mean the same to the engine."""

from __future__ import annotations

import dataclasses
import pickle

import bicache
import numpy as np
import pytest
from bicache import BiCache, Naive, NoCache, Policy, _core


@pytest.mark.parametrize(
    "policy",
    [
        NoCache(),
        Naive(),
        Naive(source="first_request"),
        BiCache(depth=0),
        BiCache(depth=5, refresh_steps=1, splice="strict"),
        BiCache(depth={30: 10, 0: 1}),
        BiCache(depth="agreement:48:5/86:0", refresh="block", source="first_request"),
        BiCache(depth="probe:0.97", refresh="drift:0.05", ratio="prompt", probe_rows=3),
        BiCache(depth=lambda info: 1),
    ],
)
def test_the_engine_reads_back_what_an_object_says(policy: Policy) -> None:
    if "depth=hook" not in policy.spec():
        assert _core.canonical_policy(policy.spec()) == policy.spec()
    assert policy.handle(4).spec == policy.spec()


def test_defaults_are_the_engines() -> None:
    assert BiCache(depth=5).spec() == _core.canonical_policy("bicache:depth=5")
    assert Naive().spec() == _core.canonical_policy("naive")


def test_every_policy_and_setting_of_the_engine_has_an_object() -> None:
    objects = {"none": NoCache, "naive": Naive, "bicache": BiCache}
    table = {row["name"]: [f["name"] for f in row["fields"]] for row in _core.policy_table()}
    assert table == {
        name: [f.name for f in dataclasses.fields(kind)] for name, kind in objects.items()
    }


def test_a_depth_table_is_sorted_and_cannot_be_changed_from_outside() -> None:
    table = {50: 7, 0: 1}
    policy = BiCache(depth=table)
    table[0] = 9
    assert policy.spec().startswith("bicache:depth=0:1/50:7,")
    assert policy == BiCache(depth={0: 1, 50: 7})
    assert hash(policy) == hash(BiCache(depth={0: 1, 50: 7}))


def test_policies_are_frozen_values() -> None:
    policy = BiCache(depth=np.int64(5))
    assert policy == BiCache(depth=5) and type(policy.depth) is int
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.depth = 6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"depth": -1}, ValueError, "bicache depth: expected an integer >= 0, got -1"),
        ({"depth": True}, TypeError, "bicache depth: expected an integer >= 0, got True"),
        ({"depth": 2.0}, TypeError, "bicache depth: expected an integer >= 0, got 2.0"),
        ({"depth": ""}, ValueError, "bicache depth: expected a number, a table"),
        ({"depth": "hook"}, ValueError, "bicache depth: expected a number, a table"),
        ({"depth": "1,refresh_steps=2"}, ValueError, "bicache depth: expected a number, a table"),
        ({"depth": "five"}, ValueError, "depth: expected a number, a table"),
        ({"depth": "probe:2"}, ValueError, "expected a similarity -1..1"),
        ({"depth": [1, 2]}, TypeError, "bicache depth: expected an integer"),
        ({"depth": None}, TypeError, "bicache depth"),
        ({"depth": {}}, ValueError, "expected at least one ratio"),
        ({"depth": {101: 1}}, ValueError, r"expected 0\.\.100, got 101"),
        ({"depth": {-1: 1}}, ValueError, r"expected 0\.\.100, got -1"),
        ({"depth": {0.5: 1}}, TypeError, r"expected 0\.\.100, got 0\.5"),
        ({"depth": {30: -2}}, ValueError, "at ratio 30: expected an integer >= 0, got -2"),
        ({"depth": 5, "refresh_steps": 0}, ValueError, "refresh_steps: expected 1"),
        ({"depth": 5, "refresh_steps": 1.5}, TypeError, "refresh_steps: expected 1"),
        ({"depth": 5, "splice": "loose"}, ValueError, 'expected official or strict, got "loose"'),
        ({"depth": 5, "splice": 1}, TypeError, "splice: expected a string, got 1"),
        ({"depth": 5, "refresh": "\ud800"}, ValueError, "surrogate"),
        ({"depth": "\ud800"}, ValueError, "surrogate"),
        ({"depth": BiCache}, TypeError, "the class BiCache itself"),
        ({"depth": 5, "refresh": "drift"}, ValueError, "expected steps, block or drift:LIMIT"),
        ({"depth": 5, "refresh": "block+none"}, ValueError, "refresh: expected a setting"),
        ({"depth": 5, "source": "both"}, ValueError, "expected alone or first_request"),
        ({"depth": 5, "ratio": ""}, ValueError, "ratio: expected a setting"),
        ({"depth": 5, "probe_rows": 0}, ValueError, "probe_rows: expected 1"),
    ],
)
def test_wrong_settings(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BiCache(**settings)  # type: ignore[arg-type]


def test_wrong_source() -> None:
    with pytest.raises(ValueError, match="expected alone or first_request, got 'both'"):
        Naive(source="both")


def test_objects_and_strings_give_the_same_tokens_and_work(text_llm: bicache.LLM) -> None:
    outs = []
    for cache in (BiCache(depth=2, refresh_steps=3), "bicache:depth=2,refresh_steps=3"):
        text_llm.clear_prefixes()
        outs += text_llm.generate("w9", prefix="w5 w6 w7 w8", gen_length=6, cache=cache)
    assert outs[0].tokens.tolist() == outs[1].tokens.tolist()
    assert outs[0].stats.rows_per_layer == outs[1].stats.rows_per_layer
    assert outs[0].stats.depth == 2
