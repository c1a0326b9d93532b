"""Language tags: one spelling per language, and the groups that results report on.

Every source of text names languages in its own way: `pt_BR`, `pt-br`, `sr@latin`,
`zh-Hant`, `iw`.  `normalize_language` maps them to one *tag*: an ISO 639 code,
followed by `_Script` only where a language is written in two scripts and this is
the less usual one (`sr_Latn`, `zh_Hant`).  Regions are merged.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

# Retired, private or macro codes -> the code that the rest of the corpus uses.
_ALIASES = {
    "als": "gsw",
    "be_tarask": "be",
    "be_x_old": "be",
    "cmn": "zh",
    "cz": "cs",
    "gug": "gn",
    "iw": "he",
    "in": "id",
    "ji": "yi",
    "jp": "ja",
    "kmr": "ku",
    "no": "nb",
    "pes": "fa",
    "sr_ec": "sr",
    "sr_el": "sr_Latn",
    "tl": "fil",
    "ua": "uk",
    "zh_classical": "lzh",
    "zh_min_nan": "nan",
    "zh_yue": "yue",
}

# Not languages (message documentation, test locales), or constructed ones whose
# catalogues are partly jokes.
_NOT_LANGUAGES = frozenset({"en", "x", "c", "posix", "qqq", "qqx", "und", "mul"})
_CONSTRUCTED = frozenset("avk isv jbo lfn nov qya sjn tlh tok vo".split())

# The usual script of languages that have catalogues in more than one.
_USUAL_SCRIPT = {
    "az": "Latn",
    "be": "Cyrl",
    "crh": "Latn",
    "kk": "Cyrl",
    "ks": "Arab",
    "ku": "Latn",
    "pa": "Guru",
    "sr": "Cyrl",
    "tt": "Cyrl",
    "ug": "Arab",
    "uz": "Latn",
    "zh": "Hans",
}
_SCRIPT_WORDS = {
    "latin": "Latn",
    "cyrillic": "Cyrl",
    "arabic": "Arab",
    "latn": "Latn",
    "cyrl": "Cyrl",
    "arab": "Arab",
    "hant": "Hant",
    "hans": "Hans",
    "guru": "Guru",
    "deva": "Deva",
    "tw": "Hant",
    "hk": "Hant",
    "mo": "Hant",
}

# ISO 15924 script -> how Unicode names its characters.
_SCRIPT_NAMES = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hang": ("HANGUL",),
    "Hani": ("CJK",),
    "Hebr": ("HEBREW",),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA"),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Laoo": ("LAO",),
    "Mlym": ("MALAYALAM",),
    "Mymr": ("MYANMAR",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Thaa": ("THAANA",),
    "Thai": ("THAI",),
    "Tibt": ("TIBETAN",),
}

_SCRIPT_OF = {
    language: script
    for script, languages in {
        "Arab": "ar ary arz azb bal bgn bqi ckb fa glk ks luz mzn pnb ps sd skr ug ur",
        "Armn": "hy hyw",
        "Beng": "as bn",
        "Cyrl": "ab av ba be bg bxr ce crh_Cyrl cv cu inh kbd kk kk kv ky lbe lez mdf "
        "mhr mk mn mrj myv os ru rue sah sr tg tt tyv udm uk xal ady alt kjh krc",
        "Deva": "awa bho brx doi gom hi hne kok mai mr ne new sa",
        "Ethi": "am ti",
        "Geor": "ka xmf",
        "Grek": "el pnt",
        "Gujr": "gu",
        "Guru": "pa",
        "Hang": "ko",
        "Hani": "gan hak lzh wuu yue zh zh_Hant",
        "Hebr": "he yi",
        "Jpan": "ja",
        "Khmr": "km",
        "Knda": "kn tcy",
        "Laoo": "lo",
        "Mlym": "ml",
        "Mymr": "my shn mnw blk",
        "Orya": "or",
        "Sinh": "si",
        "Taml": "ta",
        "Telu": "te",
        "Thaa": "dv",
        "Thai": "th",
        "Tibt": "bo dz",
    }.items()
    for language in languages.split()
}

# Only these are *checked* against the text: for the others of `_SCRIPT_OF` both
# scripts occur under the one tag.
_UNCHECKED_SCRIPTS = frozenset("crh_Cyrl kbd ks luz new pnt tcy bal inh".split())

_FAMILY_OF = {
    language: family
    for family, languages in {
        "Germanic": "af bar da de fo frr fy gsw is ksh lb li nb nds nl nn pdc pfl sco "
        "stq sv vls yi zea",
        "Romance": "an ast ca co es ext frp fr fur gl ia it lad lij lld lmo mwl nap oc "
        "pcd pms pt rm rgn ro roa rup sc scn vec wa",
        "Slavic": "be bg bs cs csb cu dsb hr hsb mk pl ru rue sh sk sl sr szl uk",
        "Baltic": "lt ltg lv sgs",
        "Celtic": "br cy ga gd gv kw",
        "Hellenic, Albanian, Armenian": "el hy hyw pnt sq aln",
        "Indo-Aryan": "as awa bh bho bn brx doi dv gom gu hi hif hne kok ks mai mr ne "
        "new or pa pnb rmy sa sd si skr ur",
        "Iranian": "azb bal bgn bqi ckb diq fa glk ku mzn os ps tg zza luz tly",
        "Turkic": "alt az ba crh cv gag kaa kk kjh krc ky sah tk tr tt tyv ug uz",
        "Uralic": "et fi fit fkv hu kv krl liv lud mdf mhr mrj myv olo se sma smn udm "
        "vep vro",
        "Semitic": "am ar arc ary arz he mt ti",
        "Dravidian": "kn ml ta tcy te",
        "Sino-Tibetan": "bo dz gan hak lzh mni my nan wuu yue zh blk",
        "Japonic, Koreanic": "ja ko",
        "Tai, Austroasiatic": "km lo mnw shn th vi za",
        "Austronesian": "ace ban bcl bjn bug ceb ch fil fj gor haw id ilo jv krj mad "
        "map mg mh mi min ms na pag pam sm su tet to ty war pwn ami tay szy trv",
        "Niger-Congo": "ak bm ee ff fon gur ig ki kg lg ln nso ny rn rw sg sn ss st sw "
        "tn ts tw ve wo xh yo zu tum igl dag",
        "Other Afro-Asiatic": "ha kab om rif shi so zgh",
        "Caucasian": "ab av ce inh ka kbd lbe lez xmf ady",
        "Mongolic": "bxr mn xal",
        "American": "ay chr cho gn ht iu ik kl nah nv qu quc yua arn",
        "Basque and constructed": "eo eu ie io",
    }.items()
    for language in languages.split()
}

#: Names of the resource levels, the richest first; see `resource_level`.
RESOURCE_LEVELS = ("high (>= 10,000)", "middle (1,000-9,999)", "low (< 1,000)")

_TAG = re.compile(r"[a-z]{2,3}(_[A-Z][a-z]{3})?")


def normalize_language(locale: str) -> str | None:
    """Maps a source's locale name to the corpus's language tag.

    Args:
        locale: A locale name as found in the wild, such as `"pt_BR"`, `"pt-br"`,
            `"sr@latin"`, `"zh-Hant"`, `"de_DE.UTF-8"`.

    Returns:
        The tag, such as `"pt"`, `"sr_Latn"`, `"zh_Hant"`, `"de"`, or None when
        the locale is English, a constructed language or no language at all.
    """
    code, _, modifier = locale.replace("-", "_").partition("@")
    code = code.partition(".")[0].lower()
    modifier = modifier.partition(".")[0].lower()
    parts = code.split("_")
    base = _ALIASES.get(code) or _ALIASES.get(parts[0], parts[0])
    if base in _NOT_LANGUAGES or base in _CONSTRUCTED or not _TAG.fullmatch(base):
        return None
    if "_" in base:  # an alias that names its script already
        return base
    usual = _USUAL_SCRIPT.get(base)
    if usual is None:
        return base
    # Serbian has "ijekavianlatin" besides "latin".
    modifier = "latin" if modifier.endswith("latin") else modifier
    for word in (*parts[1:], modifier):
        script = _SCRIPT_WORDS.get(word)
        # "hk" and the like mean a script for Chinese only.
        if script and (base == "zh" or word not in ("tw", "hk", "mo")):
            return base if script == usual else f"{base}_{script}"
    return base


def base_language(tag: str) -> str:
    """Returns the language of a tag without its script: `"sr_Latn"` -> `"sr"`."""
    return tag.partition("_")[0]


def is_tag(text: str) -> bool:
    """Says whether `text` has the form of a language tag (`xx`, `xxx_Script`)."""
    return _TAG.fullmatch(text) is not None


def check_tags(tags: Sequence[str], known: Sequence[str], whose: str) -> None:
    """Checks language tags that somebody gave.

    Args:
        tags: What was given.
        known: The tags that there are.
        whose: What they are the languages of, for the error: `"vocabulary"`.

    Raises:
        ValueError: One is not known; the nearest ones are named.
    """
    there = set(known)
    for tag in dict.fromkeys(tags):
        if tag in there:
            continue
        language = base_language(normalize_language(tag) or tag)
        near = [k for k in known if base_language(k) == language]
        near += difflib.get_close_matches(tag, known, n=5, cutoff=0.5)
        near += [k for k in known if k[:1] == tag[:1]]
        near = list(dict.fromkeys(near))
        shape = "" if is_tag(tag) else " (tags look like de or sr_Latn)"
        hint = f"; near it: {', '.join(near[:5])}" if near else ""
        raise ValueError(
            f"a tag of one of the {len(there)} languages of this {whose} was "
            f"expected{shape}{hint}. Received: {tag!r}"
        )


def script_of(tag: str) -> str:
    """Returns the ISO 15924 script that a tag is written in; `"Latn"` by default."""
    if tag in _SCRIPT_OF:
        return _SCRIPT_OF[tag]
    base, _, script = tag.partition("_")
    if script:
        return {"Hans": "Hani", "Hant": "Hani"}.get(script, script)
    return _SCRIPT_OF.get(base, "Latn")


def family_of(tag: str) -> str:
    """Returns the language family (or branch) of a tag; `"Other"` when not listed."""
    return _FAMILY_OF.get(base_language(tag), "Other")


def resource_level(train_pairs: int) -> str:
    """Returns the resource level of a language with so many training pairs.

    The bounds are absolute (10,000 and 1,000 pairs), so that a level means the same in
    every corpus.
    """
    if train_pairs >= 10_000:
        return RESOURCE_LEVELS[0]
    if train_pairs >= 1_000:
        return RESOURCE_LEVELS[1]
    return RESOURCE_LEVELS[2]


def written_in_own_script(tag: str, text: str) -> bool:
    """Says whether `text` has at least one letter of the language's own script.

    A catalogue entry without one is nearly always an untranslated message.  Languages
    in Latin script, and those that this module knows no single script for, always pass.
    """
    script = _SCRIPT_OF.get(tag)
    if script is None or tag in _UNCHECKED_SCRIPTS:
        return True
    names = _SCRIPT_NAMES[script]
    return any(
        ord(character) > 0x36F and unicodedata.name(character, "").startswith(names)
        for character in text
    )
