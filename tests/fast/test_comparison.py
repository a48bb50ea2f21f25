"""The report of a comparison, out of run folders written by hand: every number against a naive recomputation."""

from __future__ import annotations

import csv
import random
import statistics
from pathlib import Path

import pytest

from cluster.compare.comparison import ablations, full_grao, over_curves, sensitivity, steps_to, target_of
from cluster.compare.outcomes import OutcomeError, read_outcome
from cluster.compare.report import gather, write_report
from cluster.record.estimates import over_seeds, t_quantile
from configs.load import parse
from tests.comparison_runs import tree, write_config, write_lines, write_run

T = {1: 12.706205, 2: 4.302653, 4: 2.776445, 9: 2.262157}
"""Two-sided 95%, from a printed table."""


def grao(alpha: float = 1.0, beta: float = 0.5, regulariser: float = 0.6) -> dict[str, object]:
    return {"name": "grao", "alpha": alpha, "beta": beta, "lambda": regulariser}


def read_csv(folder: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return {(line["table"], line["row"], line["column"]): line for line in csv.DictReader(file)}


def report(out: Path, seeds: dict[str, list[int]]) -> dict[tuple[str, str, str], dict[str, str]]:
    found = gather({(name, seed): out / name / f"seed-{seed}" for name, each in seeds.items() for seed in each})
    write_report(found, "grao compare a.yaml", out / "report")
    return read_csv(out / "report")


def assert_is(line: dict[str, str], values: list[float]) -> None:
    """The line's mean and interval are those of one value per seed."""
    half = T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    assert float(line["mean"]) == pytest.approx(mean)
    assert float(line["low"]) == pytest.approx(mean - half, rel=1e-5, abs=1e-9)
    assert float(line["high"]) == pytest.approx(mean + half, rel=1e-5, abs=1e-9)
    assert int(line["seeds"]) == len(values)
    assert [float(one.split(":")[1]) for one in line["by_seed"].split()] == pytest.approx(values)


@pytest.mark.parametrize(("freedom", "expected"), [*T.items(), (100, 1.983972), (5000, 1.960439)])
def test_the_t_quantile_is_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, rel=1e-6)


def test_one_seed_has_no_interval() -> None:
    one = over_seeds([0.5])
    assert (one.value, one.low, one.high) == (0.5, float("-inf"), float("inf"))
    with pytest.raises(ValueError, match="finite"):
        over_seeds([])


def test_every_number_of_the_score_table_is_that_of_a_naive_recomputation(tmp_path: Path) -> None:
    draw = random.Random(5)
    rewards = {
        (name, seed): [[float(draw.choice((0, 1, 2))) for _ in range(4)] for _ in range(3)]
        for name in ("sft", "grao")
        for seed in range(3)
    }
    for (name, seed), heldout in rewards.items():
        write_run(tmp_path, name, seed, heldout, tree(name), sampled=name == "grao")
    found = report(tmp_path, {"sft": [0, 1, 2], "grao": [0, 1, 2]})
    for name in ("sft", "grao"):
        first, last = ([rewards[name, seed][at] for seed in range(3)] for at in (0, -1))
        pairs = [list(zip(after, before, strict=True)) for after, before in zip(last, first, strict=True)]
        means = [statistics.mean(one) for one in last]
        expected = {
            "RAS: better than the reference, %": [25 * sum(r > 1 for r in one) for one in last],
            "better or as good, %": [25 * sum(r >= 1 for r in one) for one in last],
            "NAG as a rate: better than the start model, %": [25 * sum(a > b for a, b in one) for one in pairs],
            "NAG: wins less losses against the start model, %": [
                25 * sum((a > b) - (a < b) for a, b in one) for one in pairs
            ],
            "mean reward": means,
            "answer length, tokens": [3.0] * 3,
        }
        for row, values in expected.items():
            assert_is(found["scores", row, name], [float(value) for value in values])
        assert_is(found["speed", name, "final score"], means)
        assert_is(found["speed", name, "seconds of training"], [4 * 3.5] * 3)
        assert_is(found["speed", name, "prompts trained"], [8.0] * 3)
        assert_is(found["speed", name, "tokens generated"], [400.0 if name == "grao" else 0.0] * 3)
    differences = [
        statistics.mean(rewards["sft", seed][-1]) - statistics.mean(rewards["grao", seed][-1]) for seed in range(3)
    ]
    assert_is(found["speed", "sft", "less that of grao"], differences)
    over_prompts = found["scores", "mean reward, interval over prompts", "grao"]
    assert float(over_prompts["mean"]) == pytest.approx(float(found["scores", "mean reward", "grao"]["mean"]))
    text = (tmp_path / "report" / "results.md").read_text()
    assert text.startswith("# Comparison\n\n    grao compare a.yaml\n")
    assert "seeds 0, 1, 2." in text
    assert "Ablation" not in text
    assert "Sensitivity" not in text
    row = next(line for line in text.splitlines() if line.startswith("| mean reward |"))
    assert row.count("[") == 2  # two methods, each with its interval
    assert row.count("**") == 2  # the better one is bold


def test_the_best_score_and_90_percent_of_it(tmp_path: Path) -> None:
    # means over seeds: slow 0, 0.25, 0.5; fast 0, 1.0, 0.75 -> the best is fast at step 2, and 90% of the way is 0.9
    for seed in (0, 1):
        write_run(tmp_path, "slow", seed, [[0, 0], [0, 0.5], [0.5, 0.5]], tree("grpo"))
    write_run(tmp_path, "fast", 0, [[0, 0], [1, 0.8], [1, 1]], tree(grao()))
    write_run(tmp_path, "fast", 1, [[0, 0], [1, 1.2], [0, 1]], tree(grao()))
    methods = {
        name: [read_outcome(name, seed, tmp_path / name / f"seed-{seed}") for seed in (0, 1)]
        for name in ("slow", "fast")
    }
    target = target_of(methods)
    assert target is not None
    assert (target.start, target.best, target.method, target.step) == (0.0, 1.0, "fast", 2)
    assert target.value == pytest.approx(0.9)
    assert [steps_to(one, target) for one in methods["fast"]] == [2, 2]  # 0.9 is reached: equal on paper counts
    assert [steps_to(one, target) for one in methods["slow"]] == [None, None]
    found = report(tmp_path, {"slow": [0, 1], "fast": [0, 1]})
    assert found["speed", "slow", "steps to 90%"]["words"] == "reached by 0 of 2"
    assert found["speed", "slow", "steps to 90%"]["mean"] == ""
    assert_is(found["speed", "fast", "steps to 90%"], [2.0, 2.0])


def test_a_mean_of_steps_is_given_only_where_every_seed_got_there(tmp_path: Path) -> None:
    write_run(tmp_path, "m", 0, [[0], [1], [1]])
    write_run(tmp_path, "m", 1, [[0], [0], [0.5]])
    found = report(tmp_path, {"m": [0, 1]})["speed", "m", "steps to 90%"]
    assert (found["mean"], found["words"], found["by_seed"]) == ("", "reached by 1 of 2: 2", "0:2")


def test_the_way_is_measured_from_the_start_model_also_below_zero(tmp_path: Path) -> None:
    write_run(tmp_path, "m", 0, [[-4.0], [-1.3], [-1.0]])
    target = target_of({"m": [read_outcome("m", 0, tmp_path / "m" / "seed-0")]})
    assert target is not None
    assert target.value == pytest.approx(-1.3)
    assert steps_to(read_outcome("m", 0, tmp_path / "m" / "seed-0"), target) == 2


def test_the_largest_fall_is_taken_from_the_best_before_it(tmp_path: Path) -> None:
    write_run(tmp_path, "m", 0, [[0.9], [0.5], [0.7]])  # the way up again does not count
    write_run(tmp_path, "m", 1, [[0.2], [0.3], [0.6]])
    write_run(tmp_path, "m", 2, [[0.2], [0.8], [0.7]])
    assert_is(report(tmp_path, {"m": [0, 1, 2]})["speed", "m", "largest fall"], [0.4, 0.0, 0.1])


def test_where_nobody_beats_the_start_model_there_is_no_target(tmp_path: Path) -> None:
    write_run(tmp_path, "m", 0, [[1.0], [0.5], [1.0]])
    found = report(tmp_path, {"m": [0]})
    assert ("speed", "m", "steps to 90%") not in found
    assert "No method was better than the start model" in (tmp_path / "report" / "results.md").read_text()


def test_missing_and_unfinished_runs_are_named_and_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0, [[0], [1], [1]])
    cut = write_run(tmp_path, "a", 1, [[0], [1], [1]])
    (cut / "steps.jsonl").write_text("".join((cut / "steps.jsonl").read_text().splitlines(keepends=True)[:3]))
    without = write_run(tmp_path, "sft", 0, [[0], [1], [1]], tree("sft"), sampled=False)
    write_lines(without / "evaluations.jsonl", [{"step": 4, "prompts": 1, "metrics": {"objective": -1.0}}])
    found = report(tmp_path, {"a": [0, 1, 2], "sft": [0]})
    assert found["scores", "seeds", "a"]["words"] == "1"
    assert found["scores", "mean reward", "a"]["low"] == ""  # one seed: no interval
    assert ("scores", "seeds", "sft") not in found
    text = (tmp_path / "report" / "results.md").read_text()
    for line in (
        "- a seed 1: it is not finished: 3 of 4 steps done",
        "- a seed 2: it has not begun",
        "- sft seed 0: its evaluations have no sampled answers, so it has no held-out reward",
    ):
        assert line in text
    with pytest.raises(OutcomeError, match=r"no finished run to report; the first: b seed 0: it has not begun"):
        report(tmp_path, {"b": [0]})


def test_ablations_are_found_by_their_settings(tmp_path: Path) -> None:
    configs = {
        "grpo": parse(tree("grpo")),
        "other": parse(tree(grao(), learner={**tree()["learner"], "learning_rate": 0.1})),  # a full GRAO without any
        "main": parse(tree(grao())),
        "no_i": parse(tree(grao(beta=0))),
        "no_e": parse(tree(grao(alpha=0), run={"folder": "elsewhere", "seed": 3, "evaluate_every": 2})),
        "two": parse(tree(grao(alpha=0, beta=0))),
    }
    assert full_grao(configs) == "main"
    assert ablations(configs, "main") == {"alpha": "no_e", "beta": "no_i"}
    assert full_grao({"grpo": configs["grpo"], "no_i": configs["no_i"]}) is None
    for name in ("main", "no_i", "no_e"):
        for seed in (0, 1):
            score = {"main": 1.0, "no_i": 0.5, "no_e": 0.25}[name] + seed / 10
            shown = tree({"main": grao(), "no_i": grao(beta=0), "no_e": grao(alpha=0)}[name])
            write_run(tmp_path, name, seed, [[0], [0], [score]], shown)
    found = report(tmp_path, {"main": [0, 1], "no_i": [0, 1], "no_e": [0, 1]})
    assert_is(found["ablation", "without imitation (beta 0): no_i", "mean reward"], [0.5, 0.6])
    assert_is(found["ablation", "without exploration (alpha 0): no_e", "less the full one's"], [-0.75, -0.75])
    assert_is(found["ablation", "main (all terms)", "mean reward"], [1.0, 1.1])
    assert not [row for table, row, _ in found if table == "ablation" and "regulariser" in row]


def test_sensitivity_needs_three_values_and_nothing_else_changed(tmp_path: Path) -> None:
    values = {0.0: "b0", 0.5: "main", 2.0: "b2"}
    configs = {name: parse(tree(grao(beta=value))) for value, name in values.items()}
    configs["lambda0"] = parse(tree(grao(regulariser=0)))
    assert sensitivity(configs, "beta") == values
    assert sensitivity(configs, "lambda") == {}
    for value, name in values.items():
        write_run(tmp_path, name, 0, [[0], [0], [1 - value / 4]], tree(grao(beta=value)))
    found = report(tmp_path, {name: [0] for name in values.values()})
    shown = {value: found["sensitivity to beta", value, "mean reward"]["mean"] for value in ("0", "0.5", "2")}
    assert shown == {"0": "1.0", "0.5": "0.875", "2": "0.5"}
    assert (tmp_path / "report" / "sensitivity_beta.png").stat().st_size > 5000


def test_shares_are_means_of_thirds_and_curves_are_means_over_seeds(tmp_path: Path) -> None:
    for seed, share in enumerate((0.1, 0.3)):
        folder = write_run(tmp_path, "grao", seed, [[0], [seed], [1]], shares={"exploration": share, "imitation": 0.5})
        assert read_outcome("grao", seed, folder).training == ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4))
    found = report(tmp_path, {"grao": [0, 1]})
    assert_is(found["shares", "exploration", "first third"], [10.0, 30.0])
    assert_is(found["shares", "imitation", "last third"], [50.0, 50.0])
    for name in ("heldout_reward", "training_reward", "shares"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in (tmp_path / "report" / "results.md").read_text()
    points = over_curves([((0, 1.0), (2, 3.0)), ((0, 3.0), (2, 4.0), (4, 9.0))])
    assert [(p.step, p.mean, p.low, p.high) for p in points] == [(0, 2.0, 1.0, 3.0), (2, 3.5, 3.0, 4.0)]


def test_a_run_with_stages_is_counted_over_all_and_judged_by_its_last(tmp_path: Path) -> None:
    folder = tmp_path / "staged" / "seed-0"
    folder.mkdir(parents=True)
    stages = [{"name": "one", "learner": {"groups_per_step": 3}}, {"name": "two"}]
    write_config(folder / "config.yaml", {**tree(run={"folder": str(folder)}), "stages": stages})
    write_run(tmp_path, "one", 0, [[0, 0], [1, 1], [2, 0]]).rename(folder / "1-one")
    with pytest.raises(OutcomeError, match="it is not finished: 4 of 8 steps done"):
        read_outcome("staged", 0, folder)
    write_run(tmp_path, "two", 0, [[2, 0], [0, 0], [1, 1]]).rename(folder / "2-two")
    found = read_outcome("staged", 0, folder)
    assert [step for step, _ in found.training] == list(range(1, 9))
    assert found.heldout == ((0, 0.0), (2, 1.0), (4, 1.0), (6, 0.0), (8, 1.0))
    assert found.trained_prompts == 4 * 3 + 4 * 2
    assert found.final["nag/net"] == 1.0  # against the model before the first stage
    assert found.seconds == 28.0
    assert found.model == "some/model"


def test_recorded_nag_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "m", 0, [[0, 0], [1, 1], [2, 0]])
    assert read_outcome("m", 0, folder).final["nag/net"] == 0.5
    lines = (folder / "evaluations.jsonl").read_text().replace('"length/mean"', '"nag/net": 0.25, "length/mean"')
    (folder / "evaluations.jsonl").write_text(lines)
    assert read_outcome("m", 0, folder).final["nag/net"] == 0.25


def test_a_file_that_is_not_ours_is_named_in_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "m", 0, [[0], [1], [1]])
    (folder / "evaluations.jsonl").write_text('{"step": 0, "pro')
    with pytest.raises(OutcomeError, match=r"seed-0' cannot be read") as caught:
        read_outcome("m", 0, folder)
    assert "\n" not in str(caught.value)
    write_config(folder / "config.yaml", {"model": 3})
    with pytest.raises(OutcomeError, match="cannot be read"):
        read_outcome("m", 0, folder)
