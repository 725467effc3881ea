"""The public data sets that have a command of their own: a reader in a file, and a line here."""

from omnivl.data.convert.coco import CocoReader
from omnivl.data.convert.form import FormReader
from omnivl.data.convert.kinetics import KineticsReader
from omnivl.data.convert.refcoco import RefCocoReader
from omnivl.data.convert.ssv2 import SSv2Reader
from omnivl.data.convert.vqa import VqaReader

FORMS: tuple[type[FormReader], ...] = (
    CocoReader,
    VqaReader,
    RefCocoReader,
    KineticsReader,
    SSv2Reader,
)
