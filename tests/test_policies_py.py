"""Policy objects: what they accept, and that their strings mean the same to the engine."""

from __future__ import annotations

import dataclasses
import pickle

import bicache
import numpy as np
import pytest
from bicache import BiCache, DLLMCache, FastDLLM, Naive, NoCache, Policy, _core


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
        FastDLLM(),
        FastDLLM(mode="dual", refresh_steps=3, block_start="fill"),
        DLLMCache(),
        DLLMCache(25, 5, 0.1, "since_recompute"),
        DLLMCache(transfer_ratio=1 / 3),
        DLLMCache(transfer_ratio=0, new_tokens="recompute"),
        DLLMCache(transfer_ratio=1e-7),
        BiCache(depth=5) + DLLMCache(),
        FastDLLM() + Naive(),
        BiCache(depth=lambda info: 1) + FastDLLM(),
    ],
)
def test_the_engine_reads_back_what_an_object_says(policy: Policy) -> None:
    if "depth=hook" not in policy.spec():
        assert _core.canonical_policy(policy.spec()) == policy.spec()
    assert policy.handle(4).spec == policy.spec()


def test_defaults_are_the_engines() -> None:
    assert BiCache(depth=5).spec() == _core.canonical_policy("bicache:depth=5")
    assert Naive().spec() == _core.canonical_policy("naive")
    assert FastDLLM().spec() == _core.canonical_policy("fast_dllm")
    assert DLLMCache().spec() == _core.canonical_policy("dllm_cache")


def test_every_policy_and_setting_of_the_engine_has_an_object() -> None:
    objects = {
        "none": NoCache,
        "naive": Naive,
        "bicache": BiCache,
        "fast_dllm": FastDLLM,
        "dllm_cache": DLLMCache,
    }
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
        ({"depth": {101: 1}}, ValueError, r"expected an integer 0\.\.100, got 101"),
        ({"depth": {-1: 1}}, ValueError, r"expected an integer 0\.\.100, got -1"),
        ({"depth": {0.5: 1}}, TypeError, r"expected an integer 0\.\.100, got 0\.5"),
        ({"depth": {30: -2}}, ValueError, "at ratio 30: expected an integer >= 0, got -2"),
        ({"depth": 5, "refresh_steps": 0}, ValueError, "refresh_steps: expected an integer 1"),
        ({"depth": 5, "refresh_steps": 1.5}, TypeError, "refresh_steps: expected an integer 1"),
        ({"depth": 5, "splice": "loose"}, ValueError, 'expected official or strict, got "loose"'),
        ({"depth": 5, "splice": 1}, TypeError, "splice: expected a string, got 1"),
        ({"depth": 5, "refresh": "\ud800"}, ValueError, "surrogate"),
        ({"depth": "\ud800"}, ValueError, "surrogate"),
        ({"depth": BiCache}, TypeError, "the class BiCache itself"),
        ({"depth": 5, "refresh": "drift"}, ValueError, "expected steps, block or drift:LIMIT"),
        ({"depth": 5, "refresh": "block+none"}, ValueError, "refresh: expected a setting"),
        ({"depth": 5, "source": "both"}, ValueError, "expected alone or first_request"),
        ({"depth": 5, "ratio": ""}, ValueError, "ratio: expected a setting"),
        ({"depth": 5, "probe_rows": 0}, ValueError, "probe_rows: expected an integer 1"),
    ],
)
def test_wrong_settings(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BiCache(**settings)  # type: ignore[arg-type]


def test_wrong_source() -> None:
    with pytest.raises(ValueError, match="expected alone or first_request, got 'both'"):
        Naive(source="both")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "suffix"}, ValueError, "fast_dllm mode: expected prefix or dual, got 'suffix'"),
        ({"mode": None}, ValueError, "fast_dllm mode: expected prefix or dual, got None"),
        ({"block_start": "skip"}, ValueError, "block_start: expected commit or fill, got 'skip'"),
        ({"refresh_steps": 0}, ValueError, r"refresh_steps: expected an integer 1\.\..*, got 0"),
        ({"refresh_steps": 10**9}, ValueError, r"steps: expected an integer 1\.\.999999999, got"),
        ({"refresh_steps": True}, TypeError, "refresh_steps: expected an integer 1.*, got True"),
        ({"refresh_steps": "none"}, TypeError, "steps: expected an integer 1.*, got 'none'"),
    ],
)
def test_wrong_settings_of_fast_dllm(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FastDLLM(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prompt_interval_steps": 0}, ValueError, "prompt_interval_steps: .*integer 1.*, got 0"),
        ({"gen_interval_steps": 2.0}, TypeError, "gen_interval_steps: .*integer 1.*, got 2.0"),
        ({"gen_interval_steps": None}, TypeError, "gen_interval_steps: .*integer 1.*, got None"),
        ({"transfer_ratio": 1.01}, ValueError, r"ratio: expected a number 0\.\.1, got 1.01"),
        ({"transfer_ratio": -0.1}, ValueError, r"ratio: expected a number 0\.\.1, got -0.1"),
        ({"transfer_ratio": float("nan")}, ValueError, r"ratio: expected a number 0\.\.1, got nan"),
        ({"transfer_ratio": 10**400}, ValueError, r"ratio: expected a number 0\.\.1, got 1000"),
        ({"transfer_ratio": "0.25"}, TypeError, r"ratio: expected a number 0\.\.1, got '0.25'"),
        ({"transfer_ratio": True}, TypeError, r"ratio: expected a number 0\.\.1, got True"),
        ({"drift": "entry"}, ValueError, "drift: expected last_step or since_recompute, got"),
        ({"drift": 1}, ValueError, "drift: expected last_step or since_recompute, got 1"),
    ],
)
def test_wrong_settings_of_dllm_cache(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DLLMCache(**settings)  # type: ignore[arg-type]


def test_settings_become_plain_values() -> None:
    policy = DLLMCache(np.int32(25), np.int64(5), np.float32(0.5))
    assert policy == DLLMCache(25, 5, 0.5) and hash(policy) == hash(DLLMCache(25, 5, 0.5))
    assert type(policy.transfer_ratio) is float and type(policy.gen_interval_steps) is int
    assert type(FastDLLM(refresh_steps=np.int64(2)).refresh_steps) is int
    assert DLLMCache(transfer_ratio=1) == DLLMCache(transfer_ratio=1.0)


# ---- a + b


PREFIX_POLICIES = [Naive(), BiCache(depth=2), BiCache(depth={0: 1, 50: 2}, refresh="block")]
REST_POLICIES = [FastDLLM(mode="dual"), DLLMCache(transfer_ratio=0.5)]


@pytest.mark.parametrize("rest", REST_POLICIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("prefix", PREFIX_POLICIES, ids=lambda p: p.spec().split(",")[0])
def test_policies_add_up_in_either_order(prefix: Policy, rest: Policy) -> None:
    one, other = prefix + rest, rest + prefix
    assert one.spec() == other.spec() == f"{prefix.spec()}+{rest.spec()}"
    assert one == other and hash(one) == hash(other)
    assert one != prefix + NoCache() and one != prefix
    assert _core.canonical_policy(f"{rest.spec()}+{prefix.spec()}") == one.spec()
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rest = NoCache()  # type: ignore[attr-defined]


def test_no_cache_for_the_other_rows_is_what_a_prefix_policy_says_by_itself() -> None:
    for one in (BiCache(depth=2) + NoCache(), NoCache() + BiCache(depth=2)):
        assert one.spec() == BiCache(depth=2).spec()
        assert one.prefix == BiCache(depth=2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (BiCache(depth=2), Naive(), "both speak for the prefix"),
        (DLLMCache(), FastDLLM(), "both speak for all"),
        (NoCache(), NoCache(), "both speak for all"),
        (BiCache(depth=2) + DLLMCache(), FastDLLM(), "expected"),
        (BiCache(depth=2), Naive() + FastDLLM(), "expected"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.spec().split(":")[0],
)
def test_policies_that_speak_for_the_same_rows(a: Policy, b: Policy, message: str) -> None:
    for first, second in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=rf"^\[cache\] .*{message}"):
            first + second


def test_only_policies_add_up() -> None:
    strings = r"^\[cache\] '\+': expected two policy objects, .* got an object and 'dllm_cache'"
    for other, message in {"dllm_cache": strings, 1: "unsupported", None: "unsupported"}.items():
        with pytest.raises(TypeError, match=message):
            BiCache(depth=2) + other  # type: ignore[operator]
        with pytest.raises(TypeError, match=message):
            other + BiCache(depth=2)  # type: ignore[operator]


class DepthOne(bicache.DepthPolicy):
    """Counts how often it was asked, and for which model."""

    def __init__(self) -> None:
        self.asked = 0
        self.layers: list[int] = []

    def depth(self, info: bicache.RequestInfo) -> int:
        self.asked += 1
        return 1

    def reachable(self, layers: int) -> list[int]:
        self.layers.append(layers)
        return [1]


@pytest.mark.parametrize("flipped", [False, True])
def test_a_depth_rule_survives_composition(text_llm: bicache.LLM, flipped: bool) -> None:
    rule = DepthOne()
    a, b = BiCache(depth=rule, refresh_steps=2), FastDLLM(mode="dual")
    options = {"gen_length": 6, "block_length": 3}
    outs = []
    for cache in (b + a if flipped else a + b, BiCache(depth=1, refresh_steps=2) + b):
        text_llm.clear_prefixes()
        outs += text_llm.generate("w9", prefix="w5 w6 w7 w8", cache=cache, **options)
    assert rule.asked == 3 and set(rule.layers) == {3}  # refreshes at steps 0, 2, 4
    assert outs[0].tokens.tolist() == outs[1].tokens.tolist()
    assert outs[0].stats.rows_per_layer == outs[1].stats.rows_per_layer
    assert outs[0].stats.depths == (1, 1, 1)


@pytest.mark.parametrize(
    ("policy", "cache"),
    [
        (BiCache(depth=2, refresh_steps=3), "bicache:depth=2,refresh_steps=3"),
        (FastDLLM(mode="dual"), "fast_dllm:mode=dual"),
        (FastDLLM(refresh_steps=2), "fast_dllm:refresh_steps=2"),
        (DLLMCache(3, 2, 0.5), "dllm_cache:prompt_interval_steps=3,gen_interval_steps=2,"
         "transfer_ratio=0.5"),
        (DLLMCache(3, 2, 0.5) + BiCache(depth=1), "bicache:depth=1+dllm_cache:"
         "prompt_interval_steps=3,gen_interval_steps=2,transfer_ratio=0.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_objects_and_strings_give_the_same_tokens_and_work(
    text_llm: bicache.LLM, policy: Policy, cache: str
) -> None:
    outs = []
    for chosen in (policy, cache, "none"):
        text_llm.clear_prefixes()
        outs += text_llm.generate(
            "w9", prefix="w5 w6 w7 w8", gen_length=6, block_length=3, cache=chosen
        )
    assert outs[0].tokens.tolist() == outs[1].tokens.tolist()
    assert outs[0].stats.rows_per_layer == outs[1].stats.rows_per_layer
    assert outs[0].stats.value_rows_per_layer == outs[1].stats.value_rows_per_layer
    assert sum(outs[0].stats.rows_per_layer) < sum(outs[2].stats.rows_per_layer)
