"""Holds build/data's tokenizer against Hugging Face's library: the ids of texts, decoding, and speed on one core.

    python scripts/tokenizer_check.py --tokenizer tokenizer.json --text wiki.txt.xz more.txt
    python scripts/tokenizer_check.py --tokenizer gpt2.json --text owt.txt.xz --ids owt_gpt2_u16.bin
    python scripts/tokenizer_check.py --tokenizer gpt2.json --split all --only made

Besides the given texts, which may be of any size, it makes its own: every Unicode character in several surroundings,
bytes that are not UTF-8, and megabytes without a space. --split: the tokenizer's vocabulary with the way to split text
of published models instead of its own; "all": one after the other. --ids: uint16 that somebody else's tokenizer made of the first
text. Needs tokenizers and numpy. Ends with exit code 1 at the first difference.
"""

import argparse
import gzip
import json
import lzma
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import numpy as np  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

DATA = pathlib.Path(__file__).resolve().parent.parent / os.environ.get("BUILD", "build") / "data"
END_OF_TEXT = "<|endoftext|>"  # the separator in text, and the token of most
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]")


def split(*patterns, digits=(), use_regex=False, **options):
    """A pre_tokenizer: patterns one after the other, Digits at the places `digits`, and ByteLevel at the end."""
    options = {"behavior": "Isolated", "invert": False, **options}
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, **options} for pattern in patterns]
    for place in digits:
        steps.insert(place, {"type": "Digits", "individual_digits": True})
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex})
    return {"type": "Sequence", "pretokenizers": steps}


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = CONTRACTIONS + "|" + WORD + r"\p{L}+|\p{N}{1,3}|" + END
SPLITS = {
    "gpt2": split(use_regex=True),
    "llama3": split(LLAMA3),
    "phi4": split(LLAMA3, behavior="Removed", invert=True),
    "qwen2": split(CONTRACTIONS + "|" + WORD + r"\p{L}+|\p{N}|" + END),
    "qwen3.5": split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
                     r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "o200k": split(f"{WORD}{UPPER}*{LOWER}+{CONTRACTIONS}?|{WORD}{UPPER}+{LOWER}*{CONTRACTIONS}?"
                   r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "deepseek3": split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
                       r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                       r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "deepseek": split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
                      digits=[4]),
    "deepseek-coder": split(r"[\r\n]", r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+",
                            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
                            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", digits=[5]),
    "starcoder": split(digits=[0], use_regex=True),  # and SmolLM's
    "bloom": split(r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"),
    "properties": split(r"\p{Mn}+|\p{Mc}+|\P{L}\d|[^\P{S}a]x|\p{Cf}|\p{Nd}+|[\p{No}\p{Nl}]|\h{2}z|^\S|\p{Po}$|\p{^P} "
                        r"|.\p{Lo}"),
}


def run(*arguments, **options):
    return subprocess.run([DATA, *arguments], check=True, stdout=subprocess.PIPE, **options).stdout


def read(path):
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(pathlib.Path(path).suffix, open)
    with opened(path, "rb") as file:
        return file.read()


def documents(text):
    """The documents of plain text, bytes, as `data encode` cuts them: at lines of <|endoftext|> alone."""
    lines = [[]]
    for line in text.split(b"\n"):
        if line.removesuffix(b"\r") == END_OF_TEXT.encode():
            lines[-1].append(b"")
            lines.append([])
        else:
            lines[-1].append(line)
    joined = [b"\n".join(part) for part in lines]
    return [part for part in joined if part]


def children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shards(folder):
    parts = []
    for path in sorted(pathlib.Path(folder).glob("train_*.bin")):
        wide = np.fromfile(path, np.int32, 1)[0] == 20240801
        parts.append(np.fromfile(path, np.uint32 if wide else np.uint16, offset=1024))
    return np.concatenate(parts)


def first_difference(a, b):
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode(file, path, folder, *more, **options):
    """Encodes `path` by build/data with the tokenizer.json `file`; all of it is training data."""
    run("encode", "--input", path, "--tokenizer", file, "--out", folder, "--val-fraction", "0", *more, **options)


def compare(name, tokenizer, file, texts, path, *options):
    """Encodes `path`, which holds the documents `texts`, here and there, and decodes what was encoded."""
    end = next(tokenizer.token_to_id(text) for text in ENDS if tokenizer.token_to_id(text) is not None)
    with tempfile.TemporaryDirectory() as folder:
        encode(file, path, folder, *options)
        ours = shards(folder)
        starts = np.append(np.flatnonzero(ours == end), len(ours))
        back = b"".join(run("decode", shard) for shard in sorted(pathlib.Path(folder).glob("train_*.bin")))
    if len(starts) - 1 != len(texts):
        sys.exit(f"{name}: {len(starts) - 1} documents here, {len(texts)} there")
    for i, text in enumerate(texts):
        mine, theirs = ours[starts[i] + 1:starts[i + 1]], np.array(tokenizer.encode(text, add_special_tokens=False).ids)
        if not np.array_equal(mine, theirs):
            at = first_difference(mine, theirs)
            sys.exit(f"{name}: document {i}, token {at}: {mine[at:at + 5]} here, {theirs[at:at + 5]} there, behind "
                     f"{tokenizer.decode(theirs[max(0, at - 5):at])!r}; its text begins {text[:60]!r}")
    # What decoding gives: the text, composed where the tokenizer composes; a separator stands on a line of its own.
    wanted = ""
    for i, text in enumerate(texts):
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        wanted += ("" if i == 0 else ("" if wanted.endswith("\n") else "\n") + END_OF_TEXT + "\n") + text
    # A byte without a token is left out.
    missing = bytes(b for b in range(256) if tokenizer.token_to_id(BYTES[b]) is None)
    wanted = wanted.encode("utf-8").translate(None, missing)
    back = back.translate(None, missing)  # the separator is written, whatever the vocabulary has
    if back != wanted:
        at = first_difference(back, wanted)
        around = slice(max(0, at - 20), at + 20)
        sys.exit(f"{name}: decoding differs at byte {at}: {back[around]} here, {wanted[around]} wanted")
    size = sum(len(text.encode("utf-8")) for text in texts)
    print(f"{name}: {len(texts)} documents, {size} bytes, {len(ours)} ids: all equal, and decoded to the same text",
          flush=True)


def byte_letters():
    """byte -> the character that stands for it in a byte-level vocabulary"""
    letters = {b: chr(b) for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174}
    for b in range(256):
        letters.setdefault(b, chr(256 + sum(c > 255 for c in map(ord, letters.values()))))
    return letters


BYTES = byte_letters()


def characters():
    """Every Unicode character but surrogates, 64 to a document, in the surroundings that tokenizers look at."""
    codes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for first in range(0, len(codes), 64):
        text = [chr(c) for c in codes[first:first + 64]]
        yield "".join(text)
        yield " ".join(text)
        yield "".join(f"a{c}b {c}{c}\n{c} 1{c}'s e{c}\u0301" for c in text)


def not_utf8():
    chance = random.Random(1)
    yield from (b"a\xffb", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98x", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80")
    for _ in range(2000):
        text = bytearray("na\u00efve \u4e2d\u6587 \U0001F600 text\u0301 ".encode("utf-8") * 3)
        for _ in range(chance.randrange(1, 9)):
            text[chance.randrange(len(text))] = chance.choice([chance.randrange(256), chance.randrange(128, 256)])
        yield bytes(byte for byte in text if byte not in b"\r\n")


def without_spaces():
    chance = random.Random(2)
    for letters in ("a", "ab", "abcdefghijklmnopqrstuvwxyz", "0123456789", "\u4e2d\u6587\u5b57", "\U0001F600\u200d",
                    "\u0301e", "=-"):
        yield "".join(chance.choice(letters) for _ in range(1 << 20))
    yield "x" * (6 << 20)
    yield "\n" * (1 << 20)
    yield " " * (1 << 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--text", nargs="+", default=[], help="plain text files; .xz and .gz are unpacked")
    parser.add_argument("--ids", help="headerless uint16 ids that the first text must have")
    parser.add_argument("--only", choices=["texts", "made", "speed"], help="one part of the check")
    parser.add_argument("--split", choices=[*SPLITS, "all"], help="split text as this model's tokenizer does")
    options = parser.parse_args()
    for name in SPLITS if options.split == "all" else [options.split]:
        with tempfile.TemporaryDirectory() as folder:
            file = options.tokenizer
            if name:
                print(f"{name}:", flush=True)
                description = json.loads(read(file))
                description["pre_tokenizer"] = SPLITS[name]
                file = folder + "/tokenizer.json"
                pathlib.Path(file).write_text(json.dumps(description))
            check(file, options)


def check(file, options):
    tokenizer = Tokenizer.from_file(file)
    tokenizer.encode_special_tokens = True  # what a text says is text, not a command
    if options.only in (None, "made"):
        with tempfile.TemporaryDirectory() as folder:
            path = folder + "/text"
            for name, texts in (("every character", list(characters())), ("no spaces", list(without_spaces()))):
                with open(path, "w", encoding="utf-8") as out:
                    for text in texts:
                        out.write(json.dumps({"text": text}) + "\n")
                compare(name, tokenizer, file, texts, path, "--field", "text")
            texts = list(not_utf8())
            pathlib.Path(path).write_bytes((b"\n" + END_OF_TEXT.encode() + b"\n").join(texts))
            compare("not UTF-8", tokenizer, file, [text.decode("utf-8", "replace") + "\n" for text in texts[:-1]] +
                    [texts[-1].decode("utf-8", "replace")], path)

    for i, path in enumerate(options.text):
        texts = [document.decode("utf-8", "replace") for document in documents(read(path))]
        if options.only in (None, "texts"):
            compare(path, tokenizer, file, texts, path)
        if i == 0 and options.ids:
            check_ids(tokenizer, file, texts, options.ids)
        if options.only in (None, "speed"):
            # One core each; here with reading the file, without the start of the program, there of text in memory.
            one = dict(os.environ, OMP_NUM_THREADS="1")
            with tempfile.TemporaryDirectory() as folder:
                pathlib.Path(folder + "/short").write_text("a")
                pathlib.Path(folder + "/text").write_bytes(read(path))
                times = {}
                for name in ("short", "text"):
                    before = children_seconds()
                    encode(file, folder + "/" + name, folder, env=one)
                    times[name] = children_seconds() - before
            begin = time.process_time()
            tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            theirs, here = time.process_time() - begin, times["text"] - times["short"]
            size = sum(len(text.encode("utf-8")) for text in texts) * 1e-6
            print(f"{path}: {size / here:.2f} MB/s here, {size / theirs:.2f} MB/s there (processor time): "
                  f"ratio {theirs / here:.2f}", flush=True)


def check_ids(tokenizer, file, texts, ids):
    """Ids of the same documents by somebody else: behind each the end of text, without the line end before it."""
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/text", "w", encoding="utf-8") as out:
            for text in texts:
                out.write(json.dumps({"text": text.removesuffix("\n")}) + "\n")
        encode(file, folder + "/text", folder, "--field", "text")
        ours = np.append(shards(folder)[1:], tokenizer.token_to_id(END_OF_TEXT))
    theirs = np.fromfile(ids, np.uint16)
    if not np.array_equal(ours, theirs):
        at = first_difference(ours, theirs)
        sys.exit(f"{ids}: id {at} of {len(ours)} here, {len(theirs)} there: {ours[at:at + 5]}, {theirs[at:at + 5]}")
    print(f"{ids}: {len(theirs)} ids, all equal", flush=True)


if __name__ == "__main__":
    main()
