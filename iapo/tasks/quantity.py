"""Numbers with a unit, read exactly and without math-verify. Pure functions of text.

A quantity is `[currency sign] number [unit]`. It is decided here, by the exact value of its number. Everything else
goes to math-verify, without its unit.

What a unit is: an entry of `UNITS`, one closed list. It has money, time, length, mass, volume, energy, data, and plain
nouns that GSM8K and MATH count ("how many apples"). With square or cubic, a power of 2 or 3, and one "per" it also
gives areas, volumes and rates. Any other word is no unit: "18 wombats" is not 18, because math-verify takes the letters
for variables. The list is closed because an open one pays for wrong answers: "2 thirds", "5 lakh" and "3 score" look
like "5 apples". Percent, degrees, scale words and fractions are never units.
"""

import re
from decimal import Decimal
from typing import NamedTuple

from iapo.tasks.wrapping import FONT, SPACE, balanced, bare, unwrapped

# Where a form has several meanings ("pounds"), two units agree if they share one.
_MEASURES = {
    "dollar": "$ dollar dollars buck bucks USD",
    "cent": "¢ cent cents",
    "euro": "€ euro euros EUR",
    "pound sterling": "£ pound pounds GBP",
    "yen": "¥ yen JPY",
    "rupee": "₹ rupee rupees INR Rs",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "day days",
    "night": "night nights",
    "week": "wk wks week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "millisecond": "ms millisecond milliseconds",
    "metre": "m meter meters metre metres",
    "kilometre": "km kms kilometer kilometers kilometre kilometres",
    "centimetre": "cm cms centimeter centimeters centimetre centimetres",
    "millimetre": "mm millimeter millimeters millimetre millimetres",
    "decimetre": "dm decimeter decimeters decimetre decimetres",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yds yard yards",
    "mile": "mi mile miles",
    "gram": "g gram grams gramme grammes",
    "kilogram": "kg kgs kilo kilos kilogram kilograms",
    "milligram": "mg milligram milligrams",
    "tonne": "ton tons tonne tonnes",
    "pound": "lb lbs pound pounds",
    "ounce": "oz ounce ounces",
    "litre": "l L liter liters litre litres",
    "millilitre": "ml mL milliliter milliliters millilitre millilitres",
    "gallon": "gal gals gallon gallons",
    "quart": "qt quart quarts",
    "pint": "pint pints",
    "cup": "cup cups",
    "tablespoon": "tbsp tablespoon tablespoons",
    "teaspoon": "tsp teaspoon teaspoons",
    "bushel": "bushel bushels",
    "acre": "acre acres",
    "hectare": "ha hectare hectares",
    "centimetre^3": "cc",
    "mile/hour": "mph",
    "kilometre/hour": "kph kmh kmph",
    "calorie": "cal calorie calories",
    "kilocalorie": "kcal kilocalorie kilocalories",
    "joule": "J joule joules",
    "newton": "N newton newtons",
    "watt": "W watt watts",
    "volt": "V volt volts",
    "byte": "byte bytes",
    "kilobyte": "KB kilobyte kilobytes",
    "megabyte": "MB megabyte megabytes",
    "gigabyte": "GB gigabyte gigabytes",
    "unit": "unit units",
}
# Singulars; from "how many X" in GSM8K and MATH, without measures, numbers ("pairs") and functions ("logs").
_COUNTED = """
acorn adult animal ant apple arrangement article bag ball balloon banana bar barrel baseball basket basketball batch
bead bed bee beetle bill bird biscuit block boat bolt bone book bottle bouquet box boy bracelet brick brownie bug
bus bush button cake camper can candle candy cap car card carnation carrot carton case cat chair chicken child chip
chocolate chore circle class clip coat coin combination comic committee computer container cookie cow cracker crate
crayon cricket cupcake customer daisy decoration dessert diagonal digit dish divisor dog doll donut door doughnut
dress driveway duck ear earring edge egg element email employee envelope episode eraser eye face firework fish flea
floor flower flyer follower friend frog fruit game gemstone gift girl glass gnome goal goat goldfish goose guest
gumball guppy hamburger hat hexagon home horse hotdog house insect integer item jar jellybean jump key kid kitten
lamb lap leaf leg lego lemon letter level line lion load loaf lollipop machine man mango marble marshmallow match
matchstick meal meatball member minnow mistake mouse movie muffin mushroom nail necklace newspaper nickel notebook
novel number nut object onion orange outcome oyster pack package page painting pancake paper parent passenger pastry
path patient peach peanut pebble pen pencil penny pentagon permutation person pet petal phone photo picture pie
piece pill pillow pin pizza plank plant plate player point poodle portion poster potato present problem puppy puzzle
question rabbit rectangle rock roll room rose route sandwich scarf scoop seashell seat section seed serving session
shark sheep sheet shelf shell shirt shoe side situp slice soda solution song space spoke spoon spot stair stamp star
steak step stick sticker straw strawberry student subset sweet table team text ticket tile tire tissue toad token
tomato tooth toothbrush touchdown towel toy tree triangle trip tub tulip turn turtle value vegetable video vote wall
watermelon way wheel whisker widget window wing woman word worker
"""
_IRREGULAR = {
    "child": "children",
    "goose": "geese",
    "leaf": "leaves",
    "loaf": "loaves",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "potato": "potatoes",
    "scarf": "scarves",
    "shelf": "shelves",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "tooth": "teeth",
    "woman": "women",
}


def _plural(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def _table() -> dict[str, frozenset[str]]:
    """The meanings of every form, as written."""
    found: dict[str, set[str]] = {}
    for meaning, forms in _MEASURES.items():
        for form in forms.split():
            found.setdefault(form, set()).add(meaning)
    for noun in _COUNTED.split():
        for form in (noun, _plural(noun)):
            found.setdefault(form, set()).add(noun)
    return {form: frozenset(meanings) for form, meanings in found.items()}


UNITS = _table()
_ANY_CASE = {form.casefold(): meanings for form, meanings in UNITS.items() if len(form) > 1}
# Right after a number these may be variables too: 5m is 5 times m.
_PRODUCTS = {form for form in UNITS if len(form) == 1 and form.isalpha()} | {"mg", "ms", "ha", "mi"}
LONGEST_UNIT = 60  # characters, LaTeX included

NONE: frozenset[str] = frozenset()


class Quantity(NamedTuple):
    """A text, taken apart.

    text: without its unit, for math-verify; with it where the unit may be a variable, as in "5 m".
    number: the exact value, or None where `text` is no plain number.
    units: meanings of the unit; empty without one.
    maybe_variable: the unit is one letter outside \\text{}.
    base: of the digits in `text`; 10 where none is written.
    """

    text: str
    number: Decimal | None
    units: frozenset[str]
    maybe_variable: bool = False
    base: int = 10


def quantity(text: str) -> Quantity:
    """`text` taken apart into number, base and unit.

    Degenerate cases: a text without a number or a unit is its own `text`, tidied (see `tidy`).
    """
    text = tidy(text)
    rest, units, letter = _without_unit(text)
    sign = _CURRENCY.match(rest)
    if sign:
        before = UNITS[sign["currency"].removeprefix("\\")]
        if units and not units & before:  # "$5 cm" is no quantity
            return Quantity(text, None, NONE)
        rest, units = (sign["sign"] + rest[sign.end() :]).strip(), before
    rest = unwrapped(rest)  # of "\\boxed{1,000} cm" braces are left
    digits, base = _digits(rest)
    if base != 10:
        return Quantity(digits, None, units, base=base)
    number = _number(digits)
    if letter:
        return Quantity(text, number, units if number is not None else NONE, number is not None)
    return Quantity(rest if number is None else _written(number), number, units)


def units_agree(answer: Quantity, gold: Quantity) -> bool:
    """Whether the units allow that the answer is right.

    One unit alone agrees with none: 5 is "5 cm", and "5 cm" is 5. Two must share a meaning. There is no conversion: 60
    seconds are not 1 minute here. A gold of "5m" may be a product, so 5 alone is not enough.
    """
    if not gold.units or not answer.units:
        return not (gold.maybe_variable and not answer.units)
    return bool(answer.units & gold.units)


def plain_number(text: str) -> Decimal | None:
    """The exact value of `text` if it is one integer or decimal, else None.

    Allowed in the number: thousands separators (`1,000`, `1{,}000`, `1\\,000`, `1 000`, `1_000`), an exponent (`1e16`,
    `2.5e-05`, `1.5\\times 10^{3}`). Allowed around it: math delimiters, a currency sign, one unit of `UNITS` in
    whatever form ("5 cm", "5cm", "5\\text{ cm}", "$5"), a full stop. Anything else, percent and degree signs too, is
    left to math-verify.
    """
    return quantity(text).number


def same_number(a: str, b: str) -> bool | None:
    """Whether the plain number `a` equals the plain number `b`, units included; None if either is not one.

    Values are exact: 0.3 is not 0.30000000000000004. Units as `units_agree`, with `b` as the gold.
    """
    quantity_a, quantity_b = quantity(a), quantity(b)
    if quantity_a.number is None or quantity_b.number is None:
        return None
    return quantity_a.number == quantity_b.number and units_agree(quantity_a, quantity_b)


def whole_number_of_another_base(text: str) -> int | None:
    """The value of `0x1F`, `0b101` or `0o17`; None for other text.

    math-verify reads them as products with 0, so that all of them would be equal.
    """
    if not re.fullmatch(r"[+-]?0([xX][0-9A-Fa-f]+|[bB][01]+|[oO][0-7]+)", text.strip()):
        return None
    return int(text.strip(), 0)


# --- reading ---

_DIGITS = rf"[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,3}}(?:_[0-9]{{3}})+|[0-9]{{1,3}}(?:{SPACE}[0-9]{{3}})+|[0-9]+"
_NUMBER = re.compile(
    rf"""
    (?P<mantissa> [+-]? (?: (?:{_DIGITS}) (?:\.[0-9]*)? | \.[0-9]+ ) )
    (?: [eE] (?P<e> [+-]?[0-9]{{1,4}} )
      | {SPACE}* (?: \\times | \\cdot | [x×*·] ) {SPACE}* 10 \s*\^\s*
        (?: (?P<digit> [0-9] ) | \{{ \s* (?P<braced> [+-]?[0-9]{{1,4}} ) \s* \}} | (?P<bare> [+-]?[0-9]{{1,4}} ) )
    )?
    """,
    re.VERBOSE,
)
_CURRENCY = re.compile(rf"(?P<sign>[+-]?){SPACE}*(?P<currency>\\?\$|[¢€£¥₹]){SPACE}*")
# After `bare`: 52_8, 52_{8}, (52)_{(8)}, 52_{\text{base }8}, 52 (base 8), 1A_{16}
_BASED = re.compile(
    r"(?P<sign>-?)(?P<open>\()?0*(?P<digits>[0-9A-Z]+|(?=[a-z]*[0-9])[0-9a-z]+)(?(open)\))"
    r"(?:_(?P<brace>\{)?|_?(?P<wide>\{)?\(?base-?)\(?(?P<base>[1-9][0-9]?)\)?(?(brace)\})(?(wide)\})"
)
_PERCENT = re.compile(rf"{SPACE}*(?:{FONT}\{{\s*(?:\\?%|per\ ?cent|percentage|pct)\s*\}}|\bper\ cent)$")
_DEGREES = re.compile(rf"(?<=[0-9}}]){SPACE}*(?:°|\\degrees?|degrees?|{FONT}\{{\s*degrees?\s*\}})$")
_MIXED = re.compile(rf"(?P<whole>-?[0-9]+){SPACE}+(?P<top>[1-9][0-9]*)/(?P<bottom>[1-9][0-9]*)")
# The end of a value that a unit may follow: "7", "x", "3xy", "12\\pi"; not a word.
_VALUE_ENDS = re.compile(
    r"(?:[0-9})\]$.!|]|\\(?:alpha|beta|gamma|theta|phi|pi|omega|infty)|(?<![A-Za-z\\])[A-Za-z]|[0-9)}][A-Za-z]+)$"
)
_EXPONENT = re.compile(r"(?<![\w.\\])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,4})(?![\w.])")
# Three letters or more that are no function and no word that math-verify knows.
_WORD = re.compile(
    r"(?<![A-Za-z])(?!(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|inf|infinity|and|percent|pct)(?![A-Za-z]))"
    r"[A-Za-z]{3,}"
)
_ENDS = re.compile(r"([(\[]|\\\{)[^()\[\]]*,[^()\[\]]*([)\]]|\\\})")
_CLOSED_AT_INFINITY = re.compile(r"\[-\\infty|\\infty\]")
_REPEATING = re.compile(
    r"(?<![\w.,])(?P<whole>[0-9]{1,50})\.(?P<start>[0-9]{0,50})\\(?:overline|bar)\s*\{(?P<period>[0-9]{1,50})\}"
)
_PRODUCT = re.compile(r"(?<![\w\\.{])([0-9.]+)\s*\((\s*[+-]?[0-9.]+\s*)\)")


def tidy(text: str) -> str:
    """`text` unwrapped, and with one spelling where math-verify knows only one.

    Rewritten: minus signs, `1{,}000`, degree and percent words, mixed numbers.
    """
    text = unwrapped(re.sub(r"\\!\s*", "", text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")))
    text = _DEGREES.sub(r"^{\\circ}", _PERCENT.sub(r"\\%", text))
    mixed = _MIXED.fullmatch(text)
    if mixed and int(mixed["top"]) < int(mixed["bottom"]):
        return f"{mixed['whole']}\\frac{{{mixed['top']}}}{{{mixed['bottom']}}}"
    return text


def words(text: str) -> str | None:
    """Letters and blanks alone: a word of four letters or more, without regard to case; or capitals.

    None for other text. math-verify takes words for products of letters, so that "listen" would be "silent", and the
    angle ABC would be ACB.
    """
    match = re.fullmatch(rf"(?:{FONT}\{{)?\s*([A-Za-z]+(?: +[A-Za-z]+)*)\s*\}}?", text)
    if match is None:
        return None
    if match[1].isupper() and len(match[1]) > 1:
        return match[1]
    if max(map(len, match[1].split())) < 4:
        return None
    return " ".join(match[1].split()).casefold()


def for_math_verify(text: str) -> str:
    """A tidied text as math-verify reads it right.

    `1e3` is a product with e there, `5(6)` is 5 + 6, and `0.1\\overline{6}` can't be read.
    """
    return _PRODUCT.sub(r"\1\\cdot(\2)", _EXPONENT.sub(r"(\1\\times 10^{\2})", _REPEATING.sub(_fraction, text)))


def _fraction(repeating: re.Match) -> str:
    """0.1666... is (16 - 1) / (100 - 10)."""
    once, before = repeating["whole"] + repeating["start"], 10 ** len(repeating["start"])
    top, bottom = int(once + repeating["period"]) - int(once), before * (10 ** len(repeating["period"]) - 1)
    return f"\\frac{{{top}}}{{{bottom}}}"


def misread(text: str) -> bool:
    """Whether math-verify would read something else.

    It adds "2 3" to 5, drops the subscript of "5_8" and "\\frac12_8", and reads the last part of "x = 4 x = 5" alone. A
    brace without its partner would end the box that it gets both texts in.
    """
    two_numbers = rf"(?<!frac)(?<!frac\s)(?<!binom)(?<!binom\s)(?<![0-9.^_])[0-9]+(?:\.[0-9]+)?{SPACE}+[0-9]"
    based = r"(?:[0-9]\}*|\))\s*_"
    two_equations = rf"=[^=,;]*(?:[0-9)}}]|(?<![A-Za-z\\])[A-Za-z]){SPACE}+[A-Za-z]\s*="
    listed = re.sub(rf"{FONT}\{{\s*(?:and|or)\s*\}}|\b(?:and|or)\b", ",", text)
    return not balanced(text) or re.search(f"{based}|{two_numbers}|{two_equations}", listed) is not None


def differs(answer: str, gold: str) -> bool:
    """Whether two tidied texts differ in what math-verify does not see.

    Words: the product of their letters and 0 is 0, so that "not 0" would be 0. Brackets: it opens a closed end at
    infinity, and takes [2,1] and the set of 2 and 1 for (2,1).
    """
    foreign = any(not set(word.casefold()) <= set(gold.casefold()) for word in _WORD.findall(_value(answer)))
    ends_answer, ends_gold = (_ENDS.fullmatch(bare(text)) for text in (answer, gold))
    brackets = ends_answer and ends_gold and ends_answer.groups() != ends_gold.groups()
    closed = _CLOSED_AT_INFINITY.search(bare(answer)) and not _CLOSED_AT_INFINITY.search(bare(gold))
    return bool(foreign or brackets or closed)


def _value(text: str) -> str:
    """What is on the right of the last equals sign, without LaTeX commands and the names that some of them take."""
    return re.sub(r"\\(?:begin|end|operatorname)\{[a-z*]+\}|\\[A-Za-z]+", " ", text.rpartition("=")[2])


def _digits(text: str) -> tuple[str, int]:
    """The digits of a number and the base that they are written in; the text and 10 where it has no base."""
    based = _BASED.fullmatch(bare(text))
    if based is None or not 2 <= int(based["base"]) <= 36:
        return text, 10
    return based["sign"] + based["digits"].upper(), int(based["base"])


def _number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    mantissa = Decimal(re.sub(rf"{SPACE}|[,_]", "", match["mantissa"]))
    exponent = match["e"] or match["digit"] or match["braced"] or match["bare"]
    if not exponent or not mantissa:
        return mantissa
    # Not scaleb or a product, which round to the context's 28 digits.
    sign, digits, power = mantissa.as_tuple()
    return Decimal((sign, digits, int(power) + int(exponent)))


def _written(number: Decimal) -> str:
    """One spelling of a number, for math-verify; in digits unless that would be long."""
    if abs(number.adjusted()) < 400:
        return f"{number:f}"
    sign, digits, power = number.as_tuple()
    return f"{'-' * sign}{''.join(map(str, digits))}\\times 10^{{{power}}}"


def _without_unit(text: str) -> tuple[str, frozenset[str], bool]:
    """(the text before its unit, the unit's meanings, whether these letters may be variables).

    The longest unit counts: "5 cm" ends with m too. Where there is none, the text stays whole.
    """
    for start in range(max(1, len(text) - LONGEST_UNIT), len(text)):
        tail, rest = text[start:], text[:start]
        if rest[-1] == "\\" or (rest[-1].isalpha() and tail[0].isalpha()):
            continue
        phrase, wrapped = _phrase(tail)
        units = unit(phrase)
        attached = tail[0].isalpha() and rest[-1].isdigit()
        rest = re.sub(rf"{SPACE}+$", "", rest)
        if not units or not rest or rest[-1] in "^_{":
            continue
        if wrapped:
            return rest, units, False
        if not _VALUE_ENDS.search(rest):  # a word after a word is part of it: "no apples"
            continue
        letters = set(re.findall("[A-Za-z]+", phrase)) & _PRODUCTS
        if letters and re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", rest)):
            continue  # a letter among letters is a variable: "(x + 1) m"
        return rest, units, attached and bool(letters)
    return text, NONE, False


def _phrase(tail: str) -> tuple[str, bool]:
    """The words of a LaTeX tail, and whether any was in a font command."""
    plain = re.sub(rf"{FONT}\{{([^{{}}]*)\}}", r" \1 ", tail)
    wrapped = plain != tail
    plain = re.sub(r"\s*([/^])\s*", r"\1", re.sub(SPACE, " ", plain).replace("\\$", "$"))
    return " ".join(plain.split()), wrapped


def unit(phrase: str) -> frozenset[str]:
    """The meanings of a unit; empty for any other text.

    unit = base | square base | cubic base | base^2 | base^3 | unit/unit | unit per unit
    """
    over = re.fullmatch(r"(.+?)(?:/| per )(.+)", phrase)
    if over:
        return frozenset(f"{a}/{b}" for a in _powered(over[1]) for b in _powered(over[2]))
    return _powered(phrase)


def _powered(phrase: str) -> frozenset[str]:
    before = re.fullmatch(r"(square|sq\.?|cubic|cu\.?) (.+)", phrase)
    after = re.fullmatch(r"(.+?)(?:\^\{?([23])\}?|([²³]))", phrase)
    if before:
        power, base = "2" if before[1].startswith("sq") else "3", before[2]
    elif after:
        power, base = (after[2] or str(" ²³".index(after[3]) + 1)), after[1]
    else:
        return _base(phrase)
    return frozenset(f"{meaning}^{power}" for meaning in _base(base))


def _base(form: str) -> frozenset[str]:
    form = form.strip().removesuffix(".")
    return UNITS.get(form) or (_ANY_CASE.get(form.casefold()) if len(form) > 1 else None) or NONE
