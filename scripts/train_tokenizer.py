"""Trains a byte-level BPE tokenizer of the GPT-2 kind and writes a Hugging Face tokenizer.json.

    python scripts/train_tokenizer.py --input text.txt more.jsonl.xz --vocab 4096 --out tokenizer.json
    build/data encode --tokenizer tokenizer.json --input text.txt --out data/text

Reads what `data encode` reads: plain text with a line <|endoftext|> between documents, or JSON lines (--field text);
plain, .gz, .xz, or .zst. Needs `tokenizers`, for .zst `zstandard` as well.
"""

import argparse
import gzip
import io
import json
import lzma

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def open_text(path):
    """A text file as lines, unpacked on the way."""
    text = dict(encoding="utf-8", errors="replace", newline="\n")
    if path.endswith(".gz"):
        return gzip.open(path, "rt", **text)
    if path.endswith(".xz"):
        return lzma.open(path, "rt", **text)
    if path.endswith(".zst"):
        import zstandard

        stream = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"))
        return io.TextIOWrapper(stream, **text)
    return open(path, **text)


def documents(paths, separator, field):
    for path in paths:
        with open_text(path) as file:
            lines = []
            for number, line in enumerate(file, 1):
                if field:
                    if line.isspace():
                        continue
                    try:
                        text = json.loads(line)[field]
                        assert isinstance(text, str)
                    except (ValueError, KeyError, TypeError, AssertionError):
                        raise ValueError(f'{path}, line {number}: no text in "{field}"') from None
                    yield text
                elif line.rstrip("\r\n") == separator:
                    yield "".join(lines)
                    lines = []
                else:
                    lines.append(line)
            if lines:
                yield "".join(lines)


def train(texts, vocab, progress=True):
    """A tokenizers.Tokenizer with `vocab` entries: 256 bytes, merges, and <|endoftext|> as the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab - 1, initial_alphabet=alphabet, show_progress=progress)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--out", default="tokenizer.json")
    parser.add_argument("--vocab", type=int, default=4096, help="entries, with the 256 bytes and <|endoftext|>")
    parser.add_argument("--separator", default=END_OF_TEXT, help="a line of this alone stands between documents")
    parser.add_argument("--field", default="", help="JSON lines: the key whose value is a document's text")
    options = parser.parse_args()
    if not 258 <= options.vocab <= 65535:
        parser.error(f"--vocab {options.vocab}: should be 258 to 65535")
    try:
        tokenizer = train(documents(options.input, options.separator, options.field), options.vocab)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as problem:
        parser.exit(2, f"error: {problem}\n")
    tokenizer.save(options.out)
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
