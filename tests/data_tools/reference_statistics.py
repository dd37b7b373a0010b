"""Gopher's, C4's and FineWeb's statistics in plain Python, by their definitions; slow."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

from data_tools.characters import ALONE, character_classes
from data_tools.statistics.lines import TERMINAL, line_classes
from data_tools.statistics.settings import StatisticsSettings

CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
CLOSERS = "\"')]»’”」』）"
FULL_WIDTH = "。．！？｡"

Numbers = dict[str, float | None]


def words_of(text: str, splitter: str) -> list[str]:
    """The words by a splitter's definition."""
    if splitter == "whitespace":
        return text.split()
    words, before = [], ""
    for character in text:
        if unicodedata.category(character)[0] not in "LNM" and character != "_":
            before = ""
            continue
        if not before or is_alone(character) or is_alone(before):
            words.append("")
        words[-1] += character
        before = character
    return words


def is_alone(character: str) -> bool:
    """Whether its script is written without spaces."""
    return bool(character_classes()[ord(character)] & ALONE)


def is_terminal(character: str) -> bool:
    """Whether it ends a sentence."""
    return bool(line_classes()[ord(character)] & TERMINAL)


def lines_of(text: str) -> list[str]:
    """Lines that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def paragraphs_of(text: str) -> list[str]:
    """Runs of lines that are not blank."""
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]


def duplicates(items: Sequence[str]) -> tuple[int, int]:
    """How many equal an earlier one, and their characters."""
    seen: set[str] = set()
    count = size = 0
    for item in items:
        if item in seen:
            count, size = count + 1, size + len(item)
        seen.add(item)
    return count, size


def top_ngram(words: list[str], n: int) -> int:
    """Characters of the most frequent n-gram, spaces between, in all its places."""
    grams = [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return len(gram) * count


def duplicate_ngrams(words: list[str], n: int) -> int:
    """Characters of n-grams that were there before."""
    seen: set[Hashable] = set()
    chars = at = 0
    while at + n <= len(words):
        gram = tuple(words[at : at + n])
        if gram in seen:
            chars += sum(map(len, gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return chars


def share(part: float, whole: float) -> float:
    """A share; of nothing, 0 or what there is."""
    return part / max(1, whole)


def gopher(text: str, settings: StatisticsSettings, language: str | None = None) -> Numbers:
    """Gopher's statistics. Without a language the document has any."""
    words, lines, paragraphs = words_of(text, settings.word_splitter), lines_of(text), paragraphs_of(text)
    listed = settings.stop_words
    stop_words: float | None = None
    if language is None or language in listed:
        wanted = {word for name, some in listed.items() for word in some if language in (None, name)}
        present = set(words)
        stop_words = sum(bool({word, word.capitalize(), word.upper()} & present) for word in wanted)
    same_lines, same_paragraphs = duplicates(lines), duplicates(paragraphs)
    return {
        "gopher_words": len(words),
        "gopher_stop_words": stop_words,
        "gopher_mean_word_length": share(sum(map(len, words)), len(words)),
        "gopher_hash_signs_per_word": share(text.count("#"), len(words)),
        "gopher_ellipses_per_word": share(text.count("...") + text.count("…"), len(words)),
        "gopher_bullet_lines": share(sum(line.lstrip()[0] in "•-" for line in lines), len(lines)),
        "gopher_ellipsis_lines": share(
            sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)
        ),
        "gopher_words_with_letter": share(sum(any(c.isalpha() for c in word) for word in words), len(words)),
        "gopher_duplicate_lines": share(same_lines[0], len(lines)),
        "gopher_duplicate_line_chars": share(same_lines[1], len(text)),
        "gopher_duplicate_paragraphs": share(same_paragraphs[0], len(paragraphs)),
        "gopher_duplicate_paragraph_chars": share(same_paragraphs[1], len(text)),
        **{f"gopher_top_{n}gram_chars": share(top_ngram(words, n), len(text)) for n in (2, 3, 4)},
        **{
            f"gopher_duplicate_{n}gram_chars": share(duplicate_ngrams(words, n), len(text))
            for n in range(5, 11)
        },
    }


def fineweb(text: str, settings: StatisticsSettings) -> Numbers:
    """FineWeb's statistics."""
    lines = lines_of(text)
    return {
        "fineweb_terminal_lines": share(sum(is_terminal(line.rstrip()[-1]) for line in lines), len(lines)),
        "fineweb_short_lines": share(sum(len(line) <= 30 for line in lines), len(lines)),
        "fineweb_duplicate_line_chars": share(duplicates(lines)[1], len(text.replace("\n", ""))),
        "fineweb_newlines_per_word": share(text.count("\n"), len(words_of(text, settings.word_splitter))),
    }


def sentences_in(line: str) -> int:
    """How many sentences a line has: pieces between their ends, and what is left if it is not blank."""
    count = start = at = 0
    while at < len(line):
        if is_terminal(line[at]):
            end = at + 1
            while end < len(line) and (is_terminal(line[end]) or line[end] in CLOSERS):
                end += 1
            marks = [mark for mark in line[at:end] if is_terminal(mark)]
            if end == len(line) or line[end].isspace() or marks[-1] in FULL_WIDTH:
                count, start = count + 1, end
            at = end
        else:
            at += 1
    return count + bool(line[start:].strip())


def small(text: str) -> str:
    """With small ASCII letters."""
    return re.sub("[A-Z]", lambda found: found[0].lower(), text)


def c4(text: str, settings: StatisticsSettings) -> tuple[str, Numbers]:
    """The text as C4's edits leave it, and what they found."""
    rules = ("long_word", "no_terminal", "few_words", "javascript", "policy")
    found: Counter[str] = Counter()
    kept: list[str] = []
    all_chars = 0
    is_after_blank = False
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            is_after_blank = True
            continue
        found["c4_lines"] += 1
        all_chars += len(line)
        if settings.remove_citations and (citations := CITATION.findall(line)):
            found["c4_citations"] += len(citations)
            found["c4_citation_chars"] += sum(map(len, citations))
            line = CITATION.sub("", line)
            stripped = line.strip()
            all_chars -= len(line) - len(stripped)  # white space at the ends counts nowhere
            line = stripped
            if not line:
                continue
        words, plain = line.split(), small(line)
        applies = {
            "long_word": max(map(len, words)) > settings.max_word_chars,
            "no_terminal": not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."),
            "few_words": len(words) < settings.min_line_words,
            "javascript": "javascript" in plain,
            "policy": any(policy in plain for policy in POLICIES),
        }
        is_removed = False
        for rule in rules:
            if applies[rule]:
                found[f"c4_{rule}_lines"] += 1
                found[f"c4_{rule}_chars"] += len(line)
                is_removed = rule in settings.remove_lines
            if is_removed:
                break
            if rule == "few_words":
                found["c4_lorem_ipsum_lines"] += "lorem ipsum" in plain
            if rule == "javascript":
                found["c4_curly_brackets"] += line.count("{")
        if is_removed:
            continue
        found["c4_sentences"] += sentences_in(line)
        found["c4_long_lines"] += len(line) >= 200
        if settings.keep_paragraphs and is_after_blank and kept:
            kept.append("")
        kept.append(line)
        is_after_blank = False
    removed = sum(found[f"c4_{rule}_chars"] for rule in settings.remove_lines) + found["c4_citation_chars"]
    names = ["lines", "citations", "citation_chars", "lorem_ipsum_lines", "curly_brackets", "sentences"]
    names += ["long_lines", *(f"{rule}_{what}" for rule in rules for what in ("lines", "chars"))]
    numbers: Numbers = {f"c4_{name}": found[f"c4_{name}"] for name in names}
    numbers["c4_removed_chars"] = share(removed, all_chars)
    return "\n".join(kept), numbers


def bad_words(text: str, entries: Sequence[str]) -> int:
    """At how many words an entry of a list begins."""

    def split(some: str) -> list[str]:
        return words_of("".join(c if len(c.lower()) > 1 else c.lower() for c in some), "unicode")

    words, wanted = split(text), [split(entry) for entry in entries]
    return sum(any(words[at : at + len(entry)] == entry for entry in wanted) for at in range(len(words)))


def statistics(text: str, settings: StatisticsSettings) -> tuple[str, Numbers]:
    """The edited text and all numbers, in the operation's order."""
    edited, of_c4 = c4(text, settings)
    return edited, {**gopher(text, settings), **of_c4, "c4_bad_words": None, **fineweb(edited, settings)}
