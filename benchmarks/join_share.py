r"""How often a tokenizer joins the probe to the text before it.

    python -m benchmarks.join_share TOKENIZER_JSON [TOKENIZER_JSON ...] --data GSM8K_TEST_JSONL --rows 150

Every prefix of GSM8K's solutions is followed by the probe. Its tokens and the probe's own are compared with those of
the text, once written as `iapo.probe_tokens=natural` writes it (the last token is taken back) and once encoded whole:

    `</think>\n<answer>`         format=tags
    `\n</think>\n\n\boxed{`      format=boxed

The table says for which share of prefixes each differs from the plain tokens (natural / whole text), and in how many
prefixes the two differ from each other: a join that reaches more than one token back, or a prefix that ends within a
character and so has no text. A tokenizer is called by the name of its folder.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from benchmarks.measure import table
from iapo.answer_format import FORMATS
from iapo.data.originals import ORIGINALS
from iapo.data.read import parse_rows, read_file
from iapo.information import Joins
from iapo.launch.warmup import gsm8k
from iapo.probe.text import step_ends

PROBES = [FORMATS[name].probe for name in ("tags", "boxed")]


class Prefix(NamedTuple):
    """How the probe is written after a prefix.

    Attributes:
        step_end, full_stop: what its last token is.
        natural, whole: whether the tokens of `iapo.probe_tokens=natural`, and those of the whole text, are other than
            the prefix's and the probe's own.
        apart: whether these two differ.
    """

    step_end: bool
    full_stop: bool
    natural: bool
    whole: bool
    apart: bool


# By name: which prefixes a column of the table counts.
PLACES = {
    "all": lambda prefix: True,
    "step ends": lambda prefix: prefix.step_end,
    "after a full stop": lambda prefix: prefix.full_stop,
}


def prefixes(tokenizer: Tokenizer, probe: str, texts: Sequence[str]) -> list[Prefix]:
    """Every prefix of the texts' tokens but the empty one."""

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=False)

    ends = step_ends(decode, tokenizer.get_vocab_size()).tolist()
    joins, alone = Joins(encode, decode, probe), encode(probe)
    found = []
    for text in texts:
        ids = encode(text)
        for t in range(1, len(ids) + 1):
            prefix, last = ids[:t], ids[t - 1]
            join = joins.join(last, None)
            plain = prefix + alone
            natural = (prefix[:-1] if join.takes_last else prefix) + list(join.probe)
            whole = encode(decode(prefix) + probe)
            full_stop = decode([last]).endswith(".")
            found.append(Prefix(ends[last], full_stop, natural != plain, whole != plain, natural != whole))
    return found


def shares(found: Sequence[Prefix]) -> list[str]:
    """Cells of the table: prefixes; by place the share by `natural` and by the whole text; in how many they differ."""
    cells = []
    for counts in PLACES.values():
        chosen = [prefix for prefix in found if counts(prefix)]
        numbers = [sum(prefix.natural for prefix in chosen), sum(prefix.whole for prefix in chosen)]
        cells.append(" / ".join(f"{number / len(chosen):.1%}" for number in numbers) if chosen else "-")
    return [f"{len(found):,}", *cells, str(sum(prefix.apart for prefix in found))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", metavar="TOKENIZER_JSON", nargs="+", type=Path)
    parser.add_argument("--data", metavar="FILE", required=True, type=Path, help="rows of GSM8K, in their own columns")
    parser.add_argument("--rows", type=int, default=150, help="how many of them; default 150")
    options = parser.parse_args(arguments)
    rows = list(islice(read_file(options.data), options.rows))
    examples = parse_rows(rows, ORIGINALS["gsm8k"], str(options.data))
    texts = [gsm8k(row, example.answer) for row, example in zip(rows, examples, strict=True)]
    lines = []
    for path in options.tokenizers:
        tokenizer = Tokenizer.from_file(str(path))
        for probe in PROBES:
            written = "`" + probe.replace("\n", "\\n") + "`"
            lines.append([path.resolve().parent.name, written, *shares(prefixes(tokenizer, probe, texts))])
    print(table(["tokenizer", "probe", "prefixes", *PLACES, "they differ"], lines))


if __name__ == "__main__":
    main()
