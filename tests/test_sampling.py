"""What samples and judges, beside the loops: which samples of a policy solve a problem."""

from architectures import build

from rlhf_helpers.algorithms import sampling
from rlhf_helpers.worlds import arithmetic


def test_what_solves_a_problem_is_told_by_its_last_term(monkeypatch):
    """Oracle: four texts by hand, two of each problem, one of which holds its answer elsewhere; and
    greedy takes the likeliest token alone."""
    asked = {}

    def written(policy, tokenizer, prompts, new, **how):
        asked.update(how, prompts=prompts)
        return ["95", "5+90=95", "1100", "5+105=110"]

    monkeypatch.setattr(sampling, "write", written)
    problems = [
        arithmetic.Problem("37+58=", "95", 3, (37, 58)),
        arithmetic.Problem("50+60=", "110", 3, (50, 60)),
    ]
    found = sampling.solve(build("gpt2"), None, problems, 2, 16)
    assert found.tolist() == [[True, True], [False, True]]
    assert (asked["prompts"], asked["samples_per_prompt"]) == (["37+58=", "50+60="], 2)
    assert asked["top_k"] == 0
    sampling.solve(build("gpt2"), None, problems, 2, 16, greedy=True)
    assert asked["top_k"] == 1
