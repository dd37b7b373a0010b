"""Text from wherever it lies: files, folders, tables, web archives, source code, Hugging Face datasets.

`Corpus` streams documents; `data_tools.ingest.step` makes parts of them for the steps that follow. Both read
through the same readers.
"""

from data_tools.ingest.corpus import Corpus, Counts, TextDocument
from data_tools.ingest.settings import IngestSettings, SourceSettings
from data_tools.ingest.stdlib import STDLIB

__all__ = ["STDLIB", "Corpus", "Counts", "IngestSettings", "SourceSettings", "TextDocument"]
