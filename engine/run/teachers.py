"""Teachers of a stage's objectives: found, compared with the student, and loaded beside its chain.

A teacher is a stage of a finished run or a folder that ``omnivl export`` wrote. Objectives that name the same one share
it. It is no part of the chain: see ``omnivl.objectives.teacher``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.disk.run_folder import RunFolder
from engine.disk.trained import find_trained, load_given, load_weights
from engine.plan.plan import Plan, StagePlan
from omnivl.architectures import Architecture
from omnivl.architectures.build import build_chain
from omnivl.architectures.foreign import read_json
from omnivl.chain.chain import Chain
from omnivl.chain.objective import Objective
from omnivl.data.batch import visual_of
from omnivl.data.config import entry_keys
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.errors import UserError
from omnivl.objectives.quantize import Quantize
from omnivl.objectives.teacher import Pupil, TaughtHead, Teacher, TeacherFacts, matching_of
from omnivl.pretrained.load import read_exported

_PROBE = "An emoji: a Red-Hat, 12 CATS (naïve) & [SEP] 猫!"


@dataclass(frozen=True)
class Found:
    """A teacher on disk.

    Attributes:
        where: Its folder, and the stage if it is a run's.
        model: Its architecture.
        objectives: Whose heads it has.
        tokenizer: Of its texts.
        weights: Its weights file or checkpoint; None where the folder is an exported one, or nobody is to load it.
        folder: The exported folder.
    """

    where: str
    model: Architecture
    objectives: Sequence[Objective]
    tokenizer: Tokenizer
    weights: Path | None
    folder: Path | None

    @property
    def facts(self) -> TeacherFacts:
        """What a student has to fit."""
        streams, widths = self.model.offers, self.model.heads.widths
        codes = {one.key: one.quantizer.num_codes for one in self.objectives if isinstance(one, Quantize)}
        matching = matching_of(self.objectives)
        return TeacherFacts(self.where, self.model.inputs, streams, self.model.shows, widths, matching, codes)

    def load(self, device: torch.device, dtype: torch.dtype) -> Teacher:
        """The teacher with its weights.

        Args:
            device: Where it runs.
            dtype: Of activations.

        Raises:
            UserError: The weights cannot be read or do not fit.
        """
        chain = build_chain(self.model, self.objectives, self.tokenizer.special, compute_dtype=dtype)
        if self.weights is not None:
            load_weights(chain, self.weights)
            return Teacher(chain.to(device))
        weights = None if self.folder is None else read_exported(self.folder, "all")
        assert weights is not None, "a teacher to load was found with weights"
        load_given(chain, weights, str(self.folder))
        return Teacher(chain.to(device))


def find_teacher(key: str, pupil: Pupil, plan: Plan, index: int, run: RunFolder | None = None) -> Found:
    """Finds the teacher of an objective, or of a part of it; reads no weights.

    Args:
        key: Of the objective, of a stage of the plan.
        pupil: Names the teacher.
        plan: The student's.
        index: Which stage.
        run: The plan's run, where weights of its own stages are to be loaded.

    Raises:
        UserError: There is no such run, stage or folder.
    """
    if not pupil.teacher:
        return _earlier(key, pupil, plan, index, run)
    folder = Path(pupil.teacher)
    if (folder / "config.json").is_file():
        if read_json(folder / "config.json").get("model_type") != "omnivl":
            raise UserError(
                f"objective {key}: got teacher {folder}, a folder of another library; allowed is a finished "
                "run or a folder that omnivl export wrote; take its weights into a run with the plan's weights section"
            )
        if pupil.teacher_stage is not None:
            raise UserError(
                f"objective {key}: got teacher_stage {pupil.teacher_stage!r} of the exported folder "
                f"{folder}, which has no stages; allowed is null; leave it out"
            )
        from omnivl.hub import OmniVLConfig  # here, because it takes seconds to import

        config = OmniVLConfig.from_pretrained(folder)
        tokenizer = load_tokenizer(str(folder))
        return Found(str(folder), config.sizes, config.objectives, tokenizer, None, folder)
    trained = find_trained(folder, pupil.teacher_stage)
    model, where = trained.stage.model.portable(), f"{folder} (stage {trained.stage.name!r})"
    tokenizer = load_tokenizer(trained.plan.tokenizer)
    return Found(where, model, trained.stage.objectives, tokenizer, trained.weights, None)


def _earlier(key: str, pupil: Pupil, plan: Plan, index: int, run: RunFolder | None) -> Found:
    """An earlier stage of the same run."""
    name, earlier = pupil.teacher_stage, [stage.name for stage in plan.stages[:index]]
    if name not in earlier:
        change = "set 'teacher' to the folder of a finished run" if not earlier else "name one of them"
        raise UserError(
            f"objective {key}: got teacher_stage {name!r}; allowed are stages before this one "
            f"({', '.join(map(repr, earlier)) or 'there are none'}); {change}"
        )
    stage = plan.stage(name)
    weights = None if run is None else run.stage(earlier.index(name), name).weights
    tokenizer = load_tokenizer(plan.tokenizer)
    return Found(f"stage {name!r}", stage.model.portable(), stage.objectives, tokenizer, weights, None)


def check_teacher(found: Found, objective: Objective, pupil: Pupil, stage: StagePlan, tokenizer: Tokenizer) -> None:
    """Refuses a teacher that cannot read the student's batches or lacks what is read of it.

    Args:
        found: The teacher.
        objective: Whose teacher it is, or a part's of it.
        pupil: Names it.
        stage: The student's.
        tokenizer: The student's.

    Raises:
        UserError: Names what does not fit.
    """
    keyed = zip(entry_keys(stage.data), stage.data, strict=True)
    kinds = [entry.kind for key, entry in keyed if objective.acts_on(key) and objective.demands(entry.kind, 2)]
    shown = list(dict.fromkeys(map(visual_of, kinds)))
    pupil.check_teacher(objective.key, found.facts, stage.model.inputs, shown)
    if pupil.reads_texts and not same_words(found.tokenizer, tokenizer):
        theirs, ours = (one.special.vocab_size for one in (found.tokenizer, tokenizer))
        raise UserError(
            f"objective {objective.key}: got teacher {found.where} with another tokenizer ({theirs} words) than the "
            f"student's ({ours} words); allowed is the same, as both read the same ids; name the teacher's in the "
            "plan's 'tokenizer', or take another teacher"
        )


def same_words(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give a text the same ids: by special tokens, vocabulary, and a text of all sorts."""
    if one is other:
        return True
    if one.special != other.special or (one.encode([_PROBE], 64) != other.encode([_PROBE], 64)).any():
        return False
    words: list[dict[str, int]] = [each.as_transformers(64).get_vocab() for each in (one, other)]
    return words[0] == words[1]


def give_teachers(
    chain: Chain,
    plan: Plan,
    index: int,
    run: RunFolder,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
) -> list[str]:
    """Loads the teachers of a stage and gives them to the heads. Called where losses are computed.

    To be called after the chain's host was made, which therefore knows nothing of them; numbers of torch's generator
    are drawn.

    Args:
        chain: The student's.
        plan: Its plan.
        index: Which stage.
        run: The folder of its run.
        tokenizer: Of the plan.
        device: Where it runs.
        dtype: Of activations.

    Returns:
        A line on each teacher.

    Raises:
        UserError: A teacher is not there or does not fit.
    """
    loaded: dict[tuple[str | None, str | None], Teacher] = {}
    stage, lines = plan.stages[index], []
    for objective, pupil in ((one, pupil) for one in stage.objectives for pupil in one.pupils):
        named = pupil.teacher, pupil.teacher_stage
        found = find_teacher(objective.key, pupil, plan, index, run)
        check_teacher(found, objective, pupil, stage, tokenizer)
        if named not in loaded:
            loaded[named] = found.load(device, dtype)
            count = sum(one.numel() for one in loaded[named].chain.parameters())
            lines.append(f"stage {stage.name}: taught by {found.where}, {count / 1e6:.2f} M parameters, frozen")
        _taught_of(chain, objective.key).teacher = loaded[named]
    return lines


def _taught_of(chain: Chain, key: str) -> TaughtHead:
    """The head of an objective, or the part of it, that takes a teacher."""
    head = chain.program[-1].get_submodule(f"heads.{key}")
    (taught,) = (one for one in head.modules() if isinstance(one, TaughtHead))
    return taught
