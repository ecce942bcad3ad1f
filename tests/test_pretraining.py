"""PPO-ptx: the policy's gradient is PPO's plus the coefficient times SFT's, and every rank draws the same texts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_critic import PPO, made_targets, valued_batch
from test_gradient_invariance import MAX_TOKENS, MODEL, TEMPERATURE, largest_error
from transformers import AutoTokenizer

from actors.example_files import write_examples
from actors.model_folders import resolve_model
from actors.settings import LearnerSettings, OptimizerSettings, SamplingSettings
from cluster.rendezvous import Rendezvous, free_port
from launch.overrides import load_config
from launch.prepare import prepare
from trainers.errors import InputError
from trainers.examples import Example, encode_example
from trainers.planted import sft_rows
from trainers.ppo_targets import encode_targets

NUM, COEF, BATCH, SEED = 11, 0.7, 5, 3
TOLERANCE = 1e-5  # relative to a parameter's largest gradient element
PTX = (
    "algorithm.ppo.pretrain_coef=0.5",
    "pretraining.function=trainers.planted:sft_rows",
    "pretraining.args={num: 6, seed: 0}",
)


def texts() -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL), local_files_only=True)
    made = [encode_example(row, tokenizer, 60, where="row", truncate=True) for row in sft_rows(NUM, 0)]
    assert all(isinstance(m, Example) for m in made)
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module", params=(0, 2))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Three learners on one model and one batch: PPO, PPO-ptx, SFT; for ZeRO 0 and 2."""
    from actors.learner import DeepSpeedLearner
    from actors.sft_learner import SFTLearner

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("texts") / "pretraining.arrow"
    write_examples(path, texts())
    settings = LearnerSettings(
        zero_stage=request.param, token_budget=128, logprob_chunk=16, optimizer=OptimizerSettings(lr=1e-12)
    )
    ppo = PPO.ppo.model_copy(update={"pretrain_coef": COEF, "pretrain_batch_size": BATCH})
    ptx = PPO.model_copy(update={"ppo": ppo, "num_epochs": 2})
    common: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_steps": 10, "seed": SEED}
    place = (0, Rendezvous("127.0.0.1", free_port(), 1), resolve_model(MODEL), settings)
    sampling = SamplingSettings(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
    groups = valued_batch()
    yield SimpleNamespace(
        ppo=DeepSpeedLearner(*place, algorithm=PPO, sampling=sampling, **common),
        ptx=DeepSpeedLearner(*place, algorithm=ptx, sampling=sampling, pretraining=str(path), **common),
        sft=SFTLearner(*place, train={"train": str(path)}, held_out=None, **common),
        groups=groups, targets=[encode_targets(made_targets(groups))], path=str(path),
    )  # fmt: skip
    torch.set_num_threads(before)


def test_the_gradient_is_ppos_plus_the_coefficient_times_sfts(made: SimpleNamespace) -> None:
    policy = made.ppo.gradients(made.groups, made.targets)
    drawn = made.ptx.pretraining.drawn(0, 0)
    texts = made.sft.gradients([(0, i) for i in drawn])
    found = made.ptx.gradients(made.groups, made.targets)
    assert largest_error(found, {name: policy[name] + COEF * texts[name] for name in policy}) < TOLERANCE
    assert largest_error(found, policy) > 1e-2, "the term is seen"


def test_the_metric_is_the_mean_over_updates_of_the_cross_entropy_of_their_texts(made: SimpleNamespace) -> None:
    batches = [[(0, i) for i in made.ptx.pretraining.drawn(4, index)] for index in (0, 1)]
    expected = np.mean([made.sft.update(batch, 0)["loss"] for batch in batches])
    report = made.ptx.update(made.groups, 4, made.targets, PPO.kl_coef)
    assert report.metrics["pretrain_loss"] == pytest.approx(expected, rel=1e-5)
    assert "pretrain_loss" not in made.ppo.update(made.groups, 4, made.targets, PPO.kl_coef).metrics


def test_an_epoch_of_draws_has_every_text_once_and_the_next_one_another_order(made: SimpleNamespace) -> None:
    draws = [made.ptx.pretraining.drawn(step, index) for step in range(NUM) for index in (0, 1)]
    together = [i for drawn in draws for i in drawn]
    epochs = [together[start : start + NUM] for start in range(0, len(together), NUM)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = type(made.ptx.pretraining)(made.path, made.ptx.algorithm, SEED)
    assert again.drawn(3, 1) == draws[7], "a resumed run goes on where it was"


def test_coefficient_and_texts_go_together() -> None:
    for wrong in (PTX[:1], PTX[1:]):
        with pytest.raises(InputError, match="the two go together"):
            load_config("cpu-ppo", wrong)
    with pytest.raises(InputError, match="does nothing with name=grpo"):
        load_config("cpu-demo", PTX)


def test_texts_are_cut_where_the_learner_cannot_read_on() -> None:
    small = ("model.path=builtin:tiny-llama", "learner.token_budget=64", "critic.token_budget=64")
    prepared = prepare(load_config("cpu-ppo", (*PTX, *small)).config)
    lengths = [text.input_ids.size for text in prepared.pretraining]
    assert len(lengths) == 6 and max(lengths) == 64
    assert prepare(load_config("cpu-ppo", small).config).pretraining == ()
