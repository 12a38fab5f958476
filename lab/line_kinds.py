"""What kind of line is it? A line of a self-edit, held against its passage.

By a rule, a line is
    copied     nearly a piece of the passage, word by word;
    supported  at least half of its content words are the passage's, and all its names and numbers;
    beyond     its names and numbers are, but it says more than the passage does;
    vague      general talk, or a heading;
    wrong      it has a name or a number that the passage lacks.
The thresholds were chosen on 120 lines of the paper's release (base, iter2, gpt4_1) and of
SmolLM2-135M. On 60 others the rule says what a reader said of .72 (kappa .62), and of .90 whether a
line stands in the passage (copied or supported) or not. As it compares words, it finds half of what
a reader calls wrong: it can't see that a line says the contrary, or mixes up who did what.
"""
import re

from data.judges import normalise

KINDS = ("copied", "supported", "beyond", "vague", "wrong")
COPIED = 0.7                    # of a line's runs of three words
SUPPORTED, BEYOND = 0.5, 0.3    # of a line's content words
STOP_WORDS = set("""
a about after all also although an and another any are as at be became because been before being
between both but by can could did do does during each either for from had has have he her him his
how however if in into is it its itself many may might more most much must no nor not of often on
one only or other others our over own she should since so some such than that the their them then
there these they this those through thus to under until up upon us was we were what when where
which while who whom whose why will with within without would you your passage question answer
""".split())


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def stem(word: str) -> str:
    """Forms of a word are alike: its first letters, without an ending."""
    return re.sub(r"(?<=..)(['’]s|ies|ing|ed|es|s|e|y)$", "", word)[:6]


def stems(text: str) -> set[str]:
    """Of its content words."""
    return {stem(word) for word in words_of(text.lower()) if word not in STOP_WORDS}


def numbers(text: str) -> set[str]:
    return {found.replace(",", "") for found in re.findall(r"\d+(?:[.,]\d+)*", text)}


def names(text: str) -> set[str]:
    """Stems of capitalised words, but for those that are so because a sentence begins."""
    found = set()
    for sentence in re.split(r"[.!?:]\W+", text):
        for word in words_of(sentence)[1:]:
            if word[0].isupper() and word.lower() not in STOP_WORDS:
                found.add(stem(word.lower()))
    return found


def initials(text: str) -> str:
    """Of its capitalised words, in a row."""
    return "".join(word[0] for word in words_of(text) if word[0].isupper()).lower()


def undotted(text: str) -> str:
    """U.S. is US."""
    return re.sub(r"(?<=\b[A-Z])\.", "", text)


def plain(line: str) -> str:
    """Without its number and its label: "1. Wider effects: It ...", "Question 3: Who ..."."""
    line = re.sub(r"^\W*(\d+[.)])?\W*", "", line)
    return undotted(re.sub(r"^[^.:]{1,60}:\W+(?=\w)", "", line))


def is_heading(line: str) -> bool:
    """Or a stump that the token cap left: no sentence's end, and hardly a word in lower case."""
    content = [word for word in words_of(line) if word.lower() not in STOP_WORDS]
    return not re.search(r"[.!?]\W*$", line) and sum(map(str.islower, content)) < 2


def threes(text: str) -> list[tuple]:
    """All runs of three words."""
    words = normalise(text)
    return list(zip(words, words[1:], words[2:]))


def share_in(parts, there) -> float:
    """How many of the parts are there."""
    return sum(part in there for part in parts) / len(parts) if parts else 0.0


def classify(line: str, passage: str) -> str:
    """One of KINDS. The passage begins with its title."""
    line, passage = plain(line), undotted(passage)
    if is_heading(line):
        return "vague"
    specific = names(line) | numbers(line)
    foreign = specific - stems(passage) - numbers(passage)
    # UK is a name of the passage if United Kingdom is.
    if any(name not in initials(passage) for name in foreign):
        return "wrong"
    # The title's words say nothing: each line is trained on with the title before it.
    content = stems(line) - stems(passage.split("\n")[0])
    share = share_in(content, stems(passage))
    if share >= SUPPORTED:
        copied = share_in(threes(line), set(threes(passage))) >= COPIED
        return "copied" if copied else "supported"
    return "beyond" if specific or share >= BEYOND else "vague"
