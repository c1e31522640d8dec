"""Functions of our task files: rows brought to one form, prompts, and the scores of CoQA."""

import re
import string
from collections import Counter

OCNLI_LABELS = ("entailment", "neutral", "contradiction")
CLUE_LABELS = ("neutral", "entailment", "contradiction")  # as the hub's `clue/clue` numbers them
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def unify_c3(rows):
    """Rows with content, question, choices and label, from those or from CLUE's context, choice and
    answer."""

    def unify(row: dict) -> dict:
        if "context" not in row:
            return {}
        return {
            "content": "\n".join(row["context"]),
            "choices": row["choice"],
            "label": row["choice"].index(row["answer"]),
        }

    return rows.map(unify)


def unify_ocnli(rows):
    """Rows with premise, hypothesis and label 0 to 2 (OCNLI_LABELS), from those or from CLUE's sentence1 and
    2."""

    def unify(row: dict) -> dict:
        if "sentence1" not in row:
            return {}
        return {
            "premise": row["sentence1"],
            "hypothesis": row["sentence2"],
            "label": OCNLI_LABELS.index(CLUE_LABELS[row["label"]]),
        }

    return rows.filter(lambda row: row["label"] >= 0).map(unify)  # annotators disagreed: no label


def ocnli_readings(row: dict) -> list[str]:
    """The pair joined by yes, so and no, in the order of OCNLI_LABELS."""
    return [f"{row['premise']}, 正确? {word}, {row['hypothesis']}" for word in ("是的", "所以", "不是的")]


def coqa_prompt(row: dict) -> str:
    """The story and the conversation up to the last question, whose answer is asked for."""
    questions, answers = row["questions"]["input_text"], row["answers"]["input_text"]
    turns = [
        f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(questions, answers[:-1], strict=False)
    ]
    return "".join([row["story"], "\n\n", *turns, f"Q: {questions[-1]}\n\nA:"])


def coqa_answers(row: dict) -> list[str]:
    """What people answered to the last question: the first annotator, then whoever said something else."""
    last = len(row["questions"]["input_text"]) - 1
    annotators = [row["answers"], *(row.get("additional_answers") or {}).values()]
    distinct: dict[str, str] = {}
    for answer in (annotator["input_text"][last] for annotator in annotators if annotator):
        distinct.setdefault(answer.lower(), answer)
    return list(distinct.values())


def score_coqa(row: dict, results: list[str]) -> dict[str, float]:
    """em and f1 of the first line written, each the mean over the annotators left out in turn.

    With one annotator left out, the score is the best against the others, which is how people themselves are
    scored.
    """
    answers, written = coqa_answers(row), results[0].strip().split("\n")[0]
    folds = [answers[:i] + answers[i + 1 :] for i in range(len(answers))] if len(answers) > 1 else [answers]
    return {
        name: sum(max(score(answer, written) for answer in fold) for fold in folds) / len(folds)
        for name, score in (("em", exact_match), ("f1", word_f1))
    }


def exact_match(answer: str, written: str) -> float:
    """1 where both are the same words, as SQuAD compares them."""
    return float(_words(answer) == _words(written))


def word_f1(answer: str, written: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD defines it; two empty texts agree."""
    expected, found = _words(answer), _words(written)
    if not expected or not found:
        return float(expected == found)
    n_common = sum((Counter(expected) & Counter(found)).values())
    return 2 * n_common / (len(expected) + len(found))


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()
