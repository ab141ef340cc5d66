"""What the doctor asks for a task: is there something to predict, and enough that is new held out?

Which of them a task asks for stands in the `checks` of its kdlib.tasks.base.Task, by name.
"""

import math
import operator
from collections import Counter

import torch
from datasets import Dataset

from kdlib.config.terms import SPAN_TERMS
from kdlib.data.batches import calibration_rows, reads_of
from kdlib.data.blocks import tokenized
from kdlib.data.pairs import coverage
from kdlib.diagnostics.context import Context, Findings, Unavailable, critical, note, warning
from kdlib.errors import ModelError
from kdlib.losses.alignment import unit_of
from kdlib.losses.signals import kept
from kdlib.metrics.bootstrap import FEW_UNITS
from kdlib.models.classifier import class_order, named_classes
from kdlib.models.heads import FOUND, WHY, ahead_by_rounding, look_ahead, remedy

LEFT_OUT = 0.05  # of the documents
CUT_DOCUMENTS, CUT_TOKENS = 0.10, 0.05  # shares
MOSTLY = 0.5  # of the documents
FEW_ROWS, FEW_TOKENS = 10, 1000  # of text, held out
FEW_HELD_OUT = 100  # rows that are classified, or questions
SAMPLE = 200  # documents by which another column is judged
LOOKED_AT, AT_ONCE = 128, 16  # training rows that a classifying teacher is asked about
HARDLY, SOME = 0.1, 20  # a share of a class of tokens; as many that it matters
FEWEST = 8  # rows, below which an accuracy tells nothing
CONFLICTING = 0.01  # of the texts
RARE, FEW_TRAINED = 0.01, 10  # of a class: a share of the training rows, and rows
FEW_OF_A_CLASS = 5  # held-out rows, below which its F1 moves by a tenth and more with each
NAMED = 5  # classes


def documents_have_something_to_predict(context: Context) -> Findings:
    """Documents of fewer than two tokens have no kept token, and are left out."""
    column = context.config.data.text
    for name in ("train", "validation"):
        total, short = _counted(name, column, context)
        if short <= LEFT_OUT * total:
            continue
        # of a mix each source has columns of its own, and of a stream the text alone is there
        is_whole = not (context.config.data.mix or context.config.data.streaming)
        sample = context.split[name] if is_whole else Dataset.from_dict({})
        sample = sample.select(range(min(SAMPLE, len(sample))))
        texts = [each for each in sample.column_names if all(isinstance(x, str) for x in sample[each])]
        most = LEFT_OUT * len(sample)
        others = [each for each in texts if each != column and _too_short(sample, each, context) <= most]
        found = f"{short} of {total} {name} documents in {column!r} are shorter than two tokens and left out"
        why, do = "a row's first token is never predicted", "leave such rows out of the text"
        if others:
            found += f"; those in {', '.join(others)} are not"
            do = f"name the column with the text: {others[0]}"
        change = {"data.text": others[0]} if len(others) == 1 else None
        found_as = critical if short == total else warning
        yield found_as("data.text", found, why, do, change)


def documents_are_not_cut(context: Context) -> Findings:
    """Without packing, what is longer than a row is lost."""
    notes, can_pack = context.prepared.notes, "packing" in context.rules.reads
    for name in ("train", "validation"):
        documents = notes[f"{name}_documents" if can_pack else f"{name}_rows"]  # of others not all are taken
        documents -= notes.get(f"{name}_documents_shorter_than_two_tokens", 0)
        shortened = notes.get(f"{name}_documents_cut", 0) / max(documents, 1)
        lost = notes.get(f"{name}_share_of_tokens_cut_off", 0.0)
        if shortened <= CUT_DOCUMENTS and lost <= CUT_TOKENS:
            continue
        found = f"{shortened:.0%} of the {name} documents are longer than {context.config.data.max_length} "
        found += f"tokens and cut, which loses {lost:.0%} of all tokens; "
        found += f"the longest has {notes[f'{name}_longest_document']}"
        found_as, why = warning, "what is cut off is never trained on: the ends of texts, or whole answers"
        if context.rules.unit == "row":
            found_as, why = note, "what is cut off is not read: does the beginning of a text tell its class?"
        yield found_as(
            "data.max_length", found, why, "raise max_length" + ", or set packing: true" * can_pack
        )


def tokens_have_a_term(context: Context) -> Findings:
    """Where two tokenizers cut a class of tokens otherwise, a term over spans of one token never sees it."""
    serving = [name for name in SPAN_TERMS if unit_of(name, spans=True) == "spans"]
    if "span_kl" not in context.active or context.active.keys() & {*serving}:
        return
    table = coverage(context.prepared, context.tokenizer).drop("all")
    for name, found in table[(table["tokens"] >= SOME) & (table["one_to_one"] < HARDLY)].iterrows():
        share = f"{found['one_to_one']:.0%} of the {found['tokens']:,.0f} tokens looked at"
        yield warning(
            "loss.weights",
            f"of {name} {share} are one token for student and teacher",
            "span_kl compares such tokens alone, so of the others nothing is learned from the teacher",
            f"weight {' or '.join(serving)} beside it, which compare every span; or take a tokenizer that "
            f"cuts {name} as the teacher's does",
        )


def documents_came_once(context: Context) -> Findings:
    """Each text or question is kept once, on one side; few were left out for it, and none leaked."""
    notes, column = context.prepared.notes, context.config.data.text
    out = notes.get("duplicate_documents_left_out", 0)
    total = out and notes["train_documents"] + notes["validation_documents"] + out
    has_own_split = notes["split"].startswith("the source's")
    if out > (0 if has_own_split else LEFT_OUT * total):
        found_as = warning if out > MOSTLY * total else note
        found = f"{out} of {total} documents came twice and were left out"
        why, do = "each text is kept once, on one side", f"see whether {column!r} is the column with the text"
        if has_own_split:
            why = "what the source's own splits share is held out and not trained on"
            do = "nothing, or take a source whose splits do not repeat each other"
        yield found_as("data.source" if has_own_split else "data.text", found, why, do)


def enough_is_held_out(context: Context) -> Findings:
    """A comparison on a handful of rows tells nothing."""
    rows, tokens = (context.prepared.notes[f"validation_{name}"] for name in ("rows", "tokens"))
    if rows < FEW_ROWS or tokens < FEW_TOKENS:
        found = f"{rows} rows with {tokens} tokens are held out"
        why = f"below {FEW_ROWS} rows or {FEW_TOKENS:,} tokens a comparison hardly tells models apart"
        yield warning(_held_out_by(context, rows), found, why, "hold out more, or give more text")
    elif (documents := context.prepared.notes["validation_documents"]) < FEW_UNITS:
        why = f"documents are what a comparison's intervals rest on; below {FEW_UNITS} they are rough"
        yield note("data.validation", f"{documents} documents are held out", why, "hold out more")


def teacher_has_a_head(context: Context) -> Findings:
    """The teacher was trained for the data's classes, by the same names; or a stage of its own does it."""
    config = context.config
    if config.teacher_stage is not None:
        return
    stated, labels = context.configs["teacher"], context.prepared.labels
    try:
        order = class_order(config.teacher.model, stated, labels)
    except ModelError as error:
        raise Unavailable("teacher.model", error) from error
    kinds = getattr(stated, "architectures", None) or []
    classifies = any("Classification" in kind for kind in kinds)
    if order is None or (kinds and not classifies):
        head = f"a head for {stated.num_labels} classes" if classifies else "no head for classes"
        found = f"{config.teacher.model} has {head}; the data has {len(labels)}"
        do = "train it first (teacher_stage: {training: {num_train_epochs: 3, learning_rate: 2e-5}})"
        do += ", or name a teacher that was trained on these classes"
        yield critical("teacher.model", found, "an untrained head has nothing to teach", do)
    elif named_classes(stated) is None:
        found, named = f"its {len(labels)} classes have no names (LABEL_0, …)", ", ".join(labels[:3])
        why = f"they are taken in the order of the data's ({named}, …)"
        do = "see that its accuracy is far above chance; or give data.labels in the teacher's order"
        yield note("teacher.model", found, why, do)


def enough_rows_are_held_out(context: Context) -> Findings:
    """An accuracy from few rows, or questions, tells no models apart."""
    rows, unit = len(context.prepared.validation), "rows" if context.rules.unit == "row" else "questions"
    if rows < FEW_HELD_OUT:
        why = f"the accuracy of so few has a 95 % interval of up to ± {98 / math.sqrt(rows):.0f} points"
        yield warning(_held_out_by(context, rows), f"{rows} {unit} are held out", why, "hold out more")


def texts_have_one_class(context: Context) -> Findings:
    """Texts with two classes teach none."""
    notes = context.prepared.notes
    conflicting = notes.get("conflicting_documents_left_out", 0)
    if conflicting > CONFLICTING * (notes["train_documents"] + notes["validation_documents"]):
        found = f"{conflicting} texts stand there with two classes, and were left out"
        do = f"look at the column {context.config.data.label!r}"
        yield warning("data.label", found, "what is labelled by chance cannot be learned", do)


def held_out_groups_are_new(context: Context) -> Findings:
    """What belongs together is on one side; where kdlib splits, it sees to that."""
    if count := context.prepared.notes.get("groups_on_two_sides", 0):
        found = f"{count} groups of held-out rows are trained on as well"
        do = "mend the source's splits, or leave them out of it: kdlib's own keep groups whole"
        yield warning("data.group", found, "the held-out figures then read too high", do)


def classes_are_large_enough(context: Context) -> Findings:
    """Each class has rows to learn it from, is no small minority, and has held-out rows enough of its own."""
    data, notes = context.config.data, context.prepared.notes
    for name in ("train", "validation", "test"):
        counts, rows = notes.get(f"{name}_classes", {}), notes.get(f"{name}_rows", 0)
        where, setting, least = f"data.{name}", "max_eval_rows", FEW_OF_A_CLASS
        why, do = "one row then moves a class's F1 by a tenth or more", "hold out more, or give more of them"
        if name == "train":
            where, setting, least = "data.label", "max_train_rows", max(FEW_TRAINED, RARE * rows)
            why = "the student hardly sees them, and accuracy hardly counts them: read macro-F1"
            do = "give more rows of them, join them with others, or leave them out"
        few = sorted((count, label) for label, count in counts.items() if count < least)
        if not few:
            continue
        if getattr(data, setting) is not None and rows < notes[f"{name}_documents"]:
            where, do = f"data.{setting}", "take more rows"
        named = ", ".join(f"{label} {count}" for count, label in few[:NAMED]) + ", …" * (len(few) > NAMED)
        found = f"{len(few)} of {len(counts)} classes have fewer than {least:.0f} of the {rows} {name} rows"
        yield warning(where, f"{found}: {named}", why, do)


@torch.no_grad()
def teacher_knows_the_classes(context: Context) -> Findings:
    """Its accuracy on the first training rows is above that of always saying the commonest class."""
    prepared, teacher, count = context.prepared, context.teacher, min(LOOKED_AT, len(context.prepared.train))
    said, came = [], []
    for start in range(0, count, AT_ONCE):
        rows = [prepared.train[i] for i in range(start, min(start + AT_ONCE, count))]
        batch = {name: values.to(teacher.model.device) for name, values in prepared.collate(rows).items()}
        tokens = kept(batch["labels"])
        said += teacher(batch, tokens).logits().argmax(-1).tolist()
        came += tokens.targets.tolist()
    if len(came) < FEWEST:
        return
    right = sum(map(operator.eq, said, came)) / len(came)
    chance = max(Counter(came).values()) / len(came)
    if right <= chance + 1.96 * math.sqrt(chance * (1 - chance) / len(came)):
        found = (
            f"its accuracy on {len(came)} training rows is {right:.0%}, by the commonest class {chance:.0%}"
        )
        why = "it was not trained for this, or has its classes in another order"
        do = "train it first (teacher_stage), or give data.labels in the order of the teacher's classes"
        is_mild = right > chance or context.is_taught_briefly
        yield (warning if is_mild else critical)("teacher.model", found, why, do)


def _counted(name: str, column: str, context: Context) -> tuple[int, int]:
    """The documents of a side, and how many of them are too short: as preparing them found, if it could."""
    try:
        notes = context.prepared.notes
    except Unavailable:  # perhaps as all are too short
        if context.config.data.mix or context.config.data.streaming:
            raise
        return len(context.split[name]), _too_short(context.split[name], column, context)
    return notes[f"{name}_documents"], notes[f"{name}_documents_shorter_than_two_tokens"]


def _held_out_by(context: Context, rows: int) -> str:
    """The setting by which so few rows are held out."""
    most = context.config.data.max_eval_rows
    return "data.validation" if most is None or rows < most else "data.max_eval_rows"


def _too_short(documents: Dataset, column: str, context: Context) -> int:
    """How many have fewer than two tokens in this column."""
    return len(documents) - len(tokenized(documents.select_columns([column]), column, context.tokenizer))


def models_do_not_look_ahead(context: Context) -> Findings:
    """No model reads the tokens that it is to predict."""
    models = {"teacher.model": context.teacher.model} if context.config.teacher else {}
    if context.config.student.source != "teacher":
        models["student.from"] = context.student
    for where, model in models.items():
        reads = reads_of(where.partition(".")[0])
        found = look_ahead(model, calibration_rows(context.prepared.train, 1, reads=reads))
        if found > ahead_by_rounding(model):
            yield critical(where, FOUND.format(found), WHY, remedy(model))
