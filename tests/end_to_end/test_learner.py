"""The learner on 1 and 2 ZeRO-3 ranks: real processes, real DeepSpeed, against a plain float64 reference."""

from __future__ import annotations

import glob
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.objectives import AnyObjective, Correction, DpoObjective, GraoObjective, GrpoObjective, SftObjective
from configs.schema import LearnerConfig, RolloutConfig
from learner.errors import LearnerError
from learner.objectives.build import build_objective
from learner.schedule import learning_rate
from learner.types import RankReport
from learner.wire.layout import file_prefix
from learner.worker import LearnerRank
from learner.zero import shards
from reward.types import ScoredGroup
from rollout.engine.staging import Staging
from rollout.types import Parameters
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.reference import Reference, random_group, random_step

OBJECTIVE = GraoObjective.model_validate({"alpha": 0.9, "beta": 0.5, "lambda": 0.6})
ROLLOUT = RolloutConfig(temperature=0.7, dtype="float32", samples_per_prompt=4)
LEARNER = LearnerConfig(
    objective=OBJECTIVE,
    dtype="float32",
    learning_rate=1e-3,
    warmup_steps=2,
    schedule="cosine",
    steps=8,
    weight_decay=0.1,
    max_grad_norm=0.5,
    tokens_per_micro_batch=64,
    head_chunk=16,
    kl_every=2,
)


class Run:
    """Ranks with their first checkpoint, to which every test goes back."""

    def __init__(self, model: Path, ranks: Ranks, folder: Path) -> None:
        self.model, self.ranks, self.folder = model, ranks, folder
        folder.mkdir()
        ranks.call(LearnerRank.save, str(folder))

    def reset(self) -> None:
        self.ranks.call(LearnerRank.load, str(self.folder))

    def step(self, step: int, groups: list[ScoredGroup]) -> list[RankReport]:
        return self.ranks.call(LearnerRank.train_step, step, groups)

    def publish(self, version: int) -> Parameters:
        parts = self.ranks.call(LearnerRank.publish, version)
        return replace(parts[0], pieces=tuple(part.pieces[0] for part in parts))

    def state(self, folder: Path, trust: bool = False) -> dict[str, dict[str, torch.Tensor]]:
        """Whole float32 parameters and moments by name, out of a checkpoint."""
        folder.mkdir()
        self.ranks.call(LearnerRank.save, str(folder))
        return whole(folder, self.model, trust)


def whole(folder: Path, model: Path, trust: bool) -> dict[str, dict[str, torch.Tensor]]:
    plain = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    names, sizes = tuple(shapes), tuple(shape.numel() for shape in shapes.values())
    host = torch.device("cpu")
    [section] = shards.read(str(folder), 0, 1, [shards.Section(names, sizes, {}, 0.0)], host).sections
    return {
        state: dict(
            zip(names, (part.view(shapes[n]) for n, part in zip(names, flat.split(sizes), strict=True)), strict=True)
        )
        for state, flat in section.tensors.items()
    }


def started(model: Path, folder: Path, world: int, sequence_ranks: int = 1) -> Iterator[Run]:
    learner = LEARNER.model_copy(update={"ranks": world, "sequence_ranks": sequence_ranks})
    ranks = Ranks(model, world, learner, ROLLOUT)
    yield Run(model, ranks, folder / "start")
    ranks.close()
    assert not glob.glob(f"/dev/shm/{file_prefix(ranks.secret)}*")


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def run(request: pytest.FixtureRequest, odd_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield from started(odd_model, tmp_path_factory.mktemp("run"), request.param)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


def read(parameters: Parameters, path: str) -> dict[str, torch.Tensor]:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[parameters.dtype]
    content = Path(path).read_bytes()
    return {
        spec.name: torch.frombuffer(bytearray(content[spec.offset : spec.offset + spec.nbytes]), dtype=dtype).view(
            spec.shape
        )
        for spec in parameters.tensors
    }


def assert_same_gradients(
    state: dict[str, dict[str, torch.Tensor]], gradients: dict[str, torch.Tensor], norm: float
) -> None:
    """AdamW's first moment after the first step is (1 - beta1) times the clipped gradient."""
    clip = max(1.0, norm / LEARNER.max_grad_norm)
    whole = sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5
    for name, gradient in gradients.items():
        difference = (state["exp_avg"][name].double() / (1 - LEARNER.adam_betas[0]) * clip - gradient).norm()
        # some gradients are 0 on paper (a key's bias); beside them stands the rounding of all the others
        assert difference <= 1e-5 * (gradient.norm() + 0.1 * whole), name


def use_objective(rank: LearnerRank, objective: AnyObjective) -> None:
    rank._learner = rank._learner.model_copy(update={"objective": objective})
    rank._objective = build_objective(objective)


def assert_first_step(run: Run, objective: AnyObjective, tmp_path: Path) -> None:
    """The first step's loss, norm and gradients under this objective are the reference's."""
    run.reset()
    run.ranks.call(use_objective, objective)
    learner = LEARNER.model_copy(update={"objective": objective})
    try:
        groups = random_step(20)
        loss, norm, gradients = Reference(run.model, learner, ROLLOUT).step(1, groups)
        reports = run.step(1, groups)
    finally:
        run.ranks.call(use_objective, OBJECTIVE)
    method = build_objective(objective)
    results = {row.row: row for report in reports for row in report.rows}
    found = method.terms(groups, method.rows(groups), results)
    assert loss != 0
    assert -sum(found.values()) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert [report.grad_norm for report in reports] == pytest.approx([norm] * len(reports), rel=1e-5)
    assert_same_gradients(run.state(tmp_path / "state"), gradients, norm)


@pytest.mark.parametrize("reading", ["samples_and_reference", "samples"])
@pytest.mark.parametrize("coefficients", [(1, 0, 0), (0, 0.5, 0), (0, 0, 1), (1, 0.5, 0), (0, 1, 0.6), (0.3, 2, 1.7)])
def test_every_coefficient_and_both_readings(
    run: Run, coefficients: tuple[float, float, float], reading: str, tmp_path: Path
) -> None:
    given = dict(zip(("alpha", "beta", "lambda"), coefficients, strict=True))
    assert_first_step(run, GraoObjective.model_validate({**given, "advantage_group": reading}), tmp_path)


@pytest.mark.parametrize(
    "objective",
    [
        GraoObjective(clip=0.2, correction=Correction(weight="geometric", mask="sequence", mask_low=0, mask_high=1e3)),
        GraoObjective(correction=Correction(mask="token", mask_low=0.1, mask_high=8)),
        GraoObjective(correction=Correction(weight="sequence", mask="geometric", mask_low=0.1, mask_high=8)),
        GrpoObjective(name="grpo", correction=Correction(cap=1.5)),
        SftObjective(name="sft"),
        DpoObjective(name="dpo"),
    ],
    ids=["grao clipped", "grao, token mask", "grao, sequence weights", "grpo", "sft", "dpo"],
)
def test_every_objective(run: Run, objective: AnyObjective, tmp_path: Path) -> None:
    """The rollout's log-probabilities are random, so every correction has much to do."""
    assert_first_step(run, objective, tmp_path)


@pytest.mark.parametrize("objective", [GraoObjective(), GraoObjective(clip=0.02)], ids=["plain", "clipped"])
def test_further_updates_are_corrected_and_compared_with_the_first(
    run: Run, objective: GraoObjective, tmp_path: Path
) -> None:
    """The clip's anchor is the first update's own forward pass, micro-batch by micro-batch."""
    run.reset()
    learner = LEARNER.model_copy(update={"objective": objective, "updates_per_step": 2})
    reference = Reference(run.model, learner, ROLLOUT)
    run.ranks.call(use_learner, learner)
    try:
        for step in (1, 2):
            groups = as_sampled(random_step(30 + step), reference)
            loss, norm, _ = reference.step(step, groups)
            reports = run.step(step, groups)
            assert [report.grad_norm for report in reports] == pytest.approx([norm] * len(reports), rel=1e-4)
            results = [row for report in reports for row in report.rows]
            assert -sum(row.gain for row in results) == pytest.approx(loss, rel=1e-4)
    finally:
        run.ranks.call(use_learner, LEARNER)
    assert min(report.micro_batches for report in reports) > 1
    assert sum(row.weight_sum for row in results) > 0, "the first update should be corrected too"
    assert (sum(row.clipped for row in results) > 0) == (objective.clip is not None)
    state = run.state(tmp_path / "state")
    for name, parameter in reference.model.named_parameters():
        assert relative(state["master"][name], parameter.detach()) < 1e-5, name


def use_learner(rank: LearnerRank, learner: LearnerConfig) -> None:
    rank._learner = learner
    rank._objective = build_objective(learner.objective)


def as_sampled(groups: list[ScoredGroup], reference: Reference) -> list[ScoredGroup]:
    """With log-probabilities that an engine with rounding of its own would have found."""
    noise, made = random.Random(0), []
    for scored in groups:
        prompt = scored.group.prompt.token_ids
        with torch.no_grad():
            found = [reference.logprobs(prompt, one.token_ids, 0.7).tolist() for one in scored.group.samples]
        samples = tuple(
            replace(one, logprobs=tuple(lp + noise.gauss(0, 0.1) for lp in lps))
            for one, lps in zip(scored.group.samples, found, strict=True)
        )
        made.append(replace(scored, group=replace(scored.group, samples=samples)))
    return made


def test_measuring_gives_the_loss_and_changes_nothing(run: Run, tmp_path: Path) -> None:
    run.reset()
    run.step(1, random_step(1))
    before = run.state(tmp_path / "before")
    objective = DpoObjective(name="dpo")
    run.ranks.call(use_objective, objective)
    try:
        groups = random_step(21)
        parts = run.ranks.call(LearnerRank.measure, groups)
    finally:
        run.ranks.call(use_objective, OBJECTIVE)
    results = {row.row: row for part in parts for row in part}
    reference = Reference(run.model, LEARNER.model_copy(update={"objective": objective}), ROLLOUT)
    reference.model.load_state_dict({name: tensor.double() for name, tensor in before["master"].items()})
    with torch.no_grad():
        assert -sum(row.gain for row in results.values()) == pytest.approx(float(reference.loss(groups)), rel=1e-5)
    after = run.state(tmp_path / "after")
    assert all(torch.equal(after[s][name], tensor) for s, named in before.items() for name, tensor in named.items())
    run.step(2, random_step(2))  # and training goes on


def hide_start_model(rank: LearnerRank, hidden: bool) -> None:
    engine = rank._engine
    if hidden:
        engine.hidden, engine.start_model = engine.start_model, None  # type: ignore[attr-defined]
    else:
        engine.start_model = engine.hidden  # type: ignore[attr-defined]


def test_the_start_model_is_asked_once_about_the_same_rows(run: Run) -> None:
    """What it says of held-out rows never changes; the policy does."""

    def measure(groups: list[ScoredGroup]) -> list[tuple[int, float, float]]:
        parts = run.ranks.call(LearnerRank.measure, groups)
        return sorted((row.row, row.gain, row.log_ratio_sum) for part in parts for row in part)

    run.reset()
    run.ranks.call(use_objective, DpoObjective(name="dpo"))
    try:
        groups, others = random_step(21), random_step(22)
        first = measure(groups)
        run.step(1, random_step(1))
        again = measure(groups)
        measure(others)
        asked = measure(groups)
        run.ranks.call(hide_start_model, True)
        kept = measure(groups)
        with pytest.raises(AssertionError, match="no start model"):
            measure(others)
    finally:
        run.ranks.call(hide_start_model, False)
        run.ranks.call(use_objective, OBJECTIVE)
    assert first != again
    assert again == asked == kept


def test_answers_are_compared_with_the_start_model_at_temperature_one(run: Run) -> None:
    check_log_ratios(run)


def check_log_ratios(run: Run) -> None:
    run.reset()
    groups = random_step(5)

    def log_ratios() -> list[float]:
        found = dict(pair for part in run.ranks.call(LearnerRank.log_ratios, groups) for pair in part)
        assert sorted(found) == list(range(sum(len(scored.group.samples) for scored in groups)))
        return [found[number] for number in sorted(found)]

    def summed(reference: Reference) -> list[float]:
        with torch.no_grad():
            return [
                float(reference.logprobs(scored.group.prompt.token_ids, sample.token_ids, 1.0).sum())
                for scored in groups
                for sample in scored.group.samples
            ]

    assert max(map(abs, log_ratios())) < 1e-5
    reference = Reference(run.model, LEARNER, ROLLOUT)
    before = summed(reference)
    run.step(1, groups)
    reference.step(1, groups)
    expected = [now - start for now, start in zip(summed(reference), before, strict=True)]
    assert max(map(abs, expected)) > 1e-2
    assert log_ratios() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def left_by_a_forward_pass(rank: LearnerRank) -> tuple[bool, list[str]]:
    """Whether DeepSpeed still knows what training needs when, and the parameters that are gathered for nobody."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    module = rank._engine.model
    gathered = [
        name
        for name, parameter in module._named()
        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE and not parameter.ds_persist
    ]
    return not module._zero.parameter_offload.get_param_coordinator().is_invalid_trace(), gathered


def test_given_tokens_are_answered_between_updates_and_nothing_is_left_of_it(run: Run, tmp_path: Path) -> None:
    """What engines are compared with: exact, and the next updates are those that they would have been, bit for bit."""
    sequences = [(5, 9, 7, 20, 3, 8), (4, 4, 11, 2)]
    states = []
    for asks in (False, True):
        run.reset()
        reference = Reference(run.model, LEARNER, ROLLOUT)
        for step in range(1, 5):
            run.step(step, random_step(step))
            reference.step(step, random_step(step))
            if asks:
                found = [one for part in run.ranks.call(LearnerRank.logprobs, sequences) for one in part]
                assert [number for number, _ in sorted(found)] == [0, 1]
                for number, logprobs in found:
                    wanted = reference.logprobs(sequences[number][:1], sequences[number][1:], 1.0)
                    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted.detach(), atol=2e-4, rtol=0)
                assert run.ranks.call(left_by_a_forward_pass) == [(True, [])] * run.ranks.world
        states.append(run.state(tmp_path / f"state-{asks}"))
    for kind, tensors in states[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, states[1][kind][name]), (kind, name)


def test_steps_equal_the_plain_reference(run: Run, tmp_path: Path) -> None:
    check_steps(run, tmp_path)


def check_steps(run: Run, tmp_path: Path) -> None:
    run.reset()
    reference = Reference(run.model, LEARNER, ROLLOUT)
    for step in range(1, 4):
        groups = random_step(step)
        loss, norm, gradients = reference.step(step, groups)
        reports = run.step(step, groups)
        assert min(report.micro_batches for report in reports) > 1, "the budget should make several micro-batches"
        assert len({report.micro_batches for report in reports}) == 1
        for report in reports:
            assert report.grad_norm == pytest.approx(norm, rel=1e-5)
            assert report.learning_rate == learning_rate(step, LEARNER)
        results = {row.row: row for report in reports for row in report.rows}
        rows = build_objective(OBJECTIVE).rows(groups)
        assert sorted(results) == list(range(len(rows)))
        found = build_objective(OBJECTIVE).terms(groups, rows, results)
        assert -sum(found.values()) == pytest.approx(loss, rel=1e-5, abs=1e-7)
        state = run.state(tmp_path / str(step))
        if step == 1:
            assert norm > LEARNER.max_grad_norm, "the step should clip"
            assert_same_gradients(state, gradients, norm)
        for name, parameter in reference.model.named_parameters():
            assert relative(state["master"][name], parameter.detach()) < 1e-5, name


def test_the_last_step_has_the_beta_that_the_run_ends_with(run: Run) -> None:
    run.reset()
    run.ranks.call(use_objective, OBJECTIVE.model_copy(update={"beta_end": 3.0}))
    try:
        reports = run.step(LEARNER.steps, random_step(1))
    finally:
        run.ranks.call(use_objective, OBJECTIVE)
    ended = LEARNER.model_copy(update={"objective": OBJECTIVE.model_copy(update={"beta": 3.0})})
    _, norm, _ = Reference(run.model, ended, ROLLOUT).step(LEARNER.steps, random_step(1))
    _, constant, _ = Reference(run.model, LEARNER, ROLLOUT).step(LEARNER.steps, random_step(1))
    assert norm != pytest.approx(constant, rel=1e-2)
    assert [report.grad_norm for report in reports] == pytest.approx([norm] * len(reports), rel=1e-5)


def test_rows_say_what_the_reference_says(run: Run) -> None:
    run.reset()
    reference = Reference(run.model, LEARNER, ROLLOUT)
    start = Reference(run.model, LEARNER, ROLLOUT)
    for step in (1, 2):
        groups = random_step(10 + step)
        reports = run.step(step, groups)
        rows = build_objective(OBJECTIVE).rows(groups)
        results = {result.row: result for report in reports for result in report.rows}
        nominal = 0
        with torch.no_grad():
            for index, row in enumerate(rows):
                prompt = groups[row.group].group.prompt.token_ids
                nominal += len(prompt) + len(row.token_ids)
                logprobs = reference.logprobs(prompt, row.token_ids, 0.7)
                gap = torch.zeros(1, dtype=torch.float64)
                if row.logprobs is not None:
                    gap = (logprobs - torch.tensor(row.logprobs, dtype=torch.float64)).abs()
                ratio = start.logprobs(prompt, row.token_ids, 0.7) - logprobs
                kl = float((ratio.exp() - ratio - 1).sum())
                result = results[index]
                assert result.mean_logprob == pytest.approx(float(logprobs.mean()), rel=1e-5)
                assert result.gap_sum == pytest.approx(float(gap.sum()), rel=1e-5)
                assert result.gap_max == pytest.approx(float(gap.max()), rel=1e-5)
                entropy = float(reference.entropy(prompt, row.token_ids, 0.7).sum())
                assert result.entropy_sum == pytest.approx(entropy, rel=1e-5)
                if step == LEARNER.kl_every:
                    assert result.kl_sum == pytest.approx(kl, rel=1e-3, abs=1e-6)
                    assert kl > 0
                else:
                    assert math.isnan(result.kl_sum)
        assert sum(report.nominal_tokens for report in reports) == nominal
        assert sum(report.unique_tokens for report in reports) < nominal
        reference.step(step, groups)


def test_a_step_without_signal_changes_nothing(run: Run, tmp_path: Path) -> None:
    run.reset()
    groups = [random_group(n, random.Random(n), 4, rewards=[1.0] * 5) for n in range(3)]
    run.step(1, random_step(1))
    before = run.state(tmp_path / "before")
    for report in run.step(2, groups):
        assert report.grad_norm == 0.0
        assert report.rows == ()
        assert report.micro_batches == 0
        assert report.learning_rate == learning_rate(2, LEARNER)
    after = run.state(tmp_path / "after")
    assert all(torch.equal(after[s][name], tensor) for s, named in before.items() for name, tensor in named.items())


def test_fewer_rows_than_ranks(run: Run, tmp_path: Path) -> None:
    run.reset()
    # the samples' own mean is 0 and only the reference differs: with alpha and lambda on all rows have weight
    groups = [random_group(0, random.Random(5), 2)]
    reference = Reference(run.model, LEARNER, ROLLOUT)
    _, norm, _ = reference.step(1, groups)
    for report in run.step(1, groups):
        assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    state = run.state(tmp_path / "state")
    for name, parameter in reference.model.named_parameters():
        assert relative(state["master"][name], parameter.detach()) < 1e-5, name


def test_published_bytes_are_the_parameters(run: Run, tmp_path: Path) -> None:
    run.reset()
    original = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    staging = Staging()
    for version in range(3):
        if version:
            run.step(version, random_step(version))
        parameters = run.publish(version)
        expected = run.state(tmp_path / str(version))["master"]
        if version == 0:
            assert all(torch.equal(expected[name], p.detach()) for name, p in original.named_parameters())
        assert [spec.name for spec in parameters.tensors] == [name for name, _ in original.named_parameters()]
        remote = replace(
            parameters, pieces=tuple(replace(piece, path="/dev/shm/nowhere") for piece in parameters.pieces)
        )
        for notice in (parameters, remote):  # out of shared memory, and over the ranks' servers
            found = read(notice, staging.fetch(notice))
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    staging.close()


def test_loading_goes_back_bit_for_bit(run: Run, tmp_path: Path) -> None:
    run.reset()
    run.step(1, random_step(1))
    saved = tmp_path / "saved"
    saved.mkdir()
    run.ranks.call(LearnerRank.save, str(saved))
    ahead = [run.step(step, random_step(step)) for step in (2, 3)]
    expected = run.state(tmp_path / "ahead")
    run.ranks.call(LearnerRank.load, str(saved))
    again = [run.step(step, random_step(step)) for step in (2, 3)]
    found = run.state(tmp_path / "again")
    for one, other in zip(ahead, again, strict=True):
        assert [r.grad_norm for r in one] == [r.grad_norm for r in other]
    assert all(torch.equal(found[s][name], tensor) for s, named in expected.items() for name, tensor in named.items())


def test_export_is_a_model_that_transformers_loads(run: Run, tmp_path: Path) -> None:
    run.reset()
    run.step(1, random_step(1))
    folder = tmp_path / "export"
    folder.mkdir()
    run.ranks.call(LearnerRank.export, str(folder))
    expected = run.state(tmp_path / "state")["master"]
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())
    original = AutoTokenizer.from_pretrained(run.model)
    messages = [{"role": "user", "content": "2+3="}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(messages) == original.apply_chat_template(messages)
    reference = Reference(folder, LEARNER, ROLLOUT)
    assert torch.isfinite(reference.loss(random_step(4)))


def poison(rank: LearnerRank, folder: str) -> None:
    """Go on from a checkpoint whose norms and biases are not numbers."""
    [path] = Path(folder).glob(f"learner-{rank._rank:04d}-*.pt")
    content = torch.load(path, weights_only=True)
    content["sections"][-1]["master"][:] = math.nan
    torch.save(content, path)
    rank.load(folder)


def test_a_loss_that_is_not_finite_is_refused(run: Run, tmp_path: Path) -> None:
    run.reset()
    folder = tmp_path / "poisoned"
    folder.mkdir()
    run.ranks.call(LearnerRank.save, str(folder))
    run.ranks.call(poison, str(folder))
    groups = random_step(2)
    with pytest.raises(LearnerError, match=r"step 6: .* prompt 'p\d' is not finite; the parameters are unchanged"):
        run.step(6, groups)
    run.reset()
    reference = Reference(run.model, LEARNER, ROLLOUT)
    _, norm, _ = reference.step(1, groups)
    assert run.step(1, groups)[0].grad_norm == pytest.approx(norm, rel=1e-5)  # nothing of the failed step is left


def overflow(rank: LearnerRank, groups: list[ScoredGroup]) -> None:
    """A step whose losses are finite and whose gradient is not."""
    from learner.packing import plan

    rows = build_objective(OBJECTIVE).rows(groups)
    prompts = [scored.group.prompt.token_ids for scored in groups]
    batches = [
        replace(batch, weights=batch.weights * 1e38) for batch in plan(rows, prompts, rank._world, 64)[rank._rank]
    ]
    rank._engine.model.forward_backward(batches, None, 0.7, 0.7, 16)
    rank._update(9, rank._engine.model, 1.0)


def test_a_gradient_that_is_not_finite_is_refused(run: Run, tmp_path: Path) -> None:
    run.reset()
    run.step(1, random_step(1))
    before = run.state(tmp_path / "before")
    with pytest.raises(LearnerError, match="step 9: the gradient's norm is not finite"):
        run.ranks.call(overflow, random_step(2))
    after = run.state(tmp_path / "after")
    assert all(torch.equal(after[s][name], tensor) for s, named in before.items() for name, tensor in named.items())


def test_a_checkpoint_moves_between_numbers_of_ranks(run: Run, odd_model: Path, tmp_path: Path) -> None:
    run.reset()
    run.step(1, random_step(1))
    before = run.state(tmp_path / "before")
    other = 3 - run.ranks.world  # as if the other number of ranks had written it
    folder = tmp_path / "other"
    folder.mkdir()
    sizes = {name: tensor.numel() for name, tensor in before["master"].items()}
    wanted = [shards.Section(tuple(sizes), tuple(sizes.values()), {}, 0.0)]
    for rank in range(other):
        shards.write(str(folder), shards.read(str(tmp_path / "before"), rank, other, wanted, torch.device("cpu")))
    expected = [report.grad_norm for report in run.step(2, random_step(2))]
    run.ranks.call(LearnerRank.load, str(folder))
    assert [report.grad_norm for report in run.step(2, random_step(2))] == expected


BF16 = LEARNER.model_copy(update={"dtype": "bfloat16", "kl_every": 0, "max_grad_norm": 1e3})
WIRE16 = ROLLOUT.model_copy(update={"dtype": "bfloat16"})


def test_bfloat16_resumes_in_new_processes(tiny_model: Path, tmp_path: Path) -> None:
    """Tied embeddings, activation checkpointing, 16-bit wire; the second run's processes know only the checkpoint."""
    ranks = Ranks(tiny_model, 2, BF16, WIRE16)
    first = Run(tiny_model, ranks, tmp_path / "start")
    reference = Reference(tiny_model, BF16, WIRE16)
    _, norm, _ = reference.step(1, random_step(1))
    assert first.step(1, random_step(1))[0].grad_norm == pytest.approx(norm, rel=3e-2)
    saved = first.state(tmp_path / "saved")
    first.step(2, random_step(2))
    parameters = first.publish(2)
    published = read(parameters, parameters.pieces[0].path)
    expected = first.state(tmp_path / "two")
    assert all(torch.equal(published[name], tensor.bfloat16()) for name, tensor in expected["master"].items())
    assert any(not torch.equal(t, t.bfloat16().float()) for t in expected["master"].values()), "masters are float32"
    folder = tmp_path / "export"
    folder.mkdir()
    ranks.call(LearnerRank.export, str(folder))
    ranks.close()
    assert not glob.glob(f"/dev/shm/{file_prefix(ranks.secret)}*")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert all(torch.equal(p, published[name]) for name, p in loaded.named_parameters())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    again = Ranks(tiny_model, 2, BF16, WIRE16)
    second = Run(tiny_model, again, tmp_path / "ignored")
    again.call(LearnerRank.load, str(tmp_path / "saved"))
    restored = second.state(tmp_path / "restored")
    assert all(torch.equal(restored[s][n], tensor) for s, named in saved.items() for n, tensor in named.items())
    second.step(2, random_step(2))
    found = second.state(tmp_path / "two again")
    assert all(torch.equal(found[s][n], tensor) for s, named in expected.items() for n, tensor in named.items())
    parameters = second.publish(2)
    assert all(torch.equal(t, published[n]) for n, t in read(parameters, parameters.pieces[0].path).items())
    again.close()
    assert not glob.glob(f"/dev/shm/{file_prefix(again.secret)}*")
