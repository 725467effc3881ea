"""Rules about one stage: objectives against data kinds, the model's sizes, and what the host can do."""

from collections.abc import Iterator, Sequence

from engine.plan.chain_rules import CHAIN_RULES
from engine.plan.plan import StagePlan
from engine.plan.sample_rules import SAMPLE_RULES, StageRule
from engine.plan.yaml import Path, Problem
from engine.step.muon import MuonConfig
from omnivl.architectures.base import missing_streams, streams_needed
from omnivl.chain.demands import Demands
from omnivl.chain.objective import Objective
from omnivl.data.batch import DATA_KINDS, is_label, visual_of
from omnivl.data.config import entry_keys
from omnivl.data.sources.generated import GENERATED
from omnivl.data.templates import unknown_places
from omnivl.errors import did_you_mean
from omnivl.parts.decoder import looking_ahead


def muon_is_asked_for(stage: StagePlan) -> Iterator[Problem]:
    """Options of Muon stand beside ``kind: muon`` only: nothing would read them."""
    if stage.optimizer.kind != "muon" and stage.optimizer.muon != MuonConfig():
        got = f"options, with kind {stage.optimizer.kind!r}"
        yield Problem(
            ("optimizer", "muon"), got, "options with kind 'muon'", "set optimizer.kind: muon, or remove them"
        )


def there_is_data(stage: StagePlan) -> Iterator[Problem]:
    """Some entry of the mixture has a share."""
    if not stage.data:
        yield Problem(("data",), "no entry", "one entry or more", "add one, e.g. {source: emoji, kind: image_text}")
    elif sum(entry.weight for entry in stage.data) <= 0:
        yield Problem(("data",), "weights that sum to 0", "a sum above 0", "give an entry a weight above 0")


def entries_differ(stage: StagePlan) -> Iterator[Problem]:
    """Entries are told apart by name in logs and random keys."""
    keys = [entry.key for entry in stage.data]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            got = f"{key!r}, which data.{keys.index(key)} is called as well"
            yield Problem(("data", index, "name"), got, "a name for each entry", "give one of the two another 'name'")


def prompts_have_room_for_the_label(stage: StagePlan) -> Iterator[Problem]:
    """Every prompt of a label entry holds ``{label}``."""
    for index, entry in enumerate(stage.data):
        if is_label(entry.kind):
            yield from label_prompts(entry.prompts, ("data", index, "prompts"), ("label",))


def label_prompts(prompts: Sequence[str], path: Path, names: Sequence[str]) -> Iterator[Problem]:
    """There is a prompt, every prompt holds ``{label}``, and its braces hold nothing but known names.

    Args:
        prompts: The prompts.
        path: Where they stand.
        names: What their braces may hold.
    """
    if not (prompts and all("{label}" in prompt for prompt in prompts)):
        got = next((repr(prompt) for prompt in prompts if "{label}" not in prompt), "no prompt")
        yield Problem(path, got, "texts with '{label}' in them", "put {label} where the class goes")
    for prompt in prompts:
        if unknown := unknown_places(prompt, names):
            known = " and ".join(f"{{{name}}}" for name in names)
            yield Problem(path, f"{prompt!r}, which has {unknown[0]!r} in it", f"no braces but {known}", "leave it out")


def ranges_of_views_rise(stage: StagePlan) -> Iterator[Problem]:
    """A range of the augmentation runs from its smaller end to its larger one, and no crop exceeds the picture."""
    for index, entry in enumerate(stage.data):
        for name, most in (("crop_scale", 1.0), ("crop_ratio", None), ("zoom", None), ("blur_sigma", None)):
            low, high = getattr(entry.augment, name)
            if not 0 < low <= high or (most is not None and high > most):
                allowed = "two numbers above 0" + ("" if most is None else f", at most {most:g}") + ", smaller first"
                yield Problem(("data", index, "augment", name), f"[{low:g}, {high:g}]", allowed, "change the numbers")


def generated_sources_make_the_kind(stage: StagePlan) -> Iterator[Problem]:
    """Sources that draw their samples make some kinds only."""
    for index, entry in enumerate(stage.data):
        made = GENERATED.get(entry.source)
        if made is not None and entry.kind not in made:
            allowed, got = ", ".join(map(repr, made)), f"{entry.kind!r} of source {entry.source!r}"
            yield Problem(("data", index, "kind"), got, allowed, "choose one of these" if made[1:] else "change it")


def there_are_objectives(stage: StagePlan) -> Iterator[Problem]:
    """Some objective has a weight, and no name occurs twice."""
    if not stage.objectives:
        yield Problem(("objectives",), "no objective", "one objective or more", "add one, e.g. univlc")
    elif sum(objective.weight for objective in stage.objectives) <= 0:
        change = "give an objective a weight above 0"
        yield Problem(("objectives",), "weights that sum to 0", "a sum above 0", change)
    names = [objective.key for objective in stage.objectives]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(
                ("objectives", index, "kind"), f"a second {name!r}", "each objective once", "remove one of the two"
            )


def kinds_are_taken(stage: StagePlan) -> Iterator[Problem]:
    """The architecture takes what the samples of each entry show."""
    taken = [kind for kind in DATA_KINDS if visual_of(kind) in stage.model.shows]
    for index, entry in enumerate(stage.data):
        if entry.kind not in taken:
            allowed = f"kinds that architecture {stage.model.kind!r} takes: {', '.join(taken)}"
            yield Problem(("data", index, "kind"), repr(entry.kind), allowed, "choose one, or change model.kind")


def objectives_name_entries(stage: StagePlan) -> Iterator[Problem]:
    """``on`` names data entries of the stage."""
    keys = entry_keys(stage.data)
    for index, objective in enumerate(stage.objectives):
        for place, name in enumerate(objective.on):
            if name not in keys:
                change = did_you_mean(name, keys, "name one of them")
                yield Problem(("objectives", index, "on", place), repr(name), ", ".join(map(repr, keys)), change)


def objectives_have_data(stage: StagePlan) -> Iterator[Problem]:
    """Each objective acts on some entry of the stage's data, or others read its head."""
    read = {key for objective in stage.objectives for key in objective.borrows}
    for index, objective in enumerate(stage.objectives):
        if stage.data and objective.key not in read and not _asked(stage, objective):
            kinds = sorted({entry.kind for entry in stage.data})
            acts = ", ".join(objective.demands_of_kinds) or "nothing"
            got = f"{objective.key!r}, which acts on none of the stage's kinds ({', '.join(kinds)})"
            allowed = f"objectives that act on them; {objective.key!r} acts on {acts}"
            yield Problem(
                ("objectives", index, "kind"), got, allowed, "add data of such a kind or remove the objective"
            )


def data_has_objectives(stage: StagePlan) -> Iterator[Problem]:
    """Each entry of the mixture trains something."""
    names = ", ".join(objective.key for objective in stage.objectives)
    acted_on = {key for objective in stage.objectives for key in _asked(stage, objective)}
    for index, (key, entry) in enumerate(zip(entry_keys(stage.data), stage.data, strict=True)):
        if stage.objectives and key not in acted_on:
            got = f"{entry.kind!r}, which none of the stage's objectives ({names}) acts on"
            yield Problem(
                ("data", index, "kind"), got, "kinds that an objective acts on", "add an objective or remove the entry"
            )


def draws_are_trained(stage: StagePlan) -> Iterator[Problem]:
    """Embeddings by which an objective draws samples are trained by another objective."""
    demands = [list(_asked(stage, objective).values()) for objective in stage.objectives]
    trained = frozenset[str]().union(*(found.trained for several in demands for found in several))
    for index, objective in enumerate(stage.objectives):
        untrained = sorted(frozenset[str]().union(*(found.draws_from for found in demands[index])) - trained)
        if untrained:
            got = f"{objective.key!r}, which draws samples by {', '.join(untrained)}, which no objective trains"
            allowed = f"{objective.key!r} beside an objective that trains them"
            yield Problem(("objectives", index, "kind"), got, allowed, "add one, as 'univlc' is for embeddings")


def momentum_is_built(stage: StagePlan) -> Iterator[Problem]:
    """Objectives that read momentum twins have a model with momentum twins."""
    if stage.model.momentum is not None:
        return
    for index, objective in enumerate(stage.objectives):
        if any(demand.twins for demand in _asked(stage, objective).values()):
            got = f"{objective.key!r} with options that need momentum twins, where model.momentum is null"
            change = "set model.momentum to {decay: 0.995}, or the objective's options so that it needs none"
            yield Problem(("objectives", index), got, "momentum twins", change)


def _asked(stage: StagePlan, objective: Objective) -> dict[str, Demands]:
    """Demands of an objective for the entries that it acts on, by their keys."""
    micro = max(1, stage.batch.micro_batch_size_per_gpu)
    entries = zip(entry_keys(stage.data), stage.data, strict=True)
    asked = {key: objective.demands(entry.kind, micro) for key, entry in entries if objective.acts_on(key)}
    return {key: demands for key, demands in asked.items() if demands is not None}


def objectives_fit(stage: StagePlan) -> Iterator[Problem]:
    """Each objective fits the sizes of samples and the micro-batch, and the other objectives."""
    by_key = {objective.key: objective for objective in stage.objectives}
    for index, objective in enumerate(stage.objectives):
        misfits = objective.misfits(stage.model.inputs, stage.batch.micro_batch_size_per_gpu)
        for misfit in (*misfits, *objective.misfits_beside(by_key)):
            yield Problem(("objectives", index, *misfit.path), misfit.got, misfit.allowed, misfit.change)


def objectives_have_streams(stage: StagePlan) -> Iterator[Problem]:
    """The architecture has the streams that an objective reads."""
    for index, objective in enumerate(stage.objectives):
        for stream in missing_streams(stage.model, objective)[:1]:
            has = ", ".join(stage.model.offers)
            got = f"{objective.key!r}, which asks for the stream {stream!r}"
            allowed = f"objectives on the streams of architecture {stage.model.kind!r}: {has}"
            yield Problem(("objectives", index, "kind"), got, allowed, "take it out or change model.kind")


def steps_read_one_number_of_regions(stage: StagePlan) -> Iterator[Problem]:
    """Objectives that act on one data entry read as many regions of a picture, as they share them."""
    read: dict[str, int] = {}
    for index, objective in enumerate(stage.objectives):
        for key, demands in _asked(stage, objective).items():
            if demands.regions and demands.regions != read.setdefault(key, demands.regions):
                allowed = f"{read[key]}, as other objectives on data entry {key!r} have"
                yield Problem(("objectives", index, "regions"), str(demands.regions), allowed, "make them equal")
                break


def captions_do_not_look_ahead(stage: StagePlan) -> Iterator[Problem]:
    """Captioning needs a router that does not look at later tokens."""
    writing = [objective.key for objective in stage.objectives if "generation" in streams_needed(objective)]
    kind = next((one for stack in stage.model.written_by() if (one := looking_ahead(stack)) is not None), None)
    if writing and kind is not None:
        got = f"{kind!r} with {writing[0]!r}, whose decoder may not see the words to come"
        change = f"change it, or take {writing[0]!r} out"
        allowed = "a router that looks at earlier tokens only, as 'token_choice' without a capacity does"
        yield Problem(("model", "ffn", "router", "kind"), got, allowed, change)


def sizes_fit(stage: StagePlan) -> Iterator[Problem]:
    """Heads divide the width, patches the picture, tubelets the clip."""
    model = stage.model
    for misfit in model.misfits():
        yield Problem(("model", *misfit.path), misfit.got, misfit.allowed, misfit.change)


def weights_have_one_origin(stage: StagePlan) -> Iterator[Problem]:
    """Weights come from an earlier stage or from elsewhere, but for those of a language model, which may join later."""
    if stage.init_from is not None and stage.weights.folders.keys() - {"language"}:
        got = f"weights of other origin beside init_from {stage.init_from!r}"
        yield Problem(("weights",), got, "one of the two", "move 'weights' to the first stage")


def megablocks_is_bf16(stage: StagePlan) -> Iterator[Problem]:
    """The kernels of megablocks multiply in bf16 only."""
    wants = any(ffn.implementation == "megablocks" for ffn in stage.model.sparse.values())
    if wants and stage.parallel.precision == "fp32":
        got = f"'megablocks' with parallel.precision {stage.parallel.precision!r}"
        change = "set it to 'auto', or parallel.precision to 'bf16'"
        yield Problem(("model", "ffn", "implementation"), got, "'auto', 'loop', 'grouped', 'batched'", change)


def offload_has_a_shard(stage: StagePlan) -> Iterator[Problem]:
    """Only sharded states can be offloaded: optimizer states from ZeRO 1 on, parameters with ZeRO 3."""
    parallel = stage.parallel
    least = {"none": 0, "optimizer": 1, "parameters": 3}[parallel.offload]
    if parallel.offload != "none" and (parallel.host != "zero" or parallel.zero_stage < least):
        where = f"zero_stage {parallel.zero_stage}" if parallel.host == "zero" else f"host {parallel.host!r}"
        optimizer = parallel.host == "zero" and parallel.zero_stage > 0
        stages = "1, 2 or 3" if least == 1 else "3"
        allowed, change = ("'none', 'optimizer'", "one of these") if optimizer else ("'none'", "'none'")
        change = f"change it to {change}, or use host 'zero' with zero_stage {stages}"
        yield Problem(("parallel", "offload"), f"{parallel.offload!r} with {where}", allowed, change)


def nvme_has_a_folder(stage: StagePlan) -> Iterator[Problem]:
    """Offloading to files needs a folder and something to offload."""
    parallel = stage.parallel
    if parallel.offload_device == "nvme" and parallel.offload == "none":
        change = "change it to 'cpu', or set parallel.offload to 'optimizer' or 'parameters'"
        yield Problem(("parallel", "offload_device"), "'nvme' where parallel.offload is 'none'", "'cpu'", change)
    elif parallel.offload_device == "nvme" and not parallel.nvme_folder:
        allowed = "a folder on a disk of each machine"
        yield Problem(("parallel", "nvme_folder"), "null with offload_device 'nvme'", allowed, "name one")


def experts_can_be_cut(stage: StagePlan) -> Iterator[Problem]:
    """Expert parallelism cuts banks of sparse experts into equal parts, under DeepSpeed."""
    size, host, sparse = stage.parallel.expert_parallel_size, stage.parallel.host, stage.model.sparse
    path = ("parallel", "expert_parallel_size")
    if size == "auto" or size <= 1:
        return
    if host == "plain":
        yield Problem(path, f"{size} with host {host!r}", "1", "change it to 1, or use host 'zero' or 'pipeline'")
    if not sparse:
        change = "change it to 1, or use model.ffn of kind 'limoe' or 'mome_limoe'"
        yield Problem(
            path, f"{size} with {stage.model.kinds_of_filling} feed-forward layers, which trade no tokens", "1", change
        )
    for number in dict.fromkeys(ffn.num_experts for ffn in sparse.values()):
        if number % size != 0:
            yield Problem(path, f"{size} for {number} experts", "a divisor of their number", "change one of them")


STAGE_RULES: tuple[StageRule, ...] = (
    muon_is_asked_for,
    there_is_data,
    entries_differ,
    prompts_have_room_for_the_label,
    ranges_of_views_rise,
    generated_sources_make_the_kind,
    *SAMPLE_RULES,
    there_are_objectives,
    kinds_are_taken,
    objectives_name_entries,
    objectives_have_data,
    data_has_objectives,
    draws_are_trained,
    momentum_is_built,
    objectives_fit,
    objectives_have_streams,
    steps_read_one_number_of_regions,
    captions_do_not_look_ahead,
    sizes_fit,
    *CHAIN_RULES,
    weights_have_one_origin,
    megablocks_is_bf16,
    offload_has_a_shard,
    nvme_has_a_folder,
    experts_can_be_cut,
)
