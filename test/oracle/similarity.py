"""Similarities of pairs of texts, for src/trainer/rewards.ts.

Versions: rouge-score 0.1.2, nltk 3.10.4, rapidfuzz 3.14.6 (Python 3.11.7).
Command: python test/oracle/similarity.py > test/golden/trainer/similarity.json
No seed: the pairs are those below. ROUGE without stemming; GLEU over the words that ROUGE finds; the ratio over characters.
"""

import json
from importlib.metadata import version

from nltk.translate.gleu_score import sentence_gleu
from rapidfuzz import fuzz
from rouge_score import rouge_scorer, tokenizers

PAIRS = [
    ("The capital of France is Paris.", "Paris is the capital of France."),
    ("the cat sat on the mat", "the cat is on the mat"),
    ("the the the the the the the", "the cat is on the mat"),
    ("a b c d e f g", "g f e d c b a"),
    ("one", "one"),
    ("one", "two"),
    ("It's 3.5% of 1,000, isn't it?", "it is 3.5 % of 1000, is it not"),
    ("Answer: 42", "42"),
    ("x = foo(bar); return x", "return foo(bar)"),
    ("", "something"),
    (
        "to be or not to be that is the question whether tis nobler in the mind to suffer",
        "to be or not to be that is what we ask whether it is nobler to suffer in the mind",
    ),
]

METRICS = ["rouge1", "rouge2", "rouge3", "rouge4", "rouge5", "rougeL"]


def main() -> None:
    scorer = rouge_scorer.RougeScorer(METRICS, use_stemmer=False)
    words = tokenizers.DefaultTokenizer(False)
    cases = []
    for answer, reference in PAIRS:
        scores = scorer.score(reference, answer)
        values = {f"rouge_{name[5:].lower()}": scores[name].fmeasure for name in METRICS}
        hypothesis = words.tokenize(answer)
        values["gleu"] = sentence_gleu([words.tokenize(reference)], hypothesis) if hypothesis else 0.0
        values["fuzzy_match"] = fuzz.ratio(answer, reference) / 100
        cases.append({"answer": answer, "reference": reference, "values": values})
    versions = {name: version(name) for name in ("rouge-score", "nltk", "rapidfuzz")}
    print(json.dumps({"versions": versions, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()
