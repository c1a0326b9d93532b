import pytest

from gshard_examples.translation import languages


@pytest.mark.parametrize(
    ("locale", "tag"),
    [
        ("de", "de"),
        ("de_DE.UTF-8", "de"),
        ("pt-BR", "pt"),
        ("sr@latin", "sr_Latn"),
        ("sr_Latn", "sr_Latn"),
        ("sr-el", "sr_Latn"),
        ("sr-Cyrl", "sr"),
        ("sr@ijekavianlatin", "sr_Latn"),
        ("zh_TW", "zh_Hant"),
        ("zh-Hans-CN", "zh"),
        ("zh-hk", "zh_Hant"),
        ("iw", "he"),
        ("no", "nb"),
        ("be@tarask", "be"),
        ("be-tarask", "be"),
        ("az_Arab", "az_Arab"),
        ("pa-TW", "pa"),
        ("en_GB", None),
        ("qqq", None),
        ("tlh", None),
        ("C", None),
        ("", None),
        ("../etc", None),
    ],
)
def test_locales_become_tags(locale, tag):
    assert languages.normalize_language(locale) == tag


def test_tags_are_fixed_points():
    for locale in ("sr@latin", "zh_TW", "kk_Arab", "pt_BR", "iw"):
        tag = languages.normalize_language(locale)
        assert languages.normalize_language(tag) == tag


def test_groups():
    assert languages.family_of("sr_Latn") == "Slavic"
    assert languages.family_of("xx") == "Other"
    assert languages.script_of("sr") == "Cyrl"
    assert languages.script_of("sr_Latn") == "Latn"
    assert languages.script_of("zh_Hant") == "Hani"
    assert languages.script_of("de") == "Latn"
    levels = [languages.resource_level(n) for n in (10_000, 9_999, 999, 0)]
    high, middle, low = languages.RESOURCE_LEVELS
    assert levels == [high, middle, low, low]


def test_own_script():
    assert languages.written_in_own_script("ru", "Открыть PDF")
    assert not languages.written_in_own_script("ru", "Open PDF")
    assert languages.written_in_own_script("ja", "ファイル")
    assert languages.written_in_own_script("de", "Datei")
