"""Converters of common data set forms into tar shards; one file per form."""

from omnivl.data.convert.coco import CocoReader
from omnivl.data.convert.entry import Entry, Reader
from omnivl.data.convert.folder import FolderReader
from omnivl.data.convert.form import FormReader
from omnivl.data.convert.forms import FORMS
from omnivl.data.convert.kinetics import KineticsReader
from omnivl.data.convert.run import ConvertOptions, convert
from omnivl.data.convert.shards import Manifest, ShardSummary
from omnivl.data.convert.ssv2 import SSv2Reader
from omnivl.data.convert.table import TableReader
from omnivl.data.convert.vqa import VqaReader

__all__ = [
    "FORMS",
    "CocoReader",
    "ConvertOptions",
    "Entry",
    "FolderReader",
    "FormReader",
    "KineticsReader",
    "Manifest",
    "Reader",
    "SSv2Reader",
    "ShardSummary",
    "TableReader",
    "VqaReader",
    "convert",
]
