"""The sources that draw their samples, by name, with the kinds of samples that each makes."""

from collections.abc import Mapping

from omnivl.data.batch import DATA_KINDS, DataKind, is_video

GENERATED: Mapping[str, tuple[DataKind, ...]] = {
    "motion": tuple(kind for kind in DATA_KINDS if is_video(kind)),
    "questions": ("image_text",),
    "scenes": ("image_text", "image", "images_text", "video_text", "video"),
}
"""The first kind is what a source makes where nothing else is said."""
