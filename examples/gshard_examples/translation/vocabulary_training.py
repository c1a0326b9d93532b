"""Training the subword vocabulary that all languages share.

Ids 0 to 3 are padding, unknown, beginning and end of sequence.  Then come one symbol
per source language (`<de>`), which opens every source sequence and tells the model
what it reads, and the placeholders `{1}` to `{9}`, which are never cut in pieces.

Language symbols are *control* symbols of SentencePiece: they have an id, but no text
becomes that id.  A sentence that contains the characters `<de>` is cut into ordinary
pieces, so the user's text can't pose as a tag.
"""

from __future__ import annotations

import io
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.package_files import missing_packages
from gshard_examples.translation.temperature import temperature_shares
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

PAD, UNK, BOS, EOS = 0, 1, 2, 3
_SPECIAL_NAMES = ("pad", "unk", "s", "/s")
PLACEHOLDERS = tuple(f"{{{number}}}" for number in range(1, 10))
MODEL_TYPES = ("bpe", "unigram")


def language_symbol(tag: str) -> str:
    """Returns the vocabulary's symbol of a language tag: `"de"` -> `"<de>"`."""
    return f"<{tag}>"


# -------------------------------------------------------------------------- training


def training_text(
    pairs: Iterable[Pair],
    temperature: float = 5.0,
    sentences: int = 300_000,
    seed: int = 0,
) -> Iterator[str]:
    """Yields what the vocabulary is trained on.

    That is every distinct English message, and sources with temperature-sampled
    languages; a small language's sources may come more than once, up to five times.

    Args:
        pairs: Training pairs.
        temperature: See `temperature.temperature_shares`.
        sentences: How many sources to draw, about.
        seed: Decides which.
    """
    sources, english = defaultdict(list), set()
    for pair in pairs:
        sources[pair.lang].append(pair.source)
        english.add(pair.english)
    shares = temperature_shares({t: len(s) for t, s in sources.items()}, temperature)
    yield from sorted(english)
    for tag in sorted(sources):
        lines = sorted(sources[tag])
        generator = np.random.default_rng([seed, *tag.encode()])
        count = min(round(shares[tag] * sentences), 5 * len(lines))
        for _ in range(count // len(lines)):
            yield from lines
        rest = generator.permutation(len(lines))[: count % len(lines)]
        for index in np.sort(rest):
            yield lines[index]


#: A byte-order mark, which Windows puts before a file's text, is left out. Else what
#: goes in must come out: "…" stays "…". The corpus is in NFC, and
#: `vocabulary.Vocabulary` puts the text it is given in NFC too. (Without any rule
#: TensorFlow Text says so on standard error, whenever it loads the vocabulary.)
_NORMALIZATION = "FEFF\t\n"


def train_vocabulary(
    corpus: Corpus,
    path: str | Path,
    size: int = 16_000,
    model_type: str = "bpe",
    temperature: float = 5.0,
    sentences: int = 300_000,
    character_coverage: float = 0.9995,
    seed: int = 0,
    languages: Iterable[str] | None = None,
) -> Path:
    """Trains a SentencePiece model on a corpus's training split.

    Two runs give the same bytes.  The file is the vocabulary: keep it beside every
    checkpoint, because one trained again from newer packages has other ids.

    Args:
        corpus: The corpus.
        path: The `.model` file to write; never seen half-written.
        size: Number of symbols in all. A hundred languages need some thousands for
            their characters alone: 8,000 is the least sensible, 32,000 is good for
            long training.
        model_type: `"bpe"`, which trains in seconds, or `"unigram"`, which takes
            ten times longer and gives slightly shorter sequences.
        temperature: See `temperature.temperature_shares`.
        sentences: Number of source sentences to train on, about.
        character_coverage: Share of the text whose characters get a symbol each; the
            others are spelt in bytes. Lower it (0.99) for small vocabularies, whose
            symbols Chinese characters would otherwise eat up.
        seed: Decides which sentences are used.
        languages: The language tags that get a symbol, and that the text is drawn
            from; those of the training split by default.

    Returns:
        `path`.

    Raises:
        ValueError: An option is wrong, or `size` cannot hold the characters.
        MissingPackageError: sentencepiece is not installed.
    """
    path = local_path(path)  # before the work
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as messages
    except ImportError as error:
        raise missing_packages(
            ["sentencepiece"], "vocabularies are trained with it"
        ) from error
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_type must be one of {', '.join(MODEL_TYPES)}. Received: "
            f"model_type={model_type!r}"
        )
    present = corpus.languages("train")
    tags = sorted(present if languages is None else set(languages))
    for tag in tags:
        if tag not in present:
            raise ValueError(
                f"the corpus has no training pair in this language. Received: "
                f"languages with {tag!r}"
            )
    # "<pad>" can't be both padding and the language Paumari; nobody has met it yet.
    clash = sorted(set(tags) & set(_SPECIAL_NAMES))
    if clash:
        raise ValueError(f"these tags name special symbols. Received: {clash}")
    kept = set(tags)
    pairs = (pair for pair in corpus.iterate("train") if pair.lang in kept)
    model = io.BytesIO()
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
            rules.write(_NORMALIZATION)
            rules.flush()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=training_text(pairs, temperature, sentences, seed),
                model_writer=model,
                vocab_size=size,
                model_type=model_type,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_tsv=rules.name,
                control_symbols=[language_symbol(tag) for tag in tags],
                user_defined_symbols=list(PLACEHOLDERS),
                pad_id=PAD,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                pad_piece="<pad>",
                unk_piece="<unk>",
                bos_piece="<s>",
                eos_piece="</s>",
                max_sentence_length=8_000,  # bytes
                num_threads=1,  # float sums in another order would be another model
                minloglevel=2,
            )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"SentencePiece could not train on this: {error}. Received: size={size}, "
            f"character_coverage={character_coverage}, languages={len(tags)}"
        ) from error
    # protobuf makes the class when the module is imported.
    kind = messages.ModelProto  # type: ignore[attr-defined]
    trained = kind.FromString(model.getvalue())
    trained.normalizer_spec.ClearField("normalization_rule_tsv")  # its name is random
    write_file(path, trained.SerializeToString(deterministic=True))
    return path
