"""The public data sets that have a command of their own: a reader in a file, and a line here."""

from omnivl.data.convert.coco import CocoReader
from omnivl.data.convert.entities import EntitiesReader
from omnivl.data.convert.form import FormReader
from omnivl.data.convert.genome import GenomeQuestionsReader, GenomeRegionsReader
from omnivl.data.convert.gqa import GqaReader
from omnivl.data.convert.kinetics import KineticsReader
from omnivl.data.convert.mosi import MosiReader
from omnivl.data.convert.nlvr2 import Nlvr2Reader
from omnivl.data.convert.paragraphs import ParagraphsReader
from omnivl.data.convert.refcoco import RefCocoReader
from omnivl.data.convert.regions import RegionsReader
from omnivl.data.convert.snli_ve import SnliVeReader
from omnivl.data.convert.ssv2 import SSv2Reader
from omnivl.data.convert.vcr import VcrReader
from omnivl.data.convert.video_questions import VideoQuestionsReader
from omnivl.data.convert.videos import ActivityNetReader, DidemoReader, MsrVttReader, MsvdReader
from omnivl.data.convert.violin import ViolinReader
from omnivl.data.convert.visdial import VisDialReader
from omnivl.data.convert.vqa import VqaReader

FORMS: tuple[type[FormReader], ...] = (
    CocoReader,
    ParagraphsReader,
    GenomeRegionsReader,
    RegionsReader,
    VqaReader,
    GqaReader,
    GenomeQuestionsReader,
    Nlvr2Reader,
    SnliVeReader,
    VcrReader,
    VisDialReader,
    RefCocoReader,
    EntitiesReader,
    KineticsReader,
    SSv2Reader,
    MsrVttReader,
    MsvdReader,
    DidemoReader,
    ActivityNetReader,
    VideoQuestionsReader,
    ViolinReader,
    MosiReader,
)
