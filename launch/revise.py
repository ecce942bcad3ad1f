"""``burnish revise``: answers are criticised and revised by a constitution; what comes of it is data to train on.

    prompts -> policy (or a column) -> critique -> revision -> ... -> judge -> revised.jsonl -> sft, preferences

Everything that can be refused is refused before anything starts.  A record is written as soon as an answer is done,
so a run that was killed goes on where it was; the rows are made from the records at the end.
May import: everything.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from actors.endpoint import EndpointRespondent
from actors.generator_fleet import GeneratorFleet
from actors.respondents import PAYLOAD_DEADLINE_S
from cluster.transport import fetch
from launch.engine_fleet import EngineRole, start_engines
from launch.eval_report import plain
from launch.judging import make_respondent, pair_judge
from launch.label import Progress, summary_table, versions
from launch.label_records import RecordFile, write_preferences
from launch.lanes import in_lanes
from launch.prompts import PromptStream
from launch.redaction import redact
from launch.revise_config import ReviseConfig
from launch.revise_prepare import PreparedRevise, given_answer, prepare_revise, revise_folder
from launch.revise_records import Record, preference_rows, record_of, rounds_of, schema, sft_rows, summary_of
from launch.run_folder import entered, is_taken
from trainers.asking import Respondent
from trainers.constitution import Principle, Revised, Unrevised, draw, revise
from trainers.errors import InputError
from trainers.experience import Prompt, decode_group
from trainers.judge import PairJudge, conversation_text
from trainers.labellers import label_seed
from trainers.protocols import GroupRequest
from trainers.sampling_seeds import sample_seed
from trainers.verdicts import IDENTICAL, Judgement

MANIFEST, RECORDS, SUMMARY = "revise.json", "revised.jsonl", "summary.json"
OVERSUPPLY = 2  # answers in flight for each place of an engine or endpoint


@dataclass(frozen=True, slots=True)
class _Team:
    """Who answers, revises and judges."""

    generator: GeneratorFleet | None
    writer: Respondent
    judge: PairJudge | None


def revise_answers(config: ReviseConfig, console: Console, resume: bool = False) -> Path:
    """Revise until every prompt is done.  Returns the run's folder.

    Raises:
        InputError: something in the configuration, the model, the data or an endpoint cannot be used.
        EndpointError: an endpoint cannot be asked any more; ``--resume`` goes on from there.
    """
    folder = revise_folder(config)
    with ExitStack() as stack:
        check, prepare = partial(_check_folder, config, resume), partial(prepare_revise, config)
        prepared = stack.enter_context(entered(folder, resume, check, prepare))
        if resume:
            prepared.identity.check(folder / MANIFEST)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        provenance = {
            **prepared.identity.to_json(), "config": redact(config.model_dump(mode="json")), "versions": versions(),
            "principles": [principle.model_dump() for principle in prepared.principles],
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(provenance, indent=2) + "\n")
        records = RecordFile(folder / RECORDS)
        stack.callback(records.close)
        _revise_left(config, prepared, records, provenance, console)
    return folder


def _revise_left(
    config: ReviseConfig, prepared: PreparedRevise, records: RecordFile, provenance: Mapping[str, Any],
    console: Console,
) -> None:  # fmt: skip
    """Revise what is not revised yet; write and tell what came of it all."""
    folder, stream = records.path.parent, PromptStream(prepared.prompts, config.run.seed, config.prompts.shuffle)
    total = config.run.num_prompts or len(stream)
    begun = {r["position"]: r for r in records if _wants_more_rounds(r, config.revise.num_rounds)}
    left = [position for position in range(total) if position not in records.positions or position in begun]
    console.print(f"{config.run.name}: {total} answers, {total - len(left)} of them revised already")
    usage: dict[str, Any] = {}
    if left:
        usage = asyncio.run(_revise_all(config, prepared, stream, left, begun, records, console))
    summary = _write(config, prepared, [r for r in records if r["position"] < total], folder, provenance)
    (folder / SUMMARY).write_text(json.dumps(plain({**summary, "usage": usage}), indent=2) + "\n")
    shown = {name: value for name, value in summary.items() if isinstance(value, (int, dict)) and name != "judge"}
    console.print(summary_table(shown, "revisions"))
    if "win_rate" in summary:
        console.print(f"revisions win over originals: {summary['win_rate']} (ties as half, both orders)")
    console.print(f"rows: {folder}", soft_wrap=True)


async def _revise_all(
    config: ReviseConfig, prepared: PreparedRevise, stream: PromptStream, left: Sequence[int],
    begun: Mapping[int, Record], records: RecordFile, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """What was asked of each endpoint.  ``begun``: by position, the records of fewer rounds than are asked for."""
    folder = records.path.parent
    paths = {"generator": (prepared.model_path, prepared.max_length)}
    for role, found in (("writer", prepared.writer), ("judge", prepared.judge)):
        if found is not None and role in config.engines:
            paths[role] = found.path, found.max_length
    roles = {role: EngineRole(*paths[role], settings) for role, settings in config.engines.items()}
    fleet = await start_engines(roles, config.cluster, config.model.dtype, config.run.seed)
    respondents: dict[str, Respondent] = {}
    progress = Progress(len(left), console, config.telemetry.progress, "revised")
    try:
        asked, policy = config.revise, fleet.generators.get("generator")
        engines = fleet.generators.get("writer", policy)
        writer = make_respondent(asked.writer, prepared.writer, "revise.writer", folder, engines)
        respondents["writer"], judge = writer, None
        if asked.judge is not None and prepared.judge is not None:
            engines = fleet.generators.get("judge", policy)
            respondents["judge"] = make_respondent(asked.judge, prepared.judge, "revise.judge", folder, engines)
            judge = pair_judge(asked.judge, respondents["judge"])
        team = _Team(policy, writer, judge)

        async def one(position: int) -> None:
            record = await _revise_one(config, prepared.principles, team, stream.at(position), position,
                                       stream.occurrence(position), begun.get(position))  # fmt: skip
            records.append(record)
            progress.done(0)

        await in_lanes(min(len(left), _num_lanes(config)), left, one)
    finally:
        progress.close()
        for respondent in respondents.values():
            await respondent.close()
        await fleet.close()
    return {name: asdict(r.usage) for name, r in respondents.items() if isinstance(r, EndpointRespondent)}


def _num_lanes(config: ReviseConfig) -> int:
    """Answers at once: enough to keep the widest of those who are asked busy."""
    asked = [config.revise.writer, *([] if config.revise.judge is None else [config.revise.judge])]
    places = [model.endpoint.num_at_once for model in asked if model.endpoint is not None]
    places += [engine.max_num_seqs * engine.num_workers for engine in config.engines.values()]
    return OVERSUPPLY * max(places)


async def _revise_one(
    config: ReviseConfig, principles: Sequence[Principle], team: _Team, prompt: Prompt, position: int, turn: int,
    begun: Record | None,
) -> dict[str, Any]:  # fmt: skip
    """The record of one answer; ``begun``: its record of fewer rounds, whose rounds come first."""
    asked, seed = config.revise, label_seed(config.run.seed, prompt.prompt_id, turn, "principles")
    if begun is not None:
        answer, sampled, done = begun["original"], begun["sampled"], rounds_of(begun)
    else:
        (answer, sampled), done = await _answer(config, team.generator, prompt, position, turn), ()
    drawn, shown = draw(principles, asked.num_rounds, seed), conversation_text(prompt)
    if not answer.strip() or sampled.get("finish_reason") == "abort":
        why: Unrevised = "aborted" if sampled.get("finish_reason") == "abort" else "empty"
        revised = Revised(answer, (), ("answer", why))
    else:
        revised = await revise(team.writer, asked, drawn, shown, answer, seed % 2**31, asked.writer.system, done)
    judgement: Judgement | None = None
    if team.judge is not None and revised.final is not None:
        judgement = IDENTICAL
        if revised.final != answer:
            principle = " ".join(p.judge for p in drawn)
            judgement = await team.judge.judge(prompt, revised.final, answer, principle)
    return record_of(position, turn, prompt, sampled, revised, judgement)


async def _answer(
    config: ReviseConfig, generator: GeneratorFleet | None, prompt: Prompt, position: int, turn: int
) -> tuple[str, dict[str, Any]]:
    """(the original answer, how it came to be)."""
    if config.revise.answer_column is not None:
        return given_answer(prompt, config.revise.answer_column), {"column": config.revise.answer_column}
    assert generator is not None
    sampling, seed = config.sampling, sample_seed(config.run.seed, prompt.prompt_id, 0, turn)
    generated = await generator.generate(
        GroupRequest(
            f"answer-{position}", prompt, 1, (seed,), sampling.temperature or 1.0, sampling.max_tokens,
            greedy=sampling.temperature == 0,
        )
    )  # fmt: skip
    buffer = await asyncio.to_thread(fetch, generated.payload, PAYLOAD_DEADLINE_S)
    said = decode_group(buffer).trajectories[0]
    return said.text, {"finish_reason": said.finish_reason, "seed": seed, "temperature": sampling.temperature}


def _write(
    config: ReviseConfig, prepared: PreparedRevise, records: list[dict[str, Any]], folder: Path,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Both files of rows; what came of the run."""
    conversational, is_jsonl = not isinstance(prepared.prompts[0].source, str), config.output.format == "jsonl"
    dropped: Counter[str] = Counter()
    rows = {
        "sft": (("prompt", "completion"), list(sft_rows(records, config))),
        "preferences": (("prompt", "chosen", "rejected"), list(preference_rows(records, dropped))),
    }
    for name, (columns, found) in rows.items():
        shape = schema(conversational, columns, provenance)
        write_preferences(folder / f"{name}.{config.output.format}", iter(found), shape, is_jsonl)
    return summary_of(records, len(rows["sft"][1]), len(rows["preferences"][1]), dropped)


def _wants_more_rounds(record: Record, num_rounds: int) -> bool:
    """Whether it ended well, in a run of fewer rounds."""
    return record["failure"] is None and len(record["revisions"]) < num_rounds


def _check_folder(config: ReviseConfig, resume: bool) -> None:
    """The run's folder has to be absent (or empty) for a new run, one of revisions for a resumed one."""
    folder, name = revise_folder(config), config.run.name
    if folder.exists() and not folder.is_dir():
        raise InputError("run.name", name, f"{folder} is a file", "choose another run.name")
    if resume and not (folder / MANIFEST).exists():
        raise InputError("run.name", name, f"there is no run of revisions to resume in {folder}",
                         "start it without --resume")  # fmt: skip
    if resume:
        before = json.loads((folder / MANIFEST).read_text())["config"]["revise"]["num_rounds"]
        if config.revise.num_rounds < before:
            raise InputError("revise.num_rounds", config.revise.num_rounds, f"the run has {before}, and none is undone",
                             f"give {before} or more, or start a new run under another run.name")  # fmt: skip
    if not resume and is_taken(folder):
        raise InputError("run.name", name, f"the run folder {folder} exists already",
                         "add --resume to continue it, or choose another run.name")  # fmt: skip
