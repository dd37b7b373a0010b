"""Statistics of documents that quality filters look at: Gopher, C4, FineWeb. Judged in `data_tools.filter`.

Words shared by all of them:

word       by the setting `word_splitter`; thresholds only mean something together with it.
           `whitespace`: runs of characters that are not white space (`str.split`).
           `unicode`: runs of letters, numbers, marks and "_"; a character of a script written without
           spaces is a word by itself.
           datatrove splits with spaCy, whose words include each comma and bracket: its share of words
           with a letter is lower than what the papers' thresholds were set for.
line       what lies between "\\n", if it is not only white space. Counted and compared with its
           spaces, as FineWeb does. datatrove's Gopher also counts blank lines.
paragraph  lines with no blank line between them.
character  a code point; shares of characters are of all of the text's, white space and all.
share      of nothing is 0: an empty text has 0 duplicates, and 0 words with a letter.

Words, lines and paragraphs are compared by 64-bit hashes: in a document of a million words, two different
ones are taken for the same once in 10^7 documents.
"""
