"""What is personal data and what only looks like it: each kind's form, checksum and exceptions.

A candidate is judged with a few bytes around it. Expressions are bounded in what they repeat.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from data_tools.pii_candidates import ADDRESS, HEXADECIMAL, NUMBER, TOKEN

KINDS = ("key", "email", "iban", "card", "ip", "phone")  # of two that overlap the first kind is masked


class Span(NamedTuple):
    """Bytes to be masked."""

    start: int
    end: int
    kind: str


def judge(text: bytes, low: int, high: int, start: int, end: int, what: int) -> Iterator[Span]:
    """The personal data in a candidate [start, end) of the document [low, high) of `text`."""
    if what == ADDRESS:
        yield from _email(text, start, end)
    elif what == NUMBER:
        around = max(low, start - CONTEXT)
        window = text[around : min(high, end + 2)]
        for found in _numbers(window, start - around, end - around):
            yield Span(around + found.start, around + found.end, found.kind)
    elif what == HEXADECIMAL:
        yield from _ipv6(text, start, end)
    elif what == TOKEN:
        yield from _token(text, start, end, high)
    else:
        yield from _secret(text[max(low, start - CONTEXT) : start], text[start:end], start)


CONTEXT = 40

# e-mail -------------------------------------------------------------------------------------------

_EMAIL = re.compile(
    rb"[A-Za-z0-9_](?:[A-Za-z0-9_%+'-]|\.(?!\.)){0,63}(?<!\.)@"
    rb"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
    # A capital after small letters begins something else, such as the next word.
    rb"(?:((?:[A-Z]?[a-z]{2,24}|[A-Z]{2,24})(?=[A-Z]|\Z))|([A-Za-z]{2,24})\Z)"
)
# RFC 2606 and 6761 reserve these for examples.
_RESERVED_DOMAIN = re.compile(
    rb"(?i)@(?:.*\.)?(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|localdomain|local)$"
)
# name@2x.png, getty@tty1.service: files and units, not addresses.
_FILE_SUFFIXES = frozenset(
    b"png jpg jpeg gif svg webp bmp ico pdf css js json html xml txt zip gz tar exe dll so conf yaml toml "
    b"service socket timer target mount slice device scope path".split()
)


def _email(text: bytes, start: int, end: int) -> Iterator[Span]:
    # Marks before an address and the end of a sentence are not part of it.
    found = text[start:end].rstrip(b".-")
    skipped = len(found) - len(found.lstrip(b".%+'-"))
    match = _EMAIL.match(found, skipped)
    if match is None or _RESERVED_DOMAIN.search(match[0]):
        return
    if (match[1] or match[2]).lower() not in _FILE_SUFFIXES:
        yield Span(start + skipped, start + match.end(), "email")


# numbers ------------------------------------------------------------------------------------------

_IPV4 = re.compile(rb"(?<![\w.+])(?<![A-Za-z]-)(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d|-\d+(?![\d.]))")
_VERSION = re.compile(
    rb"(?i)(?<![a-z])(?:version|release|revision|firmware|build|driver|section|sections|chapter|table"
    rb"|figure|clause|rev|ver|sec|\xc2\xa7)[\s.:=,v\"'(]{0,4}$"
)
_CARD = re.compile(
    rb"(?<![\w.,+=/-])(?<!\d[ ])"
    rb"(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{4,5})"
    rb"(?![\w=/+-]|[.,]\d|[ ]\d)"
)
_INTERNATIONAL = re.compile(
    # Digits are taken whole ("+"): to try every way to divide a hundred of them would take hours.
    rb"(?<![\w+.)\]-])\+(?=[1-9])\d{1,4}+"
    rb"(?:(?:[ .-]|\)? ?\(|\) ?|/)?\d{1,12}+){1,8}(?!\w|\.\d)"
)
_NORTH_AMERICAN = re.compile(
    rb"(?<![\w.+/-])(?<!\d[ ])(?:1[ .-])?"
    rb"(?:\([2-9]\d\d\)[ ]?[2-9]\d\d[ .-]\d{4}|[2-9]\d\d([.-])[2-9]\d\d\1\d{4})(?![\w/-]|\.\d)"
)
_CUE = re.compile(
    r"(?<![A-Za-z])(?:tel|telephone|phone|fax|mobile|tél|téléphone|telefon|telefono|teléfono|telefax|handy"
    r"|电话|電話|手机|传真|тел|телефон|факс)(?:[.:：#()]| |number|no|nr|is){0,4}$".encode(),
    re.IGNORECASE,
)
_CUED = re.compile(rb"[+(]{0,2}\d(?:[ ./()-]{0,2}\d){6,14}(?!\w|\.\d)")
_DATE = re.compile(rb"(?:19|20)\d\d([-/. ])\d\d?\1\d\d?|\d\d?([-/.])\d\d?\2(?:19|20)\d\d")


def _numbers(window: bytes, start: int, end: int) -> Iterator[Span]:
    """What is in a phrase of digits and separators, with its context before it."""
    first = max(start - 2, 0)
    phrase = window[start:end]
    if phrase.count(b".") >= 3:
        for match in _IPV4.finditer(window, first):
            if _is_public_ipv4(match[0]) and not _VERSION.search(window[: match.start()]):
                yield Span(*match.span(), "ip")
    if len(phrase) >= 13:
        for match in _CARD.finditer(window, first):
            if _is_card(re.sub(rb"\D", b"", match[0])):
                yield Span(*match.span(), "card")
    if window[first:start].rstrip(b"(").endswith(b"+") or b"+" in phrase:
        for match in _INTERNATIONAL.finditer(window, first):
            if (length := _phone_length(match[0])) is not None:
                yield Span(match.start(), match.start() + length, "phone")
    for match in _NORTH_AMERICAN.finditer(window, first):
        yield Span(*match.span(), "phone")
    opened = len(window[:start].rstrip(b"+("))
    if _CUE.search(window[:opened]) and (found := _CUED.match(window, opened)) and not _DATE.match(phrase):
        yield Span(*found.span(), "phone")


def _phone_length(found: bytes) -> int | None:
    """Bytes of an international number that E.164 can hold: ended between groups of digits."""
    groups = list(re.finditer(rb"\d+", found))
    digits, length = b"", None
    for group in groups:
        digits += group[0]
        is_complete = len(digits) == 11 if digits[:1] == b"1" else 9 <= len(digits) <= 15
        if is_complete and (len(groups) > 1 or len(digits) >= 11):
            length = group.end()
    if length is None or (digits[:1] == b"1" and not re.match(rb"1[2-9]\d\d[2-9]", digits)):
        return None
    return length


def _is_card(digits: bytes) -> bool:
    """Issuer, length and Luhn's check digit (ISO/IEC 7812)."""
    size, two, four = len(digits), int(digits[:2]), int(digits[:4])
    issued = (
        (digits[:1] == b"4" and size in (13, 16, 19))
        or (size == 16 and (51 <= two <= 55 or 2221 <= four <= 2720))
        or (size == 15 and two in (34, 37))
        or (size == 16 and (four == 6011 or two == 65 or 6440 <= four <= 6499 or 3528 <= four <= 3589))
        or (size == 14 and (two in (36, 38) or 3000 <= four <= 3059))
        or (16 <= size <= 19 and two == 62)
    )
    if not issued:  # of equal digits alone none passes the check below
        return False
    odd = sum(digits[-1::-2]) - 48 * len(digits[-1::-2])
    even = sum((2 * (digit - 48)) // 10 + (2 * (digit - 48)) % 10 for digit in digits[-2::-2])
    return (odd + even) % 10 == 0


# IP addresses -------------------------------------------------------------------------------------

# IANA's special-purpose address registries (RFC 6890): not of one machine on the internet.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/3", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        ),
    )
)
_SMALL = 64  # all four numbers are below in 1 of 256 addresses, and in nearly every section number
_IPV6_SPACE = ipaddress.ip_network("2000::/3")  # all that is given to anyone


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is of a machine on the internet: not private, reserved, multicast, for examples."""
    if address.version == 6 and address not in _IPV6_SPACE:
        return False
    return not any(address in network for network in _NOT_PUBLIC if network.version == address.version)


def _is_public_ipv4(found: bytes) -> bool:
    """Not four small numbers either: those number sections and versions, or are well-known name servers."""
    try:
        address = ipaddress.IPv4Address(found.decode())
    except ValueError:
        return False
    return max(address.packed) >= _SMALL and is_public(address)


def _ipv6(text: bytes, start: int, end: int) -> Iterator[Span]:
    found = text[start:end].rstrip(b".")
    if found.endswith(b":") and not found.endswith(b"::"):
        found = found[:-1]
    try:
        # Two groups at least: "in 2004::" ends a sentence.
        if found.count(b":") >= 2 and len(found) > 6 and is_public(ipaddress.IPv6Address(found.decode())):
            yield Span(start, start + len(found), "ip")
    except ValueError:
        pass


# accounts and keys --------------------------------------------------------------------------------

# Characters of an IBAN by country (ISO 13616, SWIFT's registry).
_IBAN_COUNTRIES = (
    *("15 NO", "16 BE", "18 DK FI FO GL NL SD", "19 MK SI", "20 AT BA EE KZ LT LU MN XK", "21 CH HR LI LV"),
    *("22 BG BH CR DE GB GE IE ME RS VA", "23 AE GI IL IQ OM SO TL", "24 AD CZ ES MD PK RO SA SE SK TN VG"),
    *("25 LY PT ST", "26 IS TR", "27 BI DJ FR GR IT MC MR SM", "28 AL AZ BY CY DO GT HU LB NI PL SV"),
    *("29 BR EG PS QA UA", "30 JO KW MU YE", "31 MT SC", "32 LC", "33 RU"),
)
_IBAN_SIZES = {country: int(line[:2]) for line in _IBAN_COUNTRIES for country in line[3:].split()}
_IBAN = re.compile(rb"([A-Z]{2})\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?")
_KEY = re.compile(
    rb"A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])"
    rb"|gh[pousr]_[A-Za-z0-9]{36,251}(?![A-Za-z0-9])"
    rb"|github_pat_[A-Za-z0-9_]{22,255}"
    rb"|glpat-[A-Za-z0-9_-]{20,64}"
    rb"|npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"
    rb"|hf_[A-Za-z0-9]{34,40}(?![A-Za-z0-9_])"
    rb"|[srp]k_(?:live|test)_[A-Za-z0-9]{16,128}"
    rb"|xox[abeoprs]-[A-Za-z0-9-]{10,255}"
    rb"|AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"
    rb"|eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,2000}(?:\.[A-Za-z0-9_-]{0,2000})?"
)
_SK = re.compile(rb"sk-[A-Za-z0-9_-]{20,255}")
_PRIVATE_KEY = re.compile(
    rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:\s{0,4}[A-Za-z-]{1,40}: [^\n]{0,200}\n){0,9}"
    rb"[A-Za-z0-9+/=\s\\]{32,16384}(?:-----END [A-Z0-9 ]{0,60}-----)?"
)
_SECRET_NAME = re.compile(
    rb"(?i)(?:(?:api|access|auth|secret|private|client|account|encryption|signing)[_ -]?"
    rb"(?:access[_ -]?)?(?:key|token|secret)|passw(?:or)?d|secret|token)"
    rb"[\"']?\s{0,3}(?:=>|:=|=|:)\s{0,3}[\"'`]?$"
)
_MIN_ENTROPY = 3.5  # bits a character; words and paths have fewer or lack a digit or a capital


def _token(text: bytes, start: int, end: int, high: int) -> Iterator[Span]:
    found = text[start:end]
    if found[:1] == b"-":
        match = _PRIVATE_KEY.match(text, start, high)
    elif found[:2].isupper() and found[2:4].isdigit():
        if (size := _iban_size(found)) is not None:
            yield Span(start, start + size, "iban")
        return
    else:
        match = _KEY.match(text, start, end)
        if match is None and (match := _SK.match(text, start, end)) and not _is_random(match[0]):
            return
    if match:
        yield Span(*match.span(), "key")


def _iban_size(found: bytes) -> int | None:
    """Bytes of the account number at the start, if its country, length and check digits are right."""
    match = _IBAN.match(found)
    size = _IBAN_SIZES.get(match[1].decode()) if match else None
    if match is None or size is None:
        return None
    taken, place = 0, 0
    while taken < size and place < len(match[0]):
        taken += match[0][place] != 0x20
        place += 1
    behind = found[place : place + 1]
    if taken < size or behind.isalnum() or behind == b"_":
        return None
    account = match[0][:place].replace(b" ", b"").decode()
    turned = "".join(str(int(character, 36)) for character in account[4:] + account[:4])
    return place if int(turned) % 97 == 1 else None


def _secret(before: bytes, value: bytes, start: int) -> Iterator[Span]:
    """A random value that is assigned to a name such as api_key."""
    if _SECRET_NAME.search(before) and _is_random(value):
        yield Span(start, start + len(value.rstrip(b".-")), "key")


def _is_random(value: bytes) -> bool:
    if not (re.search(rb"[a-z]", value) and re.search(rb"[A-Z]", value) and re.search(rb"\d", value)):
        return False
    counts = Counter(value).values()
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
    return entropy >= _MIN_ENTROPY
