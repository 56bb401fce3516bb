"""The arena `forget`: its problems and measures, and a smoke of its entries on the smallest problem."""

import pytest
import torch

from retouch.arenas.contest import Terms, arena
from retouch.arenas.forget import ARENA, DIGIT, KLOM_MODELS, ForgetProblem, measure
from retouch.arenas.runner import run


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETOUCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_problems_cut_the_data_in_two():
    for name, count in (("class", 122), ("subset", 60), ("subpopulation", 10)):
        problem = ForgetProblem(name, Terms(replicas=1))
        assert len(problem.forget) + len(problem.retain) == len(problem.train)
        assert abs(len(problem.forget) - count) <= 5
        assert torch.equal(problem.train.targets[problem.forget_indices], problem.forget.targets)
    whole = ForgetProblem("class", Terms(replicas=1))
    assert not (whole.retain.targets == DIGIT).any()
    assert torch.equal(whole.gone, whole.test.targets == DIGIT)


def test_oracles_have_not_seen_the_forget_set_and_are_their_own_floor():
    problem = ForgetProblem("subpopulation", Terms(replicas=2))
    assert torch.equal(problem.originals[0].head.weight, problem.replica(0).model.head.weight)
    values = measure(problem, [problem.oracles[0], problem.oracles[1]])
    assert values["gap"] == [0.0, 0.0]
    assert "klom_forget" not in values  # too few models for a histogram
    swapped = measure(problem, [problem.oracles[1], problem.oracles[0]])
    assert swapped["distance"] == pytest.approx(values["distance"][::-1])


def test_klom_is_zero_against_itself_and_large_against_a_destroyed_model():
    problem = ForgetProblem("subpopulation", Terms(replicas=KLOM_MODELS))
    same = measure(problem, list(problem.oracles))
    assert same["klom_forget"] == [0.0]
    broken = [problem.oracles[k] for k in range(KLOM_MODELS)]
    for model in broken:
        torch.nn.init.constant_(model.head.weight, float("nan"))
    assert measure(problem, broken)["klom_forget"][0] > 5


def test_seeds_vary_separately():
    fixed = ForgetProblem("subpopulation", Terms(replicas=3, vary=("forget",)))
    one, two = fixed.replica(0), fixed.replica(1)
    assert torch.equal(one.model.head.weight, two.model.head.weight)
    assert one.seed != two.seed
    trained = ForgetProblem("subpopulation", Terms(replicas=3, vary=("train",)))
    one, two = trained.replica(0), trained.replica(1)
    assert not torch.equal(one.model.head.weight, two.model.head.weight)
    assert one.seed == two.seed


def test_a_search_sees_neither_the_seeds_nor_the_test_data_of_the_evidence():
    evidence, search = (ForgetProblem("subset", Terms(replicas=1, search=s)) for s in (False, True))
    assert not torch.equal(evidence.forget_indices, search.forget_indices)
    assert len(search.test) == 200
    assert evidence.replica(0).seed != search.replica(0).seed


def test_trained_models_come_from_the_cache():
    first = ForgetProblem("subpopulation", Terms(replicas=2)).originals
    again = ForgetProblem("subpopulation", Terms(replicas=2)).originals
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)


@pytest.mark.slow
def test_smoke_of_all_entries(tmp_path, monkeypatch):
    from retouch.arenas.forget.entries import dmm

    monkeypatch.setattr(dmm, "MODELS", {"subpopulation": 64})
    evidence = run(arena("forget"), tmp_path, problems=["subpopulation"], terms=Terms(replicas=1))
    rows = evidence["problems"]["subpopulation"]["rows"]
    assert set(rows) == {entry.name for entry in ARENA.entries() if not entry.problems}
    for row in rows.values():
        assert {"gap", "forget", "retain", "test", "mia", "kl", "distance", "seconds", "speedup"} <= set(row["values"])
        assert len(row["answers"]) == len(evidence["problems"]["subpopulation"]["pictures"])
    assert rows["nothing"]["values"]["retain"][0] > 90
    assert evidence["problems"]["subpopulation"]["words"]


@pytest.mark.slow
def test_a_class_is_forgotten_as_the_issue_asks(tmp_path):
    only = ["ssd", "salun", "laf", "concept_poisoning"]
    evidence = run(arena("forget"), tmp_path, problems=["class"], only=only, terms=Terms(replicas=1))
    rows = evidence["problems"]["class"]["rows"]
    oracle = {name: values[0] for name, values in rows["retrain"]["values"].items()}
    for name in only:
        ours = {measure: values[0] for measure, values in rows[name]["values"].items()}
        assert abs(ours["forget"] - oracle["forget"]) <= 5, name
        assert abs(ours["test"] - oracle["test"]) <= 3, name
    assert rows["nothing"]["values"]["forget"] == [100.0]
