"""Captions to token ids: cleaning of web text, and sentencepiece vocabularies in T5's conventions."""

import html
import io
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from data_pipeline.atomic import write_bytes

CLEANING_VERSION = 1  # part of the hash of a text encoder: raise it whenever `clean_caption` gives other text

_QUOTES = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`", "'")
    | {"\u2581": " "}  # sentencepiece's own mark of a space
)
_ESCAPED_AMPERSANDS = re.compile(r"&(?:(?:amp|#0*38|#[xX]0*26);)+")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_PLACEHOLDER = re.compile(r"<(person)>", re.IGNORECASE)  # how CC12M writes names it removed
_MARKUP = re.compile(r"<!--.*?-->|<(script|style)\b[^>]*>.*?</\1\s*>|</?[A-Za-z][^<>]*>", re.IGNORECASE | re.DOTALL)
_ADDRESS = re.compile(
    r"""(?:\bhttps?://|\bftp://|\bwww\.)[^\s<>"]*[^\s<>"'.,;:!?)\]}]  # with a scheme or www.
    | (?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.-]*\w  # e-mail
    | (?<![\w.@-])(?:[\w-]+\.)+(?:com|net|org|edu|gov)\b(?:/[^\s<>"]*)?  # example.com/page""",
    re.IGNORECASE | re.VERBOSE,
)
# Control characters, invisible formatting and lone surrogates;
# not the zero-width joiners, which emoji and Persian need.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)
_ModelProto: Any = vars(sentencepiece_model_pb2)["ModelProto"]  # built at import, so type checkers miss it
_SEED_WORDS = 20_000  # words whose parts are proposed as pieces: bounds the memory on web captions
_SEED_LENGTH = 16  # sentencepiece's longest piece


def clean_caption(text: str, *, lower_case: bool = False) -> str:
    """Web text to a plain one-line caption; cleaning a clean caption changes nothing.

    HTML entities become characters; tags, comments, links and e-mail addresses become spaces; quotation marks
    become ' and "; Unicode is normalised to NFKC (as T5's own vocabulary does); control and invisible
    characters go; white space collapses to single spaces.

    Case is kept: T5's vocabulary is cased, and case tells names and lettering ("a sign that says STOP") from
    words. The published NAR models were trained on lower-cased captions, which is `lower_case=True`.
    """
    while (cleaned := _clean_once(text, lower_case)) != text:  # unescaping may uncover a tag, and so on
        text = cleaned
    return text


def _clean_once(text: str, lower_case: bool) -> str:
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES))
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), _ESCAPED_AMPERSANDS.sub("&", text))
    if "<" in text:
        text = _MARKUP.sub(" ", _PLACEHOLDER.sub(r"\1", text))
    if "." in text or "/" in text:
        text = _ADDRESS.sub(" ", text)
    text = _INVISIBLE.sub("", text)
    return " ".join((text.lower() if lower_case else text).split())


def train_sentencepiece(
    captions: Iterable[str], vocab_size: int, out_file: str | Path, *, lower_case: bool = False
) -> None:
    """Train a unigram vocabulary on cleaned captions and write it as a sentencepiece model.

    Pad, end of sentence and unknown are 0, 1 and 2, as T5's. Characters outside the vocabulary are spelled in
    UTF-8 bytes (256 of the `vocab_size` pieces), so no text is lost. Frequent words become whole pieces as
    far as the size allows. The result depends only on the captions and the size, not on the captions' order.
    The method is that of arXiv 1804.10959.

    Raises:
        ValueError: no words in the captions, or a `vocab_size` that they cannot fill or that cannot
            hold their letters; the message gives the largest or smallest possible.
    """
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(clean_caption(caption, lower_case=lower_case).split())
    # The trainer marks unknown characters by U+2585 and skips words with it; bytes still spell them later.
    counts = sorted((word, count) for word, count in words.items() if "\u2585" not in word)
    if not counts:
        raise ValueError("a vocabulary needs captions to learn from, but none of the captions holds a word")
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds.tsv"
        _write_seeds(counts, seeds)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(f"{word}\t{count}" for word, count in counts),
                input_format="tsv",
                seed_sentencepieces_file=str(seeds),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                byte_fallback=True,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                max_sentence_length=1 << 30,  # longer words would be skipped
                max_sentencepiece_length=_SEED_LENGTH,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(_explain_training_error(str(error), vocab_size, len(counts))) from error
    proto: Any = _ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # a temporary path, other each time
    write_bytes(Path(out_file), proto.SerializeToString(deterministic=True))


def _write_seeds(counts: list[tuple[str, int]], out_file: Path) -> None:
    """Every part of the most frequent words with its count, as candidates for pieces.

    The trainer's own candidates are the strings that occur in at least two distinct words, so that of a small
    closed set of captions "photo" would be spelled in letters, and captions would be twice as long.
    """
    seeds: Counter[str] = Counter()
    for word, count in sorted(counts, key=lambda item: (-item[1], item[0]))[:_SEED_WORDS]:
        marked = f"\u2581{word}"
        for start in range(len(marked)):
            for end in range(start + 2, min(len(marked), start + _SEED_LENGTH) + 1):
                seeds[marked[start:end]] += count
    ranked = sorted(seeds.items(), key=lambda item: (-item[1] * len(item[0]), item[0]))
    out_file.write_text("".join(f"{piece}\t{count}\n" for piece, count in ranked), encoding="utf-8")


def _explain_training_error(message: str, vocab_size: int, words: int) -> str:
    if largest := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is more than the captions, with {words} distinct words, can fill: "
            f"the largest possible is {largest[1]}"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} cannot hold 256 bytes, 3 special pieces and the captions' letters: "
            f"the smallest possible is {smallest[1]}"
        )
    return f"no vocabulary of vocab_size {vocab_size} could be trained on {words} distinct words: {message}"


class Vocabulary(Protocol):
    """What a text encoder needs of a tokenizer."""

    size: int
    pad_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of cleaned text, without the end-of-sentence token."""
        ...

    def save(self, folder: Path) -> None:
        """Write the file or files that `read_vocabulary` reads."""
        ...


class SentencePieceVocabulary:
    """A sentencepiece model, read by sentencepiece itself, as T5 was trained.

    Gives the ids of transformers' T5Tokenizer without its conversion step, and can spell unknown characters
    in bytes, which that conversion cannot.
    """

    def __init__(self, model: bytes | str | Path) -> None:
        source = "the given bytes" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise ValueError(f"sentencepiece model {source} does not exist")
        self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
        try:
            if not self._model:  # sentencepiece takes it for a model not loaded yet
                raise RuntimeError("it is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            self.size = int(self._processor.get_piece_size())
        except RuntimeError as error:
            raise ValueError(f"{source} is not a sentencepiece model: {error}") from error
        self.pad_id = int(self._processor.pad_id())
        self.eos_id = int(self._processor.eos_id())
        if min(self.pad_id, self.eos_id) < 0:
            raise ValueError(
                f"sentencepiece model {source} has no padding or no end-of-sentence piece: "
                "train it with pad_id=0 and eos_id=1, as T5's are"
            )

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def save(self, folder: Path) -> None:
        (folder / "spiece.model").write_bytes(self._model)


class AutoVocabulary:
    """Any other tokenizer that transformers can read from a folder."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.pad_id = int(self._tokenizer.pad_token_id)
            self.eos_id = int(self._tokenizer.eos_token_id)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
        self.size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a T5 folder: its spiece.model if it has one, else whatever transformers finds."""
    spiece = folder / "spiece.model"
    return SentencePieceVocabulary(spiece) if spiece.is_file() else AutoVocabulary(folder)
