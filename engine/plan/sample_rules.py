"""Rules about what a data entry takes of a sample: its text, its pictures and its fields."""

from collections.abc import Callable, Iterator

from engine.plan.plan import StagePlan
from engine.plan.yaml import Problem
from omnivl.chain.demands import TWIN
from omnivl.chain.preparation import asked_fields
from omnivl.data.batch import has_text, has_visual, is_label, visual_of
from omnivl.data.config import entry_keys
from omnivl.data.formats import MEDIA_EXTENSIONS
from omnivl.data.sources.generated import GENERATED
from omnivl.data.sources.glance import BUNDLED

StageRule = Callable[[StagePlan], Iterator[Problem]]


def texts_are_read(stage: StagePlan) -> Iterator[Problem]:
    """``text`` is only allowed for kinds with a text that is not a class name."""
    for index, entry in enumerate(stage.data):
        if entry.text is not None and (is_label(entry.kind) or not has_text(entry.kind)):
            got = f"{entry.text!r} for kind {entry.kind!r}"
            change = "remove it, or choose a kind whose text is no class name, e.g. 'image_text'"
            yield Problem(("data", index, "text"), got, "null", change)


def pictures_fit_the_kind(stage: StagePlan) -> Iterator[Problem]:
    """Kind ``images_text`` needs pictures, other kinds have at most one, texts none; their formats are supported."""
    for index, entry in enumerate(stage.data):
        path, names, visual = ("data", index, "pictures"), list(entry.pictures), visual_of(entry.kind)
        if visual == "set" and not names:
            yield Problem(path, "none for kind 'images_text'", "files of a sample", "add e.g. [left.png, right.png]")
        if visual != "set" and len(names) > (1 if has_visual(entry.kind) else 0):
            allowed = "one at most" if has_visual(entry.kind) else "none"
            yield Problem(path, f"{len(names)} for kind {entry.kind!r}", allowed, "choose kind 'images_text'")
        if names and entry.source in BUNDLED and "images_text" not in GENERATED.get(entry.source, ()):
            yield Problem(path, f"{names} of source {entry.source!r}", "none", "remove them: its samples have one each")
        unread = [name for name in names if "." in name and name.rpartition(".")[2].lower() not in MEDIA_EXTENSIONS]
        if unread:
            change = "name them as they end after the sample's key and a dot"
            allowed = f"names without an extension, or that end in {', '.join(sorted(MEDIA_EXTENSIONS))}"
            yield Problem(path, repr(unread[0]), allowed, change)
        if entry.least_pictures > len(names):
            change = "change it, or name more pictures"
            got = str(entry.least_pictures)
            yield Problem(("data", index, "least_pictures"), got, f"0 to {len(names)}, the pictures named", change)


def objectives_have_their_fields(stage: StagePlan) -> Iterator[Problem]:
    """An entry keeps the fields that its objectives ask for, and has the pictures to which boxes and masks refer."""
    for index, (key, entry) in enumerate(zip(entry_keys(stage.data), stage.data, strict=True)):
        kept = entry.kept_fields
        for name, field in asked_fields(stage.objectives, entry.kind, key).items():
            path = ("data", index, "fields")
            if name not in kept and field.required:
                allowed = f"a mapping with {name!r}, which an objective asks for ({field.kind})"
                change = f"add e.g. {name}: and the field of the samples' JSON that holds it"
                yield Problem(path, f"{', '.join(map(repr, kept)) or 'none'}", allowed, change)
            elif name in kept and (field.kind == "mask") != (kept[name] in entry.field_files):
                allowed = "a file, e.g. mask.png" if field.kind == "mask" else "a field of the samples' JSON"
                got = f"{kept[name]!r}, which is {'no file' if field.kind == 'mask' else 'a file'}"
                yield Problem((*path, name), got, allowed, "name another one")
            elif name in kept and field.kind in ("boxes", "mask") and field.picture >= entry.num_pictures:
                got = f"{kept[name]!r} in picture {field.picture} of {entry.num_pictures}"
                yield Problem((*path, name), got, "a place in a picture of the sample", "choose another kind or field")


def crops_keep_boxes(stage: StagePlan) -> Iterator[Problem]:
    """What a crop shows as a whole is a field with boxes of an entry whose samples have one picture."""
    for index, (key, entry) in enumerate(zip(entry_keys(stage.data), stage.data, strict=True)):
        name = entry.augment.keep
        if name is None:
            continue
        asked = asked_fields(stage.objectives, entry.kind, key)
        boxes = [one for one in entry.kept_fields if one in asked and asked[one].kind == "boxes"]
        if name not in boxes or entry.num_pictures > 1:
            allowed = f"a kept field that an objective reads as boxes: {', '.join(map(repr, boxes)) or 'there is none'}"
            if entry.num_pictures > 1:
                allowed = "null where a sample has several pictures"
            yield Problem(("data", index, "augment", "keep"), repr(name), allowed, "change it, or leave it out")


def second_views_are_seen(stage: StagePlan) -> Iterator[Problem]:
    """A second view is for momentum twins that an objective reads, of pictures of one size, and not place by place."""
    for index, (key, entry) in enumerate(zip(entry_keys(stage.data), stage.data, strict=True)):
        if entry.views == 1:
            continue
        path, got = ("data", index, "views"), str(entry.views)
        asked = {one.key: one.demands_of_kinds.get(entry.kind) for one in stage.objectives if one.acts_on(key)}
        active = {name: demands for name, demands in asked.items() if demands is not None}
        by_place = [name for name, demands in active.items() if TWIN + "visual" in demands.fields]
        if stage.model.native:
            yield Problem(path, f"{got} with model.sizes 'native'", "1 there", "change it, or model.sizes")
        if not has_visual(entry.kind) or not any("visual" in demands.twins for demands in active.values()):
            allowed = "1 where no objective reads what momentum twins see, e.g. univlc with momentum keys"
            yield Problem(path, got, allowed, "change it, or add such an objective")
        elif by_place:
            allowed = f"1 beside objective {by_place[0]!r}, which compares a picture with its twin's place by place"
            yield Problem(path, got, allowed, "change it, or that objective's targets")


SAMPLE_RULES: tuple[StageRule, ...] = (
    texts_are_read,
    pictures_fit_the_kind,
    objectives_have_their_fields,
    crops_keep_boxes,
    second_views_are_seen,
)
