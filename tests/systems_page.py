"""Writes docs/systems.md: each system of the field, what it is made of here, and what it was compared with.

python tests/systems_page.py

What can be read off the code and the plans is; of tests only their names are written down here.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from omnivl.architectures import (
    ALBEF,
    ALIGN,
    BLIP,
    BLIP2,
    CLIP,
    FLAVA,
    GIT,
    METER,
    XVLM,
    Architecture,
    CoCa,
    Flamingo,
    Frozen,
    OmniVL,
    PaLI,
    SimVLM,
    Unified,
    ViLT,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "systems.md"
PLANS = ROOT / "configs" / "plans"

HEAD = """# Systems

The systems of the field that are plans over the same parts. Each has one architecture file, or shares one, the
objectives that it brings, a debug plan that runs on a laptop, and plans with its paper's numbers. What differs from
paper and released code stands in the docstrings of architecture and objectives, and in the plans' headers. Written by
`tests/systems_page.py` from code, plans and tests.

## What they are made of
Lines are those of the architecture file, and behind the plus sign of the file that translates names of weights.

| system | paper | architecture | lines | objectives | debug plan | plans with the paper's numbers |
|---|---|---|---|---|---|---|
"""
CHECKS = """
## What was checked
*Compared with*: the peer's own class with equal weights, forward and gradient, unless said otherwise. *Layouts*:
losses, gradient norms and weights on several processes (replicas, ZeRO-3, pipeline) are those of one plain process.
*In* and *out*: weights of public checkpoints, of transformers' class unless said otherwise; a *folder* is written for
every one, which transformers loads with `omnivl.hub` ([Hugging Face](huggingface.md)).

| system | compared with | layouts | in | out |
|---|---|---|---|---|
"""
SIZES = """
## Sizes
As the plans' headers have them; `tests/unit/test_paper_plans.py` and the tests of architectures count them.

| plan | size |
|---|---|
"""
RESULTS = """
## Debug plans
As their headers have them: the author's run of each.

| plan | time | result |
|---|---|---|
"""


@dataclass(frozen=True)
class System:
    """A system of the field.

    Attributes:
        name: Its name.
        paper: Number on arXiv.
        architecture: Its class here.
        debug: Its debug plan.
        papers: Plans with the paper's numbers.
        peer: What it was compared with, in words.
        parity: Tests that compare: ``file::test``.
        layouts: Test file of layouts.
        weights_in: Where the form of public weights that it reads is not transformers' class.
    """

    name: str
    paper: str
    architecture: type[Architecture]
    debug: str
    papers: tuple[str, ...]
    peer: str
    parity: tuple[str, ...]
    layouts: str
    weights_in: str = ""


_UNIT = "tests/unit/omnivl/architectures/"
_SPREAD = "tests/distributed/"
SYSTEMS = (
    System(
        *("OmniVL", "2209.07526", OmniVL, "quickstart", ()),
        "parts: ViT, TimeSformer, BERT, CLIP, BLIP and BEiT of transformers",
        (
            "tests/unit/omnivl/pretrained/test_load.py::test_timesformer_equals_transformers",
            "tests/unit/omnivl/pretrained/test_families.py::test_blips_captions_equal_transformers",
        ),
        f"{_SPREAD}test_layouts.py",
        "ViT, TimeSformer, BEiT, CLIP's tower, BERT, BLIP",
    ),
    System(
        *("CLIP", "2103.00020", CLIP, "clip_tiny", ("clip_b16", "clip_l14")),
        "CLIPModel of transformers, and open_clip",
        (
            f"{_UNIT}test_clip.py::test_embeddings_loss_and_gradients_are_those_of_transformers",
            f"{_UNIT}test_clip.py::test_open_clip_has_the_same_embeddings_losses_and_gradients",
        ),
        f"{_SPREAD}test_clip.py",
    ),
    System(
        *("UniCL", "2204.03610", CLIP, "unicl_tiny", ()),
        "the loss by hand; the towers are CLIP's",
        ("tests/unit/omnivl/objectives/test_univlc.py::test_loss_is_that_of_unicl_by_hand",),
        f"{_SPREAD}test_clip.py",
    ),
    System(
        *("Florence", "2111.11432", CLIP, "unicl_tiny", ("florence_base",)),
        "the loss by hand; the towers are CLIP's, none is a Swin",
        ("tests/unit/omnivl/objectives/test_univlc.py::test_loss_is_that_of_unicl_by_hand",),
        f"{_SPREAD}test_clip.py",
    ),
    System(
        *("ALIGN", "2102.05918", ALIGN, "align_tiny", ("align_b7",)),
        "AlignModel of transformers",
        (f"{_UNIT}test_align.py::test_loss_and_gradients_equal_transformers",),
        f"{_SPREAD}test_align.py",
    ),
    System(
        *("LIMoE", "2206.02770", Unified, "limoe_tiny", ("limoe_b16", "limoe_l16", "limoe_h14")),
        "no class; routing and its losses by hand",
        ("tests/unit/moe/routers/test_losses.py::test_load_is_the_chance_to_reach_the_threshold_with_new_noise",),
        f"{_SPREAD}test_layouts.py",
    ),
    System(
        *("VLMo", "2111.02358", Unified, "vlmo_tiny", ("vlmo_base", "vlmo_large")),
        "norms of a block, by hand",
        ("tests/unit/omnivl/parts/test_unified_peers.py::test_a_block_of_vlmo_has_a_norm_for_each_perceptron",),
        f"{_SPREAD}test_layouts.py",
    ),
    System(
        *("BEiT-3", "2208.10442", Unified, "beit3_tiny", ("beit3_base", "beit3_large", "beit3_giant")),
        "a block of torchscale",
        ("tests/unit/omnivl/parts/test_unified_peers.py::test_a_block_of_beit3_is_torchscales",),
        f"{_SPREAD}test_layouts.py",
    ),
    System(
        *("Uni-Perceiver-MoE", "2206.04674", Unified),
        *("uni_perceiver_moe_tiny", ("uni_perceiver_moe_base",)),
        "nothing: no class is at hand",
        (),
        f"{_SPREAD}test_layouts.py",
    ),
    System(
        *("ViLT", "2102.03334", ViLT, "vilt_tiny", ("vilt_b32",)),
        "ViltModel and ViltForMaskedLM of transformers",
        (
            f"{_UNIT}test_vilt.py::test_hidden_states_and_pooled_equal_transformers",
            f"{_UNIT}test_vilt.py::test_the_masked_words_loss_equals_transformers",
        ),
        f"{_SPREAD}test_vilt.py",
    ),
    System(
        *("FLAVA", "2112.04482", FLAVA, "flava_tiny", ("flava_base",)),
        "FlavaModel and FlavaForPreTraining of transformers",
        (f"{_UNIT}test_flava.py::test_losses_on_pairs_and_gradients_equal_transformers",),
        f"{_SPREAD}test_flava.py",
    ),
    System(
        *("ALBEF", "2107.07651", ALBEF, "albef_tiny", ("albef_base", "albef_finetune")),
        "ViTModel, BertModel and BertForMaskedLM of transformers; torchmultimodal's blocks and losses",
        (
            f"{_UNIT}test_albef.py::test_streams_and_gradients_equal_transformers",
            f"{_UNIT}test_albef.py::test_fused_blocks_equal_torchmultimodals",
        ),
        f"{_SPREAD}test_albef.py",
        "the released file",
    ),
    System(
        *("TCL", "2202.10401", ALBEF, "tcl_tiny", ("tcl_base",)),
        "as ALBEF; its losses by hand",
        (f"{_UNIT}test_albef.py::test_streams_and_gradients_equal_transformers",),
        f"{_SPREAD}test_tcl.py",
        "the released file",
    ),
    System(
        *("CODIS", "2203.00048", ALBEF, "codis_tiny", ("codis_base",)),
        "as ALBEF; its loss by hand, with linear programming for the transport",
        (
            f"{_UNIT}test_albef.py::test_streams_and_gradients_equal_transformers",
            "tests/unit/omnivl/objectives/test_prototypes.py::test_loss_and_gradients_by_hand",
        ),
        f"{_SPREAD}test_codis.py",
        "the released file of ALBEF",
    ),
    System(
        *("METER", "2111.02387", METER, "meter_tiny", ("meter_base",)),
        "modules of transformers' CLIP, RoBERTa and BERT",
        (f"{_UNIT}test_meter.py::test_streams_and_gradients_equal_transformers_modules",),
        f"{_SPREAD}test_meter.py",
        "the released file",
    ),
    System(
        *("X-VLM", "2111.08276", XVLM, "xvlm_tiny", ("xvlm_base",)),
        "as ALBEF; regions by hand",
        (
            f"{_UNIT}test_albef.py::test_streams_and_gradients_equal_transformers",
            f"{_UNIT}test_xvlm.py::test_a_picture_is_the_mean_of_its_patches",
        ),
        f"{_SPREAD}test_xvlm.py",
        "the released file with a ViT",
    ),
    System(
        *("X2-VLM", "2211.12402", XVLM, "x2vlm_tiny", ("x2vlm_base", "x2vlm_large")),
        "as X-VLM; clips by hand",
        (f"{_UNIT}test_xvlm.py::test_a_clip_is_the_mean_of_its_frames_and_as_long_as_one",),
        f"{_SPREAD}test_xvlm.py",
        "none: BEiT-2 is not there",
    ),
    System(
        *("BLIP", "2201.12086", BLIP, "blip_tiny", ("blip_base", "blip_large")),
        "BlipForImageTextRetrieval and BlipForConditionalGeneration of transformers",
        (
            f"{_UNIT}test_blip.py::test_matching_and_contrast_equal_transformers",
            f"{_UNIT}test_blip.py::test_writing_equals_transformers",
        ),
        f"{_SPREAD}test_blip.py",
    ),
    System(
        *("BLIP-2", "2301.12597", BLIP2, "blip2_tiny", ("blip2_opt",)),
        "Blip2ForImageTextRetrieval and Blip2ForConditionalGeneration (OPT) of transformers",
        (
            f"{_UNIT}test_blip2.py::test_contrast_equals_transformers",
            f"{_UNIT}test_blip2_language.py::test_losses_and_gradients_of_the_second_stage_equal_transformers",
        ),
        f"{_SPREAD}test_blip2.py",
    ),
    System(
        *("CoCa", "2205.01917", CoCa, "coca_tiny", ("coca_base", "coca_large")),
        "CoCa of open_clip",
        (f"{_UNIT}test_coca.py::test_losses_embeddings_and_gradients_are_those_of_open_clip",),
        f"{_SPREAD}test_coca.py",
        "open_clip",
    ),
    System(
        *("SimVLM", "2108.10904", SimVLM, "simvlm_tiny", ("simvlm_base",)),
        "nothing: no class is at hand; writing with a cache and without",
        (f"{_UNIT}test_simvlm.py::test_captions_written_with_and_without_a_cache_are_the_same",),
        f"{_SPREAD}test_simvlm.py",
    ),
    System(
        *("PaLI", "2209.06794", PaLI, "pali_tiny", ("pali_3b", "pali_17b")),
        "T5ForConditionalGeneration and MT5ForConditionalGeneration of transformers, with the patches as inputs_embeds",
        (
            f"{_UNIT}test_pali.py::test_loss_and_gradients_are_those_of_transformers",
            f"{_UNIT}test_pali.py::test_greedy_words_are_those_that_transformers_generates",
        ),
        f"{_SPREAD}test_layouts.py",
        "T5 of the form of v1.1, mT5; ViT",
    ),
    System(
        *("GIT", "2205.14100", GIT, "git_tiny", ("git_base",)),
        "GitForCausalLM of transformers",
        (f"{_UNIT}test_git.py::test_loss_and_gradients_are_those_of_transformers",),
        f"{_SPREAD}test_language.py",
    ),
    System(
        *("Frozen", "2106.13884", Frozen, "frozen_tiny", ("frozen_7b",)),
        "OPTForCausalLM of transformers behind the prefix",
        (f"{_UNIT}test_frozen.py::test_losses_and_gradients_equal_those_of_transformers_behind_the_prefix",),
        f"{_SPREAD}test_language.py",
        "OPT",
    ),
    System(
        *("Flamingo", "2204.14198", Flamingo, "flamingo_tiny", ("flamingo_3b", "flamingo_9b")),
        "the resampler of transformers' IDEFICS; gated layers by plain torch",
        (f"{_UNIT}test_flamingo.py::test_the_resampler_is_that_of_idefics",),
        f"{_SPREAD}test_flamingo.py",
        "CLIP's tower, OPT",
    ),
)


def page() -> str:
    """The page."""
    return (
        HEAD
        + "".join(_row(cells) for cells in map(_made_of, SYSTEMS))
        + CHECKS
        + "".join(_row(cells) for cells in map(_checked, SYSTEMS))
        + SIZES
        + "".join(_row(cells) for cells in _sizes())
        + RESULTS
        + "".join(_row(cells) for cells in _results())
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _plan(name: str) -> str:
    return f"[`{name}`](../configs/plans/{name}.yaml)"


def module(architecture: type[Architecture]) -> Path:
    """The file of an architecture."""
    return ROOT / Path(*architecture.__module__.split(".")).with_suffix(".py")


def objectives(plan: str) -> list[str]:
    """The kinds of a plan's objectives, in the order of its stages."""
    content = yaml.safe_load((PLANS / f"{plan}.yaml").read_text())
    named = (one for stage in (content, *content["stages"]) for one in stage.get("objectives", ()))
    return list(dict.fromkeys(one if isinstance(one, str) else one["kind"] for one in named))


def _made_of(system: System) -> tuple[str, ...]:
    file = module(system.architecture)
    names = file.with_name(f"{file.stem}_names.py")
    lines = str(len(file.read_text().splitlines()))
    lines += f" + {len(names.read_text().splitlines())}" if names.exists() else ""
    return (
        system.name,
        f"[{system.paper}](https://arxiv.org/abs/{system.paper})",
        f"[`{file.name}`](../{file.relative_to(ROOT)})",
        lines,
        ", ".join(f"`{one}`" for one in objectives(system.debug)),
        _plan(system.debug),
        ", ".join(map(_plan, system.papers)) or "none",
    )


def _checked(system: System) -> tuple[str, ...]:
    made = system.architecture
    reads = made is OmniVL or made.from_foreign is not Architecture.from_foreign
    writes = made.to_foreign is not Architecture.to_foreign
    out = "transformers' class, and a folder" if writes else "a folder"
    tests = ", ".join(f"[{number}](../{test.split('::')[0]})" for number, test in enumerate(system.parity, 1))
    return (
        system.name,
        f"{system.peer}{f' ({tests})' if tests else ''}",
        f"[`{Path(system.layouts).name}`](../{system.layouts})",
        (system.weights_in or "transformers' class") if reads else "none",
        out,
    )


def _header(plan: str) -> dict[str, str]:
    """The entries of a plan's header, each with its further lines."""
    found: dict[str, str] = {}
    entry = ""
    for line in (PLANS / f"{plan}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        if match := re.fullmatch(r"#   (\w+): +(.*)", line):
            entry, found[match[1]] = match[1], match[2]
        elif entry and (more := re.fullmatch(r"# {10,}(.*)", line)):
            found[entry] += f" {more[1]}"
        else:
            entry = ""
    return {name: text.replace("|", "\\|") for name, text in found.items()}


def _sizes() -> Iterator[tuple[str, ...]]:
    for name in (name for system in SYSTEMS for name in system.papers):
        if size := _header(name).get("size"):
            yield _plan(name), size


def _results() -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys(system.debug for system in SYSTEMS):
        header = _header(name)
        yield _plan(name), header["time"], header["result"]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
