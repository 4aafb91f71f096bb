"""Writes tests/fixtures/tokenizer.json and tokenizer_cases.json: ids by Hugging Face's library, for text/tokenizer.h to equal.

    python scripts/tokenizer_fixtures.py          needs tokenizers; takes seconds; the same bytes each time

One small vocabulary, trained on this repository's README and some strings below; three ways to use it, as in GPT-2's, in
Pythia's (NFC, runs of spaces as added tokens) and in Llama 3's (a Split pattern before ByteLevel) tokenizer.json. A case
is a text in hex (so that none is changed on the way) and its ids.
"""

import json
import pathlib
import random

from tokenizers import Tokenizer

from train_tokenizer import END_OF_TEXT, train

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "fixtures"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
SPACES = [chr(c) for c in (0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x1C, 0x20, 0x85, 0xA0, 0x1680, 0x180E, 0x2000, 0x2009, 0x200A,
                           0x200B, 0x2028, 0x2029, 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF)]


def variants(base):
    """name -> tokenizer.json"""
    pythia, llama3 = json.loads(json.dumps(base)), json.loads(json.dumps(base))
    pythia["normalizer"] = {"type": "NFC"}
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=True, special=False)
    size = len(base["model"]["vocab"]) + 1
    texts = [" " * n for n in range(12, 1, -1)] + ["|||IP|||"]
    pythia["added_tokens"] += [dict(id=size + i, content=text, **added) for i, text in enumerate(texts)]
    # and one that is looked for before the text is normalised: e with an accent as two characters
    pythia["added_tokens"].append(dict(added, id=size + len(texts), content="<e\u0301>", normalized=False))
    llama3["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    return {"gpt2": base, "pythia": pythia, "llama3": llama3}


def texts():
    chance = random.Random(1)
    yield from ["", " ", "  ", "a", " a", "Hello, world!", "don't WE'LL you've I'M they're 'sure' ''s",
                "1234567 12,345.67e-8", "a\n\nb\r\n\r\n c \t d   ", "x" * 300, " " * 40 + "x", "\n" * 7,
                f"not the end: {END_OF_TEXT} of text", "|||IP||| and |||IP||| |||IP", "<e\u0301> <\u00e9>",
                "e\u0301 \u00e9 A\u030A \u212B \u0344 \u1100\u1161\u11A8 \u0061\u0323\u0307 \u0061\u0307\u0323",
                "\u0627\u0651\u064E \u05E9\u05C1\u05BC", "\U0001F468\u200D\U0001F469\u200D\U0001F467 \U0001F1E9\U0001F1EA",
                "a\u1C89b \U00011F04 1\U00011F50 \U0001E5F1\u0661 x\U0002EBF0",  # letters and numbers of Unicode 15 and 16
                "\u0E01\u0E33 \u0EB8\u0EBA a\u0898\u0899 \U00011070", "\U00010000\U0010FFFF\uE000\uFFFD\u0000\u0001"]
    yield "".join(space + letter for space in SPACES for letter in ("", "b", "1", "!", "\u00e9"))
    yield "".join(space + space for space in SPACES)
    letters = [*"aeiou stn'.,0189\n", *SPACES, "\u0301", "\u0323", "\u00e9", "\u4e2d", "\u3042", "\uac00", "\U0001F600",
               "\u0661", "\u2160", "\u00bd", "\u0300", "\u0308", "\u1E69", "\u0915\u093C"]
    for _ in range(40):
        yield "".join(chance.choice(letters) for _ in range(chance.randrange(1, 60)))


def main():
    corpus = [(ROOT / "README.md").read_text("utf-8"), "\u00e9t\u00e9 \u4e2d\u6587 \u0440\u0443\u0441 " * 20]
    path = FOLDER / "tokenizer.json"
    if not path.exists():  # the README changes; the fixture need not
        train(corpus, 420, progress=False).save(str(path), pretty=False)
    all_cases = {}
    for name, description in variants(json.loads(path.read_text("utf-8"))).items():
        tokenizer = Tokenizer.from_str(json.dumps(description))
        tokenizer.encode_special_tokens = True
        cases = [[text.encode("utf-8").hex(), tokenizer.encode(text, add_special_tokens=False).ids] for text in texts()]
        # What is not UTF-8 counts as U+FFFD.
        for invalid in (b"a\xffb", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98x", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"):
            text = invalid.decode("utf-8", "replace")
            cases.append([invalid.hex(), tokenizer.encode(text, add_special_tokens=False).ids])
        changes = {key: value for key, value in description.items() if key in ("normalizer", "pre_tokenizer", "added_tokens")}
        all_cases[name] = {"changes": changes, "cases": cases}
    (FOLDER / "tokenizer_cases.json").write_text(json.dumps(all_cases, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
