"""Each rule about a whole plan has a plan that breaks it, and its exact message."""

import pytest

from engine.errors import PlanError
from engine.plan.parse import parse_plan
from engine.plan.rules import RULES
from engine.plan.stage_rules import STAGE_RULES

BASE = {
    "name": "run",
    "model": "{preset: tiny, vocab_size: 100}",
    "parallel": "{host: zero, zero_stage: 1, precision: fp32}",
    "batch": "{micro_batch_size_per_gpu: 4}",
    "launch": "{}",
}
STAGE = {
    "name": "one",
    "steps": "3",
    "data": "[{source: emoji, kind: image_text}]",
    "objectives": "[univlc]",
}


def problems(stage: dict[str, str], world_size: int | None = None, *more: dict[str, str], **base: str) -> list[str]:
    """The messages of a plan, without the file's name. Stages start in line 7, each is one line."""
    lines = [f"{key}: {value}" for key, value in {**BASE, **base}.items()]
    lines.append("stages:")
    for index, each in enumerate((stage, *more)):
        fields = {**STAGE, **({"name": f"more{index}"} if index else {}), **each}
        lines.append(f"  - {{{', '.join(f'{key}: {value}' for key, value in fields.items())}}}")
    try:
        parse_plan("\n".join(lines), "p", world_size=world_size)
    except PlanError as error:
        return list(error.problems)
    return []


def test_the_plan_that_the_others_change_is_right() -> None:
    assert problems({}) == []


def test_routing_needs_no_contrastive_training() -> None:
    stage = {"evaluate": "{tasks: [routing]}", "objectives": "[mrm]"}
    assert problems({**stage, "model": "{ffn: {kind: limoe}}"}) == []


TITLES = "letters, digits, spaces and . , : ; + - _ > ( ), a letter or digit first, at most 100"

TUNED = {"weights": "{all: hub}"}
"""Of a stage that starts from weights, as one with adapters has to."""

STAGE_CASES = {
    "muon_is_asked_for": (
        {"optimizer": "{muon: {lr: 0.1}}"},
        "p:7: stages.0.optimizer.muon: got options, with kind 'adamw'; allowed options with kind 'muon'; "
        "set optimizer.kind: muon, or remove them",
    ),
    "second_views_are_seen": (
        {"data": "[{source: emoji, kind: image_text, views: 2}]", "objectives": "[lm]"},
        "p:7: stages.0.data.0.views: got 2; allowed 1 where no objective reads what momentum twins see, e.g. univlc with momentum keys; change it, or add such an objective",
    ),
    "there_is_data": (
        {"data": "[]"},
        "p:7: stages.0.data: got no entry; allowed one entry or more; add one, e.g. {source: emoji, kind: image_text}",
    ),
    "there_is_data: weights": (
        {"data": "[{source: emoji, kind: image_text, weight: 0}]"},
        "p:7: stages.0.data: got weights that sum to 0; allowed a sum above 0; give an entry a weight above 0",
    ),
    "entries_differ": (
        {"data": "[{source: emoji, kind: image_text}, {source: emoji, kind: image_text}]"},
        "p:7: stages.0.data.1.name: got 'image_text:emoji', which data.0 is called as well; allowed a name for each entry; give one of the two another 'name'",
    ),
    "prompts_have_room_for_the_label": (
        {"data": "[{source: emoji, kind: image_label, prompts: ['a {label}', a cat]}]"},
        "p:7: stages.0.data.0.prompts: got 'a cat'; allowed texts with '{label}' in them; put {label} where the class goes",
    ),
    "prompts_have_room_for_the_label: none": (
        {"data": "[{source: emoji, kind: image_label, prompts: []}]"},
        "p:7: stages.0.data.0.prompts: got no prompt; allowed texts with '{label}' in them; put {label} where the class goes",
    ),
    "prompts_have_room_for_the_label: other braces": (
        {"data": "[{source: emoji, kind: image_label, prompts: ['a {colour} {label}']}]"},
        "p:7: stages.0.data.0.prompts: got 'a {colour} {label}', which has '{colour}' in it; allowed no braces but {label}; leave it out",
    ),
    "prompts_have_room_for_the_label: of tasks": (
        {"data": "[{source: emoji, kind: image_label, prompts: ['{name}: {label}']}]"},
        "p:7: stages.0.data.0.prompts: got '{name}: {label}', which has '{name}' in it; allowed no braces but {label}; leave it out",
    ),
    "prompts_have_room_for_the_label: one brace": (
        {"data": "[{source: emoji, kind: image_label, prompts: ['{label}}']}]"},
        "p:7: stages.0.data.0.prompts: got '{label}}', which has '}' in it; allowed no braces but {label}; leave it out",
    ),
    "ranges_of_views_rise": (
        {"data": "[{source: emoji, kind: image_text, augment: {crop_scale: [0.5, 1.5]}}]"},
        "p:7: stages.0.data.0.augment.crop_scale: got [0.5, 1.5]; allowed two numbers above 0, at most 1, smaller first; change the numbers",
    ),
    "ranges_of_views_rise: zoom": (
        {"data": "[{source: emoji, kind: image_text, augment: {zoom: [2, 0.5]}}]"},
        "p:7: stages.0.data.0.augment.zoom: got [2, 0.5]; allowed two numbers above 0, smaller first; change the numbers",
    ),
    "generated_sources_make_the_kind": (
        {"data": "[{source: motion, kind: image_text}]"},
        "p:7: stages.0.data.0.kind: got 'image_text' of source 'motion'; allowed 'video_text', 'video_label', 'video'; choose one of these",
    ),
    "generated_sources_make_the_kind: one": (
        {"data": "[{source: questions, kind: video_text}]"},
        "p:7: stages.0.data.0.kind: got 'video_text' of source 'questions'; allowed 'image_text'; change it",
    ),
    "texts_are_read": (
        {"data": "[{source: emoji, kind: image_label, text: question}]"},
        "p:7: stages.0.data.0.text: got 'question' for kind 'image_label'; allowed null; remove it, or choose a kind whose text is no class name, e.g. 'image_text'",
    ),
    "pictures_fit_the_kind": (
        {"data": "[{source: shards, kind: images_text}]"},
        "p:7: stages.0.data.0.pictures: got none for kind 'images_text'; allowed files of a sample; add e.g. [left.png, right.png]",
    ),
    "pictures_fit_the_kind: several": (
        {"data": "[{source: shards, kind: image_text, pictures: [left.png, right.png]}]"},
        "p:7: stages.0.data.0.pictures: got 2 for kind 'image_text'; allowed one at most; choose kind 'images_text'",
    ),
    "pictures_fit_the_kind: own sources": (
        {"data": "[{source: emoji, kind: image_text, pictures: [left.png]}]"},
        "p:7: stages.0.data.0.pictures: got ['left.png'] of source 'emoji'; allowed none; remove them: its samples have one each",
    ),
    "pictures_fit_the_kind: format": (
        {"data": "[{source: shards, kind: images_text, pictures: [left.png, right.tiff]}]"},
        "p:7: stages.0.data.0.pictures: got 'right.tiff'; allowed names without an extension, or that end in avi, bmp, gif, jpeg, jpg, m4v, mkv, mov, mp4, mpeg, mpg, png, webm, webp; name them as they end after the sample's key and a dot",
    ),
    "pictures_fit_the_kind: least": (
        {"data": "[{source: shards, kind: images_text, pictures: [left.png], least_pictures: 2}]"},
        "p:7: stages.0.data.0.least_pictures: got 2; allowed 0 to 1, the pictures named; change it, or name more pictures",
    ),
    "there_are_objectives": (
        {"objectives": "[]"},
        "p:7: stages.0.objectives: got no objective; allowed one objective or more; add one, e.g. univlc",
    ),
    "there_are_objectives: weights": (
        {"objectives": "[{kind: univlc, weight: 0}]"},
        "p:7: stages.0.objectives: got weights that sum to 0; allowed a sum above 0; give an objective a weight above 0",
    ),
    "there_are_objectives: twice": (
        {"objectives": "[univlc, univlc]"},
        "p:7: stages.0.objectives.1.kind: got a second 'univlc'; allowed each objective once; remove one of the two",
    ),
    "objectives_have_data": (
        {"objectives": "[univlc, mfm]"},
        "p:7: stages.0.objectives.1.kind: got 'mfm', which acts on none of the stage's kinds (image_text); allowed objectives that act on them; 'mfm' acts on video_text, video_label, video; add data of such a kind or remove the objective",
    ),
    "data_has_objectives": (
        {
            "data": "[{source: emoji, kind: image_text}, {source: emoji, kind: video_text}]",
            "objectives": "[mrm]",
        },
        "p:7: stages.0.data.1.kind: got 'video_text', which none of the stage's objectives (mrm) acts on; allowed kinds that an objective acts on; add an objective or remove the entry",
    ),
    "objectives_name_entries": (
        {
            "objectives": "[{kind: univlc, on: [pairs, pair]}]",
            "data": "[{source: emoji, kind: image_text, name: pairs}]",
        },
        "p:7: stages.0.objectives.0.on.1: got 'pair'; allowed 'pairs'; did you mean 'pairs'?",
    ),
    "kinds_are_taken": (
        {
            "model": "{kind: vilt, image_size: 64, momentum: null}",
            "objectives": "[mlm]",
            "data": "[{source: motion, kind: video_text}]",
        },
        "p:7: stages.0.data.0.kind: got 'video_text'; allowed kinds that architecture 'vilt' takes: image_text, image_label, image; choose one, or change model.kind",
    ),
    "sizes_fit: experts": (
        {"model": "{hidden_size: 8, num_heads: 2, ffn: {kind: limoe, expert_ratio: 0.01}}"},
        "p:7: stages.0.model.ffn.expert_ratio: got 0.01; allowed 1 / 32 or more, 32 being the inner size of a dense layer; raise it, e.g. to 1",
    ),
    "draws_are_trained": (
        {"objectives": "[vlm]"},
        "p:7: stages.0.objectives.0.kind: got 'vlm', which draws samples by logit_scale, text_embedding, visual_embedding, which no objective trains; allowed 'vlm' beside an objective that trains them; add one, as 'univlc' is for embeddings",
    ),
    "momentum_is_built": (
        {"objectives": "[{kind: univlc, queue_size: 8}]", "model": "{momentum: null}"},
        "p:7: stages.0.objectives.0: got 'univlc' with options that need momentum twins, where model.momentum is null; allowed momentum twins; set model.momentum to {decay: 0.995}, or the objective's options so that it needs none",
    ),
    "objectives_fit": (
        {"objectives": "[univlc, {kind: mrm, every: 3}]"},
        "p:7: stages.0.objectives.1.every: got 3; allowed a divisor of micro_batch_size_per_gpu 4; change either",
    ),
    "objectives_have_streams": (
        {"objectives": "[univlc, lm]", "model": "{architecture: unified}"},
        "p:7: stages.0.objectives.1.kind: got 'lm', which asks for the stream 'generation'; allowed objectives on the streams of architecture 'unified': visual, text, embedding, fused, fused_visual, masked_visual; take it out or change model.kind",
    ),
    "captions_do_not_look_ahead": (
        {
            "objectives": "[univlc, lm]",
            "model": "{ffn: {kind: limoe, router: {kind: expert_choice}}}",
        },
        "p:7: stages.0.model.ffn.router.kind: got 'expert_choice' with 'lm', whose decoder may not see the words to come; allowed a router that looks at earlier tokens only, as 'token_choice' without a capacity does; change it, or take 'lm' out",
    ),
    "captions_do_not_look_ahead: priority": (
        {
            "objectives": "[univlc, lm]",
            "model": "{ffn: {kind: limoe, router: {kind: token_choice, capacity_factor: 1.0}}}",
        },
        "p:7: stages.0.model.ffn.router.kind: got 'token_choice' with 'lm', whose decoder may not see the words to come; allowed a router that looks at earlier tokens only, as 'token_choice' without a capacity does; change it, or take 'lm' out",
    ),
    "megablocks_is_bf16": (
        {"model": "{ffn: {kind: limoe, implementation: megablocks}}"},
        "p:7: stages.0.model.ffn.implementation: got 'megablocks' with parallel.precision 'fp32'; allowed 'auto', 'loop', 'grouped', 'batched'; set it to 'auto', or parallel.precision to 'bf16'",
    ),
    "tasks_can_be_done: routers": (
        {"evaluate": "{tasks: [retrieval, routing]}"},
        "p:7: stages.0.evaluate.tasks.1.kind: got 'routing' for a stage that has no routers in its 'dense' feed-forward layers; allowed 'retrieval', 'zero_shot', 'neighbors'; use model.ffn of kind 'limoe' or 'mome_limoe', or remove the task",
    ),
    "tasks_can_be_done: too few layers": (
        {"evaluate": "{tasks: [routing]}", "model": "{ffn: {kind: limoe, every: 9}}"},
        "p:7: stages.0.evaluate.tasks.0.kind: got 'routing' for a stage that has no routers in its 'limoe' feed-forward layers; allowed 'retrieval', 'zero_shot', 'neighbors'; use model.ffn of kind 'limoe' or 'mome_limoe', or remove the task",
    ),
    "objectives_have_streams: towers": (
        {"objectives": "[univlc, mdm]"},
        "p:7: stages.0.objectives.1.kind: got 'mdm', which asks for the stream 'fused_visual'; allowed objectives on the streams of architecture 'omnivl': visual, text, embedding, fused, generation, masked_visual, momentum_fused, fused_generation; take it out or change model.kind",
    ),
    "objectives_fit: frames": (
        {"data": "[{source: emoji, kind: video_text}]", "objectives": "[mfm]", "model": "{num_frames: 1}"},
        "p:7: stages.0.objectives.0.kind: got 'mfm' on clips of 1 temporal position; allowed clips of 2 or more (num_frames / tubelet_size); raise model.num_frames",
    ),
    "sizes_fit: heads": (
        {"model": "{hidden_size: 200}"},
        "p:7: stages.0.model.hidden_size: got 200; allowed a multiple of num_heads 3; change either",
    ),
    "sizes_fit: image": (
        {"model": "{image_size: 65}"},
        "p:7: stages.0.model.image_size: got 65; allowed a multiple of patch_size 8; change either",
    ),
    "sizes_fit: video": (
        {"model": "{video_size: 65}"},
        "p:7: stages.0.model.video_size: got 65; allowed a multiple of patch_size 8; change either",
    ),
    "sizes_fit: frames": (
        {"model": "{num_frames: 7, tubelet_size: 2}"},
        "p:7: stages.0.model.num_frames: got 7; allowed a multiple of tubelet_size 2; change either",
    ),
    "patterns_name_parameters": (
        {"freeze": "[embed, 'text_*', visual_00.block.attention, 'visal_*']"},
        "p:7: stages.0.freeze.3: got 'visal_*'; allowed beginnings of parameter names: embed, visual_*, visual_norm, text_*, contrast, alignment_*, generation_*; did you mean 'visual_*'?",
    ),
    "patterns_name_parameters: a part of a layer": (
        {"freeze": "[losses.heads, embed.blocks.text]", "objectives": "[{kind: mrm, targets: pixels}]"},
        "p:7: stages.0.freeze.1: got 'embed.blocks.text'; allowed beginnings of parameter names: embed.block; did you mean 'embed.block.text'?",
    ),
    "patterns_name_parameters: a layer without parameters": (
        {"freeze": "[losses]"},
        "p:7: stages.0.freeze.0: got 'losses'; allowed beginnings of parameter names: embed, visual_*, visual_norm, text_*, contrast, alignment_*, generation_*; name a layer or a part of one",
    ),
    "patterns_name_parameters: rates": (
        {"optimizer": "{lr_scales: {'visual_*': 0.1, 'text_*.block.atention': 0.1}}"},
        "p:7: stages.0.optimizer.lr_scales.text_*.block.atention: got 'text_*.block.atention'; allowed beginnings of parameter names: text_*.block.attention, text_*.block.norm1, text_*.block.ffn, text_*.block.norm2, text_*.block.norm_out; did you mean 'text_*.block.attention'?",
    ),
    "patterns_name_parameters: of adapters": (
        {
            **TUNED,
            "lora": "{}",
            "optimizer": "{lr_scales: {'*.adapter.up': 16, text_00.block.attention.out.adaptr: 2}}",
        },
        "p:7: stages.0.optimizer.lr_scales.text_00.block.attention.out.adaptr: got 'text_00.block.attention.out.adaptr'; allowed beginnings of parameter names: text_00.block.attention.out.weight, text_00.block.attention.out.bias, text_00.block.attention.out.adapter; did you mean 'text_00.block.attention.out.adapter'?",
    ),
    "adapters_start_from_weights": (
        {"lora": "{}"},
        "p:7: stages.0.lora: got adapters for a stage that starts from random weights, which would be frozen; allowed null without init_from and weights; name what it starts from, or remove lora",
    ),
    "adapters_are_trained: no such maps": (
        {**TUNED, "lora": "{on: [attention, cross_attention]}", "model": "{alignment_layers: 0, generation_layers: 0}"},
        "p:7: stages.0.lora.on.1: got 'cross_attention', of which the model has no map; allowed 'attention', 'feed_forward'; name one of them",
    ),
    "adapters_are_trained: none that an objective reaches": (
        {**TUNED, "lora": "{on: [cross_attention]}"},
        "p:7: stages.0.lora.on.0: got 'cross_attention', of which the stage trains no map: they are frozen, or without a gradient; allowed 'attention', 'feed_forward'; name one of them",
    ),
    "adapters_are_trained: banks of experts": (
        {**TUNED, "lora": "{on: [feed_forward]}", "model": "{ffn: {kind: limoe, every: 1}}"},
        "p:7: stages.0.lora.on.0: got 'feed_forward', of which the model has no map; allowed 'attention'; name one of them",
    ),
    "adapters_are_trained: everything frozen": (
        {**TUNED, "lora": "{}", "freeze": "['visual_*', 'text_*']"},
        "p:7: stages.0.lora.on.0: got 'attention', of which the stage trains no map: they are frozen, or without a gradient; allowed no lora for a stage that trains no map of a block; thaw one of them, or remove lora",
    ),
    "adapters_are_trained: on nothing": (
        {**TUNED, "lora": "{on: []}"},
        "p:7: stages.0.lora.on: got nothing; allowed 'attention', 'feed_forward'; name one of them",
    ),
    "adapters_are_trained: twice": (
        {**TUNED, "lora": "{on: [attention, attention]}"},
        "p:7: stages.0.lora.on.1: got 'attention' again; allowed each once; remove it",
    ),
    "adapters_are_trained: rank": (
        {**TUNED, "lora": "{rank: 200}"},
        "p:7: stages.0.lora.rank: got 200 for a map of 192 x 192; allowed 1 to 192; lower it",
    ),
    "something_is_trained": (
        {"freeze": "[embed, 'visual_*', 'text_*', contrast]"},
        "p:7: stages.0.freeze: got embed, visual_*, text_*, contrast, which is all that the objectives give a gradient; allowed patterns that leave something to train; thaw a part",
    ),
    "pipeline_can_be_cut": (
        {"parallel": "{host: pipeline, zero_stage: 2}"},
        "p:7: stages.0.parallel.zero_stage: got 2 with host 'pipeline', which DeepSpeed refuses; allowed 0 or 1; set it to 1, or use host 'zero'",
    ),
    "pipeline_can_be_cut: too fine for two passes": (
        {"parallel": "{host: pipeline, pipeline_stages: 40}", "model": "{architecture: unified}"},
        "p:7: stages.0.parallel.pipeline_stages: got 40 for a chain of 18 passes; allowed 2 to 18; take fewer stages",
    ),
    "pipeline_can_be_cut: too fine": (
        {"parallel": "{host: pipeline, pipeline_stages: 40}"},
        "p:7: stages.0.parallel.pipeline_stages: got 40 for a chain of 19 passes; allowed 2 to 19; take fewer stages",
    ),
    "offload_has_a_shard": (
        {"parallel": "{zero_stage: 0, offload: optimizer}"},
        "p:7: stages.0.parallel.offload: got 'optimizer' with zero_stage 0; allowed 'none'; change it to 'none', or use host 'zero' with zero_stage 1, 2 or 3",
    ),
    "offload_has_a_shard: plain": (
        {"parallel": "{host: plain, offload: optimizer}"},
        "p:7: stages.0.parallel.offload: got 'optimizer' with host 'plain'; allowed 'none'; change it to 'none', or use host 'zero' with zero_stage 1, 2 or 3",
    ),
    "offload_has_a_shard: whole parameters": (
        {"parallel": "{zero_stage: 2, offload: parameters}"},
        "p:7: stages.0.parallel.offload: got 'parameters' with zero_stage 2; allowed 'none', 'optimizer'; change it to one of these, or use host 'zero' with zero_stage 3",
    ),
    "nvme_has_a_folder": (
        {"parallel": "{offload: optimizer, offload_device: nvme}"},
        "p:3: parallel.nvme_folder: got null with offload_device 'nvme'; allowed a folder on a disk of each machine; name one",
    ),
    "nvme_has_a_folder: nothing to go there": (
        {"parallel": "{offload_device: nvme, nvme_folder: /scratch}"},
        "p:7: stages.0.parallel.offload_device: got 'nvme' where parallel.offload is 'none'; allowed 'cpu'; change it to 'cpu', or set parallel.offload to 'optimizer' or 'parameters'",
    ),
    "experts_can_be_cut": (
        {"parallel": "{expert_parallel_size: 3}", "model": "{ffn: {kind: limoe, num_experts: 8}}"},
        "p:7: stages.0.parallel.expert_parallel_size: got 3 for 8 experts; allowed a divisor of their number; change one of them",
    ),
    "experts_can_be_cut: mome": (
        {"parallel": "{expert_parallel_size: 2}", "model": "{ffn: {kind: mome}}"},
        "p:7: stages.0.parallel.expert_parallel_size: got 2 with 'mome' feed-forward layers, which trade no tokens; allowed 1; change it to 1, or use model.ffn of kind 'limoe' or 'mome_limoe'",
    ),
    "experts_can_be_cut: plain": (
        {"parallel": "{host: plain, expert_parallel_size: 2}", "model": "{ffn: {kind: limoe}}"},
        "p:7: stages.0.parallel.expert_parallel_size: got 2 with host 'plain'; allowed 1; change it to 1, or use host 'zero' or 'pipeline'",
    ),
    "names_are_file_names": (
        {"name": "../one"},
        "p:7: stages.0.name: got '../one'; allowed letters, digits, '-', '_' and '.', a letter or digit first: it names a folder; change the name",
    ),
    "names_are_file_names: long": (
        {"name": "a" * 101},
        f"p:7: stages.0.name: got '{'a' * 101}'; allowed letters, digits, '-', '_' and '.', a letter or digit first: it names a folder, at most 100 characters; change the name",
    ),
    "titles_are_plain": (
        {"evaluate": "{tasks: [{kind: retrieval, name: ../x}]}"},
        f"p:7: stages.0.evaluate.tasks.0.name: got '../x'; allowed {TITLES}; change the name",
    ),
    "titles_are_plain: markup": (
        {"data": "[{source: emoji, kind: image_text, name: '[/nope]'}]"},
        f"p:7: stages.0.data.0.name: got '[/nope]'; allowed {TITLES}; change the name",
    ),
    "titles_are_plain: twice": (
        {"evaluate": "{tasks: [retrieval, {kind: zero_shot, name: retrieval}]}"},
        "p:7: stages.0.evaluate.tasks.1.name: got 'retrieval', which tasks.0 is called as well; allowed a name for each task; give one of the two another 'name'",
    ),
    "titles_are_plain: prompts": (
        {"evaluate": "{tasks: [{kind: zero_shot, prompts: [a cat]}]}"},
        "p:7: stages.0.evaluate.tasks.0.prompts: got 'a cat'; allowed texts with '{label}' in them; put {label} where the class goes",
    ),
    "titles_are_plain: other braces": (
        {"evaluate": "{tasks: [{kind: zero_shot, prompts: ['{name}: {label!r}{label}']}]}"},
        "p:7: stages.0.evaluate.tasks.0.prompts: got '{name}: {label!r}{label}', which has '{label!r}' in it; allowed no braces but {label} and {name}; leave it out",
    ),
    "titles_are_plain: no prompt": (
        {"evaluate": "{tasks: [{kind: zero_shot, prompts: []}]}"},
        "p:7: stages.0.evaluate.tasks.0.prompts: got no prompt; allowed texts with '{label}' in them; put {label} where the class goes",
    ),
    "stages_start_from_earlier_ones: alone": (
        {"init_from": "zero"},
        "p:7: stages.0.init_from: got 'zero'; allowed nothing, there is no earlier stage; remove init_from",
    ),
    "stages_start_from_earlier_ones: itself": (
        {"init_from": "one"},
        "p:7: stages.0.init_from: got 'one', this stage itself; allowed nothing, there is no earlier stage; remove init_from",
    ),
    "tasks_can_be_done: of the curve": (
        {"evaluate": "{curve: {tasks: [retrieval, caption]}}"},
        "p:7: stages.0.evaluate.curve.tasks.1.kind: got 'caption' for a stage that does not train 'lm'; allowed 'retrieval', 'zero_shot', 'neighbors'; add the objective 'lm', or remove the task",
    ),
    "tasks_can_be_done": (
        {"evaluate": "{tasks: [retrieval, caption]}"},
        "p:7: stages.0.evaluate.tasks.1.kind: got 'caption' for a stage that does not train 'lm'; allowed 'retrieval', 'zero_shot', 'neighbors'; add the objective 'lm', or remove the task",
    ),
    "tasks_can_be_done: embeddings": (
        {"objectives": "[mlm]", "evaluate": "{tasks: [{kind: zero_shot, name: labels}]}"},
        "p:7: stages.0.evaluate.tasks.0.kind: got 'zero_shot' for a stage that has no trained embeddings; allowed no task; add a contrastive objective such as 'univlc', or remove the task",
    ),
    "tasks_can_be_done: rerank": (
        {"evaluate": "{tasks: [{kind: retrieval, rerank: 4}]}"},
        "p:7: stages.0.evaluate.tasks.0.rerank: got 4 for a stage that does not train 'vlm'; allowed 0; add the objective 'vlm', or set rerank to 0",
    ),
    "batches_add_up: open": (
        {"batch": "{global_batch_size: 6}"},
        "p:7: stages.0.batch.global_batch_size: got 6; allowed a multiple of 4 = micro_batch_size_per_gpu 4 x gradient_accumulation_steps 1; change one of the three, or leave global_batch_size out",
    ),
}


@pytest.mark.parametrize(("launch", "world_size"), [("{processes: 6}", None), ("{}", 6)])
def test_processes_hold_whole_banks(launch: str, world_size: int | None) -> None:
    stage = {"parallel": "{expert_parallel_size: 4}", "model": "{ffn: {kind: limoe}}"}
    assert problems(stage, world_size, launch=launch) == [
        "p:7: stages.0.parallel.expert_parallel_size: got 4 for 6 processes; allowed a divisor of their number; change it, or launch.processes"
    ]
    assert problems(stage, 8) == []
    stage["parallel"] = "{host: pipeline, expert_parallel_size: 4}"
    assert problems(stage, 12) == [
        "p:7: stages.0.parallel.expert_parallel_size: got 4 for 6 processes of each pipeline stage; allowed a divisor of their number; change it, or launch.processes"
    ]
    assert problems(stage, 8) == []


def test_processes_fill_the_pipeline() -> None:
    stage = {"parallel": "{host: pipeline, pipeline_stages: 4}"}
    assert problems(stage, 6) == [
        "p:7: stages.0.parallel.pipeline_stages: got 4 for 6 processes; allowed a divisor of their number; change it, or launch.processes"
    ]
    assert problems({**stage, "batch": "{global_batch_size: 8}"}, 8) == []  # two replicas of four samples
    assert problems({**stage, "batch": "{global_batch_size: 32}"}, 8) == [
        "p:7: stages.0.batch.global_batch_size: got 32; allowed 8 = micro_batch_size_per_gpu 4 x gradient_accumulation_steps 1 x 2 replicas of a pipeline stage; change one of the three, or leave global_batch_size out"
    ]


@pytest.mark.parametrize("case", STAGE_CASES)
def test_a_stage_that_breaks_a_rule(case: str) -> None:
    changed, message = STAGE_CASES[case]
    found = problems(changed)
    if "images_text" in changed.get("data", ""):  # no objective of these plans acts on sets of pictures: told as well
        found = [one for one in found if "acts on" not in one]
    assert found == [message]


PAIR_CASES = {
    "stage_names_differ": (
        {"name": "one"},
        "p:8: stages.1.name: got 'one', which stages.0 is called as well; allowed a name for each stage; rename one of the two",
    ),
    "stages_start_from_earlier_ones": (
        {"init_from": "onne"},
        "p:8: stages.1.init_from: got 'onne'; allowed 'one'; did you mean 'one'?",
    ),
    "widths_survive_the_hand_over": (
        {"init_from": "one", "model": "{hidden_size: 384}"},
        "p:8: stages.1.model.hidden_size: got 384 for weights of stage 'one' with 192; allowed 192; set both to the same hidden_size, or remove init_from",
    ),
    "weights_have_one_origin": (
        {"init_from": "one", "weights": "{text: bert}"},
        "p:8: stages.1.weights: got weights of other origin beside init_from 'one'; allowed one of the two; move 'weights' to the first stage",
    ),
}


@pytest.mark.parametrize("case", PAIR_CASES)
def test_a_second_stage_that_breaks_a_rule(case: str) -> None:
    changed, message = PAIR_CASES[case]
    assert problems({}, None, changed) == [message]


def test_a_stage_that_starts_from_a_later_one() -> None:
    later = "p:7: stages.0.init_from: got 'more1', which comes later; allowed nothing, there is no earlier stage; change the order of the stages"
    assert problems({"init_from": "more1"}, None, {}) == [later]


@pytest.mark.parametrize(
    ("tasks", "wanted", "allowed"),
    [
        ("[retrieval]", "other/R@1", "'retrieval/FIGURE'"),
        ("[retrieval]", "retrieval", "'retrieval/FIGURE'"),
        ("[retrieval, {kind: zero_shot, name: labels}]", "zero_shot/x", "'retrieval/FIGURE', 'labels/FIGURE'"),
    ],
)
def test_the_best_checkpoint_is_told_by_a_figure_of_a_task(tasks: str, wanted: str, allowed: str) -> None:
    stage = {"evaluate": f"{{tasks: {tasks}}}"}
    assert problems(stage, checkpoint="{keep_best: 'retrieval/image->text R@1'}") == []
    assert problems(stage, checkpoint=f"{{keep_best: '{wanted}'}}") == [
        f"p:6: checkpoint.keep_best: got '{wanted}', which is no figure of a task of stages.0; allowed {allowed}; name a figure of a task, or null"
    ]


def test_a_stage_may_have_a_best_figure_of_its_own() -> None:
    own = "{{tasks: [retrieval], keep_best: '{}'}}"
    right, wrong = own.format("retrieval/text->image R@5"), own.format("retrieval/MAE")
    assert problems({"evaluate": right}) == []
    assert problems({"evaluate": right}, checkpoint="{keep_best: 'another/accuracy', best_is: lowest}") == []
    (told,) = problems({"evaluate": wrong})
    assert told.startswith(
        "p:7: stages.0.evaluate.keep_best: got 'retrieval/MAE', which is no figure that task 'retrieval' of stages.0 "
        "makes; allowed 'retrieval/image->text R@1', "
    )
    assert problems({"evaluate": "{keep_best: retrieval/x}"}) == [
        "p:7: stages.0.evaluate.keep_best: got 'retrieval/x'; allowed null where the stage is not evaluated; add a "
        "task, or remove it"
    ]


def test_which_value_is_best_needs_a_figure() -> None:
    stage = {"evaluate": "{tasks: [retrieval]}"}
    assert problems(stage, checkpoint="{keep_best: 'retrieval/image->text R@1', best_is: lowest}") == []
    assert problems(stage, checkpoint="{best_is: lowest}") == [
        "p:6: checkpoint.best_is: got 'lowest' without keep_best; allowed 'auto'; name the figure in keep_best, or "
        "remove it"
    ]


def test_there_is_no_best_checkpoint_without_an_evaluation() -> None:
    assert problems({}, checkpoint="{keep_best: retrieval/x}") == [
        "p:6: checkpoint.keep_best: got 'retrieval/x'; allowed null where no stage is evaluated; add a task, or remove it"
    ]


@pytest.mark.parametrize(("seconds", "is_right"), [("0", True), ("1", True), ("0.01", False), ("0.99", False)])
def test_a_hang_takes_a_while(seconds: str, is_right: bool) -> None:
    told = f"p:6: guard.hang_seconds: got {seconds}; allowed 0, or 1 or more; change the number"
    assert problems({}, guard=f"{{hang_seconds: {seconds}}}") == ([] if is_right else [told])


def test_there_is_a_stage() -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan("name: a\nmodel: {vocab_size: 9}\nstages: []", "p")
    assert str(caught.value) == (
        "p:3: stages: got no stage; allowed one stage or more; add a stage with name, steps, data and objectives"
    )


def test_evaluation_may_rely_on_an_earlier_stage() -> None:
    assert problems({}, None, {"init_from": "one", "objectives": "[lm]", "evaluate": "{tasks: [retrieval]}"}) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"objectives": "[univlc, vlm]"},  # nothing is written
        {"objectives": "[univlc, lm]", "model": "{ffn: {kind: limoe, noise: 0, losses: {load: 0}}}"},
        {
            "objectives": "[univlc, lm]",
            "model": "{ffn: {kind: limoe, router: {kind: token_choice, capacity_factor: 1.0, priority: false}}}",
        },
    ],
)
def test_experts_may_choose_where_no_word_is_to_come(changed: dict[str, str]) -> None:
    choosing = "{ffn: {kind: limoe, router: {kind: expert_choice}}}"
    assert problems({"model": choosing, **changed}) == []


def test_depth_and_frames_may_change_at_the_hand_over() -> None:
    assert problems({}, None, {"init_from": "one", "model": "{num_frames: 4, vision_layers: 8, image_size: 96}"}) == []


@pytest.mark.parametrize(
    ("launch", "world_size", "processes"), [("{processes: 2}", None, 2), ("{}", 3, 3), ("{processes: 2}", 3, 3)]
)
def test_batches_add_up_over_processes(launch: str, world_size: int | None, processes: int) -> None:
    # 4 samples x 2 accumulated x processes
    batch = "{micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2, global_batch_size: 40}"
    right = batch.replace("40", str(8 * processes))
    assert problems({}, world_size, batch=right, launch=launch) == []
    said = problems({}, world_size, batch=batch, launch=launch)
    assert said == [
        "p:4: batch.global_batch_size: got 40 for 3 processes; allowed a multiple of 3; take 2 or 4 processes, or another batch"
        if processes == 3
        else f"p:4: batch.global_batch_size: got 40; allowed {8 * processes} = micro_batch_size_per_gpu 4 x gradient_accumulation_steps 2 x {processes} processes; change one of the three, or leave global_batch_size out"
    ]


def test_every_rule_has_a_case() -> None:
    told = {case.split(":")[0] for case in (*STAGE_CASES, *PAIR_CASES)} | {"there_is_a_stage", "stages_hold_together"}
    told |= {
        "best_is_a_figure",
        "hangs_take_a_while",
        "batches_add_up",
        "processes_hold_whole_banks",
        "processes_fill_the_pipeline",
    }
    told |= {"objectives_have_their_fields", "crops_keep_boxes"}  # in test_sample_rules.py
    told |= {"steps_read_one_number_of_regions"}  # in test_xvlm_plans.py
    assert {rule.__name__ for rule in (*RULES, *STAGE_RULES)} == told


def test_what_cannot_be_built_is_told_once() -> None:
    stage = {"freeze": "['visal_*']", "parallel": "{host: pipeline, pipeline_stages: 40}"}
    for model, told in (
        (
            "{mlp_ratio: 0.001}",
            "p:7: stages.0.model.mlp_ratio: got 0.001; allowed 1 / hidden_size or more; raise it, e.g. to 4",
        ),
        (
            "{image_size: 65}",
            "p:7: stages.0.model.image_size: got 65; allowed a multiple of patch_size 8; change either",
        ),
    ):
        assert problems({**stage, "model": model}) == [told]


@pytest.mark.parametrize(
    ("task", "right", "wrong", "allowed"),
    [
        ("retrieval", "image->text R@10", "image->text R@2", "'retrieval/image->text R@1', "),
        ("retrieval", "text->image R@1", "text->video R@1", "'retrieval/image->text R@1', "),
        ("{kind: retrieval, media: image}", "text->image R@5", "image->text, re-ranked R@5", "'retrieval/image"),
        ("zero_shot", "accuracy, 12 classes", "accuracy", "'zero_shot/accuracy, * classes'"),
    ],
)
def test_the_best_checkpoint_is_told_by_a_figure_that_the_task_makes(
    task: str, right: str, wrong: str, allowed: str
) -> None:
    stage, name = {"evaluate": f"{{tasks: [{task}]}}"}, allowed[1:].partition("/")[0]
    assert problems(stage, checkpoint=f"{{keep_best: '{name}/{right}'}}") == []
    (told,) = problems(stage, checkpoint=f"{{keep_best: '{name}/{wrong}'}}")
    start = (
        f"p:6: checkpoint.keep_best: got '{name}/{wrong}', which is no figure that task '{name}' of stages.0 makes; "
    )
    assert told.startswith(start + f"allowed {allowed}")
