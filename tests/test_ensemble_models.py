"""Tiny reward models together: as an ensemble in one worker, and as one model by the mean of their weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_model_kit import TINY, make_folder

from actors.model_folders import resolve_model
from actors.modeling import load_tokenizer
from actors.reward_ensemble import RewardEnsemble, scorer_class
from actors.reward_model import RewardModel, check_reward_model
from actors.settings import RewardModelSettings
from actors.weight_average import MANIFEST, average_models
from launch.average import average
from launch.cli import main
from trainers.errors import InputError
from trainers.experience import Prompt, Trajectory, TrajectoryGroup, VersionSpan, WeightVersion

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-5  # float32 scores of size 1
STATS = {"mean": 0.5, "std": 0.25, "num": 8, "reference": "made up"}


def moved(source: str, target: Path, seed: int, by: float = 0.01) -> str:
    """A copy of a reward model whose weights are ``by`` of their size away: what fine-tuning makes of a base."""
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(source, target)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * weight.std(correction=0).nan_to_num() * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(target)
    return str(target)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three reward models of one base with recorded statistics."""
    root = tmp_path_factory.mktemp("members")
    base = make_folder(root / "base")
    found = [moved(base, root / f"member-{seed}", seed, 0.05) for seed in range(3)]
    for i, folder in enumerate(found):
        (Path(folder) / "reward_stats.json").write_text(json.dumps(STATS | {"mean": 0.1 * i, "std": 0.5 + i}))
    return found


def settings(paths: list[str], **keys: Any) -> RewardModelSettings:
    given = {"name": "rm", "path": paths, "normalize": True, "ensemble": {"combine": "worst_case"}} | keys
    return RewardModelSettings.model_validate(given)


def groups() -> list[TrajectoryGroup]:
    tokenizer, span = load_tokenizer(resolve_model(TINY)), WeightVersion(0, 0)
    made = []
    for g in range(2):
        ids = [np.array(tokenizer.encode(text), np.int32) for text in ("zz", f"abc {g}", "", "no")]
        answers = tuple(
            Trajectory(i, 0, a, np.zeros(a.size, np.float32), "", "stop", (VersionSpan(span, a.size),))
            for i, a in enumerate(ids)
        )
        prompt = np.array(tokenizer.encode(f"prompt {g} "), np.int32)
        made.append(TrajectoryGroup(str(g), Prompt(f"p{g}", prompt, ""), answers))
    return made


def test_an_ensemble_in_one_worker_is_the_worst_of_its_normalised_members(folders: list[str]) -> None:
    policy = resolve_model(TINY)
    chosen = settings(folders, weight=2.0)
    assert scorer_class(chosen) is RewardEnsemble and scorer_class(chosen.members[0]) is RewardModel
    found = RewardEnsemble(chosen, policy, "float32", "cpu").score_groups(groups())
    alone = [RewardModel(m, policy, "float32", "cpu").score_groups(groups()) for m in chosen.members]
    assert [r.group_id for r in found] == ["0", "1"]
    for g, rewards in enumerate(found):
        scores = np.stack([alone[i][g].parts[f"rm.{i}"] for i in range(3)])
        for i in range(3):
            np.testing.assert_allclose(rewards.parts[f"rm.{i}"], scores[i], atol=TOLERANCE)
        np.testing.assert_allclose(rewards.parts["rm"], scores.min(axis=0), atol=TOLERANCE)
        np.testing.assert_allclose(rewards.parts["rm.disagreement"], scores.std(axis=0), atol=TOLERANCE)
        np.testing.assert_allclose(rewards.totals, 2.0 * scores.min(axis=0), atol=2 * TOLERANCE)
        assert rewards.valid.tolist() == [True, True, False, True]  # an empty answer has no score with any of them
        assert [i for i, _ in rewards.failures] == [2, 2, 2]
        assert rewards.parts["rm.disagreement"][0] > 0


def test_a_member_that_cannot_be_used_is_refused_by_its_own_path(folders: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(TINY))
    check_reward_model(settings(folders), tokenizer)
    bare = shutil.copytree(folders[0], tmp_path / "bare")
    (bare / "reward_stats.json").unlink()
    with pytest.raises(InputError, match="reward_stats.json is missing"):
        check_reward_model(settings([folders[0], str(bare)]), tokenizer)
    two = make_folder(tmp_path / "two", num_labels=2)
    same_scale = {"normalize": False, "ensemble": {"combine": "mean", "same_scale": True}}
    with pytest.raises(InputError, match="its head gives 2 numbers") as refused:
        check_reward_model(settings([folders[0], two], **same_scale), tokenizer)
    assert refused.value.field == "reward_models.rm.path" and refused.value.value == two


# --- weight averaging -------------------------------------------------------------------------


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(Path(folder) / "model.safetensors"))


def test_the_average_of_equal_models_is_the_model_bit_for_bit(folders: list[str], tmp_path: Path) -> None:
    copies = [str(shutil.copytree(folders[0], tmp_path / name)) for name in ("a", "b", "c")]
    apart = average_models(copies, tmp_path / "out")
    assert set(apart.values()) == {0.0}
    ours, theirs = weights(tmp_path / "out"), weights(folders[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_average_is_the_mean_whatever_the_order_and_loads_as_a_reward_model(
    folders: list[str], tmp_path: Path
) -> None:
    apart = average_models(folders, tmp_path / "out")
    average_models(folders[::-1], tmp_path / "backwards")
    members, mean, other = [weights(f) for f in folders], weights(tmp_path / "out"), weights(tmp_path / "backwards")
    for name, found in mean.items():
        torch.testing.assert_close(found, torch.stack([m[name] for m in members]).mean(dim=0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found, other[name], rtol=0, atol=0)
    first, *others = apart.values()
    assert first == 0 and all(0.03 < distance < 0.2 for distance in others)
    out = tmp_path / "out"
    assert json.loads((out / MANIFEST).read_text())["members"] == apart
    assert not (out / "reward_stats.json").exists()  # another scale than any member's
    model = RewardModel(RewardModelSettings(name="mean", path=str(out)), resolve_model(TINY), "float32", "cpu")
    assert np.isfinite(model.score_groups(groups())[0].parts["mean"][[0, 1, 3]]).all()


def test_samples_give_the_average_the_statistics_that_normalise_it(folders: list[str], tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    rows = [{"prompt": f"prompt {i}", "completion": "z" * (i % 5 + 1)} for i in range(20)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = average(folders, tmp_path / "out", str(samples), chat=False)
    found = json.loads((tmp_path / "out" / "reward_stats.json").read_text())
    assert found["num"] == 20 and found["std"] > 0 and lines[-1] == f"wrote {tmp_path / 'out'}"
    usable = RewardModelSettings(name="mean", path=str(tmp_path / "out"), normalize=True)
    check_reward_model(usable, load_tokenizer(resolve_model(TINY)))


def test_samples_that_cannot_be_scored_leave_no_half_done_average(folders: list[str], tmp_path: Path) -> None:
    samples, out = tmp_path / "samples.jsonl", tmp_path / "out"
    good = json.dumps({"prompt": "p", "completion": "z"}) + "\n"
    for bad, says in ((good + json.dumps({"prompt": "p"}), "samples.jsonl:2"), (good, "1 of its samples fit"),
                      (2 * good + json.dumps({"prompt": "p", "completion": ""}), "samples.jsonl:3")):  # fmt: skip
        samples.write_text(bad)
        with pytest.raises(InputError, match=says):
            average(folders, out, str(samples), chat=False)
        assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]
    samples.write_text(2 * good)
    average(folders, out, str(samples), chat=False)  # the repeat is not in its own way

    def fails(scratch: Path) -> None:
        assert (scratch / "config.json").is_file() and not (tmp_path / "other").exists()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        average_models(folders, tmp_path / "other", fails)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "samples.jsonl"]


def edited(folder: str, target: Path, **changes: Any) -> str:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def another_vocabulary(folder: str, target: Path) -> str:
    shutil.copytree(folder, target)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(target)
    return str(target)


def another_base(folder: str, target: Path) -> str:
    """The same architecture and tokenizer with other weights: nothing but the weights tells."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    shutil.copytree(folder, target)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(target)
    return str(target)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f, t: edited(f, t, architectures=["MistralForSequenceClassification"]), "its architecture is"),
        (lambda f, t: edited(f, t, rope_theta=5.0, num_attention_heads=4), "of another architecture"),
        (another_vocabulary, "its tokenizer is not the first member's"),
        (another_base, "not fine-tuned from one base"),
        (lambda f, t: str(t), "cannot be read|has no model.safetensors"),
    ],
)
def test_models_that_do_not_belong_together_are_refused_in_one_line_and_nothing_is_left(
    make: Any, reason: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "mean"
    other = make(folders[1], tmp_path / "other")
    with pytest.raises(InputError, match=reason) as refused:
        average_models([folders[0], other], out)
    assert "\n" not in str(refused.value)
    assert not out.exists() and not (out.parent.exists() and list(out.parent.iterdir()))
    capsys.readouterr()
    assert main(["average", str(out), folders[0], other]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_one_member_or_a_folder_that_is_there_is_refused(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two models or more"):
        average_models(folders[:1], tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        average_models(folders, tmp_path)
    with pytest.raises(InputError, match="no reward model"):
        average([resolve_model(TINY), folders[0]], tmp_path / "out", str(tmp_path / "none.jsonl"), chat=False)


# --- end to end -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_against_two_reward_models_records_each_of_them_and_masks_where_they_part(
    folders: list[str], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    from launch.journal import read_rows

    arguments = [
        "train", "cpu-ppo", f"run.directory={tmp_path}", "run.name=ensemble", "model.path=builtin:tiny-llama",
        "model.max_length=128", "cluster.backend=in_process", "run.num_steps=2", "run.groups_per_step=4",
        "run.samples_per_prompt=2", "algorithm.num_minibatches=1", "evaluation.every=1", "prompts.eval.size=4",
        "generator.sampling.max_tokens=8", "checkpoint.export=false", "critic.path=null",
        f'reward_models=[{{"name": "rm", "path": {json.dumps(folders[:2])}, "normalize": true, '
        '"ensemble": {"combine": "mean_minus_variance", "uncertainty_coef": 0.5, "mask_quantile": 0.5}}]',
    ]  # fmt: skip
    # A process of its own: vLLM wants as many threads as it began with, and these tests have set another number.
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "ensemble"
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row.get("disagreement/mean") is not None]
    assert len(rows) == 2
    for row in rows:
        assert row["disagreement/mean"] > 0 and 1 <= row["disagreement/num_samples_masked"] <= 4
    table = pq.read_table(sorted((folder / "trajectories").glob("*.parquet"))[-1]).to_pydict()
    members = np.array([table["rewards/rm.0"], table["rewards/rm.1"]], float)
    scored = np.isfinite(members).all(axis=0)
    expected = members.mean(axis=0) - 0.5 * members.var(axis=0)
    np.testing.assert_allclose(np.array(table["rewards/rm"], float)[scored], expected[scored], atol=1e-9)
    np.testing.assert_allclose(
        np.array(table["rewards/rm.disagreement"], float)[scored], members.std(axis=0)[scored], atol=1e-9
    )
    masked = [a is None for a, ok in zip(table["advantage"], scored, strict=True) if ok]
    assert sum(masked) == rows[-1]["disagreement/num_samples_masked"]
